"""Your own model, which actkit traces: a classifier of vectors whose activation is clipped."""

from __future__ import annotations

from torch import Tensor, nn

from actkit_clip.clip import Clipped


class ClippedClassifier(nn.Module):
    """Maps vectors [batch, 16] to logits [batch, 4]."""

    input_shape = (16,)  # of one example, so that actkit can make some up

    def __init__(self, limit: float = 2.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(16, 32)
        self.limit, self.act = limit, Clipped(nn.GELU(), limit)
        self.head = nn.Linear(32, 4)

    def spec(self) -> dict[str, float]:
        """What `from_spec` needs to build it, as JSON; weights come from the weights file."""
        return {"limit": self.limit}

    @classmethod
    def from_spec(cls, spec: dict[str, float]) -> ClippedClassifier:
        """The model that `spec` described."""
        return cls(**spec)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.act(self.hidden(pixel_values)))
