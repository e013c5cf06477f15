"""Registry of data set formats, and the options that all data specs share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from losscli.data.arrays import load_mnist, load_npz, load_safetensors
from losscli.data.cifar import load_cifar10, load_cifar100
from losscli.data.hub import load_hub
from losscli.data.images import load_image_folder
from losscli.data.nests import leaves
from losscli.data.objects import Batching, cut_into_batches, load_into_memory, to_data_set
from losscli.data.split import DataSet, Examples, Split
from losscli.data.text import load_text
from losscli.errors import DataError, SpecError, one_line
from losscli.spec import Spec, call, expand_toml, look_up, untrusted

__all__ = ["DATASETS", "is_on_hub", "load"]

_COMMON = ("mean", "std", "flatten", "limit")

# Channel statistics of ImageNet, as in the presets of torchvision.
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

DATASETS: dict[str, Callable[..., Any]] = {
    "safetensors": load_safetensors,
    "npz": load_npz,
    "mnist": load_mnist,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "imagefolder": load_image_folder,
    "text": load_text,
    "hf": load_hub,
}


def load(
    text: str,
    *,
    trusted: bool,
    source: str = "a file",
    folder: Path | None = None,
    cure: str = "",
    splits: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    batching: Batching | None = None,
    whole: bool = False,
) -> DataSet:
    """Loads the data set that a spec names.

    Args:
        text: The spec, or the name of a TOML file that contains it. In addition to the keys of its
            format it may have ``mean``, ``std``, ``flatten`` and ``limit``.
        trusted: Whether the spec may name code or a data set on the hub.
        source: Where the spec comes from, if not from the command line.
        folder: Base folder of relative paths; the current folder by default.
        cure: How the source can become trusted, if it can.
        splits: Names of the splits; all if empty.
        limit: Number of examples per split, applied after the ``limit`` of the spec; None for all.
        seed: Random seed of the draw for ``limit`` and of the order of a DataLoader.
        batching: Keep whole batches; None for single examples.
        whole: As for `parse_batch`, for data from code; a format has inputs and targets.

    Returns:
        The data set; splits that do not fit in memory are decoded on every pass.

    Raises:
        DataError: The data cannot be read or interpreted.
        SpecError: The spec names an unknown format, or its keys are wrong.
        UntrustedCodeError: The spec names code or a data set on the hub and is not trusted.
        UsageError: A split does not exist, or the limit is below 1.
    """
    named = text
    text, trusted, folder = expand_toml(named, trusted=trusted, folder=folder)
    source, cure = (source, cure) if text == named else (named, "")
    spec = Spec.parse(text)
    function, arguments = look_up(
        spec, DATASETS, "data", trusted=trusted, source=source, folder=folder, cure=cure
    )
    options: dict[str, Any] = dict(spec.options)
    common = {key: options.pop(key, None) for key in _COMMON}
    if common["mean"] == "imagenet" and common["std"] is None:
        common["std"] = "imagenet"
    normalisation: dict[str, Any] = {
        key: _channels(common[key], key, text) for key in ("mean", "std") if common[key] is not None
    }
    if common["flatten"] is not None:
        normalisation["flatten"] = common["flatten"]
        if not isinstance(common["flatten"], bool):
            raise SpecError(
                f"data {text!r}: flatten={common['flatten']} must be true or false",
                "Write flatten=true",
            )
    spec_limit = common["limit"]
    if spec_limit is not None and not (type(spec_limit) is int and spec_limit > 0):
        raise SpecError(
            f"data {text!r}: limit={spec_limit} is not a number of examples", "Give 1 or more"
        )
    is_format = function in DATASETS.values()
    if is_format:
        if not arguments:
            name = spec.target.rstrip(":")
            raise SpecError(f"data {text!r} names no file", f"Write {name}:PATH")
        path = Path(folder or "", arguments[0])
        on_hub = is_on_hub(spec, folder)
        if on_hub and not trusted:
            raise untrusted(f"{source} names {text!r}, a data set on the hub", "data", spec, cure)
        paths: tuple[str | Path, ...] = (arguments[0] if on_hub else path,)
        if options.get("tokenizer", "bytes") != "bytes":
            options["tokenizer"] = Path(folder or "", str(options["tokenizer"]))
    else:
        paths = arguments
    torch.manual_seed(seed)
    try:
        loaded = call(function, paths, options, f"data {text!r}", also=_COMMON)
    except (DataError, SpecError):
        raise
    except Exception as error:
        raise DataError(f"data {text!r} failed: {one_line(error)}") from error
    if whole and normalisation and not is_format:
        raise SpecError(
            f"data {text!r}: {next(iter(normalisation))}= is for the inputs, and an objective "
            "takes whole batches",
            "Return normalised inputs from your code",
        )
    data = to_data_set(loaded, f"data {text!r}", seed, batching, whole=whole and not is_format)
    data = replace(data, **normalisation)
    if is_format:
        data = replace(data, splits={n: _with_long_targets(s) for n, s in data.splits.items()})
    _check_normalisation(data, text)
    data = _note_unscaled(data, text, imagenet="imagenet" in (common["mean"], common["std"]))
    data = cut_into_batches(data.select([], spec_limit, seed), f"data {text!r}", batching)
    return load_into_memory(data.select(splits, limit, seed))


def is_on_hub(spec: Spec, folder: Path | None) -> bool:
    """Returns whether data are fetched from the hub: a name without a local folder."""
    name, _, argument = spec.target.partition(":")
    # os.path.exists() is False for a name that is too long for a path.
    return name == "hf" and not os.path.exists(Path(folder or "", argument))  # noqa: PTH110


def _with_long_targets(split: Examples) -> Examples:
    """Converts the classes of a file to int64, the dtype that losses expect."""
    if not isinstance(split, Split) or split.targets.is_floating_point():
        return split
    return replace(split, targets=split.targets.long())


def _channels(value: Any, key: str, text: str) -> tuple[float, ...]:
    values = (
        _IMAGENET[key] if value == "imagenet" else value if isinstance(value, list) else [value]
    )
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise SpecError(
            f"data {text!r}: {key}={value} is not a number per channel", f"Write {key}=0.5-0.4-0.5"
        )
    if not all(map(math.isfinite, values)) or (key == "std" and min(values) <= 0):
        raise SpecError(
            f"data {text!r}: {key}={value} is not {'above 0' if key == 'std' else 'finite'}",
            f"Write {key}=0.5, or {key}=0.5-0.4-0.5 for three channels",
        )
    return tuple(map(float, values))


def _note_unscaled(data: DataSet, text: str, *, imagenet: bool) -> DataSet:
    """Adds a note if uint8 inputs are normalised without scaling to 0…1."""
    firsts = [leaf for s in data.splits.values() for leaf in leaves(s.first(1).inputs)]
    unscaled = not data.scale and any(leaf.dtype == torch.uint8 for leaf in firsts)
    if not unscaled or (data.mean is None and data.std is None):
        return data
    if imagenet:
        raise SpecError(
            f"data {text!r}: the statistics of imagenet are of pixels 0…1, and the inputs are "
            "uint8 that are not scaled",
            "Return x.float() / 255 from your code; for files of arrays write scale=true",
        )
    note = "mean= and std= are applied to the uint8 inputs as they are, not scaled to 0…1"
    return replace(data, notes=(*data.notes, note))


def _check_normalisation(data: DataSet, text: str) -> None:
    options = [key for key in ("mean", "std", "flatten") if getattr(data, key) not in {None, False}]
    for split in data.splits.values() if options else ():
        scaled = [
            tensor
            for tensor in leaves(split.first(1).inputs)
            if tensor.is_floating_point() or tensor.dtype == torch.uint8
        ]
        if not scaled:
            raise SpecError(
                f"data {text!r}: {options[0]}= is for pixels and other measured numbers, and the "
                "inputs are whole numbers such as token ids, which stay as they are",
                f"Leave out {', '.join(f'{key}=' for key in options)}",
            )
        for tensor in scaled:
            for values in (data.mean, data.std):
                channels = tensor.shape[1] if tensor.ndim > 1 else 1
                if values is not None and len(values) not in {1, channels}:
                    raise DataError(
                        f"data {text!r}: {len(values)} values of mean or std for "
                        f"{channels} channels",
                        "Give one value, or one per channel",
                    )
