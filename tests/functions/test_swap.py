"""Swapped activation functions: which ones, undone, saved and loaded; against models built with the other function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.activations import ACT2FN

from actkit.core.edit import changes
from actkit.core.ground import registry
from actkit.core.ground.errors import EditError, ExportError, RecipeError
from actkit.core.layers.activations import (
    Activation,
    Thresholded,
    activation_function,
    function_names,
    is_activation,
    name_of,
)
from actkit.core.layers.folding import ScaledActivation
from actkit.core.layers.hidden_act import enter
from actkit.core.layers.keeps_dtype import KeepsDtype, at_least_float32
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.core.store.opening import open_pending
from actkit.formats.plain import Plain
from actkit.functions.swap import Swap, swap
from actkit.quantization.rtn import RoundToNearest
from actkit.sparsity.prosparse.fatrelu import ShiftedRelu
from actkit.sparsity.teal import Teal
from actkit.testing import tiny_batches, tiny_model

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IDS = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))


def llama(act: str = "silu") -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, hidden_act=act, initializer_range=0.3)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output = model(IDS)
    return output.logits if hasattr(output, "logits") else output[0]


class Net(nn.Module):
    """A user's own model: one activation under two names, one inside a Sequential, one of her own class."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.first = self.again = nn.ReLU()
        self.tail = nn.Sequential(nn.GELU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.layers[1](self.first(self.layers[0](x))))
        return self.tail(self.layers[2](x))


# -- the functions -----------------------------------------------------------------------------------------------------


CLOSED: dict[str, Callable[[Tensor], Tensor]] = {
    "celu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "hardshrink": lambda x: x * (x.abs() > 0.5),
    "hardsigmoid": lambda x: (x + 3).clamp(0, 6) / 6,
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "hardtanh": lambda x: x.clamp(-1, 1),
    "identity": lambda x: x,
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "log_sigmoid": lambda x: -torch.log1p((-x).exp()),
    "mish": lambda x: x * torch.tanh(torch.log1p(x.exp())),
    "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "relu6": lambda x: x.clamp(0, 6),
    "selu": lambda x: 1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * (x.exp() - 1)),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "silu": lambda x: x / (1 + (-x).exp()),
    "softplus": lambda x: torch.log1p(x.exp()),
    "softshrink": lambda x: x.sign() * (x.abs() - 0.5).clamp(min=0),
    "softsign": lambda x: x / (1 + x.abs()),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "tanhshrink": lambda x: x - (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
}


@pytest.mark.parametrize("name", [name for name in function_names() if activation_function(name).elementwise])
def test_functions_are_those_of_torch_and_transformers(name: str) -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    module = Activation(name)
    assert torch.allclose(module(x), CLOSED[name](x), rtol=1e-9, atol=1e-12)
    assert name_of(module) == name and is_activation(module)
    rebuilt = Activation.from_spec(module.spec())
    assert torch.equal(rebuilt(x), module(x)) and name in repr(module)
    config_name = activation_function(name).config_name
    if config_name is not None:
        theirs = ACT2FN[config_name]
        assert torch.allclose(theirs(x.float()), module(x.float()), rtol=1e-5, atol=1e-6)
        assert name_of(theirs) == name


