"""Between files, heads and modules: read a layer, store it, run it."""
