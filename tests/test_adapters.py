"""The hooks of other trainers, called as they call them: cut into micro-batches and ranks, against the whole batch."""

from enum import Enum
from types import SimpleNamespace

import pytest
import torch

import lossmith.losses as L
from batches import quiet_loss
from lossmith.adapters import nemo_rl, openrlhf, prime_rl, skyrl, slime, tinker, verl
from lossmith.adapters.hooks import HOOKS
from lossmith.errors import LossError
from lossmith.proofs.random_batches import evaluate, random_fields

PIECES = [[3, 0, 8], [1, 7], [2, 4, 6, 5]]
LIVE = [0, 1, 2, 3, 5, 6, 7, 8]  # row 4 has no token


class Config(dict):
    __getattr__ = dict.get


def drawn(loss, seed=0, **more):
    """Fields of a batch in which every row has a token, and the gradient of the whole."""
    fields = {k: v[LIVE] for k, v in random_fields(loss, seed).items()} | more
    return fields, evaluate(loss, fields).gradients["logp"]


def pulled(fields, call, pieces=((3, 0, 7), (1, 6), (2, 5, 4))):
    """dL/dlogp of the sum of call(rows, logp of these rows) over pieces."""
    logp = fields["logp"].clone().requires_grad_()
    sum(call(torch.tensor(p), logp[list(p)]) for p in pieces).backward()
    return torch.where(fields["mask"], logp.grad, 0.0)


def close(got, want, tolerance=1e-12):
    assert float((got - want).abs().max()) < tolerance


def by_verl(loss, fields, ranks=2, **info):
    """verl's two functions; gradients of ranks are averaged, as FSDP averages them."""
    rewards = torch.zeros_like(fields["logp"]).index_put_(
        (torch.arange(8), torch.zeros(8, dtype=int)), fields["reward"]
    )
    uid = [f"prompt {g}" for g in fields["group"].tolist()]
    advantage, _ = verl.adv_est(rewards, fields["mask"].double(), Config(), uid, spec=loss)
    counts = {"dp_size": ranks, "batch_num_tokens": int(fields["mask"].sum()), "global_batch_size": 8} | info

    def call(rows, logp):
        config = SimpleNamespace(global_batch_info=counts, get=lambda key: None)
        args = (fields["old_logp"][rows], logp, advantage[rows], fields["mask"][rows].double())
        return verl.policy_loss(*args, config=config, spec=loss)[0] / ranks

    return pulled(fields, call)


VERL = ["dapo", "gspo", "cispo", "dppo_tv", "gmpo", "lite_ppo", "opo", "maxrl", "fipo", "reinforce_pp_baseline", "dro"]


@pytest.mark.parametrize("name", VERL)
def test_verl_gives_the_whole_batchs_gradient(name):
    loss = quiet_loss(name)
    fields, want = drawn(loss)
    close(by_verl(loss, fields), want)
    close(by_verl(loss, fields, ranks=1), want)


def test_verl_carries_a_normalizer_of_prompts_in_the_advantage_and_refuses_it_where_that_is_wrong():
    loss = quiet_loss("cispo", aggregate="prompt_mean")
    fields, want = drawn(loss)
    close(by_verl(loss, fields), want)
    with pytest.raises(LossError, match="trust='quadratic' is not homogeneous in A"):
        by_verl(quiet_loss("dro", aggregate="prompt_mean"), fields)


def test_verl_is_told_the_loss_in_its_configuration():
    loss, (fields, _) = quiet_loss("dppo_tv"), drawn(quiet_loss("dppo_tv"))
    args = (fields["old_logp"], fields["logp"], fields["reward"][:, None].expand(8, 8), fields["mask"].double())
    config = SimpleNamespace(policy_loss=Config(loss="dppo_tv"), get=lambda key: None)
    close(verl.policy_loss(*args, config=config)[0], verl.policy_loss(*args, spec=loss)[0])
    with pytest.raises(LossError, match=r"no loss is named: \+actor_rollout_ref\.actor\.policy_loss\.loss=NAME"):
        verl.policy_loss(*args, config=Config())
    with pytest.raises(LossError, match=r"set actor_rollout_ref\.actor\.loss_scale_factor"):
        verl.policy_loss(*args, spec="dr_grpo")
    verl.policy_loss(*args, config=Config(loss_scale_factor=8), spec="dr_grpo")


