"""Upload a processed split to the Hugging Face Hub as a dataset repository, private unless you say otherwise.

Private, under a licence of the Hub's list:
    python -m data_builders push --data out/split --repo owner/name --license cc-by-4.0

Under terms of your own:
    python -m data_builders push --data out/split --repo owner/name --license other \\
        --license_name hospital-research-terms --license_link https://example.org/terms

What is uploaded: README.md, manifest.json, the Parquet shards that the manifest lists, and of previews/ the pictures of
rows of these. Nothing else: no salt, no hidden file, no picture of a case that has been taken out. Before that every
shard is compared with its sha256 in the manifest, and reports and ids are searched for dates, names and numbers of
persons; with --yes you say that you have looked at what was found.
Log in first with `hf auth login`, or set HF_TOKEN. An upload that was broken off is continued by the same command: the
card comes last, so a repository with a card is whole.
A CT of the head shows the face, and no builder takes it away: think of that before you make a split public.
"""

import argparse
import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi, get_token
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import DatasetInfo
from rich.console import Console
from rich.progress import Progress

from modeling_fvlm.licences import licence_fields

from .cases import Case, OrganText, counted
from .decompose import split_sentences
from .previews import picture_name
from .privacy import concern_lines, scan_reports
from .shards import PROGRESS_FOLDER, ShardRecord

# Builder -> why what it makes may not be made public.
NOT_TO_BE_HANDED_ON = {
    "ct_rate": "CT-RATE's terms of access forbid handing its data on, and what is built from it falls under them"
}

FOLDERS = ("volumes/", "organ_crops/", "previews/")  # what a processed split has; other files of a repository stay
TASKS = ["zero-shot-image-classification", "image-segmentation"]
TAGS = ["medical", "radiology", "ct", "3d", "fvlm"]
SIZES = (  # rows below -> the Hub's word for it
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)

console = Console()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("upload")
    group.add_argument("--data", type=Path, required=True, help="Folder of a processed split, finished.")
    group.add_argument("--repo", required=True, help="Dataset repository, owner/name; made where it is not there yet.")
    group.add_argument(
        "--license",
        required=True,
        metavar="LICENCE",
        help="Licence id of the Hub, such as cc-by-4.0 or cc-by-nc-sa-4.0, or `other`. It stands in the card.",
    )
    group.add_argument("--license_name", help="With --license other: a short name, such as hospital-research-terms.")
    group.add_argument("--license_link", help="With --license other: web address of the terms.")
    group.add_argument("--pretty_name", help="Title of the dataset (default: the name of the repository).")
    group.add_argument(
        "--public",
        action="store_true",
        help="Make the repository public, or upload into one that is. Without it a public one is refused.",
    )
    group.add_argument(
        "--i_have_the_right",
        action="store_true",
        help="With --public, for a split whose source may not be handed on (CT-RATE): you have been allowed to.",
    )
    group.add_argument("--revision", help="Branch to upload to; made where it is not there yet (default: main).")
    group.add_argument(
        "--yes", action="store_true", help="Upload although reports or ids seem to name persons: you have looked."
    )


def run(args: argparse.Namespace) -> int:
    terms = licence_fields(args.license, args.license_name, args.license_link)
    if args.repo.count("/") != 1:
        raise ValueError(f"--repo {args.repo!r} must be owner/name, with your user name or organisation as owner.")
    manifest = read_manifest(args.data)
    check_right_to_publish(manifest, args)
    shards = shard_files(manifest)
    files = [entry["file"] for entry in shards]
    card = hub_card(args.data, manifest, terms, args)
    if get_token() is None:
        raise ValueError("there is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN.")
    api = HfApi()
    try:
        info = repo_info(api, args.repo)
        check_repo(api, info, files, args)
        check_shards(args.data, shards)
        check_concerns(args.data, files, manifest, args)
        files += [f"previews/{name}" for name in pictures_of_rows(args.data, files)]
        url = upload(api, info, files, card, args)
    except (hub_errors.HTTPError, hub_errors.OfflineModeIsEnabled) as error:  # a refusal, or no network (any more)
        raise ValueError(
            f"the Hub did not take it ({error}). If it was the network, run the same command again: what was uploaded "
            "stays. If it was a refusal, see whether your token may write there."
        ) from error
    console.print(f"uploaded to {url}", soft_wrap=True, markup=False)
    return 0


