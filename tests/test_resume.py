"""A run that cannot be lost or swapped: signals, checkpoints, changed inputs, and what a kill leaves behind."""

import itertools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForSequenceClassification

import lossmith as ls
import tiny
from lossmith.durable import checkpoint as checkpoints
from lossmith.durable import stopping
from lossmith.errors import FinishedError, LossmithError, RecipeError, RunError, ScorerError
from lossmith.training.run import RunFolder

PROMPTS = [f"Prompt number {i}?" for i in range(8)]
QUIET = Console(quiet=True)
SCORER = "def score(completions, **_):\n    return [sum(ord(c) % 2 == 0 for c in t) / 10 for t in completions]\n"
LOSS = "def mine(batch, *, beta=0.1):\n    return (-batch.reward[:, None] * batch.logp).sum() * beta\n"


def settings(runs, **changes):
    base = dict(
        model=str(tiny.folder()), device="cpu", dtype="float32", prompts=PROMPTS, held_out=2, scorer="length", steps=4,
        prompts_per_step=2, samples_per_prompt=2, max_tokens=6, learning_rate=3e-3, runs=str(runs), name="run",
        checkpoint_every=1, checkpoint_minutes=0,
    )  # fmt: skip
    return base | changes


def begin(runs, steps=2, **changes):
    """A run that was killed after so many steps: nothing is closed or finished. Its folder."""
    run = ls.open_run(ls.plan(ls.Recipe.make(**settings(runs, **changes))))
    for step in ls.learn(run) if steps else ():
        if step.index + 1 == steps:
            break
    return run.folder.path


def resume(folder, **more):
    return ls.resume(folder, console=QUIET, **more)


def said(folder, capsys, **more):
    """(the run, what it printed) of a run that is gone on with."""
    capsys.readouterr()
    run = ls.resume(folder, console=Console(width=500), **more)
    return run, " ".join(capsys.readouterr().out.split())


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def result(folder):
    """What must be equal to the bit."""
    timing = ("seconds", "tokens_per_second")
    records = [{k: v for k, v in r.items() if not k.startswith(timing)} for r in metrics(folder)]
    summary = json.loads((Path(folder) / "summary.json").read_text())
    return records, summary["policy_checksum"], summary["held_out"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Four steps that nothing interrupted."""
    runs = tmp_path_factory.mktemp("unbroken")
    return ls.train(**settings(runs), quiet=True).folder.path


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The same, killed after three."""
    return begin(tmp_path_factory.mktemp("broken"), steps=3)


@pytest.fixture
def stopped(broken, tmp_path):
    return Path(shutil.copytree(broken, tmp_path / "run"))


# -- every kill point -------------------------------------------------------------------------------------------------


def kill_points(*arguments):
    script = Path(__file__).with_name("kill_points.py")
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_run_hit_at_a_system_call_ends_equal_to_the_run_that_nothing_hit():
    kill_points("--count", "2", "--seed", "7", "--kinds", "kill")  # the slow test has the signals and full disks too


@pytest.mark.slow
def test_a_run_hit_at_many_system_calls_of_each_kind_ends_equal():
    print(kill_points("--count", "25"))  # python tests/kill_points.py does 200 of each kind


@pytest.mark.parametrize("name", ["policy/README.md", "summary.json"])
def test_a_run_stopped_before_its_last_file_is_gone_on_with(stopped, monkeypatch, name):
    """summary.json says that a run is over, so nothing may come after it: not the model card either."""
    write = RunFolder.write_text

    def killed(folder, written, text):
        if written == name:
            raise KeyboardInterrupt
        write(folder, written, text)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RunFolder, "write_text", killed)
        ls.resume(stopped, console=QUIET)
    ls.resume(stopped, console=QUIET)
    assert (stopped / "policy/README.md").exists()
    assert (stopped / "summary.json").exists()


# -- signals ----------------------------------------------------------------------------------------------------------


