"""Sources: the same files from a folder, a Hub and another file system; a pinned commit; what is told when it fails."""

import contextlib
import errno
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import fsspec
import pytest
from hub_stand_in import hub_stand_in

from data_builders import sources
from data_builders.sources import COPY_LOCK, COPY_PREFIX, RemoteFile, Source, SourceError, SourceGoneError, local_copy

ROOT = Path(__file__).resolve().parents[1]
REPO = "owner/release"
FILES = {
    "README.md": b"a card",
    "dataset/reports.csv": b"VolumeName\n",
    "dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz": b"one" * 50,
    "dataset/train_fixed/train_2/train_2_a/train_2_a_1.nii.gz": b"two" * 70,
    "dataset/train_fixed/.listed": b"",
    "dataset/valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz": b"three" * 30,
}
VOLUME = "dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz"


@pytest.fixture
def hub(monkeypatch):
    """A Hub that serves FILES; no waiting between attempts."""
    with hub_stand_in() as hub:
        hub.put_all("dataset", REPO, FILES)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield hub


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder in which copies are made; no test may leave one there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir()), "a temporary copy was left behind"


@pytest.fixture(params=["folder", "hub", "memory", "folder of a repository"])
def source(request, tmp_path, hub) -> Source:
    """FILES, wherever they lie."""
    if request.param == "hub":
        return Source(f"hf://datasets/{REPO}")
    if request.param == "folder of a repository":
        hub.put_all("dataset", "owner/deep", {f"a/b/{name}": content for name, content in FILES.items()})
        return Source("hf://datasets/owner/deep/a/b/")
    if request.param == "folder":
        for name, content in FILES.items():
            (tmp_path / "release" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "release" / name).write_bytes(content)
        return Source(tmp_path / "release")
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name, content in FILES.items():
        memory.pipe_file(f"/release/{name}", content)
    return Source("memory://release")


def content_of(file) -> bytes:
    with local_copy(file) as path:
        return path.read_bytes()


def test_every_kind_of_source_shows_the_same_files(source, temporary):
    assert list(source.files("")) == sorted(FILES)
    assert {name: content_of(file) for name, file in source.files().items()} == FILES
    below = source.files("dataset/train_fixed")
    assert list(below) == [".listed", "train_1/train_1_a/train_1_a_1.nii.gz", "train_2/train_2_a/train_2_a_1.nii.gz"]
    assert source.files("dataset/nothing") == {} == source.files("dataset/reports.csv")
    assert source.has_folder("dataset") and source.has_folder("dataset/valid_fixed/valid_1") and source.has_folder("")
    assert not source.has_folder("valid_fixed") and not source.has_folder("dataset/reports.csv")


def test_files_by_name(source, temporary):
    assert content_of(source.file("dataset/reports.csv")) == b"VolumeName\n"
    assert content_of(source.file("README.md")) == b"a card"
    for name in ("dataset", "dataset/train_fixed", "dataset/other.csv", "no/such/folder.csv", "reports.csv"):
        assert source.file(name) is None, name
    file = source.file(VOLUME)
    assert file.name == "train_1_a_1.nii.gz"
    with local_copy(file) as path:
        assert path.name == "train_1_a_1.nii.gz"  # readers go by the ending
    assert path.exists() == source.is_local


@pytest.mark.parametrize("name", ["../secret", "dataset/../../secret", "/etc/passwd", "C:\\secret"])
def test_no_name_leads_out(source, name):
    for ask in (source.file, source.files, source.has_folder):
        with pytest.raises(ValueError, match="must be relative and stay inside"):
            ask(name)


def test_a_listing_that_leads_out_is_refused(hub):
    hub.put("dataset", REPO, "data/../../secret", b"x")
    with pytest.raises(ValueError, match="must be relative and stay inside"):
        Source(f"hf://datasets/{REPO}").files("data")


