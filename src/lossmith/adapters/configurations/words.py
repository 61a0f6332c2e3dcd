"""A shell script as commands of words, as far as that can be said without running it."""

from __future__ import annotations

import ast
import operator
import re
from dataclasses import dataclass, field

__all__ = ["Command", "ShellError", "Word", "commands"]

_NAME = re.compile(r"[A-Za-z_]\w*")
_ASSIGNED = re.compile(r"^(?P<name>[A-Za-z_]\w*)(?P<add>\+?)=(?P<value>.*)$", re.DOTALL)
_EXPANSION = re.compile(r"^(?P<name>[A-Za-z_]\w*)(?:(?P<array>\[[@*]\])|(?P<how>:?[-=])(?P<default>.*))?$", re.DOTALL)
_HEREDOC = re.compile(r"<<-?\s*(?P<quote>['\"]?)(?P<mark>\w+)(?P=quote)")
_OPENS, _CLOSES = {"if", "for", "while", "until", "case", "select"}, {"fi", "done", "esac"}
_BETWEEN = {"then", "else", "elif", "do", "!", "export", "declare", "local", "readonly", "time", "exec"}

_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


class ShellError(Exception):
    """A script that ends in the middle of a word."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line, self.what = line, what


@dataclass(frozen=True)
class Word:
    """A word after quotes and variables; `computed`: a part of it is only known where the script runs."""

    text: str
    computed: bool
    line: int


@dataclass(frozen=True)
class Command:
    words: tuple[Word, ...]
    line: int


def commands(text: str) -> list[Command]:
    """The commands, in the order of the file. ShellError: a quote or bracket is left open."""
    return _Script(text.replace("\r\n", "\n")).read()


@dataclass
class _Script:
    text: str
    at: int = 0
    depth: int = 0  # inside how many conditions and loops
    variables: dict[str, list[Word]] = field(default_factory=dict)
    found: list[Command] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)

    def read(self) -> list[Command]:
        while self.at < len(self.text):
            c = self.text[self.at]
            if c in " \t" or self.text.startswith("\\\n", self.at):
                self.at += 1 if c in " \t" else 2
            elif c == "#":
                self.at = self._end_of_line()
            elif c in "\n;&|()":
                self._end_command()
                self.at += 1
            elif self.text.startswith("<<", self.at) and (here := _HEREDOC.match(self.text, self.at)):
                self._heredoc(here)
            elif c in "<>":
                self.at += 1
            elif (array := re.compile(r"([A-Za-z_]\w*)(\+?)=\(").match(self.text, self.at)) and not self.words:
                self.at = array.end()
                self._assign(array[1], self._array(), bool(array[2]))
            else:
                self.words += self._word()
        self._end_command()
        return self.found

    @property
    def line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def _end_of_line(self) -> int:
        end = self.text.find("\n", self.at)
        return len(self.text) if end < 0 else end

    def _end_command(self) -> None:
        words, self.words = self.words, []
        while words and words[0].text in _BETWEEN | _OPENS | _CLOSES | {"{", "}"}:
            self.depth += (words[0].text in _OPENS) - (words[0].text in _CLOSES)
            words = words[1:]
        while words and (match := _ASSIGNED.match(words[0].text)):
            word = Word(match["value"], words[0].computed, words[0].line)
            if len(words) > 1 and not all(_ASSIGNED.match(w.text) for w in words):
                words = words[1:]  # X=1 command: of that command alone
                continue
            self._assign(match["name"], [word], bool(match["add"]))
            words = words[1:]
        if words:
            self.found.append(Command(tuple(words), words[0].line))

    def _assign(self, name: str, value: list[Word], add: bool) -> None:
        """Under a condition a value is not known, and neither is whether it is added."""
        if self.depth:
            value = [Word(w.text, True, w.line) for w in value]
        self.variables[name] = self.variables.get(name, []) + value if add else value

    def _array(self) -> list[Word]:
        start, words = self.line, list[Word]()
        while self.at < len(self.text):
            c = self.text[self.at]
            if c == ")":
                self.at += 1
                return words
            if c in " \t\n" or self.text.startswith("\\\n", self.at):
                self.at += 1 if c != "\\" else 2
            elif c == "#":
                self.at = self._end_of_line()
            else:
                words += self._word()
        raise ShellError(start, "the list that starts here is not closed with )")

    def _heredoc(self, here: re.Match[str]) -> None:
        """`read -d '' NAME <<EOF` sets NAME to the lines that follow; of other commands they are the input."""
        start = self._end_of_line() + 1
        end = re.compile(rf"^\t*{here['mark']}$", re.MULTILINE).search(self.text, start)
        if end is None:
            raise ShellError(self.line, f"the lines up to {here['mark']} that start here never end")
        if self.words and self.words[0].text == "read":
            line = self.text.count("\n", 0, start) + 1
            body = _Script(self.text[start : end.start()].replace("\n", " \\\n"), variables=self.variables)
            lines = [w for c in body.read() for w in c.words]
            self.variables[self.words[-1].text] = [Word(w.text, w.computed, w.line + line - 1) for w in lines]
        self.words = []
        self.at = end.end()

    def _word(self) -> list[Word]:
        """One word; several where an array or an unquoted variable holds more."""
        start, parts = self.at, [Word("", False, self.line)]
        while self.at < len(self.text) and self.text[self.at] not in " \t\n;&|()<>":
            c = self.text[self.at]
            if self.text.startswith("\\\n", self.at):
                self.at += 2
            elif c == "\\":
                _add(parts, self.text[self.at + 1 : self.at + 2])
                self.at += 2
            elif c == "'":
                end = self.text.find("'", self.at + 1)
                if end < 0:
                    raise ShellError(self.line, "the quote ' that starts here is not closed")
                _add(parts, self.text[self.at + 1 : end])
                self.at = end + 1
            elif c == '"':
                self._quoted(parts)
            elif c in "$`":
                _extend(parts, self._expanded(quoted=False))
            else:
                _add(parts, c)
                self.at += 1
        if self.at == start:  # a character that no word starts with
            self.at += 1
        return [part for part in parts if part.text or len(parts) == 1]

    def _quoted(self, parts: list[Word]) -> None:
        line = self.line
        self.at += 1
        while self.at < len(self.text):
            c = self.text[self.at]
            if c == '"':
                self.at += 1
                return
            if c == "\\" and self.text[self.at + 1 : self.at + 2] in ("\n", '"', "\\", "$", "`"):
                _add(parts, "" if self.text[self.at + 1] == "\n" else self.text[self.at + 1])
                self.at += 2
            elif c in "$`":
                _extend(parts, self._expanded(quoted=True))
            else:
                _add(parts, c)
                self.at += 1
        raise ShellError(line, 'the quote " that starts here is not closed')

    def _expanded(self, *, quoted: bool) -> list[Word]:
        """What stands for `$...`; computed where it is only known where the script runs."""
        start, line = self.at, self.line
        name = _NAME.match(self.text, self.at + 1)
        if self.text[self.at] == "$" and name:
            self.at = name.end()
            return self._variable(name[0], self.text[start : self.at], quoted)
        if self.text.startswith("${", self.at):
            self._skip("{", "}")
            written = self.text[start : self.at]
            match = _EXPANSION.match(written[2:-1])
            if match is None:
                return [Word(written, True, line)]
            if match["how"] and match["name"] not in self.variables:
                words = _Script(match["default"], variables=self.variables)._word()
                if match["how"].endswith("="):  # : "${X:=default}"
                    self._assign(match["name"], words, add=False)
                return [Word(" ".join(w.text for w in words), any(w.computed for w in words), line)]
            return self._variable(match["name"], written, quoted and not match["array"])
        if self.text.startswith("$((", self.at):
            self._skip("(", ")")
            value = self._sum(self.text[start + 3 : self.at - 2])
            return [Word(self.text[start : self.at] if value is None else str(value), value is None, line)]
        if self.text.startswith("$(", self.at):
            self._skip("(", ")")
        elif self.text[self.at] == "`":
            end = self.text.find("`", self.at + 1)
            self.at = len(self.text) if end < 0 else end + 1
        else:
            self.at += 2
        return [Word(self.text[start : self.at], True, line)]

    def _variable(self, name: str, written: str, quoted: bool) -> list[Word]:
        if name not in self.variables:
            return [Word(written, True, self.line)]
        words = self.variables[name]
        if all(w.computed for w in words) and len(words) == 1:
            return words
        if quoted or (len(words) == 1 and len(words[0].text.split()) < 2):
            return [Word(" ".join(w.text for w in words), any(w.computed for w in words), self.line)]
        return [Word(text, w.computed, w.line) for w in words for text in w.text.split() or [""]]

    def _sum(self, text: str) -> int | None:
        """The value of `$((...))`: whole numbers and variables with + - * and brackets; None for anything else."""

        def value(node: ast.expr) -> int:
            if isinstance(node, ast.Constant) and type(node.value) is int:
                return node.value
            if isinstance(node, ast.Name):
                (word,) = self.variables[node.id]
                return int("" if word.computed else word.text)
            if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
                return _ARITHMETIC[type(node.op)](value(node.left), value(node.right))
            raise ValueError(text)

        plain = re.sub(r"\$\{?(\w+)\}?", r"\1", text).strip()
        if not re.fullmatch(r"[\w\s+*()-]*", plain) or re.search(r"\b\d+[^\W\d]", plain):
            return None
        try:
            return value(ast.parse(plain, mode="eval").body)
        except (ValueError, KeyError, SyntaxError, RecursionError, MemoryError):
            return None

    def _skip(self, opening: str, closing: str) -> None:
        """To behind the bracket that closes the one after `$`."""
        line, depth = self.line, 0
        for i in range(self.at + 1, len(self.text)):
            depth += (self.text[i] == opening) - (self.text[i] == closing)
            if depth == 0:
                self.at = i + 1
                return
        raise ShellError(line, f"the {opening} that starts here is not closed with {closing}")


def _add(parts: list[Word], text: str) -> None:
    parts[-1] = Word(parts[-1].text + text, parts[-1].computed, parts[-1].line)


def _extend(parts: list[Word], more: list[Word]) -> None:
    """The first goes on with the word that was begun, the others are words of their own."""
    last = parts[-1]
    line = last.line if last.text or len(more) < 2 else more[0].line
    parts[-1] = Word(last.text + more[0].text, last.computed or more[0].computed, line)
    parts += more[1:]
