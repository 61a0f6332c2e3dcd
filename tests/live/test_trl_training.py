"""Losses of Lossmith inside TRL's own `GRPOTrainer.train()`: they end where TRL's own and plain autograd end.

LOSSMITH_LIVE_UPDATES: updates of each of the losses that are trained in two micro-batch sizes (2).
"""

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

import lossmith.losses as L
import trl_runs as runs
from lossmith.errors import LossError, TrapWarning
from trl_runs import config

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # what TRL and the libraries under it warn of on this machine
]

CLOSE = 1e-5


def test_moved_far_enough_to_tell():
    assert runs.run(args=config()).moved() > 1000 * CLOSE


def assert_same(trl_settings, loss, *, ours=None, **more):
    """TRL's own loss under these settings, and one of Lossmith without them."""
    common = {k: v for k, v in trl_settings.items() if k in ours} if ours else {}
    theirs = runs.run(args=config(**trl_settings), **more)
    mine = runs.run(loss, args=config(**common), **more)
    assert theirs.moved() > 100 * CLOSE
    assert mine.rewards() == theirs.rewards()  # so the sampled texts were the same to the end
    assert mine.apart(theirs) < CLOSE


LOSS_TYPES = {
    "dapo": ("dapo@trl", {}, {}),
    "grpo": ("grpo_classic@trl", {}, {}),
    "dr_grpo": ("dr_grpo@trl", {}, {}),
    "gspo": ("gspo@trl", dict(loss_type="grpo", importance_sampling_level="sequence"), {}),
    "cispo": ("cispo@trl", dict(epsilon_high=5.0), dict(cap=5.0)),
    "sapo": ("sapo@trl", {}, {}),
    "vespo": ("vespo@trl", {}, {}),
    "luspo": ("luspo@trl", dict(importance_sampling_level="sequence", learning_rate=0.01), {}),
    "bnpo": ("bnpo@trl", {}, {}),  # depends on the micro-batches, which are the same in both
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_each_loss_type_ends_where_trls_own_does(loss_type):
    name, settings, changes = LOSS_TYPES[loss_type]
    assert_same({"loss_type": loss_type} | settings, L.get_loss(name, **changes), ours={"learning_rate"})


OPTIONS = {
    "a reference": (dict(beta=0.1), "dapo@trl(beta=0.1)"),
    "a reference, its KL without the ratio": (
        dict(beta=0.1, use_bias_correction_kl=False),
        "dapo@trl(beta=0.1, kl_ratio_weight=False)",
    ),
    "bounds of both sides": (
        dict(epsilon=0.05, epsilon_high=0.1, delta=1.3),
        "dapo@trl(clip_low=0.05, clip_high=0.1, dual_clip=1.3)",
    ),
    "no scale": (dict(scale_rewards="none"), "dapo@trl(advantage_scale='none')"),
    "one scale for the batch": (dict(scale_rewards="batch"), "dapo@trl(advantage_scale='batch_std')"),
    "off-policy sequences masked": (
        dict(off_policy_mask_threshold=0.01),
        "dapo@trl(sequence_mask='opsm', opsm_delta=0.01)",
    ),
}
SCHEDULES = {
    "generation and update aligned": dict(steps_per_generation=4, num_iterations=1),
    "one generation, three passes": dict(steps_per_generation=4, num_iterations=3),
    "four updates a generation": dict(gradient_accumulation_steps=2, num_iterations=1),
    "an update over two generations": dict(gradient_accumulation_steps=8, steps_per_generation=4, num_iterations=1),
    "truncated completions masked": dict(mask_truncated_completions=True),
    "truncated completions masked, means over completions": dict(mask_truncated_completions=True, loss_type="grpo"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_trl_are_options_of_the_loss(option):
    settings, loss = OPTIONS[option]
    assert_same(settings, loss)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_schedule_of_trl_gives_the_same_updates(schedule):
    settings = SCHEDULES[schedule]
    loss = "grpo_classic@trl" if "loss_type" in settings else "dapo@trl(beta=0.05)"
    beta = {} if "loss_type" in settings else {"beta": 0.05}
    assert_same(settings | beta | {"max_steps": 6}, loss, ours=set(settings) - {"loss_type"} | {"max_steps"})


def nothing_for_short_texts(completions, **_):
    return [None if len(text) < 3 else float(len(text)) for text in completions]


GDPO = "dapo@trl(advantage='gdpo', advantage_scale='none', eps=1e-4)"


@pytest.mark.parametrize("how", ["sum_then_normalize", "normalize_then_sum"])
def test_several_reward_functions_with_weights(how):
    loss = "dapo@trl" if how == "sum_then_normalize" else GDPO
    settings = dict(reward_weights=[1.0, 0.25], multi_objective_aggregation=how)
    assert_same(settings, loss, ours={"reward_weights"}, rewards=[runs.letters, runs.length])


def test_a_reward_function_without_an_opinion_adds_nothing():
    assert_same({}, "dapo@trl", rewards=[runs.letters, nothing_for_short_texts])


def test_scores_that_are_compared_must_be_there():
    with pytest.raises(LossError, match=r"nothing_for_short_texts gave none for \d+ of 32 completions"):
        runs.run(GDPO, rewards=[runs.letters, nothing_for_short_texts])


def test_a_completion_that_nobody_scored_teaches_nothing():
    trainer = runs.trainer("grpo", args=config(max_steps=1), rewards=nothing_for_short_texts)
    trainer.train()
    inputs = trainer._buffered_inputs
    unscored = torch.cat([x["completion_mask"].sum(1) for x in inputs]) < 3
    assert 0 < unscored.sum() < 32
    assert not torch.cat([x["lossmith_batch_mask"] for x in inputs])[unscored].any()
    assert not torch.cat([x["lossmith_credit_weight"] for x in inputs])[unscored].any()


def test_tokens_of_tools_are_not_trained_on():
    tools = functools.partial(runs.written, tools=True)
    assert_same({}, "dapo@trl", rollout_func=tools)
    assert runs.run("dapo@trl", rollout_func=tools).apart(runs.run("dapo@trl", rollout_func=runs.written)) > CLOSE


def test_lora():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    assert_same(dict(beta=0.1), "dapo@trl(beta=0.1)", peft_config=lora)


def as_with_vllm(loss, **settings):
    """A run whose sampler is another one than the policy, as TRL treats it with vLLM."""
    sampled = functools.partial(runs.written, sampler=0.3)
    trainer = runs.trainer(loss, args=config(max_steps=6, **settings), rollout_func=sampled)
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)  # nothing is sampled there
    return runs.trained(trainer)


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({}, "dapo@trl_vllm"),
        (
            dict(vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=1.2),
            "dapo@trl(mismatch='tis', mismatch_level='token', mismatch_high=1.2)",
        ),
    ],
)
def test_the_samplers_own_log_probabilities_correct_for_it(settings, loss):
    theirs, mine = as_with_vllm(None, **settings), as_with_vllm(loss)
    assert mine.apart(theirs) < CLOSE < 100 * CLOSE < theirs.moved()
    assert mine.apart(as_with_vllm("dapo@trl")) > CLOSE