def test_verl_gives_a_loss_of_the_whole_update_all_of_it_or_says_what_to_set():
    loss = quiet_loss("kl_cov")
    fields, want = drawn(loss)
    with pytest.raises(LossError, match=r"was given \d+ of its 35 tokens. It needs one data-parallel rank"):
        by_verl(loss, fields, ranks=1)
    rewards = fields["reward"][:, None] * torch.eye(8)[0]
    advantage, _ = verl.adv_est(rewards.double(), fields["mask"], Config(), fields["group"].tolist(), spec=loss)

    def whole(rows, logp):
        return verl.policy_loss(fields["old_logp"][rows], logp, advantage[rows], fields["mask"][rows], spec=loss)[0]

    close(pulled(fields, whole, [range(8)]), want)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dppo_square", "topr", "grpo@open_instruct", "cispo@trl_vllm"])
def test_verls_loss_function_gives_kl_correction_and_filter_of_the_loss_itself(name):
    loss = quiet_loss(name)
    fields, want = drawn(loss)
    rewards = fields["reward"][:, None] * torch.eye(8)[0]
    made = verl.adv_est(
        rewards.double(), fields["mask"], Config(), fields["group"].tolist(), spec=loss, which="verl_loss_fn"
    )
    function = verl.LossFn(loss)
    info = {"dp_size": 2, "batch_num_tokens": int(fields["mask"].sum()), "global_batch_size": 8}
    names = ("old_logp", "behavior_logp", "ref_logp", "reward", "group")

    def call(rows, logp):
        there = {k: fields[k][rows] for k in names if k in fields} | {"logp": logp, "advantage": made[0][rows]}
        return function.on(there, fields["mask"][rows], info, made[1][rows], None)[0] / 2

    close(pulled(fields, call), want)


def test_verls_loss_function_refuses_what_nothing_would_add():
    with pytest.raises(LossError, match=r"actor.entropy_coeff = 0.1 has no effect under set_loss_fn"):
        verl.LossFn("grpo", Config(entropy_coeff=0.1))
    with pytest.raises(LossError, match=r"actor.kl_loss_coef = 0.001 has no effect"):
        verl.LossFn("grpo", Config(use_kl_loss=True, kl_loss_coef=0.001))
    verl.LossFn("grpo", Config(use_kl_loss=True, kl_loss_coef=0.0))


@pytest.mark.parametrize("name", ["dppo_tv", "gspo", "cispo@trl_vllm"])
def test_openrlhf_gives_the_whole_batchs_gradient(name):
    loss = quiet_loss(name)
    fields, want = drawn(loss)
    estimator = {v: k for k, v in openrlhf.ESTIMATORS.items()}[loss.advantage.option, loss.advantage_scale.option]
    module, (advantage, _) = openrlhf.ActorLoss(loss, estimator), credit(loss, fields)
    steps, ranks = 3, 2  # it divides each backward by the accumulation steps, and averages over ranks

    def call(rows, logp):
        args = (fields["old_logp"][rows], advantage[rows], fields["mask"][rows])
        tokens = torch.tensor(int(fields["mask"].sum()) / steps)
        counts = {"dp_size": ranks, "batch_num_tokens": tokens, "global_batch_size": 8 / steps}
        sampled = fields.get("behavior_logp", fields["logp"])[rows]
        found = module(logp, *args, rollout_log_probs=sampled, **counts)
        assert len(found) == 5 and not found[1].requires_grad and found[3] is None
        return found[0] / (steps * ranks)

    close(pulled(fields, call), want, 1e-7)  # its counts are float32


def credit(loss, fields):
    made = loss.credit(L.Batch(**{k: v for k, v in fields.items() if k != "logp"}))
    return made.advantage, made.weight


def test_a_trainers_estimator_that_is_not_the_losss_is_refused():
    with pytest.raises(
        LossError, match=r"dppo_tv wants advantage='group', advantage_scale='none'.*'dr_grpo' is the one"
    ):
        openrlhf.ActorLoss("dppo_tv", "group_norm")
    with pytest.raises(LossError, match="openrlhf has no estimator 'grpo'"):
        openrlhf.ActorLoss("dppo_tv", "grpo")
    with pytest.raises(LossError, match="it has none that is the one"):
        openrlhf.ActorLoss("opo", "group_norm")
    openrlhf.ActorLoss(quiet_loss("dppo_tv", advantage="given"), "group_norm")


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "prompt_mean", "seq_mean_token_sum_norm"])
@pytest.mark.parametrize("name", ["dppo_tv", "gspo", "dapo", "rollout_is"])
def test_skyrl_gives_the_whole_batchs_gradient_under_any_of_its_reductions(name, reduction):
    loss = quiet_loss(name)
    fields, want = drawn(loss)
    adapter, config = skyrl.SkyRLLoss(loss), SimpleNamespace(loss_reduction=reduction, max_seq_len=8)
    rewards = (fields["reward"][:, None] * torch.eye(8)[0]).double()
    made, _ = adapter.advantages(rewards, fields["mask"].double(), fields["group"].tolist(), config=config)
    batch = L.Batch(mask=fields["mask"], group=fields["group"])
    scaled = made * skyrl._reduction(config, batch)  # what SkyRL does between its two hooks

    def call(rows, logp):
        behavior = fields["behavior_logp"][rows] if "behavior_logp" in fields else None
        args = (fields["old_logp"][rows], scaled[rows], config, fields["mask"][rows].double(), behavior)
        return adapter.policy_loss(logp, *args)[0]

    close(pulled(fields, call), want)


