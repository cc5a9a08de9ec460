"""The one error a user can cause, and the one that a disk can."""


class RequestError(Exception):
    """The request was wrong: the message says in one sentence what, and what to do about it (exit status 2)."""


class DiskFullError(RequestError):
    """The disk or quota is full: what is finished is worth keeping, so that the run can go on when there is room."""
