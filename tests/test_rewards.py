"""Scorers: every way in which a reward source can fail is typed, bounded in time, and never becomes a number."""

from __future__ import annotations

import dataclasses
import http.server
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch

import lossmith
from lossmith import scorers as rewards
from lossmith.errors import ScorerError
from lossmith.prompts import Prompt
from lossmith.rollouts import Distribution, LogProbs, Rollout, Score
from lossmith.scorers import (
    ABSTAIN,
    BUILTINS,
    HttpScorer,
    PathScorer,
    RewardModel,
    ScorerSettings,
    WeightedScorers,
    check_scorer,
    close_scorer,
    list_scorers,
    load_scorer,
    score_rollouts,
)
from lossmith.scorers.process import Worker

COLUMNS = ("answer", "difficulty")


def rollout(completion="An answer.", prompt="A question?", finish_reason="eos", sample=0, **columns) -> Rollout:
    ids = tuple(range(1, 1 + max(1, len(completion.split()))))
    return Rollout(
        prompt=Prompt(prompt, columns, source="test"),
        sample=sample,
        prompt_ids=(1, 2),
        completion_ids=ids,
        completion=completion,
        behavior_logp=LogProbs(torch.zeros(len(ids)), Distribution(0)),
        finish_reason=finish_reason,
    )


def ask(spec, rollouts=None, *, timeout=20.0, columns=None) -> list[Score]:
    """Scores from any scorer, errors left in place."""
    rollouts = rollouts or [rollout("One."), rollout("Two words.")]
    scorer = load_scorer(spec, columns=columns)
    try:
        return [r.score for r in score_rollouts(scorer, rollouts, on_error="drop", timeout=timeout)]
    finally:
        close_scorer(scorer)


def values(scores: list[Score]) -> list[float | None]:
    return [score.value for score in scores]


# --- what a function may return --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "value"),
    [
        (1, 1.0),
        (0.5, 0.5),
        (True, 1.0),
        (False, 0.0),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
        (torch.tensor(0.5), 0.5),
        (torch.tensor(2.0, requires_grad=True), 2.0),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    ],
)
def test_numbers(returned, value):
    assert ask(lambda completions: [returned, 0.25]) == [Score(value=value), Score(value=0.25)]


@pytest.mark.parametrize(
    ("returned", "kind"),
    [
        (math.nan, "not finite: nan"),
        (math.inf, "not finite: inf"),
        (10**400, "not finite: inf"),
        (np.float64("nan"), "not finite: nan"),
        (torch.tensor(math.nan), "not finite: nan"),
        ("0.5", "not a number: '0.5' (str)"),
        ([1.0], "not a number: [1.0] (list)"),
        (1 + 2j, "not a number: (1+2j) (complex)"),
        (torch.ones(2), "not a number: "),
    ],
)
def test_what_is_not_a_score_is_an_error_of_its_kind_and_never_a_number(returned, kind):
    bad, good = ask(lambda completions: [returned, 0.25])
    assert bad.error.startswith(kind) and bad.value is None and not bad.ok
    assert good == Score(value=0.25)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ([1.0], "wrong count: 1 scores for 2 completions"),
        ([1.0] * 3, "wrong count: 3 scores for 2 completions"),
        ([], "wrong count: 0 scores"),
        (1.0, "not a list: the function returned float 1.0"),
        (None, "none: the function returned None instead of a list"),
        ({"a": 1, "b": 2}, "not a list: "),
        (torch.ones(2, 2), "not a list: "),
        ("ab", "not a list: "),
    ],
)
def test_an_answer_that_is_no_list_of_scores_fails_the_whole_batch(answer, kind):
    scores = ask(lambda completions: answer)
    assert len(scores) == 2
    assert all(score.error.startswith(kind) and score.value is None for score in scores)


@pytest.mark.parametrize("answer", [(0.5, 1), np.array([0.5, 1.0]), torch.tensor([0.5, 1.0], requires_grad=True)])
def test_tuples_arrays_and_tensors_are_lists(answer):
    assert values(ask(lambda completions: answer)) == [0.5, 1.0]


@pytest.mark.parametrize("word", [ABSTAIN, None])
def test_abstention_stops_nothing(word):
    scorer = load_scorer(lambda completions: [word, 1.0])
    scored = score_rollouts(scorer, [rollout("a"), rollout("b")], on_error="stop")
    assert [r.score for r in scored] == [Score(abstained=True), Score(value=1.0)]


def test_no_gradient_flows_through_a_scorer():
    weight = torch.ones(1, requires_grad=True)
    seen = []

    def with_gradient(completions):
        seen.append(torch.is_grad_enabled())
        with torch.enable_grad():  # even a function that insists
            return list(weight.expand(len(completions)) * 2)

    def plain(completions):
        product = weight * 2
        seen.append(product.requires_grad)
        return product.expand(len(completions))

    assert values(ask(with_gradient)) == [2.0, 2.0]
    assert values(ask(plain)) == [2.0, 2.0]
    assert seen == [False, False]
    assert weight.grad is None


# --- stop or drop ----------------------------------------------------------------------------------------------------


def test_stop_shows_scorer_kind_prompt_and_completion():
    def picky(completions):
        return [1.0 if c == "fine" else math.nan for c in completions]

    rollouts = [rollout("fine"), rollout("start " + "x" * 1000 + " end", prompt="Why is the sky blue?", sample=3)]
    with pytest.raises(ScorerError) as caught:
        score_rollouts(load_scorer(picky), rollouts)
    message = str(caught.value)
    for shown in (
        "'picky'",
        "1 of 2",
        "not finite: nan",
        "Why is the sky blue?",
        "start xxx",
        "xxx end",
        "sample 3",
        'scorer_errors = "drop"',
    ):
        assert shown in message
    assert len(message) < 1200


