"""Which loss is taken, where it came from, and what is said where it may be the wrong one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import losscli as library
from losscli.cli import interpolate
from losscli.errors import LosscliError, LossError
from losscli.evaluation.losses.built_in import cross_entropy
from losscli.evaluation.losses.metrics import accuracy
from tests import oracle
from tests.cases import in_turn, sample
from tests.conftest import Losscli

ALPHAS = [0.0, 0.5, 1.0]


class Tagger(nn.Module):
    """Scores [N, *, V] for each token of inputs [N, *]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


def whole(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(3))


def checkpoints(folder: Path, make: Any) -> list[dict[str, Tensor]]:
    states = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        states.append(make().state_dict())
        torch.save(states[-1], folder / f"{name}.pt")
    return states


def line(folder: Path, model: nn.Module, inputs: Tensor, targets: Tensor, **more: Any) -> Any:
    return library.interpolate(
        folder / "a.pt",
        folder / "b.pt",
        model=model,
        data={"all": (inputs, targets)},
        points=3,
        range=(0.0, 1.0),
        **more,
    )


def truth(
    make: Any, states: list[dict[str, Tensor]], inputs: Tensor, targets: Tensor, loss: Any
) -> list[float]:
    return [
        oracle.mean(oracle.losses(make, oracle.blend(*states, x), inputs, targets, loss))
        for x in ALPHAS
    ]


def of_the_last(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, -2), targets.flatten())


def of_the_second(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores, targets)


def share_of_the_last(scores: Tensor, targets: Tensor) -> Tensor:
    return (scores.argmax(-1) == targets).double().mean()


def share_of_the_second(scores: Tensor, targets: Tensor) -> Tensor:
    return (scores.argmax(1) == targets).double().mean()


SHAPES = [((9, 5), 3), ((9, 5), 6), ((9, 2, 3), 3), ((9, 2, 3), 2), ((9, 3, 3), 4), ((9, 1), 3)]


@pytest.mark.parametrize(
    ("shape", "classes", "derivatives"),
    [
        *sample([(*shape, False) for shape in SHAPES], 0),
        *sample([(*shape, True) for shape in SHAPES], 1),
    ],
    ids=str,
)
def test_scores_of_tokens_are_read_along_their_last_dimension(
    tmp_path: Path, shape: tuple[int, ...], classes: int, *, derivatives: bool
) -> None:
    def make() -> nn.Module:
        return Tagger(classes)

    states = checkpoints(tmp_path, make)
    inputs, targets = whole(7, *shape), whole(classes, *shape)
    found = line(tmp_path, make(), inputs, targets, dtype="float64", derivatives=derivatives)
    expected = truth(make, states, inputs, targets, of_the_last)
    np.testing.assert_allclose(found.table["loss"], expected, rtol=1e-12)
    expected = truth(make, states, inputs, targets, share_of_the_last)
    np.testing.assert_allclose(found.table["accuracy"], expected, rtol=1e-6)
    if derivatives:
        alpha = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        a, b = ({name: t.double() for name, t in state.items()} for state in states)
        point = {name: a[name] + alpha * (b[name] - a[name]) for name in a}
        outputs = torch.func.functional_call(make().double(), point, inputs)
        (slope,) = torch.autograd.grad(of_the_last(outputs, targets), alpha)
        np.testing.assert_allclose(found.table["slope"][1], float(slope), rtol=1e-10)


