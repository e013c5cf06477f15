"""Heads of transformers' models other than causal ones, against the loss that each has itself."""

from __future__ import annotations

import csv
import io
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from losscli.models import score_kind
from tests import oracle
from tests.cases import sample
from tests.conftest import Losscli
from tests.libraries import Library

transformers: Any = Library("transformers")

V, T, N, C = 23, 6, 5, 3
BERT = {
    "vocab_size": V, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 8, "max_position_embeddings": 8, "num_labels": C,
}  # fmt: skip
T5 = {"vocab_size": V, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
XLM = {"vocab_size": V, "emb_dim": 8, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 8}

MINE = f"""
import torch
def tokens(high={V}, length={T}, seed=1):
    return torch.randint(high, ({N}, length), generator=torch.Generator().manual_seed(seed))
def labels(high):
    y = tokens(high, seed=2)
    y[0, ::2] = -100
    y[1, 1:] = -100
    return y
def batch(high={V}, **more):
    mask = torch.ones({N}, {T}, dtype=torch.int64)
    mask[2, 4:] = 0
    return {{"input_ids": tokens(), "attention_mask": mask, "labels": labels(int(high)), **more}}
def data(high={V}):
    return {{"all": batch(high)}}
def blank():
    one = batch()
    one["labels"][:] = -100
    return {{"all": one}}
def decoding():
    one = batch(decoder_input_ids=tokens(seed=3)[:, :4])
    return {{"all": {{**one, "labels": labels({V})[:, :4]}}}}
def multi(count={C}, soft=True):
    y = torch.rand(({N}), int(count), generator=torch.Generator().manual_seed(4))
    y = y if soft else (y > 0.5).long()
    return {{"all": {{"input_ids": tokens(), "labels": y}}}}
def values():
    return {{"all": {{"input_ids": tokens(), "labels": multi(1)["all"]["labels"][:, 0]}}}}
def counts():
    return {{"all": {{"input_ids": tokens(), "labels": torch.arange({N})}}}}
def classes():
    return {{"all": {{**batch(), "labels": torch.arange({N}) % {C}}}}}
def own(outputs, targets):
    return outputs.start_logits.mean(1)
"""


def cls(name: str) -> Any:
    return getattr(transformers, name)


def config(name: str) -> Any:
    kind = cls(name).config_class
    more = T5 if kind is transformers.T5Config else XLM if "XLM" in name else BERT
    if "QuestionAnswering" in name:
        more = {**more, "num_labels": 2}  # the start and the end of an answer
    return kind(**more)


@cache
def state(name: str, seed: int) -> dict[str, Tensor]:
    """Weights; read only."""
    torch.manual_seed(seed)
    model: nn.Module = cls(name)(config(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return dict(model.state_dict())


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Data in code; the commands run beside it."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    code: dict[str, Any] = {}
    exec(MINE, code)
    return code


def save(name: str) -> tuple[str, str]:
    """Two folders as Hugging Face saves them."""
    for seed, folder in enumerate("ab"):
        model = cls(name)(config(name))
        model.load_state_dict(state(name, seed))
        model.save_pretrained(folder)
    return "a", "b"


def its_own(name: str, weights: dict[str, Tensor], batch: dict[str, Tensor]) -> list[float]:
    """The loss that the model gives itself, of each sequence alone."""
    model = cls(name)(config(name)).double().eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return [
            float(model(**{key: tensor[i : i + 1] for key, tensor in batch.items()}).loss)
            for i in range(N)
        ]


@pytest.mark.parametrize(
    ("name", "data", "loss"),
    [
        pytest.param(
            *("BertForTokenClassification", f"data,high={C}", "token_cross_entropy"),
            marks=pytest.mark.stress,
        ),
        pytest.param("BertForMaskedLM", "data", "token_cross_entropy", marks=pytest.mark.stress),
        pytest.param("XLMWithLMHeadModel", "data", "token_cross_entropy", marks=pytest.mark.stress),
        ("T5ForConditionalGeneration", "decoding", "token_cross_entropy"),
        ("BertLMHeadModel", "data", "causal_lm"),
    ],
)
def test_the_default_loss_is_that_of_the_model_itself(
    name: str, data: str, loss: str, mine: dict[str, Any], losscli: Losscli
) -> None:
    a, b = save(name)
    if loss == "causal_lm":
        Path("mine.py").write_text(MINE.replace("y[1, 1:]", "y[1, 2:]"))
        exec(Path("mine.py").read_text(), mine)
    # Not by its folder: XLM and BertLMHeadModel are not what their configs make by name alone.
    Path("net.py").write_text(
        f"import transformers as t\nc = t.AutoConfig.from_pretrained('a')\n"
        f"build = lambda: t.{name}(c)\n"
    )
    done = losscli(
        *("interpolate", a, b, "-m", "net.py:build", "-d", f"mine.py:{data}", "-q", "--json"),
        *("--no-figure",),
        *("--points", 3, "--range", 0, 1, "--dtype", "float64", "-o", "x", "--batch-size", 2),
    )
    assert done.status == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["loss"] == loss
    assert summary["metrics"] == (["perplexity"] if loss == "causal_lm" else [])
    function, _, high = data.partition(",high=")
    (batch,) = mine[function](*[int(high)] if high else []).values()
    rows = list(csv.DictReader(io.StringIO(Path("x.csv").read_text())))
    assert len(rows) == 3
    for row in rows:
        point = oracle.blend(state(name, 0), state(name, 1), float(row["alpha"]))
        losses = its_own(name, point, batch)
        assert float(row["loss"]) == pytest.approx(oracle.mean(losses), rel=1e-6)
        assert float(row["loss_stderr"]) == pytest.approx(oracle.standard_error(losses), rel=1e-5)


def test_a_model_outside_transformers_does_not_import_its_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As if another library had imported transformers, but not yet its models.
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils")
    assert score_kind(nn.Linear(2, 2)) == "next"
    assert "transformers.modeling_utils" not in sys.modules


def refused(losscli: Losscli, *options: Any, names: tuple[str, str] = ("a", "b")) -> str:
    done = losscli("interpolate", *names, *options, "-o", "x")
    assert (done.status, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert not list(Path().glob("x.*"))
    return done.stderr


def test_labels_that_the_loss_cannot_use_are_reported(losscli: Losscli) -> None:
    save("BertForTokenClassification")
    told = refused(losscli, "-d", "mine.py:data")
    assert f"and the model's {C} outputs stand for the labels 0 to {C - 1}" in told
    assert "has no target that counts" in refused(losscli, "-d", "mine.py:blank")
    # The first position has no token before it, and here it counts.
    done = losscli("interpolate", "a", "b", "-d", f"mine.py:data,high={C}", "-q", "-o", "-")
    assert done.status == 0, done.stderr


def test_an_unknown_head_needs_a_loss(losscli: Losscli) -> None:
    save("BertForQuestionAnswering")
    told = refused(losscli, "-d", "mine.py:data")
    assert "it is not known which tokens BertForQuestionAnswering scores. Give --loss" in told
    options = ("-d", "mine.py:data", "--loss", "mine.py:own", "--points", 2, "-o", "-")
    done = losscli("interpolate", "a", "b", *options)
    assert done.status == 0, done.stderr
    assert done.stdout.splitlines()[0] == "alpha,split,loss,loss_stderr"


def test_a_config_that_names_no_head_is_reported(losscli: Losscli) -> None:
    save("BertForSequenceClassification")
    for folder in "ab":
        file = Path(folder) / "config.json"
        content = json.loads(file.read_text())
        del content["architectures"]
        file.write_text(json.dumps(content))
    for data in ("data", "classes"):
        told = refused(losscli, "-d", f"mine.py:{data}")
        assert "Its config.json names no architecture with a head: name it there" in told


@pytest.mark.parametrize("value", [[None], "GPT2LMHeadModel", [["x"]], {"a": 1}, 3], ids=str)
def test_architectures_that_are_not_names_are_reported(value: Any, losscli: Losscli) -> None:
    save("BertForMaskedLM")
    file = Path("a/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": value}))
    told = refused(losscli, "-d", "mine.py:data")
    assert f"its architectures are {value!r}, which is not a list of names. Write the class" in told


def test_an_encoder_decoder_needs_decoder_input_ids(losscli: Losscli) -> None:
    save("T5ForConditionalGeneration")
    told = refused(losscli, "-d", "mine.py:data")
    assert "T5ForConditionalGeneration predicts from decoder_input_ids, and has none." in told
    assert "give --data of your own (path/to/file.py:callable)" in told
    # Where the loss is named, the model fails by itself.
    told = refused(losscli, "-d", "mine.py:data", "--loss", "token_cross_entropy")
    assert "the model fails on inputs of shape" in told
    assert "An encoder-decoder needs decoder_input_ids beside labels of their shape" in told


def test_sequences_longer_than_the_positions_of_a_model_are_reported(losscli: Losscli) -> None:
    shape = {"vocab_size": 260, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 8}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    )
    for folder in "ab":
        model.save_pretrained(folder)
    Path("t.txt").write_text("a text of more tokens than that")
    told = refused(losscli, "-d", "text:t.txt,context=16")
    assert "The model has 8 positions (n_positions in its config.json)" in told
    assert "sequences are of 16 tokens: give --data with context=8 or less" in told
    done = losscli("interpolate", "a", "b", "-d", "text:t.txt,context=8", "-q", "-o", "-")
    assert done.status == 0, done.stderr
    # Another failure of a model is not laid on the length.
    Path("t.txt").write_bytes(b"ab" * 8)
    small = Path("a/config.json").read_text().replace("260", "50")
    Path("c").mkdir()
    Path("c/config.json").write_text(small)
    told = refused(
        losscli,
        *("-d", "text:t.txt,context=8", "-m", "transformers:c"),
        names=("init:0", "init:1"),
    )
    assert "positions" not in told


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("GPT2LMHeadModel", "next"),
        ("LlamaForCausalLM", "next"),
        ("CTRLLMHeadModel", "next"),
        ("ReformerModelWithLMHead", "next"),
        ("LlavaForConditionalGeneration", "next"),
        ("XLNetLMHeadModel", "own"),
        ("FlaubertWithLMHeadModel", "own"),
        ("RobertaForMaskedLM", "own"),
        ("GPT2ForTokenClassification", "own"),
        ("BartForConditionalGeneration", "own"),
        ("BartForCausalLM", "next"),
        ("GPT2DoubleHeadsModel", "other"),
        ("BertForPreTraining", "other"),
        ("BertModel", "other"),
    ],
)
def test_the_scores_of_a_model_are_recognised_by_its_class(name: str, scores: str) -> None:
    kind = cls(name)

    class Own(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.config = kind.config_class()

    assert score_kind(Own()) == scores
    assert score_kind(nn.Linear(1, 1)) == "next"


LABELLED: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "several labels by the config": (
        {"problem_type": "multi_label_classification", "num_labels": C},
        *("multi", "bce", "none"),
    ),
    "several labels by the labels": ({"num_labels": C}, "multi", "bce", "none"),
    "as many labels as tokens": ({"num_labels": T}, f"multi,count={T}", "bce", "none"),
    "regression by the config": (
        {"problem_type": "regression", "num_labels": C},
        *("multi", "mse", "none"),
    ),
    "regression by one label": ({"num_labels": 1}, "values", "mse", "none"),
    "regression of whole numbers": ({"num_labels": 1}, "counts", "mse", "none"),
    "classes": ({"num_labels": C}, "classes", "cross_entropy", "accuracy"),
    "classes by the config": (
        {"problem_type": "single_label_classification", "num_labels": C},
        *("classes", "cross_entropy", "accuracy"),
    ),
}


