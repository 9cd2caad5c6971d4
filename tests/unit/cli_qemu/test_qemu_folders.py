"""QEMU's options for a shared folder: vhost-user-fs-device with its chardev."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from swsnp.cli.qemu_folders import FolderDevice
from swsnp.cli.qemu_options import parse_qemu_options
from swsnp.errors import UsageError

if TYPE_CHECKING:
    from swsnp.cli.qemu_devices import AnyDevice

SOCKET: Final = "-chardev socket,id=c,path=s"
FOLDER: Final = "-device vhost-user-fs-device,chardev=c,tag=t"


def devices(words: str) -> tuple[AnyDevice, ...]:
    return parse_qemu_options(["-kernel", "k", *words.split()]).devices


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("chardev=c,tag=t", FolderDevice(b"t", Path("s"), 128)),
        ("id=x,tag=t,chardev=c,queue-size=1024", FolderDevice(b"t", Path("s"), 1024)),
        ("tag=a,,b,chardev=c,queue-size=1", FolderDevice(b"a,b", Path("s"), 1)),
        (f"chardev=c,tag={'t' * 36}", FolderDevice(b"t" * 36, Path("s"))),
        ("chardev=c,tag=ä", FolderDevice("ä".encode(), Path("s"))),
    ],
)
def test_folder(text: str, found: FolderDevice) -> None:
    """qemu(1) and QEMU's vhost-user-fs.c: a tag of up to 36 bytes, 128 descriptors unless told."""
    assert devices(f"-device vhost-user-fs-device,{text} {SOCKET}") == (found,)


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (f"-device vhost-user-fs-device,tag=t {SOCKET}", "fs-device: property 'chardev' is missing"),
        (f"-device vhost-user-fs-device,chardev=c {SOCKET}", "fs-device: property 'tag' is missing"),
        (f"{FOLDER},tag= {SOCKET}", "property 'tag' given twice"),
        (f"-device vhost-user-fs-device,chardev=c,tag= {SOCKET}", "'tag': got '', wanted 1 to 36 bytes"),
        (f"-device vhost-user-fs-device,chardev=c,tag={'t' * 37} {SOCKET}", "wanted 1 to 36 bytes"),
        (f"-device vhost-user-fs-device,chardev=c,tag={'ä' * 19} {SOCKET}", "wanted 1 to 36 bytes"),
        (f"-device vhost-user-fs-device,chardev=c,tag=a\0b {SOCKET}", "wanted 1 to 36 bytes"),
        (f"{FOLDER},queue-size=0 {SOCKET}", "'queue-size': got '0', wanted a power of two up to 1024"),
        (f"{FOLDER},queue-size=3 {SOCKET}", "got '3', wanted a power of two"),
        (f"{FOLDER},queue-size=2048 {SOCKET}", "got '2048', wanted a power of two"),
        (f"{FOLDER},queue-size=x {SOCKET}", "got 'x', wanted a power of two"),
        (f"{FOLDER},num-request-queues=2 {SOCKET}", "unknown property 'num-request-queues'; known are id, c"),
        (FOLDER, "property 'chardev': got 'c', there are none that are free"),
        (f"{FOLDER} {FOLDER} {SOCKET}", "property 'chardev': got 'c', there are none that are free"),
        (f"{FOLDER} -chardev null,id=c", "'c': wanted -chardev socket,path=S without server=on: the daemon"),
        (f"{FOLDER} -chardev file,id=c,path=f", "'c': wanted -chardev socket,path=S without server=on"),
        (f"{FOLDER} -chardev socket,id=c,host=h,port=1", "'c': wanted -chardev socket,path=S without"),
        (f"{FOLDER} {SOCKET},server=on", "'c': wanted -chardev socket,path=S without server=on"),
        (f"-device vhost-user-fs-pci,chardev=c,tag=t {SOCKET}", "unknown driver 'vhost-user-fs-pci'"),
        ("-virtfs local,path=d,mount_tag=t", "-virtfs: 9p is not modelled; remedy: virtiofsd listening at S"),
        ("-fsdev local,id=f,path=d", "-fsdev: 9p is not modelled; remedy: virtiofsd listening at S"),
        ("--virtfs local,path=d", "-virtfs: 9p is not modelled"),
    ],
)
def test_refused(words: str, wrong: str) -> None:
    """Option, property, got, wanted; what somebody who knows QEMU would try has its remedy."""
    with pytest.raises(UsageError, match=re.escape(wrong)):
        devices(words)
