"""To which blocks and layers of a model a transform is limited: `only` of any transform that goes block by block.

    - gptq: {bits: 4, only: {down: "1-28", up: "1-28"}}
    - gptq: {bits: 8, only: {down: "0, 29", up: "0, 29", query: all}}

Two transforms whose scopes share no layer do not conflict, so a model can have one setting here and another there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from actkit.core.model.anatomy import Block
from actkit.core.model.parts import LinearRole

WHOLE = "block"  # the key for whole blocks
EVERY = "all"  # the value for every block
ROLES = get_args(LinearRole)
RANGES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass(frozen=True)
class Scope:
    """Blocks, and in them roles of linear layers.

    Attributes:
        blocks: by role ('block' for whole blocks) the indices of the blocks; None for every block.
    """

    blocks: tuple[tuple[str, frozenset[int] | None], ...]

    @classmethod
    def parse(cls, given: Any) -> Scope:
        """Read `{down: "1-28, 30", query: all}` or `{block: "0-3"}`.

        Args:
            given: a mapping from roles to blocks; blocks are ranges as a text, a list of indices, or 'all'.

        Raises:
            ValueError: it is none, or names an unknown role.
        """
        if isinstance(given, Scope):
            return given
        if not isinstance(given, dict) or not given:
            raise ValueError(
                f'{given!r} was given; give roles of layers and their blocks, such as {{down: "1-28", query: all}}, '
                f'or {{block: "0-3"}} for whole blocks'
            )
        unknown = [str(role) for role in given if role not in (WHOLE, *ROLES)]
        if unknown:
            raise ValueError(f"{unknown[0]!r} was given; allowed are {WHOLE} (whole blocks) and {', '.join(ROLES)}")
        if WHOLE in given and len(given) > 1:
            raise ValueError(f"{WHOLE!r} (whole blocks) was given beside {sorted(set(given) - {WHOLE})}; give one")
        return cls(tuple((role, _indices(blocks)) for role, blocks in given.items()))

    @classmethod
    def of(cls, places: Iterable[tuple[str, int]]) -> Scope:
        """Make the scope of single places.

        Args:
            places: role and block of each.
        """
        found: dict[str, set[int]] = {}
        for role, index in places:
            found.setdefault(role, set()).add(index)
        return cls(tuple((role, frozenset(indices)) for role, indices in found.items()))

    @property
    def whole_blocks(self) -> bool:
        """Whether it names no roles."""
        return self.blocks[0][0] == WHOLE

    def within(self, block: Block) -> Block | None:
        """Return a block as far as it is meant; None if nothing of it is.

        Args:
            block: of the model.
        """
        roles = {role for role, indices in self.blocks if indices is None or block.index in indices}
        if WHOLE in roles:
            return block
        paths = frozenset(linear.path for linear in block.linears() if linear.role in roles)
        return block.limited(paths) if paths else None

    def apart(self, other: Scope) -> bool:
        """Say whether no layer can be in both."""
        for role, indices in self.blocks:
            for other_role, other_indices in other.blocks:
                if WHOLE not in (role, other_role) and role != other_role:
                    continue
                if indices is None or other_indices is None or indices & other_indices:
                    return False
        return True

    def dump(self) -> dict[str, str]:
        """Return the form that `parse` reads."""
        return {role: EVERY if indices is None else _ranges(indices) for role, indices in self.blocks}

    def __str__(self) -> str:
        return "; ".join(f"{role} {blocks}" for role, blocks in self.dump().items())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(cls.dump)
        )


def _indices(given: Any) -> frozenset[int] | None:
    """'0-3, 28', a list, or an index as indices; 'all' as None."""
    if given == EVERY:
        return None
    if isinstance(given, list | tuple | set | frozenset | range):
        if given and all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in given):
            return frozenset(given)
    elif isinstance(given, int | str) and not isinstance(given, bool):
        text = str(given).replace(" ", "")
        if RANGES.fullmatch(text):
            ends = [part.split("-") for part in text.split(",")]
            found = frozenset(index for part in ends for index in range(int(part[0]), int(part[-1]) + 1))
            if found and all(int(part[0]) <= int(part[-1]) for part in ends):
                return found
    raise ValueError(f"{given!r} was given for the blocks; give indices from 0 on as '0-3, 28' or a list, or 'all'")


def _ranges(indices: Iterable[int]) -> str:
    """The shortest text of some indices: '0-3, 28'."""
    parts: list[list[int]] = []
    for index in sorted(indices):
        if parts and parts[-1][1] == index - 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
