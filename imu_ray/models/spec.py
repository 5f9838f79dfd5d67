"""How to build a model."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from imu_ray.errors import ConfigError
from imu_ray.models.checkpoint import load_checkpoint
from imu_ray.settings import nearest


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
