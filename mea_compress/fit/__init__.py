"""Fit the layers of a checkpoint, one after the other."""
