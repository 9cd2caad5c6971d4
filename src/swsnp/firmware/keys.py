"""What keys are derived from: the chip's secret, the provider's secret, the root of a derived key.

The functions are this project's own: nobody knows the secrets of silicon, so only what users can see is kept.
A VCEK depends on the chip and on every component of the TCB, a VLEK on provider, product and TCB, a derived
key on what the request selects. All are HKDF-SHA384 (RFC 5869).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_report import CHIP_ID_MARKER, Product, TcbVersion
from swsnp.crypto.derive import hkdf_sha384, p384_scalar
from swsnp.errors import LayoutError

if TYPE_CHECKING:
    from swsnp.abi.snp_message import MsgKeyReq
    from swsnp.firmware.context import GuestContext

__all__ = [
    "ROOT_SIZE",
    "SECRET_SIZE",
    "VlekKey",
    "chip_id",
    "derived_key",
    "vcek_root",
    "vcek_scalar",
    "vlek_key",
    "vlek_root",
    "vlek_scalar",
]

SECRET_SIZE: Final = 32
ROOT_SIZE: Final = 48
_SCALAR_SIZE: Final = 56
_CHIP_ID_SIZE: Final = 64
_CHIP: Final = b"swsnp/chip/v1"
_PROVIDER: Final = b"swsnp/csp/v1"
_KEY: Final = b"swsnp/key/v1"


def _tcb_bytes(tcb: TcbVersion) -> bytes:
    return tcb.to_bytes(8, "little")


def _secret(secret: bytes, whose: str) -> bytes:
    if len(secret) != SECRET_SIZE:
        raise LayoutError(f"{whose} secret: got {len(secret)} bytes, wanted {SECRET_SIZE}")
    return secret


def chip_id(secret: bytes, product: Product, *, socket: int = 0) -> bytes:
    """CHIP_ID of a chip: 64 bytes that begin with the marker of emulated evidence; Turin: 8, then zeros.

    Raises:
        LayoutError: a secret that is not 32 bytes.
    """
    info = b"chip-id" if socket == 0 else f"chip-id/{socket}".encode()
    raw = hkdf_sha384(_secret(secret, "chip"), salt=_CHIP, info=info, length=product.hwid_size)
    return (CHIP_ID_MARKER + raw[len(CHIP_ID_MARKER) :]).ljust(_CHIP_ID_SIZE, b"\0")


def vcek_scalar(secret: bytes, product: Product, tcb: TcbVersion) -> int:
    """The private scalar of a chip's VCEK for one TCB.

    Raises:
        LayoutError: a secret that is not 32 bytes.
    """
    info = b"vcek/" + product.value.encode() + _tcb_bytes(tcb)
    return p384_scalar(
        hkdf_sha384(_secret(secret, "chip"), salt=_CHIP, info=info, length=_SCALAR_SIZE)
    )  # fmt: skip


def vcek_root(secret: bytes, product: Product, tcb: TcbVersion) -> bytes:
    """The root (48 bytes) that a chip's derived keys for one TCB come from.

    Raises:
        LayoutError: a secret that is not 32 bytes.
    """
    info = b"vcek-root/" + product.value.encode() + _tcb_bytes(tcb)
    return hkdf_sha384(_secret(secret, "chip"), salt=_CHIP, info=info, length=ROOT_SIZE)


def _vlek(
    kind: bytes, provider_secret: bytes, product: Product, csp_id: str, tcb: TcbVersion, size: int
) -> bytes:
    info = kind + f"{product.value}/{csp_id}".encode() + _tcb_bytes(tcb)
    return hkdf_sha384(_secret(provider_secret, "provider"), salt=_PROVIDER, info=info, length=size)


def vlek_scalar(provider_secret: bytes, product: Product, csp_id: str, tcb: TcbVersion) -> int:
    """The private scalar of a provider's VLEK for one product and TCB; the chip does not enter.

    Raises:
        LayoutError: a secret that is not 32 bytes.
    """
    return p384_scalar(_vlek(b"vlek/", provider_secret, product, csp_id, tcb, _SCALAR_SIZE))


def vlek_root(provider_secret: bytes, product: Product, csp_id: str, tcb: TcbVersion) -> bytes:
    """The root (48 bytes) of derived keys on a host that has this VLEK loaded; errors as `vlek_scalar`."""
    return _vlek(b"vlek-root/", provider_secret, product, csp_id, tcb, ROOT_SIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class VlekKey:
    """A VLEK as the firmware holds it after it was loaded."""

    scalar: int = field(repr=False)
    root: bytes = field(repr=False)
    tcb: TcbVersion


def vlek_key(provider_secret: bytes, product: Product, csp_id: str, tcb: TcbVersion) -> VlekKey:
    """Scalar and root of a provider's VLEK; errors as `vlek_scalar`."""
    return VlekKey(
        scalar=vlek_scalar(provider_secret, product, csp_id, tcb),
        root=vlek_root(provider_secret, product, csp_id, tcb),
        tcb=tcb,
    )


def derived_key(root: bytes, guest: GuestContext, request: MsgKeyReq, *, launch_mit_vector: int = 0) -> bytes:
    """DERIVED_KEY of MSG_KEY_RSP, 32 bytes, for a request that was found in order.

    HKDF over, each at its full size and little-endian: ROOT_KEY_SELECT (4 bytes), which ID block key is bound
    (4: 0 none, 1 ID key, 2 author key) and its digest (48), GUEST_FIELD_SELECT (8), VMPL (4), HOST_DATA (32),
    POLICY (8), IMAGE_ID (16), FAMILY_ID (16), LD (48), GUEST_SVN (4), TCB_VERSION (8), LAUNCH_MIT_VECTOR (8).
    What GUEST_FIELD_SELECT leaves out counts as zero. LAUNCH_MIT_VECTOR is in version 2 requests only:
    `launch_mit_vector` is zero unless it was selected there.
    """
    bound, digest = guest.bound_key()
    select = request.guest_field_select
    block = guest.id_block
    parts = (
        request.flags.root_key_select.to_bytes(4, "little"),
        bound.to_bytes(4, "little"),
        digest,
        select.to_bytes(8, "little"),
        request.vmpl.to_bytes(4, "little"),
        guest.host_data,
        (guest.policy if select.guest_policy else 0).to_bytes(8, "little"),
        block.image_id if select.image_id else bytes(16),
        block.family_id if select.family_id else bytes(16),
        guest.ld if select.measurement else bytes(48),
        (request.guest_svn if select.guest_svn else 0).to_bytes(4, "little"),
        (request.tcb_version if select.tcb_version else 0).to_bytes(8, "little"),
        launch_mit_vector.to_bytes(8, "little"),
    )
    return hkdf_sha384(root, salt=_KEY, info=b"".join(parts), length=32)
