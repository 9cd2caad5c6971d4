"""The client's manners, with time that the test owns and the double in place of a socket."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_report import Product, TcbVersion
from swsnp.amd_ca.kds_double import Misbehaviour, Trouble
from swsnp.certs.crl import read_crl
from swsnp.certs.kds_cache import Kept, MemoryCache
from swsnp.certs.kds_client import KdsClient
from swsnp.certs.kds_errors import (
    KdsContentError,
    KdsError,
    KdsNotFound,
    KdsOffline,
    KdsRefused,
    KdsThrottled,
    KdsTruncated,
    KdsUnavailable,
    KdsUnreachable,
)
from swsnp.certs.kds_transport import HttpAnswer
from swsnp.certs.kds_url import ChainRequest, CrlRequest, VlekRequest
from swsnp.certs.x509_reader import read, to_pem
from swsnp.errors import HostError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.unit.kds.conftest import Bench


def throttled(times: int | None, retry_after: str | None = None) -> Misbehaviour:
    return Misbehaviour(trouble=Trouble.THROTTLED, times=times, retry_after=retry_after)


@pytest.mark.parametrize("product", Product)
def test_leaf_chain_and_list_of_every_product(bench: Bench, product: Product) -> None:
    """AMD 57230: the VCEK in DER, ASK and ARK, ASVK and ARK, the CRL."""
    client, machine = bench.client(), bench.machines[product]
    wanted = bench.vcek_request(product)
    leaf = read(client.vcek(product, wanted.hwid, wanted.tcb))
    assert leaf.issuer_cn == f"SEV-{product.value}"
    assert client.chain(product) == (machine.hierarchy.ask, machine.hierarchy.ark)
    assert client.chain(product, "vlek") == (machine.hierarchy.asvk, machine.hierarchy.ark)
    assert read_crl(client.crl(product)).issuer == read(machine.hierarchy.ark).subject
    assert bench.statuses == [200] * 4


def test_a_leaf_is_asked_for_once(bench: Bench) -> None:
    """A certificate per chip and TCB never changes, so it is kept for as long as it is valid."""
    client = bench.client()
    first = client.get(bench.vcek_request())
    bench.now += timedelta(days=6 * 365)
    assert client.get(bench.vcek_request()).body == first.body
    assert bench.client().is_kept(bench.vcek_request())
    assert bench.statuses == [200]


def test_a_leaf_that_has_ended_is_asked_for_again(bench: Bench) -> None:
    """Seven years: after that the kept one is of no use; what the service still has of it, neither."""
    client = bench.client()
    client.get(bench.vcek_request())
    bench.now += timedelta(days=8 * 365)
    with pytest.raises(KdsContentError, match="its time ended at 2032"):
        client.get(bench.vcek_request())
    assert bench.statuses == [200, 200]


@pytest.mark.parametrize(
    ("request_", "age"),
    [
        (ChainRequest(product=Product.MILAN), timedelta(days=7)),
        (ChainRequest(product=Product.MILAN, kind="vlek"), timedelta(days=7)),
        (CrlRequest(product=Product.MILAN), timedelta(days=1)),
    ],
)
def test_chains_and_lists_age(bench: Bench, request_: ChainRequest, age: timedelta) -> None:
    """Chains are good for a week, lists for a day: a new one may name what has been revoked since."""
    client = bench.client()
    client.get(request_)
    assert client.is_kept(request_)
    bench.now += age - timedelta(seconds=1)
    client.get(request_)
    assert bench.statuses == [200]
    assert client.is_kept(request_)
    bench.now += timedelta(seconds=1)
    assert not client.is_kept(request_)
    client.get(request_)
    assert bench.statuses == [200, 200]


def test_what_came_from_the_future_is_asked_for_again(bench: Bench) -> None:
    """A clock that was set back must not keep a list for longer than a day."""
    client = bench.client()
    client.get(CrlRequest(product=Product.MILAN))
    bench.now -= timedelta(seconds=1)
    client.get(CrlRequest(product=Product.MILAN))
    assert bench.statuses == [200, 200]


def test_while_the_service_is_away_the_kept_chain_serves(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """One attempt, no pause, a word in the log; and no further attempt for five minutes."""
    client, request = bench.client(), ChainRequest(product=Product.MILAN)
    first = client.get(request)
    bench.now += timedelta(days=8)
    bench.double.misbehave(Misbehaviour(trouble=Trouble.OUTAGE))
    assert client.get(request).body == first.body
    assert client.get(request).body == first.body
    assert bench.statuses == [200, 503]
    assert bench.clock.slept == []
    assert "cannot be renewed, the kept one is used" in caplog.text
    bench.clock.now += 300
    client.get(request)
    assert bench.statuses == [200, 503, 503]


def test_a_list_at_its_end_still_counts(bench: Bench) -> None:
    """The end itself is inside; a second later what the service still has is refused."""
    request = CrlRequest(product=Product.MILAN)
    bench.now = bench.client(cache=MemoryCache()).get(request).ends
    bench.client(cache=MemoryCache()).get(request)
    bench.now += timedelta(seconds=1)
    with pytest.raises(KdsContentError, match="its time ended at 2027-01-01"):
        bench.client(cache=MemoryCache()).get(request)


def test_a_list_past_its_end_does_not_serve(bench: Bench) -> None:
    """NextUpdate is the last moment at which a list says anything (RFC 5280, 5.1.2.5)."""
    client, request = bench.client(), CrlRequest(product=Product.MILAN)
    bench.now = client.get(request).ends
    bench.double.misbehave(Misbehaviour(trouble=Trouble.OUTAGE))
    client.get(request)
    bench.now += timedelta(seconds=1)
    with pytest.raises(KdsUnreachable):
        client.get(request)


@pytest.mark.parametrize(("text", "waited"), [("7", 7.0), ("0", 1.0), ("90", 90.0)])
def test_retry_after_is_kept_to(bench: Bench, text: str, waited: float) -> None:
    """RFC 9110, 10.2.3: seconds; at least one, so that no service can have itself hammered."""
    bench.double.misbehave(throttled(1, text))
    bench.client().get(bench.vcek_request())
    assert bench.clock.slept == [waited]
    assert bench.statuses == [429, 200]


def test_retry_after_as_a_date(bench: Bench) -> None:
    """RFC 9110, 10.2.3: or a date, counted from now."""
    bench.double.misbehave(throttled(1, "Thu, 01 Jan 2026 00:00:42 GMT"))
    bench.client().get(bench.vcek_request())
    assert bench.clock.slept == [42.0]


@pytest.mark.parametrize("text", [None, "", "soon", "-1", "1.5", "Thu, 99 Jan 2026 00:00:42 GMT", "9" * 12])
def test_without_retry_after_the_pauses_grow(bench: Bench, text: str | None) -> None:
    """10, 20, 30, 30, ... seconds, two minutes in all."""
    bench.double.misbehave(throttled(None, text))
    with pytest.raises(KdsThrottled, match="429: asked too often"):
        bench.client().get(bench.vcek_request())
    assert bench.clock.slept == [10.0, 20.0, 30.0, 30.0, 30.0]
    assert bench.statuses == [429] * 6


def test_a_pause_beyond_the_budget_is_not_begun(bench: Bench) -> None:
    """Who is told to come back in ten minutes, and has two, says so at once."""
    bench.double.misbehave(throttled(None, "600"))
    with pytest.raises(KdsThrottled, match="come back in 600 s") as caught:
        bench.client().get(bench.vcek_request())
    assert caught.value.retry_after_s == 600
    assert caught.value.url.startswith("http://double/vcek/v1/Milan/")
    assert bench.clock.slept == []


def test_the_whole_budget_may_be_waited(bench: Bench) -> None:
    """A pause that ends with the budget still has its attempt."""
    bench.double.misbehave(throttled(1, "120"))
    bench.client().get(bench.vcek_request())
    assert bench.clock.slept == [120.0]
    assert bench.transport.timeouts == [30.0, 1.0]


def test_an_attempt_keeps_to_what_is_left(bench: Bench) -> None:
    """The last attempts get what the budget has left, and none more than its own limit."""
    bench.double.misbehave(throttled(2, "50"))
    bench.client().get(bench.vcek_request())
    assert bench.transport.timeouts == [30.0, 30.0, 20.0]


def test_no_budget_is_one_attempt(bench: Bench) -> None:
    """budget_s=0: for callers that have their own way of repeating."""
    bench.double.misbehave(throttled(None))
    with pytest.raises(KdsThrottled):
        bench.client(budget_s=0.0).get(bench.vcek_request())
    assert bench.statuses == [429]
    assert bench.transport.timeouts == [30.0]


@pytest.mark.parametrize("trouble", [Trouble.OUTAGE, Trouble.THROTTLED])
def test_passing_trouble_is_waited_out(bench: Bench, trouble: Trouble) -> None:
    """5xx and 429 are tried again."""
    bench.double.misbehave(Misbehaviour(trouble=trouble, times=2))
    bench.client().get(bench.vcek_request())
    assert bench.statuses[-1] == 200
    assert bench.clock.slept == [10.0, 20.0]


class Answers:
    """A transport that says what it was told to, one after the other."""

    def __init__(self, *answers: HttpAnswer | KdsError) -> None:
        self.answers = list(answers)

    def get(self, url: str, *, timeout_s: float, limit: int) -> HttpAnswer:
        del url, timeout_s, limit
        answer = self.answers.pop(0)
        if isinstance(answer, KdsError):
            raise answer
        return answer


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, KdsNotFound),
        (400, KdsRefused),
        (401, KdsRefused),
        (403, KdsRefused),
        (204, KdsRefused),
        (302, KdsRefused),
        (499, KdsRefused),
        (408, KdsUnreachable),
        (429, KdsThrottled),
        (500, KdsUnreachable),
        (599, KdsUnreachable),
    ],
)
def test_statuses(bench: Bench, status: int, kind: type[KdsError]) -> None:
    """Each status is its own error with the URL; redirects are not followed."""
    client = bench.client(transport=Answers(HttpAnswer(status=status)), budget_s=0.0)
    with pytest.raises(KdsError, match=rf"^http://double/vcek/v1/Milan/.*: {status}: ") as caught:
        client.get(bench.vcek_request())
    assert type(caught.value) is kind


@pytest.mark.parametrize("status", [404, 400, 302])
def test_final_answers_are_not_asked_for_again(bench: Bench, status: int) -> None:
    """Asking the same again within ten seconds is what the service throttles."""
    with pytest.raises(KdsError):
        bench.client(transport=Answers(HttpAnswer(status=status))).get(bench.vcek_request())
    assert bench.clock.slept == []


def test_an_answer_that_broke_off_is_asked_for_again(bench: Bench) -> None:
    """A broken connection passes; the second answer counts."""
    body = bench.machines[Product.MILAN].vcek_certificate()
    transport = Answers(KdsTruncated("u", "broke off"), HttpAnswer(status=200, body=body))
    assert bench.client(transport=transport).get(bench.vcek_request()).body == body
    assert bench.clock.slept == [10.0]


def test_an_unknown_tcb_is_not_found(bench: Bench) -> None:
    """A TCB that the chip never had: 404, its own error, at once."""
    unknown = TcbVersion.encode(Product.MILAN, boot_loader=255, snp=255, microcode=255)
    with pytest.raises(KdsNotFound, match="does not know this chip, or not with this TCB"):
        bench.client().get(replace(bench.vcek_request(), tcb=unknown))
    assert bench.statuses == [404]


def test_a_vlek_is_refused(bench: Bench) -> None:
    """A VLEK certificate is for its provider, who has to prove it; we have nothing to prove it with."""
    with pytest.raises(KdsRefused, match="401"):
        bench.client().get(VlekRequest(product=Product.MILAN, tcb=bench.vcek_request().tcb))


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (Trouble.WRONG_CHIP, "answer, HWID: got"),
        (Trouble.WRONG_TCB, "answer, TCB: got"),
        (Trouble.GARBAGE, "certificate"),
        (Trouble.STALE_CRL, "its time ended at 2024"),
    ],
)
def test_wrong_content_is_not_kept(bench: Bench, trouble: Trouble, told: str) -> None:
    """Another chip's or TCB's leaf, a login page, a list of two years ago: refused, not asked for again."""
    request = CrlRequest(product=Product.MILAN) if trouble is Trouble.STALE_CRL else bench.vcek_request()
    bench.double.misbehave(Misbehaviour(trouble=trouble, times=1))
    client = bench.client()
    with pytest.raises(KdsContentError, match=told) as caught:
        client.get(request)
    assert caught.value.url == client.url_of(request)
    assert not client.is_kept(request)
    assert bench.clock.slept == []
    client.get(request)
    assert bench.statuses == [200, 200]


def test_offline_is_the_cache_alone(bench: Bench) -> None:
    """Nothing is asked; what is not kept is an error that names the URL."""
    bench.client().get(bench.vcek_request())
    offline = bench.client(offline=True)
    offline.get(bench.vcek_request())
    with pytest.raises(KdsOffline, match=r"^http://double/vcek/v1/Genoa/cert_chain: not in the cache"):
        offline.get(ChainRequest(product=Product.GENOA))
    assert bench.statuses == [200]


def test_offline_an_old_chain_will_do(bench: Bench) -> None:
    """Past its week, not past its end: there is no better one to be had."""
    request = ChainRequest(product=Product.MILAN)
    bench.client().get(request)
    bench.now += timedelta(days=365)
    bench.client(offline=True).get(request)


def test_offline_a_list_past_its_end_will_not_do(bench: Bench) -> None:
    """A stale list says nothing about today."""
    request = CrlRequest(product=Product.MILAN)
    bench.client().get(request)
    bench.now += timedelta(days=366)
    with pytest.raises(KdsOffline, match="past its end"):
        bench.client(offline=True).get(request)


def test_what_is_kept_is_judged_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A cache is a place that others can write to: what is not what was asked for counts as not there."""
    request, client = bench.vcek_request(), bench.client()
    other = bench.machines[Product.GENOA].vcek_certificate()
    bench.cache.write(client.url_of(request), Kept(body=other, fetched=bench.now))
    assert client.get(request).body != other
    assert bench.statuses == [200]
    assert "what was kept is something else" in caplog.text


