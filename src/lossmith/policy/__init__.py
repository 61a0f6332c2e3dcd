"""The policy: loading, sampling, log-probabilities."""

from lossmith.policy.compiled import check_compiler, compile_layers, narrowed
from lossmith.policy.embedded import embedded_model
from lossmith.policy.forward import Layout, sharing_is_exact
from lossmith.policy.load import Policy, check_model, load_policy
from lossmith.policy.log_probs import TokenOutputs, measure_of, token_outputs
from lossmith.policy.measure import SamplingSettings, measured_log_softmax
from lossmith.policy.memory import available_bytes
from lossmith.policy.recompute import can_recompute
from lossmith.policy.sampling import check_samples, sample

__all__ = [
    "Layout",
    "Policy",
    "SamplingSettings",
    "TokenOutputs",
    "available_bytes",
    "can_recompute",
    "check_compiler",
    "check_model",
    "check_samples",
    "compile_layers",
    "embedded_model",
    "load_policy",
    "measure_of",
    "measured_log_softmax",
    "narrowed",
    "sample",
    "sharing_is_exact",
    "token_outputs",
]