def test_names_hold_only_at_the_settings_of_the_table() -> None:
    assert name_of(nn.GELU()) == "gelu" and name_of(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert name_of(nn.LeakyReLU()) == "leaky_relu" and name_of(nn.LeakyReLU(0.2)) is None
    assert name_of(nn.ELU(2.0)) is None and name_of(nn.Softplus(2)) is None
    assert name_of(nn.Linear(1, 1)) is None and not is_activation(nn.Linear(1, 1)) and not is_activation(nn.Identity())
    assert is_activation(nn.PReLU()) and name_of(nn.PReLU()) is None
    with pytest.raises(ValueError, match="allowed are"):
        Activation("swoosh")


# -- what is replaced --------------------------------------------------------------------------------------------------


def test_all_of_a_transformers_model_and_its_config(tmp_path: Path) -> None:
    """The swapped model equals one that transformers builds with that function; saved, loaded, undone bit for bit."""
    model, before = llama(), logits(llama())
    reference = llama("relu")
    applied = swap(model, "silu", "relu")
    assert torch.allclose(logits(model), logits(reference), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    assert model.config.hidden_act == "relu" and applied.edits[-1]["configure"] == "hidden_act"
    checkpoint.save(model, tmp_path / "changed")
    loaded = checkpoint.load(tmp_path / "changed")
    assert torch.equal(logits(loaded), logits(model)) and loaded.config.hidden_act == "relu"
    assert isinstance(loaded.model.layers[1].mlp.act_fn, Activation)
    applied.undo()
    assert torch.equal(logits(model), before) and model.config.hidden_act == "silu"
    assert type(model) is LlamaForCausalLM and changes.of(model) is None


def test_undo_from_the_source(tmp_path: Path) -> None:
    checkpoint.save(llama(), tmp_path / "plain")
    model = checkpoint.load(tmp_path / "plain")
    before = logits(model)
    applied = swap(model, "silu", "gelu", undo="source")
    applied.undo()
    assert torch.equal(logits(model), before) and model.config.hidden_act == "silu"


def test_part_of_a_model_leaves_the_config_alone() -> None:
    model = llama()
    applied = swap(model, "model.layers.0.*", "relu2")
    assert isinstance(model.model.layers[0].mlp.act_fn, Activation)
    assert not isinstance(model.model.layers[1].mlp.act_fn, Activation)
    assert model.config.hidden_act == "silu"
    assert any("hidden_act" in note and "1 activations still are" in note for note in applied.report.notes)
    swap(model, "silu", "relu2")  # the rest: now the config can follow, as nothing is silu any more
    assert model.config.hidden_act == "relu2"


def test_a_function_that_transformers_does_not_have(tmp_path: Path) -> None:
    """The config has our name for it, which transformers is told; both load a model that was built by it."""
    model, before = llama(), logits(llama())
    applied = swap(model, "silu", "softplus")
    assert model.config.hidden_act == "softplus" and isinstance(ACT2FN["softplus"], Activation)
    built = llama("softplus")
    assert torch.allclose(logits(built), logits(model), rtol=1e-6, atol=1e-6)
    with pytest.raises(ExportError, match="'softplus', which no reader without actkit computes"):
        Plain.of(built)
    for name, each in (("changed", model), ("built", built)):
        checkpoint.save(each, tmp_path / name)
        del ACT2FN["softplus"]  # as in a fresh process
        assert torch.equal(logits(checkpoint.load(tmp_path / name)), logits(each))
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "built")), logits(built))
    assert torch.equal(logits(applied.undo()), before) and model.config.hidden_act == "silu"


def test_settings_that_no_name_says_leave_the_config_alone() -> None:
    model = llama()
    applied = swap(model, "silu", lambda: ShiftedRelu(0.5))
    assert model.config.hidden_act == "silu" and any("no name says" in note for note in applied.report.notes)
    with pytest.raises(ValueError, match="not made without settings"):
        enter("act_linear")
    with pytest.raises(RecipeError, match="not known"):
        enter("swoosh")


def gpt2(act: str) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, activation_function=act))


def bert(act: str) -> nn.Module:
    return BertForMaskedLM(BertConfig(**SMALL, hidden_act=act, initializer_range=0.3))


def mixtral(act: str) -> nn.Module:
    settings = {"num_key_value_heads": 1, "num_local_experts": 2, "initializer_range": 0.3, "hidden_act": act}
    return MixtralForCausalLM(MixtralConfig(**SMALL, **settings))


