"""What every test shares: the sibling folder of samples and published numbers, and one thread per process."""

import signal
import threading
from pathlib import Path

import pytest
import torch
from tiny_release import ct_rate_release

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_sessionstart() -> None:
    """Hear Ctrl-C: a shell lets what it runs in the background ignore it, and so would the commands of the tests."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Two test processes on two cores: more threads than that only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` beside the checkout: real CT samples, sample reports, outputs of the published code."""
    if not (SHARED / "golden" / "README.md").is_file():
        pytest.skip("the folder ../shared (CT samples and published outputs) is not beside this checkout")
    return SHARED


@pytest.fixture(scope="module")
def release(request, tmp_path_factory) -> Path:
    """A release in CT-RATE's layout with the reconstructions NAMES of the test's file, which leaves it as it is."""
    return ct_rate_release(tmp_path_factory.mktemp("release"), request.module.NAMES)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """`datasets` keeps its copies in the test's own folder and asks no network."""
    for name, value in {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    return str(tmp_path / "cache")
