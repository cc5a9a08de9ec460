"""Compile decode_cpu.c for every processor that it supports, with all warnings as errors, and keep nothing."""

import os
import platform
import shlex
import shutil
import subprocess
import sys

from embed_kernel import KERNEL

from mea_compress.modeling.decode_cpu_mea import COMPILER_FLAGS, CPU_FLAGS


def main() -> None:
    """Exit with status 1 where the compiler warns; without a compiler for x86-64, say that nothing was compiled."""
    compiler = shlex.split(os.environ.get("CC", "").strip() or "cc")
    if shutil.which(compiler[0]) is None:
        print(f"{KERNEL.name} was not compiled: there is no C compiler (CC, or cc)")
        return
    if platform.machine() not in ("x86_64", "AMD64"):
        print(f"{KERNEL.name} was not compiled: it is for x86-64, this machine is {platform.machine()}")
        return
    for flags in CPU_FLAGS.values():
        warnings = ("-Wall", "-Wextra", "-Werror")
        command = [*compiler, *COMPILER_FLAGS, *flags, *warnings, "-S", "-o", os.devnull, str(KERNEL)]
        if subprocess.run(command).returncode:
            sys.exit(1)


if __name__ == "__main__":
    main()
