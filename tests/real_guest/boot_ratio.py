"""`python -m tests.real_guest.boot_ratio [ROUNDS]`: SNP guests' boots against plain boots by the same VMM.

Each kernel boots as an SNP guest and without SNP in turn, to a program that prints one line, in the place
that `make real-guest` takes and with what that has fetched. Seconds are those from the end of the launch to
that line, the least of all rounds; exits are those of the boot that took least.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.real_guest.guests import COMMAND_LINE, KERNELS, MEMORY, Guest
from tests.real_guest.lanes import run_lanes
from tests.real_guest.place import BUILD, here_or_nested

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.real_guest.lanes import Lane

__all__ = ["main"]

_KINDS: Final = {"snp": [], "plain": ["-machine", "q35"]}
_LONGEST_S: Final = 3600
_PROGRAM: Final = (str(BUILD / "busybox" / "bin" / "busybox"), "echo", "up")


def main(arguments: Sequence[str]) -> int:
    """Boot, print one line for each kernel and kind; 1 when a guest did not come up."""
    rounds = int(arguments[0]) if arguments else 2
    lanes: list[Lane] = [
        {
            f"{kernel}.{kind}.{number}": _command(kernel, f"{kernel}.{kind}.{number}", options)
            for number in range(rounds)
            for kind, options in _KINDS.items()
        }
        for kernel in KERNELS
    ]
    with tempfile.TemporaryDirectory(prefix="boot-ratio.") as folder:
        job = Path(folder)
        ended = run_lanes(here_or_nested(), job, lanes, timeout_s=_LONGEST_S)
        good = len(ended) == sum(map(len, lanes)) and all(each.out == b"up\n" for each in ended.values())
        if good:
            for kernel in KERNELS:
                _show(kernel, {kind: _least(job, kernel, kind, rounds) for kind in _KINDS})
        else:
            print({name: each.err[-300:] for name, each in ended.items() if each.out != b"up\n"})
    return 0 if good else 1


def _command(kernel: str, name: str, options: list[str]) -> list[str]:
    line = [sys.executable, "-m", "swsnp", "vm", *options, "--stats", f"$JOB/{name}.json"]
    line += ["-kernel", str(Guest(kernel, "linux-7.2").image), "-m", MEMORY]
    return [*line, "-append", COMMAND_LINE, "--exec", *_PROGRAM]


def _least(job: Path, kernel: str, kind: str, rounds: int) -> dict[str, Any]:
    found = [json.loads((job / f"{kernel}.{kind}.{number}.json").read_text()) for number in range(rounds)]
    return min(found, key=_boot_s)


def _boot_s(stats: dict[str, Any]) -> float:
    return float(stats["seconds"]["output"] - stats["seconds"]["launched"])


def _show(kernel: str, best: dict[str, dict[str, Any]]) -> None:
    ratio = _boot_s(best["snp"]) / _boot_s(best["plain"])
    print(f"{kernel}: SNP {ratio:.2f} times the plain boot")
    for kind, stats in best.items():
        (vcpu,) = stats["vcpus"]
        exits = ", ".join(
            f"{name} {each['count']} ({each['seconds']:.2f} s)" for name, each in vcpu["exits"].items()
        )
        print(f"  {kind}: launch {stats['seconds']['launched']:.1f} s, boot {_boot_s(stats):.1f} s, ", end="")
        print(f"{vcpu['kvm_run_seconds']:.1f} s in KVM_RUN; exits (time outside): {exits}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
