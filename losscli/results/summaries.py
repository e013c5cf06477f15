"""The summaries of results, STEM.json: a typed dictionary for each command, and their check.

A study makes its summary, its command in `cli` puts it into words, and `plotting` reads it. No key
is required: a figure is drawn from a CSV alone, and the JSON of an older version may lack one. A
number that is not finite is null in JSON, see `losscli.results.result.to_json`.
"""

from __future__ import annotations

import math
import sys
import types
from functools import cache
from typing import Any, NotRequired, TypedDict, get_args, get_origin, get_type_hints, is_typeddict


class CheckpointEntry(TypedDict, total=False):
    """A checkpoint: its name as given, its file, and the SHA-256 of its content."""

    name: str
    path: str | None
    sha256: str | None


class Sources(TypedDict, total=False):
    """What chose the loss and the metrics: an option, metadata, a file, or the default."""

    loss: str
    metrics: str


class Recalibration(TypedDict, total=False):
    """The examples that BatchNorm's statistics are re-estimated on."""

    split: str
    examples: int
    batch_size: int
    layers: int


class Moving(TypedDict, total=False):
    """The parameters that move."""

    tensors: int
    values: int


class Seconds(TypedDict, total=False):
    """How long the evaluation took, and the run."""

    sweep: float
    total: float


class Counts(TypedDict, total=False):
    """The examples of each split, and its batches if the loss is one number per batch."""

    examples: dict[str, int]
    batches: dict[str, int]


_Except = TypedDict("_Except", {"except": list[str]}, total=False)


class Provenance(_Except, Counts, total=False):
    """The settings, the software and the checkpoints that the numbers come from."""

    version: str
    torch: str
    python: str
    device: str
    device_name: str
    processes: int
    dtype: str
    tf32: bool
    model: str
    data: str
    loss: str
    objective: str | None
    metrics: list[str]
    sources: Sources
    seed: int
    limit: int | None
    batch_loss: bool
    stochastic: int | None
    sampling_error: float | None
    buffers: str
    recalibration: Recalibration | None
    only: list[str]
    ignore_unexpected: bool
    allow_missing: list[str]
    rename: list[str]
    checkpoints: list[CheckpointEntry]


class StrategyChoice(TypedDict):
    """How points are evaluated.

    ``difference`` is ‖l − t‖ / ‖t‖ with the losses l of the strategy and t of loaded points on a
    part of a batch; None if it was not measured, as a second copy of a large model would be needed.
    ``graph`` is ``used`` if batches are evaluated as CUDA graphs where there are enough of them, or
    the reason why not; missing where there are no graphs.
    """

    name: str
    difference: float | None
    graph: NotRequired[str]


class DrawingSummary(TypedDict, total=False):
    """The options of the figure that are not defaults, see `losscli.results.drawing.Drawing`."""

    log: bool
    size: str
    label: list[str]
    ylim: list[float]
    style: dict[str, str]
    no_markers: bool
    fps: float


class Origin(Provenance, total=False):
    """The first part of the summary of every study."""

    command: str
    identity: str
    drawing: DrawingSummary
    moving: Moving
    moving_buffers: int
    strategy: StrategyChoice


class Summary(Origin, total=False):
    """What the summaries of all studies have."""

    tables: list[str]
    notes: list[str]
    seconds: Seconds


class BatchCost(TypedDict, total=False):
    """How long one batch took at one point."""

    examples: int
    seconds: float


class ProductCost(TypedDict, total=False):
    """How long a product with the Hessian takes on all examples."""

    seconds: float


class CostEstimate(TypedDict, total=False):
    """How long a run will take; ``kind`` is "about", "at least" or "at most"."""

    seconds: float
    kind: str
    batch: BatchCost
    seconds_at_most: float
    product: ProductCost


class Description(Origin, total=False):
    """What a run will do, as ``--dry-run`` shows it."""

    points: int
    batch_size: int | None
    forward_passes: int
    points_at_once: int
    passes_over_data: int
    passes_for_statistics: int
    passes_for_repair: int
    bytes_of_weights: int
    bytes_of_data: int
    streamed: bool
    streamed_splits: list[str]
    blocks: list[str]
    pairs: int
    products_at_most: int
    bytes_of_basis: int
    bytes_of_graphs_at_most: int
    steps_at_most: int
    gradients_at_most: int
    points_along_gradients: int
    training_steps: int
    bytes_of_training: int
    estimate: CostEstimate


