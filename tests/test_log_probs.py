"""Log-probabilities: the same number in every layout, equal to a plain forward pass of the model."""

import copy
import itertools
import math

import pytest
import torch

import tiny
from lossmith.errors import PolicyError
from lossmith.policy import SamplingSettings, log_softmax_under, token_outputs
from lossmith.policy import head as head_module
from lossmith.policy.forward import hidden_states
from lossmith.policy.trial import sharing_is_exact
from lossmith.rollouts import Distribution, LogProbs

LAYOUTS = ("shared", "right", "left", "packed", "single")
MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2}
PLAIN = SamplingSettings()


def plain_forward(policy, rollout):
    """The reference: one row, no padding, no cache, log_softmax and gather."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    logps = policy.model(input_ids=ids).logits[0].log_softmax(-1)
    start = len(rollout.prompt_ids)
    return torch.stack([logps[start + t - 1, token] for t, token in enumerate(rollout.completion_ids)])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_to_a_plain_forward_pass(kind, layout):
    policy = tiny.policy(MODELS[kind](), torch.float64)
    rollouts = tiny.rollouts()
    out = token_outputs(policy, rollouts, PLAIN, layout=layout, chunk=5)
    for row, rollout in enumerate(rollouts):
        expected = plain_forward(policy, rollout)
        torch.testing.assert_close(out.logp[row, : len(expected)], expected, rtol=0, atol=1e-10)
        assert out.mask[row].sum() == len(expected)
        assert (out.logp[row, len(expected) :] == 0).all()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_a_plain_forward_pass(kind, layout):
    """Of an arbitrary function of the log-probabilities and the entropy, for every parameter."""
    model = MODELS[kind]()
    rollouts = tiny.rollouts()
    coefficients = [torch.randn(len(r.completion_ids), dtype=torch.float64) for r in rollouts]

    plain = tiny.policy(copy.deepcopy(model), torch.float64)
    total = sum((c * plain_forward(plain, r)).sum() for c, r in zip(coefficients, rollouts, strict=True))
    total.backward()
    ours = tiny.policy(copy.deepcopy(model), torch.float64)
    out = token_outputs(ours, rollouts, PLAIN, layout=layout, chunk=4)
    weights = torch.zeros_like(out.logp)
    for row, c in enumerate(coefficients):
        weights[row, : len(c)] = c
    (weights * out.logp).sum().backward()
    for (name, a), (_, b) in zip(plain.model.named_parameters(), ours.model.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-10, msg=name)


def test_the_backward_pass_adds_up_in_one_order():
    """A prompt's last state is read once for each completion. Indexing would add their gradients in whatever order the
    threads come (torch's index_put_ on a CPU), and two runs of one recipe would part in the last bits."""
    policy = tiny.policy()
    states = hidden_states(policy, tiny.rollouts(dtype=torch.float32), "shared")
    seen, stack = set(), [states.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    names = {type(node).__name__ for node in seen}
    assert "IndexSelectBackward0" in names and "IndexBackward0" not in names


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_order_and_any_subset(layout):
    policy, rollouts = tiny.policy(dtype=torch.float64), tiny.rollouts()
    whole = token_outputs(policy, rollouts, PLAIN, layout=layout).logp
    for rows in ([4, 0, 8, 2], [7], list(reversed(range(9)))):
        part = token_outputs(policy, [rollouts[i] for i in rows], PLAIN, layout=layout).logp
        torch.testing.assert_close(part, whole[rows][:, : part.shape[1]], rtol=0, atol=1e-10)


def test_entropy_and_full_kl_are_those_of_the_whole_vocabulary():
    policy, rollouts = tiny.policy(dtype=torch.float64), tiny.rollouts(prompt_count=1)
    reference = tiny.policy(tiny.llama(seed=1), torch.float64)
    out = token_outputs(policy, rollouts, PLAIN, want=frozenset({"entropy", "full_kl"}), reference=reference)
    for row, r in enumerate(rollouts):
        ids = torch.tensor([r.prompt_ids + r.completion_ids])
        at = slice(len(r.prompt_ids) - 1, -1)
        mine, theirs = (p.model(input_ids=ids).logits[0, at].log_softmax(-1) for p in (policy, reference))
        t = len(r.completion_ids)
        torch.testing.assert_close(out.entropy[row, :t], torch.distributions.Categorical(logits=mine).entropy())
        kl = torch.nn.functional.kl_div(theirs, mine, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(out.full_kl[row, :t], kl)


def test_the_critic_reads_the_state_before_each_token_and_leaves_the_policy_alone():
    policy, rollouts = tiny.policy(dtype=torch.float64), tiny.rollouts(prompt_count=1)
    policy.add_value_head()
    torch.nn.init.normal_(policy.value_head.weight)
    out = token_outputs(policy, rollouts, PLAIN, want=frozenset({"value"}))
    for row, r in enumerate(rollouts):
        ids = torch.tensor([r.prompt_ids + r.completion_ids])
        hidden = policy.model.base_model(input_ids=ids).last_hidden_state[0]
        expected = policy.value_head(hidden[len(r.prompt_ids) - 1 : -1])[:, 0]
        torch.testing.assert_close(out.value[row, : len(expected)], expected)
    out.value.sum().backward()
    assert policy.value_head.weight.grad is not None
    assert all(p.grad is None for p in policy.model.parameters())


@pytest.mark.parametrize("settings", [SamplingSettings(0.6, 0.9, 20), SamplingSettings(2.0), SamplingSettings(top_k=3)])
def test_the_measure_against_enumeration_by_hand(settings):
    """Temperature, then top-k, then top-p, then renormalize; written out with sorted lists."""
    logits = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    ours = log_softmax_under(logits, settings).exp()
    for row in range(4):
        p = (logits[row] / settings.temperature).softmax(0)
        order = sorted(range(30), key=lambda v: -float(p[v]))
        kept = order[: settings.top_k] if settings.top_k else order
        mass, nucleus = 0.0, []
        for v in kept:
            if mass < settings.top_p:
                nucleus.append(v)
            mass += float(p[v] / p[kept].sum())
        expected = torch.zeros(30, dtype=torch.float64)
        expected[nucleus] = p[nucleus] / p[nucleus].sum()
        torch.testing.assert_close(ours[row], expected, rtol=1e-12, atol=1e-14)


def test_a_sampled_token_outside_the_support_keeps_a_finite_log_probability():
    logits = torch.tensor([[5.0, 1.0, 0.0, -3.0]])
    assert log_softmax_under(logits, SamplingSettings(top_k=2))[0, 3] == -torch.inf
    assert torch.isfinite(log_softmax_under(logits, SamplingSettings(top_k=2), keep=torch.tensor([3]))[0, 3])


def test_log_probs_measured_differently_cannot_be_subtracted():
    values = torch.zeros(3)
    a, b = LogProbs(values, Distribution(0, temperature=1.0)), LogProbs(values + 1, Distribution(4, temperature=1.0))
    assert ((b - a) == 1).all()  # versions may differ: that is what a ratio is
    for other in (
        Distribution(0, temperature=0.7),
        Distribution(0, top_p=0.9),
        Distribution(0, top_k=5),
        Distribution(0, dtype="bfloat16"),
    ):
        with pytest.raises(PolicyError, match="different distributions and cannot be subtracted"):
            a - LogProbs(values, other)


@pytest.mark.parametrize("room", [0, 1 << 16, 1 << 20])
def test_of_vocabulary_sized_tensors_no_more_than_the_room_for_slopes_outlives_its_chunk(room, monkeypatch):
    """What autograd keeps for the backward pass: slopes in the logits where they fit the room, else none."""
    monkeypatch.setattr(head_module, "STORED_BYTES", room)
    policy, rollouts = tiny.policy(), tiny.rollouts(samples=6)
    kept = []

    def note(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = token_outputs(policy, rollouts, PLAIN, chunk=4)
    vocabulary = policy.model.config.vocab_size
    table = (vocabulary, policy.model.config.hidden_size)
    slopes = [shape for shape in kept if vocabulary in shape and shape not in (table, table[::-1])]
    size = 4 * vocabulary * sum(len(r.completion_ids) for r in rollouts)
    assert len(slopes) == (size <= room)
    assert sum(4 * math.prod(shape) for shape in slopes) <= room
    out.logp.sum().backward()


def test_models_whose_prompt_cannot_be_shared_are_known():
    assert sharing_is_exact(tiny.policy(tiny.llama())) and sharing_is_exact(tiny.policy(tiny.gpt2()))
    from transformers import MistralConfig, MistralForCausalLM

    sliding = MistralConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, max_position_embeddings=256, initializer_range=0.3,
        eos_token_id=256, pad_token_id=256, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(sliding).eval()
    policy, rollouts = tiny.policy(model, torch.float64), tiny.rollouts()
    assert not sharing_is_exact(policy)
    out = token_outputs(policy, rollouts, PLAIN)
    for row, r in enumerate(rollouts):
        expected = plain_forward(policy, r)
        torch.testing.assert_close(out.logp[row, : len(expected)], expected, rtol=0, atol=1e-10)


def test_what_cannot_be_measured_is_refused():
    policy, rollouts = tiny.policy(), tiny.rollouts()
    cases = [
        (dict(want=frozenset({"full_kl"})), PLAIN, "needs a reference"),
        (dict(want=frozenset({"value"})), PLAIN, "value head"),
        (dict(want=frozenset({"full_kl"}), reference=policy), SamplingSettings(top_p=0.5), "infinite"),
        (dict(), SamplingSettings(temperature=0), "temperature"),
    ]
    for options, settings, message in cases:
        with pytest.raises(PolicyError, match=message):
            token_outputs(policy, rollouts, settings, **options)


def test_layout_pairs_agree_on_a_step_of_training():
    """A sanity check of the whole matrix: every pair of layouts, after the weights have moved."""
    policy = tiny.policy(dtype=torch.float64)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(3)) * 0.1)
    outs = {layout: token_outputs(policy, tiny.rollouts(), PLAIN, layout=layout).logp for layout in LAYOUTS}
    for a, b in itertools.combinations(LAYOUTS, 2):
        torch.testing.assert_close(outs[a], outs[b], rtol=0, atol=1e-10)


def test_packed_rows_stay_apart_in_models_that_do_not_look_at_positions_for_it():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=264, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, init_std=0.3,
        max_position_embeddings=256, word_embed_proj_dim=16, eos_token_id=256, bos_token_id=256, pad_token_id=256,
    )  # fmt: skip
    policy, rollouts = tiny.policy(OPTForCausalLM(config), torch.float64), tiny.rollouts()
    outs = [token_outputs(policy, rollouts, PLAIN, layout=layout).logp for layout in LAYOUTS]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=1e-10)


