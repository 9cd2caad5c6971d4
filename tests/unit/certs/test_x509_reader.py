"""The certificate and CRL readers. Source: RFC 5280, RFC 4055, AMD 57230; genuine certificates where present.

The certificates made here carry signatures of zeros: the reader judges form, not signatures.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from asn1crypto import x509 as asn1crypto_x509
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.abi.snp_report import Product, TcbVersion
from swsnp.amd_ca import assemble
from swsnp.certs.crl import read_crl
from swsnp.certs.x509_reader import (
    BasicConstraints,
    EcKey,
    PssParameters,
    RsaKey,
    read,
    read_all,
    to_der,
    to_pem,
)
from swsnp.errors import InputError, LayoutError

if TYPE_CHECKING:
    from pathlib import Path

X, Y = bytes(range(48)), bytes(range(48, 96))
TCB = TcbVersion.encode(Product.MILAN, boot_loader=4, snp=0x18, microcode=0xDB)
LEAF = assemble.Tbs(
    serial=0,
    algorithm=assemble.PSS,
    issuer=assemble.name("SEV-Milan", "nobody"),
    subject=assemble.name("SEV-VCEK", "nobody"),
    not_before=datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC),
    not_after=datetime(2051, 1, 2, 3, 4, 5, tzinfo=UTC),
    spki=assemble.ec_spki(X, Y),
    extensions=assemble.leaf_extensions(Product.MILAN, "Milan-B0", TCB, hwid=bytes(64), csp_id=None),
)


def certificate(tbs: assemble.Tbs = LEAF, outer: bytes | None = None) -> bytes:
    return assemble.signed(
        assemble.tbs_certificate(tbs), tbs.algorithm if outer is None else outer, bytes(512)
    )


def test_a_leaf_field_by_field() -> None:
    """AMD 57230: serial number 0, PSS, P-384; TBS, names and SPKI are slices of what came in."""
    data = certificate()
    got = read(data)
    assert (got.serial, got.subject_cn, got.issuer_cn) == (0, "SEV-VCEK", "SEV-Milan")
    assert (got.not_before, got.not_after) == (LEAF.not_before, LEAF.not_after)
    assert (got.der, got.tbs) == (data, assemble.tbs_certificate(LEAF))
    assert (got.issuer, got.subject, got.spki) == (LEAF.issuer, LEAF.subject, LEAF.spki)
    assert got.key == EcKey(curve="1.3.132.0.34", x=X, y=Y)
    assert got.signature == bytes(512)
    assert got.algorithm.pss == PssParameters(hash="sha384", mask="mgf1", mask_hash="sha384", salt_length=48)
    assert got.inner_algorithm == got.algorithm
    assert [each.oid.rpartition("3704.1.")[2] for each in got.extensions] == [
        "1", "2", "3.1", "3.2", "3.4", "3.5", "3.6", "3.7", "3.3", "3.8", "4",
    ]  # fmt: skip
    assert got.basic_constraints() is None
    assert got.key_usage() is None
    assert got.extension("1.2.3") is None


def test_a_root_field_by_field() -> None:
    """AMD's CAs: RSA-4096, critical BasicConstraints and KeyUsage, trailerField spelled out."""
    spki, _ = assemble.rsa_spki((1 << 4095) + 1, 65537)
    tbs = replace(
        LEAF,
        serial=0x10000,
        algorithm=assemble.PSS_EXPLICIT,
        spki=spki,
        extensions=assemble.root_extensions(bytes(20), "https://x.invalid/crl"),
    )
    got = read(certificate(tbs))
    assert got.key == RsaKey(size=4096, exponent=65537)
    assert got.basic_constraints() == BasicConstraints(ca=True, path_length=None, critical=True)
    assert got.key_usage() == frozenset((5, 6))
    assert got.algorithm.pss == read(certificate()).algorithm.pss
    assert got.algorithm.der != read(certificate()).algorithm.der


def test_inner_and_outer_algorithm_are_kept_apart() -> None:
    """RFC 5280, 4.1.1.2 wants them equal: to say so is the verifier's, to keep both the reader's."""
    got = read(certificate(outer=assemble.PSS_EXPLICIT))
    assert got.inner_algorithm.der == assemble.PSS
    assert got.algorithm.der == assemble.PSS_EXPLICIT


