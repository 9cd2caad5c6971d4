"""The mailbox under any sequence of commands, right and wrong, over a few pages and guests.

The reference is small on purpose: which page states and guest states a command may change (AMD 56860, page
states and guest states), and when it may succeed at all. Which status tells what is the unit tests' concern.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from tests.property.steps import CountedMachine, machine_test
from tests.unit.firmware.conftest import Rig

from swsnp.abi.snp_command import (
    Activate,
    Command,
    Commit,
    Config,
    ConfigFlags,
    GctxAddress,
    GuestRequest,
    GuestStatus,
    InitEx,
    InitExFlags,
    LaunchFinish,
    LaunchFinishFlags,
    LaunchStart,
    LaunchStartFlags,
    LaunchUpdate,
    LaunchUpdateInfo,
    PageReclaim,
    PageType,
    PlatformStatus,
    ShutdownEx,
)
from swsnp.abi.snp_launch import SecretsPage
from swsnp.abi.snp_message import MessageHeader
from swsnp.abi.snp_report import GuestPolicy, TcbVersion
from swsnp.crypto.seal import MessageKey
from swsnp.firmware.context import GuestContext
from swsnp.hardware.rmp import RmpUpdate

if TYPE_CHECKING:
    from swsnp.hardware.rmp import RmpEntry

ASIDS = (1, 2, 3)
CIPHERTEXT = b"\xee" * 4096
OFFSETS = [0] * 12 + [0x10, 0xFF0]
SIZES = {3: 32, 5: 96}  # MSG_KEY_REQ, MSG_REPORT_REQ
WRONG_MESSAGES = [""] * 6 + ["seqno", "again", "tag", "vmpck", "size", "version", "algo", "offset"]
wrong = st.sampled_from(WRONG_MESSAGES)
seldom = st.sampled_from([0] * 9 + [1])

# From and to, by command. AMD 56860, page states; what is not listed changes no page.
PAGES: dict[int, set[tuple[str, str]]] = {
    Command.SNP_GCTX_CREATE: {("Firmware", "Context")},
    Command.SNP_DECOMMISSION: {("Context", "Firmware")},
    Command.SNP_LAUNCH_UPDATE: {("Pre-Guest", "Guest-Valid")},
    Command.SNP_PAGE_RECLAIM: {
        ("Firmware", "Reclaim"),
        ("Metadata", "Reclaim"),
        ("Pre-Guest", "Guest-Invalid"),
        ("Pre-Swap", "Guest-Valid"),
    },
    Command.SNP_PAGE_SET_STATE: {("Firmware", "HV-Fixed")},
    Command.SNP_PAGE_MD_INIT: {("Firmware", "Metadata")},
    Command.SNP_PAGE_SWAP_OUT: {("Metadata", "Firmware"), ("Pre-Swap", "Pre-Guest")},
    Command.SNP_PAGE_SWAP_IN: {("Firmware", "Metadata"), ("Pre-Guest", "Pre-Swap")},
    Command.SNP_PAGE_MOVE: {
        ("Firmware", "Metadata"),
        ("Metadata", "Firmware"),
        ("Pre-Guest", "Guest-Invalid"),
        ("Pre-Guest", "Guest-Valid"),
        ("Pre-Swap", "Guest-Invalid"),
        ("Pre-Swap", "Guest-Valid"),
    },
}
INITS = (Command.SNP_INIT, Command.SNP_INIT_EX)
SHUTDOWNS = (Command.SNP_SHUTDOWN, Command.SNP_SHUTDOWN_EX)

# Guest states, None: no guest. AMD 56860, guest states.
GUESTS: dict[int, set[tuple[int | None, int | None]]] = {
    Command.SNP_GCTX_CREATE: {(None, 0)},
    Command.SNP_LAUNCH_START: {(0, 1)},
    Command.SNP_LAUNCH_FINISH: {(1, 2)},
    Command.SNP_DECOMMISSION: {(0, None), (1, None), (2, None)},
    **{each: {(0, None), (1, None), (2, None)} for each in (*INITS, *SHUTDOWNS)},
}
# Fields of the context that change while the guest's state stays
CHANGES: dict[int, set[str]] = {
    Command.SNP_ACTIVATE: {"asid", "active", "sockets"},
    Command.SNP_LAUNCH_UPDATE: {"ld", "imd"},
    Command.SNP_GUEST_REQUEST: {"message_counts", "report_template"},
    Command.SNP_PAGE_SWAP_OUT: {"oek_iv_count", "root_md_entry"},
    Command.SNP_PAGE_SWAP_IN: {"root_md_entry"},
}
WRITABLE = ("Firmware", "Pre-Guest", "Pre-Swap", "Metadata")
MOVES = (Command.SNP_PAGE_MOVE, Command.SNP_PAGE_SWAP_IN)  # these give a page another address in the guest
RULES = (
    *GUESTS,
    Command.SNP_ACTIVATE,
    Command.SNP_DF_FLUSH,
    Command.SNP_LAUNCH_UPDATE,
    Command.SNP_GUEST_REQUEST,
    Command.GET_ID,
)
FIELDS = tuple(each.name for each in fields(GuestContext))
SECRET_FIELDS = ("vek", "oek", "vmrk")

POLICIES = {  # value: whether this part takes it
    0x30000: True,
    0x30000 | 1 << 18: True,
    0x30000 | 1 << 20: True,
    0x30000 | 1 << 19: True,
    0x10000: False,  # bit 17 must be one
    0x3FF00: False,  # newer than any firmware
    1 << 63 | 0x30000: False,
}


@dataclass
class Guest:
    """What the reference knows of a guest."""

    number: int
    state: int = 0
    asid: int = 0
    imi: bool = False
    policy: int = 0
    agent: bool = False
    counts: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    keys: list[MessageKey] = field(default_factory=list)


@dataclass
class Snapshot:
    """Everything that a command could change."""

    rmp: dict[int, RmpEntry]
    memory: dict[int, bytes]
    guests: dict[int, dict[str, Any]]
    platform: tuple[Any, ...]


class FirmwareMachine(CountedMachine):
    """Only legal transitions; a failure changes nothing; counters move by success; keys stay inside."""

    @initialize()
    def power_on(self) -> None:
        self.rig = Rig(max_asid=ASIDS[-1])
        self.contexts = [self.rig.memory.allocate_page() for _ in range(3)]
        self.others = [self.rig.memory.allocate_page() for _ in range(6)]
        self.pages = [*self.contexts, *self.others]
        self.guests: dict[int, Guest] = {}
        self.asids = dict.fromkeys(ASIDS, "clean")
        self.initialised = self.rmp_ready = self.flushed = True
        self.launches = 0
        self.secrets: dict[bytes, int] = {}  # key: launch that it belongs to
        self.holds: dict[int, int] = {}  # page: launch whose secrets page it is
        self.now = self.snapshot()

    # what a command did

    def snapshot(self) -> Snapshot:
        platform, rig = self.rig.platform, self.rig
        guests = {}
        for gctx, guest in platform.guests.items():
            values = {name: getattr(guest, name) for name in FIELDS}
            values["message_counts"] = list(guest.message_counts)
            guests[gctx] = values
        return Snapshot(
            {page: rig.rmp[page] for page in self.pages},
            {page: rig.memory.read(page, 4096) for page in self.pages},
            guests,
            (platform.state, platform.rmp_initialised_for, dict(platform.asids), rig.chip.variables),
        )

    def state(self, page: int) -> str:
        return str(self.rig.rmp.state(page).value)

    def issue(self, command: int, record: object, *, legal: bool | None = None) -> bool:
        """Issue one command and hold what happened against the tables; whether it succeeded.

        `legal`: whether the reference lets it succeed; None: the reference does not know the command.
        """
        buffer = bytes(record)  # type: ignore[call-overload]  # records and bytes
        self.rig.memory.write(self.rig.buffer, buffer.ljust(64, b"\0"))
        before = self.now
        status = self.rig.mailbox.command(command, self.rig.buffer)
        self.now = after = self.snapshot()
        assert legal is None or (status == 0) == legal, f"{command:#x}: status {status:#x}, legal {legal}"
        if status:
            checked_page = command == Command.SNP_LAUNCH_UPDATE and buffer[8] >> 1 & 7 == PageType.CPUID
            if not checked_page:  # a refused CPUID page goes back corrected
                assert before.memory == after.memory
            assert (before.rmp, before.guests, before.platform) == (after.rmp, after.guests, after.platform)
            return False
        self.check_pages(command, before, after)
        self.check_guests(command, int.from_bytes(buffer[:8], "little"), before, after)
        return True

    def check_pages(self, command: int, before: Snapshot, after: Snapshot) -> None:
        for page, old in before.rmp.items():
            new = after.rmp[page]
            if command in INITS:
                assert new in (old, type(new)(), type(new)(immutable=True))
            elif old.state is new.state:
                assert old == new, f"{command:#x} changed {old} to {new}"
            else:
                moved = (old.state.value, new.state.value)
                assert moved in PAGES.get(command, set()), f"{command:#x}: {moved}"
                assert old.asid == new.asid
                assert old.gpa == new.gpa or not old.asid or command in MOVES
            written = before.memory[page] != after.memory[page]
            if written and before.platform[0]:  # initialised: the firmware writes its own pages only
                assert old.state.value in ("Firmware", "Pre-Guest", "Pre-Swap", "Metadata"), (
                    f"{command:#x}: {old}"
                )
            # whoever may debug a guest may read it; what left a guest with the RMP is ciphertext: see `init`
            gone = command in INITS and old.asid
            if (written or old != new) and command != Command.SNP_DBG_DECRYPT and not gone:
                self.no_key_in(page, new)

    def check_guests(self, command: int, named: int, before: Snapshot, after: Snapshot) -> None:
        for gctx in before.guests.keys() | after.guests.keys():
            old, new = before.guests.get(gctx), after.guests.get(gctx)
            if old == new:
                continue
            moved = (old and old["state"], new and new["state"])
            assert gctx == named or command in (*INITS, *SHUTDOWNS), f"{command:#x} changed another guest"
            if old and new and moved[0] == moved[1]:
                changed = {name for name in FIELDS if old[name] != new[name]}
                assert changed <= CHANGES.get(command, set()), f"{command:#x}: {changed}"
            else:
                assert moved in GUESTS.get(command, set()), f"{command:#x}: {moved}"

    def no_key_in(self, page: int, entry: RmpEntry) -> None:
        """A guest's keys are nowhere but in the secrets page of that guest."""
        data, held = self.now.memory[page], self.holds.get(page) if entry.asid else None
        assert not [owner for key, owner in self.secrets.items() if owner != held and key in data]

    def learn_secrets(self, gctx: int) -> None:
        context = self.rig.platform.guests[gctx]
        for key in (*(getattr(context, name) for name in SECRET_FIELDS), *context.vmpcks):
            if key:
                self.secrets[key] = self.guests[gctx].number

    # what a host may do without the firmware

    def rmpupdate(self, page: int, new: RmpUpdate) -> None:
        old = self.rig.rmp[page]
        if self.rig.rmp.rmpupdate(page, new) == 0 and old.asid and old.asid != new.asid:
            self.left_the_guest(page)
        self.now = self.snapshot()

    def left_the_guest(self, page: int) -> None:
        """What others see of a guest's page is ciphertext: the processor's part, not the firmware's."""
        self.holds.pop(page, None)
        self.rig.memory.write(page, CIPHERTEXT)

    @rule(n=st.integers(0, 8), kind=st.integers(0, 5), asid=st.sampled_from(ASIDS), gpa=st.integers(0, 3))
    def host_changes_a_page(self, n: int, kind: int, asid: int, gpa: int) -> None:
        guests = kind in (3, 4)
        self.rmpupdate(
            self.pages[n],
            RmpUpdate(
                assigned=kind != 0,
                immutable=kind in (1, 2, 3),
                asid=asid if guests else 0,
                gpa=gpa << 12 if guests else 0,
            ),
        )

    @rule(n=st.integers(0, 8), data=st.integers(0, 255))
    def host_writes_its_own_page(self, n: int, data: int) -> None:
        if self.state(self.pages[n]) == "Hypervisor":
            self.rig.memory.write(self.pages[n], bytes([data]) * 4096)
            self.now = self.snapshot()

    @rule(n=st.integers(3, 8), validate=st.booleans())
    def guest_validates(self, n: int, validate: bool) -> None:
        entry = self.rig.rmp[self.pages[n]]
        self.rig.rmp.pvalidate(self.pages[n], asid=entry.asid or 1, gpa=entry.gpa, validate=validate)
        self.now = self.snapshot()

    @rule(done=st.sampled_from([True, True, False]))
    def cores_write_back_their_caches(self, done: bool) -> None:
        self.rig.platform.wbinvd_done = self.flushed = done

    # guests

    def live(self, gctx: int) -> Guest | None:
        return self.guests.get(gctx) if self.initialised and self.state(gctx) == "Context" else None

    @rule(n=st.integers(0, 8), offset=st.sampled_from(OFFSETS))
    def gctx_create(self, n: int, offset: int) -> None:
        page = self.pages[n]
        legal = self.initialised and self.state(page) == "Firmware" and not offset
        if self.issue(Command.SNP_GCTX_CREATE, GctxAddress(gctx_paddr=page + offset), legal=legal):
            self.launches += 1
            self.guests[page] = Guest(self.launches)
            self.learn_secrets(page)

    @rule(n=st.integers(0, 3), offset=st.sampled_from(OFFSETS), sure=st.integers(0, 2))
    def decommission(self, n: int, offset: int, sure: int) -> None:
        page = self.pages[n]
        guest = self.live(page)
        if sure and guest is not None and not offset:
            return
        legal = guest is not None and not offset
        if self.issue(Command.SNP_DECOMMISSION, GctxAddress(gctx_paddr=page + offset), legal=legal):
            assert guest is not None
            if guest.asid:
                self.asids[guest.asid] = "dirty" if self.asids[guest.asid] == "in use" else "clean"
            del self.guests[page]

    @rule(
        n=st.integers(0, 3),
        agent=st.sampled_from([None] * 5 + [0, 1, 2, 3]),
        flags=st.sampled_from([0] * 6 + [2, 4]),
        policy=st.sampled_from(sorted(POLICIES)),
    )
    def launch_start(self, n: int, agent: int | None, flags: int, policy: int) -> None:
        page = self.pages[n]
        guest = self.live(page)
        legal = guest is not None and guest.state == 0 and flags in (0, 2) and POLICIES[policy]
        if agent is not None:
            flags |= 1
            other = self.live(self.pages[agent])
            fits = other is not None and not other.agent and bool(policy >> 18 & 1)
            legal = legal and fits and (not policy >> 20 & 1 or bool(other and other.policy >> 20 & 1))
        record = LaunchStart(
            gctx_paddr=page,
            policy=GuestPolicy(policy),
            flags=LaunchStartFlags(flags),
            ma_gctx_paddr=self.pages[agent or 0],
        )
        if self.issue(Command.SNP_LAUNCH_START, record, legal=legal):
            assert guest is not None
            guest.state, guest.policy, guest.imi, guest.agent = 1, policy, bool(flags & 2), bool(flags & 1)
            self.learn_secrets(page)

    @rule(
        n=st.integers(0, 3),
        asid=st.sampled_from([*ASIDS, *ASIDS, 0, 4]),
        reserved=st.sampled_from([0] * 9 + [1]),
    )
    def activate(self, n: int, asid: int, reserved: int) -> None:
        page = self.pages[n]
        guest = self.live(page)
        legal = (
            guest is not None
            and guest.state > 0
            and guest.asid == 0
            and self.asids.get(asid) == "clean"
            and not any(entry.asid == asid for entry in self.now.rmp.values())
            and not reserved
        )
        record = Activate(gctx_paddr=page, asid=asid, reserved_0c=reserved)
        if self.issue(Command.SNP_ACTIVATE, record, legal=legal):
            assert guest is not None
            guest.asid = asid
            self.asids[asid] = "in use" if guest.state == 2 else "allocated"

    @rule(
        n=st.integers(0, 3),
        m=st.integers(0, 8),
        page_type=st.integers(0, 7),
        imi=st.integers(0, 1),
        wrong=st.sampled_from([""] * 8 + ["reserved", "size", "offset"]),
    )
    def launch_update(self, n: int, m: int, page_type: int, imi: int, wrong: str) -> None:
        gctx, page = self.pages[n], self.pages[m]
        guest, entry = self.live(gctx), self.rig.rmp[page]
        legal = (
            guest is not None
            and entry.state.value == "Pre-Guest"
            and 1 <= page_type <= 6
            and guest.state == 1
            and guest.asid != 0
            and guest.asid == entry.asid
            and bool(imi or not guest.imi)
            and not wrong
        )
        info = LaunchUpdateInfo.of(page_type=page_type, imi_page=imi, page_size=wrong == "size")
        record = LaunchUpdate(
            gctx_paddr=gctx,
            page_paddr=page + 8 * (wrong == "offset"),
            info=info,
            reserved_1c=int(wrong == "reserved"),
        )
        # a CPUID page is judged by its content
        judged = None if page_type == PageType.CPUID and legal else legal
        if legal and page_type == PageType.SECRETS:
            self.holds[page] = self.guests[gctx].number
        if self.issue(Command.SNP_LAUNCH_UPDATE, record, legal=judged) and page_type == PageType.SECRETS:
            assert guest is not None
            secrets = SecretsPage.parse(self.now.memory[page])
            keys = (secrets.vmpck0, secrets.vmpck1, secrets.vmpck2, secrets.vmpck3)
            guest.keys = [MessageKey(key) for key in keys]

    @rule(n=st.integers(0, 3), flags=st.sampled_from([0, 0, 0, 2, 4, 8]))
    def launch_finish(self, n: int, flags: int) -> None:
        page = self.pages[n]
        guest = self.live(page)
        legal = guest is not None and guest.state == 1 and guest.asid != 0 and not guest.imi and flags != 8
        record = LaunchFinish(gctx_paddr=page, flags=LaunchFinishFlags(flags))
        if self.issue(Command.SNP_LAUNCH_FINISH, record, legal=legal):
            assert guest is not None
            guest.state = 2
            self.asids[guest.asid] = "in use"

    @rule(n=st.integers(0, 2), steps=st.integers(1, 8))
    def host_launches_on(self, n: int, steps: int) -> None:
        """The next right steps on the way to a running guest, so that long ways are walked to their end."""
        for _ in range(steps):
            self.launch_on(n)

    def launch_on(self, n: int) -> None:
        page = self.contexts[n]
        guest = self.live(page)
        if guest is None:
            self.rmpupdate(page, RmpUpdate(assigned=True, immutable=True))
            self.gctx_create(n, 0)
        elif guest.state == 0:
            self.launch_start(n, None, 0, 0x30000)
        elif not guest.asid:
            free = [asid for asid, state in self.asids.items() if state == "clean"]
            self.activate(n, free[0], 0) if free else self.df_flush()
        elif not guest.keys:
            m = 3 + n
            self.rmpupdate(self.pages[m], RmpUpdate())
            new = RmpUpdate(assigned=True, immutable=True, asid=guest.asid, gpa=0x1000)
            self.rmpupdate(self.pages[m], new)
            self.launch_update(n, m, PageType.SECRETS, int(guest.imi), "")
        elif guest.state == 1:
            self.launch_finish(n, 0)

    # pages and platform

    @rule(
        n=st.integers(0, 8),
        size=st.sampled_from([0] * 7 + [1]),
        offset=st.sampled_from([0] * 7 + [2]),
    )
    def page_reclaim(self, n: int, size: int, offset: int) -> None:
        page = self.pages[n]
        entry = self.rig.rmp[page]
        reclaimable = entry.state.value in ("Metadata", "Firmware", "Pre-Guest", "Pre-Swap")
        legal = self.initialised and not size and not offset and (reclaimable or not entry.immutable)
        self.issue(Command.SNP_PAGE_RECLAIM, PageReclaim(page_paddr=page + offset | size), legal=legal)

    @rule(n=st.integers(0, 3), m=st.integers(0, 8), offset=st.sampled_from(OFFSETS))
    def guest_status(self, n: int, m: int, offset: int) -> None:
        gctx, page = self.pages[n], self.pages[m]
        legal = self.live(gctx) is not None and offset != 0xFF0 and self.state(page) == "Firmware"
        record = GuestStatus(gctx_paddr=gctx, status_paddr=page + offset)
        if self.issue(Command.SNP_GUEST_STATUS, record, legal=legal):
            guest = self.guests[gctx]
            got = struct.unpack_from("<QIB", self.now.memory[page], offset)
            assert got == (guest.policy, guest.asid, guest.state)

    @rule(m=st.integers(0, 8), offset=st.sampled_from(OFFSETS))
    def platform_status(self, m: int, offset: int) -> None:
        page = self.pages[m]
        legal = offset != 0xFF0 and (not self.initialised or self.state(page) == "Firmware")
        record = PlatformStatus(status_paddr=page + offset)
        if self.issue(Command.SNP_PLATFORM_STATUS, record, legal=legal):
            assert self.now.memory[page][offset + 2] == self.initialised
            (count,) = struct.unpack_from("<I", self.now.memory[page], offset + 0xC)
            assert count == sum(guest.state > 0 for guest in self.guests.values())

    @rule()
    def df_flush(self) -> None:
        if self.issue(Command.SNP_DF_FLUSH, b"", legal=self.flushed):
            for asid, state in self.asids.items():
                self.asids[asid] = "clean" if state == "dirty" else state

    @rule(
        extended=st.booleans(),
        length=st.sampled_from([8, 8, 8, 0]),
        flags=st.sampled_from([0, 1, 2, 3, 4]),
        sure=st.integers(0, 9),
    )
    def shutdown(self, extended: bool, length: int, flags: int, sure: int) -> None:
        """Seldom where it would succeed, since it ends every guest."""
        clean = set(self.asids.values()) == {"clean"}
        formed = not extended or (length == 8 and flags in (0, 1, 3))
        legal = not self.initialised or (clean and formed)
        if legal and self.initialised and sure:
            return
        command = Command.SNP_SHUTDOWN_EX if extended else Command.SNP_SHUTDOWN
        if self.issue(command, ShutdownEx(length=length, flags=flags), legal=legal) and self.initialised:
            self.initialised = False
            self.guests.clear()
            self.rmp_ready = self.rmp_ready and not (extended and flags & 1)

    @rule(flags=st.sampled_from([1, 1, 1, 0, 16, 32]))
    def init(self, flags: int) -> None:
        legal = not self.initialised and (flags == 1 or (flags == 0 and self.rmp_ready))
        owners = {page: entry.asid for page, entry in self.now.rmp.items()}
        if self.issue(Command.SNP_INIT_EX, InitEx(flags=InitExFlags(flags)), legal=legal):
            self.initialised = self.rmp_ready = True
            self.asids = dict.fromkeys(ASIDS, "dirty")
            for page in [page for page, asid in owners.items() if asid and flags]:
                self.left_the_guest(page)
            self.now = self.snapshot()

    @rule(
        above=st.sampled_from([None, None, -1, 0, 1]),
        masks=st.sampled_from([0, 0, 1, 2, 3, 4]),
        length=st.sampled_from([4, 4, 0, 8]),
        commit=st.booleans(),
    )
    def configure(self, above: int | None, masks: int, length: int, commit: bool) -> None:
        """SNP_CONFIG never raises the reported TCB above the committed one; SNP_COMMIT."""
        if commit:
            self.issue(Command.SNP_COMMIT, Commit(length=length), legal=length == 4)
            return
        committed = int(self.rig.chip.variables.committed_tcb)
        tcb = 0 if above is None else committed + (above << 48)  # SNP is byte 6 of Milan's and Genoa's
        legal = masks < 4 and (above is None or above <= 0)
        record = Config(reported_tcb=TcbVersion(tcb), flags=ConfigFlags(masks))
        if self.issue(Command.SNP_CONFIG, record, legal=legal):
            assert self.rig.chip.reported_tcb == (tcb or committed)

    # messages

    @rule(
        n=st.integers(0, 2),
        vmpck=st.integers(0, 3),
        request=st.integers(0, 8),
        response=st.integers(0, 8),
        kind=st.sampled_from([3, 5, 5, 0, 99]),
        wrong=st.sampled_from(
            [""] * 6 + ["seqno", "again", "tag", "vmpck", "size", "version", "algo", "offset"]
        ),
    )
    def guest_request(self, n: int, vmpck: int, request: int, response: int, kind: int, wrong: str) -> None:
        """Counters move by 2 with a success and not at all otherwise."""
        gctx = self.contexts[n]
        guest = self.live(gctx)
        keys = guest.keys if guest is not None and guest.keys else [MessageKey(bytes(32))] * 4
        count = guest.counts[vmpck] if guest is not None else 0
        payload = bytes(SIZES.get(kind, 16) - (8 if wrong == "size" else 0))
        header = MessageHeader(
            msg_seqno=count + {"seqno": 3, "again": -1 if count else 7}.get(wrong, 1),
            algo=2 if wrong == "algo" else 1,
            hdr_version=1,
            hdr_size=0x60,
            msg_type=kind,
            msg_version=9 if wrong == "version" else 1,
            msg_size=len(payload),
            msg_vmpck=7 if wrong == "vmpck" else vmpck,
        )
        message = bytearray(keys[vmpck].seal(header, payload).ljust(4096, b"\0"))
        message[0] ^= wrong == "tag"
        source, target = self.pages[request], self.pages[response]
        if self.rig.rmp[source].assigned:
            return  # the host cannot write there; what lies there may be an earlier message, good or bad
        self.rig.memory.write(source, message)
        self.now = self.snapshot()
        offset = 0xFC0 if wrong == "offset" else 0
        legal = (
            guest is not None
            and guest.state == 2
            and bool(guest.keys)
            and kind in SIZES
            and not wrong
            and self.now.memory[source] == bytes(message)
            and self.state(target) == "Firmware"
        )
        record = GuestRequest(gctx_paddr=gctx, request_paddr=source, response_paddr=target + offset)
        if self.issue(Command.SNP_GUEST_REQUEST, record, legal=legal):
            assert guest is not None
            guest.counts[vmpck] += 2
            answer = MessageHeader.parse(self.now.memory[target][:0x60])
            assert (answer.msg_seqno, answer.msg_type) == (count + 2, kind + 1)
            keys[vmpck].open(self.now.memory[target], answer.msg_size)

    @rule(n=st.integers(0, 2), vmpck=st.integers(0, 3), kind=st.sampled_from([3, 5, 5, 0]), wrong=wrong)
    def guest_asks(self, n: int, vmpck: int, kind: int, wrong: str) -> None:
        """A request of a running guest, on pages as KVM prepares them."""
        for _ in range(8):
            if (guest := self.live(self.contexts[n])) is None or guest.state != 2:
                self.launch_on(n)
        request, response = self.pages[7], self.pages[8]
        self.rmpupdate(request, RmpUpdate())
        self.rmpupdate(response, RmpUpdate(assigned=True, immutable=True))
        self.guest_request(n, vmpck, 7, 8, kind, wrong)

    # anything else

    @rule(n=st.integers(0, 8), m=st.integers(0, 8), length=st.sampled_from([0x40, 0x40, 0x80, 0]))
    def get_id(self, n: int, m: int, length: int) -> None:
        """GET_ID, the legacy command: its buffer is a Firmware page, which goes to Reclaim either way."""
        buffer, target = self.pages[n], self.pages[m]
        if self.state(buffer) != "Firmware":
            return
        taken = self.initialised and self.rig.rmp[target].state.value != "Firmware"
        self.rig.memory.write(buffer, struct.pack("<QII", target, length, 0))
        before = self.snapshot()
        status = self.rig.mailbox.command(Command.GET_ID, buffer)
        self.now = after = self.snapshot()
        assert (status == 0) == (length > 0 and not taken)
        changed = {page for page in self.pages if before.memory[page] != after.memory[page]}
        assert changed <= {buffer, target}
        moved = {page for page in self.pages if before.rmp[page] != after.rmp[page]}
        assert moved == ({buffer} if self.initialised else set())
        assert before.guests == after.guests

    @rule(
        command=st.one_of(
            st.sampled_from([int(each) for each in Command]), st.sampled_from([0, 0x50, 0xCC, 0x1FF, 2**31])
        ),
        words=st.lists(st.integers(0, 12), min_size=8, max_size=8),
        extra=st.sampled_from([0, 0, 0, 1, 0x10, 1 << 32, 1 << 63]),
    )
    def any_command(self, command: int, words: list[int], extra: int) -> None:
        """Any number with a buffer of addresses and small numbers: the tables hold, whatever it is."""
        if command in RULES:
            return
        values = [self.pages[n] if n < 9 else (n - 9) * 4 for n in words]
        values[0] |= extra
        known_to_all = command in Command.__members__.values()
        self.issue(command, struct.pack("<8Q", *values), legal=None if known_to_all else False)
        self.initialised = bool(self.rig.platform.state)

    # always

    @invariant()
    def guests_are_what_the_reference_says(self) -> None:
        found = self.now.guests
        assert found.keys() == self.guests.keys()
        for gctx, guest in self.guests.items():
            values = found[gctx]
            got = (values["state"], values["asid"], values["message_counts"], values["imi_en"])
            assert got == (guest.state, guest.asid, guest.counts, guest.imi)

    @invariant()
    def an_asid_has_one_guest(self) -> None:
        given = [guest.asid for guest in self.guests.values() if guest.asid]
        assert len(given) == len(set(given))

    @invariant()
    def reported_is_at_most_committed(self) -> None:
        variables, product = self.rig.chip.variables, self.rig.chip.product
        committed = variables.committed_tcb.decode(product)
        assert variables.reported_tcb.decode(product).at_most(committed)
        assert committed.at_most(variables.current_tcb.decode(product))


TestFirmware = machine_test(FirmwareMachine, steps=28_000)
