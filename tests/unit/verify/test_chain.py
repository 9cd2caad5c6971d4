"""Checks on certificates: C0 to C10, and the choice of roots. Source: AMD 57230; RFC 5280."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from Crypto.Hash import SHA384
from Crypto.Signature import pss
from tests.unit.verify.judging import check, failed, judge
from tests.unit.verify.remade import parts_of, sign

from swsnp.abi.ghcb import CertTableGuid
from swsnp.abi.snp_report import Product
from swsnp.amd_ca import assemble
from swsnp.certs.table import TableEntry, pack, parse
from swsnp.certs.x509_reader import read, to_pem
from swsnp.crypto.ecdsa import SigningKey
from swsnp.errors import InputError, LayoutError, UsageError
from swsnp.verify.result import Outcome
from swsnp.verify.roots import AMD_ARK_SPKI_SHA256, Roots, spki_sha256

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.verify.conftest import Bench


CSP = "CN=cc-us-east-2.amazonaws.com"
ORG = "swsnp test CA, not AMD"
YEAR = timedelta(days=366)
BOOLEAN_TRUE = bytes.fromhex("0101ff")


def leaf_tbs(bench: Bench, **changes: Any) -> assemble.Tbs:
    """What the good VCEK was made of."""
    hwid = bench.chip_id[: bench.product.hwid_size]
    extensions = assemble.leaf_extensions(bench.product, "Milan-B0", bench.tcb, hwid=hwid, csp_id=None)
    return parts_of(
        bench.vcek, **({"serial": 0, "algorithm": assemble.PSS, "extensions": extensions} | changes)
    )


def ca_tbs(bench: Bench, role: str, **changes: Any) -> assemble.Tbs:
    """What the good ASK or ARK was made of."""
    return parts_of(getattr(bench.hierarchy, role), **changes)


def with_leaf(bench: Bench, leaf: bytes) -> list[bytes]:
    return [leaf, *bench.certificates[1:]]


def with_ask(bench: Bench, ask: bytes) -> list[bytes]:
    return [bench.vcek, ask, bench.hierarchy.ark]


def test_certificates_made_to_measure_are_good(milan: Bench) -> None:
    """The tools of this file, unspoiled, give a chain that passes."""
    ark, ask = sign(milan, "ark", ca_tbs(milan, "ark")), sign(milan, "ark", ca_tbs(milan, "ask"))
    leaf = sign(milan, "ask", leaf_tbs(milan))
    assert failed(check(milan, certificates=[leaf, ask, ark], roots=Roots.of(ark))) == []


def test_order_form_and_repetition_do_not_matter(milan: Bench) -> None:
    """Certificates are told apart by content: any order, DER or PEM, bundles, duplicates, strangers."""
    h = milan.hierarchy
    bundle = b"text before\n" + h.chain_pem("vlek") + to_pem(milan.vcek) + h.chain_pem("vcek")
    assert failed(check(milan, certificates=[bundle, milan.vcek, h.ark])) == []
    assert failed(check(milan, certificates=reversed(milan.certificates))) == []


def test_c0_what_cannot_be_read_is_refused(milan: Bench) -> None:
    """C0. Junk, trailing bytes and a broken table are failures, although the chain is complete."""
    for junk, text in (
        (b"junk", "certificate 3: got certificate.value"),
        (milan.vcek + b"\0", "1 bytes follow"),
        (b"", "0 bytes"),
    ):
        result = check(milan, certificates=[*milan.certificates, junk])
        assert failed(result) == ["C0"]
        assert text in result.failures[0].text
    result = check(milan, table=b"\1" * 24)
    assert failed(result) == ["C0"]
    assert "no terminator" in result.failures[0].text


def test_c1_missing_certificates(milan: Bench) -> None:
    """C1. Whatever is missing refuses the report; a chosen root need not be in the evidence."""
    vcek, ask, ark = milan.certificates
    assert failed(check(milan, certificates=[])) == ["C1", "R1"]
    assert failed(check(milan, certificates=[ask, ark])) == ["C1", "R1"]
    assert failed(check(milan, certificates=[vcek, ark])) == ["C1"]
    assert failed(check(milan, certificates=[vcek, ask])) == []
    assert failed(check(milan, certificates=[vcek, ask], roots=None)) == ["C1"]
    assert failed(check(milan, certificates=[vcek, ask], roots=Roots.amd())) == ["C1"]


def test_c1_the_kind_of_leaf_is_the_reports_to_say(milan: Bench) -> None:
    """C1. A VLEK does not stand in for a VCEK, nor the other way round."""
    h = milan.hierarchy
    vlek = h.vlek(*milan.key.public_point, CSP, milan.tcb)
    assert failed(check(milan, certificates=[vlek, h.asvk, h.ark])) == ["C1", "R1"]
    options: dict[str, Any] = {"roots": milan.roots, "at": milan.at}
    result = judge(milan.vlek_report(), certificates=milan.certificates, **options)
    assert failed(result) == ["C1", "R1"]
    both = [milan.vcek, vlek, h.asvk, h.ask, h.ark]
    assert failed(judge(milan.vlek_report(), certificates=both, **options)) == []
    assert failed(check(milan, certificates=both)) == []


def test_vlek_and_provider(milan: Bench) -> None:
    """R3. A VLEK names a provider; which one is accepted is the caller's to say."""
    h = milan.hierarchy
    options: dict[str, Any] = {
        "certificates": [h.vlek(*milan.key.public_point, CSP, milan.tcb), h.asvk, h.ark],
        "roots": milan.roots,
        "at": milan.at,
    }
    report = milan.vlek_report(chip_id=bytes(64))
    assert failed(judge(report, csp_ids=[CSP], **options)) == []
    assert [each.check for each in judge(report, **options).warnings] == ["R3", "R3"]
    other = judge(report, csp_ids=["CN=cc-eu-west-1.amazonaws.com"], **options)
    assert failed(other) == ["R3"]
    assert failed(judge(report, require_chip_id=True, **options)) == ["R3"]


