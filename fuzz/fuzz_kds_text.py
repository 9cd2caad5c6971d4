"""Texts beside the key service's answers, cache notes and Retry-After: read, or counted as absent."""

from __future__ import annotations

import hashlib
import json

from fuzz.evidence import NOW
from swsnp.certs.kds_cache import fetched_of
from swsnp.certs.kds_client import retry_after_of

__all__ = ["one", "seeds"]

URL = "https://kdsintf.amd.com/vcek/v1/Milan/crl"
BODY = b"body"


def seeds() -> list[bytes]:
    """A good note, seconds and a date."""
    digest = hashlib.sha256(BODY).hexdigest()
    note = {"url": URL, "fetched": NOW.isoformat(), "sha256": digest}
    return [json.dumps(note).encode(), b"120", b"Fri, 02 Jan 2026 00:00:42 GMT"]


def one(data: bytes) -> object:
    """A date with a zone or None; a pause of at least 0 or None."""
    fetched = fetched_of(data, URL, BODY)
    assert fetched is None or fetched.tzinfo is not None
    pause = retry_after_of(data.decode("latin-1"), NOW)
    assert pause is None or pause >= 0
    return fetched is None, pause is None
