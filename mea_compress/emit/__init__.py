"""Write what was fitted as a checkpoint, and check it."""
