"""Interactive pages: the numbers of the CSV to the bit, nothing from the network, text as text."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import losscli as library
from losscli.plotting.html import render_page, table_views
from losscli.plotting.style import PALETTE
from losscli.registry import COLUMN_TYPES, COMMANDS
from losscli.results.drawing import Drawing
from losscli.results.result import Result, Run, render_html
from losscli.results.runs import report
from losscli.table import Cell, Table
from tests.cases import sample
from tests.conftest import Losscli
from tests.plotting import (
    test_barriers,
    test_check,
    test_connect,
    test_plane,
    test_trajectory,
)
from tests.plotting.test_interpolation import stored
from tests.studies.test_registry import LINE, PATH, RUNS

Page = dict[str, Any]
HOSTILE = "<b>x</b> & %{y} </script><script>alert(1)</script><!-- \u202e$x^2$\x1b[2J"


class _Elements(HTMLParser):
    """Collects the elements of a page, with their attributes and texts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=False)
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_data(self, data: str) -> None:
        if self.found:
            self.found[-1][2].append(data)


def elements(page: str) -> list[tuple[str, dict[str, str | None], str]]:
    return [(tag, attrs, "".join(texts)) for tag, attrs, texts in _Elements(page).found]


def read(page: str) -> Page:
    """The data of a page."""
    (data,) = (text for tag, attrs, text in elements(page) if attrs.get("id") == "page")
    content: Page = json.loads(data)
    return content


def view(page: Page, name: str) -> Page:
    (found,) = (v for v in page["views"] if v["name"] == name)
    return dict(found)


def items(page: Page) -> Iterator[Page]:
    for each in page["views"]:
        yield from each["items"]


def numbers(values: Any) -> Iterator[float]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from numbers(value)
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield float(values)


# What a page does not show: counts, what stands in the summary, and tables that no figure shows.
LEFT_OUT = {
    "trajectory": {"distance", "turn_degrees"},
    "around": {"coefficient", "distance"},
    "check": {"lambda_min_error", "lambda_max_error"},
    "barriers": {"loss_a", "loss_b"},
}


def lines_of_parts() -> list[Result]:
    line = library.interpolate("a.pt", "b.pt", derivatives=True, **LINE)
    return [
        library.interpolate("a.pt", "b.pt", layerwise=True, **LINE),
        replace(line, more={"context": line.table}),
    ]


# Fewer runs where others only take longer: those of Adam are from formulas.
PAGES: dict[str, Callable[[], Sequence[Result | Run]]] = {
    **RUNS,
    "interpolate": lines_of_parts,
    "check": lambda: [
        library.check(
            ["a.pt", "b.pt"], eigenvalues=1, density=True, blocks=True, probes=2, lanczos=2, limit=5
        ),
        test_check.training_of_adam(),
    ],
    "barriers": lambda: [library.barriers(PATH, points=3, disagreement=True, cka=True)],
}


@pytest.mark.parametrize("name", sample(COMMANDS, 0))
def test_a_page_has_the_numbers_of_the_tables_to_the_bit(name: str, folder: Path) -> None:
    command = COMMANDS[name]
    for result in PAGES[name]():
        run = Run(result.table, result.summary, more=result.more)
        # Its own page, and that of a command without one.
        pages = {
            render_html([run]): LEFT_OUT.get(name, set()),
            render_page(table_views([run]), Drawing()): set(),
        }
        for page, left_out in pages.items():
            found = [*items(read(page))]
            shown = {x for item in found for x in numbers([item["trace"], item["more"]])}
            # Curves over checkpoints have their ρ as a name.
            shown |= {float(item["tags"].get("rho", 0)) for item in found}
            for further, table in {"": result.table, **result.more}.items():
                if further and not command.further_tables[further].drawn:
                    continue
                for column in {*table.columns} - {*COLUMN_TYPES, "examples", *left_out}:
                    values = {x for x in table.floats(column) if math.isfinite(x)}
                    assert values <= shown, (further, column)


