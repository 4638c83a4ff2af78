"""Where a release lies: a local folder, a repository on the Hub, or any other file system that fsspec can read.

    source = Source("hf://datasets/ibrahimhamamci/CT-RATE")
    files = source.files("dataset/valid_fixed")            # relative name -> file, from one listing
    with local_copy(files["valid_1/valid_1_a/valid_1_a_1.nii.gz"]) as path:
        ...                                                # a path like any other, gone after the block

(1) a repository is pinned: its commit is asked for once and stands in the address of every file, so that files of two
    states of a repository that moves cannot be mixed
(2) a folder is listed once; what is asked for by name is looked up there
(3) a file is fetched into a temporary folder of its own and compared with the size in the listing. A source that does
    not answer is asked again after growing pauses, then `SourceError` is raised. The folder is deleted in any case:
    that of a process which was killed by the next one that makes a copy in the same place, on the same machine
Messages name files and repositories, never a token or what stands behind the `?` of an address: those are often keys.
"""

import contextlib
import errno
import functools
import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from .cases import resolve_inside

try:
    import fcntl
except ImportError:  # not on Windows: what a killed process leaves there stays
    fcntl = None

# Seconds between attempts. huggingface_hub and s3fs make some of their own before an error comes here.
PAUSES = (1.0, 2.0, 4.0)
PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)  # answers of a server that is busy or being restarted
HUB_ADDRESS = re.compile(
    r"hf://(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?"
    r"(?:/(?P<path>.*))?"
)

# Folders of temporary copies begin so, and each holds a file to lock. The machine stands in the name: there are shared
# disks on which a lock holds for one machine alone, and another would take what is being read for a dead process's.
COPY_PREFIX, COPY_LOCK = f"fvlm-copy-{hashlib.sha256(platform.node().encode()).hexdigest()[:8]}-", "lock"

Answer = TypeVar("Answer")


class SourceError(OSError):
    """A source that stopped answering, or no longer lets us in: nothing is wrong with the case, stop and come back."""


class SourceGoneError(FileNotFoundError):
    """One file that is not there (any more)."""


class _RefusedError(SourceError):
    """What no second attempt will change: no such repository, terms not accepted, no rights."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a source that is not on this machine. Small and picklable: it travels to worker processes.

    Attributes:
        url: Address in fsspec's form; on the Hub with the commit: `hf://datasets/owner/name@commit/path`.
        size: Bytes as the listing has it, if it does.
        options: What opens the source besides its address, as pairs. Not in `repr`: a token may be among them.
        etag: What changes when the content does (sha256, blob id or the store's own tag), if the listing has it.
    """

    url: str
    size: int | None
    options: tuple[tuple[str, object], ...] = field(default=(), repr=False)
    etag: str | None = None

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


@contextmanager
def local_copy(file: Path | RemoteFile) -> Iterator[Path]:
    """A path to read a file at: its own where it is local, else a temporary copy that is deleted on leaving.

    Copies lie where the system keeps temporary files; TMPDIR names another disk.

    Raises:
        SourceGoneError: If the file is not there (any more).
        SourceError: If the source does not answer, sends less than it should, or no longer lets us in.
    """
    if isinstance(file, Path):
        if not file.exists():
            raise SourceGoneError(f"{file.name}: the file is not there (any more).")
        yield file
        return
    remove_left_copies(tempfile.gettempdir())
    with folder_for_a_copy() as folder:
        # A folder for each attempt: the rest of one must not pass for the result of the next.
        yield _ask(lambda: _fetch(file, Path(tempfile.mkdtemp(dir=folder))), file.name, file.url)


