"""In what a run computes: GEMM backend, attention, its dropout, checkpoints of both towers, bf16 and fp16."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_split import TINY_RECIPE, write_tiny_split
from tiny_training import forward_batch, tiny_rows, tiny_trainer
from transformers import set_seed

import train_fvlm
from modeling_fvlm import FVLMConfig, gemm
from modeling_fvlm.gemm import BLAS, ONEDNN, GemmCheck, GemmChoice
from modeling_fvlm.modeling_fvlm import set_attention
from training_fvlm.arguments import FVLMTrainingArguments, SettingsError, parse_settings
from training_fvlm.build import set_attention_dropout

ROWS = tiny_rows(4)
needs_onednn = pytest.mark.skipif(not gemm.onednn_is_available(), reason="this PyTorch carries no oneDNN")
SHORT = ["--max_steps", "2", "--logging_steps", "1", "--eval_strategy", "no", "--save_steps", "1"]


RATES = ["--model.vision_config.attention_dropout", "0.25", "--model.text_encoder.attention_dropout", "0.2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A split, a recipe, and a run without options but attention dropout; nothing is measured for so small a model."""
    folder = tmp_path_factory.mktemp("precision")
    write_tiny_split(folder / "split", train=8, validation=4)
    (folder / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemm, "choose_gemm_backend", lambda **sizes: pytest.fail("measured"))
        assert train_fvlm.main(command(folder, "plain", *RATES)) == 0
    return folder


def command(work, name: str, *words: str) -> list[str]:
    places = ["--recipe", str(work / "tiny.yaml"), "--data", str(work / "split"), "--output_dir", str(work / name)]
    return [*places, *SHORT, *words]


def facts_of(work, name: str) -> dict:
    return json.loads((work / name / "run.json").read_text())


