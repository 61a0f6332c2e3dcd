"""Tensors that several ranks hold in parts, in a folder: all write at the same time, and any number of ranks reads.

Each rank writes its rows into safetensors files of its own; where these rows begin stands in a file's metadata, as
torch.distributed.checkpoint notes it, whose HuggingFaceStorageReader reads such a folder too. A file without that
holds whole tensors, as one process writes them: there is one reader for both.

The form alone is torch's. Its writer takes twice a rank's part in memory besides, and raises what is no Exception; its
reader leaves numbers that no file holds as they were, changes types, and says nothing. Both need torch 2.8.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lossmith.durable.checkpoint import Entries, listed
from lossmith.errors import RunError
from lossmith.files import explain_write_errors, in_groups
from lossmith.policy.sharded import first_row

__all__ = ["SavedTensors", "write_parts"]

_PLACES, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # torch's names
_FILE_BYTES = 2**30  # what is copied from a GPU at one time
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def write_parts(folder: Path, named: Mapping[str, Tensor], rank: int) -> Entries:
    """This rank's rows of the tensors; of one that every rank has whole (a count of steps), rank 0 writes it.

    Returns what a manifest says of the files. RunError: they cannot be written.
    """
    own = {name: (_rows(x), _first(x)) for name, x in named.items() if rank == 0 or hasattr(x, "to_local")}
    sizes = {name: x.numel() * x.element_size() for name, (x, _) in own.items() if x.numel()}
    files = []
    for number, group in enumerate(in_groups(sizes, _FILE_BYTES)):
        file = folder / f"rank-{rank:05d}-{number:05d}.safetensors"
        with explain_write_errors(file):
            parts = {name: own[name][0].contiguous() for name in group}
            places = {name: {_OFFSETS: [own[name][1], *[0] * x.ndim][: x.ndim]} for name, x in parts.items()}
            save_file(parts, file, metadata={"format": "pt", _PLACES: json.dumps(places)})
        files.append(file)
    with explain_write_errors(folder):
        return listed(files)


@dataclass(frozen=True)
class _Piece:
    """Rows of a tensor, in one file. A number alone counts as one row."""

    name: str
    first: int
    rows: int


class SavedTensors:
    """What the safetensors files of a folder hold, whichever number of ranks wrote them.

    kinds: shape and type of each, whole. RunError: a type that no state has.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kinds: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._files: dict[Path, list[_Piece]] = defaultdict(list)
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                places = json.loads((opened.metadata() or {}).get(_PLACES, "{}"))
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    part = opened.get_slice(name)
                    self._add(file, name, part.get_shape(), part.get_dtype(), places.get(name, {}).get(_OFFSETS))

    def _add(self, file: Path, name: str, shape: list[int], kind: str, offsets: list[int] | None) -> None:
        if kind not in _TYPES:
            raise RunError(f"{file} holds {name} as {kind}, which no checkpoint does.")
        first, rows = (offsets or [0])[0] if shape else 0, shape[0] if shape else 1
        self._files[file].append(_Piece(name, first, rows))
        known = self.kinds.get(name, (torch.Size(shape), None))[0]
        whole = torch.Size([max(first + rows, *known[:1]), *shape[1:]]) if shape else torch.Size()
        self.kinds[name] = whole, _TYPES[kind]

    @torch.no_grad()
    def read_into(self, named: Mapping[str, Tensor]) -> None:
        """Fill these; of one in parts, this rank's rows, and nothing else of it is read.

        RunError: no file holds some of its rows.
        """
        wanted = {name: (_rows(x), _first(x)) for name, x in named.items()}
        filled: Counter[str] = Counter()
        for file, pieces in self._files.items():
            with safe_open(file, "pt") as opened:
                for piece in pieces:
                    if piece.name in wanted:
                        filled[piece.name] += _fill(*wanted[piece.name], opened, piece)
        for name, (x, _) in wanted.items():
            if filled[name] != (len(x) if x.ndim else 1):
                raise RunError(f"{self.folder} does not hold all of {name}.")


def _fill(x: Tensor, start: int, opened: Any, piece: _Piece) -> int:
    """How many rows of x, which begins with row `start` of the whole tensor, this piece has; they are copied."""
    if not x.ndim:
        x.copy_(opened.get_tensor(piece.name))
        return 1
    low, high = max(piece.first, start), min(piece.first + piece.rows, start + len(x))
    if low >= high:
        return 0
    x[low - start : high - start].copy_(opened.get_slice(piece.name)[low - piece.first : high - piece.first])
    return high - low


def _rows(x: Any) -> Tensor:
    """Those of this rank, where ranks hold it in parts; else all."""
    x = x.detach()
    rows: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return rows


def _first(x: Any) -> int:
    return first_row(x) if hasattr(x, "to_local") else 0
