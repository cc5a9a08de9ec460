"""Compressed checkpoints in engines that were not written here, by what those engines let others add to them."""