@contextmanager
def folder_for_a_copy() -> Iterator[Path]:
    """A new temporary folder, locked while this process lives and deleted on leaving.

    The system gives a lock up when its owner ends, however it ends; an id of a process may belong to another by then,
    or to another container.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=COPY_PREFIX))
        try:
            lock = os.open(folder / COPY_LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            continue  # another process took it for a dead one's before it was locked
        if _is_locked(lock) and (folder / COPY_LOCK).exists():
            break
        os.close(lock)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            _remove(folder)
        os.close(lock)


@functools.cache
def remove_left_copies(place: str) -> None:
    """Remove the copies of killed processes of this user on this machine; once per process, before its first copy.

    A folder is theirs if it has our prefix and our owner, and if the lock in it can be had. Where no locks are to be
    had, everything stays.
    """
    for folder in Path(place).glob(f"{COPY_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
                continue
            try:
                lock = os.open(folder / COPY_LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            except FileNotFoundError:
                folder.rmdir()  # killed before it was locked; with anything in it, it is not ours and stays
                continue
            try:
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(folder)
            finally:
                os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a folder of copies; its lock last, for without it nobody could tell whose the rest is."""
    for entry in folder.iterdir():
        if entry.name != COPY_LOCK:
            shutil.rmtree(entry, ignore_errors=True)
    (folder / COPY_LOCK).unlink()
    folder.rmdir()


