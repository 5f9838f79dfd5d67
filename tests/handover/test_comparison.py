"""Runs side by side: every number is that of the run, what is missing has its reason, and no unlike runs pass for like."""

import copy
import json
import re

import pytest

from imu_ray import CheckpointError, ConfigError, compare
from imu_ray.cli import main
from imu_ray.run.directory import RunDirectory
from imu_ray.run.metrics import write_metrics

ATTACK = {"balanced_accuracy": 0.61, "band": [0.4, 0.6], "members": 30, "non_members": 40, "auc": 0.66}
ATTACK |= {"roc": {"fpr": [0.0, 1.0], "tpr": [0.0, 1.0]}, "svc_efficacy": {"skipped": "no <b>retain</b>"}}
ATTACK |= {"attacks": {"entropy": {"balanced_accuracy": 0.77, "band": [0.4, 0.6]}}}
SAMPLES = {"name": "s", "rows_used": 30, "fingerprint": "f00d" * 16}


def side(accuracy):
    figures = {"samples": 30, "accuracy": accuracy, "loss": 1.5, "per_class": {"3": {"samples": 30, "accuracy": 0.123}}}
    return {"forget": figures, "membership": ATTACK, "destinations": {"3": {"1": 29}}}


def record(**changes):
    config = {"seed": 0, "ascent": {"learning_rate": 0.01, "stop": {"max_epochs": 10}}, "forget_set": {"size": None}}
    ascent = {"status": "reached", "reason": "r", "recipe": "classes", "steps": 25, "kept_samples": 29}
    ascent |= {"output_change": 0.25, "parameter_drift": 0.5}
    found = {
        "status": "complete", "stage": "unlearn", "config": config, "model": {"hash_before": "a1" * 32}, "ascent": ascent,
        "forget_set": SAMPLES, "evaluation": {}, "versions": {"imu-ray": "1"}, "hardware": {"processor": "P", "dtype": "f"},
        "seconds": {"features": 1.25, "scores": 0.5}, "verdict": {"word": "contained", "reason": "why"},
    }  # fmt: skip
    return found | changes


def write(folder, manifest, metrics):
    RunDirectory(folder).write_json("manifest.json", manifest)
    write_metrics(RunDirectory(folder), metrics)
    return folder


METRICS = {
    "before": side(0.95), "after": side(0.25),
    "recovery": {
        "after": {
            "probe": {"accuracy": 0.86, "rows": 20, "labelled": 50, "classes": 5},
            "relearn": {"steps": [0, 1], "accuracy": [0.01, 0.345], "rows": 9, "labelled": 9},
            "skipped": {"lora": "LoRA is of language models"},
        },
    },
}  # fmt: skip


def retrained():
    """A run beside a retrained model, with another setting, and without recovery."""
    gap = {"average_gap": {"mean": 0.02, "models": 1}, "metrics": {"forget": {"accuracy": {"mean": 0.05, "models": 1}}}}
    gap["tug_of_war"] = {"skipped": "retain.accuracy was not measured on both sides"}
    metrics = {"before": side(0.95), "after": side(0.2), "retrained": side(0.3)}
    metrics["gaps"] = {"references": 1, "sides": {"unlearned": gap}, "floor": {"skipped": "one"}}
    metrics["reference"] = {"model": "beef", "after": {"forget": {"kl": 0.5, "agreement": 0.75, "js": 0.1}}}
    manifest = record(seconds={"features": 2.0, "reference": 1.0})
    manifest["config"] = copy.deepcopy(manifest["config"]) | {"seed": 7}
    return manifest, metrics


@pytest.fixture
def runs(tmp_path):
    return write(tmp_path / "one", record(), METRICS), write(tmp_path / "two", *retrained())


def values(found):
    return {(figure.name, figure.side): figure.values for figure in found.figures}


