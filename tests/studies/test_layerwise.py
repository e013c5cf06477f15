"""Blocks of a network that move alone: what they are, and their losses against the oracle."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import losscli as library
from losscli.errors import ModelError, UsageError
from losscli.evaluation.loading import named_tensors
from losscli.evaluation.losses.built_in import LOSSES
from losscli.models import CNN, MLP
from losscli.registry import command_of
from losscli.studies.interpolation import Interpolation
from losscli.table import Table
from losscli.weight_space.blocks import blocks_of
from tests import foreign, oracle
from tests.cases import CASES, Case, sample
from tests.conftest import Losscli


class Wrapper(nn.Module):
    """Holds everything under one name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner


class Stages(nn.Module):
    """A stem, stages that are an nn.Sequential each, one with lists inside, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 2)
        self.stage1 = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
        self.scale = nn.Parameter(torch.ones(2))
        self.experts = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2)})
        self.empty = nn.ModuleList()


class Encoder(nn.Module):
    """Lists below a part that is not all there is, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = nn.Module()
        self.bert.embeddings = nn.Embedding(3, 2)
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleList([MLP("2-2-2"), nn.Linear(2, 2)])
        self.classifier = nn.Linear(2, 2)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "mlp": (lambda: MLP("4-3-2"), ["layers.0", "layers.1"]),
    "mlp of one layer": (lambda: MLP("4-2"), ["layers.0"]),
    "cnn": (
        lambda: CNN("4-6", batchnorm=True),
        ["convolutions.0", "convolutions.1", "norms.0", "norms.1", "head"],
    ),
    "wrapped": (lambda: Wrapper(Wrapper(MLP("4-3-2"))), ["layers.0", "layers.1"]),
    "sequential": (lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ["0", "2"]),
    "a sequential inside": (
        lambda: Wrapper(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))),
        ["model.0", "model.1"],
    ),
    "one layer": (lambda: nn.Linear(2, 2), ["weight", "bias"]),
    "one layer, wrapped": (lambda: Wrapper(nn.Linear(2, 2)), ["model"]),
    "stages": (Stages, ["scale", "stem", "stage1", "experts.one", "experts.two"]),
    "encoder": (
        Encoder,
        ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "classifier"],
    ),
    "tied": (foreign.Attention, ["mask", "embedding", "layer"]),
}


def names_of_blocks(model: nn.Module) -> list[str]:
    return list(dict.fromkeys(blocks_of(model, named_tensors(model)).values()))


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_are_the_parts_that_a_reader_would_name(case: str) -> None:
    build, expected = BLOCKS[case]
    assert names_of_blocks(build()) == expected


def test_blocks_of_a_gpt2_are_its_embeddings_and_layers() -> None:
    import transformers

    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(n_layer=3, n_embd=4, n_head=2, vocab_size=7, **ids)
    model = transformers.GPT2LMHeadModel(config)
    assert names_of_blocks(model) == ["wte", "wpe", "h.0", "h.1", "h.2", "ln_f"]
    # The head is tied to the embedding, and goes with it.
    assert blocks_of(model, named_tensors(model))["lm_head.weight"] == "wte"


def save(case: Case, folder: Path) -> tuple[str, str]:
    names = []
    for seed in (1, 2):
        path = folder / f"{case.name}-{seed}.pt"
        torch.save(case.state(seed), path)
        names.append(str(path))
    return names[0], names[1]


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def swept(case: Case, folder: Path, **settings: Any) -> Any:
    a, b = save(case, folder)
    return library.interpolate(
        a,
        b,
        **{
            "model": case.build,
            "data": {"all": (copy.deepcopy(case.inputs), case.targets)},
            "loss": case.loss,
            "metric": ("none",),
            "dtype": "float64",
            "points": 4,
            "range": (-0.5, 1.5),
            "layerwise": True,
            **settings,
        },
    )


def expected(case: Case, block: list[str], alpha: float) -> list[float]:
    """The losses with one block moved: nothing of losscli is in here."""
    first, second = case.state(1), case.state(2)
    moving = [n for n in first if any(n == b or n.startswith(f"{b}.") for b in block)]
    state = oracle.blend(first, second, alpha, moving)
    state |= {n: t for n, t in first.items() if torch.equal(t, second[n])}
    return oracle.losses(
        case.build,
        state,
        copy.deepcopy(case.inputs),
        case.targets,
        case.per_example,
        batch_size=len(case.targets),
    )


