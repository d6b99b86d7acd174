"""What a transform declares about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Slot = Literal["weight", "select", "inputs", "correction"]


@dataclass(frozen=True)
class Tags:
    """What a transform declares about itself; the runner and `actkit.testing.check_transform` go by it.

    Attributes:
        slot: the slot of ActLinear that it fills, or several; two transforms that fill the same one conflict.
        changes_function: 'exact' edits keep the outputs to rounding; the runner compares blocks before and after.
        evaluated: the model must be in evaluation mode when it is applied: what it folds reads the batch in training.
        parts: it goes by the parts of the anatomy. False for one that goes by modules alone and changes no weights: it
            works on a model that cannot be read, and no coverage is asked of it.
        least_coverage: share of the parameters inside blocks that it touches at least, if the model was read as it is.
        by_layer: it looks at a block by its linear layers alone, so that `only` may limit it to some of them.
        factors: it puts factors into the weight slot, which are weights that a quantizer behind it may round.
        needs_data: calibration batches are required (at some settings only: see `Transform.needs_data`).
        stream: the hidden states it calibrates on, of the original or of the edited model, or both; 'none' if `plan`
            alone looks at the data, so that no walk goes through the blocks for its sake.
        plans_in_turn: its `plan` needs the model as the transforms before it left it. These are applied to all blocks
            first, and what they left is the original from there on, for this transform and those after it.
        spans_blocks: its edits of all blocks, and of what stands before and behind them, belong together: it is applied
            to the whole model before the transforms behind it see any block, as if these planned in turn.
        records_calls: it replays recorded calls, which count in the memory plan.
        observes_in_turn: it goes through a block with `seen.observe` and edits, layer after layer: what the last layers
            of attention and MLP read is kept from pass to pass, and counts in the memory plan.
        needs_targets: it needs what the untouched block gives on the original stream (`Seen.targets`).
        sums_calls: it adds up with `seen.total` what it computes from recorded calls, so that it may run in several
            processes, each of which has a share of the calls.
        passes: forward passes over the data that it costs, for the estimate of time.
        compiles: the changed model runs under torch.compile.
        exports: the changed model runs through torch.export.
    """

    # what it changes
    slot: Slot | tuple[Slot, ...] | None = None
    changes_function: Literal["exact", "approximate"] = "approximate"
    evaluated: bool = False
    parts: bool = True
    least_coverage: float = 0.5
    by_layer: bool = False
    factors: bool = False
    # what it calibrates on
    needs_data: bool = False
    stream: Literal["original", "edited", "both", "none"] = "edited"
    plans_in_turn: bool = False
    spans_blocks: bool = False
    records_calls: bool = False
    observes_in_turn: bool = False
    needs_targets: bool = False
    sums_calls: bool = False
    passes: float = 1.0
    # what the changed model can do
    compiles: bool = True
    exports: bool = True

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots of ActLinear that it fills, always as a tuple."""
        return self.slot if isinstance(self.slot, tuple) else () if self.slot is None else (self.slot,)

    @property
    def observed_stream(self) -> Literal["original", "edited"]:
        """The stream whose hidden states it observes."""
        return "original" if self.stream == "original" else "edited"
