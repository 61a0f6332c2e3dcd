"""An address that may hold a key: requests use it, messages and files show the address without it.

A key belongs in the environment: LOSSMITH_SCORER_KEY is sent as `Authorization: Bearer`. An address may also name
it, `https://host/score?key=${LOSSMITH_SCORER_KEY}`, or hold it, `https://user:key@host/score`; a key that it holds is
written into no file: `redacted` puts the name of a variable there, so that a resumed run reads it from the environment.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from lossmith.errors import LossmithError, ScorerError, printable

__all__ = ["KEY", "Address", "is_address", "redacted", "shown"]

KEY = "LOSSMITH_SCORER_KEY"
FORM = "an address; write http://host:port/path or https://host/path"
HIDDEN = "***"

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_SECRET_WORDS = re.compile(
    r"(api|access|auth|secret|client)?(key|token|secret)|pass(word|wd|phrase)?|pwd|auth(orization)?|bearer|jwt|session"
    r"|sig(nature)?|credentials?",
    re.IGNORECASE,
)
# How keys of well-known services begin, and a long run of letters and digits mixed.
_SECRET_VALUE = re.compile(
    r"(?:sk|pk|rk|gsk|hf|gh[oprsu]|glpat|nvapi|xox[a-z])[-_].+|AKIA.+|AIza.+|eyJ.+"
    r"|(?=.*\d)(?=.*[A-Za-z])[\w.~+%-]{24,}",
    re.DOTALL,
)
_REFERENCE = re.compile(r"\$\{(\w*)\}")
_USER = re.compile(r"(?<=://)[^/?#]*(?=@)")
_ANY_USER = re.compile(r"(?:(?<=://)\S*|[^\s/'\"]+:[^\s@'\"]+)(?=@)")
_PARAMETER = re.compile(r"(?<=[?&;])([^=&;#\s]*)=([^&;#\s]*)")
_PIECE = re.compile(r"(?<=[/?&;])[^/?&;=#\s]+")


def is_address(spec: Any) -> bool:
    return isinstance(spec, str) and spec.lower().startswith(("http://", "https://"))


@dataclass(frozen=True)
class Address:
    """url: for requests, without user and password. name: host and path, which may be shown. headers: the key's."""

    url: str = field(repr=False)
    name: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def hide(self, text: str) -> str:
        """A text from outside (servers like to quote what they refuse) without control characters and without keys."""
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        return shown(printable(text))

    @classmethod
    def of(
        cls, text: str, key: str = KEY, error: type[LossmithError] = ScorerError, what: str = FORM, more: str = ""
    ) -> Address:
        """The address that `text` writes, with `more` after its path; `key` names the variable of the default key.

        `error`: this is not `what` it should be; a key is missing, or no header can hold it. No key is shown in it.
        """
        filled = _fill_in(text, error)
        try:
            parts = urlsplit(filled)
            host = (parts.hostname or "").encode("idna").decode()
            port = f":{parts.port}" if parts.port is not None else ""
            if not is_address(filled) or not host or any(c.isspace() or not c.isprintable() for c in filled):
                raise ValueError
        except ValueError:
            raise error(f"{shown(printable(text))!r} is not {what}.") from None
        place = (f"[{host}]" if ":" in host else host) + port
        path = parts.path.rstrip("/") + more if more else parts.path
        path, query = (quote(part, safe="/%:=&?+,;@!$'()*~[]") for part in (path, parts.query))
        name = place + _PIECE.sub(lambda m: HIDDEN if _SECRET_VALUE.fullmatch(m[0]) else m[0], parts.path)
        headers = {}
        secrets: list[str] = []
        redacted(filled, secrets)
        user = parts.netloc.rpartition("@")[0]
        if user:
            pair = unquote(user if ":" in user else user + ":")
            headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
            secrets += [pair.partition(":")[2] or pair[:-1]]
        elif key not in _REFERENCE.findall(text) and (value := _from_environment(key, error)):
            headers["Authorization"] = f"Bearer {value}"
            secrets.append(value)
        hidden = {s for secret in secrets for s in (secret, unquote(secret)) if len(s) > 3}
        return cls(urlunsplit((parts.scheme, place, path, query, "")), name, headers, tuple(hidden))


def shown(text: str) -> str:
    """Any text, with what may be secret in the addresses inside it hidden."""
    text = _ANY_USER.sub(HIDDEN, text)
    return _replace_keys(text, lambda secret: HIDDEN) if "://" in text else text


def redacted(spec: Any, secrets: list[str]) -> Any:
    """A scorer's spec with the name of an environment variable for every key in its addresses.

    secrets: the keys so far, in the order of their variables, LOSSMITH_SCORER_KEY, ..._KEY_2 and so on; further keys
    are added.
    """
    if isinstance(spec, Mapping):
        return {key: redacted(value, secrets) for key, value in spec.items()}
    if isinstance(spec, list | tuple):
        return [redacted(value, secrets) for value in spec]
    if not is_address(spec):
        return spec

    def variable(secret: str) -> str:
        if secret not in secrets:
            secrets.append(secret)
        number = secrets.index(secret) + 1
        return f"${{{KEY}}}" if number == 1 else f"${{{KEY}_{number}}}"

    return _replace_keys(_USER.sub(lambda m: _unless_reference(m[0], variable), spec), variable)


def _replace_keys(address: str, replace: Callable[[str], str]) -> str:
    """What looks like a key in path and query, replaced."""
    head, mark, tail = address.partition("?")
    head = re.sub(r"(?<=[^:/]/)[^/?#\s]+", lambda m: _unless_ordinary(m[0], replace), head)

    def parameter(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        if any(_SECRET_WORDS.fullmatch(word) for word in _WORDS.findall(name)):
            value = _unless_reference(value, replace)
        return f"{name}={_unless_ordinary(value, replace)}"

    tail = _PARAMETER.sub(parameter, "?" + tail)[1:]
    if mark and "=" not in tail:
        tail = _unless_ordinary(tail, replace)
    return head + mark + tail


def _unless_ordinary(text: str, replace: Callable[[str], str]) -> str:
    return _unless_reference(text, replace) if _SECRET_VALUE.fullmatch(text) else text


def _unless_reference(text: str, replace: Callable[[str], str]) -> str:
    return text if not text or text == HIDDEN or _REFERENCE.search(text) else replace(text)


def _fill_in(text: str, error: type[LossmithError]) -> str:
    """The address with the values of the variables that it names."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not re.fullmatch(r"LOSSMITH_\w*KEY\w*", name):  # a stranger's recipe may not read what it likes
            raise error(f"an address may name {KEY} and variables like {KEY}_2, not {name!r}.")
        key = _from_environment(name, error)
        if not key:
            raise error(f"the address {shown(printable(text))} needs its key: put it into the variable {name}.")
        return quote(key, safe="%:" if "@" in text[match.end() :].partition("/")[0] else "%")

    return _REFERENCE.sub(value, text)


def _from_environment(name: str, error: type[LossmithError]) -> str:
    """The key, without white space around it. `error`: no header can hold it; it is not shown."""
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):  # http.client's own complaint quotes the header
        raise error(f"{name} holds a line break or another character that no key has. Set it again.")
    return key
