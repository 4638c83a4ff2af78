"""LoRA, freezing and learning rates of layers: what moves, what does not, and by how much."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from test_gradient_cache import CONTRAST, assert_same, cached_step, train, trainer_and_batches, whole_graph
from test_init_from import description
from tiny_split import ORGANS, TINY_RECIPE, write_tiny_split
from tiny_training import dataset_of, tiny_model, tiny_rows, tiny_trainer
from transformers import AutoConfig, BertConfig, TrainerCallback
from transformers.utils import logging as transformers_logging

import train_fvlm
from modeling_fvlm import FVLMConfig, FVLMModel
from modeling_fvlm.pipeline_fvlm import save_for_hub
from training_fvlm.adapt import (
    adapt_model,
    adapter_state,
    has_adapter,
    learning_rate_scales,
    matching_names,
    merged_state_dict,
    parameter_groups,
    plan_adapting,
    save_adapter,
)
from training_fvlm.arguments import FVLMTrainingArguments, SettingsError, parse_settings
from training_fvlm.build import build_model, outline_model
from training_fvlm.schedule import published_learning_rate
from training_fvlm.start import read_start

ROWS = tiny_rows(16)
BOTH = {"lora": ["vision", "text"], "lora_rank": 3, "lora_alpha": 6}


def arguments(tmp_path, **settings) -> FVLMTrainingArguments:
    return FVLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)


@pytest.fixture
def model():
    return tiny_model(ROWS)[0]


@pytest.fixture
def batch():
    trainer_rows = dataset_of(ROWS)
    from training_fvlm.collator import FVLMCollator

    model, processor = tiny_model(ROWS)
    return FVLMCollator(processor.tokenizer, model.config, is_random=False)([trainer_rows[index] for index in range(6)])


def forward(model, batch) -> torch.Tensor:
    """What a model says of a batch, in one tensor."""
    given = {name: batch[name] for name in ("volume", "organ_token_mask", "organ_is_complete")}
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        output = model(**given, **texts, return_loss=False)
    return torch.cat([output.image_embeds.flatten(), output.text_embeds.flatten(), output.logit_scale[None]])


def shaken(model, std: float = 0.1, names: str = "lora_"):
    """The model with noise on the parameters of that name: fresh adapters add nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if names in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    return model


# Freezing


NAMES = [
    *("text_model.embeddings.word_embeddings.weight", "text_model.norm.bias", "vision_model.norm.weight"),
    *(f"vision_model.blocks.{index}.{part}" for index in range(12) for part in ("norm1.bias", "mlp.linear1.weight")),
    *("organ_projection.weight_0", "temperature.value"),
]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("text_model", NAMES[:2]),
        ("temperature.value", ["temperature.value"]),
        ("vision_model.blocks.1", ["vision_model.blocks.1.norm1.bias", "vision_model.blocks.1.mlp.linear1.weight"]),
        ("vision_model.blocks.9-11.norm1", [f"vision_model.blocks.{index}.norm1.bias" for index in (9, 10, 11)]),
        ("*.bias", [name for name in NAMES if name.endswith(".bias")]),
        ("vision_model.blocks.?.mlp", [f"vision_model.blocks.{index}.mlp.linear1.weight" for index in range(10)]),
        ("vision_model.blocks.3-3", ["vision_model.blocks.3.norm1.bias", "vision_model.blocks.3.mlp.linear1.weight"]),
    ],
)
def test_a_word_of_freeze_means_what_it_names_and_all_below(pattern, expected):
    assert matching_names(pattern, NAMES) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("text_modl", "--freeze text_modl: the model has no 'text_modl'; nearest: 'text_model'"),
        ("vision_model.blocks.0-12", "has no 'vision_model.blocks.12'; vision_model.blocks has 0-11"),
        ("vision_model.blocks.5-3", "the range 5-3 is empty"),
        ("vision_model.block.1", "nearest: 'vision_model.blocks.1"),
        ("text", "has no 'text'"),
    ],
)
def test_a_word_of_freeze_that_means_nothing_is_refused(pattern, message):
    with pytest.raises(SettingsError) as caught:
        matching_names(pattern, NAMES)
    assert message in str(caught.value)


def moved_and_still(trainer) -> tuple[set[str], set[str]]:
    """Parameters that a run moves, and those that stay as they are, bit by bit."""
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    return before.keys() - still, still


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        (["text_model"], ["text_model."]),
        (["vision_model.embeddings", "vision_model.blocks.0"], ["vision_model.embeddings.", "vision_model.blocks.0."]),
        (["vision_model", "organ_pooling", "organ_projection"], ["vision_model.", "organ_"]),
        (["text_model", "text_projection", "vision_model"], ["text_", "vision_model."]),
        (["vision_model", "text_model", "organ_*", "text_projection"], ["vision_model.", "text_", "organ_"]),
    ],
)
@pytest.mark.parametrize("cached", [{}, {"contrastive_batch_size": 8, "micro_batch_size": 3}], ids=["whole", "cached"])
def test_frozen_parameters_stay_bit_by_bit_and_all_others_move(tmp_path, freeze, frozen, cached):
    settings = {"freeze": freeze, "max_steps": 4, "per_device_train_batch_size": 8, "weight_decay": 0.1} | cached
    trainer = tiny_trainer(tmp_path, ROWS, **settings)
    moved, still = moved_and_still(trainer)
    assert still == {name for name in moved | still if name.startswith(tuple(frozen))}
    assert moved and trainer.adaptation.num_trained == sum(
        parameter.numel() for name, parameter in trainer.model.named_parameters() if name in moved
    )


