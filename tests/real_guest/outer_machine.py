"""An outer machine: QEMU emulates a processor that virtualizes, so its Linux has a KVM that can run Linux.

For hosts whose own KVM is missing or cannot. The machine's root is this host's, read-only with a layer over
it that goes away: the same Python, the same sources at the same paths. `/run/job` is one of the host's
folders and can be written.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from swsnp.errors import HostError
from swsnp.vmm.cpio import device, directory, pack_cpio, program
from swsnp.vmm.kernel_modules import find_modules

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["OuterMachine"]

_INIT: Final = Path(__file__).with_name("outer_init.sh")
_FOLDERS: Final = ("bin", "dev", "host", "layer", "modules", "proc", "root", "sys")
_MODULES: Final = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "kvm_amd")
_CPU: Final = "EPYC-Milan,+svm,+npt"
_COMMAND_LINE: Final = (
    "console=ttyS0 quiet loglevel=3 mitigations=off tsc=reliable random.trust_cpu=on panic=-1"
)
"""No time for what an emulated processor cannot suffer from; the counter is as steady as QEMU's clock."""


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
    cpus: int = 2
    memory: str = "3G"

    def run(self, job: Path, script: str, *, timeout_s: float) -> int:
        """Run a shell script as root; what it prints appears on the standard output as it comes.

        The folder `job` is `/run/job` inside; the caller's standard output is the machine's serial port.

        Returns:
            The script's exit status.

        Raises:
            HostError: no QEMU; or the machine ended without a status: it died or took too long.
        """
        qemu = shutil.which(self.qemu or "qemu-system-x86_64")
        if qemu is None:
            raise HostError("the outer machine needs qemu-system-x86_64; remedy: install qemu-system-x86")
        (job / "initramfs").write_bytes(self._initramfs())
        (job / "job.sh").write_text(script)
        status = job / "status"
        status.unlink(missing_ok=True)
        with (job / "qemu.log").open("w") as log:
            try:
                command = [qemu, *self._arguments(job)]
                subprocess.run(command, stdin=subprocess.DEVNULL, stderr=log, timeout=timeout_s, check=False)
            except subprocess.TimeoutExpired:
                raise HostError(f"the outer machine was stopped after {timeout_s:.0f} s") from None
        if not status.exists():
            raise HostError(f"the outer machine died; its last words are above and in {job / 'qemu.log'}")
        return int(status.read_text())

    def _arguments(self, job: Path) -> Iterator[str]:
        (kernel,) = self.kernel.glob("boot/vmlinuz-*")
        yield from ("-accel", "tcg,thread=multi", "-cpu", _CPU, "-smp", str(self.cpus), "-m", self.memory)
        yield from ("-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio")
        yield from ("-kernel", str(kernel), "-initrd", str(job / "initramfs"), "-append", _COMMAND_LINE)
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
