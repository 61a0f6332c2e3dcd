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

__all__ = ["Prompt", "PromptSet", "default_prompts_path", "load_prompts", "read_rows"]

# Columns that hold what a policy must not be given: the loss reads the policy's own outputs, never a target.
# Only letters are compared, in lower case: "Ground Truth", "ground-truth", "groundTruth" and "answer_2" are all meant.
TARGETS = frozenset(
    ("answer", "answerkey", "answers", "bestanswer", "canonicalsolution", "chosen", "chosenresponse", "completion",
     "completions", "correctanswer", "correctanswers", "expected", "expectedanswer", "expectedoutput",
     "expectedresponse", "finalanswer", "gold", "goldanswer", "goldanswers", "goldlabel", "goldresponse",
     "groundtruth", "groundtruths", "gt", "label", "labels", "output", "outputs", "reference", "referenceanswer",
     "referenceanswers", "referenceoutput", "referenceresponse", "references", "referencesolution", "rejected",
     "rejectedresponse", "response", "responses", "solution", "solutions", "target", "targets")
)  # fmt: skip
SCORER_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})
ROLES = ("system", "user", "assistant", "tool")
_HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")
_TABLE_LINE = re.compile(r"\.[ct]sv:\d+$", re.IGNORECASE)

Content = str | tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Prompt:
    """One input. `content` is text or chat messages; `columns` travel to the scorer; `source` says where it stood."""

    content: Content = field(compare=False)  # two prompts are the same when their ids are
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
        share = 0 < held_out < 1
        count = round(held_out * len(self)) if share else held_out
        if not 0 < count < len(self) or count != int(count):  # the first also refuses NaN
            raise PromptError(
                f"{self.name}: cannot hold out {held_out} of {len(self)} prompts and train on the rest. "
                "Give more prompts, or change held_out."
            )
        count = int(count)
        ranked = sorted(self.prompts, key=lambda p: _keyed("split", seed, p.id))
        chosen = {p.id for p in ranked[:count]}
        train = tuple(p for p in self.prompts if p.id not in chosen)
        return PromptSet(train, self.name), PromptSet(tuple(ranked[:count]), self.name)

    def batch(self, step: int, size: int, seed: int) -> tuple[Prompt, ...]:
        """The prompts of a step: shuffled epochs without repetition, a function of (step, size, seed) alone.

        A remainder of an epoch that fills no batch is left for the next epoch's shuffle.
        """
        if size < 1 or step < 0:
            raise PromptError(
                f"{self.name}: a batch of {size} prompts at step {step}; size is 1 or more, step 0 or more."
            )
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
    if limit is not None and limit < 1:
        raise PromptError(f"limit = {limit} keeps no prompt. Give 1 or more, or leave it out to keep them all.")
    pass_columns = (pass_columns,) if isinstance(pass_columns, str) else pass_columns
    name, rows = _rows(source, split, column)
    prompts: dict[str, Prompt] = {}
    duplicates: list[str] = []
    seen: set[str] = set()
    for where, row in rows:
        if isinstance(row, PromptError):
            raise row
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
        known = nearest(column, row) if row else " The row is empty."
        # A table without a header shows its first prompt as a column's name; that is not the name to give.
        header = " The first line of the file must name the columns." if _TABLE_LINE.search(where) else ""
        raise PromptError(
            f"{where}: no column {column!r}.{known}{header} Name another with prompt_column (column in load_prompts)."
        )
    columns = {key: value for key, value in row.items() if key != column}
    if "set_id" in columns and "outputs" in columns:
        raise PromptError(
            f"{where}: an output set, with what a model wrote for the prompt. Candidates are there to be judged, and "
            "no part of the input-only data set; train on the prompts file that they were sampled from."
        )
    for key, value in columns.items():
        if key in SCORER_ARGUMENTS:
            raise PromptError(f"{where}: the column {key!r} has the name of a scorer's argument; rename it.")
        if re.sub("[^a-z]", "", key.lower()) in TARGETS and key not in passed and not _is_empty(value):
            raise PromptError(
                f"{where}: the column {key!r} looks like a target, and policy learning takes inputs only. If the "
                f'scorer may see it: --pass-columns {key}, or pass_columns = ["{key}"]. Else remove the column.'
            )
    return Prompt(_content(row[column], where, column), columns, where)


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    missing = value is None or (isinstance(value, float) and value != value)  # pandas writes a missing text as NaN
    return missing or (isinstance(value, (list, tuple, dict)) and not value)


def _content(value: Any, where: str, column: str) -> Content:
    if isinstance(value, str):
        if not value.strip():
            raise PromptError(f"{where}: the column {column!r} is blank.")
        return _encodable(value, where, column)
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
        _encodable(message["content"], where, column)
    if value[-1]["role"] == "assistant":
        raise PromptError(
            f"{where}: the messages of {column!r} end with the assistant's; that is a completion, and the policy "
            "writes its own. Remove the last message."
        )
    if not value[-1]["content"].strip():
        raise PromptError(f"{where}: the last message of {column!r} is blank.")
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _encodable(text: str, where: str, column: str) -> str:
    """The text itself; half of a surrogate pair is refused here, because every tokenizer would fail on it later."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where}: the column {column!r} holds half of a surrogate pair at character {error.start + 1}, which is "
            "no text. Write the file again as UTF-8."
        ) from None
    return text


def _keyed(*key: Any) -> bytes:
    return hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()


def read_rows(source: str | Path | Iterable[Mapping[str, Any]]) -> Rows:
    """(where, row) of each row of a file or of memory, targets and all: for files that are no input-only data set.

    In place of a row that cannot be read by itself stands its PromptError, so that it can be left out and counted.
    PromptError is raised, and names the file and the line, where nothing behind it can be read either.
    """
    yield from _rows(source, "train", "prompt")[1]


# -- sources ----------------------------------------------------------------------------------------------------------

Rows = Iterable[tuple[str, Mapping[str, Any] | PromptError]]


def _rows(source: Any, split: str, column: str) -> tuple[str, Rows]:
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
        path = Path(source).expanduser()
    except RuntimeError:  # there is no such user
        raise PromptError(f"{str(source)!r}: no home folder is known for its '~'. Write the path out.") from None
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # a text given for a path is too long for one
        raise PromptError(f"{str(source)[:60]!r} is no path: {error.strerror}. Texts are given as a list.") from None
    if is_folder:
        return path.name, _from_folder(path, split)
    if not exists:
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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1  # of its own bytes: a byte order mark is not among them
        raise PromptError(f"{path.name}:{line}: not UTF-8 (byte {error.start}). Save the file as UTF-8.") from None
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
    # Strict, or a quote that is never closed would make one prompt of the rest of the file.
    reader = csv.reader(io.StringIO(_read(path)), dialect=dialect, strict=True)
    header: list[str] = []
    line, has_rows = 1, False
    try:
        for fields in reader:
            where, line = f"{path.name}:{line}", reader.line_num + 1
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
