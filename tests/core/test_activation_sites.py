"""Sites at any activation: what is read and written there is what plain forward hooks of torch see and change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import HIDDEN, INNER, batches, build
from torch import Tensor, nn

import actkit
from actkit.core.edit.edits import Replace, temporarily
from actkit.core.forward.batch import first_tensor, forward
from actkit.core.layers.activations import Thresholded
from actkit.core.model.anatomy import anatomy
from actkit.core.watch.capture import live, opened_experts, record
from actkit.core.watch.intervene import intervene
from actkit.core.watch.statistics import AbsMax, Moments, Sample
from actkit.search.profile import profile
from actkit.testing import tiny_batches, tiny_model

FAMILIES = ("llama", "gpt2", "bert", "vit", "mixtral", "phi3", "falcon", "opt", "deepseek_v3", "lfm2")


def by_hooks(model: nn.Module, given: list[Any], paths: tuple[str, ...]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """path -> (input, output) of each call of that module, by torch's own hooks."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in paths}
    entered: dict[str, Tensor] = {}
    handles = []
    for path in paths:
        module = model.get_submodule(path)
        keep = lambda m, a, path=path: entered.update({path: a[0].clone()})  # noqa: E731
        handles.append(module.register_forward_pre_hook(keep))
        after = lambda m, a, y, path=path: found[path].append((entered[path], y.clone()))  # noqa: E731
        handles.append(module.register_forward_hook(after))
    with torch.no_grad():
        for batch in given:
            forward(model, batch)
    for handle in handles:
        handle.remove()
    return found


def test_activations_of_the_embedded_cnn_have_the_channels_of_its_convolutions() -> None:
    model, x = actkit.load("cnn").float(), torch.rand(4, 1, 8, 8)
    paths = anatomy(model, x).activations()
    assert paths == ("act1", "act2", "act3")
    hooked = by_hooks(model, [x], paths)
    wanted = {f"activation.{side}:{path}": Sample(10**4) for side in ("input", "output") for path in paths}
    seen = record(model, wanted, [x], progress=False)
    for path in paths:
        for side, tensor in zip(("input", "output"), hooked[path][0], strict=True):
            rows = tensor.movedim(1, -1).flatten(0, -2)  # [batch, channels, ...]: one row per position
            assert torch.equal(seen[f"activation.{side}:{path}"].rows.float(), rows)
    assert len(seen["activation.output:act1"].rows[0]) == model.conv1.out_channels == 16


@pytest.mark.parametrize("kind", FAMILIES)
def test_in_every_family_the_rows_are_those_of_the_real_tokens(kind: str) -> None:
    model, given = tiny_model(kind), tiny_batches(kind)
    view = anatomy(model, given[0])
    with opened_experts(view):
        paths = view.activations()
        hooked = by_hooks(model, given, paths)
        expected: dict[str, list[Tensor]] = {}
        for path in paths:
            if ".experts." in path:  # which tokens it was sent is no part of its call
                continue
            for (x, y), batch in zip(hooked[path], given, strict=True):
                mask = batch.get("attention_mask")
                mask = None if mask is None or (len(x) == len(mask) and x.dim() == 2) else mask.bool().flatten()
                for side, tensor in (("input", x), ("output", y)):
                    rows = tensor.reshape(-1, tensor.shape[-1])
                    expected.setdefault(f"activation.{side}:{path}", []).append(rows if mask is None else rows[mask])
    if kind == "lfm2":  # its MLP calls its nonlinearity as a function
        assert not paths
        return
    seen = record(model, {site: Moments() for site in expected}, given, progress=False)
    for site, parts in expected.items():
        rows = torch.cat(parts).double()
        assert seen[site].count == len(rows), site
        torch.testing.assert_close(seen[site].mean, rows.mean(0).to(seen[site].mean.dtype), rtol=1e-5, atol=1e-6)


def test_experts_are_opened_and_padding_is_left_out() -> None:
    model, given = build("mixtral"), batches("mixtral")
    path = "model.layers.0.mlp.experts"
    seen = record(model, {f"activation.output:{path}.*": AbsMax(), "mlp.gate": AbsMax()}, given, progress=False)
    for e in range(4):
        one, other = seen[f"activation.output:{path}.{e}.activation"], seen[f"blocks.0.experts.{e}.mlp.gate"]
        assert one.count == other.count and torch.equal(one.value, other.value)
    assert not [path for path in anatomy(model).activations() if ".experts." in path]


def test_one_tensor_by_two_names_is_summarised_once() -> None:
    model = build("llama")
    seen = record(
        model,
        {"activation.output:model.layers.1.mlp.act_fn": AbsMax(), "blocks.1.mlp.gate": AbsMax()},
        batches("llama"),
        progress=False,
    )
    assert seen["activation.output:model.layers.1.mlp.act_fn"] is seen["blocks.1.mlp.gate"]


