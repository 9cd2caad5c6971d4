"""Guests attest without pause while `swsnp certs pack` replaces the blob under them."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from swsnp.vmm.certs import BlobFile

if TYPE_CHECKING:
    from pathlib import Path

    from swsnp.machine import Machine

ROUNDS = 4
PACK = """
import sys
from swsnp.cli import main
small, large, out, rounds = sys.argv[1:5]
for number in range(int(rounds)):
    more = [] if number % 2 else ["--entry", f"00000000-0000-0000-0000-000000000007={large}"]
    code = main(["certs", "pack", *sys.argv[5:], "--out", out, "--at", "2026-06-01", *more])
    if code:
        sys.exit(code)
"""


def test_no_guest_ever_sees_a_torn_table(seeded_machine: Machine, tmp_path: Path) -> None:
    """Tables of two sizes in turn; every answer is one of them, whole, and updates get through."""
    machine = seeded_machine
    (tmp_path / "leaf").write_bytes(machine.vcek_certificate())
    (tmp_path / "chain").write_bytes(machine.hierarchy.chain_pem())
    (tmp_path / "large").write_bytes(bytes(range(256)) * 30)
    out = tmp_path / "certs.blob"
    arguments = [str(tmp_path / each) for each in ("leaf", "large")]
    files = [str(tmp_path / each) for each in ("leaf", "chain")]

    def packing(rounds: int) -> list[str]:
        return [sys.executable, "-c", PACK, *arguments, str(out), str(rounds), *files]

    tables = []
    for rounds in (2, 1):
        subprocess.run(packing(rounds), check=True, capture_output=True)
        tables.append(out.read_bytes())
    assert len(tables[1]) - len(tables[0]) > 4096
    seen = [0, 0]
    with machine.create_vm(certs=BlobFile(out, timeout_s=10)) as vm:
        vm.boot()
        updater = subprocess.Popen(packing(ROUNDS), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while updater.poll() is None or sum(seen) < 2:
            got = vm.extended_report(bytes(64)).certs
            whole = [got[: len(each)] == each and not any(got[len(each) :]) for each in tables]
            assert whole.count(True) == 1, f"{len(got)} bytes, none of the two tables"
            seen[whole.index(True)] += 1
        assert updater.stderr is not None
        with updater.stderr as said:
            assert updater.returncode == 0, said.read().decode()
    assert out.read_bytes() == tables[0]
    assert sum(seen) > 2
