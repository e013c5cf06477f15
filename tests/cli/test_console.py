"""The talk of a long run: what a terminal shows, what a log file gets, and that neither lies."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from losscli.cli import run
from losscli.cli.console import Console
from losscli.models import MLP
from tests.cases import sample
from tests.conftest import Losscli

IMAGES = "-m cnn:4,channels=1,classes=3,batchnorm=true -d npz:images.npz --buffers recalibrate"
COMMANDS = {
    "interpolate": ("interpolate a.pt b.pt --points 12", 14, "points"),
    "derivatives": (
        "interpolate a.pt b.pt --points 12 --derivatives --split test",
        14 + 14,
        "points",
    ),
    "refine": ("interpolate a.pt b.pt --points 5 --refine 0.01", None, "points"),
    "layerwise": ("interpolate a.pt b.pt --points 5 --range 0 1 --layerwise", 5 + 2 * 4, "points"),
    "sample": ("interpolate a.pt b.pt --points 5 --range 0 1 --sampling-error 0.01", 5, "points"),
    "trajectory": ("trajectory a.pt b.pt c.pt --residuals 4", 3 * 5, "points"),
    "plane": ("plane a.pt -m mlp:6-5-3 --points 4", 17, "points"),
    "plane-sample": ("plane a.pt --points 4 --sampling-error 0.01", 17, "points"),
    "barriers": ("barriers a.pt b.pt c.pt --points 5", 3 + 3 * 3, "points"),
    "around": ("around a.pt b.pt --directions 3 --points 4", 2 + 2 * 3 * 3, "points"),
    "along": ("around a.pt b.pt --along gradient --points 3", 2 + 2 * 2, "points"),
    "sharpness": (
        "sharpness a.pt b.pt --samples 3 --rho 0.1 --rho 0.2",
        2 + 2 * 3 * 2 + 2 * (2 + 33 + 6) + 2 * 2 * 63,
        "points",
    ),
    "check": ("check a.pt b.pt --split test", 2, "checkpoints"),
    "recalibrate": (f"interpolate init:1 init:2 {IMAGES} --points 5 --range 0 1", 5, "points"),
}


class Terminal(io.StringIO):
    """Keeps what is written to it, as a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    @property
    def frames(self) -> list[str]:
        """The lines of a bar, without colours."""
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue())
        return [line for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.fixture
def several(folder: Path) -> Path:
    torch.manual_seed(7)
    torch.save({"state_dict": MLP("6-5-3").state_dict(), "losscli.model": "mlp:6-5-3"}, "c.pt")
    import numpy as np

    images, labels = torch.rand(20, 1, 6, 6).numpy(), (torch.arange(20) % 3).numpy()
    np.savez("images.npz", train_inputs=images, train_targets=labels)
    return folder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that goes on by eleven seconds whenever the console looks at it."""
    now = [0.0]

    def turned() -> float:
        now[0] += 11
        return now[0]

    monkeypatch.setattr("losscli.progress.time.monotonic", turned)
    return now


@pytest.fixture
def stepwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the data go by in several blocks and batches, and a journal grow in several chunks."""
    monkeypatch.setattr("losscli.evaluation.memory.points_that_fit", lambda *_: 2)
    monkeypatch.setattr("losscli.evaluation.sampling._FIRST_BLOCK", 8)


def counts(text: str, unit: str) -> list[tuple[int, int | None]]:
    found = re.findall(rf"(?m)^(\d+)(?:/(\d+))? {unit}", text)
    return [(int(done), int(total) if total else None) for done, total in found]


@pytest.mark.usefixtures("stepwise", "clock")
@pytest.mark.parametrize("name", sample(COMMANDS, 0))
def test_a_log_file_gets_lines_that_count_up_to_the_end(name: str, several: Path) -> None:
    line, total, unit = COMMANDS[name]
    stderr = io.StringIO()
    assert run([*line.split(), "-o", "x", "--no-figure"], Console(io.StringIO(), stderr)) == 0
    lines = [x for x in stderr.getvalue().splitlines() if not x.startswith("note: ")]
    assert lines
    for one in lines:
        assert re.fullmatch(rf"\d+/\d+ {unit}, [\d:]+ left|\d+ {unit}", one), one
    seen = counts(stderr.getvalue(), unit)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    if total is not None:
        assert seen[-1] == (total, total) or "sample" in name
        assert all(of == total for _, of in seen)
    if "sample" in name:
        assert seen[-1][0] <= total  # type: ignore[operator]


@pytest.mark.usefixtures("stepwise", "clock")
def test_progress_counts_refined_points_beyond_the_planned_ones(several: Path) -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    line = "interpolate a.pt b.pt --points 5 --refine 0.1 --derivatives --split test"
    assert run([*line.split(), "--no-figure", "--json"], Console(stdout, stderr)) == 0
    points = json.loads(stdout.getvalue())["refined"]["points"]
    seen = counts(stderr.getvalue(), "points")
    # Each point twice, for its derivatives too; the ends lie within the range.
    assert seen[-1] == (2 * points, None)
    assert (7 * 2, 7 * 2) in seen


@pytest.mark.usefixtures("stepwise", "clock")
@pytest.mark.parametrize(
    ("name", "columns"),
    [*sample([(name, 40) for name in COMMANDS], 1), ("plane", 80), ("plane", 200)],
)
def test_a_terminal_shows_a_line_that_fits(
    name: str, columns: int, several: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    line, total, unit = COMMANDS[name]
    stderr = Terminal()
    assert run([*line.split(), "--no-figure", "-o", "x"], Console(io.StringIO(), stderr)) == 0
    frames = [frame for frame in stderr.frames if f" {unit} " in frame and "note:" not in frame]
    assert frames
    assert all(len(frame.rstrip()) <= min(columns, 100) for frame in frames)
    seen = counts("\n".join(frames), unit)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    last = frames[-1].rstrip()
    if total is not None and "sample" not in name:
        assert last.startswith(f"{total}/{total} {unit} ━")
        assert last.endswith("0:00:00 left")
    assert (f" {unit}/s" in last) == (columns > 40)
    # Nothing of it stays.
    assert stderr.getvalue().rpartition("━")[2].count("\x1b[2K") >= 1


def drawn(
    told: list[float], total: int, monkeypatch: pytest.MonkeyPatch, **environment: str
) -> Terminal:
    for key, value in {"TERM": "xterm", "COLUMNS": "80", **environment}.items():
        monkeypatch.setenv(key, value)
    stderr = Terminal()
    console = Console(io.StringIO(), stderr)
    with console.progress(total, "points") as tell:
        for done in told:
            tell(done)
    return stderr


def test_colour_follows_the_settings_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = re.compile(r"\x1b\[(3[0-9]|9[0-7]|38;)[0-9;]*m")
    assert coloured.search(drawn([1, 2], 4, monkeypatch).getvalue())
    assert not coloured.search(drawn([1, 2], 4, monkeypatch, NO_COLOR="1").getvalue())
    monkeypatch.delenv("NO_COLOR")
    assert drawn([1, 2], 4, monkeypatch, TERM="dumb").getvalue() == ""


STEERING = "\x1b]0;title\x07\u202e"


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", ["trajectory", "plane --pca", "barriers"])
def test_a_table_on_a_terminal_has_its_names_escaped_and_in_a_pipe_as_they_are(
    name: str, terminal: bool, several: Path
) -> None:
    names = [f"{letter}{STEERING}.pt" for letter in "abc"]
    for new, old in zip(names, "abc", strict=True):
        (several / f"{old}.pt").rename(several / new)
    stdout = Terminal() if terminal else io.StringIO()
    command = [*name.split(), *names, "-o", "-", "-q", "--points", "4"]
    command = command if name != "trajectory" else [*command[:-2], "--no-surface"]
    assert run(command, Console(stdout, stderr := io.StringIO())) == 0, stderr.getvalue()
    text = stdout.getvalue()
    if terminal:
        assert text.replace("\n", "").isprintable()
        assert r"a\x1b]0;title\x07\u202e.pt" in text or name == "plane --pca"
        assert len(text.splitlines()) > 3
    else:
        assert f"a{STEERING}.pt" in text or name == "plane --pca"
        assert "\r\n" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_written_file_is_named_without_controlling_the_terminal(
    terminal: bool, several: Path
) -> None:
    stdout = Terminal() if terminal else io.StringIO()
    out = f"x{STEERING}.safetensors"
    assert run(["export", "a.pt", "b.pt", "--alpha", "0.5", "-o", out], Console(stdout)) == 0
    assert (several / out).exists()
    assert stdout.getvalue() == (r"x\x1b]0;title\x07\u202e.safetensors" if terminal else out) + "\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_is_quiet(terminal: bool, several: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stderr = Terminal() if terminal else io.StringIO()
    assert (
        run(["plane", "a.pt", "--points", "3", "-q", "--no-figure"], Console(io.StringIO(), stderr))
        == 0
    )
    assert stderr.getvalue() == ""


def lines(
    events: list[tuple[float, float, float]], total: int, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """What a log file gets of events: the time, what is done, and what was known before."""
    now, skipped = [0.0], [0.0]
    monkeypatch.setattr("losscli.progress.time.monotonic", lambda: now[0])
    stderr = io.StringIO()
    with Console(io.StringIO(), stderr).progress(total, "points", lambda: skipped[0]) as tell:
        for now[0], done, known in events:
            skipped[0] += known
            tell(done)
    return stderr.getvalue().splitlines()


def test_lines_come_every_ten_seconds_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [(i / 4, i / 4, 0.0) for i in range(101)]
    assert lines(events, 100, monkeypatch) == [
        "10/100 points, 0:01:30 left",
        "20/100 points, 0:01:20 left",
    ]


def test_points_recalled_in_between_do_not_count_in_the_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two points a second; between them 50 come from a journal, and at the end shares of them do.
    events = [(10.0, 20.0, 0.0), (10.0, 70.0, 50.0), (20.0, 90.0, 0.0), (20.0, 92.0, 10.0)]
    assert lines([*events, (21.0, 94.0, 0.0), (30.0, 96.0, 0.0)], 100, monkeypatch) == [
        "20/100 points, 0:00:40 left",
        "90/100 points, 0:00:05 left",
        "96/100 points, 0:00:03 left",
    ]


def test_time_before_any_work_does_not_count_in_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    # A minute for what does not count, such as eigenvectors; then one point a second.
    events = [(0.0, 0.0, 0.0), (60.0, 0.0, 0.0), (70.0, 10.0, 0.0), (80.0, 20.0, 0.0)]
    assert lines(events, 100, monkeypatch) == [
        "10/100 points, 0:01:30 left",
        "20/100 points, 0:01:20 left",
    ]


def test_repeated_work_does_not_count_as_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, a chunk begins anew."""
    events = [(10.0, 10.0, 0.0), (20.0, 0.0, 0.0), (30.0, 5.0, 0.0), (40.0, 20.0, 0.0)]
    assert lines(events, 40, monkeypatch) == [
        "10/40 points, 0:00:30 left",
        "10/40 points, 0:01:00 left",
        "10/40 points, 0:01:30 left",
        "20/40 points, 0:00:40 left",
    ]


def test_rounding_gives_no_rate_and_does_not_hide_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    almost = sum([0.1] * 10)
    assert almost < 1
    assert lines([(10.0, 50.0, 50.0), (20.0, 50 + 1e-9, 0.0)], 60, monkeypatch) == []
    assert lines([(10.0, almost, 0.0)], 1, monkeypatch) == ["1/1 points, 0:00:00 left"]


def test_more_than_was_planned_has_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines([(10.0, 13.0, 0.0)], 12, monkeypatch) == ["13 points"]


JSON = {
    **{name: f"{line} --no-figure --force" for name, (line, _, _) in COMMANDS.items()},
    "align": "align a.pt b.pt -m mlp:6-5-3 -o aligned.safetensors --force",
    "init": "init b.pt --data npz:data.npz --force",
    "inspect": "inspect a.pt",
    "inspect-two": "inspect a.pt b.pt",
}


@pytest.fixture
def infinite(several: Path) -> None:
    """b has weights whose losses are not finite anywhere near."""
    weights = {name: tensor * 1e25 for name, tensor in MLP("6-5-3").state_dict().items()}
    torch.save({"state_dict": weights, "losscli.model": "mlp:6-5-3"}, "b.pt")


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.usefixtures("infinite")
@pytest.mark.parametrize("name", sample(JSON, 2, 4))
def test_json_is_one_line_that_any_parser_reads(name: str, losscli: Losscli) -> None:
    runs = [JSON[name]]
    if name in COMMANDS:
        runs.append(f"{JSON[name]} --dry-run")
    together = ""
    for line in runs:
        done = losscli(*line.split(), "--json")
        if "derivatives" in name and done.status == 1:
            assert done.stdout == ""
            continue
        assert done.status == 0, done.stderr
        assert done.stdout.endswith("}\n")
        assert done.stdout.count("\n") == 1
        assert isinstance(strict(done.stdout), dict)
        together += done.stdout
    # What many runs write is a file of JSON lines.
    assert all(isinstance(strict(line), dict) for line in together.splitlines())


def test_json_is_utf_8_for_any_name_of_a_checkpoint(several: Path, losscli: Losscli) -> None:
    odd = "süß\u2028\x85\u202e.pt"
    Path("c.pt").replace(odd)
    read, write = os.pipe()
    with os.fdopen(write, "w", encoding="utf-8") as stdout:
        assert (
            run(
                ["plane", odd, "--points", "3", "-q", "--json", "-o", "x", "--no-figure"],
                Console(stdout, io.StringIO()),
            )
            == 0
        )
    with os.fdopen(read, "rb") as file:
        content = file.read()
    text = content.decode("utf-8")
    assert "süß" in text
    # Nothing in it that a reader of lines may take for the end of one.
    assert len(text.splitlines()) == 1
    assert strict(text)["checkpoints"][0]["name"] == odd