def test_evaluation_gives_the_loss_of_trl_and_disturbs_nothing():
    from datasets import Dataset

    held_out = Dataset.from_dict({"prompt": ["tell me", "say more", "go on", "and then"]})
    evaluated = dict(eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=8, max_steps=6)
    logs = [
        runs.run(loss, args=config(**evaluated), eval_dataset=held_out).log
        for loss in (None, "grpo_classic@trl", "dapo@trl")
    ]
    for theirs, mine in zip(*([x for x in log if "eval_loss" in x] for log in (logs[0], logs[2])), strict=True):
        assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-6)
        assert mine["eval_reward"] == theirs["eval_reward"]
    assert [x["eval_loss"] for x in logs[1] if "eval_loss" in x] != [
        x["eval_loss"] for x in logs[2] if "eval_loss" in x
    ]


# -- losses that TRL lacks ---------------------------------------------------------------------------------------------


def fitting():
    """Every loss of the catalogue that is a sum over rows and needs what TRL has; of equal ones the first."""
    args, seen, found = config(), [], []
    from lossmith.adapters.trl.settings import check_settings, loss_for

    for entry in L.list_losses():
        if "@trl" in entry.name:
            continue
        try:
            loss = loss_for(L.example_loss(entry.name, max_length=12), args)
            check_settings(loss, args)
        except LossError:
            continue
        said = {k: v for k, v in loss.to_dict().items() if k != "name"}
        if said not in seen and not getattr(loss, "local_normalizer", False):
            seen.append(said)
            found.append(entry.name)
    return found


