"""Which tokens of a vision transformer are classes and which are patches, and its attention with weights formed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from actkit.core.edit.edits import ATTENTION, Configure, temporarily
from actkit.core.ground.errors import DataError, UnsupportedModelError
from actkit.core.model.anatomy import anatomy, has_row
from actkit.core.model.parts import attention_implementation, forms_weights


class Tokens:
    """Where images, class tokens and patches of a model are.

    Attributes:
        view: the anatomy of the model.
        image: the site of the images.
        patch: height and width of a patch.
        classes: tokens before the patches: one for each class of a ClassTokenViT, else 1.

    Args:
        model: a vision transformer.

    Raises:
        UnsupportedModelError: it is none, or has further tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        view = anatomy(model) if has_row(model) else None
        if view is None or view.architecture != "vit":
            raise UnsupportedModelError(
                f"model: a {type(model).__name__} was given; give a vision transformer of transformers (vit) or a "
                f"ClassTokenViT."
            )
        parameters = dict(model.named_parameters())
        if any(name.endswith("distillation_token") for name in parameters):
            raise UnsupportedModelError(
                f"model: {type(model).__name__} has a distillation token beside its class token; give a model without."
            )
        layers = [(path, module) for path, module in model.named_modules() if path.startswith(view.stem)]
        path, layer = next((path, module) for path, module in layers if isinstance(module, nn.Conv2d))
        several = [value.shape[1] for name, value in parameters.items() if name.endswith("embeddings.class_tokens")]
        self.view, self.image = view, f"layer.input:{path}"
        self.patch: tuple[int, int] = layer.kernel_size  # type: ignore[assignment]
        self.classes = several[0] if several else 1

    def grid(self, image: tuple[int, int], tokens: int) -> tuple[int, int]:
        """Return the rows and columns of patches.

        Args:
            image: its height and width.
            tokens: that came by, class tokens included.

        Raises:
            DataError: they are not class tokens and patches.
        """
        rows, columns = image[0] // self.patch[0], image[1] // self.patch[1]
        if tokens != self.classes + rows * columns:
            raise DataError(
                f"tokens: {tokens} came by, and {self.classes} class tokens and {rows * columns} patches are expected; "
                f"give a vision transformer whose tokens are these alone (that merges none, and has no others)."
            )
        return rows, columns


@contextmanager
def weights_formed(model: nn.Module) -> Iterator[None]:
    """Have a model form its attention weights as long as a context lasts.

    Args:
        model: of transformers.

    Raises:
        UnsupportedModelError: its attention is neither 'sdpa' nor 'eager'.
    """
    if forms_weights(model):
        yield
        return
    if not (attention_implementation(model) == "sdpa" and model._can_set_attn_implementation()):  # type: ignore[operator]
        raise UnsupportedModelError(
            f"model: the attention {attention_implementation(model)!r} of {type(model).__name__} forms no weights, of "
            f"which these maps are made; give a model whose attention is 'sdpa' or 'eager'."
        )
    with temporarily(model, [Configure(ATTENTION, "eager")]):
        yield


def between_0_and_1(x: Tensor) -> Tensor:
    """Scale the last dimension from its least value to its largest; where all are equal up to rounding, to 0.

    Args:
        x: [..., patches].
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    differ = high - low > 16 * torch.finfo(x.dtype).eps * high.abs()
    return torch.where(differ, (x - low) / (high - low).where(differ, 1), 0)
