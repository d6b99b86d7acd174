"""EdgeMoE's claims: paths of experts that can be predicted, preloads and an eviction that use it, widths by importance.

Measured on the zoo's Mixtral (6 layers of 8 experts, of which a token takes 2). Routers' choices of 20,480 tokens of
calibration text and of 10,240 tokens of other documents. Times are those of the sheet, in a simulation with a cache of
25 % of the bytes of all experts in 8 bits: a layer computes for 1.0 ms, an expert in 8 bits is read in 2.0 ms, and all
else in proportion to its bytes. How many experts are preloaded, and from which probability on, is chosen on a part of
the calibration text; the policy of the baseline too (LRU is the one that is claimed about; the best of LRU, LFU and
FIFO stands beside it). Real threads read a store whose reads return when a disk of that speed would have them.

The published eviction formula was not seen (`sparsity/edgemoe/expert_cache.py`), and the paper's coverage of paths is
that of large models on the data of tasks. Jetson boards, phones and Switch Transformers cannot be checked here.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from threading import Event
from typing import Any

import torch

from actkit import zoo
from actkit.claims.outcome import Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import spread
from actkit.core.forward.hooks import evaluating
from actkit.core.layers.linear import pack_for_decode
from actkit.core.recipe.runner import apply
from actkit.core.store.expert_store import ExpertStore
from actkit.core.train.objective import Objective
from actkit.data import Batches, Split, load_data
from actkit.sparsity.edgemoe.expert_bits import ExpertBits, plan_bits
from actkit.sparsity.edgemoe.expert_cache import ExpertCache, Key, Policy, steps_of
from actkit.sparsity.edgemoe.expert_fetcher import ExpertFetcher
from actkit.sparsity.edgemoe.offloaded_moe import OffloadedMoE
from actkit.sparsity.edgemoe.path_predictor import PathPredictor, Trace, record_traces
from actkit.sparsity.edgemoe.simulate import Simulated, lower_bound_ms, simulate
from actkit.sparsity.edgemoe.throttled_store import wait

MODEL = "mixtral"
LENGTH = 256  # tokens of a text
COMPUTE_MS, READ_MS = 1.0, 2.0  # of a layer; of an expert in 8 bits
SHARE = 0.25  # of the bytes of all experts in 8 bits: the budget
TOLERANCE = 0.01  # share by which the loss may rise
WIDTHS = (2, 4, 8)
PRELOADS = tuple((count, least) for count in (1, 2, 3) for least in (0.0, 0.3, 0.5, 0.7, 0.9))


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        seeds: of the text that widths are found on.
        calibration: texts of 256 tokens whose choices are counted.
        tuning: texts of the calibration on which the preloads are chosen; the others are counted then.
        test: texts of other documents.
        widths: texts of 256 tokens that the loss is measured on, for each seed.
        threads: tokens that real threads work through.
        logits: tokens whose logits are compared.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    calibration: int = 80
    tuning: int = 8
    test: int = 40
    widths: int = 8
    threads: int = 150
    logits: int = 64


PATHS = Statement(
    "The experts of a layer follow from those of the two layers before",
    "the top 20 % of two-layer paths cover over 99 % of activations (note on the paper)",
    "on other documents: the 20 % most frequent two-layer paths of the calibration cover at least 60 % of activations, "
    "and the most probable expert given two layers is among those chosen at least 10 points more often than the most "
    "frequent one",
    MODEL,
)
RUNTIME = Statement(
    "Preloads and EdgeMoE's eviction are faster than reading on demand with LRU",
    "1.19x to 2.77x against baselines that save memory (note on the later version)",
    "simulation, all experts in 8 bits, 25 % of them in memory, 1.0 ms per layer and 2.0 ms per read: the time of a "
    "token is at most 0.85 x that of reading on demand with LRU (1.18x faster), and no less than with Belady's "
    "eviction and preloads that are always right",
    MODEL,
)
WHOLE = Statement(
    "With widths by importance too, it is faster than one width for all at the same quality",
    "no figure of the parts together known to us",
    "simulation as above, same bytes per second and the same budget: the time of a token with adaptive widths, "
    "preloads and EdgeMoE's eviction is at most 0.85 x that of reading on demand with LRU, all experts in the best one "
    "width that keeps the tolerance of 1 %, in each of 3 seeds",
    MODEL,
)
THREADS = Statement(
    "Threads that read behave as the simulation says",
    "not in the paper",
    "a store read at the simulated speed, by a thread: the time of a token is within 25 % of the simulation's, on "
    "demand with LRU, and with preloads and EdgeMoE's eviction",
    MODEL,
)
BITS = Statement(
    "Widths by importance take fewer bytes than one width for all",
    "memory 1.05x to 1.18x less than the whole model (survey)",
    "tolerance of 1 % of the validation loss, widths of 2, 4 and 8 bits by rows: the experts take at least 10 % fewer "
    "bytes than in the best one width that keeps the same tolerance, in each of 3 seeds",
    MODEL,
)
EXACT = Statement(
    "Experts from a store compute what experts in memory do, within the budget",
    "not in the paper",
    "logits of a text as a whole and token by token equal those of the resident model with the same codes bit for bit, "
    "and the experts in memory never take more than the budget",
    MODEL,
)
STATEMENTS = (PATHS, RUNTIME, WHOLE, THREADS, BITS, EXACT)


def run(*, subject: str | None = None, progress: bool = True, sizes: Sizes | None = None) -> Outcome:
    """Run the claims. sizes: smaller ones, for a try."""
    sizes = sizes or Sizes()
    mixture = Mixture(sizes)
    with tempfile.TemporaryDirectory() as folder:
        experiments: list[Experiment] = [
            (PATHS, partial(paths, mixture)),
            (RUNTIME, partial(runtime, mixture)),
            (WHOLE, partial(whole, mixture)),
            (THREADS, partial(threads, mixture, Path(folder))),
            (BITS, partial(bits, mixture)),
            (EXACT, partial(exact, mixture, Path(folder))),
        ]
        return conduct("edgemoe", experiments, sizes, subject, progress)


class Mixture:
    """The model, what its routers chose, and what was chosen on the calibration."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.model = sizes, zoo.load(MODEL)
        config: Any = self.model.config
        self.layers, self.experts = config.num_hidden_layers, config.num_local_experts
        self.keys: list[Key] = [(layer, e) for layer in range(self.layers) for e in range(self.experts)]
        self.names = {f"model.layers.{layer}.mlp.experts.{e}": (layer, e) for layer, e in self.keys}
        self._plans: dict[int, dict[str, int]] = {}
        self._preloads: dict[str, dict[str, Any]] = {}

    def text(self, rows: int, seed: int, split: Split) -> Batches:
        """Texts of 256 tokens."""
        given: dict[str, Any] = {"sequences": rows, "length": LENGTH, "batch_size": 8, "seed": seed, "split": split}
        return load_data(None, self.model, zoo.tokenizer(MODEL), **given)

    @cached_property
    def calibration(self) -> list[Trace]:
        """What the routers chose on the calibration text."""
        return record_traces(self.model, self.text(self.sizes.calibration, 0, "train"))

    @cached_property
    def test(self) -> list[Trace]:
        """The same on other documents."""
        return record_traces(self.model, self.text(self.sizes.test, 0, "test"))

    @cached_property
    def predictor(self) -> PathPredictor:
        """Of the whole calibration text."""
        return PathPredictor.fit(self.calibration, self.experts)

    # -- times

    @cached_property
    def bytes_of(self) -> dict[int, int]:
        """Bytes of an expert in so many bits: codes, and a scale of 16 bits and a zero point for each row."""
        config: Any = self.model.config
        weights, rows = 3 * config.hidden_size * config.intermediate_size, 2 * config.intermediate_size
        return {width: weights * width // 8 + 3 * (rows + config.hidden_size) for width in WIDTHS}

    def sizes_of(self, widths: Mapping[str, int] | int) -> dict[Key, int]:
        """Bytes of each expert."""
        if isinstance(widths, int):
            return dict.fromkeys(self.keys, self.bytes_of[widths])
        return {self.names[name]: self.bytes_of[width] for name, width in widths.items()}

    @property
    def budget(self) -> int:
        """Bytes of experts in memory."""
        return int(SHARE * len(self.keys) * self.bytes_of[8])

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.bytes_of[8] / READ_MS * 1000

    def simulated(self, widths: Mapping[str, int] | int, traces: Sequence[Trace], **settings: Any) -> Simulated:
        """Run traces through a simulation at the sheet's times."""
        return simulate(
            traces, self.sizes_of(widths), self.budget, bandwidth=self.bandwidth, compute_ms=COMPUTE_MS, **settings
        )

    def preloads(self, widths: Mapping[str, int] | int) -> dict[str, Any]:
        """How many are preloaded, and from which probability on: the best on the last texts of the calibration."""
        key = repr(widths)
        if key not in self._preloads:
            self._preloads[key] = self._best_preloads(widths)
        return self._preloads[key]

    def _best_preloads(self, widths: Mapping[str, int] | int) -> dict[str, Any]:
        some = self.calibration[: -self.sizes.tuning], self.calibration[-self.sizes.tuning :]
        predictor = PathPredictor.fit(some[0], self.experts)
        times = {
            (count, least): self.simulated(widths, some[1], predictor=predictor, preload=count, least=least).token_ms
            for count, least in PRELOADS
        }
        count, least = min(times, key=times.__getitem__)
        return {"preload": count, "least": least}

    # -- widths

    def plan(self, seed: int) -> dict[str, int]:
        """Widths by importance, on the validation text of a seed."""
        if seed not in self._plans:
            found = plan_bits(self.model, self._validation(seed), tolerance=TOLERANCE, widths=WIDTHS)
            self._plans[seed] = found
        return self._plans[seed]

    def one_width(self, seed: int) -> int:
        """The lowest width that all experts may have at the same tolerance; the highest if none keeps it."""
        bound = self.loss(self._validation(seed)) * (1 + TOLERANCE)
        for width in WIDTHS:
            if self.loss(self._validation(seed), dict.fromkeys(self.names, width)) <= bound:
                return width
        return WIDTHS[-1]

    def _validation(self, seed: int) -> Batches:
        return self.text(self.sizes.widths, seed, "calibration")

    def loss(self, batches: Batches, widths: Mapping[str, int] | None = None) -> float:
        """The mean loss per token, with experts in so many bits."""
        objective, total, count = Objective(self.model, None), 0.0, 0
        applied = None
        if widths is not None:
            applied = apply(self.model, [ExpertBits(bits=dict(widths))], undo="memory", progress=False)
        with evaluating(self.model):
            for batch in batches:
                labels = objective.labels(batch)
                total, count = total + float(objective(self.model, batch)) * labels, count + labels
        if applied is not None:
            applied.undo()
        return total / count


def paths(mixture: Mixture) -> Measurement:
    """Coverage and accuracy on other documents."""
    predictor, test = mixture.predictor, mixture.test
    covered = predictor.coverage(test)
    right = {order: predictor.accuracy(test, order) for order in (0, 1, 2)}
    here = (
        f"the top 20 % of paths cover {covered:.1%}; the most probable expert is among those chosen for {right[2]:.1%} "
        f"of layers given two layers, {right[1]:.1%} given one, {right[0]:.1%} given none"
    )
    return Measurement(here, covered >= 0.6 and right[2] - right[0] >= 0.1)


def runtime(mixture: Mixture) -> Measurement:
    """Times of a token beside those of other policies and of oracles."""
    run_ = partial(mixture.simulated, 8, mixture.test)
    chosen = mixture.preloads(8)
    lru = run_(policy="lru")
    ours = run_(predictor=mixture.predictor, **chosen)
    lone = run_(predictor=mixture.predictor)
    others: dict[Policy, float] = {policy: run_(policy=policy).token_ms for policy in ("lfu", "fifo")}
    belady, oracle = run_(policy="belady"), run_(policy="belady", oracle=True)
    next_known = run_(predictor=mixture.predictor, oracle=True)
    tokens = sum(map(len, mixture.test))
    bound = lower_bound_ms(belady.reads, READ_MS, mixture.layers, COMPUTE_MS, tokens)
    ratio = ours.token_ms / lru.token_ms
    here = (
        f"{ratio:.3f} x ({1 / ratio:.2f}x faster): {ours.token_ms:.2f} ms, up to {chosen['preload']} preloads from a "
        f"probability of {chosen['least']}, {ours.hit_rate:.1%} in memory; on demand with LRU {lru.token_ms:.2f} ms, "
        f"{lru.hit_rate:.1%} (LFU {others['lfu']:.2f}, FIFO {others['fifo']:.2f}, EdgeMoE's eviction alone "
        f"{lone.token_ms:.2f}, Belady {belady.token_ms:.2f}); with preloads that are always right "
        f"{next_known.token_ms:.2f} (EdgeMoE's eviction) and {oracle.token_ms:.2f} (Belady); bound {bound:.2f}. Bytes "
        f"read: {ours.bytes_read / lru.bytes_read:.2f} x those of LRU"
    )
    return Measurement(here, ratio <= 0.85 and ours.token_ms >= oracle.token_ms)


def whole(mixture: Mixture) -> Measurement:
    """Adaptive widths, preloads and eviction together, for the plan of each seed."""
    ratios, parts, ours, plain = [], [], [], []
    for seed in mixture.sizes.seeds:
        plan, base = mixture.plan(seed), mixture.one_width(seed)
        lru = mixture.simulated(base, mixture.test, policy="lru")
        chosen = mixture.preloads(plan)
        found = mixture.simulated(plan, mixture.test, predictor=mixture.predictor, **chosen)
        ratios.append(found.token_ms / lru.token_ms)
        parts.append(found.token_ms / mixture.simulated(plan, mixture.test, policy="lru").token_ms)
        ours.append(found.token_ms)
        plain.append(lru.token_ms)
    here = (
        f"{spread(ratios, '.3f')} x: {spread(ours)} ms, on demand with LRU in one width {spread(plain)} ms; with the "
        f"same widths for both {spread(parts, '.3f')} x"
    )
    return Measurement(here, max(ratios) <= 0.85)


def threads(mixture: Mixture, folder: Path) -> Measurement:
    """Replay traces with a thread that reads a throttled disk, computing by waiting."""
    trace = mixture.test[0][: mixture.sizes.threads]
    settings = mixture.preloads(8)
    shown, worst = [], 0.0
    for name, policy, predictor in (("LRU", "lru", None), ("preloads", "edgemoe", mixture.predictor)):
        given: dict[str, Any] = {"policy": policy, "predictor": predictor, **(settings if predictor else {})}
        expected = mixture.simulated(8, [trace], **given).token_ms
        found = _replayed(mixture, trace, **given)
        worst = max(worst, abs(found / expected - 1))
        shown.append(f"{name} {found:.2f} ms for {expected:.2f}")
    return Measurement(f"{', '.join(shown)}; off by {worst:.1%} at most", worst <= 0.25)


def _replayed(
    mixture: Mixture,
    trace: Trace,
    *,
    policy: Policy,
    predictor: PathPredictor | None,
    preload: int = 0,
    least: float = 0,
) -> float:
    """Milliseconds of a token with real threads."""
    sizes = mixture.sizes_of(8)
    shares = None if predictor is None else predictor.shares
    cache = ExpertCache(mixture.budget, policy, layers=mixture.layers, shares=shares)

    def read(key: Key, unwanted: Event) -> Key:
        wait(time.perf_counter(), sizes[key] / mixture.bandwidth, sizes[key], unwanted)
        return key

    fetcher = ExpertFetcher(read, sizes, cache)
    steps, begun = steps_of([trace]), time.perf_counter()
    try:
        for step, chosen in enumerate(steps):
            layer = chosen[0][0]
            fetcher.begin(layer, chosen)
            if predictor is not None:
                following = (layer + 1) % mixture.layers
                past = [[e for _, e in each] for each in steps[max(0, step - 1) : step + 1]]
                chances = predictor.predict(following, past)
                fetcher.preload({(following, e): chance for e, chance in chances.items()}, preload, least)
            for key in chosen:
                fetcher.get(key)
            time.sleep(COMPUTE_MS / 1000)
            for key in chosen:
                fetcher.release(key)
        return 1000 * (time.perf_counter() - begun) / len(trace)
    finally:
        fetcher.close()


def bits(mixture: Mixture) -> Measurement:
    """Bytes of adaptive widths over those of one width, and what they lose on other text."""
    held_out = mixture.text(mixture.sizes.widths, 0, "test")
    exact_loss, shares, rises, counts = mixture.loss(held_out), [], [], []
    for seed in mixture.sizes.seeds:
        plan, base = mixture.plan(seed), mixture.one_width(seed)
        shares.append(sum(mixture.sizes_of(plan).values()) / sum(mixture.sizes_of(base).values()))
        rises.append(100 * (mixture.loss(held_out, plan) / exact_loss - 1))
        counts.append(f"{base}: " + "/".join(str(list(plan.values()).count(width)) for width in WIDTHS))
    here = (
        f"{spread(shares, '.3f')} x the bytes of one width; one width and experts in 2/4/8 bits by seed: "
        f"{', '.join(counts)}; the loss on other documents rises by {spread(rises)} %"
    )
    return Measurement(here, max(shares) <= 0.9)


def exact(mixture: Mixture, folder: Path) -> Measurement:
    """Logits from a store with the widths of the first seed against the resident model."""
    plan, source = mixture.plan(mixture.sizes.seeds[0]), zoo.path(MODEL)
    ids = mixture.text(1, 0, "test")[0]["input_ids"][:, : mixture.sizes.logits]
    resident = apply(zoo.load(MODEL), [ExpertBits(bits=plan)], progress=False).model
    for parameter in resident.parameters():  # in memory of its own, as products may depend on where weights lie
        parameter.data = parameter.data.clone()
    assert pack_for_decode(resident)
    with ExpertStore.create(source, folder / "experts.bin", plan, progress=False) as store:
        budget = int(SHARE * store.nbytes)
        with (
            OffloadedMoE.open(source, store, budget=budget, dtype=torch.float32, predictor=mixture.predictor) as stored,
            stored.running() as model,
            evaluating(model),
            evaluating(resident),
        ):
            same = torch.equal(model(input_ids=ids).logits, resident(input_ids=ids).logits)
            caches: list[Any] = [None, None]
            equal = 0
            for token in ids.split(1, 1):
                outputs = [
                    each(input_ids=token, past_key_values=cache, use_cache=True)
                    for each, cache in zip((model, resident), caches, strict=True)
                ]
                caches = [output.past_key_values for output in outputs]
                equal += torch.equal(outputs[0].logits, outputs[1].logits)
            found = stored.statistics
            here = (
                f"whole text {'equal' if same else 'not equal'}, {equal} of {ids.shape[1]} tokens one by one equal; at "
                f"most {found.most_bytes:,} bytes of {budget:,} ({store.nbytes:,} in all), {found.hit_rate:.1%} of the "
                f"chosen experts in memory, {store.describe().rpartition('; ')[2]}"
            )
            return Measurement(here, same and equal == ids.shape[1] and found.most_bytes <= budget)
