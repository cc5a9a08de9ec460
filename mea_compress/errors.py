"""The one error a user can cause."""


class RequestError(Exception):
    """The request was wrong: the message says in one sentence what, and what to do about it (exit status 2)."""
