"""What the documentation tells people to type: every command is one, the cheap ones run, and so do the snippets."""

import ast
import re
import shlex
import shutil
from pathlib import Path

import cyclopts
import pytest

from lossmith.cli import app
from lossmith.losses.catalogue import user
from shell import lossmith

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Blocks of Python that are not run here: (page, something in it): why not.
ELSEWHERE = {
    ("your-own-loss.md", ""): "test_user_losses.py runs all of them",
    ("your-own-loop.md", ""): "test_own_loop.py runs it, and compares its steps with the learner's",
    ("scorers.md", "serve_forever"): "it serves for ever; test_http_scorer.py has servers that answer so",
    ("runs.md", "ls.train"): "it trains the default model; test_cli.py and test_training.py train tiny ones",
    ("README.md", "LossmithGRPOTrainer"): "needs TRL; tests/live runs it",
    ("in-trl.md", ""): "needs TRL; tests/live runs it",
    ("plan.md", "plan_hardware"): "it needs the config.json of a large model; test_hardware.py plans that one",
    ("in-other-trainers.md", ""): "needs the other trainer; tests/live and test_conforming.py run what it shows",
}
NO_COMMANDS = {"rollouts 1"}  # a mark in files
# Commands of which every one is run as it is printed: seconds together. The others train, sample, serve or need a run.
CHEAP = (("losses", "list"), ("losses", "show"), ("losses", "compare"))


def blocks(page, *languages):
    """The fenced blocks of a page in these languages."""
    found = re.findall(r"^```([\w-]*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def snippets():
    return [(page, text) for page in PAGES for text in blocks(page, "python")]


def commands():
    """(page, words after `lossmith`) of every command in a block."""
    found = []
    for page in PAGES:
        for text in blocks(page, "", "sh", "bash", "console"):
            for line in text.replace("\\\n", " ").splitlines():
                match = re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:.*&& )?(?:\S*/)?lossmith ([a-z-].*)$", line.strip())
                if match:
                    found.append((page, shlex.split(match[1], comments=True)))
        # within a sentence, a command may be named without all that it needs
        inline = re.findall(r"`lossmith ([a-z][^`]* [^`]*)`", page.read_text(encoding="utf-8").replace("\n", " "))
        found += [(page, shlex.split(text)) for text in inline if text not in NO_COMMANDS]
    return found


def named(given):
    return f"{given[0].stem}: {given[1].splitlines()[0][:30] if isinstance(given[1], str) else ' '.join(given[1])[:50]}"


@pytest.mark.parametrize("given", snippets(), ids=named)
def test_every_snippet_of_python_runs_or_is_run_elsewhere(given, capsys):
    page, text = given
    ast.parse(text)
    if any(page.name == where and part in text for where, part in ELSEWHERE):
        return
    before = dict(user._REGISTERED)
    try:
        exec(compile(text, page.name, "exec"), {"__name__": "documented"})
    finally:
        user._REGISTERED.clear()
        user._REGISTERED.update(before)


def test_no_reason_is_left_for_a_snippet_that_is_gone():
    for where, part in ELSEWHERE:
        assert any(page.name == where and part in text for page, text in snippets()), (where, part)


@pytest.mark.parametrize("given", commands(), ids=named)
def test_every_command_of_the_documentation_is_one(given):
    """Its words are read as the command line reads them; nothing is run."""
    page, words = given
    try:
        app.parse_args(words, exit_on_error=False, print_error=False)
    except cyclopts.MissingArgumentError:
        assert f"`lossmith {shlex.join(words)}`" in page.read_text(encoding="utf-8").replace("\n", " ")
    except cyclopts.CycloptsError as error:
        pytest.fail(f"lossmith {shlex.join(words)}: {error}")


def cheap():
    made_up = {"NAME", "my.py:mine", "my_losses.py:lipo", "my_losses.py:careful_grpo"}
    return [(page, words) for page, words in commands() if tuple(words[:2]) in CHEAP and not made_up & {*words}]


@pytest.mark.parametrize("given", cheap(), ids=named)
def test_cheap_commands_of_the_documentation_run(given, tmp_path):
    for name, file in (("train_gspo.py", "trl_gspo.py"), ("run_dapo.sh", "verl_dapo.sh")):
        shutil.copy(Path(__file__).parent / "configurations" / file, tmp_path / name)
    assert lossmith(*given[1], cwd=tmp_path).stdout


def test_the_documentation_is_read_at_all():
    assert len(commands()) > 90 and len(snippets()) > 10
