"""Learned activation functions in the decoder, against transformers' own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoded import SHAPE
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

import actkit
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.activations import Thresholded
from actkit.core.layers.hidden_act import enter
from actkit.core.measure.decoding import choose_engine
from actkit.core.recipe.runner import apply
from actkit.functions.crrelu.crrelu import CRReLU
from actkit.functions.kat.group_rational import GroupRational
from actkit.functions.pangu_pi.add_nonlinearity import AddNonlinearity
from actkit.functions.pangu_pi.series import SeriesActivation
from actkit.functions.polycom.polynomials import PolyNorm, PolyReLU
from actkit.functions.polycom.ungate import Ungate
from actkit.functions.swap import swap
from actkit.quantization.rtn import RoundToNearest
from actkit.runtime.decoder import Decoder
from actkit.runtime.packed import open_packed
from actkit.runtime.packing import export_packed
from actkit.sparsity.cats.cats import Cats
from actkit.sparsity.spark.statistical_top_k import StatisticalTopK
from actkit.sparsity.wina.wina import Wina

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
    "PolyNorm": lambda: PolyNorm(3),
    "PolyNorm, order 8": lambda: PolyNorm(8, eps=0.01),
    "thresholded": lambda: Thresholded(GroupRational(UNITS, 8), 0.02),
    "thresholded PolyNorm": lambda: Thresholded(PolyNorm(3), 0.3),
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


def polynomials(kind: str, **changed: Any) -> nn.Module:
    """A small model whose MLPs have a PolyNorm: of a gate or without one, its config's or put in."""
    torch.manual_seed(0)
    enter("poly_norm")
    if kind == "ungated":
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, **changed)).eval()
        apply(model, Ungate(), progress=False)
    elif kind == "swapped":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, **changed)).eval()
        swap(model, "silu", "poly_norm")
    else:
        of, config = (LlamaForCausalLM, LlamaConfig) if kind == "gated" else (PhiForCausalLM, PhiConfig)
        model = of(config(**SHAPE, hidden_act="poly_norm", **changed)).eval()
    for module in model.modules():
        if isinstance(module, PolyNorm):
            with torch.no_grad():
                module.weight.mul_(1 + 0.3 * torch.randn_like(module.weight))
                module.bias.fill_(0.1)
    return model


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["gated", "without", "ungated", "swapped"])
def test_a_norm_over_the_units_of_all_threads(kind: str, threads: int) -> None:
    """Step by step, as a prompt, and among several texts; in one thread count twice the same bits."""
    model = polynomials(kind)
    wanted = expected(model)
    limit = 1e-5 * float(wanted.abs().max())
    with Decoder(model, capacity=32, threads=threads) as decoder:
        steps = torch.stack([decoder([token]) for token in IDS[0].tolist()])
        assert float((steps - wanted).abs().max()) <= limit
        decoder.reset()
        assert torch.equal(torch.stack([decoder([token]) for token in IDS[0].tolist()]), steps)
        decoder.reset()
        assert float((decoder(IDS[0].tolist()) - wanted[-1]).abs().max()) <= limit
        texts = decoder.batch(2)
        found = [texts([token, token])[1] for token in IDS[0].tolist()]
        assert float((torch.stack(found) - wanted).abs().max()) <= limit


@pytest.mark.parametrize("kind", ["gated", "ungated"])
def test_a_norm_under_what_skips_units(kind: str, tmp_path: Path) -> None:
    """Thresholds stand behind the norm, or at what a layer reads: its means are of all units, as in the model."""
    model, batches = polynomials(kind), [{"input_ids": IDS}]
    methods = [Wina(sparsity=0.3), *([Cats(sparsity=0.3)] if kind == "gated" else [])]
    apply(model, methods, batches, progress=False)
    wanted = expected(model)
    with Decoder(model, capacity=32, threads=2) as decoder:
        steps = torch.stack([decoder([token]) for token in IDS[0].tolist()])
        torch.testing.assert_close(steps, wanted, atol=2e-4, rtol=2e-4)
        decoder.reset()
        torch.testing.assert_close(decoder(IDS[0].tolist()), wanted[-1], atol=2e-4, rtol=2e-4)
    actkit.save(model, tmp_path / "saved")
    engine = choose_engine(actkit.load(tmp_path / "saved"), capacity=32)
    assert engine.decoder is not None, engine.describe()
    torch.testing.assert_close(engine.decoder(IDS[0].tolist()), wanted[-1], atol=2e-4, rtol=2e-4)
    engine.decoder.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["gated", "ungated"])
def test_a_norm_over_four_bits_and_packed(kind: str, tmp_path: Path) -> None:
    model = polynomials(kind)
    apply(model, RoundToNearest(bits=4, group_size=16), progress=False)
    with Decoder(model, capacity=32, threads=2) as decoder:
        found = torch.stack([decoder([token]) for token in IDS[0].tolist()])
        torch.testing.assert_close(found, expected(model), atol=5e-3, rtol=5e-3)
    export_packed(model, tmp_path / "packed")
    with Decoder(open_packed(tmp_path / "packed"), capacity=32) as decoder:
        again = torch.stack([decoder([token]) for token in IDS[0].tolist()])
    torch.testing.assert_close(again, found, atol=1e-4, rtol=1e-4)


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
    lambda: PolyNorm(9),
    lambda: GroupRational(UNITS, 8, (7, 6)),
    lambda: PolyReLU(10),
    lambda: SeriesActivation("silu", 5),
    lambda: SeriesActivation("tanh", 2),
]


def test_a_function_that_mixes_is_left_with_the_reason() -> None:
    engine = choose_engine(model_with(lambda: nn.Softmax(-1)), capacity=32)
    assert engine.name == "transformers" and "a Softmax mixes channels, and a unit is computed" in engine.reason


def test_a_norm_behind_a_statistical_top_k_is_left_with_the_reason() -> None:
    engine = choose_engine(model_with(lambda: StatisticalTopK(PolyNorm(3), 8)), capacity=32)
    assert engine.name == "transformers" and "a PolyNorm behind a statistical top-k" in engine.reason


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
