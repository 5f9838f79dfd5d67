"""Kronfluence's factors as a curvature bundle: in its layout of files, and from the library itself."""

import json
import sys

import pytest
import torch
import yaml
from architectures import Attending, Grouped, lively, named
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.task import Task
from safetensors.torch import save_file
from samples import pairs, tensors
from torch import nn

from imu_ray import CheckpointError, ConfigError, UnlearnConfig, import_factors, remember, unlearn
from imu_ray.cli import main
from imu_ray.influence.factors import ARGUMENTS, DATASET, INPUTS, OUTPUTS, POSITIONS, read_factors
from imu_ray.models.checkpoint import model_hash
from imu_ray.run.bundle import Bundle, write_bundle

ROWS, INNER = 37, "body.5"
LAYERS = UnlearnConfig.from_recipe("samples").with_overrides(
    {
        "ascent.scope": "last:2",
        "ascent.views": 0,
        "ascent.stop.targets": {"forget.loss": 1.9},
        "audit.report": False,
        "audit.recovery": [],
    }
)


def model():
    return named("fc").double()


def write_factors(folder, sums, size=ROWS, most=100_000, positions=None):
    """Sums of both factors by layer as kronfluence lays them out."""
    folder.mkdir()
    parts = {
        INPUTS: {name: each["inputs_DD"] for name, each in sums.items()},
        OUTPUTS: {name: each["outputs_CC"] for name, each in sums.items()},
        POSITIONS: {name: torch.tensor([int(positions or each["positions"])]) for name, each in sums.items()},
    }
    for name, tensors_ in parts.items():
        save_file({layer: each.contiguous() for layer, each in tensors_.items()}, folder / f"{name}.safetensors")
    (folder / DATASET).write_text(json.dumps({"type": "TensorDataset", "dataset_size": size, "indices": None}))
    (folder / ARGUMENTS).write_text(json.dumps({"strategy": "ekfac", "covariance_max_examples": most}))
    return folder


