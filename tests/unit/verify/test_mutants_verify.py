"""What only one check refuses, and findings that must not be mistaken for others."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from Crypto.Hash import SHA384
from Crypto.Signature import pss
from tests.unit.verify.judging import check
from tests.unit.verify.remade import part_of, parts_of, sign

from swsnp.abi.snp_report import Product, TcbVersion
from swsnp.amd_ca import assemble
from swsnp.amd_ca.assemble import _extension, _integer, _sequence, _tagged, _time
from swsnp.certs.x509_reader import read
from swsnp.verify.chain import Chain, Signatures, check_times, judge
from swsnp.verify.policy import Policy
from swsnp.verify.result import Findings, Outcome, Verification
from swsnp.verify.roots import Roots

if TYPE_CHECKING:
    from tests.unit.verify.conftest import Bench


def failed(result: Verification) -> list[tuple[str, str]]:
    return [(each.check, each.field) for each in result.failures]


def crl(bench: Bench, *extensions: bytes, outer: bytes = assemble.PSS) -> bytes:
    """A current CRL of the root, signed, that names nothing."""
    ark = bench.hierarchy._ark
    body = _sequence(
        _integer(1),
        assemble.PSS,
        ark.name,
        _time(bench.at),
        _time(bench.at + timedelta(days=1)),
        _tagged(0, _sequence(assemble.authority_key_id(ark.key_id), *extensions)),
    )
    return assemble.signed(body, outer, pss.new(ark.key, salt_bytes=48).sign(SHA384.new(body)))


def test_c10_without_a_crl_is_not_made(milan: Bench) -> None:
    """C10. A check that was not made says so: it is no success."""
    outcomes = [each.outcome for each in check(milan).findings if each.check == "C10"]
    assert outcomes == [Outcome.SKIP]
    outcomes = [each.outcome for each in check(milan, crls=[crl(milan)]).findings if each.check == "C10"]
    assert outcomes == [Outcome.OK]


def test_c10_critical_extension_of_the_crl(milan: Bench) -> None:
    """C10. RFC 5280, 5.2: a CRL with a critical extension that is not understood must not be used."""
    known = _extension("2.5.29.20", _integer(1), critical=True)
    assert failed(check(milan, crls=[crl(milan, known)])) == []
    unknown = _extension("2.5.29.28", bytes.fromhex("3000"))
    assert failed(check(milan, crls=[crl(milan, known, unknown)])) == []
    unknown = _extension("2.5.29.28", bytes.fromhex("3000"), critical=True)
    assert failed(check(milan, crls=[crl(milan, known, unknown)])) == [
        ("C10", "critical extensions of the CRL")
    ]


def test_c10_algorithms_of_the_crl(milan: Bench) -> None:
    """C10. RFC 5280, 5.1.1.2: the algorithm inside the signed part is the one outside."""
    result = check(milan, crls=[crl(milan, outer=assemble.PSS_EXPLICIT)])
    assert failed(result) == [("C10", "algorithms of the CRL")]


def test_c10_a_crl_holds_up_to_its_end(milan: Bench) -> None:
    """C10. RFC 5280, 5.1.2.5: the next one is issued by nextUpdate, so that moment is still inside."""
    end = milan.at + timedelta(days=1)
    assert failed(check(milan, crls=[crl(milan)], at=end)) == []
    result = check(milan, crls=[crl(milan)], at=end + timedelta(seconds=1))
    assert failed(result) == [("C10", "time of the CRL")]


def test_c3_a_leaf_with_an_rsa_key(milan: Bench) -> None:
    """C3, R1. AMD 57230: a leaf's key is on P-384; an RSA key signs no report."""
    made = read(milan.vcek)
    ask = read(milan.hierarchy.ask)
    extensions = tuple(_extension(each.oid, each.value, critical=each.critical) for each in made.extensions)
    body = assemble.tbs_certificate(
        assemble.Tbs(
            serial=0,
            algorithm=assemble.PSS,
            issuer=made.issuer,
            subject=made.subject,
            not_before=made.not_before,
            not_after=made.not_after,
            spki=ask.spki,
            extensions=extensions,
        )
    )
    signature = pss.new(milan.hierarchy._ask.key, salt_bytes=48).sign(SHA384.new(body))
    leaf = assemble.signed(body, assemble.PSS, signature)
    result = check(milan, certificates=[leaf, *milan.certificates[1:]])
    assert failed(result) == [("C3", "key of SEV-VCEK"), ("R1", "signature")]


def _ark_with(bench: Bench, key_usage: str | None) -> bytes:
    """The root again, under its own key, with another KeyUsage."""
    made = read(bench.hierarchy.ark)
    kept = [each for each in made.extensions if each.oid != "2.5.29.15"]
    extensions = list(map(part_of, kept))
    if key_usage is not None:
        extensions.append(_extension("2.5.29.15", bytes.fromhex(key_usage), critical=True))
    return sign(bench, "ark", parts_of(bench.hierarchy.ark, extensions=tuple(extensions)))


def test_c10_the_root_has_to_be_allowed_to_sign_crls(milan: Bench) -> None:
    """C10. RFC 5280, 6.3.3 (f): cRLSign in the KeyUsage of the CRL's issuer, where it has one."""
    for key_usage, fields in (
        ("03020106", []),
        ("03020204", [("C10", "KeyUsage of the root")]),
        (None, [("C7", "KeyUsage of ARK-Milan")]),
        ("0500", [("C7", "extension"), ("C10", "KeyUsage of the root")]),
    ):
        ark = _ark_with(milan, key_usage)
        options: dict[str, Any] = {"certificates": milan.certificates[:2], "roots": Roots.of(ark)}
        assert failed(check(milan, crls=[crl(milan)], **options)) == fields
        assert ("C10", "KeyUsage of the root") not in failed(check(milan, **options))


