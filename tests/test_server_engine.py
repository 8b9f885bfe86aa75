"""The server engine against a real HTTP server on this machine.

The laws: what the ledger says is what the server saw; one request's failure is an outcome and the others go
on; what no request could survive is one line for the person; the key goes to its host and nowhere else.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import json
import math
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

import pytest
from loopback import Reply, Server

from solon.engines.base import GenerationRequest, Sampling, ScoreRequest
from solon.engines.endpoint import parse_spec, price_usd
from solon.engines.keys import check_keys, key_for
from solon.engines.server import ServerEngine
from solon.engines.systemone import SystemOneEngine
from solon.errors import InputError, Outage
from solon.records import Message, user

CANARY = "sk-canary-5b1f0d7e"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    made.reply = lambda body, n: (200, completion(), {})
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SOLON_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "SOLON_API_KEYS",
                 "SOLON_ALLOW_HTTP_KEY", "SOLON_TIMEOUT", "SOLON_MAX_CONNECTIONS"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


def completion(
    text: str | None = "Fine.",
    *,
    finish: str = "stop",
    usage: dict[str, Any] | None = None,
    logprobs: Any = None,
    **more: Any,
) -> dict[str, Any]:
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": finish,
                "logprobs": logprobs,
            }
        ],
        "usage": usage or {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        **more,
    }


def positions(*tops: dict[str, float]) -> dict[str, Any]:
    """Log-probabilities of an answer's positions; the first token of each is the one sampled."""
    return {
        "content": [
            {
                "token": next(iter(top)),
                "logprob": next(iter(top.values())),
                "bytes": None,
                "top_logprobs": [{"token": t, "logprob": p, "bytes": None} for t, p in top.items()],
            }
            for top in tops
        ]
    }


def engine_for(server: Server, model: str = "tiny", **options: Any) -> ServerEngine:
    return ServerEngine.load(f"server:{model}@{server.base_url}", backoff=0.01, **options)


def asks(n: int) -> list[GenerationRequest]:
    return [GenerationRequest(f"p{i}", (user(f"question {i}"),), seed=5) for i in range(n)]


def choice(prefix: str = "(") -> ScoreRequest:
    return ScoreRequest("s", (user("(A) or (B)?"),), ("A", "B"), prefix)


def failed(call: Callable[[], Any]) -> str:
    """The one line of the InputError that `call` must raise."""
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- generate


def test_sends_what_the_local_engine_would_and_returns_each_answer_with_its_id(server: Server) -> None:
    server.reply = lambda body, n: (200, completion(f"  {body['messages'][-1]['content']}!\n"), {})
    engine = engine_for(server, system="Be kind.")
    made = list(engine.generate(asks(5), Sampling(max_tokens=11, temperature=0.3, top_p=0.9)))
    assert {c.id: c.text for c in made} == {f"p{i}": f"question {i}!" for i in range(5)}
    assert all(c.ended and c.error is None and (c.prompt_tokens, c.completion_tokens) == (7, 3) for c in made)
    sent = server.seen[0]
    assert (sent["max_tokens"], sent["temperature"], sent["top_p"], sent["model"]) == (11, 0.3, 0.9, "tiny")
    assert "repetition_penalty" not in sent
    list(engine.generate(asks(1), Sampling(repetition_penalty=1.2)))
    assert server.seen[-1]["repetition_penalty"] == 1.2
    assert sent["path"] == "/v1/chat/completions"
    assert [m["role"] for m in sent["messages"]] == ["system", "user"]
    assert sent["messages"][0]["content"] == "Be kind."


def test_a_system_message_of_the_chat_stands_in_for_solons(server: Server) -> None:
    chat = (Message(role="system", content="Own."), user("hi"))
    list(engine_for(server).generate([GenerationRequest("p", chat)], Sampling()))
    assert [m["content"] for m in server.seen[0]["messages"]] == ["Own.", "hi"]


def test_the_seed_is_the_requests_own(server: Server) -> None:
    """Same id and seed, same draw; two samples of one prompt (other ids) or another run's seed, another."""
    chat = (user("hi"),)
    for request in (
        GenerationRequest("p/0", chat, seed=1),
        GenerationRequest("p/0", chat, seed=1),
        GenerationRequest("p/1", chat, seed=1),
        GenerationRequest("p/0", chat, seed=2),
    ):
        list(engine_for(server).generate([request], Sampling()))
    a, again, sibling, other = [body["seed"] for body in server.seen]
    assert a == again
    assert len({a, sibling, other}) == 3
    assert all(0 <= seed < 2**31 for seed in (a, sibling, other))


@pytest.mark.parametrize(("finish", "ended"), [("stop", True), ("length", False)])
def test_ended_is_what_the_server_says(server: Server, finish: str, ended: bool) -> None:
    server.reply = lambda body, n: (200, completion(finish=finish), {})
    (made,) = engine_for(server).generate(asks(1), Sampling())
    assert made.ended is ended


