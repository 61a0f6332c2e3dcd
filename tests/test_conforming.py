"""Functions of other people, each right or with one planted mistake: assert_conforms says which."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

import lossmith as ls
from lossmith.errors import quiet_traps
from lossmith.losses import CATALOGUE, PolicyLoss, example_loss
from lossmith.proofs import CONVENTIONS, assert_conforms


def clipped(logp, old_logp, advantages, low=0.2, high=0.2, sign=-1.0, detached=False, pessimist=True):
    """PPO's term [N, T], written by hand."""
    ratio = (logp - old_logp).exp()
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    bounded = ratio.clamp(1 - low, 1 + high)
    if detached:
        return sign * torch.minimum(ratio * advantages, bounded * advantages).detach() * logp
    if not pessimist:
        return sign * bounded * advantages
    return sign * torch.minimum(ratio * advantages, bounded * advantages)


def token_mean(term, mask):
    return (term * mask).sum() / mask.sum()


def row_mean(term, mask):
    live = (mask.sum(1) > 0).sum()
    return ((term * mask).sum(1) / mask.sum(1).clamp(min=1)).sum() / live


def function(reduce=token_mean, **changes):
    def my_loss(logp, old_logp, advantages, mask):
        return reduce(clipped(logp, old_logp, advantages, **changes), mask.to(logp.dtype))

    return my_loss


def said(my_loss, loss="grpo@trl", convention="tensors", **more) -> str:
    with pytest.raises(ls.ProofError) as error:
        assert_conforms(my_loss, loss, convention, **more)
    return str(error.value)


@pytest.mark.parametrize("convention", ["tensors", "trl"])
def test_the_formula_of_the_paper_conforms(convention):
    assert_conforms(function(), "grpo@trl", convention)
    assert_conforms(function(row_mean), "grpo(beta=0)", convention)
    assert_conforms(function(high=0.28), "grpo@trl(clip_high=0.28)", convention)


