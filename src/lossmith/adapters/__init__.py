"""Lossmith's losses inside other trainers: one file a trainer, which imports it only when it is used.

`hooks` says what each trainer's hook can carry; `docs/hooks.md` is that as a table of all losses.
"""

from lossmith.adapters.hooks import HOOKS, Hook

__all__ = ["HOOKS", "Hook"]
