"""Several prompts at a time: the texts are those of each alone."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import build

from actkit.core.ground.errors import DataError, UnsupportedModelError
from actkit.core.measure import texts
from actkit.core.measure.decoding import Engine
from actkit.core.measure.generation import generate
from actkit.core.measure.sampling import Sampling

PROMPTS = ["a b c", "d", "e f"]


class Words:
    """A tokenizer of single letters and spaces."""

    eos_token_id = 3

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [4 + ord(letter) % 40 for letter in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(97 + token % 26) for token in ids)


class Batch:
    """A batch of a decoder that only counts how often it was asked."""

    def __init__(self, sequences: int) -> None:
        self.sequences, self.together = sequences, 0

    def rates(self) -> dict[int, float]:
        return {1: 10.0, 2: 9.0, 3: 12.0}

    def generate(self, prompts: list[list[int]], *, max_new_tokens: int, together: int, stopped: Any, **_: Any) -> Any:
        self.together = together
        for step in range(max_new_tokens):
            for number, prompt in enumerate(prompts):
                yield number, 5 + (prompt[0] + step) % 20


class Decoder:
    threads = 2

    def __init__(self) -> None:
        self.made: list[Batch] = []

    def batch(self, sequences: int) -> Batch:
        self.made.append(Batch(sequences))
        return self.made[-1]


def test_texts_are_those_of_each_alone() -> None:
    model, said = build("llama"), list[str]()
    settings: Any = {"max_new_tokens": 6, "sampling": Sampling(temperature=1.0, seed=2)}
    for stop in ((), ("c", "q")):
        expected = ["".join(generate(model, Words(), prompt, stop=stop, **settings)) for prompt in PROMPTS]
        found = dict(texts.generate_all(model, Words(), PROMPTS, stop=stop, announce=said.append, **settings))
        assert [found[number] for number in range(3)] == expected
    assert "at a time" in said[0]


def test_the_fastest_number_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    said, decoder = list[str](), Decoder()
    monkeypatch.setattr(texts, "choose_engine", lambda *_, **__: Engine(decoder))  # type: ignore[arg-type]
    found = dict(texts.generate_all(build("llama"), Words(), PROMPTS, max_new_tokens=4, announce=said.append))
    assert sorted(found) == [0, 1, 2] and all(len(text) == 4 for text in found.values())
    assert said == ["decoder, 2 threads; 3 texts at a time (tokens/s of 1: 10, 2: 9, 3: 12; several pay from 3 on)"]
    assert (decoder.made[0].sequences, decoder.made[0].together) == (3, 3)
    dict(texts.generate_all(build("llama"), Words(), PROMPTS, max_new_tokens=4, batch=2))
    assert (decoder.made[1].sequences, decoder.made[1].together) == (2, 2)


def test_from_how_many_texts_on_several_pay() -> None:
    assert texts.pays_from({1: 5.0, 2: 4.0, 4: 6.0, 8: 7.0}) == 4
    assert texts.pays_from({1: 5.0, 2: 6.0, 4: 4.0}) is None
    assert texts.pays_from({1: 5.0}) is None
    assert texts.describe({1: 5.0, 2: 4.0}) == "one text at a time (tokens/s of 1: 5, 2: 4; several never pay)"


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    for prompts in ([], "one"):
        with pytest.raises(DataError, match="give a list"):
            texts.generate_all(model, Words(), prompts)
    with pytest.raises(ValueError, match="batch: 0 was given"):
        texts.generate_all(model, Words(), PROMPTS, batch=0)
    monkeypatch.setattr(texts, "choose_engine", lambda *_, **__: Engine(None, "no decoder"))
    with pytest.raises(UnsupportedModelError, match="batch: 2 was given, but no decoder writes several"):
        texts.generate_all(model, Words(), PROMPTS, max_new_tokens=4, batch=2)
