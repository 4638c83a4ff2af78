"""Zero-shot findings on a CT, as a Hugging Face pipeline, and the one call that writes a folder for the Hub.

    pipe = pipeline("ct-zero-shot", model=folder, trust_remote_code=True)
    pipe({"volume": "ct.nii.gz", "mask": "organs.nii.gz"}, findings=[
        {"finding": "Emphysema", "organ": "lung", "positive": "Emphysema.", "negative": "Not Emphysema."}])

For a finding of an organ, with unit-length embeddings v (organ), p and n (prompts) and the model's temperature t:

    probability = mean over the prompt pairs of softmax([v . n, v . p] / t)[1]

Steps: (1) the scan is prepared as in training; (2) each organ asked for is seen in a window centred on it, and windows
that coincide are forwarded once; (3) prompts are embedded once and kept for the next scan; (4) the softmax.

Source: Shui et al., ICLR 2025, https://openreview.net/forum?id=nYpPAT4L3D.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save

from .geometry import crop_or_pad, crop_start, organ_box, organ_window, organs_in_crop
from .organs import nearest_name
from .preparation import padding_hu

TASK = "ct-zero-shot"


class FVLMZeroShotPipeline(Pipeline):
    """Probabilities of findings, organ by organ, from prompts.

    Input: {"volume": path, array or Volume, "mask": likewise} and, where needed, "affine" (for arrays) and "numbering"
    (of the mask's labels; default "totalsegmentator_v2"). Paths are those of NIfTI, NRRD or MetaImage files, a volume
    may also be a DICOM series (folder, zip archive or multi-frame file). A model of preprocessing "published" takes no
    Volume, and its scans as they are stored, in NIfTI files; its windows have the size trained on (112 x 256 x 352
    voxels), whereas the published evaluation shows larger ones (`eval_fvlm.py --protocol published`). Call with
    `findings`, a list of
    {finding, organ, positive, negative}; positive and negative are one prompt or lists of equal length.

    Output: a list in the order of `findings` of {finding, organ, probability, is_complete}. `probability` is None where
    the mask does not hold the organ; `is_complete` is False where the organ is absent or cut by the scan (under
    "published": by the prepared scan, whose padding hides where the scanner stopped).
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

    def _sanitize_parameters(self, findings: Sequence[Mapping] | None = None, **kwargs):
        if kwargs:
            raise TypeError(f"{TASK} does not know {sorted(kwargs)}; it takes `findings`.")
        parameters = {} if findings is None else {"findings": self._checked_findings(findings)}
        return parameters, {}, {}

    def preprocess(self, inputs: Mapping, findings: list[dict] | None = None) -> dict:
        """(1) Prepare the scan and cut its windows."""
        if findings is None:
            raise ValueError("findings is missing: give a list of {finding, organ, positive, negative}.")
        if not isinstance(inputs, Mapping) or not {"volume", "mask"} <= set(inputs):
            raise ValueError(
                'a scan is {"volume": ..., "mask": ...}; arrays also need "affine", "numbering" is optional.'
            )
        if unknown := set(inputs) - {"volume", "mask", "affine", "numbering"}:
            raise ValueError(f"a scan does not have {sorted(unknown)}; it has volume, mask, affine and numbering.")
        image_processor = self.processor.image_processor
        organs = image_processor.organs
        scan = image_processor.prepare(
            inputs["volume"], inputs["mask"], inputs.get("affine"), inputs.get("numbering", "totalsegmentator_v2")
        )
        # (2) window -> the organs it serves
        windows: dict[tuple, list[int]] = {}
        for organ_index in sorted({organs.index(item["organ"]) for item in findings}):
            is_organ = scan.mask == organ_index + 1
            if is_organ.any():
                window, size = organ_window(
                    organ_box(is_organ), scan.mask.shape, image_processor.volume_size, image_processor.patch_size
                )
                # As numbers: slices cannot be keys before Python 3.12.
                key = (tuple((part.start, part.stop) for part in window), size)
                windows.setdefault(key, []).append(organ_index)
        outside = padding_hu(image_processor.windows, image_processor.preprocessing == "published")
        crops = []
        for (window, size), organ_indices in windows.items():
            part = tuple(slice(start, stop) for start, stop in window)
            start = crop_start(scan.mask[part].shape, size)
            crops.append(
                {
                    "volume": torch.from_numpy(crop_or_pad(scan.volume[part], start, size, outside))[None],
                    "organ_mask": torch.from_numpy(crop_or_pad(scan.mask[part], start, size, 0))[None],
                    "organ_indices": organ_indices,
                }
            )
        whole = tuple(slice(0, edge) for edge in scan.mask.shape)
        is_complete = organs_in_crop(
            scan.mask, whole, len(organs), image_processor.completeness, image_processor.min_organ_voxels
        )
        return {"crops": crops, "is_complete": is_complete.tolist(), "findings": findings}

    def _forward(self, model_inputs: dict) -> dict:
        findings = model_inputs["findings"]
        organs = list(self.model.config.organs)
        image_embeds: dict[int, torch.Tensor] = {}
        # One window at a time: a full-size window is a batch of its own for memory.
        for crop in model_inputs["crops"]:
            features = self.model.get_organ_features(volume=crop["volume"], organ_mask=crop["organ_mask"])
            for organ_index in crop["organ_indices"]:
                image_embeds[organ_index] = features.image_embeds[0, organ_index]
        prompts = tuple(dict.fromkeys(text for item in findings for text in (*item["positive"], *item["negative"])))
        text_embeds = dict(zip(prompts, self._embed_prompts(prompts)))  # (3)
        logit_scale = self.model.temperature()
        answers = []
        for item in findings:
            organ_index = organs.index(item["organ"])
            probability = None
            if organ_index in image_embeds:
                positive = torch.stack([text_embeds[text] for text in item["positive"]])
                negative = torch.stack([text_embeds[text] for text in item["negative"]])
                # (4) A softmax over two logits is the sigmoid of their difference.
                margin = (positive - negative).double() @ image_embeds[organ_index].double()
                probability = torch.sigmoid(logit_scale.double() * margin).mean()
            answers.append(probability)
        return {"probabilities": answers, "is_complete": model_inputs["is_complete"], "findings": findings}

    def postprocess(self, model_outputs: dict) -> list[dict]:
        """One dict a finding, plain Python values."""
        organs = list(self.model.config.organs)
        return [
            {
                "finding": item["finding"],
                "organ": item["organ"],
                "probability": None if probability is None else float(probability),
                "is_complete": model_outputs["is_complete"][organs.index(item["organ"])],
            }
            for item, probability in zip(model_outputs["findings"], model_outputs["probabilities"])
        ]

    def _embed_prompts(self, prompts: tuple[str, ...]) -> torch.Tensor:
        """`(prompts, dim)`; the last set of prompts is kept, since scans usually share one."""
        if self._known_prompts != prompts:
            encoded = self.processor(text=list(prompts)).to(self.device)
            self._prompt_embeds = self.model.get_text_features(encoded["input_ids"], encoded["attention_mask"])
            self._known_prompts = prompts
        return self._prompt_embeds

    def _checked_findings(self, findings: Sequence[Mapping]) -> list[dict]:
        """The findings with their prompts as lists."""
        if isinstance(findings, (str, Mapping)) or not findings:
            raise ValueError("findings must be a non-empty list of {finding, organ, positive, negative}.")
        organs = list(self.model.config.organs)
        checked = []
        for place, item in enumerate(findings):
            if missing := {"finding", "organ", "positive", "negative"} - set(item):
                raise ValueError(f"findings[{place}] lacks {sorted(missing)}: {dict(item)}.")
            if item["organ"] not in organs:
                raise ValueError(
                    f"findings[{place}] ({item['finding']}): organ {item['organ']!r} is not in config.organs {organs}"
                    f"{nearest_name(item['organ'], organs)}."
                )
            prompts = {
                side: [item[side]] if isinstance(item[side], str) else list(item[side])
                for side in ("positive", "negative")
            }
            if not prompts["positive"] or len(prompts["positive"]) != len(prompts["negative"]):
                raise ValueError(
                    f"findings[{place}] ({item['finding']}) has {len(prompts['positive'])} positive and "
                    f"{len(prompts['negative'])} negative prompts; they are compared in pairs and need equal numbers."
                )
            checked.append({"finding": item["finding"], "organ": item["organ"], **prompts})
        return checked


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
    if processor is not None:
        processor.save_pretrained(folder)
    custom_object_save(FVLMZeroShotPipeline, folder)
