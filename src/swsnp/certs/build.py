"""Build a certificate table from certificates that are told by content.

The order of entries is that of AMD's tools: leaf, ASK or ASVK, ARK, CRL, then what others define.
Source: AMD 56421, certificate table; AMD 57230.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import CertTableGuid
from swsnp.certs.classify import Classified, classify
from swsnp.certs.crl import read_crl
from swsnp.certs.lint_layout import CANONICAL_ORDER
from swsnp.certs.role import Role, role_of
from swsnp.certs.table import TableEntry, canonical_guid, pack, parse
from swsnp.certs.x509_reader import read
from swsnp.errors import InputError, LayoutError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from uuid import UUID

__all__ = ["ROLE_GUIDS", "build_table"]

ROLE_GUIDS: Final = {
    Role.VCEK: CertTableGuid.VCEK,
    Role.VLEK: CertTableGuid.VLEK,
    Role.ASK: CertTableGuid.ASK,
    Role.ASVK: CertTableGuid.ASK,
    Role.ARK: CertTableGuid.ARK,
}
"""The entry of each certificate; one stands for ASK and ASVK."""


def build_table(files: Iterable[tuple[str, bytes]], *, others: Iterable[tuple[UUID, bytes]] = ()) -> bytes:
    """Build a table in canonical form: DER, packed, GUIDs in textual order.

    Args:
        files: name, for error texts, and content: certificates or CRLs in DER or PEM, chains, or tables,
            whose entries with GUIDs that are not known here are taken over as they are.
        others: GUID and data of entries that nobody looks into.

    Raises:
        InputError: a file holds nothing of the kind, something that cannot be read, a certificate that is
            none of AMD's five, or one that another file has given already; the text names the files.
    """
    found: dict[UUID, tuple[str, bytes]] = {}
    for name, data in files:
        for guid, entry in _entries(name, data):
            _take(found, guid, name, entry)
    for guid, data in others:
        _take(found, guid, f"--entry {guid}", data)
    # sorted() keeps the order of the others
    ordered = sorted(found.items(), key=lambda item: CANONICAL_ORDER.get(item[0], len(CANONICAL_ORDER)))
    try:
        return pack(TableEntry(guid=guid, data=data) for guid, (_, data) in ordered)
    except LayoutError as error:
        raise InputError(str(error)) from None


def _take(found: dict[UUID, tuple[str, bytes]], guid: UUID, name: str, data: bytes) -> None:
    """One entry more; the same bytes twice are one."""
    before = found.setdefault(guid, (name, data))
    if before[1] != data:
        hint = " (one entry stands for ASK and ASVK)" if guid == CertTableGuid.ASK else ""
        raise InputError(
            f"{name}: {_what(guid)} is given already by {before[0]}, with other content; leave one out{hint}"
        )


def _what(guid: UUID) -> str:
    return next((role.value for role, each in ROLE_GUIDS.items() if each == guid), f"entry {guid}")


def _entries(name: str, data: bytes) -> Iterator[tuple[UUID, bytes]]:
    found = classify(data, name)
    if found.report is not None:
        raise InputError(f"{name}: {found.form}, wanted certificates, a CRL or a certificate table")
    try:
        if found.table is not None:
            for entry in parse(found.table):
                yield from _entry_of_table(entry)
        else:
            yield from _objects(found)
    except (InputError, LayoutError) as error:
        raise InputError(f"{name}: {error}") from None


def _entry_of_table(entry: TableEntry) -> Iterator[tuple[UUID, bytes]]:
    """A known entry goes by its content like any file; an unknown one is opaque."""
    if canonical_guid(entry.guid) not in CANONICAL_ORDER:
        yield entry.guid, entry.data
        return
    where = f"entry {entry.guid}"
    found = classify(entry.data, where)
    if not (found.certificates or found.crls):
        raise InputError(f"{where}: {found.form}, wanted a certificate or a CRL")
    yield from _objects(found)


def _objects(found: Classified) -> Iterator[tuple[UUID, bytes]]:
    for each in found.certificates:
        role = role_of(read(each))
        if role is None:
            raise InputError(f"certificate of {read(each).subject_cn!r}, wanted VCEK, VLEK, ASK, ASVK or ARK")
        yield ROLE_GUIDS[role[0]], each
    for each in found.crls:
        read_crl(each)
        yield CertTableGuid.CRL, each
