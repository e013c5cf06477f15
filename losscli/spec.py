"""Specs of models, data sets and losses on the command line: ``NAME:ARG,key=value,…``."""

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
from dataclasses import dataclass, field, replace
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
    "expand_toml",
    "look_up",
    "quote",
    "read_toml",
    "untrusted",
    "user_code_digests",
    "user_folders_on_path",
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

    The target is ``NAME`` or ``NAME:ARG``. `look_up` splits it, because the name of user code
    (``package.module:callable``) also contains a colon.

    Attributes:
        target: The text before the first comma outside double quotes.
        options: The keys and values after it, in their order.
    """

    target: str
    options: Mapping[str, Value] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Parses a spec.

        Args:
            text: ``NAME``, ``NAME:ARG``, ``NAME,key=value,…`` or ``NAME:ARG,key=value,…``.

        Returns:
            The spec; ``Spec.parse(str(spec)) == spec``.

        Raises:
            SpecError: The text is empty, or a key is invalid, repeated or without a value.
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
                raise SpecError(f"spec {text!r}: the key {key!r} is given twice", "Leave one out")
            options[key] = _value(value, text)
        return cls(target, options)

    def __str__(self) -> str:
        target = self.target if _is_plain(self.target) else quote(self.target)
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
            integers = all(part.isdigit() for part in parts)
            numbers = [int(part) for part in parts] if integers else [float(part) for part in parts]
            # A number that overflows to infinity could not be formatted as a list again.
            return numbers if integers or all(map(math.isfinite, numbers)) else text
        value = tomllib.loads(f"v = {text}")
    except (ValueError, RecursionError):  # TOML errors, thousands of digits or of brackets
        return text
    if value.keys() == {"v"} and type(value["v"]) in {bool, int, float}:
        number: Scalar = value["v"]
        return number
    return text


def _toml(text: str, where: str) -> str:
    try:
        if not re.fullmatch(_QUOTED, text, re.DOTALL):
            raise ValueError("a double quote is missing or misplaced")  # noqa: TRY301
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
        The content.

    Raises:
        SpecError: The file cannot be read or is not valid TOML.
    """
    try:
        return tomllib.loads(read_regular(file).decode("utf-8"))
    except IrregularError as error:
        raise SpecError(f"{file} cannot be read: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        fix = {
            UnicodeDecodeError: "Save it as UTF-8",
            tomllib.TOMLDecodeError: "Correct it: the file must be valid TOML",
            RecursionError: "Nest its lists less deeply",
            ValueError: "Write shorter numbers in it",
        }.get(type(error), "Give a file of TOML that can be read")
        raise SpecError(f"{file} cannot be read: {one_line(error)}", fix) from None


def expand_toml(
    text: str, *, trusted: bool, folder: Path | None = None
) -> tuple[str, bool, Path | None]:
    """Replaces the name of a TOML file by the spec in that file.

    The file has a line ``name = "NAME"`` or ``name = "NAME:ARG"``, and one line per key.

    Args:
        text: A spec, or the name of a TOML file.
        trusted: Whether the text comes from the command line.
        folder: The folder of relative paths; by default the current folder.

    Returns:
        The spec; whether it may name code, which is False for a spec from a file; and the folder
        of relative paths in it, which is the file's folder for a spec from a file.

    Raises:
        SpecError: The file cannot be read, or a value cannot be written in a spec.
    """
    target, options = (spec := Spec.parse(text)).target, spec.options
    if not target.endswith(".toml") or ":" in target:
        return text, trusted, folder
    file = Path(folder or "", target)
    if options:
        raise SpecError(
            f"spec {text!r}: keys cannot follow the name of a TOML file", f"Write them into {file}"
        )
    content = read_toml(file)
    name = content.pop("name", None)
    if not isinstance(name, str) or not name or name.endswith(".toml"):
        raise SpecError(
            f"{file} has no valid name", 'It needs a line such as name = "mnist:FOLDER"'
        )
    for key, value in content.items():
        if not _KEY.fullmatch(key):
            raise SpecError(
                f"{file}: {key!r} is not a valid key", "Keys are identifiers, such as width"
            )
        content[key] = _from_toml(value, f"{file}: {key}")
    return str(Spec(name, content)), False, file.parent


def _from_toml(value: Any, where: str) -> Value:
    """Converts a TOML value to one that can be written in a spec; refuses any other."""
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
        f"{where} cannot be written in a spec",
        "Give true or false, a number, a string, or a list of numbers that are not negative",
    )


def _is_plain(text: str) -> bool:
    return "," not in text and '"' not in text and text.isprintable()


