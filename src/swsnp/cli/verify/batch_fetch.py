"""What the rows of a batch lack, from the key service: each thing is asked for once, its absence too."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeAlias

from swsnp.certs.kds_errors import KdsNotFound, KdsRefused
from swsnp.certs.kds_evidence import get_fitting, missing_requests
from swsnp.cli.verify.evidence import given, wanted_list
from swsnp.verify.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.abi.snp_report import Product
    from swsnp.certs.kds_url import KdsRequest, LeafKind
    from swsnp.cli.verify.evidence import Evidence, Service

__all__ = ["Fetcher"]

_KEPT: Final = 4096
_Question: TypeAlias = "tuple[KdsRequest, ...] | tuple[Product, LeafKind]"
_Answer: TypeAlias = "tuple[bytes, ...] | str"
"""DER; or why there is none, in a final answer."""


class Fetcher:
    """Completes one row after the other; threads may share it.

    Args:
        service: where to ask, and which cache to look into.
        product: the caller's knowledge; decides where a report names no product line.
    """

    def __init__(self, service: Service, product: Product | None) -> None:
        self._client = service.client()
        self._product = product
        self._answers: Memory[_Question, _Answer] = Memory(_KEPT)

    def complete(self, evidence: Evidence) -> tuple[Evidence, str]:
        """Add certificates and, where the policy requires one, a revocation list.

        Returns:
            The evidence; why the service does not have something, where its answer is final: the verifier
            then says what is missing.

        Raises:
            KdsError: it gives nothing now, or something else than what was asked for: no row can be judged.
            HostError: the cache cannot be used, or urllib3 is not installed.
        """
        requests = missing_requests(evidence.report, given(evidence), product=self._product)
        certificates = self._answer(requests, lambda: self._certificates(requests))
        if isinstance(certificates, str):
            return evidence, certificates
        evidence = replace(evidence, certificates=(*evidence.certificates, *certificates))
        wanted = wanted_list(evidence)
        if wanted is None:
            return evidence, ""
        crls = self._answer(wanted, lambda: (self._client.crl(*wanted),))
        if isinstance(crls, str):
            return evidence, crls
        return replace(evidence, crls=crls), ""

    def _certificates(self, requests: tuple[KdsRequest, ...]) -> tuple[bytes, ...]:
        return tuple(each for answer in get_fitting(requests, self._client) for each in answer.der)

    def _answer(self, question: _Question, ask: Callable[[], tuple[bytes, ...]]) -> _Answer:
        """What the service said to this question, now or before."""
        known = self._answers.get(question)
        if known is None:
            try:
                known = ask()
            except (KdsNotFound, KdsRefused) as error:
                known = str(error)
            self._answers.keep(question, known)
        return known
