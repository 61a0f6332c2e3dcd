"""The policy: loading, sampling, log-probabilities."""

from lossmith.policy.embedded import embedded_model
from lossmith.policy.forward import Layout
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
    "check_model",
    "check_samples",
    "embedded_model",
    "load_policy",
    "measure_of",
    "measured_log_softmax",
    "sample",
    "token_outputs",
]
