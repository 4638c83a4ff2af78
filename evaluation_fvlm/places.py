"""How results name the model and the data that they are of: results are handed on, and a path may hold a person's name.

A Hub id stands as it is. Of a path the last part stands, with a digest of the content beside it, so that the same
weights and the same split are known again wherever they lie.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath

DIGITS = 16  # of a SHA-256


def place_name(place: str | Path) -> str:
    """A Hub id as it is, a path by its last part, and a name as it was given before (`distinct_names`)."""
    text = str(place)
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+(, revision \S+)?", text) and not text.startswith(".")
    if is_hub_id and not Path(text).exists():
        return text
    return PureWindowsPath(text).name if "\\" in text else os.path.basename(os.path.abspath(text))


def entry_name(entry: Mapping | str | None) -> str:
    """The name in a protocol's entry; results of earlier versions hold the path."""
    if isinstance(entry, Mapping):
        return str(entry.get("name") or (place_name(entry["path"]) if entry.get("path") else ""))
    return place_name(entry) if entry else ""


def distinct_names(places: Sequence[str], revisions: Sequence[str | None]) -> list[str]:
    """A name for each of several models; of those that share one the digest of their weights, or the revision on the
    Hub, tells which.
    """
    names = [place_name(place) for place in places]
    told = []
    for name, place, revision in zip(names, places, revisions):
        if names.count(name) > 1 and (digest := weights_digest(place)):
            name += f", weights {digest}"
        elif names.count(name) > 1 and revision:
            name += f", revision {revision}"
        told.append(name)
    return told


def weights_digest(model: str | Path) -> str | None:
    """Digest of the files of weights in a folder; None for a model on the Hub, whose commit tells them."""
    files = sorted(Path(model).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:DIGITS]


def split_digest(manifest: Mapping) -> str | None:
    """Digest of the shards of a processed split, from the checksums in its manifest; None where it has none."""
    shards = sorted((str(shard.get("file")), str(shard.get("sha256"))) for shard in manifest.get("shards") or ())
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:DIGITS] if shards else None
