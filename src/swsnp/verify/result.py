"""What a verification found: one finding per check, and the two verdicts that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from swsnp.abi.snp_report import AttestationReport, SigningKey
from swsnp.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from swsnp.abi.snp_report import Product
    from swsnp.certs.x509_reader import Certificate

__all__ = ["CHECKS", "Finding", "Findings", "MAY_SKIP", "Outcome", "SCHEMA", "Verification", "mask"]

SCHEMA: Final = "swsnp.verification/1"
"""Name and version of the form that `Verification.as_dict` has."""
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
    "Y4": ("MEASUREMENT is an expected one", _REPORT),
    "Y5": ("HOST_DATA is the expected", _REPORT),
    "Y6": ("FAMILY_ID is the expected", _REPORT),
    "Y7": ("IMAGE_ID is the expected", _REPORT),
    "Y8": ("REPORT_ID is an expected one", _REPORT),
    "Y9": ("REPORT_ID_MA is the expected", _REPORT),
    "Y10": ("VMPL is the expected, or privileged enough", _REPORT),
    "Y11": ("GUEST_SVN is at least the policy's", _REPORT),
    "Y12": ("POLICY demands at least the policy's ABI version", _REPORT),
    "Y13": ("POLICY allows the host nothing that the policy forbids", _REPORT),
    "Y14": ("POLICY demands of the host what the policy requires", _REPORT),
    "Y15": ("an ID block by a listed key", _REPORT),
    "Y16": ("an author key that is listed", _REPORT),
    "Y17": ("PLATFORM_INFO has what is required and nothing that is forbidden", _REPORT),
    "Y18": ("REPORTED_TCB is at least the policy's", _REPORT),
    "Y19": ("LAUNCH_TCB is at least the policy's", _REPORT),
    "Y20": ("the current firmware is at least the policy's", _REPORT),
    "Y21": ("LAUNCH_MIT_VECTOR has the policy's mitigations", _REPORT),
    "Y22": ("CURRENT_MIT_VECTOR has the policy's mitigations", _REPORT),
    "Y23": ("CHIP_ID is a listed one", _REPORT),
}
"""Check to rule and source, in the order in which they are made."""
MAY_SKIP: Final = frozenset(("P9", "P10", "C10", *(check for check in CHECKS if check.startswith("Y"))))
"""Checks that do not apply to every report, or only when there is something to check against."""
_BITS: Final = {check: 1 << number for number, check in enumerate(CHECKS)}
_NOT_MADE: Final = {
    "P9": "version 2 has no family and model",
    "P10": "from version 3 on, family and model say it",
    "C10": "no CRL of this root was given",
    **dict.fromkeys((check for check in CHECKS if check.startswith("Y")), "the policy demands nothing here"),
}
_WORD: Final = 8


def mask(*checks: str) -> int:
    """A set of checks, one bit each: what `Findings.made` is made of."""
    return sum(_BITS[check] for check in checks)


_REQUIRED: Final = mask(*(CHECKS.keys() - MAY_SKIP))
_PRODUCT: Final = mask("P9", "P10")


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

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {
            "check": self.check,
            "outcome": self.outcome.value,
            "text": self.text,
            "field": self.field,
            "offset": self.offset,
            "got": self.got,
            "wanted": self.wanted,
            "source": self.source,
        }


_OK: Final = {
    check: Finding(check=check, outcome=Outcome.OK, text=rule, source=source)
    for check, (rule, source) in CHECKS.items()
}
_SKIPPED: Final = {
    check: Finding(
        check=check, outcome=Outcome.SKIP, text=_NOT_MADE.get(check, "was not made"), source=source
    )
    for check, (_, source) in CHECKS.items()
}


class Findings:
    """Collects findings; every check writes through this.

    A check that holds leaves no finding of its own: the function that made it adds its bits to `made`, and
    what is not there was not made.

    Args:
        lax: tell what go-sev-guest would let pass, instead of refusing it.
    """

    __slots__ = ("lax", "made", "noted")

    def __init__(self, *, lax: bool = False) -> None:
        self.lax = lax
        self.noted: list[Finding] = []
        self.made = 0

    def take(self, noted: Iterable[Finding], made: int) -> None:
        """What another verification of the same evidence found, or a part of this one."""
        self.noted += noted
        self.made |= made

    def sort(self, start: int) -> None:
        """Put what was noted from there on into the order of the checks."""
        self.noted[start:] = sorted(self.noted[start:], key=lambda each: _BITS[each.check])

    def skip(self, check: str, why: str) -> None:
        """The check could not be made."""
        self._add(check, Outcome.SKIP, why)

    def warn(self, check: str, text: str, *, field: str = "", got: object = "") -> None:
        """The rule holds, but."""
        self._add(check, Outcome.WARN, text, field=field, got=str(got))

    def fail(
        self,
        check: str,
        field: str,
        got: object,
        wanted: object,
        *,
        offset: int | None = None,
        lax: bool = False,
    ) -> None:
        """The rule is broken; with `lax`, one that go-sev-guest does not have."""
        text = f"{field}: got {got}, wanted {wanted}"
        outcome = Outcome.WARN if lax and self.lax else Outcome.FAIL
        self._add(check, outcome, text, field=field, got=str(got), wanted=str(wanted), offset=offset)

    def holds(
        self,
        check: str,
        condition: bool,
        field: str,
        got: object,
        wanted: object,
        *,
        offset: int | None = None,
    ) -> None:
        """Write a failure unless `condition`."""
        if not condition:
            self.fail(check, field, got, wanted, offset=offset)

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
        self.noted.append(
            Finding(
                check=check,
                outcome=outcome,
                text=text,
                field=field,
                offset=offset,
                got=got,
                wanted=wanted,
                source=CHECKS[check][1],
            )
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Verification:
    """The result. Authenticated and accepted are two facts.

    authenticated: every required check of P, C and R was made and none failed: a genuine processor, by the
        chosen roots, signed this report. It says nothing about which guest it is.
    accepted: authenticated, every rule of the policy held, and both REPORT_DATA and MEASUREMENT were given
        to compare with, and matched.

    `raw` is the report's bytes, None when they are no report. Without `authenticated`, report, leaf and
    product are what the evidence claims and nothing more. `noted` has what is worth saying; `made` is the
    `mask` of the checks that were made.
    """

    raw: bytes | None
    noted: tuple[Finding, ...]
    made: int
    missing: tuple[str, ...]
    """What keeps an authentic report from being accepted by absence: "report_data", "measurement"."""
    not_checked: tuple[str, ...]
    """Fields of the policy that demand nothing."""
    product: Product | None = None
    leaf: Certificate | None = None

    authenticated: bool = field(init=False)
    passed: bool = field(init=False)
    """Authenticated, and no rule of the policy is broken; what is `missing` was not asked for."""

    def __post_init__(self) -> None:
        made, failed = self.made, False
        genuine = self.raw is not None
        for each in self.noted:
            if each.outcome is Outcome.SKIP:
                made &= ~_BITS[each.check]
            elif each.outcome is Outcome.FAIL:
                failed = True
                genuine = genuine and each.check.startswith("Y")
        genuine = genuine and made & _REQUIRED == _REQUIRED and made & _PRODUCT != 0
        object.__setattr__(self, "authenticated", genuine)
        object.__setattr__(self, "passed", genuine and not failed)

    @cached_property
    def report(self) -> AttestationReport | None:
        """The report's fields, read when somebody asks; None when the bytes are no report."""
        return None if self.raw is None else AttestationReport.parse(self.raw)

    @property
    def accepted(self) -> bool:
        """Whether to rely on the report; see the class."""
        return self.passed and not self.missing

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """One or more for every check, in the order of `CHECKS`."""
        noted: dict[str, list[Finding]] = {}
        for each in self.noted:
            noted.setdefault(each.check, []).append(each)
        quiet = {check: (_OK if self.made & _BITS[check] else _SKIPPED)[check] for check in CHECKS}
        return tuple(each for check in CHECKS for each in noted.get(check, (quiet[check],)))

    @property
    def failures(self) -> tuple[Finding, ...]:
        """What refuses the evidence, in the order of the checks; the first is the reason to report."""
        if not self.noted:
            return ()
        return tuple(each for each in self.findings if each.outcome is Outcome.FAIL)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What the relying party should know although it is no reason to refuse."""
        return tuple(each for each in self.findings if each.outcome is Outcome.WARN)

    def require(self, *, authentic_only: bool = False) -> AttestationReport:
        """The report, if it is accepted; with `authentic_only`, if it `passed`.

        Raises:
            VerificationError: it is not; the text names the first failure, `findings` holds them all.
        """
        good = self.passed if authentic_only else self.accepted
        if not good or self.report is None:
            raise VerificationError(f"attestation report refused: {self._reason()}", self.findings)
        return self.report

    def _reason(self) -> str:
        if self.failures:
            return str(self.failures[0])
        if not self.authenticated:
            return "a required check was not made"
        return f"nothing to compare with was given: {', '.join(self.missing)}"

    def as_dict(self) -> dict[str, Any]:
        """The whole result for JSON; its form is named by "schema" and grows only by new keys."""
        return {
            "schema": SCHEMA,
            "authenticated": self.authenticated,
            "passed": self.passed,
            "accepted": self.accepted,
            "missing": list(self.missing),
            "not_checked": list(self.not_checked),
            "product": None if self.product is None else self.product.value,
            "signing_key": None if self.report is None else _key_name(self.report),
            "report": None if self.report is None else _plain(self.report),
            "findings": [each.as_dict() for each in self.findings],
        }


def _key_name(report: AttestationReport) -> str:
    number = report.signer_info.signing_key
    return SigningKey(number).name if number in set(SigningKey) else str(number)


def _plain(report: AttestationReport) -> dict[str, int | str]:
    """Every field: bytes and 64-bit words, which JSON's readers may round, in hexadecimal."""
    shown: dict[str, int | str] = {}
    for name, _, size in report.layout():
        value = getattr(report, name)
        if isinstance(value, bytes):
            shown[name] = value.hex()
        else:
            shown[name] = f"{value:#018x}" if size == _WORD else int(value)
    return shown
