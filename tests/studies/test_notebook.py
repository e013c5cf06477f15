"""Results in a notebook: one display with figure and summary, a bar, pandas, short reprs."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import losscli as library
from losscli.errors import UsageError
from losscli.plotting.style import render
from losscli.registry import COMMANDS
from losscli.table import Table
from tests.conftest import Losscli

# Runs in the process, a fork, that executes the cells of a notebook.
KERNEL = "from ipykernel.kernelapp import IPKernelApp\nIPKernelApp.launch_instance()\n"

CELLS = [
    """
    import losscli, losscli.progress
    losscli.progress._NOTEBOOK_INTERVAL = 0
    result = losscli.interpolate("a.pt", "b.pt", points=3, progress=True)
    """,
    "result",
    "result.figure()",
    "losscli.plot(result)",
    "result.table.to_pandas()",
    "%matplotlib inline",
    "result.figure()",
    "result",
]


@pytest.mark.usefixtures("unlaid")
def test_a_notebook_shows_each_result_once(
    folder: Path, at_hand: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("nbclient", "ipykernel", "pandas"):
        pytest.importorskip(package)
    import nbformat
    from nbclient import NotebookClient

    shown: list[tuple[str, dict[str, Any]]] = []

    class Client(NotebookClient):
        def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
            if msg["msg_type"] in {"display_data", "update_display_data"}:
                shown.append((msg["msg_type"], msg["content"]["data"]))
            return super().process_message(msg, cell, cell_index)

    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(folder / name))
    Path("kernel.py").write_text(KERNEL)
    kernel = folder / "JUPYTER_DATA_DIR" / "kernels" / "at_hand" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    command = [str(at_hand / "python"), str(folder / "kernel.py"), "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": command, "display_name": "", "language": "python"}))
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_code_cell("\n".join(map(str.strip, cell.strip().splitlines())))
        for cell in CELLS
    ]
    Client(notebook, timeout=120, kernel_name="at_hand").execute(env=dict(os.environ))
    running, result, figure, plot, table, inline, figure_again, result_again = (
        [output.get("data", output.get("text")) for output in cell.outputs]
        for cell in notebook.cells
    )
    # The bar counts up to the end, and leaves nothing.
    bars = [data for _, data in shown if "<progress" in data.get("text/html", "")]
    counts = [int(re.match(r"(\d+)/5 points", data["text/plain"])[1]) for data in bars]
    assert counts[0] == 0
    assert counts[-1] == 5
    assert counts == sorted(counts)
    assert '<progress value="5" max="5"></progress> 5/5 points' in bars[-1]["text/html"]
    assert [kind for kind, _ in shown[:2]] == ["display_data", "update_display_data"]
    assert running == [{"text/plain": "", "text/html": ""}]
    # One output each, with the picture that is written to files.
    expected = library.interpolate("a.pt", "b.pt", points=3)
    png = render(expected.figure(), ".png")
    assert inline == []
    for outputs in (result, result_again):
        (data,) = outputs
        assert base64.b64decode(data["image/png"]) == png
        assert f'src="data:image/png;base64,{base64.b64encode(png).decode()}"' in data["text/html"]
        assert COMMANDS["interpolate"].as_text(expected) in unescape(data["text/html"])
        assert data["text/plain"] == repr(expected)
    for outputs in (figure, plot):
        (data,) = outputs
        assert base64.b64decode(data["image/png"]) == png
    (data,) = figure_again  # as Matplotlib's own backend renders it
    assert imread(io.BytesIO(base64.b64decode(data["image/png"]))).ndim == 3
    assert "<th>loss_stderr</th>" in table[0]["text/html"]


@pytest.mark.usefixtures("unlaid")
def test_a_display_has_the_text_of_the_command_line_with_notes_and_escapes(
    folder: Path, losscli: Losscli
) -> None:
    name = "<script>&amp;.pt"
    Path("a.pt").rename(name)
    result = library.check(name, split="test", limit=5)
    page = result._repr_html_()
    assert "<script>" not in page
    outcome = losscli("check", name, "--split", "test", "--limit", "5", "--no-figure")
    assert outcome.stdout in unescape(page)
    notes = [line for line in outcome.stderr.splitlines() if line.startswith("note: ")]
    shown = [line for line in unescape(page).splitlines() if line.startswith("note: ")]
    assert [line.removesuffix("</pre></div>") for line in shown] == notes[:-1]  # the last: "wrote"
    assert notes[-1].startswith("note: wrote ")
    png, size = result._repr_png_()
    assert png[:4] == b"\x89PNG"
    assert size["width"] == result.figure().get_figwidth() * 96


def test_a_result_without_a_figure_is_shown_as_text(tmp_path: Path) -> None:
    states = {"model": {"w": torch.ones(3)}, "average": {"w": torch.zeros(3)}}
    torch.save(states, tmp_path / "both.pt")
    result = library.inspect(tmp_path / "both.pt")
    assert result._repr_png_() is None
    page = result._repr_html_()
    assert "<img" not in page
    assert "in 2 state dicts" in page


def test_reprs_are_short(folder: Path) -> None:
    line = library.interpolate("a.pt", "b.pt", points=3, layerwise=True)
    assert repr(line) == (
        "<Result of interpolate: <Table of 10 rows: alpha, split, loss, loss_stderr, accuracy>, "
        "blocks: <Table of 20 rows: block, alpha, split, loss, loss_stderr, accuracy>>"
    )
    values = "53 values in 4 tensors>"
    assert repr(library.export("a.pt", "b.pt", 0.5)).endswith(values)
    assert repr(library.align("a.pt", "b.pt")) == (
        f"<Alignment, <Checkpoint 'b.pt aligned with a.pt': {values}>"
    )


@pytest.mark.parametrize(
    ("line", "function"),
    [
        ("export a.pt b.pt --alpha 0.5", lambda: library.export("a.pt", "b.pt", 0.5)),
        ("align a.pt b.pt", lambda: library.align("a.pt", "b.pt").checkpoint),
    ],
    ids=["export", "align"],
)
def test_a_checkpoint_is_saved_as_the_command_line_writes_it(
    line: str, function: Any, folder: Path, losscli: Losscli
) -> None:
    assert losscli(*line.split(), "-o", "cli.safetensors").status == 0
    checkpoint = function()
    checkpoint.save("py.safetensors")
    assert Path("py.safetensors").read_bytes() == Path("cli.safetensors").read_bytes()
    with pytest.raises(library.LosscliError, match=r"py.safetensors exists"):
        checkpoint.save("py.safetensors")
    checkpoint.save("py.safetensors", force=True)
    with pytest.raises(UsageError, match=r"x.csv is not the name of a safetensors file"):
        checkpoint.save("x.csv")


TABLE = Table.build(
    ("checkpoint", "split", "step", "examples", "loss", "loss_stderr"),
    [("a.pt", "train", 0, 5, 0.5, None), ("=b", "", 3, None, math.inf, None)],
)


def test_a_table_is_converted_to_pandas_unchanged() -> None:
    pandas = pytest.importorskip("pandas")
    frame = TABLE.to_pandas()
    assert tuple(frame.columns) == TABLE.columns
    assert frame["checkpoint"].tolist() == ["a.pt", "=b"]
    assert frame["split"].tolist() == ["train", ""]
    assert frame.dtypes["step"] == np.int64
    assert frame["examples"].tolist() == [5, pandas.NA]
    assert frame.dtypes[["loss", "loss_stderr"]].tolist() == [np.float64, np.float64]
    assert frame["loss"].tolist() == [0.5, math.inf]
    assert frame["loss_stderr"].isna().all()
    empty = Table.build(TABLE.columns, ()).to_pandas()
    assert empty.shape == (0, 6)


def test_a_missing_pandas_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError) as caught:
        TABLE.to_pandas()
    assert str(caught.value) == (
        "to_pandas() needs pandas, which is not installed. pip install pandas"
    )
