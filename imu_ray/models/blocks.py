"""Gradient checkpointing: what a model's blocks computed is not kept for the way back, but computed again.

Hugging Face's own acts in train mode only, which also turns dropout on. This one acts in eval mode, on the blocks that
theirs would act on, and with parameters that stand in for the model's own.
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imu_ray.errors import UnsupportedModelError

CACHES = ("cache", "layer_past", "past_key_value", "past_key_values")  # which a second run would add to again


def checkpoint_blocks(model: nn.Module) -> None:
    """Mark every block of a Hugging Face model as one to be run again.

    Raises:
        UnsupportedModelError: the model has no such block.
    """
    for block in blocks_of(model):  # as Hugging Face marks them, so that the model also trains so
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    if not checkpointed(model):
        raise UnsupportedModelError(
            f"model.gradient_checkpointing is true, but {type(model).__name__} has no block that can be run again; "
            "expected a Hugging Face model made of GradientCheckpointingLayer; leave it out"
        )


def checkpointed(model: nn.Module) -> list[nn.Module]:
    """The blocks that are marked."""
    return [block for block in blocks_of(model) if block.gradient_checkpointing]


def blocks_of(model: nn.Module) -> list[Any]:
    """The blocks of a model that Hugging Face could run again; the library is loaded where there is such a model."""
    kind = getattr(sys.modules.get("transformers.modeling_layers"), "GradientCheckpointingLayer", ())
    return [module for module in model.modules() if isinstance(module, kind)]


@contextmanager
def run_again(model: nn.Module) -> Iterator[None]:
    """A forward pass with gradients in which the blocks that are marked keep their inputs alone."""
    blocks = checkpointed(model) if torch.is_grad_enabled() else []
    for block in blocks:
        block.forward = functools.partial(_forward, block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class _Bare(nn.Module):
    """A block without the hooks around it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)


def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The block's outputs; the second run, which is outside of the pass, has the parameters of this one."""
    bare = _Bare(block)
    kwargs |= {"use_cache": False} if "use_cache" in kwargs else {}
    kwargs |= dict.fromkeys(kwargs.keys() & set(CACHES))

    def run(parameters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(bare, parameters, args, kwargs)

    own = dict(bare.named_parameters())
    if not any(isinstance(each, Tensor) and each.requires_grad for each in (*own.values(), *args, *kwargs.values())):
        return run(own, *args, **kwargs)  # below the lowest layer that moves nothing is kept
    return checkpoint(run, own, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
