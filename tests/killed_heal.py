"""Runs `heal` and kills the process at one of its optimiser steps.

Run as a script: `killed_heal.py STUDENT TEACHER OUT STEP [--text TEXT] [--resume]`.
"""

import argparse
import os
import signal

import mea_compress.training.trainer as trainer
from mea_compress.healing import heal


def kill_at(step):
    """Have the process killed at the end of so many steps from now, those of trials among them."""
    left, on_step_end = step, trainer._Callback.on_step_end

    def counted(self, *arguments, **options):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return on_step_end(self, *arguments, **options)

    trainer._Callback.on_step_end = counted


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("student", "teacher", "out"):
        parser.add_argument(name)
    parser.add_argument("step", type=int)
    parser.add_argument("--text")
    parser.add_argument("--resume", action="store_true")
    asked = vars(parser.parse_args())
    kill_at(asked.pop("step"))
    heal(asked.pop("student"), **asked, steps=20, batch_size=4, device="cpu", progress=False)
