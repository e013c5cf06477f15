"""Surfaces for ParaView: the numbers of the CSV to the bit, as VTK reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from losscli.errors import UsageError
from losscli.plotting.connect import mesh_connect
from losscli.plotting.plane import mesh_plane
from losscli.plotting.trajectory import mesh_trajectory
from losscli.registry import COMMANDS
from losscli.results.drawing import Drawing
from losscli.results.result import Run
from losscli.table import Table
from tests.plotting import test_connect, test_plane, test_trajectory

NAN, INF = math.nan, math.inf
SPLITS = ("train", "test")
KINDS = {"Float64": float, "Int64": int}


def read(text: str) -> tuple[np.ndarray, dict[str, list[float]], dict[str, list[list[int]]]]:
    """The points, the point arrays and the cells of a file."""
    root = ET.fromstring(text)
    assert (root.tag, root.attrib["type"]) == ("VTKFile", "PolyData")
    (piece,) = root.iter("Piece")

    def values(array: Any) -> list[Any]:
        assert array.attrib["format"] == "ascii"
        return list(map(KINDS[array.attrib["type"]], (array.text or "").split()))

    number = int(piece.attrib["NumberOfPoints"])
    (points,) = piece.find("Points") or ()
    arrays = {a.attrib["Name"]: values(a) for a in piece.find("PointData") or ()}
    assert all(len(found) == number for found in arrays.values())
    cells = {}
    for kind in ("Verts", "Lines", "Polys"):
        found = piece.find(kind)
        if found is None:
            continue
        corners, ends = map(values, found)
        assert len(ends) == int(piece.attrib[f"NumberOf{kind}"])
        cells[kind] = [corners[i:j] for i, j in zip([0, *ends], ends, strict=False)]
    return np.array(values(points)).reshape(number, 3), arrays, cells


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def check_rows(
    table: Table, axes: tuple[str, str], points: np.ndarray, arrays: Mapping[str, list[float]]
) -> None:
    """Every number of the table is in the file, and the logarithm of each loss."""
    at = {(x, y): k for k, (x, y) in enumerate(points[:, :2].tolist())}
    columns = ["loss", "loss_stderr", *table.metrics]
    columns = [c for c in columns if c in table.columns]
    splits = table.unique("split")
    assert len(at) * len(splits) == len(table.rows)
    for row in table.records():
        k = at[row[axes[0]], row[axes[1]]]
        for column in columns:
            value = NAN if row[column] == -INF else row[column]
            assert same(arrays[f"{column}_{row['split']}"][k], value)
        loss = row["loss"]
        logarithm = math.log10(loss) if loss > 0 else NAN
        assert arrays[f"log_loss_{row['split']}"][k] == pytest.approx(
            logarithm, rel=1e-15, nan_ok=True
        )


def odd(x: float, y: float) -> float:
    return {(-3, -3): NAN, (13, 11): INF, (1, 11): 0.0, (-3, 11): -INF, (1, -3): 1e-300}.get(
        (x, y), 1 / 3 + x * x
    )


def test_a_plane_is_a_surface_with_its_checkpoints() -> None:
    run = test_plane.with_paths(test_plane.run(splits=SPLITS), test_plane.STRAIGHT)
    mesh = mesh_plane(run)
    points, arrays, cells = read(mesh[".vtp"])
    assert next(iter(arrays)) == "loss_train"
    check_rows(run.table, ("x", "y"), points, arrays)
    assert points[:, 2].tolist() == arrays["loss_train"]
    # Each cell is a rectangle of the grid, once around; together they cover it.
    corners = points[np.array(cells["Polys"]), :2]
    x, y = corners[..., 0], corners[..., 1]
    areas = 0.5 * (x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(axis=1)
    assert len(areas) == 16 * 12
    assert areas == pytest.approx(np.full(len(areas), 16 * 14 / len(areas)))
    points, arrays, cells = read(mesh[".path.vtp"])
    path = run.more["path"].where("split", "train")
    assert points[:, 0].tolist() == path["x"]
    assert points[:, 1].tolist() == path["y"]
    assert arrays["off_plane"] == path["off_plane"]
    assert arrays["step"] == path["step"]
    assert arrays["loss_train"] == path["loss"] == points[:, 2].tolist()
    assert cells == {"Verts": [[0], [1], [2]], "Lines": [list(range(3, 12))]}


def test_a_trajectory_is_a_ribbon_with_its_path() -> None:
    run = test_trajectory.run(splits=SPLITS)
    mesh = mesh_trajectory([run])
    points, arrays, cells = read(mesh[".vtp"])
    check_rows(run.more["surface"], ("projection", "residual"), points, arrays)
    assert len(cells["Polys"]) == 20 * 10
    points, arrays, cells = read(mesh[".path.vtp"])
    check_rows(run.table, ("projection", "residual"), points, arrays)
    assert arrays["step"] == list(range(21))
    assert cells == {"Verts": [], "Lines": [list(range(21))]}


def test_a_trained_path_lies_on_its_plane() -> None:
    run = test_connect.run(SPLITS)
    mesh = mesh_connect([run])
    points, arrays, cells = read(mesh[".vtp"])
    check_rows(run.more["plane"], ("x", "y"), points, arrays)
    assert len(cells["Polys"]) == 5 * 4
    points, arrays, cells = read(mesh[".path.vtp"])
    assert points[:, :2].tolist() == run.summary["plane"]["curve"]
    curve = run.table.where("path", "curve")
    for split in SPLITS:
        own = curve.where("split", split)
        assert arrays["t"] == own["t"]
        for column in ("loss", "loss_stderr"):
            assert arrays[f"{column}_{split}"] == own[column]
    assert points[:, 2].tolist() == arrays["loss_train"]
    assert cells == {"Verts": [], "Lines": [list(range(7))]}


@pytest.mark.parametrize("log", [False, True])
def test_odd_losses_are_kept_and_have_no_cell(log: bool) -> None:
    run = test_plane.run(loss=odd, size=(5, 3), box=(-3, 13, -3, 11))
    points, arrays, cells = read(mesh_plane(run, Drawing(log=log))[".vtp"])
    check_rows(run.table, ("x", "y"), points, arrays)
    height = np.array(arrays["log_loss_train" if log else "loss_train"])
    finite = np.isfinite(height)
    assert points[finite, 2].tolist() == height[finite].tolist()
    assert np.isfinite(points).all()
    assert finite[np.array(cells["Polys"])].all()
    assert len(cells["Polys"]) == (8 - 4 if log else 8 - 3)


def test_names_are_text() -> None:
    hostile = "<b>\"x\"</b> & 'y' ]]> \u202e\x1b[2J"
    run = test_plane.run(splits=(hostile,), size=(3, 3))
    mesh = mesh_plane(run)
    for content in mesh.values():
        _, arrays, _ = read(content)
        assert "loss_<b>\"x\"</b> & 'y' ]]> [2J" in arrays


def test_a_run_without_a_surface_is_refused() -> None:
    for runs, message in (
        ([test_trajectory.run(surface=False)], "a .vtp holds a surface, and this trajectory has"),
        ([test_trajectory.run()] * 2, "a .vtp file has the surface of one trajectory"),
    ):
        with pytest.raises(UsageError, match=message):
            mesh_trajectory(runs)
    path = test_connect.run()
    for paths, message in (
        ([replace(path, more={})], "this connect has none. Give one bend, without --no-plane"),
        ([path] * 2, "a .vtp file has the surface of one run of connect"),
    ):
        with pytest.raises(UsageError, match=message):
            mesh_connect(paths)
    for name, command in COMMANDS.items():
        if not command.mesh:
            with pytest.raises(UsageError, match=f"a .vtp holds a surface, and {name} has none"):
                command.write_mesh([None], Drawing())


def test_empty_tables_are_empty_files() -> None:
    run: Run[Any] = Run(test_plane.run().table, {})
    assert read(mesh_plane(run)[".path.vtp"])[0].size == 0


def test_vtk_reads_the_same_numbers(tmp_path: Path) -> None:
    vtk = pytest.importorskip("vtkmodules.vtkIOXML", reason="needs vtk, as PyVista does")
    run = test_plane.run(loss=odd, size=(5, 3), splits=SPLITS)
    for suffix, content in mesh_plane(run).items():
        (tmp_path / f"x{suffix}").write_text(content)
        points, arrays, cells = read(content)
        reader = vtk.vtkXMLPolyDataReader()
        reader.SetFileName(str(tmp_path / f"x{suffix}"))
        reader.Update()
        found = reader.GetOutput()
        assert [found.GetPoint(k) for k in range(len(points))] == list(map(tuple, points.tolist()))
        for kind, expected in cells.items():
            assert getattr(found, f"GetNumberOf{kind}")() == len(expected)
        for name, values in arrays.items():
            array = found.GetPointData().GetArray(name)
            stored = [array.GetValue(k) for k in range(array.GetNumberOfTuples())]
            assert np.array_equal(stored, values, equal_nan=True)
