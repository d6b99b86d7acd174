"""The context of a model is the longest sequence that it runs on, whatever its positions begin with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from actkit.core.forward.batch import check_batch
from actkit.core.forward.example import Inputs
from actkit.core.forward.limits import context_length
from actkit.core.ground.errors import DataError
from actkit.data import load_data

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
}
OWN: dict[str, dict[str, Any]] = {
    "longformer": {"attention_window": 4},
    "esm": {"position_embedding_type": "absolute", "mask_token_id": 3, "token_dropout": False},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "xmod": {"default_language": "en_XX"},
}
# These count positions from behind their padding token ...
OFFSET = (
    "roberta",
    "camembert",
    "xlm-roberta",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "xmod",
    "mpnet",
    "longformer",
    "data2vec-text",
    "esm",
    "ibert",
    "luke",
    "markuplm",
)
# ... these from 0, some with a table that is longer than the context.
PLAIN = ("bert", "electra", "distilbert", "deberta-v2", "nystromformer", "yoso", "opt", "biogpt", "gpt2", "openai-gpt")


def encoder(kind: str) -> Any:
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(kind, **SIZES, **OWN.get(kind, {}))).eval()


def runs(model: nn.Module, length: int) -> bool:
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, length), 5))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", [*OFFSET, *PLAIN])
def test_the_context_is_the_longest_sequence_that_runs(kind):
    model = encoder(kind)
    context = context_length(model)
    assert context == (18 if kind in OFFSET else 20)
    assert runs(model, context) and not runs(model, context + 1)
    assert load_data("random", model, sequences=1)[0]["input_ids"].shape == (1, context)
    assert Inputs.of(model).batch(1)["input_ids"].shape == (1, context)
    with pytest.raises(DataError, match=f"{context + 1} tokens, the model's context is {context}"):
        check_batch(model, {"input_ids": torch.full((1, context + 1), 5)})


def test_a_table_with_a_padding_index_whose_owner_does_not_count_from_it():
    """As in LXMERT: the first row is for padding, and yet the first token has it."""
    model = encoder("bert")
    model.embeddings.position_embeddings = nn.Embedding(20, 16, padding_idx=0)
    assert context_length(model) == 20 and runs(model, 20)
