"""What each model family calls its parts. Adding a family is adding a description to ``families.py``."""

from mea_compress.architectures.checkpoint import Source, open_source
from mea_compress.architectures.families import FAMILIES, Family, find_family

__all__ = ["FAMILIES", "Family", "Source", "find_family", "open_source"]
