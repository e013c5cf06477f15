"""Specs, ``NAME:ARG,key=value,…``: how a command line names a model, a data set or a loss."""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import math
import os
import re
import shlex
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

from losscli.errors import SpecError, UntrustedCodeError, one_line
from losscli.files import IrregularError, read_regular

__all__ = [
    "Scalar",
    "Spec",
    "Value",
    "call",
    "look_up",
    "own_code",
    "own_folders_in_path",
    "read_toml",
    "unfold",
]

Scalar = bool | int | float | str
Value = Scalar | list[int] | list[float]

_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_LIST = re.compile(rf"{_NUMBER}(?:-{_NUMBER})+")
_QUOTED = r'"(?:\\.|[^"\\])*"'
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CALLABLE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class Spec:
    """A parsed spec.

    The target is ``NAME`` or ``NAME:ARG``; which part is the name depends on the registry that
    it is looked up in, because code (``package.module:callable``) has a colon of its own.

    Attributes:
        target: Everything before the first comma that is not in double quotes.
        options: The keys and values behind it, in the order given.
    """

    target: str
    options: Mapping[str, Value] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Reads a spec.

        Args:
            text: ``NAME``, ``NAME:ARG``, ``NAME,key=value,…`` or ``NAME:ARG,key=value,…``.

        Returns:
            The spec; ``Spec.parse(str(spec)) == spec``.

        Raises:
            SpecError: The text is empty, a key is no identifier, stands twice or has no value.
        """
        target, *pairs = _split(text)
        if target.startswith('"'):
            target = _toml(target, text)
        if not target:
            raise SpecError(f"spec {text!r} has no name", "Write NAME or NAME:ARG,key=value")
        options: dict[str, Value] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals or not _KEY.fullmatch(key):
                raise SpecError(
                    f"spec {text!r}: {pair!r} is not of the form key=value",
                    'Put double quotes around a value with a comma: key="a,b"',
                )
            if key in options:
                raise SpecError(f"spec {text!r}: the key {key!r} stands twice", "Leave one out")
            options[key] = _value(value, text)
        return cls(target, options)

    def __str__(self) -> str:
        target = self.target if _is_plain(self.target) else _quote(self.target)
        return ",".join([target, *(f"{k}={_format(v)}" for k, v in self.options.items())])


def _split(text: str) -> list[str]:
    """Splits at the commas outside double quotes."""
    parts = re.findall(rf"(?:{_QUOTED}|[^,])+|(?<=,)(?=,|$)|^(?=,|$)", text, re.DOTALL)
    return parts or [""]


def _value(text: str, where: str) -> Value:
    if text.startswith('"'):
        return _toml(text, where)
    if "\n" in text or "#" in text:
        return text
    try:
        if _LIST.fullmatch(text):
            parts = re.findall(_NUMBER, text)
            whole = all(part.isdigit() for part in parts)
            numbers = [int(part) for part in parts] if whole else [float(part) for part in parts]
            # One beyond what a float holds could not be written again.
            return numbers if whole or all(map(math.isfinite, numbers)) else text
        value = tomllib.loads(f"v = {text}")
    except (ValueError, RecursionError):  # besides TOML's own errors: thousands of digits, of [
        return text
    if value.keys() == {"v"} and type(value["v"]) in {bool, int, float}:
        number: Scalar = value["v"]
        return number
    return text


def _toml(text: str, where: str) -> str:
    try:
        if not re.fullmatch(_QUOTED, text, re.DOTALL):
            raise ValueError("a double quote is missing, or stands too early")  # noqa: TRY301
        return str(tomllib.loads(f"v = {text}")["v"])
    except ValueError as error:
        raise SpecError(
            f"spec {where!r}: {text!r} is not a quoted string ({error})",
            r"Write \" for a double quote in it and \\ for a backslash",
        ) from None


def read_toml(file: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Args:
        file: The file.

    Returns:
        What it holds.

    Raises:
        SpecError: It cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(read_regular(file).decode("utf-8"))
    except IrregularError as error:
        raise SpecError(f"{file} cannot be read: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        cure = {
            UnicodeDecodeError: "Save it as UTF-8",
            tomllib.TOMLDecodeError: "Mend it there: it has to be TOML",
            RecursionError: "Nest its lists less deeply",
            ValueError: "Write shorter numbers in it",
        }.get(type(error), "Give a file of TOML that can be read")
        raise SpecError(f"{file} cannot be read: {one_line(error)}", cure) from None


def unfold(
    text: str, *, trusted: bool, folder: Path | None = None
) -> tuple[str, bool, Path | None]:
    """Puts what a TOML file says in the place of a spec that names the file.

    The file has a line ``name = "NAME"`` or ``name = "NAME:ARG"``, and one for each key.

    Args:
        text: A spec, or the name of a TOML file.
        trusted: Whether the command line itself named it.
        folder: What relative paths in it are relative to; the current folder by default.

    Returns:
        The spec; whether it may name code, which one from a file may not; and what its relative
        paths are relative to, for one from a file the folder of that file.

    Raises:
        SpecError: The file cannot be read, or says what no spec can.
    """
    target, options = (spec := Spec.parse(text)).target, spec.options
    if not target.endswith(".toml") or ":" in target:
        return text, trusted, folder
    file = Path(folder or "", target)
    if options:
        raise SpecError(f"spec {text!r}: beside {file} stand keys", "Write them into the file")
    content = read_toml(file)
    name = content.pop("name", None)
    if not isinstance(name, str) or not name or name.endswith(".toml"):
        raise SpecError(
            f"{file} names no entry of a registry", 'It needs a line such as name = "mnist:FOLDER"'
        )
    for key, value in content.items():
        if not _KEY.fullmatch(key):
            raise SpecError(f"{file}: {key!r} is no key of a spec", "Its keys are identifiers")
        content[key] = _from_toml(value, f"{file}: {key}")
    return str(Spec(name, content)), False, file.parent


def _from_toml(value: Any, where: str) -> Value:
    """Takes a value that can be written in a spec, and no other."""
    if isinstance(value, list):
        numbers = [v for v in value if type(v) in {int, float}]
        if len(numbers) == len(value) == 1:
            return _from_toml(value[0], where)
        if len(numbers) == len(value) > 1:
            value = value if all(type(v) is int for v in value) else [float(v) for v in value]
    if type(value) in {bool, int, float, str} or (value and isinstance(value, list)):
        written = _format(value)
        if not isinstance(value, list) or _value(written, where) == value:
            plain: Value = value
            return plain
    raise SpecError(
        f"{where} is not what a spec can hold",
        "Give true or false, a number, a text, or a list of numbers from 0 up",
    )


def _is_plain(text: str) -> bool:
    return "," not in text and '"' not in text and text.isprintable()


def _quote(text: str) -> str:
    return f'"{"".join(map(_escape, text))}"'


def _escape(character: str) -> str:
    if character in {'"', "\\"}:
        return f"\\{character}"
    # TOML has no escapes for surrogates, which stand for undecodable bytes in names of files.
    if character.isprintable() or "\ud800" <= character <= "\udfff":
        return character
    return f"\\U{ord(character):08x}"


def _format(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "-".join(str(v) for v in value)
    if isinstance(value, str):
        return value if _is_plain(value) and _value(value, "") == value else _quote(value)
    return repr(value)


def look_up(
    spec: Spec,
    registry: Mapping[str, Callable[..., Any]],
    kind: str,
    *,
    trusted: bool,
    source: str = "a file",
    runs_code: Collection[str] = (),
) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """Finds what a spec names: an entry of a registry, or code of the user's own.

    Args:
        spec: What to find.
        registry: The entries by name.
        kind: What the entries are ("model", "data", …), for the errors.
        trusted: Whether the command line itself named the spec. Only then may it name code,
            which is imported and so run.
        source: What named it, if not the command line.
        runs_code: Entries that run what a file holds; they count as code.

    Returns:
        The callable and its positional arguments: ``(ARG,)``, or nothing where there is no ARG.

    Raises:
        SpecError: No entry has this name, or the code named is not there.
        UntrustedCodeError: The spec names code and did not come from the command line.
    """
    name, _, argument = spec.target.partition(":")
    if name in registry and (trusted or name not in runs_code):
        return registry[name], ((argument,) if argument else ())
    module, _, rest = spec.target.partition(":")
    attribute, _, argument = rest.partition(":")
    if name not in registry and not (_CALLABLE.fullmatch(attribute) and _may_be_code(module)):
        close = difflib.get_close_matches(name, registry, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise SpecError(
            f"unknown {kind} {name!r}",
            f"{hint}Known are {', '.join(registry)}, or code of your own as "
            "package.module:callable or path/to/file.py:callable",
        )
    if not trusted:
        option = {"model": "--model", "data": "--data", "loss": "--loss"}.get(kind, f"--{kind}")
        raise UntrustedCodeError(
            f"{source} names code to run as its {kind}, {str(spec)!r}, and code is run only when "
            "the command line names it",
            f"If you trust it, write {option} {shlex.quote(str(spec))}",
        )
    return _load(module, attribute, kind), ((argument,) if argument else ())


def _may_be_code(module: str) -> bool:
    """Tells a mistyped name from a module, without running anything."""
    try:
        here = Path(f"{module}.py").exists() or Path(module).is_dir()
    except OSError:  # no file has so long a name
        return False
    if here or "." in module or module in sys.modules:
        return True
    return module.isidentifier() and importlib.util.find_spec(module) is not None


def _load(module: str, attribute: str, kind: str) -> Callable[..., Any]:
    where = f"{kind} {module}:{attribute}"
    try:
        with _no_arguments():
            if module.endswith(".py"):
                loaded = _load_file(Path(module), where)
            else:
                _OWN.add(str(Path.cwd()))
                loaded = importlib.import_module(module)
    except SpecError:
        raise
    except _ArgumentsError as error:
        raise SpecError(
            f"{where}: it parses the command line while it is imported ({error})",
            'Put what it does as a script under if __name__ == "__main__":',
        ) from error
    except ModuleNotFoundError as error:
        missing = f"no module named {error.name!r}" if error.name else one_line(error)
        raise SpecError(
            f"{where}: {missing}", _OWN.hidden(error) or "Install it, or give a path to a .py file"
        ) from error
    except (Exception, SystemExit) as error:  # scripts that parse their arguments exit
        alone = f"python {shlex.quote(module)}" if module.endswith(".py") else f"python -m {module}"
        raise SpecError(
            f"{where}: importing it failed: {one_line(error)}",
            _OWN.hidden(error)
            or _package(error, module, attribute, kind)
            or f"Try it alone: {alone}",
        ) from error
    found: Any = loaded
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        names = [name for name, value in vars(loaded).items() if callable(value)]
        close = difflib.get_close_matches(attribute, names, n=1)
        raise SpecError(
            f"{where}: there is no {attribute!r} in it",
            f"Did you mean {close[0]!r}?" if close else "Name a function or class of it",
        ) from None
    except Exception as error:  # a module may make its names on demand
        raise SpecError(f"{where}: importing it failed: {one_line(error)}") from error
    if not callable(found):
        raise SpecError(
            f"{where} is a {type(found).__name__}, not a callable",
            "Name a function or class",
        )
    return found  # type: ignore[no-any-return]


class _ArgumentsError(SystemExit):
    """The user's code parses the arguments of the command line, which are losscli's."""


@contextmanager
def _no_arguments() -> Iterator[None]:
    """Keeps argparse from writing its usage, and from ending the process without a word on why."""

    def error(self: argparse.ArgumentParser, message: str) -> NoReturn:
        raise _ArgumentsError(f"{self.prog}: {message}")

    before = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = error  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.error = before  # type: ignore[method-assign]


def _package(error: BaseException, module: str, attribute: str, kind: str) -> str:
    """Returns a cure for a file that imports relative to its package; an empty text for others."""
    if not isinstance(error, ImportError) or "relative import" not in str(error):
        return ""
    path = Path(module).with_suffix("")
    with contextlib.suppress(ValueError):
        path = path.resolve().relative_to(Path.cwd().resolve())
    if path.is_absolute() or len(path.parts) < 2 or not all(map(str.isidentifier, path.parts)):
        return "Name it as a module, from the folder above its package: package.module:callable"
    return f"Name it as a module of its package: --{kind} {'.'.join(path.parts)}:{attribute}"


def _load_file(path: Path, where: str) -> Any:
    if not path.is_file():
        raise SpecError(
            f"{where}: there is no file {path}", f"Relative names start at {Path.cwd()}"
        )
    name = f"losscli_user_{path.stem}"
    # A file of the same name in another folder keeps its module.
    absolute = str(Path.cwd() / path)
    while getattr(sys.modules.get(name), "__file__", absolute) != absolute:
        name += "_"
    loader = importlib.util.spec_from_file_location(name, absolute)
    if loader is None or loader.loader is None:
        raise SpecError(f"{where}: {path} is no Python file")
    module = importlib.util.module_from_spec(loader)
    # Registered before it runs, so that its dataclasses and pickles find their module.
    sys.modules[name] = module
    # Its neighbours are importable from it, as they are when it is run as a script.
    _OWN.add(str(path.resolve().parent))
    _require_own_neighbours(path.resolve(), where)
    loader.loader.exec_module(module)
    return module


def _require_own_neighbours(path: Path, where: str) -> None:
    """Makes sure that a file does not get a neighbour of another file for one of its own.

    Args:
        path: The file.
        where: What to call it in errors.

    Raises:
        SpecError: It imports a neighbour, and another folder's module of that name is loaded.
    """
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError, RecursionError):
        return  # as importing it will say
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    for name in sorted({name.partition(".")[0] for name in names}):
        loaded = getattr(sys.modules.get(name), "__file__", None)
        found = importlib.machinery.PathFinder.find_spec(name, [str(path.parent)])
        own = found and found.origin
        if own and loaded and os.path.realpath(own) != os.path.realpath(loaded) and _is_own(loaded):
            raise SpecError(
                f"{where}: it imports {name!r}, and Python keeps one module of a name: {loaded} is "
                f"loaded, and {own} is not",
                "Rename one of them, or put both into one folder",
            )


def _is_own(file: str) -> bool:
    """Tells whether a loaded file is one of the user's own, and not of an installed package."""
    path = Path(os.path.realpath(file))
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not installed and any(path.is_relative_to(folder) for folder in _OWN.folders)