def test_of_several_leaves_the_signer_is_taken(milan: Bench) -> None:
    """A chip has a certificate for every TCB: the one whose key signed counts, if there is one."""
    other = SigningKey.from_scalar(99).public_point
    stranger = milan.hierarchy.vcek(*other, bytes(64), milan.tcb)
    for leaves in ([stranger, milan.vcek], [milan.vcek, stranger]):
        assert failed(check(milan, certificates=[*leaves, *milan.certificates[1:]])) == []
    assert failed(check(milan, certificates=with_leaf(milan, stranger))) == ["R1", "R3"]


def test_of_several_issuers_the_signer_is_taken(milan: Bench) -> None:
    """Genoa has had two ASKs of one name."""
    spki, _ = assemble.rsa_spki((1 << 4095) | 1, 65537)
    other = sign(milan, "ark", ca_tbs(milan, "ask", spki=spki))
    for asks in ([other, milan.hierarchy.ask], [milan.hierarchy.ask, other]):
        assert failed(check(milan, certificates=[milan.vcek, *asks, milan.hierarchy.ark])) == []


def test_c2_names(milan: Bench) -> None:
    """C2. Equal common names are not enough: the whole name is compared, byte for byte."""
    strange = assemble.name("SEV-Milan", "someone else")
    leaf = sign(milan, "ask", leaf_tbs(milan, issuer=strange))
    assert failed(check(milan, certificates=with_leaf(milan, leaf))) == ["C2"]
    ask = sign(milan, "ark", ca_tbs(milan, "ask", subject=strange))
    assert failed(check(milan, certificates=with_ask(milan, ask))) == ["C2"]


