"""The callback for the Trainer of Lightning."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

from losscli.errors import UsageError
from losscli.recorder.recorder import Recorder

__all__ = ["LightningCallback"]


class LightningCallback(Callback):
    """Saves checkpoints of a LightningModule while ``Trainer.fit`` trains it.

    A step is one of ``trainer.global_step``, whatever the number of batches that are accumulated.
    The loss is what ``training_step`` returned for the last batch of the step.

    Args:
        folder: The folder of the checkpoints.
        steps: The number of steps of the whole training; by default as estimated by the trainer.
        options: Further options of `losscli.Recorder`.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, steps: int | None = None, **options: Any
    ) -> None:
        super().__init__()
        self._folder = folder
        self._steps = steps
        self._options = options
        self._recorder: Recorder | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts or continues the record."""
        steps = self._steps or trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise UsageError(
                "the trainer has no limit of steps, by which checkpoints are spaced",
                "Give steps=N, or Trainer(max_steps=N)",
            )
        optimizer = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
        options = {"start": trainer.global_step or None, "optimizer": optimizer, **self._options}
        self._recorder = Recorder(pl_module, self._folder, steps=int(steps), **options)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the steps of the optimiser in this batch: none, one or several."""
        assert self._recorder is not None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        while self._recorder.steps_taken < trainer.global_step:
            self._recorder.step(loss)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Saves the last checkpoint."""
        assert self._recorder is not None
        self._recorder.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Finishes writing; the model may be in the middle of a step."""
        if self._recorder is not None:
            self._recorder.close(save=False)
