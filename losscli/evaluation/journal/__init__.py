"""The journal of a run: its finished tasks, from which it can be resumed."""

from __future__ import annotations

from losscli.evaluation.journal.journal import Journal
from losscli.evaluation.journal.messages import differences

__all__ = ["Journal", "differences"]
