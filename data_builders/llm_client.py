"""Ask a language model one question, over HTTP: OpenAI's chat completions, as vLLM, llama.cpp, Ollama and clouds have
them. A model in this process, asked in the same way, is in `llm_local`.

    client = HTTPClient("http://localhost:8000/v1", model="qwen")
    answer = client.ask(messages, schema, max_tokens=500)     # one request; retries are those of `llm_calls`

(1) an address of another machine is refused unless the user names its host: reports would leave this one
(2) one request at a time per call, under one time limit for the whole of it, however slowly a server drips; what is
    too large is not read further; a redirection is not followed, since it would carry reports and key elsewhere
(3) an answer is asked for under a JSON schema. A server that refuses that is asked for any JSON, then for plain text;
    so with the other fields that not every server takes
(4) what went wrong comes as `CallFailedError`: whether it passes by itself, concerns this report alone or every one,
    and whether the server may have charged for it
The key is read from the environment alone and stands in no message, whatever a server sends back.
"""

import base64
import contextlib
import datetime
import email.utils
import http.client
import ipaddress
import json
import logging
import os
import socket
import ssl
import threading
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol
from urllib.parse import unquote, urlsplit

from .sources import PASSING_STATUS

logger = logging.getLogger(__name__)

MOST_BYTES = 4_000_000  # of one response; the answer about a long report has some ten thousand
MOST_CHARACTERS = 200_000  # of an answer that are kept: what is longer is no answer to our question
SECONDS_TO_CONNECT = 20.0
# Anthropic's gateway says 529 where others say 503; 520 to 524 are Cloudflare's, in front of a server that is away.
PASSING = (*PASSING_STATUS, 409, 520, 521, 522, 523, 524, 529)
NOT_CHARGED = (400, 401, 402, 403, 404, 405, 409, 413, 415, 422, 425, 429, 503, 529)  # refused before the model worked
FORMATS = ("json_schema", "json_object", "none")
WORDS_OF_FORMAT = ("response_format", "json_schema", "json schema", "json_object", "schema", "grammar", "guided")
WORDS_OF_ROLES = ("system role", "system message", "roles must alternate", "role: system", "role 'system'")
ENDED_BY_LIMIT = ("length", "max_tokens", "model_length")
WORDS_OF_LENGTH = ("context length", "context_length", "context size", "context window", "too long", "maximum context")

Messages = list[dict[str, str]]


class CallFailedError(Exception):
    """A call without an answer.

    Attributes:
        reason: Short, of few kinds, to be counted; without anything a server wrote.
        detail: What the server wrote, cut and without the key. For the terminal.
        kind: "passing" (try again), "report" (this report cannot be asked), "fatal" (none can).
        retry_after: Seconds the server asks to wait, if it does.
        may_be_charged: Whether the server may have worked for it.
        is_busy: Whether the server is well and asks us to come later; that concerns all calls.
    """

    def __init__(
        self, reason: str, kind: str, detail: str = "", retry_after: float | None = None, may_be_charged: bool = False
    ) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.kind, self.detail = reason, kind, detail
        self.retry_after, self.may_be_charged = retry_after, may_be_charged
        self.is_busy = False


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: Its words, without its thoughts where these are marked.
        tokens_in, tokens_out: As the server counts them, None where it does not.
        is_cut: Whether it was ended by a limit on its length.
    """

    text: str
    tokens_in: int | None = None
    tokens_out: int | None = None
    is_cut: bool = False


class ChatClient(Protocol):
    """What `llm_calls` and `llm_decompose` need of a model.

    Attributes:
        model: Its name; part of what an answer is remembered under.
        is_serial: Whether one call has to end before the next begins.
    """

    model: str
    is_serial: bool

    def ask(self, messages: Messages, schema: dict, max_tokens: int) -> Answer: ...

    def close(self) -> None: ...


def is_this_machine(host: str) -> bool:
    """Whether a host of an address is this machine for certain; a name that could lead elsewhere is not."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().rstrip(".") == "localhost"
    return address.is_loopback or address.is_unspecified


