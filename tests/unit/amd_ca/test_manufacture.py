"""Hierarchies in the shape of AMD's. Source: AMD 57230; RFC 5280; genuine certificates where present."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NoReturn

import pytest
from asn1crypto import x509 as asn1crypto_x509

from swsnp.abi.ghcb import CertTableGuid
from swsnp.abi.snp_report import Product, TcbVersion
from swsnp.amd_ca.manufacture import Hierarchy
from swsnp.certs.crl import read_crl
from swsnp.certs.kds_extensions import leaf_profile
from swsnp.certs.signature import rsa_signed
from swsnp.certs.table import parse
from swsnp.certs.x509_reader import Certificate, read, read_all, to_pem
from swsnp.crypto.derive import SeededEntropy
from swsnp.crypto.ecdsa import SigningKey
from swsnp.errors import LayoutError, UsageError
from swsnp.verify.roots import AMD_ARK_SPKI_SHA256, spki_sha256

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Protocol

    class Skip(Protocol):
        def __call__(self, reason: str, remedy: str, *, avoidable: bool = True) -> NoReturn: ...


NOW = datetime(2024, 5, 5, 1, 2, 3, tzinfo=UTC)
X, Y = SigningKey.from_scalar(0x1234567).public_point
CSP = "CN=cc-us-east-2.amazonaws.com"


def tcb(product: Product) -> TcbVersion:
    return TcbVersion.encode(product, boot_loader=4, snp=0x18, microcode=0xDB)


@dataclass(frozen=True)
class Issued:
    ark: Certificate
    ask: Certificate
    asvk: Certificate
    vcek: Certificate
    vlek: Certificate


@pytest.fixture(scope="session")
def issued(hierarchy_of: Callable[[Product], Hierarchy]) -> Callable[[Product], Issued]:
    made: dict[Product, Issued] = {}

    def of(product: Product) -> Issued:
        if product not in made:
            h = hierarchy_of(product)
            made[product] = Issued(
                ark=read(h.ark),
                ask=read(h.ask),
                asvk=read(h.asvk),
                vcek=read(h.vcek(X, Y, bytes(range(product.hwid_size)), tcb(product))),
                vlek=read(h.vlek(X, Y, CSP, tcb(product))),
            )
        return made[product]

    return of


GENUINE_LEAVES = [
    (Product.MILAN, "milan-v3/vcek.pem", "vcek"),
    (Product.MILAN, "milan-v3-vlek/vlek.der", "vlek"),
    (Product.GENOA, "genoa-line-v5/vcek.der", "vcek"),
    (Product.TURIN, "turin-v5/vcek.pem", "vcek"),
]


def shape(certificate: Certificate) -> dict[str, object]:
    """What must be equal, whoever issued: all but keys, dates, organization, values and signature."""
    name = asn1crypto_x509.Name.load(certificate.subject)
    rdn = [(pair[0]["type"].dotted, pair[0]["value"].chosen.tag) for pair in name.chosen]
    return {
        "serial": certificate.serial,
        "names": rdn,
        "subject": certificate.subject_cn,
        "issuer": certificate.issuer_cn,
        "name sizes": (len(certificate.subject), len(certificate.issuer)),
        "algorithms": (certificate.inner_algorithm.der, certificate.algorithm.der),
        "spki": (len(certificate.spki), type(certificate.key)),
        "signature": len(certificate.signature),
        "extensions": [(each.oid, each.critical) for each in certificate.extensions],
        "version": certificate.tbs[4:9] if certificate.tbs[1] == 0x82 else certificate.tbs[3:8],
    }


@pytest.mark.parametrize("product", list(Product))
@pytest.mark.parametrize("role", ["ark", "ask", "asvk"])
def test_cas_have_the_genuine_shape(
    product: Product, role: str, issued: Callable[[Product], Issued], vectors: Path
) -> None:
    """KDS cert_chain: field by field the same, and 2 bytes more for the longer host in the CRL's URL."""
    genuine = read((vectors / "ca" / f"{product.value.lower()}_{role}.der").read_bytes())
    ours: Certificate = getattr(issued(product), role)
    assert shape(ours) == shape(genuine)
    assert ours.not_after.replace(year=2000) == ours.not_before.replace(year=2000)
    assert (
        ours.not_after.year - ours.not_before.year == genuine.not_after.year - genuine.not_before.year == 25
    )
    for mine, theirs in zip(ours.extensions, genuine.extensions, strict=True):
        if mine.oid in ("2.5.29.15", "2.5.29.19"):
            assert mine.value == theirs.value
    assert len(ours.der) - len(genuine.der) in (2, 3)


