"""Releases of transformers that the suite runs against, each unpacked once into a directory of its own."""

import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import transformers

from mea_compress.modeling.section_mea import TESTED_TRANSFORMERS

OLDEST, NEWEST = TESTED_TRANSFORMERS
# What a release needs in other versions than those that are installed.
_HTTP = ("httpx==0.28.1", "httpcore==1.0.9", "certifi==2026.10.18", "idna==3.20", "h11==0.16.0", "anyio==4.16.0")
BESIDE = {OLDEST: ("huggingface-hub==1.33.0", *_HTTP)}
# The oldest, one that serving engines pin, the installed one and the newest.
RELEASES = tuple(dict.fromkeys((OLDEST, "5.19.0", transformers.__version__, NEWEST)))


def release_directory(version):
    """A directory to put in front of the module path, or None for the installed release; skips without an index."""
    if version == transformers.__version__:
        return None
    target = Path(sys.prefix) / "compat" / f"transformers-{version}"
    target.parent.mkdir(exist_ok=True)
    with filelock.FileLock(f"{target}.lock"):
        if not target.is_dir():
            made = target.with_name(target.name + ".partial")
            quick = ("--disable-pip-version-check", "--no-deps", "--no-compile", "-qq")
            command = [sys.executable, "-m", "pip", "install", *quick]
            wanted = [f"transformers=={version}", *BESIDE.get(version, ())]
            done = subprocess.run([*command, "--target", made, *wanted], capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
                pytest.skip(f"transformers {version} cannot be installed here: {reason}")
            made.rename(target)
    return target
