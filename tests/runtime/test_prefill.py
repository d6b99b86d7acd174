"""Prompts that are read dense: the logits are those of the model without its selections, which later tokens keep."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actkit.core.ground.errors import RecipeError, UnsupportedModelError
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.prefill import decoding_only, dense_prompt
from actkit.core.measure.generation import _Transformers, generate_ids
from actkit.core.measure.summary import summarise
from actkit.core.recipe.recipe import Recipe
from actkit.core.recipe.runner import apply
from actkit.core.store.card import card_of
from actkit.core.store.checkpoint import load, save
from actkit.runtime.decoder import Decoder
from actkit.runtime.packed import open_packed
from actkit.runtime.packing import export_packed
from actkit.sparsity.r_sparse.r_sparse import RSparse
from actkit.sparsity.sparsing_law.perplexity_sparsity import PerplexitySparsity
from actkit.sparsity.teal import Teal
from actkit.sparsity.wina.wina import Wina

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
}
IDS = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(0))
METHODS = {
    "teal": Teal(prefill="dense"),
    "teal, top k": Teal(prefill="dense", mode="top_k"),
    "wina": Wina(prefill="dense", norms="each"),
    "r_sparse": RSparse(prefill="dense", alpha=0.5),
    "ppl_sparsity": PerplexitySparsity(prefill="dense", cett=0.5, sample=64),
}


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def sparse(method: Any) -> Any:
    return apply(llama(), method, [{"input_ids": IDS}], progress=False).model


def plain(model: Any, ids: Any = IDS, cache: Any = None) -> Any:
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True)


def expected(model: Any, steps: int = 3) -> list[Any]:
    """Logits after a prompt that was read by the original, and after tokens that the sparse model reads then."""
    output = plain(llama())
    found = [output.logits[0, -1]]
    for token in IDS[0, :steps]:
        output = plain(model, token.view(1, 1), output.past_key_values)
        found.append(output.logits[0, -1])
    return found


@pytest.mark.parametrize("name", METHODS)
def test_the_prompt_is_dense_and_what_follows_is_sparse(name: str) -> None:
    model = sparse(METHODS[name])
    wanted = expected(model)
    assert (plain(model).logits[0, -1] - wanted[0]).norm() > 1e-2 * wanted[0].norm()  # a forward pass is sparse
    for read in (_Transformers(model), Decoder(model, threads=1)):
        for number, new in enumerate([IDS[0].tolist(), *([token] for token in IDS[0, :3].tolist())]):
            torch.testing.assert_close(read(new), wanted[number], rtol=1e-4, atol=1e-4)
    assert len(decoding_only(model)) == sum(isinstance(module, ActLinear) for module in model.modules())


def test_every_logit_of_a_prompt_and_of_what_is_measured() -> None:
    """Longer than a chunk by one token, which is no step; two tokens are a prompt too, and one is none."""
    model = sparse(Teal(prefill="dense"))
    ids = torch.randint(300, (1, 513), generator=torch.Generator().manual_seed(1))
    with Decoder(model, threads=1) as decoder:
        found = decoder.all_logits(ids[0].tolist(), as_prompt=True)
        torch.testing.assert_close(found, plain(llama(), ids).logits[0], rtol=1e-4, atol=1e-4)
        decoder.reset()
        torch.testing.assert_close(decoder(ids[0].tolist()), found[-1], rtol=1e-4, atol=1e-4)
        decoder.reset()
        measured = decoder.all_logits(IDS[0].tolist())
        torch.testing.assert_close(measured, plain(model).logits[0], rtol=1e-4, atol=1e-4)
        for length, read_by in ((2, llama()), (1, model)):
            decoder.reset()
            ids = IDS[:, :length]
            torch.testing.assert_close(
                decoder(ids[0].tolist()), plain(read_by, ids).logits[0, -1], rtol=1e-4, atol=1e-4
            )


def test_only_its_own_layers_are_dense() -> None:
    """One selection for decoding only beside one for all tokens, in layers that would be packed as one matrix."""
    model = sparse(Teal())
    for block in model.model.layers:
        block.self_attn.q_proj.select.prefill = block.mlp.down_proj.select.prefill = "dense"
    by_hand = sparse(Teal())
    for block in by_hand.model.layers:
        block.self_attn.q_proj.select = block.mlp.down_proj.select = None
    wanted = plain(by_hand).logits[0]
    with Decoder(model, threads=1) as decoder:
        found = decoder.all_logits(IDS[0].tolist(), as_prompt=True)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with dense_prompt(model, 20):
        assert torch.equal(plain(model).logits[0], wanted)
    assert len(decoding_only(model)) == 4  # as before


def test_it_is_saved_shown_and_said(tmp_path: Any) -> None:
    model = sparse(Teal(prefill="dense"))
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert len(decoding_only(loaded)) == 14
    assert load(save_again(loaded, tmp_path)).model.layers[0].mlp.up_proj.select.prefill == "dense"
    shown = summarise(loaded)
    assert shown.linears == {"dense, inputs selected by threshold in decoding only": 14}
    assert shown.recipe[0]["teal"]["prefill"] == "dense"
    note = "14 linear layers select inputs in decoding only, and read all of them in a prompt"
    assert any(line.startswith(note) for line in card_of(loaded).notes)
    assert note in (tmp_path / "saved" / "README.md").read_text()
    written = list(generate_ids(loaded, IDS, max_new_tokens=6, end=()))
    with Decoder(loaded, threads=1) as decoder:
        assert list(decoder.generate(IDS, max_new_tokens=6, end=())) == written
    export_packed(loaded, tmp_path / "packed", threads=1)
    with Decoder(open_packed(tmp_path / "packed"), capacity=64) as decoder:
        assert list(decoder.generate(IDS, max_new_tokens=6, end=())) == written


def save_again(model: Any, folder: Any) -> Any:
    save(model, folder / "again")
    return folder / "again"


def test_a_recipe_without_it_is_saved_as_before(tmp_path: Any) -> None:
    """Folders of earlier versions say nothing of it."""
    save(sparse(Teal()), tmp_path / "saved")
    assert '"prefill": "sparse"' not in json.dumps(
        json.loads((tmp_path / "saved" / "actkit.json").read_text())["edits"]
    )
    assert decoding_only(load(tmp_path / "saved")) == []


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"rtn": {"prefill": "dense"}}, "prefill: no such setting"),
        ({"teal": {"sparsity": 0.0, "prefill": "dense"}}, "sparsity=0, which drops nothing"),
        ({"r_sparse": {"sparsity": 0.0, "prefill": "dense"}}, "sparsity=0, which drops nothing"),
        ({"ppl_sparsity": {"cett": 0.0, "prefill": "dense"}}, "cett=0, which drops nothing"),
        ({"wina": {"prefill": "both"}}, "'both' was given"),
    ],
)
def test_refused(recipe: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.parse({"actkit": 1, "transforms": [recipe]})


def test_a_model_without_a_cache_is_refused() -> None:
    """It reads its prompt again with every token: which of them is sparse it cannot tell."""
    model = sparse(Teal(prefill="dense"))
    model.register_forward_hook(lambda module, args, output: setattr(output, "past_key_values", None))
    with pytest.raises(UnsupportedModelError, match="keeps no cache"):
        _Transformers(model)(IDS[0].tolist())