def test_c2_common_names(milan: Bench) -> None:
    """C2. SEV-{P} below ARK-{P}: another pattern, another product or the wrong kind of CA is refused."""
    genoa, venice = assemble.name("SEV-Genoa", ORG), assemble.name("SEV-Venice", ORG)
    leaf = sign(milan, "ask", leaf_tbs(milan, issuer=genoa))
    ask = sign(milan, "ark", ca_tbs(milan, "ask", subject=genoa))
    result = check(milan, certificates=[leaf, ask, milan.hierarchy.ark])
    assert failed(result) == ["C2"]
    assert [each.field for each in result.failures] == ["root", "product of the chain"]
    leaf = sign(milan, "ask", leaf_tbs(milan, issuer=venice))
    ask = sign(milan, "ark", ca_tbs(milan, "ask", subject=venice))
    assert failed(check(milan, certificates=[leaf, ask, milan.hierarchy.ark])) == ["C2", "C9"]
    # an ASVK that signs a VCEK
    asvk = read(milan.hierarchy.asvk)
    leaf = sign(milan, "asvk", leaf_tbs(milan, issuer=asvk.subject))
    result = check(milan, certificates=[leaf, asvk.der, milan.hierarchy.ark])
    assert failed(result) == ["C2", "C9"]


def test_c3_keys(milan: Bench) -> None:
    """C3. RSA-4096 with exponent 65537 for CAs, an uncompressed point of P-384 for leaves."""
    x, y = milan.key.public_point
    compressed = assemble._sequence(
        assemble._sequence(assemble._oid("1.2.840.10045.2.1"), assemble._oid("1.3.132.0.34")),
        assemble._bits(bytes((2 + y[-1] % 2,)) + x),
    )
    leaf = sign(milan, "ask", leaf_tbs(milan, spki=compressed))
    assert failed(check(milan, certificates=with_leaf(milan, leaf))) == ["C3", "R1"]
    p256 = assemble.ec_spki(x, y).replace(bytes.fromhex("06052b81040022"), bytes.fromhex("06052b81040021"))
    leaf = sign(milan, "ask", leaf_tbs(milan, spki=p256))
    assert failed(check(milan, certificates=with_leaf(milan, leaf))) == ["C3", "R1"]
    off_curve = sign(milan, "ask", leaf_tbs(milan, spki=assemble.ec_spki(x, x)))
    assert failed(check(milan, certificates=with_leaf(milan, off_curve))) == ["R1"]
    for size in (3072, 4095):
        short, _ = assemble.rsa_spki((1 << size - 1) | 1, 65537)
        ask = sign(milan, "ark", ca_tbs(milan, "ask", spki=short))
        assert failed(check(milan, certificates=with_ask(milan, ask))) == ["C3", "C6"]
    even, _ = assemble.rsa_spki(1 << 4095, 1)
    ask = sign(milan, "ark", ca_tbs(milan, "ask", spki=even))
    assert failed(check(milan, certificates=with_ask(milan, ask))) == ["C3", "C6"]
    ask = sign(milan, "ark", ca_tbs(milan, "ask", spki=assemble.ec_spki(x, y)))
    assert failed(check(milan, certificates=with_ask(milan, ask))) == ["C3", "C6"]
    unknown = assemble._sequence(assemble._sequence(assemble._oid("1.3.101.112")), assemble._bits(bytes(32)))
    ask = sign(milan, "ark", ca_tbs(milan, "ask", spki=unknown))
    assert failed(check(milan, certificates=with_ask(milan, ask))) == ["C3", "C6"]


