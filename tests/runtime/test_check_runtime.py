"""Every registered decoder passes; each kind of broken one is caught by the right property."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import psutil
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from actkit.core import registry
from actkit.core.errors import DataError, MemoryLimitError, UnsupportedModelError
from actkit.core.runner import apply
from actkit.quantization.rtn import RoundToNearest
from actkit.runtime.decoder import Decoder
from actkit.sparsity.teal import Teal
from actkit.testing import check_runtime
from actkit.testing.checks import State
from actkit.testing.runtimes import CHECKS

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.randint(300, (12,), generator=torch.Generator().manual_seed(0)).tolist()


def llama(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **settings})).to(dtype).eval()


def rounded() -> Any:
    return apply(llama(), RoundToNearest(bits=8, group_size=-1, symmetric=True), progress=False).model


def selected() -> Any:
    return apply(llama(), Teal(sparsity=0.4), [{"input_ids": torch.tensor([IDS])}], progress=False).model


# model, settings, tolerance
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], float]] = {
    "plain": (llama, {"threads": 2}, 1e-4),
    "one thread": (llama, {"threads": 1}, 1e-4),
    "tied, bfloat16": (partial(llama, torch.bfloat16, tie_word_embeddings=True), {}, 3e-2),
    "8 bits": (rounded, {"activations": "float32"}, 1e-4),
    "inputs selected": (selected, {}, 1e-4),
}


@pytest.fixture(autouse=True)
def one_thread_of_torch() -> Iterator[None]:
    """For models this small, threads that wait for each other take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", registry.decoder_names())
def test_registered_decoders_pass(name: str, case: str) -> None:
    build, settings, tolerance = CASES[case]
    checks = check_runtime(partial(registry.decoder_class(name), **settings), build(), IDS, tolerance=tolerance)
    assert [check.name for check in checks] == list(CHECKS)
    assert {check.outcome for check in checks} == {"holds"}


def test_a_closed_decoder_says_so() -> None:
    with Decoder(llama()) as decoder:
        assert not decoder.closed and len(decoder([1])) == 300
    assert decoder.closed
    for use in (decoder.reset, lambda: decoder([1])):
        with pytest.raises(ValueError, match=r"decoder: it was closed.*build another one"):
            use()


# -- broken runtimes ---------------------------------------------------------------------------------------------------


class Plain:
    """A sound one: the model's own forward pass on a copy of it, which reads all tokens again each time."""

    threads = 1

    def __init__(self, model: Any, *, capacity: int, decode_only: bool = False) -> None:
        reason = self.supports(model)
        if reason:
            raise UnsupportedModelError(f"model: it cannot be decoded here: {reason}.")
        if sum(parameter.nbytes for parameter in model.parameters()) > psutil.virtual_memory().available:
            raise MemoryLimitError("capacity: a copy of the model does not fit.")
        self.capacity, self.tokens = capacity, []
        self.copy: Any = LlamaForCausalLM(model.config).eval()
        self.copy.load_state_dict(model.state_dict())
        self.nbytes, self.cache_bytes = sum(parameter.nbytes for parameter in self.copy.parameters()), 0

    @staticmethod
    def supports(model: Any) -> str | None:
        return None if isinstance(model, LlamaForCausalLM) else "it is no Llama"

    def reset(self) -> None:
        self.tokens = []

    def __call__(self, new: Sequence[int]) -> Tensor:
        if not new or not 0 <= min(new) <= max(new) < 300 or len(self.tokens) + len(new) > self.capacity:
            raise DataError("new: it cannot be read.")
        self.tokens = [*self.tokens, *new]
        with torch.no_grad():
            return self.copy(input_ids=torch.tensor([self.tokens])).logits[0, -1].float()

    def close(self) -> None:
        self.copy = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Rough(Plain):
    def __call__(self, new: Sequence[int]) -> Tensor:
        return super().__call__(new) * 1.01


class LastOnly(Plain):
    """Of several tokens it reads the last alone."""

    def __call__(self, new: Sequence[int]) -> Tensor:
        return super().__call__(new[-1:])


class Noisy(Plain):
    def __call__(self, new: Sequence[int]) -> Tensor:
        found = super().__call__(new)
        return found + 1e-6 * torch.rand(()) * found.abs().max()


class Forgetful(Plain):
    def reset(self) -> None: ...


class TakesAnything(Plain):
    def __call__(self, new: Sequence[int]) -> Tensor:
        return super().__call__([token % 300 for token in new])


class MixesUpAfterErrors(Plain):
    def __call__(self, new: Sequence[int]) -> Tensor:
        try:
            return super().__call__(new)
        except DataError:
            self.tokens = self.tokens[:1] * len(self.tokens)
            raise


class OneForAll(Plain):
    """All of them keep their tokens in one list."""

    shared: ClassVar[list[int]] = []

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.reset()

    def reset(self) -> None:
        OneForAll.shared = self.tokens = []

    def __call__(self, new: Sequence[int]) -> Tensor:
        self.tokens = OneForAll.shared
        found = super().__call__(new)
        OneForAll.shared = self.tokens
        return found


class StaysOpen(Plain):
    def close(self) -> None: ...


class ClosesOnce(Plain):
    def close(self) -> None:
        del self.copy


