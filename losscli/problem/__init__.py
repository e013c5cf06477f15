"""A problem: what a study evaluates, and how that comes from names."""

from __future__ import annotations

from losscli.problem.preparing import prepare
from losscli.problem.problem import Problem, counted

__all__ = ["Problem", "counted", "prepare"]