def test_c4_algorithms(milan: Bench) -> None:
    """C4. RSASSA-PSS with SHA-384 and salt 48, the same inside and outside the signed part."""
    leaf = sign(milan, "ask", leaf_tbs(milan, algorithm=assemble.PSS_EXPLICIT))
    assert failed(check(milan, certificates=with_leaf(milan, leaf))) == []
    leaf = sign(milan, "ask", leaf_tbs(milan), outer=assemble.PSS_EXPLICIT)
    assert failed(check(milan, certificates=with_leaf(milan, leaf))) == ["C4"]
    salt_32 = assemble.PSS.replace(bytes.fromhex("020130"), bytes.fromhex("020120"))
    leaf = sign(milan, "ask", leaf_tbs(milan, algorithm=salt_32))
    assert failed(check(milan, certificates=with_leaf(milan, leaf))) == ["C4"]
    leaf = sign(milan, "ask", leaf_tbs(milan), salt=32)
    assert failed(check(milan, certificates=with_leaf(milan, leaf))) == ["C6"]
    sha256 = assemble.PSS.replace(
        bytes.fromhex("0609608648016503040202"), bytes.fromhex("0609608648016503040201")
    )
    leaf = sign(milan, "ask", leaf_tbs(milan, algorithm=sha256))
    assert failed(check(milan, certificates=with_leaf(milan, leaf))) == ["C4"]
    pkcs1 = assemble._sequence(assemble._oid("1.2.840.113549.1.1.12"), assemble._NULL)
    leaf = sign(milan, "ask", leaf_tbs(milan, algorithm=pkcs1))
    assert failed(check(milan, certificates=with_leaf(milan, leaf))) == ["C4"]


def test_c5_roots_are_chosen_not_found(milan: Bench, turin: Bench) -> None:
    """C5. A root in the evidence proves nothing: self-made keys under AMD's names are refused."""
    assert failed(check(milan, roots=Roots.amd())) == ["C5"]
    assert failed(check(milan, roots=None)) == ["C5"]
    assert failed(check(milan, roots=turin.roots)) == ["C5"]
    assert failed(check(milan, roots=Roots.of(turin.hierarchy.ark, milan.hierarchy.ark))) == []


def test_c5_a_root_counts_for_its_product_only(milan: Bench) -> None:
    """C5. A chosen Genoa root does not vouch for Milan, even under the same key."""
    as_genoa = sign(
        milan,
        "ark",
        ca_tbs(milan, "ark", subject=assemble.name("ARK-Genoa", ORG), issuer=assemble.name("ARK-Genoa", ORG)),
    )
    assert failed(check(milan, roots=Roots.of(as_genoa))) == ["C5"]


def test_c5_pins_are_keys(milan: Bench) -> None:
    """C5. A root issued again under its key stays good: the pin is on SubjectPublicKeyInfo."""
    again = sign(milan, "ark", ca_tbs(milan, "ark", serial=0x10007))
    assert failed(check(milan, roots=Roots.of(again))) == []


def test_roots_refuse_what_is_no_root(milan: Bench) -> None:
    """An empty or misnamed choice is a mistake, not a policy."""
    with pytest.raises(UsageError, match="got none"):
        Roots.of()
    with pytest.raises(InputError, match="common name 'SEV-Milan', wanted ARK-"):
        Roots.of(milan.hierarchy.ask)
    with pytest.raises(LayoutError):
        Roots.of(b"junk")


def test_c6_signatures(milan: Bench) -> None:
    """C6. Each of the three signatures, by the key above it."""
    ark, ask, leaf = milan.hierarchy.ark, milan.hierarchy.ask, milan.vcek
    for spoiled in (
        [leaf[:-1] + bytes((leaf[-1] ^ 1,)), ask, ark],
        [leaf, ask[:-1] + bytes((ask[-1] ^ 1,)), ark],
        [leaf, ask, ark[:-1] + bytes((ark[-1] ^ 1,))],
    ):
        assert failed(check(milan, certificates=spoiled, roots=Roots.of(spoiled[2]))) == ["C6"]
    swapped = sign(milan, "asvk", leaf_tbs(milan))
    assert failed(check(milan, certificates=with_leaf(milan, swapped))) == ["C6"]


def test_c6_only_known_certificates_need_no_signature(milan: Bench) -> None:
    """C6. What is known byte for byte is not verified again; a forged ASK below AMD's own root is."""
    ark, ask = milan.hierarchy.ark, milan.hierarchy.ask
    known = frozenset(hashlib.sha256(each).hexdigest() for each in (ark, ask))
    roots = replace(milan.roots, known=known)
    assert failed(check(milan, roots=roots)) == []
    forged = [milan.vcek, ask[:-1] + bytes((ask[-1] ^ 1,)), ark]
    assert failed(check(milan, certificates=forged, roots=roots)) == ["C6"]


