"""Complex weights: they move as their real and imaginary parts do."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import losscli
from losscli.data import DataSet, Split
from losscli.errors import LosscliError
from losscli.evaluation.losses.built_in import LOSSES
from losscli.evaluation.objective import Objective
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.sweep import sweep
from losscli.weight_space.digest import digest
from losscli.weight_space.directions import random_directions
from losscli.weight_space.slices import Line
from losscli.weight_space.trajectory import random_walks
from tests.conftest import SAFETENSORS_HAS_COMPLEX, Losscli

State = dict[str, Tensor]


class Spectral(nn.Module):
    """A Fourier layer with complex weights, bias and buffer, as in neural operators."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        wide = dtype.to_complex()
        self.up = nn.Linear(1, 3, dtype=dtype)
        self.weight = nn.Parameter(torch.randn(3, 3, 4, dtype=wide) / 2)
        self.bias = nn.Parameter(torch.randn(4, dtype=wide) / 3)
        self.register_buffer("phase", torch.randn(4, dtype=wide))
        self.down = nn.Linear(3, 1, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(self.up(x).transpose(1, 2))[..., :4]
        modes = torch.einsum("bix,iox->box", modes, self.weight) + self.bias * self.phase
        h = torch.fft.irfft(modes, n=x.shape[1])
        return self.down(torch.relu(h).transpose(1, 2))


class First(nn.Module):
    """A complex linear layer first, whose products may be shared by all points."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(8, 5, dtype=dtype.to_complex())
        self.last = nn.Linear(5, 8, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(torch.complex(x[..., 0], x[..., 0].flip(1)))
        return self.last(z.abs()).unsqueeze(-1)


MODELS = [Spectral, First]
X = torch.randn(20, 8, 1, generator=torch.Generator().manual_seed(0))
Y = X.cumsum(1)


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128) if tensor.is_complex() else tensor.double()


def state(build: type[nn.Module], seed: int) -> State:
    torch.manual_seed(seed)
    return {n: t.clone() for n, t in build().state_dict().items()}


def mix(shares: list[float], states: list[State]) -> State:
    return {
        n: sum(share * wide(s[n]) for share, s in zip(shares, states, strict=True))
        for n in states[0]
    }


def loss(build: Any, there: State) -> float:
    """The oracle: the network in complex128, loaded plainly."""
    model = build(torch.float64)
    model.load_state_dict(there)
    with torch.no_grad():
        return float((model(X.double()) - Y.double()).square().mean())


def flat(build: type[nn.Module], s: State) -> np.ndarray:
    names = [n for n, _ in build().named_parameters()]
    parts = [torch.view_as_real(s[n]) if s[n].is_complex() else s[n] for n in names]
    return torch.cat([p.double().flatten() for p in parts]).numpy()


def save(build: Any, folder: Path, *seeds: int) -> tuple[list[str], list[State], dict[str, Any]]:
    states, files = [state(build, seed) for seed in seeds], []
    for seed, one in zip(seeds, states, strict=True):
        files.append(str(folder / f"{seed}.pt"))
        torch.save(one, files[-1])
    given = {"model": build, "data": {"train": (X, Y)}, "loss": "mse", "dtype": "float64"}
    return files, states, given


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_line_is_that_of_a_plain_complex128_loop(build: Any, dtype: str, tmp_path: Path) -> None:
    files, states, given = save(build, tmp_path, 1, 2)
    result = losscli.interpolate(*files, **given | {"dtype": dtype}, points=6, range=(-0.5, 2))
    for alpha, found in zip(result.table.floats("alpha"), result.table.floats("loss"), strict=True):
        there = loss(build, mix([1 - alpha, alpha], states))
        assert found == pytest.approx(there, rel=1e-11 if dtype == "float64" else 1e-5)
    a, b = (flat(build, s) for s in states)
    assert result.summary["distance"] == pytest.approx(np.linalg.norm(b - a), rel=1e-12)
    assert result.summary["moving"]["values"] == len(a)
    assert losscli.inspect(files[:1]).summary["checkpoints"][0]["norm"] >= np.linalg.norm(a)


@pytest.mark.parametrize("build", MODELS)
def test_every_way_gives_the_same_numbers(build: Any) -> None:
    a, b = (state(build, seed) for seed in (1, 2))
    objective = Objective(
        build(), LOSSES["mse"], {}, DataSet({"train": Split(X, Y)}),
        device=torch.device("cpu"), dtype=torch.float64, batch_size=8,
    )  # fmt: skip
    line, found = Line(a, b), {}
    for way in (Strategy.LOADED, Strategy.BOUND, Strategy.SHARED, Strategy.THREADS):
        objective.load(a)
        objective.strategy = way
        found[way] = sweep(objective, line, [(k / 7,) for k in range(8)])["train"].losses
        torch.testing.assert_close(found[way], found[Strategy.LOADED], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("build", MODELS)
def test_paths_ribbons_planes_and_barriers_are_those_of_numpy(build: Any, tmp_path: Path) -> None:
    files, states, given = save(build, tmp_path, 1, 2, 3)
    points = np.stack([flat(build, s) for s in states])
    path = losscli.trajectory(files, **given, residuals=2, reach=1)
    x, d = points - points[0], points[2] - points[0]
    p = x @ d / (d @ d)
    r = np.linalg.norm(x - p[:, None] * d, axis=1)
    assert path.table.floats("projection") == pytest.approx(p, rel=1e-11)
    assert path.table.floats("residual")[1] == pytest.approx(r[1], rel=1e-11)
    assert path.table.floats("distance") == pytest.approx(np.linalg.norm(x, axis=1), rel=1e-12)
    surface = path.more["surface"].where("step", 1).floats("loss")
    foot = mix([1 - p[1], 0, p[1]], states)
    ends = [loss(build, foot), loss(build, mix([0, 1, 0], states))]
    assert surface == pytest.approx(ends, rel=1e-10)

    plane = losscli.plane(files, **given, points=3)
    u = x[1] / np.linalg.norm(x[1])
    height = np.linalg.norm(x[2] - (x[2] @ u) * u)
    for at in zip(*(plane.table.floats(n) for n in ("x", "y", "loss")), strict=True):
        gamma = at[1] / height
        beta = (at[0] - gamma * (x[2] @ u)) / np.linalg.norm(x[1])
        there = loss(build, mix([1 - beta - gamma, beta, gamma], states))
        assert at[2] == pytest.approx(there, rel=1e-9)

    pca = losscli.plane(files, pca=True, **given, points=2)
    rows = points - points.mean(0)
    shares = np.linalg.svd(rows, compute_uv=False) ** 2
    found = [axis["explained_variance"] for axis in pca.summary["axes"]]
    assert found == pytest.approx(shares[:2] / shares.sum(), rel=1e-10)
    assert max(pca.more["path"].floats("off_plane")) < 1e-5

    pairs = losscli.barriers(files, **given, points=3)
    lengths = [np.linalg.norm(points[j] - points[i]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert pairs.table.floats("distance") == pytest.approx(lengths, rel=1e-12)


@pytest.mark.parametrize("build", MODELS)
def test_random_directions_are_complex_and_filter_normalised(build: Any, tmp_path: Path) -> None:
    files, (a,), given = save(build, tmp_path, 1)
    names = [n for n, _ in build().named_parameters()]
    u, v = random_directions(a, names, (), 0)
    for name in names:
        if a[name].ndim < 2:
            assert not u[name].any()
            continue
        assert u[name].dtype == v[name].dtype == a[name].dtype
        rows = [wide(t[name]).reshape(len(a[name]), -1) for t in (a, u, v)]
        if a[name].is_complex():
            assert u[name].imag.any()
            assert float((rows[1].conj() * rows[2]).sum().real.abs()) < 1e-5
        if a[name].numel() > len(a[name]):
            torch.testing.assert_close(rows[1].norm(dim=1), rows[0].norm(dim=1), rtol=1e-6, atol=0)
    result = losscli.plane(files, **given, points=3)
    for x, y, found in zip(*(result.table.floats(n) for n in ("x", "y", "loss")), strict=True):
        there = {n: wide(t) for n, t in a.items()}
        there |= {n: there[n] + x * wide(u[n]) + y * wide(v[n]) for n in names}
        assert found == pytest.approx(loss(build, there), rel=1e-10)


@pytest.mark.skipif(not SAFETENSORS_HAS_COMPLEX, reason="needs safetensors 0.7")
def test_export_moves_real_and_imaginary_parts(tmp_path: Path, losscli: Losscli) -> None:
    files, states, _ = save(Spectral, tmp_path, 1, 2)
    out = tmp_path / "x.safetensors"
    assert losscli("export", *files, "--alpha", 0.3, "-o", out).status == 0
    written = load_file(out)
    for name, tensor in mix([0.7, 0.3], states).items():
        assert written[name].dtype == states[0][name].dtype
        torch.testing.assert_close(wide(written[name]), tensor, rtol=1e-6, atol=1e-7)
    for file, one in zip(files, states, strict=True):
        torch.save({n: wide(t) for n, t in one.items()}, file)
    done = losscli("export", *files, "--alpha", 0.3, "-o", tmp_path / "wide.safetensors")
    assert done.status == 1
    assert done.stderr.count("\n") == 1
    assert "does not store torch.complex128. Write" in done.stderr
    assert done.stderr.endswith("wide.pt\n")
    assert not (tmp_path / "wide.safetensors").exists()


def test_unsupported_cases_are_refused_in_one_line(tmp_path: Path) -> None:
    files, _, given = save(Spectral, tmp_path, 1, 2)
    refused = {
        "--derivatives differentiates real parameters, and weight is complex": lambda: (
            losscli.interpolate(*files, **given, derivatives=True)
        ),
        "check differentiates real parameters, and weight is complex": lambda: losscli.check(
            files, **given
        ),
        "--dtype bfloat16 has no complex numbers": lambda: losscli.interpolate(
            *files, **given | {"dtype": "bfloat16"}
        ),
        "--dtype float16 has no complex numbers": lambda: losscli.plane(
            files[:1], **given | {"dtype": "float16"}
        ),
        "align permutes only real weights, and weight is complex": lambda: losscli.align(
            *files, model=Spectral, data=given["data"], loss="mse"
        ),
    }
    for message, run in refused.items():
        with pytest.raises(LosscliError, match=message) as caught:
            run()
        assert "\n" not in str(caught.value)
    # Where the complex weights stay, the others have derivatives.
    line = losscli.interpolate(*files, **given, points=2, derivatives=True, only=("up.*", "down.*"))
    assert all(map(math.isfinite, line.table.floats("slope")))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    files, states, given = save(Spectral, tmp_path, 1, 2, 3)
    states[1]["weight"].view(-1)[0] = complex(0, math.inf)
    torch.save(states[1], files[1])
    with pytest.raises(LosscliError, match=r"2\.pt: weight has weights that are infinite"):
        losscli.trajectory(files, **given)


def test_digests_tell_imaginary_parts_apart() -> None:
    one = torch.complex(torch.ones(3), torch.zeros(3))
    other = torch.complex(torch.ones(3), torch.ones(3))
    assert digest({"w": one}) == digest({"w": one.clone()}) != digest({"w": other})
    assert digest({"w": other.conj()}) == digest({"w": other.conj().resolve_conj()})


def test_random_walks_have_two_dimensions_for_each_complex_number(tmp_path: Path) -> None:
    files, states, given = save(Spectral, tmp_path, 1, 2, 3)
    result = losscli.trajectory(files, **given, surface=False, random_walk=True)
    points = [flat(Spectral, s) for s in states]
    steps = [float(np.linalg.norm(b - a)) for a, b in pairwise(points)]
    walks = random_walks(steps, len(points[0]), 10, 0)
    found = result.more["walk"].where("walk", 0).floats("residual")
    assert found == pytest.approx(walks[0].residual, rel=1e-9)
