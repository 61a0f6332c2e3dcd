"""Code that a person names: `"path/file.py:name"` or `"package.module:name"`, loaded by the same rules everywhere.

Losses are loaded here in this process, scorers in a process of their own, which reads this file by itself: standard
library only. Neighbors of a file can be imported, and processes that the code starts find its functions again.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["LoadFailure", "describe_error", "load_object"]


class LoadFailure(Exception):
    """Something that cannot be loaded; `name` was looked for among `known` (both empty for other failures)."""

    def __init__(self, message: str, name: str = "", known: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.name = name
        self.known = sorted(known)


def load_object(path: str, *, as_main: bool = False) -> Any:
    """The object at `"file.py:name"` or `"package.module:name"` (the name may be dotted). Raises LoadFailure.

    as_main: this process is the code's own, so a file becomes its `__main__`, as multiprocessing's children know it.
    """
    place, _, attribute = path.rpartition(":")
    is_file = place.endswith(".py") or os.sep in place
    if not attribute or not (is_file or all(place.split("."))):
        raise LoadFailure("that is no 'path/file.py:function' and no 'module:function'.")
    try:
        module = _import_file(Path(place).expanduser(), as_main) if is_file else _import_module(place)
    except (LoadFailure, KeyboardInterrupt):
        raise
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise LoadFailure(f"{error.filename}, line {error.lineno}: {error.msg}: {line!r}") from error
    except BaseException as error:  # a module may do anything while it is imported, sys.exit() included
        raise LoadFailure(f"importing {place} raised {describe_error(error)}") from error
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise LoadFailure(f"{place} has no {part!r}.", part, _public_callables(value))
        value = getattr(value, part)
    return value


def describe_error(error: BaseException) -> str:
    """`"KeyError: 'answer' (scorer.py, line 12)"`."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _import_file(file: Path, as_main: bool) -> ModuleType:
    if file.is_dir():
        raise LoadFailure(f"{str(file)!r} is a folder; write the .py file in it that holds the function.")
    if not file.is_file():
        beside = [str(p) for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise LoadFailure(f"there is no file {str(file)!r} (looked from {Path.cwd()}).", str(file), beside)
    file = file.resolve()
    # Its neighbors can be imported, but none of them, nor itself, hides a module of the standard library.
    library = {str(Path(os.__file__).parent), str(Path(os.__file__).parent / "lib-dynload")}
    after = max((k for k, entry in enumerate(sys.path) if entry in library), default=-1) + 1
    if str(file.parent) not in sys.path:
        sys.path.insert(after, str(file.parent))
        importlib.invalidate_caches()
    if as_main:
        # A process pool can then start by any method: spawn and forkserver load the parent's `__main__` from its file,
        # under the name `__mp_main__`. A block under `if __name__ == "__main__"` does not run.
        return _execute("__mp_main__", file, "__main__")
    if _is_at(file.stem, file):  # under its own name, a process started here can import it too
        return importlib.import_module(file.stem)
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    return sys.modules[name] if name in sys.modules else _execute(name, file)


def _is_at(name: str, file: Path) -> bool:
    """Whether importing the name gives the file, and no module that another file has given this name."""
    if not name.isidentifier():
        return False
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module that somebody made by hand
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file


def _execute(name: str, file: Path, *other_names: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(name, str(file))
    module = ModuleType(name)
    module.__file__ = str(file)
    names = (name, *other_names)
    sys.modules.update(dict.fromkeys(names, module))
    try:
        loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _import_module(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))  # a console command has no current folder on its path
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise LoadFailure(
                f"there is no module {error.name!r}. Give a file as 'path/file.py:function', or start from the "
                "folder that holds the module."
            ) from error
        raise


def _public_callables(place: Any) -> list[str]:
    return [
        name for name, value in getattr(place, "__dict__", {}).items() if callable(value) and not name.startswith("_")
    ]
