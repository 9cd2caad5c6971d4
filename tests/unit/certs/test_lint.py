"""Every rule of the lint alone: a table in which nothing else is wrong. Sources as in `lint_result.RULES`."""

from __future__ import annotations

import struct
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.certs.conftest import NOW, Authority

from swsnp.abi.ghcb import CertTableGuid
from swsnp.abi.kds import AMD_ORGANIZATION
from swsnp.abi.snp_report import SIGNED_SIZE, AttestationReport, Product, SignerInfo, SigningKey, TcbVersion
from swsnp.amd_ca import assemble
from swsnp.amd_ca.assemble import _bits, _integer, _oid, _sequence, _time
from swsnp.amd_ca.manufacture import TEST_ORGANIZATION, Hierarchy
from swsnp.certs.crl import read_crl
from swsnp.certs.lint import RULES, Expected, LintResult, Severity, lint_table
from swsnp.certs.signature import rsa_signed
from swsnp.certs.table import TableEntry, pack
from swsnp.certs.x509 import OID_P384
from swsnp.certs.x509_reader import read, to_pem
from swsnp.crypto import ecdsa
from swsnp.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

OTHER = UUID(int=7)
ENDORSEMENT = UUID("9f4116cd-c503-4f5a-8f6f-fb68882f4ce2")
AT = NOW + timedelta(days=1)
VCEK, VLEK, ASK, ARK, CRL = (
    CertTableGuid.VCEK,
    CertTableGuid.VLEK,
    CertTableGuid.ASK,
    CertTableGuid.ARK,
    CertTableGuid.CRL,
)


def entry(guid: UUID, data: bytes) -> TableEntry:
    return TableEntry(guid=guid, data=data)


def head(guid: UUID, offset: int, length: int) -> bytes:
    return guid.bytes + struct.pack("<II", offset, length)


def broken(result: LintResult) -> list[str]:
    """The rules that are broken, each once."""
    return list(dict.fromkeys(each.rule for each in result.findings))


def look(blob: bytes, *, at: datetime = AT, **expected: Any) -> LintResult:
    return lint_table(blob, at=at, expected=Expected(**expected))


def parts(milan: Authority) -> dict[UUID, bytes]:
    """A good table's entries in their order."""
    return {VCEK: milan.vcek, ASK: milan.hierarchy.ask, ARK: milan.hierarchy.ark, CRL: milan.crl}


def packed(entries: dict[UUID, bytes]) -> bytes:
    return pack(entry(guid, data) for guid, data in entries.items())


@pytest.fixture(scope="session")
def good(milan: Authority) -> bytes:
    return packed(parts(milan))


def only(result: LintResult, rule: str, *texts: str) -> None:
    """Nothing but this rule is broken, and a finding says these things."""
    assert broken(result) == [rule], [str(each) for each in result.findings]
    for text in texts:
        assert any(text in str(each) for each in result.findings), [str(each) for each in result.findings]
    assert result.clean is (RULES[rule].severity is Severity.NOTE)


def report(milan: Authority, **changes: Any) -> bytes:
    """A report that the chip signed."""
    fields: dict[str, Any] = {
        "version": 3,
        "cpuid_fam_id": 0x19,
        "cpuid_mod_id": 1,
        "reported_tcb": milan.tcb,
        "chip_id": milan.hwid.ljust(64, b"\0"),
    }
    body = bytes(AttestationReport(**{**fields, **changes}))[:SIGNED_SIZE]
    return body + milan.key.sign(body).ljust(0x200, b"\0")


def test_a_good_table_is_clean(good: bytes, milan: Authority) -> None:
    """Everything is looked at that can be, and nothing is found."""
    spki = {Product.MILAN: frozenset((sha256_of_key(milan.hierarchy.ark),))}
    result = look(good, roots=spki, product=Product.MILAN, report=report(milan))
    assert (result.findings, result.clean, result.not_checked) == ((), True, {})
    assert result.as_dict() == {"clean": True, "findings": [], "not_checked": {}}


def test_what_is_not_looked_at_is_told(good: bytes, milan: Authority) -> None:
    """A rule without what it needs is listed with the reason, and is no finding."""
    assert look(good).not_checked == {
        "K6": "no roots were chosen",
        "M1": "no chip id was given",
        "M2": "no TCB was given",
        "M3": "no product line was given",
        "M4": "no report was given",
        "M5": "no report was given",
    }
    without_crl = packed({guid: data for guid, data in parts(milan).items() if guid != CRL})
    assert {"K7", "K8", "K9"} <= look(without_crl).not_checked.keys()
    masked = look(good, report=report(milan, chip_id=bytes(64)))
    assert masked.not_checked["M1"] == "the report's CHIP_ID is masked"
    assert masked.clean


