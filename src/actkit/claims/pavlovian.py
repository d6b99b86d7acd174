"""The claims of attention as conditioning: capacities, what error correction predicts, and what it can recall.

Capacities: Hebb's rule, random unit keys of 16 to 512, 200 trials; worst-case crosstalk is the mean over keys of the
sum of |cosines| with the others, mean-square crosstalk the squared error of unit values. Orthogonal keys: up to as many
as the key is long.

The delta rule: half as many pairs as the key is long (64), 200 passes at a rate of 1, ten draws of keys; the largest
error over pairs. Protocols have 100 trials in each phase.

Recall: sequences of pairs (a symbol of 64 with one of 64 others) and then every key, whose answer is its last value; a
quarter of the pairs bind a key again. A pair is one token, the sum of two embeddings, as in no paper: what is compared
is the memory, and not how a model brings a key beside its value. Two layers of width 64 with four heads of 16, each
with an MLP; 600 steps of 64 sequences, Adam at 1e-3 and 3e-3 for both rules, the better one on other data; 3 seeds.

Claims about brains and about large models cannot be checked. About 10 minutes of one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from statistics import mean

import torch
from torch import Tensor, nn

from actkit.claims.outcome import SMALL, SYNTHETIC, Experiment, Measurement, Outcome, Statement, conduct
from actkit.claims.subject import spread
from actkit.core.ground.progress import track
from actkit.interpretation.pavlovian.attention import PavlovianAttention
from actkit.interpretation.pavlovian.capacity import capacity_curve, capacity_exponent
from actkit.interpretation.pavlovian.protocols import run_protocol
from actkit.interpretation.pavlovian.rules import Name, Rule, State, in_chunks

SYMBOLS, WIDTH, HEADS, BATCH = 64, 64, 4, 64
AGAIN = 0.25  # of the pairs bind a key again
SLOPES = {"worst": (0.4, 0.6), "mse": (0.9, 1.1)}
EXACT, CORRECTED, UNCORRECTED = 1e-5, 1e-3, 0.3
GAIN = 0.10


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        seeds: of the models.
        keys: sizes of keys.
        trials: of capacities.
        draws: of keys of the delta rule.
        pairs: of a sequence.
        steps: of a training.
        rates: that are tried.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    keys: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    trials: int = 200
    draws: int = 10
    pairs: tuple[int, ...] = (8, 24)
    steps: int = 600
    rates: tuple[float, ...] = (1e-3, 3e-3)


HOLDS = Statement(
    "A head holds as many associations as the root of its key's size before any interferes, and as many as its size on "
    "average",
    "O(sqrt(d)) (abstract); O(d) on average (a summary of version 2)",
    "slope of log capacity over log size: worst case 0.4 to 0.6, mean square 0.9 to 1.1; orthogonal keys: no error up "
    "to as many as the key is long (1e-5)",
    SYNTHETIC,
)
CORRECTS = Statement(
    "The delta rule corrects what interferes, and predicts what Rescorla and Wagner's model predicts",
    "the framework; no figure",
    "N = d / 2, repeated passes: error <= 1e-3, Hebb's > 0.3; blocking: response to B <= 10 % of A's for delta, >= "
    "40 % for Hebb; overexpectation and inhibition have the right sign for delta alone",
    SYNTHETIC,
)
RECALLS = Statement(
    "With error correction a model recalls more",
    "biologically plausible rules may improve transformers (abstract)",
    "24 pairs, some keys bound again: accuracy with the delta rule at least 10 points above that with Hebb's, a mean "
    "over seeds",
    SMALL,
)
STATEMENTS = (HOLDS, CORRECTS, RECALLS)


def run(sizes: Sizes | None = None, subject: str | None = None, progress: bool = True) -> Outcome:
    """Run the claims.

    Args:
        sizes: how much.
        subject: only the claims on it; None for all.
        progress: show bars.
    """
    sizes = sizes or Sizes()
    experiments: list[Experiment] = []
    if subject in (None, SYNTHETIC):
        experiments += [(HOLDS, partial(holds, sizes)), (CORRECTS, partial(corrects, sizes))]
    if subject in (None, SMALL):
        experiments.append((RECALLS, partial(recalls, sizes, progress)))
    return conduct("pavlovian", experiments, sizes, subject, progress)


def holds(sizes: Sizes) -> Measurement:
    """Capacities over sizes."""
    texts, passed = [], True
    for criterion, (low, high) in SLOPES.items():
        found = []
        for size in sizes.keys:
            most = 3 * size**0.5 if criterion == "worst" else size / 2
            grid = sorted({max(1, round(most * step / 12)) for step in range(1, 13)})
            trials = max(10, sizes.trials * 64 // max(64, size))  # as many pairs of keys
            found.append(capacity_curve("hebb", size, grid, criterion=criterion, trials=trials).capacity())  # type: ignore[arg-type]
        slope = capacity_exponent(sizes.keys, found)
        passed &= low <= slope <= high
        listed = ", ".join(f"{value:.1f} at {size}" for value, size in zip(found, sizes.keys, strict=True))
        texts.append(f"{criterion}: {listed}, slope {slope:.3f}")
    exact = [
        capacity_curve("hebb", size, [1, size // 2, size], keys="orthogonal", criterion="mse", trials=3).values
        for size in sizes.keys
    ]
    worst = max(max(each) for each in exact) ** 0.5
    return Measurement(f"{'; '.join(texts)}; orthogonal keys: error at most {worst:.1e}", passed and worst <= EXACT)


def corrects(sizes: Sizes) -> Measurement:
    """Errors behind repeated passes, and three protocols."""
    draw = torch.Generator().manual_seed(0)
    key = nn.functional.normalize(torch.randn(sizes.draws, 32, 64, generator=draw).double(), dim=-1)
    value = nn.functional.normalize(torch.randn(sizes.draws, 32, 64, generator=draw).double(), dim=-1)
    errors = {}
    for name, passes in (("delta", 200), ("hebb", 1)):
        state = State.empty(key, value)
        for _ in range(passes):
            _, _, state = in_chunks(Rule(name), key, key, value, None, state, 32)  # type: ignore[arg-type]
        errors[name] = (key @ state.memory - value).norm(dim=-1).flatten()
    rules: tuple[Name, ...] = ("delta", "hebb")
    blocked = {rule: run_protocol("blocking", rule, trials=100) for rule in rules}
    shares = {rule: found.last("B") / found.last("A") for rule, found in blocked.items()}
    inhibited = {rule: run_protocol("inhibition", rule, trials=100).last("B") for rule in rules}
    falls = {}
    for rule in rules:
        curve = run_protocol("overexpectation", rule, trials=100).responses["A"]
        falls[rule] = curve[-1] - curve[199]
    passed = (
        float(errors["delta"].max()) <= CORRECTED
        and float(errors["hebb"].min()) > UNCORRECTED
        and shares["delta"] <= 0.1
        and shares["hebb"] >= 0.4
        and inhibited["delta"] < 0 <= inhibited["hebb"]
        and falls["delta"] < 0 <= falls["hebb"]
    )
    text = (
        f"largest error of delta {float(errors['delta'].max()):.1e}, Hebb's {float(errors['hebb'].min()):.2f} to "
        f"{float(errors['hebb'].max()):.2f}; blocking: B at {shares['delta']:.1%} of A, Hebb {shares['hebb']:.0%}; "
        f"inhibition: B at {inhibited['delta']:.2f}, Hebb {inhibited['hebb']:.2f}; overexpectation: A by "
        f"{falls['delta']:+.2f}, Hebb {falls['hebb']:+.2f}"
    )
    return Measurement(text, passed)


# -- recall ------------------------------------------------------------------------------------------------------------


class Recaller(nn.Module):
    """Two layers of association over tokens that are pairs, or keys alone.

    Args:
        rule: of both layers.
    """

    def __init__(self, rule: Name) -> None:
        super().__init__()
        self.keys, self.values = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(SYMBOLS + 1, WIDTH)
        self.mixers = nn.ModuleList(PavlovianAttention(WIDTH, HEADS, rule) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.readout = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS))

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        """Logits of values [batch, length, symbols]."""
        x = self.keys(keys) + self.values(values)
        for norm, mixer, mlp in zip(self.norms, self.mixers, self.mlps, strict=True):
            x = x + mixer(norm(x))
            x = x + mlp(x)
        found: Tensor = self.readout(x)
        return found


def sequences(pairs: int, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [count, 2 * pairs], and the answers [count, pairs] of the tests in the second half."""
    again = round(AGAIN * pairs)
    keys = torch.rand(count, SYMBOLS, generator=draw).argsort(1)[:, : pairs - again]
    repeated = torch.rand(count, pairs - again, generator=draw).argsort(1)[:, :again]
    learned = torch.cat((keys, keys.gather(1, repeated)), 1)  # what is bound again comes after its first binding
    values = torch.randint(SYMBOLS, (count, pairs), generator=draw)
    last = torch.zeros(count, SYMBOLS, dtype=torch.long)
    for at in range(pairs):
        last.scatter_(1, learned[:, at : at + 1], values[:, at : at + 1])
    order = torch.rand(count, pairs, generator=draw).argsort(1)
    asked = learned.gather(1, order)
    blank = torch.full((count, pairs), SYMBOLS)
    return torch.cat((learned, asked), 1), torch.cat((values, blank), 1), last.gather(1, asked)


