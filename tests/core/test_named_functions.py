"""Attention and experts by functions of one's own: nobody decodes, exports or saves them as something else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.masking_utils import eager_mask

import actkit
from actkit import verbs
from actkit.core.forward.batch import check_batch
from actkit.core.ground.errors import CheckpointError, DataError, ExportError, UnsupportedModelError
from actkit.core.measure.decoding import choose_engine
from actkit.core.measure.generation import generate_ids
from actkit.core.store.checkpoint import check_savable, save
from actkit.formats.export import export
from actkit.runtime.decoder import Decoder
from actkit.testing.models import tiny_model

IDS = torch.tensor([[3, 5, 7, 11]])


def uniform(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Every token takes the mean of all before it, and softmax is nowhere."""
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    count = torch.arange(1, value.shape[2] + 1)[:, None]
    mixed = value.cumsum(2) / count
    return mixed[:, :, -query.shape[2] :].transpose(1, 2).contiguous(), None


def first_only(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return hidden


@pytest.fixture
def registered() -> Iterator[None]:
    AttentionInterface.register("uniform", uniform)
    ExpertsInterface.register("first_only", first_only)
    yield
    for interface, name in ((AttentionInterface, "uniform"), (ExpertsInterface, "first_only")):
        interface._global_mapping.pop(name)
    AttentionMaskInterface._global_mapping.pop("uniform", None)


def own_attention() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=40, max_position_embeddings=32, initializer_range=0.3)
    return LlamaForCausalLM._from_config(config, attn_implementation="uniform").eval()


WORDS = r"its attention is computed by 'uniform' \(\S*test_named_functions\.uniform\)"


def test_no_decoder_takes_its_name_for_softmax(registered: None) -> None:
    model = own_attention()
    assert "computed by 'uniform'" in str(Decoder.supports(model))
    with pytest.raises(UnsupportedModelError, match=WORDS):
        Decoder(model)
    engine = choose_engine(model, capacity=12)
    assert engine.decoder is None and "computed by 'uniform'" in engine.reason
    expected = IDS
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat((expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    found = generate_ids(model, IDS[0].tolist(), max_new_tokens=6, end=(), decoder=engine.decoder)
    assert list(found) == expected[0, 4:].tolist()
    model.set_attn_implementation("eager")
    assert Decoder.supports(model) is None


def test_another_function_under_a_known_name(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", uniform)
    model = build("llama")
    assert re.search(r"computed by 'sdpa' \(\S*test_named_functions\.uniform\)", str(Decoder.supports(model)))
    monkeypatch.undo()
    assert Decoder.supports(model) is None


def test_nobody_saves_or_exports_it(registered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = own_attention()
    monkeypatch.setattr(verbs.runner, "apply", lambda *_, **__: pytest.fail("work was done before the refusal"))
    monkeypatch.setattr(verbs, "evaluate", lambda *_, **__: pytest.fail("work was done before the refusal"))
    for attempt in (
        lambda: save(model, tmp_path / "out"),
        lambda: verbs.apply_and_save(model, "rtn", tmp_path / "out"),
        lambda: actkit.train(model, [{"input_ids": IDS}], validation=[{"input_ids": IDS}], out=tmp_path / "out"),
        lambda: actkit.optimize(model, data="random", out=tmp_path / "report"),
    ):
        with pytest.raises(CheckpointError, match=rf"save: .*{WORDS}; .*set_attn_implementation"):
            attempt()
    for format in ("compressed-tensors", "gguf"):
        with pytest.raises(ExportError, match=WORDS):
            export(model, tmp_path / "out", format, proof=False)
    with pytest.raises(ExportError, match=WORDS):
        verbs.export(model, tmp_path / "out", measure=True, proof=False)
    assert not (tmp_path / "out").exists()
    model.set_attn_implementation("sdpa")
    save(model, tmp_path / "out")


def test_experts_of_ones_own(registered: None, tmp_path: Path) -> None:
    model: Any = tiny_model("mixtral")
    check_savable(model)
    for name in (*ALL_EXPERTS_FUNCTIONS, "eager"):
        model.config._experts_implementation_internal = name
        if name != "first_only":
            check_savable(model)
    model.set_experts_implementation("first_only")
    with pytest.raises(CheckpointError, match=r"its experts are computed by 'first_only' .*set_experts_implementation"):
        save(model, tmp_path / "out")


def test_padding_is_refused_where_no_mask_is_made(registered: None) -> None:
    """transformers gives such a function no mask at all; with a mask function of its own it does."""
    model = own_attention()
    padded = {"input_ids": IDS, "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    check_batch(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    words = r"data: a batch is padded, .* no mask for the attention 'uniform'.*AttentionMaskInterface"
    with pytest.raises(DataError, match=words):
        check_batch(model, padded)
    with pytest.raises(DataError, match=words):
        actkit.evaluate(model, [padded])
    AttentionMaskInterface.register("uniform", eager_mask)
    check_batch(model, padded)
    for known in ("eager", "sdpa"):
        model.set_attn_implementation(known)
        check_batch(model, padded)


class Doubled(nn.Linear):
    """A layer whose weights do not tell what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_module_that_was_put_in_by_hand_is_not_saved_as_another(tmp_path: Path) -> None:
    model = build("llama")
    model.model.layers[0].mlp.up_proj = Doubled(16, 32, bias=False)
    with pytest.raises(CheckpointError, match=r"a Doubled stands at model\.layers\.0\.mlp\.up_proj"):
        save(model, tmp_path / "out")
