"""What a layer does not store for its backward pass, it makes again: the same values to the bit, the same gradients."""

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import tiny
from lossmith.policy import LoraSettings, SamplingSettings, lean, load_policy, sharing_is_exact, token_outputs
from lossmith.policy.lean import lean_layers, storing_less

SMALL = dict(
    vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
    num_key_value_heads=2, max_position_embeddings=256, eos_token_id=256, pad_token_id=256, initializer_range=0.3,
)  # fmt: skip


def memory(x):
    """What says whether it is still there."""
    return StorageWeakRef(x.untyped_storage())


def kinds(policy):
    return {type(module).__name__ for module, _ in lean_layers(policy)}


def outputs_and_gradients(policy, less):
    if not less:
        policy.lean = []
    policy.model.zero_grad()
    logp = token_outputs(policy, tiny.rollouts(), SamplingSettings()).logp
    (logp * torch.linspace(0, 1, logp.numel()).view_as(logp)).sum().backward()
    return logp.detach(), [p.grad.clone() for p in policy.parameters()]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])  # a rounding may tip over
@pytest.mark.parametrize("kind", ["llama", "qwen3", "biases"])
def test_log_probabilities_are_equal_to_the_bit_and_gradients_up_to_rounding(kind, dtype, close):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL)) if kind == "qwen3" else tiny.llama(mlp_bias=kind == "biases")
    policy = tiny.policy(model)
    policy.compute_dtype = dtype
    other = tiny.policy(copy.deepcopy(model))
    other.compute_dtype = dtype
    assert len(kinds(policy)) == 2
    logp, grads = outputs_and_gradients(policy, less=True)
    own_logp, own_grads = outputs_and_gradients(other, less=False)
    assert torch.equal(logp, own_logp)
    for mine, own in zip(grads, own_grads, strict=True):
        assert (mine - own).abs().max() <= close * own.abs().max()


def test_the_gradient_of_an_rms_norm_is_its_slope():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lean._RmsNorm.apply, (x, weight, 1e-6))


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(approximate="tanh"), nn.ReLU(), nn.Identity()])
def test_the_gradient_of_a_gated_product_is_its_slope(act):
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def product(gate, up):
        return lean._Product.apply(gate, up, act, [])

    assert torch.autograd.gradcheck(product, (gate, up))


@pytest.mark.parametrize("less", [True, False])
def test_the_input_of_the_last_product_is_let_go_of(less):
    policy = tiny.policy()
    mlp = policy.model.model.layers[0].mlp
    seen = []
    mlp.down_proj.register_forward_pre_hook(
        lambda module, given: seen.append(StorageWeakRef(given[0].untyped_storage()))
    )
    if not less:
        policy.lean = []
    with storing_less(policy):
        out = mlp(torch.randn(1, 7, 32, requires_grad=True))
    assert out.requires_grad and seen[0].expired() == less


def test_a_backward_pass_lets_go_of_each_layer_when_it_is_done_with_it():
    policy = tiny.policy()
    assert sharing_is_exact(policy) and lean_layers(policy)
    kept, layers = [], policy.model.model.layers
    for branch in (layers[1].mlp.gate_proj, layers[1].mlp.up_proj):
        branch.register_forward_hook(lambda module, given, out: kept.append(memory(out)))
    there = []
    layers[0].mlp.down_proj.weight.register_hook(lambda grad: there.extend(not each.expired() for each in kept))
    total = token_outputs(policy, tiny.rollouts(), SamplingSettings()).logp.sum()
    assert len(kept) == 2 and not any(each.expired() for each in kept)
    total.backward()
    assert there == [False, False]  # the second layer's, when the first one's turn has come


def test_a_module_that_computes_otherwise_is_left_as_it_is():
    torch.manual_seed(0)
    policy = tiny.policy(Gemma2ForCausalLM(Gemma2Config(**SMALL)))
    assert kinds(policy) == {"Gemma2MLP"}  # its norm multiplies by 1 + weight

    class Twice(type(tiny.llama().model.layers[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    policy = tiny.policy()
    for layer in policy.model.model.layers:
        layer.mlp.__class__ = Twice
    assert kinds(policy) == {"LlamaRMSNorm"}
    replaced = tiny.policy()
    replaced.model.model.layers[0].mlp.forward = lambda x: 0 * x
    assert [module for module, _ in lean_layers(replaced) if hasattr(module, "up_proj")] == [
        replaced.model.model.layers[1].mlp
    ]


def test_the_modules_are_their_own_again_afterwards_and_compiled_ones_are_never_touched():
    policy = tiny.policy()
    with storing_less(policy):
        assert "forward" in policy.model.model.norm.__dict__
        with torch.no_grad(), storing_less(policy):
            pass
    assert "forward" not in policy.model.model.norm.__dict__
    policy.model.model.layers[0]._compiled_call_impl = lambda *given: None
    with storing_less(policy):
        assert "forward" not in policy.model.model.norm.__dict__


def test_beside_an_adapter_layers_store_less_too():
    adapted = load_policy(tiny.folder(), dtype="float32", device="cpu", lora=LoraSettings(2, 4.0, ("all-linear",), 0))
    assert kinds(adapted) == {"LlamaMLP", "LlamaRMSNorm"}
    for name, p in adapted.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(1))
    logp, grads = outputs_and_gradients(adapted, less=True)
    own_logp, own_grads = outputs_and_gradients(adapted, less=False)
    assert torch.equal(logp, own_logp) and grads
    for mine, own in zip(grads, own_grads, strict=True):
        assert (mine - own).abs().max() <= 2e-5 * own.abs().max()
