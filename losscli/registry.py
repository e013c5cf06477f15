"""The registry of commands: the tables, the text report and the figure of each.

A new command is a module in `studies`, one in `cli`, one in `plotting`, and an entry here.
Functions and types are named as ``module:name`` and imported when they are used: this module
imports nothing but exceptions, so that everything that needs its facts can import it.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from losscli.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from losscli.results.drawing import Drawing

__all__ = [
    "ANIMATIONS",
    "COLUMN_TYPES",
    "COMMANDS",
    "MESH",
    "PATH_MESH",
    "PICTURES",
    "RESERVED_COLUMNS",
    "Command",
    "Panels",
    "TableFormat",
    "command_of",
    "further_table_names",
    "further_table_of",
    "load",
    "pair_position",
]

COLUMN_TYPES: Mapping[str, Literal["integer", "path", "text"]] = {
    **dict.fromkeys(("a", "b", "checkpoint"), "path"),
    **dict.fromkeys(
        ("block", "direction", "dtype", "key", "path", "shape", "split", "tensor", "verdict"),
        "text",
    ),
    **dict.fromkeys(("bytes", "examples", "kept", "step", "tensors", "values", "walk"), "integer"),
}
"""The types of columns, in any table, that do not hold floats."""

PICTURES = (".png", ".svg", ".pdf", ".html")
ANIMATIONS = (".gif", ".mp4")
MESH = ".vtp"
PATH_MESH = ".path.vtp"
"""The suffix of the file with the path on the surface of a file with the suffix `MESH`."""

Panels = Literal["metrics", "splits", "tensors"]
"""What a figure has a panel for: each metric, each split, or all tensors in one."""


@dataclass(frozen=True)
class TableFormat:
    """The columns of a table, and what they must hold for the table to be drawn.

    Attributes:
        columns: The columns that it must have.
        optional: The columns that it may also have.
        metrics: Whether it also has a column for each metric, named after it.
        errors: The columns of standard errors and error bounds, which are not negative.
        position: The column with the position on a line; every row has one. Empty for none.
        grid: The two columns that span a grid; the rows must fill most of it.
        pairs: Whether the grid is symmetric: a point for each pair of names in either column.
        shared: The columns of a further table with values that also occur in the main table.
        identified_by: The columns that distinguish a further table from a main table with the same
            columns.
        panels: What the figure has a panel for if this further table is drawn; None for the same
            as without it.
        drawn: Whether a figure shows it.
        refused_alone: Why a further table cannot be drawn on its own, and how to draw it.
    """

    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    metrics: bool = False
    errors: tuple[str, ...] = ()
    position: str = ""
    grid: tuple[str, ...] = ()
    pairs: bool = False
    shared: tuple[str, ...] = ()
    identified_by: tuple[str, ...] = ()
    panels: Panels | None = None
    drawn: bool = True
    refused_alone: tuple[str, str] | None = None


@dataclass(frozen=True)
class Command:
    """A command that makes a result.

    Attributes:
        name: Its name.
        function: The function of the Python API.
        cli: The function of the command line; empty if it is not one of the studies that
            `losscli.cli.app` adds first.
        report: The function that formats a `Result` as text.
        drawing: The function that draws runs: a sequence of them, or one where several cannot be
            overlaid.
        views: The function that returns the views of an interactive page, with the arguments of
            ``drawing``; empty for curves of the columns of the table.
        animation: The function that animates runs, with the arguments of ``drawing``; empty for
            none.
        mesh: The function that writes runs as a surface, with the arguments of ``drawing``; empty
            for none.
        path_cure: What to do if a run has no path to animate.
        surface_cure: What to do if a run has no surface.
        summary: The type of the summary, STEM.json, see `losscli.results.summaries`.
        table: The main table, STEM.csv.
        further_tables: The tables that are written beside it, by NAME of STEM.NAME.csv.
        panels: What the figure has a panel for.
        distributed: Whether several processes share its work.
        not_overlaid: Why several runs cannot be drawn together, and what to do instead; None if
            they can.
    """

    name: str
    function: str
    cli: str
    report: str
    drawing: str
    summary: str
    table: TableFormat
    further_tables: Mapping[str, TableFormat] = field(default_factory=dict)
    panels: Panels = "splits"
    views: str = ""
    animation: str = ""
    mesh: str = ""
    path_cure: str = ""
    surface_cure: str = ""
    distributed: bool = True
    not_overlaid: tuple[str, str] | None = None

    def panels_with(self, tables: Collection[str]) -> Panels:
        """Returns what the figure has a panel for.

        Args:
            tables: The names of the further tables of the run.
        """
        formats = (self.further_tables[name] for name in tables if name in self.further_tables)
        return next((table.panels for table in formats if table.panels), self.panels)

    def draw(self, runs: Sequence[Any], drawing: Drawing) -> Figure:
        """Draws one run or several.

        Args:
            runs: Each a `losscli.results.result.Run`.
            drawing: How.

        Returns:
            The figure, laid out and ready to be rendered.

        Raises:
            UsageError: The runs cannot be drawn together, or the run has no figure.
        """
        figure: Figure = load(self.drawing)(self._overlaid(runs), drawing)
        load("losscli.plotting.style:make_displayable")(figure, drawing)
        return figure

    def page_views(self, runs: Sequence[Any], drawing: Drawing) -> Sequence[Any]:
        """Returns the views of one run or several on an interactive page.

        Args:
            runs: Each a `losscli.results.result.Run`.
            drawing: How. A page has no size of its own.

        Returns:
            Each a `losscli.plotting.html.View`.

        Raises:
            UsageError: The runs cannot be drawn together, or the run has no figure.
        """
        what, full = self._overlaid(runs), replace(drawing, size="full")
        views: Sequence[Any] = (
            load(self.views)(what, full)
            if self.views
            else load("losscli.plotting.html:table_views")(runs, full)
        )
        return views

    def check_format(self, suffix: str, *, has_path: bool = True, has_surface: bool = True) -> None:
        """Checks that a run has a figure in a format.

        Args:
            suffix: The format, ``.gif`` for example.
            has_path: Whether the run has a path, if runs of the command may have one.
            has_surface: Whether the run has a surface, if runs of the command may have one.

        Raises:
            UsageError: It has none, or the format needs a package that is not installed.
        """
        needs = [
            (ANIMATIONS, "shows a path", self.animation, has_path, self.path_cure),
            ((MESH,), "holds a surface", self.mesh, has_surface, self.surface_cure),
        ]
        for suffixes, does, function, has, cure in needs:
            if suffix in suffixes and not (function and has):
                which = f"this {self.name}" if function else self.name
                raise UsageError(
                    f"a {suffix} {does}, and {which} has none",
                    cure if function else f"Choose one of {', '.join(PICTURES)}",
                )
        if suffix == ".mp4" and find_spec("imageio_ffmpeg") is None:
            raise UsageError(
                "a .mp4 needs imageio-ffmpeg, which is not installed",
                "pip install 'losscli[video]', or write a .gif",
            )

    def animate(self, runs: Sequence[Any], drawing: Drawing, suffix: str) -> bytes:
        """Animates the paths of one run or several.

        Args:
            runs: Each a `losscli.results.result.Run`.
            drawing: How.
            suffix: The format, ``.gif`` or ``.mp4``.

        Returns:
            The content of a file.

        Raises:
            UsageError: The runs cannot be drawn together, or they have no path.
        """
        self.check_format(suffix)
        animation = load(self.animation)(self._overlaid(runs), drawing)
        content: bytes = animation.render(suffix)
        return content

    def write_mesh(self, runs: Sequence[Any], drawing: Drawing) -> dict[str, str]:
        """Writes a surface and the path on it for programs such as ParaView.

        Args:
            runs: Each a `losscli.results.result.Run`.
            drawing: Whether the height is logarithmic.

        Returns:
            The content of each file, by the end of its name: ``.vtp`` and ``.path.vtp``.

        Raises:
            UsageError: There are several runs, or the run has no surface.
        """
        self.check_format(MESH)
        mesh: dict[str, str] = load(self.mesh)(self._overlaid(runs), drawing)
        return mesh

    def _overlaid(self, runs: Sequence[Any]) -> Any:
        """Returns what is drawn together: the runs, or the only one."""
        if not self.not_overlaid:
            return runs
        if len(runs) > 1:
            raise UsageError(*self.not_overlaid)
        return runs[0]

    def as_text(self, result: Any) -> str:
        """Formats a `losscli.results.result.Result` as lines of text."""
        text: str = load(self.report)(result)
        return text


_LOSS = ("split", "loss", "loss_stderr")

COMMANDS: Mapping[str, Command] = {
    command.name: command
    for command in (
        Command(
            name="interpolate",
            function="losscli.studies.interpolation:interpolate",
            cli="losscli.cli.interpolate:interpolate",
            report="losscli.cli.interpolate:report",
            drawing="losscli.plotting.interpolation:draw_interpolation",
            views="losscli.plotting.interpolation:interpolation_views",
            summary="losscli.results.summaries:LineSummary",
            table=TableFormat(
                ("alpha", *_LOSS),
                optional=("slope", "curvature", "examples", "loss_seed_stderr"),
                metrics=True,
                errors=("loss_stderr",),
                position="alpha",
            ),
            further_tables={
                "context": TableFormat(
                    ("alpha", "split", "loss"),
                    optional=("loss_stderr", "slope", "curvature", "examples", "loss_seed_stderr"),
                    metrics=True,
                    errors=("loss_stderr",),
                    position="alpha",
                ),
                "blocks": TableFormat(
                    ("block", "alpha", *_LOSS),
                    optional=("examples", "loss_seed_stderr"),
                    metrics=True,
                    errors=("loss_stderr",),
                    position="alpha",
                    shared=("alpha", "split"),
                    identified_by=("block",),
                    panels="splits",
                    refused_alone=(
                        "has only the blocks of a line",
                        "Give the CSV of the line, with which they are drawn",
                    ),
                ),
            },
            panels="metrics",
        ),
        Command(
            name="trajectory",
            function="losscli.studies.trajectory:trajectory",
            cli="losscli.cli.trajectory:trajectory",
            report="losscli.cli.trajectory:report",
            drawing="losscli.plotting.trajectory:draw_trajectory",
            views="losscli.plotting.trajectory:trajectory_views",
            animation="losscli.plotting.trajectory:animate_trajectory",
            mesh="losscli.plotting.trajectory:mesh_trajectory",
            path_cure="Give checkpoints of finite weights",
            surface_cure="Give a path that leaves the straight line, without --no-surface",
            summary="losscli.results.summaries:TrajectorySummary",
            table=TableFormat(
                (
                    *("step", "checkpoint", "projection", "residual", "distance"),
                    *("turn_degrees", *_LOSS),
                ),
                optional=("examples", "loss_seed_stderr"),
                metrics=True,
                errors=("loss_stderr",),
            ),
            further_tables={
                "surface": TableFormat(
                    ("step", "projection", "residual", "split", "loss"),
                    optional=("loss_stderr",),
                    errors=("loss_stderr",),
                    grid=("step", "residual"),
                    shared=("step", "projection"),
                ),
                "walk": TableFormat(
                    ("walk", "step", "projection", "residual"),
                    optional=("distance", "turn_degrees"),
                ),
            },
        ),
        Command(
            name="plane",
            function="losscli.studies.plane:plane",
            cli="losscli.cli.plane:plane",
            report="losscli.cli.plane:report",
            drawing="losscli.plotting.plane:draw_plane",
            views="losscli.plotting.plane:plane_views",
            animation="losscli.plotting.plane:animate_plane",
            mesh="losscli.plotting.plane:mesh_plane",
            path_cure="Give --pca or --path",
            summary="losscli.results.summaries:PlaneSummary",
            table=TableFormat(
                ("x", "y", *_LOSS),
                optional=("examples", "loss_seed_stderr"),
                metrics=True,
                errors=("loss_stderr",),
                grid=("x", "y"),
            ),
            further_tables={
                "path": TableFormat(
                    ("step", "checkpoint", "x", "y", "off_plane", "split", "loss"),
                    optional=("path",),
                ),
            },
            not_overlaid=("planes cannot be overlaid", "Give one CSV of a plane"),
        ),
        Command(
            name="around",
            function="losscli.studies.around:around",
            cli="losscli.cli.around:around",
            report="losscli.cli.around:report",
            drawing="losscli.plotting.around:draw_around",
            views="losscli.plotting.around:around_views",
            summary="losscli.results.summaries:AroundSummary",
            table=TableFormat(
                ("checkpoint", "direction", "coefficient", "distance", *_LOSS),
                optional=("examples", "loss_seed_stderr"),
                metrics=True,
                errors=("loss_stderr",),
                position="coefficient",
            ),
        ),
        Command(
            name="check",
            function="losscli.studies.check:check",
            cli="losscli.cli.check:check",
            report="losscli.cli.check:report",
            drawing="losscli.plotting.check:draw_check",
            views="losscli.plotting.check:check_views",
            summary="losscli.results.summaries:CheckSummary",
            table=TableFormat(
                (
                    *("checkpoint", "split", "loss", "gradient_norm"),
                    *("lambda_min", "lambda_min_error", "lambda_max", "lambda_max_error"),
                    *("minimal_ratio", "verdict"),
                ),
                optional=(
                    *("positive", "negative", "undecided", "trace", "trace_stderr"),
                    *("preconditioned_lambda_max", "preconditioned_lambda_max_error"),
                ),
                errors=(
                    *("lambda_min_error", "lambda_max_error", "trace_stderr"),
                    "preconditioned_lambda_max_error",
                ),
            ),
            further_tables={
                "escape": TableFormat(("distance", "loss", "loss_stderr"), errors=("loss_stderr",)),
                "spectrum": TableFormat(
                    ("checkpoint", "split", "eigenvalue", "error"),
                    errors=("error",),
                    shared=("checkpoint", "split"),
                ),
                "density": TableFormat(
                    ("checkpoint", "split", "lambda", "density"), shared=("checkpoint", "split")
                ),
                "curvature": TableFormat(
                    (
                        *("checkpoint", "split", "block", "gradient_norm"),
                        *("lambda_max", "lambda_max_error", "trace", "trace_stderr"),
                    ),
                    errors=("lambda_max_error", "trace_stderr"),
                    shared=("checkpoint", "split"),
                ),
            },
            not_overlaid=("checks cannot be overlaid", "Give one CSV of a check"),
        ),
        Command(
            name="sharpness",
            function="losscli.studies.sharpness:sharpness",
            cli="losscli.cli.sharpness:sharpness",
            report="losscli.cli.sharpness:report",
            drawing="losscli.plotting.sharpness:draw_sharpness",
            views="losscli.plotting.sharpness:sharpness_views",
            summary="losscli.results.summaries:SharpnessSummary",
            table=TableFormat(
                (
                    *("checkpoint", "split", "rho", "average", "average_stderr"),
                    *("worst", "worst_stderr", "sam", "sam_stderr"),
                    *("critical_step", "critical_sharpness"),
                ),
                errors=("average_stderr", "worst_stderr", "sam_stderr"),
            ),
            not_overlaid=(
                "tables of sharpness cannot be overlaid",
                "Give one CSV of sharpness",
            ),
        ),
        Command(
            name="barriers",
            function="losscli.studies.barriers:barriers",
            cli="losscli.cli.barriers:barriers",
            report="losscli.cli.barriers:report",
            drawing="losscli.plotting.barriers:draw_barriers",
            views="losscli.plotting.barriers:barriers_views",
            summary="losscli.results.summaries:BarriersSummary",
            table=TableFormat(
                (
                    *("a", "b", "split", "distance", "barrier", "barrier_stderr", "alpha"),
                    *("loss_a", "loss_b"),
                ),
                optional=("examples", "disagreement", "disagreement_stderr", "cka"),
                errors=("barrier_stderr", "disagreement_stderr"),
                grid=("a", "b"),
                pairs=True,
            ),
            further_tables={
                "curves": TableFormat(
                    ("a", "b", "alpha", *_LOSS),
                    optional=("examples", "loss_seed_stderr"),
                    metrics=True,
                    identified_by=("a", "loss"),
                    drawn=False,
                ),
            },
            not_overlaid=("matrices cannot be overlaid", "Give one CSV of barriers"),
        ),
        Command(
            name="connect",
            function="losscli.studies.connect:connect",
            cli="losscli.cli.connect:connect",
            report="losscli.cli.connect:report",
            drawing="losscli.plotting.connect:draw_connect",
            views="losscli.plotting.connect:connect_views",
            mesh="losscli.plotting.connect:mesh_connect",
            surface_cure="Give one bend, without --no-plane",
            summary="losscli.results.summaries:ConnectSummary",
            table=TableFormat(
                ("path", "t", *_LOSS),
                optional=("loss_seed_stderr",),
                metrics=True,
                errors=("loss_stderr",),
                position="t",
            ),
            further_tables={
                "plane": TableFormat(
                    ("x", "y", *_LOSS),
                    optional=("loss_seed_stderr",),
                    metrics=True,
                    errors=("loss_stderr",),
                    grid=("x", "y"),
                ),
            },
            panels="metrics",
        ),
        Command(
            name="soup",
            function="losscli.studies.soup:soup",
            cli="losscli.cli.soup:soup",
            report="losscli.cli.soup:report",
            drawing="losscli.plotting.soup:draw_soup",
            summary="losscli.results.summaries:SoupSummary",
            table=TableFormat(
                ("step", "checkpoint", "kept", "score", "score_stderr"), errors=("score_stderr",)
            ),
            distributed=False,
            not_overlaid=("searches cannot be overlaid", "Give one CSV of soup"),
        ),
        Command(
            name="inspect",
            function="losscli.studies.inspection:inspect",
            cli="",
            report="losscli.cli.files:report",
            drawing="losscli.plotting.inspection:draw_inspection",
            views="losscli.plotting.inspection:inspection_views",
            summary="losscli.results.summaries:InspectionSummary",
            table=TableFormat(
                ("tensor", "shape", "dtype", "values", "norm"),
                optional=("norm_b", "distance", "cosine"),
            ),
            panels="tensors",
            distributed=False,
            not_overlaid=(
                "inspections cannot be overlaid",
                "Inspect two checkpoints together",
            ),
        ),
    )
}

RESERVED_COLUMNS = frozenset(
    column
    for command in COMMANDS.values()
    for table in (command.table, *command.further_tables.values())
    if table.metrics
    for column in (*table.columns, *table.optional)
)
"""The columns of the tables with metrics that are no metrics: no metric may have such a name."""


def pair_position(columns: Sequence[str]) -> str:
    """Finds the column of ``barriers --x``, which follows those of the checkpoints.

    Args:
        columns: The columns of a table of ``barriers``.

    Returns:
        Its name; empty for a table of all pairs.
    """
    return "" if columns[2] == "split" else columns[2]


def command_of(columns: Collection[str]) -> Command | None:
    """Returns the command that writes a main table with these columns, if any."""
    if further_table_of(columns):
        return None
    return next((c for c in COMMANDS.values() if {*c.table.columns} <= {*columns}), None)


def further_table_of(columns: Collection[str]) -> TableFormat | None:
    """Returns the format of a further table that also has the columns of a main table, if any."""
    tables = (t for command in COMMANDS.values() for t in command.further_tables.values())
    return next((t for t in tables if t.identified_by and {*t.identified_by} <= {*columns}), None)


def further_table_names() -> frozenset[str]:
    """Lists NAME of the files STEM.NAME.csv of all commands."""
    return frozenset(name for command in COMMANDS.values() for name in command.further_tables)


def load(target: str) -> Any:
    """Imports a function, named as ``module:function``."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
