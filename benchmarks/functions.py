"""Layers that learn their functions, learned activations, attention without softmax: seconds and bytes.

    python benchmarks/functions.py [--quick] [--json PATH|-] [--only layers activations qkan fits attention decoding]

layers: `KanLinear` with each basis (8 functions) beside a GELU MLP of equally many parameters, eager and compiled, the
best of the two is the measure; and beside splines of other packages at the same shape (pykan, inkan, flashkan), and
efficient-KAN's formulation written out. 1,024 rows. activations: a rational and PolyNorm beside `F.gelu` and plain
autograd. qkan: a layer of QKAN beside that of the package `qkan` with its exact solver, both measured by <Z>, all
parameters learned. fits: `gr_kan` applied to SmolLM2-135M beside a plain pass over its calibration rows. attention:
LSSAR beside eager softmax and SDPA, one sequence of 8 heads. decoding: the CPU decoder at the 1.1B shape, bfloat16,
random weights, with SiLU gates and with learned ones; the three take turns in one process.

Forward and backward passes are timed apart, interleaved, in one process with two threads, on inputs that rotate over
more memory than the caches have. `saved MB` is what is kept for the backward pass, each storage once, without
parameters. `peak MB` of attention is taken in a process of its own, on top of what it had before the call.

The targets were set before the first run. A package that is not there is a row that says so (`make bench-functions`
installs them).
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "decode_workers")]

import common  # isort: skip
import torch
from protocol import SHAPES
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import actkit
from actkit.core.measure.saved_tensors import saved_tensors
from actkit.core.univariate.bases import Bells, BSplines, Bumps, Polynomials
from actkit.core.univariate.basis import Basis
from actkit.core.univariate.fit_rational import rational_like
from actkit.core.univariate.kan_linear import KanLinear
from actkit.functions.crrelu.crrelu import CRReLU
from actkit.functions.kat.group_rational import GroupRational
from actkit.functions.polycom.polynomials import PolyNorm
from actkit.functions.qkan.qkan_layer import QkanLayer
from actkit.functions.softplus_attention.weights import softplus_attention
from actkit.runtime.decoder import Decoder
from actkit.testing.random_llama import random_llama

PARTS = ("layers", "activations", "qkan", "fits", "attention", "decoding")
BASES: dict[str, Callable[[], Basis]] = {
    "B-splines": lambda: BSplines(5, 3),
    "Gaussian bells": lambda: Bells(8),
    "tanh bells": lambda: Bells(8, (-1.2, 0.2), 2.0, "tanh"),
    "Chebyshev": lambda: Polynomials(7),
    "bumps": lambda: Bumps(5, 3),
}
FULL: dict[str, Any] = {
    "widths": (64, 256, 768),
    "rows": 1024,
    "rounds": 12,
    "lengths": (1024, 2048, 8192),
    "qkan": 32,
    "model": ("smollm2", 16, 256, 3),
    "shape": "1.1B",
}
QUICK: dict[str, Any] = {"widths": (64, 128), "rows": 256, "rounds": 4, "lengths": (256, 512), "shape": "tiny"}
QUICK |= {"qkan": 8, "model": ("swiglu", 4, 64, 2)}
MEASURED = (256, 768)  # the widths that have targets
MLP, COMPILED = "GELU MLP", "GELU MLP, compiled"


class Mlp(nn.Module):
    """width -> hidden -> width, with as many parameters as a layer of 8 functions on each edge."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class CoxDeBoor(nn.Module):
    """Cubic splines on 5 intervals by their recursion, as efficient-KAN evaluates them, and a base branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("knots", (torch.arange(12) - 3.0) * 0.4 - 1)
        self.base, self.spline = nn.Linear(width, width, False), nn.Linear(8 * width, width, False)

    def forward(self, x: Tensor) -> Tensor:
        knots, wide = self.knots, x.unsqueeze(-1)
        values = ((wide >= knots[:-1]) & (wide < knots[1:])).to(x.dtype)
        for k in range(1, 4):
            left = (wide - knots[: -(k + 1)]) / (knots[k:-1] - knots[: -(k + 1)]) * values[..., :-1]
            values = left + (knots[k + 1 :] - wide) / (knots[k + 1 :] - knots[1:-k]) * values[..., 1:]
        return self.base(F.silu(x)) + self.spline(values.flatten(-2))


class PlainPolyNorm(nn.Module):
    """The formula of PolyNorm, with autograd's own gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((3,), 1 / 3)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        powers = [x ** (3 - i) for i in range(3)]
        normed = [p / (p.square().mean(-1, keepdim=True) + 1e-6).sqrt() for p in powers]
        return self.bias + sum(w * p for w, p in zip(self.weight, normed))


