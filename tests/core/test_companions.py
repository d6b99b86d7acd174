"""What stands beside a model goes along: the tokenizer as transformers reads it, all chat templates, the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import batches, build
from transformers import AutoTokenizer, BertTokenizer

import actkit
from actkit.core.recipe.runner import apply
from actkit.core.store.checkpoint import load, save

RTN = {"actkit": 1, "transforms": [{"rtn": {"bits": 4, "group_size": 8}}]}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three")


def with_tokenizer(folder: Path, **settings: Any) -> Path:
    save(build("bert"), folder)
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    known = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in known.items() if value is not None}))
    (folder / "actkit.sha256").unlink()
    return folder


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("named", ["BertTokenizer", None])
def test_the_tokenizer_of_a_changed_folder_is_the_originals(side, named, tmp_path):
    """named: the class in tokenizer_config.json; without it transformers goes by the model."""
    folder = with_tokenizer(tmp_path / "plain", padding_side=side, tokenizer_class=named)
    model = apply(load(folder), RTN, batches("bert"), min_coverage=0.0, progress=False).model
    found = actkit.load_tokenizer(save(model, tmp_path / "changed"))
    original = AutoTokenizer.from_pretrained(folder)
    assert type(found) is type(original) is BertTokenizer
    texts = ["one two three", "one"]
    expected = original(texts, padding=True, return_tensors="pt")
    given = found(texts, padding=True, return_tensors="pt")
    assert list(given) == list(expected) == ["input_ids", "token_type_ids", "attention_mask"]
    assert all(torch.equal(given[key], expected[key]) for key in expected)
    assert given["attention_mask"][1, 0] == (side == "right")


def test_all_chat_templates_go_along(tmp_path):
    folder = with_tokenizer(tmp_path / "plain")
    (folder / "chat_template.jinja").write_text("main")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    model = apply(load(folder), RTN, batches("bert"), min_coverage=0.0, progress=False).model
    changed = save(model, tmp_path / "changed")
    assert actkit.load_tokenizer(changed).chat_template == {"default": "main", "tools": "tools"}
    assert "additional_chat_templates/tools.jinja" in (changed / "actkit.sha256").read_text()
    again = save(load(changed), tmp_path / "again")
    assert (again / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
