"""Whole studies, from files to tables, against the oracle; and what the library promises."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import losscli
from losscli.checkpoint import Checkpoint
from losscli.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    LossError,
    MismatchError,
    ModelError,
    SpecError,
    UntrustedCodeError,
    UsageError,
)
from losscli.evaluation.losses.built_in import LOSSES
from losscli.models import CNN, MLP
from losscli.settings import Settings
from losscli.studies.problem import prepare
from tests import foreign, oracle
from tests.cases import CASES, Case, sample
from tests.conftest import ROOT


def save(case: Case, folder: Path) -> tuple[str, str]:
    names = []
    for seed in (1, 2):
        path = folder / f"{case.name}-{seed}.pt"
        torch.save(case.state(seed), path)
        names.append(str(path))
    return names[0], names[1]


@pytest.mark.parametrize("case", sample(CASES, 2, 4), ids=str)
def test_the_table_holds_the_losses_of_a_plain_float64_loop(case: Case, tmp_path: Path) -> None:
    a, b = save(case, tmp_path)
    result = losscli.interpolate(
        a,
        b,
        model=case.build,
        data={"all": (copy.deepcopy(case.inputs), case.targets)},
        loss=case.loss,
        metric=("none",),
        dtype="float64",
        points=6,
        range=(-0.5, 2.0),
    )
    states = case.state(1), case.state(2)
    assert result.table["alpha"] == [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
    for alpha, loss, error in zip(
        result.table.floats("alpha"),
        result.table.floats("loss"),
        result.table.floats("loss_stderr"),
        strict=True,
    ):
        state = oracle.blend(*states, alpha)
        state |= {n: t for n, t in states[0].items() if torch.equal(t, states[1][n])}
        expected = oracle.losses(
            case.build, state, copy.deepcopy(case.inputs), case.targets, case.per_example
        )
        np.testing.assert_allclose(loss, oracle.mean(expected), rtol=1e-11)
        np.testing.assert_allclose(error, oracle.standard_error(expected), rtol=1e-9)
    assert result.summary["endpoint_difference"] <= 1e-12
    # With BatchNorm, a variance may be below zero beyond the ends.
    assert not any("does not reproduce" in note for note in result.summary["notes"])


def test_the_ends_have_exactly_the_loss_of_the_checkpoints(folder: Path) -> None:
    result = losscli.interpolate("a.pt", "b.pt", points=4, range=(-0.3, 1.2))
    arrays = np.load("data.npz")
    x, y = torch.from_numpy(arrays["train_inputs"]), torch.from_numpy(arrays["train_targets"])
    rows = result.table.where("split", "train")
    for alpha, name in ((0.0, "a"), (1.0, "b")):
        model = MLP("6-5-3")
        model.load_state_dict(torch.load(f"{name}.pt", weights_only=True)["state_dict"])
        with torch.no_grad():
            plain = LOSSES["cross_entropy"](model(x), y).float().double().mean().item()
        assert rows.where("alpha", alpha).floats("loss") == [plain]
        assert result.summary["splits"]["train"][f"loss_{name}"] == plain


def test_by_default_there_are_51_points_from_minus_a_half_to_2(folder: Path) -> None:
    result = losscli.interpolate("a.pt", "b.pt")
    alphas = result.table.where("split", "test").floats("alpha")
    assert len(alphas) == 51
    assert (alphas[0], alphas[10], alphas[30], alphas[-1]) == (-0.5, 0.0, 1.0, 2.0)
    assert result.table["split"][:2] == ["train", "test"]
    assert result.table.columns == ("alpha", "split", "loss", "loss_stderr", "accuracy")


def test_the_distance_is_that_of_all_moving_tensors(folder: Path) -> None:
    a, b = (torch.load(f"{n}.pt", weights_only=True)["state_dict"] for n in "ab")
    result = losscli.interpolate("a.pt", "b.pt", points=2)
    flat = torch.cat([(b[n].double() - a[n].double()).flatten() for n in a])
    assert result.summary["distance"] == pytest.approx(flat.norm().item(), rel=1e-12)
    only = losscli.interpolate("a.pt", "b.pt", points=2, only=("layers.0.*",))
    part = torch.cat([(b[n].double() - a[n].double()).flatten() for n in a if "layers.0" in n])
    assert only.summary["distance"] == pytest.approx(part.norm().item(), rel=1e-12)


@pytest.mark.parametrize(
    "name",
    sample(["mlp-relu", "cnn-batchnorm", "normalising", "attention-tied", "convolving", "lstm"], 0),
)
def test_distances_are_over_the_parameters_only(name: str, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == name)
    one, other = case.state(1), case.state(2)
    files = save(case, tmp_path)
    parameters = [n for n, _ in case.build().named_parameters()]
    length = math.hypot(*(float((other[n].double() - one[n].double()).norm()) for n in parameters))
    given = {
        "model": case.build,
        "data": {"all": (copy.deepcopy(case.inputs), case.targets)},
        "loss": case.loss,
        "metric": ("none",),
    }
    line = losscli.interpolate(*files, **given, points=2)
    assert line.summary["distance"] == pytest.approx(length, rel=1e-12)
    moving = [n for n in parameters if not torch.equal(one[n], other[n])]
    assert line.summary["moving"]["tensors"] == len(moving)
    buffers = case.build().named_buffers()
    along = [n for n, t in buffers if t.is_floating_point() and not torch.equal(one[n], other[n])]
    assert line.summary["moving_buffers"] == len(along)
    assert line.summary["moving"]["values"] == sum(one[n].numel() for n in moving)
    pairs = losscli.barriers(files, **given, points=3)
    assert pairs.table.floats("distance") == [line.summary["distance"]]
    if name != "attention-tied":
        # A file does not tell that two of its tensors are tied, nor that a mask is no parameter.
        assert losscli.inspect(files).summary["distance"] == pytest.approx(length, rel=1e-12)


def test_only_the_ends_can_be_evaluated(folder: Path) -> None:
    wide = losscli.interpolate("a.pt", "b.pt", points=3, range=(0.0, 1.0))
    ends = losscli.interpolate("a.pt", "b.pt", points=2, range=(0.0, 1.0))
    assert ends.table["alpha"] == [0, 0, 1, 1]
    assert ends.table["loss"] == wide.table["loss"][:2] + wide.table["loss"][-2:]


def test_only_and_except_move_some_tensors_and_the_others_stay_at_a(folder: Path) -> None:
    a, b = (torch.load(f"{n}.pt", weights_only=True)["state_dict"] for n in "ab")
    arrays = np.load("data.npz")
    x, y = torch.from_numpy(arrays["train_inputs"]), torch.from_numpy(arrays["train_targets"])
    for settings, moving in (
        ({"only": ("layers.0.*",)}, ["layers.0.weight", "layers.0.bias"]),
        ({"except_": ("*.bias",)}, ["layers.0.weight", "layers.1.weight"]),
    ):
        result = losscli.interpolate(
            "a.pt", "b.pt", points=3, range=(0.0, 2.0), dtype="float64", **settings
        )
        for alpha, loss in zip(
            (0.0, 1.0, 2.0), result.table.where("split", "train").floats("loss"), strict=True
        ):
            expected = oracle.losses(
                lambda: MLP("6-5-3"),
                oracle.blend(a, b, alpha, moving),
                x,
                y,
                LOSSES["cross_entropy"],
            )
            assert loss == pytest.approx(oracle.mean(expected), rel=1e-11)
        assert "some tensors stay at A" in result.summary["notes"][0]


@pytest.mark.parametrize(("buffers", "end"), [("a", 0), ("b", 1)])
def test_buffers_may_stay_at_one_end(buffers: str, end: int, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "cnn-batchnorm")
    a, b = save(case, tmp_path)
    result = losscli.interpolate(
        a,
        b,
        model=case.build,
        data={"all": (case.inputs, case.targets)},
        dtype="float64",
        buffers=buffers,
        points=3,
        range=(0.0, 2.0),
    )
    states = case.state(1), case.state(2)
    parameters = [n for n, _ in case.build().named_parameters()]
    for alpha, loss in zip((0.0, 1.0, 2.0), result.table.floats("loss"), strict=True):
        state = {
            **oracle.blend(*states, alpha, parameters),
            **{n: t for n, t in states[end].items() if "running" in n},
        }
        expected = oracle.losses(case.build, state, case.inputs, case.targets, case.per_example)
        assert loss == pytest.approx(oracle.mean(expected), rel=1e-11)
    assert "floating-point buffers stay" in result.summary["notes"][0]


def pruned(seed: int, share: float) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", share)
    return model


@pytest.mark.parametrize(
    ("name", "number", "more"),
    [
        ("interpolate", 2, {"points": 2}),
        pytest.param("barriers", 3, {"points": 3}, marks=pytest.mark.stress),
        pytest.param("trajectory", 3, {"residuals": 2}, marks=pytest.mark.stress),
        ("plane", 3, {"points": 2}),
    ],
)
def test_masks_that_differ_are_named(
    name: str, number: int, more: dict[str, Any], tmp_path: Path
) -> None:
    files, study = [str(tmp_path / f"{seed}.pt") for seed in range(number)], getattr(losscli, name)
    data = {"all": (torch.randn(9, 6), torch.arange(9) % 3)}

    def notes(**given: Any) -> list[str]:
        told = {"model": lambda: pruned(0, 0.5), "data": data, **more, **given}
        result = study(*files, **told) if name == "interpolate" else study(files, **told)
        return [note for note in result.summary["notes"] if "_mask" in note]

    for seed, file in enumerate(files):
        torch.save(pruned(seed, 0.5).state_dict(), file)
    (note,) = notes()
    assert "fractions: 0.weight_mask and 1 more; --buffers a keeps" in note
    assert not notes(buffers="a")
    # Masks that all checkpoints share, and one buffer that is no mask, are not spoken of.
    for seed, file in enumerate(files):
        torch.save(pruned(seed, 0).state_dict(), file)
    assert not notes()
    for seed, file in enumerate(files):
        state = pruned(seed, 0).state_dict()
        torch.save(state | {"0.weight_mask": torch.rand(5, 6)}, file)
    assert not notes()


def test_buffers_that_stay_at_the_last_checkpoints_are_read_once(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "cnn-batchnorm")
    files = save(case, tmp_path)
    data = {"all": (case.inputs, case.targets)}
    problem = prepare(files, Settings(model=case.build, data=data, buffers="b"))
    opened = []

    def read(name: str) -> Checkpoint:
        opened.append(name)
        return problem.read(name)

    counting = replace(problem, read=read)
    one, other = case.state(1), case.state(2)
    for _ in range(3):
        for placed, moved in zip(counting.places([0, 1]), (one, other), strict=True):
            for name, tensor in placed.items():
                expected = moved if name in counting.moving else other
                assert not tensor.is_floating_point() or torch.equal(tensor, expected[name])
    # Three times to be placed, and once for what stays.
    assert opened == [files[1]] * 4


def test_a_model_object_is_never_left_changed(folder: Path) -> None:
    model = MLP("6-5-3").train()
    before = copy.deepcopy(model.state_dict())
    losscli.interpolate("a.pt", "b.pt", model=model, points=3)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_global_random_state_is_unchanged(folder: Path) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    losscli.interpolate("a.pt", "b.pt", points=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_initialisations_are_those_of_the_seed(folder: Path) -> None:
    result = losscli.interpolate(
        "init:3", "init:4", model="mlp:6-5-3", data="npz:data.npz", points=2, dtype="float64"
    )
    torch.manual_seed(3)
    state = MLP("6-5-3").state_dict()
    arrays = np.load("data.npz")
    x, y = torch.from_numpy(arrays["test_inputs"]), torch.from_numpy(arrays["test_targets"])
    expected = oracle.losses(lambda: MLP("6-5-3"), state, x, y, LOSSES["cross_entropy"])
    loss = result.summary["splits"]["test"]["loss_a"]
    assert loss == pytest.approx(oracle.mean(expected), rel=1e-12)


def test_a_limit_draws_the_same_examples_at_every_point_and_for_every_run(folder: Path) -> None:
    one, two = (losscli.interpolate("a.pt", "b.pt", points=3, limit=7) for _ in range(2))
    other = losscli.interpolate("a.pt", "b.pt", points=3, limit=7, seed=1)
    assert one.summary["examples"] == {"train": 7, "test": 7}
    assert one.table == two.table
    assert one.table != other.table


def test_the_same_command_gives_the_same_table_and_identity(folder: Path) -> None:
    one, two = (losscli.interpolate("a.pt", "b.pt") for _ in range(2))
    assert one.table == two.table
    assert one.summary["identity"] == two.summary["identity"]
    other = losscli.interpolate("a.pt", "b.pt", range=(0.0, 1.0))
    assert one.summary["identity"] != other.summary["identity"]


def test_a_loss_that_overflows_is_recorded_and_does_not_stop_the_run(folder: Path) -> None:
    torch.save({k: v * 1e30 for k, v in MLP("6-5-3").state_dict().items()}, "huge.pt")
    result = losscli.interpolate("a.pt", "huge.pt", points=5, range=(0.0, 1.0))
    losses = result.table.where("split", "train").floats("loss")
    assert math.isfinite(losses[0])
    assert not any(math.isfinite(x) for x in losses[1:])
    assert any("train have a loss that is not finite" in n for n in result.summary["notes"])
    assert result.summary["splits"]["train"]["monotonic"] is None


def test_two_equal_checkpoints_give_a_constant_curve_and_a_note(folder: Path) -> None:
    result = losscli.interpolate("a.pt", "a.pt", points=5)
    assert len(set(result.table.where("split", "train").floats("loss"))) == 1
    assert result.summary["distance"] == 0
    assert "nothing moves" in result.summary["notes"][0]


def test_a_model_with_weights_that_must_be_loaded_is_loaded_at_every_point(folder: Path) -> None:
    class Stubborn(nn.Module):
        """Computes with a copy of its weights that it took when they were loaded."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = MLP("6-5-3")
            self.copies: list[torch.Tensor] = []
            self.register_load_state_dict_post_hook(lambda *_: self._copy())

        def _copy(self) -> None:
            self.copies = [p.detach().clone() for p in self.inner.parameters()]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            w0, b0, w1, b1 = self.copies
            return torch.relu(x @ w0.T + b0) @ w1.T + b1

    for name in "ab":
        state = torch.load(f"{name}.pt", weights_only=True)["state_dict"]
        torch.save({f"inner.{k}": v for k, v in state.items()}, f"stubborn-{name}.pt")
    result = losscli.interpolate("stubborn-a.pt", "stubborn-b.pt", model=Stubborn, points=5)
    plain = losscli.interpolate("a.pt", "b.pt", points=5)
    np.testing.assert_allclose(result.table.floats("loss"), plain.table.floats("loss"), rtol=1e-6)


