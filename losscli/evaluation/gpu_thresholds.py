"""Numbers that decide how a GPU is used.

They are computed from an H100's rates (67 TFLOP/s in float32, 495 in TF32, 990 in bfloat16, memory
at 3.35 TB/s, an L2 cache of 50 MB) and from 4 µs to launch a kernel. None has been measured on a
GPU. `python -m tests.benchmarks.gpu` measures those that it names here, and prints each beside what
it found.
"""

from __future__ import annotations

__all__ = [
    "LEAST_REPLAYS",
    "SMALL_TENSOR",
    "STACKED_BYTES",
    "WORTH_SHARING",
    "WORTH_SHARING_ON_TENSOR_CORES",
]

WORTH_SHARING = 80
"""Weights of a unit from which its layer is shared by all points of a line, in float32.

For fewer, reading the layer's outputs at both ends takes longer than computing it at the point.
Measured by the part ``sharing``.
"""

WORTH_SHARING_ON_TENSOR_CORES = 600
"""The same where tensor cores multiply. Measured by the part ``sharing``."""

LEAST_REPLAYS = 64
"""The fewest replays for which graphs are recorded.

To record one takes about 20 ms: the batch is evaluated three more times, the device is waited for,
and unused memory is freed and allocated again. A replay saves 0.3 ms at most, the launches of 80
kernels. Measured by the part ``graphs``.
"""

SMALL_TENSOR = 1 << 20
"""Bytes of a tensor that is combined together with others: for a larger one the GPU takes longer to
combine it than the host to launch the kernels."""

STACKED_BYTES = 32 << 20
"""Bytes of the widest layer of a stacked perceptron, over all points, for the examples that pass
through it together: so much stays in the L2 cache from one layer to the next. Measured by the part
``stacked``."""
