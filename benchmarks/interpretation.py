"""Looking into models beside the packages that others use: seconds and peak memory, taking turns in one process.

    make interpretation-peers                       # installs the peers into .venv-interpretation
    python benchmarks/interpretation.py [--quick] [--json PATH|-] [--only PART ...]

swiglu, smollm2: activations of one site (the middle block's output) and of all blocks' outputs to disk, beside a plain
forward pass, SAELens' cache runner (TransformerLens runs the model), nnsight (its rows written as safetensors), and
dictionary_learning's buffer (in memory); float32, the same random tokens and weights in all. reading: a shuffled batch
of 4,096 rows from the store, beside a training step. steps: one optimizer step of a TopK autoencoder with k 32 on 4,096
rows, 256 -> 2,048 and 576 -> 8,192, by each package's own training code (loss, backward, what it does to gradients and
decoder, Adam), from the same weights; and what 50 steps of each are worth on rows held out (256 -> 2,048, rows made of
sparse directions). kinds: the same for the other kinds. relp: effects of all (block, position) of three sites of swiglu
by RelP, attribution patching and exact patching, and TransformerLens' `get_act_patch_block_every`. relp-smollm2: the
same of SmolLM2 and its 1,080 nodes, without the peer.

Two threads. Peaks are of a process of its own for each, on top of what it held before the call, model and data included
there; of steps at the largest shape alone. The targets were set before the first run. A package that does not run is a
row that says so.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import io
import json
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import common  # isort: skip
import torch
from peers import add_peers, hooked_transformer
from safetensors.torch import save_file
from torch import Tensor

from actkit import zoo
from actkit.core.store.activation_store import ActivationStore, harvest
from actkit.interpretation.relp.effects import patch_effects
from actkit.interpretation.relp.metrics import LogitDifference
from actkit.interpretation.sparse_autoencoder.kinds import KINDS
from actkit.interpretation.sparse_autoencoder.training import geometric_median

PARTS = ("swiglu", "smollm2", "reading", "steps", "kinds", "relp", "relp-smollm2")
FULL: dict[str, Any] = {
    "swiglu": (16, 8, 128, 5),  # batches, rows, tokens of a row, rounds
    "smollm2": (8, 2, 128, 3),
    "rounds": 3,
    "rows": 4096,
    "shapes": ((256, 2048), (576, 8192)),
    "steps": 50,
    "relp": (8, 12, 3),  # pairs, tokens, rounds
    "relp-smollm2": (8, 12, 3),
}
QUICK: dict[str, Any] = {
    "swiglu": (8, 4, 64, 3),
    "smollm2": None,
    "rounds": 3,
    "rows": 512,
    "shapes": ((64, 256),),
    "steps": 5,
    "relp": (2, 6, 2),
    "relp-smollm2": None,
}
K = 32
Rows = list[dict[str, Any]]
Variants = dict[str, Callable[[], Any]]


# -- measuring ---------------------------------------------------------------------------------------------------------


def high_water() -> int:
    """The most bytes that this process had since its peak began anew (Linux)."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _peak(make: Callable[..., Variants], arguments: tuple[Any, ...], name: str, found: Any) -> None:
    add_peers()
    torch.set_num_threads(2)
    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            call = make(*arguments, Path(folder), only=name)[name]
            if name not in ONCE:
                call()  # kernels are compiled, optimizers have their state
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or the call finds it there
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
            before = high_water()
            call()
            found.put(high_water() - before)
    except Exception:  # whatever a peer does
        found.put(None)


def peak_bytes(make: Callable[..., Variants], arguments: tuple[Any, ...], name: str) -> float | None:
    """MB that a variant takes on top, in a process of its own; None if it does not run."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=_peak, args=(make, arguments, name, found))
    process.start()
    peak = found.get(timeout=600)
    process.join()
    return None if peak is None else round(peak / 1e6, 1)


@contextlib.contextmanager
def quiet() -> Any:
    """What packages print and warn of is left out."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def runnable(variants: Variants) -> tuple[Variants, dict[str, str]]:
    """Those that run, each tried once, and why the others do not."""
    fine, reasons = {}, {}
    for name, call in variants.items():
        try:
            with quiet():
                call()
            fine[name] = call
        except Exception as error:  # whatever a peer does
            reasons[name] = f"does not run: {type(error).__name__}: {str(error).strip().splitlines()[0]}"[:120]
    return fine, reasons


