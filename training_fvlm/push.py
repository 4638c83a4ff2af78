"""Upload the model of a run to the Hugging Face Hub, into a private repository unless you say otherwise.

What a run that could not reach the Hub has left:
    python -m training_fvlm.push out/run --repo owner/name

In public, under a licence of the Hub's list:
    python -m training_fvlm.push out/run --repo owner/name --public --license cc-by-nc-4.0

What is uploaded: weights, config, processor and the code beside them, so that AutoModel, AutoProcessor and the pipeline
load the repository with nothing of ours installed; the card, run.json, the tables of losses and the curves; the adapter
of a LoRA run. Nothing else that lies in the folder: no checkpoint, no log of a tracker, no table of emissions (which
says where the machine stands). `--checkpoint` adds a checkpoint with the state of its optimizer. Log in first with
`hf auth login`, or set HF_TOKEN. An upload is one commit: there is never half a model.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub import errors as hub_errors

from modeling_fvlm.licences import licence_fields

WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
# What `save_for_hub` writes beside the weights, whatever the tokenizer.
MODEL_FILES = (
    *("config.json", "*.py", "processor_config.json", "preprocessor_config.json", "special_tokens_map.json"),
    *("tokenizer*", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*"),
)
RUN_FILES = ("README.md", "run.json", "organ_losses.csv", "eval_organ_losses.csv", "loss_curves.png")
ADAPTER = "adapter"
STATE = "trainer_state.json"
NO_TOKEN = "there is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN."
NO_LICENCE = "unknown"


def public_files(folder: Path, patterns: Sequence[str] = (*WEIGHTS, *MODEL_FILES, *RUN_FILES)) -> list[str]:
    """Names of the files of a run that may be uploaded, and of those of its adapter."""
    files = [path.name for path in sorted(folder.iterdir()) if path.is_file() and not path.is_symlink()]
    names = [name for name in files if not name.startswith((".", "_")) and any(fnmatch(name, p) for p in patterns)]
    adapter = folder / ADAPTER
    return names + [f"{ADAPTER}/{path.name}" for path in sorted(adapter.glob("[!.]*")) if path.is_file()]


def check_whole(folder: Path) -> None:
    """Raise a ValueError that names the first part without which the folder would not load from the Hub."""
    config = folder / "config.json"
    if not config.is_file() or not (folder / "processor_config.json").is_file():
        raise ValueError(f"{folder} holds no model with its processor: give the --output_dir of a training run.")
    if not any(path for pattern in WEIGHTS[:2] for path in folder.glob(pattern)):
        raise ValueError(f"{folder} holds no weights (model.safetensors): the run has not come to its end.")
    content = json.loads(config.read_text(encoding="utf-8"))
    classes = [*content.get("auto_map", {}).values()]
    classes += [pipeline["impl"] for pipeline in content.get("custom_pipelines", {}).values()]
    for name in [f"{each.split('.')[0]}.py" for each in classes] or ["modeling_fvlm.py"]:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}, the code of its model: it would not load from the Hub.")


def open_repository(repo: str, token: str | None, is_public: bool = False) -> str:
    """See that there is a repository that may be written to, making it if need be; returns its full name.

    Raises:
        ValueError: If there is no token, or everybody could read what nobody said should be public.
        hub_errors.HTTPError: If the Hub refuses it or is not there.
    """
    if token is None and get_token() is None:
        raise ValueError(NO_TOKEN)
    api = HfApi(token=token)
    name = api.create_repo(repo, private=not is_public, exist_ok=True).repo_id
    if not is_public and not api.model_info(name).private:
        raise ValueError(
            f"{name} is a public repository: everybody would read the model. Make it private on the Hub, name another "
            "one, or publish it with a licence (--hub_private_repo false --model_license ID in a training, --public "
            "--license ID by hand)."
        )
    return name


def upload(
    folder: Path,
    repo: str,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload model",
    card: str | None = None,
    checkpoint: Path | None = None,
    checkpoint_name: str = "last-checkpoint",
) -> str:
    """Upload a run's public files, and a whole checkpoint if there is one, in one commit; returns its address.

    Args:
        folder: The run.
        repo: Full name of a repository that is there.
        token: None: the one this machine is logged in with.
        revision: Branch, made if it is not there; None: main.
        message: Of the commit.
        card: Text in place of the folder's README.md.
        checkpoint: Folder of a checkpoint, uploaded as `checkpoint_name`; what lay there before is removed.
        checkpoint_name: See there.
    """
    check_whole(folder)
    files: dict[str, Path | bytes] = {name: folder / name for name in public_files(folder)}
    if card is not None:
        files["README.md"] = card.encode()
    if checkpoint is not None:
        for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
            files[f"{checkpoint_name}/{path.relative_to(checkpoint).as_posix()}"] = path
        files[f"{checkpoint_name}/{STATE}"] = _without_places(checkpoint / STATE)
    api = HfApi(token=token)
    if revision and not revision.startswith("refs/"):
        api.create_branch(repo, branch=revision, exist_ok=True)
    present = api.list_repo_files(repo, revision=revision)
    replaced = (*WEIGHTS, f"{checkpoint_name}/*") if checkpoint is not None else WEIGHTS
    stale = [name for name in present if name not in files and any(fnmatch(name, pattern) for pattern in replaced)]
    return api.create_commit(
        repo,
        operations=[
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=message,
        revision=revision,
    ).commit_url


def _without_places(path: Path) -> bytes:
    """A Trainer's state without the folder its best checkpoint lies in."""
    state = json.loads(path.read_text(encoding="utf-8"))
    if state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
    return json.dumps(state, indent=2).encode()