def test_a_table_with_a_vlek_is_clean(milan: Authority) -> None:
    """AMD 57230: a VLEK names no chip; ASVK stands in ASK's entry."""
    table = packed({VLEK: milan.vlek, ASK: milan.hierarchy.asvk, ARK: milan.hierarchy.ark})
    signed = report(milan, signer_info=SignerInfo.of(signing_key=SigningKey.VLEK))
    result = look(table, report=signed)
    assert result.findings == ()
    assert result.not_checked["M1"] == "a VLEK names no chip"


def test_turin(turin: Authority) -> None:
    """AMD 57230: eight bytes of HWID, five levels; a chip id of eight or of 64 bytes is the same."""
    table = packed({VCEK: turin.vcek, ASK: turin.hierarchy.ask, ARK: turin.hierarchy.ark})
    tcb = turin.tcb.decode(Product.TURIN)
    for chip_id in (turin.hwid, turin.hwid.ljust(64, b"\0")):
        assert look(table, chip_id=chip_id, tcb=tcb, product=Product.TURIN).findings == ()
    only(look(table, chip_id=turin.hwid[::-1]), "M1", turin.hwid.hex())


# the layout -----------------------------------------------------------------------------------------------


def opaque(*lengths: int) -> list[TableEntry]:
    """Entries whose content nobody looks at."""
    return [entry(UUID(int=0x100 + n), bytes([n + 1]) * size) for n, size in enumerate(lengths)]


def layout(blob: bytes) -> list[str]:
    """The broken rules of a table of opaque entries, without those that every such table breaks."""
    return [rule for rule in broken(look(blob)) if rule not in ("T13", "K1")]


def test_t1_no_terminator(good: bytes, milan: Authority) -> None:
    """AMD 56421: 24 zero bytes end the entries; data that follow at once are not taken for entries."""
    entries = parts(milan)
    at, heads = 24 * len(entries), b""
    for guid, data in entries.items():
        heads += head(guid, at, len(data))
        at += len(data)
    result = look(heads + b"".join(entries.values()))
    only(result, "T1", "T1 error: at 0x60, got 4 entries and no terminator")
    padded = (heads + b"".join(entries.values())).ljust(16384, b"\0")
    only(look(padded), "T1", "got 4 entries and no terminator")
    assert layout(b"") == ["T1"]
    assert layout(good[:23]) == ["T1"]


def test_t2_a_terminator_with_numbers(good: bytes) -> None:
    """AMD 56421: the terminator is zero all over."""
    for at, number in ((112, "offset 0x1 and length 0x0"), (116, "offset 0x0 and length 0x1")):
        spoiled = bytearray(good)
        spoiled[at] = 1
        only(look(bytes(spoiled)), "T2", "T2 error: entry 4, at 0x60", number)


def test_t3_data_inside_the_entries(good: bytes) -> None:
    """AMD 56421: a writer that forgets the terminator counts 24 * n."""
    blob = head(OTHER, 24, 24) + bytes(24)
    assert layout(blob) == ["T3"]
    assert layout(head(OTHER, 47, 1) + bytes(24)) == ["T3"]
    assert layout(head(OTHER, 48, 1) + bytes(24) + b"x") == []
    spoiled = bytearray(good)
    struct.pack_into("<II", spoiled, 16, 0, len(good))
    result = look(bytes(spoiled))
    assert broken(result)[:2] == ["T3", "T5"]
    assert str(result.findings[0]).startswith(
        "T3 error: entry 0, at 0x0, got VCEK at 0x0, wanted 0x78 or more"
    )


def test_where_the_entries_end_although_an_offset_is_wrong(good: bytes) -> None:
    """A terminator counts when all entries before it can be; then the wrong offset is all that is told."""
    spoiled = bytearray(good)
    struct.pack_into("<I", spoiled, 16, 30)
    assert broken(look(bytes(spoiled)))[:1] == ["T3"]
    assert layout(head(OTHER, 24, 100) + bytes(24)) == ["T3", "T4"]


