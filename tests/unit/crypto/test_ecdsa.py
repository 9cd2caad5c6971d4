"""ECDSA P-384 in the form of reports, ID blocks and key structures."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from asn1crypto import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from swsnp.abi.snp_report import SIGNATURE_OFFSET, SIGNED_SIZE
from swsnp.crypto.derive import P384_ORDER
from swsnp.crypto.ecdsa import SigningKey, public_key_point, public_key_record, verify
from swsnp.errors import HostError, LayoutError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

# RFC 6979, A.2.6: P-384, SHA-384
RFC_SCALAR = int(
    "6B9D3DAD2E1B8C1C05B19875B6659F4DE23C3B667BF297BA9AA47740787137D896D5724E4C70A825F872C9EA60D2EDF5", 16
)
RFC_X = bytes.fromhex(
    "EC3A4E415B4E19A4568618029F427FA5DA9A8BC4AE92E02E06AAE5286B300C64DEF8F0EA9055866064A254515480BC13"
)
RFC_Y = bytes.fromhex(
    "8015D9B72D7D57244EA8EF9AC0C621896708A59367F9DFB9F54CA84B3F1C9DB1288B231C3AE0D4FE7344FD2533264720"
)
RFC_R = bytes.fromhex(
    "94EDBB92A5ECB8AAD4736E56C691916B3F88140666CE9FA73D64C4EA95AD133C81A648152E44ACF96E36DD1E80FABE46"
)
RFC_S = bytes.fromhex(
    "99EF4AEB15F178CEA1FE40DB2603138F130E740A19624526203B6351D0A3A94FA329C145786E679E7B82C71A38628AC8"
)
RFC_SIGNATURE = RFC_R[::-1] + bytes(24) + RFC_S[::-1] + bytes(24)


def test_deterministic_signature_is_the_standards() -> None:
    """RFC 6979 A.2.6: "sample" under SHA-384; AMD 56860: little-endian in 72-byte fields."""
    key = SigningKey.from_scalar(RFC_SCALAR, deterministic=True)
    assert key.public_point == (RFC_X, RFC_Y)
    assert key.sign(b"sample") == RFC_SIGNATURE


def test_verify_takes_the_standards_signature() -> None:
    """RFC 6979 A.2.6; bytes after the first 144 are not looked at."""
    assert verify(b"sample", RFC_SIGNATURE, x=RFC_X, y=RFC_Y)
    assert verify(b"sample", RFC_SIGNATURE + b"rest", x=RFC_X, y=RFC_Y)


def test_random_nonces_differ() -> None:
    """Without deterministic mode the nonce is random, as in the firmware."""
    key = SigningKey.from_scalar(RFC_SCALAR)
    first, second = key.sign(b"sample"), key.sign(b"sample")
    assert first != second
    assert verify(b"sample", first, x=RFC_X, y=RFC_Y)
    assert verify(b"sample", second, x=RFC_X, y=RFC_Y)


def test_a_foreign_program_takes_our_signature() -> None:
    """The 144 bytes are R and S of a signature that OpenSSL accepts; short numbers keep their place."""
    key = SigningKey.from_scalar(5, deterministic=True)
    public = ec.derive_private_key(5, ec.SECP384R1()).public_key()
    shortest = 72
    for number in range(600):  # long enough to meet R or S with leading zero bytes
        data = number.to_bytes(2, "big")
        raw = key.sign(data)
        assert len(raw) == 144
        r, s = int.from_bytes(raw[:72], "little"), int.from_bytes(raw[72:], "little")
        shortest = min(shortest, (r.bit_length() + 7) // 8, (s.bit_length() + 7) // 8)
        if number < 20 or shortest < 48:
            public.verify(utils.encode_dss_signature(r, s), data, ec.ECDSA(hashes.SHA384()))
        if shortest < 48:
            break
    assert shortest < 48


def _with(value: int, at: int) -> bytes:
    changed = bytearray(RFC_SIGNATURE)
    changed[at : at + 72] = value.to_bytes(72, "little")
    return bytes(changed)


@pytest.mark.parametrize("at", [0, 72], ids=["R", "S"])
@pytest.mark.parametrize("value", [0, P384_ORDER, P384_ORDER + 1, 1 << 575])
def test_numbers_out_of_range_do_not_verify(at: int, value: int) -> None:
    """FIPS 186-4: 1 <= r, s < n; a value equal to the true one modulo n is refused too."""
    assert not verify(b"sample", _with(value, at), x=RFC_X, y=RFC_Y)
    original = int.from_bytes(RFC_SIGNATURE[at : at + 72], "little")
    assert not verify(b"sample", _with(original + P384_ORDER, at), x=RFC_X, y=RFC_Y)


@pytest.mark.parametrize("at", [48, 71, 120, 143])
def test_upper_bytes_must_be_zero(at: int) -> None:
    """AMD 56860: numbers of 48 bytes are zero-extended to 72; a checker that reads 48 would accept this."""
    changed = bytearray(RFC_SIGNATURE)
    changed[at] = 1
    assert not verify(b"sample", bytes(changed), x=RFC_X, y=RFC_Y)


@pytest.mark.parametrize("at", [0, 47, 72, 119])
def test_a_changed_bit_does_not_verify(at: int) -> None:
    """FIPS 186-4: any other R or S is no signature of the data."""
    changed = bytearray(RFC_SIGNATURE)
    changed[at] ^= 1
    assert not verify(b"sample", bytes(changed), x=RFC_X, y=RFC_Y)
    assert not verify(b"simple", RFC_SIGNATURE, x=RFC_X, y=RFC_Y)


def test_a_point_off_the_curve_does_not_verify() -> None:
    """SEC 1: a public key is a point of the curve."""
    assert not verify(b"sample", RFC_SIGNATURE, x=RFC_Y, y=RFC_X)
    assert not verify(b"sample", RFC_SIGNATURE, x=bytes(48), y=bytes(48))
    assert not verify(b"sample", RFC_SIGNATURE, x=b"\xff" * 48, y=b"\xff" * 48)


@pytest.mark.parametrize(
    ("signature", "x", "y"),
    [(RFC_SIGNATURE[:143], RFC_X, RFC_Y), (RFC_SIGNATURE, RFC_X[1:], RFC_Y), (RFC_SIGNATURE, RFC_X, b"")],
)
def test_wrong_sizes_are_the_callers_mistake(signature: bytes, x: bytes, y: bytes) -> None:
    """Sizes are fixed: 144 bytes, 48 and 48."""
    with pytest.raises(LayoutError):
        verify(b"sample", signature, x=x, y=y)


@pytest.mark.parametrize("scalar", [0, -1, P384_ORDER, P384_ORDER + 5])
def test_scalar_out_of_range(scalar: int) -> None:
    """SEC 1: a private key is in 1..n-1; the error does not print it."""
    with pytest.raises(LayoutError) as caught:
        SigningKey.from_scalar(scalar)
    assert f" {scalar}" not in str(caught.value)


def test_repr_withholds_the_private_part() -> None:
    """Secrets are never in a repr."""
    text = repr(SigningKey.from_scalar(RFC_SCALAR))
    assert f"{RFC_SCALAR:x}"[:12] not in text
    assert "withheld" in text


def test_public_key_structure() -> None:
    """AMD 56860: CURVE 2, coordinates little-endian in 72 bytes, 404h bytes in all; and back."""
    record = public_key_record(RFC_X, RFC_Y)
    raw = bytes(record)
    assert len(raw) == 0x404
    assert raw[:4] == b"\x02\0\0\0"
    assert raw[4:52] == RFC_X[::-1]
    assert raw[0x4C : 0x4C + 48] == RFC_Y[::-1]
    assert not any(raw[52:0x4C])
    assert not any(raw[0x4C + 48 :])
    assert public_key_point(record) == (RFC_X, RFC_Y)


@pytest.mark.parametrize(
    "change",
    [{"curve": 1}, {"curve": 0}, {"qx": bytes(71) + b"\x01"}, {"qy": bytes(48) + b"\x01" + bytes(23)}],
)
def test_public_key_structure_of_another_kind(change: dict[str, object]) -> None:
    """AMD 56860: only P-384, upper bytes zero."""
    with pytest.raises(LayoutError):
        public_key_point(public_key_record(RFC_X, RFC_Y).but(**change))


def test_public_key_structure_wants_48_bytes() -> None:
    """A coordinate of P-384 is 48 bytes."""
    with pytest.raises(LayoutError):
        public_key_record(RFC_X[:-1], RFC_Y)


@pytest.mark.parametrize("name", ["milan-v2-debug", "genoa-line-v5", "milan-v2-idkey"])
def test_genuine_reports_verify(vectors: Path, name: str) -> None:
    """Genuine AMD reports verify under their chips' certificates and under no other data."""
    report = (vectors / name / "report.bin").read_bytes()
    # asn1crypto, because AMD's certificates have serial number 0, which RFC 5280 forbids
    certificate = x509.Certificate.load((vectors / name / "vcek.der").read_bytes())
    point: bytes = certificate.public_key["public_key"].native
    x, y = point[1:49], point[49:]
    assert verify(report[:SIGNED_SIZE], report[SIGNATURE_OFFSET:], x=x, y=y)
    assert not verify(report[: SIGNED_SIZE - 1], report[SIGNATURE_OFFSET:], x=x, y=y)


def test_awscrt_engine_signs_the_same_way() -> None:
    """The other engine's signatures verify under the same key."""
    pytest.importorskip("awscrt")
    key = SigningKey.from_scalar(RFC_SCALAR, engine="awscrt")
    assert key.public_point == (RFC_X, RFC_Y)
    assert verify(b"sample", key.sign(b"sample"), x=RFC_X, y=RFC_Y)


def test_awscrt_cannot_be_deterministic() -> None:
    """A run that promises equal bytes does not silently lose that promise."""
    with pytest.raises(UsageError, match="deterministic"):
        SigningKey.from_scalar(1, deterministic=True, engine="awscrt")


def test_awscrt_missing_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is not installed is said, not replaced."""
    monkeypatch.setitem(sys.modules, "awscrt.crypto", None)
    with pytest.raises(HostError, match=r"pip install 'swsnp\[fast\]'"):
        SigningKey.from_scalar(1, engine="awscrt")


def test_an_engine_that_does_not_exist() -> None:
    """There are two engines."""
    with pytest.raises(UsageError, match="openssl"):
        SigningKey.from_scalar(1, engine="openssl")  # type: ignore[arg-type]  # the point of the test
