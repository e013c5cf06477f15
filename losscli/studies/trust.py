"""Which ``losscli.toml`` may name code: those that the user trusts.

Other users may write to the folder of a checkpoint or to those above it. Code that a
``losscli.toml`` there names is run only with ``--trust``, or in a folder that the user's own
configuration lists.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from losscli.errors import SpecError
from losscli.spec import read_toml

__all__ = ["cure_for_distrust"]


def cure_for_distrust(file: Path, *, trust: bool) -> str:
    """Says how to make a ``losscli.toml`` trusted.

    Args:
        file: The file.
        trust: Whether the user gives ``--trust``. As git does with repositories, this does not
            cover files of other users: in a shared folder such as /tmp, anybody can write one.

    Returns:
        What to do; empty if the file is trusted.
    """
    foreign = _foreign_path(file.parent, file)
    if trust and not foreign:
        return ""
    try:
        config = _user_config()
        folders = _trusted_folders(config) if config else []
    except SpecError as error:
        return str(error)
    # Neither a link to a trusted file nor a link out of a trusted folder is trusted: relative
    # names in the file start at the folder in which it was found.
    places = {Path(os.path.realpath(path)) for path in (file.parent, file)}
    if all(any(place.is_relative_to(folder) for folder in folders) for place in places):
        return ""
    if not foreign:
        return "If you trust it, give --trust"
    listed = f"add its folder to trusted = […] in {config}" if config else "copy it"
    return (
        f"{foreign} belongs to another user, which --trust does not cover. If you trust it, "
        f"{listed}"
    )


def _user_config() -> Path | None:
    """Returns the path of the user's configuration; None if there can be none."""
    import typer  # takes a tenth of a second

    path = Path(typer.get_app_dir("losscli"), "config.toml")
    # With a relative XDG_CONFIG_HOME or HOME it would be a file of the current folder.
    return path if path.is_absolute() else None


def _trusted_folders(config: Path) -> list[Path]:
    """Returns the trusted folders without links; refuses a file that others may have written."""
    try:
        mode = config.stat().st_mode
    except OSError:
        return []
    if _foreign_path(config.parent, config) or mode & stat.S_IWOTH:
        raise SpecError(
            f"{config} is not used, since another user can write to it",
            f"Make it yours: chown, and chmod o-w {config}",
        )
    content = read_toml(config)
    entries = content.pop("trusted", [])
    if content or not isinstance(entries, list) or not all(isinstance(e, str) for e in entries):
        raise SpecError(
            f"{config} is not recognised", 'It may have the line trusted = ["/a/folder", "~/b"]'
        )
    folders = [Path(os.path.expanduser(entry)) for entry in entries]  # noqa: PTH111
    for folder in folders:
        if not folder.is_absolute():
            raise SpecError(
                f"{config}: the trusted folder {str(folder)!r} is relative",
                "Write a path that starts with / or ~",
            )
    return [Path(os.path.realpath(folder)) for folder in folders]


def _foreign_path(*paths: Path) -> Path | None:
    """Returns the first path that belongs neither to this user nor to root, if any."""
    if not hasattr(os, "geteuid"):  # on Windows
        return None
    own = {0, os.geteuid()}
    return next((path for path in paths if not _owners(path) <= own), None)


def _owners(path: Path) -> set[int]:
    """Returns the users that a path and what it links to belong to."""
    return {path.stat().st_uid, path.lstat().st_uid}
