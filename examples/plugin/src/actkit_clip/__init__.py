"""An example of a plug-in for actkit: one thing of each kind, around clipping the activations of MLPs."""

from actkit_clip.clip import Clip, Clipped
from actkit_clip.headroom import Headroom, headroom

__all__ = ["Clip", "Clipped", "Headroom", "headroom"]
