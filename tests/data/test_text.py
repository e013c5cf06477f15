"""Text: cut into sequences without a gap or an overlap, tokenised as the tokenizer does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from losscli.data import DataSet, Split, load
from tests.conftest import TRANSFORMERS_5, Losscli

TEXT = "The quick brown fox – très vite – jumps over\r\nthe lazy dog. 速い茶色の狐。\n" * 9


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that would begin every text with <s>, and whose model takes 8 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<end>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="<end>",
        pad_token="<pad>",
        model_max_length=8,
    ).save_pretrained(folder)
    return folder


def ids_of(tokenizer: Path, text: str) -> list[int]:
    """What the tokenizers library itself makes of a text."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return made.encode(text, add_special_tokens=False).ids


def cut(ids: list[int], context: int, padding: int) -> tuple[list[list[int]], list[list[int]]]:
    inputs, targets = [], []
    context = min(context, len(ids))
    for start in range(0, len(ids), context):
        row = ids[start : start + context]
        if len(row) == 1:
            continue
        empty = context - len(row)
        inputs.append(row + [padding] * empty)
        targets.append(row + [-100] * empty)
    return inputs, targets


def pair(data: DataSet, split: str = "data") -> tuple[list[list[int]], list[list[int]]]:
    examples = data.splits[split]
    assert isinstance(examples, Split)
    assert isinstance(examples.inputs, Tensor)
    assert examples.inputs.dtype == examples.targets.dtype == torch.int64
    return examples.inputs.tolist(), examples.targets.tolist()


@pytest.mark.parametrize("context", [2, 3, 5, 6, 7, 40, 41, 42, 10**30])
def test_bytes_are_cut_without_gap_or_overlap(context: int, tmp_path: Path) -> None:
    content = bytes(range(256))[-41:]
    (tmp_path / "a.bin").write_bytes(content)
    data = load(f"text:{tmp_path}/a.bin,tokenizer=bytes,context={context}", trusted=False)
    assert data.task == "language"
    assert list(data.splits) == ["data"]
    assert pair(data) == cut(list(content), context, 0)


def test_bytes_and_1024_of_them_are_the_default(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.encode() * 5)
    assert pair(load(f"text:{tmp_path}/a.txt", trusted=False)) == cut(
        list(TEXT.encode() * 5), 1024, 0
    )


def test_each_split_is_as_long_as_it_needs(tmp_path: Path) -> None:
    for name, length in (("train", 40), ("test", 7)):
        (tmp_path / f"{name}.txt").write_bytes(bytes(range(length)))
    data = load(f"text:{tmp_path},context=16", trusted=False)
    for name, length in (("train", 40), ("test", 7)):
        assert pair(data, name) == cut(list(range(length)), 16, 0)


@pytest.mark.parametrize("keys", ["mean=0.5", "std=2", "flatten=true"])
def test_tokens_are_not_scaled(keys: str, losscli: Losscli, folder: Path) -> None:
    (folder / "a.txt").write_text(TEXT)
    before = set(folder.iterdir())
    outcome = losscli("interpolate", "a.pt", "b.pt", "-d", f"text:a.txt,{keys}")
    assert outcome.status == 2
    assert "the inputs are whole numbers such as token ids, which stay as" in outcome.stderr
    assert outcome.stderr.endswith(f"Leave out {keys.partition('=')[0]}=\n")
    assert outcome.stderr.count("\n") == 1
    assert set(folder.iterdir()) == before


