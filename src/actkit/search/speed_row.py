"""One row of speed at a size that shows it: a Llama of 0.5B random parameters, dense and with thresholded inputs.

A small model fits in the caches, and there nothing is gained by reading less. This one does not (0.99 GB in bf16):

    hidden 1536, intermediate 4096, 18 layers, 16 heads, 4 key-value heads, vocabulary 32,000, tied embeddings

Its weights are random, so it says nothing on quality. What is measured is the decode loop of `actkit generate`, with
masks about as scattered as random ones. Thresholds are TEAL's, calibrated on random tokens. All variants go through the
decoder and take turns in one process, round by round; ratios are to the dense one, paired by round. The dense model
through transformers is a row too, so that the engine's own part can be seen.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from actkit.core.ground.estimate import Estimate
from actkit.core.ground.progress import track
from actkit.core.measure.cost import measure_cost
from actkit.core.measure.generation import generate_ids
from actkit.core.measure.speed import median
from actkit.core.recipe.runner import apply
from actkit.runtime.decoder import Decoder
from actkit.search.measured import estimate
from actkit.sparsity.teal import Teal
from actkit.testing.random_llama import matrix_sizes, random_llama

SHAPE = {
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 256,
}
SHARES = (0.5, 0.7)
PROMPT, NEW_TOKENS, ROUNDS = 16, 12, 5
NEEDED = 5  # times the dense weights: they, a packed copy for dense and for each share, and room to build one


@dataclass(frozen=True)
class Row:
    """The speed with one share of the inputs dropped.

    Attributes:
        share: of the inputs that the thresholds were set to drop; 0 is dense.
        tokens_per_second: median over rounds with its interval.
        ratio: of the rate to the first row's, dense through the decoder, paired by round; None for that row itself.
        density: share of the inputs that were read.
        bytes_per_token: weight bytes that were read.
        engine: 'decoder' or 'transformers'.
    """

    share: float
    tokens_per_second: Estimate
    ratio: Estimate | None
    density: float | None
    bytes_per_token: float | None
    engine: str = "transformers"  # which journals from before there was a decoder do not say


@dataclass(frozen=True)
class SpeedRow:
    """What was measured at the fixed shape.

    Attributes:
        parameters: how many.
        weight_bytes: of the dense model.
        rows: dense first, dense through transformers last.
        dtype: of the model.
        threads: that it ran with.
        prompt: tokens of the prompt.
        new_tokens: tokens that were decoded.
        rounds: that were counted.
        seconds: of all.
        about: what it is not, in words.
    """

    parameters: int
    weight_bytes: int
    rows: tuple[Row, ...]
    dtype: str
    threads: int
    prompt: int
    new_tokens: int
    rounds: int
    seconds: float
    about: str = "random weights and random tokens: speed only, it says nothing on quality"

    def to_dict(self) -> dict[str, Any]:
        """Return everything, as JSON takes it."""
        rows = [
            {
                **vars(row),
                "tokens_per_second": row.tokens_per_second.to_dict(),
                "ratio": None if row.ratio is None else row.ratio.to_dict(),
            }
            for row in self.rows
        ]
        return {**asdict(self), "rows": rows}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SpeedRow:
        """Read what `to_dict` gave, also after a way through JSON."""
        names = ("tokens_per_second", "ratio")
        rows = tuple(Row(**{**row, **{name: estimate(row[name]) for name in names}}) for row in content["rows"])
        return cls(**{**content, "rows": rows})


def measure_speed_row(
    shape: Mapping[str, int] = SHAPE,
    *,
    shares: tuple[float, ...] = SHARES,
    rounds: int = ROUNDS,
    seed: int = 0,
    progress: bool = True,
) -> SpeedRow:
    """Time one token after another, dense and with each share of the inputs dropped.

    Args:
        shape: of a LlamaConfig.
        shares: of the inputs.
        rounds: that are counted.
        seed: of weights and tokens.
        progress: show a bar.

    Returns:
        The speeds, a row each.

    Raises:
        MemoryError: less than five times the dense weights are free, before anything is built.
    """
    started = time.perf_counter()
    _check_memory(shape)
    model = random_llama({**shape, "tie_word_embeddings": True}, seed)
    size = sum(parameter.nbytes for parameter in model.parameters())
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape["vocab_size"], (2, 64), generator=generator)
    prompt, capacity = ids[0, :PROMPT], PROMPT + NEW_TOKENS + 1  # the first new token comes with the prompt
    decoders: dict[tuple[float, str], Decoder | None] = {(0.0, "decoder"): Decoder(model, capacity=capacity)}
    costs = {0.0: measure_cost(model)}
    for share in shares:
        applied = apply(model, Teal(sparsity=share), [{"input_ids": ids}], undo="memory", progress=False)
        decoders[share, "decoder"] = Decoder(model, capacity=capacity)
        costs[share] = measure_cost(model, [{"input_ids": ids}], progress=False)
        applied.undo()
    decoders[0.0, "transformers"] = None
    rates: dict[tuple[float, str], list[float]] = {variant: [] for variant in decoders}
    for index in track(range(-1, rounds), "Measuring the speed of a 0.5B model", rounds + 1, progress):
        for variant in _rotated(list(decoders), index):
            rate = _rate(generate_ids(model, prompt, max_new_tokens=NEW_TOKENS + 1, end=(), decoder=decoders[variant]))
            if index >= 0:  # the first round warms up and compiles
                rates[variant].append(rate)
    first = np.array(rates[0.0, "decoder"])
    rows = tuple(
        Row(
            share,
            median(np.array(found)),
            None if (share, engine) == (0.0, "decoder") else median(np.array(found) / first),
            costs[share].density,
            costs[share].bytes_per_token,
            engine,
        )
        for (share, engine), found in rates.items()
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    del model, decoders
    gc.collect()
    return SpeedRow(
        parameters,
        size,
        rows,
        "bfloat16",
        torch.get_num_threads(),
        PROMPT,
        NEW_TOKENS,
        rounds,
        time.perf_counter() - started,
    )


def _check_memory(shape: Mapping[str, int]) -> None:
    import psutil

    expected = matrix_sizes({**shape, "tie_word_embeddings": True}) * 2
    free = psutil.virtual_memory().available
    if free < NEEDED * expected:
        raise MemoryError(f"{free / 1e9:.1f} GB are free, {NEEDED * expected / 1e9:.1f} GB are needed")


def _rate(tokens: Iterator[int]) -> float:
    """Tokens per second after the first."""
    next(tokens)
    started = time.perf_counter()
    count = sum(1 for _ in tokens)
    return count / (time.perf_counter() - started)


def _rotated(variants: list[tuple[float, str]], index: int) -> list[tuple[float, str]]:
    start = index % len(variants)
    return variants[start:] + variants[:start]
