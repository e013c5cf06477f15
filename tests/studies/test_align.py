"""``losscli align``: from two files to a third, which is B in the order of A, or to one line."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import losscli as library
from losscli.checkpoint import state as checkpoint_state
from losscli.errors import NondeterministicModelError, OutputError
from losscli.models import MLP
from losscli.weight_space.permutations import Group, Member, permute
from losscli.weight_space.vectors import distance
from tests import foreign
from tests.cases import sample
from tests.conftest import Losscli
from tests.networks import NETWORKS, Dense

pytestmark = pytest.mark.usefixtures("traced_once")

ALIGN = ("align", "a.pt", "b.pt", "-o", "aligned.safetensors")


def outputs(build: type[nn.Module] | nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor:
    """By a plain model in float64."""
    model = (build if isinstance(build, nn.Module) else build()).double().eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(x.double())


def test_b_is_written_in_the_order_of_a(losscli: Losscli, folder: Path) -> None:
    done = losscli(*ALIGN)
    assert done.status == 0, done.stderr
    a, b = (torch.load(name)["state_dict"] for name in ("a.pt", "b.pt"))
    aligned = load_file("aligned.safetensors")
    places = [b["layers.0.bias"].tolist().index(v) for v in aligned["layers.0.bias"].tolist()]
    assert sorted(places) == list(range(5))
    assert places != list(range(5))
    assert torch.equal(aligned["layers.0.weight"], b["layers.0.weight"][places])
    assert torch.equal(aligned["layers.1.weight"], b["layers.1.weight"][:, places])
    assert torch.equal(aligned["layers.1.bias"], b["layers.1.bias"])
    assert distance(a, aligned) < distance(a, b)
    assert f"‖B − A‖       {distance(a, b):.4g}, permuted {distance(a, aligned):.4g}" in done.stdout
    moved = sum(i != p for i, p in enumerate(places))
    assert f"hidden units  5 in 1 group; {moved} of them moved" in done.stdout
    assert re.search(
        r"^function +that of B: outputs on 40 examples differ by \S+ of the largest, in \w+$",
        done.stdout,
        re.MULTILINE,
    )
    assert done.stderr == "note: wrote aligned.safetensors\n"
    x = torch.rand(9, 6)
    torch.testing.assert_close(
        outputs(MLP("6-5-3"), aligned, x), outputs(MLP("6-5-3"), b, x), rtol=1e-12, atol=1e-12
    )


def test_the_summary_as_json(losscli: Losscli, folder: Path) -> None:
    found = json.loads(losscli(*ALIGN, "--json", "-q").stdout)
    a, b = (torch.load(name)["state_dict"] for name in ("a.pt", "b.pt"))
    aligned = load_file("aligned.safetensors")
    assert found["file"] == "aligned.safetensors"
    assert [c["name"] for c in found["checkpoints"]] == ["a.pt", "b.pt"]
    (group,) = found["groups"]
    assert group["units"] == found["units"] == 5
    assert group["tensors"] == ["layers.0.weight", "layers.0.bias", "layers.1.weight"]
    assert found["distance"] == {
        "before": pytest.approx(distance(a, b), rel=1e-12),
        "after": pytest.approx(distance(a, aligned), rel=1e-12),
    }
    for when, other in (("before", b), ("after", aligned)):
        product = sum(float((a[n].double() * other[n].double()).sum()) for n in a)
        assert found["inner_product"][when] == pytest.approx(product, rel=1e-12)
    assert found["check"]["dtype"] == "float64"
    assert found["check"]["examples"] == 40
    assert 0 <= found["check"]["largest_difference"] < 1e-13


def test_the_aligned_checkpoint_has_the_metadata_of_b_and_needs_no_options(
    losscli: Losscli, folder: Path
) -> None:
    state = torch.load("b.pt")
    torch.save({**state, "losscli.loss": "cross_entropy", "epoch": 7}, "b.pt")
    assert losscli(*ALIGN).status == 0
    with safe_open("aligned.safetensors", "pt") as file:
        assert file.metadata() == {
            "losscli.model": "mlp:6-5-3", "losscli.loss": "cross_entropy", "epoch": "7",
        }  # fmt: skip
    arguments = ["--points", "3", "-q", "-o", "-"]
    rows = [
        losscli("interpolate", "a.pt", name, *arguments).stdout.splitlines()
        for name in ("b.pt", "aligned.safetensors")
    ]
    before, after = ([line.split(",") for line in lines[1:]] for lines in rows)
    ends = [(x, y) for x, y in zip(before, after, strict=True) if x[0] == "1.0"]
    assert len(ends) == 2
    for x, y in ends:
        assert float(x[2]) == pytest.approx(float(y[2]), rel=1e-6)
    # Elsewhere on the line it is another network.
    assert before != after


def test_types_buffers_and_tied_names_are_kept(losscli: Losscli, tmp_path: Path) -> None:
    network = next(n for n in NETWORKS if n.name == "tied")
    a, b = (network.model(seed).float() for seed in (1, 2))
    torch.save(a.state_dict(), tmp_path / "a.pt")
    torch.save({"state_dict": b.bfloat16().state_dict()}, tmp_path / "b.pt")
    data = {"all": (network.inputs, torch.arange(7) % 3)}
    found = library.align(
        str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), model=network.build, data=data
    )
    weights = found.checkpoint.weights
    assert list(weights) == list(b.state_dict())
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["first.weight"], weights["twin.weight"])
    assert torch.equal(weights["middle.bias"], weights["again.bias"])
    assert found.summary["moved"] > 0
    torch.testing.assert_close(
        outputs(network.build(), dict(weights), network.x),
        outputs(network.build(), b.state_dict(), network.x),
        rtol=1e-12,
        atol=1e-12,
    )


def test_a_network_that_was_shuffled_is_found_again_with_its_buffers(tmp_path: Path) -> None:
    network = next(n for n in NETWORKS if n.name == "dense")
    a = network.model(1).float()
    with torch.no_grad():
        b = Dense()
        b.load_state_dict(a.state_dict())
        p = torch.tensor([3, 0, 1, 2])
        for tensor in (b.first.weight, b.first.bias, *(b.norm.state_dict(keep_vars=True).values())):
            if tensor.ndim:
                tensor[:4] = tensor[:4][p]
        b.second.weight[:] = b.second.weight[:, p]
        flat = b.hidden.weight.view(7, 9, 16)
        flat[:, :4] = flat[:, p]
    for name, model in (("a", a), ("b", b)):
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    data = {"all": (network.inputs, torch.arange(7) % 3)}
    found = library.align(
        str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), model=network.build, data=data
    )
    assert found.summary["moved"] == 4
    assert found.summary["distance"]["before"] > 1
    assert found.summary["distance"]["after"] == 0
    state = a.state_dict()
    assert all(torch.equal(found.checkpoint.weights[name], state[name]) for name in state)


# The stream and the heads of transformers, normalised groups, time steps, units without variance.
@pytest.mark.parametrize("name", sample(["gpt", "grouped", "gru", "shared", "resnet"], 0, 5))
def test_by_activations_a_shuffled_network_is_found_again(name: str) -> None:
    network = next(n for n in NETWORKS if n.name == name)
    a = network.model(3).float().state_dict()
    generator = torch.Generator().manual_seed(4)
    order = [torch.randperm(group.size, generator=generator) for group in network.groups]
    b = permute(a, network.groups, order)
    data = {"all": (network.inputs, torch.arange(7) % 3)}
    found = library.align(a, b, model=network.build, data=data, by="activations")
    assert found.summary["distance"]["before"] > 1
    assert all(torch.equal(found.checkpoint.weights[key], a[key]) for key in a)
    activations = found.summary["activations"]
    assert activations["correlation"]["after"] == pytest.approx(1, abs=1e-6)
    assert (activations["split"], activations["examples"]) == ("all", 7)
    assert found.summary["notes"] == [
        "the data have no split train: statistics are those of all, the only one"
    ]


def test_by_activations_the_text_names_the_examples_and_units_without_variance(
    losscli: Losscli, folder: Path
) -> None:
    for name, unit in (("a.pt", 1), ("b.pt", 3)):
        saved = torch.load(name)
        saved["state_dict"]["layers.0.bias"].fill_(1)[unit] = -100
        torch.save(saved, name)
    done = losscli(*ALIGN, "--by", "activations", "--limit", "20")
    assert done.status == 0, done.stderr
    assert "over 20 examples of train; without variance: 1 of A, 1 of B" in done.stdout
    b = torch.load("b.pt")["state_dict"]
    aligned = load_file("aligned.safetensors")
    # B's unit 3, which is always 0, is where A's is.
    assert torch.equal(aligned["layers.0.weight"][1], b["layers.0.weight"][3])


def test_several_checkpoints_are_each_aligned_as_on_their_own(
    losscli: Losscli, folder: Path
) -> None:
    (folder / "runs/one").mkdir(parents=True)
    (folder / "runs/two").mkdir()
    for seed, name in enumerate(("one/x.pt", "two/x.pt")):
        torch.manual_seed(7 + seed)
        torch.save(MLP("6-5-3").state_dict(), folder / "runs" / name)
    names = ["runs/one/x.pt", "runs/two/x.pt"]
    done = losscli("align", "a.pt", *names, "-o", "aligned", "--json")
    assert done.status == 0, done.stderr
    entries = json.loads(done.stdout)["aligned"]
    files = ["aligned/one-x.safetensors", "aligned/two-x.safetensors"]
    assert [entry["file"] for entry in entries] == files
    assert sorted(map(str, Path("aligned").iterdir())) == files
    table = losscli("align", "a.pt", *names, "-o", "aligned", "--force").stdout
    lists = library.align("a.pt", names)
    for name, file, entry, own in zip(names, files, entries, lists, strict=True):
        one = load_file(file)
        assert all(torch.equal(own.checkpoint.weights[key], one[key]) for key in one)
        assert entry["checkpoints"][1]["name"] == name
        line = next(line for line in table.splitlines() if line.startswith(name))
        assert f"{entry['distance']['after']:.4g}" in line
        assert line.endswith(file)
    # The second is as it would be without the first.
    assert losscli("align", "a.pt", names[1], "-o", "x.safetensors").status == 0
    alone = load_file("x.safetensors")
    assert all(torch.equal(one[key], alone[key]) for key in alone)
    # A folder is the checkpoints in it; what is there is not overwritten.
    (folder / "runs/y.pt").write_bytes((folder / "b.pt").read_bytes())
    assert losscli("align", "a.pt", "runs", "-o", "new", "-q").status == 0
    assert [path.name for path in Path("new").iterdir()] == ["y.safetensors"]
    assert "exists" in losscli("align", "a.pt", "runs", "-o", "new").stderr


def test_all_of_several_files_are_written_or_none(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "c.pt").write_bytes((folder / "b.pt").read_bytes())
    save = checkpoint_state.save

    def fail(weights: object, metadata: object, path: Path, *more: object) -> None:
        if path.stem == "c":
            raise OutputError(f"{path} cannot be written: the disk is full")
        save(weights, metadata, path, *more)

    monkeypatch.setattr(checkpoint_state, "save", fail)
    before = there(folder)
    done = losscli("align", "a.pt", "b.pt", "c.pt", "-o", "aligned")
    assert done.status == 1
    assert done.stderr == "losscli: aligned/c.safetensors cannot be written: the disk is full\n"
    assert there(folder) == before


def test_initialisations_are_aligned_too_and_the_seed_is_that_of_the_order(
    losscli: Losscli, folder: Path
) -> None:
    arguments = ["align", "init:0", "init:1", "-m", "mlp:6-9-8-7-3", "-d", "npz:data.npz", "-q"]
    found = []
    for seed in (0, 1):
        name = f"{seed}.safetensors"
        assert losscli(*arguments, "--seed", seed, "-o", name).status == 0
        found.append(load_file(name))
    one, other = found
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_a_model_that_only_supports_float32_is_compared_in_float32(
    losscli: Losscli, folder: Path
) -> None:
    write("""
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)

            def forward(self, x):
                return self.two(torch.relu(self.one(x.to(torch.float32))))
    """)
    arguments = ["init:0", "init:1", "-m", "net.py:Net", "-d", "npz:data.npz"]
    done = losscli("align", *arguments, "-o", "aligned.safetensors", "--json")
    assert json.loads(done.stdout)["check"]["dtype"] == "float32"


def test_a_model_that_computes_in_float32_is_compared_within_its_rounding(
    losscli: Losscli, folder: Path
) -> None:
    write("""
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = torch.nn.Linear(6, 50), torch.nn.Linear(50, 3)

            def forward(self, x):
                x = torch.relu(self.one(x)).float()
                return self.two((x / x.square().mean(1, keepdim=True).sqrt()).to(self.two.weight))
    """)
    arguments = ["init:0", "init:1", "-m", "net.py:Net", "-d", "npz:data.npz"]
    done = losscli("align", *arguments, "-o", "aligned.safetensors", "--json")
    check = json.loads(done.stdout)["check"]
    assert check["dtype"] == "float32"
    assert 1e-9 < check["largest_difference"] < 1e-6


def write(code: str) -> None:
    Path("net.py").write_text(f"import torch\n{textwrap.dedent(code)}", encoding="utf-8")


def there(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if "__pycache__" not in str(path)}


FAILING = [
    (["a.pt", "b.pt", "-o", "x.npz"], 2, "x.npz is not the name of a safetensors file"),
    (["a.pt", "b.pt", "-o", "no/x.safetensors"], 1, "mkdir -p no"),
    (["a.pt", "b.pt", "-o", "there.safetensors"], 1, "--force"),
    (["a.pt", "b.pt"], 2, "--out"),
    (["a.pt", "-o", "x.safetensors"], 2, "Missing argument"),
    (["a.pt", "absent.pt", "-o", "x.safetensors"], 1, "no checkpoint absent.pt"),
    (["a.pt", "wide.pt", "-o", "x.safetensors"], 1, "wide.pt does not fit the model"),
    (["wide.pt", "a.pt", "-o", "x.safetensors", "-m", "cnn:4"], 1, "choose with -m"),
    (["bare.pt", "a.pt", "-o", "x.safetensors"], 2, "no model given"),
    (["a.pt", "nan.pt", "-o", "x.safetensors"], 1, "nan.pt: layers.0.weight has weights that"),
    (["a.pt", "b.pt", "-o", "x.safetensors", "--device", "no"], 2, "'no'"),
    (["a.pt", "b.pt", "bare.pt", "-o", "x.safetensors"], 2, "one file for 2 checkpoints"),
    (["a.pt", "b.pt", "bare.pt", "-o", "there.safetensors/x"], 1, "there is no folder"),
    (["a.pt", "b.pt", "b.pt", "-o", "x"], 2, "b.pt is given 2 times"),
    (["a.pt", "b.pt", "wide.pt", "-o", "x"], 1, "wide.pt does not fit the model"),
    (["a.pt", "b.pt", "-o", "x.safetensors", "--by", "no"], 2, "weights or activations"),
    (["a.pt", "b.pt", "-o", "x.safetensors", "--by", "activations", "--limit", "1"], 2,
     "--by activations has no more than one example of train"),
    (["a.pt", "b.pt", "-o", "x.safetensors", "--by", "activations", "-d", "net.py:data"], 2,
     "--by activations takes the split train, and the data's splits are one, two"),
    (["a.pt", "huge.pt", "-o", "x.safetensors", "--by", "activations"], 1,
     "a.pt or huge.pt: a hidden unit has values that are infinite or not a number"),
    (["init:0", "init:1", "-m", "mlp:6-3", "-d", "npz:data.npz", "-o", "x.safetensors"], 1,
     "the model mlp:6-3 has no hidden units that could be permuted. Alignment needs a hidden la"),
    (["init:0", "init:1", "-m", "net.py:Rising", "-d", "npz:data.npz", "-o", "x.safetensors"], 1,
     "no hidden units that could be permuted: cumsum may depend on the order of their inputs"),
    (["init:0", "init:1", "-m", "mlp:5-4-3", "-d", "npz:data.npz", "-o", "x.safetensors"], 1,
     "Do --model and --data belong together"),
    (["init:0", "init:1", "-m", "net.py:Branching", "-d", "npz:data.npz", "-o", "x.safetensors"],
     1, "cannot be traced by torch.export"),
    (["init:0", "init:1", "-m", "net.py:Noisy", "-d", "npz:data.npz", "-o", "x.safetensors"],
     1, "gives different results"),
    (["init:0", "init:1", "-m", "net.py:Silent", "-d", "npz:data.npz", "-o", "x.safetensors"],
     1, "returns no tensors"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "status", "says"), FAILING)
def test_an_error_is_one_line_and_nothing_is_written(
    arguments: list[str], status: int, says: str, losscli: Losscli, folder: Path
) -> None:
    write("""
        def data():
            return {name: (torch.ones(5, 6), torch.arange(5) % 3) for name in ("one", "two")}

        class Branching(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)

            def forward(self, x):
                x = self.one(x)
                return self.two(x if x.sum() > 0 else -x)

        class Rising(Branching):
            def forward(self, x):
                return self.two(self.one(x).cumsum(1))

        class Noisy(torch.nn.Linear):
            def __init__(self):
                super().__init__(6, 3)

            def forward(self, x):
                return super().forward(x) + torch.rand(3, dtype=x.dtype)

        class Silent(torch.nn.Linear):
            def __init__(self):
                super().__init__(6, 3)

            def forward(self, x):
                return "nothing"
    """)
    state = torch.load("a.pt")["state_dict"]
    torch.save(state, "bare.pt")
    torch.save({**state, "layers.0.weight": state["layers.0.weight"] * torch.nan}, "nan.pt")
    huge = torch.full_like(state["layers.0.weight"], 3e38)
    torch.save({**state, "layers.0.weight": huge}, "huge.pt")
    torch.save(MLP("6-7-3").state_dict(), "wide.pt")
    Path("there.safetensors").write_bytes(b"precious")
    before = there(folder)
    done = losscli("align", *arguments)
    assert done.status == status, done.stderr
    assert done.stdout == ""
    assert says in done.stderr
    assert done.stderr.startswith("losscli: ")
    assert done.stderr.count("\n") == 1
    assert there(folder) == before
    assert Path("there.safetensors").read_bytes() == b"precious"


def test_force_overwrites(losscli: Losscli, folder: Path) -> None:
    Path("aligned.safetensors").write_bytes(b"old")
    assert losscli(*ALIGN).status == 1
    assert losscli(*ALIGN, "--by", "weights", "--force").status == 0
    assert load_file("aligned.safetensors")
    again = ("align", "a.pt", "aligned.safetensors", "-o", "again.safetensors")
    assert "0 of them moved" in losscli(*again).stdout


def test_a_permutation_that_changes_the_function_is_refused_and_not_written(
    losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import losscli.studies.alignment as module

    column = torch.arange(5).unsqueeze(1)
    # The weights behind the units are left out.
    wrong = Group(5, (Member("layers.0.weight", 0, column), Member("layers.0.bias", 0, column)))
    monkeypatch.setattr(module, "hidden_units", lambda *a: SimpleNamespace(groups=(wrong,)))
    before = there(folder)
    done = losscli(*ALIGN)
    assert done.status == 1
    assert "permuted, b.pt would be another function" in done.stderr
    assert done.stderr.count("\n") == 1
    assert there(folder) == before


def test_a_model_that_is_random_is_refused_from_python() -> None:
    data = {"all": (torch.rand(5, 4), torch.arange(5) % 3)}
    with pytest.raises(
        NondeterministicModelError, match="init:1: the model gives different results"
    ):
        library.align("init:0", "init:1", model=foreign.Random, data=data)
