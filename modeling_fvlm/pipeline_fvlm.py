"""Zero-shot findings on a CT, as a Hugging Face pipeline, and the one call that writes a folder for the Hub.

    pipe = pipeline("ct-zero-shot", model=folder, trust_remote_code=True)
    pipe({"volume": "ct.nii.gz", "mask": "organs.nii.gz"}, findings=[
        {"finding": "Emphysema", "organ": "lung", "positive": "Emphysema.", "negative": "Not Emphysema."}])
    pipe("dicom_folder", findings={"lung": ["Emphysema"]})     # no mask: the whole volume, and the answer says so

For a finding of an organ, with unit-length embeddings v (organ), p and n (prompts) and the model's temperature t:

    probability = mean over the prompt pairs of softmax([v . n, v . p] / t)[1]

Steps: (1) the scan is prepared as in training; (2) each organ asked for is seen in a window centred on it, and windows
that coincide are forwarded once; without a mask the scan is covered by tiles, and every organ is pooled from all of it
(whole_volume.py); (3) prompts are embedded once and kept for the next scan; (4) the softmax.

Source: Shui et al., ICLR 2025, https://openreview.net/forum?id=nYpPAT4L3D.
"""

import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save

from .findings import TEMPLATE, read_findings
from .geometry import crop_or_pad, crop_start, organ_box, organ_window, organs_in_crop
from .image_processing_fvlm import MODEL_LABELS
from .preparation import padding_hu
from .whole_volume import cover_with_tiles, embed_whole_volume

logger = logging.getLogger(__name__)

TASK = "ct-zero-shot"
SCAN_KEYS = ("volume", "mask", "affine", "spacing", "numbering")
ORGAN, WHOLE_VOLUME = "organ", "whole volume"