def test_skyrl_trains_its_critic_towards_the_losss_returns():
    loss = quiet_loss("ppo", value_coef=0.0)
    fields, _ = drawn(quiet_loss("ppo"))
    rewards = (fields["reward"][:, None] * torch.eye(8)[0]).double()
    config = SimpleNamespace(loss_reduction="token_mean")
    made = skyrl.SkyRLLoss(loss).advantages(rewards, fields["mask"], range(8), fields["value"], config)
    want = quiet_loss("ppo").credit(L.Batch(**fields | {"old_value": fields["value"]}))
    close(made[1], want.returns)
    with pytest.raises(LossError, match="depends on how the batch is cut"):
        skyrl.SkyRLLoss(loss).advantages(
            rewards, fields["mask"], range(8), fields["value"], SimpleNamespace(loss_reduction="token_mean_legacy")
        )


@pytest.mark.parametrize("name", ["dppo@prime_rl", "ipo@prime_rl", "dppo_tv", "opd", "iw_opd", "cispo@trl_vllm"])
def test_prime_rl_gives_the_whole_batchs_gradient(name):
    loss = quiet_loss(name, **({"advantage_scale": "none"} if "trl" in name else {}))
    fields, _ = drawn(loss)
    fields, want = drawn(loss, behavior_logp=fields["old_logp"])
    advantage, _ = credit(loss, fields)

    def call(rows, logp):
        scored = "teacher_logp" if "opd" in name else "ref_logp"
        names = {"inference_logprobs": "old_logp", "ref_logprobs": scored, "loss_mask": "mask"}
        inputs = {k: fields[v][rows][0] if v in fields else None for k, v in names.items()}
        inputs |= {"trainer_logprobs": logp[0], "advantages": advantage[rows][0], "loss_weights": None}
        found = prime_rl.loss_fn(SimpleNamespace(**inputs), loss, outputs=SimpleNamespace)
        return found.loss / int(fields["mask"].sum())

    close(pulled(fields, call, [[i] for i in range(8)]), want)


def test_prime_rl_has_one_model_beside_the_policy():
    with pytest.raises(LossError, match=r"reads Batch.ref_logp and Batch.teacher_logp, and the hook has one field"):
        HOOKS["prime_rl"].check(quiet_loss("opd", beta=0.1))


def test_prime_rls_own_weights_multiply_the_tokens():
    loss = quiet_loss("dppo_tv")
    fields, _ = drawn(loss)
    x = {k: fields[k][0] for k in ("logp", "old_logp", "mask")}
    inputs = SimpleNamespace(
        trainer_logprobs=x["logp"], inference_logprobs=x["old_logp"], ref_logprobs=None, loss_mask=x["mask"],
        advantages=torch.ones(8).double(), loss_weights=None,
    )  # fmt: skip
    plain = prime_rl.loss_fn(inputs, "dppo_tv", outputs=SimpleNamespace).loss
    inputs.loss_weights = torch.full((8,), 0.5).double()
    close(prime_rl.loss_fn(inputs, "dppo_tv", outputs=SimpleNamespace).loss, plain / 2)


@pytest.mark.parametrize("name", ["grpo@nemo_rl", "dppo_tv", "gspo", "dppo_square"])
def test_nemo_rl_gives_the_whole_batchs_gradient(name):
    loss = quiet_loss(name)
    fields, want = drawn(loss)
    estimator = {v: k for k, v in nemo_rl.ESTIMATORS.items()}[loss.advantage.option, loss.advantage_scale.option]
    function, (advantage, _) = nemo_rl.LossmithLossFn(loss, estimator), credit(loss, fields)
    names = {
        "prev_logprobs": "old_logp",
        "generation_logprobs": "behavior_logp",
        "reference_policy_logprobs": "ref_logp",
    }

    def shifted(x, rows):
        return torch.nn.functional.pad(x[rows], (1, 0))

    def call(rows, logp):
        data = {k: shifted(fields[v], rows) for k, v in names.items() if v in fields}
        data |= {"advantages": shifted(advantage, rows), "token_mask": shifted(fields["mask"].double(), rows)}
        data["sample_mask"] = torch.ones(len(rows))
        tokens = torch.tensor(float(fields["mask"].sum()))
        return function(data, torch.tensor(8.0), tokens, next_token_logprobs=logp)[0]

    close(pulled(fields, call), want)


