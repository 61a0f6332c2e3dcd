"""Folders that are no model, or not one that can be used here: one sentence each, whichever door they come through."""

import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification, OPTConfig, OPTForCausalLM, Phi3Config, Phi3ForCausalLM

import tiny
from lossmith.errors import LossmithError, PolicyError, ScorerError
from lossmith.policy import Policy, SamplingSettings, check_model, load_policy, sample
from lossmith.reward_model.model import load_scoring
from lossmith.scorers.reward_model import RewardModel

DOORS = {
    "policy": (lambda folder: load_policy(folder, device="cpu", dtype="float32"), PolicyError),
    "body": (lambda folder: load_scoring(str(folder), 0, device="cpu"), PolicyError),
    "reward model": (lambda folder: RewardModel(folder, device="cpu"), ScorerError),
}


def folder_for(door, path):
    if door == "reward model":
        config = tiny.llama().config
        config.num_labels = 1
        LlamaForSequenceClassification(config).save_pretrained(path)
        tiny.tokenizer().save_pretrained(path)
        return path
    return shutil.copytree(tiny.folder(), path)


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(door, folder):
    enter, error = DOORS[door]
    with pytest.raises(error) as found:
        enter(folder)
    said = str(found.value)
    assert len(said) < 600 and "\n" not in said
    return said


every_door = pytest.mark.parametrize("door", DOORS)


@every_door
@pytest.mark.parametrize(
    "method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4", "compressed-tensors", "hqq", "of next year", None]
)
def test_quantized_weights_are_refused_whatever_the_method(tmp_path, door, method):
    folder = folder_for(door, tmp_path / "m")
    change(folder / "config.json", quantization_config={"quant_method": method} if method else {})
    said = refusal(door, folder)
    assert "quantized" in said and "give the unquantized model" in said
    assert method is None or method in said


@pytest.mark.parametrize("door", ["body", "reward model"])
def test_an_adapter_alone_names_its_base_model_and_how_to_merge(tmp_path, door):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "me/base"})
    )
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    tiny.tokenizer().save_pretrained(tmp_path)
    said = refusal(door, tmp_path)
    assert "is a LoRA adapter" in said and "'me/base'" in said and "merge_and_unload" in said


@every_door
@pytest.mark.parametrize("left", [("adapter_config.json",), ("adapter_model.safetensors",)])
def test_an_adapter_beside_weights_is_never_ignored(tmp_path, door, left):
    folder = folder_for(door, tmp_path / "m")
    for name in left:
        (folder / name).write_text("{}")
    said = refusal(door, folder)
    assert f"remove {left[0]}" in said


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "a t5 "),
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True}, "bart"),
        ({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {}}, "vision"),
        ({"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}, "qwen2_5_vl"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "fills gaps"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "a classifier"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "a vit "),
    ],
)
def test_a_model_of_another_kind_is_named(tmp_path, config, said):
    folder = folder_for("policy", tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(config))
    found = refusal("policy", folder)
    assert said in found and "no causal language model" in found and len(found) < 300


def test_a_language_model_is_no_reward_model(tmp_path):
    assert "`lossmith reward train`" in refusal("reward model", folder_for("policy", tmp_path / "m"))


@every_door
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", "", "is no JSON"),
        ("config.json", "{", "is no JSON"),
        ("config.json", "[]", "a JSON list where an object is meant"),
        ("config.json", "[" * 9000, "nested too deeply"),
        ("config.json", '{"model_type": "grok-9", "auto_map": {}}', "does not know"),
        ("config.json", '{"model_type": "mine", "auto_map": {"AutoModel": "x.Y"}}', "such code is never run"),
        ("tokenizer.json", "{", "cannot load the model"),
        ("model.safetensors", "", "cannot load the model"),
    ],
)
def test_a_damaged_file_is_said(tmp_path, door, name, content, said):
    folder = folder_for(door, tmp_path / "m")
    (folder / name).write_text(content)
    assert said in refusal(door, folder)


