"""The adapter `pyra`: low-rank changes beside query, key and value, PYRA's vectors and the head, all else frozen.

    LoRA (q, k, v)  +  w_r, w_d and the norm of every modulator  +  the classifier

When to use it: on a model that `merge_tokens` with `pyra: true` changed, to train it for a task of your own.
Cost: that of low-rank training, on fewer tokens.
Settled here: one learning rate for all that trains, unless `learning_rates` says another for '*.modulator.*'. In the
release PYRA's own rate is keyed on a name that its parameters do not have, so that they train at the common one too.
Our own reading: changes are not scaled (alpha = rank), as in the release; its dropout inside LoRA is left out.
"""

from __future__ import annotations

from actkit.core.model.parts import LinearRole
from actkit.finetuning.adapters import Lora


class Pyra(Lora):
    """LoRA beside query, key and value, with the modulators and the head of a vision transformer.

    Attributes:
        roles: of the layers in the blocks.
        also: modules that train whole, by patterns of their paths.
    """

    roles: tuple[LinearRole, ...] | None = ("query", "key", "value")
    also: tuple[str, ...] = ("*.modulator", "*classifier")

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank
