"""Captions: the text paired with one organ of one scan, and how a batch of them reaches the text encoder.

Impression before findings: the tokenizer cuts at the tail, and the tail should be detail. An organ the report says
nothing of gets the sentence `NORMAL_CAPTION`. Whether a caption is abnormal travels beside it as `is_abnormal`, set by
the builder; only where nothing but a text is given does its beginning decide, as in the published code.

The published form (`published=True`) is kept to reproduce published numbers, with its oddities: quotes, apostrophes and
brackets are deleted, a full stop closes every section that ends otherwise, sections are joined without a space, an
organ without impression has the normal sentence in front of its findings, and an empty impression becomes ".", which
counts as abnormal.

Source: Shui et al., ICLR 2025, https://openreview.net/forum?id=nYpPAT4L3D, and the outputs of the authors' release.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NORMAL_CAPTION = "{organ} shows no significant abnormalities."

_PUBLISHED_REMOVED = str.maketrans("", "", "\"'()")


def compose_caption(
    organ: str,
    impression_sentences: str | Sequence[str] | None,
    findings_sentences: str | Sequence[str] | None,
    published: bool = False,
) -> str:
    """Put together what a report says of one organ, impression first.

    Args:
        organ: Organ name, for the sentence of an organ that is not spoken of.
        impression_sentences: Sentences (or one text) of the impression that speak of the organ; None or empty: none.
        findings_sentences: The same of the findings.
        published: Use the published form. There, None and "" differ: an empty text was an entry of the file.

    Returns:
        The sentences joined by one space, or `NORMAL_CAPTION` where the report says nothing.
    """
    if published:
        impression, findings = _published_section(impression_sentences), _published_section(findings_sentences)
        return (normal_caption(organ) if impression is None else impression) + (findings or "")
    sentences = [*_sentences(impression_sentences), *_sentences(findings_sentences)]
    return " ".join(sentences) or normal_caption(organ)


def normal_caption(organ: str) -> str:
    return NORMAL_CAPTION.format(organ=organ)


def is_abnormal_caption(caption: str, organ: str) -> bool:
    """The published rule: a caption is abnormal unless it begins with the organ's normal sentence."""
    return not caption.startswith(normal_caption(organ))


def strip_normal_prefix(caption: str, organ: str) -> str:
    """What the text encoder reads: the caption without the normal sentence, unless nothing else is left.

    Every occurrence goes, as in the published code. Equality and abnormality are judged on the caption BEFORE this.
    """
    return caption.replace(normal_caption(organ), "").strip() or caption


def caption_hash(caption: str, is_abnormal: bool) -> int:
    """A signed 64-bit number, the same in every process: two captions are equal iff their hashes are.

    Ranks exchange these instead of texts. `hash()` would differ between processes. A normal and an abnormal caption are
    never equal, whatever their text.
    """
    return _hash(f"{int(is_abnormal)}\0{caption}")


def compose_report(impression: str | None, findings: str | None) -> str:
    """The whole report as one text, the impression first; "" where there is neither."""
    return " ".join([*_sentences(impression), *_sentences(findings)])


def report_hash(report: str) -> int:
    """A signed 64-bit number, the same in every process, equal for equal reports and for no caption."""
    return _hash(f"report\0{report}")


def encode_captions(
    captions: Sequence[Mapping[str, str | tuple[str, bool]]],
    organs: Sequence[str],
    tokenizer,
    max_length: int,
    reports: Sequence[str] | None = None,
    max_report_length: int | None = None,
) -> "dict[str, torch.Tensor]":
    """Tokenize the captions of a batch, each distinct one once, and its reports if asked to.

    A batch of 24 organs repeats its normal sentences over and over; the text encoder should see each once, padded to
    the longest and not to `max_length`.

    Args:
        captions: Per scan {organ: caption} or {organ: (caption, is_abnormal)}; an organ may be left out.
        organs: Organ names in the order of the model's organ axis.
        tokenizer: A Hugging Face tokenizer.
        max_length: Tokens after which a caption is cut.
        reports: Per scan its whole report (`compose_report`), "" for none. They follow the captions among the texts.
        max_report_length: Tokens after which a report is cut; None: `max_length`.

    Returns:
        `input_ids`, `attention_mask` int64 (unique texts, longest); `text_hash` int64 (unique texts), a caption's
        `caption_hash`, a report's `report_hash`, 0 for the text of a batch that has none; `caption_index` int64
        (batch, organs), the place among the unique texts or -1; `caption_hash` int64 (batch, organs), 0 where there is
        none; `organ_is_abnormal` bool (batch, organs). With `reports` also `report_index` and `report_hash` int64
        (batch,), likewise -1 and 0 where there is none.

    Raises:
        ValueError: If a caption belongs to an organ that is not in `organs` or is no text, or there is not one report
            a scan.
    """
    import torch  # here: builders compose captions, too, and none of their workers should load PyTorch

    size = (len(captions), len(organs))
    caption_index = torch.full(size, -1, dtype=torch.int64)
    hashes = torch.zeros(size, dtype=torch.int64)
    is_abnormal = torch.zeros(size, dtype=torch.bool)
    places: dict[tuple[str, bool], int] = {}
    texts: list[str] = []
    index_of = {organ: organ_index for organ_index, organ in enumerate(organs)}
    for row, of_scan in enumerate(captions):
        for organ, entry in of_scan.items():
            if organ not in index_of:
                raise ValueError(f"captions of scan {row}: organ {organ!r} is not in config.organs {list(organs)}.")
            if isinstance(entry, str):
                entry = (entry, is_abnormal_caption(entry, organ))
            if not isinstance(entry, Sequence) or len(entry) != 2 or not isinstance(entry[0], str):
                raise ValueError(
                    f"captions of scan {row}: that of {organ!r} is {entry!r}; give a text, or (text, is_abnormal), or "
                    "leave the organ out."
                )
            caption, abnormal = entry
            key = (caption, bool(abnormal))
            if key not in places:
                places[key] = len(texts)
                texts.append(strip_normal_prefix(caption, organ))
            column = index_of[organ]
            caption_index[row, column] = places[key]
            hashes[row, column] = caption_hash(*key)
            is_abnormal[row, column] = key[1]
    text_hashes = [caption_hash(*key) for key in places]
    of_reports: dict[str, torch.Tensor] = {}
    different: list[str] = []
    if reports is not None:
        if len(reports) != len(captions):
            raise ValueError(f"{len(captions)} scans came with {len(reports)} reports.")
        different = list(dict.fromkeys(report for report in reports if report))
        place_of = {report: len(texts) + number for number, report in enumerate(different)}
        text_hashes += [report_hash(report) for report in different]
        of_reports = {
            "report_index": torch.tensor([place_of.get(report, -1) for report in reports], dtype=torch.int64),
            "report_hash": torch.tensor([report_hash(text) if text else 0 for text in reports], dtype=torch.int64),
        }
    # A batch without any text still carries an empty one: a rank whose text encoder does not run would leave the others
    # waiting for its gradients.
    if not text_hashes:
        texts, text_hashes = [""], [0]
    if max_report_length in (None, max_length) or not different:
        encoded = tokenizer(
            texts + different, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        )
    else:
        parts = [
            tokenizer(part, truncation=True, max_length=length)
            for part, length in ((texts, max_length), (different, max_report_length))
            if part
        ]
        joined = {name: [row for part in parts for row in part[name]] for name in ("input_ids", "attention_mask")}
        encoded = tokenizer.pad(joined, return_tensors="pt")
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "text_hash": torch.tensor(text_hashes, dtype=torch.int64),
        "caption_index": caption_index,
        "caption_hash": hashes,
        "organ_is_abnormal": is_abnormal,
        **of_reports,
    }


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _sentences(sentences: str | Sequence[str] | None) -> list[str]:
    parts = [sentences] if isinstance(sentences, str) else sentences or []
    return [part.strip() for part in parts if part and part.strip()]


def _published_section(text: str | Sequence[str] | None) -> str | None:
    if text is None:
        return None
    cleaned = (text if isinstance(text, str) else " ".join(text)).translate(_PUBLISHED_REMOVED)
    return cleaned if cleaned.endswith(".") else cleaned + "."
