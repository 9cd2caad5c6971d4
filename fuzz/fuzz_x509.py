"""Certificates in DER: read whole, or LayoutError (InputError where it looks like PEM), nothing else.

Whether it is read as another's sibling or anew makes no difference.
"""

from __future__ import annotations

from functools import lru_cache

from fuzz.evidence import evidence
from fuzz.outcome import attempt
from swsnp.certs.x509 import Certificate
from swsnp.certs.x509_reader import read_all, read_anew, to_der
from swsnp.certs.x509_siblings import learn
from swsnp.errors import InputError, LayoutError

__all__ = ["one", "seeds"]


def seeds() -> list[bytes]:
    """A leaf, an intermediate and a root."""
    known = evidence()
    return [known.vcek, known.hierarchy.ask, known.hierarchy.ark]


@lru_cache(maxsize=1)
def _known() -> list[Certificate]:
    return [read_anew(each) for each in seeds()]


def _told(certificate: Certificate) -> list[object]:
    """All that a certificate says."""
    names = (*Certificate._fields, "issuer_cn", "subject_cn", "issuer", "subject", "inner_algorithm")
    told = [getattr(certificate, name) for name in (*names, "algorithm", "extensions") if name != "template"]
    return [*told, type(certificate.der)]


def one(data: bytes) -> object:
    """Read, and look at what is read only when asked for."""
    for known in _known():
        learn(known)
    found, refusal = attempt(lambda: read_all(data), LayoutError, InputError)
    anew, refusal_anew = attempt(lambda: [read_anew(each) for each in to_der(data)], LayoutError, InputError)
    assert refusal == refusal_anew
    if refusal:
        return refusal
    assert list(map(_told, found)) == list(map(_told, anew))
    kinds = []
    for each in found:
        assert each.tbs in each.der
        assert each.spki in each.tbs
        assert each.not_before.tzinfo is not None
        kinds += [attempt(each.basic_constraints, LayoutError)[1], attempt(each.key_usage, LayoutError)[1]]
    return tuple(kinds)
