"""The command line, as a user gives it; test_resume.py starts it as a process of its own."""

import json

import pytest

import tiny
from lossmith.losses import CATALOGUE
from lossmith.training import Recipe
from shell import lossmith


def small(tmp_path, *more):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Prompt {i}?"}) + "\n" for i in range(9)))
    return (
        "--model", tiny.folder(), "--dtype", "float32", "--prompts", prompts, "--held-out", 3, "--steps", 2,
        "--prompts-per-step", 2, "--samples-per-prompt", 3, "--max-tokens", 8, "--runs", tmp_path / "runs", *more,
    )  # fmt: skip


def test_help_shows_every_setting_with_its_default():
    text = lossmith("train", "--help").stdout
    flat = " ".join(text.replace("│", " ").split())
    for name, field in Recipe.model_fields.items():
        assert "--" + name.replace("_", "-") in text, name
        assert field.description.split(":")[0].split(",")[0].split()[0] in flat
    assert all(f"[default: {value}]" in flat for value in ("0.7", "helpfulness", "grpo", "48", "False"))


def test_losses_list_and_show():
    text = lossmith("losses", "list").stdout
    assert all(name in text for name in CATALOGUE if "@" not in name)
    rows = json.loads(lossmith("losses", "list", "--json").stdout)
    assert [row["name"] for row in rows] == list(CATALOGUE)
    shown = lossmith("losses", "show", "grpo(beta=0.02, clip_high=0.31)").stdout
    for piece in ("clip(r, 0.8, 1.31)", "0.02·(e^(−κ) − 1 + κ)", "arXiv:2402.03300", "std_g(R)", "A < 0", "clip_high"):
        assert piece in shown
    data = json.loads(lossmith("losses", "show", "ppo", "--json").stdout)
    assert data["weights"]["A < 0"] == pytest.approx([0, 0, 0.9, 1, 1.15, 1.5, 2.5, 10])
    assert r"\min\left(" in lossmith("losses", "show", "ppo", "--latex").stdout
    assert "regularizes nothing" in lossmith("losses", "show", "book_ppo_clip").stdout


def test_train_from_a_recipe_with_options_that_win(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('steps = 7\nlearning_rate = 0.001\nloss = { name = "rloo", beta = 0.2 }\n')
    result = lossmith("train", recipe, *small(tmp_path, "--name", "mine"))
    assert "2 prompts x 3 samples = 6 completions of at most 8 tokens a step" in result.stdout
    assert "1 update a step x 2 steps = 2 updates" in result.stdout
    assert "0.2·κ" in result.stdout and "π_θ(y) / π_old(y)" in result.stdout
    assert "step   2/2" in result.stdout and "Held-out prompts (n = 3" in result.stdout
    assert "left 0:00" in result.stdout
    summary = json.loads((tmp_path / "runs" / "mine" / "summary.json").read_text())
    assert {"before", "after", "difference", "preferred"} == set(summary["held_out"])
    again = lossmith("train", *small(tmp_path, "--name", "mine"), code=2)
    assert "never overwrites" in again.stderr


def test_json_on_standard_output_and_all_else_beside_it(tmp_path):
    result = lossmith("train", *small(tmp_path, "--json"))
    summary = json.loads(result.stdout)
    assert summary["held_out"]["before"]["n"] == 3
    assert "step   2/2" in result.stderr


def test_resume_goes_on(tmp_path):
    lossmith("train", *small(tmp_path, "--name", "a", "--checkpoint-every", 1))
    folder = tmp_path / "runs" / "a"
    assert "--resume goes on with the recipe" in lossmith("train", "--resume", folder, "--seed", 3, code=2).stderr
    assert "is finished" in lossmith("train", "--resume", folder).stdout
    result = lossmith("train", "--resume", folder, "--steps", 3)
    assert "step   3/3" in result.stdout and "step   2/3" not in result.stdout
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_sample_writes_a_set_a_line(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("one\ntwo\none\n")
    out = tmp_path / "out.jsonl"
    said = lossmith("sample", prompts, "--n", 3, "-o", out, "--model", tiny.folder(), "--max-tokens", 6).stderr
    assert "3 rows are 2 prompts: 1 exact duplicate left out (p.txt:3)" in said
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["prompt"], len(r["outputs"])) for r in rows] == [("one", 3), ("two", 3)]
    assert all(len(o["tokens"]) == len(o["behavior_logp"]) for r in rows for o in r["outputs"])
    assert all(len({o["completion"] for o in r["outputs"]}) == 3 for r in rows)
    assert "not overwritten" in lossmith("sample", prompts, "-o", out, "--model", tiny.folder(), code=2).stderr


def test_best_of_n_keeps_what_the_scorer_likes_most(tmp_path):
    prompts, out = tmp_path / "p.txt", tmp_path / "best.jsonl"
    prompts.write_text("one\ntwo\n")
    options = ("--n", 8, "--model", tiny.folder(), "--max-tokens", 12)
    every = lossmith("sample", prompts, *options, "--resample", 0).stdout
    lossmith("sample", prompts, *options, "--best-by", "length", "-o", out)
    words = [max(len(o["completion"].split()) for o in json.loads(row)["outputs"]) for row in every.splitlines()]
    best = [json.loads(row)["outputs"] for row in out.read_text().splitlines()]
    assert [len(outputs) for outputs in best] == [1, 1]
    assert [outputs[0]["score"] for outputs in best] == [n / 100 for n in words]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--stepz", "3"), "Did you mean --steps"),
        (("train", "missing.toml"), "there is no recipe file 'missing.toml'"),
        (("train", "--loss", "grop"), "Did you mean 'grpo'"),
        (("losses", "show", "grpo(bta=1)"), "Did you mean 'beta'"),
        (("train", "--prompts", "none.jsonl"), "there is no prompt file"),
        (("sample", "x.txt", "--n", "2", "--temperature", "0"), "copies of one completion"),
        (("train", "--temperature", "0"), "greedy"),
        (("train", "--resume", "nowhere"), "there is no run folder"),
    ],
)
def test_mistakes_are_one_message_and_no_traceback(tmp_path, arguments, message):
    result = lossmith(*arguments, code=2, cwd=tmp_path, columns=300)  # which asserts that there is no traceback
    assert message in result.stdout + result.stderr


def test_a_recipe_file_with_a_mistyped_key_names_the_nearest(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("learning_rat = 1\n")
    assert "Did you mean 'learning_rate'" in lossmith("train", recipe, code=2).stderr
    recipe.write_text("steps = = 3\n")
    assert "line 1" in lossmith("train", recipe, code=2).stderr
