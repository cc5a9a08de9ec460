"""Which files are opened: an audit hook, added when it is first needed, for it cannot be taken away."""

import os
import sys
from contextlib import contextmanager
from functools import cache

_recorded = []


def _record(event, arguments):
    if event == "open" and _recorded and isinstance(arguments[0], (str, bytes)):
        _recorded[-1].append((os.fsdecode(arguments[0]), arguments[2]))


@cache
def _add_hook():
    sys.addaudithook(_record)


@contextmanager
def recorded_opens():
    """Paths and flags of every file opened in the block."""
    _add_hook()
    opens = []
    _recorded.append(opens)
    try:
        yield opens
    finally:
        _recorded.pop()
