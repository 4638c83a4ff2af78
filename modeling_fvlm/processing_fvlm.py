"""`FVLMProcessor`: scans and captions to the inputs of `FVLMModel`, in one call.

features = processor(volumes="ct.nii.gz", masks="organs.nii.gz", captions=[{"lung": "No nodule."}])  # or DICOM
output = model(**features)
"""

from collections.abc import Mapping, Sequence

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .captions import encode_captions
from .image_processing_fvlm import FVLMImageProcessor


class FVLMProcessor(ProcessorMixin):
    """An image processor and a tokenizer, and the organs that bind them.

    Args:
        image_processor: `FVLMImageProcessor`.
        tokenizer: Tokenizer of the model's text encoder.
        organs: Organ names in the order of the model's organ axis; by default the image processor's.
        max_text_length: Tokens after which a caption is cut.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        organs: Sequence[str] | None = None,
        max_text_length: int = 384,
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, **kwargs)
        self.organs = list(organs or image_processor.organs)
        self.max_text_length = max_text_length
        if self.organs != list(image_processor.organs):
            raise ValueError(f"organs {self.organs} are not those of the image processor, {image_processor.organs}.")

    @classmethod
    def from_config(cls, config, tokenizer) -> "FVLMProcessor":
        """Make the processor that belongs to a model."""
        image_processor = FVLMImageProcessor.from_config(config)
        return cls(image_processor, tokenizer, organs=config.organs, max_text_length=config.max_text_length)

    @property
    def model_input_names(self) -> list[str]:
        captions = ["input_ids", "attention_mask", "caption_index", "caption_hash", "organ_is_abnormal"]
        return [*self.image_processor.model_input_names, *captions]

    def __call__(
        self,
        volumes=None,
        masks=None,
        captions: Mapping | Sequence[Mapping[str, str | tuple[str, bool]]] | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Prepare scans, captions, or both.

        Args:
            volumes, masks: As in `FVLMImageProcessor.preprocess`, which also takes the remaining keyword arguments
                (`affines`, `numbering`, `window`, `center`).
            captions: Per scan {organ: caption} or {organ: (caption, is_abnormal)}, for the loss.
            text: Free sentences instead, for `model.get_text_features`.
            return_tensors: Only "pt" for captions and text.

        Returns:
            Of the scans `pixel_values` or `volume`, `organ_mask`, `organ_is_complete`; of text `input_ids` and
            `attention_mask`; of captions these two, `caption_index`, `caption_hash` and `organ_is_abnormal`.
        """
        if volumes is None and captions is None and text is None:
            raise ValueError("nothing to process: give volumes with masks, captions, or text.")
        if captions is not None and text is not None:
            raise ValueError("give captions (one dict a scan) or text (free sentences), not both.")
        if volumes is None and (masks is not None or kwargs):
            raise ValueError(f"{sorted(kwargs) or ['masks']} came without volumes.")
        if return_tensors != "pt" and (captions is not None or text is not None):
            raise ValueError(f"captions and text become torch tensors only, got return_tensors={return_tensors!r}.")
        features = BatchFeature()
        if volumes is not None:
            features.update(self.image_processor.preprocess(volumes, masks, return_tensors=return_tensors, **kwargs))
        if captions is not None:
            captions = [captions] if isinstance(captions, Mapping) else captions
            if volumes is not None and len(captions) != len(features["organ_mask"]):
                raise ValueError(f"{len(features['organ_mask'])} scans came with {len(captions)} dicts of captions.")
            encoded = encode_captions(captions, self.organs, self.tokenizer, self.max_text_length)
            features.update({name: tensor for name, tensor in encoded.items() if name != "text_hash"})
        if text is not None:
            encoded = self.tokenizer(
                [text] if isinstance(text, str) else list(text),
                padding=True,
                truncation=True,
                max_length=self.max_text_length,
                return_tensors="pt",
            )
            features.update({name: encoded[name] for name in ("input_ids", "attention_mask")})
        return features


# Saving then writes `auto_map` and this code beside the weights.
FVLMProcessor.register_for_auto_class()
