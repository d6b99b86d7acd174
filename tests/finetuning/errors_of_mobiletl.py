"""How a user meets the errors of `mobiletl`: one function per way, which raises it."""

from __future__ import annotations

from torch import nn

from actkit.finetuning.mobiletl import MobileTL
from error_proofs import proof

proof(lambda p: MobileTL(blocks=2).attach(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))))