def quote(text: str) -> str:
    """Quotes a string for TOML.

    Args:
        text: The string.

    Returns:
        A basic string of TOML.
    """
    return f'"{"".join(map(_escape, text))}"'


def _escape(character: str) -> str:
    if character in {'"', "\\"}:
        return f"\\{character}"
    # TOML has no escapes for surrogates, which represent undecodable bytes in file names.
    if character.isprintable() or "\ud800" <= character <= "\udfff":
        return character
    return f"\\U{ord(character):08x}"


def _format(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "-".join(str(v) for v in value)
    if isinstance(value, str):
        return value if _is_plain(value) and _value(value, "") == value else quote(value)
    return repr(value)


def look_up(
    spec: Spec,
    registry: Mapping[str, Callable[..., Any]],
    kind: str,
    *,
    trusted: bool,
    source: str = "a file",
    folder: Path | None = None,
    cure: str = "",
    runs_code: Collection[str] = (),
) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """Finds the callable that a spec names: an entry of a registry, or user code.

    Args:
        spec: The spec.
        registry: The entries by name.
        kind: The kind of the entries ("model", "data", …), for the errors.
        trusted: Whether the spec may name code, which is imported and thereby run.
        source: The source of a spec that is not from the command line.
        folder: The folder of relative paths and of modules; by default the current folder.
        cure: How the source can become trusted, if it can.
        runs_code: Entries that run code in a file, and so need a trusted spec.

    Returns:
        The callable and its positional arguments: ``(ARG,)``, or ``()`` without ARG.

    Raises:
        SpecError: No entry has this name, or the code does not exist or cannot be imported.
        UntrustedCodeError: The spec names code and is not trusted.
    """
    name, _, argument = spec.target.partition(":")
    if name in registry and (trusted or name not in runs_code):
        return registry[name], ((argument,) if argument else ())
    module, _, rest = spec.target.partition(":")
    attribute, _, argument = rest.partition(":")
    if name not in registry and not (
        _CALLABLE.fullmatch(attribute) and _may_be_code(module, folder)
    ):
        close = difflib.get_close_matches(name, registry, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        with contextlib.suppress(OSError):  # of a name that is too long for a path
            if Path(folder or "", spec.target).exists():
                before, after = ("", ":NAME") if spec.target.endswith(".py") else ("NAME:", "")
                hint = f"To use this path, write {before}{spec.target}{after}. "
        raise SpecError(
            f"unknown {kind} {name!r}",
            f"{hint}Give one of {', '.join(registry)}, or your own code as "
            "package.module:callable or path/to/file.py:callable",
        )
    if not trusted:
        what = f"{source} names code to run as its {kind}, {str(spec)!r}"
        raise untrusted(what, kind, _from_here(spec, folder, runs_code), cure)
    return _load(module, attribute, kind, folder), ((argument,) if argument else ())


def untrusted(what: str, kind: str, spec: Spec, cure: str) -> UntrustedCodeError:
    """Returns the error of a spec from a file that only a trusted source may have.

    Args:
        what: What the file names.
        kind: The kind of the spec.
        spec: The spec, with paths relative to the current folder.
        cure: How the file can become trusted, if it can.

    Returns:
        The error.
    """
    option = f"write --{kind} {shlex.quote(str(spec))}"
    if cure:
        return UntrustedCodeError(f"{what}, and is not trusted", f"{cure}, or {option}")
    return UntrustedCodeError(
        f"{what}, and code is run only when the command line names it", f"If you trust it, {option}"
    )


def _from_here(spec: Spec, folder: Path | None, runs_code: Collection[str]) -> Spec:
    """Makes the path of a file of code relative to the current folder."""
    name, colon, rest = spec.target.partition(":")
    if folder is not None and name.endswith(".py"):
        name = os.path.relpath(folder / name)
    elif folder is not None and name in runs_code:
        rest = os.path.relpath(folder / rest)
    return replace(spec, target=f"{name}{colon}{rest}")


def _may_be_code(module: str, folder: Path | None) -> bool:
    """Whether a name can be that of a module rather than a typing error. Runs no code."""
    path = Path(folder or "", module)
    try:
        exists = path.with_name(f"{path.name}.py").exists() or path.is_dir()
    except OSError:  # the name is too long for a file
        return False
    if exists or "." in module or module in sys.modules:
        return True
    return module.isidentifier() and importlib.util.find_spec(module) is not None


def _load(module: str, attribute: str, kind: str, folder: Path | None) -> Callable[..., Any]:
    where = f"{kind} {module}:{attribute}"
    base = Path.cwd() if folder is None else folder
    try:
        with _forbid_argument_parsing():
            if module.endswith(".py"):
                loaded = _load_file(module, base, where)
            else:
                _USER_FOLDERS.add(str(base))
                _check_loaded(module.partition(".")[0], base, f"{where}:")
                loaded = importlib.import_module(module)
    except SpecError:
        raise
    except _ArgumentsError as error:
        raise SpecError(
            f"{where}: it parses the command line while it is imported ({error})",
            'Put the code of the script under if __name__ == "__main__":',
        ) from error
    except ModuleNotFoundError as error:
        missing = f"no module named {error.name!r}" if error.name else one_line(error)
        raise SpecError(
            f"{where}: {missing}",
            _USER_FOLDERS.shadowing_hint(error) or "Install it, or give a path to a .py file",
        ) from error
    except (Exception, SystemExit) as error:  # a script may exit
        command = (
            f"python {shlex.quote(module)}" if module.endswith(".py") else f"python -m {module}"
        )
        raise SpecError(
            f"{where}: importing it failed: {one_line(error)}",
            _USER_FOLDERS.shadowing_hint(error)
            or _package_hint(error, base / module, attribute, kind)
            or f"Run it on its own: {command}",
        ) from error
    found: Any = loaded
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        names = [name for name, value in vars(loaded).items() if callable(value)]
        close = difflib.get_close_matches(attribute, names, n=1)
        raise SpecError(
            f"{where}: the module has no {attribute!r}",
            f"Did you mean {close[0]!r}?" if close else "Name a function or class in it",
        ) from None
    except Exception as error:  # a module may define __getattr__
        raise SpecError(f"{where}: importing it failed: {one_line(error)}") from error
    if not callable(found):
        raise SpecError(
            f"{where} is a {type(found).__name__}, not a callable",
            "Name a function or class",
        )
    return found  # type: ignore[no-any-return]


class _ArgumentsError(SystemExit):
    """User code parses the command line arguments, which belong to losscli."""


@contextmanager
def _forbid_argument_parsing() -> Iterator[None]:
    """Makes errors of argparse raise, instead of printing the usage and exiting."""

    def error(self: argparse.ArgumentParser, message: str) -> NoReturn:
        raise _ArgumentsError(f"{self.prog}: {message}")

    before = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = error  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.error = before  # type: ignore[method-assign]


def _package_hint(error: BaseException, path: Path, attribute: str, kind: str) -> str:
    """Returns a fix for a file with relative imports; empty for other errors."""
    if not isinstance(error, ImportError) or "relative import" not in str(error):
        return ""
    path = path.with_suffix("")
    with contextlib.suppress(ValueError):
        path = path.resolve().relative_to(Path.cwd().resolve())
    if path.is_absolute() or len(path.parts) < 2 or not all(map(str.isidentifier, path.parts)):
        return "Name it as a module, from the folder above its package: package.module:callable"
    return f"Name it as a module of its package: --{kind} {'.'.join(path.parts)}:{attribute}"


def _load_file(name: str, folder: Path, where: str) -> Any:
    path = folder / name
    if not path.is_file():
        raise SpecError(f"{where}: there is no file {name}", f"Relative paths start at {folder}")
    absolute = str(path)
    name = f"losscli_user_{path.stem}"
    # Do not replace the module of a file with the same name in another folder.
    while getattr(sys.modules.get(name), "__file__", absolute) != absolute:
        name += "_"
    loader = importlib.util.spec_from_file_location(name, absolute)
    if loader is None or loader.loader is None:
        raise SpecError(f"{where}: {path} is not a Python file")
    module = importlib.util.module_from_spec(loader)
    # Registered before it runs, since dataclasses and pickle look up the module.
    sys.modules[name] = module
    # It can import files of its folder, as a script can.
    _USER_FOLDERS.add(str(path.resolve().parent))
    _check_neighbours(path.resolve(), where)
    loader.loader.exec_module(module)
    return module


def _check_neighbours(path: Path, where: str) -> None:
    """Checks that a file's imports from its own folder do not get modules of another folder."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError, RecursionError):
        return  # importing it raises the error
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    for name in sorted({name.partition(".")[0] for name in names}):
        _check_loaded(name, path.parent, f"{where}: it imports {name!r}, and")


def _check_loaded(name: str, folder: Path, where: str) -> None:
    """Checks that a module in a folder would not be taken from another folder of the user."""
    loaded = getattr(sys.modules.get(name), "__file__", None)
    found = importlib.machinery.PathFinder.find_spec(name, [str(folder)])
    neighbour = found and found.origin
    if (
        neighbour
        and loaded
        and os.path.realpath(neighbour) != os.path.realpath(loaded)
        and _is_user_code(loaded)
    ):
        raise SpecError(
            f"{where} Python loads only one module of each name: {loaded}, not {neighbour}",
            "Rename one of them, or put both into one folder",
        )


def _is_user_code(file: str) -> bool:
    """Whether a loaded file is user code, and not part of an installed package."""
    path = Path(os.path.realpath(file))
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not installed and any(path.is_relative_to(folder) for folder in _USER_FOLDERS.folders)


class _UserFolders(importlib.abc.MetaPathFinder):
    """Finds modules in the folders of user code, after all installed modules.

    This is the last finder, so a file matplotlib.py next to user code never replaces the library,
    and `sys.path` does not change.

    Attributes:
        folders: The folders, the most recently added first.
    """

    def __init__(self) -> None:
        self.folders: list[str] = []

    def add(self, folder: str) -> None:
        """Adds a folder before the others."""
        self.folders = [folder, *(f for f in self.folders if f != folder)]
        if self not in sys.meta_path:
            sys.meta_path.append(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        # Submodules are found through their package.
        if path is not None or self._is_imported_by_losscli():
            return None
        return importlib.machinery.PathFinder.find_spec(fullname, self.folders, target)

    def _is_imported_by_losscli(self) -> bool:
        """Whether losscli itself imports: a user folder must not replace a missing library."""
        frame: FrameType | None = sys._getframe(2)
        while frame and frame.f_globals.get("__name__", "").startswith("importlib"):
            frame = frame.f_back
        name = frame.f_globals.get("__name__", "") if frame else ""
        return name.startswith("losscli.") and name != __name__

    def shadowing_hint(self, error: BaseException) -> str:
        """Returns a fix for an import that found an installed module instead of user code.

        Args:
            error: The error of the import.

        Returns:
            The fix; empty for other causes.
        """
        if not isinstance(error, ImportError) or not error.name:
            return ""
        top = error.name.partition(".")[0]
        spec = getattr(sys.modules.get(top), "__spec__", None)
        origins = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
        found = [Path(origin) for origin in origins if origin]
        for folder in self.folders:
            for user_path in (Path(folder, f"{top}.py"), Path(folder, top)):
                if (
                    found
                    and user_path.exists()
                    and not any(f.is_relative_to(folder) for f in found)
                ):
                    return (
                        f"The installed module {top!r} ({found[0]}) is used instead of "
                        f"{user_path}: rename yours"
                    )
        return ""


_USER_FOLDERS = _UserFolders()


@contextmanager
def user_folders_on_path() -> Iterator[None]:
    """Appends the folders of user code to `sys.path` while processes start.

    A spawned process inherits `sys.path`, but not the finders of modules.

    Yields:
        Nothing.
    """
    added = [folder for folder in _USER_FOLDERS.folders if folder not in sys.path]
    sys.path.extend(added)
    try:
        yield
    finally:
        for folder in added:
            if folder in sys.path:
                sys.path.remove(folder)


def user_code_digests() -> dict[str, str]:
    """Computes the SHA-256 of each loaded Python file that is not installed.

    Returns:
        The hexadecimal digests by file path, sorted by path.
    """
    digests = {}
    for name in _modules():
        file = getattr(sys.modules.get(name), "__file__", None)
        if name == "__main__" or not isinstance(file, str):
            continue
        path = _user_file(file if file.startswith(os.sep) else os.path.realpath(file))
        if path is None:
            continue
        try:
            digests[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError:
            # It may be in an archive, or deleted.
            continue
    return dict(sorted(digests.items()))


def _modules() -> Collection[str]:
    return list(sys.modules)


# There are thousands of modules in few folders, and a module stays in the file it was loaded from.
_real_path = functools.cache(os.path.realpath)


@functools.cache
def _user_file(file: str) -> str | None:
    """Returns the real path of a module's file; None if the module is installed."""
    folder, base = os.path.split(file)
    path = f"{_real_path(folder)}{os.sep}{base}"
    if os.path.islink(path):  # noqa: PTH114
        path = os.path.realpath(path)
    packages = (f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
    installed = path.startswith(_library_folders()) or any(part in path for part in packages)
    return None if installed else path


@functools.cache
def _library_folders() -> tuple[str, ...]:
    folders = sysconfig.get_path("stdlib"), Path(__file__).parent
    return tuple(f"{_real_path(folder)}{os.sep}" for folder in folders)


def call(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    options: Mapping[str, Any],
    where: str,
    *,
    also: Sequence[str] = (),
) -> Any:
    """Calls the callable that a spec names, after checking the arguments against its signature.

    Args:
        function: The callable.
        arguments: The positional arguments.
        options: The keyword arguments.
        where: The spec, for the errors.
        also: Additional keys of the spec that the caller handles, for the errors.

    Returns:
        The result of the callable.

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
