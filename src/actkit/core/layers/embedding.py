"""An embedding whose table is stored in few bits, or whose rows are rotated: only those looked up are computed with.

A head that is tied to the embedding shares the stored table: an `ActLinear` with the same `storage`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from actkit.core.ground import registry
from actkit.core.ground.errors import CoverageError
from actkit.core.layers.hadamard import Rotation
from actkit.core.layers.weights import WeightStorage


class QuantizedEmbedding(nn.Module):
    """Looks up rows of a stored table; ids [...] -> [..., channels].

    Args:
        table: [entries, channels], its groups along the channels.
        factor: that every row is multiplied by, as in Gemma.
        padding_idx: as in nn.Embedding, for whoever reads it.
        rotation: of the rows; None for none.
    """

    decodes_as: ClassVar[str] = "quantized_embedding"

    def __init__(
        self,
        table: WeightStorage,
        factor: float = 1.0,
        padding_idx: int | None = None,
        rotation: Rotation | None = None,
    ) -> None:
        super().__init__()
        self.storage, self.factor, self.padding_idx, self.rotation = table, factor, padding_idx, rotation
        self.num_embeddings, self.embedding_dim = table.shape

    @classmethod
    def of(cls, embedding: nn.Module, table: WeightStorage, rotation: Rotation | None = None) -> QuantizedEmbedding:
        """Make an embedding that looks up another table as a given one does.

        Args:
            embedding: an nn.Embedding, transformers' scaled one, or one of this class.
            table: in place of its weight.
            rotation: behind it; None for that of the embedding.

        Raises:
            CoverageError: the embedding computes something else.
        """
        if isinstance(embedding, cls):
            rotation = embedding.rotation if rotation is None else rotation
            return cls(table, embedding.factor, embedding.padding_idx, rotation).train(embedding.training)
        factor = float(getattr(embedding, "scalar_embed_scale", 1.0))
        ids = torch.arange(min(3, len(embedding.weight)))  # type: ignore[arg-type]
        weight: Tensor = embedding.weight.detach()  # type: ignore[union-attr, operator, assignment]
        expected = weight[ids] * torch.tensor(factor, dtype=weight.dtype)
        with torch.no_grad():
            if not isinstance(embedding, nn.Embedding) or not torch.equal(embedding(ids.to(weight.device)), expected):
                raise CoverageError(
                    f"embedding: a {type(embedding).__name__} computes something else than the rows of its weight "
                    f"times a number; leave it out (embedding: null)."
                )
        return cls(table, factor, embedding.padding_idx, rotation).train(embedding.training)

    @property
    def weight(self) -> Tensor:
        """The table [entries, channels], widened whole; for code that reads it from outside."""
        return self.storage.dequantize()

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.storage.look_up(ids.flatten()).view(*ids.shape, self.embedding_dim)
        if self.factor != 1.0:
            rows = rows * torch.tensor(self.factor, dtype=rows.dtype, device=rows.device)
        return rows if self.rotation is None else self.rotation(rows)

    def spec(self) -> dict[str, Any]:
        """The JSON arguments from which `from_spec` rebuilds the structure."""
        return {
            "entries": self.num_embeddings,
            "channels": self.embedding_dim,
            "dtype": str(self.storage.dtype).removeprefix("torch."),
            "table": self.storage.spec(),
            "factor": self.factor,
            "padding_idx": self.padding_idx,
            "rotation": None if self.rotation is None else self.rotation.spec(),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], original: nn.Module | None = None) -> QuantizedEmbedding:
        """An embedding of the right structure whose values come from a weights file."""
        shape = (spec["entries"], spec["channels"])
        stored = spec["table"]
        table = registry.weight_class(stored["kind"]).from_spec(stored, shape, getattr(torch, spec["dtype"]))
        rotation = spec.get("rotation")  # folders of earlier versions say nothing of it
        turned = None if rotation is None else Rotation.from_spec(rotation)
        return cls(table, spec["factor"], spec["padding_idx"], turned)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.storage.describe()}"