@pytest.mark.parametrize(
    ("build", "old", "key"),
    [(gpt2, "gelu_new", "activation_function"), (bert, "gelu", "hidden_act"), (mixtral, "silu", "hidden_act")],
)
def test_other_architectures(build: Any, old: str, key: str, tmp_path: Path) -> None:
    """BERT's head has one of its own outside the blocks; Mixtral's experts are 3-D parameters around one module."""
    torch.manual_seed(0)
    model = build(old).eval()
    torch.manual_seed(0)
    reference = build("relu").eval()
    before = logits(model)
    applied = swap(model, old, "relu")
    assert torch.allclose(logits(model), logits(reference), rtol=1e-5, atol=1e-5)
    assert getattr(model.config, key) == "relu" and not torch.allclose(logits(model), before, atol=1e-4)
    checkpoint.save(model, tmp_path / "changed")
    assert torch.equal(logits(checkpoint.load(tmp_path / "changed")), logits(model))
    applied.undo()
    assert torch.equal(logits(model), before)


def test_tanh_of_the_pooler_is_not_the_config() -> None:
    model = BertModel(BertConfig(**SMALL)).eval()
    swap(model, "tanh", "identity")
    assert model.config.hidden_act == "gelu" and isinstance(model.pooler.activation, Activation)


def test_any_module_without_data(tmp_path: Path) -> None:
    """By class; an activation that stands at two paths gets one successor, and the folder loads."""
    model, x = Net(), torch.randn(5, 4)
    with torch.no_grad():
        before = model(x)
        hidden = F.silu(model.layers[1](F.silu(model.layers[0](x))))
        expected = model.tail(model.layers[2](hidden))
    applied = swap(model, nn.ReLU, "silu")
    assert model.first is model.again and isinstance(model.first, Activation) and isinstance(model.tail[0], nn.GELU)
    assert torch.equal(model(x), expected)
    checkpoint.save(model, tmp_path / "net")
    assert torch.equal(checkpoint.load(tmp_path / "net", base=Net)(x), expected)
    assert torch.equal(applied.undo()(x), before) and model.first is model.again


def test_copies_and_factories(tmp_path: Path) -> None:
    model, x = Net(), torch.randn(5, 4)
    made: list[nn.Module] = []

    def factory() -> nn.Module:
        made.append(ScaledActivation(Activation("relu"), torch.tensor([1.0, 2.0, 4.0, 8.0])))
        return made[-1]

    copy = swap(model, ["relu", "gelu"], factory, inplace=False).model
    assert isinstance(model.first, nn.ReLU) and isinstance(copy.first, ScaledActivation)
    assert copy.first is copy.again and copy.first is not copy.tail[0]
    with torch.no_grad():
        scale = torch.tensor([1.0, 2.0, 4.0, 8.0])
        hidden = model.layers[0](x).relu() / scale
        hidden = model.layers[2](model.layers[1](hidden).relu() / scale).relu() / scale
        assert torch.equal(copy(x), model.tail[1](hidden))


# -- as a transform ----------------------------------------------------------------------------------------------------


def test_in_recipes() -> None:
    recipe = Recipe.parse(
        {
            "actkit": 1,
            "transforms": [{"swap": {"where": "silu", "new": "relu"}}, {"rtn": {"bits": 8, "group_size": -1}}],
        }
    )
    assert recipe.transforms[0] == Swap(where=("silu",), new="relu")
    assert Recipe.parse(recipe.dump()).transforms == recipe.transforms
    model = llama()
    applied = apply(model, recipe, progress=False)
    assert {method for _, method in applied.report.changed} == {"Swap", "RoundToNearest"}
    assert [next(iter(entry)) for entry in changes.of(model).recipe] == ["swap", "rtn"]  # type: ignore[union-attr]
    applied.undo()
    for settings, message in (
        ({"where": (), "new": "relu"}, "where"),
        ({"where": "silu", "new": "swoosh"}, "swoosh"),
        ({"where": "silu", "new": {"module": "activation"}}, "spec"),
        ({"where": "silu", "new": {"module": "nowhere", "spec": {}}}, "nowhere"),
        ({"where": "silu"}, "new"),
    ):
        with pytest.raises(RecipeError, match=message):
            Recipe.parse({"actkit": 1, "transforms": [{"swap": settings}]})