def check_may_send(url: str, allowed_host: str | None) -> None:
    """Raise a ValueError where reports would go to another machine, and the user has not named it.

    Args:
        url: Address of the server.
        allowed_host: `--send_reports_to_host`.
    """
    host = urlsplit(url).hostname or ""
    if is_this_machine(host):
        return
    if allowed_host is None:
        raise ValueError(
            f"--llm_url {url} is another machine: the reports would leave this one. If they may (look at your data "
            f"protection rules, and at what the operator keeps), say so with --send_reports_to_host {host}."
        )
    if allowed_host.lower().rstrip(".") != host.lower().rstrip("."):
        raise ValueError(
            f"--send_reports_to_host {allowed_host} is not the host of --llm_url, which is {host}: nothing was sent."
        )


@dataclass(frozen=True)
class _Form:
    """How a request is written: the fields that this server takes."""

    response_format: str = FORMATS[0]
    limit_field: str = "max_tokens"
    has_temperature: bool = True
    has_system: bool = True

    def weaker(self, status: int, message: str, is_proven: bool) -> "_Form | None":
        """The form to try after a refusal, or None where the refusal is not about it.

        Args:
            status, message: Of the refusal.
            is_proven: Whether the server has taken a request in this form.
        """
        text = message.lower()
        if status not in (400, 404, 415, 422, 500, 501) or any(words in text for words in WORDS_OF_LENGTH):
            return None
        if self.limit_field == "max_tokens" and "max_completion_tokens" in text:
            return replace(self, limit_field="max_completion_tokens")
        if self.has_temperature and "temperature" in text:
            return replace(self, has_temperature=False)
        if self.has_system and any(words in text for words in WORDS_OF_ROLES):
            return replace(self, has_system=False)
        lower = FORMATS[FORMATS.index(self.response_format) + 1 :]
        is_about_format = any(words in text for words in WORDS_OF_FORMAT)
        # Some servers say no more than "bad request": what may be about the form is tried in the next one.
        if lower and (is_about_format or (not is_proven and status in (400, 415, 422, 501))):
            return replace(self, response_format=lower[0])
        return None


