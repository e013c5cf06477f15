"""Losses and metrics as users give them: torch's own, with options, and where they do not apply."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import losscli
from losscli.data import DataSet, Split
from losscli.errors import LossError, SpecError
from losscli.evaluation.losses.built_in import (
    bce,
    causal_lm,
    cross_entropy,
    function_of,
    on_device,
    options_of,
    token_cross_entropy,
)
from losscli.evaluation.losses.metrics import accuracy
from losscli.evaluation.losses.torch_losses import from_torch
from losscli.evaluation.objective import Objective
from tests.cases import in_turn
from tests.conftest import Losscli

N, C = 24, 3


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int, high: int = C) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(2))


def run(
    loss: Any,
    targets: Tensor,
    *,
    outputs: int = C,
    build: Callable[[], nn.Module] | None = None,
    **more: Any,
) -> losscli.Result:
    given = {"model": build or (lambda: nn.Linear(4, outputs)), "data": {"all": (X, targets)}}
    given |= {"dtype": "float64", "points": 2, "range": (0, 1), **more}
    return losscli.interpolate("init:1", "init:2", loss=loss, **given)


X = random(N, 4)


def plain(outputs: int = C) -> Tensor:
    """What the plainly loaded float64 model gives at α = 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        found: Tensor = nn.Linear(4, outputs).double()(X.double())
    return found


REALS = torch.rand(N, C, generator=torch.Generator().manual_seed(5))
LABELS = classes(N)
ONE_TO_THREE = torch.arange(1.0, 4).double()

MEANS = {
    "CrossEntropyLoss": ("torch.nn:CrossEntropyLoss", nn.CrossEntropyLoss(), LABELS),
    "soft targets": ("torch.nn:CrossEntropyLoss", nn.CrossEntropyLoss(), REALS.softmax(1)),
    "smoothed": (
        "torch.nn:CrossEntropyLoss,label_smoothing=0.2",
        nn.CrossEntropyLoss(label_smoothing=0.2),
        LABELS,
    ),
    "NLLLoss": ("torch.nn:NLLLoss", nn.NLLLoss(), LABELS),
    "NLLLoss, weighted": (
        "torch.nn:NLLLoss,weight=0.5-2-3,ignore_index=0",
        nn.NLLLoss(torch.tensor([0.5, 2, 3]).double(), ignore_index=0),
        LABELS,
    ),
    "MSELoss": ("torch.nn:MSELoss", nn.MSELoss(), REALS),
    "L1Loss": ("torch.nn:L1Loss", nn.L1Loss(), REALS),
    "HuberLoss": ("torch.nn:HuberLoss,delta=0.3", nn.HuberLoss(delta=0.3), REALS),
    "BCEWithLogitsLoss": (
        "torch.nn:BCEWithLogitsLoss,pos_weight=1-2-3",
        nn.BCEWithLogitsLoss(pos_weight=ONE_TO_THREE),
        REALS,
    ),
    "one weight": (
        "torch.nn:BCEWithLogitsLoss,pos_weight=3",
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0).double()),
        REALS,
    ),
    "MultiMarginLoss": (
        "torch.nn:MultiMarginLoss,weight=1-2-3",
        nn.MultiMarginLoss(weight=ONE_TO_THREE),
        LABELS,
    ),
    "KLDivLoss": ("torch.nn:KLDivLoss", nn.KLDivLoss(), REALS.softmax(1)),
    "mse_loss": ("torch.nn.functional:mse_loss", F.mse_loss, REALS),
    "smooth_l1_loss": (
        "torch.nn.functional:smooth_l1_loss,beta=0.2",
        functools.partial(F.smooth_l1_loss, beta=0.2),
        REALS,
    ),
    "cross_entropy": ("torch.nn.functional:cross_entropy", F.cross_entropy, LABELS),
    "bce": ("bce,pos_weight=1-2-3", nn.BCEWithLogitsLoss(pos_weight=ONE_TO_THREE), REALS),
    "bce, weighted": ("bce,weight=1-2-3", nn.BCEWithLogitsLoss(weight=ONE_TO_THREE), REALS),
}  # fmt: skip


