"""The device and the types of the computation."""

from __future__ import annotations

import pytest
import torch

from losscli.evaluation import device
from losscli.evaluation.device import half_precision_note
from tests.conftest import Losscli

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ratio", "is_slow"), [(0.5, False), (1.0, False), (2.0, True)])
def test_half_precision_gets_a_note_where_its_products_are_slower(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, ratio: float, is_slow: bool
) -> None:
    monkeypatch.setattr(device, "_product_seconds", lambda t: 1e-3 * (ratio if t == dtype else 1.0))
    note = half_precision_note(CPU, dtype)
    assert bool(note) is is_slow
    assert not is_slow or f"{dtype} are slower".removeprefix("torch.") in note


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("cpu", torch.float32), ("cpu", torch.float64), ("cuda", torch.bfloat16)],
)
def test_other_types_and_devices_are_not_measured(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(device, "_product_seconds", lambda _: pytest.fail("measured"))
    assert half_precision_note(torch.device(kind), dtype) == ""


def test_the_products_of_every_type_are_measured() -> None:
    assert all(device._product_seconds(t) > 0 for t in (torch.float32, torch.bfloat16))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_a_run_in_slow_half_precision_begins_with_the_note(
    losscli: Losscli, monkeypatch: pytest.MonkeyPatch, ratio: float
) -> None:
    monkeypatch.setattr(device, "_product_seconds", lambda t: ratio if t == torch.bfloat16 else 1.0)
    done = losscli("interpolate", "a.pt", "b.pt", "--points", 3, "--dtype", "bfloat16", "-o", "-")
    note = "note: matrix products in bfloat16 are slower than in float32 on this processor: "
    assert done.stderr.startswith(note) is (ratio > 1)
    # It depends on the machine, and results do not.
    assert done.status == 0
    assert "slower" not in done.stdout
