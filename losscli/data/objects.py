"""Data sets from Python objects: tensors, batches, DataLoaders and Datasets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from losscli.data.batch import Pixels, is_language, parse_batch
from losscli.data.iterable import IterableStream, Source
from losscli.data.memory import host_budget
from losscli.data.nests import realise
from losscli.data.randomness import private_randomness, seed_all
from losscli.data.split import Batches, DataSet, Examples, Split
from losscli.data.stream import Decoder, Stream, WorkerInit, Workers
from losscli.errors import DataError, UsageError, one_line

__all__ = ["Batching", "cut_into_batches", "from_object", "load_into_memory", "to_data_set"]


@dataclass(frozen=True)
class Batching:
    """Request to keep whole batches, for a loss with one value per batch.

    A DataLoader keeps its own batches.

    Attributes:
        size: Examples per batch for data without batches; None if not given.
    """

    size: int | None


def from_object(
    loaded: object,
    where: str,
    *,
    splits: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    batching: Batching | None = None,
    whole: bool = False,
) -> DataSet:
    """Makes a data set from an object of user code and loads it into memory if it fits.

    Args:
        loaded: A mapping from split names to ``(inputs, targets)``, DataLoaders or Datasets; or
            one DataLoader or Dataset, which becomes the split ``data``.
        where: Name of the data in error messages.
        splits: Names of the splits; all if empty.
        limit: Number of examples per split; None for all.
        seed: Random seed of the draw for ``limit`` and of the order of a DataLoader.
        batching: Keep whole batches; None for single examples.
        whole: As for `parse_batch`.

    Returns:
        The data set; splits that do not fit in memory are decoded on every pass.

    Raises:
        DataError: The object has another type, a batch cannot be interpreted, or examples cannot
            be joined.
        UsageError: A split does not exist.
    """
    data = to_data_set(loaded, where, seed, batching, whole=whole)
    data = cut_into_batches(data, where, batching)
    return load_into_memory(data.select(splits, limit, seed))


def cut_into_batches(data: DataSet, where: str, batching: Batching | None) -> DataSet:
    """Returns a data set with splits of single examples divided into whole batches.

    Args:
        data: The data set.
        where: Name of the data in error messages.
        batching: Keep whole batches; None to change nothing.

    Raises:
        UsageError: The batch size is missing.
    """
    if batching is None:
        return data
    unbatched = {name: split for name, split in data.splits.items() if not split.in_batches}
    if batching.size is None and any(len(split) > 1 for split in unbatched.values()):
        raise UsageError(
            f"{where}, split {next(iter(unbatched))!r} has no batches of its own, and with "
            "--batch-loss the loss depends on their size",
            "Give --batch-size, or a DataLoader",
        )
    splits: dict[str, Examples] = dict(data.splits)
    for name, split in unbatched.items():
        if isinstance(split, Split):
            splits[name] = Batches.of(split, batching.size)
        elif isinstance(split, Stream):
            order = torch.split(torch.arange(len(split)), batching.size or 1)
            splits[name] = split.cut([part.tolist() for part in order])
    return replace(data, splits=splits)


def to_data_set(
    loaded: object,
    where: str,
    seed: int,
    batching: Batching | None = None,
    *,
    whole: bool = False,
) -> DataSet:
    """Returns a data set of an object of user code; decodes only the first examples.

    The arguments are those of `from_object`.

    Raises:
        DataError: The object cannot be interpreted.
        UsageError: The given batch size has no effect.
    """
    if isinstance(loaded, DataSet):
        return loaded
    if isinstance(loaded, DataLoader | Dataset):
        loaded = {"data": loaded}
    if not isinstance(loaded, Mapping) or not loaded:
        _refuse_examples(loaded, where)
        kind = "empty" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
        raise DataError(
            f"{where} is {kind}, not a mapping from split names to (inputs, targets), a DataLoader "
            "or a Dataset",
            "Call it" if callable(loaded) else 'Give {"train": (inputs, targets)}, for example',
        )
    loaders = all(isinstance(content, DataLoader) for content in loaded.values())
    if loaders and batching is not None and batching.size is not None:
        raise UsageError(
            f"--batch-size {batching.size} has no effect: --batch-loss keeps the batches of a "
            "DataLoader",
            "Leave it out",
        )
    splits: dict[str, Examples] = {}
    language = set()
    for name, content in loaded.items():
        split_name = f"{where}, split {name!r}"
        if isinstance(content, DataLoader | Dataset):
            examples = _examples(content, split_name, seed, batching, whole=whole)
            language.add(not isinstance(examples, Split) and examples.language)
            splits[str(name)] = examples
        else:
            try:
                splits[str(name)] = parse_batch(content, split_name, whole=whole)
            except DataError:
                # A tuple of two is meant as inputs and targets.
                if not (isinstance(content, tuple) and len(content) == 2):
                    _refuse_examples(content, split_name)
                raise
            language.add(is_language(content))
    firsts = [realise(split.first(1).targets) for split in splits.values()]
    floating = {t.is_floating_point() for t in firsts if isinstance(t, Tensor)}
    if len(floating) > 1 and not whole:
        raise DataError(
            f"{where}: some splits have whole-number targets and some do not",
            "Give all of them whole numbers for classes, or none",
        )
    if len(language) > 1 and not whole:
        raise DataError(
            f"{where}: some splits have a label for each of their input_ids and some do not",
            "Give all of them labels of the shape of input_ids, or none",
        )
    data = DataSet(splits, language=language == {True}, whole=whole)
    if isinstance(loaded, Pixels):
        data = replace(data, scale=True, notes=(loaded.note,) if loaded.note else ())
    return data


def _refuse_examples(content: object, where: str) -> None:
    """Refuses a list, which may hold examples or batches: only a DataLoader shows which."""

    def is_example(item: object) -> bool:
        return isinstance(item, Mapping) or (isinstance(item, tuple | list) and len(item) == 2)

    if isinstance(content, tuple | list) and content and all(map(is_example, content)):
        raise DataError(
            f"{where} is a plain {type(content).__name__}",
            "Give torch.utils.data.DataLoader(it, batch_size=64) if it has examples, or "
            "batch_size=None if it has batches",
        )


def load_into_memory(data: DataSet) -> DataSet:
    """Returns a data set with splits in memory as far as they fit; the others stay streams.

    Streams are checked to be the same on every pass.

    Raises:
        DataError: Examples cannot be decoded or joined.
    """
    budget = host_budget() - sum(split.nbytes for split in data.splits.values())
    splits: dict[str, Examples] = {}
    for name, split in data.splits.items():
        decoded = split.decode(budget) if isinstance(split, Stream | IterableStream) else None
        budget -= decoded.nbytes if decoded is not None else 0
        if decoded is None and isinstance(split, Stream):
            split.check()
        splits[name] = split if decoded is None else decoded
    return replace(data, splits=splits)


def _examples(
    content: DataLoader[Any] | Dataset[Any],
    where: str,
    seed: int,
    batching: Batching | None,
    *,
    whole: bool,
) -> Split | Stream | IterableStream:
    if isinstance(content, DataLoader):
        in_batches = batching is not None
        drops = content.drop_last or getattr(content.batch_sampler, "drop_last", False)
        if drops and not in_batches:
            raise DataError(
                f"{where}: the DataLoader drops the last batch where it is not full",
                "Build it with drop_last=False",
            )
        if isinstance(content.dataset, IterableDataset):
            return IterableStream(Source(content, where, seed, in_batches=in_batches, whole=whole))
        if in_batches and content.batch_sampler is not None:
            return _whole_batches(content, where, seed, whole=whole)
        keys = _keys(content, where, seed)
        if content.batch_sampler is None:
            loader = _with_fixed_order(content, keys)
            return IterableStream(Source(loader, where, seed, in_batches=in_batches, whole=whole))
        return _read_by_keys(content, keys, where, seed, whole=whole)
    if type(content) is TensorDataset:
        return parse_batch(list(content.tensors), where, whole=whole)
    if isinstance(content, IterableDataset):
        if batching is not None and batching.size is not None:
            source = Source(content, where, seed, size=batching.size, in_batches=True, whole=whole)
            return IterableStream(source)
        return IterableStream(Source(content, where, seed, whole=whole))
    if getattr(content, "__len__", None) is None:
        raise DataError(
            f"{where}: the Dataset has no length", "Give it __len__, or an IterableDataset"
        )
    return _stream(Decoder(content, default_collate, where, seed, whole=whole), None, None, {})


def _whole_batches(
    loader: DataLoader[Any], where: str, seed: int, *, whole: bool
) -> Split | Stream:
    """Returns the batches of a DataLoader, with an order drawn once."""
    batches = _drawn(lambda: list(map(list, loader.batch_sampler or ())), where, seed)
    keys = [key for batch in batches for key in batch]
    if not keys:
        raise DataError(f"{where} is empty")
    examples = _read_by_keys(loader, keys, where, seed, whole=whole)
    if isinstance(examples, Split):
        return Batches(examples.inputs, examples.targets, tuple(map(len, batches)))
    ends = [0, *itertools.accumulate(map(len, batches))]
    return examples.cut([list(range(*pair)) for pair in itertools.pairwise(ends)])


def _read_by_keys(
    loader: DataLoader[Any], keys: Sequence[Any] | None, where: str, seed: int, *, whole: bool
) -> Split | Stream:
    """Returns the examples that a DataLoader has under keys; all in order if these are None."""
    dataset = loader.dataset
    if type(dataset) is TensorDataset and loader.collate_fn is default_collate:
        split = parse_batch(list(dataset.tensors), where, whole=whole)
        return split if keys is None else split.take(torch.tensor(keys))
    index = None
    if keys is not None and all(type(key) is int for key in keys):
        index = torch.tensor(keys, dtype=torch.long)
    elif keys is not None:
        dataset = Subset(dataset, keys)
    decoder = Decoder(dataset, loader.collate_fn, where, seed, whole=whole)
    return _stream(decoder, index, loader.num_workers, _options(loader))


def _stream(
    decoder: Decoder, index: Tensor | None, number: int | None, options: Mapping[str, Any]
) -> Stream:
    if index is None:
        try:
            index = torch.arange(len(decoder.dataset))  # type: ignore[arg-type]
        except Exception as error:
            raise DataError(f"{decoder.where} failed: {one_line(error)}") from error
    if not len(index):
        raise DataError(f"{decoder.where} is empty")
    return Stream(Workers(decoder, number, options), index)


def _keys(loader: DataLoader[Any], where: str, seed: int) -> Sequence[Any] | None:
    """Returns the keys that a sampler yields, drawn once; None for all examples in order."""
    # A DataLoader ignores its sampler if the user gave a batch_sampler.
    batches = loader.batch_sampler if loader.batch_size is None else None
    sampler: Any = loader.sampler
    dataset: object = loader.dataset
    if batches is None and type(sampler) is SequentialSampler and sampler.data_source is dataset:
        return None
    if batches is None:
        return _drawn(lambda: list(sampler), where, seed)
    return _drawn(lambda: [key for batch in batches for key in batch], where, seed)


def _drawn(draw: Callable[[], list[Any]], where: str, seed: int) -> list[Any]:
    """Returns what a sampler of the user draws from seeded generators."""
    with private_randomness():
        seed_all(seed)
        try:
            return draw()
        except Exception as error:
            raise DataError(f"{where}: the sampler failed: {one_line(error)}") from error


def _with_fixed_order(loader: DataLoader[Any], keys: Sequence[Any] | None) -> DataLoader[Any]:
    """Returns a DataLoader without batching that reads the same keys on every pass."""
    return DataLoader(
        loader.dataset,
        batch_size=None,
        sampler=keys,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        **_options(loader),
    )


def _options(loader: DataLoader[Any]) -> dict[str, Any]:
    """Returns the worker options of a DataLoader."""
    if not loader.num_workers:
        return {}
    return {
        "timeout": loader.timeout,
        "prefetch_factor": loader.prefetch_factor,
        "multiprocessing_context": loader.multiprocessing_context,
        "worker_init_fn": WorkerInit(loader.worker_init_fn),
    }
