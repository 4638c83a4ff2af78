"""fVLM: what ships to the Hub beside the weights. Importing this package makes fVLM known to the Auto classes.

    model = FVLMModel.from_pretrained(folder)        # or AutoModel: no trust_remote_code needed after this import
    processor = FVLMProcessor.from_pretrained(folder)

A folder written by `save_for_hub` carries this package's files, so it also loads where none of this is installed
(`trust_remote_code=True`). Only this file is not copied: what it registers, the copied config.json says in `auto_map`.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .captions import (
    NORMAL_CAPTION,
    caption_hash,
    compose_caption,
    encode_captions,
    is_abnormal_caption,
    normal_caption,
    strip_normal_prefix,
)
from .configuration_fvlm import FVLMConfig, FVLMVisionConfig
from .dicom import DicomSeries, find_series, read_dicom
from .geometry import AIR_HU, BadVolumeError
from .image_processing_fvlm import FVLMImageProcessor
from .loss import OrganLoss, contrastive_targets, organ_contrastive_loss
from .modeling_fvlm import FVLMModel, FVLMOrganFeatures, FVLMOutput, FVLMPreTrainedModel, build_text_model
from .organs import (
    NUMBERINGS,
    TOTALSEGMENTATOR_V1,
    TOTALSEGMENTATOR_V2,
    OrganSet,
    load_organ_set,
    organ_label_table,
)
from .pipeline_fvlm import FVLMZeroShotPipeline, save_for_hub
from .pooling import OrganPooling, OrganProjection
from .preparation import PreparedScan, prepare_scan
from .processed_split import decode_volume, encode_array
from .processing_fvlm import FVLMProcessor
from .published_preparation import prepare_published_scan
from .reading import (
    Volume,
    check_same_grid,
    read_mask,
    read_nifti,
    read_nifti_mask,
    read_structures,
    read_volume,
)
from .vision import FVLMVisionModel, FVLMVisionOutput

__all__ = [
    "AIR_HU",
    "NORMAL_CAPTION",
    "NUMBERINGS",
    "TOTALSEGMENTATOR_V1",
    "TOTALSEGMENTATOR_V2",
    "BadVolumeError",
    "DicomSeries",
    "FVLMConfig",
    "FVLMImageProcessor",
    "FVLMModel",
    "FVLMOrganFeatures",
    "FVLMOutput",
    "FVLMPreTrainedModel",
    "FVLMProcessor",
    "FVLMVisionConfig",
    "FVLMVisionModel",
    "FVLMVisionOutput",
    "FVLMZeroShotPipeline",
    "OrganLoss",
    "OrganPooling",
    "OrganProjection",
    "OrganSet",
    "PreparedScan",
    "Volume",
    "build_text_model",
    "caption_hash",
    "check_same_grid",
    "compose_caption",
    "contrastive_targets",
    "decode_volume",
    "encode_array",
    "encode_captions",
    "is_abnormal_caption",
    "find_series",
    "load_organ_set",
    "normal_caption",
    "organ_contrastive_loss",
    "organ_label_table",
    "prepare_published_scan",
    "prepare_scan",
    "read_dicom",
    "read_mask",
    "read_nifti",
    "read_nifti_mask",
    "read_structures",
    "read_volume",
    "save_for_hub",
    "strip_normal_prefix",
]

# For the Auto classes in this process ...
AutoConfig.register("fvlm", FVLMConfig, exist_ok=True)
AutoConfig.register("fvlm_vision_model", FVLMVisionConfig, exist_ok=True)
AutoModel.register(FVLMConfig, FVLMModel, exist_ok=True)
AutoModel.register(FVLMVisionConfig, FVLMVisionModel, exist_ok=True)
# The backend's name is a formality (ours is numpy), but it must be one of the library's two.
AutoImageProcessor.register(FVLMConfig, image_processor_classes={"pil": FVLMImageProcessor}, exist_ok=True)
AutoProcessor.register(FVLMConfig, FVLMProcessor, exist_ok=True)
if "ct-zero-shot" not in PIPELINE_REGISTRY.supported_tasks:
    PIPELINE_REGISTRY.register_pipeline(
        "ct-zero-shot", pipeline_class=FVLMZeroShotPipeline, pt_model=AutoModel, type="multimodal"
    )
# ... and for saving: these classes write `auto_map` and their code beside the weights.
FVLMConfig.register_for_auto_class()
FVLMModel.register_for_auto_class("AutoModel")
FVLMImageProcessor.register_for_auto_class()
FVLMProcessor.register_for_auto_class()
