"""Checks that the model, the loss and the data work together, before anything is evaluated."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from losscli.data import Nest, RandomnessDetector, Split, leaves, realise, seed_all
from losscli.errors import (
    LosscliError,
    LossError,
    ModelError,
    NondeterministicModelError,
    UsageError,
)
from losscli.evaluation.device import Narrowest
from losscli.evaluation.flops import Trace, addresses
from losscli.evaluation.forward import NO_GRAPH, is_registered, scores_in
from losscli.evaluation.independence import Values, compare, is_dependent
from losscli.evaluation.losses.built_in import PerExample, function_of, mse, options_of
from losscli.evaluation.losses.class_targets import IGNORED
from losscli.evaluation.losses.doubts import Doubt, doubts_of
from losscli.evaluation.losses.example_weights import weights_of
from losscli.evaluation.losses.targets import (
    check_probabilities,
    check_range,
    classes_of,
    first_not_finite,
    has_label,
    is_of_classes,
    target_error,
)
from losscli.evaluation.losses.torch_losses import TorchLoss
from losscli.evaluation.objective import DETERMINISTIC, PROBE, Objective
from losscli.evaluation.precision import wider_copies
from losscli.models import HEADLESS, is_headless
from losscli.weight_space.vectors import Weights

__all__ = ["check_independence", "check_task", "classifies"]

# The most bytes of the outputs of a batch: a language model has a score per token and word.
_OUTPUTS = {"cpu": 128 << 20}
_OUTPUTS_ELSEWHERE = 2 << 30

# Further seeds to try if a forward pass draws random numbers: most draws may change nothing.
_SEEDS = 8

_WITHOUT_METRICS = "Choose another --metric, or --metric none"


@torch.no_grad()
def check_task(objective: Objective, weights: Weights, names: Sequence[str] | None = None) -> None:
    """Checks on a first batch that the model, the loss and the data work together.

    Raises:
        LossError: Labels are out of the model's range, or a loss depends on other examples.
        NondeterministicModelError: Repeated losses differ, or random numbers are drawn.
    """
    objective.load(weights)
    try:
        _check(objective, names)
    except (ModelError, LossError) as error:
        if objective.differentiates or NO_GRAPH not in error.what:
            raise
        # The model or the loss differentiates, as in physics-informed networks.
        objective.differentiates = True
        _check(objective, names)
    if objective.seeds and not objective.draws:
        raise UsageError(
            f"--stochastic {len(objective.seeds)} has no effect: the forward pass draws no random "
            "numbers from the generators of Python, NumPy and torch",
            "Leave it out",
        )


def _check(objective: Objective, names: Sequence[str] | None) -> None:
    doubts: list[frozenset[Doubt]] = []
    with RandomnessDetector(objective.device):
        if objective.chooses_batch:
            _fit_outputs(objective)
        for name in objective.splits if names is None else names:
            doubts += _check_split(objective, name)
        # Traced at these weights, because the operators that run may depend on them (routing).
        if not objective.traced:
            trace = Trace()
            objective.count_operations(trace)
            _check_parameters(objective, trace)
            objective.traced = True
    objective.doubts = frozenset.intersection(*doubts) if doubts else frozenset()


def _check_split(objective: Objective, name: str) -> list[frozenset[Doubt]]:
    """Evaluates the first batch of a split whole, then in halves; returns doubts about the loss."""
    examples = objective.splits[name]
    batch = examples.first(objective.batch_size).to(objective.device)
    seed_all(0, objective.device)
    with RandomnessDetector(objective.device) as draws:
        whole, doubts = _first_values(objective, batch, name)
    if draws.names:
        raise _random(objective, draws.names, batch, whole)
    # A model may restore the generator's state after drawing; another seed makes that visible.
    seed_all(1, objective.device)
    if len(batch) == 1 < len(examples) and not objective.batch_loss:
        with contextlib.suppress(ModelError, LossError, torch.OutOfMemoryError, MemoryError):
            pair = examples.first(2).to(objective.device)
            batch, whole = pair, objective.values(pair)
    _compare_halves(objective, batch, whole, name, torch.arange(len(batch)))
    return doubts


@torch.no_grad()
def check_independence(objective: Objective, weights: Weights) -> None:
    """Checks at another point that a loss depends on its own example alone.

    An initialisation may give all examples the same outputs, and sorted data a first batch of one
    class. So here the batch is spread over all examples in memory.

    Raises:
        LossError: A loss depends on other examples.
        NondeterministicModelError: Repeated losses differ.
    """
    objective.load(weights)
    for name, examples in ({} if objective.batch_loss else objective.splits).items():
        batch, rows = examples.spread(objective.batch_size)
        batch = batch.to(objective.device)
        _compare_halves(objective, batch, objective.values(batch), name, rows)


def _compare_halves(
    objective: Objective, batch: Split, whole: Values, name: str, rows: Tensor
) -> None:
    """Compares the values of a batch with those of its halves.

    ``rows`` are the indices of the examples in the split.

    Raises:
        LossError: They differ beyond rounding.
        NondeterministicModelError: The values of the whole batch differ when it is repeated.
    """
    if objective.seeds:
        # Halves of a batch get other random numbers.
        _check_repetition(objective, batch, whole)
        return
    several = len(batch) > 1
    difference = compare(objective.values, batch, whole, objective.dtype) if several else None
    objective.unchecked.discard(name)
    if difference is not None and difference.excess <= 1:
        return
    _check_repetition(objective, batch, whole)
    if difference is None:
        objective.unchecked |= {name} if several else set()
        return
    narrowest = Narrowest(objective.dtype)
    if objective.dtype == torch.float64:
        # There is no wider type, but the model may compute in a narrower one.
        with narrowest:
            whole = objective.values(batch)
        difference = compare(objective.values, batch, whole, narrowest.dtype) or difference
    if difference.excess > 1 and is_dependent(
        difference, batch, narrowest.dtype, wider_copies(objective)
    ):
        raise LossError(
            f"the {difference.what} of an example depends on the other examples in its batch: for "
            f"example {int(rows[difference.row])} of the split {name!r} it is "
            f"{difference.whole:.7g} in one batch and {difference.other:.7g} in another",
            "If the loss is one number per batch, give --batch-loss; otherwise compute it from "
            "each example alone (BatchNorm needs track_running_stats=True)",
        )


def _first_values(
    objective: Objective, batch: Split, name: str
) -> tuple[Values, list[frozenset[Doubt]]]:
    """Evaluates a first batch and checks that model, loss and data fit together."""
    inputs = objective.prepare(batch.map(Tensor.clone))
    versions = [tensor._version for tensor in leaves(inputs)]
    with objective.deferring():
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
    # A model that modifies its inputs would change them for every later point.
    objective.copies_inputs |= versions != [tensor._version for tensor in leaves(inputs)]
    _check_labels(objective, outputs, batch.targets, name)
    tensors = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
    given = [tensor for tensor in tensors if not tensor.is_inference()]
    versions = [tensor._version for tensor in given]
    values = objective.per_example(objective.loss, outputs, batch.targets, "loss")
    # A loss that modifies the outputs would change them for the metrics.
    objective.copies_outputs |= versions != [tensor._version for tensor in given]
    if objective.function is not None and bool(values.isnan().any()):
        _refuse_nan(objective, name)
    _check_targets(objective, name)
    _check_metrics(objective, outputs, batch.targets)
    doubts = []
    if isinstance(scores, Tensor) and isinstance(batch.targets, Tensor):
        functions = [objective.loss, *objective.metrics.values()]
        doubts = [doubts_of(functions, leaves(batch.inputs), scores, batch.targets)]
    return objective.own_values(outputs, batch.targets, values), doubts


def _refuse_nan(objective: Objective, name: str) -> None:
    """Refuses an objective that is not a number although all weights are finite."""
    floating = (t for t in objective.tensors.values() if t.is_floating_point())
    if all(bool(tensor.isfinite().all()) for tensor in floating):
        raise LossError(
            f"the objective gives nan on the first batch of the split {name!r}",
            "Return a number: nan comes from 0/0, or from the root or the logarithm of a number "
            "below 0",
        )


def _check_repetition(objective: Objective, batch: Split, whole: Values) -> None:
    again = objective.values(batch)
    for what, values in whole.items():
        if not torch.allclose(values, again[what], rtol=1e-5, atol=1e-7, equal_nan=True):
            raise NondeterministicModelError(
                f"the model gives different results for the same weights and data, even in eval "
                f"mode: the {what} differs",
                "Draw random numbers from the global generators of Python, NumPy and torch, which "
                "--stochastic seeds"
                if objective.seeds
                else DETERMINISTIC,
            )


def _random(
    objective: Objective, names: Sequence[str], batch: Split, whole: Values
) -> LosscliError:
    """Returns the error for a forward pass that draws random numbers, and what they change."""
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
    """Checks that a forward pass reads the model's own parameters.

    Parameters that the trace misses, for example in another thread, are checked by their influence
    on the outputs.
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
    # With no reads at all, the pass failed or cannot be traced.
    if not unread or not trace.read or _have_influence(objective, unread):
        return
    objective.unused = tuple(unread)
    foreign = {shape for address, shape in trace.parameters.items() if address not in own}
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
        "Does its code use another module (a closure, a patched forward), or a value computed "
        "from its weights? Let forward read the parameters of the model that it is called on",
    )