class Signalling:
    """The shipped scorer by length, which sends this process signals at one of its calls, and then takes its time."""

    name = "signalling"
    fails_at = 0

    def __init__(self, at, *signals, seconds=0.0):
        self.at, self.signals, self.seconds, self.calls = at, signals, seconds, 0
        self.length = ls.load_scorer("length")

    def score(self, rollouts):
        self.calls += 1
        if self.calls == self.fails_at:
            raise ScorerError("it is broken")
        if self.calls == self.at:
            for number in self.signals:
                os.kill(os.getpid(), number)
                time.sleep(0.3)  # two that come together are one
            end = time.monotonic() + self.seconds
            while time.monotonic() < end:
                time.sleep(0.01)
        return self.length.score(rollouts)


@pytest.mark.parametrize(
    ("number", "ending"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)],
)
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, unbroken, number, ending):
    before = signal.getsignal(number)
    with pytest.raises(ending) as caught:  # the first call scores the held-out prompts
        ls.train(
            **settings(tmp_path, scorer=Signalling(3, number), checkpoint_every=0, checkpoint_minutes=9), quiet=True
        )
    assert signal.getsignal(number) == before
    if ending is SystemExit:
        assert caught.value.code == 128 + number
    assert "saved after step 2 of 4" in caught.value.__notes__[0]
    assert "lossmith.resume(" in caught.value.__notes__[0] and "scorer=..." in caught.value.__notes__[0]
    assert [r["step"] for r in metrics(tmp_path / "run")] == [0, 1]
    resume(tmp_path / "run", scorer=Signalling(0))
    assert result(tmp_path / "run") == result(unbroken)


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_step_that_does_not_end_in_seconds_is_dropped(tmp_path, unbroken, monkeypatch, number, ending):
    monkeypatch.setattr(stopping, "GRACE", 0.2)
    start = time.monotonic()
    with pytest.raises(ending) as caught:
        ls.train(**settings(tmp_path, scorer=Signalling(3, number, seconds=60)), quiet=True)
    assert time.monotonic() - start < 30
    assert "saved after step 1 of 4" in caught.value.__notes__[0]
    resume(tmp_path / "run", scorer=Signalling(0))
    assert result(tmp_path / "run") == result(unbroken)


def test_a_signal_that_comes_just_before_the_main_thread_waits_is_sent_again(tmp_path, monkeypatch):
    """It is then heard by nobody: the first to wake the main thread, and the first after the grace, are lost here."""
    monkeypatch.setattr(stopping, "GRACE", 0.2)
    sent = []
    send = signal.pthread_kill
    monkeypatch.setattr(
        stopping.signal, "pthread_kill", lambda *to: sent.append(to) or (send(*to) if len(sent) > 2 else None)
    )
    start = time.monotonic()
    with pytest.raises(SystemExit):
        ls.train(**settings(tmp_path, scorer=Signalling(3, signal.SIGTERM, seconds=60)), quiet=True)
    assert len(sent) > 2 and time.monotonic() - start < 30


