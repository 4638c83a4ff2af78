"""FVLMTrainer against the published optimizer: five steps of golden/optim, and its learning-rate table."""

import json

import pytest
import torch
from golden_training import golden_trainer, load_tiny_train, losses
from safetensors.torch import load_file
from tiny_split import ORGANS, tiny_row
from tiny_training import tiny_rows, tiny_trainer
from transformers import TrainerCallback

from training_fvlm.arguments import SettingsError
from training_fvlm.published_weights import to_published_state_dict
from training_fvlm.schedule import published_learning_rate

PRETRAIN_CT = {"learning_rate": 1e-4, "warmup_start_lr": 1e-6, "min_lr": 1e-6, "warmup_steps": 377}


@pytest.fixture(scope="module")
def golden(shared_dir):
    return load_tiny_train(shared_dir)


@pytest.fixture(scope="module")
def expected(shared_dir):
    folder = shared_dir / "golden" / "optim"
    return json.loads((folder / "outputs.json").read_text()), load_file(folder / "outputs.safetensors")


def differing(trainer, recorder, tensors) -> list[str]:
    """Published names whose values are not the golden's, to 1e-5.

    Left out are the entries whose gradient once was below 1e-7, at most one in fifty: near its epsilon of 1e-8 Adam
    makes steps of rounding errors.
    """
    ours = to_published_state_dict(trainer.model.state_dict())
    assert tensors and tensors.keys() <= ours.keys()
    names = []
    for name, tensor in tensors.items():
        gradients = torch.stack([step[name].abs() for step in recorder.gradients])
        is_firm = (gradients.amin(0) >= 1e-7) | (gradients.amax(0) == 0)
        error = (ours[name] - tensor).abs()
        if error[is_firm].max() > 1e-5 or error.max() > 1e-4 or is_firm.float().mean() < 0.98:
            names.append(name)
    return names


def test_five_steps_are_the_published(golden, expected, tmp_path):
    facts, tensors = expected
    trainer, recorder = golden_trainer(golden, tmp_path)
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert rates == pytest.approx(facts["lr_per_step"], rel=1e-12)
    assert losses(trainer) == pytest.approx(facts["losses_before_each_step"], rel=1e-5)
    assert recorder.temperatures == pytest.approx(facts["temp_after_each_step"], abs=1e-5)
    assert differing(trainer, recorder, tensors) == []
    esophagus = to_published_state_dict(trainer.model.state_dict())["vision_projs.2.weight"]
    assert torch.equal(esophagus, golden.weights["vision_projs.2.weight"]), "no organ, no step"
    moved = [name for name, tensor in tensors.items() if (golden.weights[name] - tensor).abs().max() > 1e-4]
    assert len(moved) == len(tensors) - 1, "weights that hardly move would compare nothing"


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"skip_inactive_organs": False}, "vision_projs.2.weight"),
        ({"weight_decay": 0.05}, "query_tokens"),
        ({"weight_decay_everywhere": False}, "visual_encoder.norm.weight"),
        ({"lr_schedule": "trainer", "lr_scheduler_type": "constant"}, "text_proj.weight"),
        ({"max_grad_norm": 1.0}, "text_encoder.embeddings.LayerNorm.weight"),
        ({"adam_beta2": 0.98}, "attention.in_proj_weight"),
    ],
)
def test_another_optimizer_is_told_apart(golden, expected, tmp_path, wrong, where):
    trainer, recorder = golden_trainer(golden, tmp_path, **wrong)
    trainer.train()
    assert where in differing(trainer, recorder, expected[1])


