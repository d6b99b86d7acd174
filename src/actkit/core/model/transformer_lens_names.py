"""TransformerLens' names of activations (as of its version 3.9), as names of our sites.

A name is taken if it means the same numbers; tensors keep our layouts (theirs put positions before heads). A name that
means another tensor is refused with the reason. `attn.hook_attn_scores` is the one that differs: theirs is minus
infinity at what a query does not read, ours is the product there.
"""

from __future__ import annotations

import re

SAME = {
    "hook_resid_pre": "block.input",
    "hook_resid_mid": "block.middle",
    "hook_resid_post": "block.output",
    "hook_attn_out": "attention.output",
    "hook_mlp_out": "mlp.output",
    "attn.hook_rot_q": "attention.query",
    "attn.hook_rot_k": "attention.key",
    "attn.hook_v": "attention.value",
    "attn.hook_attn_scores": "attention.scores",
    "attn.hook_pattern": "attention.weights",
    "attn.hook_z": "attention.mixed",
    "mlp.hook_pre": "mlp.preactivation",
    "mlp.hook_post": "mlp.hidden",
}
OTHER = {
    "ln1.hook_normalized": "it is before the norm's weight and bias, and attention.input after them",
    "ln2.hook_normalized": "it is before the norm's weight and bias, and mlp.input after them",
    "attn.hook_q": "it is before the rotary embedding; read layer.output of the layer that makes the queries, or "
    "attention.query (attn.hook_rot_q) behind it",
    "attn.hook_k": "it is before the rotary embedding; read layer.output of the layer that makes the keys, or "
    "attention.key (attn.hook_rot_k) behind it",
    "attn.hook_result": "it is one tensor for each head, of which attention.output is the sum",
    "mlp.hook_pre_linear": "it is the part that the gate is multiplied with; read layer.output of the up projection",
}
_NAME = re.compile(r"(?P<block>blocks\.[^.]+\.)?(?P<name>(?:ln1\.|ln2\.|attn\.|mlp\.)?hook_[a-z_]+)")


def our_name(text: str) -> str:
    """Return a site's own name of one of TransformerLens'.

    Args:
        text: 'blocks.3.hook_resid_post', 'attn.hook_z' or a pattern such as 'blocks.*.hook_mlp_out'; what is none of
            these is returned as it is.

    Raises:
        ValueError: it means another tensor than any site, or is not known.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        return text
    name = match["name"]
    if name in OTHER:
        raise ValueError(f"site: {name!r} of TransformerLens is no site here: {OTHER[name]}.")
    if name not in SAME:
        raise ValueError(f"site: {name!r} was given; of TransformerLens' names {', '.join(SAME)} are known here.")
    return (match["block"] or "") + SAME[name]