def test_t4_data_after_the_end() -> None:
    """AMD 56421: offset + length stays inside the blob."""
    blob = pack(opaque(4, 4))
    assert layout(blob) == []
    assert layout(blob[:-1]) == ["T4"]
    assert "ends at 0x50, wanted 0x4f or less" in str(look(blob[:-1]).findings[0])
    assert layout(head(OTHER, 48, 0xFFFFFFFF) + bytes(24) + b"x" * 9) == ["T4"]


def test_t5_overlap() -> None:
    """Two entries that share a byte can be read in two ways."""
    ends = bytes(24) + b"abcdef"
    assert layout(head(OTHER, 72, 3) + head(ENDORSEMENT, 75, 3) + ends) == []
    result = look(head(OTHER, 72, 4) + head(ENDORSEMENT, 75, 3) + ends)
    assert layout(head(OTHER, 72, 4) + head(ENDORSEMENT, 75, 3) + ends) == ["T5"]
    assert "entry 1, at 0x4b" in str(result.findings[0])
    assert "wanted 0x4c or more, where entry 0 ends" in str(result.findings[0])
    inside = head(OTHER, 96, 6) + head(UUID(int=8), 97, 1) + head(UUID(int=9), 99, 3) + ends
    overlaps = [each for each in look(inside).findings if each.rule == "T5"]
    assert [each.entry for each in overlaps] == [1, 2]
    chained = head(OTHER, 96, 2) + head(UUID(int=8), 97, 5) + head(UUID(int=9), 101, 1) + ends
    assert [each.entry for each in look(chained).findings if each.rule == "T5"] == [1, 2]
    # where two reach equally far, the one that stands first is named
    same = head(OTHER, 96, 6) + head(UUID(int=8), 97, 5) + head(UUID(int=9), 99, 3) + ends
    assert all("where entry 0 ends" in str(each) for each in look(same).findings if each.rule == "T5")


def test_t6_a_gap() -> None:
    """Bytes between two entries belong to nobody: left over from an older certificate, perhaps."""
    assert layout(head(OTHER, 49, 1) + bytes(24) + b"..") == ["T6"]
    result = look(head(OTHER, 72, 1) + head(ENDORSEMENT, 75, 1) + bytes(24) + b"a..b")
    assert "entry 1, at 0x49, got 2 bytes of no entry" in str(result.findings[0])


def test_t7_data_in_another_order() -> None:
    """AMD's tool writes the data as it writes the entries."""
    assert layout(head(OTHER, 73, 1) + head(ENDORSEMENT, 72, 1) + bytes(24) + b"ba") == ["T7"]


def test_t8_bytes_that_follow() -> None:
    """Padding is of zeros."""
    blob = pack(opaque(4))
    assert layout(blob + bytes(9)) == []
    assert layout(blob + bytes(9) + b"\1\0") == ["T8"]
    assert "at 0x3d, got 2 bytes of no entry" in str(look(blob + bytes(9) + b"\1\0").findings[0])


def test_t9_a_guid_twice(milan: Authority) -> None:
    """go-sev-guest takes the last, others the first; in both byte orders it is one GUID."""
    for second in (OTHER, ENDORSEMENT):
        blob = head(OTHER, 72, 1) + head(second, 73, 1) + bytes(24) + b"ab"
        assert layout(blob) == (["T9"] if second is OTHER else [])
    again = pack([entry(ARK, milan.hierarchy.ark), entry(UUID(bytes=ARK.bytes_le), b"other")])
    assert {"T9", "T10"} <= set(broken(look(again)))


def test_t10_mixed_endian(milan: Authority) -> None:
    """EFI's byte order: recognised, named, and what it holds is looked at."""
    swapped = {
        UUID(bytes=guid.bytes_le) if guid == ASK else guid: data for guid, data in parts(milan).items()
    }
    result = look(packed(swapped))
    only(
        result,
        "T10",
        f"entry 1, at 0x18, got {UUID(bytes=ASK.bytes_le)}, which is ASK or ASVK",
        f"wanted {ASK}",
    )


def test_t11_larger_than_a_guest_can_receive(good: bytes) -> None:
    """Linux, SEV_FW_BLOB_MAX_SIZE: four pages."""
    assert look(good.ljust(16384, b"\0")).clean
    only(look(good.ljust(16385, b"\0")), "T11", "got 16385 bytes, 5 pages, wanted at most 16384")


