"""A tokenizer straight from its tokenizer.json: what generation asks of one, without transformers.

transformers' own tokenizers are wrappers of this. Importing them takes seconds and 130 MB. Whether both give the same
tokens is tried when a folder is written (`describes`), and only then is it read so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actkit.core.ground.errors import CheckpointError

FILE = "tokenizer.json"
PROBES = (
    "",
    "The capital of France is",
    " leading and  double spaces ",
    "Tabs\tand\nlines\n\n",
    "0123456789 3.14 1,000",
    "caf\u00e9 na\u00efve \u4f60\u597d \U0001f600 e\u0301",
    "def f(x):\n    return x ** 2  # code",
    "<s></s><|im_start|>user<|im_end|>",
)


class PlainTokenizer:
    """Encodes and decodes as the tokenizer did that `describes` was given.

    Args:
        folder: that holds its file.
        facts: what `describes` returned.

    Raises:
        CheckpointError: the file is not readable.
    """

    chat_template = None  # of transformers' alone

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer

        try:
            self._inner = Tokenizer.from_file(str(folder / FILE))
        except Exception as error:  # the library raises nothing more special
            raise CheckpointError(f"{folder / FILE}: not readable ({error}); copy the folder again.") from error
        self._inner.no_truncation()
        self._inner.no_padding()
        self.bos_token_id, self.eos_token_id = facts["bos_token_id"], facts["eos_token_id"]

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        """Encode a text: {"input_ids": token ids}."""
        return {"input_ids": self._inner.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Return the text of token ids; what some tokenizers clean up is left as it is."""
        return self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)


def describes(tokenizer: Any, folder: Path) -> dict[str, Any] | None:
    """Say what `PlainTokenizer` needs besides the file; None if it would give other tokens.

    Args:
        tokenizer: of transformers.
        folder: that it was saved to.
    """
    if not (folder / FILE).is_file():
        return None
    facts = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")}
    plain = PlainTokenizer(folder, facts)
    for text in PROBES:
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        if plain(text)["input_ids"] != ids or plain.decode(ids, **options) != tokenizer.decode(ids, **options):
            return None
    return facts
