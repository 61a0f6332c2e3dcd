"""The numbers of a step that only its completions tell, each with an example of what it counts.

Those that a run's losses measure too (groups, advantages, the sampler's gap) are taken from completions where a file of
another trainer holds nothing else.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence

from lossmith.detectors.evidence import Completion, Place
from lossmith.intervals import ALIKE, alike

__all__ = ["BAND", "measure"]

GRAM = 4  # tokens or words whose repetition counts
REPEATS = 0.5  # share of a text's 4-grams that were there before, from which it is a loop; prose stays below 0.1
SHORTEST = 12  # tokens or words below which nothing can be said of repetition
BAND = (0.9, 1.1)  # of ratios that pass as "on the policy": what others count as too
# control characters other than line breaks and tabs, and what a wrong decoding leaves
_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
_LIMIT = 20.0  # nats beyond which a ratio is not told from infinity

Numbers = dict[str, float]
Places = dict[str, list[Place]]


def measure(step: int, completions: Sequence[Completion]) -> tuple[Numbers, Places]:
    """(numbers, places) of one step; a number is there where the completions tell it."""
    numbers: Numbers = {}
    places: Places = {}
    if completions:
        _scores(step, completions, numbers, places)
        _groups(step, completions, numbers, places)
        _texts(step, completions, numbers, places)
        _lengths(step, completions, numbers, places)
        _log_probs(completions, numbers)
    return numbers, places


def _scores(step: int, completions: Sequence[Completion], numbers: Numbers, places: Places) -> None:
    scored = [c for c in completions if c.score is not None]
    numbers["dropped"] = len(completions) - len(scored)
    failed = [c for c in completions if c.error]
    places["dropped"] = [Place.of(step, c, c.error or "") for c in failed[:2]]
    if not scored:
        return
    values = [float(c.score) for c in scored if c.score is not None]
    mean, spread = _mean_and_spread(values)
    numbers |= {"completions": len(values), "reward": mean, "reward_std": spread}
    least, most = min(values), max(values)
    numbers |= {"score_least": least, "score_most": most}
    numbers["score_at_least"] = sum(v == least for v in values) / len(values)
    numbers["score_at_most"] = sum(v == most for v in values) / len(values)
    far = max(scored, key=lambda c: abs(float(c.score or 0) - numbers["reward"]))
    others = [float(c.score or 0) for c in scored if c is not far]
    if len(others) > 1 and not alike(others):
        mean, spread = _mean_and_spread(others)
        numbers["score_outlier"] = min(abs(float(far.score or 0) - mean) / spread, 1e9)
        places["score_outlier"] = [Place.of(step, far, f"score {far.score:g}")]
    places["score_most"] = [Place.of(step, max(scored, key=lambda c: abs(float(c.score or 0))), "")]
    places["reward"] = [Place.of(step, c, f"score {c.score:g}") for c in scored[:2]]


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the standard deviation of these values alone; 0 where they differ by rounding."""
    mean = math.fsum(values) / len(values)
    size = max(map(abs, values)) or 1.0  # scaled, for squares of 1e200 are no numbers
    return mean, 0.0 if alike(values) else size * math.sqrt(
        math.fsum(((v - mean) / size) ** 2 for v in values) / len(values)
    )


def _groups(step: int, completions: Sequence[Completion], numbers: Numbers, places: Places) -> None:
    """What the completions of one prompt say beside one another."""
    groups: dict[str, list[Completion]] = defaultdict(list)
    for c in completions:
        if c.score is not None:
            groups[c.prompt].append(c)
    several = [g for g in groups.values() if len(g) > 1]
    constant = [g for g in several if alike([float(c.score or 0) for c in g])]
    if groups:
        numbers |= {"groups": len(groups), "constant_groups": len(groups) - len(several) + len(constant)}
        places["constant_groups"] = [
            Place.of(step, g[0], f"all {len(g)} completions scored {g[0].score:g}") for g in constant
        ]
    advantages = [abs(c.advantage) for c in completions if c.advantage is not None]
    # zeros beside scores that differ are those of a loss that has no advantages
    if any(advantages) or (advantages and len(constant) == len(several)):
        numbers["advantage_abs"] = statistics.fmean(advantages)
    against = pairs = 0
    for g in several:
        known = [c for c in g if c.advantage is not None]
        size = ALIKE * max([abs(float(c.score or 0)) for c in known] + [1e-300])
        for i, a in enumerate(known):
            for b in known[i + 1 :]:
                rise = float(a.score or 0) - float(b.score or 0)
                lean = float(a.advantage or 0) - float(b.advantage or 0)
                if abs(rise) > size and lean:
                    pairs += 1
                    against += (rise > 0) != (lean > 0)
                    if (rise > 0) != (lean > 0) and "discordant" not in places:
                        low, high = (a, b) if rise < 0 else (b, a)
                        said = f"score {low.score:g}, advantage {low.advantage:+.3g}; another of this prompt: score "
                        places["discordant"] = [Place.of(step, low, f"{said}{high.score:g}, {high.advantage:+.3g}")]
    if pairs:
        numbers |= {"discordant": against / pairs, "pairs_compared": pairs}