def losses(trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


# GEMM backend


@pytest.fixture
def measured(monkeypatch):
    """Every model counts as large, and the measurement finds oneDNN twice as fast; the list says how often it ran."""
    calls = []

    def choose(**sizes):
        calls.append(sizes)
        return GemmChoice(ONEDNN, {BLAS: GemmCheck(50.0, 0.1), ONEDNN: GemmCheck(100.0, 0.1)})

    monkeypatch.setattr(gemm, "choose_gemm_backend", choose)
    monkeypatch.setattr(gemm, "MIN_PARAMETERS_TO_MEASURE", 100)
    return calls


@pytest.fixture
def sent(monkeypatch):
    """How many linear layers oneDNN was given in the forward pass."""
    calls = []
    apply = gemm._OneDNNLinear.apply
    monkeypatch.setattr(gemm._OneDNNLinear, "apply", lambda *tensors: calls.append(1) or apply(*tensors))
    return calls


@needs_onednn
def test_a_run_measures_once_and_a_resumed_one_keeps_its_backend(work, measured, sent, caplog):
    assert train_fvlm.main(command(work, "run")) == 0
    assert measured == [{}] and facts_of(work, "run")["gemm_backend"] == ONEDNN and len(sent) > 20
    assert "float32 matrix products on the CPU by onednn" in caplog.text
    assert "fp32, linear layers by oneDNN" in (work / "run" / "README.md").read_text()
    # On a machine where the measurement would say blas, the run goes on as it began, to the same digits.
    resume = ["--resume_from_checkpoint", str(work / "run" / "checkpoint-1")]
    sent.clear(), measured.clear(), caplog.clear()
    assert train_fvlm.main(command(work, "again", *resume)) == 0
    assert measured == [gemm.QUICK_CHECK] and len(sent) > 10 and "last digits" not in caplog.text
    assert facts_of(work, "again")["gemm_backend"] == ONEDNN
    whole, again = (load_file(work / name / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    # Another one on purpose is told.
    other = tiny_trainer(work / "other", ROWS, gemm_backend="blas", resume_from_checkpoint=resume[1])
    assert train_fvlm.gemm_backend_of_run(other) == BLAS
    assert "its weights will differ in the last digits" in caplog.text


def test_small_models_and_bf16_measure_nothing(work, tmp_path, measured, caplog):
    assert facts_of(work, "plain")["gemm_backend"] == BLAS and facts_of(work, "plain")["precision"] == "fp32"
    assert "oneDNN" not in (work / "plain" / "README.md").read_text()
    trainer = tiny_trainer(tmp_path, ROWS, bf16=True)
    assert train_fvlm.gemm_backend_of_run(trainer) is None and not measured and "no effect" not in caplog.text
    trainer.args.gemm_backend = ONEDNN
    assert train_fvlm.gemm_backend_of_run(trainer) is None and not measured
    assert "--gemm_backend onednn has no effect in bf16 on cpu" in caplog.text


def test_what_lowers_precision_is_told_and_no_crash(monkeypatch):
    def lowered(**sizes):
        raise gemm.LowPrecisionError("errors 30 times: undo torch.set_float32_matmul_precision")

    monkeypatch.setattr(gemm, "choose_gemm_backend", lowered)
    name, line = gemm.pick_gemm_backend(None, 10**8)
    assert name == BLAS and line == "WARNING: errors 30 times: undo torch.set_float32_matmul_precision"
    rounds = GemmChoice(BLAS, {BLAS: GemmCheck(50.0, 0.1), ONEDNN: GemmCheck(100.0, 30.0)})
    monkeypatch.setattr(gemm, "choose_gemm_backend", lambda **sizes: rounds)
    name, line = gemm.pick_gemm_backend(ONEDNN, 10**8)
    assert name == ONEDNN and "GEMM backend onednn rounds 30 times more than float32 may" in line


def test_a_backend_that_is_missing_is_refused(work, monkeypatch, capsys):
    monkeypatch.setattr(gemm, "onednn_is_available", lambda: False)
    assert train_fvlm.main(command(work, "missing", "--gemm_backend", "onednn")) == 2
    assert "--gemm_backend onednn: GEMM backend 'onednn' is not among those of this PyTorch" in capsys.readouterr().err
    checkpoint = work / "moved" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (work / "moved" / "run.json").write_text(json.dumps({"gemm_backend": ONEDNN}))
    trainer = tiny_trainer(work / "moved", ROWS, resume_from_checkpoint=str(checkpoint))
    with pytest.raises(SettingsError, match="--gemm_backend blas goes on, but not to the same digits"):
        train_fvlm.gemm_backend_of_run(trainer)


# Attention


def test_attention_and_its_dropout_reach_both_towers_also_from_a_folder(work, monkeypatch):
    built = []
    trainer_class = train_fvlm.FVLMTrainer

    def spy(model, *args, **settings):
        built.append(model)
        return trainer_class(model, *args, **settings)

    monkeypatch.setattr(train_fvlm, "FVLMTrainer", spy)
    words = [RATES[0], "0.05", RATES[2], "0", "--attn_implementation", "eager", "--init_from", str(work / "plain")]
    assert train_fvlm.main(command(work, "started", *words)) == 0
    for name, vision, text in (("plain", 0.25, 0.2), ("started", 0.05, 0.0)):
        config = FVLMConfig.from_pretrained(work / name)
        assert config.vision_config.attention_dropout == vision
        assert config.text_config.attention_probs_dropout_prob == text
        assert "attn" not in (work / name / "config.json").read_text(), "whoever loads the weights chooses anew"
    model = built[0]
    assert model.vision_model.blocks[0].attention.attention_dropout == 0.05
    assert model.text_model.encoder.layer[0].attention.self.dropout.p == 0.0
    towers = (model.vision_model, model.text_model)
    assert [tower.config._attn_implementation for tower in towers] == ["eager", "eager"]


def test_attention_dropout_of_a_pretrained_encoder(work):
    fields = {"model_type": "distilbert"}
    set_attention_dropout(fields, 0)
    assert fields == {"model_type": "distilbert", "attention_dropout": 0.0}
    with pytest.raises(SettingsError, match="a text encoder of type fnet has none of attention_probs"):
        set_attention_dropout({"model_type": "fnet"}, 0)
    with pytest.raises(SettingsError, match=r"model.text_encoder.attention_dropout 1.5 must lie in \[0, 1\)"):
        parse_settings(command(work, "no", "--model.text_encoder.attention_dropout", "1.5"), "help")


def test_flash_attention_is_refused_where_it_cannot_run(monkeypatch, tmp_path):
    words = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "attn_implementation": "flash_attention_2"}
    with pytest.raises(SettingsError, match="flash_attention_2 needs a GPU: on a CPU take sdpa"):
        FVLMTrainingArguments(use_cpu=True, **words)
    model = tiny_trainer(tmp_path, ROWS).model
    with pytest.raises(ValueError, match=".+"):
        set_attention(model, "flash_attention_2")  # not installed, or no GPU
    monkeypatch.setattr(FVLMTrainingArguments, "device", torch.device("cuda"))
    with pytest.raises(SettingsError, match="flash_attention_2 does not compute in float32: add --bf16 or --fp16"):
        FVLMTrainingArguments(**words)
    monkeypatch.undo()
    recipe = yaml.safe_load(TINY_RECIPE)
    recipe["training"]["attn_implementation"] = "flash"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(SettingsError, match="--attn_implementation 'flash' is none of sdpa, eager"):
        parse_settings(["--recipe", str(tmp_path / "recipe.yaml"), "--data", "d", "--output_dir", "o"], "help")


# Activation checkpointing


def test_checkpoints_of_both_towers_recompute_and_replay_all_dropout(tmp_path):
    """Blocks of both towers run twice a step, and gradients under every dropout stay those without checkpoints."""
    gradients, runs = [], []
    for is_checkpointed in (False, True):
        trainer = tiny_trainer(tmp_path, ROWS, is_random=False, dropout=0.1)
        model = trainer.model
        for block in model.vision_model.blocks:
            block.attention.attention_dropout = 0.1
        text_layers = list(model.text_model.encoder.layer)
        for layer in text_layers:
            layer.attention.self.dropout.p = 0.1
        # Hooked within the blocks: the checkpoint is around a block's own hooks.
        ran = {"vision": [], "text": []}
        for block in model.vision_model.blocks:
            block.norm1.register_forward_hook(lambda *_, runs=ran["vision"]: runs.append(1))
        for layer in text_layers:
            layer.attention.register_forward_hook(lambda *_, runs=ran["text"]: runs.append(1))
        if is_checkpointed:
            model.activation_checkpointing_enable()
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(ROWS))])
        model.train()
        set_seed(3)
        model(**forward_batch(batch)).loss.backward()
        runs.append({tower: len(calls) for tower, calls in ran.items()})
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert runs == [{"vision": 2, "text": 2}, {"vision": 4, "text": 4}]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert sum(bool(gradient.any()) for gradient in gradients[0].values()) > 30