def test_a_module_by_its_registered_name() -> None:
    model = llama()
    apply(model, Swap(where=("silu",), new={"module": "activation", "spec": {"name": "mish"}}), progress=False)
    assert torch.allclose(logits(model), logits(llama("mish")), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("build", [llama, mixtral])
def test_stacked_with_a_quantizer(build: Any, tmp_path: Path) -> None:
    """Also inside experts, which the quantizer opens: their activation then stands at other paths."""
    models = []
    for act in ("silu", "relu"):
        torch.manual_seed(0)
        models.append(build(act).eval())
    swapped, built = models
    rounding = RoundToNearest(bits=8, group_size=-1)
    apply(swapped, [Swap(where=("silu",), new="relu"), rounding], progress=False)
    apply(built, [rounding], progress=False)
    assert torch.allclose(logits(swapped), logits(built), rtol=1e-5, atol=1e-5)
    checkpoint.save(swapped, tmp_path / "changed")
    assert torch.equal(logits(checkpoint.load(tmp_path / "changed")), logits(swapped))


def test_thresholds_that_were_calibrated_before_are_refused() -> None:
    with pytest.raises(RecipeError, match="swap first"):
        Recipe([Teal(sparsity=0.3), Swap(where=("silu",), new="relu")]).check()
    Recipe([Swap(where=("silu",), new="relu"), Teal(sparsity=0.3), Swap(where=("relu",), new="relu2")][:2]).check()


@pytest.mark.parametrize(
    ("where", "new", "error", "message"),
    [
        ("gelu", "relu", EditError, "activation modules of this model are silu"),
        ("silu", "swoosh", RecipeError, "swoosh"),
        (nn.PReLU, "relu", EditError, "no PReLU"),
        ("model.layers.0.mlp.up_proj", "relu", EditError, "no activation function"),
        ("lm_*", "relu", EditError, "matches no activation"),
        (["silu", "tanh"], "relu", EditError, "'tanh' matches"),
        ("silu", nn.ReLU, RecipeError, "not registered"),
        ("silu", Activation("relu"), TypeError, "a function that makes"),
        ("silu", lambda: 3, TypeError, "it made a int"),
        ([], "relu", RecipeError, "empty"),
    ],
)
def test_bad_input(where: Any, new: Any, error: type[Exception], message: str) -> None:
    model = llama()
    before = logits(model)
    with pytest.raises(error, match=message):
        swap(model, where, new)
    assert torch.equal(logits(model), before) and changes.of(model) is None


def test_a_shared_activation_with_parameters_is_replaced_at_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.PReLU(), nn.Linear(2, 2))
    model.append(model[1])
    with pytest.raises(EditError, match="tied"):  # one of its paths alone
        swap(model, "1", "relu")
    assert isinstance(model[1], nn.PReLU) and model[1] is model[3]
    applied = swap(model, nn.PReLU, "relu")
    assert name_of(model[1]) == "relu" and model[1] is model[3]
    applied.undo()
    assert isinstance(model[1], nn.PReLU) and model[1] is model[3]
    single = nn.Sequential(nn.Linear(2, 2), nn.PReLU())
    swap(single, "prelu", "leaky_relu")
    assert name_of(single[1]) == "leaky_relu"


