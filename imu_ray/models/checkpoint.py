"""Checkpoints of a model: read without running code, loaded when they fit, told apart by a hash, written as they came.

What a checkpoint holds beside the model's tensors (an optimiser's state, the epoch) is neither read nor written.
"""

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from imu_ray.errors import CheckpointError, ImuError
from imu_ray.models.copies import check_state, unusable
from imu_ray.models.pretrained import save_pretrained
from imu_ray.run.storage import LocalStorage, RemoteStorage, open_folder, open_storage

SINGLE, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "model.pt"
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys that a training script keeps a model's state under
FORM = "checkpoint_form"  # attribute of a model that came from a checkpoint


@dataclass(frozen=True)
class Form:
    """How a checkpoint keeps a model.

    Attributes:
        wrappers: keys that its state dict lies under, the outermost first; None of safetensors.
        shards: file of each tensor by its name in the checkpoint, where an index tells; else None.
        names: the model's own name of each tensor by that in the checkpoint.
    """

    wrappers: tuple[str, ...] | None = None
    shards: Mapping[str, str] | None = None
    names: Mapping[str, str] = field(default_factory=dict)


def read_checkpoint(location: str | Path) -> tuple[dict[str, Tensor], Form]:
    """Tensors of a checkpoint by path or URI, and how it keeps them; no code is run from it.

    It is a ``.safetensors`` file, the index of several, a folder with either under its usual name, or a state dict that
    ``torch.load(weights_only=True)`` reads.

    Raises:
        CheckpointError: it is not there, cannot be read, holds something else, or its index does not fit its files.
    """
    try:
        loaded, form = _read(location)
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
    for key in WRAPPERS if form.wrappers is not None else ():
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded, form = loaded[key], replace(form, wrappers=(*(form.wrappers or ()), key))
    if isinstance(loaded, dict) and all(isinstance(key, str) and not unusable(loaded[key]) for key in loaded):
        return loaded, form
    expected = "expected a mapping from parameter names to dense tensors"
    raise CheckpointError(f"checkpoint {location} holds no state dict; {expected}")


def _read(location: str | Path) -> tuple[Any, Form]:
    storage = open_storage(location)
    for name in ("", INDEX, SINGLE):  # the file itself, or one in the folder
        with storage.fetch(name) as path:
            if path is None:
                continue
            if path.name.endswith(".index.json"):
                shards = _shards_of(path, location)
                beside = storage if name else open_folder(location)[0]
                return _read_shards(beside, shards, location), Form(shards=shards)
            if path.suffix == ".safetensors":
                return load_file(path), Form()
            return torch.load(path, map_location="cpu", weights_only=True), Form(wrappers=())
    raise CheckpointError(
        f"checkpoint {location} does not exist; expected a .safetensors file, its index, a folder with {SINGLE} or "
        f"{INDEX}, or a torch state dict"
    )


def _shards_of(path: Path, location: str | Path) -> dict[str, str]:
    """File of each tensor, from an index; every file is one beside the index."""
    found = json.loads(path.read_text())
    shards = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"checkpoint {location} holds an index without weight_map; expected one; save it again")
    for file in shards.values():
        if not isinstance(file, str) or not file.endswith(".safetensors") or _folder_in(file):
            raise CheckpointError(
                f"checkpoint {location} names {file!r} as a shard; expected a .safetensors file in the folder of the "
                "index, because no other is read; mend the index"
            )
    return shards


def _folder_in(file: str) -> bool:
    """Whether the name of a file, read as on any system, has a folder in it."""
    return any(kind(file).name != file for kind in (PurePosixPath, PureWindowsPath))


def _read_shards(
    beside: LocalStorage | RemoteStorage, shards: Mapping[str, str], location: str | Path
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(shards.values())):
        with beside.fetch(file) as path:
            if path is None:
                raise CheckpointError(
                    f"checkpoint {location} has no shard {file}; expected every file that its index names; fetch it"
                )
            held = load_file(path)
        listed = {name for name in shards if shards[name] == file}
        if wrong := sorted(held.keys() ^ listed):
            raise CheckpointError(
                f"checkpoint {location} does not fit its shard {file}, of which one has {', '.join(wrong[:8])} and the "
                "other has not; expected an index and shards that were saved together; save them again"
            )
        tensors |= held
    return tensors


def load_checkpoint(model: nn.Module, path: str | Path) -> Form:
    """Load a checkpoint that fits exactly; ``CheckpointError`` lists missing, unexpected and misshapen tensors.

    Names fit with or without the parts that data-parallel and compiled models put into them.

    Returns:
        How the checkpoint keeps the model.
    """
    check_state(model)
    own = model.state_dict()
    given, form = read_checkpoint(path)
    names = _own_names(given, own)
    state = {names[name]: value for name, value in given.items()}
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
    return replace(form, names=names)


def _own_names(given: Iterable[str], own: Iterable[str]) -> dict[str, str]:
    """The model's name of each tensor, where these are told apart without the parts that wrappers add."""

    def plain(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))

    names = {plain(name): name for name in own}
    found = {name: names.get(plain(name), name) for name in given}
    return found if len(set(found.values())) == len(found) else {name: name for name in found}


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}{' complex' * tensor.is_complex()}"


def save_as_it_came(model: nn.Module, folder: Path, merge_adapter: bool = False) -> None:
    """Write a model once more as it was given; nothing where that is one safetensors file under the model's own names.

    A Hugging Face model becomes a folder that ``from_pretrained`` opens (``save_pretrained``). A model that came from a
    checkpoint goes under the names that its tensors have there: a state dict into ``model.pt``, under the same keys;
    shards into the same files, with their index. Numbers have the model's type. Nothing else of the checkpoint is
    carried over.
    """
    if hasattr(model, "save_pretrained"):
        save_pretrained(model, folder, merge_adapter)
    form: Form | None = getattr(model, FORM, None)
    if form is None:
        return
    own = model.state_dict()
    state: Any = {name: own[key].detach().cpu() for name, key in form.names.items()}
    if form.wrappers is not None:
        for key in reversed(form.wrappers):
            state = {key: state}
        torch.save(state, folder / PICKLED)
    elif form.shards is not None or any(name != key for name, key in form.names.items()):
        files = form.shards or dict.fromkeys(state, SINGLE)
        for file in sorted(set(files.values())):  # as copies: tensors that share memory are written each
            part = {name: state[name].contiguous().clone() for name in state if files[name] == file}
            save_file(part, folder / file, {"format": "pt"})
        if form.shards is not None:
            size = sum(tensor.nbytes for tensor in state.values())
            index = {"metadata": {"total_size": size}, "weight_map": dict(form.shards)}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


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
