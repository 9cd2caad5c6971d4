"""What swsnp raises, and who is meant to read it.

    SwsnpError
    ├── LayoutError          bytes, or a value, that do not have the form a document prints
    ├── UsageError           the caller used an interface out of order or with impossible arguments
    ├── InputError           a file or blob that cannot be read or understood (exit status 3)
    ├── HostError            not possible on this host; the text names the remedy (exit status 4)
    └── VerificationError    evidence was refused; `findings` says why

Guests and VMMs are told by numbers and errno instead, as the documents ask: those never are exceptions here.
"""

from __future__ import annotations

__all__ = ["HostError", "InputError", "LayoutError", "SwsnpError", "UsageError", "VerificationError"]


class SwsnpError(Exception):
    """Base of everything that this package raises on purpose."""


class LayoutError(SwsnpError, ValueError):
    """Bytes or a value that do not have the documented form: field, got, wanted, document."""


class UsageError(SwsnpError, RuntimeError):
    """An interface was used out of order, or with arguments that cannot be."""


class InputError(SwsnpError):
    """Input from outside that cannot be read or understood: which, got, wanted."""


class HostError(SwsnpError):
    """This host cannot do it: what is missing and the remedy."""


class VerificationError(SwsnpError):
    """Evidence was refused."""

    def __init__(self, message: str, findings: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.findings = findings