def read_manifest(folder: Path) -> dict:
    """The manifest of a finished build.

    Raises:
        ValueError: If there is none, or the build is not finished, or has no row.
    """
    path = folder / "manifest.json"
    if not path.is_file() or (folder / PROGRESS_FOLDER).exists():
        raise ValueError(f"--data {folder} holds no finished build (manifest.json, no {PROGRESS_FOLDER}); complete it.")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not shard_files(manifest) or not (folder / "README.md").is_file():
        raise ValueError(f"--data {folder} has no row or no card (README.md): there is nothing to upload.")
    return manifest


def shard_files(manifest: dict) -> list[dict]:
    """`file`, `bytes` and `sha256` of every Parquet file of the split."""
    return [entry for content in manifest["shards"] for entry in ShardRecord(**content).files()]


def pictures_of_rows(folder: Path, shards: Sequence[str]) -> list[str]:
    """Names of the pictures in previews/ that show a row of these shards at its place.

    Pictures of an earlier state may lie there as well, of a case that has been taken out since: they stay here.
    """
    wanted, places = set(), Counter()
    for name in shards:
        config, _, file = name.partition("/")
        if config != "volumes":  # others have no pictures
            continue
        split = file.split("-")[0]
        for recon_id in pq.read_table(folder / name, columns=["recon_id"])["recon_id"].to_pylist():
            wanted.add(picture_name(split, places[split], recon_id))
            places[split] += 1
    found = [path.name for path in sorted(folder.glob("previews/[!.]*.png")) if not path.is_symlink()]
    others = [name for name in found if name not in wanted]
    if others:
        console.print(
            f"{counted(len(others), 'picture')} in previews/ not uploaded: no row of this split is shown.",
            style="yellow",
            soft_wrap=True,
        )
    return [name for name in found if name in wanted]


def check_right_to_publish(manifest: dict, args: argparse.Namespace) -> None:
    """Raise a ValueError where a public repository would break the terms of the source."""
    reason = NOT_TO_BE_HANDED_ON.get(manifest["settings"]["builder"])
    if reason and args.public and not args.i_have_the_right:
        raise ValueError(
            f"--public: {reason}. Leave out --public, or say --i_have_the_right if you have been allowed to."
        )
    if reason and not args.public:
        console.print(f"private, as it has to be: {reason}. Give no access to others.", style="yellow", soft_wrap=True)


def check_shards(folder: Path, shards: Sequence[dict]) -> None:
    """Raise a ValueError that names the first shard which is missing or is not what was built."""
    with Progress(console=console, transient=True) as progress:
        for entry in progress.track(shards, description="comparing shards with the manifest"):
            path = folder / entry["file"]
            if not path.is_file():
                raise ValueError(f"{entry['file']} is missing in {folder}; run the builder again, it writes it anew.")
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != entry["sha256"]:
                raise ValueError(
                    f"{entry['file']} is damaged: its sha256 is not the manifest's. Delete it and run the builder "
                    "again, it writes it anew."
                )


def check_concerns(folder: Path, files: Sequence[str], manifest: dict, args: argparse.Namespace) -> None:
    """Tell what in reports and ids seems to name persons; raise a ValueError if the user has not said --yes to it."""
    lines = concern_lines(scan_reports(cases_of(folder, files)))
    settings = manifest["settings"]
    if args.public and settings["builder"] == "folder" and settings.get("ids", "kept") == "kept":
        lines.append("The ids of patients and scans are those of the source: build with --ids hashed to hide them.")
    for line in lines:
        console.print(line, style="yellow", soft_wrap=True, markup=False)
    if lines and not args.yes:
        raise ValueError("nothing was uploaded. If none of it names a person, say so with --yes.")


def cases_of(folder: Path, files: Sequence[str]) -> Iterator[Case]:
    """Ids and texts of every row, without its arrays."""
    columns = ("patient_id", "scan_id", "recon_id", "findings", "impression", "captions", "organ", "caption")
    volumes = [name for name in files if name.startswith("volumes/")]
    # Crops repeat the captions of their scans: they are read where there is nothing else.
    for name in volumes or [name for name in files if name.endswith(".parquet")]:
        with pq.ParquetFile(folder / name) as file:
            present = [column for column in columns if column in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=64, columns=present):
                for row in batch.to_pylist():
                    captions = row.get("captions") or ([row] if row.get("caption") else [])
                    yield Case(
                        split="train",
                        patient_id=row["patient_id"],
                        scan_id=row["scan_id"],
                        recon_id=row["recon_id"],
                        findings=row.get("findings") or "",
                        impression=row.get("impression") or "",
                        organ_texts={
                            entry["organ"]: OrganText((), tuple(split_sentences(entry["caption"])), False)
                            for entry in captions
                        },
                    )


