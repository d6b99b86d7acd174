"""Walks a model block by block: the hidden states that enter each block, of the original and of the edited model.

How each block is called (masks, rotary tables, sizes) and what enters the first one is recorded first, of the first
batch by a pass over the whole model (`core/recipe/recording.py`). From then on block k runs alone, on the outputs of
block k - 1. That a block's output *is* the next block's input is checked on the first batch; if it is not (something
happens between blocks), the inputs are taken from passes over the whole prefix instead, which is slower and is said so.
Of several processes each walks its share of the batches (`core/ground/processes.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import BatchContext, check_batch, forward, reads_beyond
from actkit.core.forward.hooks import StopForward, evaluating, hooked, refuse_compiled_or_sharded
from actkit.core.ground import processes
from actkit.core.ground.fingerprint import fingerprint, model_fingerprint
from actkit.core.ground.memory import release_behind
from actkit.core.ground.offload import onloaded
from actkit.core.ground.progress import track
from actkit.core.layers.weights import widened
from actkit.core.model.anatomy import Anatomy, Block, Site
from actkit.core.recipe.recording import Recorder, Tail
from actkit.core.recipe.resuming import Resuming
from actkit.core.watch.calls import Call
from actkit.core.watch.capture import Observer, observe
from actkit.core.watch.merging import merge


class Walk:
    """The calls of each block on calibration batches, for the streams 'original' and 'edited'.

    Blocks must be visited in order: `calls(k, stream)`; then `following` before the edits for the original stream,
    after
    them for the edited one; then `move`.

    Args:
        anatomy: of the model.
        batches: of all processes.
        track: wraps what is iterated over in a bar.
        share: the indices of the batches that this process walks; None for all.
        recorder: one that has seen a batch of this model as it is now, or None.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        batches: Sequence[Any],
        track: Callable[..., Iterable[Any]],
        share: Sequence[int] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.anatomy = anatomy
        self.recorder = Recorder(anatomy) if recorder is None else recorder
        self.batches = batches
        self.share = range(len(batches)) if share is None else share
        self._shared = share is not None
        self.track = track
        self.whole_model = len(anatomy.blocks) == 1 and anatomy.blocks[0].path == ""
        self.chained = True
        self._rows_apart: bool | None = None  # whether a block gives the same for the first rows of a call alone
        self.seconds = 0.0  # of the first batch's pass through the model
        self._first: list[Call] = []  # per batch, the call of the first block
        self._calls: dict[str, list[Call]] = {}  # stream -> per batch, the call of the block it has reached
        self._prototypes: list[list[Call]] = []  # per batch, per block: the call without its hidden states
        self._once: list[frozenset[str]] = []  # per batch, the modules in blocks that ran once
        self._originals: list[list[Tensor]] = []  # per batch, per block: kept only if the chain is broken
        self._tails: dict[str, tuple[Tail, ...]] = {}  # path of a block -> its parts that end with a layer
        self._resuming: dict[str, Resuming] = {}  # stream -> what is kept of the block it has reached

    def start(self, streams: Iterable[str]) -> None:
        """Record how the blocks are called.

        Args:
            streams: to carry from block to block.
        """
        first: list[Call] = []
        recorder = self.recorder
        self.chained = recorder.chained is not False
        if not self.share:
            self.chained = self._all(True)
        for batch, context in self.track(list(self._contexts()), "Recording how the blocks are called"):
            started = time.perf_counter()
            seen, once = recorder.record(batch, context, states=not self.chained)
            self._once.append(once)
            self.seconds = self.seconds or time.perf_counter() - started
            if not first:
                self.chained = self._all(bool(recorder.chained))
            first.append(seen[0])
            if not self.chained:
                self._originals.append([call.hidden for call in seen])
            self._prototypes.append(
                [call.with_hidden(torch.empty(0)) if not self.whole_model else call for call in seen]
            )
        self._first, self._tails = first, recorder.tails
        for stream in streams:
            self._calls[stream] = list(first)

    def _all(self, chained: bool) -> bool:
        """Whether it is so in all processes that share the batches."""
        if not self._shared:
            return chained
        return not int(processes.total("whether the blocks are a chain", torch.tensor(int(not chained))))

    @cached_property
    def tokens_before(self) -> list[int]:
        """Per batch, how many real tokens (or images) are in the batches before it, of all processes."""
        return [0, *accumulate(BatchContext.of(batch, self.anatomy.model).tokens for batch in self.batches)]

    def _contexts(self) -> Iterable[tuple[Any, BatchContext]]:
        """The batches of this process; their rows are numbered as among all."""
        row = 0
        for index, batch in enumerate(self.batches):
            owners = _documents(self.batches, index)
            context = BatchContext.of(batch, self.anatomy.model, first_row=row, documents=owners)
            row += context.batch_size
            if index in self.share:
                yield batch, context

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that the walk was started with."""
        return tuple(self._calls)

    def bytes(self, streams: Iterable[str]) -> dict[str, int]:
        """Return what the walk holds at its peak, by what it is; after `start`, for its batches.

        Args:
            streams: to be carried.
        """
        if self.whole_model:
            return {}
        streams = list(streams)
        hidden = sum(call.hidden.nbytes for call in self._first)
        kept = sum(state.nbytes for states in self._originals for state in states) if "original" in streams else 0
        tensors = {
            id(tensor): tensor.nbytes
            for calls in self._prototypes
            for call in calls
            for tensor in _tensors([call.args, call.kwargs])
        }
        plural = "s" * (len(streams) > 1)
        held = {
            f"hidden states ({len(streams)} stream{plural}, old and new)": 2 * len(streams) * hidden,
            "masks and rotary tables": sum(tensors.values()),
        }
        return held if self.chained else {**held, "hidden states of all blocks (no chain)": kept}

    def calls(self, k: int, stream: str) -> list[Call]:
        """Return block k's calls, one per batch, with the hidden states of the stream."""
        return self._calls[stream]

    def some_calls(self, k: int, stream: str, max_tokens: int | None) -> Iterator[tuple[int, Call]]:
        """Yield block k's calls with the index of their batch, until they hold enough real tokens; the last one is cut.

        Args:
            k: index of the block.
            stream: 'original' or 'edited'.
            max_tokens: None for all.
        """
        for index, call in zip(self.share, self.calls(k, stream), strict=True):
            left = None if max_tokens is None else max_tokens - self.tokens_before[index]
            if left is not None and left <= 0:
                return
            yield index, call if left is None else self._cut(k, call, left)

    def _cut(self, k: int, call: Call, tokens: int) -> Call:
        """The first rows of a call that hold so many real tokens; the whole call if rows cannot be told apart in it."""
        enough = (call.context.tokens_per_row.cumsum(0) >= tokens).nonzero()
        rows = int(enough[0]) + 1 if len(enough) else call.context.batch_size
        if rows == call.context.batch_size or self._rows_apart is False:
            return call
        return call.rows(0, rows) if self.rows_apart(k, call, rows) else call

    def rows_apart(self, k: int, call: Call, rows: int) -> bool:
        """Say whether block k gives the same for the first rows of a call alone; it is tried once.

        Args:
            k: index of the block.
            call: of it.
            rows: fewer than the call has.
        """
        if self._rows_apart is None:  # a tensor may have as many heads as the batch has rows
            module = self.anatomy.model.get_submodule(self.anatomy.blocks[k].path)
            self._rows_apart = _same(lambda: call.rows(0, rows).replay(module), call.replay(module)[:rows])
        return self._rows_apart

    def outputs(self, k: int, stream: str) -> list[Tensor]:
        """Return what block k, as it stands now, gives on each call of a stream.

        Args:
            k: index of the block.
            stream: 'original' or 'edited'.
        """
        module = self.anatomy.model.get_submodule(self.anatomy.blocks[k].path)
        calls = self._calls[stream]
        resuming = self._resuming.get(stream) or Resuming(self.anatomy.model, self.anatomy.blocks[k].path, ())
        found = []
        with resuming.passes(len(calls), keep=False), widened(module):
            for index, call in enumerate(calls):
                resuming.begin(index)
                found.append(call.replay(module))
        return found

    def observe(self, k: int, stream: str, wanted: Mapping[Site, Any], in_turn: bool = False) -> Mapping[Site, Any]:
        """Return fresh statistics of block k as it stands now, of all processes; a pass ends once all sites are seen.

        Args:
            k: index of the block.
            stream: 'original' or 'edited'.
            wanted: site -> the statistics that it gets.
            in_turn: keep what shortens the passes to come (`core/recipe/resuming.py`), until the stream moves on.
        """
        block = self.anatomy.blocks[k].path
        model, calls = self.anatomy.model, self.calls(k, stream)
        module = model.get_submodule(block)
        if in_turn and stream not in self._resuming:
            self._resuming[stream] = Resuming(model, block, self._tails.get(block, ()))
        resuming = self._resuming.get(stream) or Resuming(model, block, ())
        observer = Observer(self.anatomy, wanted)
        before, after = observer.hooks()
        passes = resuming.passes(len(calls), {*before, *after}, keep=in_turn)
        with passes, hooked(model, before=before, after=after), widened(module):
            for index, (call, once) in enumerate(zip(calls, self._once, strict=True)):
                resuming.begin(index)
                observer.begin(call.context, call.kwargs, once)
                with suppress(StopForward):
                    call.replay(module)
        release_behind(module)
        merge(observer.statistics)
        return observer.statistics

    def following(self, k: int, stream: str, outputs: Sequence[Tensor] | None = None) -> list[Call]:
        """Return what block k + 1 will be called with.

        Args:
            k: the block that the stream has reached.
            stream: 'original' or 'edited'.
            outputs: what block k, as it stands now, gives on each call of the stream; None runs it.
        """
        if k + 1 >= len(self.anatomy.blocks):
            return []
        if not self.chained:
            return self._from_prefix(k + 1, stream)
        if outputs is None:
            outputs = self.outputs(k, stream)
        return [
            prototype[k + 1].with_hidden(hidden) for prototype, hidden in zip(self._prototypes, outputs, strict=True)
        ]

    def move(self, stream: str, calls: list[Call]) -> None:
        """Go on to the next block of a stream.

        Args:
            stream: 'original' or 'edited'.
            calls: what `following` gave.
        """
        self._calls[stream] = calls
        self._first = []
        self._resuming.pop(stream, None)

    def _from_prefix(self, k: int, stream: str) -> list[Call]:
        if stream == "original":
            return [
                prototype[k].with_hidden(kept[k])
                for prototype, kept in zip(self._prototypes, self._originals, strict=True)
            ]
        path = self.anatomy.blocks[k].path
        calls: list[Call] = []
        for batch, context in self._contexts():
            found: list[Call] = []

            def stop(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], found=found, context=context
            ) -> None:
                found.append(Call(args, dict(kwargs), context))
                raise StopForward

            with torch.no_grad(), hooked(self.anatomy.model, before={path: stop}):
                try:
                    forward(self.anatomy.model, batch)
                except StopForward:
                    calls.append(found[0])
        return calls


