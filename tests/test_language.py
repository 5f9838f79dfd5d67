"""Language models end to end on two workers: read from a folder, unlearned, and written as one that others open."""

import copy
import json
import re
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from figures import check_metrics
from language import ANSWERS, QUESTIONS, gpt2, llama, lora, tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from imu_ray import CheckpointError, ModelSpec, UnlearnConfig, audit, unlearn
from imu_ray.cli import main
from imu_ray.distributed import audit_job
from imu_ray.tasks.causal_lm import CausalLMTask

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
SIZES = {"vocab_size": 320}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "tasks.md"
UNSEEN = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, reversed(ANSWERS), strict=True)]


def fit(model, rows, parameters, steps=60):
    """Learn the rows by heart."""
    task = CausalLMTask(UnlearnConfig().forget_set, 64, SIZES["vocab_size"], tokenizer())
    table = pa.Table.from_pylist(rows)
    from imu_ray.data import open_source

    batch = task.collate(open_source(table, task.config, fields=task.fields(task.config)).read(0, len(rows)))
    optimiser = torch.optim.AdamW(list(parameters), 1e-2)
    for _ in range(steps):
        logits = model(batch.inputs).logits.transpose(1, 2)
        torch.nn.functional.cross_entropy(logits, batch.labels_B).backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def rows():
    return [{"question": q, "answer": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]


def settings(scope, **more):
    chosen = {"ascent.scope": scope, "resources.workers": 2, "influence.block_rows": 2, "influence.blocks_per_shard": 1}
    return UnlearnConfig.from_recipe("auto").with_overrides({**chosen, "audit.membership_min_rows": 8, **more})


@pytest.mark.parametrize(
    ("make", "scope", "objective"),
    [(gpt2, ["*.1.mlp"], "bounded_ascent"), (llama, ["*.self_attn.?_proj", "*.down_proj"], "npo")],
)
def test_a_model_forgets_answers_and_from_pretrained_opens_what_is_written(make, scope, objective, rows, tmp_path):
    sizes = {"n_positions": 64, "n_embd": 32} if make is gpt2 else {"max_position_embeddings": 64, "hidden_size": 32}
    model = make(torch.float32, **SIZES, **sizes)
    fit(model, rows, model.parameters()).save_pretrained(tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")
    result = unlearn(
        ModelSpec(f"hf:{tmp_path / 'source'}"),
        pa.Table.from_pylist(rows[:4]),
        task="causal_lm",
        evaluation={"test": pa.Table.from_pylist(UNSEEN[:4]), "retain": pa.Table.from_pylist(rows[4:])},
        # The original as its own reference: at first nothing is between them.
        config=settings(
            scope,
            **{"ascent.objective": objective, "audit.reference": str(tmp_path / "source")},
            **{"audit.recovery": ["probe", "lora"], "audit.recovery_steps": 1},
        ),
        run_dir=tmp_path / "run",
    )
    assert check_metrics(tmp_path / "run", "test", "retain") == result.metrics
    assert result.manifest["ascent"]["status"] == "reached"
    before, after = (result.metrics[key]["forget"] for key in ("before", "after"))
    assert after["probability"] < before["probability"] / 2
    apart = [result.metrics["reference"][side]["forget"]["kl"] for side in ("before", "after")]
    assert apart[0] == pytest.approx(0, abs=1e-9)
    assert apart[1] > 0.1
    assert "Per class" not in (tmp_path / "run" / "report.html").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = torch.tensor(AutoTokenizer.from_pretrained(tmp_path / "run" / "model")(QUESTIONS[0])["input_ids"])[None]
    assert torch.equal(copy.deepcopy(again)(ids).logits, result.model(ids).logits)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "source").state_dict()
    moved = {key for key, value in again.state_dict().items() if not torch.equal(value, original[key])}
    assert moved
    assert {key.rpartition(".")[0] for key in moved} <= set(result.manifest["model"]["layers"])


OTHERS = [
    {"paraphrased_answer": f"{answer[:-1]}!", "perturbed_answer": [answer[::-1], answer.upper()]} for answer in ANSWERS
]


def test_what_a_model_still_says_is_measured_in_the_job_of_the_model_that_is_written(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(audit_job, "ROWS", 2)
    model = llama(torch.float32, max_position_embeddings=64, hidden_size=32, **SIZES)
    fit(model, rows, model.parameters()).save_pretrained(tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")
    whole = [row | others for row, others in zip(rows, OTHERS, strict=True)]
    log = {str(row): {"score": 0.5 + row / 10} for row in range(4)}
    (tmp_path / "TOFU_EVAL.json").write_text(json.dumps({"forget_truth_ratio": {"value_by_index": log}}))
    given = {
        "forget_set": pa.Table.from_pylist(whole[:4]),
        "task": "causal_lm",
        "evaluation": {
            "test": pa.Table.from_pylist(UNSEEN[:4]),
            "retain": pa.Table.from_pylist(whole[4:]),
            "real_authors": pa.Table.from_pylist(whole[1:6]).drop_columns("paraphrased_answer"),
            "world_facts": pa.Table.from_pylist(whole[2:5]),
        },
    }
    more = {"audit.generate": True, "audit.generated_tokens": 12, "audit.retain_log": str(tmp_path / "TOFU_EVAL.json")}
    more |= {
        "ascent.keep": "all",
        "audit.checks": True,
        "ascent.stop.tolerance": 0.5,
        "forget_set.tokenizer": str(tmp_path / "source"),
    }
    spec = ModelSpec(f"hf:{tmp_path / 'source'}")
    config = settings(["*.o_proj", "*.down_proj"], **more)
    result = unlearn(spec, config=config, run_dir=tmp_path / "run", **given)
    before, after = (result.metrics[key]["language"] for key in ("before", "after"))
    assert [before["model"], after["model"]] == [result.manifest["model"][f"hash_{key}"] for key in ("before", "after")]
    assert check_metrics(tmp_path / "run", *given["evaluation"]) == result.metrics
    said, still = before["sets"], after["sets"]
    assert said["forget"]["rouge"] > 0.9
    assert said["forget"]["rouge"] > still["forget"]["rouge"]
    assert said["forget"]["probability"] == pytest.approx(result.metrics["before"]["forget"]["probability"])
    assert said["forget"]["truth_ratio"] < 0.1
    assert "perturbed_answer" in said["test"]["skipped"]["truth_ratio"]
    assert said["real_authors"]["choice_probability"] > 0.5
    for found in (before, after):
        assert found["skipped"] == {}
        assert 0 < found["forget_quality"] <= 1
    assert before["model_utility"] > 0.1
    checks = result.metrics["checks"]
    assert list(checks) == [str(row) for row in range(len(result.trajectory))]
    assert checks["0"] == result.metrics["before"]
    same = [each for each in checks.values() if each["language"]["model"] == after["model"]]
    assert same[0] == result.metrics["after"]
    alone = config.with_overrides({"resources.workers": 1})
    again = audit(result.model, original=spec, config=alone, **given)
    assert again == {key: result.metrics[key] for key in ("before", "after", "recovery")}
    assert "What the model still says" in (tmp_path / "run" / "report.html").read_text()


def test_the_model_of_a_run_is_attacked_and_the_figures_do_not_depend_on_the_workers(tmp_path):
    asked = [question.replace("live", verb) for verb in ("live", "work", "sing", "rest") for question in QUESTIONS]
    answers = [ANSWERS[(3 * (at // 8) + at) % 8] for at in range(len(asked))]
    whole = [{"question": q, "answer": a} for q, a in zip(asked, answers, strict=True)]
    unseen = [{"question": q, "answer": a} for q, a in zip(asked[:12], reversed(answers[:12]), strict=True)]
    model = llama(torch.float32, max_position_embeddings=64, hidden_size=32, **SIZES)
    fit(model, whole, model.parameters(), steps=100).save_pretrained(tmp_path / "source")
    tokenizer().save_pretrained(tmp_path / "source")
    spec = ModelSpec(f"hf:{tmp_path / 'source'}")
    given = {
        "forget_set": pa.Table.from_pylist(whole[:20]),
        "task": "causal_lm",
        "evaluation": {"test": pa.Table.from_pylist(unseen), "retain": pa.Table.from_pylist(whole[20:])},
    }
    attacks = {"audit.recovery": ["probe", "relearn", "quantise", "lora"], "audit.recovery_steps": 5}
    config = settings(["*.o_proj", "*.down_proj"], **attacks, **{"forget_set.tokenizer": str(tmp_path / "source")})
    result = unlearn(spec, config=config, run_dir=tmp_path / "run", **given)
    assert result.status == "reached"
    found = result.metrics["recovery"]
    assert found.keys() == {"before", "after"}
    for side, tests in found.items():
        figures = result.metrics[side]
        assert tests["skipped"] == {"probe": "the samples are sequences, which are of no class"}
        for name in ("relearn", "lora"):
            assert tests[name]["steps"] == [0, 1, 2, 5]
            assert (tests[name]["labelled"], tests[name]["rows"]) == (10, 10)
            assert tests[name]["retain"]["loss"][0] == pytest.approx(figures["retain"]["loss"], rel=1e-4)
        for figure in ("accuracy", "loss", "probability"):  # fresh adapters change nothing
            assert tests["lora"][figure][0] == pytest.approx(tests["relearn"][figure][0], rel=1e-4)
        near, far = (abs(tests["quantise"][bits]["loss"] - figures["forget"]["loss"]) for bits in ("8", "4"))
        assert near < far
        assert tests["quantise"]["rows"] == 20
    # Ten of the forgotten answers bring the ten others back, which were not shown.
    for name, least in (("relearn", 1.5), ("lora", 1.25)):
        came_back = found["after"][name]["probability"]
        assert came_back == sorted(came_back)
        assert came_back[-1] > least * came_back[0]
    assert "Training adapters, 5 steps" in (tmp_path / "run" / "report.html").read_text()
    alone = config.with_overrides({"resources.workers": 1, "influence.blocks_per_shard": 2})
    again = audit(result.model, original=spec, config=alone, **given)
    assert again["recovery"] == found


def test_a_reference_with_another_vocabulary_is_refused_before_anything_is_run(rows, tmp_path):
    for name, sizes in (("source", SIZES), ("other", {"vocab_size": 352})):
        llama(torch.float32, max_position_embeddings=64, hidden_size=32, **sizes).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    config = settings(["*.o_proj"], **{"audit.reference": str(tmp_path / "other")})
    spec, forget = ModelSpec(f"hf:{tmp_path / 'source'}"), pa.Table.from_pylist(rows[:4])
    with pytest.raises(CheckpointError, match="tells 352 tokens apart, the model 320"):
        unlearn(spec, forget, task="causal_lm", config=config, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_job_of_the_documentation_runs_as_it_is_shown(rows, tmp_path, monkeypatch, restored_log):
    """But for its paths, and for the layers, of which the small model has two."""
    model = llama(torch.float32, max_position_embeddings=64, hidden_size=32, **SIZES)
    fit(model, rows, model.parameters()).save_pretrained(tmp_path / "mine")
    tokenizer().save_pretrained(tmp_path / "mine")
    for name, part in (("forget", rows[:4]), ("unseen", UNSEEN[:4]), ("kept", rows[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    job = re.search(r"```yaml\n(# forget.yaml\n.*?)```", PAGE.read_text(), re.S)[1]
    for shown, here in (
        ("/models/mine", tmp_path / "mine"),
        ("/data", tmp_path),
        ("/runs/request-7", tmp_path / "run"),
    ):
        job = job.replace(shown, str(here))
    (tmp_path / "forget.yaml").write_text(job.replace("layers.1?.", "layers.?."))
    arguments = ["--config", str(tmp_path / "forget.yaml"), "--set", "resources.workers=2"]
    monkeypatch.setattr(sys, "argv", ["imu-ray", *arguments])
    assert main("unlearn") == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["ascent"]["status"] == "reached"
    assert {name.split(".")[-1] for name in manifest["model"]["layers"]} == {"o_proj", "down_proj"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_an_adapter_alone_forgets(rows, tmp_path):
    llama(torch.float32, max_position_embeddings=64, hidden_size=32, **SIZES).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = lora(base, ("q_proj", "v_proj", "down_proj", "o_proj"), r=8)
    fit(model, rows, (each for each in model.parameters() if each.requires_grad), steps=150)
    model.save_pretrained(tmp_path / "adapter")
    result = unlearn(
        ModelSpec(f"hf:{tmp_path / 'adapter'}"),
        pa.Table.from_pylist(rows[:4]),
        task="causal_lm",
        evaluation={"test": pa.Table.from_pylist(UNSEEN[:4])},
        config=settings("adapters"),
        run_dir=tmp_path / "run",
    )
    assert result.manifest["ascent"]["status"] == "reached"
    assert all("lora_" in name for name in result.manifest["model"]["layers"])
    opened = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run" / "model"
    )
    ids = torch.arange(3, 12)[None]
    assert torch.equal(copy.deepcopy(opened)(ids).logits, result.model(ids).logits)
