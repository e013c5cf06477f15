"""The recorder: which steps it saves, what the files hold, and how a record is continued."""

from __future__ import annotations

import copy
import csv
import itertools
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import losscli
from losscli.checkpoint import read
from losscli.errors import (
    CheckpointError,
    LosscliError,
    OutputError,
    SpecError,
    UntrustedCodeError,
    UsageError,
)
from losscli.models import MLP
from tests import oracle
from tests.conftest import Losscli
from tests.forks import PATIENCE, ended, fork

SHAPE = "6-5-3"
SPEC = f"mlp:{SHAPE}"
State = Mapping[str, Tensor]


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MLP(SHAPE)


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "inputs": torch.rand(20, 6, generator=generator),
        "targets": torch.arange(20) % 3,
    }


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recorder: losscli.Recorder,
    steps: int,
    states: dict[int, State] | None = None,
) -> None:
    """Trains; keeps a copy of the weights after each step."""
    inputs, targets = data().values()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        recorder.step(loss)
        if states is not None:
            states[recorder.steps_taken] = copy.deepcopy(model.state_dict())


def steps_in(folder: str) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in Path(folder).glob("step-*"))


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def content(folder: str) -> dict[str, Any]:
    """What the files of a record hold, by their names."""
    return {
        path.name: (metadata_of(path), {n: t.tolist() for n, t in load_file(path).items()})
        for path in Path(folder).glob("step-*.safetensors")
    }


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize(("steps", "count"), [(1, 2), (3, 30), (40, 2), (60, 7), (100, 30)])
def test_the_steps_are_spaced_as_cubes_with_the_first_and_the_last(
    steps: int, count: int, initial: bool
) -> None:
    with losscli.Recorder(
        nn.Linear(1, 1), "run", steps=steps, count=count, initial=initial
    ) as recorder:
        for _ in range(steps):
            recorder.step()
    found = steps_in("run")
    first = 0 if initial else 1
    assert (found[0], found[-1]) == (first, steps)
    assert len(found) == min(count, steps + 1 - first)
    cubes = {round(steps * (k / (count - 1)) ** 3 + 1e-9) for k in range(count)}
    gaps = [b - a for a, b in itertools.pairwise(found)]
    # Every step where cubes are less than a step apart, and then the cubes.
    dense = next((k for k, gap in enumerate(gaps) if gap > 1), len(gaps))
    assert {*found[dense + 1 :]} <= cubes
    assert {step for step in cubes if step >= found[dense]} <= {*found}


def test_a_record_may_begin_later() -> None:
    with losscli.Recorder(nn.Linear(1, 1), "run", steps=10, count=4, start=2) as recorder:
        for _ in range(8):
            recorder.step()
    assert steps_in("run") == [2, 3, 10]


def test_longer_and_shorter_training_end_with_the_last_step() -> None:
    for steps in (7, 15):
        with losscli.Recorder(nn.Linear(1, 1), f"run{steps}", steps=10, count=4) as recorder:
            for _ in range(steps):
                recorder.step()
    assert steps_in("run7") == [0, 1, 3, 7]
    assert steps_in("run15") == [0, 1, 3, 10, 15]


def test_a_record_is_exact_and_its_trajectory_needs_no_options(losscli: Losscli) -> None:
    """Against copies made in the loop, and their losses in a plain float64 loop."""
    from losscli import Recorder

    save_file(data(), "data.safetensors")
    model = network()
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    states = {0: copy.deepcopy(model.state_dict())}
    losses: dict[int, float] = {}
    with Recorder(
        model, "runs/a", steps=8, count=4, optimizer=optimizer, model_spec=SPEC,
        data_spec="safetensors:data.safetensors",
    ) as recorder:  # fmt: skip
        for step in range(1, 9):
            losses[step] = cross_entropy(model(data()["inputs"]), data()["targets"]).item()
            train(model, optimizer, recorder, 1, states)
            scheduler.step()
    saved = {step: Path(f"runs/a/step-{step:05}.safetensors") for step in steps_in("runs/a")}
    assert list(saved) == [0, 1, 2, 8]
    for step, path in saved.items():
        found = load_file(path)
        assert found.keys() == states[step].keys()
        assert all(torch.equal(tensor, states[step][name]) for name, tensor in found.items())
        expected = {
            "losscli.model": SPEC,
            "losscli.data": "safetensors:../../data.safetensors",
            "step": str(step),
            "learning_rate": repr(0.1 * 0.5 ** max(step - 1, 0)),
        }
        if step:
            expected["loss"] = repr(losses[step])
        assert metadata_of(path) == expected
    done = losscli("trajectory", "runs/a", "--no-figure", "--no-surface", "-q", "-o", "out")
    assert done.status == 0, done.stderr
    table = rows("out.csv")
    assert [Path(row["checkpoint"]).name for row in table] == [p.name for p in saved.values()]
    for row, step in zip(table, saved, strict=True):
        of_examples = oracle.losses(
            network, states[step], *data().values(),
            lambda o, t: cross_entropy(o, t, reduction="none"),
        )  # fmt: skip
        assert float(row["loss"]) == pytest.approx(oracle.mean(of_examples), rel=1e-6)


