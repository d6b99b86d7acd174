"""S2A: fine-tune what needs no large activations, and keep 4-bit codes of the others (2025, arXiv:2503.08154).

    trained:        biases (also of norms), the head, side paths and prompts if there are any
    elementwise f:  y = f(x),  dx = level[code(x)] dy           4 bits; one bit, exactly, for ReLU and its kin
    norms:          y = norm(x),  backward at the x that 4-bit codes stand for; mean and deviation of a row are exact
    attention:      y = attention(q, k, v),  backward at the q, k, v that 4-bit codes stand for
    side path:      y = block(x) + W_up f(W_down x),  of which x is kept in 4 bits

The gradient of a bias needs no activation, so that a linear layer whose weight is frozen keeps nothing. What is left
are nonlinearities, norms and attention; they keep codes in place of float32 tensors.

When to use it: to fine-tune a transformer on a device whose memory the activations fill (long rows, large batches), as
a rule in any loop. With `bias: false, head: false` it only codes, under LoRA or full training. For a side path apply
the transform `side_path` first, for prompts `prompts`.
Cost: attention and norms are computed again in the backward pass, and codes are packed: some more time for each step
than biases alone (`benchmarks/finetuning.py`). Gradients are approximate at 2 to 4 bits, the outputs are not.
Settled here: biases and side paths cannot move far what a model computes; the head always trains unless you say no. A
weight that is tied to the embeddings is no head. Dropout keeps no mask but the state of the random numbers. Batch norms
keep their statistics and nothing else. Functions that a model calls without a module (`F.gelu` in its forward pass)
are not seen; `report` counts what is coded and names the kinds that are not. After `detach` the model is a plain one.
Our own reading: the paper was read in abstracts only, so that all of the above is a reconstruction: which codes stand
for what, levels that are fitted to f' under a mixture of a normal and a uniform density, groups of 64 that follow each
other in memory, and attention that keeps q, k and v (no weights, which are computed again). Prompts are tokens of each
layer, gone behind it; those of the first layer alone that stay are not offered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from actkit.core.edit.edits import Configure, apply_edit, standing_in
from actkit.core.ground.errors import UnsupportedModelError
from actkit.core.layers.activations import is_activation, record_of
from actkit.core.layers.attention_function import describe_function
from actkit.core.layers.coded import CodedActivation, CodedInputs, CodedSoftmax, FrozenNorm, RedrawnDropout
from actkit.core.layers.coded_attention import CodedAttention
from actkit.core.layers.packed_codes import AffineCodes, Density, DerivativeCode, Rounding
from actkit.core.recipe.rule import AttachedRule, TrainingRule
from actkit.finetuning.s2a.prompts import PromptedBlock
from actkit.finetuning.s2a.side_path import SidePath

Coded = Literal["activation", "norm", "attention", "dropout"]
BATCH_NORMS = nn.modules.batchnorm._BatchNorm


class S2A(TrainingRule):
    """Train biases, head, side paths and prompts, and keep codes of the activations.

    Attributes:
        bias: all biases train, those of norms too.
        head: what stands behind the model's body trains; or patterns of names of what trains in its place.
        coded: what keeps codes; () for nothing.
        bits: of a code, 1 to 8.
        group: numbers that share a low end and a step, in norms and attention.
        density: of the inputs that the levels of a slope are fitted for.
        rounding: of values to codes, in norms and attention.

    Raises:
        UnsupportedModelError: nothing is to be trained, or nothing to be coded, or the attention cannot be coded.
    """

    bias: bool = True
    head: bool | tuple[str, ...] = True
    coded: tuple[Coded, ...] = ("activation", "norm", "attention", "dropout")
    bits: int = Field(4, ge=1, le=8)
    group: int = Field(64, ge=2)
    density: Density = "mixed"
    rounding: Rounding = "nearest"

    def trainable(self, model: nn.Module) -> Iterable[str] | None:
        if not (self.bias or self.head):
            return None
        names = [name for name, _ in model.named_parameters()]
        chosen = [name for name in names if self.bias and name.rpartition(".")[2] == "bias"]
        if isinstance(self.head, tuple):
            chosen += self.head
        elif self.head:
            chosen += head_of(model)
        for path, module in model.named_modules():
            if isinstance(module, SidePath | PromptedBlock):
                chosen += [f"{path}.{name}".removeprefix(".") for name in module.own_parameters()]
        if not chosen:
            raise UnsupportedModelError(
                f"bias, head: this {type(model).__name__} has no bias, no head that is not tied to its embeddings, and "
                f"no side path, so that nothing would train; apply the transform side_path first, or name what trains "
                f"by head."
            )
        return list(dict.fromkeys(chosen))

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, example: Any = None
    ) -> AttachedS2A:
        return AttachedS2A(self, model)

    def codes(self, *, rows: bool = False) -> AffineCodes:
        """How values are kept. rows: mean and deviation of each row are exact."""
        return AffineCodes(self.bits, self.group, self.rounding, rows)


def head_of(model: nn.Module) -> list[str]:
    """The names of the parameters behind a model's body.

    Args:
        model: of transformers: what is not of its `base_model`; any other: its last linear layer. What is tied to the
            embeddings is left out.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    body = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if isinstance(body, nn.Module) and body is not model:
        inside = {id(parameter) for parameter in body.parameters()}
        return [name for name, parameter in model.named_parameters() if id(parameter) not in inside]
    if hasattr(model, "base_model_prefix"):  # a body alone
        return []
    last = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    return [name for name in known if last and name.rpartition(".")[0] == last[0]]