def test_t12_another_order_of_entries(milan: Authority) -> None:
    """AMD's sev-host-set-cert-chain: VCEK, ASK, ARK; what others add comes after."""
    entries = parts(milan)
    result = look(packed({guid: entries[guid] for guid in (VCEK, ARK, ASK, CRL)}))
    only(result, "T12", "got VCEK, ARK, ASK or ASVK, CRL, wanted VCEK, ASK or ASVK, ARK, CRL")
    only(look(packed({ENDORSEMENT: b"x", **entries})), "T12")
    assert look(packed({**entries, ENDORSEMENT: b"x"})).findings == ()


def test_t13_an_unknown_guid_is_a_note(milan: Authority) -> None:
    """Hosts add entries of their own: kept, told, and no reason to refuse."""
    result = look(packed({**parts(milan), OTHER: b"x"}))
    only(result, "T13", f"T13 note: entry 4, got {OTHER}")
    assert result.clean


def test_t14_an_empty_entry(milan: Authority) -> None:
    """An entry without data says that there is something, and there is not."""
    only(look(packed({**parts(milan), ENDORSEMENT: b""})), "T14", "entry 4, got length 0")


# the content ----------------------------------------------------------------------------------------------


def test_e1_what_cannot_be_read(milan: Authority) -> None:
    """An entry with a known GUID holds what can be read."""
    entries = parts(milan)
    for data, text in (
        (milan.crl + b"\0", "bytes follow"),
        (b"no list at all", "wanted a CRL"),
        (bytes(24), "certificate table"),
        (to_pem(milan.crl, label="X509 CRL")[:-20], "1 blocks begin, 0 are whole"),
    ):
        only(look(packed({**entries, CRL: data})), "E1", "entry 3", text)
    inner = milan.hierarchy.ark.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x01", 1)
    assert "E1" in broken(look(packed({**entries, ARK: inner})))


def test_e2_pem(milan: Authority) -> None:
    """guest.md: consumers expect DER for the leaf; DER is the safe choice for all."""
    entries = {**parts(milan), ASK: to_pem(milan.hierarchy.ask)}
    only(look(packed(entries)), "E2", "entry 1", "ASK or ASVK in PEM, wanted DER")


def test_e3_several_in_one(milan: Authority) -> None:
    """A chain file put into one entry: readers take the first block, or none."""
    both = to_pem(milan.hierarchy.ask) + to_pem(milan.hierarchy.ask)
    result = look(packed({**parts(milan), ASK: both}))
    assert broken(result) == ["E2", "E3"]  # two in one entry are PEM
    assert "entry 1" in str(result.findings[1])
    assert "got 2 in one, wanted one" in str(result.findings[1])


def test_e4_the_guid_says_something_else(milan: Authority) -> None:
    """A VCEK in VLEK's entry: found by content, so the chain is whole."""
    entries = parts(milan)
    vcek = entries.pop(VCEK)
    only(look(packed({VLEK: vcek, **entries})), "E4", "entry 0", "got VCEK, wanted VLEK")
    crl = entries.pop(CRL)
    result = look(packed({VCEK: vcek, VLEK: crl, **entries}))
    only(result, "E4", "got a CRL, wanted VLEK")
    swapped = {VCEK: vcek, ASK: entries[ARK], ARK: entries[ASK]}
    only(look(packed(swapped)), "E4", "entry 1", "got ARK, wanted ASK or ASVK", "entry 2")
    foreign = certificate(milan, subject="someone")
    only(look(packed({**parts(milan), CRL: foreign})), "E4", "a certificate of 'someone', wanted CRL")


def certificate(
    milan: Authority,
    *,
    subject: str = "SEV-VCEK",
    issuer: str = "SEV-Milan",
    organization: str = TEST_ORGANIZATION,
    hwid: bytes | None = None,
    spki: bytes | None = None,
    algorithm: bytes = assemble.PSS,
    outer: bytes | None = None,
) -> bytes:
    """A leaf of our own making, signed by the hierarchy's ASK."""
    tbs = assemble.tbs_certificate(
        assemble.Tbs(
            serial=0,
            algorithm=algorithm,
            issuer=assemble.name(issuer, organization),
            subject=assemble.name(subject, TEST_ORGANIZATION),
            not_before=NOW,
            not_after=NOW + timedelta(days=400),
            spki=assemble.ec_spki(*milan.key.public_point) if spki is None else spki,
            extensions=assemble.leaf_extensions(
                Product.MILAN, "Milan-B0", milan.tcb, hwid=hwid or milan.hwid, csp_id=None
            ),
        )
    )
    signature = read(milan.hierarchy._sign(milan.hierarchy._ask.key, tbs, algorithm)).signature
    return assemble.signed(tbs, algorithm if outer is None else outer, signature)