class FVLMZeroShotPipeline(Pipeline):
    """Probabilities of findings, organ by organ, from prompts.

    Input: a scan, or a list of scans. A scan is the path of its volume, or a dict of

    - `volume`: path of a NIfTI, NRRD or MetaImage file or of a DICOM series (folder, zip archive or multi-frame file),
      or a 3-D array of HU, or a `Volume`;
    - `mask`, if there is one: path of a label file, of a folder with one file per structure, an array, or a `Volume`.
      Without it every organ is pooled from the whole volume: a makeshift, near chance where it was measured;
    - `affine`, for arrays: 4 x 4, voxel indices to mm in RAS+ (nibabel's); or `spacing`, where the array lies as
      arrays do here, (depth, height, width) with depth upward, height to the back and width to the patient's left: mm
      along these axes;
    - `numbering`, what the labels of the mask mean: "totalsegmentator_v2" (default, but for arrays, which may come from
      anywhere), "totalsegmentator_v1", {label: class or organ name}, or "organs", the model's own `organ_index + 1`.

    A model of preprocessing "published" takes no `Volume` and no folder of structures, and its scans as they are
    stored, in NIfTI files; its windows have the size trained on (112 x 256 x 352 voxels), whereas the published
    evaluation shows larger ones (`eval_fvlm.py --protocol published`).

    Call with

    - `findings`: list of {finding, organ, positive, negative}, where positive and negative are one prompt or lists;
      path of a task's .yaml file; {organ: [names]}; or names alone, which are asked of every organ. Names become
      prompts by `template`, ("{}.", "Not {}.") unless given: the published wording;
    - `return_embeds=True`: every answer has its organ's embedding as well. `findings` may then be left out: one answer
      an organ;
    - `batch_size`, for a list of scans: windows or tiles of one scan per forward (default 1).

    Output: a list in the order of `findings` of {finding, organ, probability, is_complete, region}. `region` is
    "organ", or "whole volume" where no mask was given. `probability` is None where the mask does not hold the organ;
    `is_complete` is False where the organ is absent or cut by the scan (under "published": by the prepared scan, whose
    padding hides where the scanner stopped), and None without a mask. Where the template made the prompts,
    `template` says which; with `return_embeds`, `image_embeds` is a list of floats, or None.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.eval()  # a model handed over in the middle of training would answer with dropout
        self._known_prompts: tuple[str, ...] | None = None
        self._prompt_embeds: torch.Tensor | None = None
        self._has_warned = False

    def _sanitize_parameters(
        self,
        findings: str | PathLike | Mapping | Sequence | None = None,
        template: Sequence[str] | None = None,
        return_embeds: bool | None = None,
        **kwargs,
    ):
        if kwargs:
            raise TypeError(
                f"{TASK} does not know {sorted(kwargs)}; it takes `findings`, `template` and `return_embeds`."
            )
        if template is not None and findings is None:
            raise ValueError("template makes prompts of findings: give both in one call.")
        parameters = {}
        if findings is not None:
            parameters["findings"] = read_findings(findings, self.model.config.organs, template or TEMPLATE)
        if return_embeds is not None:
            parameters["return_embeds"] = return_embeds
        return parameters, {}, {}

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ):
        """As the library's, but scans go one by one: they differ in the number of their windows, which are batched."""
        forward_params = {**forward_params, "batch_size": batch_size}
        return super().get_iterator(inputs, num_workers, 1, preprocess_params, forward_params, postprocess_params)

    def preprocess(self, inputs, findings: list[dict] | None = None, return_embeds: bool = False) -> dict:
        """(1) Prepare the scan and cut its windows, or without a mask its tiles."""
        if findings is None and not return_embeds:
            raise ValueError(
                "findings is missing: give a list of {finding, organ, positive, negative}, a task's .yaml file, "
                "{organ: [names]} or names; or return_embeds=True for embeddings alone."
            )
        scan = self._checked_scan(inputs)
        organs = list(self.model.config.organs)
        answers = [{"organ": organ} for organ in organs] if findings is None else findings
        asked = {"answers": answers, "return_embeds": return_embeds}
        if scan["mask"] is None:
            return asked | self._tiles(scan["volume"], scan["affine"])
        prepared = self.processor.image_processor.prepare(
            scan["volume"], scan["mask"], scan["affine"], scan["numbering"]
        )
        organ_indices = sorted({organs.index(item["organ"]) for item in answers})
        return asked | self._windows(prepared, organ_indices)

    def _checked_scan(self, inputs) -> dict:
        """Volume, mask, affine and numbering of a scan, as `FVLMImageProcessor.prepare` takes them."""
        scan = dict(inputs) if isinstance(inputs, Mapping) else {"volume": inputs}
        if scan.get("volume") is None:
            raise ValueError(
                'a scan is the path of its volume, or {"volume": ..., "mask": ...}; arrays also need "affine" or '
                '"spacing", "mask" and "numbering" are optional.'
            )
        if unknown := set(scan) - set(SCAN_KEYS):
            raise ValueError(f"a scan does not have {sorted(unknown)}; it has {', '.join(SCAN_KEYS)}.")
        volume, mask, affine = scan["volume"], scan.get("mask"), scan.get("affine")
        if scan.get("spacing") is not None:
            if affine is not None or not _is_array(volume):
                raise ValueError("spacing is for arrays without an affine; a file says itself how its voxels lie.")
            # As a file in LPS would store it: the published preparation goes by the stored order.
            affine = _lps_affine(scan["spacing"])
            volume, mask = (_reversed(value) if _is_array(value) else value for value in (volume, mask))
        if _is_array(volume) and affine is None:
            raise ValueError(
                'a volume given as an array needs "affine", voxel indices to mm in RAS+, as nibabel has it; or '
                '"spacing", mm along (depth, height, width), where it lies so. Without them nobody knows which end of '
                "an axis is the patient's left."
            )
        if mask is None and scan.get("numbering") is not None:
            raise ValueError("numbering says what the labels of a mask mean, but there is no mask.")
        numbering = scan.get("numbering") or "totalsegmentator_v2"
        if _is_array(mask) and scan.get("numbering") is None:
            raise ValueError(
                f'a mask given as an array needs "numbering": "{MODEL_LABELS}" where its labels are the model\'s own '
                '(organ_index + 1), "totalsegmentator_v2" or "totalsegmentator_v1", or {label: organ}.'
            )
        return {"volume": volume, "mask": mask, "affine": affine, "numbering": numbering}

    def _windows(self, scan, organ_indices: list[int]) -> dict:
        """(2) The windows of a prepared scan, each with the organs that it serves."""
        image_processor = self.processor.image_processor
        windows: dict[tuple, list[int]] = {}
        for organ_index in organ_indices:
            is_organ = scan.mask == organ_index + 1
            if is_organ.any():
                window, size = organ_window(
                    organ_box(is_organ), scan.mask.shape, image_processor.volume_size, image_processor.patch_size
                )
                # As numbers: slices cannot be keys before Python 3.12.
                key = (tuple((part.start, part.stop) for part in window), size)
                windows.setdefault(key, []).append(organ_index)
        crops = []
        for (window, size), served in windows.items():
            part = tuple(slice(start, stop) for start, stop in window)
            start = crop_start(scan.mask[part].shape, size)
            crops.append(
                {
                    "volume": torch.from_numpy(crop_or_pad(scan.volume[part], start, size, self._outside()))[None],
                    "organ_mask": torch.from_numpy(crop_or_pad(scan.mask[part], start, size, 0))[None],
                    "organ_indices": served,
                }
            )
        whole = tuple(slice(0, edge) for edge in scan.mask.shape)
        is_complete = organs_in_crop(
            scan.mask,
            whole,
            len(image_processor.organs),
            image_processor.completeness,
            image_processor.min_organ_voxels,
        )
        return {"crops": crops, "is_complete": is_complete.tolist(), "region": ORGAN}

    def _tiles(self, volume, affine) -> dict:
        """(2) The tiles of a scan without a mask."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "no mask: every organ is pooled from the whole volume (`region` of the answers says so). Its query has "
                "seen its organ alone in training, so the scores are those of another task, and may be little better "
                "than chance. Give a mask, for example of `TotalSegmentator -i ct.nii.gz -o mask.nii.gz --ml`."
            )
        image_processor = self.processor.image_processor
        scan, size = image_processor.prepare_volume(volume, affine), image_processor.volume_size
        tiles = cover_with_tiles(scan.shape, size, image_processor.patch_size)
        crops = np.stack([crop_or_pad(scan, tile.start, size, self._outside()) for tile in tiles])
        return {
            "tiles": torch.from_numpy(crops),
            "token_masks": torch.from_numpy(np.stack([tile.token_mask for tile in tiles])),
            "is_complete": [None] * len(image_processor.organs),
            "region": WHOLE_VOLUME,
        }

    def _outside(self) -> int:
        image_processor = self.processor.image_processor
        return padding_hu(image_processor.windows, image_processor.preprocessing == "published")

    def _forward(self, model_inputs: dict, batch_size: int = 1) -> dict:
        if model_inputs["region"] == WHOLE_VOLUME:
            embeds = embed_whole_volume(self.model, model_inputs["tiles"], model_inputs["token_masks"], batch_size)
            image_embeds = dict(enumerate(embeds))
        else:
            image_embeds = self._embed_windows(model_inputs["crops"], batch_size)
        organs = list(self.model.config.organs)
        answers = [dict(item) for item in model_inputs["answers"]]
        asked = [item for item in answers if "finding" in item]
        prompts = tuple(dict.fromkeys(text for item in asked for text in (*item["positive"], *item["negative"])))
        text_embeds = dict(zip(prompts, self._embed_prompts(prompts))) if prompts else {}  # (3)
        logit_scale = self.model.temperature()
        for item in answers:
            embed = image_embeds.get(organs.index(item["organ"]))
            item["image_embeds"] = embed
            item["probability"] = None
            if embed is not None and "finding" in item:
                positive = torch.stack([text_embeds[text] for text in item["positive"]])
                negative = torch.stack([text_embeds[text] for text in item["negative"]])
                # (4) A softmax over two logits is the sigmoid of their difference.
                margin = (positive - negative).double() @ embed.double()
                item["probability"] = torch.sigmoid(logit_scale.double() * margin).mean()
        kept = ("is_complete", "region", "return_embeds")
        return {"answers": answers, **{name: model_inputs[name] for name in kept}}

    def _embed_windows(self, crops: list[dict], batch_size: int) -> dict[int, torch.Tensor]:
        """Embeddings of the organs that a scan's windows show; windows of one size share a forward."""
        by_size: dict[tuple, list[dict]] = {}
        for crop in crops:
            by_size.setdefault(tuple(crop["volume"].shape), []).append(crop)
        image_embeds: dict[int, torch.Tensor] = {}
        for same in by_size.values():
            for start in range(0, len(same), batch_size):
                batch = same[start : start + batch_size]
                volume, organ_mask = (torch.cat([crop[name] for crop in batch]) for name in ("volume", "organ_mask"))
                features = self.model.get_organ_features(volume=volume, organ_mask=organ_mask)
                for crop, embeds in zip(batch, features.image_embeds):
                    image_embeds |= {organ_index: embeds[organ_index] for organ_index in crop["organ_indices"]}
        return image_embeds

    def postprocess(self, model_outputs: dict) -> list[dict]:
        """One dict a finding, or an organ, plain Python values."""
        organs = list(self.model.config.organs)
        results = []
        for item in model_outputs["answers"]:
            result = {"organ": item["organ"]}
            if "finding" in item:
                probability = item["probability"]
                result = {
                    "finding": item["finding"],
                    "organ": item["organ"],
                    "probability": None if probability is None else float(probability),
                }
            result["is_complete"] = model_outputs["is_complete"][organs.index(item["organ"])]
            result["region"] = model_outputs["region"]
            if "template" in item:
                result["template"] = item["template"]
            if model_outputs["return_embeds"]:
                embed = item["image_embeds"]
                result["image_embeds"] = None if embed is None else embed.float().tolist()
            results.append(result)
        return results

    def _embed_prompts(self, prompts: tuple[str, ...]) -> torch.Tensor:
        """`(prompts, dim)`; the last set of prompts is kept, since scans usually share one."""
        if self._known_prompts != prompts:
            encoded = self.processor(text=list(prompts)).to(self.device)
            self._prompt_embeds = self.model.get_text_features(encoded["input_ids"], encoded["attention_mask"])
            self._known_prompts = prompts
        return self._prompt_embeds


