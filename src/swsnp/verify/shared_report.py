"""What reports of one image on one kind of platform share: read and judged once.

Such reports differ in what is `Own`; the other signed bytes are the same. Checks that need no more than these
are made on a report that has nothing of its own. Source: AMD 56860, ATTESTATION_REPORT; see docs/adr/0016.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Final, NamedTuple

from swsnp.abi.snp_report import SIGNED_SIZE, AttestationReport
from swsnp.verify.memory import Memory
from swsnp.verify.parse import check_form
from swsnp.verify.relations import check_policy_relations, check_tcb_relations
from swsnp.verify.result import Findings

if TYPE_CHECKING:
    from swsnp.abi.snp_report import Product
    from swsnp.verify.policy_checks import Compiled
    from swsnp.verify.result import Finding

__all__ = ["Judgement", "Own", "SharedReport", "own_of", "shared_of"]

_KINDS: Final = 1024
"""Of reports, a few kilobytes each."""
_POLICIES: Final = 16
"""And products, for which one kind's judgement is remembered."""


class Own(NamedTuple):
    """The fields in which a report differs from others of its kind; the names are the report's."""

    report_data: bytes
    host_data: bytes
    report_id: bytes
    chip_id: bytes
    signature_r: bytes
    signature_s: bytes


_PLACES: Final = tuple(
    slice(offset, offset + size) for name, offset, size in AttestationReport.layout() if name in Own._fields
)
_own_pieces = itemgetter(*_PLACES)
_BETWEEN: Final = tuple(
    slice(one.stop, other.start)
    for one, other in pairwise((slice(0, 0), *_PLACES))
    if one.stop < other.start <= SIGNED_SIZE
)
_shared_pieces = itemgetter(*_BETWEEN)


def own_of(data: bytes) -> Own:
    """Cut out of 1,184 bytes."""
    return Own(*_own_pieces(data))


class Judgement(NamedTuple):
    """What was found of the shared bytes for one product and policy: R4 to R11, and the policy's checks."""

    relations: tuple[Finding, ...]
    policy: tuple[Finding, ...]
    made: int


class SharedReport:
    """The signed bytes that are not the report's own, read; equal to itself alone.

    Attributes:
        report: a report without the fields of `Own`: whoever asks for one of them gets an AttributeError.
        noted: what P2 to P6 found.
        made: the `mask` of these.
    """

    __slots__ = ("_judged", "_lax", "made", "noted", "report")

    def __init__(self, data: bytes, *, lax: bool) -> None:
        report, findings = AttestationReport.parse(data), Findings(lax=lax)
        for name in Own._fields:
            object.__delattr__(report, name)
        check_form(data, report, findings)
        self.report, self.noted, self.made = report, tuple(findings.noted), findings.made
        self._lax = lax
        self._judged: Memory[tuple[Product | None, Compiled], Judgement] = Memory(_POLICIES)

    def judged(self, product: Product | None, compiled: Compiled) -> Judgement:
        """What the rest of it says; remembered only if nothing is to be said, since findings can be long."""
        key = (product, compiled)
        found = self._judged.get(key)
        if found is None:
            found = self._judge(product, compiled)
            if not (found.relations or found.policy):
                self._judged.keep(key, found)
        return found

    def _judge(self, product: Product | None, compiled: Compiled) -> Judgement:
        relations, policy = Findings(lax=self._lax), Findings(lax=self._lax)
        check_tcb_relations(self.report, product, compiled.policy, relations)
        check_policy_relations(self.report, compiled.policy, relations)
        for check in compiled.shared:
            check(self.report, product, policy)
        made = relations.made | compiled.made
        return Judgement(tuple(relations.noted), tuple(policy.noted), made)


def shared_of(data: bytes, *, lax: bool) -> SharedReport:
    """The same object for all reports of 1,184 bytes that share these; `lax` as in `Findings`."""
    return _known(_shared_pieces(data), lax)


@lru_cache(maxsize=_KINDS)
def _known(pieces: tuple[bytes, ...], lax: bool) -> SharedReport:
    data = bytearray(AttestationReport.SIZE)
    for place, piece in zip(_BETWEEN, pieces, strict=True):
        data[place] = piece
    return SharedReport(bytes(data), lax=lax)