class RepairSummary(TypedDict):
    """What ``--repair`` corrected; ``skipped_at_most`` is the most units left out at a point."""

    split: str
    examples: int
    layers: int
    units: int
    skipped_at_most: int


# --- interpolate ---------------------------------------------------------------------------------


class LowestOnLine(TypedDict, total=False):
    """The lowest point of a line, how many points share its loss, and how far it is below an end.

    ``below_b`` on the line of all blocks, ``below_a`` on the line of one.
    """

    alpha: float
    loss: float
    ties: int
    below_a: float
    below_a_stderr: float
    below_b: float
    below_b_stderr: float | None


class Height(TypedDict, total=False):
    """A barrier and where it is."""

    height: float
    stderr: float
    alpha: float


class Rise(TypedDict, total=False):
    """The largest rise, from one point to a later one."""

    height: float
    stderr: float
    alpha_from: float | None
    alpha_to: float | None


class Extremum(TypedDict, total=False):
    """A local minimum with its depth, or a local maximum with its height."""

    alpha: float
    loss: float
    depth: float
    depth_stderr: float
    height: float
    height_stderr: float
    beyond_noise: bool


class Slope(TypedDict, total=False):
    """The derivatives dL/dα and d²L/dα²."""

    slope: float
    curvature: float


class LineSplit(TypedDict, total=False):
    """The curve of a line on one split, see `losscli.weight_space.curve.describe`."""

    loss_a: float
    loss_b: float
    minimum: LowestOnLine | None
    barrier: Height | None
    largest_rise: Rise | None
    monotonic: bool | None
    local_minima: list[Extremum]
    local_maxima: list[Extremum]
    not_finite: int
    slope_at_b: Slope | None


class BlockSplit(TypedDict, total=False):
    """The curve of one block that moves alone on one split."""

    loss_at_1: float
    change: float
    change_stderr: float
    minimum: LowestOnLine | None
    barrier: Height | None
    not_finite: int


class BlockSummary(TypedDict, total=False):
    """A block that moves alone, and its curve on each split."""

    tensors: int
    values: int
    distance: float
    splits: dict[str, BlockSplit]


class Refined(TypedDict, total=False):
    """How many points refining took, and how many an even grid would take."""

    tolerance: float
    points: int
    uniform_points: int
    exhausted: bool


class LineSummary(Summary, total=False):
    """The summary of ``interpolate``."""

    range: list[float]
    distance: float
    stays: dict[str, list[str]]
    refined: Refined | None
    splits: dict[str, LineSplit]
    blocks: dict[str, BlockSummary]
    repair: RepairSummary
    endpoint_difference: float


# --- trajectory ----------------------------------------------------------------------------------


class Farthest(TypedDict, total=False):
    """The checkpoint that is farthest from the straight line."""

    step: int
    checkpoint: str
    residual: float
    projection: float


class PathLengths(TypedDict, total=False):
    """The length of the line and of the path, and where the projection falls."""

    length: float
    walked: float
    farthest: Farthest
    steps_back: list[int]


class RandomWalks(TypedDict, total=False):
    """Random walks with the same step lengths, on average."""

    number: int
    length: float
    largest_residual: float


class LowestOnPath(TypedDict, total=False):
    """The checkpoint with the lowest loss."""

    step: int
    checkpoint: str
    loss: float
    ties: int


class LowestOnSurface(TypedDict, total=False):
    """The lowest point of the ribbon."""

    step: int
    projection: float
    residual: float
    loss: float
    ties: int


class TrajectorySplit(TypedDict, total=False):
    """The losses of a path and its ribbon on one split."""

    loss_first: float
    loss_last: float
    lowest: LowestOnPath | None
    rises: int
    not_finite: int
    surface_lowest: LowestOnSurface
    surface_not_finite: int


class TrajectorySummary(Summary, total=False):
    """The summary of ``trajectory``."""

    path: PathLengths
    random_walks: RandomWalks | None
    splits: dict[str, TrajectorySplit]
    endpoint_difference: float | None


# --- plane ---------------------------------------------------------------------------------------


class PlaneAxis(TypedDict, total=False):
    """What an axis is: its share of the variance of a path, or its eigenvalue of the Hessian."""

    name: str
    explained_variance: float | None
    eigenvalue: float
    error: float
    converged: bool


class ProjectedPath(TypedDict, total=False):
    """A path of ``--path``, the number of its checkpoints, and how far they are off the plane."""

    name: str
    checkpoints: int
    off_plane: float


class LowestOnPlane(TypedDict, total=False):
    """The lowest point of a plane."""

    x: float
    y: float
    loss: float
    ties: int


