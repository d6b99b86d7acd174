"""What attention and MLPs hold at once, run plainly and in tiles: by a meter and by count (FlashSVD, 2508.01506).

    MLP, numbers per token, d_ff units, ranks r_up and r_down:
        plain   max(r_up + d_ff, 2 d_ff, d_ff + r_down)     gated: 3 d_ff
        tiled   d + (r_up + r_down + 2 tile) rows / tokens, or the last rows' outputs beside it     gated: 3 tile
    attention, q queries and k keys wide:
        plain   q + 2 k + max(q + tokens of a row if some are masked, of rotary embedding 3 q, or q + 3 k)
                with queries in groups 2 q more, as keys and values are repeated; or q + 3 k + r_v, as values are made
        tiled   r_out + the same of one head;  at the end r_out + d, and what stands behind, for some rows

Inputs are left out, as whoever calls holds them, and so are weights. Both ways use the model's attention function; the
count is of torch's fused one, which makes floats of a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from actkit.compression.flashsvd.flash_block import AttentionPaths, FlashBlock, MlpPaths, part_in_tiles
from actkit.compression.flashsvd.tiles import Thin
from actkit.core.forward.batch import forward
from actkit.core.forward.hooks import evaluating, hooked
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.ground.figures import plotly
from actkit.core.ground.memory import format_bytes
from actkit.core.measure.live_tensors import live_tensors

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
    from rich.table import Table

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class PartBytes:
    """What attention or the MLP of a block holds at once, in bytes.

    Attributes:
        path: of the block.
        part: 'attention' or 'mlp'.
        plain: run plainly, by the meter.
        tiled: in tiles, by the meter.
        plain_count: run plainly, by count.
        tiled_count: in tiles, by count.
    """

    path: str
    part: str
    plain: int
    tiled: int
    plain_count: int
    tiled_count: int


@dataclass(frozen=True, eq=False)
class ActivationBytes:
    """What `activation_bytes` found.

    Attributes:
        parts: of each block that runs in tiles.
        tokens: of the batch.
    """

    parts: tuple[PartBytes, ...]
    tokens: int

    @property
    def off(self) -> float:
        """By how much a count is off at most, as a share of what the meter found."""
        pairs = [(each.plain, each.plain_count) for each in self.parts]
        pairs += [(each.tiled, each.tiled_count) for each in self.parts]
        return max(abs(count / found - 1) for found, count in pairs)

    def table(self) -> Table:
        """A row per part, for a terminal."""
        from rich import box

        from actkit.core.ground.tables import PlainTable

        title = f"Bytes held at once, {self.tokens:,} tokens"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("part", "plain", "in tiles", "share", "plain, by count", "in tiles, by count"):
            table.add_column(name, justify="left" if name == "part" else "right")
        for each in self.parts:
            sizes = (each.plain, each.tiled, each.plain_count, each.tiled_count)
            plain, tiled, first, second = map(format_bytes, sizes)
            table.add_row(f"{each.path}.{each.part}", plain, tiled, f"{each.tiled / each.plain:.2f}", first, second)
        return table

    def figure(self) -> Figure:
        """Draw both ways by part.

        Raises:
            ImportError: plotly (the extra `report`) is missing.
        """
        go = plotly().graph_objects

        from actkit.core.ground.figures import all_plain

        names = all_plain(f"{each.path}.{each.part}" for each in self.parts)
        bars = [
            go.Bar(name=name, x=names, y=[getattr(each, key) for each in self.parts])
            for name, key in (("plain", "plain"), ("in tiles", "tiled"))
        ]
        return go.Figure(bars).update_layout(yaxis={"title": "bytes held at once"})

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"tokens": self.tokens, "parts": [asdict(each) for each in self.parts]}


def activation_bytes(model: nn.Module, batch: Any) -> ActivationBytes:
    """Measure and count what attention and MLPs hold at once, run plainly and in tiles.

    Args:
        model: whose blocks run in tiles (`FlashSvd`).
        batch: as the model is called with it; a cache is left out.

    Returns:
        Both ways, for each part that runs in tiles.

    Raises:
        UnsupportedModelError: no block runs in tiles.
    """
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, FlashBlock)}
    if not blocks:
        raise UnsupportedModelError("model: no block of it runs in tiles; apply svd and flashsvd first.")
    parts: list[PartBytes] = []
    tokens = 0
    with evaluating(model):
        calls = _calls(model, blocks, batch)
        for path, block in blocks.items():
            for name, paths in (("attention", block.attention), ("mlp", block.mlp)):
                if paths is None:
                    continue
                args, kwargs = calls[path, name]
                x: Tensor = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
                tokens = x.numel() // x.shape[-1]
                plain, tiled = part_in_tiles(block, name)
                found = [_peak(model, each, args, kwargs) for each in (plain, tiled)]
                size = x.element_size()
                if isinstance(paths, AttentionPaths):
                    masks = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.dim() == 4]
                    masked = max((each.shape[-1] for each in masks if each.dtype == torch.bool), default=0)
                    rotary = kwargs.get("position_embeddings") is not None
                    counts = _attention(block, paths, tokens, rotary, masked)
                else:
                    counts = _mlp(block, paths, tokens)
                parts.append(PartBytes(path, name, *found, *(size * each for each in counts)))
    return ActivationBytes(tuple(parts), tokens)


def block_peaks(model: nn.Module, batch: Any) -> dict[str, int]:
    """Return the bytes that each block holds at once when a model runs on a batch, its input left out.

    Args:
        model: any that has blocks.
        batch: as the model is called with it.
    """
    from actkit.core.model.anatomy import anatomy

    found: dict[str, int] = {}
    with evaluating(model):
        view = anatomy(model, batch)
        calls = {block.path: block.module for block in view.blocks}
        recorded = calls_of(model, list(calls), lambda: forward(model, batch))
        for path, module in calls.items():
            found[path] = _peak(model, module, *recorded[path])
    return found


def _peak(model: nn.Module, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    for each in kwargs.values():
        if isinstance(each, tuple):
            given += [inner for inner in each if isinstance(inner, Tensor)]
    with live_tensors(model, *given) as live:
        module(*args, **kwargs)
    return live.peak


def calls_of(model: nn.Module, paths: Sequence[str], run: Callable[[], Any]) -> dict[str, Call]:
    """Return how modules are called while something runs; without caches, and the first call of each.

    Args:
        model: that holds them.
        paths: of the modules.
        run: runs it.
    """
    found: dict[str, Call] = {}

    def keep(path: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept = {key: value for key, value in kwargs.items() if not hasattr(value, "get_seq_length")}
            # some blocks work in place
            found.setdefault(path, (tuple(x.clone() if isinstance(x, Tensor) else x for x in args), kept))

        return before

    with hooked(model, before={path: keep(path) for path in paths}):
        run()
    return found


def _calls(model: nn.Module, blocks: dict[str, FlashBlock], batch: Any) -> dict[tuple[str, str], Call]:
    """How attention and MLP of each block are called."""
    places = {
        (path, name): f"{path}.inner.{part.path}"
        for path, block in blocks.items()
        for name, part in (("attention", block.attention), ("mlp", block.mlp))
        if part is not None
    }
    recorded = calls_of(model, list(places.values()), lambda: forward(model, batch))
    return {place: recorded[path] for place, path in places.items()}


def _rank(layer: Thin, gathers: bool = False) -> int:
    """Numbers per token between the two products of a layer, or of what it gathers."""
    if gathers:
        assert layer.right is not None
        return len(layer.right)
    return 0 if layer.right is None else len(layer.right)


def _mlp(block: FlashBlock, paths: MlpPaths, tokens: int) -> tuple[int, int]:
    inner = block.inner
    up, down = Thin(inner.get_submodule(paths.up)), Thin(inner.get_submodule(paths.down), True)
    assert down.right is not None
    units, gated = down.right.shape[1], paths.gate is not None or paths.up_rows is not None
    out = len(down.right) if down.left is None else len(down.left)
    r_up, r_down = _rank(up), _rank(down, True)
    plain = max(r_up + units, (3 if gated else 2) * units, units + (0 if down.left is None else r_down) + out)
    r_up *= 2 if paths.gate is not None else 1
    rows, tile = min(block.rows, tokens), min(block.tile, units)
    working = max(r_up + r_down + (3 if gated else 2) * tile, r_down + out)
    if tokens == rows:
        return plain * tokens, working * rows
    whole, later = out * tokens, min(rows, tokens - rows)  # where the rows' outputs go, from those of the first on
    return plain * tokens, max(working * rows, whole + out * rows, whole + working * later)


def _attention(block: FlashBlock, paths: AttentionPaths, tokens: int, rotary: bool, masked: int) -> tuple[int, int]:
    inner = block.inner.get_submodule(paths.path)
    layers = {name: Thin(inner.get_submodule(name)) for name in (paths.query, paths.key, paths.value) if name}
    output = Thin(inner.get_submodule(paths.output), True)
    grouped, size = paths.heads > paths.key_heads, paths.size

    def held(heads: int, key_heads: int, more: int) -> int:
        query, key = heads * size, key_heads * size
        turning = max(3 * query, query + 3 * key) if rotary else 0
        return query + 2 * key + max(more + query + masked + heads, turning)

    # keys and values are repeated for each query head (a single one is only seen so), or those of a head kept as they
    # were before they turned
    plain = held(paths.heads, paths.key_heads, 2 * paths.heads * size if 1 < paths.key_heads < paths.heads else 0)
    last = layers[paths.value or paths.query]  # is made beside those before it, by head in two steps
    wide = paths.key_heads * size + (0 if paths.value else (paths.heads + paths.key_heads) * size)
    before = (paths.heads + paths.key_heads) * size if paths.value else 0
    plain = max(plain, before + _rank(last) + (2 if last.heads > 1 else 1) * wide)
    normed = any(name.endswith("norm.weight") and len(each) == size for name, each in inner.named_parameters())
    turn = held(1, 1, size if grouped and rotary else 0)
    if grouped and rotary and normed:  # the key that is kept is not the one that turns
        turn = max(turn, 8 * size)
    r_out = _rank(output, True)
    assert output.right is not None
    out = len(output.right) if output.left is None else len(output.left)
    shared = sum(_rank(layer) for layer in layers.values() if layer.heads == 1)
    around = "." in paths.output  # then queries, keys and values of the last head are gone by the end
    end = shared + r_out + out + (1 if around else 5 if grouped and rotary else 4) * size
    behind = 3 * min(block.rows, tokens) * out if around else 0
    return plain * tokens, max((shared + r_out + turn) * tokens, end * tokens + behind)
