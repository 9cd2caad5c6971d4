"""The cache on disk: whole files or none, checked when read, one asker at a time in all processes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_report import Product
from swsnp.amd_ca.kds_double import Misbehaviour, Trouble
from swsnp.certs.kds_cache import DiskCache, Kept, MemoryCache, default_folder
from swsnp.certs.kds_url import KDS, ChainRequest, CrlRequest, url_of
from swsnp.errors import HostError, LayoutError
from swsnp.testing import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.kds.conftest import Bench

    from swsnp.amd_ca.kds_server import KdsServer

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CHAIN = url_of(ChainRequest(product=Product.MILAN))
KEPT = Kept(body=b"-----BEGIN", fetched=NOW)


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "kds")


def test_names_that_people_can_read(bench: Bench, cache: DiskCache) -> None:
    """Service, kind, product, chip, levels; DER and PEM as they came."""
    folder = cache.folder
    request = bench.vcek_request(Product.TURIN)
    leaf = cache.path_of(url_of(request))
    assert leaf.parent == folder / "https_kdsintf.amd.com" / "vcek" / "Turin" / request.hwid.hex()
    assert leaf.name == "fmcSPL1-blSPL1-teeSPL1-snpSPL4-ucodeSPL81.der"
    assert cache.path_of(CHAIN) == folder / "https_kdsintf.amd.com" / "vcek" / "Milan" / "cert_chain.pem"
    crl = url_of(CrlRequest(product=Product.GENOA, kind="vlek"), "http://[::1]:80")
    assert cache.path_of(crl).parent.parent.name == "vlek"
    assert cache.path_of(crl).name == "crl.der"
    assert folder in cache.path_of(crl).parents


def test_nothing_but_urls_of_a_key_service_has_a_place(cache: DiskCache) -> None:
    """No text from outside becomes a path."""
    with pytest.raises(LayoutError):
        cache.path_of(f"{KDS}/vcek/v1/Milan/../crl")


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=5, minutes=30))])
def test_what_is_written_is_read(cache: DiskCache, zone: timezone) -> None:
    """Body and date come back; the date in any zone."""
    cache.write(CHAIN, Kept(body=b"body", fetched=NOW.astimezone(zone)))
    assert cache.read(CHAIN) == Kept(body=b"body", fetched=NOW)
    assert sorted(each.name for each in cache.path_of(CHAIN).parent.iterdir()) == [
        "cert_chain.pem",
        "cert_chain.pem.json",
    ]


def test_services_do_not_mix(cache: DiskCache) -> None:
    """A chain of an imitation is never taken for AMD's."""
    cache.write(url_of(ChainRequest(product=Product.MILAN), "http://127.0.0.1:8080"), KEPT)
    assert cache.read(CHAIN) is None
    assert cache.read(CHAIN.replace("https", "http")) is None


def spoil_body(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def spoil_note(change: dict[str, object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        note = path.with_name(path.name + ".json")
        note.write_text(json.dumps({**json.loads(note.read_text()), **change}))

    return spoil


def write_note(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.with_name(path.name + ".json").write_text(text)

    return write


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_body,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + bytes(1 << 20)),
        spoil_note({"url": f"{KDS}/vcek/v1/Milan/crl"}),
        spoil_note({"sha256": 64 * "0"}),
        spoil_note({"sha256": None}),
        spoil_note({"fetched": "yesterday"}),
        spoil_note({"fetched": 7}),
        spoil_note({"fetched": "2026-01-01T00:00:00"}),
        write_note("[]"),
        write_note("{}"),
        write_note("{"),
        write_note("[" * 15000),
        write_note('"' + "a" * (1 << 15)),
        write_note("\udc80".encode("utf-8", "surrogateescape").decode("latin-1")),
        lambda path: path.unlink(),
        lambda path: path.with_name(path.name + ".json").unlink(),
    ],
)
def test_a_spoiled_file_is_asked_for_again(
    bench: Bench, cache: DiskCache, spoil: Callable[[Path], object]
) -> None:
    """A fallen bit, a torn or missing file, another's note: as if nothing were there, and then mended."""
    request = bench.vcek_request()
    client = bench.client(cache=cache)
    client.get(request)
    path = cache.path_of(client.url_of(request))
    spoil(path)
    assert client.get(request).body == path.read_bytes()
    client.get(request)
    assert bench.statuses == [200, 200]


def test_the_write_of_a_process_that_died_is_no_matter(bench: Bench, cache: DiskCache) -> None:
    """What was left behind beside the files is overwritten; it was never read."""
    request = bench.vcek_request()
    client = bench.client(cache=cache)
    path = cache.path_of(client.url_of(request))
    path.parent.mkdir(parents=True)
    for name in (f".{path.name}.new", f"{path.name}.lock", f".{path.name}.json.new"):
        (path.parent / name).write_bytes(b"left behind")
    client.get(request)
    client.get(request)
    assert bench.statuses == [200]
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name, path.name + ".json"]


def test_an_answer_that_cannot_be_kept_is_said(cache: DiskCache, bench: Bench) -> None:
    """A cache that cannot be written would ask for everything every time: an error with the remedy."""
    cache.folder.parent.mkdir(exist_ok=True)
    cache.folder.write_text("a file")
    with pytest.raises(HostError, match="cannot be (read|written): Not a directory"):
        bench.client(cache=cache).get(bench.vcek_request())


