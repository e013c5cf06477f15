"""Data sets: files or code in; named splits of whole tensors, decoded once for all points, out."""

from losscli.datasets.objects import from_object
from losscli.datasets.registry import DATASETS, load
from losscli.datasets.split import DataSet, Examples, Inputs, Split, Task, leaves, map_inputs

__all__ = [
    "DATASETS",
    "DataSet",
    "Examples",
    "Inputs",
    "Split",
    "Task",
    "from_object",
    "leaves",
    "load",
    "map_inputs",
]
