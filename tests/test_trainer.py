"""FVLMTrainer: its loss, its logs, evaluation, what decays, and a resumed run against an undisturbed one."""

import math

import numpy as np
import pytest
import torch
from tiny_split import ORGANS, tiny_row
from tiny_training import forward_batch, tiny_rows, tiny_trainer
from transformers import TrainerCallback

from modeling_fvlm.loss import organ_contrastive_loss
from training_fvlm.data import caption_rows_of_other_patients
from training_fvlm.durable import LOG_STATES
from training_fvlm.organ_losses import EVAL_FILE, TRAIN_FILE, OrganLossFile

ROWS = tiny_rows(12)


def lines(trainer, key="loss"):
    return [line for line in trainer.state.log_history if key in line]


def losses(trainer):
    """Everything of the log lines but times."""
    return [{name: value for name, value in line.items() if name != "epoch"} for line in lines(trainer)]


class Gradients(TrainerCallback):
    """Keeps the gradients of every step; `of` are those of the first."""

    def __init__(self):
        self.steps = []

    @property
    def of(self):
        return self.steps[0]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_loss_and_gradient_are_those_of_the_models_own_forward(tmp_path, reduction):
    gradients = Gradients()
    rows = tiny_rows(4)
    fields = {"organ_reduction": reduction}
    settings = {"max_steps": 1, "train_sampling_strategy": "sequential", "max_grad_norm": 0, "fields": fields}
    trainer = tiny_trainer(tmp_path, rows, is_random=False, callbacks=[gradients], **settings)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    trainer.model.train()
    output = trainer.model(**forward_batch(batch))
    output.loss.backward()
    expected = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    trainer.train()
    assert output.loss > 0 and output.organ_is_active.any()
    assert lines(trainer)[0]["loss"] == pytest.approx(float(output.loss.detach()), rel=1e-5)
    for organ, loss, is_active in zip(ORGANS, output.organ_losses.tolist(), output.organ_is_active.tolist()):
        assert (f"loss/{organ}" in lines(trainer)[0]) == is_active
        if is_active:
            assert lines(trainer)[0][f"loss/{organ}"] == pytest.approx(loss, abs=1e-5)
    assert gradients.of.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients.of[name], gradient, rtol=1e-4, atol=1e-6, msg=f"gradient of {name}")


def test_every_weight_moves_in_one_step(tmp_path):
    trainer = tiny_trainer(tmp_path, ROWS, max_steps=1, lr_scheduler_type="constant")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    still = [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    assert before and still == []


def test_accumulated_batches_are_averaged(tmp_path):
    accumulated, each = Gradients(), Gradients()
    still = {"learning_rate": 0.0, "max_grad_norm": 0}
    words = {"max_steps": 1, "gradient_accumulation_steps": 3, "callbacks": [accumulated]}
    trainer = tiny_trainer(tmp_path, ROWS, **words, **still)
    trainer.train()
    row = lines(trainer)[0]
    assert row["loss"] < 4 * row["chance"], "a sum over micro-batches would be three times as large"
    single = tiny_trainer(tmp_path, ROWS, max_steps=3, logging_steps=3, callbacks=[each], **still)
    single.train()
    assert row["loss"] == pytest.approx(lines(single)[0]["loss"], rel=1e-5)
    assert len(accumulated.steps) == 1 and len(each.steps) == 3
    for name, gradient in accumulated.of.items():
        mean = sum(step[name] for step in each.steps) / 3
        torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-6, msg=f"gradient of {name}")
    assert any(gradient.abs().max() > 1e-3 for gradient in accumulated.of.values()), "zeros would compare nothing"


def test_a_loss_table_is_cut_at_once(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, ROWS, max_steps=2)
    trainer.train()
    table = OrganLossFile(tmp_path / TRAIN_FILE)
    before = table.path.read_text()

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", killed)
        table.keep_until(1)
    assert table.path.read_text() == before
    table.keep_until(1)
    assert {row.step for row in table.read()} == {1} and not list(tmp_path.glob("*.part"))


