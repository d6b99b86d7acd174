"""Which dimension holds the channels: against the tensors of real passes, and networks that move it around."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build
from torch import Tensor, nn
from torch.nn import functional as F

import actkit
from actkit.core.model.anatomy import Site, anatomy
from actkit.core.watch.capture import live, record
from actkit.core.watch.statistics import AbsMax, Sample


def widths(model: nn.Module, x: Tensor, *paths: str) -> list[int]:
    """How many channels the statistic of each module's output has."""
    sites = [f"layer.output:{path}" for path in paths]
    seen = record(model, {site: AbsMax() for site in sites}, [x], progress=False)
    return [len(seen[site].value) for site in sites]


def test_the_activations_of_the_embedded_cnn_have_its_channels() -> None:
    model, x = actkit.load("cnn").float(), torch.rand(4, 1, 8, 8)
    first, second = model.conv1.out_channels, model.conv2.out_channels
    assert widths(model, x, "act1", "act2", "flatten", "act3") == [first, second, second * 16, model.fc1.out_features]
    seen = record(model, {"layer.output:act1": Sample(10**4), "layer.input:flatten": AbsMax()}, [x], progress=False)
    with torch.no_grad():
        hidden = torch.relu(model.conv1(x))
        expected = torch.stack([hidden[b, :, i, j] for b in range(4) for i in range(8) for j in range(8)])
        deeper = torch.relu(model.conv2(hidden)).amax((0, 2, 3))
    assert torch.equal(seen["layer.output:act1"].rows.float(), expected)
    assert torch.equal(seen["layer.input:flatten"].value.float(), deeper)


class Mixed(nn.Module):
    """Each named module sees a tensor [4, ...]; those in `last` have its 6 channels last, those in `first` second."""

    last = ("permuted", "normed", "sliced", "tokens", "patches", "added", "opaque", "merged")
    first = ("conv_act", "pooled", "batch_normed", "padded", "rows", "cut", "plane", "one_by_one")

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch_normed = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.pooled, self.linear, self.normed = nn.MaxPool2d(2), nn.Linear(6, 6), nn.LayerNorm(6)
        self.conv1d = nn.Conv1d(6, 6, 1)
        for name in (*self.last, *self.first):
            if not hasattr(self, name):
                setattr(self, name, nn.ReLU() if name != "opaque" else Opaque())

    def forward(self, x: Tensor) -> Tensor:
        x = self.pooled(self.batch_normed(self.conv_act(self.conv(x))))  # [4, 6, 6, 6]
        x = self.padded(F.pad(x, (1, 0, 1, 0)))
        self.rows(x.flatten(2))
        self.cut(x[:, :, :3])
        self.plane(x.mean(-1, keepdim=True) + x)
        self.one_by_one(self.conv1d(x.reshape(4, 6, -1)))
        y = self.normed(self.permuted(x.permute(0, 2, 3, 1)))
        self.sliced(y[:, 1:])
        self.tokens(self.linear(y))
        z = self.patches(x.flatten(2).transpose(-1, 1))
        self.added(z + torch.zeros(6))
        self.opaque(z)
        return self.merged(y.reshape(4, -1, 6)).sum()


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)


def test_layouts_of_a_network_that_moves_its_channels_around() -> None:
    """All spatial sizes are 6 or more too, so that only what happened can tell, not the sizes."""
    view = anatomy(Mixed().eval(), torch.randn(4, 3, 14, 14))
    layouts = {name: view.tap(Site("layer.output", path=name)).layout for name in (*Mixed.last, *Mixed.first)}
    assert layouts == dict.fromkeys(Mixed.last, "tokens") | dict.fromkeys(Mixed.first, "channels_first")


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw, self.conv, self.split, self.product = nn.ReLU(), nn.Conv2d(3, 6, 1), nn.ReLU(), nn.ReLU()
        self.flipped, self.twice, self.linear = nn.ReLU(), nn.ReLU(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.raw(x))
        self.split(x.reshape(2, 2, 3, 6, 6))
        self.product(x @ x)
        self.flipped(x.mT)
        return self.twice(self.linear(self.twice(x))).sum()


@pytest.mark.parametrize("path", ["raw", "split", "product", "flipped", "twice"])
def test_what_is_not_known_is_an_error_before_any_statistic(path: str) -> None:
    model, x = Unknown(), torch.randn(2, 3, 6, 6)
    message = rf"the output of {path} is a tensor of [45] dimensions, and which of them holds the channels is not known"
    with pytest.raises(ValueError, match=message):
        record(model, {f"layer.output:{path}": AbsMax()}, [x], progress=False)
    with pytest.raises(ValueError, match=message), live(model, f"layer.output:{path}", anatomy(model, x)):
        pass
    assert widths(model, x, "conv", "linear") == [6, 6]


def test_modules_of_known_families_are_read_as_hidden_states() -> None:
    model, ids = build("llama"), torch.arange(12).reshape(2, 6)
    seen = record(model, {"layer.output:model.layers.0.mlp": Sample(20)}, [{"input_ids": ids}], progress=False)
    found = []
    with torch.no_grad(), model.model.layers[0].mlp.register_forward_hook(lambda m, a, out: found.append(out)):
        model(ids)
    assert torch.equal(seen["layer.output:model.layers.0.mlp"].rows.float(), found[0].flatten(0, 1))
    vit = build("vit")
    images = {"pixel_values": torch.randn(3, 3, 8, 8)}
    with pytest.raises(ValueError, match=r"the input of vit\.embeddings is a tensor of 4 dimensions"):
        record(vit, {"layer.input:vit.embeddings": AbsMax()}, [images], progress=False)
