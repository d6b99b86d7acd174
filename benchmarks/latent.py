"""What a latent cache costs a decoding step: beside the expanded cache of the same model, at growing contexts.

    python benchmarks/latent.py [--blocks 1] [--rounds 15] [--contexts 512 1024 2048 4096]

Blocks of PLM-1.8B's shape with random weights in bfloat16 and a vocabulary of 2,048 words. The caches hold random
numbers, so that no prompt is read; the two decoders take turns in one process, in random order. Columns: bytes of the
cache at that context, the median step, and the ratio of expanded to latent with its middle half.
"""

from __future__ import annotations

import argparse
import time
from random import Random
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch

from actkit.runtime.decoder import Decoder
from actkit.sparsity.plm.model import PLMConfig, PLMForCausalLM

FORMS = ("latent", "expanded")


def decoders(blocks: int, capacity: int) -> dict[str, Decoder]:
    """One of each cache, over the same weights, their caches full of random numbers."""
    torch.manual_seed(0)
    config = PLMConfig.preset("1.8b", num_hidden_layers=blocks, vocab_size=2048, max_position_embeddings=capacity)
    model: Any = PLMForCausalLM(config).to(torch.bfloat16).eval()
    found, generator = {}, np.random.default_rng(0)
    for form in FORMS:
        for layer in model.model.layers:
            layer.self_attn.cache = form
        found[form] = Decoder(model, capacity=capacity)
        work = found[form]._work
        for kept in (work.latent_cache, work.latent_keys, work.latent_values):
            kept[:] = generator.standard_normal(kept.shape, np.float32)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    given = parser.parse_args()
    capacity = max(given.contexts) + 8
    made, shuffle = decoders(given.blocks, capacity), Random(0).shuffle
    print(f"{torch.get_num_threads()} threads, {given.blocks} blocks; ms per step")
    for context in given.contexts:
        seconds: dict[str, list[float]] = {form: [] for form in FORMS}
        order = list(FORMS)
        for number in range(given.rounds + 2):  # the first two warm up
            shuffle(order)
            for form in order:
                made[form].position = context
                start = time.perf_counter()
                made[form]([1])
                if number > 1:
                    seconds[form].append(time.perf_counter() - start)
        ratios = sorted(b / a for a, b in zip(seconds["latent"], seconds["expanded"], strict=True))
        low, _, high = quantiles(ratios, n=4)
        cells = [
            f"{form} {made[form].cache_bytes * context / capacity / 1e6:.1f} MB {median(seconds[form]) * 1e3:.2f} ms"
            for form in FORMS
        ]
        print(f"{context:5} tokens: {', '.join(cells)}, {median(ratios):.2f}x ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
