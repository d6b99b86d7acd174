"""aTLAS against a literal loop in float64, the tuned models themselves, and peft's task arithmetic."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import actkit
from actkit.core.ground.errors import CheckpointError, DataError
from actkit.core.ground.fingerprint import model_fingerprint
from actkit.core.store.deltas import Delta, Dense, LowRank, Sparse
from actkit.core.train.score import Score
from actkit.core.train.training import train
from actkit.finetuning.adapters import Lora
from actkit.finetuning.atlas.atlas import Atlas, AttachedAtlas, isotropic_search
from actkit.finetuning.atlas.selection import coefficient_gradients, disentanglement, select_vectors
from actkit.finetuning.lift.lift import Lift
from actkit.finetuning.low_rank_training import train_adapter
from actkit.testing import check_rule, tiny_batches, tiny_model

LENGTHS = ((9, 4, 6), (7, 2), (5, 5), (8, 3, 3))


def vectors(base: nn.Module, count: int = 3, scale: float = 0.1) -> tuple[list[nn.Module], list[Delta]]:
    """Models that differ from a base at random, and their task vectors: dense, sparse and of low rank."""
    tuned, deltas = [], []
    for seed in range(count):
        model = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                change = scale * torch.randn(parameter.shape, generator=generator)
                if seed == 1:
                    change *= torch.rand(parameter.shape, generator=generator) < 0.2
                if seed == 2 and parameter.dim() == 2:
                    change = change[:, :1] @ change[:1]
                parameter += change
        tuned.append(model)
        delta = Delta.between(model, base)
        deltas.append(delta.sparse() if seed == 1 else delta.low_rank(1) if seed == 2 else delta)
    return tuned, deltas


def whole(delta: Delta, name: str, like: Tensor) -> Tensor:
    """The change of a parameter, 0 if there is none."""
    return delta.parts[name].dense() if name in delta.parts else torch.zeros_like(like)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def fill(running: AttachedAtlas, values: Any) -> None:
    with torch.no_grad():
        for index, each in enumerate(running.composed.values()):
            each.coefficients.copy_(torch.as_tensor(values(index), dtype=torch.float32)[:, None])


@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_a_unit_vector_is_a_tuned_model_and_zero_the_base(kind: str) -> None:
    base = net() if kind == "plain" else tiny_model("llama")
    start = copy.deepcopy(base.state_dict())
    tuned, deltas = vectors(base)
    for index, expected in enumerate(tuned):
        model = copy.deepcopy(base)
        running = Atlas.of(deltas).attach(model)
        fill(running, lambda _, index=index: [float(index == other) for other in range(3)])
        running.detach()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected.state_dict()[name], rtol=0, atol=1e-6)
    running = Atlas.of(deltas).attach(base)
    running.detach()
    assert all(torch.equal(value, start[name]) for name, value in base.state_dict().items())
    assert list(base.state_dict()) == list(start)  # the order too, as fingerprints see it
    assert not any(hasattr(module, "parametrizations") for module in base.modules())
    if kind == "tied":
        assert base.get_parameter("lm_head.weight") is base.get_parameter("model.embed_tokens.weight")


@pytest.mark.parametrize("mode", ["block", "isotropic", "partition"])
def test_composition_and_gradients_are_those_of_a_literal_loop(mode: Any) -> None:
    base = net()
    _, deltas = vectors(base)
    model = copy.deepcopy(base)
    running = Atlas.of(deltas, mode=mode, groups=3).attach(model)
    generator = torch.Generator().manual_seed(9)
    drawn: dict[int, Tensor] = {}
    with torch.no_grad():
        for each in running.composed.values():
            if id(each.coefficients) not in drawn:
                each.coefficients.copy_(torch.rand(each.coefficients.shape, generator=generator))
                drawn[id(each.coefficients)] = each.coefficients.detach().double().requires_grad_()
    x, labels = torch.randn(20, 6, generator=generator), torch.randint(3, (20,), generator=generator)
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    values = {name: each.detach().double() for name, each in base.named_parameters()}
    for name, each in running.composed.items():
        own = drawn[id(each.coefficients)]
        for index, delta in enumerate(deltas):
            factor = own[index] if each.groups is None else own[index][each.groups]
            values[name] = values[name] + factor * whole(delta, name, values[name]).double()
    hidden = torch.tanh(x.double() @ values["0.weight"].t() + values["0.bias"])
    expected = F.cross_entropy(hidden @ values["2.weight"].t() + values["2.bias"], labels)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    for each in running.composed.values():
        assert each.coefficients.grad is not None
        torch.testing.assert_close(
            each.coefficients.grad.double(), drawn[id(each.coefficients)].grad, rtol=1e-4, atol=1e-6
        )
    output = model(x).detach()
    if mode == "partition":
        assert set(running.composed) == {"0.weight", "2.weight"}
    running.detach()
    torch.testing.assert_close(model(x), output, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["block", "partition"])
@pytest.mark.parametrize("form", ["dense", "sparse", "low_rank"])
def test_an_embedding_s_gradient_is_of_the_rows_that_were_read(mode: Any, form: str) -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(40, 6, padding_idx=3), nn.Linear(6, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids).mean(1))

    torch.manual_seed(0)
    base, tuned = Read(), Read()
    delta = Delta.between(tuned, base)
    delta = {"dense": delta, "sparse": delta.sparse(0.5), "low_rank": delta.low_rank(2)}[form]
    ids, labels = torch.tensor([[1, 5, 5, 3], [7, 1, 0, 39]]), torch.tensor([0, 2])
    found = []
    for whole_table in (False, True):
        running = Atlas.of([delta], mode=mode).attach(base)
        assert base.table.sparse
        base.table.sparse = not whole_table
        F.cross_entropy(base(ids), labels).backward()
        found.append(running.composed["table.weight"].coefficients.grad)
        running.detach()
        assert not base.table.sparse
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_one_number_for_all_is_peft_s_task_arithmetic() -> None:
    merging = pytest.importorskip("peft.utils.merge_utils")
    base = net()
    _, deltas = vectors(base)
    model = copy.deepcopy(base)
    running = Atlas.of(deltas, mode="isotropic").attach(model)
    weights = torch.tensor([0.3, -0.2, 0.9])
    fill(running, lambda index: weights)
    running.detach()
    for name, value in base.named_parameters():
        expected = value + merging.task_arithmetic([whole(delta, name, value) for delta in deltas], weights)
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=0, atol=1e-6)


def test_a_training_learns_coefficients_alone_and_is_resumed(tmp_path: Path) -> None:
    base, batches = tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    _, deltas = vectors(base, scale=0.02)
    for index, delta in enumerate(deltas):
        delta.save(tmp_path / f"{index}.safetensors")
    files = tuple(str(tmp_path / f"{index}.safetensors") for index in range(3))
    rule, found = Atlas(vectors=files), []
    for stop in (False, True):
        model = copy.deepcopy(base)
        given: dict[str, Any] = {"validation": batches[:1], "steps": 6, "learning_rate": 0.05, "evaluate_every": 2}
        given |= {"progress": False, "out": tmp_path / f"{stop}", "keep": "last", "weight_decay": 0.1}
        if stop:
            passes = 0

            def count(*_: Any) -> None:
                nonlocal passes
                passes += 1
                if passes == 7:
                    raise KeyError("planned")

            handle = model.register_forward_pre_hook(count)
            with pytest.raises(KeyError, match="planned"):
                train(model, batches[1:], rules=[rule], **given)
            handle.remove()
            model, given["resume"] = copy.deepcopy(base), True
        trained = train(model, batches[1:], rules=[rule], **given)
        found.append(model)
    assert trained.trainable == 3 * len(dict(base.named_parameters()))
    report = (trained.history[-1].reports or {})["0.Atlas"]
    assert len(report["coefficients"]) == 3 and any(report["coefficients"])
    for name, value in found[0].state_dict().items():
        assert torch.equal(value, found[1].state_dict()[name]), name
    change = Delta.between(found[0], base)
    span = [change.product(delta) for delta in deltas]
    assert change.norm() > 0 and any(abs(each) > 0 for each in span)


def test_the_best_single_coefficient_is_found() -> None:
    base = net()
    tuned, deltas = vectors(base, count=1)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(5))
    target = tuned[0](x).detach()
    seen: list[float] = []

    def evaluate(model: nn.Module) -> float:
        seen.append(-float((model(x) - target).detach().square().mean()))
        return seen[-1]

    found = isotropic_search(base, deltas, evaluate)
    assert found.coefficient == 1.0 and len(seen) == 21 and max(found.scores.values()) == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(base(x), target, rtol=1e-5, atol=1e-6)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(CheckpointError, match="vectors: their bases are"):
        isotropic_search(base, deltas, evaluate)

    def fails(model: nn.Module) -> float:
        raise KeyError("planned")

    with pytest.raises(KeyError):
        isotropic_search(base, [Delta(deltas[0].parts)], fails)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_a_penalty_is_the_mean_norm_over_blocks() -> None:
    base = net()
    running = Atlas.of(vectors(base)[1], penalty=2.0, norm=1).attach(base)
    fill(running, lambda index: [index, -1.0, 0.0])
    found = running.penalty()
    assert found is not None and float(found.detach()) == pytest.approx(2.0 * 0.5 * (1.5 + 1.0))
    running.detach()


def test_what_does_not_fit_is_refused() -> None:
    base = net()
    _, deltas = vectors(base)
    for rule, error, text in (
        (Atlas(), ValueError, "vectors: none were given"),
        (Atlas.of(deltas, blocks=("x*",)), ValueError, "leave no parameter that a vector changes"),
        (
            Atlas.of([Delta({"9.weight": Dense(torch.zeros(2))})]),
            ValueError,
            "vectors: 9.weight differ in name or shape",
        ),
        (Atlas.of([Delta(deltas[0].parts, "0" * 64)]), CheckpointError, "vectors: their bases are 000000000000"),
        (
            Atlas.of([Delta({"0.bias": Dense(torch.zeros(8))})], mode="partition"),
            ValueError,
            "blocks: mode='partition'",
        ),
    ):
        with pytest.raises(error, match=text):
            rule.attach(base)
    assert not any(hasattr(module, "parametrizations") for module in base.modules())
    with pytest.raises(ValueError, match="grid: none were given"):
        isotropic_search(base, deltas, lambda model: 0.0, grid=())


def test_norms_and_dropout_rest_while_coefficients_train() -> None:
    base = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 4)
    )
    rule, model = Atlas.of(vectors(base)[1]), copy.deepcopy(base)
    given = torch.randn(2, 8, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    batches = [{"input": x, "labels": torch.arange(8) % 4} for x in given]
    trained = train(model, batches, validation=[*batches], rules=[rule], steps=3, learning_rate=0.1, progress=False)
    assert all(torch.equal(value, dict(base.named_buffers())[name]) for name, value in model.named_buffers())
    assert trained.history[1].loss == pytest.approx(trained.history[0].validation, abs=0.2)  # no dropout
    assert not torch.equal(model[1].weight, base[1].weight)
    running = rule.attach(base.train())
    assert torch.equal(base(given[0]), base(given[0]))
    running.detach()
    assert all(module.training for module in base.modules())


def test_vectors_of_16_bits_and_a_base_of_64() -> None:
    base = net().double()
    model, start = copy.deepcopy(base), copy.deepcopy(base.state_dict())
    tuned, deltas = vectors(base)
    half = [Delta({name: Dense(part.dense().half()) for name, part in each.parts.items()}) for each in deltas]
    running = Atlas.of(half).attach(model)
    fill(running, lambda _: [0.0, 0.0, 0.0])
    running.detach()
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    running = Atlas.of(half).attach(model)
    fill(running, lambda _: [1.0, 0.0, 0.0])
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    running.detach()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, tuned[0].state_dict()[name], rtol=0, atol=1e-3)


def test_what_lift_and_lora_changed_are_task_vectors(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base, batches = tiny_model("llama"), tiny_batches("llama", lengths=LENGTHS)
    actkit.save(base, tmp_path / "base")
    given: dict[str, Any] = {"validation": batches[:1], "steps": 2, "learning_rate": 0.02, "progress": False}
    lifted, adapted = copy.deepcopy(base), copy.deepcopy(base)
    train(lifted, batches[1:], rules=[Lift(lora_rank=1, rank_filter=3)], weight_decay=0.0, **given)
    layers = Lora(rank=2).layers(adapted, batches)
    train_adapter(adapted, batches[1:], layers=layers, merge=False, out=tmp_path / "adapter", **given)
    lora = Delta.of_adapter(base, tmp_path / "adapter")
    deltas = [Delta.between(lifted, base).sparse(), lora.low_rank(2)]
    assert {type(part) for part in deltas[0].parts.values()} == {Sparse}
    assert {type(part) for part in deltas[1].parts.values()} == {LowRank}
    whole_lora = copy.deepcopy(base)
    lora.add_to(whole_lora)
    for index, expected in enumerate((lifted, whole_lora)):
        model = copy.deepcopy(base)
        running = Atlas.of(deltas).attach(model)
        fill(running, lambda _, index=index: [float(index == 0), float(index == 1)])
        running.detach()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected.state_dict()[name], rtol=0, atol=1e-6)


def test_a_task_is_forgotten_and_another_kept() -> None:
    """The vector of a task, negated by learning: the best step is one that keeps the control task."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    labels = {task: x[:, start : start + 3].argmax(1) for task, start in (("target", 0), ("control", 3))}
    base = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
    given: dict[str, Any] = {"validation": [{"x": x}], "learning_rate": 0.05, "progress": False}

    def loss(model: nn.Module, task: str) -> Tensor:
        return F.cross_entropy(model(x)[:, :3] if task == "target" else model(x)[:, 3:], labels[task])

    def kept(model: nn.Module, batches: Any = None) -> float:
        return float(loss(model, "target")) if loss(model, "control") <= allowed else 0.0

    train(base, [{"x": x}], steps=60, loss=lambda model, _: loss(model, "target") + loss(model, "control"), **given)
    tuned, model = copy.deepcopy(base), copy.deepcopy(base)
    train(tuned, [{"x": x}], steps=60, loss=lambda model, _: loss(model, "target"), **given)
    with torch.no_grad():
        before, allowed = float(loss(base, "target")), 1.1 * float(loss(base, "control"))
    train(
        model,
        [{"x": x}],
        steps=30,
        loss=lambda model, _: loss(model, "control") - loss(model, "target"),
        score=Score(kept, better="higher"),
        evaluate_every=1,
        rules=[Atlas.of([Delta.between(tuned, base)])],
        **given,
    )
    with torch.no_grad():
        assert float(loss(model, "target")) > 1.2 * before and float(loss(model, "control")) <= allowed


