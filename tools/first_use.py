"""Print the commands below a heading of README as a shell script, so that what README says can be run as it stands.

python tools/first_use.py "Your own checkpoint" | bash -eux
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def commands(heading: str, text: str) -> str:
    """Return the `sh` blocks of a section, in their order.

    Raises:
        SystemExit: There is no such section, or no command in it.
    """
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^```sh\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL) if section else []
    if not blocks:
        sys.exit(f"README has no commands below {heading!r}: name a section that has")
    return "\n".join(blocks)


if __name__ == "__main__":
    print(commands(sys.argv[1], README.read_text(encoding="utf-8")), end="")
