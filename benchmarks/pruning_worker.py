"""Narrows the MLPs of a Llama, or factors its weights, in a process of its own: `compression.py` starts it.

    python pruning_worker.py ARM FOLDER TEXT SHARE OUT

FOLDER holds a model that transformers loads, TEXT the rows to calibrate on (safetensors: `input_ids`), SHARE says how
much of each MLP's units goes, or of each weight's numbers is kept, and OUT gets the smaller model. Printed is a line of
JSON: seconds of the change alone, and bytes of its peak over what was resident before. All run in float32.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

del sys.path[0]  # where kernels.py lies, which transformers would take for the package of that name

import torch
from safetensors.torch import load_file

BATCH = 4  # rows, for all

OURS: dict[str, dict[str, Any]] = {  # settings of Cfsp, beside the share; one share in each block but for the last
    "random": {"fine": "random", "coarse": "constant"},
    "magnitude": {"fine": "magnitude", "coarse": "constant"},
    "Wanda-SP": {"fine": "wanda", "coarse": "constant"},
    "Wanda-SP and FLAP's bias": {"fine": "wanda", "coarse": "constant", "compensate": True},
    "CFSP, one width": {"uniform": True},
    "CFSP": {},
}


FACTORS = {"svd": "svd", "svd, fisher": "fisher", "svd, whiten": "whiten"}  # norms of Svd


def factored(norm: str) -> Callable[..., Any]:
    """Two factors in place of each weight, by actkit."""
    import actkit
    from actkit.compression.svd import Svd

    def factor(model: Any, batches: list[dict[str, torch.Tensor]], kept: float, out: Path) -> Callable[[], Any]:
        text = [{**batch, "labels": batch["input_ids"]} for batch in batches]
        actkit.apply(model, Svd(budget=kept, norm=norm), text, undo="off", progress=False)
        return lambda: actkit.save(model, out)

    return factor


def ours(settings: dict[str, Any]) -> Callable[..., Any]:
    """A change by actkit."""
    import actkit
    from actkit.compression.cfsp import Cfsp

    def prune(model: Any, batches: list[dict[str, torch.Tensor]], share: float, out: Path) -> Callable[[], Any]:
        method = Cfsp(sparsity=share, multiple_of=None, **settings)
        actkit.apply(model, method, batches, undo="off", progress=False)
        return lambda: actkit.save(model, out)

    return prune


def torch_pruning(data: bool) -> Callable[..., Any]:
    """Units of one group (gate's and up's rows, down's columns) by its importance; with data, by Taylor expansion."""
    import torch_pruning as tp

    def prune(model: Any, batches: list[dict[str, torch.Tensor]], share: float, out: Path) -> Callable[[], Any]:
        if data:
            for batch in batches:
                (model(**batch, labels=batch["input_ids"], use_cache=False).loss / len(batches)).backward()
        importance = tp.importance.GroupTaylorImportance() if data else tp.importance.GroupMagnitudeImportance()
        gates = {layer.mlp.gate_proj for layer in model.model.layers}
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs={"input_ids": batches[0]["input_ids"][:1, :8], "use_cache": False},
            importance=importance,
            pruning_ratio_dict=dict.fromkeys(gates, share),
            pruning_ratio=0.0,
            ignored_layers=[each for each in model.modules() if _is_other(each, model)],
            output_transform=lambda output: output.logits,
        )
        pruner.step()
        return lambda: _save(model, out)

    return prune


def _is_other(module: torch.nn.Module, model: Any) -> bool:
    """Whether rows of this layer are no units of an MLP."""
    inner = {id(layer) for block in model.model.layers for layer in (block.mlp.gate_proj, block.mlp.up_proj)}
    return isinstance(module, torch.nn.Linear | torch.nn.Embedding) and id(module) not in inner


def optipfair(data: bool) -> Callable[..., Any]:
    """Pairs of gate and up by the largest weights; with data, by these and the norms of activations."""
    import optipfair as package

    def prune(model: Any, batches: list[dict[str, torch.Tensor]], share: float, out: Path) -> Callable[[], Any]:
        loader = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]
        package.prune_model(
            model,
            pruning_type="MLP_GLU",
            neuron_selection_method="MAW",
            pruning_percentage=100 * share,
            dataloader=loader if data else None,
            show_progress=False,
        )
        return lambda: _save(model, out)

    return prune


def _save(model: Any, out: Path) -> None:
    widths = {layer.mlp.gate_proj.out_features for layer in model.model.layers}
    if len(widths) != 1:
        raise SystemExit(f"blocks have widths {sorted(widths)}; a config of Llama holds one.")
    model.config.intermediate_size = widths.pop()
    model.save_pretrained(out)


PEERS: dict[str, Callable[[], Callable[..., Any]]] = {
    "torch-pruning, magnitude": lambda: torch_pruning(data=False),
    "torch-pruning, Taylor": lambda: torch_pruning(data=True),
    "optipfair, static": lambda: optipfair(data=False),
    "optipfair, data-driven": lambda: optipfair(data=True),
}


def main() -> None:
    """Load, change, save, and say what the change took."""
    from transformers import AutoModelForCausalLM

    arm, folder, text, share, out = sys.argv[1:]
    torch.manual_seed(0)
    prune = factored(FACTORS[arm]) if arm in FACTORS else ours(OURS[arm]) if arm in OURS else PEERS[arm]()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batches = [{"input_ids": rows} for rows in load_file(text)["input_ids"].split(BATCH)]
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before, started = peak(), time.perf_counter()
    write = prune(model, batches, float(share), Path(out))
    seconds, most = time.perf_counter() - started, peak()
    write()
    print(json.dumps({"seconds": seconds, "peak_bytes": most - before}), flush=True)


def peak() -> int:
    """Bytes that were resident at most."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
