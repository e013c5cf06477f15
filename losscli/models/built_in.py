"""The built-in architectures: a multi-layer perceptron and a small convolutional network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from losscli.errors import SpecError

__all__ = ["CNN", "MLP"]

# In place where torch allows it: each is applied to a tensor of its own, the output of a layer.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


# A file may contain any number of sizes, and each layer takes milliseconds to build.
_MAX_LAYERS = 500


class MLP(nn.Module):
    """A multi-layer perceptron; inputs of any shape are flattened.

    Maxout (Goodfellow et al. 2013, arXiv 1302.4389): each hidden unit is the largest of
    ``pieces`` affine functions of its inputs.

    Args:
        sizes: The widths of the layers from inputs to outputs, such as ``784-512-10``.
        activation: ``relu``, ``sigmoid``, ``tanh`` or ``maxout``.
        pieces: Affine functions per maxout unit.

    Raises:
        SpecError: The sizes are not two or more positive numbers, the activation is unknown, or
            pieces is below 1.

    Shape:
        inputs ``[B, *]`` with ``sizes[0]`` values per example; outputs ``[B, sizes[-1]]``.
    """

    def __init__(
        self, sizes: str | Sequence[int], *, activation: str = "relu", pieces: int = 2
    ) -> None:
        super().__init__()
        widths = _widths(sizes, "mlp", at_least=2)
        if activation not in (*ACTIVATIONS, "maxout"):
            known = ", ".join([*ACTIVATIONS, "maxout"])
            raise SpecError(f"mlp: unknown activation {activation!r}", f"Known are {known}")
        if not isinstance(pieces, int) or pieces < 1:
            raise SpecError(f"mlp: pieces={pieces} is not a number of affine functions", "Give 2")
        self.activation = activation
        self.pieces = pieces if activation == "maxout" else 1
        *hidden, last = itertools.pairwise(widths)
        self.layers = nn.ModuleList(
            [nn.Linear(i, o * self.pieces) for i, o in hidden] + [nn.Linear(*last)]
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Computes the outputs before any softmax, ``[B, sizes[-1]]``, of inputs ``[B, *]``."""
        x = inputs.flatten(1)
        *hidden, last = self.layers
        for layer in hidden:
            x = layer(x)
            if self.activation == "maxout":
                x = x.unflatten(1, (-1, self.pieces)).amax(2)
            else:
                x = ACTIVATIONS[self.activation](x)
        outputs: Tensor = last(x)
        return outputs


class CNN(nn.Module):
    """A small convolutional network: blocks of 3×3 convolution, ReLU and 2×2 max pooling.

    Args:
        widths: The channels of the blocks, such as ``16-32``.
        channels: The channels of the images.
        classes: The number of outputs.
        batchnorm: Whether each convolution is followed by BatchNorm.

    Raises:
        SpecError: A width, ``channels`` or ``classes`` is not a positive number, or ``batchnorm``
            must be true or false.

    Shape:
        inputs ``[B, channels, H, W]``; outputs ``[B, classes]``.
    """

    def __init__(
        self,
        widths: str | Sequence[int],
        *,
        channels: int = 1,
        classes: int = 10,
        batchnorm: bool = False,
    ) -> None:
        super().__init__()
        blocks = _widths(widths, "cnn", at_least=1)
        _widths([channels, classes], "cnn", at_least=2)
        if not isinstance(batchnorm, bool):
            raise SpecError(
                f"cnn: batchnorm={batchnorm} must be true or false", "Write batchnorm=true"
            )
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1, bias=not batchnorm)
            for i, o in itertools.pairwise([channels, *blocks])
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(o) if batchnorm else nn.Identity() for o in blocks
        )
        self.head = nn.Linear(blocks[-1], classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Computes the outputs before any softmax, ``[B, classes]``, of ``[B, channels, H, W]``."""
        x = inputs
        for index, (convolution, norm) in enumerate(
            zip(self.convolutions, self.norms, strict=True)
        ):
            x = torch.relu_(norm(convolution(x)))
            if index < len(self.convolutions) - 1:
                x = nn.functional.max_pool2d(x, 2)
        outputs: Tensor = self.head(x.mean((2, 3)))
        return outputs


def _widths(sizes: str | Sequence[int], model: str, *, at_least: int) -> list[int]:
    try:
        given = sizes.split("-") if isinstance(sizes, str) else list(sizes)
        widths = [int(size) for size in given]
    except (TypeError, ValueError, OverflowError):
        given = widths = []
    if len(widths) > _MAX_LAYERS:
        raise SpecError(
            f"{model}: {len(widths):,} sizes are more than the {_MAX_LAYERS:,} it has layers for",
            "Give your own code that builds the model",
        )
    rounded = not isinstance(sizes, str) and widths != given
    if len(widths) < at_least or min(widths) < 1 or rounded:
        example = {"mlp": "mlp:784-512-10", "cnn": "cnn:16-32,channels=3"}[model]
        raise SpecError(
            f"{model}: {sizes!r} is not a list of sizes", f"Write for example {example}"
        )
    return widths
