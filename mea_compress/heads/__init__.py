"""Heads as arrays: pure NumPy, no file and no model is known here."""
