"""What a classifier ends in: a head whose output is the logits, or a 1x1 convolution with more after it.

A head is an ``nn.Linear``, Hugging Face's ``Conv1D``, or a 1x1 convolution at one position (over pooled features): its
logits are a matrix times its input, which is why the input alone need be kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from imu_ray.errors import ForgetSetError, UnsupportedModelError, nearest
from imu_ray.influence.layer_io import Convolution, Layer, kind_of
from imu_ray.models.layers import evaluation_mode, forward_errors, logits_of


@dataclass(frozen=True)
class Ending:
    """What a classifier ends in.

    Attributes:
        layer: name of the layer.
        classes: its outputs.
        linear: whether the logits are its output; otherwise it is a 1x1 convolution with more after it, SqueezeNet's.
    """

    layer: str
    classes: int
    linear: bool


def head_layers(model: nn.Module) -> dict[str, Layer]:
    """Every layer that could be a head, by name."""
    return {name: cast(Layer, module) for name, module in model.named_modules() if _could_be_head(module)}


def head_sizes(layer: Layer) -> tuple[int, int]:
    """Outputs and inputs of such a layer."""
    first, second = layer.weight.shape[:2]
    return (first, second) if isinstance(layer, Layer) else (second, first)


def find_head(model: nn.Module, example_inputs: Tensor, name: str | None = None) -> str:
    """Name of the layer whose output is the model's output, whatever it is called.

    Args and errors as of ``find_ending``, which also takes a model without such a layer.
    """
    ending = find_ending(model, example_inputs, name)
    if not ending.linear:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear head: its last layer {ending.layer!r} is a convolution with more "
            "after it; expected one head whose output is the logits"
        )
    return ending.layer


def find_ending(model: nn.Module, example_inputs: Tensor, name: str | None = None) -> Ending:
    """The layer whose output is the model's output; or else its last one, a 1x1 convolution with an output per class.

    Args:
        model: any module that maps ``[B, ...]`` to logits ``[B, C]``, or to an object that has them as ``logits``.
        example_inputs: at least one real sample, ``[B, ...]``.
        name: the layer to take; checked in the same way.

    Raises:
        UnsupportedModelError: there is neither; the layers are listed.
    """
    layers = head_layers(model)
    if name is not None and name not in layers:
        raise UnsupportedModelError(
            f"model.head is {name!r}, which is no nn.Linear, 1x1 convolution or Conv1D of the model; "
            f"{nearest(name, layers)}"
        )
    calls, logits = _run(model, example_inputs, layers)
    linear = {key: layer for key, layer in layers.items() if not isinstance(layer, Convolution)}
    listed = ", ".join("{0} ({2} -> {1})".format(key, *head_sizes(layer)) for key, layer in linear.items()) or "none"
    if logits.ndim != 2:
        raise UnsupportedModelError(
            f"{type(model).__name__} returned {list(logits.shape)}; expected logits [samples, classes]; linear layers: "
            f"{listed}"
        )
    once = {key: outputs[0] for key in layers if len(outputs := [out for each, out in calls if each == key]) == 1}
    # A layer that is called more than once in a forward pass has no one input to cache.
    matches = [
        key
        for key, output in once.items()
        if name in (None, key) and _equal(output, logits) and _is_output(model, example_inputs, layers[key])
    ]
    if len(matches) == 1:
        _check_head(model, matches[0], layers[matches[0]])
        return Ending(matches[0], logits.shape[1], True)
    last = calls[-1][0] if calls else ""
    pointwise = last in once and isinstance(layers[last], Convolution) and head_sizes(layers[last])[0] == len(logits[0])
    if not matches and name is None and pointwise and logits.shape[1] > 1:
        return Ending(last, logits.shape[1], False)
    raise UnsupportedModelError(
        f"{'no' if not matches else len(matches)} linear layer gives the output of {type(model).__name__} itself; "
        f"expected one head whose output is the logits, with nothing after it; linear layers: {listed}; name one "
        "in model.head if it is such a head"
    )


def _could_be_head(module: nn.Module) -> bool:
    if isinstance(module, Convolution):
        return set(module.kernel_size) == {1} and module.groups == 1
    return kind_of(module) is not None


def _run(
    model: nn.Module, inputs: Tensor, layers: Mapping[str, Layer]
) -> tuple[list[tuple[str, Tensor | None]], Tensor]:
    """Which linear and convolutional layers were called, in order, with the output if that could be logits; logits."""
    calls: list[tuple[str, Tensor | None]] = []

    def catch(key: str) -> Any:
        def hook(_: nn.Module, _inputs: Any, output: Tensor) -> None:
            one = key in layers and output.numel() == len(output) * head_sizes(layers[key])[0]
            # A copy, because what follows may change the output in place.
            calls.append((key, output.clone().reshape(len(output), -1) if one else None))

        return hook

    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    every = {key: module for key, module in model.named_modules() if key in layers or isinstance(module, kinds)}
    hooks = [module.register_forward_hook(catch(key)) for key, module in every.items()]
    try:
        with evaluation_mode(model), forward_errors(model, inputs, ForgetSetError):
            return calls, logits_of(model(inputs))
    finally:
        for hook in hooks:
            hook.remove()


def _is_output(model: nn.Module, inputs: Tensor, layer: Layer) -> bool:
    """Whether logits that came out of a layer always do.

    What follows a convolution may be a ReLU and a mean over one position, which change nothing where all is positive:
    so its output is turned round.
    """
    if not isinstance(layer, Convolution):
        return True
    turned: list[Tensor] = []

    def turn(_: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        turned.append(-output.reshape(len(output), -1))
        return -output

    hook = layer.register_forward_hook(turn)
    try:
        with evaluation_mode(model), forward_errors(model, inputs, ForgetSetError):
            return _equal(logits_of(model(inputs)), turned[0])
    finally:
        hook.remove()


def _equal(output: Tensor | None, logits: Tensor) -> bool:
    """Also of broken weights, which are refused with the sample's id when features are made."""
    return output is not None and torch.equal(output.nan_to_num(), logits.nan_to_num())


def _check_head(model: nn.Module, name: str, head: Layer) -> None:
    outputs, inputs = head_sizes(head)
    if inputs < 1 or outputs < 2:
        raise UnsupportedModelError(
            f"the head {name!r} has {inputs} inputs and {outputs} outputs; expected features, and 2 classes or more"
        )
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
