"""Save checkpoints during training, densely at the start."""

from __future__ import annotations

import itertools
import os
import re
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from losscli.checkpoint import StateDict, lost_by_safetensors, read, require_values, save
from losscli.errors import LosscliError, OutputError, UsageError
from losscli.recorder.defaults import split_specs, write_config, write_defaults
from losscli.recorder.state import copy_optimizer_state, copy_state, is_sharded, unwrap
from losscli.settings import checked, convert
from losscli.weight_space.vectors import identical, mismatches

__all__ = ["Recorder"]

_FILE = re.compile(r"step-([0-9]+)\.(?:safetensors|pt)")


class Recorder:
    """Saves checkpoints during training, densely at the start, where the weights move fast.

    Checkpoint k of n = `count` is taken at step max(k, S (k / (n − 1))³) of S = `steps`, rounded,
    or one step later at the start if `initial` is False. Training that goes on after S continues
    the sequence. The files are ``FOLDER/step-NNNNN.safetensors``, from which ``losscli trajectory
    FOLDER`` draws the path. A thread writes them, one at a time, and renames each when it is
    complete.

    If torch.distributed is in use, every rank makes a recorder and calls its methods, and rank 0
    writes. Names have no prefixes of DistributedDataParallel, FSDP or torch.compile.

    Use it as a context manager, or call `close`, to save the last step too. After an exception in
    the context nothing more is saved, since the model may be in the middle of a step.

    Args:
        model: The model.
        folder: The folder of the checkpoints. If it holds a record, the model must have the weights
            of its last checkpoint, and the record is continued.
        steps: The number of steps of the whole training.
        count: The number of checkpoints in these steps.
        initial: Whether to save the model as it is now, before its first step.
        start: The number of steps that the model has taken, if it was restored from another
            checkpoint. Later checkpoints in the folder are removed when the first new one is
            written. None for 0, or the step of the last checkpoint in the folder.
        optimizer: The optimiser. If all of its parameters have the same learning rate at the time
            of a checkpoint, the metadata has it as ``learning_rate``.
        moments: Whether to save the state of the optimiser too. The files are then ``.pt`` files
            with ``state_dict`` and ``optimizer``. Models with extra state, which safetensors does
            not store, are saved as ``.pt`` files too.
        model_spec: The spec of the model, as for ``--model``.
        data_spec: The spec of the data, as for ``--data``. Specs of built-in models and data sets
            become metadata of the checkpoints, with paths relative to the folder; specs of code and
            of data on the hub are written to ``losscli.toml`` in the folder, and are used with
            ``--trust``.

    Raises:
        UsageError: An argument is invalid.
        OutputError: The folder holds the record of another run, or cannot be written to.
        CheckpointError: A tensor of the model has no values yet.
    """

    @checked()
    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        steps: int,
        count: int = 30,
        initial: bool = True,
        start: int | None = None,
        optimizer: Any = None,
        moments: bool = False,
        model_spec: str | None = None,
        data_spec: str | None = None,
    ) -> None:
        for name, value, lowest in (("steps", steps, 1), ("count", count, 2), ("start", start, 0)):
            if value is not None and value < lowest:
                raise UsageError(f"{name} must be at least {lowest}, not {value}")
        if optimizer is not None and not hasattr(optimizer, "param_groups"):
            raise UsageError("optimizer has no param_groups", "Give a torch.optim.Optimizer")
        if moments and optimizer is None:
            raise UsageError("moments=True needs the optimiser", "Give optimizer=…")
        self._model = unwrap(model)
        require_values(self._model, "the model")
        self._optimizer = optimizer
        self._moments = moments
        self._steps, self._count, self._initial = steps, count, initial
        self._folder = Path(folder)
        self._is_leader = _rank() == 0
        self._loss: Any = None
        self._stale: list[Path] = []
        self._metadata: dict[str, str] = {}
        self._suffix = ".pt"
        self._writer = ThreadPoolExecutor(1, "losscli-recorder")
        self._pending: Future[None] | None = None
        self._closed = False
        self._unlock: Callable[[], object] = lambda: None
        state = copy_state(self._model) if self._is_leader or is_sharded(self._model) else None

        def prepare() -> tuple[int, bool]:
            assert state is not None
            self._metadata, code = split_specs(model_spec, data_spec, self._folder)
            if not (moments or lost_by_safetensors(state, state.versions, state.extra)):
                self._suffix = ".safetensors"
            found = self._prepare_folder(state, start)
            write_defaults(self._folder, code)
            if model_spec is None:
                write_config(self._folder, self._model)
            return found

        try:
            self._taken, is_new = _decide(prepare)
            self._saved = self._taken
            self._due = self._next_due()
            if initial and is_new:
                self._save()
                self._wait()  # so that a folder or model that cannot be saved is an error at once
        except BaseException:
            self._unlock()
            raise

    @property
    def steps_taken(self) -> int:
        """The number of steps that the model has taken."""
        return self._taken

    def step(self, loss: float | Tensor | None = None) -> None:
        """Counts a step of the optimiser, and saves the model if a checkpoint is due.

        Args:
            loss: The loss of the step, a number or a tensor without dimensions, for the metadata.
                It is read only if a checkpoint is due, so that a GPU is not waited for.

        Raises:
            UsageError: The recorder is closed, or the loss is not a number.
            OutputError: The previous checkpoint could not be written.
        """
        if self._closed:
            raise UsageError("the recorder is closed", "Call close() after the last step()")
        self._taken += 1
        # Without the graph, which would keep its memory until the next step.
        self._loss = loss.detach() if isinstance(loss, Tensor) else loss
        if self._taken >= self._due:
            self._save()

    def close(self, *, save: bool = True) -> None:
        """Saves the last step, if it is not saved yet, and waits until all files are written.

        Args:
            save: Whether to save the last step.

        Raises:
            UsageError: The loss of the last step is not a number.
            OutputError: A checkpoint could not be written.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if save and self._taken > self._saved:
                self._save()
            self._wait()
        finally:
            self._writer.shutdown()
            self._unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(save=kind is None)

    def _next_due(self) -> int:
        """Returns the step of the next checkpoint."""
        first = 0 if self._initial else 1
        steps = (
            max(first + k, int(self._steps * (k / (self._count - 1)) ** 3 + 0.5))
            for k in itertools.count()
        )
        return next(step for step in steps if step > self._taken)

    def _save(self) -> None:
        """Copies the model and has it written."""
        self._wait()  # there is at most one copy of the model in memory
        sharded = is_sharded(self._model)
        if self._is_leader or sharded:
            state = copy_state(self._model)
            moments = None
            if self._moments:
                moments = copy_optimizer_state(self._model, self._optimizer)
            if self._is_leader:
                path = self._folder / f"step-{self._taken:05}{self._suffix}"
                arguments = state, self._describe(), path, moments
                self._pending = self._writer.submit(self._write, *arguments)
        self._saved = self._taken
        self._due = self._next_due()

    def _wait(self) -> None:
        """Waits until the pending checkpoint is written; raises the error if it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _describe(self) -> dict[str, str]:
        """Returns the metadata of a checkpoint."""
        metadata = {**self._metadata, "step": str(self._taken)}
        if self._loss is not None:
            metadata["loss"] = repr(convert("loss", self._loss, float))
        groups = self._optimizer.param_groups if self._optimizer is not None else ()
        rates = {float(group["lr"]) for group in groups if "lr" in group}
        if len(rates) == 1:
            metadata["learning_rate"] = repr(rates.pop())
        return metadata

    def _write(
        self,
        state: StateDict,
        metadata: Mapping[str, str],
        path: Path,
        optimizer: Mapping[str, Any] | None,
    ) -> None:
        save(state, metadata, path, state.versions, state.extra, optimizer=optimizer)
        for stale in self._stale:
            if stale != path:
                stale.unlink(missing_ok=True)
        self._stale = []

    def _lock(self) -> None:
        """Locks the folder until the recorder is closed or the process ends.

        Two runs that start from the same weights would otherwise mix their checkpoints.
        """
        try:
            import fcntl
        except ImportError:  # on Windows
            return
        folder = os.open(self._folder, os.O_RDONLY)
        self._unlock = weakref.finalize(self, os.close, folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise OutputError(
                f"another recorder writes to {self._folder}",
                "Close that one first, or choose another folder",
            ) from None
        except OSError:
            # Some network file systems have no locks of folders.
            self._unlock()

    def _prepare_folder(self, state: StateDict, start: int | None) -> tuple[int, bool]:
        """Creates the folder, or finds where to continue the record in it.

        Returns:
            The number of steps that the model has taken, and whether there is no record yet.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock()
            for leftover in self._folder.glob(".step-*.tmp"):  # of a process that was killed
                leftover.unlink()
            files = {
                int(match[1]): path
                for path in self._folder.iterdir()
                if (match := _FILE.fullmatch(path.name))
            }
        except OSError as error:
            raise OutputError(
                f"the folder {self._folder} cannot be written to: {error.strerror}",
                "Choose another folder",
            ) from None
        if not files:
            return start or 0, True
        last = max(files)
        step = last if start is None else start
        compared = files.get(step, files[last])
        weights = read(str(compared)).select(None).weights
        if wrong := mismatches(weights, state):
            raise OutputError(
                f"{compared} is a checkpoint of another model ({wrong[0]})", "Choose another folder"
            )
        if step in files and not all(identical(t, state[name]) for name, t in weights.items()):
            raise OutputError(
                f"{compared} does not hold the weights that the model has now, so that the folder "
                "may hold the record of another run",
                "Choose another folder, or restore the model from that checkpoint"
                + (
                    ", or give start=N if it has taken N steps of that run" if start is None else ""
                ),
            )
        self._stale = [path for number, path in files.items() if number > step]
        return step, False


def _rank() -> int:
    """Returns the rank of this process, also before torch.distributed is initialised."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def _decide(prepare: Callable[[], tuple[int, bool]]) -> tuple[int, bool]:
    """Lets rank 0 prepare, and gives all ranks what it finds, or its error."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return prepare() if _rank() == 0 else (0, False)
    outcome: list[Any] = [None]
    if _rank() == 0:
        try:
            outcome = [prepare()]
        except LosscliError as error:
            outcome = [error]
    torch.distributed.broadcast_object_list(outcome, 0)
    if isinstance(outcome[0], LosscliError):
        raise outcome[0]
    found: tuple[int, bool] = outcome[0]
    return found
