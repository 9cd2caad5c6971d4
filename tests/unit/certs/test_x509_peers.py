"""Three readers of genuine certificates: ours, `cryptography` and asn1crypto.

Where a library loads what AMD issued, it says the same; the harness of the same name goes on from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fuzz.evidence import evidence
from fuzz.fuzz_x509_peers import one
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.certs.x509_reader import read_all

if TYPE_CHECKING:
    from pathlib import Path

BOTH = ("read by asn1crypto", "read by cryptography")


def test_genuine_certificates(vectors: Path) -> None:
    """Serial number 0, explicit trailer fields, 8-byte HWIDs: all three read all of them alike."""
    found = 0
    for path in sorted(vectors.rglob("*")):
        if path.suffix in (".der", ".pem") and "crl" not in path.name:
            for each in read_all(path.read_bytes()):
                assert one(each.der) == BOTH, path.name
                found += 1
    assert found >= 30


@pytest.mark.parametrize("which", range(3))
def test_our_certificates(which: int) -> None:
    """What the emulated key service issues is read alike, too."""
    known = evidence()
    assert one((known.vcek, known.hierarchy.ask, known.hierarchy.ark)[which]) == BOTH


@settings(derandomize=True, max_examples=300, deadline=None)
@given(at=st.integers(0, 1400), size=st.integers(1, 4), put=st.binary(max_size=4))
def test_changed_certificates(at: int, size: int, put: bytes) -> None:
    """A few bytes replaced, taken out or put in: who reads it still, reads the same."""
    data = evidence().vcek
    one(data[:at] + put + data[at + size :])