# -- measuring ---------------------------------------------------------------------------------------------------------


def take_turns(
    variants: Mapping[str, Callable[[Tensor], Tensor]], shape: tuple[int, ...], rounds: int, title: str
) -> dict[str, dict[str, Any]]:
    """Seconds of the forward and the backward pass of each variant in each round, and the bytes that it saves."""
    count = max(2, min(16, -(-2 * common.last_level_cache() // (4 * torch.Size(shape).numel()))))
    inputs = [torch.randn(shape).requires_grad_() for _ in range(count)]
    found: dict[str, dict[str, Any]] = {name: {"forward": [], "backward": []} for name in variants}
    order, shuffle, turn = list(variants), Random(0).shuffle, 0
    for number in track(range(rounds + 2), title, console=Console(stderr=True), transient=True):  # two warm up
        shuffle(order)
        for name in order:
            turn += 1
            x = inputs[turn % count]
            start = time.perf_counter()
            y = variants[name](x)
            middle = time.perf_counter()
            y.backward(x.detach() if y.shape == x.shape else torch.ones_like(y))
            end = time.perf_counter()
            x.grad = None
            if number > 1:
                found[name]["forward"].append(middle - start)
                found[name]["backward"].append(end - middle)
    for name, variant in variants.items():
        with saved_tensors(variant if isinstance(variant, nn.Module) else nn.Identity()) as kept:
            y = variant(inputs[0])  # alive while it is counted
        found[name]["saved"] = kept.bytes
    return found


def rows_of(found: dict[str, dict[str, Any]], best: str, **about: Any) -> list[dict[str, Any]]:
    """A row per variant: medians, and ratios to the variant `best`."""
    rows = []
    for name, own in found.items():
        row: dict[str, Any] = {**about, "row": name}
        for part in ("forward", "backward"):
            row[f"{part} ms"] = round(median(own[part]) * 1e3, 3)
            row[f"{part} ratio"] = round(common.ratio(own[part], found[best][part])["ratio"], 3)
            row[f"{part} deciles"] = common.ratio(own[part], found[best][part])["deciles"]
        row["saved MB"] = round(own["saved"] / 1e6, 3)
        row["saved ratio"] = round(own["saved"] / max(1, found[best]["saved"]), 3)
        rows.append(row)
    return rows


def named(rows: list[dict[str, Any]], name: str, **about: Any) -> dict[str, Any] | None:
    """The row of a variant, or None."""
    wanted = {"row": name, **about}
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


# -- layers ------------------------------------------------------------------------------------------------------------


def peers(width: int) -> dict[str, nn.Module | str]:
    """Spline layers of other packages at the same shape, or why one is not there."""
    site = next((HERE.parent / ".venv-bench").glob("lib/python*/site-packages"), None)
    if site is not None and str(site) not in sys.path:
        sys.path.append(str(site))  # behind our own packages
    made: dict[str, nn.Module | str] = {}
    for name, make in {"pykan": _pykan, "inkan": _inkan, "flashkan": _flashkan}.items():
        try:
            made[name] = make(width)
        except Exception as error:
            made[name] = f"{type(error).__name__}: {error}"[:120]
    return made


def _pykan(width: int) -> nn.Module:
    from kan.KANLayer import KANLayer

    class First(nn.Module):
        """What the layer returns first."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = KANLayer(width, width, num=5, k=3, save_plot_data=False)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(x)[0]
            return found

    return First()


def _inkan(width: int) -> nn.Module:
    from inkan import KANLayer

    return KANLayer(width, width, 5, 3)


def _flashkan(width: int) -> nn.Module:
    from flashkan import KANLayer

    return KANLayer(width, width, 5, 3)


def compiled(model: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor] | None, float | str]:
    """The compiled model and the seconds that took, or None and why there is none."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.compile(model)
            found(x).sum().backward()
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"[:120]
    return found, time.perf_counter() - start


def layers(setting: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and targets of layers."""
    rows: list[dict[str, Any]] = []
    for width in setting["widths"]:
        torch.manual_seed(0)
        shape = (setting["rows"], width)
        mlp = Mlp(width)
        variants: dict[str, Any] = {MLP: mlp}
        fast, seconds = compiled(mlp, torch.randn(shape).requires_grad_())
        if fast is not None:
            variants[COMPILED] = fast
        variants |= {name: KanLinear(width, width, make()) for name, make in BASES.items()}
        variants["B-splines and base"] = KanLinear(width, width, BSplines(5, 3), base="silu", bias=False)
        variants["Cox-de Boor"] = CoxDeBoor(width)
        missing: dict[str, str] = {}
        for name, made in peers(width).items():
            if isinstance(made, str):
                missing[name] = made
            elif name == "pykan" and width > MEASURED[0]:
                missing[name] = f"not at this width: it takes {4 * setting['rows'] * width * width * 9 / 1e9:.0f} GB"
            else:
                variants[name] = made
        found = take_turns(variants, shape, setting["rounds"], f"layers {width} wide")
        total = {n: median(found[n]["forward"]) + median(found[n]["backward"]) for n in (MLP, COMPILED) if n in found}
        best = min(total, key=lambda name: total[name])
        own = rows_of(found, best, width=width)
        for row in own:
            if row["row"] == COMPILED:
                row["about"] = f"compiled in {seconds:.1f} s"
        own += [{"width": width, "row": name, "about": reason} for name, reason in missing.items()]
        if fast is None:
            own.append({"width": width, "row": COMPILED, "about": str(seconds)})
        rows += own
    targets: list[dict[str, Any]] = []
    for width in setting["widths"]:
        for name in BASES if width in MEASURED else ():
            row = named(rows, name, width=width)
            assert row is not None
            about = f"{width} wide, {name}"
            targets += [
                common.target(f"{about}: forward, over the MLP", row["forward ratio"], at_most=1.5),
                common.target(f"{about}: backward, over the MLP", row["backward ratio"], at_most=2.0),
                common.target(f"{about}: saved, over the MLP", row["saved ratio"], at_most=1.0),
            ]
        ours = named(rows, "B-splines and base", width=width)
        assert ours is not None
        for name, least in {"pykan": 10.0, "Cox-de Boor": 4.0, "inkan": 1.0, "flashkan": 1.0}.items():
            peer = named(rows, name, width=width)
            if width in MEASURED and peer is not None and "forward ms" in peer:
                step = [each["forward ms"] + each["backward ms"] for each in (peer, ours)]
                targets.append(
                    common.target(f"{width} wide: {name}'s step, over ours", step[0] / step[1], at_least=least)
                )
    return rows, targets


# -- activations -------------------------------------------------------------------------------------------------------


def activations(setting: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and targets of activations."""
    channels = 4 * setting["widths"][-1]
    shape = (setting["rows"], channels)
    variants: dict[str, Any] = {
        "F.gelu": F.gelu,
        "rational": GroupRational(channels, start=rational_like("gelu")),
        "PolyNorm": PolyNorm(),
        "PolyNorm, plain autograd": PlainPolyNorm(),
    }
    found = take_turns(variants, shape, setting["rounds"], "activations")
    rows = rows_of(found, "F.gelu", width=channels)
    rational, poly, plain = (named(rows, name) for name in ("rational", "PolyNorm", "PolyNorm, plain autograd"))
    assert rational is not None and poly is not None and plain is not None
    faster = (plain["forward ms"] + plain["backward ms"]) / (poly["forward ms"] + poly["backward ms"])
    numbers = setting["rows"] * channels
    return rows, [
        common.target("rational: forward, over F.gelu", rational["forward ratio"], at_most=1.3),
        common.target("rational: backward, over F.gelu", rational["backward ratio"], at_most=1.5),
        common.target("rational: saved, over its input", rational["saved MB"] * 1e6 / (4 * numbers), at_most=1.01),
        common.target("PolyNorm: plain autograd's step, over ours", faster, at_least=3.0),
        common.target(
            "PolyNorm: saved, over its input and three numbers a row",
            poly["saved MB"] * 1e6 / (4 * (numbers + 3 * setting["rows"])),
            at_most=1.01,
        ),
    ]


# -- QKAN --------------------------------------------------------------------------------------------------------------


def _qkan(width: int) -> nn.Module:
    from qkan import QKANLayer

    learned = {"preact_trainable": True, "postact_weight_trainable": True, "postact_bias_trainable": True}
    return QKANLayer(width, width, reps=3, solver="exact", fast_measure=False, **learned)


def qkan(setting: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and targets of QKAN."""
    width = setting["qkan"]
    peers(1)  # makes the packages findable
    variants: dict[str, Any] = {"QkanLayer": QkanLayer(width, width)}
    try:
        variants["qkan"] = _qkan(width)
    except Exception as error:
        missing = [{"width": width, "row": "qkan", "about": f"{type(error).__name__}: {error}"[:120]}]
    else:
        missing = []
    found = take_turns(variants, (setting["rows"], width), setting["rounds"], "QKAN")
    rows = [*rows_of(found, "QkanLayer", width=width), *missing]
    steps = {row["row"]: row["forward ms"] + row["backward ms"] for row in rows if "forward ms" in row}
    over = steps["qkan"] / steps["QkanLayer"] if "qkan" in steps else None
    targets = [] if over is None else [common.target("package qkan's step, over ours", over, at_least=3.0)]
    return rows, targets


# -- fits --------------------------------------------------------------------------------------------------------------


def fits(setting: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What rationals in place of a model's activations cost, beside a plain pass over the same rows."""
    name, sequences, length, rounds = setting["model"]
    model, tokenizer = actkit.load(name, dtype="float32"), actkit.load_tokenizer(name)
    batches = actkit.load_data(None, model, tokenizer, sequences=sequences, length=length, batch_size=4)
    seconds: dict[str, list[float]] = {"plain pass": [], "gr_kan": []}
    for number in range(rounds + 1):  # the first warms up
        start = time.perf_counter()
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        middle = time.perf_counter()
        applied = actkit.apply(model, "gr_kan", batches, progress=False)
        end = time.perf_counter()
        applied.undo()
        if number:
            seconds["plain pass"].append(middle - start)
            seconds["gr_kan"].append(end - middle)
    over = common.ratio(seconds["gr_kan"], seconds["plain pass"])
    about = f"{name}, {sequences} rows of {length} tokens"
    rows = [{"row": each, "about": about, "s": round(median(own), 2)} for each, own in seconds.items()]
    return rows, [common.target(f"gr_kan on {name}, over a plain pass", over["ratio"], at_most=1.5)]


# -- attention ---------------------------------------------------------------------------------------------------------

HEADS, HEAD = 8, 64


def _softmax(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    scores = (query @ key.transpose(-1, -2) / HEAD**0.5).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1) @ value


def _sdpa(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def _lssar(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    found = softplus_attention(query, key, value, is_causal=True, power=15)
    assert isinstance(found, Tensor)
    return found


FUNCTIONS = {"softmax, eager": _softmax, "softmax, SDPA": _sdpa, "LSSAR": _lssar}


def _given(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, HEADS, length, HEAD, generator=generator) for _ in range(3)]
    return [*tensors, torch.ones(length, length, dtype=torch.bool).tril()[None, None]]


def _peak(name: str, length: int, found: Any) -> None:
    """Bytes that a call takes on top of its inputs, in this process alone."""
    torch.set_num_threads(2)
    with torch.inference_mode():
        FUNCTIONS[name](*_given(64))
        given = _given(length)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        before = _high_water()
        FUNCTIONS[name](*given)
        found.put(_high_water() - before)


def _high_water() -> int:
    """The most bytes that this process had since its peak began anew (Linux)."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak_bytes(name: str, length: int) -> int:
    """The peak of a call, from a process of its own."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=_peak, args=(name, length, found))
    process.start()
    peak: int = found.get(timeout=600)
    process.join()
    return peak


def attention(setting: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and targets of attention, forward passes alone."""
    rows: list[dict[str, Any]] = []
    for length in setting["lengths"]:
        given = _given(length)
        with torch.inference_mode():
            variants = {name: partial(function, *given) for name, function in FUNCTIONS.items()}
            seconds = common.interleaved(variants, max(3, setting["rounds"] // 3))
        for name, own in seconds.items():
            rows.append(
                {
                    "tokens": length,
                    "row": name,
                    "forward ms": round(median(own) * 1e3, 2),
                    "over eager softmax": round(common.ratio(own, seconds["softmax, eager"])["ratio"], 3),
                    "deciles": common.ratio(own, seconds["softmax, eager"])["deciles"],
                    "peak MB": round(peak_bytes(name, length) / 1e6, 1),
                }
            )
    targets = []
    for length in setting["lengths"]:
        row = named(rows, "LSSAR", tokens=length)
        assert row is not None
        if length >= 1024:
            over = row["over eager softmax"]
            targets.append(common.target(f"LSSAR, {length} tokens: over eager softmax's time", over, at_most=2.0))
    last, first = (named(rows, "LSSAR", tokens=setting["lengths"][place]) for place in (-1, 0))
    assert last is not None and first is not None
    growth = last["peak MB"] / max(first["peak MB"], 0.1) / (setting["lengths"][-1] / setting["lengths"][0])
    name = f"LSSAR, {setting['lengths'][0]} to {setting['lengths'][-1]} tokens: growth of the peak, over the tokens'"
    targets.append(common.target(name, round(growth, 3), at_most=1.5))
    return rows, targets


# -- decoding ----------------------------------------------------------------------------------------------------------

TOKENS = 16  # of a turn


def decoding(setting: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and targets of decoders whose gates have learned functions."""
    shape = SHAPES[setting["shape"]]
    model = random_llama(shape)
    units = model.config.intermediate_size
    gates: dict[str, Callable[[], nn.Module]] = {
        "SiLU": nn.SiLU,
        "rational": lambda: GroupRational(units, 8),
        "CRReLU": CRReLU,
    }
    decoders: dict[str, Decoder] = {}
    for name, make in gates.items():
        for layer in model.model.layers:
            layer.mlp.act_fn = make()
        decoders[name] = Decoder(model, capacity=(setting["rounds"] + 1) * TOKENS + 8)
    del model

    def write(name: str) -> None:
        for token in range(TOKENS):
            decoders[name]([token])

    seconds = common.interleaved({name: partial(write, name) for name in gates}, setting["rounds"])
    for decoder in decoders.values():
        decoder.close()
    rows = []
    for name, own in seconds.items():
        over = common.ratio(seconds["SiLU"], own)
        row = {"row": name, "shape": setting["shape"], "tokens/s": round(TOKENS / median(own), 2)}
        rows.append({**row, "of SiLU's": round(over["ratio"], 3), "deciles": over["deciles"]})
    targets = [
        common.target(f"decoding, {name} gates: tokens/s over SiLU's", row["of SiLU's"], at_least=0.95)
        for name in ("rational", "CRReLU")
        if (row := named(rows, name)) is not None
    ]
    return rows, targets


MEASURE = {
    "layers": layers,
    "activations": activations,
    "qkan": qkan,
    "fits": fits,
    "attention": attention,
    "decoding": decoding,
}


def main() -> None:
    """Measure, print and record."""
    chosen = common.options(__doc__ or "", parts=PARTS)
    setting, before = QUICK if chosen.quick else FULL, common.committed("functions") or {"rows": [], "targets": []}
    rows: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    for part in PARTS:
        if part in chosen.only:
            own, goals = MEASURE[part](setting)
            rows += [{"part": part, **row} for row in own]
            targets += [{"part": part, **goal} for goal in goals]
        elif not chosen.quick:
            rows += [row for row in before["rows"] if row["part"] == part]
            targets += [goal for goal in before["targets"] if goal["part"] == part]
    common.report("functions", rows, targets, chosen, show=common.show_parts)


if __name__ == "__main__":
    main()
