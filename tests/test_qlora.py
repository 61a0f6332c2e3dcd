"""QLoRA: an adapter beside weights in 4 bits computes what peft and bitsandbytes do; it trains, stops and merges so."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lossmith as ls
import tiny
from lossmith.chat import open_sides
from lossmith.policy import SamplingSettings, load_policy, sample, token_outputs
from lossmith.policy.log_probs import Layout
from lossmith.policy.quantized import RECORD, bytes_held, is_quantized, numbers
from lossmith.report.run.closing import what_next
from lossmith.report.run.opening import about_adapter
from lossmith.training import Learner, Recipe
from lossmith.training.hardware import Gpus, plan_hardware
from test_lora import PLAIN, both_ways, even_bytes, plain_forward, recipe, settings

peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install lossmith[qlora]")

# The warning is peft's to mend.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")]
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
LAYOUTS = Layout.__args__
# bitsandbytes multiplies in float32 at most. Seen: 4.3e-6 nats of a token, 3.9e-6 of a gradient's length.
NATS, SHARE = 2e-5, 2e-5


def base(kind="llama"):
    """The model as transformers and bitsandbytes quantize it, without Lossmith."""
    return AutoModelForCausalLM.from_pretrained(
        tiny.folder(kind), dtype=torch.float32, quantization_config=NF4, device_map={"": "cpu"}
    ).eval()


def adapted(kind="llama", learned=True, **more):
    policy = load_policy(
        tiny.folder(kind), lora=settings(), quantize="nf4", **{"device": "cpu", "dtype": "float32"} | more
    )
    torch.manual_seed(1)
    for p in policy.parameters() if learned else ():
        p.data += 0.1 * torch.randn_like(p)
    return policy


@pytest.fixture(scope="module")
def theirs_of(tmp_path_factory):
    """peft's own model around the quantized one, with the adapter of a policy as that saves it."""

    def load(policy, kind="llama"):
        place = tmp_path_factory.mktemp("adapter")
        policy.save(place)
        return peft.PeftModel.from_pretrained(base(kind), place, is_trainable=True).eval()

    return load


def computed(policy, rollouts, **more):
    with torch.no_grad():
        return token_outputs(policy, rollouts, PLAIN, **more).logp


def hold(ours, expected, atol=NATS):
    for row, x in zip(ours, expected, strict=True):
        torch.testing.assert_close(row[: len(x)], x, rtol=0, atol=atol)


# -- exact ------------------------------------------------------------------------------------------------------------

# Appendix E of the paper: the levels of 4-bit NormalFloat.
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_weight_is_the_nearest_of_16_levels_times_the_scale_of_64(kind):
    """Scales are in 8 bits themselves: within 3% of the largest weight that they are of."""
    whole = AutoModelForCausalLM.from_pretrained(tiny.folder(kind))
    modules, count = dict(whole.named_modules()), 0
    for name, module in load_policy(
        tiny.folder(kind), quantize="nf4", trainable=False, device="cpu", dtype="float32"
    ).model.named_modules():
        if not is_quantized(getattr(module, "weight", None)):
            continue
        count += 1
        held = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).flatten()
        weight = modules[name].weight.detach()
        weight = (weight.T if kind == "gpt2" else weight).flatten()  # GPT-2 has [in, out]
        for ours, exact in zip(held.split(64), weight.split(64), strict=True):
            scale = exact.abs().max()
            nearest = LEVELS[(exact[:, None] / scale - LEVELS).abs().argmin(1)]
            top = nearest.abs().argmax()
            mine = ours[top] / nearest[top]
            assert float((mine / scale - 1).abs()) < 0.03
            torch.testing.assert_close(ours, nearest * mine, rtol=1e-5, atol=1e-6)
    assert count == {"llama": 14, "gpt2": 8}[kind]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_log_probabilities_and_gradients_are_those_of_pefts_forward_pass_over_the_quantized_model(
    kind, checkpointing, theirs_of
):
    ours = adapted(kind)
    theirs = theirs_of(ours, kind)
    out, expected = both_ways(ours, theirs, tiny.rollouts(dtype=torch.float32), torch.float32, checkpointing)
    hold(out.logp, expected)
    named = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters()}
    learned = {name: p for name, p in ours.model.named_parameters() if p.grad is not None}
    assert len(learned) == {"llama": 28, "gpt2": 16}[kind] and all("lora_" in name for name in learned)
    for name, p in learned.items():
        assert p.dtype == torch.float32
        assert float((p.grad - named[name].grad).norm()) < SHARE * float(named[name].grad.norm()), name