def test_specs_of_code_go_into_losscli_toml(losscli: Losscli) -> None:
    from losscli import Recorder

    Path("mine.py").write_text(
        "import torch\n"
        "def net(width=5):\n    from losscli.models import MLP\n    return MLP(f'6-{width}-3')\n"
        "def data():\n    return {'all': (torch.ones(4, 6), torch.zeros(4).long())}\n"
    )
    specs = {"model_spec": "mine.py:net,width=5", "data_spec": "mine.py:data"}
    for _ in range(2):  # The second time the file is there.
        model = network()
        with Recorder(model, "run", steps=2, start=0, **specs) as recorder:
            train(model, optimizer_of(model), recorder, 2)
    assert Path("run/losscli.toml").read_text() == (
        'model = "../mine.py:net,width=5"\ndata = "../mine.py:data"\n'
    )
    assert metadata_of(Path("run/step-00002.safetensors")).keys() == {"step", "loss"}
    done = losscli("trajectory", "run", "--no-figure", "-o", "out")
    assert (done.status, done.stderr.count("\n")) == (1, 1)
    assert "names code to run as its model" in done.stderr
    done = losscli("trajectory", "run", "--no-figure", "--no-surface", "-q", "-o", "out", "--trust")
    assert done.status == 0, done.stderr
    with pytest.raises(OutputError, match=r"losscli\.toml exists, without the line model = "):
        Recorder(network(), "run", steps=2, start=0, model_spec="mine.py:net")


def test_data_on_the_hub_go_into_losscli_toml() -> None:
    losscli.Recorder(network(), "run", steps=1, data_spec="hf:imdb,config=plain").close()
    assert Path("run/losscli.toml").read_text() == 'data = "hf:imdb,config=plain"\n'
    assert metadata_of(Path("run/step-00000.safetensors")) == {"step": "0"}


@pytest.mark.parametrize(
    ("kind", "spec", "stored"),
    [
        ("data", "text:a/x.txt,tokenizer=tok", "text:../../a/x.txt,tokenizer=../../tok"),
        ("data", "text:a/x.txt", "text:../../a/x.txt"),
        ("data", "hf:a", "hf:../../a"),
        ("data", "a/data.toml", "npz:../../a/x.npz,limit=5"),
        ("data", '"npz:a,b.npz"', '"npz:../../a,b.npz"'),
        ("model", "transformers:a", "transformers:../../a"),
        ("model", "mlp:6-5-3,activation=tanh", "mlp:6-5-3,activation=tanh"),
    ],
)
def test_paths_in_specs_are_relative_to_the_record(kind: str, spec: str, stored: str) -> None:
    Path("a").mkdir()
    Path("a/data.toml").write_text('name = "npz:x.npz"\nlimit = 5\n')
    losscli.Recorder(network(), "runs/b", steps=1, **{f"{kind}_spec": spec}).close()
    metadata = metadata_of(Path("runs/b/step-00000.safetensors"))
    assert metadata == {f"losscli.{kind}": stored, "step": "0"}


