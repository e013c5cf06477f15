"""The exceptions of losscli: each message is one line with the problem, its place and a fix."""

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
    """Base class of all errors of losscli, with a message of one line.

    Args:
        what: What is wrong, and where.
        cure: How to fix it; appended after a full stop.

    Attributes:
        exit_code: The exit status of the command that ends with this error.
    """

    exit_code = 1

    def __init__(self, what: str, cure: str = "") -> None:
        self.what = what
        self.cure = cure
        end = "" if what.endswith("?") else "."
        super().__init__(f"{what.rstrip('.')}{end} {cure}" if cure else what)


class UsageError(LosscliError):
    """The command or its options are invalid, regardless of the content of the files."""

    exit_code = 2


class SpecError(UsageError):
    """A spec cannot be parsed or names an unknown entry."""


class UntrustedCodeError(LosscliError):
    """A file names code to run or data to fetch, which only the command line may do."""


class CheckpointError(LosscliError):
    """A checkpoint cannot be read."""


class ChangedError(CheckpointError):
    """A checkpoint changed during a run."""


class MismatchError(LosscliError):
    """Two checkpoints, or a checkpoint and a model, do not have the same tensors.

    Args:
        what: What is wrong, and where.
        cure: How to fix it.
        option: The options of a study with which they would fit; empty if there are none.
    """

    def __init__(self, what: str, cure: str = "", option: str = "") -> None:
        super().__init__(what, cure)
        self.option = option


class ModelError(LosscliError):
    """A model cannot be built, or fails on the data."""


class NondeterministicModelError(ModelError):
    """A model in eval mode gives different outputs for the same weights and inputs."""


class DataError(LosscliError):
    """A data set cannot be read or has an unknown form."""


class LossError(LosscliError):
    """A loss or metric fails, or does not give one number per example."""


class DeviceError(LosscliError):
    """The requested device is not available."""


class OutOfMemoryError(LosscliError):
    """The memory of the device is too small for even one point and one example."""


class TableError(LosscliError):
    """A CSV file is not one that losscli wrote."""


class OutputError(LosscliError):
    """A result cannot be written, or would overwrite the result of another run."""


def one_line(error: BaseException) -> str:
    """Formats an error of other code in one line.

    Args:
        error: The error.

    Returns:
        Its type and its message, with whitespace collapsed.
    """
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def printable(text: str) -> str:
    """Escapes the control characters in text, which could control a terminal.

    Args:
        text: Text from a file or a name.

    Returns:
        The text with non-printable characters as escapes.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
