"""Policies against their definitions and a search over all caches; the predictor against counts by hand; simulations
against closed forms."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actkit.core.ground.errors import CheckpointError, DataError
from actkit.core.model.expert_places import ExpertShape, expert_places
from actkit.sparsity.edgemoe.expert_cache import POLICIES, ExpertCache, check_budget, steps_of
from actkit.sparsity.edgemoe.path_predictor import PathPredictor, record_traces
from actkit.sparsity.edgemoe.simulate import lower_bound_ms, simulate
from actkit.testing import tiny_model

Step = tuple[tuple[int, int], ...]


def trace(tokens: int = 40, layers: int = 3, experts: int = 4, top_k: int = 1, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    chances = rng.dirichlet(np.full(experts, 0.5), layers)
    rows = [[rng.choice(experts, top_k, replace=False, p=p) for p in chances] for _ in range(tokens)]
    return np.array(rows)


def misses(steps: list[Step], policy: Any, size: int, layers: int = 3) -> int:
    cache_ = ExpertCache(size, policy, layers=layers, future=steps if policy == "belady" else None)
    count = 0
    for step in steps:
        cache_.begin(step[0][0], step)
        for key in step:
            if key not in cache_.held:
                count += 1
                assert cache_.evict_for(1, step) is not None
                cache_.add(key, 1)
        assert cache_.used <= size
    return count


def fewest(steps: list[Step], size: int) -> int:
    """The fewest reads of any policy, by trying all."""

    @cache
    def after(index: int, held: frozenset[tuple[int, int]]) -> int:
        if index == len(steps):
            return 0
        (key,) = steps[index]
        if key in held:
            return after(index + 1, held)
        if len(held) < size:
            return 1 + after(index + 1, held | {key})
        return 1 + min(after(index + 1, held - {gone} | {key}) for gone in held)

    return after(0, frozenset())


@pytest.mark.parametrize("seed", range(3))
def test_belady_reads_no_more_than_any_policy(seed: int) -> None:
    steps = steps_of([trace(12, seed=seed)])
    best = fewest(steps, 4)
    assert misses(steps, "belady", 4) == best
    assert all(misses(steps, policy, 4) >= best for policy in POLICIES)


def by_definition(steps: list[Step], policy: str, size: int) -> int:
    """Reads of the least recently used, the least often used and the oldest, from the whole past each time."""
    held: list[tuple[int, int]] = []  # in the order in which they came
    count = 0
    past: list[tuple[int, int]] = []
    for (key,) in steps:
        if key not in held:
            count += 1
            if len(held) == size:
                last = {each: len(past) - 1 - past[::-1].index(each) for each in held}
                rank = {"lru": last.get, "lfu": lambda k, n=last: (past.count(k), n[k]), "fifo": held.index}[policy]
                held.remove(min(held, key=rank))  # type: ignore[arg-type]
            held.append(key)
        past.append(key)
    return count


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
def test_policies_do_what_their_names_say(policy: str) -> None:
    for seed in range(5):
        steps = steps_of([trace(60, seed=seed)])
        assert misses(steps, policy, 5) == by_definition(steps, policy, 5)


def test_edgemoe_evicts_what_is_far_and_rare() -> None:
    shares = {(0, 0): 0.9, (1, 0): 0.9, (2, 0): 0.2, (3, 0): 0.9}
    held = ExpertCache(4, "edgemoe", layers=4, shares=shares)
    for key in [(0, 0), (1, 0), (2, 0), (3, 0)]:
        held.add(key, 1)
    held.begin(1, [(1, 1)])
    assert [held.distance(key) for key in shares] == [3, 4, 1, 2]
    # f = 0.8 * share, as none was chosen lately: d / (f + 0.02) = 4.1, 5.4, 5.6, 2.7; the path says that (2, 0) comes
    held.expect({(2, 0): 0.9})
    assert held.frequency((2, 0)) == 0.9 and held.frequency((0, 0)) == pytest.approx(0.72)
    assert held.evict_for(1, [(1, 1)]) == [(1, 0)]
    held.add((1, 1), 1)
    held.begin(1, [(1, 1)])  # nothing is expected any more
    assert held.evict_for(2, [(1, 1)]) == [(2, 0), (0, 0)]
    assert held.evictions == 3 and held.used == 2
    lately = 2 * (1 - 0.5 ** (1 / 3))  # chosen twice, by the same token
    assert held.frequency((1, 1)) == pytest.approx(0.2 * lately)


def test_mixed_sizes_and_what_must_stay() -> None:
    held = ExpertCache(10, "lru", layers=2)
    held.add((0, 0), 4)
    held.add((0, 1), 5)
    assert held.evict_for(3, [(0, 0), (0, 1)]) is None and held.used == 9
    assert held.evict_for(11, []) is None and held.used == 9
    assert held.evict_for(6, [(0, 1)]) is None
    assert held.evict_for(5, [(0, 1)]) == [(0, 0)]
    with pytest.raises(ValueError, match="does not fit into 10"):
        held.add((1, 0), 6)
    with pytest.raises(ValueError, match="choose one of edgemoe, lru, lfu, fifo, belady"):
        ExpertCache(10, "random", layers=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the experts of all steps"):
        ExpertCache(10, "belady", layers=2)
    with pytest.raises(ValueError, match="the 2 largest experts, which one token may need at once, take 7"):
        check_budget(6, [1, 3, 4, 2], 2)


# -- the predictor -----------------------------------------------------------------------------------------------------


def test_the_predictor_counts_what_followed_what() -> None:
    text = [trace(80, layers=4, experts=3, seed=1), trace(70, layers=4, experts=3, seed=2)]
    predictor = PathPredictor.fit(text, 3)
    tokens = np.concatenate(text)[:, :, 0]
    for past in itertools.product(range(3), repeat=2):
        same = tokens[(tokens[:, 1:3] == past).all(1)]
        if len(same):
            expected = [float((same[:, 3] == e).mean()) for e in range(3)]
            found = predictor.predict(3, [(past[0],), (past[1],)])
            assert [found[e] for e in range(3)] == pytest.approx(expected)
            assert next(iter(found.values())) == max(expected)
    flat = [text_.reshape(-1) for text_ in text]  # a text goes on from its last layer to the next token's first
    for past in itertools.product(range(3), repeat=2):
        after = [x[i] for x in flat for i in range(4, len(x), 4) if tuple(x[i - 2 : i]) == past]
        if after:
            found = predictor.predict(0, [(past[0],), (past[1],)])
            assert [found[e] for e in range(3)] == pytest.approx([after.count(e) / len(after) for e in range(3)])
    first = predictor.predict(0, [])
    assert [first[e] for e in range(3)] == pytest.approx([(tokens[:, 0] == e).mean() for e in range(3)])
    assert predictor.shares[2, 1] == pytest.approx((tokens[:, 2] == 1).mean())


def test_it_backs_off_from_paths_that_it_has_not_seen() -> None:
    rows = np.array([[[0, 1], [0, 2], [1, 2]], [[0, 1], [0, 1], [0, 2]], [[2, 3], [0, 1], [2, 3]]])
    predictor = PathPredictor.fit([rows], 5)
    assert predictor.predict(2, [(2, 3), (1, 0)])[2] == 1.0  # seen: two layers
    assert predictor.predict(2, [(0, 4), (0, 1)]) == pytest.approx({0: 0.5, 1: 0, 2: 1, 3: 0.5, 4: 0})  # one layer
    # the set (1, 2) was not seen: the mean of what followed 1 (two tokens) and 2 (one token)
    assert predictor.predict(2, [(0, 1), (2, 1)]) == pytest.approx({0: 0.25, 1: 0.5, 2: 1, 3: 0.25, 4: 0})
    unknown = predictor.predict(2, [(0, 1), (3, 4)])  # neither was seen: how often each is chosen
    assert unknown == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1, 3: 1 / 3, 4: 0})
    assert predictor.predict(2, [(2, 3), (1, 0)], order=0) == unknown
    with pytest.raises(ValueError, match="layer: 3 was given; give 0 to 2"):
        predictor.predict(3, [(0, 1)])


def test_sets_are_not_told_apart_if_there_are_too_many() -> None:
    rows = np.random.default_rng(0).permuted(np.tile(np.arange(64), (20, 3, 1)), axis=2)[:, :, :8]
    predictor = PathPredictor.fit([rows], 64)
    found = predictor.predict(1, [rows[0, 0]])
    after = [np.isin(rows[:, 0], e).any(1) for e in rows[0, 0]]  # the tokens that chose the same, for each
    expected = np.mean([[(rows[same, 1] == e).any(1).mean() for e in range(64)] for same in after], 0)
    assert [found[e] for e in range(64)] == pytest.approx(list(expected))
    assert predictor.coverage([rows]) == 0 and all(set(sets) == {()} for sets in predictor._sets)


def test_accuracy_and_coverage_on_paths_that_are_certain(tmp_path: Path) -> None:
    paths = np.array([[0, 1, 2, 3], [1, 2, 3, 0]])[:, :, None]
    text = paths[np.random.default_rng(0).integers(2, size=50)]
    predictor = PathPredictor.fit([text], 4)
    assert predictor.accuracy([text]) == 1 and 0.3 < predictor.accuracy([text], order=0) < 0.7
    assert predictor.coverage([text], top=1.0) == 1
    assert 0.2 < predictor.coverage([text], top=0.25) < 0.4
    predictor.save(tmp_path / "paths.json")
    again = PathPredictor.load(tmp_path / "paths.json")
    assert again.shares == predictor.shares and again.predict(2, [(0,), (1,)]) == predictor.predict(2, [(0,), (1,)])
    assert again.predict(1, [(3,)]) == predictor.predict(1, [(3,)])
    (tmp_path / "paths.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no predictor"):
        PathPredictor.load(tmp_path / "paths.json")
    predictor.check(ExpertShape((1, 2, 5, 6), 4, 1, 8, 8))
    with pytest.raises(ValueError, match="4 layers of 4 experts, 1 for a token; the model has 2 of 8"):
        predictor.check(ExpertShape((0, 1), 8, 2, 8, 8))
    with pytest.raises(DataError, match="hold no token"):
        PathPredictor.fit([], 4)


def test_traces_are_what_the_routers_chose() -> None:
    model = tiny_model("mixtral")
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    traces = record_traces(model, [{"input_ids": ids, "attention_mask": mask}])
    assert [found.shape for found in traces] == [(6, 2, 2), (4, 2, 2)]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, output_router_logits=True).router_logits
    for layer, place in enumerate(expert_places(model)):
        expected = logits[place.layer].topk(2, -1).indices.unflatten(0, (2, 6)).sort(-1).values
        assert (np.sort(traces[0][:, layer]) == expected[0].numpy()).all()
        assert (np.sort(traces[1][:, layer]) == expected[1, 2:].numpy()).all()
    with pytest.raises(DataError, match="there are none"):
        record_traces(model, [])


# -- simulations -------------------------------------------------------------------------------------------------------

SIZES = {(layer, e): 100 for layer in range(3) for e in range(4)}
DISK: dict[str, Any] = {"bandwidth": 50_000.0, "compute_ms": 1.0}  # 2 ms for an expert


def test_nothing_is_read_twice_if_all_fits() -> None:
    text = [trace(200, top_k=2)]
    found = simulate(text, SIZES, 1200, policy="lru", **DISK)
    used = {key for step in steps_of(text) for key in step}
    assert found.reads == len(used) and found.most_bytes == 100 * len(used)
    assert found.token_ms == pytest.approx(3 + 2 * len(used) / 200)
    assert found.stall_ms == pytest.approx(found.token_ms - 3)


def test_a_cache_of_one_layer_reads_everything_on_demand() -> None:
    """Round and round, LRU has thrown out what comes next: k reads and a computation for each layer."""
    found = simulate([trace(50, top_k=2)], SIZES, 200, policy="lru", latency=0.001, **DISK)
    assert found.token_ms == pytest.approx(3 * (1 + 2 * 3)) and found.hit_rate == 0 and found.bytes_read == 50 * 600


def test_perfect_preloads_hide_reads_that_are_no_longer_than_computing() -> None:
    text = [trace(50)]
    quick = DISK | {"bandwidth": 100_000.0}  # as long as a layer
    found = simulate(text, SIZES, 200, policy="belady", oracle=True, **quick)
    assert found.token_ms == pytest.approx(3 + 1 / 50)  # but for the first expert
    slow = simulate(text, SIZES, 200, policy="belady", oracle=True, **DISK)
    reads = simulate(text, SIZES, 200, policy="belady", **DISK).reads
    assert slow.token_ms >= lower_bound_ms(reads, 2.0, 3, 1.0, 50) == pytest.approx(max(3, 2 * reads / 50))


def test_wrong_preloads_are_read_and_counted() -> None:
    certain = np.tile(np.array([[[0], [0], [0]], [[1], [1], [1]]]), (20, 1, 1))
    predictor = PathPredictor.fit([certain[1::2]], 4)  # it has seen the second path only
    found = simulate([certain[::2]], SIZES, 300, policy="lru", predictor=predictor, preload=1, **DISK)
    assert found.wasted > 0 and 50 * found.reads < found.bytes_read < 100 * found.reads  # some were broken off half-way
    careful = simulate([certain[::2]], SIZES, 300, predictor=predictor, preload=1, least=1.1, **DISK)
    assert careful.wasted == 0 and careful.token_ms < found.token_ms
    with pytest.raises(ValueError, match="the 1 largest experts"):
        simulate([certain], SIZES, 99, policy="lru", **DISK)
