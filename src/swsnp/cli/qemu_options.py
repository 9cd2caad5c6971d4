"""QEMU's command line for an SNP guest, as `swsnp` takes it.

The grammar is QEMU's: single-dash options, each with a list `key=value,key=value` in which `,,` stands for
one comma and the first item may leave its key out. Only what this machine models is accepted; everything else
is an error that names what would have been known, so that no option is ignored in silence.

Differences from QEMU, all on the strict side: a property or an option given twice is an error, a key without
a value is an error, and sizes are whole numbers.

Source: the manual page qemu(1); QEMU 10.2, qapi/qom.json, for objects and their properties; the command lines
of the June 2024 series.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from swsnp.abi.snp_report import Product
from swsnp.cli.qemu_devices import DEVICE_OPTIONS, devices_of
from swsnp.cli.qemu_values import (
    base64_bytes,
    boolean,
    comma_list,
    convert_all,
    kind_and_rest,
    number,
    path_value,
    size,
    text_value,
)
from swsnp.errors import UsageError
from swsnp.vmm.certs import BlobFile
from swsnp.vmm.config import DEFAULT_POLICY, MODEL_CBITPOS, VmConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from swsnp.cli.qemu_devices import AnyDevice
    from swsnp.cli.qemu_values import Converter

__all__ = ["ACCELERATORS", "QemuOptions", "SnpGuest", "parse_qemu_options"]

ACCELERATORS: Final = ("builtin", "kvm")
_DEFAULT_MEMORY: Final = 128 << 20
_DEFAULT_CPU: Final = "EPYC-Milan"
"""Of a guest that starts with -kernel alone."""
_MIB: Final = 1 << 20
_CPU_MODELS: Final = {
    "EPYC-Milan": Product.MILAN,
    "EPYC-Genoa": Product.GENOA,
    "EPYC-Turin": Product.TURIN,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SnpGuest:
    """The `sev-snp-guest` object. `certs_timeout_s` in seconds, `certs_path` None when there is no blob.

    `cbitpos` None: the host's, whatever it is.
    """

    id: str
    cbitpos: int | None
    reduced_phys_bits: int
    sev_device: str = "/dev/sev"
    kernel_hashes: bool = False
    policy: int = DEFAULT_POLICY
    gosvw: bytes = bytes(16)
    id_block: bytes | None = None
    id_auth: bytes | None = None
    author_key_enabled: bool = False
    vcek_disabled: bool = False
    host_data: bytes = bytes(32)
    certs_path: Path | None = None
    certs_timeout_s: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuOptions:
    """A parsed command line. `memory_size` in bytes; `bios`, `kernel`, `initrd` None when not given.

    `serial` is "stdio", or "file:" and a name: a copy of what the guest's console shows. `devices` are in the
    order of the command line.
    """

    name: str
    cpus: int
    maxcpus: int
    cpu_model: str
    product: Product
    machine: str
    accelerator: str
    memory_size: int
    bios: Path | None
    kernel: Path | None
    initrd: Path | None
    append: str
    serial: str
    no_reboot: bool
    ordinary: bool
    """A kernel without SNP: -machine is given and names no confidential-guest-support."""
    devices: tuple[AnyDevice, ...]
    snp: SnpGuest

    def vm_config(self) -> VmConfig:
        """The VM that this command line describes; every request reads the certificate file afresh."""
        snp = self.snp
        cbitpos = MODEL_CBITPOS if snp.cbitpos is None else snp.cbitpos
        certs = None
        if snp.certs_path is not None:
            certs = BlobFile(snp.certs_path, timeout_s=snp.certs_timeout_s)
        return VmConfig(
            name=self.name,
            memory_size=self.memory_size,
            vcpus=self.cpus,
            policy=snp.policy,
            id_block=snp.id_block,
            id_auth=snp.id_auth,
            author_key_enabled=snp.author_key_enabled,
            vcek_disabled=snp.vcek_disabled,
            host_data=snp.host_data,
            gosvw=snp.gosvw,
            certs=certs,
            sev_device=snp.sev_device,
            cbitpos=cbitpos,
            reduced_phys_bits=snp.reduced_phys_bits,
            host_cbitpos=cbitpos,  # compared with the host's when the line was parsed, or when it is known
        )


_U64_MAX: Final = (1 << 64) - 1
_MEMORY_BACKEND: Final[Mapping[str, Converter]] = {
    "id": text_value,
    "size": size(1),
    "share": boolean,
    "reserve": boolean,
}


def _smm(text: str) -> str:
    if text not in ("auto", "off"):
        raise ValueError("auto or off: SNP guests have no SMM")
    return text


_OBJECTS: Final[Mapping[str, Mapping[str, Converter]]] = {
    "memory-backend-memfd": _MEMORY_BACKEND,
    "memory-backend-ram": _MEMORY_BACKEND,
    "sev-snp-guest": {
        "id": text_value,
        "sev-device": text_value,
        "cbitpos": number(0, 63),
        "reduced-phys-bits": number(1, 63),
        "kernel-hashes": boolean,
        "policy": number(0, _U64_MAX),
        "guest-visible-workarounds": base64_bytes(16),
        "id-block": base64_bytes(96),
        "id-auth": base64_bytes(4096, exactly=False),
        "author-key-enabled": boolean,
        "vcek-disabled": boolean,
        "host-data": base64_bytes(32),
        "certs-path": path_value,
        "certs-filename": path_value,
        "certs-timeout": number(0, (1 << 32) - 1),
    },
}
_OPTIONS: Final[Mapping[str, tuple[str, Mapping[str, Converter]]]] = {
    "smp": ("cpus", {"cpus": number(1, 4096), "maxcpus": number(1, 4096)}),
    "cpu": ("model", {"model": text_value}),
    "machine": (
        "type",
        {
            "type": text_value,
            "confidential-guest-support": text_value,
            "memory-backend": text_value,
            "smm": _smm,
        },
    ),
    "accel": ("accel", {"accel": text_value}),
    "m": ("size", {"size": size(_MIB)}),
    "name": ("guest", {"guest": text_value}),
}
"""Option: the key that its first item may leave out, and its properties."""
_ALIASES: Final = {"M": "machine"}
_PLAIN: Final = ("bios", "kernel", "initrd", "append", "serial")
"""Options whose value is no list; commas in it are commas."""
_FLAGS: Final = ("no-reboot", "nographic", "snapshot")
"""Options without a value; the second is what there is anyway."""
_REFUSED: Final = ("virtfs", "fsdev")
_INSTEAD: Final = (
    "9p is not modelled; remedy: virtiofsd listening at S, with -chardev socket,id=C,path=S and "
    "-device vhost-user-fs-device,chardev=C,tag=T"
)
"""What somebody who knows QEMU would try, and what to do instead."""


def _object(text: str) -> tuple[str, dict[str, Any]]:
    """One `-object`: its type and its properties; `id` is among them."""
    kind, found = kind_and_rest(text, "qom-type", _OBJECTS, "-object", word="type")
    where = f"-object {kind},id={found.get('id', '')}"
    values = convert_all(found, _OBJECTS[kind], where)
    if "id" not in values:
        raise UsageError(f"-object {kind}: property 'id' is missing")
    return kind, values


def _options(
    argv: Sequence[str],
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[str, dict[str, Any]]], list[tuple[str, str]]]:
    """Options by name, objects by id, and the options that make devices, in order."""
    options: dict[str, dict[str, Any]] = {}
    objects: dict[str, tuple[str, dict[str, Any]]] = {}
    devices: list[tuple[str, str]] = []
    names = (*_OPTIONS, "object", *DEVICE_OPTIONS, *_PLAIN, *_FLAGS)
    words = iter(argv)
    for word in words:
        name = word[2:] if word.startswith("--") else word[1:]
        name = _ALIASES.get(name, name)
        if word.startswith("-") and name in _REFUSED:
            raise UsageError(f"-{name}: {_INSTEAD}")
        if not word.startswith("-") or name not in names:
            known = ", ".join(f"-{each}" for each in names)
            raise UsageError(f"unknown option {word!r}; known are {known}")
        if name in _FLAGS:
            options[name] = {}
            continue
        if (value := next(words, None)) is None:
            raise UsageError(f"-{name}: wants a value")
        if name == "object":
            kind, values = _object(value)
            if values["id"] in objects:
                raise UsageError(f"-object {kind},id={values['id']}: this id is taken")
            objects[values["id"]] = (kind, values)
        elif name in DEVICE_OPTIONS:
            devices.append((name, value))
        elif name in options:
            raise UsageError(f"-{name}: given twice")
        elif name in _PLAIN:
            options[name] = {"text": value}
        else:
            implied, known_properties = _OPTIONS[name]
            where = f"-{name}"
            options[name] = convert_all(comma_list(value, implied, where), known_properties, where)
    return options, objects, devices


# --- what the options mean together -------------------------------------------------------------------------


def parse_qemu_options(argv: Sequence[str], *, host_cbitpos: int = MODEL_CBITPOS) -> QemuOptions:
    """Parse the arguments of a `qemu-system-x86_64` command line, without the program's name.

    Args:
        argv: the arguments.
        host_cbitpos: the C-bit position that `cbitpos` must name.

    Raises:
        UsageError: anything that QEMU would refuse, or that is not modelled: option, property, got, wanted.
    """
    options, objects, devices = _options(argv)
    loaded = _loaded({name: options[name]["text"] for name in _PLAIN if name in options})
    direct = loaded["kernel"] is not None and loaded["bios"] is None
    machine = options.get("machine", {"type": "q35"} if direct else {})
    smp = options.get("smp", {})
    maxcpus = smp.get("maxcpus", smp.get("cpus", 1))
    cpus = smp.get("cpus", maxcpus)
    if maxcpus < cpus:
        raise UsageError(f"-smp: maxcpus {maxcpus}, wanted at least cpus, {cpus}")
    cpu_model = options.get("cpu", {}).get("model", _DEFAULT_CPU if direct else "")
    ordinary = direct and "machine" in options and "confidential-guest-support" not in machine
    if direct and "confidential-guest-support" not in machine:
        _no_object_in_vain(objects)
    parsed = QemuOptions(
        name=options.get("name", {}).get("guest", "vm0"),
        cpus=cpus,
        maxcpus=maxcpus,
        cpu_model=cpu_model,
        product=_product(cpu_model),
        machine=_machine_type(machine),
        accelerator=_accelerator(options.get("accel", {}).get("accel", ACCELERATORS[direct]), direct=direct),
        memory_size=_memory_size(machine, options.get("m", {}), objects),
        snp=_snp_guest(machine, objects, None if direct else host_cbitpos),
        no_reboot="no-reboot" in options,
        ordinary=ordinary,
        devices=devices_of(devices, snapshot="snapshot" in options),
        **loaded,
    )
    if devices and not direct:
        raise UsageError(
            f"-{devices[0][0]}: wanted -kernel with it, and no -bios: no other guest has devices"
        )
    if parsed.snp.kernel_hashes and None in (parsed.kernel, parsed.bios):
        raise UsageError("sev-snp-guest: property 'kernel-hashes': got on, wanted -bios and -kernel with it")
    return parsed


def _no_object_in_vain(objects: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
    """An SNP guest that nothing refers to would be ignored in silence."""
    for name, (kind, _) in objects.items():
        if kind == "sev-snp-guest":
            raise UsageError(
                f"-object {kind},id={name}: nothing refers to it, wanted "
                f"-machine q35,confidential-guest-support={name}"
            )


def _loaded(texts: Mapping[str, str]) -> dict[str, Any]:
    """-bios, -kernel, -initrd, -append and -serial; what QEMU wants of them together."""
    for name in ("initrd", "append"):
        if name in texts and "kernel" not in texts:
            raise UsageError(f"-{name}: only allowed with -kernel")
    serial = texts.get("serial", "stdio")
    if serial.removeprefix("mon:") != "stdio" and not serial.removeprefix("file:").strip():
        raise UsageError("-serial: wanted a file's name behind file:")
    if serial.removeprefix("mon:") != "stdio" and not serial.startswith("file:"):
        raise UsageError(f"-serial: got {serial!r}, wanted stdio, mon:stdio or file:NAME")
    files = {name: Path(texts[name]) if name in texts else None for name in ("bios", "kernel", "initrd")}
    return {**files, "append": texts.get("append", ""), "serial": serial}


def _product(cpu_model: str) -> Product:
    for prefix, product in _CPU_MODELS.items():
        if cpu_model == prefix or cpu_model.startswith(f"{prefix}-v"):
            return product
    known = ", ".join(f"{prefix}[-vN]" for prefix in _CPU_MODELS)
    raise UsageError(f"-cpu: got model {cpu_model!r}, wanted one of {known}")


def _machine_type(machine: Mapping[str, Any]) -> str:
    kind = str(machine.get("type", ""))
    if kind != "q35" and not kind.startswith("pc-q35-"):
        raise UsageError(f"-machine: got type {kind!r}, wanted q35 or pc-q35-N")
    return kind


def _accelerator(name: str, *, direct: bool) -> str:
    if name not in ACCELERATORS:
        raise UsageError(f"-accel: got {name!r}, wanted one of {', '.join(ACCELERATORS)}")
    if (name == "kvm") != direct:
        wanted = "kvm with -kernel and no -bios" if direct else "builtin, or -kernel without -bios"
        raise UsageError(f"-accel: got {name!r}, wanted {wanted}")
    return name


def _referred(
    machine: Mapping[str, Any], key: str, kinds: str, objects: Mapping[str, tuple[str, dict[str, Any]]]
) -> dict[str, Any]:
    """The object that a property of -machine names; its type begins with `kinds`."""
    name = machine[key]
    if name not in objects:
        known = ", ".join(objects) or "none"
        raise UsageError(f"-machine: property {key!r}: no object with id {name!r}; there are {known}")
    kind, values = objects[name]
    if not kind.startswith(kinds):
        raise UsageError(f"-machine: property {key!r}: object {name!r} is {kind}, wanted {kinds}")
    return values


def _memory_size(
    machine: Mapping[str, Any], m: Mapping[str, Any], objects: Mapping[str, tuple[str, dict[str, Any]]]
) -> int:
    if "memory-backend" not in machine:
        return int(m.get("size", _DEFAULT_MEMORY))
    backend = _referred(machine, "memory-backend", "memory-backend-", objects)
    if "size" not in backend:
        raise UsageError(f"-object {backend['id']}: property 'size' is missing")
    wanted = int(backend["size"])
    if m.get("size", wanted) != wanted:
        raise UsageError(
            f"-m: got {m['size']:#x}, wanted the size of {backend['id']!r}, {wanted:#x}, or no -m"
        )
    return wanted


def _snp_guest(
    machine: Mapping[str, Any], objects: Mapping[str, tuple[str, dict[str, Any]]], host_cbitpos: int | None
) -> SnpGuest:
    """The SNP guest; `host_cbitpos` None: `cbitpos` may be left out, and is judged when the host is known."""
    if "confidential-guest-support" not in machine and host_cbitpos is None:
        return SnpGuest(id="sev0", cbitpos=None, reduced_phys_bits=1)
    if "confidential-guest-support" not in machine:
        raise UsageError("-machine: property 'confidential-guest-support' is missing; only SNP guests run")
    values = dict(_referred(machine, "confidential-guest-support", "sev-snp-guest", objects))
    where = f"-object sev-snp-guest,id={values['id']}"
    if host_cbitpos is None:
        values = {"cbitpos": None, "reduced-phys-bits": 1, **values}
    if "reduced-phys-bits" not in values:
        raise UsageError(f"{where}: property 'reduced-phys-bits' is missing, wanted 1..63")
    if (cbitpos := values.setdefault("cbitpos", 0)) != host_cbitpos and host_cbitpos is not None:
        raise UsageError(f"{where}: property 'cbitpos': got {cbitpos}, wanted the host's {host_cbitpos}")
    if "certs-path" in values and "certs-filename" in values:
        raise UsageError(f"{where}: 'certs-path' and 'certs-filename' are the same property; give one")
    if "certs-filename" in values:
        values["certs-path"] = values.pop("certs-filename")
    if "guest-visible-workarounds" in values:
        values["gosvw"] = values.pop("guest-visible-workarounds")
    if "certs-timeout" in values:
        values["certs-timeout-s"] = values.pop("certs-timeout") / 1000
    return SnpGuest(**{key.replace("-", "_"): value for key, value in values.items()})
