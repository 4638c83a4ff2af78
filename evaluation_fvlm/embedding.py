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

Every score of this room (zero-shot here; retrieval, diagnostics) starts from these arrays, so the tower runs once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.windows import Window, WindowRule, organ_boxes, organ_windows
from modeling_fvlm.geometry import organ_token_mask, organs_in_crop
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


@dataclass
class _Scan:
    """One decoded row, ready for the model."""

    position: int
    identity: dict[str, str]
    labels: dict[str, int]
    volume: np.ndarray  # (depth, height, width) int16 HU
    is_complete: np.ndarray  # (organs,) bool
    windows: list[tuple[Window, list[int], Tensor]]  # window, its organs, their tokens (organs, tokens) bool


@dataclass
class _CutWindow:
    """One window of a scan, cut out and padded."""

    organ_indices: list[int]
    volume: Tensor  # (depth, height, width) int16 HU
    token_mask: Tensor  # (organs, tokens) bool


@dataclass
class _Batch:
    """Windows of one size: while they wait for each other, and while the device computes them."""

    windows: list[_CutWindow] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # each window's row in the result
    image_embeds: Tensor | None = None  # (windows, organs, dim) float32 on the host, once launched
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
) -> SplitEmbeddings:
    """Embed every organ of every row of a processed split.

    Args:
        model: An `FVLMModel`, on the device to use. Its mode (train or eval) is restored afterwards.
        dataset: Rows of a processed split (DESIGN.md, section 4), already narrowed to those wanted.
        organs: Names of the organs that are asked, default all; the others get no window of their own, but their
            tokens stay in sight of the network.
        rule: How windows are made; default: of the model's `volume_size`.
        batch_size: Windows per forward.
        num_workers: Threads that read ahead; each holds one scan. Threads, since zlib, zstd, numpy and torch
            all release the interpreter lock here, and a worker process would need shared memory for volumes of tens
            of megabytes.
        dtype: Autocast the image tower to this, e.g. `torch.bfloat16`; None computes as the weights are.
        progress: Show a progress bar on stderr.

    Raises:
        EvaluationError: If a row was prepared for another spacing or more organs than the model's, or an organ's
            embedding is not finite; names the scan.
    """
    config = model.config
    rule = rule or WindowRule(tuple(config.vision_config.volume_size), tuple(config.vision_config.patch_size))
    asked = [config.organs.index(organ) for organ in (organs or config.organs)]
    num_rows, num_organs = len(dataset), len(config.organs)
    result = SplitEmbeddings(
        organs=list(config.organs),
        scans=pd.DataFrame(index=range(num_rows), columns=SCAN_COLUMNS, dtype=object),
        labels=[{} for _ in range(num_rows)],
        image_embeds=np.zeros((num_rows, num_organs, config.projection_dim), np.float32),
        is_present=np.zeros((num_rows, num_organs), bool),
        is_complete=np.zeros((num_rows, num_organs), bool),
    )
    outside = padding_hu(config.windows, rule.published or config.preprocessing == "published")
    waiting: dict[tuple[int, ...], _Batch] = {}
    launched: deque[_Batch] = deque()
    start = time.perf_counter()

    def prepare(position: int) -> _Scan:
        return _prepare_scan(dataset[position], position, config, asked, rule)

    def forward(batch: _Batch) -> None:
        launched.append(_launch(model, batch))
        result.num_windows += len(batch.windows)
        result.num_batches += 1
        while len(launched) > 1:
            _collect(launched.popleft(), result)

    with inference(model, dtype):
        scans = _read_ahead(prepare, num_rows, num_workers)
        for scan in tqdm(scans, total=num_rows, desc="scans", unit="scan", disable=not progress):
            result.scans.loc[scan.position] = [scan.identity[column] for column in SCAN_COLUMNS]
            result.labels[scan.position] = scan.labels
            for window, organ_indices, token_mask in scan.windows:
                result.is_present[scan.position, organ_indices] = True
                result.is_complete[scan.position, organ_indices] = scan.is_complete[organ_indices]
                batch = waiting.setdefault(window.size, _Batch())
                cut = _for_device(torch.from_numpy(window.take(scan.volume, outside)), model.device)
                batch.windows.append(_CutWindow(organ_indices, cut, token_mask))
                batch.positions.append(scan.position)
                if len(batch.windows) == batch_size:
                    forward(waiting.pop(window.size))
            # Odd sizes must not pile up in memory: past four batches' worth the fullest goes as it is.
            while sum(len(batch.windows) for batch in waiting.values()) > 4 * batch_size:
                forward(waiting.pop(max(waiting, key=lambda size: len(waiting[size].windows))))
        for batch in waiting.values():
            forward(batch)
        for batch in launched:
            _collect(batch, result)
    result.seconds = time.perf_counter() - start
    return result


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


