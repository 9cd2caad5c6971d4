"""A disk that forgets: what a guest writes stays in this process, and the file is as it was.

Source: the manual page qemu(1), `-snapshot`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swsnp.vmm.devices.block import Disk

__all__ = ["Snapshot"]

_BLOCK: Final = 4096


class Snapshot:
    """As `block.Disk`, over one that is only read; memory is needed for what was written.

    Args:
        disk: what is there at first; OSError of its `read` goes through.
    """

    read_only: Final = False

    def __init__(self, disk: Disk) -> None:
        self.size: Final = disk.size
        self._disk = disk
        self._written: dict[int, bytearray] = {}

    def read(self, at: int, size: int) -> bytes:
        """What was written last, else what is on the disk."""
        data = bytearray(self._disk.read(at, size))
        for number, start, end in self._blocks(at, size):
            if (block := self._written.get(number)) is not None:
                first = number * _BLOCK
                data[start - at : end - at] = block[start - first : end - first]
        return bytes(data)

    def write(self, at: int, data: bytes | memoryview) -> None:
        """Keep it."""
        for number, start, end in self._blocks(at, len(data)):
            first = number * _BLOCK
            block = self._written.get(number)
            if block is None:
                block = bytearray(self._disk.read(first, min(_BLOCK, self.size - first)))
                self._written[number] = block
            block[start - first : end - first] = data[start - at : end - at]

    def flush(self) -> None:
        """Nothing of it shall stay."""

    @staticmethod
    def _blocks(at: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Number of each block that a range touches, with the part of the range in it."""
        end = at + size
        for number in range(at // _BLOCK, -(-end // _BLOCK)):
            yield number, max(at, number * _BLOCK), min(end, (number + 1) * _BLOCK)
