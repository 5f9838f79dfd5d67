"""What a draw makes of a sample: an augmented view, the same wherever and whenever it is made."""

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from imu_ray.errors import ConfigError, ImuError, nearest, raised_in
from imu_ray.models.copies import unusable
from imu_ray.models.spec import import_path

SETTING = "ascent.view_transform"
_ALONE = threading.Lock()  # one callable at a time has the global random numbers


def flip(pixels_CHW: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored left to right with probability 1/2."""
    return pixels_CHW.flip(-1) if torch.randint(2, (), generator=generator) else pixels_CHW


def crop_flip(pixels_CHW: Tensor, generator: torch.Generator) -> Tensor:
    """A crop of the image with a black border of an eighth of each side, then mirrored with probability 1/2."""
    height, width = pixels_CHW.shape[1:]
    above, beside = round(height / 8), round(width / 8)
    top, left = (int(torch.randint(2 * border + 1, (), generator=generator)) for border in (above, beside))
    bordered = F.pad(pixels_CHW, (beside, beside, above, above))
    return flip(bordered[:, top : top + height, left : left + width], generator)


TRANSFORMS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"crop_flip": crop_flip, "flip": flip}


def find_transform(name: str) -> Callable[..., Any]:
    """A registered transform (of pixels and a generator), or a callable (of pixels) from its import path.

    Raises:
        ConfigError: there is none of that name, or it cannot be imported.
    """
    if ":" in name:
        found = import_path(SETTING, name)
        if not callable(found):
            raise ConfigError(f"{SETTING} {name!r} is a {type(found).__name__}; expected a callable tensor -> tensor")
        return found  # type: ignore[no-any-return]
    if name not in TRANSFORMS:
        raise ConfigError(
            f"{SETTING} is {name!r}; expected 'package.module:callable' or a transform: {nearest(name, TRANSFORMS)}"
        )
    return TRANSFORMS[name]


def augment(numbers: Tensor, name: str, draw: int) -> Tensor:
    """The view of a sample (pixels in [0, 1], or an array's numbers) that a draw gives; same shape and type.

    Raises:
        ConfigError: the transform does not take the sample, or gives no sample back.
    """
    transform, shape = find_transform(name), list(numbers.shape)
    if name in TRANSFORMS:
        if numbers.ndim != 3:
            raise ConfigError(
                f"{SETTING} is {name!r} for a sample of shape {shape}; expected an image [channels, height, width]; "
                "name a callable of your own ('package.module:callable'), or set ascent.views=0 and audit.views=0"
            )
        return transform(numbers, torch.Generator().manual_seed(draw))  # type: ignore[no-any-return]
    expected = (
        f"a sample of shape {shape}; expected a callable that takes a floating tensor (of an image, pixels in [0, 1] "
        "before forget_set.mean and std) and gives such a tensor"
    )
    with own_code(SETTING, name, expected), _global_numbers(draw):
        made = transform(numbers.clone())
    if unusable(made) or not made.is_floating_point() or list(made.shape) != shape:
        gave = f"{made.dtype} of shape {list(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
        raise ConfigError(
            f"{SETTING} {name!r} gave {gave} for a sample of shape {shape}; expected a dense floating tensor of the "
            "same shape"
        )
    return made.detach().to("cpu", numbers.dtype)  # type: ignore[no-any-return]


@contextlib.contextmanager
def own_code(setting: str, name: str, given: str) -> Iterator[None]:
    """An error of the caller's own code as one of the setting that names it.

    Its text may hold what the sample holds, so that it is not passed on; ``given`` says what the code was given, and
    what was expected of it.
    """
    try:
        yield
    except (ImuError, MemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"{setting} {name!r} raised {raised_in(error)}, for {given}") from None


@contextlib.contextmanager
def _global_numbers(seed: int) -> Iterator[None]:
    """Global random numbers of torch (CPU), NumPy and Python from a seed; as they were afterwards."""
    with _ALONE, torch.random.fork_rng(devices=[]):
        before = np.random.get_state(), random.getstate()  # noqa: NPY002
        try:
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
        finally:
            np.random.set_state(before[0])  # noqa: NPY002
            random.setstate(before[1])
