"""Checkpoints with unexpected, missing and renamed tensors, and several files as one model."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import losscli
from losscli.errors import LosscliError
from tests import oracle
from tests.cases import sample
from tests.conftest import Losscli

N = 24
X = torch.randn(N, 5, generator=torch.Generator().manual_seed(1))
Y = torch.arange(N) % 3
DATA = {"train": (X, Y)}
SEED = 3

State = dict[str, Any]


class Net(nn.Module):
    """A backbone with BatchNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Normed(nn.Module):
    """The same with the current weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = weight_norm(nn.Linear(5, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).tanh())


def trained(build: Callable[[], nn.Module], seed: int) -> State:
    """A state dict with buffers that are not those of an initialisation."""
    torch.manual_seed(seed)
    state = build().state_dict()
    for name in state:
        if "running" in name:
            state[name] = torch.rand_like(state[name]) + 0.5
    return state


def initial(build: Callable[[], nn.Module], seed: int = SEED) -> State:
    """The values that the tensors that no file has keep."""
    torch.manual_seed(seed)
    return build().state_dict()


def new_norm(seed: int) -> State:
    return trained(Normed, seed)


def old_norm(seed: int) -> State:
    """The same as the weight norm of older versions of torch stores it."""
    parametrised = "parametrizations.weight.original"
    renamed_g = renamed(new_norm(seed), f"{parametrised}0", "weight_g")
    return renamed(renamed_g, f"{parametrised}1", "weight_v")


@dataclass(frozen=True)
class Case:
    """What is stored, and what the model should get.

    Attributes:
        name: Its name.
        stored: The content of the file of a seed.
        state: The state dict that the model should have.
        options: The options with which it is read.
        says: A part of the notes.
        build: The model.
    """

    name: str
    stored: Callable[[int], Any]
    state: Callable[[int], State]
    options: dict[str, Any] = field(default_factory=dict)
    says: str = ""
    build: Callable[[], nn.Module] = Net


def whole(seed: int) -> State:
    return trained(Net, seed)


def only(state: State, *prefixes: str) -> State:
    return {name: t for name, t in state.items() if name.startswith(prefixes)}


def inside(state: State, module: str) -> State:
    return {n.removeprefix(f"{module}."): t for n, t in only(state, module).items()}


def without(state: State, *words: str) -> State:
    return {name: t for name, t in state.items() if not any(word in name for word in words)}


def counted(state: State) -> State:
    """With the counters of a profiler."""
    return {**state, "total_ops": torch.zeros(1), "backbone.0.total_ops": torch.ones(1)}


def renamed(state: State, old: str, new: str) -> State:
    return {name.replace(old, new): tensor for name, tensor in state.items()}


IGNORE = {"ignore_unexpected": True}
BASE = {"allow_missing": "backbone.*"}
CASES = [
    Case("counters", lambda s: counted(whole(s)), whole, IGNORE,
         "since the model does not have them: total_ops"),
    Case("auxiliary head", lambda s: {**whole(s), "aux.weight": torch.ones(4, 6)}, whole, IGNORE,
         "aux.weight"),
    Case("beside a prefix", lambda s: {"state_dict": {
        **{f"net.{n}": t for n, t in whole(s).items()}, "net.criterion.weight": torch.ones(3)}},
        whole, IGNORE, "criterion.weight"),
    Case("head alone", lambda s: only(whole(s), "head"),
         lambda s: {**initial(Net), **only(whole(s), "head")}, BASE, "missing in"),
    Case("head under a prefix", lambda s: {"model": {
        f"module.{n}": t for n, t in only(whole(s), "head").items()}},
        lambda s: {**initial(Net), **only(whole(s), "head")}, BASE, "missing in"),
    Case("allowed and there", whole, whole, BASE),
    Case("statistics", lambda s: without(whole(s), "running", "tracked"),
         lambda s: {**whole(s), **{n: t for n, t in initial(Net).items() if "running" in n}},
         {"allow_missing": "*running*"}, "running_mean"),
    Case("both", lambda s: counted(only(whole(s), "backbone")),
         lambda s: {**initial(Net), **only(whole(s), "backbone")},
         {**IGNORE, "allow_missing": ["head.weight", "head.bias"]}, "missing in"),
    Case("renamed module", lambda s: renamed(whole(s), "head", "fc"), whole,
         {"rename": "fc=head"}),
    Case("renamed below a prefix", lambda s: {
        f"module.{n}": t for n, t in renamed(whole(s), "head", "fc").items()}, whole,
        {"rename": "fc=head"}),
    Case("renamed leaf", lambda s: renamed(whole(s), "backbone.1.weight", "backbone.1.gamma"),
         whole, {"rename": ["gamma=weight"]}),
    Case("swapped", lambda s: {
        {"head.weight": "head.bias", "head.bias": "head.weight"}.get(n, n): t
        for n, t in whole(s).items()}, whole,
        {"rename": ["head.weight=head.bias", "head.bias=head.weight"]}),
    Case("longer prefix", lambda s: renamed(whole(s), "backbone.", ""),
         whole, {"rename": ["0=backbone.0", "1=backbone.1"]}),
    Case("renamed and ignored", lambda s: counted(renamed(whole(s), "head", "a.fc")), whole,
         {**IGNORE, "rename": "a.fc=head"}, "total_ops"),
    Case("old names and counters", lambda s: {**old_norm(s), "total_ops": torch.ones(1)},
         new_norm, IGNORE, "total_ops", Normed),
    Case("old names of one module", lambda s: without(old_norm(s), "head"),
         lambda s: {**initial(Normed), **without(new_norm(s), "head")},
         {"allow_missing": "*"}, "head.weight", Normed),
    Case("modules of one file", lambda s: {
        "backbone": inside(whole(s), "backbone"), "head": inside(whole(s), "head"),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "epoch": 3}, whole),
    Case("modules of one wrapped file", lambda s: {"nets": {
        "backbone": {f"module.{n}": t for n, t in inside(whole(s), "backbone").items()},
        "head": inside(whole(s), "head"),
        "head_ema": {"weight": torch.ones(3, 6), "bias": torch.ones(3)}}}, whole),
]  # fmt: skip


def reference(case: Case, alpha: float) -> float:
    a, b = case.state(0), case.state(1)
    point, loss = oracle.blend(a, b, alpha), partial(F.cross_entropy, reduction="none")
    losses = oracle.losses(case.build, point, X, Y, loss, batch_size=N)
    return oracle.mean(losses)


def run(a: Any, b: Any, build: Any = Net, **options: Any) -> losscli.Result[Any]:
    return losscli.interpolate(
        a, b, model=build, data=DATA, loss="cross_entropy", metric="none", points=3, range=(0, 1),
        dtype="float64", seed=SEED, **options,
    )  # fmt: skip


@pytest.mark.parametrize("case", sample(CASES, 0, 2), ids=lambda case: case.name)
def test_a_checkpoint_is_loaded_as_by_hand(case: Case, tmp_path: Path) -> None:
    names = [str(tmp_path / f"{seed}.pt") for seed in (0, 1)]
    for seed, name in enumerate(names):
        torch.save(case.stored(seed), name)
    result = run(*names, case.build, **case.options)
    for alpha, _, loss, *_ in result.table.rows:
        assert loss == pytest.approx(reference(case, float(alpha)), rel=1e-12)
    notes = " ".join(result.summary["notes"])
    assert case.says in notes
    assert bool(case.says) == ("missing in" in notes or "ignored in" in notes)


def test_missing_tensors_do_not_move() -> None:
    heads = [only(whole(seed), "head") for seed in (0, 1)]
    result = run(*heads, **BASE)
    assert result.summary["moving"]["tensors"] == 2
    assert result.summary["allow_missing"] == ["backbone.*"]


def test_a_checkpoint_of_a_head_is_loaded_into_the_module_given_as_the_model() -> None:
    base = Net()
    base.load_state_dict(whole(7))
    case = Case("", whole, lambda s: {**whole(7), **only(whole(s), "head")})
    result = run(*(only(whole(seed), "head") for seed in (0, 1)), base, **BASE)
    for alpha, _, loss, *_ in result.table.rows:
        assert loss == pytest.approx(reference(case, float(alpha)), rel=1e-12)


@pytest.mark.parametrize("lacking", ["ab", "a", "b"])
def test_a_tensor_that_one_checkpoint_lacks_is_the_initial_one_at_every_point(
    lacking: str, tmp_path: Path
) -> None:
    for seed, name in enumerate("ab"):
        kept = only(whole(seed), "backbone") if name in lacking else whole(seed)
        torch.save(kept, tmp_path / f"{name}.pt")
    case = Case("", whole, lambda s: {**initial(Net), **only(whole(s), "backbone")})
    a, b, third = tmp_path / "a.pt", tmp_path / "b.pt", "init:5"
    result = run(a, b, allow_missing="head.*")
    for alpha, _, loss, *_ in result.table.rows:
        assert loss == pytest.approx(reference(case, float(alpha)), rel=1e-12)
    assert not any("head" in name for name in result.summary["moving"])
    assert "the model's initial values stay, at every point" in " ".join(result.summary["notes"])
    path = losscli.trajectory(
        [third, a, b], model=Net, data=DATA, loss="cross_entropy", metric="none", surface=False,
        dtype="float64", seed=SEED, allow_missing="head.*",
    )  # fmt: skip
    drawn = {**initial(Net, 5), **only(initial(Net), "head")}
    for row, state in zip(path.table.rows, (drawn, case.state(0), case.state(1)), strict=True):
        truth = oracle.mean(oracle.losses(Net, state, X, Y, F.cross_entropy, batch_size=1))
        assert row[path.table.columns.index("loss")] == pytest.approx(truth, rel=1e-12)


NET = ("-m", "tests.studies.test_names:Net", "-d", "tests.studies.test_names:data")


def data() -> dict[str, tuple[Tensor, Tensor]]:
    return DATA


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The modules of two networks in files, and files with more than they need."""
    folder = tmp_path_factory.mktemp("parts")
    for seed in (0, 1):
        backbone, head = (inside(whole(seed), module) for module in ("backbone", "head"))
        files = {
            "backbone": backbone,
            "head": head,
            "whole": whole(seed),
            "two": {"net": whole(seed), "ema": whole(seed + 9)},
            "f": {"c": renamed(head, "weight", "kernel")},
        }
        for name, content in files.items():
            torch.save(content, folder / f"{name}{seed}.pt")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save({"net": backbone}, checkpoint_id=folder / f"dcp{seed}", no_dist=True)
    return folder


