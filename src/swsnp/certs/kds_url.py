"""What can be asked of AMD's key distribution service, and the URLs that ask it, in both directions.

Pure: nothing here opens a connection. Source: AMD 57230, KDS interface.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias
from urllib.parse import urlsplit

from swsnp.abi.snp_report import (
    AttestationReport,
    Product,
    SigningKey,
    TcbComponents,
    TcbVersion,
    product_of_cpu,
)
from swsnp.errors import InputError, LayoutError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ChainRequest",
    "CrlRequest",
    "KDS",
    "KdsRequest",
    "LeafKind",
    "SPL_NAMES",
    "VcekRequest",
    "VlekRequest",
    "base_of",
    "parse_target",
    "parse_url",
    "target_of",
    "url_of",
    "vcek_of_report",
]

KDS: Final = "https://kdsintf.amd.com"
"""AMD's service; any other base is a mirror or an imitation."""
LeafKind: TypeAlias = Literal["vcek", "vlek"]
SPL_NAMES: Final = {
    "fmc": "fmcSPL",
    "boot_loader": "blSPL",
    "tee": "teeSPL",
    "snp": "snpSPL",
    "microcode": "ucodeSPL",
}
"""TCB component to the parameter that carries its security patch level."""
_SOURCE: Final = "AMD 57230, KDS interface"
_MAX: Final = 2048
_VERSION: Final = "v1"
_VLEK_PATH: Final = "cert"
_LEVEL: Final = re.compile(r"[0-9]{1,3}")
_HEX: Final = re.compile(r"(?:[0-9a-fA-F]{2})+")
_HOST: Final = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_PLAIN: Final = re.compile(r"[!-~]+")
_PRODUCTS: Final = {each.value: each for each in Product}


@dataclass(frozen=True, slots=True, kw_only=True)
class VcekRequest:
    """The certificate of one chip for one TCB.

    Attributes:
        product: the product line.
        hwid: 64 bytes of CHIP_ID; for Turin its first 8.
        tcb: REPORTED_TCB, in the product's layout; the bytes that the layout reserves are zero.

    Raises:
        LayoutError: a hwid of another size, or a TCB with bytes that no parameter carries.
    """

    product: Product
    hwid: bytes
    tcb: TcbVersion

    def __post_init__(self) -> None:
        if len(self.hwid) != self.product.hwid_size:
            raise LayoutError(
                f"KDS hwid: got {len(self.hwid)} bytes, wanted {self.product.hwid_size} for "
                f"{self.product.value} ({_SOURCE})"
            )
        _require_expressible(self.tcb, self.product)


@dataclass(frozen=True, slots=True, kw_only=True)
class VlekRequest:
    """A provider's certificate for one TCB; the service gives it to that provider only."""

    product: Product
    tcb: TcbVersion

    def __post_init__(self) -> None:
        _require_expressible(self.tcb, self.product)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainRequest:
    """ASK (for VLEKs: ASVK) and ARK of a product line."""

    product: Product
    kind: LeafKind = "vcek"


@dataclass(frozen=True, slots=True, kw_only=True)
class CrlRequest:
    """What the ARK of a product line has revoked."""

    product: Product
    kind: LeafKind = "vcek"


KdsRequest: TypeAlias = VcekRequest | VlekRequest | ChainRequest | CrlRequest


def _require_expressible(tcb: TcbVersion, product: Product) -> None:
    if any(tcb.reserved(product)):
        raise LayoutError(
            f"KDS TCB: got {tcb:#018x}, wanted zeros in the bytes that {product.value} reserves ({_SOURCE})"
        )