class Learned(Activation):
    """f(x) + slope x with a learned slope."""

    def __init__(self) -> None:
        super().__init__("silu")
        self.slope = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.slope * x

    def spec(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> Learned:
        return cls()


class Mixed(nn.Module):
    """One GELU that is called twice, one that is called once, and modules that are no activation functions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.act, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.GELU(), nn.GELU()
        self.norm, self.drop, self.pool = nn.LayerNorm(4), nn.Dropout(0.1), nn.AvgPool1d(1)
        self.mine, self.my_norm = Mine(), MyNorm()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.down(self.act(self.up(x))))
        return self.my_norm(self.mine(self.last(self.pool(self.drop(self.norm(x))))))


class Mine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class MyNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm()


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(registry, "module_name", lambda cls: "learned" if cls is Learned else "activation")
    monkeypatch.setattr(registry, "module_class", lambda name: Learned if name == "learned" else Activation)
    return Learned


@pytest.mark.parametrize("data", [None, [torch.ones(3, 4)]])
def test_learned_parameters_that_places_share_are_noted(learned: Any, data: Any) -> None:
    model = Mixed()
    notes = apply(model, Swap.of(model, nn.GELU, learned), data, progress=False).report.notes
    assert model.act is not model.last
    assert [note for note in notes if note.startswith("act:") and "called 2 times" in note]
    assert not [note for note in notes if note.startswith("last:")]
    net = Net()
    notes = swap(net, nn.ReLU, learned).report.notes
    assert net.first is net.again
    assert [note for note in notes if "it stands at first, again" in note and "share its learned parameters" in note]
    assert swap(Mixed(), nn.GELU, "relu").report.notes == []
    unknown = Mixed()
    unknown.forward = lambda x, y: None  # type: ignore[assignment, method-assign]
    assert [note for note in swap(unknown, nn.GELU, learned).report.notes if "not known whether" in note]


class PerChannel(KeepsDtype):
    """f(x) = x + slope x^2 with a slope per channel, a matrix if there are two of each."""

    mixes: ClassVar[tuple[str, ...]] = ()
    keeps: ClassVar[tuple[str, ...]] = ("slope",)

    def __init__(self, channels: int, dim: int = -1, several: int = 1) -> None:
        super().__init__()
        self.channels, self.dim, self.several = channels, dim, several
        self.slope = nn.Parameter(torch.full((several, channels), 0.1, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x).movedim(self.dim, -1)
        return (wide + self.slope.sum(0) * wide**2).movedim(-1, self.dim).to(x.dtype)

    def spec(self) -> dict[str, Any]:
        return {"channels": self.channels, "dim": self.dim, "several": self.several}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> PerChannel:
        return cls(**spec)


class LearnedScalar(Learned, KeepsDtype):
    """The same, with a slope that keeps float32."""

    keeps: ClassVar[tuple[str, ...]] = ("slope",)

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.1, dtype=torch.float32))


CLASSES = {"learned": Learned, "learned_scalar": LearnedScalar, "per_channel": PerChannel}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes above, as a plug-in would have them."""
    known = registry.module_class, registry.module_name, registry.module_names()
    monkeypatch.setattr(registry, "module_names", lambda: [*known[2], *CLASSES])
    monkeypatch.setattr(registry, "module_class", lambda name: CLASSES.get(name) or known[0](name))
    names = {cls: name for name, cls in CLASSES.items()}
    monkeypatch.setattr(registry, "module_name", lambda cls: names.get(cls) or known[1](cls))


def conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 7), nn.ReLU()
    )


def test_channels_are_told(registered: None, tmp_path: Path) -> None:
    """The width of an MLP, of opened and closed experts; of a convolution also which dimension its channels are."""
    for build, paths in ((llama, "model.layers.{}.mlp.act_fn"), (mixtral, "model.layers.{}.mlp.experts.act_fn")):
        model = build("silu").eval()
        before = logits(model)
        for new in ("class", "recipe"):
            spec = {"module": "per_channel", "spec": {"several": 2}}
            change = (
                Swap.of(model, "silu", partial(PerChannel, several=2))
                if new == "class"
                else Swap(where=("silu",), new=spec)
            )
            assert change.new == spec
            applied = apply(model, change, progress=False)
            for index in range(2):
                assert model.get_submodule(paths.format(index)).slope.shape == (2, SMALL["intermediate_size"])
            assert Swap(where=("silu",), new=spec) in Recipe.parse(changes.recipe_of(changes.of(model).recipe))
            checkpoint.save(model, tmp_path / f"{build.__name__}-{new}")
            assert torch.equal(logits(checkpoint.load(tmp_path / f"{build.__name__}-{new}")), logits(model))
            back = swap(model, "per_channel", "silu")  # what has a matrix of coefficients comes out again
            assert torch.allclose(logits(model), before, atol=1e-6)
            back.undo()
            assert torch.equal(logits(applied.undo()), before)
    net, x = conv(), torch.randn(2, 1, 8, 8)
    apply(net, Swap.of(net, nn.ReLU, PerChannel), [x], progress=False)
    assert [(net[at].channels, net[at].dim) for at in (1, 3, 6)] == [(3, -3), (5, -3), (7, -1)]
    assert net(x).shape == (2, 7)


