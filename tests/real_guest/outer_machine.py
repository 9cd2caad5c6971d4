"""An outer machine: QEMU emulates a processor that virtualizes, so its Linux has a KVM that can run Linux.

For hosts whose own KVM is missing or cannot. The machine's root is this host's, read-only with a layer over
it that goes away: the same Python, the same sources at the same paths. `/run/job` is one of the host's
folders and can be written.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from swsnp.errors import HostError
from swsnp.vmm.cpio import device, directory, pack_cpio, program
from swsnp.vmm.kernel_modules import find_modules

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MachineLostError", "OuterMachine"]

_INIT: Final = Path(__file__).with_name("outer_init.sh")
_FOLDERS: Final = ("bin", "dev", "host", "layer", "modules", "new", "proc", "sys")
_MODULES: Final = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "kvm_amd")
_CPU: Final = "EPYC-Milan,+svm,+npt"
_COMMAND_LINE: Final = (
    "console=ttyS0 quiet loglevel=3 mitigations=off tsc=reliable random.trust_cpu=on "
    "panic=-1 oops=panic nowatchdog"
)
"""No time for what an emulated processor cannot suffer from; the counter is as steady as QEMU's clock.

A kernel that has once gone astray ends at once.
"""
_SILENT_S: Final = 90
_SILENT_OWN_S: Final = 60
"""Without a sign of life: by the clock, and of that without waiting for a processor that has other work."""


class MachineLostError(HostError):
    """The outer machine died, or hangs: nothing that ran in it is to blame, and another may be started."""


@dataclass(frozen=True, kw_only=True)
class OuterMachine:
    """How to build and start it. `memory` in QEMU's notation.

    Attributes:
        kernel: an unpacked Debian kernel package; its modules must know 9p (the cloud kernels do not).
        busybox: a static busybox.
        qemu: the program; None takes the installed one. tools/real-guest-files says which are too old.
    """

    kernel: Path
    busybox: Path
    qemu: Path | None = None
    cpus: int = 1
    memory: str = "2G"

    def run(self, job: Path, script: str, *, timeout_s: float) -> int:
        """Run a shell script as root; what it prints appears on the standard output as it comes.

        The folder `job` is `/run/job` inside; the caller's standard output is the machine's serial port.
        Several may run at once with the same folder: what a machine needs itself is in a folder of its own.

        Returns:
            The script's exit status.

        Raises:
            HostError: no QEMU; or the machine took too long.
            MachineLostError: the machine ended without a status, or gives no sign of life.
        """
        qemu = shutil.which(self.qemu or "qemu-system-x86_64")
        if qemu is None:
            raise HostError("the outer machine needs qemu-system-x86_64; remedy: install qemu-system-x86")
        mine = Path(tempfile.mkdtemp(prefix="machine-", dir=job))
        (mine / "initramfs").write_bytes(self._initramfs())
        (mine / "job.sh").write_text(script)
        with (mine / "qemu.log").open("w") as log:
            command = [qemu, *self._arguments(job, mine)]
            with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log) as process:
                try:
                    _wait(process, mine, timeout_s)
                finally:
                    process.kill()
        status = mine / "status"
        if not status.exists():
            raise MachineLostError(f"it died; its last words are above and in {mine / 'qemu.log'}")
        return int(status.read_text())

    def _arguments(self, job: Path, mine: Path) -> Iterator[str]:
        (kernel,) = self.kernel.glob("boot/vmlinuz-*")
        yield from ("-accel", "tcg,thread=multi", "-cpu", _CPU, "-smp", str(self.cpus), "-m", self.memory)
        yield from ("-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio")
        yield from ("-kernel", str(kernel), "-initrd", str(mine / "initramfs"))
        yield from ("-append", f"{_COMMAND_LINE} mine={mine.name}")
        local = "local,security_model=none"
        yield from ("-virtfs", f"{local},path=/,mount_tag=root,readonly=on,multidevs=remap")
        yield from ("-virtfs", f"{local},path={job},mount_tag=job")

    def _initramfs(self) -> bytes:
        modules = find_modules(self.kernel, _MODULES)
        parameters = {"kvm_amd": "nested=1"}
        order = "".join(f"{each.name}.ko {parameters.get(each.name, '')}\n" for each in modules)
        return pack_cpio(
            [
                *(directory(each) for each in _FOLDERS),
                device("dev/console", 5, 1),
                program("bin/busybox", self.busybox.read_bytes()),
                program("init", _INIT.read_bytes()),
                program("modules/order", order.encode()),
                *(program(f"modules/{each.name}.ko", each.data) for each in modules),
            ]
        )


def _wait(process: subprocess.Popen[bytes], mine: Path, timeout_s: float) -> None:
    """Until it has ended; HostError when it does not."""
    alive, heard, now = mine / "alive", 0.0, time.monotonic()
    since, before, end = now, (0.0, 0.0), now + timeout_s
    while (now := time.monotonic()) < end:
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(1.0, end - now))
            return
        if alive.exists() and (at := alive.stat().st_mtime) != heard:
            heard, since, before = at, now, _processor_times(process.pid)
        elif now - since > _SILENT_S:
            times = _processor_times(process.pid)
            used, waited = (b - a for a, b in zip(before, times, strict=True))
            if now - since - waited > _SILENT_OWN_S:
                raise MachineLostError(
                    f"it gave no sign of life for {_SILENT_S} s, and was stopped; QEMU had a processor "
                    f"for {used:.0f} s of them, and waited for one for {waited:.0f} s"
                )
    raise HostError(f"the outer machine was stopped after {timeout_s:.0f} s")


def _processor_times(pid: int) -> tuple[float, float]:
    """Seconds that a process's threads had a processor, and that they waited for one; from proc(5)."""
    used = waited = 0
    for each in Path("/proc").glob(f"{pid}/task/*/schedstat"):
        with suppress(OSError):  # a thread that ends meanwhile
            times = each.read_text().split()
            used, waited = used + int(times[0]), waited + int(times[1])
    return used / 1e9, waited / 1e9
