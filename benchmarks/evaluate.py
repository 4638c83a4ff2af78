"""Organ embeddings of a volume for zero-shot evaluation: equal windows once, against one tower forward for every organ.

    python -m benchmarks.evaluate
    python -m benchmarks.evaluate --organs 24 --coverage whole --json evaluate.json

`evaluate/N/fp32`: ViT-B, windows of 112 x 256 x 352, the organs of chest_4 or body_24 that the scans hold. The baseline
forwards every organ's own window alone, attention materialised, and pools that organ; it is timed on --baseline_organs
organs for each size of window, and each time counts for every organ whose window has that size. Ours is the way of
eval_fvlm.py (`embed_split`), decoding and window search included, which the baseline gets for nothing. Embeddings are
compared on the organs that the baseline ran. Prompts are embedded once per run in both and are left out.
`evaluate/N/best_fp32`: ours with the GEMM backend that the self-check chooses.
`evaluate/N/shared_windows`: ours with --shared_windows. Not the same embeddings: their mean cosine with the exact ones
is given instead, of random weights.

What is saved hangs on how many organs share a window, so on the scan. Scans are procedural bodies at 3 x 1 x 1 mm, cut
to their organs as the builders do, chest CTs unless --coverage says otherwise. The command also counts the windows
of all coverages.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from benchmarks.inputs import make_model
from benchmarks.measure import (
    Peak,
    Result,
    Times,
    add_arguments,
    count_flop,
    in_turns,
    measure_peak,
    parse_arguments,
    relative_difference,
    report,
)
from benchmarks.published import organ_flags, pool_organs, pooling_attention
from data_builders.phantom import COVERAGES, draw_patient, render
from evaluation_fvlm.embedding import SplitEmbeddings, embed_split, inference
from evaluation_fvlm.windows import Window, WindowRule, organ_boxes, organ_windows, window_of_organ
from modeling_fvlm import FVLMModel
from modeling_fvlm.gemm import BLAS, choose_gemm_backend, gemm_backend
from modeling_fvlm.geometry import organ_box
from modeling_fvlm.organs import load_organ_set, organ_label_table
from modeling_fvlm.preparation import padding_hu
from modeling_fvlm.processed_split import decode_volume, encode_array

CASES = {4: ("chest_4", "chest"), 24: ("body_24", "chest")}  # organs: organ set, what is scanned
SPACING, MARGIN = (3.0, 1.0, 1.0), (5, 20, 20)  # mm; voxels around the organs: the model's own
COARSE = (2, 4, 4)  # for counting windows, voxels of so many times the spacing do
SURVEYED = 6  # patients of each coverage


def phantom_scan(organ_set: str, coverage: str, patient: int, coarse: Sequence[int] = (1, 1, 1)):
    """int16 HU and organ labels of a procedural patient, cut to the organs and their margin."""
    organs = load_organ_set(organ_set)
    volume, labels = render(draw_patient((0, 0, patient), coverage), np.multiply(SPACING, coarse))
    mask = organ_label_table(organs, organs.organs, "totalsegmentator_v2")[labels]
    for axis, factor in enumerate(coarse):
        volume, mask = volume.repeat(factor, axis), mask.repeat(factor, axis)
    box = organ_box(mask, MARGIN)
    return volume[box], mask[box]


def as_row(volume: np.ndarray, mask: np.ndarray, name: str) -> dict:
    """A row of a processed split."""
    return {
        **dict.fromkeys(("patient_id", "scan_id", "recon_id"), name),
        "volume": encode_array(volume),
        "mask": encode_array(mask),
        "shape": list(mask.shape),
        "spacing": list(SPACING),
        "labels": [{"finding": "none", "value": 0}],
    }


def windows_of_coverages(organ_set: str, rule: WindowRule) -> dict[str, dict[str, float]]:
    """Mean numbers of organs, of distinct windows and of shared windows a scan, by what is scanned."""
    num_organs = len(load_organ_set(organ_set).organs)
    shared = WindowRule(rule.size, rule.patch_size, shared=True)
    counts = {}
    for coverage in COVERAGES:
        rows = []
        for patient in range(SURVEYED):
            _, mask = phantom_scan(organ_set, coverage, patient, COARSE)
            boxes = organ_boxes(mask, num_organs)
            found = [sum(box is not None for box in boxes)]
            rows.append(found + [len(organ_windows(boxes, mask.shape, each)) for each in (rule, shared)])
        counts[coverage] = dict(zip(("organs", "windows", "shared_windows"), np.mean(rows, axis=0).round(1).tolist()))
    return counts


def embed_organ(model: FVLMModel, volume: np.ndarray, mask: np.ndarray, organ_index: int, window: Window) -> Tensor:
    """`(dim,)` of one organ in the published manner: a forward of its own window, its own tokens pooled."""
    config = model.config
    hu = torch.from_numpy(window.take(volume, padding_hu(config.windows, is_published=False)))[None, None]
    is_organ = torch.from_numpy(np.equal(window.take(mask, 0), organ_index + 1).astype(np.uint8))[None]
    flags = organ_flags(is_organ, 1, config.vision_config.patch_size)[0]
    organ_tokens = flags.new_zeros(1, len(config.organs), flags.shape[2])
    organ_tokens[:, organ_index] = flags[:, 0]
    model.vision_model.set_attn_implementation("eager")
    with inference(model):
        # Without the organs' tokens: told of them, the tower's last block would leave out all others.
        levels = model.vision_model(hu, windows=config.windows).feature_levels
        pooled = pool_organs(model, pooling_attention(model), levels, organ_tokens)
        return F.normalize(model.organ_projection(pooled), dim=-1)[0, organ_index]


def embed_scans(model: FVLMModel, dataset: Dataset, rule: WindowRule, backend: str = BLAS) -> SplitEmbeddings:
    """Ours, as eval_fvlm.py runs it."""
    model.vision_model.set_attn_implementation("sdpa")
    with gemm_backend(backend):
        return embed_split(model, dataset, rule=rule)


def organs_by_window_size(masks: Sequence[np.ndarray], num_organs: int, rule: WindowRule):
    """(scan, organ index, window) of every organ of these scans, by the size of its own window."""
    organs: dict[tuple[int, int, int], list[tuple[int, int, Window]]] = {}
    for scan, mask in enumerate(masks):
        for organ_index, box in enumerate(organ_boxes(mask, num_organs)):
            if box is not None:
                window = window_of_organ(box, mask.shape, rule)
                organs.setdefault(window.size, []).append((scan, organ_index, window))
    return organs


def compare(
    model: FVLMModel, dataset: Dataset, rule: WindowRule, name: str, baseline_organs: int, repeats: int, peak: Peak
) -> list[Result]:
    """Time and compare one model on some scans; times are per volume.

    Args:
        baseline_organs: Organs of each size of window that the baseline runs, spread over the scans.
    """
    num_organs, num_scans = len(model.config.organs), len(dataset)
    scans = [decode_volume(row) for row in dataset]
    masks = [mask for _, mask in scans]
    organs = organs_by_window_size(masks, num_organs, rule)
    timed = {size: each[:: max(1, len(each) // baseline_organs)][:baseline_organs] for size, each in organs.items()}
    choice = choose_gemm_backend()
    shared = WindowRule(rule.size, rule.patch_size, shared=True)
    variants = {"fp32": (rule, BLAS), "best_fp32": (rule, choice.name), "shared_windows": (shared, BLAS)}
    baseline: dict[tuple[int, int], Tensor] = {}
    ours: dict[str, SplitEmbeddings] = {}

    def run_baseline(size: tuple[int, int, int]) -> None:
        for scan, organ_index, window in timed[size]:
            baseline[scan, organ_index] = embed_organ(model, *scans[scan], organ_index, window)

    def run_ours(variant: str) -> None:
        ours[variant] = embed_scans(model, dataset, *variants[variant])

    ways = {f"baseline {size}": lambda size=size: run_baseline(size) for size in timed}
    # The same code is not timed twice.
    distinct = [variant for variant in variants if variant != "best_fp32" or choice.name != BLAS]
    ways |= {variant: lambda variant=variant: run_ours(variant) for variant in distinct}
    flop = {variant: count_flop(lambda variant=variant: run_ours(variant)) for variant in distinct}
    times = in_turns(ways, repeats)
    for by_variant in (times, ours):
        by_variant.setdefault("best_fp32", by_variant["fp32"])
    flop["best_fp32"] = flop["fp32"]  # oneDNN's own layers are not counted

    theirs = Times(0.0, 0.0)
    for size, each in organs.items():
        theirs += times[f"baseline {size}"] * (len(each) / len(timed[size]) / num_scans)
    organs_per_scan = sum(map(len, organs.values())) / num_scans
    is_present = ours["fp32"].is_present
    results = []
    for variant, (used_rule, _) in variants.items():
        windows_per_scan = ours[variant].num_windows / num_scans
        extra = {"organs_per_scan": organs_per_scan, "windows_per_scan": windows_per_scan}
        extra["shapes"] = [list(mask.shape) for mask in masks]
        note = f"{organs_per_scan:g} organs in {windows_per_scan:g} windows of ours, mean of {num_scans} scans; "
        note += f"baseline timed on {len(baseline)} organs"
        difference = None
        if used_rule.shared:
            moved, exact = (torch.from_numpy(ours[each].image_embeds[is_present]) for each in (variant, "fp32"))
            cosine = F.cosine_similarity(moved, exact, dim=-1)
            extra |= {"mean_cosine": float(cosine.mean()), "least_cosine": float(cosine.min())}
            note += f"; cosine with exact embeddings {cosine.mean():.4f} (least {cosine.min():.4f}), random weights"
        else:
            pairs = [(torch.from_numpy(ours[variant].image_embeds[place]), each) for place, each in baseline.items()]
            difference = relative_difference(*zip(*pairs))
            note += ", compared on these"
        if variant == "best_fp32":
            note += f"; {choice.describe()}"
        bound_s = peak.seconds(flop[variant]) / num_scans
        time = times[variant] * (1 / num_scans)
        results.append(Result(f"{name}/{variant}", theirs, time, difference, note, bound_s, extra))
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organs", type=int, nargs="+", default=[4, 24], choices=CASES, help="Organ sets by size.")
    parser.add_argument("--coverage", choices=COVERAGES, help="What the scans show (default: chest).")
    parser.add_argument("--patients", type=int, default=4, help="Scans (default: %(default)s).")
    parser.add_argument(
        "--baseline_organs",
        type=int,
        default=3,
        help="Organs of the baseline per size of window (default: %(default)s).",
    )
    add_arguments(parser, repeats=1)
    options = parse_arguments(parser, arguments)
    peak = measure_peak()
    results = []
    for number in options.organs:
        organ_set, coverage = CASES[number]
        coverage = options.coverage or coverage
        rows = [as_row(*phantom_scan(organ_set, coverage, n), f"{coverage}_{n}") for n in range(options.patients)]
        model = make_model(number).eval()
        vision = model.config.vision_config
        rule = WindowRule(tuple(vision.volume_size), tuple(vision.patch_size))
        name = f"evaluate/{number}" + (f"/{options.coverage}" if options.coverage else "")
        few = compare(model, Dataset.from_list(rows), rule, name, options.baseline_organs, options.repeats, peak)
        counts = windows_of_coverages(organ_set, rule)
        few[0].extra["windows_of_coverages"] = counts
        print(f"{organ_set}, mean of {SURVEYED} scans of each coverage:")
        for each, row in counts.items():
            print(
                f"  {each:8} {row['organs']:4g} organs, {row['windows']:4g} windows, {row['shared_windows']:4g} shared"
            )
        results += few
    report(results, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