def test_activation_checkpointing_changes_nothing(tmp_path):
    plain = tiny_trainer(tmp_path, ROWS, max_steps=3)
    checkpointed = tiny_trainer(tmp_path, ROWS, max_steps=3, activation_checkpointing=True)
    plain.train(), checkpointed.train()
    assert checkpointed.model.is_activation_checkpointing and not plain.model.is_activation_checkpointing
    for one, other in zip(losses(plain), losses(checkpointed), strict=True):
        assert one == pytest.approx(other, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_is_the_undisturbed_one(tmp_path, workers):
    # 12 rows in batches of 4: step 4 is the first of the second epoch, in the middle of its order
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "dataloader_num_workers": workers}
    settings |= {"dropout": 0.1, "warmup_steps": 0.2, "lr_scheduler_type": "cosine"}
    whole = tiny_trainer(tmp_path / "run", ROWS, **settings)
    whole.train()
    table = (tmp_path / "run" / TRAIN_FILE).read_text()
    resumed = tiny_trainer(tmp_path / "run", ROWS, **settings)
    with torch.no_grad():  # what the checkpoint does not bring back would show
        for parameter in resumed.model.parameters():
            parameter.fill_(0.5)
    torch.rand(3), np.random.rand(3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert len(losses(whole)) == 8 and losses(whole)[4] != losses(whole)[3]
    assert losses(resumed) == losses(whole)
    weights = resumed.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in whole.model.state_dict().items())
    assert (tmp_path / "run" / TRAIN_FILE).read_text() == table, "steps 5 to 8 stand in the table once"


