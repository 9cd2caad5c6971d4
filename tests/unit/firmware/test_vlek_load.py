"""SNP_VLEK_LOAD and the hashstick."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_command import Command, PlatformState, VlekHashstick, VlekLoad
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_message import KeySelWord, MsgReportReq
from swsnp.abi.snp_report import AttestationReport, Product, TcbVersion
from swsnp.crypto.aead import seal_bytes
from swsnp.crypto.derive import P384_ORDER, hkdf_sha384
from swsnp.crypto.ecdsa import SigningKey, verify
from swsnp.crypto.seal import TagMismatch
from swsnp.errors import LayoutError
from swsnp.firmware.keys import VlekKey, vcek_root, vlek_key
from swsnp.firmware.vlek import unwrap, wrap
from swsnp.hardware.rmp import RmpEntry

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import Rig

SECRET = bytes(range(32))
PROVIDER = b"p" * 32
IV = bytes(range(12))


def _vlek(rig: Rig, tcb: TcbVersion | None = None) -> VlekKey:
    return vlek_key(PROVIDER, rig.chip.product, "csp", rig.chip.reported_tcb if tcb is None else tcb)


def _stick(rig: Rig, tcb: TcbVersion | None = None, secret: bytes = SECRET) -> bytes:
    key = _vlek(rig, tcb)
    return wrap(vcek_root(secret, rig.chip.product, key.tcb), key, IV)


def _load(rig: Rig, stick: bytes, **fields: Any) -> int:
    page = rig.page(RmpEntry(), stick)
    record = VlekLoad(length=16, vlek_wrapped_paddr=page).but(**fields)
    return rig.command(Command.SNP_VLEK_LOAD, record)


def test_a_provider_reaches_a_chip(rig: Rig) -> None:
    """AMD 56860: from then on KEY_SEL 2 and 0 sign with the VLEK; any platform state will do."""
    rig.platform.state = PlatformState.UNINIT
    assert _load(rig, _stick(rig)) == S.SUCCESS
    assert rig.chip.variables.vlek == _vlek(rig)
    rig.platform.state = PlatformState.INIT
    guest = rig.running()
    answer = rig.request(guest, bytes(MsgReportReq(flags=KeySelWord(2))))
    raw = answer.payload[0x20:]
    assert AttestationReport.parse(raw).signer_info.signing_key == 1
    x, y = SigningKey.from_scalar(_vlek(rig).scalar).public_point
    assert verify(raw[:0x2A0], raw[0x2A0:], x=x, y=y)


def test_the_stick_has_the_documented_form(rig: Rig) -> None:
    """AMD 56860, VLEK hashstick: 432 bytes, TCB in the clear, nothing of the key readable."""
    stick = _stick(rig)
    parsed = VlekHashstick.parse(stick)
    assert (len(stick), parsed.iv, parsed.tcb_version) == (432, IV, rig.chip.reported_tcb)
    assert _vlek(rig).root not in stick
    assert not any(parsed.reserved_198)
    assert unwrap(vcek_root(SECRET, Product.GENOA, parsed.tcb_version), stick) == _vlek(rig)


@pytest.mark.parametrize(
    "fields",
    [
        {"length": 15},
        {"vlek_wrapped_version": 1},
        {"reserved_05": b"\0\0\1"},
        {"vlek_wrapped_paddr": 0x7777_7777_7000},
    ],
)
def test_bad_commands(rig: Rig, fields: dict[str, Any]) -> None:
    """AMD 56860: LEN, VLEK_WRAPPED_VERSION, reserved bits, no memory: INVALID_PARAM."""
    older = TcbVersion.encode(Product.GENOA, boot_loader=1)
    assert _load(rig, _stick(rig, older), **fields) == S.INVALID_PARAM
    assert rig.chip.variables.vlek is None


def test_the_tcb_comes_before_the_tag(rig: Rig) -> None:
    """AMD 56860: the stick's TCB must be exactly the reported one, BAD_SVN; then the tag, BAD_MEASUREMENT."""
    older = TcbVersion.encode(Product.GENOA, boot_loader=1)
    assert _load(rig, _stick(rig, older, secret=bytes(32))) == S.BAD_SVN
    assert _load(rig, _stick(rig, secret=bytes(32))) == S.BAD_MEASUREMENT
    assert rig.chip.variables.vlek is None
    rig.chip.configure(reported_tcb=older)
    assert _load(rig, _stick(rig, older)) == S.SUCCESS