def test_e5_extensions_out_of_form(milan: Authority) -> None:
    """AMD 57230: a Milan chip's HWID has 64 bytes."""
    leaf = certificate(milan, hwid=bytes(63))
    result = look(packed({**parts(milan), VCEK: leaf}), chip_id=milan.hwid, tcb={"snp": 1})
    only(result, "E5", "entry 0, at 0x78", "got 63 bytes, wanted 64")
    assert result.not_checked["M1"] == result.not_checked["M2"] == "the leaf's extensions cannot be read (E5)"
    nobody = certificate(milan, issuer="SEV-Rome")
    result = look(packed({**parts(milan), VCEK: nobody}), product=Product.MILAN)
    assert broken(result) == ["E5", "K3"]
    assert "names no product line" in str(result.findings[0])


def test_e6_keys_and_algorithms(milan: Authority) -> None:
    """AMD 57230: P-384 below, RSA-4096 above, RSASSA-PSS with SHA-384 and 48 bytes of salt."""
    entries = parts(milan)
    key = read(milan.hierarchy.ask).spki
    only(look(packed({**entries, VCEK: certificate(milan, spki=key)})), "E6", "RsaKey", "wanted P-384")
    for curve, point in (("1.2.840.10045.3.1.7", b"\4" + bytes(64)), (OID_P384, b"\2" + bytes(48))):
        spki = _sequence(_sequence(_oid("1.2.840.10045.2.1"), _oid(curve)), _bits(point))
        leaf = certificate(milan, spki=spki)
        only(look(packed({**entries, VCEK: leaf})), "E6", f"got EcKey(curve='{curve}', x=b''")
        assert "M5" in broken(look(packed({**entries, VCEK: leaf}), report=report(milan)))
    two_forms = certificate(milan, outer=assemble.PSS_EXPLICIT)
    only(look(packed({**entries, VCEK: two_forms})), "E6", "inside and outside")
    salt = assemble.PSS.replace(b"\x02\x01\x30", b"\x02\x01\x20")
    only(look(packed({**entries, VCEK: certificate(milan, algorithm=salt)})), "E6", "salt_length=32")
    assert look(packed({**entries, VCEK: certificate(milan, algorithm=assemble.PSS_EXPLICIT)})).clean


# the chain ------------------------------------------------------------------------------------------------


def test_k1_no_leaf(milan: Authority) -> None:
    """A table of issuers alone helps nobody; nor does an empty one."""
    only(look(packed({ASK: milan.hierarchy.ask, ARK: milan.hierarchy.ark})), "K1", "got SEV-Milan, ARK-Milan")
    only(look(bytes(24)), "K1", "got no certificate")


def test_k2_an_issuer_is_missing(milan: Authority) -> None:
    """The chain goes up to the root; an ASVK does not stand for the ASK."""
    leaf, ask, ark = milan.vcek, milan.hierarchy.ask, milan.hierarchy.ark
    only(look(packed({VCEK: leaf, ARK: ark})), "K2", "entry 0", "got SEV-VCEK alone, wanted SEV-Milan too")
    only(look(packed({VCEK: leaf, ASK: ask})), "K2", "got SEV-VCEK, SEV-Milan alone, wanted ARK-Milan too")
    only(look(packed({VCEK: leaf, ASK: milan.hierarchy.asvk, ARK: ark})), "K2", "wanted SEV-Milan too")
    both = {VCEK: leaf, VLEK: milan.vlek, ASK: ask, ARK: ark}
    only(look(packed(both)), "K2", "entry 1", "wanted SEV-VLEK-Milan too")


def test_k3_names_that_do_not_meet(milan: Authority) -> None:
    """RFC 5280: the issuer's name is the one in the issuer's certificate, byte for byte."""
    leaf = certificate(milan, organization=AMD_ORGANIZATION)
    entries = {VCEK: leaf, ASK: milan.hierarchy.ask, ARK: milan.hierarchy.ark}
    only(look(packed(entries)), "K3", "entry 0", "O=Advanced Micro Devices", "O=swsnp test CA, not AMD")


