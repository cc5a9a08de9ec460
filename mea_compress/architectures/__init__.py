"""Model families, described as data, and opened checkpoints. A new family is a new description in ``families.py``."""

from mea_compress.architectures.checkpoint import Source, open_source
from mea_compress.architectures.families import FAMILIES, Family, find_family

__all__ = ["Source", "open_source", "Family", "FAMILIES", "find_family"]
