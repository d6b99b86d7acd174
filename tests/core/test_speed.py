"""Speeds: the arithmetic and the order of the rounds against scripted processes, and one real run of two folders."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from actkit.core.edit.edits import Replace, apply_edit, describe
from actkit.core.forward.example import Inputs
from actkit.core.ground.errors import DataError, MemoryLimitError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.measure import speed
from actkit.core.measure.speed import Speed, median, weight_file_bytes
from actkit.core.store.checkpoint import save
from actkit.core.store.pretrained import record

# As many rounds as are asked for; the tests of `precision` call the function itself.
measure_speed = partial(speed.measure_speed, precision=None)

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("speed")
    sparse = llama()
    edits = []
    for index in range(2):
        path = f"model.layers.{index}.mlp.down_proj"
        edit = Replace(path, ActLinear.of(sparse.get_submodule(path), select=Threshold(0.01)))
        apply_edit(sparse, edit)
        edits.append(describe(edit))
    record(sparse, edits, [], "test")
    return {"original": save(llama(), where / "original"), "sparse": save(sparse, where / "sparse")}


class Scripted:
    """Stands for FreshProcess: `rates` says what each round of a folder measures, `refused` why a decoder does not take
    it, and the first round of each folder in `cold` compiles."""

    takes: ClassVar[Inputs] = Inputs(50, 64, None, ("input_ids",), causal=True)
    rates: ClassVar[dict[str, list[float]]] = {}
    calls: ClassVar[list[tuple[str, tuple[int, ...], int]]] = []
    packs: ClassVar[list[tuple[str, int | None]]] = []
    refused: ClassVar[dict[str, str]] = {}
    cold: ClassVar[set[str]] = set()
    open: ClassVar[int] = 0

    def __init__(self, threads: int | None = None) -> None:
        self.threads, self.closed = threads or 7, False
        Scripted.open += 1

    def close(self) -> None:
        Scripted.open -= not self.closed
        self.closed = True

    def load(self, folder: Path, dtype: Any = None, **_: Any) -> dict[str, Any]:
        self.name, self.round = folder.name, 0
        return {"inputs": self.takes.to_dict(), "threads": self.threads, "dtype": dtype or "float32"}

    def pack(self, capacity: int | None = None) -> dict[str, Any]:
        self.packs.append((self.name, capacity))
        reason = "it was not asked for" if capacity is None else self.refused.get(self.name, "")
        if reason:
            return {"engine": "transformers", "reason": reason, "threads": self.threads, "packed": 3}
        return {"engine": "decoder", "reason": "", "threads": 2, "packed": 0}

    def _next(self, shape: tuple[int, ...], new_tokens: int) -> float:
        self.calls.append((self.name, shape, new_tokens))
        self.round += 1
        return self.rates[self.name][self.round - 1]

    def time_decode(self, input_ids: Tensor, new_tokens: int) -> dict[str, Any]:
        rate = self._next(tuple(input_ids.shape), new_tokens)
        compiled = self.name in self.cold
        self.cold.discard(self.name)
        return {"tokens_per_second": rate, "first_token_seconds": 10 / rate, "compiled": compiled}

    def time_forward(self, batch: Any, at_least: float) -> float:
        assert at_least == (speed.ROUND_SECONDS if self.round else 0)  # the first warms up
        values = batch if isinstance(batch, Tensor) else next(iter(batch.values()))
        return 1 / self._next(tuple(values.shape), 0)

    def memory(self) -> dict[str, int]:
        return {"peak_bytes": 1000 + self.round}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Path]:
    monkeypatch.setattr(speed, "FreshProcess", Scripted)
    for name, empty in (("calls", []), ("packs", []), ("refused", {}), ("cold", set())):
        monkeypatch.setattr(Scripted, name, empty)
    rates = {"a": [1e9, 10.0, 20.0, 40.0], "b": [1e-9, 11.0, 24.0, 44.0], "c": [5.0, 5.0, 5.0, 5.0]}
    monkeypatch.setattr(Scripted, "rates", rates)
    for name in rates:
        (tmp_path / name).mkdir()
    return {name: tmp_path / name for name in rates}


def test_rounds_rotate_and_ratios_are_paired(scripted: dict[str, Path]) -> None:
    found = measure_speed(scripted, batch=2, prompt=9, max_new_tokens=4, rounds=3, dtype="bfloat16", progress=False)
    order = [name for name, _, _ in Scripted.calls]
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == ["cab", "abc", "bca", "cab"]  # a warm-up, then each begins once
    assert {(shape, new) for _, shape, new in Scripted.calls} == {((2, 9), 4)}
    assert list(found) == ["a", "b", "c"] and Scripted.open == 0
    a, b, c = found.values()
    assert a.ratio is None and (a.rate.value, b.rate.value, c.rate.value) == (20, 24, 5)
    assert b.ratio is not None and c.ratio is not None
    assert b.ratio.value == pytest.approx(1.1)  # the median of 1.1, 1.2, 1.1, not 24 / 20
    assert c.ratio.value == 0.25 and (c.ratio.low, c.ratio.high) == (0.125, 0.5)
    assert (c.rate.low, c.rate.high) == (5, 5)
    assert a.first_token_seconds is not None and a.first_token_seconds.value == 0.5
    assert (a.kind, a.unit, a.rounds, a.threads, a.dtype, a.packed) == ("decode", "tokens/s", 3, 7, "bfloat16", 3)
    assert (a.batch, a.prompt, a.new_tokens, a.peak_bytes) == (2, 9, 4, 1004)
    assert Scripted.packs == [("a", None), ("b", None), ("c", None)]
    assert (a.engine, a.engine_reason) == ("transformers", "2 rows at a time, and a decoder takes one")
    content = b.to_dict()
    assert content["ratio"] == b.ratio.to_dict() and content["unit"] == "tokens/s" and len(content) == 15
    assert (content["engine"], content["engine_reason"]) == ("transformers", a.engine_reason)


def test_one_row_goes_through_the_decoder(scripted: dict[str, Path]) -> None:
    found = measure_speed(scripted, batch=1, prompt=9, max_new_tokens=4, rounds=3, progress=False)
    assert Scripted.packs == [("a", 13), ("b", 13), ("c", 13)] and Scripted.open == 0
    for each in found.values():
        assert (each.engine, each.engine_reason, each.through, each.threads) == ("decoder", "", "decoder", 2)
        assert each.packed == 0
    Scripted.packs.clear()
    many = measure_speed(scripted, batch=3, prompt=9, max_new_tokens=4, rounds=3, progress=False)["a"]
    assert Scripted.packs == [] and (many.packed, many.engine) == (0, "transformers")  # no kernel of ours either


def test_a_ratio_never_compares_engines(scripted: dict[str, Path]) -> None:
    Scripted.refused["b"] = "it has a low-rank correction"
    found = measure_speed(scripted, batch=1, prompt=9, max_new_tokens=4, rounds=3, progress=False)
    assert Scripted.packs == [("a", 13), ("b", 13), ("c", 13), ("a", None), ("b", None), ("c", None)]
    assert Scripted.open == 0 and {each.engine for each in found.values()} == {"transformers"}
    assert found["b"].engine_reason == "it has a low-rank correction"
    for name in "ac":
        assert found[name].engine_reason == "the decoder does not take 'b': it has a low-rank correction"
    assert found["a"].through == "transformers (the decoder does not take 'b': it has a low-rank correction)"
    Scripted.refused.update(a="no", c="no")
    Scripted.packs.clear()
    measure_speed(scripted, batch=1, prompt=9, max_new_tokens=4, rounds=3, progress=False)
    assert len(Scripted.packs) == 3  # all are alike, so nothing is started again


def test_a_process_that_compiled_is_not_measured(scripted: dict[str, Path]) -> None:
    Scripted.cold |= {"a", "c"}
    found = measure_speed(scripted, batch=1, prompt=9, max_new_tokens=4, rounds=3, progress=False)
    order = "".join(name for name, _, _ in Scripted.calls)
    assert order == "ccaab" + "abc" + "bca" + "cab" and Scripted.open == 0
    assert [name for name, _ in Scripted.packs] == ["a", "b", "c", "c", "a"]
    assert [each.rate.value for each in found.values()] == [20, 24, 5]
    assert {each.peak_bytes for each in found.values()} == {1004}  # of the process that was measured


def test_models_that_do_not_decode(scripted: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for takes, unit, prompt, shape in (
        (Inputs(50, 64, None, ("input_ids", "attention_mask"), causal=False), "sequences/s", 9, (4, 9)),
        (Inputs(None, None, (1, 8, 8), ("pixel_values",), causal=False), "examples/s", 0, (4, 1, 8, 8)),
    ):
        monkeypatch.setattr(Scripted, "takes", takes)
        Scripted.calls.clear()
        found = measure_speed({"a": scripted["a"]}, batch=4, prompt=9, rounds=3, threads=2, progress=False)["a"]
        assert (found.kind, found.unit, found.prompt, found.new_tokens) == ("forward", unit, prompt, 0)
        assert found.rate.value == pytest.approx(4 * 20) and found.first_token_seconds is None and found.packed == 0
        assert Scripted.calls == [("a", shape, 0)] * 4 and found.threads == 2
        assert (found.engine, found.engine_reason, Scripted.packs) == ("torch", "", [])


def test_the_interval_against_every_possible_resample() -> None:
    values = np.array([3.0, 1.0, 7.0, 4.0, 20.0])
    medians = np.sort([np.median(draw) for draw in itertools.product(values, repeat=len(values))])
    found = median(values)
    assert found.value == 4
    assert (found.low, found.high) == tuple(np.quantile(medians, [0.025, 0.975]))
    one = median(values[:1])
    assert (one.value, one.low, one.high) == (3, -np.inf, np.inf)


def test_rounds_go_on_until_the_ratio_is_known(scripted: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    steady = [10.0] * 30
    shaky = [10.0, 5.0, 20.0, 5.0, 20.0, *[10.0] * 25]  # after a few more rounds the median is sure
    coin = [10.0, *[5.0, 20.0] * 15]  # it never is
    two = {name: scripted[name] for name in "ab"}
    for rates, rounds, noisy in ((steady, 4, False), (shaky, 12, False), (coin, 16, True)):
        monkeypatch.setattr(Scripted, "rates", {"a": steady, "b": rates})
        found = speed.measure_speed(two, prompt=9, max_new_tokens=4, rounds=4, progress=False)
        a, b = found["a"], found["b"]
        assert b.ratio is not None and not a.noisy and b.noisy == noisy and a.rounds == b.rounds
        assert (b.rounds == rounds) if rates is not shaky else 4 < b.rounds <= rounds
        assert noisy or (b.ratio.low >= 0.9 * b.ratio.value and b.ratio.high <= 1.1 * b.ratio.value)
    monkeypatch.setattr(speed, "EXTRA_SECONDS", -1.0)  # no time is left for more
    found = speed.measure_speed(two, prompt=9, max_new_tokens=4, rounds=4, progress=False)
    assert found["b"].rounds == 4 and found["b"].noisy
    with pytest.raises(ValueError, match="precision: 0 was given"):
        speed.measure_speed(scripted, precision=0)


def test_a_round_of_a_small_model_repeats(scripted: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of 3 following tokens takes 13 / rate seconds here: 0.13 s, then 0.065 s; a round takes 0.2 s or more."""
    monkeypatch.setattr(Scripted, "rates", {"a": [1.0, 100.0, 200.0, 200.0, *[1.0] * 9]})
    found = measure_speed({"a": scripted["a"]}, prompt=9, max_new_tokens=4, rounds=2, progress=False)["a"]
    assert len(Scripted.calls) == 1 + 3 + 1  # the warm-up once; three texts; one that is long enough
    assert found.rate.value == pytest.approx((9 / (3 / 100 + 3 / 200 + 3 / 200) + 1) / 2)
    assert found.first_token_seconds is not None
    assert found.first_token_seconds.value == pytest.approx((0.2 / 3 + 10) / 2)
    assert isinstance(found, Speed) and found.rounds == 2


