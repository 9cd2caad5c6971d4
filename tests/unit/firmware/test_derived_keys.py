"""MSG_KEY_REQ: checks, their order, and what a derived key depends on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_launch import IdBlock
from swsnp.abi.snp_message import GuestFieldSelect, MessageType, MsgKeyReq, MsgKeyRsp, RootKeySelect
from swsnp.abi.snp_report import GuestPolicy, Product, TcbVersion
from swsnp.crypto.derive import hkdf_sha384
from swsnp.firmware.keys import vlek_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.firmware.conftest import MakeRig, Rig, RigGuest

    from swsnp.firmware.context import GuestContext

VCEK_DIS = 4
ABOVE = TcbVersion.encode(Product.GENOA, microcode=0x55)
BELOW = TcbVersion.encode(Product.GENOA, boot_loader=9, snp=0x16, microcode=0x53)


def _ask(
    rig: Rig,
    guest: RigGuest,
    *,
    root: int = 0,
    key_sel: int = 0,
    select: int = 0,
    vmpck: int = 0,
    **more: Any,
) -> MsgKeyRsp:
    flags = RootKeySelect(root | key_sel << 1)
    request = MsgKeyReq(flags=flags, guest_field_select=GuestFieldSelect(select)).but(**more)
    answer = rig.request(guest, bytes(request), MessageType.KEY_REQ, vmpck=vmpck)
    assert answer.status == S.SUCCESS
    return MsgKeyRsp.parse(answer.payload)


def _key(rig: Rig, guest: RigGuest, **request: Any) -> bytes:
    answer = _ask(rig, guest, **request)
    assert answer.status == S.SUCCESS
    assert any(answer.derived_key)
    return answer.derived_key


@pytest.mark.parametrize(
    ("setup", "request_fields", "status"),
    [
        ({}, {"flags": RootKeySelect(8)}, S.INVALID_PARAM),
        ({}, {"reserved_04": b"\0\0\0\1"}, S.INVALID_PARAM),
        ({"masked": True}, {}, S.INVALID_KEY),
        ({"masked": True, "vlek": True}, {"key_sel": 2}, S.INVALID_KEY),
        ({}, {"key_sel": 3}, S.INVALID_KEY),
        ({}, {"key_sel": 2}, S.INVALID_KEY),
        ({"flags": VCEK_DIS}, {}, S.INVALID_KEY),
        ({"flags": VCEK_DIS, "vlek": True}, {"key_sel": 1}, S.INVALID_KEY),
        ({}, {"vmpck": 1}, S.INVALID_PARAM),
        ({}, {"vmpl": 4}, S.INVALID_PARAM),
        ({}, {"select": 1 << 6}, S.INVALID_PARAM),
        ({}, {"select": 1 << 63}, S.INVALID_PARAM),
        ({}, {"select": 1 << 5, "tcb_version": ABOVE}, S.INVALID_PARAM),
        ({}, {"select": 1 << 5, "tcb_version": TcbVersion(1 << 24)}, S.INVALID_PARAM),
        ({}, {"select": 1 << 4, "guest_svn": 1}, S.INVALID_PARAM),
        # the order where two fail
        ({"masked": True}, {"reserved_04": b"\0\0\0\1"}, S.INVALID_PARAM),
        ({"masked": True}, {"vmpck": 1}, S.INVALID_KEY),
        ({}, {"key_sel": 3, "vmpck": 1}, S.INVALID_KEY),
        ({}, {"key_sel": 3, "select": 1 << 6}, S.INVALID_KEY),
    ],
)
def test_refusals(rig: Rig, setup: dict[str, Any], request_fields: dict[str, Any], status: S) -> None:
    """AMD 56860, MSG_KEY_REQ: checks and their order; the key is zero on error."""
    guest = rig.running(flags=setup.get("flags", 0))
    if setup.get("vlek"):
        rig.chip.load_vlek(vlek_key(bytes(32), Product.GENOA, "csp", rig.chip.reported_tcb))
    rig.chip.configure(mask_chip_key=setup.get("masked", False))
    assert _ask(rig, guest, **request_fields) == MsgKeyRsp(status=status)


@pytest.mark.parametrize(
    ("setup", "request_fields"),
    [
        ({"masked": True}, {"root": 1}),
        ({"flags": VCEK_DIS}, {"root": 1}),
        ({}, {"root": 1, "key_sel": 3}),
        ({}, {"root": 1, "key_sel": 2}),
        ({}, {"tcb_version": ABOVE}),  # not selected
        ({}, {"guest_svn": 5}),  # not selected
    ],
)
def test_what_does_not_matter(rig: Rig, setup: dict[str, Any], request_fields: dict[str, Any]) -> None:
    """AMD 56860: under the VM root key mask, VCEK_DIS, KEY_SEL do not count; unselected fields never do."""
    guest = rig.running(flags=setup.get("flags", 0))
    rig.chip.configure(mask_chip_key=setup.get("masked", False))
    _key(rig, guest, **request_fields)


def test_strict_vmpl_off(make_rig: MakeRig) -> None:
    """Firmware 1.55 does not test VMPL <= 3: a switch."""
    rig = make_rig(strict_vmpl=False)
    _key(rig, rig.running(), vmpl=9)


def test_the_documented_derivation(rig: Rig) -> None:
    """Derived keys: HKDF-SHA384 over the documented fields, unselected ones zero."""
    guest = rig.running()
    context = rig.context(guest)
    context.id_block_en, context.id_key_digest = True, b"k" * 48
    context.id_block = IdBlock(family_id=b"f" * 16, image_id=b"i" * 16, guest_svn=6)
    context.host_data = b"h" * 32
    tcb = BELOW.to_bytes(8, "little")
    root = hkdf_sha384(
        bytes(range(32)), salt=b"swsnp/chip/v1", info=b"vcek-root/Genoa" + tcb, length=48
    )  # fmt: skip

    def wanted(select: int) -> bytes:
        def chosen(bit: int, value: bytes) -> bytes:
            return value if select >> bit & 1 else bytes(len(value))

        info = (
            bytes(4)
            + b"\x01\0\0\0"
            + b"k" * 48
            + select.to_bytes(8, "little")
            + b"\x02\0\0\0"
            + b"h" * 32
            + chosen(0, (0x30000).to_bytes(8, "little"))
            + chosen(1, b"i" * 16)
            + chosen(2, b"f" * 16)
            + chosen(3, context.ld)
            + chosen(4, b"\x05\0\0\0")
            + chosen(5, tcb)
            + bytes(8)
        )
        return hkdf_sha384(root, salt=b"swsnp/key/v1", info=info, length=32)

    for select in (0x3F, 0x20, 0x21, 0x32):
        fields = {"select": select, "vmpl": 2, "guest_svn": 5, "tcb_version": BELOW}
        assert _key(rig, guest, **fields) == wanted(select)


CHANGES: list[tuple[str, int, Callable[[GuestContext], None]]] = [
    ("policy", 0, lambda c: setattr(c, "policy", GuestPolicy(0xB0000))),
    ("image id", 1, lambda c: setattr(c, "id_block", c.id_block.but(image_id=b"x" * 16))),
    ("family id", 2, lambda c: setattr(c, "id_block", c.id_block.but(family_id=b"x" * 16))),
    ("measurement", 3, lambda c: setattr(c, "ld", b"x" * 48)),
]


@pytest.mark.parametrize(("bit", "change"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_selected_fields_bind(rig: Rig, bit: int, change: Callable[[GuestContext], None]) -> None:
    """AMD 56860: a field matters exactly when its bit selects it; the selection itself matters too."""
    guest = rig.running()
    before = {select: _key(rig, guest, select=select) for select in (0, 1 << bit)}
    change(rig.context(guest))
    after = {select: _key(rig, guest, select=select) for select in (0, 1 << bit)}
    assert before[0] == after[0]
    assert len({before[0], before[1 << bit], after[1 << bit]}) == 3


@pytest.mark.parametrize(
    ("bit", "field", "values"), [(4, "guest_svn", (0, 3)), (5, "tcb_version", (0, BELOW))]
)
def test_requested_fields_bind(rig: Rig, bit: int, field: str, values: tuple[int, int]) -> None:
    """AMD 56860: GUEST_SVN and TCB_VERSION of the request count when selected."""
    guest = rig.running()
    rig.context(guest).id_block = IdBlock(guest_svn=3)
    tcbs = [{field: TcbVersion(value) if bit == 5 else value} for value in values]
    assert _key(rig, guest, **tcbs[0]) == _key(rig, guest, **tcbs[1])
    assert _key(rig, guest, select=1 << bit, **tcbs[0]) != _key(rig, guest, select=1 << bit, **tcbs[1])


@pytest.mark.parametrize(
    "change",
    [
        {"host_data": b"x" * 32},
        {"id_block_en": True},
        {"id_block_en": True, "id_key_digest": b"x" * 48},
        {"author_key_en": True},
        {"author_key_en": True, "author_key_digest": b"x" * 48},
    ],
    ids=str,
)
def test_what_always_binds(rig: Rig, change: dict[str, Any]) -> None:
    """AMD 56860: HOST_DATA, and which key of the ID block is bound with its digest, always count."""
    guest = rig.running()
    before = _key(rig, guest)
    for name, value in change.items():
        setattr(rig.context(guest), name, value)
    assert _key(rig, guest) != before


def test_vmpl_and_root_bind(rig: Rig) -> None:
    """AMD 56860: VMPL and ROOT_KEY_SELECT always count."""
    guest = rig.running()
    keys = {_key(rig, guest, vmpl=vmpl, root=root) for vmpl in range(4) for root in range(2)}
    assert len(keys) == 8


def test_keys_are_not_bound_to_the_guest_itself(make_rig: MakeRig) -> None:
    """AMD 56860: two guests with equal inputs get equal keys, on one chip; the VM root key is per guest."""
    rig, other_chip = make_rig(), make_rig(product=Product.MILAN)
    first, second = rig.running(1), rig.running(2)
    assert _key(rig, first, select=0xF) == _key(rig, second, select=0xF)
    assert _key(rig, first, root=1) != _key(rig, second, root=1)
    assert _key(rig, first) != _key(other_chip, other_chip.running())


def test_key_sel_does_not_enter(rig: Rig) -> None:
    """AMD 56860: KEY_SEL chooses the root only: 0 and 1 agree without VLEK, 0 and 2 with one."""
    guest = rig.running()
    vcek = _key(rig, guest, key_sel=1)
    assert _key(rig, guest, key_sel=0) == vcek
    rig.chip.load_vlek(vlek_key(bytes(32), Product.GENOA, "csp", rig.chip.reported_tcb))
    assert _key(rig, guest, key_sel=0) == _key(rig, guest, key_sel=2) != vcek
    assert _key(rig, guest, key_sel=1) == vcek


def test_the_root_follows_the_reported_tcb(rig: Rig) -> None:
    """AMD 56860: without TCB_VERSION selected the root is that of the reported TCB."""
    guest = rig.running()
    before, selected = _key(rig, guest), _key(rig, guest, select=1 << 5, tcb_version=BELOW)
    rig.chip.configure(reported_tcb=BELOW)
    assert _key(rig, guest) != before
    assert _key(rig, guest, select=1 << 5, tcb_version=BELOW) == selected
