"""Checks R2 to R11 and Y1 to Y4: the report against its leaf, against itself, and against what was expected.

Source: AMD 56860, ATTESTATION_REPORT; AMD 57230 for the leaf's extensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_report import SigningKey

if TYPE_CHECKING:
    from swsnp.abi.snp_report import AttestationReport, Product, TcbVersion
    from swsnp.certs.kds_extensions import LeafProfile
    from swsnp.verify.options import Options
    from swsnp.verify.result import Findings

__all__ = ["check_expected", "check_leaf_relations", "check_policy_relations", "check_tcb_relations"]

_HOST_VMPL: Final = 0xFFFFFFFF
_VMPLS: Final = range(4)
_NO_MIGRATION_AGENT: Final = b"\xff" * 32


def check_leaf_relations(
    report: AttestationReport, leaf: LeafProfile | None, options: Options, findings: Findings
) -> None:
    """The report and the certificate speak of one machine.

    R2. Every TCB component of REPORTED_TCB equals the leaf's, in the product's layout, and the other bytes
        are zero.
    R3. VCEK: HWID equals CHIP_ID (Turin: its first 8 bytes, the rest zero). An all-zero CHIP_ID is masked,
        which is told, or refused with `require_chip_id`. VLEK: the CSP id is one of `csp_ids`; without a list
        any is accepted, and told.
    """
    if leaf is None:
        findings.skip("R2", "the leaf's extensions could not be read")
        findings.skip("R3", "the leaf's extensions could not be read")
        return
    reported, wanted = report.reported_tcb, leaf.tcb_version()
    findings.holds("R2", reported == wanted, "REPORTED_TCB", _shown(reported), _shown(wanted), offset=0x180)
    findings.conclude("R2")
    masked = not any(report.chip_id)
    if masked and options.require_chip_id:
        findings.fail("R3", "CHIP_ID", "zero (masked)", "a chip id", offset=0x1A0)
    elif masked:
        findings.warn("R3", "CHIP_ID is masked: the report does not say which chip it is", field="CHIP_ID")
    if leaf.hwid is not None and not masked:
        wanted_id = leaf.hwid.ljust(64, b"\x00")
        same = report.chip_id == wanted_id
        findings.holds("R3", same, "CHIP_ID", report.chip_id.hex(), wanted_id.hex(), offset=0x1A0)
    if leaf.csp_id is not None:
        if not options.csp_ids:
            findings.warn("R3", f"any provider is accepted: {leaf.csp_id!r}", field="CSP id", got=leaf.csp_id)
        else:
            known = leaf.csp_id in options.csp_ids
            findings.holds("R3", known, "CSP id", repr(leaf.csp_id), ", ".join(sorted(options.csp_ids)))
    findings.conclude("R3")


def check_tcb_relations(
    report: AttestationReport, product: Product | None, options: Options, findings: Findings
) -> None:
    """The report's four TCB versions and two firmware versions.

    R4. REPORTED <= COMMITTED <= CURRENT, per component; COMMITTED == CURRENT only with
        `require_committed_current`.
    R5. LAUNCH <= CURRENT, unless a migration agent brought the guest from another machine.
    R6. COMMITTED version <= CURRENT version, as major, minor, build.
    """
    if product is None:
        findings.skip("R4", "the product line is not known")
        findings.skip("R5", "the product line is not known")
    else:
        _check_order("R4", "REPORTED_TCB", "COMMITTED_TCB", report, product, findings)
        _check_order("R4", "COMMITTED_TCB", "CURRENT_TCB", report, product, findings)
        if options.require_committed_current:
            committed, current = report.committed_tcb, report.current_tcb
            findings.holds("R4", committed == current, "COMMITTED_TCB", _shown(committed), _shown(current))
        findings.conclude("R4")
        if report.report_id_ma == _NO_MIGRATION_AGENT:
            _check_order("R5", "LAUNCH_TCB", "CURRENT_TCB", report, product, findings)
        else:
            findings.warn("R5", "a migration agent: LAUNCH_TCB may be another machine's", field="LAUNCH_TCB")
        findings.conclude("R5")
    committed_at = (report.committed_major, report.committed_minor, report.committed_build)
    current_at = (report.current_major, report.current_minor, report.current_build)
    findings.holds(
        "R6",
        committed_at <= current_at,
        "COMMITTED version",
        ".".join(map(str, committed_at)),
        f"at most {'.'.join(map(str, current_at))}",
        offset=0x1EC,
    )
    findings.conclude("R6")


def check_policy_relations(report: AttestationReport, options: Options, findings: Findings) -> None:
    """Flags that exclude or demand each other.

    R7. MASK_CHIP_KEY with a VCEK's signature cannot be.
    R8. VMPL is 0 to 3; FFFFFFFFh, the host's own request, only with `accept_host_report`.
    R9. AUTHOR_KEY_EN comes with an author key digest, and no digest without it.
    R10. SMT_EN needs POLICY.SMT; POLICY.RAPL_DIS and POLICY.CIPHERTEXT_HIDING_DRAM need the platform's.
    R11. REPORT_ID_MA is all ones unless POLICY.MIGRATE_MA is set.
    """
    signer, policy, platform = report.signer_info, report.policy, report.platform_info
    masked = signer.mask_chip_key and signer.signing_key == SigningKey.VCEK
    findings.holds("R7", not masked, "MASK_CHIP_KEY", 1, "0 in a report signed by a VCEK", offset=0x48)
    findings.conclude("R7")
    if report.vmpl == _HOST_VMPL and options.accept_host_report:
        findings.warn("R8", "the host asked for this report, not the guest", field="VMPL")
    else:
        findings.holds("R8", report.vmpl in _VMPLS, "VMPL", f"{report.vmpl:#x}", "0 to 3", offset=0x30)
    findings.conclude("R8")
    has_digest = any(report.author_key_digest)
    findings.holds(
        "R9",
        bool(signer.author_key_en) == has_digest,
        "AUTHOR_KEY_EN",
        f"{signer.author_key_en} with {'a' if has_digest else 'no'} digest",
        "1 with a digest or 0 without",
        offset=0x48,
    )
    findings.conclude("R9")
    findings.holds("R10", policy.smt or not platform.smt_en, "SMT_EN", 1, "0 as POLICY.SMT", offset=0x40)
    for name, demanded, done in (
        ("RAPL_DIS", policy.rapl_dis, platform.rapl_dis),
        ("CIPHERTEXT_HIDING_DRAM", policy.ciphertext_hiding_dram, platform.ciphertext_hiding_dram_en),
    ):
        findings.holds("R10", done or not demanded, f"PLATFORM_INFO.{name}", 0, "1 as in POLICY", offset=0x40)
    findings.conclude("R10")
    alone = report.report_id_ma == _NO_MIGRATION_AGENT
    findings.holds(
        "R11",
        bool(policy.migrate_ma) or alone,
        "REPORT_ID_MA",
        report.report_id_ma.hex(),
        "ff x 32",
        offset=0x160,
    )
    findings.conclude("R11")


def check_expected(report: AttestationReport, options: Options, findings: Findings) -> None:
    """What the relying party accepts and expects.

    Y1. POLICY.DEBUG is clear, unless `allow_debug`.
    Y2. POLICY.MIGRATE_MA is clear, unless `allow_migrate_ma`.
    Y3. REPORT_DATA equals `expected_report_data`.
    Y4. MEASUREMENT equals `expected_measurement`.
    """
    _check_waivable("Y1", "POLICY.DEBUG", report.policy.debug, options.allow_debug, findings)
    _check_waivable("Y2", "POLICY.MIGRATE_MA", report.policy.migrate_ma, options.allow_migrate_ma, findings)
    for check, name, got, wanted, offset in (
        ("Y3", "REPORT_DATA", report.report_data, options.expected_report_data, 0x50),
        ("Y4", "MEASUREMENT", report.measurement, options.expected_measurement, 0x90),
    ):
        if wanted is None:
            findings.skip(check, f"no {name} was expected: what it binds is the caller's to compare")
        else:
            findings.holds(check, got == wanted, name, got.hex(), wanted.hex(), offset=offset)
            findings.conclude(check)


def _check_waivable(check: str, name: str, bit: int, waived: bool, findings: Findings) -> None:
    if bit and waived:
        findings.warn(check, f"{name} is set and was allowed", field=name)
    else:
        findings.holds(check, not bit, name, 1, 0, offset=8)
    findings.conclude(check)


def _check_order(
    check: str, low: str, high: str, report: AttestationReport, product: Product, findings: Findings
) -> None:
    """`low` <= `high` in every component, and both zero outside of them."""
    first: TcbVersion = getattr(report, low.lower())
    second: TcbVersion = getattr(report, high.lower())
    good = first.decode(product).at_most(second.decode(product))
    findings.holds(check, good, low, _shown(first), f"at most {high} {_shown(second)}")
    for name, each in ((low, first), (high, second)):
        rest = each.reserved(product)
        findings.holds(check, not any(rest), f"{name}, reserved bytes", rest.hex(), 0)


def _shown(tcb: TcbVersion) -> str:
    """The eight bytes in the order of memory."""
    return tcb.to_bytes(8, "little").hex()
