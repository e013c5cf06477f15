"""A problem: what a study evaluates, and how that comes from names."""

from __future__ import annotations

from losscli.studies.problem.preparing import prepare
from losscli.studies.problem.problem import Problem, counted, differing_tensors

__all__ = ["Problem", "counted", "differing_tensors", "prepare"]
