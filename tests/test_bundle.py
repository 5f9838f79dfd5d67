"""The curvature bundle: what it holds of a training set, and that it steers an update as the training set itself would."""

import json
import stat
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from architectures import named
from safetensors.torch import load_file, save_file
from samples import image_table, pairs

from imu_ray import CheckpointError, ConfigError, SweepConfig, UnlearnConfig, remember, unlearn
from imu_ray.cli import main
from imu_ray.config import AscentConfig, ForgetSetConfig
from imu_ray.distributed.bundle_job import check_bundle, fit_bundle
from imu_ray.experiments.axes import make_trials
from imu_ray.influence.curvature import PRECONDITIONERS
from imu_ray.influence.curvature.ggn import MatrixSum
from imu_ray.influence.curvature.kronecker import sampled_labels, uniform_draws
from imu_ray.models.checkpoint import model_hash
from imu_ray.run.bundle import Bundle, BundleRecord, write_bundle
from imu_ray.run.storage import below
from imu_ray.scopes.head import Head
from imu_ray.tasks.classification import ClassificationTask

ROWS, INNER = 37, "body.5"
TASK = ClassificationTask(ForgetSetConfig(), head="fc", num_classes=5, dtype=torch.float64)


def model():
    return named("fc").double()


def train_set(rows=ROWS):
    return pairs(rows, dtype=torch.float64)


def config(**changes):
    base = {
        "influence.block_rows": 4,
        "influence.blocks_per_shard": 1,
        "audit.report": False,
        "ascent.stop.targets": {"forget.loss": 1.9},
    }
    return UnlearnConfig.from_recipe("samples").with_overrides(
        base | {key.replace("__", "."): value for key, value in changes.items()}
    )


def with_ones(inputs):
    return torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], dim=1)


def seen():
    """Inputs of both last layers, logits and labels, of a plain forward pass."""
    net, samples = model(), train_set()
    with torch.no_grad():
        inner = net.body[:5](samples.inputs)
        features = net.body(samples.inputs)
        return inner, features, net.fc(features), samples.labels


def expected_head(features, logits):
    inputs, p = with_ones(features), logits.softmax(1)
    return {
        "fc:kfac:count": torch.tensor(ROWS),
        "fc:kfac:positions": torch.tensor(ROWS),
        "fc:kfac:inputs_DD": inputs.T @ inputs,
        "fc:kfac:outputs_CC": torch.diag(p.sum(0)) - p.T @ p,
        "fc:block_ggn:count": torch.tensor(ROWS),
        "fc:block_ggn:total": torch.einsum("bc,bd,be->cde", p * (1 - p), inputs, inputs),
    }


def expected_inner(inner, features, logits):
    drawn = sampled_labels(logits, uniform_draws([str(row) for row in range(ROWS)], 0))
    pull = (logits.softmax(1) - torch.nn.functional.one_hot(drawn, 5)) @ model().fc.weight.detach()
    grads, inputs = pull * (1 - features**2), with_ones(inner)
    return {
        f"{INNER}:kfac:count": torch.tensor(ROWS),
        f"{INNER}:kfac:positions": torch.tensor(ROWS),
        f"{INNER}:kfac:inputs_DD": inputs.T @ inputs,
        f"{INNER}:kfac:outputs_CC": grads.T @ grads,
    }


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("scope", ["head", "last:2"])
def test_a_bundle_holds_the_sums_over_all_rows_whatever_the_number_of_workers(scope, tmp_path):
    for workers in (1, 4):
        settings = config(ascent__scope=scope, resources__workers=workers)
        remember(model(), train_set(), path=tmp_path / f"{workers}.safetensors", config=settings)
    found, other = (load_file(tmp_path / f"{workers}.safetensors") for workers in (1, 4))
    inner, features, logits, labels = seen()
    expected = expected_head(features, logits)
    if scope == "last:2":
        expected |= expected_inner(inner, features, logits)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12)
        assert torch.equal(found[name], other[name])
    record = Bundle.open(tmp_path / "1.safetensors").record
    assert (record.model, record.rows, list(record.shapes.values())[-1]) == (model_hash(model()), ROWS, [5, 13])
    third = labels == 3
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert record.figures["loss"] == pytest.approx(float(losses.mean()))
    assert record.figures["per_class"]["3"]["samples"] == int(third.sum())
    assert record.figures["per_class"]["3"]["loss"] == pytest.approx(float(losses[third].mean()))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("scope", ["head", "last:2"])
