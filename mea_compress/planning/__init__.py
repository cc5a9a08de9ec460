"""What will happen to every layer, from headers alone."""