class PlaneSplit(TypedDict, total=False):
    """The losses of the checkpoints and of the plane on one split."""

    checkpoints: list[float]
    lowest: LowestOnPlane | None
    highest_loss: float | None
    not_finite: int


class PlaneSummary(Summary, total=False):
    """The summary of ``plane``."""

    plane: str
    axes: list[PlaneAxis]
    surface: bool
    x_range: list[float]
    y_range: list[float]
    off_plane: float
    paths: list[ProjectedPath]
    splits: dict[str, PlaneSplit]
    endpoint_difference: float


# --- barriers ------------------------------------------------------------------------------------


class PairBarrier(TypedDict, total=False):
    """The barrier between two checkpoints; ``alpha`` is None if there is none."""

    a: str
    b: str
    distance: float
    height: float
    stderr: float
    alpha: float | None


class MeanOverPairs(TypedDict, total=False):
    """A mean over pairs and its standard error, None for a single pair."""

    mean: float
    stderr: float | None


class PairsAtPosition(TypedDict, total=False):
    """The pairs of ``--pairs`` with one value of ``--x``: means of columns of the table."""

    x: float
    pairs: int
    values: dict[str, MeanOverPairs]


class BarriersSplit(TypedDict, total=False):
    """The losses of the checkpoints and the barriers between them on one split.

    ``barriers``, ``disagreement`` and ``cka`` are symmetric matrices; with ``--pairs`` there are
    ``means`` instead.
    """

    losses: list[float]
    barriers: list[list[float]]
    disagreement: list[list[float]]
    cka: list[list[float]]
    means: list[PairsAtPosition]
    largest: PairBarrier | None
    smallest: PairBarrier | None
    without: int
    not_finite: int


class BarriersSummary(Summary, total=False):
    """The summary of ``barriers``; ``pairs`` is the column of ``--x``."""

    alphas: list[float]
    pairs: str | None
    distances: list[list[float]]
    splits: dict[str, BarriersSplit]
    repair: RepairSummary
    endpoint_difference: float


# --- around --------------------------------------------------------------------------------------


class Derivative(TypedDict, total=False):
    """What a direction of ``--along`` is: a gradient and its norm, or an eigenvector."""

    direction: str
    gradient_norm: float
    eigenvalue: float
    error: float
    converged: bool


class BasinRadius(TypedDict, total=False):
    """The largest distance up to which the mean loss stays below a threshold.

    ``relative`` is the distance over ‖θ‖. ``bound`` is ``at least`` if the mean loss does not cross
    the threshold at the distances where it is known, ``at most`` if it crosses it before the first
    of them, and empty otherwise; then ``positions`` are where it crosses, negative in the opposite
    direction.
    """

    distance: float
    relative: float | None
    stderr: float | None
    bound: str
    positions: list[float]


class AroundPoint(TypedDict, total=False):
    """The loss around a checkpoint on one split.

    ``mean``, ``deviation`` (the standard deviation), ``low`` and ``high`` (10 % and 90 %) are over
    random directions, one for each coefficient. ``radii`` has a radius for each direction of
    ``--along``, and otherwise one for the ``mean``.
    """

    checkpoint: str
    loss: float
    threshold: float | None
    distances: list[float]
    relative_distances: list[float]
    mean: list[float]
    deviation: list[float]
    low: list[float]
    high: list[float]
    radii: dict[str, BasinRadius]
    not_finite: int
    rounded: int


class AroundSplit(TypedDict, total=False):
    """The loss around all checkpoints on one split."""

    points: list[AroundPoint]


class AroundSummary(Summary, total=False):
    """The summary of ``around``.

    A direction is ``lengths`` long for a coefficient of 1, the same for all random directions of a
    checkpoint. ``norms`` are the ‖θ‖ of the checkpoints, over the parameters that move.
    """

    along: str | None
    derivatives: dict[str, list[Derivative]]
    directions: list[str]
    coefficients: list[float]
    lengths: list[float]
    norms: list[float]
    basin: float | None
    basin_loss: float | None
    interpolation: str
    splits: dict[str, AroundSplit]
    endpoint_difference: float


# --- check ---------------------------------------------------------------------------------------


class Step(TypedDict, total=False):
    """A step from a checkpoint, and by how much it lowers the loss."""

    distance: float
    loss: float
    gain: float
    gain_stderr: float
    falls: bool


class Predicted(TypedDict, total=False):
    """The change of the loss towards a minimum or maximum; an upper bound if not exact."""

    change: float
    exact: bool


