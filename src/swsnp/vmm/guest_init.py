"""The first program of a guest: machine code, written for each guest.

Source: Linux, system calls of x86-64; System V ABI, ELF-64; AMD64 Architecture Programmer's Manual, volume 3.

No compiler and no shell are needed: the program is a list of system calls with everything baked in. It mounts
file systems and loads modules in order. Then it runs one program, waits, and writes the program's exit status
to a port; or it mounts a root file system, moves into it and becomes the first program there.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["EXIT_PORT", "INIT_FAILED", "NOT_EXECUTED", "InitPlan", "RootPlan", "build_init"]

EXIT_PORT: Final = 0xF4
INIT_FAILED: Final = 125
"""Status when something failed before the program: modules, mounts, the port."""
NOT_EXECUTED: Final = 127
"""Status when the program could not be executed."""

_BASE: Final = 0x400000
_HEADERS: Final = 64 + 56
_RAX, _RDX, _RSI, _RDI, _R8, _R10 = 0, 2, 6, 7, 8, 10
_ARGUMENTS: Final = (_RDI, _RSI, _RDX, _R10, _R8)
_WRITE, _OPEN, _CLOSE, _IOCTL, _DUP2, _PAUSE, _NANOSLEEP = 1, 2, 3, 16, 33, 34, 35
_FORK, _EXECVE, _EXIT, _WAIT4, _SETSID = 57, 59, 60, 61, 112
_CHDIR, _CHROOT = 80, 161
_MOUNT, _REBOOT, _IOPERM, _FINIT_MODULE = 165, 169, 173, 313
_MS_RDONLY, _MS_MOVE = 1, 8192
_ENOENT, _ENXIO, _EEXIST = 2, 6, 17
_O_RDWR_NOCTTY_CLOEXEC: Final = 0o2000402
_TCSETS, _TCSBRK = 0x5402, 0x5409
_RAW: Final = struct.pack("<IIIIB19s", 0, 0, 0o10002 | 0o60 | 0o200 | 0o4000, 0, 0, bytes([0] * 6 + [1]))
"""struct termios: bytes go through as they are; 115,200 baud, 8 bits, receiver on, no modem lines."""
_PAUSE_TIME: Final = struct.pack("<QQ", 0, 10_000_000)
"""struct timespec: 10 ms."""
_TRIES: Final = 1000
_POWER_OFF: Final = (0xFEE1DEAD, 672274793, 0x4321FEDC)
_STDIN, _STDOUT, _STDERR = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RootPlan:
    """A root file system: its device, type, and options as mount(2) takes them; programs to become, by rank.

    `where` is the directory that it is mounted on first.
    """

    device: str
    kind: str
    read_only: bool
    options: str
    init: tuple[str, ...]
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InitPlan:
    """What the program does.

    `modules` are paths in the guest, in order; `mounts` are type and directory; `input` is what the program
    reads, and `output` takes what it writes, byte for byte: a file and a terminal, or virtio ports
    (`by_ports`). What it says on stderr goes to the console. With `root` there is no such program, and
    `argv`, `environment`, `input` and `output` mean nothing.
    """

    argv: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    mounts: tuple[tuple[str, str], ...] = ()
    late_mounts: tuple[tuple[str, str], ...] = ()
    input: str = "/dev/null"
    output: str = "/dev/ttyS1"
    by_ports: bool = False
    root: RootPlan | None = None


def build_init(plan: InitPlan) -> bytes:
    """An ELF-64 executable that needs nothing but the kernel."""
    code = _Code()
    code.emit("49 89 E4")  # mov r12, rsp: the arguments that the kernel gave
    for kind, where in plan.mounts:
        _mount(code, kind, where)
    for path in plan.modules:
        _load_module(code, path)
    for kind, where in plan.late_mounts:  # of file systems that modules brought
        _mount(code, kind, where)
    if plan.root is not None:
        _become(code, plan.root, [where for _, where in plan.mounts])
        return code.linked()
    _terminals(code, plan)
    _run(code, plan)
    return code.linked()


class _Code:
    """Machine code with its data behind it; addresses of data are known when the code is whole."""

    def __init__(self) -> None:
        self._code = bytearray()
        self._data = bytearray()
        self._places: list[tuple[int, int]] = []
        self._jumps: list[tuple[int, str]] = []
        self._labels: dict[str, int] = {}
        self.messages: list[tuple[str, bytes]] = []

    # Data

    def data(self, raw: bytes) -> _Place:
        """Bytes, aligned to eight."""
        self._data += bytes(-len(self._data) % 8)
        at = len(self._data)
        self._data += raw
        return _Place(at)

    def text(self, text: str) -> _Place:
        """A string with its NUL."""
        return self.data(text.encode(errors="surrogateescape") + b"\0")

    def table(self, texts: Sequence[str]) -> _Place:
        """Pointers to strings, and a null pointer; the code fills it when it runs."""
        places = [self.text(each) for each in texts]
        table = self.data(bytes(8 * len(places) + 8))
        for number, place in enumerate(places):
            self.move(_RAX, place)
            self.move(_RDI, _Place(table.offset + 8 * number))
            self.emit("48 89 07")  # mov [rdi], rax
        return table

    # Code

    def emit(self, encoding: str) -> None:
        """Instructions, in hexadecimal."""
        self._code += bytes.fromhex(encoding)

    def move(self, register: int, value: int | _Place) -> None:
        """32 bits into a register, whose upper half becomes zero."""
        self._code += bytes([0x41] if register >= 8 else []) + bytes([0xB8 + register % 8])
        if isinstance(value, _Place):
            self._places.append((len(self._code), value.offset))
            value = 0
        self._code += struct.pack("<I", value & 0xFFFFFFFF)

    def call(self, number: int, *arguments: int | _Place) -> None:
        """A system call; the result is in rax."""
        for register, value in zip(_ARGUMENTS, arguments, strict=False):
            self.move(register, value)
        self.move(_RAX, number)
        self.emit("0F 05")

    def label(self, name: str) -> None:
        """A place to jump to."""
        self._labels[name] = len(self._code)

    def jump(self, opcode: str, name: str) -> None:
        """A jump with a 32-bit distance: E9, or 0F 8x."""
        self.emit(opcode)
        self._jumps.append((len(self._code), name))
        self._code += bytes(4)

    def must(self, what: str) -> None:
        """Give up, saying `what` and the error's number, when rax is negative."""
        name = f"failed {len(self.messages)}"
        self.messages.append((name, f"swsnp init: {what}: errno ".encode()))
        self.emit("48 85 C0")  # test rax, rax
        self.jump("0F 88", name)

    def linked(self) -> bytes:
        """The executable: one segment for everything."""
        for at, name in self._jumps:
            struct.pack_into("<i", self._code, at, self._labels[name] - at - 4)
        start = _BASE + _HEADERS + len(self._code)
        start += -start % 8
        for at, offset in self._places:
            struct.pack_into("<I", self._code, at, start + offset)
        body = bytes(self._code).ljust(start - _BASE - _HEADERS, b"\0") + self._data
        size = _HEADERS + len(body)
        ident = b"\x7fELF\2\1\1".ljust(16, b"\0")
        header = ident + struct.pack(
            "<HHIQQQIHHHHHH", 2, 62, 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 1, 64, 0, 0
        )
        return header + struct.pack("<IIQQQQQQ", 1, 7, 0, _BASE, _BASE, size, size, 0x1000) + body