def test_vectors_are_selected_by_the_slope_of_the_loss() -> None:
    base = net()
    deltas = vectors(base, count=3)[1]
    x, labels = torch.randn(30, 6, generator=torch.Generator().manual_seed(3)), torch.arange(30) % 3
    batches = [{"input": x[:20], "labels": labels[:20]}, {"input": x[20:], "labels": labels[20:]}]
    start = copy.deepcopy(base.state_dict())
    found = coefficient_gradients(base, deltas, batches)
    for name, slopes in found.items():
        for index, delta in enumerate(deltas):
            losses = []
            for sign in (1, -1):
                moved = copy.deepcopy(base).double()
                with torch.no_grad():
                    moved.get_parameter(name).add_(sign * 1e-4 * whole(delta, name, base.get_parameter(name)))
                losses.append(float(F.cross_entropy(moved(x.double()), labels).detach()))
            assert float(slopes[index]) == pytest.approx(abs(losses[0] - losses[1]) / 2e-4, rel=1e-3, abs=1e-6)
    assert all(torch.equal(value, start[name]) for name, value in base.state_dict().items())
    assert all(each.grad is None and each.requires_grad for each in base.parameters())
    kept = [each for delta in select_vectors(base, deltas, batches, 1) for each in delta.parts.items()]
    assert len(kept) == len(found)
    assert all(part is deltas[int(found[name].argmax())].parts[name] for name, part in kept)
    assert sum(len(delta.parts) for delta in select_vectors(base, deltas, batches, 2)) == 2 * len(found)
    largest = max(range(3), key=lambda index: sum(float(each[index]) for each in found.values()))
    assert select_vectors(base, deltas, batches, 1, by="vector") == [deltas[largest]]
    assert len(select_vectors(base, deltas, batches, 2, by="random")) == 2
    with pytest.raises(ValueError, match="budget: 4 was given; give 1 to 3"):
        select_vectors(base, deltas, batches, 4)
    with pytest.raises(DataError, match="labels: a batch has none"):
        select_vectors(base, deltas, [{"input": x}], 1)


