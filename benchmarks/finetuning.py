"""What fine-tuning and training methods cost for each step, beside the plain step and their peers, and how they score.

    python benchmarks/finetuning.py [--quick] [--json PATH|-] [--only PART ...]

tract: a vision transformer of ViT-S's shape (patches of 16 x 16 x 3, 384 wide, 12 blocks) and the digits CNN; a step is
forward, backward and SGD, interleaved, two threads. Beside them the released package `torch_tract` (its `inverse`), if
it is installed in `.venv-bench`: its layer in place of the first one. Pass: at most 1.10 times the plain step, and no
slower than the package.

memory, steps: MiniLM with a new classifier (16 rows of 128 tokens, dropout as configured), the digits ViT (64 images)
and transformers' MobileNetV2 (8 images of 96 x 96, random weights, padded as torch pads, because peft's layers have no
stride that transformers could read), each trained in every way that fits it: all weights, LoRA of rank 8 by peft on all
linear layers of the blocks (of MobileNetV2 on its pointwise convolutions), all weights under gradient checkpointing,
biases, S2A (with side paths in transformers), MobileNetV2's last five blocks as torch trains them, the same by
MobileTL, and LIFT with as many entries as a LoRA of rank 8. The head trains too. Bytes kept for the backward pass,
bytes of the optimizer's state (AdamW), and the peak of resident memory over what was resident before are those of one
step in a fresh process; milliseconds of a step are interleaved, of LIFT with the 200th part of a choice. Pass: S2A
keeps at most 0.25 times the bytes of full training and 0.4 times those of LoRA; LIFT's step takes at most 1.10 times
AdamW's, and its state at most 12 % of the bytes.

scores: accuracy on test data after 60 steps, at the rate of three that is best on validation data, one seed: MiniLM on
docstrings of ten packages (24 tokens), the digits ViT on inverted and turned digits, MobileNetV2 (0.35 times the width)
on the same, after it learned the digits as they are.

atlas: six task vectors of 16 bits of MiniLM, one row of 8 tokens, in a process that trained the head before, so that
what a first training imports (70 MB) is there. Pass: the peak of a step, without the vectors, is at most 1.5 times the
model.

eva: where LoRA begins, by `Eva.plan` and by peft's `get_eva_state_dict` (its defaults, tau 0.99): rank 8 at rho 2 and
at rho 1 on all linear layers of the blocks, from one loader: 5 batches of 64 digits for the zoo's vision transformer, 8
batches of 32 sentences of 32 tokens for MiniLM. `Eva.plan` reads each batch once; peft goes round and round until no
direction that got a rank turns, and is stopped after 200 batches, which the row then says: its seconds are those until
then. Seconds of the processor, in turns. Pass: ours at least 2 times as fast.

The targets were set before the first run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import common  # isort: skip

import torch
from torch import nn
from torch.nn import functional as F
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, ViTConfig, ViTForImageClassification

from actkit import zoo
from actkit.claims.digit_arms import accuracy, in_batches
from actkit.claims.s2a import REDUCTION, Docstrings, Sizes, turned
from actkit.core.edit.edits import get_module
from actkit.core.forward.batch import first_tensor
from actkit.core.ground.memory import parameter_bytes
from actkit.core.measure.fresh import FreshProcess
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.core.store.deltas import Delta, Dense
from actkit.core.train.rules import attached
from actkit.core.train.training import train
from actkit.data import digits, load_data
from actkit.finetuning.adapters import parse_adapter
from actkit.finetuning.eva import Eva
from actkit.finetuning.low_rank_training import train_adapter
from actkit.finetuning.mobiletl import MobileTL
from actkit.finetuning.s2a.side_path import AddSidePath
from actkit.finetuning.timed_step import Way, stepping, time_step
from actkit.finetuning.tract import Tract, first_layer
from actkit.zoo.cnn import DigitsCNN

PARTS = ("tract", "memory", "steps", "scores", "atlas", "eva")
PLAIN, OURS, PACKAGE = "plain", "tract", "torch_tract"


def vit(blocks: int) -> nn.Module:
    """A vision transformer of ViT-S's width, with random weights."""
    shape: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    return ViTForImageClassification(ViTConfig(**shape, num_hidden_layers=blocks, num_labels=10))