@dataclass(frozen=True, slots=True)
class _Place:
    """Data, by its offset in the data."""

    offset: int


# The steps


def _mount(code: _Code, kind: str, where: str) -> None:
    name = code.text(kind)
    code.call(_MOUNT, name, code.text(where), name, 0, 0)
    code.must(f"mount {kind} at {where}")


def _become(code: _Code, root: RootPlan, mounts: Sequence[str]) -> None:
    """Mount the root, take what is mounted already along, and go on as its first program."""
    where, options = code.text(root.where), code.text(root.options)
    flags = _MS_RDONLY if root.read_only else 0
    code.call(_MOUNT, code.text(root.device), where, code.text(root.kind), flags, options)
    code.must(f"mount {root.device} as {root.kind}")
    for each in mounts:
        code.call(_MOUNT, code.text(each), code.text(root.where + each), 0, _MS_MOVE, 0)
        code.must(f"move {each} into {root.device}")
    here, top = code.text("."), code.text("/")
    code.call(_CHDIR, where)
    code.call(_MOUNT, here, top, 0, _MS_MOVE, 0)
    code.must(f"move {root.device} to /")
    code.call(_CHROOT, here)
    code.must("change root")
    code.call(_CHDIR, top)
    for path in root.init:
        name = code.text(path)
        code.move(_RDI, name)
        code.emit("49 89 7C 24 08")  # mov [r12+8], rdi: argv[0]
        code.emit("49 8D 74 24 08")  # lea rsi, [r12+8]
        code.emit("49 8B 14 24 49 8D 54 D4 10")  # mov rdx, [r12]; lea rdx, [r12+8*rdx+16]
        code.move(_RAX, _EXECVE)
        code.emit("0F 05")
        _say(code, f"swsnp init: execute {path}: errno ".encode())
    code.emit(f"BB {NOT_EXECUTED:02X} 00 00 00")  # mov ebx, status
    _end(code)
    _failures(code)


def _load_module(code: _Code, path: str) -> None:
    code.call(_OPEN, code.text(path), 0)
    code.must(f"open {path}")
    code.emit("48 89 C3 48 89 C7")  # mov rbx, rax; mov rdi, rax
    code.move(_RSI, code.text(""))
    code.move(_RDX, 0)
    code.move(_RAX, _FINIT_MODULE)
    code.emit("0F 05")
    loaded = f"loaded {path}"
    code.emit(f"48 83 F8 {256 - _EEXIST:02X}")  # cmp rax, -EEXIST: it is there already
    code.jump("0F 84", loaded)
    code.must(f"load {path}")
    code.label(loaded)
    code.emit("48 89 DF")  # mov rdi, rbx
    code.move(_RAX, _CLOSE)
    code.emit("0F 05")


