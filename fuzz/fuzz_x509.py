"""Certificates in DER: read whole, or LayoutError (InputError where it looks like PEM), nothing else."""

from __future__ import annotations

from fuzz.evidence import evidence
from fuzz.outcome import attempt
from swsnp.certs.x509_reader import read_all
from swsnp.errors import InputError, LayoutError

__all__ = ["one", "seeds"]


def seeds() -> list[bytes]:
    """A leaf, an intermediate and a root."""
    known = evidence()
    return [known.vcek, known.hierarchy.ask, known.hierarchy.ark]


def one(data: bytes) -> object:
    """Read, and look at what is read only when asked for."""
    found, refusal = attempt(lambda: read_all(data), LayoutError, InputError)
    if refusal:
        return refusal
    kinds = []
    for each in found:
        assert each.tbs in each.der
        assert each.spki in each.tbs
        assert each.not_before.tzinfo is not None
        kinds += [attempt(each.basic_constraints, LayoutError)[1], attempt(each.key_usage, LayoutError)[1]]
    return tuple(kinds)