def vcek_of_report(report: AttestationReport, product: Product | None = None) -> VcekRequest:
    """The certificate that a report asks for: its CHIP_ID at its REPORTED_TCB.

    Args:
        report: signed by a VCEK.
        product: the caller's knowledge; reports from version 3 on mostly name it themselves.

    Raises:
        InputError: the service has no certificate for it: signed by a VLEK, or not at all, or CHIP_ID masked.
        UsageError: neither the report nor the caller names a product line, or they name two.
        LayoutError: a REPORTED_TCB that does not have the product's form.
    """
    key = report.signer_info.signing_key
    if key != SigningKey.VCEK:
        raise InputError(
            f"report: SIGNING_KEY is {key}, wanted 0 (VCEK): the key service gives a VLEK to its provider "
            "only; it comes with the certificate table"
        )
    if not any(report.chip_id):
        raise InputError(
            "report: CHIP_ID is masked (zeros), wanted one to ask for; its VCEK comes with the table"
        )
    found = _product_of(report, product)
    return VcekRequest(product=found, hwid=report.chip_id[: found.hwid_size], tcb=report.reported_tcb)


def _product_of(report: AttestationReport, product: Product | None) -> Product:
    told = product_of_cpu(report.cpuid_fam_id, report.cpuid_mod_id) if report.version >= 3 else None
    if told is not None and product not in (None, told):
        raise UsageError(f"product: got {product and product.value}, the report is from a {told.value}")
    found = told or product
    if found is None:
        raise UsageError(
            f"report: version {report.version} names no known product line, wanted one of "
            f"{', '.join(_PRODUCTS)} from the caller"
        )
    return found


def target_of(request: KdsRequest) -> str:
    """Path and query as they stand in an HTTP request: lower-case hexadecimal, levels in plain decimal."""
    match request:
        case VcekRequest(product=product, hwid=hwid, tcb=tcb):
            return f"/vcek/{_VERSION}/{product.value}/{hwid.hex()}?{_query(tcb, product)}"
        case VlekRequest(product=product, tcb=tcb):
            return f"/vlek/{_VERSION}/{product.value}/{_VLEK_PATH}?{_query(tcb, product)}"
        case ChainRequest(product=product, kind=kind):
            return f"/{kind}/{_VERSION}/{product.value}/cert_chain"
        case CrlRequest(product=product, kind=kind):
            return f"/{kind}/{_VERSION}/{product.value}/crl"


def _query(tcb: TcbVersion, product: Product) -> str:
    levels = tcb.decode(product)
    return "&".join(f"{SPL_NAMES[name]}={level}" for name, level in levels.items())


def url_of(request: KdsRequest, base: str = KDS) -> str:
    """The whole URL at AMD's service, or at another that `base_of` accepts."""
    return base_of(base) + target_of(request)


