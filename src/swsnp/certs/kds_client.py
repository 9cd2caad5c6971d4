"""A polite client of AMD's key distribution service.

* What was answered is kept and not asked for again: leaves as long as they are valid, chains for a week, CRLs
  for a day. A chain or CRL past that age is asked for once; when the service is away, the kept one goes on to
  be used until its own end, and the log says so.
* One request is under way per certificate, however many threads and processes want it.
* 429, 5xx, silence and broken connections are tried again after Retry-After, else after 10 s, 20 s, then
  every 30 s, within a budget of two minutes; any other answer is final.
* An answer is kept only when it is what was asked for: `kds_answer.judge`.

Source: AMD 57230, KDS interface. The service does not publish its limits; the pauses are go-sev-guest's.
"""

from __future__ import annotations

import logging
import re
import time
from copy import copy
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Final

from swsnp.certs.kds_answer import KdsAnswer, judge, limit_of
from swsnp.certs.kds_cache import Kept
from swsnp.certs.kds_errors import (
    KdsContentError,
    KdsError,
    KdsNotFound,
    KdsOffline,
    KdsRefused,
    KdsThrottled,
    KdsUnavailable,
    KdsUnreachable,
)
from swsnp.certs.kds_transport import HttpTransport
from swsnp.certs.kds_url import (
    KDS,
    ChainRequest,
    CrlRequest,
    KdsRequest,
    LeafKind,
    VcekRequest,
    base_of,
    url_of,
)
from swsnp.errors import InputError, LayoutError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.abi.snp_report import Product, TcbVersion
    from swsnp.certs.kds_cache import Cache
    from swsnp.certs.kds_transport import HttpAnswer, Transport

__all__ = ["ATTEMPT_S", "BUDGET_S", "CHAIN_AGE", "CRL_AGE", "KdsClient", "retry_after_of", "utc_now"]

_logger = logging.getLogger(__name__)
BUDGET_S: Final = 120.0
ATTEMPT_S: Final = 30.0
CHAIN_AGE: Final = timedelta(days=7)
CRL_AGE: Final = timedelta(days=1)
_FIRST_PAUSE_S: Final = 10.0
_LONGEST_PAUSE_S: Final = 30.0
_LEAST_PAUSE_S: Final = 1.0
_REST_S: Final = 300.0
"""After an attempt to renew something, what is kept is used this long before the next."""
_SECONDS: Final = re.compile(r"[0-9]{1,9}")
_OK: Final = 200
_NOT_FOUND: Final = 404
_TOO_MANY: Final = 429
_SLOW_CLIENT: Final = 408


def utc_now() -> datetime:
    """The present, aware."""
    return datetime.now(UTC)


