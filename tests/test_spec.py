"""Specs: what is written reads back, and no code runs that the command line did not name."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from losscli.data import objects
from losscli.errors import SpecError, UntrustedCodeError
from losscli.models import MODELS
from losscli.spec import Spec, Value, call, expand_toml, look_up, user_code_digests
from tests.conftest import ROOT, Losscli
from tests.forks import child, ended

KEYS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True)
TEXTS = st.one_of(
    st.text(),
    # What tells values from each other, and text that looks like another value.
    st.text(alphabet="\"\\,=:#'[]{} \t\r\n\x00\x7f\u2028éα", max_size=8),
    st.text(alphabet="0123456789.-+e_naif", max_size=8),
    st.sampled_from(["true", "false", "nan", "-inf", "0x10", "1_000", "1979-05-27", '"', " 5"]),
)
FLOATS = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    TEXTS,
    # A hyphen joins the numbers of a list, so none of them has a sign.
    st.lists(st.integers(min_value=0), min_size=2),
    st.lists(FLOATS, min_size=2),
)


@settings(deadline=None)
@given(TEXTS.filter(bool), st.dictionaries(KEYS, VALUES, max_size=4))
@example('a"b', {"k": "c,d"})
@example('"', {})
@example("mlp:784-10", {"k": [1e-5, 1e16]})
@example("bytes-\udcff", {"k": "\udcff,"})
def test_a_spec_that_is_written_reads_back(target: str, options: dict[str, Value]) -> None:
    spec = Spec(target, options)
    again = Spec.parse(str(spec))
    assert again == spec
    assert list(again.options) == list(options)
    assert [type(v) for v in again.options.values()] == [type(v) for v in options.values()]
    assert str(again) == str(spec)
    # So that errors that quote a spec stay one line; surrogates stand for undecodable bytes.
    assert str(spec).replace("\udcff", "").isprintable()


@settings(deadline=None)
@given(st.text(max_size=30))
@example('a,b="x')
@example('a,b="x"y')
@example('a,b="\\q"')
@example('"a\nb"')
@example("a,b=" + "[" * 5000)
@example("a,b=" + "1" * 5000)
def test_any_text_is_a_spec_that_reads_back_or_an_error_of_one_line(text: str) -> None:
    try:
        spec = Spec.parse(text)
    except SpecError as caught:
        said = str(caught)
    else:
        said = ""
        again = Spec.parse(str(spec))
        # By repr, for which nan is nan.
        assert (again.target, repr(again.options)) == (spec.target, repr(spec.options))
    assert "\n" not in said


def test_the_option_nan_reads_back() -> None:
    (value,) = Spec.parse(str(Spec("a", {"x": math.nan}))).options.values()
    assert isinstance(value, float)
    assert math.isnan(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("false", False),
        ("True", "True"),
        ("7", 7),
        ("-7", -7),
        ("1_000", 1000),
        ("0x1F", 31),
        ("007", "007"),
        ("0.5", 0.5),
        ("-1e-3", -0.001),
        ("5.", "5."),
        ("inf", math.inf),
        ("-inf", -math.inf),
        ("784-512-10", [784, 512, 10]),
        ("0.5-1-2e-3", [0.5, 1.0, 0.002]),
        ("1e-3", 0.001),
        ("-1-2", "-1-2"),
        ("1-", "1-"),
        ("2024-01-02T10:00:00", "2024-01-02T10:00:00"),
        ("", ""),
        ("a b", "a b"),
        ("a=b", "a=b"),
        ("'a'", "'a'"),
        ("3 # three", "3 # three"),
        ('"784-512"', "784-512"),
        ('"true"', "true"),
        (r'"a,b \"c\" \\ \n"', 'a,b "c" \\ \n'),
    ],
)
def test_values_read_as_toml_scalars_and_hyphens_make_lists(text: str, value: Value) -> None:
    (found,) = Spec.parse(f"name,key={text}").options.values()
    assert found == value
    assert type(found) is type(value)


def test_the_order_of_the_keys_is_kept() -> None:
    assert list(Spec.parse("a,z=1,b=2,m=3").options) == ["z", "b", "m"]


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("mlp", "mlp"),
        ("mlp:784-10", "mlp:784-10"),
        ("a.b:c:d", "a.b:c:d"),
        ('"a,b.py:net"', "a,b.py:net"),
        ('a"b,c"d', 'a"b,c"d'),
        ("dir with spaces/x.py:f", "dir with spaces/x.py:f"),
    ],
)
def test_the_target_ends_at_the_first_comma_outside_quotes(text: str, target: str) -> None:
    assert Spec.parse(f"{text},k=1") == Spec(target, {"k": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"spec '' has no name\. Write NAME or NAME:ARG,key=value"),
        (",a=1", "has no name"),
        ('""', "has no name"),
        ("mlp,", r"spec 'mlp,': '' is not of the form key=value\. Put double quotes"),
        ("mlp,a=1,,b=2", "'' is not of the form key=value"),
        ("mlp,relu", "'relu' is not of the form key=value"),
        ("mlp,=3", "'=3' is not of the form"),
        ("mlp,1a=3", "'1a=3' is not of the form"),
        ("mlp,a b=3", "'a b=3' is not of the form"),
        ("mlp,é=3", "'é=3' is not of the form"),
        ("mlp,a=1,a=2", r"spec 'mlp,a=1,a=2': the key 'a' is given twice\. Leave one out"),
        ('mlp,a="x', r"""'"x' is not a quoted string .*Write \\" for a double quote"""),
        ('mlp,a="x"y', "is not a quoted string"),
        ('mlp,a="x"#y', "is not a quoted string"),
        ('mlp,a="\\q"', "is not a quoted string .*escape"),
        ('"mlp', "is not a quoted string"),
        ('mlp,a="x\ny"', "is not a quoted string"),
    ],
)
def test_a_syntax_error_quotes_the_spec_and_says_how_to_write_it(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        Spec.parse(text)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def entry(size: str = "") -> str:
    return f"entry {size}"


REGISTRY: dict[str, Callable[..., Any]] = {"mlp": entry, "cnn": entry}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets tests import what they write, and forgets it after."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield
    for name in [n for n in sys.modules if n.startswith(("losscli_user_", "specs_"))]:
        del sys.modules[name]


def find(text: str, *, kind: str = "model", trusted: bool = True) -> Any:
    function, arguments = look_up(Spec.parse(text), REGISTRY, kind, trusted=trusted)
    return function(*arguments)


@pytest.mark.parametrize("trusted", [True, False])
def test_an_entry_of_the_registry_is_found_with_its_argument(trusted: bool) -> None:
    assert look_up(Spec("mlp"), REGISTRY, "model", trusted=trusted) == (entry, ())
    assert look_up(Spec("cnn:8-9"), REGISTRY, "model", trusted=trusted) == (entry, ("8-9",))
    assert look_up(Spec("mlp:a:b"), REGISTRY, "model", trusted=trusted) == (entry, ("a:b",))
    assert look_up(Spec("mlp:"), REGISTRY, "model", trusted=trusted) == (entry, ())


def test_code_is_found_in_a_file(tmp_path: Path, modules: None) -> None:
    (tmp_path / "specs_neighbour.py").write_text("SIZE = 3\n")
    (tmp_path / "my net.py").write_text(
        "from dataclasses import dataclass\n"
        "import specs_neighbour\n"
        "@dataclass\n"
        "class Net:\n"
        "    size: str = 'none'\n"
        "    @classmethod\n"
        "    def small(cls): return cls(str(specs_neighbour.SIZE))\n"
    )
    assert find(f"{tmp_path}/my net.py:Net").size == "none"
    assert find(f"{tmp_path}/my net.py:Net:a:b").size == "a:b"
    assert find(f"{tmp_path}/my net.py:Net.small").size == "3"


def test_code_is_found_in_a_package_and_in_the_current_folder(
    tmp_path: Path, modules: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "specs_package").mkdir()
    (tmp_path / "specs_package" / "__init__.py").touch()
    (tmp_path / "specs_package" / "inner.py").write_text("def f(x=0): return ('inner', x)\n")
    (tmp_path / "specs_flat.py").write_text("def f(x=0): return ('flat', x)\n")
    monkeypatch.chdir(tmp_path)
    assert find("specs_package.inner:f") == ("inner", 0)
    assert find("specs_package.inner:f:ARG") == ("inner", "ARG")
    assert find("specs_flat:f") == ("flat", 0)


# Where modules are found

# Installed libraries, the standard library, and losscli itself; those of the first two are not yet
# imported when the user's code is.
INSTALLED = (
    "safetensors",
    "rich",
    "matplotlib",
    "sqlite3",
    "wave",
    "torch",
    "numpy",
    "json",
    "losscli",
)


@pytest.fixture
def shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with files that bear the names of installed modules."""
    for name in INSTALLED:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the folder was run')\n")
    (tmp_path / "helper.py").write_text("SIZE = 3\n")
    (tmp_path / "late.py").write_text("SIZE = 4\n")
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "inner.py").write_text("SIZE = 5\n")
    (tmp_path / "net.py").write_text(
        "import json, safetensors, helper\n"
        "def build():\n"
        "    import sqlite3, wave, rich, late, space.inner\n"
        "    modules = (sqlite3, wave, rich, json, safetensors)\n"
        "    return [m.__file__ for m in modules], helper.SIZE, late.SIZE, space.inner.SIZE\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


_LOOK_UP = """
import sys
from losscli.spec import Spec, look_up
before = list(sys.path)
function, _ = look_up(Spec.parse(sys.argv[1]), {}, "model", trusted=True)
assert sys.path == before
files, *sizes = function()
assert sizes == [3, 4, 5]
assert sys.path == before
print(*files, sep="\\n")
"""


def own_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python as the command losscli does: without the current folder in its path."""
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("spec", ["net:build", "./net.py:build", "{folder}/net.py:build"])
def test_a_folder_of_own_code_shadows_nothing_installed_now_or_later(
    shadowed: Path, spec: str
) -> None:
    done = own_process("-c", _LOOK_UP, spec.format(folder=shadowed), cwd=shadowed)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 5
    assert str(shadowed) not in done.stdout


# In `make test`, test_faults.py runs such a command in a process of its own.
@pytest.mark.stress
@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("net:net", "net.py:data"),
        ("net:net", "net:data"),
        ("net.py:net", "net.py:data"),
    ],
)
def test_a_run_with_own_code_never_runs_files_with_the_names_of_libraries(
    model: str, data: str, shadowed: Path
) -> None:
    (shadowed / "net.py").write_text(
        "import helper\nfrom torch import nn, rand, arange\n"
        "def net(): return nn.Linear(helper.SIZE, 2)\n"
        "def data(): import late; return {'s': (rand(9, 3), arange(9) % (late.SIZE // 2))}\n"
    )
    done = own_process(
        *("-c", "from losscli.cli import main; main()"),
        *("interpolate", "init:0", "init:1", "-m", model, "-d", data, "-o", "out"),
        cwd=shadowed,
    )
    assert done.returncode == 0, done.stderr
    assert (shadowed / "out.png").exists()