@pytest.mark.parametrize(("product", "file", "kind"), GENUINE_LEAVES)
def test_leaves_have_the_genuine_shape(
    product: Product, file: str, kind: str, issued: Callable[[Product], Issued], vectors: Path
) -> None:
    """Leaves since November 2024: trailerField left out, serial number 0, AMD's order of extensions."""
    genuine = read_all((vectors / file).read_bytes())[0]
    ours: Certificate = getattr(issued(product), kind)
    assert shape(ours) == shape(genuine)
    years = {"vcek": 7, "vlek": 1}[kind]
    assert (
        ours.not_after.year - ours.not_before.year
        == genuine.not_after.year - genuine.not_before.year
        == years
    )
    mine, theirs = leaf_profile(ours, product), leaf_profile(genuine, product)
    assert (mine.struct_version, mine.product_name) == (theirs.struct_version, theirs.product_name)
    # a microcode level of 80h and above takes one byte more
    longer = (mine.tcb["microcode"] > 127) - (theirs.tcb["microcode"] > 127)
    assert len(ours.der) - len(genuine.der) == longer


@pytest.mark.parametrize(("product", "file", "kind"), GENUINE_LEAVES)
def test_a_genuine_leaf_made_again_is_equal_but_for_keys(
    product: Product, file: str, kind: str, hierarchy_of: Callable[[Product], Hierarchy], vectors: Path
) -> None:
    """From the genuine leaf's own values come, byte for byte, its extensions, subject key and TBS length."""
    genuine = read_all((vectors / file).read_bytes())[0]
    profile = leaf_profile(genuine, product)
    x, y = genuine.spki[-96:-48], genuine.spki[-48:]
    h = hierarchy_of(product)
    if kind == "vcek":
        ours = read(h.vcek(x, y, profile.hwid or b"", profile.tcb_version))
    else:
        ours = read(h.vlek(x, y, profile.csp_id or "", profile.tcb_version))
    assert ours.extensions == genuine.extensions
    assert ours.spki == genuine.spki
    assert len(ours.tbs) == len(genuine.tbs)


@pytest.mark.parametrize("product", list(Product))
def test_signatures_and_times(product: Product, issued: Callable[[Product], Issued]) -> None:
    """ARK signs itself, ASK and ASVK; those sign the leaves, which start one day back."""
    made = issued(product)
    for signed, issuer in (
        (made.ark, made.ark),
        (made.ask, made.ark),
        (made.asvk, made.ark),
        (made.vcek, made.ask),
        (made.vlek, made.asvk),
    ):
        assert rsa_signed(signed, issuer)
        assert not rsa_signed(signed, made.asvk if issuer is made.ask else made.ask)
    assert made.vcek.not_before == datetime(2024, 5, 4, 1, 2, 3, tzinfo=UTC)
    assert made.vcek.not_after == datetime(2031, 5, 4, 1, 2, 3, tzinfo=UTC)
    assert made.vlek.not_after == datetime(2025, 5, 4, 1, 2, 3, tzinfo=UTC)
    assert made.ark.not_before <= made.vcek.not_before
    assert spki_sha256(made.ark) not in AMD_ARK_SPKI_SHA256.values()


def test_nobody_takes_it_for_amds(issued: Callable[[Product], Issued]) -> None:
    """The organization says so in every name, and the CRL's host cannot exist (RFC 2606)."""
    made = issued(Product.MILAN)
    for certificate in (made.ark, made.ask, made.asvk, made.vcek, made.vlek):
        for name in (certificate.subject, certificate.issuer):
            assert b"swsnp test CA, not AMD" in name
            assert b"Advanced Micro Devices" not in name
    assert b"https://kds.swsnp.invalid/vcek/v1/Milan/crl" in made.ark.tbs
    assert b"https://kds.swsnp.invalid/vcek/v1/Milan/crl" in made.ask.tbs
    assert b"https://kds.swsnp.invalid/vlek/v1/Milan/crl" in made.asvk.tbs


