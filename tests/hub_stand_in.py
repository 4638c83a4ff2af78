"""A small Hub over HTTP, in memory: what huggingface_hub and `datasets` ask for when they list, read and push.

    with hub_stand_in() as hub:
        hub.put("dataset", "owner/name", "data/a.txt", b"...")     # one commit each
        HfApi(endpoint=hub.endpoint).list_repo_tree("owner/name", repo_type="dataset")
        hub.requests                                               # ["GET /api/datasets/owner/name/tree/main", ...]

HF_ENDPOINT in the environment of a child process leads it here as a whole. Pushes go the way of Git LFS: set
HF_HUB_DISABLE_XET=1 before huggingface_hub is imported, or `huggingface_hub.constants.HF_HUB_DISABLE_XET` afterwards.

A repository keeps the files of each of its commits. A gated one shows its listing to all and its files to the tokens
that were let in; a private one shows itself to requests with a token. Both answer with the codes of the real Hub.
"""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_FILE_BYTES = 100_000  # larger ones are pushed and listed as LFS files, as are those with these endings
LARGE_FILE_ENDINGS = (".parquet", ".arrow", ".safetensors", ".gz", ".bin", ".npz")
FIRST_COMMIT = "0" * 40
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass
class Repository:
    """Its files at each commit, oldest first; who may see it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {FIRST_COMMIT: {}})
    is_private: bool = False
    admitted: set[str] | None = None  # tokens that may read a gated repository; None: not gated

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def commit(self, files: dict[str, bytes]) -> str:
        """Make these the files of a new commit; returns its id."""
        digest = hashlib.sha1(f"{len(self.commits)} {self.head}".encode())
        for name in sorted(files):
            digest.update(f"{name} {blob_id(files[name])}".encode())
        self.commits[digest.hexdigest()] = dict(files)
        return digest.hexdigest()


@dataclass
class Hub:
    """The state of a stand-in, and what was asked of it."""

    endpoint: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # sha256 -> uploaded LFS content
    requests: list[str] = field(default_factory=list)  # "GET /path", without queries
    sent: dict[str, int] = field(default_factory=dict)  # file -> bytes of it that were sent
    broken: dict[str, list[str]] = field(default_factory=dict)
    failures: dict[str, list[int]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def put(self, repo_type: str, repo_id: str, path: str, content: bytes) -> str:
        """Add or replace a file; the repository is made at its first one. Returns the commit."""
        return self.put_all(repo_type, repo_id, {path: content})

    def put_all(self, repo_type: str, repo_id: str, files: dict[str, bytes]) -> str:
        """Add or replace files in one commit."""
        with self.lock:
            repository = self.repositories.setdefault((repo_type, repo_id), Repository())
            return repository.commit({**repository.commits[repository.head], **files})

    def remove(self, repo_type: str, repo_id: str, path: str, everywhere: bool = False) -> None:
        """Take a file out of the newest commit, or out of all of them: then its address at any commit is dead."""
        repository = self.repositories[repo_type, repo_id]
        for commit in repository.commits if everywhere else [repository.head]:
            repository.commits[commit].pop(path, None)

    def files(self, repo_type: str, repo_id: str) -> dict[str, bytes]:
        """Path -> content at the newest commit."""
        repository = self.repositories[repo_type, repo_id]
        return dict(repository.commits[repository.head])

    def is_private(self, repo_type: str, repo_id: str) -> bool:
        return self.repositories[repo_type, repo_id].is_private

    def gate(self, repo_id: str, admitted: tuple[str, ...] = (), repo_type: str = "dataset") -> None:
        """Let only these tokens read the files."""
        self.repositories[repo_type, repo_id].admitted = set(admitted)

    def break_next(self, path: str, *faults: str) -> None:
        """Answer the next reads of a file with these faults: "status 503", or "cut" (half of the bytes, then silence).

        Reads are GET requests to its `resolve` address; the faults are used up one by one.
        """
        self.broken.setdefault(path, []).extend(faults)

    def fail_next(self, part: str, *statuses: int) -> None:
        """Answer the next requests with `part` in their path by these error codes, one by one."""
        self.failures.setdefault(part, []).extend(statuses)


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """A Hub that answers at `hub.endpoint` until the block is left."""
    server = Server(("127.0.0.1", 0), Handler)
    server.hub = Hub(endpoint=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # 5, the default, are too few while many workers begin: they would wait a second and more

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.connections: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def server_close(self) -> None:
        """Also end the connections that clients keep open: they would be served for ever."""
        super().server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are no news; everything else is a fault of the stand-in and is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Answer(Exception):
    """What a request is answered with; raised, so that any depth may decide it. `is_cut`: half of it, then silence."""

    def __init__(
        self, content=None, status: int = 200, body: bytes | None = None, is_cut: bool = False, **headers: str
    ) -> None:
        super().__init__(status)
        self.status, self.is_cut = status, is_cut
        self.body = body if body is not None else (b"" if content is None else json.dumps(content).encode())
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.headers.setdefault("Content-Type", "application/json" if body is None else "application/octet-stream")


def refusal(status: int, code: str, message: str) -> Answer:
    return Answer({"error": message}, status, X_Error_Code=code, X_Error_Message=message)


def blob_id(content: bytes) -> str:
    """Git's name of a blob, as the Hub gives it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int) -> bool:
    return size > LARGE_FILE_BYTES or path.endswith(LARGE_FILE_ENDINGS)


