"""One call of a language model over HTTP: what it sends, what it does not, and what becomes of each kind of failure."""

import base64
import json
import logging
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from llm_reports import right_answer
from llm_stand_in import llm_stand_in

from data_builders import llm_client
from data_builders.llm_answers import answer_schema, load_prompt
from data_builders.llm_client import CallFailedError, HTTPClient, choose_model, is_this_machine, key_from

REPORT = "FINDINGS\n1: Cyst of the liver.\n2: The lung is unremarkable."
SCHEMA = answer_schema(("liver", "lung"), "numbers")
KEY = "sk-secret-0123456789"


@pytest.fixture
def server():
    with llm_stand_in(right_answer) as server:
        yield server


def ask(client: HTTPClient, report: str = REPORT):
    system = load_prompt().system(("liver", "lung"), "numbers")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": report}]
    return client.ask(messages, SCHEMA, 300)


def test_one_question_is_one_request_with_a_schema(server):
    answer = ask(HTTPClient(server.url, "a model"))
    assert json.loads(answer.text) == json.loads(right_answer(REPORT, "numbers"))
    assert (answer.tokens_in, answer.tokens_out) == server.charged[0] and not answer.is_cut
    (body,) = server.bodies
    assert body["model"] == "a model" and body["temperature"] == 0 and body["max_tokens"] == 300
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA and body["stream"] is False
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("refused", "message", "expected"),
    [
        ("json_schema", "'response_format.type' must be json_object or text", {"type": "json_object"}),
        ("response_format", "Unknown field", None),
        ("max_tokens", "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "schema"),
        ("temperature", "Unsupported value: 'temperature' does not support 0 with this model.", "schema"),
        ("system", "Conversation roles must alternate user/assistant/user/assistant/...", "schema"),
    ],
)
def test_a_field_that_the_server_refuses_is_left_out_from_then_on(server, caplog, refused, message, expected):
    server.refuses = {refused: message}
    client = HTTPClient(server.url, "m")
    assert json.loads(ask(client).text) == json.loads(right_answer(REPORT, "numbers"))
    before = len(server.bodies)
    assert before > 1
    ask(client)
    assert len(server.bodies) == before + 1, "the refusal is remembered"
    last = server.bodies[-1]
    if expected == "schema":
        assert refused not in last and last["response_format"]["type"] == "json_schema"
        assert ("max_completion_tokens" in last) == (refused == "max_tokens")
        roles = [message["role"] for message in last["messages"]]
        assert roles == (["user"] if refused == "system" else ["system", "user"])
        assert "You split CT reports" in last["messages"][0]["content"] and REPORT in last["messages"][-1]["content"]
    else:
        assert last.get("response_format") == expected
        assert "does not take the response_format" in caplog.text


def test_a_request_that_is_refused_in_every_form_leaves_the_form_as_it_was(server):
    server.faults = lambda report, number: "status 400" if "kidney" in report else None
    client = HTTPClient(server.url, "m")
    for count in (3, 1):  # any JSON and plain text are tried too, while nothing says that the schema is taken
        before = len(server.bodies)
        with pytest.raises(CallFailedError) as failed:
            ask(client, "FINDINGS\n1: The kidney.")
        assert failed.value.kind == "report" and not failed.value.may_be_charged
        assert len(server.bodies) - before == count
        ask(client)
        assert server.bodies[-1]["response_format"]["type"] == "json_schema"


def test_the_key_goes_to_the_server_and_nowhere_else(server, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    client = HTTPClient(server.url, "m", key_from("SOME_KEY"))
    server.key = KEY
    ask(client)
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    server.key = "another"
    for call in (lambda: ask(client), client.models):
        with pytest.raises(CallFailedError) as failed:
            call()
        assert failed.value.kind == "fatal" and "status 401" in str(failed.value)
        assert "[key]" in str(failed.value) and KEY not in str(failed.value) + failed.value.detail
    with pytest.raises(ValueError, match="does not let us in") as refused:
        choose_model(client, None)
    assert KEY not in f"{refused.value}{client!r}{caplog.text}"
    assert key_from("NO_SUCH_VARIABLE") is None
    monkeypatch.setenv("SOME_KEY", "sk\u2013typographic")
    with pytest.raises(ValueError, match="SOME_KEY holds characters that no key has") as refused:
        key_from("SOME_KEY")
    assert "typographic" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://user:secret@localhost/v1", "http://localhost/v1?api-key=secret"])
def test_a_key_in_the_address_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="belongs into the environment") as refused:
        HTTPClient(url, "m")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *[("localhost", True), ("LOCALHOST.", True), ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True)],
        *[("0.0.0.0", True), ("192.168.0.4", False), ("10.0.0.1", False), ("api.example.org", False)],
        *[("localhost.example.org", False), ("127.0.0.1.example.org", False), ("127.1", False), ("gpu-box", False)],
    ],
)
def test_what_counts_as_this_machine(host, expected):
    assert is_this_machine(host) is expected