def _is_array(value) -> bool:
    """Whether it is an array or tensor, neither a path nor a `Volume`."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _reversed(array) -> np.ndarray:
    """An array or tensor with its axes in the opposite order."""
    return np.asarray(array.cpu() if isinstance(array, torch.Tensor) else array).T


def _lps_affine(spacing: Sequence[float]) -> np.ndarray:
    """Affine (RAS+) of an array (width, height, depth) in LPS, from mm along (depth, height, width)."""
    edges = np.asarray(spacing, dtype=np.float64)
    if edges.shape != (3,) or not (np.isfinite(edges) & (edges > 0)).all():
        raise ValueError(f"spacing must be three positive mm along (depth, height, width), got {spacing}.")
    depth, height, width = edges
    return np.diag([-width, -height, depth, 1.0])


def save_for_hub(model, processor, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write model, processor, pipeline and their code into one folder that loads with `trust_remote_code=True`.

    `AutoModel`, `AutoProcessor` and `pipeline("ct-zero-shot", model=folder)` then work with nothing of ours installed.
    `Pipeline.save_pretrained` of transformers 5.23 leaves the processor out, hence this function.

    Args:
        model: `FVLMModel`, unwrapped.
        processor: `FVLMProcessor`; None leaves it out.
        folder: Made if it does not exist; files of an earlier save are overwritten.
        state_dict: The weights, where they had to be collected from several processes; None: those of the model.
    """
    folder = Path(folder)
    model.config.custom_pipelines = {
        TASK: {
            "impl": f"{Path(__file__).stem}.{FVLMZeroShotPipeline.__name__}",
            "pt": ["AutoModel"],
            "type": "multimodal",
        }
    }
    if state_dict is not None:
        from .modeling_fvlm import FVLMModel  # of the folder of a loaded pipeline a second copy, so not at its top

        # FSDP2 gives a model a class of torch's own, whose code would be saved in place of ours.
        of_shards, model = model, object.__new__(FVLMModel)
        vars(model).update(vars(of_shards))
        # DeepSpeed takes no parameter without an axis.
        state_dict = {**state_dict, "temperature.value": state_dict["temperature.value"].reshape(())}
    model.save_pretrained(folder, state_dict=state_dict)
    for weights in folder.glob("model*.safetensors"):  # safetensors lets nobody but the owner read what it writes
        weights.chmod((folder / "config.json").stat().st_mode)
    if processor is not None:
        processor.save_pretrained(folder)
    custom_object_save(FVLMZeroShotPipeline, folder)