def test_a_model_that_caches_its_first_weights_is_refused(tmp_path: Path) -> None:
    case = Case("remembering", foreign.Remembering, torch.rand(9, 4), torch.arange(9) % 3)
    a, b = save(case, tmp_path)
    with pytest.raises(ModelError, match="after the model was at another point"):
        losscli.interpolate(a, b, model=case.build, data={"all": (case.inputs, case.targets)})


def test_integer_tensors_that_matter_are_noted(tmp_path: Path) -> None:
    class Permuting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("order", torch.randperm(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x[:, self.order])

    case = Case("permuting", Permuting, torch.rand(9, 4), torch.arange(9) % 3)
    a, b = save(case, tmp_path)
    data = {"all": (case.inputs, case.targets)}
    result = losscli.interpolate(a, b, model=Permuting, data=data, points=3)
    assert "order stay at A's and matter" in result.summary["notes"][0]
    # On a path and in a plane, also if only a checkpoint in the middle has others.
    last = {**torch.load(a, weights_only=True), "layer.bias": torch.ones(3)}
    torch.save(last, tmp_path / "last.pt")
    path = [a, b, tmp_path / "last.pt"]
    for study in (partial(losscli.trajectory, surface=False), partial(losscli.plane, points=3)):
        notes = study(path, model=Permuting, data=data).summary["notes"]
        assert sum("order stay at the first checkpoint's and matter" in x for x in notes) == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.LazyLinear(3), "has no values yet"),
        (lambda: nn.Linear(4, 3, device="meta"), "has no values yet"),
    ],
)
def test_models_that_no_line_can_move_are_refused(
    build: object, message: str, folder: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        losscli.interpolate("a.pt", "b.pt", model=build)


def test_a_scripted_module_gives_the_losses_of_a_plain_loop(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for case in (
            Case("compiled", foreign.Compiled, torch.rand(9, 4), torch.arange(9) % 3),
            Case(
                "scripted",
                lambda: torch.jit.script(nn.Linear(4, 3)),
                torch.rand(9, 4),
                torch.arange(9) % 3,
            ),
        ):
            a, b = save(case, tmp_path)
            result = losscli.interpolate(
                a,
                b,
                model=case.build,
                data={"all": (case.inputs, case.targets)},
                points=6,
                dtype="float64",
            )
            for alpha, loss in zip(
                result.table.floats("alpha"), result.table.floats("loss"), strict=True
            ):
                state = oracle.blend(case.state(1), case.state(2), alpha)
                expected = oracle.losses(
                    case.build, state, case.inputs, case.targets, case.per_example
                )
                assert loss == pytest.approx(oracle.mean(expected), rel=1e-10)


def test_a_model_that_returns_no_tensor_is_refused(folder: Path) -> None:
    class Pair(MLP):
        def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
            return super().forward(inputs), inputs

    with pytest.raises(LossError, match="returns a tuple"):
        losscli.interpolate("a.pt", "b.pt", model=lambda: Pair("6-5-3"))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "mlpp:3"}, SpecError, "Did you mean 'mlp'"),
        ({"model": "nowhere.at.all:build"}, SpecError, "no module named 'nowhere'"),
        ({"model": "tests.foreign:absent"}, SpecError, "absent"),
        ({"model": "tests.foreign:not_a_module"}, ModelError, "gives a int"),
        ({"model": "mlp:6-5-3,depth=3"}, SpecError, "It takes sizes, activation, pieces"),
        ({"model": "mlp:6-4-3"}, MismatchError, r"layers.0.weight is \[5, 6\], not \[4, 6\]"),
        ({"data": "npz:absent.npz"}, DataError, "no data file"),
        ({"data": "imagnet:x"}, SpecError, "unknown data 'imagnet'"),
        ({"data": "npz:data.npz,colour=3"}, SpecError, "colour"),
        ({"data": "tests.foreign:data_that_fails"}, DataError, "no disk no data"),
        ({"data": "tests.foreign:data_not_understood"}, DataError, "is a list"),
        ({"split": ("dev",)}, UsageError, "It has train, test"),
        ({"loss": "cross"}, SpecError, "unknown loss 'cross'"),
        ({"loss": "tests.foreign:batch_mean"}, LossError, "reduction=none"),
        ({"loss": "mse"}, LossError, "one shape"),
        (
            {"metric": ("tests.foreign:hits",)},
            LossError,
            "hits.higher_is_better must be True or False, not 'no'",
        ),
        ({"metric": ("f1",)}, SpecError, "unknown metric"),
        ({"metric": ("accuracy", "accuracy")}, UsageError, "is that of another column"),
        ({"device": "cuda:99"}, DeviceError, "is not available"),
        (
            {"device": "abacus"},
            UsageError,
            r"the device 'abacus' is not known. Choose .* auto, cpu",
        ),
        ({"device": "meta"}, UsageError, "the device 'meta' is not known"),
        ({"dtype": "int8"}, UsageError, "float32"),
        ({"buffers": "c"}, UsageError, "interpolate"),
        ({"batch_size": 0}, UsageError, "is not a number of examples"),
        ({"limit": 0}, UsageError, "no examples"),
        ({"only": ("conv*",)}, UsageError, "matches none"),
        ({"except_": ("*",)}, UsageError, "no tensor to move"),
        ({"points": 0}, UsageError, "nothing to evaluate"),
        ({"seed": -1}, UsageError, "not a seed"),
        ({"seed": 1 << 80}, UsageError, "not a seed"),
        ({"range": (0.0, 1e308)}, UsageError, "beyond what float32"),
        ({"range": (1.0, 1.0)}, UsageError, "empty"),
        ({"range": (1.0, 0.0)}, UsageError, "reversed"),
        ({"range": (0.0, math.inf)}, UsageError, "not finite"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused_in_one_line_that_says_what_is_wrong(
    settings: dict, error: type[Exception], message: str, folder: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        losscli.interpolate("a.pt", "b.pt", **settings)
    assert "\n" not in str(caught.value)


def test_without_any_model_or_data_the_error_says_what_to_give(folder: Path) -> None:
    torch.save(MLP("6-5-3").state_dict(), "bare.pt")
    with pytest.raises(UsageError, match="--model mlp"):
        losscli.interpolate("bare.pt", "bare.pt")
    Path("losscli.toml").unlink()
    with pytest.raises(UsageError, match="--data mnist"):
        losscli.interpolate("a.pt", "b.pt")


def test_tensors_that_do_not_fit_are_listed_for_both_checkpoints_at_once(folder: Path) -> None:
    state = MLP("6-5-3").state_dict()
    torch.save({"extra": torch.ones(2), **state}, "more.pt")
    torch.save({k: v for k, v in state.items() if k != "layers.1.bias"}, "less.pt")
    with pytest.raises(MismatchError) as caught:
        losscli.interpolate("more.pt", "less.pt", model="mlp:6-5-3")
    assert "more.pt does not fit the model: unexpected extra [2]" in str(caught.value)
    assert "less.pt does not fit the model: missing layers.1.bias [3]" in str(caught.value)


def test_the_nearest_losscli_toml_is_found_and_its_paths_are_relative_to_it(folder: Path) -> None:
    deep = folder / "runs" / "one"
    deep.mkdir(parents=True)
    for name in "ab":
        state = torch.load(f"{name}.pt", weights_only=True)["state_dict"]
        torch.save(state, deep / f"{name}.pt")
    (deep.parent / "losscli.toml").write_text('model = "mlp:6-5-3"\nloss = "cross_entropy"\n')
    result = losscli.interpolate(str(deep / "a.pt"), str(deep / "b.pt"), points=2)
    assert result.summary["model"] == "mlp:6-5-3"
    assert result.table == losscli.interpolate("a.pt", "b.pt", points=2).table


@pytest.mark.parametrize("kind", ["model", "data", "loss"])
@pytest.mark.parametrize("place", ["toml", "metadata"])
def test_files_may_not_name_code(kind: str, place: str, folder: Path) -> None:
    Path("evil.py").write_text("open('ran', 'w')\ndef build(): pass\n")
    specs = {"model": "mlp:6-5-3", "data": "npz:data.npz", kind: "evil.py:build"}
    state = torch.load("a.pt", weights_only=True)["state_dict"]
    if place == "toml":
        lines = [f'{key} = "{value}"\n' for key, value in specs.items()]
        Path("losscli.toml").write_text("".join(lines))
        torch.save(state, "named.pt")
    else:
        torch.save({"w": state} | {f"losscli.{k}": v for k, v in specs.items()}, "named.pt")
    with pytest.raises(UntrustedCodeError, match=f"--{kind} evil.py:build"):
        losscli.interpolate("named.pt", "named.pt")
    assert not Path("ran").exists()


def test_an_invalid_losscli_toml_is_refused(folder: Path) -> None:
    for content in ("data = 3\n", 'modle = "mlp:6-5-3"\n', "data = \n", "\xff"):
        Path("losscli.toml").write_text(content, encoding="latin-1")
        with pytest.raises(SpecError, match=r"losscli\.toml"):
            losscli.interpolate("a.pt", "b.pt")


@pytest.mark.parametrize(
    "data", [foreign.data_as_mapping, foreign.data_as_dicts, foreign.data_as_dataset]
)
def test_data_of_every_kind_gives_the_same_curve(data: object, tmp_path: Path) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(MLP("4-3").state_dict(), tmp_path / f"{seed}.pt")
    a, b = (str(tmp_path / f"{seed}.pt") for seed in (0, 1))
    name = f"tests.foreign:{data.__name__}"  # type: ignore[attr-defined]
    result = losscli.interpolate(a, b, model="mlp:4-3", data=name, points=3)
    plain = losscli.interpolate(a, b, model="mlp:4-3", data=foreign.data_as_mapping(), points=3)
    assert result.table["loss"] == plain.table["loss"]


def test_inspect_shows_tensors_and_with_two_their_distances(folder: Path) -> None:
    (one,) = losscli.inspect(["a.pt"]).summary["checkpoints"]
    assert one["tensors"] == 4
    assert one["values"] == 6 * 5 + 5 + 5 * 3 + 3
    assert one["metadata"] == {"losscli.model": "mlp:6-5-3"}
    a, b = (torch.load(f"{n}.pt", weights_only=True)["state_dict"] for n in "ab")
    both = losscli.inspect(["a.pt", "b.pt"])
    row = both.table.where("tensor", "layers.0.weight")
    x, y = (s["layers.0.weight"].double().flatten() for s in (a, b))
    assert row["shape"] == ["5×6"]
    assert row.floats("norm") == [pytest.approx(x.norm().item(), rel=1e-12)]
    assert row.floats("distance") == [pytest.approx((y - x).norm().item(), rel=1e-12)]
    assert row.floats("cosine") == [pytest.approx((x @ y / x.norm() / y.norm()).item(), rel=1e-12)]
    assert both.summary["mismatches"] == []
    with pytest.raises(UsageError, match="one checkpoint or two"):
        losscli.inspect(["a.pt"] * 3)


def test_inspect_names_what_does_not_match(folder: Path) -> None:
    torch.save(CNN("2").state_dict(), "cnn.pt")
    found = losscli.inspect(["a.pt", "cnn.pt"]).summary["mismatches"]
    assert "missing layers.0.weight [5, 6]" in found
    assert "unexpected head.bias [10]" in found


def test_export_is_the_point_of_the_line(folder: Path) -> None:
    a, b = (torch.load(f"{n}.pt", weights_only=True)["state_dict"] for n in "ab")
    point = losscli.export("a.pt", "b.pt", 0.25)
    for name, tensor in oracle.blend(a, b, 0.25).items():
        torch.testing.assert_close(point.weights[name].double(), tensor, rtol=1e-6, atol=1e-8)
    assert point.metadata == {"losscli.model": "mlp:6-5-3"}
    for alpha, state in ((0.0, a), (1.0, b)):
        ends = losscli.export("a.pt", "b.pt", alpha).weights
        assert all(torch.equal(ends[n], state[n]) for n in state)


def test_export_refuses_inputs_that_do_not_make_a_line(folder: Path) -> None:
    torch.save(CNN("2").state_dict(), "cnn.pt")
    with pytest.raises(MismatchError, match="does not fit"):
        losscli.export("a.pt", "cnn.pt", 0.5)
    with pytest.raises(UsageError, match="not a point"):
        losscli.export("a.pt", "b.pt", math.nan)
    with pytest.raises(CheckpointError, match=r"no checkpoint absent\.pt"):
        losscli.export("a.pt", "absent.pt", 0.5)


def test_the_public_names_are_these() -> None:
    assert sorted(losscli.__all__) == [
        "LosscliError", "Recorder", "Result", "Settings", "Table", "__version__", "align",
        "around", "barriers", "check", "connect", "export", "inspect", "interpolate", "load",
        "plane", "plot", "sharpness", "soup", "trajectory",
    ]  # fmt: skip
    assert all(hasattr(losscli, name) for name in losscli.__all__)
    with pytest.raises(AttributeError, match="absent"):
        _ = losscli.absent


def test_a_variance_below_zero_is_named_with_its_cure(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == "cnn-batchnorm")
    a, b = save(case, tmp_path)
    arguments = {"model": case.build, "data": {"all": (case.inputs, case.targets)}, "points": 5}
    far = losscli.interpolate(a, b, range=(-8.0, 8.0), **arguments)
    (note,) = (note for note in far.summary["notes"] if "running_var becomes negative" in note)
    assert "--buffers b keeps B's statistics at every point, and --buffers recalibrate" in note
    near = losscli.interpolate(a, b, range=(0.0, 1.0), **arguments)
    kept = losscli.interpolate(a, b, range=(-8.0, 8.0), buffers="b", **arguments)
    for result in (near, kept):
        assert not any("becomes negative" in note for note in result.summary["notes"])


def noisy_data(n: int, *, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return {"all": (x, torch.randint(3, (n,), generator=generator))}


def test_sampling_evaluates_no_more_examples_than_the_error_needs(folder: Path) -> None:
    arguments = {"data": noisy_data(8192), "points": 9, "range": (-3.0, 4.0)}
    whole = losscli.interpolate("a.pt", "b.pt", **arguments)
    height = np.ptp(whole.table.floats("loss"))
    counts = []
    for tolerance in (0.08, 0.03, 1e-9):
        result = losscli.interpolate("a.pt", "b.pt", sampling_error=tolerance, **arguments)
        assert result.table.columns[-1] == "examples"
        (count,) = result.table.unique("examples")
        counts.append(count)
        if tolerance > 1e-9:
            assert max(result.table.floats("loss_stderr")) < 1.2 * tolerance * height
            assert any(f"{count} of 8192 examples" in n for n in result.summary["notes"])
        assert result.summary["examples"] == {"all": count}
    assert 512 <= counts[0] < counts[1] < counts[2] == 8192
    np.testing.assert_allclose(result.table.floats("loss"), whole.table.floats("loss"), rtol=1e-6)
    np.testing.assert_allclose(
        result.table.floats("accuracy"), whole.table.floats("accuracy"), rtol=1e-12
    )


@pytest.mark.parametrize("runs", [5, pytest.param(10, marks=pytest.mark.stress)])
def test_standard_errors_of_a_sample_cover_the_truth_as_often_as_they_say(
    runs: int, folder: Path
) -> None:
    # Of a normal mean, 68.3 % lie within one standard error and 95.4 % within two.
    n = 16384
    # Ten splits of other data: each run draws ten samples.
    data = {str(k): noisy_data(n, seed=k)["all"] for k in range(10)}
    line: dict[str, Any] = {"points": 3, "range": (-3.0, 4.0), "metric": ("none",)}
    whole = losscli.interpolate("a.pt", "b.pt", data=data, **line)
    truth = np.array(whole.table.floats("loss"))
    within = []
    for seed in range(runs):
        result = losscli.interpolate(
            "a.pt", "b.pt", data=data, sampling_error=0.1, seed=seed, **line
        )
        assert max(result.summary["examples"].values()) < n / 16
        off = (np.array(result.table.floats("loss")) - truth) / result.table.floats("loss_stderr")
        within.append(np.abs(off))
    shares = [np.mean(np.array(within) < k) for k in (1, 2)]
    # The points of a curve are of the same examples: 100 draws tell 68.3 % to about 5 %.
    assert shares[0] == pytest.approx(0.683, abs=0.07)
    assert shares[1] == pytest.approx(0.954, abs=0.03)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, math.inf, math.nan])
def test_an_invalid_sampling_error_is_refused(tolerance: float, folder: Path) -> None:
    with pytest.raises(UsageError, match="must be above 0, not"):
        losscli.interpolate("a.pt", "b.pt", sampling_error=tolerance)


@pytest.mark.parametrize("limit", sample([30, 100, 300], 2))
def test_rounding_of_a_small_loss_is_not_reported_as_a_fault_of_the_model(limit: int) -> None:
    ends = (ROOT / f"sample_checkpoints/cnn/{name}.safetensors" for name in ("init", "final"))
    result = losscli.interpolate(*ends, points=3, limit=limit, split=["train"])
    assert result.summary["endpoint_difference"] < 1e-4


def test_checkpoints_may_be_paths(folder: Path) -> None:
    a, b, c = names = [Path("a.pt"), Path("b.pt"), Path("c.pt")]
    torch.save(MLP("6-5-3").state_dict(), c)
    results = [
        losscli.interpolate(a, b, points=3),
        losscli.trajectory(names, surface=False, split="test"),
        losscli.plane(names, points=2, split="test"),
        losscli.barriers(names, points=3, split="test"),
        losscli.check(names[:1], split="test", limit=2),
        losscli.inspect([a, b]),
        losscli.align(a, b),
    ]
    for result in results:
        assert result.summary["checkpoints"][0]["name"] == "a.pt"
    assert losscli.export(a, b, 0.5).weights
