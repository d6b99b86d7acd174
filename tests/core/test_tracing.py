"""The traced anatomy of modules that no row describes."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DistilBertConfig, DistilBertModel, XGLMConfig, XGLMForCausalLM

from actkit.core.ground.errors import CoverageError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.selections import Threshold
from actkit.core.model.anatomy import Chain, Site, anatomy, equalization_sets, read_tap
from actkit.core.model.tracing import trace


def chains(model: nn.Module, example: object) -> set[tuple[str, str, str]]:
    def path(end: object) -> str:
        return end if isinstance(end, str) else end.path

    return {(path(c.first), c.nonlinearity, path(c.second)) for c in anatomy(model, example).blocks[0].chains}


def test_sequential() -> None:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)
    )
    assert chains(model, torch.randn(3, 4)) == {("0", "2", "4"), ("4", "5", "6")}


class Net(nn.Module):
    """Convolutions, a residual sum, pooling and every way to write a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(64, 10)
        self.fc2 = nn.Linear(10, 10)
        self.fc3 = nn.Linear(10, 2)
        self.fc4 = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images)))
        x = torch.relu(x + self.conv(x))
        x = self.pool(x).flatten(1)
        x = self.fc1(x).relu()
        x = self.fc2(F.dropout(x, 0.5, self.training)).relu_()
        x = self.fc3(x).clamp(min=0)
        return torch.softmax(self.fc4(x), -1)


def test_functions_methods_and_convolutions() -> None:
    model = Net()
    assert chains(model, torch.randn(2, 3, 8, 8)) == {
        ("stem", "relu", "conv"),
        ("conv", "relu", "fc1"),  # what reached the sum around conv had passed a ReLU before
        ("fc1", "relu", "fc2"),
        ("fc2", "relu", "fc3"),
        ("fc3", "clamp", "fc4"),
    }
    view = anatomy(model, {"images": torch.randn(2, 3, 8, 8)})
    block = view.blocks[0]
    assert (view.architecture, len(view.blocks), block.path, block.module) == ("traced", 1, "", model)
    assert [linear.path for linear in block.linears()] == ["fc1", "fc2", "fc3", "fc4"]
    assert {linear.role for linear in block.linears()} == {"layer"}
    ends = next(chain for chain in block.chains if chain.nonlinearity == "clamp")
    assert ends == Chain(block.linears()[2], "clamp", block.linears()[3])
    assert equalization_sets(block) == ()
    rows = {row.parameter: (row.where, row.reason) for row in view.coverage().rows}
    assert rows["stem.weight"] == ("convolution", None)
    assert rows["norm.bias"] == ("norm", None)
    assert (rows["fc1.weight"], rows["fc1.bias"]) == (("linear", None), ("bias", None))
    assert list(rows) == [name for name, _ in model.named_parameters()]
    linears = 640 + 100 + 20 + 4 + sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    assert view.coverage().share == pytest.approx(linears / sum(p.numel() for p in model.parameters()))
    assert view.tap(Site("layer.output", path="conv")).layout == "channels_first"
    assert view.tap(Site("layer.input", path="fc1")).layout == "flat"
    assert {str(site) for site in view.sites()} == {
        f"layer.{where}:{path}"
        for where in ("input", "output")
        for path in ("stem", "conv", "fc1", "fc2", "fc3", "fc4")
    }


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.detach().abs()


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return OwnFunction.apply(x)


@pytest.mark.parametrize("activation", [Swish(), Opaque(), nn.PReLU(), nn.Hardswish(), nn.Softplus()])
def test_an_activation_class_is_one_nonlinearity(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 4))
    assert chains(model, torch.randn(2, 4)) == {("0", "1", "2")}


class Squared(nn.Module):
    """A bump made of products and sums alone: only its class says that it is an activation."""

    mixes: ClassVar[tuple[str, ...]] = ()

    def forward(self, x: Tensor) -> Tensor:
        return x * x + x


class Plain(nn.Module):
    """The same, of which its class says nothing."""

    forward = Squared.forward


def test_a_class_that_says_what_it_mixes_is_a_nonlinearity_whatever_it_calls() -> None:
    for inner, chains in ((Squared(), (("0", "1", "2"),)), (Plain(), ())):
        assert trace(nn.Sequential(nn.Linear(3, 4), inner, nn.Linear(4, 2)), torch.ones(2, 3)).chains == chains
    inside = nn.Sequential(nn.Linear(3, 4), Holder(), nn.Linear(4, 2))
    assert trace(inside, torch.ones(2, 3)).chains == (("0", "1", "2"),)


class Holder(nn.Module):
    """An activation module of one's own that uses another and a function."""

    mixes: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.inner = Squared()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()


def test_one_module_called_twice_is_two_nonlinearities() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.a(x))
            return self.a(self.act(x + self.b(x)))

    assert chains(Shared(), torch.randn(2, 4)) == {("a", "act", "b"), ("b", "act", "a")}


