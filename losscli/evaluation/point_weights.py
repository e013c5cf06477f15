"""The weights of all points of a slice, each tensor stacked over the points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from losscli.evaluation.strategies import Network
from losscli.weight_space.slices import Slice

__all__ = ["combining_type", "stacked_weights"]

# Values that are converted to another type at once: on a CPU few enough to stay in its cache.
_PIECE = 1 << 14
_PIECE_ELSEWHERE = 1 << 22


def stacked_weights(
    network: Network,
    slice_: Slice,
    coordinates: Sequence[Sequence[float]],
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Computes the weights of all points.

    Args:
        network: The model.
        slice_: The slice.
        coordinates: The P points.
        tensors: The model's tensors that move along the slice. If there is a single point, it is
            written over these.

    Returns:
        ``[P, *shape]`` for each tensor.
    """
    number = len(coordinates)
    channels_last = _channels_last(network)
    stacks = {}
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
        _fill(stack, slice_, name, coordinates)
        stacks[name] = stack
    return stacks


def _channels_last(network: Network) -> frozenset[str]:
    """The kernels of 2-D convolutions, if these are faster with the channels last."""
    # On two cores of an Ice Lake Xeon ResNet-20 takes 1.3 to 1.4 times as long with the channels
    # first. A GPU's tensor cores are faster with the channels last, its float32 units are not.
    tensors = network.tensors
    device = next(iter(tensors.values())).device.type if tensors else "cpu"
    half = network.dtype in {torch.float16, torch.bfloat16}
    if device != "cpu" and not (device == "cuda" and (half or torch.backends.cudnn.allow_tf32)):
        return frozenset()
    kernels = {
        id(module.weight) for module in network.model.modules() if isinstance(module, nn.Conv2d)
    }
    return frozenset(name for name, tensor in tensors.items() if id(tensor) in kernels)


def _fill(stack: Tensor, slice_: Slice, name: str, coordinates: Sequence[Sequence[float]]) -> None:
    """Writes a tensor at all points, ``[P, *shape]``: combined in float64, then rounded once.

    In float32 a combination with terms that nearly cancel would lose its digits.
    """
    ends = [end[name] for end in slice_.ends]
    working = combining_type(stack)
    if all(tensor.dtype == working for tensor in (stack, *ends)):
        for out, point in zip(stack, coordinates, strict=True):
            slice_.combine(ends, point, out)
    elif not stack[0].is_contiguous():
        values = [end.to(working) for end in ends]
        for out, point in zip(stack, coordinates, strict=True):
            out.copy_(slice_.combine(values, point))
    else:
        # Piece by piece, so that there is no second copy of a large tensor.
        rows, flat = [out.view(-1) for out in stack], [end.reshape(-1) for end in ends]
        length = _PIECE if stack.device.type == "cpu" else _PIECE_ELSEWHERE
        for start in range(0, len(flat[0]), length):
            piece = slice(start, start + length)
            values = [end[piece].to(working) for end in flat]
            buffer = torch.empty_like(values[0])
            for row, point in zip(rows, coordinates, strict=True):
                row[piece].copy_(slice_.combine(values, point, buffer))


def combining_type(tensor: Tensor) -> torch.dtype:
    """Returns the type in which a tensor is combined.

    Args:
        tensor: A tensor of the model.

    Returns:
        float64 or complex128; on MPS, which has neither, at least float32.
    """
    narrow = tensor.device.type == "mps"
    return torch.promote_types(tensor.dtype, torch.float32 if narrow else torch.float64)
