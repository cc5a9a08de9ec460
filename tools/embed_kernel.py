"""Embed decode_cpu.c into decode_cpu_mea.py, which is copied into every checkpoint and must be self-contained.

``python tools/embed_kernel.py`` rewrites the marked section of the Python file; ``--check`` only says whether it is
up to date, and exits with status 1 where it is not.
"""

import argparse
import sys
from pathlib import Path

MODELING = Path(__file__).resolve().parents[1] / "mea_compress" / "modeling"
KERNEL = MODELING / "decode_cpu.c"
MODULE = MODELING / "decode_cpu_mea.py"
BEGIN = "# Embedded from decode_cpu.c by `make kernel`: edit it there.\n"
END = "# End of decode_cpu.c.\n"


def embed(module: str, kernel: str) -> str:
    """Return the text of the Python module with the text of the kernel between its markers.

    Args:
        module: Text of decode_cpu_mea.py.
        kernel: Text of decode_cpu.c.

    Raises:
        ValueError: The module lacks a marker, or the kernel cannot be written as a raw string.
    """
    if '"""' in kernel or not kernel.endswith("\n"):
        raise ValueError(f'{KERNEL.name} must end with a newline and not contain """')
    before, begin, rest = module.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{MODULE.name} lacks the markers of {KERNEL.name}")
    return f'{before}{begin}SOURCE = r"""{kernel}"""\n{end}{after}'


def main(arguments: list[str] | None = None) -> None:
    """Rewrite decode_cpu_mea.py where it is stale, or with ``--check`` exit with status 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit with status 1 if it is stale")
    check = parser.parse_args(arguments).check
    module = MODULE.read_text(encoding="utf-8")
    try:
        embedded = embed(module, KERNEL.read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(str(error))
    if embedded == module:
        return
    if check:
        sys.exit(f"{MODULE.name} does not hold the present {KERNEL.name}: run `make kernel`")
    MODULE.write_text(embedded, encoding="utf-8")


if __name__ == "__main__":
    main()