def test_settings_out_of_bounds(scripted: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for settings in ({"batch": 0}, {"prompt": 0}, {"max_new_tokens": 1}, {"rounds": 0}):
        name, value = next(iter(settings.items()))
        with pytest.raises(ValueError, match=f"{name}: {value} was given; give {2 if name == 'max_new_tokens' else 1}"):
            measure_speed(scripted, progress=False, **settings)
    with pytest.raises(ValueError, match="folders: none were given"):
        measure_speed({})
    with pytest.raises(DataError, match=r"'x' is .*, which is no folder"):
        measure_speed({"x": tmp_path / "none"})
    with pytest.raises(ValueError, match=r"60 \+ 32 tokens were asked for, the model's context is 64"):
        measure_speed(scripted, prompt=60, progress=False)
    assert Scripted.open == 0 and Scripted.calls == []

    class Mixed(Scripted):
        def load(self, folder: Path, dtype: Any = None, **options: Any) -> dict[str, Any]:
            encoder = Inputs(50, 64, None, ("input_ids",), causal=False)
            return super().load(folder, dtype) | ({"inputs": encoder.to_dict()} if folder.name == "b" else {})

    monkeypatch.setattr(speed, "FreshProcess", Mixed)
    with pytest.raises(ValueError, match=r"'b': 'forward'.* cannot be compared"):
        measure_speed(scripted, prompt=8, max_new_tokens=4, progress=False)


def test_weights_that_do_not_fit_are_refused_before_anything_starts(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    stored = sum(parameter.nbytes for parameter in llama().parameters())
    assert weight_file_bytes(folders["original"]) == stored
    assert weight_file_bytes(folders["sparse"]) == stored + 2 * 4  # two thresholds
    assert weight_file_bytes(folders["original"], "bfloat16") == stored  # both lie in memory while it loads
    monkeypatch.setattr(speed, "FreshProcess", refuse)
    with pytest.raises(MemoryLimitError, match=r"2 processes side by side need about 1\.1 GB, 500 MB are free"):
        measure_speed(folders, max_memory=500 * 10**6, progress=False)
    enough = sum(2 * weight_file_bytes(folder) + speed.PROCESS for folder in folders.values())
    with pytest.raises(AssertionError, match="a process was started"):
        measure_speed(folders, batch=2, max_memory=enough, progress=False)
    with pytest.raises(MemoryLimitError):  # one row is decoded by what has to be built first
        measure_speed(folders, batch=1, max_memory=enough, progress=False)


@pytest.mark.slow(reason="it times two models in processes of their own, twice, and compiles the decoder's kernels")
def test_two_folders_side_by_side(folders: dict[str, Path]) -> None:
    found = measure_speed(folders, prompt=16, max_new_tokens=4, rounds=2, threads=1, progress=False)
    original, sparse = found["original"], found["sparse"]
    for measured in (original, sparse):
        assert (measured.kind, measured.dtype, measured.threads, measured.rounds) == ("decode", "float32", 1, 2)
        assert 0 < measured.rate.low <= measured.rate.value <= measured.rate.high
        assert measured.first_token_seconds is not None and measured.first_token_seconds.value > 0
        assert measured.peak_bytes > 10**8
        assert (measured.engine, measured.engine_reason, measured.packed) == ("decoder", "", 0)
    assert original.ratio is None and sparse.ratio is not None and sparse.ratio.low > 0
    two = measure_speed(folders, batch=2, prompt=16, max_new_tokens=4, rounds=1, threads=1, progress=False)
    assert (two["original"].packed, two["sparse"].packed, two["sparse"].engine) == (0, 2, "transformers")
