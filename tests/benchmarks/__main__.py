"""``python -m tests.benchmarks``: measures, and writes what was measured.

Every figure is a ratio within one round, in which the contenders take turns, so that a machine
whose speed drifts does not favour one of them; the median over the rounds counts. What was measured
goes to results/DEVICE.json, from which the README's table and figure are made. ``--only NAME``
measures one thing anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file

from losscli import Recorder
from losscli.evaluation.flops import operations
from losscli.models import CNN, MLP
from tests.benchmarks import contenders, spectrum, surfaces
from tests.benchmarks.contenders import Work
from tests.benchmarks.draw import draw
from tests.benchmarks.models import GPT2, ResNet20

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "results"
SAMPLES = ROOT / "sample_checkpoints"

W = TypeVar("W")


def line(build: Callable[[], torch.nn.Module], shape: Sequence[int], points: int) -> Work:
    """The work on made-up data: what the numbers are makes no difference to the time."""
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ends.append(build().to(DEVICE).state_dict())
    generator = torch.Generator().manual_seed(2)
    inputs = torch.rand(*shape, generator=generator).to(DEVICE)
    targets = torch.randint(10, (shape[0],), generator=generator).to(DEVICE)
    alphas = torch.linspace(-0.5, 1.0, points, dtype=torch.float64).tolist()
    return Work(build, *ends, inputs, targets, alphas)


def compare(
    work: W, them: Sequence[Callable[[W], list[float]]], rounds: int, operations: float
) -> dict[str, Any]:
    """Times the contenders in turns; the loop written by hand is the measure.

    With each goes its share of the machine's own rate: the operations that the loop by hand needs,
    a second, over those of one large float32 matrix product. Who shares a layer may exceed 1.
    """
    peak_rate = product_rate()
    seconds: dict[str, list[float]] = {c.__name__: [] for c in them}
    losses: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for contender in them:
            begun = time.perf_counter()
            losses[contender.__name__] = contender(work)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds[contender.__name__].append(time.perf_counter() - begun)
    hand = contenders.by_hand.__name__
    result = {}
    for name, times in seconds.items():
        ratios = [h / t for h, t in zip(seconds[hand], times, strict=True)]
        off = max(abs(x - y) / abs(y) for x, y in zip(losses[name], losses[hand], strict=True))
        result[name] = {
            "seconds": statistics.median(times),
            "times_by_hand": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "largest_relative_difference": off,
            "share_of_product_peak": operations / statistics.median(times) / peak_rate,
        }
        print(f"  {name:<20}{result[name]['seconds']:8.3f} s", end="")
        print(f"  {result[name]['times_by_hand']:6.2f} × by hand", end="")
        print(
            f"  {result[name]['share_of_product_peak']:6.2f} of {peak_rate / 1e9:,.0f} GFLOP/s",
            flush=True,
        )
    return result


def language(rounds: int) -> dict[str, Any]:
    """A transformer of 124 M parameters on 64 sequences of 1,024 tokens, at 11 points."""
    sequences, context, points = 64, 1024, 11
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ends.append(GPT2().to(DEVICE).state_dict())
    tokens = torch.randint(50257, (sequences, context + 1), device=DEVICE)
    alphas = torch.linspace(-0.5, 1.0, points, dtype=torch.float64).tolist()
    work = Work(GPT2, *ends, tokens[:, :-1], tokens[:, 1:], alphas, batch=8)
    operations = points * sequences * context * GPT2.products(context)
    return compare(work, [contenders.losscli, contenders.by_hand], rounds, operations)


def products(work: Work | surfaces.Surface) -> float:
    """Floating-point operations of the products in one pass over the data at each point."""
    model, few = work.build().to(DEVICE).eval(), work.inputs[:2]
    return operations(model, lambda: model(few)) / 2 * len(work.targets) * work.points


def product_rate() -> float:
    """Floating-point operations a second in one large float32 matrix product, the best of ten."""
    size = 8192 if DEVICE.type == "cuda" else 2048
    a, b = (torch.rand(size, size, device=DEVICE) for _ in range(2))
    best = 0.0
    for _ in range(10):
        begun = time.perf_counter()
        torch.mm(a, b)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best


def growth(rounds: int) -> dict[str, float]:
    """How the time grows with twice the points, and with twice the examples."""

    def build() -> MLP:
        return MLP("784-512-512-10")

    works = [
        line(build, (16_000, 784), 50),
        line(build, (16_000, 784), 100),
        line(build, (32_000, 784), 50),
    ]
    seconds: list[list[float]] = [[] for _ in works]
    for number in range(rounds + 1):
        for work, times in zip(works, seconds, strict=True):
            begun = time.perf_counter()
            contenders.losscli(work)
            if number:
                times.append(time.perf_counter() - begun)
    one, points, examples = seconds
    result = {
        "points": statistics.median(y / x for x, y in zip(one, points, strict=True)),
        "examples": statistics.median(y / x for x, y in zip(one, examples, strict=True)),
    }
    print(f"  {result}", flush=True)
    return result


def peak(command: list[str]) -> int:
    """The largest resident memory of a process, in bytes."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
        "stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], check=True, capture_output=True, text=True
    )
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


