"""What came with the report: certificates, the host's table and CRLs, read once and remembered.

C0. Everything given can be read; what cannot be read is a failure, not passed over.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from swsnp.abi.ghcb import CertTableGuid
from swsnp.abi.snp_report import SigningKey
from swsnp.certs.crl import Crl, read_crl
from swsnp.certs.kds_extensions import leaf_kind
from swsnp.certs.table import places
from swsnp.certs.x509 import Certificate, EcKey
from swsnp.certs.x509_reader import read_all
from swsnp.crypto.ecdsa import Engine, VerifyingKey
from swsnp.errors import InputError, LayoutError
from swsnp.verify.memory import Memory
from swsnp.verify.result import Finding, Findings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from swsnp.abi.snp_report import Product
    from swsnp.verify.chain import Judged

__all__ = ["Evidence", "Leaf", "Reader"]

_CRL: Final = CertTableGuid.CRL
_MEANT: Final = {
    form: guid
    for guid in (CertTableGuid.VCEK, CertTableGuid.VLEK, CertTableGuid.ASK, CertTableGuid.ARK, _CRL)
    for form in (guid.bytes, guid.bytes_le)
}
"""In either byte order; entries with other GUIDs are nothing to us."""
_SIGNING_KEYS: Final = {"vcek": int(SigningKey.VCEK), "vlek": int(SigningKey.VLEK)}
_LARGEST_KEPT: Final = 64 * 1024
"""Bytes of evidence that are worth remembering: Linux guests receive tables of at most 16 KiB."""


class Leaf(NamedTuple):
    """A VCEK or VLEK, its key ready to verify with, and what was found of its chain per product asked for."""

    certificate: Certificate
    key: VerifyingKey | None
    judged: dict[Product | None, Judged]


class Evidence(NamedTuple):
    """Certificates in the order given, each once; leaves by the SIGNING_KEY that names their kind."""

    certificates: tuple[Certificate, ...]
    crls: tuple[Crl, ...]
    leaves: dict[int, tuple[Leaf, ...]]
    noted: tuple[Finding, ...]


class Reader:
    """Reads evidence and keeps the last `size` pieces; safe for threads.

    What is remembered is found again by its bytes, all of them.
    """

    def __init__(self, size: int, engine: Engine) -> None:
        _want_engine(engine)
        self._engine: Engine = engine
        self._known: Memory[tuple[object, ...], Evidence] = Memory(size)

    def read(self, certificates: tuple[bytes, ...], table: bytes | None, crls: tuple[bytes, ...]) -> Evidence:
        """Read all of it; CRLs of the table count when `crls` is empty."""
        key = (certificates, table, crls)
        found = self._known.get(key)
        if found is None:
            found = self._read(certificates, table, crls)
            if sum(map(len, certificates)) + len(table or b"") + sum(map(len, crls)) <= _LARGEST_KEPT:
                self._known.keep(key, found)
        return found

    def _read(
        self, certificates: tuple[bytes, ...], table: bytes | None, crls: tuple[bytes, ...]
    ) -> Evidence:
        findings = Findings()
        candidates: list[tuple[str, object, bytes]] = [
            ("certificate", number, each) for number, each in enumerate(certificates)
        ]
        lists = list(crls)
        blob = table or b""
        try:
            for guid, start, end in places(blob) if table is not None else ():
                meant = _MEANT.get(guid)
                if meant is _CRL:
                    lists += () if crls else (blob[start:end],)
                elif meant is not None:
                    candidates.append(("table entry", meant, blob[start:end]))
        except LayoutError as error:
            findings.fail("C0", "certificate table", error, "a table in form")
        found: dict[bytes, Certificate] = {}
        for where, which, each in candidates:
            try:
                for certificate in read_all(each):
                    found[certificate.der] = certificate
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
                found[number] = (*found.get(number, ()), Leaf(each, self._key(each), {}))
        return found

    def _key(self, certificate: Certificate) -> VerifyingKey | None:
        key = certificate.key
        if not isinstance(key, EcKey) or not key.x:
            return None
        return VerifyingKey(key.x, key.y, engine=self._engine)


@lru_cache(maxsize=8)
def _want_engine(engine: Engine) -> None:
    """Say now if the engine cannot be had, and not at the first leaf."""
    VerifyingKey(bytes(48), bytes(48), engine=engine)


def _read_crls(crls: Sequence[bytes], findings: Findings) -> tuple[Crl, ...]:
    found = []
    for number, each in enumerate(crls):
        try:
            found.append(read_crl(each))
        except (InputError, LayoutError) as error:
            findings.fail("C10", f"CRL {number}", error, "a CRL in form")
    return tuple(found)
