"""Language models: a real GPT-2, a tiny one, from folder to table, against loops by hand."""

from __future__ import annotations

import builtins
import csv
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import losscli
from losscli.data import DataSet, Split
from losscli.errors import LossError
from losscli.evaluation import task_checks
from losscli.evaluation.losses.built_in import causal_lm
from losscli.evaluation.losses.metrics import perplexity
from losscli.evaluation.losses.targets import check_range
from losscli.evaluation.objective import Objective
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.strategy_choice import find_strategy
from losscli.evaluation.sweep import sweep
from losscli.evaluation.task_checks import check_task
from losscli.models import MODELS
from losscli.models.pretrained import build_pretrained
from losscli.weight_space.slices import Line
from tests import oracle
from tests.cases import sample
from tests.conftest import Losscli
from tests.libraries import Library

transformers: Any = Library("transformers")

V, T, N = 29, 7, 6
CONFIG = {"vocab_size": V, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}


def build() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIG, **ENDS))


@cache
def state(seed: int) -> dict[str, Tensor]:
    """Weights; read only."""
    torch.manual_seed(seed)
    # Larger than they are drawn, so that tokens are told from each other.
    return {name: 8 * tensor for name, tensor in build().state_dict().items()}


def tokens(number: int = N) -> Tensor:
    return torch.randint(V, (number, T), generator=torch.Generator().manual_seed(1))


def labels(number: int = N) -> Tensor:
    targets = tokens(number)
    targets[0, -2:] = -100
    targets[1, 1::2] = -100
    targets[2, 3] = V - 1
    return targets


DATA = f"""
import torch
def padded(number=6, high={V}):
    x = torch.randint({V}, (int(number), {T}), generator=torch.Generator().manual_seed(1))
    y = x.clone()
    y[0, -2:] = -100
    y[1, 1::2] = -100
    y[2, 3] = int(high) - 1
    return {{"all": (x, y)}}
def empty():
    x, y = padded()["all"]
    y[:, 1:] = -100
    return {{"all": (x, y)}}
"""


def by_hand(outputs: Any, targets: Tensor) -> Tensor:
    """One sequence: the mean over its tokens of −log softmax at the token that follows."""
    (scores,), (row,) = outputs.logits, targets.tolist()
    lost = [
        float(scores[t].logsumexp(0) - scores[t, row[t + 1]])
        for t in range(len(row) - 1)
        if row[t + 1] != -100
    ]
    return torch.tensor(math.fsum(lost) / len(lost), dtype=torch.float64)