def test_tasks_that_share_no_output_are_disentangled() -> None:
    base = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        base.weight.zero_()
    rows = {"a": [1.0, 0.0, 0.0], "b": [0.0, 1.0, 0.0], "c": [0.0, 0.0, 2.0]}
    deltas = {
        task: Delta(
            {"weight": Dense(torch.tensor([[each, 0.0] for each in row]))}, model_fingerprint(base, widened=True)
        )
        for task, row in rows.items()
    }
    batches = {task: [torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [3.0, 1.0]])] for task in rows}
    found = disentanglement(base, deltas, batches)
    for i, task in enumerate(rows):
        for j, other in enumerate(rows):
            x = batches[task][0]
            both = x @ deltas[task].parts["weight"].dense().t()
            changed = both + (x @ deltas[other].parts["weight"].dense().t() if task != other else 0)
            assert found.shares[i][j] == float((both.argmax(-1) != changed.argmax(-1)).double().mean())
    assert found.shares[0][2] > 0 == found.shares[0][0]
    assert found.error == pytest.approx(sum(map(sum, found.shares)) / 6) and not base.weight.any()
    with pytest.raises(ValueError, match="vectors, batches"):
        disentanglement(base, deltas, {"a": batches["a"]})


def test_the_rule_passes(tmp_path: Path) -> None:
    base = tiny_model("llama")
    vectors(base, count=1)[1][0].save(tmp_path / "vector.safetensors")
    rule = Atlas(vectors=(str(tmp_path / "vector.safetensors"),))
    check_rule(rule, base, tiny_batches("llama", lengths=LENGTHS))
