"""Run unmodified programs that find `/dev/sev-guest` and configfs-tsm, without privilege.

Seccomp user notification is what does it. What a program can tell from a real guest: the device is not listed
in /dev, in /proc/misc or in sysfs; symbolic links to it lead nowhere; its descriptor has a high number, since
the lowest free one is not given, and its link in /proc/self/fd is /dev/null. On duplicates outside of the
reserved range (960 to 1023 as a rule) only the three SNP requests reach the device, and the rest behaves like
/dev/null. 32-bit and set-id programs see the real system, and io_uring does not exist. `tsm_nodes` says what
can be told of configfs-tsm.

Nothing is loaded before it is used, so that `doctor` can be asked on any system.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from swsnp.front.device import SevGuestDevice
    from swsnp.guest.tsm import ConfigfsTsm

__all__ = ["require_usable", "run"]


def require_usable() -> None:
    """Return when programs can be wrapped on this host.

    Raises:
        HostError: they cannot; the text says why and what to do.
    """
    from swsnp.front.wrap import doctor

    doctor.require()


def run(
    argv: Sequence[str],
    device: SevGuestDevice,
    *,
    tsm: ConfigfsTsm | None = None,
    environ: Mapping[str, str] | None = None,
) -> int:
    """Run a program that finds `device` at `/dev/sev-guest` and `tsm` at `/sys/kernel/config`.

    Until it returns, this process belongs to the program: SIGINT and SIGQUIT are ignored, SIGTERM and SIGHUP
    passed on, all children reaped. Descendants of the program are served too, and `run` returns when the last
    has ended.

    Args:
        argv: the program, looked for along PATH, and its arguments.
        device: answers the ioctls; calls come from several threads.
        tsm: configfs-tsm; None: there is only the device.
        environ: the program's environment; ours unless given.

    Returns:
        The program's exit status; 128 + N when signal N ended it; 127 when it was not found, 126 when it
        could not be executed.

    Raises:
        HostError: not possible here; the text says why and what to do.
        UsageError: no program, or called outside the main thread.
    """
    from swsnp.front.wrap.doctor import prerequisites

    arch, features = prerequisites()
    from swsnp.front.wrap.memory import process_vm_works
    from swsnp.front.wrap.supervisor import Supervisor
    from swsnp.front.wrap.tree import device_tree, guest_tree

    tree = device_tree(device) if tsm is None else guest_tree(device, tsm)
    try:
        supervisor = Supervisor(tree, arch=arch, features=features, process_vm=process_vm_works())
        return supervisor.run(argv, os.environ if environ is None else environ)
    finally:
        tree.close()
