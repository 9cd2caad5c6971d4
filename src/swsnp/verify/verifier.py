"""The whole verification of one report. Pure: no clock, no network, no state.

Every check is made, in the order P, C, R, Y of `result.CHECKS`; each module's text carries the numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

from swsnp.abi.ghcb import CertTableGuid
from swsnp.certs.crl import read_crl
from swsnp.certs.table import canonical_guid, parse
from swsnp.certs.x509_reader import read_all
from swsnp.errors import InputError, LayoutError, UsageError
from swsnp.verify.chain import check_chain, check_present, check_revocation, select_chain, select_leaf
from swsnp.verify.options import Options
from swsnp.verify.parse import check_form, check_product, parse_report
from swsnp.verify.relations import (
    check_expected,
    check_leaf_relations,
    check_policy_relations,
    check_tcb_relations,
)
from swsnp.verify.result import CHECKS, Findings, Verification
from swsnp.verify.signature import check_report_signature, check_signature_form

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime

    from swsnp.abi.snp_report import AttestationReport, Product
    from swsnp.certs.crl import Crl
    from swsnp.certs.x509_reader import Certificate
    from swsnp.verify.roots import Roots

__all__ = ["verify", "verify_strict"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_TABLE_CERTIFICATES: Final = (
    CertTableGuid.VCEK,
    CertTableGuid.VLEK,
    CertTableGuid.ASK,
    CertTableGuid.ARK,
)
_ORDER: Final = {check: number for number, check in enumerate(CHECKS)}


def verify(
    report: bytes,
    *,
    certificates: Iterable[bytes] = (),
    table: bytes | None = None,
    roots: Roots | None,
    at: datetime,
    product: Product | None = None,
    crls: Iterable[bytes] = (),
    expected_report_data: bytes | None = None,
    expected_measurement: bytes | None = None,
    csp_ids: Iterable[str] = (),
    allow_debug: bool = False,
    allow_migrate_ma: bool = False,
    allow_expired_leaf: bool = False,
    accept_host_report: bool = False,
    require_chip_id: bool = False,
    require_crl: bool = False,
    require_committed_current: bool = False,
) -> Verification:
    """Verify an attestation report.

    Args:
        report: 1,184 bytes; `parse.report_from_response` and `report_from_hcl` take it out of an envelope.
        certificates: candidates in any order, each DER or PEM, one or several: leaf, ASK or ASVK, ARK.
        table: the certificate table of an extended request. It is the host's word, like `certificates`.
        roots: who may stand at the top. None refuses every report.
        at: the time to judge at, aware.
        product: the caller's knowledge; needed where a report does not name its product line.
        crls: revocation lists, DER or PEM. With none given, those of the table count.
        expected_report_data: 64 bytes. Without it the caller has to compare the report's.
        expected_measurement: 48 bytes; likewise.
        csp_ids: providers whose VLEK is accepted; none given accepts any, with a warning.
        allow_debug: accept a guest that the host may read.
        allow_migrate_ma: accept a guest with a migration agent.
        allow_expired_leaf: accept evidence that was stored longer than its leaf is valid.
        accept_host_report: accept a report that the host asked for.
        require_chip_id: refuse a masked CHIP_ID.
        require_crl: refuse when no CRL of the root is given.
        require_committed_current: refuse when COMMITTED_TCB is not CURRENT_TCB.

    Returns:
        All findings and the verdict. Malformed, incomplete or false evidence is a finding, no exception.

    Raises:
        UsageError: `at` without a time zone, expected data of another size, bytes where several are wanted.
    """
    options = Options(
        allow_debug=allow_debug,
        allow_migrate_ma=allow_migrate_ma,
        allow_expired_leaf=allow_expired_leaf,
        accept_host_report=accept_host_report,
        require_chip_id=require_chip_id,
        require_crl=require_crl,
        require_committed_current=require_committed_current,
        csp_ids=frozenset(_several("csp_ids", csp_ids)),
        expected_report_data=_sized("expected_report_data", expected_report_data, 64),
        expected_measurement=_sized("expected_measurement", expected_measurement, 48),
    )
    if at.tzinfo is None:
        raise UsageError(f"at: got {at} without a time zone, wanted an aware time")
    findings = Findings()
    candidates, lists = _read_evidence(
        _several("certificates", certificates), table, _several("crls", crls), findings
    )
    data = bytes(report)
    parsed = parse_report(data, findings)
    if parsed is None:
        for check in list(CHECKS)[1:]:
            if check != "C0":
                findings.skip(check, "the report could not be read")
        return _concluded(None, None, None, findings)
    return _verify_parsed(data, parsed, product, candidates, lists, roots, at, options, findings)


def _strict(function: Callable[_P, Verification]) -> Callable[_P, AttestationReport]:
    def call(*args: _P.args, **kwargs: _P.kwargs) -> AttestationReport:
        """As `verify`, but returns the report; raises VerificationError when it is not authenticated."""
        return function(*args, **kwargs).require()

    return call


verify_strict = _strict(verify)
"""As `verify`, but returns the report itself, and raises VerificationError unless it is authenticated."""


def _verify_parsed(
    data: bytes,
    report: AttestationReport,
    product: Product | None,
    candidates: Sequence[Certificate],
    crls: Sequence[Crl],
    roots: Roots | None,
    at: datetime,
    options: Options,
    findings: Findings,
) -> Verification:
    check_form(data, report, findings)
    check_signature_form(report, findings)
    signing_key = report.signer_info.signing_key
    leaf = select_leaf(candidates, signing_key, data)
    product = check_product(report, product, leaf, findings)
    chain = None if leaf is None else select_chain(leaf, candidates, roots)
    check_present(candidates, signing_key, leaf, chain, findings)
    profile = check_chain(chain, product, findings, roots=roots, at=at, options=options)
    check_revocation(chain, crls, findings, at=at, options=options)
    check_report_signature(data, leaf, findings)
    check_leaf_relations(report, profile, options, findings)
    check_tcb_relations(report, product, options, findings)
    check_policy_relations(report, options, findings)
    check_expected(report, options, findings)
    return _concluded(report, product, leaf, findings)


def _concluded(
    report: AttestationReport | None,
    product: Product | None,
    leaf: Certificate | None,
    findings: Findings,
) -> Verification:
    ordered = sorted(findings.listed, key=lambda each: _ORDER[each.check])
    return Verification(report=report, product=product, leaf=leaf, findings=tuple(ordered))


def _read_evidence(
    certificates: Sequence[bytes], table: bytes | None, crls: Sequence[bytes], findings: Findings
) -> tuple[list[Certificate], list[Crl]]:
    """C0. Every certificate and the table can be read; what cannot be read is a failure, not passed over."""
    candidates = [(f"certificate {number}", each) for number, each in enumerate(certificates)]
    lists = list(crls)
    try:
        for entry in parse(table) if table is not None else ():
            guid = canonical_guid(entry.guid)
            if guid in _TABLE_CERTIFICATES:
                candidates.append((f"table entry {guid}", entry.data))
            elif guid == CertTableGuid.CRL and not crls:
                lists.append(entry.data)
    except LayoutError as error:
        findings.fail("C0", "certificate table", error, "a table in form")
    found: dict[bytes, Certificate] = {}
    for where, each in candidates:
        try:
            found.update((one.der, one) for one in read_all(each))
        except (InputError, LayoutError) as error:
            findings.fail("C0", where, error, "a certificate in form")
    findings.conclude("C0")
    return list(found.values()), _read_crls(lists, findings)


def _read_crls(crls: Sequence[bytes], findings: Findings) -> list[Crl]:
    found = []
    for number, each in enumerate(crls):
        try:
            found.append(read_crl(each))
        except (InputError, LayoutError) as error:
            findings.fail("C10", f"CRL {number}", error, "a CRL in form")
    return found


def _several(name: str, values: Iterable[_T]) -> tuple[_T, ...]:
    if isinstance(values, bytes | bytearray | memoryview | str):
        raise UsageError(f"{name}: got one {type(values).__name__}, wanted a sequence of them")
    return tuple(values)


def _sized(name: str, value: bytes | None, size: int) -> bytes | None:
    if value is not None and len(value) != size:
        raise UsageError(f"{name}: got {len(value)} bytes, wanted {size}")
    return value