def test_a_second_signal_leaves_at_once_and_what_was_saved_is_whole(tmp_path, unbroken):
    scorer = Signalling(4, signal.SIGINT, signal.SIGINT, seconds=60)
    with pytest.raises(KeyboardInterrupt):
        ls.train(**settings(tmp_path, scorer=scorer, checkpoint_every=2), quiet=True)
    assert [c.name for c in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00002"]
    resume(tmp_path / "run", scorer=Signalling(0))
    assert result(tmp_path / "run") == result(unbroken)


def test_the_watch_for_signals_ends_with_the_work():
    """A thread that let go of a model's tensors while Python shut down ended a finished run with SIGABRT."""
    before = threading.active_count()
    for _ in range(50):
        with stopping.Stopping():
            assert threading.active_count() == before + 1
        assert threading.active_count() == before


def test_a_signal_in_the_middle_of_an_update_waits_for_its_end(tmp_path, monkeypatch):
    """Two optimizer steps a round: after the first, the weights belong to no step."""
    monkeypatch.setattr(stopping, "GRACE", 0.01)
    changes = dict(epochs=2, checkpoint_every=0, checkpoint_minutes=9)
    straight = ls.train(**settings(tmp_path / "a", **changes), quiet=True).folder.path
    learner, calls = ls.training.learner.Learner, []
    own = learner._optimizer_step

    def signalling(self, step):
        found = own(self, step)
        calls.append(step)
        if len(calls) == 3:  # the first of the second step's two
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # the grace is over
        return found

    monkeypatch.setattr(learner, "_optimizer_step", signalling)
    with pytest.raises(SystemExit) as caught:
        ls.train(**settings(tmp_path / "b", **changes), quiet=True)
    assert calls == [0, 0, 1, 1] and "saved after step 2" in caught.value.__notes__[0]
    resume(tmp_path / "b" / "run")
    assert result(tmp_path / "b" / "run") == result(straight)


LOSSMITH = [sys.executable, "-c", "from lossmith.cli import main; main()"]


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """{how it was ended: (exit code, standard error, run folder)} of real processes in the middle of a run."""
    home = tmp_path_factory.mktemp("children")
    (home / "scorer.py").write_text("import time\n" + SCORER.replace("return", "time.sleep(0.3)\n    return"))
    (home / "prompts.txt").write_text("\n".join(PROMPTS))
    fields = settings(home, scorer="scorer.py:score", prompts="prompts.txt", steps=40)
    fields |= {"checkpoint_every": 0, "checkpoint_minutes": 9}
    started = {}
    for how in ("SIGINT", "pipe"):
        options = [f"--{key.replace('_', '-')}={value}" for key, value in (fields | {"name": how}).items()]
        started[how] = subprocess.Popen(
            [*LOSSMITH, "train", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home
        )
    return {how: ended(process, how, home / how) for how, process in started.items()}


def ended(process, how, folder):
    with process:
        while not process.stdout.readline().startswith("step"):
            assert process.poll() is None, process.stderr.read()
        if how == "pipe":
            process.stdout.close()
        else:
            process.send_signal(getattr(signal, how))
        said = process.stderr.read()
    return process.returncode, said, folder


@pytest.mark.slow  # two processes; signals within this one are tried above
@pytest.mark.parametrize(("how", "code"), [("SIGINT", 130), ("pipe", 141)])
def test_a_real_process_says_the_command_that_goes_on(children, how, code):
    status, error, folder = children[how]
    assert status == code, error
    assert "Traceback" not in error
    saved = len(metrics(folder))
    assert saved >= 1
    assert f"The run is saved after step {saved} of 40. Go on with: lossmith train --resume {folder}" in error
    assert (folder / "checkpoints" / f"step-{saved:05d}").is_dir()


# -- before the first checkpoint --------------------------------------------------------------------------------------


def test_a_run_without_a_checkpoint_begins_again_with_its_first_step(tmp_path, unbroken):
    folder = begin(tmp_path, steps=2, checkpoint_every=0)
    assert not (folder / "checkpoints").exists()
    resume(folder)
    assert result(folder) == result(unbroken)


def test_a_folder_of_a_run_that_never_began_is_used_again(tmp_path, unbroken):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "inputs.json").write_text("{}")
    (folder / ".recipe.toml.partial").write_text("model = ")
    with pytest.raises(RunError, match=r"stopped before it began.*Start it anew"):
        resume(folder)
    ls.train(**settings(tmp_path), quiet=True)
    assert result(folder) == result(unbroken)


def test_what_fails_before_the_run_began_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_):
        raise RunError("the disk is full")

    monkeypatch.setattr("lossmith.training.run.write_atomically", full)
    with pytest.raises(RunError, match="disk is full"):
        ls.train(**settings(tmp_path), quiet=True)
    assert list(tmp_path.iterdir()) == []


# -- an error on the way ----------------------------------------------------------------------------------------------


def test_a_scorer_that_fails_costs_its_step_and_no_more(tmp_path, unbroken):
    scorer = Signalling(0)
    scorer.fails_at = 4
    with pytest.raises(LossmithError, match="it is broken") as caught:
        ls.train(**settings(tmp_path, scorer=scorer, checkpoint_every=0, checkpoint_minutes=9), quiet=True)
    assert "saved after step 2 of 4" in caught.value.__notes__[0]
    resume(tmp_path / "run", scorer=Signalling(0))
    assert result(tmp_path / "run") == result(unbroken)