def memory(_: int) -> dict[str, float]:
    """The peak of the whole command on two checkpoints of 200 MB, over that of importing torch."""
    spec = "mlp:1000-6500-6500-10"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            paths.append(folder / f"{seed}.pt")
            torch.save(MLP("1000-6500-6500-10").state_dict(), paths[-1])
        x = torch.rand(64, 1000).numpy()
        import numpy as np

        np.savez(folder / "data.npz", inputs=x, targets=np.arange(64) % 10)
        checkpoint = paths[0].stat().st_size
        base = peak([sys.executable, "-c", "import torch"])
        whole = peak([
            sys.executable, "-m", "losscli", "interpolate", *map(str, paths), "-q", "-m", spec,
            "-d", f"npz:{folder}/data.npz", "-o", str(folder / "out"),
        ])  # fmt: skip
    result = {
        "checkpoint_mb": checkpoint / 1e6,
        "over_torch_mb": (whole - base) / 1e6,
        "over_three_checkpoints_mb": (whole - base - 3 * checkpoint) / 1e6,
    }
    print(f"  {result}", flush=True)
    return result


def command(rounds: int) -> dict[str, float]:
    """The whole command on the samples, and the help, beside importing torch."""
    run = [sys.executable, "-m", "losscli"]
    relu = [str(SAMPLES / "relu" / name) for name in ("init.pt", "final.pt")]
    seconds: dict[str, list[float]] = {"torch": [], "interpolate": [], "help": []}
    with tempfile.TemporaryDirectory() as name:
        commands = {
            "torch": [sys.executable, "-c", "import torch"],
            "interpolate": [*run, "interpolate", *relu, "-q", "-o", f"{name}/out"],
            "help": [*run, "--help"],
        }
        for number in range(rounds + 1):
            for which, arguments in commands.items():
                begun = time.perf_counter()
                subprocess.run(arguments, check=True, capture_output=True, cwd=ROOT)
                if number:
                    seconds[which].append(time.perf_counter() - begun)
    pairs = list(zip(*seconds.values(), strict=True))
    result = {
        "torch_seconds": statistics.median(seconds["torch"]),
        "interpolate_beyond_torch_seconds": statistics.median(i - t for t, i, _ in pairs),
        "help_of_torch": statistics.median(h / t for t, _, h in pairs),
    }
    print(f"  {result}", flush=True)
    return result


