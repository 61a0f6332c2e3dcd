"""What cannot work is refused before a model is loaded; what can is not warned about."""

import pytest
import torch

import lossmith as ls
import lossmith.losses as L
from batches import COMPLETION, EVERY, NAMES, quiet_loss, random_fields
from lossmith.errors import LossmithError, PolicyError, RecipeError
from lossmith.policy import SamplingSettings, check_samples
from lossmith.reward_model.train import RewardRecipe
from lossmith.training import Recipe
from lossmith.training.offline.loop import PreferenceRecipe
from test_training import metrics, settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 0}, "temperature = 0 with samples_per_prompt = 8 is greedy.*Raise the temperature"),
        ({"temperature": 1e-3}, "temperature = 0.001 .*is greedy"),
        ({"temperature": 1e-30}, "temperature = 1e-30 .*is greedy"),
        ({"top_k": 1}, "top_k = 1 .*is greedy"),
        ({"top_p": 1e-9}, "top_p = 1e-09 .*is greedy"),
        ({"top_p": 0.01}, "top_p = 0.01 .*is greedy"),
        ({"temperature": 1e30}, r"temperature = 1e\+30 makes every token about as likely.*noise"),
        ({"temperature": 100.0}, "temperature = 100 .*noise"),
        ({"learning_rate": 0}, "learning_rate = 0 changes nothing"),
        ({"learning_rate": 1e-30}, "learning_rate = 1e-30 changes nothing"),
        ({"learning_rate": 1000.0}, "learning_rate = 1000 moves every weight"),
        ({"learning_rate": 0.1, "weight_decay": 10.0}, "weight_decay = 10 .* takes the whole of every weight away"),
        ({"max_grad_norm": 1e-12}, "max_grad_norm = 1e-12 scales gradients down.*nothing moves"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, message):
    with pytest.raises(RecipeError, match=f"^here: {message}"):
        Recipe.make("here", **fields)


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.2}, {"top_k": 2}, {"top_p": 0.1}, {"temperature": 2.0}, {"learning_rate": 1e-7}]
)
def test_settings_that_can_work_are_not(fields):
    Recipe.make(**fields).policy_loss()


@pytest.mark.parametrize("fields", [{"learning_rate": 0}, {"learning_rate": 1e5}, {"max_grad_norm": 1e-9}])
def test_the_same_settings_of_a_run_on_preferences(fields):
    with pytest.raises(RecipeError, match=f"{next(iter(fields))} = "):
        PreferenceRecipe.make(preferences="x.jsonl", **fields)


@pytest.mark.parametrize("rate", [0.0, 1e-30, 1e5])
def test_the_same_rate_of_a_reward_model(rate):
    with pytest.raises(RecipeError, match=r"learning_rate = .* (changes nothing|moves every weight)"):
        RewardRecipe.make(learning_rate=rate)


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1e-3}, {"top_k": 1}, {"top_p": 1e-9}])
def test_several_copies_of_one_completion_are_no_set(fields):
    check_samples(1, SamplingSettings(**fields))
    with pytest.raises(PolicyError, match="with n = 3 would give 3 copies"):
        check_samples(3, SamplingSettings(**fields))


def test_noise_is_not_sampled():
    with pytest.raises(PolicyError, match="noise"):
        check_samples(1, SamplingSettings(temperature=1e30))


# -- one sample of a prompt -------------------------------------------------------------------------------------------


def pull(name: str, groups: list[int]) -> float:
    """The most by which a token's gradient depends on the rewards: these, or their opposites. A reference, a teacher
    and a shifted baseline pull too, and are no signal of the rewards.
    """
    loss, fields = quiet_loss(name), random_fields(0)
    keep = fields["mask"].any(1)
    fields = {k: v[keep][: len(groups)] for k, v in fields.items()} | {"group": torch.tensor(groups)}
    reward, logp = fields.pop("reward").abs(), fields.pop("logp")
    found = []
    for scored in (reward, reward.max() - reward):
        leaf = logp.clone().requires_grad_()
        out = loss(L.Batch(**fields, logp=leaf, reward=scored)).loss
        found.append(torch.autograd.grad(out, leaf)[0])
    return float((found[0] - found[1]).abs().max())


