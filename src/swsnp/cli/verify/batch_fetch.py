"""What the rows of a batch lack, from the key service: each thing is asked for once, its absence too."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from swsnp.certs.kds_errors import KdsNotFound, KdsRefused
from swsnp.certs.kds_evidence import get_fitting, missing_requests
from swsnp.cli.verify.evidence import given, wanted_list
from swsnp.verify.memory import Memory

if TYPE_CHECKING:
    from swsnp.abi.snp_report import Product
    from swsnp.certs.kds_url import KdsRequest, LeafKind
    from swsnp.cli.verify.evidence import Evidence, Service

__all__ = ["Fetcher"]

_KEPT: Final = 4096


class Fetcher:
    """Completes one row after the other; threads may share it.

    Args:
        service: where to ask, and which cache to look into.
        product: the caller's knowledge; decides where a report names no product line.
    """

    def __init__(self, service: Service, product: Product | None) -> None:
        self._client = service.client()
        self._product = product
        self._answers: Memory[tuple[KdsRequest, ...], tuple[bytes, ...]] = Memory(_KEPT)
        self._absent: Memory[tuple[KdsRequest, ...], str] = Memory(_KEPT)
        self._lists: Memory[tuple[Product, LeafKind], bytes] = Memory(_KEPT)

    def complete(self, evidence: Evidence) -> tuple[Evidence, str]:
        """Add certificates and, where the policy requires one, a revocation list.

        Returns:
            The evidence; why the service does not have something, where its answer is final: the verifier
            then says what is missing.

        Raises:
            KdsError: it gives nothing now, or something else than what was asked for: no row can be judged.
            HostError: the cache cannot be used, or urllib3 is not installed.
        """
        before = given(evidence)
        requests = missing_requests(evidence.report, before, product=self._product)
        if (reason := self._absent.get(requests)) is not None:
            return evidence, reason
        try:
            evidence = replace(evidence, certificates=(*evidence.certificates, *self._certificates(requests)))
            if (wanted := wanted_list(evidence)) is not None:
                evidence = replace(evidence, crls=(self._list(wanted),))
        except (KdsNotFound, KdsRefused) as error:
            self._absent.keep(requests, str(error))
            return evidence, str(error)
        return evidence, ""

    def _certificates(self, requests: tuple[KdsRequest, ...]) -> tuple[bytes, ...]:
        if (known := self._answers.get(requests)) is not None:
            return known
        found = tuple(each for answer in get_fitting(requests, self._client) for each in answer.der)
        self._answers.keep(requests, found)
        return found

    def _list(self, wanted: tuple[Product, LeafKind]) -> bytes:
        if (known := self._lists.get(wanted)) is not None:
            return known
        found = self._client.crl(*wanted)
        self._lists.keep(wanted, found)
        return found
