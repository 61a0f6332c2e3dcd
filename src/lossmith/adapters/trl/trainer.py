"""TRL's GRPOTrainer with a loss of Lossmith: TRL samples, scores and steps, Lossmith says what is minimized."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossmith.adapters.trl.settings import beta_of, check_settings, loss_for
from lossmith.errors import LossError
from lossmith.losses import Batch, Credit, LossOutput, Normalizer, PolicyLoss

try:
    from trl import GRPOConfig, GRPOTrainer, __version__

    if [int(x) for x in re.findall(r"\d+", __version__)[:2]] < [1, 16]:
        raise ImportError(f"here is {__version__}")
except ImportError as error:
    raise LossError(f"the adapter for TRL needs TRL 1.16 or newer ({error}): pip install lossmith[trl]") from None

__all__ = ["LossmithGRPOTrainer", "batch_fields", "native_metrics"]

_log = logging.getLogger("lossmith")
_FIELD, _CREDIT = "lossmith_batch_", "lossmith_credit_"  # what travels with its rows through TRL's shuffle and split
# What TRL's forward pass is told of images, where a batch has any.
_IMAGES = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
_METRIC = "lossmith/"
_OF_UPDATE = ("loss", "grad_norm", "learning_rate")
_TRL_NAMES = {"kl_ref": "kl", "entropy": "entropy", "clip_fraction": "clip_ratio/region_mean"}  # what TRL's users plot


class LossmithGRPOTrainer(GRPOTrainer):
    """GRPOTrainer(..., loss="dppo_tv"), with any loss of Lossmith that TRL can feed.

    loss: a Loss, a name, "name@library", "name(parameter=value)", "file.py:function", or a function of your own whose
    first parameter is `batch`. Everything else is as in GRPOTrainer, except what only TRL's own loss reads: where
    GRPOConfig sets one of these, it is refused. `beta` is the loss's own; a loss that needs a reference gets one.

    The credit half of the loss runs once on each generation batch, of all processes; what it gives travels with its
    rows. The objective half runs on each micro-batch, and the gradients of all add up to that of the whole, however
    it was cut. As in TRL, one normalizer serves all updates that share a generation batch.

    Where no sampler says otherwise (vLLM does), the behavior policy is the old one. A completion that no reward
    function scored leaves its group, and nothing is learned from it. `mask_truncated_completions` takes truncated
    completions out of any loss; their rewards stay in their groups.

    LossError, before the model is loaded: no such loss; one that needs what TRL does not have (a critic, say); one
    that looks at a whole update, where an update is more than one micro-batch; settings that would not be used.
    """

    _keeps_old = False  # whether old log-probabilities are wanted where the loss reads none

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *given: Any, loss: Any, **more: Any
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = GRPOConfig(f"{Path(name).name}-GRPO")
        self.loss = loss_for(loss, args)
        check_settings(self.loss, args)
        args = copy.copy(args)
        args.beta = self._trl_beta()
        if args.use_vllm and "behavior_logp" not in self.loss.needs:
            _log.warning(
                "%s does not correct for the difference between vLLM and the trainer: mismatch='icepop' or 'tis' does.",
                self.loss.name,
            )
        super().__init__(model, reward_funcs, args, *given, **more)

    def _trl_beta(self) -> float:
        return beta_of(self.loss)

    # -- the credit half: a generation batch of all processes -------------------------------------------------------

    def _generate(self, prompts: list[Any]) -> Any:
        found = super()._generate(prompts)
        self._written = found[1], found[2]  # ids and tool masks, before those of truncated completions are emptied
        return found

    def _calculate_rewards(self, *given: Any, **named: Any) -> Tensor:
        self._parts: Tensor = super()._calculate_rewards(*given, **named)  # [rows of all processes, reward functions]
        return self._parts

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        out: dict[str, Any] = super()._generate_and_score_completions(inputs)
        local = self._fields(out)
        weights = self.reward_weights.to(self._parts.device)
        reward = (self._parts * weights).nansum(1)
        scored = ~self._parts.isnan().all(1)
        group = torch.arange(len(reward), device=reward.device) // self._per_prompt()
        n, t = local["mask"].shape
        mine = slice(self.accelerator.process_index * n, (self.accelerator.process_index + 1) * n)

        written, counted = self._all(self._written_mask(out)), self._all(local["mask"])
        written, counted = written & scored[:, None], counted & scored[:, None]
        whole = {name: self._all(x) for name, x in local.items() if name != "mask"}
        whole |= {"reward": reward, "group": group, "lag": torch.zeros_like(group)}
        if "reward_parts" in self.loss.needs:
            whole["reward_parts"] = self._every_part(scored)
        credit = self._credit(Batch(mask=written, **whole), counted)

        local |= {name: whole[name][mine] for name in whole.keys() - local.keys()} | {"mask": counted[mine, :t]}
        out |= {_FIELD + name: x for name, x in local.items()}
        out |= {_CREDIT + name: x[mine, :t] for name, x in credit.parts.items()}
        out["lossmith_tokens"] = counted.sum()
        self._log_credit(credit, counted)
        return out

    def _fields(self, out: dict[str, Any]) -> dict[str, Tensor]:
        """What this process's rows have of a Batch: mask and log-probabilities [n, t], truncated [n]."""
        mask = (out["completion_mask"] * out.get("tool_mask", 1)).bool()
        old: Any = out.get("old_per_token_logps")
        sampled = out.get("sampling_per_token_logps")
        reads = self._keeps_old or {"old_logp", "behavior_logp"} & self.loss.needs or self.loss.kl.in_reward
        if old is None and (reads or sampled is not None):
            train = self.model.training
            size = self.args.per_device_train_batch_size if train else self.args.per_device_eval_batch_size
            with torch.no_grad():
                old, _, _ = self._log_probs(self.model, out, batch_size=size)
        behavior = old if sampled is None else torch.where(sampled.isnan(), old, sampled)  # NaN: vLLM could not say
        ends = (*self.eos_token_ids, self._tokenizer.pad_token_id)
        cut = [ids[-1] not in ends for ids in self._written[0]]
        found = {"old_logp": old, "behavior_logp": behavior, "ref_logp": out.get("ref_per_token_logps")}
        fields = {name: x.float() for name, x in found.items() if x is not None}
        return fields | {"mask": mask, "truncated": torch.tensor(cut, device=mask.device)}

    def _written_mask(self, out: dict[str, Any]) -> Tensor:
        """[n, t]: what the policy wrote, of truncated completions too."""
        ids, tools = self._written
        mask = torch.zeros_like(out["completion_mask"], dtype=torch.bool)
        for i, row in enumerate(ids):
            mask[i, : len(row)] = True if tools is None else torch.tensor(tools[i], dtype=torch.bool)
        return mask

    def _all(self, x: Tensor) -> Tensor:
        """Rows of all processes, [n, t] padded to the longest."""
        if x.ndim == 2:
            width = int(self.accelerator.gather(torch.tensor([x.shape[1]], device=x.device)).max())
            x = torch.nn.functional.pad(x, (0, width - x.shape[1]))
        gathered: Tensor = self.accelerator.gather(x)
        return gathered

    def _per_prompt(self) -> int:
        return int(self.num_generations if self.model.training else self.num_generations_eval)

    def _every_part(self, scored: Tensor) -> Tensor:
        """[N, K]; a score that is missing adds nothing to a sum, and cannot be compared."""
        missing = self._parts.isnan() & scored[:, None]
        summed = isinstance(self.loss, PolicyLoss) and "reward_parts" not in self.loss.advantage.needs
        if not summed and bool(missing.any()):
            name = self.reward_func_names[int(missing.any(0).nonzero()[0])]
            raise LossError(
                f"{self.loss.name} compares the scores of each reward function, and {name} gave none for "
                f"{int(missing.any(1).sum())} of {len(scored)} completions: let it return a number."
            )
        return self._parts.nan_to_num()

    def _credit(self, whole: Batch, counted: Tensor) -> Credit:
        """The credit of all rows. counted: [N, T], without what mask_truncated_completions takes out of the loss."""
        counts: Normalizer | None = None
        if self.args.mask_truncated_completions and isinstance(self.loss, PolicyLoss):
            # as TRL does: those completions count, their tokens do not
            tokens = self.loss.counts(whole.replace(mask=counted)).tokens
            counts = dataclasses.replace(self.loss.counts(whole), tokens=tokens)
        credit = self.loss.credit(whole, counts)
        weights: dict[str, Any] = {name: x for name, x in credit.parts.items() if name.endswith("weight")}
        left: dict[str, Any] = {name: torch.where(counted, x, 0.0) for name, x in weights.items()}
        return dataclasses.replace(credit, **left)

    def _log_credit(self, credit: Credit, counted: Tensor) -> None:
        """Metrics, and the advantages really used, in TRL's own places."""
        mode = "train" if self.model.training else "eval"
        for name, value in credit.metrics.items():
            self._metrics[mode][_METRIC + name].append(value)
        used = (credit.advantage.sum(1) / counted.sum(1).clamp(min=1)).tolist()
        table = self._logs["advantages"]
        for _ in range(min(len(used), len(table))):
            table.pop()
        table.extend(used)

    # -- the objective half: a micro-batch --------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        logp, entropy, aux_loss = self._log_probs(
            model, inputs, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        parts = {name.removeprefix(_CREDIT): x for name, x in inputs.items() if name.startswith(_CREDIT)}
        batch = Batch(logp=logp.float(), entropy=entropy.float(), **batch_fields(inputs))
        credit = Credit(returns=None, tokens=int(inputs["lossmith_tokens"]), **parts)
        train = self.model.training
        accumulated = self.current_gradient_accumulation_steps if train else 1
        # Gradients and metrics are averaged over micro-batches and processes, and sums over a generation batch are
        # meant; only a loss with a local normalizer is itself a mean over micro-batches.
        shares = self.accelerator.num_processes * (self.args.steps_per_generation if train else 1)
        if isinstance(self.loss, PolicyLoss) and self.loss.local_normalizer:
            credit, shares = self.loss.as_whole(credit, batch), 1
        found = self.loss.objective(batch, credit)
        self._log_objective(found, shares, aux_loss)
        loss = found.loss.to(logp.dtype) * shares / accumulated
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulated
        return loss

    def _log_probs(self, model: Any, inputs: dict[str, Any], **how: Any) -> tuple[Tensor, Any, Any]:
        """Log-probabilities [n, t] of the completions, and what else TRL's forward pass is asked for."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        images = {name: inputs[name] for name in _IMAGES if inputs.get(name) is not None}
        found: tuple[Tensor, Any, Any] = self._get_per_token_logps_and_entropies(
            model, ids, attention, inputs["completion_ids"].shape[1], **how, **images
        )
        return found

    def _log_objective(self, found: LossOutput, shares: int, aux_loss: Tensor | None) -> None:
        terms = {f"loss_{name}": float(term.detach()) for name, term in found.terms.items()}
        values = terms | found.metrics
        mean = torch.tensor(list(values.values()), dtype=torch.float32, device=found.loss.device) * shares
        mean = self.accelerator.reduce(mean, reduction="mean")
        log = self._metrics["train" if self.model.training else "eval"]
        for name, value in zip(values, mean.tolist(), strict=True):
            log[_TRL_NAMES.get(name, _METRIC + name)].append(value)
        if aux_loss is not None:
            log["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())


def batch_fields(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What a batch of TRL's carries of the fields of Batch."""
    return {name.removeprefix(_FIELD): x for name, x in inputs.items() if name.startswith(_FIELD)}


def native_metrics(logs: dict[str, Any]) -> dict[str, float]:
    """Of what TRL logs for an update, that which Lossmith's own loop measures too, by its names."""
    ours = {theirs: name for name, theirs in _TRL_NAMES.items()} | {name: name for name in _OF_UPDATE}
    found = {ours.get(name, name.removeprefix(_METRIC)): x for name, x in logs.items() if x is not None}
    return {name: float(x) for name, x in found.items() if name in ours.values() or _METRIC + name in logs}
