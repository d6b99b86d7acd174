"""Codes, segments and the memory against loops over sets."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from actkit.sparsity.active_dendrites.pattern_simulation import random_codes
from actkit.sparsity.active_dendrites.pattern_theory import overlap_probability
from actkit.sparsity.active_dendrites.segments import DendriticSegments, PatternMemory, sparse_code


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ones(code: torch.Tensor) -> set[int]:
    return set(code.nonzero().flatten().tolist())


def cells_of(segments: DendriticSegments, index: int) -> set[int]:
    return set(segments.members.split(segments.sizes.tolist())[index].tolist())


# -- codes -------------------------------------------------------------------------------------------------------------


def test_a_code_is_the_largest_entries():
    x = torch.randn(3, 5, 40, generator=seeded())
    for by, score in (("abs", x.abs()), ("value", x)):
        code = sparse_code(x, 7, by=by)
        assert code.dtype == torch.bool and code.shape == x.shape
        for row, chosen in zip(score.reshape(-1, 40).tolist(), code.reshape(-1, 40), strict=True):
            assert ones(chosen) == set(sorted(range(40), key=lambda i: -row[i])[:7])


def test_of_equal_entries_the_first_are_taken():
    x = torch.tensor([0.0, 2.0, -2.0, 2.0, 1.0])
    assert ones(sparse_code(x, 2)) == {1, 2}
    assert ones(sparse_code(x, 2, by="value")) == {1, 3}
    assert ones(sparse_code(torch.zeros(5), 3)) == {0, 1, 2}
    assert ones(sparse_code(x.bfloat16(), 5)) == set(range(5))


def test_bad_codes():
    with pytest.raises(ValueError, match=r"1 <= active <= cells does not hold: active=6 .* cells=5"):
        sparse_code(torch.zeros(5), 6)
    with pytest.raises(ValueError, match=r"active=0"):
        sparse_code(torch.zeros(5), 0)
    with pytest.raises(ValueError, match=r"by: 'max' was given"):
        sparse_code(torch.zeros(5), 2, by="max")
    with pytest.raises(ValueError, match=r"NaN"):
        sparse_code(torch.tensor([1.0, torch.nan]), 1)


# -- segments ----------------------------------------------------------------------------------------------------------


def test_segments_store_ones_of_their_code_and_match_by_overlap():
    segments = DendriticSegments(200, synapses=8, threshold=4)
    codes = random_codes(30, 200, 20, seeded())
    assert segments.learn(codes, generator=seeded(1)).tolist() == list(range(30))
    assert segments.sizes.tolist() == [8] * 30
    for index, code in enumerate(codes):
        stored = cells_of(segments, index)
        assert len(stored) == 8 and stored <= ones(code)
    met = torch.cat([codes, random_codes(40, 200, 60, seeded(2))])
    overlap = segments.overlap(met)
    expected = [[len(cells_of(segments, i) & ones(code)) for i in range(30)] for code in met]
    assert overlap.dtype == torch.int64 and overlap.tolist() == expected
    assert torch.equal(segments(met), overlap >= 4)
    assert segments.match(codes).diagonal().all()


def test_synapses_are_drawn_evenly_and_by_the_generator():
    code = torch.zeros(50, dtype=torch.bool)
    code[10:30] = True
    segments = DendriticSegments(50, synapses=5, threshold=2)
    segments.learn(code.expand(4000, 50), generator=seeded())
    share = torch.bincount(segments.members, minlength=50)[10:30] / 4000  # 0.25 each, sd 0.007
    assert (share - 0.25).abs().max() < 0.03
    again = DendriticSegments(50, synapses=5, threshold=2)
    again.learn(code.expand(4000, 50), generator=seeded())
    assert torch.equal(segments.members, again.members)


def test_codes_that_join_a_segment_make_a_union():
    segments = DendriticSegments(2000, synapses=20, threshold=8)
    codes = random_codes(7, 2000, 40, seeded())
    segments.learn(codes[:3], generator=seeded(1))
    before = [cells_of(segments, i) for i in range(3)]
    assert segments.learn(codes[3:], segment=1, generator=seeded(2)).tolist() == [1] * 4
    assert len(segments) == 3
    assert [cells_of(segments, i) for i in (0, 2)] == [before[0], before[2]]
    union = cells_of(segments, 1)
    assert before[1] < union and len(union) > 60
    assert all(len(union & ones(code)) >= 20 for code in codes[3:])
    assert segments.match(codes[3:])[:, 1].all() and segments.sizes[1] == len(union)


def test_no_code_is_missed_with_as_many_lost_ones_as_the_threshold_allows():
    segments = DendriticSegments(300, synapses=12, threshold=7)
    code = random_codes(1, 300, 20, seeded())
    segments.learn(code, generator=seeded(1))
    for lost in range(13):
        noisy = code.clone()
        noisy[0, segments.members[:lost]] = False
        assert bool(segments.match(noisy)) == (lost <= 5)


def test_a_dense_union_warns():
    segments = DendriticSegments(200, synapses=10, threshold=3)
    segments.learn(random_codes(1, 200, 20, seeded()))
    with pytest.warns(UserWarning, match=r"Segment 0 holds \d+ of 200 cells: .* of random codes with 20 ones match"):
        segments.learn(random_codes(9, 200, 20, seeded(1)), segment=0)
    sparse = DendriticSegments(2000, synapses=10, threshold=5)
    sparse.learn(random_codes(1, 2000, 20, seeded()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse.learn(random_codes(2, 2000, 20, seeded(1)), segment=0)


def test_the_predicted_rate_of_any_match():
    segments = DendriticSegments(400, synapses=10, threshold=4)
    assert segments.false_positive(20) == 0
    codes = random_codes(6, 400, 20, seeded())
    segments.learn(codes[:4], generator=seeded(1))
    with pytest.warns(UserWarning, match="of random codes with 20 ones"):
        segments.learn(codes[4:], segment=0, generator=seeded(2))
    missed = 1.0
    for size in segments.sizes.tolist():
        missed *= 1 - overlap_probability(400, 20, size, 4)
    assert segments.false_positive(20) == pytest.approx(1 - missed, rel=1e-9)
    met = segments.match(random_codes(20_000, 400, 20, seeded(3))).any(1).double().mean()
    assert float(met) == pytest.approx(segments.false_positive(20), rel=0.15)


def test_nothing_stored_and_nothing_asked():
    segments = DendriticSegments(40, synapses=3, threshold=2)
    codes = random_codes(5, 40, 6, seeded())
    assert segments.overlap(codes).shape == (5, 0)
    segments.learn(codes)
    assert segments.overlap(codes[:0]).shape == (0, 5)
    assert segments.learn(codes[:0]).shape == (0,)
    assert segments.match(codes[0]).shape == (1, 5)
    assert "segments=5" in repr(segments)


def test_save_and_load(tmp_path):
    segments = DendriticSegments(2000, synapses=8, threshold=4)
    codes = random_codes(10, 2000, 20, seeded())
    segments.learn(codes[:6])
    segments.learn(codes[6:], segment=2)
    save_file(segments.state_dict(), tmp_path / "segments.safetensors")
    loaded = DendriticSegments(2000, synapses=8, threshold=4)
    loaded.load_state_dict(load_file(tmp_path / "segments.safetensors"))
    assert torch.equal(loaded.overlap(codes), segments.overlap(codes)) and len(loaded) == 6
    with pytest.raises(RuntimeError, match="Missing key"):
        loaded.load_state_dict({"members": segments.members})


def test_bad_segments():
    with pytest.raises(ValueError, match=r"1 <= threshold <= synapses <= cells does not hold: threshold=5, synapses=4"):
        DendriticSegments(100, synapses=4, threshold=5)
    segments = DendriticSegments(100, synapses=8, threshold=4)
    with pytest.raises(ValueError, match=r"synapses <= active does not hold: synapses=8 .* active=7"):
        segments.learn(random_codes(2, 100, 7))
    with pytest.raises(ValueError, match=r"segment: 0 was given; there are 0"):
        segments.learn(random_codes(1, 100, 10), segment=0)
    for codes in (torch.zeros(2, 99, dtype=torch.bool), torch.zeros(2, 100), torch.zeros(1, 2, 100, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"codes: .* give bool \[batch, 100\]"):
            segments.match(codes)


# -- the memory --------------------------------------------------------------------------------------------------------


def test_a_memory_names_noisy_codes_and_rejects_strangers(tmp_path):
    memory = PatternMemory(1000, synapses=16, threshold=8)
    codes = random_codes(50, 1000, 30, seeded())
    labels = torch.arange(50) % 7
    memory.learn(codes, labels, generator=seeded(1))
    noisy = codes.clone()
    for row in noisy:
        row[row.nonzero()[:5, 0]] = False
    found = memory.classify(noisy)
    assert torch.equal(found.labels, labels) and found.segments.tolist() == list(range(50))
    assert torch.equal(found.overlaps, memory.segments.overlap(noisy).amax(1))
    strangers = memory.classify(random_codes(200, 1000, 30, seeded(2)))
    assert (strangers.labels == -1).all() and (strangers.segments == -1).all() and (strangers.overlaps < 8).all()
    assert memory.segments.false_positive(30) < 1e-6
    save_file(memory.state_dict(), tmp_path / "memory.safetensors")
    loaded = PatternMemory(1000, synapses=16, threshold=8)
    loaded.load_state_dict(load_file(tmp_path / "memory.safetensors"))
    assert torch.equal(loaded(noisy), labels)


def test_of_equal_overlaps_the_first_segment_wins():
    memory = PatternMemory(50, synapses=5, threshold=3)
    code = random_codes(1, 50, 5, seeded())
    memory.learn(code.expand(3, 50), [4, 5, 6])
    found = memory.classify(code)
    assert (found.labels.item(), found.segments.item(), found.overlaps.item()) == (4, 0, 5)


def test_a_bad_memory():
    memory = PatternMemory(50, synapses=5, threshold=3)
    code = random_codes(2, 50, 8, seeded())
    with pytest.raises(ValueError, match="the memory is empty"):
        memory.classify(code)
    with pytest.raises(ValueError, match="labels: 1 were given for 2 codes"):
        memory.learn(code, [1])
    with pytest.raises(ValueError, match="0 or more"):
        memory.learn(code, [1, -1])
    assert len(memory.segments) == 0
