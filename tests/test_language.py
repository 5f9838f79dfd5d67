"""Language models end to end on two workers: read from a folder, unlearned, and written as one that others open."""

import pyarrow as pa
import pytest
import torch
from language import ANSWERS, QUESTIONS, gpt2, llama, lora, tokenizer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from imu_ray import ModelSpec, UnlearnConfig, unlearn
from imu_ray.tasks.causal_lm import CausalLMTask

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
SIZES = {"vocab_size": 320}
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
        config=settings(scope, **{"ascent.objective": objective}),
        run_dir=tmp_path / "run",
    )
    assert result.manifest["ascent"]["status"] == "reached"
    before, after = (result.metrics[key]["forget"] for key in ("before", "after"))
    assert after["probability"] < before["probability"] / 2
    assert "Per class" not in (tmp_path / "run" / "report.html").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = torch.tensor(AutoTokenizer.from_pretrained(tmp_path / "run" / "model")(QUESTIONS[0])["input_ids"])[None]
    assert torch.equal(again(ids).logits, result.model(ids).logits)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "source").state_dict()
    moved = {key for key, value in again.state_dict().items() if not torch.equal(value, original[key])}
    assert moved
    assert {key.rpartition(".")[0] for key in moved} <= set(result.manifest["model"]["layers"])


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
    assert torch.equal(opened(ids).logits, result.model(ids).logits)
