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
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "20000"}
sys.path.insert(0, str(Path(__file__).parent))

import torch
from likelihood import loss
from protocol import SHAPES, prompt_ids, serve
from torch import Tensor, nn

from actkit.testing.random_llama import random_llama

ABOUT = {
    "eager": "eager, sdpa, dynamic cache",
    "compile": "torch.compile, frozen weights, static cache",
    "int8": "Int8WeightOnlyConfig, a scale per row, bf16 activations, torch.compile with max-autotune, frozen weights",
    "int4": "PrototypeInt4WeightOnlyConfig, groups of {group}, bf16 activations, torch.compile, frozen weights",
}
LENGTHS = (256, 1152)  # of the static caches; a prompt with its answer takes the shortest that holds it


class Torch:
    """Variants: eager, compile, int8, int4."""

    def load(
        self,
        *,
        variant: str,
        threads: int,
        folder: str,
        shape: str = "",
        source: str = "",
        text: Sequence[int] = (),
        capacity: int = LENGTHS[0],
    ) -> dict[str, Any]:
        if variant not in ABOUT:
            raise ValueError(f"variant: {variant!r} was given; give {', '.join(ABOUT)}.")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        torch.set_num_threads(threads)
        self.text, self.model = text, _load(source) if source else random_llama(SHAPES[shape])
        self.vocabulary = self.model.config.vocab_size
        group = 64 if source else 128
        matrices = [part for part in self.model.modules() if isinstance(part, nn.Linear)]
        nbytes = sum(_stored(part.weight, variant, group) for part in matrices)
        _quantize(self.model, variant, group)
        self.caches: dict[int, Any] = {}
        self.one: Any = self._step
        if variant != "eager":
            import torch._inductor.config as inductor

            inductor.freezing = True
            # The autotuner times candidates on whatever the machine is doing; left to choose, it took the slower one.
            inductor.max_autotune_gemm_backends = "CPP"
            mode = "max-autotune-no-cudagraphs" if variant == "int8" else None
            self.one = torch.compile(self._step, dynamic=False, fullgraph=True, mode=mode)
            needed = [length for length, before in zip(LENGTHS, (0, *LENGTHS)) if before < capacity]
            self.caches = {length: self._static(length) for length in needed}
        lengths = [16, *(length // 2 for length in list(self.caches)[1:])]
        self._warm_up(lengths)
        if variant != "eager":
            torch.compiler.set_stance("default", skip_guard_eval_unsafe=True)  # nothing that guards look at changes
        self._warm_up(lengths)
        found = {"about": ABOUT[variant].format(group=group), "versions": _versions()}
        return found if source else {**found, "bytes_per_token": nbytes}

    @torch.no_grad()
    def round(self, *, prompt: int, tokens: int) -> dict[str, Any]:
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=self.model.config)
        if self.caches:
            fitting = [length for length in self.caches if prompt + tokens <= length]
            if not fitting:
                raise ValueError(f"prompt, tokens: {prompt} + {tokens} were given; the caches hold {[*self.caches]}.")
            cache = self.caches[fitting[0]]
            cache.reset()
        ids = torch.tensor([prompt_ids(prompt, self.vocabulary, self.text)])
        seconds = []
        for number in range(tokens + 1):
            start = time.perf_counter()
            ids = (self.one if number else self._step)(ids, cache)
            ids.item()
            seconds.append(time.perf_counter() - start)
        return {"first_token_seconds": seconds[0], "token_seconds": seconds[1:]}

    @torch.no_grad()
    def losses(self, *, rows: Sequence[Sequence[int]], scored: Sequence[Sequence[int]]) -> dict[str, Any]:
        found = []
        for ids, places in zip(rows, scored, strict=True):
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            found.append(loss(logits.float().numpy(), ids, places))
        return {"losses": found}

    def _static(self, length: int) -> Any:
        from transformers import StaticCache

        config = self.model.config
        cache = StaticCache(config=config, max_cache_len=length)
        size = config.hidden_size // config.num_attention_heads
        cache.early_initialization(1, config.num_key_value_heads, size, torch.bfloat16, "cpu")
        return cache

    def _warm_up(self, prompts: Sequence[int]) -> None:
        for prompt in prompts:
            self.round(prompt=prompt, tokens=2)

    def _step(self, ids: Tensor, cache: Any) -> Tensor:
        """The likeliest token after some more, [1, 1]."""
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True)


def _load(source: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, local_files_only=True).eval()


def _quantize(model: nn.Module, variant: str, group: int) -> None:
    if variant == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    elif variant == "int4":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import quantize_

        quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False))


def _stored(weight: Tensor, variant: str, group: int) -> int:
    """Bytes of a matrix in the format of the variant: codes, bf16 scales, and for int4 bf16 zeros."""
    count = weight.numel()
    return {"int8": count + 2 * len(weight), "int4": count // 2 + 4 * (count // group)}.get(variant, 2 * count)


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