@pytest.mark.parametrize("step", [1, 7, 400])
def test_a_cut_certificate_is_refused(step: int) -> None:
    """X.690: a length says more than there is."""
    with pytest.raises(LayoutError, match="wanted"):
        read(certificate()[:-step])


def test_trailing_bytes_are_refused() -> None:
    """Two readers of "certificate and more" would see two things."""
    with pytest.raises(LayoutError, match="1 bytes follow"):
        read(certificate() + b"\x00")


def test_one_oid_twice_is_refused() -> None:
    """RFC 5280, 4.2: not more than one instance of an extension."""
    twice = replace(LEAF, extensions=(*LEAF.extensions, LEAF.extensions[9]))
    with pytest.raises(LayoutError, match=r"1\.3\.6\.1\.4\.1\.3704\.1\.3\.8 stands twice"):
        read(certificate(twice))


def _changed(old: str, new: str) -> bytes:
    data = certificate()
    assert data.count(bytes.fromhex(old)) >= 1
    return data.replace(bytes.fromhex(old), bytes.fromhex(new))


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("a003020102", "a003020101", "version: got v2, wanted v3"),
        ("a203020130", "a203020230", "signatureAlgorithm"),
        ("0c085345562d5643454b", "0c085345562dff43454b", "invalid start byte in a string of type 0x0c"),
        ("13025553", "14025553", "string type 20"),
        ("2b81040022", "2b81048022", "object identifier"),
    ],
)
def test_malformed_fields_are_refused(old: str, new: str, text: str) -> None:
    """RFC 5280: field by field; the text names the field."""
    with pytest.raises(LayoutError, match=text):
        read(_changed(old, new))


def test_trailer_field_other_than_1_is_refused() -> None:
    """RFC 4055, 3.1: trailerFieldBC (1) is the only value."""
    broken = assemble.PSS_EXPLICIT[:-1] + b"\x02"
    with pytest.raises(LayoutError, match=r"PSS|trailerField"):
        read(certificate(replace(LEAF, algorithm=broken)))


@pytest.mark.parametrize("tag", [0x07, 0x08, 0x09], ids=["ObjectDescriptor", "InstanceOf", "Real"])
def test_parameters_of_a_wrong_kind_are_refused(tag: int) -> None:
    """RFC 4055, 3.1: the hash algorithm is tagged [0]; types without a value are refused too."""
    at = assemble.PSS.index(b"\xa0\x0f")
    broken = assemble.PSS[:at] + bytes([tag]) + assemble.PSS[at + 1 :]
    with pytest.raises(LayoutError, match="RSASSA-PSS parameters") as refused:
        read(certificate(replace(LEAF, algorithm=broken)))
    assert "\n" not in str(refused.value)


def test_one_der_value_is_no_pem() -> None:
    """What is one DER value by its header is read as that, also with a whole PEM block in an extension."""
    inside = assemble._extension("1.2.3", to_pem(certificate()))
    data = certificate(replace(LEAF, extensions=(*LEAF.extensions, inside)))
    assert to_der(data) == (data,)
    assert read(data).extension("1.2.3") is not None
    for other in (data + b"\n", data[:2] + b"\0" + data[3:], b"1" + data[1:]):
        assert to_der(other) == (certificate(),)


def test_pem_bundles() -> None:
    """RFC 7468: text around blocks is allowed, blocks of other kinds are passed over."""
    pem = to_pem(certificate())
    assert pem.startswith(b"-----BEGIN CERTIFICATE-----\n")
    assert max(map(len, pem.splitlines())) == 64
    other = to_pem(b"secret", label="RSA PRIVATE KEY")
    bundle = b"subject=SEV-VCEK\n" + pem + other + pem.replace(b"\n", b"\r\n")
    assert [each.der for each in read_all(bundle)] == [certificate(), certificate()]
    assert read(pem) == read(certificate())


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "got 0 bytes"),
        (to_pem(certificate())[:-10], "1 blocks begin, 0 are whole"),
        (to_pem(certificate()).replace(b"MII", b"M*I", 1), "PEM block 0: not base64"),
        (to_pem(b"x", label="RSA PRIVATE KEY"), "got RSA PRIVATE KEY, wanted CERTIFICATE"),
        (to_pem(certificate()) * 2, "got 2 certificates, wanted one"),
    ],
)
def test_broken_pem_is_refused(data: bytes, text: str) -> None:
    """RFC 7468."""
    with pytest.raises(InputError, match=text):
        read(data)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.integers(min_value=0, max_value=len(certificate()) - 1), st.integers(min_value=0, max_value=255))
