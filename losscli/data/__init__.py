"""Data sets: files or code in; named splits of examples out, decoded once where they fit."""

from losscli.data.batch import TARGETS, model_inputs, separated
from losscli.data.memory import (
    allocations,
    device_budget,
    device_memory,
    host_budget,
    host_memory,
    placing,
)
from losscli.data.nests import Nest, leaves, length, map_nest, realise
from losscli.data.objects import Batching, from_object
from losscli.data.randomness import RandomnessDetector, seed_all
from losscli.data.registry import DATASETS, is_on_hub, load
from losscli.data.split import DataSet, Examples, Split, Task
from losscli.data.transfers import copy_stream, transferred

__all__ = [
    "DATASETS",
    "TARGETS",
    "Batching",
    "DataSet",
    "Examples",
    "Nest",
    "RandomnessDetector",
    "Split",
    "Task",
    "allocations",
    "copy_stream",
    "device_budget",
    "device_memory",
    "from_object",
    "host_budget",
    "host_memory",
    "is_on_hub",
    "leaves",
    "length",
    "load",
    "map_nest",
    "model_inputs",
    "placing",
    "realise",
    "seed_all",
    "separated",
    "transferred",
]