def _is_locked(lock: int) -> bool:
    """Lock an open file; False where another process was first. Also true where the file system knows no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


class Source:
    """The files of a release, wherever it lies.

    Args:
        where: A folder, `hf://datasets/owner/name[@revision][/folder]`, or another address that fsspec reads
            (`s3://`, `gs://`, `memory://`; its package and keys as fsspec wants them).
        token: For the Hub; without it the one of `hf auth login` or HF_TOKEN, False for none.
        revision: Branch, tag or commit of a repository on the Hub.

    Attributes:
        is_local: Whether the files are paths of this machine.
        label: What may be told of the place; a local folder is not named.
        revision: The commit of a repository on the Hub, else None.

    Raises:
        ValueError: If there is no such folder or repository, or it does not let us in; says how to mend it.
        SourceError: If it does not answer.
    """

    def __init__(self, where: str | Path, token: str | bool | None = None, revision: str | None = None) -> None:
        where = str(where)
        for scheme in ("file://", "local://"):
            where = where.removeprefix(scheme)
        is_repository = where.startswith("hf://") and not where.startswith("hf://buckets/")
        if revision is not None and not is_repository:
            raise ValueError(f"revision {revision!r}: only repositories on the Hub (hf://...) have revisions.")
        try:
            if is_repository:
                self._store = _Repository(where, token, revision)
            elif "://" in where:
                self._store = _FileSystem(where)
            else:
                self._store = _Folder(where)
        except _RefusedError as error:
            raise ValueError(str(error)) from None
        self.is_local = isinstance(self._store, _Folder)
        self.label = self._store.label
        self.revision = self._store.revision
        self._trees: dict[str, dict[str, Path | RemoteFile]] = {}
        self._levels: dict[str, tuple[dict[str, RemoteFile], set[str]]] = {}

    def __repr__(self) -> str:
        return f"Source({self.label!r})"

    def file(self, name: str) -> Path | RemoteFile | None:
        """The file of that name, relative to the source, or None.

        Where many files of a folder are wanted, ask for `files` of that folder first: this then looks there, and does
        not list the folder of each file.

        Raises:
            ValueError: If the name is absolute or steps out of the source with `..`.
        """
        name = _checked(name)
        if self.is_local:
            path = self._store.root / name
            return path if path.is_file() else None
        for folder, tree in self._trees.items():
            if not folder or name.startswith(f"{folder}/"):
                return tree.get(name.removeprefix(f"{folder}/") if folder else name)
        folder, _, last = name.rpartition("/")
        return self._level(folder)[0].get(last)

    def files(self, folder: str = "") -> dict[str, Path | RemoteFile]:
        """Everything below a folder: name relative to that folder (with `/`) -> file, sorted; empty if it is missing.

        A folder is listed once, then remembered.
        """
        folder = _checked(folder)
        if folder not in self._trees:
            listing = self._store.tree(folder)
            self._trees[folder] = {name: listing[name] for name in sorted(listing)}
        return self._trees[folder]

    def has_folder(self, folder: str) -> bool:
        """Whether there is a folder of that name, relative to the source."""
        folder = _checked(folder)
        if self.is_local:
            return (self._store.root / folder).is_dir()
        if not folder:
            return True
        parent, _, last = folder.rpartition("/")
        return last in self._level(parent)[1]

    def _level(self, folder: str) -> tuple[dict[str, RemoteFile], set[str]]:
        """The files right in a folder, and the names of the folders in it."""
        if folder not in self._levels:
            self._levels[folder] = self._store.level(folder)
        return self._levels[folder]


class _Folder:
    """A folder of this machine."""

    label = "local folder"
    revision = None

    def __init__(self, where: str) -> None:
        self.root = Path(where)
        if not self.root.is_dir():
            hint = f" If it is meant on the Hub, write hf://datasets/{where}." if where.count("/") == 1 else ""
            raise ValueError(f"there is no folder {where}.{hint}")

    def tree(self, folder: str) -> dict[str, Path]:
        top = self.root / folder
        found: dict[str, Path] = {}
        # Links are followed, to folders as well: mirrors are often spread over disks with them. A link that leads back
        # to a folder above itself would be walked for ever.
        waiting = [(top, "", frozenset[tuple[int, int]]())] if top.is_dir() else []
        while waiting:
            place, prefix, above = waiting.pop()
            status = place.stat()
            here = (status.st_dev, status.st_ino)
            if here in above:
                continue
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.is_dir():
                        waiting.append((place / entry.name, f"{prefix}{entry.name}/", above | {here}))
                    elif entry.is_file():
                        found[prefix + entry.name] = place / entry.name
        return found


class _Repository:
    """A repository on the Hub at one commit, read through huggingface_hub's own client."""

    def __init__(self, where: str, token: str | bool | None, revision: str | None) -> None:
        place = HUB_ADDRESS.fullmatch(where.rstrip("/"))
        if place is None or place["repo"].split("/")[0] in ("datasets", "spaces"):
            raise ValueError(f"{where}: write a repository as hf://datasets/owner/name[@revision][/folder].")
        if revision is not None and place["revision"] not in (None, revision):
            raise ValueError(f"{where}: the address asks for another revision than revision={revision!r}.")
        self.repo_type = {"datasets": "dataset", "spaces": "space", None: "model"}[place["kind"]]
        self.repo_id, self.folder = place["repo"], _checked(place["path"] or "")
        self.address = f"hf://{place['kind'] + '/' if place['kind'] else ''}{self.repo_id}"
        # Read now and sent along: a worker process may have been started with another environment.
        endpoint = _endpoint()
        options = {"endpoint": endpoint, "token": token}
        self.options = tuple((name, value) for name, value in options.items() if value is not None)
        self.api = _hub_api(self.options)
        wanted = revision or place["revision"]
        asked = f"{self.address}@{wanted}" if wanted else self.address
        info = _ask(
            lambda: self.api.repo_info(self.repo_id, revision=wanted, repo_type=self.repo_type, timeout=30), "", asked
        )
        if getattr(
            info, "gated", None
        ):  # its listing is public, its files are not: better told now than at the first volume
            _ask(lambda: self.api.auth_check(self.repo_id, repo_type=self.repo_type), "", asked)
        self.revision = info.sha
        self.pinned = f"{self.address}@{self.revision}"
        self.label = f"{self.pinned}/{self.folder}".rstrip("/")

    def tree(self, folder: str) -> dict[str, RemoteFile]:
        from huggingface_hub.hf_api import RepoFile

        below = "/".join(part for part in (self.folder, folder) if part)
        start = f"{below}/" if below else ""
        return {
            _checked(entry.path.removeprefix(start)): self._file(entry)
            for entry in self._entries(below, recursive=True)
            if isinstance(entry, RepoFile) and entry.path.startswith(start)
        }

    def level(self, folder: str) -> tuple[dict[str, RemoteFile], set[str]]:
        from huggingface_hub.hf_api import RepoFile

        below = "/".join(part for part in (self.folder, folder) if part)
        entries = self._entries(below, recursive=False)
        files = {entry.path.rsplit("/", 1)[-1]: self._file(entry) for entry in entries if isinstance(entry, RepoFile)}
        folders = {entry.path.rsplit("/", 1)[-1] for entry in entries if not isinstance(entry, RepoFile)}
        return files, folders

    def _entries(self, folder: str, recursive: bool) -> list:
        def listed() -> list:
            from huggingface_hub.errors import EntryNotFoundError

            try:
                place = {"revision": self.revision, "repo_type": self.repo_type}
                return list(self.api.list_repo_tree(self.repo_id, folder or None, recursive=recursive, **place))
            except EntryNotFoundError:
                return []

        return _ask(listed, folder, self.pinned)

    def _file(self, entry) -> RemoteFile:
        etag = entry.lfs.sha256 if entry.lfs else entry.blob_id
        return RemoteFile(f"{self.pinned}/{_checked(entry.path)}", entry.size, self.options, etag)


