"""PLM's claims: a latent cache costs nothing, squared ReLU is sparse and loses little, and its zeros are faster.

What is measured here: two blocks of the published shape with random weights and a vocabulary of 2,048 words, in the
model (float32 and bfloat16) and in the CPU decoder, with latent and with expanded cache; a decoder's step at contexts
of 2,048 and 4,096 tokens of random numbers, interleaved. Language models of about 1 M parameters, trained from scratch
on the embedded text under the WSDC schedule, with an MLP of squared ReLU and with SwiGLU of as many weights; latent
attention, data, order and settings (AdamW, peak 2e-3, bfloat16 autocast) are the same, nothing was tuned for an arm;
losses are those of the last weights on the test split, per next token. One MLP of the published shape with as many
zeros as the small models have, dense and through the kernel that leaves zeros out.

A step is 1,024 tokens. Models so small, trained so briefly, say little about 1.8 B parameters and 2.48 T tokens. The
paper's benchmark scores and its latency on phones cannot be checked here.

About 12 minutes on one core.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from random import Random
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actkit import kernels, zoo
from actkit.claims.outcome import SMALL, SYNTHETIC, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import spread
from actkit.core.forward.hooks import hooked
from actkit.core.measure.quality import measure_quality
from actkit.core.model.anatomy import Site
from actkit.core.train.training import train
from actkit.core.watch.capture import record
from actkit.core.watch.statistics import Density
from actkit.data import Batches, Split, load_data
from actkit.runtime.decoder import Decoder
from actkit.sparsity.plm.latent_attention import CacheForm
from actkit.sparsity.plm.model import LatentCache, PLMConfig, PLMForCausalLM

LENGTH, RATE, WORDS = 128, 2e-3, 2048
FLOAT32, BFLOAT16 = 1e-4, 2e-2  # between logits
READ = 0.15  # of the expanded cache's bytes
ZEROS, LOSS = 0.6, 0.05  # of the units; nats
FASTER = 1.25
FORMS: tuple[CacheForm, ...] = ("latent", "expanded")
SCHEDULE = {"wsdc": {"stable": 0.6, "decay": 0.2, "min_ratio": 0.1}}


@dataclass(frozen=True)
class Sizes:
    """How much is decoded, timed and trained.

    Attributes:
        seeds: of weights and texts.
        shape: entries of the configuration that differ from the published one.
        prompt: tokens read at once.
        decoded: single tokens after them.
        contexts: tokens in the cache when a step is timed.
        rounds: of timings.
        layers: of the trained models.
        steps: of training.
        rows: of 128 tokens per step.
        held_out: rows of 128 test tokens.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    shape: dict[str, int] = field(default_factory=lambda: {"num_hidden_layers": 2, "vocab_size": WORDS})
    prompt: int = 32
    decoded: int = 256
    contexts: tuple[int, ...] = (2048, 4096)
    rounds: int = 15
    layers: int = 4
    steps: int = 400
    rows: int = 8
    held_out: int = 320


SAME = Statement(
    "Latent and expanded caches are the same model",
    "the cache holds a latent of 512 and a key of 64 per token and layer; the published code caches what it expands to",
    "two blocks of the published shape, 256 decoded tokens: the largest difference between logits is below 1e-4 in "
    "float32 (in the model and in the CPU decoder) and below 2e-2 in bfloat16, and the bytes of the caches are exactly "
    "576 to 5120",
    SYNTHETIC,
)
TIME = Statement(
    "A latent cache is read faster than an expanded one",
    "memory-efficient decoding (no figure in the sources that we could read)",
    "the CPU decoder, one block of the published shape: less than 15 % of the bytes, and the median step takes no "
    "longer than with an expanded cache, at 2,048 and at 4,096 tokens of context",
    SYNTHETIC,
)
SPARSE = Statement(
    "Squared ReLU leaves most units at 0 and loses little against SwiGLU",
    "the lowest activated parameters among the models that it compares (the share is only in a figure)",
    "in each of 3 seeds, equal weights and tokens: at least 60 % of the units are exactly 0 after training (mean over "
    "layers, test text), and test loss(squared ReLU) <= test loss(SwiGLU) + 0.05 nats",
    SMALL,
)
FAST = Statement(
    "Zeros that are not read make decoding faster",
    "fewer activated parameters, lower latency (in a figure)",
    "an MLP of 2048 -> 8192 -> 2048, one token, with the share of zeros that the small models have: the median with "
    "the down projection's zeros left out is at least 1.25 times faster than with all of it, same kernel, interleaved",
    SMALL,
)
STATEMENTS = (SAME, TIME, SPARSE, FAST)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims, or those about one subject. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    arms = Arms(sizes, progress)
    experiments = [
        (SAME, partial(same, sizes)),
        (TIME, partial(timed, sizes)),
        (SPARSE, partial(sparse, arms)),
        (FAST, partial(fast, arms)),
    ]
    return conduct("plm", experiments, sizes, subject, progress)