def test_drop_leaves_errors_in_place_and_the_originals_alone():
    rollouts = [rollout("a"), rollout("b")]
    scored = score_rollouts(load_scorer(lambda completions: ["good", 2.0]), rollouts, on_error="drop")
    assert scored[0].score.value is None and scored[0].score.error.startswith("not a number")
    assert scored[1].score == Score(value=2.0)
    assert all(r.score is None for r in rollouts)


def test_on_error_is_one_of_two_words():
    with pytest.raises(ScorerError, match="'stop' or 'drop'"):
        score_rollouts(BUILTINS["length"], [rollout()], on_error="ignore")


def test_no_rollouts_no_call():
    assert score_rollouts(load_scorer(lambda completions: 1 / 0), []) == []


# --- the calling convention ------------------------------------------------------------------------------------------


def test_a_function_written_for_trl_gets_what_trl_gives():
    seen = {}

    def reward(prompts, completions, completion_ids, answer, log_metric=None, **kwargs):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer, rest=kwargs)
        return [float(str(a) in c) for a, c in zip(answer, completions, strict=True)]

    rollouts = [rollout("It is 4.", prompt="2+2?", answer="4"), rollout("Red it is", prompt="Color?", difficulty=2)]
    assert ask(reward, rollouts, columns=COLUMNS)[0] == Score(value=1.0)
    assert seen["prompts"] == ["2+2?", "Color?"]
    assert seen["completions"] == ["It is 4.", "Red it is"]
    assert seen["ids"] == [[1, 2, 3], [1, 2, 3]]
    assert seen["answer"] == ["4", None]
    rest = seen["rest"]
    assert rest["difficulty"] == [None, 2]
    assert rest.keys() == {"difficulty", "trainer_state", "log_extra"}  # log_metric was named


def test_trainer_state_says_where_the_run_stands():
    seen = []

    def reward(completions, trainer_state, **kwargs):
        assert kwargs.keys() == {"prompts", "completion_ids", "log_extra", "log_metric"}
        seen.append(trainer_state)
        return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

    settings = ScorerSettings(updates=20, passes=2.5)
    at_five = dataclasses.replace(rollout(), behavior_logp=LogProbs(torch.zeros(2), Distribution(5)))
    (scored,) = score_rollouts(load_scorer(reward, settings=settings), [at_five])
    assert scored.score == Score(value=0.25)
    (state,) = seen
    assert (state.global_step, state.max_steps, state.epoch, state.num_train_epochs) == (5, 20, 0.625, 3)
    assert state.is_world_process_zero
    with pytest.raises(AttributeError, match="trainer_state has no 'total_flos' here; it has global_step, max_steps"):
        _ = state.total_flos


def test_what_a_function_logs_is_kept_with_each_completion():
    def reward(completions, log_extra, log_metric, completions_ids):
        log_extra("first_id", [ids[0] for ids in completions_ids])
        log_metric("accuracy", 0.5)
        return [1.0, None]

    assert ask(reward) == [
        Score(value=1.0, logged={"first_id": 1, "accuracy": 0.5}),
        Score(abstained=True, logged={"first_id": 1, "accuracy": 0.5}),
    ]

    def short(completions, log_extra):
        log_extra("x", [1])
        return [1.0, 2.0]

    first, second = ask(short)  # alone, each has one value
    assert first.logged == second.logged == {"x": 1}


def test_none_is_not_applicable_and_leaves_the_sum_to_the_others_as_in_trl():
    def maths(completions, task, **kwargs):
        return [1.0 if t == "maths" else None for t in task]

    def prose(completions, task, **kwargs):
        return [0.25 if t == "prose" else None for t in task]

    rollouts = [rollout(task="maths"), rollout(task="prose"), rollout(task="both")]
    both = ask({"scorers": [maths, prose], "weights": [1.0, 2.0]}, rollouts, columns=["task"])
    # nansum of the weighted columns; where TRL's is 0 for want of any score, there is none here
    assert values(both) == [1.0, 0.5, None] and both[2].abstained
    assert both[0].parts == {"maths": 1.0}


@pytest.mark.parametrize("coroutine", [False, True])
def test_one_completion_that_makes_a_function_raise_costs_itself(coroutine):
    def reward(completions):
        if "bad" in completions:
            raise ValueError("cannot parse")
        return [float(len(c)) for c in completions]

    async def async_reward(completions):
        return reward(completions)

    rollouts = [rollout(text) for text in ("a", "bb", "bad", "dddd", "eeeee", "bad")]
    scores = ask(async_reward if coroutine else reward, rollouts)
    assert values(scores) == [1.0, 2.0, None, 4.0, 5.0, None]
    assert scores[2].error.startswith("raised: ValueError: cannot parse (test_rewards.py, line")
    with pytest.raises(ScorerError, match=r"failed on 2 of 6(.|\n)*completion: 'bad'"):
        score_rollouts(load_scorer(reward), rollouts)


def test_looking_for_the_completion_at_fault_keeps_to_the_time_limit():
    def reward(completions):
        time.sleep(0.1)
        raise ValueError

    start = time.monotonic()
    scores = ask(reward, [rollout() for _ in range(64)], timeout=0.35)
    assert time.monotonic() - start < 3
    assert {score.error.split(":")[0] for score in scores} <= {"raised", "timeout"}
    assert "no time was left of 0.35 s, after a call that failed" in scores[-1].error


