"""The whole verification of one report. No clock, no network; a memory that changes no verdict.

Every check is made, in the order P, C, R, Y of `result.CHECKS`; each module's text carries the numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from swsnp.errors import UsageError
from swsnp.verify.chain import Judged, Signatures, check_times, judge
from swsnp.verify.evidence import Evidence, Leaf, Reader
from swsnp.verify.parse import check_product, check_size
from swsnp.verify.policy import Policy
from swsnp.verify.policy_checks import check_given, compile_policy
from swsnp.verify.relations import check_leaf_relations
from swsnp.verify.result import CHECKS, Findings, Verification, mask
from swsnp.verify.shared_report import own_of, shared_of
from swsnp.verify.signature import check_report_signature, check_signature_form, signed_by

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from swsnp.abi.snp_report import AttestationReport, Product
    from swsnp.crypto.ecdsa import Engine
    from swsnp.verify.result import Finding
    from swsnp.verify.roots import Roots
    from swsnp.verify.shared_report import Own

__all__ = ["Verifier", "verify", "verify_strict"]

_CACHE_SIZE: Final = 1024
_LIKES: Final = (None, "go-sev-guest")
_ON_EVIDENCE: Final = frozenset(("P1", "C0"))
_READ: Final = mask("C0")
_ONE: Final = (bytes, bytearray, memoryview, str)
_DEFAULT_POLICY: Final = Policy()
_DEFAULT: Final = compile_policy(_DEFAULT_POLICY)


class Verifier:
    """Verifies reports under one choice of roots and policy; remembers certificates and chains it has seen.

    What is remembered is found again by all of its bytes. Validity is judged at each call's time. A report of
    a chip that was seen before costs one P-384 verification and little more. Safe for threads.

    Args:
        roots: who may stand at the top; None refuses every report.
        policy: what the relying party demands.
        engine: whose P-384 arithmetic verifies; see `crypto.ecdsa.VerifyingKey`.
        product: the caller's knowledge; needed where a report does not name its product line.
        like: "go-sev-guest" gives the verdicts of that library with its default options under the same roots:
            rules that it does not have are told instead of refused, those that only it has are made. Made for
            comparing the two; never for deciding. A root of the evidence is not accepted here either.
        cache_size: pieces of evidence to remember, a few tens of kilobytes each.

    Raises:
        UsageError: an engine or `like` that does not exist.
        HostError: the engine is not installed.
    """

    def __init__(
        self,
        *,
        roots: Roots | None,
        policy: Policy = _DEFAULT_POLICY,
        engine: Engine = "cryptography",
        product: Product | None = None,
        like: Literal["go-sev-guest"] | None = None,
        cache_size: int = _CACHE_SIZE,
    ) -> None:
        if like not in _LIKES:
            raise UsageError(f"like: got {like!r}, wanted 'go-sev-guest' or None")
        self._roots, self._policy, self._product = roots, policy, product
        self._lax = like is not None
        self._reader = Reader(cache_size, engine)
        self._signatures = Signatures(cache_size)
        self._compiled = _DEFAULT if policy is _DEFAULT_POLICY else compile_policy(policy)

    def verify(
        self,
        report: bytes,
        *,
        certificates: Iterable[bytes] = (),
        table: bytes | None = None,
        crls: Iterable[bytes] = (),
        at: datetime,
        report_data: bytes | None = None,
        measurement: bytes | None = None,
    ) -> Verification:
        """Verify an attestation report.

        Args:
            report: 1,184 bytes; `report_from_response` and `report_from_hcl` of `certs.classify` unwrap it.
            certificates: candidates in any order, each DER or PEM, one or several: leaf, ASK or ASVK, ARK.
            table: the certificate table of an extended request. It is the host's word, like `certificates`.
            crls: revocation lists, DER or PEM. With none given, those of the table count.
            at: the time to judge at, aware.
            report_data: 64 bytes that REPORT_DATA has to be, beside what the policy says.
            measurement: 48 bytes that MEASUREMENT has to be, beside what the policy says.

        Returns:
            All findings and the verdict. Malformed, incomplete or false evidence is a finding, no exception.

        Raises:
            UsageError: `at` without a time zone, data of another size, bytes where several are wanted.
        """
        if at.tzinfo is None:
            raise UsageError(f"at: got {at} without a time zone, wanted an aware time")
        wanted_data, wanted_measurements = self._wanted(report_data, measurement)
        findings = Findings(lax=self._lax)
        evidence = self._reader.read(
            _several("certificates", certificates),
            None if table is None else bytes(table),
            _several("crls", crls),
        )
        findings.take(evidence.noted, _READ)
        data = bytes(report)
        product = leaf = None
        readable = check_size(data, findings)
        if readable:
            product, leaf = self._judge(data, evidence, at, wanted_data, wanted_measurements, findings)
        else:
            for name in CHECKS.keys() - _ON_EVIDENCE:
                findings.skip(name, "the report could not be read")
        return Verification(
            raw=data if readable else None,
            noted=tuple(findings.noted),
            made=findings.made,
            missing=_missing(wanted_data, wanted_measurements),
            not_checked=self._compiled.not_checked[report_data is not None, measurement is not None],
            product=product,
            leaf=None if leaf is None else leaf.certificate,
        )

    def _judge(
        self,
        data: bytes,
        evidence: Evidence,
        at: datetime,
        wanted_data: tuple[bytes, ...],
        wanted_measurements: tuple[frozenset[bytes], ...],
        findings: Findings,
    ) -> tuple[Product | None, Leaf | None]:
        """P2 to Y23."""
        policy, own, shared = self._policy, own_of(data), shared_of(data, lax=self._lax)
        report = shared.report
        findings.take(shared.noted, shared.made)
        check_signature_form(data, own, findings)
        signing_key: int = report.signer_info.signing_key
        leaf, signed = _select_leaf(data, evidence.leaves.get(signing_key, ()))
        certificate = None if leaf is None else leaf.certificate
        product = check_product(report, own.chip_id, self._product, certificate, findings)
        chain = self._chain(evidence, leaf, signing_key, product)
        findings.take(chain.noted, chain.made)
        check_times(chain, at, policy, findings)
        check_report_signature(signed, certificate, findings)
        check_leaf_relations(report.reported_tcb, own.chip_id, chain.profile, policy, findings)
        judged = shared.judged(product, self._compiled)
        findings.take(judged.relations, judged.made)
        check_given(own.report_data, report.measurement, wanted_data, wanted_measurements, findings)
        self._apply_policy(own, judged.policy, product, findings)
        return product, leaf

    def _apply_policy(
        self, own: Own, shared: tuple[Finding, ...], product: Product | None, findings: Findings
    ) -> None:
        """Y1, Y2 and Y5 to Y23, in their order."""
        start = len(findings.noted)
        findings.noted += shared
        for check in self._compiled.own:
            check(own, product, findings)
        if shared:
            findings.sort(start)

    def _chain(
        self, evidence: Evidence, leaf: Leaf | None, signing_key: int, product: Product | None
    ) -> Judged:
        """The chain's judgement, from memory when this leaf was seen in this evidence."""
        found = None if leaf is None else leaf.judged.get(product)
        if found is None:
            found = judge(
                None if leaf is None else leaf.certificate,
                evidence.certificates,
                evidence.crls,
                signing_key=signing_key,
                product=product,
                roots=self._roots,
                policy=self._policy,
                signatures=self._signatures,
                lax=self._lax,
            )
            if leaf is not None:
                leaf.judged[product] = found
        return found

    def _wanted(
        self, report_data: bytes | None, measurement: bytes | None
    ) -> tuple[tuple[bytes, ...], tuple[frozenset[bytes], ...]]:
        """The policy's and the call's."""
        data, measurements = self._compiled.report_data, self._compiled.measurements
        if report_data is not None:
            data += (_sized("report_data", report_data, 64),)
        if measurement is not None:
            measurements += (frozenset((_sized("measurement", measurement, 48),)),)
        return data, measurements


