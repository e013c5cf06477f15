"""Hugging Face data sets: by their columns, from folders, with nothing run and nothing guessed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from losscli.data import DataSet, Nest, load
from losscli.errors import DataError
from losscli.models import MLP
from tests.cases import in_turn
from tests.conftest import Losscli, Outcome
from tests.data.test_images import EPS, program
from tests.forks import ended, fork
from tests.libraries import Library

datasets: Any = Library("datasets")

# datasets before 4 leaves files of rows open.
pytestmark = pytest.mark.filterwarnings(
    *(["ignore:unclosed file:ResourceWarning"] if version("datasets") < "4" else [])
)

GENERATOR = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _quiet_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache of datasets")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def table(features: dict[str, Any] | None = None, /, **columns: Any) -> Any:
    return datasets.Dataset.from_dict(columns, datasets.Features(features) if features else None)


def saved(folder: Path, whole: Any) -> str:
    whole.save_to_disk(folder / "saved")
    return f"hf:{folder / 'saved'}"


def examples(data: DataSet, split: str = "data") -> tuple[Nest, Tensor]:
    found = data.splits[split]
    whole = found.first(len(found))
    return whole.inputs, whole.targets


def pair(data: DataSet, split: str = "data") -> tuple[Tensor, list[Any]]:
    inputs, targets = examples(data, split)
    assert isinstance(inputs, Tensor)
    return inputs, targets.tolist()


# Numbers


def test_numbers_keep_their_types_to_the_last_bit(tmp_path: Path) -> None:
    values = GENERATOR.standard_normal((7, 3))
    whole = table(x=values.tolist(), y=[0, 1, 2, 0, 1, 2, 0])
    inputs, targets = pair(load(saved(tmp_path, whole), trusted=False))
    assert inputs.dtype == torch.float64
    assert np.array_equal(inputs, values)
    assert targets == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("feature", "dtype"),
    [
        (lambda d: d.Array3D((2, 2, 3), "uint8"), torch.uint8),
        (lambda d: d.Array3D((2, 2, 3), "float32"), torch.float32),
        (lambda d: [[[d.Value("int16")]]], torch.int16),
    ],
)
def test_arrays_of_several_dimensions(feature: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    values = GENERATOR.integers(0, 256, (5, 2, 2, 3))
    whole = table(
        {"pixel_values": feature(datasets), "label": datasets.ClassLabel(names=["a", "b"])},
        pixel_values=values.tolist(),
        label=["a", "b", "b", "a", "b"],
    )
    data = load(saved(tmp_path, whole), trusted=False)
    inputs, targets = pair(data)
    assert inputs.dtype == dtype
    assert np.array_equal(inputs, values)
    assert targets == [0, 1, 1, 0, 1]
    assert data.task == "classification"


def test_targets_that_are_not_classes_are_regressed(tmp_path: Path) -> None:
    whole = table(a=[1.0, 2.0], b=[[0.5], [0.25]], c=[3.0, 4.0])
    data = load(f"{saved(tmp_path, whole)},inputs=b,targets=c", trusted=False)
    assert data.task == "regression"
    inputs, targets = pair(data)
    assert inputs.tolist() == [[0.5], [0.25]]
    assert targets == [3.0, 4.0]


def test_a_number_alone_is_one_feature_and_a_whole_number_an_index(tmp_path: Path) -> None:
    spec = saved(tmp_path, table(a=[1.5, 2.0], b=[0.5, 0.25], i=[3, 4]))
    for keys, expected in (
        ("inputs=a,targets=b", [[1.5], [2.0]]),
        ("inputs=i,targets=b", [3, 4]),
    ):
        inputs, targets = pair(load(f"{spec},{keys}", trusted=False))
        assert inputs.tolist() == expected
        assert targets == [0.5, 0.25]


def test_rows_are_read_in_the_order_that_was_saved(tmp_path: Path) -> None:
    whole = table(x=[[float(i)] for i in range(50)], y=list(range(50)))
    picked = whole.select([7, 3, 40, 11]).with_format("torch", columns=["y"])
    inputs, targets = pair(load(saved(tmp_path, picked), trusted=False))
    assert inputs.squeeze(1).tolist() == targets == [7, 3, 40, 11]


@pytest.mark.parametrize("kind", ["lists", "lists of one length", "arrays"])
def test_a_stretch_of_the_rows_is_read_alone(kind: str, tmp_path: Path) -> None:
    feature = {
        "lists": datasets.Sequence(datasets.Value("int64")),
        "lists of one length": datasets.Sequence(datasets.Value("int64"), length=2),
        "arrays": datasets.Array2D((2, 1), "int64"),
    }[kind]
    shape = (2, 1) if kind == "arrays" else (2,)
    values = np.arange(40).reshape(20, *shape)
    features = {"x": feature, "y": datasets.Value("int64")}
    whole = table(features, x=values.tolist(), y=list(range(20)))
    from losscli.data.hub import load_hub

    whole.save_to_disk(tmp_path / "whole")
    stretch = datasets.load_from_disk(tmp_path / "whole").select(range(5, 9))
    stretch.save_to_disk(tmp_path / "stretch")
    inputs, targets = load_hub(tmp_path / "stretch")["data"]
    assert np.array_equal(inputs, values[5:9])
    assert targets.tolist() == [5, 6, 7, 8]


def test_many_chunks_are_one_tensor(tmp_path: Path) -> None:
    parts = [table(x=[[i, i + 1]], y=[i]) for i in range(5)]
    inputs, targets = pair(
        load(saved(tmp_path, datasets.concatenate_datasets(parts)), trusted=False)
    )
    assert inputs.tolist() == [[i, i + 1] for i in range(5)]
    assert targets == list(range(5))


def test_splits_are_those_of_the_data_set_the_training_data_first(tmp_path: Path) -> None:
    whole = datasets.DatasetDict({
        name: table(x=[[i]], y=[i]) for i, name in enumerate(("test", "train", "dev"))
    })
    data = load(saved(tmp_path, whole), trusted=False)
    assert list(data.splits) == ["train", "test", "dev"]
    assert [pair(data, split)[1] for split in data.splits] == [[1], [0], [2]]


def test_a_folder_of_data_files(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()  # which is also the name of a reader of the library
    for split, number in (("train", 3), ("test", 2)):
        lines = "".join(f'{{"x": [{i}.5, 2], "label": {i}}}\n' for i in range(number))
        (tmp_path / "json" / f"{split}.jsonl").write_text(lines)
    data = load(f"hf:{tmp_path / 'json'}", trusted=False)
    assert list(data.splits) == ["train", "test"]
    inputs, targets = pair(data, "train")
    assert inputs.tolist() == [[0.5, 2], [1.5, 2], [2.5, 2]]
    assert targets == [0, 1, 2]


def test_configurations_are_chosen_by_config(tmp_path: Path) -> None:
    names = ("one", "2024")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").write_text(f"x,y\n{len(name)},1\n")
    card = "".join(f'- config_name: "{name}"\n  data_files: "{name}/train.csv"\n' for name in names)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    for name in names:
        data = load(f"hf:{tmp_path},config={name}", trusted=False)
        assert pair(data, "train")[0].tolist() == [len(name)]


def csv_folder(folder: Path, start: int, card: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{start + i}.5,{i}\n" for i in range(3))
    (folder / "train.csv").write_text(f"x,y\n{rows}")
    if card:
        (folder / "README.md").write_text(f"---\n{card}---\n")


CARDS = {
    "no card": "",
    "data_files": 'configs:\n- config_name: default\n  data_files: "train.csv"\n',
    "data_dir": "configs:\n- config_name: default\n  data_dir: .\n",
    "splits": "configs:\n- config_name: default\n  data_files:\n  - split: train\n"
    "    path: train.csv\n",
    "without configs": "license: mit\n",
}


@pytest.mark.parametrize(
    ("name", "change"),
    in_turn(CARDS, "another folder", "the same folder", "the same time and size"),
)
def test_numbers_are_those_that_the_folder_has_now(
    name: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = (1000, 2000, 3000)
    for start in starts:
        place = tmp_path / (str(start) if change == "another folder" else "one")
        csv_folder(place / "data", start, CARDS[name])
        if change == "the same time and size":
            os.utime(place / "data" / "train.csv", ns=(10**18, 10**18))
        monkeypatch.chdir(place)
        inputs, _ = pair(load("hf:data", trusted=False), "train")
        assert inputs.flatten().tolist() == [start + i + 0.5 for i in range(3)]


def cached(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache of datasets").rglob("*") if path.is_file()]


def test_numbers_leave_nothing_in_the_cache(tmp_path: Path) -> None:
    csv_folder(tmp_path / "data", 1, CARDS["splits"])
    assert pair(load(f"hf:{tmp_path / 'data'}", trusted=False), "train")[0].sum() == 7.5
    (tmp_path / "data" / "train.csv").write_text("x,y\n1.5\n2,3,4\n")
    with pytest.raises(DataError, match="cannot be read"):
        load(f"hf:{tmp_path / 'data'}", trusted=False)
    assert cached(tmp_path) == []


def image_folder(folder: Path, pixels: Any) -> None:
    """Writes images as rows of a Parquet file, which a card names."""
    from PIL import Image

    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    whole = table(
        features, image=[Image.fromarray(p) for p in pixels], label=list(range(len(pixels)))
    )
    folder.mkdir(exist_ok=True)
    whole.to_parquet(str(folder / "train.parquet"))
    card = 'configs:\n- config_name: default\n  data_files: "train.parquet"\n'
    (folder / "README.md").write_text(f"---\n{card}---\n")


def test_images_are_those_that_the_folder_has_now_and_workers_read_them(
    tmp_path: Path,
) -> None:
    from losscli.data.hub import load_hub
    from losscli.data.objects import to_data_set
    from losscli.data.stream import Stream

    digests = []
    for _ in range(2):
        pixels = GENERATOR.integers(0, 256, (6, 4, 5, 3), np.uint8)
        image_folder(tmp_path / "data", pixels)
        for _ in range(2):
            stream = to_data_set(load_hub(tmp_path / "data"), "data", 0).splits["train"]
            assert isinstance(stream, Stream)
            stream._workers.number = 2
            batches = list(stream.batches(2))
            assert stream._workers._loader is not None
            inputs = torch.cat([batch.inputs for batch in batches])  # type: ignore[misc]
            assert np.array_equal(inputs, pixels.transpose(0, 3, 1, 2))
            digests.append(stream.digest)
            stream._workers._loader = None  # ends them
            inputs = stream.first(6).inputs  # type: ignore[assignment]
            assert np.array_equal(inputs, pixels.transpose(0, 3, 1, 2))
            del stream
    # A run goes on where the images are the same, and begins from the start where they are not.
    first, again, changed, changed_again = digests
    assert first == again != changed == changed_again
    assert cached(tmp_path) == []


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_process_that_is_killed_leaves_no_images_in_the_cache(tmp_path: Path) -> None:
    from losscli.data.hub import load_hub

    image_folder(tmp_path / "data", GENERATOR.integers(0, 256, (3, 4, 5, 3), np.uint8))
    reader, writer = os.pipe()
    pid = fork()
    if not pid:
        try:
            images = load_hub(tmp_path / "data")["train"]
            os.write(writer, str(int(images[2][1])).encode())
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as said:
        assert (ended(pid), said.read()) == (-signal.SIGKILL, "2")
    assert (tmp_path / "cache of datasets").is_dir()
    assert cached(tmp_path) == []


# Images


def test_images_are_decoded_one_at_a_time(tmp_path: Path) -> None:
    from PIL import Image
    from torch.utils.data import Dataset

    from losscli.data.hub import load_hub

    pixels = GENERATOR.integers(0, 256, (3, 4, 5, 3), np.uint8)
    features = {"img": datasets.Image(), "fine_label": datasets.ClassLabel(num_classes=9)}
    whole = table(features, img=[Image.fromarray(p) for p in pixels], fine_label=[8, 0, 3])
    spec = saved(tmp_path, whole)
    found = load_hub(tmp_path / "saved")["data"]
    assert isinstance(found, Dataset)
    image, target = found[2]
    assert np.array_equal(image, pixels[2].transpose(2, 0, 1))
    assert target == 3
    data = load(spec, trusted=False)
    inputs, targets = pair(data)
    assert inputs.dtype == torch.uint8
    assert np.array_equal(inputs, pixels.transpose(0, 3, 1, 2))
    assert targets == [8, 0, 3]
    assert data.task == "classification"


def test_images_are_cut_to_size_and_made_grey_as_in_a_folder(tmp_path: Path) -> None:
    from PIL import Image

    images = [Image.fromarray(GENERATOR.integers(0, 256, s, np.uint8)) for s in ((9, 7), (8, 12))]
    whole = table(
        {"image": datasets.Image(), "label": datasets.Value("int8")}, image=images, label=[0, 1]
    )
    spec = saved(tmp_path, whole)
    for i, image in enumerate(images):
        (tmp_path / "folder" / str(i)).mkdir(parents=True)
        image.save(tmp_path / "folder" / str(i) / "1.png")
    for keys, channels in ((",size=6", 3), (",size=6,grayscale=true", 1)):
        inputs, targets = pair(load(spec + keys, trusted=False))
        expected, _ = pair(load(f"imagefolder:{tmp_path / 'folder'}{keys}", trusted=False))
        assert inputs.shape == (2, channels, 6, 6)
        assert torch.equal(inputs, expected)
        assert targets == [0, 1]


def test_images_are_turned_as_the_library_turns_them(tmp_path: Path) -> None:
    from PIL import Image

    image = Image.fromarray(GENERATOR.integers(0, 256, (4, 6, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter clockwise
    image.save(tmp_path / "1.png", exif=exif)
    whole = table(
        {"image": datasets.Image(), "label": datasets.Value("int64")},
        image=[str(tmp_path / "1.png")],
        label=[0],
    )
    inputs, _ = pair(load(saved(tmp_path, whole), trusted=False))
    expected = np.rot90(np.asarray(image), -1).transpose(2, 0, 1)
    assert np.array_equal(inputs, expected[None])


def hostile(folder: Path, **cell: Any) -> Path:
    """Makes a data set whose one row is not embedded, as save_to_disk would have it."""
    features = {"img": datasets.Image(), "label": datasets.Value("int64")}
    table(features, img=[{"bytes": b"", "path": None}], label=[0]).save_to_disk(folder)
    state = json.loads((folder / "state.json").read_text())
    with pa.OSFile(str(folder / "new.arrow"), "wb") as file:
        whole = table(features, img=[{"bytes": None, "path": None} | cell], label=[0]).data.table
        with pa.ipc.new_stream(file, whole.schema) as writer:
            writer.write_table(whole)
    state["_data_files"] = [{"filename": "new.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_an_image_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = f"hf:{hostile(tmp_path / 'saved', bytes=EPS)}"
    canary = program(tmp_path, monkeypatch)
    with pytest.raises(DataError, match=r"'img' is not an image .*: not in one of the formats BMP"):
        load(spec, trusted=True)
    assert not canary.exists()


@pytest.mark.parametrize("form", ["{}", "../img.png", "http://127.0.0.1:9/img.png", "zip://a::{}"])
def test_an_image_elsewhere_is_not_opened(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    Image.new("RGB", (2, 2)).save(tmp_path / "img.png")
    saved_at = hostile(tmp_path / "saved", path=form.format(tmp_path / "img.png"))
    monkeypatch.chdir(saved_at)
    with pytest.raises(DataError, match=r"row 0, 'img' points outside the folder, to '"):
        load(f"hf:{saved_at}", trusted=True)


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_of_images(packed: bool, tmp_path: Path) -> None:
    from PIL import Image

    pixels = GENERATOR.integers(0, 256, (2, 4, 5, 3), np.uint8)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, values in zip("ab", pixels, strict=True):
        place = tmp_path / ("unpacked" if packed else "folder") / "train" / name
        place.mkdir(parents=True)
        Image.fromarray(values).save(place / "1.png")
    if packed:
        rows = "file_name,label\ntrain/a/1.png,0\ntrain/b/1.png,1\n"
        (tmp_path / "unpacked" / "metadata.csv").write_text(rows)
        shutil.make_archive(str(folder / "train"), "zip", tmp_path / "unpacked")
    inputs, targets = pair(load(f"hf:{folder}", trusted=True), "train")
    assert np.array_equal(inputs, pixels.transpose(0, 3, 1, 2))
    assert targets == [0, 1]


# Language


def test_text_is_its_own_target_the_rows_joined_end_to_end(tmp_path: Path) -> None:
    spec = saved(tmp_path, table(text=["= Title =\n", "", "words, words\n"], label=[0, 1, 0]))
    data = load(f"{spec},context=8", trusted=False)
    assert data.task == "language"
    ids = list(b"= Title =\nwords, words\n")
    inputs, targets = pair(data)
    assert inputs.tolist() == [ids[:8], ids[8:16], [*ids[16:], 0]]
    assert targets == [ids[:8], ids[8:16], [*ids[16:], -100]]
    inputs, _ = pair(load(spec, trusted=False))
    assert inputs.tolist() == [ids]


def test_text_is_tokenised_row_by_row(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "<pad>": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "tokens")
    texts = ["a b", "b", "c a b"] * 1001
    spec = saved(tmp_path, table(text=texts))
    data = load(f"{spec},tokenizer={tmp_path / 'tokens'},context=4", trusted=False)
    inputs, targets = pair(data)
    ids = [{"a": 1, "b": 2, "c": 0}[word] for text in texts for word in text.split()]
    assert len(ids) % 4 == 2
    assert inputs.flatten().tolist() == [*ids, 3, 3]
    assert np.array(targets).flatten().tolist() == [*ids, -100, -100]


TOKENS = [[5, 6, 7], [8], [9, 10]]


def test_sequences_of_tokens_are_padded_and_predict_themselves(tmp_path: Path) -> None:
    data = load(saved(tmp_path, table(input_ids=TOKENS)), trusted=False)
    assert data.task == "language"
    inputs, targets = pair(data)
    assert inputs.tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]
    assert targets == [[5, 6, 7], [8, -100, -100], [9, 10, -100]]


def test_a_mask_goes_with_the_tokens_and_out_of_the_targets(tmp_path: Path) -> None:
    spec = saved(
        tmp_path,
        table(
            attention_mask=[[1, 1, 0], [1], [0, 1]],
            input_ids=TOKENS,
            token_type_ids=[[0, 1, 1], [1], [0, 0]],
        ),
    )
    inputs, targets = examples(load(spec, trusted=False))
    assert isinstance(inputs, dict)
    assert {key: value.tolist() for key, value in inputs.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0], [9, 10, 0]],
        "attention_mask": [[1, 1, 0], [1, 0, 0], [0, 1, 0]],
        "token_type_ids": [[0, 1, 1], [1, 0, 0], [0, 0, 0]],
    }
    expected = [[5, 6, -100], [8, -100, -100], [-100, 10, -100]]
    assert targets.tolist() == expected
    # For models that take token ids and nothing else.
    inputs, targets = examples(load(f"{spec},inputs=input_ids", trusted=False))
    assert isinstance(inputs, Tensor)
    assert inputs.tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]
    assert targets.tolist() == expected


def test_labels_say_what_is_predicted(tmp_path: Path) -> None:
    labels = [[-100, 6, 7], [8], [-100, -100]]
    data = load(saved(tmp_path, table(input_ids=TOKENS, labels=labels)), trusted=False)
    assert data.task == "language"
    inputs, targets = pair(data)
    assert inputs.tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]
    assert targets == [[-100, 6, 7], [8, -100, -100], [-100, -100, -100]]


def test_sequences_with_one_label_each_are_classified(tmp_path: Path) -> None:
    whole = table(input_ids=TOKENS, attention_mask=[[1] * len(t) for t in TOKENS], label=[1, 0, 1])
    data = load(saved(tmp_path, whole), trusted=False)
    assert data.task == "classification"
    inputs, targets = examples(data)
    assert isinstance(inputs, dict)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert targets.tolist() == [1, 0, 1]


# The command line


def run(losscli: Losscli, spec: str) -> Outcome:
    return losscli(
        *("interpolate", "a.pt", "b.pt", "-d", spec, "--points", 3, "--range", 0, 1),
        *("--no-figure", "-o", "-", "--dtype", "float64"),
    )


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_curve_has_the_plain_loss_at_its_end(
    task: str, losscli: Losscli, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    x = GENERATOR.standard_normal((8, 6))
    y: Any = (np.arange(8) % 3) if task == "classification" else GENERATOR.standard_normal((8, 3))
    saved(folder, datasets.DatasetDict(train=table(x=x.tolist(), y=y.tolist())))
    capfd.readouterr()
    outcome = run(losscli, "hf:saved")
    assert outcome.status == 0, outcome.stderr
    assert capfd.readouterr() == ("", "")
    header, first, *_ = (line.split(",") for line in outcome.stdout.splitlines())
    model = MLP("6-5-3").double()
    model.load_state_dict(torch.load(folder / "a.pt", weights_only=True)["state_dict"])
    with torch.no_grad():
        outputs = model(torch.from_numpy(x))
    loss = cross_entropy if task == "classification" else mse_loss
    expected = loss(outputs, torch.from_numpy(y)).item()
    assert float(first[header.index("loss")]) == pytest.approx(expected, rel=1e-12)


def test_a_name_in_a_losscli_toml_starts_at_its_folder(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(folder, table(x=[[0.5] * 6] * 3, y=[0, 1, 2]))
    (folder / "losscli.toml").write_text('data = "hf:saved"\n')
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    outcome = losscli(*(
        "interpolate",
        "../a.pt",
        "../b.pt",
        "--points",
        3,
        "--no-figure",
        "-o",
        "-",
    ))
    assert outcome.status == 0, outcome.stderr


def tamper(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def state_elsewhere(folder: Path) -> None:
    table(x=[[1]], y=[1]).save_to_disk(folder / "evil")
    tamper(folder / "evil" / "state.json", _data_files=[{"filename": "../secret/train/data.arrow"}])


def state_of_a_split_elsewhere(folder: Path) -> None:
    datasets.DatasetDict(train=table(x=[[1]], y=[1])).save_to_disk(folder / "evil")
    state = folder / "evil" / "train" / "state.json"
    tamper(state, _data_files=[{"filename": str(folder / "secret.arrow")}])


def state_names_a_pipe(folder: Path) -> None:
    table(x=[[1]], y=[1]).save_to_disk(folder / "evil")
    os.mkfifo(folder / "evil" / "pipe")
    tamper(folder / "evil" / "state.json", _data_files=[{"filename": "pipe"}])


def splits(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        datasets.DatasetDict(train=table(x=[[1]], y=[1])).save_to_disk(folder / "evil")
        tamper(folder / "evil" / "dataset_dict.json", splits=["train", name])

    return make


def card(settings: str, file: str = "README.md") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "evil").mkdir()
        (folder / "evil" / "train.csv").write_text("x,y\n1,1\n")
        text = f"configs:\n- config_name: default\n  {settings.format(folder)}\n"
        (folder / "evil" / file).write_text(f"---\n{text}---\n" if "md" in file else text)

    return make


def settings_are_a_pipe(folder: Path) -> None:
    (folder / "evil").mkdir()
    os.mkfifo(folder / "evil" / ".huggingface.yaml")


OUT, NETWORK = "points outside the folder, to '", "names a place on the network, '"


@pytest.mark.parametrize(
    ("make", "file", "expected"),
    [
        (state_elsewhere, "state.json", f"{OUT}../secret/train/data.arrow'. Correct state.json"),
        (state_of_a_split_elsewhere, "train/state.json", f"{OUT}/"),
        (state_names_a_pipe, "pipe", "is not a regular file"),
        (splits("../secret/train"), "dataset_dict.json", f"{OUT}../secret/train'"),
        (splits("x::http://127.0.0.1:9/"), "dataset_dict.json", NETWORK),
        (card('data_files: "../sec.csv"'), "README.md", f"{OUT}../sec.csv'"),
        (card('data_files: "**/../sec.csv"'), "README.md", f"{OUT}**/../sec.csv'"),
        (card('data_files: "{}/sec.csv"'), "README.md", OUT),
        (card('data_files: [{{split: a, path: ["../sec.csv"]}}]'), "README.md", OUT),
        (card('data_dir: ".."'), "README.md", f"{OUT}..'"),
        (card('data_files: "http://127.0.0.1:9/x.csv"'), "README.md", NETWORK),
        (card('data_files: [{{split: a, path: "hf://a/b"}}]'), "README.md", NETWORK),
        (card('data_files: "../sec.csv"', ".huggingface.yaml"), ".huggingface.yaml", OUT),
        (settings_are_a_pipe, ".huggingface.yaml", "is not a regular file"),
    ],
)
def test_a_folder_cannot_name_files_outside_it(
    make: Callable[[Path], None],
    file: str,
    expected: str,
    losscli: Losscli,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "sec.csv").write_text("x,y\n1,1\n")
    datasets.DatasetDict(train=table(x=[[1]], y=[1])).save_to_disk(folder / "secret")
    make(folder)
    for name in ("load_dataset", "load_from_disk"):
        monkeypatch.setattr(f"datasets.{name}", lambda *_, **__: pytest.fail("it is read"))
    outcome = run(losscli, "hf:evil")
    assert outcome.status == 1
    assert f"evil/{file} {expected}" in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert outcome.stdout == ""


def test_links_in_a_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_text("x,y\n1.5,1\n")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train.csv").symlink_to("../blobs/1")
    inputs, _ = pair(load(f"hf:{tmp_path / 'snapshot'}", trusted=True), "train")
    assert inputs.tolist() == [[1.5]]


def test_a_folder_is_read_off_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    (tmp_path / "train.csv").write_text("x,y\n1.5,1\n")
    seen = []

    def spy(path: str, *_: Any, **__: Any) -> Any:
        seen.append((path, datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE))
        return table(x=[[1.5]], y=[1])

    monkeypatch.setattr("datasets.load_dataset", spy)
    load(f"hf:{tmp_path}", trusted=True)
    assert seen == [(str(tmp_path), True, True)]
    assert (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE) == (False, False)


@pytest.mark.parametrize("place", ["metadata", "losscli.toml", "data.toml"])
def test_a_file_asks_nothing_of_the_hub(
    place: str, losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from safetensors.torch import save_file

    def asked(*_: Any, **__: Any) -> None:
        pytest.fail("the hub is asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", asked)
    monkeypatch.setattr("datasets.load_dataset", asked)
    spec = "hf:evil/data,config=b"
    first, option = "a.pt", []
    if place == "metadata":
        weights = torch.load(folder / "a.pt", weights_only=True)["state_dict"]
        save_file(weights, folder / "a.safetensors", {"losscli.data": spec})
        first = "a.safetensors"
    elif place == "losscli.toml":
        (folder / place).write_text(f'data = "{spec}"\n')
    else:
        (folder / place).write_text('name = "hf:evil/data"\nconfig = "b"\n')
        option = ["-d", place]
    outcome = losscli("interpolate", first, "b.pt", *option, "-m", "mlp:6-5-3", "-o", "-")
    assert outcome.status == 1
    assert f"names '{spec}', a data set on the hub" in outcome.stderr
    assert f"write --data {spec}" in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_a_hub_that_does_not_answer_is_reported_at_once(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def unreachable(self: Any, name: str, **options: Any) -> None:
        asked.append((name, options["timeout"]))
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits to try again"))
    before = set(folder.iterdir())
    for spec in ("hf:someone/numbers", "hf:numbers"):
        outcome = run(losscli, spec)
        assert outcome.status == 1
        assert f"{spec[3:]} is neither a local folder" in outcome.stderr
        assert "the hub cannot be reached" in outcome.stderr
        assert outcome.stderr.count("\n") == 1
    assert asked == [("someone/numbers", 10), ("numbers", 10)]
    assert datasets.config.HF_HUB_OFFLINE is False
    assert set(folder.iterdir()) == before


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("broken")
    datasets.disable_progress_bars()

    whole = table(
        {
            "x": datasets.Sequence(datasets.Value("float32")),
            "ragged": datasets.Sequence(datasets.Value("int64")),
            "missing": datasets.Value("float32"),
            "word": datasets.Value("string"),
            "picture": datasets.Image(),
            "number": datasets.Value("int64"),
            "point": {"a": datasets.Value("int64")},
        },
        x=[[1, 2], [3, 4]],
        ragged=[[1], [2, 3]],
        missing=[1, None],
        word=["a", None],
        picture=[Image.new("RGB", (4, 3)), Image.new("RGB", (3, 4))],
        number=[0, 1],
        point=[{"a": 1}, {"a": 2}],
    )
    saved(folder, whole)
    table(input_ids=[[1, 2], [3]], labels=[[1, 2], [3, 4]]).save_to_disk(folder / "uneven")
    table(input_ids=[["a"]]).save_to_disk(folder / "words")
    table(input_ids=[1, 2]).save_to_disk(folder / "flat")
    table(text=["", ""]).save_to_disk(folder / "silent")
    table(
        x=[0.5], label=["a"], words=[["a", "b"]], day=[datetime(2020, 1, 1)], raw=[b"ab"]
    ).save_to_disk(folder / "odd")
    table(x=[], y=[]).save_to_disk(folder / "bare")
    datasets.DatasetDict(train=table(x=[1], y=[1]), test=table(x=[], y=[])).save_to_disk(
        folder / "bares"
    )
    table(x=[[1]], y=[1]).filter(lambda _: False).save_to_disk(folder / "empty")
    table(
        {"img": datasets.Image(), "label": datasets.Value("int64")},
        img=[{"bytes": b"hello", "path": None}],
        label=[1],
    ).save_to_disk(folder / "noise")
    table(
        {"img": datasets.Image(), "label": datasets.Value("int64")}, img=[None], label=[1]
    ).save_to_disk(folder / "blank")
    (folder / "script").mkdir()
    (folder / "script" / "script.py").write_text("open('canary', 'w')\n")
    (folder / "nothing").mkdir()
    (folder / "cut").mkdir()
    (folder / "cut" / "state.json").write_text("{")
    for name in ("one", "two"):
        (folder / "several" / name).mkdir(parents=True)
        (folder / "several" / name / "train.csv").write_text("x,y\n1,1\n")
    (folder / "several" / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one/train.csv\n"
        "- config_name: two\n  data_files: two/train.csv\n---\n"
    )
    return folder


COLUMNS = "x, ragged, missing, word, picture, number, point"


@pytest.mark.parametrize(
    ("spec", "status", "expected"),
    [
        ("saved,inputs=z", 1, f"has no column 'z'. inputs= is one of {COLUMNS}"),
        ("saved,targets=3", 1, f"has no column '3'. targets= is one of {COLUMNS}"),
        ("saved", 1, f"has the columns {COLUMNS}. Choose one: targets=COLUMN"),
        ("saved,targets=number,inputs=ragged", 1, "the rows of 'ragged' differ in their length"),
        ("saved,targets=missing", 1, "'missing' has rows without a value"),
        ("saved,targets=word", 1, "'word' has rows without a value"),
        ("saved,targets=point", 1, "'point' contains values of the type struct, not numbers. Make"),
        (
            "odd,targets=label",
            1,
            "of the type string, not numbers. Number them with table.class_encode_column('label')",
        ),
        ("odd,targets=words", 1, "'words' contains values of the type string, not numbers"),
        (
            "odd,targets=day",
            1,
            "'day' contains values of the type timestamp[us], not numbers. Make",
        ),
        ("odd,targets=raw", 1, "'raw' contains values of the type binary, not numbers. Make them"),
        ("odd,inputs=raw,targets=x", 1, "'raw' contains values of the type binary, not numbers"),
        ("saved,inputs=word", 1, "'word' has rows without text"),
        ("saved,inputs=word,targets=number", 2, "'word' is text, which is its own target"),
        ("saved,inputs=picture,targets=number", 1, "row 1, 'picture' has 3 × 4 pixels"),
        ("saved,inputs=picture,targets=number,context=8", 2, "context= is for text"),
        ("saved,targets=number,size=8", 2, "size= is for images, and 'x' has none"),
        ("saved,targets=number,grayscale=true", 2, "grayscale= is for images"),
        ("saved,inputs=word,context=1", 2, "context=1 is not a number of tokens"),
        ("saved,inputs=word,tokenizer=none", 1, "there is no folder none of a tokenizer"),
        ("saved,config=one", 2, "saved has one configuration"),
        ("saved,columns=x", 2, "It takes inputs, targets, config"),
        ("uneven", 1, "the rows of 'labels' are not as long as those of 'input_ids'"),
        ("words", 1, "'input_ids' contains no lists of integers"),
        ("flat", 1, "'input_ids' contains no lists of integers"),
        ("silent", 1, "has no text"),
        ("empty", 1, "hf:empty, split 'data' is empty"),
        ("bare", 1, "is empty"),
        ("bares", 1, "is empty"),
        ("noise", 1, "row 0, 'img' is not an image"),
        ("blank", 1, "row 0, 'img' is not an image"),
        ("script", 1, "script cannot be read"),
        ("nothing", 1, "nothing cannot be read"),
        ("cut", 1, "cut cannot be read"),
        ("several", 1, "Write config=NAME"),
        ("several,config=three", 1, "three"),
        ("data.npz", 1, "data.npz is not a folder"),
        ("no where", 1, "there is no folder no where"),
        ("no/where/at/all", 1, "there is no folder no/where/at/all"),
    ],
)
def test_refusals(
    spec: str,
    status: int,
    expected: str,
    losscli: Losscli,
    folder: Path,
    broken: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for path in broken.iterdir():
        (folder / path.name).symlink_to(path)
    capfd.readouterr()
    outcome = run(losscli, f"hf:{spec}")
    assert outcome.status == status
    assert expected in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert outcome.stdout == ""
    assert not (folder / "canary").exists()
    assert not (broken / "script" / "canary").exists()
    assert capfd.readouterr() == ("", "")


def test_the_keys_are_listed(losscli: Losscli) -> None:
    outcome = losscli("list", "data")
    assert outcome.status == 0
    for line in (
        "cifar100:PATH,labels=fine",
        "imagefolder:PATH,size=,grayscale=false",
        "text:PATH,tokenizer=bytes,context=1024",
        "hf:PATH,inputs=,targets=,config=,size=,grayscale=,tokenizer=,context=,scale=",
    ):
        assert line in outcome.stdout.splitlines()


def test_without_the_library_the_extra_is_named(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    outcome = run(losscli, "hf:saved")
    assert outcome.status == 1
    assert "pip install 'losscli[hf]'" in outcome.stderr
    assert outcome.stderr.count("\n") == 1