def test_a_folder_is_listed_once(hub):
    source = Source(f"hf://datasets/{REPO}")
    names = list(source.files("dataset/train_fixed"))
    assert len(names) == 3
    before = len(hub.requests)
    assert [source.file(f"dataset/train_fixed/{name}") is not None for name in names] == [True] * 3
    assert source.files("dataset/train_fixed") and len(hub.requests) == before
    source.file("dataset/reports.csv"), source.file("dataset/other.csv"), source.has_folder("dataset/train_fixed")
    assert len(hub.requests) == before + 1  # the one level `dataset`


def test_long_listings_come_in_pages(hub):
    files = {f"many/{index // 100}/{index}.txt": b"%d" % index for index in range(2100)}
    hub.put_all("dataset", "owner/many", files)
    source = Source("hf://datasets/owner/many")
    assert {f"many/{name}" for name in source.files("many")} == files.keys()
    assert sum("/tree/" in request for request in hub.requests) == 3


def test_a_repository_that_moves_cannot_mix(hub, temporary):
    source = Source(f"hf://datasets/{REPO}")
    before = source.file(VOLUME)
    old = source.revision
    hub.put_all("dataset", REPO, {VOLUME: b"another", "dataset/valid_fixed/new.nii.gz": b"new"})
    assert content_of(before) == FILES[VOLUME]
    assert "new.nii.gz" not in source.files("dataset/valid_fixed")  # listed only now
    assert content_of(source.files("dataset/train_fixed")["train_1/train_1_a/train_1_a_1.nii.gz"]) == FILES[VOLUME]

    moved = Source(f"hf://datasets/{REPO}")
    assert moved.revision != old and content_of(moved.file(VOLUME)) == b"another"
    assert moved.file(VOLUME).etag != before.etag
    for again in (
        Source(f"hf://datasets/{REPO}", revision=old),
        Source(source.label),
        Source(f"{source.label}/dataset"),
    ):
        assert again.revision == old and old in again.label
    assert content_of(again.file(VOLUME.removeprefix("dataset/"))) == FILES[VOLUME]


def test_files_travel_to_other_processes_and_keep_their_token_to_themselves(hub, temporary):
    hub.gate(REPO, admitted=("hf_abcdefghijkl",))
    source = Source(f"hf://datasets/{REPO}", token="hf_abcdefghijkl")
    file = pickle.loads(pickle.dumps(source.file(VOLUME)))
    assert content_of(file) == FILES[VOLUME]
    assert file.size == len(FILES[VOLUME])
    for text in (repr(file), str(file), repr(source), source.label, file.url):
        assert "hf_abc" not in text


def test_what_is_told_of_a_folder_does_not_name_it(tmp_path):
    source = Source(tmp_path)
    assert source.is_local and source.revision is None
    assert str(tmp_path) not in source.label and str(tmp_path) not in repr(source)
    assert Source(f"file://{tmp_path}").is_local


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("hf://datasets/owner/other", "hf://datasets/owner/other: the Hub shows no such repository.*hf auth login"),
        ("hf://datasets/owner/release@nightly", "no such revision .nightly.; give a branch, a tag or a commit"),
        ("hf://owner/release", "hf://owner/release: the Hub shows no such repository.*kind .hf://datasets"),
        ("hf://datasets/owner", "write a repository as hf://datasets/owner/name"),
        ("owner/release", "there is no folder owner/release. .*write hf://datasets/owner/release"),
        ("memory://no/such/place", "there is no folder memory://no/such/place"),
        ("strange://place", "strange://place: .*strange"),
        ("https://example.org/data?key=s3cret", "https://example.org/data: the address must be a plain one"),
        ("https://anna:s3cret@example.org/data", "https://example.org/data: .*user:password"),
    ],
)
def test_sources_that_are_not_there(hub, where, told):
    with pytest.raises(ValueError, match=told) as error:
        Source(where)
    assert "s3cret" not in str(error.value)


def test_a_gated_repository_says_what_to_do(hub):
    hub.gate(REPO, admitted=("hf_let_in",))
    page = f"{hub.endpoint}/datasets/{REPO}"
    for token in (False, "hf_somebodyelse"):
        with pytest.raises(ValueError, match=f"Accept them at {page}, then run `hf auth login`") as error:
            Source(f"hf://datasets/{REPO}", token=token)
        assert "somebody" not in str(error.value)
    assert Source(f"hf://datasets/{REPO}", token="hf_let_in").file(VOLUME) is not None


