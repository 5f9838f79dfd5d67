"""The sets of a run: the forget set, and evaluation sets, each with settings of its own where it names some."""

from collections.abc import Callable, Mapping
from typing import Any

from imu_ray.config import ForgetSetConfig
from imu_ray.data.opening import open_source
from imu_ray.data.selection import select_rows
from imu_ray.data.source import Fields, Source
from imu_ray.errors import ConfigError

# What says which rows to forget: not inherited.
WHICH_ROWS = {"ids": None, "missing_ids": "error", "where": None, "size": None, "size_seed": 0}
# What an evaluation set cannot have for itself.
SHARED = ("size", "size_seed", "tokenizer", "max_length", "target", "class_weights")


def open_forget_set(given: Any, config: ForgetSetConfig, fields: Fields) -> Source:
    """The rows that ``ids`` or ``where`` name of the forget set, or all of it; ``forget_set.size`` is not looked at.

    Raises:
        ForgetSetError: they cannot be read, or there is none.
    """
    return select_rows(open_source(given, config, fields=fields), config)


def open_other_set(
    name: str, given: Any, config: ForgetSetConfig, fields: Callable[[ForgetSetConfig], Fields]
) -> Source:
    """An evaluation set: what it is read from, or a mapping with that under ``path`` and settings of its own.

    Args:
        name: of the set.
        given: a path, table or whatever else a set may be, or such a mapping.
        config: of the forget set, which holds where the set names no other.
        fields: what the task reads under some settings.

    Raises:
        ConfigError: the set names a setting that is unknown or out of range, or that all sets share.
        ForgetSetError: the set cannot be read.
    """
    settings = config.with_overrides(WHICH_ROWS)
    has_own = isinstance(given, Mapping)
    if has_own:
        given, settings = _own(name, given, settings)
    source = open_source(given, settings, f"evaluation set {name!r}", fields(settings))
    source.row_settings = settings if has_own else source.row_settings
    return select_rows(source, settings)


def own_settings(source: Source, config: ForgetSetConfig) -> dict[str, Any]:
    """Settings of an evaluation set that are not those of the forget set; of listed ids their number."""
    base = config.with_overrides(WHICH_ROWS).to_dict()
    found = (source.row_settings or config).described()
    return {key: value for key, value in found.items() if value != base[key]}


def _own(name: str, given: Mapping[str, Any], settings: ForgetSetConfig) -> tuple[Any, ForgetSetConfig]:
    """What the set is read from, and its settings."""
    if "path" not in given:
        raise ConfigError(
            f"evaluation set {name!r} is a mapping with {', '.join(map(str, given)) or 'nothing'}; expected its path "
            "(or table, Dataset, ...) under path, and settings of forget_set that are its own beside it"
        )
    own = {key: value for key, value in given.items() if key != "path"}
    if shared := sorted(set(SHARED).intersection(own)):
        raise ConfigError(
            f"evaluation.{name} sets {', '.join(shared)}, which an evaluation set cannot have for itself; expected it "
            "under forget_set alone; name rows of the set by ids or where"
        )
    try:
        return given["path"], settings.with_overrides(own)
    except ConfigError as error:
        raise ConfigError(f"evaluation.{name}: {error}") from None
