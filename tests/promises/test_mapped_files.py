"""Memory-mapped files that are truncated while they are read."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from losscli import cli
from losscli.checkpoint import read
from tests.forks import ended, fork


@pytest.mark.skipif(sys.platform != "linux", reason="the signal is handled there")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_truncated_file_is_reported_in_one_line_without_a_bus_error(
    suffix: str, cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other such signal ends a process as it ever did."""
    values = torch.arange(3 << 17, dtype=torch.float32)
    file, told = tmp_path / f"c d.{suffix}", tmp_path / "told"
    (torch.save if suffix == "pt" else save_file)({"w": values}, file)

    def work(*_: object) -> int:
        weights = next(iter(read(str(file)).candidates.values()))
        if not cut:
            os.kill(os.getpid(), signal.SIGBUS)
        os.truncate(file, 5000)
        return int(weights["w"].sum())

    child = fork()
    if not child:
        try:
            os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT), 2)
            monkeypatch.setattr(cli, "run", work)
            monkeypatch.setattr("sys.stderr", os.fdopen(2, "w"))
            cli.main([])
        finally:
            os._exit(99)
    status = ended(child)
    if cut:
        assert status == 1
        assert told.read_text() == (
            f"losscli: {file} was truncated while losscli read it. "
            "Run again when no program writes to it\n"
        )
    else:
        assert status == -signal.SIGBUS
