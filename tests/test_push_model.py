"""A run pushes every checkpoint as a folder that loads from the Hub; a Hub that fails costs it nothing.

The Hub is a stand-in over HTTP; uploads run in processes of their own, as they do in a training.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace as Thing

import numpy as np
import pytest
import torch
import yaml
from hub_stand_in import Hub, hub_stand_in
from safetensors.torch import load_file
from tiny_split import ORGANS, TINY_RECIPE, write_tiny_split

import train_fvlm
from training_fvlm import hub as hub_module
from training_fvlm import push
from training_fvlm.arguments import SettingsError
from training_fvlm.card_facts import data_licence
from training_fvlm.hub import PushCallback, Uploads

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's way to upload

REPO = "owner/tiny-model"
CODE = {"configuration_fvlm.py", "modeling_fvlm.py", "vision.py", "processing_fvlm.py", "pipeline_fvlm.py"}
CARD = {"README.md", "run.json", "organ_losses.csv", "eval_organ_losses.csv", "loss_curves.png"}
LOADED = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A split and a recipe: two checkpoints in six steps."""
    folder = tmp_path_factory.mktemp("push")
    write_tiny_split(folder / "split")
    manifest = json.loads((folder / "split" / "manifest.json").read_text())
    manifest["settings"]["organ_set"]["classes"] = {organ: [organ] for organ in ORGANS}  # the pipeline reads them
    (folder / "split" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
    return folder


def log_in(monkeypatch, endpoint: str) -> None:
    """Lead this process, and those it starts, to a Hub; with a token."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name, value in {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


@pytest.fixture
def hub(monkeypatch):
    with hub_stand_in() as stand_in:
        log_in(monkeypatch, stand_in.endpoint)
        yield stand_in


def train(work, output_dir, *words: str, repo: str | None = REPO) -> int:
    command = ["--recipe", str(work / "tiny.yaml"), "--data", str(work / "split"), "--output_dir", str(output_dir)]
    named = ["--hub_model_id", repo] if repo else []
    # A step takes milliseconds here: without waiting, the second checkpoint would be passed over.
    return train_fvlm.main([*command, "--push_to_hub", *named, "--hub_always_push", *words])


def commits(hub: Hub, repo: str = REPO) -> list[dict[str, bytes]]:
    """Files of every commit that holds any."""
    return [files for files in hub.repositories["model", repo].commits.values() if files]


def header_of(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---\n", 2)[1])


# What arrives


@pytest.fixture(scope="module")
def pushed(work):
    """A Hub to which a run has pushed every save, and the run."""
    with pytest.MonkeyPatch.context() as monkeypatch, hub_stand_in() as stand_in:
        log_in(monkeypatch, stand_in.endpoint)
        assert train(work, work / "run", "--hub_token", "hf_spoken") == 0
        yield stand_in, work / "run"


def test_every_push_is_a_whole_private_model(pushed):
    hub, run = pushed
    assert hub.is_private("model", REPO)
    pushes = commits(hub)
    assert len(pushes) == 3, "two checkpoints and the end"
    for files in pushes:
        assert files.keys() >= CODE | CARD | LOADED
        strange = {name for name in files if not name.endswith(".py")} - CARD - LOADED
        assert not strange, "a file that nobody needs"
        assert header_of(files["README.md"])["library_name"] == "transformers"
    steps = [json.loads(files["run.json"])["steps"] for files in pushes]
    assert steps == [3, 6, 6]
    weights = [files["model.safetensors"] for files in pushes]
    assert weights[0] == (run / "checkpoint-3" / "model.safetensors").read_bytes() != weights[1] == weights[2]
    assert not (run / "_hub").exists()


def test_no_push_names_a_secret_a_place_or_this_machine(pushed, work):
    hub, run = pushed
    words = [str(work), "hf_spoken", "hf_test", str(Path.home()), sys.prefix]
    words += [platform.node()] if len(platform.node()) > 9 else []  # "localhost" may stand in any text
    for files in commits(hub):
        for name, content in files.items():
            assert not any(word.encode() in content for word in words), name


LOAD = """
import importlib.util, json, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
assert importlib.util.find_spec("modeling_fvlm") is None and importlib.util.find_spec("training_fvlm") is None
import numpy as np
from transformers import AutoModel, AutoProcessor, pipeline

repo, revision, scan = sys.argv[1:]
where = {"revision": revision, "trust_remote_code": True}
model = AutoModel.from_pretrained(repo, **where).eval()
processor = AutoProcessor.from_pretrained(repo, **where)
tokens = processor(text=["Nodule.", "lung shows no significant abnormalities."])
embeds = model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
arrays = np.load(scan)
pipe = pipeline("ct-zero-shot", model=repo, **where)
findings = [{"finding": "Nodule", "organ": "lung", "positive": "Nodule.", "negative": "No nodule."}]
inputs = {"volume": arrays["volume"], "mask": arrays["mask"], "affine": arrays["affine"], "numbering": {1: "lung"}}
answers = pipe(inputs, findings=findings)
print(json.dumps([type(model).__name__, float(embeds.detach().sum()), answers[0]["probability"]]))
"""


def test_a_push_loads_by_its_name_where_nothing_of_ours_is_installed(pushed, tmp_path):
    hub, run = pushed
    revision = list(hub.repositories["model", REPO].commits)[1]  # the first: no later one makes up for it
    generator = torch.Generator().manual_seed(0)
    volume, mask = torch.randint(-900, 900, (36, 20, 12), generator=generator), torch.zeros(36, 20, 12)
    mask[4:16, 4:12, 3:8] = 1
    affine = torch.diag(torch.tensor([-1.0, -1.0, 3.0, 1.0]))
    np.savez(tmp_path / "scan.npz", volume=volume.numpy(), mask=mask.byte().numpy(), affine=affine.numpy())
    (tmp_path / "load.py").write_text(LOAD)
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "home")}
    variables |= {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "load.py"), REPO, revision, str(tmp_path / "scan.npz")]
    process = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    name, total, probability = json.loads(process.stdout.splitlines()[-1])

    from modeling_fvlm import FVLMModel, FVLMProcessor

    folder = run / "checkpoint-3"
    model, processor = FVLMModel.from_pretrained(folder).eval(), FVLMProcessor.from_pretrained(folder)
    tokens = processor(text=["Nodule.", "lung shows no significant abnormalities."])
    here = model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
    assert name == "FVLMModel" and total == pytest.approx(float(here.detach().sum()), abs=1e-4)
    assert 0 < probability < 1


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [("checkpoint", {"last-checkpoint"}), ("all_checkpoints", {"checkpoint-3", "checkpoint-6"})],
)
def test_optimizer_states_are_pushed_where_they_are_asked_for(hub, work, tmp_path, strategy, folders):
    words = ["--hub_strategy", strategy, "--load_best_model_at_end", "--metric_for_best_model", "eval_loss"]
    assert train(work, tmp_path / "run", *words) == 0
    files = hub.files("model", REPO)
    assert {name.split("/")[0] for name in files if "/" in name} == folders
    for folder in folders:
        inside = {name.removeprefix(f"{folder}/") for name in files if name.startswith(f"{folder}/")}
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"} <= inside
        state = json.loads(files[f"{folder}/trainer_state.json"])
        assert state["best_model_checkpoint"] in ("checkpoint-3", "checkpoint-6"), "the folder of this machine"
    last = json.loads(files[f"{max(folders)}/trainer_state.json"])
    assert last["global_step"] == 6, "an older one took its place, or it was not replaced"
    assert not any(str(tmp_path).encode() in content for content in files.values())


def test_the_end_alone(hub, work, tmp_path):
    assert train(work, tmp_path / "run", "--hub_strategy", "end") == 0
    (files,) = commits(hub)
    assert files.keys() >= CODE | CARD | LOADED and json.loads(files["run.json"])["steps"] == 6


def test_a_repository_is_named_after_the_run(hub, work, tmp_path):
    words = ["--hub_strategy", "end", "--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"]
    assert train(work, tmp_path / "my_run", *words, repo=None) == 0
    assert hub.is_private("model", "tester/my_run") and "model.safetensors" in hub.files("model", "tester/my_run")


# A Hub that fails


@pytest.fixture
def told(capfd, caplog):
    """What was printed and logged so far, in one line."""

    def read() -> str:
        output = capfd.readouterr()
        return " ".join((output.out + output.err + caplog.text).split())

    return read


def test_a_failing_push_is_said_and_made_good_by_the_next(hub, work, tmp_path, told):
    hub.fail_next(f"/api/models/{REPO}/commit/", 500)
    assert train(work, tmp_path / "run") == 0
    said = told()
    assert f"step 3 could not be pushed to {REPO}: " in said and "500" in said and "pushed step 6" in said
    assert [json.loads(files["run.json"])["steps"] for files in commits(hub)] == [6, 6]


def test_a_hub_that_is_not_there_costs_nothing_and_is_pushed_to_by_hand(work, tmp_path, monkeypatch, told):
    log_in(monkeypatch, "http://127.0.0.1:9")  # nobody listens there
    assert train(work, tmp_path / "run") == 0
    said = told()
    assert "Each save tries again, and the training goes on." in said
    assert f"step 3 could not be pushed to {REPO}" in said and f"step 6 could not be pushed to {REPO}" in said
    by_hand = f"python -m training_fvlm.push {tmp_path / 'run'} --repo {REPO}"
    assert f"the model is whole in {tmp_path / 'run'}, but not on the Hub. By hand: {by_hand}" in said
    assert load_file(tmp_path / "run" / "model.safetensors")
    with hub_stand_in() as hub:
        log_in(monkeypatch, hub.endpoint)
        assert push.main(by_hand.split()[3:]) == 0
        assert hub.is_private("model", REPO) and hub.files("model", REPO).keys() >= CODE | CARD | LOADED


def test_without_a_token_no_training_begins(hub, work, tmp_path, monkeypatch, told):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(push, "get_token", lambda: None)
    assert train(work, tmp_path / "run") == 2
    assert "hf auth login" in told()
    assert not (tmp_path / "run").exists() and hub.requests == []


def test_a_run_that_goes_on_is_not_ended_by_a_lost_token(hub, work, tmp_path, monkeypatch, told):
    assert train(work, tmp_path / "run", "--max_steps", "3", "--hub_strategy", "end") == 0
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(push, "get_token", lambda: None)
    assert train(work, tmp_path / "run", "--resume_from_checkpoint", "auto") == 0
    said = told()
    assert "hf auth login" in said and "the training goes on" in said and "By hand:" in said
    assert (tmp_path / "run" / "checkpoint-6").is_dir()


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_without_the_right_is_found_out_first(hub, work, tmp_path, status, told):
    hub.fail_next("/api/repos/create", status)
    assert train(work, tmp_path / "run") == 2
    assert "--push_to_hub:" in told() and not (tmp_path / "run").exists()


def test_a_public_repository_is_refused_unless_asked_for(hub, work, tmp_path, told):
    hub.put("model", REPO, ".gitattributes", b"")
    assert train(work, tmp_path / "run") == 2
    assert f"{REPO} is a public repository" in told() and not (tmp_path / "run").exists()
    words = ["--hub_private_repo", "false", "--hub_strategy", "end", "--max_steps", "1", "--eval_strategy", "no"]
    assert train(work, tmp_path / "run", *words) == 2
    assert "say under which licence (--model_license ID)" in told()
    assert train(work, tmp_path / "run", *words, "--model_license", "CC-BY-NC-4.0") == 0
    assert header_of(hub.files("model", REPO)["README.md"])["license"] == "cc-by-nc-4.0"


def test_what_fails_while_files_are_collected_costs_nothing(hub, work, tmp_path, monkeypatch, told):
    monkeypatch.setattr(hub_module, "link_files", lambda *args: (_ for _ in ()).throw(OSError("no room")))
    assert train(work, tmp_path / "run") == 0
    assert "step 3 could not be pushed: OSError: no room" in told()
    assert [json.loads(files["run.json"])["steps"] for files in commits(hub)] == [6]


# One upload at a time


class FakeTrainer:
    """As much of a trainer as the callback reads."""

    def __init__(self, signals):
        self.signals, self.pushed = signals, 0

    def push_checkpoint(self):
        self.pushed += 1


def test_a_run_that_was_told_to_stop_pushes_nothing_more(tmp_path):
    args, state = Thing(hub_strategy="every_save"), Thing(is_world_process_zero=True)
    for number, pushes in ((0, 1), (10, 0)):
        trainer = FakeTrainer(Thing(number=number))
        PushCallback(trainer).on_save(args, state, None)
        assert trainer.pushed == pushes


@pytest.fixture
def slow_uploads(tmp_path, monkeypatch):
    """Uploads that take a minute."""
    popen = subprocess.Popen
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(hub_module.subprocess, "Popen", lambda command, **options: popen(sleeping, **options))
    args = Thing(hub_model_id=REPO, hub_revision=None, hub_private_repo=True, hub_token=None)
    return Uploads(tmp_path, args)


def test_an_upload_ends_with_its_run(slow_uploads):
    slow_uploads.start(slow_uploads.run, "step 1")
    assert slow_uploads.is_running()
    process = slow_uploads.process
    slow_uploads.stop()
    assert process.wait(timeout=10) != 0 and not slow_uploads.is_running()


def test_a_save_during_an_upload_is_passed_over(slow_uploads, monkeypatch, told):
    from training_fvlm.hub import PushingTrainer

    trainer = PushingTrainer()
    trainer.uploads, trainer.state, trainer.args = slow_uploads, Thing(global_step=4), Thing(hub_always_push=False)
    slow_uploads.start(slow_uploads.run, "step 2")
    trainer.push_checkpoint()
    assert "step 4 is not pushed: step 2 is still on its way." in told()
    slow_uploads.stop()


def test_collected_files_stay_when_the_checkpoint_is_deleted_and_leave_it_alone(tmp_path):
    for name in ("a/model.safetensors", "a/adapter/b.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    hub_module.link_files(tmp_path / "a", ["model.safetensors", "adapter/b.bin"], tmp_path / "b")
    assert os.stat(tmp_path / "a/model.safetensors").st_nlink == 2, "copied: a checkpoint may be large"
    (tmp_path / "a/model.safetensors").unlink()
    assert (tmp_path / "b/model.safetensors").read_bytes() == b"a/model.safetensors"
    assert (tmp_path / "b/adapter/b.bin").read_bytes() == b"a/adapter/b.bin"


# By hand


def test_half_a_run_is_not_uploaded(hub, pushed, tmp_path, told):
    _, run = pushed
    for missing, message in (
        ("config.json", "holds no model with its processor"),
        ("model.safetensors", "the run has not come to its end"),
        ("pipeline_fvlm.py", "lacks pipeline_fvlm.py"),
    ):
        half = tmp_path / missing
        shutil.copytree(run, half)
        (half / missing).unlink()
        assert push.main([str(half), "--repo", REPO]) == 2
        assert message in told()
    assert hub.requests == []


def test_only_what_is_meant_for_others_is_uploaded(hub, pushed, tmp_path):
    _, run = pushed
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    for name in ("emissions.csv", "events.out.tfevents.1.my-machine", ".env", "_notes.json", "broken_step.json"):
        (folder / name).write_bytes(b"secret")
    (folder / "runs").mkdir()
    (folder / "runs" / "events").write_bytes(b"secret")
    (folder / "link.py").symlink_to("/etc/passwd")
    assert push.main([str(folder), "--repo", REPO]) == 0
    files = hub.files("model", REPO)
    assert b"secret" not in b"".join(files.values())
    assert not any("/" in name for name in files) and "link.py" not in files
    hub.put("model", REPO, "model-00001-of-00002.safetensors", b"old")
    hub.put("model", REPO, "LICENSE", b"terms")
    assert push.main([str(folder), "--repo", REPO]) == 0
    assert "model-00001-of-00002.safetensors" not in hub.files("model", REPO), "it would be loaded"
    assert hub.files("model", REPO)["LICENSE"] == b"terms"


def test_by_hand_in_public_it_takes_a_licence(hub, pushed, told):
    _, run = pushed
    assert push.main([str(run), "--repo", REPO, "--public"]) == 2
    assert "--public needs a licence" in told()
    assert push.main([str(run), "--repo", REPO, "--public", "--license", "cc-by-nc"]) == 2
    assert "is no licence id of the Hub" in told()
    assert push.main([str(run), "--repo", REPO, "--public", "--license", "cc-by-nc-4.0"]) == 0
    assert not hub.is_private("model", REPO)
    assert header_of(hub.files("model", REPO)["README.md"])["license"] == "cc-by-nc-4.0"
    assert header_of((run / "README.md").read_bytes())["license"] != "cc-by-nc-4.0"


# Settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_license", "unknown"], "--model_license 'unknown' is no licence id"),
        (["--model_license", "other"], "needs --model_license_name"),
        (["--model_license_link", "https://example.org"], "go with --model_license other"),
        (["--push_to_hub", "--hub_private_repo", "false"], "say under which licence"),
        (["--hub_strategy", "often"], "often"),
    ],
)
def test_a_licence_that_says_nothing_is_refused(work, tmp_path, words, message):
    from training_fvlm.arguments import parse_settings

    with pytest.raises(SettingsError) as caught:
        parse_settings(
            ["--recipe", str(work / "tiny.yaml"), "--data", "d", "--output_dir", str(tmp_path), *words], "help"
        )
    assert message in str(caught.value)


def test_the_licence_of_a_data_set_on_the_hub_is_read_from_its_card(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    address = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
    hub.put("dataset", "someone/ct", "README.md", b"---\nlicense: cc-by-nc-sa-4.0\n---\n# CTs\n")
    hub.put("dataset", "someone/other", "data.csv", b"no card")
    assert data_licence("someone/ct") == "cc-by-nc-sa-4.0"
    assert data_licence("someone/other") is None and data_licence("someone/nobody") is None