# -- a finished run, and more steps -----------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_more_steps_make_it_the_longer_run(tmp_path, unbroken):
    ls.train(**settings(tmp_path, steps=2), quiet=True)
    folder = tmp_path / "run"
    with pytest.raises(FinishedError, match=r"is finished \(2 steps\).*--resume .*run --steps 4") as caught:
        resume(folder)
    assert caught.value.summary["steps"] == 2
    with pytest.raises(FinishedError):
        resume(folder, steps=2)
    with pytest.raises(RunError, match=r"steps = 1, but the run .* was begun with 2"):
        resume(folder, steps=1)
    resume(folder, steps=4)
    assert result(folder) == result(unbroken)
    assert ls.Recipe.read(folder / "recipe.toml")["steps"] == 4
    with pytest.raises(FinishedError, match="4 steps"):
        resume(folder)


def test_more_steps_under_a_schedule_that_falls_over_them_are_asked_about(tmp_path):
    ls.train(**settings(tmp_path, steps=2, schedule="linear"), quiet=True)
    with pytest.raises(
        RunError, match=r"steps: 2 -> 3 \(schedule = 'linear' falls over them.*--steps 3 --accept-changes"
    ):
        resume(tmp_path / "run", steps=3)
    run = resume(tmp_path / "run", steps=3, accept_changes=True)
    assert run.summary["accepted_changes"][0].startswith("steps: 2 -> 3")


def test_the_shell_takes_more_steps_and_nothing_else(unbroken, capsys):
    from lossmith.cli.train import train

    with pytest.raises(RecipeError, match="only --steps"):
        train(resume=unbroken, settings=ls.Recipe.make(seed=1))
    with pytest.raises(RecipeError, match="goes with --resume"):
        train(accept_changes=True)
    train(resume=unbroken, as_json=True)  # it is finished, and that is no error
    out, err = capsys.readouterr()
    assert "is finished (4 steps)" in " ".join(err.split()) and json.loads(out)["steps"] == 4


# -- checkpoints ------------------------------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "weights.safetensors is damaged": lambda c: flip(c / "weights.safetensors"),
    "optimizer.safetensors is damaged": lambda c: os.truncate(c / "optimizer.safetensors", 500),
    "state.json is missing": lambda c: (c / "state.json").unlink(),
    "metrics.jsonl is damaged": lambda c: (c / "metrics.jsonl").write_bytes(b""),
    "manifest.json is missing": lambda c: (c / "manifest.json").unlink(),
    "manifest.json is damaged: it does not list": lambda c: (c / "manifest.json").write_text("{}"),
    "manifest.json is damaged": lambda c: (c / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("wrong", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(stopped, unbroken, capsys, wrong):
    assert sorted(c.name for c in (stopped / "checkpoints").iterdir()) == ["step-00002", "step-00003"]
    DAMAGE[wrong](stopped / "checkpoints" / "step-00003")
    run, out = said(stopped, capsys)
    assert f"damaged checkpoint (step-00003: {wrong}" in out and "going on from the one before, step-00002" in out
    assert run.first_step == 2
    assert result(stopped) == result(unbroken)


def test_where_every_checkpoint_is_damaged_each_is_named(stopped):
    for c in (stopped / "checkpoints").iterdir():
        flip(c / "weights.safetensors")
    with pytest.raises(RunError, match=r"every checkpoint .*\(step-00003: weights.*; step-00002: weights.*begin again"):
        resume(stopped)


def test_checkpoints_are_put_in_order_by_number(tmp_path):
    for step in (9, 99_999, 100_000):
        checkpoints.save(tmp_path, step, {"weights": {"a": torch.zeros(1)}}, {"state.json": "{}"})
    found, damaged = checkpoints.newest(tmp_path)
    assert found is not None and found.step == 100_000 and not damaged
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-100000", "step-99999"]
    assert found.tensors("weights")["a"].tolist() == [0]


def test_checkpoints_by_time_take_a_few_percent_of_it_at_most(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    pace = checkpoints.Pace(every=0, minutes=1)
    saved = []
    for step in range(1, 2000):
        now[0] += 1.0
        if pace.due(step):
            now[0] += 9.0  # what saving takes
            pace.saved(9.0)
            saved.append(now[0])
    assert saved[0] == 69
    assert all(300 <= b - a <= 311 for a, b in itertools.pairwise(saved))
    assert not checkpoints.Pace(0, 0).active and checkpoints.Pace(3, 0).due(6) and not checkpoints.Pace(3, 0).due(7)


def test_what_a_kill_left_half_written_is_cleaned_up(stopped, unbroken):
    litter = [
        stopped / "policy.partial" / "model.safetensors",
        stopped / "policy.removed" / "tmp",
        stopped / "checkpoints" / "step-00004.partial" / "weights.safetensors",
        stopped / "checkpoints" / "step-00001.removed" / "weights.safetensors",
        stopped / "rollouts" / ".step-00003.parquet.partial",
        stopped / ".summary.json.partial",
    ]
    for path in litter:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    resume(stopped)
    assert result(stopped) == result(unbroken)
    assert not [p for p in stopped.rglob("*") if p.suffix in (".partial", ".removed")]


def test_run_files_are_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        ls.train(**settings(tmp_path, steps=1), quiet=True)
    finally:
        os.umask(before)
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "run").rglob("*")}
    assert {oct(m) for p, m in modes.items() if p.is_file()} == {"0o644"}, modes
    assert {oct(m) for p, m in modes.items() if p.is_dir()} == {"0o755"}, modes


# -- metrics and rollouts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 5, 300])
def test_a_torn_last_line_of_metrics_blocks_nothing(stopped, unbroken, cut):
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward": 0.4')
    resume(stopped)
    assert result(stopped) == result(unbroken)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: os.truncate(p, p.stat().st_size - 300),
        lambda p: p.write_bytes(p.read_bytes().replace(b'"reward": ', b'"reward": 9', 1)),
        lambda p: p.write_bytes(b"\xff\xfe" + p.read_bytes()[2:]),
        lambda p: p.write_bytes(b""),
        lambda p: p.unlink(),
    ],
)
def test_damaged_metrics_are_written_again_from_the_checkpoint_and_that_is_said(stopped, unbroken, capsys, damage):
    damage(stopped / "metrics.jsonl")
    _, out = said(stopped, capsys)
    assert "metrics.jsonl was damaged; its lines are written again from the checkpoint" in out
    assert result(stopped) == result(unbroken)


