"""Checks R2 to R11: the report against its leaf and against itself.

Source: AMD 56860, ATTESTATION_REPORT; AMD 57230 for the leaf's extensions.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_report import (
    GuestPolicy,
    PlatformInfo,
    Product,
    SignerInfo,
    SigningKey,
    TcbVersion,
)
from swsnp.verify.result import mask

if TYPE_CHECKING:
    from swsnp.abi.snp_report import AttestationReport
    from swsnp.certs.kds_extensions import LeafProfile
    from swsnp.verify.policy import Policy
    from swsnp.verify.result import Findings

__all__ = ["at_most", "check_leaf_relations", "check_policy_relations", "check_tcb_relations", "shown"]

_HOST_VMPL: Final = 0xFFFFFFFF
_HIGHEST_VMPL: Final = 3
_NO_MIGRATION_AGENT: Final = b"\xff" * 32
_NO_CHIP: Final = bytes(64)
_NO_DIGEST: Final = bytes(48)
_MASK_CHIP_KEY: Final = SignerInfo.mask_chip_key.mask
_AUTHOR_KEY_EN: Final = SignerInfo.author_key_en.mask
_SMT_EN: Final = PlatformInfo.smt_en.mask
_SMT: Final = GuestPolicy.smt.mask
_RAPL_DIS: Final = GuestPolicy.rapl_dis.mask
_HIDING: Final = GuestPolicy.ciphertext_hiding_dram.mask
_LEAF: Final = mask("R2", "R3")
_TCB: Final = mask("R4", "R5")
_VERSIONS: Final = mask("R6")
_FLAGS: Final = mask("R7", "R8", "R9", "R10", "R11")


def _reserved(product: Product) -> int:
    used = TcbVersion.byte_order(product).values()
    return sum(0xFF << 8 * at for at in range(8) if at not in used)


_RESERVED: Final = {product: _reserved(product) for product in Product}
"""The bits of a TCB_VERSION that the product's layout keeps zero."""


