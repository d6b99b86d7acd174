"""Neuron activity against counts by hand on tensors caught by a plain hook."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from actkit.core.ground.errors import DataError
from actkit.core.store.checkpoint import save
from actkit.core.train.training import train
from actkit.sparsity.lazy_neuron.activity_curve import activity_curve
from actkit.sparsity.lazy_neuron.neuron_activity import Flops, neuron_activity
from actkit.testing import tiny_batches, tiny_model
from actkit.testing.models import HIDDEN, INNER, KINDS
from actkit.zoo import Checkpoint


def rows_by_hand(model: nn.Module, path: str, batches: list[Any]) -> np.ndarray:
    """The real input rows of a layer."""
    found: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    return torch.cat([x[mask] for x, mask in zip(found, masks, strict=True)]).numpy()


def test_numbers_are_those_of_the_real_tokens() -> None:
    model, batches = tiny_model("llama", hidden_act="relu"), tiny_batches("llama", lengths=((30, 12, 25), (28, 9)))
    for threshold in (0.0, 0.5):
        activity = neuron_activity(model, batches, threshold=threshold, progress=False)
        assert [layer.site for layer in activity.layers] == ["blocks.0.mlp.hidden", "blocks.1.mlp.hidden"]
        for index, layer in enumerate(activity.layers):
            on = np.abs(rows_by_hand(model, f"model.layers.{index}.mlp.down_proj", batches)) > threshold
            assert layer.tokens == len(on) == 104 and layer.neurons == INNER and layer.activation == "relu"
            assert layer.share == pytest.approx(on.mean()) and layer.count == pytest.approx(on.sum(1).mean())
            for found, p in ((layer.low, 0.05), (layer.high, 0.95)):
                assert found == pytest.approx(np.quantile(on.mean(1), p, method="inverted_cdf"))
            np.testing.assert_allclose(layer.frequency.numpy(), on.mean(0))
            assert layer.dead == tuple(np.flatnonzero(~on.any(0)))
        assert activity.share == pytest.approx(np.mean([layer.share for layer in activity.layers]))
        assert not activity.notes


def test_dead_neurons_are_found() -> None:
    model = tiny_model("gpt2", activation_function="relu")
    mlp = model.transformer.h[1].mlp
    with torch.no_grad():
        mlp.c_fc.bias[3] = mlp.c_fc.bias[17] = -1e4
    first, second = neuron_activity(model, tiny_batches("gpt2"), progress=False).layers
    assert {3, 17} <= set(second.dead) and not {3, 17} <= set(first.dead)


def test_every_family_is_measured_and_smooth_functions_are_noted() -> None:
    for kind in KINDS:
        activity = neuron_activity(tiny_model(kind), tiny_batches(kind), progress=False)
        assert len(activity.layers) == {"mixtral": 8, "mlp": 1}.get(kind, 2), kind
        smooth = {"llama": "silu", "mixtral": "silu", "gemma": "gelu_tanh", "gpt2": "gelu_tanh", "mlp": None}
        name = smooth.get(kind, "gelu")
        assert [name for note in activity.notes if name and note.startswith(name)] == ([name] if name else []), kind
        above = neuron_activity(tiny_model(kind), tiny_batches(kind), threshold=0.1, progress=False)
        assert 0 < above.share < activity.share and not above.notes, kind


def test_gate_and_product_are_two_sites() -> None:
    model, batches = tiny_model("llama", hidden_act="relu"), tiny_batches("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:6] = 0  # the product is off there, whatever the gate
    gate, hidden = (neuron_activity(model, batches, site=site, progress=False) for site in ("mlp.gate", "mlp.hidden"))
    assert all(set(range(6)) <= set(layer.dead) for layer in hidden.layers)
    for one, other in zip(gate.layers, hidden.layers, strict=True):
        np.testing.assert_allclose(one.frequency[6:].numpy(), other.frequency[6:].numpy())
        assert one.share > other.share


def test_experts_without_a_token_are_left_out() -> None:
    model = tiny_model("mixtral")
    batches = tiny_batches("mixtral", lengths=((1,),))  # one token: two of four experts per block
    activity = neuron_activity(model, batches, progress=False)
    assert len(activity.layers) == 4 and sum("reached by no token" in note for note in activity.notes) == 4


def test_traced_models_modules_functions_and_convolutions() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.pointwise = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 1)
            self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pointwise(F.relu(self.convolution(x))).mean((2, 3))
            return self.second(F.gelu(self.first(x)))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(5, 1, 6, 6)
    convolution, linear = neuron_activity(model, [x], progress=False).layers
    on = F.relu(model.convolution(x)).transpose(0, 1).flatten(1) > 0
    assert (convolution.site, convolution.activation) == ("layer.input:pointwise", "relu")
    assert convolution.tokens == 5 * 36 and convolution.share == pytest.approx(float(on.float().mean()))
    assert (linear.site, linear.activation, linear.share) == ("layer.input:second", "gelu", 1.0)
    assert (convolution.before, linear.before, linear.after) == (0, 60, 20)
    named = neuron_activity(model, x, site="layer.input:second", threshold=0.05, progress=False)
    assert named.layers[0].share < 1 and named.flops == Flops(0, 0, 0)
    with pytest.raises(DataError, match="no nonlinearity between two layers"):
        neuron_activity(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4), progress=False)


def test_flops() -> None:
    batches = tiny_batches("llama")
    activity = neuron_activity(tiny_model("llama", hidden_act="relu"), batches, progress=False)
    tokens, matrix = sum(int(batch["attention_mask"].sum()) for batch in batches), HIDDEN * INNER
    a, b = (layer.share for layer in activity.layers)
    assert activity.flops.dense == 2 * tokens * 3 * matrix * 2
    assert activity.flops.achievable == pytest.approx(2 * tokens * matrix * (2 + a + 2 + b))
    assert activity.flops.ideal == pytest.approx(2 * tokens * 3 * matrix * (a + b))


def test_it_reads_in_evaluation_mode_and_restores() -> None:
    model = tiny_model("bert", hidden_act="relu", hidden_dropout_prob=0.5).train()
    twice = [neuron_activity(model, tiny_batches("bert"), progress=False).to_dict() for _ in range(2)]
    assert twice[0] == twice[1] and model.training


def test_bad_input() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    with pytest.raises(ValueError, match=r"threshold: -1 was given"):
        neuron_activity(model, batches, threshold=-1)
    with pytest.raises(ValueError, match=r"mlp\.middle"):
        neuron_activity(model, batches, site="mlp.middle")
    with pytest.raises(ValueError, match=r"mlp\.gate is not in this bert model"):
        neuron_activity(tiny_model("bert"), tiny_batches("bert"), site="mlp.gate")
    with pytest.raises(DataError, match="batches: 0 were given"):
        neuron_activity(model, [])
    with pytest.raises(DataError, match="models: 0 were given"):
        activity_curve([], batches)


def test_results_are_shown(tmp_path: Any) -> None:
    model, batches = tiny_model("gpt2", activation_function="relu"), tiny_batches("gpt2")
    activity = neuron_activity(model, batches, progress=False)
    found = json.loads(json.dumps(activity.to_dict()))
    assert found["share"] == activity.share and found["layers"][1]["frequency"] == activity.layers[1].frequency.tolist()
    console = Console(width=120, record=True, file=open(tmp_path / "out", "w"))  # noqa: SIM115
    console.print(activity.table())
    text = console.export_text()
    assert f"{activity.layers[0].share:.1%}" in text and "of dense if the down projections skip" in text
    bars, *lines = activity.figure().data
    assert list(bars.y) == [100 * layer.share for layer in activity.layers]
    assert list(lines[0].y) == sorted((100 * activity.layers[0].frequency).tolist(), reverse=True)


def test_a_curve_over_models_folders_and_checkpoints(tmp_path: Any) -> None:
    model, batches = tiny_model("gpt2", activation_function="relu"), tiny_batches("gpt2")
    save(model, tmp_path / "first")
    start = neuron_activity(model, batches, progress=False).share
    train(model, batches, validation=[dict(batches[0])], steps=5, learning_rate=1e-2, keep="last", progress=False)
    save(model, tmp_path / "second")
    end = neuron_activity(model, batches, progress=False).share
    assert start != end
    folders = [tmp_path / "first", tmp_path / "second"]
    checkpoints = [Checkpoint(10 * i, 0, None, 0.0, folder) for i, folder in enumerate(folders, 1)]
    for models, labels in (
        (folders, [0, 1]),
        (checkpoints, [10, 20]),
        ({"start": folders[0], "end": model}, ["start", "end"]),
    ):
        curve = activity_curve(models, batches, progress=False)
        assert [(label, activity.share) for label, activity in curve.points.items()] == list(
            zip(labels, (start, end), strict=True)
        )
    assert [point["label"] for point in json.loads(json.dumps(curve.to_dict()))["points"]] == ["start", "end"]
    assert curve.table().row_count == 2
    first = curve.figure().data[0]
    assert list(first.y) == [100 * activity.layers[0].share for activity in curve.points.values()]
