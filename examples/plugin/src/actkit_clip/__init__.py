"""An example of a plug-in for actkit: one thing of each kind, around clipping the activations of MLPs."""

from actkit_clip.clip import Clip, Clipped
from actkit_clip.decoder import ClippedDecoder
from actkit_clip.function import SQUAREPLUS
from actkit_clip.headroom import Headroom, headroom
from actkit_clip.model import ClippedClassifier
from actkit_clip.rule import LimitPenalty

__all__ = [
    "SQUAREPLUS",
    "Clip",
    "Clipped",
    "ClippedClassifier",
    "ClippedDecoder",
    "Headroom",
    "LimitPenalty",
    "headroom",
]
