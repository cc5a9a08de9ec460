"""Training of compositions against the original: distillation, its losses, its stages, and models in parts."""
