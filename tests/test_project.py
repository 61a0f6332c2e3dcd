"""A project knows its stage from its files, and a step taken too early is refused with the reason."""

import datetime
import decimal
import itertools
import json
from pathlib import Path

import pyarrow.parquet
import pytest

import lossmith as ls
from lossmith.cli.project import status
from lossmith.errors import FeedbackError, PromptError, ScorerError, StageError
from lossmith.feedback.gather import gather
from lossmith.feedback.judgement import Judgement
from lossmith.feedback.output_set import OutputSet, named, read_sets, write_sets
from lossmith.feedback.store import Store
from lossmith.project import Project, check_order, check_recipe_order
from lossmith.scorers.weak import doubts, refuse_weak

ORDER = ["prompts", "sample", "annotate", "reward", "policy"]


@pytest.fixture
def project(tmp_path):
    (tmp_path / "p.txt").write_text("Why?\nHow?\n")
    return Project.create(tmp_path / "demo", str(tmp_path / "p.txt"))


def do(project, step):
    """What the command of a step leaves behind."""
    if step == "sample":
        prompts = ls.load_prompts(project.prompts)
        write_sets(project.outputs, [OutputSet(p, (named(p, "a"), named(p, "b"))) for p in prompts])
    elif step == "annotate":
        with Store(project.judgements) as store:
            made = read_sets(project.outputs)
            store.add_sets(made)
            names = tuple(o.id for o in made[0].outputs)
            store.add([Judgement(made[0].id, "pair", names, "first", "ann", "pair")])
    elif step == "reward":
        project.reward_model.mkdir()
        (project.reward_model / "reward_model.json").write_text(json.dumps({"trained": True}))


def test_each_step_is_done_when_its_file_is_there_and_names_the_next_command(project):
    for k, step in enumerate(ORDER[:-1]):
        do(project, step)
        assert [stage.done for stage in project.stages()] == [True] * (k + 1) + [False] * (4 - k)
        assert project.next_stage().step == ORDER[k + 1]
        assert project.next_stage().command.startswith("lossmith ")
    assert "1 judgements by ann; 1 of 2 sets judged" in project.stages()[2].summary


@pytest.mark.parametrize(("done", "step"), [(d, s) for d, s in itertools.combinations(range(5), 2) if s - d > 1])
def test_every_wrong_order_is_refused_with_the_reason_and_what_comes_next(project, done, step):
    for name in ORDER[: done + 1]:
        do(project, name)
    with pytest.raises(StageError, match=r"comes after|after annotation|trained and frozen") as caught:
        check_order(ORDER[step], project.folder / "anything")
    assert project.next_stage().command in str(caught.value)


def test_the_right_order_passes_and_so_does_what_is_in_no_project(project, tmp_path):
    for step in ORDER:
        check_order(step, project.folder / "x")
        do(project, step)
    check_order("policy", tmp_path / "elsewhere", "default", None)


def test_a_policy_never_learns_from_a_reward_model_that_was_not_trained(project):
    recipe = ls.Recipe.make(scorer=str(project.reward_model), prompts=str(project.prompts))
    with pytest.raises(StageError, match="learns from a reward model that was trained and frozen"):
        check_recipe_order(recipe)
    project.reward_model.mkdir()  # a model that came from elsewhere is none that was trained on these judgements
    for step in ("sample", "annotate"):
        do(project, step)
    with pytest.raises(StageError, match="not trained by `lossmith reward train`"):
        check_recipe_order(recipe)
    with pytest.raises(StageError):
        ls.train(scorer={"scorers": [str(project.reward_model), "length"]}, prompts=str(project.prompts))
    check_recipe_order(ls.Recipe.make(scorer="helpfulness", prompts=str(project.prompts)))


def test_a_skip_is_no_judgement(project):
    do(project, "sample")
    with Store(project.judgements) as store:
        made = read_sets(project.outputs)[0]
        store.add_sets([made])
        store.add([Judgement(made.id, "skip", tuple(o.id for o in made.outputs), None, "ann", "pair")])
    with pytest.raises(StageError, match="no judgement yet"):
        check_order("reward", project.judgements)


def test_candidates_never_slip_into_fine_tuning(project):
    do(project, "sample")
    with pytest.raises(PromptError, match="Its outputs are there to be judged"):
        ls.load_prompts(project.outputs, pass_columns=("outputs",))
    with pytest.raises(FeedbackError, match="Candidates are no training targets"):
        gather(project.outputs)