class _OwnFolders(importlib.abc.MetaPathFinder):
    """Finds modules in folders of the user's code, after everything that is installed.

    Python asks it last. So a file matplotlib.py beside the user's code is never taken for the
    library, neither now nor by an import later in the run, and `sys.path` stays as it is.

    Attributes:
        folders: Where it looks; first what was named last.
    """

    def __init__(self) -> None:
        self.folders: list[str] = []

    def add(self, folder: str) -> None:
        """Looks in a folder before the others, from now on."""
        self.folders = [folder, *(f for f in self.folders if f != folder)]
        if self not in sys.meta_path:
            sys.meta_path.append(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        # What is inside a package is found by way of the package.
        if path is not None or self._asked_by_losscli():
            return None
        return importlib.machinery.PathFinder.find_spec(fullname, self.folders, target)

    def _asked_by_losscli(self) -> bool:
        """Whether losscli imports, which takes a missing library for no folder of the user's."""
        frame: FrameType | None = sys._getframe(2)
        while frame and frame.f_globals.get("__name__", "").startswith("importlib"):
            frame = frame.f_back
        name = frame.f_globals.get("__name__", "") if frame else ""
        return name.startswith("losscli.") and name != __name__

    def hidden(self, error: BaseException) -> str:
        """Returns a cure for an import that found an installed module and not the user's own.

        Args:
            error: How the import failed.

        Returns:
            The cure; nothing where that is not the reason.
        """
        if not isinstance(error, ImportError) or not error.name:
            return ""
        top = error.name.partition(".")[0]
        spec = getattr(sys.modules.get(top), "__spec__", None)
        places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
        found = [Path(place) for place in places if place]
        for folder in self.folders:
            for mine in (Path(folder, f"{top}.py"), Path(folder, top)):
                if found and mine.exists() and not any(f.is_relative_to(folder) for f in found):
                    return (
                        f"The installed module {top!r} ({found[0]}) comes before {mine}: rename "
                        "yours"
                    )
        return ""


_OWN = _OwnFolders()


@contextmanager
def own_folders_in_path() -> Iterator[None]:
    """Appends the folders of the user's code to `sys.path` while processes are started.

    A process that is spawned takes over `sys.path`, and nothing else of how modules are found.

    Yields:
        Nothing.
    """
    added = [folder for folder in _OWN.folders if folder not in sys.path]
    sys.path.extend(added)
    try:
        yield
    finally:
        for folder in added:
            if folder in sys.path:
                sys.path.remove(folder)


def own_code() -> dict[str, str]:
    """Digests the code that was loaded and is not installed: the user's own, and what it imports.

    Returns:
        For each file the SHA-256 of its content, in the order of their names.
    """
    found = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name == "__main__" or not isinstance(file, str):
            continue
        absolute = file if os.path.isabs(file) else os.path.realpath(file)  # noqa: PTH117
        path = _own_place(absolute)
        if path is None:
            continue
        try:
            found[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError:
            # It may lie in an archive, or be gone.
            continue
    return dict(sorted(found.items()))


# There are thousands of modules, in few folders, and each lies where it lay when it was loaded.
_real = functools.cache(os.path.realpath)


@functools.cache
def _own_place(file: str) -> str | None:
    """Where the file of a module lies, whatever links lead there; none for what is installed."""
    folder, base = os.path.split(file)
    path = f"{_real(folder)}{os.sep}{base}"
    if os.path.islink(path):  # noqa: PTH114
        path = os.path.realpath(path)
    packages = (f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
    installed = path.startswith(_libraries()) or any(part in path for part in packages)
    return None if installed else path


@functools.cache
def _libraries() -> tuple[str, ...]:
    folders = sysconfig.get_path("stdlib"), Path(__file__).parent
    return tuple(f"{_real(folder)}{os.sep}" for folder in folders)


def call(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    options: Mapping[str, Any],
    where: str,
    *,
    also: Sequence[str] = (),
) -> Any:
    """Calls what a spec names, and tells an argument that it does not take from a failure in it.

    Args:
        function: The callable found.
        arguments: Its positional arguments.
        options: Its keyword arguments.
        where: The spec, for the errors.
        also: Keys of the spec that the caller takes itself, for the errors.

    Returns:
        What the callable returns.

    Raises:
        SpecError: A key is unknown or missing.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return function(*arguments, **options)
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        keys = [
            p.name
            for p in signature.parameters.values()
            if p.kind in {p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD}
        ]
        keys += also
        raise SpecError(f"{where}: {error}", f"It takes {', '.join(keys) or 'no keys'}") from None
    return function(*arguments, **options)
