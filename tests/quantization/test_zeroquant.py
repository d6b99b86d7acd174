"""ZQ-Local and ZQ-Global: what a block reads and should give, the choice of the rate, and the promises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from actkit.core.recipe.runner import apply
from actkit.quantization.gptq import Gptq
from actkit.quantization.rtn import RoundToNearest
from actkit.quantization.zeroquant_v2.lorc import Lorc
from actkit.quantization.zeroquant_v2.zeroquant import ZeroQuant
from actkit.testing import check_transform, tiny_batches, tiny_model
from representative import architectures

FAST: dict[str, Any] = {"group_size": 8, "steps": 3, "rates": (1e-3,)}


def block_errors(recipe: Any) -> list[float]:
    """By hand: each block of the changed model on the float model's states, beside the float block."""
    model, batches = tiny_model("llama").eval(), tiny_batches("llama", lengths=((16,) * 4,) * 2)
    changed = copy.deepcopy(model)
    apply(changed, recipe, batches, progress=False)
    errors = []
    for index, layer in enumerate(changed.model.layers):
        inputs: list[Any] = []
        outputs: list[torch.Tensor] = []
        hook = model.model.layers[index].register_forward_hook(
            lambda _, args, kwargs, output, inputs=inputs, outputs=outputs: (
                inputs.append((args, kwargs)) or outputs.append(output)
            ),
            with_kwargs=True,
        )
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        hook.remove()
        with torch.no_grad():
            given = [layer(*args, **kwargs) for args, kwargs in inputs]
        errors.append(sum(float((a - b).square().mean()) for a, b in zip(given, outputs, strict=True)))
    return errors


def test_local_training_lowers_the_error_of_every_block() -> None:
    grid = {"bits": 2, "group_size": 8}
    nearest = block_errors(RoundToNearest(**grid))
    local = block_errors(ZeroQuant(inputs="local", **grid, steps=150, rates=(1e-3, 1e-2)))
    assert all(ours < 0.8 * theirs for ours, theirs in zip(local, nearest, strict=True))


def test_global_training_lowers_the_error_of_the_model() -> None:
    model, batches = tiny_model("llama").eval(), tiny_batches("llama", lengths=((16,) * 4,) * 2)
    with torch.no_grad():
        exact = [model.model(**batch).last_hidden_state for batch in batches]

    def error(recipe: Any) -> float:
        changed = copy.deepcopy(model)
        apply(changed, recipe, batches, progress=False)
        with torch.no_grad():
            states = [changed.model(**batch).last_hidden_state for batch in batches]
        return sum(float((a - b).square().sum()) for a, b in zip(states, exact, strict=True))

    grid = {"bits": 2, "group_size": 8}
    assert error(ZeroQuant(**grid, steps=150, rates=(1e-3, 1e-2))) < 0.8 * error(RoundToNearest(**grid))


def test_rounding_to_nearest_stands_if_no_rate_helps() -> None:
    settings = {"bits": 4, "group_size": 8}
    changed, nearest = tiny_model("llama"), tiny_model("llama")
    report = apply(changed, ZeroQuant(**settings, steps=2, rates=(1e3,)), tiny_batches("llama"), progress=False).report
    apply(nearest, RoundToNearest(**settings), progress=False)
    assert all("nearest errs least" in note for note in report.notes if "errs least" in note)
    for (name, value), same in zip(changed.state_dict().items(), nearest.state_dict().values(), strict=True):
        assert torch.equal(value, same), name


def test_the_low_rank_part_may_stand_behind() -> None:
    apply(tiny_model("llama"), [ZeroQuant(bits=3, **FAST), Lorc(rank=2)], tiny_batches("llama"), progress=False)


def test_passes_go_by_rows() -> None:
    assert ZeroQuant(steps=50, rows=4, rates=(1e-3, 1e-4)).passes(40 * 128, 40) == 2 + 2 * 3 * 50 / 10


@pytest.mark.parametrize("kind", architectures(["llama", "mixtral", "vit", "gpt2"]))
def test_it_keeps_its_promises(kind: str) -> None:
    transform = ZeroQuant(input_bits=8, **FAST)
    check_transform(transform, tiny_model(kind), tiny_batches(kind), conflicting=[RoundToNearest(), Gptq()])