@pytest.mark.parametrize("shape", [(9, 4), (9, 4, 4)], ids=str)
@pytest.mark.parametrize(
    ("loss", "per_example", "right"),
    [
        ("token_cross_entropy", of_the_last, share_of_the_last),
        ("cross_entropy,dim=-1", of_the_last, share_of_the_last),
        ("cross_entropy,dim=1", of_the_second, share_of_the_second),
    ],
)
def test_an_option_chooses_between_two_dimensions_of_classes_and_accuracy_follows(
    tmp_path: Path, shape: tuple[int, ...], loss: str, per_example: Any, right: Any
) -> None:
    def make() -> nn.Module:
        return Tagger(4)

    states = checkpoints(tmp_path, make)
    inputs, targets = whole(7, *shape), whole(4, *shape)
    with pytest.raises(LossError, match="in dimension 1 as well as in the last") as refused:
        line(tmp_path, make(), inputs, targets)
    assert "--loss cross_entropy,dim=1 for outputs [N, C, " in str(refused.value)
    assert "--loss token_cross_entropy for outputs [N, T" in str(refused.value)
    found = line(
        tmp_path, make(), inputs, targets, loss=loss, metric=("accuracy",), dtype="float64"
    )
    expected = truth(make, states, inputs, targets, per_example)
    np.testing.assert_allclose(found.table["loss"], expected, rtol=1e-12)
    expected = truth(make, states, inputs, targets, right)
    np.testing.assert_allclose(found.table["accuracy"], expected, rtol=1e-6)


