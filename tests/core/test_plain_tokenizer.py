"""A tokenizer without transformers against transformers' own."""

from types import SimpleNamespace

import pytest

from actkit.core.ground.errors import CheckpointError
from actkit.core.store.plain_tokenizer import FILE, PlainTokenizer, describes
from actkit.zoo.loading import load_tokenizer

TEXTS = ("def f(x):\n\treturn x", "  spaces  and été, 中文 and 🙂", "", "<s>[INST] </s> 1,234.5")


def test_it_encodes_and_decodes_as_transformers_does(tmp_path):
    theirs = load_tokenizer("swiglu")
    theirs.save_pretrained(tmp_path)
    facts = describes(theirs, tmp_path)
    assert facts is not None and facts["eos_token_id"] == theirs.eos_token_id
    plain = PlainTokenizer(tmp_path, facts)
    for text in TEXTS:
        ids = theirs(text, verbose=False)["input_ids"]
        assert plain(text, verbose=False)["input_ids"] == ids
        for skip in (False, True):
            options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
            assert plain.decode(ids, **options) == theirs.decode(ids, **options)


def test_a_tokenizer_that_does_more_is_left_to_transformers(tmp_path):
    theirs = load_tokenizer("swiglu")
    theirs.save_pretrained(tmp_path)

    class Shifted(SimpleNamespace):
        def __call__(self, text, **_):
            return {"input_ids": [1, *theirs(text)["input_ids"]]}

    assert describes(Shifted(decode=theirs.decode), tmp_path) is None
    (tmp_path / FILE).unlink()
    assert describes(theirs, tmp_path) is None


def test_a_damaged_file(tmp_path):
    (tmp_path / FILE).write_text("{")
    with pytest.raises(CheckpointError, match="not readable"):
        PlainTokenizer(tmp_path, {"bos_token_id": None, "eos_token_id": None})
