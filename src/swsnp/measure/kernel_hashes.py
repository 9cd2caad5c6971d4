"""The hashes of kernel, initial RAM disk and command line, in the table that the firmware looks up.

Source: QEMU, target/i386/sev.c, and EDK II, OvmfPkg/AmdSev/BlobVerifierLibSevHashes.
"""

from __future__ import annotations

import struct
from hashlib import sha256

from swsnp.abi.ovmf import guid_bytes
from swsnp.abi.snp_page import PAGE
from swsnp.errors import LayoutError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

__all__ = ["NO_INITRD", "TABLE_SIZE", "KernelHashes"]

TABLE_SIZE: Final = 176
"""Header, three entries, and zeros up to a multiple of 16."""
NO_INITRD: Final = sha256(b"").digest()
_HEADER: Final = struct.Struct("<16sH")
_ENTRY: Final = struct.Struct("<16sH32s")
_TABLE: Final = guid_bytes("9438d6064f224cc9b479a793d411fd21")
_CMDLINE: Final = guid_bytes("97d02dd8bd204c94aa78e7714d36ab2a")
_INITRD: Final = guid_bytes("44baf7313a2f4bd79af141e29169781d")
_KERNEL: Final = guid_bytes("4de79437abd2427fb835d5b172d2045b")


class KernelHashes:
    """SHA-256 of the three; `append` is the command line as text.

    The kernel counts as its file is: for SEV guests QEMU leaves the setup header as it is. The command line
    counts with its final zero byte, also when it is empty; no initial RAM disk counts as an empty one.
    """

    __slots__ = ("cmdline", "initrd", "kernel")

    def __init__(self, kernel: bytes, initrd: bytes = NO_INITRD, append: bytes = b"") -> None:
        """Take the SHA-256 of kernel and initial RAM disk, 32 bytes each, and the command line itself."""
        for name, digest in (("kernel", kernel), ("initrd", initrd)):
            if len(digest) != 32:
                raise LayoutError(f"{name} hash: got {len(digest)} bytes, wanted 32 (SHA-256)")
        self.kernel, self.initrd, self.cmdline = kernel, initrd, sha256(append + b"\0").digest()

    def table(self) -> bytes:
        """The table, 176 bytes."""
        entries = ((_CMDLINE, self.cmdline), (_INITRD, self.initrd), (_KERNEL, self.kernel))
        body = b"".join(_ENTRY.pack(guid, _ENTRY.size, digest) for guid, digest in entries)
        return (_HEADER.pack(_TABLE, _HEADER.size + len(body)) + body).ljust(TABLE_SIZE, b"\0")

    def page(self, gpa: int) -> bytes:
        """The page that holds the table at `gpa`: 4096 bytes, zero elsewhere.

        Raises:
            LayoutError: the table would leave its page.
        """
        offset = gpa % PAGE
        if offset + TABLE_SIZE > PAGE:
            raise LayoutError(
                f"hash table base: got {gpa:#x}, wanted {TABLE_SIZE} bytes before the page's end (EDK II)"
            )
        return (bytes(offset) + self.table()).ljust(PAGE, b"\0")