def test_damaged_rollouts_are_said(stopped, unbroken, capsys):
    (stopped / "rollouts" / "step-00000.parquet").write_bytes(b"PAR1")
    (stopped / "rollouts" / "held-out-before.parquet").unlink()  # measured again, and that gives the same
    _, out = said(stopped, capsys)
    assert "missing or damaged in rollouts/ (step-00000)" in out
    assert result(stopped) == result(unbroken)


def test_what_was_measured_before_is_not_measured_again(stopped, unbroken, monkeypatch):
    from lossmith.training import loop

    calls = []
    true = loop.Run._evaluate
    monkeypatch.setattr(loop.Run, "_evaluate", lambda run: calls.append(1) or true(run))
    resume(stopped)
    assert len(calls) == 1 and result(stopped) == result(unbroken)


# -- one process a folder ---------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_in_a_sentence(stopped):
    code = "import sys; from lossmith.durable.folder import lock; from pathlib import Path; lock(Path(sys.argv[1]));"
    code += "print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, stopped], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="another process is working in"):
            resume(stopped)
        other.kill()
    resume(stopped)  # the lock died with its process


# -- changed inputs ---------------------------------------------------------------------------------------------------


def reward_model(path, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
        pad_token_id=256, eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with everything that a run reads, and the run in it, killed after two steps."""
    home = tmp_path_factory.mktemp("original")
    (home / "scorer.py").write_text(SCORER)
    (home / "loss.py").write_text(LOSS)
    (home / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "topic": "a"}) + "\n" for p in PROMPTS))
    shutil.copytree(tiny.folder(), home / "model")
    reward_model(home / "judge")
    recipe = f"""
        model = "model"
        prompts = "prompts.jsonl"
        loss = "loss.py:mine(beta=0.2)"
        scorer = {{scorers = ["scorer.py:score", "judge"], weights = [1.0, 0.1]}}
        watch = "scorer.py:score"
        runs = "."
        {
        '''device = "cpu"
        dtype = "float32"
        held_out = 2
        steps = 4
        prompts_per_step = 2
        samples_per_prompt = 2
        max_tokens = 6
        name = "run"
        checkpoint_every = 1'''
    }
    """
    (home / "recipe.toml").write_text("\n".join(line.strip() for line in recipe.splitlines()))
    run = ls.open_run(ls.plan(ls.Recipe.make(**ls.Recipe.read(home / "recipe.toml"))))
    next(ls.learn(run))
    return home


@pytest.fixture
def home(original):
    """The same, put back afterwards."""
    copy = original.with_name("copy")
    shutil.copytree(original, copy)
    yield original
    shutil.rmtree(original)
    copy.rename(original)


def edit(path, old, new, count=1):
    text = path.read_text()
    assert re.search(old, text), text
    path.write_text(re.sub(old, new, text, count=count))


def other_model(home):
    tiny.llama(seed=1).save_pretrained(home / "model")


def add_a_prompt(home):
    edit(home / "prompts.jsonl", "^", '{"prompt": "One more?"}\n')


def edit_recipe(old, new):
    return lambda home: edit(home / "run" / "recipe.toml", old, new)


CHANGES = {
    r"the prompts: 8 prompts [0-9a-f]{12} -> 9 prompts": add_a_prompt,
    r"the prompts: 8 prompts \w+ -> 8 prompts": lambda h: edit(h / "prompts.jsonl", '"topic": "a"', '"topic": "b"'),
    r"the scorer's file .*scorer.py: [0-9a-f]{12} -> [0-9a-f]{12}": lambda h: edit(h / "scorer.py", "/ 10", "* 100"),
    r"the loss's file .*loss.py: ": lambda h: edit(h / "loss.py", "-batch", "-2 * batch"),
    r"the model's weights: [0-9a-f]{12} -> ": other_model,
    r"the model's configuration: ": lambda h: edit(h / "model" / "config.json", r"(_eps\W+1e-0)6", r"\g<1>5"),
    r"the tokenizer: .*the prompts' tokens: ": lambda h: edit(h / "model" / "chat_template.jinja", "':'", "'::'"),
    r"the scorer's model .*judge: ": lambda h: reward_model(h / "judge", seed=1),
    r"learning_rate: 4e-05 -> 0.3": edit_recipe("learning_rate = 4e-05", "learning_rate = 0.3"),
    r"loss: .*loss.py:mine\(beta=0.2\) -> grpo": edit_recipe(r"\nloss = .*", '\nloss = "grpo"'),
    r"seed: 0 -> 1": edit_recipe("seed = 0", "seed = 1"),
    r"steps: 4 -> 9 \(more steps, and nothing else, are had with --resume": edit_recipe("\nsteps = 4", "\nsteps = 9"),
    r"max_tokens: 6 -> 7": edit_recipe("max_tokens = 6", "max_tokens = 7"),
}


@pytest.mark.parametrize("named", CHANGES)
def test_each_changed_input_is_named_and_refused(home, named):
    CHANGES[named](home)
    before = (home / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"what decides the run .* has changed.*--accept-changes") as caught:
        resume(home / "run")
    assert re.search(named, str(caught.value)), str(caught.value)
    assert (home / "run" / "metrics.jsonl").read_bytes() == before


def test_a_held_out_prompt_that_is_gone_cannot_be_accepted(home):
    held_out = set(json.loads((home / "run" / "inputs.json").read_text())["known"]["held_out"])
    gone = next(p for p in ls.load_prompts(home / "prompts.jsonl") if p.id in held_out)
    edit(home / "prompts.jsonl", re.escape(json.dumps({"prompt": gone.text, "topic": "a"})) + "\n", "")
    with pytest.raises(RunError, match="1 of the run's 2 held-out prompts are there no more"):
        resume(home / "run", accept_changes=True)


def test_another_split_cannot_be_accepted(home):
    edit(home / "run" / "recipe.toml", "held_out = 2", "held_out = 3")
    with pytest.raises(RunError, match="held_out: 2 -> 3, but"):
        resume(home / "run", accept_changes=True)


def test_accepted_changes_take_effect_and_are_written_down(home, capsys):
    known = json.loads((home / "run" / "inputs.json").read_text())["known"]["held_out"]
    edit(home / "run" / "recipe.toml", "learning_rate = 4e-05", "learning_rate = 0.001")
    edit(home / "run" / "recipe.toml", r"\nloss = .*", '\nloss = "rloo"')
    edit(home / "run" / "recipe.toml", "seed = 0", "seed = 1")
    edit(home / "prompts.jsonl", "^", '{"prompt": "One more?", "topic": "b"}\n')
    run, out = said(home / "run", capsys, accept_changes=True)
    assert "accepted: " in out and "learning_rate: 4e-05 -> 0.001" in out
    rates = [r["learning_rate"] for r in metrics(home / "run")]
    assert rates == [4e-5, 0.001, 0.001, 0.001]
    assert "mean_{j≠i}" in run.summary["loss"]
    assert [p.id for p in run.held_out] == known  # nothing that was trained on is held out now
    assert len(run.prompts) == 7
    assert any(change.startswith("learning_rate") for change in run.summary["accepted_changes"])
    inputs = json.loads((home / "run" / "inputs.json").read_text())
    assert inputs["settings"]["learning_rate"] == 0.001 and inputs["accepted"]


def test_how_often_it_is_saved_may_be_changed_freely(home, capsys):
    edit(home / "run" / "recipe.toml", "checkpoint_every = 1", "checkpoint_every = 3")
    _, out = said(home / "run", capsys)
    assert "recipe.toml: checkpoint_every: 1 -> 3" in out
    assert {c.name for c in (home / "run" / "checkpoints").iterdir()} == {"step-00003", "step-00004"}


def test_other_versions_and_threads_are_said_and_not_refused(home, capsys):
    path = home / "run" / "inputs.json"
    inputs = json.loads(path.read_text())
    inputs["around"] |= {"torch": "2.0", "threads": "64"}
    path.write_text(json.dumps(inputs))
    _, out = said(home / "run", capsys)
    assert "torch: 2.0 -> " in out and "threads: 64 -> " in out and "its last bits may differ" in out


# -- paths ------------------------------------------------------------------------------------------------------------


def test_a_recipe_means_its_paths_from_its_own_folder_and_so_does_the_run(home, tmp_path, monkeypatch):
    """From a folder that has other files of the same names."""
    for name in ("scorer.py", "loss.py", "prompts.jsonl"):
        (tmp_path / name).write_text("nothing of use")
    monkeypatch.chdir(tmp_path)
    fields = ls.Recipe.read(home / "recipe.toml")
    assert fields["prompts"] == str(home / "prompts.jsonl")
    assert fields["scorer"]["scorers"] == [f"{home / 'scorer.py'}:score", str(home / "judge")]
    assert fields["loss"] == f"{home / 'loss.py'}:mine(beta=0.2)"
    assert fields["runs"] == str(home)
    run = resume(os.path.relpath(home / "run"))
    assert run.recipe.prompts == str(home / "prompts.jsonl")
    assert len(metrics(home / "run")) == 4


def test_paths_given_outside_of_a_recipe_are_meant_from_here(home, monkeypatch):
    monkeypatch.chdir(home)
    fields = settings("elsewhere", scorer="scorer.py:score", prompts="prompts.jsonl", model="model", steps=1)
    folder = ls.train(**fields, quiet=True).folder.path
    written = ls.Recipe.read(folder / "recipe.toml")
    assert written["scorer"] == f"{home / 'scorer.py'}:score" and written["model"] == str(home / "model")
    assert written["runs"] == str(home / "elsewhere")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "default"), ("model", "owner/name"), ("scorer", "helpfulness"), ("scorer", "module:score"),
        ("scorer", "http://host:1/path"), ("loss", "grpo(beta=0.1)"), ("loss", "dapo@trl"), ("prompts", "default"),
        ("prompts", ["a.jsonl", "b.jsonl"]), ("scorer", "helpfulnes"),
    ],
)  # fmt: skip
def test_names_addresses_and_texts_are_no_paths(tmp_path, field, value):
    assert ls.Recipe.resolved({field: value}, tmp_path) == {field: value}


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fields = ls.Recipe.resolved({"runs": "~/runs", "scorer": "~/s.py:score", "model": "~/m"}, Path("/elsewhere"))
    assert fields == {"runs": f"{tmp_path}/runs", "scorer": f"{tmp_path}/s.py:score", "model": f"{tmp_path}/m"}
