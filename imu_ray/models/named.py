"""Classifiers by name, of torchvision and of timm; a library is loaded where a model of it is asked for."""

import difflib
import functools
from collections.abc import Callable

from torch import nn

from imu_ray.errors import ConfigError, nearest

TIMM = "timm:"


def torchvision_factory(name: str) -> Callable[..., nn.Module]:
    """What builds a classifier of torchvision's, with random weights unless ``weights`` says otherwise.

    Raises:
        ConfigError: there is none of this name.
    """
    import torchvision  # here, because it takes longer to import than torch, in every worker process

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ConfigError(
            f"model.factory is {name!r}; expected 'package.module:callable', 'timm:NAME', 'hf:PATH' or a torchvision "
            f"classifier: {nearest(name, names)}"
        )
    return lambda **kwargs: torchvision.models.get_model(name, **{"weights": None, **kwargs})


def timm_factory(name: str) -> Callable[..., nn.Module]:
    """What builds a model of timm's, with random weights unless ``pretrained`` is true, which may download them.

    Raises:
        ConfigError: the extra is not installed, or there is no model of this name.
    """
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"model.factory is '{TIMM}{name}', which cannot be built: {error}; expected the extra: pip install "
            "imu-ray[timm]"
        ) from None
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models())
        raise ConfigError(
            f"model.factory is '{TIMM}{name}', which timm {timm.__version__} does not have; "
            + (f"did you mean {', '.join(close)}?" if close else "expected one of timm.list_models()")
        )
    return functools.partial(timm.create_model, name)
