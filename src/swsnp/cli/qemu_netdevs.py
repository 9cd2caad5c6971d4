"""QEMU's -netdev and -nic: whom a guest's network device speaks to.

Source: the manual page qemu(1), "Network options".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from swsnp.cli.qemu_values import boolean, convert_all, kind_and_rest, number, one_of, path_value, text_value
from swsnp.errors import UsageError
from swsnp.vmm.devices.forward import Forward

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from swsnp.cli.qemu_values import Converter

__all__ = ["NetDevice", "Netdev", "StreamNet", "UserNet", "default_mac", "mac_value", "netdev_of", "nic_of"]

_FIRST_MAC: Final = bytes.fromhex("525400123456")
_MAC: Final = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_PORT: Final = number(1, 65535)
_MULTICAST: Final = 1


@dataclass(frozen=True, slots=True)
class UserNet:
    """A user network, with ports that lead to the guest."""

    forwards: tuple[Forward, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamNet:
    """Frames in a stream; `address` is a path, or a host and a TCP port."""

    address: Path | tuple[str, int]
    server: bool = False


Netdev: TypeAlias = UserNet | StreamNet


@dataclass(frozen=True, slots=True)
class NetDevice:
    """A virtio-net-device."""

    netdev: Netdev
    mac: bytes


def mac_value(text: str) -> bytes:
    """An address that one device can have."""
    found = bytes.fromhex(text.replace(":", "")) if _MAC.fullmatch(text) else b""
    if not any(found) or found[0] & _MULTICAST:
        raise ValueError("one device's address, such as 52:54:00:12:34:56")
    return found


def default_mac(index: int) -> bytes:
    """QEMU's, of the device with this number among those of the network."""
    return _FIRST_MAC[:-1] + bytes([_FIRST_MAC[-1] + index])


def _forwards(text: str) -> tuple[Forward, ...]:
    return tuple(_forward(each) for each in text.split(","))


def _forward(text: str) -> Forward:
    """[tcp|udp]:[hostaddr]:hostport-[guestaddr]:guestport."""
    from ipaddress import IPv4Address

    wanted = "[tcp|udp]:[host address]:port-:port"
    host, _, guest = text.partition("-")
    try:
        protocol, address, host_port = host.split(":")
        guest_address, guest_port = guest.split(":")
        if address:
            IPv4Address(address)
        forward = Forward(
            protocol=protocol or "tcp", host=address, host_port=_PORT(host_port), guest_port=_PORT(guest_port)
        )
    except ValueError:
        raise ValueError(wanted) from None
    if guest_address or forward.protocol not in ("tcp", "udp"):
        raise ValueError(wanted)
    return forward


_KINDS: Final[Mapping[str, Mapping[str, Converter]]] = {
    "user": {"hostfwd": _forwards},
    "stream": {
        "server": boolean,
        "addr.type": one_of("unix", "inet"),
        "addr.path": path_value,
        "addr.host": text_value,
        "addr.port": number(0, 65535),
    },
}
_ADDRESSES: Final = {"unix": {"addr.path"}, "inet": {"addr.host", "addr.port"}}
_NIC: Final[Mapping[str, Converter]] = {
    "mac": mac_value,
    "model": one_of("virtio-net-device"),
}


def netdev_of(text: str) -> tuple[str, Netdev]:
    """What one -netdev says: its id and the network.

    Raises:
        UsageError: an unknown type or property, or one that is missing or too much.
    """
    kind, found = kind_and_rest(text, "type", _KINDS, "-netdev", word="type", many=("hostfwd",))
    where = f"-netdev {kind}"
    values = convert_all(found, {"id": text_value, **_KINDS[kind]}, where)
    if "id" not in values:
        raise UsageError(f"{where}: property 'id' is missing")
    return values.pop("id"), _netdev(kind, values, where)


def nic_of(text: str) -> tuple[Netdev, bytes | None] | None:
    """What one -nic says: the network, and the device's address if given; None for none.

    Raises:
        UsageError: as `netdev_of`.
    """
    kinds = ("none", *_KINDS)
    kind, found = kind_and_rest(text, "type", kinds, "-nic", word="type", many=("hostfwd",))
    where = f"-nic {kind}"
    if kind == "none":
        convert_all(found, {}, where)
        return None
    values = convert_all(found, {**_NIC, **_KINDS[kind]}, where)
    values.pop("model", None)
    mac = values.pop("mac", None)
    return _netdev(kind, values, where), mac


def _netdev(kind: str, values: Mapping[str, Any], where: str) -> Netdev:
    if kind == "user":
        return UserNet(values.get("hostfwd", ()))
    if "addr.type" not in values:
        raise UsageError(f"{where}: property 'addr.type' is missing")
    wanted = _ADDRESSES[values["addr.type"]]
    if {each for each in values if each.startswith("addr.")} - {"addr.type"} != wanted:
        raise UsageError(f"{where}: wanted {' and '.join(sorted(wanted))} with its addr.type")
    address = values.get("addr.path") or (values["addr.host"], values["addr.port"])
    return StreamNet(address, values.get("server", False))