def test_no_more_requests_at_once_than_allowed_and_no_fewer_where_there_is_work(server: Server) -> None:
    def reply(body: dict[str, Any], n: int) -> Reply:
        time.sleep(0.05)
        return 200, completion(), {}

    server.reply = reply
    assert len(list(engine_for(server, max_connections=3).generate(asks(12), Sampling()))) == 12
    assert server.most == 3


def test_completions_come_as_they_finish(server: Server) -> None:
    release = threading.Event()

    def reply(body: dict[str, Any], n: int) -> Reply:
        if body["messages"][-1]["content"] == "question 0":
            release.wait(20)
        return 200, completion(), {}

    server.reply = reply
    stream = engine_for(server, max_connections=2).generate(asks(4), Sampling())
    early = [next(stream).id for _ in range(3)]  # while the first is still under way
    release.set()
    assert "p0" not in early
    assert next(stream).id == "p0"


def test_nothing_asked_nothing_sent(server: Server) -> None:
    assert list(engine_for(server).generate([], Sampling())) == []
    assert server.seen == []


@pytest.mark.parametrize(
    "body",
    [
        "<html>hello</html>",
        "{",
        {"choices": []},
        {"choices": [5]},
        {"choices": [{"message": {"content": 5}}]},
        7,
    ],
)
def test_an_answer_that_is_not_a_completion_is_an_error_outcome(server: Server, body: Any) -> None:
    server.reply = lambda _, n: (200, body, {"Content-Type": "text/html"} if "<" in str(body) else {})
    (made,) = engine_for(server).generate(asks(1), Sampling())
    assert made.text == "" and "not a chat completion" in (made.error or "")


def test_a_filtered_answer_is_an_error_outcome(server: Server) -> None:
    server.reply = lambda body, n: (200, completion("half of", finish="content_filter"), {})
    (made,) = engine_for(server).generate(asks(1), Sampling())
    assert made.text == "" and "filter" in (made.error or "")


# --- one retry layer


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_waits_as_long_as_told_and_counts_each_attempt_once(server: Server, form: str) -> None:
    def reply(body: dict[str, Any], n: int) -> Reply:
        # A date has whole seconds: 2 s ahead is at least 1 s away, counted from the answer.
        after = "1" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
        return (429, {"error": {"message": "slow down"}}, {"Retry-After": after}) if n == 0 else (200, completion(), {})

    server.reply = reply
    engine = engine_for(server)
    (made,) = engine.generate(asks(1), Sampling())
    assert made.error is None and made.text == "Fine."
    assert len(server.seen) == engine.usage.requests == 2
    wait = server.times[1] - server.times[0]
    assert 0.95 <= wait < 4  # no sooner than told; the upper end is for a busy machine
    assert server.seen[0] == server.seen[1]  # the same request, the same seed


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_gives_up_after_as_many_attempts_as_allowed_and_the_others_go_on(server: Server, status: int) -> None:
    def reply(body: dict[str, Any], n: int) -> Reply:
        if body["messages"][-1]["content"] == "question 1":
            return status, {"error": {"message": "out of\nmemory"}}, {}
        return 200, completion(), {}

    server.reply = reply
    engine = engine_for(server, attempts=4)
    made = {c.id: c for c in engine.generate(asks(3), Sampling())}
    assert made["p1"].error == f"the server answered {status}: out of memory"
    assert made["p1"].text == "" and not made["p1"].ended
    assert made["p0"].error is None and made["p2"].error is None
    assert len(server.seen) == engine.usage.requests == 2 + 4


def test_what_another_attempt_cannot_cure_is_not_tried_again(server: Server) -> None:
    server.reply = lambda body, n: (400, {"error": {"message": "too long"}}, {})
    engine = engine_for(server)
    (made,) = engine.generate(asks(1), Sampling())
    assert made.error == "the server answered 400: too long"
    assert len(server.seen) == engine.usage.requests == 1


def test_a_server_that_asks_for_an_hour_is_not_waited_for(server: Server) -> None:
    server.reply = lambda body, n: (429, {"error": {"message": "quota"}}, {"Retry-After": "3600"})
    (made,) = engine_for(server).generate(asks(1), Sampling())
    assert made.error == "the server answered 429: asks to wait 3600 s: quota"
    assert len(server.seen) == 1


def test_silence_is_a_timeout_then_an_error_outcome(server: Server) -> None:
    release = threading.Event()

    def reply(body: dict[str, Any], n: int) -> Reply:
        release.wait(20)
        return 200, completion(), {}

    server.reply = reply
    engine = engine_for(server, timeout=0.2, attempts=2)
    (made,) = engine.generate(asks(1), Sampling())
    release.set()
    assert made.error == "the server did not answer within 0.2 s"
    assert engine.usage.requests == 2


def test_a_server_that_goes_away_later_is_an_error_outcome(server: Server) -> None:
    engine = engine_for(server, attempts=2)
    list(engine.generate(asks(1), Sampling()))
    server.close()
    (made,) = engine.generate(asks(1), Sampling())
    assert "connection" in (made.error or "")


