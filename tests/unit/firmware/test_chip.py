"""The part: identity, keys, variables; and that a seed repeats everything."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_message import MessageType, MsgKeyReq, MsgReportReq
from swsnp.abi.snp_report import Product, TcbVersion
from swsnp.crypto.derive import hkdf_sha384, p384_scalar
from swsnp.crypto.ecdsa import SigningKey
from swsnp.errors import LayoutError, UsageError
from swsnp.firmware import keys
from swsnp.firmware.chip import ApiVersion, Chip, preset
from swsnp.firmware.settings import fms_eax

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import MakeRig

SECRET = bytes(range(32))


@pytest.mark.parametrize("product", list(Product))
def test_documented_derivations(product: Product) -> None:
    """Key derivations: salt, info and length of every output."""
    tcb = preset(product).committed_tcb
    raw, name = tcb.to_bytes(8, "little"), product.value.encode()

    def chip(info: bytes, length: int) -> bytes:
        return hkdf_sha384(SECRET, salt=b"swsnp/chip/v1", info=info, length=length)

    def provider(info: bytes, length: int) -> bytes:
        return hkdf_sha384(SECRET, salt=b"swsnp/csp/v1", info=info, length=length)

    assert keys.vcek_scalar(SECRET, product, tcb) == p384_scalar(chip(b"vcek/" + name + raw, 56))
    assert keys.vcek_root(SECRET, product, tcb) == chip(b"vcek-root/" + name + raw, 48)
    vlek = keys.vlek_key(SECRET, product, "csp.example", tcb)
    assert vlek.scalar == p384_scalar(provider(b"vlek/" + name + b"/csp.example" + raw, 56))
    assert vlek.root == provider(b"vlek-root/" + name + b"/csp.example" + raw, 48)
    assert keys.vlek_root(SECRET, product, "csp.example", tcb) == vlek.root
    size = 8 if product is Product.TURIN else 64
    wanted = b"SWSN" + chip(b"chip-id", size)[4:]
    assert keys.chip_id(SECRET, product) == wanted.ljust(64, b"\0")


@pytest.mark.parametrize("size", [0, 16, 31, 33, 48])
def test_secrets_have_32_bytes(size: int) -> None:
    """Chip and provider secrets are 32 bytes."""
    with pytest.raises(LayoutError, match="chip secret"):
        Chip(product=Product.MILAN, secret=bytes(size))
    with pytest.raises(LayoutError, match="provider secret"):
        keys.vlek_scalar(bytes(size), Product.MILAN, "csp", TcbVersion(0))


def test_keys_differ_by_chip_product_and_tcb() -> None:
    """AMD 57230: a VCEK depends on the chip and on every component of the TCB; a VLEK not on the chip."""
    tcb = TcbVersion.encode(Product.MILAN, boot_loader=1, tee=1, snp=1, microcode=1)
    tcbs = [tcb] + [tcb & ~(0xFF << 8 * byte) for byte in (0, 1, 6, 7)]
    scalars = {keys.vcek_scalar(SECRET, Product.MILAN, TcbVersion(each)) for each in tcbs}
    scalars.add(keys.vcek_scalar(bytes(32), Product.MILAN, tcb))
    scalars.add(keys.vcek_scalar(SECRET, Product.GENOA, tcb))
    scalars.add(keys.vlek_scalar(SECRET, Product.MILAN, "a", tcb))
    scalars.add(keys.vlek_scalar(SECRET, Product.MILAN, "b", tcb))
    assert len(scalars) == 9


@pytest.mark.parametrize("product", list(Product))
def test_vcek_up_to_the_committed_tcb(product: Product) -> None:
    """AMD 57230: a firmware derives the VCEK of every TCB up to its committed one, never of a newer one."""
    chip = Chip(product=product, secret=SECRET)
    committed = chip.variables.committed_tcb
    zero = TcbVersion(0)
    for tcb in (committed, zero):
        scalar = keys.vcek_scalar(SECRET, product, tcb)
        assert chip.vcek_public_point(tcb) == SigningKey.from_scalar(scalar).public_point
        assert chip.vcek(tcb) is chip.vcek(tcb)
        assert chip.vcek_root(tcb) == keys.vcek_root(SECRET, product, tcb)
    for name, byte in TcbVersion.byte_order(product).items():
        level = committed.decode(product)[name]
        newer = TcbVersion(level + 1 << 8 * byte)
        with pytest.raises(UsageError, match="committed"):
            chip.vcek(newer)
        with pytest.raises(UsageError, match="committed"):
            chip.vcek_root(newer)
    reserved = TcbVersion(1 << 40)
    assert not chip.may_derive(reserved)


def test_updates_do_not_roll_back() -> None:
    """AMD 56860: firmware below the committed one is refused."""
    chip = Chip(product=Product.TURIN, secret=SECRET)
    older = TcbVersion.encode(Product.TURIN, fmc=1, boot_loader=1, tee=1, snp=3, microcode=0xFF)
    with pytest.raises(UsageError, match="committed"):
        chip.update(current_tcb=older, current_version=ApiVersion(major=1, minor=55, build=1))


def test_vlek_serves_the_tcb_it_was_issued_for() -> None:
    """AMD 56860, SNP_VLEK_LOAD: the TCB of the VLEK is the reported one exactly."""
    chip = Chip(product=Product.MILAN, secret=SECRET)
    other = TcbVersion.encode(Product.MILAN, boot_loader=4, snp=0x17, microcode=0xDB)
    with pytest.raises(UsageError, match="REPORTED_TCB"):
        chip.load_vlek(keys.vlek_key(SECRET, Product.MILAN, "csp", other))
    assert chip.variables.vlek is None
    chip.configure(reported_tcb=other)
    chip.load_vlek(keys.vlek_key(SECRET, Product.MILAN, "csp", other))
    assert chip.variables.vlek is not None


def test_nothing_secret_in_a_repr() -> None:
    """Secrets are never in a repr."""
    chip = Chip(product=Product.MILAN, secret=SECRET)
    vlek = keys.vlek_key(SECRET, Product.MILAN, "csp", chip.reported_tcb)
    chip.load_vlek(vlek)
    for text in (repr(chip), repr(vlek), repr(chip.variables)):
        assert SECRET.hex() not in text
        assert str(vlek.scalar) not in text
        assert repr(vlek.root) not in text


def test_an_impossible_engine_is_refused_at_once() -> None:
    """A chip that could not sign is not made."""
    with pytest.raises(UsageError, match="deterministic"):
        Chip(product=Product.MILAN, secret=SECRET, deterministic=True, engine="awscrt")


@pytest.mark.parametrize(
    ("product", "eax"), [(Product.MILAN, 0xA00F11), (Product.GENOA, 0xA10F11), (Product.TURIN, 0xB00F21)]
)
def test_fms(product: Product, eax: int) -> None:
    """AMD 24594: family from 0Fh on in the extended field, model in two nibbles."""
    assert fms_eax(preset(product)) == eax


def _transcript(make_rig: MakeRig, seed: bytes) -> str:
    rig = make_rig(seed=seed, product=Product.TURIN)
    digest = hashlib.sha256()
    for asid in (1, 2):
        guest = rig.running(asid)
        for _ in range(2):
            digest.update(rig.request(guest, bytes(MsgReportReq(report_data=b"d" * 64))).page)
            digest.update(rig.request(guest, bytes(MsgKeyReq()), MessageType.KEY_REQ).page)
    return digest.hexdigest()


def test_a_seed_repeats_every_byte(make_rig: MakeRig) -> None:
    """Seeded entropy, deterministic signatures: message bytes, report id, keys, signatures are equal."""
    first = _transcript(make_rig, b"one")
    assert first == _transcript(make_rig, b"one")
    assert first != _transcript(make_rig, b"two")


def test_a_seed_repeats_in_another_process() -> None:
    """The keys and signatures of a seeded chip do not depend on the process (hash seeds, addresses)."""
    program = (
        "from swsnp.abi.snp_report import Product\n"
        "from swsnp.crypto.derive import SeededEntropy\n"
        "from swsnp.firmware.chip import Chip\n"
        "entropy = SeededEntropy(b'seed').child('firmware')\n"
        "chip = Chip(product=Product.GENOA, secret=bytes(32), entropy=entropy, deterministic=True)\n"
        "print(chip.entropy(32).hex(), chip.chip_id.hex(), chip.vcek(chip.reported_tcb).sign(b'x').hex())\n"
    )
    outputs: list[Any] = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
        for _ in range(2)
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0].split()) == 3
