"""One reader of batches for all verbs: models of several inputs, of a graph, of text with classes, and of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actkit import verbs
from actkit.core.forward.batch import (
    BatchContext,
    as_batches,
    check_batch,
    first_rows,
    first_tensor,
    has_rows,
    is_tokens,
    main_input,
    sequence_of,
)
from actkit.core.forward.example import Inputs, example_of, make_example
from actkit.core.ground.errors import CoverageError, DataError
from actkit.core.measure.fresh import FreshProcess
from actkit.core.measure.proof import prove
from actkit.core.model.anatomy import anatomy
from actkit.core.recipe.runner import apply
from actkit.core.store import checkpoint
from actkit.core.train.training import train
from actkit.data import Batches, load_data
from actkit.quantization.rtn import RoundToNearest
from actkit.testing import check_model, tiny_batches, tiny_model
from actkit.zoo.cnn import DigitsCNN

WHOLE = RoundToNearest(bits=8, group_size=-1)


class TwoInputs(nn.Module):
    """Compares two vectors of 6 and 4 numbers: three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 16), nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head((self.left(left) + self.right(right)).relu())


class TwoInputsSaid(TwoInputs):
    """The same, and says what it takes."""

    def example(self, rows: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {"left": torch.rand(rows, 6, generator=generator), "right": torch.rand(rows, 4, generator=generator)}


class Graph(nn.Module):
    """A graph convolution over nodes of 5 numbers; two classes of nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        for layer in (self.first, self.second):
            summed = torch.zeros_like(x).index_add(0, target, x[source])
            x = layer(x + summed) if layer is self.second else layer(x + summed).relu()
        return x


class GraphSaid(Graph):
    """The same, and says what it takes."""

    def example(self, rows: int, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        edges = torch.randint(rows, (2, 3 * rows), generator=generator)
        return {"edge_index": edges, "x": torch.rand(rows, 5, generator=generator)}


def two(seed: int = 0, rows: int = 8) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    left, right = torch.randn(rows, 6), torch.randn(rows, 4)
    return {"left": left, "right": right, "labels": (left[:, 0] > right[:, 0]).long() + (left[:, 1] > 1).long()}


def graph(seed: int = 0, nodes: int = 9) -> dict[str, Tensor]:
    """The edges first, as a library of graphs might give them."""
    torch.manual_seed(seed)
    x = torch.randn(nodes, 5)
    return {"edge_index": torch.randint(nodes, (2, 20)), "x": x, "labels": (x[:, 0] > 0).long()}


BERT = tiny_batches("bert", lengths=((9, 4, 6), (7, 2)))


def built(kind: str) -> tuple[nn.Module, list[Any]]:
    """A model, and batches with labels."""
    torch.manual_seed(0)
    if kind == "graph":
        return Graph().eval(), [graph(seed) for seed in range(3)]
    if kind == "cnn":
        images = torch.rand(3, 6, 1, 8, 8)
        return DigitsCNN().eval(), [{"pixel_values": each, "labels": torch.arange(6)} for each in images]
    if kind == "bert":
        return tiny_model("bert"), [{**batch, "labels": torch.arange(len(batch["input_ids"])) % 2} for batch in BERT]
    return TwoInputs().eval(), [two(seed) for seed in range(3)]


KINDS = ("two", "graph", "cnn", "bert")


# -- every verb --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_verb_takes_its_batches(kind: str, tmp_path: Path) -> None:
    model, batches = built(kind)
    rows = sum(len(batch["labels"]) for batch in batches)
    found = verbs.profile(model, batches)
    expected = rows if kind != "bert" else sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert len(found.sites) >= 2 and found.rows == expected
    assert verbs.show(model, batches).parameters == sum(p.numel() for p in model.parameters())

    evaluation = verbs.evaluate(model, batches)
    hits = 0
    with torch.no_grad():
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            hits += int((first_tensor(model(**inputs)).argmax(-1) == batch["labels"]).sum())
    assert evaluation.quality.metrics["accuracy"].value == pytest.approx(hits / rows)
    assert evaluation.quality.documents == rows

    saved = verbs.apply_and_save(
        model, WHOLE, tmp_path / "x", iter(batches), base=BASES.get(kind), min_coverage=0, progress=False
    )
    assert saved.proof is not None and saved.proof.passed and len(saved.report.changed) >= 2


BASES: dict[str, Any] = {"two": TwoInputs, "graph": Graph}


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_takes_them(kind: str) -> None:
    """The loss of a step is that of a plain call, and the training lowers it."""
    model, batches = built(kind)
    with torch.no_grad():
        inputs = {key: value for key, value in batches[0].items() if key != "labels"}
        expected = float(F.cross_entropy(first_tensor(model(**inputs)), batches[0]["labels"]))
    result = train(
        model, batches[1:], validation=batches[:1], steps=30, learning_rate=3e-2, evaluate_every=10, progress=False
    )
    assert result.history[0].validation == pytest.approx(expected, rel=1e-5)
    assert result.history[-1].loss < result.history[1].loss


def test_tokens_are_told_from_other_whole_numbers() -> None:
    model, batches = built("bert")
    assert is_tokens(batches[0], model) and BatchContext.of(batches[0], model).tokens == 19
    assert not is_tokens({"indices": batches[0]["input_ids"]}, TwoInputs())


@pytest.mark.parametrize("make", [TwoInputs, TwoInputsSaid, Graph, GraphSaid, DigitsCNN])
def test_they_keep_what_every_model_promises(make: Any) -> None:
    _, batches = built({"T": "two", "G": "graph", "D": "cnn"}[make.__name__[0]])
    checks = {check.name: check.outcome for check in check_model(make, batches)}
    left = {name for name, outcome in checks.items() if outcome != "holds"}
    quiet = {"it is loaded in a fresh process", "it compiles", "it exports"}
    quiet |= set() if make is DigitsCNN else {"it is loaded by its name", "it is rebuilt from its spec"}
    quiet |= {"rows do not mix"} if issubclass(make, Graph) else set()
    quiet |= {"random inputs fit"} if make in (TwoInputs, Graph) else set()
    assert left == quiet


# -- what it reads -----------------------------------------------------------------------------------------------------


def test_edges_are_no_tokens() -> None:
    model, (batch, *_) = built("graph")
    assert main_input(batch, model) is batch["x"] and not is_tokens(batch, model)
    context = BatchContext.of(batch, model)
    assert (context.batch_size, context.length, context.tokens) == (9, None, 9)
    assert load_data([batch], model).rows == 9 and Batches([batch], model=model).document_ids[0].tolist() == list(
        range(9)
    )
    tuples = (batch["x"], batch["edge_index"])
    assert main_input(tuples, model) is batch["x"] and BatchContext.of(tuples, model).tokens == 9
    assert not has_rows(batch, model) and has_rows(two(), TwoInputs())
    with pytest.raises(DataError, match="2 rows of a batch were asked for, and not every tensor has 9"):
        first_rows(batch, 2, model)
    with pytest.raises(DataError, match="give whole batches"):
        load_data([batch], model, sequences=3)
    assert load_data([batch, graph(1)], model, sequences=9).rows == 9


def test_the_name_of_the_main_input_is_the_models() -> None:
    class Named(nn.Module):
        main_input_name = "signal"

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, weights: Tensor, signal: Tensor) -> Tensor:
            return self.layer(signal) * weights

    batch = {"weights": torch.ones(1), "signal": torch.randn(4, 3)}
    assert main_input(batch, Named()) is batch["signal"] and main_input(batch) is batch["weights"]
    assert BatchContext.of(batch, Named()).batch_size == 4


@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_two_inputs_in_both_forms(form: str, tmp_path: Path) -> None:
    model = TwoInputs().eval()
    batch: Any = {key: value for key, value in two().items() if key != "labels"}
    batch = batch if form == "dict" else tuple(batch.values())
    check_batch(model, batch)
    applied = apply(model, WHOLE, [batch], min_coverage=0, progress=False).model
    folder = checkpoint.save(applied, tmp_path / "x")
    with FreshProcess() as process:
        proof = prove(applied, folder, batch, process=process, base=TwoInputs)
        assert proof.passed and proof.tokens == 8
        with pytest.raises(DataError, match=r"batch: the model does not say what it takes .* several inputs"):
            prove(applied, folder, process=process, base=TwoInputs)


def test_a_model_says_what_it_takes_by_an_example(tmp_path: Path) -> None:
    model = GraphSaid().eval()
    assert torch.equal(make_example(model, 4, 3)["x"], make_example(model, 4, 3)["x"])
    assert example_of(model, None)["x"].shape == (2, 5) == example_of(model, [graph()])["x"].shape
    assert len(anatomy(model).blocks[0].chains) == 1
    random = load_data("random", model, sequences=5, batch_size=3)
    assert [len(batch["x"]) for batch in random] == [3, 2] and random.rows == 5
    other = load_data("random", model, sequences=5, batch_size=3, split="test")
    assert not torch.equal(other[0]["x"], random[0]["x"])
    changed = verbs.apply_and_save(model, WHOLE, tmp_path / "x", "random", base=GraphSaid, min_coverage=0)
    assert changed.proof is not None and changed.proof.passed and changed.proof.tokens == 2
    with pytest.raises(CoverageError, match=r"pass example=.* or give the model example\(rows, seed\)"):
        anatomy(Graph())
    with pytest.raises(DataError, match=r"or give the model example\(rows, seed\)"):
        load_data("random", Graph())
    assert Inputs.of(Graph()).shape is None and Inputs.of(nn.Sequential(nn.Linear(5, 2))).shape == (5,)


# -- what is ambiguous or cannot be ------------------------------------------------------------------------------------

X, Y = torch.randn(4, 5), torch.arange(4) % 2
ONE = nn.Sequential(nn.Linear(5, 2))


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (ONE, (X, Y), r"a batch is a tuple of 2, and Sequential takes 1 \(input\): a tuple holds .* {'input': x, 'lab"),
        (TwoInputs(), X, r"a batch is one tensor, and TwoInputs also needs right; give a dict of its keywords"),
        (TwoInputs(), (X, X, Y), "a batch is a tuple of 3, and TwoInputs takes 2"),
        (TwoInputs(), {"left": X, "labels": Y}, "a batch holds left, labels, and TwoInputs also needs right"),
        (ONE, [X, Y], "a batch is a list; give a tensor, .* or a dict of its keywords with labels under 'labels'"),
    ],
)
def test_what_a_model_cannot_be_called_with_is_refused_by_name(model: nn.Module, batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_batch(model, batch)
    with pytest.raises(DataError, match=message):
        verbs.profile(model, [batch])
    with pytest.raises(DataError, match=message):
        apply(model, "rtn", [batch], progress=False)
    with pytest.raises(DataError, match=message):
        train(model, [batch], validation=[batch, batch], steps=1, progress=False)


def test_one_batch_or_several() -> None:
    batch = two()
    assert as_batches(batch) == [batch] and as_batches(X)[0] is X
    several = [batch, two(1)]
    assert as_batches(several) is several and len(sequence_of(iter(several))) == 2
    with pytest.raises(DataError, match=r"batches: a tuple of 2 tensors was given, which may be one batch or several"):
        as_batches((X, Y))
    with pytest.raises(DataError, match="data: a tuple of 2 tensors"):
        apply(TwoInputs(), "teal", (torch.randn(4, 6), torch.randn(4, 4)), progress=False)


def test_labels_of_two_inputs_are_not_guessed() -> None:
    with pytest.raises(DataError, match="labels: a batch has none, and TwoInputs is no language model"):
        pair = (torch.randn(4, 6), torch.randn(4, 4))
        train(TwoInputs(), [pair], validation=[pair, pair], steps=1, progress=False)
