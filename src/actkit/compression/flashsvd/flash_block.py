"""FlashBlock: runs a block in tiles, in place of its attention and its MLP (FlashSVD, 2025, arXiv:2508.01506).

The block's own code runs, as its library wrote it: of its modules a copy that shares all parameters, in which other
modules stand for the projections and the MLP (`tiles.py`). Attention runs once for each query head, so that rotary
embedding, norms of heads, masks, scaling and the attention function are those of the model, on tiles. In front of an
empty cache the heads' keys and values are gathered for it, which keeps them whole.

The block runs plainly if keys are in the cache already (a single token has nothing to save), if hooks watch one of its
modules (of transformers too, which stay once hidden states or attentions were asked for), and a part of it if a layer
of that part selects, rounds or corrects, or another module stands around it. Outputs are the same then, to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from actkit.compression.flashsvd.tiles import HeadColumns, HeadRows, Outputs, Thin, Turn, by_rows, flashsvd_ffn
from actkit.core.forward.hooks import StopForward
from actkit.core.ground.errors import DataError, UnsupportedModelError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.low_rank_weight import LowRankWeight


@dataclass(frozen=True)
class AttentionPaths:
    """Where attention is in a block.

    Attributes:
        path: of its module.
        query: of a layer inside of it, or of the one that computes all three.
        key: the same; None if one layer computes all.
        value: the same.
        output: of the layer that mixes the heads, inside of it.
        heads: of the queries.
        key_heads: of keys and values.
        size: of a head.
    """

    path: str
    query: str
    key: str | None
    value: str | None
    output: str
    heads: int
    key_heads: int
    size: int

    @property
    def layers(self) -> list[str]:
        """Paths of all its layers in the block."""
        return [f"{self.path}.{each}" for each in (self.query, self.key, self.value, self.output) if each is not None]


@dataclass(frozen=True)
class MlpPaths:
    """Where an MLP is in a block.

    Attributes:
        path: of its module.
        up: of a layer in the block.
        down: the same; it may stand outside of the module.
        act: of the nonlinearity.
        gate: of a layer; None if there is none, or `up` computes it.
        up_rows: first output of `up` that is a unit, and the one of the gate, if one layer computes both.
    """

    path: str
    up: str
    down: str
    act: str
    gate: str | None = None
    up_rows: tuple[int, int] | None = None

    @property
    def layers(self) -> list[str]:
        """Paths of all its layers in the block."""
        return [each for each in (self.up, self.gate, self.down) if each is not None]


class FlashBlock(nn.Module):
    """A block that runs in tiles; without gradients.

    Args:
        inner: the block.
        attention: None to leave it as it is.
        mlp: the same.
        tile: units of the MLP in a tile.
        rows: tokens in a tile of the MLP, and of what stands behind attention.
    """

    wraps: ClassVar[str] = "inner"
    trains: ClassVar[bool] = False
    compiles: ClassVar[bool] = False
    exports: ClassVar[bool] = False

    def __init__(
        self,
        inner: nn.Module,
        attention: AttentionPaths | None,
        mlp: MlpPaths | None,
        tile: int = 128,
        rows: int = 512,
    ) -> None:
        super().__init__()
        self.inner, self.attention, self.mlp, self.tile, self.rows = inner, attention, mlp, tile, rows

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models read attributes of their blocks, such as the type of attention
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        if torch.is_grad_enabled() and any(each.requires_grad for each in (*tensors, *self.inner.parameters())):
            raise UnsupportedModelError(
                "model: its blocks run in tiles (flashsvd), which keep nothing for a backward pass; call it under "
                "torch.no_grad(), and undo flashsvd, or leave it out, to train."
            )
        for mask in (*args[1:], kwargs.get("attention_mask")):
            if isinstance(mask, Tensor) and mask.dim() == 4:
                _refuse_empty(mask)
        stand_ins = {} if self._watched() else dict(self._stand_ins(kwargs))
        return _with(self.inner, stand_ins)(*args, **kwargs)

    def _watched(self) -> bool:
        inside = (module for module in self.inner.modules() if module is not self.inner)
        return any(module._forward_hooks or module._forward_pre_hooks for module in inside)

    def _stand_ins(self, kwargs: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
        attention, mlp = self.attention, self.mlp
        if attention is not None and self._plain(attention.layers) and not self._holds_keys(kwargs):
            yield attention.path, _Attention(self.inner.get_submodule(attention.path), attention, self.rows)
        if mlp is None or not self._plain(mlp.layers):
            return
        made = _Mlp(self.inner, mlp, self.tile, self.rows)
        around, _, name = mlp.down.rpartition(".")
        if _inside(mlp.down, mlp.path):
            yield mlp.path, made
            return
        yield mlp.path, nn.Identity()  # the block calls the layer by itself
        if not _inside(mlp.act, mlp.path):
            yield mlp.act, nn.Identity()
        if around:  # and what holds it does more with its outputs
            yield around, _ByRows(_with(self.inner.get_submodule(around), {name: made}), self.rows)
        else:
            yield mlp.down, made

    def _plain(self, layers: list[str]) -> bool:
        """Whether layers are where they were, and do no more than multiply."""
        try:
            found = [self.inner.get_submodule(path) for path in layers]
        except AttributeError:  # something else stands there now, or around it
            return False
        return not any(isinstance(layer, ActLinear) and layer.other_slots for layer in found)

    def _holds_keys(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a cache holds keys of earlier tokens."""
        assert self.attention is not None
        modules = self.inner.get_submodule(self.attention.path).modules()
        layer = next((module.layer_idx for module in modules if hasattr(module, "layer_idx")), 0)
        caches = [value for value in kwargs.values() if hasattr(value, "get_seq_length")]
        return any(int(cache.get_seq_length(layer)) > 0 for cache in caches)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments."""
        parts = {"attention": self.attention, "mlp": self.mlp}
        return {name: None if part is None else asdict(part) for name, part in parts.items()} | {
            "tile": self.tile,
            "rows": self.rows,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> FlashBlock:
        """A block around the one that stands there."""
        assert original is not None
        attention, mlp = spec["attention"], spec["mlp"]
        if mlp is not None and mlp["up_rows"] is not None:
            mlp = {**mlp, "up_rows": tuple(mlp["up_rows"])}
        return cls(
            original,
            None if attention is None else AttentionPaths(**attention),
            None if mlp is None else MlpPaths(**mlp),
            spec["tile"],
            spec["rows"],
        )

    def extra_repr(self) -> str:
        parts = [name for name in ("attention", "mlp") if getattr(self, name) is not None]
        return f"in tiles: {', '.join(parts)}"


class _Attention(nn.Module):
    """Attention, one query head after the other."""

    def __init__(self, inner: nn.Module, paths: AttentionPaths, rows: int) -> None:
        super().__init__()
        self.inner, self.paths, self.rows = inner, paths, rows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        paths, turn = self.paths, Turn(self.paths.heads, self.paths.key_heads)
        fused = paths.key is None
        stand_ins: dict[str, nn.Module] = {}
        for name in (paths.query, paths.key, paths.value):
            if name is not None:
                parts = ("query", "key", "key") if fused else ("query",) if name == paths.query else ("key",)
                stand_ins[name] = HeadRows(Thin(self.inner.get_submodule(name)), turn, paths.size, parts)  # type: ignore[arg-type]
        output: Any = self.inner.get_submodule(paths.output)
        thin, (around, _, name) = Thin(output, True), paths.output.rpartition(".")
        behind = None
        if around:
            stand_in = Outputs(thin, output.weight.dtype)
            behind = _with(self.inner.get_submodule(around), {name: stand_in})
        stand_ins[around or name] = HeadColumns(thin, turn, paths.size, self.rows, behind)
        narrow = _with(self.inner, stand_ins)
        own: Any = narrow.get_submodule(paths.query.rpartition(".")[0])
        ones = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_key_value_groups")
        for name, value in {**dict.fromkeys(ones, 1), "split_size": paths.size}.items():  # the last one is GPT-2's
            if hasattr(own, name):  # the code of some goes by them
                vars(own)[name] = value
        caches = {name: _Gathering(value, turn) for name, value in kwargs.items() if hasattr(value, "get_seq_length")}
        result: Any = None
        for number in range(turn.heads):
            turn.number = number
            try:
                result = narrow(*args, **kwargs | caches)
            except StopForward:
                continue
        for cache in caches.values():
            cache.hand_over()
        return (result[0], None, *result[2:]) if isinstance(result, tuple) else result


class _Mlp(nn.Module):
    """An MLP, some units after the others."""

    def __init__(self, block: nn.Module, paths: MlpPaths, tile: int, rows: int) -> None:
        super().__init__()
        self.block, self.paths, self.tile, self.rows = block, paths, tile, rows

    def forward(self, x: Tensor) -> Tensor:
        paths, block = self.paths, self.block
        up, down = Thin(block.get_submodule(paths.up)), Thin(block.get_submodule(paths.down), True)
        gate = None if paths.gate is None else Thin(block.get_submodule(paths.gate))
        up_rows = gate_rows = None
        if paths.up_rows is not None:
            assert down.right is not None
            width = down.right.shape[1]
            up_rows, gate_rows = (range(start, start + width) for start in paths.up_rows)
            gate = up
        act: Any = block.get_submodule(paths.act)
        settings: dict[str, Any] = {"gate": gate, "up_rows": up_rows, "gate_rows": gate_rows, "block": self.tile}
        return by_rows(lambda some: flashsvd_ffn(some, up, down, act, **settings), self.rows, x)


class _ByRows(nn.Module):
    """A module that is applied token by token, to some of them after the others."""

    def __init__(self, inner: nn.Module, rows: int) -> None:
        super().__init__()
        self.inner, self.rows = inner, rows

    def forward(self, *given: Tensor) -> Tensor:
        return by_rows(self.inner, self.rows, *given)


class _Gathering:
    """An empty cache that gets the keys and values of all heads at the end, and gives each head its own back."""

    def __init__(self, cache: Any, turn: Turn) -> None:
        self._cache, self._turn, self._given = (
            cache,
            turn,
            list[tuple[Tensor, Tensor, tuple[Any, ...], dict[str, Any]]](),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep a head's keys and values, and return them."""
        if len(self._given) == self._turn.key:  # not again for each query head
            self._given.append((keys, values, args, kwargs))
        return keys, values

    def hand_over(self) -> None:
        """Give the cache what came."""
        if self._given:
            keys, values = (torch.cat([each[i] for each in self._given], 1) for i in (0, 1))  # type: ignore[misc]
            self._cache.update(keys, values, *self._given[0][2], **self._given[0][3])


