"""Learned activation functions in the decoder, against transformers' own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from decoded import SHAPE
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.activations import Thresholded
from actkit.core.measure.decoding import choose_engine
from actkit.core.recipe.runner import apply
from actkit.functions.crrelu.crrelu import CRReLU
from actkit.functions.kat.group_rational import GroupRational
from actkit.functions.pangu_pi.add_nonlinearity import AddNonlinearity
from actkit.functions.pangu_pi.series import SeriesActivation
from actkit.functions.polycom.polynomials import PolyNorm, PolyReLU
from actkit.quantization.rtn import RoundToNearest
from actkit.runtime.decoder import Decoder
from actkit.runtime.packed import open_packed
from actkit.runtime.packing import export_packed

IDS = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(0))
UNITS = SHAPE["intermediate_size"]
FUNCTIONS: dict[str, Callable[[], nn.Module]] = {
    "rational A": lambda: GroupRational(UNITS, 8),
    "rational A, no shares": lambda: GroupRational(UNITS, 4, start="gelu", share="none"),
    "rational B, low degrees": lambda: GroupRational(UNITS, 2, (3, 2), start="gelu", kind="B", share="denominator"),
    "CRReLU": lambda: CRReLU(0.2),
    "CRReLU by channel": lambda: CRReLU(0.2, per_channel=True, channels=UNITS),
    "PolyReLU": lambda: PolyReLU(3),
    "PolyReLU by channel, order 9": lambda: PolyReLU(9, per_channel=True, channels=UNITS),
    "series": lambda: drawn(SeriesActivation("silu", 2, UNITS)),
    "series of GELUs, one pair": lambda: drawn(SeriesActivation("gelu", 4, start="paper", normalize=True)),
    "thresholded": lambda: Thresholded(GroupRational(UNITS, 8), 0.02),
}


def drawn(series: SeriesActivation) -> SeriesActivation:
    """Every term adds something."""
    with torch.no_grad():
        for each in series.parameters():
            each.add_(0.5 * torch.randn_like(each))
    return series


@pytest.fixture(autouse=True)
def dense_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models this small would read every prompt of these tests step by step."""
    monkeypatch.setattr("actkit.runtime.decoder.few_tokens", lambda *_: 2)


def model_with(make: Callable[[], nn.Module]) -> LlamaForCausalLM:
    """A small Llama whose gates have learned functions, each block's another one."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    for layer in model.model.layers:
        layer.mlp.act_fn = make()
        with torch.no_grad():
            for parameter in layer.mlp.act_fn.parameters():
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return model


def expected(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits[0]
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_steps_and_prompts_are_transformers(name: str, threads: int) -> None:
    model = model_with(FUNCTIONS[name])
    wanted = expected(model)
    with Decoder(model, capacity=32, threads=threads) as decoder:
        steps = torch.stack([decoder([token]) for token in IDS[0].tolist()])
        torch.testing.assert_close(steps, wanted, atol=2e-4, rtol=2e-4)
        decoder.reset()
        torch.testing.assert_close(decoder(IDS[0].tolist()), wanted[-1], atol=2e-4, rtol=2e-4)


def test_of_a_model_without_a_gate() -> None:
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**SHAPE)).eval()
    for layer in model.model.layers:
        layer.mlp.activation_fn = GroupRational(UNITS, 8, start="gelu")
    with Decoder(model, capacity=32) as decoder:
        found = torch.stack([decoder([token]) for token in IDS[0].tolist()])
    torch.testing.assert_close(found, expected(model), atol=2e-4, rtol=2e-4)


def test_the_decoder_is_what_text_is_written_with() -> None:
    engine = choose_engine(model_with(FUNCTIONS["rational A"]), capacity=32)
    assert engine.decoder is not None, engine.describe()
    engine.decoder.close()  # type: ignore[attr-defined]


def test_changed_coefficients_are_followed() -> None:
    model = model_with(FUNCTIONS["CRReLU"])
    with Decoder(model, capacity=32) as decoder:
        decoder(IDS[0].tolist())
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.act_fn.epsilon.fill_(-0.4)
        decoder.reset()
        decoder.follow_selections()
        torch.testing.assert_close(decoder(IDS[0].tolist()), expected(model)[-1], atol=2e-4, rtol=2e-4)


def test_several_texts_and_four_bits() -> None:
    model = model_with(FUNCTIONS["rational A"])
    apply(model, RoundToNearest(bits=4, group_size=32), progress=False)
    with Decoder(model, capacity=32) as decoder:
        alone = torch.stack([decoder([token]) for token in IDS[0].tolist()])
        torch.testing.assert_close(alone, expected(model), atol=5e-3, rtol=5e-3)
        texts = decoder.batch(2)
        for step, token in zip(alone, IDS[0].tolist()):
            torch.testing.assert_close(texts([token, token])[1], step, atol=5e-3, rtol=5e-3)


def test_a_packed_file_keeps_the_coefficients(tmp_path: Path) -> None:
    model = model_with(FUNCTIONS["rational A"])
    with Decoder(model, capacity=32) as decoder:
        wanted = decoder(IDS[0].tolist())
    export_packed(model, tmp_path / "packed")
    with Decoder(open_packed(tmp_path / "packed"), capacity=32) as decoder:
        torch.testing.assert_close(decoder(IDS[0].tolist()), wanted, atol=1e-5, rtol=1e-5)  # another number of threads


HAVE_NONE: list[Callable[[], nn.Module]] = [
    lambda: PolyNorm(3),
    lambda: GroupRational(UNITS, 8, (7, 6)),
    lambda: PolyReLU(10),
    lambda: SeriesActivation("silu", 5),
    lambda: SeriesActivation("tanh", 2),
]


def test_a_function_that_mixes_is_left_with_the_reason() -> None:
    engine = choose_engine(model_with(lambda: PolyNorm(3)), capacity=32)
    assert engine.name == "transformers" and "a PolyNorm mixes channels, and a unit is computed" in engine.reason


def test_the_gates_of_an_inserted_series() -> None:
    """As `add_nonlinearity` puts them in; with its shortcuts the model is left to transformers."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    apply(model, AddNonlinearity(series=2, ratio=None), progress=False)
    for layer in model.model.layers:
        drawn(layer.mlp.act_fn)
    with Decoder(model, capacity=32) as decoder:
        torch.testing.assert_close(decoder(IDS[0].tolist()), expected(model)[-1], atol=2e-4, rtol=2e-4)
    other = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    apply(other, AddNonlinearity(series=2, ratio=4), progress=False)
    assert choose_engine(other, capacity=32).name == "transformers"


@pytest.mark.parametrize("make", HAVE_NONE)
def test_what_has_no_curve_is_left_to_transformers(make: Callable[[], nn.Module]) -> None:
    model = model_with(make)
    with pytest.raises(UnsupportedModelError, match=r"the decoder computes silu, .* rational_a, rational_b, crrelu"):
        Decoder(model, capacity=32)