def test_chat_prompts_come_as_messages():
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append((prompts, completions))
        prompts[0].append("changed by the function")
        return [float(len(completion[0]["content"])) for completion in completions]

    asked = (MappingProxyType({"role": "user", "content": "Hi"}),)
    begun = (*asked, {"role": "assistant", "content": "Well, "})
    rollouts = [rollout("Hello", prompt=asked), rollout("hello", prompt=begun)]
    assert values(ask(reward, rollouts)) == [5.0, 11.0]
    prompts, completions = seen[0]
    assert prompts[1] == [{"role": "user", "content": "Hi"}]
    assert completions == [
        [{"role": "assistant", "content": "Hello"}],
        [{"role": "assistant", "content": "Well, hello"}],
    ]
    assert len(asked) == 1  # the function changed its own copy


def test_only_what_the_signature_accepts_is_passed():
    assert values(ask(lambda completions: [1.0] * len(completions), [rollout("a", answer="x")])) == [1.0]
    assert values(ask(lambda *, completions, difficulty=7: [difficulty], [rollout("a", answer="x")])) == [7.0]


def test_objects_with_call_and_coroutines():
    class Longest:
        async def __call__(self, completions, **kwargs):
            import asyncio

            await asyncio.sleep(0)
            return [float(len(c)) for c in completions]

    assert values(ask(Longest(), [rollout("ab"), rollout("abc")])) == [2.0, 3.0]


def test_coroutines_share_one_event_loop():
    loops = []

    async def reward(completions):
        import asyncio

        loops.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    scorer = load_scorer(reward)
    for _ in range(2):
        score_rollouts(scorer, [rollout()])
    scorer.close()
    assert loops[0] is loops[1]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda prompts: [0.0], "does not take 'completions'"),
        (lambda completions, answr: [0.0], "needs 'answr'.*Did you mean 'answer'"),
        (lambda completions, answr: [0.0], "also given prompts, completions, completion_ids, trainer_state, log_extra"),
        (
            lambda completion, **kwargs: 0.0,
            "takes 'completion': a function is given all completions of a batch at once",
        ),
        (lambda completions, environments: [0.0], "takes 'environments': that is TRL's"),
        (lambda data_source, solution_str, ground_truth, extra_info=None: 0.0, "takes 'data_source': that is how verl"),
        (lambda completions, /: [0.0], "by position only"),
        (dict, "is a class"),
    ],
)
def test_a_signature_that_cannot_work_is_refused_before_anything_runs(function, said):
    with pytest.raises(ScorerError, match=said):
        load_scorer(function, columns=COLUMNS)


def test_columns_not_known_yet_are_not_checked():
    load_scorer(lambda completions, answr: [0.0], columns=None)
    with pytest.raises(ScorerError, match="the prompts have no columns"):
        load_scorer(lambda completions, answr: [0.0], columns=())


# --- live functions that misbehave -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(3), TimeoutError("boom"), GeneratorExit("boom")])
@pytest.mark.parametrize("coroutine", [False, True])
def test_a_live_function_that_raises(error, coroutine):
    def reward(completions):
        raise error

    async def async_reward(completions):
        raise error

    scores = ask(async_reward if coroutine else reward)
    assert [s.value for s in scores] == [None, None]
    assert all(s.error.startswith(f"raised: {type(error).__name__}: ") for s in scores)
    assert "test_rewards.py, line" in scores[0].error


def test_ctrl_c_is_not_a_score():
    def reward(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(reward)


def test_a_live_function_that_hangs_is_left_behind_and_the_next_batch_works():
    release = threading.Event()

    def reward(completions):
        if completions[0] == "hang":
            release.wait(30)
        return [1.0] * len(completions)

    scorer = load_scorer(reward)
    start = time.monotonic()
    scored = score_rollouts(scorer, [rollout("hang")], on_error="drop", timeout=0.2)
    assert time.monotonic() - start < 5
    assert scored[0].score.error.startswith("timeout: no answer within 0.2 s")
    assert values([r.score for r in score_rollouts(scorer, [rollout("go")], timeout=10)]) == [1.0]
    release.set()
    scorer.close()


# --- a scorer of one's own -------------------------------------------------------------------------------------------


class Own:
    name = "own"

    def __init__(self, answer):
        self.answer = answer

    def score(self, rollouts):
        return self.answer(rollouts)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda rs: [Score(value=math.nan)] * len(rs), "not finite: nan"),
        (lambda rs: [Score()] * len(rs), "none: "),
        (lambda rs: [Score(value=1.0, abstained=True)] * len(rs), "not a number: both"),
        (lambda rs: [0.5] * len(rs), "not a number: score() returned float"),
        (lambda rs: [], "wrong count: 0 scores"),
        (lambda rs: None, "not a list: "),
        (lambda rs: sys.exit(1), "raised: SystemExit"),
        (lambda rs: time.sleep(5), "timeout: no answer within 0.2 s"),
    ],
)
def test_a_scorer_object_is_checked_too(answer, kind):
    scorer = Own(answer)
    assert load_scorer(scorer) is scorer
    assert all(score.error.startswith(kind) for score in ask(scorer, timeout=0.2))


def test_a_scorer_object_that_works():
    assert values(ask(Own(lambda rs: [Score(value=1.0) for _ in rs]))) == [1.0, 1.0]


# --- functions in a process that can be killed -----------------------------------------------------------------------