# -- the cache ---------------------------------------------------------------------------------------------------------


def published(sizes: Sizes, **changes: Any) -> PLMForCausalLM:
    """Blocks of the published shape with random weights."""
    torch.manual_seed(0)
    return PLMForCausalLM(PLMConfig.preset("1.8b", **{**sizes.shape, **changes})).eval()


def _set(model: Any, cache: CacheForm) -> Any:
    for layer in model.model.layers:
        layer.self_attn.cache = cache
    return model


def same(sizes: Sizes) -> Measurement:
    """The largest differences between logits, and bytes."""
    ids = torch.randint(sizes.shape["vocab_size"], (1, sizes.prompt + sizes.decoded), generator=_generator())
    model, parts, passed = published(sizes), [], True
    expected = _by_decoder(_set(model, "expanded"), ids)
    differences = {
        "float32, decoder": (float((_by_decoder(_set(model, "latent"), ids) - expected).abs().max()), FLOAT32)
    }
    for name, dtype, limit in (("float32", torch.float32, FLOAT32), ("bfloat16", torch.bfloat16, BFLOAT16)):
        model = model.to(dtype)  # type: ignore[arg-type]
        (latent, small), (expanded, large) = (_by_model(_set(model, cache), ids, sizes) for cache in FORMS)
        differences[name] = float((latent - expanded).abs().max()), limit
    for name, (found, limit) in differences.items():
        parts.append(f"{name} {found:.1e}")
        passed &= found < limit
    each = [cache.nbytes // (cache.get_seq_length() * 2 * sizes.shape["num_hidden_layers"]) for cache in (small, large)]
    scale = float(latent.std())
    here = f"{', '.join(parts)} (logits deviate by {scale:.2f}); {each[0]} and {each[1]} numbers per token and layer"
    return Measurement(here, passed and small.nbytes * 5120 == large.nbytes * 576)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _by_model(model: Any, ids: Tensor, sizes: Sizes) -> tuple[Tensor, LatentCache]:
    """Logits of the decoded tokens, by the module's own forward pass."""
    cache, found = LatentCache(config=model.config), []
    with torch.no_grad():
        model(ids[:, : sizes.prompt], past_key_values=cache)
        for at in range(sizes.prompt, ids.shape[1]):
            found.append(model(ids[:, at : at + 1], past_key_values=cache).logits[0, -1].float())
    return torch.stack(found), cache


def _by_decoder(model: Any, ids: Tensor) -> Tensor:
    with Decoder(model, capacity=ids.shape[1]) as decoder:
        return torch.stack([decoder([token]) for token in ids[0].tolist()])


def timed(sizes: Sizes) -> Measurement:
    """Median seconds of a step at each context, in random order."""
    # the context is longer than the model was made for, if the cache of 4,096 is to take one more token
    model = published(sizes, num_hidden_layers=1, max_position_embeddings=2 * max(sizes.contexts))
    capacity = max(sizes.contexts) + 8
    decoders = {cache: Decoder(_set(model, cache), capacity=capacity) for cache in FORMS}
    generator, shuffle = np.random.default_rng(0), Random(0).shuffle
    for decoder in decoders.values():
        work = decoder._work
        for kept in (work.latent_cache, work.latent_keys, work.latent_values):
            kept[:] = generator.standard_normal(kept.shape, np.float32)
    share = decoders["latent"].cache_bytes / decoders["expanded"].cache_bytes
    parts, passed = [f"{share:.2%} of the bytes"], share < READ
    for context in sizes.contexts:
        seconds: dict[str, list[float]] = {cache: [] for cache in FORMS}
        order = list(FORMS)
        for number in range(sizes.rounds + 2):  # the first two warm up
            shuffle(order)
            for cache in order:
                decoder = decoders[cache]
                decoder.position = context
                start = time.perf_counter()
                decoder([1])
                if number > 1:
                    seconds[cache].append(time.perf_counter() - start)
        latent, expanded = (median(seconds[cache]) for cache in FORMS)
        passed &= latent <= expanded
        parts.append(f"{context} tokens: {latent * 1e3:.1f} and {expanded * 1e3:.1f} ms")
    for decoder in decoders.values():
        decoder.close()
    return Measurement(
        f"latent and expanded, {'; '.join(parts)}; medians of {sizes.rounds} interleaved steps, float32 weights, "
        f"{torch.get_num_threads()} threads",
        passed,
    )


# -- trained models ----------------------------------------------------------------------------------------------------


class GatedMLP(nn.Module):
    """SwiGLU with as many weights as an ungated MLP of 1.5 times its units."""

    def __init__(self, hidden: int, units: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, units, bias=False)
        self.up_proj = nn.Linear(hidden, units, bias=False)
        self.down_proj = nn.Linear(units, hidden, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def fresh(arm: str, seed: int, sizes: Sizes) -> PLMForCausalLM:
    """A model with random weights: 'squared ReLU' or 'SwiGLU'."""
    torch.manual_seed(seed)
    config = PLMConfig(
        vocab_size=WORDS,
        hidden_size=128,
        intermediate_size=576,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = PLMForCausalLM(config)
    if arm == "SwiGLU":
        for layer in model.model.layers:
            layer.mlp = GatedMLP(128, 384)
            layer.mlp.apply(model._init_weights)
    return model


@dataclass
class Arms:
    """The trained models, and what was seen of them; each is trained when it is first needed.

    Attributes:
        sizes: how much is trained.
        progress: show bars.
        course: of each model with squared ReLU, the share of zeros in each quarter of the training.
    """

    sizes: Sizes
    progress: bool = False
    course: dict[int, list[float]] = field(default_factory=dict)
    _models: dict[tuple[str, int], PLMForCausalLM] = field(default_factory=dict)

    def model(self, arm: str, seed: int) -> PLMForCausalLM:
        """The trained model of an arm."""
        if (arm, seed) not in self._models:
            sizes, model = self.sizes, fresh(arm, seed, self.sizes)
            shares: list[float] = []

            def count(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                if torch.is_grad_enabled():
                    shares.append(float((output == 0).float().mean()))

            paths = [f"model.layers.{index}.mlp.act_fn" for index in range(sizes.layers)]
            with hooked(model, after=dict.fromkeys(paths, count)):
                train(
                    model,
                    _text(model, "train", sizes.rows * sizes.steps, sizes.rows, seed),
                    validation=_text(model, "search", sizes.rows, sizes.rows, seed),
                    steps=sizes.steps,
                    learning_rate=RATE,
                    schedule=SCHEDULE,
                    mixed_precision="bf16",
                    seed=seed,
                    evaluate_every=sizes.steps,
                    keep="last",
                    progress=self.progress,
                )
            if arm == "squared ReLU":
                ends = [len(shares) * quarter // 4 for quarter in range(5)]
                self.course[seed] = [mean(shares[a:b]) for a, b in pairwise(ends)]
            self._models[arm, seed] = model.eval()
        return self._models[arm, seed]

    def loss(self, arm: str, seed: int) -> float:
        """Nats per token of an arm on test text."""
        model = self.model(arm, seed)
        quality = measure_quality(model, self.held_out(model), task="language", resamples=1, progress=False)
        return math.log(quality.metrics["perplexity"].value)

    def zeros(self, seed: int) -> float:
        """Share of the units of squared ReLU that are exactly 0 on test text, the mean over layers."""
        model = self.model("squared ReLU", seed)
        seen = record(model, {"mlp.hidden": Density()}, self.held_out(model), progress=False)
        return 1 - mean(seen[Site("mlp.hidden", index)].density for index in range(self.sizes.layers))

    def held_out(self, model: nn.Module) -> Batches:
        """Rows of the test split."""
        return _text(model, "test", self.sizes.held_out, 16)


def _text(model: nn.Module, split: Split, rows: int, batch: int, seed: int = 0) -> Batches:
    tokenizer = zoo.tokenizer("swiglu")
    return load_data(None, model, tokenizer, sequences=rows, length=LENGTH, batch_size=batch, seed=seed, split=split)


def sparse(arms: Arms) -> Measurement:
    """Shares of zeros, and test losses."""
    seeds = arms.sizes.seeds
    zeros = [arms.zeros(seed) for seed in seeds]
    ours, theirs = ([arms.loss(arm, seed) for seed in seeds] for arm in ("squared ReLU", "SwiGLU"))
    course = ", ".join(f"{mean(quarter):.1%}" for quarter in zip(*(arms.course[seed] for seed in seeds), strict=True))
    size = sum(parameter.numel() for parameter in arms.model("squared ReLU", seeds[0]).parameters())
    here = (
        f"zeros {spread(zeros, '.1%')}, in the quarters of the training {course}; nats: squared ReLU "
        f"{spread(ours, '.3f')}, SwiGLU {spread(theirs, '.3f')}; differences "
        f"{', '.join(f'{a - b:+.3f}' for a, b in zip(ours, theirs, strict=True))}; {size:,} parameters"
    )
    held = [share >= ZEROS and a <= b + LOSS for share, a, b in zip(zeros, ours, theirs, strict=True)]
    return Measurement(here, all(held))


# -- zeros that are not read -------------------------------------------------------------------------------------------


def fast(arms: Arms) -> Measurement:
    """Seconds of one token through an MLP, in random order, with the share of zeros that was measured."""
    share = mean(arms.zeros(seed) for seed in arms.sizes.seeds)
    config = PLMConfig.preset("1.8b")
    width, units = config.hidden_size, config.intermediate_size
    generator, shuffle = _generator(), Random(0).shuffle
    up, down = (
        kernels.pack(torch.randn(*shape, generator=generator).to(torch.bfloat16))
        for shape in ((units, width), (width, units))
    )
    x = torch.randn(1, width, generator=generator)
    pre = kernels.dense_linear(x, up)
    cut = pre.flatten().kthvalue(max(1, round(share * units))).values

    def hidden() -> Tensor:
        return (kernels.dense_linear(x, up) - cut).clamp_(min=0).square_()

    functions: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: kernels.dense_linear(hidden(), down),
        "sparse": lambda: kernels.sparse_linear(hidden(), down, threshold=0.0),
    }
    torch.testing.assert_close(functions["sparse"](), functions["dense"](), rtol=1e-4, atol=1e-2)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for number in range(4 * arms.sizes.rounds + 4):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            functions[name]()
            if number > 3:
                seconds[name].append(time.perf_counter() - start)
    dense, skipping = (median(seconds[name]) for name in ("dense", "sparse"))
    here = (
        f"{share:.1%} zeros: {dense / skipping:.2f}x, {dense * 1e3:.2f} and {skipping * 1e3:.2f} ms, medians of "
        f"{4 * arms.sizes.rounds} interleaved rounds, bfloat16 weights, {torch.get_num_threads()} threads"
    )
    return Measurement(here, dense / skipping >= FASTER)