def verify(
    report: bytes,
    *,
    certificates: Iterable[bytes] = (),
    table: bytes | None = None,
    crls: Iterable[bytes] = (),
    roots: Roots | None,
    at: datetime,
    policy: Policy = _DEFAULT_POLICY,
    report_data: bytes | None = None,
    measurement: bytes | None = None,
    product: Product | None = None,
    engine: Engine = "cryptography",
    like: Literal["go-sev-guest"] | None = None,
) -> Verification:
    """Verify one report: `Verifier.verify` of a `Verifier` for one use; the arguments are theirs."""
    verifier = Verifier(roots=roots, policy=policy, engine=engine, product=product, like=like, cache_size=16)
    return verifier.verify(
        report,
        certificates=certificates,
        table=table,
        crls=crls,
        at=at,
        report_data=report_data,
        measurement=measurement,
    )


def verify_strict(
    report: bytes,
    *,
    certificates: Iterable[bytes] = (),
    table: bytes | None = None,
    crls: Iterable[bytes] = (),
    roots: Roots | None,
    at: datetime,
    report_data: bytes,
    measurement: bytes,
    policy: Policy = _DEFAULT_POLICY,
    product: Product | None = None,
    engine: Engine = "cryptography",
) -> AttestationReport:
    """As `verify`, but returns the report itself.

    Raises:
        VerificationError: the report is not accepted.
    """
    return verify(
        report,
        certificates=certificates,
        table=table,
        crls=crls,
        roots=roots,
        at=at,
        policy=policy,
        report_data=report_data,
        measurement=measurement,
        product=product,
        engine=engine,
    ).require()


def _select_leaf(data: bytes, leaves: tuple[Leaf, ...]) -> tuple[Leaf | None, bool]:
    """Of several leaves, the one whose key signed the report."""
    for leaf in leaves:
        if signed_by(data, leaf.key):
            return leaf, True
    return (leaves[0] if leaves else None), False


def _missing(data: tuple[bytes, ...], measurements: tuple[frozenset[bytes], ...]) -> tuple[str, ...]:
    return (() if data else ("report_data",)) + (() if measurements else ("measurement",))


def _several(name: str, values: Iterable[bytes]) -> tuple[bytes, ...]:
    if isinstance(values, _ONE):
        raise UsageError(f"{name}: got one {type(values).__name__}, wanted a sequence of them")
    return tuple(map(bytes, values)) if values else ()


def _sized(name: str, value: bytes, size: int) -> bytes:
    if len(value) != size:
        raise UsageError(f"{name}: got {len(value)} bytes, wanted {size}")
    return bytes(value)
