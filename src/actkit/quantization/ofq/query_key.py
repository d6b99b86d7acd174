"""Attention by the product of query and key weights: scores = x A_h x^T + x c_h, A_h = Wq_h^T Wk_h, c_h = Wk_h^T bq_h.

The part of OFQ (2023, arXiv:2302.02210) that keeps rounded query and key weights from exciting one another: their
product is rounded as one weight, and the input once for all that read it. It exists for attention whose scores are
products of two linear layers of one tensor, with a key head for each query head, and no rotary embedding.

Settled here: c_h stands for the bias of the queries, as a vector of its own in float; the release drops it, and so does
`bias="drop"`. The bias of the keys adds the same to all scores of a query, and vanishes in the softmax.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from actkit.core.forward.batch import first_tensor
from actkit.core.ground import registry
from actkit.core.ground.errors import CoverageError
from actkit.core.layers.latent_product import LatentProduct
from actkit.core.layers.linear import ActLinear
from actkit.core.layers.operand_rounding import OperandRounding
from actkit.core.layers.rounded_inputs import RoundedInputs
from actkit.core.layers.weights import DenseWeight
from actkit.core.model.parts import Attention, Block
from actkit.core.model.sites import Site

Bias = Literal["keep", "drop"]


class QueryKeyAttention(nn.Module):
    """Attention over a whole input, in place of one of transformers' vision transformers.

    Args:
        product: [heads * in, in], x -> A_h x for all heads.
        value: [heads * head size, in].
        output: [out, heads * head size].
        offset: c, [heads, in], or None.
        inputs: rounds what product and value read, and the other side of the scores; None for nothing.
        products: rounds the products; None for nothing.
        operands: rounds the values and the weights.
        scaling: of the scores.
        dropout: of the weights.

    Shapes: [batch, tokens, in] -> ([batch, tokens, out], weights [batch, heads, tokens, tokens]).
    """

    linear_inputs: ClassVar[Any] = (
        ("attention.input", ("product", "v_proj")),
        ("attention.mixed", ("o_proj",)),
    )

    def __init__(
        self,
        product: Any,
        value: Any,
        output: Any,
        offset: Tensor | None,
        inputs: RoundedInputs | None = None,
        products: RoundedInputs | None = None,
        operands: OperandRounding | None = None,
        scaling: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.product, self.v_proj, self.o_proj = product, value, output
        self.offset = None if offset is None else nn.Parameter(offset)
        self.inputs, self.products = inputs, products
        self.operands = OperandRounding({}, value.out_features) if operands is None else operands
        self.scaling, self.dropout = scaling, dropout

    @property
    def heads(self) -> int:
        """How many heads there are."""
        return self.product.out_features // self.product.in_features

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        """Attend; of the settings of transformers none is used."""
        x = hidden_states if self.inputs is None else self.inputs(hidden_states)
        value = self.operands.heads("value", self.v_proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2))
        products = self.product(x)  # A_h x of each token: [batch, tokens, heads * in]
        products = products if self.products is None else self.products(products)
        keys = products.unflatten(2, (self.heads, -1)).transpose(1, 2)
        mask = attention_mask
        if self.offset is not None:  # the same for all queries: [batch, heads, 1, tokens]
            added = (x @ self.offset.mT).mT[:, :, None] * self.scaling
            mask = added if mask is None else _joined(mask, added)
        given = {"scaling": self.scaling, "dropout": self.dropout if self.training else 0.0, "is_causal": False}
        mixed, weights = self.operands.attend(self, x[:, None].expand_as(keys), keys, value, mask, **given)
        return self.o_proj(mixed.flatten(2)), weights

    @classmethod
    def of(
        cls,
        block: Block,
        grid: Any,
        *,
        value: nn.Module | None = None,
        output: nn.Module | None = None,
        bias: Bias = "keep",
    ) -> QueryKeyAttention:
        """Make one of the attention of a block, which rounds nothing but its product so far.

        Args:
            block: whose attention has a query and a key layer.
            grid: that the product is seen through.
            value: in place of its value layer; None keeps that.
            output: in place of its output layer; None keeps that.
            bias: whether the bias of the queries is kept.

        Raises:
            CoverageError: the product does not exist for it, or it computes something else.
        """
        reason = why_no_product(block)
        attention = block.attention
        if reason is not None:
            raise CoverageError(f"{block.path}: {reason}; give query_key: false.")
        assert attention is not None and attention.query is not None and attention.key is not None
        assert attention.value is not None
        query, key = (each.weight.detach().clone() for each in (attention.query, attention.key))
        offset = None
        if attention.query.bias is not None:
            vectors = attention.query.bias.detach().unflatten(0, (attention.heads, 1, -1))
            offset = (vectors @ key.unflatten(0, (attention.heads, -1)))[:, 0]
        module: Any = attention.module
        product = LatentProduct(query, key, attention.heads, grid)
        scaling = float(getattr(module, "scaling", attention.head_dim**-0.5))
        dropout = float(getattr(module, "attention_dropout", 0.0))
        exact = ActLinear(DenseWeight(product.latent().detach()))
        plain = cls(exact, attention.value.module, attention.output.module, offset, scaling=scaling)
        _check_function(plain, attention)
        kept = offset if bias == "keep" else None
        value, output = value or attention.value.module, output or attention.output.module
        made = cls(ActLinear(product), value, output, kept, scaling=scaling, dropout=dropout)
        return made.train(module.training)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments."""
        return {
            **{name: getattr(self, name).spec() for name in ("product", "v_proj", "o_proj", "operands")},
            **{name: None if (each := getattr(self, name)) is None else each.spec() for name in ("inputs", "products")},
            "offset": self.offset is not None,
            "scaling": self.scaling,
            "dropout": self.dropout,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> QueryKeyAttention:
        """An attention of the right structure whose values come from a weights file."""
        product, value, output = (ActLinear.from_spec(spec[name]) for name in ("product", "v_proj", "o_proj"))
        size = product.in_features
        offset = None
        if spec["offset"]:
            offset = torch.empty(product.out_features // size, size, dtype=product.storage.dtype)
        rounded: dict[str, Any] = {}
        for name, channels in (("inputs", size), ("products", product.out_features)):
            each = spec[name]
            rounded[name] = None if each is None else registry.inputs_class(each["kind"]).from_spec(each, channels)
        operands = OperandRounding.from_spec(spec["operands"])
        kept = {"scaling": spec["scaling"], "dropout": spec["dropout"]}
        return cls(product, value, output, offset, **rounded, operands=operands, **kept)


def _joined(mask: Tensor, added: Tensor) -> Tensor:
    """A mask with something else that is added to the scores."""
    if mask.dtype != torch.bool:
        return mask + added
    return added.expand(mask.shape[0], added.shape[1], *mask.shape[2:]).masked_fill(~mask, torch.finfo(added.dtype).min)


def why_no_product(block: Block) -> str | None:
    """Why the scores of a block's attention are no product x A x^T, or None.

    Args:
        block: of the anatomy.
    """
    attention = block.attention
    if attention is None:
        return "no attention is described here"
    if attention.query is None or attention.key is None or attention.value is None:
        return "query, key and value are one layer, whose product of query and key weights is not built here"
    if attention.heads != attention.key_value_heads:
        return (
            f"{attention.heads} query heads share {attention.key_value_heads} key heads (grouped queries), for which "
            f"the product of query and key weights is larger than both"
        )
    tap = block.taps.get(Site("attention.query", block.index))
    if tap is not None and tap.rotary:
        return "a rotary embedding stands between query and key weights, so that their product does not exist"
    module: Any = attention.module
    if getattr(module, "is_causal", True):
        return f"a {type(module).__name__} is not known to attend over whole inputs"
    return None


@torch.no_grad()
def _check_function(plain: QueryKeyAttention, attention: Attention) -> None:
    """Raise CoverageError if an attention computes something else than its parts say."""
    module = attention.module
    assert attention.query is not None
    size, weight = attention.query.in_features, attention.query.weight
    x = torch.linspace(-1, 1, 3 * size, dtype=weight.dtype, device=weight.device).cos().view(1, 3, size)
    training, trained = module.training, plain.training
    try:
        module.eval(), plain.eval()
        found, expected = plain(x)[0], first_tensor(module(x))
        same = found.shape == expected.shape and bool(
            (found.float() - expected.float()).abs().max() <= 0.02 * expected.float().abs().max()
        )
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        same = False
    finally:
        module.train(training), plain.train(trained)
    if not same:
        raise CoverageError(
            f"{attention.path}: a {type(module).__name__} computes something else than the softmax of products of its "
            f"query and key layers; give query_key: false."
        )