# Lower precision


def three_steps(folder, **precision):
    trainer = tiny_trainer(folder, tiny_rows(12), max_steps=3, learning_rate=1e-3, **precision)
    trainer.train()
    return trainer


def test_bf16_trains_close_to_float32_and_keeps_float32_weights(tmp_path):
    exact, half = three_steps(tmp_path / "fp32"), three_steps(tmp_path / "bf16", bf16=True)
    assert losses(half) == pytest.approx(losses(exact), rel=0.02, abs=0.02)
    assert losses(half) != losses(exact) and half.args.computed_precision == "bf16"
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}


def test_fp16_on_a_cpu_is_float32_and_says_so(tmp_path, caplog):
    exact, half = three_steps(tmp_path / "fp32"), three_steps(tmp_path / "fp16", fp16=True)
    assert losses(half) == losses(exact) and half.args.computed_precision == "fp32"
    assert "--fp16 has no effect on a CPU" in caplog.text
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_gradients_of_lower_precision_are_close(tmp_path, dtype, tolerance):
    trainer = tiny_trainer(tmp_path, ROWS, is_random=False)
    model = trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(ROWS))])
    results = []
    for is_lower in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=is_lower):
            loss = model(**forward_batch(batch)).loss
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        results.append((loss.detach(), gradient))
    (exact_loss, exact), (loss, gradient) = results
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(exact_loss), rel=tolerance)
    assert gradient.isfinite().all() and not torch.equal(gradient, exact)
    assert float((gradient - exact).norm() / exact.norm()) < tolerance


def test_compiling_on_a_cpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # the Trainer's arguments set it: put back afterwards
    words = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "use_cpu": True}
    with pytest.raises(SettingsError, match="--torch_compile on a CPU compiles for minutes .* --gemm_backend and"):
        FVLMTrainingArguments(torch_compile=True, **words)