def trained(rule: Name, pairs: int, rate: float, seed: int, steps: int) -> tuple[float, float]:
    """Accuracy on validation and on test sequences."""
    torch.manual_seed(seed)
    model, draw = Recaller(rule), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        keys, values, answers = sequences(pairs, BATCH, draw)
        logits = model(keys, values)[:, pairs:]
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
        optimizer.step()
        course.step()
    found = []
    for other in (10_001, 10_002):
        keys, values, answers = sequences(pairs, 512, torch.Generator().manual_seed(other))
        with torch.no_grad():
            found.append(float((model(keys, values)[:, pairs:].argmax(-1) == answers).double().mean()))
    return found[0], found[1]


def recalls(sizes: Sizes, progress: bool) -> Measurement:
    """Delta and Hebb on sequences of pairs."""
    once = cache(trained)
    rules: tuple[Name, ...] = ("delta", "hebb")
    arms = [(rule, pairs) for rule in rules for pairs in sizes.pairs]
    texts, means = [], {}
    for rule, pairs in track(arms, "Recall", len(arms), progress):
        first = sizes.seeds[0]
        rate = max(sizes.rates, key=lambda each: once(rule, pairs, each, first, sizes.steps)[0])
        found = [once(rule, pairs, rate, seed, sizes.steps)[1] for seed in sizes.seeds]
        means[rule, pairs] = mean(found)
        texts.append(f"{rule}, {pairs} pairs: {spread([100 * each for each in found])} % ({rate:g})")
    gain = means["delta", sizes.pairs[-1]] - means["hebb", sizes.pairs[-1]]
    return Measurement(f"{'; '.join(texts)}; {100 * gain:+.1f} points", gain >= GAIN)
