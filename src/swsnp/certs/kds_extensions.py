"""What the key service writes into VCEKs and VLEKs: the extensions under 1.3.6.1.4.1.3704.1.

Fields are found by OID, never by position or by the look of their content. Source: AMD 57230.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from swsnp.abi.kds import (
    EXTENSION_ROOT,
    LEAF_NAMES,
    OID_CSP_ID,
    OID_HWID,
    OID_PRODUCT_NAME,
    OID_STRUCT_VERSION,
    SPL_OIDS,
    SPL_RESERVED_OIDS,
    ask_name,
    asvk_name,
)
from swsnp.abi.snp_report import Product, TcbComponents, TcbVersion
from swsnp.certs import der
from swsnp.errors import LayoutError

if TYPE_CHECKING:
    from swsnp.certs.x509 import Certificate, Template

__all__ = ["LEAF_OIDS", "LeafProfile", "issuing_product", "leaf_kind", "leaf_profile"]

_SOURCE: Final = "AMD 57230"
_CHIP_ID: Final = 64
_HWID_SIZES: Final = {product: product.hwid_size for product in Product}
_LARGEST_KEPT: Final = 4096
"""Bytes of a certificate that is worth remembering; AMD's have less than 1,800."""
LEAF_OIDS: Final = frozenset(
    (
        OID_STRUCT_VERSION,
        OID_PRODUCT_NAME,
        OID_HWID,
        OID_CSP_ID,
        *SPL_OIDS.values(),
        *SPL_RESERVED_OIDS.values(),
    )
)
_KINDS: Final = {name: kind for kind, name in LEAF_NAMES.items()}
_ISSUERS: Final[dict[tuple[str | None, str], Product]] = {
    **{("vcek", ask_name(product)): product for product in Product},
    **{("vlek", asvk_name(product)): product for product in Product},
}
_AMDS: Final = f"{EXTENSION_ROOT}."


class LeafProfile(NamedTuple):
    """The extensions of one leaf.

    `hwid` is None in a VLEK, `csp_id` None in a VCEK; `chip_id` is the HWID as the report's CHIP_ID has it,
    64 bytes, and `tcb_version` is `tcb` as the report's REPORTED_TCB has it; `unknown` lists other OIDs
    under AMD's root.
    """

    kind: str
    product: Product
    struct_version: int
    product_name: str
    tcb: TcbComponents
    tcb_version: TcbVersion
    csp_id: str | None
    unknown: tuple[str, ...]
    hwid: bytes | None
    chip_id: bytes | None


def leaf_kind(certificate: Certificate | Template) -> str | None:
    """Either "vcek" or "vlek", by the subject's common name; None for anything else."""
    return _KINDS.get(certificate.subject_cn)


def issuing_product(certificate: Certificate | Template) -> Product | None:
    """The product line by the issuer's common name (SEV-{P} or SEV-VLEK-{P}); None when it names none.

    The extension productName is no source for this: all Milan steppings say "Milan-B0".
    """
    return _ISSUERS.get((leaf_kind(certificate), certificate.issuer_cn))


def leaf_profile(certificate: Certificate, product: Product) -> LeafProfile:
    """Decode a leaf's extensions for its product line.

    1. structVersion, productName and every TCB component of the product are there; no other component is.
    2. Patch levels are INTEGERs of 0..255 in shortest form; spl4 to spl7 are 0 where they are there.
    3. A VCEK has a HWID of the product's size and no CSP id; a VLEK has a CSP id and no HWID.

    Raises:
        LayoutError: a rule is broken, or the certificate is no leaf; the text names the extension.
    """
    small = len(certificate.der) <= _LARGEST_KEPT
    common = (_known_profile if small else _common_profile)(certificate.template, product)
    if common.kind != "vcek":
        return common
    hwid = _hwid(certificate.hwid, product)
    return LeafProfile(*common[:-2], hwid, hwid.ljust(_CHIP_ID, b"\0"))