def test_an_installed_module_wins_over_a_file_of_the_same_name_with_a_note(
    tmp_path: Path, modules: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site"
    for name in ("specs_models", "specs_tools"):
        (installed / name).mkdir(parents=True)
        (installed / name / "__init__.py").write_text("def f(): return 'installed'\n")
    mine = tmp_path / "mine"
    (mine / "specs_models").mkdir(parents=True)
    (mine / "specs_models" / "net.py").write_text("def f(): return 'mine'\n")
    (mine / "specs_models" / "__init__.py").write_text("def f(): return 'mine'\n")
    (mine / "specs_tools.py").write_text("def g(): return 'mine'\n")
    (mine / "specs_code.py").write_text("from specs_tools import g\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed)])
    monkeypatch.chdir(mine)
    assert find("specs_models:f") == "installed"
    comes = re.escape(f"({installed / 'specs_models' / '__init__.py'}) is used instead of ")
    with pytest.raises(SpecError, match=f"no module named 'specs_models.net'.*{comes}") as caught:
        find("specs_models.net:f")
    assert str(caught.value).endswith(f"{mine / 'specs_models'}: rename yours")
    for text in ("specs_code:g", "specs_code.py:g"):
        with pytest.raises(SpecError, match=r"cannot import name 'g' .*rename yours"):
            find(text)
    # What is inside the folder by a path is the user's in any case.
    assert find("specs_models/net.py:f") == "mine"


def test_a_library_that_losscli_needs_is_not_imported_from_a_folder_of_own_code(
    tmp_path: Path, modules: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "specs_library.py").write_text("")
    (tmp_path / "specs_code.py").write_text("def f(): import specs_library\n")
    monkeypatch.chdir(tmp_path)
    find("specs_code:f")
    del sys.modules["specs_library"]
    for how in ("import specs_library", "__import__('importlib').import_module('specs_library')"):
        with pytest.raises(ModuleNotFoundError):
            exec(how, {"__name__": "losscli.data.hub"})
        exec(how, {"__name__": "somebody.else"})
        del sys.modules["specs_library"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize(
    ("start", "kinds"),
    [
        ("fork", ["rows", "coming"]),
        ("spawn", ["rows"]),
        pytest.param("spawn", ["rows", "coming"], marks=pytest.mark.stress),
    ],
)
def test_workers_find_the_modules_of_own_code(
    start: str, kinds: list[str], shadowed: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (shadowed / "rows.py").write_text(
        "import torch\nfrom torch.utils.data import DataLoader, Dataset, IterableDataset\n"
        "class Rows(Dataset):\n"
        "    def __len__(self): return 9\n"
        "    def __getitem__(self, i):\n"
        "        import late, sqlite3, wave\n"
        "        return torch.full((3,), late.SIZE + i / 9), i % 2\n"
        "class Coming(IterableDataset):\n"
        "    def __iter__(self): return (Rows()[i] for i in range(9))\n"
        f"def rows(): return {{'s': DataLoader(Rows(), 3, num_workers=1,\n"
        f"    multiprocessing_context={start!r})}}\n"
        f"def coming(): return {{'s': DataLoader(Coming(), 3, num_workers=1,\n"
        f"    multiprocessing_context={start!r})}}\n"
    )
    logs = tmp_path_factory.mktemp("logs")

    def before() -> None:
        objects.host_budget = lambda: 200  # too little to be kept in memory
        os.dup2(os.open(logs / "stderr of workers", os.O_WRONLY | os.O_CREAT), 2)

    line = "interpolate init:0 init:1 -m mlp:3-2 --range 0 1 --points 2 --no-figure -q"
    for kind in kinds:
        pid = child([*line.split(), "-d", f"rows:{kind}", "-o", kind], logs / "stderr", before)
        assert ended(pid) == 0
        assert {path.name: path.read_text() for path in logs.iterdir()} == {
            "stderr": "",
            "stderr of workers": "",
        }
    assert len({(shadowed / f"{kind}.csv").read_text() for kind in kinds}) == 1


def test_two_files_of_one_name_are_both_code_of_the_run(tmp_path: Path, modules: None) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "specs_same.py").write_text(f"def f(): return {folder!r}\n")
    found = [find(f"{tmp_path}/{folder}/specs_same.py:f") for folder in ("a", "b", "a")]
    assert found == ["a", "b", "a"]
    files = [Path(file) for file in user_code_digests() if file.endswith("specs_same.py")]
    assert files == [tmp_path / "a" / "specs_same.py", tmp_path / "b" / "specs_same.py"]


def test_linked_code_is_classified_by_the_folder_of_its_target(
    tmp_path: Path, modules: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, mine = tmp_path / "site-packages", tmp_path / "mine"
    for folder, name in ((site, "theirs"), (mine, "own")):
        folder.mkdir()
        (folder / f"specs_{name}.py").touch()
    (mine / "specs_of_site.py").symlink_to(site / "specs_theirs.py")
    (site / "specs_of_mine.py").symlink_to(mine / "specs_own.py")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site), str(mine)])
    for name in ("specs_of_site", "specs_of_mine"):
        importlib.import_module(name)
    found = [Path(file) for file in user_code_digests() if Path(file).is_relative_to(tmp_path)]
    assert found == [mine / "specs_own.py"]


@pytest.mark.parametrize(
    "text",
    ["{folder}/specs_spy.py:build", "specs_spy:build:3,x=4", "specs_package.spy:build"],
)
def test_code_that_a_file_names_is_never_run(
    text: str, tmp_path: Path, modules: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "it ran"
    code = f"open({str(marker)!r}, 'w').close()\ndef build(*a, **k): return 1\n"
    (tmp_path / "specs_package").mkdir()
    (tmp_path / "specs_package" / "__init__.py").write_text(code)
    (tmp_path / "specs_package" / "spy.py").write_text(code)
    (tmp_path / "specs_spy.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    text = text.format(folder=tmp_path)
    for kind in ("model", "data", "loss", "metric"):
        with pytest.raises(UntrustedCodeError, match="code is run only when the command") as caught:
            find(text, kind=kind, trusted=False)
        assert str(caught.value).endswith(f"write --{kind} {text}")
        assert caught.value.exit_code == 1
    assert not marker.exists()
    assert find(text.split(",")[0]) == 1
    assert marker.exists()


def test_the_option_to_write_instead_is_safe_to_paste_into_a_shell(tmp_path: Path) -> None:
    text = f"{tmp_path}/it's; rm -rf x.py:build"
    with pytest.raises(UntrustedCodeError) as caught:
        find(text, trusted=False)
    *_, option, pasted = shlex.split(caught.value.cure.replace("If you trust it, ", ""))
    assert (option, pasted) == ("--model", text)


def test_a_control_character_in_a_spec_stays_out_of_the_error(tmp_path: Path) -> None:
    with pytest.raises(UntrustedCodeError) as caught:
        find(f'{tmp_path}/x\n\x1b[2J.py:build,y="\\n"', trusted=False)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("inside", [True, False])
def test_a_path_without_a_name_is_reported_with_where_the_name_goes(
    inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").touch()
    (tmp_path / "images").mkdir()
    if inside:
        monkeypatch.chdir(tmp_path)
    for text, cure in (("mine.py", "mine.py:NAME"), ("images", "NAME:images")):
        with pytest.raises(SpecError, match=f"To use this path, write {cure}\\. Give one of"):
            look_up(
                Spec.parse(text),
                {"mlp": dict},
                "model",
                trusted=True,
                folder=None if inside else tmp_path,
            )


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (
            "mlpp:3",
            "model",
            "model 'mlpp'. Did you mean 'mlp'.*Give one of mlp, cnn, or your own code",
        ),
        ("cn", "data", "unknown data 'cn'. Did you mean 'cnn'"),
        ("resnet", "model", r"unknown model 'resnet'. Give one of mlp, cnn, .*file\.py:callable"),
        ("net.py", "model", r"unknown model 'net\.py'"),
        (f"{'x' * 300}.py", "model", "unknown model 'x"),
        ("net.py:", "model", r"unknown model 'net\.py'"),
        ("net.py:3x", "model", r"unknown model 'net\.py'"),
        ("specs_absent.py:f", "model", r"there is no file specs_absent\.py\. Relative paths start"),
        ("specs_absent.inner:f", "model", "no module named 'specs_absent'. Install it, or"),
        ("os.specs_absent:f", "loss", "loss os.specs_absent:f: no module named 'os.specs_absent'"),
        ("math.py:f", "model", "there is no file math.py"),
        ("os.path:joined", "model", "the module has no 'joined'. Did you mean 'join'"),
        ("os.path:zzz", "model", "the module has no 'zzz'. Name a function or class"),
        ("os.path:join.zzz", "model", "the module has no 'join.zzz'"),
        ("os.path:sep", "model", "model os.path:sep is a str, not a callable. Name a function"),
        ("os.:f", "model", "model os.:f"),
    ],
)
def test_a_missing_name_in_a_spec_is_reported_with_the_available_ones(
    text: str, kind: str, message: str, modules: None
) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        find(text, kind=kind)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:\n", "importing it failed: SyntaxError.*Run it on its own: python "),
        ("1 / 0", "importing it failed: ZeroDivisionError: division by zero"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("import argparse; argparse.ArgumentParser().exit(3)", "importing it failed: SystemExit"),
        ("import specs_absent", "no module named 'specs_absent'"),
        ("raise ModuleNotFoundError('pip install it')", "ModuleNotFoundError: pip install it"),
        ("import os; os.nonsense", "importing it failed: AttributeError"),
        ("def __getattr__(name): raise OSError('no disk')", "OSError: no disk"),
        ("g = 3", "the module has no 'f'"),
        ("f = 3", "is a int, not a callable"),
    ],
)
def test_code_that_cannot_be_imported_says_why(
    code: str, message: str, tmp_path: Path, modules: None
) -> None:
    (tmp_path / "specs_broken.py").write_text(code)
    with pytest.raises(SpecError, match=message) as caught:
        find(f"{tmp_path}/specs_broken.py:f")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "specs_broken.py") in str(caught.value)


