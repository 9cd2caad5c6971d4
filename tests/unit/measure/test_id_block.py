"""ID blocks: made, signed, and judged by the firmware's rules, each in turn."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from swsnp.abi.snp_launch import EcdsaPublicKey, IdAuth, IdBlock
from swsnp.crypto.ecdsa import SigningKey
from swsnp.errors import LayoutError
from swsnp.measure import id_block

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

LD = bytes(range(48))
ID_KEY = SigningKey.from_scalar(0x1234, deterministic=True)
AUTHOR = SigningKey.from_scalar(0x5678, deterministic=True)
BLOCK = id_block.make(LD, policy=0xB0000, family_id=b"f" * 16, image_id=b"i" * 16, guest_svn=7)


def bad(block: IdBlock, auth: IdAuth, **given: Any) -> list[tuple[int, str]]:
    return [(each.number, each.field) for each in id_block.check(block, auth, **given) if not each.ok]


def test_block() -> None:
    """AMD 56860, ID block: 96 bytes, version 1."""
    assert bytes(BLOCK) == (
        LD + b"f" * 16 + b"i" * 16 + (1).to_bytes(4, "little") + (7).to_bytes(4, "little")
        + (0xB0000).to_bytes(8, "little")
    )  # fmt: skip
    assert id_block.make(LD) == IdBlock(ld=LD, version=1, policy=BLOCK.policy.__class__(0x30000))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"measurement": bytes(47)}, "IdBlock.ld: got 47 bytes, wanted 48"),
        ({"family_id": b""}, "IdBlock.family_id: got 0 bytes, wanted 16"),
        ({"image_id": bytes(17)}, "IdBlock.image_id: got 17 bytes, wanted 16"),
        ({"guest_svn": 1 << 32}, "IdBlock.guest_svn: got 0x100000000, wanted 4 bytes"),
        ({"guest_svn": -1}, "IdBlock.guest_svn: got -0x1, wanted 4 bytes"),
        ({"policy": 1 << 64}, "IdBlock.policy: got 0x10000000000000000, wanted 8 bytes"),
    ],
)
def test_values_that_do_not_fit(given: dict[str, Any], text: str) -> None:
    """Every value has its size."""
    with pytest.raises(LayoutError, match=text):
        id_block.make(**{"measurement": LD, **given})


def test_auth_without_an_author() -> None:
    """AMD 56860: the ID key signs the block; the author's half is zero."""
    auth = id_block.sign(BLOCK, ID_KEY)
    assert bad(BLOCK, auth, measurement=LD, policy=0xB0000) == []
    assert (auth.id_key_algo, auth.auth_key_algo) == (1, 0)
    assert not any(auth.id_key_sig + auth.author_key)
    assert id_block.author_key_digest(auth) is None
    assert id_block.id_key_digest(auth) == hashlib.sha384(auth.id_key).digest()
    key = EcdsaPublicKey.parse(auth.id_key)
    assert (key.curve, key.qx[47::-1], key.qy[47::-1]) == (2, *ID_KEY.public_point)


def test_auth_with_an_author() -> None:
    """AMD 56860: the author key signs the 404h bytes of the ID key."""
    auth = id_block.sign(BLOCK, ID_KEY, AUTHOR)
    assert bad(BLOCK, auth, measurement=LD, policy=0xB0000) == []
    assert (auth.id_key_algo, auth.auth_key_algo) == (1, 1)
    assert id_block.author_key_digest(auth) == hashlib.sha384(auth.author_key).digest()
    assert len({each.number for each in id_block.check(BLOCK, auth, measurement=LD, policy=0)}) == 6


GOOD = id_block.sign(BLOCK, ID_KEY, AUTHOR)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"measurement": bytes(48)}, [(1, "LD")]),
        ({"policy": 0x30000}, [(2, "POLICY")]),
    ],
)
def test_another_guest(given: dict[str, Any], wanted: list[tuple[int, str]]) -> None:
    """Checks 1 and 2: the measurement and the policy that the launch has."""
    assert bad(BLOCK, GOOD, **given) == wanted


def test_version() -> None:
    """Check 3: VERSION is 1, although firmware 1.55 does not look."""
    block = BLOCK.but(version=2)
    assert bad(block, id_block.sign(block, ID_KEY)) == [(3, "VERSION")]


