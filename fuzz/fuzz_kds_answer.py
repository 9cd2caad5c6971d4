"""Answers of the key service: what was asked for, or LayoutError or InputError, nothing else."""

from __future__ import annotations

from functools import lru_cache, partial

from fuzz.evidence import evidence
from fuzz.outcome import attempt
from swsnp.abi.snp_report import AttestationReport, Product
from swsnp.certs.kds_answer import judge
from swsnp.certs.kds_url import ChainRequest, CrlRequest, KdsRequest, VlekRequest, vcek_of_report
from swsnp.errors import InputError, LayoutError

__all__ = ["one", "seeds"]


@lru_cache(maxsize=1)
def _requests() -> tuple[KdsRequest, ...]:
    vcek = vcek_of_report(AttestationReport.parse(evidence().report), Product.MILAN)
    return (
        vcek,
        VlekRequest(product=Product.MILAN, tcb=vcek.tcb),
        ChainRequest(product=Product.MILAN),
        ChainRequest(product=Product.MILAN, kind="vlek"),
        CrlRequest(product=Product.MILAN),
    )


def seeds() -> list[bytes]:
    """A leaf, a chain and a list."""
    return [evidence().vcek, evidence().hierarchy.chain_pem(), evidence().crl]


def one(data: bytes) -> object:
    """Hold the same bytes against every kind of request."""
    kinds = []
    for request in _requests():
        answer, refusal = attempt(partial(judge, request, data), LayoutError, InputError)
        if answer is not None:
            assert answer.body == data
            assert answer.ends.tzinfo is not None
        kinds.append(refusal)
    return tuple(kinds)
