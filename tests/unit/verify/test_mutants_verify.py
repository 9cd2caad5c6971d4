"""What only one check refuses, and findings that must not be mistaken for others."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from Crypto.Hash import SHA384
from Crypto.Signature import pss
from tests.unit.verify.judging import check

from swsnp.amd_ca import assemble
from swsnp.amd_ca.assemble import _extension, _integer, _sequence, _tagged, _time
from swsnp.certs.x509_reader import read
from swsnp.verify.result import Outcome, Verification

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
