"""A saved model with its processor, as every command of the evaluation loads it."""

from pathlib import Path

from transformers import PreTrainedModel

from evaluation_fvlm.errors import EvaluationError
from modeling_fvlm.modeling_fvlm import load_whole_model
from modeling_fvlm.processing_fvlm import FVLMProcessor


def load_model(path: str, revision: str | None = None, device: str = "cpu") -> tuple[PreTrainedModel, FVLMProcessor]:
    """A saved model in evaluation mode on its device, and its processor.

    Weights are float32 however they were saved, else a bfloat16 checkpoint would be scored in bfloat16 under the name
    of float32; `eval_fvlm.py --dtype` casts from there.

    Raises:
        EvaluationError: If there is no model, or its weights are not those of its config: what is missing would be
            filled with random numbers.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise EvaluationError(
            f"{path} holds no config.json: it is no saved model. Give the folder that training wrote."
        )
    try:
        model = load_whole_model(path, revision=revision or "main")
        processor = FVLMProcessor.from_pretrained(path, revision=revision or "main")
    except OSError as error:
        raise EvaluationError(f"--model {path} cannot be loaded: {error}") from error
    except ValueError as error:
        raise EvaluationError(f"--model {path}: {error}") from error
    return model.eval().to(device), processor