def test_every_layout_gives_the_same_whatever_else_is_in_the_pass(theirs_of):
    policy, rollouts = adapted(), tiny.rollouts(dtype=torch.float32)
    theirs = theirs_of(policy)
    with torch.no_grad():
        expected = [plain_forward(theirs, r) for r in rollouts]
    for layout in LAYOUTS:
        hold(computed(policy, rollouts, layout=layout), expected)


def test_the_reference_is_the_quantized_model_with_the_adapter_off_and_no_second_copy():
    policy, rollouts = adapted(), tiny.rollouts(dtype=torch.float32)
    reference = policy.frozen()
    assert reference.model is policy.model
    off = computed(reference, rollouts)
    with torch.no_grad():
        hold(off, [plain_forward(base(), r) for r in rollouts])
    assert torch.equal(off, computed(adapted(learned=False), rollouts))
    assert float((off - computed(policy, rollouts)).abs().max()) > 0.01
    full = load_policy(tiny.folder(), device="cpu", dtype="float32")
    assert float((off - computed(full, rollouts)).abs().max()) > 0.01  # it is another model than the unquantized one


def test_what_is_sampled_has_the_log_probabilities_that_the_learner_computes():
    policy, long = adapted(), SamplingSettings(max_tokens=12)
    rollouts = sample(policy, tiny.prompts(), 3, long, seed=0)
    with torch.no_grad():
        now = token_outputs(policy, rollouts, long).logp
    hold(now, [r.behavior_logp.values for r in rollouts], atol=1e-4)


def test_in_bfloat16_layers_multiply_in_the_type_that_others_do():
    """A token's log-probability is within bfloat16's rounding of float32's, as that of an adapter beside whole weights
    is; what a layer gives is bfloat16, where bitsandbytes alone would go back to float32."""
    rollouts = tiny.rollouts(dtype=torch.float32)
    narrow, wide = adapted(dtype="bfloat16"), adapted()
    given_back = set()
    layer = next(m for m in narrow.model.modules() if is_quantized(getattr(m, "weight", None)))
    layer.register_forward_hook(lambda module, given, out: given_back.add(out.dtype))
    gap = (computed(narrow, rollouts) - computed(wide, rollouts)).abs()
    plain = [load_policy(tiny.folder(), lora=settings(), device="cpu", dtype=d) for d in ("bfloat16", "float32")]
    for policy in plain:
        for p, q in zip(policy.parameters(), wide.parameters(), strict=True):
            p.data.copy_(q.data)
    usual = (computed(plain[0], rollouts) - computed(plain[1], rollouts)).abs()
    assert 0 < float(gap.mean()) < 2 * float(usual.mean())
    assert given_back == {torch.bfloat16}
    written = sample(narrow, tiny.prompts(), 2, SamplingSettings(max_tokens=8), seed=0)
    assert len(written) == 6 and {p.dtype for p in narrow.parameters()} == {torch.float32}