class KeepsWeights(Plain):
    """Answers no more after close(), and holds what it held."""

    def close(self) -> None:
        self.capacity = 0


class OnlyWhenAllIsWell(Plain):
    def __exit__(self, error: Any, *_: Any) -> None:
        if error is None:
            self.close()


class Registered(Plain):
    all: ClassVar[list[Any]] = []

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.all.append(self)


class StartsThreads(Plain):
    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        threading.Thread(target=ENDED.wait, daemon=True).start()


ENDED = threading.Event()


class Freezes(Plain):
    def __init__(self, model: Any, **settings: Any) -> None:
        super().__init__(model, **settings)
        model.requires_grad_(False)


class LeavesAHook(Plain):
    def __init__(self, model: Any, **settings: Any) -> None:
        super().__init__(model, **settings)
        model.register_forward_hook(lambda *_: None)


class TakesTooMuch(Plain):
    """With decode_only it takes the weights before it has copied them."""

    def __init__(self, model: Any, *, capacity: int, decode_only: bool = False) -> None:
        if decode_only:
            with torch.no_grad():
                model.lm_head.weight.zero_()
        super().__init__(model, capacity=capacity)


class Understates(Plain):
    def __init__(self, model: Any, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.nbytes = self.cache_bytes = 0
        self.more = torch.zeros(1 << 21)

    def close(self) -> None:
        super().close()
        self.more = None


class GrowsAsItReads(Plain):
    """Keeps the logits of all tokens, for nobody."""

    def __call__(self, new: Sequence[int]) -> Tensor:
        found = super().__call__(new)
        self.kept = [*getattr(self, "kept", []), torch.zeros(1 << 18)]
        return found

    def close(self) -> None:
        super().close()
        self.kept = []


class NeverAsks(Plain):
    def __init__(self, model: Any, *, capacity: int, decode_only: bool = False) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1 << 40}))
            super().__init__(model, capacity=capacity)


class SaysNothing(Plain):
    """Supports everything, and fails later."""

    @staticmethod
    def supports(model: Any) -> str | None:
        return None


class GivesNoReason(Plain):
    def __init__(self, model: Any, *, capacity: int, decode_only: bool = False) -> None:
        if self.supports(model):
            raise UnsupportedModelError("model: no.")
        super().__init__(model, capacity=capacity)


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (Rough, "logits are the model's: the logits after token 1 differ by 0.01 of the largest, 0.0001 was stated"),
        (LastOnly, "logits are the model's: the logits after a prompt differ"),
        (Noisy, "the same result twice: the logits of a second runtime differ"),
        (Forgetful, "reset forgets: DataError|reset forgets: the logits after reset"),
        (TakesAnything, "an error leaves it usable: token -1: accepted"),
        (MixesUpAfterErrors, "an error leaves it usable: after errors the logits differ"),
        (OneForAll, "two take turns: "),
        (StaysOpen, r"it closes: it decodes after close\(\)"),
        (ClosesOnce, "it closes: AttributeError"),
        (KeepsWeights, r"it closes: it holds [0-9,]+ bytes after close\(\)"),
        (OnlyWhenAllIsWell, "it closes: it decodes after a `with` that an error ended"),
        (Registered, "it closes: something holds it after its last name is gone"),
        (StartsThreads, "it closes: [0-9]+ threads are left, [0-9]+ were there before"),
        (Freezes, "the model is not changed: while it is used: requires_grad differs"),
        (LeavesAHook, r"the model is not changed: while it is used: \._forward_hooks"),
        (TakesTooMuch, "decode_only gives the same: with decode_only=True the logits differ"),
        (Understates, "memory is as planned: it holds [0-9,]+ bytes, and says 0"),
        (GrowsAsItReads, "memory is as planned: it holds"),
        (NeverAsks, "too little memory is refused: it was made with no memory free"),
        (SaysNothing, r"other models are refused: supports\(\) says None of a TinyMlp"),
        (GivesNoReason, r"other models are refused: the error does not say why \('it is no Llama'\): model: no"),
    ],
)
def test_broken_runtimes_are_caught(broken: Any, text: str) -> None:
    model = llama()
    before = State.of(model)
    try:
        with pytest.raises(AssertionError, match=f"^({text})"):
            check_runtime(broken, model, IDS, tolerance=1e-4)
    finally:
        ENDED.set()
        ENDED.clear()
    before.compare(model, "the model that was checked")


def test_a_sound_one_passes_and_may_not_say_what_it_holds() -> None:
    assert {check.outcome for check in check_runtime(Plain, llama(), IDS, tolerance=1e-6)} == {"holds"}

    class Silent(Plain):
        def __init__(self, *given: Any, **settings: Any) -> None:
            super().__init__(*given, **settings)
            del self.nbytes, self.cache_bytes

    checks = check_runtime(Silent, llama(), IDS, tolerance=1e-6)
    assert [check.name for check in checks if check.outcome != "holds"] == ["memory is as planned"]


def test_a_short_text_is_refused() -> None:
    with pytest.raises(ValueError, match="ids: 3 tokens were given; give eight or more"):
        check_runtime(Plain, llama(), [1, 2, 3], tolerance=1e-4)
