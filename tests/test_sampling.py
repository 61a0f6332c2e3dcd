"""Sampling: the right distribution, a true record of it, and the same tokens whatever surrounds them."""

import pytest
import torch

import tiny
from lossmith.errors import PolicyError
from lossmith.policy import SamplingSettings, sample, sampling, token_outputs
from lossmith.policy.writing import OpenCompletion
from lossmith.prompts import load_prompts

SHORT = SamplingSettings(max_tokens=12)


@pytest.fixture(scope="module")
def policy():
    return tiny.policy()


def ids(rollouts):
    return [(r.prompt.id, r.sample, r.completion_ids) for r in rollouts]


def draw(policy, prompts=None, n=4, settings=SHORT, seed=0, step=0, **options):
    return sample(policy, prompts or tiny.prompts(), n, settings, seed=seed, step=step, **options)


def ending_policy(*ends):
    """A policy whose next token is close to uniform, so that any id comes up soon; these ids end a completion."""
    model = tiny.llama(initializer_range=0.02, vocab=264)
    model.generation_config.eos_token_id = list(ends)
    return tiny.policy(model)


# -- the distribution -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [SamplingSettings(max_tokens=1), SamplingSettings(0.7, 0.8, 10, max_tokens=1)])
def test_frequencies_are_the_probabilities_of_the_model(policy, settings):
    """5000 first tokens against probabilities enumerated from a plain forward pass (chi-square, fixed seed)."""
    prompt = tiny.prompts("Why?")
    drawn = draw(policy, prompt, n=5000, settings=settings, batch_rows=1000)
    logits = policy.model(input_ids=torch.tensor([policy.encode(prompt[0])])).logits[0, -1].detach().double()
    p = (logits / settings.temperature).softmax(0)
    if settings.top_k:
        p = torch.where(p >= p.topk(settings.top_k).values[-1], p, 0)
        p = p / p.sum()
        top = p.sort(descending=True)
        cut = top.values[top.values.cumsum(0) - top.values < settings.top_p][-1]
        p = torch.where(p >= cut, p, 0)
        p = p / p.sum()
    counts = torch.bincount(torch.tensor([r.completion_ids[0] for r in drawn]), minlength=len(p)).double()
    assert counts[p == 0].sum() == 0
    common = p * 5000 >= 5
    observed, expected = counts[common], p[common] * 5000
    chi2 = float(((observed - expected) ** 2 / expected).sum())
    freedom = int(common.sum())
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def test_stored_log_probs_are_the_learners_to_float32(policy):
    """Temperature, nucleus and top-k at once: what the sampler wrote down is what the learner measures."""
    settings = SamplingSettings(0.6, 0.9, 20, max_tokens=12)
    drawn = draw(policy, n=8, settings=settings)
    with torch.no_grad():
        out = token_outputs(policy, drawn, settings)
    for row, r in enumerate(drawn):
        assert r.behavior_logp.distribution == out.distribution
        torch.testing.assert_close(out.logp[row, : len(r.completion_ids)], r.behavior_logp.values, rtol=1e-5, atol=2e-5)
    ratio = (out.logp[out.mask] - torch.cat([r.behavior_logp.values for r in drawn])).exp()
    assert abs(float(ratio.mean()) - 1) < 1e-5


def test_behavior_log_probs_are_float32_whatever_the_model_computes_in(policy):
    half = tiny.policy()
    half.compute_dtype = torch.bfloat16
    drawn = draw(half)
    assert all(r.behavior_logp.values.dtype == torch.float32 for r in drawn)
    assert drawn[0].behavior_logp.distribution.dtype == "bfloat16"


def test_greedy_takes_the_likeliest_token(policy):
    settings = SamplingSettings(temperature=0, max_tokens=5)
    (rollout,) = draw(policy, tiny.prompts("Why?"), n=1, settings=settings)
    prefix = list(rollout.prompt_ids)
    for token in rollout.completion_ids:
        assert token == int(policy.model(input_ids=torch.tensor([prefix])).logits[0, -1].argmax())
        prefix.append(token)
    assert (rollout.behavior_logp.values == 0).all()