@every_door
def test_shards_that_are_missing_are_named(tmp_path, door):
    folder = folder_for(door, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "model-00002-of-00002.safetensors" in refusal(door, folder)


@every_door
def test_devices_and_broken_links_are_not_read(tmp_path, door):
    folder = folder_for(door, tmp_path / "m")
    for name, target in (("config.json", "/dev/zero"), ("model.safetensors", "nowhere")):
        (folder / name).unlink()
        os.symlink(target, folder / name)
        assert "no ordinary file" in refusal(door, folder)
        (folder / name).unlink()
        (folder / name).write_text("{}")


@every_door
@pytest.mark.parametrize(("bad", "said"), [(torch.nan, "NaN"), (torch.inf, "infinite"), (-torch.inf, "infinite")])
def test_weights_that_are_not_finite_are_refused(tmp_path, door, bad, said):
    folder = folder_for(door, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = bad
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = refusal(door, folder)
    assert said in found and "norm.weight" in found


def test_weights_of_zero_are_weights(tmp_path):
    folder = folder_for("policy", tmp_path / "m")
    weights = {k: torch.zeros_like(v) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    policy = load_policy(folder, device="cpu", dtype="float32")
    (one,) = sample(policy, tiny.prompts("hi"), 1, SamplingSettings(max_tokens=3), seed=0, step=0)
    expected = torch.full((len(one.completion_ids),), -torch.tensor(264.0).log())
    torch.testing.assert_close(one.behavior_logp.values, expected)  # uniform


@pytest.mark.parametrize("ids", ["x", [256, "x"], 1.5, True])
def test_an_end_token_that_is_no_id_is_refused(tmp_path, ids):
    for name in ("config.json", "generation_config.json"):
        folder = folder_for("policy", tmp_path / name)
        change(folder / name, eos_token_id=ids)
        assert "eos_token_id" in refusal("policy", folder)


def test_a_vocabulary_of_four_tokens_is_tried_as_any_other(tmp_path):
    tiny.llama(vocab=4, eos_token_id=3, pad_token_id=3).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    policy = load_policy(tmp_path, device="cpu", dtype="float32")
    with pytest.raises(PolicyError, match="belongs to another model"):
        policy.encode(tiny.prompts("hi")[0])


def test_a_checksum_is_of_every_weight_whatever_its_type_and_shape():
    policy = tiny.policy()
    buffers = {
        "alone": torch.tensor(0.5), "none": torch.zeros(0, 3), "narrow": torch.ones(3, dtype=torch.bfloat16),
        "quarter": torch.ones(3).to(torch.float8_e4m3fn), "flag": torch.tensor(True), "count": torch.tensor(7),
    }  # fmt: skip
    for name, value in buffers.items():
        policy.model.register_buffer(name, value)
    seen = {policy.checksum()}
    for name in ("alone", "narrow", "quarter", "flag", "count"):
        changed = torch.zeros(buffers[name].shape).to(buffers[name].dtype)
        setattr(policy.model, name, changed)
        seen.add(policy.checksum())
    assert len(seen) == 6


def test_the_context_ends_where_positions_do():
    opt = OPTConfig(
        vocab_size=264, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=20,
    )  # fmt: skip
    model = OPTForCausalLM(opt)
    assert tiny.policy(model).context_length == 20
    model.config.max_position_embeddings = 500  # says more than its table of positions holds
    assert tiny.policy(model).context_length == 22


def test_the_context_ends_where_rotary_frequencies_change_for_the_whole_text():
    """What was cached before would be of other frequencies: off by nats, and without a word."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    config = Phi3Config(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=256, max_position_embeddings=200,
        original_max_position_embeddings=40,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40, **factors},
    )  # fmt: skip
    assert Policy(Phi3ForCausalLM(config), tiny.tokenizer(), torch.float32).context_length == 40


def mutated(rng, path):
    """The bytes of a file with something wrong."""
    data = bytearray(path.read_bytes())
    way = rng.randrange(4 if path.suffix == ".json" else 3)
    if way == 0:
        return bytes(data[: rng.randrange(len(data))])
    if way == 1:
        data[rng.randrange(min(len(data), 2000))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if way == 2:
        return rng.choice([b"", b"[]", b"null", b"\xff\xfe", b"{}"])
    value = json.loads(data)
    odd = [None, "x", -1, 0, 1.5, [], {}, ["x"], True, 2**70, "../x"]
    value[rng.choice(list(value))] = rng.choice(odd)
    return json.dumps(value).encode()


def check_mutations(tmp_path, seeds):
    names = ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json", "model.safetensors"]
    refused = 0
    for seed in seeds:
        rng = random.Random(seed)
        folder = folder_for("policy", tmp_path / str(seed))
        name = rng.choice(names)
        (folder / name).write_bytes(mutated(rng, folder / name))
        try:
            policy = load_policy(folder, device="cpu", dtype="float32")
            sample(policy, tiny.prompts("hi"), 1, SamplingSettings(max_tokens=2), seed=0, step=0)
        except LossmithError as error:
            refused += 1
            assert len(str(error)) < 600 and "\n" not in str(error)
        shutil.rmtree(folder)
    return refused


@pytest.mark.filterwarnings("ignore")
def test_damaged_folders_work_or_are_refused(tmp_path):
    assert check_mutations(tmp_path, range(16)) >= 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_damaged_folders_work_or_are_refused(tmp_path):
    assert check_mutations(tmp_path, range(100, 500)) >= 100


def test_a_folder_that_is_a_file_and_one_without_a_home_are_said(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(PolicyError, match="is a file"):
        check_model(tmp_path / "f")
    with pytest.raises(PolicyError, match="no home folder"):
        check_model("~nobody-of-this-name/model")


def test_more_layers_than_any_model_has_are_refused_before_they_are_built(tmp_path):
    folder = folder_for("policy", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2**70}))
    with pytest.raises(PolicyError, match=r"num_hidden_layers = .* which no model has"):
        check_model(folder)
