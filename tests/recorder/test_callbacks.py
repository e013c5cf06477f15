"""The callbacks: what Lightning and the Trainer of transformers train is recorded, to the bit."""

from __future__ import annotations

import copy
import csv
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from losscli import recorder
from losscli.checkpoint import ModelParameters, find_adam_state, read_optimizers
from losscli.errors import OutputError, UsageError
from losscli.models import MLP
from tests.conftest import Losscli
from tests.libraries import Library

lightning: Any = Library("lightning")
transformers: Any = Library("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recorded() -> dict[int, dict[str, Tensor]]:
    return {int(p.stem.removeprefix("step-")): load_file(p) for p in Path("run").glob("step-*")}


def assert_equal(found: dict[int, dict[str, Tensor]], states: dict[int, Any]) -> None:
    for step, tensors in found.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, states[step][name]), (step, name)


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as lines:
        return list(csv.DictReader(lines))


# --- Lightning -----------------------------------------------------------------------------------


def module(fails_at: int | None = None) -> Any:
    """A module that keeps the weights after each step of its optimiser."""

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = MLP("6-5-3")
            self.states = {0: copy.deepcopy(self.state_dict())}

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            if self.trainer.global_step == fails_at:
                raise ZeroDivisionError
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

        def on_train_batch_end(self, *_: Any) -> None:
            self.states[self.trainer.global_step] = copy.deepcopy(self.state_dict())

    return Module()


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"inputs": torch.rand(24, 6, generator=generator), "targets": torch.arange(24) % 3}


def fit(model: Any, *, restored: str | None = None, **options: Any) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 4, "accumulate_grad_batches": 2, **options},
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data().values()), 4)
    trainer.fit(model, loader, ckpt_path=restored)
    return trainer


