"""Data larger than memory: the same numbers as from memory, and never more than a few batches."""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import re
import resource
import select
import signal
import socket
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import losscli
from losscli.data import Batching, DataSet, Split, from_object, leaves
from losscli.data import iterable as flow_
from losscli.data import objects as objects_
from losscli.data import stream as stream_
from losscli.data.iterable import IterableStream, Source
from losscli.data.stream import Stream
from losscli.errors import DataError, LossError
from losscli.evaluation.derivatives.sweep import slopes
from losscli.evaluation.hessian.curvature import Curvature
from losscli.evaluation.losses.built_in import cross_entropy
from losscli.evaluation.losses.metrics import accuracy
from losscli.evaluation.objective import Objective
from losscli.evaluation.sampling import Estimate, evaluate_until_precise
from losscli.evaluation.sweep import sweep, sweep_plain
from losscli.evaluation.task_checks import check_task
from losscli.models import MLP
from losscli.weight_space.slices import Line
from tests import oracle
from tests.cases import in_turn, sample
from tests.conftest import Losscli
from tests.forks import PATIENCE, child, close_inherited, ended

N = 37
ALPHAS = [(-0.5,), (0.0,), (0.3,), (1.0,), (1.7,)]


def example(i: int) -> tuple[Tensor, int]:
    generator = torch.Generator().manual_seed(i)
    return torch.rand(6, generator=generator), i % 3


class Rows(Dataset[Any]):
    """Examples that are made when they are asked for."""

    def __init__(self, row: Callable[[int], Any] = example, count: int = N) -> None:
        self.row, self.count = row, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        return self.row(i)


