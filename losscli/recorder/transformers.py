"""The callback for the Trainer of transformers."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback

from losscli.recorder.recorder import Recorder

__all__ = ["TransformersCallback"]


class TransformersCallback(TrainerCallback):
    """Saves checkpoints of a model while ``Trainer.train`` trains it.

    The trainer passes no loss to callbacks, so that the checkpoints have none.

    Args:
        folder: The folder of the checkpoints.
        options: Further options of `losscli.Recorder`; ``steps`` is that of the trainer.
    """

    def __init__(self, folder: str | os.PathLike[str], **options: Any) -> None:
        self._folder = folder
        self._options = options
        self._recorder: Recorder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **training: Any) -> None:
        """Starts or continues the record."""
        self._recorder = Recorder(
            training["model"],
            self._folder,
            **{
                "steps": state.max_steps,
                "start": state.global_step or None,
                "optimizer": training["optimizer"],
                **self._options,
            },
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **training: Any) -> None:
        """Counts a step of the optimiser."""
        assert self._recorder is not None
        self._recorder.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **training: Any) -> None:
        """Saves the last checkpoint, unless the trainer has loaded the best one by now."""
        assert self._recorder is not None
        self._recorder.close(save=not args.load_best_model_at_end)