def _extensions(bench: Bench, role: str, oid: str, value: str | None, *, critical: bool = True) -> Any:
    kept = [
        assemble._extension(each.oid, each.value, critical=each.critical)
        for each in read(getattr(bench.hierarchy, role)).extensions
        if each.oid != oid
    ]
    new = [] if value is None else [assemble._extension(oid, bytes.fromhex(value), critical=critical)]
    return tuple(kept + new)


@pytest.mark.parametrize("role", ["ark", "ask"])
@pytest.mark.parametrize(
    ("oid", "value", "critical"),
    [
        ("2.5.29.19", None, True),
        ("2.5.29.19", "3000", True),
        ("2.5.29.19", "30030101ff", False),
        ("2.5.29.19", "30060101ff0201ff", True),
        ("2.5.29.19", "0500", True),
        ("2.5.29.15", None, True),
        ("2.5.29.15", "03020102", True),
        ("2.5.29.15", "0500", True),
    ],
)
def test_c7_ca_constraints(milan: Bench, role: str, oid: str, value: str | None, critical: bool) -> None:
    """C7. A CA says critically that it is one, and that its key signs certificates."""
    spoiled = sign(
        milan,
        "ark",
        ca_tbs(milan, role, extensions=_extensions(milan, role, oid, value, critical=critical)),
    )
    if role == "ark":
        result = check(milan, certificates=milan.certificates[:2], roots=Roots.of(spoiled))
    else:
        result = check(milan, certificates=with_ask(milan, spoiled))
    assert failed(result) == ["C7"]


def test_c7_path_length_of_the_root(milan: Bench) -> None:
    """C7. A root with path length 0 has no room for an intermediate."""
    for value, wanted in (("30060101ff020100", ["C7"]), ("30060101ff020101", [])):
        ark = sign(
            milan, "ark", ca_tbs(milan, "ark", extensions=_extensions(milan, "ark", "2.5.29.19", value))
        )
        result = check(milan, certificates=milan.certificates[:2], roots=Roots.of(ark))
        assert failed(result) == wanted


@pytest.mark.parametrize(("oid", "value"), [("2.5.29.19", "30030101ff"), ("2.5.29.15", "03020204")])
def test_c7_a_leaf_is_no_ca(milan: Bench, oid: str, value: str) -> None:
    """C7. Nobody gets a leaf that may sign certificates."""
    tbs = leaf_tbs(milan)
    extra = assemble._extension(oid, bytes.fromhex(value), critical=True)
    leaf = sign(milan, "ask", replace(tbs, extensions=(*tbs.extensions, extra)))
    assert failed(check(milan, certificates=with_leaf(milan, leaf))) == ["C7"]


def test_c8_validity(milan: Bench) -> None:
    """C8. Both ends included; an expired leaf only by permission, an expired CA never."""
    leaf = read(milan.vcek)
    second = timedelta(seconds=1)
    assert failed(check(milan, at=leaf.not_before)) == []
    assert failed(check(milan, at=leaf.not_after)) == []
    assert failed(check(milan, at=leaf.not_before - second)) == ["C8"]
    assert failed(check(milan, at=leaf.not_after + second)) == ["C8"]
    late = check(milan, at=leaf.not_after + second, allow_expired_leaf=True)
    assert failed(late) == []
    assert [each.check for each in late.warnings] == ["C8"]
    assert failed(check(milan, at=leaf.not_before - second, allow_expired_leaf=True)) == ["C8"]
    assert failed(check(milan, at=milan.at + 26 * YEAR, allow_expired_leaf=True)) == ["C8"]


def test_c8_a_vlek_expires_after_a_year(milan: Bench) -> None:
    """C8. AMD 57230: VLEKs are valid for one year."""
    h = milan.hierarchy
    certificates = [h.vlek(*milan.key.public_point, CSP, milan.tcb), h.asvk, h.ark]
    result = judge(milan.vlek_report(), certificates=certificates, roots=milan.roots, at=milan.at + YEAR)
    assert failed(result) == ["C8"]