SCORER_FILE = """
import math, os, signal, sys, time
import neighbor

def words(prompts, completions, **kwargs):
    print("printed by the scorer")
    return [float(len(c.split())) for c in completions]

async def waits(completions):
    import asyncio
    await asyncio.sleep(0)
    return [1.0] * len(completions)

def uses_alarm(completions):
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(1)
    signal.alarm(0)
    return [1.0] * len(completions)

def abstains(completions):
    from lossmith.scorers import ABSTAIN
    return [ABSTAIN] * len(completions)

def beside(completions): return [neighbor.VALUE] * len(completions)
def column(completions, answer): return [float(a is not None) for a in answer]

def raises(completions): raise KeyError("gold")
def leaves(completions): sys.exit(3)
def none(completions): return [None] * len(completions)
def picky(completions):
    if "bad" in completions: raise ValueError("bad")
    return [float(len(c)) for c in completions]
def fragile(completions):
    if "bad" in completions: os._exit(7)
    return [float(len(c)) for c in completions]
def nan(completions): return [math.nan] * len(completions)
def text(completions): return ["good"] * len(completions)
def short(completions): return [1.0]
def dies(completions): os._exit(7)
def crashes(completions): os.kill(os.getpid(), signal.SIGSEGV)

def hangs(completions):
    if completions[0] == "hang":
        while True: pass
    return [float(os.getpid())] * len(completions)

class Counter:
    def __init__(self): self.calls = 0
    def __call__(self, completions, **kwargs):
        self.calls += 1
        return [float(self.calls)] * len(completions)

counter = Counter()
"""


@pytest.fixture
def scorer_file(tmp_path) -> Path:
    file = tmp_path / "random.py"  # named like a module of the standard library, which must not matter
    file.write_text(SCORER_FILE)
    (tmp_path / "neighbor.py").write_text("VALUE = 0.125\n")
    return file


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("words", [1.0, 2.0]),
        ("waits", [1.0, 1.0]),
        ("uses_alarm", [1.0, 1.0]),
        ("beside", [0.125, 0.125]),
        ("none", [None, None]),
    ],
)
def test_a_function_by_path(scorer_file, function, expected):
    assert values(ask(f"{scorer_file}:{function}")) == expected


def test_what_a_worker_prints_goes_to_stderr(scorer_file, capfd):
    ask(f"{scorer_file}:words")
    out, err = capfd.readouterr()
    assert out == "" and "printed by the scorer" in err


def test_control_characters_that_a_worker_prints_are_shown_not_obeyed(tmp_path, capfd):
    (tmp_path / "own.py").write_text(
        "def f(completions):\n    print(completions[0], 'half\\rdone')\n    return [1.0] * len(completions)\n"
    )
    ask(f"{tmp_path / 'own.py'}:f", [rollout("\x1b[2J\x07 été")])
    assert "\ufffd[2J\ufffd été half\rdone\n" in capfd.readouterr().err


def test_a_worker_lives_from_batch_to_batch_and_abstains(scorer_file):
    scorer = load_scorer(f"{scorer_file}:counter")
    assert [values([r.score for r in score_rollouts(scorer, [rollout()])]) for _ in range(2)] == [[1.0], [2.0]]
    scorer.close()
    assert ask(f"{scorer_file}:abstains") == [Score(abstained=True)] * 2


def test_columns_reach_a_worker_and_are_checked_before_it_is_used(scorer_file):
    assert values(ask(f"{scorer_file}:column", [rollout(answer="4"), rollout()], columns=COLUMNS)) == [1.0, 0.0]
    with pytest.raises(ScorerError, match=r"needs 'answer'.*Known: difficulty"):
        load_scorer(f"{scorer_file}:column", columns=["difficulty"])


@pytest.mark.parametrize(
    ("function", "kind"), [("picky", "raised: ValueError: bad"), ("fragile", "worker died: exit code 7")]
)
def test_one_completion_that_breaks_a_worker_costs_itself(scorer_file, function, kind):
    scores = ask(f"{scorer_file}:{function}", [rollout(text) for text in ("a", "bad", "ccc")])
    assert values(scores) == [1.0, None, 3.0] and scores[1].error.startswith(kind)


POOL = """
import multiprocessing, os, neighbor
def one(text): return float(len(text) + neighbor.VALUE)
def score(completions, **_):
    with multiprocessing.get_context("METHOD").Pool(1) as pool:
        return pool.map(one, completions)
def keep(completions):
    global pool
    pool = multiprocessing.get_context("METHOD").Pool(1)
    return [float(pool.apply(os.getpid))]
if __name__ == "__main__":
    raise SystemExit("run as a script")
"""


@pytest.mark.parametrize("name", ["pool.py", "my-scorer.v2.py", "random.py"])
@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_a_scorer_file_may_use_a_process_pool(scorer_file, method, name):
    file = scorer_file.with_name(name)
    file.write_text(POOL.replace("METHOD", method))
    assert values(ask(f"{file}:score")) == [4.125, 10.125]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_pool_dies_with_the_worker(scorer_file, method):
    scorer_file.write_text(POOL.replace("METHOD", method))
    assert is_gone(int(ask(f"{scorer_file}:keep", [rollout()])[0].value))


def test_what_a_worker_started_in_a_session_of_its_own_dies_with_it(tmp_path):
    (tmp_path / "own.py").write_text(
        "import subprocess\n"
        "def f(completions): return [float(subprocess.Popen(['sleep', '60'], start_new_session=True).pid)]\n"
    )
    assert is_gone(int(ask(f"{tmp_path / 'own.py'}:f", [rollout()])[0].value))


def test_a_dead_worker_is_noticed_though_its_children_hold_the_pipe(tmp_path):
    (tmp_path / "own.py").write_text(
        "import os, time\ndef f(completions):\n    if os.fork() == 0: time.sleep(60)\n    os._exit(3)\n"
    )
    start = time.monotonic()
    (score,) = ask(f"{tmp_path / 'own.py'}:f", [rollout()], timeout=30)
    assert score.error.startswith("worker died: exit code 3") and time.monotonic() - start < 10


def test_a_worker_that_closes_or_fills_its_output_still_scores(tmp_path, capfd):
    (tmp_path / "own.py").write_text(
        "import sys, os\n"
        "def f(completions):\n"
        "    print('x' * 300_000)\n"
        "    sys.stdout.flush(); os.close(0); os.close(1)\n"
        "    return [1.0] * len(completions)\n"
    )
    scorer = load_scorer(f"{tmp_path / 'own.py'}:f")
    assert values([r.score for r in score_rollouts(scorer, [rollout()])]) == [1.0]
    close_scorer(scorer)
    assert len(capfd.readouterr().err) >= 300_000