def test_another_machine_has_to_be_named(monkeypatch):
    connections = []
    monkeypatch.setattr(llm_client.http.client.HTTPConnection, "connect", lambda self: connections.append(self.host))
    for url in ("https://llm.example.org/v1", "http://localhost@llm.example.org/v1", "http://10.0.0.7:8000"):
        if "@" not in url:
            with pytest.raises(ValueError, match=r"the reports would leave this one.*--send_reports_to_host \S+"):
                HTTPClient(url, "m")
        for named in ("localhost", "example.org", "llm.example.com", ""):
            with pytest.raises(ValueError, match="nothing was sent|holds more than host"):
                HTTPClient(url, "m", allowed_host=named)
    assert HTTPClient("https://LLM.example.org/v1", "m", allowed_host="llm.example.org").host == "llm.example.org"
    assert not connections


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("localhost:8000/v1/", "http://localhost:8000/v1"),
        ("http://localhost/api/v3/chat/completions", "http://localhost/api/v3"),
    ],
)
def test_addresses_as_people_write_them(url, address):
    assert HTTPClient(url, "m").address == address


@pytest.mark.parametrize("url", ["ftp://localhost/v1", "http://", "file:///etc/passwd"])
def test_what_is_no_address(url):
    with pytest.raises(ValueError, match="is no address such as"):
        HTTPClient(url, "m")


@pytest.mark.parametrize(
    ("fault", "kind", "reason", "may_be_charged"),
    [
        ("drop", "passing", "the connection broke off", True),
        ("cut", "passing", "the connection broke off", True),
        ("no envelope", "passing", "the server's response is no chat completion", True),
        ("status 500", "passing", r"the server failed \(status 500\)", True),
        ("busy", "passing", r"the server is busy \(status 429\)", False),
        ("empty account", "fatal", "the account at the server is empty", False),
        ("status 401", "fatal", "does not let us in", False),
    ],
)
def test_kinds_of_failure(server, fault, kind, reason, may_be_charged):
    server.faults = lambda report, number: fault
    with pytest.raises(CallFailedError, match=reason) as failed:
        ask(HTTPClient(server.url, "m"))
    assert (failed.value.kind, failed.value.may_be_charged) == (kind, may_be_charged)
    assert "liver" not in failed.value.reason, "a reason is counted and kept: no report in it"
    assert failed.value.is_busy == (fault == "busy")


ENVELOPES = [
    ({"content": "{1}"}, "stop", {"prompt_tokens": 1, "completion_tokens": 2}, ("{1}", 1, 2, False)),
    ({"content": "{1}"}, "end_turn", {"input_tokens": 1, "output_tokens": 2}, ("{1}", 1, 2, False)),
    ({"content": "{1}"}, None, None, ("{1}", None, None, False)),
    ({"content": "{1"}, "max_tokens", {"prompt_tokens": None}, ("{1", None, None, True)),
    ({"content": [{"type": "text", "text": "{1}"}]}, "stop", {}, ("{1}", None, None, False)),
    ({"content": "Liver {2} </think>\n{1}"}, "stop", {}, ("\n{1}", None, None, False)),  # no thought is kept
    ({"content": "{1}", "reasoning_content": "{2}"}, "stop", {}, ("{1}", None, None, False)),
    ({"content": None, "reasoning_content": " {1}"}, "stop", {}, (" {1}", None, None, False)),
    ({"content": "", "reasoning": "The liver"}, "stop", {}, ("", None, None, False)),
    ({"refusal": "I cannot"}, "stop", {}, ("", None, None, False)),
]


@pytest.mark.parametrize(("message", "reason", "usage", "expected"), ENVELOPES)
def test_answers_as_servers_wrap_them(message, reason, usage, expected):
    body = {"choices": [{"message": message, "finish_reason": reason, "index": 0}], "usage": usage, "timings": {}}
    answer = llm_client._read_answer(json.dumps(body).encode())
    assert (answer.text, answer.tokens_in, answer.tokens_out, answer.is_cut) == expected


@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [
        ({"error": {"code": 429, "message": "Slow down"}}, "passing", "the server is busy (status 429): Slow down"),
        ({"error": {"code": 401, "message": "No key"}}, "fatal", "does not let us in (status 401): No key"),
        ({"error": {"code": "x", "message": "Odd"}}, "passing", "the server's response is no chat completion: x Odd"),
        ({"choices": []}, "passing", "the server's response is no chat completion"),
    ],
)
def test_a_failure_in_a_response_of_status_200(monkeypatch, body, kind, reason):
    client = HTTPClient("http://localhost", "m")
    monkeypatch.setattr(client, "_request", lambda *request: (200, {}, json.dumps(body).encode()))
    with pytest.raises(CallFailedError) as failed:
        ask(client)
    assert failed.value.kind == kind and reason in str(failed.value)


def test_a_server_that_loads_its_model_says_so(monkeypatch):
    for model in ("", "m"):
        client = HTTPClient("http://localhost", model)
        monkeypatch.setattr(client, "_request", lambda *r: (503, {}, b'{"error": {"message": "Loading model"}}'))
        if model:
            assert choose_model(client, model) == model
        else:
            with pytest.raises(ValueError, match=r"\(status 503\): Loading model. Is the server running"):
                choose_model(client, None)


