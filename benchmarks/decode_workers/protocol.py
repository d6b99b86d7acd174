"""What a decode benchmark's worker and its parent say to each other: one JSON object per line, on stdin and stdout.

A worker is one process with one engine. It is started with the environment of its engine, loads one model (random
weights at one shape, or a real one from disk) and then runs a round whenever it is asked, so that the engines take
turns. Standard library only.

    {"do": "load", ...}     -> {"ok": {...}}        what was loaded, for the table
    {"do": "round", ...}    -> {"ok": {"first_token_seconds": ..., "token_seconds": [...]}}
    {"do": "memory"}        -> {"ok": {"resident_bytes": ...}}
    {"do": "losses", ...}   -> {"ok": {"losses": [...]}}       of a real model

An exception is answered by {"error": "..."}; the worker goes on.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

SHAPES: dict[str, dict[str, Any]] = {
    "1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    },
    "0.5B": {
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    "135M": {  # SmolLM2's
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 2048,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    },
}


class Worker(Protocol):
    def load(
        self,
        *,
        variant: str,
        threads: int,
        folder: str,
        shape: str = "",
        source: str = "",
        text: Sequence[int] = (),
        capacity: int = 0,
    ) -> dict[str, Any]:
        """Build the model. variant: what this worker offers; folder: for files, kept between runs.

        shape: of SHAPES, for random weights. Or source, for a real model: what is loaded, a folder or a file, with text
        (token ids that prompts are cut from) and capacity (tokens that prompt and answer have room for).

        Returns about (a line for the table: settings, flags), versions (name -> version) and, of random weights,
        bytes_per_token (of the weights that a token reads, as the engine stores them).
        """
        ...

    def round(self, *, prompt: int, tokens: int, **settings: Any) -> dict[str, Any]:
        """From an empty cache: the first tokens of the text (random ones, seed 0, for random weights), then so many
        greedy tokens, each timed."""
        ...

    def losses(self, *, rows: Sequence[Sequence[int]], scored: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Sums of the negative log-likelihoods, in nats, one per row of token ids; scored: places of the tokens that
        count. Called last, as it may take memory. Only for a real model."""
        ...


def prompt_ids(length: int, vocabulary: int, text: Sequence[int] = ()) -> list[int]:
    """The same prompt for every engine: the text's first tokens, or random ones without a text."""
    from random import Random

    if text:
        return list(text[:length])
    draw = Random(0).randrange
    return [draw(vocabulary) for _ in range(length)]


def serve(worker: Worker) -> None:
    """Answer requests until stdin closes. What libraries print goes to stderr."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in requests:
        request = json.loads(line)
        what = request.pop("do")
        try:
            found = {"resident_bytes": resident()} if what == "memory" else getattr(worker, what)(**request)
            reply = {"ok": found}
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def resident() -> int:
    """Bytes of this process that are in memory, those of mapped files included."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