class Coming(IterableDataset[Any]):
    """Examples that come one after the other; each worker gives its share."""

    def __init__(self, row: Callable[[int], Any] = example, count: int = N) -> None:
        self.row, self.count = row, count

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        share = range(self.count) if info is None else range(info.id, self.count, info.num_workers)
        return (self.row(i) for i in share)


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets data have so many bytes of memory; workers are worth it for any number of examples."""

    def set_budget(budget: int) -> None:
        monkeypatch.setattr(objects_, "host_budget", lambda: budget)
        monkeypatch.setattr(stream_, "host_budget", lambda: 1 << 30)

    return set_budget


def whole(split: Any, size: int = 8, order: Tensor | None = None) -> Split:
    batches = list(split.batches(size, order))
    columns = zip(*([*leaves(b.inputs), b.targets] for b in batches), strict=True)
    *inputs, targets = (torch.cat(column) for column in columns)
    return Split(inputs[0] if len(inputs) == 1 else tuple(inputs), targets)


IN_MEMORY = Split(
    torch.stack([example(i)[0] for i in range(N)]), torch.tensor([i % 3 for i in range(N)])
)


def four(i: int) -> tuple[Any, Tensor]:
    part = IN_MEMORY.take(slice(4 * i, 4 * i + 4))
    return part.inputs, part.targets


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Rows(), **options)


# Every way to give the same examples in the same order.
FORMS: dict[str, Callable[[], Any]] = {
    "a data set": Rows,
    "a loader": partial(loader, batch_size=5),
    "a loader with workers": partial(loader, batch_size=5, num_workers=2),
    "a loader with batches of a sampler": lambda: DataLoader(
        Rows(), batch_sampler=BatchSampler(SequentialSampler(Rows()), 4, drop_last=False)
    ),
    "a loader of whole batches": lambda: DataLoader(
        Rows(
            lambda i: tuple(t[4 * i : 4 * i + 4] for t in (IN_MEMORY.inputs, IN_MEMORY.targets)), 10
        ),
        batch_size=None,
    ),
    "a part of a data set": lambda: Subset(Rows(lambda i: example(i - 3), 2 * N), range(3, N + 3)),
    "an iterable": Coming,
    "a loader of an iterable": lambda: DataLoader(Coming(), batch_size=5),
    "a loader of an iterable with workers": lambda: DataLoader(
        Coming(), batch_size=1, num_workers=2
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_streamed_examples_are_those_in_memory(form: str, cramped: Callable[[int], None]) -> None:
    cramped(1 << 20)
    held = from_object(FORMS[form](), "here").splits["data"]
    assert isinstance(held, Split)
    cramped(100)
    streamed = from_object(FORMS[form](), "here").splits["data"]
    assert isinstance(streamed, Stream | IterableStream)
    assert streamed.nbytes == 0
    assert len(streamed) == len(held) == N
    # Workers: started once, for batches of any size, abandoned passes and parts; those of an
    # iterable are started for each pass.
    few = form == "a loader of an iterable with workers"
    next(streamed.batches(3))
    sizes = (8,) if few else (1, 8, 1000)
    for found in (held, *(whole(streamed, size) for size in sizes), streamed.first(1000)):
        assert torch.equal(found.inputs, IN_MEMORY.inputs)  # type: ignore[arg-type]
        assert torch.equal(found.targets, IN_MEMORY.targets)
    generator = torch.Generator().manual_seed(1)
    order = streamed.order(generator)
    assert sorted(order.tolist()) == list(range(N))
    part = whole(streamed, 4, order[5:20])
    assert torch.equal(part.inputs, IN_MEMORY.inputs[order[5:20]])  # type: ignore[index, arg-type]
    if few:
        return
    part = whole(streamed.take(order[5:20]), 4)
    assert torch.equal(part.inputs, IN_MEMORY.inputs[order[5:20]])  # type: ignore[index, arg-type]
    assert torch.equal(whole(streamed.take(slice(30, None))).targets, IN_MEMORY.targets[30:])
    for limit in (4, N, 100):
        some = streamed.draw(limit, torch.Generator().manual_seed(0))
        assert len(some) == len(whole(some)) == min(limit, N)


def model_and_line() -> tuple[dict[str, Tensor], Line]:
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ends.append({n: t.clone() for n, t in MLP("6-5-3").state_dict().items()})
    return ends[0], Line(*ends)


def objective_of(data: DataSet, batch_size: int) -> Objective:
    return Objective(
        MLP("6-5-3"),
        cross_entropy,
        {"accuracy": accuracy},
        data,
        device=torch.device("cpu"),
        dtype=torch.float64,
        batch_size=batch_size,
    )


Derivatives = tuple[Tensor, Tensor, Tensor, Tensor]


def derivatives(objective: Objective, split: Any) -> Derivatives:
    """Slopes and curvature along the line, and gradient and Hessian-vector product at A."""
    a, line = model_and_line()
    along = slopes(objective, line, [0.2, 0.8])["data"]
    with Curvature(objective, a, list(a), split) as curvature:
        vector = torch.linspace(-1, 1, curvature.size, dtype=torch.float64)
        return along.slope, along.curvature, curvature.gradient(), curvature.product(vector)


@cache
def from_memory(batch_size: int) -> tuple[Any, Derivatives]:
    a, line = model_and_line()
    held = objective_of(DataSet({"data": IN_MEMORY}), batch_size)
    check_task(held, a)
    return sweep(held, line, ALPHAS)["data"], derivatives(held, IN_MEMORY)


@pytest.mark.parametrize(
    ("form", "batch_size"),
    in_turn(["a data set", "a loader with workers", "an iterable"], 4, 1000, 16),
)
def test_losses_slopes_and_curvature_are_those_from_memory(
    form: str, batch_size: int, cramped: Callable[[int], None]
) -> None:
    a, line = model_and_line()
    cramped(100)
    data = from_object(FORMS[form](), "here")
    objective = objective_of(data, batch_size)
    check_task(objective, a)
    found = sweep(objective, line, ALPHAS)["data"]
    states = [{n: torch.lerp(line.a[n], line.b[n], x) for n in a} for (x,) in ALPHAS]
    for row, state in zip(found.losses, states, strict=True):
        expected = oracle.losses(
            lambda: MLP("6-5-3"), state, IN_MEMORY.inputs, IN_MEMORY.targets, cross_entropy
        )
        np.testing.assert_allclose(row, expected, rtol=1e-6)
    truth, expected = from_memory(batch_size)
    torch.testing.assert_close(found.losses, truth.losses, rtol=1e-13, atol=0)
    assert torch.equal(found.metrics["accuracy"], truth.metrics["accuracy"])
    streamed = derivatives(objective, objective.splits["data"])
    torch.testing.assert_close(streamed, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("form", ["a data set", "an iterable"])
def test_blocks_of_a_sample_are_of_the_stream(
    form: str, cramped: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("losscli.evaluation.sampling._FIRST_BLOCK", 8)
    cramped(100)
    a, _ = model_and_line()
    objective = objective_of(from_object(FORMS[form](), "here"), 5)

    def evaluate(splits: Any, _: object = None) -> dict[str, Estimate]:
        (found,) = sweep_plain(objective, [a], splits=splits)
        return {name: Estimate.of_evaluation(e) for name, e in found.items()}

    (found,) = evaluate_until_precise(objective.splits, 1e-9, 0, evaluate).values()
    (truth,) = evaluate(objective.splits).values()
    assert found.examples == N
    np.testing.assert_allclose(found.mean, truth.mean, rtol=1e-12)
    np.testing.assert_allclose(found.stderr, truth.stderr, rtol=1e-12)


# Memory


MAKERS: dict[str, Callable[[Callable[[int], Any], int], Any]] = {
    "a data set": Rows,
    "an iterable": Coming,
    "a loader": lambda row, n: DataLoader(Rows(row, n), 16),
    "a loader of an iterable": lambda row, n: DataLoader(Coming(row, n), 16),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_no_more_than_a_few_batches_are_ever_in_memory(
    make: Callable[[Callable[[int], Any], int], Any], cramped: Callable[[int], None]
) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def row(i: int) -> tuple[Tensor, int]:
        nonlocal most
        inputs, target = example(i)
        alive.add(inputs)
        most = max(most, len(alive))
        return inputs, target

    cramped(64 * 32)
    a, line = model_and_line()
    objective = objective_of(from_object(make(row, 300), "here"), 16)
    assert not isinstance(objective.splits["data"], Split)
    seen = weakref.WeakSet[Tensor]()
    batches = 0
    prepare = DataSet.prepare

    def watch(self: DataSet, inputs: Any, dtype: torch.dtype) -> Any:
        nonlocal batches
        seen.add(inputs)
        batches = max(batches, len(seen))
        return prepare(self, inputs, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataSet, "prepare", watch)
        check_task(objective, a)
        sweep(objective, line, ALPHAS, chunk=2)
    # What is decoded before it is known not to fit, and one batch.
    assert most <= 128
    assert batches <= 4


def test_splits_that_fit_are_decoded_once_in_their_order(
    cramped: Callable[[int], None],
) -> None:
    decoded: list[int] = []

    def row(i: int) -> Any:
        decoded.append(i)
        return example(i)

    # 32 bytes an example.
    cramped(32 * 60)
    data = from_object({"a": Rows(row, 40), "b": Rows(row, 30), "c": Rows(row, 20)}, "here")
    assert {n: type(s) for n, s in data.splits.items()} == {"a": Split, "b": Stream, "c": Split}
    decoded.clear()
    for _ in range(3):
        for split in data.splits.values():
            whole(split)
    assert len(decoded) == 3 * 30
    # A limit and the choice of splits come first: nothing else is decoded.
    decoded.clear()
    some = from_object({"a": Rows(row, 1 << 20), "b": Rows(row, 9)}, "here", limit=5, splits=["b"])
    assert {n: (type(s), len(s)) for n, s in some.splits.items()} == {"b": (Split, 5)}
    assert len(decoded) < 20


def test_tensors_that_are_in_memory_are_not_decoded(cramped: Callable[[int], None]) -> None:
    cramped(10)
    tensors = TensorDataset(IN_MEMORY.inputs, IN_MEMORY.targets)  # type: ignore[arg-type]
    for given in (tensors, DataLoader(tensors, 5)):
        split = from_object(given, "here").splits["data"]
        assert isinstance(split, Split)
        assert split.inputs.data_ptr() == IN_MEMORY.inputs.data_ptr()  # type: ignore[union-attr]
    some = from_object(DataLoader(tensors, 5, sampler=[4, 2]), "here").splits["data"]
    assert whole(some).targets.tolist() == [1, 2]


def test_a_split_that_does_not_fit_moves_to_the_device_by_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, _ = model_and_line()
    data = DataSet({"a": IN_MEMORY, "b": IN_MEMORY})
    moved: list[int] = []
    to = Split.to

    def move(self: Split, device: torch.device) -> Split:
        moved.append(len(self))
        return to(self, device)

    monkeypatch.setattr("losscli.evaluation.objective.device_budget", lambda device: 1500)
    monkeypatch.setattr(Split, "is_on", lambda self, device: False)
    monkeypatch.setattr(Split, "to", move)
    objective = objective_of(data, 16)
    assert moved == [N]
    moved.clear()
    found = sweep_plain(objective, [a])[0]
    assert moved == [16, 16, 5] * 2
    assert torch.equal(found["a"].losses, found["b"].losses)


def test_a_small_first_example_does_not_hide_the_size_of_others(
    cramped: Callable[[int], None],
) -> None:
    def collate(rows: list[Any]) -> Any:
        longest = max(len(x) for x, _ in rows)
        inputs = torch.stack([torch.nn.functional.pad(x, (0, longest - len(x))) for x, _ in rows])
        return inputs, torch.tensor([y for _, y in rows])

    dataset = Rows(lambda i: (torch.ones(1 if i == 0 else 50), 0), 1000)
    cramped(1000 * 20)
    split = from_object(DataLoader(dataset, 8, collate_fn=collate), "here").splits["data"]
    assert isinstance(split, Stream)


def test_batches_padded_to_different_lengths_stay_batches(cramped: Callable[[int], None]) -> None:
    def collate(rows: list[int]) -> Any:
        lengths = [2 + (i % 5 if i < 512 else 0) for i in rows]
        longest = max(lengths)
        mask = torch.tensor([[j < length for j in range(longest)] for length in lengths])
        ids = torch.arange(longest).repeat(len(rows), 1) * mask
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~mask, -100)}

    cramped(1 << 30)
    make = partial(DataLoader, Rows(lambda i: i, 600), batch_size=4, collate_fn=collate)
    data = from_object(make(), "here")
    split = data.splits["data"]
    assert data.task == "language"
    assert isinstance(split, Stream)
    shapes = {batch.targets.shape for batch in split.batches(2)}
    assert len(shapes) > 1
    for batch in split.batches(3):
        assert isinstance(batch.inputs, dict)
        assert list(batch.inputs) == ["input_ids", "attention_mask"]
        assert batch.inputs["attention_mask"].dtype == torch.bool
        assert batch.inputs["input_ids"].shape == batch.targets.shape
    # From an iterable the batches are cut anew, and so have to be joined.
    coming = DataLoader(Coming(lambda i: i, 600), batch_size=4, collate_fn=collate)
    with pytest.raises(DataError, match=r"cannot be combined: .*Pad the examples to one size"):
        from_object(coming, "here")


# Order, randomness and samplers


class Drawn(Dataset[Any]):
    """Examples that are augmented at random, by the generators that people draw from."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        drawn = random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002
        return torch.tensor(drawn), i % 3


