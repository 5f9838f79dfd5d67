"""Images: decoded, and as numbers."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from imu_ray.tasks.base import UnusableError

ARRAY = b"\x93NUMPY"  # what a file of numpy.save begins with


def decode_image(image: bytes | Image.Image, mode: str) -> Image.Image:
    """An image in ``mode``; ``UnusableError`` where it does not decode, or is large enough to exhaust memory."""
    try:
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        # Pillow only warns up to twice this many, and filters of warnings are shared by the threads that decode.
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        if image.mode.startswith("I") or image.mode == "F":
            raise UnusableError(f"the image has mode {image.mode}, more than 8 bits a channel, which would be cut off")
        return image.convert(mode)
    except (UnusableError, MemoryError):
        raise
    except Exception as error:  # a decoder raises anything
        raise UnusableError(f"the image does not decode ({type(error).__name__})") from None


def decode_array(content: bytes) -> npt.NDArray[Any]:
    """An array that ``numpy.save`` wrote; ``UnusableError`` where it is none, or needs pickle."""
    try:
        found: npt.NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:
        raise UnusableError(f"the array does not decode ({type(error).__name__})") from None
    return found


def pixels_of(image: Image.Image, dtype: torch.dtype) -> Tensor:
    """The pixels of an image in [0, 1], ``[channels, height, width]``."""
    pixels = torch.from_numpy(np.array(image))
    return (pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.unsqueeze(0)).to(dtype) / 255


def image_of(pixels_CHW: Tensor) -> Image.Image:
    """Pixels in [0, 1] as an image of 8 bits a channel."""
    pixels = (pixels_CHW * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2))