# --- what no request could survive


def test_an_unreachable_server_is_said_at_once(server: Server) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = ServerEngine.load(f"server:m@http://127.0.0.1:{port}/v1")  # with the backoff users have
    began = time.monotonic()
    said = failed(lambda: list(engine.generate(asks(20), Sampling())))
    assert "no server answers" in said and str(port) in said and "start it" in said
    assert time.monotonic() - began < 5


def test_an_unknown_model_is_named_and_what_was_finished_is_kept(server: Server) -> None:
    def reply(body: dict[str, Any], n: int) -> Reply:
        return (200, completion(), {}) if n == 0 else (404, {"error": {"message": "no such model"}}, {})

    server.reply = reply
    got = []

    def work() -> None:
        for made in engine_for(server, model="org/gone", max_connections=1).generate(asks(3), Sampling()):
            got.append(made.id)

    said = failed(work)
    assert '"org/gone"' in said and "/v1/models" in said
    assert got == ["p0"]


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(server: Server, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLON_API_KEY", CANARY)
    elsewhere = Server()
    server.reply = lambda body, n: (status, {}, {"Location": elsewhere.base_url + "/chat/completions"})
    said = failed(lambda: list(engine_for(server).generate(asks(2), Sampling())))
    elsewhere.close()
    assert elsewhere.seen == []
    assert "redirects" in said and elsewhere.base_url in said


# --- the key


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_said_without_the_key(
    server: Server, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SOLON_API_KEY", f" {CANARY}\n")
    server.reply = lambda body, n: (status, {"error": {"message": f"wrong key {CANARY}"}}, {})
    engine = engine_for(server, max_connections=1)
    with caplog.at_level("DEBUG"), pytest.raises(InputError, match="SOLON_API_KEY") as caught:
        list(engine.generate(asks(3), Sampling()))
    assert server.headers[0]["authorization"] == f"Bearer {CANARY}"  # it was there to be leaked
    report = "".join(traceback.format_exception(caught.value))
    for text in (str(caught.value), report, repr(engine), str(vars(engine)), caplog.text, engine.name):
        assert CANARY not in text
    assert engine.usage.requests == len(server.seen) == 1  # neither tried again nor gone on


def test_a_key_the_server_repeats_does_not_reach_a_record(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLON_API_KEY", CANARY)
    server.reply = lambda body, n: (400, {"error": {"message": f"your key is {CANARY}, " + "x" * 1000}}, {})
    (made,) = engine_for(server).generate(asks(1), Sampling())
    assert "your key is [key]" in (made.error or "") and CANARY not in str(made)
    assert len(made.error or "") < 300


def test_openais_key_stays_with_openai(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setenv("OPENAI_ADMIN_KEY", CANARY)
    monkeypatch.setenv("OPENAI_ORG_ID", CANARY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"authorization: Bearer {CANARY}")
    list(engine_for(server).generate(asks(1), Sampling()))
    assert CANARY not in str(server.headers)
    assert "authorization" not in server.headers[0]
    for host, goes in (
        ("https://api.openai.com/v1", True),
        ("https://eu.api.openai.com/v1", True),
        ("http://api.openai.com/v1", False),
        ("https://api.openai.com.evil.example/v1", False),
        ("https://evil-openai.com/v1", False),
    ):
        assert (key_for(host) is not None) is goes, host
    server.reply = lambda body, n: (401, {}, {})
    assert "OPENAI_API_KEY goes to OpenAI only" in failed(
        lambda: list(engine_for(server).generate(asks(1), Sampling()))
    )


def test_openais_key_goes_where_openais_own_setting_points(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    list(engine_for(server).generate(asks(1), Sampling()))
    assert server.headers[0]["authorization"] == f"Bearer {CANARY}"


def test_a_key_no_header_can_carry_is_refused_unseen(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLON_API_KEY", f"{CANARY}\nX-Other: 1")
    said = failed(lambda: engine_for(server))
    assert "SOLON_API_KEY" in said and CANARY not in said


# --- score


def test_spellings_of_a_letter_are_summed(server: Server) -> None:
    top = {
        "A": math.log(0.3),
        " A": math.log(0.2),
        "(A": math.log(0.1),
        "B": math.log(0.25),
        "The": math.log(0.1),
    }
    server.reply = lambda body, n: (200, completion("A", logprobs=positions(top)), {})
    (scores,) = engine_for(server).score([choice()])
    assert scores.error is None
    assert scores.logprobs == pytest.approx((math.log(0.6), math.log(0.25)))
    sent = server.seen[0]
    assert (sent["max_tokens"], sent["temperature"], sent["logprobs"], sent["top_logprobs"]) == (
        1,
        0,
        True,
        20,
    )
    assert sent["messages"][-1]["role"] == "user"  # no prefix is sent to a server that could not continue it
    assert "continue_final_message" not in sent


def test_a_prefix_is_sent_to_a_server_that_continues_it(server: Server) -> None:
    server.reply = lambda body, n: (200, completion("A", logprobs=positions({"A": -0.1, "B": -2.0})), {})
    engine = engine_for(server, continue_final_message=True)
    (scores,) = engine.score([choice()])
    sent = server.seen[0]
    assert sent["messages"][-1] == {"role": "assistant", "content": "("}
    assert sent["continue_final_message"] is True and sent["add_generation_prompt"] is False
    assert scores.logprobs == (-0.1, -2.0)
    list(engine.score([choice(prefix="")]))
    assert "continue_final_message" not in server.seen[1]


def test_the_letter_is_read_after_a_lone_bracket(server: Server) -> None:
    def reply(body: dict[str, Any], n: int) -> Reply:
        tops = [{" (": -0.01, "A": -6.0, "B": -6.5}, {"B": -0.2, "A": -1.9}]
        return 200, completion("(B", logprobs=positions(*tops[: body["max_tokens"]])), {}

    server.reply = reply
    engine = engine_for(server)
    (scores,) = engine.score([choice()])
    assert scores.logprobs == (-1.9, -0.2)
    assert [body["max_tokens"] for body in server.seen] == [1, 2]
    assert engine.usage.requests == 2


def test_an_answer_of_a_bracket_alone_is_an_abstention(server: Server) -> None:
    server.reply = lambda body, n: (200, completion("(", logprobs=positions({"(": -0.01, "A": -6.0})), {})
    (scores,) = engine_for(server).score([choice()])
    assert scores.logprobs == (None, None) and "ended" in (scores.error or "")


@pytest.mark.parametrize(
    ("top", "expected", "error"),
    [
        ({"A": -0.1, "a": -3.0}, (-0.1, None), "option B is not among the server's 20 most likely tokens"),
        ({"I": -0.1}, (None, None), "options A and B are not among the server's 20 most likely tokens"),
        # -9999 is OpenAI's word for "not told", and json knows NaN: neither may become a label
        ({"A": -0.1, "B": -9999.0}, (-0.1, None), "option B is not among the server's 20 most likely tokens"),
        (
            {"A": -0.1, "B": math.nan},
            (-0.1, None),
            "option B is not among the server's 20 most likely tokens",
        ),
    ],
)
def test_an_option_the_server_does_not_tell_is_an_abstention(
    server: Server, top: dict[str, float], expected: tuple[float | None, ...], error: str
) -> None:
    server.reply = lambda body, n: (200, completion("A", logprobs=positions(top)), {})
    (scores,) = engine_for(server).score([choice()])
    assert (scores.logprobs, scores.error) == (expected, error)


def test_the_sampled_token_counts_where_the_list_leaves_it_out(server: Server) -> None:
    told = positions({"A": -0.1, "B": -2.0})
    told["content"][0]["top_logprobs"] = [{"token": "B", "logprob": -2.0}]
    server.reply = lambda body, n: (200, completion("A", logprobs=told), {})
    (scores,) = engine_for(server).score([choice()])
    assert scores.logprobs == (-0.1, -2.0)


@pytest.mark.parametrize("logprobs", [None, {"content": None}, {"content": []}])
def test_a_server_without_logprobs_is_said(server: Server, logprobs: Any) -> None:
    server.reply = lambda body, n: (200, completion("A", logprobs=logprobs), {})
    (scores,) = engine_for(server).score([choice()])
    assert scores.logprobs == (None, None)
    assert scores.error == "the server returned no log-probabilities"


def test_only_option_letters_are_scored(server: Server) -> None:
    (scores,) = engine_for(server).score([ScoreRequest("s", (user("?"),), ("Yes", "No"))])
    assert scores.logprobs == (None, None) and '"Yes"' in (scores.error or "")
    assert server.seen == []


def test_scoring_fails_as_generating_does(server: Server) -> None:
    server.reply = lambda body, n: (500, {}, {})
    engine = engine_for(server, attempts=2)
    (scores,) = engine.score([choice()])
    assert scores.logprobs == (None, None) and scores.error == "the server answered 500"
    server.reply = lambda body, n: (404, {}, {})
    failed(lambda: list(engine.score([choice()])))


# --- the ledger


def test_the_ledger_is_what_the_server_saw(server: Server) -> None:
    refused: list[str] = []

    def reply(body: dict[str, Any], n: int) -> Reply:
        told = body["messages"][-1]["content"]
        if told not in refused:  # the first attempt of each
            refused.append(told)
            return 503, {}, {}
        usage = {"prompt_tokens": 100 + n, "completion_tokens": n, "total_tokens": 100 + 2 * n}
        return 200, completion("A", usage=usage, logprobs=positions({"A": -0.1, "B": -2.0})), {}

    server.reply = reply
    engine = engine_for(server, model="gpt-4o-mini")
    made = list(engine.generate(asks(10), Sampling()))
    list(engine.score([choice()]))
    u = engine.usage
    assert all(c.error is None for c in made)
    assert u.requests == len(server.seen) == 2 * (10 + 1)
    assert (u.prompt_tokens, u.completion_tokens) == (server.prompt_tokens, server.completion_tokens)
    assert u.cost_usd == pytest.approx(price_usd("gpt-4o-mini", "", u.prompt_tokens, u.completion_tokens))
    assert u.cost_usd


def test_prices() -> None:
    """gpt-4o-mini since July 2024: $0.15 a million tokens in, $0.075 of them cached, $0.60 out."""
    million = 10**6
    assert price_usd("gpt-4o-mini", "https://api.openai.com/v1", million, million) == pytest.approx(0.75)
    assert price_usd("gpt-4o-mini", "https://api.openai.com/v1", million, 0, million) == pytest.approx(0.075)
    assert price_usd("my-own-model", "http://127.0.0.1:8000/v1", million, million) is None


def test_the_cost_is_unknown_where_the_price_or_the_count_is(server: Server) -> None:
    engine = engine_for(server, model="my-own-model")
    list(engine.generate(asks(1), Sampling()))
    assert engine.usage.cost_usd is None
    server.reply = lambda body, n: (200, completion() | {"usage": None}, {})
    engine = engine_for(server, model="gpt-4o-mini")
    list(engine.generate(asks(1), Sampling()))
    assert engine.usage.cost_usd is None and engine.usage.prompt_tokens == 0


# --- names and fingerprints


@pytest.mark.parametrize(
    "spec",
    [
        "server:",
        "server:m",
        "server:@http://h/v1",
        "server:m@h:80/v1",
        "server:m@ftp://h/v1",
        "server:m@http://",
        "server:m@http:///v1",
        "server:m@http://h:99999/v1",
        "server:m@http://h:x/v1",
        "server:m@http://h/v1?key=1",
        "server:m n@http://h/v1",
        "m@http://h/v1",
    ],
)
def test_a_malformed_name_is_answered_with_the_form(spec: str) -> None:
    assert "server:MODEL@http://host:port/v1" in failed(lambda: ServerEngine.load(spec))


@pytest.mark.parametrize("spec", [f"server:m@http://u:{CANARY}@h/v1", f"server@http://u:{CANARY}@h/v1"])
def test_a_password_in_the_address_is_refused_and_not_repeated(spec: str) -> None:
    assert CANARY not in failed(lambda: ServerEngine.load(spec))


def test_names_that_servers_use_are_read() -> None:
    assert parse_spec("server:org/m:7b@http://[::1]:8000/v1/") == ("org/m:7b", "http://[::1]:8000/v1")
    assert parse_spec("server:m@v2@https://h/openai/v1") == ("m@v2", "https://h/openai/v1")


def test_the_fingerprint_follows_model_host_system_and_what_the_server_says(server: Server) -> None:
    other = Server()
    engines = [
        engine_for(server),
        engine_for(server, model="large"),
        engine_for(server, system="Other."),
        engine_for(other),
    ]
    prints = [e.fingerprint for e in engines]
    server.reply = lambda body, n: (200, completion(system_fingerprint="fp_1"), {})
    prints.append(engine_for(server).fingerprint)
    other.close()
    assert len(set(prints)) == 5


def test_the_fingerprint_is_one_from_the_first_record_to_the_last_and_after_a_restart(server: Server) -> None:
    server.reply = lambda body, n: (200, completion(system_fingerprint=f"fp_{n > 3}"), {})
    engine = engine_for(server)
    before = engine.fingerprint  # asks for one token
    assert engine.usage.requests == len(server.seen) == 1 and server.seen[0]["max_tokens"] == 1
    list(engine.generate(asks(5), Sampling()))
    assert engine.fingerprint == before
    server.seen.clear()
    again = engine_for(server)
    list(again.generate(asks(1), Sampling()))
    assert again.fingerprint == before
    assert len(server.seen) == 1  # the answer had told


# --- leaving


def hanging(release: threading.Event) -> Callable[[dict[str, Any], int], Reply]:
    def reply(body: dict[str, Any], n: int) -> Reply:
        if n > 0:
            release.wait(30)
        return 200, completion(), {}

    return reply


def test_ctrl_c_stops_at_once_though_the_server_hangs(server: Server) -> None:
    release = threading.Event()
    server.reply = hanging(release)
    stream = engine_for(server).generate(asks(6), Sampling())
    assert next(stream).id
    pressed: list[float] = []

    def press() -> None:
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.3, press)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    took = time.monotonic() - pressed[0]
    release.set()
    timer.join()
    assert took < 3  # the server would have hung for 30
    assert not any(t.name == "solon-server" for t in threading.enumerate())


def test_leaving_the_iterator_early_stops_the_rest(server: Server) -> None:
    release = threading.Event()
    server.reply = hanging(release)
    stream = engine_for(server, max_connections=2).generate(asks(50), Sampling())
    next(stream)
    stream.close()
    release.set()
    time.sleep(0.2)  # what was on its way arrives
    assert len(server.seen) <= 4  # of 50: two at once, and what followed the one that was read
    assert not any(t.name == "solon-server" for t in threading.enumerate())


def test_works_inside_a_running_event_loop(server: Server) -> None:
    """As in a notebook."""
    import asyncio

    async def cell() -> int:
        return len(list(engine_for(server).generate(asks(3), Sampling())))

    assert asyncio.run(cell()) == 3


# --- what servers do beside the standard


def ask_one(server: Server, **options: Any) -> Any:
    (made,) = engine_for(server, **options).generate(asks(1), Sampling())
    return made


def score_one(server: Server, **options: Any) -> Any:
    (scores,) = engine_for(server, **options).score([choice()])
    return scores


def refusing(*names: str, words: str = "Unsupported parameter: '{}' is not supported with this model.") -> Any:
    """A server that refuses these parameters, as OpenAI's newer models do."""

    def reply(body: dict[str, Any], n: int) -> Reply:
        for name in names:
            if name in body:
                return 400, {"error": {"message": words.format(name), "param": name}}, {}
        top = {"A": -0.2, "B": -1.8}
        return 200, completion("A", logprobs=positions(top) if body.get("logprobs") else None), {}

    return reply


def test_a_server_that_calls_the_limit_otherwise_is_asked_its_way(server: Server) -> None:
    server.reply = refusing("max_tokens", words="Unsupported '{}'. Use 'max_completion_tokens' instead.")
    engine = engine_for(server)
    assert all(c.error is None for c in engine.generate(asks(12), Sampling(max_tokens=9)))
    assert server.seen[-1]["max_completion_tokens"] == 9 and "max_tokens" not in server.seen[-1]
    asked = len(server.seen)
    assert score_of(engine) == (-0.2, -1.8) and len(server.seen) == asked + 1  # it remembers
    assert engine.usage.requests == len(server.seen)


def score_of(engine: ServerEngine) -> Any:
    (scores,) = engine.score([choice()])
    return scores.logprobs


def test_parameters_that_an_answer_can_be_had_without_are_left_out_and_said(server: Server, capsys: Any) -> None:
    server.reply = refusing("temperature", "seed", "top_p")
    engine = engine_for(server)
    assert all(c.error is None for c in engine.generate(asks(3), Sampling()))
    said = capsys.readouterr().err
    assert said.count("temperature") and said.count("seed") and "samples without" in said
    assert score_of(engine) == (-0.2, -1.8)
    server.reply = refusing("repetition_penalty")
    (made,) = engine_for(server).generate(asks(1), Sampling(repetition_penalty=1.2))
    assert "repetition_penalty" in (made.error or "")  # that would be another sampling: the server's words instead


def test_a_server_that_refuses_whatever_is_asked_is_not_asked_for_ever(server: Server) -> None:
    words = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead. temperature seed top_p"
    server.reply = lambda body, n: (400, {"error": {"message": words}}, {})
    assert words in ask_one(server).error
    assert len(server.seen) <= 6


@pytest.mark.parametrize("words", ["top_logprobs must be at most 5", "top_logprobs: 20 is greater than 5"])
def test_fewer_likely_tokens_are_asked_where_the_server_gives_fewer(server: Server, words: str) -> None:
    def reply(body: dict[str, Any], n: int) -> Reply:
        if body["top_logprobs"] > 5:
            return 400, {"error": {"message": words, "type": "BadRequestError"}}, {}
        return 200, completion("A", logprobs=positions({"A": -0.2, "B": -1.8})), {}

    server.reply = reply
    assert score_one(server).logprobs == (-0.2, -1.8)
    assert [body["top_logprobs"] for body in server.seen] == [20, 5]


@pytest.mark.parametrize(
    ("a", "b"),
    [("\u2581A", "\u2581B"), ("\u0120A", "\u0120B"), ("<0x41>", "<0x42>"), ("\u0120(A", "\u0120(B"), ("**A", "**B")],
)
def test_tokens_as_the_vocabulary_spells_them_are_read(server: Server, a: str, b: str) -> None:
    server.reply = lambda body, n: (200, completion("A", logprobs=positions({a: -0.2, b: -1.8})), {})
    assert score_one(server).logprobs == (-0.2, -1.8)


@pytest.mark.parametrize("first", ["**", "\n", '"', "\u010a\u010a"])
def test_signs_before_the_letter_are_passed_over(server: Server, first: str) -> None:
    def reply(body: dict[str, Any], n: int) -> Reply:
        tops = [{first: -0.01, "A": -6.0, "B": -9.0}, {"B": -0.2, "A": -1.9}]
        return 200, completion("**B", logprobs=positions(*tops[: body["max_tokens"]])), {}

    server.reply = reply
    assert score_one(server).logprobs == (-1.9, -0.2)


def test_the_letter_is_looked_for_after_the_reasoning(server: Server) -> None:
    def reply(body: dict[str, Any], n: int) -> Reply:
        said = ["<think>", "Is", " A", " right", "?", "</think>", "\n\n", "(", "B"]
        tops = [{token: -0.01, "A": -5.0, "B": -5.1} for token in said[:-1]] + [{"B": -0.3, "A": -1.5}]
        return 200, completion("".join(said), logprobs=positions(*tops[: body["max_tokens"]])), {}

    server.reply = reply
    assert score_one(server).logprobs == (-1.5, -0.3)
    server.reply = lambda body, n: (200, completion("<think>", logprobs=positions({"<think>": 0.0, "A": -9.0})), {})
    scores = score_one(server)
    assert scores.logprobs == (None, None) and "reasoning did not end" in scores.error


@pytest.mark.parametrize("logprob", [1000.0, 1e308, 0.5])
def test_log_probabilities_above_zero_are_an_abstention(server: Server, logprob: float) -> None:
    for top in ({"A": logprob, "B": -1.0}, {"A": -1.0, "B": logprob}, {"A": 0.0, "B": 0.0}):
        server.reply = lambda body, n, top=top: (200, completion("A", logprobs=positions(top)), {})
        scores = score_one(server)
        assert scores.logprobs == (None, None) and "log-probabilities are none" in scores.error


@pytest.mark.parametrize(
    ("message", "finish", "says"),
    [
        ({"content": None, "reasoning_content": "Hm"}, "length", "cut inside the model's reasoning"),
        ({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls", "called a tool"),
        ({"content": None}, "stop", "holds no text"),
        ({"content": [{"type": "thinking", "thinking": []}]}, "stop", "holds no text"),
        ({"content": "<think>Hm"}, "length", "cut inside the model's reasoning"),
    ],
)
def test_a_message_without_an_answer_is_a_failure_that_says_why(
    server: Server, message: dict[str, Any], finish: str, says: str
) -> None:
    server.reply = lambda body, n: (200, {"choices": [{"message": message, "finish_reason": finish}]}, {})
    assert says in ask_one(server).error


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("<think>\nI could refuse.\n</think>\n\nTea.", "Tea."),
        ([{"type": "thinking", "thinking": []}, {"type": "text", "text": "Tea."}], "Tea."),
    ],
)
def test_the_answer_is_what_is_left_without_reasoning(server: Server, content: Any, text: str) -> None:
    server.reply = lambda body, n: (200, {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}, {})
    made = ask_one(server)
    assert (made.text, made.error) == (text, None)


def test_half_a_character_is_replaced(server: Server) -> None:
    server.reply = lambda body, n: (
        200,
        '{"choices":[{"message":{"content":"smile \\ud83d"},"finish_reason":"stop"}]}',
        {},
    )
    made = ask_one(server)
    assert made.text == "smile \ufffd" and made.text.encode()


def test_an_error_inside_an_answer_is_the_servers_words(server: Server) -> None:
    server.reply = lambda body, n: (200, {"error": {"message": "rate limited\x1b[2J upstream", "code": 429}}, {})
    engine = engine_for(server, attempts=3)
    (made,) = engine.generate(asks(1), Sampling())
    assert made.error == "the server answered an error: rate limited [2J upstream" and made.again
    assert len(server.seen) == engine.usage.requests == 3
    server.reply = lambda body, n: (200, {"error": {"message": "no"}}, {})
    made = ask_one(server)
    assert "an error: no" in made.error and not made.again


@pytest.mark.parametrize("usage", [{"prompt_tokens": -5}, {"prompt_tokens": 10**30}, {"completion_tokens": "x"}, 7])
def test_a_count_that_is_none_costs_no_answer(server: Server, usage: Any) -> None:
    server.reply = lambda body, n: (200, json.dumps({**completion(), "usage": usage}), {})
    made = ask_one(server)
    assert made.error is None and (made.prompt_tokens, made.completion_tokens) == (0, 0)


def test_a_text_beyond_the_servers_context_is_left_out_and_the_others_go_on(server: Server) -> None:
    def reply(body: dict[str, Any], n: int) -> Reply:
        if "question 1" in body["messages"][-1]["content"]:
            return 400, {"error": {"message": "This model's maximum context length is 512 tokens."}}, {}
        return 200, completion(), {}

    server.reply = reply
    made = {c.id: c for c in engine_for(server).generate(asks(3), Sampling())}
    assert made["p1"].error.startswith("too long for the server: ") and not made["p1"].again
    assert made["p0"].error is None and made["p2"].error is None


# --- deadlines, sizes, outages


class Raw:
    """A server that answers each connection with `send`, byte by byte as it likes."""

    def __init__(self, send: Callable[[socket.socket], None]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, args=(send,), daemon=True).start()

    def _serve(self, send: Callable[[socket.socket], None]) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection, send), daemon=True).start()

    def _answer(self, connection: socket.socket, send: Callable[[socket.socket], None]) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            send(connection)

    def close(self) -> None:
        self.listener.close()


def drip(head: bytes, piece: bytes) -> Callable[[socket.socket], None]:
    def send(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(400):
            connection.sendall(piece)
            time.sleep(0.05)

    return send


@pytest.mark.parametrize(
    "send",
    [
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
        drip(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
        drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    ],
)
def test_the_deadline_is_the_whole_answers(send: Callable[[socket.socket], None]) -> None:
    raw = Raw(send)
    began = time.monotonic()
    engine = ServerEngine.load(f"server:m@{raw.base_url}", timeout=0.4, backoff=0.01)
    (made,) = engine.generate(asks(1), Sampling())
    raw.close()
    assert made.error == "the server did not answer within 0.4 s" and made.again
    assert time.monotonic() - began < 4


def test_an_answer_that_unpacks_to_too_much_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = gzip.compress(b" " * (200 << 20), 9)
    for coding, says in (
        (b"gzip", "larger than 32 MiB"),
        (b"gzip, gzip", "was not asked for"),
        (b"br", "was not asked"),
    ):
        raw = Raw(lambda c, coding=coding: c.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Encoding: " + coding + b"\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb))  # fmt: skip
        (made,) = ServerEngine.load(f"server:m@{raw.base_url}", backoff=0.01).generate(asks(1), Sampling())
        raw.close()
        assert says in made.error


def test_an_outage_ends_the_work_and_what_was_answered_is_kept(server: Server) -> None:
    def reply(body: dict[str, Any], n: int) -> Reply:
        return (200, completion(), {}) if n < 5 else (503, {"error": "model is loading"}, {})

    server.reply = reply
    engine = engine_for(server, attempts=2, max_connections=2)
    made = list(engine.generate(asks(60), Sampling()))
    assert sum(c.error is None for c in made) == 5 and len(made) == 60
    assert all(c.again for c in made if c.error)
    assert len(server.seen) == engine.usage.requests < 5 + 2 * (8 + 2)  # the rest is not asked at all
    with pytest.raises(Outage, match="model is loading"):
        list(engine.generate(asks(3), Sampling()))


def test_failures_that_are_the_requests_own_are_no_outage(server: Server) -> None:
    server.reply = lambda body, n: (400, {"error": "no"}, {})
    engine = engine_for(server)
    list(engine.generate(asks(40), Sampling()))
    assert len(list(engine.generate(asks(40), Sampling()))) == 40 and len(server.seen) == 80


@pytest.mark.parametrize(("name", "text"), [("SOLON_TIMEOUT", "x"), ("SOLON_TIMEOUT", "-1"), ("SOLON_TIMEOUT", "nan"),
                                            ("SOLON_MAX_CONNECTIONS", "0"), ("SOLON_MAX_CONNECTIONS", "1.5")])  # fmt: skip
def test_settings_of_the_environment_are_checked(
    server: Server, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(name, text)
    assert name in failed(lambda: engine_for(server))


# --- one key, one host


def test_a_key_has_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    two = ["https://a.example/v1", "https://b.example/v1"]
    check_keys(two)  # no key, nothing to send
    monkeypatch.setenv("SOLON_API_KEY", CANARY)
    check_keys([two[0], two[0]])
    said = failed(lambda: check_keys(two))
    assert "a.example" in said and "b.example" in said and CANARY not in said
    assert "127.0.0.1:1" in failed(lambda: check_keys(["http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"]))
    monkeypatch.setenv("SOLON_API_KEYS", json.dumps({"b.example": "other-key", "a.example:8443": ""}))
    check_keys([*two, "https://a.example:8443/v1"])
    given = [key_for(url) for url in [*two, "https://a.example:8443/v1"]]
    assert [k and k.get_secret_value() for k in given] == [CANARY, "other-key", None]


@pytest.mark.parametrize("text", ["{", "[]", '{"h": 1}', '{"https://h/v1": "k"}', CANARY])
def test_a_wrong_mapping_of_keys_is_said_without_them(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SOLON_API_KEYS", text)
    said = failed(lambda: key_for("https://h/v1"))
    assert "SOLON_API_KEYS" in said and CANARY not in said


def test_a_key_does_not_go_over_an_open_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLON_API_KEY", CANARY)
    for url in ("http://10.0.0.5:8000/v1", "http://server.example/v1", "http://127.0.0.1.evil.example/v1"):
        said = failed(lambda url=url: ServerEngine.load(f"server:m@{url}"))
        assert "in clear" in said and CANARY not in said
    for url in ("http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:1/v1", "https://server.example/v1"):
        assert key_for(url) is not None
    monkeypatch.setenv("SOLON_ALLOW_HTTP_KEY", "1")
    assert key_for("http://10.0.0.5:8000/v1") is not None


def test_a_key_is_never_pickled(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLON_API_KEY", CANARY)
    for engine in (engine_for(server), SystemOneEngine.load(f"systemone:m@{server.base_url}")):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError, match="not pickled") as caught:
                pickle.dumps(engine, protocol)
            assert CANARY not in str(caught.value)
        with pytest.raises(TypeError):
            copy.deepcopy(engine)