@pytest.fixture
def parts(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of these files as the current folder."""
    monkeypatch.chdir(shutil.copytree(written, tmp_path, dirs_exist_ok=True))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("backbone=backbone{}.pt+head=head{}.pt", {}),
        ("head=head{}.pt+backbone=whole{}.pt", {}),
        ("backbone=dcp{}+head=head{}.pt", {}),
        ("backbone=./whole{}.pt+head=two{}.pt#net.head", {}),
        ("backbone=two{}.pt#net+head=two{}.pt#net", {}),
        ("trunk=backbone{}.pt+head=head{}.pt", {"rename": "trunk=backbone"}),
        ("backbone=backbone{}.pt+head=f{}.pt", {"rename": "kernel=weight"}),
    ],
)
def test_several_files_are_one_model(name: str, options: dict[str, Any], parts: Path) -> None:
    case = Case("", whole, whole)
    result = run(*(name.format(seed, seed) for seed in (0, 1)), **options)
    for alpha, _, loss, *_ in result.table.rows:
        assert loss == pytest.approx(reference(case, float(alpha)), rel=1e-12)


def test_modules_and_state_dicts_are_one_model_in_python() -> None:
    nets = [Net() for _ in range(2)]
    for seed, net in enumerate(nets):
        net.load_state_dict(whole(seed))
    a = {"backbone": nets[0].backbone.state_dict(), "head": nets[0].head.state_dict()}
    b = {"backbone": nets[1].backbone, "head": copy.deepcopy(nets[1].head)}
    for alpha, _, loss, *_ in run(a, b).table.rows:
        truth = reference(Case("", whole, whole), float(alpha))
        assert loss == pytest.approx(truth, rel=1e-12)


def test_an_existing_file_of_that_name_takes_precedence(parts: Path) -> None:
    name = "backbone=backbone0.pt+head=head0.pt"
    torch.save(whole(5), name)
    rows = run(name, "whole1.pt").table.rows
    truth = reference(Case("", whole, lambda s: whole(1 if s else 5)), 0.0)
    assert rows[0][2] == pytest.approx(truth, rel=1e-12)


def test_parts_that_are_exchanged_are_another_checkpoint(parts: Path) -> None:
    from losscli.checkpoint import read

    names = ("a=head0.pt+b=head1.pt", "b=head0.pt+a=head1.pt")
    digests = {read(name).checkpoint({}).sha256() for name in names}
    assert len(digests) == 2


ADVICE = [
    (lambda s: counted(whole(s)), "choose with -m, or give --ignore-unexpected"),
    (lambda s: only(whole(s), "head"), "or give --allow-missing 'backbone.*'"),
    (
        lambda s: without(whole(s), "running"),
        "--allow-missing backbone.1.running_mean --allow-missing backbone.1.running_var",
    ),
    (
        lambda s: counted(only(whole(s), "backbone")),
        "or give --ignore-unexpected --allow-missing 'head.*'",
    ),
    (lambda s: renamed(whole(s), "head", "fc"), "or give --rename fc=head"),
    (
        lambda s: renamed(renamed(whole(s), "head", "fc"), "backbone", "trunk.x"),
        "or give --rename trunk.x=backbone --rename fc=head",
    ),
    (lambda s: inside(whole(s), "head"), "or give backbone=FILE+head=a.pt"),
]
# What is given, and the name that is advised.
PARTS = [
    ("backbone=head0.pt+head=backbone0.pt", "backbone=backbone0.pt+head=head0.pt"),
    ("backbone=head0.pt", "backbone=FILE+head=head0.pt"),
]  # fmt: skip


@pytest.mark.parametrize(("stored", "advice"), ADVICE)
def test_a_mismatch_names_the_option_that_solves_it(
    stored: Callable[[int], State], advice: str, losscli: Losscli, parts: Path
) -> None:
    torch.save(stored(0), "a.pt")
    command = ("interpolate", "a.pt", "whole1.pt", *NET,
               "--points", "2", "--no-figure", "-o", "x")  # fmt: skip
    before = set(parts.iterdir())
    outcome = losscli(*command)
    assert (outcome.status, outcome.stderr.count("\n")) == (1, 1)
    assert outcome.stderr.endswith(f"{advice}\n")
    assert set(parts.iterdir()) - before <= {parts / "__pycache__"}
    options = advice.partition("give ")[2].replace("'", "").split()
    if "FILE" not in advice:
        assert losscli(*command, *(options or advice.replace("'", "").split())).status == 0


def test_a_file_with_one_layer_that_fits_a_module_is_not_advised_as_the_module(
    losscli: Losscli, parts: Path
) -> None:
    layer = renamed(only(whole(0), "head"), "head", "0")
    torch.save({**layer, "2.weight": torch.zeros(3)}, "a.pt")
    outcome = losscli("interpolate", "a.pt", "whole1.pt", *NET, "-o", "x")
    assert outcome.stderr.endswith("The model is tests.studies.test_names:Net; choose with -m\n")


def test_a_mismatch_says_which_file_names_the_model(losscli: Losscli, parts: Path) -> None:
    (parts / "losscli.toml").write_text('model = "mlp:2-3-2"\n')
    outcome = losscli("interpolate", "whole0.pt", "whole1.pt", "-o", "x")
    assert (outcome.status, outcome.stderr.count("\n")) == (1, 1)
    said = f"The model is mlp:2-3-2 ({parts / 'losscli.toml'}); choose with -m\n"
    assert outcome.stderr.endswith(said)
    outcome = losscli("interpolate", "whole0.pt", "whole1.pt", "-m", "mlp:2-3-2", "-o", "x")
    assert outcome.stderr.endswith("The model is mlp:2-3-2; choose with -m\n")


@pytest.mark.parametrize(("given", "advised"), PARTS)
def test_a_mismatch_of_parts_names_the_file_of_each_module(
    given: str, advised: str, losscli: Losscli, parts: Path
) -> None:
    command = ("interpolate", given, "whole1.pt", *NET, "--points", "2", "--no-figure", "-o", "x")
    outcome = losscli(*command)
    assert (outcome.status, outcome.stderr.count("\n")) == (1, 1)
    assert outcome.stderr.endswith(f"choose with -m, or give {advised}\n")
    if "FILE" not in advised:
        assert losscli("interpolate", advised, *command[2:]).status == 0


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"rename": "nope=head"}, 2,
     "--rename nope=head: no tensor of whole0.pt and 1 more has 'nope' in its name. losscli "),
    ({"rename": "head"}, 2, "--rename head does not have the form OLD=NEW"),
    ({"rename": "head=head"}, 2, "--rename head=head does not have the form OLD=NEW"),
    ({"rename": ["head=a", "head=b"]}, 2, "--rename head=… is given twice"),
    ({"rename": "head.weight=head.bias"}, 1,
     "--rename gives head.weight and head.bias of whole0.pt the same name, head.bias"),
    ({"allow_missing": "tail.*"}, 2, "the pattern 'tail.*' matches none of the 9 tensors"),
    ({"a": "head=head0.pt+head=head1.pt"}, 2, "names the module head twice"),
    ({"a": "backbone=backbone0.pt+head=no.pt"}, 1,
     "there is no checkpoint no.pt, in backbone=backbone0.pt+head=no.pt"),
    ({"a": "epoch=3.ckpt"}, 1, "there is no checkpoint epoch=3.ckpt"),
    ({"a": "backbone=two0.pt+head=head0.pt"}, 1,
     "two0.pt contains several state dicts: 'net.backbone', 'ema.backbone'"),
    ({"a": "head=head0.pt", "allow_missing": "head.*"}, 1, "missing backbone.0.weight"),
    ({"a": "tail=head0.pt+backbone=backbone0.pt"}, 1, "or give --rename tail=head"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "status", "text"), BAD)
def test_bad_names_are_refused_in_one_line(
    options: dict[str, Any], status: int, text: str, losscli: Losscli, parts: Path
) -> None:
    options = {"a": "whole0.pt", "b": "whole1.pt", **options}
    with pytest.raises(LosscliError) as caught:
        run(**options)
    assert text in str(caught.value)
    before = set(parts.iterdir())
    values = {key: [v] if isinstance(v, str) else v for key, v in options.items()}
    names = [*values.pop("a"), *values.pop("b")]
    flags = [(f"--{key.replace('_', '-')}", v) for key, each in values.items() for v in each]
    outcome = losscli("interpolate", *names, *NET, *(part for flag in flags for part in flag))
    assert (outcome.status, outcome.stderr.count("\n")) == (status, 1)
    assert text in outcome.stderr
    assert set(parts.iterdir()) == before


def test_the_options_are_in_the_summary_and_in_other_commands(
    losscli: Losscli, parts: Path
) -> None:
    torch.save(counted(renamed(whole(2), "head", "fc")), "c.pt")
    shared = (*NET, "--rename", "fc=head", "--ignore-unexpected")
    outcome = losscli("interpolate", "whole0.pt", "c.pt", *shared, "--points", "3", "--no-figure",
                      "-o", "x", "--json")  # fmt: skip
    summary = json.loads(outcome.stdout)
    assert (summary["rename"], summary["ignore_unexpected"]) == (["fc=head"], True)
    assert losscli("align", "whole0.pt", "c.pt", *shared, "-o", "y.safetensors").status == 0
