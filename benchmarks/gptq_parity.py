"""GPTQ beside llm-compressor's `quantize_weight`: the same random weights and second moments, the same scales.

    make .venv-quantization/.installed               # the environment of the peers
    python benchmarks/gptq_parity.py [--json PATH|-]

Each case is a weight [256, 512] and the second moment of 2,048 correlated inputs, some of them large. Compared are the
rounded weights, and the squared errors of the outputs. What was set before the first run: over 99.9 % of the codes are
equal, and the errors differ by at most 1e-4 of themselves.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import common  # isort: skip
import torch
from safetensors.torch import load_file, save_file

from actkit.core.grids.integers import IntegerGrid
from actkit.quantization.gptq import Order, SecondOrder, round_in_order

PEERS = HERE.parent / ".venv-quantization" / "bin" / "python"
ROWS, COLUMNS, TOKENS = 256, 512, 2048
CASES = {  # name -> bits, group size, symmetric, most active channels first
    "4 bits, groups of 64": (4, 64, False, True),
    "4 bits, groups of 64, in order": (4, 64, False, False),
    "3 bits, groups of 64": (3, 64, False, True),
    "4 bits, groups of 64, symmetric": (4, 64, True, True),
}


def layer(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the second moment of its inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(COLUMNS) + torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    x = torch.randn(TOKENS, COLUMNS, generator=generator) @ mix
    x[:, :8] *= 10
    return torch.randn(ROWS, COLUMNS, generator=generator), x.t() @ x / TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description="GPTQ beside llm-compressor's, layer by layer.")
    parser.add_argument("--json", metavar="PATH", help="also write the result to PATH, or to standard output for '-'")
    parser.add_argument("--peers", type=Path, default=PEERS, help="the Python of the peers' environment")
    chosen = parser.parse_args()
    chosen.quick = False
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, (bits, size, symmetric, act_order)) in enumerate(CASES.items()):
            weight, moment = layer(seed)
            grid = IntegerGrid(bits, size, symmetric=symmetric)
            order = Order.of(moment, act_order=act_order)
            assert order is not None
            ours = round_in_order(weight, order, grid)
            given = {"weight": weight, "moment": moment, "scale": ours.scales()}
            if ours.zero is not None:
                given["zero"] = ours.zero.clone()
            base = Path(folder) / f"{seed}"
            save_file({key: value.contiguous() for key, value in given.items()}, base.with_suffix(".in"))
            settings = [bits, size, int(symmetric), int(act_order)]
            command = [chosen.peers, HERE / "quantization_workers" / "gptq_peer.py", base, *settings]
            subprocess.run(list(map(str, command)), check=True)
            theirs = load_file(base.with_suffix(".out"))["rounded"]
            second_order, mine = SecondOrder(moment, order), ours.dequantize()
            step = ours.scales().repeat_interleave(size, 1)
            equal = float(((mine - theirs).abs() < 0.5 * step).double().mean())
            losses = [second_order.error(weight, each) for each in (mine, theirs)]
            rows.append({"case": name, "equal codes": equal, "error": losses[0], "theirs": losses[1]})
    found = []
    for row in rows:
        found.append(common.target(f"{row['case']}: equal codes", row["equal codes"], at_least=0.999))
        apart = abs(row["error"] / row["theirs"] - 1)
        found.append(common.target(f"{row['case']}: errors differ, share", apart, at_most=1e-4))
    common.report("gptq_parity", rows, found, chosen)


if __name__ == "__main__":
    main()
