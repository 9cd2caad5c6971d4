"""The attestation report and what it is made of. Source: AMD 56860, chapter 7.3; 57230 for products."""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Final

from swsnp.abi.record import Record, Word, bits, blob, mbz, record, u8, u32, u64
from swsnp.errors import LayoutError

__all__ = [
    "AttestationReport",
    "CHIP_ID_MARKER",
    "GuestPolicy",
    "PlatformInfo",
    "Product",
    "REPORT_SIZE",
    "SIGNATURE_OFFSET",
    "SIGNED_SIZE",
    "SignatureAlgo",
    "SignerInfo",
    "SigningKey",
    "TcbComponents",
    "TcbVersion",
    "product_of_cpu",
]

REPORT_SIZE: Final = 0x4A0
SIGNED_SIZE: Final = 0x2A0
SIGNATURE_OFFSET: Final = 0x2A0
CHIP_ID_MARKER: Final = b"SWSN"
"""First bytes of every chip id that this project makes, so that no emulated report passes for a chip's."""


class Product(Enum):
    """A product line, by its name in AMD's key service."""

    MILAN = "Milan"
    GENOA = "Genoa"
    TURIN = "Turin"

    __hash__ = object.__hash__  # a member is equal to itself alone; Enum's own hashes the name, in Python

    @property
    def is_fam_1a(self) -> bool:
        """Whether TCB_VERSION has the layout of family 1Ah (FMC first)."""
        return self is Product.TURIN

    @property
    def hwid_size(self) -> int:
        """Bytes of the chip id that identify the chip; the rest of the 64 are zero."""
        return 8 if self.is_fam_1a else 64


def product_of_cpu(family: int, model: int) -> Product | None:
    """The product line of a combined CPUID family and model; None when no certificates are known for it."""
    if family == 0x19:
        if model <= 0x0F:
            return Product.MILAN
        if 0x10 <= model <= 0x1F or 0xA0 <= model <= 0xAF:
            return Product.GENOA
    if family == 0x1A and model <= 0x11:
        return Product.TURIN
    return None


class TcbComponents(dict[str, int]):
    """Component name to security patch level, in the product's order. Compare per component only."""

    def at_most(self, other: TcbComponents) -> bool:
        """Whether no component exceeds `other`'s."""
        return all(level <= other[name] for name, level in self.items())


_MILAN_BYTES: Final = {"boot_loader": 0, "tee": 1, "snp": 6, "microcode": 7}
_TURIN_BYTES: Final = {"fmc": 0, "boot_loader": 1, "tee": 2, "snp": 3, "microcode": 7}


class TcbVersion(Word):
    """TCB_VERSION, 8 bytes. Which byte is which depends on the product, which the bytes do not say."""

    @staticmethod
    def byte_order(product: Product) -> dict[str, int]:
        """Component name to byte number."""
        return _TURIN_BYTES if product.is_fam_1a else _MILAN_BYTES

    def decode(self, product: Product) -> TcbComponents:
        """The components in the product's layout."""
        raw = self.to_bytes(8, "little")
        return TcbComponents({name: raw[at] for name, at in self.byte_order(product).items()})

    @classmethod
    def encode(cls, product: Product, **components: int) -> TcbVersion:
        """Build from components; those left out are zero.

        Raises:
            LayoutError: a component that the product does not have, or above 255.
        """
        raw = bytearray(8)
        order = cls.byte_order(product)
        for name, level in components.items():
            if name not in order or not 0 <= level <= 255:
                raise LayoutError(
                    f"TCB_VERSION.{name}: got {level}, wanted one of {', '.join(order)} at 0..255 "
                    f"({product.value}, AMD 56860)"
                )
            raw[order[name]] = level
        return cls.from_bytes(raw, "little")

    def reserved(self, product: Product) -> bytes:
        """The bytes that the product's layout keeps zero."""
        used = set(self.byte_order(product).values())
        return bytes(value for at, value in enumerate(self.to_bytes(8, "little")) if at not in used)


