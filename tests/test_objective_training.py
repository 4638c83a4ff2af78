"""Every part of the objective in real trainings of a few steps: plain and cached alike, and resumed to the digit."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_split import FINDINGS, ORGANS
from tiny_training import tiny_rows, tiny_trainer
from transformers import TrainerCallback

from training_fvlm.broken_steps import BrokenStep
from training_fvlm.embed import embed
from training_fvlm.label_task import LabelTask


def rows_with_shared_findings(count):
    """The first finding of an organ is in all its abnormal patients: labels say more than equal captions do."""
    rows = tiny_rows(count)
    for row in rows:
        is_abnormal = {entry["organ"]: entry["is_abnormal"] for entry in row["captions"]}
        for entry in row["labels"][::2]:
            entry["value"] = int(is_abnormal[entry["finding"].split()[0]])
    return rows


ROWS = rows_with_shared_findings(16)
NAMES = tuple(f"{organ} {name}".rstrip(".") for organ in ORGANS for name in FINDINGS[organ])
LABEL_TASK = LabelTask(NAMES, torch.tensor([[name.startswith(organ) for name in NAMES] for organ in ORGANS]))
# name -> arguments, `fields` being those of the model's config
KINDS = {
    "published": {},
    "momentum": {"targets": ["momentum"], "teacher_momentum": 0.5},
    "labels": {"targets": ["labels"], "label_task": "given"},
    "label smoothing": {"organ_label_smoothing": ["0.05", "aorta=0.2"]},
    "global attention": {"fields": {"volume_pooling": "attention"}, "global_weight": 0.5},
    "global mean, warmup": {"fields": {"volume_pooling": "mean"}, "global_schedule": "warmup", "global_warmup": 0.5},
    "global alternate": {"fields": {"volume_pooling": "attention"}, "global_schedule": "alternate"},
    "sum": {"fields": {"organ_reduction": "sum"}},
    "uncertainty": {"fields": {"organ_reduction": "uncertainty"}},
    "dwa": {"fields": {"organ_reduction": "dwa"}, "dwa_window": 1},
    "balanced sampling": {"organ_sampling": "balanced"},
    "curriculum by frequency": {"curriculum": "frequency", "curriculum_start": 0.3, "curriculum_end": 0.9},
    "curriculum by difficulty": {"curriculum": "difficulty", "curriculum_probe": 0.3, "curriculum_end": 0.9},
    "token dropout": {"organ_token_dropout": ["0.5"]},
    "co-teaching": {"targets": ["co_teaching"]},
}
KINDS["everything"] = {
    "targets": ["momentum", "labels", "co_teaching"],
    **{
        name: value
        for kind in list(KINDS.values())
        for name, value in kind.items()
        if name not in ("fields", "targets")
    },
    "fields": {"organ_reduction": "dwa", "volume_pooling": "attention", "max_report_length": 20},
}
CACHED = {"contrastive_batch_size": 8, "micro_batch_size": 3}


class Gradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def trained(folder, kind, *, callbacks=(), **arguments):
    """A trainer that has trained by a kind of objective."""
    settings = {"max_steps": 3, "per_device_train_batch_size": 8, "max_grad_norm": 0, "report_to": []}
    trainer = tiny_trainer(
        folder, ROWS, finding_task=LABEL_TASK, callbacks=list(callbacks), **{**settings, **KINDS[kind], **arguments}
    )
    trainer.train(resume_from_checkpoint=arguments.get("resume_from_checkpoint"))
    return trainer


def losses(trainer):
    return [{n: v for n, v in line.items() if n != "epoch"} for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Log lines of a run without any of it."""
    return losses(trained(tmp_path_factory.mktemp("published"), "published"))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_the_objective_and_cached_is_whole(tmp_path, published, kind):
    """Three chunks of a contrast have its loss and its gradient, and every weight has one in every step."""
    gradients = Gradients(), Gradients()
    whole = trained(tmp_path / "whole", kind, callbacks=[gradients[0]])
    cached = trained(tmp_path / "cached", kind, callbacks=[gradients[1]], **CACHED)
    assert cached.cache is not None and whole.cache is None
    for one, other in zip(losses(whole), losses(cached), strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)
    names = {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
    for one, other in zip(*(each.steps for each in gradients), strict=True):
        assert one.keys() == other.keys() == names
        for name, gradient in one.items():
            assert gradient.isfinite().all()
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.norm()) + 1e-7)
    assert any(gradient.any() for gradient in gradients[0].steps[-1].values())
    is_same = [one["loss"] == pytest.approx(other["loss"], rel=1e-6) for one, other in zip(losses(whole), published)]
    assert all(is_same) == (kind == "published")


