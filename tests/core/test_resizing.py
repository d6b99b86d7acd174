"""Narrower copies of layers, as an edit: applied, described, replayed, undone; and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from actkit.core.edit.edits import Resize, apply_edit, describe, replay
from actkit.core.edit.resizing import resized
from actkit.core.ground.errors import EditError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import TopK

ROWS, COLUMNS = torch.tensor([3, 0, 4]), torch.tensor([1, 2, 5, 6])


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    linear = nn.Linear(7, 5)
    conv1d = Conv1D(5, 7)
    nn.init.normal_(conv1d.bias)
    return {
        "Linear": linear,
        "Conv1D": conv1d,
        "ActLinear": ActLinear.of(nn.Linear(7, 5)),
        "no bias": nn.Linear(7, 5, bias=False),
    }


@pytest.mark.parametrize("name", list(layers()))
def test_a_layer_of_some_outputs_and_inputs(name: str) -> None:
    layer = layers()[name]
    x = torch.zeros(2, 7).index_copy(1, COLUMNS, torch.randn(2, 4))
    expected = layer(x)[:, ROWS]
    narrower = resized("here", layer, ROWS, COLUMNS)
    assert type(narrower) is type(layer) and narrower is not layer
    torch.testing.assert_close(narrower(x[:, COLUMNS]), expected)
    assert tuple(layer.weight.shape) in ((5, 7), (7, 5))  # as it was


@pytest.mark.parametrize("name", list(layers()))
def test_the_edit_is_undone_and_replayed_by_its_sizes(name: str) -> None:
    model = nn.Sequential(layers()[name])
    x = torch.randn(2, 7)
    before = model(x)
    edit = Resize("0", outputs=ROWS)
    described = describe(edit, model)
    assert described == {"resize": "0", "outputs": 3}
    undo = apply_edit(model, edit)
    narrow = model(x)
    fresh = nn.Sequential(layers()[name])
    replay(fresh, [described])
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), narrow) and narrow.shape == (2, 3)
    assert undo is not None
    undo()
    assert torch.equal(model(x), before)


def test_what_keeps_parameters_out_of_training_stays() -> None:
    linear = nn.Linear(7, 5)
    linear.weight.requires_grad_(False)
    narrower = resized("here", linear, None, COLUMNS)
    assert not narrower.weight.requires_grad and narrower.bias.requires_grad
    assert narrower.bias.data_ptr() != linear.bias.data_ptr()


@pytest.mark.parametrize("kept", [torch.tensor([5]), torch.tensor([-1]), torch.tensor([1, 1]), torch.tensor([0.5])])
def test_wrong_indices(kept: torch.Tensor) -> None:
    with pytest.raises(EditError, match="give some of 0 to 4, each once"):
        resized("here", nn.Linear(7, 5), kept)


def test_what_cannot_be_resized() -> None:
    filled = ActLinear.of(nn.Linear(7, 5), select=TopK(3, None))
    with pytest.raises(EditError, match="its select slot is filled already"):
        resized("here", filled, ROWS)
    with pytest.raises(EditError, match="a LayerNorm stands here"):
        resized("here", nn.LayerNorm(5), ROWS)


def test_one_side_of_a_tie_is_refused() -> None:
    model = nn.Sequential(nn.Linear(7, 5, bias=False), nn.Linear(7, 5, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(EditError, match="tied"):
        apply_edit(model, Resize("0", outputs=ROWS))