@pytest.mark.parametrize("name", [n for n in (*NAMES, *COMPLETION) if "reward" in quiet_loss(n).needs])
def test_compares_says_whether_one_sample_a_prompt_has_a_signal(name):
    """Against the gradient itself: with a group to each completion, and with one for all."""
    loss = quiet_loss(name)
    assert (loss.compares == "group") == (pull(name, [0, 1, 2, 3]) == 0.0)
    assert pull(name, [0, 0, 0, 0]) > 0


@pytest.mark.parametrize("name", [n for n in EVERY if quiet_loss(n).compares == "group"])
def test_a_loss_that_compares_samples_is_refused_one(name):
    spec = quiet_loss(name)
    if not spec.needs <= ls.training.recipe.PROVIDED:
        return
    taught = {"teacher": "self", "teacher_column": "hint"} if "teacher_logp" in spec.needs else {}
    with pytest.raises(RecipeError, match=f"'{name}' compares the completions of a prompt.*samples_per_prompt = 1"):
        Recipe.make(loss=spec, samples_per_prompt=1, allow_traps=True, **taught).policy_loss()
    Recipe.make(loss=spec, samples_per_prompt=2, allow_traps=True, **taught).policy_loss()


def test_a_loss_of_your_own_is_taken_at_its_word():
    """It is no class of ours, and it is asked what it compares."""

    class Mine(L.PolicyLoss):
        compares = "group"

    with pytest.raises(RecipeError, match="'mine' compares"):
        Recipe.make(loss=Mine(name="mine"), samples_per_prompt=1).policy_loss()


def test_one_completion_a_step_is_nothing_to_compare_with():
    with pytest.raises(RecipeError, match="compares the completions of a step"):
        Recipe.make(loss="reinforce", samples_per_prompt=1, prompts_per_step=1).policy_loss()
    for loss in ("reinforce", "ppo", "reward_only", "grpo@verl", "sft"):  # verl: the raw reward in a group of one
        Recipe.make(loss=loss, samples_per_prompt=1).policy_loss()


@pytest.mark.parametrize(
    ("loss", "refused"), [("grpo(beta=1e6)", True), ("grpo(beta=101)", True), ("grpo(beta=1)", False)]
)
def test_a_kl_term_that_leaves_nothing_of_the_advantage(loss, refused):
    recipe = Recipe.make(loss=loss)
    if not refused:
        recipe.policy_loss()
        return
    with pytest.raises(RecipeError, match=r"beta = .*the policy stays at the reference"):
        recipe.policy_loss()


@pytest.mark.parametrize(
    "changes",
    [
        {"samples_per_prompt": 1}, {"loss": "rloo", "samples_per_prompt": 1}, {"learning_rate": 0}, {"top_k": 1},
        {"temperature": 1e30}, {"loss": "grpo(beta=1e6)"}, {"max_grad_norm": 1e-12},
    ],
)  # fmt: skip
def test_nothing_is_loaded_or_written_for_a_run_that_cannot_work(tmp_path, changes, monkeypatch):
    monkeypatch.setattr(ls.training.prepare, "load_policy", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(LossmithError):
        ls.train(**settings(tmp_path, **{"loss": "grpo", **changes}))
    assert not (tmp_path / "runs").exists()


# -- while it runs ----------------------------------------------------------------------------------------------------


def shown(run, capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_a_loss_that_compares_nothing_is_not_warned_about(tmp_path, capsys):
    run = ls.train(**settings(tmp_path, loss="reinforce", samples_per_prompt=1, quiet=False))
    assert "no learning signal" not in shown(run, capsys)
    assert all(r["constant_groups"] == r["groups"] and r["grad_norm"] > 0 for r in metrics(run))


def test_equal_rewards_are_said(tmp_path, capsys):
    run = ls.train(**settings(tmp_path, scorer=lambda completions, **_: [0.5] * len(completions), quiet=False))
    assert "no learning signal" in shown(run, capsys)


@pytest.mark.parametrize("what", ["mask", "zero"])
def test_a_run_stops_where_every_completion_was_cut_and_the_loss_leaves_those_out(tmp_path, what):
    run = ls.train(**settings(tmp_path, loss=f"grpo(truncated='{what}', beta=0)", max_tokens=1, steps=5))
    assert len(metrics(run)) == 1
    assert "every completion was cut at max_tokens" in run.stopped and "raise max_tokens" in run.stopped
    assert len(metrics(ls.train(**settings(tmp_path, loss="grpo(beta=0)", max_tokens=1, steps=2)))) == 2
