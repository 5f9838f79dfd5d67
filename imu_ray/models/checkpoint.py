"""Checkpoints of a model: read without running code, loaded when they fit, and told apart by a hash."""

import hashlib
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from imu_ray.errors import CheckpointError
from imu_ray.run.storage import open_storage


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
