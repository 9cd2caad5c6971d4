"""Client, double and sockets: every kind of trouble as it looks on the wire, and foreign clients."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import urllib3

from swsnp.abi.snp_report import Product
from swsnp.amd_ca.kds_double import KdsDouble, Misbehaviour, Trouble
from swsnp.amd_ca.kds_server import KdsServer, misbehaviour_of
from swsnp.certs.kds_errors import (
    KdsContentError,
    KdsError,
    KdsNotFound,
    KdsThrottled,
    KdsTimeout,
    KdsTruncated,
    KdsUnreachable,
)
from swsnp.certs.kds_transport import HttpTransport
from swsnp.certs.kds_url import SPL_NAMES, ChainRequest, CrlRequest, KdsRequest
from swsnp.errors import HostError, InputError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Skip
    from tests.unit.kds.conftest import Bench

    from swsnp.certs.kds_client import KdsClient

    class Connect(Protocol):
        def __call__(self, **options: object) -> KdsClient: ...


CHAIN = ChainRequest(product=Product.MILAN)
CRL = CrlRequest(product=Product.MILAN)


def curl(url: str, *options: str) -> subprocess.CompletedProcess[bytes]:
    command = ["curl", "--silent", "--show-error", "--max-time", "20", *options, url]
    return subprocess.run(command, capture_output=True, check=False)


def openssl(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["openssl", *command.split()], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture
def foreign(cannot_run: Skip) -> None:
    for tool in ("curl", "openssl"):
        if shutil.which(tool) is None:
            cannot_run(f"no {tool} here", f"install {tool}")


def test_answers_over_a_socket(bench: Bench, connected: Connect) -> None:
    """What the double says arrives whole."""
    client = connected()
    leaf = client.get(bench.vcek_request()).body
    assert leaf == bench.machines[Product.MILAN].vcek_certificate()
    assert client.chain(Product.MILAN)[0] == bench.machines[Product.MILAN].hierarchy.ask
    assert client.crl(Product.TURIN)


@pytest.mark.parametrize(
    ("request_", "trouble", "kind", "told"),
    [
        (CHAIN, Trouble.THROTTLED, KdsThrottled, "429: asked too often, come back in 600 s"),
        (CHAIN, Trouble.OUTAGE, KdsUnreachable, "503: error at the key service"),
        (CHAIN, Trouble.DROPPED, KdsUnreachable, "no answer: "),
        (CHAIN, Trouble.TRUNCATED, KdsTruncated, "the connection ended inside the answer"),
        (CHAIN, Trouble.SLOW, KdsTimeout, "no whole answer within 0.3 s"),
        (CHAIN, Trouble.DRIPPING, KdsTimeout, "no whole answer within 0.3 s"),
        (CHAIN, Trouble.GARBAGE, KdsContentError, "got DER, wanted PEM"),
        (CRL, Trouble.STALE_CRL, KdsContentError, "its time ended"),
        (CRL, Trouble.GARBAGE, KdsContentError, "CRL"),
        (None, Trouble.WRONG_CHIP, KdsContentError, "answer, HWID"),
        (None, Trouble.WRONG_TCB, KdsContentError, "answer, TCB"),
        (None, Trouble.TRUNCATED, KdsTruncated, "the connection ended inside the answer"),
    ],
)
def test_trouble_on_the_wire(
    bench: Bench,
    server: KdsServer,
    connected: Connect,
    request_: KdsRequest | None,
    trouble: Trouble,
    kind: type[KdsError],
    told: str,
) -> None:
    """Each trouble is its own error with the URL; afterwards the same client is served."""
    pause = 0.02 if trouble is Trouble.DRIPPING else 2.0
    late = trouble in (Trouble.SLOW, Trouble.DRIPPING)
    client, request = connected(attempt_s=0.3 if late else 20.0), request_ or bench.vcek_request()
    server.double.answer("/vcek/v1/Milan/cert_chain")  # its keys are made by now
    server.double.misbehave(Misbehaviour(trouble=trouble, times=1, pause_s=pause, retry_after="600"))
    with pytest.raises(KdsError) as caught:
        client.get(request)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"{server.url}/vcek/v1/Milan/")
    assert told in str(caught.value)
    assert connected().get(request)


def test_slow_but_in_time(server: KdsServer, connected: Connect) -> None:
    """A service that thinks for a moment is waited for."""
    server.double.misbehave(Misbehaviour(trouble=Trouble.SLOW, pause_s=0.2))
    assert connected().get(CHAIN)


def test_an_unknown_chip(bench: Bench, server: KdsServer, connected: Connect) -> None:
    """404 with a text for people, and the client's own error."""
    with pytest.raises(KdsNotFound):
        connected().vcek(Product.MILAN, bytes(64), bench.vcek_request().tcb)
    assert server.double.asked[-1].status == 404


