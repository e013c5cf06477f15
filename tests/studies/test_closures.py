"""Models whose code computes with other tensors than their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import losscli
from losscli.errors import ModelError
from losscli.models import MLP
from tests import foreign
from tests.cases import CASES, Case, in_turn, sample
from tests.conftest import Losscli


def net(seed: int = 4) -> MLP:
    torch.manual_seed(seed)
    return MLP("6-5-3")


class Wrapped(nn.Module):
    """Calls a network through a function."""

    def __init__(self) -> None:
        super().__init__()
        self.net = inner = net()
        self.call = lambda x: inner(x) * 1.0


class Forwarding(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


class Partly(Wrapped):
    """Its first layer is called through a function, its second one is its own."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return self.net.layers[1](torch.relu(first))

    def __init__(self) -> None:
        super().__init__()
        layer = self.net.layers[0]
        self.first = lambda x: layer(x) * 1.0


def patched() -> nn.Module:
    model = net()
    forward = model.forward
    model.forward = lambda x: forward(x) * 1.0  # type: ignore[method-assign]
    return model


def hooked() -> nn.Module:
    model = net()
    bias = model.layers[1].bias
    model.register_forward_hook(lambda module, args, outputs: outputs + bias)
    return model


class Normed(nn.Module):
    """BatchNorm in training mode, called through a function: it would change the original."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)
        self.call = lambda x: norm(x) * 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(x))


BOUND: dict[str, Callable[[], nn.Module]] = {
    "forwarding": Forwarding,
    "partly": Partly,
    "patched": patched,
    "hooked": hooked,
    "normed": Normed,
    "closure": foreign.Closure,
}


def points(model: nn.Module, folder: Path) -> list[Path]:
    paths = [folder / f"{i}.pt" for i in range(3)]
    for path in paths:
        state = {n: torch.randn_like(t) if t.is_floating_point() else t
                 for n, t in model.state_dict().items()}  # fmt: skip
        state = {n: t.abs() + 0.1 if n.endswith("running_var") else t for n, t in state.items()}
        torch.save(state, path)
    return paths


def ends(model: nn.Module, folder: Path) -> list[Path]:
    return points(model, folder)[:2]


def data(features: int = 6) -> dict[str, tuple[Tensor, Tensor]]:
    return {"all": (torch.rand(12, features), torch.arange(12) % 3)}


def features_of(model: nn.Module) -> int:
    return 4 if isinstance(model, foreign.Closure) else 6


@pytest.mark.parametrize(("name", "training"), in_turn(BOUND, True, False))
def test_a_copy_that_computes_with_the_original_is_refused(
    name: str, training: bool, tmp_path: Path
) -> None:
    model = BOUND[name]().train(training)
    paths = points(model, tmp_path)
    before = copy.deepcopy(model.state_dict())
    for study in (losscli.interpolate, losscli.align):
        with pytest.raises(ModelError, match=r"tensors of the original.*function that builds"):
            study(*paths[:2], model=model, data=data(features_of(model)))
    for study in (losscli.trajectory, losscli.plane, losscli.barriers, losscli.check):
        with pytest.raises(ModelError, match="tensors of the original"):
            study(paths, model=model, data=data(features_of(model)))
    assert model.training is training
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", BOUND)
def test_a_function_that_builds_the_model_gives_the_losses_of_a_plain_loop(
    name: str, tmp_path: Path
) -> None:
    paths = ends(BOUND[name](), tmp_path)
    inputs = data(features_of(BOUND[name]()))
    build = BOUND[name]
    result = losscli.interpolate(
        *paths, model=build, data=inputs, points=3, range=(0.0, 1.0), dtype="float64"
    )
    for path, loss in zip(paths, (result.table["loss"][0], result.table["loss"][-1]), strict=True):
        model = build().double().eval()
        model.load_state_dict(torch.load(path, weights_only=True))
        x, y = inputs["all"]
        with torch.no_grad():
            assert loss == pytest.approx(F.cross_entropy(model(x.double()), y).item(), rel=1e-12)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_original_is_left_as_it_was_also_on_errors(
    error: type[BaseException], tmp_path: Path
) -> None:
    class Breaking(Normed):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise error

    model = Breaking().train()
    paths = ends(model, tmp_path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((error, ModelError)):
        losscli.interpolate(*paths, model=model, data=data())
    assert model.training
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


SHARED = nn.Linear(6, 3)


class Sharing(nn.Module):
    """Copied, it keeps a part that is the original's."""

    def __init__(self) -> None:
        super().__init__()
        self.part = SHARED

    def __deepcopy__(self, memo: dict[int, object]) -> Sharing:
        return Sharing()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


