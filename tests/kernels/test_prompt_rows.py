"""What lies between a prompt's products, against plain torch; whole prompts are compared in tests/runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from actkit.kernels import prompt_rows
from actkit.kernels.decode_math import GELU_TANH, SILU
from actkit.kernels.decode_places import ACTIVATION, GATE_AT, LAYER_FIELDS, UNITS, UP_AT
from actkit.kernels.numba_cpu import array
from actkit.kernels.packing import in_order, pack

NOTHING = np.empty(0, np.float32)
TOKENS = 67  # more than the parts that threads share out, and no multiple


def product(outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, bool]:
    """Outputs as a packed weight leaves them, the same in order, and whether they are tiled."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, 40, generator=generator).to(dtype)
    left = torch.randn(TOKENS, 40, generator=generator).to(dtype) @ pack(weight, threads=1).buffer[0]
    return left, in_order(left).float(), dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centered", [False, True])
def test_outputs_are_added_and_normed(dtype: torch.dtype, centered: bool) -> None:
    outputs, hidden = 100, 90  # narrower than the tile
    left, ordered, tiled = product(outputs, dtype)
    x, bias = torch.randn(TOKENS, hidden), torch.randn(outputs)
    gain, shift = torch.rand(hidden) + 0.5, torch.randn(hidden)
    wanted = x + (ordered[:, :hidden] + bias[:hidden]) * 0.7
    y = torch.empty(TOKENS, hidden, dtype=dtype)
    found, epsilon = x.clone(), np.float32(1e-3)
    prompt_rows.add_rows(
        found.numpy(), array(left), tiled, bias.numpy(), np.float32(0.7), array(y), gain.numpy(), shift.numpy(),
        centered, epsilon,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    normed = (
        F.layer_norm(wanted, (hidden,), gain, shift, 1e-3) if centered else F.rms_norm(wanted, (hidden,), gain, 1e-3)
    )
    torch.testing.assert_close(y.float(), normed.to(dtype).float(), rtol=1e-2 if tiled else 1e-5, atol=1e-5)
    for weight, expected in ((gain.numpy(), normed), (NOTHING, wanted)):  # nothing is added; nothing is normed
        prompt_rows.add_rows(
            found.numpy(), array(left[:0]), tiled, NOTHING, np.float32(0.7), array(y), weight, shift.numpy(), centered,
            epsilon,
        )  # fmt: skip
        torch.testing.assert_close(y.float(), expected.to(dtype).float(), rtol=1e-2 if tiled else 1e-5, atol=1e-5)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_gates(dtype: torch.dtype, gated: bool) -> None:
    units = 70
    left, ordered, tiled = product(2 * units + 9, dtype)
    bias = torch.randn(ordered.shape[1])
    place = np.zeros(LAYER_FIELDS, np.int64)
    place[[GATE_AT, UP_AT, UNITS, ACTIVATION]] = 3, units + 5 if gated else -1, units, SILU if gated else GELU_TANH
    hidden = torch.empty(TOKENS, units, dtype=dtype)
    curves = np.zeros((1, 10), np.float32), 1
    prompt_rows.activate_rows(place, np.float32(0.05), *curves, array(left), tiled, bias.numpy(), array(hidden))
    outputs = ordered + bias
    gate = outputs[:, 3 : 3 + units]
    gate = F.silu(gate) if gated else F.gelu(gate, approximate="tanh")
    gate = torch.where(gate.abs() < 0.05, 0.0, gate)
    wanted = gate * outputs[:, units + 5 : 2 * units + 5] if gated else gate
    torch.testing.assert_close(hidden.float(), wanted.to(dtype).float(), rtol=1e-2 if tiled else 1e-5, atol=1e-5)


def test_what_is_not_finite_is_seen() -> None:
    x, y = torch.zeros(3, 4), torch.empty(3, 4, dtype=torch.bfloat16)
    x[1, 2], x[2, 0] = torch.nan, torch.inf
    prompt_rows.add_rows(
        x.numpy(), array(y[:0]), True, NOTHING, np.float32(1), array(y), np.ones(4, np.float32), NOTHING, False,
        np.float32(1e-5),
    )  # fmt: skip
    assert y[0].isfinite().all()
    assert y[1].isnan().any()
    assert not y[2].isfinite().all()