def _leaf_with(bench: Bench, extension: bytes) -> bytes:
    tbs = leaf_tbs(bench)
    return sign(bench, "ask", replace(tbs, extensions=(*tbs.extensions, extension)))


def test_c9_extensions(milan: Bench) -> None:
    """C9. An unknown critical extension refuses, an unknown other one does not."""
    unknown = assemble._extension("1.2.3.4", b"\5\0", critical=True)
    assert failed(check(milan, certificates=with_leaf(milan, _leaf_with(milan, unknown)))) == ["C9"]
    harmless = assemble._extension("1.2.3.4", b"\5\0")
    assert failed(check(milan, certificates=with_leaf(milan, _leaf_with(milan, harmless)))) == []
    new = assemble._extension("1.3.6.1.4.1.3704.1.9", b"\5\0")
    result = check(milan, certificates=with_leaf(milan, _leaf_with(milan, new)))
    assert [(each.check, each.field) for each in result.warnings] == [("C9", "1.3.6.1.4.1.3704.1.9")]
    ask = ca_tbs(milan, "ask")
    strange = sign(milan, "ark", replace(ask, extensions=(*ask.extensions, unknown)))
    assert failed(check(milan, certificates=with_ask(milan, strange))) == ["C9"]


def test_c9_leaf_profile(milan: Bench) -> None:
    """C9. What the leaf's profile lacks is refused; R2 and R3 then have nothing to compare."""
    tbs = leaf_tbs(milan)
    for extensions in (tbs.extensions[:-1], tbs.extensions[:2]):
        leaf = sign(milan, "ask", replace(tbs, extensions=extensions))
        result = check(milan, certificates=with_leaf(milan, leaf))
        assert failed(result) == ["C9"]
        assert {e.check for e in result.findings if e.outcome is Outcome.SKIP} >= {"R2", "R3"}


def test_c9_struct_version_is_told(milan: Bench) -> None:
    """C9. A later structVersion is no reason to refuse."""
    tbs = leaf_tbs(milan)
    later = assemble._extension("1.3.6.1.4.1.3704.1.1", bytes.fromhex("020102"))
    leaf = sign(milan, "ask", replace(tbs, extensions=(later, *tbs.extensions[1:])))
    result = check(milan, certificates=with_leaf(milan, leaf))
    assert result.authenticated
    assert [each.check for each in result.warnings] == ["C9"]


def test_c9_one_oid_twice(milan: Bench) -> None:
    """C9. Two levels under one OID: the certificate is not read at all."""
    twice = assemble._extension("1.3.6.1.4.1.3704.1.3.8", bytes.fromhex("020101"))
    result = check(milan, certificates=with_leaf(milan, _leaf_with(milan, twice)))
    assert failed(result) == ["C0", "C1", "R1"]
    assert "stands twice" in result.failures[0].text


def test_c10_revocation(milan: Bench, turin: Bench) -> None:
    """C10. A current CRL by the root that does not name the intermediate; others are passed over."""
    h = milan.hierarchy
    assert failed(check(milan, crls=[h.crl()], require_crl=True)) == []
    assert failed(check(milan, crls=[to_pem(h.crl([0x10101]), label="X509 CRL")])) == []
    assert failed(check(milan, crls=[h.crl([0x10001])])) == ["C10"]
    assert failed(check(milan, crls=[h.crl(), h.crl([0x10001], number=2)])) == ["C10"]
    assert failed(check(milan, crls=[turin.hierarchy.crl([0x10001])])) == []
    assert failed(check(milan, crls=[turin.hierarchy.crl()], require_crl=True)) == ["C10"]
    assert failed(check(milan, crls=[h.crl()], at=milan.at - timedelta(seconds=1))) == ["C10"]
    assert failed(check(milan, crls=[h.crl()], at=milan.at + YEAR)) == ["C10"]
    crl = h.crl()
    assert failed(check(milan, crls=[crl[:-1] + bytes([crl[-1] ^ 1])])) == ["C10"]
    assert failed(check(milan, crls=[b"junk"])) == ["C10"]


