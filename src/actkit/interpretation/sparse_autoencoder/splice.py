"""A sparse autoencoder in a model: put what it makes of an activation in the activation's place.

    with intervene(model, {"blocks.3.block.output": Splice(autoencoder)}):                     x' = decode(encode(x))
    with intervene(model, {"blocks.3.block.output": Splice(autoencoder, keep="error")}):       x' = x, to the bit
    x' = decode(encode(x)) + kept,    kept of e = x - decode(encode(x)): nothing, e, x W or e - x W

When to use it: to see what the error of an autoencoder costs, or what a model does without some latents.
Cost: that of the autoencoder.
Settled here: with all of the error kept the values are those that stood there, to the bit, and gradients go through the
autoencoder and not through the error. `without` zeroes latents before they are decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.ground.fingerprint import model_fingerprint
from actkit.core.watch.site_changes import SiteChange
from actkit.core.watch.surrogates import with_gradient_of
from actkit.interpretation.sparse_autoencoder.autoencoder import SparseAutoencoder

if TYPE_CHECKING:
    from actkit.core.watch.intervene import At

Keep = Literal["nothing", "error", "linear", "rest"]


@dataclass(frozen=True, eq=False)
class Splice(SiteChange):
    """Puts the reconstruction of an autoencoder at a site.

    Attributes:
        autoencoder: of the width of the site.
        keep: what of its error stays: 'nothing', all of the 'error', what a linear map of the activation predicts of it
            ('linear'), or what that does not ('rest').
        linear: the map [channels, channels], so that x @ linear is the predicted error; for 'linear' and 'rest'.
        without: numbers of latents that are set to 0.
    """

    autoencoder: SparseAutoencoder
    keep: Keep = "nothing"
    linear: Tensor | None = None
    without: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep not in ("nothing", "error", "linear", "rest"):
            raise ValueError(f"keep: {self.keep!r} was given, allowed are nothing, error, linear and rest.")
        if (self.linear is not None) != (self.keep in ("linear", "rest")):
            raise ValueError(
                f"linear: give the map with keep='linear' or 'rest', and only then; keep is {self.keep!r}."
            )
        latents = self.autoencoder.latents
        wrong = next((each for each in self.without if not 0 <= each < latents), None)
        if wrong is not None:
            raise ValueError(f"without: {wrong} was given, and there are latents 0 to {latents - 1}.")

    def change(self, value: Tensor, at: At) -> Tensor:
        """Return what the autoencoder makes of the value. See `SiteChange.change`.

        Args:
            value: as in `__call__`.
            at: as in `__call__`.

        Raises:
            ValueError: the autoencoder is of another site or another width.
        """
        own = self.autoencoder.site
        if own is not None and own != str(at.site):
            raise ValueError(
                f"site: the autoencoder was trained on {own}, and it was given for {at.site}; name that site, or set "
                f"autoencoder.site = None if it is meant for both."
            )
        x = value.to(self.autoencoder.decoder.dtype)
        made = self.autoencoder(x)
        error = (x - made).detach()
        if self.without:
            latents = self.autoencoder.encode(x)
            chosen = latents.new_zeros(latents.shape[-1])
            chosen[list(self.without)] = 1
            made = made - (latents * chosen) @ self.autoencoder.decoder
        elif self.keep == "error":
            return with_gradient_of(value, made)
        if self.keep == "error":
            made = made + error
        elif self.linear is not None:
            predicted = (x @ self.linear.to(x)).detach()
            made = made + (predicted if self.keep == "linear" else error - predicted)
        return made.to(value.dtype)


def check_model(autoencoder: SparseAutoencoder, model: nn.Module) -> None:
    """Refuse a model that an autoencoder was not trained on.

    Args:
        autoencoder: one that knows its model (`train_autoencoder` and files of ours say it); others pass.
        model: that it is to be used with.

    Raises:
        UnsupportedModelError: the model is another one, or was changed since.
    """
    if autoencoder.model is not None and autoencoder.model != model_fingerprint(model):
        raise UnsupportedModelError(
            f"model: the autoencoder of {autoencoder.site} was trained on the activations of another model, or of this "
            f"one before it was changed; use that one, or set autoencoder.model = None if you mean it."
        )