def test_a_run_of_an_earlier_version_is_continued(tmp_path):
    """Its checkpoint has no state of the log lines, and its table fewer columns."""
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "logging_steps": 2, "alarm_steps": 2}
    whole = tiny_trainer(tmp_path / "run", ROWS, **settings)
    whole.train()
    table = OrganLossFile(tmp_path / "run" / TRAIN_FILE)
    rows = table.read()
    lines_of_old = [",".join(line.split(",")[:7]) for line in table.path.read_text().splitlines()]
    table.path.write_text("\n".join(lines_of_old) + "\n")
    checkpoint = tmp_path / "run" / "checkpoint-4"
    gone = [path for name in LOG_STATES for path in checkpoint.glob(f"*{name}*")]
    assert len(gone) >= 4
    for path in gone:
        path.unlink()
    resumed = tiny_trainer(tmp_path / "run", ROWS, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    again = table.read()
    assert [(row.step, row.organ, row.active) for row in again] == [(row.step, row.organ, row.active) for row in rows]
    assert all(math.isnan(row.batches) == (row.step <= 4) for row in again)
    assert repr(again[-3:]) == repr(rows[-3:])


def test_crops_and_order_change_from_epoch_to_epoch(tmp_path):
    seen = []

    def spy(rows):
        seen.extend((row["epoch"], row["row"]) for row in rows)
        return collate(rows)

    trainer = tiny_trainer(tmp_path, ROWS, max_steps=6)
    collate, trainer.data_collator = trainer.data_collator, spy
    trainer.train()
    first, second = seen[:12], seen[12:24]
    assert sorted(first) == [(0, row) for row in range(12)] and sorted(second) == [(1, row) for row in range(12)]
    assert [row for _, row in first] != [row for _, row in second]


def test_what_decays(tmp_path):
    trainer = tiny_trainer(tmp_path, ROWS, weight_decay=0.1)
    decaying = set(trainer.get_decay_parameter_names(trainer.model))
    names = {name for name, _ in trainer.model.named_parameters()}
    spared = names - decaying
    assert "temperature.value" in spared and "vision_model.embeddings.position_embeddings" in spared
    assert "text_model.embeddings.position_embeddings.weight" in spared
    assert {name for name in names if "norm" in name.lower() or name.endswith("bias")} <= spared
    assert {
        "organ_projection.weight_0",
        "text_projection.weight",
        "vision_model.blocks.0.mlp.linear1.weight",
    } <= decaying
    everywhere = tiny_trainer(tmp_path, ROWS, weight_decay_everywhere=True)
    assert set(everywhere.get_decay_parameter_names(everywhere.model)) == names


def test_log_lines_and_table_say_the_same(tmp_path):
    trainer = tiny_trainer(tmp_path, ROWS, max_steps=4, logging_steps=2)
    trainer.train()
    rows = OrganLossFile(tmp_path / TRAIN_FILE).read()
    assert [(row.step, row.organ) for row in rows] == [(step, organ) for step in (2, 4) for organ in ORGANS]
    for line in lines(trainer):
        assert -1 <= line["text_cosine"] <= 1 and 0.001 <= line["temperature"] <= 0.5 and line["group_size"] == 4
        for row in rows:
            if row.step == line["step"] and row.active:
                assert line[f"loss/{row.organ}"] == pytest.approx(row.loss, abs=1e-4)
                assert math.log(2) - 1e-6 <= row.chance <= math.log(4) + 1e-6
                assert 0 <= row.floor < row.chance


@pytest.mark.parametrize("max_norm", [0.0, 1e-3])
def test_gradient_norms_of_the_towers_are_those_before_clipping(tmp_path, max_norm):
    plain = Gradients()
    still = {"max_steps": 3, "logging_steps": 3, "learning_rate": 0.0}
    tiny_trainer(tmp_path / "plain", ROWS, callbacks=[plain], max_grad_norm=0.0, **still).train()
    trainer = tiny_trainer(tmp_path / "run", ROWS, max_grad_norm=max_norm, **still)
    trainer.train()
    parts = {
        "vision": "vision_model.",
        "text": "text_model.",
        "pooling": "organ_pooling.",
        "temperature": "temperature.",
    }
    line = lines(trainer)[0]
    for tower, prefix in parts.items():
        squares = [
            sum(float(g.square().sum()) for name, g in step.items() if name.startswith(prefix)) for step in plain.steps
        ]
        assert line[f"grad_norm/{tower}"] == pytest.approx(math.sqrt(np.mean(squares)), rel=1e-4)
        assert max(squares) > 0
    everything = [sum(float(g.square().sum()) for g in step.values()) for step in plain.steps]
    towers = [value for name, value in line.items() if name.startswith("grad_norm/")]
    assert len(towers) == 5 and sum(value**2 for value in towers) == pytest.approx(np.mean(everything), rel=1e-4)


def test_evaluation_contrasts_all_rows_in_groups_of_the_training_batch(tmp_path):
    rows = tiny_rows(11, seed=5)
    trainer = tiny_trainer(tmp_path, ROWS, eval_rows=rows)
    trainer.train()
    metrics = trainer.evaluate()
    # By hand: embed one row at a time, contrast 2 groups of 4 of the fixed order, leave 3 rows out.
    model = trainer.model.eval()
    embedded = []
    with torch.no_grad():
        for index in range(len(rows)):
            batch = trainer.eval_collator([trainer.eval_dataset[index]])
            output = model(**forward_batch(batch), return_loss=False)
            captions = output.text_embeds[batch["caption_index"].clamp(min=0)]
            valid = output.organ_is_complete & (batch["caption_index"] >= 0)
            identity = (batch["caption_hash"], batch["organ_is_abnormal"], valid)
            embedded.append((output.image_embeds, captions, *identity))
        everything = [torch.cat(parts) for parts in zip(*embedded)]
        order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
        expected, sums, active = [], torch.zeros(3), torch.zeros(3)
        for group in (order[:4], order[4:8]):
            result = organ_contrastive_loss(*(part[group] for part in everything), output.logit_scale, "mean")
            expected.append(float(result.loss))
            sums, active = sums + result.organ_losses, active + result.organ_is_active
    assert metrics["eval_loss"] == pytest.approx(sum(expected) / 2, rel=1e-4)
    for organ, total, count in zip(ORGANS, sums, active):
        assert count > 0
        assert metrics[f"eval_loss/{organ}"] == pytest.approx(float(total / count), abs=1e-4)
    found = [row for row in OrganLossFile(tmp_path / EVAL_FILE).read() if row.step == 2]
    for place, row in enumerate(found):
        hits, guesses = [], []
        for group in (order[:4], order[4:8]):
            image, text, ids, is_abnormal, is_valid = (part[group][:, place] for part in everything)
            asked = [i for i in range(4) if is_valid[i]]
            positives = [
                [bool(ids[i] == ids[j] or not (is_abnormal[i] or is_abnormal[j])) for j in asked] for i in asked
            ]
            if all(map(all, positives)):
                continue
            hits += [row[int((text[asked] @ image[i]).argmax())] for row, i in zip(positives, asked)]
            guesses += [np.mean(row) for row in positives]
        assert row.retrieval == pytest.approx(np.mean(hits)) and row.retrieval_chance == pytest.approx(np.mean(guesses))
        assert metrics[f"eval_retrieval_at_1/{row.organ}"] == pytest.approx(row.retrieval, abs=1e-5)
    assert metrics["eval_retrieval_at_1"] == pytest.approx(np.mean([row.retrieval for row in found]))
    assert metrics["eval_retrieval_at_1_chance"] == pytest.approx(np.mean([row.retrieval_chance for row in found]))
    trainer.args.per_device_eval_batch_size = 5
    again = trainer.evaluate()
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5), "the evaluation batch must not matter"
    assert {row.organ for row in OrganLossFile(tmp_path / EVAL_FILE).read()} == set(ORGANS)