def cells(table: Table, *columns: str) -> set[tuple[Cell, ...]]:
    return set(zip(*(table[column] for column in columns), strict=True))


def test_each_curve_is_a_column_of_a_split_and_a_run_over_alpha(folder: Path) -> None:
    one = library.interpolate("a.pt", "b.pt", points=5)
    two = library.interpolate("b.pt", "a.pt", points=3)
    runs = [Run(one.table, one.summary, "one"), Run(two.table, two.summary, "two")]
    page = read(render_html(runs, Drawing(title="Both", log=True)))
    assert (page["title"], page["log"]) == ("Both", True)
    (line,) = page["views"]
    assert line["single"] == ["quantity"]
    found: dict[tuple[str, str, str], set[tuple[Cell, ...]]] = {}
    for item in line["items"]:
        tags, trace = item["tags"], item["trace"]
        errors = item["more"].get("error", [None] * len(trace["x"]))
        key = tags["run"], tags["split"], tags["quantity"]
        assert key not in found
        found[key] = set(zip(trace["x"], trace["y"], errors, strict=True))
    assert {(run, split) for run, split, _ in found} == {
        (run, split) for run in ("one", "two") for split in one.table.unique("split")
    }
    for (label, split, quantity), points in found.items():
        rows = (one if label == "one" else two).table.where("split", split)
        expected = cells(rows, "alpha", quantity, "loss_stderr")
        if quantity != "loss":
            expected = {(alpha, value, None) for alpha, value, _ in expected}
        assert points == expected
    assert {quantity for _, _, quantity in found} == {"loss", *one.table.metrics}


def test_runs_of_one_name_are_two_curves(folder: Path) -> None:
    result = library.interpolate("a.pt", "b.pt", points=3)
    page = read(render_html([Run(result.table, result.summary, "same")] * 2))
    assert {item["tags"]["run"] for item in items(page)} == {"same (1)", "same (2)"}
    assert len({item["trace"]["line"]["color"] for item in items(page)}) == 2


def on_grid(item: Page) -> set[tuple[Cell, ...]]:
    trace = item["trace"]
    return {
        (x, y, trace["z"][row][column])
        for row, y in enumerate(trace["y"])
        for column, x in enumerate(trace["x"])
    }


def test_a_surface_has_the_loss_at_its_coordinates_and_each_checkpoint_its_own() -> None:
    run = test_plane.run(splits=("train", "test"), own=lambda x, y: 7.5 + x)
    page = read(render_html([run]))
    path = run.more["path"]
    assert [each["name"] for each in page["views"]] == ["surface", "contours"]
    for each in page["views"]:
        kind = {"surface": "surface", "contours": "contour"}[each["name"]]
        surfaces = [item for item in each["items"] if item["trace"]["type"] == kind]
        assert [item["tags"]["split"] for item in surfaces] == ["train", "test"]
        for item in surfaces:
            rows = run.table.where("split", item["tags"]["split"])
            assert on_grid(item) == cells(rows, "x", "y", "loss")
            errors = {error for row in item["more"]["error"] for error in row}
            assert errors == {*rows["loss_stderr"]}
        for item in each["items"]:
            if not item["names"]:
                continue
            trace, rows = item["trace"], path.where("split", item["tags"]["split"])
            heights = trace["z"] if kind == "surface" else item["more"]["loss"]
            points = set(zip(item["names"], trace["x"], trace["y"], heights, strict=True))
            assert points == cells(rows, "checkpoint", "x", "y", "loss")
        assert each["slider"] == path.unique("checkpoint")
        assert [item["at"] for item in each["items"] if item["at"]] == [[1, 2, 3]] * 2


