"""x ~ D: the input-only data set. Prompts and whatever the scorer may want to know of them, and no gold answers."""

from __future__ import annotations

import csv
import hashlib
import importlib.resources
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lossmith.errors import PromptError, nearest

__all__ = ["Prompt", "PromptSet", "default_prompts_path", "load_prompts"]

# Columns that hold what a policy must not be given: the loss reads the policy's own outputs, never a target.
TARGETS = frozenset(
    ("answer", "answers", "chosen", "completion", "completions", "gold", "gold_answer", "ground_truth", "groundtruth",
     "label", "labels", "output", "outputs", "reference", "reference_answer", "rejected", "response", "responses",
     "solution", "solutions", "target", "targets")
)  # fmt: skip
SCORER_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})
ROLES = ("system", "user", "assistant", "tool")
_HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")

Content = str | tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Prompt:
    """One input. `content` is text or chat messages; `columns` travel to the scorer; `source` says where it stood."""

    content: Content
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)
    source: str = field(default="memory", compare=False)
    id: str = field(init=False)  # 16 hex digits of the sha256 of the content, whatever the file and its order

    def __post_init__(self) -> None:
        content = self.content if isinstance(self.content, str) else [dict(m) for m in self.content]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
        object.__setattr__(self, "id", hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16])

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def messages(self) -> tuple[Mapping[str, str], ...]:
        """Chat messages: the content, or the text as one user message."""
        return ({"role": "user", "content": self.content},) if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """What a person reads: the text, or the last user message."""
        users = [m["content"] for m in self.messages if m["role"] == "user"]
        return users[-1] if users else self.messages[-1]["content"]


@dataclass(frozen=True)
class PromptSet:
    """Distinct prompts, in the order of their file."""

    prompts: tuple[Prompt, ...]
    name: str
    duplicates: tuple[str, ...] = ()  # where the exact repetitions stood that were left out

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def split(self, held_out: int | float, seed: int) -> tuple[PromptSet, PromptSet]:
        """(train, held out). held_out: a number of prompts, or a share below 1. Depends on seed and content alone."""
        count = round(held_out * len(self)) if held_out < 1 else int(held_out)
        if not 0 < count < len(self):
            raise PromptError(
                f"{self.name}: cannot hold out {held_out} of {len(self)} prompts and train on the rest. "
                "Give more prompts, or change held_out."
            )
        ranked = sorted(self.prompts, key=lambda p: _keyed("split", seed, p.id))
        chosen = {p.id for p in ranked[:count]}
        train = tuple(p for p in self.prompts if p.id not in chosen)
        return PromptSet(train, self.name), PromptSet(tuple(ranked[:count]), self.name)

    def batch(self, step: int, size: int, seed: int) -> tuple[Prompt, ...]:
        """The prompts of a step: shuffled epochs without repetition, a function of (step, size, seed) alone.

        A remainder of an epoch that fills no batch is left for the next epoch's shuffle.
        """
        if size > len(self):
            raise PromptError(f"{self.name}: a step asks for {size} prompts, but only {len(self)} are there.")
        per_epoch = len(self) // size
        epoch, place = divmod(step, per_epoch)
        order = sorted(self.prompts, key=lambda p: _keyed("epoch", seed, epoch, p.id))
        return tuple(order[place * size : (place + 1) * size])

    def summary(self) -> str:
        """How many there are, what was left out, and which columns travel to the scorer."""
        line = f"{len(self)} prompts from {self.name}"
        columns = sorted({name for p in self.prompts for name in p.columns})
        if columns:
            line += f"; to the scorer: {', '.join(columns)}"
        if self.duplicates:
            shown = ", ".join(self.duplicates[:3]) + (", ..." if len(self.duplicates) > 3 else "")
            line += f"\n{len(self.duplicates)} exact duplicates left out ({shown})"
        return line


def default_prompts_path() -> Path:
    """The shipped prompts."""
    return Path(str(importlib.resources.files("lossmith").joinpath("data/prompts.jsonl")))


def load_prompts(
    source: str | Path | Iterable[str | Mapping[str, Any]],
    *,
    pass_columns: Sequence[str] = (),
    column: str = "prompt",
    split: str = "train",
    limit: int | None = None,
) -> PromptSet:
    """Read prompts from a file (JSONL, JSON, CSV, TSV, TXT, parquet), a `datasets` folder, a hub name, or memory.

    pass_columns: target-like columns (answer, label, ...) that the scorer may see; without it they are refused.
    PromptError names the file, the line or row, and the column.
    """
    name, rows = _rows(source, split, column)
    prompts: dict[str, Prompt] = {}
    duplicates: list[str] = []
    seen: set[str] = set()
    for where, row in rows:
        prompt = _prompt(row, where, column, pass_columns)
        seen |= row.keys()
        if prompt.id in prompts:
            duplicates.append(where)
        elif limit is None or len(prompts) < limit:
            prompts[prompt.id] = prompt
    if not prompts:
        raise PromptError(f"{name} holds no prompt.")
    for wanted in pass_columns:
        if wanted not in seen:
            raise PromptError(f"{name}: pass_columns names {wanted!r}, which no row has.{nearest(wanted, seen)}")
    return PromptSet(tuple(prompts.values()), name, tuple(duplicates))


# -- one row ----------------------------------------------------------------------------------------------------------


