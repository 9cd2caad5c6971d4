"""Certificates that differ from one read before only where chips differ: cut out, not read again.

One issuer's leaves for one TCB have the same bytes at the same places, but for validity, the point of P-384,
the HWID and the signature. Where these lie follows from tags and lengths, and those are among the bytes that
are the same. So the places are known from the first leaf, and of the next one the general reader would find
the same structure. What lies in them is taken by the functions that it uses, so that errors are the same.
See docs/adr/0014.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from swsnp.abi.kds import OID_HWID
from swsnp.certs import der
from swsnp.certs.x509 import OID_P384, Certificate, EcKey

if TYPE_CHECKING:
    from swsnp.certs.x509 import RsaKey, Template

__all__ = ["learn", "read_sibling"]

_MOST_OF_ONE_SIZE: Final = 16
_LARGEST_KEPT: Final = 4096
"""Bytes of a certificate; AMD's have less than 1,800."""
_COORDINATE: Final = 48


class _Shape(NamedTuple):
    """Where the bytes of one certificate's siblings may differ, and those that must be the same.

    `first` is the one that was learnt if it is a CA's, which come again and again; `point` says where X and Y
    lie, in place of `key`.
    """

    first: Certificate | None
    fixed: tuple[tuple[int, bytes], ...]
    template: Template
    serial: int
    tbs: slice
    not_before: slice
    not_after: slice
    tags: tuple[int, int]
    spki: slice
    key: RsaKey | EcKey | None
    point: int | None
    hwid: slice | None
    signature: slice


def read_sibling(data: bytes) -> Certificate | None:
    """The certificate, if it is a sibling of one that `learn` was given; None if not.

    Raises:
        LayoutError: the validity is malformed; as the general reader.
    """
    for shape in _shapes(len(data)):
        if shape.first is not None and shape.first.der == data:
            return shape.first
        for at, piece in shape.fixed:
            if not data.startswith(piece, at):
                break
        else:
            return _cut(data, shape)
    return None


def learn(certificate: Certificate) -> None:
    """Look where the siblings of a certificate that was read may differ; of a large one, nothing is kept."""
    if len(certificate.der) > _LARGEST_KEPT:
        return
    shapes = _shapes(len(certificate.der))
    shapes.insert(0, _shape(certificate))
    del shapes[_MOST_OF_ONE_SIZE:]


@lru_cache(maxsize=64)
def _shapes(size: int) -> list[_Shape]:
    """Those of certificates of so many bytes, the latest first."""
    return []


def _cut(data: bytes, shape: _Shape) -> Certificate:
    _, _, template, serial, tbs, not_before, not_after, tags, spki, key, point, hwid, signature = shape
    if point is not None:
        middle = point + _COORDINATE
        key = EcKey(OID_P384, data[point:middle], data[middle : middle + _COORDINATE])
    return Certificate(
        data,
        template,
        data[tbs],
        serial,
        der.moment(tags[0], data[not_before], "notBefore"),
        der.moment(tags[1], data[not_after], "notAfter"),
        data[spki],
        key,
        data[signature],
        None if hwid is None else data[hwid],
    )


def _shape(certificate: Certificate) -> _Shape:
    """The places, by one walk through what is known to be well-formed."""
    data, key = certificate.der, certificate.key
    _, _, start, end = der.spans(data, "certificate")[0]
    tbs, _, signed = der.spans(data, "certificate", start, end)
    _, _, _, _, validity, _, spki, *tagged = der.spans(data, "tbs", *tbs[2:])
    first, last = der.spans(data, "validity", *validity[2:])
    point = spki[3] - 2 * _COORDINATE if isinstance(key, EcKey) and key.x else None
    hwid = _hwid(data, *tagged[0][2:]) if tagged else None
    not_before, not_after = slice(*first[2:]), slice(*last[2:])
    signature = slice(signed[2] + 1, signed[3])  # after the number of unused bits
    places = (not_before, not_after, None if point is None else slice(point, spki[3]), hwid, signature)
    return _Shape(
        first=certificate if point is None else None,
        fixed=_between(data, [each for each in places if each is not None]),
        template=certificate.template,
        serial=certificate.serial,
        tbs=slice(tbs[1], tbs[3]),
        not_before=not_before,
        not_after=not_after,
        tags=(first[0], last[0]),
        spki=slice(spki[1], spki[3]),
        key=key,
        point=point,
        hwid=hwid,
        signature=signature,
    )


def _hwid(data: bytes, at: int, end: int) -> slice | None:
    """Where the value of that extension lies."""
    _, _, start, end = der.spans(data, "extensions", at, end)[0]
    for _, _, inside, after in der.spans(data, "extensions", start, end):
        (_, _, oid_at, oid_end), *_, (_, _, value_at, value_end) = der.spans(data, "extension", inside, after)
        if der.oid(data[oid_at:oid_end], "extension") == OID_HWID:
            return slice(value_at, value_end)
    return None


def _between(data: bytes, places: list[slice]) -> tuple[tuple[int, bytes], ...]:
    """Where each piece outside of the places begins, and the piece."""
    ends = [slice(0, 0), *places, slice(len(data), len(data))]
    return tuple((one.stop, data[one.stop : other.start]) for one, other in pairwise(ends))