def test_a_private_repository(hub):
    hub.repositories["dataset", REPO].is_private = True
    with pytest.raises(ValueError, match="if it is private, run `hf auth login`"):
        Source(f"hf://datasets/{REPO}", token=False)
    assert Source(f"hf://datasets/{REPO}", token="hf_mine").file(VOLUME) is not None


def test_revisions_are_for_the_hub_and_cannot_contradict(hub, tmp_path):
    with pytest.raises(ValueError, match="only repositories on the Hub"):
        Source(tmp_path, revision="main")
    with pytest.raises(ValueError, match="asks for another revision than revision='v2'"):
        Source(f"hf://datasets/{REPO}@v1", revision="v2")


def test_a_vanished_file_is_told_from_a_vanished_source(source, hub, tmp_path, temporary):
    file = source.file(VOLUME)
    if source.is_local:
        file.unlink()
    elif file.url.startswith("memory"):
        fsspec.filesystem("memory").rm_file(f"/release/{VOLUME}")
    else:
        repo, inside = ("owner/deep", f"a/b/{VOLUME}") if "deep" in file.url else (REPO, VOLUME)
        hub.remove("dataset", repo, inside, everywhere=True)
    with pytest.raises(SourceGoneError, match="^train_1_a_1.nii.gz: the file is not there") as error, local_copy(file):
        pass
    assert isinstance(error.value, FileNotFoundError) and not isinstance(error.value, SourceError)


def test_a_gate_that_closes_on_the_way_stops(hub, temporary):
    """Not a ValueError: a builder would skip case after case with it."""
    file = Source(f"hf://datasets/{REPO}").file(VOLUME)
    hub.gate(REPO)
    with pytest.raises(SourceError, match="Accept them at"), local_copy(file):
        pass


def test_a_repository_that_is_taken_away_stops(hub, temporary):
    file = Source(f"hf://datasets/{REPO}").file(VOLUME)
    del hub.repositories["dataset", REPO]
    with pytest.raises(SourceError, match="no such repository"), local_copy(file):
        pass


def test_copies_are_deleted_after_an_error_in_the_block(hub, temporary):
    file = Source(f"hf://datasets/{REPO}").file(VOLUME)
    with pytest.raises(ZeroDivisionError), local_copy(file):
        assert len(list(temporary.rglob("train_1_a_1.nii.gz"))) == 1
        raise ZeroDivisionError


COPY_AND_WAIT = """
import os, signal, sys, fsspec
from data_builders.sources import RemoteFile, local_copy
fsspec.filesystem("memory").pipe_file("/place/scan.nii.gz", b"0123456789")
with local_copy(RemoteFile("memory://place/scan.nii.gz", 10)) as path:
    print(path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def copying(tmp_path):
    """A function that starts a process with a temporary copy in `tmp_path`; returns it and the path of the copy."""
    started = []

    def start(before: str = "") -> tuple[subprocess.Popen, Path]:
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(
            subprocess.Popen([sys.executable, "-c", before + COPY_AND_WAIT], cwd=ROOT, env=environment, **pipes)
        )
        return started[-1], Path(started[-1].stdout.readline().strip())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def copy_here(monkeypatch, folder: Path) -> None:
    """Make a copy in a folder, as the next run would."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    sources.remove_left_copies.cache_clear()
    fsspec.filesystem("memory").pipe_file("/place/other.nii.gz", b"xyz")
    assert content_of(RemoteFile("memory://place/other.nii.gz", 3)) == b"xyz"


def test_copies_of_a_killed_process_are_removed_by_the_next(copying, tmp_path, monkeypatch):
    (dead, copy), (living, kept) = copying(), copying()
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert copy.read_bytes() == kept.read_bytes() == b"0123456789" and copy.is_relative_to(tmp_path)
    copy_here(monkeypatch, tmp_path)
    assert not copy.exists() and kept.exists()
    assert len(list(tmp_path.iterdir())) == 1, "the folder of the dead one is gone as a whole"
    living.communicate()  # the end of its input
    assert living.returncode == 0 and list(tmp_path.iterdir()) == []


