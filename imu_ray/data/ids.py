"""Sample ids that were asked for."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class IdList:
    """Ids as texts, each once, ascending.

    Attributes:
        ids: what was asked for.
        doubles: how many more were given that stand in it already.
    """

    ids: tuple[str, ...]
    doubles: int

    @classmethod
    def of(cls, given: Iterable[object]) -> "IdList":
        """From ids in any order."""
        texts = list(map(str, given))
        unique = tuple(sorted(set(texts)))
        return cls(unique, len(texts) - len(unique))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the ids in ascending order, each with its length before it."""
        return hashlib.sha256("".join(f"{len(one)}:{one}" for one in self.ids).encode()).hexdigest()

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """Those that are whole numbers as a column of numbers would give them, ascending."""
        digits = (one for one in self.ids if one.removeprefix("-").isdecimal() and one.isascii())
        return tuple(sorted(int(one) for one in digits if str(int(one)) == one))
