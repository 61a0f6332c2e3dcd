"""`lossmith doctor` on runs as they lie on disk, and the same detectors while a run is under way."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lossmith as ls
import tiny
from lossmith.cli import app
from lossmith.detectors import DETECTORS
from lossmith.errors import LossmithError, RecipeError, RunError
from lossmith.report.run.live import LiveView
from lossmith.training.evaluate import Evaluation, rescored, sentences
from lossmith.training.loop import learn
from lossmith.training.prepare import open_run, plan

KEYS = ("n", "changed", "mean", "ci95_low", "ci95_high", "mean_absolute", "spread", "claimed", "dtype", "vocabulary")
PROMPTS = [f"Prompt number {i}?" for i in range(20)]


def letters(completions, **_):
    return [len(set(text)) / max(1, len(text)) for text in completions]


def train(tmp_path, **changes):
    fixed = dict(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=PROMPTS, held_out=12, steps=4, quiet=True,
        prompts_per_step=3, samples_per_prompt=4, max_tokens=12, learning_rate=1e-3, runs=str(tmp_path / "runs"),
        loss="grpo(beta=0.02)", scorer=letters,
    )  # fmt: skip
    return ls.train(**fixed | changes)


def lines(run, name="findings.jsonl"):
    path = run.folder.path / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def doctor(*words):
    """The exit code of the command."""
    try:
        app(["doctor", *map(str, words)], exit_on_error=False)
    except SystemExit as left:
        return left.code or 0
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("a"))


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    return train(tmp_path_factory.mktemp("b"), steps=9, scorer=lambda completions, **_: [0.5] * len(completions))


# -- on disk ----------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_looked_at_whole(finished):
    found = ls.doctor(finished.folder.path)
    assert found.steps == 4 and found.at_least("warn") == ()
    assert {"scorer_drift", "sampler_gap", "weights_unmoved", "reference_moved", "uniform_noise"} <= set(found.passed)
    assert found.not_checked["watched_falls"] == "watch is not recorded"
    assert finished.summary["rescored"]["n"] == 12 and finished.summary["rescored"]["changed"] == 0


def test_the_same_is_found_afterwards_as_under_way(silent):
    assert {f["detector"] for f in silent.summary["findings"]} == {
        f.detector for f in ls.doctor(silent.folder.path).findings
    }


def test_a_run_without_rollouts_and_one_without_metrics_are_looked_at_too(silent, tmp_path):
    shutil.copytree(silent.folder.path, tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "rollouts")
    assert "constant_scorer" in {f.detector for f in ls.doctor(tmp_path / "a").findings}
    shutil.copytree(silent.folder.path, tmp_path / "b")
    (tmp_path / "b" / "metrics.jsonl").unlink()
    found = ls.doctor(tmp_path / "b")
    (constant,) = [f for f in found.findings if f.detector == "constant_scorer"]
    assert constant.n == 5 * 12 and constant.places[0].said == "score 0.5" and constant.places[0].prompt in PROMPTS
    assert found.not_checked["gradient_spike"] == "grad_norm is not recorded"


def test_a_dead_run_with_a_torn_line_and_a_damaged_file_is_looked_at_and_the_damage_said(finished, tmp_path):
    dead = tmp_path / "dead"
    shutil.copytree(finished.folder.path, dead)
    (dead / "summary.json").unlink()
    (dead / "metrics.jsonl").write_bytes((dead / "metrics.jsonl").read_bytes()[:-40])
    (dead / "rollouts" / "step-00001.parquet").write_bytes(b"PAR1 nothing")
    (dead / "recipe.toml").write_text("steps = = 3")
    found = ls.doctor(dead)
    assert found.steps == 4 and found.not_checked["scorer_drift"].startswith("the first texts were not scored again")
    assert len(found.notes) == 2 and "step-00001" in " ".join(found.notes) and "recipe.toml" in " ".join(found.notes)
    assert "note: " in str(found)


@pytest.mark.parametrize("what", ["nothing", "empty folder", "empty metrics", "a pickle", "text"])
def test_what_is_no_run_is_a_clear_error(tmp_path, what):
    place = tmp_path / "x"
    if what == "empty folder":
        place.mkdir()
    elif what == "empty metrics":
        place.mkdir()
        (place / "metrics.jsonl").write_text("")
    elif what == "a pickle":
        place = tmp_path / "x.pkl"
        place.write_bytes(b"cos\nsystem\n")
    elif what == "text":
        place.write_text("hello\n")
    with pytest.raises(RunError):
        ls.doctor(place)


def test_rollouts_of_another_trainer_are_looked_at_and_what_they_lack_is_said(tmp_path):
    """TRL's completions parquet: text, rewards and advantages; here with the sign turned round."""
    rows = [
        {"step": s, "prompt": f"Why {p}?", "completion": f"of {s} {p} {k}", "reward": k / 4, "advantage": 1 - k / 2}
        for s in range(1, 5) for p in range(3) for k in range(4)
    ]  # fmt: skip
    for step in range(1, 5):
        table = pyarrow.Table.from_pylist([row for row in rows if row["step"] == step])
        pyarrow.parquet.write_table(table, tmp_path / f"completions_{step:05d}.parquet")
    found = ls.doctor(tmp_path)
    (turned,) = found.at_least("stop")
    assert turned.detector == "advantage_sign" and turned.value == 1.0 and turned.n == 4 * 3 * 6
    assert "rollouts of TRL" in found.notes
    assert found.not_checked["truncation"] == "ended is not recorded"
    assert found.not_checked["length_drift"] == "length is not recorded"


