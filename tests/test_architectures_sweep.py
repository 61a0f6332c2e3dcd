"""Every kind of causal language model: sampled and trained exactly as transformers computes it, or refused in a word.

What is sampled (through caches, with refills) and what the learner measures, its gradients included, are held against
the plain forward pass of transformers: one row, no cache, no padding. The whole list takes minutes and is marked slow.
"""

import warnings

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import architectures
import tiny
from lossmith.errors import PolicyError
from lossmith.policy import SamplingSettings, load_policy, sample, token_outputs

SETTINGS = SamplingSettings(max_tokens=9)  # longer than the windows
SHARED = ["apertus", "diffllama", "hyperclovax", "nanochat", "opt", "phi3"]
PLAIN = ["bloom", "deepseek_v3", "falcon", "gemma2", "gemma3_text", "gpt_neo", "gpt_oss", "mistral"]
REFUSED = ["bamba", "bert", "llama4", "mamba", "qwen3_next", "xlnet"]


def saved(name, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers has to say about its own defaults
        architectures.build(name).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def load(folder):
    return load_policy(folder, device="cpu", dtype="float32")


def plain(model, rollouts):
    """([M] log-probabilities of all response tokens, the spread of the logits)."""
    found, spread = [], 0.0
    for r in rollouts:
        ids = torch.tensor([r.prompt_ids + r.completion_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(r.prompt_ids) - 1 : -1].float()
        found.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(r.completion_ids)[:, None])[:, 0])
        spread = max(spread, float(logits.detach().std()))
    return torch.cat(found), spread


def gradient(policy, logp, weights):
    policy.model.zero_grad()
    (logp * weights).sum().backward()
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in policy.parameters()])


def check_exact(folder, again):
    """Sampled, measured, trained a step, saved and loaded; returns whether prompts were shared."""
    policy = load(folder)
    rollouts = sample(policy, tiny.prompts(), 3, SETTINGS, seed=0, step=0, batch_rows=4)
    sampled = torch.cat([r.behavior_logp.values for r in rollouts])
    with torch.no_grad():
        expected, spread = plain(policy.model, rollouts)
    out = token_outputs(policy, rollouts, SETTINGS)
    measured = out.logp[out.mask]
    room = 1e-3 * spread + 1e-4
    assert float((sampled - expected).abs().max()) < room, "what is sampled is not what the model says"
    assert float((measured.detach() - expected).abs().max()) < room, "what is measured is not what the model says"
    weights = torch.linspace(-1, 1, len(expected))
    ours = gradient(policy, measured, weights)
    theirs = gradient(policy, plain(policy.model, rollouts)[0], weights)
    assert float((ours - theirs).norm()) < 2e-3 * float(theirs.norm()), "gradients differ"
    before = policy.checksum()
    torch.optim.AdamW(policy.parameters(), lr=1e-3).step()
    assert policy.checksum() != before
    policy.save(again)
    assert load(again).checksum() == policy.checksum()
    return policy.shares


def check_refused(folder):
    with pytest.raises(PolicyError) as refusal:
        load(folder)
    assert len(str(refusal.value)) < 600 and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", SHARED + PLAIN)
def test_a_model_is_sampled_and_trained_as_transformers_computes_it(tmp_path, name):
    assert check_exact(saved(name, tmp_path / "model"), tmp_path / "again") == (name in SHARED)


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_is_refused_in_a_word(tmp_path, name):
    check_refused(saved(name, tmp_path / "model"))


@pytest.mark.slow
def test_every_causal_language_model_of_transformers_is_exact_or_refused(tmp_path, capsys):
    exact, refused, wrong = [], [], []
    for name in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - architectures.UNBUILT):
        folder = saved(name, tmp_path / name)
        try:
            load(folder)
        except PolicyError:
            check_refused(folder)
            refused.append(name)
            continue
        try:
            check_exact(folder, tmp_path / f"{name}-again")
            exact.append(name)
        except Exception as fault:
            wrong.append(f"{name}: {type(fault).__name__}: {fault}")
    with capsys.disabled():
        print(f"\n{len(exact)} exact, {len(refused)} refused, {len(architectures.UNBUILT)} not built")
    assert wrong == []
    assert len(exact) >= 100