def test_a_tokenizer_gives_its_tokens_and_no_special_ones(
    tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    data = load(f"text:{tmp_path}/a.txt,tokenizer={tokenizer},context=16", trusted=False)
    ids = ids_of(tokenizer, TEXT)
    assert len(ids) > 100
    assert not {0, 1, 2} & set(ids)
    assert pair(data) == cut(ids, 16, 2)
    assert data.task == "language"
    assert capfd.readouterr() == ("", "")  # the text is longer than the model's 8 tokens


def test_special_tokens_that_stand_in_the_text_are_read_as_such(
    tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("quick<end>brown")
    data = load(f"text:{tmp_path}/a.txt,tokenizer={tokenizer},context=64", trusted=False)
    (row,), (targets,) = pair(data)
    ids = [*ids_of(tokenizer, "quick"), 1, *ids_of(tokenizer, "brown")]
    assert row == targets == ids


def test_a_folder_of_text_files_is_its_splits(tmp_path: Path) -> None:
    for name in ("dev.txt", "train.txt", "test.txt", "README.md"):
        (tmp_path / name).write_text(name)
    data = load(f"text:{tmp_path},context=4", trusted=False)
    assert list(data.splits) == ["train", "dev", "test"]
    for split in data.splits:
        assert pair(data, split) == cut(list(f"{split}.txt".encode()), 4, 0)


def test_relative_names_in_a_losscli_toml_start_at_its_folder(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "tokens").symlink_to(tokenizer)
    (tmp_path / "inner" / "a.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    data = load("text:a.txt,tokenizer=tokens,context=9", trusted=False, folder=tmp_path / "inner")
    ids = ids_of(tokenizer, (tmp_path / "inner" / "a.txt").read_bytes().decode())
    assert pair(data) == cut(ids, 9, 2)


def test_a_tokenizer_of_own_code_is_not_run(
    tokenizer: Path, losscli: Losscli, folder: Path
) -> None:
    own = folder / "tokens"
    own.mkdir()
    (own / "own.py").write_text(f"open({str(folder / 'canary')!r}, 'w')\nclass Own: pass\n")
    (own / "tokenizer_config.json").write_text(
        json.dumps({
            "tokenizer_class": "Own",
            "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]},
        })
    )
    (folder / "a.txt").write_text(TEXT)
    before = set(folder.iterdir())
    outcome = losscli("interpolate", "a.pt", "b.pt", "-d", "text:a.txt,tokenizer=tokens")
    assert outcome.status == 1
    assert "tokens contains no tokenizer that transformers can read" in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("spec", "status", "expected"),
    [
        ("text:none.txt", 1, "there is no text file none.txt"),
        ("text:nothing", 1, "nothing contains no text files"),
        (
            "text:huge.txt",
            1,
            "has 1,099,511,627,776 bytes, which take at least 8,796,093,022,208 in",
        ),
        ("text:empty.txt", 1, "empty.txt has no text. Two tokens are needed"),
        ("text:one.txt", 1, "one.txt has one token"),
        ("text:latin.txt,tokenizer=TOKENIZER", 1, "latin.txt is not UTF-8 text"),
        ("text:latin.txt,context=1", 2, "context=1 is not a number of tokens"),
        ("text:latin.txt,context=true", 2, "context=True is not a number of tokens"),
        ("text:latin.txt,context=2.5", 2, "context=2.5 is not a number of tokens"),
        ("text:latin.txt,context=long", 2, "context=long is not a number of tokens"),
        ("text:latin.txt,tokenizer=gpt2", 1, "there is no folder gpt2 of a tokenizer"),
        ("text:latin.txt,tokenizer=3", 1, "there is no folder 3 of a tokenizer"),
        ("text:latin.txt,tokenizer=nothing", 1, "nothing contains no tokenizer"),
        ("text:latin.txt,tokenizer=broken", 1, "broken contains no tokenizer"),
        ("text:latin.txt,tokens=8", 2, "It takes tokenizer, context, mean"),
        ("text", 2, "names no file"),
    ],
)
def test_refusals(
    spec: str, status: int, expected: str, tokenizer: Path, losscli: Losscli, folder: Path
) -> None:
    (folder / "nothing").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "tokenizer.json").write_text("{")
    with (folder / "huge.txt").open("wb") as huge:
        huge.truncate(1 << 40)
    (folder / "empty.txt").touch()
    (folder / "one.txt").write_text("1")
    (folder / "latin.txt").write_bytes("très".encode("latin-1"))
    before = set(folder.iterdir())
    spec = spec.replace("TOKENIZER", str(tokenizer))
    outcome = losscli("interpolate", "a.pt", "b.pt", "-d", spec)
    assert outcome.status == status
    assert expected in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert set(folder.iterdir()) == before


def test_without_transformers_the_extra_is_named(
    tokenizer: Path, losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (folder / "a.txt").write_text(TEXT)
    outcome = losscli("interpolate", "a.pt", "b.pt", "-d", f"text:a.txt,tokenizer={tokenizer}")
    assert outcome.status == 1
    assert "pip install 'losscli[hf]'" in outcome.stderr
    assert outcome.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("class_named", [False, True])
def test_a_folder_of_a_model_without_a_tokenizer_is_refused(
    kind: str, class_named: bool, losscli: Losscli, folder: Path
) -> None:
    # transformers makes one that knows no words.
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": kind}))
    if class_named:
        name = {"bert": "BertTokenizer", "gpt2": "GPT2Tokenizer"}[kind]
        config = json.dumps({"tokenizer_class": name})
        (folder / "model" / "tokenizer_config.json").write_text(config)
    (folder / "a.txt").write_text(TEXT)
    before = set(folder.iterdir())
    outcome = losscli("interpolate", "a.pt", "b.pt", "-d", "text:a.txt,tokenizer=model")
    assert outcome.status == 1
    # An older transformers refuses it by itself.
    told = ": none of tokenizer.json, vocab." if TRANSFORMERS_5 else " that transformers reads: "
    assert f"model contains no tokenizer{told}" in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert set(folder.iterdir()) == before


def test_a_tokenizer_that_has_no_words_to_read_needs_no_file(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "tokens")
    (tmp_path / "a.txt").write_text("ab")
    data = load(f"text:{tmp_path}/a.txt,tokenizer={tmp_path}/tokens,context=2", trusted=False)
    assert pair(data)[0] == [[ord("a") + 3, ord("b") + 3]]  # behind three special tokens
