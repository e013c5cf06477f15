"""The journal of a run, beside its results, and how two runs differ."""

from __future__ import annotations

from losscli.evaluation.journal.journal import Journal
from losscli.evaluation.journal.messages import differences

__all__ = ["Journal", "differences"]