def test_copies_of_another_machine_on_a_shared_disk_stay(copying, tmp_path, monkeypatch):
    """Its locks may not be seen from here, so nobody can tell whether it still reads them."""
    _, copy = copying("import fcntl, platform; platform.node = lambda: 'other'; fcntl.flock = lambda *_: None\n")
    copy_here(monkeypatch, tmp_path)
    assert copy.exists()


def test_what_others_have_under_such_a_name_stays(copying, tmp_path, monkeypatch):
    """No lock in it, a file, a link that leads elsewhere, another owner."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / COPY_LOCK).touch()
    (tmp_path / f"{COPY_PREFIX}notes").mkdir()
    (tmp_path / f"{COPY_PREFIX}notes" / "thesis.txt").write_text("precious")
    (tmp_path / f"{COPY_PREFIX}list").write_text("precious")
    (tmp_path / f"{COPY_PREFIX}link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    dead, copy = copying()
    dead.kill()
    dead.wait()
    (tmp_path / f"{COPY_PREFIX}empty").mkdir()  # of a process that was killed before it put a lock there
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: 12345)
        copy_here(patch, tmp_path)
    assert copy.exists() and (tmp_path / f"{COPY_PREFIX}empty").exists(), "they are another user's"
    copy_here(monkeypatch, tmp_path)
    assert sorted(path.name.removeprefix(COPY_PREFIX) for path in tmp_path.iterdir()) == [
        "elsewhere",
        "link",
        "list",
        "notes",
    ]
    assert (tmp_path / "elsewhere" / COPY_LOCK).exists() and (tmp_path / f"{COPY_PREFIX}notes" / "thesis.txt").exists()


@pytest.mark.parametrize("moment", ["before the lock is there", "before it is locked"])
def test_a_folder_that_is_taken_for_a_dead_ones_is_made_anew(tmp_path, monkeypatch, moment):
    """Another process clears up between two steps of ours."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    name, module = ("open", os) if moment == "before the lock is there" else ("flock", sources.fcntl)
    step, disturbed = getattr(module, name), []

    def disturb(*arguments, **options):
        if not disturbed:
            disturbed.append(True)
            sources.remove_left_copies.__wrapped__(str(tmp_path))
        return step(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, disturb)
        with sources.folder_for_a_copy() as folder:
            assert disturbed and [path.name for path in folder.iterdir()] == [COPY_LOCK]
            sources.remove_left_copies.__wrapped__(str(tmp_path))
            assert folder.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_locks(tmp_path, monkeypatch):
    """Copies are made, and nobody's are removed."""

    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(sources.fcntl, "flock", no_locks)
    left = tmp_path / f"{COPY_PREFIX}left"
    left.mkdir()
    (left / COPY_LOCK).touch()
    copy_here(monkeypatch, tmp_path)
    assert list(tmp_path.iterdir()) == [left]


@pytest.mark.parametrize(
    "faults", [["status 503"], ["status 503", "status 500"], ["cut"], ["cut", "cut", "status 502"]]
)
def test_passing_faults_are_waited_out(hub, temporary, faults):
    file = Source(f"hf://datasets/{REPO}").file(VOLUME)
    hub.break_next(VOLUME, *faults)
    assert content_of(file) == FILES[VOLUME]
    assert hub.broken[VOLUME] == [], "the faults were never met"


def test_a_server_that_stays_broken_is_an_error_of_the_source(hub, temporary):
    file = Source(f"hf://datasets/{REPO}").file(VOLUME)
    hub.break_next(VOLUME, *["status 503"] * 100)
    with pytest.raises(SourceError, match=r"train_1_a_1.nii.gz \(hf://datasets/owner/release\)") as error:
        content_of(file)
    assert 3 <= 100 - len(hub.broken[VOLUME]) < 20, "a few attempts, not one and not a hundred"
    assert not isinstance(error.value, FileNotFoundError)


