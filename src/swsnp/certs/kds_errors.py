"""Why the key service gave no certificate, each reason its own class, and each with the URL.

SwsnpError
└── KdsError
    ├── KdsNotFound                    404: no such chip, or never with this TCB (exit status 1)
    ├── KdsRefused                     another answer that asking again does not change (1)
    ├── KdsContentError  (InputError)  an answer that is not what was asked for (3)
    └── KdsUnavailable   (HostError)   nothing for now; another time may differ (4)
        ├── KdsOffline                 the network must not be used, and the cache does not have it
        ├── KdsThrottled               429, and the time that was given is used up
        ├── KdsTimeout                 too slow
        ├── KdsTruncated               the connection ended inside the answer
        └── KdsUnreachable             no connection, or a server error (5xx)
"""

from __future__ import annotations

from typing import Any

from swsnp.errors import HostError, InputError, SwsnpError

__all__ = [
    "KdsContentError",
    "KdsError",
    "KdsNotFound",
    "KdsOffline",
    "KdsRefused",
    "KdsThrottled",
    "KdsTimeout",
    "KdsTruncated",
    "KdsUnavailable",
    "KdsUnreachable",
]


class KdsError(SwsnpError):
    """No certificate; `url` is what was asked for, or would have been."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url}: {reason}")
        self.url = url
        self.reason = reason

    def __reduce__(self) -> tuple[type[KdsError], tuple[str, str], dict[str, Any]]:
        # copied and sent between processes by what it was made of, not by its text
        return type(self), (self.url, self.reason), self.__dict__


class KdsNotFound(KdsError):
    """The service does not know the chip, or does not know it with this TCB."""


class KdsRefused(KdsError):
    """The service does not answer this request, now or later."""


class KdsContentError(KdsError, InputError):
    """The answer is not what was asked for, so it was neither kept nor given on."""


class KdsUnavailable(KdsError, HostError):
    """No answer within the time that was given.

    Attributes:
        retry_after_s: the pause that the service asked for, if it did.
    """

    def __init__(self, url: str, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(url, reason)
        self.retry_after_s = retry_after_s


class KdsOffline(KdsUnavailable):
    """The network must not be used, and nothing usable is in the cache."""


class KdsThrottled(KdsUnavailable):
    """The service asks to come back later (429), later than the time that was given."""


class KdsTimeout(KdsUnavailable):
    """No whole answer in time."""


class KdsTruncated(KdsUnavailable):
    """The connection ended inside the answer."""


class KdsUnreachable(KdsUnavailable):
    """No connection, or an error on the service's side."""
