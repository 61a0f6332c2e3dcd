"""What people look at: the opening, a step's line, the closing."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

import lossmith as ls
import tiny
from lossmith.cli import app
from lossmith.errors import LossmithError, printable
from lossmith.prompts import load_prompts
from lossmith.report.run.closing import closing
from lossmith.report.run.code import code_that_runs
from lossmith.report.run.opening import batch_arithmetic, opening
from lossmith.report.run.prompts import who_reads
from lossmith.scorers import load_scorer
from lossmith.training.evaluate import comparison


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return ls.train(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=[f"Prompt {i}?" for i in range(9)], held_out=3,
        scorer=lambda completions, **_: [float(len(set(c))) for c in completions], steps=2, prompts_per_step=2,
        samples_per_prompt=3, max_tokens=8, runs=str(tmp_path_factory.mktemp("r")), quiet=True, loss="grpo(beta=0.02)",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("specs", "lines"),
    [
        ({"scorer": "helpfulness", "watch": None, "loss": "grpo(beta=0.04)"}, ""),
        ({"scorer": "DIR/own.py:score"}, "code      will run: DIR/own.py:score (scorer), with what it imports"),
        ({"scorer": "own.py:score"}, "code      will run: DIR/own.py:score (scorer), with what it imports"),
        (
            {"scorer": {"scorers": ["a.py:f", {"steps": "~/b.py:g"}]}, "watch": ["c.py:h"], "loss": "my.py:mine(x=1)"},
            "code      will run: DIR/a.py:f (scorer), with what it imports\n"
            "          will run: HOME/b.py:g (scorer), with what it imports\n"
            "          will run: DIR/c.py:h (watch), with what it imports\n"
            "          will run: DIR/my.py:mine (loss), with what it imports",
        ),
        ({"loss": {"name": "my.py:mine"}}, "code      will run: DIR/my.py:mine (loss), with what it imports"),
        ({"scorer": "json:dumps"}, "code      will run: json:dumps in JSON (scorer), with what it imports"),
        ({"scorer": "http://me:pass@host:80/s?x=1"}, "server    will be asked: host:80/s (scorer). The key in its "
         "address is not written down: to resume the run, put it into LOSSMITH_SCORER_KEY"),
    ],
)  # fmt: skip
def test_whose_code_will_run_is_said(specs, lines, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    specs = json.loads(json.dumps(specs).replace("DIR", str(tmp_path)))
    expected = lines.replace("DIR", str(tmp_path)).replace("HOME", "/home/me").replace("JSON", json.__file__)
    assert code_that_runs(**specs) == expected


@pytest.mark.parametrize("door", ["train", "train with a loss", "bench", "sample", "annotate", "prefer"])
def test_every_door_says_whose_code_will_run_before_it_runs(door, tmp_path, monkeypatch, capsys):
    own = tmp_path / "own.py"
    own.write_text("raise RuntimeError('it ran')\n")
    (tmp_path / "p.txt").write_text("Why?\nHow?\nWho?\n")
    model = ["--model", str(tiny.folder()), "--runs", str(tmp_path / "runs")]
    sets = [{"prompt": "Why?", "outputs": ["a", "b"]}]
    (tmp_path / "sets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sets))
    arguments = {
        "train": ["--scorer", f"{own}:f", *model],
        "train with a loss": ["--loss", f"{own}:f", *model],
        "bench": ["--scorer", f"{own}:f", *model],
        "sample": [str(tmp_path / "p.txt"), "--best-by", f"{own}:f"],
        "annotate": [str(tmp_path / "sets.jsonl"), "--question", "ranking", "--judge", f"{own}:f"],
        "prefer": [str(tmp_path / "none.jsonl"), "--loss", f"{own}:f", *model],
    }[door]
    with pytest.raises(LossmithError, match="it ran"):
        app([door.split()[0], *arguments], exit_on_error=False)
    out, err = capsys.readouterr()
    assert f"will run: {own}:f" in (out + err).replace("\n", " ")


def printed(run, **changes):
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=100)
    changed = dataclasses.replace(run, **changes)
    closing(changed, changed.summary, console)
    return console.file.getvalue()


def test_the_closing_shows_the_figures_of_the_summary(run):
    text = printed(run)
    held_out = run.summary["held_out"]
    for when in ("before", "after"):
        assert f"{held_out[when]['mean']:.3f}" in text
    assert f"{held_out['difference']['mean']:+.3f}" in text
    assert text.count("before (") == text.count("after  (") == 3


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.1, 0.2, "rose"), (-0.2, -0.1, "FELL"), (-0.1, 0.1, "No clear")]
)
def test_the_verdict_follows_the_interval(run, low, high, verdict):
    difference = run.summary["held_out"]["difference"] | {"ci95_low": low, "ci95_high": high}
    for n, said in ((12, verdict), (3, "Too few held-out prompts (3) to say")):
        held_out = run.summary["held_out"] | {"difference": difference | {"n": n}}
        text = printed(run, summary=run.summary | {"held_out": held_out})
        assert said in text and text.count("Preferred to the untrained policy") == (n == 12)


def train(tmp_path, scorer, **changes):
    fixed = dict(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=[f"Prompt {i}?" for i in range(16)], steps=2,
        held_out=12, prompts_per_step=2, samples_per_prompt=3, max_tokens=6, runs=str(tmp_path), quiet=True,
        loss="rloo", save_rollouts=False, learning_rate=3e-3,
    )  # fmt: skip
    return ls.train(scorer=scorer, **fixed | changes)


def test_where_every_completion_has_one_score_there_is_no_verdict_and_no_advice_to_go_on(tmp_path):
    rounded = train(
        tmp_path, lambda completions, **_: [0.1] * len(completions), prompts_per_step=3, samples_per_prompt=4
    )
    assert 1.2 / 12 != 0.1 and rounded.summary["training"]["one_score"] == 0.1
    run = train(tmp_path, lambda completions, **_: [0.5] * len(completions))
    text = " ".join(printed(run).split())
    assert "No verdict: the scorer gave every completion the same score (0.5), so nothing was learned" in text
    assert not any(word in text for word in ("No clear change", "would tell", "Preferred", "rose"))
    assert run.summary["held_out"]["difference"]["ci95_low"] is None  # not 0 to 0
    assert run.summary["training"]["steps_without_signal"] == 2


def test_where_only_the_prompt_decides_the_score_nothing_was_learned(tmp_path):
    def by_prompt(prompts, completions, **_):
        return [float(sum(map(ord, p))) for p in prompts]

    run = train(tmp_path, by_prompt)
    assert "No verdict: in none of the 2 steps did the scores" in " ".join(printed(run).split())
    learns = train(tmp_path, by_prompt, loss="reinforce")
    assert learns.summary["training"]["steps_without_signal"] == 0  # it compares nothing, and learns from any reward


def test_one_text_for_every_prompt_is_no_success(tmp_path):
    run = train(tmp_path, lambda completions, **_: [float(len(set(c))) for c in completions])
    same = [
        dataclasses.replace(r, completion="yes", score=dataclasses.replace(r.score, value=99.0))
        for r in run.after.rollouts
    ]
    after = ls.training.Evaluation(same)
    summary = run.summary | {"held_out": comparison(run.before, after)}
    assert summary["held_out"]["difference"]["ci95_low"] > 0  # the figures alone would say that it rose
    text = " ".join(printed(run, summary=summary, after=after).split())
    assert "answers all 12 held-out prompts with one and the same text" in text
    assert "rose" not in text and "Preferred" not in text
    few = [dataclasses.replace(r, completion="yes" if i else "no") for i, r in enumerate(same)]
    summary = run.summary | {"held_out": comparison(run.before, ls.training.Evaluation(few))}
    text = " ".join(printed(run, summary=summary).split())
    assert "rose" in text and "2 different texts, and were 12 before" in text


def test_what_was_dropped_is_said_with_its_share_and_what_the_interval_rests_on(tmp_path):
    def half(completions, **_):
        return [len(c) / 10 if i % 2 else None for i, c in enumerate(completions)]

    run = train(tmp_path, half, scorer_errors="drop")
    text = " ".join(printed(run).split())
    assert "6 of 12 completions (50%) had no score and were dropped" in text
    assert "6 of 12 held-out prompts have a score both before and after: the interval is from 6 prompts" in text
    assert "Too few held-out prompts (6) to say" in text


def test_a_hostile_completion_is_shown_and_never_obeyed(run):
    """Escape sequences that would clear the screen or set its title, and markup that would color it."""
    hostile = "\x1b[2J\x1b]0;owned\x07[bold red]fine[/]\r"
    evil = [dataclasses.replace(r, completion=hostile) for r in run.after.rollouts]
    text = printed(run, after=ls.training.Evaluation(evil))
    assert "\x1b[2J" not in text and "\x07" not in text and "\x1b]0" not in text
    assert "[bold red]fine[/]" in text
    assert printable(hostile) == "\ufffd[2J\ufffd]0;owned\ufffd[bold red]fine[/]\ufffd"


def test_the_opening_says_batch_arithmetic_formula_and_memory(run):
    plan = ls.plan(run.recipe)
    text = opening(plan, run)
    for piece in ("9 prompts", "6 to train on, 3 held out", "2 prompts x 3 samples = 6 completions", "0.02·", "about"):
        assert piece in text
    lines = batch_arithmetic(ls.Recipe.make(prompts_per_step=4, updates_per_step=2, epochs=3, steps=5), 10)
    assert "6 updates a step x 5 steps = 30 updates; the prompts are seen 2.00 times" in lines[1]


def target(completions, target_word):
    return [float(text.count(word)) for text, word in zip(completions, target_word, strict=True)]


def anything(completions, **columns):
    return [0.0 for _ in completions]


def test_what_reaches_whom_is_said_before_the_run():
    rows = [{"prompt": "Why?", "tools": [{"name": "x"}], "target_word": w, "topic": "t"} for w in "ab"]
    prompts, policy = load_prompts(rows), tiny.policy()
    scorer, every = load_scorer(target, columns=prompts.columns), load_scorer(anything, columns=prompts.columns)
    unread = "! the model's chat template does not read: tools (2 prompts)"
    assert who_reads(policy, prompts, [scorer]) == ["to the scorer: target_word", "to nobody: topic", unread]
    assert who_reads(policy, prompts, [load_scorer("length")]) == ["to nobody: target_word, topic", unread]
    assert who_reads(policy, prompts, [scorer, every]) == ["to the scorer: target_word, tools, topic", unread]
    assert who_reads(policy, prompts) == [unread]
    policy.tokenizer.chat_template = "{{ tools }}" + tiny.TEMPLATE
    reached = ["to the scorer: target_word", "to the chat template: tools", "to nobody: topic"]
    assert who_reads(policy, prompts, [scorer]) == reached
