"""The public functions on one Ray session, in process with one worker."""

import hashlib
import json
import re
import stat

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from architectures import Moody, NoHead, Scaled, Twice, cosine, named, same_state
from figures import check_metrics
from safetensors.torch import load_file, save_file
from samples import SMALL, Pairs, image_table, pairs, paper, tensors
from scipy.stats import entropy

from imu_ray import (
    CheckpointError,
    ConfigError,
    EmptySelectionError,
    ForgetSetError,
    ModelSpec,
    NonFiniteError,
    UnlearnConfig,
    UnsupportedModelError,
    ascend,
    audit,
    score,
    unlearn,
)
from imu_ray.influence.layer_io import matrix_of
from imu_ray.run.directory import RunDirectory
from imu_ray.run.storage import open_storage

pytestmark = pytest.mark.usefixtures("ray_cluster")
SETTINGS = SMALL | {
    "influence.blocks_per_shard": 2, "ascent.learning_rate": 0.05, "ascent.stop.max_epochs": 4,
    "ascent.stop.targets": {"forget.accuracy": None},
}  # fmt: skip


def config(**changes):
    return paper(SETTINGS, **changes)


def sets():
    return {"retain": pairs(70, seed=1), "test": pairs(60, seed=2)}


def start(run_dir, model=None, **settings):
    """A run on 50 samples."""
    model = model or named("heads.head")
    return unlearn(model, pairs(50), evaluation=sets(), config=config(**settings), run_dir=run_dir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run on a live model in train mode."""
    model = named("heads.head").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    return model, before, start(tmp_path_factory.mktemp("run") / "out", model)


def test_the_run_directory_holds_what_it_should_and_nothing_else(finished):
    run_dir = finished[2].run_dir
    names = {path.name for path in run_dir.iterdir()}
    files = {"manifest.json", "manifest.sha256", "metrics.json", "model.safetensors", "report.html"}
    assert names == {*files, "intensities.parquet", "trajectory.parquet", "state", "tensorboard"}
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in run_dir.rglob("*") if path.is_file()} == {0o600}


def test_the_checkpoint_loads_and_differs_in_the_heads_tensors_only(finished):
    _, before, result = finished
    saved = load_file(result.run_dir / "model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], saved[key])}
    assert changed == {"heads.head.weight", "heads.head.bias"}
    assert named("heads.head").load_state_dict(saved)
    assert same_state(result.model, saved)


def test_the_callers_model_is_not_modified(finished):
    model, before, result = finished
    assert model.training
    assert same_state(model, before)
    assert result.model is not model


def test_membership_is_told_against_unseen_samples_of_the_forgotten_labels():
    samples, unseen = pairs(30), pairs(60, seed=1)
    samples.labels[:] = 2
    found = audit(named("heads.head"), samples, evaluation={"test": unseen}, config=config())
    membership = found["after"]["membership"]
    assert f"30 forget and {int((unseen.labels == 2).sum())} unseen rows" in membership["skipped"]


def test_the_audit_is_that_of_the_saved_model(finished):
    _, _, result = finished
    for name, samples in {"forget": pairs(50), **sets()}.items():
        inputs, labels = samples.inputs, samples.labels
        with torch.no_grad():
            logits = result.model.eval()(inputs)
        figures = result.metrics["after"][name]
        assert figures["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
        assert figures["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert check_metrics(result.run_dir, *sets()) == result.metrics


@pytest.mark.slow
def test_a_run_says_how_far_it_is_from_a_reference_model(tmp_path):
    other = named("heads.head", seed=1)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    tests = {"audit__recovery": ["probe", "relearn", "quantise", "lora"], "audit__recovery_steps": 1}
    result = start(tmp_path / "run", audit__reference=str(tmp_path / "other.safetensors"), **tests)
    assert check_metrics(tmp_path / "run", *sets()) == result.metrics
    samples = {"forget": pairs(50), **sets()}
    for side, model in (("before", named("heads.head")), ("after", result.model)):
        for name, each in samples.items():
            with torch.no_grad():
                p, q = (torch.softmax(net.eval()(each.inputs).double(), 1).numpy() for net in (other, model))
            found = result.metrics["reference"][side][name]
            assert found["kl"] == pytest.approx(np.mean([entropy(*pair) for pair in zip(p, q, strict=True)]), rel=1e-5)
            assert found["agreement"] == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Beside the reference model" in page
    assert "Accuracy retrained" in page
    beside = audit(other, pairs(50), evaluation=sets(), config=config())["after"]
    assert result.metrics["retrained"] == beside
    sides = result.metrics["gaps"]["sides"]
    gap = result.metrics["after"]["test"]["accuracy"] - beside["test"]["accuracy"]
    assert sides["unlearned"]["metrics"]["test"]["accuracy"]["mean"] == pytest.approx(gap)
    assert sides["do_nothing"]["tug_of_war"]["mean"] < 1
    alone = audit(
        result.model,
        pairs(50),
        evaluation=sets(),
        config=config(audit__reference=str(tmp_path / "run" / "model.safetensors")),
    )
    none = pytest.approx(0, abs=1e-12)
    assert alone["reference"]["after"]["forget"] == {"kl": none, "agreement": 1.0, "js": none}
    with pytest.raises(CheckpointError, match="does not exist"):
        start(tmp_path / "none", audit__reference=str(tmp_path / "none.safetensors"))


def test_the_manifest_says_what_was_done_and_how_far_the_damping_dominates(finished):
    manifest = json.loads((finished[2].run_dir / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["config"]["ascent"]["stop"]["max_epochs"] == 4
    assert manifest["forget_set"]["rows_used"] == 50
    assert manifest["ascent"]["status"] == "epochs_done"
    assert manifest["model"]["hash_before"] != manifest["model"]["hash_after"]
    assert set(manifest["seconds"]) == {"features", "scores", "table", "preconditioner", "ascent", "audit", "recovery"}
    assert manifest["versions"]["ray"] == ray.__version__
    figures = manifest["influence"]
    assert 0 <= figures["fisher_below_damping"] <= 1
    assert 0 <= figures["plain_gradient_share"] <= 1
    assert figures["damping"] == 0.01


def test_the_tables_have_a_row_per_sample_and_per_check(finished):
    run_dir = finished[2].run_dir
    table = pq.read_table(run_dir / "intensities.parquet")
    assert table.column_names == ["sample_id", "label", "loss", "influence", "gradient_norm", "outlier", "intensity"]
    assert table["sample_id"].to_pylist() == [str(i) for i in range(50)]
    assert ((table["intensity"].to_numpy() > 0) == (table["influence"].to_numpy() < 0)).all()
    trajectory = pq.read_table(run_dir / "trajectory.parquet")
    assert np.diff(trajectory["step"].to_numpy()).min() > 0
    measured = {f"{name}.{metric}" for name in ("forget", "retain", "test") for metric in ("loss", "accuracy")}
    assert {*measured, "parameter_drift", "gradient_norm", "effective_sample_size"} <= set(trajectory.column_names)


def test_a_direction_that_the_damping_makes_is_warned_of(tmp_path, caplog):
    score(named("fc"), pairs(20), config=config(influence__damping=1e6))
    assert "damping dominates: plain_gradient_share=1" in caplog.text


def test_outliers_are_measured_and_clipped_where_asked(finished, tmp_path):
    table = finished[2].intensities
    norms = table["gradient_norm"].to_numpy()
    np.testing.assert_allclose(table["outlier"].to_numpy(), norms / np.quantile(norms, 0.95), rtol=1e-12)
    clipped = score(named("heads.head"), pairs(50), config=config(influence__robust="clip"))
    assert clipped["gradient_norm"].equals(table["gradient_norm"])
    assert not clipped["influence"].equals(table["influence"])


def test_the_curvature_may_be_fitted_on_an_evaluation_set(finished, tmp_path):
    result = start(tmp_path / "run", influence__curvature_set="retain")
    assert result.intensities["gradient_norm"].equals(finished[2].intensities["gradient_norm"])
    assert not result.intensities["influence"].equals(finished[2].intensities["influence"])
    with pytest.raises(ConfigError, match="influence.curvature_set names the sample set 'retain'; expected forget"):
        score(named("heads.head"), pairs(50), config=config(influence__curvature_set="retain"))


def test_rows_can_be_scored_beside_their_own_batches(finished, tmp_path):
    result = start(tmp_path / "run", influence__reference="batch")
    assert result.intensities["loss"].equals(finished[2].intensities["loss"])
    assert not result.intensities["influence"].equals(finished[2].intensities["influence"])
    figures = result.manifest["influence"]
    assert (figures["batches"], figures["batch_rows"]) == (4, [2, 16])
    assert "4 batches of 2 to 16 rows" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(ConfigError, match=r"influence.refresh is 'step' .* with influence.reference 'batch'"):
        start(tmp_path / "other", influence__reference="batch", influence__refresh="step")


@pytest.mark.parametrize("refresh", ["epoch", "step"])
def test_scoring_again_leaves_the_first_intensities_and_another_model(refresh, finished, tmp_path):
    again = start(tmp_path / "run", influence__refresh=refresh)
    once = finished[2]
    assert again.intensities.equals(once.intensities)
    assert again.manifest["forget_set"]["forward_calls"] == once.manifest["forget_set"]["forward_calls"]
    assert again.manifest["model"]["hash_after"] != once.manifest["model"]["hash_after"]


def test_features_made_anew_give_the_same_model(finished, tmp_path):
    again = start(tmp_path / "run", influence__features="recompute")
    assert again.manifest["forget_set"]["feature_bytes"] == 0
    assert again.intensities.equals(finished[2].intensities)
    assert again.manifest["model"]["hash_after"] == finished[2].manifest["model"]["hash_after"]


def test_given_intensities_that_would_never_be_used_are_refused(finished, tmp_path):
    settings = config(influence__refresh="step")
    with pytest.raises(ConfigError, match=r"influence.refresh is 'step'"):
        ascend(named("heads.head"), pairs(50), finished[2].intensities, config=settings, run_dir=tmp_path / "run")


def test_the_report_stands_alone_and_shows_no_sample_id(finished):
    page = (finished[2].run_dir / "report.html").read_text()
    assert page.count("<svg") == 5
    assert not re.findall(r"http://(?!www\.w3\.org|purl\.org|creativecommons\.org)", page)
    assert "src=" not in page
    assert "sample_id" not in page
    assert "Named, layer\n<code>heads.head</code>" in page


def test_the_stages_one_by_one_give_what_unlearn_gives(finished, tmp_path):
    result, model, more = finished[2], named("heads.head"), {"evaluation": sets(), "config": config()}
    table = score(model, pairs(50), config=config())
    assert table.equals(result.intensities)
    ascended = ascend(model, pairs(50), table, run_dir=tmp_path / "a", **more)
    assert same_state(ascended.model, result.model.state_dict())
    metrics = audit(ascended.model, pairs(50), original=model, run_dir=tmp_path / "b", **more)
    assert metrics == result.metrics
    assert (tmp_path / "b" / "report.html").exists()


class Counting(torch.nn.Module):
    """Writes one byte to a file per forward call, in whatever process."""

    def __init__(self, path):
        super().__init__()
        self.inner, self.path = named("fc"), str(path)

    def forward(self, x):
        with open(self.path, "a") as file:
            file.write(".")
        return self.inner(x)


def test_the_whole_job_makes_one_forward_pass_over_each_set(tmp_path):
    start(tmp_path / "run", Counting(tmp_path / "calls"))
    blocks = sum(-(-rows // 16) for rows in (50, 70, 60))
    finding_the_head, checking_that_it_repeats = 1, 2 * 3
    assert len((tmp_path / "calls").read_text()) == blocks + finding_the_head + checking_that_it_repeats


def test_rows_left_out_are_listed_in_the_manifest(tmp_path):
    result = unlearn(named("fc"), nan_input(), config=config(forget_set__on_bad_row="skip"), run_dir=tmp_path / "run")
    listed = [{"sample_id": "7", "reason": "the input holds NaN or infinity"}]
    assert result.manifest["forget_set"]["bad_rows"] == listed
    assert len(result.intensities) == 39


def nan_input():
    inputs, labels = tensors(40)
    inputs[7] = float("nan")
    return Pairs(inputs, labels)


def occupied(tmp):
    (tmp / "file").write_text("x")
    return tmp / "file" / "run"


def foreign(tmp):
    (tmp / "run").mkdir()
    (tmp / "run" / "thesis.tex").write_text("x")
    return tmp / "run"


BAD = {
    "missing path": ({"forget_set": "/nowhere/x.parquet"}, ForgetSetError, "/nowhere/x.parquet does not exist"),
    "missing column": ({"forget_set": image_table(4).drop_columns("image")}, ForgetSetError, "no column 'image'"),
    "label out of range": ({"forget_set": pairs(40, classes=9)}, ForgetSetError, "expected 0 to 4"),
    "NaN input": ({"forget_set": nan_input()}, NonFiniteError, "row '7'"),
    "bad evaluation set": ({"evaluation": {"test": "/nowhere"}}, ForgetSetError, "evaluation set 'test' /nowhere"),
    "reserved name": ({"evaluation": {"forget": pairs(3)}}, ConfigError, "named 'forget'"),
    "another reserved name": ({"evaluation": {"membership": pairs(3)}}, ConfigError, "named 'membership'"),
    "evaluation no mapping": ({"evaluation": "/data"}, ConfigError, "evaluation is a str; expected a mapping"),
    "model by name": ({"model": "resnet18"}, ConfigError, "model is a str; expected"),
    "config as a dict": ({"config": {"seed": 1}}, ConfigError, "config is a dict; expected an UnlearnConfig"),
    "classes that do not fit": ({"config": config(forget_set__classes=["dog"])}, ConfigError, "1 names .* 5 outputs"),
    "temperature after the head": ({"model": Scaled()}, UnsupportedModelError, "no linear layer gives the output"),
    "head called twice": ({"model": Twice()}, UnsupportedModelError, "no linear layer gives the output"),
    "head that is not linear": ({"model": cosine()}, UnsupportedModelError, "differs by .* plain linear head"),
    "preconditioner of another kind": (
        {"config": config(ascent__preconditioner="diagonal_fisher")}, ConfigError, "ascent.preconditioner is",
    ),
    "eval raises": ({"model": Moody("fc")}, UnsupportedModelError, r"Moody.eval\(\) raised RuntimeError: not today"),
    "no linear layer": ({"model": NoHead()}, UnsupportedModelError, "no linear layer gives"),
    "missing checkpoint": ({"model": ModelSpec("architectures:named", checkpoint="/no")}, CheckpointError, "/no"),
    "unknown task": ({"task": "clasification"}, ConfigError, "did you mean classification"),
    "recipe and config": ({"recipe": "paper"}, ConfigError, "both given"),
    "unknown curvature": ({"config": config(influence__curvature="fisher")}, ConfigError, "'fisher'; .*diagonal_fisher"),
    "unknown scheme": ({"config": config(intensity__scheme="unifrom")}, ConfigError, "did you mean uniform"),
    "unknown objective": ({"config": config(ascent__objective="asent")}, ConfigError, "did you mean ascent"),
    "too many workers": ({"config": config(resources__workers=99)}, ConfigError, "workers is 99 .* at most 4"),
    "too many GPUs": ({"config": config(resources__gpus_per_worker=1)}, ConfigError, "is 1, but none of the 1 nodes"),
    "run_dir under a file": ({"run_dir": occupied}, CheckpointError, "file is a file"),
    "run_dir with other files": ({"run_dir": foreign}, CheckpointError, r"no manifest\.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_is_written(case, tmp_path, monkeypatch):
    changes, kind, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    arguments = {"model": named("fc"), "forget_set": pairs(40), "config": config(), "run_dir": lambda tmp: tmp / "run"}
    arguments |= changes
    arguments["run_dir"] = arguments["run_dir"](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=message):
        unlearn(**arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_finished_run_is_given_back_when_it_is_asked_for_again_and_never_overwritten(finished, caplog):
    _, _, result = finished
    stamp = (result.run_dir / "model.safetensors").stat().st_mtime_ns
    again = start(result.run_dir)
    assert "run is finished already; nothing is done" in caplog.text
    assert (again.status, again.manifest) == (result.status, result.manifest)
    assert same_state(again.model, result.model.state_dict())
    with pytest.raises(CheckpointError, match="holds a run on another forget set"):
        unlearn(named("heads.head"), pairs(50, seed=9), evaluation=sets(), config=config(), run_dir=result.run_dir)
    with pytest.raises(CheckpointError, match="holds a run of unlearn with other settings"):
        start(result.run_dir, seed=5)
    assert (result.run_dir / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_second_run_in_a_directory_in_use_is_refused(tmp_path):
    run = tmp_path / "run"
    with RunDirectory(run).locked(), pytest.raises(CheckpointError, match="is in use by process"):
        unlearn(named("fc"), pairs(50), config=config(), run_dir=run)
    assert unlearn(named("fc"), pairs(50), config=config(), run_dir=run).status == "epochs_done"


def test_a_run_that_missed_its_target_continues_with_more_epochs_in_the_same_directory(tmp_path):
    settings = {"influence.block_rows": 16, "ascent.batch_size": 16}
    inputs, _ = tensors(50)
    known = Pairs(inputs, named("fc")(inputs).argmax(1))

    def run(epochs, name):
        limited = {**settings, "ascent.stop.max_epochs": epochs}
        classes = UnlearnConfig.from_recipe("classes").with_overrides(limited)
        return unlearn(named("fc"), known, config=classes, run_dir=tmp_path / name)

    first = run(1, "run")
    assert first.status == "not_reached"
    more, whole = run(60, "run"), run(60, "whole")
    assert more.status == whole.status == "reached"
    assert same_state(more.model, whole.model.state_dict())
    assert more.record.created == first.record.created
    assert len(more.record.resumed) == 1
    with pytest.raises(CheckpointError, match="max_epochs is 1, and the run .* began with 60"):
        run(1, "run")


@pytest.fixture
def interrupted(tmp_path, monkeypatch, request):
    """A run that Ctrl-C stopped after its third state; a test may ask for other settings."""
    count = 0
    save = RunDirectory.save_state

    def save_then_stop(self, state):
        nonlocal count
        save(self, state)
        count += 1
        if count == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_state", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "run", **getattr(request, "param", {}))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "interrupted",
    [
        {},
        {"influence__curvature": "identity"},
        {"influence__curvature": "kfac"},
        {"influence__curvature": "hessian", "influence__refresh": "epoch"},
        {"influence__refresh": "step"},
    ],
    indirect=True,
)
def test_an_interrupted_run_says_so_and_goes_on_to_the_same_bits(interrupted, tmp_path):
    manifest = json.loads((interrupted / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"
    assert not (interrupted / "model.safetensors").exists()
    assert not list(interrupted.rglob(".part-*"))
    changes = {f"influence__{name}": manifest["config"]["influence"][name] for name in ("curvature", "refresh")}
    whole, rest = (start(run, **changes) for run in (tmp_path / "whole", interrupted))
    assert same_state(rest.model, whole.model.state_dict())
    assert rest.intensities.equals(whole.intensities)
    assert rest.trajectory["step"].to_pylist() == whole.trajectory["step"].to_pylist()
    assert rest.manifest == RunDirectory(interrupted).read_manifest()


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        (unlearn, {"forget_set": pairs(50, seed=9)}, "another forget set"),
        (unlearn, {"model": named("heads.head", seed=9)}, "another model"),
        (unlearn, {"evaluation": {"test": pairs(60, seed=2)}}, "another set of evaluation sets"),
        (audit, {}, "holds a run of unlearn"),
    ],
)
def test_an_interrupted_run_is_not_continued_on_other_inputs_or_by_another_stage(interrupted, stage, change, message):
    contents = lambda: {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    before = contents()
    arguments = {"model": named("heads.head"), "forget_set": pairs(50), "evaluation": sets(), **change}
    with pytest.raises(CheckpointError, match=message):
        stage(**arguments, config=config(), run_dir=interrupted)
    assert contents() == before


def test_intensities_of_other_samples_are_refused(tmp_path):
    table = score(named("fc"), pairs(20), config=config())
    with pytest.raises(ForgetSetError, match="are not those of the 30 samples"):
        ascend(named("fc"), pairs(30), table, config=config(), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_influence_of_another_engine_makes_the_weights_and_stands_in_the_record(tmp_path):
    own = score(named("fc"), pairs(20), config=config())
    given = -np.random.default_rng(0).random(20)
    table = pa.table({"sample_id": own["sample_id"], "influence": given})
    pq.write_table(table, tmp_path / "scores.parquet")
    settings = config(influence__scores=str(tmp_path / "scores.parquet"))
    scored = score(named("fc"), pairs(20), config=settings, run_dir=tmp_path / "run")
    assert scored["influence"].to_numpy() == pytest.approx(given)
    strength = np.sqrt(-given)
    quantile = settings.intensity.clip_quantile
    assert scored["intensity"].to_numpy() == pytest.approx(np.minimum(strength, np.quantile(strength, quantile)))
    assert scored.select(["loss", "gradient_norm"]) == own.select(["loss", "gradient_norm"])
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    ids = "".join(f"{row}\n" for row in own["sample_id"].to_pylist())
    assert manifest["influence"]["ids"] == hashlib.sha256(ids.encode()).hexdigest()
    pq.write_table(table.set_column(1, "influence", [given / 2]), tmp_path / "scores.parquet")
    with pytest.raises(CheckpointError, match="another set of influence scores"):
        score(named("fc"), pairs(20), config=settings, run_dir=tmp_path / "run")
    with pytest.raises(CheckpointError, match="20 scores for the 10 samples"):
        score(named("fc"), pairs(10), config=settings)
    with pytest.raises(ConfigError, match="expected once, sample and forget_set"):
        score(named("fc"), pairs(20), config=settings.with_overrides({"influence.refresh": "epoch"}))


@pytest.mark.parametrize(
    ("column", "cells", "kind", "message"),
    [
        ("intensity", [float("nan")], NonFiniteError, "1 intensities are negative, infinite or NaN"),
        ("intensity", [-1.0], NonFiniteError, "1 intensities are negative"),
        ("intensity", [float("inf")], NonFiniteError, "1 intensities are negative, inf"),
        ("intensity", [0.0] * 20, EmptySelectionError, "all 20 intensities are 0"),
        ("intensity", [None], ForgetSetError, "rows without a number in intensity"),
        ("label", [None], ForgetSetError, "rows without a number in label"),
        ("influence", [None], ForgetSetError, "rows without a number in influence"),
        ("influence", [float("nan")], ForgetSetError, "rows without a number in influence"),
    ],
)
def test_intensities_that_are_no_weights_are_refused_before_the_ascent(column, cells, kind, message, tmp_path):
    table = score(named("fc"), pairs(20), config=config())
    cells = pa.array([*cells, *table[column].to_pylist()[len(cells) :]], table.schema.field(column).type)
    changed = table.set_column(table.column_names.index(column), column, cells)
    with pytest.raises(kind, match=message):
        ascend(named("fc"), pairs(20), changed, config=config(), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_at_the_target_already_is_left_alone_with_a_warning(tmp_path, caplog):
    settings = config(ascent__stop__targets__forget__accuracy=1.0)
    result = unlearn(named("fc"), pairs(20), config=settings, run_dir=tmp_path / "run")
    assert result.manifest["model"]["hash_after"] == result.manifest["model"]["hash_before"]
    assert result.status == "already_met"
    assert "the original model meets the target and is left as it is" in caplog.text


@pytest.mark.parametrize("keep", ["best", "all"])
def test_other_heads_can_be_kept(keep, tmp_path):
    settings = config(ascent__keep=keep, ascent__stop__targets__forget__accuracy=0.0, ascent__anchor=1.0)
    result = unlearn(named("fc"), pairs(50), config=settings, run_dir=tmp_path / "run")
    accuracies = result.trajectory["forget.accuracy"].to_pylist()
    if keep == "best":
        assert result.metrics["after"]["forget"]["accuracy"] == min(accuracies)
    else:
        checks = range(1, len(accuracies))
        kept = sorted(path.name for path in (tmp_path / "run" / "checks").iterdir())
        assert kept == [f"check-{check:06d}.safetensors" for check in checks]
        run = RunDirectory(tmp_path / "run")
        moved = [float((run.load_parameters(check)["fc"] - matrix_of(named("fc").fc)).norm()) for check in checks]
        scale = float(matrix_of(named("fc").fc).norm())
        drift = result.trajectory["parameter_drift"].to_pylist()[1:]
        assert [each / scale for each in moved] == pytest.approx(drift)


def test_a_row_of_another_shape_is_named_or_left_out(tmp_path):
    class Ragged(Pairs):
        def __getitem__(self, row):
            value, label = super().__getitem__(row)
            return (value[:, :5] if row == 3 else value), label

    with pytest.raises(ForgetSetError, match=r"row '3' of Ragged: its shape is \[1, 5, 6\]"):
        unlearn(named("fc"), Ragged(*tensors(20)), config=config(), run_dir=tmp_path / "run")
    table = score(named("fc"), Ragged(*tensors(20)), config=config(forget_set__on_bad_row="skip"))
    assert "3" not in table["sample_id"].to_pylist()


def test_the_default_run_directory_is_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = unlearn(named("fc"), pairs(20), config=config())
    assert result.run_dir.parent == tmp_path / "runs"
    assert ray.is_initialized(), "a session that was there is left"


def test_a_run_on_an_object_store_leaves_the_same_artifacts(tmp_path, s3_uri):
    local = unlearn(named("fc"), pairs(50), config=config(), run_dir=tmp_path / "run")
    remote = unlearn(named("fc"), pairs(50), config=config(), run_dir=s3_uri)
    assert remote.run_dir == s3_uri
    assert sorted(open_storage(s3_uri).entries()) == sorted(open_storage(tmp_path / "run").entries())
    with open_storage(s3_uri).fetch("model.safetensors") as saved:
        assert saved.read_bytes() == (tmp_path / "run" / "model.safetensors").read_bytes()
    again = ModelSpec("architectures:named", {"name": "fc"}, s3_uri.replace("?", "/model.safetensors?")).build()
    assert same_state(again, local.model.state_dict())
    assert unlearn(named("fc"), pairs(50), config=config(), run_dir=s3_uri).manifest == remote.manifest


def test_a_head_of_zeros_ends_with_figures_that_are_numbers(tmp_path):
    model = named("fc")
    torch.nn.init.zeros_(model.fc.weight), torch.nn.init.zeros_(model.fc.bias)
    settings = {"influence.block_rows": 16, "ascent.batch_size": 20, "ascent.stop.max_epochs": 1}
    config = UnlearnConfig().with_overrides(settings)
    result = unlearn(model, pairs(40), evaluation=sets(), config=config, run_dir=tmp_path / "run")
    for name in ("manifest.json", "metrics.json"):
        json.loads((tmp_path / "run" / name).read_text(), parse_constant=pytest.fail)
    assert (result.record.status, result.record.ascent.parameter_drift) == ("complete", 0.0)
    assert all(np.isfinite(result.intensities[name].to_numpy()).all() for name in result.intensities.column_names[2:])