def test_nobody_listens(connected: Connect, server: KdsServer) -> None:
    """Connection refused: unreachable, with the URL."""
    client = connected()
    server.close()
    with pytest.raises(KdsUnreachable, match=r"cert_chain: no connection: "):
        client.get(CHAIN)


def test_no_answer_is_read_past_its_limit(server: KdsServer) -> None:
    """A service that sends without end is cut off."""
    transport = HttpTransport()
    with pytest.raises(KdsContentError, match="got more than 100 bytes"):
        transport.get(f"{server.url}/vcek/v1/Milan/cert_chain", timeout_s=20, limit=100)


def test_at_its_limits_an_answer_is_whole(server: KdsServer) -> None:
    """As many bytes as allowed, and the last of them as late as allowed."""
    url = f"{server.url}/vcek/v1/Milan/cert_chain"
    size = len(HttpTransport().get(url, timeout_s=20, limit=1 << 16).body)
    ticks = iter((100.0, *50 * (120.0,)))
    timed = HttpTransport(monotonic=lambda: next(ticks))
    assert len(timed.get(url, timeout_s=20, limit=size).body) == size


def test_without_urllib3(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel without extras: an error with the remedy."""
    monkeypatch.setitem(sys.modules, "urllib3", None)
    with pytest.raises(HostError, match=r"urllib3 is not installed; remedy: pip install 'swsnp\[kds\]'"):
        HttpTransport().get("http://127.0.0.1:1/x", timeout_s=1, limit=1)


def test_silence_is_timed(server: KdsServer) -> None:
    """A socket that accepts and says nothing."""
    del server
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/vcek/v1/Milan/crl"
        before = time.monotonic()
        with pytest.raises(KdsTimeout, match="no whole answer within 0.2 s"):
            HttpTransport().get(url, timeout_s=0.2, limit=10)
        assert time.monotonic() - before < 20


def test_no_http(connected: Connect) -> None:
    """Something else that answers is no key service."""
    del connected
    with socket.create_server(("127.0.0.1", 0)) as other:
        url = f"http://127.0.0.1:{other.getsockname()[1]}/vcek/v1/Milan/crl"

        def greet() -> None:
            peer, _ = other.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(KdsUnreachable):
            HttpTransport().get(url, timeout_s=10, limit=10)
        thread.join(10)


def test_a_proxy_of_the_environment(server: KdsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """http_proxy is used, no_proxy respected, and nonsense said; the double is its own proxy here."""
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    HttpTransport().get("http://kds.invalid/vcek/v1/Milan/crl", timeout_s=20, limit=1 << 20)
    assert server.double.asked[-1].target == "http://kds.invalid/vcek/v1/Milan/crl"
    monkeypatch.setenv("no_proxy", "kds.invalid")
    with pytest.raises(KdsUnreachable):
        HttpTransport().get("http://kds.invalid/vcek/v1/Milan/crl", timeout_s=20, limit=1 << 20)
    monkeypatch.setenv("http_proxy", "socks9://nowhere")
    with pytest.raises(HostError, match="proxy 'socks9://nowhere' of the environment cannot be used"):
        HttpTransport().get("http://127.0.0.1:1/x", timeout_s=20, limit=1)


def test_the_wire_forms(bench: Bench, server: KdsServer) -> None:
    """Content types, lengths, HEAD, and the statuses of requests that cannot be."""
    machine = bench.machines[Product.MILAN]
    request = bench.vcek_request()
    leaf = urllib3.request(
        "GET", f"{server.url}/vcek/v1/Milan/{request.hwid.hex()}?blSPL=04&teeSPL=00&snpSPL=24&ucodeSPL=219"
    )
    assert (leaf.status, leaf.headers["Content-Type"]) == (200, "application/pkix-cert")
    assert leaf.data == machine.vcek_certificate()
    chain = urllib3.request("GET", f"{server.url}/vcek/v1/Milan/cert_chain")
    assert chain.headers["Content-Type"] == "application/x-pem-file"
    crl = urllib3.request("GET", f"{server.url}/vlek/v1/Milan/crl")
    assert crl.headers["Content-Type"] == "application/pkix-crl"
    assert int(crl.headers["Content-Length"]) == len(crl.data)
    head = urllib3.request("HEAD", f"{server.url}/vcek/v1/Milan/cert_chain")
    assert (head.headers["Content-Length"], head.data) == (str(len(chain.data)), b"")
    for method, path, status in (
        ("GET", "/", 400),
        ("GET", "/vcek/v1/Naples/crl", 400),
        ("POST", "/vcek/v1/Milan/crl", 405),
        ("DELETE", "/vcek/v1/Milan/crl", 405),
        ("PUT", "/vcek/v1/Milan/crl", 501),
    ):
        assert urllib3.request(method, server.url + path, retries=False).status == status, (method, path)


def control(server: KdsServer, method: str, what: str, body: object = None) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = urllib3.request(method, f"{server.url}/swsnp/{what}", body=None if body is None else data)
    return answer.status, (answer.json() if answer.status == 200 else answer.data.decode())


def test_control_at_runtime(server: KdsServer, connected: Connect) -> None:
    """A test in any language makes the service misbehave, sees what was asked, and makes it behave."""
    status, active = control(server, "POST", "misbehave", {"trouble": "throttled", "retry_after": "5"})
    assert (status, active[0]["trouble"]) == (200, "throttled")
    with pytest.raises(KdsThrottled, match="come back in 5 s"):
        connected().get(CHAIN)
    status, active = control(server, "POST", "misbehave", [{"trouble": "outage", "times": 1}])
    assert [each["trouble"] for each in active] == ["throttled", "outage"]
    assert control(server, "GET", "misbehave") == (200, active)
    assert control(server, "DELETE", "misbehave") == (200, [])
    connected().get(CHAIN)
    status, asked = control(server, "GET", "asked")
    assert asked == [
        {"target": "/vcek/v1/Milan/cert_chain", "status": 429},
        {"target": "/vcek/v1/Milan/cert_chain", "status": 200},
    ]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "not JSON"),
        (b"[" * 10000, "not JSON"),
        ([], "wanted a JSON object"),
        ([1], "wanted a JSON object"),
        ({}, "misbehaviour, trouble: got None"),
        ({"trouble": "mischief"}, "misbehaviour, trouble: got 'mischief'"),
        ({"trouble": []}, "misbehaviour, trouble: got []"),
        ({"trouble": "slow", "pause": 3}, "misbehaviour: got pause, wanted"),
        ({"trouble": "slow", "pause_s": "3"}, "misbehaviour, pause_s: got '3'"),
        ({"trouble": "slow", "pause_s": True}, "misbehaviour, pause_s: got True"),
        ({"trouble": "slow", "pause_s": -1}, "misbehaviour, pause_s: got -1"),
        (b'{"trouble": "slow", "pause_s": NaN}', "misbehaviour, pause_s: got nan"),
        ({"trouble": "slow", "times": 0}, "misbehaviour, times: got 0"),
        ({"trouble": "slow", "times": 1.5}, "misbehaviour, times: got 1.5"),
        ({"trouble": "throttled", "retry_after": "1\r\nX: y"}, "misbehaviour, retry_after"),
        ({"trouble": "slow", "only": 1}, "misbehaviour, only: got 1"),
        (b" " * 70000, "Content-Length: got '70000'"),
    ],
)
def test_control_refuses(server: KdsServer, body: object, told: str) -> None:
    """What cannot be is said with field and value, and changes nothing."""
    status, text = control(server, "POST", "misbehave", body)
    assert status == 400
    assert told in text
    assert server.double.misbehaviours == ()


def test_no_control_unless_asked_for(double: KdsDouble) -> None:
    """Whoever reaches a plain double cannot make it misbehave."""
    with KdsServer(double) as plain:
        assert control(plain, "POST", "misbehave", {"trouble": "outage"})[0] == 405
        assert control(plain, "DELETE", "misbehave")[0] == 405
        assert control(plain, "GET", "asked")[0] == 400
    assert double.misbehaviours == ()


def test_misbehaviour_from_words() -> None:
    """The same check serves the command line."""
    assert misbehaviour_of({"trouble": "slow", "pause_s": 2}) == Misbehaviour(trouble=Trouble.SLOW, pause_s=2)
    with pytest.raises(InputError, match="wanted one of throttled, outage"):
        misbehaviour_of({"trouble": "x"})
    with pytest.raises(UsageError, match="3600"):
        misbehaviour_of({"trouble": "slow", "pause_s": 3601})


def test_an_address_that_is_taken(server: KdsServer, double: KdsDouble) -> None:
    """Says which address, and why not."""
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(HostError, match=rf"127\.0\.0\.1:{port}: cannot be listened on: .*in use"):
        KdsServer(double, port=port)
    with pytest.raises(HostError, match="cannot be listened on"):
        KdsServer(double, port=70000)


def test_closing_ends_answers_that_wait(double: KdsDouble) -> None:
    """The end of a test does not wait for a slow answer."""
    double.misbehave(Misbehaviour(trouble=Trouble.SLOW, pause_s=600))
    before = time.monotonic()
    with KdsServer(double) as slow, pytest.raises(KdsTimeout):
        HttpTransport().get(f"{slow.url}/vcek/v1/Milan/crl", timeout_s=0.2, limit=1)
    assert time.monotonic() - before < 60


def test_ipv6(double: KdsDouble, cannot_run: Skip) -> None:
    """An address of version 6 stands in brackets."""
    try:
        server = KdsServer(double, host="::1")
    except HostError:
        cannot_run("no ::1 here", "enable IPv6", avoidable=False)
    with server:
        assert server.url.startswith("http://[::1]:")
        assert (
            HttpTransport().get(f"{server.url}/vcek/v1/Milan/crl", timeout_s=20, limit=1 << 16).status == 200
        )


@pytest.mark.usefixtures("foreign")
def test_curl_and_openssl_read_the_double(bench: Bench, server: KdsServer, tmp_path: Path) -> None:
    """Programs that know nothing of us: download as operators do, and verify the chain with OpenSSL."""
    for product in Product:
        request = bench.vcek_request(product)
        base = f"{server.url}/vcek/v1/{product.value}"
        levels = request.tcb.decode(product)
        query = "&".join(f"{SPL_NAMES[name]}={level:02}" for name, level in levels.items())
        files = {
            "vcek.der": f"{base}/{request.hwid.hex()}?{query}",
            "chain.pem": f"{base}/cert_chain",
            "crl.der": f"{base}/crl",
        }
        for name, url in files.items():
            assert curl(url, "--fail", "--output", str(tmp_path / name)).returncode == 0
        openssl(tmp_path, "x509 -inform DER -in vcek.der -out vcek.pem")
        verified = openssl(tmp_path, "verify -no_check_time -CAfile chain.pem vcek.pem")
        assert verified.stdout == "vcek.pem: OK\n", verified.stderr
        listed = openssl(tmp_path, "crl -inform DER -in crl.der -CAfile chain.pem -noout")
        assert "verify OK" in listed.stderr


@pytest.mark.usefixtures("foreign")
def test_curl_sees_429(server: KdsServer) -> None:
    """Curl's own retry understands Retry-After of the double."""
    server.double.misbehave(Misbehaviour(trouble=Trouble.THROTTLED, times=1, retry_after="1"))
    done = curl(f"{server.url}/vcek/v1/Milan/crl", "--retry", "2", "--fail", "--output", "/dev/null")
    assert done.returncode == 0, done.stderr
    assert [each.status for each in server.double.asked] == [429, 200]


@pytest.mark.usefixtures("foreign")
def test_tls(double: KdsDouble, tmp_path: Path) -> None:
    """For clients that insist on https: TLS with a certificate that the caller made; ours must trust it."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    with KdsServer(double, tls=(certificate, key)) as server:
        url = f"{server.url}/vcek/v1/Milan/crl"
        assert url.startswith("https://127.0.0.1:")
        with pytest.raises(KdsUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
            HttpTransport().get(url, timeout_s=20, limit=1 << 16)
        assert HttpTransport(ca_file=certificate).get(url, timeout_s=20, limit=1 << 16).status == 200
        assert curl(url, "--cacert", str(certificate), "--fail").returncode == 0
    with pytest.raises(InputError, match="cannot be used for TLS"):
        KdsServer(double, tls=(key, key))