def _texts(step: int, completions: Sequence[Completion], numbers: Numbers, places: Places) -> None:
    texts = [c for c in completions if c.text is not None]
    if not texts:
        return
    n = len(texts)
    odd_prompts = {p: c for p, c in {c.prompt: c for c in texts}.items() if _ODD.search(c.prompt_text)}
    numbers["odd_prompts"] = len(odd_prompts)
    places["odd_prompts"] = [Place.of(step, c) for c in list(odd_prompts.values())[:3]]
    empty = [c for c in texts if not (c.text or "").strip()]
    numbers["empty"] = len(empty) / n
    places["empty"] = [Place.of(step, c, f"{c.length} token{'s' * (c.length != 1)}") for c in empty[:1]]
    mine = Counter((c.prompt, c.text) for c in texts)
    same = [c for c in texts if mine[c.prompt, c.text] > 1]
    numbers["same_text"] = len(same) / n
    places["same_text"] = [Place.of(step, c, f"{mine[c.prompt, c.text]} times for this prompt") for c in same[:1]]
    (text, times), prompts = Counter(c.text for c in texts).most_common(1)[0], {c.prompt for c in texts}
    if len(prompts) > 1:
        numbers["one_text"] = times / n
        common = next(c for c in texts if c.text == text)
        places["one_text"] = [Place.of(step, common, f"{times} of {n} completions are this text")]
    loops = [(share, c) for c in texts if (share := repetition(c)) is not None]
    if loops:
        caught = [c for share, c in loops if share >= REPEATS]
        numbers["repetitive"] = len(caught) / n
        places["repetitive"] = [Place.of(step, c) for c in caught[:2]]


def repetition(completion: Completion) -> float | None:
    """Share of its 4-grams of tokens (of words, where no tokens are known) that repeat an earlier one."""
    pieces: Sequence[object] = completion.ids if completion.ids is not None else (completion.text or "").split()
    if len(pieces) < SHORTEST:
        return None
    grams = [tuple(pieces[i : i + GRAM]) for i in range(len(pieces) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams)


def _lengths(step: int, completions: Sequence[Completion], numbers: Numbers, places: Places) -> None:
    lengths = [c.length for c in completions if c.length is not None]
    if lengths:
        numbers["length"] = statistics.fmean(lengths)
    told = [c for c in completions if c.truncated is not None]
    if told:
        cut = [c for c in told if c.truncated]
        numbers["ended"] = 1 - len(cut) / len(told)
        places["ended"] = [Place.of(step, c, f"cut at {c.length} tokens") for c in cut[:1]]
    both = [(float(c.score), float(c.length)) for c in completions if c.score is not None and c.length is not None]
    if len(both) > 2 and not alike([s for s, _ in both]) and not alike([n for _, n in both]):
        numbers["length_correlation"] = statistics.correlation(*zip(*both, strict=True))


def _log_probs(completions: Sequence[Completion], numbers: Numbers) -> None:
    """Of the sampled tokens: the sampler's entropy, and how far it is from the learner, where a file holds both."""
    sampled = [x for c in completions for x in c.behavior_logp or () if x is not None and math.isfinite(x)]
    if sampled:
        numbers["sampled_entropy"] = -statistics.fmean(sampled)
    gaps = [
        new - old
        for c in completions
        if c.old_logp is not None and c.behavior_logp is not None and len(c.old_logp) == len(c.behavior_logp)
        for new, old in zip(c.old_logp, c.behavior_logp, strict=True)
        if math.isfinite(new) and math.isfinite(old)
    ]
    if gaps:
        ratios = [math.exp(max(-_LIMIT, min(_LIMIT, gap))) for gap in gaps]
        numbers["sampler_gap"] = statistics.fmean(map(abs, gaps))
        numbers["sampler_outside"] = sum(not BAND[0] <= r <= BAND[1] for r in ratios) / len(ratios)
        numbers["ess"] = sum(ratios) ** 2 / (len(ratios) * sum(r * r for r in ratios))
        numbers["tokens"] = len(gaps)
