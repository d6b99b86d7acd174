"""One row of speed where speed shows: a random-weight Llama of 0.5B parameters, dense and with thresholded inputs.

A small model fits in the caches, and there nothing is gained by reading less. This one does not (0.99 GB in bf16):

    hidden 1536, intermediate 4096, 18 layers, 16 heads, 4 key-value heads, vocabulary 32,000, tied embeddings

Its weights are random, so it says nothing on quality; what is measured is the decode loop with the sparse kernel, whose
masks are about as scattered as random ones. Thresholds are TEAL's, calibrated on random tokens. Dense and sparse take
turns in one process, round by round, on the same weights; the ratio is paired by round.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actkit.core.cost import measure_cost
from actkit.core.edits import set_module
from actkit.core.hooks import evaluating
from actkit.core.linear import ActLinear, Threshold, pack_for_decode
from actkit.core.progress import track
from actkit.core.quality import Estimate
from actkit.core.runner import apply
from actkit.core.speed import median
from actkit.search.measured import estimate
from actkit.sparsity.teal import Teal

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
NEEDED = 4  # times the dense weights: they, the kernel's copy of most of them, and room to build both
SPREAD = 0.02  # of the random weights, as transformers initialises a Llama


@dataclass(frozen=True)
class Row:
    """share: of the inputs that the thresholds were set to drop; 0 is dense. density: inputs that were read. ratio: of
    the rate to the dense one's, paired by round; None for dense."""

    share: float
    tokens_per_second: Estimate
    ratio: Estimate | None
    density: float | None
    bytes_per_token: float | None


@dataclass(frozen=True)
class SpeedRow:
    """What was measured at the fixed shape. rows: dense first. weight_bytes: of the dense model. dtype, threads,
    prompt, new_tokens, rounds: how. seconds: of all. about: what it is not, in words."""

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
        """Everything, as JSON takes it."""
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
        """What `to_dict` gave, also after a way through JSON."""
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
    """Time one token after another at `shape` (of a LlamaConfig), dense and with each share of the inputs dropped.

    Raises MemoryError before anything is built where less than four times the dense weights are free.
    """
    started = time.perf_counter()
    model = _random_llama(shape, seed)
    size = sum(parameter.nbytes for parameter in model.parameters())
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape["vocab_size"], (2, 64), generator=generator)
    dense = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    thresholds: dict[float, dict[str, float]] = {}
    sparse: dict[str, ActLinear] = {}
    costs = {0.0: measure_cost(model)}
    for share in shares:
        applied = apply(model, Teal(sparsity=share), [{"input_ids": ids}], undo="memory", progress=False)
        sparse = {path: module for path, module in model.named_modules() if isinstance(module, ActLinear)}
        thresholds[share] = {path: float(module.select.threshold) for path, module in sparse.items()}  # type: ignore[union-attr, arg-type]
        costs[share] = measure_cost(model, [{"input_ids": ids}], progress=False)
        applied.undo()
    for path, layer in sparse.items():  # the thresholds change from variant to variant, the packed weight does not
        set_module(model, path, layer)
    pack_for_decode(model)
    prompt = ids[:1, :PROMPT]
    rates: dict[float, list[float]] = {share: [] for share in (0.0, *shares)}
    with evaluating(model):
        for index in track(range(-1, rounds), "Measuring the speed of a 0.5B model", rounds + 1, progress):
            for share in _rotated(list(rates), index):
                for path, layer in sparse.items():
                    set_module(model, path, layer if share else dense[path])
                    if share and isinstance(layer.select, Threshold):
                        layer.select.threshold.fill_(thresholds[share][path])
                rate = _decode(model, prompt, NEW_TOKENS)
                if index >= 0:  # the first round warms up and compiles
                    rates[share].append(rate)
    first = np.array(rates[0.0])
    rows = tuple(
        Row(
            share,
            median(np.array(found)),
            median(np.array(found) / first) if share else None,
            costs[share].density,
            costs[share].bytes_per_token,
        )
        for share, found in rates.items()
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    del model, sparse, dense
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


def _random_llama(shape: Mapping[str, int], seed: int) -> nn.Module:
    """A Llama in bf16 whose weights are slices of one block of random numbers: made in a second or two."""
    import psutil
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    config = LlamaConfig.from_dict({**shape, "tie_word_embeddings": True, "dtype": "bfloat16"})
    expected = _size(shape) * 2
    free = psutil.virtual_memory().available
    if free < NEEDED * expected:
        raise MemoryError(f"{free / 1e9:.1f} GB are free, {NEEDED * expected / 1e9:.1f} GB are needed")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights():
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()  # which initialising would have done
    source = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)).mul_(SPREAD).bfloat16()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            flat = parameter.view(-1)
            for part, start in _parts(flat, source, shift=7919 * number):
                part.copy_(source[start : start + part.numel()])
    return model.eval()


def _size(shape: Mapping[str, int]) -> int:
    """Parameters of the matrices of a Llama of this shape."""
    hidden, share = shape["hidden_size"], shape["num_key_value_heads"] / shape["num_attention_heads"]
    attention = hidden * hidden * (2 + 2 * share)
    block = attention + 3 * hidden * shape["intermediate_size"]
    return int(block * shape["num_hidden_layers"] + hidden * shape["vocab_size"])


def _parts(flat: Tensor, source: Tensor, shift: int) -> Iterator[tuple[Tensor, int]]:
    """Pieces of `flat`, each with where in `source` its values start; no two matrices begin at the same place."""
    at, start = 0, shift % (len(source) // 2)
    while at < len(flat):
        count = min(len(flat) - at, len(source) - start)
        yield flat[at : at + count], start
        at, start = at + count, (start + 104729) % (len(source) // 2)


def _decode(model: Any, ids: Tensor, new_tokens: int) -> float:
    """Tokens per second after the prompt, greedy, with a key-value cache."""
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    started = time.perf_counter()
    for _ in range(new_tokens):
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    return new_tokens / (time.perf_counter() - started)


def _rotated(shares: list[float], index: int) -> list[float]:
    start = index % len(shares)
    return shares[start:] + shares[:start]
