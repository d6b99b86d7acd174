"""Models of actkit's own pass; each kind of broken one is caught by the right property."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from actkit.compression.minimal.minimal_vit import MinimalViT
from actkit.core.ground import registry
from actkit.core.measure.fresh import FreshProcess
from actkit.core.watch.capture import record
from actkit.functions.rbfnet.fit_field import new_field
from actkit.functions.vanillanet.model import VanillaNet
from actkit.sparsity.active_dendrites.segments import DendriticSegments, PatternMemory, sparse_code
from actkit.testing import Check, check_model, own_models
from actkit.testing.models import TinyMlp
from actkit.testing.own_models import CHECKS
from actkit.zoo.cnn import DigitsCNN

CHANNELS, CLASSES = 16, 8


def rows(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images() -> list[dict[str, Tensor]]:
    return [{"pixel_values": rows(4, 1, 8, 8, seed=n).abs(), "labels": torch.arange(4) + n} for n in range(2)]


def vectors() -> list[Any]:
    return [rows(5, CHANNELS), rows(3, CHANNELS, seed=2)]


class SmallLanguageModel(nn.Module):
    """Tokens [batch, length] -> logits [batch, length, 20]: an embedding, a gated layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, CHANNELS)
        self.gate, self.up, self.down = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        self.act = nn.SiLU()
        self.head = nn.Linear(CHANNELS, 20)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        return self.head(x + self.down(self.act(self.gate(x)) * self.up(x)))


def codes(count: int) -> Tensor:
    return sparse_code(rows(count, CHANNELS, seed=count), 6)


def segments() -> nn.Module:
    learned = DendriticSegments(CHANNELS, 4, 3)
    learned.learn(codes(5), generator=torch.Generator().manual_seed(0))
    return learned


def memory() -> nn.Module:
    learned = PatternMemory(CHANNELS, 4, 3)
    learned.learn(codes(5), [0, 1, 2, 3, 4], generator=torch.Generator().manual_seed(0))
    return learned


IDS = torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(0))
ALWAYS = {"it is loaded in a fresh process", "it compiles", "it exports"}  # only if they are asked for
NO_NAME = {"it is rebuilt from its spec", "it is loaded by its name"}
NO_LINEAR = {
    "the dtype is kept",
    "gradients reach all parameters",
    "the anatomy reads it",
    "sites hold what layers read",
    "it is changed and put back",
    "a changed one is saved and loaded",
    "random inputs fit",
    "its quality is measured",
}
# how it is built, its batches, what does not apply
MODELS: dict[str, tuple[Callable[[], nn.Module], list[Any], set[str]]] = {
    "DigitsCNN": (DigitsCNN, images(), set()),
    "VanillaNet": (
        lambda: VanillaNet((4, 6, 8), (2, 1), in_channels=1, classes=10, order=1, stem=(4, 2, 1)),
        images(),
        {"the anatomy reads it", "sites hold what layers read"},  # its pairs are no layers until they are one
    ),
    "MinimalViT": (lambda: MinimalViT(8, 2, 8, 2, 10, channels=1), images(), set()),
    "NeuralField": (
        lambda: new_field(2, 3, 8, resolutions=(4, 6), frequencies=(2.0, 3.2), channels=(4, 2)),
        [(0.9 * torch.tanh(batch[:, :2]),) for batch in (codes(3), codes(2))],
        {"random inputs fit", "its quality is measured"},  # points of a box, and values in place of classes
    ),
    "TinyMlp": (TinyMlp, vectors(), {*NO_NAME, "its quality is measured"}),
    "a language model": (SmallLanguageModel, [{"input_ids": IDS}], NO_NAME),
    "PatternMemory": (memory, [codes(3), codes(2)], NO_LINEAR),
    "DendriticSegments": (segments, [codes(3), codes(2)], NO_LINEAR),
}


def left_out(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if check.outcome != "holds"}


@pytest.mark.parametrize("name", MODELS)
def test_models_pass(name: str) -> None:
    make, batches, apart = MODELS[name]
    checks = check_model(make, batches)
    assert [check.name for check in checks] == list(CHECKS)
    assert left_out(checks) == apart | ALWAYS
    assert all(check.reason for check in checks if check.outcome != "holds")


def test_every_model_of_our_own_is_in_the_table() -> None:
    """But those over transformers, which the tests of architectures read by their row."""
    classes = [registry.model_class(name) for name in registry.model_names()]
    own = {cls.__name__ for cls in classes if not issubclass(cls, PreTrainedModel)}
    assert own <= set(MODELS), "add the new model to MODELS"


def test_a_fresh_process_the_compiler_and_the_exporter(worker: FreshProcess) -> None:
    checks = check_model(DigitsCNN, images()[:1], fresh=worker, compile_backend="aot_eager", export=True)
    assert left_out(checks) == set()


# -- broken models -----------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A sound one: [..., 16] -> [..., 8] through a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(CHANNELS, 12), nn.ReLU(), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


class Grows(Small):
    """Each one has a wider layer than the one before."""

    built: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.built.append(1)
        self.extra = nn.Linear(CHANNELS, len(self.built))


SHARED = nn.Parameter(torch.zeros(CLASSES))


class Shares(Small):
    def __init__(self) -> None:
        super().__init__()
        self.second.bias = SHARED


class Drops(Small):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, training=True)


