"""The gradient cache against the whole contrast in one graph: same loss, same gradients, whatever the chunks."""

import contextlib

import pytest
import torch
from tiny_training import tiny_rows, tiny_trainer
from transformers import TrainerCallback

from training_fvlm.arguments import FVLMTrainingArguments, SettingsError
from training_fvlm.contrast_batches import ContrastBatches, num_held_chunks
from training_fvlm.data import EpochSampler
from training_fvlm.embed import Embedded, embed, model_inputs, text_embeddings
from training_fvlm.gradient_cache import GradientCache, seed_of

CONTRAST = 8
FIXED = {"train_sampling_strategy": "sequential", "is_random": False, "max_grad_norm": 0.0, "learning_rate": 0.0}
VOLUME_GB = 8 * 16 * 32 * 2 / 1e9  # of the tiny crop, a little less than a patient takes


class Gradients(TrainerCallback):
    """Keeps the gradients before every optimizer step."""

    def __init__(self):
        self.of_steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = ((name.removeprefix("module."), weight) for name, weight in model.named_parameters())
        self.of_steps.append({name: weight.grad.clone() for name, weight in named if weight.grad is not None})


def train(folder, rows=None, **settings) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Losses and gradients of the steps of a run that does not change its weights."""
    gradients = Gradients()
    trainer = tiny_trainer(folder, rows or tiny_rows(16), callbacks=[gradients], **(FIXED | settings))
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == len(gradients.of_steps) > 0
    return losses, gradients.of_steps


def assert_same(one, other, rtol=1e-5):
    """Same losses, and same gradients of the same weights, within `rtol` of each gradient's largest entry."""
    losses, gradients = one
    other_losses, other_gradients = other
    assert losses == pytest.approx(other_losses, rel=rtol)
    assert len(gradients) == len(other_gradients)
    for step, (mine, theirs) in enumerate(zip(gradients, other_gradients)):
        assert mine.keys() == theirs.keys() and "temperature.value" in mine
        assert sum(bool(gradient.any()) for gradient in theirs.values()) > 20, "empty gradients would agree as well"
        for name, gradient in theirs.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(
                mine[name],
                gradient,
                rtol=rtol,
                atol=rtol * scale + 1e-8,
                msg=lambda text, where=f"step {step}, {name}": f"{where}: {text}",
            )