@pytest.mark.parametrize("case", sample(LABELLED, 0))
def test_labels_are_scored_as_the_model_itself_scores_them(
    case: str, mine: dict[str, Any], losscli: Losscli
) -> None:
    more, data, loss, metric = LABELLED[case]
    states = []
    for seed, folder in enumerate("ab"):
        torch.manual_seed(seed)
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(**{**BERT, **more})
        )
        model.save_pretrained(folder)
        states.append(dict(model.state_dict()))
    done = losscli(
        *("interpolate", "a", "b", "-d", f"mine.py:{data}", "--json", "-o", "x", "--no-figure"),
        *("--points", 3, "--range", 0, 1, "--dtype", "float64", "--batch-size", 2),
    )
    assert done.status == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["loss"] == loss
    assert summary["metrics"] == ([] if metric == "none" else [metric])
    function, _, count = data.partition(",count=")
    (batch,) = mine[function](*[int(count)] if count else []).values()
    model = transformers.BertForSequenceClassification.from_pretrained("a").double().eval()
    for row in csv.DictReader(io.StringIO(Path("x.csv").read_text())):
        model.load_state_dict(oracle.blend(*states, float(row["alpha"])))
        with torch.no_grad():
            whole = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
            losses = [
                float(model(**{key: tensor[i : i + 1] for key, tensor in whole.items()}).loss)
                for i in range(N)
            ]
        assert float(row["loss"]) == pytest.approx(oracle.mean(losses), rel=1e-9)


def test_whole_numbers_are_several_labels_where_the_config_says_so(losscli: Losscli) -> None:
    found = []
    for soft in ("true", "false"):
        for folder in "ab":
            torch.manual_seed(ord(folder))
            config_ = transformers.BertConfig(**BERT, problem_type="multi_label_classification")
            transformers.BertForSequenceClassification(config_).save_pretrained(folder)
        done = losscli(
            *("interpolate", "a", "b", "-d", f"mine.py:multi,soft={soft}", "--points", 3),
            *("--json", "-o", soft, "--no-figure"),
        )
        assert done.status == 0, done.stderr
        found.append(json.loads(done.stdout)["loss"])
    assert found == ["bce", "bce"]
