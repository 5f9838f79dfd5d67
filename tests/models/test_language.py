"""Hugging Face's language models: which of their layers a scope means, and copies, cuts and files of them."""

import pytest
import torch
from language import TOKENS, gpt2, llama, lora
from torch.utils.checkpoint import checkpoint

from imu_ray.errors import ConfigError, UnsupportedModelError
from imu_ray.models.choice import choose_layers
from imu_ray.models.copies import plain_copy
from imu_ray.models.cut import Cut

BLOCK = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.default"
HALVES = [BLOCK.format(block, part, half) for block in range(2) for part in "qv" for half in "AB"]


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
    assert not torch.equal(copied(TOKENS).logits, model(TOKENS).logits)
