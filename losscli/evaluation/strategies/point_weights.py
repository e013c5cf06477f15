"""The weights of all points of a slice, each tensor stacked over the points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from losscli.evaluation import gpu_thresholds
from losscli.evaluation.device import uses_tensor_cores
from losscli.evaluation.strategies.base import Network
from losscli.weight_space.slices import Slice

__all__ = ["PointWeights", "SinglePointWeights", "combining_type", "weights_at"]

# Values that are converted to another type at once: on a CPU few enough to stay in its cache.
_PIECE = 1 << 14
_PIECE_ELSEWHERE = 1 << 22

# Tensors in a buffer start at multiples of this many values: the fastest kernels of a GPU need
# aligned operands.
_ALIGNMENT = 128


class PointWeights:
    """The weights of P points of a slice, each tensor stacked over the points.

    Memory is allocated at once; the weights in it are computed by `fill`, so that no time is spent
    on weights that no forward pass uses.

    Args:
        network: The model.
        slice_: The slice.
        coordinates: The points.
        tensors: The model's tensors that move along the slice. If there is a single point, it is
            written over these.

    Attributes:
        stacks: ``[P, *shape]`` for each tensor.
        rows: The tensor of each point, views of the stacks. Made once, because indexing a stack
            takes as long as launching a kernel.
    """

    def __init__(
        self,
        network: Network,
        slice_: Slice,
        coordinates: Sequence[Sequence[float]],
        tensors: Mapping[str, Tensor],
    ) -> None:
        self._slice = slice_
        self._coordinates = coordinates
        number = len(coordinates)
        channels_last = _channels_last(network)
        self.stacks: dict[str, Tensor] = {}
        for name, own in tensors.items():
            if name in channels_last:
                # The layout of each point's kernels, [out, in, h, w], is out, h, w, in.
                o, i, h, w = own.shape
                stack = own.new_empty(number, o, h, w, i).permute(0, 1, 4, 2, 3)
            elif number == 1:
                # A single point needs no memory of its own.
                stack = own.unsqueeze(0)
            else:
                stack = own.new_empty(number, *own.shape)
            self.stacks[name] = stack
        self.rows = {name: stack.unbind(0) for name, stack in self.stacks.items()}
        self._missing = {name: set(range(number)) for name in self.stacks}

    def fill(self, name: str, points: Iterable[int]) -> None:
        """Computes a tensor at points, by their indices, where it has not been computed yet."""
        missing = self._missing[name]
        rows = [p for p in points if p in missing]
        if rows:
            outs = [self.rows[name][p] for p in rows]
            _fill(outs, self._slice, name, [self._coordinates[p] for p in rows])
            # Only now: another thread that needs a row meanwhile writes the same values to it.
            missing.difference_update(rows)


class SinglePointWeights:
    """One set of weights, which is moved from one point of a slice to the next.

    Small tensors of one type lie in one buffer, so that they take two kernels per point and not two
    per tensor. Every number is computed as in `PointWeights`. A single `torch.lerp` of the ends in
    the type of the model would not give these bits, since combinations are rounded from float64.

    Args:
        network: The model.
        slice_: The slice.
        tensors: The model's tensors that move along the slice. Large ones are overwritten.

    Attributes:
        tensors: The tensors of the point; `move_to` changes their values and not their memory.
    """

    def __init__(self, network: Network, slice_: Slice, tensors: Mapping[str, Tensor]) -> None:
        self._slice = slice_
        channels_last = _channels_last(network)
        small: dict[torch.dtype, list[str]] = {}
        self._large: list[str] = []
        self.tensors: dict[str, Tensor] = {}
        for name, own in tensors.items():
            if own.nbytes <= gpu_thresholds.SMALL_TENSOR:
                small.setdefault(own.dtype, []).append(name)
            else:
                self._large.append(name)
                self.tensors[name] = (
                    torch.empty_like(own, memory_format=torch.channels_last)
                    if name in channels_last
                    else own
                )
        self._buffers: list[_Buffer] = []
        for dtype, names in small.items():
            moved = [
                [end[n].movedim(1, -1) if n in channels_last else end[n] for n in names]
                for end in slice_.ends
            ]
            working = combining_type(tensors[names[0]])
            ends = [torch.cat([_padded(t.to(working)) for t in end]) for end in moved]
            weights = torch.empty_like(ends[0], dtype=dtype)
            parts = torch.split(weights, [len(_padded(t)) for t in moved[0]])
            for name, part, like in zip(names, parts, moved[0], strict=True):
                tensor = part[: like.numel()].view(like.shape)
                self.tensors[name] = tensor.movedim(-1, 1) if name in channels_last else tensor
            self._buffers.append(_Buffer(ends, weights, torch.empty_like(ends[0])))

    def move_to(self, point: Sequence[float]) -> None:
        """Computes the weights at the coordinates of a point."""
        for buffer in self._buffers:
            combined = self._slice.combine(buffer.ends, point, buffer.combined)
            buffer.weights.copy_(combined)
        for name in self._large:
            _fill([self.tensors[name]], self._slice, name, [point])


@dataclass(frozen=True)
class _Buffer:
    """Small tensors of one type, joined.

    Attributes:
        ends: Their values at each end of the slice, in the type of combinations.
        weights: Their values at the point.
        combined: The same before rounding.
    """

    ends: Sequence[Tensor]
    weights: Tensor
    combined: Tensor


def _padded(tensor: Tensor) -> Tensor:
    return F.pad(tensor.reshape(-1), (0, -tensor.numel() % _ALIGNMENT))


def _channels_last(network: Network) -> frozenset[str]:
    """The kernels of 2-D convolutions, if these are faster with the channels last."""
    # On two cores of an Ice Lake Xeon ResNet-20 takes 1.3 to 1.4 times as long with the channels
    # first. A GPU's tensor cores are faster with the channels last, its float32 units are not.
    tensors = network.tensors
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    if device.type != "cpu" and not uses_tensor_cores(device, network.dtype):
        return frozenset()
    kernels = {
        id(module.weight) for module in network.model.modules() if isinstance(module, nn.Conv2d)
    }
    return frozenset(name for name, tensor in tensors.items() if id(tensor) in kernels)


def _fill(
    outs: Sequence[Tensor], slice_: Slice, name: str, coordinates: Sequence[Sequence[float]]
) -> None:
    """Writes a tensor at points: combined in float64, then rounded once.

    In float32 a combination with terms that nearly cancel would lose its digits.
    """
    ends = [end[name] for end in slice_.ends]
    working = combining_type(outs[0])
    if all(tensor.dtype == working for tensor in (outs[0], *ends)):
        for out, point in zip(outs, coordinates, strict=True):
            slice_.combine(ends, point, out)
    elif not outs[0].is_contiguous():
        values = [end.to(working) for end in ends]
        for out, point in zip(outs, coordinates, strict=True):
            out.copy_(slice_.combine(values, point))
    else:
        # Piece by piece, so that there is no second copy of a large tensor.
        rows, flat = [out.view(-1) for out in outs], [end.reshape(-1) for end in ends]
        length = _PIECE if outs[0].device.type == "cpu" else _PIECE_ELSEWHERE
        for start in range(0, len(flat[0]), length):
            piece = slice(start, start + length)
            values = [end[piece].to(working) for end in flat]
            buffer = torch.empty_like(values[0])
            for row, point in zip(rows, coordinates, strict=True):
                row[piece].copy_(slice_.combine(values, point, buffer))


def weights_at(
    slice_: Slice, tensors: Mapping[str, Tensor], point: Sequence[float]
) -> dict[str, Tensor]:
    """Computes the weights at a point, in the types of the model's tensors."""
    weights = {}
    for name in slice_.ends[0]:
        own = tensors[name]
        ends = [end[name].to(combining_type(own)) for end in slice_.ends]
        weights[name] = slice_.combine(ends, point).to(own.dtype)
    return weights


def combining_type(tensor: Tensor) -> torch.dtype:
    """Returns float64 or complex128, in which a tensor is combined; on MPS at least float32."""
    narrow = tensor.device.type == "mps"
    return torch.promote_types(tensor.dtype, torch.float32 if narrow else torch.float64)