class KdsClient:
    """Asks a key service, or a cache alone. Threads may share it.

    Args:
        cache: where answers are kept: `DiskCache`, or `MemoryCache` for this process alone.
        base: which service; AMD's by default.
        offline: use the cache only.
        budget_s: how long one certificate may take with all pauses and repeats; 0 tries once.
        attempt_s: how long one attempt may take.
        chain_age: how old a kept chain may be before the service is asked for another.
        crl_age: the same of a CRL; `timedelta.max` keeps it until its nextUpdate.
        transport: who speaks HTTP.
        now: the time that ages and ends are judged by.
        monotonic: the clock that the budget is measured with.
        sleep: how to wait.

    Raises:
        UsageError: a base that is no service's address, or a negative time.
    """

    def __init__(
        self,
        cache: Cache,
        *,
        base: str = KDS,
        offline: bool = False,
        budget_s: float = BUDGET_S,
        attempt_s: float = ATTEMPT_S,
        chain_age: timedelta = CHAIN_AGE,
        crl_age: timedelta = CRL_AGE,
        transport: Transport | None = None,
        now: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not (budget_s >= 0 and attempt_s > 0):
            raise UsageError(
                f"KDS client: got budget {budget_s} s, attempt {attempt_s} s, wanted >= 0 and > 0"
            )
        self.base = base_of(base)
        self.offline = offline
        self._cache = cache
        self._budget_s = budget_s
        self._attempt_s = attempt_s
        self._transport = transport or HttpTransport(monotonic=monotonic)
        self._now = now
        self._monotonic = monotonic
        self._sleep = sleep
        self._chain_age = chain_age
        self._crl_age = crl_age
        self._resting: dict[str, float] = {}
        self._failures: dict[str, tuple[float, KdsError]] = {}

    def __repr__(self) -> str:
        return f"KdsClient({self.base!r}, {self._cache!r}, offline={self.offline})"

    def vcek(self, product: Product, hwid: bytes, tcb: TcbVersion) -> bytes:
        """A chip's certificate for a TCB, DER; errors as `get`."""
        return self.get(VcekRequest(product=product, hwid=hwid, tcb=tcb)).body

    def chain(self, product: Product, kind: LeafKind = "vcek") -> tuple[bytes, bytes]:
        """ASK (for VLEKs: ASVK) and ARK, DER. The ARK is a candidate: which roots count is not said here."""
        intermediate, root = self.get(ChainRequest(product=product, kind=kind)).der
        return intermediate, root

    def crl(self, product: Product, kind: LeafKind = "vcek") -> bytes:
        """What the product's ARK has revoked, DER; errors as `get`."""
        return self.get(CrlRequest(product=product, kind=kind)).body

    def url_of(self, request: KdsRequest) -> str:
        """Where this client asks for it."""
        return url_of(request, self.base)

    def is_kept(self, request: KdsRequest) -> bool:
        """Whether `get` would answer without asking anyone."""
        kept = self._kept(self.url_of(request), request)
        return kept is not None and self._fresh(*kept)

    def get(self, request: KdsRequest, *, renew: bool = False) -> KdsAnswer:
        """What was asked for, from the cache or from the service.

        Args:
            request: what to ask for.
            renew: what is kept does not fit something else: ask again, though not twice in five minutes.

        Raises:
            KdsNotFound: the service does not know this chip, or not with this TCB.
            KdsRefused: the service will not answer this.
            KdsContentError: the answer is something else, malformed, or has ended already.
            KdsUnavailable: no answer within the budget, or none allowed; the subclass says which.
            HostError: the cache cannot be used, or urllib3 is not installed.
        """
        url = self.url_of(request)
        kept = self._kept(url, request)
        if kept is not None and (self.offline or (self._fresh(*kept) and not renew)):
            return kept[0]
        if self.offline:
            raise KdsOffline(
                url, "not in the cache, or past its end there, and the network is not to be used"
            )
        began = self._monotonic()
        with self._cache.hold(url, self._budget_s + self._attempt_s):
            kept = self._kept(url, request)  # another may have asked while we waited for our turn
            if kept is not None and ((self._fresh(*kept) and not renew) or self._rests(url)):
                return kept[0]
            self._share_failure(url, began)
            answer = self._ask(url, request, None if kept is None else kept[0], began)
            if renew:
                self._resting[url] = self._monotonic() + _REST_S
            return answer

    def _kept(self, url: str, request: KdsRequest) -> tuple[KdsAnswer, datetime] | None:
        """What the cache has that is whole, is what was asked for, and has not ended."""
        kept = self._cache.read(url)
        if kept is None:
            return None
        try:
            answer = judge(request, kept.body)
        except (InputError, LayoutError) as error:
            _logger.warning("%s: what was kept is something else, it is asked for again: %s", url, error)
            return None
        return (answer, kept.fetched) if self._now() <= answer.ends else None

    def _fresh(self, answer: KdsAnswer, fetched: datetime) -> bool:
        limits = {ChainRequest: self._chain_age, CrlRequest: self._crl_age}
        limit = limits.get(type(answer.request))
        return limit is None or timedelta(0) <= self._now() - fetched < limit

    def _rests(self, url: str) -> bool:
        return self._monotonic() < self._resting.get(url, float("-inf"))

    def _share_failure(self, url: str, began: float) -> None:
        """Who waited while another thread asked in vain has its answer, and does not ask the same again."""
        when, error = self._failures.get(url, (float("-inf"), None))
        if error is not None and when > began:
            raise copy(error)

    def _ask(self, url: str, request: KdsRequest, kept: KdsAnswer | None, began: float) -> KdsAnswer:
        # one attempt is enough where there is something to fall back on; waiting for others counts as pause
        deadline = began + (self._budget_s if kept is None else 0.0)
        try:
            answer = self._judged(url, request, self._fetch(url, limit_of(request), deadline))
        except KdsUnavailable as error:
            if kept is None:
                self._failures[url] = (self._monotonic(), error)
                raise
            _logger.warning("cannot be renewed, the kept one is used, good until %s: %s", kept.ends, error)
            self._resting[url] = self._monotonic() + _REST_S
            return kept
        except KdsError as error:
            self._failures[url] = (self._monotonic(), error)
            raise
        self._failures.pop(url, None)
        self._cache.write(url, Kept(body=answer.body, fetched=self._now()))
        return answer

    def _judged(self, url: str, request: KdsRequest, body: bytes) -> KdsAnswer:
        try:
            answer = judge(request, body)
        except (InputError, LayoutError) as error:
            raise KdsContentError(url, str(error)) from None
        if self._now() > answer.ends:
            raise KdsContentError(
                url, f"answer: its time ended at {answer.ends}, wanted one that is still good"
            )
        return answer

    def _fetch(self, url: str, limit: int, deadline: float) -> bytes:
        pause, timeout_s = _FIRST_PAUSE_S, self._attempt_s
        while True:
            try:
                return self._attempt(url, timeout_s, limit)
            except KdsUnavailable as error:
                asked = error.retry_after_s
                wait = pause if asked is None else max(asked, _LEAST_PAUSE_S)
                left = deadline - self._monotonic() - wait
                if left < 0:
                    raise
                _logger.info("%s; asking again in %g s", error, wait)
            self._sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            timeout_s = min(self._attempt_s, max(left, _LEAST_PAUSE_S))

    def _attempt(self, url: str, timeout_s: float, limit: int) -> bytes:
        _logger.debug("GET %s", url)
        answer = self._transport.get(url, timeout_s=timeout_s, limit=limit)
        if answer.status == _OK:
            return answer.body
        raise self._error(url, answer)

    def _error(self, url: str, answer: HttpAnswer) -> KdsError:
        status = answer.status
        wait = retry_after_of(answer.headers.get("retry-after", ""), self._now())
        if status == _NOT_FOUND:
            return KdsNotFound(url, "404: the key service does not know this chip, or not with this TCB")
        if status == _TOO_MANY:
            told = "" if wait is None else f", come back in {wait:g} s"
            return KdsThrottled(url, f"429: asked too often{told}", retry_after_s=wait)
        if status == _SLOW_CLIENT or status >= 500:
            return KdsUnreachable(url, f"{status}: error at the key service", retry_after_s=wait)
        return KdsRefused(url, f"{status}: the key service does not answer this")


def retry_after_of(text: str, now: datetime) -> float | None:
    """Seconds that a Retry-After asks for: a number, or a date (RFC 9110, 10.2.3); None for neither."""
    text = text.strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
        aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        return max((aware - now).total_seconds(), 0.0)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