def test_softmax_ends_a_chain() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Softmax(-1), nn.Linear(4, 4))
    assert chains(model, torch.randn(2, 4)) == set()


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 4)
        self.late = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(F.silu(self.gate(x)) * self.up(x))
        x = x.reshape(x.shape)  # the same values, another tensor object
        return self.late(x) + self.late(h)


def test_layers_that_read_one_tensor_share_an_input() -> None:
    model = Gated()
    view = anatomy(model, torch.randn(2, 5, 4))
    groups = {str(g.site): [x.path for x in g.linears] for g in view.blocks[0].linear_inputs()}
    # `late` is called on x too, but a second time on h: it does not share one and the same tensor
    assert groups == {"layer.input:gate": ["gate", "up"], "layer.input:down": ["down"], "layer.input:late": ["late"]}
    assert view.canonical(Site("layer.input", path="up")) == Site("layer.input", path="gate")
    assert view.tap(Site("layer.input", path="up")).layout == "tokens"
    assert chains(model, torch.randn(2, 5, 4)) == {("gate", "silu", "down")}


def test_taps_read_the_layers() -> None:
    model, x = Gated().eval(), torch.randn(2, 5, 4)
    view = anatomy(model, x)
    tap = view.tap(Site("layer.input", path="down"))
    found = []
    model.down.register_forward_hook(lambda m, a, k, o: found.append(read_tap(tap, a, k, o)), with_kwargs=True)
    model(x)
    assert torch.equal(found[0], F.silu(model.gate(x)) * model.up(x))


def test_an_in_place_write_between_two_readers_separates_them() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            x += 1
            return y + self.second(x)

    assert len(anatomy(Writes(), torch.randn(2, 4)).blocks[0].linear_inputs()) == 2


def test_after_edits_the_block_is_read_again() -> None:
    model = Gated()
    view = anatomy(model, torch.randn(2, 4))
    model.down = ActLinear.of(model.down, select=Threshold(0.1))
    assert isinstance(view.block(0).linears()[2].module, ActLinear)
    assert view.coverage().share == pytest.approx(112 / 136)
    again = anatomy(model, torch.randn(2, 4))
    assert [x.path for x in again.blocks[0].linears()] == ["gate", "up", "down", "late"]


def test_tied_and_uncalled_layers_are_named() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out, self.unused = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.Linear(2, 2)
            self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            return self.out(self.mix(x, x, x)[0])

    view = anatomy(Tied(), torch.tensor([[1, 2, 3]]))
    assert view.blocks[0].linears() == ()
    reasons = {row.parameter: row.reason for row in view.coverage().rows}
    assert reasons["table.weight"] == "embedding: a table, not a linear layer"
    assert "out.weight" not in reasons
    assert reasons["unused.weight"] == "linear layer that the example never called as a layer"
    assert reasons["mix.out_proj.weight"] == "linear layer that the example never called as a layer"
    assert reasons["mix.in_proj_weight"] == "in_proj_weight of a MultiheadAttention: not a linear layer"
    assert view.coverage().share == 0


def test_unknown_transformers_models_are_traced_on_their_dummy_inputs() -> None:
    config = XGLMConfig(vocab_size=50, d_model=16, ffn_dim=32, num_layers=2, attention_heads=2)
    model = XGLMForCausalLM(config)
    view = anatomy(model)
    assert view.architecture == "traced"
    layer = "model.layers.0"
    found = {str(g.site): [x.path.rpartition(".")[2] for x in g.linears] for g in view.blocks[0].linear_inputs()}
    assert found[f"layer.input:{layer}.self_attn.q_proj"] == ["q_proj", "k_proj", "v_proj"]
    assert (f"{layer}.fc1", f"{layer}.activation_fn", f"{layer}.fc2") in chains(model, None)
    rows = {row.parameter: row for row in view.coverage().rows}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    assert rows["model.embed_tokens.weight"].where == "stem"
    assert not any("lm_head" in linear.path for linear in view.blocks[0].linears())


def test_distilbert_is_traced_too() -> None:
    model = DistilBertModel(
        DistilBertConfig(vocab_size=50, dim=16, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=8)
    )
    view = anatomy(model, {"input_ids": torch.tensor([[1, 2, 3]])})
    assert (
        "transformer.layer.0.ffn.lin1",
        "transformer.layer.0.ffn.activation",
        "transformer.layer.0.ffn.lin2",
    ) in chains(model, {"input_ids": torch.tensor([[1, 2, 3]])})
    assert view.coverage().share > 0.7


def test_without_an_example_the_error_says_what_to_do() -> None:
    with pytest.raises(CoverageError, match="pass example="):
        anatomy(nn.Sequential(nn.Linear(2, 2)))


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = Net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    anatomy(model, torch.randn(2, 3, 8, 8))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError):
        anatomy(model, torch.randn(2, 5, 8, 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
