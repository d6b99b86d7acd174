"""Which engine decodes what: against transformers' own forward pass, and with plug-ins that are made up or broken."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from tiny_models import build
from torch import nn

from actkit.core.ground import registry
from actkit.core.ground.errors import RecipeError
from actkit.core.measure.decoding import choose_engine
from actkit.core.measure.generation import generate_ids
from actkit.core.recipe.runner import apply
from actkit.sparsity.wina.rotate_columns import RotateColumns

PROMPT = [3, 5, 7, 11]


class Doubled(nn.Linear):
    """A linear layer whose weights do not tell what it computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Mute:
    """A decoder that does not say what it supports."""


class Picky:
    """A decoder that supports everything, and then does not hold that many tokens."""

    threads = 1

    def __init__(self, model: nn.Module, *, capacity: int, decode_only: bool = False) -> None:
        self.capacity = capacity
        if capacity > 8:
            raise ValueError(f"capacity: {capacity} was given; give up to 8.")

    @staticmethod
    def supports(model: nn.Module) -> str | None:
        return None


def installed(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Let these be the decoders that packages have registered."""
    real = registry._entries
    own = {name: (EntryPoint(name, value, registry.DECODERS),) for name, value in values.items()}
    monkeypatch.setattr(registry, "_entries", lambda group: own if group == registry.DECODERS else real(group))


def own(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def peer(model: Any, new: int) -> list[int]:
    ids = torch.tensor([PROMPT])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    return output[0, len(PROMPT) :].tolist()


@pytest.mark.slow(reason="it compiles the decoder's kernels, unless an earlier run has left them")
def test_the_decoder_that_comes_with_actkit() -> None:
    model = build("llama")
    engine = choose_engine(model, capacity=20)
    assert (engine.name, engine.reason) == ("decoder", "") and engine.decoder is not None
    assert engine.describe() == f"decoder, {engine.decoder.threads} thread{'s' * (engine.decoder.threads > 1)}"
    assert list(generate_ids(model, PROMPT, max_new_tokens=16, end=(), decoder=engine.decoder)) == peer(model, 16)


def test_other_architectures_go_through_transformers() -> None:
    for kind in ("gpt2", "mixtral"):
        model = build(kind)
        engine = choose_engine(model, capacity=20)
        assert engine.decoder is None and engine.name == "transformers"
        words = f"its model_type is '{kind}'; docs/architectures.md lists what the decoder takes"
        assert engine.describe() == f"transformers ({words})"
        assert list(generate_ids(model, PROMPT, max_new_tokens=8, end=())) == peer(model, 8)
    plain = choose_engine(nn.Linear(2, 2), capacity=8)
    assert plain.decoder is None and plain.reason


def rotated(model: Any) -> None:
    apply(model, [RotateColumns()], [{"input_ids": torch.tensor([PROMPT])}], progress=False)


def doubled(model: Any) -> None:
    layer = Doubled(16, 32, bias=False)
    layer.load_state_dict(model.model.layers[1].mlp.up_proj.state_dict())
    model.model.layers[1].mlp.up_proj = layer


def hooked(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: 2 * output)


def hooked_before(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def patched(model: Any) -> None:
    before = model.model.norm.forward
    model.model.norm.forward = lambda x: 2 * before(x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rotated, "model.layers.0.input_layernorm is a RotatedNorm, whose forward pass no decoder calls"),
        (doubled, "model.layers.1.mlp.up_proj is a Doubled"),
        (hooked, "model.layers.0.mlp has a hook, which no decoder calls"),
        (hooked_before, "model.layers.0.mlp has a hook"),
        (patched, "model.norm has another forward pass than its class"),
    ],
)
def test_what_no_decoder_computes_goes_through_transformers(change: Any, words: str) -> None:
    model = build("llama")
    change(model)
    engine = choose_engine(model, capacity=12)
    assert engine.decoder is None and words in engine.reason and not engine.reason.endswith(".")


def test_hooks_of_transformers_only_record() -> None:
    model = build("llama")
    model(torch.tensor([PROMPT]), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())  # they stay behind
    assert choose_engine(model, capacity=12).name == "decoder"


def test_a_decoder_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actkit.runtime.decoder.psutil.virtual_memory", lambda: type("Memory", (), {"available": 10}))
    engine = choose_engine(build("llama"), capacity=12)
    assert engine.decoder is None and "do not fit into the 10 B that are free" in engine.reason


def test_no_decoder_and_several(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    assert choose_engine(build("llama"), capacity=8).describe() == "transformers (no decoder is installed)"
    installed(monkeypatch, cpu="actkit.runtime.decoder:Decoder", picky=own(Picky))
    assert isinstance(choose_engine(build("gpt2"), capacity=8).decoder, Picky)
    assert choose_engine(build("gpt2"), capacity=9).reason == (
        "its model_type is 'gpt2'; docs/architectures.md lists what the decoder takes; "
        "capacity: 9 was given; give up to 8"
    )


def test_a_broken_plug_in_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, gone="no_such_package.decoder:Decoder")
    with pytest.raises(RecipeError, match=r"actkit\.decoders: 'gone' \(no_such_package.* does not import"):
        choose_engine(build("llama"), capacity=8)
    installed(monkeypatch, mute=own(Mute))
    with pytest.raises(RecipeError, match=r"actkit\.decoders: 'mute' has no supports\(model\)"):
        choose_engine(build("llama"), capacity=8)
