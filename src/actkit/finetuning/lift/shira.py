"""LIFT's first mask, kept for the whole training, through peft's SHiRA: a sparse adapter that peft saves and merges.

    W x + S x,   S the trained values at the k = r (m + n) entries of the mask

SHiRA (2024, arXiv:2406.13175) trains the entries of a fixed mask beside a frozen weight; here that is the mask of LIFT
(2025, arXiv:2506.00772). `pip install 'actkit[finetune]'`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from actkit.finetuning.lift.lift import Lift
from actkit.finetuning.lift.principal import principal_mask


def lift_shira(
    model: nn.Module, lora_rank: int = 128, rank_filter: int = 128, include: Sequence[str] | None = None
) -> Any:
    """Put peft's SHiRA with the masks of LIFT beside the linear layers of a model.

    Args:
        model: of float32; peft changes it in place.
        lora_rank: r, which says how many entries.
        rank_filter: R, of the low-rank part.
        include: patterns of the weights that are trained; None for those of all linear layers but the head.

    Returns:
        peft's model; only the values of the adapter train, from 0.

    Raises:
        ImportError: peft is missing.
        ValueError: no layer fits, or a rank is out of bounds.
    """
    try:
        from peft import ShiraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("lift_shira: peft is missing; pip install 'actkit[finetune]'.") from error
    names = Lift(include=None if include is None else tuple(include)).trainable(model)
    modules = dict(model.named_modules())
    paths = [name.removesuffix(".weight") for name in names]
    others = [path for path in paths if not isinstance(modules[path], nn.Linear)]
    if others:
        raise ValueError(
            f"include: {', '.join(others[:3])} is no torch.nn.Linear, which SHiRA takes alone; leave it out."
        )
    config = ShiraConfig(r=lora_rank, target_modules=paths, init_weights=True)

    def chosen(base: Any, r: int, **_: Any) -> Tensor:
        mask = principal_mask(base.weight, rank_filter, lora_rank=r)
        return mask.to(base.weight.dtype)

    config.mask_fn = chosen
    return get_peft_model(model, config)