def test_the_optimisers_moments_are_saved_on_request(losscli: Losscli) -> None:
    from losscli import Recorder

    save_file(data(), "data.safetensors")
    model = network()
    groups = [{"params": [p]} for p in reversed([*model.parameters()])]
    groups[0]["lr"] = 0.5
    optimizer = torch.optim.Adam(groups, 0.01, amsgrad=True)
    with Recorder(
        model, "run", steps=4, count=3, optimizer=optimizer, moments=True, model_spec=SPEC,
        data_spec="safetensors:data.safetensors",
    ) as recorder:  # fmt: skip
        train(model, optimizer, recorder, 4)
    found = torch.load("run/step-00004.pt", weights_only=True)
    # The rates of the groups differ, so that there is no one learning rate.
    assert found.keys() == {
        "state_dict", "optimizer", "step", "loss", "losscli.model", "losscli.data"
    }  # fmt: skip
    expected = optimizer.state_dict()
    names = [name for name, _ in model.named_parameters()]
    for k, group in enumerate(found["optimizer"]["param_groups"]):
        assert group.pop("param_names") == [names[-1 - k]]
        assert group == expected["param_groups"][k]
    assert found["optimizer"]["state"].keys() == expected["state"].keys()
    for k, moments in expected["state"].items():
        assert moments.keys() >= {"exp_avg_sq", "max_exp_avg_sq"}
        stored = found["optimizer"]["state"][k]
        assert all(torch.equal(stored[key], value) for key, value in moments.items())
    done = losscli("trajectory", "run", "--no-figure", "--no-surface", "-q", "-o", "out")
    assert done.status == 0, done.stderr
    assert len(rows("out.csv")) == 3
    assert Recorder(model, "run", steps=4, optimizer=optimizer, moments=True).steps_taken == 4


class _WithState(nn.Linear):
    """A layer with a number next to its tensors, which only torch's format stores."""

    scale = 2

    def get_extra_state(self) -> Any:
        return {"scale": self.scale}

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"]


def test_extra_state_is_saved_in_torchs_format() -> None:
    model = _WithState(2, 2)
    with losscli.Recorder(model, "run", steps=1) as recorder:
        model.scale = 3
        recorder.step()
    for step, scale in ((0, 2), (1, 3)):
        found = _WithState(2, 2)
        path = f"run/step-{step:05}.pt"
        found.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        assert found.scale == scale
    assert losscli.Recorder(model, "run", steps=2).steps_taken == 1


class _Loss:
    """A loss that counts how often it is read."""

    def __init__(self) -> None:
        self.read = 0

    def __float__(self) -> float:
        self.read += 1
        return 1.5


def test_no_file_is_read_or_written_between_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    loss = _Loss()
    recorder = losscli.Recorder(model, "run", steps=1000, count=3)
    copies = []
    monkeypatch.setattr(model, "state_dict", lambda: copies.append(1) or {})
    for expected, steps in ((0, 124), (1, 1), (1, 1)):
        for _ in range(steps):
            recorder.step(loss)  # type: ignore[arg-type]
        assert loss.read == len(copies) == expected
    recorder.close(save=False)
    assert steps_in("run") == [0, 125]


def test_training_goes_on_while_a_file_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has the weights of its step, and the next checkpoint waits for it."""
    from losscli.checkpoint import saving

    written, may_write = threading.Event(), threading.Event()
    whole = saving.save_file

    def slow(*arguments: Any) -> None:
        assert may_write.wait(60)
        whole(*arguments)
        written.set()

    model = network()
    recorder = losscli.Recorder(model, "run", steps=2, count=3)
    monkeypatch.setattr(saving, "save_file", slow)
    expected = copy.deepcopy(model.state_dict())
    recorder.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert not written.is_set()
    assert steps_in("run") == [0]
    threading.Timer(0.05, may_write.set).start()
    recorder.step()
    assert steps_in("run")[:2] == [0, 1]
    recorder.close()
    assert steps_in("run") == [0, 1, 2]
    for step, tensors in ((1, expected), (2, model.state_dict())):
        found = load_file(f"run/step-{step:05}.safetensors")
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())


# --- names ---------------------------------------------------------------------------------------


class Inner(nn.Module):
    """A part of a model with a genuine name that wrappers use too."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.module(x))
        return found


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def _fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def _fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def _compiled_part(model: nn.Module) -> nn.Module:
    model.module = torch.compile(model.module)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "compile": torch.compile,  # type: ignore[dict-item]
    "part compiled": _compiled_part,
    "DDP of compile": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model)),  # type: ignore[arg-type]
    "compile of DDP": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)),  # type: ignore[return-value]
    "FSDP": _fsdp1,
    "FSDP2": _fsdp2,
}