def _common_profile(template: Template, product: Product) -> LeafProfile:
    """All but the HWID, the same for every chip."""
    kind = leaf_kind(template)
    if kind is None:
        raise LayoutError(
            f"leaf: common name {template.subject_cn!r}, wanted SEV-VCEK or SEV-VLEK ({_SOURCE})"
        )
    values = {each.oid: each.value for each in template.extensions}
    for number, oid in SPL_RESERVED_OIDS.items():
        if oid in values and _level(values, oid, f"spl{number}"):
            raise LayoutError(f"leaf spl{number}: got {values[oid].hex()}, wanted 0 ({_SOURCE})")
    tcb = _tcb(values, product)
    _refuse_others(values, OID_HWID, "HWID", kind, "vcek")
    _refuse_others(values, OID_CSP_ID, "CSP id", kind, "vlek")
    return LeafProfile(
        kind=kind,
        product=product,
        struct_version=_integer(values, OID_STRUCT_VERSION, "structVersion"),
        product_name=_ia5(values, OID_PRODUCT_NAME, "productName"),
        tcb=tcb,
        tcb_version=TcbVersion.encode(product, **tcb),
        csp_id=_ia5(values, OID_CSP_ID, "CSP id") if kind == "vlek" else None,
        unknown=tuple(oid for oid in values if oid.startswith(_AMDS) and oid not in LEAF_OIDS),
        hwid=None,
        chip_id=None,
    )


_known_profile = lru_cache(maxsize=256)(_common_profile)
"""The same, remembered."""


def _need(values: dict[str, bytes], oid: str, name: str) -> bytes:
    if oid not in values:
        raise LayoutError(f"leaf {name}: extension {oid} is missing ({_SOURCE})")
    return values[oid]


def _integer(values: dict[str, bytes], oid: str, name: str) -> int:
    where = f"leaf {name}"
    return der.integer(der.unwrap(_need(values, oid, name), der.INTEGER, where), where)


def _level(values: dict[str, bytes], oid: str, name: str) -> int:
    level = _integer(values, oid, name)
    if not 0 <= level <= 255:
        raise LayoutError(f"leaf {name}: got {level}, wanted 0..255 ({_SOURCE})")
    return level


def _ia5(values: dict[str, bytes], oid: str, name: str) -> str:
    where = f"leaf {name}"
    body = der.unwrap(_need(values, oid, name), der.IA5_STRING, where)
    if not body.isascii():
        raise LayoutError(f"{where}: {body!r} is no IA5String ({_SOURCE})")
    return body.decode("ascii")


def _tcb(values: dict[str, bytes], product: Product) -> TcbComponents:
    wanted = TcbVersion.byte_order(product)
    for name, oid in SPL_OIDS.items():
        if name not in wanted and oid in values:
            raise LayoutError(f"leaf {name}: extension {oid} in a certificate of {product.value} ({_SOURCE})")
    return TcbComponents({name: _level(values, SPL_OIDS[name], name) for name in wanted})


def _refuse_others(values: dict[str, bytes], oid: str, name: str, kind: str, owner: str) -> None:
    if kind != owner and oid in values:
        raise LayoutError(
            f"leaf {name}: extension {oid} in a {kind.upper()}, wanted only in a {owner.upper()}"
        )


def _hwid(value: bytes | None, product: Product) -> bytes:
    """The chip id: bytes without an inner tag, or wrapped in a second OCTET STRING. The length decides."""
    if value is None:
        raise LayoutError(f"leaf HWID: extension {OID_HWID} is missing ({_SOURCE})")
    size = _HWID_SIZES[product]
    if len(value) == size:
        return value
    if len(value) == size + 2 and value[:2] == bytes((der.OCTET_STRING, size)):
        return value[2:]
    raise LayoutError(f"leaf HWID: got {len(value)} bytes, wanted {size} for {product.value} ({_SOURCE})")