def test_random_draws_are_the_same_in_each_pass_and_worker(
    cramped: Callable[[int], None],
) -> None:
    cramped(1 << 20)
    held = from_object(Drawn(), "here", seed=3).splits["data"]
    assert isinstance(held, Split)
    cramped(100)
    before = random.getstate(), torch.get_rng_state()
    for workers in (0, 2):
        given = DataLoader(Drawn(), 5, num_workers=workers)
        streamed = from_object(given, "here", seed=3).splits["data"]
        for size in (4, 11):
            assert torch.equal(whole(streamed, size).inputs, held.inputs)  # type: ignore[arg-type]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    other = from_object(Drawn(), "here", seed=4).splits["data"]
    assert not torch.equal(whole(other).inputs, held.inputs)  # type: ignore[arg-type]
    assert len(torch.unique(held.inputs)) == 3 * N  # type: ignore[arg-type]


def test_an_iterable_draws_the_same_in_each_pass(cramped: Callable[[int], None]) -> None:
    cramped(100)
    given = Coming(lambda i: (torch.rand(3) + random.random(), i % 3))
    split = from_object(given, "here").splits["data"]
    one = whole(split, 4)
    torch.rand(5)
    assert torch.equal(whole(split, 7).inputs, one.inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [Rows, Coming])
def test_data_that_is_another_in_each_pass_is_refused(
    make: Any, cramped: Callable[[int], None]
) -> None:
    generator = np.random.default_rng(0)
    cramped(100)

    def go_by() -> None:
        split = from_object(make(lambda i: (generator.random(4), i % 3)), "here").splits["data"]
        whole(split)

    with pytest.raises(DataError, match=r"differs each time it is decoded|gives other examples"):
        go_by()