def test_an_ambiguous_shape_is_refused_in_one_line_and_nothing_is_written(
    losscli: Losscli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints(tmp_path, lambda: Tagger(4))
    Path("mine.py").write_text(
        "import torch\n"
        "from tests.studies.test_task import Tagger, whole\n"
        "def net():\n    return Tagger(4)\n"
        "def data():\n    return {'all': (whole(7, 9, 4), whole(4, 9, 4))}\n"
    )
    before = sorted(tmp_path.iterdir())
    there = ("a.pt", "b.pt", "-m", "mine.py:net", "-d", "mine.py:data", "-o", "line")
    refused = losscli("interpolate", *there)
    assert refused.status == 1
    assert refused.stderr.count("\n") == 1
    assert "--loss token_cross_entropy" in refused.stderr
    assert sorted(p for p in tmp_path.iterdir() if p.name != "__pycache__") == before
    chosen = ("--loss", "cross_entropy,dim=1", "--points", 3, "--no-figure")
    done = losscli("interpolate", *there, *chosen)
    assert done.status == 0
    assert json.loads(Path("line.json").read_text())["loss"] == "cross_entropy,dim=1"


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_of_tokens_are_compared_with_the_number_of_scores(
    tmp_path: Path, label: int
) -> None:
    checkpoints(tmp_path, lambda: Tagger(5))
    targets = whole(5, 9, 3)
    targets[7, 1] = label
    with pytest.raises(LossError, match=f"has the label {label}.*5 outputs.*labels 0 to 4"):
        line(tmp_path, Tagger(5), whole(7, 9, 3), targets)


def test_a_dimension_that_does_not_hold_classes_is_refused(tmp_path: Path) -> None:
    checkpoints(tmp_path, lambda: Tagger(5))
    with pytest.raises(LosscliError, match=r"dim=2 is not a dimension of classes\. Give dim=1"):
        line(tmp_path, Tagger(5), whole(7, 9, 3), whole(5, 9, 3), loss="cross_entropy,dim=2")


def test_the_curvature_of_scores_of_tokens_is_that_of_their_loss(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return Tagger(3)

    (state, _), inputs, targets = checkpoints(tmp_path, make), whole(7, 9, 5), whole(3, 9, 5)
    found = library.check(
        [tmp_path / "a.pt"], model=make(), data={"all": (inputs, targets)}, dtype="float64"
    )
    model = make().double()
    names = list(state)

    def loss(*values: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, dict(zip(names, values, strict=True)), inputs)
        return of_the_last(outputs, targets)

    values = tuple(state[name].double() for name in names)
    rows = torch.autograd.functional.hessian(loss, values)
    flat = torch.cat([
        torch.cat([block.reshape(v.numel(), -1) for block in row], 1)
        for v, row in zip(values, rows, strict=True)
    ])
    eigenvalues = torch.linalg.eigvalsh(flat)
    assert found.table["lambda_max"][0] == pytest.approx(float(eigenvalues[-1]), rel=1e-9)
    assert found.table["lambda_min"][0] == pytest.approx(float(eigenvalues[0]), rel=1e-9)


class Outputs(nn.Module):
    """Hands out a linear layer's outputs through a function of its own."""

    def __init__(self, number: int, function: Any = nn.Identity()) -> None:  # noqa: B008
        super().__init__()
        self.layer = nn.Linear(6, number)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


INPUTS = torch.randn(20, 6, generator=torch.Generator().manual_seed(4))
LABELS_OF_ONE = whole(2, 20).float()
LABELS_OF_MANY = whole(2, 20, 3).float()


def notes(
    folder: Path, targets: Tensor, make: Callable[[], nn.Module], **more: Any
) -> tuple[dict[str, Any], list[str]]:
    checkpoints(folder, make)
    found = line(folder, make(), INPUTS, targets, **more)
    return found.summary, found.summary["notes"]


@pytest.mark.parametrize(
    ("targets", "number"),
    [
        (LABELS_OF_MANY, 3),
        (LABELS_OF_ONE, 1),
        (LABELS_OF_ONE[:, None], 1),
        (LABELS_OF_MANY.double(), 3),
    ],
)
def test_float_targets_that_are_all_0_or_1_get_a_note_under_the_default_loss(
    tmp_path: Path, targets: Tensor, number: int
) -> None:
    _, reported = notes(tmp_path, targets, lambda: Outputs(number))
    assert any("all 0 or 1" in note and "give --loss bce" in note for note in reported)
    for chosen in ("mse", "bce"):
        assert not notes(tmp_path, targets, lambda: Outputs(number), loss=chosen)[1]


def test_one_hot_targets_get_a_note_under_the_default_loss(tmp_path: Path) -> None:
    targets = nn.functional.one_hot(whole(3, 20), 3).float()
    reported = notes(tmp_path, targets, lambda: Outputs(3))[1]
    assert any("one-hot" in note and "give --loss cross_entropy" in note for note in reported)
    assert not notes(tmp_path, targets, lambda: Outputs(3), loss="cross_entropy")[1]


@pytest.mark.parametrize(
    "targets", [LABELS_OF_ONE * 0.5, LABELS_OF_ONE * 0, LABELS_OF_ONE + 1, LABELS_OF_ONE - 1]
)
def test_other_float_targets_get_no_note(tmp_path: Path, targets: Tensor) -> None:
    assert not notes(tmp_path, targets, lambda: Outputs(1))[1]


@pytest.mark.parametrize(
    ("loss", "targets", "number", "function", "reported", "dtype"),
    in_turn(
        [
            ("bce", LABELS_OF_MANY, 3, torch.sigmoid, "bce takes scores before the sigmoid"),
            ("bce", LABELS_OF_ONE.long(), 1, torch.sigmoid, "bce takes scores before the sigmoid"),
            ("bce", LABELS_OF_MANY, 3, nn.Identity(), ""),
            ("bce", LABELS_OF_MANY, 3, lambda x: x * 0, ""),
            ("bce", LABELS_OF_MANY, 3, nn.LogSigmoid(), ""),
            ("cross_entropy", whole(3, 20), 3, nn.Softmax(1), "scores before the softmax"),
            (None, whole(3, 20), 3, nn.Softmax(1), "scores before the softmax"),
            (None, whole(3, 20), 3, nn.LogSoftmax(1), ""),
            (None, whole(3, 20), 3, torch.sigmoid, ""),
            (None, whole(3, 20), 3, nn.Identity(), ""),
            ("torch.nn:NLLLoss", whole(3, 20), 3, nn.Identity(), "give --loss cross_entropy"),
            ("torch.nn:NLLLoss", whole(3, 20), 3, nn.Softmax(1), "give --loss cross_entropy"),
            ("torch.nn:NLLLoss", whole(3, 20), 3, nn.LogSoftmax(1), ""),
            (
                "tests.studies.test_task:squares",
                LABELS_OF_ONE.long(),
                1,
                torch.sigmoid,
                "accuracy takes",
            ),
            ("tests.studies.test_task:squares", LABELS_OF_ONE.long(), 1, nn.Identity(), ""),
        ],
        "float32",
        "bfloat16",
    ),
)
def test_outputs_that_are_probabilities_already_get_a_note(
    tmp_path: Path,
    loss: str | None,
    targets: Tensor,
    number: int,
    function: Any,
    reported: str,
    dtype: str,
) -> None:
    _, found = notes(tmp_path, targets, lambda: Outputs(number, function), loss=loss, dtype=dtype)
    about = [note for note in found if note.startswith("the outputs of the first batch")]
    assert len(about) == bool(reported)
    assert all(reported in note for note in about)


def test_probabilities_of_tokens_get_a_note(tmp_path: Path) -> None:
    class Softmax(Tagger):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens).softmax(-1)

    checkpoints(tmp_path, lambda: Softmax(5))
    inputs, targets = whole(7, 9, 3), whole(5, 9, 3)
    for loss in (None, "token_cross_entropy"):
        found = line(tmp_path, Softmax(5), inputs, targets, loss=loss).summary["notes"]
        assert ["before the softmax" in note for note in found] == [True]


IGNORED = torch.where(whole(2, 9, 3) == 0, -100, whole(7, 9, 3))


@pytest.mark.parametrize(
    ("targets", "loss", "noted"),
    [
        (whole(7, 9, 3), None, True),
        (IGNORED, None, True),
        (whole(7, 9, 3), "cross_entropy", False),
        (whole(7, 9, 3).roll(-1, 1), None, False),
        (torch.full((9, 3), -100), None, False),
    ],
)
def test_targets_that_are_the_tokens_of_the_inputs_get_a_note(
    tmp_path: Path, targets: Tensor, loss: str | None, *, noted: bool
) -> None:
    checkpoints(tmp_path, lambda: Tagger(7))
    if (targets < 0).all():
        targets[0, 0] = (whole(7, 9, 3)[0, 0] + 1) % 7
    found = line(tmp_path, Tagger(7), whole(7, 9, 3), targets, loss=loss).summary["notes"]
    assert any("give --loss causal_lm" in note for note in found) is noted


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.squeeze(1) - targets).square()


