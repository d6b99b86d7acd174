"""What the kernels' results are held against: float64 products of the stored values."""

import torch

TOLERANCE = 2e-6  # of sum |w| |x|: float32 accumulation
SMALLEST = 1e-42  # what denormal products may lose


def check(y, x, weight, keep=None, bias=None, smallest=SMALLEST):
    """Compare float32 y [rows, out] with the float64 product of the stored weight [out, in] and the kept inputs."""
    x, weight = x.double() if keep is None else torch.where(keep, x.double(), 0.0), weight.double()
    exact, size = x @ weight.t(), x.abs() @ weight.abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert y.dtype == torch.float32
    assert ((y.double() - exact).abs() <= TOLERANCE * size + smallest).all()


def integer_weight(out_features, in_features, bits, axis, groups, zeros, seed=0):
    """Random codes, scales and zeros as `pack_quantized` takes them, and the weight in float64 [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    shape = (out_features, groups) if axis == "input" else (groups, in_features)
    scale = torch.rand(shape, generator=generator) * 0.1 + 1e-4
    zero = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8) if zeros else None
    return codes, scale, zero, dequantized(codes, scale, zero, bits, axis)


def dequantized(codes, scale, zero, bits, axis):
    """(code - zero) * scale in float64, one group after the other."""
    dim = 1 if axis == "input" else 0
    size = codes.shape[dim] // scale.shape[dim]
    weight = torch.empty(codes.shape, dtype=torch.float64)
    for group in range(scale.shape[dim]):
        part = (slice(None), slice(group * size, (group + 1) * size))[:: 1 if axis == "input" else -1]
        middle = 2 ** (bits - 1) if zero is None else zero.select(dim, group).double().unsqueeze(dim)
        weight[part] = (codes[part].double() - middle) * scale.select(dim, group).double().unsqueeze(dim)
    return weight


def nibbles(codes):
    """Two codes per byte, the first in the low half; odd widths get a zero."""
    rows = [row + [0] * (len(row) % 2) for row in codes.tolist()]
    packed = [[low | high << 4 for low, high in zip(row[::2], row[1::2])] for row in rows]
    return torch.tensor(packed, dtype=torch.uint8)
