"""What a look at a certificate table can find: numbered rules, typed findings, a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from swsnp.certs.role import printable

__all__ = ["RULES", "Finding", "Findings", "LintResult", "Rule", "Severity"]

_TABLE: Final = "AMD 56421, certificate table"
_KDS: Final = "AMD 57230"
_PKIX: Final = "RFC 5280"
_LINUX: Final = "Linux, SEV_FW_BLOB_MAX_SIZE"
_TOOLS: Final = "AMD's sev-host-set-cert-chain"
_REPORT: Final = "AMD 56860, ATTESTATION_REPORT"


class Severity(StrEnum):
    """What a broken rule means."""

    ERROR = "error"
    """Some guest or relying party cannot use the table, or must refuse what it says."""
    WARNING = "warning"
    """It can be used; some tool will stumble, or something is not as AMD's tools write it."""
    NOTE = "note"
    """Worth knowing, nothing to repair: a table with notes alone is clean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule; `text` says what a good table does."""

    severity: Severity
    text: str
    source: str


def _rule(severity: Severity, text: str, source: str) -> Rule:
    return Rule(severity=severity, text=text, source=source)


_E, _W, _N = Severity.ERROR, Severity.WARNING, Severity.NOTE
RULES: Final = {
    "T1": _rule(_E, "an entry of 24 zero bytes ends the entries", _TABLE),
    "T2": _rule(_E, "the entry with the zero GUID has offset 0 and length 0", _TABLE),
    "T3": _rule(_E, "no entry's data begins inside the entries: offset >= 24 * (n + 1)", _TABLE),
    "T4": _rule(_E, "no entry's data ends after the blob, nor after 2^32", _TABLE),
    "T5": _rule(_E, "no two entries share bytes", _TABLE),
    "T6": _rule(_W, "data are packed: between the terminator and the last data all bytes are used", _TOOLS),
    "T7": _rule(_W, "data stand in the order of their entries", _TOOLS),
    "T8": _rule(_W, "nothing but zero bytes follows the last data", _TABLE),
    "T9": _rule(_E, "no GUID stands twice", _TABLE),
    "T10": _rule(_E, "GUIDs stand in textual byte order, not in the mixed-endian order of EFI", _TABLE),
    "T11": _rule(_E, "the blob fits the 16,384 bytes that a Linux guest can receive", _LINUX),
    "T12": _rule(_W, "entries stand in the order leaf, ASK, ARK, CRL, others", _TOOLS),
    "T13": _rule(_N, "every GUID is known here", _TABLE),
    "T14": _rule(_W, "no entry is empty", _TABLE),
    "E1": _rule(_E, "an entry with a known GUID holds a certificate or CRL that can be read", _TABLE),
    "E2": _rule(_W, "certificates and CRLs are DER, not PEM", _TABLE),
    "E3": _rule(_E, "an entry holds one certificate or CRL", _TABLE),
    "E4": _rule(_E, "the GUID says what the certificate is", _TABLE),
    "E5": _rule(_E, "the leaf's extensions are complete and in form", _KDS),
    "E6": _rule(_E, "CAs have RSA-4096 keys, leaves P-384, signatures are RSASSA-PSS with SHA-384", _KDS),
    "K1": _rule(_E, "there is a leaf: a VCEK or a VLEK", _KDS),
    "K2": _rule(_E, "each leaf's issuer is there, and the root above it", _KDS),
    "K3": _rule(_E, "names are equal byte for byte along the chain", _PKIX),
    "K4": _rule(_E, "the root signed itself and the issuer, which signed the leaf", _PKIX),
    "K5": _rule(_E, "every certificate is valid at the given time", _PKIX),
    "K6": _rule(_E, "the root's key is one that the caller chose", _KDS),
    "K7": _rule(_E, "the CRL is the root's: by name and by signature", _PKIX),
    "K8": _rule(_E, "the CRL is current at the given time", _PKIX),
    "K9": _rule(_E, "the CRL names no certificate of the chain", _PKIX),
    "M1": _rule(_E, "the VCEK was issued for this chip", _KDS),
    "M2": _rule(_E, "the leaf was issued for this TCB", _KDS),
    "M3": _rule(_E, "the leaf was issued for this product line", _KDS),
    "M4": _rule(_E, "there is a leaf of the kind that the report's SIGNING_KEY names", _REPORT),
    "M5": _rule(_E, "the leaf's key signed the report", _REPORT),
}
"""Rule by number, in the order in which they are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One broken rule. `entry` and `offset` (bytes from the blob's start) as far as there is one."""

    rule: str
    severity: Severity
    got: str
    wanted: str
    entry: int | None = None
    offset: int | None = None
    source: str

    def __str__(self) -> str:
        place = "" if self.entry is None else f"entry {self.entry}, "
        place += "" if self.offset is None else f"at {self.offset:#x}, "
        return f"{self.rule} {self.severity}: {place}got {self.got}, wanted {self.wanted} ({self.source})"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers that the finding does not have are null."""
        return {
            "rule": self.rule,
            "severity": self.severity.value,
            "entry": self.entry,
            "offset": self.offset,
            "got": self.got,
            "wanted": self.wanted,
            "rule_text": RULES[self.rule].text,
            "source": self.source,
        }


class Findings:
    """Collects findings; every rule writes through this."""

    def __init__(self) -> None:
        self.listed: list[Finding] = []
        self.not_checked: dict[str, str] = {}

    def fail(
        self, rule: str, got: object, wanted: object, *, entry: int | None = None, offset: int | None = None
    ) -> None:
        """The rule is broken. What certificates call themselves is shown, but drives no terminal."""
        self.listed.append(
            Finding(
                rule=rule,
                severity=RULES[rule].severity,
                got=printable(str(got)),
                wanted=printable(str(wanted)),
                entry=entry,
                offset=offset,
                source=RULES[rule].source,
            )
        )

    def holds(
        self,
        rule: str,
        condition: bool,
        got: object,
        wanted: object,
        *,
        entry: int | None = None,
        offset: int | None = None,
    ) -> bool:
        """Write a finding unless `condition`; returns it."""
        if not condition:
            self.fail(rule, got, wanted, entry=entry, offset=offset)
        return condition

    def skip(self, rule: str, why: str) -> None:
        """The rule could not be looked at."""
        self.not_checked.setdefault(rule, why)


@dataclass(frozen=True, slots=True, kw_only=True)
class LintResult:
    """All findings, in the order of the rules, and what was not looked at and why."""

    findings: tuple[Finding, ...]
    not_checked: dict[str, str]

    @property
    def clean(self) -> bool:
        """No error and no warning; notes do not count."""
        return all(each.severity is Severity.NOTE for each in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "clean": self.clean,
            "findings": [each.as_dict() for each in self.findings],
            "not_checked": self.not_checked,
        }