def truth(alpha: float, targets: Tensor | None = None) -> list[float]:
    point = oracle.blend(state(0), state(1), alpha)
    targets = labels() if targets is None else targets
    return oracle.losses(build, point, tokens(len(targets)), targets, by_hand)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders as Hugging Face saves them."""
    folder = tmp_path_factory.mktemp("saved")
    for seed, name in enumerate("abc"):
        model = build()
        model.load_state_dict(state(seed))
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def folders(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The saved folders, and data in code; the commands run next to them."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "data.py").write_text(DATA)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


FILES = [f"{name}/model.safetensors" for name in "abc"]
LANGUAGE = ("-d", "data.py:padded", "--loss", "causal_lm", "-q", "-o", "-")


@pytest.mark.parametrize("named", [True, False])
def test_a_line_between_two_folders_is_that_of_a_plain_loop(
    named: bool, folders: Path, losscli: Losscli
) -> None:
    model = ("-m", "transformers:b") if named else ()
    done = losscli(
        *("interpolate", *FILES[:2], *model, *LANGUAGE),
        *("--dtype", "float64", "--points", 4, "--range", -0.5, 1),
    )
    assert done.status == 0, done.stderr
    found = rows(done.stdout)
    assert [float(row["alpha"]) for row in found] == [-0.5, 0, 0.5, 1]
    for row in found:
        losses = truth(float(row["alpha"]))
        assert float(row["loss"]) == pytest.approx(oracle.mean(losses), rel=1e-12)
        assert float(row["loss_stderr"]) == pytest.approx(oracle.standard_error(losses), rel=1e-10)
        assert float(row["perplexity"]) == pytest.approx(math.exp(oracle.mean(losses)), rel=1e-11)


def test_the_summary_says_where_the_model_came_from(folders: Path, losscli: Losscli) -> None:
    few = (*LANGUAGE[:-2], "--points", 2, "--no-figure", "-o", "x")
    done = losscli("interpolate", *FILES[:2], *few, "--json")
    told = json.loads(done.stdout)
    assert told["model"] == "transformers:a"
    assert told["metrics"] == ["perplexity"]
    # The nearest losscli.toml comes first, in the folder itself; one above it does not.
    Path("losscli.toml").write_text('model = "mlp:6-5-3"\n')
    assert losscli("interpolate", *FILES[:2], *few).status == 0
    Path("a/losscli.toml").write_text('model = "mlp:6-5-3"\n')
    done = losscli("interpolate", *FILES[:2], *LANGUAGE[:-2], "--dry-run")
    assert "The model is mlp:6-5-3" in done.stderr


def test_a_config_next_to_a_link_into_a_cache_is_found(folders: Path, losscli: Losscli) -> None:
    for name in "ab":
        blob = folders / f"blob-{name}" / "0123.safetensors"
        blob.parent.mkdir()
        (folders / name / "model.safetensors").rename(blob)
        (folders / name / "model.safetensors").symlink_to(blob)
    done = losscli("interpolate", *FILES[:2], *LANGUAGE, "--points", 2)
    assert done.status == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("trajectory", *FILES, "--no-surface"),
        ("plane", *FILES, "--points", 2),
        ("interpolate", *FILES[:2], "--points", 2, "--sampling-error", 1e-9),
        pytest.param(
            ("plane", FILES[0], "--points", 2, "--sampling-error", 1e-9), marks=pytest.mark.stress
        ),
    ],
    ids=lambda command: " ".join(map(str, command[::3])),
)
def test_perplexity_is_the_exponential_of_the_loss_in_every_table(
    command: tuple[Any, ...], folders: Path, losscli: Losscli
) -> None:
    # Of a sample more sequences than its first block has.
    number = "530" if "--sampling-error" in command else "6"
    done = losscli(*command, "-d", f"data.py:padded,number={number}", *LANGUAGE[2:])
    assert done.status == 0, done.stderr
    found = rows(done.stdout)
    assert len(found) > 1
    for row in found:
        assert row.get("examples", number) == number
        assert float(row["perplexity"]) == pytest.approx(math.exp(float(row["loss"])), rel=1e-12)


def test_an_initialisation_is_that_of_transformers_itself(folders: Path, losscli: Losscli) -> None:
    done = losscli("interpolate", "init:5", "init:6", "-m", "transformers:a", *LANGUAGE)
    found = {row["alpha"]: float(row["loss"]) for row in rows(done.stdout)}
    for alpha, seed in (("0.0", 5), ("1.0", 6)):
        torch.manual_seed(seed)
        config = transformers.AutoConfig.from_pretrained(folders / "a")
        drawn = transformers.AutoModelForCausalLM.from_config(config).state_dict()
        losses = oracle.losses(build, drawn, tokens(), labels(), by_hand)
        assert found[alpha] == pytest.approx(oracle.mean(losses), rel=1e-6)


def objective(**more: Any) -> Objective:
    data = DataSet({"all": Split({"input_ids": tokens()}, labels())}, language=True)
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float64, **more}
    return Objective(build(), causal_lm, {"perplexity": perplexity}, data, **options)


def line(start: dict[str, Tensor], end: dict[str, Tensor]) -> Line:
    # Of a tied tensor's names the last one moves.
    names = [name for name in start if name != "transformer.wte.weight"]
    assert "lm_head.weight" in names
    return Line({n: start[n] for n in names}, {n: end[n] for n in names})


@pytest.mark.parametrize(
    "way", [w for w in Strategy if w is not Strategy.THREADS], ids=lambda w: w.name
)
def test_tied_weights_move_as_one_in_every_way(way: Strategy) -> None:
    found = objective(batch_size=4)
    a, b = state(0), state(1)
    check_task(found, a)
    found.strategy = way
    alphas = [-0.5, 0.0, 0.3, 1.0]
    # On a CPU vmap cannot map fused attention, and this way is never chosen there.
    with sdpa_kernel(SDPBackend.MATH):
        evaluation = sweep(found, line(a, b), [(x,) for x in alphas])["all"]
    expected = torch.tensor([truth(x) for x in alphas], dtype=torch.float64)
    torch.testing.assert_close(evaluation.losses, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(evaluation.metrics["perplexity"], expected.mean(1))


def test_a_model_of_transformers_is_not_reloaded_at_every_point() -> None:
    found = objective()
    check_task(found, state(0))
    find_strategy(found, line(state(0), state(1)), [(x / 4,) for x in range(5)])
    assert (found.strategy or found.provisional) in {Strategy.SHARED, Strategy.BOUND}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), sample([("bfloat16", 0.05), ("float16", 5e-3)], 0, 2)
)
def test_half_precision_is_near_the_truth(
    dtype: str, tolerance: float, folders: Path, losscli: Losscli
) -> None:
    done = losscli("interpolate", *FILES[:2], *LANGUAGE, "--points", 2, "--dtype", dtype)
    assert done.status == 0, done.stderr
    for row in rows(done.stdout):
        if float(row["alpha"]) in {0, 1}:
            expected = oracle.mean(truth(float(row["alpha"])))
            assert float(row["loss"]) == pytest.approx(expected, rel=tolerance)


def test_half_precision_scores_are_not_copied_whole() -> None:
    found = objective(dtype=torch.bfloat16)
    inputs = {"input_ids": tokens()}
    assert found.forward(found.model, inputs).dtype == torch.bfloat16
    seen = []

    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs.dtype)
        return outputs.mean((1, 2))

    found.per_example(own, found.forward(found.model, inputs), labels(), "loss")
    assert seen == [torch.float32]


@pytest.mark.parametrize(("budget", "batch"), [(1 << 30, None), (4 * T * V * 4, 4), (1, 1)])
def test_the_batch_is_of_a_size_that_its_outputs_fit(
    budget: int, batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_checks, "_OUTPUTS", {"cpu": budget})
    found, before = objective(dtype=torch.float32), objective().batch_size
    check_task(found, state(0))
    assert found.batch_size == (batch or before)
    chosen = objective(batch_size=5)
    check_task(chosen, state(0))
    assert chosen.batch_size == 5
    expected = torch.tensor([truth(0.0)], dtype=torch.float32)
    torch.testing.assert_close(found.plain(state(0))["all"].losses, expected)


def test_the_default_loss_and_metric_of_language_are_its_own() -> None:

    torch.manual_seed(0)
    data = DataSet({"all": Split({"input_ids": tokens()}, labels())}, language=True)
    assert data.task == "language"
    found = losscli.interpolate("init:0", "init:1", model=build, data=data, points=2)
    assert found.summary["loss"] == "causal_lm"
    assert found.summary["metrics"] == ["perplexity"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("data.py:empty", "the split 'all' has no target that counts. Give data with other"),
        (f"data.py:padded,high={V + 1}", f"has the label {V}, and the model's {V} outputs stand"),
    ],
)
def test_tokens_without_a_loss_are_refused_before_the_run(
    data: str, message: str, folders: Path, losscli: Losscli
) -> None:
    done = losscli("interpolate", *FILES[:2], "-d", data, "--loss", "causal_lm", "-o", "x")
    assert done.status == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(folders.glob("x.*"))


def test_later_sequences_are_checked_too() -> None:
    found = objective()
    check_task(found, state(0))
    targets = labels()
    targets[3, 2] = V
    with pytest.raises(LossError, match=f"the data has the label {V}"):
        check_range(found.loss, targets, found.classes, "the data")


def test_a_sequence_without_a_token_to_predict_is_left_out_of_all_means() -> None:
    def found(keep: list[int], blank: int | None) -> losscli.Result:
        targets = labels()
        if blank is not None:
            targets[blank, 1:] = -100
        data = DataSet({"all": Split({"input_ids": tokens()[keep]}, targets[keep])}, language=True)
        torch.manual_seed(0)
        return losscli.interpolate(
            "init:1", "init:2", model=build, data=data, loss="causal_lm", points=3, dtype="float64"
        )

    without = found([i for i in range(N) if i != 4], None)
    left_out = found(list(range(N)), 4)
    for column in ("loss", "loss_stderr", "perplexity"):
        expected = without.table.floats(column)
        assert left_out.table.floats(column) == pytest.approx(expected, rel=1e-12)
    assert any("1 of 6 examples have no target that counts" in n for n in left_out.summary["notes"])


def config(folder: Path, **content: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("architecture", "kind", "more"),
    [
        ("GPT2LMHeadModel", "gpt2", CONFIG | ENDS),
        ("GPT2ForSequenceClassification", "gpt2", CONFIG | ENDS | {"pad_token_id": 0}),
        ("GPT2ForTokenClassification", "gpt2", CONFIG | ENDS),
        ("GPT2ForQuestionAnswering", "gpt2", CONFIG | ENDS),
        ("BertForMaskedLM", "bert", {"hidden_size": 8, "num_hidden_layers": 1}),
        ("ViTForImageClassification", "vit", {"hidden_size": 8, "num_hidden_layers": 1}),
        ("T5ForConditionalGeneration", "t5", {"d_model": 8, "num_layers": 1, "d_kv": 4}),
        (None, "gpt2", CONFIG | ENDS),
    ],
)
def test_the_head_is_the_one_in_the_config(
    architecture: str | None, kind: str, more: dict[str, Any], tmp_path: Path
) -> None:
    small = {"intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 11, "d_ff": 8}
    named = {"architectures": [architecture]} if architecture else {}
    # A type to store in is none to compute in, and kernels of a hub are not fetched.
    asked = {"dtype": "bfloat16", "attn_implementation": "kernels-community/flash-attn"}
    config(tmp_path / "m", model_type=kind, **{**small, **more}, **named, **asked)
    torch.manual_seed(0)
    model = MODELS["transformers"](tmp_path / "m")
    assert type(model).__name__ == (architecture or "GPT2Model")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation in {"sdpa", "eager"}
    assert not getattr(model.config, "use_cache", False)


REMOTE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


def test_code_of_a_folder_is_never_run(folders: Path, losscli: Losscli) -> None:
    # Known to transformers: its own class is taken.
    known = json.loads(Path("a/config.json").read_text())
    config(folders / "a", **{**known, "auto_map": REMOTE})
    Path("a/code.py").write_text("open('ran', 'w')\n")
    assert losscli("interpolate", *FILES[:2], *LANGUAGE, "--points", 2).status == 0
    config(folders / "a", **{**known, "auto_map": REMOTE, "model_type": "own"})
    done = losscli("interpolate", *FILES[:2], *LANGUAGE)
    assert done.status == 1
    assert "config.json names code to run: its model_type 'own' is not one of transf" in done.stderr
    assert "--model path/to/file.py:callable" in done.stderr
    assert not Path("ran").exists()


def test_layer_positions_and_labels_are_not_layer_counts(
    tmp_path: Path,
) -> None:
    content = {
        "model_type": "gpt2",
        "n_embd": 4,
        "n_head": 1,
        "n_layer": 1,
        "vocab_size": 3,
        "mlp_only_layers": list(range(90)),
        "label2id": {"tennis player": 5000, "layers": 6000},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = build_pretrained(tmp_path)
    assert sum(1 for name in model.state_dict() if name.endswith("attn.c_attn.weight")) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "own"}', "does not know the model_type 'own' of m/config.json. Try a new"),
        (
            '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 10000000}',
            "m/config.json asks for n_layer=10000000, more than the 2,000 of any model. Correct it",
        ),
        (
            '{"model_type": "swin", "depths": [1500, 1500]}',
            "m/config.json asks for depths=[1500, 1500], more than the 2,000 of any model",
        ),
        ("{", "m/config.json cannot be read: JSONDecodeError"),
        ("[]", "m/config.json has no model_type"),
        ('{"model_type": 3}', "m/config.json has no model_type"),
        ('{"model_type": "gpt2", "n_embd": 7}', "m/config.json does not define a model: "),
        (
            '{"model_type": "gpt2", "architectures": ["GPT2ForMaskedLM"]}',
            "transformers has no GPT2ForMaskedLM for the model_type 'gpt2'",
        ),
        (None, "m/config.json cannot be read: FileNotFoundError"),
    ],
)
def test_a_config_without_a_usable_model_is_refused_in_one_line(
    content: str | None, message: str, folders: Path, losscli: Losscli
) -> None:
    Path("m").mkdir()
    if content is not None:
        Path("m/config.json").write_text(content)
    done = losscli("interpolate", *FILES[:2], "-m", "transformers:m", *LANGUAGE[:-1], "x")
    assert done.status == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(folders.glob("x.*"))


def test_nothing_is_fetched_from_a_hub(folders: Path, losscli: Losscli) -> None:
    done = losscli("interpolate", *FILES[:2], "-m", "transformers:gpt2", *LANGUAGE)
    assert done.status == 1
    assert "there is no folder gpt2; models are not downloaded from a hub. Download" in done.stderr
    done = losscli("interpolate", *FILES[:2], "-m", "transformers", *LANGUAGE)
    assert done.status == 2
    assert "missing a required argument: 'folder'" in done.stderr


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real: Callable[..., Any] = builtins.__import__

    def missing(name: str, *more: Any, **kwargs: Any) -> Any:
        if name == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name=name)
        return real(name, *more, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    return


@pytest.mark.usefixtures("without_transformers")
def test_the_extra_is_named_where_transformers_is_missing(folders: Path, losscli: Losscli) -> None:
    done = losscli("interpolate", *FILES[:2], *LANGUAGE)
    assert done.status == 1
    assert "which is not installed" in done.stderr
    assert "pip install 'losscli[hf]'" in done.stderr


def test_two_folders_and_a_text_need_no_more(
    folders: Path, losscli: Losscli, caplog: pytest.LogCaptureFixture
) -> None:
    # Bytes stand for ids: of an alphabet that the small vocabulary has.
    text = bytes(int(i) for i in tokens(3).flatten()) + bytes([1, 2, 3])
    Path("corpus.txt").write_bytes(text)
    Path("a/config.json").write_text(
        Path("a/config.json").read_text().replace('"bos_token_id": 0', '"bos_token_id": 50256')
    )
    logger = transformers.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    done = losscli(
        *("interpolate", "a", "b", "-d", f"text:corpus.txt,context={T}", "-q", "-o", "-"),
        *("--dtype", "float64", "--points", 3, "--range", 0, 1),
    )
    logger.removeHandler(caplog.handler)
    assert done.status == 0, done.stderr
    last = torch.full((1, T), -100)
    last[0, :3] = torch.tensor([1, 2, 3])
    targets = torch.cat([tokens(3), last])
    ids = targets.clamp(min=0)
    for row in rows(done.stdout):
        point = oracle.blend(state(0), state(1), float(row["alpha"]))
        losses = oracle.losses(build, point, ids, targets, by_hand)
        assert float(row["loss"]) == pytest.approx(oracle.mean(losses), rel=1e-12)
        assert float(row["perplexity"]) == pytest.approx(math.exp(oracle.mean(losses)), rel=1e-11)
    # What transformers has to say of such a config is not for the reader of a curve.
    assert not caplog.records
