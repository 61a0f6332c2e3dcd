"""What the shell says: options where a setting is meant, one sentence for a mistake, characters that can be shown."""

import io
import json
import re
import runpy
import sys

import cyclopts
import pytest

import lossmith
import tiny
from lossmith.cli import app, main, streams
from lossmith.cli.words import in_options, options_of
from lossmith.errors import RecipeError
from lossmith.training import Recipe
from lossmith.training.offline.loop import PreferenceRecipe

OPTIONS = {
    "prompt_column": "--prompt-column", "steps": "--steps", "runs": "--runs", "allow_traps": "--allow-traps",
    "pass_columns": "--pass-columns", "compile": "--compile",
}  # fmt: skip


def commands():
    """Every command, as words."""

    def below(group, words):
        for name in group:
            if not name.startswith("-"):
                yield [*words, name]
                yield from below(group[name], [*words, name])

    return list(below(app, []))


def run(capsys, *words):
    """(exit code, standard output, standard error) of a command, in this process."""
    before, sys.argv = sys.argv, ["lossmith", *map(str, words)]
    try:
        main()
        code = 0
    except SystemExit as left:
        code = left.code
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name another with prompt_column.", "name another with --prompt-column."),
        ("steps = 3 is too few", "--steps 3 is too few"),
        ("the steps are few", "the steps are few"),
        ("choose another with runs=...", "choose another with --runs ..."),
        ("set allow_traps = true to train", "set --allow-traps to train"),
        ("with compile = false", "with --no-compile"),
        ('pass_columns = ["answer"] lets it', "--pass-columns answer lets it"),
        ("no column 'prompt_column'", "no column 'prompt_column'"),
        ("it wrote \"steps = 3\" here", "it wrote \"steps = 3\" here"),
        ("the file /a/prompt_column/x", "the file /a/prompt_column/x"),
        ("the model's prompt_column isn't", "the model's --prompt-column isn't"),
        ("no setting 'x'. Known: prompt_column, runs.", "no setting 'x'. Known: prompt_column, runs."),
    ],
)  # fmt: skip
def test_a_setting_is_named_as_its_option(text, said):
    assert in_options(text, OPTIONS) == said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "Why?", "answer": "so"},
            "If the scorer may see it: --pass-columns answer. Else",
        ),
        ({"question": "Why?"}, "Is it 'question'? --prompt-column \"question\"."),
    ],
)
@pytest.mark.parametrize("words", [["train", "--prompts"], ["sample"], ["init", "new", "--prompts"]], ids=" ".join)
def test_a_message_of_the_prompts_has_the_option_once(capsys, tmp_path, row, said, words):
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    code, _, err = run(capsys, *words, tmp_path / "p.jsonl")
    assert code == 2 and said in err and "=" not in err


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_a_line_of_help_and_every_option_too(words):
    command = app.parse_commands(words)[1][-1]
    assert re.match(r"\w[^\n]{20,}", command.help)
    if command.default_command is None:
        return
    for argument in command.assemble_argument_collection(parse_docstring=True):
        if argument.show and argument.names[0] != "*":
            assert argument.parameter.help, argument.names


@pytest.mark.parametrize("words", [["--help"], ["losses"], ["reward"], ["losses", "--help"]], ids=" ".join)
def test_groups_list_their_commands_with_a_line_each(capsys, words):
    code, out, _ = run(capsys, *words)
    assert code == 0
    group = words[0] if words[0] != "--help" else None
    for name in app[group] if group else app:
        if not name.startswith("-"):
            assert re.search(rf"^  {name} +\w", out, re.MULTILINE), name


@pytest.mark.parametrize("kind", [Recipe, PreferenceRecipe])
def test_every_setting_has_an_option_that_takes_it(kind):
    options = options_of(app, ["train" if kind is Recipe else "prefer"])
    assert kind.model_fields.keys() <= options.keys()
    assert all(options[key] == "--" + key.replace("_", "-") for key in kind.model_fields)


