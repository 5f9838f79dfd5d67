"""Hugging Face's language models: which of their layers a scope means, and copies, cuts and files of them."""

import copy
import os
import stat
import sys

import pytest
import torch
from language import TOKENS, gpt2, llama, lora
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from imu_ray.errors import CheckpointError, ConfigError, UnsupportedModelError
from imu_ray.models.checkpoint import load_checkpoint, model_hash
from imu_ray.models.choice import choose_layers
from imu_ray.models.copies import plain_copy
from imu_ray.models.cut import Cut
from imu_ray.models.pretrained import save_pretrained
from imu_ray.models.spec import ModelSpec
from imu_ray.run.directory import RunDirectory

BLOCK = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.default"
HALVES = [BLOCK.format(block, part, half) for block in range(2) for part in "qv" for half in "AB"]


def logits(model):
    """Of a copy: the last bit depends on how memory is aligned, and what is read from a file lies as it does there."""
    return copy.deepcopy(model)(TOKENS).logits


@pytest.mark.parametrize(
    ("make", "scope", "head", "expected"),
    [
        (gpt2, "last:3", "", ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        (gpt2, ["*.1.attn"], "", ["attn.c_attn", "attn.c_proj"]),
        (llama, "last:2", "", ["layers.1.mlp.down_proj", "lm_head"]),
        (llama, "last:2", "lm_head", ["layers.1.mlp.down_proj", "lm_head"]),
        (llama, ["model.layers.0.self_attn"], "", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        (lambda: llama(tie_word_embeddings=True), "last:1", "", ["layers.1.mlp.down_proj"]),
        (lambda: lora(llama()), "adapters", "", HALVES),
        (lambda: lora(llama(), fresh=True), "all", "", HALVES),
        (lambda: lora(llama()), ["*.q_proj"], "", [name for name in HALVES if ".q_proj." in name]),
        (lambda: lora(llama()), ["*.1.*.lora_B"], "", [HALVES[5], HALVES[7]]),
        (lambda: lora(llama()), "last:3", "base_model.model.lm_head", HALVES[-3:]),
    ],
)
def test_a_scope_means_layers_in_order_of_execution_and_of_a_wrapped_model_adapters_alone(make, scope, head, expected):
    found = choose_layers(make(), TOKENS, scope, head)
    assert len(found) == len(expected)
    assert all(name.endswith(end) for name, end in zip(found, expected, strict=True))


def base_unfrozen():
    model = lora(llama())
    model.get_submodule(HALVES[0]).weight.requires_grad_()
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_()
    return model


def checkpointed():
    """Gradient checkpointing of the old kind, which gives no gradient where the block's input needs none."""
    model = lora(llama())
    model.requires_grad_(False)
    for block in model.base_model.model.model.layers:
        run = block.forward
        block.forward = lambda *args, run=run, **more: checkpoint(lambda *a: run(*a, **more), *args, use_reentrant=True)
    return model


def without_effect():
    model = lora(llama())
    for name in HALVES:
        torch.nn.init.zeros_(model.get_submodule(name).weight)
    return model


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("make", "scope", "error", "message"),
    [
        (gpt2, ["lm_head"], UnsupportedModelError, "'lm_head' shares its weight with the embeddings transformer.wte"),
        (gpt2, "all", UnsupportedModelError, "'lm_head' shares its weight with the embeddings"),
        (gpt2, "last:9", ConfigError, "at most last:8, .* changed; 'lm_head' shares its weight with the emb"),
        (gpt2, "head", ConfigError, "'head', which GPT2LMHeadModel has none of; expected last:N"),
        (gpt2, "adapters", ConfigError, "'adapters', which GPT2LMHeadModel has none of; expected"),
        (lambda: lora(llama()), ["*.o_proj"], ConfigError, r"no adapter in .*o_proj.*merge_and_unload\(\)"),
        (lambda: lora(llama()), ["*.base_layer"], ConfigError, "expected a pattern of adapters"),
        (base_unfrozen, ["*.q_proj"], UnsupportedModelError, "q_proj.lora_A.default' stands beside a layer that is not"),
        (checkpointed, "adapters", UnsupportedModelError, "q_proj.lora_A.default' gets no gradient.*enable_input_requ"),
        (checkpointed, "last:1", ConfigError, "at most last:0, .*enable_input_require_grads"),
        (without_effect, ["*.1.*"], UnsupportedModelError, "1.self_attn.q_proj.lora_B.default' gets no gradient"),
        (lambda: lora(llama(), fresh=True), ["*.lora_A"], UnsupportedModelError, "lora_A.default' gets no gradient"),
    ],
)  # fmt: skip
def test_layers_that_cannot_move_are_refused_by_name_with_a_remedy(make, scope, error, message):
    with pytest.raises(error, match=message):
        choose_layers(make(), TOKENS, scope, "")


@pytest.mark.parametrize("make", [gpt2, lambda: llama(tie_word_embeddings=True), lambda: lora(llama())])
def test_token_ids_cross_a_cut_and_logits_and_gradients_are_the_models_bit_for_bit(make):
    model = plain_copy(make())
    names = choose_layers(model, TOKENS, "last:3", "")
    cut = Cut.of(model, TOKENS[:2], names)
    assert cut.trivial
    assert (cut.dtype, cut.shapes) == (torch.int64, ((7,),))
    values = cut.split(cut.join(cut.prefix(TOKENS)).float().to(cut.dtype))
    whole = model(TOKENS).logits
    assert torch.equal(cut.suffix(values), whole)
    own = {f"{name}.weight": model.get_submodule(name).weight for name in names}
    expected = torch.autograd.grad(whole.square().sum(), list(own.values()))
    given = {name: weight.detach().clone().requires_grad_() for name, weight in own.items()}
    found = torch.autograd.grad(cut.suffix(values, given).square().sum(), list(given.values()))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("make", [gpt2, lambda: lora(llama(tie_word_embeddings=True))])
def test_a_copy_of_a_model_keeps_what_is_tied(make):
    model = make()
    copied = plain_copy(model)
    embeddings, head = copied.get_input_embeddings(), copied.get_output_embeddings()
    assert head.weight is embeddings.weight
    assert head.weight is not model.get_output_embeddings().weight
    with torch.no_grad():
        embeddings.weight += 1
    assert not torch.equal(logits(copied), logits(model))


@pytest.fixture
def folder(tmp_path):
    """Writes a model, and a tokenizer's file beside it."""

    def write(model, name="source"):
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text("{}")
        return str(tmp_path / name)

    return write


def moved(model, names):
    """A copy with those layers changed."""
    changed = plain_copy(model)
    with torch.no_grad():
        for name in names:
            changed.get_submodule(name).weight += 0.1
    return changed


def tensors_of(path):
    (file,) = path.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("make", [gpt2, llama, lambda: llama(tie_word_embeddings=True, dtype=torch.bfloat16)])
def test_a_model_is_read_and_written_and_only_its_moved_layers_differ(make, folder, tmp_path):
    given = make()
    model = ModelSpec(f"hf:{folder(given)}").build()
    assert (model.dtype, model.config.use_cache, model.training) == (given.dtype, False, False)
    assert torch.equal(logits(model), logits(given))
    names = choose_layers(model, TOKENS, "last:2", "")
    changed = moved(model, names)
    RunDirectory(tmp_path / "run").write_folder("model", lambda path: save_pretrained(changed, path))
    written = tmp_path / "run" / "model"
    again = AutoModelForCausalLM.from_pretrained(written)
    assert torch.equal(logits(again), logits(changed))
    assert (again.config.use_cache, (written / "tokenizer.json").read_text()) == (True, "{}")
    before, after = tensors_of(tmp_path / "source"), tensors_of(written)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"{name}.weight" for name in names
    }
    assert before.keys() == after.keys()
    assert {stat.S_IMODE(path.stat().st_mode) for path in written.iterdir()} == {0o600}
    assert set(os.listdir(tmp_path / "run")) == {"model"}


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_is_read_with_its_base_and_written_alone_or_merged(tied, folder, tmp_path):
    base = folder(llama(tie_word_embeddings=tied), "base")
    given = lora(AutoModelForCausalLM.from_pretrained(base))
    model = ModelSpec(f"hf:{folder(given, 'adapter')}", merge_adapter=True).build()
    assert torch.equal(logits(model), logits(given))
    assert isinstance(model, PeftModel)
    changed = moved(model, choose_layers(model, TOKENS, ["*.1.*.q_proj"], ""))
    alone, merged = tmp_path / "alone", tmp_path / "merged"
    save_pretrained(changed, alone)
    save_pretrained(changed, merged, merge_adapter=True)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), alone)
    assert torch.equal(logits(again), logits(changed))
    assert {name for name in os.listdir(alone) if "token" in name} == {"tokenizer.json"}
    assert not any("self_attn.q_proj.weight" in name for name in tensors_of(alone))
    whole = AutoModelForCausalLM.from_pretrained(merged)
    assert not isinstance(whole, PeftModel)
    assert whole.config.use_cache
    torch.testing.assert_close(logits(whole), logits(changed))
    assert isinstance(changed, PeftModel)
    assert torch.equal(logits(again), logits(changed)), "is left as it was"


