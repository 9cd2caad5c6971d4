"""verify() of any report, table and list: a result, no exception; only what was signed is authenticated."""

from __future__ import annotations

import json
from functools import lru_cache

from fuzz.evidence import NOW, evidence
from swsnp.abi.snp_report import SIGNED_SIZE, PlatformInfo, Product
from swsnp.verify import Policy, Roots, verify

__all__ = ["one", "seeds"]

_LENGTHS = 6
_POLICIES = (
    Policy(),
    Policy(minimum_tcb={Product.MILAN: {"snp": 0}}, minimum_launch_tcb={Product.TURIN: {"fmc": 0}}),
    Policy(
        required_platform_info=PlatformInfo(1), launch_mit_vector=1, maximum_crl_age_s=1, chip_ids=[bytes(8)]
    ),
    Policy(vmpl=0, allow_debug=True, accept_host_report=True, require_committed_current=True),
)


def _input(report: bytes, table: bytes, crl: bytes = b"") -> bytes:
    head = b"".join(len(each).to_bytes(3, "little") for each in (report, table))
    return head + report + table + crl


@lru_cache(maxsize=1)
def _roots() -> Roots:
    return Roots.of(evidence().hierarchy.ark)


def seeds() -> list[bytes]:
    """Evidence that verifies, with and without a list; a table alone; nothing."""
    known = evidence()
    return [
        _input(known.report, known.table),
        _input(known.report, known.table, known.crl),
        _input(b"", known.table),
        _input(known.report, b""),
        b"",
    ]


def one(data: bytes) -> object:
    """Cut the input into report, table and list, and verify."""
    sizes = [int.from_bytes(data[at : at + 3], "little") for at in (0, 3)]
    body = data[_LENGTHS:]
    report, table = body[: sizes[0]], body[sizes[0] : sizes[0] + sizes[1]]
    crl = body[sizes[0] + sizes[1] :]
    result = verify(
        report,
        table=table or None,
        crls=[crl] if crl else [],
        roots=_roots(),
        at=NOW,
        product=(None, *Product)[data[0] % 4] if data else None,
        policy=_POLICIES[data[1] % len(_POLICIES)] if len(data) > 1 else Policy(),
        like="go-sev-guest" if data and data[0] & 0x80 else None,
    )
    if result.authenticated:
        assert report[:SIGNED_SIZE] == evidence().report[:SIGNED_SIZE]
        assert result.findings
    assert result.passed != bool(result.failures)
    assert not result.accepted
    for each in result.findings:
        str(each)
    json.dumps(result.as_dict())
    return tuple((each.check, each.outcome) for each in result.failures)