WRONG = [
    (("train", "--steps", "0"), "--steps 0: a whole number above 0 is wanted"),
    (("train", "--steps", "x"), "--steps x: a whole number above 0 is wanted"),
    (("train", "--steps", "1.5"), "--steps 1.5: a whole number above 0 is wanted"),
    (("train", "--learning-rate", "nan"), "--learning-rate nan: a number of at least 0 is wanted"),
    (("train", "--learning-rate", "inf"), "--learning-rate inf: a number of at least 0 is wanted"),
    (("train", "--top-p", "2"), "--top-p 2: a number above 0 and of at most 1 is wanted"),
    (("train", "--held-out", "x"), "--held-out x: a number above 0 is wanted"),
    (("train", "--dtype", "float"), "--dtype float: one of auto, float32, bfloat16 (Did you mean 'float32'"),
    (("train", "--temperature", "0"), "--temperature 0"),
    (("train", "--warmup-steps", "30"), "--warmup-steps 30 exceeds --steps 12."),
    (("train", "--loss", "book_ppo_clip"), "Set --allow-traps to train with it."),
    (("train", "--stepz", "3"), "Did you mean --steps?"),
    (("train", "--steps"), "--steps requires an argument"),
    (("train", "a.toml", "b.toml"), "there is no place for b.toml in this command."),
    (("frob",), 'Unknown command "frob"'),
    (("losses", "shwo"), 'Did you mean "show"?'),
    (("prefer", "x.jsonl", "--epochs", "-1"), "--epochs -1: a whole number above 0 is wanted"),
    (("sample", "--n", "x"), "--n"),
    (("sample", "--n", "0"), "--n 0"),
    (("sample", "--max-tokens", "0"), "--max-tokens 0"),
    (("sample", "--temperature", "nan"), "--temperature nan"),
    (("sample", "--resample", "-1"), "--resample -1"),
    (("reward", "train", "x.jsonl", "-o", "rm", "--epochs", "0"), "--epochs 0"),
    (("reward", "train", "x.jsonl", "-o", "rm", "--learning-rate", "inf"), "--learning-rate inf"),
    (("reward", "train", "x.jsonl", "-o", "rm", "--epochs", "9999999999"), "--epochs 9999999999 is too large"),
    (("train", "--steps", "9999999999"), "--steps 9999999999 is too large"),
    (("train", "--samples-per-prompt", "900000"), "--samples-per-prompt 900000 is more than the 1000000 completions"),
    (("sample", "--n", "9999999999"), "--n 9999999999 outputs of"),
    (("sample", "--limit", "0"), "--limit 0 keeps no prompt"),
    (("plot",), "run folder"),
    (("plot", "x", "--smooth", "0"), "--smooth 0"),
    (("plot", "x", "-o", "x.gif"), ".svg, .png or .pdf"),
    (("annotate",), "--db"),
    (("annotate", "."), "is a folder"),
    (("init", "p", "--prompts", "x.jsonl", "--prompt-limit", "0"), "--prompt-limit 0 keeps no prompt"),
    (("status",), "is in no project"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_a_mistake_is_one_sentence_in_the_words_of_the_shell(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"prompt": "Why?", "chosen": "a", "rejected": "b"}\n')
    code, _, err = run(capsys, *words)
    assert code == 2
    assert message in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "pydantic" not in err and "Input should" not in err and "command line" not in err


def test_a_recipes_own_setting_keeps_its_name(capsys, tmp_path):
    (tmp_path / "r.toml").write_text("warmup_steps = 30\n")
    _, _, err = run(capsys, "train", tmp_path / "r.toml", "--steps", "4")
    assert "warmup_steps = 30 exceeds --steps 4." in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps = 'x'", "steps = 'x': a whole number above 0 is wanted (rounds of sample, score, update)."),
        (
            "micro_batch_tokens = 0",
            "micro_batch_tokens = 0: a whole number above 0 or 'auto' is wanted (tokens in one forward",
        ),
        ("micro_batch_tokens = true", "micro_batch_tokens = true: a whole number above 0 or 'auto' is wanted"),
        ("held_out = true", "held_out = true: a number above 0 is wanted"),
        ("steps = true", "steps = true: a whole number above 0 is wanted"),
        ("compile = 3", "compile = 3: true or false or 'auto' is wanted"),
        ("stop = 'x'", "stop = 'x': a list of texts is wanted"),
        ("stop = [1]", "stop[0] = 1: a list of texts is wanted"),
        ("model = 3", "model = 3: a text is wanted"),
        ("schedule = 'cosin'", "one of constant, linear, cosine (Did you mean 'cosine'?) is wanted"),
        ("kl_budget = inf", "kl_budget = inf: a number above 0 is wanted"),
        ("source = 'x'", "there is no setting 'source'"),
        ("steps = 3\nsteps = 4", "is not a TOML file"),
        ("runs = '~nobody-of-this-name/x'", "no home folder is known"),
    ],
)
def test_a_recipes_mistake_is_said_in_its_own_words(tmp_path, text, said):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(RecipeError, match=re.escape(said)):
        Recipe.make("r.toml", **Recipe.read(tmp_path / "r.toml"))