def test_no_layer_lays_its_weights_out_for_a_kernel_that_has_no_gradient(monkeypatch):
    """Where the processor has AVX512-BF16, bitsandbytes does that to a model in eval mode, once it was sampled from."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    converted = []
    monkeypatch.setattr(
        "bitsandbytes.nn.modules._convert_weight_packed_for_cpu", lambda *given: converted.append(1) or given
    )
    policy = adapted()
    sample(policy, tiny.prompts(), 2, SamplingSettings(max_tokens=2), seed=0)
    assert not converted
    token_outputs(policy, tiny.rollouts(dtype=torch.float32), PLAIN).logp.sum().backward()
    assert all(bool((p.grad != 0).any()) for n, p in policy.model.named_parameters() if "lora_A" in n)


# -- training ---------------------------------------------------------------------------------------------------------


def run_of(tmp_path, **changes):
    return ls.train(quiet=True, **recipe(tmp_path, quantize="nf4", **changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("qlora"), name="one")


def test_a_run_trains_the_adapter_alone_and_leaves_the_4_bits_as_they_are(finished):
    weights = load_file(finished.folder.path / "checkpoints" / "step-00003" / "weights.safetensors")
    assert len(weights) == 28 and all("lora_" in name for name in weights)
    ours, whole = finished.policy.model.state_dict(), base().state_dict()
    for name, tensor in whole.items():
        there = ours.get(name)
        there = ours[re.sub(r"_proj\.(weight|bias)", r"_proj.base_layer.\1", name)] if there is None else there
        assert torch.equal(tensor, there), name
    last = finished.folder.metrics()[-1]
    assert last["weights_moved"] > 0 and last["reference_moved"] == 0 and last["kl"] > 0
    said = about_adapter(finished.policy)
    all_of_it = (
        2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32)
        + 264 * 32
        + 32
        + sum(p.numel() for p in finished.policy.parameters())
    )
    assert f"of {all_of_it / 1e6:.1f} million weights are trained, the layers' own in 4 bits (nf4)" in said


def test_a_run_that_stopped_goes_on_to_the_bit(finished, tmp_path):
    run_of(tmp_path, steps=2, name="one")
    more = ls.resume(tmp_path / "runs" / "one", steps=3, prompts=recipe(tmp_path)["prompts"], scorer=even_bytes)
    assert more.summary["policy_checksum"] == finished.summary["policy_checksum"]
    with pytest.raises(ls.RunError, match="quantize"):  # another model, which its rollouts are not of
        changed = (tmp_path / "runs" / "one" / "recipe.toml").read_text().replace('quantize = "nf4"\n', "")
        (tmp_path / "runs" / "one" / "recipe.toml").write_text(changed)
        ls.resume(tmp_path / "runs" / "one", steps=4, prompts=recipe(tmp_path)["prompts"], scorer=even_bytes)


def test_preferences_are_learned_beside_4_bits_too(tmp_path):
    pairs = [{"prompt": f"p{i}", "chosen": "yes " * (i % 3 + 1), "rejected": "no"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    more = {"model": str(tiny.folder()), "device": "cpu", "dtype": "float32", "runs": str(tmp_path)}
    run = ls.prefer(
        tmp_path / "pairs.jsonl", quiet=True, loss="dpo", held_out=4, preferences_per_step=4, lora_rank=2,
        learning_rate=1e-2, quantize="nf4", **more,
    )  # fmt: skip
    assert run.summary["held_out"]["after"]["loss"] < run.summary["held_out"]["before"]["loss"]
    assert (run.folder.path / "policy" / RECORD).is_file()


def test_compiling_is_said_to_have_no_effect(caplog):
    made = Recipe.make(lora_rank=4, quantize="nf4", compile=True)
    assert not Learner(adapted(), made.policy_loss(), made).compiled
    assert "compile = true has no effect: bitsandbytes computes with weights in 4 bits by itself" in caplog.text


# -- folders ----------------------------------------------------------------------------------------------------------


def test_the_saved_adapter_loads_in_peft_over_the_same_4_bits_with_the_same_log_probabilities(finished):
    folder = finished.folder.path / "policy"
    said = BitsAndBytesConfig.from_dict(json.loads((folder / RECORD).read_text()))
    whole = AutoModelForCausalLM.from_pretrained(tiny.folder(), quantization_config=said, device_map={"": "cpu"})
    theirs = peft.PeftModel.from_pretrained(whole, folder).eval()
    again = load_policy(folder, device="cpu", dtype="float32")
    assert again.checksum() == finished.summary["policy_checksum"]
    rollouts = tiny.rollouts(dtype=torch.float32)
    with torch.no_grad():
        expected = [plain_forward(theirs, r) for r in rollouts]
    for policy in (finished.policy, again):
        hold(computed(policy, rollouts), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_is_unmerged_and_plain(kind, tmp_path):
    policy, rollouts = adapted(kind), tiny.rollouts(dtype=torch.float32)
    policy.save(tmp_path / "adapter")
    before = computed(policy, rollouts)
    written = ls.merge_adapter(tmp_path / "adapter", tmp_path / "whole")
    assert "quantization_config" not in json.loads((written / "config.json").read_text())
    merged = load_policy(written, device="cpu", dtype="float32")
    assert merged.adapter is None and {p.dtype for p in merged.model.parameters()} == {torch.float32}
    torch.testing.assert_close(computed(merged, rollouts), before, rtol=0, atol=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(written).eval()
    with torch.no_grad():
        hold(before, [plain_forward(theirs, r) for r in rollouts], atol=1e-4)


def test_an_adapter_brings_its_4_bits_along_wherever_it_is_named(finished, tmp_path):
    folder, rollouts = finished.folder.path / "policy", tiny.rollouts(dtype=torch.float32)
    sides = open_sides([str(finished.folder.path)], device="cpu", dtype="float32")
    before, after = (computed(side.policy, rollouts) for side in sides)
    assert sides[0].policy.adapter is None
    assert torch.equal(before, computed(finished.learner.reference, rollouts))
    assert torch.equal(after, computed(finished.policy, rollouts))
    rows = ls.sample_outputs(prompt=("Why?",), n=2, model=str(folder), max_tokens=4, device="cpu", dtype="float32")
    assert len(rows[0]["outputs"]) == 2
    run = ls.train(quiet=True, **recipe(tmp_path, model=str(folder), lora_rank=0, lora_alpha=32.0, steps=2))
    assert [r["reference_moved"] for r in run.folder.metrics()] == [0, 0]
    assert torch.equal(computed(run.learner.reference, rollouts), after)
    assert json.loads((run.folder.path / "policy" / RECORD).read_text())["bnb_4bit_quant_type"] == "nf4"


def test_an_adapter_of_another_program_is_trained_beside_4_bits_where_asked_for(finished, tmp_path):
    policy = adapted()
    policy.save(tmp_path)
    (tmp_path / RECORD).unlink()
    rollouts = tiny.rollouts(dtype=torch.float32)
    whole = load_policy(tmp_path, device="cpu", dtype="float32")
    asked = load_policy(tmp_path, device="cpu", dtype="float32", quantize="nf4")
    assert torch.equal(computed(asked, rollouts), computed(policy, rollouts))
    assert not torch.equal(computed(whole, rollouts), computed(policy, rollouts)) and not whole.adapter.quantized


def test_the_card_says_what_the_adapter_stands_beside_and_its_snippet_runs(finished, monkeypatch, capsys):
    folder = finished.folder.path / "policy"
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft"
    assert "in 4 bits as it was trained beside" in card and "the weights that the 4 bits stood for" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert "quantization_config=nf4" in snippet
    monkeypatch.chdir(folder)
    exec(snippet.replace("max_new_tokens=200", "max_new_tokens=3"), {})
    assert capsys.readouterr().out
    assert "with peft and the quantization in its README.md" in what_next(finished.folder.path)


# -- memory -----------------------------------------------------------------------------------------------------------


def held_by(policy):
    """Bytes of the tensors themselves, those of bitsandbytes' own record too, but for its tables of levels."""
    total = 0
    for p in policy.model.parameters():
        total += p.numel() * p.element_size()
        if is_quantized(p):
            state = p.quant_state
            total += state.absmax.numel() + 4 * state.state2.absmax.numel()
    return total


