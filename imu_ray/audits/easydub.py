"""Margins that others have published: the layout of the EasyDUB dataset (200 original and 2,000 retrained models)."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from imu_ray.audits.margins import Margins, Matrix
from imu_ray.errors import CheckpointError

FILE = re.compile(r"id_(\d+)_epoch_(\d+)\.npy")
SPLITS = ("retain", "forget", "val")


def read_easydub(
    folder: str | Path,
    forget_set: int,
    models: int | None = None,
    dataset: str = "cifar10",
    architecture: str = "resnet9",
) -> Margins:
    """Margins of published original and retrained models, for one of the forget sets.

    Read are, below ``folder`` (A the architecture, Z the forget set, X the model, E its epoch; N training rows, F of
    them to forget, V validation rows)::

        forget_sets/DATASET/forget_set_Z.npy                       [F] training rows, whole numbers
        margins/DATASET/pretrain/retain/A/id_X_epoch_E.npy         [N] originals, at all training rows
        margins/DATASET/pretrain/forget_Z/A/id_X_epoch_E.npy       [F] in the order of forget_set_Z
        margins/DATASET/pretrain/val/A/id_X_epoch_E.npy            [V]
        margins/DATASET/oracle/forget_Z/retain/A/id_X_epoch_E.npy  [N - F] retrained ones, at the other rows
        margins/DATASET/oracle/forget_Z/forget/A/id_X_epoch_E.npy  [F]
        margins/DATASET/oracle/forget_Z/val/A/id_X_epoch_E.npy     [V]

    Points are called by their rows: ``train-12`` in the sets ``retain`` and ``forget``, ``val-12`` in the set ``test``.
    Arrays are read without pickle. ``Margins.join`` adds the margins of models that you have unlearned.

    Args:
        folder: the dataset, as it is published.
        forget_set: Z.
        models: how many models of each kind, those with the lowest X; None: all.
        dataset: the only one that is published is ``cifar10``.
        architecture: the only one that is published is ``resnet9``.

    Raises:
        CheckpointError: a file or folder is missing or does not hold such an array.

    Source: Rinberg et al., Easy Data Unlearning Bench, arXiv:2602.16400; the dataset easydub/EasyDUB-dataset of the
    Hugging Face hub.
    """
    root = Path(folder)
    forget_F = _array(root / "forget_sets" / dataset / f"forget_set_{forget_set}.npy")
    if forget_F.dtype.kind not in "iu" or len(set(forget_F.tolist())) != len(forget_F):
        raise CheckpointError(f"forget set {forget_set} of {root} is no list of different rows; expected whole numbers")
    margins = root / "margins" / dataset
    oracle = margins / "oracle" / f"forget_{forget_set}"
    names = {"retain": "retain", "forget": f"forget_{forget_set}", "val": "val"}
    places = {
        "original": {split: margins / "pretrain" / names[split] / architecture for split in SPLITS},
        "retrained": {split: oracle / split / architecture for split in SPLITS},
    }
    read = {kind: _read_kind(folders, models) for kind, folders in places.items()}
    (_, original), (_, retrained) = read["original"], read["retrained"]
    rows = original["retain"].shape[1]
    retain_N = np.setdiff1d(np.arange(rows), forget_F)
    if len(retain_N) != rows - len(forget_F):
        raise CheckpointError(
            f"forget set {forget_set} of {root} has rows outside of 0 to {rows - 1}; expected rows of those"
        )
    original["retain"] = original["retain"][:, retain_N]
    wanted = {"retain": len(retain_N), "forget": len(forget_F), "val": original["val"].shape[1]}
    for kind, found in (("original", original), ("retrained", retrained)):
        shapes = {split: found[split].shape[1] for split in SPLITS}
        if shapes != wanted:
            raise CheckpointError(f"margins of {kind} models of {root} have {shapes} rows; expected {wanted}")
    points = [f"train-{row}" for row in (*retain_N, *forget_F)] + [f"val-{row}" for row in range(wanted["val"])]
    sets = np.repeat(["retain", "forget", "test"], list(wanted.values()))
    of = {kind: np.concatenate([found[split] for split in SPLITS], 1) for kind, (_, found) in read.items()}
    return Margins(points, sets, {kind: seeds for kind, (seeds, _) in read.items()}, of)


def _read_kind(folders: Mapping[str, Path], models: int | None) -> tuple[list[int], dict[str, Matrix]]:
    """Numbers of the models, and margins ``[M, rows]`` of each split."""
    files = {split: _files(folder) for split, folder in folders.items()}
    first = next(iter(files.values()))
    for split, found in files.items():
        if found.keys() != first.keys():
            odd = sorted(found.keys() ^ first.keys())
            raise CheckpointError(
                f"{folders[split]} has other models than {folders[SPLITS[0]]}: {odd[:5]}; expected the same"
            )
    chosen = sorted(first)[:models]
    if models is not None and len(chosen) < models:
        raise CheckpointError(f"{folders[SPLITS[0]]} has {len(first)} models; expected {models} or more")
    margins: dict[str, Matrix] = {}
    for split, found in files.items():
        arrays = [_array(found[model]).astype(np.float64) for model in chosen]
        if len({each.shape for each in arrays}) > 1:
            raise CheckpointError(f"arrays in {folders[split]} differ in length; expected one length for all models")
        margins[split] = np.stack(arrays)
    return chosen, margins


def _files(folder: Path) -> dict[int, Path]:
    """File of each model in a folder; refused where there are none, or a model has several."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = FILE.fullmatch(path.name)
        if match:
            if int(match[1]) in found:
                raise CheckpointError(f"model {match[1]} has several epochs in {folder}; expected one; take others out")
            found[int(match[1])] = path
    if not found:
        raise CheckpointError(f"{folder} holds no id_X_epoch_E.npy; expected the dataset as it is published")
    return found


def _array(path: Path) -> npt.NDArray[np.generic]:
    """A vector of numbers."""
    try:
        array: npt.NDArray[np.generic] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); expected an array of numbers") from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iuf":
        raise CheckpointError(f"{path} is no vector of numbers; expected a number for each row")
    return array
