"""Lossmith's losses in other trainers: one file a trainer, which is imported only when it is used."""