def test_evaluation_during_training_adds_zero_shot_scores_and_disturbs_nothing(tmp_path):
    calls = []

    def zero_shot(model):
        calls.append(model.training)
        model.eval()
        return {"tiny_macro_auc": 0.5}

    settings = {"max_steps": 4, "dropout": 0.1}
    plain = tiny_trainer(tmp_path / "a", ROWS, **settings)
    plain.train()
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "eval_rows": tiny_rows(5, seed=3), "zero_shot": zero_shot}
    evaluated = tiny_trainer(tmp_path / "b", ROWS, **settings, **evaluating)
    evaluated.train()
    assert calls == [False] * 4
    assert [line["eval_tiny_macro_auc"] for line in lines(evaluated, "eval_loss")] == [0.5] * 4
    assert losses(evaluated) == losses(plain)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    trainer = tiny_trainer(tmp_path, ROWS, max_steps=3)
    with torch.no_grad():
        trainer.model.organ_projection.weight_0.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        trainer.train()


def test_a_batch_with_nothing_to_contrast_is_a_step_without_gradient(tmp_path):
    cut = [tiny_row(number, cut=True) for number in range(4)]
    for row in cut:
        row["captions"] = [entry for entry in row["captions"] if entry["organ"] == "lung"]
    gradients = Gradients()
    trainer = tiny_trainer(tmp_path, cut, max_steps=1, is_random=False, callbacks=[gradients])
    trainer.train()
    assert lines(trainer)[0]["loss"] == 0 and lines(trainer)[0]["active_organs"] == 0
    assert gradients.of and not any(gradient.any() for gradient in gradients.of.values())


def test_captions_are_learned_and_shuffled_ones_are_not(tmp_path):
    rows, held_out = tiny_rows(48), tiny_rows(32, seed=9)
    settings = {"max_steps": 60, "per_device_train_batch_size": 8, "logging_steps": 60, "learning_rate": 1e-2}
    settings |= {"lr_scheduler_type": "cosine", "eval_rows": held_out, "is_random": False, "max_grad_norm": 1.0}
    own = tiny_trainer(tmp_path / "own", rows, **settings)
    own.train()
    shuffled_captions = caption_rows_of_other_patients([row["patient_id"] for row in rows], seed=0)
    control = tiny_trainer(tmp_path / "control", rows, caption_rows=shuffled_captions, **settings)
    control.train()
    learned, chance = own.evaluate(), control.evaluate()
    middle = (learned["eval_chance"] + learned["eval_floor"]) / 2
    assert learned["eval_loss"] < middle, "own captions: well below chance on other patients"
    assert chance["eval_loss"] > chance["eval_chance"] - 0.1, "shuffled captions: nothing to learn"


def test_saved_folders_hold_no_pickle_of_the_arguments(tmp_path):
    trainer = tiny_trainer(tmp_path, ROWS, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file() and (tmp_path / "tokenizer.json").is_file()
    assert not list(tmp_path.rglob("training_args.bin"))