def base_of(url: str) -> str:
    """A service's address in its one form: scheme and host in lower case, port if any, no slash at the end.

    Raises:
        UsageError: not http or https, no host, or a user, path, query or fragment.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"KDS address: got {url!r}: {error}") from None
    bare = parts.path in ("", "/") and "?" not in url and "#" not in url
    whole = _HOST.fullmatch(parts.netloc) is not None and port != 0
    if parts.scheme not in ("http", "https") or not bare or not whole:
        raise UsageError(f"KDS address: got {url!r}, wanted http(s)://HOST[:PORT] and nothing behind it")
    return f"{parts.scheme}://{parts.netloc.lower()}"


def parse_url(url: str) -> tuple[str, KdsRequest]:
    """Read a URL back: the base as `base_of` gives it, and what is asked for.

    Raises:
        LayoutError: it asks for nothing that the service has; the text names the part.
        UsageError: the part before the path is no service's address.
    """
    if len(url) > _MAX or not _PLAIN.fullmatch(url):
        raise LayoutError(f"KDS URL: got {url[:80]!r}, wanted up to {_MAX} printable characters ({_SOURCE})")
    scheme, _, rest = url.partition("://")
    slash = rest.find("/")
    if slash < 0:
        raise LayoutError(f"KDS URL: got {url!r}, wanted http(s)://HOST/PATH ({_SOURCE})")
    return base_of(f"{scheme}://{rest[:slash]}"), parse_target(rest[slash:])


def parse_target(target: str) -> KdsRequest:
    """Read path and query of a request.

    1. The path is /vcek/v1/{P}/... or /vlek/v1/{P}/..., P one of Milan, Genoa, Turin as written.
    2. `cert_chain` and `crl` take no parameters; no part is percent-encoded.
    3. A chip is named by 128 hexadecimal digits, of Turin by 16; either case is read.
    4. Every patch level of the product is given once, in decimal of up to three digits, 0 to 255; no other
       parameter is.

    Raises:
        LayoutError: a rule is broken; the text names the part.
    """
    if len(target) > _MAX or not _PLAIN.fullmatch(target):
        raise LayoutError(
            f"KDS path: got {target[:80]!r}, wanted up to {_MAX} printable characters ({_SOURCE})"
        )
    path, mark, query = target.partition("?")
    parts = path.split("/")
    if len(parts) != 5 or parts[0] or parts[1] not in ("vcek", "vlek") or parts[2] != _VERSION:
        raise LayoutError(
            f"KDS path: got {path!r}, wanted /vcek/{_VERSION}/PRODUCT/... or "
            f"/vlek/{_VERSION}/PRODUCT/... ({_SOURCE})"
        )
    kind: LeafKind = "vcek" if parts[1] == "vcek" else "vlek"
    product = _PRODUCTS.get(parts[3])
    if product is None:
        raise LayoutError(f"KDS product: got {parts[3]!r}, wanted {', '.join(_PRODUCTS)} ({_SOURCE})")
    if parts[4] in ("cert_chain", "crl"):
        if mark:
            raise LayoutError(f"KDS {parts[4]}: got parameters {query!r}, wanted none ({_SOURCE})")
        return _of_product(parts[4], product, kind)
    return _leaf(kind, product, parts[4], query)


def _of_product(what: str, product: Product, kind: LeafKind) -> KdsRequest:
    if what == "crl":
        return CrlRequest(product=product, kind=kind)
    return ChainRequest(product=product, kind=kind)


def _leaf(kind: LeafKind, product: Product, name: str, query: str) -> KdsRequest:
    if kind == "vlek":
        if name != _VLEK_PATH:
            raise LayoutError(f"KDS path: got {name!r}, wanted {_VLEK_PATH}, cert_chain or crl ({_SOURCE})")
        return VlekRequest(product=product, tcb=_tcb(query, product))
    digits = 2 * product.hwid_size
    if len(name) != digits or not _HEX.fullmatch(name):
        raise LayoutError(
            f"KDS hwid: got {name!r}, wanted {digits} hexadecimal digits for {product.value} ({_SOURCE})"
        )
    return VcekRequest(product=product, hwid=bytes.fromhex(name), tcb=_tcb(query, product))


def _tcb(query: str, product: Product) -> TcbVersion:
    names = {SPL_NAMES[each]: each for each in TcbVersion.byte_order(product)}
    found: dict[str, int] = {}
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        if name not in names or names[name] in found:
            raise LayoutError(
                f"KDS parameter: got {pair!r}, wanted each of {', '.join(names)} once for {product.value} "
                f"({_SOURCE})"
            )
        found[names[name]] = _level(name, value)
    _require_all(found, names)
    return TcbVersion.encode(product, **TcbComponents(found))


def _require_all(found: Mapping[str, int], names: Mapping[str, str]) -> None:
    missing = [name for name, component in names.items() if component not in found]
    if missing:
        raise LayoutError(
            f"KDS parameters: {', '.join(missing)} missing, wanted {', '.join(names)} ({_SOURCE})"
        )


def _level(name: str, value: str) -> int:
    if not _LEVEL.fullmatch(value) or int(value) > 255:
        raise LayoutError(f"KDS {name}: got {value!r}, wanted 0 to 255 in decimal ({_SOURCE})")
    return int(value)
