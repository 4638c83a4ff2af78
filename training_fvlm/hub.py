"""What a run pushes to the Hub: at every save, and at its end, without ever waiting for the Hub or failing with it.

(1) before any data is read, the repository is made: a missing token, or a public repository nobody asked for, ends the
    run here. A run that goes on from a checkpoint is not ended by it, but told;
(2) at a save the files are collected from the finished checkpoint by links, which cost no space and stay when the
    checkpoint is deleted, and a process of its own uploads them (push.py). A save that comes before it is done is
    passed over (--hub_always_push: waits for it);
(3) what went wrong is said at the next save, which pushes its own state; at the end the run says how to push by hand.
"""

import atexit
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub import errors as hub_errors
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from modeling_fvlm.pipeline_fvlm import save_for_hub

from . import push
from .adapt import has_adapter, merged_state_dict
from .arguments import FVLMTrainingArguments, SettingsError

logger = logging.get_logger(__name__)
FOLDER = "_hub"  # in the folder of the run
LAST_CHECKPOINT = "last-checkpoint"


def prepare_repository(args: FVLMTrainingArguments) -> None:
    """Make the repository of --push_to_hub, on the main process; its full name becomes `args.hub_model_id`.

    Raises:
        SettingsError: If nothing could ever be pushed; not where a run goes on.
    """
    repo = args.hub_model_id or Path(args.output_dir).resolve().name
    answer: list[str | None] = [repo, None]  # its name, what is wrong
    if args.process_index == 0:
        try:
            answer[0] = push.open_repository(repo, args.hub_token, is_public=args.hub_private_repo is False)
        except (ValueError, hub_errors.HTTPError, hub_errors.OfflineModeIsEnabled, OSError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            text = " ".join(str(error).split())
            # ValueError: said by us, or no name for a repository. The Hub itself: no token of its, or no right.
            if (isinstance(error, ValueError) or status in (401, 403, 404)) and not args.resume_from_checkpoint:
                answer[1] = text
            else:
                logger.warning("--push_to_hub: %s Each save tries again, and the training goes on.", text)
    broadcast_object_list(answer)
    args.hub_model_id = answer[0]
    if answer[1] is not None:
        raise SettingsError(f"--push_to_hub: {answer[1]} Or leave out --push_to_hub and push by hand afterwards.")


class Uploads:
    """The uploads of a run, one after the other, each in a process of its own.

    Args:
        run: Folder of the run.
        args: Its settings.
    """

    def __init__(self, run: str | Path, args: FVLMTrainingArguments):
        self.run, self.args = Path(run), args
        self.process: subprocess.Popen | None = None
        self.name = ""  # of what is uploaded now
        shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
        atexit.register(self.stop)

    @property
    def folder(self) -> Path:
        """Where files are collected."""
        return self.run / FOLDER

    def is_running(self) -> bool:
        """Whether an upload is on its way; tells of the last one once it is over."""
        return self.process is not None and self._end() is None

    def start(self, folder: Path, name: str, *words: str) -> None:
        """Upload a folder as `python -m training_fvlm.push` does."""
        args = self.args
        command = [sys.executable, "-m", "training_fvlm.push", str(folder), "--repo", args.hub_model_id, *words]
        command += ["--revision", args.hub_revision] if args.hub_revision else []
        command += ["--public"] if args.hub_private_repo is False else []
        ours = str(Path(__file__).resolve().parents[1])
        environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))
        if args.hub_token:
            environment["HF_TOKEN"] = args.hub_token  # not among the words, which others can read
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "output").open("w", encoding="utf-8") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        self.name = name

    def wait(self) -> bool:
        """Wait for the upload that is on its way; whether it has arrived (or there was none)."""
        if self.process is None:
            return True
        self.process.wait()
        return bool(self._end())

    def _end(self) -> bool | None:
        """Whether the upload has arrived, None while it is on its way."""
        status = self.process.poll()
        if status is None:
            return None
        lines = (self.folder / "output").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = lines[-1].removeprefix("error: ") if lines else f"exit status {status}"
        if status == 0:
            logger.warning("pushed %s: %s", self.name, said)
        else:
            logger.warning("%s could not be pushed to %s: %s", self.name, self.args.hub_model_id, said)
        self.process = None
        return status == 0

    def stop(self) -> None:
        """End an upload that is on its way: a run that has to go must not wait for it."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def clear(self) -> None:
        """Remove what was collected."""
        shutil.rmtree(self.folder, ignore_errors=True)


def link_files(source: Path, names: list[str], target: Path) -> None:
    """Put files into another folder: links where the disk knows them, else copies."""
    for name in names:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, place)
        except OSError:
            shutil.copy2(source / name, place)


class PushingTrainer:
    """The pushes of a Trainer, in place of its own, which upload neither code nor processor nor card before the end."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Called by the Trainer when it is made; the repository is opened by `prepare_repository`, or by a push."""
        args = self.args
        args.hub_model_id = self.hub_model_id = args.hub_model_id or Path(args.output_dir).resolve().name
        self.push_in_progress = None
        self.uploads = Uploads(args.output_dir, args) if self.is_world_process_zero() else None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Called by the Trainer while it saves; the push comes after it, when the curves are drawn (PushCallback)."""

    def push_checkpoint(self) -> None:
        """(2) Push the checkpoint that has just been written; on the main process."""
        args, step = self.args, self.state.global_step
        if self.uploads.is_running():
            if not args.hub_always_push:
                logger.warning("step %d is not pushed: %s is still on its way.", step, self.uploads.name)
                return
            self.uploads.wait()
        try:
            words = ["--message", f"Training in progress, step {step}"]
            self._collect(Path(args.output_dir) / f"checkpoint-{step}", words)
            self.uploads.start(self.uploads.folder / "model", f"step {step}", *words)
        except Exception as error:  # whatever it is, it must not cost the run anything
            logger.warning("step %d could not be pushed: %s: %s", step, type(error).__name__, error)

    def _collect(self, checkpoint: Path, words: list[str]) -> None:
        """The files of a push, as they are now; adds to `words` what says of a whole checkpoint."""
        args, folder = self.args, self.uploads.folder
        self.uploads.clear()
        model = self.accelerator.unwrap_model(self.model)
        (folder / "model").mkdir(parents=True)
        files = push.public_files(checkpoint)
        if has_adapter(model):  # the checkpoint holds no more of it
            save_for_hub(model, self.processing_class, folder / "model", merged_state_dict(model))
            files = [name for name in files if "/" in name]
        link_files(checkpoint, files, folder / "model")
        if self.write_card is not None:
            self.write_card()
        # Copied, not linked: the run goes on writing them.
        for name in push.public_files(Path(args.output_dir), push.RUN_FILES):
            if "/" not in name:
                shutil.copyfile(Path(args.output_dir) / name, folder / "model" / name)
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            files = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
            link_files(checkpoint, files, folder / "checkpoint")
            name = LAST_CHECKPOINT if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            words += ["--checkpoint", str(folder / "checkpoint"), "--checkpoint_name", name]

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs: Any) -> bool:
        """(3) Push the folder of the run; whether it has arrived. On the other processes nothing happens.

        Args:
            commit_message: Of the commit.
            kwargs: What the Trainer's own method takes; not read.
        """
        if not self.is_world_process_zero():
            return True
        if self.hub_model_id is None:  # without --push_to_hub
            self.init_hf_repo()
        args, uploads = self.args, self.uploads
        if uploads.is_running():
            logger.warning("waiting for %s to arrive on the Hub.", uploads.name)
        uploads.wait()
        try:
            uploads.clear()
            self.create_model_card()
            uploads.start(Path(args.output_dir), "the model", "--message", commit_message or "End of training")
            has_arrived = uploads.wait()
        except Exception as error:  # as above: the model is saved
            logger.warning("the model could not be pushed: %s: %s", type(error).__name__, error)
            has_arrived = False
        if not has_arrived:
            by_hand = f"python -m training_fvlm.push {args.output_dir} --repo {args.hub_model_id}"
            by_hand += f" --revision {args.hub_revision}" * bool(args.hub_revision)
            by_hand += " --public" * (args.hub_private_repo is False)
            logger.warning("the model is whole in %s, but not on the Hub. By hand: %s", args.output_dir, by_hand)
        uploads.clear()
        return has_arrived


class PushCallback(TrainerCallback):
    """Pushes after every save, behind the callbacks that write what is pushed."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        signals = getattr(self.trainer, "signals", None)
        is_stopping = signals is not None and signals.number  # it has seconds, which are the checkpoint's
        if state.is_world_process_zero and args.hub_strategy != HubStrategy.END and not is_stopping:
            self.trainer.push_checkpoint()
