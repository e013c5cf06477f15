"""Spectral normalisation: the singular vectors are those of the weight at every point."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hooked

import losscli
from losscli.data import DataSet, Split
from losscli.errors import UsageError
from losscli.evaluation.losses.built_in import LOSSES
from losscli.evaluation.objective import Objective
from losscli.evaluation.records import slice_key
from losscli.evaluation.spectral import spectral_layers
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.sweep import sweep
from losscli.studies.export import export
from losscli.weight_space.slices import Line
from tests import oracle
from tests.cases import in_turn, sample
from tests.conftest import Losscli

Normalise = Callable[[nn.Module], nn.Module]


class Doubled(nn.Module):
    """A parametrization that comes before the spectral norm."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.square()


def chained(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return parametrizations.spectral_norm(layer)


def bare(layer: nn.Module) -> nn.Module:
    return layer


def perceptron(normalise: Normalise) -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), normalise(nn.Linear(16, 12)), nn.Tanh(),
        normalise(nn.Linear(12, 16)), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip


def first(normalise: Normalise) -> nn.Module:
    return nn.Sequential(normalise(nn.Linear(8, 5)), nn.ReLU(), nn.Linear(5, 3))


def convolutions(normalise: Normalise) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), normalise(nn.Conv2d(2, 4, 2)), nn.BatchNorm2d(4), nn.ReLU(),
        normalise(nn.ConvTranspose2d(4, 4, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


CASES = [
    (build, normalise)
    for build in (perceptron, first, convolutions)
    for normalise in (hooked, parametrizations.spectral_norm)
] + [(perceptron, chained)]
IDS = [f"{build.__name__}-{normalise.__module__.rpartition('.')[2]}" for build, normalise in CASES]

X = torch.randn(48, 8, generator=torch.Generator().manual_seed(5))
Y = X[:, :3].argmax(1)


def state(
    build: Callable[[Normalise], nn.Module], normalise: Normalise, seed: int
) -> dict[str, Tensor]:
    """A network after one step of its power iteration, so that u and v are about right."""
    torch.manual_seed(seed)
    model = build(normalise)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        model.train()(X)
    return {n: t.clone() for n, t in model.state_dict().items()}


def divided(
    build: Callable[[Normalise], nn.Module], normalise: Normalise, there: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The oracle: the same network without normalisation, its weights divided by hand."""
    found = {}
    transposed = {n for n, m in build(bare).named_modules() if isinstance(m, nn.ConvTranspose2d)}
    for name in build(bare).state_dict():
        module, _, last = name.rpartition(".")
        sources = [f"{name}_orig", f"{module}.parametrizations.{last}.original"]
        source = next((n for n in sources if n in there), None)
        if source is None:
            found[name] = there[name]
            continue
        weight = there[source].double()
        if normalise is chained:
            weight = weight + weight**2
        front = 1 if module in transposed else 0
        matrix = weight.movedim(front, 0).flatten(1).numpy()
        found[name] = weight / np.linalg.svd(matrix, compute_uv=False)[0]
    return found


def expected(
    build: Callable[[Normalise], nn.Module], normalise: Normalise, there: dict[str, Tensor]
) -> float:
    plain = divided(build, normalise, there)
    losses = oracle.losses(lambda: build(bare), plain, X, Y, LOSSES["cross_entropy"])
    return oracle.mean(losses)


def save(
    build: Callable[[Normalise], nn.Module], normalise: Normalise, folder: Path, *seeds: int
) -> tuple[list[str], list[dict[str, Tensor]], dict[str, Any]]:
    states, files = [state(build, normalise, seed) for seed in seeds], []
    for seed, one in zip(seeds, states, strict=True):
        files.append(str(folder / f"{seed}.pt"))
        torch.save(one, files[-1])
    given = {"model": lambda: build(normalise), "data": {"train": (X, Y)}, "metric": ("none",)}
    return files, states, given


@pytest.mark.parametrize(
    ("case", "dtype"), sample(itertools.product(range(len(CASES)), ["float64", "float32"]), 0)
)
def test_a_line_has_the_losses_of_weights_divided_by_their_norms(
    case: int, dtype: str, tmp_path: Path
) -> None:
    build, normalise = CASES[case]
    files, (a, b), given = save(build, normalise, tmp_path, 1, 2)
    result = losscli.interpolate(*files, **given, points=6, range=(0, 1), dtype=dtype)
    for alpha, loss in zip(result.table.floats("alpha"), result.table.floats("loss"), strict=True):
        there = expected(build, normalise, oracle.blend(a, b, alpha))
        assert loss == pytest.approx(there, rel=1e-10 if dtype == "float64" else 2e-5)
    parameters = [n for n, _ in build(normalise).named_parameters()]
    length = math.hypot(*(float((b[n].double() - a[n].double()).norm()) for n in parameters))
    assert result.summary["distance"] == pytest.approx(length, rel=1e-12)


@pytest.mark.parametrize("buffers", ["a", "b"])
def test_spectral_norms_are_computed_for_every_choice_of_buffers(
    buffers: str, tmp_path: Path
) -> None:
    files, (a, b), given = save(perceptron, hooked, tmp_path, 1, 2)
    result = losscli.interpolate(
        *files, **given, points=3, range=(0, 1), dtype="float64", buffers=buffers
    )
    for alpha, loss in zip(result.table.floats("alpha"), result.table.floats("loss"), strict=True):
        there = expected(perceptron, hooked, oracle.blend(a, b, alpha))
        assert loss == pytest.approx(there, rel=1e-10)
    assert not any("buffers stay" in note for note in result.summary["notes"])


@pytest.mark.parametrize(("build", "normalise"), sample(CASES, 1, 2), ids=IDS)
def test_every_way_gives_the_same_numbers(build: Any, normalise: Any) -> None:
    a, b = (state(build, normalise, seed) for seed in (1, 2))
    objective = Objective(
        build(normalise), LOSSES["cross_entropy"], {}, DataSet({"train": Split(X, Y)}),
        device=torch.device("cpu"), dtype=torch.float64, batch_size=16,
    )  # fmt: skip
    names = [n for n, _ in objective.model.named_parameters()]
    line = Line(*({n: s[n] for n in names} for s in (a, b)))
    found = {}
    for way in (Strategy.LOADED, Strategy.BOUND, Strategy.SHARED, Strategy.THREADS):
        objective.load(a)
        objective.strategy = way
        found[way] = sweep(objective, line, [(k / 7,) for k in range(8)])["train"].losses
    for way in (Strategy.BOUND, Strategy.SHARED, Strategy.THREADS):
        torch.testing.assert_close(found[way], found[Strategy.LOADED], rtol=1e-12, atol=1e-13)


def test_planes_paths_and_barriers_have_them(tmp_path: Path) -> None:
    files, states, given = save(perceptron, hooked, tmp_path, 1, 2, 3)
    given["dtype"] = "float64"
    ends = [expected(perceptron, hooked, s) for s in states]
    plane = losscli.plane(files, **given, points=3)
    assert plane.more["path"].floats("loss") == pytest.approx(ends, rel=1e-10)
    names = [n for n, _ in perceptron(hooked).named_parameters()]
    flat = [torch.cat([s[n].double().flatten() for n in names]) for s in states]
    u = (flat[1] - flat[0]) / (flat[1] - flat[0]).norm()
    v = flat[2] - flat[0] - ((flat[2] - flat[0]) @ u) * u
    v /= v.norm()
    columns = (plane.table.floats(name) for name in ("x", "y", "loss"))
    for x, y, loss in zip(*columns, strict=True):
        parts = (flat[0] + x * u + y * v).split([states[0][n].numel() for n in names])
        there = states[0] | {
            n: p.view(states[0][n].shape) for n, p in zip(names, parts, strict=True)
        }
        assert loss == pytest.approx(expected(perceptron, hooked, there), rel=1e-9)
    path = losscli.trajectory(files, **given, residuals=2)
    assert path.table.floats("loss") == pytest.approx(ends, rel=1e-10)
    pairs = losscli.barriers(files, **given, points=3)
    middles = [
        expected(perceptron, hooked, oracle.blend(states[i], states[j], 0.5))
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    found = pairs.more["curves"].where("alpha", 0.5).floats("loss")
    assert found == pytest.approx(middles, rel=1e-10)


def test_losses_with_the_stored_singular_vectors_are_reported_if_they_differ(
    tmp_path: Path,
) -> None:
    files, (a, b), given = save(perceptron, hooked, tmp_path, 1, 2)
    own = [
        oracle.mean(oracle.losses(given["model"], s, X, Y, LOSSES["cross_entropy"])) for s in (a, b)
    ]
    exact = [expected(perceptron, hooked, s) for s in (a, b)]
    t = max((0, 1), key=lambda k: abs(own[k] - exact[k]))
    line = losscli.interpolate(*files, **given, points=2)
    told = (
        f"{files[t]} has the loss {own[t]:.4g} with those of its file, and {exact[t]:.4g} with "
        "these"
    )
    (note,) = (n for n in line.summary["notes"] if "singular vectors of 2 spectral norms" in n)
    assert told in note
    for s, file in zip((a, b), files, strict=True):
        model = perceptron(lambda layer: hooked(layer, n_power_iterations=3000))
        model.load_state_dict(s)
        model.train()(X)
        torch.save(model.state_dict(), file)
    line = losscli.interpolate(*files, **given, points=2)
    (note,) = (n for n in line.summary["notes"] if "singular vectors of 2 spectral norms" in n)
    assert note.endswith("are computed from the weights at every point")


def test_equal_singular_values_and_zero_weights_are_supported(tmp_path: Path) -> None:
    files, states, given = save(first, hooked, tmp_path, 1, 2)
    states[0]["0.weight_orig"] = 2 * torch.eye(5, 8)
    torch.save(states[0], files[0])
    result = losscli.interpolate(*files, **given, points=2, range=(0, 1), dtype="float64")
    assert result.table.floats("loss")[0] == pytest.approx(
        expected(first, hooked, states[0]), rel=1e-10
    )
    states[0]["0.weight_orig"] = torch.zeros(5, 8)
    torch.save(states[0], files[0])
    result = losscli.interpolate(*files, **given, points=3, range=(0, 1))
    assert math.isnan(result.table.floats("loss")[0])
    assert math.isfinite(result.table.floats("loss")[1])


@pytest.mark.parametrize(("build", "normalise"), CASES[:-1], ids=IDS[:-1])
def test_an_exported_point_is_right_when_loaded_plainly(
    build: Any, normalise: Any, tmp_path: Path
) -> None:
    files, (a, b), given = save(build, normalise, tmp_path, 1, 2)
    for alpha in (0.0, 0.3, 1.0):
        weights = export(*files, alpha).weights
        if alpha in (0.0, 1.0):
            assert all(torch.equal(weights[n], (b if alpha else a)[n]) for n in a if a[n].ndim)
            continue
        losses = oracle.losses(given["model"], dict(weights), X, Y, LOSSES["cross_entropy"])
        there = expected(build, normalise, oracle.blend(a, b, alpha))
        assert oracle.mean(losses) == pytest.approx(there, rel=1e-5)


@pytest.mark.parametrize(
    ("study", "normalise"),
    in_turn(["interpolate", "check"], hooked, chained, parametrizations.spectral_norm),
)
def test_derivatives_are_refused_where_the_weight_moves(
    study: str, normalise: Any, tmp_path: Path
) -> None:
    files, _, given = save(perceptron, normalise, tmp_path, 1, 2)

    def run(**more: Any) -> losscli.Result:
        if study == "check":
            return losscli.check(files[:1], **given, **more)
        return losscli.interpolate(*files, **given, **more, points=2, derivatives=True)

    with pytest.raises(UsageError, match="takes the singular vectors of a spectral norm") as caught:
        run()
    assert "\n" not in str(caught.value)
    assert run(only=("6.*",)).table.rows


def test_the_refusal_is_one_line_and_nothing_is_written(folder: Path, losscli: Losscli) -> None:
    (folder / "net.py").write_text(
        "from torch import nn\nfrom torch.nn.utils import spectral_norm as sn\n"
        "def net(): return nn.Sequential(sn(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))\n"
    )
    before = set(folder.iterdir())
    for command in (
        ("interpolate", "init:0", "init:1", "--derivatives"),
        ("sharpness", "init:0"),
        ("check", "init:0"),
    ):
        done = losscli(*command, "-m", "net.py:net", "-d", "npz:data.npz", "-o", "x")
        assert done.status == 2
        assert done.stderr.count("\n") == 1
        assert "Leave such weights out with --except '0.weight_orig'" in done.stderr
    assert {p for p in folder.iterdir() if p.name != "__pycache__"} == before


def test_a_journal_knows_a_slice_wherever_the_model_was_before() -> None:
    a, b = (state(perceptron, hooked, seed) for seed in (1, 2))
    objective = Objective(
        perceptron(hooked), LOSSES["cross_entropy"], {}, DataSet({"train": Split(X, Y)}),
        device=torch.device("cpu"),
    )  # fmt: skip
    names = [n for n, _ in objective.model.named_parameters()]
    line = Line(*({n: s[n] for n in names} for s in (a, b)))
    keys = []
    for there in (a, b):
        objective.load(there)
        keys.append(slice_key(objective, objective.splits, line, [(0.5,)]))
    assert keys[0] == keys[1]


def test_only_vectors_of_spectral_norms_are_touched() -> None:
    model = perceptron(hooked)
    before = copy.deepcopy(model.state_dict())
    objective = Objective(
        model, LOSSES["cross_entropy"], {}, DataSet({"train": Split(X, Y)}),
        device=torch.device("cpu"), dtype=torch.float64,
    )  # fmt: skip
    objective.load(before)
    vectors = {n for layer in spectral_layers(model, objective.tensors) for n in layer.names}
    assert vectors == {"2.weight_u", "2.weight_v", "4.weight_u", "4.weight_v"}
    for name, tensor in model.state_dict().items():
        assert (name in vectors) or torch.equal(tensor, before[name].double())
    with objective.as_stored():
        objective.load(before)
    assert all(torch.equal(t, before[n].double()) for n, t in model.state_dict().items())


def test_a_network_aligned_is_right_when_loaded_plainly(tmp_path: Path) -> None:
    files, (_, b), given = save(perceptron, hooked, tmp_path, 1, 2)
    aligned = losscli.align(*files, **given).checkpoint.weights
    one, other = (
        oracle.losses(given["model"], s, X, Y, LOSSES["cross_entropy"]) for s in (b, dict(aligned))
    )
    assert other == pytest.approx(one, rel=1e-5)
