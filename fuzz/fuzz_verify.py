"""verify() of any report, table and list: a result, no exception; only what was signed is authenticated."""

from __future__ import annotations

from functools import lru_cache

from fuzz.evidence import NOW, evidence
from swsnp.abi.snp_report import SIGNED_SIZE, Product
from swsnp.verify import Roots, verify

__all__ = ["one", "seeds"]

_LENGTHS = 6


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
    )
    if result.authenticated:
        assert report[:SIGNED_SIZE] == evidence().report[:SIGNED_SIZE]
        assert result.findings
    assert result.passed != bool(result.failures)
    assert not result.accepted
    for each in result.findings:
        str(each)
    return tuple((each.check, each.outcome) for each in result.failures)