def test_c6_what_is_known_under_a_pinned_root(milan: Bench) -> None:
    """C6. A certificate that is known whole needs no signature; under a root that is not pinned, it does."""
    ask = milan.hierarchy.ask[:-1] + bytes((milan.hierarchy.ask[-1] ^ 1,))
    certificates = [milan.vcek, ask, milan.hierarchy.ark]
    own = Roots.of(milan.hierarchy.ark)
    known = frozenset((hashlib.sha256(ask).hexdigest(),))
    for roots, checks in (
        (own, ["C6"]),
        (replace(own, known=known), []),
        (replace(own, known=known, pins={}), ["C5", "C6"]),
        (replace(own, known=frozenset(("00" * 32,))), ["C6"]),
    ):
        result = check(milan, certificates=certificates, roots=roots)
        assert [each.check for each in result.failures] == checks


def test_c8_only_what_is_outside_is_named(milan: Bench) -> None:
    """C8. Both ends belong to a validity, also where another certificate's is over."""
    leaf, ask = read(milan.vcek), read(milan.hierarchy.ask)
    result = check(milan, at=leaf.not_before)
    assert result.passed
    chain = Chain(leaf=leaf, intermediate=ask, root=read(milan.hierarchy.ark))
    second = timedelta(seconds=1)
    for at, intermediate in (
        (leaf.not_before, ask._replace(not_before=leaf.not_before + second)),
        (leaf.not_after, ask._replace(not_after=leaf.not_after - second)),
    ):
        judged = judge(
            leaf,
            [intermediate, chain.root],
            (),
            signing_key=0,
            product=Product.MILAN,
            roots=milan.roots,
            policy=Policy(),
            signatures=Signatures(8),
            lax=False,
        )
        findings = Findings()
        check_times(judged, at, Policy(), findings)
        assert [each.field for each in findings.noted] == ["validity of SEV-Milan"]


def test_c9_a_critical_extension_under_amds_root(milan: Bench) -> None:
    """C9. RFC 5280, 4.2: critical and unknown is refused, whoever assigned the number; known ones are not."""
    made = read(milan.vcek)

    def leaf(oid: str, *, critical: bool) -> bytes:
        extensions = [part_of(each, critical=critical and each.oid == oid) for each in made.extensions]
        if oid not in [each.oid for each in made.extensions]:
            extensions.append(_extension(oid, bytes.fromhex("0500"), critical=critical))
        tbs = parts_of(milan.vcek, serial=0, algorithm=assemble.PSS, extensions=tuple(extensions))
        return sign(milan, "ask", tbs)

    for oid, critical, fields in (
        ("1.3.6.1.4.1.3704.1.4", True, []),
        ("1.3.6.1.4.1.3704.1.77", False, []),
        ("1.3.6.1.4.1.3704.1.77", True, [("C9", "extension of SEV-VCEK")]),
    ):
        certificates = [leaf(oid, critical=critical), *milan.certificates[1:]]
        assert failed(check(milan, certificates=certificates)) == fields


def test_like_go_sev_guest_reads_low_levels_only(milan: Bench) -> None:
    """C9. Levels above 127, but of microcode, are beyond what that library reads."""
    high = TcbVersion.encode(Product.MILAN, boot_loader=4, snp=0x80, microcode=0xDB)
    vcek = milan.hierarchy.vcek(*milan.key.public_point, milan.chip_id, high)
    tcbs = dict.fromkeys(("current_tcb", "committed_tcb", "reported_tcb", "launch_tcb"), high)
    report = milan.report(**tcbs)
    options: dict[str, Any] = {"certificates": [vcek, *milan.certificates[1:]]}
    assert failed(check(milan, report, **options)) == []
    assert failed(check(milan, report, like="go-sev-guest", **options)) == [("C9", "levels of the leaf")]


def test_like_go_sev_guest_holds_the_leaf_against_current(milan: Bench) -> None:
    """R4. It does not compare REPORTED with COMMITTED, but the certificate's TCB with CURRENT."""
    high = TcbVersion.encode(Product.MILAN, boot_loader=4, snp=0x18, microcode=0xDC)
    vcek = milan.hierarchy.vcek(*milan.key.public_point, milan.chip_id, high)
    options: dict[str, Any] = {"certificates": [vcek, *milan.certificates[1:]], "like": "go-sev-guest"}
    result = check(milan, milan.report(reported_tcb=high), **options)
    assert [(each.check, each.wanted.split()[2]) for each in result.failures] == [("R4", "CURRENT_TCB")]
    assert [(each.check, each.wanted.split()[2]) for each in result.warnings] == [("R4", "COMMITTED_TCB")]


def test_like_go_sev_guest_knows_no_turin(turin: Bench) -> None:
    """C9. attestation.md 3.1: its reader knows neither fmcSPL nor a HWID of 8 bytes."""
    assert failed(check(turin)) == []
    assert ("C9", "fmcSPL and HWID") in failed(check(turin, like="go-sev-guest"))


def test_like_go_sev_guest_knows_few_models(milan: Bench) -> None:
    """P9. attestation.md 2.4: of Milan's models it accepts 1 only."""
    report = milan.report(cpuid_mod_id=0)
    assert failed(check(milan, report)) == []
    assert [each[0] for each in failed(check(milan, report, like="go-sev-guest"))] == ["P9"]
