"""An imitation of AMD's key distribution service for chips whose hierarchy is ours; and how it can misbehave.

Requests in, replies out: no socket and no wait is in here, `kds_server` has those. Leaves are made when they
are asked for and backdated by a day, so two downloads differ in dates and signature, and agree in key and
extensions. Source: AMD 57230, KDS interface.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Protocol

from swsnp.abi.snp_report import TcbVersion
from swsnp.certs.kds_url import (
    ChainRequest,
    CrlRequest,
    KdsRequest,
    VcekRequest,
    VlekRequest,
    parse_target,
)
from swsnp.certs.x509_reader import EcKey, read
from swsnp.errors import LayoutError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from swsnp.abi.snp_report import Product
    from swsnp.amd_ca.manufacture import Hierarchy

__all__ = ["Asked", "CertifiedChip", "KdsDouble", "Misbehaviour", "Reply", "Trouble", "utc_now"]

# UNVERIFIED: content types, texts and the statuses 400, 401 and 405 of the genuine service
_DER_CERTIFICATE: Final = "application/pkix-cert"
_DER_CRL: Final = "application/pkix-crl"
_PEM: Final = "application/x-pem-file"
_TEXT: Final = "text/plain; charset=utf-8"
_REMEMBERED: Final = 4096
_STALE: Final = timedelta(days=800)


def utc_now() -> datetime:
    """The present, aware."""
    return datetime.now(UTC)


class CertifiedChip(Protocol):
    """A chip as the key service knows it; `swsnp.machine.Machine` is one."""

    product: Product

    @property
    def hwid(self) -> bytes:
        """Its chip id: 64 bytes, of Turin 8."""

    @property
    def hierarchy(self) -> Hierarchy:
        """Who certifies it."""

    def vcek_certificate(self, tcb: TcbVersion | None = None) -> bytes:
        """Its certificate for a TCB, DER; UsageError for a TCB that its firmware never had."""


class Trouble(StrEnum):
    """What may go wrong with the service."""

    THROTTLED = "throttled"
    """429, with Retry-After where one is given."""
    OUTAGE = "outage"
    """503."""
    DROPPED = "dropped"
    """The connection ends without an answer."""
    TRUNCATED = "truncated"
    """The connection ends in the middle of the answer."""
    SLOW = "slow"
    """The answer comes after a pause."""
    DRIPPING = "dripping"
    """The answer comes byte by byte, with a pause before each."""
    STALE_CRL = "stale-crl"
    """A CRL whose nextUpdate has passed."""
    WRONG_CHIP = "wrong-chip"
    """The leaf of another chip."""
    WRONG_TCB = "wrong-tcb"
    """The leaf of another TCB."""
    GARBAGE = "garbage"
    """200 with a page of HTML, as from a proxy that wants a login."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Misbehaviour:
    """One thing that goes wrong.

    Attributes:
        trouble: which.
        times: how many requests it meets; None: all, until it is lifted.
        pause_s: of SLOW and DRIPPING.
        retry_after: value of the header that THROTTLED and OUTAGE send, as it is; None: no such header.
        only: meets only requests whose path has this in it, such as "cert_chain", "/crl" or a chip id.
    """

    trouble: Trouble
    times: int | None = None
    pause_s: float = 1.0
    retry_after: str | None = None
    only: str = ""

    def __post_init__(self) -> None:
        if self.times is not None and self.times < 1:
            raise UsageError(f"misbehaviour, times: got {self.times}, wanted at least 1, or none for all")
        if not 0 <= self.pause_s <= 3600:
            raise UsageError(f"misbehaviour, pause_s: got {self.pause_s}, wanted 0 to 3600 seconds")
        if self.retry_after is not None and not (
            self.retry_after.isascii() and self.retry_after.isprintable()
        ):
            raise UsageError(f"misbehaviour, retry_after: got {self.retry_after!r}, wanted printable ASCII")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What goes over the wire, and how.

    Attributes:
        status: of HTTP; 0: the connection ends without an answer.
        content_type: of the body.
        body: all of it; its length is announced.
        headers: beside those that every answer has.
        pause_s: before the answer, or before each byte of the body when it drips.
        drips: byte by byte.
        sent: bytes of the body after which the connection ends; None: all.
    """

    status: int
    content_type: str = _TEXT
    body: bytes = field(default=b"", repr=False)
    headers: tuple[tuple[str, str], ...] = ()
    pause_s: float = 0.0
    drips: bool = False
    sent: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request that came, and the status of its answer."""

    target: str
    status: int