def check_leaf_relations(
    reported_tcb: TcbVersion, chip_id: bytes, leaf: LeafProfile | None, policy: Policy, findings: Findings
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
    wanted = leaf.tcb_version
    if reported_tcb != wanted:
        findings.fail("R2", "REPORTED_TCB", shown(reported_tcb), shown(wanted), offset=0x180)
    if chip_id == _NO_CHIP:
        if policy.require_chip_id:
            findings.fail("R3", "CHIP_ID", "zero (masked)", "a chip id", offset=0x1A0)
        else:
            findings.warn("R3", "CHIP_ID is masked: the report does not say which chip", field="CHIP_ID")
    elif leaf.chip_id is not None and chip_id != leaf.chip_id:
        findings.fail("R3", "CHIP_ID", chip_id.hex(), leaf.chip_id.hex(), offset=0x1A0)
    if leaf.csp_id is not None and not policy.csp_ids:
        findings.warn("R3", f"any provider is accepted: {leaf.csp_id!r}", field="CSP id", got=leaf.csp_id)
    elif leaf.csp_id is not None and leaf.csp_id not in policy.csp_ids:
        findings.fail("R3", "CSP id", repr(leaf.csp_id), ", ".join(sorted(policy.csp_ids)))
    findings.made |= _LEAF


def check_tcb_relations(
    report: AttestationReport, product: Product | None, policy: Policy, findings: Findings
) -> None:
    """The report's four TCB versions and two firmware versions.

    R4. REPORTED <= COMMITTED <= CURRENT, per component; COMMITTED == CURRENT only with
        `require_committed_current`.
    R5. LAUNCH <= CURRENT, unless a migration agent brought the guest from another machine.
    R6. COMMITTED version <= CURRENT version, as major, minor, build; equal with `require_committed_current`.
    """
    settled = policy.require_committed_current or findings.lax
    if product is None:
        findings.skip("R4", "the product line is not known")
        findings.skip("R5", "the product line is not known")
    else:
        _check_current(report, product, settled, findings)
        _check_launch(report, findings)
        findings.made |= _TCB
    committed_at = (report.committed_major, report.committed_minor, report.committed_build)
    current_at = (report.current_major, report.current_minor, report.current_build)
    if committed_at > current_at or (settled and committed_at != current_at):
        wanted = f"{'' if settled else 'at most '}{'.'.join(map(str, current_at))}"
        findings.fail("R6", "COMMITTED version", ".".join(map(str, committed_at)), wanted, offset=0x1EC)
    findings.made |= _VERSIONS


def _check_current(report: AttestationReport, product: Product, settled: bool, findings: Findings) -> None:
    reported, committed, current = report.reported_tcb, report.committed_tcb, report.current_tcb
    if not at_most(reported, committed):
        wanted = f"at most COMMITTED_TCB {shown(committed)}"
        findings.fail("R4", "REPORTED_TCB", shown(reported), wanted, offset=0x180, lax=True)
    if not at_most(reported, current):  # follows from the others, unless one of them is only told
        wanted = f"at most CURRENT_TCB {shown(current)}"
        findings.fail("R4", "REPORTED_TCB", shown(reported), wanted, offset=0x180)
    if not at_most(committed, current) or (settled and committed != current):
        wanted = f"{'' if settled else 'at most '}CURRENT_TCB {shown(current)}"
        findings.fail("R4", "COMMITTED_TCB", shown(committed), wanted, offset=0x1E0)
    reserved = _RESERVED[product]
    if (reported | committed | current) & reserved:
        for name, tcb, offset in (
            ("REPORTED_TCB", reported, 0x180),
            ("COMMITTED_TCB", committed, 0x1E0),
            ("CURRENT_TCB", current, 0x38),
        ):
            if tcb & reserved:
                got = f"{tcb & reserved:#018x}"
                findings.fail("R4", f"{name}, reserved bytes", got, 0, offset=offset, lax=True)


def _check_launch(report: AttestationReport, findings: Findings) -> None:
    launch, current = report.launch_tcb, report.current_tcb
    if report.report_id_ma != _NO_MIGRATION_AGENT:
        findings.warn("R5", "a migration agent: LAUNCH_TCB may be another machine's", field="LAUNCH_TCB")
    elif not at_most(launch, current):
        wanted = f"at most CURRENT_TCB {shown(current)}"
        findings.fail("R5", "LAUNCH_TCB", shown(launch), wanted, offset=0x1F0, lax=True)


def check_policy_relations(report: AttestationReport, policy: Policy, findings: Findings) -> None:
    """Flags that exclude or demand each other.

    R7. MASK_CHIP_KEY with a VCEK's signature cannot be.
    R8. VMPL is 0 to 3; FFFFFFFFh, the host's own request, only with `accept_host_report`.
    R9. AUTHOR_KEY_EN comes with an author key digest, and no digest without it.
    R10. SMT_EN needs POLICY.SMT; POLICY.RAPL_DIS and POLICY.CIPHERTEXT_HIDING_DRAM need the platform's.
    R11. REPORT_ID_MA is all ones unless POLICY.MIGRATE_MA is set.
    """
    signer, allowed, platform = report.signer_info, report.policy, report.platform_info
    if signer & _MASK_CHIP_KEY and signer.signing_key == SigningKey.VCEK:
        findings.fail("R7", "MASK_CHIP_KEY", 1, "0 in a report signed by a VCEK", offset=0x48, lax=True)
    if report.vmpl == _HOST_VMPL and policy.accept_host_report:
        findings.warn("R8", "the host asked for this report, not the guest", field="VMPL")
    elif report.vmpl > _HIGHEST_VMPL:
        findings.fail("R8", "VMPL", f"{report.vmpl:#x}", "0 to 3", offset=0x30, lax=True)
    has_digest = report.author_key_digest != _NO_DIGEST
    if bool(signer & _AUTHOR_KEY_EN) != has_digest:
        got = f"{signer.author_key_en} with {'a' if has_digest else 'no'} digest"
        findings.fail("R9", "AUTHOR_KEY_EN", got, "1 with a digest or 0 without", offset=0x48, lax=True)
    if platform & _SMT_EN and not allowed & _SMT:
        findings.fail("R10", "PLATFORM_INFO.SMT_EN", 1, "0 as POLICY.SMT", offset=0x40, lax=True)
    if allowed & _RAPL_DIS and not platform.rapl_dis:
        findings.fail("R10", "PLATFORM_INFO.RAPL_DIS", 0, "1 as in POLICY", offset=0x40, lax=True)
    if allowed & _HIDING and not platform.ciphertext_hiding_dram_en:
        findings.fail(
            "R10", "PLATFORM_INFO.CIPHERTEXT_HIDING_DRAM", 0, "1 as in POLICY", offset=0x40, lax=True
        )
    if report.report_id_ma != _NO_MIGRATION_AGENT and not allowed.migrate_ma:
        got = report.report_id_ma.hex()
        findings.fail("R11", "REPORT_ID_MA", got, "ff x 32", offset=0x160, lax=True)
    findings.made |= _FLAGS


def at_most(low: TcbVersion, high: TcbVersion) -> bool:
    """Whether no component of `low` exceeds `high`'s; one byte each, so every layout compares alike."""
    return low == high or all(map(operator.le, low.to_bytes(8, "little"), high.to_bytes(8, "little")))


def shown(tcb: TcbVersion) -> str:
    """The eight bytes in the order of memory."""
    return tcb.to_bytes(8, "little").hex()
