"""What the service does not do, with the status, the name and the sentence that a client gets."""

from __future__ import annotations


class Refused(Exception):
    """retry_after: seconds after which the same request may do better; None: it will not."""

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after