def test_key_identifiers(issued: Callable[[Product], Issued]) -> None:
    """RFC 5280, 4.2.1.2: SHA-1 of the subject's public key; AKI repeats the issuer's."""
    made = issued(Product.TURIN)
    key = asn1crypto_x509.Certificate.load(made.ark.der).public_key["public_key"].contents[1:]
    wanted = hashlib.sha1(key, usedforsecurity=False).digest()
    ski, aki = made.ark.extension("2.5.29.14"), made.ask.extension("2.5.29.35")
    assert ski is not None
    assert ski.value == b"\x04\x14" + wanted
    assert aki is not None
    assert aki.value == b"\x30\x16\x80\x14" + wanted


def test_equal_seeds_give_equal_bytes(hierarchy_of: Callable[[Product], Hierarchy]) -> None:
    """Two processes with one seed and one clock agree, whatever was asked for first."""
    first = hierarchy_of(Product.MILAN)
    again = Hierarchy(Product.MILAN, entropy=SeededEntropy(b"test hierarchy 41"), now=lambda: NOW)
    assert again.vcek(X, Y, bytes(64), tcb(Product.MILAN)) == first.vcek(X, Y, bytes(64), tcb(Product.MILAN))
    assert again.ark == first.ark
    assert again.crl([5], number=2) == first.crl([5], number=2)


def test_amd_names_under_our_own_key() -> None:
    """Some programs compare the organization; the key is never AMD's."""
    entropy = SeededEntropy(b"test hierarchy 41")
    root = read(Hierarchy(Product.MILAN, entropy=entropy, now=lambda: NOW, amd_names=True).ark)
    assert b"Advanced Micro Devices" in root.subject
    assert b"https://kdsintf.amd.com/vcek/v1/Milan/crl" in root.tbs
    assert spki_sha256(root) not in AMD_ARK_SPKI_SHA256.values()


def test_refusals(hierarchy_of: Callable[[Product], Hierarchy]) -> None:
    """Sizes of AMD 57230: a HWID of 64 bytes, 8 on Turin; coordinates of 48; IA5 text."""
    milan = hierarchy_of(Product.MILAN)
    for x, y, hwid, text in (
        (X, Y, bytes(8), "HWID: got 8 bytes, wanted 64"),
        (X[1:], Y, bytes(64), "public point: got 47 and 48"),
        (X, Y + b"\x00", bytes(64), "public point: got 48 and 49"),
    ):
        with pytest.raises(LayoutError, match=text):
            milan.vcek(x, y, hwid, tcb(Product.MILAN))
    with pytest.raises(LayoutError, match="HWID: got 64 bytes, wanted 8"):
        hierarchy_of(Product.TURIN).vcek(X, Y, bytes(64), tcb(Product.TURIN))
    with pytest.raises(LayoutError, match="wanted ASCII"):
        milan.vlek(X, Y, "CN=\N{BULLET}", tcb(Product.MILAN))
    with pytest.raises(UsageError, match="time zone"):
        Hierarchy(Product.MILAN, entropy=bytes, now=lambda: NOW.replace(tzinfo=None))
    with pytest.raises(UsageError, match="either a VCEK or a VLEK"):
        milan.table()
    with pytest.raises(UsageError, match="either a VCEK or a VLEK"):
        milan.table(vcek=b"a", vlek=b"b")


def test_no_secret_is_shown(hierarchy_of: Callable[[Product], Hierarchy]) -> None:
    """Keys and seeds are in no repr."""
    milan = hierarchy_of(Product.MILAN)
    assert repr(milan) == "Hierarchy(Milan, 'swsnp test CA, not AMD')"
    assert "key=" not in repr(milan._ark)


def test_tables(hierarchy_of: Callable[[Product], Hierarchy]) -> None:
    """AMD 56421: one GUID stands for ASK and ASVK, so a table holds one chain."""
    h = hierarchy_of(Product.MILAN)
    guid = CertTableGuid
    entries = [(each.guid, each.data) for each in parse(h.table(vcek=b"leaf", crl=b"list"))]
    assert entries == [(guid.VCEK, b"leaf"), (guid.ASK, h.ask), (guid.ARK, h.ark), (guid.CRL, b"list")]
    entries = [(each.guid, each.data) for each in parse(h.table(vlek=b"leaf"))]
    assert entries == [(guid.VLEK, b"leaf"), (guid.ASK, h.asvk), (guid.ARK, h.ark)]


