"""Limits of the certificate readers, one byte on either side, and bytes that follow where none may."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import pytest
from asn1crypto import core

from swsnp.abi.snp_report import Product, TcbVersion
from swsnp.amd_ca import assemble
from swsnp.amd_ca.assemble import _bits, _extension, _integer, _oid, _sequence, _set, _tagged, _time
from swsnp.certs import der
from swsnp.certs.crl import read_crl
from swsnp.certs.kds_extensions import leaf_profile
from swsnp.certs.table import ENTRY_SIZE, TableEntry, pack
from swsnp.certs.x509_reader import RsaKey, read
from swsnp.errors import LayoutError

MORE = bytes.fromhex("0500")
"""NULL: a value in form, where none is wanted."""
NOW, LATER = datetime(2024, 1, 1, tzinfo=UTC), datetime(2025, 1, 1, tzinfo=UTC)
ALGORITHM_INSIDE = _sequence(_oid("1.2.840.113549.1.1.10"), _sequence(*assemble._PSS_FIELDS), MORE)
COMMON_NAME = (_oid("2.5.4.3"), bytes(core.UTF8String("SEV-VCEK").dump()))
EC = (_sequence(_oid("1.2.840.10045.2.1"), _oid("1.3.132.0.34")), _bits(b"\x04" + bytes(96)))
TCB = TcbVersion.encode(Product.MILAN, boot_loader=4, snp=0x18, microcode=0xDB)
EXTENSIONS = assemble.leaf_extensions(Product.MILAN, "Milan-B0", TCB, hwid=bytes(64), csp_id=None)


def parts(**changes: bytes) -> dict[str, bytes]:
    """The fields of a TBSCertificate, in order."""
    good = {
        "version": _tagged(0, _integer(2)),
        "serial": _integer(0),
        "algorithm": assemble.PSS,
        "issuer": assemble.name("SEV-Milan", "nobody"),
        "validity": _sequence(_time(NOW), _time(LATER)),
        "subject": assemble.name("SEV-VCEK", "nobody"),
        "spki": assemble.ec_spki(bytes(48), bytes(48)),
        "extensions": _tagged(3, _sequence(*EXTENSIONS)),
        "end": b"",
    }
    assert changes.keys() <= good.keys()
    return {**good, **changes}


def certificate(*, after: bytes = b"", outer: bytes = assemble.PSS, **changes: bytes) -> bytes:
    tbs = _sequence(*parts(**changes).values())
    return _sequence(tbs, outer, _bits(bytes(512)), after)


def rsa(*numbers: bytes) -> bytes:
    algorithm = _sequence(_oid("1.2.840.113549.1.1.1"), MORE)  # here NULL is what RFC 4055 wants
    return _sequence(algorithm, _bits(_sequence(*numbers)))


def test_the_parts_make_good_certificates() -> None:
    """The tools of this file, unspoiled."""
    assert read(certificate()).subject_cn == "SEV-VCEK"
    numbers = (_integer((1 << 4095) + 1), _integer(65537))
    assert read(certificate(spki=rsa(*numbers))).key == RsaKey(size=4096, exponent=65537)


BOOLEAN = bytes.fromhex("0101ff")


@pytest.mark.parametrize(
    ("where", "data"),
    [
        ("certificate", certificate(after=MORE)),
        ("signatureAlgorithm", certificate(outer=ALGORITHM_INSIDE)),
        ("signatureAlgorithm", certificate(algorithm=ALGORITHM_INSIDE)),
        ("version", certificate(version=_tagged(0, _integer(2), MORE))),
        ("validity", certificate(validity=_sequence(_time(NOW), _time(LATER), MORE))),
        ("attribute", certificate(subject=_sequence(_set(_sequence(*COMMON_NAME, MORE))))),
        ("subjectPublicKeyInfo", certificate(spki=_sequence(*EC, MORE))),
        ("subjectPublicKeyInfo", certificate(spki=rsa(_integer((1 << 4095) + 1), _integer(65537), MORE))),
        ("extensions", certificate(extensions=_tagged(3, _sequence(*EXTENSIONS), MORE))),
        ("certificate", certificate(end=MORE)),
    ],
)
def test_nothing_follows_a_structure(where: str, data: bytes) -> None:
    """RFC 5280, appendix A: no structure of a certificate has a field after its last."""
    with pytest.raises(LayoutError, match=rf"{where}: 2 bytes follow"):
        read(data)


@pytest.mark.parametrize(
    "spki",
    [
        _sequence(
            _sequence(_oid("1.2.840.113549.1.1.1"), MORE, MORE),
            _bits(_sequence(_integer((1 << 4095) + 1), _integer(65537))),
        ),
        _sequence(_sequence(_oid("1.2.840.10045.2.1"), _oid("1.3.132.0.34"), MORE), _bits(b"\4" + bytes(96))),
    ],
    ids=["RSA", "EC"],
)
def test_nothing_follows_the_parameters_of_a_key(spki: bytes) -> None:
    """RFC 3279, 2.3.1 and RFC 5480, 2.1.1: NULL, or the curve, and no more."""
    with pytest.raises(LayoutError, match="algorithm: 2 bytes follow"):
        read(certificate(spki=spki))


@pytest.mark.parametrize("size", [1, 100])
@pytest.mark.parametrize(("before", "after"), [(b"", MORE), (MORE, b""), (BOOLEAN * 2, b"")])
def test_an_extension_has_three_parts(size: int, before: bytes, after: bytes) -> None:
    """RFC 5280, 4.1: extnID, critical if it is true, extnValue; nothing else, whatever its length."""

    def read_with(*parts: bytes) -> None:
        read(certificate(extensions=_tagged(3, _sequence(_sequence(*parts)))))

    value = bytes(core.OctetString(bytes(size)).dump())
    read_with(_oid("1.2.3"), value)
    read_with(_oid("1.2.3"), BOOLEAN, value)
    with pytest.raises(LayoutError, match="wanted extnID, critical, extnValue"):
        read_with(_oid("1.2.3"), before, value, after)
    with pytest.raises(LayoutError, match="extensions: got tag 0x31, wanted 0x30"):
        read(certificate(extensions=_tagged(3, _sequence(_set(_oid("1.2.3"), value)))))


def test_nothing_follows_basic_constraints() -> None:
    """RFC 5280, 4.2.1.9: cA and pathLenConstraint, no more."""
    value = _sequence(bytes.fromhex("0101ff"), _integer(0))
    for inner, good in ((value, True), (_sequence(value[2:], MORE), False)):
        found = read(certificate(extensions=_tagged(3, _sequence(_extension("2.5.29.19", inner)))))
        if good:
            assert found.basic_constraints() is not None
        else:
            with pytest.raises(LayoutError, match="basicConstraints: 2 bytes follow"):
                found.basic_constraints()


def crl(*, entry: bytes = b"", tagged: bytes = b"", end: bytes = b"") -> bytes:
    """A CRL with one entry that has an extension; the arguments follow where they are named."""
    entry_extensions = _sequence(_extension("2.5.29.21", bytes.fromhex("0a0101")))
    number = _sequence(_extension("2.5.29.20", _integer(3)))
    tbs = _sequence(
        _integer(1),
        assemble.PSS,
        assemble.name("ARK-Milan", "nobody"),
        _time(NOW),
        _time(LATER),
        _sequence(_sequence(_integer(0x20001), _time(NOW), entry_extensions, entry)),
        _tagged(0, number, tagged),
        end,
    )
    return assemble.signed(tbs, assemble.PSS, bytes(512))


def test_nothing_follows_in_a_crl() -> None:
    """RFC 5280, 5.1: entries, extensions and the list itself end where their last field does."""
    assert read_crl(crl()).revoked == (0x20001,)
    for where, data in (
        (r"revokedCertificates\[0\]", crl(entry=MORE)),
        ("crlExtensions", crl(tagged=MORE)),
        ("CRL", crl(end=MORE)),
    ):
        with pytest.raises(LayoutError, match=rf"{where}: 2 bytes follow"):
            read_crl(data)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("3080", "the shortest definite form"),
        ("30850100000000", "the shortest definite form"),
        ("3085010000000000", "the shortest definite form"),
        ("30830100", "the shortest definite form"),
        ("308401000000", "got 0 bytes, wanted 16777216 bytes as its length says"),
    ],
)
def test_lengths(data: str, text: str) -> None:
    """X.690, 8.1.3 and 10.1: definite, at most four bytes here, and all of them there."""
    with pytest.raises(LayoutError, match=text):
        der.unwrap(bytes.fromhex(data), der.SEQUENCE, "value")


def test_object_identifiers_end_with_an_arc() -> None:
    """X.690, 8.19: bit 8 of an arc's last byte is clear; 80h inside an arc is seven zero bits."""
    assert der.oid(bytes.fromhex("2a818001"), "value") == "1.2.16385"
    with pytest.raises(LayoutError, match="is cut off"):
        der.oid(bytes.fromhex("2a86"), "value")


