"""Checks that the model, the loss and the data work together, before anything is evaluated."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from losscli.data import RandomnessDetector, Split, leaves, map_inputs, seed_all
from losscli.errors import LosscliError, LossError, ModelError, NondeterministicModelError
from losscli.evaluation.class_targets import IGNORED
from losscli.evaluation.device import Narrowest
from losscli.evaluation.doubts import Doubt, doubts_of
from losscli.evaluation.example_weights import weights_of
from losscli.evaluation.flops import Trace, addresses
from losscli.evaluation.forward import NO_GRAPH, is_registered, scores_in
from losscli.evaluation.independence import Values, compare, is_dependent
from losscli.evaluation.losses import PerExample, function_of, mse, options_of
from losscli.evaluation.objective import DETERMINISTIC, PROBE, Objective
from losscli.evaluation.precision import wider_copies
from losscli.evaluation.targets import (
    check_probabilities,
    check_range,
    classes_of,
    first_not_finite,
    has_label,
    is_of_classes,
    target_error,
)
from losscli.evaluation.torch_losses import TorchLoss
from losscli.models import HEADLESS, is_headless
from losscli.weight_space.vectors import Weights

__all__ = ["check_independence", "check_task"]

# Bytes that the outputs of a batch may have: those of a language model are a number for every token
# and every word.
_OUTPUTS = {"cpu": 128 << 20}
_OUTPUTS_ELSEWHERE = 2 << 30

# Seeds that are tried where a forward pass draws random numbers: a rare one changes few losses.
_SEEDS = 8

_WITHOUT_METRICS = "Choose another --metric, or --metric none"


@torch.no_grad()
def check_task(objective: Objective, weights: Weights, names: Sequence[str] | None = None) -> None:
    """Makes sure that the model, the loss and the data work together, on a first batch.

    Args:
        objective: What will be evaluated.
        weights: All tensors of the model; they stay loaded.
        names: The splits that it is tried on; all by default.

    Raises:
        LossError: Labels are out of the model's range, or a loss depends on other examples.
        NondeterministicModelError: One point has two answers, or random numbers are drawn.
    """
    objective.load(weights)
    try:
        _check(objective, names)
    except (ModelError, LossError) as error:
        if objective.differentiates or NO_GRAPH not in error.what:
            raise
        # As physics-informed networks do, by their inputs.
        objective.differentiates = True
        _check(objective, names)


def _check(objective: Objective, names: Sequence[str] | None) -> None:
    doubts: list[frozenset[Doubt]] = []
    with RandomnessDetector(objective.device):
        if objective.chooses_batch:
            _fit_outputs(objective)
        for name in objective.splits if names is None else names:
            doubts += _check_split(objective, name)
        # While it is known which weights are loaded: which way an example takes may be theirs.
        if not objective.traced:
            trace = Trace()
            objective.count_operations(trace)
            _check_parameters(objective, trace)
            objective.traced = True
    objective.doubts = frozenset.intersection(*doubts) if doubts else frozenset()


def _check_split(objective: Objective, name: str) -> list[frozenset[Doubt]]:
    """Checks a first batch of a split: evaluates it whole, then again in halves.

    Returns:
        The doubts about the loss, if the model returns scores.
    """
    examples = objective.splits[name]
    batch = examples.first(objective.batch_size).to(objective.device)
    seed_all(0, objective.device)
    with RandomnessDetector(objective.device) as draws:
        whole, doubts = _first_values(objective, batch, name)
    if draws.names:
        raise _random(objective, draws.names, batch, whole)
    # What is drawn from a generator that the model puts back is drawn from another seed now.
    seed_all(1, objective.device)
    if len(batch) == 1 < len(examples) and not objective.batch_loss:
        with contextlib.suppress(ModelError, LossError, torch.OutOfMemoryError, MemoryError):
            pair = examples.first(2).to(objective.device)
            batch, whole = pair, objective.values(pair)
    _compare_halves(objective, batch, whole, name, torch.arange(len(batch)))
    return doubts


@torch.no_grad()
def check_independence(objective: Objective, weights: Weights) -> None:
    """Makes sure at another point that a loss depends on its own example alone.

    An initialisation may give all examples the same outputs, and the first batch of sorted
    data examples of one class: here a batch is spread over all examples in memory.

    Args:
        objective: What will be evaluated.
        weights: All tensors of the model; they stay loaded.

    Raises:
        LossError: A loss depends on other examples.
        NondeterministicModelError: One point has two answers.
    """
    objective.load(weights)
    for name, examples in ({} if objective.batch_loss else objective.splits).items():
        batch, rows = examples.spread(objective.batch_size)
        batch = batch.to(objective.device)
        _compare_halves(objective, batch, objective.values(batch), name, rows)


def _compare_halves(
    objective: Objective, batch: Split, whole: Values, name: str, rows: Tensor
) -> None:
    """Compares the values of a batch with those of its halves; its rows are those of a split.

    Raises:
        LossError: They differ beyond rounding.
        NondeterministicModelError: The values of the whole batch differ when it is repeated.
    """
    found = compare(objective.values, batch, whole, objective.dtype) if len(batch) > 1 else None
    objective.unchecked.discard(name)
    if found is not None and found.excess <= 1:
        return
    _check_repetition(objective, batch, whole)
    if found is None:
        objective.unchecked |= {name} if len(batch) > 1 else set()
        return
    narrowest = Narrowest(objective.dtype)
    if objective.dtype == torch.float64:
        # There is no wider type, but the model may compute in a narrower one.
        with narrowest:
            whole = objective.values(batch)
        found = compare(objective.values, batch, whole, narrowest.dtype) or found
    if found.excess > 1 and is_dependent(found, batch, narrowest.dtype, wider_copies(objective)):
        raise LossError(
            f"the {found.what} of an example depends on the other examples in its batch: for "
            f"example {int(rows[found.row])} of the split {name!r} it is {found.whole:.7g} in "
            f"one batch and {found.other:.7g} in another",
            "If the loss is one number per batch, give --batch-loss; otherwise compute it from "
            "each example alone (BatchNorm needs track_running_stats=True)",
        )


def _first_values(
    objective: Objective, batch: Split, name: str
) -> tuple[Values, list[frozenset[Doubt]]]:
    """Evaluates a first batch, and makes sure that model, loss and data fit together."""
    inputs = objective.data.prepare(map_inputs(Tensor.clone, batch.inputs), objective.dtype)
    versions = [tensor._version for tensor in leaves(inputs)]
    outputs = objective.forward(objective.model, inputs)
    scores = scores_in(outputs)
    if not isinstance(scores, Tensor) and is_registered(objective.loss):
        raise LossError(
            f"the model returns a {type(outputs).__name__}, and the loss takes a tensor",
            HEADLESS
            if is_headless(objective.model)
            else "Give a --loss of your own that takes it, or a model that returns its scores, "
            "alone or under the key logits",
        )
    # A model that writes on its inputs would spoil them for every later point.
    objective.copies_inputs |= versions != [tensor._version for tensor in leaves(inputs)]
    _check_labels(objective, outputs, batch.targets, name)
    tensors = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
    given = [tensor for tensor in tensors if not tensor.is_inference()]
    versions = [tensor._version for tensor in given]
    values = objective.per_example(objective.loss, outputs, batch.targets, "loss")
    # And so would a loss that writes on the outputs spoil them for the metrics.
    objective.copies_outputs |= versions != [tensor._version for tensor in given]
    _check_targets(objective, name)
    _check_metrics(objective, outputs, batch.targets)
    doubts = []
    if isinstance(scores, Tensor):
        functions = [objective.loss, *objective.metrics.values()]
        doubts = [doubts_of(functions, scores, batch.targets)]
    return objective.own_values(outputs, batch.targets, values), doubts


def _check_repetition(objective: Objective, batch: Split, whole: Values) -> None:
    again = objective.values(batch)
    for what, values in whole.items():
        if not torch.allclose(values, again[what], rtol=1e-5, atol=1e-7, equal_nan=True):
            raise NondeterministicModelError(
                f"the model gives two answers for the same weights and data, even in eval "
                f"mode: the {what} differs",
                DETERMINISTIC,
            )


def _random(
    objective: Objective, names: Sequence[str], batch: Split, whole: Values
) -> LosscliError:
    """The error of a forward pass that draws random numbers; says what they change."""
    changes = False
    for seed in range(1, 1 + _SEEDS):
        seed_all(seed, objective.device)
        again = objective.values(batch)
        changes |= any(not torch.equal(whole[what], again[what]) for what in whole)
    then = (
        "the losses differ from seed to seed"
        if changes
        else f"no loss on a first batch differs between {1 + _SEEDS} seeds"
    )
    return NondeterministicModelError(
        f"the forward pass draws random numbers from {' and '.join(names)}, even in eval mode: "
        f"{then}",
        DETERMINISTIC,
    )


def _check_parameters(objective: Objective, trace: Trace) -> None:
    """Makes sure that a forward pass reads the model's own parameters.

    What is not seen to be read, as in another thread, is told by its influence.
    """
    own = addresses(objective.tensors.values())
    parameters = {
        name: tensor
        for name, tensor in objective.tensors.items()
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    }
    unread = [
        name
        for name, tensor in parameters.items()
        if not trace.read.intersection(addresses([tensor])) and tensor.numel()
    ]
    # Where nothing was seen at all, the pass failed, or is hidden from a trace.
    if not unread or not trace.read or _have_influence(objective, unread):
        return
    objective.unused = tuple(unread)
    foreign = {shape for place, shape in trace.parameters.items() if place not in own}
    other = next((name for name in unread if parameters[name].shape in foreign), None)
    if len(unread) == len(parameters):
        what = "no parameter of the model has an influence on its outputs"
    elif other is not None:
        what = (
            f"the forward pass reads a parameter {list(parameters[other].shape)} that is not "
            f"the model's own, and {other} of the same shape has no influence on its outputs"
        )
    else:
        return
    raise ModelError(
        what,
        "Does its code hold another module (a closure, a patched forward), or a value computed "
        "from its weights? Let forward read the parameters of the model that it is called on",
    )


def _have_influence(objective: Objective, names: Sequence[str]) -> bool:
    """Tells whether tensors, loaded as not-a-number, change the outputs of a first batch."""
    batch = next(iter(objective.splits.values())).first(objective.batch_size).to(objective.device)
    inputs = objective.data.prepare(batch.inputs, objective.dtype)
    own = {name: objective.tensors[name].clone() for name in names}
    nothing = {name: torch.full_like(tensor, torch.nan) for name, tensor in own.items()}

    def outputs(weights: Weights) -> list[Tensor]:
        objective.load(weights)
        leaves = tree_leaves(objective.forward(objective.model, inputs))
        return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]

    try:
        before, after = outputs(own), outputs(nothing)
    except ModelError:
        return True
    finally:
        objective.load(own)
    return not before or any(
        x.shape != y.shape or not torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
        for x, y in zip(before, after, strict=True)
    )


def _fit_outputs(objective: Objective) -> None:
    """Makes the batch smaller, where the outputs of one would be large; the same every run."""
    budget = _OUTPUTS.get(objective.device.type, _OUTPUTS_ELSEWHERE)
    for split in objective.splits.values():
        few = split.first(min(PROBE, objective.batch_size)).to(objective.device)
        inputs = objective.data.prepare(map_inputs(Tensor.clone, few.inputs), objective.dtype)
        try:
            outputs = objective.forward(objective.model, inputs)
        except ModelError:
            # Told of the whole batch, which may be the only size that the model takes.
            return
        if isinstance(scores := scores_in(outputs), Tensor):
            fit = max(1, budget * len(few) // max(1, scores.nbytes))
            objective.batch_size = min(objective.batch_size, 1 << (fit.bit_length() - 1))


def _check_metrics(objective: Objective, outputs: Any, targets: Tensor) -> None:
    """Makes sure that the metrics work; those that nobody asked for are left out if not."""
    for metric, function in list(objective.metrics.items()):
        what = f"metric {metric!r}"
        try:
            if metric in objective.optional and not _classifies(objective.loss):
                raise LossError("the loss is not one of classification")  # noqa: TRY301
            scores = scores_in(outputs)
            unfit = isinstance(scores, Tensor) and not has_label(scores, targets)
            if metric in objective.optional and unfit:
                raise LossError("the targets are not the labels 0 and 1")  # noqa: TRY301
            objective.per_example(function, outputs, targets, what)
        except LossError as error:
            if metric not in objective.optional:
                raise LossError(error.what, _WITHOUT_METRICS) from error
            del objective.metrics[metric]
            objective.left_out[metric] = error.what


def _check_labels(objective: Objective, outputs: Any, targets: Tensor, name: str) -> None:
    """Finds labels out of range before a GPU kernel does, which would end the process."""
    outputs, split = scores_in(outputs), objective.splits[name]
    seen = split if isinstance(split, Split) else split.first(objective.batch_size)
    if not isinstance(outputs, Tensor) or targets.is_floating_point():
        return
    objective.classes = classes_of(objective.loss, outputs, targets)
    if objective.classes is None:
        return
    where = f"the split {name!r}"
    objective.remark(check_range(objective.loss, seen.targets, objective.classes, where))
    if not isinstance(split, Split):
        return
    weights = weights_of(objective.loss, outputs, seen.targets)
    without = 0 if weights is None else int((weights == 0).sum())
    if without == len(seen.targets):
        raise LossError(
            f"the split {name!r} has no target that counts",
            f"Give data with other targets than {IGNORED} and those without weight",
        )
    if without and not objective.batch_loss:
        counts = f"{without:,} of {len(seen.targets):,} examples have no target that counts"
        objective.remark(f"{name}: {counts} and are left out of the mean")
    weighted = options_of(objective.loss).get("weight") is not None
    if is_of_classes(objective.loss) and weighted:
        objective.remark("the mean loss is weighted by class, Σwl/Σw, as torch's")


def _check_targets(objective: Objective, name: str) -> None:
    """Finds a target out of range, or not finite if the loss does not leave it out."""
    split = objective.splits[name]
    seen = split if isinstance(split, Split) else split.first(objective.batch_size)
    check_probabilities(objective.loss, seen.targets, f"the split {name!r}")
    place = first_not_finite(split.targets) if isinstance(split, Split) else None
    if place is None or not isinstance(split, Split) or objective.batch_loss:
        return
    start = place - place % objective.batch_size
    batch = split.take(slice(start, start + objective.batch_size)).send(objective.device)
    inputs = objective.data.prepare(map_inputs(Tensor.clone, batch.inputs), objective.dtype)
    outputs = objective.forward(objective.model, inputs)
    losses = objective.per_example(objective.loss, outputs, batch.targets, "loss")
    if not losses[place - start].isfinite():
        raise target_error(split.targets[place], objective.where(split), split.position(place))


def _classifies(loss: PerExample) -> bool:
    """Tells whether the highest score of a class may be an answer, as far as the loss is known."""
    return loss.of_scores if isinstance(loss, TorchLoss) else function_of(loss) is not mse