@pytest.mark.parametrize("change", [-1, 1])
def test_an_iterable_that_gives_another_number_of_examples_is_refused(
    change: int, cramped: Callable[[int], None]
) -> None:
    cramped(100)
    given = Coming()
    split = from_object(given, "here").splits["data"]
    assert len(split) == N
    given.count += change
    with pytest.raises(DataError) as caught:
        whole(split)
    assert f"gives {N + change} examples in one pass and {N} in another" in str(caught.value)


def test_an_iterable_in_another_order_is_refused(cramped: Callable[[int], None]) -> None:
    cramped(100)
    given = Coming()
    split = from_object(given, "here").splits["data"]
    given.row = lambda i: example(N - 1 - i)
    with pytest.raises(DataError, match="gives other examples, or another order, in each pass"):
        whole(split)


SAMPLERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffled": lambda: DataLoader(Rows(), 5, shuffle=True),
    "a random sampler of some": lambda: DataLoader(
        Rows(), 5, sampler=RandomSampler(Rows(), replacement=True, num_samples=20)
    ),
    "a subset": lambda: DataLoader(Rows(), 5, sampler=SubsetRandomSampler([4, 30, 2, 2, 17])),
    "weights": lambda: DataLoader(Rows(), 5, sampler=WeightedRandomSampler([1.0] * N, 11)),
    "batches": lambda: DataLoader(
        Rows(), batch_sampler=BatchSampler(RandomSampler(Rows()), 4, drop_last=False)
    ),
    "batches by hand": lambda: DataLoader(Rows(), batch_sampler=[[3, 1], [4, 1, 5]]),
    "batches of a subset": lambda: DataLoader(
        Rows(), batch_sampler=BatchSampler(SubsetRandomSampler(range(11)), 4, drop_last=False)
    ),
    "batches of the first": lambda: DataLoader(
        Rows(), batch_sampler=BatchSampler(range(11), 4, drop_last=False)
    ),
    "the first": lambda: DataLoader(Rows(), 5, sampler=SequentialSampler(range(11))),
    "batches of tensors": lambda: DataLoader(
        TensorDataset(IN_MEMORY.inputs, IN_MEMORY.targets),  # type: ignore[arg-type]
        batch_sampler=BatchSampler(SubsetRandomSampler(range(11)), 4, drop_last=False),
    ),
}
# Whoever draws anew draws others.
DRAWN_ANEW = ("a random sampler of some", "weights")


@pytest.mark.parametrize("form", SAMPLERS)
def test_a_sampler_is_asked_once_for_all_passes(form: str, cramped: Callable[[int], None]) -> None:
    torch.manual_seed(0)
    expected = len([i for batch in SAMPLERS[form]().batch_sampler or () for i in batch])
    cramped(1 << 20)
    held = from_object(SAMPLERS[form](), "here", seed=1).splits["data"]
    assert isinstance(held, Split)
    cramped(10)
    streamed = from_object(SAMPLERS[form](), "here", seed=1).splits["data"]
    assert len(streamed) == len(held) == expected
    for size in (2, 7):
        assert torch.equal(whole(streamed, size).inputs, held.inputs)  # type: ignore[arg-type]
    rows = [tuple(row.tolist()) for row in held.inputs]  # type: ignore[union-attr]
    everything = [tuple(row.tolist()) for row in IN_MEMORY.inputs]  # type: ignore[union-attr]
    assert set(rows) <= set(everything)
    if form not in DRAWN_ANEW:
        iterated = torch.cat([inputs for inputs, _ in SAMPLERS[form]()])
        assert sorted(rows) == sorted(tuple(row.tolist()) for row in iterated)
    if form == "batches by hand":
        assert rows == [everything[i] for i in (3, 1, 4, 1, 5)]


def test_keys_that_are_not_positions_are_kept(cramped: Callable[[int], None]) -> None:
    class Named(Dataset[Any]):
        def __getitem__(self, name: str) -> Any:
            return example(len(name))

    cramped(10)
    given = DataLoader(Named(), 2, sampler=["a", "bbb", "cc"])
    split = from_object(given, "here").splits["data"]
    assert whole(split).targets.tolist() == [1, 0, 2]


# Workers


def test_workers_are_started_once_and_spawned_ones_too(cramped: Callable[[int], None]) -> None:
    cramped(10)
    # A data set of torch, so that the process need not import this module.
    rows = ConcatDataset([TensorDataset(IN_MEMORY.inputs, IN_MEMORY.targets)])  # type: ignore[arg-type]
    given = DataLoader(rows, 5, num_workers=1, multiprocessing_context="spawn")
    split = from_object(given, "here").splits["data"]
    assert isinstance(split, Stream)
    pids = set()
    for size in (5, 12):
        assert torch.equal(whole(split, size).targets, IN_MEMORY.targets)
        assert split._workers._loader is not None
        iterator: Any = split._workers._loader._iterator
        pids |= {worker.pid for worker in iterator._workers}
    assert len(pids) == 1
    # What cannot be sent is decoded here.
    unsent = DataLoader(
        Rows(lambda i: example(i + 0)), 5, num_workers=1, multiprocessing_context="spawn"
    )
    split = from_object(unsent, "here").splits["data"]
    assert torch.equal(whole(split).targets, IN_MEMORY.targets)
    assert split._workers._loader is None  # type: ignore[union-attr]