def test_no_code_of_the_run_is_executed(finished, tmp_path):
    copy, marker = tmp_path / "r", tmp_path / "ran"
    shutil.copytree(finished.folder.path, copy)
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for loss in (
        f"'{tmp_path}/evil.py:f'",
        f"{{name = '{tmp_path}/evil.py:f'}}",
        f"{{function = '{tmp_path}/evil.py:f'}}",
    ):
        (copy / "recipe.toml").write_text(f"loss = {loss}\nscorer = '{tmp_path}/evil.py:f'\n")
        ls.doctor(copy)
    assert not marker.exists()


VALUES = st.one_of(
    st.floats(), st.integers(-3, 10**400), st.none(), st.booleans(), st.text(max_size=3),
    st.floats(-2, 2), st.integers(0, 4), st.lists(st.integers(), max_size=2),
)  # fmt: skip
READ = sorted({name for d in DETECTORS.values() for names in d.reads for name in names.split("|")} - {"step"})
RECORDS = st.lists(st.dictionaries(st.sampled_from([*READ, "tokens", "completions", "kl_ref"]), VALUES), max_size=8)
SETTINGS = ("kl_budget", "watch_window", "epochs", "updates_per_step", "max_tokens", "learning_rate", "loss", "scorer")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RECORDS, st.dictionaries(st.sampled_from(SETTINGS), VALUES), st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_whatever_the_files_of_a_run_hold_there_is_a_result_or_a_clear_error(tmp_path, records, recipe, rescored):
    numbered = [{**record, "step": i} for i, record in enumerate(records)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in numbered))
    plain = {k: v for k, v in recipe.items() if v is not None and abs(v if isinstance(v, int) else 0) < 2**63}
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(plain))
    (tmp_path / "summary.json").write_text(json.dumps({"rescored": {**rescored, "change": rescored}}))
    (tmp_path / "inputs.json").write_text(json.dumps({"known": rescored}))
    try:
        found = ls.doctor(tmp_path)
    except LossmithError:
        return
    assert json.loads(json.dumps(found.as_dict())) and str(found)
    assert len(found.findings) + len(found.passed) + len(found.not_checked) == len(DETECTORS)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_says_what_why_where_and_what_to_try(silent, capsys):
    assert doctor(silent.folder.path) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines() if str(silent.folder.path) not in line)
    for part in (
        "STOP  constant_scorer:",
        "likely",
        "try",
        "source arXiv:",
        "where  step",
        "passed (",
        "not checked (",
    ):
        assert part in text


