"""Tables built from files that are told by content. Source: AMD 56421; AMD's own tool for the order."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

import pytest
from tests.unit.certs.conftest import NOW

from swsnp.abi.ghcb import CertTableGuid
from swsnp.abi.snp_report import AttestationReport
from swsnp.certs.build import build_table
from swsnp.certs.lint import lint_table
from swsnp.certs.table import TableEntry, pack, parse
from swsnp.certs.x509_reader import to_pem
from swsnp.errors import InputError

if TYPE_CHECKING:
    from tests.unit.certs.conftest import Authority

OTHER = UUID(int=7)


def test_any_order_any_encoding(milan: Authority) -> None:
    """Leaf, ASK, ARK, CRL, others; DER; the same bytes twice are one entry; nothing to find for the lint."""
    hierarchy = milan.hierarchy
    files = [
        ("crl.pem", to_pem(milan.crl, label="X509 CRL")),
        ("cert_chain", hierarchy.chain_pem()),
        ("ark again", hierarchy.ark),
        ("leaf", b"text\n" + to_pem(milan.vcek)),
    ]
    blob = build_table(files, others=[(OTHER, b"opaque")])
    assert [(each.guid, each.data) for each in parse(blob)] == [
        (CertTableGuid.VCEK, milan.vcek),
        (CertTableGuid.ASK, hierarchy.ask),
        (CertTableGuid.ARK, hierarchy.ark),
        (CertTableGuid.CRL, milan.crl),
        (OTHER, b"opaque"),
    ]
    assert lint_table(blob, at=NOW).clean
    assert build_table(reversed(files), others=[(OTHER, b"opaque")]) == blob


def test_asvk_goes_into_asks_entry(milan: Authority) -> None:
    """AMD 56421: one GUID for ASK and ASVK."""
    blob = build_table([("a", milan.hierarchy.asvk), ("b", milan.vlek)])
    assert [each.guid for each in parse(blob)] == [CertTableGuid.VLEK, CertTableGuid.ASK]


def test_a_table_is_a_source_too(milan: Authority) -> None:
    """Its entries go by content, so a swapped or mixed-endian GUID comes out right; unknown ones stay."""
    table = pack(
        [
            TableEntry(guid=UUID(bytes=CertTableGuid.VLEK.bytes_le), data=to_pem(milan.vcek)),
            TableEntry(guid=OTHER, data=b"-----BEGIN"),
        ]
    )
    assert [(each.guid, each.data) for each in parse(build_table([("t", table)]))] == [
        (CertTableGuid.VCEK, milan.vcek),
        (OTHER, b"-----BEGIN"),
    ]
    assert build_table([]) == bytes(24)


def test_refusals(milan: Authority) -> None:
    """Two that claim one entry, what is no certificate, tables inside tables; each by its file."""
    hierarchy = milan.hierarchy
    nested = pack([TableEntry(guid=CertTableGuid.ASK, data=bytes(24))])
    spoiled = hierarchy.ark.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x01", 1)
    foreign = hierarchy.ark.replace(b"ARK-Milan", b"ARK-Paris")
    for files, text in (
        (
            [("a", hierarchy.ask), ("b", hierarchy.asvk)],
            "b: ASK is given already by a, .*stands for ASK and ASVK",
        ),
        ([("a", milan.crl), ("b", hierarchy.crl(number=5))], "b: entry 92f81bc3.* is given already by a"),
        ([("r", bytes(AttestationReport(version=3)))], "r: attestation report, wanted certificates"),
        ([("x", b"hello")], "x: got 5 bytes"),
        ([("n", nested)], "n: entry 4ab7b379-.*: certificate table, wanted a certificate or a CRL"),
        ([("n", nested[:-1])], "n: certificate table entry 0 .*: ends at 0x48"),
        ([("v2", spoiled)], "v2: certificate.version: got v2, wanted v3"),
        ([("f", foreign)], "f: certificate of 'ARK-Paris', wanted VCEK, VLEK"),
        ([("c", milan.crl.replace(b"\x02\x01\x01", b"\x02\x01\x00", 1))], "c: CRL.version: got v1"),
    ):
        with pytest.raises(InputError, match=f"^{text}"):
            build_table(files)
    with pytest.raises(InputError, match="entry 0: the zero GUID"):
        build_table([], others=[(UUID(int=0), b"x")])
    with pytest.raises(InputError, match=f"--entry {CertTableGuid.ARK}: ARK is given already by a"):
        build_table([("a", hierarchy.ark)], others=[(CertTableGuid.ARK, b"x")])
