"""The published tiny-train model and batch in FVLMTrainer, for tests of published optimizer steps and gradients."""

from pathlib import Path

import torch
from test_published_model import Golden, load_golden
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback

from modeling_fvlm import FVLMModel
from training_fvlm.arguments import FVLMTrainingArguments
from training_fvlm.published_weights import convert_published_state_dict, to_published_state_dict
from training_fvlm.trainer import FVLMTrainer

NUM_PATIENTS = 6
# What golden/optim names: its five steps lie in one epoch of twenty.
PUBLISHED = {
    "lr_schedule": "published",
    "learning_rate": 1e-3,
    "warmup_start_lr": 5e-4,
    "warmup_steps": 3,
    "min_lr": 1e-6,
    "num_train_epochs": 20,
    "max_steps": 5,
    "weight_decay": 0.01,
    "weight_decay_everywhere": True,
    "skip_inactive_organs": True,
    "max_grad_norm": 0.0,
}


class Patients(Dataset):
    """The golden's six patients, over and over."""

    def __init__(self, num_rows: int):
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, key: tuple[int, int]) -> int:
        return key[1] % NUM_PATIENTS


class PatientCollator:
    """The golden's inputs of some patients: with all six in their order, its batch."""

    def __init__(self, inputs: dict[str, Tensor]):
        self.inputs = inputs

    def __call__(self, patients: list[int]) -> dict[str, Tensor]:
        of_texts = ("input_ids", "attention_mask")
        batch = {name: value[patients] for name, value in self.inputs.items() if name not in of_texts}
        index = batch["caption_index"]
        used, numbers = torch.where(index < 0, index.max(), index).unique(return_inverse=True)
        batch["caption_index"] = torch.where(index < 0, index, numbers)
        return batch | {name: self.inputs[name][used] for name in of_texts} | {"row": torch.tensor(patients)}


class StepRecorder(TrainerCallback):
    """Keeps gradients (published names) before each optimizer step and the temperature after it."""

    def __init__(self):
        self.gradients: list[dict[str, Tensor]] = []
        self.temperatures: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = ((name.removeprefix("module."), parameter.grad) for name, parameter in model.named_parameters())
        self.gradients.append(to_published_state_dict({name: grad.clone() for name, grad in named}))

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
        self.temperatures.append(float(named["temperature.value"].detach()))


def load_tiny_train(shared_dir: Path) -> Golden:
    """The golden with all dropouts off: it was made in eval mode, and a trainer trains."""
    golden = load_golden(shared_dir / "golden", "tiny-train")
    for config, names in (
        (golden.config, ("pooling_dropout",)),
        (golden.config.vision_config, ("hidden_dropout", "attention_dropout")),
        (golden.config.text_config, ("hidden_dropout_prob", "attention_probs_dropout_prob")),
    ):
        for name in names:
            setattr(config, name, 0.0)
    return golden


def golden_trainer(golden: Golden, output_dir: Path, *, batch_size: int = NUM_PATIENTS, **arguments):
    """A trainer of the golden's model on its patients, in their order, and the recorder of its steps."""
    model = FVLMModel(golden.config)
    model.load_state_dict(convert_published_state_dict(golden.weights, golden.config), strict=True)
    settings = {"per_device_train_batch_size": batch_size, "train_sampling_strategy": "sequential", "logging_steps": 1}
    settings |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "report_to": "none", **PUBLISHED}
    recorder = StepRecorder()
    trainer = FVLMTrainer(
        model,
        FVLMTrainingArguments(output_dir=str(output_dir), **(settings | arguments)),
        train_dataset=Patients(PUBLISHED["max_steps"] * NUM_PATIENTS),
        train_collator=PatientCollator(golden.inputs),
        callbacks=[recorder],
    )
    return trainer, recorder


def losses(trainer: FVLMTrainer) -> list[float]:
    """Loss before each step."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]
