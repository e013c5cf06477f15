"""From file to checkpoint and back: the only room that unwraps, strips prefixes, reads pickles."""

from __future__ import annotations

from losscli.checkpoint.files import SUFFIXES
from losscli.checkpoint.folders import in_folder
from losscli.checkpoint.given import CheckpointLike, Given, named, named_all
from losscli.checkpoint.hooks import LoadHooks, takes_part
from losscli.checkpoint.names import Versions, loadable
from losscli.checkpoint.order import all_in, path_of
from losscli.checkpoint.reading import base_of, read
from losscli.checkpoint.renaming import select_for
from losscli.checkpoint.saving import save
from losscli.checkpoint.state import Checkpoint, CheckpointFile, tied

__all__ = [
    "SUFFIXES",
    "Checkpoint",
    "CheckpointFile",
    "CheckpointLike",
    "Given",
    "LoadHooks",
    "Versions",
    "all_in",
    "base_of",
    "in_folder",
    "loadable",
    "named",
    "named_all",
    "path_of",
    "read",
    "save",
    "select_for",
    "takes_part",
    "tied",
]
