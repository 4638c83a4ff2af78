"""Embeddings of a split as Parquet files: what retrieval, diagnostics and probes read, so that no tower runs again.

    DIR/scans.parquet     one row per scan, in the order in which they were finished; `row` is its place in the split
        row, patient_id, scan_id, recon_id
        image_embeds/ORGAN       list of float32 (or float16), unit length; null where the organ is absent or not asked
        mean_pooled/ORGAN        likewise, from the mean of the organ's tokens; only where that was asked for
        volume_embeds            list of float32 (or float16), null where no organ was in sight
        is_present, is_complete  list of bool in the order of the organs
        caption_index            list of int32 in the order of the organs: `text` in texts.parquet, -1 for none
        is_abnormal, is_mentioned   list of bool, of the captions
        report_index             int32: `text` in texts.parquet, -1 for none
        labels                   list of {finding, value}; 1, 0, -1 unknown
    DIR/texts.parquet     one row per different caption, report and prompt
        text (int32), kind, content (null where texts were not to be kept), embeds
    DIR/embeddings.json   what made them: model, data, organs, protocol. Written last: where it lies, all is there

A table with the embeddings of one organ, in pandas:
    scans = pandas.read_parquet("DIR/scans.parquet", columns=["recon_id", "image_embeds/lung"]).dropna()

Texts are stored once, not once per scan: of 24 organs most captions are the same few sentences, and equal indices say
that two scans have the same text. Scans are written as they come, `ROWS_PER_GROUP` at a time, and none is kept:
`embed_to_files` embeds a split of any size in flat memory, but for its texts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation_fvlm.embedding import (
    SCAN_COLUMNS,
    EmbeddingRun,
    ScanEmbedding,
    SplitEmbeddings,
    SplitTexts,
    embed_scans,
    embed_split_texts,
    volume_pooling,
)
from evaluation_fvlm.errors import EvaluationError

FORMAT_VERSION = 1
SCANS_FILE, TEXTS_FILE, INFO_FILE = "scans.parquet", "texts.parquet", "embeddings.json"
DTYPES = {"float32": pa.float32(), "float16": pa.float16()}
KINDS = ("caption", "report", "prompt")
ROWS_PER_GROUP = 512
# How far from 1 the length of a stored embedding may be: rounding of float16, or of a tower in bfloat16.
UNIT_TOLERANCE = 1e-2
_LABELS = pa.list_(pa.struct([("finding", pa.string()), ("value", pa.int8())]))


@dataclass
class StoredEmbeddings:
    """What `load_embeddings` returns.

    `texts` is None where the split had none to embed. `prompt_embeds`: sentence -> `(dim,)`. `info` is the content of
    embeddings.json.
    """

    embeddings: SplitEmbeddings
    texts: SplitTexts | None
    prompt_embeds: dict[str, np.ndarray]
    info: dict[str, Any]


class EmbeddingWriter:
    """Writes scans as they come.

        with EmbeddingWriter(folder, organs, dim, info, texts=texts, with_volume=True) as writer:
            embed_scans(model, dataset, writer.add, with_volume=True)

    Args:
        folder: Made if missing; embeddings that lie there are replaced.
        organs: The model's, in the order of every organ axis.
        dim: Of the embeddings.
        info: What made them, for embeddings.json; JSON-ready.
        texts: Of the same rows; None: no captions and no reports.
        prompts: Sentence -> embedding.
        dtype: "float32", or "float16" for half the size and three digits.
        with_volume, with_mean_pooling: What the scans hold.
        keep_texts: False writes embeddings of texts without the texts: reports are a patient's data.

    Raises:
        EvaluationError: If the folder cannot be written to, or the arguments do not fit each other.
    """

    def __init__(
        self,
        folder: str | Path,
        organs: Sequence[str],
        dim: int,
        info: Mapping[str, Any],
        *,
        texts: SplitTexts | None = None,
        prompts: Mapping[str, np.ndarray] | None = None,
        dtype: str = "float32",
        with_volume: bool = False,
        with_mean_pooling: bool = False,
        keep_texts: bool = True,
    ):
        if dtype not in DTYPES:
            raise EvaluationError(f"embeddings are stored as one of {list(DTYPES)}, not '{dtype}'.")
        if texts is not None and texts.caption_index.shape[1] != len(organs):
            raise EvaluationError(
                f"the texts are of {texts.caption_index.shape[1]} organs, the scans of {len(organs)}: embed both with "
                "one model."
            )
        self.folder, self.organs, self.dim, self.texts = Path(folder), list(organs), dim, texts
        self.with_volume, self.with_mean_pooling = with_volume, with_mean_pooling
        self.info = {
            "format": FORMAT_VERSION,
            "organs": self.organs,
            "dim": dim,
            "dtype": dtype,
            "has_texts": texts is not None,
            "texts_are_kept": keep_texts,
            "with_volume": with_volume,
            "with_mean_pooling": with_mean_pooling,
        }
        clash = sorted(self.info.keys() & info.keys())
        if clash:
            raise EvaluationError(f"info has the keys {clash}, which {INFO_FILE} uses itself: rename them.")
        self.info |= info
        self.num_scans = 0
        self._rows: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None
        self._schema = _scan_schema(self.organs, DTYPES[dtype], with_volume, with_mean_pooling, texts is not None)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / INFO_FILE).unlink(missing_ok=True)  # from here on the folder is not whole
            self._write_texts(DTYPES[dtype], prompts or {}, keep_texts)
        except OSError as error:
            raise EvaluationError(f"embeddings cannot be written to {self.folder}: {error}") from error

    def __enter__(self) -> EmbeddingWriter:
        self._writer = pq.ParquetWriter(
            self.folder / SCANS_FILE,
            self._schema,
            compression="zstd",
            use_dictionary=["patient_id", "scan_id"],  # of embeddings hardly a number comes twice
        )
        return self

    def __exit__(self, error_class, error, trace) -> None:
        try:
            if error_class is None:
                self._flush()
        finally:
            self._writer.close()
        if error_class is None:
            unfinished = self.folder / f"{INFO_FILE}.part"
            content = json.dumps(self.info | {"num_scans": self.num_scans}, indent=2, ensure_ascii=False)
            unfinished.write_text(content + "\n", encoding="utf-8")
            os.replace(unfinished, self.folder / INFO_FILE)

    def add(self, scan: ScanEmbedding) -> None:
        """Write one scan.

        Raises:
            EvaluationError: If it lacks what the writer was told of, or its row has no texts.
        """
        size = (len(self.organs), self.dim)
        if scan.image_embeds.shape != size:
            raise EvaluationError(
                f"{scan.identity['recon_id']}: embeddings of shape {scan.image_embeds.shape}, the file is of {size}."
            )
        for name, is_asked in (("volume_embed", self.with_volume), ("mean_pooled_embeds", self.with_mean_pooling)):
            if is_asked and getattr(scan, name) is None:
                raise EvaluationError(f"{scan.identity['recon_id']}: it has no {name}, but the file is to hold them.")
        row: dict[str, Any] = {"row": scan.position, **scan.identity}
        for prefix, embeds in self._of_organs(scan).items():
            for organ, values, is_present in zip(self.organs, embeds, scan.is_present):
                row[f"{prefix}/{organ}"] = values if is_present else None
        if self.with_volume:
            row["volume_embeds"] = scan.volume_embed if scan.volume_embed.any() else None
        row["is_present"], row["is_complete"] = scan.is_present.tolist(), scan.is_complete.tolist()
        if self.texts is not None:
            if not 0 <= scan.position < len(self.texts.report_index):
                raise EvaluationError(
                    f"{scan.identity['recon_id']}: row {scan.position}, but the texts are those of "
                    f"{len(self.texts.report_index)} rows."
                )
            indices = self.texts.caption_index[scan.position]
            row["caption_index"] = indices.tolist()
            row["is_abnormal"] = self.texts.is_abnormal[scan.position].tolist()
            row["is_mentioned"] = self.texts.is_mentioned[scan.position].tolist()
            report = int(self.texts.report_index[scan.position])
            row["report_index"] = report if report < 0 else report + len(self.texts.captions)
        row["labels"] = [{"finding": finding, "value": value} for finding, value in scan.labels.items()]
        self._rows.append(row)
        self.num_scans += 1
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def _of_organs(self, scan: ScanEmbedding) -> dict[str, np.ndarray]:
        embeds = {"image_embeds": scan.image_embeds}
        return embeds | ({"mean_pooled": scan.mean_pooled_embeds} if self.with_mean_pooling else {})

    def _flush(self) -> None:
        if not self._rows:
            return
        columns = []
        for field in self._schema:
            values = [row[field.name] for row in self._rows]
            if pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type):
                columns.append(_lists_of_floats(values, field.type))
            else:
                columns.append(pa.array(values, field.type))
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._rows.clear()

    def _write_texts(self, dtype: pa.DataType, prompts: Mapping[str, np.ndarray], keep_texts: bool) -> None:
        parts: list[tuple[str, Sequence[str], np.ndarray]] = []
        if self.texts is not None:
            parts.append(("caption", self.texts.captions, self.texts.caption_embeds))
            parts.append(("report", self.texts.reports, self.texts.report_embeds))
        if prompts:
            parts.append(("prompt", list(prompts), np.stack(list(prompts.values()))))
        for kind, texts, embeds in parts:
            if embeds.shape != (len(texts), self.dim):
                raise EvaluationError(
                    f"{len(texts)} {kind}s with embeddings of shape {embeds.shape}; expected {(len(texts), self.dim)}."
                )
        fields = [("text", pa.int32()), ("kind", pa.string()), ("content", pa.string()), ("embeds", pa.list_(dtype))]
        schema = pa.schema(fields)
        with pq.ParquetWriter(self.folder / TEXTS_FILE, schema, compression="zstd", use_dictionary=["kind"]) as writer:
            number = 0
            for kind, texts, embeds in parts:
                for start in range(0, len(texts), ROWS_PER_GROUP):
                    part = list(texts[start : start + ROWS_PER_GROUP])
                    # Prompts are nobody's.
                    content = part if keep_texts or kind == "prompt" else [None] * len(part)
                    columns = [
                        pa.array(range(number, number + len(part)), pa.int32()),
                        pa.array([kind] * len(part)),
                        pa.array(content, pa.string()),
                        _lists_of_floats(embeds[start : start + ROWS_PER_GROUP], pa.list_(dtype)),
                    ]
                    writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                    number += len(part)


def save_embeddings(
    folder: str | Path,
    embeddings: SplitEmbeddings,
    text: SplitTexts | None = None,
    *,
    prompts: Mapping[str, np.ndarray] | None = None,
    info: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    keep_texts: bool = True,
) -> Path:
    """Write the embeddings of a split.

    Args:
        folder: Made if missing; embeddings that lie there are replaced.
        embeddings: From `embed_split`.
        text: From `embed_split_texts` for the same rows.
        prompts: Sentence -> embedding, so that zero-shot scores can be had from the files.
        info: What made them: model, data, protocol, and `logit_scale`. JSON-ready.
        dtype, keep_texts: As of `EmbeddingWriter`.

    Raises:
        EvaluationError: If they do not belong together, or cannot be written.
    """
    if text is not None and len(text.report_index) != len(embeddings.scans):
        raise EvaluationError(
            f"the texts are those of {len(text.report_index)} rows, the embeddings of {len(embeddings.scans)}."
        )
    made_by = {
        "asked_organs": embeddings.asked_organs or embeddings.organs,
        "volume_pooling": embeddings.volume_pooling,
        "num_windows": embeddings.num_windows,
        "seconds": round(embeddings.seconds, 2),
    }
    if text is not None:
        made_by |= {"num_cut_captions": text.num_cut_captions, "num_cut_reports": text.num_cut_reports}
    with EmbeddingWriter(
        folder,
        embeddings.organs,
        embeddings.image_embeds.shape[2],
        made_by | dict(info or {}),
        texts=text,
        prompts=prompts,
        dtype=dtype,
        with_volume=embeddings.volume_embeds is not None,
        with_mean_pooling=embeddings.mean_pooled_embeds is not None,
        keep_texts=keep_texts,
    ) as writer:
        identities = embeddings.scans[SCAN_COLUMNS].to_dict("records")
        for position, identity in enumerate(identities):
            volume, mean_pooled = (
                None if array is None else array[position]
                for array in (embeddings.volume_embeds, embeddings.mean_pooled_embeds)
            )
            writer.add(
                ScanEmbedding(
                    position=position,
                    identity=identity,
                    labels=embeddings.labels[position],
                    image_embeds=embeddings.image_embeds[position],
                    is_present=embeddings.is_present[position],
                    is_complete=embeddings.is_complete[position],
                    volume_embed=volume,
                    mean_pooled_embeds=mean_pooled,
                )
            )
    return Path(folder)


def embed_to_files(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    info: Mapping[str, Any] | None = None,
    prompts: Mapping[str, np.ndarray] | None = None,
    dtype: str = "float32",
    keep_texts: bool = True,
    tower_dtype: torch.dtype | None = None,
    **options: Any,
) -> EmbeddingRun:
    """Embed a split of any size and write it scan by scan: only texts and their embeddings are held.

    What `save_embeddings` of `embed_split` and `embed_split_texts` writes, rows in another order.

    Args:
        folder, info, prompts, dtype, keep_texts: As of `save_embeddings`.
        model, tokenizer, dataset: As of `embed_split` and `embed_split_texts`.
        tower_dtype: Autocast both towers to this.
        options: Others of `embed_scans`: rule, batch_size, num_workers, progress, with_mean_pooling.

    Raises:
        EvaluationError: As those do.
    """
    texts = embed_split_texts(model, tokenizer, dataset, dtype=tower_dtype, progress=options.get("progress", False))
    made_by = {
        "asked_organs": list(model.config.organs),
        "volume_pooling": volume_pooling(model),
        "num_cut_captions": texts.num_cut_captions,
        "num_cut_reports": texts.num_cut_reports,
    }
    with EmbeddingWriter(
        folder,
        model.config.organs,
        model.config.projection_dim,
        made_by | dict(info or {}),
        texts=texts,
        prompts=prompts,
        dtype=dtype,
        with_volume=True,
        with_mean_pooling=options.get("with_mean_pooling", False),
        keep_texts=keep_texts,
    ) as writer:
        run = embed_scans(model, dataset, writer.add, dtype=tower_dtype, with_volume=True, **options)
        writer.info |= {"num_windows": run.num_windows, "seconds": round(run.seconds, 2)}
    return run


def load_embeddings(folder: str | Path) -> StoredEmbeddings:
    """Read what `save_embeddings` or an `EmbeddingWriter` wrote, checked; scans in the order of the split.

    Raises:
        EvaluationError: If the folder is not whole or of a later version; if an embedding is not finite, not of unit
            length or of another size; if a scan stands there twice; if a text that is pointed at does not exist.
    """
    folder = Path(folder)
    info = _read_info(folder)
    organs, dim = info["organs"], info["dim"]
    size = (info["num_scans"], len(organs))
    scans_path = folder / SCANS_FILE
    try:
        file, texts_table = pq.ParquetFile(scans_path), pq.read_table(folder / TEXTS_FILE)
    except (OSError, pa.ArrowInvalid) as error:
        raise EvaluationError(f"{folder} cannot be read: {error} Embed the split again.") from error
    if file.metadata.num_rows != size[0]:
        raise EvaluationError(
            f"{scans_path} has {file.metadata.num_rows} scans, {INFO_FILE} speaks of {size[0]}: the two are not of "
            "one run. Embed the split again."
        )
    expected = _scan_schema(
        organs, DTYPES[info["dtype"]], info["with_volume"], info["with_mean_pooling"], info["has_texts"]
    ).names
    if missing := [name for name in expected if name not in file.schema_arrow.names]:
        raise EvaluationError(f"{scans_path} lacks the columns {missing}: it is not of the run of {INFO_FILE}.")

    of_embeds = [name for name in expected if "/" in name or name == "volume_embeds"]
    table = file.read(columns=[name for name in expected if name not in of_embeds])
    rows = table["row"].to_numpy()
    if len(np.unique(rows)) != len(rows):
        raise EvaluationError(f"{scans_path} holds a row of the split twice: {_twice(rows.tolist())}.")
    order = np.argsort(rows, kind="stable")
    table = table.take(pa.array(order))
    scans = table.select(SCAN_COLUMNS).to_pandas()
    if scans.duplicated().any():
        twice = scans[scans.duplicated()].iloc[0].to_dict()
        raise EvaluationError(f"{scans_path} holds a scan twice: {twice}. Its figures would count it twice.")
    is_present, is_complete = (_bools(table[name], size, name, scans_path) for name in ("is_present", "is_complete"))

    def embeds_of(name: str, is_expected: np.ndarray | None) -> np.ndarray:
        """One column at a time: the whole table beside its arrays would take twice the memory."""
        column = file.read(columns=[name]).column(0).combine_chunks().take(pa.array(order))
        is_expected = np.asarray(column.is_valid()) if is_expected is None else is_expected
        return _embeds(column, is_expected, dim, name, scans, scans_path)

    by_organ = {}
    for prefix in ("image_embeds", *(["mean_pooled"] if info["with_mean_pooling"] else [])):
        by_organ[prefix] = np.zeros((*size, dim), np.float32)
        for place, organ in enumerate(organs):
            by_organ[prefix][:, place] = embeds_of(f"{prefix}/{organ}", is_present[:, place])
    volume_embeds = embeds_of("volume_embeds", None) if info["with_volume"] else None
    embeddings = SplitEmbeddings(
        organs=organs,
        scans=scans,
        labels=[{entry["finding"]: entry["value"] for entry in labels or []} for labels in table["labels"].to_pylist()],
        image_embeds=by_organ["image_embeds"],
        is_present=is_present,
        is_complete=is_complete,
        num_windows=info.get("num_windows", 0),
        seconds=info.get("seconds", 0.0),
        asked_organs=info.get("asked_organs", organs),
        volume_embeds=volume_embeds,
        volume_pooling=info.get("volume_pooling"),
        mean_pooled_embeds=by_organ.get("mean_pooled"),
    )
    texts, prompts = _read_texts(texts_table, table, info, folder)
    return StoredEmbeddings(embeddings, texts, prompts, info)


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO_FILE
    if not path.is_file():
        what = "was broken off while they were written" if (folder / SCANS_FILE).is_file() else "holds no embeddings"
        raise EvaluationError(
            f"{folder} {what} (no {INFO_FILE}). Write them with `python eval_fvlm.py ... --save_embeddings`."
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path} is no JSON: {error}. Embed the split again.") from error
    if info.get("format") != FORMAT_VERSION:
        raise EvaluationError(
            f"{path} is of format {info.get('format')}, this version reads {FORMAT_VERSION}. Embed the split again."
        )
    return info


def _read_texts(
    table: pa.Table, scans: pa.Table, info: Mapping, folder: Path
) -> tuple[SplitTexts | None, dict[str, np.ndarray]]:
    path, dim = folder / TEXTS_FILE, info["dim"]
    table = table.sort_by("text")
    if table["text"].to_pylist() != list(range(len(table))):
        raise EvaluationError(f"{path}: its texts are not numbered from 0 on. Embed the split again.")
    kinds = np.asarray(table["kind"].to_pylist(), dtype=object)
    content = table["content"].to_pylist()
    identity = pd.DataFrame({"text": range(len(table))})
    embeds = _embeds(table["embeds"].combine_chunks(), np.ones(len(table), bool), dim, "embeds", identity, path)
    of_kind = {kind: np.flatnonzero(kinds == kind) for kind in KINDS}
    prompts = {content[place]: embeds[place] for place in of_kind["prompt"]}
    if not info["has_texts"]:
        return None, prompts
    num_captions, num_reports = (len(of_kind[kind]) for kind in ("caption", "report"))
    if kinds[: num_captions + num_reports].tolist() != ["caption"] * num_captions + ["report"] * num_reports:
        raise EvaluationError(f"{path}: captions do not come first, reports second. Embed the split again.")
    size = (len(scans), len(info["organs"]))
    caption_index = np.asarray(scans["caption_index"].to_pylist(), np.int32).reshape(size)
    report_index = scans["report_index"].to_numpy().astype(np.int32)
    report_index = np.where(report_index < 0, -1, report_index - num_captions).astype(np.int32)
    ranges = (("caption", caption_index, num_captions), ("report", report_index, num_reports))
    for kind, index, count in ranges:
        if len(index) and (index.min() < -1 or index.max() >= count):
            raise EvaluationError(
                f"{folder}: a scan points at {kind} {index.max()}, but there are {count}: {SCANS_FILE} and "
                f"{TEXTS_FILE} are not of one run."
            )
    scans_path = folder / SCANS_FILE
    texts = SplitTexts(
        captions=content[:num_captions],
        caption_embeds=embeds[:num_captions],
        caption_index=caption_index,
        is_abnormal=_bools(scans["is_abnormal"], size, "is_abnormal", scans_path),
        is_mentioned=_bools(scans["is_mentioned"], size, "is_mentioned", scans_path),
        reports=content[num_captions : num_captions + num_reports],
        report_embeds=embeds[num_captions : num_captions + num_reports],
        report_index=report_index,
        num_cut_captions=info.get("num_cut_captions", 0),
        num_cut_reports=info.get("num_cut_reports", 0),
    )
    return texts, prompts


def _scan_schema(
    organs: Sequence[str], dtype: pa.DataType, with_volume: bool, with_mean_pooling: bool, with_texts: bool
) -> pa.Schema:
    fields = [("row", pa.int32()), *((name, pa.string()) for name in SCAN_COLUMNS)]
    for prefix in ("image_embeds", *(["mean_pooled"] if with_mean_pooling else [])):
        fields += [(f"{prefix}/{organ}", pa.list_(dtype)) for organ in organs]
    if with_volume:
        fields.append(("volume_embeds", pa.list_(dtype)))
    bools = pa.list_(pa.bool_())
    fields += [("is_present", bools), ("is_complete", bools)]
    if with_texts:
        fields += [("caption_index", pa.list_(pa.int32())), ("is_abnormal", bools), ("is_mentioned", bools)]
        fields.append(("report_index", pa.int32()))
    return pa.schema([*fields, ("labels", _LABELS)])


def _lists_of_floats(rows: Sequence[np.ndarray | None] | np.ndarray, list_type: pa.ListType) -> pa.Array:
    """Rows of numbers, None for null, without making Python floats of them."""
    lengths = [0 if row is None else len(row) for row in rows]
    kept = [row for row in rows if row is not None]
    dtype = np.float16 if pa.types.is_float16(list_type.value_type) else np.float32
    values = np.concatenate(kept).astype(dtype) if kept else np.zeros(0, dtype)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    is_null = pa.array([row is None for row in rows], pa.bool_())
    return pa.ListArray.from_arrays(offsets, pa.array(values), type=list_type, mask=is_null)


def _embeds(
    array: pa.ListArray, is_expected: np.ndarray, dim: int, name: str, rows: pd.DataFrame, path: Path
) -> np.ndarray:
    """`(rows, dim)` float32 of a column, zeros at nulls; all of it checked."""
    is_there = np.asarray(array.is_valid())
    lengths = np.where(is_there, np.asarray(array.value_lengths().fill_null(0)), dim)
    embeds = np.zeros((len(array), dim), np.float32)
    problem = None
    if (is_there != is_expected).any():
        place = int(np.flatnonzero(is_there != is_expected)[0])
        problem = place, "is there though the organ is absent" if is_there[place] else "is missing"
    elif (lengths != dim).any():
        place = int(np.flatnonzero(lengths != dim)[0])
        problem = place, f"has {lengths[place]} numbers instead of {dim}"
    else:
        embeds[is_there] = np.asarray(array.flatten(), dtype=np.float32).reshape(-1, dim)
        norms = np.linalg.norm(embeds.astype(np.float64), axis=1)
        wrong = is_there & ~(np.abs(norms - 1) <= UNIT_TOLERANCE)  # true of NaN, too
        if wrong.any():
            place = int(np.flatnonzero(wrong)[0])
            is_finite = np.isfinite(embeds[place]).all()
            problem = place, f"has length {norms[place]:.4g} instead of 1" if is_finite else "is not finite"
    if problem is not None:
        place, what = problem
        raise EvaluationError(f"{path}, column {name}, {rows.iloc[place].to_dict()}: the embedding {what}.")
    return embeds


def _bools(column: pa.ChunkedArray, size: tuple[int, int], name: str, path: Path) -> np.ndarray:
    values = column.to_pylist()
    if any(row is None or len(row) != size[1] for row in values):
        raise EvaluationError(f"{path}, column {name}: a row has not one value for each of the {size[1]} organs.")
    return np.asarray(values, bool).reshape(size)


def _twice(values: Sequence) -> Any:
    seen: set = set()
    return next(value for value in values if value in seen or seen.add(value))
