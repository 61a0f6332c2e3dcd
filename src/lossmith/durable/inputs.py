"""What decided a piece of work, written down at its start, so that a resumed run can say what has changed.

A file is identified by its sha256. Of a Python file that is named by its path, that file alone: not what it imports.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import inspect
import json
import platform
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from lossmith import __version__
from lossmith.files import sha256, write_atomically
from lossmith.policy import Policy
from lossmith.prompts import Prompt
from lossmith.scorers.seal import MANIFEST, checksums

__all__ = ["Inputs", "circumstances", "digest", "of_code", "of_model", "of_prompts"]

NAME = "inputs.json"
_HUB_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")


@dataclass
class Inputs:
    """settings: as recipe.toml holds them. decisive: what else the result follows from, by what it is.

    around: versions and machine, on which the last bits may depend. known: what must be the same again (ids of held-out
    prompts, say). accepted: changes that were let in on the way.
    """

    settings: dict[str, Any]
    decisive: dict[str, str]
    around: dict[str, str]
    known: dict[str, Any] = field(default_factory=dict)
    accepted: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """inputs.json. RunError: it cannot be written."""
        write_atomically(folder / NAME, json.dumps(asdict(self), indent=1, default=str) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Inputs | None:
        """What was written there; None where it is missing or damaged, so that nothing can be compared."""
        try:
            return cls.parse((folder / NAME).read_bytes())
        except OSError:
            return None

    def as_line(self) -> str:
        """For a file that begins with it."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def parse(cls, text: bytes) -> Inputs | None:
        """None where it is nothing of ours."""
        try:
            inputs = cls(**json.loads(text))
        except (ValueError, TypeError):
            return None
        parts = (inputs.settings, inputs.decisive, inputs.around, inputs.known)
        return inputs if all(isinstance(part, dict) for part in parts) else None

    def changed_settings(self, now: Mapping[str, Any], defaults: Mapping[str, Any] = {}) -> dict[str, str]:
        """{setting: "0.003 -> 0.3"} of those that are not what they were.

        defaults: what a setting was where there was none of its name yet.
        """
        after = json.loads(json.dumps(now, default=str))
        before = json.loads(json.dumps({k: v for k, v in defaults.items() if k in after}, default=str)) | self.settings
        return {
            key: f"{_short(before.get(key))} -> {_short(after.get(key))}"
            for key in [*before, *(key for key in after if key not in before)]
            if before.get(key) != after.get(key)
        }

    def changed(self, now: Inputs) -> list[str]:
        """Other decisive inputs that are not what they were, each as "scorer.py: 0a1b2c -> 3d4e5f"."""
        return _differences(self.decisive, now.decisive)

    def moved(self, now: Inputs) -> list[str]:
        """Versions and machine."""
        return _differences(self.around, now.around)


def _differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    names = [*before, *(name for name in after if name not in before)]
    changed = [name for name in names if before.get(name) != after.get(name)]
    return [f"{name}: {_short(before.get(name))} -> {_short(after.get(name))}" for name in changed]


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", str(value))  # enough of a sha256 to tell two apart
    return text if len(text) <= 80 else text[:40] + " ... " + text[-35:]


# -- fingerprints -----------------------------------------------------------------------------------------------------


def digest(parts: Iterable[Any]) -> str:
    """sha256 of values that JSON can hold; others by their text."""
    hasher = hashlib.sha256()
    for part in parts:
        line = json.dumps(part, sort_keys=True, default=str, ensure_ascii=True) + "\n"
        hasher.update(line.encode())
    return hasher.hexdigest()


def of_prompts(prompts: Collection[Prompt]) -> str:
    """Their number, and a digest of ids, order and columns."""
    return f"{len(prompts)} prompts {digest([p.id, dict(p.columns)] for p in prompts)}"


def of_model(policy: Policy) -> dict[str, str]:
    """What the policy computes with, wherever it was loaded from: weights, configuration, tokenizer."""
    config = policy.model.config.to_dict()
    settings = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
    backend = getattr(policy.tokenizer, "backend_tokenizer", None)
    text = policy.tokenizer.get_vocab() if backend is None else backend.to_str()
    return {
        "the model's weights": policy.checksum(),
        "the model's configuration": digest([settings]),
        "the tokenizer": digest([text, policy.tokenizer.chat_template]),
        "the compute type": str(policy.compute_dtype).removeprefix("torch."),
    }


def of_code(role: str, spec: Any) -> dict[str, str]:
    """What a scorer's or a loss's text names: files of code, folders of models, by "role, name"."""
    if isinstance(spec, Mapping):
        parts = [spec[key] for key in ("scorers", "ensemble", "steps", "function", "name") if key in spec]
        return {k: v for part in parts for k, v in of_code(role, part).items()}
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        return {k: v for part in spec for k, v in of_code(role, part).items()}
    if not isinstance(spec, str | Path):
        return _of_object(role, spec)
    text = str(spec).partition("(")[0].strip()
    if "://" in text or text.startswith("python: "):
        return {}
    where, colon, _ = text.rpartition(":")
    if colon:
        file = Path(where) if where.endswith(".py") else _file_of_module(where)
        return {} if file is None or not file.is_file() else {f"the {role}'s file {file}": sha256(file)}
    if Path(text).is_dir():
        manifest = Path(text) / MANIFEST  # it lists the hash of every other file, and those are checked
        checksum = sha256(manifest) if manifest.is_file() else digest([checksums(Path(text))])
        return {f"the {role}'s model {text}": checksum}
    commit = _commit_of(text)
    return {} if commit is None else {f"the {role}'s model {text}": commit}


def _of_object(role: str, spec: Any) -> dict[str, str]:
    """Of a live function: its source, where Python has it."""
    if not callable(spec):
        return {}
    try:
        source = inspect.getsource(spec)
    except (OSError, TypeError):
        return {}
    return {f"the {role}'s function {getattr(spec, '__qualname__', '')}": digest([source])}


def _file_of_module(name: str) -> Path | None:
    """Where a module would be imported from; nothing is imported."""
    places: Sequence[str] | None = [*sys.path, str(Path.cwd())]
    spec = None
    for depth, part in enumerate(name.split(".")):
        whole = ".".join(name.split(".")[: depth + 1])
        spec = importlib.machinery.PathFinder.find_spec(whole if part else name, places)
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec is not None and spec.origin else None


def _commit_of(name: str) -> str | None:
    """Which version of a hub's model lies in the local cache."""
    if not _HUB_NAME.fullmatch(name):
        return None
    from huggingface_hub import constants

    head = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / "main"
    try:
        return head.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def circumstances(device: torch.device) -> dict[str, str]:
    """Versions and machine."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "lossmith": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} ({kind})",
        "threads": str(torch.get_num_threads()),
    }