def test_an_update_with_the_bundle_is_that_with_the_training_set(scope, tmp_path):
    path, forget = tmp_path / "b.safetensors", train_set(8)
    remember(model(), train_set(), path=path, config=config(ascent__scope=scope))
    steered = config(ascent__scope=scope, ascent__bundle=str(path))
    found = unlearn(model(), forget, config=steered, run_dir=tmp_path / "run")
    by_rows = config(ascent__scope=scope, ascent__preconditioner_sets=["train"])
    expected = unlearn(model(), forget, evaluation={"train": train_set()}, config=by_rows, run_dir=tmp_path / "other")
    before, after, wanted = (
        torch.nn.utils.parameters_to_vector(each.parameters()) for each in (model(), found.model, expected.model)
    )
    assert (after - wanted).norm() <= 1e-9 * (wanted - before).norm() > 0
    kind = "block_ggn" if scope == "head" else "kfac"
    digest = Bundle.open(path).digest
    assert found.manifest["curvature"] == {
        "kind": kind,
        "rows": {"bundle": ROWS},
        "bundle": digest,
        "source": "imu_ray",
    }
    assert expected.manifest["curvature"] == {
        "kind": kind,
        "rows": {"train": ROWS},
        "bundle": None,
        "source": "imu_ray",
    }
    if scope == "head":
        moved = path.rename(tmp_path / "moved.safetensors")
        steered = steered.with_overrides({"ascent.bundle": str(moved)})
        assert unlearn(model(), forget, config=steered, run_dir=tmp_path / "run").manifest["resumed"] == []
        moved.unlink()
        remember(model(), train_set(), path=moved, config=config(), rows=30)
        with pytest.raises(CheckpointError, match="holds a run on another curvature bundle"):
            unlearn(model(), forget, config=steered, run_dir=tmp_path / "run")
        with pytest.raises(CheckpointError, match="with other settings"):
            unlearn(model(), forget, config=config(), run_dir=tmp_path / "run")