def test_lossmiths_own_keys_do_not_reach_a_worker_and_others_do(tmp_path, monkeypatch):
    for name in ("LOSSMITH_SCORER_KEY", "LOSSMITH_SCORER_KEY_2", "LOSSMITH_JUDGE_KEY", "LOSSMITH_PASSWORD", "MY_KEY"):
        monkeypatch.setenv(name, "a test secret")
    (tmp_path / "own.py").write_text(
        "import os\n"
        "def f(completions, log_extra):\n"
        "    log_extra('names', [[n for n, value in os.environ.items() if value == 'a test secret']])\n"
        "    return [1.0]\n"
    )
    (score,) = ask(f"{tmp_path / 'own.py'}:f", [rollout()])
    assert score.logged == {"names": ["MY_KEY"]}


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        ("raises", "raised: KeyError: 'gold' (random.py, line"),
        ("leaves", "raised: SystemExit: 3"),
        ("nan", "not finite: nan"),
        ("text", "not a number: 'good'"),
        ("short", "wrong count: 1 scores for 2 completions"),
        ("dies", "worker died: exit code 7"),
        ("crashes", "worker died: signal SIGSEGV"),
    ],
)
def test_a_function_by_path_that_misbehaves(scorer_file, function, kind):
    scores = ask(f"{scorer_file}:{function}")
    assert len(scores) == 2
    assert all(score.error.startswith(kind) and score.value is None for score in scores)


def test_a_hang_is_killed_within_the_limit_and_the_worker_starts_again(scorer_file):
    scorer = load_scorer(f"{scorer_file}:hangs")
    (before,) = values([r.score for r in score_rollouts(scorer, [rollout("go")])])
    start = time.monotonic()
    (scored,) = score_rollouts(scorer, [rollout("hang")], on_error="drop", timeout=0.5)
    assert time.monotonic() - start < 5
    assert scored.score.error.startswith("timeout: no answer within 0.5 s")
    assert is_gone(int(before))
    with pytest.raises(ScorerError, match=r"scorer 'hangs' failed on 1 of 1(.|\n)*timeout"):
        score_rollouts(scorer, [rollout("hang")], timeout=0.2)
    (after,) = values([r.score for r in score_rollouts(scorer, [rollout("go")])])
    assert after != before
    scorer.close()
    assert is_gone(int(after))


def test_a_worker_does_not_load_torch(tmp_path):
    file = tmp_path / "plain.py"
    file.write_text("import sys\ndef f(completions): return [float('torch' in sys.modules)] * len(completions)\n")
    assert values(ask(f"{file}:f")) == [0.0, 0.0]
    code = "import sys, lossmith; had = 'torch' in sys.modules\nimport lossmith.scorers.worker\n"
    code += "sys.exit('torch' in sys.modules and not had)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_worker_dies_with_its_parent_even_in_mid_batch(scorer_file):
    code = (
        "import sys; from lossmith.scorers.process import Worker\n"
        "w = Worker(sys.argv[1]); w.start()\n"
        "batch = lambda text: dict(prompts=['p'], completions=[text], completion_ids=[[1]], columns={})\n"
        "print(int(w.ask(batch('go'), 30)[0]['value']), flush=True)\n"
        "w.ask(batch('hang'), 30)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, f"{scorer_file}:hangs"], stdout=subprocess.PIPE)
    with parent:
        worker = int(parent.stdout.readline())
        assert not is_gone(worker, within=0)
        time.sleep(0.3)  # in mid-batch
        parent.send_signal(signal.SIGKILL)
    assert is_gone(worker)


def is_gone(pid: int, within: float = 5.0) -> bool:
    end = time.monotonic() + within
    while True:
        try:
            os.kill(pid, 0)
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.05)


def test_a_forgotten_worker_is_collected(scorer_file):
    scorer = load_scorer(f"{scorer_file}:hangs")
    (pid,) = values([r.score for r in score_rollouts(scorer, [rollout("go")])])
    del scorer
    assert is_gone(int(pid))


# --- functions that do not load --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "function", "said"),
    [
        ("def helpful(completions): pass", "helpfull", "has no 'helpfull'. Did you mean 'helpful'"),
        ("x = 1\ndef f(:\n    pass", "f", r"own\.py, line 2: .*def f\(:"),
        ("import not_a_module_anywhere", "f", r"raised ModuleNotFoundError: .*not_a_module_anywhere.*own\.py, line 1"),
        ("1 / 0", "f", "importing .* raised ZeroDivisionError"),
        ("import sys; sys.exit(2)", "f", "raised SystemExit: 2"),
        ("import os; os._exit(5)", "f", "died while importing it: exit code 5"),
        ("f = 3", "f", "int 3 cannot be called"),
        ("class f: pass", "f", "'f' is a class"),
        ("def f(texts): pass", "f", "does not take 'completions'"),
    ],
)
def test_a_path_that_does_not_load_says_why(tmp_path, content, function, said):
    file = tmp_path / "own.py"
    file.write_text(content)
    with pytest.raises(ScorerError, match=said):
        check_scorer(f"{file}:{function}")


def test_a_folder_and_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "reward.py").write_text("def f(completions): return [1.0] * len(completions)\n")
    assert values(ask("~/reward.py:f")) == [1.0, 1.0]
    (tmp_path / "folder.py").mkdir()
    for spec in ("~/folder.py:f", f"{tmp_path}:f", f"{tmp_path}/:f"):
        with pytest.raises(ScorerError, match=r"is a folder; write the .py file in it"):
            check_scorer(spec)
    with pytest.raises(ScorerError, match="no home folder is known"):
        check_scorer("~nobody-of-this-name/reward.py:f")


