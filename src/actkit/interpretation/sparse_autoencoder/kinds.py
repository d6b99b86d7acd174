"""The kinds of sparse autoencoders by their names."""

from __future__ import annotations

from actkit.interpretation.sparse_autoencoder.autoencoder import SparseAutoencoder
from actkit.interpretation.sparse_autoencoder.gates import GatedAutoencoder, JumpReLUAutoencoder
from actkit.interpretation.sparse_autoencoder.top_k import (
    BatchTopKAutoencoder,
    MatryoshkaAutoencoder,
    TopKAutoencoder,
)

KINDS: dict[str, type[SparseAutoencoder]] = {
    cls.kind: cls
    for cls in (
        SparseAutoencoder,
        TopKAutoencoder,
        JumpReLUAutoencoder,
        GatedAutoencoder,
        BatchTopKAutoencoder,
        MatryoshkaAutoencoder,
    )
}