# Each block, and what its tensors' names begin with.
ORACLE: dict[str, dict[str, list[str]]] = {
    "mlp-sigmoid": {f"layers.{k}": [f"layers.{k}"] for k in range(3)},
    "cnn-batchnorm": {
        name: [name] for name in ("convolutions.0", "convolutions.1", "norms.0", "norms.1", "head")
    },
    "attention-tied": {"embedding": ["embedding", "head"], "layer": ["layer"]},
    "lstm": {"lstm": ["lstm"], "head": ["head"]},
    "branching": {name: [name] for name in ("one", "other", "head")},
    "hooked": {},
    "folding": {},
    "threaded": {},
}


@pytest.mark.parametrize("name", sample(ORACLE, 0, 2))
def test_each_block_moves_on_its_own_as_in_a_plain_float64_loop(name: str, tmp_path: Path) -> None:
    case = case_of(name)
    result = swept(case, tmp_path)
    blocks = ORACLE[name] or {str(b): [str(b)] for b in result.more["blocks"].unique("block")}
    table = result.more["blocks"]
    assert table.columns == ("block", "alpha", "split", "loss", "loss_stderr")
    assert table.unique("block") == list(blocks)
    assert len(blocks) > 1
    alphas = result.table.floats("alpha")
    assert {0.0, 1.0} < set(alphas)
    for block, parts in blocks.items():
        rows = table.where("block", block)
        assert rows.floats("alpha") == alphas
        curves = [expected(case, parts, alpha) for alpha in alphas]
        means = [oracle.mean(curve) for curve in curves]
        errors = [oracle.standard_error(curve) for curve in curves]
        np.testing.assert_allclose(rows.floats("loss"), means, rtol=1e-11)
        np.testing.assert_allclose(rows.floats("loss_stderr"), errors, rtol=1e-9)
    assert result.summary["endpoint_difference"] <= 1e-12


def test_the_summary_of_a_block_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    case = case_of("mlp-sigmoid")
    result = swept(case, tmp_path, points=9)
    first, second = case.state(1), case.state(2)
    alphas = result.table.floats("alpha")
    at_a = expected(case, [], 0.0)
    barriers = 0
    for block, about in result.summary["blocks"].items():
        names = [n for n in first if n.startswith(f"{block}.")]
        d = torch.cat([(second[n].double() - first[n].double()).flatten() for n in names])
        assert about["tensors"] == len(names)
        assert about["values"] == len(d)
        assert about["distance"] == pytest.approx(d.norm().item(), rel=1e-12)
        curves = {alpha: expected(case, [block], alpha) for alpha in alphas}
        said, at_1 = about["splits"]["all"], curves[1.0]

        def apart(one: list[float], other: list[float]) -> tuple[float, float]:
            paired = [x - y for x, y in zip(one, other, strict=True)]
            return oracle.mean(paired), oracle.standard_error(paired)

        assert said["loss_at_1"] == pytest.approx(oracle.mean(at_1), rel=1e-11)
        change = said["change"], said["change_stderr"]
        assert change == pytest.approx(apart(at_1, at_a), rel=1e-8)
        low = min(alphas, key=lambda alpha: oracle.mean(curves[alpha]))
        below = apart(at_a, curves[low])
        assert said["minimum"] == {
            "alpha": low,
            "loss": pytest.approx(oracle.mean(curves[low]), rel=1e-11),
            "ties": 1,
            "below_a": pytest.approx(below[0], rel=1e-8, abs=1e-14),
            "below_a_stderr": pytest.approx(below[1], rel=1e-8, abs=1e-14),
        }
        excess = {
            alpha: [
                y - (1 - alpha) * p - alpha * q
                for y, p, q in zip(curves[alpha], at_a, at_1, strict=True)
            ]
            for alpha in alphas
            if 0 < alpha < 1
        }
        top = max(excess, key=lambda alpha: oracle.mean(excess[alpha]))
        height = oracle.mean(excess[top])
        if height > 0:
            barriers += 1
            error = oracle.standard_error(excess[top])
            assert said["barrier"] == {
                "height": pytest.approx(height, rel=1e-8),
                "stderr": pytest.approx(error, rel=1e-8),
                "alpha": top,
            }
        else:
            assert said["barrier"] == {"height": 0.0, "stderr": 0.0, "alpha": 0.0}
        assert said["not_finite"] == 0
    assert barriers > 0