# -- the same whatever surrounds it -----------------------------------------------------------------------------------


def test_batching_order_and_subset_change_nothing(policy):
    whole = draw(policy)
    assert ids(draw(policy, batch_rows=3)) == ids(whole)
    assert sorted(ids(draw(policy, tiny.prompts()[::-1]))) == sorted(ids(whole))
    one = tiny.prompts()[1]
    assert ids(draw(policy, [one])) == [row for row in ids(whole) if row[0] == one.id]


def test_more_samples_leave_the_first_ones_as_they_were(policy):
    assert [row for row in ids(draw(policy, n=8)) if row[1] < 4] == ids(draw(policy, n=4))


def test_seed_step_and_sample_each_matter(policy):
    assert ids(draw(policy)) == ids(draw(policy))
    assert ids(draw(policy)) != ids(draw(policy, seed=1))
    assert ids(draw(policy)) != ids(draw(policy, step=1))
    completions = {row[2] for row in ids(draw(policy, tiny.prompts("Why?"), n=8))}
    assert len(completions) == 8


def test_prompts_that_differ_in_a_column_are_sampled_for_themselves(policy):
    rows = load_prompts([{"prompt": "Why?", "target": word} for word in "ab"], pass_columns=["target"])
    drawn = draw(policy, list(rows))
    assert [r.prompt.columns["target"] for r in drawn] == ["a"] * 4 + ["b"] * 4
    first, second = ({r.completion_ids for r in drawn if r.prompt.columns["target"] == word} for word in "ab")
    assert not first & second
    # a column alone changes nothing
    (one,) = load_prompts([{"prompt": "Why?", "target": "a"}], pass_columns=["target"])
    assert [r.completion_ids for r in draw(policy, [one])] == [
        r.completion_ids for r in draw(policy, tiny.prompts("Why?"))
    ]


def test_the_global_random_state_is_neither_read_nor_moved(policy):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(policy)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert ids(draw(policy)) == ids(first)


def test_decoding_equals_one_by_one_without_a_cache(policy):
    """Each token is the inverse-CDF choice under a full forward pass of exactly the tokens before it."""
    from lossmith.policy.sampling import uniforms

    for r in draw(policy, n=2):
        u = uniforms(0, 0, r.prompt.id, r.sample, SHORT)
        prefix = list(r.prompt_ids)
        for t, token in enumerate(r.completion_ids):
            p = policy.model(input_ids=torch.tensor([prefix])).logits[0, -1].double().softmax(0)
            assert token == int((p.cumsum(0) > u[t]).nonzero()[0])
            prefix.append(token)


# -- endings ----------------------------------------------------------------------------------------------------------


def test_every_end_token_ends_and_stands_inside_the_completion():
    policy = ending_policy(*range(0, 264, 8))
    drawn = draw(policy, n=16, settings=SamplingSettings(max_tokens=10))
    reasons = {r.finish_reason for r in drawn}
    assert reasons == {"eos", "length"}
    for r in drawn:
        *before, last = r.completion_ids
        assert not set(before) & policy.eos_ids
        assert (last in policy.eos_ids) == (r.finish_reason == "eos")
        assert r.truncated == (r.finish_reason == "length")
        assert len(r.completion_ids) == len(r.behavior_logp.values)
    out = token_outputs(policy, drawn, SamplingSettings())
    assert out.mask.sum(1).tolist() == [len(r.completion_ids) for r in drawn]


def test_an_end_token_in_the_prompt_ends_nothing():
    policy = ending_policy(256)
    assert 256 in policy.encode(tiny.prompts("Why?")[0])  # the chat template closes the user's turn with it
    assert all(len(r.completion_ids) > 1 for r in draw(policy, tiny.prompts("Why?"), n=4))


