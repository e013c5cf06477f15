"""Points of a slice that take all batches one after the other, in one set of weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

from losscli.evaluation.recalibration import Statistics
from losscli.evaluation.spectral import normalise
from losscli.evaluation.strategies.base import Network
from losscli.evaluation.strategies.point_weights import SinglePointWeights
from losscli.evaluation.strategies.points import (
    LoadedPoint,
    cudnn_weights,
    moving_spectral_layers,
)
from losscli.weight_space.slices import Slice

__all__ = ["SequentialPoints"]


class SequentialPoints(LoadedPoint):
    """P points of a slice, each of which takes all batches before the next point.

    The weights lie in the same memory at every point, so the model's tensors are bound once; the
    host does not bind every tensor for every batch and point, and P points take the memory of one.
    In return nothing is shared between points, and data must be read once per point: this is for
    examples on the device.

    Args:
        network: The model. Within the context its tensors are bound to those of the points.
        slice_: The slice.
        coordinates: The points.
    """

    def __init__(
        self, network: Network, slice_: Slice, coordinates: Sequence[Sequence[float]]
    ) -> None:
        super().__init__(network)
        self._coordinates = coordinates
        self._spectral = moving_spectral_layers(network, slice_)
        # Computed at each point, not combined.
        computed = {name for layer in network.statistics for name in layer.names}
        computed |= {name for layer in self._spectral for name in layer.names}
        names = slice_.ends[0].keys() | computed
        self._own = {name: network.tensors[name].data for name in names}
        moving = {name: self._own[name] for name in slice_.ends[0] if name not in computed}
        self._weights = SinglePointWeights(network, slice_, moving)
        self._copied = cudnn_weights(network) & moving.keys()
        bound = {name: self._own[name].clone() for name in computed} | self._weights.tensors
        self._bound = {name: t for name, t in bound.items() if name not in self._copied}

    def __enter__(self) -> Self:
        for name, tensor in self._bound.items():
            self._network.tensors[name].data = tensor
        return self

    def __exit__(self, *_: object) -> None:
        for name, own in self._own.items():
            self._network.tensors[name].data = own

    def __len__(self) -> int:
        return len(self._coordinates)

    def passes(self) -> Iterator[range]:
        """Moves the weights to each point.

        Yields:
            The index of the point that takes part in the next pass through the data.
        """
        tensors = self._network.tensors
        for p, point in enumerate(self._coordinates):
            self._weights.move_to(point)
            for name in self._copied:
                self._own[name].copy_(self._weights.tensors[name])
            normalise(self._spectral, tensors)
            self._statistics = Statistics(1)
            self._point = p
            yield range(p, p + 1)
