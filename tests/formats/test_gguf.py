"""GGUF: three readers that are not ours (the package gguf, transformers, llama.cpp) find the model that was written."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import actkit
from actkit.core.grids.integers import IntegerGrid
from actkit.core.ground.errors import ExportError
from actkit.core.layers.weights import IntegerWeight
from actkit.core.recipe.runner import apply
from actkit.formats.export import export
from actkit.formats.gguf_file import blocks
from actkit.formats.reading import expected_outputs, read_back
from actkit.testing.models import tiny_model

gguf = pytest.importorskip("gguf", reason="the extra 'export' is not installed")

BENCH = Path(__file__).parents[2] / ".venv-bench" / "bin" / "python"
READER = Path(__file__).with_name("llama_cpp_reader.py")
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
Q8 = {"bits": 8, "group_size": 32, "symmetric": True}
Q4 = {"bits": 4, "group_size": 32, "symmetric": True}
PROMPTS = ["Return the", "The number of elements", "Raised when the child process", "If the file"]
NEW = 32
GELU = 5e-4  # of the largest logit: llama.cpp looks Gemma's nonlinearity up in a table of float16


def random_model(config: Any, cls: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = cls(config(**{**SHAPE, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_(1.0 if "norm" in name else 0.0)
    return model.eval()


def quantized(model: Any, method: str, settings: dict[str, Any]) -> Any:
    recipe = {"actkit": 1, "transforms": [{method: settings}]}
    return apply(model, recipe, None, min_coverage=0.0, progress=False).model


ARCHITECTURES = {
    "llama": lambda: random_model(LlamaConfig, LlamaForCausalLM, head_dim=32),  # heads wider than hidden / heads
    "mistral": lambda: random_model(MistralConfig, MistralForCausalLM, rope_parameters={"rope_theta": 1e5}),
    "qwen2": lambda: random_model(Qwen2Config, Qwen2ForCausalLM, tie_word_embeddings=True),  # biases
    "qwen3": lambda: random_model(
        Qwen3Config, Qwen3ForCausalLM, head_dim=128
    ),  # norms of query and key; transformers reads 128 only
    "gemma3": lambda: gemma3(),
    "own head": lambda: own_head(),
    "llama q8": lambda: quantized(ARCHITECTURES["llama"](), "rtn", Q8),
    "llama q8 ends": lambda: quantized(ARCHITECTURES["llama"](), "rtn", {**Q8, "embedding": {"bits": 8}}),
    "qwen2 q4 tied ends": lambda: quantized(ARCHITECTURES["qwen2"](), "rtn", {**Q4, "embedding": {"bits": 8}}),
    "gemma3 q4 tied ends": lambda: quantized(gemma3(), "rtn", {**Q4, "embedding": {"bits": 8}}),
    "qwen2 q4_1": lambda: quantized(ARCHITECTURES["qwen2"](), "rtn", {**Q4, "symmetric": False}),
}


def gemma3(**settings: Any) -> Any:
    """Five blocks with a window that is shorter than the prompt, and one without; the norms' weights lie around 0."""
    shape = {"num_hidden_layers": 6, "head_dim": 256, "sliding_window": 8}  # transformers reads 256 only
    model = random_model(Gemma3TextConfig, Gemma3ForCausalLM, **{**shape, **settings})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.sub_(1.0)
    return model


BIASED = {  # transformers' reader leaves the biases out
    "biases of attention": lambda: random_model(LlamaConfig, LlamaForCausalLM, attention_bias=True),
    "biases of the mlp": lambda: random_model(LlamaConfig, LlamaForCausalLM, mlp_bias=True),
    "all biases": lambda: random_model(LlamaConfig, LlamaForCausalLM, attention_bias=True, mlp_bias=True),
}


