"""The studies: from checkpoints and settings to tables and a summary. The library's front door."""

from __future__ import annotations

from losscli.studies.check import Check, check
from losscli.studies.inspection import export, inspect
from losscli.studies.interpolation import Interpolation, interpolate
from losscli.studies.plane import Plane, plane
from losscli.studies.study import Study
from losscli.studies.trajectory import Trajectory, trajectory

__all__ = [
    "Check",
    "Interpolation",
    "Plane",
    "Study",
    "Trajectory",
    "check",
    "export",
    "inspect",
    "interpolate",
    "plane",
    "trajectory",
]