def test_c10_a_vleks_chain(milan: Bench) -> None:
    """C10. The ASVK's serial is looked up as well."""
    h = milan.hierarchy
    options: dict[str, Any] = {
        "certificates": [h.vlek(*milan.key.public_point, CSP, milan.tcb), h.asvk, h.ark],
        "roots": milan.roots,
        "at": milan.at,
    }
    assert failed(judge(milan.vlek_report(), crls=[h.crl([0x10001])], **options)) == []
    assert failed(judge(milan.vlek_report(), crls=[h.crl([0x10101])], **options)) == ["C10"]


def test_c10_crl_without_an_end(milan: Bench) -> None:
    """C10. RFC 5280, 5.1.2.5 demands nextUpdate; without it a CRL would hold for ever."""
    ark = milan.hierarchy._ark
    now = milan.at
    tbs = assemble.crl_tbs(ark.name, ark.key_id, number=1, this_update=now, next_update=now, revoked=())
    twice = assemble._time(now) * 2
    assert tbs.count(twice) == 1
    inner = tbs[4:].replace(twice, assemble._time(now))
    body = assemble._sequence(inner)
    crl = assemble.signed(body, assemble.PSS, pss.new(ark.key, salt_bytes=48).sign(SHA384.new(body)))
    result = check(milan, crls=[crl])
    assert failed(result) == ["C10"]
    assert [each.field for each in result.failures] == ["time of the CRL"]


def test_evidence_in_a_table(milan: Bench) -> None:
    """AMD 56421: leaf, CAs and CRL out of the host's table; a CRL that the caller gives comes first."""
    h = milan.hierarchy
    empty: dict[str, Any] = {"certificates": ()}
    assert failed(check(milan, table=h.table(vcek=milan.vcek), **empty)) == []
    revoking = h.table(vcek=milan.vcek, crl=h.crl([0x10001]))
    assert failed(check(milan, table=revoking, **empty)) == ["C10"]
    assert failed(check(milan, table=revoking, crls=[h.crl()], **empty)) == []
    assert failed(check(milan, table=h.table(vcek=milan.vcek), roots=Roots.amd(), **empty)) == ["C5"]


def test_guids_of_a_table_are_not_believed(milan: Bench) -> None:
    """Certificates under each other's GUIDs, mixed-endian GUIDs, strangers between: content decides."""
    h = milan.hierarchy
    guid = CertTableGuid
    table = pack(
        [
            TableEntry(guid=guid.ARK, data=to_pem(milan.vcek)),
            TableEntry(guid=type(guid.ARK)(int=7), data=b"a protobuf"),
            TableEntry(guid=guid.VCEK, data=h.ark),
            TableEntry(guid=type(guid.ARK)(bytes=guid.ASK.bytes_le), data=h.ask),
        ]
    )
    assert len(parse(table)) == 4
    assert failed(check(milan, table=table, certificates=())) == []


def test_pins_are_the_genuine_roots(vectors: Path) -> None:
    """SHA-256 of SubjectPublicKeyInfo, computed again from the genuine ARKs."""
    for product in Product:
        ark = read((vectors / "ca" / f"{product.value.lower()}_ark.der").read_bytes())
        assert spki_sha256(ark) == hashlib.sha256(ark.spki).hexdigest() == AMD_ARK_SPKI_SHA256[product]
        assert Roots.amd().pinned(ark, product)
        assert not any(Roots.amd().pinned(ark, other) for other in Product if other is not product)
        assert not Roots.amd().pinned(ark, None)


def test_time_zones_are_converted(milan: Bench) -> None:
    """Times are compared as moments, not as texts."""
    assert milan.at.tzinfo is UTC
    elsewhere = milan.at.astimezone(timezone(timedelta(hours=9)))
    assert failed(check(milan, at=elsewhere)) == []
