"""Schedules, merging, the Vision Transformer, its named configurations and its cost."""