def timed(
    make: Callable[..., Variants], arguments: tuple[Any, ...], rounds: int, peaks: bool = True
) -> tuple[dict[str, list[float]], dict[str, str], dict[str, float | None]]:
    """Seconds of each round, why some do not run, and the peaks in MB."""
    with tempfile.TemporaryDirectory() as folder:
        fine, reasons = runnable(make(*arguments, Path(folder)))
        with quiet():
            seconds = common.interleaved(fine, rounds)
    return seconds, reasons, {name: peak_bytes(make, arguments, name) for name in fine if peaks}


def chosen(variants: Mapping[str, Callable[[], Callable[[], Any]]], only: str | None) -> Variants:
    """Make variants; one that cannot be made raises when it is called."""
    made: Variants = {}
    for name, make in variants.items():
        if only in (None, name):
            try:
                with quiet():
                    made[name] = make()
            except Exception as error:  # whatever a peer does

                def fail(error: Exception = error) -> None:
                    raise error

                made[name] = fail
    return made


# -- harvesting --------------------------------------------------------------------------------------------------------

PLAIN, ONE, ALL = "plain forward pass", "actkit, one site", "actkit, all blocks' outputs"
SAE_LENS, NNSIGHT, BUFFER = "SAELens' cache runner", "nnsight", "dictionary_learning's buffer"
ONCE = (BUFFER,)