def test_missing_files_and_modules(tmp_path, monkeypatch):
    (tmp_path / "reward.py").write_text("def f(completions): return [1.0] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ScorerError, match=r"no file 'rewrad.py'.*Did you mean 'reward.py'"):
        load_scorer("rewrad.py:f")
    with pytest.raises(ScorerError, match="there is no module 'rewrad'"):
        load_scorer("rewrad:f")
    with pytest.raises(ScorerError, match="names a file but no function"):
        load_scorer("reward.py")
    assert values(ask("reward:f")) == [1.0, 1.0]  # a module of the current folder


def test_an_import_that_hangs_is_an_error(tmp_path):
    file = tmp_path / "slow.py"
    file.write_text("import time\ntime.sleep(60)\ndef f(completions): pass\n")
    start = time.monotonic()
    with pytest.raises(ScorerError, match=r"importing it took longer than 0.5 s"):
        PathScorer(f"{file}:f", startup=0.5)
    assert time.monotonic() - start < 5


# --- a server --------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path; `server.asked` counts the requests and keeps the last body."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        count = len(body["completions"])
        good = {"scores": [float(len(text)) for text in map(str, body["completions"])]}
        answers = {
            "/good": (200, good),
            "/mixed": (200, {"scores": ["abstain", None][:count]}),
            "/count": (200, {"scores": [1.0]}),
            "/shape": (200, [1.0]),
            "/garbage": (200, "<html>hello</html>"),
            "/missing": (404, "nothing here"),
            "/broken": (500, "out of memory"),
            "/mends": (200, good) if len(self.server.asked) > 2 else (503, "starting"),
        }
        if self.path == "/slow":
            self.server.release.wait(10)
        status, answer = answers.get(self.path, (200, good))
        payload = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        try:
            self.send_response(status)
            self.end_headers()
            if self.path == "/drips":
                while not self.server.release.wait(0.05):
                    self.wfile.write(b" ")
            self.wfile.write(payload)
        except OSError:
            pass  # the client gave up, as it should

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.asked, server.release = [], threading.Event()
        server.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


def test_a_server_scores(server):
    assert values(ask(f"{server.address}/good", [rollout("ab", answer="x"), rollout("abc")])) == [2.0, 3.0]
    assert server.asked == [
        {"prompts": ["A question?"] * 2, "completions": ["ab", "abc"], "columns": {"answer": ["x", None]}}
    ]


@pytest.mark.parametrize(
    ("path", "kinds", "requests"),
    [
        ("mixed", [None, "none: "], 1),
        ("count", ["wrong count: 1 scores for 2 completions"] * 2, 1),
        ("shape", ['http: the reply has no list "scores"'] * 2, 1),
        ("garbage", ["http: the reply is not JSON"] * 2, 1),
        ("missing", ["http: status 404 Not Found: nothing here"] * 2, 1),
        ("broken", ["http: status 500 Internal Server Error: out of memory"] * 2, 5),  # 3 tries, then each half
    ],
)
def test_a_server_that_does_not(server, path, kinds, requests):
    scores = ask(f"{server.address}/{path}")
    for score, kind in zip(scores, kinds, strict=True):
        assert score.abstained if kind is None else score.error.startswith(kind)
        assert score.value is None
    assert len(server.asked) == requests


def test_a_server_that_comes_up_is_tried_again(server, monkeypatch):
    monkeypatch.setattr("lossmith.scorers.web.BACKOFF_SECONDS", 0.005)
    assert values(ask(f"{server.address}/mends", [rollout("ab")])) == [2.0]
    assert len(server.asked) == 3


@pytest.mark.parametrize("path", ["slow", "drips"])
def test_a_slow_server_is_bounded(server, path):
    start = time.monotonic()
    scores = ask(f"{server.address}/{path}", timeout=0.4)
    assert time.monotonic() - start < 3
    assert all(score.error.startswith("timeout: no answer from 127.0.0.1") for score in scores)


def test_nobody_there(server, monkeypatch):
    monkeypatch.setattr("lossmith.scorers.web.BACKOFF_SECONDS", 0.005)
    server.server_close()  # the port was free a moment ago and nobody listens now
    server_gone = HttpScorer(server.address + "/x", timeout=5)
    assert all(score.error.startswith("http: ConnectionRefusedError") for score in server_gone.score([rollout()]))


@pytest.mark.parametrize("url", ["file:///etc/hostname", "http://", "ftp://host/x"])
def test_only_web_addresses(url):
    with pytest.raises(ScorerError, match="is not an address"):
        HttpScorer(url)


# --- combination -----------------------------------------------------------------------------------------------------


def fixed(name: str, *answers) -> Own:
    scorer = Own(lambda rs: [a if isinstance(a, Score) else Score(value=a) for a in answers])
    scorer.name = name
    return scorer


THREE = [rollout("a"), rollout("b"), rollout("c")]


def test_weighted_sum():
    combined = WeightedScorers([fixed("x", 1.0, 2.0, 3.0), fixed("y", 10.0, 0.0, 5.0)], [0.5, 0.1])
    scores = ask(combined, THREE)
    assert values(scores) == pytest.approx([1.5, 1.0, 2.0])
    assert scores[0].parts == {"x": 1.0, "y": 10.0}
    assert combined.name == "0.5 x + 0.1 y"


def test_standardized_members_count_alike_and_a_constant_one_counts_nothing():
    members = [fixed("x", 1.0, 2.0, 3.0), fixed("big", 1000.0, 3000.0, 2000.0), fixed("constant", 0.1, 0.1, 0.1)]
    scores = ask(WeightedScorers(members, [1.0, 1.0, 5.0], standardize=True), THREE)
    assert values(scores) == pytest.approx([-2.0, 1.0, 1.0])
    assert scores[1].parts == {"x": 2.0, "big": 3000.0, "constant": 0.1}


def test_an_error_of_one_member_is_everybodys_and_one_that_abstains_adds_nothing():
    x = fixed("x", Score(error="raised: boom"), Score(abstained=True), 3.0)
    y = fixed("y", Score(abstained=True), 2.0, 1.0)
    for standardize in (False, True):
        first, second, third = ask(WeightedScorers([x, y], standardize=standardize), THREE)
        assert first.error == "raised: boom [x]"
        assert second.parts == {"y": 2.0}
        assert third.ok


def test_one_time_limit_covers_all_members():
    slow = Own(lambda rs: time.sleep(5))
    start = time.monotonic()
    scores = ask(WeightedScorers([slow, slow, slow]), THREE, timeout=0.2)
    assert time.monotonic() - start < 3
    assert all(score.error.startswith("timeout") for score in scores)


def test_members_of_one_name_keep_their_parts_apart():
    scores = ask(WeightedScorers([fixed("x", 1.0, 2.0, 3.0), fixed("x", 4.0, 5.0, 6.0)]), THREE)
    assert scores[0].parts == {"x": 1.0, "x#2": 4.0}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"scorers": ["length", "brevity"], "weights": [1.0]}, "2 scorers and 1 weights"),
        ({"scorers": ["length"], "weights": [math.nan]}, "finite numbers"),
        ({"scorers": ["length"], "weihgts": [1.0]}, "no setting 'weihgts'. Did you mean 'weights'"),
        ({"scorers": []}, "a combined scorer is"),
        ({"scorers": "length"}, "a combined scorer is"),
        (["length", "brevty"], "there is no scorer 'brevty'. Did you mean 'brevity'"),
    ],
)
def test_a_combination_that_cannot_work(spec, said):
    with pytest.raises(ScorerError, match=said):
        load_scorer(spec)


