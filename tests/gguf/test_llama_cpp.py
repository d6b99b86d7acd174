"""The real models beside llama.cpp on the same file: token ids, greedy text, and logits.

llama.cpp rounds what goes into a product with a quantized weight to 8 bits, one scale per 32 channels (256 for
K-quants). On a copy of the file with the same weights in float32 it does not, and there the logits agree closely. On
the file itself, a model in float32 whose linear layers round their inputs so says how far apart the two may be.
"""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actkit
from actkit.core.edit import changes
from actkit.data.text import SPLITS, documents
from actkit.gguf.file import GgufFile
from actkit.zoo.packaged import PACKAGED, is_installed, pieces

BENCH = Path(__file__).parents[2] / ".venv-bench" / "bin" / "python"
READER = Path(__file__).parents[1] / "formats" / "llama_cpp_reader.py"
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "Water boils at a temperature of",
    "Es war einmal ein König, der hatte",
    "1, 2, 3, 4, 5, 6,",
]
NEW = 24
STRANGE = [
    "a   b\n\n\n  c\t\td",
    "   at the front",
    "at the end   ",
    "\n\nx\n",
    "x\u00a0y\u2028z",
    "日本語のテキスト 12345",
    "émigré, naïve; œuvre",
    "👩‍👩‍👧‍👦 🙂",
    "١٢٣ ½ ² Ⅷ",
    "it's, don't, WE'LL, I'D",
    "a\r\nb\r\n\r\nc",
    "x" * 300,
    " " * 70 + "x",
    "<table><tr>",
    "\u2581\u2581x",
    "1234567890 1,234.56",
    "\x00\x01",
    "e\u0301 a\u0308",
]
MARKS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<bos>", "<eos>", "<end_of_turn>", "<unused5>", "<h1>"]


def thousand_texts() -> list[str]:
    """Docstrings, all that are not ASCII, random characters, and special tokens between words."""
    draw = random.Random(0)
    found = [document.text for split in SPLITS for document in documents(split)]
    draw.shuffle(found)
    texts = [*(text for text in found if not text.isascii()), *found[:700], *STRANGE]
    letters = list("abcXYZ 0123  \n\n\t.,;'\"-_éßøдж日本語🙂½²\u00a0\u200b\u0301")
    while len(texts) < 1000:
        if draw.random() < 0.5:
            texts.append("".join(draw.choices(letters, k=draw.randint(1, 60))))
        else:
            texts.append(draw.choice(found)[:80] + draw.choice(MARKS) + draw.choice(found)[:80])
    return texts


def llama_cpp(name: str, tmp_path: Path, *, widened: bool = False, **job: Any) -> list[Any]:
    """What llama.cpp finds in the file of a model, or in a copy that holds the same weights in float32."""
    if not BENCH.exists() or subprocess.run([str(BENCH), "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip("llama-cpp-python is not in .venv-bench; make .venv-bench/.installed builds it")
    file, path = tmp_path / "model.gguf", tmp_path / "job.json"
    with file.open("wb") as whole:
        for piece in pieces(name):
            whole.write(piece.read_bytes())
    if widened:
        file = in_float32(file)
    path.write_text(json.dumps([{"file": str(file), **job}]))
    done = subprocess.run([str(BENCH), str(READER), str(path)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = json.loads(done.stdout.splitlines()[-1])
    return found


def in_float32(path: Path) -> Path:
    import gguf

    file, out = GgufFile(path), path.with_name("float32.gguf")
    writer = gguf.GGUFWriter(out, file.settings["general.architecture"])
    for key, value in file.settings.items():
        if key not in ("general.architecture", "general.file_type"):
            kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            kinds.get(type(value), writer.add_array)(key, value)
    for name, entry in file.tensors.items():
        writer.add_tensor(name, file.values(entry))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return out


@pytest.fixture(scope="module", params=PACKAGED)
def name(request: pytest.FixtureRequest) -> str:
    if not is_installed(request.param):
        pytest.skip(f"{request.param}: its package is not installed; {PACKAGED[request.param].install}")
    return request.param


def test_the_same_tokens(name: str, tmp_path: Path) -> None:
    texts = thousand_texts()
    expected = llama_cpp(name, tmp_path, texts=texts)
    tokenizer = actkit.load_tokenizer(name)
    assert len(texts) == 1000
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] == ids, text


class Rounded(nn.Module):
    """A linear layer whose inputs are rounded to 8 bits, one scale per `size` channels, as llama.cpp does it."""

    def __init__(self, linear: nn.Linear, size: int) -> None:
        super().__init__()
        self.linear, self.size = linear, size

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, self.size))
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return self.linear(((blocks / scale).round() * scale).flatten(-2))


def with_rounded_inputs(model: Any) -> Any:
    layers = changes.source_grid(model).layers
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(path, Rounded(module, 256 if layers.get(path, "").endswith("_K") else 32))
    return model


def greedy(model: Any, ids: list[int]) -> tuple[list[int], list[Tensor]]:
    """The likeliest tokens one at a time, and the logits of each step."""
    written: list[int] = []
    logits: list[Tensor] = []
    with torch.no_grad():
        seen = model(torch.tensor([ids]), use_cache=True)
        for _ in range(NEW):
            logits.append(seen.logits[0, -1])
            written.append(int(logits[-1].argmax()))
            seen = model(torch.tensor([written[-1:]]), past_key_values=seen.past_key_values, use_cache=True)
    return written, logits


def test_the_same_logits_where_nothing_is_rounded(name: str, tmp_path: Path) -> None:
    tokenizer, model = actkit.load_tokenizer(name), actkit.load(name, dtype="float32")
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    theirs = llama_cpp(name, tmp_path, widened=True, prompts=prompts, new_tokens=1)
    for ids, found in zip(prompts, theirs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        expected = torch.tensor(found["logits"])
        # llama.cpp looks its nonlinearity up in a table of float16
        assert float((expected - logits).square().mean().sqrt()) < 2e-3 * float(logits.std())


def test_the_same_text_and_logits(name: str, tmp_path: Path) -> None:
    """Over all prompts logits differ by no more than twice what rounding the inputs of the linear layers does (root
    mean square; a rounding that falls the other way moves everything behind it, so a prompt alone is one draw). Greedy
    text is the same up to a step at which the two likeliest tokens are closer than the rounding moves them."""
    tokenizer = actkit.load_tokenizer(name)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    theirs = llama_cpp(name, tmp_path, prompts=prompts, new_tokens=NEW)
    exact = actkit.load(name, dtype="float32")
    ours = [greedy(exact, ids) for ids in prompts]
    exact_logits = torch.stack([logits[0] for _, logits in ours])
    rounded = with_rounded_inputs(exact)
    with torch.no_grad():
        moved = torch.stack([rounded(torch.tensor([ids])).logits[0, -1] for ids in prompts]) - exact_logits
    difference = torch.tensor([found["logits"] for found in theirs]) - exact_logits
    assert float(difference.square().mean().sqrt()) <= 2 * float(moved.square().mean().sqrt())
    for found, (written, _) in zip(theirs, ours, strict=True):
        parted = next((step for step in range(NEW) if written[step] != found["written"][step]), None)
        if parted is not None:
            assert found["gaps"][parted] <= 2 * float(moved.abs().max())