@pytest.fixture(scope="session")
def stranger(milan: Authority) -> Hierarchy:
    """Another hierarchy with the same names."""
    return Hierarchy(milan.product, now=lambda: NOW)


def test_k4_another_key(milan: Authority, stranger: Hierarchy) -> None:
    """Names alone prove nothing: an ASK of another hierarchy with the same name, and a broken signature."""
    entries = parts(milan)
    result = look(packed({**entries, ASK: stranger.ask}))
    only(result, "K4", "SEV-VCEK signed by another key, wanted the key of SEV-Milan in entry 1")
    assert [each.entry for each in result.findings] == [0, 1]
    root = milan.hierarchy.ark
    only(look(packed({**entries, ARK: root[:-1] + bytes([root[-1] ^ 1])})), "K4", "entry 2")


def test_k5_the_time(good: bytes, milan: Authority) -> None:
    """RFC 5280, 4.1.2.5: both ends are inside."""
    leaf = read(milan.vcek)
    entries = {guid: data for guid, data in parts(milan).items() if guid != CRL}
    second = timedelta(seconds=1)
    for at in (leaf.not_before, leaf.not_after):
        assert look(packed(entries), at=at).clean
    only(
        look(packed(entries), at=leaf.not_after + second), "K5", "entry 0", "for SEV-VCEK, wanted 2024-05-04"
    )
    early = look(packed(entries), at=leaf.not_before - second)
    only(early, "K5")
    assert [each.entry for each in early.findings] == [0, 1, 2]


def sha256_of_key(der: bytes) -> str:
    import hashlib

    return hashlib.sha256(read(der).spki).hexdigest()


def test_k6_the_root(good: bytes, milan: Authority) -> None:
    """The caller chooses roots per product line; what stands in the table is never one by itself."""
    mine = frozenset((sha256_of_key(milan.hierarchy.ark),))
    assert look(good, roots={Product.MILAN: mine}).clean
    only(look(good, roots={Product.GENOA: mine}), "K6", "entry 2", "got ARK-Milan with a key", "no such root")
    only(look(good, roots={Product.MILAN: frozenset(("00" * 32,))}), "K6", "00000000")


def test_k7_a_list_of_another(milan: Authority, stranger: Hierarchy) -> None:
    """RFC 5280, 6.3.3: the CRL's issuer is the root, by name and by signature."""
    entries = parts(milan)
    only(look(packed({**entries, CRL: stranger.crl()})), "K7", "entry 3", "wanted one by ARK-Milan")
    renamed = assemble.name("ARK-Milan", AMD_ORGANIZATION)
    only(look(packed({**entries, CRL: crl(milan, issuer=renamed)})), "K7", "O=Advanced Micro Devices")
    assert look(packed({**entries, CRL: crl(milan)})).clean
    salted = assemble.PSS.replace(b"\x02\x01\x30", b"\x02\x01\x20")
    only(look(packed({**entries, CRL: crl(milan, outer=salted)})), "K7")


def crl(milan: Authority, *, issuer: bytes | None = None, outer: bytes = assemble.PSS) -> bytes:
    """A CRL by the hierarchy's root, under a name of our choice."""
    ark = milan.hierarchy._ark
    tbs = assemble.crl_tbs(
        issuer or ark.name,
        ark.key_id,
        number=1,
        this_update=NOW,
        next_update=NOW + timedelta(days=9),
        revoked=(),
    )
    return assemble.signed(tbs, outer, read_crl(milan.hierarchy._sign(ark.key, tbs, assemble.PSS)).signature)


def test_k8_an_old_list(milan: Authority) -> None:
    """RFC 5280, 5.1.2.5: thisUpdate <= time <= nextUpdate."""
    hierarchy = milan.hierarchy
    entries = parts(milan)
    year = NOW.replace(year=2025)
    for at in (NOW, year):
        assert look(packed(entries), at=at).clean
    only(
        look(packed(entries), at=year + timedelta(seconds=1)),
        "K8",
        "entry 3",
        "wanted 2024-05-05 01:02:03 to",
    )
    only(look(packed(entries), at=NOW - timedelta(seconds=1)), "K8")
    assert hierarchy.product is Product.MILAN


