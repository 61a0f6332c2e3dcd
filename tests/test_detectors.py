"""Every detector finds its fault and is silent on health; what it cannot see it does not call healthy."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

import tiny
from lossmith.detectors import (
    DETECTORS,
    FAMILIES,
    Completion,
    Evidence,
    Finding,
    NotChecked,
    StepSeen,
    action_of,
    examine,
    measure,
)
from lossmith.detectors.faults import FAULTS, false_alarms, found, healthy
from lossmith.detectors.measuring import repetition
from lossmith.detectors.signal import without_signal
from lossmith.report.run.doctor_page import page


def evidence(more=None, **series):
    """Steps with these numbers."""
    count = len(next(iter(series.values())))
    steps = [StepSeen(i, {name: float(values[i]) for name, values in series.items()}) for i in range(count)]
    return Evidence(steps, **(more or {}))


def look(name, *given, **series):
    return DETECTORS[name](evidence(*given, **series))


# -- the list ---------------------------------------------------------------------------------------------------------


def test_every_detector_has_a_fault_and_every_fault_a_detector():
    assert FAULTS.keys() == DETECTORS.keys()
    assert sum(map(len, FAMILIES.values())) == len(DETECTORS)


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_a_detector_finds_its_fault_in_five_of_five_seeds_and_says_all_that_is_to_be_said(name):
    for finding in found(name, range(100, 105)):  # other seeds than those of the page
        assert isinstance(finding, Finding) and finding.detector == name
        assert finding.n > 0 and math.isfinite(finding.value) and finding.of and finding.steps
        assert finding.cause and finding.cure and finding.source.startswith(("arXiv:", ""))
        for words in (finding.sentence, finding.cause, finding.cure):
            assert words and not words.endswith(".") and "nan" not in words.split() and "  " not in words
        assert json.loads(json.dumps(finding.as_dict()))["steps"]["count"] == len(finding.steps)


def test_healthy_runs_raise_no_alarm():
    """Other seeds than those of the page."""
    runs = [healthy(seed, steps).evidence() for seed in range(500, 512) for steps in (5, 24)]
    alarms = {name: [f.sentence for f in said if f.level != "note"] for name, said in false_alarms(runs).items()}
    assert {name: said for name, said in alarms.items() if said} == {}


def test_the_page_is_what_the_detectors_do():
    written = (Path(__file__).parent.parent / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert written.startswith(page()), "python -m lossmith.report.run.doctor_page > docs/doctor.md"


# -- what is not known ------------------------------------------------------------------------------------------------


def test_what_is_not_recorded_is_not_checked_and_never_passed():
    bare = examine(evidence(loss=[1.0, 1.0, 1.0]))
    assert bare.passed == () and bare.findings == ()
    assert bare.not_checked.keys() == DETECTORS.keys()
    assert bare.not_checked["entropy_collapse"] == "entropy or sampled_entropy is not recorded"
    assert bare.not_checked["kl_budget"] == "no kl_budget is set"
    assert "is not recorded" in str(bare) and "passed (0): none" in str(bare)


def test_too_few_steps_are_said():
    few = look("entropy_collapse", entropy=[1.0, 1.0])
    assert isinstance(few, NotChecked) and few.reason == "it needs 4 steps, and there are 2"


@pytest.mark.parametrize("gone", ["entropy", "kl", "grad_norm", "sampler_gap", "weight_step", "clipped_above"])
def test_a_number_that_is_left_out_is_missed_by_those_that_read_it_alone(gone):
    made = healthy(3)
    for numbers in made.metrics:
        numbers.pop(gone)
    missing = examine(made.evidence()).not_checked
    reading = {d.name for d in DETECTORS.values() for names in d.reads if names == gone}
    assert reading <= missing.keys()


# -- levels and guards ------------------------------------------------------------------------------------------------


def test_guards_turn_stops_into_warnings_and_warnings_into_stops():
    ill = evidence(entropy=[3.0, 3.0, 3.0, 0.001, 0.001, 0.001], sampler_gap=[0.2] * 6)

    def levels(guards):
        return {f.detector: f.level for f in examine(ill, guards).findings}

    assert levels({}) == {"entropy_collapse": "stop", "sampler_gap": "warn"}
    assert levels({"all": "warn"}) == {"entropy_collapse": "warn", "sampler_gap": "warn"}
    assert levels({"all": "warn", "sampler_gap": "stop"}) == {"entropy_collapse": "warn", "sampler_gap": "stop"}
    assert levels({"entropy_collapse": "off"}) == {"sampler_gap": "warn"}
    assert examine(ill, {"all": "off"}).not_checked["sampler_gap"] == "it is off"


def test_a_note_stays_a_note_whatever_the_guards_say():
    (note,) = examine(evidence(sampler_gap=[0.03] * 3), {"all": "stop"}).findings
    assert note.level == "note"


def test_a_stop_that_a_setting_asks_for_is_not_meant_by_all():
    assert action_of({"all": "warn"}, "kl_budget", {"kl_budget": 2.0}) == ""
    assert action_of({"all": "warn", "kl_budget": "warn"}, "kl_budget", {"kl_budget": 2.0}) == "warn"
    assert action_of({"all": "off"}, "watched_falls", {"watch_window": 0}) == "off"


def test_the_worst_comes_first():
    found_ = examine(evidence(entropy=[3.0] * 3 + [0.001] * 3, sampler_gap=[0.03] * 6, grad_norm=[1.0] * 5 + [90.0]))
    assert [f.level for f in found_.findings] == ["stop", "warn", "note"]
    assert [f.detector for f in found_.at_least("warn")] == ["entropy_collapse", "gradient_spike"]


# -- single rules -----------------------------------------------------------------------------------------------------


def test_one_completion_of_each_prompt_is_no_missing_signal():
    """reinforce with one sample: each group is one completion, which cannot differ from itself."""
    several = dict(groups=[8] * 6, constant_groups=[8] * 6, completions=[8] * 6, reward=[0.3] * 6, reward_std=[0.2] * 6)
    assert look("no_signal", advantage_abs=[0.4] * 6, **several) is None


def test_a_prompt_that_teaches_nothing_is_named():
    rollouts = [Completion(p, f"Prompt {p}?", k, "text", score=float(k * (p == "a"))) for p in "ab" for k in range(4)]
    numbers, places = measure(0, rollouts)
    assert (numbers["groups"], numbers["constant_groups"]) == (2, 1)
    (place,) = places["constant_groups"]
    assert place.prompt == "Prompt b?" and place.said == "all 4 completions scored 0"
    assert not without_signal(numbers)


def test_short_answers_that_are_alike_from_the_start_are_no_collapse():
    assert look("duplicates", same_text=[0.8] * 6) is None
    assert look("duplicates", same_text=[0.1, 0.1, 0.1, 0.8, 0.8, 0.8]).level == "warn"
    assert look("duplicates", same_text=[1.0] * 3, one_text=[0.95] * 3).level == "stop"


def test_clipping_is_told_from_tokens_that_a_mask_leaves_out():
    masked = dict(clip_fraction=[0.8] * 4, clipped_above=[0.03] * 4, clipped_below=[0.02] * 4)
    assert look("mostly_clipped", **masked) is None
    assert look("mostly_clipped", clip_fraction=[0.8] * 4).level == "warn"


def test_steps_without_a_signal_do_not_make_the_next_gradient_a_spike():
    assert look("gradient_spike", grad_norm=[1.0, 0.0, 0.0, 0.0, 1.1, 0.0, 0.9, 1.2, 1.0, 2.0]) is None


def test_ratios_of_one_are_right_where_a_step_makes_one_update():
    one = {"settings": {"updates_per_step": 1, "epochs": 1, "prompts_per_step": 4}}
    many = {"settings": {"updates_per_step": 2, "epochs": 1, "prompts_per_step": 4}}
    assert isinstance(look("ratio_one", one, kl_update=[0.0] * 4), NotChecked)
    assert look("ratio_one", many, kl_update=[0.0] * 4).level == "warn"
    assert look("ratio_one", many, kl_update=[1e-4] * 4) is None


def test_rounding_is_a_note_and_weights_that_do_not_arrive_a_warning():
    assert look("sampler_gap", sampler_gap=[1e-6] * 4) is None
    rounding = look("sampler_gap", sampler_gap=[0.03] * 4, sampler_outside=[0.108] * 4)
    assert rounding.level == "note" and "10.8%" in rounding.sentence and "mismatch='tis'" in rounding.cure
    stale = look("sampler_gap", sampler_gap=[0.01, 0.01, 0.01, 0.1, 0.2, 0.3])
    assert stale.level == "warn" and "did not reach" in stale.cause


def test_a_scorer_that_drifts_voids_the_comparison_and_one_that_is_noisy_does_not():
    def again(low, high, mean, changed=12):
        change = {"mean": mean, "ci95_low": low, "ci95_high": high, "n": 12}
        return {"n": 12, "changed": changed, "change": change, "mean_absolute": 0.3, "spread": 0.5, "claimed": 0.4}

    def said(rescored):
        return DETECTORS["scorer_drift"](dataclasses.replace(evidence(reward=[1.0]), rescored=rescored))

    assert isinstance(said(None), NotChecked) and said(again(0.0, 0.0, 0.0, changed=0)) is None
    assert said(again(0.2, 0.6, 0.4)).voids and said(again(0.2, 0.6, 0.4)).level == "warn"
    assert said(again(None, None, 5.1)).voids  # every score by the same amount: no spread, and no doubt
    noisy = said(again(-0.1, 0.2, 0.05))
    assert noisy.level == "note" and not noisy.voids


def test_the_luck_of_many_windows_is_no_fall():
    """Noise alone: the best of 50 windows lies above the last without anything having fallen."""
    rng = healthy(0).rng
    alarms = 0
    for _ in range(40):
        watched = rng.normal(0.5, 0.05, 50).tolist()
        alarms += look("watched_falls", watch=watched, watch_variance=[0.05**2] * 50) is not None
    assert alarms == 0


def test_a_figure_that_is_no_number_is_found():
    series = evidence(grad_norm=[1.0, 1.0, 1.0], skipped_updates=[0, 0, 0], loss=[0.1, math.nan, 0.1])
    finding = DETECTORS["non_finite"](series)
    assert "loss not finite" in finding.sentence and finding.steps == (1,)


def test_repetition_is_that_of_the_tokens():
    assert repetition(Completion("p", ids=[1, 2, 3, 4] * 5)) > 0.7
    assert repetition(Completion("p", ids=list(range(20)))) == 0
    assert repetition(Completion("p", ids=[1] * 11)) is None  # too short to say
    assert repetition(Completion("p", text="ha " * 30)) > 0.9


def test_huge_scores_are_measured_without_overflow():
    numbers, _ = measure(0, [Completion("p", score=x, sample=i) for i, x in enumerate([1e300, -1e300, 1e300, 0.0])])
    assert all(map(math.isfinite, numbers.values())) and numbers["reward_std"] > 1e299


def test_nothing_is_measured_of_nothing():
    assert measure(0, []) == ({}, {})
    numbers, _ = measure(0, [Completion("p", score=None, error="timeout: 3 s"), Completion("q")])
    assert numbers["dropped"] == 2 and "reward" not in numbers


def test_a_rollout_is_read_as_it_is():
    rollout = tiny.rollouts()[0]
    completion = Completion.of(rollout)
    assert completion.length == len(rollout.completion_ids) and completion.truncated == rollout.truncated
