"""ECDSA on P-384 with SHA-384, in the form that reports, ID blocks and keys have.

Source: AMD 56860, signature and public key structures: R, S, QX and QY are little-endian, zero-extended to
72 bytes.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from swsnp.abi.snp_launch import EcdsaPublicKey
from swsnp.crypto.derive import P384_ORDER
from swsnp.errors import HostError, LayoutError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "CURVE_P384",
    "Engine",
    "SIGNATURE_SIZE",
    "SigningKey",
    "VerifyingKey",
    "public_key_point",
    "public_key_record",
    "verify",
]

Engine: TypeAlias = Literal["cryptography", "awscrt"]
SIGNATURE_SIZE: Final = 144
"""R and S, 72 bytes each."""
CURVE_P384: Final = 2
_COORDINATE: Final = 48
_FIELD: Final = 72
# SubjectPublicKeyInfo up to the point: id-ecPublicKey, secp384r1, BIT STRING, uncompressed (RFC 5480)
_SPKI_P384: Final = bytes.fromhex("3076301006072a8648ce3d020106052b8104002203620004")
_CURVE: Final = ec.SECP384R1()
_SHA384: Final = hashes.SHA384()
_RANDOM_NONCE: Final = ec.ECDSA(_SHA384)
_RFC_6979: Final = ec.ECDSA(_SHA384, deterministic_signing=True)


class SigningKey:
    """A private key on P-384; a VCEK or VLEK, or an ID or author key in tests."""

    __slots__ = ("_sign_der", "_x", "_y")

    def __init__(self, sign_der: Callable[[bytes], bytes], x: bytes, y: bytes) -> None:
        self._sign_der = sign_der
        self._x, self._y = x, y

    @classmethod
    def from_scalar(
        cls, scalar: int, *, deterministic: bool = False, engine: Engine = "cryptography"
    ) -> SigningKey:
        """The key of a private scalar.

        Args:
            scalar: 1..n-1.
            deterministic: nonces of RFC 6979, so that equal data gives equal signatures.
            engine: "awscrt" signs faster, but holds the interpreter lock and cannot be deterministic.

        Raises:
            LayoutError: the scalar is out of range.
            UsageError: deterministic with awscrt, or an engine that does not exist.
            HostError: awscrt is not installed.
        """
        if not 1 <= scalar < P384_ORDER:
            raise LayoutError("P-384 scalar: out of range, wanted 1..n-1")  # the value itself is secret
        if engine == "awscrt" and deterministic:
            raise UsageError(
                "awscrt signs with random nonces only; deterministic signatures need cryptography"
            )
        private = ec.derive_private_key(scalar, _CURVE)
        numbers = private.public_key().public_numbers()
        return cls(
            _signer(private, deterministic, engine),
            numbers.x.to_bytes(_COORDINATE, "big"),
            numbers.y.to_bytes(_COORDINATE, "big"),
        )

    @classmethod
    def from_pem(cls, pem: bytes, *, deterministic: bool = False) -> SigningKey:
        """The key of a PEM file, PKCS #8 or SEC 1, without a password.

        Raises:
            LayoutError: not a private key in PEM, one that is encrypted, or not on P-384.
        """
        try:
            private = serialization.load_pem_private_key(pem, password=None)
        except TypeError:
            raise LayoutError("private key: got one with a password, wanted one without") from None
        except (ValueError, UnsupportedAlgorithm):
            raise LayoutError("private key: got something else, wanted PEM of a P-384 key") from None
        curve = private.curve.name if isinstance(private, ec.EllipticCurvePrivateKey) else "no curve"
        if not isinstance(private, ec.EllipticCurvePrivateKey) or curve != _CURVE.name:
            raise LayoutError(
                f"private key: got {type(private).__name__} on {curve}, wanted P-384 (AMD 56860)"
            )
        return cls.from_scalar(private.private_numbers().private_value, deterministic=deterministic)

    @property
    def public_point(self) -> tuple[bytes, bytes]:
        """X and Y, big-endian, 48 bytes each."""
        return self._x, self._y

    def sign(self, data: bytes) -> bytes:
        """Sign SHA-384 of `data`; 144 bytes: R then S, each little-endian, zero-extended to 72."""
        der = self._sign_der(data)
        # SEQUENCE { INTEGER r, INTEGER s } of this curve is below 128 bytes: every length is one byte
        s_at = 4 + der[3]
        r = int.from_bytes(der[4:s_at], "big")
        s = int.from_bytes(der[s_at + 2 :], "big")
        return r.to_bytes(_FIELD, "little") + s.to_bytes(_FIELD, "little")

    def __repr__(self) -> str:
        return f"SigningKey(x={self._x.hex()[:16]}…, private part withheld)"


def _signer(
    private: ec.EllipticCurvePrivateKey, deterministic: bool, engine: Engine
) -> Callable[[bytes], bytes]:
    if engine == "awscrt":
        return _awscrt_signer(private)
    if engine != "cryptography":
        raise UsageError(f"signing engine: got {engine!r}, wanted 'cryptography' or 'awscrt'")
    algorithm = _RFC_6979 if deterministic else _RANDOM_NONCE
    return lambda data: private.sign(data, algorithm)


def _awscrt_signer(private: ec.EllipticCurvePrivateKey) -> Callable[[bytes], bytes]:
    try:
        from awscrt.crypto import EC  # an extra: only who asks for this engine needs it
    except ImportError:
        raise HostError("signing engine 'awscrt' is not installed: pip install 'swsnp[fast]'") from None
    der = private.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    sign: Callable[[bytes], bytes] = EC.new_key_from_der_data(der).sign
    return lambda data: sign(hashlib.sha384(data).digest())


class VerifyingKey:
    """A public key on P-384, kept ready to verify with; not changed after it was made.

    Both engines give the same verdicts. "awscrt" is more than twice as fast and holds the interpreter lock:
    use threads with "cryptography", processes with "awscrt".

    Args:
        x: big-endian, 48 bytes.
        y: big-endian, 48 bytes.
        engine: whose arithmetic verifies.

    Raises:
        LayoutError: a coordinate that is not 48 bytes.
        UsageError: an engine that does not exist.
        HostError: awscrt is not installed.
    """

    __slots__ = ("_holds",)

    def __init__(self, x: bytes, y: bytes, *, engine: Engine = "cryptography") -> None:
        _want_coordinates(x, y)
        if engine == "awscrt":
            self._holds = _awscrt_verifier(x, y)
        elif engine == "cryptography":
            self._holds = _cryptography_verifier(x, y)
        else:
            raise UsageError(f"verifying engine: got {engine!r}, wanted 'cryptography' or 'awscrt'")

    def verify(self, data: bytes, signature: bytes) -> bool:
        """Whether `signature` is this key's over SHA-384 of `data`.

        1. Bytes 48..71 of R and of S are zero.
        2. 1 <= R, S < n.
        3. The key is a point of P-384.
        4. The ECDSA equation holds.

        Args:
            data: the bytes that were signed.
            signature: R, S in report form; anything after the first 144 bytes is the caller's to look at.

        Raises:
            LayoutError: a signature below 144 bytes.
        """
        if len(signature) < SIGNATURE_SIZE:
            raise LayoutError(f"signature: got {len(signature)} bytes, wanted at least {SIGNATURE_SIZE}")
        # a number of 72 bytes whose upper bytes are not zero is above n, so one comparison is rules 1 and 2
        r = int.from_bytes(signature[:_FIELD], "little")
        s = int.from_bytes(signature[_FIELD:SIGNATURE_SIZE], "little")
        if not (1 <= r < P384_ORDER and 1 <= s < P384_ORDER):
            return False
        return self._holds(data, utils.encode_dss_signature(r, s))


def _cryptography_verifier(x: bytes, y: bytes) -> Callable[[bytes, bytes], bool]:
    try:
        public = ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, b"\x04" + x + y)
    except ValueError:
        return _nothing_verifies

    def holds(data: bytes, der: bytes) -> bool:
        try:
            public.verify(der, data, _RANDOM_NONCE)
        except InvalidSignature:
            return False
        return True

    return holds


def _awscrt_verifier(x: bytes, y: bytes) -> Callable[[bytes, bytes], bool]:
    try:
        from awscrt.crypto import EC  # an extra: only who asks for this engine needs it
    except ImportError:
        raise HostError("verifying engine 'awscrt' is not installed: pip install 'swsnp[fast]'") from None
    try:
        public = EC.new_key_from_der_data(_SPKI_P384 + x + y)
    except RuntimeError:
        return _nothing_verifies

    def holds(data: bytes, der: bytes) -> bool:
        good: bool = public.verify(hashlib.sha384(data).digest(), der)
        return good

    return holds


def _nothing_verifies(data: bytes, der: bytes) -> bool:
    """What stands for a key that is no point of the curve."""
    return False


def verify(data: bytes, signature: bytes, *, x: bytes, y: bytes) -> bool:
    """Whether `signature` is the key's over SHA-384 of `data`; as `VerifyingKey.verify`, for one use.

    Raises:
        LayoutError: a signature below 144 bytes or a coordinate that is not 48 bytes.
    """
    return VerifyingKey(x, y).verify(data, signature)


def _want_coordinates(x: bytes, y: bytes) -> None:
    if len(x) != _COORDINATE or len(y) != _COORDINATE:
        raise LayoutError(f"public key: got coordinates of {len(x)} and {len(y)} bytes, wanted {_COORDINATE}")


def public_key_record(x: bytes, y: bytes) -> EcdsaPublicKey:
    """The 404h-byte structure of a P-384 key from its big-endian coordinates.

    Raises:
        LayoutError: a coordinate that is not 48 bytes.
    """
    _want_coordinates(x, y)
    pad = bytes(_FIELD - _COORDINATE)
    return EcdsaPublicKey(curve=CURVE_P384, qx=x[::-1] + pad, qy=y[::-1] + pad)


def public_key_point(key: EcdsaPublicKey) -> tuple[bytes, bytes]:
    """X and Y of a key structure, big-endian, 48 bytes each; whether they are on the curve is not checked.

    Raises:
        LayoutError: CURVE is not P-384, or bytes 48..71 of a coordinate are not zero.
    """
    if key.curve != CURVE_P384:
        raise LayoutError(f"public key CURVE: got {key.curve}, wanted {CURVE_P384} (P-384, AMD 56860)")
    if any(key.qx[_COORDINATE:]) or any(key.qy[_COORDINATE:]):
        raise LayoutError("public key: bytes 48..71 of QX or QY are not zero (P-384, AMD 56860)")
    return key.qx[_COORDINATE - 1 :: -1], key.qy[_COORDINATE - 1 :: -1]