def test_json_and_exit_codes_for_ci(silent, finished, capsys):
    assert doctor(silent.folder.path, "--json", "--fail-on", "stop") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["findings"][0]["detector"] == "constant_scorer" and found["findings"][0]["steps"]["first"] == 0
    assert doctor(silent.folder.path, "--fail-on", "warn") == 1
    assert doctor(finished.folder.path, "--fail-on", "warn") == 0
    with pytest.raises(LossmithError):
        doctor(silent.folder.path.parent / "none", "--fail-on", "warn")


# -- under way --------------------------------------------------------------------------------------------------------


def test_a_constant_scorer_stops_the_run_and_there_is_no_verdict(silent):
    assert len(lines(silent, "metrics.jsonl")) == 5
    assert (
        silent.stopped
        == "no signal: in steps 1 to 5 all 60 completions scored 0.5; the scorer does not tell them apart"
    )
    said = [(line["after_step"], line["detector"], line["level"]) for line in lines(silent)]
    assert (2, "constant_scorer", "warn") in said and (4, "constant_scorer", "stop") in said
    assert len(said) == len(set(said))  # once, and again only where it got worse
    assert sentences(silent.summary)[0].startswith("No verdict")


def test_a_learning_rate_that_destroys_the_weights_is_no_success(tmp_path):
    run = train(tmp_path, learning_rate=1.0)
    assert run.stopped.startswith("the weights moved by") and "learning_rate = 1" in run.stopped
    assert len(lines(run, "metrics.jsonl")) == 1
    assert sentences(run.summary)[0].startswith("No verdict: the weights moved by")
    assert "rose" not in " ".join(sentences(run.summary))


def test_guards_decide_whether_it_stops_warns_or_is_not_looked_for(tmp_path):
    on = train(tmp_path, learning_rate=1.0, guards={"all": "warn"}, steps=2)
    assert not on.stopped and {line["level"] for line in lines(on)} <= {"note", "warn"}
    assert sentences(on.summary)[0].startswith("No verdict")  # what a finding does and what it means are two things
    off = train(tmp_path, learning_rate=1.0, guards={"all": "off"}, steps=2)
    assert not off.stopped and lines(off) == [] and off.summary["findings"] == [] and off.summary["rescored"] is None


def test_a_scorer_that_drifts_is_found_at_the_end(tmp_path):
    """Its scores grow with its calls: before and after differ, and nothing was learned."""
    calls = []

    def drifting(completions, **_):
        calls.append(1)
        return [score + len(calls) for score in letters(completions)]

    run = train(tmp_path, scorer=drifting)
    (found,) = [f for f in run.summary["findings"] if f["detector"] == "scorer_drift"]
    assert found["value"] == pytest.approx(6) and found["n"] == 12  # of 7 calls: the first and the last
    assert sentences(run.summary)[0].startswith("No verdict: the scorer gave other scores to the same 12 texts: +6")


def test_texts_that_the_scorer_fails_on_at_the_end_are_left_out(tmp_path):
    """The run is over by then: a server that has gone away must not take it along."""
    calls = []

    def leaves(completions, **_):
        calls.append(1)
        if len(calls) > 6:
            raise ConnectionError("gone")
        return letters(completions)

    run = train(tmp_path, scorer=leaves)
    assert run.summary["rescored"]["n"] == 0 and "scorer_drift" not in {f["detector"] for f in run.summary["findings"]}


def test_scores_again_are_compared_text_by_text():
    before, after = (Evaluation([r for r in tiny.rollouts() if r.sample == 0]) for _ in range(2))
    found = rescored(before, after, float("nan"))
    assert found["n"] == 0 and found["claimed"] is None