@pytest.mark.parametrize("number", [1, 3])
def test_whole_numbers_with_one_output_each_name_the_losses_that_take_them(
    tmp_path: Path, number: int
) -> None:
    shape = (20, 3) if number == 3 else (20,)
    with pytest.raises(LossError, match="Give --loss mse for targets that are quantities"):
        notes(tmp_path, whole(9, *shape), lambda: Outputs(number))
    with pytest.raises(LossError, match="Give --loss bce for labels 0 and 1, or --loss mse"):
        notes(tmp_path, whole(2, *shape), lambda: Outputs(number))
    with pytest.raises(LossError, match="needs a score for each class"):
        # One class is no choice, and its cross-entropy is 0 whatever the weights.
        notes(tmp_path, torch.zeros(shape, dtype=torch.int64), lambda: Outputs(number))
    summary, reported = notes(tmp_path, whole(9, *shape), lambda: Outputs(number), loss="mse")
    assert summary["metrics"] == []
    assert summary["sources"] == {"loss": "--loss", "metrics": "default for integer targets"}
    assert "accuracy is left out: the loss is not one of classification" in reported


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_one_channel_fits_targets_without_it(tmp_path: Path, loss: str) -> None:
    def make() -> nn.Module:
        return nn.Conv2d(2, 1, 3)

    states = checkpoints(tmp_path, make)
    generator = torch.Generator().manual_seed(5)
    inputs, targets = torch.randn(9, 2, 6, 6, generator=generator), whole(2, 9, 4, 4)
    found = line(tmp_path, make(), inputs, targets, loss=loss, dtype="float64")

    def by_hand(scores: Tensor, targets: Tensor) -> Tensor:
        if loss == "mse":
            return F.mse_loss(scores[:, 0], targets.double())
        return F.binary_cross_entropy_with_logits(scores[:, 0], targets.double())

    expected = truth(make, states, inputs, targets, by_hand)
    np.testing.assert_allclose(found.table["loss"], expected, rtol=1e-12)