def test_a_copy_that_shares_memory_with_the_original_is_refused(tmp_path: Path) -> None:
    model = Sharing()
    before = SHARED.weight.clone()
    with pytest.raises(ModelError, match="tensors of the original"):
        losscli.interpolate(*ends(model, tmp_path), model=model, data=data())
    assert torch.equal(SHARED.weight, before)


GLOBAL = net()


class AllGlobal(nn.Module):
    """Has layers, and computes with a module that stands elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return GLOBAL(x)


class PartlyGlobal(AllGlobal):
    def forward(self, x: Tensor) -> Tensor:
        return self.net.layers[1](torch.relu(GLOBAL.layers[0](x)))


class Cached(nn.Module):
    """Computes with what it made of its weights when it was built."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3, bias=bias)
        self.norm = self.layer.weight.detach() / self.layer.weight.detach().norm()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.norm.to(x.dtype), self.layer.bias)


@pytest.mark.parametrize(
    ("build", "message", "given"),
    in_turn(
        [
            (AllGlobal, "no parameter of the model has an influence on its outputs"),
            (
                PartlyGlobal,
                r"parameter \[5, 6\] that is not the model's own, and net.layers.0.weight",
            ),
            (Cached, "no parameter of the model has an influence on its outputs"),
        ],
        "function",
        "object",
    ),
)
def test_a_forward_pass_that_reads_other_parameters_is_refused(
    build: Callable[[], nn.Module], message: str, given: str, tmp_path: Path
) -> None:
    model = build if given == "function" else build()
    for study in (losscli.trajectory, losscli.plane, losscli.barriers, losscli.check):
        with pytest.raises(ModelError, match=message):
            study(points(build(), tmp_path), model=model, data=data())


def test_a_refusal_is_one_line_and_nothing_is_written(folder: Path, losscli: Losscli) -> None:
    (folder / "mine.py").write_text(
        "from losscli.models import MLP\n"
        "GLOBAL = MLP('6-5-3')\n"
        "class Net(MLP):\n"
        "    def forward(self, x): return MLP.forward(GLOBAL, x)\n"
        "def build(): return Net('6-5-3')\n"
    )
    before = sorted(folder.iterdir())
    for dry in ([], ["--dry-run"]):
        done = losscli("interpolate", "a.pt", "b.pt", "-m", "mine.py:build", "-o", "x", "-q", *dry)
        assert done.status == 1
        assert done.stderr.count("\n") == 1
        assert "no parameter of the model has an influence" in done.stderr
        assert sorted(p for p in folder.iterdir() if p.name != "__pycache__") == before


@pytest.mark.parametrize("given", ["function", "object"])
def test_a_parameter_without_influence_is_noted(given: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return Cached(bias=True)

    model = build if given == "function" else build()
    result = losscli.interpolate(*ends(build(), tmp_path), model=model, data=data(), points=3)
    (note,) = [n for n in result.summary["notes"] if "no influence" in n]
    assert "layer.weight" in note


def test_equal_losses_at_different_checkpoints_are_noted(folder: Path) -> None:
    class Discarding(MLP):
        """Reads its own weights, and computes with others."""

        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            return GLOBAL(x)

    result = losscli.interpolate("a.pt", "b.pt", model=lambda: Discarding("6-5-3"), points=3)
    assert any("same losses to the last bit" in note for note in result.summary["notes"])
    for name in ("a.pt", "b.pt"):
        result = losscli.interpolate(name, name, points=3)
        assert not any("to the last bit" in note for note in result.summary["notes"])


# Threads hide what they read from a trace; it is told by its influence then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("case", sample(CASES, 0, 4), ids=str)
def test_models_of_every_kind_read_their_own_parameters(case: Case, tmp_path: Path) -> None:
    names = []
    for seed in (1, 2):
        names.append(tmp_path / f"{seed}.pt")
        torch.save(case.state(seed), names[-1])
    bound = {"closure", "patched", "hooked"}
    given = [case.build] if case.name in bound else [case.build, case.build()]
    tables = []
    for model in given:
        inputs = {"all": (copy.deepcopy(case.inputs), case.targets)}
        result = losscli.interpolate(
            *names, model=model, data=inputs, loss=case.loss, metric=("none",), points=3
        )
        assert not any("no influence" in note for note in result.summary["notes"])
        tables.append(result.table.to_csv())
    assert tables[0] == tables[-1]


def test_a_module_that_caches_its_first_weights_is_refused(tmp_path: Path) -> None:
    model = foreign.Remembering()
    with pytest.raises(ModelError, match="after the model was at another point"):
        losscli.interpolate(*ends(model, tmp_path), model=model, data=data(4))


def test_a_frozen_network_next_to_the_model_is_accepted(folder: Path) -> None:
    teacher = net(9)

    class Distilled(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) - 0.5 * teacher(x)

    result = losscli.interpolate("a.pt", "b.pt", model=lambda: Distilled("6-5-3"), points=3)
    assert not any("no influence" in note for note in result.summary["notes"])