@pytest.mark.usefixtures("ray_cluster", "restored_log")
def test_the_command_writes_a_private_file_without_an_id_and_never_over_another(tmp_path, monkeypatch, capfd):
    table = image_table(20)
    ids = [f"person-{row:04d}" for row in range(20)]
    pq.write_table(table.set_column(0, "id", pa.array(ids)), tmp_path / "train.parquet")
    save_file(named("fc").state_dict(), tmp_path / "model.safetensors")
    job = {
        "model": {"factory": "architectures:named", "checkpoint": str(tmp_path / "model.safetensors")},
        "forget_set": {"path": str(tmp_path / "gone.parquet"), "image_mode": "L", "size": 3},
        "run_dir": str(tmp_path / "run"),
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    folder, out = tmp_path / "shared", tmp_path / "shared" / "b.safetensors"
    folder.mkdir(mode=0o755)
    more = ["--config", tmp_path / "job.yaml", "--out", out, "--train-set", tmp_path / "train.parquet"]
    monkeypatch.setattr(sys, "argv", ["imu-ray", *map(str, more)])
    assert (main("remember"), main("remember")) == (0, 2)
    first, second = map(json.loads, capfd.readouterr().out.splitlines())
    assert (first["bundle"], first["run_dir"]) == (str(out), None)
    assert "exists already" in second["reason"]
    assert (stat.S_IMODE(folder.stat().st_mode), stat.S_IMODE(out.stat().st_mode)) == (0o755, 0o600)
    assert Bundle.open(out).record.rows == 20
    monkeypatch.setattr(sys, "argv", ["imu-ray", *map(str, [*more[:-2], "--train-set", tmp_path / "other.parquet"])])
    out.rename(tmp_path / "kept")
    assert main("remember") == 2
    missing = json.loads(capfd.readouterr().out.splitlines()[-1])["reason"]
    assert f"the training set {tmp_path / 'other.parquet'} does not exist" in missing
    content = (tmp_path / "kept").read_bytes()
    assert not [name for name in ("person", "parquet", *ids) if name.encode() in content]


def written(path, sums=("kfac", "block_ggn")):
    """A small bundle of the model's head."""
    _, features, logits, _ = seen()
    tensors = {kind: {} for kind in sums}
    for name, tensor in expected_head(features, logits).items():
        _, kind, field = name.split(":")
        if kind in tensors:
            tensors[kind][field] = tensor
    record = BundleRecord(created="", model=model_hash(model()), task="classification", rows=ROWS, seed=0,
                          shapes={"fc": [5, 13]}, sums={"fc": list(sums)}, figures={})  # fmt: skip
    write_bundle(path, record, {"fc": tensors})
    return Bundle.open(path)


@pytest.mark.parametrize("place", ["path", "s3"])
@pytest.mark.parametrize("kind", ["block_ggn", "feature_second_moment"])
def test_a_head_is_steered_by_what_is_read_back(place, kind, request, tmp_path):
    location = tmp_path if place == "path" else request.getfixturevalue("s3_uri")
    bundle, settings = written(below(location, "b.safetensors")), AscentConfig(preconditioner=kind)
    fitted = fit_bundle(bundle, Head.of(model(), TASK), settings, None)
    _, features, logits, _ = seen()
    sums = expected_head(features, logits)
    total = sums["fc:block_ggn:total"] if kind == "block_ggn" else sums["fc:kfac:inputs_DD"]
    expected = PRECONDITIONERS[kind].fit(lambda _: MatrixSum(ROWS, total), settings.preconditioner_damping)
    gradient = torch.randn(5, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fitted["fc"].apply_inverse(gradient), expected.apply_inverse(gradient))


@pytest.mark.parametrize(
    ("held", "kind", "named_head", "message"),
    [
        ("kfac", "block_ggn", "fc", r"preconditioner is 'block_ggn'.*no sums for; expected feature_second_moment, or"),
        ("block_ggn", "full_ggn", "fc", r"preconditioner is 'full_ggn'.*no sums for; expected block_ggn, or"),
        ("kfac", "block_ggn", INNER, r"has no sums for body.5; expected layers among fc"),
    ],
)
def test_a_bundle_without_what_the_settings_need_says_what_it_has(held, kind, named_head, message, tmp_path):
    bundle = written(tmp_path / "b.safetensors", [held])
    head = Head.of(model(), ClassificationTask(ForgetSetConfig(), named_head, 5))
    with pytest.raises(ConfigError, match=message):
        check_bundle(bundle, head, AscentConfig(preconditioner=kind), model_hash(model()))


def test_a_run_is_known_by_having_a_bundle_and_not_by_its_path_so_that_it_may_be_an_axis():
    none, one, two = (config(ascent__bundle=path) for path in (None, "one", "two"))
    assert one.identity() == two.identity() != none.identity()
    assert one.ascent.bundle == str(Path("one").absolute())
    axes = {"ascent.bundle": [None, "one", "s3://b/two"]}
    assert len(make_trials(axes, config(), SweepConfig())) == 3


def test_a_bundle_of_another_model_is_refused(tmp_path):
    bundle, other = written(tmp_path / "b.safetensors"), named("fc", seed=1).double()
    with pytest.raises(CheckpointError, match=r"b.safetensors was taken of another model \(hash"):
        check_bundle(bundle, Head.of(other, TASK), AscentConfig(), model_hash(other))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read"),
        (lambda path: save_file({"a": torch.ones(1)}, path), "is no curvature bundle"),
        (lambda path: path.unlink(), "does not exist"),
    ],
    ids=["truncated", "something else", "missing"],
)
def test_a_file_that_is_no_whole_bundle_is_refused(spoil, message, tmp_path):
    path = tmp_path / "b.safetensors"
    written(path)
    spoil(path)
    with pytest.raises(CheckpointError, match=message):
        Bundle.open(path)
