"""Debian's virtiofsd behind our registers: it takes what we say of the protocol, and serves a folder's files.

Source: <linux/fuse.h>, FUSE 7.31.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final

import pytest
from tests.real_guest.place import BUILD
from tests.real_guest.virtiofsd import Virtiofsd, virtiofsd_program
from tests.unit.devices.vhost_backend import PassableDriverMemory, until

from swsnp.errors import SwsnpError
from swsnp.testing.virtio_driver import VirtioDriver
from swsnp.vmm.devices.vhost_fs import VhostFs
from swsnp.vmm.devices.vhost_mmio import VhostMmio
from swsnp.vmm.devices.vhost_user import VhostUser, connect_to_daemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Skip

LOOKUP, OPEN, READ, INIT = 1, 14, 15, 26
IN_HEADER: Final = struct.Struct("<IIQQIIII")  # len, opcode, unique, nodeid, uid, gid, pid, padding
OUT_HEADER: Final = struct.Struct("<IiQ")  # len, error, unique
ROOT_NODE: Final = 1
TEXT: Final = b"from the host\n"


@pytest.fixture
def daemon(tmp_path: Path, cannot_run: Skip) -> Iterator[VhostUser]:
    """Connected, over a folder with the file `hello`."""
    program = virtiofsd_program(BUILD)
    if program is None:
        cannot_run("no virtiofsd", "tools/real-guest-files build/real-guest")
    folder, log = tmp_path / "folder", tmp_path / "log"
    folder.mkdir()
    (folder / "hello").write_bytes(TEXT)
    with log.open("wb") as file, Virtiofsd(program, tmp_path / "s", folder, file):
        try:
            connection = connect_to_daemon(tmp_path / "s")
        except SwsnpError:  # it has ended: some containers let nobody isolate himself
            reason = f"virtiofsd ended: {log.read_text()}"
            cannot_run(reason, "run as root, or allow user namespaces", avoidable=False)
        with connection:
            yield connection


class Files:
    """Speaks FUSE through a device's queue for requests."""

    def __init__(self, daemon: VhostUser) -> None:
        self.levels: list[bool] = []
        self.memory = PassableDriverMemory()
        self.device = VhostMmio(VhostFs(b"t", daemon, queue_size=128), self.memory, self.levels.append)
        self.driver = VirtioDriver(self.device, self.memory, queue=1)
        self.start()

    def start(self) -> None:
        """From a reset on, as a kernel does."""
        self.driver.start(others=[VirtioDriver(self.device, self.memory)])
        init = struct.pack("<IIII", 7, 31, 65536, 0) + bytes(48)
        major, minor = struct.unpack_from("<II", self.ask(INIT, 0, init))
        assert major == 7
        assert minor >= 31

    def ask(self, opcode: int, node: int, body: bytes) -> bytes:
        """One request: what its answer says behind the header."""
        header = IN_HEADER.pack(IN_HEADER.size + len(body), opcode, 9, node, os.geteuid(), os.getegid(), 0, 0)
        ((at, _),) = self.driver.chain([header + body], [4096])
        before = self.driver.used()[0]
        self.driver.offer(0)
        until(lambda: self.driver.used()[0] != before)
        raw = bytes(self.memory.raw[at : at + 4096])
        size, error, unique = OUT_HEADER.unpack_from(raw)
        assert (error, unique) == (0, 9)
        return raw[OUT_HEADER.size : size]

    def close(self) -> None:
        self.device.stop()
        os.close(self.memory.fd)


def hello_of(files: Files) -> bytes:
    """The file's bytes."""
    (node,) = struct.unpack_from("<Q", files.ask(LOOKUP, ROOT_NODE, b"hello\0"))
    (handle,) = struct.unpack_from("<Q", files.ask(OPEN, node, struct.pack("<II", os.O_RDONLY, 0)))
    return files.ask(READ, node, struct.pack("<QQIIQII", handle, 0, 100, 0, 0, 0, 0))


def test_file(daemon: VhostUser) -> None:
    """A file of the host's, by requests in memory that was passed; its answers come with an interrupt."""
    files = Files(daemon)
    assert hello_of(files) == TEXT
    until(lambda: files.levels == [True])
    files.close()


def test_driver_that_resets(daemon: VhostUser) -> None:
    """The daemon gives the queues back in time, and serves another driver."""
    files = Files(daemon)
    hello_of(files)
    files.start()
    assert hello_of(files) == TEXT
    files.close()


def test_guest_that_resets(daemon: VhostUser) -> None:
    """Another guest has other memory, and the same daemon."""
    Files(daemon).close()
    files = Files(daemon)
    assert hello_of(files) == TEXT
    files.close()