def _terminals(code: _Code, plan: InitPlan) -> None:
    """Input and output as they are, errors to the console; nothing becomes of line feeds.

    A port that gives input is written to, which waits until the kernel knows that it is open at the host,
    where that byte is waited for: else a port not open yet would be taken for one at its end.
    """
    raw = code.data(_RAW)
    for descriptor, path in enumerate((plan.input, plan.output)):
        _open(code, path, waits=plan.by_ports)
        code.must(f"open {path}")
        code.emit("48 89 C7")  # mov rdi, rax
        code.move(_RSI, descriptor)
        code.move(_RAX, _DUP2)
        code.emit("0F 05")
    if plan.by_ports:
        code.call(_WRITE, _STDIN, code.text(""), 1)
        code.must(f"write to {plan.input}")
    else:
        code.call(_IOCTL, _STDOUT, _TCSETS, raw)
        code.must(f"set {plan.output}, the second serial port")
    code.call(_IOCTL, _STDERR, _TCSETS, raw)


def _open(code: _Code, path: str, *, waits: bool) -> None:
    """Open a file; one that comes a moment after its module is waited for."""
    again, missing, opened = f"open {path} again", f"no {path}", f"opened {path}"
    if waits:
        code.emit(f"41 BD {_TRIES.to_bytes(4, 'little').hex()}")  # mov r13d, tries
        code.label(again)
    code.call(_OPEN, code.text(path), _O_RDWR_NOCTTY_CLOEXEC)
    if waits:
        code.emit(f"48 83 F8 {256 - _ENOENT:02X}")  # cmp rax, -ENOENT
        code.jump("0F 84", missing)
        code.emit(f"48 83 F8 {256 - _ENXIO:02X}")  # cmp rax, -ENXIO: the name is there, its device not yet
        code.jump("0F 85", opened)
        code.label(missing)
        code.emit("49 89 C6")  # mov r14, rax
        code.call(_NANOSLEEP, code.data(_PAUSE_TIME), 0)
        code.emit("4C 89 F0")  # mov rax, r14
        code.emit("41 FF CD")  # dec r13d
        code.jump("0F 85", again)
        code.label(opened)


def _run(code: _Code, plan: InitPlan) -> None:
    argv, environment = code.table(plan.argv), code.table(plan.environment)
    status = code.data(bytes(8))
    code.call(_FORK)
    code.must("fork")
    code.jump("0F 84", "child")  # flags of the test in `must`
    code.emit("49 89 C6")  # mov r14, rax
    code.label("wait")  # orphans end here too
    code.move(_RDI, 0)
    code.emit("48 FF CF")  # dec rdi: -1, any child
    code.move(_RSI, status)
    code.move(_RDX, 0)
    code.move(_R10, 0)
    code.move(_RAX, _WAIT4)
    code.emit("0F 05 4C 39 F0")  # syscall; cmp rax, r14
    code.jump("0F 85", "wait")
    code.move(_RSI, status)
    code.emit("8B 1E 89 D9 83 E1 7F")  # mov ebx, [rsi]; mov ecx, ebx; and ecx, 127
    code.jump("0F 84", "exited")
    code.emit("8D 99 80 00 00 00")  # lea ebx, [rcx + 128]: ended by a signal, as a shell says it
    code.jump("E9", "end")
    code.label("exited")
    code.emit("C1 EB 08")  # shr ebx, 8
    _end(code)
    code.label("child")
    code.call(_SETSID)
    code.call(_EXECVE, code.text(plan.argv[0]), argv, environment)
    _say(code, f"swsnp init: execute {plan.argv[0]}: errno ".encode())
    code.call(_EXIT, NOT_EXECUTED)
    _failures(code)


def _end(code: _Code) -> None:
    """Wait until the terminals are empty, then write the status in ebx to the port; else power off."""
    code.label("end")
    for descriptor in (_STDOUT, _STDERR):
        code.call(_IOCTL, descriptor, _TCSBRK, 1)
    code.call(_IOPERM, EXIT_PORT, 1, 1)
    code.emit("48 85 C0")
    code.jump("0F 85", "no port")
    code.move(_RDX, EXIT_PORT)
    code.emit("89 D8 EE")  # mov eax, ebx; out dx, al
    code.label("no port")
    code.call(_REBOOT, *_POWER_OFF)
    code.label("forever")
    code.call(_PAUSE)
    code.jump("E9", "forever")


def _failures(code: _Code) -> None:
    for name, message in code.messages:
        code.label(name)
        _say(code, message)
        code.jump("E9", "give up")
    code.label("give up")
    code.emit(f"BB {INIT_FAILED:02X} 00 00 00")  # mov ebx, status
    code.jump("E9", "end")


def _say(code: _Code, message: bytes) -> None:
    """Write the message and -rax, three digits."""
    whole = message + b"000\n"
    place = code.data(whole)
    code.emit("F7 D8")  # neg eax
    for digit in (2, 1, 0):
        code.move(_RDI, _Place(place.offset + len(message) + digit))
        code.emit("31 D2 B9 0A 00 00 00 F7 F1 00 17")  # eax, edx = divmod(eax, 10); add [rdi], dl
    code.call(_WRITE, _STDERR, place, len(whole))
