"""What a verification found: one finding per check, and the verdict that follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from swsnp.errors import VerificationError

if TYPE_CHECKING:
    from swsnp.abi.snp_report import AttestationReport, Product
    from swsnp.certs.x509_reader import Certificate

__all__ = ["CHECKS", "Finding", "Findings", "MAY_SKIP", "Outcome", "Verification"]

_REPORT: Final = "AMD 56860, ATTESTATION_REPORT"
_KDS: Final = "AMD 57230"
_PKIX: Final = "RFC 5280"

CHECKS: Final[dict[str, tuple[str, str]]] = {
    "P1": ("a report has 1,184 bytes", _REPORT),
    "P2": ("VERSION is 2 to 5", _REPORT),
    "P3": ("what the version reserves is zero", _REPORT),
    "P4": ("POLICY has bit 17 set and bits 63:26 zero", _REPORT),
    "P5": ("SIGNATURE_ALGO is 1", _REPORT),
    "P6": ("SIGNING_KEY is 0 or 1", _REPORT),
    "P7": ("R and S are 1 to n-1, with zero bytes above", _REPORT),
    "P8": ("the signature field is zero after S", _REPORT),
    "P9": ("from version 3 on, family and model name the product", _REPORT),
    "P10": ("in version 2, the caller, the issuer or CHIP_ID names the product", _REPORT),
    "C0": ("everything given as a certificate can be read", _PKIX),
    "C1": ("a leaf of the kind in SIGNING_KEY, its issuer and its root are there", _KDS),
    "C2": ("names are equal along the chain and name the report's product", _KDS),
    "C3": ("the CAs have RSA-4096 keys, the leaf a P-384 key", _KDS),
    "C4": ("every signature is RSASSA-PSS with SHA-384, MGF1-SHA-384 and 48 bytes of salt", _KDS),
    "C5": ("the root is one that the caller chose", _KDS),
    "C6": ("root signs root, root signs intermediate, intermediate signs leaf", _PKIX),
    "C7": ("the CAs may sign certificates, the leaf may not", _PKIX),
    "C8": ("every certificate is valid at the given time", _PKIX),
    "C9": ("extensions are known where critical, and the leaf's are complete", _KDS),
    "C10": ("no certificate of the chain is revoked", _PKIX),
    "R1": ("the leaf's key signed bytes 0 to 29Fh", _REPORT),
    "R2": ("REPORTED_TCB is the leaf's TCB", _KDS),
    "R3": ("the leaf was issued for this chip or provider", _KDS),
    "R4": ("REPORTED_TCB <= COMMITTED_TCB <= CURRENT_TCB", _REPORT),
    "R5": ("LAUNCH_TCB <= CURRENT_TCB", _REPORT),
    "R6": ("the committed firmware is not newer than the current", _REPORT),
    "R7": ("MASK_CHIP_KEY and a signature by the VCEK exclude each other", _REPORT),
    "R8": ("a guest asked: VMPL is 0 to 3", _REPORT),
    "R9": ("AUTHOR_KEY_EN goes with an author key digest", _REPORT),
    "R10": ("the platform does what POLICY demands", _REPORT),
    "R11": ("REPORT_ID_MA is set only where POLICY allows a migration agent", _REPORT),
    "Y1": ("the guest cannot be debugged by the host", _REPORT),
    "Y2": ("no migration agent", _REPORT),
    "Y3": ("REPORT_DATA is the expected", _REPORT),
    "Y4": ("MEASUREMENT is the expected", _REPORT),
}
"""Check to rule and source, in the order in which they are made."""
MAY_SKIP: Final = frozenset(("P9", "P10", "C10", "Y3", "Y4"))
"""Checks that do not apply to every report, or only when the caller gives something to check against."""


class Outcome(StrEnum):
    """How a check ended. WARN: passed, with something that the relying party should know."""

    OK = "ok"
    FAIL = "fail"
    SKIP = "skip"
    WARN = "warn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One result of one check; `field`, `offset`, `got` and `wanted` as far as the check has them."""

    check: str
    outcome: Outcome
    text: str
    field: str = ""
    offset: int | None = None
    got: str = ""
    wanted: str = ""
    source: str = ""

    def __str__(self) -> str:
        return f"{self.check} {self.outcome}: {self.text}"


