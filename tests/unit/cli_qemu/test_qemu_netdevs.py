"""QEMU's options for a network: whom the guest speaks to, and with which address."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from swsnp.cli.qemu_devices import AnyDevice, EntropyDevice
from swsnp.cli.qemu_netdevs import NetDevice, StreamNet, UserNet
from swsnp.cli.qemu_options import parse_qemu_options
from swsnp.errors import UsageError
from swsnp.vmm.devices.forward import Forward

FIRST: Final = bytes.fromhex("525400123456")
DEVICE: Final = "-device virtio-net-device,netdev=n"


def devices(words: str) -> tuple[AnyDevice, ...]:
    return parse_qemu_options(["-kernel", "k", *words.split()]).devices


def forward(protocol: str, host: str, host_port: int, guest_port: int) -> Forward:
    return Forward(protocol=protocol, host=host, host_port=host_port, guest_port=guest_port)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("user", UserNet()),
        ("user,hostfwd=tcp:127.0.0.1:2222-:22", UserNet((forward("tcp", "127.0.0.1", 2222, 22),))),
        (
            "user,hostfwd=::1-:65535,hostfwd=udp::65535-:1",
            UserNet((forward("tcp", "", 1, 65535), forward("udp", "", 65535, 1))),
        ),
        ("stream,addr.type=unix,addr.path=a,,b", StreamNet(Path("a,b"))),
        ("stream,server=off,addr.type=unix,addr.path=a", StreamNet(Path("a"))),
        ("stream,server=on,addr.type=inet,addr.host=::1,addr.port=0", StreamNet(("::1", 0), True)),
        ("type=stream,addr.type=inet,addr.host=h,addr.port=65535", StreamNet(("h", 65535))),
    ],
)
def test_networks(text: str, found: UserNet | StreamNet) -> None:
    """qemu(1): -netdev with a -device, which may come before it, or -nic for both."""
    for words in (f"{DEVICE} -netdev {text},id=n", f"-netdev {text},id=n {DEVICE}", f"-nic {text}"):
        assert devices(words) == (NetDevice(found, FIRST),)


def test_no_network() -> None:
    """A guest has none unless one is asked for; -nic none says so."""
    assert devices("") == devices("-nic none") == devices("-nic type=none") == ()


def test_addresses() -> None:
    """QEMU's own prefix, counted by network devices; or what is given."""
    words = "-nic user -device virtio-rng-device -nic user,mac=02:00:00:00:00:aF,model=virtio-net-device "
    words += f"-netdev user,id=n {DEVICE} -netdev user,id=m -device virtio-net-device,netdev=m,id=x"
    words += ",mac=fE:ff:ff:ff:ff:ff"
    found = devices(words)
    assert found[1] == EntropyDevice()
    assert [each.mac.hex(":") for each in found if isinstance(each, NetDevice)] == [
        "52:54:00:12:34:56",
        "02:00:00:00:00:af",
        "52:54:00:12:34:58",
        "fe:ff:ff:ff:ff:ff",
    ]


FORWARD: Final = "property 'hostfwd': got {!r}, wanted [tcp|udp]:[host address]:port-:port"
MAC: Final = "property 'mac': got {!r}, wanted one device's address, such as 52:54:00:12:34:56"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("-netdev tap,id=n", "-netdev: unknown type 'tap'; known are user, stream"),
        ("-netdev {}", "-netdev: got JSON, wanted type,key=value"),
        ("-netdev user", "-netdev user: property 'id' is missing"),
        ("-netdev user,id=n", "netdev 'n': wanted a -device virtio-net-device,netdev=n that has it"),
        ("-netdev user,id=n -netdev user,id=n", "-netdev: id 'n' is taken"),
        ("-netdev user,id=n,restrict=on", "-netdev user: unknown property 'restrict'; known are id, hostfwd"),
        ("-netdev user,id=n,id=m", "-netdev: property 'id' given twice"),
        ("-netdev stream,id=n", "-netdev stream: property 'addr.type' is missing"),
        ("-netdev stream,id=n,addr.type=fd", "property 'addr.type': got 'fd', wanted unix or inet"),
        ("-netdev stream,id=n,addr.type=unix", "-netdev stream: wanted addr.path with its addr.type"),
        (
            "-netdev stream,id=n,addr.type=inet,addr.host=h",
            "-netdev stream: wanted addr.host and addr.port with its addr.type",
        ),
        (
            "-netdev stream,id=n,addr.type=inet,addr.host=h,addr.port=1,addr.path=p",
            "-netdev stream: wanted addr.host and addr.port with its addr.type",
        ),
        (
            "-netdev stream,id=n,addr.type=unix,addr.path=p,addr.port=1",
            "-netdev stream: wanted addr.path with its addr.type",
        ),
        (
            "-netdev stream,id=n,addr.port=65536",
            "property 'addr.port': got '65536', wanted a number 0..65535",
        ),
        (DEVICE, "-device virtio-net-device: property 'netdev': got 'n', there are none that are free"),
        ("-device virtio-net-device", "-device virtio-net-device: property 'netdev' is missing"),
        (
            f"-netdev user,id=n {DEVICE} {DEVICE}",
            "-device virtio-net-device: property 'netdev': got 'n', there are none that are free",
        ),
        ("-nic tap", "-nic: unknown type 'tap'; known are none, user, stream"),
        ("-nic none,mac=52:54:00:12:34:56", "-nic none: unknown property 'mac'"),
        ("-nic user,id=n", "-nic user: unknown property 'id'"),
        ("-nic user,model=e1000", "property 'model': got 'e1000', wanted virtio-net-device"),
        ("-nic stream,addr.path=p", "-nic stream: property 'addr.type' is missing"),
        *(
            (f"-nic user,hostfwd={each}", FORWARD.format(each))
            for each in (
                "",
                "tcp",
                "tcp::22",
                "tcp::22-22",
                "tcp::22-10.0.2.15:22",
                "tcp::0-:22",
                "tcp::22-:65536",
                "tcp:host:22-:22",
                "tcp:::1:22-:22",
                "sctp::22-:22",
                "22-:22",
                "tcp::22-:22-",
            )
        ),
        ("-nic user,hostfwd=::1-:1,hostfwd=x", FORWARD.format("::1-:1,x")),
        *(
            (f"-nic user,mac={each}", MAC.format(each))
            for each in (
                "",
                "52:54:00:12:34",
                "52:54:00:12:34:56:78",
                "52:54:00:12:34:5",
                "52:54:00:12:34:+5",
                "525400123456",
                "52:54:00:12:34:zz",
                "53:54:00:12:34:56",
                "ff:ff:ff:ff:ff:ff",
                "00:00:00:00:00:00",
                "052:4:00:12:34:56",
            )
        ),
    ],
)
def test_refusals(words: str, text: str) -> None:
    """QEMU refuses, or it is not modelled: option, got, wanted."""
    with pytest.raises(UsageError, match=re.escape(text)):
        devices(words)
