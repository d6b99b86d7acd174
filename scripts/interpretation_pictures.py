"""Draw a picture for a page of interpretation: docs/interpretation/NAME.svg, from a small run of its own.

python scripts/interpretation_pictures.py pavlovian neural-code representational-geometry lib
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

import actkit
from actkit.data import digits
from actkit.interpretation.lib.basis import local_interaction_basis
from actkit.interpretation.lib.graph import accuracy, node_curve
from actkit.interpretation.lib.sections import sections_of
from actkit.interpretation.neural_code.neural_code import neural_code
from actkit.interpretation.pavlovian.protocols import run_protocol
from actkit.interpretation.representational_geometry.representational_geometry import representational_geometry
from actkit.interpretation.representational_geometry.tasks import KernelTask

FOLDER = Path(__file__).parents[1] / "docs" / "interpretation"
COLOURS = ("#c0392b", "#2471a3", "#e67e22", "#1e8449")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 60, 150, 16, 46
APART = 15  # pixels between the names of lines
Lines = Mapping[str, Sequence[float]]


def draw(lines: Lines, places: Sequence[str], across: str, upright: str) -> str:
    """Lines over places as SVG; their names stand behind them."""
    values = [value for line in lines.values() for value in line]
    low, high = min(0.0, min(values)), max(values)
    high += 0.05 * (high - low)

    def x(at: float, count: int) -> float:
        return LEFT + at / (count - 1) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    ]
    for step in range(6):
        value = low + step / 5 * (high - low)
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    for at, place in enumerate(places):
        parts.append(f'<text x="{x(at, len(places)):.1f}" y="{HEIGHT - 28}" text-anchor="middle">{place}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{across}</text>')
    parts.append(f'<text transform="rotate(-90 14 {HEIGHT / 2})" x="14" y="{HEIGHT / 2}" text-anchor="middle">')
    parts.append(f"{upright}</text>")
    taken = -APART
    ends = sorted(enumerate(lines.items()), key=lambda item: y(item[1][1][-1]))
    for number, (name, line) in ends:
        points = " ".join(f"{x(at, len(line)):.1f},{y(value):.1f}" for at, value in enumerate(line))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[number]}" stroke-width="2.5"/>')
        taken = max(round(y(line[-1])) + 4, taken + APART)
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{taken}" fill="{COLOURS[number]}">{name}</text>')
    return "\n".join((*parts, "</svg>")) + "\n"


def pavlovian() -> str:
    """Blocking: what A and B bring to mind, while A alone is learned, then both together."""
    lines = {}
    for rule, named in (("delta", "error correction"), ("hebb", "Hebb")):
        found = run_protocol("blocking", rule)  # type: ignore[arg-type]
        lines |= {f"{element}, {named}": found.responses[element] for element in ("A", "B")}
    count = len(next(iter(lines.values())))
    return draw(lines, ["1", str(count // 2), str(count)], "trial: A alone, then A and B together", "response")


def neural_codes() -> str:
    """How much of the class is in the bits of each layer of the zoo's CNN."""
    pixels, labels = digits("test")
    batches = [{"pixel_values": x, "labels": y} for x, y in zip(pixels.split(64), labels.split(64), strict=True)]
    found = neural_code(actkit.load("cnn", dtype="float32"), batches, progress=False)
    lines = {
        "K-NN on the code": [layer.knn or 0.0 for layer in found.layers],
        "redundancy": [layer.redundancy for layer in found.layers],
    }
    return draw(lines, [f"{layer.path} ({layer.bits} bits)" for layer in found.layers], "layer", "share")


def geometry() -> str:
    """How like the target the hidden layer becomes, in a tanh net and in a ReLU net."""
    task = KernelTask(conditions=16, number=1, alignment=0.0)
    x, _, condition = task.sample(1500)
    targets = torch.from_numpy(task.targets)
    wanted = targets[condition].reshape(len(x), -1).float()
    lines: dict[str, list[float]] = {}
    for name, activation in (("tanh", nn.Tanh), ("ReLU", nn.ReLU)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(x.shape[1], 128), activation(), nn.Linear(128, 1))
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        inputs, goals = lines.setdefault(f"{name}, like inputs", []), lines.setdefault(f"{name}, like the target", [])
        for step in range(241):
            if step % 40 == 0:
                options = {"sites": ("activation.output:1",), "conditions": condition, "targets": targets}
                (site,) = representational_geometry(net, [x], **options, clean=[task.clean], progress=False).sites
                inputs.append(site.input_alignment or 0.0)
                goals.append(site.target_alignment)
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(net(x), (wanted > 0).float()).backward()
            optimizer.step()
    return draw(lines, [str(step) for step in range(0, 241, 40)], "step", "CKA of the hidden layer")


def interaction() -> str:
    """Accuracy with few directions of a hidden layer, in three bases."""
    pixels, labels = digits("train")
    x = pixels.flatten(1).double()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    rows, kept = x[:300], [1, 2, 4, 8, 16, 32]
    score = accuracy(labels[:300])
    lines = {}
    for kind, name in (("lib", "interaction basis"), ("pca", "principal components"), ("neuron", "neurons")):
        basis = local_interaction_basis(sections_of(net, rows), rows, kind=kind, progress=False)  # type: ignore[arg-type]
        lines[name] = list(node_curve(basis, 1, rows, score, kept=kept).values())
    return draw(lines, [str(each) for each in kept], "directions of the first hidden layer that are kept", "accuracy")


PICTURES: dict[str, Callable[[], str]] = {
    "pavlovian": pavlovian,
    "neural-code": neural_codes,
    "representational-geometry": geometry,
    "lib": interaction,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or PICTURES:
        (FOLDER / f"{name}.svg").write_text(PICTURES[name](), encoding="utf-8")