COMMANDS = [
    ("interpolate", ("a.pt", "b.pt", "--points", 3)),
    ("trajectory", ("init:5", "a.pt", "b.pt", "--no-surface")),
    ("plane", ("a.pt", "--points", 2)),
    ("barriers", ("a.pt", "b.pt", "--points", 3)),
    ("check", ("a.pt", "--only", "layers.1.bias", "--split", "test")),
    ("interpolate", ("a.pt", "b.pt", "--dry-run")),
    ("sharpness", ("a.pt", "--samples", 1, "--split", "test")),
]
PLACES = ("default for integer targets", "--loss", "losscli.toml", "checkpoint metadata")


@pytest.mark.parametrize(("command", "arguments", "place"), in_turn(COMMANDS, *PLACES))
def test_every_study_names_its_loss_and_where_it_came_from(
    losscli: Losscli, folder: Path, command: str, arguments: tuple[object, ...], place: str
) -> None:
    more, source = [], place
    loss, metrics = "cross_entropy", "accuracy (default for integer targets)"
    if place == "--loss":
        more, metrics = ["--loss", loss, "--metric", "none"], "none (--metric)"
    elif place == "losscli.toml":
        loss, source = "cross_entropy,dim=1", str(folder / place)
        Path(place).write_text(f'{Path(place).read_text()}loss = "{loss}"\n')
    elif place == "checkpoint metadata":
        for name in "ab":
            content = torch.load(f"{name}.pt")
            torch.save({**content, "losscli.loss": loss}, f"{name}.pt")
    done = losscli(command, *arguments, "-o", "out", "--no-figure", *more)
    assert done.status == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    if "--dry-run" not in arguments:
        lines = lines[:2]
        assert json.loads(Path("out.json").read_text())["sources"]["loss"] == source
    assert f"loss {loss} ({source})" in lines
    assert (f"metrics {metrics}" in lines) == (command not in {"check", "sharpness"})


def test_the_source_of_the_loss_does_not_identify_a_run(losscli: Losscli, folder: Path) -> None:
    arguments = ("interpolate", "a.pt", "b.pt", "--points", 3, "-o", "out", "--no-figure")
    assert losscli(*arguments).status == 0
    again = losscli(*arguments, "--loss", "cross_entropy", "--metric", "accuracy")
    assert again.status == 0, again.stderr


def test_the_list_of_losses_says_that_bce_takes_scores_before_the_sigmoid(losscli: Losscli) -> None:
    assert "scores before the sigmoid" in losscli("list", "losses").stdout


