"""Texts that follow several prompts, written at once if a decoder can and if that is faster.

    for number, text in generate_all(model, tokenizer, prompts): ...

A decoder's batch reads each weight once for all its texts. Weights that skip most of their inputs may be faster one
text after another, as a batch reads what any of its texts selects; so what several texts at a time give is measured
first, a few steps of each number, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from actkit.core.ground.errors import DataError, MemoryLimitError, UnsupportedModelError
from actkit.core.layers.linear import pack_for_decode
from actkit.core.measure.decoding import Engine, choose_engine
from actkit.core.measure.generation import ends_of, generate_ids, ids_of, text_of
from actkit.core.measure.sampling import LIKELIEST, Sampling
from actkit.core.store.pending import whole

MOST = 8  # texts at a time, if nobody says


def generate_all(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = LIKELIEST,
    stop: str | int | Sequence[str | int] = (),
    chat: bool = False,
    cache: str | None = None,
    batch: int | None = None,
    decode_only: bool = False,
    announce: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, str]]:
    """Write on after each of some prompts.

    A text is the one that `generate` writes of its prompt, but for what `batch` of the decoder says of rounding: where
    two tokens are nearly as likely, texts of a batch may part from those that are written alone.

    Args:
        model: as `core.measure.generation.generate` takes it, and so are all arguments that are not listed.
        tokenizer: of the model.
        prompts: texts to go on from.
        max_new_tokens: at most, for each.
        sampling: how tokens are chosen, each text with a generator of its own.
        stop: texts or token ids that end a text.
        chat: each prompt is what a user says.
        cache: how a decoder keeps keys and values.
        batch: texts at a time; None for the fastest number up to 8, which is measured.
        decode_only: a decoder may take the weights out of the model.
        announce: called with what writes, how many texts at a time, and what other numbers would give.

    Returns:
        (number of the prompt, text), each when it is complete.

    Raises:
        DataError: there is no prompt, or what `generate` raises of one.
        UnsupportedModelError: `batch` was given, and texts of this model are written one after another.
        ValueError: a setting is out of bounds.
    """
    if isinstance(prompts, str) or not prompts:
        raise DataError("prompts: one text or none was given; give a list of at least one text.")
    if batch is not None and batch < 1:
        raise ValueError(f"batch: {batch} was given; give at least 1, or None for the fastest.")
    stops, end = ends_of(model, tokenizer, stop)
    ids = [ids_of(model, tokenizer, prompt, max_new_tokens, chat=chat) for prompt in prompts]
    longest = max(map(len, ids)) + max_new_tokens
    engine = choose_engine(model, capacity=longest, decode_only=decode_only, cache=cache)
    writer, together, said = _choose_number(engine, len(ids), batch)
    if announce is not None:
        announce(f"{engine.describe()}; {said}")
    if engine.decoder is None:
        model = whole(model)
        if decode_only:
            pack_for_decode(model)

    def text(number: int, tokens: Sequence[int]) -> str:
        return "".join(text_of(tokenizer, ids[number], (token for token in tokens if token not in end), stops))

    def stopped(number: int, tokens: list[int]) -> bool:
        return bool(stops) and text(number, tokens) != "".join(text_of(tokenizer, ids[number], tokens, []))

    def one_by_one() -> Iterator[tuple[int, str]]:
        for number, prompt in enumerate(ids):
            settings: Any = {"max_new_tokens": max_new_tokens, "sampling": sampling, "end": end}
            yield number, text(number, list(generate_ids(model, prompt, **settings, decoder=engine.decoder)))

    def at_once() -> Iterator[tuple[int, str]]:
        written: list[list[int]] = [[] for _ in ids]
        settings: Any = {"max_new_tokens": max_new_tokens, "sampling": sampling, "end": end}
        for number, token in writer.generate(ids, **settings, stopped=stopped, together=together):
            own = written[number]
            own.append(token)
            if token in end or len(own) == max_new_tokens or stopped(number, own):
                yield number, text(number, own)

    return one_by_one() if writer is None else at_once()


def _choose_number(engine: Engine, texts: int, batch: int | None) -> tuple[Any, int, str]:
    """What writes several texts or None, how many at a time, and why."""
    if batch == 1 or (batch is None and texts == 1):
        return None, 1, "one text at a time"
    make = getattr(engine.decoder, "batch", None)
    if make is None:
        if batch is not None:
            raise UnsupportedModelError(
                f"batch: {batch} was given, but no decoder writes several texts at a time ({engine.describe()}); leave "
                f"it out."
            )
        return None, 1, "one text at a time"
    try:
        writer = make(min(MOST, texts) if batch is None else batch)
    except (MemoryLimitError, UnsupportedModelError) as error:
        if batch is not None:
            raise
        return None, 1, f"one text at a time ({str(error).rstrip('.')})"
    if batch is not None:
        return writer, batch, f"{batch} texts at a time"
    rates = writer.rates()
    together = max(rates, key=lambda number: rates[number])
    return (writer, together, describe(rates)) if together > 1 else (None, 1, describe(rates))


def describe(rates: dict[int, float]) -> str:
    """Say how many texts at a time are the fastest, from how many on that pays, and what each number gives.

    Args:
        rates: tokens per second of 1, 2 ... texts at a time.
    """
    together, first = max(rates, key=lambda number: rates[number]), pays_from(rates)
    measured = ", ".join(f"{number}: {rate:.3g}" for number, rate in rates.items())
    pays = "several never pay" if first is None else f"several pay from {first} on"
    texts = "one text" if together == 1 else f"{together} texts"
    return f"{texts} at a time (tokens/s of {measured}; {pays})"


def pays_from(rates: dict[int, float]) -> int | None:
    """Return from how many texts on several at a time make more tokens per second than one; None if never.

    Args:
        rates: tokens per second of 1, 2 ... texts at a time.
    """
    slower = [number for number, rate in rates.items() if number > 1 and rate <= rates[1]]
    return min((number for number in rates if number > max(slower, default=1)), default=None)
