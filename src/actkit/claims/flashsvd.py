"""FlashSVD's claims: tiles give what the same factors give without, and far less is held at once.

Measured on MiniLM (384 channels, 12 heads of 32, 1,536 units, 6 blocks), float32, plain SVD at rank 16 per head and 128
elsewhere: 8 windows of text, padded to 512 tokens on the right, or on the left, or cut at 250 tokens. Both arms hold
the same factors and use the same attention function (torch's fused one), and bytes are those of tensors that are alive
at once in a block, weights and the block's input left out (`core.measure.live_tensors`). The paper's figures are from
a GPU with its own kernels, at its ranks and against its baseline: 70.2 % is not checked here, nor is GLUE. Latency is
printed, not judged. The shape of SmolLM2's blocks (576 channels, 9 query heads on 3, 1,536 units, a gate, rotary
embedding) with random weights stands beside it, at ranks 32 per head and 192. About 1 minute on one thread.

SmolLM2-135M and Gemma 3 270M themselves, in float32, at those ranks, with fewer rows (`REAL_SIZES`).
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from actkit import zoo
from actkit.claims.outcome import SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.compression.flashsvd.flashsvd import FlashSvd
from actkit.compression.flashsvd.memory import activation_bytes, block_peaks, calls_of
from actkit.compression.svd import Svd
from actkit.core.forward.batch import first_tensor
from actkit.core.forward.hooks import evaluating
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.data.text import documents

RANKS: dict[str, Any] = {"query": 16, "key": 16, "value": 16, "output": 128, "up": 128, "down": 128}
WIDER: dict[str, Any] = {name: 2 * rank if rank < 128 else 192 for name, rank in RANKS.items()} | {"gate": 192}
REAL = ("smollm2", "gemma3")


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how often.

    Attributes:
        seeds: of the windows of text.
        rows: of the batch.
        length: tokens of a row.
        rounds: of timings.
    """

    seeds: tuple[int, ...] = (0,)
    rows: int = 8
    length: int = 512
    rounds: int = 5


REAL_SIZES = Sizes(rows=2, rounds=1)
SAME = Statement(
    "Tiles give what the factors give without them",
    "no accuracy loss on top of the compressor (abstract)",
    "every block, padding on the right, on the left, and a length that 64 does not divide: the largest difference is "
    "at most 2e-5 of the largest output",
    "minilm",
)
SMALLER = Statement(
    "The most that a block holds at once falls",
    "peak activation memory down by up to 70.2 %, transients by 75 % (abstract)",
    "every block at most 0.5 x of the same factors without tiles, with fused attention in both; every MLP at most "
    "0.35 x; counts and meter within 10 %",
    "minilm",
)
MEANING = Statement(
    "Sentences mean what they meant under the factors",
    "no accuracy loss on top of the compressor (abstract)",
    "cosines of sentence embeddings to those of the dense model, with tiles and without, agree to 1e-5",
    "minilm",
)
SHAPE_SAME, SHAPE_SMALLER = (
    Statement(
        f"{each.statement}: SmolLM2's shape, with grouped queries and rotary embedding",
        each.paper,
        each.condition,
        SYNTHETIC,
    )
    for each in (SAME, SMALLER)
)
STATEMENTS = (
    SAME,
    SMALLER,
    MEANING,
    SHAPE_SAME,
    SHAPE_SMALLER,
    *(each.on(name) for name in REAL for each in (SAME, SMALLER)),
)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or (REAL_SIZES if subject in REAL else Sizes())
    if subject in REAL:
        real = Arms(zoo.load(subject, dtype=torch.float32), WIDER, subject, sizes)
        found: list[Experiment] = [
            (SAME.on(subject), partial(same, real)),
            (SMALLER.on(subject), partial(smaller, real)),
        ]
        return conduct("flashsvd", found, sizes, subject, progress)
    encoder = None if subject == SYNTHETIC else Arms(zoo.load("minilm"), RANKS, "minilm", sizes)
    shape = None if subject == "minilm" else Arms(smollm2_shape(), WIDER, None, sizes)
    experiments: list[Experiment] = [
        (SAME, partial(same, encoder)),  # type: ignore[arg-type]
        (SMALLER, partial(smaller, encoder)),  # type: ignore[arg-type]
        (MEANING, partial(meaning, encoder)),  # type: ignore[arg-type]
        (SHAPE_SAME, partial(same, shape)),  # type: ignore[arg-type]
        (SHAPE_SMALLER, partial(smaller, shape)),  # type: ignore[arg-type]
    ]
    return conduct("flashsvd", experiments, sizes, subject, progress)


