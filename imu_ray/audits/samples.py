"""Samples that a report shows where ``audit.samples`` asks for them: small pictures, or the beginning of texts."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from imu_ray.tasks.base import UnusableError
from imu_ray.tasks.images import ARRAY, decode_array, decode_image

PIXELS = 160  # longest side of a picture
CHARACTERS = 600  # of a text


@dataclass(frozen=True)
class Shown:
    """A sample of a report.

    Attributes:
        label: its class; None where it has none.
        loss: after unlearning, in nats.
        influence: on the mean forget loss; None where it was not scored.
        picture: a PNG as data URI; empty where it is shown as text.
        text: what it says, cut off.
    """

    label: int | None
    loss: float
    influence: float | None
    picture: str
    text: str

    @classmethod
    def of(cls, value: Any, label: int | None, loss: float, influence: float | None) -> "Shown":
        """A raw input as it is stored."""
        picture = picture_of(value)
        return cls(
            label, loss, influence, "" if picture is None else data_uri(picture), "" if picture else text_of(value)
        )


def picture_of(value: Any) -> Image.Image | None:
    """An encoded image, or an array ``[H, W]``, ``[C, H, W]`` or ``[H, W, C]`` of 1 or 3 channels; None of others.

    Arrays are stretched from their least to their largest number, but for bytes.
    """
    try:
        if isinstance(value, bytes) and value.startswith(ARRAY):
            value = decode_array(value)
        if isinstance(value, bytes | Image.Image):
            return decode_image(value, "RGB")
    except UnusableError:
        return None
    if not isinstance(value, Tensor | np.ndarray):
        return None
    array = value.detach().cpu().float().numpy() if isinstance(value, Tensor) and value.is_floating_point() else value
    array = np.asarray(array)
    if array.ndim == 3 and array.shape[0] in (1, 3):
        array = np.moveaxis(array, 0, 2)
    if array.dtype.kind not in "buif" or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))):
        return None
    pixels = array if array.dtype == np.uint8 else _stretched(array.astype(np.float64))
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels).convert("RGB")


def _stretched(array: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    low, high = array.min(), array.max()
    stretched: npt.NDArray[np.uint8] = np.round(255 * (array - low) / (high - low or 1)).astype(np.uint8)
    return stretched


def data_uri(image: Image.Image) -> str:
    """A PNG of at most ``PIXELS`` a side."""
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((PIXELS, PIXELS))
    small.info.clear()  # what the file says beside the pixels
    small.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def text_of(value: Any) -> str:
    """The beginning of a text, of the texts of a row by their names, of a conversation, or of numbers."""
    if isinstance(value, str):
        told = value
    elif isinstance(value, Mapping):
        told = "\n".join(f"{name}: {text_of(each)}" for name, each in value.items() if each is not None)
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        told = "\n".join(f"{each.get('role')}: {each.get('content')}" for each in value)
    elif isinstance(value, list) and value and isinstance(value[0], str):
        told = "; ".join(value)
    elif isinstance(value, list | Tensor | np.ndarray):
        told = " ".join(map(str, np.asarray(value).reshape(-1)[:CHARACTERS].tolist()))
    else:
        told = f"({type(value).__name__})"
    return told if len(told) <= CHARACTERS else told[:CHARACTERS] + " ..."