class Sides(TypedDict, total=False):
    """The steps to both sides along the eigenvector of the smallest eigenvalue."""

    negative: Step | None
    positive: Step | None


class Density(TypedDict, total=False):
    """The spectral density: the width σ of its Gaussians, outliers, and the trace by its probes.

    The eigenvalues apart from the bulk are in descending order.
    """

    sigma: float
    outliers: list[float]
    trace: float
    trace_stderr: float | None


class CheckedPoint(TypedDict, total=False):
    """What the table does not hold of one checkpoint on one split."""

    checkpoint: str
    split: str
    verdict: str
    reason: str | None
    slope_along_lambda_min: float
    loss_rounding: float
    predicted: Predicted | None
    sides: Sides | None
    rounding_measured_on: int
    unverified: str | None
    loss_seed_stderr: float | None
    lambda_min_converged: bool
    lambda_max_converged: bool
    preconditioned_lambda_max_converged: bool | None
    exact: bool
    products: int
    descent: Step | None
    density: Density | None


class CheckSplit(TypedDict, total=False):
    """The checkpoints on one split."""

    points: list[CheckedPoint]


class Escape(Step, total=False):
    """The lowest point along the most negative curvature of a checkpoint."""

    checkpoint: str
    split: str
    eigenvalue: float
    slope: float


class Preconditioner(TypedDict, total=False):
    """The state of Adam at a checkpoint; only the first two before its first step.

    ``threshold`` is (2 + 2β₁)/((1 − β₁)η) of full-batch training; None for η = 0.
    """

    checkpoint: str
    step: int
    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    amsgrad: bool
    weight_decay: float
    matched_by: str
    threshold: float | None


class CheckSummary(Summary, total=False):
    """The summary of ``check``."""

    tolerance: float
    learning_rate: float | None
    momentum: float | None
    threshold: float | None
    optimizer: str | None
    preconditioners: list[Preconditioner]
    operator: str | None
    probes: int | None
    lanczos: int | None
    splits: dict[str, CheckSplit]
    escape: Escape | None


# --- sharpness -----------------------------------------------------------------------------------


class SharpnessPoint(TypedDict, total=False):
    """What the table does not hold of one checkpoint on one split.

    ``critical_reason`` is why there is no critical step, or why it is 0.
    """

    checkpoint: str
    loss: float
    gradient_norm: float
    loss_rounding: float
    critical_sharpness_error: float
    critical_reason: str | None
    gradients: list[int]
    unverified: str | None
    loss_seed_stderr: float | None


class SharpnessSplit(TypedDict, total=False):
    """The checkpoints on one split."""

    points: list[SharpnessPoint]


class SharpnessSummary(Summary, total=False):
    """The summary of ``sharpness``."""

    rho: list[float]
    adaptive: bool
    samples: int
    direction_split: str | None
    learning_rates: dict[str, float]
    splits: dict[str, SharpnessSplit]
    endpoint_difference: float


# --- soup ----------------------------------------------------------------------------------------


class SoupSplit(TypedDict, total=False):
    """A greedy search on its split: the score of each checkpoint, those kept, and their average.

    The gain is the score of the average minus that of the best checkpoint.
    """

    score: str
    checkpoints: list[float]
    kept: list[str]
    soup: float
    gain: float
    gain_stderr: float


class SoupSummary(Summary, total=False):
    """The summary of ``soup --greedy``."""

    splits: dict[str, SoupSplit]


# --- connect -------------------------------------------------------------------------------------


class ConnectPath(TypedDict, total=False):
    """A path between two checkpoints; ``chord`` is ‖B − A‖."""

    kind: str
    bends: int
    length: float
    chord: float


class PathTrainingSummary(TypedDict, total=False):
    """How a path was trained; ``loss`` is the mean over the last tenth of the steps."""

    split: str
    examples: int
    steps: int
    learning_rate: float
    minibatch: int
    loss: float


class ConnectPlane(TypedDict, total=False):
    """The plane through A, the bend and B: where these corners and the points of the curve lie."""

    corners: list[list[float]]
    curve: list[list[float]]
    x_range: list[float]
    y_range: list[float]


class HighestOnCurve(TypedDict, total=False):
    """The highest loss on a curve."""

    t: float
    loss: float


class ConnectSplit(TypedDict, total=False):
    """One split on the curve and on the line, where α is t."""

    curve: LineSplit
    line: LineSplit
    highest: HighestOnCurve | None


