"""A run: its opening, its steps, its end, and pictures of it."""
