"""Planning for GPUs that are not here: counts of the real model, parts that add up, memory that was measured."""

import json
from functools import cache
from pathlib import Path

import pytest

import lossmith as ls
import tiny
from lossmith.cli.plan import plan as plan_command
from lossmith.report.run.planned import as_record, show_plan
from lossmith.training import Learner, Recipe
from lossmith.training.hardware import Gpus, plan_hardware

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "tie_word_embeddings": False, "max_position_embeddings": 40960, "torch_dtype": "bfloat16",
}  # fmt: skip
LINEAR = 36 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 12288)  # weights of the layers' products
MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "planned_memory.json"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / "config.json"
    place.write_text(json.dumps(QWEN3_8B))
    return str(place)


@cache
def planned(config, count=1, memory=80.0, **changes):
    recipe = Recipe.make(model=config, dtype="bfloat16", max_tokens=1024, **changes)
    return plan_hardware(recipe, Gpus(count, memory))


def test_weights_are_counted_on_the_real_model_without_loading_any(config):
    """Qwen3-8B: 8.19 billion, by its model card 8.2."""
    head, body = 151936 * 4096, LINEAR + 36 * (2 * 4096 + 2 * 128)
    assert planned(config).weights == 2 * head + body + 4096


def test_eight_billion_weights_do_not_fit_one_gpu_and_what_would_is_said(config):
    found = planned(config)
    assert found.chosen is None
    for split in found.splits:
        held = split.memory.held
        assert held["weights"] == held["gradients"] == 4 * found.weights
        assert held["reference"] == 4 * found.weights - 2 * LINEAR  # of its layers, in the type of the products
        assert held["optimizer"] == 8 * found.weights
    instead = dict(found.instead)
    assert instead["lora_rank = 16, quantize = 'nf4'"] < instead["lora_rank = 16"] < 80e9
    assert "8 GPUs of 80 GB" in instead
    assert all(least < 80e9 for name, least in found.instead[:-1]) and found.instead[-1][0].startswith("GPUs of ")
    text = show_plan(found)
    assert "Nothing of this fits 1 x 80 GB" in text and "lora_rank = 16:" in text
    assert planned(config, lora_rank=16).chosen.total == pytest.approx(instead["lora_rank = 16"], rel=0.2)
    assert planned(config, 4).chosen is None and planned(config, 8).chosen is not None


