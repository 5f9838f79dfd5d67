"""A model from a spec, its checkpoint, and its classifier head.

Shapes: B samples, C classes, D head inputs with the bias input included.
"""

import copy
import hashlib
import importlib
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from imu_ray.errors import CheckpointError, ConfigError, UnsupportedModelError
from imu_ray.influence.gradients import HEAD_DTYPE, layer_inputs
from imu_ray.settings import nearest
from imu_ray.storage import open_storage


@dataclass(frozen=True)
class ModelSpec:
    """How to build a model: a factory, its keyword arguments and a checkpoint.

    Attributes:
        factory: ``"package.module:callable"``, or the name of a torchvision classifier (``"resnet18"``). Importing runs
            code, so a spec is trusted input.
        kwargs: keyword arguments of the factory.
        checkpoint: a ``.safetensors`` file, or a state dict that ``torch.load(weights_only=True)`` reads.
        head: name of the classifier head, when it cannot be told.
    """

    factory: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    head: str | None = None

    def build(self) -> nn.Module:
        """The model with its checkpoint loaded, in eval mode, on the CPU.

        Raises:
            ConfigError: the factory cannot be imported or called.
            CheckpointError: the checkpoint cannot be read or does not fit.
        """
        try:
            model = self._factory()(**self.kwargs)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.factory {self.factory!r} refused kwargs {dict(self.kwargs)}: {error}") from None
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model.factory {self.factory!r} returned {type(model).__name__}; expected a torch.nn.Module")
        if self.checkpoint is not None:
            load_checkpoint(model, self.checkpoint)
        return model.eval()

    def _factory(self) -> Any:
        module, colon, name = self.factory.partition(":")
        if not colon:
            import torchvision  # here, because it takes longer to import than torch, in every worker process

            names = torchvision.models.list_models(module=torchvision.models)
            if self.factory not in names:
                raise ConfigError(
                    f"model.factory is {self.factory!r}; expected 'package.module:callable' or a torchvision classifier: "
                    f"{nearest(self.factory, names)}"
                )
            return lambda **kwargs: torchvision.models.get_model(self.factory, **{"weights": None, **kwargs})
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"model.factory {self.factory!r} cannot be imported ({error}); expected 'package.module:callable' on the import "
                "path of the driver and the workers"
            ) from None


def read_state_dict(location: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint file, by path or URI, read without running code from it."""
    with open_storage(location).fetch("") as path:
        if path is None:
            raise CheckpointError(f"checkpoint {location} does not exist; expected a .safetensors file or a torch state dict")
        try:
            if path.suffix == ".safetensors":
                return dict(load_file(path))
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"checkpoint {location} holds pickled code, which is never run, or is no checkpoint; expected tensors only; save "
                "model.state_dict() with safetensors.torch.save_file or torch.save"
            ) from None
        except Exception as error:  # a broken file can raise anything
            raise CheckpointError(f"checkpoint {location} cannot be read: {error}") from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"checkpoint {location} holds no state dict; expected a mapping from parameter names to tensors")
    return loaded


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint that fits exactly; ``CheckpointError`` lists missing, unexpected and misshapen tensors."""
    state, own = read_state_dict(path), model.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "misshapen": [
            f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
            for name in sorted(own.keys() & state.keys())
            if state[name].shape != own[name].shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{kind}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
            for kind, names in problems.items()
            if names
        )
        raise CheckpointError(f"checkpoint {path} does not fit {type(model).__name__}: {listed}; expected the same architecture")
    model.load_state_dict(state)


def model_hash(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, by name."""
    seen = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        seen.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        seen.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


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
        raise UnsupportedModelError(f"model.head is {name!r}, which is no nn.Linear of the model; {nearest(name, layers)}")
    seen: dict[str, list[Tensor]] = {key: [] for key in layers}
    hooks = [
        # A copy, because what follows may change the output in place.
        layer.register_forward_hook(lambda _module, _inputs, output, key=key: seen[key].append(output.clone()))
        for key, layer in layers.items()
    ]
    try:
        with evaluation_mode(model):
            logits = model(example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    listed = ", ".join(f"{key} ({layer.in_features} -> {layer.out_features})" for key, layer in layers.items())
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedModelError(f"{type(model).__name__} returned {shape}; expected logits [samples, classes]; linear layers: {listed}")
    # A layer that is called more than once in a forward pass has no one input to cache.
    matches = [key for key, outputs in seen.items() if len(outputs) == 1 and torch.equal(outputs[0], logits)]
    if name is not None:
        matches = [key for key in matches if key == name]
    if len(matches) != 1:
        raise UnsupportedModelError(
            f"{'no' if not matches else len(matches)} linear layer gives the output of {type(model).__name__} itself; expected one "
            f"head whose output is the logits, with nothing after it; linear layers: {listed}; name one in model.head if it is such a head"
        )
    _refuse_shared(model, matches[0], layers[matches[0]])
    return matches[0]


def _refuse_shared(model: nn.Module, name: str, head: nn.Linear) -> None:
    own = {id(parameter) for parameter in head.parameters(recurse=False)}
    others = [
        key for key, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in own and key.rpartition(".")[0] != name
    ]
    if others or not isinstance(head.weight, nn.Parameter):
        raise UnsupportedModelError(
            f"the head {name!r} {'shares its weight with ' + ', '.join(others) if others else 'has a computed weight'}; expected a "
            "weight of its own, because changing it must change nothing else; untie it or remove the parametrization"
        )


@dataclass(frozen=True)
class Head:
    """A linear classifier head as one matrix ``[C, D]``, float64, on the CPU; the bias, if any, is its last column."""

    name: str
    matrix_CD: Tensor
    has_bias: bool

    @classmethod
    def of(cls, model: nn.Module, name: str) -> "Head":
        """A copy of the head of ``model``."""
        layer = linear_layers(model)[name]
        columns = [layer.weight.detach()] + ([layer.bias.detach().unsqueeze(1)] if layer.bias is not None else [])
        return cls(name, torch.cat([column.cpu().to(HEAD_DTYPE) for column in columns], dim=1), layer.bias is not None)

    def inputs(self, features_BF: Tensor) -> Tensor:
        """Head inputs ``[B, D]`` of features without the bias input ``[B, F]``; float64."""
        return layer_inputs(features_BF, self.has_bias)

    def logits(self, features_BF: Tensor, matrix_CD: Tensor | None = None) -> Tensor:
        """Logits ``[B, C]`` of cached features, under another matrix if one is given; float64, without copying the features."""
        matrix = self.matrix_CD if matrix_CD is None else matrix_CD
        width = features_BF.shape[1]
        # The head on the left: a third faster than features @ matrix.T where classes are few.
        product = (matrix[:, :width] @ features_BF.to(HEAD_DTYPE).T).T
        return product + matrix[:, -1] if self.has_bias else product

    def gradient(self, output_grads_BC: Tensor, features_BF: Tensor) -> Tensor:
        """Sum of the samples' head gradients ``[C, D]``, without copying the features."""
        weight = output_grads_BC.T @ features_BF.to(HEAD_DTYPE)
        return torch.cat([weight, output_grads_BC.sum(0).unsqueeze(1)], dim=1) if self.has_bias else weight


def with_head(model: nn.Module, head: Head) -> nn.Module:
    """A copy of the model with another head; every other tensor is bit-identical."""
    changed = copy.deepcopy(model)
    layer = linear_layers(changed)[head.name]
    with torch.no_grad():
        layer.weight.copy_(head.matrix_CD[:, : layer.in_features])
        if layer.bias is not None:
            layer.bias.copy_(head.matrix_CD[:, -1])
    return changed
