"""A server with OpenAI's chat completions, in memory, that knows the right answer and goes wrong when it is told to.

    with llm_stand_in(right_answer) as server:
        server.faults = lambda report, number: "drop" if number == 1 else None
        HTTPClient(server.url, "model").ask(...)
        server.asked                       # the reports as they were asked, in the order in which they came

`right_answer(report, form)` is the JSON text for what stands in the user's message. A fault is one of FAULTS; `number`
is how often this very report was asked before it, from 1. What a server would charge for is counted, whether or not its
answer arrives.
"""

import http.client
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from hub_stand_in import Server as QuietServer

FAULTS = (
    *("slow", "drip", "drop", "cut", "invalid", "prose", "invents", "forgets", "lazy", "truncated", "huge", "endless"),
    *("busy", "busy a day", "status 500", "status 400", "status 401", "empty account", "no envelope", "no usage"),
    *("thinks", "redirect"),
)
CONTENT_BYTES = 3  # per token: the server's tokenizer is finer than the client's estimate


@dataclass
class LLM:
    """The state of a stand-in, and what was asked of it."""

    right_answer: Callable[[str, str], str]
    url: str = ""
    faults: Callable[[str, int], str | None] = lambda report, number: None
    refuses: dict[str, str] = field(default_factory=dict)  # field, format or role of a request -> message of a 400
    models: list[str] | None = field(default_factory=lambda: ["stand-in"])
    key: str | None = None
    retry_after: str | None = "0.2"
    slow_s: float = 0.2
    elsewhere: str = ""
    ignores_limit: bool = False  # makes more tokens than max_tokens allows, and counts them
    asked: list[str] = field(default_factory=list)
    bodies: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    charged: list[tuple[int, int]] = field(default_factory=list)
    answered: Counter = field(default_factory=Counter)  # report -> whole answers that were sent
    under_way: int = 0
    most_under_way: int = 0
    connections: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    def cost(self, price_in: float, price_out: float) -> float:
        """What the server would charge for everything."""
        return sum(tokens_in * price_in + tokens_out * price_out for tokens_in, tokens_out in self.charged) / 1e6

    def settle(self) -> None:
        """Wait until all that a client sent before it ended is counted, also what waits to be read."""
        # Connections are taken in their order: once this one has its answer, all before it have their thread.
        last = http.client.HTTPConnection(urlsplit(self.url).netloc)
        last.request("GET", "/v1/models")
        last.getresponse().read()
        last.close()
        while self.connections:
            time.sleep(0.005)


class Server(QuietServer):
    request_queue_size = 128  # of 5, the default, a busy machine lets calls of eight threads wait for a second

    def process_request(self, request, client_address) -> None:
        with self.llm.lock:
            self.llm.connections += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self.llm.lock:
                self.llm.connections -= 1


