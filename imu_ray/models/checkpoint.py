"""Checkpoints of a model: read without running code, loaded when they fit, and told apart by a hash."""

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from imu_ray.errors import CheckpointError, ImuError
from imu_ray.models.copies import check_state, unusable
from imu_ray.run.storage import open_storage


def read_state_dict(location: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint file, by path or URI, read without running code from it."""
    try:
        with open_storage(location).fetch("") as path:
            if path is None:
                expected = "expected a .safetensors file or a torch state dict"
                raise CheckpointError(f"checkpoint {location} does not exist; {expected}")
            is_safe = path.suffix == ".safetensors"
            loaded = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"checkpoint {location} holds pickled code, which is never run, or is no checkpoint; expected tensors "
            "only; save model.state_dict() with safetensors.torch.save_file or torch.save"
        ) from None
    except ImuError:
        raise
    except Exception as error:  # a broken file can raise anything
        why = f"{error}; expected a whole file; save it again"
        raise CheckpointError(f"checkpoint {location} cannot be read: {why}") from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if isinstance(loaded, dict) and all(isinstance(key, str) and not unusable(loaded[key]) for key in loaded):
        return loaded
    expected = "expected a mapping from parameter names to dense tensors"
    raise CheckpointError(f"checkpoint {location} holds no state dict; {expected}")


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint that fits exactly; ``CheckpointError`` lists missing, unexpected and misshapen tensors.

    Names fit with or without the parts that data-parallel and compiled models put into them.
    """
    check_state(model)
    own = model.state_dict()
    state = _renamed(read_state_dict(path), own)
    shared = sorted(name for name in own.keys() & state.keys() if _form(state[name]) != _form(own[name]))
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "misshapen": [f"{name} {_form(state[name])} instead of {_form(own[name])}" for name in shared],
    }
    listed = [
        f"{kind}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for kind, names in problems.items()
        if names
    ]
    fits = f"checkpoint {path} does not fit {type(model).__name__}"
    if listed:
        raise CheckpointError(f"{fits}: {'; '.join(listed)}; expected the same architecture")
    try:
        model.load_state_dict(state)
    except Exception as error:  # hooks of the model
        raise CheckpointError(f"{fits}: {error}; expected its own state dict") from None


def _renamed(state: dict[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """The state under the model's own names, where these are told apart without the parts that wrappers add."""

    def plain(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))

    names = {plain(name): name for name in own}
    renamed = {names.get(plain(name), name): value for name, value in state.items()}
    return renamed if len(renamed) == len(state) else state


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}{' complex' * tensor.is_complex()}"


def model_hash(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, by name."""
    return state_hash(model.state_dict())


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors of a state dict, by name."""
    seen = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        seen.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        seen.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()
