"""A loss depends on its own example alone, and a forward pass draws no random numbers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import losscli
from losscli.data import DataSet, RandomnessDetector, Split
from losscli.errors import LosscliError, LossError, NondeterministicModelError
from losscli.evaluation.objective import Objective
from losscli.evaluation.task_checks import check_task
from losscli.models import MLP
from tests.cases import sample
from tests.conftest import Losscli

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def inputs(number: int = 12, features: int = 6) -> Tensor:
    return torch.randn(number, features, generator=torch.Generator().manual_seed(0))


def objective_of(
    model: nn.Module,
    loss: Callable[..., Tensor] = F.cross_entropy,
    *,
    number: int = 12,
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    metrics: dict[str, Callable[..., Tensor]] | None = None,
) -> Objective:
    if loss is F.cross_entropy:
        loss = losscli.evaluation.losses.built_in.cross_entropy
    data = DataSet({"all": Split(inputs(number), torch.arange(number) % 3)})
    return Objective(
        model,
        loss,
        metrics or {},
        data,
        device=torch.device("cpu"),
        dtype=dtype,
        batch_size=batch_size,
    )


class Applied(nn.Module):
    """A network whose inputs or outputs pass through a function."""

    def __init__(self, function: Callable[[Tensor], Tensor], *, before: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = MLP("6-5-3")
        self.function = function
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.function(x)) if self.before else self.function(self.body(x))


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    scores = outputs @ outputs.T
    return F.cross_entropy(scores, torch.arange(len(outputs)), reduction="none")


def normalised(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses / losses.mean()


def slightly(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses + 1e-3 * (losses.mean() - losses)


def neighbour(x: Tensor) -> Tensor:
    return x + 0.1 * x.roll(1, 0)


def partner(x: Tensor) -> Tensor:
    return (x.view(-1, 2, x.shape[1]) + 0.1 * x.view(-1, 2, x.shape[1]).flip(1)).view(x.shape)


def without_statistics() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)
    )


def net() -> nn.Module:
    torch.manual_seed(0)
    return MLP("6-5-3")


DEPENDENT: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "contrastive": lambda: (net(), contrastive),
    "normalised": lambda: (net(), normalised),
    "slightly": lambda: (net(), slightly),
    "batchnorm": lambda: (without_statistics(), F.cross_entropy),
    "centred": lambda: (Applied(lambda x: x - x.mean(0)), F.cross_entropy),
    "centred scores": lambda: (Applied(lambda x: x - x.mean(0), before=False), F.cross_entropy),
    "neighbour": lambda: (Applied(neighbour), F.cross_entropy),
    "partner": lambda: (Applied(partner), F.cross_entropy),
    "scaled": lambda: (Applied(lambda x: x / x.abs().max()), F.cross_entropy),
}


@pytest.mark.parametrize(
    ("name", "number", "dtype"),
    sample(itertools.product(DEPENDENT, [2, 12, 300], DTYPES), 0, 2),
    ids=str,
)
def test_a_loss_that_depends_on_the_batch_is_refused(
    name: str, number: int, dtype: torch.dtype
) -> None:
    model, loss = DEPENDENT[name]()
    objective = objective_of(model, loss, number=number, dtype=dtype)
    with pytest.raises(LossError, match=r"depends on the other examples.*--batch-loss"):
        check_task(objective, model.state_dict())


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_small_batches_hide_no_dependence(batch_size: int) -> None:
    objective = objective_of(net(), contrastive, batch_size=batch_size)
    with pytest.raises(LossError, match="--batch-loss"):
        check_task(objective, net().state_dict())


def test_equal_halves_hide_no_dependence() -> None:
    x = inputs(8).repeat(2, 1)
    data = DataSet({"all": Split(x, torch.arange(16) % 3)})
    objective = Objective(net(), contrastive, {}, data, device=torch.device("cpu"))
    with pytest.raises(LossError, match="--batch-loss"):
        check_task(objective, net().state_dict())


def test_a_metric_that_depends_on_the_batch_is_refused() -> None:
    objective = objective_of(net(), metrics={"contrast": contrastive})
    with pytest.raises(LossError, match=r"the metric 'contrast' of an example depends"):
        check_task(objective, net().state_dict())


class Deep(nn.Module):
    """Many layers, normalised or not, that amplify rounding; scores of any size."""

    def __init__(self, scale: float, *, normalise: bool, depth: int = 10) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=1.5 / 8)
        self.norm = nn.LayerNorm(64) if normalise else nn.Identity()
        self.first = nn.Linear(6, 64)
        self.head = nn.Linear(64, 3)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = self.norm(torch.sin(3 * layer(x)))
        return self.head(x) * self.scale


@pytest.mark.parametrize(
    ("number", "scale", "normalise", "dtype"),
    sample(itertools.product([2, 37, 300], [1.0, 1e3], [False, True], DTYPES), 0, 5),
    ids=str,
)
def test_rounding_is_not_a_dependence(
    number: int, scale: float, normalise: bool, dtype: torch.dtype
) -> None:
    model = Deep(scale, normalise=normalise)
    objective = objective_of(model, number=number, dtype=dtype)
    check_task(objective, model.state_dict())
    assert not objective.unchecked


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_nor_where_a_model_computes_in_a_narrower_type_than_it_is_asked_for(scale: float) -> None:
    model = Applied(lambda x: (x.bfloat16() * scale).to(x.dtype), before=False)
    check_task(objective_of(model, number=64), model.state_dict())


def test_without_a_wider_copy_rounding_is_reported_with_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("losscli.evaluation.precision.host_budget", lambda: 0)
    for dtype in (torch.float32, torch.bfloat16):
        model = Deep(1e3, normalise=False, depth=1)
        check_task(objective_of(model, number=64, dtype=dtype), model.state_dict())
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(LossError, match="--batch-loss"):
            check_task(objective_of(net(), contrastive, dtype=dtype), net().state_dict())


class Whole(nn.Module):
    """Takes batches of one size alone, as programs that are exported for one do."""

    def __init__(self, size: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = Applied(function)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != self.size:
            raise RuntimeError(f"expected a batch of {self.size}")
        return self.inner(x)


@pytest.mark.parametrize("size", [1, 2, 7, 12])
def test_a_model_that_accepts_only_whole_batches_is_checked(size: int) -> None:
    def objective(function: Callable[[Tensor], Tensor]) -> tuple[Objective, dict[str, Tensor]]:
        model = Whole(size, function)
        return objective_of(model, number=size, batch_size=size), model.state_dict()

    free, state = objective(torch.tanh)
    check_task(free, state)
    assert not free.unchecked
    bound, state = objective(lambda x: x - x.mean(0))
    if size > 1:
        with pytest.raises(LossError, match="--batch-loss"):
            check_task(bound, state)


def test_checks_that_could_not_be_made_are_noted(folder: Path) -> None:
    class Picky(MLP):
        def forward(self, x: Tensor) -> Tensor:
            if len(x.unique(dim=0)) < 11:
                raise RuntimeError("too few different rows")
            return super().forward(x)

    result = losscli.interpolate(
        "a.pt", "b.pt", model=lambda: Picky("6-5-3"), points=3, split=("test",), batch_size=11
    )
    assert any("could not be checked" in note for note in result.summary["notes"])


def test_the_batch_is_evaluated_twice_in_all() -> None:
    model = net()
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    objective = objective_of(model, batch_size=12)
    check_task(objective, model.state_dict())
    # The last pass counts the operations of two examples.
    assert seen == [12, 6, 6, 2]


STUDIES = [
    ("interpolate", "a.pt", "b.pt", "--points", 3),
    ("trajectory", "a.pt", "b.pt", "c.pt"),
    ("plane", "a.pt", "--points", 2),
    ("barriers", "a.pt", "b.pt", "--points", 3),
    ("sharpness", "a.pt", "--samples", 1),
    ("check", "a.pt"),
]


@pytest.fixture
def mine(folder: Path) -> Path:
    torch.manual_seed(2)
    torch.save(MLP("6-5-3").state_dict(), "c.pt")
    (folder / "mine.py").write_text(
        "import random, numpy, torch\n"
        "from losscli.models import MLP\n"
        "from torch.nn import functional as F\n"
        "def loss(o, t):\n"
        "    s = o @ o.T\n"
        "    return F.cross_entropy(s, torch.arange(len(s)), reduction='none')\n"
        "class Rare(MLP):\n"
        "    def forward(self, x):\n"
        "        return super().forward(F.dropout(x, 1e-4, training=True))\n"
        "def rare(): return Rare('6-5-3')\n"
    )
    return folder


@pytest.mark.parametrize(
    ("arguments", "dry"),
    sample(itertools.product(STUDIES, [(), ("--dry-run",)]), 0),
    ids=lambda words: words[0] if words else "run",
)
def test_every_study_refuses_in_one_line_and_writes_nothing(
    arguments: tuple[object, ...], dry: tuple[str, ...], mine: Path, losscli: Losscli
) -> None:
    before = sorted(mine.iterdir())
    for more, word in (
        (("--loss", "mine.py:loss", "--metric", "none"), "--batch-loss"),
        (("--model", "mine.py:rare"), "random numbers"),
    ):
        done = losscli(*arguments, "-m", "mlp:6-5-3", *more, "-o", "x", "-q", *dry)
        assert done.status == 1
        assert done.stderr.count("\n") == 1
        assert word in done.stderr
        assert sorted(p for p in mine.iterdir() if p.name != "__pycache__") == before


class Drawing(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = MLP("6-5-3")
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + self.draw(x))


def forked(x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        return torch.randn_like(x)


def seeded(x: Tensor) -> Tensor:
    torch.manual_seed(5)
    return torch.zeros(1)


OWN = torch.Generator().manual_seed(0)
DRAWS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "torch": (torch.randn_like, "torch's generator.*differ from seed to seed"),
    "rare": (lambda x: (torch.rand_like(x) < 1e-9).float(), "torch's generator.*no loss"),
    "numpy": (lambda x: x * np.random.rand(), "numpy.random.*differ from seed"),  # noqa: NPY002
    "python": (lambda x: x * random.random(), "Python's random.*differ from seed"),
    "unused": (lambda x: torch.rand(1) * 0, "torch's generator.*no loss"),
    "seeded": (seeded, "torch's generator.*no loss"),
    "put back": (forked, "different results"),
    "own": (lambda x: torch.randn(x.shape, generator=OWN), "different results"),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_forward_pass_that_draws_random_numbers_is_refused(name: str) -> None:
    draw, message = DRAWS[name]
    model = Drawing(draw)
    with RandomnessDetector(torch.device("cpu")) as draws:
        pass
    assert not draws.names
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    with pytest.raises(NondeterministicModelError, match=message) as caught:
        check_task(objective_of(model), model.state_dict())
    assert "give --stochastic N, for means over N fixed seeds" in str(caught.value)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


def test_a_loss_or_metric_that_draws_is_refused_too() -> None:
    def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[:, 0] + torch.rand(len(outputs))

    for loss, metrics in ((noisy, {}), (F.cross_entropy, {"noisy": noisy})):
        with pytest.raises(NondeterministicModelError, match="random numbers"):
            check_task(objective_of(net(), loss, metrics=metrics), net().state_dict())


def test_dropout_at_only_one_checkpoint_is_found(folder: Path) -> None:
    class Late(MLP):
        """Draws only at weights other than those of the first checkpoint."""

        def forward(self, x: Tensor) -> Tensor:
            if not torch.equal(self.layers[0].bias.detach(), first):
                x = F.dropout(x, 1e-9, training=True)
            return super().forward(x)

    first = torch.load("a.pt", weights_only=True)["state_dict"]["layers.0.bias"]
    with pytest.raises(LosscliError, match="random numbers"):
        losscli.interpolate("a.pt", "b.pt", model=lambda: Late("6-5-3"), points=3)


def test_rare_dropout_is_refused_for_every_seed(folder: Path) -> None:
    class Rare(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 1e-3, training=True))

    for seed in range(16):
        torch.manual_seed(seed)
        with pytest.raises(NondeterministicModelError, match="random numbers"):
            losscli.interpolate("a.pt", "b.pt", model=lambda: Rare("6-5-3"), points=3)


class Centred(nn.Module):
    """A network with features that depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.head(hidden - hidden.mean(0))


