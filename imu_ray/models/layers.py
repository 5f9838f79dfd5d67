"""The layers of a model: which there are, which one is the classifier head, and the mode they run in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from imu_ray.errors import ForgetSetError, ImuError, UnsupportedModelError, nearest


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def logits_of(output: Any) -> Tensor:
    """What a model gives as a tensor: itself, or the ``logits`` of a Hugging Face output."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise UnsupportedModelError(f"the model returned {type(output).__name__}; expected a tensor, or logits in it")
    return logits


def detached(model: nn.Module) -> dict[str, Tensor]:
    """A model's own parameters by name, which no gradient flows into."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


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


def find_head(model: nn.Module, example_inputs: Tensor, name: str | None = None) -> str:
    """Name of the linear layer whose output is the model's output, whatever it is called.

    Args:
        model: any module that maps ``[B, ...]`` to logits ``[B, C]``.
        example_inputs: at least one real sample, ``[B, ...]``.
        name: the layer to take; checked in the same way.

    Raises:
        UnsupportedModelError: there is no linear layer, or none gives the model's output; the layers are listed.
    """
    layers = linear_layers(model)
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no nn.Linear layer; expected a model that ends in a linear classifier head"
        )
    if name is not None and name not in layers:
        raise UnsupportedModelError(
            f"model.head is {name!r}, which is no nn.Linear of the model; {nearest(name, layers)}"
        )
    seen: dict[str, list[Tensor]] = {key: [] for key in layers}
    hooks = [
        # A copy, because what follows may change the output in place.
        layer.register_forward_hook(lambda _module, _inputs, output, key=key: seen[key].append(output.clone()))
        for key, layer in layers.items()
    ]
    try:
        with evaluation_mode(model), forward_errors(model, example_inputs, ForgetSetError):
            logits = logits_of(model(example_inputs))
    finally:
        for hook in hooks:
            hook.remove()
    listed = ", ".join(f"{key} ({layer.in_features} -> {layer.out_features})" for key, layer in layers.items())
    if logits.ndim != 2:
        raise UnsupportedModelError(
            f"{type(model).__name__} returned {list(logits.shape)}; expected logits [samples, classes]; linear layers: "
            f"{listed}"
        )
    # A layer that is called more than once in a forward pass has no one input to cache.
    wanted = logits.nan_to_num()  # of broken weights, which are refused with the sample's id when features are made
    matches = [
        key for key, outputs in seen.items() if len(outputs) == 1 and torch.equal(outputs[0].nan_to_num(), wanted)
    ]
    if name is not None:
        matches = [key for key in matches if key == name]
    if len(matches) != 1:
        raise UnsupportedModelError(
            f"{'no' if not matches else len(matches)} linear layer gives the output of {type(model).__name__} itself; "
            f"expected one head whose output is the logits, with nothing after it; linear layers: {listed}; name one "
            "in model.head if it is such a head"
        )
    head = layers[matches[0]]
    if head.in_features < 1 or head.out_features < 2:
        raise UnsupportedModelError(
            f"the head {matches[0]!r} has {head.in_features} inputs and {head.out_features} outputs; expected "
            "features, and 2 classes or more"
        )
    _refuse_shared(model, matches[0], head)
    return matches[0]


def _refuse_shared(model: nn.Module, name: str, head: nn.Linear) -> None:
    own = {id(parameter) for parameter in head.parameters(recurse=False)}
    others = [
        key
        for key, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in own and key.rpartition(".")[0] != name
    ]
    if others or not isinstance(head.weight, nn.Parameter):
        raise UnsupportedModelError(
            f"the head {name!r} "
            f"{'shares its weight with ' + ', '.join(others) if others else 'has a computed weight'}; expected a "
            "weight of its own, because changing it must change nothing else; untie it or remove the parametrization"
        )
