"""The device and the types of the computation."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import losscli
from losscli.errors import DeviceError, UsageError
from losscli.evaluation import device
from losscli.evaluation.device import choose_device, float32_precision, half_precision_note
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


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_tensor_cores_multiply_half_precision_and_tf32_on_cuda(
    kind: str, tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    types = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    found = [device.uses_tensor_cores(torch.device(kind), dtype) for dtype in types]
    assert found == ([False, tf32, True, True] if kind == "cuda" else [False] * 4)


@pytest.mark.parametrize("writes", [False, True])
def test_no_setting_of_the_precision_warns(writes: bool) -> None:
    def old() -> str:
        warnings.warn("Please use the new API settings to control TF32 behavior", stacklevel=1)
        return "ieee"

    setting = device._Float32Setting(old, lambda _: old(), "ieee")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if writes:
            setting.write("ieee")
        else:
            assert setting.read() == "ieee"


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="an older PyTorch"
)
def test_no_part_of_a_run_changes_the_precision_of_float32() -> None:
    seen: set[str] = set()

    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            seen.add(f"{_states()}")
            outputs: Tensor = self.head(self.rnn(x)[0][:, -1])
            return outputs

    data = {"x": (torch.rand(4, 3, 2), torch.arange(4) % 2)}
    files = [Recording().state_dict() for _ in range(2)]
    before, exact = f"{_states()}", f"{['ieee'] * 6}"
    losscli.interpolate(*files, model=Recording(), data=data, points=3, derivatives=True)
    losscli.check(files[0], model=Recording(), data=data)
    # While a run is planned the model is only tried.
    assert exact in seen <= {before, exact}
    assert f"{_states()}" == before


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


@pytest.mark.parametrize(
    ("gpus", "name", "local", "index"),
    [
        (8, "cuda", 3, 3),
        (8, "auto", 3, 3),
        # A process that sees only its own GPU, as with --gpus-per-task=1.
        (1, "cuda", 3, 0),
        (1, "auto", 1, 0),
        (2, "cuda", 3, 1),
        (8, "cuda:5", 3, 5),
        (8, "cuda:5", None, 5),
        (8, "cuda", None, None),
        (8, "auto", None, None),
    ],
)
def test_each_rank_of_a_machine_takes_a_gpu_that_it_sees_and_makes_it_current(
    monkeypatch: pytest.MonkeyPatch, gpus: int, name: str, local: int | None, index: int | None
) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: None)
        chosen = choose_device(name, "float32", local)
    assert (chosen.type, chosen.index) == ("cuda", index)
    assert current == ([] if index is None else [chosen])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("local", [None, 0, 3])
def test_a_rank_without_a_gpu_is_refused(local: int | None) -> None:
    with pytest.raises(DeviceError, match="'cuda' with float32 is not available"):
        choose_device("cuda", "float32", local)


@pytest.mark.parametrize("name", ["foo", "", "cuda:x", "cuda:", "xpu", "meta", "CPU", "cpu "])
def test_an_unknown_name_is_a_wrong_option_and_lists_the_devices_of_the_machine(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError) as caught:
        choose_device(name, "float32")
    assert caught.value.exit_code == 2
    cure = "Choose one of auto, cpu, cuda:0, cuda:1"
    assert str(caught.value) == f"the device {name!r} is not known. {cure}"


def _states() -> list[object]:
    matmul, cudnn, mkldnn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    owners = (matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    return [getattr(owner, "fp32_precision", None) for owner in owners]


def _lower_everywhere() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True


def _mix_both_interfaces() -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("changes", [lambda: None, _lower_everywhere, _mix_both_interfaces])
def test_precision_of_float32_is_that_of_the_run_and_then_restored(
    changes: Callable[[], None], tf32: bool
) -> None:
    newer = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    if changes is _mix_both_interfaces and not newer:
        pytest.skip("this PyTorch has one interface")
    default = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, _states()
    try:
        changes()
        before = _states()
        with float32_precision(tf32=tf32):
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
            assert torch.backends.cuda.matmul.allow_tf32 is tf32
            assert torch.backends.cudnn.allow_tf32 is tf32
            if newer:
                assert _states() == ["tf32" if tf32 else "ieee"] * 3 + ["ieee"] * 3
        assert _states() == before
    finally:
        torch.set_float32_matmul_precision(default[0])
        torch.backends.cudnn.allow_tf32 = default[1]
        if newer:
            owners = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
            owners[0].fp32_precision, owners[1].fp32_precision = default[2][0], default[2][3]
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == default[:2]


@pytest.mark.usefixtures("folder")
def test_user_code_that_lowers_the_precision_of_float32_does_not_change_losses(
    losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    original = torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return original(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    try:
        _lower_everywhere()
        done = losscli("interpolate", "a.pt", "b.pt", "--points", 3, "-o", "-")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert done.status == 0
    assert set(seen) == {"highest"}
