"""JSON files in a folder of results."""

import json
import os
from pathlib import Path


def write_json(content: dict | list, path: Path) -> None:
    """Write a file at once: where it stands, it is whole."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