@pytest.mark.parametrize(("name", "form"), in_turn(MEANS, "spec", "not reduced", "object"))
@pytest.mark.filterwarnings("ignore:reduction")
def test_a_loss_of_torch_has_the_mean_of_torch(name: str, form: str) -> None:
    spec, loss, targets = MEANS[name]
    of_torch = spec.startswith("torch")
    given = {"spec": spec, "not reduced": spec + ",reduction=none" * of_torch, "object": loss}[form]
    real = targets.double() if targets.is_floating_point() else targets
    expected = float(loss(plain(), real))
    assert run(given, targets).table.floats("loss")[0] == pytest.approx(expected, rel=1e-12)


def test_an_object_of_torch_is_not_changed() -> None:
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.ones(C))
    run(loss, REALS)
    assert loss.reduction == "mean"
    assert loss.pos_weight is not None
    assert loss.pos_weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("torch.nn:MSELoss,reduction=sum", r"other means than a mean.*Give reduction=none"),
        ("torch.nn:MSELoss,size_average=false", "other means than a mean"),
        ("torch.nn.functional:mse_loss,reduction=sum", "other means than a mean"),
        ("torch.nn.functional:mse_loss,size_average=true", "other means than a mean"),
        (nn.L1Loss(reduction="sum"), "loss 'L1Loss' is reduced by other means"),
        ("torch.nn:MSELoss,foo=1", "unexpected keyword argument 'foo'. It takes reduction"),
        ("torch.nn.functional:l1_loss,foo=1", "unexpected keyword.*It takes .*reduction"),
        ("torch.nn:CrossEntropyLoss,weight=a", "weight"),
        (
            "cross_entropy,foo=1",
            "the key 'foo' is not known. It takes dim, weight, ignore_index, l",
        ),
        ("causal_lm,weight=1-2", "the key 'weight' is not known. It takes ignore_index, label_smo"),
        ("mse,weight=1-2", "the key 'weight' is not known. It takes no keys"),
        ("bce,ignore_index=1", "It takes weight, pos_weight"),
        (
            "cross_entropy,weight=0-0-0",
            "numbers from 0 up, not all of them 0. Write weight=0.2-1-5",
        ),
        ("cross_entropy,weight=a-b", "weight needs numbers from 0 up"),
        ("cross_entropy,weight=true", "weight needs numbers from 0 up"),
        ("cross_entropy,weight=-1", "weight needs numbers from 0 up"),
        ("torch.nn:CrossEntropyLoss,weight=0-0-0", "weight needs numbers from 0 up"),
        (nn.CrossEntropyLoss(torch.tensor([1.0, -1, 1])), "weight needs numbers from 0 up"),
        (nn.CrossEntropyLoss(torch.tensor([1.0, math.nan, 1])), "weight needs numbers from 0 up"),
        ("bce,pos_weight=-2", "pos_weight needs numbers from 0 up"),
        ("cross_entropy,ignore_index=0.5", "ignore_index needs a whole number"),
        ("cross_entropy,label_smoothing=1.5", "label_smoothing needs a number from 0 to 1"),
        ("cross_entropy,label_smoothing=true", "label_smoothing needs a number from 0 to 1"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(given: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        run(given, LABELS)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("given", "targets", "message"),
    [
        ("cross_entropy,weight=1-2", LABELS, "weight has 2 numbers, .* outputs for 3 classes"),
        ("torch.nn:CrossEntropyLoss,weight=1-2", LABELS, "weight has 2 numbers"),
        ("bce,pos_weight=1-2", REALS, r"pos_weight has 2 numbers.*outputs \[24, 3\]"),
    ],
)
def test_weights_of_another_number_of_classes_are_refused(
    given: str, targets: Tensor, message: str
) -> None:
    with pytest.raises(LossError, match=message):
        run(given, targets)


def test_weights_of_outputs_are_not_those_of_examples() -> None:
    # Over four examples torch would broadcast them.
    with pytest.raises(LossError, match="weight has 4 numbers"):
        bce(random(4), torch.zeros(4), weight=[1, 2, 3, 4])


def test_a_refused_loss_writes_nothing(folder: Path, losscli: Losscli) -> None:
    before = set(folder.iterdir())
    for loss, status in (("cross_entropy,foo=1", 2), ("cross_entropy,weight=1-2", 1)):
        done = losscli("interpolate", "a.pt", "b.pt", "--loss", loss, "-o", "x")
        assert (done.status, done.stderr.count("\n")) == (status, 1)
    assert set(folder.iterdir()) == before


def test_a_user_class_that_cannot_be_built_is_reported(folder: Path, losscli: Losscli) -> None:
    (folder / "mine.py").write_text("class Loss:\n    def __init__(self, x):\n        1 / x\n")
    done = losscli("interpolate", "a.pt", "b.pt", "--loss", "mine.py:Loss,x=0", "-o", "x")
    assert done.status == 1
    assert "loss 'mine.py:Loss,x=0' cannot be built: ZeroDivisionError" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("shape", [(N, 1), (N, 2, 3)])
def test_values_of_more_dimensions_are_averaged(shape: tuple[int, ...]) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        values = F.cross_entropy(outputs, targets, reduction="none")
        return values.view(-1, *[1] * (len(shape) - 1)).expand(len(values), *shape[1:])

    found = run(loss, LABELS).table.floats("loss")[0]
    assert found == pytest.approx(float(F.cross_entropy(plain(), LABELS)), rel=1e-12)


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square()


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [((N, 1), (N,)), ((N,), (N, 1)), ((N, 1, 5), (N, 5)), ((N, 1, 2, 5), (N, 2, 5))],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_examples_that_broadcasting_mixes_are_refused(
    outputs: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    objective = of(squared, torch.zeros(N))
    with pytest.raises(LossError, match="it pairs outputs with targets of other examples"):
        objective.per_example(squared, random(*outputs), random(*targets), "loss")
    own, _ = from_torch(nn.MSELoss(), {}, "loss")
    with pytest.raises(LossError, match="it pairs outputs with targets of other examples"):
        objective.per_example(own, random(*outputs), random(*targets), "loss")


@pytest.mark.parametrize(
    ("outputs", "targets"), [((N, N), (N, N)), ((N, N, 2), (N, N, 2)), ((N, N), (N, 1))], ids=str
)
def test_outputs_as_many_as_examples_are_one_per_example(
    outputs: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    y, t = random(*outputs), random(*targets, seed=3)
    found = of(squared, torch.zeros(N)).per_example(squared, y, t, "loss")
    assert torch.equal(found, (y - t).square().flatten(1).mean(1))


def of(loss: Any, targets: Tensor, metrics: Any = None, outputs: int = C, **more: Any) -> Objective:
    return Objective(
        nn.Linear(4, outputs),
        loss,
        metrics or {},
        DataSet({"all": Split(X, targets)}),
        device=torch.device("cpu"),
        dtype=torch.float64,
        **more,
    )


def test_smoothed_tokens_are_those_of_torch() -> None:
    scores, targets = random(5, 6, 7).double(), classes(5, 6, high=7)
    targets[0, ::2], targets[1, 1:] = -100, -100
    found = token_cross_entropy(
        scores, targets, weight=[1, 2, 3, 4, 5, 6, 7], ignore_index=3, label_smoothing=0.2
    )
    weight = torch.arange(1.0, 8).double()
    targets[targets == 3] = -100
    for i in range(5):
        one = F.cross_entropy(scores[i], targets[i], weight=weight, label_smoothing=0.2)
        torch.testing.assert_close(found[i], one.nan_to_num(), rtol=1e-12, atol=0)
        following = F.cross_entropy(scores[i, :-1], targets[i, 1:], label_smoothing=0.2)
        own = causal_lm(scores, targets, label_smoothing=0.2)[i]
        torch.testing.assert_close(own, following.nan_to_num(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [token_cross_entropy, causal_lm])
def test_a_sequence_without_targets_has_a_gradient_of_zero(loss: Any) -> None:
    scores = random(2, 4, 5).requires_grad_()
    targets = classes(2, 4, high=5)
    targets[1] = -100
    loss(scores, targets).sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert scores.grad[1].count_nonzero() == 0


# Metrics.


@pytest.mark.parametrize("shape", [(9, 4), (6, 4, 3, 5)], ids=str)
@pytest.mark.parametrize("void", [-100, 255, 2])
def test_accuracy_is_the_share_among_the_targets_that_count(
    shape: tuple[int, ...], void: int
) -> None:
    scores, targets = random(*shape), classes(shape[0], *shape[2:], high=4)
    targets.view(-1)[::3] = void
    targets[1] = void
    # Scores of a target that does not count do not matter.
    scores[1] = math.nan
    found = accuracy(scores, targets, ignore_index=void if void == 2 else None)
    for i in range(shape[0]):
        counts = targets[i] != void
        right = (scores[i].argmax(0) == targets[i])[counts].float()
        assert float(found[i]) == pytest.approx(float(right.mean()) if counts.any() else 0)


def test_examples_without_a_target_that_counts_are_left_out_of_the_accuracy() -> None:
    targets = LABELS.clone()
    targets[::4] = -100
    found = run("cross_entropy", targets).table.floats("accuracy")[0]
    kept = targets != -100
    right = plain().argmax(1)[kept] == targets[kept]
    assert found == pytest.approx(float(right.double().mean()), rel=1e-12)


def test_the_metric_ignores_what_the_loss_ignores() -> None:
    kept = LABELS != 1
    right = float((plain().argmax(1) == LABELS)[kept].double().mean())
    for metric in ((), ("accuracy",)):
        found = run("cross_entropy,ignore_index=1", LABELS, metric=metric)
        assert found.table.floats("accuracy")[0] == pytest.approx(right, rel=1e-12)


@pytest.mark.parametrize("outputs", [C, 1])
def test_the_accuracy_of_scores_that_are_not_numbers_is_not_one(outputs: int) -> None:
    scores = random(5, outputs)
    scores[2, 0] = math.nan
    targets = classes(5, high=2)
    assert accuracy(scores, targets).isnan().tolist() == [False, False, True, False, False]

    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * math.nan

    found = run("cross_entropy", LABELS, build=lambda: Broken(4, C))
    assert math.isnan(found.table.floats("accuracy")[0])


class Wrapped(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return {"out": super().forward(x)}


def of_dict(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return cross_entropy(outputs["out"], targets)


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.sum((1, 2)) * targets


class Flat(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1, 2, 3)


def one_output() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))


LEFT_OUT: dict[str, tuple[Any, Callable[[], nn.Module], str]] = {
    "mse": ("mse", lambda: nn.Linear(4, 1), "the loss is not one of classification"),
    "MSELoss": (nn.MSELoss(), one_output, "the loss is not one of classification"),
    "L1Loss": ("torch.nn:L1Loss", one_output, "the loss is not one of classification"),
    "a dict": (of_dict, lambda: Wrapped(4, C), "takes a tensor, and the model returns a dict"),
    "another shape": (summed, lambda: Flat(4, 6), r"accuracy needs outputs \[B, C\]"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_default_metric_is_left_out_where_it_does_not_apply(name: str) -> None:
    loss, build, why = LEFT_OUT[name]
    found = run(loss, LABELS, build=build)
    assert found.table.columns == ("alpha", "split", "loss", "loss_stderr")
    assert found.summary["metrics"] == []
    (note,) = (note for note in found.summary["notes"] if "accuracy" in note)
    assert re.search(f"^accuracy is left out: .*{why}", note)


@pytest.mark.parametrize("name", ["a dict", "another shape"])
def test_a_metric_that_was_asked_for_and_fails_ends_the_run(name: str) -> None:
    loss, build, why = LEFT_OUT[name]
    with pytest.raises(LossError, match=f"{why}.*. Choose another --metric, or --metric none"):
        run(loss, LABELS, build=build, metric=("accuracy",))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            "def metric(outputs, targets):\n    return targets.float().mean()\n",
            "gives shape [] for a batch of 7 examples, not one number per example",
        ),
        (
            "def metric(outputs, targets):\n    raise ValueError('no')\n",
            "fails: ValueError: no. It receives outputs float32 [7, 3] and targets int64 [7]",
        ),
    ],
)
def test_a_metric_of_ones_own_that_fails_says_what_it_gets_or_must_return(
    metric: str, message: str, folder: Path, losscli: Losscli
) -> None:
    (folder / "mine.py").write_text(metric)
    before = set(folder.iterdir())
    options = ("--split", "test", "--limit", 7, "--metric", "mine.py:metric", "-o", "x")
    done = losscli("interpolate", "a.pt", "b.pt", *options)
    assert (done.status, done.stdout) == (1, "")
    cure = "Choose another --metric, or --metric none"
    assert done.stderr == f"losscli: the metric 'metric' {message}. {cure}\n"
    assert {f for f in folder.iterdir() if f.name != "__pycache__"} == before


def test_metrics_stay_where_the_loss_is_of_scores() -> None:
    labels = classes(N, high=2)
    for loss in ("bce", "torch.nn.functional:multi_margin_loss"):
        outputs = 1 if loss == "bce" else 2
        found = run(loss, labels, outputs=outputs).table.floats("accuracy")[0]
        z = plain(outputs)
        answers = z.argmax(1) if outputs > 1 else (z[:, 0] > 0).long()
        assert found == pytest.approx(float((answers == labels).double().mean()), rel=1e-12)


def test_a_user_defined_metric_that_fails_writes_nothing(folder: Path, losscli: Losscli) -> None:
    (folder / "mine.py").write_text("def metric(outputs, targets):\n    return outputs.nothing\n")
    before = set(folder.rglob("*"))
    done = losscli("interpolate", "a.pt", "b.pt", "--metric", "mine.py:metric", "-o", "x")
    assert (done.status, done.stderr.count("\n")) == (1, 1)
    assert "Choose another --metric, or --metric none" in done.stderr
    assert {f for f in folder.rglob("*") if "__pycache__" not in f.parts} == before


def test_a_complex_loss_is_refused() -> None:
    states = [nn.Linear(4, 3).state_dict() for _ in range(2)]
    with pytest.raises(LossError, match="the loss gives complex numbers"):
        losscli.interpolate(
            *states,
            model=nn.Linear(4, 3),
            data={"all": (torch.randn(9, 4), torch.arange(9) % 3)},
            loss=lambda outputs, targets: torch.complex(outputs[:, 0], outputs[:, 1]),
        )


@pytest.mark.parametrize("value", [(0.2, 1, 5), torch.tensor([0.2, 1, 5])], ids=["list", "tensor"])
def test_weights_are_moved_to_the_device_once(value: Any) -> None:
    # A copy for every batch would make a GPU wait.
    loss = on_device(functools.partial(cross_entropy, weight=value, dim=1), torch.device("meta"))
    assert function_of(loss) is cross_entropy
    assert options_of(loss)["weight"].device.type == "meta"
    assert options_of(loss)["weight"].dtype == torch.float64
    assert options_of(loss)["dim"] == 1


def test_losses_without_weights_are_not_changed() -> None:
    for loss in (cross_entropy, functools.partial(cross_entropy, ignore_index=0), torch.sub):
        assert on_device(loss, torch.device("meta")) is loss
