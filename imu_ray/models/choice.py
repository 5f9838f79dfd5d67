"""Which layers a scope means, in the order in which a forward pass runs them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate, zip_longest

import torch
from torch import Tensor, nn

from imu_ray.errors import ConfigError, UnsupportedModelError, nearest
from imu_ray.influence.layer_io import kind_of
from imu_ray.models.adapters import adapter_layers, moving_base, pair_of
from imu_ray.models.blocks import run_again
from imu_ray.models.copies import has_numbers
from imu_ray.models.layers import detached, evaluation_mode, forward_errors, logits_of

SCOPE = re.compile(r"head|all|usable|adapters|last:[1-9][0-9]*")  # what a scope may be besides a list of patterns
SIMILAR = (nn.modules.conv._ConvNd, nn.Bilinear)  # refused by name where a scope asks for them


def choose_layers(model: nn.Module, example_inputs: Tensor, scope: str | Sequence[str], head: str) -> list[str]:
    """Names of the linear and convolutional layers that a scope means, in order of execution.

    Of a model that PEFT put adapters into, only those of its active adapters count: the base model stays as it is,
    also where a pattern means a module with an adapter in it.

    Args:
        model: any module that maps ``[B, ...]`` to logits ``[B, C]`` or ``[B, T, C]``, or to an object that has them as
            ``logits``.
        example_inputs: at least one real sample, ``[B, ...]``.
        scope: ``"head"``; ``"last:N"``, the N last usable layers up to the head, which is one of them; ``"all"``;
            ``"usable"``, all but those that cannot be changed; ``"adapters"``; or patterns. A pattern is the name of a
            layer, or of a module, which means every layer below it; both may be globs. The patterns need not include
            the head.
        head: name of the classifier head; empty where there is none that can move by itself.

    Raises:
        ConfigError: the scope is malformed, a pattern matches no layer, or the model has fewer than N usable layers.
        UnsupportedModelError: a layer that ``all`` or a pattern asks for cannot be changed by itself, see the message.
    """
    check_scope(scope)
    if scope == "head" and head:
        return [head]
    adapters = adapter_layers(model)
    if scope == "head" or (scope == "adapters" and not adapters):
        others = "last:N, all or a list of module patterns"
        raise ConfigError(f"ascent.scope is {scope!r}, which {type(model).__name__} has none of; expected {others}")
    layers = adapters or {
        name: module for name, module in model.named_modules() if kind_of(module) or isinstance(module, SIMILAR)
    }
    chosen = set(layers) if isinstance(scope, str) else _matches(model, scope, layers, bool(adapters))
    order, refused = _usable_layers(model, example_inputs, {name: layers[name] for name in layers if name in chosen})
    reasons = [f"{name!r} {reason}" for name, reason in refused.items()]
    if isinstance(scope, str) and scope.startswith("last:"):
        if head and not adapters:
            order = order[: order.index(head) + 1] if head in order else []
        count = int(scope.removeprefix("last:"))
        if count > len(order):
            raise ConfigError(
                f"ascent.scope is {scope!r}; expected at most last:{len(order)}, because {type(model).__name__} has "
                f"{len(order)} linear and convolutional layers that can be changed"
                + "".join(f"; {reason}" for reason in reasons[:3])
            )
        return order[-count:]
    if not order and not reasons:
        reasons = [f"{type(model).__name__} has no layer that can be changed"]
    if reasons and not (scope == "usable" and order):
        raise UnsupportedModelError(
            f"ascent.scope is {scope if isinstance(scope, str) else list(scope)!r}, but {'; '.join(reasons)}; expected "
            "layers nn.Linear, nn.Conv1d, nn.Conv2d or Hugging Face's Conv1D that are called once, with a weight of "
            "their own; name other layers in ascent.scope"
        )
    return order


def check_scope(scope: str | Sequence[str]) -> None:
    """``ConfigError`` unless a scope is well-formed; whether layers fit it needs the model."""
    listed = not isinstance(scope, str) and len(scope) > 0 and all(isinstance(each, str) and each for each in scope)
    if not (listed or (isinstance(scope, str) and SCOPE.fullmatch(scope))):
        raise ConfigError(
            f"ascent.scope is {scope!r}; expected head, all, usable, adapters, last:N or a list of module patterns"
        )


def _usable_layers(
    model: nn.Module, example_inputs: Tensor, layers: Mapping[str, nn.Module]
) -> tuple[list[str], dict[str, str]]:
    """Those of some layers that can be in a scope in order of execution, and why the others cannot."""
    refused = {name: reason for name, module in layers.items() if (reason := _unusable(model, name, module))}
    weights = {
        name: module.get_parameter("weight").detach().requires_grad_()
        for name, module in layers.items()
        if name not in refused
    }
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
            given = {**detached(model), **parameters}
            with run_again(model):
                loss = logits_of(torch.func.functional_call(model, given, (example_inputs,))).sum()
            for hook in hooks:  # a block may be run again
                hook.remove()
            inputs = list(parameters.values())
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True) if inputs and loss.requires_grad else ()
    finally:
        for hook in hooks:
            hook.remove()
    found = dict(zip_longest(weights, gradients))
    silent = _silent(found)
    for name in found:
        if name in by_keyword:
            refused[name] = "is called with its input as a keyword"
        elif calls.count(name) != 1:
            refused[name] = f"is called {calls.count(name)} times in a forward pass"
        elif name in silent:
            refused[name] = "gets no gradient, because it runs under no_grad or the logits do not depend on it"
            if len(pair_of(name)) > 1:
                refused[name] += " (with gradient checkpointing, call enable_input_require_grads() on the model first)"
    return [name for name in calls if name not in refused], {name: refused[name] for name in layers if name in refused}


def _silent(gradients: Mapping[str, Tensor | None]) -> set[str]:
    """Layers without a gradient. One half of an adapter may have none, because the other half is zero at first."""
    still = {name for name, grad in gradients.items() if grad is None or (has_numbers(grad) and not grad.any())}
    pairs = {name: pair_of(name) for name in still}
    return {
        name
        for name, pair in pairs.items()
        if gradients[name] is None or (len(pair) > 1 and still.issuperset(pair & gradients.keys()))
    }


def _unusable(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why a layer cannot be in a scope, as far as it can be seen without a forward pass."""
    if len(pair_of(name)) > 1 and moving_base(model, name):
        return (
            "stands beside a layer that is not frozen, so that either could move: freeze that with "
            "requires_grad_(False)"
        )
    kind = kind_of(module)
    if kind is None:
        return f"is a {type(module).__name__}"
    own = [module._parameters.get(key) for key in ("weight", "bias")]
    if own[0] is None or (own[1] is None and module.bias is not None):
        return "has a computed weight or bias"
    if type(module).forward is not kind.forward:
        return f"is a {type(module).__name__} with a forward of its own"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"pads with padding_mode={module.padding_mode!r}"
    if not own[0].is_floating_point():
        return f"has a weight of type {own[0].dtype}"
    shared = [
        key
        for key, parameter in model.named_parameters(remove_duplicate=False)
        if any(parameter is of_layer for of_layer in own) and key.rpartition(".")[0] != name
    ]
    if not shared:
        return None
    embeddings = isinstance(model.get_submodule(shared[0].rpartition(".")[0]), nn.Embedding)
    return f"shares its weight with {'the embeddings ' * embeddings}{', '.join(shared)}"


def _matches(model: nn.Module, patterns: Sequence[str], layers: Iterable[str], adapters: bool) -> set[str]:
    """The layers that patterns match by their own name or by that of a module around them."""
    kind = "adapter" if adapters else "linear or convolutional layer"
    around = {name: set(accumulate(name.split("."), lambda path, part: f"{path}.{part}")) for name in layers}
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {name for name, names in around.items() if any(fnmatchcase(each, pattern) for each in names)}
        if not matched:
            others = [name for name, _ in model.named_modules() if fnmatchcase(name, pattern)]
            if others:
                raise ConfigError(
                    f"ascent.scope names {pattern!r}, but there is no {kind} in {', '.join(others[:3])}; expected a "
                    f"pattern of {kind}s, because nothing else of a model is "
                    f"changed{'; merge_and_unload() makes a model without adapters' * adapters}"
                )
            raise ConfigError(
                f"ascent.scope names {pattern!r}, which matches no layer of {type(model).__name__}; "
                f"{nearest(pattern, set().union(*around.values()))}"
            )
        chosen |= matched
    return chosen
