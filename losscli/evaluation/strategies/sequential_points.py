"""Points of a slice that take all batches one after the other, in one set of weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

from losscli.data import Nest
from losscli.evaluation.recalibration import Statistics, recording
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
            if p == 1:
                self._first = self._statistics
            self._statistics = Statistics(1)
            self._point = p
            yield range(p, p + 1)

    def empty_statistics(self) -> Tensor:
        """Allocates memory for the statistics of a training batch, after the first point.

        Returns:
            ``[n]``, for all statistics that were recorded at the first point, one after another.
        """
        totals = self._first.totals(0)
        numbers = sum(total.numel() for total in totals)
        return totals[0].new_empty(numbers) if totals else torch.empty(0)

    def write_statistics(self, inputs: Nest, out: Tensor) -> None:
        """Writes BatchNorm's statistics of a training batch at the point of the pass.

        Args:
            inputs: The batch, prepared.
            out: Receives them, as `empty_statistics` returns it.
        """
        with recording(self._network.statistics) as statistics:
            self._network.forward(self._network.model, inputs)
        if self._first.names:
            torch.cat([statistics[name][0] for name in self._first.names], out=out)

    def set_statistics(self, totals: Tensor) -> None:
        """Sets the sums of the statistics over all training batches at the point of the pass.

        Args:
            totals: The sums of what `write_statistics` wrote.
        """
        self._statistics.set_totals(0, totals, self._first)
