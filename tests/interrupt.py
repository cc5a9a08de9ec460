"""Runs `compress` in forked children that are killed, or told that the disk is full, at a chosen file operation.

Run as a script: `interrupt.py SOURCE WORK RECIPE-JSON SEED KILLS FAILURES`. Prints a JSON list with one report for each
interruption; the first entry is the number of file operations of an undisturbed run, whose result is WORK/reference.
"""

import errno
import gc
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

# Every way in which the program changes a file system, apart from `open`, which the audit hook sees.
CHANGES = ("pwrite", "write", "copy_file_range", "sendfile", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
WRITES = ("pwrite", "write", "copy_file_range", "sendfile", "fsync", "mkdir")


class Counter:
    """Counts file operations and does something at one of them."""

    def __init__(self, point: int, action: str) -> None:
        self.point, self.action, self.count = point, action, 0
        self.lock = threading.Lock()
        self.own = {name: getattr(os, name) for name in CHANGES} | {"fsync": lambda _: None}  # no power is cut here
        for name in CHANGES:
            setattr(os, name, self.wrapped(name))
        sys.addaudithook(self.audit)

    def wrapped(self, name):
        def call(*args, **kwargs):
            if self.reached(name in WRITES):
                self.half(name, args)
                self.act()
            return self.own[name](*args, **kwargs)

        return call

    def half(self, name, args):
        """A kill or a full disk in the middle of a write leaves a part of it."""
        if name in ("pwrite", "write"):
            data = memoryview(args[1])
            self.own[name](args[0], data[: len(data) // 2], *args[2:])
        if name == "copy_file_range":
            self.own[name](args[0], args[1], args[2] // 2, *args[3:])

    def audit(self, event, args):
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR) and self.reached(True):
            self.act()

    def reached(self, writes: bool) -> bool:
        if self.action == "full" and not writes:
            return False
        with self.lock:
            self.count += 1
            # A full disk stays full; a kill happens once.
            return (self.action != "count" and self.count == self.point) or (
                self.action == "full" and 0 < self.point <= self.count
            )

    def act(self):
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def attempt(source, out, recipe, resume, point=0, action="count"):
    """Exit status or signal of one forked run, what it said, and how many operations it did."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status, said, counter = 1, "", Counter(point, action)
        try:
            compress(source, out, recipe=recipe, resume=resume, progress=False)
            status = 0
        except RequestError as error:
            status, said = 2, str(error)
        except BaseException as error:
            said = repr(error)
        counter.action = "count"
        os.write(writer, json.dumps([said, counter.count]).encode())
        os._exit(status)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as stream:
        told = stream.read()
    said, count = json.loads(told) if told else ("", 0)
    return {"status": os.waitstatus_to_exitcode(status), "said": said, "count": count}


def digest(directory):
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def main(source, work, recipe_json, seed, kills, failures):
    source, work, chance = Path(source), Path(work), random.Random(int(seed))
    recipe = Recipe.model_validate_json(recipe_json)
    first = attempt(source, work / "reference", recipe, False)
    assert first["status"] == 0, first
    reference, total = digest(work / "reference"), first["count"]
    reports = [total]
    points = [("kill", point) for point in sorted(chance.sample(range(1, total + 1), int(kills)))]
    points += [("full", point) for point in sorted(chance.sample(range(1, total // 2), int(failures)))]
    for action, point in points:
        out = work / f"{action}-{point}"
        partial = out.with_name(out.name + ".partial")
        stopped = attempt(source, out, recipe, False, point, action)
        report = {"action": action, "point": point, "stopped": stopped, "early": out.exists()}
        report["partial"] = partial.exists()
        # Every other run is stopped a second time while it resumes.
        if point % 2 and not out.exists():
            attempt(source, out, recipe, True, chance.randrange(1, total), action)
        if not report["early"] and out.exists() and not partial.exists():
            report["resumed"] = {"status": 0, "said": ""}
        else:
            report["resumed"] = attempt(source, out, recipe, True)
        report["same"] = out.is_dir() and digest(out) == reference
        report["left"] = sorted(path.name for path in work.iterdir() if path.name.startswith(partial.name))
        reports.append(report)
    print(json.dumps(reports))


if __name__ == "__main__":
    # Whatever is imported before the forks need not be imported in each of them.
    import transformers.models.llama.modeling_llama  # noqa: F401

    import mea_compress.emit.verification
    import mea_compress.fit.healing
    import mea_compress.fit.layers  # noqa: F401
    from mea_compress.compression import compress
    from mea_compress.errors import RequestError
    from mea_compress.recipe import Recipe

    gc.freeze()  # nor need any of them look through it for garbage
    main(*sys.argv[1:])