def kept_for_backward(model, batch, part: str) -> tuple[int, int]:
    """Bytes that the forward pass keeps for the backward pass inside a part of the model, and outside it."""
    kept = {True: 0, False: 0}
    inside = [False]
    module = model.get_submodule(part)
    handles = [
        module.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True)),
        module.register_forward_hook(lambda *_: inside.__setitem__(0, False)),
    ]

    def pack(tensor):
        kept[inside[0]] += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**{name: batch[name] for name in ("volume", "organ_token_mask", "organ_is_complete")},
              **{name: batch[name] for name in ("input_ids", "attention_mask")}, return_loss=False)  # fmt: skip
    for handle in handles:
        handle.remove()
    return kept[True], kept[False]


@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_frozen_tower_keeps_nothing_for_the_backward_pass(tmp_path, batch, tower, dropout):
    plain = tiny_model(ROWS, dropout=dropout)[0].train()
    assert kept_for_backward(plain, batch, tower)[0] > 10_000
    model = tiny_model(ROWS, dropout=dropout)[0].train()
    adapt_model(model, arguments(tmp_path, freeze=[tower]))
    inside, outside = kept_for_backward(model, batch, tower)
    assert inside == 0 and outside > 0


def test_frozen_blocks_at_the_bottom_keep_nothing_and_above_a_trained_one_they_do(tmp_path, batch, caplog):
    bottom = tiny_model(ROWS)[0].train()
    adapt_model(bottom, arguments(tmp_path, freeze=["vision_model.embeddings", "vision_model.blocks.0"]))
    assert kept_for_backward(bottom, batch, "vision_model.blocks.0")[0] == 0
    assert "below them" not in caplog.text
    top = tiny_model(ROWS)[0].train()
    with caplog.at_level(logging.WARNING):
        adapt_model(top, arguments(tmp_path, freeze=["vision_model.blocks.0-1"]))
    assert kept_for_backward(top, batch, "vision_model.blocks.0")[0] > 0
    assert "blocks 0, 1 of vision_model are frozen, but embeddings.position_embeddings below them is" in caplog.text


def test_a_frozen_tower_trains_under_activation_checkpointing(tmp_path):
    settings = {"freeze": ["vision_model"], "max_steps": 3, "per_device_train_batch_size": 8}
    plain = tiny_trainer(tmp_path / "a", ROWS, **settings)
    checkpointed = tiny_trainer(tmp_path / "b", ROWS, activation_checkpointing=True, **settings)
    plain.train(), checkpointed.train()
    weights = checkpointed.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain.model.state_dict().items())


# LoRA