def test_home_is_meant_by_a_tilde_in_every_path_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    fields = {"runs": "~/r", "model": "~/m", "loss": {"name": "~/l.py:mine"}, "watch": "~/w.py:f"}
    fields |= {"scorer": {"scorers": ["~/rm", {"steps": "~/s.py:f"}, "length"], "weights": [1, 2, 3]}}
    made = Recipe.make(**fields, prompts=["~ is a tilde", "~/x is a path"], stop=["~"])
    assert (made.runs, made.model, made.watch) == ("/home/ann/r", "/home/ann/m", "/home/ann/w.py:f")
    assert made.loss == {"name": "/home/ann/l.py:mine"}
    assert made.scorer["scorers"] == ["/home/ann/rm", {"steps": "/home/ann/s.py:f"}, "length"]
    assert made.prompts == ["~ is a tilde", "~/x is a path"] and made.stop == ["~"]


# -- standard output --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_json_is_valid_and_whole_whatever_standard_output_can_hold(monkeypatch, encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    value = {"text": "é → π, 😀 and half a pair \ud83d", "n": [1, None]}
    streams.bear_every_character()
    streams.print_json(value)
    out.flush()
    assert json.loads(out.buffer.getvalue().decode(encoding)) == value


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_cannot_be_shown_is_spelled(monkeypatch, encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    streams.bear_every_character()
    print("π_θ ≠ 漢")
    out.flush()
    assert out.buffer.getvalue().decode(encoding).split("\n")[0] == "pi_theta != \\u6f22"


@pytest.mark.parametrize("words", [["list"], ["show", "grpo"], ["compare", "grpo", "ppo"]])
def test_every_table_goes_into_a_file_of_an_old_encoding(monkeypatch, words):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["lossmith", "losses", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    out.flush()
    assert len(out.buffer.getvalue()) > 500


def test_a_reader_who_has_seen_enough_ends_the_command_quietly(monkeypatch, capfd):
    def gone(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(cyclopts.App, "__call__", gone)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 141
    assert capfd.readouterr() == ("", "")


def test_a_run_goes_into_a_file_of_an_old_encoding(monkeypatch, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"Wärum {k} → π?"}) + "\n" for k in range(5)))
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.chdir(tmp_path)
    options = ["--held-out", "2", "--steps", "1", "--prompts-per-step", "2", "--samples-per-prompt", "2"]
    options += ["--max-tokens", "2", "--model", str(tiny.folder()), "--name", "a", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["lossmith", "train", "--prompts", "p.jsonl", *options])
    with pytest.raises(SystemExit) as left:
        main()
    out.flush()
    assert left.value.code == 0
    assert "pi_theta" in out.buffer.getvalue().decode("ascii") and "step   1/1" in out.buffer.getvalue().decode("ascii")
    assert (tmp_path / "runs" / "a" / "summary.json").exists()


def test_a_name_that_is_no_text_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "train", "fr\udce4.toml")
    assert code == 2 and "is no text in this terminal's encoding" in err


def test_python_dash_m_is_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lossmith", "--version"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("lossmith", run_name="__main__")
    assert left.value.code == 0 and capsys.readouterr().out.strip() == lossmith.__version__


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--epsilon", "0.2"), "there is no option --epsilon.*TRL's name for clip_low and clip_high"),
        (("--beta", "0.1"), r'there is no option --beta. It is a parameter of the loss: write --loss "grpo\(beta='),
        (("--num-generations", "8"), "TRL's name for --samples-per-prompt here"),
        (("--learning-rat", "1"), "Did you mean --learning-rate"),
    ],
)
def test_an_option_that_is_a_word_of_the_loss_is_not_answered_by_the_nearest_spelling(
    words, message, capsys, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["lossmith", "train", *words])
    with pytest.raises(SystemExit):
        main()
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message, said) and "--json" not in said