def test_chain_pem(hierarchy_of: Callable[[Product], Hierarchy]) -> None:
    """KDS cert_chain: ASK or ASVK first, then the ARK."""
    h = hierarchy_of(Product.GENOA)
    assert [each.der for each in read_all(h.chain_pem())] == [h.ask, h.ark]
    assert [each.der for each in read_all(h.chain_pem("vlek"))] == [h.asvk, h.ark]
    with pytest.raises(UsageError, match="wanted 'vcek' or 'vlek'"):
        h.chain_pem("ark")  # type: ignore[arg-type]  # what a caller without types may pass


def test_crl_has_the_genuine_shape(hierarchy_of: Callable[[Product], Hierarchy], vectors: Path) -> None:
    """KDS: version 2, PSS without trailerField, AKI and CRL number; entries without extensions."""
    h = hierarchy_of(Product.GENOA)
    ours, genuine = (
        read_crl(h.crl([0x20001], number=2)),
        read_crl((vectors / "crl/genoa_vcek_2022.crl.der").read_bytes()),
    )
    assert ours.algorithm.der == ours.inner_algorithm.der == genuine.algorithm.der
    assert ours.revoked == genuine.revoked
    assert [each.oid for each in ours.extensions] == [each.oid for each in genuine.extensions]
    assert ours.extensions[1] == genuine.extensions[1]
    assert len(ours.der) == len(genuine.der)
    assert rsa_signed(ours, read(h.ark))
    assert (ours.this_update, ours.next_update) == (NOW, NOW.replace(year=2025))
    assert read_crl(h.crl()).revoked == ()


def test_validity_from_29_february() -> None:
    """A day that is missing 25 years on becomes 1 March; RFC 5280: GeneralizedTime from 2050 on."""
    entropy = SeededEntropy(b"test hierarchy 41")
    leap = datetime(2028, 3, 1, 12, tzinfo=UTC)
    root = read(Hierarchy(Product.MILAN, entropy=entropy, now=lambda: leap).ark)
    assert root.not_before == datetime(2028, 2, 29, 12, tzinfo=UTC)
    assert root.not_after == datetime(2053, 3, 1, 12, tzinfo=UTC)
    assert b"\x18\x0f20530301120000Z" in root.tbs


@pytest.mark.parametrize("product", list(Product))
def test_openssl_accepts_the_chains(
    product: Product,
    issued: Callable[[Product], Issued],
    hierarchy_of: Callable[[Product], Hierarchy],
    tmp_path: Path,
    cannot_run: Skip,
) -> None:
    """OpenSSL 3: ARK to ASK to VCEK, ARK to ASVK to VLEK, and the CRL; another product's root is refused."""
    program = shutil.which("openssl")
    if program is None:
        cannot_run("no openssl program here", "apt-get install openssl")
    made = issued(product)
    for name in ("ark", "ask", "asvk", "vcek", "vlek"):
        (tmp_path / f"{name}.pem").write_bytes(to_pem(getattr(made, name).der))
    (tmp_path / "crl.der").write_bytes(hierarchy_of(product).crl([made.asvk.serial]))

    def openssl(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *words], cwd=tmp_path, capture_output=True, text=True, check=False)

    at = ("-attime", str(int(NOW.timestamp())))
    for issuer, leaf in (("ask", "vcek"), ("asvk", "vlek")):
        good = openssl("verify", *at, "-CAfile", "ark.pem", "-untrusted", f"{issuer}.pem", f"{leaf}.pem")
        assert (good.stdout, good.returncode) == (f"{leaf}.pem: OK\n", 0)
    bad = openssl("verify", *at, "-CAfile", "ark.pem", "-untrusted", "asvk.pem", "vcek.pem")
    assert bad.returncode == 2
    crl = openssl("crl", "-inform", "DER", "-in", "crl.der", "-CAfile", "ark.pem", "-noout")
    assert (crl.stderr.strip(), crl.returncode) == ("verify OK", 0)
    listed = openssl("crl", "-inform", "DER", "-in", "crl.der", "-noout", "-text").stdout
    assert f"Serial Number: {made.asvk.serial:06X}" in listed