def test_k8_a_list_without_an_end(milan: Authority) -> None:
    """RFC 5280, 5.1.2.5: nextUpdate has to be there."""
    ark = milan.hierarchy._ark
    tbs = _sequence(_integer(1), assemble.PSS, ark.name, _time(NOW))
    endless = assemble.signed(
        tbs, assemble.PSS, read_crl(milan.hierarchy._sign(ark.key, tbs, assemble.PSS)).signature
    )
    only(look(packed({**parts(milan), CRL: endless})), "K8", "to no nextUpdate")


def test_only_rsa_keys_sign(milan: Authority) -> None:
    """AMD 57230: ASK, ASVK and ARK have RSA keys; a leaf's key signs no certificate."""
    assert rsa_signed(read(milan.vcek), read(milan.hierarchy.ask))
    assert not rsa_signed(read(milan.vcek), read(milan.vcek))


def test_k9_a_revoked_issuer(milan: Authority) -> None:
    """AMD 57230: CRLs name ASKs and ASVKs by serial number."""
    entries = parts(milan)
    revoked = milan.hierarchy.crl(revoked=(0x10001,), number=2)
    only(look(packed({**entries, CRL: revoked})), "K9", "entry 1", "SEV-Milan, serial 0x10001, revoked")
    assert look(packed({**entries, CRL: milan.hierarchy.crl(revoked=(0x10101,), number=2)})).clean


# the machine ----------------------------------------------------------------------------------------------


def test_m1_another_chip(good: bytes, milan: Authority) -> None:
    """AMD 57230: HWID is the chip's; told by the caller or by a report."""
    other = milan.hwid[:-1] + b"\xff"
    only(look(good, chip_id=other), "M1", f"entry 0, got {milan.hwid.hex()}, wanted {other.hex()}")
    only(look(good, report=report(milan, chip_id=other)), "M1")
    assert look(good, chip_id=milan.hwid, report=report(milan, chip_id=other)).clean


def test_m2_another_tcb(good: bytes, milan: Authority) -> None:
    """AMD 57230: a leaf is for one TCB; components that are not given are not compared."""
    levels = milan.tcb.decode(Product.MILAN)
    assert look(good, tcb=levels).clean
    assert look(good, tcb={"snp": levels["snp"]}).clean
    only(
        look(good, tcb={**levels, "snp": 0x19}),
        "M2",
        "got boot_loader=4 tee=0 snp=24",
        "snp=25 microcode=219",
    )
    only(look(good, tcb={"fmc": 1}), "M2", "got fmc=none, wanted fmc=1")
    newer = TcbVersion.encode(Product.MILAN, **{**levels, "microcode": 0xDC})
    only(look(good, report=report(milan, reported_tcb=newer)), "M2", "microcode=220")
    assert look(good, tcb=levels, report=report(milan, reported_tcb=newer)).clean


def test_m3_another_product(good: bytes, milan: Authority) -> None:
    """The issuer's name tells the leaf's product line; family and model tell the report's."""
    only(look(good, product=Product.GENOA), "M3", "got Milan, wanted Genoa")
    only(look(good, report=report(milan, cpuid_mod_id=0x11)), "M3", "got Milan, wanted Genoa")
    assert look(good, product=Product.MILAN, report=report(milan, cpuid_mod_id=0x11)).clean
    old = look(good, report=report(milan, version=2, cpuid_fam_id=0, cpuid_mod_id=0))
    assert (old.clean, old.not_checked) == (
        True,
        {"K6": "no roots were chosen", "M3": "no product line was given"},
    )


def test_m4_another_kind_of_key(good: bytes, milan: Authority) -> None:
    """AMD 56860: SIGNING_KEY says VCEK or VLEK; 7 is an unsigned report."""
    vlek = report(milan, signer_info=SignerInfo.of(signing_key=SigningKey.VLEK))
    only(look(good, report=vlek), "M4", "got VCEK, wanted VLEK")
    none = report(milan, signer_info=SignerInfo.of(signing_key=SigningKey.NONE))
    only(look(good, report=none), "M4", "wanted none: SIGNING_KEY is 7")


def test_m5_another_signature(good: bytes, milan: Authority) -> None:
    """Same chip id, same TCB, and still another key: another chip that says it is this one."""
    other = ecdsa.SigningKey.from_scalar(0x7654321, deterministic=True)
    body = report(milan)[:SIGNED_SIZE]
    forged = body + other.sign(body).ljust(0x200, b"\0")
    only(look(good, report=forged), "M5", "entry 0, got a report that this VCEK did not sign")
    rsa = certificate(milan, spki=read(milan.hierarchy.ask).spki)
    assert broken(look(packed({**parts(milan), VCEK: rsa}), report=report(milan))) == ["E6", "M5"]


