"""Losses of whole completions: pairs of them, preferences, regressions."""
