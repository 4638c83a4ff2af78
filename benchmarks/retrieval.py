"""Retrieval in both directions over a large pool: ranks counted in blocks, against sorting each query's candidates.

    python -m benchmarks.retrieval
    python -m benchmarks.retrieval --pairs 5000 --json retrieval.json

`retrieval/N/different`: N volumes and N different texts of 256 dimensions. Ours is `retrieve_pairs`: both directions,
R@1 to R@100, median rank, MRR, chance, and 95 % intervals of 1,000 resamples of patients. The baseline is what is
written at first: the cosines of a block of queries with all candidates, an argsort, the place of the query's own. It
has neither chance nor intervals, is timed on --baseline_queries queries of each direction and multiplied. Ranks are
compared on these. The whole matrix of cosines and its argsort, which it need not hold, would take 12 N^2 bytes.
`retrieval/N/repeated`: a third of the volumes has the text of another one, so ours searches two pools, the whole and
the deduplicated one; the baseline's time is that of the whole pool alone.

The peak is the largest resident size ever of a fresh process that makes the embeddings and searches once, in GB of 10^9
bytes.
"""

import argparse
from functools import partial

import numpy as np
import torch

from benchmarks.measure import (
    Peak,
    Result,
    Times,
    add_arguments,
    in_turns,
    measure_peak,
    parse_arguments,
    relative_difference,
    report,
)
from benchmarks.memory import in_fresh_process, memory_gb
from evaluation_fvlm.retrieval import expected_ranks, pair_ranks, retrieve_pairs

DIM = 256
QUERIES_AT_ONCE = 100  # of the baseline
CASES = {"different": 0.0, "repeated": 1 / 3}  # share of volumes whose text another one has


def make_pairs(num_pairs: int, share_repeated: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Volumes near their texts, different texts, the text of each volume, its patient: two scans each."""
    rng = np.random.default_rng(0)
    num_texts = num_pairs - int(share_repeated * num_pairs)
    text_index = np.concatenate([np.arange(num_texts), rng.integers(0, num_texts, num_pairs - num_texts)])
    texts = rng.standard_normal((num_texts, DIM), np.float32)
    volumes = texts[text_index] + 4 * rng.standard_normal((num_pairs, DIM), np.float32)
    texts, volumes = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (texts, volumes))
    return volumes, texts, text_index, np.arange(num_pairs) // 2


def sorted_ranks(queries: np.ndarray, candidates: np.ndarray, is_correct: np.ndarray) -> np.ndarray:
    """The baseline: rank of the first correct candidate of every query.

    Args:
        queries: `(queries, dim)`.
        candidates: `(candidates, dim)`.
        is_correct: `(queries, candidates)` bool.
    """
    ranks = []
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        part = slice(start, start + QUERIES_AT_ONCE)
        order = np.argsort(-(queries[part] @ candidates.T), axis=1)
        ranks.append(np.take_along_axis(is_correct[part], order, axis=1).argmax(axis=1) + 1)
    return np.concatenate(ranks)


def search(pairs: tuple) -> dict:
    volumes, texts, text_index, patients = pairs
    return retrieve_pairs(volumes, texts, text_index, patients)


def memory_of_a_search(num_pairs: int, share_repeated: float, threads: int | None) -> tuple[float, float]:
    """GB resident before a search of this process, and the most that ever were."""
    if threads:
        torch.set_num_threads(threads)
    pairs = make_pairs(num_pairs, share_repeated)
    before = memory_gb("VmRSS")
    search(pairs)
    return before, memory_gb("VmHWM")


def compare(num_pairs: int, case: str, baseline_queries: int, repeats: int, threads: int | None, peak: Peak) -> Result:
    """Time and compare one case."""
    volumes, texts, text_index, _ = pairs = make_pairs(num_pairs, CASES[case])
    asked = np.linspace(0, num_pairs - 1, min(baseline_queries, num_pairs)).astype(int)
    is_correct = text_index[asked][:, None] == text_index
    texts_of_pairs = texts[text_index]
    baseline = {
        "report_to_volume": partial(sorted_ranks, texts_of_pairs[asked], volumes, is_correct),
        "volume_to_report": partial(sorted_ranks, volumes[asked], texts_of_pairs, is_correct),
    }
    ours = [expected_ranks(ranks)[asked] for ranks in pair_ranks(volumes, texts, text_index)]
    differences = [
        relative_difference([torch.from_numpy(one)], [torch.from_numpy(way().astype(float))])
        for one, way in zip(ours, baseline.values())
    ]
    found: dict = {}
    times = in_turns(baseline | {"ours": lambda: found.update(search(pairs))}, repeats)
    theirs = sum((times[name] for name in baseline), Times(0.0, 0.0)) * (num_pairs / len(asked))
    num_texts = len(texts)
    passes = num_pairs * num_texts + (num_texts**2 if num_texts < num_pairs else 0)
    before, most = in_fresh_process(memory_of_a_search, num_pairs, CASES[case], threads)
    recall = found["pools"]["deduplicated"]["report_to_volume"]["recall"]["10"]
    note = (
        f"peak {most:.2f} GB ({before:.2f} before); {num_texts} different texts; R@10 of the deduplicated pool "
        f"{recall['value']:.3f}, chance {recall['chance']:.1e}; baseline timed on {len(asked)} queries of each "
        "direction, ranks compared on these"
    )
    extra = {"ours_peak_gb": most, "ours_start_gb": before, "num_texts": num_texts}
    bound_s = peak.seconds(2 * DIM * passes)
    return Result(f"retrieval/{num_pairs}/{case}", theirs, times["ours"], max(differences), note, bound_s, extra)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[50_000], help="Numbers of volumes (default: 50000).")
    parser.add_argument(
        "--baseline_queries", type=int, default=300, help="Queries of the baseline (default: %(default)s)."
    )
    add_arguments(parser, repeats=1)
    options = parse_arguments(parser, arguments)
    peak = measure_peak()
    results = [
        compare(number, case, options.baseline_queries, options.repeats, options.threads, peak)
        for number in options.pairs
        for case in CASES
    ]
    report(results, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