class Counts(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class DividesByZero(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0


class Centers(Small):
    """Subtracts the mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Pools(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(0, keepdim=True)


class Widens(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class NeverUses(Small):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.zeros(3))


class ReadsTheWeight(Small):
    """Multiplies by a layer's weight without calling the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.act(F.linear(x, self.first.weight, self.first.bias)), self.second.weight, self.second.bias)


class Remembers(Small):
    """Keeps what it made of its inputs before its weights were changed."""

    known: ClassVar[dict[float, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        keeps = x.dtype == torch.float32 and not y.requires_grad
        return self.known.setdefault(float(x.double().sum()), y) if keeps else y


class DrawsAScale(Small):
    """Built with a number that is drawn, and kept where no checkpoint finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = float(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class SaysAnotherShape(Small):
    input_shape = (5,)


class OneNumber(Small):
    """No classes: one number per row."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(-1)


class Branches(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.detach().sum()) > -1e9 else -super().forward(x)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (Grows, r"it is built alike each time: other tensors in the second: extra\.bias, extra\.weight"),
        (Shares, r"it is built alike each time: both share second\.bias"),
        (Drops, "the same result twice: a call in evaluation mode draws random numbers"),
        (Counts, "the same result twice: after a call in evaluation mode: calls has other values"),
        (DividesByZero, "the same result twice: the output holds NaN or Inf"),
        (Centers, "rows do not mix: the output of a row alone differs"),
        (Pools, "rows do not mix: 1 outputs for 5 rows"),
        (Widens, "the dtype is kept: the output is torch.float32 in a torch.bfloat16 model"),
        (NeverUses, "gradients reach all parameters: spare gets no gradient"),
        (ReadsTheWeight, "the anatomy reads it: first is a linear layer that is not found: "),
        (Remembers, "it is changed and put back: the outputs are as before"),
        (DrawsAScale, "a changed one is saved and loaded: the outputs of the loaded model differ"),
        (SaysAnotherShape, "random inputs fit: RuntimeError"),
    ],
)
def test_broken_models_are_caught(make: type[nn.Module], text: str) -> None:
    with pytest.raises(AssertionError, match=f"^{text}"):
        check_model(make, vectors())


def labelled() -> list[Any]:
    return [{"x": x, "labels": torch.arange(len(x))} for x in vectors()]


def test_outputs_that_are_no_classes_are_caught() -> None:
    with pytest.raises(AssertionError, match=r"^its quality is measured: "):
        check_model(OneNumber, labelled())


def test_a_recorder_that_sees_something_else_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(model: Any, sites: Any, batches: Any, **settings: Any) -> Any:
        return record(model, sites, [2 * batch for batch in batches], **settings)

    monkeypatch.setattr(own_models, "record", doubled)
    with pytest.raises(AssertionError, match=r"^sites hold what layers read: at layer.input:first other values"):
        check_model(Small, vectors())


class Registered(Small):
    """A sound one, with the spec that a checkpoint keeps."""

    def spec(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> nn.Module:
        return cls(**spec)


class TupleInSpec(Registered):
    def spec(self) -> dict[str, Any]:
        return {"sizes": (1, 2)}


class OtherTensors(Registered):
    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> nn.Module:
        made = cls()
        made.extra = nn.Parameter(torch.ones(1))
        return made


class OtherClass(Registered):
    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> nn.Module:
        return Small()


class NoSpec(Registered):
    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> nn.Module:
        return cls(**spec, width=3)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], None]:
    """Registers a class as the model `mine`."""

    def register(cls: type) -> None:
        monkeypatch.setitem(registry._entries(registry.MODELS), "mine", (entry(cls),))
        point_at(cls, monkeypatch)

    return register


def point_at(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    load = registry._load
    monkeypatch.setattr(registry, "_load", lambda *asked: cls if asked == (registry.MODELS, "mine") else load(*asked))


def entry(cls: type) -> EntryPoint:
    return EntryPoint("mine", f"{cls.__module__}:{cls.__qualname__}", registry.MODELS)


def test_a_registered_one_is_loaded_by_its_name(named: Callable[[type], None]) -> None:
    named(Registered)
    assert left_out(check_model(Registered, vectors())) == ALWAYS | {"its quality is measured"}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (TupleInSpec, "it is rebuilt from its spec: spec\\(\\) gives"),
        (OtherTensors, "it is rebuilt from its spec: from_spec gives other tensors: extra"),
        (OtherClass, "it is rebuilt from its spec: from_spec gives a Small"),
        (NoSpec, "it is rebuilt from its spec: TypeError"),
    ],
)
def test_a_spec_that_does_not_build_it_is_caught(
    named: Callable[[type], None], make: type[nn.Module], text: str
) -> None:
    named(make)
    with pytest.raises(AssertionError, match=f"^{text}"):
        check_model(make, vectors())


def test_a_name_that_stands_for_something_else_is_caught(
    named: Callable[[type], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    named(Registered)
    point_at(DigitsCNN, monkeypatch)
    with pytest.raises(AssertionError, match=r"^it is loaded by its name: CheckpointError"):
        check_model(Registered, vectors())


def test_another_process_that_differs_is_caught() -> None:
    class Elsewhere:
        def load(self, folder: Any, *, base: Any) -> None:
            self.model = base().eval()

        def outputs(self, batch: Any) -> Tensor:
            with torch.no_grad():
                return self.model(batch)

    with pytest.raises(AssertionError, match=r"^it is loaded in a fresh process: the outputs in the other process"):
        check_model(Small, vectors(), fresh=Elsewhere())


def test_what_no_graph_holds_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"^it compiles: "):
        check_model(Branches, vectors(), compile_backend="aot_eager")
    with pytest.raises(AssertionError, match=r"^it exports: "):
        check_model(Branches, vectors(), export=True)
    assert left_out(check_model(Small, vectors())) == ALWAYS | NO_NAME | {"its quality is measured"}
    assert left_out(check_model(Small, labelled())) == ALWAYS | NO_NAME
