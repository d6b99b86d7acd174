"""llama.cpp through llama-cpp-python: Q4_0, Q8_0 and bf16, every matrix in that format, the output layer too.

A real model is a GGUF file that the parent names. For random weights one is written with the package `gguf` and kept in
the folder that the parent gives; quantized blocks are pieces of one block of random numbers, quantized once: their
values do not matter to the speed, their place does. The parent runs every variant with memory-mapping on and off, and
of random weights with one thread and two, and keeps the best.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from likelihood import loss
from protocol import SHAPES, prompt_ids, serve

ENVIRONMENT: dict[str, str] = {}  # it has threads of its own
FORMATS = {"q4_0": "Q4_0", "q8_0": "Q8_0", "bf16": "BF16"}
CONTEXT = 512


class LlamaCpp:
    """Variants: q4_0, q8_0, bf16, or file for a real model; with '-mapped' behind for a memory-mapped file."""

    def load(
        self,
        *,
        variant: str,
        threads: int,
        folder: str,
        shape: str = "",
        source: str = "",
        text: Sequence[int] = (),
        capacity: int = CONTEXT,
    ) -> dict[str, Any]:
        import llama_cpp

        name, _, mapped = variant.partition("-")
        if name not in (("file",) if source else FORMATS) or mapped not in ("", "mapped"):
            raise ValueError(
                f"variant: {variant!r} was given; give {', '.join(FORMATS)} (file for a source), also with -mapped."
            )
        path = Path(source or Path(folder) / f"{shape}-{name}.gguf")
        if not source and not path.exists():
            write(path, SHAPES[shape], FORMATS[name])
        self.library, self.text = llama_cpp, text
        self.threads = threads
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap, settings.n_gpu_layers = mapped == "mapped", 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise RuntimeError(f"{path}: llama.cpp could not load it.")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = capacity, capacity, min(capacity, CONTEXT)
        context.n_threads = context.n_threads_batch = threads
        context.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        flags = llama_cpp.llama_print_system_info().decode()
        found = {
            "about": f"{path.name if source else f'all matrices {FORMATS[name]}'}, "
            f"{'memory-mapped' if mapped else 'read into memory'}",
            "system": flags,
            "versions": {"llama-cpp-python": version("llama-cpp-python")},
        }
        return found if source else {**found, "bytes_per_token": matrix_bytes(SHAPES[shape], FORMATS[name])}

    def round(
        self, *, prompt: int, tokens: int, threads: int | None = None, processor_time: bool = False
    ) -> dict[str, Any]:
        used = self.threads if threads is None else threads
        self.library.llama_set_n_threads(self.context, used, used)
        clock = time.process_time if processor_time else time.perf_counter
        self._forget()
        start = clock()
        token = self._decode(prompt_ids(prompt, self.vocabulary, self.text))
        first, seconds = clock() - start, []
        for _ in range(tokens):
            start = clock()
            token = self._decode([token])
            seconds.append(clock() - start)
        return {"first_token_seconds": first, "token_seconds": seconds}

    def losses(self, *, rows: Sequence[Sequence[int]], scored: Sequence[Sequence[int]]) -> dict[str, Any]:
        self.library.llama_set_n_threads(self.context, self.threads, self.threads)
        return {"losses": [loss(self._logits(ids), ids, places) for ids, places in zip(rows, scored, strict=True)]}

    def _logits(self, ids: Sequence[int]) -> np.ndarray:
        """Of every token, from an empty cache: float32 [length, vocabulary]."""
        self._forget()
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        failed = self.library.llama_decode(self.context, batch)
        self.library.llama_batch_free(batch)
        if failed:
            raise RuntimeError("llama_decode failed.")
        found = self.library.llama_get_logits(self.context)
        address = ctypes.cast(found, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, (len(ids), self.vocabulary))

    def _forget(self) -> None:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def _decode(self, tokens: list[int]) -> int:
        """The likeliest token after some more."""
        array = (self.library.llama_token * len(tokens))(*tokens)
        if self.library.llama_decode(self.context, self.library.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed.")
        found = self.library.llama_get_logits_ith(self.context, -1)
        address = ctypes.cast(found, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, (self.vocabulary,)).argmax())


# -- the file ----------------------------------------------------------------------------------------------------------


def tensors(shape: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes [out, in] of a Llama's tensors, as GGUF calls them."""
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    yield "token_embd.weight", (shape["vocab_size"], hidden)
    for layer in range(layers):
        for name, rows, columns in (
            ("attn_q", hidden, hidden),
            ("attn_k", keys, hidden),
            ("attn_v", keys, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            yield f"blk.{layer}.{name}.weight", (rows, columns)
        yield f"blk.{layer}.attn_norm.weight", (hidden,)
        yield f"blk.{layer}.ffn_norm.weight", (hidden,)
    yield "output_norm.weight", (hidden,)
    if not shape["tie_word_embeddings"]:
        yield "output.weight", (shape["vocab_size"], hidden)


def matrix_bytes(shape: dict[str, Any], kind: str) -> int:
    """Bytes of the matrices that a token reads: all, but of the embedding only where it is the output layer too."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    embedding = 0 if shape["tie_word_embeddings"] else shape["vocab_size"] * shape["hidden_size"]
    weights = sum(dims[0] * dims[1] for _, dims in tensors(shape) if len(dims) == 2) - embedding
    return weights * size // block


def write(path: Path, shape: dict[str, Any], kind: str) -> None:
    """Write the model; renamed at the end, so that a killed run leaves no half of it."""
    import gguf

    quantization = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    source = (np.random.default_rng(0).standard_normal(1 << 21) * 0.02).astype(np.float32)
    stored = gguf.quants.quantize(source, quantization).view(np.uint8).reshape(-1, size)  # [blocks, bytes of a block]
    temporary = path.with_suffix(".part")
    writer = gguf.GGUFWriter(temporary, "llama")
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_rope_dimension_count(shape["hidden_size"] // shape["num_attention_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for number, (name, dims) in enumerate(tensors(shape)):
        if len(dims) == 1:
            writer.add_tensor(name, np.ones(dims, np.float32))
            continue
        blocks = dims[0] * dims[1] // block
        pieces = np.take(stored, np.arange(7919 * number, 7919 * number + blocks), axis=0, mode="wrap")
        writer.add_tensor(name, pieces.reshape(dims[0], -1), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.rename(path)


if __name__ == "__main__":
    serve(LlamaCpp())