def own_head() -> Any:
    """A head that was cut loose from the embedding, which the config still ties."""
    model = random_model(LlamaConfig, LlamaForCausalLM, tie_word_embeddings=True)
    generator = torch.Generator().manual_seed(3)
    model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn(64, 64, generator=generator))
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Per architecture: the report, the file, the batch and what memory computes on it."""
    out = tmp_path_factory.mktemp("gguf")
    found = {}
    for name, make in ARCHITECTURES.items():
        model = make()
        report = export(model, out / name.replace(" ", "-"), "gguf", proof=False)
        batch = {"input_ids": torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(2))}
        (file,) = report.folder.glob("*.gguf")
        found[name] = (report, file, batch, expected_outputs(model, batch))
    return found


def test_transformers_reads_the_files(files):
    found = read_back([(file.parent, torch.float32, batch, file.name) for _, file, batch, _ in files.values()])
    for (name, (*_, expected)), outputs in zip(files.items(), found, strict=True):
        close = 1e-5 if " " not in name else 5e-3  # quantized: scales in float16
        assert float((outputs - expected).abs().max()) <= close * float(expected.abs().max()), name


def test_our_own_reader_reads_the_files(files, tmp_path, monkeypatch):
    monkeypatch.setenv("ACTKIT_CACHE", str(tmp_path))
    for name, (_, file, batch, expected) in files.items():
        close = 1e-5 if " " not in name else 5e-3  # quantized: scales in float16
        found = expected_outputs(actkit.load(file, dtype="float32"), batch)
        assert float((found - expected).abs().max()) <= close * float(expected.abs().max()), name


def test_gemma3_beyond_what_transformers_reads(tmp_path, monkeypatch):
    """Other head sizes and a scaled rotation: our reader and llama.cpp compute the model, transformers is not asked."""
    monkeypatch.setenv("ACTKIT_CACHE", str(tmp_path / "cache"))
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    cases = {
        "heads": ({"head_dim": 32, "query_pre_attn_scalar": 32}, "scales attention by 256 channels"),
        "rotation": ({"rope_parameters": rope}, "leaves out the scaling of the rotation"),
    }
    ids = torch.randint(64, (1, 40), generator=torch.Generator().manual_seed(2))
    jobs, outputs = [], []
    for name, (settings, why) in cases.items():
        model = gemma3(**settings)
        report = export(model, tmp_path / name, "gguf")
        assert report.reading is None and why in report.notes[-1]
        file = report.folder / f"{name}.gguf"
        outputs.append(expected_outputs(model, {"input_ids": ids}))
        found = expected_outputs(actkit.load(file, dtype="float32"), {"input_ids": ids})
        assert float((found - outputs[-1]).abs().max()) <= 1e-5 * float(outputs[-1].abs().max())
        jobs.append({"file": str(file), "prompts": [ids[0].tolist()], "new_tokens": 1})
    for expected, (found,) in zip(outputs, llama_cpp(jobs), strict=True):
        difference = float((torch.tensor(found["logits"]) - expected[0, -1]).abs().max())
        assert difference <= GELU * float(expected.abs().max())


def sentencepiece(prefix: bool, *, merges: list[tuple[str, str]] | None = None) -> Any:
    """A small tokenizer as Gemma's: every way to make a word of two pieces is a merge, other text becomes bytes."""
    pieces = ["<unk>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "n", "d"]
    words = ["an", "▁a", "and", "▁an", "▁and", "ba", "nan", "▁ba", "▁▁"]
    tokens = [*pieces, *words]
    every = [(w[:cut], w[cut:]) for w in words for cut in range(1, len(w)) if {w[:cut], w[cut:]} <= set(tokens)]
    found = models.BPE(
        {token: at for at, token in enumerate(tokens)},
        every if merges is None else merges,
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(found)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>")


TEXTS = ["and  banana", " an and", "naïve ban\n\tband", "<bos>a", "aaaa nnand", "bananand", "\u2581ab"]


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_is_read_as_it_was(prefix, tmp_path, monkeypatch):
    monkeypatch.setenv("ACTKIT_CACHE", str(tmp_path / "cache"))
    tokenizer = sentencepiece(prefix)
    model = gemma3(vocab_size=len(tokenizer))
    report = export(model, tmp_path / "out", "gguf", tokenizer=tokenizer, proof=False)
    assert not any("no tokenizer" in note for note in report.notes)
    file = report.folder / "out.gguf"
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    again = actkit.load_tokenizer(file)
    assert [again(text, add_special_tokens=False)["input_ids"] for text in TEXTS] == ids
    assert [again.decode(each) for each in ids] == [tokenizer.decode(each) for each in ids]
    assert llama_cpp([{"file": str(file), "texts": TEXTS}])[0] == ids


@pytest.mark.parametrize(
    ("merges", "why"),
    [
        ([("a", "n"), ("▁", "a"), ("an", "d"), ("▁a", "n")], "not every way to make '▁an' of two tokens"),
        ([("▁", "a"), ("▁a", "n"), ("a", "n"), ("▁", "an")], "its merges make '▁an' at two places of their order"),
    ],
)
def test_a_tokenizer_that_no_scores_say_is_left_out(merges, why, tmp_path):
    tokenizer = sentencepiece(False, merges=merges)
    model = gemma3(vocab_size=len(tokenizer))
    report = export(model, tmp_path / "out", "gguf", tokenizer=tokenizer, proof=False)
    assert any(f"no tokenizer is written ({why}" in note for note in report.notes)


def test_a_rounded_embedding_is_rows_of_blocks(files):
    for name, tied in (("llama q8 ends", False), ("qwen2 q4 tied ends", True), ("gemma3 q4 tied ends", True)):
        report, file, *_ = files[name]
        kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
        assert kinds["token_embd.weight"] == "Q8_0"
        assert ("output.weight" in kinds) != tied  # one table serves both
        assert report.quantized["model.embed_tokens"].startswith("Q8_0")


@pytest.mark.parametrize("name", ["llama q8 ends", "qwen2 q4 tied ends", "gemma3 q4 tied ends"])
def test_what_is_read_of_rounded_ends_is_what_the_file_says(name, tmp_path):
    report = export(ARCHITECTURES[name](), tmp_path / "out", "gguf")
    assert report.reading.passed


def test_llama_cpp_reads_biases(tmp_path):
    """The export passes, says who reads the biases, and llama.cpp computes with them."""
    jobs, models = [], [make() for make in BIASED.values()]
    ids = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(2))
    for index, model in enumerate(models):
        report = export(model, tmp_path / str(index), "gguf")
        assert report.reading is None
        assert "not read back: transformers leaves out the biases of a llama GGUF; llama.cpp reads them" in report.notes
        jobs.append({"file": str(report.folder / f"{index}.gguf"), "prompts": [ids[0].tolist()], "new_tokens": 1})
    for model, (found,) in zip(models, llama_cpp(jobs), strict=True):
        expected = expected_outputs(model, {"input_ids": ids})
        difference = float((torch.tensor(found["logits"]) - expected[0, -1]).abs().max())
        assert difference <= 1e-5 * float(expected.abs().max())


def test_compressed_tensors_keep_a_head_of_their_own(tmp_path):
    report = export(quantized(own_head(), "rtn", Q8), tmp_path / "out")
    assert report.reading.passed
    assert json.loads((report.folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_all_chat_templates_are_written(tmp_path):
    """llama.cpp finds them by name; which one it takes by itself is in the notes."""
    tokenizer = actkit.load_tokenizer("swiglu")
    tokenizer.chat_template = {"default": "{{ 'plain' }}", "tool-use": "{{ 'tools' }}"}
    report = export(actkit.load("swiglu"), tmp_path / "out", "gguf", tokenizer=tokenizer, proof=False)
    assert any("chat templates: default, tool_use; llama.cpp takes 'default'" in note for note in report.notes)
    fields = gguf.GGUFReader(report.folder / "out.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "{{ 'plain' }}"
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ 'tools' }}"
    assert fields["tokenizer.chat_templates"].contents() == ["tool_use"]
    job = {"file": str(report.folder / "out.gguf"), "prompts": [[1, 2]], "new_tokens": 1}
    ((found,),) = llama_cpp([job])
    assert found["templates"] == {"": "{{ 'plain' }}", "tool_use": "{{ 'tools' }}"}
    tokenizer.chat_template = {"tool-use": "{{ 'tools' }}"}
    model = actkit.load("swiglu")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    report = export(model, tmp_path / "none", "gguf", tokenizer=tokenizer, proof=False)
    assert any("chat templates: tool_use; llama.cpp takes none" in note for note in report.notes)
    assert f"stops at token 7 too; the file names {tokenizer.eos_token_id} only" in " ".join(report.notes)


def test_llama_cpp_reads_the_files(files):
    jobs = [
        {"file": str(file), "prompts": [batch["input_ids"][0].tolist()], "new_tokens": 1}
        for _, file, batch, _ in files.values()
    ]
    for (name, (*_, expected)), (found,) in zip(files.items(), llama_cpp(jobs), strict=True):
        difference = float((torch.tensor(found["logits"]) - expected[0, -1]).abs().max())
        close = 1e-4 if " " not in name else 2e-2  # quantized: llama.cpp rounds activations to 8 bits
        close = max(close, GELU) if "gemma3" in name else close
        assert difference <= close * float(expected.abs().max()), name


@pytest.mark.parametrize(
    ("bits", "size", "symmetric", "kind"),
    [
        (8, 32, True, "Q8_0"),
        (6, 64, False, "Q8_0"),
        (4, 32, True, "Q4_0"),
        (3, -1, True, "Q4_0"),
        (4, 64, False, "Q4_1"),
    ],
)
def test_the_package_unpacks_the_blocks(bits, size, symmetric, kind):
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(bits)) * 0.1
    stored = IntegerWeight.quantize(weight, IntegerGrid(bits, size, "input", symmetric))
    order = torch.tensor([3, 1, 2, 0, 5, 4])
    found, error = blocks(stored, order)
    values = gguf.quants.dequantize(found.data, gguf.GGMLQuantizationType[kind])
    assert found.kind == kind and error < 2**-11
    half = stored.scale.half().float()
    offset = 2 ** (bits - 1) if stored.zero is None else None
    exact = stored.grid.dequantize(codes(stored), half, stored.zero)[order]
    if kind == "Q4_1":  # the minimum is a float16 of its own
        assert np.allclose(values, exact.numpy(), atol=2**-11 * 15 * float(half.max()))
    else:
        assert offset is None or np.array_equal(values, exact.numpy())
        assert np.allclose(values, exact.numpy(), atol=1e-7)


def codes(weight: IntegerWeight) -> Tensor:
    return weight.integers()


def test_what_has_no_block_is_dense_and_said(tmp_path):
    model = quantized(ARCHITECTURES["qwen2"](), "rtn", {"bits": 4, "group_size": 16, "symmetric": True})
    report = export(model, tmp_path / "dense", "gguf", proof=False)
    assert not report.quantized
    why = "F32: groups of 16 inputs are no multiple of GGUF's blocks of 32"
    assert report.dense["model.layers.0.mlp.up_proj"] == why
    assert "no tokenizer is written (the model has none beside it)" in report.notes[0]
    assert "14 layers (model" in _text(report.table())


@pytest.mark.parametrize("factor", [1e-6, 1e8])
def test_scales_outside_of_float16_stay_dense(tmp_path, factor):
    plain = ARCHITECTURES["qwen2"]()
    with torch.no_grad():
        plain.model.layers[0].mlp.up_proj.weight[3] *= factor
    report = export(quantized(plain, "rtn", Q8), tmp_path / "wide", "gguf", proof=False)
    assert "outside of float16's range" in report.dense["model.layers.0.mlp.up_proj"]
    assert "model.layers.0.mlp.gate_proj" in report.quantized


def _text(table: Any) -> str:
    from rich.console import Console

    console = Console(width=400, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def narrowed() -> Any:
    model = random_model(LlamaConfig, LlamaForCausalLM)
    mlp = model.model.layers[1].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = torch.nn.Parameter(linear.weight[:90].detach())
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :90].detach())
    mlp.gate_proj = torch.nn.Linear(64, 90, bias=False)
    return model


