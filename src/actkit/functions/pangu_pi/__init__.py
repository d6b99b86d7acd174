"""PanGu-pi (2023, arXiv:2312.17276): a series of activations, shortcuts beside attention, how alike tokens become."""