def record_by_block(
    view: Anatomy,
    wanted: Callable[[Block], Mapping[Site, Any]],
    batches: Sequence[Any],
    *,
    counted: Callable[[Any], Tensor | None] = lambda batch: None,
    progress: bool = True,
) -> Iterator[tuple[Block, Mapping[Site, Any]]]:
    """Record statistics block by block, so that only those of one block are held at a time.

    Args:
        view: of the model; experts must have been opened to be seen.
        wanted: of a block, its sites and the fresh statistics that each gets.
        batches: as `record` takes them. Of several processes each runs its share, and all get the statistics of all.
        counted: of a batch, which of its real tokens are recorded: bool [batch, length], or None for all.
        progress: show a bar.

    Yields:
        Each block with its statistics by site. To be read before the next block is asked for.

    Raises:
        DataError: the model cannot be called with a batch.
        NonFiniteError: a value is NaN or infinite.
        UnsupportedModelError: a block runs several times in one pass, or not at all.
    """

    def tracked(items: Any, description: str) -> Iterator[Any]:
        return track(items, description, enabled=progress)

    refuse_compiled_or_sharded(view.model)
    for batch in batches:
        check_batch(view.model, batch, beyond_context=reads_beyond(batches))
    share = None
    if processes.several():
        processes.agree(model=model_fingerprint(view.model), data=fingerprint([fingerprint(each) for each in batches]))
        share = [index for index in range(len(batches)) if processes.mine(index)]
    walk = Walk(view, batches, tracked, share)
    chosen = [counted(batches[index]) for index in walk.share]
    with evaluating(view.model):
        walk.start(["original"])
        for index in tracked(range(len(view.blocks)), "Recording activations"):
            block = view.block(index)
            module = view.model.get_submodule(block.path)
            outputs = []
            with onloaded(view.model, block.path), observe(view, wanted(block)) as observer:
                for call, tokens in zip(walk.calls(index, "original"), chosen, strict=True):
                    observer.begin(call.context.counting(tokens), call.kwargs)
                    outputs.append(call.replay(module))
            merge(observer.statistics)
            yield block, observer.statistics
            walk.move("original", walk.following(index, "original", outputs))


def _documents(batches: Any, index: int) -> Tensor | None:
    documents = getattr(batches, "document_ids", None)
    return None if documents is None else documents[index]


def _same(attempt: Callable[[], Tensor], expected: Tensor) -> bool:
    """Whether an attempt gives what is expected, but for the order of summation."""
    try:
        found = attempt()
    except (RuntimeError, ValueError, IndexError):  # shapes that do not go together
        return False
    close = torch.finfo(expected.dtype).eps * 64 * float(expected.abs().max())
    return found.shape == expected.shape and float((found.float() - expected.float()).abs().max()) <= close


def _tensors(value: Any) -> Iterable[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