def test_a_stop_string_ends_the_text_but_not_the_record():
    policy = ending_policy(256)
    letters = tuple("abcdefghijklmnopqrstuvwxyz")
    drawn = draw(policy, n=16, settings=SamplingSettings(max_tokens=30, stop=letters))
    stopped = [r for r in drawn if r.finish_reason == "stop"]
    assert len(stopped) > 10
    for r in stopped:
        assert not set(r.completion) & set(letters)
        assert set(policy.decode(r.completion_ids)) & set(letters)
        assert not set(policy.decode(r.completion_ids[:-1])) & set(letters)


PAD, BEGINS, ENDS = 257, 258, 259


def tagged_policy(shown="answer"):
    """As `ending_policy`, with tags that are special tokens, and a padding token."""
    policy = ending_policy(256)
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"], "pad_token": "<pad>"})
    assert policy.tokenizer.convert_tokens_to_ids(["<pad>", "<think>", "</think>"]) == [PAD, BEGINS, ENDS]
    policy.special_tokens = shown
    return policy


@pytest.mark.parametrize("shown", ["answer", "all", "none"])
def test_a_special_token_as_a_stop_string(shown):
    """It is matched as a token, whether or not texts show it; what stands before it stays."""
    policy = tagged_policy(shown)
    free = draw(policy, n=32, settings=SamplingSettings(max_tokens=100))
    drawn = draw(policy, n=32, settings=SamplingSettings(max_tokens=100, stop=("</think>",)))
    stopped = 0
    for r, was in zip(drawn, free, strict=True):
        assert r.completion_ids == was.completion_ids[: len(r.completion_ids)]
        assert (r.finish_reason == "stop") == (ENDS in was.completion_ids)
        assert "</think>" not in r.completion and ("<think>" in r.completion) == (
            shown != "none" and BEGINS in r.completion_ids
        )
        if r.finish_reason == "stop":
            stopped += 1
            assert r.completion_ids.index(ENDS) == len(r.completion_ids) - 1
            assert r.completion == policy.decode(r.completion_ids[:-1], r.prompt_ids)
    assert stopped > 5


def test_a_padding_token_as_a_stop_string():
    policy = tagged_policy()
    drawn = draw(policy, n=32, settings=SamplingSettings(max_tokens=100, stop=("<pad>",)))
    stopped = [r for r in drawn if r.finish_reason == "stop"]
    assert len(stopped) > 5
    for r in stopped:
        assert r.completion_ids[-1] == PAD and r.completion == policy.decode(r.completion_ids, r.prompt_ids)


def test_a_stop_string_that_spans_tokens_special_and_not():
    policy = tagged_policy()
    x, a = policy.tokenizer.convert_tokens_to_ids(["x", "a"])
    settings = SamplingSettings(max_tokens=4, stop=("x</think>a",))
    row = OpenCompletion(tiny.prompts("Why?")[0], (1, 2), 0, sampling.uniforms(0, 0, "k", 0, settings))
    for ids, finish in (([x, ENDS], None), ([x, ENDS, a], "stop"), ([x, a, x, a], "length")):
        row.ids, row.finish = ids, None
        sampling._finish(policy, policy.eos_ids, settings, row)
        assert row.finish == finish


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_sampled_is_refused(policy):
    with pytest.raises(PolicyError, match="copies of one completion"):
        draw(policy, n=2, settings=SamplingSettings(temperature=0))
    with pytest.raises(PolicyError, match=r"memory:1: the prompt's \d+ tokens and max_tokens = 12"):
        draw(policy, list(load_prompts(["x" * 300])))
    for bad in (
        dict(temperature=-1),
        dict(temperature=float("inf")),
        dict(top_p=0),
        dict(top_p=1.5),
        dict(top_k=-1),
        dict(max_tokens=0),
        dict(stop=("",)),
    ):
        with pytest.raises(PolicyError, match=next(iter(bad))):
            SamplingSettings(**bad)


def test_a_model_that_has_diverged_is_not_sampled():
    policy = tiny.policy()
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(torch.nan)
    for settings in (SHORT, SamplingSettings(temperature=0, max_tokens=2)):
        with pytest.raises(PolicyError, match="not finite"):
            draw(policy, n=1, settings=settings)
