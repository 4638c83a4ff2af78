"""Organ embeddings of a whole split: the one part of an evaluation that runs the image tower.

(1) Threads read ahead while the tower runs: decode a row, find the organs' windows (windows.py) and which tokens each
    organ owns. At most `num_workers + 1` scans are ahead, each as its int16 volume: cut out, its windows would take up
    to ten times as much.
(2) Windows are cut as their turn comes, in pinned memory where the model is on a GPU. Those of equal size wait for each
    other, from whatever scan they come, and go through the model as one batch: it applies its own HU windows.
(3) Each organ's embedding is kept from its own window. An organ absent from the mask has none; an organ that the
    scan cuts has one and is marked as not complete (the published rule: scored, but known). Embeddings are fetched one
    batch late, so that a GPU has its next batch before the host waits for this one.

The copies to and from a GPU are asynchronous; that part has not been run on a GPU yet.

Beside the organs, where asked for:
(4) the whole volume. By the model's global branch, where it has one, over one more window: that of its training's
    evaluation, in the middle of the scan. Else the mean of the organs' embeddings, brought back to unit length.
(5) every organ once more with the mean of its tokens in place of the attention, through the same layers (diagnostics).
(6) the texts: captions and whole reports, every different one once.

Every score of this room (zero-shot here; retrieval, diagnostics, probes) starts from these arrays, so the tower runs
once. `embed_scans` hands the scans over as they are finished and keeps none (embedding_files.py writes them).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.windows import Window, WindowRule, organ_boxes, organ_windows
from modeling_fvlm.captions import compose_report, strip_normal_prefix
from modeling_fvlm.geometry import crop_start, organ_token_mask, organs_in_crop
from modeling_fvlm.preparation import padding_hu
from modeling_fvlm.processed_split import decode_volume

SCAN_COLUMNS = ["patient_id", "scan_id", "recon_id"]


@dataclass
class SplitEmbeddings:
    """What the image tower says of a split; axis 0 of every array follows the rows of `scans`."""

    organs: list[str]
    scans: pd.DataFrame  # patient_id, scan_id, recon_id
    labels: list[dict[str, int]]  # finding -> 1, 0 or -1 (unknown)
    image_embeds: np.ndarray  # (scans, organs, dim) float32, unit length; zeros where an organ has no embedding
    is_present: np.ndarray  # (scans, organs) bool: the organ has voxels, so `image_embeds` holds its embedding
    is_complete: np.ndarray  # (scans, organs) bool: by the config's rule, judged on the stored volume
    num_windows: int = 0
    num_batches: int = 0
    seconds: float = 0.0
    asked_organs: list[str] = field(default_factory=list)  # the others were not embedded, present or not
    volume_embeds: np.ndarray | None = None  # (scans, dim) float32, unit length; zeros: no organ in sight
    volume_pooling: str | None = None  # how, in words
    mean_pooled_embeds: np.ndarray | None = None  # as `image_embeds`, from the mean of each organ's tokens


@dataclass
class ScanEmbedding:
    """What the image tower says of one scan: a row of `SplitEmbeddings`, and its place there."""

    position: int
    identity: dict[str, str]  # patient_id, scan_id, recon_id
    labels: dict[str, int]
    image_embeds: np.ndarray  # (organs, dim)
    is_present: np.ndarray  # (organs,)
    is_complete: np.ndarray  # (organs,)
    volume_embed: np.ndarray | None = None  # (dim,)
    mean_pooled_embeds: np.ndarray | None = None  # (organs, dim)
    num_open: int = 0  # windows that are not computed yet


@dataclass
class SplitTexts:
    """What the text tower says of a split: every different text once, and which scan has which.

    A text is what the encoder reads: a caption without its normal sentence (`strip_normal_prefix`), the whole report by
    `compose_report`. Two scans have the same text if and only if they have the same index.
    """

    captions: list[str]  # the different ones of all organs
    caption_embeds: np.ndarray  # (captions, dim) float32, unit length
    caption_index: np.ndarray  # (scans, organs) int32 into `captions`, -1: none
    is_abnormal: np.ndarray  # (scans, organs) bool: the caption describes a finding
    is_mentioned: np.ndarray  # (scans, organs) bool: the report speaks of the organ
    reports: list[str]
    report_embeds: np.ndarray  # (reports, dim) float32, unit length
    report_index: np.ndarray  # (scans,) int32 into `reports`, -1: none
    num_cut_captions: int = 0  # longer than the encoder reads: their ends are not embedded
    num_cut_reports: int = 0


@dataclass
class EmbeddingRun:
    """What it took to embed a split."""

    num_windows: int = 0
    num_batches: int = 0
    seconds: float = 0.0


@dataclass
class _Scan:
    """One decoded row, ready for the model."""

    position: int
    identity: dict[str, str]
    labels: dict[str, int]
    volume: np.ndarray  # (depth, height, width) int16 HU
    is_complete: np.ndarray  # (organs,) bool
    windows: list[_ScanWindow]


@dataclass
class _ScanWindow:
    """One window of a scan and what is asked of it."""

    window: Window
    organ_indices: list[int]
    token_mask: Tensor  # (organs, tokens) bool
    is_of_volume: bool  # the global branch reads it


@dataclass
class _CutWindow:
    """One window of a scan, cut out and padded."""

    organ_indices: list[int]
    volume: Tensor  # (depth, height, width) int16 HU
    token_mask: Tensor  # (organs, tokens) bool
    is_of_volume: bool = False


@dataclass
class _Batch:
    """Windows of one size: while they wait for each other, and while the device computes them."""

    windows: list[_CutWindow] = field(default_factory=list)
    scans: list[ScanEmbedding] = field(default_factory=list)  # whose each window is
    image_embeds: Tensor | None = None  # (windows, organs, dim) float32 on the host, once launched
    volume_embeds: Tensor | None = None  # (windows, dim), with a global branch
    mean_pooled_embeds: Tensor | None = None  # (windows, organs, dim), if asked for
    is_done: torch.cuda.Event | None = None  # what the host must wait for before it reads them; None: nothing


def embed_split(
    model: PreTrainedModel,
    dataset: Dataset,
    *,
    organs: list[str] | None = None,
    rule: WindowRule | None = None,
    batch_size: int = 4,
    num_workers: int = 1,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    with_volume: bool = False,
    with_mean_pooling: bool = False,
) -> SplitEmbeddings:
    """Embed every organ of every row of a processed split, and keep all of it in memory.

    Args and raises: as `embed_scans`.
    """
    config = model.config
    num_rows, num_organs, dim = len(dataset), len(config.organs), config.projection_dim
    result = SplitEmbeddings(
        organs=list(config.organs),
        scans=pd.DataFrame(index=range(num_rows), columns=SCAN_COLUMNS, dtype=object),
        labels=[{} for _ in range(num_rows)],
        image_embeds=np.zeros((num_rows, num_organs, dim), np.float32),
        is_present=np.zeros((num_rows, num_organs), bool),
        is_complete=np.zeros((num_rows, num_organs), bool),
        asked_organs=[organ for organ in config.organs if organ in (organs or config.organs)],
        volume_embeds=np.zeros((num_rows, dim), np.float32) if with_volume else None,
        volume_pooling=volume_pooling(model) if with_volume else None,
        mean_pooled_embeds=np.zeros((num_rows, num_organs, dim), np.float32) if with_mean_pooling else None,
    )

    def keep(scan: ScanEmbedding) -> None:
        result.scans.loc[scan.position] = [scan.identity[column] for column in SCAN_COLUMNS]
        result.labels[scan.position] = scan.labels
        result.image_embeds[scan.position] = scan.image_embeds
        result.is_present[scan.position] = scan.is_present
        result.is_complete[scan.position] = scan.is_complete
        if with_volume:
            result.volume_embeds[scan.position] = scan.volume_embed
        if with_mean_pooling:
            result.mean_pooled_embeds[scan.position] = scan.mean_pooled_embeds

    run = embed_scans(
        model,
        dataset,
        keep,
        organs=organs,
        rule=rule,
        batch_size=batch_size,
        num_workers=num_workers,
        dtype=dtype,
        progress=progress,
        with_volume=with_volume,
        with_mean_pooling=with_mean_pooling,
    )
    result.num_windows, result.num_batches, result.seconds = run.num_windows, run.num_batches, run.seconds
    return result


def embed_scans(
    model: PreTrainedModel,
    dataset: Dataset,
    keep: Callable[[ScanEmbedding], None],
    *,
    organs: list[str] | None = None,
    rule: WindowRule | None = None,
    batch_size: int = 4,
    num_workers: int = 1,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    with_volume: bool = False,
    with_mean_pooling: bool = False,
) -> EmbeddingRun:
    """Embed every organ of every row of a processed split, and hand each scan over when its last window is computed.

    Args:
        model: An `FVLMModel`, on the device to use. Its mode (train or eval) is restored afterwards.
        dataset: Rows of a processed split (DESIGN.md, section 4), already narrowed to those wanted.
        keep: Called once for every row, in the order in which they are finished, not the split's.
        organs: Names of the organs that are asked, default all; the others get no window of their own, but their
            tokens stay in sight of the network.
        rule: How windows are made; default: of the model's `volume_size`.
        batch_size: Windows per forward.
        num_workers: Threads that read ahead; each holds one scan. Threads, since zlib, zstd, numpy and torch
            all release the interpreter lock here, and a worker process would need shared memory for volumes of tens
            of megabytes.
        dtype: Autocast the image tower to this, e.g. `torch.bfloat16`; None computes as the weights are.
        progress: Show a progress bar on stderr.
        with_volume: Embed the whole volume as well (4). With a global branch that is up to one more window per scan.
        with_mean_pooling: Embed every organ by the mean of its tokens as well (5).

    Raises:
        EvaluationError: If a row was prepared for another spacing or more organs than the model's, or an organ's
            embedding is not finite; names the scan.
    """
    config = model.config
    rule = rule or WindowRule(tuple(config.vision_config.volume_size), tuple(config.vision_config.patch_size))
    asked = [config.organs.index(organ) for organ in (organs or config.organs)]
    num_organs, dim = len(config.organs), config.projection_dim
    has_branch = config.volume_pooling != "none"
    outside = padding_hu(config.windows, rule.published or config.preprocessing == "published")
    waiting: dict[tuple[int, ...], _Batch] = {}
    launched: deque[_Batch] = deque()
    run = EmbeddingRun()
    start = time.perf_counter()

    def prepare(position: int) -> _Scan:
        return _prepare_scan(dataset[position], position, config, asked, rule, with_volume and has_branch)

    def finish(scan: ScanEmbedding) -> None:
        if with_volume and not has_branch:
            scan.volume_embed = mean_of_organs(scan.image_embeds, scan.is_present)
        keep(scan)

    def collect(batch: _Batch) -> None:
        _collect(batch, config.organs)
        for scan in batch.scans:
            scan.num_open -= 1
            if scan.num_open == 0:
                finish(scan)

    def forward(batch: _Batch) -> None:
        launched.append(_launch(model, batch, with_mean_pooling))
        run.num_windows += len(batch.windows)
        run.num_batches += 1
        while len(launched) > 1:
            collect(launched.popleft())

    with inference(model, dtype):
        scans = _read_ahead(prepare, len(dataset), num_workers)
        for scan in tqdm(scans, total=len(dataset), desc="scans", unit="scan", disable=not progress):
            embedding = ScanEmbedding(
                position=scan.position,
                identity=scan.identity,
                labels=scan.labels,
                image_embeds=np.zeros((num_organs, dim), np.float32),
                is_present=np.zeros(num_organs, bool),
                is_complete=np.zeros(num_organs, bool),
                volume_embed=np.zeros(dim, np.float32) if with_volume else None,
                mean_pooled_embeds=np.zeros((num_organs, dim), np.float32) if with_mean_pooling else None,
                num_open=len(scan.windows),
            )
            if not scan.windows:
                finish(embedding)
            for part in scan.windows:
                embedding.is_present[part.organ_indices] = True
                embedding.is_complete[part.organ_indices] = scan.is_complete[part.organ_indices]
                batch = waiting.setdefault(part.window.size, _Batch())
                cut = _for_device(torch.from_numpy(part.window.take(scan.volume, outside)), model.device)
                batch.windows.append(_CutWindow(part.organ_indices, cut, part.token_mask, part.is_of_volume))
                batch.scans.append(embedding)
                if len(batch.windows) == batch_size:
                    forward(waiting.pop(part.window.size))
            # Odd sizes must not pile up in memory: past four batches' worth the fullest goes as it is.
            while sum(len(batch.windows) for batch in waiting.values()) > 4 * batch_size:
                forward(waiting.pop(max(waiting, key=lambda size: len(waiting[size].windows))))
        for batch in waiting.values():
            forward(batch)
        while launched:
            collect(launched.popleft())
    run.seconds = time.perf_counter() - start
    return run


def volume_pooling(model: PreTrainedModel) -> str:
    """How `volume_embeds` come about, in words."""
    if model.config.volume_pooling == "none":
        return "mean of the embeddings of the organs present, brought to unit length (the model has no global branch)"
    return f"global branch ({model.config.volume_pooling}) over the window in the middle of the scan"


def mean_of_organs(image_embeds: np.ndarray, is_present: np.ndarray) -> np.ndarray:
    """Mean over the organs present, brought to unit length; zeros where there is none.

    Args:
        image_embeds: `(..., organs, dim)`, zeros where an organ is absent.
        is_present: `(..., organs)` bool.
    """
    total = (image_embeds * is_present[..., None]).sum(axis=-2, dtype=np.float64)
    norm = np.linalg.norm(total, axis=-1, keepdims=True)
    return np.divide(total, norm, out=np.zeros_like(total), where=norm > 0).astype(np.float32)


def embed_split_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> SplitTexts:
    """(6) Embed the captions and the reports of a processed split.

    Args:
        model: An `FVLMModel`; its mode is restored.
        tokenizer: Of its processor.
        dataset: The rows that are embedded by `embed_split`, in the same order.
        batch_size: Texts per forward.
        dtype: Autocast to this.
        progress: Show progress bars on stderr.

    Raises:
        EvaluationError: If an embedding is not finite, or a caption belongs to an organ the model lacks.
    """
    config = model.config
    place_of = {organ: place for place, organ in enumerate(config.organs)}
    size = (len(dataset), len(place_of))
    caption_index, report_index = np.full(size, -1, np.int32), np.full(len(dataset), -1, np.int32)
    is_abnormal, is_mentioned = np.zeros(size, bool), np.zeros(size, bool)
    captions: dict[str, int] = {}
    reports: dict[str, int] = {}
    columns = [name for name in ("recon_id", "captions", "findings", "impression") if name in dataset.column_names]
    for number, row in enumerate(dataset.select_columns(columns)):
        for entry in row.get("captions") or []:
            organ = place_of.get(entry["organ"])
            if organ is None:
                raise EvaluationError(
                    f"{row['recon_id']}: it has a caption of '{entry['organ']}', which is none of the model's organs. "
                    f"Build the split with the model's organ set '{config.organ_set}'."
                )
            text = strip_normal_prefix(entry["caption"], entry["organ"])
            caption_index[number, organ] = captions.setdefault(text, len(captions))
            is_abnormal[number, organ] = bool(entry["is_abnormal"])
            is_mentioned[number, organ] = bool(entry["is_mentioned"])
        if report := compose_report(row.get("impression"), row.get("findings")):
            report_index[number] = reports.setdefault(report, len(reports))
    lengths = (config.max_text_length, config.max_report_length or config.max_text_length)
    (caption_embeds, num_cut_captions), (report_embeds, num_cut_reports) = (
        embed_texts(model, tokenizer, list(texts), length, batch_size=batch_size, dtype=dtype, progress=progress)
        for texts, length in zip((captions, reports), lengths)
    )
    return SplitTexts(
        captions=list(captions),
        caption_embeds=caption_embeds,
        caption_index=caption_index,
        is_abnormal=is_abnormal,
        is_mentioned=is_mentioned,
        reports=list(reports),
        report_embeds=report_embeds,
        report_index=report_index,
        num_cut_captions=num_cut_captions,
        num_cut_reports=num_cut_reports,
    )


def embed_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    *,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> tuple[np.ndarray, int]:
    """`(texts, dim)` float32 of unit length, and how many texts were longer than `max_length` tokens and cut.

    Raises:
        EvaluationError: If an embedding is not finite; says which text, but does not quote what may be a report.
    """
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # texts of one batch are of like length
    embeds = np.zeros((len(texts), model.config.projection_dim), np.float32)
    num_cut = 0
    with inference(model, dtype):
        starts = range(0, len(texts), batch_size)
        for start in tqdm(starts, desc="texts", unit="batch", disable=not progress):
            batch = order[start : start + batch_size]
            # One token more than is read tells which texts are cut.
            words = tokenizer([texts[number] for number in batch], truncation=True, max_length=max_length + 1)
            is_cut = [len(ids) > max_length for ids in words["input_ids"]]
            num_cut += sum(is_cut)
            tokens = tokenizer(
                [texts[number] for number in batch],
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
            features = model.get_text_features(
                tokens["input_ids"].to(model.device), tokens["attention_mask"].to(model.device)
            )
            embeds[batch] = features.float().cpu().numpy()
    broken = np.flatnonzero(~np.isfinite(embeds).all(axis=1))
    if len(broken):
        raise EvaluationError(
            f"the embedding of the text {broken[0] + 1} of {len(texts)} is not finite ({len(broken)} are not). The "
            "weights may be those of a run that diverged; otherwise compute in float32."
        )
    return embeds, num_cut


@contextmanager
def inference(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Evaluation mode without gradients, autocast to `dtype` if given; the model's mode is put back at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
            yield
    finally:
        model.train(was_training)


def _read_ahead(prepare, count: int, num_workers: int) -> Iterator[_Scan]:
    """`prepare(0) ... prepare(count - 1)` in order, `num_workers + 1` of them ahead of the caller."""
    with ThreadPoolExecutor(max_workers=max(1, num_workers)) as pool:
        pending = [pool.submit(prepare, position) for position in range(min(count, num_workers + 1))]
        try:
            for position in range(count):
                scan = pending.pop(0).result()
                if (ahead := position + num_workers + 1) < count:
                    pending.append(pool.submit(prepare, ahead))
                yield scan
        finally:
            for future in pending:
                future.cancel()


def _prepare_scan(
    row: dict, position: int, config, asked: list[int], rule: WindowRule, with_volume_window: bool
) -> _Scan:
    """(1) Decode one row and find its windows."""
    # Resampling cuts the extent off to N whole voxels and spreads them over it: the exact spacing is up to 1 / N above
    # the model's, never below it, but where less than one voxel fits. A row does not tell N, only that its own shape is
    # no larger. The published preparation departs on purpose; there `check_split_matches` has to do.
    shape, excess = np.asarray(row["shape"]), np.asarray(row["spacing"]) / np.asarray(config.spacing) - 1
    is_off = (excess > 1 / shape + 2e-3) | ((excess < -2e-3) & (shape > 1))
    if is_off.any() and config.preprocessing != "published":
        raise EvaluationError(
            f"{row['recon_id']}: stored at spacing {[round(float(mm), 4) for mm in row['spacing']]} mm (depth, height, "
            f"width), but the model reads {list(config.spacing)}. Build the split at the model's spacing."
        )
    volume, mask = decode_volume(row)
    num_organs = len(config.organs)
    if mask.max(initial=0) > num_organs:
        raise EvaluationError(
            f"{row['recon_id']}: its mask holds label {mask.max()}, but the model knows {num_organs} organs. Build the "
            f"split with the model's organ set '{config.organ_set}'."
        )
    boxes = organ_boxes(mask, num_organs)
    boxes = [box if organ_index in asked else None for organ_index, box in enumerate(boxes)]
    organs_of = organ_windows(boxes, mask.shape, rule)
    whole_window = volume_window(mask.shape, rule) if with_volume_window and mask.any() else None
    if whole_window is not None:
        organs_of.setdefault(whole_window, [])
    windows = []
    for window, organ_indices in organs_of.items():
        is_of_volume = window == whole_window
        token_mask = organ_token_mask(window.take(mask, 0), num_organs, rule.patch_size)
        if config.vision_config.token_selection == "all" and not is_of_volume:
            # Every patch is seen in any case: the others' tokens would only be pooled for nothing.
            token_mask[np.setdiff1d(np.arange(num_organs), organ_indices)] = False
        windows.append(_ScanWindow(window, organ_indices, torch.from_numpy(token_mask), is_of_volume))
    whole = tuple(slice(0, edge) for edge in mask.shape)
    return _Scan(
        position=position,
        identity={column: row[column] for column in SCAN_COLUMNS},
        labels={label["finding"]: int(label["value"]) for label in row["labels"] or []},
        volume=volume,
        is_complete=organs_in_crop(mask, whole, num_organs, config.completeness, config.min_organ_voxels),
        windows=windows,
    )


def volume_window(shape: tuple[int, ...], rule: WindowRule) -> Window:
    """The window of a whole scan, in its middle: what a volume longer than `rule.size` has beyond it is not seen."""
    lengths = np.minimum(rule.size, shape).tolist()
    size = rule.size
    if rule.published:
        size = tuple(length + -length % patch for length, patch in zip(lengths, rule.patch_size))
    starts = crop_start(shape, lengths)
    crop = tuple((start, start + length) for start, length in zip(starts, lengths))
    return Window(crop, tuple(size), padded_behind=rule.published)


def _for_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor in memory from which a GPU copies while the host goes on."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _launch(model: PreTrainedModel, batch: _Batch, with_mean_pooling: bool) -> _Batch:
    """(2) Start one batch and the way of its embeddings back to the host. On a GPU nothing here waits for either."""
    device = model.device
    size = (len(batch.windows), *batch.windows[0].volume.shape)
    volume = torch.empty(size, dtype=torch.int16, device=device)
    for target, window in zip(volume, batch.windows):
        target.copy_(window.volume, non_blocking=True)
    token_mask = _for_device(torch.stack([window.token_mask for window in batch.windows]), device)
    token_mask = token_mask.to(device, non_blocking=True)  # (windows, organs, tokens)
    mean_pooled: list[Tensor] = []
    hook = model.organ_pooling.register_forward_hook(
        lambda pooling, inputs, _: mean_pooled.append(mean_pool(model, *inputs[:2])) if with_mean_pooling else None
    )
    try:
        features = model.get_organ_features(
            volume=volume,
            organ_token_mask=token_mask,
            organ_is_complete=token_mask.any(dim=-1),  # completeness is judged on the stored volume, not on a window
        )
    finally:
        hook.remove()
    # An asynchronous copy to the host goes to pinned memory; the numbers are there once the event has happened.
    batch.image_embeds = _to_host(features.image_embeds)
    if features.volume_embeds is not None and any(window.is_of_volume for window in batch.windows):
        batch.volume_embeds = _to_host(features.volume_embeds)
    if with_mean_pooling:
        batch.mean_pooled_embeds = _to_host(mean_pooled[0])
    if device.type == "cuda":
        batch.is_done = torch.cuda.Event()
        batch.is_done.record(torch.cuda.current_stream(device))
    return batch


def _to_host(embeds: Tensor) -> Tensor:
    return embeds.float().to("cpu", non_blocking=embeds.device.type == "cuda")


def mean_pool(model: PreTrainedModel, feature_levels: Sequence[Tensor], organ_token_mask: Tensor) -> Tensor:
    """(5) Organ embeddings as if every token of an organ had the same attention; nothing else is changed.

    Values, output layer and the organ's projection follow as they do on the attention's sum, so the two differ by the
    weights of the tokens alone.

    Args:
        model: An `FVLMModel`.
        feature_levels: Tokens of each level, `(batch, tokens, hidden)`.
        organ_token_mask: `(batch, organs, tokens)` bool.

    Returns:
        `(batch, organs, dim)`, unit length; zeros where an organ has no token.
    """
    pooling = model.organ_pooling
    is_present = organ_token_mask.any(-1, keepdim=True)
    weights = organ_token_mask.float() / organ_token_mask.sum(-1, keepdim=True).clamp(min=1)  # (batch, organs, tokens)
    # Every level has the same tokens, so the mean over all of them is the mean of the levels' means.
    means = sum(weights.to(level.dtype) @ level for level in feature_levels) / len(feature_levels)
    hidden = pooling.query_tokens.shape[1]
    values = F.linear(means, pooling.in_proj_weight[2 * hidden :], pooling.in_proj_bias[2 * hidden :])
    embeds = F.normalize(model.organ_projection(pooling.out_proj(values)).float(), dim=-1)
    return embeds.masked_fill(~is_present, 0)


def _collect(batch: _Batch, organs: Sequence[str]) -> None:
    """(3) Keep of each window the organs that it was made for, and the volume where it is the whole one's."""
    if batch.is_done is not None:
        batch.is_done.synchronize()
    for row, (window, scan) in enumerate(zip(batch.windows, batch.scans)):
        kept = {"image_embeds": batch.image_embeds[row].numpy()}
        if batch.mean_pooled_embeds is not None:
            kept["mean_pooled_embeds"] = batch.mean_pooled_embeds[row].numpy()
        for name, embeds in kept.items():
            # Kept, it would look like an organ that the mask lacks.
            broken = [organs[index] for index in window.organ_indices if not np.isfinite(embeds[index]).all()]
            if broken:
                raise EvaluationError(_not_finite(scan, f"of {broken}"))
            getattr(scan, name)[window.organ_indices] = embeds[window.organ_indices]
        if window.is_of_volume:
            scan.volume_embed = batch.volume_embeds[row].numpy().copy()  # not a view that holds the whole batch
            if not np.isfinite(scan.volume_embed).all():
                raise EvaluationError(_not_finite(scan, "of the whole volume"))


def _not_finite(scan: ScanEmbedding, what: str) -> str:
    return (
        f"{scan.identity['recon_id']}: the embedding {what} is not finite. The weights may be those of a run that "
        "diverged; otherwise compute in float32."
    )
