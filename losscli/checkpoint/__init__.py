"""Read and write checkpoints. Only this package reads pickles or strips prefixes of names."""

from __future__ import annotations

from losscli.checkpoint.adam import AdamState, ModelParameters, find_adam_state
from losscli.checkpoint.files import SUFFIXES
from losscli.checkpoint.folders import list_checkpoints
from losscli.checkpoint.given import (
    CheckpointLike,
    InMemoryCheckpoint,
    is_checkpoint,
    name_checkpoint,
    name_checkpoints,
    require_values,
)
from losscli.checkpoint.hooks import LoadHooks, has_custom_loading
from losscli.checkpoint.names import StateDict, Versions, file_names, loadable, state_dicts
from losscli.checkpoint.order import expand_folders, order_path
from losscli.checkpoint.reading import find_base, read, read_optimizers
from losscli.checkpoint.renaming import select_for
from losscli.checkpoint.rules import NameRules
from losscli.checkpoint.saving import check_storable, lost_by_safetensors, save
from losscli.checkpoint.state import Checkpoint, CheckpointFile, tied_names

__all__ = [
    "SUFFIXES",
    "AdamState",
    "Checkpoint",
    "CheckpointFile",
    "CheckpointLike",
    "InMemoryCheckpoint",
    "LoadHooks",
    "ModelParameters",
    "NameRules",
    "StateDict",
    "Versions",
    "check_storable",
    "expand_folders",
    "file_names",
    "find_adam_state",
    "find_base",
    "has_custom_loading",
    "is_checkpoint",
    "list_checkpoints",
    "loadable",
    "lost_by_safetensors",
    "name_checkpoint",
    "name_checkpoints",
    "order_path",
    "read",
    "read_optimizers",
    "require_values",
    "save",
    "select_for",
    "state_dicts",
    "tied_names",
]
