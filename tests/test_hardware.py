"""Planning for GPUs that are not here: counts of the real model, parts that add up, memory that was measured."""

import json
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
    "vocab_size": 151936, "tie_word_embeddings": False, "max_position_embeddings": 40960,
}  # fmt: skip
MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "planned_memory.json"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / "config.json"
    place.write_text(json.dumps(QWEN3_8B))
    return str(place)


def planned(config, count=1, memory=80.0, **changes):
    recipe = Recipe.make(model=config, dtype="bfloat16", max_tokens=1024, **changes)
    return plan_hardware(recipe, Gpus(count, memory))


def test_weights_are_counted_on_the_real_model_without_loading_any(config):
    """Qwen3-8B: 8.19 billion, by its model card 8.2."""
    head, body = 151936 * 4096, 36 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128)
    assert planned(config).weights == 2 * head + body + 4096


def test_eight_billion_weights_do_not_fit_one_gpu_and_what_would_is_said(config):
    found = planned(config)
    assert found.chosen is None
    for split in found.splits:
        assert split.parts["weights"] == split.parts["gradients"] == split.parts["reference"] == 4 * found.weights
        assert split.parts["optimizer"] == 8 * found.weights
    instead = dict(found.instead)
    assert instead["lora_rank = 16"] < 80e9 and "4 GPUs of 80 GB" in instead
    text = show_plan(found)
    assert "Nothing of this fits 1 x 80 GB" in text and "lora_rank = 16:" in text
    assert planned(config, lora_rank=16).chosen.total == pytest.approx(instead["lora_rank = 16"], rel=0.2)
    assert planned(config, 4).chosen is not None


def test_sharding_parts_what_is_held_and_costs_traffic(config):
    found = planned(config, 8)
    assert found.chosen.sharded and found.chosen.parts["optimizer"] == found.weights
    assert all(not s.sharded or s.total < 80e9 for s in found.splits)
    assert found.crossing > 7 / 8 * 4 * found.weights  # at the least its gradients
    small = planned(config, 8, 400.0)  # room for a whole copy each: gradients alone cross, twice
    assert not small.chosen.sharded and small.crossing == pytest.approx(2 * 7 / 8 * 4 * found.weights)
    assert sum(small.seconds.values()) < sum(found.seconds.values())


def test_gpus_without_a_prompt_are_counted(config):
    assert planned(config, 64).idle == 56 and "56 of 64 GPUs have no prompt" in show_plan(planned(config, 64))
    assert planned(config, 64, prompts_per_step=64).idle == 0


def test_an_adapter_needs_no_reference_and_hardly_an_optimizer(config):
    found = planned(config, lora_rank=16)
    assert found.trained < 0.01 * found.weights
    parts = found.chosen.parts
    assert parts["reference"] == 0 and parts["optimizer"] == 8 * found.trained
    assert parts["weights"] < 2.3 * found.weights  # 2 bytes but for the embedding and norms


def test_the_plan_of_a_model_that_is_here_is_the_estimate_of_its_run():
    recipe = Recipe.make(model=str(tiny.folder()), dtype="float32", device="cpu")
    learner = Learner(tiny.loaded(), recipe.policy_loss(), recipe, 256)
    split = plan_hardware(recipe, Gpus(1, 80.0)).splits[0]
    assert split.total == pytest.approx(learner.memory.total(False))


@pytest.mark.parametrize("rank", [0, 16])
def test_memory_is_within_15_percent_of_what_was_measured_at_four_sizes(rank, tmp_path):
    rows = [row for row in json.loads(MEASURED.read_text())["rows"] if row["round"]["lora_rank"] == rank]
    assert len(rows) >= (1 if rank else 2)
    for row in rows:
        hidden, inner, layers, heads, key_heads = row["shape"]
        shape = {
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": hidden // heads,
            "vocab_size": 49152, "tie_word_embeddings": True,
        }  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(shape))
        dtype = row["compute"].removeprefix("torch.")
        recipe = Recipe.make(model=str(tmp_path / "config.json"), dtype=dtype, **row["round"])
        found = plan_hardware(recipe, Gpus(1, 80.0), prompt_tokens=row["prompt_tokens"])
        assert found.weights == row["parameters"]
        assert found.splits[0].total / 1e9 == pytest.approx(row["peak_gb"], rel=0.15), row["size"]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("/nowhere/config.json", "there is no model folder or config.json"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "grok-9"}, "does not know"),
        ({**QWEN3_8B, "num_hidden_layers": -1}, "cannot read the configuration|damaged"),
        ("{", "cannot read the configuration|no JSON"),
    ],
)
def test_a_model_that_cannot_be_planned_says_why(tmp_path, model, said):
    if not str(model).startswith("/"):
        (tmp_path / "config.json").write_text(model if isinstance(model, str) else json.dumps(model))
        model = str(tmp_path / "config.json")
    with pytest.raises(ls.PolicyError, match=said):
        planned(model)


@pytest.mark.parametrize("gpus", [Gpus(0, 80.0), Gpus(1, 0.0), Gpus(1, 80.0, link_gb=-1)])
def test_numbers_that_are_no_machine_are_refused(config, gpus):
    with pytest.raises(ls.RecipeError, match="above 0"):
        plan_hardware(Recipe.make(model=config), gpus)


def test_the_command_prints_text_or_json(config, capsys):
    plan_command(settings=Recipe.model_construct(_fields_set={"model"}, model=config), gpus=8)
    assert "split     8 GPUs, sharded" in capsys.readouterr().out
    plan_command(settings=Recipe.model_construct(_fields_set={"model"}, model=config), gpus=8, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] == "8 GPUs, sharded"
    assert as_record(planned(config, 8))["weights"] == found["weights"]
