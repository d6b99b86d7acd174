"""Round one layer by llm-compressor's `quantize_weight`, with scales that are given.

python gptq_peer.py BASE BITS GROUP SYMMETRIC ACT_ORDER   # reads BASE.in, writes BASE.out; in the peers' environment
"""

from __future__ import annotations

import sys
from pathlib import Path

from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import load_file, save_file


def main() -> None:
    base, bits, group, symmetric, act_order = Path(sys.argv[1]), *map(int, sys.argv[2:])
    given = load_file(base.with_suffix(".in"))
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=bool(symmetric),
        strategy="group",
        group_size=group,
        actorder="weight" if act_order else None,
    )
    zero = given["scale"] * 0
    if "zero" in given:  # theirs are counted from the middle of the codes
        zero = given["zero"].float() - 2 ** (bits - 1)
    rounded, _, fell_back = quantize_weight(
        given["weight"][None], given["moment"][None], given["scale"][None], zero[None], None, args
    )
    if bool(fell_back.any()):
        raise SystemExit("it rounded to nearest")
    save_file({"rounded": rounded[0].float().contiguous()}, base.with_suffix(".out"))


if __name__ == "__main__":
    main()