def test_weights_are_counted_as_they_are_held_and_planned_as_they_are_counted():
    made = Recipe.make(
        model=str(tiny.folder()), lora_rank=4, lora_alpha=8.0, quantize="nf4", dtype="float32", device="cpu"
    )
    policy = adapted(learned=False)
    assert bytes_held(policy.model.parameters()) == held_by(policy)
    whole = load_policy(tiny.folder(), lora=settings(), device="cpu", dtype="float32")
    assert numbers(policy.model.parameters()) == sum(p.numel() for p in whole.model.parameters())
    learner = Learner(policy, made.policy_loss(), made, 200)
    plan = plan_hardware(made, Gpus(1, 80.0), prompt_tokens=200)
    assert plan.splits[0].memory.held == learner.memory.held
    assert plan.splits[0].total == pytest.approx(learner.memory.total(False))
    assert plan.weights == numbers(policy.model.parameters())
    assert plan.trained == sum(p.numel() for p in policy.parameters())


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantize": "nf4"}, "weights in 4 bits cannot learn, but an adapter beside them: give lora_rank too"),
        ({"quantize": "int8", "lora_rank": 4}, "quantize = 'int8'"),
        ({"quantize": "nf4", "lora_rank": 4, "weights": "bfloat16"}, "Leave weights at 'float32'"),
        ({"quantize": "nf4", "lora_rank": 4, "shard": True}, "Leave shard out"),
        ({"quantize": "nf4", "lora_rank": 4, "sampler": "vllm"}, "leave sampler = 'torch'"),
        ({"load_in_4bit": True}, "It is TRL's name for quantize here"),
    ],
)
def test_settings_that_quantize_nothing_that_can_be_are_refused(fields, said):
    with pytest.raises(ls.RecipeError) as found:
        Recipe.make(**fields)
    assert said in str(found.value)


