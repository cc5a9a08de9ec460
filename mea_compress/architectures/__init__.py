"""What each model family calls its parts. Adding a family is adding a description to ``families.py``."""

from mea_compress.architectures.families import FAMILIES, Family, find_family
from mea_compress.architectures.source import Source, open_source

__all__ = ["FAMILIES", "Family", "Source", "find_family", "open_source"]