FITTING = fitting()
STILL = {"kl_only"}  # it pulls to the reference, where the policy begins


def test_fifty_losses_and_more_fit():
    assert len(FITTING) >= 50


@pytest.mark.parametrize("name", FITTING)
def test_micro_batches_of_4_and_of_16_end_at_the_same_weights(name):
    updates = {"max_steps": int(os.environ.get("LOSSMITH_LIVE_UPDATES", "2")), "learning_rate": 0.03}
    loss = L.example_loss(name, max_length=12)
    small = runs.run(loss, args=config(**updates))
    large = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
    assert small.apart(runs.run(loss, args=config(**updates | large))) < CLOSE
    assert name in STILL or small.moved() > 100 * CLOSE


WHOLE = dict(
    per_device_train_batch_size=32, gradient_accumulation_steps=1, steps_per_generation=1, num_iterations=1, max_steps=1
)


def chosen_over_rejected(batch, *, margin=0.5):
    """A loss of one's own that looks at all rows: the best completion should be likelier than the worst."""
    total = batch.logp.sum(1)
    return torch.nn.functional.softplus(margin - (total[batch.reward.argmax()] - total[batch.reward.argmin()]))


@pytest.mark.parametrize(
    "loss",
    ["online_dpo(beta=0.1)", "ipo(beta=0.1)", "simpo", "orpo", "sppo(eta=2.0)", "kl_cov",
     "m2po(m2_threshold=0.04)", "grpo_top_entropy", "dpo(beta=0.2)", chosen_over_rejected],
)  # fmt: skip
def test_a_loss_of_the_whole_update_takes_the_step_of_plain_autograd(loss):
    import transformers

    trainer = runs.trainer(loss, args=config(**WHOLE))
    trainer.train()
    inputs = trainer._buffered_inputs[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(runs.folder(), dtype=torch.float32)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    shown = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    positions = (shown.cumsum(1) - 1).clamp(min=0)
    start = inputs["prompt_ids"].shape[1]
    logits = (
        model(input_ids=ids, attention_mask=shown, position_ids=positions).logits[:, start - 1 : -1].log_softmax(-1)
    )
    logp = logits.gather(2, inputs["completion_ids"][:, :, None])[:, :, 0]
    texts = trainer.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
    said = trainer.processing_class.batch_decode(inputs["prompt_ids"], skip_special_tokens=True)
    batch = L.Batch(
        logp, inputs["completion_mask"].bool(),
        **dict.fromkeys(("old_logp", "behavior_logp", "ref_logp"), logp.detach()),
        reward=torch.tensor(runs.letters(texts)), group=torch.tensor([sorted(set(said)).index(x) for x in said]),
        entropy=-(logits.exp() * logits).sum(-1),
    )  # fmt: skip
    trainer.loss(batch).loss.backward()
    start = runs.flat(model)
    expected = torch.cat([(p - 0.1 * p.grad).detach().flatten().double() for p in model.parameters()])
    got = runs.flat(trainer.model)
    assert (expected - start).abs().max() > 10 * CLOSE
    assert (got - expected).abs().max() < CLOSE


def test_advantages_in_trls_tables_are_those_that_were_used():
    trainer = runs.trainer("rloo", args=config(max_steps=1))
    trainer.train()
    rewards = torch.tensor(list(trainer._logs["rewards"]["letters"])).view(-1, 4)
    expected = (rewards - (rewards.sum(1, keepdim=True) - rewards) / 3).flatten()
    torch.testing.assert_close(torch.tensor(list(trainer._logs["advantages"])), expected, atol=1e-5, rtol=0)


def test_metrics_do_not_depend_on_micro_batches():
    large = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "steps_per_generation": 1}
    small = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "steps_per_generation": 8}
    logs = [runs.run("grpo(beta=0.1)", args=config(max_steps=3, **x)).log for x in (small, large)]
    for one, other in zip(*([x for x in log if "loss" in x] for log in logs), strict=True):
        names = [k for k in one if k.startswith("lossmith/")] + ["kl", "entropy", "clip_ratio/region_mean"]
        assert {k: one[k] for k in names} == pytest.approx({k: other[k] for k in names}, abs=1e-5)
        assert one["loss"] == pytest.approx(one["lossmith/loss_policy"] + one["lossmith/loss_kl"], abs=1e-5)


