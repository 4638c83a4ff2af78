"""fVLM: what ships to the Hub beside the weights.

    model = FVLMModel.from_pretrained(folder)        # or AutoModel: no trust_remote_code needed once fVLM is registered
    processor = FVLMProcessor.from_pretrained(folder)

A name is imported when it is first asked for: the workers of a data builder take geometry and readers from this
package, and need neither PyTorch nor transformers. So the Auto classes learn of fVLM

- when this package is imported, if transformers is imported already;
- else when the first name is taken from this package that needs transformers (`from modeling_fvlm import FVLMModel`),
  or any name once transformers is imported.

With `import modeling_fvlm` before `from transformers import AutoModel`, and nothing taken from here, they do not.

A folder written by `save_for_hub` carries this package's files, so it also loads where none of this is installed
(`trust_remote_code=True`). Only this file is not copied: what it registers, the copied config.json says in `auto_map`.
"""

import sys
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors; tests/test_lean_imports.py keeps the three lists in step
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

_NAMES = {
    "captions": (
        "NORMAL_CAPTION",
        "caption_hash",
        "compose_caption",
        "encode_captions",
        "is_abnormal_caption",
        "normal_caption",
        "strip_normal_prefix",
    ),
    "configuration_fvlm": ("FVLMConfig", "FVLMVisionConfig"),
    "dicom": ("DicomSeries", "find_series", "read_dicom"),
    "geometry": ("AIR_HU", "BadVolumeError"),
    "image_processing_fvlm": ("FVLMImageProcessor",),
    "loss": ("OrganLoss", "contrastive_targets", "organ_contrastive_loss"),
    "modeling_fvlm": ("FVLMModel", "FVLMOrganFeatures", "FVLMOutput", "FVLMPreTrainedModel", "build_text_model"),
    "organs": (
        "NUMBERINGS",
        "TOTALSEGMENTATOR_V1",
        "TOTALSEGMENTATOR_V2",
        "OrganSet",
        "load_organ_set",
        "organ_label_table",
    ),
    "pipeline_fvlm": ("FVLMZeroShotPipeline", "save_for_hub"),
    "pooling": ("OrganPooling", "OrganProjection"),
    "preparation": ("PreparedScan", "prepare_scan"),
    "processed_split": ("decode_volume", "encode_array"),
    "processing_fvlm": ("FVLMProcessor",),
    "published_preparation": ("prepare_published_scan",),
    "reading": (
        "Volume",
        "check_same_grid",
        "read_mask",
        "read_nifti",
        "read_nifti_mask",
        "read_structures",
        "read_volume",
    ),
    "vision": ("FVLMVisionModel", "FVLMVisionOutput"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str):
    """A name of `__all__`, or a module of this package, imported now."""
    if name in _NAMES:
        value = import_module(f".{name}", __name__)
    elif name in _MODULE_OF:
        value = globals()[name] = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _has_transformers():
        _register()
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _has_transformers() -> bool:
    """Whether transformers is imported to its end: while another thread is at it, its classes are not there yet."""
    module = sys.modules.get("transformers")
    return module is not None and not getattr(module.__spec__, "_initializing", False)


@cache
def _register() -> None:
    """Make fVLM known to the Auto classes and the pipelines of this process, once."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
    from transformers.pipelines import PIPELINE_REGISTRY

    from .configuration_fvlm import FVLMConfig, FVLMVisionConfig
    from .image_processing_fvlm import FVLMImageProcessor
    from .modeling_fvlm import FVLMModel
    from .pipeline_fvlm import TASK, FVLMZeroShotPipeline
    from .processing_fvlm import FVLMProcessor
    from .vision import FVLMVisionModel

    AutoConfig.register("fvlm", FVLMConfig, exist_ok=True)
    AutoConfig.register("fvlm_vision_model", FVLMVisionConfig, exist_ok=True)
    AutoModel.register(FVLMConfig, FVLMModel, exist_ok=True)
    AutoModel.register(FVLMVisionConfig, FVLMVisionModel, exist_ok=True)
    # The backend's name is a formality (ours is numpy), but it must be one of the library's two.
    AutoImageProcessor.register(FVLMConfig, image_processor_classes={"pil": FVLMImageProcessor}, exist_ok=True)
    AutoProcessor.register(FVLMConfig, FVLMProcessor, exist_ok=True)
    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=FVLMZeroShotPipeline, pt_model=AutoModel, type="multimodal"
        )


if _has_transformers():
    _register()
