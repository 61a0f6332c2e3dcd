"""The fast paths give what the plain ones give: the same tokens, log-probabilities and gradients."""

import copy
import dataclasses
import logging

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import tiny
from lossmith.errors import PolicyError
from lossmith.policy import SamplingSettings, distribution_of, sample, token_outputs, trial
from lossmith.policy import attention as attention_module
from lossmith.policy import decode as decode_module
from lossmith.policy import head as head_module
from lossmith.policy.attention import PrefixTree, TreeAttention
from lossmith.policy.forward import hidden_states
from lossmith.policy.head import chosen_log_probs, head_is_plain
from lossmith.policy.memory import available_bytes, keep_freed_memory
from lossmith.policy.packed import packed_weights
from lossmith.policy.trial import sharing_is_exact
from lossmith.policy.writing import inverse_of_cumulative
from lossmith.rollouts import LogProbs, Score

PLAIN = SamplingSettings()
groups = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(0, 7), min_size=1, max_size=4)), min_size=1, max_size=3
)


# -- attention over a tree --------------------------------------------------------------------------------------------


def dense(q, k, v, tree, scale):
    """The same with a dense [L, L] mask and a plain softmax."""
    sees = torch.zeros(len(tree.ids), len(tree.ids), dtype=torch.bool)
    ends = [*(following.start for following in tree.prompts[1:]), len(tree.ids)]
    for prompt, end in zip(tree.prompts, ends, strict=True):
        sees[prompt.start : end, prompt] = True
    for start, count in tree.rows:
        sees[start : start + count, start : start + count] = True
    rep = q.shape[0] // k.shape[0]
    found = q @ k.repeat_interleave(rep, 0).transpose(1, 2) * scale
    return found.masked_fill(~sees.tril(), -torch.inf).softmax(-1) @ v.repeat_interleave(rep, 0)


