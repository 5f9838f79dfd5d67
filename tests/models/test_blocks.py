"""Gradient checkpointing in eval mode: the same gradients from less memory."""

import pytest
import torch
from language import TOKENS, gpt2, llama, lora
from torch import nn

from imu_ray.errors import UnsupportedModelError
from imu_ray.models.blocks import checkpoint_blocks, checkpointed
from imu_ray.models.choice import choose_layers
from imu_ray.models.copies import plain_copy
from imu_ray.models.cut import Cut
from imu_ray.models.spec import ModelSpec


def changed_weights(model, names):
    """Weights that are not the model's own."""
    own = {f"{name}.weight": model.get_submodule(name).weight for name in names}
    return {name: (0.9 * weight.detach() + 0.01).requires_grad_() for name, weight in own.items()}


def gradients(model, scope):
    """Of changed weights of a scope, and the bytes that are kept for them; each tensor counts once."""
    names, kept = choose_layers(model, TOKENS, scope, ""), {}
    weights = changed_weights(model, names)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = Cut.of(model, TOKENS[:2], names).suffix((TOKENS,), weights)
    return torch.autograd.grad(logits.square().sum(), list(weights.values())), sum(kept.values())


@pytest.mark.parametrize(
    ("make", "scope"),
    [
        (lambda: llama(num_hidden_layers=6), ["*.?_proj"]),
        (lambda: lora(llama(num_hidden_layers=6, attention_dropout=0.5)), "adapters"),
        (lambda: gpt2(n_layer=6, resid_pdrop=0.5), ["*.2.mlp", "*.5.attn"]),
    ],
)
def test_the_gradients_are_the_same_bits_and_less_is_kept(make, scope):
    plain, again = make(), make()
    checkpoint_blocks(again)
    assert len(checkpointed(again)) == 6
    expected, most = gradients(plain, scope)
    found, least = gradients(plain_copy(again), scope)
    assert all(map(torch.equal, found, expected))
    assert least < 0.75 * most
    assert torch.equal(again(TOKENS).logits, plain(TOKENS).logits)
    assert not again.training


def test_a_model_that_was_marked_by_its_own_method_is_run_again():
    model = llama()
    model.config.use_cache = True
    getattr(model, "activation_checkpointing_enable", lambda: model.gradient_checkpointing_enable())()
    found, _ = gradients(model, ["*.q_proj"])
    expected, _ = gradients(llama(), ["*.q_proj"])
    assert all(map(torch.equal, found, expected))


def test_a_spec_asks_for_it_and_a_model_without_blocks_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    assert checkpointed(ModelSpec(f"hf:{tmp_path}", gradient_checkpointing=True).build())
    assert not checkpointed(ModelSpec(f"hf:{tmp_path}").build())
    with pytest.raises(UnsupportedModelError, match="gradient_checkpointing is true, but Linear has no block"):
        ModelSpec(nn.Linear, {"in_features": 3, "out_features": 2}, gradient_checkpointing=True).build()