def test_parts_are_an_eighth_of_what_is_held_and_cost_traffic(config):
    found = planned(config, 8)
    assert found.chosen.sharded and found.chosen.memory.held["optimizer"] == found.weights
    assert found.chosen.memory.held["weights"] == 4 * found.weights / 8
    whole, _, dealt, _ = (split.memory for split in found.splits)
    # while completions are written each GPU has all weights in float32, beside its eighth; bfloat16 copies either way
    assert dealt.sampling - whole.sampling == 4 * found.weights
    assert whole.sampling > 2 * (found.weights - 151936 * 4096)  # of all but the embedding, which is looked up
    ends, layer = 2 * 151936 * 4096, (found.weights - 2 * 151936 * 4096) / 36
    assert dealt.activations - whole.activations == pytest.approx(8 * (ends + 2 * layer))
    assert whole.opening == dealt.opening == pytest.approx(8 * found.weights, rel=0.02)  # it and its reference
    # 2048 completion tokens and 256 of a prompt in passes of 1024: gathered thrice for a gradient, once for none
    passes = -(-(256 + 8 * 1023) // 1024)
    assert found.crossing == 7 / 8 * 4 * found.weights * (4 * passes + 1)
    small = planned(config, 8, 400.0)  # room for a whole copy each: gradients go to rank 0, weights come from it
    assert not small.chosen.sharded and small.crossing == 7 / 8 * 2 * 4 * found.weights
    assert sum(small.seconds.values()) < sum(found.seconds.values())


def test_activations_of_a_layer_are_counted_by_hand(config):
    """Per token, in bytes: Qwen3-8B in bfloat16. Layers that are run again keep their input, in float32."""
    q, kv, inner = 4096, 2 * 1024, 12288
    once = (2 * 4 + 5 * 2) * 4096 + 3 * 2 * q + 2 * kv + 2 * 2 * inner + 4 * (q + kv // 2)
    # A layer that is run again is its module's own, which keeps what is normalized, the activation, the product too.
    whole = once + 2 * 4 * 4096 + 2 * 2 * inner + 4 * (q + kv // 2)
    split, again = planned(config).splits
    tokens = 1280  # a quarter above 1024, where one prompt has more completions
    assert split.update - again.update == pytest.approx(tokens * (36 * once - whole - 36 * 4 * 4096))


def test_larger_micro_batches_are_named_where_weights_cross_once_for_each(config):
    found = planned(config, 8)
    assert found.faster is not None
    size, seconds = found.faster
    again = planned(config, 8, micro_batch_tokens=size)
    assert sum(again.seconds.values()) == pytest.approx(seconds) and again.crossing < found.crossing
    assert f"better    micro_batch_tokens = {size}:" in show_plan(found)
    assert planned(config, lora_rank=16).faster is None  # one GPU: nothing crosses


def test_a_model_of_other_layers_is_not_dealt_out(config, monkeypatch):
    monkeypatch.setattr("lossmith.policy.sharded.model_layers", lambda model: [])
    found = planned(config, 8, 900.0)
    assert not any(split.sharded for split in found.splits)
    assert "! shard = true: Qwen3ForCausalLM is not made of layers" in show_plan(found)
    with pytest.raises(ls.PolicyError, match="not made of layers"):
        planned(config, 8, shard=True)


def test_weights_in_bfloat16_are_ten_bytes_each_but_for_vectors_and_of_one_process(config):
    held = planned(config, memory=141.0, weights="bfloat16").splits[0].memory.held
    body = 36 * (2 * 4096 + 2 * 128) + 4096  # norms, which stay in float32
    matrices = planned(config).weights - body
    assert held["weights"] == held["gradients"] == held["reference"] == 2 * matrices + 4 * body
    assert held["optimizer"] == 6 * matrices + 8 * body
    assert "weights = 'bfloat16'" in dict(planned(config, memory=141.0).instead)
    with pytest.raises(ls.RecipeError, match="of one process"):
        planned(config, 8, weights="bfloat16")


def test_a_teacher_stands_whole_on_every_gpu_and_the_policy_as_its_own_is_none(config):
    loss = {"loss": "gkd", "teacher": config}
    for split in planned(config, 8, 400.0, **loss).splits:
        assert split.memory.held["teacher"] == 4 * planned(config).weights
    told = planned(config, **loss | {"teacher": "self", "teacher_column": "hint"})
    assert told.splits[0].memory.held["teacher"] == 0 and "teacher" not in show_plan(told)


def test_gpus_without_a_prompt_are_counted(config):
    found = show_plan(planned(config, 64))
    assert planned(config, 64).idle == 56 and "56 of 64 GPUs have no prompt" in found
    assert "torchrun --nnodes 8 --nproc-per-node 8" in found and found.count("--shard") == 1
    assert planned(config, 64, prompts_per_step=64).idle == 0


def norms():
    """Weights of Qwen3-8B that scale: two norms and those of queries and keys in each layer, and the last."""
    return 36 * (2 * 4096 + 2 * 128) + 4096


def test_an_adapter_needs_no_reference_and_hardly_an_optimizer(config):
    found = planned(config, lora_rank=16)
    assert found.trained < 0.01 * found.weights
    held = found.chosen.memory.held
    assert held["reference"] == 0 and held["optimizer"] == 8 * found.trained
    assert found.trained == 16 * 36 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288))  # A and B of each
    assert held["weights"] == 2 * (found.weights - found.trained) + 2 * (151936 * 4096 + norms()) + 4 * found.trained
    assert found.splits[0].memory.opening > 4 * (found.weights - found.trained)  # read in float32, and then narrowed
    assert not any(split.sharded for split in planned(config, 8, lora_rank=16).splits)


@pytest.mark.slow
def test_beside_an_adapter_the_layers_may_be_in_4_bits_and_nothing_else_is(config):
    """NF4 with double quantization, by hand: half a byte, a byte of scale for 64, 4 bytes for 256 of those."""
    found, whole = planned(config, lora_rank=16, quantize="nf4"), planned(config, lora_rank=16)
    assert (found.weights, found.trained) == (whole.weights, whole.trained)
    layers = LINEAR * (1 / 2 + 1 / 64 + 4 / 64 / 256)
    ends = 6 * 151936 * 4096  # the embedding in float32, the head in the type of the products
    expected = layers + ends + 4 * norms() + 4 * found.trained
    held = found.chosen.memory.held
    assert held["weights"] == expected and held["reference"] == 0
    assert found.chosen.memory.opening < whole.chosen.memory.opening / 3
    assert found.seconds["sample"] <= whole.seconds["sample"]
    assert "quantize = 'nf4'" in dict(planned(config, memory=26.0, lora_rank=16).instead)


def test_the_plan_of_a_model_that_is_here_is_the_estimate_of_its_run():
    recipe = Recipe.make(model=str(tiny.folder()), dtype="float32", device="cpu")
    learner = Learner(tiny.loaded(), recipe.policy_loss(), recipe, 200)
    split = plan_hardware(recipe, Gpus(1, 80.0), prompt_tokens=200).splits[0]
    assert split.total == pytest.approx(learner.memory.total(False))


@pytest.mark.parametrize(("rank", "quantize"), [(0, None), (16, None), (16, "nf4")])
def test_memory_is_within_15_percent_of_what_was_measured_at_four_sizes(rank, quantize, tmp_path):
    rows = json.loads(MEASURED.read_text())["rows"]
    rows = [row for row in rows if (row["round"]["lora_rank"], row["round"].get("quantize")) == (rank, quantize)]
    assert len(rows) == 4
    for row in rows:
        hidden, inner, layers, heads, key_heads = row["shape"]
        shape = {
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": hidden // heads,
            "vocab_size": 49152, "tie_word_embeddings": True,
        }  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(shape))
        recipe = Recipe.make(model=str(tmp_path / "config.json"), **row["round"])
        found = plan_hardware(recipe, Gpus(1, 80.0), prompt_tokens=row["prompt_tokens"])
        assert found.weights == row["parameters"]
        total = found.splits[0].total
        assert total / 1e9 == pytest.approx(row["peak_gb"], rel=0.15), row["size"]
        assert total / 1e9 == pytest.approx(row["planned_gb"])


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("/nowhere/config.json", "there is no model folder or config.json"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "grok-9"}, "does not know"),
        ({**QWEN3_8B, "num_hidden_layers": -1}, "cannot read the configuration|damaged"),
        ("{", "config.json' is no JSON"),
        ("[1]", "holds a JSON list where an object is meant"),
        ({**QWEN3_8B, "quantization_config": {"quant_method": "awq"}}, "are quantized"),
    ],
)
def test_a_model_that_cannot_be_planned_says_why(tmp_path, model, said):
    if not str(model).startswith("/"):
        (tmp_path / "config.json").write_text(model if isinstance(model, str) else json.dumps(model))
        model = str(tmp_path / "config.json")
    with pytest.raises(ls.PolicyError, match=said):
        planned(model)