@pytest.mark.parametrize(
    ("value", "bits"),
    [("03020780", frozenset((0,))), ("0303070080", frozenset((8,))), ("03020106", frozenset((5, 6)))],
)
def test_key_usage_has_one_to_nine_bits(value: str, bits: frozenset[int]) -> None:
    """RFC 5280, 4.2.1.3: digitalSignature (0) to decipherOnly (8)."""
    usage = _extension("2.5.29.15", bytes.fromhex(value))
    assert read(certificate(extensions=_tagged(3, _sequence(usage)))).key_usage() == bits


def test_key_usage_without_bits_is_refused() -> None:
    """RFC 5280, 4.2.1.3: at least one bit is set."""
    usage = _extension("2.5.29.15", bytes.fromhex("030100"))
    with pytest.raises(LayoutError, match=r"wanted 1\.\.9 bits"):
        read(certificate(extensions=_tagged(3, _sequence(usage)))).key_usage()


def test_patch_levels_reach_255() -> None:
    """AMD 57230: a level is one byte of TCB_VERSION."""
    highest = TcbVersion.encode(Product.MILAN, boot_loader=255, tee=255, snp=255, microcode=255)
    extensions = assemble.leaf_extensions(Product.MILAN, "Milan-B0", highest, hwid=bytes(64), csp_id=None)
    found = read(certificate(extensions=_tagged(3, _sequence(*extensions))))
    assert leaf_profile(found, Product.MILAN).tcb_version == highest