def sure(folder: Path, gap: float, losscli: Losscli, *more: object) -> tuple[str, dict[str, Any]]:
    """Runs a classifier with the scores 0 and α · gap."""
    for name, weight in (("a", 0.0), ("b", gap)):
        torch.save({"weight": torch.tensor([[0.0], [weight]])}, f"{name}.pt")
    Path("mine.py").write_text(
        "import torch\n"
        "def data():\n    return {'all': (torch.ones(5, 1), torch.ones(5, dtype=torch.int64))}\n"
    )
    model = "torch.nn:Linear,in_features=1,out_features=2,bias=false"
    arguments = ("-m", model, "-d", "mine.py:data", "-o", "out", "--no-figure", "--force")
    done = losscli(*more, *arguments)
    assert done.status == 0, done.stderr
    return done.stdout, json.loads((folder / "out.json").read_text())["splits"]["all"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_very_small_loss_is_never_rounded_to_zero(
    losscli: Losscli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ("interpolate", "a.pt", "b.pt", "--range", 0, 8, "--points", 17, "--dtype", dtype)
    text, split = sure(tmp_path, 8.0, losscli, *line)
    rows = [row.split(",") for row in Path("out.csv").read_text().splitlines()[1:]]
    found = [float(loss) for _, _, loss, *_ in rows]
    expected = [float(np.logaddexp(0, -8 * float(alpha))) for alpha, *_ in rows]
    assert expected[-1] < 1e-27
    np.testing.assert_allclose(found, expected, rtol=1e-7 if dtype == "float32" else 1e-15)
    assert split["minimum"]["ties"] == 1
    assert "lowest seen   1.604e-28 at α = 8, " in text


@pytest.mark.parametrize(
    ("command", "reported", "ties"),
    [
        (("interpolate", "a.pt", "b.pt", "--range", 0, 2, "--points", 5), "at α = 0.5", 4),
        (("trajectory", "a.pt", "b.pt", "b.pt", "b.pt"), "at checkpoint 2 of 4", 3),
        (("plane", "b.pt", "--points", 3), "of the plane", 6),
    ],
)
def test_points_as_low_as_the_lowest_are_reported(
    losscli: Losscli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[object, ...],
    reported: str,
    ties: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    text, split = sure(tmp_path, 1e4, losscli, *command)
    low = split["minimum" if command[0] == "interpolate" else "lowest"]
    assert (low["loss"], low["ties"]) == (0.0, ties)
    assert reported in text
    assert f"shared by {ties} points" in text
    if command[0] == "interpolate":
        where = ("--best", "all", "--csv", "out.csv", "-o", "best.safetensors")
        done = losscli("export", "a.pt", "b.pt", *where)
        assert "α = 0.5" in done.stderr
        assert f": 0, shared by {ties} points" in done.stderr


def test_points_of_a_block_as_low_as_its_lowest_are_reported(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False))

    for name, weight, scale in (("a", 0.0, 1.0), ("b", 1e4, 2.0)):
        state = {"0.weight": torch.tensor([[0.0], [weight]]), "1.weight": scale * torch.eye(2)}
        torch.save(state, tmp_path / f"{name}.pt")
    inputs, targets = torch.ones(5, 1), torch.ones(5, dtype=torch.int64)
    found = library.interpolate(
        tmp_path / "a.pt",
        tmp_path / "b.pt",
        model=make(),
        data={"all": (inputs, targets)},
        points=5,
        range=(0.0, 2.0),
        layerwise=True,
    )
    low = found.summary["blocks"]["0"]["splits"]["all"]["minimum"]
    assert (low["alpha"], low["loss"], low["ties"]) == (0.5, 0.0, 4)
    assert "0 at α = 0.5 and 3 more" in interpolate.report(found)


# --- Probabilities, ranges and what spoils a metric -----------------------------------------------


def between(
    folder: Path, build: Callable[[], nn.Module], inputs: Tensor, targets: Tensor, **more: Any
) -> Any:
    """The line between two random networks."""
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        torch.save(build().state_dict(), folder / f"{name}.pt")
    return line(folder, build(), inputs, targets, **more)


def soft(*shape: int) -> Tensor:
    """Probabilities along the last dimension."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(3).softmax(-1)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": [0.2, 1.0, 3.0]}])
@pytest.mark.parametrize(
    ("dim", "place"), [(None, "first"), (1, "first"), (None, "last"), (-1, "last"), (None, "flat")]
)
def test_probabilities_are_read_along_the_dimension_of_the_classes(
    dim: int | None, place: str, options: dict[str, Any]
) -> None:
    shares = soft(5, 3) if place == "flat" else soft(5, 4, 3)
    scores = torch.randn(shares.shape, generator=torch.Generator().manual_seed(4)).double()
    flat = dict(options)
    if "weight" in flat:
        flat["weight"] = torch.tensor(flat["weight"], dtype=torch.float64)
    expected = F.cross_entropy(
        scores.reshape(-1, 3), shares.reshape(-1, 3), reduction="none", **flat
    )
    expected = expected.view(shares.shape[:-1]).reshape(5, -1).mean(1)
    if place == "first":
        shares, scores = shares.movedim(-1, 1), scores.movedim(-1, 1)
    found = cross_entropy(scores, shares, dim=dim, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    answers = accuracy(scores, shares, dim=dim, soft=True)
    own = -1 if place != "first" else 1
    right = (scores.argmax(own) == shares.argmax(own)).double().reshape(5, -1).mean(1)
    torch.testing.assert_close(answers.double(), right, rtol=1e-6, atol=0)


def test_accuracy_with_probabilities_is_that_of_the_most_probable_class(tmp_path: Path) -> None:
    inputs, shares = torch.randn(20, 4), soft(20, 3)
    result = between(
        tmp_path, lambda: nn.Linear(4, 3), inputs, shares, loss="cross_entropy", metric="accuracy"
    )
    state = torch.load(tmp_path / "a.pt")
    right = (F.linear(inputs, *state.values()).argmax(1) == shares.argmax(1)).double().mean()
    assert result.table["accuracy"][result.table["alpha"].index(0)] == pytest.approx(float(right))


@pytest.mark.parametrize(
    ("loss", "targets", "reported"),
    [
        ("bce", torch.tensor([[0.0, 1.0, -100.0]] * 9), "the target -100, and bce takes"),
        ("bce", torch.tensor([[0, 1, 255]] * 9), "the target 255, and bce takes"),
        ("bce", torch.tensor([[-1.0, 1.0, 1.0]] * 9), "the target -1, and bce takes"),
        ("cross_entropy", torch.tensor([[0.5, 0.8, -0.3]] * 9), "and cross_entropy takes"),
    ],
)
def test_targets_that_are_not_probabilities_are_refused(
    loss: str, targets: Tensor, reported: str, tmp_path: Path
) -> None:
    with pytest.raises(
        LossError, match=f"the split 'all' has .*{reported} probabilities from 0 to 1"
    ):
        between(tmp_path, lambda: nn.Linear(4, 3), torch.randn(9, 4), targets, loss=loss)


def test_a_loss_that_modifies_the_outputs_does_not_change_the_metrics(tmp_path: Path) -> None:
    def negative(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.neg_().neg(), targets, reduction="none")

    inputs, targets = torch.randn(30, 4), torch.arange(30) % 3
    study = {"metric": "accuracy"}
    written = between(tmp_path, lambda: nn.Linear(4, 3), inputs, targets, loss=negative, **study)
    plain = between(tmp_path, lambda: nn.Linear(4, 3), inputs, targets, **study)
    assert written.table["accuracy"] == plain.table["accuracy"]
    assert written.table["loss"] == pytest.approx(plain.table["loss"], rel=1e-6)


def test_accuracy_is_left_out_if_targets_are_not_labels(tmp_path: Path) -> None:
    result = between(
        tmp_path, lambda: nn.Linear(4, 1), torch.randn(20, 4), whole(31, 20), loss=squares
    )
    assert result.summary["metrics"] == []
    assert "accuracy is left out: the targets are not the labels 0 and 1" in result.summary["notes"]


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(), nn.NLLLoss(), "torch.nn:CrossEntropyLoss", F.nll_loss]
)
def test_losses_of_torch_read_the_classes_where_torch_does(loss: Any, tmp_path: Path) -> None:
    inputs, targets = torch.randn(6, 4, 4), whole(4, 6, 4)
    found = between(tmp_path, lambda: nn.Linear(4, 4), inputs, targets, loss=loss, metric="none")
    state = torch.load(tmp_path / "a.pt")
    function = F.cross_entropy if "Cross" in str(loss) else F.nll_loss
    expected = function(F.linear(inputs, *state.values()), targets)
    assert found.table["loss"][found.table["alpha"].index(0)] == pytest.approx(
        float(expected), rel=1e-5
    )


@pytest.mark.parametrize("loss", [nn.SmoothL1Loss(), nn.BCEWithLogitsLoss(), nn.MSELoss()])
def test_losses_of_torch_take_the_logits_of_a_mapping(loss: Any, tmp_path: Path) -> None:
    class Wrapped(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

    inputs, targets = torch.randn(9, 4), torch.rand(9, 3)
    wrapped = between(tmp_path, lambda: Wrapped(4, 3), inputs, targets, loss=loss)
    plain = between(tmp_path, lambda: nn.Linear(4, 3), inputs, targets, loss=loss)
    assert wrapped.table["loss"] == plain.table["loss"]
