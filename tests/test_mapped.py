"""Pages of mapped files: given back, and never a value changed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from losscli.checkpoint import read
from losscli.mapped import let_go

VALUES = 3 << 20


def resident(part: str) -> int:
    """MiB of this process's memory that are pages of files, or are not."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith(part))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told of elsewhere")
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_pages_of_a_file_are_given_back_and_read_again(suffix: str, tmp_path: Path) -> None:
    values = torch.arange(VALUES, dtype=torch.float32)
    file = tmp_path / f"c.{suffix}"
    if suffix == "pt":
        torch.save({"w": values, "v": values[: 1 << 18] + 1}, file)
    else:
        save_file({"w": values, "v": values[: 1 << 18] + 1}, file)
    weights = next(iter(read(str(file)).candidates.values()))
    before = resident("RssFile")
    assert torch.equal(weights["w"], values)
    assert resident("RssFile") >= before + 8
    let_go(*weights.values())
    assert resident("RssFile") <= before + 2
    assert torch.equal(weights["w"], values)
    assert torch.equal(weights["v"], values[: 1 << 18] + 1)


def test_memory_that_is_no_file_is_left_alone() -> None:
    values = torch.arange(VALUES, dtype=torch.float32)
    held = values.clone()
    parts = held[::2], held[: VALUES // 2], held.view(-1, 2).T, torch.ones(3)
    let_go(held, *parts)
    assert torch.equal(held, values)