class Rows(torch.utils.data.Dataset):
    """So many rows that nobody reads."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count


def test_the_schedule_is_the_published_table(expected, tmp_path):
    table = expected[0]["lr_table_of_pretrain_ct_yaml"]["epoch,step"]
    steps_per_epoch = 1001
    settings = {"lr_schedule": "published", "num_train_epochs": 20, "max_steps": -1, **PRETRAIN_CT}
    trainer = tiny_trainer(tmp_path, tiny_rows(4), **settings)
    # 4 patients a batch; three more rows make no batch
    trainer.train_dataset = Rows(4 * steps_per_epoch + 3)
    trainer.create_optimizer_and_scheduler(20 * steps_per_epoch)
    asked = {tuple(map(int, key.split(","))): rate for key, rate in table.items()}
    assert len(asked) == 11 and max(step for _, step in asked) < steps_per_epoch
    compared = 0
    for epoch in range(20):
        for step in range(steps_per_epoch):
            if (epoch, step) in asked:
                rates = [group["lr"] for group in trainer.optimizer.param_groups]
                assert rates == pytest.approx([asked[epoch, step]] * 2, rel=1e-12), (epoch, step)
                compared += 1
            trainer.optimizer._opt_called = True  # or torch warns of a scheduler before its optimizer
            trainer.lr_scheduler.step()
    assert compared == len(asked)


@pytest.mark.parametrize(("rows", "accumulation", "expected_steps"), [(12, 1, 3), (15, 1, 3), (20, 2, 3), (3, 1, 1)])
def test_steps_per_epoch_are_those_the_trainer_makes(tmp_path, rows, accumulation, expected_steps):
    trainer = tiny_trainer(tmp_path, tiny_rows(rows), gradient_accumulation_steps=accumulation)
    assert trainer.steps_per_epoch() == expected_steps
    if rows >= 4:
        assert trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[1] == expected_steps


class Rates(TrainerCallback):
    """The learning rate of every step."""

    def __init__(self):
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_a_resumed_run_keeps_the_schedule(tmp_path):
    settings = {"lr_schedule": "published", "learning_rate": 2e-3, "warmup_steps": 2, "num_train_epochs": 4}
    settings |= {
        "max_steps": -1,
        "save_strategy": "steps",
        "save_steps": 5,
        "save_total_limit": 3,
    }  # 3 steps an epoch: in the middle of one
    rows, whole, resumed = tiny_rows(12), Rates(), Rates()
    first = tiny_trainer(tmp_path, rows, callbacks=[whole], **settings)
    first.train()
    second = tiny_trainer(tmp_path, rows, callbacks=[resumed], **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    schedule = {"steps_per_epoch": 3, "num_epochs": 4, "peak_lr": 2e-3, "min_lr": 1e-6, "warmup_start_lr": 1e-6}
    by_hand = [published_learning_rate(step, **schedule, warmup_steps=2) for step in range(12)]
    assert whole.seen == pytest.approx(by_hand, rel=1e-12) and len(set(by_hand[3:])) == 3
    assert resumed.seen == whole.seen[5:]
    weights = second.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.model.state_dict().items())


def test_the_rate_stays_low_past_the_last_epoch():
    schedule = {"steps_per_epoch": 3, "num_epochs": 4, "peak_lr": 1.0, "min_lr": 0.1, "warmup_start_lr": 0.0}
    rates = [published_learning_rate(step, **schedule, warmup_steps=0) for step in range(18)]
    assert rates[0] == 1.0 and rates[11] > 0.1 and rates[12:] == [pytest.approx(0.1)] * 6


def test_a_warm_up_longer_than_the_first_epoch_is_refused(tmp_path):
    settings = {"lr_schedule": "published", "warmup_steps": 4, "num_train_epochs": 4, "max_steps": -1}
    trainer = tiny_trainer(tmp_path, tiny_rows(12), **settings)
    with pytest.raises(SettingsError, match="--warmup_steps 4 does not end in the first epoch of 3 steps"):
        trainer.train()
    with pytest.raises(SettingsError, match="--min_lr 0.1 must lie in"):
        tiny_trainer(tmp_path, tiny_rows(12), lr_schedule="published", min_lr=0.1)


# The organs that enter: tiny rows whose captions say who is abnormal where.


def rows_with_abnormal(*organs: str) -> list[dict]:
    """Four patients, two of them abnormal in the given organs; every other organ is normal in all."""
    rows = [tiny_row(number) for number in range(4)]
    for number, row in enumerate(rows):
        for entry in row["captions"]:
            is_abnormal = number < 2 and entry["organ"] in organs
            entry["caption"] = "Something is here." if is_abnormal else "Nothing."
            entry["is_abnormal"] = is_abnormal
    return rows


def moved_organs(trainer) -> set[str]:
    """Organs whose projections move in the trainer's run."""
    before = [[each.detach().clone() for each in pair] for pair in trainer.model.organ_projection.organ_parameters()]
    trainer.train()
    after = trainer.model.organ_projection.organ_parameters()
    return {organ for organ, old, new in zip(ORGANS, before, after) if not all(map(torch.equal, old, new))}


SKIP = {"train_sampling_strategy": "sequential", "is_random": False, "weight_decay": 0.1}
SKIP |= {"weight_decay_everywhere": True, "warmup_steps": 0, "lr_scheduler_type": "constant"}


@pytest.mark.parametrize("skips", [True, False])
def test_projections_of_inactive_organs_stay(tmp_path, skips):
    trainer = tiny_trainer(tmp_path, rows_with_abnormal("lung"), max_steps=1, skip_inactive_organs=skips, **SKIP)
    assert moved_organs(trainer) == ({"lung"} if skips else set(ORGANS))


def test_momentum_of_earlier_steps_does_not_move_an_organ_that_left(tmp_path):
    rows = rows_with_abnormal("lung", "heart") + rows_with_abnormal("lung")
    trainer = tiny_trainer(tmp_path, rows, max_steps=2, skip_inactive_organs=True, **SKIP)
    one = tiny_trainer(tmp_path, rows[:4], max_steps=1, skip_inactive_organs=True, **SKIP)
    one.train(), trainer.train()
    heart, heart_after_one = (each.model.organ_projection.weight_1 for each in (trainer, one))
    lung, lung_after_one = (each.model.organ_projection.weight_0 for each in (trainer, one))
    assert torch.equal(heart, heart_after_one) and not torch.equal(lung, lung_after_one)


def test_an_organ_of_any_accumulated_batch_takes_part(tmp_path):
    rows = rows_with_abnormal("lung") + rows_with_abnormal("heart")
    trainer = tiny_trainer(
        tmp_path, rows, max_steps=1, gradient_accumulation_steps=2, skip_inactive_organs=True, **SKIP
    )
    assert moved_organs(trainer) == {"lung", "heart"}


def test_without_any_organ_nothing_moves(tmp_path):
    trainer = tiny_trainer(tmp_path, rows_with_abnormal(), max_steps=1, skip_inactive_organs=True, **SKIP)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_without_any_organ_the_global_contrast_still_teaches(tmp_path):
    fields = {"volume_pooling": "mean"}
    trainer = tiny_trainer(
        tmp_path, rows_with_abnormal(), max_steps=1, skip_inactive_organs=True, fields=fields, **SKIP
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert moved_organs(trainer) == set()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"volume_projection.weight", "text_projection.weight"} <= moved