def random_sums(**layers):
    """Positive definite sums for layers of given sizes ``(C, D)``, by name with _ for a dot."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, (outputs, width) in layers.items():
        roots = [torch.randn(size, 50, generator=generator, dtype=torch.float64) for size in (outputs, width)]
        products = [root @ root.T for root in roots]
        made[name.replace("_", ".")] = {"outputs_CC": products[0], "inputs_DD": products[1], "positions": ROWS}
    return made


@pytest.mark.usefixtures("ray_cluster")
def test_an_update_with_factors_that_were_read_is_that_with_our_own_of_the_same_sums(tmp_path):
    remember(model(), pairs(ROWS, dtype=torch.float64), path=tmp_path / "all.safetensors", config=LAYERS)
    whole = Bundle.open(tmp_path / "all.safetensors")
    sums = whole.load(dict.fromkeys((INNER, "fc"), "kfac"))
    record = whole.record.model_copy(update={"sums": {name: ["kfac"] for name in sums}})
    write_bundle(tmp_path / "own.safetensors", record, {name: {"kfac": each} for name, each in sums.items()})
    place = import_factors(model(), write_factors(tmp_path / "factors", sums), path=tmp_path / "read.safetensors")
    record = Bundle.open(place).record
    assert (record.model, record.rows, record.seed, record.source) == (model_hash(model()), ROWS, None, "kronfluence")
    assert (record.shapes, record.figures) == ({INNER: [12, 33], "fc": [5, 13]}, {})
    runs = {}
    for name in ("own", "read"):
        config = LAYERS.with_overrides({"ascent.bundle": str(tmp_path / f"{name}.safetensors")})
        runs[name] = unlearn(model(), pairs(8, dtype=torch.float64), config=config, run_dir=tmp_path / name)
    moved, expected, before = (
        nn.utils.parameters_to_vector(each.parameters()) for each in (runs["read"].model, runs["own"].model, model())
    )
    assert torch.equal(moved, expected)
    assert not torch.equal(moved, before)
    told = [runs[name].manifest["curvature"] for name in ("own", "read")]
    assert [each["source"] for each in told] == ["imu_ray", "kronfluence"]
    assert [each["rows"] for each in told] == [{"bundle": ROWS}] * 2


@pytest.mark.parametrize(("size", "most", "rows"), [(37, 100_000, 37), (37, None, 37), (1000, 20, 20)])
def test_the_samples_behind_the_sums_are_those_that_were_fitted_on(size, most, rows, tmp_path):
    sums = random_sums(fc=(5, 13))
    found = read_factors(write_factors(tmp_path / "factors", sums, size, most), model())["fc"]
    assert (found.count, found.positions) == (rows, ROWS)
    assert torch.equal(found.means.outputs_CC, sums["fc"]["outputs_CC"] / rows)
    assert torch.equal(found.means.inputs_DD, sums["fc"]["inputs_DD"] / ROWS)


@pytest.mark.parametrize(
    ("make", "sums", "message"),
    [
        (model, {"nowhere": (5, 13)}, "nowhere: no such layer"),
        (model, {"body_2": (5, 13)}, "body.2: no such layer"),
        (model, {"fc": (5, 12)}, r"fc: the factor of the inputs is \[12, 12\], the layer needs \[13, 13\]"),
        (model, {"fc": (4, 13)}, r"fc: the factor of the outputs is \[4, 4\], the layer needs \[5, 5\]"),
        (lambda: lively(Grouped), {"grouped": (6, 19)}, "grouped: has groups"),
        (model, {}, "no layer is in it"),
    ],
)
def test_factors_of_another_model_are_refused(make, sums, message, tmp_path):
    with pytest.raises(CheckpointError, match=rf"does not fit \w+: {message}.*give the model that they were fitted on"):
        import_factors(make(), write_factors(tmp_path / "f", random_sums(**sums)), path=tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_what_is_no_model_is_refused_as_elsewhere(tmp_path):
    with pytest.raises(ConfigError, match=r"model is a str; expected a torch.nn.Module or an imu_ray.ModelSpec"):
        import_factors("model.pt", write_factors(tmp_path / "f", random_sums(fc=(5, 13))), path=tmp_path / "b")


def test_sums_that_are_not_finite_or_of_too_few_positions_are_refused(tmp_path):
    broken = random_sums(fc=(5, 13))
    broken["fc"]["inputs_DD"][3, 3] = torch.nan
    with pytest.raises(CheckpointError, match="fc: the factor of the inputs is not finite"):
        read_factors(write_factors(tmp_path / "nan", broken), model())
    with pytest.raises(CheckpointError, match="fc: 9 positions of 37 samples"):
        read_factors(write_factors(tmp_path / "few", random_sums(fc=(5, 13)), positions=9), model())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / f"{OUTPUTS}.safetensors").unlink(),
        lambda folder: (folder / f"{INPUTS}.safetensors").write_bytes(b"\x00" * 20),
        lambda folder: save_file({"other": torch.ones(2)}, folder / f"{POSITIONS}.safetensors"),
        lambda folder: (folder / DATASET).unlink(),
        lambda folder: (folder / ARGUMENTS).write_text("{"),
        lambda folder: (folder / ARGUMENTS).write_text("{}"),
    ],
    ids=["missing", "broken", "another layer", "no data set", "no json", "no limit"],
)
def test_a_folder_that_is_not_whole_is_refused(spoil, tmp_path):
    folder = write_factors(tmp_path / "factors", random_sums(fc=(5, 13)))
    spoil(folder)
    with pytest.raises(CheckpointError, match="expected kronfluence's folder factors_NAME with"):
        read_factors(folder, model())


@pytest.mark.usefixtures("restored_log")
def test_the_command_reads_factors_in_place_of_a_training_set(tmp_path, monkeypatch, capfd):
    folder = write_factors(tmp_path / "factors", random_sums(fc=(5, 13)))
    save_file(named("fc").state_dict(), tmp_path / "model.safetensors")
    job = {
        "model": {"factory": "architectures:named", "checkpoint": str(tmp_path / "model.safetensors")},
        "forget_set": {"path": str(tmp_path / "gone.parquet")},
        "run_dir": str(tmp_path / "run"),
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    command = ["imu-ray", "--config", tmp_path / "job.yaml", "--factors", folder, "--out", tmp_path / "b.safetensors"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    assert main("remember") == 0
    assert Bundle.open(tmp_path / "b.safetensors").record.source == "kronfluence"
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--rows", "5"])
    assert main("remember") == 2
    assert "sums over rows already" in json.loads(capfd.readouterr().out.splitlines()[-1])["reason"]


@pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning")  # kronfluence's own
def test_factors_of_kronfluence_are_the_sums_over_positions_of_its_layers(tmp_path):
    names = ("patch", "fc1", "head")

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            inputs, labels = batch
            return nn.functional.cross_entropy(model(inputs), labels, reduction="sum")

        compute_measurement = compute_train_loss

        def get_influence_tracked_modules(self):
            return list(names)

    (inputs, labels), task = tensors(41), Classification()
    dataset = torch.utils.data.TensorDataset(inputs, labels)
    prepared = prepare_model(lively(Attending), task)
    analyzer = Analyzer("net", prepared, task, cpu=True, output_dir=str(tmp_path), disable_tqdm=True)
    arguments = FactorArguments("ekfac", use_empirical_fisher=True)  # true labels, so that they can be told
    analyzer.fit_all_factors("all", dataset, per_device_batch_size=8, factor_args=arguments)
    found = read_factors(tmp_path / "net" / "factors_all", lively(Attending))
    assert set(found) == set(names)

    net, seen, grads = lively(Attending), {}, {}

    def watch(name):
        def see(layer, given, out):
            seen[name] = given[0].detach()
            out.register_hook(lambda grad: grads.update({name: grad}))

        net.get_submodule(name).register_forward_hook(see)

    for name in names:
        watch(name)
    nn.functional.cross_entropy(net(inputs), labels, reduction="sum").backward()
    seen["patch"] = nn.functional.unfold(seen["patch"], 2, stride=2).mT
    grads["patch"] = grads["patch"].flatten(2).mT
    for name in names:
        given, pulled = (part.reshape(-1, part.shape[-1]).double() for part in (seen[name], grads[name]))
        given = torch.cat([given, torch.ones(len(given), 1)], 1)
        assert (found[name].count, found[name].positions) == (41, len(given)), name
        torch.testing.assert_close(found[name].inputs_DD, given.T @ given, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[name].outputs_CC, pulled.T @ pulled, rtol=1e-4, atol=1e-5)