@pytest.mark.parametrize("held", [0, 4.5, 100], ids=["none held", "some held", "all held"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_have_the_gradient_of_the_whole_contrast(tmp_path, chunk, held):
    whole = train(tmp_path / "whole", contrastive_batch_size=CONTRAST, per_device_train_batch_size=CONTRAST)
    cached = train(
        tmp_path / "cached", contrastive_batch_size=CONTRAST, micro_batch_size=chunk, held_volumes_gb=held * VOLUME_GB
    )
    assert_same(cached, whole)


@pytest.mark.parametrize("extra", [{"activation_checkpointing": True}, {"fields": {"organ_reduction": "sum"}}])
def test_chunks_with_checkpointing_and_sum_have_the_gradient_of_the_whole(tmp_path, extra):
    whole = train(tmp_path / "whole", contrastive_batch_size=CONTRAST, per_device_train_batch_size=CONTRAST, **extra)
    cached = train(tmp_path / "cached", contrastive_batch_size=CONTRAST, micro_batch_size=3, **extra)
    assert_same(cached, whole)


def test_accumulated_contrasts_are_averaged(tmp_path):
    common = {"contrastive_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3, "rows": tiny_rows(13)}
    # 13 rows: three contrasts of four an epoch, so the second step of each epoch accumulates one contrast alone.
    whole = train(tmp_path / "whole", per_device_train_batch_size=4, **common)
    cached = train(tmp_path / "cached", micro_batch_size=3, held_volumes_gb=0, **common)
    assert_same(cached, whole)


def whole_graph(trainer, batches, contrast_number: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients with every chunk in one graph, under the cache's own seeds: slow, and hard to get wrong.

    Texts are encoded in the shares of the cache, for dropout falls on shares; all else is plain autograd.
    """
    model = trainer.model.train()
    model.zero_grad()
    cache = trainer.cache
    images, fixed, index, states = [], [], [], []
    texts = type(cache.texts)()
    place = 0
    for inputs in batches:
        torch.manual_seed(seed_of(trainer.args.seed, contrast_number, place))
        image_inputs = {name: inputs[name] for name in ("volume", "organ_token_mask", "organ_is_complete")}
        outputs = model(**image_inputs, return_loss=False)
        states.append(torch.get_rng_state())
        images.append(outputs.image_embeds)
        is_valid = outputs.organ_is_complete & (inputs["caption_index"] >= 0)
        fixed.append((inputs["caption_hash"], inputs["organ_is_abnormal"].long(), is_valid.long()))
        index.append(texts.add(inputs)["caption_index"])
        place += len(inputs["volume"])
    table = [None] * len(texts.hashes)
    for state, (places, share) in zip(states, texts.cut(len(batches))):
        torch.set_rng_state(state)
        for row, embeds in zip(places.tolist() if places is not None else [], model(**share).text_embeds):
            table[row] = embeds
    live = {"image_embeds": torch.cat(images)}
    live |= text_embeddings(torch.stack(table), {"caption_index": torch.cat(index)})
    names = ("caption_hash", "is_abnormal", "is_valid")
    fixed = {name: torch.cat(parts) for name, parts in zip(names, zip(*fixed))}
    loss = trainer.objective(live, fixed, model.temperature(), step=0, progress=0.0).loss
    loss.backward()
    return float(loss.detach()), {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad
    }


def cached_step(trainer, batches, contrast_number: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the cache for the same batches."""
    trainer.model.train().zero_grad()
    trainer.cache.clear()
    trainer.contrasts_in_step = 1
    total = sum(float(trainer.cache.take(trainer.model, batch, contrast_number)) for batch in batches)
    total += sum(
        float(trainer.cache.take(trainer.model, batch, contrast_number)) for batch in batches[trainer.cache.num_held :]
    )
    named = trainer.model.named_parameters()
    return total, {name: weight.grad.clone() for name, weight in named if weight.requires_grad}


def trainer_and_batches(folder, chunk: int, dropout: float = 0.3, **settings):
    """A trainer whose model drops out everywhere, and the chunks of its first contrast."""
    settings = {"contrastive_batch_size": CONTRAST, "micro_batch_size": chunk, "held_volumes_gb": 0} | settings
    trainer = tiny_trainer(folder, tiny_rows(CONTRAST), dropout=dropout, **(FIXED | settings))
    if trainer.cache is None:  # one chunk is the whole: the trainer takes no cache, the test does
        trainer.cache = trainer._gradient_cache()
    trainer.model_wrapped = trainer.model
    data = trainer.train_dataset
    rows = [data[place] for place in range(CONTRAST)]
    return trainer, [trainer.data_collator(rows[start : start + chunk]) for start in range(0, CONTRAST, chunk)]


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_dropout_is_replayed(tmp_path, chunk):
    trainer, batches = trainer_and_batches(tmp_path, chunk)
    loss, gradients = whole_graph(trainer, batches, contrast_number=5)
    assert_same(([cached_step(trainer, batches, 5)[0]], [cached_step(trainer, batches, 5)[1]]), ([loss], [gradients]))
    other_loss, _ = whole_graph(trainer, batches, contrast_number=6)
    assert abs(other_loss - loss) > 1e-4, "dropout must fall otherwise in another contrast"


def test_without_the_replay_gradients_are_wrong(tmp_path, monkeypatch):
    trainer, batches = trainer_and_batches(tmp_path, 3)
    loss, gradients = whole_graph(trainer, batches, contrast_number=5)
    backward = GradientCache._backward

    def fresh_dropout(self, model, inputs, chunk):
        self.states[chunk] = (self.states[chunk][0] + 1, self.states[chunk][1])
        backward(self, model, inputs, chunk)

    monkeypatch.setattr(GradientCache, "_backward", fresh_dropout)
    cached_loss, wrong = cached_step(trainer, batches, 5)
    assert cached_loss == pytest.approx(loss, rel=1e-5)
    off = [float((wrong[name] - gradients[name]).norm() / gradients[name].norm().clamp(min=1e-9)) for name in gradients]
    assert sorted(off)[len(off) // 2] > 0.05, "half of the gradients should be far off"


def test_bfloat16_stays_within_its_rounding(tmp_path):
    """Both roads compute in bfloat16; they differ by the order of sums: 2 % of each gradient's norm."""
    common = {"contrastive_batch_size": CONTRAST, "bf16": True}
    whole_loss, whole = train(tmp_path / "whole", per_device_train_batch_size=CONTRAST, **common)
    cached_loss, cached = train(tmp_path / "cached", micro_batch_size=3, **common)
    assert cached_loss == pytest.approx(whole_loss, rel=1e-3)
    largest = max(float(gradient.norm()) for gradient in whole[0].values())
    for name, gradient in whole[0].items():
        distance = float((cached[0][name] - gradient).norm())
        assert distance <= 0.02 * float(gradient.norm()) + 1e-3 * largest, name


def test_fixed_seeds_do_not_touch_the_generator_around_them(tmp_path):
    trainer, batches = trainer_and_batches(tmp_path, 3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    cached_step(trainer, batches, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_resumes_to_the_digit_in_the_middle_of_an_epoch(tmp_path):
    settings = {"contrastive_batch_size": 4, "micro_batch_size": 3, "held_volumes_gb": 2 * VOLUME_GB, "dropout": 0.2}
    settings |= {
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 5,
        "gradient_accumulation_steps": 2,
    }
    whole = tiny_trainer(tmp_path, tiny_rows(26), **settings)  # six contrasts, three steps an epoch
    whole.train()
    resumed = tiny_trainer(tmp_path, tiny_rows(26), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    logs = [[line for line in each.state.log_history if "loss" in line] for each in (whole, resumed)]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4, 5]
    assert logs[0] == logs[1]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert whole.args.gradient_accumulation_steps == 2, "the user's number must not be left changed"


def test_an_epoch_is_counted_in_contrasts(tmp_path):
    settings = {"contrastive_batch_size": 4, "micro_batch_size": 1, "max_steps": -1, "num_train_epochs": 2}
    trainer = tiny_trainer(tmp_path, tiny_rows(11), **settings)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.state.epoch == 2
    assert trainer.steps_per_epoch() == 2
    assert trainer.get_total_train_batch_size(trainer.args) == 4


def test_other_rows_in_the_second_pass_are_refused(tmp_path):
    trainer, batches = trainer_and_batches(tmp_path, 3)
    for batch in batches:
        trainer.contrasts_in_step = 1
        trainer.cache.take(trainer.model, batch, 0)
    with pytest.raises(RuntimeError, match="other rows"):
        trainer.cache.take(trainer.model, batches[1], 0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("micro", "held"), [(1, 0), (3, 1), (8, 0)])
def test_ranks_share_the_rows_of_a_contrast(world_size, micro, held):
    order = EpochSampler(19, seed=3)
    batches = [list(ContrastBatches(order, 8, micro, held, world_size, rank)) for rank in range(world_size)]
    per_rank = 8 // world_size
    num_chunks = -(-per_rank // micro)
    held = min(held, num_chunks)
    keys = list(order)
    for rank, of_rank in enumerate(batches):
        assert (
            len(of_rank) == 2 * (2 * num_chunks - held) == len(ContrastBatches(order, 8, micro, held, world_size, rank))
        )
        for contrast in range(2):
            start = 8 * contrast + per_rank * rank
            mine = keys[start : start + per_rank]
            loads = of_rank[contrast * len(of_rank) // 2 : (contrast + 1) * len(of_rank) // 2]
            assert sum(loads[:num_chunks], []) == mine
            assert loads[num_chunks:] == loads[held:num_chunks]


def test_chunks_are_held_while_they_fit():
    assert [num_held_chunks(4, 10, size) for size in (0, 9, 10, 39, 40, 1000)] == [0, 0, 1, 3, 4, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"micro_batch_size": 2}, "is for a --contrastive_batch_size"),
        ({"contrastive_batch_size": 0}, "at least 1"),
        ({"contrastive_batch_size": 1}, "contrasts a patient with nobody"),
        ({"contrastive_batch_size": 4, "micro_batch_size": 0}, "at least 1"),
        ({"contrastive_batch_size": 4, "held_volumes_gb": -1}, "must not be negative"),
    ],
)
def test_impossible_contrasts_are_refused(tmp_path, settings, message):
    with pytest.raises(SettingsError, match=message):
        FVLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_a_contrast_that_fits_takes_no_cache(tmp_path):
    common = {"output_dir": str(tmp_path), "use_cpu": True, "contrastive_batch_size": 8}
    whole = FVLMTrainingArguments(**common, micro_batch_size=8)
    assert not whole.is_cached and whole.per_device_train_batch_size == whole.group_size == 8
    default = FVLMTrainingArguments(**common, per_device_train_batch_size=2)
    assert default.is_cached and default.micro_batch_size == 2 and default.group_size == 8


def test_embed_gives_the_loss_what_it_reads(tmp_path):
    trainer, batches = trainer_and_batches(tmp_path, 8)
    with contextlib.suppress(KeyError):
        assert "caption_hash" not in model_inputs(batches[0])
    embedded = embed(trainer.model.eval(), batches[0])
    assert isinstance(embedded, Embedded)
    assert embedded.live["image_embeds"].shape == embedded.live["text_embeds"].shape == (8, 3, 8)
    assert all(len(tensor) == 8 for tensor in (*embedded.live.values(), *embedded.fixed.values()))
