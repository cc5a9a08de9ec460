"""``python -m mea_compress`` is the command line."""

from mea_compress.cli import main

main()
