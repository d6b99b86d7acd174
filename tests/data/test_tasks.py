"""The task `documentation`: what it asks, and that nothing in it was seen in training or calibration."""

import json
import re
import sys
from collections import Counter

import pytest
import yaml

from actkit.data.tasks import FOLDER, TASKS, documentation
from actkit.data.text import SPLITS, documents, split_of


@pytest.fixture(scope="module")
def items():
    return [json.loads(line) for line in (FOLDER / "documentation.jsonl").read_text(encoding="utf-8").splitlines()]


def test_there_are_500_questions_of_four_choices(items):
    assert len(items) == 500
    assert all(len(set(item["choices"])) == 4 and item["choices"][item["answer"]] for item in items)
    assert len({item["question"] for item in items}) == 500
    right = Counter(item["answer"] for item in items)
    assert set(right) == {0, 1, 2, 3} and min(right.values()) > 90  # 125 each on average, 5 % of them below 106
    used = Counter(choice for item in items for choice in item["choices"])
    assert len(used) == 500 and set(used.values()) == {4}  # once right and three times wrong: how often tells nothing


def test_every_name_is_of_the_test_split(items):
    for item in items:
        name = re.fullmatch(r"What does Python's (?:function|class|module) (\S+) do\?", item["question"])[1]
        assert split_of(name) == "test", name


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="made of Python 3.11's sources; others have other texts")
def test_no_choice_is_in_another_split(items):
    seen = "\n".join(" ".join(d.text.split()) for split in SPLITS if split != "test" for d in documents(split)).lower()
    texts = {document.name: " ".join(document.text.split()) for document in documents("test")}
    right = {item["question"].split()[4]: item["choices"][item["answer"]] for item in items}
    assert not [said for said in right.values() if said.lower() in seen]
    found = [said in texts[name] for name, said in right.items() if name in texts]
    assert sum(found) >= 0.98 * len(right)  # a later 3.11 may have reworded a few


def test_the_questions_are_what_the_task_file_renders(items):
    jinja2 = pytest.importorskip("jinja2")
    config = yaml.safe_load(TASKS["documentation"].read_text(encoding="utf-8"))
    assert config["dataset_kwargs"]["data_files"]["test"] == "documentation.jsonl"
    template = jinja2.Template(config["doc_to_text"])
    for question, item in zip(documentation(), items, strict=True):
        assert question.text == template.render(**item)
        assert (list(question.choices), question.answer) == (item["choices"], item["answer"])
    assert documentation(3) == documentation()[:3]
