"""A policy loss, composed of one piece on each axis: its value, names, legality, formula and listing."""