@pytest.mark.parametrize(
    ("text", "attention", "mlp"),
    [
        ({"model_type": "bert"}, 4, 2),
        ({"model_type": "roberta"}, 4, 2),
        ({"model_type": "distilbert", "dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 2}, 4, 2),
        ({"model_type": "clip_text_model"}, 4, 2),
        ({"model_type": "modernbert", "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "cls_token_id": 2,
          "sep_token_id": 1}, 2, 2),
        ({"model_type": "electra", "embedding_size": 16}, 4, 2),
    ],
)  # fmt: skip
def test_linear_layers_of_any_text_encoder_are_found(tmp_path, text, attention, mlp):
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 32}
    config = AutoConfig.for_model(**{**sizes, **text})
    with torch.device("meta"):
        model = FVLMModel(FVLMConfig(organs=["lung"], text_config=config.to_dict(), max_text_length=16))
    for targets, per_block in (("attention", attention), ("all", attention + mlp)):
        plan = plan_adapting(model, arguments(tmp_path, lora=["text"], lora_targets=targets))
        assert len(plan.lora_modules) == 2 * per_block, plan.lora_modules
        assert all(name.startswith("text_model.") for name in plan.lora_modules)
        assert not any(name.startswith("text_model.") for name in plan.trained)
    scales = learning_rate_scales(model, arguments(tmp_path, layer_lr_decay=0.5))
    of_text = {name: scale for name, scale in scales.items() if name.startswith("text_model.")}
    assert {0.125, 0.25, 0.5} <= set(of_text.values()) <= {0.125, 0.25, 0.5, 1.0}
    assert all(scale == 0.125 for name, scale in of_text.items() if "embedding" in name and "layer" not in name)


def test_the_image_tower_is_adapted_in_attention_or_everywhere(tmp_path, model):
    attention = plan_adapting(model, arguments(tmp_path, lora=["vision"]))
    assert set(attention.lora_modules) == {
        f"vision_model.blocks.{index}.attention.{name}" for index in (0, 1) for name in ("qkv", "out_proj")
    }
    everywhere = plan_adapting(model, arguments(tmp_path, lora=["vision"], lora_targets="all"))
    more = {f"vision_model.blocks.{index}.mlp.linear{number}" for index in (0, 1) for number in (1, 2)}
    assert set(everywhere.lora_modules) == set(attention.lora_modules) | more
    upper = plan_adapting(model, arguments(tmp_path, lora=["vision"], freeze=["vision_model.blocks.0"]))
    assert {name.split(".")[2] for name in upper.lora_modules} == {"1"}


def test_a_fresh_adapter_changes_nothing(tmp_path, batch, model):
    before = forward(model.eval(), batch)
    adapt_model(model, arguments(tmp_path, **BOTH, lora_targets="all"))
    torch.testing.assert_close(forward(model, batch), before, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(forward(shaken(model), batch), before, atol=1e-3)


@pytest.mark.parametrize("settings", [BOTH, {"lora": ["text"], "lora_targets": "all", "lora_dropout": 0.2}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_adapter_and_what_is_outside_the_towers_move(tmp_path, settings, checkpointing):
    extra = {"freeze": [] if "vision" in settings["lora"] else ["vision_model"]}
    trainer = tiny_trainer(
        tmp_path, ROWS, max_steps=6, per_device_train_batch_size=8, weight_decay=0.1, dropout=0.1,
        activation_checkpointing=checkpointing, **settings, **extra,
    )  # fmt: skip
    moved, still = moved_and_still(trainer)
    outside = {name for name in moved | still if not name.startswith(("vision_model.", "text_model."))}
    adapter = {name for name in moved | still if ".lora_" in name}
    assert moved == outside | adapter and adapter
    assert {name.split(".")[0] for name in adapter} == {f"{tower}_model" for tower in settings["lora"]}
    assert any(name.endswith("base_layer.weight") for name in still) and "temperature.value" in moved
    share = trainer.adaptation
    count = sum(parameter.numel() for name, parameter in trainer.model.named_parameters() if name in moved)
    assert share.num_trained == count and share.num_parameters == sum(
        p.numel() for p in tiny_model(ROWS)[0].parameters()
    )
    assert f"{count:,} parameters are trained, {100 * count / share.num_parameters:.2f} %" in str(share)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_merged_is_unmerged(tmp_path, batch, model, targets):
    plain = tiny_model(ROWS)[0].eval()
    untouched = forward(plain, batch)
    adapt_model(model, arguments(tmp_path, **BOTH, lora_targets=targets))
    expected = forward(shaken(model).eval(), batch)
    plain.load_state_dict(merged_state_dict(model), strict=True)
    torch.testing.assert_close(forward(plain, batch), expected, rtol=1e-5, atol=1e-5)
    assert (untouched - expected).abs().max() > 1e-2, "the adapter must have done something"
    assert has_adapter(model) and torch.equal(forward(model, batch), expected), "the model itself is left alone"


def test_checkpointed_activations_have_the_same_gradients(tmp_path):
    settings = {**BOTH, "lora_targets": "all", "per_device_train_batch_size": 8, "max_steps": 1}
    runs = [train(tmp_path / str(flag), activation_checkpointing=flag, **settings) for flag in (False, True)]
    assert_same(*runs)


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_have_the_gradient_of_the_whole_contrast(tmp_path, monkeypatch, chunk):
    from training_fvlm import trainer as module

    plain = module.adapt_model
    monkeypatch.setattr(module, "adapt_model", lambda model, *rest: (plain(model, *rest), shaken(model))[0])
    whole = train(tmp_path / "w", contrastive_batch_size=CONTRAST, per_device_train_batch_size=CONTRAST, **BOTH)
    cached = train(tmp_path / "c", contrastive_batch_size=CONTRAST, micro_batch_size=chunk, held_volumes_gb=0, **BOTH)
    assert any(".lora_A." in name and gradient.any() for name, gradient in whole[1][0].items())
    assert_same(cached, whole)


def test_the_dropout_of_an_adapter_is_replayed(tmp_path):
    settings = {**BOTH, "lora_targets": "all", "lora_dropout": 0.3}
    trainer, batches = trainer_and_batches(tmp_path, 3, dropout=0.0, **settings)
    shaken(trainer.model)
    assert any("lora_dropout" in name and module.p == 0.3 for name, module in trainer.model.named_modules()
               if isinstance(module, torch.nn.Dropout))  # fmt: skip
    loss, gradients = whole_graph(trainer, batches, contrast_number=5)
    cached_loss, cached = cached_step(trainer, batches, 5)
    assert_same(([cached_loss], [cached]), ([loss], [gradients]))
    assert abs(whole_graph(trainer, batches, contrast_number=6)[0] - loss) > 1e-5, "the dropout must fall otherwise"


def test_an_adapter_trains_in_bfloat16(tmp_path):
    trainer = tiny_trainer(tmp_path, ROWS, bf16=True, max_steps=3, per_device_train_batch_size=8, **BOTH)
    moved, _ = moved_and_still(trainer)
    assert any(".lora_B." in name for name in moved)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


RESUMED = {**BOTH, "max_steps": 6, "save_strategy": "steps", "save_steps": 4, "dropout": 0.1, "lora_dropout": 0.1}


@pytest.mark.parametrize("cached", [{}, {"contrastive_batch_size": 4, "micro_batch_size": 3}], ids=["whole", "cached"])
def test_a_stopped_run_goes_on_to_the_digit_from_a_small_checkpoint(tmp_path, cached):
    settings = RESUMED | cached | {"layer_lr_decay": 0.5}
    whole = tiny_trainer(tmp_path, tiny_rows(12), **settings)
    whole.train()
    checkpoint = tmp_path / "checkpoint-4"
    weights = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    assert not (checkpoint / "model.safetensors").exists() and (checkpoint / "tokenizer.json").is_file()
    parts = {name.removeprefix("base_model.model.").split(".")[0] for name in weights}
    assert parts == {name for name, _ in whole.model.named_children()}
    assert all(".lora_" in name for name in weights if "vision_model" in name or "text_model" in name)
    resumed = tiny_trainer(tmp_path, tiny_rows(12), **settings)
    shaken(resumed.model)  # all that counts is in the checkpoint
    resumed.train(resume_from_checkpoint=str(checkpoint))
    logs = [[line for line in each.state.log_history if "loss" in line] for each in (whole, resumed)]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4, 5, 6] and logs[0] == logs[1]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_another_base_or_of_no_adapter_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path / "run", tiny_rows(8), save_strategy="steps", save_steps=2, **BOTH)
    trainer.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    other_base = tiny_trainer(tmp_path / "a", tiny_rows(8), fields={"seed": 4}, **BOTH)
    with pytest.raises(SettingsError, match="the adapter was trained on other weights than those here"):
        other_base.train(resume_from_checkpoint=checkpoint)
    more = tiny_trainer(tmp_path / "b", tiny_rows(8), **BOTH, lora_targets="all")
    with pytest.raises(
        SettingsError, match=r"the adapter is of another model or other --lora settings: .*output\.dense.* and 13 more"
    ):
        more.train(resume_from_checkpoint=checkpoint)
    plain = tiny_trainer(tmp_path / "c", tiny_rows(8), save_strategy="steps", save_steps=2)
    plain.train()
    with pytest.raises(SettingsError, match="holds no adapter .*: it is of a run without --lora"):
        tiny_trainer(tmp_path / "d", tiny_rows(8), **BOTH).train(
            resume_from_checkpoint=str(tmp_path / "c" / "checkpoint-2")
        )


def test_the_best_model_of_a_run_is_loaded_back(tmp_path):
    settings = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "eval_rows": tiny_rows(6, seed=2)}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    trainer = tiny_trainer(tmp_path, ROWS, max_steps=4, learning_rate=0.05, save_total_limit=1, **settings, **BOTH)
    trainer.train()
    best = load_file(trainer.state.best_model_checkpoint + "/adapter/adapter_model.safetensors")
    now = adapter_state(trainer.model)
    assert best.keys() == now.keys() and all(torch.equal(best[name], now[name]) for name in best)


def test_an_adapter_is_put_on_its_base_by_peft(tmp_path, batch, model):
    adaptation = adapt_model(model, arguments(tmp_path, **BOTH, lora_targets="all"), base="them")
    shaken(shaken(model), names="organ_")
    shaken(model, names="temperature", std=0.01)
    save_adapter(model, adaptation, tmp_path / "adapter")
    expected = forward(model.eval(), batch)
    put_on = PeftModel.from_pretrained(tiny_model(ROWS)[0], tmp_path / "adapter").eval()
    torch.testing.assert_close(forward(put_on, batch), expected, rtol=1e-6, atol=1e-6)
    assert (forward(tiny_model(ROWS)[0].eval(), batch) - expected).abs().max() > 1e-2
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "them" and (config["r"], config["lora_alpha"]) == (3, 6)
    assert config["target_modules"] == sorted(config["target_modules"])
    save_adapter(model, adaptation, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_tower_without_an_adapter_goes_whole_into_the_file_if_it_is_trained(tmp_path, model):
    adapt_model(model, arguments(tmp_path, lora=["text"]))
    names = {name.removeprefix("base_model.model.") for name in adapter_state(model)}
    assert {name for name, _ in model.named_parameters() if name.startswith("vision_model.")} < names
    frozen = tiny_model(ROWS)[0]
    adapt_model(frozen, arguments(tmp_path, lora=["text"], freeze=["vision_model"]))
    assert not any("vision_model" in name for name in adapter_state(frozen))


def test_an_addition_that_is_not_finite_is_not_merged(tmp_path, model):
    adapt_model(model, arguments(tmp_path, **BOTH))
    with torch.no_grad():
        next(value for name, value in model.named_parameters() if ".lora_B." in name).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"added to vision_model.blocks.0.attention.qkv is not finite"):
        merged_state_dict(model)


# Learning rates


def slow_rate(name: str, decay: float, vision: float, text: float) -> float:
    """The factor of a parameter of the tiny model, two blocks in either tower, written down by hand."""
    powers = {
        "vision_model.embeddings": 3, "vision_model.blocks.0": 2, "vision_model.blocks.1": 1, "vision_model.norm": 0,
        "text_model.embeddings": 3, "text_model.encoder.layer.0": 2, "text_model.encoder.layer.1": 1,
    }  # fmt: skip
    tower = {"vision_model": vision, "text_model": text}.get(name.split(".")[0], 1.0)
    power = next((power for part, power in powers.items() if name.startswith(f"{part}.")), 0)
    return tower * decay**power


def rates_of(trainer) -> dict[str, tuple[float, float]]:
    """parameter -> learning rate and weight decay in force."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("lora", [{}, BOTH], ids=["full", "lora"])
def test_every_parameter_has_its_rate_and_its_decay(tmp_path, lora, everywhere):
    settings = {"layer_lr_decay": 0.75, "vision_lr_scale": 0.5, "text_lr_scale": 0.1, "learning_rate": 1e-3}
    settings |= {"weight_decay": 0.05, "weight_decay_everywhere": everywhere} | lora
    trainer = tiny_trainer(tmp_path, ROWS, **settings)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    trainer.create_optimizer()
    rates = rates_of(trainer)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert rates.keys() == trained
    for name, (rate, decay) in rates.items():
        assert rate == pytest.approx(1e-3 * slow_rate(name, 0.75, 0.5, 0.1), rel=1e-12), name
        assert decay == (0.05 if name in decayed else 0.0), name
    assert len({rate for rate, _ in rates.values()}) >= (5 if lora else 8)
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3, "the log shows the first group's rate"
    plain = tiny_trainer(tmp_path, ROWS, learning_rate=1e-3)
    plain.create_optimizer()
    assert len(plain.optimizer.param_groups) == 2


def test_rates_of_one_tower_alone(tmp_path, model):
    args = arguments(tmp_path, text_lr_scale=0.1, learning_rate=1.0)
    groups = parameter_groups(model, args, [])
    assert [group["lr"] for group in groups] == [1.0, 0.1]
    assert sum(map(torch.numel, groups[1]["params"])) == sum(map(torch.numel, model.text_model.parameters()))
    assert parameter_groups(model, arguments(tmp_path, freeze=["text_model"]), []) is None


class Rates(TrainerCallback):
    """The learning rates of every step, and the highest."""

    def __init__(self):
        self.seen: list[list[float]] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("schedule", ["published", "cosine_with_min_lr"])
def test_schedules_are_multiplied_also_after_a_resume(tmp_path, schedule):
    settings = {"layer_lr_decay": 0.5, "text_lr_scale": 0.1, "learning_rate": 2e-3, "num_train_epochs": 4}
    settings |= {"max_steps": -1, "save_strategy": "steps", "save_steps": 5, "save_total_limit": 3, "warmup_steps": 2}
    if schedule == "published":
        settings |= {"lr_schedule": "published"}
    else:
        settings |= {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    plain_rates = Rates()
    plain = {name: value for name, value in settings.items() if name not in ("layer_lr_decay", "text_lr_scale")}
    tiny_trainer(tmp_path / "plain", tiny_rows(12), callbacks=[plain_rates], **plain).train()
    whole, resumed = Rates(), Rates()
    first = tiny_trainer(tmp_path / "run", tiny_rows(12), callbacks=[whole], **settings)
    first.train()
    second = tiny_trainer(tmp_path / "run", tiny_rows(12), callbacks=[resumed], **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    names = {id(parameter): name for name, parameter in first.model.named_parameters()}
    factors = [slow_rate(names[id(group["params"][0])], 0.5, 1.0, 0.1) for group in first.optimizer.param_groups]
    assert len(plain_rates.seen) == 12 and len({rate for rate, _ in plain_rates.seen}) > 4
    for (rate, _), rates in zip(plain_rates.seen, whole.seen, strict=True):
        assert rates == pytest.approx([rate * factor for factor in factors], rel=1e-12)
    assert resumed.seen == whole.seen[5:]
    if schedule == "published":
        by_hand = {"steps_per_epoch": 3, "num_epochs": 4, "peak_lr": 2e-3, "min_lr": 1e-6, "warmup_start_lr": 1e-6}
        assert [rates[0] for rates in whole.seen] == pytest.approx(
            [published_learning_rate(step, **by_hand, warmup_steps=2) for step in range(12)], rel=1e-12
        )
    assert [line["learning_rate"] for line in first.state.log_history if "loss" in line] == pytest.approx(
        [rates[0] for rates in whole.seen]
    )
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("made", [(lambda: None, {}), (torch.optim.AdamW, {"lr": 1e-3, "optimizer_dict": {}})])
def test_an_optimizer_that_makes_groups_by_itself_is_refused(tmp_path, monkeypatch, made):
    trainer = tiny_trainer(tmp_path, ROWS, text_lr_scale=0.1)
    monkeypatch.setattr(trainer, "get_optimizer_cls_and_kwargs", lambda *_: made)
    with pytest.raises(SettingsError, match="groups parameters by itself"):
        trainer.create_optimizer()


# Settings


def settings_of(tmp_path, *words, model=None):
    recipe = yaml.safe_load(TINY_RECIPE)
    if model is not None:
        recipe["model"] = model
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return parse_settings(
        ["--recipe", str(tmp_path / "recipe.yaml"), "--data", "d", "--output_dir", str(tmp_path / "o"), *words], "help"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora", "image"], "--lora 'image' is no tower; choose from vision, text"),
        (["--lora", "vision"], "those of vision_model would be random: name a model with --init_from"),
        (["--lora", "text"], "those of text_model would be random"),
        (["--lora", "text", "--init_from", "d", "--lora_rank", "0"], "--lora_rank 0 and --lora_alpha 32 must be"),
        (["--lora", "text", "--init_from", "d", "--lora_dropout", "1"], "--lora_dropout 1.0 in [0, 1)"),
        (["--layer_lr_decay", "0"], "--layer_lr_decay 0.0 must lie in (0, 1]"),
        (["--layer_lr_decay", "1.5"], "--layer_lr_decay 1.5 must lie in (0, 1]"),
        (["--text_lr_scale", "0"], "to keep the tower as it is, --freeze text_model"),
        (["--vision_lr_scale", "-1"], "to keep the tower as it is, --freeze vision_model"),
        (["--lora_targets", "none"], "invalid choice"),
    ],
)
def test_what_cannot_work_is_refused_at_once(tmp_path, words, message, capsys):
    with pytest.raises((SettingsError, SystemExit)) as caught:
        settings_of(tmp_path, *words)
    assert message in str(caught.value) + capsys.readouterr().err


def test_frozen_fresh_weights_are_pointed_out(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        settings_of(tmp_path, "--freeze", "text_model", "--init_from", "d", model={})
        assert "stay as random" not in caplog.text
        settings_of(tmp_path, "--freeze", "text_model")
    assert "--freeze text_model without --init_from: fresh weights stay as random as they are" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": ["*"]}, "--freeze * leaves nothing to train"),
        ({"lora": ["vision"], "freeze": ["vision_model"]}, "--lora vision: nothing of vision_model is left to adapt"),
        ({"freeze": ["text_model"], "text_lr_scale": 0.5}, "--text_lr_scale 0.5 has no effect"),
        ({"freeze": ["vision_model", "text_model"], "layer_lr_decay": 0.5}, "--layer_lr_decay 0.5 has no effect"),
        ({"freeze": ["vision_model.block"]}, "nearest: 'vision_model.blocks'"),
    ],
)
def test_what_a_model_does_not_allow_is_refused_by_its_names_alone(tmp_path, settings, message):
    recipe = yaml.safe_load(TINY_RECIPE)["model"]
    outline = outline_model(recipe, description())
    assert all(parameter.device.type == "meta" for parameter in outline.parameters())
    with pytest.raises(SettingsError) as caught:
        plan_adapting(outline, arguments(tmp_path, **settings))
    assert message in str(caught.value)


def test_an_outline_has_the_names_of_the_model_to_come(tmp_path):
    recipe = yaml.safe_load(TINY_RECIPE)["model"]
    built, processor = build_model(recipe, description(), dataset_of(ROWS), window_volumes=2)
    names = [name for name, _ in built.named_parameters()]
    assert [name for name, _ in outline_model(recipe, description()).named_parameters()] == names
    save_for_hub(built, processor, tmp_path / "saved")
    split = description(organs=("lung", "heart", "spleen", "kidney"))
    start = read_start(str(tmp_path / "saved"), {}, split)
    outline = outline_model({}, split, start)
    started, _ = build_model({}, split, dataset_of(ROWS), window_volumes=2, start=start)
    assert [name for name, _ in outline.named_parameters()] == [name for name, _ in started.named_parameters()]
    folder = tmp_path / "encoder"
    BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32).save_pretrained(folder)
    outline = outline_model({**recipe, "text_encoder": {"pretrained": str(folder)}}, description())
    assert len(outline.text_model.encoder.layer) == 3
    with pytest.raises(SettingsError, match="text encoder .*nowhere cannot be loaded"):
        outline_model({**recipe, "text_encoder": {"pretrained": str(tmp_path / "nowhere")}}, description())


def test_settings_of_adapting_are_compared_at_a_resume(tmp_path):
    base = ["--init_from", "d"]
    saved = json.loads(json.dumps(train_fvlm.resolved_settings(settings_of(tmp_path, *base, model={})), default=str))
    checkpoint = tmp_path / "run" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps(saved))
    train_fvlm.check_same_run(settings_of(tmp_path, *base, model={}), str(checkpoint))
    for words in (
        *(["--lora", "text"], ["--lora_rank", "4"], ["--lora_alpha", "4"], ["--lora_dropout", "0.5"]),
        *(["--lora_targets", "all"], ["--freeze", "text_model"], ["--layer_lr_decay", "0.5"]),
        *(["--vision_lr_scale", "0.5"], ["--text_lr_scale", "0.5"]),
    ):
        with pytest.raises(SettingsError, match=rf"other settings \({words[0]}: .* here, .* there\)"):
            train_fvlm.check_same_run(settings_of(tmp_path, *base, *words, model={}), str(checkpoint))


def test_the_recipe_for_adapting_is_one(tmp_path):
    words = ["--recipe", "adapt_lora", "--init_from", "d", "--data", "d", "--output_dir", str(tmp_path), "--use_cpu"]
    settings = parse_settings(words, "help")
    args = settings.training
    assert args.lora == ["vision", "text"] and args.adapts and args.group_size >= 32
    assert not set(settings.model.get("text_encoder") or {}) - {"attention_dropout"}
    with pytest.raises(SettingsError):  # without a model to adapt
        parse_settings([word for word in words if word not in ("--init_from",)][:3] + words[4:], "help")


# The command


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A split and a saved model with no two organs alike."""
    folder = tmp_path_factory.mktemp("adapt")
    write_tiny_split(folder / "split", train=12, validation=4)
    model, processor = tiny_model(tiny_rows(6), seed=3)
    save_for_hub(model, processor, folder / "base")
    recipe = yaml.safe_load(TINY_RECIPE)
    recipe["model"] = {"organ_reduction": "mean"}
    recipe["training"] |= {"max_steps": 4, "save_steps": 2, "eval_strategy": "no", "logging_steps": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return SimpleNamespace(folder=folder, base=folder / "base", organs=ORGANS)


def command(work, name: str, *words: str) -> list[str]:
    folder = work.folder
    return [
        *("--recipe", str(folder / "recipe.yaml"), "--data", str(folder / "split"), "--init_from", str(work.base)),
        *("--output_dir", str(folder / name), *words),
    ]


LOAD = """
import sys
sys.modules["peft"] = None  # as if it were not installed
import torch
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not any(name.startswith(("modeling_fvlm", "training_fvlm")) for name in sys.modules)
tokens = processor(text=["lung shows no significant abnormalities."])
torch.save(model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).detach(), sys.argv[2])
"""
PUT_ON = """
import sys
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModel, AutoProcessor
above, base_folder = sys.argv[1:3]
config = AutoConfig.from_pretrained(above, trust_remote_code=True)
base = AutoModel.from_pretrained(base_folder, config=config, ignore_mismatched_sizes=True, trust_remote_code=True)
model = PeftModel.from_pretrained(base, above + "/adapter").eval()
assert not any(name.startswith(("modeling_fvlm", "training_fvlm")) for name in sys.modules)
processor = AutoProcessor.from_pretrained(above, trust_remote_code=True)
tokens = processor(text=["lung shows no significant abnormalities."])
state = {name: value for name, value in model.state_dict().items() if "organ_pooling.modules_to_save" in name}
torch.save([model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).detach(), state], sys.argv[3])
"""


def in_a_fresh_process(code: str, tmp_path, *words) -> object:
    """What the code saves, run in another folder with nothing of ours imported."""
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    environment |= {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code, *map(str, words), str(tmp_path / "said.pt")],
                         cwd=tmp_path, env=environment, capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(tmp_path / "said.pt", weights_only=True)


@pytest.mark.parametrize("other_organs", [False, True], ids=["its organs", "other organs"])
def test_a_run_with_lora_leaves_a_merged_model_and_its_adapter(work, tmp_path, caplog, monkeypatch, other_organs):
    if other_organs:
        manifest = work.folder / "split" / "manifest.json"
        kept = manifest.read_text()
        content = json.loads(kept)
        organs = ["lung", "spleen", "aorta", "kidney"]
        content["settings"]["organ_set"] = {"name": "m", "organs": organs, "classes": {organ: {} for organ in organs}}
        manifest.write_text(json.dumps(content))
    monkeypatch.setattr(transformers_logging.get_logger("train_fvlm"), "propagate", True)
    name = f"lora-{other_organs}"
    words = ["--lora", "vision", "text", "--lora_rank", "2", "--lora_dropout", "0.1", "--text_lr_scale", "0.5"]
    with caplog.at_level(logging.WARNING):
        assert train_fvlm.main(command(work, name, *words)) == 0
    run = work.folder / name
    if other_organs:
        manifest.write_text(kept)
    assert "parameters are trained, " in caplog.text and "vision_model 384 of" in caplog.text
    facts = json.loads((run / "run.json").read_text())
    lora = facts["adapting"]["lora"]
    assert (lora["towers"], lora["rank"], lora["base"]) == (["vision", "text"], 2, "base")
    model = FVLMModel.from_pretrained(run)
    assert facts["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    card = (run / "README.md").read_text()
    assert "| LoRA | attention layers of vision and text, rank 2, alpha 32, dropout 0.1; merged" in card
    assert "| learning rate of the text tower | 0.5 of the others' |" in card and "| trained | " in card
    assert not list(run.rglob("training_args.bin"))
    for path in [*run.glob("*.json"), *run.glob("adapter/*.json"), *run.glob("adapter/*.md")]:
        assert str(work.folder) not in path.read_text(), path

    # The folder loads without peft, and the adapter beside it makes the same of the base.
    here = text_features(run)
    if not other_organs:
        assert torch.equal(in_a_fresh_process(LOAD, tmp_path, run), here)
    else:
        there, pooling = in_a_fresh_process(PUT_ON, tmp_path, run, work.base)
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)
        queries = next(value for name, value in pooling.items() if name.endswith("query_tokens"))
        assert torch.equal(queries, model.organ_pooling.query_tokens) and len(queries) == 4
    # Towers stayed those of the base but for the addition.
    base, merged = (load_file(folder / "model.safetensors") for folder in (work.base, run))
    adapted = {
        name
        for name in base
        if name.startswith(("vision_", "text_model")) and not torch.equal(base[name], merged[name])
    }
    assert adapted and all(name.endswith(("qkv.weight", "out_proj.weight", "query.weight", "key.weight", "value.weight",
                                          "dense.weight")) for name in adapted)  # fmt: skip
    small, large = (run / "adapter" / "adapter_model.safetensors", run / "model.safetensors")
    assert small.stat().st_size < large.stat().st_size


def text_features(folder) -> torch.Tensor:
    from modeling_fvlm import FVLMProcessor

    tokens = FVLMProcessor.from_pretrained(folder)(text=["lung shows no significant abnormalities."])
    model = FVLMModel.from_pretrained(folder).eval()
    return model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).detach()


def test_a_checkpoint_is_pushed_as_a_merged_model(work, monkeypatch):
    from training_fvlm import hub

    pushed = []

    def start(uploads, folder, name, *words):
        weights = load_file(f"{folder}/model.safetensors")
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        files = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")}
        pushed.append((weights, config["auto_map"]["AutoModel"], files))

    monkeypatch.setattr(train_fvlm, "prepare_repository", lambda args: None)
    monkeypatch.setattr(hub.Uploads, "start", start)
    words = ["--lora", "text", "--push_to_hub", "--hub_strategy", "every_save"]
    assert train_fvlm.main(command(work, "pushed", *words)) == 0
    plain = set(load_file(work.base / "model.safetensors"))
    assert len(pushed) >= 3
    for weights, code, files in pushed:
        assert set(weights) == plain and code == "modeling_fvlm.FVLMModel"
        assert {"modeling_fvlm.py", "adapter/adapter_model.safetensors"} <= files
        assert not any(name.startswith("adapter_") for name in files)
    assert any(not torch.equal(pushed[0][0][name], pushed[-1][0][name]) for name in plain)


def test_a_stopped_command_with_lora_goes_on_to_the_same_weights(work):
    words = ["--lora", "text", "--freeze", "vision_model", "--layer_lr_decay", "0.5"]
    assert train_fvlm.main(command(work, "whole", *words)) == 0
    resume = ["--resume_from_checkpoint", str(work.folder / "whole" / "checkpoint-2")]
    assert train_fvlm.main(command(work, "again", *words, *resume)) == 0
    whole, again, base = (load_file(work.folder / name / "model.safetensors") for name in ("whole", "again", "base"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert all(torch.equal(whole[name], base[name]) for name in whole if name.startswith("vision_model."))
    assert not torch.equal(whole["text_projection.weight"], base["text_projection.weight"])


def test_a_command_freezes_and_scales(work, capsys):
    words = ["--freeze", "vision_model.embeddings", "vision_model.blocks.0", "text_model", "--vision_lr_scale", "0.5"]
    assert train_fvlm.main(command(work, "frozen", *words)) == 0
    trained, base = (load_file(work.folder / name / "model.safetensors") for name in ("frozen", "base"))
    still = {name for name in base if torch.equal(base[name], trained[name])}
    frozen = ("vision_model.embeddings.", "vision_model.blocks.0.", "text_model.")
    assert {name for name in base if name.startswith(frozen)} == still
    facts = json.loads((work.folder / "frozen" / "run.json").read_text())
    assert facts["adapting"]["by_part"]["text_model"] == 0 and facts["adapting"]["lora"] is None
    assert not (work.folder / "frozen" / "adapter").exists()
    assert "| trained | " in (work.folder / "frozen" / "README.md").read_text()
    assert train_fvlm.main(command(work, "typo", "--freeze", "vision_modle")) == 2
    assert "nearest: 'vision_model'" in capsys.readouterr().err
    assert not (work.folder / "typo" / "run.json").exists()
