"""What a streaming statistic is: it reads rows as they come, in bounded memory, and merges with others of its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

CHUNK = 1 << 20  # values handled at a time, so that temporary float64 and index tensors stay small


@dataclass(frozen=True)
class Rows:
    """Which tokens the rows are; the same keys in whatever order, batch or shard they come.

    A long document fills many sequences, so documents and positions are not unique; sequence and position are.

    Attributes:
        documents: int64 [n].
        positions: int64 [n], the column in the sequence, padding counted.
        sequences: int64 [n], the running number of the sequence among all; by default every document is one.
        places: int64 [n], how many real tokens stand before it in the sequence; by default the positions.
        token_ids: int64 [n], which token it is; -1, the default, if the row is none.
        memo: what a statistic has computed from the keys alone; the rows of a batch are the same at many sites.
    """

    documents: Tensor
    positions: Tensor
    sequences: Tensor = None  # type: ignore[assignment]  # the documents
    places: Tensor = None  # type: ignore[assignment]  # the positions
    token_ids: Tensor = None  # type: ignore[assignment]  # -1
    memo: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.sequences is None:
            object.__setattr__(self, "sequences", self.documents)
        if self.places is None:
            object.__setattr__(self, "places", self.positions)
        if self.token_ids is None:
            object.__setattr__(self, "token_ids", self.documents.new_full((1,), -1).expand(len(self.documents)))

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, chosen: Any) -> Rows:
        keys = (self.documents, self.positions, self.sequences, self.places, self.token_ids)
        return Rows(*(key[chosen] for key in keys))


def in_order(first: Tensor, then: Tensor) -> Tensor:
    """Return the order of rows by one key and then by another, those alike in both as they come: int64 [n].

    Args:
        first: int64 [n], such as sequences.
        then: int64 [n], such as positions.
    """
    order = then.argsort(stable=True)
    return order[first[order].argsort(stable=True)]


def chunks(x: Tensor, rows: Rows | None) -> Iterator[tuple[Tensor, Rows | None]]:
    """Yield the rows a part at a time.

    Args:
        x: [n, channels].
        rows: which tokens they are.
    """
    size = max(1, CHUNK // max(1, x.shape[1]))
    for start in range(0, len(x), size):
        chosen = slice(start, start + size)
        yield x[chosen], None if rows is None else rows[chosen]


class Statistic(ABC):
    """A streaming, mergeable summary of the activations at a site.

    Constructor arguments are its settings, kept as attributes of the same name; its state starts empty. A subclass
    names its settings, makes its state (`_zeros`), reads rows into it (`_update`) and adds another's (`_merge`).
    """

    _settings: ClassVar[tuple[str, ...]] = ()
    _in_chunks: ClassVar[bool] = True  # whether `_update` makes copies as large as the rows, which are then cut
    count: int = 0  # rows seen
    channels: int | None = None  # known from the first rows on
    _device: torch.device  # of the state

    def update(self, x: Tensor, rows: Rows | None = None) -> None:
        """Read rows.

        Args:
            x: [n, channels], any float dtype.
            rows: their keys, needed by those that say which rows they keep.

        Raises:
            ValueError: x is not a float matrix, or its channels do not match earlier rows or the settings.
        """
        self.begin(x, rows)
        x = x.detach()
        for part, keys in chunks(x, rows) if self._in_chunks or not len(x) else [(x, rows)]:
            self._update(part.to(self._device), keys)
            self.count += len(part)

    def begin(self, x: Tensor, rows: Rows | None = None) -> None:
        """Make the state if there is none yet; raises as `update` does.

        Args:
            x: [n, channels].
            rows: their keys.
        """
        if x.dim() != 2 or not x.is_floating_point():
            raise ValueError(f"x: {x.dtype} of shape {list(x.shape)} was given; give float rows [n, channels].")
        if rows is not None and len(rows) != len(x):
            raise ValueError(f"rows: {len(rows)} keys were given for {len(x)} rows; give one per row.")
        if self.channels is None:
            self._start(x.shape[1], x.device)
        elif self.channels != x.shape[1]:
            raise ValueError(f"x: {x.shape[1]} channels were given, earlier rows had {self.channels}.")

    def merge(self, other: Self) -> Self:
        """Add what another statistic has seen.

        Args:
            other: of the same kind and settings.

        Returns:
            Itself.

        Raises:
            TypeError: it is of another kind.
            ValueError: it has other settings or another number of channels.
        """
        if type(other) is not type(self):
            raise TypeError(f"merge: {type(other).__name__} was given, give another {type(self).__name__}.")
        if not self.matches(other):
            raise ValueError(f"merge: {other!r} has other settings than {self!r}; merge statistics with equal ones.")
        if other.channels is None:
            return self
        if self.channels is None:
            return self.load_state(other.state())
        if self.channels != other.channels:
            raise ValueError(f"merge: {other.channels} channels were given, this one has {self.channels}.")
        self._merge(other)
        self.count += other.count
        return self

    @property
    def kernel_name(self) -> str | None:
        """The keyword of `kernels/summaries.py: summarise` that stands for this one, or None."""
        return None

    def kernel_state(self, dtype: torch.dtype) -> Any:
        """Return what that keyword is given: tensors of the state, which the kernel adds to.

        Args:
            dtype: of the rows.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {name: getattr(self, name) for name in self._settings}

    def matches(self, other: Statistic) -> bool:
        """Say whether the two are of one kind and have equal settings."""
        if type(other) is not type(self):
            return False
        mine, theirs = self.settings(), other.settings()
        return all(_equal(mine[name], theirs[name]) for name in mine)

    def empty(self) -> Self:
        """Return a fresh one with the same settings."""
        return type(self)(**self.settings())

    def memory(self, channels: int) -> int:
        """Return the bytes that the state takes for so many channels."""
        return sum(tensor.nbytes for tensor in self._zeros(channels, torch.device("meta")).values())

    def state(self) -> dict[str, Tensor]:
        """Return copies of all that was accumulated, and `count`; without the settings."""
        tensors = {} if self.channels is None else {name: getattr(self, f"_{name}").clone() for name in self._fields}
        return {"count": torch.tensor(self.count), "channels": torch.tensor(self.channels or 0), **tensors}

    def load_state(self, state: dict[str, Tensor]) -> Self:
        """Take over what `state()` gave.

        Args:
            state: of a statistic of this kind.

        Returns:
            Itself.

        Raises:
            ValueError: it is of another kind of statistic.
        """
        fields = [name for name in state if name not in ("count", "channels")]
        if fields and set(fields) != set(self._fields):
            needed = ", ".join(self._fields)
            raise ValueError(f"state: it holds {', '.join(fields)}; {type(self).__name__} needs {needed}.")
        self.count = int(state["count"])
        self.channels = int(state["channels"]) if fields else None
        for name in fields:
            setattr(self, f"_{name}", state[name].clone())
            self._device = state[name].device
        return self

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={_short(v)}" for k, v in self.settings().items() if v is not None)
        return f"<{type(self).__name__}({settings}): {self.count} rows x {self.channels or 0} channels>"

    @property
    def _fields(self) -> tuple[str, ...]:
        return tuple(self._zeros(0, torch.device("meta")))

    def _start(self, channels: int, device: torch.device) -> None:
        self.channels = channels
        self._device = torch.device("cpu") if device.type == "mps" else device  # Apple's GPUs have no float64
        for name, tensor in self._zeros(channels, self._device).items():
            setattr(self, f"_{name}", tensor)

    def _needs_rows(self) -> None:
        if self.count == 0:
            raise ValueError(f"{type(self).__name__}: it has seen no rows yet; record activations first.")

    @abstractmethod
    def _zeros(self, channels: int, device: torch.device) -> dict[str, Tensor]:
        """The empty state: name -> tensor; each becomes the attribute _name."""

    @abstractmethod
    def _update(self, x: Tensor, rows: Rows | None) -> None:
        """Add rows [n, channels], n >= 1; `count` still is that of the rows before."""

    @abstractmethod
    def _merge(self, other: Self) -> None:
        """Add the state of another one with equal settings and channels."""


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b.to(a.device)))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)


def _short(value: Any) -> str:
    return f"tensor{list(value.shape)}" if isinstance(value, Tensor) else getattr(value, "__qualname__", repr(value))
