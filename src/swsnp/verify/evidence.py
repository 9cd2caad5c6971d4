"""What came with the report: certificates, the host's table and CRLs, read once and remembered.

C0. Everything given can be read; what cannot be read is a failure, not passed over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from swsnp.abi.ghcb import CertTableGuid
from swsnp.abi.snp_report import SigningKey
from swsnp.certs.crl import Crl, read_crl
from swsnp.certs.kds_extensions import leaf_kind
from swsnp.certs.table import canonical_guid, parse
from swsnp.certs.x509_reader import Certificate, EcKey, read_der, to_der
from swsnp.crypto.ecdsa import Engine, VerifyingKey
from swsnp.errors import InputError, LayoutError
from swsnp.verify.result import Finding, Findings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from swsnp.abi.snp_report import Product
    from swsnp.verify.chain import Judged

__all__ = ["Evidence", "Leaf", "Reader"]

_TABLE_CERTIFICATES: Final = (
    CertTableGuid.VCEK,
    CertTableGuid.VLEK,
    CertTableGuid.ASK,
    CertTableGuid.ARK,
)
_SIGNING_KEYS: Final = {"vcek": int(SigningKey.VCEK), "vlek": int(SigningKey.VLEK)}
_LARGEST_KEPT: Final = 64 * 1024
"""Bytes of evidence that are worth remembering: Linux guests receive tables of at most 16 KiB."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Leaf:
    """A VCEK or VLEK, its key ready to verify with, and what was found of its chain per product asked for."""

    certificate: Certificate
    key: VerifyingKey | None
    judged: dict[Product | None, Judged] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """Certificates in the order given, each once; leaves by the SIGNING_KEY that names their kind."""

    certificates: tuple[Certificate, ...]
    crls: tuple[Crl, ...]
    leaves: dict[int, tuple[Leaf, ...]]
    noted: tuple[Finding, ...]


class Reader:
    """Reads evidence and keeps the last `size` pieces; safe for threads.

    What is remembered is found again by its bytes, all of them. `known` certificates need not be read again.
    """

    def __init__(self, size: int, engine: Engine, known: Iterable[Certificate] = ()) -> None:
        VerifyingKey(bytes(48), bytes(48), engine=engine)  # says now if the engine cannot be had
        parts = _Parts(engine, {each.der: each for each in known}, lru_cache(maxsize=size)(read_der))
        self._read = parts.read
        self._remembered = lru_cache(maxsize=size)(parts.read)

    def read(self, certificates: tuple[bytes, ...], table: bytes | None, crls: tuple[bytes, ...]) -> Evidence:
        """Read all of it; CRLs of the table count when `crls` is empty."""
        size = sum(map(len, certificates)) + len(table or b"") + sum(map(len, crls))
        return (self._remembered if size <= _LARGEST_KEPT else self._read)(certificates, table, crls)


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """What reading needs; apart from `Reader`, so that nothing of it refers to itself."""

    engine: Engine
    known: dict[bytes, Certificate]
    certificate: Callable[[bytes], Certificate]

    def read(self, certificates: tuple[bytes, ...], table: bytes | None, crls: tuple[bytes, ...]) -> Evidence:
        findings = Findings()
        candidates: list[tuple[str, object, bytes]] = [
            ("certificate", number, each) for number, each in enumerate(certificates)
        ]
        lists = list(crls)
        try:
            for entry in parse(table) if table is not None else ():
                guid = canonical_guid(entry.guid)
                if guid in _TABLE_CERTIFICATES:
                    candidates.append(("table entry", guid, entry.data))
                elif guid == CertTableGuid.CRL and not crls:
                    lists.append(entry.data)
        except LayoutError as error:
            findings.fail("C0", "certificate table", error, "a table in form")
        found: dict[bytes, Certificate] = {}
        for where, which, each in candidates:
            try:
                for der in to_der(each):
                    found[der] = self.known.get(der) or self.certificate(der)
            except (InputError, LayoutError) as error:
                findings.fail("C0", f"{where} {which}", error, "a certificate in form")
        return Evidence(
            certificates=tuple(found.values()),
            crls=_read_crls(lists, findings),
            leaves=self._leaves(found.values()),
            noted=tuple(findings.noted),
        )

    def _leaves(self, certificates: Iterable[Certificate]) -> dict[int, tuple[Leaf, ...]]:
        found: dict[int, tuple[Leaf, ...]] = {}
        for each in certificates:
            kind = leaf_kind(each)
            if kind is not None:
                number = _SIGNING_KEYS[kind]
                found[number] = (*found.get(number, ()), Leaf(certificate=each, key=self._key(each)))
        return found

    def _key(self, certificate: Certificate) -> VerifyingKey | None:
        key = certificate.key
        if not isinstance(key, EcKey) or not key.x:
            return None
        return VerifyingKey(key.x, key.y, engine=self.engine)


def _read_crls(crls: Sequence[bytes], findings: Findings) -> tuple[Crl, ...]:
    found = []
    for number, each in enumerate(crls):
        try:
            found.append(read_crl(each))
        except (InputError, LayoutError) as error:
            findings.fail("C10", f"CRL {number}", error, "a CRL in form")
    return tuple(found)