def packaged(model: nn.Module) -> None:
    """Put the package's layer in place of the first one.

    Raises:
        ImportError: the package is not there.
    """
    site = next((HERE.parent / ".venv-bench").glob("lib/python*/site-packages"), None)
    if site is not None and str(site) not in sys.path:
        sys.path.append(str(site))
    from torch_tract import TrActConv2d

    path = first_layer(model)
    old: Any = get_module(model, path)
    new = TrActConv2d(
        old.in_channels, old.out_channels, old.kernel_size[0], stride=old.stride, padding=old.padding, lambda_=0.1
    )
    new.load_state_dict(old.state_dict())
    model.set_submodule(path, new)


def step(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """One step of a training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(first_tensor(model(x)), labels).backward()
        optimizer.step()

    return run


def measure(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """A row for each variant of one model."""
    torch.manual_seed(0)
    x, labels = torch.randn(shape), torch.arange(shape[0]) % 10
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        plain, ours, package = (make() for _ in range(3))
        stack.enter_context(attached([Tract()], ours))
        variants = {PLAIN: step(plain, x, labels), OURS: step(ours, x, labels)}
        try:
            packaged(package)
            variants[PACKAGE] = step(package, x, labels)
        except ImportError as error:
            rows.append({"model": name, "row": PACKAGE, "ms": str(error)})
        seconds = common.interleaved(variants, rounds)
    for variant, own in seconds.items():
        over = common.ratio(own, seconds[PLAIN])
        row = {"model": name, "row": variant, "ms": round(median(own) * 1e3, 2), "over plain": round(over["ratio"], 3)}
        rows.append({**row, "deciles": over["deciles"]})
    return sorted(rows, key=lambda row: str(row["row"]))


# -- ways to fine-tune -------------------------------------------------------------------------------------------------

FULL, LORA, CHECKPOINTED, BIASES = "full training", "LoRA", "checkpointed", "biases"
S2A, BLOCKS, TL, LIFT = "S2A", "five blocks", "MobileTL", "LIFT"
LAST = 5  # blocks of MobileNetV2
RANK, INTERVAL = 8, 200  # of LoRA and LIFT; steps between LIFT's choices
STEPS, RATES = 60, (1e-3, 3e-3, 1e-2)
SMALLER = {FULL: (1e-4, 3e-4, 1e-3)}  # rates of all weights of a pretrained model
COUNTS = {"train": STEPS, "search": 8, "test": 20}  # batches of docstrings
WAYS = {
    FULL: Way(),
    LORA: Way(adapter=f"lora:rank={RANK}", rules=({"s2a": {"bias": False, "coded": []}},)),  # the rule trains the head
    CHECKPOINTED: Way(checkpointing=True),
    BIASES: Way(rules=({"s2a": {"coded": []}},)),
    S2A: Way(rules=("s2a",)),
    TL: Way(rules=(f"mobiletl:blocks={LAST}",)),
    LIFT: Way(rules=(f"lift:lora_rank={RANK},rank_filter={RANK},algorithm=gram,update_interval={INTERVAL}",)),
}
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A model with what it is trained on.

    Attributes:
        name: of the model.
        folders: that hold it, by arm.
        ways: how it is trained, by arm.
        batch: that costs are of.
        splits: batches to train on, to choose by, and to test on.
        rates: that are tried, of arms that have their own.
    """

    name: str
    folders: Mapping[str, Path]
    ways: Mapping[str, Way]
    batch: Batch | None = None
    splits: Mapping[str, list[Batch]] | None = None
    rates: Mapping[str, Sequence[float]] | None = None


def saved(model: nn.Module, folder: Path, arms: Sequence[str]) -> dict[str, Path]:
    """The folder of each arm: the model, for S2A with side paths if it is a transformer."""
    folders = dict.fromkeys(arms, checkpoint.save(model, folder / "plain"))
    if TL not in arms:
        apply(model, AddSidePath(reduction=REDUCTION), progress=False)
        folders[S2A] = checkpoint.save(model, folder / "side paths")
    return folders


def transformers_arms() -> dict[str, Way]:
    """All that trains a transformer."""
    return {arm: way for arm, way in WAYS.items() if arm != TL}


def mobile_arms(model: nn.Module) -> dict[str, Way]:
    """All that trains MobileNetV2, which has no checkpointing."""
    last = tuple(f"{block.path}.*" for block in MobileTL(blocks=LAST).chosen(model))
    blocks = {BLOCKS: Way(trainable=(*last, "classifier.*"))}
    return {arm: way for arm, way in (WAYS | blocks).items() if arm != CHECKPOINTED}


def minilm(place: Path, quick: bool) -> Case:
    """MiniLM with a new classifier, on docstrings."""
    ways, texts = transformers_arms(), Docstrings(Sizes(measured=32, rows=4) if quick else Sizes())
    splits = {split: texts._batches(split, 2 if quick else count, 24) for split, count in COUNTS.items()}  # type: ignore[arg-type]
    folders = saved(texts.plain(dropout=True), place / "minilm", list(ways))
    return Case("MiniLM", folders, ways, texts.large(), splits, SMALLER)


def digits_vit(place: Path, quick: bool) -> Case:
    """The zoo's vision transformer, on 320 inverted and turned digits."""
    ways = transformers_arms()
    splits = {split: in_batches(turned(split)) for split in COUNTS}  # type: ignore[arg-type]
    splits["train"] = splits["train"][:5]
    folders = saved(zoo.load("vit", dtype=torch.float32), place / "vit", list(ways))
    return Case("digits ViT", folders, ways, splits["train"][0], splits)


def mobilenet(place: Path, quick: bool) -> Case:
    """MobileNetV2 of full width, whose costs are measured."""
    torch.manual_seed(0)
    model = MobileNetV2ForImageClassification(MobileNetV2Config(image_size=96, num_labels=10, tf_padding=False))
    ways, rows, side = mobile_arms(model), 2 if quick else 8, 64 if quick else 96
    batch = {"pixel_values": torch.randn(rows, 3, side, side), "labels": torch.arange(rows)}
    return Case("MobileNetV2", saved(model, place / "mobilenet", list(ways)), ways, batch)


def small_mobilenet(place: Path, quick: bool) -> Case:
    """A narrow MobileNetV2 that knows the digits and learns inverted and turned ones."""
    torch.manual_seed(0)
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.35, num_labels=10, tf_padding=False)
    model = MobileNetV2ForImageClassification(config)

    def enlarged(images: tuple[torch.Tensor, torch.Tensor]) -> list[Batch]:
        pixels = F.interpolate(images[0], 32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
        return in_batches((pixels, images[1]))

    settings: dict[str, Any] = {"epochs": 1 if quick else 12, "learning_rate": 3e-3, "progress": False}
    train(model, enlarged(digits("train")), validation=enlarged(digits("search")), keep="last", **settings)
    splits = {split: enlarged(turned(split)) for split in COUNTS}  # type: ignore[arg-type]
    splits["train"] = splits["train"][:5]
    ways = mobile_arms(model)
    return Case("MobileNetV2", saved(model.eval(), place / "small", list(ways)), ways, None, splits)


# -- what a step costs -------------------------------------------------------------------------------------------------


def of_each(quick: bool, measured: Callable[[Case, int], dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What is measured of each way to train each model."""
    found = {}
    with TemporaryDirectory() as name:
        for make in (minilm, digits_vit, mobilenet):
            case = make(Path(name), quick)
            found[case.name] = measured(case, 2 if quick else 4)
    return found


def listed(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each way to train each model."""
    return [{"model": model, "row": arm, **own} for model, arms in found.items() for arm, own in arms.items()]


def memory(quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Bytes of one step."""
    found = of_each(quick, held)
    targets = []
    for name, rows in found.items():
        state = round(rows[LIFT]["optimizer MB"] / rows[FULL]["optimizer MB"], 3)
        targets.append(common.target(f"{name}: LIFT's state, over full training", state, at_most=0.12))
        for other, most in ((FULL, 0.25), (LORA, 0.4)) if TL not in rows else ():
            over = round(rows[S2A]["kept MB"] / rows[other]["kept MB"], 3)
            targets.append(common.target(f"{name}: S2A's kept bytes, over {other}", over, at_most=most))
    return listed(found), targets


def held(case: Case, rounds: int) -> dict[str, dict[str, Any]]:
    """Bytes of one step of each arm, in a process of its own."""
    found = {}
    for arm, way in case.ways.items():
        with FreshProcess() as process:
            process.load(case.folders[arm], "float32")
            cost = time_step(process, case.batch, way)
        peak = None if cost["peak_bytes"] is None else round((cost["peak_bytes"] - cost["resident_bytes"]) / 1e6, 1)
        found[arm] = {
            "trained": cost["trainable"],
            "kept MB": round(cost["kept_bytes"] / 1e6, 2),
            "optimizer MB": round(cost["optimizer_bytes"] / 1e6, 2),
            "peak MB": peak,
        }
    return found


def steps(quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Milliseconds of a step."""
    found = of_each(quick, milliseconds)
    targets = [
        common.target(f"{name}: LIFT's step, over full training", rows[LIFT]["over full"], at_most=1.10)
        for name, rows in found.items()
    ]
    return listed(found), targets


def milliseconds(case: Case, rounds: int) -> dict[str, dict[str, Any]]:
    """Of a step of each arm, interleaved; LIFT's with its share of a choice."""
    choices: dict[str, float] = {}
    with ExitStack() as stack:
        variants = {}
        for arm, way in case.ways.items():
            model = checkpoint.load(case.folders[arm], dtype=torch.float32)
            variants[arm] = stack.enter_context(stepping(model, case.batch, way))
            first, second = variants[arm]()[2], variants[arm]()[2]  # the first choice is in the first update
            choices[arm] = max(0.0, first - second) if arm == LIFT else 0.0
        seconds = common.interleaved(variants, rounds)
    whole = {arm: [each + choices[arm] / INTERVAL for each in own] for arm, own in seconds.items()}
    found: dict[str, dict[str, Any]] = {}
    for arm, own in whole.items():
        over = common.ratio(own, whole[FULL])
        found[arm] = {
            "ms": round(median(own) * 1e3, 1),
            "over full": round(over["ratio"], 3),
            "deciles": over["deciles"],
            "choice ms": round(choices[arm] * 1e3, 1) if arm == LIFT else None,
        }
    return found


# -- how it scores -----------------------------------------------------------------------------------------------------


def scores(quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Accuracies on test data."""
    rows = []
    with TemporaryDirectory() as name:
        for make in (minilm, digits_vit, small_mobilenet):
            case = make(Path(name), quick)
            for arm in case.ways:
                if arm != CHECKPOINTED:  # whose gradients are those of full training
                    rates = (case.rates or {}).get(arm, RATES)
                    tried = {rate: fitted(case, arm, rate, 2 if quick else STEPS) for rate in rates}
                    best = min(tried, key=lambda rate: tried[rate][0])
                    found = {"accuracy": round(100 * tried[best][1], 1), "rate": best}
                    rows.append({"model": case.name, "row": arm, **found})
    return rows, []


def fitted(case: Case, arm: str, rate: float, count: int) -> tuple[float, float]:
    """Validation loss and test accuracy after a training."""
    assert case.splits is not None
    model, way = checkpoint.load(case.folders[arm], dtype=torch.float32), case.ways[arm]
    given: dict[str, Any] = {"validation": case.splits["search"], "steps": count, "learning_rate": rate, "keep": "last"}
    given |= {"rules": list(way.rules), "evaluate_every": count, "progress": False}
    batches = case.splits["train"]
    if way.adapter is None:
        trained = train(model, batches, trainable=way.trainable, **given)
    else:
        trained = train_adapter(model, batches, layers=parse_adapter(way.adapter).layers(model, batches), **given)
    return trained.validation, accuracy(model.eval(), case.splits["test"])


# -- task vectors ------------------------------------------------------------------------------------------------------


def atlas(quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The peak of a step that composes six vectors of 16 bits."""
    model = Docstrings(Sizes()).plain()
    batch = {"input_ids": torch.arange(8)[None] + 1000, "labels": torch.zeros(1, dtype=torch.long)}
    with TemporaryDirectory() as name, FreshProcess() as process:
        base = checkpoint.save(model, Path(name) / "base")
        files = [str(Path(name) / f"{index}.safetensors") for index in range(6)]
        for index, file in enumerate(files):
            generator = torch.Generator().manual_seed(index)
            drawn = {key: torch.randn(each.shape, generator=generator) for key, each in model.named_parameters()}
            Delta({key: Dense((0.01 * each).half()) for key, each in drawn.items()}).save(file)
        process.load(base, "float32")
        time_step(process, batch, Way(trainable=("classifier.*",)))  # what a first training imports is there now
        found = time_step(process, batch, Way(rules=({"atlas": {"vectors": files}},)))
    size, vectors = parameter_bytes(model), 6 * 2 * sum(each.numel() for each in model.parameters())
    over = (found["peak_bytes"] - found["resident_bytes"] - vectors) / size
    row = {"model": "MiniLM", "row": "aTLAS, six vectors", "trained": found["trainable"]}
    row |= {"model MB": round(size / 1e6, 1), "vectors MB": round(vectors / 1e6, 1), "peak over model": round(over, 3)}
    return [row], [
        common.target("aTLAS: peak of a step without the vectors, over the model", row["peak over model"], at_most=1.5)
    ]


# -- where LoRA begins -------------------------------------------------------------------------------------------------

MOST = 200  # batches that peft may read


def eva(quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Seconds of the processor that ranks and directions take, by us and by peft."""
    images = [{"pixel_values": batch["pixel_values"]} for batch in in_batches(turned("train"))[:5]]
    cases: list[tuple[str, Any, list[Batch]]] = [("digits ViT", zoo.load("vit", dtype=torch.float32), images)]
    if not quick:
        model: Any = zoo.load("minilm", dtype=torch.float32)
        reading: dict[str, Any] = {"sequences": 256, "length": 32, "batch_size": 32, "split": "train"}
        cases.append(("MiniLM", model, list(load_data(None, model, zoo.tokenizer("minilm"), **reading))))
    rows, targets = [], []
    for name, model, batches in cases:
        for rho in (2.0, 1.0):
            own, theirs, read = begun(model.eval(), batches, rho, 1 if quick else 3)
            read_by_peft = f"{read}, stopped" if read == MOST else str(read)
            row = {"model": name, "rho": rho, "row": "Eva.plan", "batches": str(len(batches)), "CPU s": round(own, 2)}
            rows += [row, {**row, "row": "peft", "batches": read_by_peft, "CPU s": round(theirs, 2)}]
            faster = round(theirs / own, 2)
            targets.append(common.target(f"{name}: EVA's plan, rho {rho:g}, times as fast as peft", faster, at_least=2))
    return rows, targets


class Stopped(Exception):
    """peft has read as many batches as it may."""


def begun(model: nn.Module, batches: list[Batch], rho: float, rounds: int) -> tuple[float, float, int]:
    """Median seconds by us and by peft, and the batches that peft read."""
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    adapter, read = Eva(rank=RANK, rho=rho), [0]
    paths = list(adapter.plan(model, batches, progress=False).ranks)
    config = LoraConfig(r=RANK, init_lora_weights="eva", target_modules=paths, eva_config=EvaConfig(rho=rho))
    functions = () if "input_ids" in batches[0] else ("prepare_model_inputs_fn", "prepare_layer_inputs_fn")
    given: dict[str, Any] = dict.fromkeys(functions)  # those of language models

    def counted(model: nn.Module, batch: Batch) -> Any:
        if read[0] == MOST:
            raise Stopped
        read[0] += 1
        return model(**batch)

    def by_peft() -> None:
        read[0] = 0
        try:
            get_eva_state_dict(model, batches, config, forward_fn=counted, show_progress_bar=False, **given)
        except Stopped:
            for module in model.modules():
                module._forward_hooks.clear()  # which peft takes away at its own end alone

    def of_processor(run: Callable[[], Any]) -> float:
        started = time.process_time()
        run()
        return time.process_time() - started

    found = [
        (of_processor(lambda: adapter.plan(model, batches, progress=False)), of_processor(by_peft))
        for _ in range(rounds)
    ]
    own, theirs = (median(each) for each in zip(*found, strict=True))
    return own, theirs, read[0]


# -- all ---------------------------------------------------------------------------------------------------------------


def tract(quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A step with a first layer by TrAct."""
    blocks, batch, rounds = (2, 4, 3) if quick else (12, 16, 12)
    rows = measure("ViT-S", lambda: vit(blocks), (batch, 3, 224, 224), rounds)
    rows += measure("digits CNN", DigitsCNN, (64, 1, 8, 8), 10 * rounds)
    targets = []
    for name in ("ViT-S", "digits CNN"):
        own = {row["row"]: row for row in rows if row["model"] == name and "over plain" in row}
        targets.append(common.target(f"{name}: tract, over the plain step", own[OURS]["over plain"], at_most=1.10))
        if PACKAGE in own:
            over = round(own[OURS]["ms"] / own[PACKAGE]["ms"], 3)
            targets.append(common.target(f"{name}: tract, over torch_tract", over, at_most=1.0))
    return rows, targets


def main() -> None:
    """Measure, print and record."""
    chosen = common.options(__doc__ or "", parts=PARTS)
    before = common.committed("finetuning") or {"rows": [], "targets": []}
    rows: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    for part, run in zip(PARTS, (tract, memory, steps, scores, atlas, eva), strict=True):
        if part in chosen.only:
            own, wanted = run(chosen.quick)
            rows += [{"part": part, **row} for row in own]
            targets += [{"part": part, **each} for each in wanted]
        elif not chosen.quick:
            rows += [row for row in before["rows"] if row["part"] == part]
            targets += [each for each in before["targets"] if each["part"] == part]
    common.report("finetuning", rows, targets, chosen, show=common.show_parts)


if __name__ == "__main__":
    main()