def test_lightning_counts_steps_of_the_optimiser_and_continues(losscli: Losscli) -> None:
    save_file(data(), "data.safetensors")
    options = {"count": 5, "model_spec": "mlp:6-5-3", "data_spec": "safetensors:data.safetensors"}
    model = module()
    callback = recorder.LightningCallback("run", steps=12, **options)
    trainer = fit(model, callbacks=[callback], max_epochs=2)
    trainer.save_checkpoint("own.ckpt")
    assert sorted(recorded()) == [0, 1, 2, 5, 6]
    assert_equal(recorded(), model.states)
    # Restored from Lightning's own checkpoint, with the number of steps of the trainer.
    again = module()
    fit(again, restored="own.ckpt", callbacks=[recorder.LightningCallback("run", **options)])
    assert sorted(recorded()) == [0, 1, 2, 5, 6, 12]
    assert_equal(recorded(), model.states | {12: again.states[12]})
    with safe_open("run/step-00012.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["learning_rate"] == "0.1"
    assert 0 < float(metadata["loss"]) < 2
    with pytest.raises(OutputError, match="may hold the record of another run"):
        fit(module(), callbacks=[recorder.LightningCallback("run")])
    done = losscli("trajectory", "run", "--no-figure", "--no-surface", "-q", "-o", "out")
    assert done.status == 0, done.stderr
    model.load_state_dict(again.states[12])
    loss = cross_entropy(model.net.double()(data()["inputs"].double()), data()["targets"])
    assert float(rows("out.csv")[-1]["loss"]) == pytest.approx(loss.item(), rel=1e-6)


def test_lightning_that_fails_keeps_what_was_recorded() -> None:
    model = module(fails_at=4)
    with pytest.raises(ZeroDivisionError):
        fit(model, callbacks=[recorder.LightningCallback("run", count=4)])
    assert sorted(recorded()) == [0, 1, 4]
    assert_equal(recorded(), model.states)


def test_lightning_without_an_end_needs_steps() -> None:
    with pytest.raises(UsageError, match=r"no limit of steps.*Give steps=N"):
        fit(module(), callbacks=[recorder.LightningCallback("run")], max_epochs=-1)
    assert not Path("run").exists()


# --- transformers --------------------------------------------------------------------------------


def keeper() -> Any:
    """A callback that keeps the weights after each step."""

    class Keeper(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.states: dict[int, Any] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **training: Any) -> None:
            self.states[0] = copy.deepcopy(training["model"].state_dict())

        def on_step_end(self, args: Any, state: Any, control: Any, **training: Any) -> None:
            self.states[state.global_step] = copy.deepcopy(training["model"].state_dict())

    return Keeper()


def language_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def trained(tokens: Tensor, *callbacks: Any, resume: str | None = None, **options: Any) -> Any:
    trainer = transformers.Trainer(
        model=language_model(),
        args=transformers.TrainingArguments(
            output_dir="own", num_train_epochs=2, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
            logging_strategy="no", save_strategy="steps",
            learning_rate=0.01, **{"save_steps": 4, **options},
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        eval_dataset=[{"input_ids": row, "labels": row} for row in tokens[:2]],
        callbacks=[*callbacks],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_trainer_of_transformers_is_recorded_and_needs_no_model(losscli: Losscli) -> None:
    text = (b"the loss surface of a small language model, again and again. " * 5)[: 16 * 16]
    Path("text.txt").write_bytes(text)
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(-1, 16)
    kept = keeper()
    trainer = trained(tokens, kept, recorder.TransformersCallback("run", count=4))
    assert sorted(recorded()) == [0, 1, 2, 8]
    assert_equal(recorded(), kept.states)
    with safe_open("run/step-00000.safetensors", "pt") as file:
        assert file.metadata() == {"step": "0", "learning_rate": "0.01"}
    done = losscli(
        *("trajectory", "run", "-d", "text:text.txt,context=16"),
        *("--no-figure", "--no-surface", "-q", "-o", "out"),
    )
    assert done.status == 0, done.stderr
    model = trainer.model.double().eval()
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in tokens]
    expected = torch.stack(losses).mean().item()
    assert float(rows("out.csv")[-1]["loss"]) == pytest.approx(expected, rel=1e-5)
    # The moments in the trainer's own checkpoint are those of its parameters.
    parameters = ModelParameters.of(dict(trainer.model.named_parameters()))
    optimizers = read_optimizers("own/checkpoint-8")
    found = find_adam_state("own", optimizers, parameters, list(parameters.shapes))
    for name, parameter in trainer.model.named_parameters():
        moments = trainer.optimizer.state[parameter]
        assert torch.equal(found.second_moments[name], moments["exp_avg_sq"])
    assert {*found.steps.values()} == {8}
    # From the trainer's own checkpoint of step 4, between two of the record.
    again = keeper()
    callback = recorder.TransformersCallback("run", count=4)
    shutil.copy("run/step-00002.safetensors", "run/step-00008.safetensors")  # to be replaced
    trained(tokens, again, callback, resume="own/checkpoint-4")
    assert sorted(recorded()) == [0, 1, 2, 8]
    assert_equal(recorded(), kept.states | {8: again.states[8]})


def stop() -> Any:
    """A callback that ends training after step 3."""

    class Stop(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **training: Any) -> None:
            control.should_training_stop = state.global_step == 3

    return Stop()


@pytest.mark.parametrize("best", [False, True])
def test_the_last_step_is_saved_unless_the_best_model_was_loaded(best: bool) -> None:
    tokens = torch.arange(16 * 8).view(8, 16)
    kept = keeper()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1} if best else {}
    trained(
        tokens, kept, stop(), recorder.TransformersCallback("run", count=3),
        load_best_model_at_end=best, **options,
    )  # fmt: skip
    assert sorted(recorded()) == ([0, 1] if best else [0, 1, 3])
    assert_equal(recorded(), kept.states)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("LightningCallback", ("lightning", "lightning.pytorch", "pytorch_lightning")),
        ("TransformersCallback", ("transformers",)),
    ],
)
def test_a_library_that_is_missing_is_named(
    name: str, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = missing[0]
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"losscli.recorder.{library}", raising=False)
    with pytest.raises(UsageError, match=rf"{name} needs {library}.*pip install {library}"):
        getattr(recorder, name)
    with pytest.raises(AttributeError, match="absent"):
        _ = recorder.absent