class _FileSystem:
    """A folder of any file system that fsspec knows by its address."""

    revision = None

    def __init__(self, where: str) -> None:
        import fsspec

        scheme, _, rest = where.partition("://")
        if "::" in where or "?" in where or "@" in rest.split("/")[0]:
            raise ValueError(
                f"{_without_keys(where)}: the address must be a plain one, without '::', '?' or 'user:password@'. Keys "
                "belong into the environment or into the configuration of fsspec, where no log can show them."
            )
        self.url = self.label = where.rstrip("/") if rest.strip("/") else where
        try:
            self.fs, root = fsspec.core.url_to_fs(where)
        except ImportError as error:
            raise ValueError(f"{scheme}:// needs a package that is not installed: {error}") from None
        except ValueError as error:
            raise ValueError(f"{self.label}: {error}.") from None
        self.root = root.rstrip("/")
        if not _ask(lambda: self.fs.isdir(root), "", self.label):
            raise ValueError(f"there is no folder {self.label}, or you may not see it.")

    def tree(self, folder: str) -> dict[str, RemoteFile]:
        top = f"{self.root}/{folder}".rstrip("/")

        def listed() -> dict[str, dict]:
            try:
                return self.fs.find(top, detail=True)
            except FileNotFoundError:
                return {}

        found = _ask(listed, folder, self.label)
        names = {name.removeprefix(f"{top}/"): info for name, info in found.items() if name.startswith(f"{top}/")}
        return {_checked(name): self._file(f"{folder}/{name}".lstrip("/"), info) for name, info in names.items()}

    def level(self, folder: str) -> tuple[dict[str, RemoteFile], set[str]]:
        top = f"{self.root}/{folder}".rstrip("/")

        def listed() -> list[dict]:
            try:
                return self.fs.ls(top, detail=True)
            except FileNotFoundError:
                return []

        files, folders = {}, set()
        for info in _ask(listed, folder, self.label):
            name = info["name"].rstrip("/").rsplit("/", 1)[-1]
            if info["type"] == "directory":
                folders.add(name)
            else:
                files[name] = self._file(f"{folder}/{name}".lstrip("/"), info)
        return files, folders

    def _file(self, name: str, info: dict) -> RemoteFile:
        tags = (info.get(key) for key in ("ETag", "etag", "md5Hash", "content_md5"))
        etag = next((str(tag) for tag in tags if tag), None)
        return RemoteFile(f"{self.url.rstrip('/')}/{_checked(name)}", info.get("size"), (), etag)


def _checked(name: str) -> str:
    """A name relative to a source in plain form; empty for the source itself. A name that steps out is refused."""
    plain = resolve_inside(Path(), name).as_posix() if name else "."
    return "" if plain == "." else plain


def _hub_api(options: tuple):
    from huggingface_hub import HfApi

    return HfApi(**dict(options), library_name="fvlm")


def _fetch(file: RemoteFile, folder: Path) -> Path:
    """Bring a file into an empty folder; one attempt."""
    place = HUB_ADDRESS.fullmatch(file.url)
    if place is not None and place["repo"].split("/")[0] != "buckets":
        path = Path(
            _hub_api(file.options).hf_hub_download(
                place["repo"],
                place["path"],
                repo_type={"datasets": "dataset", "spaces": "space", None: "model"}[place["kind"]],
                revision=place["revision"],
                local_dir=folder,  # not the cache of the Hub: terabytes would stay there
                tqdm_class=_no_bar(),
            )
        )
    else:
        import fsspec

        fs, remote = fsspec.core.url_to_fs(file.url, **dict(file.options))
        path = folder / file.name
        fs.get_file(remote, str(path))
    arrived = path.stat().st_size
    if file.size is not None and arrived != file.size:
        raise SourceError(f"{arrived} bytes arrived, {file.size} stand in the listing")
    return path