def smollm2_shape() -> nn.Module:
    """Two blocks of SmolLM2-135M's shape, with random weights."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, vocab_size=1000)).eval()


class Arms:
    """A model dense, with factors, and with the same factors in tiles; and batches to run them on.

    Args:
        model: dense.
        ranks: of the factors, by role; of heads for query, key and value.
        tokenizer: its name in the zoo; None for random tokens.
        sizes: of the batch.
    """

    def __init__(self, model: nn.Module, ranks: dict[str, Any], tokenizer: str | None, sizes: Sizes) -> None:
        self.sizes, self.dense = sizes, model.eval()
        self.plain = copy.deepcopy(self.dense)
        apply(self.plain, Svd(per_head=True, rank=ranks), progress=False)
        self.tiled = copy.deepcopy(self.plain)
        self.ids, self.lengths = self._windows(tokenizer)
        apply(self.tiled, FlashSvd(), [self.batch("right")], progress=False)

    def _windows(self, tokenizer: str | None) -> tuple[Tensor, Tensor]:
        sizes, generator = self.sizes, torch.Generator().manual_seed(self.sizes.seeds[0])
        lengths = torch.randint(sizes.length // 4, sizes.length + 1, (sizes.rows,), generator=generator)
        lengths[0] = sizes.length
        if tokenizer is None:
            return torch.randint(1000, (sizes.rows, sizes.length), generator=generator), lengths
        text = "\n".join(each.text for each in documents("test"))
        ids = zoo.tokenizer(tokenizer)(text[: 40 * sizes.rows * sizes.length], return_tensors="pt")["input_ids"][0]
        return ids[: sizes.rows * sizes.length].view(sizes.rows, sizes.length), lengths

    def batch(self, how: str) -> dict[str, Tensor]:
        """Windows padded on the 'right' or the 'left', or 'odd': cut where 64 does not divide them."""
        length = 250 * self.sizes.length // 512 if how == "odd" else self.sizes.length
        places = torch.arange(length)
        lengths = self.lengths.clamp(max=length)[:, None]
        mask = places < lengths if how != "left" else places >= length - lengths
        return {"input_ids": self.ids[:, :length], "attention_mask": mask.long()}


def blocks_apart(arms: Arms, how: str) -> float:
    """The largest difference of a block's outputs over its largest one, all blocks run on the same inputs."""
    plain, tiled = anatomy(arms.plain).blocks, anatomy(arms.tiled).blocks
    with evaluating(arms.plain), evaluating(arms.tiled):
        calls = calls_of(arms.plain, [block.path for block in plain], lambda: arms.plain(**arms.batch(how)))
        worst = 0.0
        for one, other in zip(plain, tiled, strict=True):
            args, kwargs = calls[one.path]
            expected, found = (first_tensor(each.module(*args, **kwargs)) for each in (one, other))
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


def same(arms: Arms) -> Measurement:
    """Compare blocks with padding on either side and at an odd length."""
    found = {how: blocks_apart(arms, how) for how in ("right", "left", "odd")}
    text = ", ".join(f"{worst:.1e} ({how})" for how, worst in found.items())
    return Measurement(f"largest difference over the largest output: {text}", max(found.values()) <= 2e-5)


def smaller(arms: Arms) -> Measurement:
    """Meter blocks and MLPs, compare with counts, and print times."""
    batch = arms.batch("right")
    peaks = [block_peaks(model, batch) for model in (arms.plain, arms.tiled)]
    shares = [tiled / plain for plain, tiled in zip(*(each.values() for each in peaks), strict=True)]
    found = activation_bytes(arms.tiled, batch)
    mlps = [each.tiled / each.plain for each in found.parts if each.part == "mlp"]
    attentions = [each.tiled / each.plain for each in found.parts if each.part == "attention"]
    times = ", ".join(f"{name} {1e3 * each:.0f}" for name, each in timed(arms, batch).items())
    text = (
        f"blocks {max(shares):.3f} x (of {max(peaks[0].values()) / 1e6:.1f} MB), MLPs {max(mlps):.3f} x, attention "
        f"{max(attentions):.3f} x; counts off by {found.off:.1%} at most; ms per batch: {times} "
        f"({torch.get_num_threads()} threads)"
    )
    return Measurement(text, max(shares) <= 0.5 and max(mlps) <= 0.35 and found.off <= 0.1)


TIMED = ("dense", "plain", "tiled")


def timed(arms: Arms, batch: dict[str, Tensor]) -> dict[str, float]:
    """The median of a forward pass of each arm, in seconds, in turns."""
    found: dict[str, list[float]] = {name: [] for name in TIMED}
    for _ in range(arms.sizes.rounds):
        for name, seconds in found.items():
            model = getattr(arms, name)
            with evaluating(model):
                started = time.perf_counter()
                model(**batch)
                seconds.append(time.perf_counter() - started)
    return {name: median(seconds) for name, seconds in found.items()}


def meaning(arms: Arms) -> Measurement:
    """Compare the cosines of sentence embeddings to the dense model's."""
    batch = arms.batch("right")
    mask = batch["attention_mask"][..., None]
    embedded = {}
    for name in TIMED:
        model = getattr(arms, name)
        with evaluating(model):
            hidden = model(**batch).last_hidden_state
        embedded[name] = (hidden * mask).sum(1) / mask.sum(1)
    plain, tiled = (F.cosine_similarity(embedded[name], embedded["dense"]) for name in ("plain", "tiled"))
    apart = float((plain - tiled).abs().max())
    text = f"{apart:.1e} apart; mean cosine to the dense model {float(plain.mean()):.4f} and {float(tiled.mean()):.4f}"
    return Measurement(text, apart <= 1e-5)
