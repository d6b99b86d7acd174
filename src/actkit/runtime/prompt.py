"""A prompt through a decoder's layers: dense matrix products of many tokens, from the packed weights.

Each token's inputs are selected as in the step, unless the selection is meant for decoding only. Products and attention
take the dtype of the model: in bfloat16 their inputs and outputs are rounded to it, as the processor's matrix units
need it and as transformers does. Integer weights with groups of inputs are multiplied in integers, with inputs of 8
bits per token and span (`numba_rounded_rows`), unless the decoder's activations are float32; then, and otherwise, they
are widened to the dtype, some columns at a time, so that they stay in the cache. Residual stream and norms are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from actkit.kernels import decode_math as functions
from actkit.kernels import decode_products as forms
from actkit.kernels import decode_step as steps
from actkit.kernels import prompt_rows as rows
from actkit.kernels.numba_cpu import NOTHING, array
from actkit.kernels.numba_quantized import widened_columns
from actkit.kernels.numba_rounded_rows import RoundedRows, multiply_rounded, span_of, takes
from actkit.kernels.output_rows import BundledUnits, PackedRows
from actkit.kernels.packing import COLUMNS as BLOCK
from actkit.kernels.packing import PackedWeight, in_order
from actkit.kernels.polynomials import poly_norm
from actkit.kernels.process import LOCK, PER_BYTE, follow_torch_threads
from actkit.kernels.prompt_attention import attend, available
from actkit.kernels.quantized import QuantizedWeight, outputs_of
from actkit.kernels.quantized_rows import QuantizedRows
from actkit.runtime.latent import read_latents
from actkit.runtime.shards import NoMatrix
from actkit.runtime.tables import Matrices

WIDENED = 512  # of an integer weight that are widened at a time: a few megabytes

# What the two ways cost, in nanoseconds of one core with AVX-512, fitted to three shapes in float32, bfloat16 and 4 and
# 8 bits; only their ratios count. A step reads each byte of the weights.
BYTE = 0.036
# A pass calls operators per layer and thread, and lays out each element of a weight, after it has widened it if it is
# an integer; then each token is multiplied with each of them. In integers, it is unpacked instead.
LAYER, LAID_OUT, WIDEN, UNPACKED = 410_000, 0.2, 0.36, 0.03
MULTIPLIED = {torch.bfloat16: 0.0066, torch.float32: 0.025}
IN_INTEGERS = 0.0075
MOST = 64  # tokens that are read step by step, whatever the model


def few_tokens(plan: steps.StepPlan, matrices: Matrices, dtype: torch.dtype, in_integers: bool) -> int:
    """Up to how many tokens single steps take less time than one pass of dense products.

    Args:
        plan: of the model, with one row of products per matrix.
        matrices: the packed weights, in the same order.
        dtype: that products are computed in.
        in_integers: as in `read_prompt`.

    Returns:
        A number of tokens, 1 to MOST; it depends on shapes, formats and threads alone.
    """
    threads, layers = len(plan.layers), len(plan.norms)
    elements = plan.products[:, [forms.TILES, forms.INPUTS, forms.TILE]].prod(1)
    elements = elements * [not isinstance(weight, NoMatrix) for weight in matrices.weights]
    widened = np.array([isinstance(weight, QuantizedWeight | QuantizedRows) for weight in matrices.weights])
    integers = np.array([in_integers and takes(weight) for weight in matrices.weights])
    places = plan.layers[:, layers, 2 * steps.HEAD : 2 * steps.HEAD + 2]
    heads = [p for first, number in places.tolist() for p in range(first, first + number)]
    multiplied = np.where(integers, IN_INTEGERS, MULTIPLIED.get(dtype, MULTIPLIED[torch.float32]))
    multiplied[heads] = 0  # only the last token needs the head
    token = (elements * multiplied).sum() / threads
    laid_out = np.where(integers, UNPACKED, LAID_OUT + WIDEN * widened)
    once = (elements * laid_out).sum() / threads + layers * LAYER * (1 + threads) / 2
    step = matrices.nbytes * BYTE / threads
    return MOST if step <= token else int(min(MOST, max(1, once / (step - token))))


def read_prompt(
    x: Tensor,
    begin: int,
    plan: steps.StepPlan,
    work: steps.Work,
    matrices: Matrices,
    selections: list[Any],
    in_integers: bool,
    dense: bool = False,
    every: bool = False,
) -> Tensor | None:
    """Run some tokens through all layers, into the cache; leave the last one's logits in work.logits.

    Args:
        x: their embeddings [tokens, hidden], in the dtype that products are computed in.
        begin: where in the cache they go.
        plan: what is computed.
        work: the decoder's memory.
        matrices: the packed weights.
        selections: how each product selects its inputs.
        in_integers: whether integer weights meet inputs that are rounded to 8 bits.
        dense: read all inputs of what selects them in decoding only.
        every: return the logits of all tokens.

    Returns:
        Float32 [tokens, vocabulary], if asked for.
    """
    if dense:
        selections = [None if select is None or select.prefill == "dense" else select for select in selections]
    prompt = Prompt(plan, work, matrices, selections, x.dtype, in_integers)
    x = x.float() * float(plan.embedding)
    if len(plan.positions):
        x += torch.from_numpy(plan.positions[begin : begin + len(x)])
    prompt.read(x, begin)
    if not every:
        prompt.keep(prompt.logits(x[-1:]))
        return None
    found = prompt.logits(x)
    prompt.keep([own[-1:] for own in found])
    return torch.cat(found, 1)


class Outputs(NamedTuple):
    """What a thread's products of a stage gave.

    Attributes:
        values: [tokens, width].
        tiled: whether columns lie as in a tile of bfloat16 (`kernels.packing`).
        bias: float32 [width or more] that is still to be added, or None.
    """

    values: Tensor
    tiled: bool = False
    bias: Tensor | None = None

    def arrays(self) -> tuple[np.ndarray, bool, np.ndarray]:
        """Return what the kernels take."""
        return array(self.values.contiguous()), self.tiled, NOTHING if self.bias is None else self.bias.numpy()

    def in_order(self) -> Tensor:
        """Return the values in order, the bias added."""
        values = in_order(self.values) if self.tiled else self.values
        return values if self.bias is None else values + self.bias[: values.shape[1]]


class Prompt:
    """Some tokens on their way through the layers.

    Args:
        plan: what is computed.
        work: the decoder's memory.
        matrices: the packed weights.
        selections: how each product selects its inputs.
        dtype: of products and attention; float32 unless it is bfloat16.
        in_integers: whether integer weights meet inputs that are rounded to 8 bits.
    """

    def __init__(
        self,
        plan: steps.StepPlan,
        work: steps.Work,
        matrices: Matrices,
        selections: list[Any],
        dtype: torch.dtype,
        in_integers: bool,
    ) -> None:
        self.plan, self.work, self.matrices, self.selections = plan, work, matrices, selections
        self.dtype = dtype if dtype == torch.bfloat16 else torch.float32
        self.choosing = int(plan.layers[0, 0, steps.CHOOSING])
        self.in_integers = in_integers
        self.heads, self.cache = rows.Heads.of(plan), rows.Cache.of(work)
        self._rounded: dict[Any, tuple[Tensor, RoundedRows]] = {}  # of the products at hand
        self._masks: dict[int, Tensor] = {}  # by window, of the tokens at hand

    def read(self, x: Tensor, begin: int) -> None:
        """Run x, float32 [tokens, hidden], through all layers, in place."""
        plan, end = self.plan, begin + len(x)
        rotary = torch.from_numpy(plan.rotary[:, :, begin:end])
        self._masks.clear()
        normed = self._norm(x, plan.norms[0, 0], plan.biases[0, 0])
        for layer in range(len(plan.norms)):
            places = plan.layers[:, layer]
            cos, sin = rotary[int(places[0, steps.ROTARY])]
            given = [normed] * len(places)
            if plan.latent.any():
                mixed = read_latents(self, layer, given, begin, cos, sin)
            else:
                mixed = self._mixed(layer, given, begin)
            behind = plan.norms[layer, 1], plan.biases[layer, 1]
            if plan.beside == steps.TWO_NORMS:
                normed = self._norm(x, *behind)
            one_by_one = plan.beside == steps.ONE_BY_ONE
            found = self._add(x, layer, steps.OUTPUT, mixed, then=behind if one_by_one else None)
            normed = normed if found is None else found
            hidden, bundled = self._hidden(layer, [normed] * len(places))
            following = None if layer + 1 == len(plan.norms) else (plan.norms[layer + 1, 0], plan.biases[layer + 1, 0])
            found = self._add(x, layer, steps.DOWN, hidden, bundled, following)
            normed = normed if found is None else found

    def _mask(self, begin: int, end: int, window: int) -> Tensor | None:
        """Which tokens each of some sees, bool [tokens, all]; None for all before it and itself, of an empty cache."""
        if begin == 0 and not self.plan.cap and (not window or window >= end):
            return None
        if window not in self._masks:
            ahead = torch.arange(end)[None, :] - torch.arange(begin, end)[:, None]  # 0 is itself
            self._masks[window] = (ahead <= 0) & (ahead > -window) if window else ahead <= 0
        return self._masks[window]

    def logits(self, x: Tensor) -> list[Tensor]:
        """Compute each thread's share of the logits of some tokens, float32 [tokens, own words]."""
        plan = self.plan
        last = [self._norm(x, plan.last_norm, plan.last_bias, before=True)] * len(plan.layers)
        places = plan.layers[:, len(plan.norms)]
        outs = self._products(len(plan.norms), steps.HEAD, last)
        found = [out[:, : place[steps.UNITS]].float() * float(plan.scaled) for out, place in zip(outs, places)]
        return [_capped(own, float(plan.capped)) for own in found] if plan.capped > 0 else found

    def keep(self, own: list[Tensor]) -> None:
        """Leave the logits of one token in the decoder's memory."""
        places = self.plan.layers[:, len(self.plan.norms)]
        for thread, (out, place) in enumerate(zip(own, places)):
            found = out[0].numpy()
            self.work.logits[place[steps.FIRST_UNIT] :][: place[steps.UNITS]] = found
            self.work.finite[thread] = (found * 0).sum()

    def _bundle(self, place: np.ndarray) -> BundledUnits | None:
        """The units of a thread that keeps them bundled."""
        first, number = place[2 * steps.UNITS_BUNDLED : 2 * steps.UNITS_BUNDLED + 2].tolist()
        weight = self.matrices.weights[first] if number else None
        return weight if isinstance(weight, BundledUnits) else None

    def _mixed(self, layer: int, normed: list[Tensor], begin: int) -> list[Tensor]:
        """Compute what the output projection reads of each thread's heads, [tokens, heads * size]."""
        found = self._outputs(layer, steps.QKV, normed)
        means = self._means(found, self.plan.layers[:, layer])
        return [self._attend(out, layer, thread, begin, means) for thread, out in enumerate(found)]

    def _attend(self, out: Outputs, layer: int, thread: int, begin: int, means: np.ndarray) -> Tensor:
        """Attend with one thread's heads: [tokens, heads * size]. means: as `_means` returns them."""
        plan, work, place = self.plan, self.work, self.plan.layers[thread, layer]
        tokens, heads, first = len(out.values), int(place[steps.HEADS]), int(place[steps.FIRST_HEAD])
        if not heads:
            return torch.zeros(tokens, 0, dtype=self.dtype)
        chooses, window = int(place[steps.CHOOSING]), int(place[steps.WINDOW])
        exact = chooses or plan.cap > 0
        query = torch.empty(heads * plan.shared_by, tokens, plan.size, dtype=torch.float32 if exact else self.dtype)
        with LOCK:
            follow_torch_threads(out.values.nbytes, PER_BYTE)
            rows.take_in_rows(place, layer, begin, *out.arrays(), means, array(query), self.heads, self.cache)
        own = (layer, slice(first, first + heads), slice(begin + tokens))
        keys = _cached(work.keys[own], work.key_scales[own], plan.size)
        values = _cached(work.cached[own], work.value_scales[own], plan.size)
        if not exact and self.dtype == torch.bfloat16 and plan.size % 2 == 0 and available():
            return attend(query, keys.to(self.dtype), values.to(self.dtype), begin, window, plan.scaling)
        mask = self._mask(begin, begin + tokens, window)
        if chooses:
            mixed = _chosen(query, keys.float(), values.float(), chooses, int(place[steps.KEYS])).to(self.dtype)
        elif plan.cap > 0:
            scores = query @ keys.float().repeat_interleave(plan.shared_by, 0).transpose(1, 2) * float(plan.scaling)
            chances = _capped(scores, float(plan.cap)).masked_fill(~mask, -torch.inf).softmax(-1)  # type: ignore[operator]
            mixed = (chances @ values.float().repeat_interleave(plan.shared_by, 0)).to(self.dtype)
        else:
            mixed = F.scaled_dot_product_attention(
                query[None],
                keys[None].to(self.dtype),
                values[None].to(self.dtype),
                attn_mask=mask,
                is_causal=mask is None,
                scale=float(plan.scaling),
                enable_gqa=True,
            )[0]
        return mixed.transpose(0, 1).reshape(tokens, -1)

    def _hidden(self, layer: int, normed: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Compute what the down projection reads of each thread's units, and the shares of it of bundled units."""
        plan, places = self.plan, self.plan.layers[:, layer]
        threshold = plan.gates[layer, 0]
        hidden: list[Tensor] = []
        if not places[:, [steps.ALL_UNITS, 2 * steps.UP + 1, 2 * steps.UNITS_BUNDLED + 1]].any():
            for place, out in zip(places, self._outputs(layer, steps.GATE_UP, normed)):
                hidden.append(torch.empty(len(out.values), int(place[steps.UNITS]), dtype=self.dtype))
                if hidden[-1].shape[1]:
                    with LOCK:
                        follow_torch_threads(out.values.nbytes, PER_BYTE)
                        settings = threshold, plan.curves[layer], plan.widths[layer]
                        rows.activate_rows(place, *settings, *out.arrays(), array(hidden[-1]))
            return hidden, []
        bundled: list[Tensor] = []
        others = self._products(layer, steps.UP, normed)  # of threads that keep the up projection's rows apart
        outs = self._products(layer, steps.GATE_UP, normed)
        gates = [share[:, place[steps.GATE_AT] :][:, : place[steps.UNITS]] for share, place in zip(outs, places)]
        if places[0, steps.ACTIVATION] == functions.POLY_NORM:
            gates = _poly_norm(gates, plan.curves[layer, 0])
        elif places[0, steps.ALL_UNITS]:
            gates = _largest(gates, float(plan.gates[layer, 1]))
        for share, place, apart, gate, own in zip(outs, places, others, gates, normed):
            gate = self._activate(layer, place, gate, float(threshold))
            bundle = self._bundle(place)
            if place[steps.UP_AT] < 0:
                hidden.append(gate)
                continue
            up = share[:, place[steps.UP_AT] :][:, : place[steps.UNITS]]
            if bundle is not None:
                first = int(plan.products[place[2 * steps.UNITS_BUNDLED], forms.INPUTS_AT])
                given = own[:, first : first + bundle.inputs]
                up = given.to(bundle.buffer.dtype) @ bundle.up().t()
            elif apart.shape[1]:
                up = apart
            hidden.append(gate.mul_(up))
            if bundle is not None:
                bundled.append((hidden[-1].to(bundle.buffer.dtype) @ bundle.down()).to(self.dtype))
        return hidden, bundled

    def _activate(self, layer: int, place: np.ndarray, gate: Tensor, threshold: float) -> Tensor:
        """Compute the activation of a thread's gates [tokens, units]."""
        code, plan = int(place[steps.ACTIVATION]), self.plan
        if code < functions.RATIONAL_A or code == functions.POLY_NORM:
            return _activate(code, gate, threshold)
        y = gate.float().contiguous().clone()
        with LOCK:
            follow_torch_threads(y.nbytes, PER_BYTE)
            rows.curve_rows(code, plan.curves[layer], plan.widths[layer], place[steps.FIRST_UNIT], array(y))
        y = y.to(gate.dtype)
        return y.masked_fill_(y.abs() < threshold, 0.0) if threshold > 0 else y

    def _norm(self, x: Tensor, weight: np.ndarray, bias: np.ndarray, before: bool = False) -> Tensor:
        """Apply the norm, in the dtype of the products. before: whether there is one, also if blocks have none."""
        y = torch.empty(x.shape, dtype=self.dtype)
        self._add_rows(x, Outputs(y[:0]), y, weight if before or self.plan.before else weight[:0], bias)
        return y

    def _add_rows(self, x: Tensor, out: Outputs, y: Tensor, weight: np.ndarray, bias: np.ndarray) -> None:
        """Add a share to x, and norm x into y, unless they have no tokens."""
        plan = self.plan
        with LOCK:
            follow_torch_threads(x.nbytes, PER_BYTE)
            rows.add_rows(x.numpy(), *out.arrays(), plan.added, array(y), weight, bias, plan.centered, plan.epsilon)

    def _plain_norm(self, x: Tensor, weight: np.ndarray, bias: np.ndarray) -> Tensor:
        gain, epsilon = torch.from_numpy(weight), float(self.plan.epsilon)
        if not self.plan.centered:
            return F.rms_norm(x, x.shape[-1:], gain, epsilon)
        return F.layer_norm(x, x.shape[-1:], gain, torch.from_numpy(bias) if len(bias) else None, epsilon)

    def _means(self, outs: list[Outputs], places: np.ndarray) -> np.ndarray:
        """Mean squares of query and key over the heads of all threads, [tokens, 2], if these are normed together."""
        plan, size = self.plan, self.plan.size
        if not len(plan.head_norms) or plan.head_norms.shape[2] == size:
            return np.empty((0, 2), np.float32)
        given, found = [out.in_order() for out in outs], []
        for at, readers in ((steps.QUERY_AT, plan.shared_by), (steps.KEY_AT, 1)):
            widths = [int(place[steps.HEADS]) * readers * size for place in places]
            parts = [out[:, place[at] :][:, :width].float() for out, place, width in zip(given, places, widths)]
            found.append(torch.cat(parts, 1).square().mean(1))
        return torch.stack(found, 1).numpy()

    def _turned(self, found: Tensor, turn: int, cos: Tensor, sin: Tensor) -> Tensor:
        size = found.shape[-1]
        if turn == steps.NEIGHBOURS:
            even, odd, half = found[..., ::2], found[..., 1::2], size // 2
            cos, sin = cos[:, :half], sin[:, :half]
            return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
        first = self.choosing or size
        turned = [torch.cat((-part[..., part.shape[-1] // 2 :], part[..., : part.shape[-1] // 2]), -1)
                  for part in found.split((first, size - first), -1)]  # fmt: skip
        return found * cos + torch.cat(turned, -1) * sin

    def _add(
        self,
        x: Tensor,
        layer: int,
        stage: int,
        inputs: list[Tensor],
        others: Sequence[Tensor] = (),
        then: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Tensor | None:
        """Add each thread's products of a stage, of its own inputs, to the residual stream, and norm it.

        others: further shares; then: weight and bias of the norm behind the sum, which is returned, or None.
        """
        plan, outs = self.plan, [Outputs(other) for other in others]
        outs += [out for out in self._outputs(layer, stage, inputs) if out.values.shape[1]]
        if len(plan.behind):
            total = torch.stack([out.in_order()[:, : plan.hidden].float() for out in outs]).sum(0)
            normed = self._plain_norm(total, plan.behind[layer, int(stage == steps.DOWN)], plan.last_bias[:0])
            x += normed * float(plan.added)
            return None if then is None else self._norm(x, *then)
        y = torch.empty(len(x) if then else 0, x.shape[1], dtype=self.dtype)
        weight, bias = then or (plan.last_norm, plan.last_bias)
        for number, out in enumerate(outs, 1):
            self._add_rows(x, out, y if number == len(outs) else y[:0], weight if plan.before else weight[:0], bias)
        return y if then else None

    def _outputs(self, layer: int, stage: int, inputs: list[Tensor]) -> list[Outputs]:
        """Compute what `_products` does, for the kernels that take rows as products leave them."""
        self._rounded.clear()
        outs = []
        for thread, (first, number) in enumerate(self.plan.layers[:, layer, 2 * stage : 2 * stage + 2].tolist()):
            weight = self.matrices.weights[first] if number == 1 else None
            if isinstance(weight, PackedWeight) and not self.plan.products[first, forms.LOW_RANK]:
                given, _ = self._given(first, thread, stage, inputs)
                tiled = weight.dtype == torch.bfloat16
                outs.append(Outputs(_in_tiles(weight, given), tiled, self.matrices.biases[first]))
            else:
                outs.append(Outputs(self._share(layer, stage, thread, inputs)))
        return outs

    def _products(self, layer: int, stage: int, inputs: list[Tensor]) -> list[Tensor]:
        """Compute each thread's products of a stage, [tokens, width].

        inputs: what each thread has of them, [tokens, own]; all of them for the stages that read the residual stream.
        """
        self._rounded.clear()
        return [self._share(layer, stage, thread, inputs) for thread in range(len(self.plan.layers))]

    def _share(self, layer: int, stage: int, thread: int, inputs: list[Tensor]) -> Tensor:
        """Compute one thread's products of a stage."""
        first, number = self.plan.layers[thread, layer, 2 * stage : 2 * stage + 2].tolist()
        pieces: list[Tensor] = []
        at = 0
        for p in range(first, first + number):
            row = self.plan.products[p]
            own, given = self._given(p, thread, stage, inputs)
            gap = int(row[forms.OUT_AT]) - at if stage != steps.UP else 0
            found = self._product(p, own)
            factored = isinstance(self.matrices.weights[p], NoMatrix)
            if row[forms.LOW_RANK] and (factored or row[forms.OF_ALL] or own is not given):
                rest = own if factored else given if row[forms.OF_ALL] else given - own
                right, left = int(row[forms.LOW_RANK]), int(row[forms.LOW_RANK]) + 1
                found = found + self._product(left, self._product(right, rest))
            pieces += [found.new_zeros(len(own), gap), found] if gap else [found]
            at += gap + found.shape[1]
        if not pieces:
            return inputs[thread].new_zeros(len(inputs[thread]), 0)
        return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]

    def _given(self, p: int, thread: int, stage: int, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The inputs of a product that it selects, and all of them."""
        row, select, given = self.plan.products[p], self.selections[p], inputs[thread]
        shared = stage not in (steps.OUTPUT, steps.DOWN)
        if shared:
            given = given[:, row[forms.INPUTS_AT] : row[forms.INPUTS_AT] + row[forms.ALL_INPUTS]]
        if select is None:
            return given, given
        begin = int(row[forms.FIRST_INPUT])
        return select(given if shared else torch.cat(inputs, 1))[:, begin : begin + int(row[forms.INPUTS])], given

    def _product(self, p: int, x: Tensor) -> Tensor:
        """One packed matrix times x [tokens, in], the bias added: [tokens, out]."""
        weight, bias = self.matrices.weights[p], self.matrices.biases[p]
        if isinstance(weight, NoMatrix):
            y = x.new_zeros(len(x), weight.out_features, dtype=self.dtype)
        elif isinstance(weight, PackedWeight):
            y = in_order(_in_tiles(weight, x))[:, : weight.out_features].to(self.dtype)
        elif isinstance(weight, PackedRows):
            y = (x.to(weight.buffer.dtype) @ weight.dense().t()).to(self.dtype)
        elif isinstance(weight, QuantizedRows):
            y = x.to(self.dtype) @ weight.dense().to(self.dtype).t()
        elif self.in_integers and takes(weight):
            return self._in_integers(x, weight, bias)
        else:
            assert isinstance(weight, QuantizedWeight)
            given = x.to(self.dtype)
            y = outputs_of(
                torch.cat([given @ part for part in widened_columns(weight, WIDENED, self.dtype)], 1), weight.layout
            )
        return y if bias is None else (y + bias[: y.shape[1]]).to(self.dtype)

    def _in_integers(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        """Multiply inputs that are rounded to 8 bits, once for all products that read the same ones."""
        span = span_of(weight)
        key = (x.data_ptr(), x.shape, x.stride(), span)
        if key not in self._rounded:
            self._rounded[key] = x, RoundedRows(x, span)  # x stays, so that its memory is not another's
        return multiply_rounded(self._rounded[key][1], weight, bias, self.dtype)


def _in_tiles(weight: PackedWeight, x: Tensor) -> Tensor:
    """Multiply, and leave the outputs in the order of the tiles: [tokens, whole blocks of columns]."""
    given = x.to(weight.dtype)
    starts = range(0, weight.out_features, weight.buffer.shape[2])
    used = [-(-(weight.out_features - start) // BLOCK) * BLOCK for start in starts]  # not the padding of a tile
    tiles = [given @ tile[:, :width] for tile, width in zip(weight.buffer, used)]
    return torch.cat(tiles, 1) if len(tiles) > 1 else tiles[0]


def _activate(code: int, x: Tensor, threshold: float) -> Tensor:
    if code == functions.SILU:
        y = F.silu(x)
    elif code == functions.RELU:
        y = F.relu(x)
    elif code == functions.RELU2:
        y = F.relu(x).square()
    elif code == functions.POLY_NORM:
        y = x  # it needs the gates of all threads, and was computed before
    else:
        y = F.gelu(x, approximate="none" if code == functions.GELU else "tanh")
    return y.masked_fill_(y.abs() < threshold, 0.0) if threshold > 0 else y


def _largest(gates: list[Tensor], quantile: float) -> list[Tensor]:
    """Statistical top-k of the gates of all threads, each [tokens, own units]: max(gate - cut, 0)."""
    every = torch.cat(gates, 1).float()
    deviation, mean = torch.std_mean(every, 1, correction=0, keepdim=True)
    cut = torch.where(deviation <= 5e-7 * mean.abs(), torch.inf, mean + deviation * quantile)
    return [F.relu(gate.float() - cut).to(gate.dtype) for gate in gates]


def _poly_norm(gates: list[Tensor], row: np.ndarray) -> list[Tensor]:
    """PolyNorm of the gates of all threads, each [tokens, own units]; row: as in `core/layers/curve.py`."""
    weight, bias = torch.from_numpy(row[functions.POWERS : 0 : -1].copy()), torch.from_numpy(row[:1])
    weight = weight[int((weight == 0).cumprod(0).sum()) :] if weight.any() else weight[-1:]  # not powers above its own
    y = poly_norm(torch.cat(gates, 1).float(), weight, bias, float(row[functions.EPSILON]))
    return list(y.to(gates[0].dtype).split([gate.shape[1] for gate in gates], 1))


def _capped(x: Tensor, limit: float) -> Tensor:
    return (x / limit).tanh() * limit


def _cached(kept: np.ndarray, scales: np.ndarray, size: int) -> Tensor:
    """What is kept of keys or values, float32 or bfloat16 [heads, tokens, size].

    Args:
        kept: uint8 [heads, tokens, bytes], of float32, bfloat16 or codes.
        scales: float32 [heads, tokens] of codes, or [heads, 0].
        size: of a head.
    """
    dtype = {4: torch.float32, 2: torch.bfloat16, 1: torch.int8}[kept.shape[-1] // size]
    found = torch.from_numpy(kept).view(dtype)
    return found.float() * torch.from_numpy(scales)[..., None] if scales.size else found


def _chosen(query: Tensor, keys: Tensor, values: Tensor, r: int, k: int) -> Tensor:
    """Attention in which the first r features of a head choose about k keys, and the others weigh them.

    query: float32 [heads, tokens, size], the last of the keys' tokens; keys, values: [key-value heads, all, size].
    """
    shared_by, tokens, every = len(query) // len(keys), query.shape[1], keys.shape[1]
    keys, values = keys.repeat_interleave(shared_by, 0), values.repeat_interleave(shared_by, 0)
    visible = torch.ones(tokens, every, dtype=torch.bool).tril(every - tokens)
    count = visible.sum(-1, keepdim=True)
    scores = (query[..., :r] @ keys[..., :r].transpose(1, 2) * r**-0.5).masked_fill(~visible, 0)
    mean = scores.sum(-1, keepdim=True) / count
    deviation = ((scores - mean).masked_fill(~visible, 0).square().sum(-1, keepdim=True) / count).sqrt()
    quantile = torch.special.ndtri((1 - k / count.double()).clamp(min=0)).float()
    everything = (count <= k) | (deviation <= 5e-7 * mean.abs())
    cut = torch.where(everything, -torch.inf, mean + deviation * quantile.nan_to_num())
    scores = scores.masked_fill(~visible, -torch.inf)
    dropped = (scores <= cut) & (scores < scores.amax(-1, keepdim=True))  # the largest one always stays
    chances = scores.masked_fill(dropped, -torch.inf).softmax(-1)
    weights = query[..., r:] @ keys[..., r:].transpose(1, 2) * (query.shape[-1] - r) ** -0.5
    return (chances * F.softplus(weights)) @ values