@functools.cache
def _no_bar() -> type:
    """A progress bar that shows nothing: a build shows one of its own, and a file is one of thousands."""
    from tqdm import tqdm

    class NoBar(tqdm):
        def __init__(self, *args, **options) -> None:
            options.pop("name", None)  # a group of huggingface_hub's bars, unknown to tqdm
            super().__init__(*args, **{**options, "disable": True})

    return NoBar


def _ask(action: Callable[[], Answer], what: str, where: str) -> Answer:
    """The answer to a request; it is made again after a pause while the source does not answer.

    Args:
        action: Makes the request.
        what: The file or folder that is asked for, for messages; may be empty.
        where: Address it belongs to.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except Exception as error:  # each file system has its own kinds
            if type(error).__module__ == "builtins" and not isinstance(error, OSError):
                raise  # a fault of ours
            problem = _explained(error, what, where)
        # Raised out here: an exception that is chained to it would print the address with its keys.
        if pause is None or type(problem) is not SourceError:
            raise problem
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _explained(error: Exception, what: str, where: str) -> Exception:
    """The error as the user should read it. A plain `SourceError` may pass, any other kind will not."""
    from huggingface_hub import errors

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error  # the disk here is full, the source is well
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # it is not in the cache either: this is why it was looked for there
    place = HUB_ADDRESS.fullmatch(where)
    root = _without_keys("/".join(where.split("/")[:3]))
    if place is not None:
        root = f"hf://{place['kind']}/{place['repo']}" if place["kind"] else f"hf://{place['repo']}"
        refusal = _refusal(error, root, place["revision"])
        if refusal is not None:
            return _RefusedError(f"{root}: {refusal}")
    named = f"{what} ({root})" if what else root
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or isinstance(error, PermissionError):
        return _RefusedError(
            f"{named}: access was refused ({_plain(error)}). Check your token or keys; on the Hub: `hf auth login`."
        )
    is_missing = isinstance(error, (FileNotFoundError, errors.EntryNotFoundError))
    if status in (404, 410) or (is_missing and not isinstance(error, errors.LocalEntryNotFoundError)):
        return SourceGoneError(f"{what or root}: the file is not there (any more).")
    if status is not None and status not in PASSING_STATUS:
        return _RefusedError(f"{named}: the source answers with status {status} ({_plain(error)}).")
    if isinstance(error, SourceError):
        return SourceError(f"{named}: {error}.")
    return SourceError(f"{named}: the source does not answer ({type(error).__name__}: {_plain(error)}).")


def _refusal(error: Exception, root: str, revision: str | None) -> str | None:
    """What is to be done about a repository that the Hub does not show to us, or None if it is another error."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        page = f"{_endpoint() or 'https://huggingface.co'}/{root.removeprefix('hf://')}"
        return (
            f"access is given to those who accept its terms. Accept them at {page}, then run `hf auth login` (or set "
            "HF_TOKEN) with a token of the same account that may read gated repositories."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no such revision ({revision}); give a branch, a tag or a commit of it."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "the Hub shows no such repository. Check owner, name and kind (hf://datasets/...); if it is private, run "
            "`hf auth login` (or set HF_TOKEN) with a token that may read it."
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing is fetched. Unset it, or use a local copy."
    if isinstance(error, (errors.HFValidationError, errors.LocalTokenNotFoundError)):
        return _plain(error)
    return None


def _endpoint() -> str | None:
    """The Hub to ask where it is not the public one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _plain(error: Exception) -> str:
    """What an error says, on one line, short, without keys."""
    text = _without_keys(" ".join(str(error).split()))
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _without_keys(text: str) -> str:
    """Text in which no address carries a user, a password or a query, and no token of the Hub stands."""
    text = re.sub(r"(\w+://)[^\s/@]*@", r"\1", text)
    text = re.sub(r"(\w+://[^\s?#'\"]+)[?#][^\s'\"]*", r"\1", text)
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_...", text)
