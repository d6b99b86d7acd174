"""Activation-sparse kernels: read only the weights of the inputs that count.

    packed = pack(weight)                                  once per layer
    y = sparse_linear(x, packed, threshold=0.1)            one layer, one or two tokens
    active = compact(x, threshold=0.1)                     or once for q, k and v ...
    q, k, v = (sparse_linear(active, packed) for packed in (q_proj, k_proj, v_proj))

Importing this registers the operators under `torch.ops.actkit`; Numba is imported when a kernel first runs.
"""

from actkit.kernels.active_set import ActiveSet, compact
from actkit.kernels.operators import sparse_linear
from actkit.kernels.packing import PackedWeight, pack

__all__ = ["ActiveSet", "PackedWeight", "compact", "pack", "sparse_linear"]