def states_of(trainer):
    """Everything that a run moves, by name."""
    states = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    if trainer.teachers.momentum is not None:
        states |= {f"teacher.{name}": value for name, value in trainer.teachers.momentum.state_dict().items()}
    return states if trainer.peer is None else states | {f"peer.{n}": v for n, v in states_of(trainer.peer).items()}


RESUMED = [("everything", {}), ("everything", CACHED), ("balanced sampling", {}), ("co-teaching", {})]
RESUMED += [
    pytest.param(kind, cache, marks=pytest.mark.slow)
    for kind in ("momentum", "dwa", "curriculum by difficulty", "global alternate", "co-teaching")
    for cache in ({}, CACHED)
]


@pytest.mark.parametrize("kind, cache", RESUMED)
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, kind, cache):
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "dropout": 0.1, **cache}
    settings |= {"save_total_limit": None}
    whole = trained(tmp_path / "run", kind, **settings)
    for step in (3, 6):  # the middle of an epoch, and its end
        checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
        resumed = trained(tmp_path / "run", kind, **settings, resume_from_checkpoint=checkpoint)
        assert losses(resumed) == losses(whole)
        theirs = states_of(resumed)
        for name, value in states_of(whole).items():
            assert torch.equal(value, theirs[name]), name
        assert resumed.objective.state_dict() == whole.objective.state_dict()


def test_two_peers_differ_and_the_first_one_is_the_runs(tmp_path):
    trainer = trained(tmp_path, "co-teaching", save_strategy="steps", save_steps=3, max_steps=3)
    first, second = trainer.model.state_dict(), trainer.peer.model.state_dict()
    assert trainer.peer.state.global_step == 3
    assert not torch.equal(first["text_projection.weight"], second["text_projection.weight"])
    assert list(trainer.train_sampler) != list(trainer.peer.train_sampler)
    checkpoint = tmp_path / "checkpoint-3"
    saved = {name: load_file(checkpoint / name / "model.safetensors") for name in (".", "peer")}
    assert all(torch.equal(saved["."][name], tensor) for name, tensor in first.items())
    assert all(torch.equal(saved["peer"][name], tensor) for name, tensor in second.items())
    assert all("peer_loss" in line for line in losses(trainer))
    trainer.save_model()
    assert not (tmp_path / "peer").exists()


def test_the_peer_keeps_as_few_activations_as_the_first(tmp_path):
    trainer = trained(tmp_path, "co-teaching", max_steps=1, activation_checkpointing=True)
    assert trainer.model.is_activation_checkpointing and trainer.peer.model.is_activation_checkpointing


