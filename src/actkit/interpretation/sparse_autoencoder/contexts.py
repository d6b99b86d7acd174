"""Where the latents of a sparse autoencoder fire: the tokens around their largest values, to be read by a person.

    found = latent_contexts(autoencoder, store, text=tokenizer.decode)
    print(found.table(sort="density"))        # latents by how often they fire, each with its strongest contexts

When to use it: to see whether latents mean something before anything is built on them.
Cost: two passes of the autoencoder over the store at most, and k places for each latent.
Settled here: contexts are of the token's own sequence, as the store keeps them; latents that never fire have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from actkit.core.ground.progress import track
from actkit.core.page.page import Context, Facts, Page
from actkit.core.page.page import Table as Sorted
from actkit.core.store.activation_store import ActivationStore
from actkit.interpretation.sparse_autoencoder.autoencoder import SparseAutoencoder
from actkit.interpretation.sparse_autoencoder.training import LONGEST

if TYPE_CHECKING:
    from rich.table import Table

    from actkit.interpretation.dark_matter.error_split import ErrorSplit

ROWS = 4096  # that are encoded at once


@dataclass(frozen=True)
class LatentContext:
    """One place where a latent fires.

    Attributes:
        value: of the latent.
        row: of the store.
        tokens: texts of the tokens around it.
        place: of the token itself among them.
        values: of the latent at each of these tokens.
    """

    value: float
    row: int
    tokens: tuple[str, ...]
    place: int
    values: tuple[float, ...]

    @property
    def text(self) -> str:
        """The context with its token in brackets."""
        marked = [f"[{token}]" if at == self.place else token for at, token in enumerate(self.tokens)]
        return "".join(marked).replace("\n", "\\n")


@dataclass(frozen=True)
class ReadLatent:
    """A latent and where it fires.

    Attributes:
        latent: its number.
        density: share of the rows in which it fires.
        contexts: with the largest values, the largest first.
    """

    latent: int
    density: float
    contexts: tuple[LatentContext, ...]


@dataclass(frozen=True)
class LatentContexts:
    """Latents with their contexts.

    Attributes:
        site: of the activations.
        rows: that were encoded.
        latents: those that were asked for.
    """

    site: str
    rows: int
    latents: tuple[ReadLatent, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"site": self.site, "rows": self.rows, "latents": [asdict(each) for each in self.latents]}

    def table(self, sort: Literal["latent", "density", "value"] = "latent", most: int = 50) -> Table:
        """A row per latent.

        Args:
            sort: by number, by density or by the largest value, these two falling.
            most: rows, at most.
        """
        from rich import box
        from rich.text import Text

        from actkit.core.ground.tables import PlainTable

        if sort not in ("latent", "density", "value"):
            raise ValueError(f"sort: {sort!r} was given, allowed are latent, density and value.")
        keys: dict[str, Callable[[ReadLatent], float]] = {
            "latent": lambda each: each.latent,
            "density": lambda each: -each.density,
            "value": lambda each: -each.contexts[0].value if each.contexts else 0.0,
        }
        title = f"Latents at {self.site}, {self.rows:,} rows"
        table = PlainTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in ("latent", "fires in", "largest", "where"):
            table.add_column(name, justify="left" if name == "where" else "right")
        for each in sorted(self.latents, key=keys[sort])[:most]:
            largest = f"{each.contexts[0].value:.3g}" if each.contexts else ""
            where = Text("\n".join(context.text for context in each.contexts))
            table.add_row(str(each.latent), f"{each.density:.2%}", largest, where)
        return table

    def page(self, most: int = 2000, split: ErrorSplit | None = None) -> Page:
        """The latents to sort and filter, each with its contexts, whose tokens are shaded by the latent's values.

        Args:
            most: latents, at most; those that fire most often.
            split: of the autoencoder's error (`dark_matter.error_split.split_error`), shown above them.
        """
        shown = sorted(self.latents, key=lambda each: -each.density)[:most]
        rows, contexts = [], []
        for each in shown:
            first = each.contexts[0] if each.contexts else None
            token = "" if first is None else first.tokens[first.place]
            where = token.strip() or repr(token)[1:-1]  # line ends show as such
            rows.append((each.latent, 100 * each.density, 0.0 if first is None else first.value, where))
            contexts.append([Context(found.tokens, found.values) for found in each.contexts])
        never = sum(not each.contexts for each in self.latents)
        left = "" if len(shown) == len(self.latents) else f" Shown are the {len(shown):,} that fire most often."
        return Page(
            f"Latents at {self.site}",
            f"{len(self.latents):,} latents over {self.rows:,} rows, {never:,} of which never fire.{left}",
            (
                *([] if split is None else [_of_error(split)]),
                Sorted(
                    "Latents",
                    ("latent", "fires in (%)", "largest value", "at the token"),
                    rows,
                    "Open a latent for the places of its largest values; the filter looks at these texts too.",
                    contexts,
                ),
            ),
        )


def _of_error(split: ErrorSplit) -> Facts:
    return Facts(
        "What the latents leave out",
        [
            ("of the variance", f"{split.fvu:.1%} (FVU, {split.rows:,} held-out rows)"),
            ("of which linear in the activation", f"{split.fvu_linear:.1%}, which more latents may find"),
            ("of which the rest", f"{split.fvu_rest:.1%}"),
            ("active latents per row", f"{split.active:.1f}"),
        ],
    )


@torch.no_grad()
def latent_contexts(
    autoencoder: SparseAutoencoder,
    store: ActivationStore,
    site: str | None = None,
    *,
    latents: Sequence[int] | None = None,
    count: int = 3,
    before: int = 8,
    after: int = 4,
    longest: float = LONGEST,
    text: Callable[[list[int]], str] | None = None,
    progress: bool = True,
) -> LatentContexts:
    """Find where latents have their largest values.

    Args:
        autoencoder: of the activations.
        store: of them.
        site: one of its sites; None for that of the autoencoder, or the store's only one.
        latents: which ones; None for all.
        count: contexts of each.
        before: tokens before.
        after: tokens behind.
        longest: leave out rows whose norm is more than so many times the median, as in training; inf for none.
        text: makes text of one token's id, such as `tokenizer.decode`; None shows ids.
        progress: show a bar.

    Returns:
        The latents with their contexts.

    Raises:
        ValueError: the site is not in the store, a latent is not there, or a number is out of bounds.
    """
    name = site or autoencoder.site or next(iter(store.sites))
    chosen = list(range(autoencoder.latents)) if latents is None else list(latents)
    wrong = next((each for each in chosen if not 0 <= each < autoencoder.latents), None)
    if wrong is not None or min(count, before + 1, after + 1) < 1:
        raise ValueError(
            f"latents, count, before, after: {wrong}, {count}, {before} and {after} were given; latents are 0 to "
            f"{autoencoder.latents - 1}, counts 1 or more, tokens 0 or more."
        )
    index = torch.tensor(chosen, device=autoencoder.decoder.device)
    best = torch.zeros(len(chosen), count, device=index.device)
    rows = torch.full((len(chosen), count), -1, device=index.device)
    fired, done = torch.zeros(len(chosen), dtype=torch.int64, device=index.device), 0
    usual = torch.zeros(store.count(name), dtype=torch.bool)
    usual[store.numbers(name, longest=longest)] = True
    usual = usual.to(index.device)
    training = autoencoder.training
    autoencoder.eval()
    try:
        for x, _ in track(store.read(name), "Reading latents", len(store.shards), progress):
            for part in x.split(ROWS):
                values = autoencoder.encode(part.to(index.device, torch.float32))[:, index].T  # [latents, rows]
                values = values * usual[done : done + len(part)]
                fired += (values > 0).sum(1)
                numbers = torch.arange(done, done + len(part), device=index.device).expand(len(chosen), -1)
                found = torch.cat([best, values], 1).topk(count, dim=1)
                best, rows = found.values, torch.cat([rows, numbers], 1).gather(1, found.indices)
                done += len(part)
    finally:
        autoencoder.train(training)
    counted = int(usual.sum())
    read = []
    for place, latent in enumerate(chosen):
        contexts = []
        for value, row in zip(best[place].tolist(), rows[place].tolist(), strict=True):
            if value > 0:
                ids, own = store.context(name, row, before, after)
                tokens = tuple(str(each) + " " if text is None else text([each]) for each in ids)
                contexts.append(LatentContext(value, row, tokens, own, ()))
        read.append(ReadLatent(latent, float(fired[place]) / max(1, counted), tuple(contexts)))
    return LatentContexts(str(name), counted, tuple(_with_values(autoencoder, store, name, read, usual)))


def _with_values(
    autoencoder: SparseAutoencoder, store: ActivationStore, name: Any, read: list[ReadLatent], usual: Tensor
) -> Iterator[ReadLatent]:
    """Latents with their values at all tokens of their contexts; 0 at rows that do not count."""
    windows = [(each.latent, found) for each in read for found in each.contexts]
    device = usual.device
    wanted = [range(found.row - found.place, found.row - found.place + len(found.tokens)) for _, found in windows]
    rows = torch.tensor([row for window in wanted for row in window], dtype=torch.int64)
    latents = torch.tensor([latent for (latent, _), window in zip(windows, wanted, strict=True) for _ in window])
    values = torch.zeros(len(rows))
    single, place = rows.unique(return_inverse=True)
    training = autoencoder.training
    autoencoder.eval()
    try:
        for start in range(0, len(single), ROWS):
            part = single[start : start + ROWS]
            encoded = autoencoder.encode(store.take(name, part).to(device, torch.float32))
            here = ((place >= start) & (place < start + len(part))).nonzero()[:, 0]
            encoded = encoded * usual[part.to(device), None]
            values[here] = encoded[(place[here] - start).to(device), latents[here].to(device)].cpu().float()
    finally:
        autoencoder.train(training)
    each_value = iter(values.tolist())
    for latent in read:
        contexts = tuple(
            replace(found, values=tuple(next(each_value) for _ in found.tokens)) for found in latent.contexts
        )
        yield replace(latent, contexts=contexts)