def _have_influence(objective: Objective, names: Sequence[str]) -> bool:
    """Whether the outputs of a first batch change if tensors are set to nan."""
    batch = next(iter(objective.splits.values())).first(objective.batch_size).to(objective.device)
    inputs = objective.prepare(batch)
    own = {name: objective.tensors[name].clone() for name in names}
    nans = {name: torch.full_like(tensor, torch.nan) for name, tensor in own.items()}

    def outputs(weights: Weights) -> list[Tensor]:
        objective.load(weights)
        leaves = tree_leaves(objective.forward(objective.model, inputs))
        return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]

    try:
        before, after = outputs(own), outputs(nans)
    except ModelError:
        return True
    finally:
        objective.load(own)
    return not before or any(
        x.shape != y.shape or not torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
        for x, y in zip(before, after, strict=True)
    )


def _fit_outputs(objective: Objective) -> None:
    """Reduces the batch size if the outputs would be too large; the same in every run."""
    budget = _OUTPUTS.get(objective.device.type, _OUTPUTS_ELSEWHERE)
    for split in objective.splits.values():
        few = split.first(min(PROBE, objective.batch_size)).to(objective.device)
        inputs = objective.prepare(few.map(Tensor.clone))
        try:
            with objective.deferring():
                outputs = objective.forward(objective.model, inputs)
        except ModelError:
            # Reported for the whole batch, the only size that some models accept.
            return
        if isinstance(scores := scores_in(outputs), Tensor):
            size = scores.nbytes * max(1, len(objective.seeds))
            fit = max(1, budget * len(few) // max(1, size))
            objective.batch_size = min(objective.batch_size, 1 << (fit.bit_length() - 1))


def _check_metrics(objective: Objective, outputs: Any, targets: Nest) -> None:
    """Checks that the metrics work; default metrics that do not are left out."""
    for metric, function in list(objective.metrics.items()):
        what = f"metric {metric!r}"
        try:
            if metric in objective.optional and not classifies(objective.loss):
                raise LossError("the loss is not one of classification")  # noqa: TRY301
            scores = scores_in(outputs)
            unfit = isinstance(scores, Tensor) and not has_label(scores, realise(targets))
            if metric in objective.optional and unfit:
                raise LossError("the targets are not the labels 0 and 1")  # noqa: TRY301
            objective.per_example(function, outputs, targets, what)
        except LossError as error:
            if metric not in objective.optional:
                raise LossError(error.what, _WITHOUT_METRICS) from error
            del objective.metrics[metric]
            objective.left_out[metric] = error.what


def _check_labels(objective: Objective, outputs: Any, targets: Nest, name: str) -> None:
    """Checks labels before a GPU kernel fails on one out of range, which ends the process."""
    outputs, split = scores_in(outputs), objective.splits[name]
    sample = split if isinstance(split, Split) else split.first(objective.batch_size)
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return
    if targets.is_floating_point():
        return
    objective.classes = classes_of(objective.loss, outputs, targets)
    if objective.classes is None:
        return
    where = f"the split {name!r}"
    objective.add_note(check_range(objective.loss, sample.targets, objective.classes, where))
    if not isinstance(split, Split):
        return
    weights = weights_of(objective.loss, outputs, sample.targets)
    without = 0 if weights is None else int((weights == 0).sum())
    if without == len(sample.targets):
        raise LossError(
            f"the split {name!r} has no target that counts",
            f"Give data with other targets than {IGNORED} and those without weight",
        )
    if without and not objective.batch_loss:
        counts = f"{without:,} of {len(sample.targets):,} examples have no target that counts"
        objective.add_note(f"{name}: {counts} and are left out of the mean")
    weighted = options_of(objective.loss).get("weight") is not None
    if is_of_classes(objective.loss) and weighted:
        objective.add_note("the mean loss is weighted by class, Σwl/Σw, as torch's")


def _check_targets(objective: Objective, name: str) -> None:
    """Checks for targets out of range, and for targets that make the loss not finite."""
    split = objective.splits[name]
    sample = split if isinstance(split, Split) else split.first(objective.batch_size)
    check_probabilities(objective.loss, sample.targets, f"the split {name!r}")
    row = first_not_finite(split.targets) if isinstance(split, Split) else None
    if row is None or not isinstance(split, Split) or objective.batch_loss:
        return
    start = row - row % objective.batch_size
    batch = split.take(slice(start, start + objective.batch_size)).to(objective.device)
    inputs = objective.prepare(batch.map(Tensor.clone))
    with objective.deferring():
        outputs = objective.forward(objective.model, inputs)
    losses = objective.per_example(objective.loss, outputs, batch.targets, "loss")
    if not losses[row - start].isfinite():
        raise target_error(split.targets[row], objective.where(split), split.position(row))


def classifies(loss: PerExample) -> bool:
    """Whether outputs may be scores of classes, as far as the loss is known."""
    return loss.of_scores if isinstance(loss, TorchLoss) else function_of(loss) is not mse
