"""Measure checkpoints: loss, divergence, cache, speed, tasks, retrieval."""