def test_every_figure_of_each_run_stands_beside_the_other(runs):
    found = values(compare(*runs))
    no_retrained = "no retrained model was given (audit.reference)"
    assert found["forget.accuracy", "before"] == [0.95, 0.95]
    assert found["forget.accuracy", "after"] == [0.25, 0.2]
    assert found["forget.accuracy", "retrained"] == [no_retrained, 0.3]
    assert found["membership.attacks.entropy.balanced_accuracy", "after"] == [0.77, 0.77]
    assert found["recovery.probe.accuracy", "after"] == [0.86, "audit.recovery does not name probe"]
    assert found["recovery.relearn.accuracy", "after"][0] == 0.345
    assert found["gaps.average_gap", "after"] == [no_retrained, 0.02]
    assert found["reference.forget.kl", "after"] == [no_retrained, 0.5]
    assert found["seconds.total", ""] == [1.75, 3.0]
    assert found["seconds.scores", ""] == [0.5, "the run had no stage scores"]
    assert found["update.steps", ""] == [25.0, 25.0]
    counts = ("samples", "rows", "labelled", "per_class", "destinations", "members", "roc", "steps", "models")
    assert not [name for name, _ in found if set(name.split(".")[1:]) & set(counts) and name != "update.steps"]


def test_a_comparison_begins_with_words_settings_that_differ_and_no_warning_of_like_runs(runs):
    found = compare(*runs)
    assert found.settings == {"seed": [0, 7]}
    assert found.warnings == []
    assert [(run["name"], run["status"], run["ended"]) for run in found.runs] == [
        ("one", "contained", "reached"), ("two", "contained", "reached"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"model": {"hash_before": "b2" * 32}}, "begin with different models (one: a1a1a1a1a1a1; two: b2b2b2b2b2b2): no fair"),
        ({"forget_set": {**SAMPLES, "fingerprint": "cafe"}}, "forget different rows (one: 30 rows f00df00df00d; two: 30 rows cafe)"),
        ({"forget_set": {**SAMPLES, "rows_used": 29}}, "forget different rows"),
        ({"hardware": {"processor": "Q"}}, "of different machines: their seconds"),
        ({"versions": {"imu-ray": "2"}}, "of different versions"),
        ({"stage": "audit"}, "two is an audit: its record does not say which original"),
        ({"status": "interrupted"}, "two has not ended: it is interrupted"),
    ],
)  # fmt: skip
def test_runs_that_are_no_fair_comparison_say_so(changes, warning, tmp_path):
    pair = write(tmp_path / "one", record(), METRICS), write(tmp_path / "two", record(**changes), METRICS)
    found = compare(*pair)
    assert len(found.warnings) == 1
    assert warning in found.warnings[0]
    assert f"warning: {found.warnings[0]}\n" in found.text()
    assert "warning" in re.findall(r'<p class="(\w+)"', found.page())


def test_another_set_or_retrained_model_or_a_broken_model_is_a_warning(tmp_path):
    sets = [{"test": {**SAMPLES, "fingerprint": each}} for each in ("one", "two")]
    references = [{**METRICS, "reference": {"model": each * 20}} for each in ("x", "y")]
    references[1] = json.loads(json.dumps(references[1]))
    references[1]["after"]["membership"]["warning"] = "it is broken"
    pair = [
        write(tmp_path / name, record(evaluation=each), metrics)
        for name, each, metrics in zip("ab", sets, references, strict=True)
    ]
    told = " ".join(compare(*pair).warnings)
    assert "different rows in the set test (a: 30 rows one; b: 30 rows two): no fair comparison" in told
    assert "stand beside different retrained models" in told
    assert "b, after: it is broken" in told