def test_one_changed_byte_parses_or_is_refused(at: int, value: int) -> None:
    """A certificate, or LayoutError, and nothing else."""
    data = bytearray(certificate())
    data[at] = value
    try:
        got = read(bytes(data))
        got.basic_constraints()
        got.key_usage()
    except (LayoutError, InputError):
        return
    assert got.der == data


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.binary(max_size=100))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    """No other exception than the two."""
    with pytest.raises((LayoutError, InputError)):
        read(data)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("0302", "wanted"),
        ("0301ff", "BIT STRING"),
        ("03020801", "BIT STRING"),
        ("030500ffffffff", "BIT STRING"),
    ],
)
def test_broken_key_usage_is_refused(value: str, text: str) -> None:
    """RFC 5280, 4.2.1.3: 1 to 9 bits."""
    usage = assemble._extension("2.5.29.15", bytes.fromhex(value), critical=True)
    with pytest.raises(LayoutError, match=text):
        read(certificate(replace(LEAF, extensions=(usage,)))).key_usage()


def test_crl_fields() -> None:
    """RFC 5280, 5.1: version 2, entries by serial number."""
    now, later = datetime(2024, 1, 1, tzinfo=UTC), datetime(2025, 1, 1, tzinfo=UTC)
    issuer = assemble.name("ARK-Milan", "nobody")
    tbs = assemble.crl_tbs(
        issuer, bytes(20), number=3, this_update=now, next_update=later, revoked=(0x20001, 5)
    )
    data = assemble.signed(tbs, assemble.PSS, bytes(512))
    got = read_crl(data)
    assert (got.issuer, got.this_update, got.next_update, got.revoked) == (issuer, now, later, (0x20001, 5))
    assert read_crl(to_pem(data, label="X509 CRL")) == got
    with pytest.raises(LayoutError):
        read_crl(data + b"\x00")
    with pytest.raises(LayoutError):
        read_crl(certificate())
    with pytest.raises(LayoutError, match="CRL.version"):
        read_crl(data.replace(bytes.fromhex("020101"), bytes.fromhex("020100"), 1))
    with pytest.raises(InputError, match="2 CRLs"):
        read_crl(to_pem(data, label="X509 CRL") * 2)


def test_genuine_certificates_read_as_asn1crypto_reads_them(vectors: Path) -> None:
    """Every genuine certificate, against another reader; tests run with warnings as errors."""
    seen = 0
    for file in sorted((*vectors.glob("**/*.der"), *vectors.glob("**/*.pem"))):
        if file.parent.name == "crl":
            continue
        for got in read_all(file.read_bytes()):
            other = asn1crypto_x509.Certificate.load(got.der)
            inner = other["tbs_certificate"]
            assert got.tbs == inner.dump()
            assert got.serial == inner["serial_number"].native
            assert got.spki == inner["subject_public_key_info"].dump()
            assert got.subject == other.subject.dump()
            assert got.not_after == inner["validity"]["not_after"].native
            assert got.subject_cn == other.subject.native["common_name"]
            assert [each.oid for each in got.extensions] == [e["extn_id"].dotted for e in inner["extensions"]]
            seen += 1
    assert seen == 43


def test_genuine_crls(vectors: Path) -> None:
    """KDS: Milan's CRL 3 is empty, Genoa's CRL 2 revokes the first ASK."""
    assert read_crl((vectors / "crl/milan_vcek_2022.crl.der").read_bytes()).revoked == ()
    genoa = read_crl((vectors / "crl/genoa_vcek_2022.crl.der").read_bytes())
    assert genoa.revoked == (0x20001,)
    assert genoa.next_update == datetime(2023, 10, 31, 23, tzinfo=UTC)


def test_genuine_intermediates_have_a_trailing_zero_bit(vectors: Path) -> None:
    """KeyUsage 03 02 01 04 is no DER (X.690, 11.2.2), and is AMD's."""
    ask = read((vectors / "ca/milan_ask.der").read_bytes())
    usage = ask.extension("2.5.29.15")
    assert usage is not None
    assert usage.value.hex() == "03020104"
    assert ask.key_usage() == frozenset((5,))
