"""A model's forward pass: the mode it runs in, what it gives, and what it raises."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from imu_ray.errors import ImuError, UnsupportedModelError
from imu_ray.models.copies import has_numbers


def logits_of(output: Any) -> Tensor:
    """What a model gives as a tensor: itself, or the ``logits`` of a Hugging Face output."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError(f"the model returned {type(output).__name__}; expected a tensor, or logits in it")
    return logits


def detached(model: nn.Module) -> dict[str, Tensor]:
    """A model's own parameters by name, which no gradient flows into."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@contextmanager
def left_out(model: nn.Module, name: str) -> Iterator[None]:
    """The model with a layer passed by: what the layer would see stands for what it gives. No name: as it is."""
    parent, _, child = name.rpartition(".")
    holder = model.get_submodule(parent)
    layer = getattr(holder, child) if name else None
    if layer is not None:
        setattr(holder, child, nn.Identity())
    try:
        yield
    finally:
        if layer is not None:
            setattr(holder, child, layer)


def output_layer(model: nn.Module, inputs: Tensor, outputs: int) -> str:
    """The linear layer whose outputs, so many at each position, are the model's as they are; none where none is.

    Args:
        model: in any mode.
        inputs: a few samples ``[B, T]``.
        outputs: C.
    """
    linear = {name: each for name, each in model.named_modules() if type(each) is nn.Linear}
    name = next((name for name in reversed(linear) if linear[name].out_features == outputs), "")
    if not name:
        return ""
    layer, given = linear[name], list[Tensor]()
    hook = layer.register_forward_hook(lambda _, seen, made: given.append(made))
    try:
        with evaluation_mode(model):
            whole = logits_of(model(inputs))
            with left_out(model, name):
                seen = logits_of(model(inputs))
            if not has_numbers(whole):
                return name if whole is given[-1] else ""
            # Some models widen the type of their logits, and with the layer passed by that of what it sees.
            made = layer(seen.to(layer.weight.dtype))
            return name if made.shape == whole.shape and _alike(made.double(), whole.double()) else ""
    except Exception:  # the model's own code needs the layer, or the number of positions that it was made for
        return ""
    finally:
        hook.remove()


def _alike(made: Tensor, whole: Tensor) -> bool:
    # The same product gives the same bits, or nearly so; a cap on small logits changes few of them.
    return bool((made - whole).abs().max() <= 1e-6 * whole.abs().max())


def compile_around(model: nn.Module, head: str) -> None:
    """Compile, in place, every part of the model that does not hold the head, whose input is caught by a hook."""
    for name, child in model.named_children():
        if head.startswith(f"{name}."):
            compile_around(child, head.removeprefix(f"{name}."))
        elif isinstance(child, nn.ModuleList | nn.ModuleDict):  # never called themselves
            compile_around(child, "")
        elif head != name:
            child.compile()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode without gradients; the mode of every module is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def forward_errors(model: nn.Module, inputs: Tensor, kind: type[ImuError]) -> Iterator[None]:
    """An error of ``kind`` in place of what a model's own code raises; to run out of memory stays what it is."""
    try:
        yield
    except (ImuError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise kind(
            f"{type(model).__name__} cannot take {len(inputs)} samples of shape {list(inputs.shape[1:])}: "
            f"{type(error).__name__}: {error}; expected inputs as the model was trained on; see forget_set.image_mode "
            "and image_size, or tokens_column"
        ) from error