def processes(rounds: int) -> dict[str, float]:
    """Two processes of one thread each beside one, and with one of the two killed half way.

    The whole command, and of it the evaluation alone. Where a rank is killed torchrun ends the
    other too and starts both anew, and they go on from the journal.
    """
    spec, examples = "mlp:784-512-512-10", 32_000
    seconds: dict[str, list[float]] = {"one": [], "two": [], "killed": []}
    sweeps: dict[str, list[float]] = {"one": [], "two": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        import numpy as np

        generator = np.random.default_rng(0)
        x = generator.random((examples, 784), np.float32)
        np.savez(folder / "data.npz", inputs=x, targets=np.arange(examples) % 10)
        for number in range(rounds + 1):
            last = 0.0
            for which, times in seconds.items():
                out = folder / which
                arguments = ["-m", "losscli", "interpolate", "init:0", "init:1", "-m", spec]
                arguments += ["-d", f"npz:{folder}/data.npz", "--points", "101", "-q", "--force"]
                arguments += ["--device", "cpu", "--no-figure", "-o", str(out)]
                if which != "one":
                    start = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
                    arguments = ["-m", "torch.distributed.run", *start, *arguments]
                after = last / 2 if which == "killed" else None
                last = _wall([sys.executable, *arguments], after)
                if number:  # the first round warms up
                    times.append(last)
                    if which in sweeps:
                        told = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
                        sweeps[which].append(told["seconds"]["sweep"])
        tables = {(folder / f"{which}.csv").read_bytes() for which in ("two", "killed")}
    if len(tables) > 1:
        raise RuntimeError("the run that was broken off has other results")
    wall = list(zip(*seconds.values(), strict=True))
    result = {
        **{f"{which}_seconds": statistics.median(times) for which, times in seconds.items()},
        **{f"{which}_sweep_seconds": statistics.median(times) for which, times in sweeps.items()},
        "two_times_one": statistics.median(one / two for one, two, _ in wall),
        "two_times_one_sweep": statistics.median(
            one / two for one, two in zip(*sweeps.values(), strict=True)
        ),
        "killed_of_two": statistics.median(killed / two for _, two, killed in wall),
    }
    print(f"  {result}", flush=True)
    return result


def _wall(command: Sequence[str], after: float | None) -> float:
    """Runs a command; returns how long it takes. After some seconds its rank 1 may be killed."""
    begun = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        if after is not None:
            time.sleep(after)
            os.kill(_rank(process.pid, 1), signal.SIGKILL)
        _, told = process.communicate()
    if process.returncode:
        raise RuntimeError(told)
    return time.perf_counter() - begun


def _rank(agent: int, rank: int) -> int:
    """The process of a rank that torchrun started; as Linux tells."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text(encoding="utf-8").split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise RuntimeError(f"torchrun has no rank {rank}")


def recorder(rounds: int) -> dict[str, float]:
    """What recording 30 checkpoints costs the training of the sample CNN, in 2,000 steps of 64.

    Both are timed in the same loop: the step of the training, and that of the recorder.
    """
    data = load_file(SAMPLES / "digits.safetensors")
    inputs, targets = (data[f"train_{kind}"].to(DEVICE) for kind in ("inputs", "targets"))
    shares: dict[str, list[float]] = {"between_saves": [], "with_saves": []}
    training: list[float] = []
    for number in range(rounds + 1):
        model = CNN("16-32", channels=1, classes=10, batchnorm=True).to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        steps: list[tuple[float, float, bool]] = []
        with tempfile.TemporaryDirectory() as name, Recorder(model, name, steps=2000) as kept:
            for k in range(0, 2000 * 64, 64):
                rows = torch.arange(k, k + 64, device=DEVICE) % len(inputs)
                saved = kept._saved
                begun = time.perf_counter()
                loss = torch.nn.functional.cross_entropy(model(inputs[rows]), targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                trained = time.perf_counter()
                kept.step(loss)
                recorded = time.perf_counter()
                steps.append((trained - begun, recorded - trained, kept._saved == saved))
        if number:  # the first round warms up
            of_training = sum(step for step, _, _ in steps) / len(steps)
            between = [record for _, record, is_between in steps if is_between]
            training.append(of_training)
            shares["between_saves"].append(sum(between) / len(between) / of_training)
            shares["with_saves"].append(sum(r for _, r, _ in steps) / len(steps) / of_training)
    result = {"training_step_seconds": statistics.median(training)}
    result |= {name: statistics.median(values) for name, values in shares.items()}
    print(f"  {result}", flush=True)
    return result


def mlp(rounds: int) -> dict[str, Any]:
    """A small network on 10,000 examples at 51 points, beside all contenders."""
    them = [
        contenders.losscli, contenders.losscli_bfloat16, contenders.by_hand,
        contenders.sharing_by_hand, contenders.loss_landscape_3d, contenders.loss_landscapes,
    ]  # fmt: skip
    work = line(lambda: MLP("784-512-512-10"), (10_000, 784), 51)
    return compare(work, them, rounds, products(work))


def resnet20(rounds: int) -> dict[str, Any]:
    """ResNet-20 at the points of `RESNET20`."""
    work = line(ResNet20, (RESNET20["examples"], 3, 32, 32), RESNET20["points"])
    them = [contenders.losscli, contenders.by_hand, contenders.losscli_bfloat16]
    return compare(work, them, max(1, rounds // 3), products(work))


def plane(rounds: int) -> dict[str, Any]:
    """A plane through the small network."""
    return surface(surfaces.plane(DEVICE), rounds)


def ribbon(rounds: int) -> dict[str, Any]:
    """A ribbon along a path of the small network."""
    return surface(surfaces.ribbon(DEVICE), rounds)


def surface(work: surfaces.Surface, rounds: int) -> dict[str, Any]:
    """The points of a surface, beside the only other tool that finds the same numbers."""
    them = [surfaces.losscli, surfaces.by_hand, surfaces.loss_landscape_3d]
    return compare(work, them, rounds, products(work))


def hessian(rounds: int) -> dict[str, Any]:
    """The smallest and the largest eigenvalue of the Hessian of a small network."""
    return spectrum.measure(rounds, DEVICE)


def main() -> None:
    """Measures what the arguments ask for."""
    print(f"{DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    path = RESULTS / f"{DEVICE.type}.json"
    found: dict[str, Any] = {
        "machine": {
            "device": str(DEVICE),
            "name": torch.cuda.get_device_name() if DEVICE.type == "cuda" else _processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "rounds": ARGUMENTS.rounds,
        }
    }
    if ARGUMENTS.only:
        before = json.loads(path.read_text(encoding="utf-8"))
        of = "name", "torch"
        if any(before["machine"][key] != found["machine"][key] for key in of):
            raise SystemExit(f"{path} was measured elsewhere: measure all of it")
        found = before
    for name in [ARGUMENTS.only] if ARGUMENTS.only else MEASURES:
        print(name)
        found[name] = MEASURES[name](ARGUMENTS.rounds)
    found["resnet20_work"] = RESNET20
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    draw(found, path.with_suffix(".png"))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for text in info.read_text(encoding="utf-8").splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="measures this alone; what else was measured stays")
    ARGUMENTS = parser.parse_args()
    DEVICE = torch.device(ARGUMENTS.device)
    # Minutes a round on two cores: fewer examples and points.
    examples, points = (2_000, 11) if DEVICE.type == "cpu" else (10_000, 51)
    RESNET20 = {"examples": examples, "points": points}
    both = {
        "mlp": mlp, "plane": plane, "ribbon": ribbon, "resnet20": resnet20, "hessian": hessian,
    }  # fmt: skip
    on_cpu = {
        "growth": growth, "command": command, "memory": memory, "processes": processes,
        "recorder": recorder,
    }  # fmt: skip
    MEASURES: dict[str, Callable[[int], dict[str, Any]]] = (
        {**both, "gpt2": language} if DEVICE.type == "cuda" else {**both, **on_cpu}
    )
    if ARGUMENTS.only and ARGUMENTS.only not in MEASURES:
        parser.error(f"--only takes one of {', '.join(MEASURES)}")
    main()
