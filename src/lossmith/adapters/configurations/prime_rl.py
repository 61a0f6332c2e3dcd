"""prime-rl's TOML -> the loss of its trainer, read in `configs/trainer.py`, `trainer/rl/loss.py` and
`orchestrator/algo/` at commit 559b447.
"""

from __future__ import annotations

from typing import Any

from lossmith.adapters.configurations.reading import Settings, Trainer
from lossmith.adapters.configurations.source import Source
from lossmith.errors import quiet_traps
from lossmith.losses import Loss, get_loss

__all__ = ["TRAINER"]

DEFAULTS: dict[str, Any] = {
    "trainer.loss.type": "default",
    "trainer.loss.dppo_mask_low": 0.2,
    "trainer.loss.dppo_mask_high": 0.2,
    "trainer.loss.ipo_threshold": 0.1,
    "trainer.loss.adv_tau": 1.0,
    "trainer.loss.kl_tau": 1e-3,
    "orchestrator.algo.type": "grpo",
    "orchestrator.algo.length_penalty": None,
    "orchestrator.algo.decay": 0.95,
    "orchestrator.train.filter_zero_advantages": True,
}

_TABLES = """
    inference model deployment monitors ckpt log slurm weight_broadcast rollout_transport tokenizer resume run env_vars
    output_dir clean max_steps seq_len dry_run experimental trainer orchestrator
"""
TABLES = frozenset(_TABLES.split())
OF_LOSS = ("trainer.loss", "orchestrator.algo", "orchestrator.train.source", "orchestrator.train.filter")

PRESET = {"default": "dppo@prime_rl", "ipo": "ipo@prime_rl"}
ALGORITHMS = ("grpo", "max_rl", "rae")  # whose tokens go through trainer.loss and nothing else


def _spelled(source: Source) -> Source:
    """On the command line an underscore may be a dash; a table that only names its kind has no settings."""
    return source.renamed({name: name.replace("-", "_") for name in source.settings})


def _loss(s: Settings) -> Loss:
    if s.given("@"):
        s.refuse("@", f"what {s.source.settings['@']} sets is not in this script: read that file")
    kind = s.word("trainer.loss.type", PRESET)
    algorithm = s.word("orchestrator.algo.type", ALGORITHMS)
    with quiet_traps():
        start = get_loss(PRESET[kind])
    changes: dict[str, Any] = {
        "advantage_mul": s.must("trainer.loss.adv_tau"),
        "coef": s.must("trainer.loss.kl_tau"),
        "advantage": {"grpo": "group", "max_rl": "maxrl", "rae": "baseline"}[algorithm],
    }
    if kind == "ipo":
        changes["delta"] = s.must("trainer.loss.ipo_threshold")
    else:
        changes["delta_low"] = s.must("trainer.loss.dppo_mask_low")
        changes["delta_high"] = s.must("trainer.loss.dppo_mask_high")
    if algorithm == "rae":
        s.note(
            f"rae: the baseline b is the moving mean of a role's rewards, decay {s.must('orchestrator.algo.decay'):g}."
        )
    if algorithm == "grpo":
        _penalty(s)
    if s.flag("orchestrator.train.filter_zero_advantages"):
        changes["group_filter"] = "zero_variance" if algorithm != "rae" else "none"
        s.note(
            "filter_zero_advantages, which is on unless set: completions whose advantage is 0 leave the batch and its "
            "count of tokens. Here that is the groups in which every reward is the same."
        )
    _sources(s)
    return s.build(start, changes)


def _penalty(s: Settings) -> None:
    name = "orchestrator.algo.length_penalty"
    given = [x for x in s.source.settings if x == name or x.startswith(f"{name}.")]
    for setting in given:
        if s.source.settings[setting] is not None:
            s.refuse(setting, "a penalty of length, input and turns is taken off the reward before the group's mean")


def _sources(s: Settings) -> None:
    """Environments may have an algorithm of their own."""
    sources = s.source.settings.get("orchestrator.train.source")
    for i, source in enumerate(sources if isinstance(sources, list) else []):
        own = source.get("algo") if isinstance(source, dict) else None
        if isinstance(own, dict) and own.get("type", "grpo") != s.raw("orchestrator.algo.type"):
            s.refuse(f"orchestrator.train.source[{i}].algo", f"it has a loss of its own, {own.get('type')}")


def _elsewhere(name: str) -> bool:
    if name.startswith(OF_LOSS):
        return name == "orchestrator.train.source"
    return name.partition(".")[0] in TABLES


TRAINER = Trainer(
    name="prime_rl",
    version="559b447",
    title="prime-rl",
    defaults=DEFAULTS,
    elsewhere=_elsewhere,
    own=lambda name: name.startswith(("orchestrator.", "trainer.loss.")),
    programs=(),
    loss=_loss,
    settings=_spelled,
)
