"""AdaDim: the axis of groups chosen layer by layer, and the map behind it (2023, arXiv:2309.15531)."""