def one_bias() -> Any:
    model = quantized(random_model(LlamaConfig, LlamaForCausalLM), "rtn", Q8)
    model.model.layers[0].self_attn.o_proj.bias = torch.nn.Parameter(torch.ones(64))
    return model


REFUSED = {
    "gpt2": (lambda: tiny_model("gpt2"), "knows the language models of llama, mistral, qwen2, qwen3, gemma3_text"),
    "windows": (
        lambda: gemma3(layer_types=["sliding_attention", "full_attention"] * 3),
        r"layer_types: the model has \['sliding_attention', 'full_attention', .* llama.cpp's gemma3 computes with",
    ),
    "scale": (lambda: gemma3(query_pre_attn_scalar=64), "query_pre_attn_scalar: the model has 64, .* with 256"),
    "capped": (lambda: gemma3(final_logit_softcapping=30.0), "final_logit_softcapping: the model has 30.0"),
    "other gelu": (lambda: gemma3(hidden_activation="gelu"), "hidden_activation: the model has 'gelu'"),
    "biases of gemma3": (
        lambda: gemma3(attention_bias=True),
        "attention_bias: the model has biases in its attention, and llama.cpp's gemma3 has none",
    ),
    "relu": (
        lambda: random_model(LlamaConfig, LlamaForCausalLM, hidden_act="relu"),
        "hidden_act: the model has 'relu'",
    ),
    "biases": (
        lambda: random_model(Qwen3Config, Qwen3ForCausalLM, head_dim=128, attention_bias=True),
        "attention_bias: the model has biases in its attention, and llama.cpp's qwen3 has none",
    ),
    "narrowed": (narrowed, r"gate_proj.weight: it is \(90, 64\) in this model and \(96, 64\) in the plain Llama"),
    "a bias more": (one_bias, r"o_proj.bias: it is \(64,\) in this model and not there in the plain Llama"),
    "rope": (
        lambda: random_model(
            LlamaConfig,
            LlamaForCausalLM,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        ),
        "rope_type: the model has 'linear'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(name, tmp_path):
    make, words = REFUSED[name]
    with pytest.raises(ExportError, match=words):
        export(make(), tmp_path / "out", "gguf", proof=False)
    assert not (tmp_path / "out").exists()


# -- llama.cpp, in the environment of the benchmarks -------------------------------------------------------------------


def llama_cpp(jobs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What llama.cpp reads and writes, per file and prompt. Skips the test where it is not there."""
    if not BENCH.exists():
        pytest.skip("llama-cpp-python: there is no .venv-bench; make .venv-bench/.installed builds it")
    probe = subprocess.run([str(BENCH), "-c", "import llama_cpp"], capture_output=True)
    if probe.returncode:
        pytest.skip("llama-cpp-python is not in .venv-bench")
    job = Path(jobs[0]["file"]).with_suffix(".json")
    job.write_text(json.dumps(jobs))
    done = subprocess.run([str(BENCH), str(READER), str(job)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def greedy(model: Any, ids: list[int]) -> tuple[list[int], Tensor]:
    """The likeliest next tokens, one at a time, and the logits after the prompt."""
    written: list[int] = []
    first = torch.empty(0)
    with torch.no_grad():
        for step in range(NEW):
            logits = model(torch.tensor([ids + written])).logits[0, -1]
            first = logits if step == 0 else first
            written.append(int(logits.argmax()))
    return written, first


def test_llama_cpp_writes_the_same_text(tmp_path):
    """Dense float32: equal. Quantized: equal, unless the two likeliest tokens are closer than twice the difference
    that llama.cpp's own rounding of activations makes."""
    tokenizer = actkit.load_tokenizer("swiglu")
    models = {
        "dense": actkit.load("swiglu", dtype="float32"),
        "q8": quantized(actkit.load("swiglu", dtype="float32"), "rtn", Q8),
        "q4": quantized(actkit.load("swiglu", dtype="float32"), "rtn", Q4),
    }
    jobs = []
    for name, model in models.items():
        folder = export(model, tmp_path / name, "gguf", tokenizer=tokenizer, proof=False).folder
        jobs.append({"file": str(folder / f"{name}.gguf"), "prompts": PROMPTS, "new_tokens": NEW})
    equal = 0
    for (name, model), found in zip(models.items(), llama_cpp(jobs), strict=True):
        for prompt, theirs in zip(PROMPTS, found, strict=True):
            ids = tokenizer(prompt)["input_ids"]
            assert theirs["ids"] == ids
            written, logits = greedy(model, ids)
            difference = float((torch.tensor(theirs["logits"]) - logits).abs().max())
            assert difference <= (1e-4 if name == "dense" else 0.01 * float(logits.abs().max()))
            if theirs["written"] == written:
                assert theirs["text"] == tokenizer.decode(written, skip_special_tokens=True)
                equal += 1
            else:
                step = next(i for i in range(NEW) if theirs["written"][i] != written[i])
                assert name != "dense" and theirs["gaps"][step] < 2 * difference
    assert equal >= len(models) * len(PROMPTS) - 2