def test_a_broken_peer_is_in_no_checkpoint(tmp_path, monkeypatch):
    """Also on a GPU, where a step is looked at later than it is done."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "logging_steps": 4, **KINDS["co-teaching"]}
    trainer = tiny_trainer(tmp_path, ROWS, per_device_train_batch_size=8, **settings)

    class Arrived:
        def synchronize(self):
            pass

    end_step = trainer.peer.watch.end_step

    def later(number, loss, gradient_norm):
        end_step(number, loss * float("nan") if number == 2 else loss, gradient_norm)
        trainer.peer.watch._steps[-1].arrived = Arrived()

    monkeypatch.setattr(trainer.peer.watch, "end_step", later)
    with pytest.raises(BrokenStep, match="of the second model of --targets co_teaching.* is nan at step 2"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]


def test_peers_are_taught_by_each_other(tmp_path, monkeypatch):
    """Each gets what the other says of its own batch, without dropout, and goes on training."""
    settings = {"max_steps": 1, "per_device_train_batch_size": 8, **KINDS["co-teaching"]}
    trainer = tiny_trainer(tmp_path, ROWS, dropout=0.5, **settings)
    said = []
    original = type(trainer.objective).targets

    def spy(self, fixed, logit_scale):
        said.append((self, fixed))
        return original(self, fixed, logit_scale)

    monkeypatch.setattr(type(trainer.objective), "targets", spy)
    peer_before = copy.deepcopy(trainer.peer.model)
    trainer.train()
    assert [objective for objective, _ in said] == [trainer.objective, trainer.peer.objective]
    for (_, fixed), teacher, collator in (
        (said[0], peer_before, trainer.data_collator),
        (said[1], trainer.model, trainer.peer.data_collator),  # after its step
    ):
        batch = collator([trainer.train_dataset[(0, row)] for row in fixed["row"].tolist()])
        with torch.no_grad():
            expected = embed(teacher.eval(), batch)
        torch.testing.assert_close(fixed["teacher_image_embeds"], expected.live["image_embeds"])
        torch.testing.assert_close(fixed["teacher_text_embeds"], expected.live["text_embeds"])
        assert fixed["teacher_logit_scale"].tolist() == pytest.approx([float(expected.parameters["logit_scale"])] * 8)


def test_the_teacher_follows_and_is_in_no_final_folder(tmp_path):
    trainer = trained(tmp_path, "momentum", save_strategy="steps", save_steps=3)
    teacher, model = trainer.teachers.momentum.state_dict(), trainer.model.state_dict()
    assert all(not torch.equal(teacher[name], model[name]) for name in ("text_projection.weight",))
    assert list((tmp_path / "checkpoint-3").glob("state_teacher.*"))
    trainer.save_model()
    assert not list(tmp_path.glob("*teacher*"))
    assert not any("teacher" in name for name in model)


def test_terms_of_the_objective_are_logged_as_means(tmp_path):
    lines = losses(trained(tmp_path, "everything", max_steps=4, logging_steps=2))
    assert len(lines) == 2
    for line in lines:
        assert 0 < line["global_loss"] < 4 and 0 < line["global_chance"] <= 2.08
        assert {f"weight/{organ}" for organ in ORGANS} <= set(line)


def test_learned_variances_do_not_decay(tmp_path):
    trainer = trained(tmp_path, "uncertainty", weight_decay=0.1)
    assert "organ_variances.log_variances" not in trainer.get_decay_parameter_names(trainer.model)
    assert trainer.model.organ_variances.log_variances.any()


def test_captions_of_the_control_bring_their_reports_and_labels(tmp_path):
    settings = KINDS["everything"] | {"max_steps": 1}
    source = [(number + 1) % 16 for number in range(16)]
    caption_rows = np.array(source)
    trainer = tiny_trainer(tmp_path, ROWS, finding_task=LABEL_TASK, caption_rows=caption_rows, **settings)
    row = trainer.train_dataset[(0, 3)]
    for name in ("captions", "findings", "labels"):
        assert row[name] == ROWS[4][name] != ROWS[3][name]
    assert bytes(row["volume"]) == ROWS[3]["volume"]


def test_reports_and_labels_reach_the_loss_row_by_row(tmp_path):
    trainer = tiny_trainer(tmp_path, ROWS, finding_task=LABEL_TASK, is_random=False, **KINDS["everything"])
    batch = trainer.data_collator([trainer.train_dataset[(0, number)] for number in (5, 2)])
    for place, number in enumerate((5, 2)):
        values = {entry["finding"]: entry["value"] for entry in ROWS[number]["labels"]}
        assert batch["labels"][place].tolist() == [values[name] for name in NAMES]
        index = batch["report_index"][place]
        text = trainer.data_collator.tokenizer.decode(batch["input_ids"][index], skip_special_tokens=True)
        assert text.replace(" ", "").startswith(ROWS[number]["findings"].lower().replace(" ", "")[:20])
    evaluated = trainer.eval_collator([trainer.train_dataset[(0, 5)]])
    assert not {"labels", "report_index"} & set(evaluated), "nothing of it is evaluated"