def random_text(model: Any, batches: int, rows: int, length: int) -> list[dict[str, Tensor]]:
    """Batches of tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (batches, rows, length)
    return [{"input_ids": ids} for ids in torch.randint(2, model.config.vocab_size, shape, generator=generator)]


def harvesting(name: str, batches: int, rows: int, length: int, folder: Path, only: str | None = None) -> Variants:
    """Calls that run a model over the same text and keep what stands behind its middle block."""
    model = zoo.load(name, dtype=torch.float32).eval()
    given = random_text(model, batches, rows, length)
    ids = torch.cat([batch["input_ids"] for batch in given])
    block = model.config.num_hidden_layers // 2 - 1
    site, counter = f"blocks.{block}.block.output", iter(range(1_000_000))

    def place() -> Path:
        return folder / f"{next(counter)}"

    def plain() -> Callable[[], Any]:
        def call() -> None:
            with torch.no_grad():
                for batch in given:
                    model(**batch)

        return call

    def sae_lens() -> Callable[[], Any]:
        from datasets import Dataset, Features, Sequence, Value
        from sae_lens.cache_activations_runner import CacheActivationsRunner, _mk_activations_store
        from sae_lens.config import CacheActivationsRunnerConfig

        hooked, tokens = hooked_transformer(model), Features({"input_ids": Sequence(Value("int32"))})
        dataset = Dataset.from_dict({"input_ids": ids.tolist()}, features=tokens)

        def call() -> None:
            config = CacheActivationsRunnerConfig(
                dataset_path="text",
                model_name=name,
                model_batch_size=rows,
                hook_name=f"blocks.{block}.hook_resid_post",
                d_in=model.config.hidden_size,
                training_tokens=ids.numel(),
                context_size=length,
                new_cached_activations_path=str(place()),
                shuffle=False,
                device="cpu",
                prepend_bos=False,
                streaming=False,
                buffer_size_gb=(4 * model.config.hidden_size * ids.numel() + 1) / 1e9,  # all of it in one
            )
            runner = object.__new__(CacheActivationsRunner)  # its __init__ fetches the model by name
            runner.cfg, runner.model, runner.context_size = config, hooked, length
            runner.activations_store = _mk_activations_store(hooked, config, override_dataset=dataset)
            from datasets import Array2D

            shape = (length, model.config.hidden_size)
            runner.features = Features(
                {config.hook_name: Array2D(shape=shape, dtype="float32"), "token_ids": Sequence(Value("int32"), length)}
            )
            runner.run()

        return call

    def nnsight() -> Callable[[], Any]:
        from nnsight import NNsight

        wrapped = NNsight(copy.deepcopy(model))  # it replaces the model's forward

        def call() -> None:
            kept = []
            with torch.no_grad():
                for batch in given:
                    with wrapped.trace(**batch) as tracer:
                        found = wrapped.model.layers[block].output.save()
                        tracer.stop()
                    kept.append(found.flatten(0, 1))
            out = place()
            out.mkdir()
            save_file({"rows": torch.cat(kept)}, out / "rows.safetensors")

        return call

    def buffer() -> Callable[[], Any]:
        from dictionary_learning.buffer import ActivationBuffer
        from nnsight import LanguageModel

        tokenizer = zoo.tokenizer(name)
        wrapped = LanguageModel(copy.deepcopy(model), tokenizer=tokenizer)
        texts = [tokenizer.decode(row) for row in ids]

        def call() -> None:
            filled = ActivationBuffer(
                iter(texts * 2),
                wrapped,
                wrapped.model.layers[block],
                d_submodule=model.config.hidden_size,
                n_ctxs=len(ids),
                ctx_len=length,
                refresh_batch_size=rows,
                out_batch_size=ids.numel(),
            )
            filled.refresh()

        return call

    return chosen(
        {
            PLAIN: plain,
            ONE: lambda: lambda: harvest(model, site, given, place(), progress=False),
            ALL: lambda: lambda: harvest(model, "block.output", given, place(), progress=False),
            SAE_LENS: sae_lens,
            NNSIGHT: nnsight,
            BUFFER: buffer,
        },
        only,
    )


def harvests(name: str, setting: Mapping[str, Any]) -> tuple[Rows, Rows]:
    """Rows and targets of one model."""
    if setting[name] is None:
        return [], []
    batches, rows, length, rounds = setting[name]
    seconds, reasons, peaks = timed(harvesting, (name, batches, rows, length), rounds)
    tokens = batches * rows * length
    found: Rows = []
    for variant in (PLAIN, ONE, ALL, SAE_LENS, NNSIGHT, BUFFER):
        own = seconds.get(variant)
        over = None if own is None else common.ratio(own, seconds[PLAIN])
        found.append(
            {
                "row": variant,
                "tokens/s": None if own is None else round(tokens / median(own)),
                "time over plain": None if over is None else round(over["ratio"], 3),
                "deciles": None if over is None else over["deciles"],
                "peak MB": peaks.get(variant),
                "note": reasons.get(variant, ""),
            }
        )
    over = {variant: common.ratio(seconds[variant], seconds[PLAIN])["ratio"] for variant in seconds}
    targets = [
        common.target(f"{name}: one site, time over a plain pass", round(over[ONE], 3), at_most=1.15),
        common.target(f"{name}: all blocks' outputs, over a plain pass", round(over[ALL], 3), at_most=1.3),
    ]
    for peer, least in ((SAE_LENS, 2.0), (NNSIGHT, 1.0), (BUFFER, 1.0)):
        if peer in over:
            faster = round(over[peer] / over[ONE], 3)
            targets.append(common.target(f"{name}: tokens/s over those of {peer}", faster, at_least=least))
    return found, targets


# -- autoencoders ------------------------------------------------------------------------------------------------------


def activations(channels: int, rows: int) -> Tensor:
    """Rows that have a structure to be found: few of 4 x channels directions, and noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * channels, channels, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    code = torch.rand(rows, 4 * channels, generator=generator)
    code = (code - 0.97).clamp_min(0) / 0.03
    return code @ directions + 0.05 * torch.randn(rows, channels, generator=generator)


OURS, LEARNING, LENS, SPARSIFY = "actkit", "dictionary_learning", "SAELens", "sparsify"


