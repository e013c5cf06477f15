"""The family of errors: each is one line that says what went wrong, where, and the cure."""

from __future__ import annotations

__all__ = [
    "ChangedError",
    "CheckpointError",
    "DataError",
    "DeviceError",
    "LossError",
    "LosscliError",
    "MismatchError",
    "ModelError",
    "NondeterministicModelError",
    "OutOfMemoryError",
    "OutputError",
    "SpecError",
    "TableError",
    "UntrustedCodeError",
    "UsageError",
    "one_line",
    "printable",
]


class LosscliError(Exception):
    """Something that losscli could not do; its text is one line: what, where, the cure.

    Args:
        what: What went wrong and where.
        cure: What to do about it; appended after a full stop.

    Attributes:
        exit_code: The exit status of the command that ends with this error.
    """

    exit_code = 1

    def __init__(self, what: str, cure: str = "") -> None:
        self.what = what
        self.cure = cure
        super().__init__(f"{what.rstrip('.')}. {cure}" if cure else what)


class UsageError(LosscliError):
    """The command or its options do not make sense, whatever the files hold."""

    exit_code = 2


class SpecError(UsageError):
    """A spec does not parse, or names nothing that is known."""


class UntrustedCodeError(LosscliError):
    """A file names code to run, or data to fetch; only the command line may do so."""


class CheckpointError(LosscliError):
    """A checkpoint cannot be read."""


class ChangedError(CheckpointError):
    """A checkpoint is no longer what it was when the run began."""


class MismatchError(LosscliError):
    """Two checkpoints, or a checkpoint and a model, do not have the same tensors."""


class ModelError(LosscliError):
    """A model cannot be built, or fails on the data."""


class NondeterministicModelError(ModelError):
    """A model in eval mode gives two answers for one point, so no curve is defined."""


class DataError(LosscliError):
    """A data set cannot be read, or is not of a form that is understood."""


class LossError(LosscliError):
    """A loss or metric fails, or does not give one number per example."""


class DeviceError(LosscliError):
    """The device asked for is not there."""


class OutOfMemoryError(LosscliError):
    """Not even one point and one example fit into the memory of the device."""


class TableError(LosscliError):
    """A CSV file is not one that losscli wrote."""


class OutputError(LosscliError):
    """A result cannot be written, or would overwrite the result of another run."""


def one_line(error: BaseException) -> str:
    """Puts a foreign error into one line.

    Args:
        error: What was raised.

    Returns:
        Its type and its text, white space folded.
    """
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def printable(text: str) -> str:
    """Makes text from a file or a name harmless on a terminal.

    Args:
        text: The text.

    Returns:
        The text with control characters, such as those that move a cursor, written as escapes.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
