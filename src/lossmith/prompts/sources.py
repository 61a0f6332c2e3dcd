"""Where rows come from: files of any kind, a `datasets` folder, the hub, or memory. Each row with its place."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lossmith.errors import PromptError, nearest
from lossmith.files import at_home, read_text
from lossmith.terminal import bars_are_seen

__all__ = ["READERS", "read_rows", "rows_of"]

_HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")

Rows = Iterable[tuple[str, Mapping[str, Any] | PromptError]]


def read_rows(source: str | Path | Iterable[Mapping[str, Any]]) -> Rows:
    """(where, row) of each row of a file or of memory, targets and all: for files that are no input-only data set.

    A row that cannot be read is replaced by its PromptError, so that it can be left out and counted. PromptError is
    raised, and names the file and the line, where nothing after it can be read either.
    """
    yield from rows_of(source, "train", "prompt")[1]


def rows_of(source: Any, split: str, column: str) -> tuple[str, Rows]:
    """(name, (where, row) pairs)."""
    if not isinstance(source, (str, Path)):
        # Iterating over a mapping or a pandas frame gives the names of its columns, which would pass for prompts.
        if isinstance(source, Mapping) or hasattr(source, "iterrows") or not isinstance(source, Iterable):
            raise PromptError(
                f"prompts are read from a path, a hub name, or a list of texts or rows, not {type(source).__name__}. "
                'Of a data frame, give .to_dict("records").'
            )
        items = [{column: item} if isinstance(item, (list, tuple)) else item for item in source]
        return "memory", _checked(((f"memory:{i}", item) for i, item in enumerate(items, 1)), column)
    try:
        path = at_home(source, PromptError)
    except PromptError as error:  # a text given for a path is too long for one, say
        raise PromptError(f"{error} A path names a file of prompts; texts are given as a list.") from None
    if path.is_dir():
        return path.name, _from_folder(path, split)
    if not path.exists():
        return str(source), _from_hub(str(source), path, split)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise PromptError(
            f"{path}: prompts are read from {', '.join(READERS)} files, not {path.suffix or 'no suffix'!r}."
        )
    return path.name, _checked(READERS[suffix](path), column)


def _checked(rows: Iterable[tuple[str, Any]], column: str) -> Rows:
    """Rows whose keys are texts, or what is wrong with them; a bare text is a row of `column` alone."""
    for where, row in rows:
        if isinstance(row, str):
            row = {column: row}
        strange = [key for key in row if not isinstance(key, str)] if isinstance(row, Mapping) else []
        if strange:
            kind = type(strange[0]).__name__
            row = PromptError(f"{where}: the column name {strange[0]!r} is {kind}, not text; rename it.")
        elif not isinstance(row, Mapping | PromptError):
            row = PromptError(f"{where}: a row must be an object with a prompt, not {type(row).__name__}.")
        yield where, row


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line) of each line that is not blank."""
    for number, line in enumerate(_read(path).split("\n"), 1):  # splitlines would also cut at U+2028, inside a row
        if line.strip():
            yield f"{path.name}:{number}", line


def _read(path: Path) -> str:
    text = read_text(path, PromptError, "prompt file")
    if not text.strip():
        raise PromptError(f"{path.name} is empty.")
    return text


def _from_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = PromptError(f"{where}: not JSON: {error.msg} at column {error.colno}. One object a line.")
        except (ValueError, RecursionError) as error:  # a number or a nesting beyond what Python reads
            row = PromptError(f"{where}: not JSON that can be read: {error}.")
        yield where, row