class KdsDouble:
    """Answers for some chips. Threads may share it.

    Args:
        chips: whom it knows. All chips of a product line have one hierarchy, as AMD's have.
        now: the time for CRLs. Leaves have their dates from their hierarchy.

    Raises:
        UsageError: no chip, one twice, or two hierarchies for one product line.
    """

    def __init__(self, chips: Iterable[CertifiedChip], *, now: Callable[[], datetime] = utc_now) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._chips: dict[tuple[Product, bytes], CertifiedChip] = {}
        self._hierarchies: dict[Product, Hierarchy] = {}
        self._revoked: dict[Product, list[int]] = {}
        self._crls: dict[Product, bytes] = {}
        self._troubles: list[Misbehaviour] = []
        self._asked: deque[Asked] = deque(maxlen=_REMEMBERED)
        for chip in chips:
            self._add(chip)
        if not self._chips:
            raise UsageError("key service: got no chip, wanted at least one")

    def _add(self, chip: CertifiedChip) -> None:
        product, hwid = chip.product, chip.hwid
        if self._hierarchies.setdefault(product, chip.hierarchy) is not chip.hierarchy:
            raise UsageError(
                f"key service: two roots for {product.value}; give its machines the `same_root_as`"
            )
        if (product, hwid) in self._chips:
            raise UsageError(f"key service: chip {hwid.hex()[:16]}… of {product.value} twice")
        self._chips[product, hwid] = chip

    @property
    def products(self) -> tuple[Product, ...]:
        """The product lines that it has chips of."""
        return tuple(self._hierarchies)

    @property
    def asked(self) -> tuple[Asked, ...]:
        """The latest requests, the last 4,096 at most, oldest first."""
        with self._lock:
            return tuple(self._asked)

    def root(self, product: Product) -> bytes:
        """The ARK's certificate, DER; made now if it was not needed before.

        Raises:
            UsageError: it has no chip of that product line.
        """
        if product not in self._hierarchies:
            raise UsageError(f"key service: no chip of {product.value}")
        return self._hierarchies[product].ark

    def revoke(self, product: Product, serial: int) -> None:
        """From now on the product's CRL names this serial number of an ASK or ASVK."""
        with self._lock:
            self._revoked.setdefault(product, []).append(serial)
            self._crls.pop(product, None)

    def misbehave(self, *misbehaviours: Misbehaviour) -> None:
        """Go wrong in these ways from now on, the first that meets a request first; none: behave again."""
        with self._lock:
            self._troubles = [*self._troubles, *misbehaviours] if misbehaviours else []

    @property
    def misbehaviours(self) -> tuple[Misbehaviour, ...]:
        """What is going wrong, with the number of requests that each will still meet."""
        with self._lock:
            return tuple(self._troubles)

    def answer(self, target: str) -> Reply:
        """The reply to a GET of this path and query."""
        trouble = self._trouble_for(target)
        reply = self._spoiled(target, trouble) if trouble is not None else self._honest(target)
        with self._lock:
            self._asked.append(Asked(target=target, status=reply.status))
        return reply

    def _trouble_for(self, target: str) -> Misbehaviour | None:
        """The first that meets it; used up by one."""
        with self._lock:
            for number, each in enumerate(self._troubles):
                if each.only in target and _meets(each.trouble, target):
                    if each.times == 1:
                        del self._troubles[number]
                    elif each.times is not None:
                        self._troubles[number] = replace(each, times=each.times - 1)
                    return each
        return None

    def _honest(self, target: str) -> Reply:
        try:
            request = parse_target(target)
        except LayoutError as error:
            return _text(400, str(error))
        return self._of(request)

    def _of(self, request: KdsRequest) -> Reply:
        hierarchy = self._hierarchies.get(request.product)
        if hierarchy is None:
            return _text(404, f"no chip of {request.product.value} is known here")
        match request:
            case VcekRequest(product=product, hwid=hwid, tcb=tcb):
                return self._vcek(self._chips.get((product, hwid)), tcb)
            case VlekRequest():
                return _text(401, "a VLEK is given to its provider only, who has to say who he is")
            case ChainRequest(kind=kind):
                return Reply(status=200, content_type=_PEM, body=hierarchy.chain_pem(kind))
            case CrlRequest(product=product):
                return Reply(status=200, content_type=_DER_CRL, body=self._crl(product, hierarchy))

    def _vcek(self, chip: CertifiedChip | None, tcb: TcbVersion) -> Reply:
        if chip is None:
            return _text(404, "this chip is not known here")
        try:
            return Reply(status=200, content_type=_DER_CERTIFICATE, body=chip.vcek_certificate(tcb))
        except UsageError:
            return _text(404, "this chip never had such a TCB")

    def _crl(self, product: Product, hierarchy: Hierarchy) -> bytes:
        """One list until something is revoked, as the genuine service has one for a year."""
        with self._lock:
            if product not in self._crls:
                revoked = self._revoked.get(product, [])
                # dated here: a seeded hierarchy lives on one day, and its list would be stale a year after
                self._crls[product] = hierarchy.crl(revoked, number=1 + len(revoked), this_update=self._now())
            return self._crls[product]

    def _spoiled(self, target: str, trouble: Misbehaviour) -> Reply:
        match trouble.trouble:
            case Trouble.THROTTLED:
                return _with_retry_after(_text(429, "too many requests"), trouble)
            case Trouble.OUTAGE:
                return _with_retry_after(_text(503, "out of service"), trouble)
            case Trouble.DROPPED:
                return Reply(status=0)
            case Trouble.GARBAGE:
                page = b"<!DOCTYPE html>\n<title>Please log in</title>\n"
                return Reply(status=200, content_type="text/html", body=page)
            case _:
                return self._bent(target, trouble, self._honest(target))

    def _bent(self, target: str, trouble: Misbehaviour, reply: Reply) -> Reply:
        """An honest reply that goes wrong on its way, or is about something else."""
        match trouble.trouble:
            case Trouble.SLOW:
                return replace(reply, pause_s=trouble.pause_s)
            case Trouble.DRIPPING:
                return replace(reply, pause_s=trouble.pause_s, drips=True)
            case Trouble.TRUNCATED:
                return replace(reply, sent=len(reply.body) // 2)
            case _ if reply.status != 200:
                return reply
            case Trouble.STALE_CRL:
                hierarchy = self._hierarchies[parse_target(target).product]
                return replace(reply, body=hierarchy.crl(this_update=self._now() - _STALE))
            case _:
                return replace(reply, body=self._strange_leaf(target, trouble.trouble, reply.body))

    def _strange_leaf(self, target: str, trouble: Trouble, leaf: bytes) -> bytes:
        """The same key in a certificate for another chip, or another TCB."""
        request, key = parse_target(target), read(leaf).key
        if not isinstance(request, VcekRequest) or not isinstance(key, EcKey):
            return leaf
        hwid, levels = request.hwid, request.tcb.decode(request.product)
        if trouble is Trouble.WRONG_CHIP:
            hwid = hwid[:-1] + bytes((hwid[-1] ^ 1,))
        else:
            levels["snp"] ^= 1
        tcb = TcbVersion.encode(request.product, **levels)
        return self._hierarchies[request.product].vcek(key.x, key.y, hwid, tcb)


def _meets(trouble: Trouble, target: str) -> bool:
    """Whether there is something in this request that can go wrong in this way."""
    path = target.partition("?")[0]
    if trouble is Trouble.STALE_CRL:
        return path.endswith("/crl")
    if trouble in (Trouble.WRONG_CHIP, Trouble.WRONG_TCB):
        return path.startswith("/vcek/") and not path.endswith(("/crl", "/cert_chain"))
    return True


def _text(status: int, text: str) -> Reply:
    return Reply(status=status, body=f"{text}\n".encode())


def _with_retry_after(reply: Reply, trouble: Misbehaviour) -> Reply:
    if trouble.retry_after is None:
        return reply
    return replace(reply, headers=(("Retry-After", trouble.retry_after),))
