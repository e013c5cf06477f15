"""Batches are copied to a device while it computes, and no copy is read or overwritten too early.

The double of a copy stream makes each copy when the device waits for it, so that a batch that is
yielded without a wait holds no data; and a buffer must not change before the host has waited.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from losscli.data import DataSet, Split, realise, transferred
from losscli.data.nests import Build, Ragged
from losscli.evaluation.losses.built_in import LOSSES
from losscli.evaluation.objective import Objective
from losscli.models import MLP

CPU, META = torch.device("cpu"), torch.device("meta")


class LateCopies:
    """Copies within the CPU, each only when the device waits for it.

    Attributes:
        sources: What each buffer must hold until the host has waited for its copy.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.copies: list[tuple[Split, Split]] = []
        self.sources: dict[int, Split] = {}
        self.allocated = 0

    def pinned(self, nbytes: int) -> Tensor:
        self.allocated += 1
        return torch.zeros(nbytes, dtype=torch.uint8)

    def copy(self, batch: Split) -> tuple[Split, int]:
        self._check_sources()
        late = batch.map(torch.ones_like)
        self.copies.append((batch, late))
        self.sources[len(self.copies) - 1] = batch.map(Tensor.clone)
        self.log.append(f"copy {len(self.copies) - 1}")
        return late, len(self.copies) - 1

    def wait_on_host(self, event: int) -> None:
        self.log.append(f"host {event}")
        self._check_sources()
        del self.sources[event]

    def wait_on_device(self, event: int, batch: Split) -> None:
        assert batch is self.copies[event][1]
        self.log.append(f"device {event}")
        source, late = self.copies[event]
        late.inputs.copy_(source.inputs)
        late.targets.copy_(source.targets)

    def _check_sources(self) -> None:
        for event, expected in self.sources.items():
            source, _ = self.copies[event]
            assert torch.equal(source.inputs, expected.inputs)
            assert torch.equal(source.targets, expected.targets)


def batches_of(split: Split, size: int, log: list[str]) -> Iterator[Split]:
    for number, batch in enumerate(split.batches(size)):
        log.append(f"decode {number}")
        yield batch


def example_split(dtype: torch.dtype = torch.float32) -> Split:
    inputs = torch.randn(17, 3, 4, 5, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    return Split(inputs.to(memory_format=torch.channels_last), torch.arange(17) % 3)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.uint8, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("size", [1, 5, 17, 20])
def test_batches_arrive_whole_and_in_order(dtype: torch.dtype, size: int) -> None:
    split, stream = example_split(dtype), LateCopies()
    # META stands for the device, since a batch that is there already is not copied.
    found = []
    for batch in transferred(split.batches(size), META, stream):
        found.append(batch.map(Tensor.clone))
        # As in the stored split, where kernels may depend on the layout.
        assert batch.inputs.stride() == split.take(slice(0, len(batch))).inputs.stride()
    assert torch.equal(torch.cat([batch.inputs for batch in found]), split.inputs)
    assert torch.equal(torch.cat([batch.targets for batch in found]), split.targets)
    # Two buffers of two tensors each, however many batches there are.
    assert stream.allocated == 2 * min(2, len(found))


def test_the_next_copy_has_begun_when_a_batch_is_used() -> None:
    stream = LateCopies()
    for number, _ in enumerate(
        transferred(batches_of(example_split(), 4, stream.log), META, stream)
    ):
        stream.log.append(f"use {number}")
    assert stream.log == [
        "decode 0", "copy 0",
        "decode 1", "copy 1", "device 0", "use 0",
        "decode 2", "host 0", "copy 2", "device 1", "use 1",
        "decode 3", "host 1", "copy 3", "device 2", "use 2",
        "decode 4", "host 2", "copy 4", "device 3", "use 3",
        "device 4", "use 4",
    ]  # fmt: skip


def test_a_buffer_grows_for_a_larger_batch() -> None:
    split, stream = example_split(), LateCopies()
    sizes = [split.take(slice(0, n)) for n in (2, 3, 9, 1)]
    found = [b.map(Tensor.clone) for b in transferred(sizes, META, stream)]
    for batch, expected in zip(found, sizes, strict=True):
        assert torch.equal(batch.inputs, expected.inputs)
    assert stream.allocated == 6


def test_batches_on_the_device_are_not_copied() -> None:
    split, stream = example_split(), LateCopies()
    batches = list(split.batches(5))
    assert all(x is y for x, y in zip(transferred(batches, CPU, stream), batches, strict=True))
    assert all(x is y for x, y in zip(transferred(batches, CPU, None), batches, strict=True))
    assert not stream.log


def test_columns_that_are_no_tensors_are_not_copied_by_the_stream() -> None:
    # Their tensors are made when a batch is used, when its buffers may hold those of another.
    rows = [torch.full((n,), float(n)) for n in (1, 2, 3, 4, 5)]
    split, stream = Split(Ragged(rows, Build(list)), torch.arange(5)), LateCopies()
    batches = list(transferred(split.batches(1), META, stream))
    assert [b.targets.device.type for b in batches] == ["meta"] * 5
    assert [len(t) for b in batches for t in realise(b.inputs)] == [1, 2, 3, 4, 5]
    assert not stream.log


def test_an_objective_copies_its_batches_by_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split(torch.rand(17, 6), torch.arange(17) % 3)
    data = DataSet({"all": split})
    objective = Objective(MLP("6-5-3"), LOSSES["cross_entropy"], {}, data, device=CPU, batch_size=5)
    weights = objective.model.state_dict()
    expected = objective.plain(weights)["all"].losses
    stream = LateCopies()
    monkeypatch.setattr("losscli.evaluation.objective.copy_stream", lambda _: stream)
    monkeypatch.setattr(Split, "is_on", lambda *_: False)
    assert torch.equal(objective.plain(weights)["all"].losses, expected)
    assert len(stream.copies) == 4


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_gets_batches_whole_and_in_order() -> None:
    from losscli.data import copy_stream

    device, split = torch.device("cuda"), example_split()
    found = [
        (batch.inputs * 2).cpu()
        for batch in transferred(split.batches(3), device, copy_stream(device))
    ]
    assert torch.equal(torch.cat(found), split.inputs * 2)