def test_no_answer_larger_than_its_limit_is_kept(bench: Bench) -> None:
    """Text around PEM blocks is allowed, a megabyte of it is not."""
    body = bench.machines[Product.MILAN].hierarchy.chain_pem() + b" " * (1 << 16)
    client = bench.client(transport=Answers(HttpAnswer(status=200, body=body)))
    with pytest.raises(KdsContentError, match="more than 65536 bytes"):
        client.get(ChainRequest(product=Product.MILAN))


def test_one_request_for_many_threads(bench: Bench) -> None:
    """However many want the same certificate, one asks, and the others get what it got."""
    together, got = threading.Barrier(8), []
    client = bench.client()

    def want() -> None:
        together.wait(10)
        got.append(client.get(bench.vcek_request()).body)

    threads = [threading.Thread(target=want) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    assert len(got) == 8
    assert len(set(got)) == 1
    assert bench.statuses == [200]


def test_who_waited_in_vain_does_not_ask_again(bench: Bench) -> None:
    """Threads that waited while another one asked get its error; whoever comes later asks anew."""
    waiting = threading.Semaphore(0)
    got: list[KdsError] = []

    class Counted(MemoryCache):
        @contextmanager
        def hold(self, url: str, patience_s: float) -> Iterator[None]:
            waiting.release()
            with super().hold(url, patience_s):
                yield

    class WhenAllWait(Answers):
        def get(self, url: str, *, timeout_s: float, limit: int) -> HttpAnswer:
            if len(self.answers) == 2:
                assert all(waiting.acquire(timeout=30) for _ in range(4))
            bench.clock.now += 1
            return super().get(url, timeout_s=timeout_s, limit=limit)

    answers = (HttpAnswer(status=404), HttpAnswer(status=429, headers={"retry-after": "600"}))
    client = bench.client(transport=WhenAllWait(*answers), cache=Counted())

    def want() -> None:
        try:
            client.get(bench.vcek_request())
        except KdsError as error:
            got.append(error)

    threads = [threading.Thread(target=want) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    assert [(type(each), each.url) for each in got] == 4 * [
        (KdsNotFound, client.url_of(bench.vcek_request()))
    ]
    assert len({id(each) for each in got}) == 4
    with pytest.raises(KdsThrottled) as caught:
        client.get(bench.vcek_request())
    assert caught.value.retry_after_s == 600


def test_waiting_for_another_counts(bench: Bench) -> None:
    """The budget is for the certificate, whoever asks: time spent waiting for another process is gone."""

    class Waited(MemoryCache):
        @contextmanager
        def hold(self, url: str, patience_s: float) -> Iterator[None]:
            bench.clock.now += 100
            with super().hold(url, patience_s):
                yield

    bench.double.misbehave(throttled(None))
    with pytest.raises(KdsThrottled):
        bench.client(cache=Waited()).get(bench.vcek_request())
    assert bench.clock.slept == [10.0]


@pytest.mark.parametrize("again", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_errors_travel(again: Callable[[KdsError], KdsError]) -> None:
    """Between threads as copies, between processes pickled."""
    for error in (KdsNotFound("u", "r"), KdsThrottled("u", "r", retry_after_s=3)):
        other = again(error)
        assert (type(other), str(other), vars(other)) == (type(error), "u: r", vars(error))


def test_ages_are_the_callers_to_choose(bench: Bench) -> None:
    """A list may be kept to its very end, a chain not at all."""
    client = bench.client(crl_age=timedelta.max, chain_age=timedelta(0))
    client.get(CrlRequest(product=Product.MILAN))
    bench.now += timedelta(days=364)
    client.get(CrlRequest(product=Product.MILAN))
    assert bench.statuses == [200]
    client.get(ChainRequest(product=Product.MILAN))
    client.get(ChainRequest(product=Product.MILAN))
    assert bench.statuses == [200] * 3


def test_patience_with_another_who_asks_ends(bench: Bench) -> None:
    """Another thread that hangs is not waited for for ever."""
    cache = MemoryCache()
    client = bench.client(cache=cache, budget_s=0.0, attempt_s=0.01)
    with (
        cache.hold(client.url_of(bench.vcek_request()), 0),
        pytest.raises(HostError, match="another thread or process"),
    ):
        client.get(bench.vcek_request())


@pytest.mark.parametrize("times", [{"budget_s": -1.0}, {"budget_s": float("nan")}, {"attempt_s": 0.0}])
def test_times_that_cannot_be(bench: Bench, times: dict[str, float]) -> None:
    """A budget is not negative, an attempt takes time."""
    with pytest.raises(UsageError, match="KDS client: got budget"):
        bench.client(**times)


def test_an_address_that_cannot_be() -> None:
    """Refused when the client is made, not when it asks."""
    with pytest.raises(UsageError, match="KDS address"):
        KdsClient(MemoryCache(), base="https://kds/path")


def test_errors_have_their_place() -> None:
    """What may pass is a matter of this host and hour, what is wrong is unreadable; exit statuses follow."""
    assert issubclass(KdsUnavailable, HostError)
    assert all(
        issubclass(each, KdsUnavailable) for each in (KdsOffline, KdsThrottled, KdsTruncated, KdsUnreachable)
    )


def test_what_the_client_says_of_itself(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """The URL that is asked for is in the debug log, and a pause in the information."""
    caplog.set_level(logging.DEBUG, "swsnp.certs")
    bench.double.misbehave(throttled(1, "3"))
    client = bench.client()
    client.get(bench.vcek_request())
    assert f"GET {client.url_of(bench.vcek_request())}" in caplog.text
    assert "asking again in 3 s" in caplog.text
    assert repr(client).startswith("KdsClient('http://double', ")


def test_a_chain_in_another_form(bench: Bench) -> None:
    """DER for PEM, a PEM leaf for DER: the service has one form for each."""
    machine = bench.machines[Product.MILAN]
    answers = Answers(
        HttpAnswer(status=200, body=machine.hierarchy.ask),
        HttpAnswer(status=200, body=to_pem(machine.vcek_certificate())),
    )
    client = bench.client(transport=answers)
    with pytest.raises(KdsContentError, match="got DER, wanted PEM"):
        client.get(ChainRequest(product=Product.MILAN))
    with pytest.raises(KdsContentError, match="got PEM, wanted DER"):
        client.get(bench.vcek_request())


@pytest.mark.parametrize("moment", ["00:00:05 GMT", "00:00:05 -0000", "01:00:05 +0100", "00:00:05"])
def test_retry_after_date_in_any_zone(bench: Bench, moment: str) -> None:
    """HTTP dates are GMT; one with another zone means that one, one without any means GMT."""
    assert bench.now == datetime(2026, 1, 1, tzinfo=UTC)
    bench.double.misbehave(throttled(1, f"Thu, 01 Jan 2026 {moment}"))
    bench.client().get(bench.vcek_request())
    assert bench.clock.slept == [5.0]