def test_a_resumed_run_does_not_say_again_what_it_said(tmp_path):
    whole = train(tmp_path, name="whole", steps=6, checkpoint_every=1, guards={"all": "warn"})
    recipe = dict(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=PROMPTS, held_out=12, steps=6, max_tokens=12,
        prompts_per_step=3, samples_per_prompt=4, learning_rate=1e-3, runs=str(tmp_path / "runs"), name="cut",
        loss="grpo(beta=0.02)", scorer=letters, checkpoint_every=1, guards={"all": "warn"},
    )  # fmt: skip
    run = open_run(plan(ls.Recipe.make(**recipe)))
    for step in learn(run):
        if step.index == 4:
            break
    run.close()
    path = run.folder.path / "findings.jsonl"
    torn = '{"after_step": 3, "detec'
    path.write_text(
        path.read_text() + json.dumps({"after_step": 99, "detector": "later", "level": "stop"}) + "\n" + torn
    )
    resumed = ls.resume(run.folder.path, scorer=letters, prompts=PROMPTS)
    assert [{**line, "places": []} for line in lines(resumed)] == [{**line, "places": []} for line in lines(whole)]
    figures = [
        {k: v for k, v in r.items() if "seconds" not in k and "second" not in k} for r in lines(whole, "metrics.jsonl")
    ]
    again = [
        {k: v for k, v in r.items() if "seconds" not in k and "second" not in k}
        for r in lines(resumed, "metrics.jsonl")
    ]
    assert figures == again


def test_the_bfloat16_sampler_is_shown_measured_and_explained(tmp_path, capsys):
    run = train(tmp_path, dtype="bfloat16", steps=2, quiet=False)
    out = capsys.readouterr().out
    records = lines(run, "metrics.jsonl")
    assert all(0.005 < r["sampler_gap"] < 0.1 and 0 <= r["sampler_outside"] < 0.5 and r["ess"] > 0.9 for r in records)
    assert f"gap {records[0]['sampler_gap']:.3f}" in out and "mismatch='tis'" in out
    assert [line["level"] for line in lines(run) if line["detector"] == "sampler_gap"] == ["note"]


def test_a_corrected_loss_trains_on_what_the_note_offers(tmp_path):
    for loss in ("grpo(mismatch='tis')", "grpo(mismatch='icepop')"):
        assert len(lines(train(tmp_path, dtype="bfloat16", steps=1, loss=loss), "metrics.jsonl")) == 1


def test_what_a_step_shows_stands_below_its_line(tmp_path, capsys):
    train(tmp_path, quiet=False, scorer=lambda completions, **_: [0.5] * len(completions))
    lines_ = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines_) if "constant_scorer" in line or "all 36 completions" in line)
    above = max(i for i, line in enumerate(lines_[:at]) if line.startswith("step "))
    assert lines_[above].startswith("step   3/4")
    assert LiveView is not None and all(len(line) <= 80 for line in lines_[above:at])


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guards", "said"),
    [
        ({"sampler_gab": "warn"}, "there is no detector 'sampler_gab'. Did you mean 'sampler_gap'"),
        ({"sampler_gap": "loud"}, "guards[sampler_gap] = 'loud': a table of names, each with one of warn, stop, off"),
        ("stop", "guards = 'stop': a table of names"),
        ({"all": True}, "guards[all] = true"),
    ],
)
def test_a_wrong_guard_is_named(guards, said):
    with pytest.raises(RecipeError) as error:
        ls.Recipe.make(guards=guards)
    assert said in str(error.value)


def test_guards_stand_in_recipes_and_options_alike(tmp_path):
    (tmp_path / "r.toml").write_text('guards = { all = "warn", sampler_gap = "off" }\n')
    assert ls.Recipe.make(**ls.Recipe.read(tmp_path / "r.toml")).guards == {"all": "warn", "sampler_gap": "off"}
    assert ls.Recipe.make(guards={"sampler-gap": "off"}).guards == {"sampler_gap": "off"}
    with pytest.raises(LossmithError, match="there is no detector 'nonsense'"):
        app(["train", "--guards.nonsense", "warn"], exit_on_error=False)


@pytest.mark.slow
def test_healthy_runs_of_many_losses_raise_no_alarm_and_ill_ones_are_found():
    """Its exit code: a false stop, more than one false warning, an illness that was missed."""
    script = Path(__file__).parent.parent / "benchmarks" / "doctor.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
