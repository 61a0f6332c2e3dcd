"""Lossmith's losses as guests in other trainers: an adapter for each, which imports its trainer only when used."""
