"""`swsnp certs` hands over to its sub-verbs; `certs show` explains what it is given."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

from swsnp.abi.ghcb import CertTableGuid
from swsnp.abi.snp_report import AttestationReport, Product, TcbVersion
from swsnp.amd_ca import assemble
from swsnp.amd_ca.assemble import _bits, _extension, _oid, _sequence
from swsnp.certs.role import name_text
from swsnp.certs.table import TableEntry, pack
from swsnp.certs.x509_reader import to_pem
from swsnp.cli import main

if TYPE_CHECKING:
    from pathlib import Path

NOW, LATER = datetime(2024, 1, 1, tzinfo=UTC), datetime(2031, 1, 1, tzinfo=UTC)
TCB = TcbVersion.encode(Product.MILAN, boot_loader=4, snp=0x18, microcode=0xDB)


def leaf(
    *,
    hwid: bytes | None = bytes(range(64)),
    csp_id: str | None = None,
    issuer: str = "SEV-Milan",
    spki: bytes | None = None,
    algorithm: bytes = assemble.PSS,
    more: tuple[bytes, ...] = (),
) -> bytes:
    """A leaf with a signature of zeros: shown, not judged."""
    extensions = assemble.leaf_extensions(Product.MILAN, "Milan-B0", TCB, hwid=hwid, csp_id=csp_id)
    tbs = assemble.Tbs(
        serial=0,
        algorithm=algorithm,
        issuer=assemble.name(issuer, "nobody"),
        subject=assemble.name("SEV-VCEK" if csp_id is None else "SEV-VLEK", "nobody"),
        not_before=NOW,
        not_after=LATER,
        spki=assemble.ec_spki(bytes(48), bytes(48)) if spki is None else spki,
        extensions=(*extensions, *more),
    )
    return assemble.signed(assemble.tbs_certificate(tbs), tbs.algorithm, bytes(512))


@pytest.fixture
def show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Show some bytes: the JSON and the text."""

    def of(data: bytes) -> tuple[dict[str, Any], str]:
        file = tmp_path / "input"
        file.write_bytes(data)
        assert main(["certs", "show", str(file), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert main(["certs", "show", str(file)]) == 0
        return found, capsys.readouterr().out

    return of


def test_sub_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a sub-verb the list is shown with exit code 2; --help is good; an unknown one is named."""
    assert main(["certs"]) == 2
    assert main(["certs", "--help"]) == 0
    assert "explain certificates" in capsys.readouterr().out
    assert main(["certs", "shwo"]) == 2
    assert "no verb 'shwo'; known: " in capsys.readouterr().err


def test_a_leaf(show: Any) -> None:
    """AMD 57230: names, serial, validity, TCB per component, HWID; in JSON and in text."""
    found, text = show(leaf())
    (certificate,) = found["certificates"]
    assert (certificate["role"], certificate["product"], certificate["serial"]) == ("VCEK", "Milan", "0x0")
    assert certificate["subject"].endswith("O=nobody, CN=SEV-VCEK")
    assert certificate["not_after"] == "2031-01-01T00:00:00Z"
    assert certificate["leaf"]["tcb"] == {
        "raw": "04000000000018db",
        "boot_loader": 4,
        "tee": 0,
        "snp": 24,
        "microcode": 219,
    }
    assert certificate["leaf"]["hwid"] == bytes(range(64)).hex()
    assert "boot_loader=4 tee=0 snp=24 microcode=219" in text
    assert (
        show(leaf(hwid=None, csp_id="CN=a", issuer="SEV-VLEK-Milan"))[0]["certificates"][0]["leaf"]["csp_id"]
        == "CN=a"
    )


def test_what_a_leaf_breaks_is_told_beside_the_rest(show: Any) -> None:
    """A leaf whose extensions are out of form is still shown."""
    found, text = show(leaf(hwid=bytes(8)))
    assert "got 8 bytes, wanted 64" in found["certificates"][0]["leaf"]["trouble"]
    assert "got 8 bytes, wanted 64" in text
    assert show(leaf(issuer="nobody"))[0]["certificates"][0]["product"] is None


def test_a_table(show: Any) -> None:
    """AMD 56421: entries with GUID, byte order, place and content; unknown ones by their SHA-256."""
    other = UUID(int=7)
    table = pack(
        [
            TableEntry(guid=CertTableGuid.VCEK, data=leaf()),
            TableEntry(guid=UUID(bytes=CertTableGuid.VLEK.bytes_le), data=to_pem(leaf())),
            TableEntry(guid=CertTableGuid.ARK, data=b"no certificate"),
            TableEntry(guid=other, data=b"opaque"),
        ]
    )
    found, text = show(table)
    assert (found["form"], found["npages"]) == ("certificate table", 1)
    first, second, third, last = found["entries"]
    assert (first["name"], first["encoding"], first["offset"]) == ("VCEK", "DER", 120)
    assert (second["name"], second["encoding"], second["guid_byte_order"]) == ("VLEK", "PEM", "mixed-endian")
    assert second["certificates"] == first["certificates"]
    assert "begin with 6e6f206365727469" in third["trouble"]
    assert (last["name"], last["guid"], "trouble" in last) == (None, str(other), False)
    assert "entry 3: not known here" in text
    assert "GUID in mixed-endian order" in text


def test_what_amd_does_not_make(show: Any) -> None:
    """Other keys, other algorithms and unknown extensions are named by their identifiers."""
    ecdsa = _sequence(_oid("1.2.840.10045.4.3.3"))
    p256 = _sequence(
        _sequence(_oid("1.2.840.10045.2.1"), _oid("1.2.840.10045.3.1.7")), _bits(b"\4" + bytes(64))
    )
    ed25519 = _sequence(_sequence(_oid("1.3.101.112")), _bits(bytes(32)))
    unknown = _extension("1.3.6.1.4.1.3704.1.9", b"x")
    for spki, key in ((p256, "EC 1.2.840.10045.3.1.7"), (ed25519, "another algorithm")):
        (shown,) = show(leaf(spki=spki, algorithm=ecdsa, more=(unknown,)))[0]["certificates"]
        assert (shown["key"], shown["signature"]) == (key, "1.2.840.10045.4.3.3")
        assert shown["leaf"]["unknown_extensions"] == ["1.3.6.1.4.1.3704.1.9"]


def test_an_entry_that_holds_something_else(show: Any) -> None:
    """A report in a certificate's place is named."""
    table = pack([TableEntry(guid=CertTableGuid.VCEK, data=bytes(AttestationReport(version=3)))])
    assert show(table)[0]["entries"][0]["trouble"] == "entry 0: attestation report, no certificate or CRL"


def test_an_empty_table(show: Any) -> None:
    """24 zero bytes."""
    assert show(bytes(24))[0]["entries"] == []


def test_a_report_is_not_for_this_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the verb that shows it."""
    file = tmp_path / "report.bin"
    file.write_bytes(bytes(AttestationReport(version=3)))
    assert main(["certs", "show", str(file)]) == 3
    assert "`swsnp report show`" in capsys.readouterr().err


def test_genuine_material(show: Any, vectors: Path) -> None:
    """Genuine certificates and CRLs are shown as the documents of the vectors have them."""
    chain = show((vectors / "ca" / "turin_vlek_cert_chain.pem").read_bytes())[0]
    assert [each["role"] for each in chain["certificates"]] == ["ASVK", "ARK"]
    assert [each["serial"] for each in chain["certificates"]] == ["0x30101", "0x30000"]
    crl = show((vectors / "crl" / "genoa_vcek_2022.crl.der").read_bytes())[0]["crls"][0]
    assert (crl["revoked"], crl["next_update"]) == (["0x20001"], "2023-10-31T23:00:00Z")
    leaf = show((vectors / "turin-v5" / "vcek.pem").read_bytes())[0]["certificates"][0]["leaf"]
    assert (leaf["tcb"]["raw"], leaf["hwid"]) == ("0101010400000051", "59790fb1c39f35c1")


def test_names_cannot_drive_a_terminal(show: Any) -> None:
    """Names come from whoever made the certificate: control characters are shown, not sent."""
    assert "csp_id          \\x1b[2J" in show(leaf(hwid=None, csp_id="\x1b[2J", issuer="SEV-VLEK-Milan"))[1]
    assert "O=\\x1b[2J\\n" in name_text(assemble.name("x", "\x1b[2J\n"))
    assert "O=Zürich" in name_text(assemble.name("x", "Zürich"))