class Handler(BaseHTTPRequestHandler):
    """One request: find its route, take the answer that is raised there, and send it."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *message) -> None:
        """Nothing on stderr."""

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.read_body()
        self.hub.requests.append(f"{self.command} {unquote(url.path)}")
        try:
            with self.hub.lock:
                for part, statuses in self.hub.failures.items():
                    if part in url.path and statuses:
                        raise Answer({"error": "out of order"}, statuses.pop(0))
                self.route(url.path)
            raise Answer({"error": f"no such route: {self.command} {url.path}"}, 404)
        except Answer as answer:
            self.send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    @property
    def hub(self) -> Hub:
        return self.server.hub

    @property
    def token(self) -> str | None:
        header = self.headers.get("Authorization", "")
        return header.removeprefix("Bearer ") if header.startswith("Bearer ") else None

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if answer.is_cut:
            self.wfile.write(answer.body[: len(answer.body) // 2])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(answer.body)

    def json(self) -> dict:
        return json.loads(self.body)

    # Routes: the path is still quoted, as names may hold an escaped slash.

    def route(self, path: str) -> None:
        if path == "/api/whoami-v2":
            if self.token is None:
                raise refusal(401, "", "Invalid username or password.")
            raise Answer({"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})
        if path == "/api/validate-yaml":
            raise Answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            self.create()
        if match := re.fullmatch(r"/upload/(\w+)", path):
            if hashlib.sha256(self.body).hexdigest() != match[1]:
                raise Answer({"error": "the content has another hash"}, 400)
            self.hub.blobs[match[1]] = self.body
            raise Answer(body=b"")
        if match := re.fullmatch(r"/(?:(?:datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.lfs_batch()
        if match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(.*))?", path):
            repository = self.repository(KINDS[match[1]], match[2])
            action, _, rest = (match[3] or "").partition("/")
            self.api(match[2], repository, action, [unquote(part) for part in rest.split("/")])
        if match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository = self.repository(KINDS[match[1] or "models"], match[2])
            self.resolve(repository, unquote(match[3]), unquote(match[4]))

    def repository(self, repo_type: str, repo_id: str) -> Repository:
        repository = self.hub.repositories.get((repo_type, repo_id))
        if repository is None or (repository.is_private and self.token is None):
            raise refusal(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return repository

    def files_at(self, repository: Repository, revision: str) -> dict[str, bytes]:
        commit = repository.head if revision == "main" else revision
        if commit not in repository.commits:
            raise refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository.commits[commit]

    def check_admitted(self, repository: Repository) -> None:
        if repository.admitted is not None and self.token not in repository.admitted:
            raise refusal(403 if self.token else 401, "GatedRepo", "Access to this dataset is restricted.")

    def api(self, repo_id: str, repository: Repository, action: str, rest: list[str]) -> None:
        if action == "auth-check":
            self.check_admitted(repository)
            raise Answer({})
        if action in ("", "revision"):
            revision = rest[0] if action else "main"
            self.info(repo_id, repository, revision)
        if action == "tree":
            self.tree(repository, rest[0], "/".join(rest[1:]))
        if action == "paths-info":
            files = self.files_at(repository, rest[0])
            asked = self.json()["paths"] if self.body.startswith(b"{") else parse_qs(self.body.decode())["paths"]
            asked = [asked] if isinstance(asked, str) else asked
            raise Answer([entry for path in asked for entry in self.entries(files, path) if not entry["below"]])
        if action == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in self.json()["files"]
            ]
            raise Answer({"files": modes})
        if action == "commit":
            self.commit(repo_id, repository)
        if action == "refs":
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.head}
            raise Answer({"branches": [branch], "tags": [], "converts": []})

    def info(self, repo_id: str, repository: Repository, revision: str) -> None:
        files = self.files_at(repository, revision)
        raise Answer(
            {
                "_id": "1",
                "id": repo_id,
                "sha": repository.head if revision == "main" else revision,
                "private": repository.is_private,
                "gated": "manual" if repository.admitted is not None else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "createdAt": "2026-01-01T00:00:00.000Z",
                "lastModified": "2026-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": path} for path in sorted(files)],
            }
        )

    def tree(self, repository: Repository, revision: str, folder: str) -> None:
        """A listing, a thousand entries a page; the next page is named in the header `Link`."""
        recursive = self.query.get("recursive", ["false"])[0].lower()
        entries = [
            entry
            for entry in self.entries(self.files_at(repository, revision), folder)
            if entry["below"] and (recursive == "true" or "/" not in entry["below"])
        ]
        if folder and not entries:
            raise refusal(404, "EntryNotFound", f"{folder} does not exist")
        start = int(self.query.get("cursor", ["0"])[0])
        page = [{key: value for key, value in entry.items() if key != "below"} for entry in entries[start:][:1000]]
        headers = {}
        if start + 1000 < len(entries):
            address = f"{self.hub.endpoint}{urlsplit(self.path).path}?recursive={recursive}&cursor={start + 1000}"
            headers["Link"] = f'<{address}>; rel="next"'
        raise Answer(page, **headers)

    def entries(self, files: dict[str, bytes], folder: str) -> list[dict]:
        """Files and folders at or below a path, folders first; `below` is the path from there."""
        inside = {path: content for path, content in files.items() if not folder or f"{path}/".startswith(f"{folder}/")}
        parents = {path.rsplit("/", depth)[0] for path in inside for depth in range(1, path.count("/") + 1)}
        found = [
            {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
            for path in sorted(parents)
            if not folder or f"{path}/".startswith(f"{folder}/")
        ]
        for path, content in sorted(inside.items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            if is_large(path, len(content)):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            found.append(entry)
        for entry in found:
            entry["below"] = entry["path"].removeprefix(folder).lstrip("/")
        return found

    def resolve(self, repository: Repository, revision: str, path: str) -> None:
        """A file, or the part of it that the header `Range` asks for."""
        files = self.files_at(repository, revision)
        self.check_admitted(repository)
        commit = repository.head if revision == "main" else revision
        if path not in files:
            raise refusal(404, "EntryNotFound", f"{path} does not exist")
        content = files[path]
        etag = hashlib.sha256(content).hexdigest() if is_large(path, len(content)) else blob_id(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        fault = self.hub.broken[path].pop(0) if self.command == "GET" and self.hub.broken.get(path) else None
        if fault == "cut":
            raise Answer(body=content, is_cut=True, **headers)
        if fault is not None:
            raise Answer({"error": "out of order"}, int(fault.removeprefix("status ")))
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            self.count(path, len(content))
            raise Answer(body=content, **headers)
        start, end = int(part[1]), min(int(part[2] or len(content) - 1), len(content) - 1)
        if start >= len(content):
            raise Answer({"error": "out of range"}, 416, Content_Range=f"bytes */{len(content)}")
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.count(path, end + 1 - start)
        raise Answer(body=content[start : end + 1], status=206, **headers)

    def count(self, path: str, size: int) -> None:
        if self.command == "GET":
            self.hub.sent[path] = self.hub.sent.get(path, 0) + size

    def create(self) -> None:
        asked = self.json()
        repo_type = asked.get("type") or "model"
        repo_id = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        prefix = "" if repo_type == "model" else f"{repo_type}s/"
        address = f"{self.hub.endpoint}/{prefix}{repo_id}"
        if (repo_type, repo_id) in self.hub.repositories:
            raise Answer({"error": "You already created this repo", "url": address}, 409)
        is_private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[repo_type, repo_id] = Repository(is_private=is_private)
        raise Answer({"url": address, "name": repo_id, "id": repo_id})

    def lfs_batch(self) -> None:
        objects = []
        for wanted in self.json()["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/upload/{wanted['oid']}", "header": {}}}
            is_new = wanted["oid"] not in self.hub.blobs
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **({"actions": upload} if is_new else {})})
        raise Answer({"transfer": "basic", "objects": objects})

    def commit(self, repo_id: str, repository: Repository) -> None:
        files = dict(repository.commits[repository.head])
        for line in self.body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif operation["key"] == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: content for path, content in files.items() if not path.startswith(folder)}
        commit = repository.commit(files)
        address = f"{self.hub.endpoint}/{repo_id}/commit/{commit}"
        raise Answer({"success": True, "commitOid": commit, "commitUrl": address, "hookOutput": ""})
