"""ID block and ID authentication: what a guest owner expects of a launch, signed.

Source: AMD 56860, SNP_LAUNCH_FINISH, ID block and ID authentication information. The one documented algorithm
is ECDSA on P-384 with SHA-384; the firmware refuses others.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha384
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_launch import EcdsaPublicKey, IdAuth, IdBlock
from swsnp.abi.snp_report import GuestPolicy
from swsnp.crypto import ecdsa
from swsnp.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swsnp.crypto.ecdsa import SigningKey

__all__ = [
    "ALGO_P384",
    "DEFAULT_POLICY",
    "Finding",
    "author_key_digest",
    "check",
    "id_key_digest",
    "make",
    "sign",
]

ALGO_P384: Final = 1
"""ECDSA P-384 with SHA-384."""
DEFAULT_POLICY: Final = 0x30000
_VERSION: Final = 1
_SIGNATURE_SIZE: Final = 0x200
_SOURCE: Final = "AMD 56860, ID block"
_RESERVED: Final = ("reserved_008", "reserved_644", "reserved_c84")


@dataclass(frozen=True, slots=True)
class Finding:
    """One numbered check of an ID block: what it is about, whether it held, what was got and wanted."""

    number: int
    field: str
    ok: bool
    text: str


def make(
    measurement: bytes,
    *,
    policy: int = DEFAULT_POLICY,
    family_id: bytes = bytes(16),
    image_id: bytes = bytes(16),
    guest_svn: int = 0,
) -> IdBlock:
    """An ID block of version 1.

    Args:
        measurement: the launch digest that is expected, 48 bytes.
        policy: the guest policy; the launch has to ask for exactly this one.
        family_id: 16 bytes, into the report.
        image_id: 16 bytes, into the report.
        guest_svn: into the report.

    Raises:
        LayoutError: a value that does not fit its field.
    """
    block = IdBlock(
        ld=measurement,
        family_id=family_id,
        image_id=image_id,
        version=_VERSION,
        guest_svn=guest_svn,
        policy=GuestPolicy(policy),
    )
    bytes(block)  # numbers that do not fit are refused here, not when it is written
    return block


def sign(block: IdBlock, id_key: SigningKey, author_key: SigningKey | None = None) -> IdAuth:
    """Sign an ID block with the ID key, and the ID key with the author key, if there is one."""
    public = bytes(ecdsa.public_key_record(*id_key.public_point))
    auth = IdAuth(id_key_algo=ALGO_P384, id_block_sig=_padded(id_key.sign(bytes(block))), id_key=public)
    if author_key is None:
        return auth
    return auth.but(
        auth_key_algo=ALGO_P384,
        id_key_sig=_padded(author_key.sign(public)),
        author_key=bytes(ecdsa.public_key_record(*author_key.public_point)),
    )


def _padded(signature: bytes) -> bytes:
    return signature.ljust(_SIGNATURE_SIZE, b"\0")


def id_key_digest(auth: IdAuth) -> bytes:
    """ID_KEY_DIGEST of the report: SHA-384 of the key structure, padding and all."""
    return sha384(auth.id_key).digest()


def author_key_digest(auth: IdAuth) -> bytes | None:
    """AUTHOR_KEY_DIGEST of the report of a guest with author-key-enabled; None without an author key."""
    return sha384(auth.author_key).digest() if any(auth.author_key) else None


def check(
    block: IdBlock, auth: IdAuth, *, measurement: bytes | None = None, policy: int | None = None
) -> tuple[Finding, ...]:
    """What the firmware will say to an ID block, and what only we say.

    1. LD is the measurement, if that is given.
    2. POLICY is the guest's, if that is given.
    3. VERSION is 1, and reserved ranges are zero: documented, but firmware 1.55 looks at neither.
    4. ID_KEY_ALGO is ECDSA P-384 with SHA-384.
    5. The ID key is on P-384, and its signature is over the 96 bytes of the block.
    6. With an author key: AUTH_KEY_ALGO is the same, and its signature is over the ID key's structure.
    """
    return tuple(_checks(block, auth, measurement, policy))


def _checks(block: IdBlock, auth: IdAuth, measurement: bytes | None, policy: int | None) -> Iterator[Finding]:
    if measurement is not None:
        yield _compare(1, "LD", block.ld.hex(), measurement.hex())
    if policy is not None:
        yield _compare(2, "POLICY", f"{block.policy:#x}", f"{policy:#x}")
    yield _compare(3, "VERSION", str(block.version), str(_VERSION))
    clean = not any(any(getattr(auth, name)) for name in _RESERVED)
    yield Finding(3, "reserved", clean, "zero" if clean else f"got other bytes, wanted zeros ({_SOURCE})")
    yield _compare(4, "ID_KEY_ALGO", str(auth.id_key_algo), str(ALGO_P384))
    yield _signature(5, "ID_BLOCK_SIG", bytes(block), auth.id_block_sig, auth.id_key)
    if auth.auth_key_algo or any(auth.author_key) or any(auth.id_key_sig):
        yield _compare(6, "AUTH_KEY_ALGO", str(auth.auth_key_algo), str(ALGO_P384))
        yield _signature(6, "ID_KEY_SIG", auth.id_key, auth.id_key_sig, auth.author_key)


def _compare(number: int, field: str, got: str, wanted: str) -> Finding:
    same = got == wanted
    return Finding(number, field, same, got if same else f"got {got}, wanted {wanted} ({_SOURCE})")


def _signature(number: int, field: str, data: bytes, signature: bytes, key: bytes) -> Finding:
    try:
        x, y = ecdsa.public_key_point(EcdsaPublicKey.parse(key))
    except LayoutError as error:
        return Finding(number, field, ok=False, text=str(error))
    good = ecdsa.verify(data, signature, x=x, y=y)
    text = "signed" if good else f"does not fit its key and the {len(data)} signed bytes ({_SOURCE})"
    return Finding(number, field, good, text)
