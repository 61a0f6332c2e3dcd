"""Random inputs: ragged, with groups of one, zero and negative advantages, and no ratio next to a bound."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from live_case import Case, Fields, Params

MARGIN = 1e-4  # no ratio or statistic closer than this to a bound: at a kink, gradients are a convention
ATTEMPTS = 200
REWARD_FIELDS = {"reward", "token_reward", "group"}


def draw(case: Case, seed: int) -> tuple[Fields, Params]:
    """Inputs and parameters of this case and seed: the first draw that keeps away from every kink."""
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([zlib.crc32(str(case).encode()), seed, attempt])
        params = case.params(rng)
        fields = draw_fields(case, rng)
        if int(fields["mask"].sum()) >= 2 and not near_kink(fields, params):
            return fields, params
    raise AssertionError(f"{case}: no draw away from the kinks in {ATTEMPTS} attempts")


def draw_fields(case: Case, rng: np.random.Generator) -> Fields:
    n, t = int(rng.integers(1 if case.singletons else 2, 7)), int(rng.integers(1, 34))
    fields = {"mask": draw_mask(rng, n, t, case.empty_rows)}
    if REWARD_FIELDS & set(case.fields):
        return fields | draw_rewards(case, rng, n, t)
    if "old_value" in case.fields:
        old, returns = rng.normal(size=(2, n, t))
        return fields | tensors(value=old + rng.normal(size=(n, t)), old_value=old, returns=returns)
    fields |= draw_log_probs(rng, n, t)
    shape = (n, t) if case.token_advantage else (n,)
    advantage = rng.normal(size=shape) * (rng.random(shape) > 0.15)
    fields |= tensors(advantage=-np.abs(advantage) if rng.random() < 0.15 else advantage)
    # in float32 first: TRL takes the quantile there, and a quantile may be one of the entropies
    fields |= tensors(entropy=rng.exponential(size=(n, t)).astype(np.float32))
    if case.loss == "kl_only":
        fields.pop("advantage"), fields.pop("old_logp")
    kept = {"logp", "old_logp", "mask", "advantage", *case.fields}
    return {name: value for name, value in fields.items() if name in kept}


def tensors(**arrays: np.ndarray) -> Fields:
    return {name: torch.from_numpy(np.asarray(array, dtype=np.float64)) for name, array in arrays.items()}


def draw_mask(rng: np.random.Generator, n: int, t: int, empty_rows: bool) -> Tensor:
    """Ragged rows; every second draw also has holes, as tool output leaves them."""
    lengths = rng.integers(1, t + 1, size=n)
    mask = np.arange(t)[None] < lengths[:, None]
    if rng.random() < 0.5:
        first = np.arange(t)[None] == 0
        mask &= (rng.random((n, t)) < 0.8) | first
    if empty_rows and n > 1 and rng.random() < 0.5:
        mask[rng.integers(n)] = False
    return torch.from_numpy(mask)


def draw_log_probs(rng: np.random.Generator, n: int, t: int) -> Fields:
    """Log-probabilities of four policies, all negative; log-ratios up to 0.05, 0.5 or 1.5.

    Part of a log-ratio is common to its row in two draws of three: else the ratios of sequences would stay at 1.
    """
    spread = rng.choice([0.05, 0.5, 1.5], p=[0.1, 0.3, 0.6])
    common = rng.choice([0.0, 0.3, 0.7])
    base = -0.02 - 2.5 * rng.random((n, t))

    def log_ratio() -> np.ndarray:
        own, of_row = rng.uniform(-spread, spread, size=(n, t)), rng.uniform(-spread, spread, size=(n, 1))
        return common * of_row + (1 - common) * own

    def near(x: np.ndarray) -> np.ndarray:
        return np.minimum(x + log_ratio(), -0.01)

    ratio = log_ratio()
    old = base + np.minimum(-ratio, 0)

    logp = base + np.minimum(ratio, 0)
    return tensors(logp=logp, old_logp=old, behavior_logp=near(old), ref_logp=near(logp))


def draw_rewards(case: Case, rng: np.random.Generator, n: int, t: int) -> Fields:
    """Rewards of completions or tokens; groups of any size, some of one, some with all rewards equal."""
    fields: Fields = {}
    if "token_reward" in case.fields:
        fields |= tensors(reward=rng.normal(size=(n, t)))
    else:
        reward = rng.choice([0.0, 0.25, 0.5, 1.0], size=n) if rng.random() < 0.5 else rng.normal(size=n)
        fields |= tensors(reward=reward)
    if "reward_greedy" in case.fields:
        fields |= tensors(reward_greedy=rng.normal(size=n))
    if "value" in case.fields:
        fields |= tensors(value=rng.normal(size=(n, t)))
    if "group" in case.fields:
        group = rng.integers(0, max(1, n // 2) + 1, size=n)
        if not case.singletons:
            sizes = np.bincount(group)
            group = np.where(sizes[group] == 1, group.max() + 1, group)  # the lonely ones make one group
            if np.bincount(group)[group].min() == 1:
                group = np.zeros(n, dtype=int)
        fields["group"] = torch.from_numpy(group)
    return fields


def close(x: np.ndarray, bounds: list[float | None]) -> bool:
    return any(bool((np.abs(x - bound) < MARGIN).any()) for bound in bounds if bound is not None)


def near_kink(fields: Fields, params: Params) -> bool:
    x = {name: value.numpy() for name, value in fields.items()}
    if "value_clip" in params:
        return close((x["value"] - x["old_value"])[x["mask"]], [params["value_clip"], -params["value_clip"]])
    if params.get("advantage_scale") == "whiten" and "group" in x:
        return _constant_credit(x)
    if "old_logp" not in x:
        return False
    return _near_ratio_bound(x, params) or _near_mask_bound(x, params) or _near_choice(x, params)


def _constant_credit(x: dict[str, np.ndarray]) -> bool:
    """All rows have one advantage before whitening: zeros divided by nothing (test_live_differences has the case)."""
    same = x["group"][:, None] == x["group"]
    mean = same @ x["reward"] / same.sum(1)
    return bool(np.ptp(np.where(same.sum(1) > 1, x["reward"] - mean, x["reward"])) < 1e-6)


def _statistics(delta: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Log-ratios of tokens, and of sequences as mean and as sum."""
    delta, live = np.where(mask, delta, 0.0), mask.any(1)
    total = delta.sum(1)[live]
    return [delta[mask], total / mask.sum(1)[live], total]


