"""Which layers a scope means, in the order in which a forward pass runs them."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import accumulate, zip_longest

import torch
from torch import Tensor, nn

from imu_ray.errors import ConfigError, UnsupportedModelError, nearest
from imu_ray.models.layers import evaluation_mode, forward_errors

SCOPE = re.compile(r"head|all|last:[1-9][0-9]*")  # what a scope may be besides a list of patterns
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
SIMILAR = (*LAYERS, nn.modules.conv._ConvNd, nn.Bilinear)  # refused by name where a scope asks for them
FORWARDS = {kind.forward for kind in LAYERS}


def choose_layers(model: nn.Module, example_inputs: Tensor, scope: str | Sequence[str], head: str) -> list[str]:
    """Names of the linear and convolutional layers that a scope means, in order of execution.

    Args:
        model: any module that maps ``[B, ...]`` to logits ``[B, C]``.
        example_inputs: at least one real sample, ``[B, ...]``.
        scope: ``"head"``; ``"last:N"``, the N last usable layers up to the head, which is one of them; ``"all"``; or patterns.
            A pattern is the name of a layer, or of a module, which means every layer below it; both may be globs. The patterns
            need not include the head.
        head: name of the classifier head.

    Raises:
        ConfigError: the scope is malformed, a pattern matches no layer, or the model has fewer than N usable layers.
        UnsupportedModelError: a layer that ``all`` or a pattern asks for cannot be changed by itself, see the message.
    """
    check_scope(scope)
    if scope == "head":
        return [head]
    order, refused = _usable_layers(model, example_inputs)
    if isinstance(scope, str) and scope.startswith("last:"):
        before = order[: order.index(head) + 1] if head in order else []
        count = int(scope.removeprefix("last:"))
        if count > len(before):
            raise ConfigError(
                f"ascent.scope is {scope!r}; expected at most last:{len(before)}, because {type(model).__name__} has "
                f"{len(before)} "
                "linear and convolutional layers that can be changed"
            )
        return before[-count:]
    chosen = {*order, *refused} if scope == "all" else _matches(model, scope, {*order, *refused})
    if reasons := [f"{name!r} {reason}" for name, reason in refused.items() if name in chosen]:
        raise UnsupportedModelError(
            f"ascent.scope is {scope if isinstance(scope, str) else list(scope)!r}, but {'; '.join(reasons)}; expected "
            "layers nn.Linear, "
            "nn.Conv1d or nn.Conv2d that are called once, with a weight of their own; name other layers in ascent.scope"
        )
    return [name for name in order if name in chosen]


def check_scope(scope: str | Sequence[str]) -> None:
    """``ConfigError`` unless a scope is well-formed; whether layers fit it needs the model."""
    listed = not isinstance(scope, str) and len(scope) > 0 and all(isinstance(each, str) and each for each in scope)
    if not (listed or (isinstance(scope, str) and SCOPE.fullmatch(scope))):
        raise ConfigError(f"ascent.scope is {scope!r}; expected head, all, last:N or a list of module patterns")


def _usable_layers(model: nn.Module, example_inputs: Tensor) -> tuple[list[str], dict[str, str]]:
    """The layers that can be in a scope in order of execution, and why the others cannot."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SIMILAR)}
    refused = {name: reason for name, module in layers.items() if (reason := _unusable(model, name, module))}
    weights = {name: layers[name].weight.detach().requires_grad_() for name in layers.keys() - refused.keys()}
    calls: list[str] = []
    by_keyword: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(
            lambda _module, inputs, name=name: calls.append(name) if inputs else by_keyword.add(name)
        )
        for name, module in layers.items()
    ]
    parameters = {f"{name}.weight": weight for name, weight in weights.items()}
    try:
        with (
            evaluation_mode(model),
            torch.inference_mode(False),
            torch.enable_grad(),  # without, modules such as nn.TransformerEncoderLayer do not call their layers
            forward_errors(model, example_inputs, UnsupportedModelError),
        ):
            loss = torch.func.functional_call(model, parameters, (example_inputs,)).sum()
            inputs = list(parameters.values())
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True) if loss.requires_grad else ()
    finally:
        for hook in hooks:
            hook.remove()
    for name, gradient in zip_longest(weights, gradients):
        if name in by_keyword:
            refused[name] = "is called with its input as a keyword"
        elif calls.count(name) != 1:
            refused[name] = f"is called {calls.count(name)} times in a forward pass"
        elif gradient is None:
            refused[name] = "gets no gradient, because it runs under no_grad or the logits do not depend on it"
    return [name for name in calls if name not in refused], {name: refused[name] for name in layers if name in refused}


def _unusable(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why a layer cannot be in a scope, as far as it can be seen without a forward pass."""
    if not isinstance(module, LAYERS):
        return f"is a {type(module).__name__}"
    own = [module._parameters.get(key) for key in ("weight", "bias")]
    if own[0] is None or (own[1] is None and module.bias is not None):
        return "has a computed weight or bias"
    if type(module).forward not in FORWARDS:
        return f"is a {type(module).__name__} with a forward of its own"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"pads with padding_mode={module.padding_mode!r}"
    if not module.weight.is_floating_point():
        return f"has a weight of type {module.weight.dtype}"
    shared = [
        key
        for key, parameter in model.named_parameters(remove_duplicate=False)
        if any(parameter is of_layer for of_layer in own) and key.rpartition(".")[0] != name
    ]
    return f"shares its weight with {', '.join(shared)}" if shared else None


def _matches(model: nn.Module, patterns: Sequence[str], layers: set[str]) -> set[str]:
    """The layers that patterns match by their own name or by that of a module around them."""
    around = {name: set(accumulate(name.split("."), lambda path, part: f"{path}.{part}")) for name in layers}
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {name for name, names in around.items() if any(fnmatchcase(each, pattern) for each in names)}
        if not matched:
            others = [name for name, _ in model.named_modules() if fnmatchcase(name, pattern)]
            if others:
                raise ConfigError(
                    f"ascent.scope names {pattern!r}, but there is no linear or convolutional layer in "
                    f"{', '.join(others[:3])}; "
                    "expected a pattern of such layers, because nothing else of a model is changed"
                )
            raise ConfigError(
                f"ascent.scope names {pattern!r}, which matches no layer of {type(model).__name__}; "
                f"{nearest(pattern, set().union(*around.values()))}"
            )
        chosen |= matched
    return chosen
