"""Influence that another engine has computed: bergson, kronfluence, or an earlier run, as one score of each sample.

Their files hold no sample ids: scores are joined to the forget set by the order of its rows. Shapes: N samples, Q
queries.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file

from imu_ray.errors import CheckpointError
from imu_ray.influence.intensity import Column

IDS = "sample_ids.txt"
PAIRWISE, OWN = "pairwise_scores", "self_scores"
PARTITION = re.compile(r"_data_partition(\d+)_module_partition(\d+)$")


def read_scores(location: str) -> tuple[Column, pa.ChunkedArray | None]:
    """Influence ``[N]`` in this library's sign, and the samples' ids where they are known.

    Args:
        location: what the scores are in.

            - a folder of bergson's, ``scores.bin`` with ``info.json`` and ``config.yaml``: the mean over its Q scores
              of a sample, its sign turned unless ``higher_is_better`` is false;
            - a folder or file of kronfluence's, ``pairwise_scores.safetensors`` ``[Q, N]``, whole or in partitions:
              minus the mean over the queries, which should be the forget set itself; or ``self_scores.safetensors``
              ``[N]``: minus the score. Scores of single modules add up;
            - Parquet with ``sample_id`` and ``influence``, as ``score`` writes it.

            Beside either of the first two, ``sample_ids.txt`` may name the samples, one in a line.

    Raises:
        CheckpointError: it is none of these, or a score is missing or not finite.

    Source: https://github.com/EleutherAI/bergson (``score/score_writer.py``), https://github.com/pomonam/kronfluence
    (``score/``). Positive scores are theirs where training on the sample lowered the query's loss; ours are negative.
    """
    path = Path(location)
    folder = path if path.is_dir() else path.parent
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path, columns=["sample_id", "influence"])
            scores, ids = table["influence"].to_numpy(), table["sample_id"]
        else:
            scores = _bergson(path) if (path / "scores.bin").is_file() else _kronfluence(path)
            named = (folder / IDS).read_text().splitlines() if (folder / IDS).is_file() else None
            ids = None if named is None else pa.chunked_array([pa.array(named, pa.string())])
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, yaml.YAMLError) as error:  # pyarrow's among them
        raise CheckpointError(
            f"influence.scores {location} cannot be read ({type(error).__name__}: {error}); expected a folder of "
            "bergson's or kronfluence's scores, or Parquet with sample_id and influence"
        ) from None
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise CheckpointError(
            f"influence.scores {location} has {np.count_nonzero(~np.isfinite(scores))} scores that are not finite in "
            f"shape {list(scores.shape)}; expected a number for each sample"
        )
    return scores, ids


def _bergson(folder: Path) -> Column:
    info = json.loads((folder / "info.json").read_text())
    layout: Any = np.dtype(info["dtype"])  # names, formats, offsets, itemsize
    count, items = int(info["num_scores"]), int(info["num_items"])
    rows = np.memmap(folder / "scores.bin", layout, "r", shape=(items,))
    missing = sum(np.count_nonzero(~rows[f"written_{place}"]) for place in range(count))
    if missing:
        raise CheckpointError(
            f"{folder} lacks {missing} of {count * items} scores (their flag written is not set); expected a run of "
            "bergson that came to its end"
        )
    scores: Column = np.mean([rows[f"score_{place}"].astype(np.float64) for place in range(count)], axis=0)
    return -scores if _higher_is_better(folder) else scores


def _higher_is_better(folder: Path) -> bool:
    """What ``config.yaml`` says of the direction, wherever in it; true where it says nothing."""
    path = folder / "config.yaml"
    if not path.is_file():
        return True
    waiting, found = [yaml.safe_load(path.read_text())], True
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            found = bool(part.get("higher_is_better", found))
            waiting += part.values()
    return found


def _kronfluence(path: Path) -> Column:
    files = [path] if path.is_file() else sorted(path.glob("*_scores*.safetensors"))
    kinds = {kind for file in files for kind in (PAIRWISE, OWN) if file.name.startswith(kind)}
    if len(kinds) != 1:
        raise CheckpointError(
            f"{path} holds {' and '.join(sorted(kinds)) or 'no scores'}; expected scores.bin of bergson, or one of "
            f"{PAIRWISE}.safetensors and {OWN}.safetensors of kronfluence"
        )
    own = kinds == {OWN}
    parts: dict[int, Column] = {}
    for file in files:
        found = PARTITION.search(file.stem)
        if found is None and len(files) > 1:
            raise CheckpointError(f"{path} holds whole scores and partitions of them; expected either")
        place = int(found[1]) if found else 0
        total = sum(each.astype(np.float64) for each in load_file(file).values())
        column = -np.asarray(total) if own else -np.asarray(total).mean(0)
        parts[place] = parts[place] + column if place in parts else column
    if sorted(parts) != list(range(len(parts))):
        raise CheckpointError(f"{path} holds data partitions {sorted(parts)}; expected every one from 0 on")
    return np.concatenate([parts[place] for place in range(len(parts))])


def given_influence(location: str, rows: int, holds: Callable[[pa.ChunkedArray], bool], name: str) -> Column:
    """The scores of a location, checked to be of the forget set as far as it says whose they are.

    Args:
        location: as in ``read_scores``.
        rows: samples of the forget set.
        holds: whether ids are those of the forget set, in order.
        name: of the forget set.

    Raises:
        CheckpointError: there are more or fewer scores than samples, or they are of others.
    """
    scores, ids = read_scores(location)
    if len(scores) != rows or (ids is not None and not holds(ids.cast(pa.string()))):
        what = f"{len(scores)} scores" if len(scores) != rows else "scores of other samples, or in another order"
        raise CheckpointError(
            f"influence.scores {location} holds {what} for the {rows} samples of {name}; expected one score for each, "
            "in their order (rows that were left out have none)"
        )
    return scores