def hub_card(folder: Path, manifest: dict, terms: dict[str, str], args: argparse.Namespace) -> DatasetCard:
    """The card as the Hub wants it: licence, title, tasks and size in the header. The one in the folder stays."""
    card = DatasetCard.load(folder / "README.md")
    rows = sum(split["rows"] for split in manifest["splits"].values())
    fields = {
        **terms,
        "pretty_name": args.pretty_name or args.repo.split("/")[1],
        "task_categories": TASKS,
        "tags": TAGS,
        "size_categories": [next((word for below, word in SIZES if rows < below), "10M<n<100M")],
    }
    for name, value in fields.items():
        setattr(card.data, name, value)
    licence = f"[{terms['license_name']}]({terms['license_link']})" if "license_name" in terms else terms["license"]
    card.text = card.text.rstrip() + (
        f'\n\nLicence of this repository: {licence}.\n\n## From the Hub\n\nAs above with `folder = "{args.repo}"`'
        + (f' and `revision="{args.revision}"`' if args.revision else "")
        + ".\n"
    )
    return card


def repo_info(api: HfApi, repo: str) -> DatasetInfo | None:
    """What the Hub tells of a dataset repository, or None where there is none (that this token may see)."""
    try:
        return api.dataset_info(repo)
    except hub_errors.RepositoryNotFoundError:
        return None


def check_repo(api: HfApi, info: DatasetInfo | None, files: Sequence[str], args: argparse.Namespace) -> None:
    """Raise a ValueError where a repository that is there should not get the split."""
    if info is None:
        return
    if not info.private and not args.public:
        raise ValueError(
            f"{args.repo} is a public repository: everybody would read the split. Make it private on the Hub, name "
            "another one, or say --public."
        )
    if info.private and args.public:
        raise ValueError(
            f"{args.repo} is there and private. --public makes new repositories public; with this one its whole "
            "history would come to light: do it in its settings on the Hub, and leave out --public here."
        )
    present = {sibling.rfilename for sibling in info.siblings or ()}
    # Pictures: of an upload that broke off.
    strange = {name for name in present if not re.fullmatch(r"previews/[^/]+\.png", name)}
    strange -= {*files, "README.md", "manifest.json", ".gitattributes"}
    if strange and "manifest.json" not in present:
        raise ValueError(
            f"{args.repo} holds something else ({sorted(strange)[0]} and {len(strange) - 1} more files), no processed "
            "split; name another repository."
        )


def upload(
    api: HfApi, info: DatasetInfo | None, files: Sequence[str], card: DatasetCard, args: argparse.Namespace
) -> str:
    """Upload shards and pictures, then card and manifest, and remove what an earlier split has left; returns the URL.

    The card is what makes the shards a dataset. It comes in the last commit, together with the removals.
    """
    repo = {"repo_id": args.repo, "repo_type": "dataset"}
    if info is None:
        api.create_repo(**repo, private=not args.public)
        if not args.public and not api.dataset_info(args.repo).private:
            raise ValueError(f"the Hub made {args.repo} public although it was asked not to; nothing was uploaded.")
    if args.revision and not args.revision.startswith("refs/"):
        api.create_branch(**repo, branch=args.revision, exist_ok=True)
    size = sum((args.data / name).stat().st_size for name in files)
    kind = "public" if args.public else "private"
    console.print(
        f"uploading {len(files)} files, {size / 1e6:,.1f} MB, to the {kind} repository {args.repo}", soft_wrap=True
    )
    api.upload_folder(
        **repo,
        folder_path=args.data,
        allow_patterns=[glob.escape(name) for name in files],
        revision=args.revision,
        commit_message="Upload shards of a processed split",
    )
    present = api.list_repo_files(args.repo, repo_type="dataset", revision=args.revision)
    stale = [name for name in present if name.startswith(FOLDERS) and name not in files]
    api.create_commit(
        **repo,
        operations=[
            CommitOperationAdd("manifest.json", str(args.data / "manifest.json")),
            CommitOperationAdd("README.md", str(card).encode()),
            *(CommitOperationDelete(name) for name in stale),
        ],
        revision=args.revision,
        commit_message="Upload card and manifest of a processed split",
    )
    return f"{api.endpoint}/datasets/{args.repo}"
