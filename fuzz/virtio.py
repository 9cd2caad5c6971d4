"""Chains that a driver offers a device, at places that are the device's to use and at others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swsnp.abi.virtio import VirtqDescriptor

if TYPE_CHECKING:
    from swsnp.testing.virtio_driver import VirtioDriver

__all__ = ["offer"]


def offer(driver: VirtioDriver, at: int, said: bytes, room: int) -> None:
    """One chain: bytes for the device, written where they fit before private memory, and room for its own."""
    memory = driver.memory
    if at + len(said) <= memory.private.start:
        memory.raw[at : at + len(said)] = said
    driver.describe(0, VirtqDescriptor(addr=at, len=len(said), flags=1 if room else 0, next=1))
    driver.describe(1, VirtqDescriptor(addr=at, len=room, flags=2))
    driver.offer(0 if said else 1)
