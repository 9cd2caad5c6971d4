"""Is an answer of the key service what was asked for? Judged before it is kept, and when it is read back.

This is about kind and identity, so that a wrong answer is told apart from false evidence. Whether anything
may be trusted is `verify`'s to say: no signature is checked here, and an ARK from here is a candidate only.
Source: AMD 57230.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from swsnp.abi.kds import ark_name, ask_name, asvk_name
from swsnp.certs.crl import read_crl
from swsnp.certs.kds_extensions import issuing_product, leaf_kind, leaf_profile
from swsnp.certs.kds_url import ChainRequest, CrlRequest, KdsRequest, LeafKind, VcekRequest, VlekRequest
from swsnp.certs.x509_reader import Certificate, common_name, read, to_der
from swsnp.errors import InputError, LayoutError

if TYPE_CHECKING:
    from datetime import datetime

    from swsnp.abi.snp_report import Product, TcbVersion

__all__ = ["KdsAnswer", "LIMITS", "judge", "limit_of"]

LIMITS: Final = {VcekRequest: 1 << 14, VlekRequest: 1 << 14, ChainRequest: 1 << 16, CrlRequest: 1 << 20}
"""Bytes that are read of an answer at most; genuine ones take 1.4, 1.4, 4.7 and 0.9 KiB."""
_SOURCE: Final = "AMD 57230"


@dataclass(frozen=True, slots=True, kw_only=True)
class KdsAnswer:
    """An answer that is what was asked for.

    Attributes:
        request: what was asked for.
        body: as it came: DER, for a chain PEM.
        der: the leaf; or ASK (ASVK) and ARK; or the CRL.
        ends: nothing in it is good after this; for a CRL its nextUpdate.
    """

    request: KdsRequest
    body: bytes = field(repr=False)
    der: tuple[bytes, ...] = field(repr=False)
    ends: datetime


def limit_of(request: KdsRequest) -> int:
    """The largest answer that is accepted, in bytes."""
    return LIMITS[type(request)]


def judge(request: KdsRequest, body: bytes) -> KdsAnswer:
    """Hold an answer against the request.

    1. A leaf is one DER certificate of the kind and product asked for, with the TCB and, in a VCEK, the HWID.
    2. A chain is PEM: ASK (for VLEKs: ASVK) first, then the ARK that its issuer names, and nothing else.
    3. A CRL is DER, issued in the name of the product's ARK, and says when the next one comes.

    Raises:
        InputError: broken PEM, too many bytes, or what came is something else; the text names the field.
        LayoutError: what came is malformed.
    """
    if len(body) > limit_of(request):
        raise InputError(f"answer: got more than {limit_of(request)} bytes")
    match request:
        case VcekRequest(product=product, hwid=hwid, tcb=tcb):
            return _leaf(request, body, "vcek", product, tcb, hwid)
        case VlekRequest(product=product, tcb=tcb):
            return _leaf(request, body, "vlek", product, tcb, None)
        case ChainRequest(product=product, kind=kind):
            return _chain(request, body, product, kind)
        case CrlRequest(product=product):
            return _crl(request, body, product)


def _want(what: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise InputError(f"answer, {what}: got {got}, wanted {wanted} ({_SOURCE})")


def _binary(body: bytes) -> bytes:
    if to_der(body) != (body,):
        raise InputError(f"answer: got PEM, wanted DER ({_SOURCE})")
    return body


def _leaf(
    request: KdsRequest, body: bytes, kind: LeafKind, product: Product, tcb: TcbVersion, hwid: bytes | None
) -> KdsAnswer:
    leaf = read(_binary(body))
    _want("subject", leaf_kind(leaf) or leaf.subject_cn, kind)
    named = issuing_product(leaf)
    _want("issuer", named and named.value, product.value)
    profile = leaf_profile(leaf, product)
    _want("HWID", (profile.hwid or b"").hex(), (hwid or b"").hex())
    _want("TCB", dict(profile.tcb), dict(tcb.decode(product)))
    return KdsAnswer(request=request, body=body, der=(body,), ends=leaf.not_after)


def _chain(request: KdsRequest, body: bytes, product: Product, kind: LeafKind) -> KdsAnswer:
    blocks = to_der(body)
    if blocks == (body,):
        raise InputError(f"answer: got DER, wanted PEM ({_SOURCE})")
    _want("certificates", len(blocks), 2)
    intermediate, root = (read(each) for each in blocks)
    _want(
        "first subject", intermediate.subject_cn, ask_name(product) if kind == "vcek" else asvk_name(product)
    )
    _want("second subject", root.subject_cn, ark_name(product))
    _require_issued(intermediate, root)
    _require_issued(root, root)
    return KdsAnswer(request=request, body=body, der=blocks, ends=min(intermediate.not_after, root.not_after))


def _require_issued(below: Certificate, above: Certificate) -> None:
    if below.issuer != above.subject:
        raise InputError(
            f"answer, issuer of {below.subject_cn}: got {below.issuer.hex()}, wanted {above.subject.hex()}, "
            f"the name of {above.subject_cn} (RFC 5280, 4.1.2.4)"
        )


def _crl(request: KdsRequest, body: bytes, product: Product) -> KdsAnswer:
    if to_der(body, label=b"X509 CRL") != (body,):
        raise InputError(f"answer: got PEM, wanted DER ({_SOURCE})")
    crl = read_crl(body)
    _want("issuer of the CRL", common_name(crl.issuer, "issuer"), ark_name(product))
    if crl.next_update is None:
        raise LayoutError(f"answer: CRL without nextUpdate, wanted one ({_SOURCE})")
    return KdsAnswer(request=request, body=body, der=(body,), ends=crl.next_update)