def _prepare_scan(row: dict, position: int, config, asked: list[int], rule: WindowRule) -> _Scan:
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
    windows = []
    for window, organ_indices in organ_windows(boxes, mask.shape, rule).items():
        token_mask = organ_token_mask(window.take(mask, 0), num_organs, rule.patch_size)
        if config.vision_config.token_selection == "all":
            # Every patch is seen in any case: the others' tokens would only be pooled for nothing.
            token_mask[np.setdiff1d(np.arange(num_organs), organ_indices)] = False
        windows.append((window, organ_indices, torch.from_numpy(token_mask)))
    whole = tuple(slice(0, edge) for edge in mask.shape)
    return _Scan(
        position=position,
        identity={column: row[column] for column in SCAN_COLUMNS},
        labels={label["finding"]: int(label["value"]) for label in row["labels"] or []},
        volume=volume,
        is_complete=organs_in_crop(mask, whole, num_organs, config.completeness, config.min_organ_voxels),
        windows=windows,
    )


def _for_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor in memory from which a GPU copies while the host goes on."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _launch(model: PreTrainedModel, batch: _Batch) -> _Batch:
    """(2) Start one batch and the way of its embeddings back to the host. On a GPU nothing here waits for either."""
    device = model.device
    size = (len(batch.windows), *batch.windows[0].volume.shape)
    volume = torch.empty(size, dtype=torch.int16, device=device)
    for target, window in zip(volume, batch.windows):
        target.copy_(window.volume, non_blocking=True)
    token_mask = _for_device(torch.stack([window.token_mask for window in batch.windows]), device)
    token_mask = token_mask.to(device, non_blocking=True)  # (windows, organs, tokens)
    features = model.get_organ_features(
        volume=volume,
        organ_token_mask=token_mask,
        organ_is_complete=token_mask.any(dim=-1),  # completeness is judged on the stored volume, not on a window
    )
    # An asynchronous copy to the host goes to pinned memory; the numbers are there once the event has happened.
    batch.image_embeds = features.image_embeds.float().to("cpu", non_blocking=device.type == "cuda")
    if device.type == "cuda":
        batch.is_done = torch.cuda.Event()
        batch.is_done.record(torch.cuda.current_stream(device))
    return batch


def _collect(batch: _Batch, result: SplitEmbeddings) -> None:
    """(3) Keep of each window the organs that it was made for."""
    if batch.is_done is not None:
        batch.is_done.synchronize()
    for embeds, window, position in zip(batch.image_embeds.numpy(), batch.windows, batch.positions):
        # Kept, it would look like an organ that the mask lacks.
        broken = [result.organs[index] for index in window.organ_indices if not np.isfinite(embeds[index]).all()]
        if broken:
            raise EvaluationError(
                f"{result.scans.loc[position, 'recon_id']}: the embedding of {broken} is not finite. The weights may "
                "be those of a run that diverged; otherwise compute in float32."
            )
        result.image_embeds[position, window.organ_indices] = embeds[window.organ_indices]
