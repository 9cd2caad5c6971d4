"""What a relying party demands or waives. The defaults are the strict ones."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Arguments of `verify` beside the evidence, as the checks see them.

    allow_debug: accept POLICY.DEBUG: the host may read the guest's memory.
    allow_migrate_ma: accept POLICY.MIGRATE_MA: a migration agent can extract the guest's keys.
    allow_expired_leaf: evidence that was stored; warn about an expired VCEK or VLEK.
    accept_host_report: accept VMPL FFFFFFFFh: the host asked, not the guest.
    require_chip_id: refuse a masked CHIP_ID.
    require_crl: refuse when no CRL is given.
    require_committed_current: refuse provisional firmware (COMMITTED_TCB other than CURRENT_TCB).
    csp_ids: providers whose VLEK is accepted; empty accepts any, with a warning.
    """

    allow_debug: bool = False
    allow_migrate_ma: bool = False
    allow_expired_leaf: bool = False
    accept_host_report: bool = False
    require_chip_id: bool = False
    require_crl: bool = False
    require_committed_current: bool = False
    csp_ids: frozenset[str] = frozenset()
    expected_report_data: bytes | None = None
    expected_measurement: bytes | None = None
