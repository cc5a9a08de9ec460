"""Methods, a file for each: how the H heads of one side of a layer are rebuilt from fewer. `base` says what one is."""

from mea_compress.compositions.base import CompositionOptions, Method, configured, find_method, methods, register

__all__ = ["CompositionOptions", "Method", "configured", "find_method", "methods", "register"]
