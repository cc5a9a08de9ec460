"""One file for each way to make H heads from fewer."""