PARSES = "import argparse\np = argparse.ArgumentParser()\np.add_argument('--lr')\n"


def test_a_script_that_parses_arguments_on_import_is_one_line(
    losscli: Losscli, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "specs_script.py").write_text(PARSES + "p.add_argument('--x', required=True)\n"
                                            "a = p.parse_args()\ndef net(): pass\n")  # fmt: skip
    for m in ("specs_script.py:net", "specs_script:net"):
        done = losscli("interpolate", "a.pt", "b.pt", "-m", m, "-o", "out")
        assert (done.status, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert f"model {m}: it parses the command line while it is imported (" in done.stderr
        assert "the following arguments are required: --x)" in done.stderr
        assert done.stderr.endswith('under if __name__ == "__main__":\n')
    assert capfd.readouterr() == ("", "")  # nor does argparse say anything
    assert not list(folder.glob("out*"))
    # A parser that is called later says what it has to say as it does.
    with pytest.raises(SystemExit):
        argparse.ArgumentParser().parse_args(["--unknown"])
    assert "usage: " in capfd.readouterr().err


def test_a_file_that_imports_relative_to_its_package_is_named_as_a_module(
    losscli: Losscli, folder: Path, modules: None
) -> None:
    package = folder / "specs_nets"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "blocks.py").write_text("from torch import nn\nlinear = nn.Linear\n")
    (package / "net.py").write_text("from .blocks import linear\ndef Net(): return linear(6, 3)\n")
    run = ("interpolate", "init:0", "init:1", "-d", "npz:data.npz", "--points", 3, "-o", "out")
    for name in ("specs_nets/net.py", "./specs_nets/net.py", str(package / "net.py")):
        done = losscli(*run, "-m", f"{name}:Net")
        assert (done.status, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "attempted relative import with no known parent package" in done.stderr
        assert done.stderr.endswith(
            "Name it as a module of its package: --model specs_nets.net:Net\n"
        )
        assert not list(folder.glob("out*"))
    # The cure works.
    assert losscli(*run, "-m", "specs_nets.net:Net").status == 0
    (folder / "specs_alone.py").write_text("from .blocks import linear\n")
    done = losscli(*run, "-m", "specs_alone.py:Net")
    assert done.stderr.endswith("from the folder above its package: package.module:callable\n")


def test_an_interrupt_of_an_import_is_raised(tmp_path: Path, modules: None) -> None:
    (tmp_path / "specs_slow.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        find(f"{tmp_path}/specs_slow.py:f")


def test_an_unknown_key_is_reported_with_the_known_ones() -> None:
    for key in ("depth", "Activation"):
        with pytest.raises(SpecError, match="It takes sizes, activation, pieces") as caught:
            call(MODELS["mlp"], ("6-3",), {key: 1}, "model 'mlp'")
        assert f"unexpected keyword argument '{key}'" in str(caught.value)
        assert str(caught.value).startswith("model 'mlp': ")
    with pytest.raises(SpecError, match="It takes no keys"):
        call(lambda: None, (), {"x": 1}, "here")
    with pytest.raises(SpecError, match="It takes x, mean, std"):
        call(lambda x: None, (), {}, "here", also=("mean", "std"))


def test_a_missing_argument_and_one_given_twice_are_reported() -> None:
    with pytest.raises(SpecError, match="missing a required argument: 'sizes'"):
        call(MODELS["mlp"], (), {}, "model 'mlp'")
    with pytest.raises(SpecError, match="multiple values for argument 'sizes'"):
        call(MODELS["mlp"], ("6-3",), {"sizes": "6-3"}, "model 'mlp'")
    with pytest.raises(SpecError, match="too many positional arguments"):
        call(lambda: None, ("ARG",), {}, "here")


def test_a_failure_inside_a_called_function_is_not_taken_for_a_wrong_key() -> None:
    def fails(**keys: int) -> None:
        raise TypeError(f"unexpected {keys}")

    with pytest.raises(TypeError, match=r"unexpected \{'x': 1\}"):
        call(fails, (), {"x": 1}, "here")
    # A builtin without a signature is just called.
    assert call(dict, (), {"x": 1}, "here") == {"x": 1}


def write(file: Path, text: str) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return str(file)


def test_a_toml_file_stands_for_a_spec(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "data.toml"
    write(
        file,
        'name = "npz:some, data.npz"\nmean = [0.5, 1]\nsizes = [3, 4]\nstd = [0.25]\n'
        'flatten = true\nlimit = 7\nwords = "a,b"\nshare = -1e-5\n',
    )
    text, trusted, folder = expand_toml("data.toml", trusted=True, folder=file.parent)
    assert Spec.parse(text) == Spec(
        "npz:some, data.npz",
        {
            "mean": [0.5, 1.0],
            "sizes": [3, 4],
            "std": 0.25,
            "flatten": True,
            "limit": 7,
            "words": "a,b",
            "share": -1e-5,
        },
    )
    # Whoever named the file, it is the file that names what is in it.
    assert not trusted
    assert folder == file.parent


@pytest.mark.parametrize("text", ["mlp:6-5-3", "mnist:x.toml", "a.py:f", "x,file=y.toml"])
def test_other_specs_stay_as_they_are(text: str, tmp_path: Path) -> None:
    assert expand_toml(text, trusted=True, folder=tmp_path) == (text, True, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"x\.toml cannot be read: FileNotFoundError"),
        ("name = ", r"x\.toml cannot be read: TOMLDecodeError.* Correct it"),
        ("\xff", r"x\.toml cannot be read: UnicodeDecodeError.* Save it as UTF-8"),
        ("", r"x\.toml has no valid name\. It needs a line such as name = "),
        ("name = 3", "has no valid name"),
        ('name = ""', "has no valid name"),
        ('name = "x.toml"', "has no valid name"),
        ('name = "a"\n"b-c" = 1', r"x\.toml: 'b-c' is not a valid key"),
        (
            'name = "a"\n[b]\nc = 1',
            r"x\.toml: b cannot be written in a spec\. Give true or",
        ),
        ('name = "a"\nb = 1979-05-27', "b cannot be written in a spec"),
        ('name = "a"\nb = []', "b cannot be written in a spec"),
        ('name = "a"\nb = ["x", "y"]', "b cannot be written in a spec"),
        ('name = "a"\nb = [[1, 2], [3, 4]]', "b cannot be written in a spec"),
        ('name = "a"\nb = [true, false]', "b cannot be written in a spec"),
        ('name = "a"\nb = [1, -2]', "a list of numbers that are not negative"),
    ],
)
def test_a_toml_file_that_is_not_a_spec_is_refused(
    content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "x.toml").write_text(content, encoding="latin-1")
    with pytest.raises(SpecError, match=message) as caught:
        expand_toml("x.toml", trusted=True, folder=tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_toml_file_excludes_keys_in_the_spec(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"keys cannot follow .*\. Write them into .*x\.toml"):
        expand_toml("x.toml,limit=3", trusted=True, folder=tmp_path)


@pytest.mark.usefixtures("unseen")
def test_every_kind_of_spec_may_be_a_toml_file(folder: Path, losscli: Losscli) -> None:
    write(folder / "specs/model.toml", 'name = "mlp:6-5-3"\nactivation = "tanh"\n')
    write(folder / "specs/data.toml", 'name = "npz:../data.npz"\nlimit = 5\nmean = [0.25]\n')
    write(folder / "specs/loss.toml", 'name = "cross_entropy"\n')
    write(folder / "specs/metric.toml", 'name = "accuracy"\n')
    options = [f"--{k}=specs/{k}.toml" for k in ("model", "data", "loss", "metric")]
    line = ("interpolate", "a.pt", "b.pt", "--points", 2, "-q", "--json")
    done = losscli(*line, *options, "-o", "x")
    assert done.status == 0, done.stderr
    told = json.loads(done.stdout)
    # What the files say, so that another file under the same name is another run.
    assert told["model"] == "mlp:6-5-3,activation=tanh"
    assert told["data"] == "npz:../data.npz,limit=5,mean=0.25"
    assert (told["loss"], told["metrics"]) == ("cross_entropy", ["accuracy"])
    plain = ("-m", "mlp:6-5-3,activation=tanh", "-d", "npz:data.npz,limit=5,mean=0.25")
    assert losscli(*line, *plain, "-o", "y").status == 0
    assert (folder / "x.csv").read_text() == (folder / "y.csv").read_text()
    # A losscli.toml may name one too.
    write(folder / "losscli.toml", 'model = "specs/model.toml"\ndata = "specs/data.toml"\n')
    for name in "ab":
        state = torch.load(f"{name}.pt", weights_only=True)["state_dict"]
        torch.save(state, f"{name}.pt")
    done = losscli("interpolate", "a.pt", "b.pt", "--points", 2, "-q", "-o", "z")
    assert done.status == 0, done.stderr
    assert (folder / "x.csv").read_text() == (folder / "z.csv").read_text()


@pytest.mark.parametrize("kind", ["model", "data", "loss", "metric"])
def test_a_toml_file_may_not_name_code(kind: str, folder: Path, losscli: Losscli) -> None:
    (folder / "evil.py").write_text("open('ran', 'w')\ndef build(): pass\n")
    (folder / "x.toml").write_text('name = "evil.py:build"\n')
    done = losscli("interpolate", "a.pt", "b.pt", f"--{kind}", "x.toml", "-o", "x")
    assert done.status == 1
    assert f"x.toml names code to run as its {kind}, 'evil.py:build'" in done.stderr
    assert f"write --{kind} evil.py:build" in done.stderr
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("kind", ["model", "data", "loss"])
def test_code_in_a_losscli_toml_is_refused_with_the_name_of_the_file(
    kind: str, folder: Path, losscli: Losscli
) -> None:
    (folder / "evil.py").write_text("open('ran', 'w')\ndef build(): pass\n")
    specs = {"model": "mlp:6-5-3", "data": "npz:data.npz", "loss": "mse", kind: "evil.py:build"}
    lines = [f'{key} = "{value}"\n' for key, value in specs.items()]
    (folder / "losscli.toml").write_text("".join(lines))
    for name in "ab":
        state = torch.load(f"{name}.pt", weights_only=True)["state_dict"]
        torch.save(state, f"{name}.pt")
    done = losscli("interpolate", "a.pt", "b.pt", "-o", "x")
    assert done.status == 1
    place = folder / "losscli.toml"
    assert f"{place} names code to run as its {kind}, 'evil.py:build'" in done.stderr
    assert f"write --{kind} evil.py:build" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "ran").exists()
    assert not list(folder.glob("x.*"))


def test_a_toml_file_with_an_unknown_key_says_which_there_are(
    folder: Path, losscli: Losscli
) -> None:
    (folder / "x.toml").write_text('name = "mlp:6-5-3"\nactivatoin = "tanh"\n')
    done = losscli("interpolate", "a.pt", "b.pt", "-m", "x.toml", "-o", "x")
    assert done.status == 2
    assert "got an unexpected keyword argument 'activatoin'. It takes sizes, activ" in done.stderr
    assert done.stderr.count("\n") == 1
    (folder / "x.toml").write_text("name = ")
    done = losscli("interpolate", "a.pt", "b.pt", "-d", "x.toml", "-o", "x")
    assert done.status == 2
    assert done.stderr.startswith("losscli: x.toml cannot be read: TOMLDecodeError")
    assert not list(folder.glob("x.[cjp]*"))


def test_two_files_with_neighbours_of_one_name_are_refused(
    folder: Path, losscli: Losscli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "own_scale_of_both", raising=False)
    for name, scale in (("one", 1), ("two", 3)):
        (folder / name).mkdir()
        (folder / name / "own_scale_of_both.py").write_text(f"SCALE = {scale}\n")
    (folder / "one/model.py").write_text(
        "import own_scale_of_both\nfrom losscli.models import MLP\ndef net(): return MLP('6-5-3')\n"
    )
    (folder / "two/data.py").write_text(
        "import torch\nfrom own_scale_of_both import SCALE\n"
        "def data(): return {'t': (SCALE * torch.ones(4, 6), torch.arange(4) % 3)}\n"
    )
    run = ("interpolate", "a.pt", "b.pt", "-m", "one/model.py:net", "-d", "two/data.py:data")
    done = losscli(*run, "-o", "x")
    assert done.status == 2
    assert "data two/data.py:data: it imports 'own_scale_of_both', and Python loads" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(folder.glob("x.*"))
    # In one folder there is one of them.
    (folder / "two/data.py").rename(folder / "one/data.py")
    done = losscli(*run[:-1], "one/data.py:data", "-o", "x", "--points", 2, "--no-figure")
    assert done.status == 0, done.stderr
