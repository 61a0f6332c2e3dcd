"""Lossmith's losses inside other trainers: one adapter a trainer, which imports it only when it is used.

`hooks` says what each trainer's hook can carry (`docs/hooks.md` is that as a table of all losses); `configurations`
reads which loss a trainer's own configuration is.
"""

from lossmith.adapters.hooks import HOOKS, Hook

__all__ = ["HOOKS", "Hook"]
