"""Statistical top-k against closed forms in float64, scipy and Gemma 3n; its edges, gradients and density."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import norm
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

from actkit.core.layers.activations import Activation
from actkit.sparsity.spark.statistical_top_k import StatisticalTopK, statistical_topk, threshold


def _theta(row: np.ndarray, k: float, ddof: int = 0) -> float:
    row = row.astype(np.float64)
    return row.mean() + row.std(ddof=ddof) * norm.ppf(1 - k / len(row))


def test_the_threshold_is_that_of_a_normal_distribution() -> None:
    x = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)) * 3 + 5
    for k, unbiased in ((1, False), (24, True), (150, False), (299, True), (7.5, False)):
        expected = [_theta(row, k, int(unbiased)) for row in x.numpy()]
        found = threshold(x, k, unbiased=unbiased)
        assert found.shape == (6, 1)
        np.testing.assert_allclose(found[:, 0].numpy(), expected, rtol=1e-5)


def test_the_modes() -> None:
    x = torch.randn(4, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theta = torch.tensor([[_theta(row, 30)] for row in x.numpy()])
    torch.testing.assert_close(statistical_topk(x, 30), (x - theta).clamp(min=0))
    torch.testing.assert_close(statistical_topk(x, 30, mode="mask"), torch.where(x > theta, x, 0))
    torch.testing.assert_close(statistical_topk(x, 30, mode="neg_inf"), torch.where(x > theta, x, -math.inf))
    torch.testing.assert_close(statistical_topk(x.t(), 30, dim=0), statistical_topk(x, 30).t())


def test_soft_solves_the_penalised_problem() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(2))
    theta = float(threshold(x, 10))
    for given, found in zip(x.tolist(), statistical_topk(x, 10).tolist(), strict=True):
        best = minimize_scalar(lambda z, x=given: theta * z + (x - z) ** 2 / 2, bounds=(0, 10), method="bounded")
        assert found == pytest.approx(best.x, abs=1e-4)


def test_it_is_gemma3n_s_operator() -> None:
    x = torch.randn(3, 5, 2048, generator=torch.Generator().manual_seed(3)) * 2 + 0.5
    theirs = Gemma3nTextMLP._gaussian_topk(SimpleNamespace(activation_sparsity=0.95), x)
    torch.testing.assert_close(statistical_topk(x, 0.05 * 2048), theirs, atol=1e-6, rtol=1e-6)


def test_without_a_graph_the_result_is_the_same_and_x_is_left_alone() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    before = x.clone()
    with torch.no_grad():
        found = statistical_topk(x, 8)
    assert torch.equal(found, statistical_topk(x, 8)) and torch.equal(x, before)


def test_16_bit_inputs_have_statistics_in_float32() -> None:
    x = (torch.randn(4, 13824, generator=torch.Generator().manual_seed(5)) + 3).bfloat16()
    found = statistical_topk(x, 1106)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, statistical_topk(x.float(), 1106).bfloat16())
    assert torch.equal(statistical_topk(x, 1106, mode="mask") != 0, x.float() > threshold(x.float(), 1106))


def test_invalid_entries_enter_no_statistic() -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(8, 40, generator=generator)
    valid = torch.rand(8, 40, generator=generator) < 0.6
    given = x.masked_fill(~valid, math.nan)
    for mode, empty in (("soft", 0.0), ("mask", 0.0), ("neg_inf", -math.inf)):
        found = statistical_topk(given, 5, mode=mode, valid_mask=valid)
        for row, row_x, row_valid in zip(found, x, valid, strict=True):
            torch.testing.assert_close(row[row_valid], statistical_topk(row_x[row_valid], 5, mode=mode))
            assert (row[~row_valid] == empty).all()
    unbiased = threshold(given, 5, valid_mask=valid, unbiased=True)
    expected = [_theta(r[v].numpy(), 5, 1) for r, v in zip(x, valid, strict=True)]
    np.testing.assert_allclose(unbiased[:, 0].numpy(), expected, rtol=1e-5)


def test_rows_with_at_most_k_valid_entries_keep_all() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0, 9.0], [5.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    valid = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    soft = statistical_topk(x, 3, valid_mask=valid)
    assert soft.tolist() == [[2, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert statistical_topk(x, 3, mode="mask", valid_mask=valid).tolist() == [[3, 1, 2, 0], [5, 0, 0, 0], [0] * 4]
    assert torch.equal(statistical_topk(x, 3, mode="neg_inf", valid_mask=valid), x.masked_fill(~valid, -math.inf))
    dense = torch.randn(2, 9)
    assert torch.equal(statistical_topk(dense, 9, mode="mask"), dense)
    torch.testing.assert_close(statistical_topk(dense, 9), dense - dense.amin(-1, keepdim=True))


def test_a_softmax_always_has_an_entry() -> None:
    x = torch.tensor([0.0] * 20 + [0.5] + [-100.0] * 3)  # the three lift the threshold above all entries
    assert float(threshold(x, 3)) > 0.5 and not statistical_topk(x, 3).any()
    assert statistical_topk(x, 3, mode="neg_inf").isfinite().nonzero().tolist() == [[20]]
    longer = torch.cat((x, torch.full((2,), 9.0)))
    valid = longer < 9
    assert statistical_topk(longer, 3, mode="neg_inf", valid_mask=valid).isfinite().nonzero().tolist() == [[20]]


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6, 3e-30])
def test_constant_rows(value: float) -> None:
    x = torch.full((3, 1001), value, requires_grad=True)
    soft = statistical_topk(x, 50)
    assert not soft.any() and not statistical_topk(x, 50, mode="mask").any()
    assert torch.equal(statistical_topk(x, 50, mode="neg_inf"), x)
    soft.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_gradients_flow_through_mean_and_deviation() -> None:
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(7))
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, 3:9] = False
    for arguments in ({}, {"huber": 0.3}, {"valid_mask": valid}, {"unbiased": True}):
        assert torch.autograd.gradcheck(lambda x, a=arguments: statistical_topk(x, 4, **a), x)


def test_the_huber_form_has_a_continuous_derivative() -> None:
    x = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    excess = (x - threshold(x, 200)).clamp(min=0)
    expected = torch.where(excess < 0.5, excess**2, excess - 0.25)
    torch.testing.assert_close(statistical_topk(x, 200, huber=0.5), expected)
    torch.testing.assert_close(statistical_topk(x, 200, huber=1e-9), statistical_topk(x, 200))


def test_nan_is_seen() -> None:
    x = torch.randn(2, 16)
    x[0, 3] = math.nan
    for mode in ("soft", "mask", "neg_inf"):
        found = statistical_topk(x, 4, mode=mode)
        assert found[0].isnan().any() and not found[1].isnan().any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k: 0 was given; x has 10 entries along dim -1, give more than 0 and at most that"),
        ({"k": 11}, "k: 11 was given"),
        ({"k": math.nan}, "k: nan was given"),
        ({"mode": "hard"}, "mode: 'hard' was given, allowed are soft, mask, neg_inf"),
        ({"dim": 2}, "dim: 2 was given; x has 2 dimensions"),
        ({"huber": 0.0}, "huber: 0.0 was given"),
        ({"huber": 1.0, "mode": "mask"}, "huber: 1.0 was given with mode 'mask'"),
        ({"valid_mask": torch.ones(2, 10)}, "valid_mask: torch.float32 was given; give bool"),
        (
            {"valid_mask": torch.ones(3, 10).bool()},
            r"valid_mask: \(3, 10\) does not broadcast to x, which is \(2, 10\)",
        ),
        ({"x": torch.zeros(3, 1)}, "x: it has 1 entries along dim -1; a standard deviation needs at least 2"),
        ({"x": torch.arange(4)}, "x: torch.int64"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        statistical_topk(**{"x": torch.randn(2, 10), "k": 1, **arguments})


def test_the_module_is_an_activation_with_exact_zeros_and_measures_its_density() -> None:
    module = StatisticalTopK(Activation("gelu"), 8).eval()
    x = torch.randn(3, 50, 100, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(module(x), F.gelu(statistical_topk(x, 8)))
    assert not module.density.any()  # evaluation measures nothing
    shares = (module.train()(x) != 0).float().mean(-1).flatten()
    assert float(module.density[0]) == pytest.approx(float(shares.mean()))
    assert float(module.density[1]) == pytest.approx(float(shares.quantile(0.95, interpolation="lower")))
    before = module.density.clone()
    module(torch.zeros(4, 100))
    torch.testing.assert_close(module.density, 0.98 * before)
    assert module.half().density.dtype == torch.float32
    module(x[0, 0].half())  # one token
    module(x[:0].half())


@pytest.mark.parametrize("base", [nn.Sigmoid(), Activation("softplus")])
def test_the_module_refuses_functions_that_leave_no_zeros(base: nn.Module) -> None:
    with pytest.raises(ValueError, match="does not map 0 to 0"):
        StatisticalTopK(base, 8)
    with pytest.raises(ValueError, match="k: 0 was given"):
        StatisticalTopK(nn.ReLU(), 0)