def test_a_body_that_cannot_be_written(cache: DiskCache) -> None:
    """The name is taken by a folder."""
    cache.path_of(CHAIN).mkdir(parents=True)
    with pytest.raises(HostError, match=r"cert_chain\.pem: the cache cannot be written"):
        cache.write(CHAIN, KEPT)


def test_a_body_that_cannot_be_read(cache: DiskCache) -> None:
    """There, but no file: told apart from not there."""
    cache.write(CHAIN, KEPT)
    cache.path_of(CHAIN).unlink()
    cache.path_of(CHAIN).mkdir()
    with pytest.raises(HostError, match="cannot be read: Is a directory"):
        cache.read(CHAIN)


def test_offline_needs_no_right_to_write(bench: Bench, cache: DiskCache) -> None:
    """A folder that a mirror filled may be mounted read-only."""
    request = bench.vcek_request()
    bench.client(cache=cache).get(request)
    before = sorted(cache.folder.rglob("*"))
    bench.client(cache=cache, offline=True).get(request)
    with pytest.raises(HostError):
        bench.client(cache=cache, offline=True).get(ChainRequest(product=Product.MILAN))
    assert sorted(cache.folder.rglob("*")) == before


def test_a_lock_that_others_hold(tmp_path: Path) -> None:
    """Patience is measured by the clock given, and ends."""
    clock = FakeClock()
    cache = DiskCache(tmp_path, monotonic=clock.monotonic, sleep=clock.sleep)
    with (
        cache.hold(CHAIN, 0),
        pytest.raises(HostError, match="has been asking for it for 3 s"),
        cache.hold(CHAIN, 3),
    ):
        pass
    assert clock.now == pytest.approx(3)
    assert not cache.path_of(CHAIN).with_name("cert_chain.pem.lock").exists()


def test_the_next_one_gets_the_lock(cache: DiskCache) -> None:
    """A waiter whose lock file has lost its name meanwhile tries again, so two never hold it."""
    inside, most = 0, 0
    guard = threading.Lock()

    def enter() -> None:
        nonlocal inside, most
        with cache.hold(CHAIN, 60):
            with guard:
                inside += 1
                most = max(most, inside)
            threading.Event().wait(0.005)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(12)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert (inside, most) == (0, 1)


def test_a_lock_that_lost_its_name(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever held it before has removed the file that we have just locked: it is nobody's lock any more."""
    lock, real = cache.path_of(CHAIN).with_name("cert_chain.pem.lock"), fcntl.flock
    tries: list[int] = []

    def remove_first(fd: int, operation: int) -> None:
        if not tries:
            lock.unlink()
        tries.append(fd)
        real(fd, operation)

    monkeypatch.setattr("fcntl.flock", remove_first)
    with cache.hold(CHAIN, 60):
        assert lock.exists()
    assert len(tries) == 2


def test_a_file_system_without_locks(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said as what it is; going on without a lock would ask twice."""

    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(HostError, match="this file system gives no locks"), cache.hold(CHAIN, 0):
        pass


def test_other_certificates_are_not_held_up(cache: DiskCache) -> None:
    """One lock per answer."""
    with cache.hold(CHAIN, 0), cache.hold(url_of(CrlRequest(product=Product.MILAN)), 0):
        pass


def test_no_lock_where_nothing_can_be_written(cache: DiskCache) -> None:
    """The lock is a file."""
    cache.folder.parent.mkdir(exist_ok=True)
    cache.folder.write_text("a file")
    with pytest.raises(HostError, match="cannot be written"), cache.hold(CHAIN, 0):
        pass


ASK = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from swsnp.certs.kds_cache import DiskCache
from swsnp.certs.kds_client import KdsClient
from swsnp.certs.kds_url import parse_url

base, request = parse_url(sys.argv[2])
client = KdsClient(DiskCache(Path(sys.argv[1])), base=base, now=lambda: datetime(2026, 1, 1, tzinfo=UTC))
print("ready", flush=True)
sys.stdin.readline()
print(client.get(request).body.hex())
"""


@pytest.mark.slow
def test_one_request_for_two_processes(bench: Bench, server: KdsServer, tmp_path: Path) -> None:
    """Two processes that want the same leaf at once make one request between them, and get the same bytes."""
    server.double.misbehave(Misbehaviour(trouble=Trouble.SLOW, pause_s=1.0))  # so that both want it meanwhile
    command = [sys.executable, "-c", ASK, str(tmp_path / "kds"), url_of(bench.vcek_request(), server.url)]
    pair = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for each in pair:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in pair:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    bodies = {each.communicate(timeout=60)[0] for each in pair}
    assert [each.returncode for each in pair] == [0, 0]
    assert bodies == {bench.machines[Product.MILAN].vcek_certificate().hex() + "\n"}
    assert [each.status for each in server.double.asked] == [200]


def test_memory_is_a_cache_too() -> None:
    """What it keeps, it gives back."""
    cache = MemoryCache()
    assert cache.read(CHAIN) is None
    cache.write(CHAIN, KEPT)
    assert cache.read(CHAIN) == KEPT


@pytest.mark.parametrize(
    ("value", "place"), [("/caches", "/caches"), ("", "~/.cache"), ("relative", "~/.cache")]
)
def test_the_users_folder(monkeypatch: pytest.MonkeyPatch, value: str, place: str) -> None:
    """XDG base directories: $XDG_CACHE_HOME if it is absolute, else ~/.cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert default_folder() == Path(place).expanduser() / "swsnp" / "kds"
