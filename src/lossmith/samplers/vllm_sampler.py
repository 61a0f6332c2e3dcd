"""A vLLM server as the sampler: token ids in; ids, log-probabilities and finish reasons out (docs/vllm.md).

One request a completion, seeded by (seed, step, prompt, sample): drawn again it is the same, where the server computes
the same. The prefix cache lets a prompt's completions share it; a salt that every push renews keeps what was cached
under old weights from being read under new ones.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import secrets
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lossmith.errors import RunError
from lossmith.policy import Policy, SamplingSettings, distribution_of, token_outputs
from lossmith.policy.sampling import (
    Groups,
    OnGroup,
    OnProgress,
    as_rollout,
    check_samples,
    encode_within,
    holds_stop,
    key_of,
)
from lossmith.policy.writing import OpenCompletion
from lossmith.prompts import Prompt
from lossmith.rollouts import FinishReason, Rollout
from lossmith.samplers.push import BOUNDS, Checksums, digests, write_weights
from lossmith.samplers.routes import Refused, Routes
from lossmith.samplers.server import START, VllmServer, check_vllm

__all__ = ["VllmSampler", "open_vllm"]

_log = logging.getLogger("lossmith")
AT_ONCE = 256  # requests under way: the server itself decides how many it computes side by side
PROBES, PROBE_TOKENS = 4, 32  # completions, and tokens of each, whose log-probabilities are compared after a push
_TEXTS = ("Grüße, 世界! 1234 <tag>", "def f(x):\n\treturn x  # two  spaces")  # on which most tokenizers differ
# A seeded request whose prompt is read in parts ends vLLM on a CPU: it rewinds a generator that cannot be rewound.
_WHOLE_PROMPTS = ("--no-enable-chunked-prefill",)
_RESUME = "The run is saved as far as it came; once that is mended, resume it."


def open_vllm(
    policy: Policy,
    settings: SamplingSettings,
    *,
    url: str | None,
    timeout: float,
    folder: Path,
    probe: Prompt,
    context: int,
) -> VllmSampler:
    """The sampler on the server at `url`, or on one that is started here and ends with it.

    timeout: seconds for one answer, and for the start. folder: where weights are handed over, which the server must
    see too; of a server that is started here, server.log stays in it. probe: whose completions are compared after a
    push. context: tokens of the longest prompt and completion.
    RunError: it does not start or answer, or is of another model, tokenizer or type of numbers.
    """
    if url is not None:
        return VllmSampler(policy, settings, Routes(url, timeout, _RESUME), folder, probe)
    python = check_vllm()
    log, folder = folder / "server.log", folder / f"server-{secrets.token_hex(4)}"  # which goes with the server
    write_weights(policy, folder / START)
    options = ["--enable-scale-out"]
    if policy.device.type == "cpu":
        options += ["--enforce-eager", *_WHOLE_PROMPTS, "--max-num-batched-tokens", str(max(2048, context))]
    elif settings.filtered and settings.top_k:
        options.append("--return-sampling-mask")
    kind = str(policy.compute_dtype).removeprefix("torch.")
    server = VllmServer(python, folder, kind, context, log, options)
    try:
        server.wait(timeout)
        routes = Routes(server.url, timeout, f"What it said is in {server.log}. {_RESUME}")
        return VllmSampler(policy, settings, routes, folder, probe, server)
    except BaseException:
        server.close()
        raise


class VllmSampler:
    """Completions by a vLLM server that holds the policy's weights as of the last push."""

    def __init__(
        self,
        policy: Policy,
        settings: SamplingSettings,
        routes: Routes,
        folder: Path,
        probe: Prompt,
        server: VllmServer | None = None,
    ) -> None:
        self.policy, self.settings, self.routes, self.folder, self.probe = policy, settings, routes, folder, probe
        self._server = server
        self._anew = routes.hint if server is not None else f"Restart the server. {routes.hint}"
        self._pushed: int | None = None  # the version that the server has
        self._tag = ""  # names this push in the server's answers, and salts its prefix cache
        self._checksums = Checksums()
        self._measured: dict[str, float] = {}
        self._check_server()

    # -- is it the right server ---------------------------------------------------------------------------------------

    def _check_server(self) -> None:
        """RunError: its tokenizer, numbers or log-probabilities are not the learner's."""
        url = self.routes.url
        info = self.routes.ask("/server_info?config_format=json", optional=True)
        config = _at(info, "vllm_config", "model_config")
        if not isinstance(config, dict):
            raise RunError(
                f"{url} does not say what it runs (/server_info). Start it with VLLM_SERVER_DEV_MODE=1 and "
                "--enable-scale-out, which also opens the routes that weights are sent by."
            )
        kind, wanted = str(config.get("dtype")).removeprefix("torch."), str(self.policy.compute_dtype)
        if kind != wanted.removeprefix("torch."):
            raise RunError(
                f"{url} computes in {kind} and the learner in {wanted.removeprefix('torch.')}: their log-probabilities "
                f"are of different distributions. Start it with --dtype {wanted.removeprefix('torch.')}, or set dtype."
            )
        on_cpu = _at(info, "vllm_config", "device_config", "device_type") == "cpu"
        if on_cpu and _at(info, "vllm_config", "scheduler_config", "enable_chunked_prefill"):
            raise RunError(
                f"{url} computes on a CPU and reads prompts in parts, which ends it as soon as a seeded completion is "
                f"asked for. Start it with {_WHOLE_PROMPTS[0]}."
            )
        plain = self.settings.temperature == 1 and not self.settings.filtered
        if config.get("logprobs_mode") != "processed_logprobs" and not plain:
            raise RunError(
                f"{url} gives log-probabilities from before temperature and filters. Start it with --logprobs-mode "
                "processed_logprobs."
            )
        for text in _TEXTS:
            theirs = _at(self.routes.ask("/tokenize", {"prompt": text, "add_special_tokens": False}), "tokens")
            ours = self.policy.tokenizer(text, add_special_tokens=False)["input_ids"]
            if theirs != list(ours):
                raise RunError(
                    f"{url} has another tokenizer than the policy: of {text!r} it makes {theirs}, and ours makes "
                    f"{list(ours)}. Let it serve the model of the recipe."
                )

    # -- weights ------------------------------------------------------------------------------------------------------

    def push(self) -> dict[str, float]:
        """Send the weights and have it proven that they arrived; nothing where the server has them already.

        RunError: they did not arrive, or not all of them.
        """
        if self._pushed == self.policy.version:
            return self._measured
        self._pushed, version = None, self.policy.version
        self._tag = f"{version}-{secrets.token_hex(4)}"
        folder = (self.folder / f"weights-{self._tag}").absolute()
        write_weights(self.policy, folder)
        try:
            order = {
                "method": "reload_weights", "timeout": self.routes.timeout,
                "kwargs": {"weights_path": str(folder), "is_checkpoint_format": True},
            }  # fmt: skip
            try:
                self.routes.ask("/collective_rpc", order)
                self.routes.ask("/update_weight_version", {"new_version": self._tag}, optional=True)
            except Refused as error:
                raise RunError(
                    f"the weights of version {version} were not taken: {error} It must be a server of this very model, "
                    f"and see the folder {str(self.folder)!r}; its log says more."
                ) from None
            self._measured = self._checked() | self._probed()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._pushed = version
        return self._measured

    def outdated(self) -> None:
        """The policy has other weights than were sent, even if it has the version's number."""
        self._pushed = None

    def _checked(self) -> dict[str, float]:
        """The first witness, where the server has the route."""
        answer = self.routes.ask("/weight_checker", {"action": "checksum"}, optional=True)
        if answer is None:
            return {"push_tensors": 0.0}
        theirs = _at(answer, "checksums")
        if not isinstance(theirs, dict) or not theirs or not all(isinstance(x, str) for x in theirs.values()):
            raise RunError(f"{self.routes.url}/weight_checker gave no checksums. {_RESUME}")
        try:
            equal = self._checksums.check(theirs, digests(self.policy))
        except RunError as error:
            raise RunError(
                f"the weights of version {self.policy.version} did not arrive at {self.routes.url}: {error}. It would "
                f"go on sampling from an old policy. {self._anew}"
            ) from None
        return {"push_tensors": float(equal), "push_tensors_unknown": float(len(theirs) - equal)}

    @torch.no_grad()
    def _probed(self) -> dict[str, float]:
        """The second: a short text's log-probabilities."""
        settings = dataclasses.replace(self.settings, max_tokens=min(PROBE_TOKENS, self.settings.max_tokens), stop=())
        ids = encode_within(self.policy, self.probe, settings)
        texts = [self._written(self.probe, ids, k, 0, -2, settings) for k in range(PROBES)]
        ours = token_outputs(self.policy, texts, settings)
        gaps = torch.cat(
            [(ours.logp[i, : len(r.completion_ids)].cpu() - r.behavior_logp.values).abs() for i, r in enumerate(texts)]
        )
        mean, bound = float(gaps.mean()), BOUNDS[str(self.policy.compute_dtype).removeprefix("torch.")]
        if not mean <= bound:
            raise RunError(
                f"the server's log-probabilities of {len(gaps)} tokens are {mean:.3g} nats from the learner's on "
                f"average, and at most {bound:g} is rounding: the weights of version {self.policy.version} did not "
                f"arrive at {self.routes.url}, or it computes something else. {self._anew}"
            )
        return {"push_gap": mean, "push_gap_most": float(gaps.max()), "push_tokens": float(len(gaps))}

    # -- completions --------------------------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        seed: int,
        step: int,
        on_progress: OnProgress | None = None,
        on_group: OnGroup | None = None,
    ) -> list[Rollout]:
        check_samples(n, self.settings)
        self.push()
        encoded = [encode_within(self.policy, prompt, self.settings) for prompt in prompts]
        groups = Groups(prompts, n, on_group)
        distinct = {prompt.id: (prompt, ids) for prompt, ids in zip(prompts, encoded, strict=True)}
        total = len(distinct) * n
        pool = ThreadPoolExecutor(min(AT_ONCE, total))
        try:
            asked = [
                pool.submit(self._written, prompt, ids, k, seed, step, self.settings)
                for prompt, ids in distinct.values()
                for k in range(n)
            ]
            for done, answer in enumerate(as_completed(asked), start=1):
                groups.add(answer.result())
                if on_progress is not None:
                    on_progress(done, total)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return groups.in_order()

    def _written(
        self, prompt: Prompt, ids: tuple[int, ...], k: int, seed: int, step: int, settings: SamplingSettings
    ) -> Rollout:
        request = {
            "token_ids": list(ids),
            "cache_salt": self._tag,
            "sampling_params": {
                "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k or -1,
                "max_tokens": settings.max_tokens, "stop": list(settings.stop), "logprobs": 0,
                "stop_token_ids": sorted(self.policy.eos_ids), "seed": key_of(seed, step, prompt.key, k) >> 65,
                "detokenize": bool(settings.stop), "skip_special_tokens": False,
            },
        }  # fmt: skip
        answer = self.routes.ask("/inference/v1/generate", request)
        choices = _at(answer, "choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._nonsense("no single choice")
        row = OpenCompletion(prompt, ids, k, np.empty(0))
        self._read(row, choices[0], settings)
        rollout = as_rollout(self.policy, row, settings, distribution_of(self.policy, settings))
        kept = choices[0].get("sampling_mask")
        return rollout if kept is None else dataclasses.replace(rollout, kept=self._kept(kept, row.ids))

    def _read(self, row: OpenCompletion, choice: dict[str, Any], settings: SamplingSettings) -> None:
        """Ids, log-probabilities and finish reason, each checked: nothing of an answer is believed unseen."""
        ids, content = choice.get("token_ids"), _at(choice, "logprobs", "content")
        known = self.policy.model.get_input_embeddings().weight.shape[0]
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < known for i in ids):
            raise self._nonsense(f"token ids that are not all below {known}")
        if not 0 < len(ids) <= settings.max_tokens:
            raise self._nonsense(f"{len(ids)} tokens, where 1 to {settings.max_tokens} were asked for")
        values = [_at(entry, "logprob") for entry in content] if isinstance(content, list) else []
        if len(values) != len(ids) or not all(_is_logp(x) for x in values):
            raise self._nonsense("log-probabilities that are not one number of at most 0 a token")
        if [_at(entry, "token_id") for entry in content] != ids:
            raise self._nonsense("log-probabilities of other tokens than it wrote")
        spans = choice.get("weight_versions")
        tags = {_at(span, "version") for span in spans or []} - {None}
        if tags - {self._tag}:
            raise RunError(
                f"{self.routes.url} sampled from the weights {sorted(map(str, tags))}, and {self._tag!r} were the last "
                f"that were sent: another program sends it weights too? {_RESUME}"
            )
        row.ids, row.logp = ids, [min(float(x), 0.0) for x in values]
        row.finish = self._finish(row, choice, settings)

    def _finish(self, row: OpenCompletion, choice: dict[str, Any], settings: SamplingSettings) -> FinishReason:
        """As the server says, where the ids bear it out."""
        said, why = choice.get("finish_reason"), choice.get("stop_reason")
        if said == "stop" and row.ids[-1] in self.policy.eos_ids:
            return "eos"
        if said == "stop" and isinstance(why, str) and settings.stop and holds_stop(self.policy, row, settings.stop):
            return "stop"
        if said == "length" and len(row.ids) == settings.max_tokens:
            return "length"
        raise self._nonsense(f"finish reason {said!r} ({why!r}) after {len(row.ids)} tokens, which do not end so")

    def _kept(self, kept: Any, ids: list[int]) -> tuple[tuple[int, ...], ...]:
        """The ids that top-k and top-p left, a set for each token."""
        known = self.policy.model.get_input_embeddings().weight.shape[0]
        whole = isinstance(kept, list) and len(kept) == len(ids) and all(isinstance(each, list) for each in kept)
        if not whole or not all(
            i in each and all(type(x) is int and 0 <= x < known for x in each)
            for i, each in zip(ids, kept, strict=True)
        ):
            raise self._nonsense("kept-token sets that do not hold its tokens")
        return tuple(tuple(each) for each in kept)

    def _nonsense(self, what: str) -> RunError:
        died = self._server.tail() if self._server is not None else ""
        return RunError(f"{self.routes.url}/inference/v1/generate answered with {what}. {_RESUME}{died}")

    def gone(self) -> bool:
        """Whether the server was started here, and answers no more."""
        return self._server is not None and self._server.gone()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


def _at(value: Any, *keys: str) -> Any:
    """value[key][key]..., or None where anything on the way is missing."""
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def _is_logp(x: Any) -> bool:
    return isinstance(x, int | float) and math.isfinite(x) and x <= 1e-3  # a sum in float32 may end above 0