class HTTPClient:
    """A server with OpenAI's chat completions. Safe to be used from several threads.

    Args:
        url: Base address, such as `http://localhost:11434/v1`; without a path, `/v1` is added.
        model: As the server names it.
        key: Sent as bearer token; None: no key is sent.
        allowed_host: The host, if it is not this machine.
        timeout_s: For one call as a whole, from the first byte sent to the last one read.

    Raises:
        ValueError: If the address is none, holds a key, or is another machine that was not named.
    """

    is_serial = False

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        allowed_host: str | None = None,
        timeout_s: float = 120.0,
    ) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--llm_url {url!r} is no address such as http://localhost:8000/v1.")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "--llm_url holds more than host, port and path. A key belongs into the environment "
                "(--llm_key_variable), where no log and no list of processes shows it."
            )
        check_may_send(parts.geturl(), allowed_host)
        self.host, self.port = parts.hostname, parts.port
        self.is_https = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        self.path = path or "/v1"
        self.model = model
        self.timeout_s = timeout_s
        self._key = key
        self._form, self._is_proven, self._lock = _Form(), False, threading.Lock()
        self._open: set[socket.socket] = set()
        self._is_closed = False

    def __repr__(self) -> str:
        return f"HTTPClient({self.address!r}, model={self.model!r})"

    @property
    def address(self) -> str:
        port = f":{self.port}" if self.port else ""
        return f"{'https' if self.is_https else 'http'}://{self.host}{port}{self.path}"

    def close(self) -> None:
        """End the calls that are under way, from another thread."""
        with self._lock:
            self._is_closed = True
            for connection in self._open:
                _hang_up(connection)

    def models(self) -> list[str] | None:
        """Names of the models that the server offers, or None where it does not tell.

        Raises:
            CallFailedError: If no server answers, or it does not let us in.
        """
        status, _, content = self._request("GET", "/models", None)
        # While it loads a model, a server has no list either: an error where no name was given.
        if status in (401, 403) or (status in PASSING and not self.model):
            raise self._refusal(status, content, {})
        try:
            return [str(entry["id"]) for entry in json.loads(content)["data"]] if status == 200 else None
        except (ValueError, KeyError, TypeError):
            return None

    def ask(self, messages: Messages, schema: dict, max_tokens: int) -> Answer:
        """One answer of at most `max_tokens`, in the JSON schema where the server can hold a model to it.

        Raises:
            CallFailedError: If there is none.
        """
        form, refused = self._form, None
        while True:
            content = self._content(form, messages, schema, max_tokens)
            status, headers, body = self._request("POST", "/chat/completions", content)
            status = _status_in(body) if status == 200 else status
            if status == 200:
                answer = _read_answer(body)
                self._keep(form)
                return answer
            failure = self._refusal(status, body, headers)
            # A refusal in a weaker form that was only a guess: the first one says what is wrong.
            refused = refused or failure
            weaker = form.weaker(status, failure.detail, self._is_proven)
            if weaker is None:
                raise refused if failure.kind == "report" else failure
            form = weaker

    def _content(self, form: _Form, messages: Messages, schema: dict, max_tokens: int) -> bytes:
        messages = messages if form.has_system else without_system(messages)
        content: dict[str, object] = {"model": self.model, "messages": messages, "stream": False}
        content[form.limit_field] = max_tokens
        if form.has_temperature:
            content["temperature"] = 0
        if form.response_format == "json_schema":
            named = {"name": "report", "strict": True, "schema": schema}
            content["response_format"] = {"type": "json_schema", "json_schema": named}
        elif form.response_format == "json_object":
            content["response_format"] = {"type": "json_object"}
        return json.dumps(content).encode()

    def _keep(self, form: _Form) -> None:
        """Write the next requests in the form that was taken."""
        with self._lock:
            self._is_proven = True
            if form == self._form:
                return
            if form.response_format != self._form.response_format:
                instead = {"json_object": "any JSON", "none": "plain text"}.get(form.response_format, "a JSON schema")
                logger.warning(
                    f"{self.address} does not take the response_format {self._form.response_format!r}; answers come as "
                    f"{instead} and are checked all the same. More of them may be refused."
                )
            self._form = form

    def _refusal(self, status: int, body: bytes, headers: dict[str, str]) -> CallFailedError:
        """What a status other than 200 means."""
        detail = self._without_key(_message_of(body))
        text = detail.lower()
        retry_after = _seconds(headers.get("retry-after"))
        may_be_charged = status not in NOT_CHARGED
        if status in (401, 403):
            return CallFailedError(f"the server does not let us in (status {status})", "fatal", detail)
        if status == 402 or (status == 429 and ("insufficient_quota" in text or "exceeded your current quota" in text)):
            return CallFailedError("the account at the server is empty", "fatal", detail)
        if status in PASSING:
            reason = "the server is busy (status 429)" if status == 429 else f"the server failed (status {status})"
            failure = CallFailedError(reason, "passing", detail, retry_after, may_be_charged)
            failure.is_busy = status == 429 or (status == 503 and retry_after is not None)
            return failure
        if status in (404, 405) or 300 <= status < 400:
            what = "sends us to another address" if 300 <= status < 400 else "knows no such address or model"
            return CallFailedError(f"the server {what} (status {status})", "fatal", detail)
        if status == 413 or any(words in text for words in WORDS_OF_LENGTH):
            return CallFailedError("the report is too long for the model", "report", detail)
        kind = "report" if status < 500 else "passing"
        return CallFailedError(f"the server refused the request (status {status})", kind, detail, None, may_be_charged)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def _request(self, method: str, path: str, content: bytes | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body of one request."""
        headers = {"Accept": "application/json", "User-Agent": "fvlm"}
        if content is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection = self._connection()
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:
            raise CallFailedError("the server's certificate is not valid", "fatal", str(error)) from None
        except (OSError, http.client.HTTPException) as error:
            raise CallFailedError("the server cannot be reached", "passing", told(error)) from None
        # Held here: http.client forgets the socket of an answer that ends with the connection.
        own, is_late = connection.sock, threading.Event()
        own.settimeout(self.timeout_s)

        def end() -> None:
            is_late.set()
            _hang_up(own)

        # A limit of a socket holds for each piece that comes; a server that drips would never meet it.
        timer = threading.Timer(self.timeout_s, end)
        timer.daemon = True
        with self._lock:
            self._open.add(own)
            if self._is_closed:
                _hang_up(own)
        timer.start()
        try:
            connection.request(method, f"{self.path}{path}", content, headers)
            response = connection.getresponse()
            body = _read_body(response)
            found = {name.lower(): value for name, value in response.getheaders()}
            status = response.status
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = f"no answer within {self.timeout_s:g} s"
            reason = late if is_late.is_set() else "the connection broke off"
            raise CallFailedError(reason, "passing", told(error), may_be_charged=True) from None
        finally:
            timer.cancel()
            with self._lock:
                self._open.discard(own)
            connection.close()
        if is_late.is_set():
            raise CallFailedError(f"no answer within {self.timeout_s:g} s", "passing", may_be_charged=True)
        return status, found, body

    def _connection(self) -> http.client.HTTPConnection:
        timeout = min(self.timeout_s, SECONDS_TO_CONNECT)
        if not self.is_https:  # never over a proxy: it would read the reports, of a server on this machine as well
            return http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        context = ssl.create_default_context()
        proxy = urllib.request.getproxies().get("https")
        if proxy is None or is_this_machine(self.host) or urllib.request.proxy_bypass(self.host):
            return http.client.HTTPSConnection(self.host, self.port, timeout=timeout, context=context)
        through = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        if through.scheme != "http" or not through.hostname:
            raise CallFailedError("HTTPS_PROXY is no address such as http://proxy:3128", "fatal")
        connection = http.client.HTTPSConnection(
            through.hostname, through.port or 3128, timeout=timeout, context=context
        )
        headers = {}
        if through.username:
            account = f"{unquote(through.username)}:{unquote(through.password or '')}"
            headers["Proxy-Authorization"] = f"Basic {base64.b64encode(account.encode()).decode()}"
        connection.set_tunnel(self.host, self.port or 443, headers)
        return connection


def _hang_up(connection: socket.socket) -> None:
    """End a connection that another thread reads."""
    with contextlib.suppress(OSError):  # it may have ended by itself
        # The plain socket's, of an encrypted one too: its own would take away what the other thread is using.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _read_body(response: http.client.HTTPResponse) -> bytes:
    """The body, or the beginning of one that is too large.

    Raises:
        http.client.IncompleteRead: If less came than was announced.
    """
    pieces, size = [], 0
    while size <= MOST_BYTES and (piece := response.read(65_536)):
        pieces.append(piece)
        size += len(piece)
    if size <= MOST_BYTES and response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(pieces)


def without_system(messages: Messages) -> Messages:
    """The same question for a model that knows no system role: its words stand before the user's first ones."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    first, *others = [message for message in messages if message["role"] != "system"]
    return [{**first, "content": "\n\n".join([*system, first["content"]])}, *others]


def _status_in(body: bytes) -> int:
    """The status of a failure that some gateways put into a response of status 200; 200 where it is none."""
    if b'"choices"' in body:
        return 200
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 200
    return code if isinstance(code, int) and 400 <= code < 600 else 200


def _read_answer(body: bytes) -> Answer:
    """What stands in the response to a chat completion.

    Raises:
        CallFailedError: If it is no such response.
    """
    if len(body) > MOST_BYTES:  # charged, whatever it holds
        return Answer("", is_cut=True)
    try:
        content = json.loads(body)
        choice = content["choices"][0]
        message = choice["message"]
        said = message.get("content")
        usage = content.get("usage") or {}
        reason = choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        reason = "the server's response is no chat completion"
        raise CallFailedError(reason, "passing", _message_of(body), may_be_charged=True) from None
    if isinstance(said, list):  # in parts, as some gateways send it
        said = "".join(part.get("text") or "" for part in said if isinstance(part, dict))
    text = said if isinstance(said, str) else ""
    for name in ("reasoning_content", "reasoning"):
        # Under a schema some servers take the whole answer for thoughts, and leave the content empty.
        thought = message.get(name)
        if not text.strip() and isinstance(thought, str) and thought.lstrip().startswith("{"):
            text = thought
    is_cut = str(reason).lower() in ENDED_BY_LIMIT or len(text) > MOST_CHARACTERS
    # Servers that put the first mark into the question send thoughts with the last one alone.
    text = text.rpartition("</think>")[2][:MOST_CHARACTERS]
    return Answer(text, _count(usage, "prompt_tokens", "input_tokens"),
                  _count(usage, "completion_tokens", "output_tokens"), is_cut)  # fmt: skip


def _count(usage: object, *names: str) -> int | None:
    values = [usage.get(name) for name in names] if isinstance(usage, dict) else []
    counts = [value for value in values if isinstance(value, int) and not isinstance(value, bool) and value >= 0]
    return counts[0] if counts else None


def _message_of(body: bytes) -> str:
    """The message in an error's body, cut. Only what is named a message: other fields may repeat the report."""
    try:
        content = json.loads(body[:MOST_BYTES])
    except (ValueError, RecursionError):
        return ""
    if not isinstance(content, dict):
        return ""
    said: list[object] = []
    for place in (content.get("error"), content.get("detail"), content):
        if isinstance(place, str):
            said += [place]
        elif isinstance(place, dict):
            said += [place.get("code"), place.get("message")]
        elif isinstance(place, list):  # FastAPI's: which field, and what is wrong with it
            for entry in (entry for entry in place[:3] if isinstance(entry, dict)):
                where = entry.get("loc")
                said += [*(where if isinstance(where, list) else ()), entry.get("msg")]
        words = [text for text in said if isinstance(text, str)]
        if words:
            return " ".join(" ".join(words).split())[:300]
    return ""


def _seconds(value: str | None) -> float | None:
    """Retry-After in seconds: a number, or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    now = datetime.datetime.now(datetime.UTC)
    return max(0.0, (until if until.tzinfo else until.replace(tzinfo=datetime.UTC)).timestamp() - now.timestamp())


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def key_from(variable: str) -> str | None:
    """The key in a variable of the environment, or None.

    Raises:
        ValueError: If it cannot be sent.
    """
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"the key in {variable} holds characters that no key has; set it again.")
    return key or None


def choose_model(client: HTTPClient, wanted: str | None) -> str:
    """The model to ask, which is also the proof that a server answers. Costs nothing.

    Raises:
        ValueError: If no server answers, it does not let us in, or there is a choice to be made.
    """
    try:
        offered = client.models()
    except CallFailedError as failure:
        raise ValueError(
            f"--llm_url {client.address}: {failure}. Is the server running, and is this its address? A key is read "
            "from the variable that --llm_key_variable names."
        ) from None
    if wanted is not None:
        if offered and wanted not in offered:
            logger.warning(f"{client.address} does not list a model {wanted!r}, but {sample(offered)}; asking for it.")
        return wanted
    if offered is not None and len(offered) == 1:
        return offered[0]
    listed = f" It offers {sample(offered)}." if offered else ""
    raise ValueError(f"--llm_model is missing: which model of {client.address} shall answer?{listed}")


def sample(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{list(names[:8])}{more}"