class AttachedS2A(AttachedRule):
    """The rule at work: modules that keep codes stand in for others.

    Args:
        rule: its settings.
        model: in place.
    """

    def __init__(self, rule: S2A, model: nn.Module) -> None:
        self.counts: Counter[str] = Counter()
        self.left: set[str] = set()
        self._stack = ExitStack()
        with ExitStack() as undone:
            undone.callback(self._stack.close)
            self._stack.enter_context(standing_in(model, self._stand_ins(rule, model)))
            if "attention" in rule.coded:
                self._code_attention(rule, model)
            if rule.coded and not self.counts:
                raise UnsupportedModelError(
                    f"coded: this {type(model).__name__} has no module that would keep codes as "
                    f"{', '.join(rule.coded)} (functions that it calls without a module are not seen); leave the rule "
                    f"out, or give coded: []."
                )
            undone.pop_all()

    def _stand_ins(self, rule: S2A, model: nn.Module) -> Mapping[str, nn.Module]:
        """What stands in for what, by path."""
        found: dict[str, nn.Module] = {}
        for path, module in model.named_modules():
            if not path or any(path.startswith(f"{outer}.") for outer in found):
                continue
            if isinstance(module, SidePath) and rule.coded:
                found[f"{path}.down"] = CodedInputs(module.down, rule.codes())
                self.counts["side path"] += 1
            kind, new = _stand_in(rule, module)
            if new is not None:
                found[path] = new
                self.counts[kind] += 1
            elif kind:
                self.left.add(f"{kind}: {type(module).__name__}")
        return found

    def _code_attention(self, rule: S2A, model: nn.Module) -> None:
        """Let the attention of transformers' models keep codes."""
        inner = getattr(getattr(model, "config", None), "_attn_implementation", None)
        if inner is None or not getattr(model, "_supports_sdpa", False):  # such as a convolutional network
            self.left.add(f"attention: {type(model).__name__} calls no attention function of transformers")
            return
        function = CodedAttention(inner, rule.bits, rule.group, rule.rounding)
        undo = apply_edit(model, Configure("attn_implementation", describe_function(function)))
        assert undo is not None
        self._stack.callback(undo)
        self.counts["attention"] += 1

    def report(self) -> dict[str, Any]:
        """Return how many modules keep codes, and the kinds of those that do not."""
        return {"coded": dict(self.counts), "left": sorted(self.left)}

    def detach(self) -> None:
        self._stack.close()


def _stand_in(rule: S2A, module: nn.Module) -> tuple[str, nn.Module | None]:
    """What a module is, and what keeps codes in its place; '' for what keeps nothing worth it."""
    coded = rule.coded
    if isinstance(module, BATCH_NORMS) and "norm" in coded and not _trains(module, "weight"):
        return "norm", FrozenNorm(module)
    if isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__:
        return ("norm", CodedInputs(module, rule.codes(rows=True))) if "norm" in coded else ("", None)
    if isinstance(module, nn.Softmax):
        return ("activation", CodedSoftmax(module, rule.codes())) if "activation" in coded else ("", None)
    if type(module) is nn.Dropout:
        return ("dropout", RedrawnDropout(module)) if "dropout" in coded and module.p else ("", None)
    if not is_activation(module) or "activation" not in coded:
        return "", None
    record = record_of(module)
    if record is None or record.mixes or record.derivative is None or _trains(module):
        return "activation", None
    return "activation", CodedActivation(module, DerivativeCode.fit(record, rule.bits, rule.density))


def _trains(module: nn.Module, only: str | None = None) -> bool:
    """Whether a parameter of a module trains."""
    return any(parameter.requires_grad for name, parameter in module.named_parameters() if only in (None, name))