MISTAKES = {
    "the sign": (function(sign=1.0), "the sign. For a token with advantage 1 at ratio 1, dL/dlogp is 1 where"),
    "a sum": (function(lambda x, m: (x * m).sum()), "the number of tokens: a sum where a mean is meant"),
    "padding in the mean": (function(lambda x, m: (x * m).mean()), "divides by all positions (42), where 25 are valid"),
    "no mask": (function(lambda x, m: x.mean()), "divides by all positions (42), where 25 are valid"),
    "half a mask": (function(lambda x, m: x.sum() / m.sum()), "14 masked positions get a gradient, the first at row 1"),
    "another mean": (function(row_mean), "the normalizer. Its numbers are those of aggregate='seq_mean_token_mean'"),
    "a wider clip": (function(high=0.28), "the side of the clip. Its numbers are those of clip_high=0.28"),
    "clips exchanged": (
        function(low=0.3, high=0.1),
        "the side of the clip. Its numbers are those of clip_low=0.3, clip",
    ),
    "no minimum": (
        function(pessimist=False),
        "A > 0, at ratios 0.05 to 0.795 and 361 of 590 tokens with A < 0",
    ),
    "a detached ratio": (function(detached=True), "dL/dlogp differs at 361 of 590 tokens with A > 0, at ratios 1.2"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_named(mistake):
    my_loss, words = MISTAKES[mistake]
    assert words in said(my_loss)


def test_an_empty_row_that_is_counted_is_named():
    def my_loss(logp, old_logp, advantages, mask):
        term = clipped(logp, old_logp, advantages) * mask
        return (term.sum(1) / mask.sum(1).clamp(min=1)).mean()

    assert "it divides by all rows, the empty ones too (6), where 5 have tokens" in said(my_loss, "grpo(beta=0)")


def test_an_empty_row_that_gives_nan_is_named():
    my_loss = function(lambda x, m: ((x * m).sum(1) / m.sum(1)).mean())
    assert "with a row without a token, the value is not finite" in said(my_loss, "grpo(beta=0)")


def test_a_loss_that_reads_masked_positions_is_named():
    def my_loss(logp, old_logp, advantages, mask):
        stray = (logp.detach() * ~mask).sum()
        return token_mean(clipped(logp, old_logp, advantages), mask) + 0.01 * stray

    assert "the mask. Other numbers at masked positions change its value" in said(my_loss)


def test_a_gradient_that_is_stopped_under_the_right_value_is_named():
    def my_loss(logp, old_logp, advantages, mask):
        term = clipped(logp, old_logp, advantages)
        return token_mean(torch.where(advantages < 0, term.detach(), term), mask.double())

    text = said(my_loss)
    assert "the gradient. With single tokens, the value agrees, and dL/dlogp differs at 440 of 1180 tokens" in text
    assert "440 of them get none" in text


def test_the_kl_term_is_compared_and_a_missing_one_is_named():
    def my_loss(logp, old_logp, ref_log_probs, advantages, mask, beta=0.04):
        gone = ref_log_probs - logp
        return row_mean(clipped(logp, old_logp, advantages) + beta * (gone.exp() - 1 - gone), mask)

    assert_conforms(my_loss, "grpo")
    assert "the KL term. Its numbers are those of beta=0.0; grpo has beta=0.04" in said(
        function(row_mean), "grpo"
    ).replace(". grpo has", "; grpo has")


def test_names_of_parameters_that_say_nothing_are_refused():
    def my_loss(a, b, c, d):
        return a.sum()

    assert "parameter 'a' of my_loss" in said(my_loss)


def test_a_number_without_gradient_or_a_tensor_is_refused():
    assert "without a gradient" in said(lambda logp, mask: logp.detach().sum())
    assert "gave a tensor of shape [1180, 1]" in said(lambda logp, mask: logp * 2)


def test_a_convention_that_is_none_and_a_loss_without_tokens_are_refused():
    assert "verl" in said(function(), "grpo@trl", "verll")
    with pytest.raises(ls.LossError, match="dpo is not a loss of given advantages"):
        assert_conforms(function(), "dpo")


# -- one right function and one planted mistake in every trainer's signature ----------------------------------------


def verl(mistake):
    def policy_loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights):
        assert loss_agg_mode == "token-mean"
        count = response_mask.sum() if mistake else config.global_batch_info["batch_num_tokens"]
        return (clipped(log_prob, old_log_prob, advantages) * response_mask).sum() / count, {}

    return policy_loss


def openrlhf(mistake):
    def loss(
        log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1,
        batch_num_tokens=None, global_batch_size=None,
    ):  # fmt: skip
        count = action_mask.sum() if mistake else batch_num_tokens
        return (
            (clipped(log_probs, old_log_probs, advantages) * action_mask).sum() / count * dp_size,
            None,
            None,
            None,
            None,
        )

    return loss


def skyrl(mistake):
    def loss(log_probs, old_log_probs, advantages, config=None, loss_mask=None, rollout_logprobs=None):
        term = clipped(log_probs, old_log_probs, advantages) * loss_mask
        return (term.sum() / loss_mask.sum() if mistake else term.sum()), {}

    return loss


def prime_rl(mistake):
    def loss(inputs):
        rows = (inputs.trainer_logprobs, inputs.inference_logprobs, inputs.advantages)
        kept = clipped(*(x[None] for x in rows))[0][inputs.loss_mask]
        return SimpleNamespace(loss=kept.mean() if mistake else kept.sum(), metrics={})

    return loss


def nemo_rl(mistake):
    def loss(next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        term = clipped(next_token_logprobs, data["prev_logprobs"][:, 1:], data["advantages"][:, 1:])
        return (term * mask).sum() / (mask.sum() if mistake else global_valid_toks), {}

    return loss


def tinker(mistake):
    def loss(data, logprobs):
        total, count = 0.0, 0
        for datum, logp in zip(data, logprobs, strict=True):
            inputs = {name: x.to_torch() for name, x in datum.loss_fn_inputs.items()}
            term = clipped(logp[None], inputs["logprobs"][None], inputs["advantages"][None])
            total, count = total + (term.mean() if mistake else term.sum()), count + len(logp)
        return total / (len(data) if mistake else count), {}

    return loss


HOOKS = {"verl": verl, "openrlhf": openrlhf, "skyrl": skyrl, "prime_rl": prime_rl, "nemo_rl": nemo_rl, "tinker": tinker}


@pytest.mark.parametrize("convention", HOOKS)
def test_a_function_in_a_trainers_signature_conforms_or_is_told_its_normalizer(convention):
    assert_conforms(HOOKS[convention](mistake=False), "grpo@trl", convention)
    assert "the normalizer" in said(HOOKS[convention](mistake=True), "grpo@trl", convention)


def test_every_convention_is_tried():
    assert set(HOOKS) | {"tensors", "trl"} == set(CONVENTIONS)


# -- the catalogue --------------------------------------------------------------------------------------------------


def as_function(loss, factor=1.0):
    """The loss as somebody's function of the tensors that it reads."""
    given = ("old_logp", "ref_logp", "behavior_logp", "entropy", "truncated")
    read = ["logp", "mask", "advantage", *(name for name in given if name in loss.needs | {"old_logp"})]

    def foreign(**fields):
        return factor * loss(ls.Batch(**fields)).loss

    kind = inspect.Parameter.KEYWORD_ONLY
    foreign.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in read])
    return foreign


def comparable(loss):
    with quiet_traps():
        return loss.advantage.acts and not loss.group_filter.acts and not loss.value.active and not loss.kl.in_reward


POLICY_LOSSES = [n for n in CATALOGUE if isinstance(x := example_loss(n), PolicyLoss) and comparable(x)]


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_named_loss_conforms_to_itself_and_not_to_its_negative(name):
    with quiet_traps():
        loss = example_loss(name)
        try:
            assert_conforms(as_function(loss), loss)
        except ls.LossError as error:
            pytest.skip(str(error))
        assert "the sign" in said(as_function(loss, -1.0), loss)
