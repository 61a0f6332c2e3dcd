"""Tiny random models with a real tokenizer, for tests: seconds matter, the model's wisdom does not."""

import functools
import tempfile
from pathlib import Path

import tokenizers
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lossmith.policy import Policy, load_policy
from lossmith.prompts import load_prompts
from lossmith.rollouts import Distribution, LogProbs, Rollout
from lossmith.training.loop import those_scored, with_advantages

torch.set_num_threads(1)  # tiny tensors gain nothing from a second thread

END = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '" + END + "' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def tokenizer(chat=True):
    """One token a byte, pad = end token (the case that breaks masks made from ids)."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def llama(vocab=None, seed=0, **changes):
    settings = dict(
        vocab_size=vocab or 264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=256, pad_token_id=256, bos_token_id=None,
        initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def served():
    """Heads of 32: what vLLM's attention on a CPU takes."""
    return llama(hidden_size=128, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)


def gpt2(seed=0):
    """Learned positions: padding that shifts positions shows."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=256, eos_token_id=256, bos_token_id=256,
        initializer_range=0.3, resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def policy(model=None, dtype=torch.float32, chat=True):
    model = (model or llama()).to(dtype)
    if dtype == torch.float64:
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.forward = functools.partial(_rms_norm, module)
    return Policy(model, tokenizer(chat), dtype)


def _rms_norm(module, x):
    """transformers computes RMSNorm in float32 whatever the model's type, which hides agreement below 1e-8."""
    return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


@functools.cache
def folder(kind="llama"):
    """A model folder on disk, as a user would have one."""
    path = Path(tempfile.mkdtemp()) / kind
    {"llama": llama, "gpt2": gpt2, "served": served}[kind]().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def loaded():
    return load_policy(folder(), dtype="float32", device="cpu")


def prompts(*texts):
    return list(load_prompts(list(texts or ("Why?", "A longer question, with more bytes in it", "hm"))))


def update(learner, rollouts, step=0):
    """(the update, the rollouts with their advantages) of a round, as the loop makes it."""
    scored = those_scored(rollouts, step)
    batch = learner.make_batch(scored)
    credit = learner.credit(batch)
    return learner.update(scored, batch, credit, step), with_advantages(rollouts, credit)


def rollouts(*, prompt_count=3, samples=3, seed=0, dtype=torch.float64, measure=None):
    """Random completions of ragged lengths, groups of unequal prompts; log-probabilities are made up."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for p, prompt in enumerate(prompts()[:prompt_count]):
        prompt_ids = tuple(torch.randint(0, 256, (3 + 4 * p,), generator=generator).tolist())
        for k in range(samples):
            length = int(torch.randint(1, 9, (), generator=generator))
            ids = tuple(torch.randint(0, 256, (length - 1,), generator=generator).tolist())
            ids += (256,) if k % 2 == 0 else (7,)
            logp = LogProbs(-torch.rand(length, generator=generator, dtype=dtype) - 0.5, measure or Distribution(0))
            reason = "eos" if k % 2 == 0 else "length"
            made.append(Rollout(prompt, k, prompt_ids, ids, "text", logp, reason))
    return made