def test_sets_of_other_prompts_are_noticed(project):
    stranger = ls.load_prompts(["Who?"])[0]
    write_sets(project.outputs, [OutputSet(stranger, (named(stranger, "a"), named(stranger, "b")))])
    assert "1 sets are of prompts that prompts.jsonl does not hold" in project.stages()[1].problem


def test_a_project_is_begun_once(project, tmp_path):
    with pytest.raises(StageError, match="is a project already"):
        Project.create(project.folder, str(tmp_path / "p.txt"))


# -- a reward model that may be no better than a coin -----------------------------------------------------------------


def trained(folder, accuracy, **more):
    folder.mkdir(parents=True, exist_ok=True)
    held_out = {} if accuracy is None else {"held_out": {"accuracy": accuracy}}
    (folder / "reward_model.json").write_text(json.dumps({"trained": True, "files": {}} | held_out | more))
    return str(folder)


WEAK = {"mean": 0.33, "ci95_low": None, "ci95_high": None, "n": 2}
COIN = {"mean": 0.55, "ci95_low": 0.41, "ci95_high": 0.68, "n": 53}
GOOD = {"mean": 0.652, "ci95_low": 0.591, "ci95_high": 0.713, "n": 53}


@pytest.mark.parametrize(("accuracy", "says"), [(WEAK, "2 prompts: too few"), (COIN, "no better than chance")])
def test_status_neither_ticks_a_weak_reward_model_nor_sends_on_to_training(project, capsys, accuracy, says):
    for step in ("sample", "annotate"):
        do(project, step)
    trained(project.reward_model, accuracy)
    status(project.folder)
    said = capsys.readouterr().out
    (row,) = [line for line in said.splitlines() if " reward " in line and "next" not in line]
    words = " ".join(said.split())
    assert row.split()[0] == "!" and f"{accuracy['n']} prompts)" in words and says in words
    following = said[said.index("next:") :]
    assert "lossmith annotate" in following and "lossmith reward train" in following and "lossmith train" not in said
    trained(project.reward_model, GOOD)
    status(project.folder)
    said = " ".join(capsys.readouterr().out.split())
    assert "accuracy 0.65 (95% 0.59 to 0.71, 53 prompts)" in said and "next: lossmith train" in said and "!" not in said


def test_training_on_a_weak_reward_model_is_asked_about_wherever_it_stands(tmp_path):
    weak, coin, good = (trained(tmp_path / n, a) for n, a in (("weak", WEAK), ("coin", COIN), ("good", GOOD)))
    old = trained(tmp_path / "old", {"mean": 0.5, "n": 20})  # without an interval
    bare = trained(tmp_path / "bare", 0.33)
    for spec in (weak, coin, old, bare, Path(weak), [good, weak], {"scorers": [good, coin], "combine": "worst"},
                 {"ensemble": weak}, {"steps": coin}, {"scorers": ["length", [weak]]}):  # fmt: skip
        with pytest.raises(ScorerError, match="accept_weak_scorer = true"):
            refuse_weak(spec)
    assert doubts({"scorers": [weak, good, coin]}) == doubts(weak) + doubts(coin)
    for spec in (good, "helpfulness", "http://localhost/x", "a.py:f", lambda completions: completions, [good, "length"],
                 trained(tmp_path / "silent", None), str(tmp_path), str(tmp_path / "nothing")):  # fmt: skip
        refuse_weak(spec)


def test_a_project_copies_rows_of_any_type_that_differ_in_a_column(tmp_path):
    when = datetime.date(2024, 2, 29)
    rows = [{"question": "Why?", "target_word": w, "day": when, "price": decimal.Decimal("1.10")} for w in ("a", "b")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    project = Project.create(tmp_path / "demo", str(tmp_path / "p.parquet"), column="question")
    kept = [json.loads(line) for line in project.prompts.read_text().splitlines()]
    assert kept == [{"prompt": "Why?", "target_word": w, "day": "2024-02-29", "price": "1.10"} for w in ("a", "b")]
    assert project.stages()[0].summary == "2 prompts"


def test_a_project_that_cannot_be_begun_leaves_no_folder(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    with pytest.raises(PromptError, match=r"p\.jsonl:2"):
        Project.create(tmp_path / "demo", str(tmp_path / "p.jsonl"))
    assert not (tmp_path / "demo").exists()


def test_what_was_left_out_of_a_project_is_said(tmp_path):
    (tmp_path / "p.txt").write_text("Why?\nWhy?\nHow?\n")
    project = Project.create(tmp_path / "demo", str(tmp_path / "p.txt"))
    assert "3 rows are 2 prompts: 1 exact duplicate left out (p.txt:2)" in project.prompts_summary