def test_channels_that_nothing_tells_are_refused(registered: None) -> None:
    net = conv()
    net.forward = lambda x, y: None  # type: ignore[assignment, method-assign]
    with pytest.raises(EditError, match="nothing says how many reach 1"):
        swap(net, nn.ReLU, PerChannel)
    shared = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5))
    shared.append(shared[1])
    with pytest.raises(EditError, match="reach 1, or its calls differ in it"):
        swap(shared, nn.ReLU, PerChannel)
    square = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    square.append(square[1])
    swap(square, nn.ReLU, PerChannel)
    assert square[1] is square[3] and square[1].channels == 3


def test_experts_share_the_parameters_of_what_was_put_in(registered: None, tmp_path: Path) -> None:
    """Opened by a later method, each expert has a copy with the same parameters; they stay one in a folder."""
    torch.manual_seed(0)
    model = mixtral("silu").eval()
    apply(model, [Swap.of(model, "silu", PerChannel), RoundToNearest(bits=8, group_size=-1)], progress=False)
    acts = [expert.activation for expert in model.model.layers[0].mlp.experts]
    assert acts[0] is not acts[1] and acts[0].slope is acts[1].slope
    checkpoint.save(model, tmp_path / "stacked")
    loaded = checkpoint.load(tmp_path / "stacked")
    assert torch.equal(logits(loaded), logits(model))
    acts = [expert.activation for expert in loaded.model.layers[1].mlp.experts]
    assert acts[0].slope is acts[1].slope
    later = mixtral("silu").eval()
    apply(later, [RoundToNearest(bits=8, group_size=-1), Swap.of(later, "silu", PerChannel)], progress=False)
    opened = mixtral("silu").eval()  # before the swap sees them
    apply(opened, RoundToNearest(bits=8, group_size=-1), progress=False)
    apply(opened, Swap.of(opened, "silu", PerChannel), progress=False)
    for each in (later, opened):
        acts = [expert.activation for expert in each.model.layers[0].mlp.experts]
        assert acts[0] is not acts[1] and acts[0].slope is acts[1].slope
        assert acts[0].slope is not each.model.layers[1].mlp.experts[0].activation.slope
        back = swap(each, "per_channel", "silu")  # and out again, all experts of a layer at once
        assert {name_of(expert.activation) for expert in each.model.layers[0].mlp.experts} == {"silu"}
        back.undo()
    checkpoint.save(opened, tmp_path / "opened")
    assert torch.equal(logits(checkpoint.load(tmp_path / "opened")), logits(opened))