@pytest.mark.parametrize("size", [63, 65])
def test_a_wrapped_chip_id_has_the_length_it_says(size: int) -> None:
    """AMD 57230: HWID is 64 bytes on Milan, bare or in an OCTET STRING of 64."""
    extensions = assemble.leaf_extensions(
        Product.MILAN, "Milan-B0", TCB, hwid=b"\x04\x40" + bytes(size), csp_id=None
    )
    found = read(certificate(extensions=_tagged(3, _sequence(*extensions))))
    with pytest.raises(LayoutError, match=f"leaf HWID: got {size + 2} bytes, wanted 64"):
        leaf_profile(found, Product.MILAN)


class _Long(bytes):
    """No bytes that say they are as many as fill a table up to `END`."""

    END = 1 << 32

    def __len__(self) -> int:
        return self.END - 2 * ENTRY_SIZE


class _LessLong(_Long):
    END = (1 << 32) - 1


def test_a_table_ends_below_4_gib() -> None:
    """AMD 56421, certificate table: offset and length are 32 bits each, and so is what they add up to."""
    guid = UUID(int=1)
    with pytest.raises(LayoutError, match=r"ends at 0x100000000, wanted below 2\^32"):
        pack([TableEntry(guid=guid, data=_Long())])
    head = pack([TableEntry(guid=guid, data=_LessLong())])[:ENTRY_SIZE]
    assert head[16:] == (2 * ENTRY_SIZE).to_bytes(4, "little") + (0xFFFFFFFF - 48).to_bytes(4, "little")