def test_combinations_from_a_recipe(scorer_file):
    spec = {"scorers": ["length", f"{scorer_file}:words"], "weights": [100, 1], "standardize": False}
    check_scorer(spec, columns=())
    assert values(ask(spec)) == pytest.approx([2.0, 4.0])
    assert values(ask(["length", lambda completions: [1.0] * len(completions)])) == pytest.approx([1.01, 1.02])


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("helpfullness", r"no scorer 'helpfullness'. Did you mean 'helpfulness'\? A scorer is a built-in name"),
        ("gpt2", "Known: brevity, helpfulness, length. A scorer is"),
        (":f", "that is no 'path/file.py:function'"),
        (".own:f", "that is no 'path/file.py:function'"),
        ("own.py:", "that is no 'path/file.py:function'"),
        ("x" * 5000, "there is no scorer"),
        ({"scorers": ["length"], "weights": 3}, "weights are a list of numbers"),
        ({"scorers": ["length"], "weights": [math.nan]}, "weights are finite numbers"),
        ({"scorers": ["length"], "standardize": "no"}, "standardize is true or false"),
        ({"scorers": ["length"], "standardise": True}, "'standardise'. Did you mean 'standardize'"),
        ({"steps": "length", "segments": ["line"]}, "segments is"),
        ("./no-such-folder", "there is no folder './no-such-folder'"),
        (3, "3 is not a scorer. A scorer is"),
        (Own, "is a class"),
    ],
)
def test_what_names_no_scorer(spec, said):
    with pytest.raises(ScorerError, match=said):
        check_scorer(spec)


def test_built_in_names_are_listed():
    assert set(list_scorers()) == set(BUILTINS) == {"helpfulness", "brevity", "length"}
    assert load_scorer("length").name == "length"


def test_the_package_names_everything_it_lists():
    assert all(hasattr(rewards, name) for name in rewards.__all__)
    with pytest.raises(AttributeError, match="no attribute 'scoer'"):
        _ = rewards.scoer
    assert Worker.__module__.startswith(lossmith.__name__)


# --- built-in scorers ------------------------------------------------------------------------------------------------

QUESTION = "Explain the water cycle for a 10-year-old child."
GOOD = (
    "Water goes around in a cycle. The sun warms the sea, and some water rises as vapour. It cools into clouds, and "
    "rain brings it back to us."
)


def helpful(completion: str, finish_reason="eos", prompt=QUESTION) -> float:
    (score,) = load_scorer("helpfulness").score([rollout(completion, prompt=prompt, finish_reason=finish_reason)])
    assert 0.0 <= score.value <= 1.0
    assert set(score.parts) == {"substance", "own_words", "varied", "on_topic", "complete", "readable"}
    return score.value


def test_a_good_short_answer_is_helpful():
    assert helpful(GOOD) > 0.95
    assert (
        helpful(GOOD, prompt=({"role": "system", "content": "Be kind."}, {"role": "user", "content": QUESTION})) > 0.95
    )
    assert helpful("The capital of France is Paris.", prompt="What is the capital of France?") > 0.6


@pytest.mark.parametrize(
    ("completion", "most"),
    [
        ("", 0.0),
        ("   \n", 0.0),
        ("... !!! ??? ...", 0.0),
        ("Water.", 0.1),
        ("Yes", 0.1),
        ("water " * 40, 0.02),
        ("Water cycle child. " * 12, 0.1),
        ("The water cycle is really great fun for all. " * 4, 0.1),
        (QUESTION, 0.0),
        (f"{QUESTION} {QUESTION}", 0.15),
        (f"Sure. {QUESTION}", 0.3),
        ("I am always happy to talk with you about anything that you like.", 0.3),
        ("asdkfj qwoeiru zxcvmn qpwoei rutyal skdjfh zmxncb qowieur tyalsk.", 0.3),
        ("x" * 300, 0.1),
    ],
)
def test_simple_tricks_do_not_pay(completion, most):
    assert helpful(completion) <= most + 1e-9
    assert helpful(completion, "length") <= most + 1e-9


