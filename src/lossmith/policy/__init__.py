"""The policy: loading, sampling, log-probabilities."""

from lossmith.policy.activation_checkpointing import can_checkpoint_activations
from lossmith.policy.adapter import ALL_LINEAR, LoraSettings
from lossmith.policy.compiled import bfloat16_weights, check_compiler, compile_layers
from lossmith.policy.distribution import SamplingSettings, log_softmax_under
from lossmith.policy.embedded import embedded_model
from lossmith.policy.folder import adapter_base, check_model
from lossmith.policy.forward import Layout
from lossmith.policy.load import Policy
from lossmith.policy.log_probs import TokenOutputs, distribution_of, token_outputs
from lossmith.policy.memory import available_bytes
from lossmith.policy.merging import merge_adapter
from lossmith.policy.reading import check_quantization, check_weights, load_policy, read_pretrained
from lossmith.policy.sampling import check_samples, sample
from lossmith.policy.teacher import Teacher, check_teacher
from lossmith.policy.trial import sharing_is_exact

__all__ = [
    "ALL_LINEAR",
    "Layout",
    "LoraSettings",
    "Policy",
    "SamplingSettings",
    "Teacher",
    "TokenOutputs",
    "adapter_base",
    "available_bytes",
    "bfloat16_weights",
    "can_checkpoint_activations",
    "check_compiler",
    "check_model",
    "check_quantization",
    "check_samples",
    "check_teacher",
    "check_weights",
    "compile_layers",
    "distribution_of",
    "embedded_model",
    "load_policy",
    "log_softmax_under",
    "merge_adapter",
    "read_pretrained",
    "sample",
    "sharing_is_exact",
    "token_outputs",
]
