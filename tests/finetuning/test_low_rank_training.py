"""Low-rank training: what is merged is what was trained, and nothing of it stays behind."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn

from actkit.core.train.training import train
from actkit.finetuning.adapters import AdaptedLayer, Lora, parse_adapter
from actkit.finetuning.low_rank_training import train_adapter, train_low_rank
from actkit.testing import tiny_batches, tiny_model

pytest.importorskip("peft")


def tuned(kind: str, **settings: Any) -> tuple[Any, Any]:
    model, batches = settings.pop("model", None) or tiny_model(kind), tiny_batches(kind)
    defaults: dict[str, Any] = {"roles": ("up", "down"), "rank": 2, "steps": 6, "learning_rate": 1e-2}
    return model, train_low_rank(model, batches, validation=list(batches), progress=False, **{**defaults, **settings})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_merged_model_is_the_one_that_was_validated(kind: str) -> None:
    model, trained = tuned(kind)
    assert trained.validation < trained.history[0].validation
    check = train(model, tiny_batches(kind), validation=tiny_batches(kind), steps=1, progress=False)
    assert check.history[0].validation == pytest.approx(trained.validation, rel=1e-5)
    assert trained.trainable == 2 * 2 * 2 * (16 + 24)  # layers, matrices, rank, their sides
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_blocks_may_have_ranks_of_their_own() -> None:
    model, trained = tuned("llama", ranks={1: 5})
    assert trained.trainable == 2 * (2 + 5) * (16 + 24)  # matrices, the ranks of two layers, their sides
    check = train(model, tiny_batches("llama"), validation=tiny_batches("llama"), steps=1, progress=False)
    assert check.history[0].validation == pytest.approx(trained.validation, rel=1e-5)


def test_a_16_bit_model_is_trained_in_float32_and_stays_in_16_bits() -> None:
    model, _ = tuned("llama", model=tiny_model("llama").bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    before = tiny_model("llama").bfloat16()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed == {f"model.layers.{i}.mlp.{n}_proj.weight" for i in (0, 1) for n in ("up", "down")}


def test_what_was_frozen_stays_frozen_and_a_failure_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match="learning_rate"):
        tuned("llama", model=model, learning_rate=-1.0)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank: 0 was given"),
        ({"ranks": {2: 4}}, "ranks: {2: 4} were given; give blocks of 0 to 1"),
        ({"ranks": {0: 0}}, "each a rank of 1 or more"),
        ({"alpha": 0.0}, "alpha: 0.0 was given"),
        ({"roles": ("layer",)}, "roles: layer were given; the blocks of this model have down, gate"),
        ({"roles": ()}, "roles: none were given"),
        ({"resume": True}, "resume: the state of an adapter's training is not kept"),
        ({"trainable": "*"}, "trainable: adapters alone are trained"),
        ({"merge": False}, "merge: False was given without out="),
        ({"model": tiny_model("mixtral")}, "3-D parameters"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuned("llama", **settings)


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'actkit\[finetune\]'"):
        tuned("llama")


class Named(nn.Module):
    """A net with what can train whole and what cannot."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.tied, self.half, self.other_head = nn.Linear(4, 8), nn.Linear(2, 2).half(), nn.Linear(2, 2)
        self.tied.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.first(x)).relu())


def numbers(seed: int) -> list[dict[str, torch.Tensor]]:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(seed))
    return [{"x": x, "labels": (x[:, 0] > x[:, 1]).long()}]


def test_modules_that_train_whole_are_the_models_own_afterwards() -> None:
    model = Named()
    del model.tied, model.half
    before, norm = copy.deepcopy(model.state_dict()), model.norm
    settings: dict[str, Any] = {"layers": {"first": AdaptedLayer(2, 2.0)}, "steps": 8, "learning_rate": 3e-2}
    trained = train_adapter(
        model,
        numbers(1),
        validation=numbers(2),
        also=["norm"],
        learning_rates={"norm.*": 0.1},
        progress=False,
        **settings,
    )
    assert trained.validation < trained.history[0].validation and trained.trainable == 2 * (4 + 8) + 16
    assert model.norm is norm and model.norm.weight.requires_grad
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"first.weight", "norm.weight", "norm.bias"}
    check = train(model, numbers(1), validation=numbers(2), steps=1, progress=False)
    assert check.history[0].validation == pytest.approx(trained.validation, rel=1e-5)
    with pytest.raises(ValueError, match="learning_rate"):
        train_adapter(model, numbers(1), validation=numbers(2), also=["norm"], **{**settings, "learning_rate": -1.0})
    assert model.norm is norm


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "no module of the model with parameters"),
        ("first", "first is adapted already"),
        ("tied", "tied to one elsewhere"),
        ("half", "kept in torch.float16"),
        ("head", "other_head ends alike"),
    ],
)
def test_what_cannot_train_whole_is_refused(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^also: .*{message}"):
        train_adapter(
            Named(), numbers(1), validation=numbers(2), layers={"first": AdaptedLayer(2, 2.0)}, also=[path], steps=1
        )


def test_patterns_name_modules_and_not_what_is_inside_of_them() -> None:
    model = nn.ModuleDict({"head": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "body": nn.Linear(2, 2)})
    assert Lora(also=("*head*",)).whole(model) == ("head",)
    assert parse_adapter("lora:also=[head.1, body]").whole(model) == ("head.1", "body")
    with pytest.raises(ValueError, match="'\\*tail' fits no module"):
        Lora(also=("*tail",)).whole(model)
