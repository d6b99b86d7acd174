"""A statistic of two sites against the tensors themselves."""

from __future__ import annotations

import math

import pytest
import torch

from actkit.core.model.sites import Joined, Site
from actkit.core.watch.capture import record
from actkit.core.watch.joined import Difference
from actkit.testing import tiny_batches, tiny_model


def test_rows_of_two_sites_are_read_together_and_padding_is_left_out() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    pairs = [Joined(Site("block.input", i), Site("block.output", i)) for i in range(2)]
    seen = record(model, dict.fromkeys(pairs, Difference()), batches, progress=False)
    for index, pair in enumerate(pairs):
        turned, gaps, count = 0.0, 0.0, 0
        for batch in batches:
            given: dict[str, torch.Tensor] = {}
            block = model.model.layers[index]
            hook = block.register_forward_hook(
                lambda module, args, kwargs, out, given=given: given.update(
                    first=(args[0] if args else kwargs["hidden_states"]).detach(),
                    second=(out if isinstance(out, torch.Tensor) else out[0]).detach(),
                ),
                with_kwargs=True,
            )
            with torch.no_grad():
                model(**batch)
            hook.remove()
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            for first, second in zip(given["first"][mask].double(), given["second"][mask].double()):
                cosine = float(first @ second / first.norm() / second.norm())
                turned += math.acos(max(-1.0, min(1.0, cosine))) / math.pi
                gaps += float((second - first).square().mean())
                count += 1
        assert seen[pair].count == count
        assert seen[pair].angle == pytest.approx(turned / count, abs=1e-5)
        assert seen[pair].square == pytest.approx(gaps / count, rel=1e-9)


def test_parallel_rows_turn_by_nothing_and_opposite_ones_by_half() -> None:
    x = torch.randn(3, 8)
    for factor, angle in ((2.0, 0.0), (-1.0, 1.0)):
        statistic = Difference()
        statistic.update(torch.cat((x, factor * x), 1))
        assert statistic.angle == pytest.approx(angle, abs=1e-7)
    halves = [Difference(), Difference()]
    rows = torch.randn(10, 16)
    for part, statistic in zip(rows.split(6), halves):
        statistic.update(part)
    whole = Difference()
    whole.update(rows)
    assert halves[0].merge(halves[1]).cosine == pytest.approx(whole.cosine, rel=1e-12)
    with pytest.raises(ValueError, match="join two sites that have equally many"):
        Difference().update(torch.randn(2, 3))