# -- several processes -------------------------------------------------------------------------------------------------

RANKS = ["dapo@trl", "grpo_classic@trl", "gspo@trl", "grpo(beta=0.1)", "rloo", "dppo_tv", "opo", GDPO, "luspo"]


def of_ranks(processes):
    """Weights after three updates, by loss, of a generation batch of 32 that so many processes share."""
    share = {"per_device_train_batch_size": 4, "steps_per_generation": 8 // processes, "max_steps": 3}
    share["gradient_accumulation_steps"] = share["steps_per_generation"]
    more = {"rollout_func": runs.written, "rewards": [runs.letters, runs.length]}
    return {name: runs.run(name, args=config(learning_rate=0.03, **share), **more) for name in RANKS}


def test_two_processes_take_the_steps_of_one(tmp_path):
    one = of_ranks(1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517"]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([*launch, __file__, tmp_path], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(tmp_path / "weights.pt")
    for name in RANKS:
        assert one[name].moved() > 100 * CLOSE
        assert (one[name].weights - two[name]).abs().max() < CLOSE, name


# -- what is refused, before a model is loaded -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "settings", "said"),
    [
        ("ppo", {}, "ppo.*value"),
        ("remax", {}, "remax.*reward_greedy"),
        ("dpo", {}, "batch_size=32, gradient_accumulation_steps=1, steps_per_generation=1"),
        ("clip_cov", {}, "batch_size=16, gradient_accumulation_steps=1, steps_per_generation=2"),
        ("grpo(beta=0.1, kl_control='adaptive')", {}, "kl_control='fixed'"),
        ("opmd", {}, "needs tau="),
        ("grppo", {}, "Did you mean"),
        ("rloo", dict(epsilon=0.1, scale_rewards="none"), "epsilon=0.1, scale_rewards='none'.*advantage_scale='none'"),
        ("rloo", dict(loss_type="bnpo"), "loss_type='bnpo'"),
        ("rloo", dict(beta=0.04), r"beta=0.04.*rloo\(beta=0.04\)"),
        (f"{GDPO[:-1]}, score_weights=(1.0, 2.0))", dict(reward_weights=[1.0]), "score_weights.*reward_weights"),
        (len, {}, "function of Python itself"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_the_model_is_loaded(loss, settings, said, monkeypatch):
    def load(*_, **__):
        pytest.fail("the model was loaded")

    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", load)
    with pytest.raises(LossError, match=said):
        runs.trainer(loss, args=config(**settings))


def test_the_example_of_the_page_trains(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "in-trl.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    assert code.count("HuggingFaceTB/SmolLM2-135M-Instruct") == 1
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", runs.folder()).replace(
        '"out", ', '"out", use_cpu=True, '
    )
    monkeypatch.chdir(tmp_path)
    ran: dict = {}
    exec(code, ran)
    assert ran["trainer"].state.global_step == 4


def test_a_known_trap_is_told():
    with pytest.warns(TrapWarning, match="local normalizer"):
        runs.trainer("bnpo", args=config())


if __name__ == "__main__":  # one of several processes
    found = of_ranks(int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        torch.save({name: run.weights for name, run in found.items()}, Path(sys.argv[1]) / "weights.pt")