def part_in_tiles(block: FlashBlock, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what computes attention or the MLP of a block, plainly and in tiles, called as the part is.

    Args:
        block: whose part runs in tiles.
        name: 'attention' or 'mlp'.
    """
    if name == "attention":
        assert block.attention is not None
        attention = block.inner.get_submodule(block.attention.path)
        return attention, _Attention(attention, block.attention, block.rows)
    assert block.mlp is not None
    mlp, tiled = block.inner.get_submodule(block.mlp.path), _Mlp(block.inner, block.mlp, block.tile, block.rows)
    if _inside(block.mlp.down, block.mlp.path):
        return mlp, tiled
    act, down = block.inner.get_submodule(block.mlp.act), block.inner.get_submodule(block.mlp.down)
    if _inside(block.mlp.act, block.mlp.path):
        return lambda x: down(mlp(x)), tiled
    return lambda x: down(act(mlp(x))), tiled


def factored(module: nn.Module) -> bool:
    """Whether the weight of a layer is kept as two factors."""
    return isinstance(module, ActLinear) and isinstance(module.storage, LowRankWeight)


def _inside(path: str, module: str) -> bool:
    return f"{path}.".startswith(f"{module}.") and path != module


def _with(module: nn.Module, stand_ins: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a module that shares all that it holds, with others at some paths inside of it."""
    if not stand_ins:
        return module
    made = copy.copy(module)
    made._modules = dict(module._modules)
    inside: dict[str, dict[str, nn.Module]] = {}
    for path, stand_in in stand_ins.items():
        name, _, rest = path.partition(".")
        if rest:
            inside.setdefault(name, {})[rest] = stand_in
        else:
            made._modules[name] = stand_in
    for name, others in inside.items():
        child = module._modules[name]
        assert child is not None
        made._modules[name] = _with(child, others)
    return made


def _refuse_empty(mask: Tensor) -> None:
    """Raise DataError for a text of which no query may see a key."""
    rows = mask.flatten(1)
    seen = rows.any(1) if mask.dtype == torch.bool else rows.amax(1) > torch.finfo(mask.dtype).min / 2
    if not seen.all():
        row = int((~seen).nonzero()[0])
        raise DataError(
            f"attention mask: text {row} of the batch has no key that may be seen; give texts of one token at least, "
            f"or leave it out."
        )