@contextmanager
def llm_stand_in(right_answer: Callable[[str, str], str]) -> Iterator[LLM]:
    """A server that answers at `llm.url` until the block is left."""
    server = Server(("127.0.0.1", 0), Handler)
    server.llm = LLM(right_answer, f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.llm
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    is_under_way = False

    def log_message(self, *message) -> None:
        """Nothing on stderr."""

    @property
    def llm(self) -> LLM:
        return self.server.llm

    def do_GET(self) -> None:
        if not self.may_enter():
            return
        if self.llm.models is None:
            self.send({"error": "no such route"}, 404)
        else:
            self.send({"data": [{"id": name} for name in self.llm.models]})

    def do_POST(self) -> None:
        llm = self.llm
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = next(message["content"] for message in body["messages"] if message["role"] == "user")
        report = re.search(r"(?:^|\n\n)((?:FINDINGS|IMPRESSION)\n.*)", question, re.DOTALL)[1]
        with llm.lock:
            llm.asked.append(report)
            llm.bodies.append(body)
            llm.headers.append(dict(self.headers))
            llm.times.append(time.monotonic())
            number = llm.asked.count(report)
            llm.under_way += 1
            llm.most_under_way = max(llm.most_under_way, llm.under_way)
        self.is_under_way = True
        try:
            with suppress(ConnectionError):
                self.answer(body, report, number)
        finally:
            self.leave()

    def leave(self) -> None:
        """No longer under way: before the last byte is sent, since its client may ask again before this one goes on."""
        with self.llm.lock:
            self.llm.under_way -= self.is_under_way
            self.is_under_way = False

    def may_enter(self) -> bool:
        if self.llm.key is None or self.headers.get("Authorization") == f"Bearer {self.llm.key}":
            return True
        # As careless as some gateways are: the key that was sent stands in the message.
        self.send({"error": {"message": f"Incorrect API key provided: {self.headers.get('Authorization')}."}}, 401)
        return False

    def answer(self, body: dict, report: str, number: int) -> None:
        llm = self.llm
        if not self.may_enter():
            return
        kinds = {*body, body.get("response_format", {}).get("type"), *(one["role"] for one in body["messages"])}
        for name, message in llm.refuses.items():
            if name in kinds:
                self.send({"error": {"message": message}}, 400)
                return
        fault = llm.faults(report, number)
        assert fault is None or fault in FAULTS, fault
        if fault in ("busy", "busy a day"):
            wait = "86400" if fault == "busy a day" else llm.retry_after
            self.send({"error": {"message": "Too many requests"}}, 429, {"Retry-After": wait} if wait else {})
            return
        if fault == "empty account":
            self.send({"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}, 429)
            return
        if fault == "redirect":
            self.send({}, 307, {"Location": llm.elsewhere})
            return
        if fault and fault.startswith("status"):
            self.send({"error": {"message": f"out of order, in the midst of: {report}"}}, int(fault[-3:]))
            return
        form = "numbers" if "sentences" in body_schema(body) else "quotes"
        text, reason = llm.right_answer(report, form), "stop"
        if fault in ("slow", "drip", "endless"):
            time.sleep(llm.slow_s if fault == "slow" else 0)
        if fault == "invalid":
            text = text[:-2] + ",,"
        if fault == "prose":
            text = "I am sorry, I cannot help with medical texts."
        if fault == "invents":
            text = invented(text, form)
        if fault == "forgets":
            content = json.loads(text)
            content["sentences"] = content["sentences"][:-1]
            text = json.dumps(content)
        if fault == "lazy":
            content = json.loads(text)
            empty = [{**entry, "abnormal": [], "normal": []} for entry in content.get("sentences", ())]
            text = json.dumps({"sentences": empty} if form == "numbers" else {"organs": []})
        if fault == "thinks":
            text = f"<think>{{Let me see}}</think>Here it is:\n```json\n{text}\n```"
        if fault == "truncated":
            text, reason = text[: len(text) // 2], "length"
        if fault == "huge":
            text = text + " " * 9_000_000
        tokens_in = sum(len(message["content"].encode()) for message in body["messages"]) // CONTENT_BYTES
        tokens_out = len(text.strip().encode()) // CONTENT_BYTES
        limit = body.get("max_tokens", body.get("max_completion_tokens"))
        if not llm.ignores_limit:
            tokens_out = min(tokens_out, limit)
        with llm.lock:
            llm.charged.append((tokens_in, tokens_out))
        if fault == "drop":
            self.close_connection = True
            return
        content = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]}
        content["usage"] = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
        if fault == "no usage":
            del content["usage"]
        if fault == "no envelope":
            content = {"status": "ok"}
        raw = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(raw[: len(raw) // 2])
            self.close_connection = True
            return
        if fault in ("drip", "endless"):
            for byte in raw:
                self.wfile.write(bytes([byte]))
                time.sleep(llm.slow_s)
        else:
            with llm.lock:
                llm.answered[report] += 1
            self.leave()
            self.wfile.write(raw)

    def send(self, content: dict, status: int = 200, headers: dict[str, str] | None = None) -> None:
        raw = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.leave()
        self.wfile.write(raw)


def body_schema(body: dict) -> str:
    """What form of answer a request asks for, also where the schema was refused: the task says it."""
    return body["messages"][0]["content"].split("Answer with JSON alone", 1)[1][:200].split(":", 2)[1]


def invented(text: str, form: str) -> str:
    """A right answer with something in it that no report says."""
    content = json.loads(text)
    if form == "numbers":
        content["sentences"].append({"n": 99, "abnormal": ["liver"], "normal": []})
    else:
        made_up = ["There is a large invented mass in the liver."]
        content["organs"].append({"organ": "liver", "findings": made_up, "impression": [], "abnormal": True})
    return json.dumps(content)
