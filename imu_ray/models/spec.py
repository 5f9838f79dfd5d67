"""How to build a model."""

import functools
import importlib
import json
import operator
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from imu_ray.errors import CheckpointError, ConfigError, ImuError
from imu_ray.models.blocks import checkpoint_blocks
from imu_ray.models.checkpoint import FORM, load_checkpoint
from imu_ray.models.copies import to_eval
from imu_ray.models.downloads import download_remedy
from imu_ray.models.named import TIMM, timm_factory, torchvision_factory
from imu_ray.models.pretrained import load_pretrained, load_skeleton

PRETRAINED = "hf:"


@dataclass(frozen=True)
class ModelSpec:
    """How to build a model: a factory, its keyword arguments and a checkpoint.

    Attributes:
        factory: ``"package.module:callable"``, the name of a torchvision classifier (``"resnet18"``), ``"timm:NAME"``,
            ``"hf:PATH"``, an image classifier or causal language model in a folder of Hugging Face's, or a callable. A
            module is also looked for in the working directory. Importing runs code, so a spec is trusted input.
        kwargs: keyword arguments of the factory; of ``hf:PATH`` those of ``from_pretrained``, of ``timm:NAME`` those of
            ``timm.create_model``.
        checkpoint: a ``.safetensors`` file, or the index of several, or a folder with either; or a state dict that
            ``torch.load(weights_only=True)`` reads. A run writes the unlearned model in the same form.
        head: name of the classifier head, when it cannot be told.
        merge_adapter: whether a run writes the base model with the adapter merged into it, in place of the adapter
            alone.
        gradient_checkpointing: whether the blocks of a Hugging Face model are run again on the way back, which takes
            less memory and more time.
    """

    factory: str | Callable[..., nn.Module]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | Path | None = None
    head: str | None = None
    merge_adapter: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("factory", isinstance(self.factory, str) or callable(self.factory), "text or a callable"),
            ("kwargs", isinstance(self.kwargs, Mapping), "a mapping"),
            ("checkpoint", isinstance(self.checkpoint, str | Path | None), "a path or URI"),
            ("head", isinstance(self.head, str | None), "the name of a layer"),
            ("merge_adapter", isinstance(self.merge_adapter, bool), "true or false"),
            ("gradient_checkpointing", isinstance(self.gradient_checkpointing, bool), "true or false"),
        ):
            if not fits:
                raise ConfigError(f"model.{name} is {getattr(self, name)!r}; expected {expected}")

    def build(self) -> nn.Module:
        """The model with its checkpoint loaded, in eval mode, on the CPU.

        Raises:
            ConfigError: the factory cannot be imported or called.
            CheckpointError: the checkpoint cannot be read or does not fit, or weights cannot be fetched.
            UnsupportedModelError: there is no block for ``gradient_checkpointing``.
        """
        factory = self._factory() if isinstance(self.factory, str) else self.factory
        try:
            model = factory(**self.kwargs)
        except ImuError:
            raise
        except Exception as error:
            if remedy := download_remedy(error):
                why = " ".join(str(error).split())
                raise CheckpointError(
                    f"the weights of model.factory {self._name!r} cannot be fetched ({type(error).__name__}: {why}); "
                    f"{remedy}"
                ) from None
            raise ConfigError(
                f"model.factory {self._name!r} refused kwargs {dict(self.kwargs)}: {type(error).__name__}: {error}; "
                "expected those that it takes; see model.kwargs"
            ) from error
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"model.factory {self._name!r} returned {type(model).__name__}; expected a torch.nn.Module"
            )
        if self.merge_adapter and not hasattr(model, "merge_and_unload"):
            raise ConfigError(
                f"model.merge_adapter is true; expected a model with an adapter, not {type(model).__name__}"
            )
        if self.gradient_checkpointing:
            checkpoint_blocks(model)
        if self.checkpoint is not None:
            setattr(model, FORM, load_checkpoint(model, self.checkpoint))
        return to_eval(model)

    def skeleton(self) -> nn.Module | None:
        """The model as shapes without numbers, where its folder holds its settings alone; else None."""
        name = self.factory if isinstance(self.factory, str) else ""
        if not name.startswith(PRETRAINED):
            return None
        model = load_skeleton(name.removeprefix(PRETRAINED), **self.kwargs)
        if model is not None and self.gradient_checkpointing:
            checkpoint_blocks(model)
        return model

    def describe(self) -> dict[str, Any]:
        """The spec as plain values, for the record."""
        kwargs = json.dumps(dict(self.kwargs), default=lambda value: type(value).__name__, skipkeys=True)
        return {
            "factory": self._name,
            "kwargs": json.loads(kwargs, parse_constant=str),
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "head": self.head,
            "merge_adapter": self.merge_adapter,
            "gradient_checkpointing": self.gradient_checkpointing,
        }

    @property
    def _name(self) -> str:
        """The factory as text; of a callable, where it was defined."""
        if isinstance(self.factory, str):
            return self.factory
        defined = self.factory if hasattr(self.factory, "__qualname__") else type(self.factory)
        return f"{defined.__module__}:{defined.__qualname__}"

    def _factory(self) -> Any:
        name = str(self.factory)
        if name.startswith(PRETRAINED):
            return functools.partial(load_pretrained, name.removeprefix(PRETRAINED))
        if name.startswith(TIMM):
            return timm_factory(name.removeprefix(TIMM))
        if ":" in name:
            return import_path("model.factory", name)
        return torchvision_factory(name)


def import_path(setting: str, path: str) -> Any:
    """What ``"package.module:name"`` names; the module is also looked for in the working directory.

    Raises:
        ConfigError: it cannot be imported; the message names the setting.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:  # an installed command does not look there
        sys.path.append(os.getcwd())
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except Exception as error:  # importing runs the caller's code
        raise ConfigError(
            f"{setting} {path!r} cannot be imported ({type(error).__name__}: {error}); expected "
            "'package.module:callable' on the import path or in the working directory"
        ) from error


def require_model(model: Any) -> None:
    """``ConfigError`` where a model is neither a module nor a spec."""
    if not isinstance(model, nn.Module | ModelSpec):
        raise ConfigError(f"model is a {type(model).__name__}; expected a torch.nn.Module or an imu_ray.ModelSpec")
