"""Looking into checkpoints, and taking a point of a line home, through the command line."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import weight_norm as old_norm
from torch.nn.utils.parametrizations import weight_norm as new_norm

import losscli as library
from losscli.errors import MismatchError
from losscli.models import CNN, MLP
from losscli.table import Table
from tests import foreign, oracle
from tests.cases import sample
from tests.conftest import Losscli


def state(name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(name, weights_only=True)["state_dict"]
    return found


def is_refused(
    losscli: Losscli, folder: Path, command: list[str], status: int, message: str
) -> None:
    """One line says why, and nothing is written."""
    before = sorted(folder.iterdir())
    done = losscli(*command)
    assert (done.status, done.stdout) == (status, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(folder.iterdir()) == before


# --- inspect --figure ----------------------------------------------------------------------------


@pytest.mark.usefixtures("unlaid")
def test_inspect_draws_what_it_prints(losscli: Losscli, folder: Path) -> None:
    for names in (["a.pt"], ["a.pt", "b.pt"]):
        stem = "-".join(Path(name).stem for name in names)
        pictures = [f"{stem}.png", f"{stem}.svg"]
        asked = [word for path in pictures for word in ("--figure", path)]
        plain, drawn = losscli("inspect", *names), losscli("inspect", *names, *asked)
        assert drawn.status == 0
        assert drawn.stdout == plain.stdout
        assert drawn.stderr == f"note: wrote {', '.join(pictures)}\n"
        assert Path(pictures[0]).read_bytes().startswith(b"\x89PNG")
        assert Path(pictures[1]).read_bytes().startswith(b"<?xml")
    assert Path("a.png").read_bytes() != Path("a-b.png").read_bytes()
    figure = library.inspect(["a.pt", "b.pt"]).figure()
    a, b = state("a.pt"), state("b.pt")
    shares = [float((b[n].double() - a[n]).norm() / a[n].double().norm()) for n in a]
    widths = [bar.patches[0].get_width() for bar in figure.axes[0].containers]  # type: ignore[attr-defined]
    assert widths == pytest.approx(shares, rel=1e-12)


@pytest.mark.usefixtures("unlaid")
def test_inspect_keeps_other_pictures(losscli: Losscli, folder: Path) -> None:
    Path("x.png").write_bytes(b"a photograph")
    refused = losscli("inspect", "a.pt", "--figure", "x.png", "--figure", "y.svg")
    assert (refused.status, refused.stdout) == (1, "")
    assert "x.png is another figure" in refused.stderr
    assert Path("x.png").read_bytes() == b"a photograph"
    assert not Path("y.svg").exists()
    assert losscli("inspect", "a.pt", "--figure", "x.png", "--force").status == 0
    drawn = Path("x.png").read_bytes()
    # The same again is no other picture.
    as_json = losscli("inspect", "a.pt", "--json", "--figure", "x.png", "-q")
    assert as_json.status == 0
    assert Path("x.png").read_bytes() == drawn
    assert json.loads(as_json.stdout)["command"] == "inspect"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["a.pt", "--figure", "x.jpg"], 2, "not have the suffix of a figure"),
        (["a.pt", "--figure", "a.pt/x.png"], 1, "a.pt is not a folder"),
        (["absent.pt", "--figure", "x.png"], 1, "no checkpoint absent.pt"),
        (["a.pt", "b.pt", "a.pt", "--figure", "x.png"], 2, "one checkpoint or two"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused(
    arguments: list[str], status: int, message: str, losscli: Losscli, folder: Path
) -> None:
    is_refused(losscli, folder, ["inspect", *arguments], status, message)


def test_tensors_that_do_not_match_are_counted_below_the_bars(
    losscli: Losscli, folder: Path
) -> None:
    torch.save({**state("a.pt"), "layers.1.bias": torch.ones(4)}, "c.pt")
    figure = library.inspect(["a.pt", "c.pt"]).figure()
    said = [legend.get_title().get_text() for legend in figure.legends]
    assert any("Not drawn: 1 tensor that does not match" in text for text in said)


# --- export --best -------------------------------------------------------------------------------

LINE = ["interpolate", "a.pt", "b.pt", "-o", "x", "--no-figure", "-q"]
BEST = ["export", "a.pt", "b.pt", "--csv", "x.csv", "-o", "best.safetensors"]


def loss_of(file: str, split: str, model: str) -> float:
    """The loss of a checkpoint, alone."""
    result = library.interpolate(file, file, model=model, points=1, range=(0.0, 1.0))
    return result.table.where("split", split).floats("loss")[0]


def test_the_best_point_is_the_lowest_of_the_table(losscli: Losscli, folder: Path) -> None:
    assert losscli(*LINE, "--points", "11").status == 0
    table = Table.read(Path("x.csv"))
    for split in ("train", "test"):
        rows = table.where("split", split)
        loss, alpha = min(zip(rows.floats("loss"), rows.floats("alpha"), strict=True))
        done = losscli(*BEST, "--best", split, "--force")
        assert (done.status, done.stdout) == (0, "best.safetensors\n")
        assert done.stderr == (
            f"note: α = {alpha} has the lowest loss on {split} in x.csv: {loss:.6g}\n"
        )
        point = load_file("best.safetensors")
        for name, tensor in oracle.blend(state("a.pt"), state("b.pt"), alpha).items():
            torch.testing.assert_close(point[name].double(), tensor, rtol=1e-6, atol=1e-7)
        assert loss_of("best.safetensors", split, "mlp:6-5-3") == pytest.approx(loss, rel=1e-5)
        # The metadata is A's, and nobody needs an option to look at the point.
        with Path("best.safetensors").open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        assert header["__metadata__"] == {"losscli.model": "mlp:6-5-3"}


def write(rows: list[tuple[float, str, float]], name: str = "x.csv") -> None:
    table = Table.build(("alpha", "split", "loss", "loss_stderr"), [(*r, 0.1) for r in rows])
    Path(name).write_bytes(table.to_csv().encode())


def test_the_first_of_equal_losses_counts_and_losses_that_are_not_finite_do_not(
    losscli: Losscli, folder: Path
) -> None:
    write([(0.75, "t", 2.0), (0.25, "t", 2.0), (0.5, "t", math.nan), (0.6, "t", -math.inf),
           (0.1, "t", 2.5), (0.3, "other", 1.0)])  # fmt: skip
    done = losscli(*BEST, "--best", "t")
    assert done.status == 0
    first, second = done.stderr.splitlines()
    assert first.startswith("note: α = 0.25 has ")
    assert second.startswith(
        "note: x.csv has no summary next to it: A and B are not compared with it"
    )
    assert losscli(*BEST, "--best", "t", "-q", "--force").stderr == ""


ERRORS = {
    "neither": (
        "",
        2,
        "no point is given. Give one of --alpha, --best, --weights, --t, --plane",
    ),
    "both": (
        "--alpha 1 --best train --csv x.csv",
        2,
        "--alpha and --best contradict each other. Give one of them",
    ),
    "no table": ("--best train", 2, "--best is given without --csv"),
    "a table alone": ("--alpha 1 --csv x.csv", 2, "--csv is given without --best"),
    "no file": ("--best train --csv absent.csv", 1, "absent.csv cannot be read"),
    "another table": (
        "--best train --csv x.blocks.csv",
        2,
        "--csv x.blocks.csv is not a table of interpolate",
    ),
    "no split": ("--best val --csv x.csv", 2, "x.csv has no split 'val'. Its splits: train, test"),
    "nothing finite": ("--best t --csv nan.csv", 1, "nan.csv has no finite loss on t"),
    "a broken summary": (
        "--best t --csv broken.csv",
        1,
        "broken.json is not the summary of broken.csv",
    ),
    "of something else": (
        "--best t --csv plane.csv",
        1,
        "plane.json is not the summary of plane.csv",
    ),
    "of another type": (
        "--best t --csv typed.csv",
        1,
        "typed.json was not written by losscli: seed is not a whole number. Move it, or",
    ),
    "of three checkpoints": (
        "--best t --csv three.csv",
        2,
        "summary is not that of interpolate",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_options_that_name_no_point_are_refused(case: str, losscli: Losscli, folder: Path) -> None:
    arguments, status, message = ERRORS[case]
    write([(0.0, "train", 1.0), (1.0, "test", 1.0)])
    write([(0.0, "t", math.nan), (1.0, "t", math.inf)], "nan.csv")
    write([(0.0, "t", 1.0)], "broken.csv")
    write([(0.0, "t", 1.0)], "plane.csv")
    line = {"command": "interpolate", "splits": {}, "examples": {}, "buffers": "interpolate"}
    for name, more in (
        ("typed", {"checkpoints": [], "seed": "one"}),
        ("three", {"checkpoints": [{"name": "a.pt"}] * 3}),
    ):
        write([(0.0, "t", 1.0)], f"{name}.csv")
        Path(f"{name}.json").write_text(json.dumps({**line, **more}))
    Path("x.blocks.csv").write_text("block,alpha,split,loss,loss_stderr\r\nh,0.0,train,1.0,0.1\r\n")
    Path("broken.json").write_text('{"command": "interp')
    Path("plane.json").write_text('{"command": "plane", "checkpoints": []}')
    command = ["export", "a.pt", "b.pt", *arguments.split(), "-o", "y.safetensors"]
    is_refused(losscli, folder, command, status, message)


def test_other_checkpoints_than_those_of_the_table_are_refused(
    losscli: Losscli, folder: Path
) -> None:
    assert losscli(*LINE, "--points", "3").status == 0
    torch.manual_seed(9)
    torch.save({"state_dict": MLP("6-5-3").state_dict()}, "c.pt")
    rest = BEST[3:]
    for pair, message in (
        (["a.pt", "c.pt"], "c.pt is not the B of the table, which is b.pt. Give that, or --alpha"),
        (["c.pt", "b.pt"], "c.pt is not the A of the table, which is a.pt. Give that, or --alpha"),
        (["b.pt", "a.pt"], "b.pt is not the A of the table, which is a.pt. Swap A and B"),
    ):
        done = losscli("export", *pair, *rest, "--best", "train")
        assert (done.status, done.stdout) == (1, "")
        assert message in done.stderr
        assert not Path("best.safetensors").exists()
    # The same bytes under another name are the same.
    Path("copy.pt").write_bytes(Path("b.pt").read_bytes())
    assert losscli("export", "a.pt", "copy.pt", *rest, "--best", "train").status == 0


def test_another_state_dict_of_the_same_file_is_refused(losscli: Losscli, folder: Path) -> None:
    both = {"net": state("a.pt"), "ema": state("b.pt")}
    torch.save(both, "both.pt")
    line = ["interpolate", "both.pt#net", "both.pt#ema", "-m", "mlp:6-5-3", "--points", "3"]
    assert losscli(*line, "-o", "x", "--no-figure", "-q").status == 0
    rest = [*BEST[3:], "--best", "train"]
    wrong = losscli("export", "both.pt#ema", "both.pt#ema", *rest)
    assert wrong.status == 1
    assert "both.pt#ema is not the A of the table, which is both.pt#net" in wrong.stderr
    assert not Path("best.safetensors").exists()
    assert losscli("export", "both.pt#net", "both.pt#ema", *rest).status == 0


def test_an_initialisation_is_not_a_file_to_export_from(losscli: Losscli, folder: Path) -> None:
    line = ["interpolate", "init:0", "b.pt", "-m", "mlp:6-5-3", "-o", "x", "--no-figure", "-q"]
    assert losscli(*line, "--points", "3").status == 0
    done = losscli(*BEST, "--best", "train")
    assert done.status == 1
    assert "a.pt is not the A of the table, which is init:0" in done.stderr
    assert not Path("best.safetensors").exists()


def test_buffers_count_in_no_norm_of_the_whole(tmp_path: Path, losscli: Losscli) -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = CNN("3", channels=1, classes=3, batchnorm=True)
        model.train()(torch.randn(9, 1, 4, 4))
        states.append({n: p.detach().clone() for n, p in model.named_parameters()})
        torch.save(model.state_dict(), tmp_path / f"{seed}.pt")
    done = losscli("inspect", tmp_path / "1.pt", tmp_path / "2.pt", "--json")
    told = json.loads(done.stdout)
    norms = [math.hypot(*(float(t.double().norm()) for t in s.values())) for s in states]
    assert [c["norm"] for c in told["checkpoints"]] == pytest.approx(norms, rel=1e-12)
    far = (float((states[1][n].double() - t.double()).norm()) for n, t in states[0].items())
    assert told["distance"] == pytest.approx(math.hypot(*far), rel=1e-12)
    assert told["buffers"] == ["norms.0.running_mean", "norms.0.running_var"]
    shown = losscli("inspect", tmp_path / "1.pt").stdout
    assert "norms and distances are without buffers: norms.0.running_mean and 1 more" in shown


def spoilt_batchnorm(folder: Path, prefix: str = "") -> None:
    """Two networks with BatchNorm statistics of their own, and data."""
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        model = CNN("3", channels=1, classes=3, batchnorm=True)
        for key, buffer in model.named_buffers():
            if key.endswith(("mean", "var")):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
        for key, parameter in model.named_parameters():
            if key.startswith("norms"):
                parameter.data.add_(torch.randn_like(parameter) * 0.3)
        torch.save({f"{prefix}{k}": t for k, t in model.state_dict().items()}, f"{name}.pt")
    inputs = torch.rand(24, 1, 4, 4)
    save_file({"inputs": inputs, "targets": torch.arange(24) % 3}, "images.safetensors")


NETWORK = "cnn:3,channels=1,classes=3,batchnorm=true"


@pytest.mark.parametrize("prefix", ["module.", pytest.param("", marks=pytest.mark.stress)])
@pytest.mark.parametrize(
    ("more", "at_a", "at_b"),
    sample([
        ([], [], []),
        (["--buffers", "a"], ["norms.0.running_mean", "norms.0.running_var"], []),
        (["--buffers", "b"], [], ["norms.0.running_mean", "norms.0.running_var"]),
        (
            ["--only", "head.*"],
            ["convolutions.0.weight", *(f"norms.0.{w}" for w in
             ("weight", "bias", "running_mean", "running_var"))],
            [],
        ),
        (["--except", "head.*"], ["head.weight", "head.bias"], []),
        (
            ["--except", "head.bias", "--buffers", "b"],
            ["head.bias"],
            ["norms.0.running_mean", "norms.0.running_var"],
        ),
    ], 1, 2),
)  # fmt: skip
def test_tensors_that_did_not_move_on_the_line_stay_in_the_exported_point(
    prefix: str,
    more: list[str],
    at_a: list[str],
    at_b: list[str],
    losscli: Losscli,
    folder: Path,
) -> None:
    spoilt_batchnorm(folder, prefix)
    line = [*LINE, "-m", NETWORK, "-d", "safetensors:images.safetensors", "--range", "0.2", "0.7"]
    assert losscli(*line, "--points", "4", *more).status == 0
    stays = json.loads(Path("x.json").read_text())["stays"]
    assert {end: sorted(names) for end, names in stays.items()} == {
        "a": sorted(at_a),
        "b": sorted(at_b),
    }
    done = losscli(*BEST, "--best", "data")
    assert done.status == 0
    rows = Table.read(Path("x.csv"))
    loss, alpha = min(zip(rows.floats("loss"), rows.floats("alpha"), strict=True))
    point = load_file("best.safetensors")
    a, b = (torch.load(f"{n}.pt", weights_only=True) for n in "ab")
    for name, tensor in oracle.blend(a, b, alpha).items():
        bare = name.removeprefix(prefix)
        expected = a[name] if bare in at_a else b[name] if bare in at_b else tensor
        torch.testing.assert_close(point[name].double(), expected.double(), rtol=1e-6, atol=1e-7)
    found = library.interpolate(
        "best.safetensors",
        "best.safetensors",
        model=NETWORK,
        data="safetensors:images.safetensors",
        points=1,
        range=(0.0, 1.0),
    )
    assert found.table.floats("loss")[0] == pytest.approx(loss, rel=1e-5)


def test_a_point_that_the_two_files_do_not_make_is_refused(losscli: Losscli, folder: Path) -> None:
    assert losscli(*LINE, "--points", "3").status == 0
    summary = json.loads(Path("x.json").read_text())

    def refused(message: str, **changes: Any) -> None:
        told = {key: value for key, value in {**summary, **changes}.items() if value is not None}
        Path("x.json").write_text(json.dumps(told))
        done = losscli(*BEST, "--best", "train")
        assert done.stdout == ""
        assert done.status in {1, 2}
        assert message in done.stderr
        assert "Give --alpha" in done.stderr
        assert not Path("best.safetensors").exists()

    refused("--buffers recalibrate, which needs model and data", buffers="recalibrate")
    refused("does not say which tensors stay", stays=None)
    refused("absent.weight stays on the line", stays={"a": ["absent.weight"], "b": []})
    refused("weight stays on the line", stays={"a": [], "b": ["weight"]})


# --- export, to the bit --------------------------------------------------------------------------


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def test_at_0_and_1_the_floating_tensors_are_exactly_those_of_a_and_b(
    losscli: Losscli, folder: Path
) -> None:
    generator = torch.Generator().manual_seed(0)

    def some(dtype: torch.dtype) -> Tensor:
        return torch.randn(7, 3, generator=generator).to(dtype)

    odd = torch.tensor([0.0, math.inf, math.nan, 1e-45, 3e38])
    kinds = {str(d)[6:]: d for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}
    a, b = ({name: some(dtype) for name, dtype in kinds.items()} for _ in range(2))
    a |= {"odd": odd, "zeros": torch.tensor([0.0, -0.0]), "count": torch.tensor([3, 4])}
    b |= {"odd": -odd.flip(0), "zeros": torch.tensor([-0.0, 0.0]), "count": torch.tensor([5, 6])}
    save_file(a, "x.safetensors", {"note": "A's"})
    save_file(b, "y.safetensors", {"note": "B's"})
    for alpha, end in ((0, a), (1, b)):
        out = f"{alpha}.safetensors"
        arguments = ["export", "x.safetensors", "y.safetensors", "--alpha", alpha, "-o", out]
        assert losscli(*arguments).status == 0
        found = load_file(out)
        assert found.keys() == a.keys()
        for name, tensor in found.items():
            expected = a[name] if name == "count" else end[name]
            assert tensor.dtype == expected.dtype
            assert bits(tensor) == bits(expected), name


def test_tied_tensors_stay_tied(losscli: Losscli, folder: Path) -> None:
    for seed, name in enumerate(("x", "y")):
        torch.manual_seed(seed)
        torch.save(foreign.Attention().state_dict(), f"{name}.pt")
    for alpha in (0, 0.3, 1, 1.7):
        arguments = ["export", "x.pt", "y.pt", "--alpha", alpha, "-o", "z.safetensors", "--force"]
        assert losscli(*arguments).status == 0
        found = load_file("z.safetensors")
        assert bits(found["head.weight"]) == bits(found["embedding.weight"])
        model = foreign.Attention()
        model.load_state_dict(found)
        assert model.head.weight is model.embedding.weight
    x, y = (torch.load(f"{n}.pt", weights_only=True)["head.weight"].double() for n in "xy")
    torch.testing.assert_close(
        found["head.weight"].double(), x + 1.7 * (y - x), rtol=1e-5, atol=1e-6
    )


# --- export: types -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "wider"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64, torch.float64),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_point_has_the_wider_of_two_types(
    a: torch.dtype, b: torch.dtype, wider: torch.dtype, losscli: Losscli, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 7, generator=generator, dtype=torch.float64).to(t) for t in (a, b))
    same = torch.randn(3, generator=generator, dtype=torch.float64)
    for name, tensor, dtype in (("a", x, a), ("b", y, b)):
        save_file(
            {"w": tensor, "same": same.to(a).to(b).to(dtype), "n": torch.arange(3)},
            tmp_path / f"{name}.safetensors",
        )
    ends = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    for alpha in (0.0, 0.3, 1.0, -1.5):
        out = tmp_path / "point.safetensors"
        done = losscli("export", *ends, f"--alpha={alpha}", "-o", out, "--force")
        assert done.status == 0
        point = load_file(out)
        assert point["w"].dtype == point["same"].dtype == wider
        assert point["n"].dtype == torch.int64
        expected = x.double() + alpha * (y.double() - x.double())
        if alpha in {0.0, 1.0}:
            assert torch.equal(point["w"], (y if alpha else x).to(wider))
        else:
            size = float(expected.abs().max())
            # A half unit in the last place, and the rounding of what it is made in.
            allowed = 0.51 * torch.finfo(wider).eps + 4 * torch.finfo(torch.float32).eps
            assert float((point["w"].double() - expected).abs().max()) <= 2 * allowed * size


# --- inspect: several state dicts ----------------------------------------------------------------


def training(
    folder: Path, *, distributed: bool = False
) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """A file of a model, its average, and what Adam keeps for each tensor by its name."""
    model, ema = state("a.pt"), state("b.pt")
    adam = {
        name: {"exp_avg": t * 2, "exp_avg_sq": t.square(), "step": torch.tensor(3.0)}
        for name, t in model.items()
    }
    content = {"model": model, "ema": ema, "opt": {"state": adam}}
    if distributed:
        dcp.save(content, checkpoint_id=str(folder / "dcp"))
    else:
        torch.save({**content, "epoch": 4}, folder / "all.pt")
    keys = {f"opt.state.{name}": tensors for name, tensors in adam.items()}
    return "dcp" if distributed else "all.pt", {"model": model, "ema": ema, **keys}


@pytest.mark.filterwarnings("ignore")  # torch's own, of writing without a process group
@pytest.mark.parametrize("distributed", [False, True])
def test_several_state_dicts_are_listed_with_their_keys(
    distributed: bool, losscli: Losscli, folder: Path
) -> None:
    name, parts = training(folder, distributed=distributed)
    done = losscli("inspect", name, "--json")
    assert (done.status, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert sorted(told["state_dicts"]) == sorted(parts)
    rows = {row.pop("key"): row for row in told["rows"]}
    assert rows.keys() == parts.keys()
    for key, tensors in parts.items():
        values = [t.double().flatten() for t in tensors.values()]
        assert rows[key] == {
            "tensors": len(tensors),
            "values": sum(map(len, values)),
            "bytes": 4 * sum(map(len, values)),
            "norm": pytest.approx(float(torch.cat(values).norm()), rel=1e-12),
        }
        # And each key leads on.
        assert f" in {len(tensors)} tensors, " in losscli("inspect", f"{name}#{key}").stdout
    (checkpoint,) = told["checkpoints"]
    assert checkpoint["values"] == sum(row["values"] for row in rows.values())
    assert distributed or checkpoint["metadata"] == {"epoch": "4"}
    text = losscli("inspect", name).stdout.splitlines()
    assert text[0].endswith(f"in {len(parts)} state dicts")
    assert [line.split()[0] for line in text if "opt.state" in line] == list(parts)[2:]
    assert text[-1].startswith(f"to inspect one of them, add its key: losscli inspect {name}#")


def test_very_many_state_dicts_are_listed_by_the_beginnings_of_their_keys(
    losscli: Losscli, folder: Path
) -> None:
    adam = {f"h.{k}.w": {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)} for k in range(50)}
    torch.save({"model": state("a.pt"), "opt": {"state": adam}}, "all.pt")
    told = json.loads(losscli("inspect", "all.pt", "--json").stdout)
    assert len(told["state_dicts"]) == 51
    rows = {row["key"]: row for row in told["rows"]}
    assert list(rows) == ["model", "opt.state.h"]
    assert rows["opt.state.h"]["tensors"] == 100
    assert rows["opt.state.h"]["norm"] == pytest.approx(math.sqrt(200))
    inner = json.loads(losscli("inspect", "all.pt#opt.state.h", "--json").stdout)
    assert len(inner["rows"]) == 50


def test_several_state_dicts_in_a_file_are_neither_compared_nor_drawn(
    losscli: Losscli, folder: Path
) -> None:
    name, _ = training(folder)
    for arguments, status, message in (
        ([name, "a.pt"], 1, f"{name} contains several state dicts: 'model', 'ema', "),
        ([name, "--figure", "x.png"], 2, "several state dicts is not drawn. Choose one with FILE#"),
    ):
        is_refused(losscli, folder, ["inspect", *arguments], status, message)
    top = {**state("a.pt"), "ema": state("b.pt")}
    torch.save(top, "top.pt")
    text = losscli("inspect", "top.pt").stdout
    assert "\n(top level)  " in text
    assert text.endswith("losscli inspect top.pt#ema\n")


# --- names ---------------------------------------------------------------------------------------


def test_tensors_of_safetensors_come_in_the_order_of_their_numbers(
    losscli: Losscli, folder: Path
) -> None:
    names = [f"h.{k}.{word}" for k in range(12) for word in ("bias", "weight")]
    save_file({name: torch.ones(2) for name in names}, "deep.safetensors")
    told = json.loads(losscli("inspect", "deep.safetensors", "--json").stdout)
    assert [row["tensor"] for row in told["rows"]] == names
    (axes,) = library.inspect(["deep.safetensors"]).figure().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == names


def test_no_name_steers_a_terminal_through_json(losscli: Losscli, folder: Path) -> None:
    names = [
        "\u202egnp.c",
        "\x9b31m",
        "\x1b[31m",
        "\x7f",
        "\u200b",
        "\u2028",
        "\ue000",
        "α.β",
        "\U000e0001",
    ]
    torch.save(
        {"state_dict": {name: torch.ones(1) for name in names}, "note\x9b": "\u2066x"}, "x.pt"
    )
    done = losscli("inspect", "x.pt", "--json")
    assert done.stdout.rstrip("\n").isprintable()
    told = json.loads(done.stdout)
    assert [row["tensor"] for row in told["rows"]] == names
    assert told["checkpoints"][0]["metadata"] == {"note\x9b": "\u2066x"}
    assert "α.β" in done.stdout


@pytest.mark.parametrize("names", [("eight.pt", "b.pt"), ("b.pt", "eight.pt")])
def test_export_refuses_quantised_weights_at_either_end(
    names: tuple[str, str], losscli: Losscli, folder: Path
) -> None:
    state = torch.load("a.pt", weights_only=True)["state_dict"]
    torch.save({name: t.to(torch.float8_e4m3fn) for name, t in state.items()}, "eight.pt")
    done = losscli("export", *names, "--alpha", 0.5, "-o", "x.safetensors")
    assert done.status == 1
    assert "eight.pt is quantised" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path("x.safetensors").exists()


# --- the names and the versions of one model ----------------------------------------------------


def batchnorm(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    found = CNN("3", channels=1, classes=3, batchnorm=True).state_dict()
    found["norms.0.num_batches_tracked"] += seed
    return dict(found)


def normed(seed: int, norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(norm(nn.Linear(4, 5)), nn.ReLU(), norm(nn.Linear(5, 3)))


@pytest.mark.parametrize("prefix", ["module.", pytest.param("", marks=pytest.mark.stress)])
@pytest.mark.parametrize("has", ["A", "B", "neither"])
def test_a_count_of_batches_in_only_one_checkpoint_is_exported(
    has: str, prefix: str, tmp_path: Path
) -> None:
    for seed, name in ((5, "A"), (7, "B")):
        given = batchnorm(seed)
        if name != has:
            del given["norms.0.num_batches_tracked"]
        if name == "B":
            given = {f"{prefix}{n}": t for n, t in given.items()}
        torch.save(given, tmp_path / name)
    found = library.export(tmp_path / "A", tmp_path / "B", 0.25).weights
    a, b = batchnorm(5), batchnorm(7)
    for key, tensor in a.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[key], 0.75 * tensor + 0.25 * b[key])
    count = found.get("norms.0.num_batches_tracked")
    assert (None if count is None else int(count)) == {"A": 5, "B": 7, "neither": None}[has]
    assert len(found) == len(a) - (has == "neither")


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("first", [old_norm, new_norm])
def test_old_and_new_names_of_weight_norm_are_those_of_one_model(
    first: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    second = old_norm if first is new_norm else new_norm
    torch.save(normed(1, first).state_dict(), tmp_path / "a")
    torch.save(normed(2, second).state_dict(), tmp_path / "b")
    torch.save(normed(2, first).state_dict(), tmp_path / "same")
    found = library.export(tmp_path / "a", tmp_path / "b", 0.25).weights
    expected = library.export(tmp_path / "a", tmp_path / "same", 0.25).weights
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    normed(0, first).load_state_dict(found)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("lost", ["0.weight_g", "0.weight_v", "0.bias"])
def test_incomplete_tensors_of_weight_norm_are_refused(lost: str, tmp_path: Path) -> None:
    given = normed(2, old_norm).state_dict()
    del given[lost]
    torch.save(normed(1, new_norm).state_dict(), tmp_path / "a")
    torch.save(given, tmp_path / "b")
    with pytest.raises(MismatchError, match="does not fit"):
        library.export(tmp_path / "a", tmp_path / "b", 0.25)


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ({"head": 1}, {"head": 2}, "different versions of head: {'version': 1}"),
        ({"": 1}, {"": 3}, "different versions of the model"),
        ({"head": 1, "norms.0": 2, "": 1}, {"head": 2, "norms.0": 3, "": 1}, ", as of 1 more. A"),
        ({"norms.0": 2}, {"norms.0": 3}, "different versions of norms.0"),
        # Of these BatchNorm differs in no more than the count of its batches.
        ({"norms.0": 1}, {"norms.0": 2}, ""),
        ({"head": 1}, {"head": 1}, ""),
        ({"head": 1}, {}, ""),
    ],
)
def test_versions_by_which_a_model_would_convert_are_noted_and_not_exported(
    one: dict[str, int], other: dict[str, int], told: str, losscli: Losscli, folder: Path
) -> None:
    for name, versions in (("a.pt", one), ("b.pt", other)):
        content = OrderedDict(batchnorm(1))
        content._metadata = {m: {"version": v} for m, v in versions.items()}  # type: ignore[attr-defined]
        torch.save(content, name)
    done = losscli("inspect", "a.pt", "b.pt")
    assert done.status == 0
    assert done.stderr.count("note: ") == bool(told)
    assert told in done.stderr
    assert json.loads(losscli("inspect", "a.pt", "b.pt", "--json").stdout)["notes"] == (
        [done.stderr.removeprefix("note: ").strip()] if told else []
    )
    exported = losscli("export", "a.pt", "b.pt", "--alpha", 0.5, "-o", "x.pt")
    assert exported.status == bool(told)
    assert "have different versions" in exported.stderr or not told
