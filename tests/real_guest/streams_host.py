"""`python -m tests.real_guest.streams_host JOB KERNEL`: boot a guest with streams and a folder; be its peer.

Runs where guests run. Leaves in JOB what the guest wrote to its first port (`many`) and what it said back on
its second (`capitals`), and in the folder `shared` what it made there; standard output and exit status are
the guest's, whose standard input is `INPUT`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

from tests.real_guest.guests import COMMAND_LINE, MEMORY, Guest
from tests.real_guest.place import BUILD
from tests.real_guest.virtiofsd import Virtiofsd, virtiofsd_program

from swsnp.errors import HostError

__all__ = ["INPUT", "LINE", "PAGE", "TEXT", "main"]

PAGE: Final = bytes(range(256)) * 80
LINE: Final = b"hello guest\n"
INPUT: Final = bytes(range(255, -1, -1)) * 400 + b"end"
TEXT: Final = b"".join(b"line %d of the host's\n" % number for number in range(20_000))
_BUSYBOX: Final = BUILD / "busybox" / "bin" / "busybox"
_DUMMY: Final = "lib/modules/*/kernel/drivers/net/dummy.ko"


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def main(job: Path, kernel: str) -> int:
    """The guest's exit status."""
    _have_a_route()
    os.environ["PATH"] += f":{BUILD / 'passt' / 'usr' / 'bin'}"
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        path, daemon = Path(folder) / "port", Path(folder) / "daemon"
        command = _command(job, kernel, path, server.server_port, daemon)
        with _shared(job, daemon), subprocess.Popen(command, stdin=subprocess.PIPE) as guest:
            talk = threading.Thread(target=_talk, args=(guest, path, job), daemon=True)
            talk.start()
            guest.communicate(INPUT)
            status = guest.wait()
        talk.join(10)
    return status


def _shared(job: Path, path: Path) -> Virtiofsd:
    """A folder for the guest, with a file of some hundred thousand bytes."""
    program = virtiofsd_program(BUILD)
    if program is None:
        raise HostError(f"no virtiofsd under {BUILD}; remedy: tools/real-guest-files {BUILD}")
    shared = job / "shared"
    shutil.rmtree(shared, ignore_errors=True)  # of a machine that was lost
    shared.mkdir()
    (shared / "there").write_bytes(TEXT)
    with (job / "virtiofsd.log").open("wb") as log:
        return Virtiofsd(program, path, shared, log)


def _command(job: Path, kernel: str, path: Path, port: int, daemon: Path) -> list[str]:
    line = [sys.executable, "-m", "swsnp", "vm", "--timeout", "300", "--stats", str(job / "streams.json")]
    line += ["-kernel", str(Guest(kernel, "").image), "--modules", str(BUILD / kernel), "-m", MEMORY]
    line += ["-append", COMMAND_LINE, "-nic", "user", "-device", "virtio-serial-device"]
    line += ["-chardev", f"file,id=many,path={job}/many", "-device", "virtserialport,chardev=many,name=many"]
    line += ["-chardev", f"socket,id=talk,path={path},server=on,wait=off"]
    line += ["-device", "virtserialport,chardev=talk,name=talk"]
    line += ["-chardev", "stdio,id=out", "-device", "virtserialport,chardev=out,name=out"]
    line += ["-chardev", f"socket,id=folder,path={daemon}"]
    line += ["-device", "vhost-user-fs-device,chardev=folder,tag=shared"]
    return [*line, "--exec", str(job / "streams"), "many", "talk", "10.0.2.2", str(port), "shared"]


def _talk(guest: subprocess.Popen[bytes], path: Path, job: Path) -> None:
    """One line to the guest, and what it says to that."""
    while not path.exists() and guest.poll() is None:
        time.sleep(0.1)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
        peer.sendall(LINE)
        said = b""
        while len(said) < len(LINE) and (piece := peer.recv(100)):
            said += piece
    (job / "capitals").write_bytes(said)


def _have_a_route() -> None:
    """Passt wants one, and an outer machine has no network: an interface that leads nowhere will do."""
    if subprocess.run([_BUSYBOX, "ip", "route", "show", "default"], capture_output=True, check=True).stdout:
        return
    (module,) = (BUILD / "debian-12").glob(_DUMMY)
    for command in (
        f"insmod {module}",
        "ip link set dummy0 up",
        "ip addr add 192.0.2.1/24 dev dummy0",
        "ip route add default via 192.0.2.2",
    ):
        subprocess.run([_BUSYBOX, *command.split()], check=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