def test_workers_are_started_where_they_save_time(
    cramped: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cramped(100)
    split = from_object(Rows(lambda i: (torch.zeros(1 << 18), 0), 100), "here").splits["data"]
    assert isinstance(split, Stream)
    workers = split._workers
    monkeypatch.setattr(stream_, "_cores", lambda: 6)
    size = split.first(1).nbytes
    assert workers.useful_number(100, 4, size) == split.decoders == 6
    assert workers.useful_number(10, 4, size) == 0
    # One whose batches would fill the share of memory that is on its way is none.
    assert workers.useful_number(100, 30, size) == (1 << 30) // (16 * 30 * size)
    for limit, number in ((resource.RLIM_INFINITY, 6), (256, 6), (255, 0)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert workers.useful_number(100, 4, size) == number
    monkeypatch.setattr(stream_, "_open_files", lambda: 1024)
    monkeypatch.setattr(stream_, "_shared_bytes", lambda: 64 << 20)
    assert workers.useful_number(1000, 30, size) == 1
    workers.number = 40
    assert workers.useful_number(10, 1, size) == 31


@pytest.mark.parametrize("shared", [0, 1 << 60])
def test_batches_come_by_pipe_or_by_shared_memory(
    shared: int, cramped: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cramped(10)
    monkeypatch.setattr(stream_, "_shared_bytes", lambda: 1 << 60)
    monkeypatch.setattr(stream_, "_may_share", lambda size: bool(shared))

    def row(i: int) -> Any:
        inputs, target = example(i)
        return {"a": inputs.bfloat16(), "b": inputs > 0.5, "y": target}

    split = from_object(DataLoader(Rows(row), 5, num_workers=2), "here").splits["data"]
    batches = list(split.batches(5))
    assert all(batch.targets.is_shared() == bool(shared) for batch in batches)  # type: ignore[no-untyped-call]
    for i, batch in enumerate(batches):
        truth = IN_MEMORY.inputs[5 * i : 5 * i + 5]  # type: ignore[index]
        assert isinstance(batch.inputs, dict)
        assert torch.equal(batch.inputs["a"], truth.bfloat16())
        assert torch.equal(batch.inputs["b"], truth > 0.5)


def test_labels_out_of_range_are_found_before_the_loss_sees_them(
    cramped: Callable[[int], None],
) -> None:
    a, _ = model_and_line()
    cramped(10)
    for place, message in ((1, "the split 'data' has the label 7"), (20, "the data has the label")):
        row = partial(_mislabelled, place)
        objective = objective_of(from_object(Rows(row), "here"), 4)
        with pytest.raises(LossError, match=message):
            (check_task(objective, a), sweep_plain(objective, [a]))


def _mislabelled(place: int, i: int) -> Any:
    inputs, target = example(i)
    return inputs, 7 if i == place else target


class Listed(IterableDataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


class Endless(IterableDataset[Any]):
    """Never ends, and counts what it was asked for."""

    def __init__(self) -> None:
        self.given = 0

    def __iter__(self) -> Iterator[Any]:
        for i in itertools.count():
            self.given = max(self.given, i + 1)
            yield example(i)


def test_an_endless_stream_says_after_ten_seconds_that_it_needs_a_limit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # As far as the stream knows, a second passes from batch to batch of 64.
    for batches, counting in itertools.product(
        (9, 10, 30), (len, lambda flow: flow.decode(1 << 20), lambda flow: flow.decode(10))
    ):
        caplog.clear()
        rows = [example(0)] * (64 * batches)
        ticks = itertools.count()
        counting(IterableStream(Source(Listed(rows), "here", 0, lambda ticks=ticks: next(ticks))))
        assert [record.getMessage() for record in caplog.records] == (
            ["here: 576 examples in 10 s and no end yet. If it is endless, give --limit"]
            if batches >= 10
            else []
        )
        assert {record.levelname for record in caplog.records} <= {"WARNING"}


@pytest.mark.parametrize("limit", [1, 9, 64, 65, 100])
@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])
def test_a_limit_ends_an_endless_stream_and_no_further_example_is_asked_for(
    limit: int, streamed: bool, cramped: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    cramped(0 if streamed else 1 << 20)
    stream = Endless()
    data = from_object(stream, "here", limit=limit)
    split = data.splits["data"]
    assert isinstance(split, IterableStream) == streamed
    assert len(split) == limit
    found = whole(split)
    assert torch.equal(found.inputs, torch.stack([example(i)[0] for i in range(limit)]))  # type: ignore[arg-type]
    assert stream.given == limit
    assert split.digest
    assert stream.given == limit
    # Batches of the user's own come whole.
    stream = Endless()
    split = from_object(DataLoader(stream, batch_size=8), "here", limit=limit).splits["data"]
    assert len(whole(split)) == limit
    assert stream.given == -(-limit // 8) * 8
    assert not caplog.records


def test_the_warning_about_an_endless_stream_is_a_note_of_the_command(
    losscli: Losscli, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_, "_SLOW_SECONDS", 0.0)
    done = interpolate(losscli, "coming", "-o", "a")
    assert done.status == 0
    (line,) = [line for line in done.stderr.splitlines() if "no end yet" in line]
    assert line.endswith("no end yet. If it is endless, give --limit")
    assert line.startswith("note: data ")
    for words in (["--limit", 50], ["-q"]):
        done = interpolate(losscli, "coming", "-o", "b", "--force", *words)
        assert done.status == 0
        assert "no end yet" not in done.stderr


# The command line

CODE = """
import os, signal, time
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

class Rows(Dataset):
    def __init__(self, n=100, act=lambda i: None):
        self.n, self.act = n, act
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        self.act(i)
        g = torch.Generator().manual_seed(i)
        return torch.rand(6, generator=g), i % 3

def plain(): return {"train": Rows(), "test": Rows(20)}
def workers(): return {"train": DataLoader(Rows(), 16, num_workers=2), "test": Rows(20)}
def many(): return DataLoader(Rows(), 16, num_workers=40)
def bad(i):
    if i == 50: raise ValueError("no such\\nfile")
def failing(): return DataLoader(Rows(act=bad), 16, num_workers=2)
def die(i):
    if i == 50: os.kill(os.getpid(), signal.SIGKILL)
def dying(): return DataLoader(Rows(act=die), 16, num_workers=1)
def work(i):
    if torch.utils.data.get_worker_info() is not None:
        open(os.environ["WORKING"], "w").close()
    time.sleep(0.05)
def slow(): return DataLoader(Rows(100000, work), 16, num_workers=2)
class Coming(IterableDataset):
    count = 100
    def __iter__(self):
        yield from (Rows()[i] for i in range(self.count))
def coming(): return {"train": Coming()}
class Fewer(Coming):
    def __iter__(self):
        self.count -= 1
        return super().__iter__()
def fewer(): return DataLoader(Fewer(), 16)
def broken():
    class Broken(Coming):
        def __iter__(self):
            yield from (Rows()[i] for i in range(100))
            raise OSError("the\\nstream broke")
    return DataLoader(Broken(), 16, num_workers=1)
class Lost(Exception):
    def __init__(self, place, why):
        super().__init__(f"{why}\\n\\nat {place}\\nValueError: not this")
def chained():
    class Chained(Coming):
        def __iter__(self):
            yield from (Rows()[i] for i in range(40))
            try:
                raise ValueError("the first")
            except ValueError as error:
                raise Lost(40, "no more") from error
    return DataLoader(Chained(), 16, num_workers=2)
def crawling():
    class Slow(IterableDataset):
        def __iter__(self):
            yield from (Rows(act=work)[i] for i in range(100000))
    return DataLoader(Slow(), 2, num_workers=2)
def counted(i):
    with open("decoded", "a") as file:
        file.write(f"{i}\\n")
def counting(): return Rows(act=counted)
def all_but_one(rows): return torch.utils.data.default_collate(rows[1:] or rows)
def other(): return DataLoader(Rows(), 16, collate_fn=all_but_one)
class Labels(Rows):
    def __getitem__(self, i):
        return torch.rand(6), i // 25
def labels(): return Labels()
"""

RUN = ["-m", "mlp:6-5-3", "--points", 5, "--batch-size", 16, "--no-figure"]


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code for data, in which the command line runs; data may have 1 kB of memory."""
    monkeypatch.setattr(objects_, "host_budget", lambda: 1000)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text(CODE)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def interpolate(losscli: Losscli, data: str, *options: object) -> Any:
    return losscli("interpolate", "init:0", "init:1", *RUN, "-d", f"code.py:{data}", *options)


def losses(path: Path) -> list[tuple[str, float]]:
    with path.open() as file:
        return [(row["split"], float(row["loss"])) for row in csv.DictReader(file)]


def test_the_command_gives_the_same_table_streamed_and_from_memory(
    losscli: Losscli, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for data in ("plain", "workers", "coming"):
        done = interpolate(losscli, data, "-o", data)
        assert done.status == 0, done.stderr
    monkeypatch.setattr(objects_, "host_budget", lambda: 1 << 20)
    for data in ("plain", "coming"):
        assert interpolate(losscli, data, "-o", f"held-{data}").status == 0
    for data in ("plain", "workers", "coming"):
        held = losses(code / f"held-{'coming' if data == 'coming' else 'plain'}.csv")
        assert losses(code / f"{data}.csv") == held
    notes = json.loads((code / "plain.json").read_text())["notes"]
    assert "train: decoded again in each pass over the data" in notes
    assert not any(note.startswith("test:") for note in notes)
    assert json.loads((code / "held-plain.json").read_text())["notes"] == []


def test_a_dry_run_reports_what_is_streamed_and_how_often(losscli: Losscli, code: Path) -> None:
    done = interpolate(losscli, "plain", "--dry-run")
    assert "passes       3 over the data" in done.stdout
    assert "in memory    0.0 MiB of data, without train, decoded again in each pass" in done.stdout
    told = json.loads(interpolate(losscli, "plain", "--dry-run", "--json", "--derivatives").stdout)
    assert told["streamed"] is True
    assert told["streamed_splits"] == ["train"]
    assert told["passes_over_data"] == 3 + 7
    assert told["bytes_of_data"] == 20 * (6 * 4 + 8)
    told = json.loads(interpolate(losscli, "plain", "--limit", 9, "--dry-run", "--json").stdout)
    assert told["streamed"] is False
    assert told["examples"] == {"train": 9, "test": 9}


def test_a_limit_of_an_iterable_takes_its_first_examples_and_is_reported(
    losscli: Losscli, code: Path
) -> None:
    done = interpolate(losscli, "coming", "--limit", 60, "-o", "some", "--json")
    assert done.status == 0
    told = json.loads(done.stdout)
    assert told["examples"] == {"train": 60}
    note = "train: iterated again in each pass over the data; a part of it is its first examples"
    assert any(n.startswith(note) for n in told["notes"])
    done = interpolate(losscli, "coming", "--sampling-error", 10, "-o", "sampled", "--json")
    assert done.status == 0
    assert json.loads(done.stdout)["examples"] == {"train": 100}


OPTIONS: dict[str, list[object]] = {
    "a limit": ["--limit", 60],
    "a sample": ["--sampling-error", 1.2],
    "blocks": ["--layerwise"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_takes_the_same_examples_streamed_and_from_memory(
    options: list[object], losscli: Losscli, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("losscli.evaluation.sampling._FIRST_BLOCK", 8)
    words = [*options, "--dtype", "float64", "--split", "train"]
    tables = []
    for budget in (1000, 1 << 20):
        monkeypatch.setattr(objects_, "host_budget", lambda budget=budget: budget)
        done = interpolate(losscli, "plain", *words, "-o", str(budget), "--json")
        assert done.status == 0, done.stderr
        assert any("in each pass" in note for note in json.loads(done.stdout)["notes"]) == (
            budget == 1000
        )
        found = sorted(code.glob(f"{budget}*.csv"))
        tables.append([list(csv.DictReader(file.read_text().splitlines())) for file in found])
    for streamed, held in zip(*tables, strict=True):
        assert [row.keys() for row in streamed] == [row.keys() for row in held]
        for one, other in zip(streamed, held, strict=True):
            for column, value in one.items():
                if column in {"split", "block", "examples"}:
                    assert value == other[column]
                else:
                    assert float(value) == pytest.approx(float(other[column]), rel=1e-12, abs=1e-14)
    if "--sampling-error" in options:
        assert {int(row["examples"]) for row in tables[0][0]} < {8, 16, 32, 64}


@pytest.mark.parametrize(
    "options", sample([[], ["--derivatives"], ["--layerwise"], ["--limit", 60]], 1, 2)
)
def test_a_dry_run_reports_the_number_of_passes(
    options: list[object], losscli: Losscli, code: Path
) -> None:
    words = ["counting", *options, "--json", "-o", "x"]
    planned = json.loads(interpolate(losscli, *map(str, words), "--dry-run").stdout)
    assert planned["streamed"] is True
    (code / "decoded").unlink()
    assert interpolate(losscli, *map(str, words)).status == 0
    times = Counter((code / "decoded").read_text().split())
    passes = planned["passes_over_data"]
    # The first examples are decoded more often, and even if a part of the data is without them.
    in_every_pass = [n for n in times.values() if n >= passes]
    assert len(in_every_pass) == planned["examples"]["data"]
    assert min(in_every_pass) == passes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("failing", r"split 'data' failed at example 50: ValueError: no such file"),
        (
            "dying",
            r"split 'data': a worker process was lost: .*\. Memory may be short",
        ),
        ("fewer", r"split 'data' gives 9\d examples in one pass and 9\d in another\. Losses of"),
        ("broken", r"split 'data' failed after 96 examples: OSError: the stream broke$"),
        (
            "chained",
            r"failed after \d+ examples: Lost: no more at 40 ValueError: not this$",
        ),
        ("other", r"a batch of 16 examples is collated to 15\. Leave examples out in the Dataset"),
        ("labels", r"the data has the label 3, and the model's 3 outputs stand for the labels 0"),
    ],
)
def test_failures_during_a_run_are_one_line_and_write_nothing(
    losscli: Losscli, code: Path, data: str, message: str
) -> None:
    done = interpolate(losscli, data, "-o", "out", "-q")
    assert done.status == 1
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr
    assert [path.name for path in code.iterdir()] == ["code.py"]


def start(data: str, aside: Path, before: Callable[[], Any]) -> int:
    """Starts a command in a fork of this process that is detached from its terminal.

    Its log and what else comes to stderr are in a folder, as are signs of work.
    """
    words = ["interpolate", "init:0", "init:1", *RUN, "-d", f"code.py:{data}", "-o", "out"]

    def prepare() -> None:
        close_inherited()
        os.setsid()
        os.dup2(os.open(aside / "stderr", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ["WORKING"] = str(aside / "working")
        warnings.resetwarnings()  # those of pytest
        before()

    return child([str(word) for word in words], aside / "log", prepare)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in found.split()]


linux = pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
forking = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


@linux
@forking
@pytest.mark.parametrize(
    ("data", "number"), in_turn(["slow", "crawling"], signal.SIGINT, signal.SIGTERM)
)
def test_a_signal_leaves_no_process_behind(
    data: str, number: int, code: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    aside = tmp_path_factory.mktemp("aside")
    pid = start(data, aside, lambda: None)
    while not (aside / "working").exists() or len(workers := children(pid)) < 2:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    watched = [os.pidfd_open(worker) for worker in workers]
    # Ctrl-C reaches the whole group, as a terminal sends it.
    (os.killpg if number == signal.SIGINT else os.kill)(pid, number)
    assert ended(pid) == 128 + number
    assert (aside / "log").read_text().strip().endswith("nothing was written")
    # They were told to end, and are no children of this process that it could wait for.
    for worker in watched:
        assert select.select([worker], [], [], PATIENCE)[0], "a worker lives on"
        os.close(worker)
    assert (aside / "stderr").read_text() == ""
    assert [path.name for path in code.iterdir()] == ["code.py"]


@linux
@forking
@pytest.mark.parametrize("data", ["workers", "crawling"])
def test_ctrl_c_when_a_worker_starts_ends_the_run_without_a_traceback(
    data: str, code: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    aside = tmp_path_factory.mktemp("aside")

    def before() -> None:
        os.register_at_fork(after_in_child=lambda: os.killpg(0, signal.SIGINT))

    assert ended(start(data, aside, before)) == 128 + signal.SIGINT
    assert (aside / "stderr").read_text() == ""
    assert (aside / "log").read_text().strip().endswith("nothing was written")


def hanging_up(i: int) -> tuple[Tensor, int]:
    """Asks the thread that hands over shared memory for something, and then ends the call."""
    if torch.utils.data.get_worker_info() is not None:
        shared: Any = resource_sharer.DupFd(0)  # type: ignore[attr-defined]
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(shared._id[0])
        os.close(shared.detach())  # which it answers after the call that ended
    return example(i)


@linux
@pytest.mark.parametrize("make", [Rows, Coming])
def test_a_run_that_ends_while_it_takes_a_batch_leaves_no_traceback(
    make: Any,
    cramped: Callable[[int], None],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Tokenizers of other tests would complain of the fork.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    cramped(10)
    given = DataLoader(make(hanging_up), 5, num_workers=1, multiprocessing_context="fork")
    split = from_object(given, "here").splits["data"]
    assert torch.equal(whole(split).targets, IN_MEMORY.targets)
    assert capfd.readouterr().err == ""


@linux
@forking
def test_a_low_limit_of_open_files_is_enough(
    code: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    aside = tmp_path_factory.mktemp("aside")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    assert ended(start("many", aside, limit)) == 0, (aside / "log").read_text()
    assert "Too many" not in (aside / "log").read_text() + (aside / "stderr").read_text()
    assert (code / "out.csv").exists()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_gets_streamed_and_kept_data_batch_by_batch(
    cramped: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = model_and_line()
    cramped(10)
    given = {"kept": (IN_MEMORY.inputs, IN_MEMORY.targets), "streamed": FORMS["a loader"]()}
    data = from_object(given, "here")
    monkeypatch.setattr("losscli.evaluation.objective.device_budget", lambda device: 0)
    objective = Objective(
        MLP("6-5-3"), cross_entropy, {}, data, device=torch.device("cuda"), batch_size=8
    )
    check_task(objective, a)
    kept = objective.splits["kept"]
    assert isinstance(kept, Split)
    assert kept.targets.device.type == "cpu"
    (found,) = sweep_plain(objective, [a])
    expected = oracle.losses(
        lambda: MLP("6-5-3"), a, IN_MEMORY.inputs, IN_MEMORY.targets, cross_entropy
    )
    for evaluation in found.values():
        np.testing.assert_allclose(evaluation.losses[0], expected, rtol=1e-5)


class Ragged(IterableDataset[Any]):
    """Sequences of two lengths, each batch of one."""

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        for length, number in ((7, 8), (3, 8)):
            for _ in range(number):
                yield torch.rand(length, 4, generator=generator), torch.arange(length) % 3


def test_a_mean_over_targets_of_different_lengths_is_refused_and_one_over_sequences_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("losscli.data.objects.host_budget", lambda: 0)
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        states.append(nn.Linear(4, 3).state_dict())
    study: dict[str, Any] = {
        "model": nn.Linear(4, 3),
        "data": {"all": DataLoader(Ragged(), batch_size=8)},
        "batch_size": 8,
        "points": 2,
        "metric": "none",
    }
    with pytest.raises(LossError, match=r"shapes \[3\] and \[7\].*--loss token_cross_entropy"):
        losscli.interpolate(*states, **study)
    found = losscli.interpolate(*states, loss="token_cross_entropy", **study)
    own = [F.cross_entropy(F.linear(x, *states[0].values()), y).item() for x, y in iter(Ragged())]
    alpha = found.table["alpha"].index(0)
    assert found.table["loss"][alpha] == pytest.approx(sum(own) / len(own), rel=1e-6)


# Parts of different lengths are not examples, so that each batch is kept as a whole, also one with
# parts that happen to have one length.
PHYSICS = [{"inside": torch.rand(n, 2), "edge": torch.rand(3)} for n in (5, 3, 4)]


# The number of examples in each batch that can be counted; 0 for parts of different lengths.
SIZES = {(5, 3, 4): 3, (5, 4, 4): 3, (3, 3): 6}


@pytest.mark.parametrize("lengths", SIZES)
@pytest.mark.parametrize("form", ["a data set", "an iterable"])
def test_examples_of_batches_with_parts_of_different_lengths_are_not_counted(
    form: str, lengths: tuple[int, ...]
) -> None:
    batches = [{"inside": torch.rand(n, 2), "edge": torch.rand(3)} for n in lengths]
    rows = (Rows if form == "a data set" else Coming)(batches.__getitem__, len(batches))
    loader = DataLoader(rows, batch_size=None)
    split = from_object(loader, "here", batching=Batching(None), whole=True).splits["data"]
    counted = SIZES[lengths] > len(lengths)
    assert len(split) == len(lengths)
    assert split.rows == SIZES[lengths]
    assert split.take(torch.arange(2)).rows == (6 if counted else 2)
    note = "the parts of a batch differ in length, so its examples are not counted; each batch "
    assert (f"{note}counts the same" in split.remarks) is not counted
    assert not [remark for remark in split.remarks if remark.startswith("the batches have")]


@pytest.mark.parametrize(
    ("form", "workers"),
    [
        ("a data set", 0),
        ("a data set", 1),
        ("an iterable", 0),
        pytest.param("an iterable", 1, marks=pytest.mark.stress),
    ],
)
def test_an_objective_receives_the_batches_of_a_loader_unchanged(form: str, workers: int) -> None:
    rows = (Rows if form == "a data set" else Coming)(PHYSICS.__getitem__, len(PHYSICS))
    batches = DataLoader(rows, batch_size=None, num_workers=workers)
    data = from_object(batches, "here", batching=Batching(None), whole=True)
    received = [
        data.prepare_batch(batch, torch.float32) for batch in data.splits["data"].batches(1)
    ]
    assert [list(batch) for batch in received] == [["inside", "edge"]] * 3
    for batch, expected in zip(received, PHYSICS, strict=True):
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("loader", [lambda rows: rows, lambda rows: DataLoader(rows, batch_size=4)])
def test_batches_that_are_taken_for_examples_name_the_loader_that_keeps_them(loader: Any) -> None:
    rows = Coming(lambda i: (torch.rand(3 + i, 2), torch.zeros(3 + i)), 5)
    cure = r"If it yields batches, give .*batch_size=None\); if examples differ in shape"
    with pytest.raises(DataError, match=f"here, split 'all' failed: RuntimeError: .*{cure}"):
        from_object({"all": loader(rows)}, "here")
    kept = from_object({"all": DataLoader(rows, batch_size=None)}, "here").splits["all"]
    assert len(kept) == sum(3 + i for i in range(5))