class Findings:
    """Collects findings; every check writes through this."""

    def __init__(self) -> None:
        self.listed: list[Finding] = []

    def ok(self, check: str, text: str = "") -> None:
        """The rule holds."""
        self._add(check, Outcome.OK, text)

    def skip(self, check: str, why: str) -> None:
        """The check was not made."""
        self._add(check, Outcome.SKIP, why)

    def warn(self, check: str, text: str, *, field: str = "", got: object = "") -> None:
        """The rule holds, but."""
        self._add(check, Outcome.WARN, text, field=field, got=str(got))

    def fail(
        self, check: str, field: str, got: object, wanted: object, *, offset: int | None = None, why: str = ""
    ) -> None:
        """The rule is broken."""
        text = f"{field}: got {got}, wanted {wanted}{f': {why}' if why else ''}"
        self._add(check, Outcome.FAIL, text, field=field, got=str(got), wanted=str(wanted), offset=offset)

    def holds(
        self,
        check: str,
        condition: bool,
        field: str,
        got: object,
        wanted: object,
        *,
        offset: int | None = None,
    ) -> bool:
        """Write a failure unless `condition`; returns it."""
        if not condition:
            self.fail(check, field, got, wanted, offset=offset)
        return condition

    def conclude(self, check: str) -> None:
        """Write OK for a check that has no finding yet; a check of several parts ends with this."""
        if not any(each.check == check for each in self.listed):
            self.ok(check)

    def failed(self, check: str) -> bool:
        """Whether the check has failed so far."""
        return any(each.check == check and each.outcome is Outcome.FAIL for each in self.listed)

    def _add(
        self,
        check: str,
        outcome: Outcome,
        text: str,
        *,
        field: str = "",
        got: str = "",
        wanted: str = "",
        offset: int | None = None,
    ) -> None:
        rule, source = CHECKS[check]
        self.listed.append(
            Finding(
                check=check,
                outcome=outcome,
                text=text or rule,
                field=field,
                offset=offset,
                got=got,
                wanted=wanted,
                source=source,
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The result: `authenticated` is True only if every required check was made and none failed.

    `report` is None when the bytes are no report. Without `authenticated`, report, leaf and product are what
    the evidence claims and nothing more.
    """

    report: AttestationReport | None
    findings: tuple[Finding, ...]
    authenticated: bool = field(init=False)
    product: Product | None = None
    leaf: Certificate | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "authenticated", self.report is not None and _all_made(self.findings))

    @property
    def failures(self) -> tuple[Finding, ...]:
        """What refuses the evidence, in the order of the checks; the first is the reason to report."""
        return tuple(each for each in self.findings if each.outcome is Outcome.FAIL)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What the relying party should know although it is no reason to refuse."""
        return tuple(each for each in self.findings if each.outcome is Outcome.WARN)

    def require(self) -> AttestationReport:
        """The report, if it is authenticated.

        Raises:
            VerificationError: it is not; the text names the first failure, `findings` holds them all.
        """
        if not self.authenticated or self.report is None:
            first = self.failures[0] if self.failures else "a required check was not made"
            raise VerificationError(f"attestation report refused: {first}", self.findings)
        return self.report


def _all_made(findings: tuple[Finding, ...]) -> bool:
    passed = {each.check for each in findings if each.outcome in (Outcome.OK, Outcome.WARN)}
    if any(each.outcome is Outcome.FAIL for each in findings):
        return False
    return passed >= CHECKS.keys() - MAY_SKIP and bool(passed & {"P9", "P10"})
