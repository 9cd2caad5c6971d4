"""The certificate file while an operator renames, truncates, locks and removes it, and guests ask."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from tests.property.steps import CountedMachine, machine_test

from swsnp.certs.ofd_lock import try_lock
from swsnp.hardware import BusError
from swsnp.trace import Trace
from swsnp.vmm.certs import Blob, BlobFile, CertificateService, Failed, Retry, TooLarge
from swsnp.vmm.dialect import COCO_V1, REQ_CERTS

if TYPE_CHECKING:
    from swsnp.vmm.certs import Acquired

TIMEOUT_S = 0.004  # four attempts and the last one
ROOM = 0x3000
MEMORY = 0x6000
contents = st.builds(
    lambda byte, size: bytes([byte]) * size,
    st.integers(1, 255),
    st.sampled_from([0, 1, 24, 4095, 4096, 4097, ROOM, ROOM + 1]),
)
EVENTS = ["replace", "rewrite", "truncate", "unlink", "folder", "fifo", "link", "lock", "unlock", "share"]
events = st.tuples(st.sampled_from(EVENTS), contents)


class Ram:
    """Guest memory that ends."""

    def __init__(self) -> None:
        self.bytes = bytearray(MEMORY)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        if gpa + len(data) > MEMORY:
            raise BusError(f"gpa {gpa:#x}")
        self.bytes[gpa : gpa + len(data)] = data


def _open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class CertificateFileMachine(CountedMachine):
    """Every request gets the file of one moment, whole; a held blob keeps updaters out until its release."""

    @initialize(data=contents)
    def operator_provisions(self, data: bytes) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "certs.blob"
        self.descriptors = _open_descriptors()
        self.path.write_bytes(data)
        self.now = 0.0
        self.during: list[tuple[str, bytes]] = []  # what happens while a request waits
        self.kind, self.data = "file", data  # what the path names
        self.lock: int | None = None  # an updater's descriptor
        self.lock_is_on_path = False
        self.files = 0  # how often the path came to name another file
        self.held: list[tuple[Blob, int]] = []  # and which of those files it is of
        self.source = BlobFile(self.path, timeout_s=TIMEOUT_S, sleep=self.sleep, monotonic=lambda: self.now)

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "folder"):
            for blob, _ in self.held:
                blob.release()
            self.drop_lock()
            shutil.rmtree(self.folder)
            assert _open_descriptors() == self.descriptors

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.during:
            self.happens(*self.during.pop(0))

    # what operators do

    def drop_lock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
        self.lock, self.lock_is_on_path = None, False

    def names(self, kind: str, data: bytes = b"") -> None:
        """The path names something else now."""
        self.kind, self.data = kind, data
        self.lock_is_on_path = False
        self.files += 1

    def remove(self) -> None:
        if self.path.is_dir() and not self.path.is_symlink():
            self.path.rmdir()
        elif self.kind != "nothing":
            self.path.unlink()

    def happens(self, event: str, data: bytes) -> None:
        """An event that nobody coordinates with, except that a lock is taken only where it is free."""
        match event:
            case "replace":
                if self.kind == "folder":
                    self.remove()
                new = self.folder / "new"
                new.write_bytes(data)
                new.replace(self.path)
                self.names("file", data)
            case "rewrite" | "truncate" if self.kind == "file":
                data = data if event == "rewrite" else self.data[: len(data)]
                self.path.write_bytes(data)
                self.data = data
            case "unlink":
                self.remove()
                self.names("nothing")
            case "folder" | "fifo" | "link":
                self.remove()
                if event == "folder":
                    self.path.mkdir()
                elif event == "fifo":
                    os.mkfifo(self.path)
                else:
                    target = self.folder / "target"
                    if target.exists():
                        target.unlink()
                    target.write_bytes(data)
                    self.path.symlink_to(target)
                self.names("file" if event == "link" else event, data if event == "link" else b"")
            case "lock" if self.kind == "file" and self.lock is None:
                fd = os.open(self.path, os.O_RDWR)
                taken = try_lock(fd, fcntl.F_WRLCK)
                held = any(file == self.files for _, file in self.held)
                assert taken == (not held), "an updater's lock beside a held blob"
                if taken:
                    self.lock, self.lock_is_on_path = fd, True
                else:
                    os.close(fd)
            case "unlock":
                self.drop_lock()
            case "share" if self.kind == "file":
                fd = os.open(self.path, os.O_RDONLY)
                assert try_lock(fd, fcntl.F_RDLCK) == (not self.lock_is_on_path)
                os.close(fd)

    @rule(event=events)
    def operator(self, event: tuple[str, bytes]) -> None:
        self.happens(*event)

    # what guests do

    def attempt(self, room: int) -> type[Acquired]:
        """What one look at the file must find."""
        if self.kind != "file":
            return Failed
        if self.lock_is_on_path:
            return Retry
        return TooLarge if len(self.data) > room else Blob

    def check(self, found: Acquired, room: int, waited: bool) -> None:
        assert type(found) is self.attempt(room)
        if isinstance(found, Blob):
            assert found.data == self.data
        elif isinstance(found, TooLarge):
            assert found.size == len(self.data)
        assert isinstance(found, Retry) <= waited

    @rule(
        room=st.sampled_from([0, 1, 4096, ROOM, ROOM, ROOM]),
        least=st.sampled_from([0.0, 0.0, 0.01]),
        during=st.lists(events, max_size=3),
        hold=st.booleans(),
    )
    def guest_asks(self, room: int, least: float, during: list[tuple[str, bytes]], hold: bool) -> None:
        """Events during the wait are seen; a request ends by its deadline, and not before with Retry."""
        self.during, start = list(during), self.now
        found = self.source.acquire(room, least_wait_s=least)
        wait = self.now - start
        limit = max(TIMEOUT_S, least)
        self.during.clear()
        assert wait <= limit + 1e-9
        self.check(found, room, waited=wait >= limit - 1e-9)
        if isinstance(found, Blob):
            if hold and len(self.held) < 3:
                self.held.append((found, self.files))
            else:
                found.release()

    @rule()
    def a_request_ends(self) -> None:
        if self.held:
            self.held.pop()[0].release()

    @rule(
        dialect=st.sampled_from([COCO_V1, REQ_CERTS]),
        npages=st.sampled_from([0, 1, 2, 3, 4]),
        gpa=st.sampled_from([0, 0x1000, 0x5000, 0x7000]),
        during=st.lists(events, max_size=2),
    )
    def vmm_answers_an_exit(
        self, dialect: object, npages: int, gpa: int, during: list[tuple[str, bytes]]
    ) -> None:
        """`ret` says what happened in the kernel's dialect; guest memory changes with ret 0 only."""
        assert dialect in (COCO_V1, REQ_CERTS)
        v1 = dialect is COCO_V1
        speaks = COCO_V1 if v1 else REQ_CERTS
        run, ram = memoryview(bytearray(4096)), Ram()
        run[speaks.address_at : speaks.address_at + 8] = (gpa >> speaks.address_shift).to_bytes(8, "little")
        width = 4 if v1 else 8
        run[speaks.npages_at : speaks.npages_at + width] = npages.to_bytes(width, "little")
        service = CertificateService(self.source, speaks, ram, vm="vm", trace=Trace())  # type: ignore[arg-type]
        self.during = list(during)
        blob = service.answer(run, 0)
        self.during.clear()
        ret = int.from_bytes(run[speaks.ret_at : speaks.ret_at + width], "little")
        told = int.from_bytes(run[speaks.npages_at : speaks.npages_at + width], "little")
        outcome = self.attempt(npages << 12)
        outside = outcome is Blob and gpa + len(self.data) > MEMORY
        if outcome is Blob and not outside:
            assert blob is not None
            assert ret == 0
            assert bytes(ram.bytes[gpa : gpa + len(self.data)]) == self.data
            assert not any(ram.bytes[:gpa])
            assert not any(ram.bytes[gpa + len(self.data) :])
            blob.release()
            return
        assert blob is None
        assert not any(ram.bytes)
        failure = 1 << 31 if v1 else errno.EIO
        if outcome is TooLarge:
            assert (ret, told) == (1 if v1 else errno.ENOSPC, -(-len(self.data) // 4096))
        elif outcome is Retry:
            assert ret == (failure if v1 else errno.EAGAIN)
        else:
            assert ret == failure

    # always

    @invariant()
    def blobs_do_not_change_in_hand(self) -> None:
        """A copy is handed out, so not even an updater without lock changes it; and no descriptor is lost."""
        expected = self.descriptors + len(self.held) + (self.lock is not None)
        assert _open_descriptors() == expected


TestCertificateFile = machine_test(CertificateFileMachine, steps=8_000)
