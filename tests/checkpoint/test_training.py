"""Checkpoints as training code writes them: Lightning, averages, NumPy beside the tensors."""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import pathlib
import pickle
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from losscli.checkpoint import ModelParameters, find_adam_state, read, read_optimizers
from losscli.errors import CheckpointError, MismatchError
from losscli.models import MLP
from tests import oracle
from tests.checkpoint.test_files import prefixed, refusal, same, state, write
from tests.conftest import Losscli
from tests.foreign import Attention
from tests.libraries import Library

lightning: Any = Library("lightning")


def untrained(*, extras: bool) -> Any:
    """A network under a name of its own; by wish with a criterion that has weights, and a twin."""

    class Trained(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, rate: float = 0.1, extras: bool = False) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = MLP("4-3-2")
            if extras:
                self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))
                self.ema_model = torch.optim.swa_utils.AveragedModel(self.net)

        def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.net.parameters(), lr=self.hparams["rate"])

    return Trained(extras=extras)


def fit(folder: Path, *, extras: bool = False) -> tuple[Any, str]:
    """Trains for an epoch; the checkpoint is what Lightning writes."""
    torch.manual_seed(0)
    model = untrained(extras=extras)
    data = torch.utils.data.TensorDataset(torch.rand(8, 4), torch.arange(8) % 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
        path = folder / "last.ckpt"
        trainer.save_checkpoint(path)
    return model, str(path)


def test_a_checkpoint_of_lightning_is_read_under_any_name_of_the_network(
    losscli: Losscli, tmp_path: Path
) -> None:
    model, name = fit(tmp_path)
    expected = {n: t.clone() for n, t in model.net.state_dict().items()}
    assert same(read(name).select(state()).weights, expected)
    assert read(name).metadata["epoch"] == "1"
    # Without a model names are as they are, and a key takes a prefix off.
    assert same(read(name).select(None).weights, prefixed("net.", expected))
    assert same(read(f"{name}#state_dict.net").select(None).weights, expected)
    for given in (name, f"{name}#state_dict", f"{name}#state_dict.net"):
        assert same(read(given).select(state()).weights, expected)
    assert "has no state dict under 'net'" in refusal(f"{name}#net")
    data = {"inputs": torch.rand(9, 4), "targets": torch.arange(9) % 2}
    save_file(data, tmp_path / "data.safetensors")
    done = losscli(
        "interpolate", name, "init:1", "-m", "mlp:4-3-2", "-q", "--json",
        "-d", f"safetensors:{tmp_path}/data.safetensors", "--points", 3, "--no-figure",
        "-o", tmp_path / "x",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    losses = oracle.losses(
        lambda: MLP("4-3-2"),
        expected,
        data["inputs"],
        data["targets"],
        lambda o, t: nn.functional.cross_entropy(o, t, reduction="none"),
    )
    found = json.loads(done.stdout)["splits"]["data"]["loss_a"]
    assert found == pytest.approx(oracle.mean(losses), rel=1e-6)


def test_the_moments_of_lightning_are_those_of_the_network(tmp_path: Path) -> None:
    model, name = fit(tmp_path)
    parameters = ModelParameters.of(dict(model.net.named_parameters()))
    for given in (name, f"{name}#state_dict.net"):
        optimizers = read_optimizers(given)
        found = find_adam_state(given, optimizers, parameters, list(parameters.shapes))
        optimizer = model.trainer.optimizers[0]
        for own, parameter in model.net.named_parameters():
            moments = optimizer.state[parameter]
            assert torch.equal(found.second_moments[own], moments["exp_avg_sq"])
        assert (found.learning_rate, {*found.steps.values()}) == (0.1, {2})


def test_of_a_network_and_its_average_the_key_chooses(losscli: Losscli, tmp_path: Path) -> None:
    model, name = fit(tmp_path, extras=True)
    with torch.no_grad():
        assert not torch.equal(model.ema_model.module.layers[0].weight, model.net.layers[0].weight)
    with pytest.raises(CheckpointError) as caught:
        read(name).select(state())
    assert "several state dicts: 'state_dict.net', 'state_dict.ema_model.module'." in str(
        caught.value
    )
    assert str(caught.value).endswith(f"Choose one, for example {name}#state_dict.net")
    done = losscli("interpolate", name, "init:0", "-m", "mlp:4-3-2", "-o", tmp_path / "x")
    assert (done.status, done.stderr.count("\n")) == (1, 1)
    for key, part in (
        ("net", model.net),
        ("ema_model", model.ema_model.module),
        ("ema_model.module", model.ema_model.module),
    ):
        found = read(f"{name}#state_dict.{key}").select(state())
        assert same(found.weights, {n: t.detach() for n, t in part.state_dict().items()})


def test_an_average_of_torch_is_read(tmp_path: Path) -> None:
    average = torch.optim.swa_utils.AveragedModel(MLP("4-3-2"))
    expected = {n: t.clone() for n, t in average.module.state_dict().items()}
    for content in (average.state_dict(), {"swa": average.state_dict(), "epoch": 3}):
        name = write(content, tmp_path / "a.pt")
        assert same(read(name).select(state(1)).weights, expected)
    content = {"model": state(2), "ema": average.state_dict()}
    name = write(content, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"'model', 'ema\.module'\. Choose one"):
        read(name).select(state(1))
    assert same(read(f"{name}#ema").select(state(1)).weights, expected)
    assert same(read(f"{name}#model").select(state(1)).weights, state(2))


@pytest.mark.parametrize(
    "wrapped",
    [
        "net.{}",
        "a.b.c.{}",
        "_fsdp_wrapped_module.{}",
        "module._fsdp_wrapped_module._orig_mod.{}",
        "net.module._orig_mod.{}",
    ],
)
@pytest.mark.parametrize("inside", ["layers.", "layers._fsdp_wrapped_module.", "layers.module."])
@pytest.mark.parametrize("extra", [{}, {"criterion.weight": torch.ones(2)}], ids=["", "extra"])
def test_any_prefix_and_the_marks_of_wrappers_are_seen_through(
    wrapped: str, inside: str, extra: dict[str, Tensor], tmp_path: Path
) -> None:
    content = {wrapped.format(n.replace("layers.", inside)): t for n, t in state().items()}
    save_file({**content, **extra}, tmp_path / "a.safetensors")
    found = read(str(tmp_path / "a.safetensors")).select(state(1))
    assert same(found.weights, state())


def test_a_model_with_extras_and_its_twin_are_two(tmp_path: Path) -> None:
    content = {**state(1), "step": torch.tensor(3), **prefixed("ema.", state(2))}
    name = write(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"its top level, 'ema'\. Choose one.*#ema"):
        read(name).select(state())
    assert same(read(f"{name}#ema").select(state()).weights, state(2))


def test_a_part_that_does_not_fit_is_reported_without_its_prefix(tmp_path: Path) -> None:
    content = {**prefixed("net.", state(1, "4-5-2")), "criterion.weight": torch.ones(2)}
    name = write({"state_dict": content}, tmp_path / "a.pt")
    with pytest.raises(MismatchError) as caught:
        read(name).select(state())
    assert str(caught.value).startswith(
        f"{name}#state_dict.net does not fit the model: layers.0.weight is [5, 4], not [3, 4]"
    )
    assert "criterion" not in str(caught.value)


def test_a_tied_tensor_is_found_under_a_prefix_both_ways(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = {n: t.clone() for n, t in Attention().state_dict().items()}
    expected = Attention().state_dict()
    for left_out in (set[str](), {"head.weight"}, {"embedding.weight"}):
        content = prefixed("net.", {n: t for n, t in own.items() if n not in left_out})
        name = write({**content, "n": torch.ones(1)}, tmp_path / "a.pt")
        assert same(read(name).select(expected).weights, own)
    # A file that ties what the model does not.
    tie = Attention().state_dict()
    apart = {n: t.clone() for n, t in tie.items()}
    assert same(read(write(tie, tmp_path / "b.pt")).select(apart).weights, apart)


def test_inspect_pairs_the_names_of_two_trainers(losscli: Losscli, tmp_path: Path) -> None:
    a = write(state(0), tmp_path / "a.pt")
    b = write({"state_dict": {**prefixed("net.", state(1)), "x": torch.ones(1)}}, tmp_path / "b.pt")
    both = json.loads(losscli("inspect", a, b, "--json").stdout)
    assert both["mismatches"] == []
    assert len(both["rows"]) == len(state())
    squares = [float(((state(1)[n].double() - t.double()) ** 2).sum()) for n, t in state().items()]
    assert both["distance"] == pytest.approx(sum(squares) ** 0.5, rel=1e-12)
    # Of another model, names are as they are.
    other = write(prefixed("net.", state(1, "4-9-2")), tmp_path / "c.pt")
    assert (
        "missing layers.0.weight [3, 4]"
        in json.loads(losscli("inspect", a, other, "--json").stdout)["mismatches"]
    )


# Half precision


@pytest.mark.parametrize("types", [("bfloat16", "float32"), ("float16", "float64")], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_ends_of_two_types_are_both_exact_and_move_in_the_wider(
    types: tuple[str, str], turned: bool, losscli: Losscli, tmp_path: Path
) -> None:
    types = types[::-1] if turned else types
    ends = []
    for seed, kind in enumerate(types):
        ends.append({n: t.to(getattr(torch, kind)) for n, t in state(seed).items()})
        write(ends[seed], tmp_path / f"{seed}.pt")
    torch.manual_seed(0)
    data = {"inputs": torch.rand(9, 4), "targets": torch.arange(9) % 2}
    save_file(data, tmp_path / "data.safetensors")
    done = losscli(
        "interpolate", tmp_path / "0.pt", tmp_path / "1.pt", "-m", "mlp:4-3-2", "--range", 0, 1,
        "-d", f"safetensors:{tmp_path}/data.safetensors", "--points", 4, "-o", tmp_path / "x",
        "--dtype", "float64", "--no-figure",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    half = next(t for t in types if t in {"bfloat16", "float16"})
    assert f"note: tensors stored in {half} move in float32" in done.stderr
    rows = [r.split(",") for r in (tmp_path / "x.csv").read_text().splitlines()[1:]]
    for row in rows:
        losses = oracle.losses(
            lambda: MLP("4-3-2"),
            oracle.blend(ends[0], ends[1], float(row[0])),
            data["inputs"],
            data["targets"],
            lambda o, t: nn.functional.cross_entropy(o, t, reduction="none"),
        )
        assert float(row[2]) == pytest.approx(oracle.mean(losses), rel=1e-7)


# NumPy, paths and the like beside the tensors


def beside() -> dict[str, Any]:
    return {
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("/a/b"), classes=np.arange(3)),
        "config": types.SimpleNamespace(depth=3),
        "loss": np.float64(0.1),
        "accuracy": np.float32(0.5),
        "half": np.float16(2.0),
        "step": np.int64(-(2**40)),
        "byte": np.uint8(255),
        "best": np.bool_(True),
        "big": np.array(1.5, ">f8")[()],
        "path": pathlib.Path("/runs/1/best.pt"),
        "pure": pathlib.PureWindowsPath("a/b"),
        "history": collections.defaultdict(list, {"loss": [np.float64(3), 2.0]}),
        "counts": collections.defaultdict(int, {"a": 1}),
        "nested": collections.defaultdict(dict, {"a": {}}),
        "random": np.random.RandomState(0).get_state(),
        "text": np.str_("abc"),
        "objects": np.array([1, "a", None], object),
        "structured": np.zeros(2, [("a", "f4"), ("b", "i8")]),
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_numpy_and_the_like_beside_the_tensors_are_read(legacy: bool, tmp_path: Path) -> None:
    name = write({"model": state(), **beside()}, tmp_path / "a.pt", legacy=legacy)
    file = read(name)
    assert same(file.select(state(1)).weights, state())
    assert same(file.select(None).weights, state())
    assert file.metadata == {
        "loss": "0.1",
        "accuracy": "0.5",
        "half": "2.0",
        "step": str(-(2**40)),
        "byte": "255",
        "best": "True",
        "big": "1.5",
        "path": "/runs/1/best.pt",
        "pure": "a/b",
    }


def test_names_of_numpy_1_and_of_later_pythons_are_known(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write({"model": state(), "loss": np.float64(0.1), "p": pathlib.PurePosixPath("x")}, path)
    content = path.read_bytes()
    for old, new in ((b"numpy._core.", b"numpy.core."), (b"cpathlib\n", b"cpathlib._local\n")):
        swapped = tmp_path / "b.pt"
        import zipfile

        with zipfile.ZipFile(path) as source, zipfile.ZipFile(swapped, "w") as target:
            for item in source.namelist():
                target.writestr(item, source.read(item).replace(old, new))
        assert read(str(swapped)).metadata == {"loss": "0.1", "p": "x"}
    assert content == path.read_bytes()


class Reduced:
    """Pickled as a call of anything with anything."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def hostile() -> Iterator[Any]:
    """What a pickle may try with the names that are allowed."""
    # Of numpy._core or numpy.core, by the version.
    scalar, reconstruct = np.float64().__reduce__()[0], np.zeros(0).__reduce__()[0]

    yield Reduced(argparse.Namespace, (1, 2))
    yield Reduced(argparse.Namespace, (), {"__class__": dict, "__setstate__": 3})
    yield Reduced(argparse.Namespace, (), (None, {"__class__": dict}))
    yield Reduced(scalar, (np.dtype("O"), b"x"))
    yield Reduced(scalar, (np.dtype("f8"), b"x"))
    yield Reduced(scalar, (np.dtype("f8"), "not bytes"))
    yield Reduced(scalar, ())
    yield Reduced(reconstruct, (dict, (1 << 60,), b"b"), (1, (1 << 60,), 3, 4, 5))
    yield Reduced(np.dtype, ("f8", 0, 1), (3, "<", None, None, None, -1, -1, 1 << 40))
    yield Reduced(collections.defaultdict, (list, 3))
    yield Reduced(pathlib.PurePosixPath, (1, {}, []))
    yield Reduced(list, ("x",))
    yield Reduced(int, ("9" * 9,))


def test_allowed_names_have_no_effect_with_any_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("something ran")

    monkeypatch.setattr(argparse.Namespace, "__init__", never)
    for evil in hostile():
        torch.save({"model": state(), "x": evil}, tmp_path / "a.pt")
        with contextlib.suppress(CheckpointError):
            file = read(str(tmp_path / "a.pt"))
            assert same(file.select(state(1)).weights, state())


def test_the_allowance_ends_with_the_reading(tmp_path: Path) -> None:
    name = write({"model": state(), **beside()}, tmp_path / "a.pt")
    before = set(torch.serialization.get_safe_globals())
    read(name)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(name, weights_only=True)


@pytest.mark.parametrize("script", [True, False])
def test_parts_of_a_checkpoint_of_zero_3_name_the_script_that_puts_them_together(
    script: bool, losscli: Losscli, tmp_path: Path
) -> None:
    """Each rank of DeepSpeed writes its share of all weights as one row, and empty tensors."""
    whole = MLP("4-3-2").state_dict()
    step = tmp_path / "run" / "global_step100"
    step.mkdir(parents=True)
    if script:
        (tmp_path / "run" / "zero_to_fp32.py").touch()
    flat = torch.cat([t.flatten() for t in whole.values()]).chunk(2)
    for rank, part in enumerate(flat):
        empty = {name: torch.empty(0, dtype=torch.bfloat16) for name in whole}
        torch.save({"module": empty}, step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        optimiser = {"optimizer_state_dict": {"zero_stage": 3, "fp32_flat_groups": [part]}}
        torch.save(optimiser, step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    before = sorted(tmp_path.rglob("*"))
    names = [step, *step.iterdir(), *([step.parent] if script else [])]
    for name in names:
        done = losscli("interpolate", name, "init:0", "-m", "mlp:4-3-2", "-o", tmp_path / "out")
        assert (done.status, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        if script:
            run = step.parent
            told = f"Put its parts together: python {run}/zero_to_fp32.py {run} FOLDER, and name"
        else:
            told = "Put its parts together with DeepSpeed's zero_to_fp32.py, and name what it"
        assert told in done.stderr, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    # One empty tensor among others is a mismatch as any.
    torch.save({**whole, "layers.0.bias": torch.empty(0)}, tmp_path / "odd.pt")
    done = losscli("interpolate", tmp_path / "odd.pt", "init:0", "-m", "mlp:4-3-2")
    assert "layers.0.bias is [0], not [3] as needed" in done.stderr
