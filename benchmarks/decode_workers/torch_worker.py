"""PyTorch on the CPU: transformers' Llama, eager, compiled, and with torchao's int8 or int4 weights, compiled.

Settings, the fastest of those tried at 1.1B on two cores with AVX-512: weights frozen into the compiled code, where
they are packed for their kernels; static caches of few lengths; for int8 the autotuner's own kernels (27 instead of 23
tokens/s; no gain for int4); prompts uncompiled (0.5 s instead of 0.8 for int8). OpenMP's threads spin between the two
hundred parallel regions of a token: where they sleep at once, int4 falls from 38 to 22 tokens/s. Endless spinning would
take a core from the peers, so the spinning is limited to less than a millisecond.
"""

from __future__ import annotations

import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "20000"}
sys.path.insert(0, str(Path(__file__).parent))

import torch
from protocol import SHAPES, prompt_ids, serve
from torch import Tensor, nn

from actkit.testing.random_llama import random_llama

ABOUT = {
    "eager": "eager, sdpa, dynamic cache",
    "compile": "torch.compile, frozen weights, static cache",
    "int8": "Int8WeightOnlyConfig, a scale per row, bf16 activations, torch.compile with max-autotune, frozen weights",
    "int4": "PrototypeInt4WeightOnlyConfig, groups of 128, bf16 activations, torch.compile, frozen weights",
}
LENGTH = 256  # of the static cache


class Torch:
    """Variants: eager, compile, int8, int4."""

    def load(self, *, shape: str, variant: str, threads: int, folder: str) -> dict[str, Any]:
        if variant not in ABOUT:
            raise ValueError(f"variant: {variant!r} was given; give {', '.join(ABOUT)}.")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        torch.set_num_threads(threads)
        self.vocabulary = SHAPES[shape]["vocab_size"]
        self.model = random_llama(SHAPES[shape])
        matrices = [part for part in self.model.modules() if isinstance(part, nn.Linear)]
        nbytes = sum(_stored(part.weight, variant) for part in matrices)
        _quantize(self.model, variant)
        self.cache: Any = None
        self.one: Any = self._step
        if variant != "eager":
            import torch._inductor.config as inductor
            from transformers import StaticCache

            inductor.freezing = True
            # The autotuner times candidates on whatever the machine is doing; left to choose, it took the slower one.
            inductor.max_autotune_gemm_backends = "CPP"
            mode = "max-autotune-no-cudagraphs" if variant == "int8" else None
            self.one = torch.compile(self._step, dynamic=False, fullgraph=True, mode=mode)
            config = self.model.config
            self.cache = StaticCache(config=config, max_cache_len=LENGTH)
            size = config.hidden_size // config.num_attention_heads
            self.cache.early_initialization(1, config.num_key_value_heads, size, torch.bfloat16, "cpu")
        self.round(prompt=16, tokens=2)
        if variant != "eager":
            torch.compiler.set_stance("default", skip_guard_eval_unsafe=True)  # nothing that guards look at changes
        self.round(prompt=16, tokens=2)
        return {"about": ABOUT[variant], "bytes_per_token": nbytes, "versions": _versions()}

    @torch.no_grad()
    def round(self, *, prompt: int, tokens: int) -> dict[str, Any]:
        from transformers import DynamicCache

        if prompt + tokens > LENGTH:
            raise ValueError(f"prompt, tokens: {prompt} + {tokens} were given; the cache holds {LENGTH}.")
        if self.cache is not None:
            self.cache.reset()
        cache = DynamicCache(config=self.model.config) if self.cache is None else self.cache
        ids = torch.tensor([prompt_ids(prompt, self.vocabulary)])
        seconds = []
        for number in range(tokens + 1):
            start = time.perf_counter()
            ids = (self.one if number else self._step)(ids, cache)
            ids.item()
            seconds.append(time.perf_counter() - start)
        return {"first_token_seconds": seconds[0], "token_seconds": seconds[1:]}

    def _step(self, ids: Tensor, cache: Any) -> Tensor:
        """The likeliest token after some more, [1, 1]."""
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True)


def _quantize(model: nn.Module, variant: str) -> None:
    if variant == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    elif variant == "int4":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import quantize_

        quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=128, set_inductor_config=False))


def _stored(weight: Tensor, variant: str) -> int:
    """Bytes of a matrix in the format of the variant: codes, bf16 scales, and for int4 bf16 zeros."""
    count = weight.numel()
    return {"int8": count + 2 * len(weight), "int4": count // 2 + 4 * (count // 128)}.get(variant, 2 * count)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "torchao"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


if __name__ == "__main__":
    serve(Torch())
