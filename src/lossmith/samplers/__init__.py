"""What writes the completions: the model that learns, in this process, or a vLLM server that is sent its weights.

The loop asks a Sampler; which one is a choice of the recipe (`sampler = "torch"` or `"vllm"`), and nothing else of a
run depends on it.
"""

from lossmith.samplers.sampler import Sampler, TorchSampler
from lossmith.samplers.vllm_sampler import VllmSampler, open_vllm

__all__ = ["Sampler", "TorchSampler", "VllmSampler", "open_vllm"]
