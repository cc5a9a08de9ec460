"""The error that a user can cause, the one that a disk can, and the one that nobody should see."""


class RequestError(Exception):
    """The request was wrong: the message says in one sentence what, and what to do about it (exit status 2)."""


class WritingError(RequestError):
    """The place refuses what is written: what is finished is worth keeping, so that the run can go on."""


class DiskFullError(WritingError):
    """The disk or quota is full."""


class VerificationError(Exception):
    """An emitted checkpoint does not do what it should: a defect of this program, nothing the user did."""


def first_line(error: BaseException) -> str:
    """Return what an error says first, without a full stop, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
