"""Model families, described as data, and opened checkpoints. A new family is a new description in ``families.py``."""

from mea_compress.architectures.checkpoint import Checkpoint, open_checkpoint
from mea_compress.architectures.families import FAMILIES, Family, find_family

__all__ = ["Checkpoint", "open_checkpoint", "Family", "FAMILIES", "find_family"]