class Images(nn.Module):
    """An activation in place, one of a class of its own, and one that is called on tensors of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.over = nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True)
        self.second, self.own = nn.Conv2d(6, 8, 1), Swish()
        self.both, self.third, self.last = nn.Tanh(), nn.Conv2d(8, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.both(self.third(self.own(self.second(self.over(self.first(x))))))
        return self.both(self.last(x.mean((-1, -2))))


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def test_an_activation_in_place_is_read_before_it() -> None:
    model, x = Images().eval(), torch.randn(3, 1, 7, 7)
    (before, after) = by_hooks(model, [x], ("over",))["over"][0]
    assert float(before.min()) < 0
    with live(model, ["activation.input:over", "activation.output:over"], anatomy(model, x)) as found:
        model(x)
    assert torch.equal(found["activation.input:over"][0], before)
    assert torch.equal(found["activation.output:over"][0], after)
    seen = record(model, {"activation.input:over": AbsMax()}, [x], progress=False)
    assert torch.equal(seen["activation.input:over"].value, before.abs().amax((0, 2, 3)))


def test_a_class_of_ones_own_counts_if_the_pass_finds_it_between_layers() -> None:
    model, x = Images().eval(), torch.randn(3, 1, 7, 7)
    view = anatomy(model, x)
    assert set(view.activations()) == {"over", "own", "both"}
    seen = record(model, {"activation.output:own": AbsMax()}, [x], progress=False)
    assert len(seen["activation.output:own"].value) == 8
    with pytest.raises(ValueError, match=r"the output of both is a tensor of 4 dimensions, and .* changes from call"):
        record(model, {"activation.output:both": AbsMax()}, [x], progress=False)


def test_a_learned_or_thresholded_activation_is_one_too() -> None:
    model = build("llama")
    path = "model.layers.0.mlp.act_fn"
    with temporarily(model, [Replace(path, Thresholded(model.get_submodule(path), 0.5))]):
        ((x, y),) = by_hooks(model, batches("llama")[:1], (path,))[path]
        seen = record(
            model,
            {f"activation.{side}:{path}": Sample(100) for side in ("input", "output")},
            batches("llama")[:1],
            progress=False,
        )
    assert torch.equal(seen[f"activation.input:{path}"].rows.float(), x.flatten(0, 1))
    assert torch.equal(seen[f"activation.output:{path}"].rows.float(), y.flatten(0, 1))


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("path", ["act1", "act2", "act3"])
def test_what_is_written_at_an_activation_is_what_a_hook_writes(side: str, path: str) -> None:
    model, x = actkit.load("cnn").float(), torch.rand(4, 1, 8, 8)
    module = model.get_submodule(path)
    with intervene(model, {f"activation.{side}:{path}": lambda t, at: 0.5 * t + 0.1}, anatomy=anatomy(model, x)):
        found = model(x)
    if side == "input":
        handle: Any = module.register_forward_pre_hook(lambda m, a: (0.5 * a[0] + 0.1,))
    else:
        handle = module.register_forward_hook(lambda m, a, y: 0.5 * y + 0.1)
    expected = model(x)
    handle.remove()
    assert torch.equal(found, expected) and not torch.equal(found, model(x))


def test_gradients_reach_an_activation_of_a_language_model() -> None:
    model, site = build("gpt2"), "activation.output:transformer.h.1.mlp.act"
    with live(model, site) as found:
        first_tensor(forward(model, batches("gpt2")[0])).square().sum().backward(retain_graph=True)
        (value,) = found[site]
        (gradient,) = torch.autograd.grad(value.square().mean(), model.transformer.h[1].mlp.c_fc.weight)
    assert value.shape[-1] == INNER and gradient.shape == (HIDDEN, INNER) and bool(gradient.any())


def test_a_profile_shows_the_sites_that_were_asked_for() -> None:
    model, x = actkit.load("cnn").float(), torch.rand(8, 1, 8, 8)
    plain = profile(model, [x], progress=False)
    found = profile(model, [x], sites=["activation.output", "layer.input:conv1"], progress=False)
    added = [row for row in found.sites if row.site not in {row.site for row in plain.sites}]
    assert [row.site for row in added] == [f"activation.output:act{i}" for i in (1, 2, 3)]
    hooked = by_hooks(model, [x], ("act1",))["act1"][0][1]
    assert (added[0].channels, added[0].rows) == (16, 8 * 64)
    assert added[0].density == pytest.approx(float((hooked != 0).float().mean()))
    assert added[0].largest == pytest.approx(float(hooked.abs().max()))


def test_what_is_no_activation_is_an_error_that_lists_those_there_are() -> None:
    model, x = actkit.load("cnn").float(), torch.rand(4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"names a Conv2d, which is no activation; .* are act1, act2, act3"):
        record(model, {"activation.output:conv1": AbsMax()}, [x], progress=False)
    with pytest.raises(ValueError, match="this model are none"):
        record(build("mlp"), {"activation.input:up": AbsMax()}, batches("mlp"), progress=False)
    with pytest.raises(ValueError, match="stands for every activation"):
        record(build("mlp"), {"activation.input": AbsMax()}, batches("mlp"), progress=False)
    with pytest.raises(ValueError, match="is named by its module path"):
        record(model, {"blocks.0.activation.input": AbsMax()}, [x], progress=False)
