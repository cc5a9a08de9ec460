"""Measure checkpoints: loss, divergence, cache, speed."""
