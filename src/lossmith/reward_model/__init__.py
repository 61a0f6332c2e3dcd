"""Reward models: trained from preferences, measured on held-out prompts, and frozen."""