def test_groups_that_do_not_divide_the_sample() -> None:
    """A factory is asked once to learn what it makes; the channels of the places are what must fit."""

    class Grouped(PerChannel):
        def __init__(self, channels: int, dim: int = -1, several: int = 1) -> None:
            if channels % 12:
                raise ValueError(f"channels: {channels} was given, 12 groups do not divide it.")
            super().__init__(channels, dim, several)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "module_name", lambda cls: "per_channel" if cls is Grouped else "activation")
        patch.setattr(registry, "module_class", lambda name: Grouped if name == "per_channel" else Activation)
        model = llama()
        swap(model, "silu", Grouped)
        assert model.model.layers[0].mlp.act_fn.channels == SMALL["intermediate_size"]
        narrow = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
        with pytest.raises(EditError, match="nothing can be made for 1: channels: 5 was given, 12 groups"):
            swap(narrow, "relu", Grouped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_a_config_that_names_a_learned_function(registered: None, dtype: Any, tmp_path: Path) -> None:
    """Built, saved in transformers' format and loaded: coefficients keep float32, also where transformers rounds."""
    enter("learned_scalar")
    try:
        model = llama("learned_scalar")
        assert model.model.layers[0].mlp.act_fn.slope.dtype == torch.float32
        with torch.no_grad():
            model.model.layers[0].mlp.act_fn.slope.fill_(1 / 3)
        model = model.to(dtype or torch.float32)
        assert torch.equal(model.model.layers[0].mlp.act_fn.slope, torch.tensor(1 / 3))
        checkpoint.save(model, tmp_path / "built")
        loaded = checkpoint.load(tmp_path / "built")
        assert torch.equal(loaded.model.layers[0].mlp.act_fn.slope, torch.tensor(1 / 3))
        assert loaded.dtype == model.dtype
        assert dtype or torch.equal(logits(loaded), logits(model))  # .to(bfloat16) rounds the rotary table too
        assert open_pending(tmp_path / "built").model.layers[0].mlp.act_fn.slope.dtype == torch.float32
    finally:
        del ACT2FN["learned_scalar"]


class Mixing(Activation):
    """An activation of a class that says what it mixes."""

    def __init__(self) -> None:
        super().__init__("silu")


@pytest.mark.parametrize(("mixes", "causal"), [(("batch",), False), (("positions",), True)])
def test_what_mixes_rows_or_reads_ahead_is_refused(mixes: Any, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mixing, "mixes", mixes)
    monkeypatch.setattr(registry, "module_name", lambda cls: "mixing" if cls is Mixing else "activation")
    monkeypatch.setattr(registry, "module_class", lambda name: Mixing if name == "mixing" else Activation)
    model = llama() if causal else tiny_model("bert")
    before = type(model)
    with pytest.raises(EditError, match=f"a Mixing mixes {'positions' if causal else 'the rows of a batch'}"):
        swap(model, "silu" if causal else "gelu", Mixing)
    assert type(model) is before and changes.of(model) is None
    if causal:  # whoever reads all positions anyway may mix them
        swap(tiny_model("bert"), "gelu", Mixing)


@pytest.mark.parametrize("name", ["norm", "drop", "pool", "my_norm"])
def test_what_is_no_activation_function_is_refused(name: str) -> None:
    model = Mixed()
    before = model.get_submodule(name)
    for where in (name, type(before)):
        with pytest.raises(EditError, match=f"{name} is a {type(before).__name__}, no activation function"):
            swap(model, where, "relu")
    assert model.get_submodule(name) is before
    with pytest.raises(EditError, match="LlamaRMSNorm, no activation function"):
        swap(llama(), "model.norm", "relu")


def test_an_own_class_is_taken_at_the_callers_word() -> None:
    model = Mixed()
    assert "taken for an activation function, as it was named: a Mine" in str(swap(model, "mine", "relu").report.notes)
    assert isinstance(model.mine, Activation)


def test_what_stands_under_a_threshold_is_not_swapped_by_itself() -> None:
    """The threshold was set for that function; the whole can be named."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = Thresholded(Activation("silu"), 0.1)
    for where in ("silu", "model.layers.0.mlp.act_fn.base"):
        with pytest.raises(EditError, match="activation modules of this model are Thresholded"):
            swap(model, where, "relu")
    swap(model, "*.act_fn", "relu")
    assert all(name_of(layer.mlp.act_fn) == "relu" for layer in model.model.layers)


def test_two_that_were_used_are_equal_by_their_settings() -> None:
    used = [Swap(where="silu", new="relu") for _ in range(2)]
    for each in used:
        apply(tiny_model("llama"), [each], tiny_batches("llama"), progress=False)
    assert used[0] == used[1] == Swap(where="silu", new="relu") and hash(used[0]) == hash(used[1])
    assert used[0] != Swap(where="silu", new="gelu")