@pytest.mark.parametrize("name", ["reserved_008", "reserved_644", "reserved_c84"])
def test_reserved(name: str) -> None:
    """Check 3: reserved ranges are zero."""
    dirty = GOOD.but(**{name: flipped(getattr(GOOD, name), 1)})
    assert bad(BLOCK, dirty) == [(3, "reserved")]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"id_key_algo": 2}, [(4, "ID_KEY_ALGO")]),
        ({"id_block_sig": flipped(GOOD.id_block_sig, 5)}, [(5, "ID_BLOCK_SIG")]),
        ({"id_block_sig": bytes(512)}, [(5, "ID_BLOCK_SIG")]),
        ({"id_key": flipped(GOOD.id_key, 4)}, [(5, "ID_BLOCK_SIG"), (6, "ID_KEY_SIG")]),
        ({"id_key": flipped(GOOD.id_key, 0)}, [(5, "ID_BLOCK_SIG"), (6, "ID_KEY_SIG")]),
        ({"id_key": flipped(GOOD.id_key, 0x300)}, [(6, "ID_KEY_SIG")]),
        ({"auth_key_algo": 2}, [(6, "AUTH_KEY_ALGO")]),
        ({"auth_key_algo": 0}, [(6, "AUTH_KEY_ALGO")]),
        ({"id_key_sig": flipped(GOOD.id_key_sig, 72)}, [(6, "ID_KEY_SIG")]),
        ({"author_key": flipped(GOOD.author_key, 4)}, [(6, "ID_KEY_SIG")]),
        ({"author_key": bytes(0x404)}, [(6, "ID_KEY_SIG")]),
        (
            {"auth_key_algo": 0, "author_key": bytes(0x404)},
            [(6, "AUTH_KEY_ALGO"), (6, "ID_KEY_SIG")],
        ),
        (
            {"auth_key_algo": 0, "id_key_sig": bytes(512)},
            [(6, "AUTH_KEY_ALGO"), (6, "ID_KEY_SIG")],
        ),
    ],
)
def test_signatures(changes: dict[str, Any], wanted: list[tuple[int, str]]) -> None:
    """Checks 4 to 6: algorithm, key and signature of both."""
    assert bad(BLOCK, GOOD.but(**changes)) == wanted


def test_another_block() -> None:
    """Check 5: the signature is over all 96 bytes."""
    for at in (0, 0x30, 0x40, 0x54, 0x58):
        assert bad(IdBlock.parse(flipped(bytes(BLOCK), at)), GOOD) == [(5, "ID_BLOCK_SIG")]


# --- keys ---------------------------------------------------------------------------------------------------

NO_PASSWORD = serialization.NoEncryption()
PKCS8, SEC1 = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL


def pem(key: PrivateKeyTypes, form: Any = PKCS8, lock: Any = NO_PASSWORD) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, lock)


@pytest.mark.parametrize("form", [PKCS8, SEC1])
def test_pem(form: Any) -> None:
    """The forms that openssl ecparam -genkey and openssl genpkey write: SEC 1 and PKCS #8."""
    key = ec.derive_private_key(0x1234, ec.SECP384R1())
    read = SigningKey.from_pem(pem(key, form), deterministic=True)
    assert read.public_point == ID_KEY.public_point
    assert read.sign(b"x") == ID_KEY.sign(b"x")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "got something else, wanted PEM of a P-384 key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "got something else"),
        (pem(ec.generate_private_key(ec.SECP256R1())), "on secp256r1, wanted P-384"),
        (pem(ed25519.Ed25519PrivateKey.generate()), "got Ed25519PrivateKey on no curve, wanted P-384"),
        (pem(rsa.generate_private_key(65537, 2048)), "on no curve, wanted P-384"),
        (
            pem(
                ec.generate_private_key(ec.SECP384R1()),
                lock=serialization.BestAvailableEncryption(b"secret"),
            ),
            "got one with a password, wanted one without",
        ),
    ],
)
def test_other_keys(data: bytes, text: str) -> None:
    """AMD 56860: ID_KEY_ALGO 1, ECDSA on P-384, is the only one."""
    with pytest.raises(LayoutError, match=text):
        SigningKey.from_pem(data)
