"""The user network's program: what it is told, that it is there, and that it ends with its guest."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import time
from typing import TYPE_CHECKING, Final

import pytest

from swsnp.errors import HostError
from swsnp.vmm.devices import passt
from swsnp.vmm.devices.forward import Forward
from swsnp.vmm.devices.network import FrameReader, framed
from swsnp.vmm.devices.passt import Passt, passt_arguments

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Skip

MAC: Final = bytes.fromhex("525400123456")
WHO_IS: Final = bytes.fromhex(
    "ffffffffffff 525400123456 0806 0001 0800 06 04 0001 525400123456 0a00020f 000000000000 0a000202"
)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script where passt is looked for."""

    def write(script: str) -> None:
        program = tmp_path / "passt"
        program.write_text(f"#!/bin/bash\nexport PATH={os.environ['PATH']}\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return write


def test_arguments() -> None:
    """passt(1): a socket that is connected, QEMU's addresses, ports with or without an address."""
    forwards = [
        Forward(protocol="tcp", host="127.0.0.1", host_port=2222, guest_port=22),
        Forward(protocol="udp", host="", host_port=53, guest_port=5353),
    ]
    line = "--foreground --quiet --fd 7 --mtu 1500 --address 10.0.2.15 --netmask 24 --gateway 10.0.2.2"
    assert passt_arguments(7, []) == line.split()
    line += " --tcp-ports 127.0.0.1/2222:22 --udp-ports 53:5353"
    assert passt_arguments(7, forwards) == line.split()


def test_no_such_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Exit code 4's error, with what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="needs the program passt; remedy: install the package passt"):
        Passt(MAC)


def test_program_that_answers(fake: Callable[[str], None], tmp_path: Path) -> None:
    """It is asked who the host is; whatever it answers, it is there. It ends with its socket."""
    fake(
        f'fd=$4; head -c 46 <&$fd > {tmp_path}/asked; printf "\\0\\0\\0" >&$fd; sleep 0.1;'
        'printf "\\1x\\0\\0\\0\\1y" >&$fd; cat <&$fd >/dev/null; exit 3'
    )
    with Passt(MAC) as started:
        assert (tmp_path / "asked").read_bytes() == framed(WHO_IS)
        assert started._process.poll() is None
        assert started.socket.recv(5) == framed(b"y"), "no more than the answer was taken"
        assert os.getpgid(started._process.pid) != os.getpgrp(), "the terminal's keys are not for it"
    assert started._process.returncode == 3
    started.close()


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (
            "echo Failed to send 41 bytes to syslog; echo no ports >&2; echo left; exit 1",
            "passt ended with status 1: no ports; left",
        ),
        ("exit 0", "passt ended with status 0: it said nothing"),
    ],
)
def test_program_that_fails(fake: Callable[[str], None], script: str, text: str) -> None:
    """Its status, and its words."""
    fake(script)
    with pytest.raises(HostError, match=text):
        Passt(MAC)


def test_program_that_is_silent(fake: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for for ever, and it is ended, whether it likes or not."""
    monkeypatch.setattr(passt, "_START_S", 0.2)
    monkeypatch.setattr(passt, "_END_S", 0.1)
    fake("trap '' TERM; while :; do sleep 0.1; done")
    before = time.monotonic()
    with pytest.raises(HostError, match=r"passt does not answer within 0\.2 s"):
        Passt(MAC)
    assert time.monotonic() - before < 10


def test_program_that_is_none(fake: Callable[[str], None], tmp_path: Path) -> None:
    """A file that cannot be executed."""
    fake("")
    (tmp_path / "passt").write_bytes(b"\x7fELF nothing")
    with pytest.raises(HostError, match="passt: cannot be started: Exec format error"):
        Passt(MAC)


# The real one


def test_real_program(cannot_run: Skip) -> None:
    """It answers DHCP with the guest's address and lets the host's ports lead to the guest."""
    if shutil.which("passt") is None:
        cannot_run("no passt", "apt-get install passt")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    forward = Forward(protocol="tcp", host="127.0.0.1", host_port=port, guest_port=80)
    try:
        program = Passt(MAC, [forward])
    except HostError as error:
        cannot_run(str(error), "a host with a route, whose users may make namespaces", avoidable=False)
    with program as started:
        started.socket.sendall(framed(dhcp_discover()))
        offer = next(
            frame for frame in frames(started.socket) if frame[12:14] == b"\x08\0" and frame[23] == 17
        )
        assert socket.inet_ntoa(offer[58:62]) == "10.0.2.15"
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            asked = next(frame for frame in frames(started.socket) if frame[12:14] == b"\x08\0")
            assert (asked[23], struct.unpack_from("!H", asked, 36)) == (6, (80,))
    assert started._process.returncode == 0


def frames(stream: socket.socket) -> list[bytes]:
    reader = FrameReader()
    found: list[bytes] = []
    while not any(frame[12:14] == b"\x08\0" for frame in found):
        found += reader.feed(stream.recv(1 << 16))
    return found


def dhcp_discover() -> bytes:
    """RFC 2131: a client that has no address yet."""
    dhcp = struct.pack("!4B4s20x16s192x", 1, 1, 6, 0, b"test", MAC) + bytes.fromhex("63825363 350101 ff")
    udp = struct.pack("!4H", 68, 67, 8 + len(dhcp), 0) + dhcp
    head = struct.pack("!BBHIBBH4s4s", 0x45, 0, 20 + len(udp), 0, 64, 17, 0, bytes(4), b"\xff" * 4)
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack("!H", ~total & 0xFFFF) + head[12:]
    return b"\xff" * 6 + MAC + b"\x08\0" + head + udp