def steps_of(
    kind: str, channels: int, latents: int, batches: list[Tensor], only: str | None = None
) -> dict[str, Callable[[], tuple[Callable[[Tensor], float], Callable[[Tensor], Tensor]]]]:
    """For each package what makes (a step that returns its loss, the reconstruction); all of topk start alike."""
    torch.manual_seed(0)
    counted = {"k": K} if kind in ("topk", "batchtopk", "matryoshka") else {"sparsity": 0.1}
    start = KINDS[kind](channels, latents, **counted).train()
    with torch.no_grad():
        start.decoder_bias.copy_(geometric_median(batches[0]))
    variance = float((batches[0] - batches[0].mean(0)).square().sum() / len(batches[0]))
    rate, device = 2e-4 / (latents / 2**14) ** 0.5, "cpu"

    def ours() -> Any:
        own: Any = copy.deepcopy(start)
        optimizer = torch.optim.Adam(own.parameters(), lr=rate)

        def step(x: Tensor) -> float:
            loss = own.loss(x)
            loss.backward()
            own.constrain_gradients()
            torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            own.constrain()
            return float(loss.detach())

        return step, lambda x: own(x)

    def learning() -> Any:
        from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k

        common: dict[str, Any] = {"steps": 5000, "activation_dim": channels, "dict_size": latents, "layer": 0}
        common |= {"lm_name": "a", "device": device, "lr": rate, "warmup_steps": 0}
        made: Any = {
            "topk": lambda: top_k.TopKTrainer(k=K, **common),
            "batchtopk": lambda: batch_top_k.BatchTopKTrainer(k=K, **common),
            "matryoshka": lambda: matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(
                k=K, group_fractions=[1 / 8, 1 / 8, 1 / 4, 1 / 2], **common
            ),
            "standard": lambda: standard.StandardTrainer(**common),
            "gated": lambda: gdm.GatedSAETrainer(**common),
            "jumprelu": lambda: jumprelu.JumpReluTrainer(**common),
        }[kind]
        trainer = made()
        if kind == "topk":
            with torch.no_grad():
                trainer.ae.encoder.weight.copy_(start.encoder)
                trainer.ae.encoder.bias.copy_(start.encoder_bias)
                trainer.ae.decoder.weight.copy_(start.decoder.T)
                trainer.ae.b_dec.copy_(start.decoder_bias)

        def step(x: Tensor) -> float:
            loss = trainer.update(1, x)  # 0 would find the median again
            return float("nan") if loss is None else float(loss) / variance

        return step, lambda x: trainer.ae(x)

    def lens() -> Any:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.registry import get_sae_training_class
        from sae_lens.training.sae_trainer import SAETrainer

        made, config = get_sae_training_class("matryoshka_batchtopk" if kind == "matryoshka" else kind)
        more: dict[str, Any] = {"k": K} if "k" in counted else {}
        if kind == "matryoshka":
            more["matryoshka_widths"] = [latents // 8, latents // 4, latents // 2, latents]
        sae = made(config(d_in=channels, d_sae=latents, **more))
        if kind == "topk":
            with torch.no_grad():
                sae.W_enc.copy_(start.encoder.T)
                sae.b_enc.copy_(start.encoder_bias)
                sae.W_dec.copy_(start.decoder)
                sae.b_dec.copy_(start.decoder_bias)
        settings = SAETrainerConfig(
            total_training_samples=10_000_000, train_batch_size_samples=len(batches[0]), lr=rate, lr_end=rate / 10
        )
        trainer = SAETrainer(settings, sae, iter(()))

        def step(x: Tensor) -> float:
            return float(trainer.step(x).loss.detach()) / variance

        return step, lambda x: sae(x)

    def sparsify() -> Any:
        from sparsify.config import SparseCoderConfig
        from sparsify.sparse_coder import SparseCoder

        coder = SparseCoder(channels, SparseCoderConfig(k=K, num_latents=latents))
        with torch.no_grad():
            coder.encoder.weight.copy_(start.encoder)
            coder.encoder.bias.copy_(start.encoder_bias)
            coder.W_dec.copy_(start.decoder)
            coder.b_dec.copy_(start.decoder_bias)
        optimizer = torch.optim.Adam(coder.parameters(), lr=rate)

        def step(x: Tensor) -> float:  # the steps of its Trainer, which is made for whole models
            coder.set_decoder_norm_to_unit_norm()
            loss = coder(x).fvu
            loss.backward()
            torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
            coder.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        return step, lambda x: coder(x).sae_out

    found = {OURS: ours, LEARNING: learning, LENS: lens}
    return {**found, SPARSIFY: sparsify} if kind == "topk" else found


def stepping(kind: str, channels: int, latents: int, rows: int, folder: Path, only: str | None = None) -> Variants:
    """Calls that take one step, on batches in turn."""
    batches = list(activations(channels, 4 * rows).split(rows))
    made = {}
    for name, make in steps_of(kind, channels, latents, batches).items():

        def ready(make: Callable[[], Any] = make) -> Callable[[], Any]:
            step, _ = make()
            state = {"at": 0}

            def call() -> float:
                state["at"] += 1
                value: float = step(batches[(state["at"] - 1) % len(batches)])
                return value

            return call

        made[name] = ready
    return chosen(made, only)


def first_losses(kind: str, channels: int, latents: int, rows: int) -> dict[str, float]:
    """The loss of the first step of each, a share of the variance."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, call in stepping(kind, channels, latents, rows, Path(folder)).items():
            with contextlib.suppress(Exception), quiet():
                found[name] = float(call())
    return found


def steps(setting: Mapping[str, Any]) -> tuple[Rows, Rows]:
    """Rows and targets of TopK steps, and what equal tokens give."""
    found: Rows = []
    targets: Rows = []
    for channels, latents in setting["shapes"]:
        arguments = ("topk", channels, latents, setting["rows"])
        losses = first_losses(*arguments)
        largest = (channels, latents) == setting["shapes"][-1]
        seconds, reasons, peaks = timed(stepping, arguments, setting["rounds"], peaks=largest)
        shape = f"{channels} -> {latents}"
        for name in (OURS, LEARNING, LENS, SPARSIFY):
            own = seconds.get(name)
            over = None if own is None else common.ratio(own, seconds[OURS])
            found.append(
                {
                    "shape": shape,
                    "row": name,
                    "ms": None if own is None else round(median(own) * 1e3, 1),
                    "time over actkit": None if over is None else round(over["ratio"], 3),
                    "deciles": None if over is None else over["deciles"],
                    "first loss": round(losses[name], 7) if name in losses else None,
                    "peak MB": peaks.get(name),
                    "note": reasons.get(name, ""),
                }
            )
        over_ours = {name: common.ratio(own, seconds[OURS])["ratio"] for name, own in seconds.items()}
        apart = max(abs(each - losses[OURS]) for each in losses.values())
        targets.append(common.target(f"{shape}: first losses apart", apart, at_most=1e-5))
        if LEARNING in over_ours:
            name = f"{shape}: times as fast as dictionary_learning"
            targets.append(common.target(name, round(over_ours[LEARNING], 3), at_least=2.0))
        others = [over_ours[each] for each in (LENS, SPARSIFY) if each in over_ours]
        if others:
            name = f"{shape}: times as fast as the faster of SAELens and sparsify"
            targets.append(common.target(name, round(min(others), 3), at_least=1.3))
    channels, latents = setting["shapes"][0]
    worth = quality(channels, latents, setting["rows"], setting["steps"])
    for row in found:
        if row["shape"] == f"{channels} -> {latents}":
            row[f"FVU after {setting['steps']} steps"] = worth.get(row["row"])
    return found, targets


def quality(channels: int, latents: int, rows: int, count: int) -> dict[str, float]:
    """FVU on rows that none was trained on, after equal steps on equal batches."""
    x = activations(channels, 16 * rows)
    held_out, batches = x[:rows], list(x[rows:].split(rows))
    found = {}
    for name, make in steps_of("topk", channels, latents, batches).items():
        with contextlib.suppress(Exception), quiet():
            step, reconstruct = make()
            for number in range(count):
                step(batches[number % len(batches)])
            with torch.no_grad():
                error = (held_out - reconstruct(held_out)).square().sum()
            found[name] = round(float(error / (held_out - held_out.mean(0)).square().sum()), 4)
    return found


def kinds(setting: Mapping[str, Any]) -> tuple[Rows, Rows]:
    """Rows and targets of the other kinds."""
    found: Rows = []
    targets: Rows = []
    channels, latents = setting["shapes"][0]
    for kind in KINDS:
        if kind == "topk":
            continue
        arguments = (kind, channels, latents, setting["rows"])
        seconds, reasons, _ = timed(stepping, arguments, setting["rounds"], peaks=False)
        for name in (OURS, LEARNING, LENS):
            own = seconds.get(name)
            over = None if own is None else common.ratio(own, seconds[OURS])
            found.append(
                {
                    "kind": kind,
                    "row": name,
                    "ms": None if own is None else round(median(own) * 1e3, 1),
                    "time over actkit": None if over is None else round(over["ratio"], 3),
                    "deciles": None if over is None else over["deciles"],
                    "note": reasons.get(name, ""),
                }
            )
            if own is not None and name != OURS and over is not None:
                what = f"{kind}: times as fast as {name}"
                targets.append(common.target(what, round(over["ratio"], 3), at_least=1.0))
    return found, targets


def reading(setting: Mapping[str, Any]) -> tuple[Rows, Rows]:
    """Rows and targets of shuffled batches from a store, beside the step that they feed."""
    batches, rows, length, _ = setting["swiglu"]
    model = zoo.load("swiglu", dtype=torch.float32).eval()
    text = random_text(model, batches, rows, length)
    channels, latents = setting["shapes"][0]
    size = min(setting["rows"], batches * rows * length // 4)
    with tempfile.TemporaryDirectory() as folder:
        store: ActivationStore = harvest(model, "blocks.2.block.output", text, Path(folder) / "acts", progress=False)
        stored = store.batches("blocks.2.block.output", size)
        step, _ = steps_of("topk", stored[0].shape[1], latents, [stored[0].float()])[OURS]()
        x, state = stored[0].float(), {"at": 0}

        def read() -> Tensor:
            state["at"] += 1
            batch: Tensor = stored[state["at"] % len(stored)]
            return batch

        seconds = common.interleaved({"a batch": read, "a step": lambda: step(x)}, 4 * setting["rounds"])
    share = common.ratio(seconds["a batch"], seconds["a step"])
    found = [{"row": name, "rows": size, "ms": round(median(own) * 1e3, 2)} for name, own in seconds.items()]
    name = f"reading {size} rows of {channels}, over a step with {latents} latents"
    return found, [common.target(name, round(share["ratio"], 4), at_most=0.1)]


# -- effects -----------------------------------------------------------------------------------------------------------

BLOCKS = ("block.input", "attention.output", "mlp.output")
THEIRS, PASS = "TransformerLens, get_act_patch_block_every", "forward and backward pass"


def patching(name: str, pairs: int, length: int, folder: Path, only: str | None = None) -> Variants:
    """Calls that find effects of the same nodes."""
    model = zoo.load(name, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    base, patch = (torch.randint(2, model.config.vocab_size, (pairs, length), generator=generator) for _ in range(2))
    right, wrong = torch.randint(2, model.config.vocab_size, (2, pairs), generator=generator)
    metric = LogitDifference(right, wrong)

    def ours(method: Any) -> Callable[[], Callable[[], Any]]:
        def call() -> Any:
            given = {"input_ids": base}, {"input_ids": patch}
            return patch_effects(model, *given, metric, sites=BLOCKS, method=method, rows=16, progress=False)

        return lambda: call

    def theirs() -> Callable[[], Any]:
        from transformer_lens.patching import get_act_patch_block_every

        hooked = hooked_transformer(model)

        def call() -> Any:
            with torch.no_grad():
                _, cache = hooked.run_with_cache(patch)
                return get_act_patch_block_every(hooked, base, cache, metric)

        return call

    def both() -> Callable[[], Any]:
        def call() -> None:
            metric(model(input_ids=base).logits).backward()
            model.zero_grad()

        return call

    calls = {
        "RelP": ours("relp"),
        "attribution patching": ours("attribution"),
        "exact patching": ours("exact"),
        THEIRS: theirs,
        PASS: both,
    }
    if name != "swiglu":  # 1,080 whole passes for each of its calls
        del calls[THEIRS]
    return chosen(calls, only)


def relp(name: str, given: tuple[int, int, int] | None) -> tuple[Rows, Rows]:
    """Rows and targets of effects."""
    if given is None:
        return [], []
    pairs, length, rounds = given
    seconds, reasons, peaks = timed(patching, (name, pairs, length), rounds)
    found: Rows = []
    for row in ("RelP", "attribution patching", "exact patching", THEIRS, PASS):
        if row not in seconds and row not in reasons:
            continue
        own = seconds.get(row)
        over = None if own is None else common.ratio(own, seconds["attribution patching"])
        found.append(
            {
                "row": row,
                "pairs x tokens": f"{pairs} x {length}",
                "ms": None if own is None else round(median(own) * 1e3, 1),
                "over attribution": None if over is None else round(over["ratio"], 3),
                "deciles": None if over is None else over["deciles"],
                "peak MB": peaks.get(row),
                "note": reasons.get(row, ""),
            }
        )

    def over(one: str, other: str) -> float:
        return round(common.ratio(seconds[one], seconds[other])["ratio"], 4)

    exact = "exact patching"
    targets = [
        common.target(
            f"{name}: RelP, time over attribution patching", over("RelP", "attribution patching"), at_most=1.5
        ),
        common.target(f"{name}: RelP, time over exact patching", over("RelP", exact), at_most=0.05),
        common.target(
            f"{name}: attribution, time over exact patching", over("attribution patching", exact), at_most=0.05
        ),
    ]
    if THEIRS in seconds:
        targets.append(common.target("exact: times as fast as TransformerLens'", over(THEIRS, exact), at_least=1.5))
    if peaks.get("RelP") is not None and peaks.get(PASS):
        share = round(peaks["RelP"] / peaks[PASS], 3)  # type: ignore[operator]
        targets.append(common.target(f"{name}: RelP, peak over a forward and backward pass", share, at_most=3.0))
    return found, targets


MEASURE: dict[str, Callable[[Mapping[str, Any]], tuple[Rows, Rows]]] = {
    "swiglu": lambda setting: harvests("swiglu", setting),
    "smollm2": lambda setting: harvests("smollm2", setting),
    "reading": reading,
    "steps": steps,
    "kinds": kinds,
    "relp": lambda setting: relp("swiglu", setting["relp"]),
    "relp-smollm2": lambda setting: relp("smollm2", setting["relp-smollm2"]),
}


def main() -> None:
    """Measure, print and record."""
    given = common.options(__doc__ or "", parts=PARTS)
    add_peers()
    torch.set_num_threads(2)
    setting = QUICK if given.quick else FULL
    found = {part: MEASURE[part](setting) for part in given.only}
    # what is recorded of other parts stays
    before = (None if given.quick else common.committed("interpretation")) or {
        "rows": [],
        "targets": [],
        "measured": {},
    }
    now = {"date": f"{common.datetime.now(common.UTC):%Y-%m-%d}", "commit": common.commit()}
    measured = {**before["measured"], **dict.fromkeys(given.only, now)}
    rows: Rows = []
    targets: Rows = []
    for part in PARTS:
        kept = [[each for each in before[name] if each["part"] == part] for name in ("rows", "targets")]
        own, goals = ([{"part": part, **each} for each in side] for side in found[part]) if part in found else kept
        rows, targets = [*rows, *own], [*targets, *goals]
    common.report(
        "interpretation", json.loads(json.dumps(rows)), targets, given, show=common.show_parts, measured=measured
    )


if __name__ == "__main__":
    main()