def _from_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        data = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise PromptError(f"{path.name}:{error.lineno}: not JSON: {error.msg} at column {error.colno}.") from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path.name}: not JSON that can be read: {error}.") from None
    if isinstance(data, Mapping):
        lists = [value for value in data.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise PromptError(
                f"{path.name}: an object with {len(lists)} lists; give a list of rows, or one list in it."
            )
        data = lists[0]
    if not isinstance(data, list):
        raise PromptError(f"{path.name}: holds {type(data).__name__}, not a list of rows.")
    for number, row in enumerate(data, 1):
        yield f"{path.name}: row {number}", row


def _from_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows below the header. A row that spans lines is named by its first."""
    dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
    header: list[str] = []
    line, has_rows = 1, False
    try:
        for after, fields in _csv_lines(_read(path), dialect):
            where, line = f"{path.name}:{line}", after + 1
            if not header:
                header = fields
                for name in header:
                    if header.count(name) > 1:
                        raise PromptError(f"{where}: two columns are named {name!r}; rename one in the header.")
            elif fields:
                has_rows = True
                if len(fields) != len(header):
                    yield (
                        where,
                        PromptError(
                            f"{where}: the row has not as many fields as the header: {len(fields)}, not {len(header)} "
                            f"({', '.join(header)}). Quote a field that holds a separator or a line break."
                        ),
                    )
                    continue
                yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise PromptError(
            f"{path.name}:{line}: the row that begins here is no CSV: {error}. Close every quote, and write a quote "
            "inside a quoted field twice."
        ) from None
    if not has_rows:
        raise PromptError(
            f"{path.name} holds no prompt: its one line ({', '.join(header)}) is taken for the header, which names "
            "the columns. Put the rows below it."
        )


def _csv_lines(text: str, dialect: str) -> Iterator[tuple[int, list[str]]]:
    """(number of its last line, fields) of each row."""
    # Strict, or a quote that is never closed would make one prompt of the rest of the file.
    reader = csv.reader(io.StringIO(text), dialect=dialect, strict=True)
    usual = csv.field_size_limit()
    try:
        while True:
            csv.field_size_limit(max(usual, len(text)))  # cells may hold documents; the limit is the whole process's
            fields = next(reader, None)
            csv.field_size_limit(usual)
            if fields is None:
                return
            yield reader.line_num, fields
    finally:
        csv.field_size_limit(usual)


def _from_text(path: Path) -> Iterator[tuple[str, Any]]:
    yield from ((where, line.strip()) for where, line in _lines(path))


def _from_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptError(f"{path.name} is not a parquet file: {error}") from None
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError:
        raise PromptError(f"{path.name}: {_undecodable(table)} is not UTF-8. Write the file again as UTF-8.") from None
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # a date beyond the year 9999, say
        raise PromptError(f"{path.name} holds a value that Python has no type for: {error}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path.name}: row {number}", row


def _undecodable(table: Any) -> str:
    """Which cell of a parquet table cannot be decoded; pyarrow itself does not say."""
    try:
        table.column_names  # noqa: B018
    except UnicodeDecodeError:
        return "the name of a column"
    for name, cells in zip(table.column_names, table.columns, strict=True):
        for number, cell in enumerate(cells, 1):
            try:
                cell.as_py()
            except UnicodeDecodeError:
                return f"row {number}, column {name!r},"
    return "the name of a nested field"


READERS = {
    ".jsonl": _from_jsonl,
    ".ndjson": _from_jsonl,
    ".json": _from_json,
    ".csv": _from_csv,
    ".tsv": _from_csv,
    ".txt": _from_text,
    ".parquet": _from_parquet,
}


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise PromptError("reading a data set needs the datasets library: pip install 'lossmith[datasets]'.") from None
    if not bars_are_seen():
        datasets.disable_progress_bars()
    return datasets


def _from_folder(path: Path, split: str) -> Rows:
    datasets = _datasets()
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # a foreign folder raises FileNotFoundError, a damaged one nearly anything
        raise PromptError(
            f"{path} is a folder, but not one that datasets' save_to_disk wrote, or it is damaged "
            f"({type(error).__name__}). Name a file in it, or save the data set again."
        ) from None
    return _from_dataset(data, path.name, split)


def _from_hub(name: str, path: Path, split: str) -> Rows:
    near = nearest(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
    hint = near if "Did you mean" in near else ""
    if not _HUB_NAME.fullmatch(name) or path.suffix.lower() in READERS:
        raise PromptError(f"there is no prompt file {name!r}.{hint}")
    datasets = _datasets()
    try:
        return _from_dataset(datasets.load_dataset(name, split=split), name, split)
    except Exception as error:  # the hub's client raises many kinds
        raise PromptError(
            f"there is no file or folder {name!r}, so it was taken as a hub name, and the hub gave no such data set: "
            f"{(str(error) or type(error).__name__).splitlines()[0][:200]}.{hint}"
        ) from None


def _from_dataset(data: Any, name: str, split: str) -> Rows:
    if hasattr(data, "keys"):
        if split not in data:
            raise PromptError(f"{name} has no split {split!r}.{nearest(split, data.keys())}")
        data = data[split]
    return ((f"{name}: row {i}", row) for i, row in enumerate(data, 1))