def test_a_hub_name_without_a_network_says_what_to_give(monkeypatch):
    def offline(name, **options):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", offline)
    with pytest.raises(ls.PolicyError, match=r"'Qwen/Qwen3-8B': We couldn't .* give its config\.json"):
        planned("Qwen/Qwen3-8B")


def test_an_adapter_folder_names_the_base_to_plan_for(tmp_path, config):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(Path(config).parent)}))
    with pytest.raises(ls.PolicyError, match="is a LoRA adapter: plan for its base model"):
        planned(str(tmp_path))


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        (Gpus(0, 80.0), "gpus = 0:"),
        (Gpus(1, 0.0), "gpu_memory = 0:"),
        (Gpus(1, float("nan")), "gpu_memory = nan:"),
        (Gpus(1, 80.0, link_gb=-1), "link = -1:"),
    ],
)
def test_numbers_that_are_no_machine_are_refused(config, gpus, said):
    with pytest.raises(ls.RecipeError, match=said + " give a number above 0"):
        plan_hardware(Recipe.make(model=config), gpus)


@pytest.mark.parametrize("tokens", [0, 40960])
def test_a_prompt_beyond_the_context_is_refused(config, tokens):
    with pytest.raises(ls.RecipeError, match=f"prompt_tokens = {tokens}.* room for 1 to 40912"):
        plan_hardware(Recipe.make(model=config), Gpus(1, 80.0), prompt_tokens=tokens)


def test_another_engine_is_not_planned(config):
    with pytest.raises(ls.RecipeError, match="engine = 'trl'"):
        plan_hardware(Recipe.make(model=config, engine="trl"), Gpus(1, 80.0))


def test_the_command_prints_text_or_json(config, capsys):
    plan_command(settings=Recipe.model_construct(_fields_set={"model"}, model=config), gpus=8)
    text = capsys.readouterr().out
    assert "split     8 GPUs, in parts" in text and "start     lossmith train ... --ranks 8 --shard" in text
    plan_command(settings=Recipe.model_construct(_fields_set={"model"}, model=config), gpus=8, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] == "8 GPUs, in parts" and len(found["splits"]) == 4
    assert as_record(planned(config, 8))["weights"] == found["weights"]