@pytest.mark.parametrize(
    ("buffers", "end"), [pytest.param("a", 0, marks=pytest.mark.stress), ("b", 1)]
)
def test_buffers_that_stay_do_so_for_every_block(buffers: str, end: int, tmp_path: Path) -> None:
    case = case_of("cnn-batchnorm")
    result = swept(case, tmp_path, buffers=buffers)
    states = case.state(1), case.state(2)
    kept = {n: t for n, t in states[end].items() if "running" in n}
    for alpha, loss in zip(
        result.table.floats("alpha"),
        result.more["blocks"].where("block", "head").floats("loss"),
        strict=True,
    ):
        state = {**oracle.blend(*states, alpha, ["head.weight", "head.bias"]), **kept}
        found = oracle.losses(case.build, state, case.inputs, case.targets, case.per_example)
        assert loss == pytest.approx(oracle.mean(found), rel=1e-11)


def test_the_ends_are_a_and_a_with_that_block_of_b(folder: Path) -> None:
    result = library.interpolate("a.pt", "b.pt", points=4, range=(-0.3, 1.2), layerwise=True)
    a, b = (torch.load(f"{n}.pt", weights_only=True)["state_dict"] for n in "ab")
    arrays = np.load("data.npz")
    for split in ("train", "test"):
        x, y = (torch.from_numpy(arrays[f"{split}_{k}"]) for k in ("inputs", "targets"))

        def plain(state: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> float:
            model = MLP("6-5-3")
            model.load_state_dict(state)
            with torch.no_grad():
                return float(LOSSES["cross_entropy"](model(x), y).float().double().mean())

        for block in ("layers.0", "layers.1"):
            rows = result.more["blocks"].where("split", split).where("block", block)
            assert rows.where("alpha", 0.0).floats("loss") == [plain(a)]
            end = {n: (b if n.startswith(block) else a)[n] for n in a}
            assert rows.where("alpha", 1.0).floats("loss") == pytest.approx([plain(end)], rel=1e-6)
            said = result.summary["blocks"][block]["splits"][split]
            assert said["loss_at_1"] == pytest.approx(plain(end), rel=1e-6)


def test_layerwise_does_not_change_the_line_of_all_blocks(folder: Path) -> None:
    arguments = {"points": 7, "seed": 3}
    alone = library.interpolate("a.pt", "b.pt", **arguments)
    both = library.interpolate("a.pt", "b.pt", layerwise=True, **arguments)
    assert both.table == alone.table
    assert both.summary["splits"] == alone.summary["splits"]
    assert "blocks" not in alone.summary
    assert alone.more == {}
    assert both.summary["identity"] != alone.summary["identity"]


def test_a_range_without_1_is_noted_and_1_is_not_in_the_table(folder: Path) -> None:
    part = library.interpolate("a.pt", "b.pt", points=3, range=(0.1, 0.3), layerwise=True)
    whole = library.interpolate("a.pt", "b.pt", points=3, range=(0.0, 1.0), layerwise=True)
    assert part.more["blocks"].unique("alpha") == [0.1, 0.2, 0.3]
    for block in ("layers.0", "layers.1"):
        here, there = (r.summary["blocks"][block]["splits"]["train"] for r in (part, whole))
        assert here["loss_at_1"] == pytest.approx(there["loss_at_1"], rel=1e-6)
        assert here["barrier"] is not None
    few = library.interpolate("a.pt", "b.pt", points=2, range=(0.0, 1.0), layerwise=True)
    assert few.summary["blocks"]["layers.0"]["splits"]["train"]["barrier"] is None


def frozen(names: list[str]) -> None:
    """A third checkpoint that has some tensors of the second, and else those of the first."""
    a, b = (torch.load(f"{n}.pt", weights_only=True)["state_dict"] for n in "ab")
    torch.save({n: (b if n in names else a)[n] for n in a}, "part.pt")


def test_blocks_that_do_not_move_are_left_out(folder: Path) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(MLP("6-5-4-3").state_dict(), f"{seed}.pt")
    a, b = (torch.load(f"{k}.pt", weights_only=True) for k in (0, 1))
    torch.save({n: (a if n.startswith("layers.1.") else b)[n] for n in a}, "part.pt")
    model = {"model": "mlp:6-5-4-3", "points": 3}
    result = library.interpolate("0.pt", "part.pt", layerwise=True, **model)
    assert list(result.summary["blocks"]) == ["layers.0", "layers.2"]
    chosen = library.interpolate("0.pt", "1.pt", layerwise=True, except_=("layers.1.*",), **model)
    assert list(chosen.summary["blocks"]) == ["layers.0", "layers.2"]
    np.testing.assert_allclose(
        chosen.more["blocks"].floats("loss"), result.more["blocks"].floats("loss"), rtol=1e-6
    )
    part = library.interpolate(
        "0.pt", "1.pt", layerwise=True, only=("layers.[01].weight",), **model
    )
    assert {n: b["tensors"] for n, b in part.summary["blocks"].items()} == {
        "layers.0": 1,
        "layers.1": 1,
    }


def test_a_sample_is_as_large_as_the_curves_together_need(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 6, generator=generator)
    data = {"all": (x, torch.randint(3, (4096,), generator=generator))}
    arguments = {"data": data, "points": 5, "range": (-3.0, 4.0), "layerwise": True}
    whole = library.interpolate("a.pt", "b.pt", **arguments)
    result = library.interpolate("a.pt", "b.pt", sampling_error=0.05, **arguments)
    blocks, number = result.more["blocks"], result.summary["examples"]["all"]
    assert 512 <= number < 4096
    assert blocks.unique("examples") == result.table.unique("examples") == [number]
    losses = [*result.table.floats("loss"), *blocks.floats("loss")]
    errors = [*result.table.floats("loss_stderr"), *blocks.floats("loss_stderr")]
    assert max(errors) < 0.05 * np.ptp(losses)
    everything = library.interpolate("a.pt", "b.pt", sampling_error=1e-9, **arguments)
    assert everything.summary["examples"] == {"all": 4096}
    for column in ("loss", "loss_stderr", "accuracy"):
        np.testing.assert_allclose(
            everything.more["blocks"].floats(column),
            whole.more["blocks"].floats(column),
            rtol=1e-6,
        )
    for name in ("layers.0", "layers.1"):
        one, other = (r.summary["blocks"][name]["splits"]["all"] for r in (everything, whole))
        assert one["change_stderr"] == pytest.approx(other["change_stderr"], rel=1e-6)


def test_losses_that_are_not_finite_are_reported_per_block(tmp_path: Path) -> None:
    case = case_of("cnn-batchnorm")
    result = swept(case, tmp_path, range=(-40.0, 40.0), points=5)
    said = {n: b["splits"]["all"] for n, b in result.summary["blocks"].items()}
    rows = result.more["blocks"].where("block", "norms.0").floats("loss")
    assert said["norms.0"]["not_finite"] == sum(not math.isfinite(loss) for loss in rows) > 0
    assert said["head"]["not_finite"] == 0
    assert any("moved on its own, norms.0 and 1 more has" in n for n in result.summary["notes"])
    nothing = swept(
        case, tmp_path, data={"all": (torch.full((5, 2, 6, 6), math.nan), case.targets[:5])}
    )
    about = nothing.summary["blocks"]["head"]["splits"]["all"]
    assert about["minimum"] is None
    assert about["barrier"] is None


def test_a_block_that_does_not_meet_its_end_stops_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_line = Interpolation._block_line

    def wrong(self: Interpolation, block: Any) -> Any:
        line, end = block_line(self, block)
        return line, {name: tensor * 1.1 for name, tensor in end.items()}

    monkeypatch.setattr(Interpolation, "_block_line", wrong)
    with pytest.raises(ModelError, match="does not reproduce the checkpoints"):
        library.interpolate("a.pt", "b.pt", points=3, layerwise=True)


def block(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs[:, 0] + targets


def test_a_metric_may_not_have_the_name_of_the_column_of_blocks(folder: Path) -> None:
    with pytest.raises(UsageError, match="the name 'block' is that of another column"):
        library.interpolate("a.pt", "b.pt", metric=(block,), layerwise=True)


LAYERWISE = ["interpolate", "a.pt", "b.pt", "--layerwise", "--points", "4", "-o", "x"]


@pytest.mark.usefixtures("unlaid")
def test_the_command_writes_and_prints_each_block(losscli: Losscli, folder: Path) -> None:
    done = losscli(*LAYERWISE)
    assert done.status == 0
    assert "x.blocks.csv" in done.stderr
    assert "each block on its own, the others at A" in done.stdout
    found = Table.read(Path("x.blocks.csv"))
    assert found.columns == ("block", "alpha", "split", "loss", "loss_stderr", "accuracy")
    assert command_of(found.columns) is None
    summary = json.loads(Path("x.json").read_text())
    assert summary["tables"] == ["blocks"]
    row = next(line for line in done.stdout.splitlines() if line.startswith("    layers.1"))
    said = summary["blocks"]["layers.1"]["splits"]["train"]
    assert f"{said['loss_at_1']:.4g}" in row
    assert f"{said['change']:.4g} ± {said['change_stderr']:.2g}" in row
    assert " 18 " in row
    # The picture from the tables is the picture from the sweep, to the last byte.
    assert losscli("plot", "x.csv", "--figure", "again.png").status == 0
    assert Path("again.png").read_bytes() == Path("x.png").read_bytes()
    # Another run in its place leaves no blocks behind.
    whole = [a for a in LAYERWISE if a != "--layerwise"]
    assert losscli(*whole, "--no-figure", "--force").status == 0
    assert not Path("x.blocks.csv").exists()
    Path("x.blocks.csv").touch()
    assert losscli(*LAYERWISE).status == 1


def test_a_dry_run_counts_the_blocks(losscli: Losscli, folder: Path) -> None:
    done = losscli(*LAYERWISE, "--dry-run", "--json", "--range", "0", "1", "--points", "5")
    plan = json.loads(done.stdout)
    assert plan["blocks"] == ["layers.0", "layers.1"]
    # Five of the whole, and four of each block: at 0 all are at A.
    assert plan["points"] == 13
    assert plan["forward_passes"] == 13 * 40
    # One for each end, one for the points between, and one for each block.
    assert plan["passes_over_data"] == 5
    assert "blocks       2: layers.0, layers.1" in losscli(*LAYERWISE, "--dry-run").stdout
    assert not list(folder.glob("x*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--refine", "0.01"], "--refine is for one curve"),
        (["--derivatives"], "--derivatives is for one curve"),
        (["--context", "whole.csv"], "have no figure together. Leave one of them out"),
        (["--only", "layers.0.*"], "one block to move, layers.0, and compares blocks"),
        (["--only", "layers.1.weight"], "one block to move, layers.1, and"),
    ],
)
def test_options_that_leave_no_blocks_to_compare_are_refused(
    more: list[str], message: str, losscli: Losscli, folder: Path
) -> None:
    if "--context" in more:
        line = ("interpolate", "a.pt", "b.pt", "-o", "whole", "--points", "3", "--no-figure")
        assert losscli(*line).status == 0
    done = losscli(*LAYERWISE, *more)
    assert (done.status, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(folder.glob("x*"))


def test_without_two_blocks_that_move_there_is_nothing_to_compare(
    losscli: Losscli, folder: Path
) -> None:
    frozen(["layers.1.weight"])
    one = losscli("interpolate", "a.pt", "part.pt", "-m", "mlp:6-5-3", "--layerwise", "-o", "x")
    assert one.status == 2
    assert "one block to move, layers.1" in one.stderr
    none = losscli("interpolate", "a.pt", "a.pt", "--layerwise", "-o", "x")
    assert none.status == 2
    assert "no block that moves" in none.stderr
    assert not list(folder.glob("x*"))


def test_a_table_of_blocks_is_not_accepted_as_that_of_a_line(
    losscli: Losscli, folder: Path
) -> None:
    assert losscli(*LAYERWISE, "--no-figure").status == 0
    before = sorted(folder.iterdir())
    alone = losscli("plot", "x.blocks.csv", "-o", "y")
    assert (alone.status, alone.stdout) == (1, "")
    assert "Give the CSV of the line" in alone.stderr
    context = losscli("interpolate", "a.pt", "b.pt", "--context", "x.blocks.csv", "-o", "y")
    assert context.status == 2
    assert "is not a table of interpolate" in context.stderr
    table = Table.read(Path("x.blocks.csv"))
    Path("x.blocks.csv").write_bytes(
        Table(table.columns, (*table.rows, ("layers.0", 0.77, "train", 1.0, 0.0, 0.5)))
        .to_csv()
        .encode()
    )
    kin = losscli("plot", "x.csv", "-o", "y")
    assert kin.status == 1
    assert "of another run than x.csv, which has no alpha 0.77" in kin.stderr
    Path("x.blocks.csv").write_text("alpha,split,loss\r\n0,train,1\r\n")
    other = losscli("plot", "x.csv", "-o", "y")
    assert other.status == 1
    assert "no column 'block'" in other.stderr
    assert sorted(folder.iterdir()) == before