def test_projected_paths_have_names_colours_and_places_on_the_slider() -> None:
    places = [(0.0, 1.0, 2.0), (3.0, 4.0, 5.0)]
    run = test_plane.with_paths(test_plane.run(), places, places[:1])
    page = read(render_html([run]))
    path = run.more["path"]
    for each in page["views"]:
        rings = [item for item in each["items"] if item["at"]]
        assert [item["at"] for item in rings] == [[1, 2, 3], [4, 5], [6]]
        assert each["slider"] == path["checkpoint"]
        for item, name in zip(rings, ("", "runs/0", "runs/1"), strict=True):
            rows = path.where("path", name)
            assert (item["names"], item["trace"]["x"]) == (rows["checkpoint"], rows["x"])
            assert item["more"]["off_plane"] == rows["off_plane"]
        lines = [i["trace"] for i in each["items"] if i["trace"].get("mode") == "lines"]
        assert [line["name"] for line in lines] == ["runs/0", "runs/1"]
        assert len({line["line"]["color"] for line in lines}) == 2


def test_the_path_of_a_trajectory_lies_on_its_surface() -> None:
    run = test_trajectory.run(surface=True)
    surface = view(read(render_html([run])), "surface")
    for item in surface["items"]:
        split = item["tags"]["split"]
        if item["trace"]["type"] == "surface":
            rows = run.more["surface"].where("split", split)
            assert on_grid(item) >= cells(rows, "projection", "residual", "loss")
        elif item["names"] and not item["at"]:
            rows = run.table.where("split", split)
            trace = item["trace"]
            points = set(zip(item["names"], trace["x"], trace["y"], trace["z"], strict=True))
            assert points == cells(rows, "checkpoint", "projection", "residual", "loss")


