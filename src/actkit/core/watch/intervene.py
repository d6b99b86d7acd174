"""intervene(model, {site: change}): change activations while a model runs, for as long as a context lasts.

    with intervene(model, {"blocks.3.mlp.hidden": Scale(0.5)}):
        logits = model(**batch).logits                           # also with gradients, and in model.generate

A change is a tensor, one of `core/watch/site_changes.py`, or a function (value, at) -> tensor or None for no change;
`at` says where the value stands. Sites are named as everywhere else (`core/model/sites.py`), and what stands there is
given in their layout and whole, padding included. A change that changes nothing leaves the output of the model as it
is, to the bit. Contexts may be nested: an inner one sees what an outer one left, and so does `record` inside. Weights,
mode and gradients of the model are left alone. A decoder calls no module, so that text is written by transformers
meanwhile, which it says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from actkit.core.forward.hooks import hooked, refuse_compiled_or_sharded
from actkit.core.ground.errors import NonFiniteError
from actkit.core.model.anatomy import Anatomy, Site, Tap
from actkit.core.watch.capture import experts_for, resolve, view_of
from actkit.core.watch.passes import Pass, Passes, Phase
from actkit.core.watch.site_changes import Positions, SiteChange, change_of
from actkit.core.watch.tap_hooks import tapped

Change = Tensor | SiteChange | Callable[[Tensor, "At"], Tensor | None]


class At:
    """Where a value stands that a change is given.

    Attributes:
        site: its name.
        layout: of the value (`core/model/sites.py`).
        tokens: inside an expert, which of the batch's tokens (flat) the rows are.
    """

    def __init__(
        self,
        site: Site,
        layout: str,
        heads: int | None,
        tokens: Tensor | None,
        now: Pass | None,
        read: dict[Site, Tensor],
    ) -> None:
        self.site, self.layout, self.tokens = site, layout, tokens
        self._heads, self._now, self._read = heads, now, read

    @property
    def positions(self) -> Tensor:
        """Int64 [batch, length]: of each token among the real ones of its row, those in the cache included."""
        return self._pass.positions

    @property
    def mask(self) -> Tensor:
        """Bool [batch, length]: which tokens are no padding."""
        return self._pass.real

    @property
    def phase(self) -> Phase:
        """Whether the pass is a prompt's, or the writing of a text behind it."""
        return self._pass.phase

    @property
    def _pass(self) -> Pass:
        if self._now is None:
            raise ValueError(
                f"positions: those of {self.site} are not known, as the model was not given tokens [batch, length]; "
                f"change all positions."
            )
        return self._now

    def __getitem__(self, site: Site | str) -> Tensor:
        """The tensor of another site that this pass came by and that was named in `reads`.

        Args:
            site: its name.

        Raises:
            ValueError: it was not named, or comes later in the pass.
        """
        site = Site.parse(site) if isinstance(site, str) else site
        if site not in self._read:
            raise ValueError(
                f"reads: {site} was not read before {self.site} in this pass; name it in reads=, and name only sites "
                f"that come before."
            )
        return self._read[site]

    # -- what changes share

    def chosen(self, value: Tensor, positions: Positions, heads: Sequence[int] | None) -> Tensor | None:
        """Return which entries are meant: bool that broadcasts to the value; None for all.

        Args:
            value: of the site.
            positions: as of `SiteChange`.
            heads: as of `SiteChange`.
        """
        chosen = None
        if not (isinstance(positions, str) and positions == "all"):
            chosen = self._spread(value, self._at_positions(positions))
        if heads is None:
            return chosen
        by_head = self._by_head(value, heads)
        return by_head if chosen is None else chosen & by_head

    def by_row(self, value: Tensor, factor: float | Tensor) -> float | Tensor:
        """Return a factor as it multiplies the value.

        Args:
            value: of the site.
            factor: a number, or a tensor [batch] with one for each row.
        """
        if not isinstance(factor, Tensor) or factor.dim() == 0:
            return factor
        factor = factor.to(value.device, value.dtype)
        flat = self.tokens is not None or self.layout == "flat"
        if flat:
            length = self._pass.columns.numel()
            fits, rows = factor.shape == self._pass.mask.shape[:1], factor.repeat_interleave(length)
            rows = rows if self.tokens is None else rows[self.tokens]
        else:
            fits, rows = factor.shape == value.shape[:1], factor
        if not fits:
            raise ValueError(
                f"factor: {list(factor.shape)} was given for {self.site}, which is {list(value.shape)} here; give a "
                f"number, or one for each row of the batch."
            )
        return rows.reshape(-1, *(1,) * (value.dim() - 1))

    def fitted(self, value: Tensor, tensor: Tensor) -> Tensor:
        """Return a tensor in the dtype and on the device of the value, to whose shape it must broadcast.

        Args:
            value: of the site.
            tensor: any.
        """
        try:
            fits = torch.broadcast_shapes(tensor.shape, value.shape) == value.shape
        except RuntimeError:
            fits = False
        if not fits:
            _refuse_shape(self.site, tensor, value)
        return tensor.to(value.device, value.dtype)

    def _at_positions(self, positions: Positions) -> Tensor:
        """Bool [batch, length]."""
        now = self._pass
        real = now.real
        if isinstance(positions, Tensor) and positions.dtype == torch.bool:
            if positions.shape != (now.mask.shape[0], now.prompt):
                raise ValueError(
                    f"positions: the mask is {list(positions.shape)}, and the prompt {[now.mask.shape[0], now.prompt]}."
                )
            padded = nn.functional.pad(positions.to(real.device), (0, now.mask.shape[1] - now.prompt))
            return padded[:, now.columns]
        if isinstance(positions, str):
            if positions == "last":
                return real & ~now.generated & (now.positions == now.prompt_lengths[:, None] - 1)
            return real & (now.generated if positions == "generated" else ~now.generated)
        numbers = torch.as_tensor(positions, dtype=torch.int64, device=real.device)
        wanted = numbers[None].expand(len(real), -1)
        wanted = torch.where(wanted < 0, wanted + now.prompt_lengths[:, None], wanted)
        return real & (now.positions[:, :, None] == wanted[:, None]).any(-1)

    def _spread(self, value: Tensor, by_token: Tensor) -> Tensor:
        """What is said of tokens [batch, length], as it broadcasts to the value."""
        if self.tokens is not None:
            return by_token.flatten()[self.tokens][:, None]
        if self.layout == "flat":
            return by_token.reshape(-1, 1)
        if self.layout in ("heads", "weights") and value.shape[2] == by_token.shape[1]:
            return by_token[:, None, :, None]
        if self.layout == "tokens" and value.dim() == 3 and value.shape[1] == by_token.shape[1]:
            return by_token[:, :, None]
        raise ValueError(
            f"positions: {self.site} is {list(value.shape)} here, which does not hold one row for each token of "
            f"{list(by_token.shape)}; change all positions."
        )

    def _by_head(self, value: Tensor, heads: Sequence[int]) -> Tensor:
        count = value.shape[1] if self.layout in ("heads", "weights") else self._heads
        if count is None:
            raise ValueError(f"heads: {self.site} has none; leave heads= out.")
        wrong = [head for head in heads if not 0 <= head < count]
        if wrong:
            raise ValueError(f"heads: {wrong[0]} was given for {self.site}, which has {count} heads, from 0.")
        chosen = torch.zeros(count, dtype=torch.bool, device=value.device)
        chosen[list(heads)] = True
        if self.layout in ("heads", "weights"):
            return chosen[:, None, None]
        return chosen.repeat_interleave(value.shape[-1] // count)


@contextmanager
def intervene(
    model: nn.Module,
    changes: Mapping[Site | str, Change],
    *,
    reads: Iterable[Site | str] = (),
    anatomy: Anatomy | None = None,
) -> Iterator[None]:
    """Replace the activations at sites while the context lasts.

    The order in which sites are named does not matter.

    Args:
        model: neither compiled nor sharded.
        changes: site (or a pattern of sites) -> a tensor, a `SiteChange`, or a function of (value, at) that returns
            another tensor of the same shape and dtype, or None for no change.
        reads: sites whose tensors a change may ask for: `at["blocks.2.block.output"]`.
        anatomy: of the model, if it was read before.

    Yields:
        Nothing.

    Raises:
        ValueError: a site is unknown, named twice or never came by (an expert without tokens need not), or what takes
            its place has another shape or dtype or was changed in place.
        NonFiniteError: what takes its place holds NaN or Inf.
        UnsupportedModelError: the model is compiled or sharded, or computes attention by itself and its scores or
            weights are to be changed.
    """
    refuse_compiled_or_sharded(model)
    for given in changes.values():
        _check_change(given)
    view = view_of(model, anatomy, None)
    reads = tuple(reads)
    with experts_for(view, dict.fromkeys((*changes, *reads))):
        by_tap = _placed(view, resolve(view, changes))
        asked = {site: _readable(view, site) for site in resolve(view, dict.fromkeys(reads))}
        read: dict[Site, Tensor] = {}
        seen: set[Tap] = set()
        passes = Passes(model)
        heads = {block.index: block.attention.heads for block in view.blocks if block.attention is not None}

        whole = 0  # passes that were not broken off

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read.clear()
            passes.begin(module, args, kwargs)

        def end(*_: Any) -> None:
            nonlocal whole
            whole += 1

        def see(tap: Tap, value: Tensor, tokens: Tensor | None) -> Tensor | None:
            seen.add(tap)
            other = None
            if tap in by_tap:
                site, change = by_tap[tap]
                by_head = heads.get(site.block or 0) if site.name == "attention.mixed" else None
                other = _changed(site, value, change, At(site, tap.layout, by_head, tokens, passes.now, read))
            for site, place in asked.items():
                if place == tap:
                    read[site] = value if other is None else other
            # The model changes such a tensor in place afterwards.
            return other.clone() if other is not None and tap.copied else other

        order = sorted({*by_tap, *asked.values()}, key=_order)
        with (
            hooked(model, before={"": begin}, after={"": end}, replacing=True),
            tapped(model, order, see, changes=True),
        ):
            yield
        missed = [site for tap, (site, _) in by_tap.items() if tap not in seen and tap.expert is None]
        if whole and missed:
            raise ValueError(
                f"site: {missed[0]} did not come by in any pass of the model, so nothing was changed there."
            )


def _check_change(given: Any) -> None:
    if isinstance(given, Tensor | SiteChange):
        return
    if not callable(given):
        raise ValueError(
            f"changes: a {type(given).__name__} was given; give a tensor, Add, Scale, Put, Zero or Detach, or a "
            f"function of (value, at)."
        )
    try:
        inspect.signature(given).bind(None, None)
    except TypeError as error:
        raise ValueError(
            "changes: a function is called with (value, at), and this one does not take two arguments; write it as "
            "in lambda value, at: 2 * value."
        ) from error
    except ValueError:  # a built-in function tells nothing of itself
        return


def _placed(view: Anatomy, found: Mapping[Site, Any]) -> dict[Tap, tuple[Site, Any]]:
    """Where each change is made. Raises ValueError for two in one place."""
    by_tap: dict[Tap, tuple[Site, Any]] = {}
    for site, given in found.items():
        tap = _readable(view, site)
        if isinstance(given, list) or tap in by_tap:
            other = site if isinstance(given, list) else by_tap[tap][0]
            raise ValueError(
                f"site: {other} and {site} name one tensor, and two changes were given for it; make them one function, "
                f"or nest two contexts."
            )
        by_tap[tap] = (site, change_of(given))
    return by_tap


def _readable(view: Anatomy, site: Site) -> Tap:
    tap = view.tap(view.canonical(site))
    if site.name != "attention.weights":
        return tap
    return Tap(tap.path, "inside", "weights", layout="weights")  # the model is done with them when it returns them


def _order(tap: Tap) -> tuple[Any, ...]:
    """Whole tensors before their parts, and otherwise any order that does not depend on how they were named."""
    return tap.columns is not None, tap.path, tap.where, str(tap.index), str(tap.columns), repr(tap)


def _changed(site: Site, value: Tensor, change: Any, at: At) -> Tensor | None:
    version = None if value.is_inference() else value._version
    other = change(value, at)
    if version is not None and value._version != version:
        raise ValueError(f"site: the change for {site} wrote into the tensor that it was given; return a new one.")
    if other is None:
        return None
    if not isinstance(other, Tensor):
        raise ValueError(f"site: the function for {site} returned a {type(other).__name__}; return a tensor or None.")
    if other.shape != value.shape:
        _refuse_shape(site, other, value)
    if other.dtype != value.dtype or other.device != value.device:
        raise ValueError(
            f"site: the function for {site} returned {other.dtype} on {other.device}, and {value.dtype} on "
            f"{value.device} stands there; return that."
        )
    if other is not value and other.is_floating_point() and not _all_finite(other.detach()):
        raise NonFiniteError(f"{site}: the change that was given for it returned NaN or Inf.")
    return other


def _all_finite(value: Tensor) -> bool:
    # NaN and Inf stay in a sum, which is one pass over the values; a sum that overflows by itself says nothing
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def _refuse_shape(site: Site, given: Tensor, value: Tensor) -> NoReturn:
    raise ValueError(
        f"site: {list(given.shape)} was given for {site}, which is {list(value.shape)} here; give the same shape."
    )