def test_dropout_stays_off_even_if_the_model_was_put_in_training_mode():
    policy = tiny.policy(tiny.gpt2())
    policy.model.train()
    a, b = (token_outputs(policy, tiny.rollouts(), PLAIN).logp for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])  # nucleus of most of the vocabulary, and of a handful
@pytest.mark.parametrize("settings", [SamplingSettings(top_p=0.9), SamplingSettings(0.8, 0.95, 1500)])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(settings, spread):
    logits = torch.randn(6, 5000, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * spread
    logits[0] *= 5  # rows that need the whole vocabulary beside rows that do not
    values, order = (logits / settings.temperature).sort(descending=True)
    if settings.top_k:
        values[:, settings.top_k :] = -torch.inf
    p = values.softmax(-1)
    kept = (p.cumsum(-1) - p < settings.top_p) & (p > 0)
    expected = torch.zeros_like(kept).scatter(1, order, kept)
    assert torch.equal(log_softmax_under(logits, settings) > -torch.inf, expected)


def test_equally_likely_tokens_stay_or_go_together():
    """The support is a function of the values, not of the order in which a sort happens to leave them."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    for settings in (SamplingSettings(top_k=2), SamplingSettings(top_p=0.6)):
        support = log_softmax_under(logits, settings) > -torch.inf
        assert support.tolist() == [[False, True, True, True, True, False]]
