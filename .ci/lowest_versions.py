"""Print a pip constraints file that pins every dependency of setup.cfg to the lowest version it declares.

    python .ci/lowest_versions.py setup.cfg > constraints.txt

torch is pinned to the release that the Makefile installs on a machine without an NVIDIA driver unless TORCH_FLOOR=1
is set: its older wheels carry gigabytes of CUDA.
"""

import configparser
import os
import re
import sys


def lowest(requirement: str) -> str:
    """`name>=1.2` -> `name==1.2`; anything without a floor is a fault of setup.cfg."""
    match = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", requirement)
    if match is None:
        raise SystemExit(f"setup.cfg: '{requirement}' declares no floor; write it as name>=version.")
    return f"{match[1]}=={match[2]}"


def main() -> None:
    config = configparser.ConfigParser()
    config.read(sys.argv[1])
    lines = config["options"]["install_requires"] + config["options.extras_require"]["test"]
    for requirement in filter(None, (line.strip() for line in lines.splitlines())):
        if requirement.startswith("#"):
            continue
        pinned = lowest(requirement)
        if pinned.startswith("torch==") and not os.environ.get("TORCH_FLOOR"):
            pinned = "torch==2.13.0"
        print(pinned)


if __name__ == "__main__":
    main()
