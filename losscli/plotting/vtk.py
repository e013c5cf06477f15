"""Surfaces and paths as VTK PolyData in XML (.vtp), for ParaView and PyVista.

The format is described in https://docs.vtk.org/en/latest/vtk_file_formats/vtkxml_file_format.html.
Text keeps every digit of a float. VTK reads nan and inf, but takes -inf for inf: it is written as
nan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from losscli.plotting.style import plain
from losscli.plotting.surface import Grid
from losscli.registry import MESH, PATH_MESH
from losscli.results.drawing import Drawing

__all__ = ["PathPoints", "write_mesh"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PathPoints:
    """The checkpoints of a path, in their order.

    Attributes:
        x: Their first coordinate, [n].
        y: Their second coordinate, [n].
        values: For each column, such as ``loss``, its values [n] by split.
        others: Further arrays [n] that do not depend on the split.
        joined: Whether a line joins them.
    """

    x: Floats
    y: Floats
    values: Mapping[str, Mapping[str, Floats]]
    others: Mapping[str, NDArray[Any]]
    joined: bool = True


def write_mesh(
    columns: Mapping[str, Sequence[Grid]], paths: Sequence[PathPoints], drawing: Drawing
) -> dict[str, str]:
    """Writes a surface, and paths at the height of their own losses.

    Args:
        columns: For each column, such as ``loss``, a grid per split.
        paths: The paths; all have the same splits and arrays.
        drawing: Whether the height is logarithmic.

    Returns:
        The content of x.vtp and of x.path.vtp, by the end of the name.
    """
    return {
        MESH: _surface(columns, log=drawing.log),
        PATH_MESH: _paths(paths, log=drawing.log),
    }


def _surface(columns: Mapping[str, Sequence[Grid]], *, log: bool) -> str:
    """Returns x.vtp: at the height of the loss of the first split, or of its logarithm.

    A cell with a corner without a height is left out.

    Returns:
        XML, with point arrays COLUMN_SPLIT and log_loss_SPLIT (to base 10).
    """
    if not columns["loss"]:
        return _poly_data(np.empty((0, 3)), {}, {})
    first = columns["loss"][0]
    height = _height(first.loss, log=log)
    index = np.arange(height.size).reshape(height.shape)
    corners = np.stack([index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]], axis=-1)
    cells = corners.reshape(-1, 4)
    cells = cells[np.isfinite(height.ravel()[cells]).all(axis=1)]
    values = {
        column: {grid.split: grid.loss.ravel() for grid in grids}
        for column, grids in columns.items()
    }
    points = np.column_stack([first.x.ravel(), first.y.ravel(), _filled(height.ravel())])
    return _poly_data(points, _arrays(values), {"Polys": cells.tolist()})


def _paths(paths: Sequence[PathPoints], *, log: bool) -> str:
    """Returns x.path.vtp: checkpoints at the height of their own losses, a line for each path."""
    paths = [path for path in paths if path.x.size]
    if not paths:
        return _poly_data(np.empty((0, 3)), {}, {})
    height = np.concatenate([
        _height(next(iter(path.values["loss"].values())), log=log) for path in paths
    ])
    x, y = (np.concatenate([getattr(path, name) for path in paths]) for name in "xy")
    arrays = [{**path.others, **_arrays(path.values)} for path in paths]
    joined = {name: np.concatenate([some[name] for some in arrays]) for name in arrays[0]}
    cells: dict[str, list[list[int]]] = {"Verts": [], "Lines": []}
    begin = 0
    for path in paths:
        indices = list(range(begin, begin + path.x.size))
        begin += path.x.size
        if path.joined and len(indices) > 1:
            cells["Lines"].append(indices)
        else:
            cells["Verts"] += [[index] for index in indices]
    return _poly_data(np.column_stack([x, y, _filled(height)]), joined, cells)


def _height(loss: Floats, *, log: bool) -> Floats:
    """Returns the loss or its logarithm; nan where there is none."""
    height = _logarithm(loss) if log else loss
    return np.where(np.isfinite(height), height, np.nan)


def _filled(height: Floats) -> Floats:
    """Replaces nan by the lowest height: a point needs a place, even without a cell."""
    lowest = float(np.nanmin(height, initial=np.inf))
    return np.where(np.isnan(height), lowest if np.isfinite(lowest) else 0.0, height)


def _logarithm(loss: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log10(loss))


def _arrays(values: Mapping[str, Mapping[str, Floats]]) -> dict[str, NDArray[Any]]:
    """Names the values of each column and split, and adds the logarithm of the loss."""
    logarithms = {split: _logarithm(loss) for split, loss in values["loss"].items()}
    return {
        f"{plain(column)}_{plain(split)}": found
        for column, splits in {**values, "log_loss": logarithms}.items()
        for split, found in splits.items()
    }


def _poly_data(
    points: Floats, arrays: Mapping[str, NDArray[Any]], cells: Mapping[str, Sequence[Sequence[int]]]
) -> str:
    """Writes points with arrays, and cells as lists of points, by their kinds."""
    counts = "".join(f' NumberOf{kind}="{len(found)}"' for kind, found in cells.items())
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        '<VTKFile type="PolyData" version="1.0" byte_order="LittleEndian" header_type="UInt64">',
        "<PolyData>",
        f'<Piece NumberOfPoints="{len(points)}"{counts}>',
        f'<PointData Scalars="{escape(next(iter(arrays), ""))}">',
        *(_data_array(name, values) for name, values in arrays.items()),
        "</PointData>",
        "<Points>",
        _data_array("Points", points),
        "</Points>",
    ]
    for kind, found in cells.items():
        ends = np.cumsum([len(cell) for cell in found], dtype=np.int64)
        corners = np.array([index for cell in found for index in cell], dtype=np.int64)
        lines += [
            f"<{kind}>",
            _data_array("connectivity", corners),
            _data_array("offsets", ends),
            f"</{kind}>",
        ]
    lines += ["</Piece>", "</PolyData>", "</VTKFile>"]
    return "".join(f"{line}\n" for line in lines)


def _data_array(name: str, values: NDArray[Any]) -> str:
    kind = "Int64" if values.dtype.kind == "i" else "Float64"
    values = np.where(np.isneginf(values), np.nan, values) if kind == "Float64" else values
    # repr() of a Python float has as many digits as it takes to read the same float again.
    rows: Iterable[Any] = values.reshape(len(values), -1).tolist() if values.size else ()
    text = "\n".join(" ".join(map(repr, row)) for row in rows)
    size = ' NumberOfComponents="3"' if values.ndim > 1 else ""
    start = f'<DataArray type="{kind}" Name="{escape(name)}"{size} format="ascii">'
    return f"{start}\n{text}\n</DataArray>"