@given(
    groups,
    st.sampled_from([(4, 4), (6, 2), (3, 1)]),
    st.sampled_from([2, 3, 512]),
    st.sampled_from([1, 200, 1 << 26]),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_attention_over_a_tree_is_masked_attention(shape, heads, block, scores, seed):
    tree = PrefixTree.of([((1,) * p, [(2,) * r for r in rows]) for p, rows in shape], torch.device("cpu"))
    torch.manual_seed(seed)
    q, k, v = (torch.randn(h, len(tree.ids), 5, dtype=torch.float64, requires_grad=True) for h in (*heads, heads[1]))
    before = attention_module._BLOCK, attention_module.SCORES_AT_ONCE
    attention_module._BLOCK, attention_module.SCORES_AT_ONCE = block, scores
    attention_module._layout_of.cache_clear()  # it is cut into blocks
    try:
        ours = TreeAttention(tree).attend(q[None], k[None], v[None], 0.4)[0]
        theirs = dense(q, k, v, tree, 0.4)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        push = torch.randn_like(ours)
        found, expected = (torch.autograd.grad(x, (q, k, v), push) for x in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    finally:
        attention_module._BLOCK, attention_module.SCORES_AT_ONCE = before


def test_positions_in_a_tree_continue_from_the_prompt():
    tree = PrefixTree.of([((1, 2, 3), [(4, 5), (), (6,)]), ((7,), [(8,)])], torch.device("cpu"))
    assert tree.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert tree.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert tree.before == (2, 2, 2, 6) and tree.rows == ((3, 2), (5, 0), (5, 1), (7, 1))


def test_attention_in_bfloat16_is_within_its_rounding():
    tree = PrefixTree.of([((1,) * 40, [(2,) * 30] * 4)], torch.device("cpu"))
    torch.manual_seed(0)
    wide = [torch.randn(1, h, len(tree.ids), 16) for h in (4, 2, 2)]
    exact = TreeAttention(tree).attend(*wide, 0.25)
    ours = TreeAttention(tree).attend(*[x.bfloat16() for x in wide], 0.25)
    assert ours.dtype == torch.bfloat16
    assert float((ours.float() - exact).abs().max()) < 0.03  # eight bits of mantissa on numbers up to about 3


def test_a_model_that_attends_in_its_own_way_is_found_out_and_said_once(caplog):
    """ALiBi, written out in the model's own code: it never asks transformers which attention to use."""
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=264, hidden_size=32, n_layer=2, n_head=4, eos_token_id=256, initializer_range=0.3)
    torch.manual_seed(0)
    policy = tiny.policy(BloomForCausalLM(config).eval())
    trial._warn_once.cache_clear()  # another test may have met this model in this process
    with caplog.at_level(logging.WARNING, "lossmith"):
        assert not sharing_is_exact(policy)
        assert not sharing_is_exact(policy)
    assert sum("once per completion" in r.message for r in caplog.records) == 1
    first = sample(policy, tiny.prompts(), 2, SamplingSettings(max_tokens=4), seed=0, step=0)
    assert [len(r.completion_ids) <= 4 for r in first] == [True] * len(first)


def test_the_trial_is_not_misled_by_bfloat16():
    policy = tiny.policy()
    policy.compute_dtype = torch.bfloat16
    with policy.computing():
        assert sharing_is_exact(policy)


# -- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 7, 33, 512])
@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_log_probabilities_of_chosen_tokens_are_those_of_the_whole_softmax(temperature, chunk, kept, monkeypatch):
    monkeypatch.setattr(head_module, "STORED_BYTES", kept)
    policy = tiny.policy(dtype=torch.float64)
    torch.manual_seed(0)
    count, weight = 70, policy.model.get_output_embeddings().weight
    hidden = torch.randn(count, weight.shape[1], dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, len(weight), (count,))
    ours = chosen_log_probs(policy, hidden, ids, SamplingSettings(temperature=temperature), chunk)
    theirs = torch.log_softmax(hidden @ weight.T / temperature, -1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    push = torch.randn(count, dtype=torch.float64)
    found, expected = (torch.autograd.grad(x, (hidden, weight), push) for x in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_a_head_with_a_bias(kept, monkeypatch):
    monkeypatch.setattr(head_module, "_ROWS", 4)
    monkeypatch.setattr(head_module, "STORED_BYTES", kept)
    policy = tiny.policy(dtype=torch.float64)
    head = torch.nn.Linear(32, 264, dtype=torch.float64)
    policy.model.lm_head = head
    hidden, ids = torch.randn(11, 32, dtype=torch.float64, requires_grad=True), torch.arange(11)
    ours = chosen_log_probs(policy, hidden, ids, PLAIN, 8)
    theirs = torch.log_softmax(head(hidden), -1)[torch.arange(11), ids]
    push = torch.arange(11, dtype=torch.float64)
    wanted = (hidden, head.weight, head.bias)
    found, expected = (torch.autograd.grad(x, wanted, push) for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_the_same_to_the_bit_with_and_without_gradient(compute):
    """So that a reference equal to the policy is at distance 0."""
    policy = tiny.policy()
    policy.compute_dtype = compute
    hidden, ids = 3 * torch.randn(90, 32), torch.randint(0, 264, (90,))
    graded = chosen_log_probs(policy, hidden, ids, PLAIN, 40)
    with torch.no_grad():
        assert torch.equal(graded, chosen_log_probs(policy, hidden, ids, PLAIN, 40))


def test_filters_and_odd_heads_take_the_general_way():
    policy = tiny.policy()
    assert head_is_plain(policy, PLAIN)
    assert not head_is_plain(policy, SamplingSettings(top_p=0.9))
    policy.model.config.final_logit_softcapping = 30.0
    assert not head_is_plain(policy, PLAIN)


def test_bfloat16_log_probabilities_are_near_those_of_float32():
    model, rollouts = tiny.llama(), tiny.rollouts()
    exact = token_outputs(tiny.policy(model), rollouts, PLAIN).logp
    policy = tiny.policy(model)
    policy.compute_dtype = torch.bfloat16
    narrow = token_outputs(policy, rollouts, PLAIN).logp
    assert narrow.dtype == torch.float32
    gap = (narrow - exact).detach().abs()
    assert 0 < float(gap.max()) < 0.2 and float(gap.mean()) < 0.03


def test_a_float32_head_is_the_plain_product_of_the_hidden_states_and_closer_to_float32():
    model, rollouts = tiny.llama(), tiny.rollouts()
    exact = token_outputs(tiny.policy(model), rollouts, PLAIN).logp
    rounded, policy = tiny.policy(model), tiny.policy(model)
    rounded.compute_dtype = policy.compute_dtype = torch.bfloat16
    policy.float32_head = True
    assert policy.frozen().float32_head
    with policy.computing():
        hidden = hidden_states(policy, rollouts, "right")
    ids = torch.tensor([i for r in rollouts for i in r.completion_ids])
    plain = (hidden.float() @ model.lm_head.weight.T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    found = chosen_log_probs(policy, hidden, ids, PLAIN, 16)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    slopes = [torch.autograd.grad(x.sum(), model.lm_head.weight, retain_graph=True)[0] for x in (found, plain)]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-4)
    gaps = [(token_outputs(p, rollouts, PLAIN).logp - exact).detach().abs().mean() for p in (policy, rounded)]
    assert 0 < float(gaps[0]) < float(gaps[1])


def test_sampler_and_learner_agree_better_with_a_float32_head():
    def gap(float32_head):
        policy = tiny.policy(tiny.llama())
        policy.compute_dtype, policy.float32_head = torch.bfloat16, float32_head
        rollouts = sample(policy, tiny.prompts(), 4, SamplingSettings(max_tokens=12), seed=0, step=0)
        outputs = token_outputs(policy, rollouts, SamplingSettings(max_tokens=12))
        drawn = torch.cat([r.behavior_logp.values for r in rollouts])
        return float((outputs.logp[outputs.mask] - drawn).detach().abs().mean())

    assert gap(True) < 0.9 * gap(False)


# -- compiled layers, packed and bfloat16 weights ----------------------------------------------------------------------


def accumulated(compile_, dtype=torch.float64, compute=None, model=None):
    """Gradients of one round's loss, by the learner; weights must be the policy's own afterwards."""
    from lossmith.training import Learner, Recipe

    policy = tiny.policy(copy.deepcopy(model), dtype=dtype)
    policy.compute_dtype = compute or dtype
    recipe = Recipe.make(loss="grpo(beta=0)", compile=compile_, micro_batch_tokens=20, temperature=1.0)
    learner = Learner(policy, recipe.policy_loss(), recipe)
    assert learner.compiled is compile_
    own = policy.parameters()
    rollouts = [
        dataclasses.replace(
            r,
            score=Score(value=float(i % 3)),
            behavior_logp=LogProbs(
                torch.full((len(r.completion_ids),), torch.nan), distribution_of(policy, recipe.sampling)
            ),
        )
        for i, r in enumerate(tiny.rollouts())
    ]
    batch = learner.make_batch(rollouts)
    learner.accumulate(rollouts, batch, learner.loss.credit(batch))
    assert all(a is b and a.dtype == dtype for a, b in zip(own, policy.parameters(), strict=True))
    return [p.grad for p in own]


@pytest.mark.slow  # the compiler's first use takes 12 s of a core
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_layers_give_the_same_gradients():
    for eager, compiled in zip(accumulated(False), accumulated(True), strict=True):
        torch.testing.assert_close(eager, compiled, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_compiled_layers_with_narrowed_weights_are_as_near_as_autocast():
    model = tiny.llama()
    exact, eager, compiled = (
        torch.cat([g.flatten() for g in accumulated(c, torch.float32, kind, model)])
        for c, kind in ((False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16))
    )
    gaps = [float((x - exact).norm() / exact.norm()) for x in (eager, compiled)]
    assert 0 < gaps[1] < 1.2 * gaps[0] and gaps[0] < 0.1


def test_a_narrow_reference_says_the_same_to_the_bit_from_less_memory():
    policy = tiny.policy(tiny.llama())
    policy.compute_dtype = torch.bfloat16
    assert sharing_is_exact(policy)
    wide, narrow = (policy.frozen(narrow=n) for n in (False, True))
    rollouts, settings = tiny.rollouts(), SamplingSettings(max_tokens=9)
    with torch.no_grad():
        found = [token_outputs(p, rollouts, settings).logp for p in (policy, wide, narrow)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    held = [sum(p.nbytes for p in each.model.parameters()) for each in (wide, narrow)]
    layers = sum(m.weight.nbytes for m in wide.model.model.layers.modules() if type(m) is torch.nn.Linear)
    assert held[0] - held[1] == layers / 2
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())


def test_without_a_compiler_compile_is_refused_before_the_model_is_loaded(monkeypatch):
    from lossmith.training import Recipe
    from lossmith.training.prepare import plan

    monkeypatch.setenv("PATH", "")
    with pytest.raises(PolicyError, match=r"C\+\+ compiler"):
        plan(Recipe.make(compile=True, model="no such model"))


def test_compile_is_said_to_have_no_effect_where_layers_are_run_again(caplog):
    from lossmith.training import Learner, Recipe

    recipe = Recipe.make(compile=True, memory_gb=0.001)
    assert not Learner(tiny.policy(), recipe.policy_loss(), recipe).compiled
    assert "no effect" in caplog.text


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="weights are packed where the processor knows bfloat16"
)
def test_packed_weights_multiply_as_bfloat16_does_and_leave_nothing_behind():
    policy = tiny.policy()
    policy.compute_dtype = torch.bfloat16
    linear = [m for m in policy.model.modules() if type(m) is torch.nn.Linear]
    torch.manual_seed(0)
    for rows in (1, 7, 64, 130):
        for m in linear:
            x = torch.randn(rows, m.in_features)
            expected = torch.nn.functional.linear(x.bfloat16(), m.weight.bfloat16())
            with packed_weights(policy):
                found = m(x)
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    assert not any("forward" in m.__dict__ for m in linear)


def test_only_bfloat16_is_packed():
    policy = tiny.policy()
    with packed_weights(policy):
        assert not any("forward" in m.__dict__ for m in policy.model.modules())


# -- sampling ---------------------------------------------------------------------------------------------------------


def drawn(policy, sampling, n=4, rows=128, prompts=None):
    found = sample(policy, prompts or tiny.prompts(), n, sampling, seed=3, step=1, batch_rows=rows)
    return [(r.prompt.id, r.sample, r.completion_ids, r.finish_reason) for r in found]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9, "temperature": 0.7}, {"top_k": 20}])
def test_the_fast_path_draws_the_tokens_of_the_plain_one(model, sampling):
    fast, plain = (tiny.policy(getattr(tiny, model)()) for _ in range(2))
    plain.shares = False
    chosen = SamplingSettings(max_tokens=24, **sampling)
    assert drawn(fast, chosen) == drawn(plain, chosen)
    assert fast.shares


@pytest.mark.parametrize("rows", [1, 3, 5, 8])
def test_rows_that_end_make_room_and_nothing_changes(rows):
    """An end token that is likely: completions of all lengths, so that rows leave at different times."""
    policy = tiny.policy()
    with torch.no_grad():  # every third token or so ends the completion
        policy.model.generation_config.eos_token_id = list(range(0, 264, 3))
    chosen = SamplingSettings(max_tokens=12)
    whole = drawn(policy, chosen, n=5)
    assert len({len(ids) for _, _, ids, _ in whole}) > 2
    assert drawn(policy, chosen, n=5, rows=rows) == whole


def test_behavior_log_probabilities_after_a_refill_are_the_learners():
    policy = tiny.policy(dtype=torch.float64)
    policy.model.generation_config.eos_token_id = list(range(0, 264, 3))
    rollouts = sample(policy, tiny.prompts(), 4, SamplingSettings(max_tokens=12), seed=0, step=0, batch_rows=6)
    out = token_outputs(policy, rollouts, SamplingSettings(max_tokens=12))
    for row, r in enumerate(rollouts):
        expected = out.logp[row, : len(r.completion_ids)].float()
        torch.testing.assert_close(r.behavior_logp.values, expected, rtol=0, atol=1e-6)


def test_groups_are_handed_over_as_they_end():
    policy = tiny.policy()
    policy.model.generation_config.eos_token_id = list(range(0, 264, 3))
    seen = []
    chosen = SamplingSettings(max_tokens=12)
    whole = sample(policy, tiny.prompts(), 4, chosen, seed=0, step=0, batch_rows=4, on_group=seen.append)
    assert len(seen) == len(tiny.prompts())
    by_prompt = {group[0].prompt.id: group for group in seen}
    assert [r for prompt in tiny.prompts() for r in by_prompt[prompt.id]] == whole
    assert all([r.sample for r in group] == [0, 1, 2, 3] for group in seen)


def test_a_scorer_that_waits_is_asked_while_others_are_written(tmp_path):
    """One question a group instead of one a step, and the same run."""
    import lossmith as ls
    from lossmith.rollouts import Score

    class Remote:
        name, waits, asked = "remote", True, 0

        def score(self, rollouts):
            self.asked += 1
            return [Score(value=len(r.completion_ids) / 10 + r.sample) for r in rollouts]

    found = []
    for waits in (True, False):
        scorer = Remote()
        scorer.waits = waits
        run = ls.train(
            model=str(tiny.folder()), device="cpu", dtype="float32", prompts=[f"Prompt {i}?" for i in range(8)],
            held_out=2, scorer=scorer, steps=2, prompts_per_step=3, samples_per_prompt=2, max_tokens=6,
            runs=str(tmp_path), name=f"waits-{waits}", quiet=True,
        )  # fmt: skip
        found.append((run.summary["held_out"], run.policy.checksum()))
        # two evaluations of two prompts, the first texts once more at the end, two steps of three
        assert scorer.asked == 2 * (2 if waits else 1) + 1 + 2 * (3 if waits else 1)
    assert found[0] == found[1]


@given(st.integers(1, 700), st.integers(0, 1000), st.floats(0, 1, exclude_max=True))
@settings(max_examples=80, deadline=None)
def test_a_token_is_where_the_cumulative_sum_passes_u(size, seed, u):
    torch.manual_seed(seed)
    weights = torch.rand(3, size)
    weights[torch.rand(3, size) < 0.5] = 0
    weights[:, seed % size] = 0.25  # never all zero
    ids, total = inverse_of_cumulative(weights, torch.full((3,), u, dtype=torch.float64))
    exact = weights.double().cumsum(1)
    torch.testing.assert_close(total, exact[:, -1], rtol=1e-6, atol=0)
    for row, i in enumerate(ids.tolist()):
        assert weights[row, i] > 0
        before = 0.0 if i == 0 else float(exact[row, i - 1])
        # sums of stretches are float32: the border may be off by their rounding, and no more
        slack = 1e-6 * float(exact[row, -1])
        assert before - slack <= u * float(exact[row, -1]) <= float(exact[row, i]) + slack


# -- memory -----------------------------------------------------------------------------------------------------------


def test_freed_memory_is_kept_on_linux_alone(monkeypatch):
    keep_freed_memory.cache_clear()
    assert isinstance(keep_freed_memory(), bool)
    keep_freed_memory.cache_clear()
    monkeypatch.setattr("sys.platform", "darwin")
    assert keep_freed_memory() is False
    keep_freed_memory.cache_clear()


def test_available_memory_is_known_here():
    found = available_bytes()
    assert found is None or 10**8 < found < 10**14


def test_layers_that_are_run_again_give_the_same_gradients():
    rollouts = tiny.rollouts()
    found = []
    for recompute in (False, True):
        policy = tiny.policy(dtype=torch.float64)
        out = token_outputs(policy, rollouts, PLAIN, activation_checkpointing=recompute)
        out.logp.sum().backward()
        found.append([out.logp.detach(), *(p.grad for p in policy.parameters())])
    for once, again in zip(*found, strict=True):
        torch.testing.assert_close(once, again, rtol=0, atol=1e-12)


def test_layers_that_are_run_again_keep_less():
    kept = []
    for recompute in (False, True):
        policy, sizes = tiny.policy(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):
            token_outputs(policy, tiny.rollouts(), PLAIN, activation_checkpointing=recompute)
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]


def test_prompts_that_are_encoded_one_after_the_other_give_the_same_tokens(monkeypatch):
    """A forward pass over long prompts is kept small."""
    policy = tiny.policy()
    settings = SamplingSettings(max_tokens=6)
    expected = sample(policy, tiny.prompts(), 3, settings, seed=0, step=0)
    monkeypatch.setattr(decode_module, "ENCODED_AT_ONCE", 20)
    for shares in (True, False):
        policy.shares = shares
        found = sample(policy, tiny.prompts(), 3, settings, seed=0, step=0)
        assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]