def test_a_type_that_safetensors_cannot_store_is_saved_by_torch(folder: Path) -> None:
    model = nn.Linear(2, 2, dtype=torch.complex128)
    losscli.Recorder(model, "run", steps=1).close()
    found = torch.load("run/step-00000.pt")["state_dict"]
    assert torch.equal(found["weight"], model.weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_models_are_saved_under_the_names_of_the_plain_one(name: str, group: None) -> None:
    torch.manual_seed(0)
    model = Inner()
    expected = copy.deepcopy(model.state_dict())
    wrapped = WRAPPERS[name](model)
    optimizer = torch.optim.Adam(wrapped.parameters())
    for parameter in wrapped.parameters():
        parameter.grad = torch.ones_like(parameter)
    losscli.Recorder(wrapped, "run", steps=1).close()
    found = load_file("run/step-00000.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    optimizer.step()
    losscli.Recorder(wrapped, "moments", steps=1, optimizer=optimizer, moments=True).close()
    stored = torch.load("moments/step-00000.pt", weights_only=True)["optimizer"]
    names = [n for group in stored["param_groups"] for n in group["param_names"]]
    assert names == ["module.weight", "module.bias", "norm.weight", "norm.bias"]
    for k, key in enumerate(names):
        moment = stored["state"][k]["exp_avg_sq"]
        assert moment.shape == expected[key].shape
        assert torch.allclose(moment, torch.tensor(0.001))


def train_as_rank(rank: int, names: list[str]) -> None:
    """Trains in two processes; the second record continues the first, the third is refused."""
    for name in names:
        folder = Path(name)
        folder.mkdir(exist_ok=True)
        store = torch.distributed.FileStore(str(folder / "store"), 2)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        model = WRAPPERS[name](network())
        optimizer = torch.optim.Adam(model.parameters())
        own = folder / f"of-{rank}"  # the other rank does not see the folder
        own.mkdir()
        for _ in range(2):
            with losscli.Recorder(model, own / "run", steps=6, count=4) as recorder:
                train(model, optimizer, recorder, 3)
        options = {"optimizer": optimizer, "moments": True, "start": 6}
        losscli.Recorder(model, own / "moments", steps=6, **options).close()
        with torch.no_grad():
            next(model.parameters()).zero_()
        try:
            losscli.Recorder(model, own / "run", steps=6)
        except OutputError as error:
            (folder / f"error-{rank}").write_text(str(error))
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "names", [["DDP", "FSDP2"], pytest.param(["FSDP"], marks=pytest.mark.stress)]
)
def test_with_two_ranks_the_first_writes_and_both_know_the_step(names: list[str]) -> None:
    import torch.distributed.fsdp  # once, and not in each fork

    pids = []
    for rank in range(2):
        if pid := fork():
            pids.append(pid)
            continue
        # A process that ends normally may abort in PyTorch, which joins not all threads of gloo.
        status = 1
        try:
            signal.alarm(PATIENCE)
            warnings.simplefilter("ignore")
            train_as_rank(rank, names)
            status = 0
        except BaseException:
            Path(f"failure-{rank}").write_text(traceback.format_exc())
            raise
        finally:
            os._exit(status)
    statuses = [ended(pid) for pid in pids]
    assert statuses == [0, 0], [path.read_text() for path in Path().glob("failure-*")]
    # Both ranks train on the same data, so that one process alone finds the same.
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    with losscli.Recorder(model, "alone", steps=6, count=4) as recorder:
        train(model, optimizer, recorder, 6)
    expected = load_file("alone/step-00006.safetensors")
    for name in names:
        assert steps_in(f"{name}/of-0/run") == [0, 1, 2, 3, 6]
        assert list(Path(f"{name}/of-1").iterdir()) == []
        errors = {Path(f"{name}/error-{rank}").read_text() for rank in range(2)}
        assert len(errors) == 1
        assert "record of another run" in errors.pop()
        found = load_file(f"{name}/of-0/run/step-00006.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.allclose(t, expected[key], rtol=1e-5) for key, t in found.items())
        path = f"{name}/of-0/moments/step-00006.pt"
        stored = torch.load(path, weights_only=True)["optimizer"]
        (group,) = stored["param_groups"]
        assert group["param_names"] == [key for key, _ in model.named_parameters()]
        for k, moments in optimizer.state_dict()["state"].items():
            moment = stored["state"][k]["exp_avg_sq"]
            assert torch.allclose(moment, moments["exp_avg_sq"], rtol=1e-4)


# --- continuing ----------------------------------------------------------------------------------


def test_an_interrupted_record_is_continued() -> None:
    """In pieces, and restored from a step between two checkpoints: the same files."""
    model = network()
    with losscli.Recorder(model, "whole", steps=30, count=6) as recorder:
        train(model, optimizer_of(model), recorder, 30)
    model = network()
    optimizer = optimizer_of(model)
    states: dict[int, State] = {}
    first = losscli.Recorder(model, "run", steps=30, count=6)
    train(model, optimizer, first, 8, states)
    first.close()  # saves step 8
    second = losscli.Recorder(model, "run", steps=30, count=6)
    assert second.steps_taken == 8
    train(model, optimizer, second, 12, states)
    second.close(save=False)  # as if it were killed
    assert steps_in("run") == [0, 1, 2, 6, 8, 15]
    model.load_state_dict(states[7])
    third = losscli.Recorder(model, "run", steps=30, count=6, start=7)
    train(model, optimizer, third, 5)
    assert steps_in("run") == [0, 1, 2, 6, 8, 15]
    train(model, optimizer, third, 3)
    third._wait()
    assert steps_in("run") == [0, 1, 2, 6, 15]
    train(model, optimizer, third, 15)
    third.close()
    assert content("run") == content("whole")


def test_the_folder_of_another_run_is_refused_and_unchanged() -> None:
    model = network()
    with losscli.Recorder(model, "run", steps=8, count=4) as recorder:
        train(model, optimizer_of(model), recorder, 8)
    before = content("run")
    again = "does not hold the weights that the model has now"
    for other, start, message in (
        (network(1), None, again),
        (network(1), 0, again),
        (network(1), 2, again),
        (network(), 2, again),
        (network(), None, f"{again}.*or give start=N"),  # the same start, and maybe another rate
        (MLP("6-4-3"), None, "is a checkpoint of another model"),
        (MLP("6-4-3"), 5, "is a checkpoint of another model"),
        (network().double(), 0, again),
    ):
        with pytest.raises(OutputError, match=message) as caught:
            losscli.Recorder(other, "run", steps=8, count=4, start=start)
        assert "\n" not in str(caught.value)
    assert content("run") == before
    losscli.Recorder(network(), "run", steps=8, count=4, start=0).close()
    losscli.Recorder(model, "run", steps=8, count=4).close()
    assert content("run") == before


def test_two_recorders_do_not_write_to_one_folder() -> None:
    one, other = network(), network()
    with losscli.Recorder(one, "run", steps=8, count=4) as recorder:
        before = content("run")
        with pytest.raises(OutputError, match="another recorder writes to run"):
            losscli.Recorder(other, "run", steps=8, count=4)
        assert content("run") == before
        train(one, optimizer_of(one), recorder, 8)
    losscli.Recorder(one, "run", steps=8, count=4).close()


def test_after_an_exception_no_half_step_is_saved() -> None:
    model = network()
    recorder = losscli.Recorder(model, "run", steps=8, count=4)

    def fail() -> None:
        with recorder:
            train(model, optimizer_of(model), recorder, 5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert steps_in("run") == [0, 1, 2]


@pytest.mark.parametrize("count", [2, 4])
def test_a_kill_during_a_save_leaves_whole_files_and_is_continued(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from losscli.checkpoint import saving

    whole = saving.save_file
    saves: list[Path] = []

    def killed(tensors: Any, path: Path, metadata: Any) -> None:
        saves.append(path)
        if len(saves) < count:
            whole(tensors, path, metadata)
            return
        path.write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    model = network()
    optimizer = optimizer_of(model)
    pid = fork()
    if not pid:
        try:
            signal.alarm(PATIENCE)
            monkeypatch.setattr(saving, "save_file", killed)
            recorder = losscli.Recorder(model, "run", steps=30, count=6)
            train(model, optimizer, recorder, 30)
        finally:
            os._exit(99)
    assert ended(pid) == -signal.SIGKILL
    found = [path.name for path in Path("run").iterdir() if not path.name.startswith(".")]
    assert len(found) == count - 1
    assert len([*Path("run").iterdir()]) == count
    last = max(steps_in("run"))
    model.load_state_dict(load_file(f"run/step-{last:05}.safetensors"))
    with losscli.Recorder(model, "run", steps=30, count=6) as recorder:
        train(model, optimizer, recorder, 30 - last)
    fresh = network()
    with losscli.Recorder(fresh, "whole", steps=30, count=6) as recorder:
        train(fresh, optimizer_of(fresh), recorder, 30)
    assert content("run") == content("whole")
    assert not [*Path("run").glob(".*")]


@pytest.mark.stress
def test_a_kill_at_any_instant_leaves_whole_files() -> None:
    for instant in range(1, 40):
        model = network()
        pid = fork()
        if not pid:
            try:
                signal.setitimer(signal.ITIMER_REAL, instant * 0.002)  # SIGALRM ends the process
                recorder = losscli.Recorder(model, f"run{instant}", steps=10**6, count=10**6)
                train(model, optimizer_of(model), recorder, 10**6)
            finally:
                os._exit(99)
        assert ended(pid) == -signal.SIGALRM
        for path in Path(f"run{instant}").glob("step-*"):
            assert read(str(path)).select(None).weights.keys() == network().state_dict().keys()


# --- errors --------------------------------------------------------------------------------------

BAD: dict[str, tuple[type[LosscliError], str, dict[str, Any]]] = {
    "no step": (UsageError, "steps must be at least 1, not 0", {"steps": 0}),
    "one checkpoint": (UsageError, "count must be at least 2, not 1", {"count": 1}),
    "negative start": (UsageError, "start must be at least 0, not -1", {"start": -1}),
    "half a step": (UsageError, r"steps must be a whole number, not 1\.5", {"steps": 1.5}),
    "no module": (UsageError, "model must be a Module, not a dict", {"model": {}}),
    "unknown": (UsageError, r"Recorder\(\) has no argument 'step'.*'steps'", {"step": 3}),
    "another unknown": (UsageError, "It takes model, folder, steps and 7 more", {"qqq": 3}),
    "no optimiser": (UsageError, r"needs the optimiser\. Give optimizer=", {"moments": True}),
    "another optimiser": (UsageError, "optimizer has no param_groups", {"optimizer": 3}),
    "unknown model": (SpecError, "unknown model 'mpl'.*'mlp'", {"model_spec": "mpl:6-5-3"}),
    "no such file": (SpecError, "cannot be read", {"data_spec": "absent.toml"}),
    "no such code": (
        SpecError,
        r"there is no file mein\.py\. Relative",
        {"model_spec": "mein.py:f"},
    ),
    "code in a file": (UntrustedCodeError, "names code", {"data_spec": "code.toml"}),
    "a file": (
        OutputError,
        "the folder file cannot be written to: File exists",
        {"folder": "file"},
    ),
    "lazy": (CheckpointError, "has no values yet", {"model": nn.LazyLinear(3)}),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_misuse_is_one_line_and_writes_nothing(name: str) -> None:
    Path("file").write_text("mine")
    Path("code.toml").write_text('name = "mine.py:data"\n')
    before = sorted(Path().iterdir())
    kind, message, options = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        losscli.Recorder(**{"model": network(), "folder": "run", "steps": 3, **options})
    assert "\n" not in str(caught.value)
    assert sorted(Path().iterdir()) == before


def test_a_loss_that_is_not_a_number_is_refused() -> None:
    recorder = losscli.Recorder(network(), "run", steps=3)
    with pytest.raises(UsageError, match="loss must be a number, not a Tensor"):
        recorder.step(torch.ones(2))
    recorder.close(save=False)
    with pytest.raises(UsageError, match="the recorder is closed"):
        recorder.step()


def test_a_checkpoint_that_could_not_be_written_is_an_error_at_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from losscli.checkpoint import saving

    def full(_tensors: Any, path: Path, _metadata: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    recorder = losscli.Recorder(network(), "run", steps=9, count=10)
    message = r"step-00001\.safetensors cannot be written: No space left on device"
    with monkeypatch.context() as disk:
        disk.setattr(saving, "save_file", full)
        recorder.step()
        with pytest.raises(OutputError, match=message):
            recorder.step()
    recorder.close()
    assert steps_in("run") == [0, 2]
    assert not [*Path("run").glob(".*")]
    monkeypatch.setattr(saving, "save_file", full)
    recorder = losscli.Recorder(network(), "other", steps=9, count=9, initial=False)
    recorder.step()
    with pytest.raises(OutputError, match=message):
        recorder.close()
    recorder.close()
    assert [*Path("other").iterdir()] == []