class GuestPolicy(Word):
    """POLICY: what the guest owner allows and demands. AMD 56860, guest policy."""

    abi_minor = bits(7, 0)
    abi_major = bits(15, 8)
    smt = bits(16, 16)
    reserved_one = bits(17, 17)
    migrate_ma = bits(18, 18)
    debug = bits(19, 19)
    single_socket = bits(20, 20)
    cxl_allow = bits(21, 21)
    mem_aes_256_xts = bits(22, 22)
    rapl_dis = bits(23, 23)
    ciphertext_hiding_dram = bits(24, 24)
    page_swap_disable = bits(25, 25)


class PlatformInfo(Word):
    """PLATFORM_INFO of the report."""

    smt_en = bits(0, 0)
    tsme_en = bits(1, 1)
    ecc_en = bits(2, 2)
    rapl_dis = bits(3, 3)
    ciphertext_hiding_dram_en = bits(4, 4)
    alias_check_complete = bits(5, 5)
    tio_en = bits(7, 7)


class SigningKey(IntEnum):
    """SIGNING_KEY: which key signed."""

    VCEK = 0
    VLEK = 1
    NONE = 7


class SignatureAlgo(IntEnum):
    """SIGNATURE_ALGO."""

    ECDSA_P384_SHA384 = 1


class SignerInfo(Word):
    """Dword 48h of the report."""

    author_key_en = bits(0, 0)
    mask_chip_key = bits(1, 1)
    signing_key = bits(4, 2)


@record(size=REPORT_SIZE, source="AMD 56860, ATTESTATION_REPORT")
class AttestationReport(Record):
    """The report, all versions: fields of version 3 or 5 are zero before. Signed: bytes 0..29Fh."""

    version: int = u32(0x000)
    guest_svn: int = u32(0x004)
    policy: GuestPolicy = u64(0x008, GuestPolicy)
    family_id: bytes = blob(0x010, 16)
    image_id: bytes = blob(0x020, 16)
    vmpl: int = u32(0x030)
    signature_algo: int = u32(0x034)
    current_tcb: TcbVersion = u64(0x038, TcbVersion)
    platform_info: PlatformInfo = u64(0x040, PlatformInfo)
    signer_info: SignerInfo = u32(0x048, SignerInfo)
    reserved_4c: bytes = mbz(0x04C, 4)
    report_data: bytes = blob(0x050, 64)
    measurement: bytes = blob(0x090, 48)
    host_data: bytes = blob(0x0C0, 32)
    id_key_digest: bytes = blob(0x0E0, 48)
    author_key_digest: bytes = blob(0x110, 48)
    report_id: bytes = blob(0x140, 32)
    report_id_ma: bytes = blob(0x160, 32)
    reported_tcb: TcbVersion = u64(0x180, TcbVersion)
    cpuid_fam_id: int = u8(0x188)
    cpuid_mod_id: int = u8(0x189)
    cpuid_step: int = u8(0x18A)
    reserved_18b: bytes = mbz(0x18B, 21)
    chip_id: bytes = blob(0x1A0, 64)
    committed_tcb: TcbVersion = u64(0x1E0, TcbVersion)
    current_build: int = u8(0x1E8)
    current_minor: int = u8(0x1E9)
    current_major: int = u8(0x1EA)
    reserved_1eb: int = u8(0x1EB)
    committed_build: int = u8(0x1EC)
    committed_minor: int = u8(0x1ED)
    committed_major: int = u8(0x1EE)
    reserved_1ef: int = u8(0x1EF)
    launch_tcb: TcbVersion = u64(0x1F0, TcbVersion)
    launch_mit_vector: int = u64(0x1F8)
    current_mit_vector: int = u64(0x200)
    reserved_208: bytes = mbz(0x208, 152)
    signature_r: bytes = blob(0x2A0, 72)
    signature_s: bytes = blob(0x2E8, 72)
    reserved_330: bytes = mbz(0x330, 368)
