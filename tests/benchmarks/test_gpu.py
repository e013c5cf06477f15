"""The script that checks a GPU runs from start to end without one, whatever a part does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from losscli.evaluation import gpu_thresholds
from tests.benchmarks import gpu
from tests.evaluation.strategies.test_batch_graphs import Double as Graphs
from tests.gpu_double import gpu_double


@pytest.mark.stress
def test_a_tiny_run_takes_all_parts_and_says_what_needs_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--tiny", "--out", str(out)]
    ended = subprocess.run(command, check=True, cwd=gpu.ROOT, capture_output=True, text=True)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found.keys() == {"machine", *gpu.PARTS}
    for name in gpu.PARTS:
        assert "error" not in found[name]
        assert found[name]["rows"]
        assert f"\n{name}  " in "\n" + ended.stdout
    differences = found["commands"]["rows"]["interpolate"]["difference"]
    assert differences["loss"] < 1e-5
    printed = {line.split()[0] for line in ended.stdout.splitlines()}
    for part, threshold in (
        ("sharing", "WORTH_SHARING"), ("sharing", "WORTH_SHARING_ON_TENSOR_CORES"),
        ("stacked", "STACKED_BYTES"), ("graphs", "LEAST_REPLAYS"),
    ):  # fmt: skip
        rows = [row for name, row in found[part]["rows"].items() if name.split()[0] == threshold]
        assert {row["now"] for row in rows if row != gpu.NEEDS_GPU} == {
            getattr(gpu_thresholds, threshold)
        }
        assert threshold in printed
    if not torch.cuda.is_available():
        only_gpu = {
            name
            for name in gpu.PARTS
            if set(map(str, found[name]["rows"].values())) == {gpu.NEEDS_GPU}
        }
        assert only_gpu == {"tests", "synchronisations", "memory"}


class Capture:
    """Records graphs of the double."""

    def __init__(self, device: torch.device) -> None:
        self.record = Graphs().record


@pytest.mark.stress
def test_the_parts_that_need_a_gpu_run_on_a_double(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=1 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    for name in ("set_sync_debug_mode", "set_per_process_memory_fraction"):
        monkeypatch.setattr(torch.cuda, name, lambda _: None)
    monkeypatch.setattr(gpu, "CudaCapture", Capture)
    monkeypatch.setattr(
        "losscli.evaluation.objective.graph_capture",
        lambda device: Capture(device) if device.type == "cuda" else None,
    )
    with gpu_double():
        parts = (gpu.synchronisations, gpu.strategies, gpu.sharing, gpu.graphs, gpu.memory)
        found = {part.__name__: part(gpu.TINY) for part in parts}
    assert gpu.NEEDS_GPU not in str(found)
    assert {row["strategy"] for name, row in found["strategies"].items() if "mlp" in name} == {
        "stacked"
    }
    assert {row["graph"] for name, row in found["strategies"].items() if "cnn" in name} == {"used"}
    rows = {name: row for name, row in found["graphs"].items() if name != "LEAST_REPLAYS"}
    assert all(row["same_bits"] for row in rows.values())
    assert found["memory"]["15 %"]["difference"] == 0


def test_the_time_limits_add_up_to_eight_minutes_at_most() -> None:
    assert sum(limit for _, limit in gpu.PARTS.values()) <= 8 * 60


def test_a_part_that_takes_too_long_is_recorded() -> None:
    found = gpu.run_part("peak", 0.05, tiny=True)
    assert found == {"seconds": 0.05, "error": "took more than 0.05 s"}


def test_a_part_that_fails_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "python"
    failing.write_text('#!/bin/sh\necho "cannot run $4" >&2\nexit 2\n')
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    found = gpu.run_part("nothing", 60, tiny=True)
    assert found["error"] == "cannot run nothing"
    assert "rows" not in found


def test_differences_are_relative_to_the_largest_number_of_a_column() -> None:
    one = [{"name": "a", "loss": "1", "slope": ""}, {"name": "b", "loss": "4", "slope": "2"}]
    other = [{"name": "a", "loss": "1.5", "slope": ""}, {"name": "b", "loss": "5", "slope": "2"}]
    assert gpu._differences(one, other) == {"loss": 0.2, "slope": 0.0}
    with pytest.raises(ValueError, match="other rows"):
        gpu._differences(one, other[:1])
