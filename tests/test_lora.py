"""LoRA adapters: what peft's own model computes, trained alone, saved in its format, and gone on with to the bit."""

import copy
import json
import re
import shutil
import tomllib

import pytest
import tomli_w
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lossmith as ls
import tiny
from lossmith.chat import open_sides
from lossmith.files import cache_folder
from lossmith.policy import SamplingSettings, adapter_base, load_policy, sample, token_outputs
from lossmith.policy.adapter import add_adapter
from lossmith.report.run.closing import what_next
from lossmith.report.run.opening import about_adapter
from lossmith.training import Learner, Recipe
from lossmith.training.card import _base_model
from lossmith.training.checkpoint import load_checkpoint, save_checkpoint
from shell import lossmith

peft = pytest.importorskip("peft")

ALL = ("all-linear",)
PLAIN = SamplingSettings()


def settings(rank=4, alpha=8.0, targets=ALL, seed=0):
    return ls.LoraSettings(rank, alpha, targets, seed)


def adapted(kind=tiny.llama, dtype=torch.float64, learned=True, **lora):
    """A tiny policy with an adapter that has moved, as after some updates."""
    policy = tiny.policy(kind(), dtype)
    policy.adapter = add_adapter(policy.model, settings(**lora), "base")
    torch.manual_seed(1)
    for p in policy.parameters() if learned else ():
        p.data += 0.1 * torch.randn_like(p)
    return policy


