"""The weekly comparison says nothing of the pinned versions, and names what is changed on purpose."""

import dataclasses

import pytest

pytest.importorskip("trl", reason="needs tests/live/setup")
pytest.importorskip("verl", reason="needs tests/live/setup")

import drift
import live_trl
from lossmith.adapters.configurations import trl, verl

pytestmark = pytest.mark.parity


def test_the_pinned_versions_have_not_drifted(capsys):
    assert drift.main() == 0, capsys.readouterr().out


def test_a_changed_default_and_a_new_setting_are_named(monkeypatch):
    monkeypatch.setitem(trl.DEFAULTS, "epsilon", 0.3)
    monkeypatch.setattr(trl, "ELSEWHERE", trl.ELSEWHERE - {"temperature"})
    first, second = drift.of_trl()
    assert first == "TRL: epsilon is 0.2 by default, and 0.3 here"
    assert second == "TRL: there is a new setting temperature (default 1.0): is it of the loss?"


def test_a_changed_default_of_verl_and_one_that_is_gone_are_named(monkeypatch):
    name = "actor_rollout_ref.actor.clip_ratio"
    monkeypatch.setitem(verl.DEFAULTS, name, 0.25)
    monkeypatch.setitem(verl.DEFAULTS, "algorithm.nothing", 1)
    assert set(drift.of_verl()) == {
        f"verl: {name} is 0.2 by default, and 0.25 here",
        "verl: the setting algorithm.nothing is gone (its default was 1)",
    }


def test_changed_numbers_are_named_with_their_size():
    case = live_trl.CASES[0]

    def doubled(fields, params):
        return {key: 2 * value for key, value in case.call(fields, params).items()}

    (line,) = drift.of_numbers(dataclasses.replace(case, call=doubled))
    assert line.startswith(f"{case}: {case.loss}: its numbers are no longer those of ") and "loss by " in line


def test_a_function_that_is_gone_is_named():
    def gone(fields, params):
        raise ImportError("no such function")

    case = dataclasses.replace(live_trl.CASES[0], call=gone)
    (line,) = drift.of_numbers(case)
    assert line.endswith("ImportError: no such function")