def test_a_page_needs_no_network_and_no_other_file() -> None:
    page = plane_page()
    assert len(page.encode()) < 6_000_000
    policy = next(
        attrs["content"]
        for tag, attrs, _ in elements(page)
        if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert not any(word in policy for word in ("http", "*", "connect", "'self'"))
    for tag, attrs, _ in elements(page):
        assert tag not in {"link", "img", "iframe", "object", "embed", "base"}
        assert not {"src", "href", "srcset"} & attrs.keys()


def plane_page() -> str:
    return render_html([test_plane.run()])


def test_equal_runs_give_equal_pages() -> None:
    assert plane_page() == plane_page()


def hostile_runs() -> Sequence[Run]:
    plane = test_plane.run(splits=(HOSTILE,))
    named = Table.build(
        plane.more["path"].columns,
        [(row[0], HOSTILE, *row[2:]) for row in plane.more["path"].rows],
    )
    plane = replace(plane, more={"path": named})
    plane.summary["loss"] = HOSTILE
    path = test_trajectory.run(surface=True)
    table = Table.build(path.table.columns, [(r[0], HOSTILE, *r[2:]) for r in path.table.rows])
    return [plane, replace(path, table=table, label=HOSTILE)]


@pytest.mark.parametrize("index", range(2))
def test_a_hostile_name_stays_text(index: int) -> None:
    run = hostile_runs()[index]
    text = render_html([run], Drawing(title=HOSTILE))
    kinds = [tag for tag, _, _ in elements(text) if tag == "script"]
    assert kinds == ["script"] * 3
    (data,) = (text for _, attrs, text in elements(text) if attrs.get("id") == "page")
    assert not {*"<&"} & {*data}
    page = read(text)
    assert "alert(1)" in page["title"]
    strings = []
    for item in items(page):
        strings += [item["trace"].get("name", ""), *item["names"]]
        strings += [label for label, _, _ in item["hover"]]
    for each in page["views"]:
        strings += each["quantities"].values()
        axes = (each["layout"][name] for name in ("xaxis", "yaxis") if name in each["layout"])
        strings += [axis["title"]["text"] for axis in axes]
    assert any("alert(1)" in string for string in strings)
    for string in strings:
        # What Plotly would read as markup is escaped; control characters are gone.
        assert "<" not in string
        assert "\u202e" not in string
        assert "\x1b" not in string
    assert "\u202e" not in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("interpolate", "a.pt", "b.pt", "-o", "x", "--figure", "x.html"),
        ("interpolate", "a.pt", "b.pt", "-o", "x.html"),
        ("plane", "a.pt", "-o", "x", "--figure", "x.png", "--figure", "X.HTML"),
        ("inspect", "a.pt", "--figure", "x.html"),
        ("plot", "line.csv", "-o", "x.html"),
    ],
)
def test_a_page_without_plotly_is_refused_before_anything_is_evaluated(
    arguments: Sequence[str], losscli: Losscli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = library.interpolate("a.pt", "b.pt", points=3).table
    Path("line.csv").write_text(table.to_csv(), newline="")
    before = set(folder.iterdir())
    monkeypatch.setattr("losscli.results.result.find_spec", lambda _: None)
    monkeypatch.setattr("losscli.evaluation.sweep.sweep", None)
    done = losscli(*arguments)
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr == (
        "losscli: a figure in .html needs plotly, which is not installed. "
        "pip install 'losscli[html]'\n"
    )
    assert set(folder.iterdir()) == before


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.stress)])
def test_a_browser_draws_a_surface_with_a_hostile_name(index: int, tmp_path: Path) -> None:
    page = render_html([hostile_runs()[index]], Drawing(title=HOSTILE))
    (tmp_path / "x.html").write_text(page)
    done = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-dev-shm-usage"),
            *("--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
            *(f"--user-data-dir={tmp_path}", "--enable-logging=stderr"),
            *("--virtual-time-budget=5000", "--dump-dom", (tmp_path / "x.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    said = [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]
    assert not [
        line for line in said if re.search("uncaught|error|fail|refuse", line, re.IGNORECASE)
    ]
    shown = elements(done.stdout)
    tags = Counter(tag for tag, _, _ in shown)
    assert tags["script"] == 3
    assert not {"b", "sub", "sup"} & tags.keys()
    # Plotly has a canvas only where WebGL draws.
    assert tags["canvas"] == 1
    assert any(tag == "h1" and "alert(1)" in text for tag, _, text in shown)
    assert [tag for tag, _, text in shown if tag == "text" and "loss" in text]


# A document and a Plotly that keep what they are given.
_BROWSER = """
class Element {
  constructor() { Object.assign(this, { children: [], listeners: {}, textContent: "" }); }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  querySelector() { return this.children[0]; }
}
const fixed = {};
const document = {
  getElementById: (id) => (fixed[id] ??= new Element()),
  createElement: () => new Element(),
};
const input = JSON.parse(require("fs").readFileSync(0, "utf8"));
document.getElementById("page").textContent = input.page;
const drawn = [];
const copy = (value) => JSON.parse(JSON.stringify(value));
const Plotly = { react: (_, traces, layout) => drawn.push(copy([traces, layout])) };
function click(text) {
  const sets = fixed.controls.children;
  const labels = sets.flatMap((set) => (set.children[0].type ? [set] : set.children.slice(1)));
  const [box] = labels.find((label) => label.children[1] === ` ${text}`).children;
  box.checked = box.type === "radio" || !box.checked;
  box.listeners.change();
}
const slide = (value) => fixed.position.listeners.input({ target: { value } });
new Function("document", "Plotly", input.script)(document, Plotly);
for (const action of input.actions) typeof action === "number" ? slide(action) : click(action);
console.log(JSON.stringify(drawn));
"""


def drive(page: str, *actions: str | int) -> list[tuple[list[Page], Page]]:
    """The traces and layouts that a page draws at first, and after each click or slide."""
    scripts = [text for tag, _, text in elements(page) if tag == "script"]
    given = json.dumps({"page": scripts[0], "script": scripts[-1], "actions": actions})
    done = subprocess.run(
        ["node", "-e", _BROWSER], input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    drawn: list[tuple[list[Page], Page]] = json.loads(done.stdout)
    return drawn


needs_node = pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")


@needs_node
def test_switches_choose_the_split_the_view_and_the_scale_of_a_surface() -> None:
    run = test_plane.run(splits=("train", "test"))
    first, test, contours, log = drive(render_html([run]), "test", "contours", "log scale")
    for (traces, layout), split in ((first, "train"), (test, "test"), (contours, "train")):
        rows = run.table.where("split", split)
        (surface,) = (t for t in traces if t["type"] in {"surface", "contour"})
        assert on_grid({"trace": surface}) == cells(rows, "x", "y", "loss")
        # The scale of the colours holds for both splits.
        colours = layout["coloraxis"]
        losses = [*run.table.floats("loss"), *run.more["path"].floats("loss")]
        assert (colours["cmin"], colours["cmax"]) == (min(losses), max(losses))
    traces, layout = log
    (contour,) = (t for t in traces if t["type"] == "contour")
    rows = run.table.where("split", "train")
    expected = sorted(math.log10(float(loss)) for loss in rows.floats("loss"))
    assert sorted(numbers(contour["z"])) == pytest.approx(expected, rel=1e-12)
    ticks = layout["coloraxis"]["colorbar"]
    for at, text in zip(ticks["tickvals"], ticks["ticktext"], strict=True):
        assert float(text) == pytest.approx(10**at, rel=1e-12)


@needs_node
def test_the_pointer_reads_coordinates_loss_error_and_name() -> None:
    traces, _ = drive(render_html([test_plane.run()]))[0]
    said = next(t for t in traces if t["type"] == "surface")["hovertext"]
    assert said[0][0].startswith("train<br>along B − A: −3<br>orthogonal to B − A: −3<br>loss")
    assert said[0][0].endswith("± 0.01")
    dots = next(t for t in traces if t["type"] == "scatter3d" and t["hoverinfo"] == "text")
    assert dots["hovertext"][1].startswith("runs/1.pt<br>along B − A: 10<br>")


@needs_node
def test_the_slider_shows_one_checkpoint() -> None:
    run = test_trajectory.run(surface=True)
    page = render_html([run])
    everything, third, none = (traces for traces, _ in drive(page, 3, 0))
    assert everything == none
    (ring,) = (t for t in third if t not in everything)
    row = run.table.where("step", run.table.unique("step")[2])
    assert (ring["x"], ring["y"]) == (row["projection"][:1], row["residual"][:1])
    assert ring["hovertext"][0].startswith(f"{row['checkpoint'][0]}<br>")


@needs_node
def test_the_tails_of_a_density_do_not_stretch_its_logarithmic_axis() -> None:
    main = Table.build(COMMANDS["check"].table.columns, [("a", "train", *[1.0] * 7, "minimum")])
    columns = COMMANDS["check"].further_tables["density"].columns
    rows = [("a", "train", x, 10.0**-y) for x, y in ((0.0, -2), (1.0, 4), (2.0, 300))]
    run = Run(main, {}, more={"density": Table.build(columns, rows)})
    (_, linear), (_, log) = drive(render_html([run]), "spectral density", "log scale")[1:]
    assert "range" not in linear["yaxis"]
    assert log["yaxis"]["range"] == pytest.approx([-5, 2.3])


@needs_node
def test_only_losses_have_a_logarithmic_axis(folder: Path) -> None:
    result = library.interpolate("a.pt", "b.pt", points=3, derivatives=True)
    page = render_html([Run(result.table, result.summary)], Drawing(log=True))
    (_, loss), (_, slope), (traces, _) = drive(page, "slope", "train")
    assert loss["yaxis"]["type"] == "log"
    assert loss["yaxis"]["title"]["text"] == "loss (cross_entropy), log scale"
    # A slope may be negative.
    assert slope["yaxis"]["type"] == "linear"
    assert [trace["name"] for trace in traces] == ["test"]


LIMITED: dict[str, Callable[[], Run]] = {
    "line": lambda: stored("three-relu"),
    "plane": test_plane.run,
    "barriers": lambda: test_barriers.run(test_barriers.seeds(3)),
}


@needs_node
@pytest.mark.parametrize("name", LIMITED)
def test_limits_are_those_of_the_loss(name: str) -> None:
    limits = [0.25, 0.5]
    run = LIMITED[name]()
    (traces, layout), (_, log) = drive(render_html([run], Drawing(ylim=limits)), "log scale")
    logarithms = [math.log10(limit) for limit in limits]
    if name == "line":
        assert (layout["yaxis"]["range"], log["yaxis"]["range"]) == (limits, logarithms)
        (_, of_accuracy) = drive(render_html([run], Drawing(ylim=limits)), "accuracy")[1]
        assert "range" not in of_accuracy["yaxis"]
        return
    for drawn, expected in ((layout, limits), (log, logarithms)):
        assert [drawn["coloraxis"][end] for end in ("cmin", "cmax")] == expected
        if name == "plane":
            low, high = drawn["scene"]["zaxis"]["range"]
            margin = 0.03 * (expected[1] - expected[0])
            assert (low + margin, high - margin) == pytest.approx(expected)
    if name == "plane":
        # The surface is flat beyond the limits, as in the picture.
        surface = next(trace for trace in traces if trace["type"] == "surface")
        shown = set(numbers(surface["z"]))
        assert shown <= {min(max(loss, 0.25), 0.5) for loss in run.table.floats("loss")}
        views = read(render_html([run], Drawing(ylim=limits)))["views"]
        assert all("Losses below 0.25 or above 0.5" in each["notes"][-1] for each in views)


@needs_node
def test_a_limit_without_a_logarithm_holds_only_on_a_linear_axis() -> None:
    run = stored("three-relu")
    (_, linear), (_, log) = drive(render_html([run], Drawing(ylim=(-1.0, 4.0))), "log scale")
    assert linear["yaxis"]["range"] == [-1, 4]
    assert log["yaxis"]["range"] == [None, math.log10(4)]


def test_the_colours_of_a_style_sheet_are_those_of_the_curves() -> None:
    style = {"axes.prop_cycle": "cycler('color', ['112233', '445566', '778899'])"}
    own = ["#112233", "#445566", "#778899"]
    line = stored("three-relu")
    labelled = [replace(line, label=label) for label in "xyz"]
    pairs = Table.build(
        ("a", "b", "step", *test_barriers.COLUMNS[2:]),
        [("a", "b", 1, split, 1.0, 0.3, 0.1, 0.5, 0.1, 0.1) for split in ("train", "test")],
    )
    for runs, number in ((labelled, 3), ([Run(pairs, {})], 2), ([test_connect.run()] * 3, 3)):
        page = read(render_html(runs, Drawing(style=style, size="paper")))
        colours = {item["trace"]["line"]["color"] for item in items(page)}
        assert {*own[:number]} <= colours
        assert not {*PALETTE} & {*colours}


def test_a_page_says_that_splits_have_the_same_colours() -> None:
    for splits in (("train",), ("train", "test")):
        for run in (test_plane.run(splits=splits), test_barriers.run(["a", "b"], splits=splits)):
            for each in read(render_html([run]))["views"]:
                assert ("All splits have the same colours." in each["notes"]) == (len(splits) > 1)


def test_options_without_effect_on_a_page_are_named(losscli: Losscli, folder: Path) -> None:
    Path("x.mplstyle").write_text("axes.prop_cycle: cycler('color', ['r'])\nfont.size: 12\n")
    losscli("interpolate", "a.pt", "b.pt", "--points", 3, "-o", "line", "--no-figure")
    given = ("--size", "paper", "--no-markers", "--style", "x.mplstyle", "--figure", "x.html")
    said = [
        "note: --size and --no-markers have no effect on the interactive page x.html",
        "note: only axes.prop_cycle of --style has an effect on the page x.html",
    ]
    assert losscli("plot", "line.csv", *given).stderr.splitlines() == said
    study = ("interpolate", "a.pt", "b.pt", "--points", 3, "-o", "x")
    assert losscli(*study, *given).stderr.splitlines()[:2] == said
    assert losscli("plot", "line.csv", "--size", "paper", "-o", "x.png").stderr == ""
    assert losscli("plot", "line.csv", "--ylim", 0, 1, "--figure", "y.html").stderr == ""


# --- Reports -------------------------------------------------------------------------------------


def report_runs() -> tuple[list[str], list[Run]]:
    line = stored("three-relu")
    other = replace(stored("three-tanh"), label="tanh")
    pairs = test_barriers.run(test_barriers.seeds(3))
    return ["line.csv", "other.csv", "pairs.csv"], [line, other, replace(pairs, summary={})]


def test_a_report_lays_runs_of_one_command_together_and_names_the_origin_of_each() -> None:
    names, runs = report_runs()
    page = read(report(names, runs, Drawing(title="For Monday", log=True)))
    assert page["title"] == "For Monday"
    line, pairs = page["sections"]
    assert (line["title"], pairs["title"]) == ("interpolate: line.csv, tanh", "barriers: pairs.csv")
    assert line["log"]
    assert len({item["tags"]["run"] for item in items(line)}) == 2
    assert [name for name, _ in line["origin"]] == ["line.csv", "tanh"]
    summary = runs[0].summary
    for said in (summary["loss"], *(c["name"] for c in summary["checkpoints"])):
        assert said in line["origin"][0][1]
    assert "no summary next to the table" in pairs["origin"][0][1]
    # Commands that cannot be overlaid have a section for each run.
    sections = read(report(["a", "b"], [runs[2], runs[2]], Drawing()))["sections"]
    assert [each["title"] for each in sections] == ["barriers: a", "barriers: b"]


def test_names_in_a_report_stay_text() -> None:
    run = hostile_runs()[1]
    text = report([HOSTILE, HOSTILE], [run, run], Drawing(title=HOSTILE))
    assert [tag for tag, _, _ in elements(text) if tag == "script"] == ["script"] * 3
    (data,) = (text for _, attrs, text in elements(text) if attrs.get("id") == "page")
    assert not {*"<&"} & {*data}
    assert "\u202e" not in text
    identifiers = [attrs["id"] for _, attrs, _ in elements(text) if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))


@needs_node
def test_a_report_draws_every_section() -> None:
    names, runs = report_runs()
    page = report(names, runs, Drawing())
    (line, _), (pairs, layout), (again, changed) = drive(page, "log scale")
    assert {trace["type"] for trace in line} == {"scatter"}
    assert {trace["type"] for trace in pairs} == {"heatmap"}
    assert "coloraxis" in layout
    # A switch changes its own section.
    assert {trace["type"] for trace in again} == {"scatter"}
    assert changed["yaxis"]["type"] == "log"


def test_plot_writes_a_report_of_several_kinds(losscli: Losscli, folder: Path) -> None:
    losscli("interpolate", "a.pt", "b.pt", "--points", 3, "-o", "line", "--no-figure")
    losscli("barriers", "a.pt", "b.pt", "--points", 3, "-o", "pairs", "--no-figure")
    done = losscli("plot", "line.csv", "pairs.csv", "--figure", "r.html", "--label=x", "--label=y")
    assert (done.status, done.stdout, done.stderr) == (0, "r.html\n", "")
    sections = read(Path("r.html").read_text("utf-8"))["sections"]
    assert [each["title"] for each in sections] == ["interpolate: x", "barriers: y"]
    done = losscli("plot", "line.csv", "pairs.csv", "--figure", "s.html", "--figure", "s.png")
    assert done.status == 2
    assert "have no axes in common. Overlay tables of one command" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path("s.html").exists()


def test_a_page_has_no_limit_of_panels(losscli: Losscli, folder: Path) -> None:
    metrics = [f"metric {k}" for k in range(30)]
    rows = [(alpha, "train", alpha, 0.1, *[1.0] * 30) for alpha in (0.0, 1.0)]
    table = Table.build(("alpha", "split", "loss", "loss_stderr", *metrics), rows)
    Path("many.csv").write_text(table.to_csv(), newline="")
    assert "a figure can have at most 24 metrics" in losscli("plot", "many.csv").stderr
    assert losscli("plot", "many.csv", "-o", "many.html").status == 0
