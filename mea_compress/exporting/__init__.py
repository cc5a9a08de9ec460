"""Compressed checkpoints in formats that engines serve without code of this package."""