def test_a_hub_that_is_gone(monkeypatch, temporary):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sources, "PAUSES", (0.0,))  # huggingface_hub makes half a dozen attempts within each of ours
    with hub_stand_in() as hub:
        hub.put_all("dataset", REPO, FILES)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        source = Source(f"hf://datasets/{REPO}", token=False)
        file = source.file(VOLUME)
    for ask in (lambda: content_of(file), lambda: source.files("dataset"), lambda: Source(f"hf://datasets/{REPO}")):
        with pytest.raises(SourceError, match="does not answer") as error:
            ask()
        assert not isinstance(error.value, FileNotFoundError), "its cases would be skipped one by one"


@pytest.fixture
def memory_file(monkeypatch):
    """A file of another file system, and what its next fetches do: an exception to raise, or nothing."""
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/place/scan.nii.gz", b"0123456789")
    plan, fetch = [], type(memory).get_file

    def get_file(self, *args, **options):
        with contextlib.suppress(IndexError):
            raise plan.pop(0)
        return fetch(self, *args, **options)

    monkeypatch.setattr(type(memory), "get_file", get_file)
    monkeypatch.setattr(sources, "PAUSES", (0.0, 0.0))
    return RemoteFile("memory://place/scan.nii.gz", 10), plan


def test_short_files_are_an_error(memory_file, temporary):
    assert content_of(memory_file[0]) == b"0123456789"
    longer = RemoteFile("memory://place/scan.nii.gz", 11)
    with pytest.raises(SourceError, match="10 bytes arrived, 11 stand in the listing"):
        content_of(longer)


def test_errors_of_any_file_system_are_tried_again(memory_file, temporary):
    class BackendError(Exception):
        """Some file systems have errors that are no OSError."""

    file, plan = memory_file
    plan += [ConnectionResetError("reset"), BackendError("busy")]
    assert content_of(file) == b"0123456789" and not plan
    plan += [BackendError("https://bucket.example.org/scan.nii.gz?Signature=s3cret failed for hf_abcdefghijkl")] * 3
    with pytest.raises(SourceError, match="does not answer .BackendError: https://bucket.example.org/scan") as error:
        content_of(file)
    shown = "".join(traceback.format_exception(error.value))
    assert "s3cret" not in shown and "hf_abc" not in shown


def test_a_refusal_is_not_tried_again(memory_file, temporary):
    file, plan = memory_file
    plan += [PermissionError("AccessDenied"), ConnectionResetError("never reached")]
    with pytest.raises(SourceError, match="access was refused .AccessDenied.*Check your token or keys"):
        content_of(file)
    assert len(plan) == 1


def test_a_full_disk_is_no_fault_of_the_source(memory_file, temporary):
    file, plan = memory_file
    plan += [OSError(errno.ENOSPC, "No space left on device"), ConnectionResetError("never reached")]
    with pytest.raises(OSError, match="No space left") as error:
        content_of(file)
    assert error.value.errno == errno.ENOSPC and not isinstance(error.value, SourceError) and len(plan) == 1


def test_our_own_mistakes_are_not_hidden(memory_file, temporary):
    file, plan = memory_file
    plan += [TypeError("a bug")]
    with pytest.raises(TypeError, match="a bug"):
        content_of(file)


def test_links_to_other_disks_are_followed_and_loops_are_not(tmp_path):
    disk, mirror = tmp_path / "disk", tmp_path / "mirror"
    (disk / "train_1").mkdir(parents=True)
    (disk / "train_1" / "a.nii.gz").write_bytes(b"a")
    (mirror / "dataset").mkdir(parents=True)
    (mirror / "dataset" / "train_fixed").symlink_to(disk, target_is_directory=True)
    (disk / "train_1" / "up").symlink_to(disk, target_is_directory=True)
    (mirror / "dataset" / "gone.csv").symlink_to(tmp_path / "nowhere")
    assert list(Source(mirror).files("dataset")) == ["train_fixed/train_1/a.nii.gz"]
