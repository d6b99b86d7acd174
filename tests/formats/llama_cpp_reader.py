"""Run by the bench environment's Python: what llama.cpp reads and writes. JOB.json in, JSON on the last line out.

JOB: [{"file", "prompts", "new_tokens"}]; a prompt is a text, or ids. Per file and prompt: the prompt's ids, the greedy
ids and text, the logits after the prompt, for each step the gap between the two largest logits, and the file's chat
templates by name ('' is the default one). With "texts" instead of prompts: the ids of each text.
"""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama, llama_model_chat_template

F32 = 0  # of the key-value cache, so that only the products differ


def templates(model: Llama) -> dict[str, str]:
    """What llama.cpp itself finds, under the names that the file has."""
    start = "tokenizer.chat_template."
    names = {"": None} | {key.removeprefix(start): key for key in model.metadata if key.startswith(start)}
    found = {}
    for name in names:
        text = llama_model_chat_template(model._model.model, name.encode() if name else None)
        if text:
            found[name] = text.decode()
    return found


def tokenize(file: str, texts: list[str]) -> list[list[int]]:
    model = Llama(file, vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


def read(file: str, prompts: list[str | list[int]], new_tokens: int) -> list[dict[str, object]]:
    model = Llama(
        file, n_ctx=256, n_threads=1, n_threads_batch=1, type_k=F32, type_v=F32, verbose=False, logits_all=True
    )
    found = []
    for prompt in prompts:
        text = isinstance(prompt, str)
        ids = model.tokenize(prompt.encode(), add_bos=False, special=True) if text else prompt
        model.reset()
        model.eval(ids)
        first = np.array(model.scores[model.n_tokens - 1])
        written, gaps = [], []
        logits = first
        for _ in range(new_tokens):
            order = np.sort(logits)
            gaps.append(float(order[-1] - order[-2]))
            written.append(int(logits.argmax()))
            model.eval(written[-1:])
            logits = np.array(model.scores[model.n_tokens - 1])
        words = model.detokenize(written).decode(errors="replace") if text else ""
        found.append(
            {
                "ids": ids,
                "written": written,
                "text": words,
                "logits": first.tolist(),
                "gaps": gaps,
                "templates": templates(model),
            }
        )
    return found


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    sys.stdout.write(
        "\n" + json.dumps([tokenize(**entry) if "texts" in entry else read(**entry) for entry in job]) + "\n"
    )
