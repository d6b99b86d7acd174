"""A small convolutional network in plain torch: the zoo's model that no library knows."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn


class DigitsCNN(nn.Module):
    """Two convolutions and two linear layers, all with ReLU between, for images [batch, 1, 8, 8] in [0, 1]; 10 classes.

    Args:
        channels: of the two convolutions.
        hidden: width of the linear layer.
    """

    input_shape = (1, 8, 8)

    def __init__(self, channels: tuple[int, int] = (16, 32), hidden: int = 64) -> None:
        super().__init__()
        self.settings = {"channels": list(channels), "hidden": hidden}
        self.conv1 = nn.Conv2d(1, channels[0], 3, padding=1)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels[0], channels[1], 3, stride=2, padding=1)
        self.act2 = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(channels[1] * 4 * 4, hidden)
        self.act3 = nn.ReLU()
        self.fc2 = nn.Linear(hidden, 10)

    def spec(self) -> dict[str, Any]:
        """Its JSON arguments, as a checkpoint keeps them."""
        return self.settings

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """The model that `spec` described; its values come from the weights file."""
        return cls(**{**spec, "channels": tuple(spec["channels"])} if spec else {})

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits [batch, 10]."""
        x = self.act1(self.conv1(pixel_values))
        x = self.act2(self.conv2(x))
        return self.fc2(self.act3(self.fc1(self.flatten(x))))