class ConnectSummary(Summary, total=False):
    """The summary of ``connect``."""

    path: ConnectPath
    training: PathTrainingSummary
    plane: ConnectPlane | None
    checkpoint_files: list[str]
    splits: dict[str, ConnectSplit]
    endpoint_difference: float


# --- inspect -------------------------------------------------------------------------------------


class Inspected(CheckpointEntry, total=False):
    """A checkpoint, its size, and what its file says of it."""

    tensors: int
    values: int
    bytes: int
    norm: float
    metadata: dict[str, Any]


class InspectionSummary(TypedDict, total=False):
    """The summary of ``inspect``."""

    command: str
    drawing: DrawingSummary
    checkpoints: list[Inspected]
    buffers: list[str]
    mismatches: list[str]
    distance: float
    state_dicts: list[str]
    notes: list[str]


# --- align ---------------------------------------------------------------------------------------


class AlignedGroup(TypedDict, total=False):
    """Hidden units that are permuted together, how many change places, and their tensors."""

    units: int
    moved: int
    tensors: list[str]


class BeforeAfter(TypedDict, total=False):
    """A number before B is permuted, and after."""

    before: float
    after: float


class FunctionCheck(TypedDict, total=False):
    """The largest difference of the outputs of B and of B permuted, as a share of the largest."""

    dtype: str
    examples: int
    largest_difference: float


class OfBoth(TypedDict):
    """A number of units of A, and of B."""

    a: int
    b: int


class MatchedActivations(TypedDict):
    """The examples that units were matched on, and what was found.

    ``without_variance`` counts the units that are matched apart; ``correlation`` is the mean over
    A's other units.
    """

    split: str
    examples: int
    without_variance: OfBoth
    correlation: BeforeAfter


class AlignmentSummary(TypedDict, total=False):
    """The summary of ``align``."""

    command: str
    version: str
    torch: str
    python: str
    device: str
    device_name: str
    model: str
    data: str
    seed: int
    by: str
    checkpoints: list[CheckpointEntry]
    groups: list[AlignedGroup]
    units: int
    moved: int
    sweeps: int
    activations: MatchedActivations
    values: int
    tensors: int
    distance: BeforeAfter
    inner_product: BeforeAfter
    check: FunctionCheck
    notes: list[str]
    seconds: Seconds


# --- init ----------------------------------------------------------------------------------------


class FirstBatch(TypedDict, total=False):
    """The mean loss over a first batch, and its number of examples."""

    loss: float
    examples: int


class ProjectSummary(TypedDict, total=False):
    """The summary of ``init``."""

    command: str
    file: str
    checkpoints: list[CheckpointEntry]
    model: str
    moving: Moving
    data: str
    loss: str
    metrics: list[str]
    sources: Sources
    first_batch: dict[str, FirstBatch]
    needs_trust: bool
    next: str
    notes: list[str]


# --- Reading -------------------------------------------------------------------------------------

_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "an object",
    list: "a list",
}

_fields_of = cache(get_type_hints)


def from_json(value: Any, expected: Any, place: str = "it") -> Any:
    """Reads a value of a type from what JSON holds.

    Args:
        value: What JSON holds.
        expected: A type of this module, or what these are made of.
        place: Where the value stands, for the text of an error.

    Returns:
        The value, with nan for the null that stands for a number which is not finite. Of an
        object, keys that its type does not have are left out.

    Raises:
        ValueError: The value, or one inside it, is of another type; the text says where.
    """
    if get_origin(expected) is types.UnionType:
        (kind,) = {*get_args(expected)} - {type(None)}  # or null: there are no other unions here
        return None if value is None else from_json(value, kind, place)
    if expected is Any:
        return value
    if expected is float and value is None:
        return math.nan
    kind = dict if is_typeddict(expected) else get_origin(expected) or expected
    # A number of JSON may be larger than every float.
    right = {int, float} if kind is float else {kind}
    if type(value) not in right or (kind is float and not abs(value) <= sys.float_info.max):
        raise ValueError(f"{place} is not {_NAMES[kind]}")
    if kind is list:
        (item,) = get_args(expected)
        return [from_json(inner, item, f"{place}[{k}]") for k, inner in enumerate(value)]
    if kind is dict:
        hints = _fields_of(expected) if is_typeddict(expected) else {}
        within = "" if place == "it" else f"{place}."
        return {
            key: from_json(inner, hints.get(key) or get_args(expected)[-1], f"{within}{key}")
            for key, inner in value.items()
            if key in hints or not is_typeddict(expected)
        }
    return float(value) if kind is float else value