@pytest.mark.parametrize("name", ["dppo_tv", "grpo", "dpo", "kto", "m2po", "dapo", "reinforce_pp"])
def test_tinker_gives_the_whole_batchs_gradient(name):
    loss = quiet_loss(name)
    fields, want = drawn(loss)
    lengths = [8 if i else 6 for i in range(8)]
    fields["mask"][0, 6:] = False
    want = evaluate(loss, fields).gradients["logp"]
    own = {"mask", "behavior_logp", "logp"}
    data = [
        SimpleNamespace(loss_fn_inputs={"target_tokens": [1] * n, "mask": fields["mask"][i, :n].float()})
        for i, n in enumerate(lengths)
    ]
    for i, n in enumerate(lengths):
        if "behavior_logp" in fields:
            data[i].loss_fn_inputs["logprobs"] = fields["behavior_logp"][i, :n]
    rows = {
        k: [x[:n] for x, n in zip(v, lengths, strict=True)] if v.ndim == 2 else v.tolist()
        for k, v in fields.items()
        if k not in own
    }
    logprobs = [x[:n].clone().requires_grad_() for x, n in zip(fields["logp"], lengths, strict=True)]
    value, metrics = tinker.loss_fn(loss, **rows)(data, logprobs)
    value.backward()
    got = torch.nn.utils.rnn.pad_sequence([x.grad for x in logprobs], batch_first=True)
    close(torch.where(fields["mask"], got, 0.0), want)
    assert all(isinstance(x, float) for x in metrics.values())


def test_tinker_refuses_a_critic_and_fields_that_do_not_fit():
    with pytest.raises(LossError, match="ppo does not fit tinker"):
        tinker.loss_fn("ppo")
    with pytest.raises(LossError, match="rewards is no field"):
        tinker.loss_fn("dppo_tv", rewards=[1.0])
    datum = SimpleNamespace(loss_fn_inputs={"target_tokens": [1, 2]})
    with pytest.raises(LossError, match="reward has 2 entries for 1 data"):
        tinker.loss_fn("dppo_tv", reward=[1.0, 2.0], group=[0, 0])([datum], [torch.zeros(2)])


class Status(Enum):
    COMPLETED, TRUNCATED = "completed", "truncated"


@pytest.mark.parametrize("name", ["gspo", "dapo", "grpo", "dppo_square"])
def test_slime_gives_the_whole_batchs_gradient(name):
    loss = quiet_loss(name, **({"entropy_coef": 0.1} if name == "gspo" else {}))
    fields, want = drawn(loss)
    rewards, _ = slime.functions(loss)
    half = slime.objective_half(slime.HOOK, loss)
    rest = {"response_length": 8, "remove_sample": False, "status": Status.COMPLETED}
    triples = zip(fields["reward"].tolist(), fields["group"].tolist(), fields["mask"].int().tolist(), strict=True)
    samples = [
        SimpleNamespace(get_reward_value=lambda args, r=r: r, group_index=g, loss_mask=m, **rest) for r, g, m in triples
    ]
    raw, made = rewards(None, samples)
    assert raw == fields["reward"].tolist()
    by_token = half.aggregate.option == "token_mean"
    args = SimpleNamespace(calculate_per_token_loss=by_token, use_rollout_logprobs=False)
    count = int(fields["mask"].sum()) if by_token else 8

    def call(rows, logp):
        names = {"log_probs": "old_logp", "rollout_log_probs": "behavior_logp", "ref_log_probs": "ref_logp"}
        batch = {k: list(fields[v][rows]) for k, v in names.items() if v in fields}
        batch |= {"loss_masks": list(fields["mask"][rows].int())}
        batch["advantages"] = [torch.full((8,), made[i], dtype=torch.float64) for i in rows]
        entropy = fields.get("entropy", torch.zeros(8, 8))[rows]
        return slime.of_log_probs(loss, half, args, batch, list(logp), list(entropy))[0] / count

    close(pulled(fields, call), want)
    args.calculate_per_token_loss = not by_token
    with pytest.raises(LossError, match="--calculate-per-token-loss"):
        call(torch.tensor([0]), fields["logp"][:1])