# the whole ------------------------------------------------------------------------------------------------


def test_every_rule_has_its_test() -> None:
    """A rule that is added here is tested here."""
    names = {name.split("_")[1].upper() for name in globals() if name.startswith("test_")}
    assert RULES.keys() <= names


def test_wrong_arguments(good: bytes) -> None:
    """A time without a zone and a report of another size are the caller's mistakes."""
    with pytest.raises(UsageError, match="without a time zone"):
        lint_table(good, at=datetime(2024, 1, 1))  # noqa: DTZ001  # what is refused
    with pytest.raises(InputError, match="got 1183 bytes, wanted 1184"):
        look(good, report=bytes(1183))


def test_findings_drive_no_terminal(milan: Authority) -> None:
    """What a certificate calls its issuer is shown escaped."""
    leaf = certificate(milan, issuer="SEV-Milan\x1b[2J")
    told = " ".join(map(str, look(packed({VCEK: leaf})).findings))
    assert "\x1b" not in told
    assert "\\x1b[2J" in told


def test_findings_are_typed(good: bytes) -> None:
    """Rule, severity, entry, offset, got, wanted and source, also as JSON."""
    (finding,) = look(good.ljust(20000, b"\0")).as_dict()["findings"]
    assert finding == {
        "rule": "T11",
        "severity": "error",
        "entry": None,
        "offset": None,
        "got": "20000 bytes, 5 pages",
        "wanted": "at most 16384",
        "rule_text": RULES["T11"].text,
        "source": "Linux, SEV_FW_BLOB_MAX_SIZE",
    }


def test_a_hostile_blob_costs_little() -> None:
    """Thousands of entries that each claim the whole blob: bounded time and memory, here and in `parse`."""
    count = 40000
    heads = b"".join(head(UUID(int=n + 1), 24 * (count + 1), 1 << 19) for n in range(count))
    blob = heads + bytes(24) + bytes(1 << 19)
    result = look(blob)
    assert {"T5", "T11", "K1"} <= set(broken(result))


def test_genuine_chains(vectors: Any, authority_of: Callable[[Product], Authority]) -> None:
    """Tables of genuine certificates are clean against their own reports, under AMD's roots alone."""
    from swsnp.certs.x509_reader import read_all
    from swsnp.verify.roots import AMD_ARK_SPKI_SHA256

    roots = {product: frozenset((pin,)) for product, pin in AMD_ARK_SPKI_SHA256.items()}
    for folder, file, line, kind in (
        ("milan-v3", "vcek.pem", "milan", "ask"),
        ("milan-v3-vlek", "vlek.der", "milan", "asvk"),
        ("genoa-line-v5", "vcek.der", "genoa", "ask"),
        ("turin-v5", "vcek.pem", "turin", "ask"),
    ):
        leaf = read_all((vectors / folder / file).read_bytes())[0]
        ca = vectors / "ca"
        table = packed(
            {
                VLEK if kind == "asvk" else VCEK: leaf.der,
                ASK: (ca / f"{line}_{kind}.der").read_bytes(),
                ARK: (ca / f"{line}_ark.der").read_bytes(),
            }
        )
        seen = look(
            table,
            at=leaf.not_before + timedelta(days=1),
            roots=roots,
            report=(vectors / folder / "report.bin").read_bytes(),
        )
        assert seen.findings == (), (folder, [str(each) for each in seen.findings])
    milan = authority_of(Product.MILAN)
    only(look(packed(parts(milan)), roots=roots), "K6")


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_are_looked_at(data: st.DataObject) -> None:
    """Random bytes, and tables with one spot changed: a result, never an exception."""
    base = data.draw(
        st.sampled_from([b"", bytes(48), pack(opaque(3, 0, 40)), packed({VCEK: b"x", ARK: b"0"})])
    )
    patch = data.draw(st.binary(max_size=12))
    at = data.draw(st.integers(0, len(base)))
    result = look(base[:at] + patch + base[at + len(patch) :], report=None)
    assert all(each.rule in RULES for each in result.findings)
    assert replace(result, findings=()).clean
