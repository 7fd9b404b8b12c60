"""A run: its processes, what changes while it goes on, its folder, and what it shows."""