def test_what_a_run_lacks_is_told_by_reason_and_has_no_number(tmp_path):
    lacking = {
        "score": (record(stage="score", ascent=None, verdict=None), {}),
        "failed": (record(status="failed", ascent=None, verdict=None), {}),
        "audit": (record(stage="audit", ascent=None, verdict=None), {"after": side(0.5)}),
        "other": (record(), {**METRICS, "after": {**side(0.1), "membership": {"skipped": "no test"}}}),
        "cut": (record(), {**METRICS, "recovery": {"before": {}, "after": {"relearn": {"steps": [], "accuracy": []}}}}),
    }
    full = {**METRICS, "recovery": {"before": METRICS["recovery"]["after"], "after": METRICS["recovery"]["after"]}}
    folders = [write(tmp_path / name, *each) for name, each in lacking.items()]
    found = compare(write(tmp_path / "full", record(), full), *folders)
    at = dict(zip(["full", *lacking], range(6), strict=True))
    figures = values(found)
    for name, figure, why in (
        ("score", ("forget.accuracy", "after"), "score measures nothing"),
        ("score", ("update.steps", ""), "score makes no update"),
        ("failed", ("forget.accuracy", "after"), "the run is failed"),
        ("audit", ("forget.accuracy", "before"), "no original was given to the audit"),
        ("other", ("membership.auc", "after"), "no test"),
        ("other", ("recovery.probe.accuracy", "before"), "audit.recovery does not name probe"),
        ("cut", ("recovery.relearn.accuracy", "after"), "the test broke off"),
    ):
        assert figures[figure][at[name]] == why, (name, figure)
    plain = found.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    skipped = {
        each["side"]: each["values"][at["audit"]] for each in plain["figures"] if each["name"] == "forget.accuracy"
    }
    assert skipped == {"before": {"skipped": "no original was given to the audit"}, "after": 0.5}
    line = next(line for line in found.text().splitlines() if line.startswith("forget.accuracy, before"))
    numbers = found.reasons
    expected = [
        "0.95",
        *(f"[{numbers[figures['forget.accuracy', 'before'][at[name]]]}]" for name in ("score", "failed", "audit")),
    ]
    assert line.split()[4:8] == expected
    assert f"[{numbers['no test']}] not measured: no test" in found.text()


def test_a_part_that_only_some_runs_have_is_named(tmp_path):
    more = json.loads(json.dumps(METRICS))
    more["after"]["held out"] = more["after"]["forget"]
    pair = write(tmp_path / "one", record(), METRICS), write(tmp_path / "two", record(), more)
    assert values(compare(*pair))["held out.accuracy", "after"] == ["the run has no held out", 0.25]


def test_the_page_stands_alone_and_escapes_what_it_shows(runs):
    page = compare(*runs).page()
    assert "http" not in page
    assert "not measured: no retrained model was given (audit.reference)" in page
    assert "<b>retain" not in page
    assert page.count("<h1>") == 1


@pytest.mark.usefixtures("restored_log")
def test_the_command_prints_a_table_or_json_and_writes_a_page_once(runs, tmp_path, monkeypatch, capsys):
    def command(*line):
        monkeypatch.setattr("sys.argv", ["imu-ray", "compare", *map(str, line)])
        code = main()
        said = capsys.readouterr()
        return code, json.loads(said.out.splitlines()[-1]), said.err

    code, last, table = command(*runs, "--out", tmp_path / "page.html")
    assert (code, last["status"], last["reason"]) == (0, "complete", "the runs can be compared")
    assert "comparison" not in last
    assert re.search(r"^seed +0 +7$", table, re.MULTILINE)
    assert (tmp_path / "page.html").read_text() == compare(*runs).page()
    code, last, table = command(*runs, "--json")
    assert last["comparison"] == compare(*runs).to_json()
    assert "forget.accuracy" not in table
    assert command(*runs, "--out", tmp_path / "page.html")[:1] == (2,)
    assert command(runs[0])[1]["reason"] == "ConfigError: runs to compare are 1; expected two or more"
    assert command(runs[0], tmp_path)[1]["reason"].startswith("CheckpointError: ")


def test_runs_of_the_same_name_are_told_apart_and_a_uri_is_read(tmp_path, s3_uri):
    where, _, query = s3_uri.partition("?")
    write(f"{where}/run?{query}", record(), METRICS)
    here = write(tmp_path / "run", record(), METRICS)
    found = compare(here, f"{where}/run?{query}")
    assert [run["name"] for run in found.runs] == [str(here), f"{where}/run?{query}"]
    assert values(found)["forget.accuracy", "after"] == [0.25, 0.25]


def test_too_few_runs_and_what_is_no_run_are_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="runs to compare are 0; expected two"):
        compare()
    with pytest.raises(CheckpointError, match="there is no run at"):
        compare(runs[0], tmp_path / "nowhere")
