"""One quantizer of llm-compressor or AutoRound on one model: seconds, peak memory, and its losses on held-out rows.

    python peer_worker.py JOB.json          # in the peers' environment; writes the result to the job's "result"

The job names the model's folder, the tokens (calibration and held-out, lists of rows), the method, bits and group size.
Losses are those of the model as the peer leaves it in memory: its own rounding of weights (and activations), run by
transformers in the model's dtype. Peak memory is that of this process (VmHWM) less its size with the model loaded and
read once, as weights that are mapped count when they are first read. llm-compressor's AWQ pins memory, which fails
without an accelerator: that is left out here.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH, LARGE_VOCABULARY = 8, 100_000


def memory(name: str) -> float:
    """MB of this process: VmHWM (the peak) or VmRSS (now)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    return float("nan")


def read_once(model: Any) -> None:
    """Read a byte of each page of the weights, so that those that are mapped count as loaded."""
    for parameter in model.parameters():
        parameter.detach().view(-1).view(torch.uint8)[::4096].sum()


def weights(folder: Path) -> float:
    """MB of the weight files of a saved model."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = [torch.tensor(row) for row in job["calibration"]]
    read_once(model)
    loaded, started = memory("VmRSS"), time.perf_counter()
    rounding: Any = None
    if job["method"] == "autoround":
        rounding, model = autoround(model, tokenizer, rows, job)
    else:
        compress(model, rows, job)
    seconds, peak = time.perf_counter() - started, memory("VmHWM") - loaded
    result = {"seconds": seconds, "peak MB": peak, "losses": losses(model, job["held_out"])}
    folder = Path(job["folder"])  # written last: packing may change the weights in memory
    if job["method"] == "autoround":  # its own format has no 4 bits with zero points in 0.15.1: a TypeError
        rounding.save_quantized(str(folder), format="auto_gptq")
    else:
        model.save_pretrained(folder, save_compressed=True)
    result["weights MB"] = weights(folder)
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def compress(model: Any, rows: list[torch.Tensor], job: dict[str, Any]) -> None:
    """Run llm-compressor in place."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None  # type: ignore[method-assign]

    if job["method"] == "smooth w8a8":
        weights = QuantizationArgs(num_bits=8, symmetric=True, strategy="channel")
        inputs = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    else:
        group = job["group"]
        args = QuantizationArgs(num_bits=job["bits"], symmetric=False, strategy="group", group_size=group)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
    groups: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    recipe: list[Any] = {
        "rtn": lambda: [QuantizationModifier(**groups)],
        "gptq": lambda: [GPTQModifier(**groups)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**groups)],
        "smooth w8a8": lambda: [SmoothQuantModifier(smoothing_strength=0.5), QuantizationModifier(**groups)],
    }[job["method"]]()
    data = Dataset.from_dict({"input_ids": [r.tolist() for r in rows], "attention_mask": [[1] * len(r) for r in rows]})
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        batch_size=BATCH,
    )


def autoround(model: Any, tokenizer: Any, rows: list[torch.Tensor], job: dict[str, Any]) -> tuple[Any, Any]:
    """Run AutoRound; returns it, and the rounded model."""
    from auto_round import AutoRound

    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows]
    rounding = AutoRound(
        model,
        tokenizer,
        bits=job["bits"],
        group_size=job["group"],
        sym=False,
        iters=job["iterations"],
        dataset=batches,
        seqlen=len(rows[0]),
        nsamples=len(rows),
        batch_size=BATCH,
        enable_torch_compile=False,
        device_map="cpu",
    )
    found = rounding.quantize()
    return rounding, found[0] if isinstance(found, tuple) else found


@torch.no_grad()
def losses(model: Any, rows: list[list[int]]) -> list[float]:
    """The summed loss of the next token on each row."""
    model.eval()
    found: list[float] = []
    batch = BATCH if model.config.vocab_size < LARGE_VOCABULARY else 1  # a token of Gemma 3 has 1 MB of logits
    for start in range(0, len(rows), batch):
        ids = torch.tensor(rows[start : start + batch])
        logits = model(input_ids=ids).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        found += loss.view(len(ids), -1).double().sum(1).tolist()
    return found


if __name__ == "__main__":
    main()
