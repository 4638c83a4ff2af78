"""A run of the language model that is killed from outside: reports and cache as arguments, one line for each result."""

import json
import sys
from pathlib import Path

from llm_reports import ORGANS, rules, settings, small_reports

from data_builders.llm_client import HTTPClient
from data_builders.llm_decompose import decompose_with_llm
from data_builders.llm_ledger import Ledger


def main(url: str, cache: str, count: str, concurrency: str) -> None:
    with Ledger(Path(cache), (1.0, 4.0)) as ledger:
        client = HTTPClient(url, "m")
        ours = settings(concurrency=int(concurrency))
        for result in decompose_with_llm(small_reports(int(count)), ORGANS, client, rules, ledger, ours):
            print(json.dumps([result.name, result.method]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
