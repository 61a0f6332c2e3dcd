"""A configuration as flat settings, whatever it is written in: {"algorithm.kl_ctrl.kl_coef": 0.001}."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lossmith.adapters.configurations import python_call, shell
from lossmith.adapters.configurations.computed import Computed
from lossmith.errors import LossError
from lossmith.files import read_text
from lossmith.losses.piece import shown

__all__ = ["SUFFIXES", "Computed", "Source", "flat", "from_file", "from_object"]

_REFERENCE = re.compile(r"^\$\{(?:oc\.select:(?P<selected>[\w.]+)(?:,(?P<default>[^}]*))?|(?P<name>[\w.]+))\}$")
_KINDS = {".yaml": "YAML file", ".yml": "YAML file", ".json": "JSON file", ".toml": "TOML file"}
_KINDS |= {".sh": "script", ".bash": "script", ".slurm": "script", ".sbatch": "script", ".py": "script"}
SUFFIXES = tuple(_KINDS)


@dataclass(frozen=True)
class Source:
    """Settings with the place that each is from."""

    where: str  # the file, or what was given
    kind: str
    settings: Mapping[str, Any]
    lines: Mapping[str, int] = field(default_factory=dict)
    program: str = ""  # of a script: what it launches
    rest: str = ""  # what a script leaves to whoever runs it
    whole: bool = False  # a trainer's own object, in which what nobody set stands with its default

    def only(self, settings: Mapping[str, Any]) -> Source:
        return dataclasses.replace(self, settings=settings)

    def renamed(self, names: Mapping[str, str]) -> Source:
        """With these settings spelled in another way."""
        settings = {names.get(k, k): v for k, v in self.settings.items()}
        return dataclasses.replace(self, settings=settings, lines={names.get(k, k): v for k, v in self.lines.items()})


def from_file(path: str | Path) -> list[Source]:
    """The settings of a file, by what its name ends in; of a script, those of each command that could be a trainer's.

    LossError: it cannot be read, or says nothing.
    """
    kind = _KINDS.get(Path(path).suffix.lower())
    if kind is None:
        raise LossError(f"{path}: a configuration is a file that ends in {', '.join(_KINDS)}; this one does not.")
    text = read_text(path, LossError, "configuration")
    if not text.strip():
        raise LossError(f"{path} is empty: there is no configuration in it.")
    suffix, where = Path(path).suffix.lower(), str(path)
    if suffix == ".py":
        settings, lines = python_call.settings(text, where)
        return [Source(where, kind, settings, lines, program=python_call.NAME)]
    if kind == "script":
        return [Source(where, kind, x.settings, x.lines, x.program, x.rest) for x in shell.launches(text, where)]
    if suffix in (".yaml", ".yml"):
        settings, lines = _yaml(text, where)
    else:
        settings, lines = flat(_table(text, where, suffix), where), {}
    if not settings:
        raise LossError(f"{path} has no settings.")
    return [Source(where, kind, settings, lines)]


def from_object(config: Any) -> Source:
    """The settings of a mapping, a dataclass (TRL's GRPOConfig, say) or an OmegaConf object."""
    name = type(config).__name__
    if type(config).__module__.partition(".")[0] == "omegaconf":
        from omegaconf import OmegaConf

        settings = _resolved(flat(OmegaConf.to_container(config, resolve=False), name))
        return Source(name, "configuration", settings, whole=True)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        return Source(name, "configuration", settings, whole=True)
    if isinstance(config, Mapping):
        return Source("the configuration", "configuration", _resolved(flat(config, "the configuration")))
    raise LossError(f"a configuration is a path, a mapping or a trainer's own object, not {shown(config)}.")


def flat(table: Any, where: str, prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names; an empty table says nothing."""
    if not isinstance(table, Mapping):
        raise LossError(f"{where}: a configuration is a table of settings, not {shown(table)}.")
    found: dict[str, Any] = {}
    for key, value in table.items():
        if not isinstance(key, str):
            raise LossError(f"{where}: the name of a setting is text, not {shown(key)}.")
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, where, f"{name}.")
        else:
            found[name] = value
    return found


def _table(text: str, where: str, suffix: str) -> Any:
    try:
        return tomllib.loads(text) if suffix == ".toml" else json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and JSONDecodeError are ValueErrors
        raise LossError(f"{where} is not {suffix[1:].upper()}: {error}.") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice")
    return dict(pairs)


def _yaml(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Dotted names with their lines, read from the nodes: a name that is given twice is refused, not overwritten."""
    import yaml

    settings: dict[str, Any] = {}
    lines: dict[str, int] = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        here: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                raise LossError(f"{where}:{line}: write the settings out: a merge key (<<) is not read.")
            name = f"{prefix}{key.value}"
            if key.value in here:
                raise LossError(f"{where}:{line}: {name} is given twice.")
            here.add(key.value)
            if isinstance(value, yaml.MappingNode):
                walk(value, f"{name}.")
            else:
                settings[name], lines[name] = loader.construct_object(value, deep=True), line

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise LossError(f"{where}: a configuration is a table of settings, and this file is none.")
        walk(node, "")
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, LossError):
            raise
        raise LossError(f"{where} is not YAML: {' '.join(str(error).split())}.") from None
    return _resolved(settings), lines


def _resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`${a.b}` and `${oc.select:a.b,default}` get the value of a.b; what else stands in `${...}` is computed where
    the trainer runs.
    """
    found = dict(settings)
    for name, value in settings.items():
        seen = {name}
        while isinstance(value, str) and (match := _REFERENCE.match(value)):
            other, default = match["selected"] or match["name"], match["default"]
            other = f"{name.rpartition('.')[0]}{other}" if re.match(r"\.\w", other) else other
            if other in seen or (other not in settings and default is None):
                break
            seen.add(other)
            value = settings.get(other, default)
        found[name] = Computed(value) if isinstance(value, str) and "${" in value else value
    return found