def _prompt(row: Mapping[str, Any], where: str, column: str, passed: Sequence[str]) -> Prompt:
    if column not in row:
        raise PromptError(f"{where}: no column {column!r}.{nearest(column, row)} Name another with prompt_column.")
    columns = {key: value for key, value in row.items() if key != column}
    for key, value in columns.items():
        if key.lower() in TARGETS and key not in passed and value not in (None, "", [], {}):
            raise PromptError(
                f"{where}: the column {key!r} looks like a target, and policy learning takes inputs only. If the "
                f'scorer may see it: --pass-columns {key}, or pass_columns = ["{key}"]. Else remove the column.'
            )
        if key in SCORER_ARGUMENTS:
            raise PromptError(f"{where}: the column {key!r} has the name of a scorer's argument; rename it.")
    return Prompt(_content(row[column], where, column), columns, where)


def _content(value: Any, where: str, column: str) -> Content:
    if isinstance(value, str):
        if not value.strip():
            raise PromptError(f"{where}: the column {column!r} is blank.")
        return value
    if not isinstance(value, (list, tuple)):
        raise PromptError(
            f"{where}: the column {column!r} holds {type(value).__name__}, but a prompt is text or a "
            "list of chat messages."
        )
    if not value:
        raise PromptError(f"{where}: the column {column!r} holds an empty list of messages.")
    for number, message in enumerate(value, 1):
        ok = isinstance(message, Mapping) and isinstance(message.get("content"), str)
        if not ok or message.get("role") not in ROLES:
            raise PromptError(
                f"{where}: message {number} of {column!r} must be {{'role': one of {', '.join(ROLES)}, "
                f"'content': text}}, not {str(message)[:80]}."
            )
    if value[-1]["role"] == "assistant":
        raise PromptError(
            f"{where}: the messages of {column!r} end with the assistant's; that is a completion, and the policy "
            "writes its own. Remove the last message."
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _keyed(*key: Any) -> bytes:
    return hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()


# -- sources ----------------------------------------------------------------------------------------------------------

Rows = Iterable[tuple[str, Mapping[str, Any]]]


def _rows(source: Any, split: str, column: str) -> tuple[str, Rows]:
    """(name, (where, row) pairs)."""
    if not isinstance(source, (str, Path)):
        items = [{column: item} if isinstance(item, (list, tuple)) else item for item in source]
        return "memory", _checked(((f"memory:{i}", item) for i, item in enumerate(items, 1)), column)
    path = Path(source).expanduser()
    if path.is_dir():
        return path.name, _from_folder(path, split)
    if not path.exists():
        return str(source), _from_hub(str(source), path, split)
    readers = {
        ".jsonl": _from_jsonl,
        ".ndjson": _from_jsonl,
        ".json": _from_json,
        ".csv": _from_csv,
        ".tsv": _from_csv,
        ".txt": _from_text,
        ".parquet": _from_parquet,
    }
    if path.suffix.lower() not in readers:
        raise PromptError(
            f"{path}: prompts are read from {', '.join(readers)} files, not {path.suffix or 'no suffix'!r}."
        )
    return path.name, _checked(readers[path.suffix.lower()](path), column)


def _checked(rows: Iterable[tuple[str, Any]], column: str) -> Rows:
    for where, row in rows:
        if isinstance(row, str):
            row = {column: row}
        if not isinstance(row, Mapping):
            raise PromptError(f"{where}: a row must be an object with a prompt, not {type(row).__name__}.")
        yield where, row


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line) of each line that is not blank."""
    for number, line in enumerate(_read(path).split("\n"), 1):  # splitlines would also cut at U+2028, inside a row
        if line.strip():
            yield f"{path.name}:{number}", line


def _read(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PromptError(f"{path.name}:{line}: not UTF-8 (byte {error.start}). Save the file as UTF-8.") from None
    if not text.strip():
        raise PromptError(f"{path.name} is empty.")
    return text


def _from_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(path):
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{where}: not JSON: {error.msg} at column {error.colno}. One object a line.") from None


def _from_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        data = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise PromptError(f"{path.name}:{error.lineno}: not JSON: {error.msg} at column {error.colno}.") from None
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
    reader = csv.DictReader(io.StringIO(_read(path)), dialect="excel-tab" if path.suffix.lower() == ".tsv" else "excel")
    for row in reader:
        where = f"{path.name}:{reader.line_num}"
        if None in row or None in row.values():
            raise PromptError(
                f"{where}: the row has not as many fields as the header ({', '.join(reader.fieldnames or [])})."
            )
        yield where, row


def _from_text(path: Path) -> Iterator[tuple[str, str]]:
    yield from ((where, line.strip()) for where, line in _lines(path))


def _from_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptError(f"{path.name} is not a parquet file: {error}") from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path.name}: row {number}", row


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise PromptError("reading a data set needs the datasets library: pip install 'lossmith[datasets]'.") from None
    return datasets


def _from_folder(path: Path, split: str) -> Rows:
    datasets = _datasets()
    try:
        data = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError):
        raise PromptError(
            f"{path} is a folder, but not one that datasets' save_to_disk wrote. Name a file in it."
        ) from None
    return _from_dataset(data, path.name, split)


def _from_hub(name: str, path: Path, split: str) -> Rows:
    near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, near) if near else ""
    if not _HUB_NAME.fullmatch(name) or path.suffix:
        raise PromptError(f"there is no prompt file {name!r}.{hint if 'mean' in hint else ''}")
    datasets = _datasets()
    try:
        return _from_dataset(datasets.load_dataset(name, split=split), name, split)
    except Exception as error:  # the hub's client raises many kinds
        raise PromptError(
            f"there is no file or folder {name!r}, so it was taken as a hub name, and the hub gave no such data set: "
            f"{str(error).splitlines()[0][:200]}"
        ) from None


def _from_dataset(data: Any, name: str, split: str) -> Rows:
    if hasattr(data, "keys"):
        if split not in data:
            raise PromptError(f"{name} has no split {split!r}.{nearest(split, data.keys())}")
        data = data[split]
    return ((f"{name}: row {i}", row) for i, row in enumerate(data, 1))
