"""How a user meets the errors of `gguf`: one function per way, which raises it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf_files import small_tensors, write_gguf

from actkit.gguf.cached import cached
from actkit.zoo.loading import locate
from error_proofs import Place, missing, proof


def a_gguf(p: Place, name: str = "a.gguf", **options: Any) -> Path:
    p.patch.setenv("ACTKIT_CACHE", str(p.path / "cache"))
    return write_gguf(p.path / name, **options)


def a_file_of_gguf(p: Place) -> Path:
    """A file of the format, written without the package."""
    table = b"\x01" + bytes(7) + b"x" + struct.pack("<IQIQ", 1, 1, 0, 0)
    return p.file(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + table + bytes(64), "b.gguf")


def without(name: str) -> dict[str, np.ndarray]:
    return {key: values for key, values in small_tensors().items() if key != name}


def flipped(path: Path, at: int, value: int) -> Path:
    content = bytearray(path.read_bytes())
    content[at] = value
    path.write_bytes(content)
    return path


TOKENS = {
    ".tokenizer.ggml.model": "gpt2",
    ".tokenizer.ggml.tokens": list("abcdefghijklmnop"),
    ".tokenizer.ggml.merges": ["a b"],
}


proof(lambda p: locate(a_gguf(p, "a-00002-of-00003.gguf")))


proof(lambda p: locate(a_gguf(p, settings={".split.count": 3, ".split.no": 0})))


proof(lambda p: locate(p.file(b"", "a.gguf")))


proof(lambda p: locate(p.file(b"no GGUF", "a.gguf")))


proof(lambda p: locate(p.file(b"GGUF", "a.gguf")))


proof(lambda p: locate(flipped(a_gguf(p), 4, 9)))


proof(lambda p: locate(p.file(a_gguf(p).read_bytes()[:-400], "a.gguf")))


proof(lambda p: locate(a_gguf(p, settings={"block_count": None})))


proof(lambda p: locate(a_gguf(p, settings={"expert_count": 8})))


proof(lambda p: locate(a_gguf(p, settings={"logit_scale": 2.0})))


proof(lambda p: locate(a_gguf(p, architecture="clip")))


proof(lambda p: locate(a_gguf(p, settings={".general.type": "adapter"})))


proof(lambda p: locate(a_gguf(p, tensors=without("token_embd.weight"))))


proof(lambda p: locate(a_gguf(p, tensors=without("blk.0.ffn_up.weight"))))


proof(lambda p: locate(a_gguf(p, tensors=small_tensors() | {"rope_freqs.weight": np.ones(4, np.float32)})))


proof(lambda p: locate(a_gguf(p, settings={".tokenizer.ggml.model": "bert"})))


proof(lambda p: locate(a_gguf(p, settings=TOKENS | {".tokenizer.ggml.pre": "poro-chat"})))


proof(lambda p: locate(a_gguf(p, settings=TOKENS | {".tokenizer.ggml.tokens": None})))


proof(lambda p: (a_gguf(p), a_gguf(p, "b.gguf"), locate(p.path)))


proof(lambda p: cached([a_gguf(p)], digest="0" * 64))


@proof
def strange_blocks(p: Place) -> None:
    file = a_gguf(p, quantize=lambda name: "Q8_0" if "ffn_up" in name else None)
    p.patch.setattr("gguf.quants._type_traits", {})
    locate(file)


@proof
def no_place_for_caches(p: Place) -> None:
    file = a_gguf(p)
    p.patch.setenv("ACTKIT_CACHE", str(p.file("x", "file") / "cache"))
    locate(file)


proof(lambda p: (missing("gguf", p), locate(a_file_of_gguf(p))))