def main(argv: list[str] | None = None) -> int:
    """Upload what the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training_fvlm.push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="The --output_dir of a training run.")
    parser.add_argument("--repo", required=True, help="Repository, owner/name; made if it is not there.")
    parser.add_argument("--revision", help="Branch to upload to; made if it is not there (default: main).")
    parser.add_argument("--message", default="Upload model", help="Message of the commit.")
    parser.add_argument("--public", action="store_true", help="Make a new repository public, or use one that is.")
    parser.add_argument("--license", help="Licence id of the Hub, for the card; needed with --public if it has none.")
    parser.add_argument("--license_name", help="With --license other: a short name, such as hospital-research-terms.")
    parser.add_argument("--license_link", help="With --license other: web address of the terms.")
    parser.add_argument("--checkpoint", type=Path, help="Folder of a checkpoint to upload as well.")
    parser.add_argument("--checkpoint_name", default="last-checkpoint", help="What it is called there.")
    args = parser.parse_args(argv)
    try:
        check_whole(args.folder)
        card = card_with_licence(args)
        repo = open_repository(args.repo, None, args.public)
        checkpoint = {"checkpoint": args.checkpoint, "checkpoint_name": args.checkpoint_name}
        url = upload(args.folder, repo, None, args.revision, args.message, card, **checkpoint)
    # Of HTTP, of the network, of files; and what the upload of large files raises in their place.
    except (hub_errors.HTTPError, hub_errors.OfflineModeIsEnabled, OSError, ValueError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(url)
    return 0


def card_with_licence(args: argparse.Namespace) -> str | None:
    """The folder's card under the licence of the command line; None to leave it as it is."""
    path = args.folder / "README.md"
    if args.license:
        card = ModelCard.load(path)
        for name, value in licence_fields(args.license, args.license_name, args.license_link).items():
            setattr(card.data, name, value)
        return str(card)
    if args.public and (not path.is_file() or ModelCard.load(path).data.license in (None, NO_LICENCE)):
        raise ValueError("--public needs a licence: add --license ID, which is written into the card.")
    return None


if __name__ == "__main__":
    sys.exit(main())