def test_nobody_answers():
    with llm_stand_in(right_answer) as server:
        url = server.url
    with pytest.raises(CallFailedError, match="the server cannot be reached") as failed:
        ask(HTTPClient(url, "m"))
    assert failed.value.kind == "passing" and not failed.value.may_be_charged
    with pytest.raises(ValueError, match=f"--llm_url {url}: the server cannot be reached.*Is the server running"):
        choose_model(HTTPClient(url, "m"), "m")


def test_a_server_that_drips_meets_one_time_limit(server):
    server.faults = lambda report, number: "drip"
    server.slow_s = 0.1  # a byte: each piece is in time, the whole would take a minute
    begin = time.monotonic()
    with pytest.raises(CallFailedError, match="no answer within 0.4 s") as failed:
        ask(HTTPClient(server.url, "m", timeout_s=0.4))
    assert time.monotonic() - begin < 20 and failed.value.may_be_charged


def test_what_is_too_large_is_not_kept(server, monkeypatch):
    server.faults = lambda report, number: "huge"
    answer = ask(HTTPClient(server.url, "m"))
    assert answer.is_cut and answer.text == "" and answer.tokens_in is None
    monkeypatch.setattr(llm_client, "MOST_BYTES", 20_000_000)
    answer = ask(HTTPClient(server.url, "m"))
    assert answer.is_cut and len(answer.text) == llm_client.MOST_CHARACTERS


def test_a_redirection_is_not_followed(server):
    with llm_stand_in(right_answer) as other:
        server.elsewhere = f"{other.url}/chat/completions"
        server.faults = lambda report, number: "redirect"
        with pytest.raises(CallFailedError, match="sends us to another address") as failed:
            ask(HTTPClient(server.url, "m", KEY))
        assert failed.value.kind == "fatal" and not other.asked and not other.headers


def test_no_proxy_reads_reports_for_this_machine(server, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody there
    monkeypatch.delenv("no_proxy", raising=False)
    assert ask(HTTPClient(server.url, "m")).text


def test_a_proxy_is_asked_for_a_way_to_an_encrypted_server_and_reads_nothing(monkeypatch):
    heard = []

    def proxy(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            heard.append(connection.recv(4096).decode())
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            heard.append(connection.recv(4096))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=proxy, args=(listening,))
        thread.start()
        monkeypatch.setenv("https_proxy", f"http://us:er%20@127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        with pytest.raises(CallFailedError, match="cannot be reached"):
            ask(HTTPClient("https://llm.example.org/v1", "m", KEY, "llm.example.org"))
        thread.join(60)
    head, hello = heard
    assert head.startswith("CONNECT llm.example.org:443 HTTP/1.") and KEY not in head
    assert f"Basic {base64.b64encode(b'us:er ').decode()}" in head
    assert hello[:1] == b"\x16", "the beginning of TLS"


def test_closing_ends_calls_under_way(server):
    server.faults, server.slow_s = (lambda report, number: "endless"), 0.1
    client, failures = HTTPClient(server.url, "m", timeout_s=60), []

    def call() -> None:
        try:
            ask(client)
        except CallFailedError as failure:
            failures.append(failure.reason)

    thread = threading.Thread(target=call)
    thread.start()
    while not server.asked:
        time.sleep(0.01)
    client.close()
    thread.join(60)
    assert failures == ["the connection broke off"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"error": {"message": "no  such\nmodel", "code": "model_not_found"}}, "model_not_found no such model"),
        ({"error": "out of memory"}, "out of memory"),
        ({"object": "error", "message": "too long", "code": 400}, "too long"),
        (
            {"detail": [{"loc": ["body", "temperature"], "msg": "is not permitted", "input": "Cyst of the liver."}]},
            "body temperature is not permitted",
        ),
        ({"request": "Cyst of the liver."}, ""),
        (["Cyst of the liver."], ""),
    ],
)
def test_of_an_error_only_what_it_calls_its_message_is_told(body, expected):
    assert llm_client._message_of(json.dumps(body).encode()) == expected
    assert llm_client._message_of(b"<html>Cyst of the liver.</html>") == ""


def test_retry_after_in_seconds_and_as_a_date():
    assert llm_client._seconds("7") == 7.0 and llm_client._seconds("-3") == 0.0
    assert llm_client._seconds(None) is None and llm_client._seconds("soon") is None
    later = datetime.now(UTC) + timedelta(seconds=90)
    assert 80 < llm_client._seconds(format_datetime(later, usegmt=True)) <= 90
    assert llm_client._seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def test_the_model_is_the_one_that_is_offered(server, caplog):
    client = HTTPClient(server.url, "")
    assert choose_model(client, None) == "stand-in"
    server.models = ["a", "b"]
    with pytest.raises(ValueError, match=r"--llm_model is missing.*It offers \['a', 'b'\]"):
        choose_model(client, None)
    assert choose_model(client, "c") == "c" and "does not list a model 'c'" in caplog.text
    server.models = None
    assert choose_model(client, "c") == "c"
    with pytest.raises(ValueError, match="--llm_model is missing"):
        choose_model(client, None)