def _near_ratio_bound(x: dict[str, np.ndarray], params: Params) -> bool:
    low, high = params.get("clip_low"), params.get("clip_high")
    bounds = [params.get("dual_clip"), params.get("cap")]
    bounds += [None if low is None else 1 - low, None if high is None else 1 + high]
    for log_ratio in _statistics(x["logp"] - x["old_logp"], x["mask"]):
        if close(np.exp(np.minimum(log_ratio, 20)), bounds):
            return True
        log_bounds = [None if low is None else -low, high]  # gmpo's bounds are bounds of the log-ratio
        if close(log_ratio, log_bounds) or (np.abs(log_ratio) > 18).any():  # beyond: the clamps, which differ
            return True
    return False


def _near_mask_bound(x: dict[str, np.ndarray], params: Params) -> bool:
    get, mask = params.get, x["mask"]
    if "delta_low" in params:
        p, q = np.exp(x["logp"]), np.exp(x["old_logp"])
        binary = q * (x["old_logp"] - x["logp"]) + (1 - q) * np.log((1 - q) / (1 - p))
        if close((p - q)[mask], [-get("delta_low"), get("delta_high")]) or close(
            binary[mask], [get("delta_low"), get("delta_high")]
        ):
            return True
    if "behavior_logp" in x:
        low, high = get("mismatch_low"), get("mismatch_high")
        token, _, sequence = _statistics(x["old_logp"] - x["behavior_logp"], mask)
        rho = np.exp(np.minimum(sequence if get("mismatch_level") == "sequence" else token, 20))
        # verl's metrics divide by zero where its IcePop keeps nothing
        if close(rho, [low, high]) or (low is not None and not ((rho > low) & (rho < high)).any()):
            return True
        drift = _statistics(x["behavior_logp"] - x["logp"], mask)[1]
        if close(drift, [get("opsm_delta")]):
            return True
    return False


def _near_choice(x: dict[str, np.ndarray], params: Params) -> bool:
    """Ties and near-ties where tokens are chosen by rank."""
    mask, count = x["mask"], int(x["mask"].sum())
    if "fraction" in params:
        advantage = np.broadcast_to(x["advantage"].reshape(len(mask), -1), mask.shape)[mask]
        if np.ptp(advantage) == 0:  # every covariance is zero: all tie
            return True
        logp = x["logp"][mask]
        covariance = (advantage - advantage.mean()) * (logp - logp.mean())
        ranked = np.sort(covariance)[::-1]
        chosen = max(1, int(params["fraction"] * count))
        tie = chosen < count and ranked[chosen - 1] - ranked[chosen] < 1e-9
        return tie or close(covariance, [params.get("cov_low"), params.get("cov_high")])
    if "top_entropy" in params:  # the quantile is an entropy itself: rounding would decide
        place = (count - 1) * (1 - params["top_entropy"])
        return count > 1 and abs(place - round(place)) < 1e-3
    return False
