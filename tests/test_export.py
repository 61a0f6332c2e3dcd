"""A recipe written for verl: what is in the folder, and what is refused."""

import json

import pyarrow.parquet
import pytest

from lossmith.adapters.verl_export import export, loss_inside
from lossmith.adapters.verl_reward import scorer_of
from lossmith.errors import LossError, RecipeError, ScorerError
from lossmith.training import Recipe
from shell import lossmith

SCORER = """
from lossmith.scorers import ABSTAIN

def graded(prompts, completions, topic):
    return [ABSTAIN if c == "?" else float(len(c) + (t == "b")) for c, t in zip(completions, topic)]
"""


def recipe(tmp_path, **changes):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Question {i}?", "topic": "ab"[i % 2]} for i in range(12)]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "scorer.py").write_text(SCORER)
    settings = {"prompts": str(prompts), "scorer": f"{tmp_path / 'scorer.py'}:graded", "held_out": 4}
    return Recipe.make("test", **settings | {"prompts_per_step": 4, "loss": "dapo"} | changes)


def test_the_folder_holds_all_that_verl_needs(tmp_path):
    folder = export(recipe(tmp_path, steps=7, max_tokens=32, loss="grpo(beta=0.02)"), tmp_path / "out", gpus=2)
    assert {p.name for p in folder.iterdir()} == {
        "verl.yaml", "train.parquet", "held-out.parquet", "reward.py", "lossmith_recipe.py", "recipe.toml", "launch.sh",
    }  # fmt: skip
    train = pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()
    held = pyarrow.parquet.read_table(folder / "held-out.parquet").to_pylist()
    assert len(train) == 8 and len(held) == 4
    assert train[0]["prompt"][0]["role"] == "user" and train[0]["data_source"] == "lossmith"
    assert not {str(r["prompt"]) for r in train} & {str(r["prompt"]) for r in held}
    text = (folder / "verl.yaml").read_text()
    loss = ('"kl_loss_coef": 0.02', '"kl_loss_type": "low_var_kl"', '"loss_agg_mode": "seq-mean-token-mean"')
    for setting in (*loss, '"adv_estimator": "lossmith/recipe"', '"n_gpus_per_node": 2', '"total_training_steps": 7'):
        assert setting in text, setting
    assert not loss_inside(recipe(tmp_path, loss="grpo(beta=0.02)")).kl.active
    assert (folder / "launch.sh").stat().st_mode & 0o100
    with pytest.raises(RecipeError, match="is not empty"):
        export(recipe(tmp_path), folder)


def test_the_reward_function_is_the_recipes_scorer(tmp_path):
    folder = export(recipe(tmp_path), tmp_path / "out")
    row = pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()[0]
    topic = json.loads(row["extra_info"]["prompt"])[1]["topic"]
    ask = scorer_of(folder / "recipe.toml")
    assert ask("lossmith", "four", "", row["extra_info"]) == 4 + (topic == "b")
    with pytest.raises(ScorerError, match="has no opinion on a completion, and verl needs a reward"):
        ask("lossmith", "?", "", row["extra_info"])


REFUSED = {
    "top_p": (0.9, "top_p = 0.9: verl's log-probabilities are of the whole distribution"),
    "stop": (["x"], r"stop = \['x'\]: its completions end at end tokens"),
    "scorer_errors": ("drop", "every completion has a reward there"),
    "schedule": ("linear", "it has constant and cosine"),
    "updates_per_step": (3, "it cuts the 4 prompts of a step into equal parts"),
    "scorer": (len, "name a function by its file"),
    "loss": ("grpo(beta=0.1, kl_estimator='k3', kl_ratio_weight=True)", "its KL term has no ratio weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_does_not_carry_over_is_named(tmp_path, name):
    value, message = REFUSED[name]
    with pytest.raises(RecipeError, match=message):
        export(recipe(tmp_path, **{name: value}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_verls_hook_does_not_carry_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(LossError, match="topr does not fit verl"):
        export(recipe(tmp_path, loss="topr"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_it_and_says_how_to_train(tmp_path):
    made = recipe(tmp_path)
    file = tmp_path / "recipe.toml"
    file.write_text(f'prompts = "{made.prompts}"\nscorer = "{made.scorer}"\nloss = "dapo"\nheld_out = 4\n')
    said = lossmith("export", "verl", file, "-o", tmp_path / "out", "--prompts-per-step", 4)
    assert "launch.sh" in said.stdout and (tmp_path / "out" / "verl.yaml").exists()
    again = lossmith("export", "verl", file, "-o", tmp_path / "out", code=2)
    assert "is not empty" in again.stderr
