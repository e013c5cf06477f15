"""Model, loss and data: per-example losses at points of weight space. The room for all devices.

However points are evaluated, one law holds: the numbers of the checkpoint loaded plainly.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from losscli.checkpoint import Versions, loadable, takes_part
from losscli.data import (
    DataSet,
    Draws,
    Examples,
    Split,
    device_budget,
    host_budget,
    leaves,
    map_inputs,
    seed_all,
)
from losscli.errors import (
    DataError,
    LosscliError,
    LossError,
    ModelError,
    NondeterministicModelError,
    OutOfMemoryError,
)
from losscli.evaluation.device import Narrowest
from losscli.evaluation.flops import Trace, addresses, operations
from losscli.evaluation.forward import (
    HALF,
    NO_GRAPH,
    ScoredModel,
    is_registered,
    scores_in,
)
from losscli.evaluation.independence import Evaluate, Values, compare, is_dependent
from losscli.evaluation.losses import (
    IGNORED,
    VOID,
    Doubt,
    PerExample,
    check_shares,
    classes_of,
    counted,
    cross_entropy,
    doubts_of,
    function_of,
    has_label,
    mse,
    nll,
    options_of,
    weights_of,
)
from losscli.evaluation.output_collector import OutputCollector, join_weights
from losscli.evaluation.recalibration import Layer, Recalibration, layers_of
from losscli.evaluation.spectral import SpectralLayer, normalise, spectral_layers
from losscli.evaluation.strategies import (
    Loaded,
    NothingSharedError,
    Plain,
    Points,
    Stacked,
    Way,
    is_known,
    tensors_of,
)
from losscli.evaluation.torch_losses import TorchLoss
from losscli.mmap import let_go
from losscli.models import HEADLESS, is_headless
from losscli.weight_space.slices import Slice
from losscli.weight_space.vectors import Weights, can_move

__all__ = ["DETERMINISTIC", "Evaluation", "Objective", "Progress"]

Progress = Callable[[float], None]
"""Called with the share of a point that was done since the last call."""

# Bytes of prepared inputs in a batch, and the most examples. On two cores of an Ice Lake Xeon the
# MLP 784-512-512-10 is fastest at 2,048 examples (1.12 times as fast as at 1,024 and 1.3 times as
# at 256, where the threads wait for Python) and ResNet-20 between 64 and 256.
_BATCH = {"cpu": (8 << 20, 2048)}
_BATCH_ELSEWHERE = (256 << 20, 4096)

# Bytes that the outputs of a batch may have: those of a language model are a number for every token
# and every word.
_OUTPUTS = {"cpu": 128 << 20}
_OUTPUTS_ELSEWHERE = 2 << 30

# Examples from which the size of an example's outputs is known. Not one: code may squeeze that.
_PROBE = 2

# Examples on which a way to evaluate is held against the plain one.
_PROOF_EXAMPLES = 256

# How far its losses may be from those of the plain one, as a share; and where BatchNorm's
# statistics are estimated too, which takes the rounding of every layer on to the next.
_AGREE = {torch.float64: 1e-10, torch.float32: 1e-5, **dict.fromkeys(HALF, 5e-2)}
_AGREE_ON_ESTIMATES = {torch.float64: 1e-8, torch.float32: 1e-3, **dict.fromkeys(HALF, 0.3)}

# Above this size a model has no second copy, and few enough points at once that none is missed.
_LARGE_BYTES = 64 << 20

# Seeds that are tried where a forward pass draws random numbers: a rare one changes few losses.
_SEEDS = 8

_OF_CLASSES = frozenset({cross_entropy, nll})

_WITHOUT_METRICS = "Choose another --metric, or --metric none"

# What `train` and `eval` set beside a flag. Those of transformers swap kernels, if asked to.
_PLAIN_MODES = ("torch.nn.modules.module", "transformers.modeling_utils")

DETERMINISTIC = (
    "Take the randomness (dropout outside nn.Dropout, sampling) out of the forward pass; averaging "
    "over fixed seeds (--stochastic N) is not available yet"
)
"""How to get a model that gives one answer."""

# A token id stands for a vector: it is counted as one of a thousand floats.
_TOKEN_BYTES = 4096


@dataclass(frozen=True)
class Evaluation:
    """What a split gives at P points.

    Attributes:
        losses: The loss of each example at each point, ``[P, N]``, on the CPU; float64 for a
            forward pass in float64, else float32. Where examples have weights w, it is the
            weighted loss over the mean of w: its mean over examples is Σwl/Σw.
        metrics: The mean of each metric at each point, ``[P]``, float64, on the CPU.
        weights: The weight of each example, ``[N]``, float64, on the CPU; None where all are 1.
        counts: Over how many examples the mean of a metric is, where not over all.
    """

    losses: Tensor
    metrics: Mapping[str, Tensor]
    weights: Tensor | None = None
    counts: Mapping[str, float] = field(default_factory=dict)


class Objective(ScoredModel):
    """The empirical risk of a model on a data set, as a function of the model's weights.

    Args:
        model: The model. The objective takes it over: moves it, puts it into eval mode and
            overwrites its weights.
        loss: The per-example loss.
        metrics: The per-example metrics by name.
        data: The data; each split is moved to the device once.
        device: Where to compute.
        dtype: The type of the forward pass. Built-in losses take its outputs to a wider type; other
            functions get half-precision outputs in float32.
        batch_size: Examples a forward pass; by the device where it is None.
        recalibration: What BatchNorm's statistics are estimated on anew at every point, before
            anything is evaluated there; None leaves them as they are loaded.
        batch_loss: Whether the loss is one number per batch: each example of the data is a whole
            batch, and the batch size is 1.
        optional: The metrics that are left out where they do not apply.

    Attributes:
        left_out: Those that were left out, and why.
        tensors: The model's parameters and buffers by the names of its state dict.
        batchnorm: The model's BatchNorm layers that track statistics.
        spectral: Its spectrally normalised weights, whose singular vectors are computed from
            whatever weights are loaded.
        idle: Those of them that took no batch when statistics were last estimated.
        doubts: Whether the loss may be the wrong one, by the first batch of every split checked.
        unchecked: The splits on which the model takes the first batch whole and no other, so that
            it is not known whether losses depend on the rest of a batch.
        unused: The parameters that have no influence on the outputs of a first batch.
        constant: Whether different checkpoints were found to have the same losses on first batches.
        versions: Those of the model's modules, which the weights of every point are of.
        extra: The extra state of modules that is not a tensor, the same at every point.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PerExample,
        metrics: Mapping[str, PerExample],
        data: DataSet,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        batch_size: int | None = None,
        recalibration: Recalibration | None = None,
        batch_loss: bool = False,
        optional: Collection[str] = (),
    ) -> None:
        super().__init__(
            _cast(model, device, dtype).eval(), loss, metrics, device, batch_loss=batch_loss
        )
        self.data = data
        self.dtype = dtype
        self.batch_size = 1 if batch_loss else batch_size or self._default_batch()
        self._chooses_batch = batch_size is None and not batch_loss
        self.splits: Mapping[str, Examples] = self._place(data.splits)
        self.tensors: Mapping[str, Tensor] = tensors_of(self.model)
        self.versions: Versions = getattr(self.model.state_dict(), "_metadata", {})
        self.extra: Mapping[str, Any] = {}
        self._takes_part = takes_part(self.model)
        self._classes: int | None = None
        self.batchnorm = layers_of(self.model, self.tensors)
        self.spectral: Sequence[SpectralLayer] = spectral_layers(self.model, self.tensors)
        self._normalises = True
        self.recalibration = recalibration and self._bring(recalibration)
        self.idle: Sequence[Layer] = ()
        self.doubts: frozenset[Doubt] = frozenset()
        self.left_out: dict[str, str] = {}
        self._optional = frozenset(optional)
        self._remarks: dict[str, None] = {}
        self._way: Way | None = None
        self._provisional = False
        self._proving = False
        self._operations: int | None = None
        self._traced = False
        self.unchecked: set[str] = set()
        self.unused: tuple[str, ...] = ()
        self.constant = False

    def twin(self, model: nn.Module, dtype: torch.dtype) -> Objective:
        """Makes another objective of the same loss and data, without metrics.

        Args:
            model: Its model, which it takes over.
            dtype: The type of its forward pass.

        Returns:
            The objective; the data are not copied.
        """
        twin = Objective(
            model,
            self.loss,
            {},
            replace(self.data, splits=self.splits),
            device=self.device,
            dtype=dtype,
            batch_size=self.batch_size,
            recalibration=self.recalibration,
            batch_loss=self.batch_loss,
        )
        twin.extra = self.extra
        twin.copies_inputs = self.copies_inputs
        twin.copies_outputs = self.copies_outputs
        twin.differentiates = self.differentiates
        return twin

    @torch.no_grad()
    def in_float64(self, sample: Split, *, inside: bool = False) -> Objective | None:
        """Returns an objective of the same function that computes in float64.

        Args:
            sample: A few examples, on the device.
            inside: Whether code that casts to a narrower type computes in float64 too.

        Returns:
            This objective if it computes in float64; else a twin with the weights that are loaded.
            None if the device has no float64, if a second copy of the model is too large, or if
            the copy fails or still uses tensors of the original, such as through a closure.
        """
        if self.dtype == torch.float64 and not (inside and self.narrowest(sample) != self.dtype):
            return self
        numbers = sum(tensor.numel() for tensor in self.tensors.values())
        budget = device_budget(self.device) or host_budget()
        # The copy, and the weights of two points.
        if self.device.type == "mps" or numbers * 2 * torch.float64.itemsize > budget:
            return None
        own = {name: tensor.clone() for name, tensor in self.tensors.items()}
        floating = {name: t for name, t in own.items() if t.is_floating_point()}
        with self.held():
            try:
                twin = self.twin(copy.deepcopy(self.model), torch.float64)
                twin.load(own)
                twin.widens = inside and not twin._is_wide(sample)
                before = twin.plain(own, {"": sample})[""].losses
                self.load({name: tensor * 1.5 + 0.5 for name, tensor in floating.items()})
                after = twin.plain(own, {"": sample})[""].losses
            except Exception:  # noqa: BLE001 - user code may refuse a copy or float64 in any way
                return None
            finally:
                self.load(own)
        return twin if _agree(after, before, _AGREE[torch.float64]) else None

    def _is_wide(self, sample: Split) -> bool:
        """Whether the model and the loss take float64, and compute in nothing narrower."""
        try:
            return self.narrowest(sample) == torch.float64
        except (ModelError, LossError):
            return False

    def remark(self, text: str) -> None:
        """Adds a note.

        Args:
            text: The note; what is noted already is not noted twice.
        """
        self._remarks[text] = None

    def _bring(self, recalibration: Recalibration) -> Recalibration:
        """Brings training examples to the device, where a split of the data is there already."""
        for name, split in self.data.splits.items():
            if split is recalibration.split:
                return replace(recalibration, split=self.splits[name])
        split = recalibration.split
        if isinstance(split, Split):
            split = split.to(self.device)
        return replace(recalibration, split=split)

    @property
    def remarks(self) -> list[str]:
        """What was noted."""
        return list(self._remarks)

    @property
    def notes(self) -> list[str]:
        """What to know about the targets, metrics and derivatives, as far as it was found."""
        left_out = (f"{name} is left out: {why}" for name, why in self.left_out.items())
        return [*self._remarks, *left_out]

    @property
    def statistics(self) -> Sequence[Layer]:
        """The BatchNorm layers whose statistics are estimated anew at every point."""
        return () if self.recalibration is None else self.batchnorm

    def brief(self) -> AbstractContextManager[None]:
        """Lets a first training batch do, where ways to evaluate are held against each other.

        Returns:
            A context within which BatchNorm's statistics are estimated on that batch alone.
        """
        return self._recalibrating(self.recalibration and self.recalibration.brief())

    def held(self) -> AbstractContextManager[None]:
        """Holds BatchNorm's statistics.

        Returns:
            A context within which they are as they are loaded.
        """
        return self._recalibrating(None)

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Loads the singular vectors of spectral normalisation as they are given."""
        self._normalises = False
        try:
            yield
        finally:
            self._normalises = True

    @contextmanager
    def estimating_on(self, batch: Split) -> Iterator[None]:
        """Lets the statistics of a batch stand in for those of BatchNorm layers at every point.

        Args:
            batch: The examples, taken at once.
        """
        idle, order = self.idle, torch.arange(len(batch))
        try:
            with self._recalibrating(Recalibration("", batch, len(batch), order)):
                yield
        finally:
            self.idle = idle

    @contextmanager
    def _recalibrating(self, recalibration: Recalibration | None) -> Iterator[None]:
        own, self.recalibration = self.recalibration, recalibration
        try:
            yield
        finally:
            self.recalibration = own

    @torch.no_grad()
    def recalibrated(self, weights: Weights) -> Weights:
        """Estimates BatchNorm's statistics at a point.

        Args:
            weights: All tensors of the model; they stay loaded, but for the statistics.

        Returns:
            The weights with the new statistics; the same ones where there are none.
        """
        if self.recalibration is None:
            return weights
        self.load(weights)
        self._recalibrate(Plain(self), lambda _: None)
        names = [name for layer in self.statistics for name in layer.names]
        return {**weights, **{n: self.tensors[n].to(weights[n].device, copy=True) for n in names}}

    def _default_batch(self) -> int:
        """The power of two that fits the bytes a batch may have; the same for every run."""
        budget, most = _BATCH.get(self.device.type, _BATCH_ELSEWHERE)
        example = max(
            sum(map(_bytes_in_forward, leaves(split.first(1).inputs)))
            for split in self.data.splits.values()
        )
        return 1 << (min(most, max(1, budget // max(1, example))).bit_length() - 1)

    def _place(self, splits: Mapping[str, Examples]) -> dict[str, Examples]:
        """Moves what is in memory to the device, split by split as long as it fits there."""
        budget = device_budget(self.device)
        placed: dict[str, Examples] = {}
        for name, split in splits.items():
            new = split.nbytes if isinstance(split, Split) and not split.is_on(self.device) else 0
            fits = budget is None or new <= budget
            placed[name] = split.to(self.device) if isinstance(split, Split) and fits else split
            if budget is not None and fits:
                budget -= new
        return placed

    def first_batches(self) -> dict[str, Split]:
        """Takes a sample of the data for checks.

        Returns:
            The first batch of each split.
        """
        firsts = ((name, split.first(self.batch_size)) for name, split in self.splits.items())
        return {name: first.to(self.device) for name, first in firsts}

    def batches(
        self, split: Examples, size: int | None = None, order: Tensor | None = None
    ) -> Iterator[Split]:
        """Goes by the examples of a split once.

        Args:
            split: The examples, wherever they are.
            size: Examples a batch; the objective's own where it is None.
            order: Positions ``[n]``, as the split draws them; all in their own order where None.

        Yields:
            The batches, as stored, on the device.
        """
        # What is decoded on the way has not been seen before it comes.
        unseen = not isinstance(split, Split)
        done, lengths = 0, set[torch.Size]()
        for batch in split.batches(size or self.batch_size, order):
            if unseen and self._classes is not None:
                self._check_range(batch.targets, "the data")
            if unseen and function_of(self.loss) in _OF_CLASSES and not self.batch_loss:
                lengths.add(batch.targets.shape[1:])
                self._check_lengths(lengths)
            if unseen:
                check_shares(self.loss, batch.targets, "the data")
            if unseen and is_registered(self.loss) and not self.batch_loss:
                place = _not_finite(batch.targets)
                if place is not None:
                    index = done + place if order is None else int(order[done + place])
                    raise self._target_error(batch.targets[place], split, index)
            done += len(batch)
            yield batch.send(self.device)

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        """Loads every tensor plainly; what a slice does not move stays as it was last loaded.

        The singular vectors of spectrally normalised weights are computed from these.

        Args:
            weights: All tensors of the model.
        """
        # Some models fold their weights into others when they are put into eval mode.
        if self._folds:
            self.model.train()
        point = self._whole(weights) if self._takes_part else {}
        # Code of the user's own may write on the tensors that it is given.
        given = {name: tensor.clone() for name, tensor in point.items()} or weights
        state = loadable(given, self.versions, self.extra)
        self.model.load_state_dict(state, strict=False)
        # It changed the checkpoints when these were opened, and may change a point again.
        for name, tensor in point.items():
            self.tensors[name].copy_(tensor)
        if self._normalises:
            normalise(self.spectral, self.tensors)
        let_go(*weights.values())
        if self._folds:
            self.model.eval()

    def _whole(self, weights: Weights) -> Weights:
        """All tensors of the model: those that are given, and its own where none is."""
        given = {id(own): weights[n] for n, own in self.tensors.items() if n in weights}
        own = {name: given.get(id(tensor), tensor) for name, tensor in self.tensors.items()}
        return {name: tensor.detach().clone() for name, tensor in own.items()}

    @property
    def _folds(self) -> bool:
        return any(
            type(module).train.__module__ not in _PLAIN_MODES for module in self.model.modules()
        )

    @torch.no_grad()
    def check(self, weights: Weights, names: Sequence[str] | None = None) -> None:
        """Makes sure that the model, the loss and the data work together, on a first batch.

        Args:
            weights: All tensors of the model; they stay loaded.
            names: The splits that it is tried on; all by default.

        Raises:
            LossError: Labels are out of the model's range, or a loss depends on other examples.
            NondeterministicModelError: One point has two answers, or random numbers are drawn.
        """
        self.load(weights)
        try:
            self._check(names)
        except (ModelError, LossError) as error:
            if self.differentiates or NO_GRAPH not in error.what:
                raise
            # As physics-informed networks do, by their inputs.
            self.differentiates = True
            self._check(names)

    def _check(self, names: Sequence[str] | None) -> None:
        doubts: list[frozenset[Doubt]] = []
        with Draws(self.device):
            if self._chooses_batch:
                self._fit_outputs()
            for name in self.splits if names is None else names:
                doubts += self._check_split(name)
            # While it is known which weights are loaded: which way an example takes may be theirs.
            if not self._traced:
                trace = Trace()
                self._operations = self._count(trace)
                self._check_parameters(trace)
                self._traced = True
        self.doubts = frozenset.intersection(*doubts) if doubts else frozenset()

    def _check_split(self, name: str) -> list[frozenset[Doubt]]:
        """Checks a first batch of a split: evaluates it whole, then again in halves.

        Returns:
            The doubts about the loss, if the model returns scores.
        """
        examples = self.splits[name]
        batch = examples.first(self.batch_size).to(self.device)
        seed_all(0, self.device)
        with Draws(self.device) as draws:
            whole, doubts = self._first_values(batch, name)
        if draws.names:
            raise self._random(draws.names, batch, whole)
        # What is drawn from a generator that the model puts back is drawn from another seed now.
        seed_all(1, self.device)
        if len(batch) == 1 < len(examples) and not self.batch_loss:
            with contextlib.suppress(ModelError, LossError, torch.OutOfMemoryError, MemoryError):
                pair = examples.first(2).to(self.device)
                batch, whole = pair, self._values(pair)
        self._compare_halves(batch, whole, name, torch.arange(len(batch)))
        return doubts

    @torch.no_grad()
    def check_independence(self, weights: Weights) -> None:
        """Makes sure at another point that a loss depends on its own example alone.

        An initialisation may give all examples the same outputs, and the first batch of sorted
        data examples of one class: here a batch is spread over all examples in memory.

        Args:
            weights: All tensors of the model; they stay loaded.

        Raises:
            LossError: A loss depends on other examples.
            NondeterministicModelError: One point has two answers.
        """
        self.load(weights)
        for name, examples in ({} if self.batch_loss else self.splits).items():
            batch, rows = examples.spread(self.batch_size)
            batch = batch.to(self.device)
            self._compare_halves(batch, self._values(batch), name, rows)

    def _compare_halves(self, batch: Split, whole: Values, name: str, rows: Tensor) -> None:
        """Compares the values of a batch with those of its halves; its rows are those of a split.

        Raises:
            LossError: They differ beyond rounding.
            NondeterministicModelError: The values of the whole batch differ when it is repeated.
        """
        found = compare(self._values, batch, whole, self.dtype) if len(batch) > 1 else None
        self.unchecked.discard(name)
        if found is not None and found.excess <= 1:
            return
        self._check_repetition(batch, whole)
        if found is None:
            self.unchecked |= {name} if len(batch) > 1 else set()
            return
        narrowest = Narrowest(self.dtype)
        if self.dtype == torch.float64:
            # There is no wider type, but the model may compute in a narrower one.
            with narrowest:
                whole = self._values(batch)
            found = compare(self._values, batch, whole, narrowest.dtype) or found
        if found.excess > 1 and is_dependent(found, batch, narrowest.dtype, self._wider()):
            raise LossError(
                f"the {found.what} of an example depends on the other examples in its batch: for "
                f"example {int(rows[found.row])} of the split {name!r} it is {found.whole:.7g} in "
                f"one batch and {found.other:.7g} in another",
                "If the loss is one number per batch, give --batch-loss; otherwise compute it from "
                "each example alone (BatchNorm needs track_running_stats=True)",
            )

    def _first_values(self, batch: Split, name: str) -> tuple[Values, list[frozenset[Doubt]]]:
        """Evaluates a first batch, and makes sure that model, loss and data fit together."""
        inputs = self.data.prepare(map_inputs(Tensor.clone, batch.inputs), self.dtype)
        versions = [tensor._version for tensor in leaves(inputs)]
        outputs = self.forward(self.model, inputs)
        scores = scores_in(outputs)
        if not isinstance(scores, Tensor) and is_registered(self.loss):
            raise LossError(
                f"the model returns a {type(outputs).__name__}, and the loss takes a tensor",
                HEADLESS
                if is_headless(self.model)
                else "Give a --loss of your own that takes it, or a model that returns its scores, "
                "alone or under the key logits",
            )
        # A model that writes on its inputs would spoil them for every later point.
        self.copies_inputs |= versions != [tensor._version for tensor in leaves(inputs)]
        self._check_labels(outputs, batch.targets, name)
        tensors = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
        given = [tensor for tensor in tensors if not tensor.is_inference()]
        versions = [tensor._version for tensor in given]
        values = self.per_example(self.loss, outputs, batch.targets, "loss")
        # And so would a loss that writes on the outputs spoil them for the metrics.
        self.copies_outputs |= versions != [tensor._version for tensor in given]
        self._check_targets(name)
        self._check_metrics(outputs, batch.targets)
        doubts = []
        if isinstance(scores, Tensor):
            functions = [self.loss, *self.metrics.values()]
            doubts = [doubts_of(functions, scores, batch.targets)]
        return self._own_values(outputs, batch.targets, values), doubts

    def _values(self, batch: Split) -> Values:
        """Evaluates a batch: the loss, and the metrics that are not known to be per example."""
        outputs = self.forward(self.model, self.data.prepare(batch.inputs, self.dtype))
        loss = self.per_example(self.loss, outputs, batch.targets, "loss")
        return self._own_values(outputs, batch.targets, loss)

    @torch.no_grad()
    def narrowest(self, sample: Split) -> torch.dtype:
        """Finds the narrowest floating-point type that the model and the loss compute in.

        Args:
            sample: A few examples, on the device.

        Returns:
            The type; where code casts, it is narrower than that of the forward pass.
        """
        narrowest, batch = Narrowest(self.dtype), sample.first(self.batch_size)
        with narrowest:
            self._values(batch)
        return narrowest.dtype

    def _own_values(self, outputs: Any, targets: Tensor, loss: Tensor) -> Values:
        values = {"loss": loss}
        for name, metric in self.metrics.items():
            if not is_registered(metric):
                what = f"metric {name!r}"
                values[what] = self.per_example(metric, outputs, targets, what)
        return {what: own.cpu().double() for what, own in values.items()}

    def _check_repetition(self, batch: Split, whole: Values) -> None:
        again = self._values(batch)
        for what, values in whole.items():
            if not torch.allclose(values, again[what], rtol=1e-5, atol=1e-7, equal_nan=True):
                raise NondeterministicModelError(
                    f"the model gives two answers for the same weights and data, even in eval "
                    f"mode: the {what} differs",
                    DETERMINISTIC,
                )

    def _random(self, names: Sequence[str], batch: Split, whole: Values) -> LosscliError:
        """The error of a forward pass that draws random numbers; says what they change."""
        changes = False
        for seed in range(1, 1 + _SEEDS):
            seed_all(seed, self.device)
            again = self._values(batch)
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

    def _wider(self) -> Iterator[tuple[Evaluate, Narrowest]]:
        """Makes copies of the model in wider types, of which each is dropped before the next."""
        numbers = sum(tensor.numel() for tensor in self.tensors.values())
        budget = device_budget(self.device) or host_budget()
        for dtype in (torch.float32, torch.float64):
            if torch.finfo(dtype).eps >= torch.finfo(self.dtype).eps:
                continue
            if numbers * dtype.itemsize > budget:
                return
            try:
                twin = self.twin(copy.deepcopy(self.model), dtype)
            except Exception:  # noqa: BLE001 - the user's objects, or a device without float64
                return
            twin.metrics, twin.copies_inputs = self.metrics, self.copies_inputs
            narrowest = Narrowest(dtype)

            def evaluate(
                batch: Split, twin: Objective = twin, narrowest: Narrowest = narrowest
            ) -> Values:
                with narrowest:
                    return twin._values(batch)

            yield evaluate, narrowest

    @property
    def operations(self) -> int:
        """The floating-point operations of one example's forward pass: two a weight, or more."""
        if self._operations is None:
            self._operations = self._count()
        return self._operations

    def trace(self) -> Trace:
        """Traces a forward pass on a few examples, with the weights that are loaded.

        Returns:
            What it computes and reads; as far as it comes, if it fails.
        """
        trace = Trace()
        with torch.no_grad(), Draws(self.device):
            self._count(trace)
        return trace

    def _check_parameters(self, trace: Trace) -> None:
        """Makes sure that a forward pass reads the model's own parameters.

        What is not seen to be read, as in another thread, is told by its influence.
        """
        own = addresses(self.tensors.values())
        parameters = {
            name: tensor
            for name, tensor in self.tensors.items()
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        }
        unread = [
            name
            for name, tensor in parameters.items()
            if not trace.read.intersection(addresses([tensor])) and tensor.numel()
        ]
        # Where nothing was seen at all, the pass failed, or is hidden from a trace.
        if not unread or not trace.read or self._have_influence(unread):
            return
        self.unused = tuple(unread)
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

    def _have_influence(self, names: Sequence[str]) -> bool:
        """Tells whether tensors, loaded as not-a-number, change the outputs of a first batch."""
        batch = next(iter(self.splits.values())).first(self.batch_size).to(self.device)
        inputs = self.data.prepare(batch.inputs, self.dtype)
        own = {name: self.tensors[name].clone() for name in names}
        nothing = {name: torch.full_like(tensor, torch.nan) for name, tensor in own.items()}

        def outputs(weights: Weights) -> list[Tensor]:
            self.load(weights)
            leaves = tree_leaves(self.forward(self.model, inputs))
            return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)]

        try:
            before, after = outputs(own), outputs(nothing)
        except ModelError:
            return True
        finally:
            self.load(own)
        return not before or any(
            x.shape != y.shape or not torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
            for x, y in zip(before, after, strict=True)
        )

    def _count(self, trace: Trace | None = None) -> int:
        once = 2 * sum(parameter.numel() for parameter in self.model.parameters())
        split = next(iter(self.splits.values()))
        # Some models take a whole batch alone, and some no counter can look into.
        for number in dict.fromkeys((min(_PROBE, self.batch_size), self.batch_size)):
            few = split.first(number).to(self.device)
            inputs = self.data.prepare(map_inputs(Tensor.clone, few.inputs), self.dtype)
            with contextlib.suppress(ModelError):
                found = operations(self.model, partial(self.forward, self.model, inputs), trace)
                return max(1, once, found // len(few))
        return max(1, once)

    def _fit_outputs(self) -> None:
        """Makes the batch smaller, where the outputs of one would be large; the same every run."""
        budget = _OUTPUTS.get(self.device.type, _OUTPUTS_ELSEWHERE)
        for split in self.splits.values():
            few = split.first(min(_PROBE, self.batch_size)).to(self.device)
            inputs = self.data.prepare(map_inputs(Tensor.clone, few.inputs), self.dtype)
            try:
                outputs = self.forward(self.model, inputs)
            except ModelError:
                # Told of the whole batch, which may be the only size that the model takes.
                return
            if isinstance(scores := scores_in(outputs), Tensor):
                fit = max(1, budget * len(few) // max(1, scores.nbytes))
                self.batch_size = min(self.batch_size, 1 << (fit.bit_length() - 1))

    @torch.no_grad()
    def plain(
        self,
        weights: Weights,
        splits: Mapping[str, Examples] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Evaluation]:
        """Evaluates one point as anybody would: ``load_state_dict``, then batch by batch.

        Args:
            weights: All tensors of the model; they stay loaded.
            splits: The examples; all by default.
            progress: Told how far it is.

        Returns:
            For each split its evaluation at this one point, P = 1.
        """
        self.load(weights)
        return self._evaluate(Plain(self), splits, progress)

    @torch.no_grad()
    def at(
        self,
        slice_: Slice,
        coordinates: Sequence[Sequence[float]],
        splits: Mapping[str, Examples] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Evaluation]:
        """Evaluates points of a slice: their weights are made once, then the data goes by once.

        Args:
            slice_: The slice, its ends on this objective's device. Tensors that it does not move
                keep the values last loaded; those that it moves are left at an unknown point.
            coordinates: The P points.
            splits: The examples; all by default.
            progress: Told how far it is.

        Returns:
            For each split its evaluation at the P points.
        """
        way = self._way or Way.LOADED
        if way is Way.LOADED:
            return self._evaluate(Loaded(self, slice_, coordinates), splits, progress)
        if way is Way.STACKED:
            points: Points = Stacked(self, slice_, coordinates, proving=self._proving)
        else:
            points = Points(self, slice_, coordinates, way, proving=self._proving)
        with points:
            return self._evaluate(points, splits, progress)

    @torch.no_grad()
    def settle(
        self,
        slice_: Slice,
        coordinates: Sequence[Sequence[float]],
        examples: int = _PROOF_EXAMPLES,
    ) -> None:
        """Chooses the fastest way to evaluate points that gives the numbers of the plain one.

        A few points are evaluated on a part of a batch by loading each plainly, then in every
        way from the fastest on until one agrees. The choice is made once, at the first points
        that share a first layer: so it does not depend on the order of slices.

        Args:
            slice_: The slice.
            coordinates: As many points as will be evaluated at once.
            examples: Examples to prove a way on, at most.
        """
        if self.way is not None:
            return
        self._provisional = False
        moving = sum(self.tensors[name].nbytes for name in slice_.ends[0])
        if moving > _LARGE_BYTES and not self._folds:
            # The proof would cost a second copy. Whoever sweeps a line compares its ends anyway.
            self._way = Way.BOUND
            return
        name, split = next(iter(self.splits.items()))
        sample = {name: split.first(min(self.batch_size, examples)).to(self.device)}
        few = [tuple(coordinates[i * (len(coordinates) - 1) // 3]) for i in range(4)]
        few = list(dict.fromkeys(few))
        proofs = [(self.held, _AGREE[self.dtype])]
        if self.recalibration is not None:
            proofs.append((self.brief, _AGREE_ON_ESTIMATES[self.dtype]))
        own = {n: self.tensors[n].clone() for layer in self.statistics for n in layer.names}
        truths = []
        for context, _ in proofs:
            with context():
                truths.append(self._evaluate(Loaded(self, slice_, few), sample, None)[name].losses)
        if own:
            self.load(own)

        def agrees(proof: int) -> bool:
            context, tolerance = proofs[proof]
            try:
                with context():
                    try:
                        found = self.at(slice_, few, sample)[name].losses
                    except NothingSharedError:
                        self._provisional, self._proving = True, False
                        found = self.at(slice_, few, sample)[name].losses
            except (ModelError, LossError):
                return False
            finally:
                self._proving = True
            return _agree(found, truths[proof], tolerance)

        self._proving = True
        try:
            for way in self._ways():
                self.way = way
                if all(map(agrees, range(len(proofs)))):
                    return
        except BaseException:
            # Out of memory, say: the way that was tried is not one that was proven.
            self._way = None
            raise
        finally:
            self._proving = False
        self.way = Way.LOADED

    @property
    def way(self) -> Way | None:
        """How points are evaluated; None before it is settled. To be set to one that was proven."""
        return None if self._provisional else self._way

    @way.setter
    def way(self, way: Way | None) -> None:
        self._way, self._provisional = way, False

    def _ways(self) -> list[Way]:
        if self._folds:
            return []
        ways = [Way.SHARED, Way.BOUND]
        functions = [self.loss, *self.metrics.values()]
        known = is_known(self.model) and all(map(is_registered, functions))
        if self.device.type == "cpu" and known:
            ways.insert(0, Way.THREADS)
        # Mapped over weights a convolution becomes one of many groups, which is slower than the
        # same convolutions in turn; and on a CPU nothing waits for a launch.
        # And of a module that has two names, functional_call does not put the tensors back.
        modules = list(self.model.modules())
        twice = len(list(self.model.named_modules(remove_duplicate=False))) > len(modules)
        if self.device.type == "cuda" and not twice and not any(map(_convolves, modules)):
            ways.insert(0, Way.STACKED)
        return ways

    def _evaluate(
        self,
        points: Plain | Loaded | Points,
        splits: Mapping[str, Examples] | None,
        progress: Progress | None,
    ) -> dict[str, Evaluation]:
        splits = self.splits if splits is None else splits
        total = sum(map(len, splits.values()))
        if self.recalibration is not None:
            total += len(self.recalibration)

        def tell(examples: int) -> None:
            if progress is not None:
                progress(examples / total)

        with Draws(self.device) as draws:
            self._recalibrate(points, tell)
            found = {name: self._walk(points, split, tell) for name, split in splits.items()}
        if draws.names:
            raise NondeterministicModelError(
                f"the forward pass draws random numbers from {' and '.join(draws.names)}, even in "
                "eval mode",
                DETERMINISTIC,
            )
        return found

    def _recalibrate(self, points: Plain | Loaded | Points, tell: Callable[[int], None]) -> None:
        """Estimates BatchNorm's statistics at all points, a batch at a time."""
        if self.recalibration is None:
            return
        try:
            for batch in self.recalibration.batches():
                inputs = self.data.prepare(batch.to(self.device).inputs, self.dtype)
                self._finish(points.estimate(inputs), len(batch), tell)
            found = points.adopt()
        except (torch.OutOfMemoryError, MemoryError):
            # With fewer points at once it may do; but a batch has to stay whole.
            if len(points) > 1:
                raise
            raise OutOfMemoryError(
                f"a batch of {self.recalibration.size} training examples, which --buffers "
                f"recalibrate takes at a time, does not fit into the memory of {self.device}",
                "Try --device cpu or --dtype bfloat16",
            ) from None
        self.idle = [layer for layer in self.batchnorm if layer.mean not in found]

    def _walk(
        self,
        points: Plain | Loaded | Points,
        split: Examples,
        tell: Callable[[int], None] = lambda _: None,
    ) -> Evaluation:
        """Takes all points through the data, a batch at a time, without waiting for the device."""
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        losses = torch.empty(len(points), len(split), dtype=exact, device=self.device)
        zeros = torch.zeros(len(points), dtype=self.sum_type, device=self.device)
        totals = {name: zeros.clone() for name in self.metrics}
        # Each batch has sums of its own, added when all its points are done: two threads may be at
        # one point with two batches, and the order of adding settles the last digit.
        before: tuple[Iterator[int], int, dict[str, Tensor]] = iter(()), 0, {}
        start = 0
        weighed: list[Mapping[str | None, Tensor | None]] = []
        for batch in self.batches(split):
            inputs = self.data.prepare(batch.inputs, self.dtype)
            columns = losses[:, start : start + len(batch)]
            start += len(batch)
            sums = {name: zeros.clone() for name in self.metrics}
            collector = OutputCollector(self, batch.targets, columns, sums)
            weighed.append(collector.weights)
            done = points.evaluate(inputs, collector)
            # One batch ahead, so that no thread waits for the last point of the one before.
            self._add(*before, totals, tell)
            before = done, len(batch), sums
        self._add(*before, totals, tell)
        weights = {name: join_weights(weighed, name) for name in (None, *self.metrics)}
        counts = {name: float(w.sum()) for name, w in weights.items() if name and w is not None}
        losses, own = losses.cpu(), weights[None]
        if own is not None:
            # Where none counts, the mean is not a number.
            losses /= own.mean()
        metrics = {
            name: total.cpu().to(torch.float64) / counts.get(name, len(split))
            for name, total in totals.items()
        }
        return Evaluation(losses, metrics, own, counts)

    def _add(
        self,
        points: Iterator[int],
        examples: int,
        sums: Mapping[str, Tensor],
        totals: Mapping[str, Tensor],
        tell: Callable[[int], None],
    ) -> None:
        self._finish(points, examples, tell)
        for name, values in sums.items():
            totals[name].add_(values)

    @staticmethod
    def _finish(points: Iterator[int], examples: int, tell: Callable[[int], None]) -> None:
        for _ in points:
            tell(examples)

    def _check_metrics(self, outputs: Any, targets: Tensor) -> None:
        """Makes sure that the metrics work; those that nobody asked for are left out if not."""
        for metric, function in list(self.metrics.items()):
            what = f"metric {metric!r}"
            try:
                if metric in self._optional and not _classifies(self.loss):
                    raise LossError("the loss is not one of classification")  # noqa: TRY301
                scores = scores_in(outputs)
                unfit = isinstance(scores, Tensor) and not has_label(scores, targets)
                if metric in self._optional and unfit:
                    raise LossError("the targets are not the labels 0 and 1")  # noqa: TRY301
                self.per_example(function, outputs, targets, what)
            except LossError as error:
                if metric not in self._optional:
                    raise LossError(error.what, _WITHOUT_METRICS) from error
                del self.metrics[metric]
                self.left_out[metric] = error.what

    def _check_labels(self, outputs: Any, targets: Tensor, name: str) -> None:
        """Finds labels out of range before a GPU kernel does, which would end the process."""
        outputs, split = scores_in(outputs), self.splits[name]
        seen = split if isinstance(split, Split) else split.first(self.batch_size)
        if not isinstance(outputs, Tensor) or targets.is_floating_point():
            return
        self._classes = classes_of(self.loss, outputs, targets)
        if self._classes is None:
            return
        self._check_range(seen.targets, f"the split {name!r}")
        if not isinstance(split, Split):
            return
        weights = weights_of(self.loss, outputs, seen.targets)
        without = 0 if weights is None else int((weights == 0).sum())
        if without == len(seen.targets):
            raise LossError(
                f"the split {name!r} has no target that counts",
                f"Give data with other targets than {IGNORED} and those without weight",
            )
        if without and not self.batch_loss:
            counts = f"{without:,} of {len(seen.targets):,} examples have no target that counts"
            self._remarks[f"{name}: {counts} and are left out of the mean"] = None
        weighted = options_of(self.loss).get("weight") is not None
        if function_of(self.loss) in _OF_CLASSES and weighted:
            self._remarks["the mean loss is weighted by class, Σwl/Σw, as torch's"] = None

    def _check_targets(self, name: str) -> None:
        """Finds a target out of range, or not finite if the loss does not leave it out."""
        split = self.splits[name]
        seen = split if isinstance(split, Split) else split.first(self.batch_size)
        check_shares(self.loss, seen.targets, f"the split {name!r}")
        place = _not_finite(split.targets) if isinstance(split, Split) else None
        if place is None or not isinstance(split, Split) or self.batch_loss:
            return
        start = place - place % self.batch_size
        batch = split.take(slice(start, start + self.batch_size)).send(self.device)
        inputs = self.data.prepare(map_inputs(Tensor.clone, batch.inputs), self.dtype)
        outputs = self.forward(self.model, inputs)
        losses = self.per_example(self.loss, outputs, batch.targets, "loss")
        if not losses[place - start].isfinite():
            raise self._target_error(split.targets[place], split, place)

    def _target_error(self, target: Tensor, split: Examples, index: int) -> DataError:
        found = [name for name, examples in self.splits.items() if examples is split]
        where = f"the split {found[0]!r}" if found else "the data"
        value = float(target[~target.isfinite()].flatten()[0])
        return DataError(
            f"{where}: the target of example {split.position(index)} (counted from 0) is {value}",
            "Leave the example out, or give a --loss of your own that does",
        )

    def _check_lengths(self, lengths: Collection[torch.Size]) -> None:
        """Makes sure that each target counts the same in a mean over all of them."""
        if len(lengths) > 1:
            one, other = sorted(map(list, lengths))[:2]
            raise LossError(
                f"examples have targets of the shapes {one} and {other}, and the loss is a mean "
                "over all targets",
                f"Fill them up to one shape with {IGNORED}, or give --loss token_cross_entropy, a "
                "mean over the sequences",
            )

    def _check_range(self, labels: Tensor, where: str) -> None:
        counts, classes = counted(self.loss, labels, self._classes), self._classes
        void = classes is not None and classes <= VOID and function_of(self.loss) in _OF_CLASSES
        if void and bool((labels == VOID).any()):
            told = f"targets of {VOID} are ignored: the model has {classes} classes"
            self._remarks[told] = None
        labels = labels[counts]
        if not labels.numel():
            return
        low, high = int(labels.min()), int(labels.max())
        if classes is not None and (low < 0 or high >= classes):
            raise LossError(
                f"{where} has the label {low if low < 0 else high}, and the model's {classes} "
                f"outputs stand for the labels 0 to {classes - 1}",
                "Choose a model or data with as many classes",
            )


def _not_finite(targets: Tensor) -> int | None:
    """The first example whose target is infinite or not a number."""
    if not targets.is_floating_point():
        return None
    bad = ~targets.isfinite().flatten(1).all(1) if targets.ndim > 1 else ~targets.isfinite()
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


def _classifies(loss: PerExample) -> bool:
    """Tells whether the highest score of a class may be an answer, as far as the loss is known."""
    return loss.of_scores if isinstance(loss, TorchLoss) else function_of(loss) is not mse


def _cast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Moves a model to a device and casts it; complex tensors stay complex."""
    if not any(tensor.is_complex() for tensor in (*model.parameters(), *model.buffers())):
        return model.to(device=device, dtype=dtype)

    # nn.Module.to would take the imaginary parts away.
    model.to(device)
    for tensor in (*model.parameters(), *model.buffers()):
        if can_move(tensor):
            tensor.data = tensor.data.to(dtype.to_complex() if tensor.is_complex() else dtype)
    return model


def _convolves(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _bytes_in_forward(inputs: Tensor) -> int:
    """The bytes that an example takes in a forward pass, as far as its inputs show them."""
    whole = not inputs.is_floating_point() and inputs.dtype not in {torch.uint8, torch.bool}
    # The first thing that happens to an image is that it gets more channels.
    factor = _TOKEN_BYTES if whole else 4 * (2 if inputs.ndim > 2 else 1)
    return inputs[0].numel() * factor


def _agree(found: Tensor, truth: Tensor, tolerance: float) -> bool:
    finite = truth.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return False
    found, truth = found.double()[finite], truth.double()[finite]
    return bool((found - truth).norm() <= tolerance * truth.norm())
