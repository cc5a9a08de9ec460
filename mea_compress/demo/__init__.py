"""A small model, trained, compressed, healed and compared."""
