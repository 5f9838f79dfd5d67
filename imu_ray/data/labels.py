"""Labels as they are stored: a class, probabilities of the classes, or which of several labels hold."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imu_ray.config import ForgetSetConfig
from imu_ray.errors import ForgetSetError

SUM_TOLERANCE = 1e-4  # of probabilities that were stored in float32, or written with a few digits
Label = int | tuple[float, ...]
Where = str | Callable[[], str]  # which row of what, or what tells it when it is asked for
Labels = npt.NDArray[Any]  # int64 ``[B]``, or float64 ``[B, C]``
EXPECTED = {
    "soft": "a list of probabilities of the classes that sum to 1",
    "multi_label": "a list of zeros and ones, one for each class",
}


def label_of(value: Any, config: ForgetSetConfig, where: Where) -> Label:
    """A label by ``forget_set.target``: a class index, or C numbers that were checked.

    Raises:
        ForgetSetError: it is none; ``where`` says which row of what.
    """
    return class_of(value, config, where) if config.target == "class" else _numbers_of(value, config, where)


def class_of(value: Any, config: ForgetSetConfig, where: Where) -> int:
    """A class index: a whole number, its digits, or a name listed in ``forget_set.classes``."""
    # The text of a label may be anything when the wrong column is named, so it is not shown.
    if isinstance(value, str) and config.classes is not None:
        if value not in config.classes:
            listed = ", ".join(config.classes)
            raise _no_label(where, "a label that is no class", f"one of forget_set.classes, {listed}")
        return config.classes.index(value)
    if isinstance(value, str) and value.isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        shown = repr(value) if isinstance(value, int | float | None) else f"a {type(value).__name__}"
        raise _no_label(where, f"label {shown}", "a whole number of 64 bits, or a name listed in forget_set.classes")
    return value


def _numbers_of(value: Any, config: ForgetSetConfig, where: Where) -> tuple[float, ...]:
    values = value.tolist() if hasattr(value, "tolist") else value
    kinds = (int, float) if config.target == "soft" else (int, float, bool)
    is_list = isinstance(values, list | tuple)
    if not is_list or not values or not all(type(each) in kinds and math.isfinite(each) for each in values):
        listed = "a list with something else than numbers" if values else "an empty list"
        shown = listed if is_list else f"a {type(values).__name__}"
        raise ForgetSetError(
            f"{told(where)} has label {shown}, with forget_set.target {config.target!r}; expected "
            f"{EXPECTED[config.target]}; mend it, name the right column in "
            "forget_set.label_column, or set another target"
        )
    numbers = tuple(map(float, values))
    reason = None
    if config.target == "multi_label":
        wrong = [each for each in numbers if each not in (0.0, 1.0)]
        reason = f"holds {wrong[0]:g}" if wrong else None
    elif min(numbers) < 0:
        reason = f"holds {min(numbers):g}"
    elif abs(sum(numbers) - 1) > SUM_TOLERANCE:
        reason = f"sums to {sum(numbers):.6g}"
    if reason:
        remedy = "divide it by its sum, or set another forget_set.target" if "sums" in reason else "mend it"
        raise ForgetSetError(f"{told(where)} has a label that {reason}; expected {EXPECTED[config.target]}; {remedy}")
    return numbers


def labels_of(column: pa.ChunkedArray, config: ForgetSetConfig, name_of: Callable[[int], str]) -> Labels:
    """The labels of a column: ``[B]`` int64, or ``[B, C]`` float64. ``name_of`` says which row has which place.

    Raises:
        ForgetSetError: a row has none; the message names it.
    """
    found = None if config.target == "class" else _matrix_of(column)
    if found is not None and _usable(found, config.target).all():
        return found
    rows = enumerate(column.to_pylist())
    return array_of([label_of(value, config, functools.partial(name_of, row)) for row, value in rows], name_of)


def _usable(labels_BC: npt.NDArray[np.float64], target: str) -> npt.NDArray[np.bool_]:
    """Which rows ``label_of`` would take, ``[B]``."""
    if target == "multi_label":
        found: npt.NDArray[np.bool_] = ((labels_BC == 0) | (labels_BC == 1)).all(1)
    else:
        found = (labels_BC >= 0).all(1) & (np.abs(labels_BC.sum(1) - 1) <= SUM_TOLERANCE)
    return found


def check_labels(labels: Labels, num_classes: int, config: ForgetSetConfig, name_of: Callable[[int], str]) -> None:
    """Refuse labels that are not of ``forget_set.target``, whatever source they come from; the first row is named."""
    is_class, indices = config.target == "class", labels.dtype.kind in "iu"
    if labels.ndim != (1 if is_class else 2) or is_class != indices:
        raise ForgetSetError(
            f"the labels are {labels.dtype} of shape {list(labels.shape)}, with forget_set.target {config.target!r}; "
            f"expected {EXPECTED.get(config.target, 'a class index')} for each row; set the target that the rows have"
        )
    if not num_classes:  # before the model is known
        return
    if is_class:
        wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))[:1]
    else:
        wrong = np.concatenate([np.flatnonzero(~_usable(labels, config.target))[:1], np.arange(len(labels))[:1]])
    for row in map(int, wrong):
        name = name_of(row)
        check_label(label_of(labels[row].tolist(), config, name), num_classes, name)


def holds_lists(kind: pa.DataType) -> bool:
    """Whether a column has a list in each row, of one length or of any."""
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_one(kind) for is_one in kinds)


def _matrix_of(column: pa.ChunkedArray) -> npt.NDArray[np.float64] | None:
    """Lists of equally many numbers as ``[B, C]``; None of anything else, which is looked at row by row."""
    kind, lists = column.type, column.combine_chunks()
    if not holds_lists(kind):
        return None
    inner, lengths = kind.value_type, pc.unique(pc.list_value_length(lists)).to_pylist()
    if len(lengths) != 1 or not lengths[0]:  # of a missing list it is null
        return None
    values = lists.flatten()
    if values.null_count or not (
        pa.types.is_floating(inner) or pa.types.is_integer(inner) or pa.types.is_boolean(inner)
    ):
        return None
    found: npt.NDArray[np.float64] = values.to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, lengths[0])
    return found


def array_of(labels: Sequence[Label], name_of: Callable[[int], str]) -> Labels:
    """Labels as an array: classes ``[B]`` int64, or ``[B, C]`` float64.

    Raises:
        ForgetSetError: not all have the same length; ``name_of`` says which row has which place.
    """
    if not labels or isinstance(labels[0], int):
        return np.array(labels, np.int64)
    lengths = [len(each) for each in labels if not isinstance(each, int)]
    other = next((row for row, length in enumerate(lengths) if length != lengths[0]), None)
    if other is not None:
        raise _no_label(
            functools.partial(name_of, other),
            f"a label of {lengths[other]} numbers",
            f"{lengths[0]}, as the rows before it have",
        )
    return np.array(labels, np.float64)


def check_label(label: Label, num_classes: int, where: Where) -> None:
    """``ForgetSetError`` where a label is outside the model's classes, or has not a number for each."""
    if isinstance(label, int):
        if not 0 <= label < num_classes:
            raise _no_label(where, f"label {label}", f"0 to {num_classes - 1}, the outputs of the model")
    elif len(label) != num_classes:
        expected = f"{num_classes}, one for each output of the model"
        raise _no_label(where, f"a label of {len(label)} numbers", expected)


def told(where: Where) -> str:
    """Which row of what."""
    return where if isinstance(where, str) else where()


def _no_label(where: Where, has: str, expected: str) -> ForgetSetError:
    return ForgetSetError(
        f"{told(where)} has {has}; expected {expected}; mend it, take the row out, or name the right column in "
        "forget_set.label_column"
    )