@pytest.mark.parametrize("at", [0, 0x10, 0x18F, 0x198, 0x19F, 0x1A0, 0x1AF])
def test_every_byte_is_authenticated(rig: Rig, at: int) -> None:
    """AMD 56860: IV, ciphertext, TCB_VERSION with the reserved bytes after it, and tag."""
    stick = bytearray(_stick(rig))
    stick[at] ^= 1
    assert _load(rig, bytes(stick)) == S.BAD_MEASUREMENT


def test_a_stick_replaces_any_vlek(rig: Rig) -> None:
    """AMD 56860: the last VLEK counts; a refused one leaves the loaded one."""
    assert _load(rig, _stick(rig)) == S.SUCCESS
    assert _load(rig, bytes(432)) == S.BAD_SVN
    assert rig.chip.variables.vlek == _vlek(rig)
    other = vlek_key(bytes(32), Product.GENOA, "other", rig.chip.reported_tcb)
    stick = wrap(vcek_root(SECRET, Product.GENOA, other.tcb), other, IV)
    assert _load(rig, stick) == S.SUCCESS
    assert rig.chip.variables.vlek == other


def test_what_cannot_be_wrapped(rig: Rig) -> None:
    """Sizes are checked by name."""
    root, key = vcek_root(SECRET, Product.GENOA, rig.chip.reported_tcb), _vlek(rig)
    with pytest.raises(LayoutError, match="chip root: got 47 bytes, wanted 48"):
        wrap(root[:-1], key, IV)
    with pytest.raises(LayoutError, match="hashstick IV: got 11 bytes, wanted 12"):
        wrap(root, key, IV[:-1])
    with pytest.raises(LayoutError, match="got 431 bytes, wanted 432"):
        unwrap(root, bytes(431))


@pytest.mark.parametrize(("scalar", "good"), [(0, 0), (1, 1), (P384_ORDER - 1, 1), (P384_ORDER, 0)])
def test_the_wrapped_scalar_is_a_private_key(rig: Rig, scalar: int, good: int) -> None:
    """A private key of P-384 is 1..n-1 (FIPS 186-5, 6.2); any other wrapped number loads nothing."""
    root = vcek_root(SECRET, Product.GENOA, rig.chip.reported_tcb)
    key = VlekKey(scalar=scalar, root=bytes(48), tcb=rig.chip.reported_tcb)
    stick = wrap(root, key, IV)
    if good:
        assert unwrap(root, stick) == key
    else:
        with pytest.raises(TagMismatch, match="out of range"):
            unwrap(root, stick)
    assert _load(rig, stick) == (S.SUCCESS if good else S.BAD_MEASUREMENT)


def test_the_wrapping_key_is_the_documented_one(rig: Rig) -> None:
    """The derivation that a provider has to repeat, step by step."""
    key, root = _vlek(rig), vcek_root(SECRET, Product.GENOA, rig.chip.reported_tcb)
    wrapping = hkdf_sha384(root, salt=b"swsnp/wrap/v1", info=b"vlek-wrap", length=32)
    plain = key.scalar.to_bytes(56, "little") + key.root + bytes(0x180 - 104)
    sealed, tag = seal_bytes(wrapping, IV, plain, key.tcb.to_bytes(8, "little") + bytes(8))
    stick = VlekHashstick.parse(wrap(root, key, IV))
    assert (stick.wrapped, stick.auth_tag) == (sealed, tag)
