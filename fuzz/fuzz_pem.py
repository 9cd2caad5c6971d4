"""PEM: blocks that are whole and base64, or InputError (LayoutError for what is inside), nothing else."""

from __future__ import annotations

from functools import partial

from fuzz.evidence import evidence
from fuzz.outcome import attempt
from swsnp.certs.x509_reader import read, read_all, to_der, to_pem
from swsnp.errors import InputError, LayoutError

__all__ = ["one", "seeds"]


def seeds() -> list[bytes]:
    """One block, two blocks, text around them, another label."""
    known = evidence()
    leaf, root = to_pem(known.vcek), to_pem(known.hierarchy.ark)
    small = to_pem(b"\x30\x03\x02\x01\x05")
    return [leaf, leaf + root, b"subject: x\n" + small + b"tail", to_pem(b"x", label="X509 CRL"), small * 3]


def one(data: bytes) -> object:
    """Take it apart and put it together again; read what it holds."""
    blocks, refusal = attempt(lambda: to_der(data), InputError)
    if refusal:
        return refusal
    if b"-----BEGIN" in data:
        assert to_der(b"".join(to_pem(each) for each in blocks)) == blocks
    kinds = [attempt(partial(question, data), InputError, LayoutError)[1] for question in (read, read_all)]
    return len(blocks), tuple(kinds)