def plain_forward(model, rollout):
    """The reference: peft's own model on one row, log_softmax and gather."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    logps = model(input_ids=ids).logits[0].log_softmax(-1)
    start = len(rollout.prompt_ids)
    return torch.stack([logps[start + t - 1, token] for t, token in enumerate(rollout.completion_ids)])


def both_ways(ours, theirs, rollouts, dtype, checkpointing):
    """(our outputs, peft's log-probabilities of each rollout), the same random weights of them passed back in both."""
    coefficients = [torch.randn(len(r.completion_ids), dtype=dtype) for r in rollouts]
    expected = [plain_forward(theirs, r) for r in rollouts]
    sum((c * x).sum() for c, x in zip(coefficients, expected, strict=True)).backward()
    out = token_outputs(ours, rollouts, PLAIN, chunk=4, activation_checkpointing=checkpointing)
    weights = torch.zeros_like(out.logp)
    for row, c in enumerate(coefficients):
        weights[row, : len(c)] = c
    (weights * out.logp).sum().backward()
    return out, expected


# -- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [tiny.llama, tiny.gpt2])
def test_log_probabilities_and_gradients_are_those_of_pefts_plain_forward_pass(kind, checkpointing):
    ours, theirs = adapted(kind), adapted(kind)
    out, expected = both_ways(ours, theirs.adapter.peft, tiny.rollouts(), torch.float64, checkpointing)
    for row, x in enumerate(expected):
        torch.testing.assert_close(out.logp[row, : len(x)], x, rtol=0, atol=1e-10)
    named = dict(theirs.model.named_parameters())
    learned = [name for name, p in ours.model.named_parameters() if p.grad is not None]
    assert learned and all("lora_" in name for name in learned)
    for name, p in ours.model.named_parameters():
        torch.testing.assert_close(p.grad, named[name].grad, rtol=0, atol=1e-10)


def test_the_reference_is_the_base_model_with_the_adapter_off_and_no_second_copy():
    policy, rollouts = adapted(), tiny.rollouts()
    reference = policy.frozen()
    assert reference.model is policy.model
    base = tiny.policy(dtype=torch.float64)  # the same seed, and nothing put into it
    with torch.no_grad():
        off = token_outputs(reference, rollouts, PLAIN).logp
        assert torch.equal(off, token_outputs(base, rollouts, PLAIN).logp)
        with policy.adapter.peft.disable_adapter():
            for row, r in enumerate(rollouts):
                expected = plain_forward(policy.adapter.peft, r)
                torch.testing.assert_close(off[row, : len(expected)], expected, rtol=0, atol=1e-10)
        on = token_outputs(policy, rollouts, PLAIN).logp
    assert float((on - off).abs().max()) > 0.01
    assert all(p.requires_grad for p in policy.adapter.trained) and len(policy.parameters()) == 28


def test_the_kl_over_the_whole_vocabulary_has_the_adapter_on_and_off_in_one_pass():
    policy, rollouts = adapted(), tiny.rollouts()
    out = token_outputs(policy, rollouts, PLAIN, want=frozenset({"full_kl"}), reference=policy.frozen())
    with torch.no_grad():
        logits = []
        for own in (policy.adapter.peft, tiny.policy(dtype=torch.float64).model):
            ids = torch.tensor([rollouts[0].prompt_ids + rollouts[0].completion_ids])
            logits.append(own(input_ids=ids).logits[0, len(rollouts[0].prompt_ids) - 1 : -1].log_softmax(-1))
        expected = (logits[0].exp() * (logits[0] - logits[1])).sum(-1)
    torch.testing.assert_close(out.full_kl[0, : len(expected)].detach(), expected, rtol=0, atol=1e-10)
    out.full_kl.sum().backward()
    assert all(p.grad is not None for p in policy.adapter.trained)


def test_a_new_adapter_changes_nothing_and_is_drawn_from_the_seed():
    rollouts = tiny.rollouts()
    with torch.no_grad():
        fresh = token_outputs(adapted(learned=False), rollouts, PLAIN).logp
        assert torch.equal(fresh, token_outputs(tiny.policy(dtype=torch.float64), rollouts, PLAIN).logp)
    one, same, other = (adapted(learned=False, seed=s) for s in (3, 3, 4))
    assert one.checksum() == same.checksum() != other.checksum()


def test_what_is_sampled_is_what_the_merged_model_samples_and_follows_every_update():
    policy = adapted(dtype=torch.float32)
    merged = tiny.policy(copy.deepcopy(policy.adapter.peft).merge_and_unload())
    prompts, long = tiny.prompts(), SamplingSettings(max_tokens=12)

    def drawn(of):
        return [r.completion_ids for r in sample(of, prompts, 3, long, seed=0)]

    before = drawn(policy)
    assert before == drawn(merged) != drawn(policy.frozen())
    for p in policy.adapter.trained:
        p.data += 0.1 * torch.randn_like(p)
    rollouts = sample(policy, prompts, 3, long, seed=0)
    assert [r.completion_ids for r in rollouts] != before
    with torch.no_grad():
        now = token_outputs(policy, rollouts, long)
    for row, r in enumerate(rollouts):
        sampled = r.behavior_logp.values
        torch.testing.assert_close(now.logp[row, : len(sampled)], sampled, rtol=0, atol=1e-4)


def test_a_base_held_in_bfloat16_computes_the_same_to_the_bit():
    policy, rollouts = adapted(dtype=torch.float32), tiny.rollouts(dtype=torch.float32)
    policy.compute_dtype = torch.bfloat16

    def computed():
        logp = token_outputs(policy, rollouts, PLAIN).logp
        logp.sum().backward()
        grads = [p.grad.clone() for p in policy.adapter.trained]
        policy.model.zero_grad()
        written = sample(policy, tiny.prompts(), 2, SamplingSettings(max_tokens=8), seed=0)
        return [logp.detach(), *grads, *(r.behavior_logp.values for r in written)]

    wide = computed()
    held = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    policy.adapter.narrow_base(torch.bfloat16)
    assert sum(p.numel() * p.element_size() for p in policy.model.parameters()) < 0.75 * held
    assert all(torch.equal(a, b) for a, b in zip(wide, computed(), strict=True))
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_compiled_layers_give_the_adapter_the_same_gradients(compute):
    def gradients(compiled):
        policy = adapted(dtype=torch.float32)
        policy.compute_dtype = compute
        made = Recipe.make(lora_rank=4, loss="grpo(beta=0.1)", compile=compiled, micro_batch_tokens=20)
        learner = Learner(policy, made.policy_loss(), made)
        assert learner.compiled is compiled
        with torch.no_grad():
            drawn = sample(policy, tiny.prompts(), 3, made.sampling, seed=0)
        scored = [ls.Rollout(**{**vars(r), "score": ls.Score(float(r.sample))}) for r in drawn]
        batch = learner.make_batch(scored)
        learner.accumulate(scored, batch, learner.credit(batch))
        return torch.cat([p.grad.flatten() for p in policy.parameters()])

    eager, compiled = gradients(False), gradients(True)
    gap = float((eager - compiled).norm() / eager.norm())
    assert gap < (1e-5 if compute == torch.float32 else 0.1)


def test_a_head_in_float32_keeps_its_weights_beside_a_narrowed_base(tmp_path):
    tiny.llama(tie_word_embeddings=False).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    more = {"device": "cpu", "dtype": "bfloat16", "lora": settings()}
    wide, narrow = (load_policy(tmp_path, **more, float32_head=wanted) for wanted in (True, False))
    head = AutoModelForCausalLM.from_pretrained(tmp_path).get_output_embeddings().weight
    assert torch.equal(wide.model.get_output_embeddings().weight, head)
    assert narrow.model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert wide.frozen().float32_head


# -- training ---------------------------------------------------------------------------------------------------------


def even_bytes(prompts, completions, **_):
    return [sum(b % 2 == 0 for b in text.encode()) / max(len(text.encode()), 1) for text in completions]


def recipe(tmp_path, **changes):
    lora = {"lora_rank": 4, "lora_alpha": 8.0, "learning_rate": 1e-3}
    run = {"steps": 3, "prompts_per_step": 3, "samples_per_prompt": 3, "max_tokens": 6, "held_out": 4, "loss": "grpo"}
    place = {"model": str(tiny.folder()), "device": "cpu", "dtype": "float32", "runs": str(tmp_path / "runs")}
    prompts = [f"say {i}" for i in range(12)]
    return {"prompts": prompts, "scorer": even_bytes, "checkpoint_every": 1, **lora, **run, **place, **changes}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return ls.train(quiet=True, **recipe(tmp_path_factory.mktemp("lora"), name="one"))


def test_a_run_trains_the_adapter_alone_and_saves_it_as_peft_does(finished):
    folder = finished.folder.path / "policy"
    names = {p.name for p in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "config.json" not in names and "model.safetensors" not in names
    weights = load_file(finished.folder.path / "checkpoints" / "step-00003" / "weights.safetensors")
    assert weights and all("lora_" in name for name in weights)
    base = AutoModelForCausalLM.from_pretrained(tiny.folder())
    for name, tensor in base.state_dict().items():
        place = finished.policy.model.state_dict()
        assert torch.equal(tensor, place.get(name, place.get(name.replace(".weight", ".base_layer.weight"))))
    last = finished.folder.metrics()[-1]
    assert last["weights_moved"] > 0 and last["reference_moved"] == 0 and last["kl"] > 0
    assert "LoRA of rank 4 on 14 layers" in about_adapter(finished.policy)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's to mend
def test_the_saved_adapter_loads_in_peft_with_the_same_log_probabilities(finished):
    folder = finished.folder.path / "policy"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    again = load_policy(folder, device="cpu", dtype="float32")
    assert again.checksum() == finished.summary["policy_checksum"]
    rollouts = tiny.rollouts(dtype=torch.float32)
    with torch.no_grad():
        for policy in (finished.policy, again):
            ours = token_outputs(policy, rollouts, PLAIN).logp
            for row, r in enumerate(rollouts):
                expected = plain_forward(theirs, r)
                torch.testing.assert_close(ours[row, : len(expected)], expected, rtol=0, atol=1e-4)


def test_a_run_that_stopped_goes_on_to_the_bit(finished, tmp_path):
    ls.train(quiet=True, **recipe(tmp_path, steps=2, name="one"))
    more = ls.resume(tmp_path / "runs" / "one", steps=3, prompts=recipe(tmp_path)["prompts"], scorer=even_bytes)
    assert more.summary["policy_checksum"] == finished.summary["policy_checksum"]


@pytest.mark.slow
def test_two_ranks_train_the_adapter_that_one_process_does(finished, tmp_path):
    """What is sampled is the same to the letter, and so is what is learned, to rounding."""
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in recipe(tmp_path)["prompts"]))
    (tmp_path / "even.py").write_text(
        "def even_bytes(prompts, completions, **_):\n"
        "    return [sum(b % 2 == 0 for b in t.encode()) / max(len(t.encode()), 1) for t in completions]\n"
    )
    given = recipe(tmp_path, prompts=str(tmp_path / "p.jsonl"), scorer=f"{tmp_path}/even.py:even_bytes", name="two")
    (tmp_path / "r.toml").write_text(tomli_w.dumps(given))
    lossmith("train", tmp_path / "r.toml", "--ranks", 2)
    folders = (finished.folder.path, tmp_path / "runs" / "two")
    rollouts = [[ls.read_rollouts(f / "rollouts" / f"step-0000{k}.parquet") for k in range(3)] for f in folders]
    texts = [[r.completion for step in of for r in step] for of in rollouts]
    assert texts[0] == texts[1]
    alone, together = (load_file(f / "policy" / "adapter_model.safetensors") for f in folders)
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_of_the_adapter_brings_back_the_next_update(tmp_path):
    made = Recipe.make(lora_rank=4, lora_alpha=8.0, loss="grpo", learning_rate=1e-2, micro_batch_tokens=20)

    def learner():
        policy = load_policy(tiny.folder(), device="cpu", dtype="float32", lora=made.lora)
        return Learner(policy, made.policy_loss(), made)

    first = learner()
    with torch.no_grad():
        rollouts = sample(first.policy, tiny.prompts(), 3, made.sampling, seed=0)
    scored = [ls.Rollout(**{**vars(r), "score": ls.Score(float(len(r.completion_ids) + r.sample))}) for r in rollouts]
    tiny.update(first, scored)
    saved = save_checkpoint(tmp_path, first, 1)
    second = learner()
    load_checkpoint(saved, second)
    assert second.policy.version == 1
    for one in (first, second):
        again = [ls.Rollout(**{**vars(r), "behavior_logp": _at(r, one.policy)}) for r in scored]
        tiny.update(one, again, 1)
    assert first.policy.checksum() == second.policy.checksum()