def test_cut_off_answers_differ_by_where_their_last_sentence_ended():
    nowhere = "The water cycle is how water moves from the sea to the sky and then falls on a child's old boots while"
    early = "Water moves in a cycle. It rises from the sea to the sky and then falls on a child's old boots while"
    late = "Water moves in a cycle. It rises from the sea to the sky. Then it falls on a child's old boots. While"
    scores = [helpful(text, "length") for text in (nowhere, early, late)]
    assert scores[0] < scores[1] - 0.05 < scores[2] - 0.1
    assert scores[2] < helpful(GOOD) - 0.1  # and ending in time beats them all
    assert helpful(late, "length") > helpful("Water rises to the sky and falls for a child and", "eos")


def test_proxies():
    brief, longer, silent = rollout("One."), rollout("One two three."), rollout("")
    assert values(load_scorer("length").score([brief, longer, silent])) == [0.01, 0.03, 0.0]
    one, three, none = values(load_scorer("brevity").score([brief, longer, silent]))
    assert one > three > none == 0.0


# --- reward models ---------------------------------------------------------------------------------------------------

WORDS = ["<eos>", "<unk>", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "<user>", "<assistant>"]
CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"


def save_reward_model(folder: Path, *, labels=1, chat=False, pad_is_eos=True, causal=False) -> Path:
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>" if pad_is_eos else None
    )
    if chat:
        tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0 if pad_is_eos else None,
        bos_token_id=None,
        eos_token_id=0,
        num_labels=labels,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    kind = transformers.LlamaForCausalLM if causal else transformers.LlamaForSequenceClassification
    kind(config).save_pretrained(folder)
    return folder


def logit_at_the_end(scorer: RewardModel, ids: list[int]) -> float:
    """One sequence, no padding, no pooling: the head at the very last token."""
    with torch.no_grad():
        hidden = scorer.model.model(input_ids=torch.tensor([ids])).last_hidden_state
        return scorer.model.score(hidden)[0, -1, 0].item()


@pytest.mark.parametrize("pad_is_eos", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_padding_changes_no_score(tmp_path, pad_is_eos, batch_size):
    scorer = RewardModel(save_reward_model(tmp_path / "rm", pad_is_eos=pad_is_eos), batch_size=batch_size)
    texts = ["a", "b c d e f <eos>", "b c d e f", "<eos>", "g h <eos> <eos>", "k j i h g f e d c b a", "a a"]
    rollouts = [rollout(text, prompt="a b ") for text in texts]
    expected = [logit_at_the_end(scorer, scorer.encode(r)) for r in rollouts]
    assert scorer.encode(rollouts[1])[-1] == 0  # the end token is the padding token, and is read
    assert values(ask(scorer, rollouts)) == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in expected}) == len(expected)


def test_a_chat_template_is_used_and_nothing_can_train(tmp_path):
    scorer = load_scorer(str(save_reward_model(tmp_path / "rm", chat=True)))
    assert isinstance(scorer, RewardModel)
    ids = scorer.encode(rollout("c d", prompt="a b"))
    assert [WORDS[i] for i in ids] == ["<user>", "a", "b", "<eos>", "<assistant>", "c", "d", "<eos>"]
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())
    assert not scorer.model.training
    assert scorer.name == "rm"


def test_without_a_chat_template_the_whole_conversation_is_read(tmp_path):
    scorer = RewardModel(save_reward_model(tmp_path / "rm"))
    asked = ({"role": "system", "content": "a"}, {"role": "user", "content": "b "})
    assert [WORDS[i] for i in scorer.encode(rollout("c d", prompt=asked))] == ["a", "b", "c", "d"]
    assert [WORDS[i] for i in scorer.encode(rollout("c d", prompt="b "))] == ["b", "c", "d"]


def test_a_text_too_long_is_an_error_not_another_texts_score(tmp_path):
    scorer = RewardModel(save_reward_model(tmp_path / "rm"))
    assert scorer.max_length == 32
    long, fine = ask(scorer, [rollout("a " * 40), rollout("a b")])
    assert long.error.startswith("too long: ") and "reads 32" in long.error
    assert fine.ok
    assert ask(RewardModel(tmp_path / "rm", max_length=2), [rollout("a b", prompt="c ")])[0].error is not None


def test_a_reward_model_keeps_to_the_limit_between_batches(tmp_path):
    scorer = RewardModel(save_reward_model(tmp_path / "rm"), batch_size=1)
    scores = scorer.score_within([rollout("a"), rollout("b")], -1.0)
    assert all(score.error.startswith("timeout") for score in scores)


def test_reward_models_that_cannot_be_used(tmp_path):
    save_reward_model(tmp_path / "three", labels=3)
    with pytest.raises(ScorerError, match="has 3 outputs and a scorer has 1"):
        check_scorer(str(tmp_path / "three"))
    save_reward_model(tmp_path / "headless", causal=True)
    with pytest.raises(ScorerError, match="a language model that gives no score"):
        load_scorer(tmp_path / "headless")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScorerError, match=r"no config.json"):
        check_scorer(str(tmp_path / "empty"))
    (tmp_path / "three" / "model.safetensors").rename(tmp_path / "three" / "pytorch_model.bin")
    with pytest.raises(ScorerError, match="only pickled ones"):
        check_scorer(str(tmp_path / "three"))


def test_a_hub_name_is_not_looked_up_by_a_check():
    check_scorer("nobody-at-all/no-such-model")