def of_each_class(outputs: Tensor, targets: Tensor) -> Tensor:
    """Weighs each example by one over the number of its class in the batch."""
    numbers = torch.bincount(targets, minlength=3)[targets]
    return F.cross_entropy(outputs, targets, reduction="none") * len(targets) / numbers


STUDIES: dict[str, Callable[..., Any]] = {
    "interpolate": lambda files, **study: losscli.interpolate(files[0], files[-1], **study),
    "trajectory": losscli.trajectory,
    "plane": losscli.plane,
    "barriers": losscli.barriers,
    "check": losscli.check,
}


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("where", ["initialisation", "sorted data"])
def test_a_dependence_that_a_first_batch_of_the_first_checkpoint_hides_is_refused(
    name: str, where: str, tmp_path: Path
) -> None:
    build: Callable[[], nn.Module] = Centred if where == "initialisation" else lambda: MLP("6-5-3")
    files = [str(tmp_path / f"{i}.pt") for i in range(3)]
    for i, file in enumerate(files):
        torch.manual_seed(i)
        state = build().state_dict()
        if i == 0 and where == "initialisation":
            # As many initialisations have it: all outputs are the same.
            state["head.weight"] = torch.zeros_like(state["head.weight"])
        torch.save(state, file)
    targets = (torch.arange(60) % 3).sort().values
    loss = "cross_entropy" if where == "initialisation" else of_each_class
    with pytest.raises(LossError, match="depends on the other examples in its batch"):
        STUDIES[name](
            files, model=build, data={"all": (inputs(60), targets)}, loss=loss, batch_size=8
        )


@pytest.mark.parametrize("number", [2, 12])
def test_computing_in_float32_is_not_a_dependence_on_the_batch(number: int) -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = MLP("6-500-500-3")

        def forward(self, x: Tensor) -> Tensor:
            weights = {n: 3 * p.float() for n, p in self.body.named_parameters()}
            return torch.func.functional_call(self.body, weights, x.float()).double()

    torch.manual_seed(0)
    model = Narrow()
    check_task(objective_of(model, number=number, dtype=torch.float64), model.state_dict())
