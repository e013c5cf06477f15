"""``python -m tests.benchmarks.gpu``: checks and measures a GPU in at most 8 minutes.

Each part is a process of its own with a time limit: if it fails or takes too long, that is
recorded, and the next part runs. The JSON is written after each part. ``--tiny`` runs all of it on
small work, also on a CPU, where parts and rows that need a GPU say so.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from xml.etree import ElementTree as ET

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from losscli.data import DataSet, Split
from losscli.evaluation import gpu_thresholds
from losscli.evaluation.device import float32_precision
from losscli.evaluation.losses import built_in
from losscli.evaluation.losses.built_in import cross_entropy, token_cross_entropy
from losscli.evaluation.objective import Objective
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.strategies.batch_graphs import CudaCapture
from losscli.evaluation.strategy_choice import choose_strategy
from losscli.evaluation.sweep import check, sweep
from losscli.models import CNN, MLP
from losscli.weight_space.slices import Line
from tests.benchmarks import contenders
from tests.benchmarks.contenders import Work
from tests.benchmarks.models import ResNet20, TokenScores

ROOT = Path(__file__).parent.parent.parent
SAMPLES = ROOT / "sample_checkpoints"
RESULTS = Path(__file__).parent / "results" / "gpu.json"

NEEDS_GPU = "needs a GPU"

Rows = dict[str, Any]
"""What a part found: by row its numbers by name, or the reason why there are none."""


class Scale(NamedTuple):
    """How much work the parts do."""

    product: int
    copied: int
    mlp: str
    cnn: str
    examples: int
    points: int
    images: int
    batches: tuple[int, ...]
    graph_batches: tuple[int, ...]
    language: dict[str, int]
    sequences: int
    chunks: tuple[int, ...]
    rounds: int
    layer: tuple[int, int]
    weights: tuple[int, ...]
    stacked: tuple[int, ...]


FULL = Scale(
    8192, 1 << 30, "784-512-512-10", "32-64-128", 50_000, 51, 4096, (128, 1024, 4096),
    (64, 256, 1024, 4096), {}, 16, tuple(1 << k for k in range(21, 28)), 3,
    (8192, 512), (16, 27, 48, 80, 128, 256, 600, 1024), tuple(1 << k for k in range(22, 29)),
)  # fmt: skip
TINY = Scale(
    64, 1 << 16, "12-8-10", "2-3", 16, 4, 8, (4, 8), (2, 4, 6, 8),
    {"words": 50, "context": 8, "width": 64, "depth": 1}, 2, (64, 128), 1,
    (64, 8), (16, 80), (1 << 8, 1 << 20),
)  # fmt: skip


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if has_gpu() else "cpu")


def seconds_of(work: Callable[[], object], rounds: int) -> float:
    """The shortest time of some rounds after one that warms up."""
    best = math.inf
    for number in range(rounds + 1):
        begun = time.perf_counter()
        work()
        if has_gpu():
            torch.cuda.synchronize()
        if number:
            best = min(best, time.perf_counter() - begun)
    return best


def work_of(build: Callable[[], nn.Module], shape: Sequence[int], points: int, batch: int) -> Work:
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ends.append(build().to(device()).state_dict())
    inputs = torch.rand(*shape, device=device())
    targets = torch.randint(10, (shape[0],), device=device())
    alphas = torch.linspace(-0.5, 1.0, points, dtype=torch.float64).tolist()
    return Work(build, *ends, inputs, targets, alphas, batch=batch)


def networks(scale: Scale) -> dict[str, Callable[[int], Work]]:
    """The networks by name, with their work for a batch size."""
    width = int(scale.mlp.split("-")[0])
    mlp, images = (scale.examples, width), (scale.images, 3, 32, 32)
    return {
        "mlp": partial(work_of, lambda: MLP(scale.mlp), mlp, scale.points),
        # Of known parts, which are evaluated as graphs; a ResNet is code of the user.
        "cnn": partial(
            work_of,
            lambda: CNN(scale.cnn, channels=3, classes=10, batchnorm=True),
            images,
            scale.points,
        ),
        "resnet20": partial(work_of, ResNet20, images, scale.points),
    }


def objective_of(
    work: Work, *, tf32: bool = False, dtype: torch.dtype = torch.float32, loss: Any = cross_entropy
) -> tuple[Objective, Line, list[tuple[float]]]:
    data = DataSet({"all": Split(work.inputs, work.targets)})
    objective = Objective(
        work.build(), loss, {}, data, device=device(), batch_size=work.batch, tf32=tf32, dtype=dtype
    )
    check(objective, work.a)
    names = [n for n, t in work.a.items() if t.is_floating_point()]
    line = Line(*({n: end[n] for n in names} for end in (work.a, work.b)))
    return objective, line, [(alpha,) for alpha in work.alphas]


def marked_tests(scale: Scale) -> Rows:
    """The tests marked ``cuda``."""
    if not has_gpu():
        return {"cuda": NEEDS_GPU}
    marked = [str(p) for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in
              p.read_text(encoding="utf-8")]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider",
                   "--tb=line", f"--junitxml={report}", *marked]  # fmt: skip
        subprocess.run(command, check=False, cwd=ROOT, stdout=sys.stderr)
        cases = list(ET.parse(report).getroot().iter("testcase"))
    kinds: dict[str, list[str]] = {"failure": [], "error": [], "skipped": []}
    for case in cases:
        for kind, names in kinds.items():
            if case.find(kind) is not None:
                names.append(f"{case.get('classname')}::{case.get('name')}")
    bad = kinds["failure"] + kinds["error"]
    passed = len(cases) - len(bad) - len(kinds["skipped"])
    return {"cuda": {"passed": passed, "failed": bad, "skipped": len(kinds["skipped"])}}


def peak_rates(scale: Scale) -> Rows:
    """Operations a second in one large product, and bytes a second in a copy."""
    rows: Rows = {}
    n = scale.product
    kinds = {
        "float64": (torch.float64, False), "float32": (torch.float32, False),
        "tf32": (torch.float32, True), "bfloat16": (torch.bfloat16, False),
    }  # fmt: skip
    for name, (dtype, tf32) in kinds.items():
        if tf32 and not has_gpu():
            rows[name] = NEEDS_GPU
            continue
        a, b = (torch.rand(n, n, device=device()).to(dtype) for _ in range(2))
        with float32_precision(tf32=tf32):
            best = seconds_of(partial(torch.mm, a, b), 5)
        rows[name] = {"seconds": best, "tflops": 2 * n**3 / best / 1e12}
    source = torch.zeros(scale.copied, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    best = seconds_of(partial(target.copy_, source), 5)
    rows["copy"] = {"seconds": best, "gb_per_second": 2 * scale.copied / best / 1e9}
    return rows


def synchronisations(scale: Scale) -> Rows:
    """Where the host waits for the device in one sweep, and how often."""
    if not has_gpu():
        return dict.fromkeys(networks(scale), NEEDS_GPU)
    rows: Rows = {}
    for name, work in networks(scale).items():
        objective, line, points = objective_of(work(scale.batches[-1]))
        sweep(objective, line, points)  # chooses the strategy, and fills caches
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                sweep(objective, line, points)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        where = Counter(
            f"{_short(w.filename)}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
        )
        rows[name] = {"number": where.total(), "where": dict(where.most_common())}
    return rows


def _short(name: str) -> str:
    path = Path(name)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else "/".join(path.parts[-3:])


def strategies(scale: Scale) -> Rows:
    """The chosen strategy, its difference and its time, by network, TF32 and batch size."""
    rows: Rows = {}
    for name, work in networks(scale).items():
        for tf32 in (False, True):
            for batch in scale.batches:
                row = f"{name} {'tf32' if tf32 else 'float32'} {batch}"
                if tf32 and not has_gpu():
                    rows[row] = NEEDS_GPU
                    continue
                own = work(batch)
                with float32_precision(tf32=tf32):
                    objective, line, points = objective_of(own, tf32=tf32)
                    choose_strategy(objective, line, points)
                    ours = seconds_of(partial(sweep, objective, line, points), 1)
                    by_hand = seconds_of(partial(contenders.by_hand, own), 1)
                choice = objective.first_choice or {}
                rows[row] = {
                    "seconds": ours, "times_by_hand": by_hand / ours, "strategy": choice["name"],
                    "difference": choice["difference"], "graph": choice.get("graph"),
                }  # fmt: skip
    return rows


def language(scale: Scale) -> Rows:
    """The time of GPT-2's losses by the number of values that are converted at once."""
    torch.manual_seed(0)
    model = TokenScores(**scale.language).to(device())
    vocabulary, context = len(model.words.weight), len(model.places.weight)
    tokens = torch.randint(vocabulary, (scale.sequences, context + 1), device=device())
    rows: Rows = {}
    state = model.state_dict()
    work = Work(
        lambda: TokenScores(**scale.language), state, state, tokens[:, :-1], tokens[:, 1:], [0.5],
        batch=8,
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        objective, line, _ = objective_of(work, dtype=dtype, loss=token_cross_entropy)
        (split,) = objective.splits.values()

        def forward(own: Objective, examples: Any) -> None:
            with torch.no_grad():
                for batch in own.batches(examples):
                    own.model.features(batch.inputs)

        kind = str(dtype).removeprefix("torch.")
        alone = seconds_of(partial(forward, objective, split), scale.rounds)
        rows[f"{kind} without head"] = {"seconds": alone}
        for chunk in scale.chunks:
            with mock.patch.object(built_in, "_CHUNK", chunk):
                best = seconds_of(partial(objective.at, line, [(0.5,)]), scale.rounds)
            rows[f"{kind} {chunk}"] = {"seconds": best, "times_without_head": best / alone}
    return rows


def sharing(scale: Scale) -> Rows:
    """A layer computed at a point, and combined from its outputs at two ends, by its inputs."""
    rows: Rows = {}
    kinds = {
        "float32": (torch.float32, False), "tf32": (torch.float32, True),
        "bfloat16": (torch.bfloat16, False),
    }  # fmt: skip
    examples, units = scale.layer
    for kind, (dtype, tf32) in kinds.items():
        if tf32 and not has_gpu():
            rows[kind] = NEEDS_GPU
            continue
        least = None
        for weights in scale.weights:
            x, w = (torch.rand(n, weights, device=device()).to(dtype) for n in (examples, units))
            low, high, out = (torch.empty(examples, units, device=device()).to(dtype).fill_(i)
                              for i in range(3))  # fmt: skip
            with float32_precision(tf32=tf32), torch.no_grad():
                layer = seconds_of(partial(_repeat, partial(F.linear, x, w)), scale.rounds)
                shared = partial(torch.lerp, low, high, 0.3, out=out)
                combined = seconds_of(partial(_repeat, shared), scale.rounds)
            rows[f"{kind} {weights}"] = {"layer_seconds": layer, "combined_seconds": combined}
            if combined < layer and least is None:
                least = weights
        on = "" if kind == "float32" else "_ON_TENSOR_CORES"
        now = getattr(gpu_thresholds, f"WORTH_SHARING{on}")
        rows[f"WORTH_SHARING{on} {kind}"] = {"now": now, "measured": least}
    return rows


def _repeat(work: Callable[[], object]) -> None:
    # So that the wait for the device is a small part.
    for _ in range(20):
        work()


def stacked(scale: Scale) -> Rows:
    """A perceptron at all points at once, by the bytes of its widest layer."""
    objective, line, points = objective_of(networks(scale)["mlp"](scale.batches[-1]))
    objective.strategy = Strategy.STACKED
    found = {}
    for nbytes in scale.stacked:
        with mock.patch.object(gpu_thresholds, "STACKED_BYTES", nbytes):
            found[nbytes] = seconds_of(partial(objective.at, line, points), scale.rounds)
    rows: Rows = {str(nbytes): {"seconds": seconds} for nbytes, seconds in found.items()}
    best = min(found, key=lambda nbytes: found[nbytes])
    rows["STACKED_BYTES"] = {"now": gpu_thresholds.STACKED_BYTES, "measured": best}
    return rows


@torch.no_grad()
def graphs(scale: Scale) -> Rows:
    """A forward pass with its loss, launched kernel by kernel and as one graph."""
    rows: Rows = {}
    least = []
    for name, work in networks(scale).items():
        for batch in scale.graph_batches:
            own = work(batch)
            model = own.build().to(device()).eval()
            inputs, targets = own.inputs[:batch], own.targets[:batch]
            found = torch.empty(batch, device=device())
            run = partial(_losses, model, inputs, targets, found)
            eager = seconds_of(run, 10 * scale.rounds)
            row: dict[str, Any] = {"seconds": eager}
            if has_gpu():
                expected = found.clone()
                begun = time.perf_counter()
                replay = CudaCapture(device()).record(run)
                torch.cuda.synchronize()
                recording = time.perf_counter() - begun
                replayed = seconds_of(replay, 10 * scale.rounds)
                row |= {"graph_seconds": replayed, "eager_of_graph": eager / replayed}
                row |= {"recording_seconds": recording, "same_bits": torch.equal(found, expected)}
                if replayed < eager:
                    row["least_replays"] = math.ceil(recording / (eager - replayed))
                    least.append(row["least_replays"])
            else:
                row["graph_seconds"] = NEEDS_GPU
            rows[f"{name} {batch}"] = row
    measured = sorted(least)[len(least) // 2] if least else None
    rows["LEAST_REPLAYS"] = {"now": gpu_thresholds.LEAST_REPLAYS, "measured": measured}
    return rows


@torch.no_grad()
def _losses(model: nn.Module, inputs: Tensor, targets: Tensor, out: Tensor) -> None:
    out.copy_(F.cross_entropy(model(inputs), targets, reduction="none"))


def memory(scale: Scale) -> Rows:
    """The same losses with 15 % of the memory, in smaller chunks or batches."""
    if not has_gpu():
        return {"15 %": NEEDS_GPU}
    total = torch.cuda.get_device_properties(device()).total_memory
    # One activation of a batch takes a tenth of the memory: several are needed, and do not fit.
    width = 64 if scale is TINY else 8192
    batch = total // 10 // (4 * width)
    build = partial(MLP, f"8-{width}-{width}-10")
    work = work_of(build, (batch, 8), 3, batch)
    found, batches = [], []
    for share in (1.0, 0.15):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(share)
        objective, line, points = objective_of(work)
        found.append(sweep(objective, line, points)["all"].losses)
        batches.append(objective.batch_size)
    difference = float((found[1] - found[0]).abs().max() / found[0].abs().max())
    return {"15 %": {"difference": difference, "batch_before": batches[0], "batch": batches[1]}}


# By name the arguments, the parts of a run that take most of the time being small.
COMMANDS = {
    "interpolate": ["relu/init.pt", "relu/final.pt"],
    "interpolate cnn": ["cnn/init.safetensors", "cnn/final.safetensors"],
    "plane": ["relu/init.pt", "relu/final.pt", "relu-seed1/final.pt", "--points", "9"],
    "check": ["relu/final.pt"],
    "connect": ["relu/init.pt", "relu/final.pt", "--steps", "5"],
}


def commands(scale: Scale) -> Rows:
    """Commands on the samples: the largest difference from the table of the CPU, by column."""
    rows: Rows = {}
    chosen = dict([*COMMANDS.items()][:1]) if scale is TINY else COMMANDS
    with tempfile.TemporaryDirectory() as name:
        for row, arguments in chosen.items():
            tables, seconds = [], []
            for number, kind in enumerate((device().type, "cpu")):
                stem = Path(name) / f"{row.split()[0]}-{number}"
                begun = time.perf_counter()
                ended = subprocess.run(
                    [sys.executable, "-m", "losscli", row.split()[0], *arguments, "-q", "--force",
                     "--no-figure", "--device", kind, "-o", str(stem)],
                    check=False, cwd=SAMPLES, capture_output=True, text=True,
                    env={**os.environ, "PYTHONPATH": str(ROOT)},
                )  # fmt: skip
                seconds.append(time.perf_counter() - begun)
                if ended.returncode:
                    rows[row] = {"error": f"{kind}: {ended.stderr.strip()[-300:]}"}
                    break
                with stem.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
                    tables.append(list(csv.DictReader(file)))
            else:
                rows[row] = {"seconds": seconds[0], "difference": _differences(*tables)}
    return rows


def _differences(one: list[dict[str, str]], other: list[dict[str, str]]) -> dict[str, float]:
    """The largest difference of each column of numbers, relative to its largest number."""
    if len(one) != len(other) or one[0].keys() != other[0].keys():
        raise ValueError("the tables have other rows or columns")
    found = {}
    for column in one[0]:
        try:
            pairs = [
                (float(x[column]), float(y[column]))
                for x, y in zip(one, other, strict=True)
                if x[column] or y[column]
            ]
        except ValueError:  # no column of numbers
            continue
        largest = max((abs(y) for _, y in pairs), default=0.0) or 1.0
        found[column] = max((abs(x - y) / largest for x, y in pairs), default=0.0)
    return found


# The parts in order, with their time limits in seconds: 8 minutes in all.
PARTS: dict[str, tuple[Callable[[Scale], Rows], int]] = {
    "tests": (marked_tests, 80),
    "peak": (peak_rates, 30),
    "synchronisations": (synchronisations, 40),
    "strategies": (strategies, 80),
    "sharing": (sharing, 15),
    "stacked": (stacked, 15),
    "gpt2": (language, 60),
    "graphs": (graphs, 40),
    "memory": (memory, 40),
    "commands": (commands, 80),
}


def run_part(name: str, limit: float, *, tiny: bool) -> dict[str, Any]:
    """Runs a part in a process of its own; returns its rows, or the error."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "tests.benchmarks.gpu", "--part", name, "--out", str(out)]
        begun = time.perf_counter()
        with subprocess.Popen(
            [*command, *(["--tiny"] if tiny else [])],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                _, messages = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                return {"seconds": limit, "error": f"took more than {limit:g} s"}
            finally:
                if process.poll() is None:
                    # With what it has started.
                    os.killpg(process.pid, signal.SIGKILL)
        found: dict[str, Any] = {"seconds": time.perf_counter() - begun}
        if process.returncode:
            return found | {"error": messages.strip()[-2000:] or f"exit {process.returncode}"}
        return found | {"rows": json.loads(out.read_text(encoding="utf-8"))}


def show(name: str, part: dict[str, Any]) -> None:
    print(f"{name}  {part['seconds']:.1f} s")
    if "error" in part:
        print(f"  {part['error'].splitlines()[-1]}", flush=True)
    for row, values in part.get("rows", {}).items():
        text = values
        if isinstance(values, dict):
            text = "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in values.items()
            )
        print(f"  {row:<24} {text}", flush=True)


def main() -> None:
    """Runs all parts, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small work, for a CPU too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write the JSON")
    parser.add_argument("--part", choices=PARTS, help="run one part in this process")
    parser.add_argument("--limit", type=float, help="seconds for each part, in place of its own")
    arguments = parser.parse_args()
    if arguments.part:
        torch.backends.cudnn.benchmark = False
        run, _ = PARTS[arguments.part]
        with float32_precision(tf32=False):
            rows = run(TINY if arguments.tiny else FULL)
        arguments.out.write_text(json.dumps(rows), encoding="utf-8")
        return
    found: dict[str, Any] = {
        "machine": {
            "device": device().type,
            "name": torch.cuda.get_device_name() if has_gpu() else "",
            "torch": torch.__version__,
            "tiny": arguments.tiny,
        }
    }
    for name, (_, limit) in PARTS.items():
        found[name] = run_part(name, arguments.limit or limit, tiny=arguments.tiny)
        show(name, found[name])
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
