"""RePaViT: MLPs with idle channels for training, folded into three small matrices (2025, arXiv:2505.21847)."""
