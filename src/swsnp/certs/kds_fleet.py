"""A fleet's certificates: a list of chips or reports, and their answers fetched ahead.

One line is one chip:

    reports/host-17.bin                             a report, by its file's name
    Milan CHIP-ID bl=4,tee=0,snp=24,ucode=219
    https://kdsintf.amd.com/vcek/v1/Milan/...       a VCEK's URL

Empty lines and those that begin with # are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_report import AttestationReport, Product, SigningKey, product_of_cpu
from swsnp.certs.chip_words import read_hwid, read_tcb
from swsnp.certs.kds_errors import KdsError, KdsUnavailable
from swsnp.certs.kds_url import (
    ChainRequest,
    CrlRequest,
    KdsRequest,
    LeafKind,
    VcekRequest,
    parse_url,
    vcek_of_report,
)
from swsnp.errors import InputError, SwsnpError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from swsnp.certs.kds_client import KdsClient

__all__ = ["Mirrored", "fleet_requests", "mirror", "with_issuers"]

_ERRORS_SHOWN: Final = 10
_GIVE_UP_AFTER: Final = 3
"""So many answers in a row that do not come, each after its whole budget, mean that the service is away."""
_PRODUCTS: Final = {each.value.lower(): each for each in Product}


def fleet_requests(
    text: str, name: str, read_report: Callable[[str], bytes], *, product: Product | None = None
) -> tuple[KdsRequest, ...]:
    """What a fleet needs: chain and list of each kind first, then its leaves; each once.

    Args:
        text: the fleet file.
        name: its name, for error texts.
        read_report: gives the 1,184 bytes of a report by the name in a line.
        product: of reports that do not say it.

    Raises:
        InputError: lines that cannot be read, up to ten of them by number and reason; or no line at all.
    """
    leaves: list[KdsRequest] = []
    errors: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            leaves.append(_request(line.strip(), read_report, product))
        except SwsnpError as error:
            errors.append(f"{name}:{number}: {error}")
    if errors:
        more = f"\n… and {len(errors) - _ERRORS_SHOWN} more" if len(errors) > _ERRORS_SHOWN else ""
        raise InputError("\n".join(errors[:_ERRORS_SHOWN]) + more)
    if not leaves:
        raise InputError(f"{name}: no line names a chip or a report")
    return with_issuers(leaves)


def with_issuers(requests: Iterable[KdsRequest]) -> tuple[KdsRequest, ...]:
    """The chains and lists that leaves need, before them; nothing twice."""
    leaves = tuple(requests)
    lines: dict[tuple[Product, LeafKind], None] = {}
    for each in leaves:
        kind: LeafKind = each.kind if isinstance(each, ChainRequest) else "vcek"
        lines[each.product, kind] = None
    above: list[KdsRequest] = []
    for line, kind in lines:
        above += (ChainRequest(product=line, kind=kind), CrlRequest(product=line, kind=kind))
    return tuple(dict.fromkeys((*above, *leaves)))


def _request(line: str, read_report: Callable[[str], bytes], product: Product | None) -> KdsRequest:
    if "://" in line:
        _, request = parse_url(line)
        if not isinstance(request, VcekRequest):
            raise InputError(f"got {line!r}, wanted a VCEK's URL; chains and lists come by themselves")
        return request
    words = line.split()
    if len(words) == 3 and words[0].lower() in _PRODUCTS:
        found = _PRODUCTS[words[0].lower()]
        return VcekRequest(product=found, hwid=read_hwid(words[1], found), tcb=read_tcb(words[2], found))
    return _of_report(read_report(line), product)


def _of_report(data: bytes, product: Product | None) -> KdsRequest:
    """The VCEK of a report; of one that a VLEK signed, the chain alone can be had."""
    report = AttestationReport.parse(data)
    if report.signer_info.signing_key != SigningKey.VLEK:
        return vcek_of_report(report, product)
    told = product_of_cpu(report.cpuid_fam_id, report.cpuid_mod_id) if report.version >= 3 else None
    found = told or product
    if found is None:
        raise UsageError(f"report: version {report.version} names no known product line, name it")
    return ChainRequest(product=found, kind="vlek")


@dataclass(slots=True, kw_only=True)
class Mirrored:
    """What a mirror run came to.

    Attributes:
        kept: were there before.
        fetched: came now.
        failed: did not come, and why.
        not_tried: the service was away by then.
    """

    kept: int = 0
    fetched: int = 0
    failed: list[KdsError] = field(default_factory=list)
    not_tried: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether everything is there; what was not tried comes after something that failed."""
        return not self.failed

    @property
    def unavailable(self) -> bool:
        """Whether another run may bring more."""
        return any(isinstance(each, KdsUnavailable) for each in self.failed)


def mirror(
    requests: Iterable[KdsRequest], client: KdsClient, advance: Callable[[KdsError | None], None]
) -> Mirrored:
    """Have the client fetch and keep everything, one after the other; what is kept is not asked for again.

    One failure does not end the run; three in a row that are the service's being away do. A run that was
    interrupted goes on where it stopped when it is started again.

    Args:
        requests: what to fetch.
        client: whose cache is filled.
        advance: told after each request, with its error if it failed.

    Raises:
        HostError: the cache cannot be written, or urllib3 is not installed.
    """
    done, away = Mirrored(), 0
    for request in requests:
        if away >= _GIVE_UP_AFTER:
            done.not_tried.append(client.url_of(request))
            continue
        error = None
        if client.is_kept(request):
            done.kept += 1
        else:
            error = _fetch(request, client)
            away = away + 1 if isinstance(error, KdsUnavailable) else 0
            if error is None:
                done.fetched += 1
            else:
                done.failed.append(error)
        advance(error)
    return done


def _fetch(request: KdsRequest, client: KdsClient) -> KdsError | None:
    try:
        client.get(request)
    except KdsError as error:
        return error
    return None