def _at(rollout, policy):
    measured = rollout.behavior_logp
    distribution = type(measured.distribution)(**{**vars(measured.distribution), "policy_version": policy.version})
    return ls.LogProbs(measured.values, distribution)


def test_a_run_from_an_adapter_goes_on_with_it_and_is_measured_against_it(finished, tmp_path):
    start = finished.folder.path / "policy"
    run = ls.train(quiet=True, **recipe(tmp_path, model=str(start), lora_rank=0, lora_alpha=32.0, steps=2))
    assert run.folder.metrics()[0]["kl"] == 0 < run.folder.metrics()[1]["kl"]
    assert [r["reference_moved"] for r in run.folder.metrics()] == [0, 0]
    was = load_policy(start, device="cpu", dtype="float32")
    rollouts = tiny.rollouts(dtype=torch.float32)
    with torch.no_grad():
        reference = token_outputs(run.learner.reference, rollouts, PLAIN).logp
        assert torch.equal(reference, token_outputs(was, rollouts, PLAIN).logp)
        assert not torch.equal(reference, token_outputs(run.policy, rollouts, PLAIN).logp)
    config = json.loads((run.folder.path / "policy" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny.folder()) and config["r"] == 4


def test_preferences_train_an_adapter_too(tmp_path):
    pairs = [{"prompt": f"p{i}", "chosen": "yes " * (i % 3 + 1), "rejected": "no"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    more = {"model": str(tiny.folder()), "device": "cpu", "dtype": "float32", "runs": str(tmp_path)}
    run = ls.prefer(
        tmp_path / "pairs.jsonl", quiet=True, loss="dpo", held_out=4, preferences_per_step=4, lora_rank=2,
        learning_rate=1e-2, **more,
    )  # fmt: skip
    assert (run.folder.path / "policy" / "adapter_model.safetensors").is_file()
    assert run.summary["held_out"]["after"]["loss"] < run.summary["held_out"]["before"]["loss"]


def test_the_best_adapter_is_kept_with_nothing_of_pefts_about_this_machine(tmp_path):
    run = ls.train(quiet=True, **recipe(tmp_path, evaluate_every=1, keep_best=True))
    best = run.folder.path / "policy-best"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in best.iterdir()}
    assert not (best / "README.md").exists()


def test_the_card_of_an_adapter_names_its_base_and_its_snippet_runs(finished, tmp_path, monkeypatch, capsys):
    folder = finished.folder.path / "policy"
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "peft" and "This is a LoRA adapter" in card
    assert "lossmith merge . -o FOLDER" in card and str(tiny.folder()) not in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(folder)
    exec(snippet.replace("max_new_tokens=200", "max_new_tokens=3"), {})
    assert capsys.readouterr().out
    said = what_next(finished.folder.path)
    assert f"lossmith merge {finished.folder.path} -o FOLDER" in said and "vllm serve FOLDER" in said
    assert _base_model(str(folder)) == tiny.folder().name  # of a run that goes on from this adapter


def test_the_default_model_is_the_base_wherever_the_cache_was(tmp_path):
    for base in ("/another/machine/SmolLM2-135M-Instruct", str(cache_folder() / "SmolLM2-135M-Instruct")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        assert adapter_base(tmp_path) == "default"
    assert _base_model(str(tmp_path)) == "HuggingFaceTB/SmolLM2-135M-Instruct"


# -- folders ----------------------------------------------------------------------------------------------------------


def test_merged_is_unmerged(finished, tmp_path):
    written = ls.merge_adapter(finished.folder.path, tmp_path / "whole")
    assert {p.name for p in written.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not [p.name for p in tmp_path.iterdir() if p.name != "whole"]
    merged, rollouts = load_policy(written, device="cpu", dtype="float32"), tiny.rollouts(dtype=torch.float32)
    assert merged.adapter is None and len(merged.parameters()) > 14
    with torch.no_grad():
        theirs, ours = (token_outputs(p, rollouts, PLAIN).logp for p in (merged, finished.policy))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    with pytest.raises(ls.PolicyError, match="a whole model already"):
        ls.merge_adapter(written, tmp_path / "again")
    with pytest.raises(ls.PolicyError, match="is not overwritten"):
        ls.merge_adapter(finished.folder.path / "policy", written)


def test_an_adapter_is_a_policy_wherever_one_is_named(finished, tmp_path):
    folder = str(finished.folder.path / "policy")
    rows = ls.sample_outputs(prompt=("Why?",), n=2, model=folder, max_tokens=4, device="cpu", dtype="float32")
    assert len(rows[0]["outputs"]) == 2
    sides = open_sides([str(finished.folder.path)], device="cpu", dtype="float32")
    assert [side.policy.adapter is None for side in sides] == [True, False]
    replies = [side.reply("Why?", SamplingSettings(max_tokens=4, temperature=0)) for side in sides]
    with torch.no_grad():
        merged = sides[1].policy.adapter.merged().generate(
            torch.tensor([sides[1].policy.encode(ls.Prompt(({"role": "user", "content": "Why?"},)))]),
            max_new_tokens=4, do_sample=False, pad_token_id=256,
        )  # fmt: skip
    assert sides[1].policy.decode(merged[0, -4:].tolist()) == replies[1]


@pytest.fixture
def adapter(finished, tmp_path):
    """A copy of the run's adapter to break, beside its base model."""
    shutil.copytree(tiny.folder(), tmp_path / "base")
    place = shutil.copytree(finished.folder.path / "policy", tmp_path / "adapter")
    configure(place, base_model_name_or_path="../base")
    return place


def configure(place, **changes):
    config = place / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def refusal(place, **more):
    with pytest.raises(ls.PolicyError) as found:
        load_policy(place, device="cpu", dtype="float32", **more)
    assert len(str(found.value)) < 700 and "\n" not in str(found.value)
    return str(found.value)


def test_a_base_model_is_found_from_the_adapters_folder_and_its_tokenizer_stands_in(adapter):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (adapter / name).unlink(missing_ok=True)
    assert load_policy(adapter, device="cpu", dtype="float32").adapter.rank == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model_name_or_path": "/nowhere/base"}, "its base model '/nowhere/base' is not there: put it back"),
        ({"base_model_name_or_path": None}, "does not say of which base model"),
        ({"base_model_name_or_path": "../adapter"}, "is an adapter itself: `lossmith merge` that first"),
        ({"peft_type": "PREFIX_TUNING"}, "of the kind 'PREFIX_TUNING', and LoRA alone is known"),
        ({"bias": "all"}, "changes the biases of its base model"),
        ({"r": 8}, r"lora_A.weight is [4, 48], and would have to be [8, 48]"),
        ({"target_modules": ["q_prj"]}, "does not fit its base model"),
        ({"target_modules": ["q_proj"]}, "which that model has not"),
        ({"r": "four"}, "does not fit its base model"),
    ],
)
def test_an_adapter_that_cannot_be_used_says_why(adapter, changes, said):
    configure(adapter, **changes)
    assert said in refusal(adapter)


def test_an_adapter_of_another_model_names_the_layer(adapter):
    tiny.llama(hidden_size=64).save_pretrained(adapter.parent / "base")
    said = refusal(adapter)
    assert "does not fit its base model" in said and "was trained on another model" in said


def test_an_adapter_with_missing_or_damaged_weights_is_refused(adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[1:]), file)
    assert "it lacks " in refusal(adapter)
    save_file({k: torch.full_like(v, torch.nan) for k, v in tensors.items()}, file)
    assert "hold NaN" in refusal(adapter)
    file.write_bytes(b"junk")
    assert "does not fit" in refusal(adapter)
    file.rename(adapter / "adapter_model.bin")
    assert "pickled, which can run code" in refusal(adapter)
    (adapter / "adapter_config.json").unlink()
    assert "without its adapter_config.json" in refusal(adapter)


def test_a_new_adapter_on_an_adapter_is_refused_with_the_way_out(adapter):
    assert "lossmith merge" in refusal(adapter, lora=settings())


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lora_rank": -1}, "lora_rank = -1: a whole number of at least 0 is wanted"),
        ({"lora_rank": 4, "lora_alpha": 0}, "lora_alpha = 0: a number above 0 is wanted"),
        ({"lora_alpha": 16}, "is for a new adapter: give lora_rank too"),
        ({"lora_targets": ["q_proj"]}, "is for a new adapter: give lora_rank too"),
        ({"lora_rank": 4, "lora_targets": []}, "names no layer"),
        ({"lora_rank": 4, "lora_targets": ["all-linear", "q_proj"]}, "stands alone"),
        ({"lora_rank": 4, "sampler": "vllm"}, "sampler = 'vllm' is sent whole models"),
        ({"lora_r": 4}, "It is TRL's name for lora_rank here"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(fields, said):
    with pytest.raises(ls.RecipeError) as found:
        Recipe.make(**fields)
    assert said in str(found.value)


def test_a_target_that_is_no_layer_names_the_nearest():
    with pytest.raises(ls.PolicyError, match=r"no linear layer 'q_prj'\. Did you mean 'q_proj'"):
        load_policy(tiny.folder(), device="cpu", dtype="float32", lora=settings(targets=("q_prj",)))
    with pytest.raises(ls.PolicyError, match="no linear layer 'lm_head'"):
        load_policy(tiny.folder(), device="cpu", dtype="float32", lora=settings(targets=("lm_head",)))
    some = load_policy(
        tiny.folder(), device="cpu", dtype="float32", lora=settings(targets=("v_proj", "layers.0.mlp.up_proj"))
    )
    assert some.adapter.layers == 3


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ls.PolicyError, match=r"pip install 'lossmith\[lora\]'"):
        load_policy(tiny.folder(), device="cpu", dtype="float32", lora=settings())


def test_other_engines_are_told_or_refuse(finished, tmp_path):
    from lossmith.adapters.verl_export import export

    (tmp_path / "p.txt").write_text("\n".join(f"say {i}" for i in range(12)))
    same = {"prompts": str(tmp_path / "p.txt"), "scorer": "length", "held_out": 4, "model": str(tiny.folder())}
    small = {"prompts_per_step": 2, "samples_per_prompt": 2}
    export(Recipe.make(lora_rank=8, lora_targets=["q_proj"], **same, **small), tmp_path / "verl")
    written = (tmp_path / "verl" / "verl.yaml").read_text()
    assert '"lora_rank": 8' in written and '"target_modules"' in written and '"load_format": "safetensors"' in written
    assert tomllib.loads((tmp_path / "verl" / "recipe.toml").read_text())["lora_rank"] == 8
    with pytest.raises(ls.RecipeError, match="it is a LoRA adapter: merge it first"):
        export(Recipe.make(**same | small | {"model": str(finished.folder.path / "policy")}), tmp_path / "again")