def test_a_whole_model_in_4_bits_is_not_trained():
    with pytest.raises(ls.PolicyError, match="give lora too"):
        load_policy(tiny.folder(), device="cpu", quantize="nf4")
    with pytest.raises(ls.PolicyError, match=r"quantize is 'fp4'\..*nf4"):
        load_policy(tiny.folder(), device="cpu", quantize="fp4", lora=settings())


def test_without_bitsandbytes_the_extra_is_named_before_a_model_is_loaded(finished, tmp_path, monkeypatch):
    known = __import__("importlib").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "bitsandbytes" else known(name, *a)
    )
    monkeypatch.setattr("lossmith.policy.reading._read", None)
    folder = finished.folder.path / "policy"
    for call in (
        lambda: load_policy(tiny.folder(), device="cpu", quantize="nf4", lora=settings()),
        lambda: load_policy(folder, device="cpu"),
        lambda: ls.merge_adapter(folder, tmp_path / "whole"),
        lambda: ls.train(quiet=True, **recipe(tmp_path, quantize="nf4")),
    ):
        with pytest.raises(ls.PolicyError, match=r"needs bitsandbytes.*pip install 'lossmith\[qlora\]'"):
            call()


def test_a_device_that_bitsandbytes_does_not_know_is_refused(monkeypatch):
    monkeypatch.setattr("bitsandbytes.supported_torch_devices", {"cuda", "xpu"})
    with pytest.raises(ls.PolicyError, match=r"does not compute on device 'cpu', but on cuda, xpu"):
        adapted()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "not known here"),
        ('{"load_in_8bit": true}', "not known here"),
        ('{"load_in_4bit": true, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": true}', "not known here"),
    ],
)
def test_a_quantization_that_is_not_known_is_refused_and_never_left_out(finished, tmp_path, text, said):
    adapted().save(tmp_path)
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(ls.PolicyError, match=said):
        load_policy(tmp_path, device="cpu")


def test_verl_is_not_told_of_4_bits(tmp_path):
    from lossmith.adapters.verl_export import export

    (tmp_path / "p.txt").write_text("\n".join(f"say {i}" for i in range(12)))
    with pytest.raises(ls.RecipeError, match="quantize = 'nf4': beside an adapter it holds"):
        export(
            Recipe.make(lora_rank=8, quantize="nf4", prompts=str(tmp_path / "p.txt"), scorer="length", held_out=4),
            tmp_path / "verl",
        )


def test_a_pre_quantized_folder_says_which_setting_does_it_instead(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": NF4.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ls.PolicyError, match="quantize = 'nf4' holds in 4 bits beside an adapter"):
        load_policy(tmp_path, device="cpu", lora=settings(), quantize="nf4")
