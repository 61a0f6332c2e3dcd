"""What the hooks of other trainers carry: what is said of each loss, held against what comes through."""

from pathlib import Path

import pytest

import lossmith.losses as L
from batches import EVERY, quiet_loss
from hook_simulation import through
from lossmith.adapters.hooks import HOOKS
from lossmith.adapters.table import hooks_page
from lossmith.errors import LossError

# At the defaults so small a batch has no token whose covariance lies between the bounds.
DROPS = {name: {"cov_low": 0.0, "cov_high": 50.0, "fraction": 0.2} for name in ("clip_cov", "clip_cov@verl")}
# Refused though it comes through: where the old policy is the sampler, its second moment is 0 and nothing is dropped.
NEEDLESS = {("prime_rl", "m2po")}


def comes_through(hook, loss, **how):
    try:
        return through(hook, loss, **how) < 1e-12
    except LossError:
        return False


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_carries_the_losses_it_says_it_carries_and_no_others(name):
    hook = HOOKS[name]
    wrong = {}
    for entry in EVERY:
        loss = quiet_loss(entry, **DROPS.get(entry, {}))
        for at_once in (False, True) if hook.at_once and not loss.separable else (False,):
            reasons = hook.reasons(loss, at_once=at_once)
            if comes_through(hook, loss, at_once=at_once) != (not reasons) and (name, entry) not in NEEDLESS:
                wrong[entry] = reasons or "said to come through"
    assert not wrong


def test_what_does_not_fit_is_refused_by_name_with_the_hooks_that_carry_it():
    with pytest.raises(LossError) as refused:
        HOOKS["verl"].check(quiet_loss("ppo"))
    assert "ppo does not fit verl (register_adv_est and register_policy_loss)" in str(refused.value)
    assert "its credit half reads Batch.old_value and Batch.value, which the hook is not given" in str(refused.value)
    with pytest.raises(LossError, match=r"dpo does not fit trl.*gradient_accumulation_steps=1.*tinker"):
        HOOKS["trl"].check(quiet_loss("dpo"))
    HOOKS["trl"].check(quiet_loss("dpo"), at_once=True)
    with pytest.raises(LossError, match=r"build the loss with beta=0; the trainer adds that term itself: actor.use_kl"):
        HOOKS["verl"].check(quiet_loss("grpo"))
    with pytest.raises(LossError, match="trust='quadratic' is not homogeneous in A"):
        HOOKS["skyrl"].check(quiet_loss("dro"))
    with pytest.raises(LossError, match=r"it needs max_length=\.\.\., which has no agreed default"):
        HOOKS["trl"].check(L.get_loss("dr_grpo"))


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_whose_gradient_is_of_logp_alone_refuses_entropy_and_critics(name):
    hook = HOOKS[name]
    for changes in ({"entropy_coef": 0.1}, {"beta": 0.1, "kl_estimator": "full"}):
        reasons = hook.reasons(quiet_loss("dapo", group_filter="none", **changes))
        field = "entropy" if "entropy_coef" in changes else "full_kl"
        assert any(f"Batch.{field}" in reason for reason in reasons) == (field not in hook.objective)
    assert hook.logp_only == (not hook.objective & {"entropy", "full_kl", "value"})


def test_the_page_of_hooks_is_up_to_date():
    """Make it anew with: python -m lossmith.adapters.table > docs/hooks.md"""
    page = Path(__file__).parents[1] / "docs" / "hooks.md"
    assert page.read_text(encoding="utf-8") == hooks_page()