@pytest.mark.parametrize("make", [gpt2, lambda: lora(llama(tie_word_embeddings=True))])
def test_a_run_directorys_file_holds_tied_tensors_and_loads_again(make, tmp_path):
    model = make()
    RunDirectory(tmp_path).write_model("model.safetensors", model)
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_checkpoint(other, tmp_path / "model.safetensors")
    assert model_hash(other) == model_hash(model)
    assert torch.equal(logits(other), logits(model))


def cut_short(folder, name):
    tensors = load_file(f"{folder}/{name}")
    save_file(dict(list(tensors.items())[1:]), f"{folder}/{name}", {"format": "pt"})
    return folder


def broken_adapter(folder):
    base = AutoModelForCausalLM.from_pretrained(folder(llama(), "base"))
    return cut_short(folder(lora(base)), "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("path", "settings", "error", "message"),
    [
        (lambda folder: "/nowhere", {}, CheckpointError, "'hf:/nowhere', which cannot be read .*local_files_only=false"),
        (lambda folder: "no/such", {}, CheckpointError, "'hf:no/such', which cannot be read"),
        (lambda folder: folder(gpt2()), {"nothing": 1}, ConfigError, "refused kwargs {'nothing': 1}"),
        (lambda folder: folder(gpt2()), {"trust_remote_code": True}, ConfigError, "runs code from the model's folder"),
        (lambda folder: cut_short(folder(gpt2()), "model.safetensors"), {}, CheckpointError, "holds no .* of GPT2LMHead"),
        (lambda folder: folder(lora(llama())), {}, CheckpointError, "adapter_config.json names no base model"),
        (broken_adapter, {}, CheckpointError, "cannot be read .*Found missing adapter keys"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_whole_is_refused(path, settings, error, message, folder):
    with pytest.raises(error, match=message):
        ModelSpec(f"hf:{path(folder)}", settings).build()


def test_without_the_extra_the_error_names_it(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"cannot be opened: .*transformers.*; .*pip install imu-ray\[hf\]"):
        ModelSpec(f"hf:{tmp_path}").build()


def test_an_adapter_is_merged_only_where_there_is_one(folder):
    with pytest.raises(ConfigError, match="merge_adapter is true; expected a model with an adapter, not LlamaForC"):
        ModelSpec(f"hf:{folder(llama())}", merge_adapter=True).build()
