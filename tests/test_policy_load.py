"""Loading, saving and copying a policy."""

import contextlib
import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, MambaConfig, MambaForCausalLM

import tiny
from lossmith.errors import PolicyError
from lossmith.policy import SamplingSettings, check_model, embedded_model, load_policy, sample
from lossmith.prompts import load_prompts


def test_a_saved_policy_loads_with_plain_transformers(tmp_path):
    policy = tiny.loaded()
    policy.save(tmp_path / "policy")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(again(input_ids=ids).logits, policy.model(input_ids=ids).logits, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template == tiny.TEMPLATE
    assert again.dtype == torch.float32


def test_a_frozen_copy_stays_when_the_policy_moves():
    policy = tiny.loaded()
    reference, before = policy.frozen(), policy.checksum()
    assert reference.checksum() == before
    assert not any(p.requires_grad for p in reference.model.parameters())
    with torch.no_grad():
        policy.parameters()[0].add_(1)
    assert reference.checksum() == before != policy.checksum()


def test_dropout_is_off_so_that_the_ratio_is_one():
    policy = load_policy(tiny.folder("gpt2"), dtype="float32", device="cpu")
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(policy.model(input_ids=ids).logits, policy.model(input_ids=ids).logits)
    assert policy.model.config.resid_pdrop > 0


def test_the_chat_template_is_applied_once():
    policy = tiny.loaded()
    chat = load_prompts([{"prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]}, "hi"])
    decoded = [policy.tokenizer.decode(policy.encode(p)) for p in chat]
    assert decoded == ["system:be<|end|>user:hi<|end|>assistant:", "user:hi<|end|>assistant:"]


def test_chat_prompts_need_a_chat_template():
    policy = tiny.policy(chat=False)
    (prompt,) = load_prompts([{"prompt": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(PolicyError, match="no chat template"):
        policy.encode(prompt)
    assert policy.decode(policy.encode(tiny.prompts("plain")[0])) == "plain"


def broken(tmp_path, *remove, add=()):
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder(), folder)
    for name in remove:
        (folder / name).unlink()
    for name in add:
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        (("config.json",), (), "no config.json"),
        (("model.safetensors",), (), "no weights to load: no \\*.safetensors"),
        (("model.safetensors",), ("pytorch_model.bin",), "only pickled ones"),
        (("tokenizer.json", "tokenizer_config.json"), (), "no tokenizer"),
    ],
)
def test_an_incomplete_folder_is_refused_before_weights_are_read(tmp_path, remove, add, message):
    with pytest.raises(PolicyError, match=message):
        check_model(broken(tmp_path, *remove, add=add))


def test_a_missing_folder_names_its_neighbors(tmp_path):
    (tmp_path / "smol-model").mkdir()
    with pytest.raises(PolicyError, match="Did you mean 'smol-model'"):
        check_model(tmp_path / "smol-mode")
    check_model("owner/name")  # a hub name is tried when it is loaded


def test_a_head_that_is_not_understood_is_refused(tmp_path):
    """Logits scaled in a way the configuration does not say must not go unnoticed."""
    folder = broken(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logit_scale": 0.5}))
    with pytest.raises(PolicyError, match="head applied to its hidden states differs from its own logits"):
        load_policy(folder, dtype="float32")


@pytest.mark.parametrize("gone", ["model.layers.1.mlp", "lm_head"])
def test_missing_weights_are_not_made_up(tmp_path, gone):
    """transformers fills them with random numbers and a line in its log: another policy at every start."""
    folder = tmp_path / "model"
    tiny.llama(tie_word_embeddings=False).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith(gone)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PolicyError, match=f"lacks {len(weights) - len(kept)} weights .*{gone}"):
        load_policy(folder, dtype="float32")


def test_a_damaged_weight_file_is_named(tmp_path):
    folder = broken(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(PolicyError, match="cannot load the model"):
        load_policy(folder)


def test_a_recurrent_model_is_refused(tmp_path):
    config = MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=256)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match="completions cannot be continued from cached keys and values"):
        load_policy(tmp_path)


def test_a_folder_under_the_home_directory(tmp_path, monkeypatch):
    broken(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_policy("~/model", dtype="float32").version == 0


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(PolicyError, match="cannot compute on device 'cdua'"):
        load_policy(tiny.folder(), device="cdua")


def test_a_generation_configuration_that_transformers_refuses_does_not_lose_the_policy(tmp_path):
    """Published models hold such; save_pretrained refuses them, which here would be at the end of a run."""
    policy = tiny.loaded()
    policy.model.generation_config = GenerationConfig(do_sample=False, eos_token_id=[256, 3])
    policy.model.generation_config.temperature = 0.6
    policy.save(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [256, 3]


def test_the_mark_that_ends_a_turn_ends_a_completion():
    """A base model's configuration may list its end of text alone, while its template closes turns otherwise."""
    policy = tiny.policy()
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert policy.eos_ids == {256}  # a mark that the template does not write is an ordinary token
    policy.tokenizer.chat_template = "{{ messages[0]['content'] }}<|im_end|>"
    assert policy.eos_ids == {256, policy.tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_prompts_that_cannot_be_encoded_are_named():
    policy = tiny.policy()
    for template, message in (("{{ raise_exception('no system role') }}", "no system role"), ("", "no token")):
        policy.tokenizer.chat_template = template or "{# nothing #}"
        with pytest.raises(PolicyError, match=f"memory:1: .*{message}"):
            policy.encode(tiny.prompts("hi")[0])
    other = tiny.policy(tiny.llama(vocab=100, eos_token_id=99, pad_token_id=99))
    with pytest.raises(PolicyError, match=r"memory:1: .*belongs to another model"):
        other.encode(tiny.prompts("hi")[0])


def test_a_download_that_fails_is_explained_even_where_standard_error_is_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LOSSMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, stderr="no route to the index")
    )
    with (
        contextlib.redirect_stderr(io.StringIO()),
        pytest.raises(PolicyError, match=r"no route to the index\. Try again, or name another"),
    ):
        embedded_model()
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.slow
def test_the_embedded_model_chats_sensibly():
    policy = load_policy("default")
    assert (embedded_model() / "model.safetensors").stat().st_size > 400_000_000
    prompts = list(load_prompts(["What is the capital of France?", "Explain the water cycle to a 10-year-old."]))
    settings = SamplingSettings(temperature=0, max_tokens=60)
    answers = [r.completion for r in sample(policy, prompts, 1, settings, seed=0, step=0)]
    assert "Paris" in answers[0]
    assert "water" in answers[1] and not answers[1].startswith(" ")
    assert policy.decode(policy.encode(prompts[0])).count("You are a helpful AI assistant") == 1
