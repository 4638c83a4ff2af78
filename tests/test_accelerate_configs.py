"""hub_configs/accelerate and hub_configs/slurm: what accelerate makes of each file, FSDP2 on two CPU processes against
one, and launches that would start fewer processes than they were asked for."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from launching import CONFIGS, environment, free_port, launch
from safetensors.torch import load_file
from sharded_worker import CASES, run_case
from tiny_split import TINY_RECIPE, write_tiny_split
from tiny_training import tiny_model, tiny_rows

from modeling_fvlm import FVLMModel
from training_fvlm.arguments import DataArguments, FVLMTrainingArguments, SettingsError
from training_fvlm.scaling import check_launch, check_sharding, describe_launch, prepare_for_sharding, wrapped_classes

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "tests" / "sharded_worker.py"
# name -> type and number of processes
TYPES = {
    "one_gpu": (DistributedType.NO, 1),
    "four_gpus": (DistributedType.MULTI_GPU, 4),
    "cpu_two": (DistributedType.MULTI_GPU, 2),  # a CPU by ACCELERATE_USE_CPU
    "fsdp2": (DistributedType.FSDP, 4),
    "zero1": (DistributedType.DEEPSPEED, 4),
    "zero3": (DistributedType.DEEPSPEED, 4),
}


def launched(name, *words):
    """What `accelerate launch` makes of a configuration: its arguments and the configuration itself."""
    command = ["--config_file", str(CONFIGS / f"{name}.yaml"), *words, "train_fvlm.py"]
    args, config, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    return args, config


# Configurations


def test_every_configuration_is_looked_at():
    assert {path.stem for path in CONFIGS.iterdir()} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_a_configuration_is_of_the_type_it_claims(name):
    args, config = launched(name)
    kind, num_processes = TYPES[name]
    assert config.distributed_type == kind and args.num_processes == config.num_processes == num_processes
    assert (args.use_fsdp, args.use_deepspeed) == (kind == DistributedType.FSDP, kind == DistributedType.DEEPSPEED)
    assert args.multi_gpu == (kind == DistributedType.MULTI_GPU) and not args.cpu
    assert args.mixed_precision == "no" and args.dynamo_backend == "no", "precision is the training's own argument"
    assert f"--config_file hub_configs/accelerate/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()


def test_fsdp2_reaches_the_plugin(monkeypatch):
    args, _ = launched("fsdp2", "--num_processes", "2")
    assert args.num_processes == 2
    for variable, value in prepare_multi_gpu_env(args).items():
        if variable.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(variable, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False and plugin.activation_checkpointing is False
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    model, _ = tiny_model(tiny_rows(2))
    plugin.transformer_cls_names_to_wrap = wrapped_classes(model)
    plugin.set_auto_wrap_policy(model)  # finds the classes in the model, or raises
    of_towers = {"FVLMPatchEmbedding", "FVLMVisionBlock", "BertLayer"}
    assert {each.__name__ for each in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]} == of_towers
    assert of_towers > set(FVLMModel._no_split_modules)


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_reaches_the_plugin(monkeypatch, stage):
    args, config = launched(f"zero{stage}")
    args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)  # as launch_command sets it
    _, variables = prepare_deepspeed_cmd_env(args)
    for variable, value in variables.items():
        if variable.startswith("ACCELERATE_"):
            monkeypatch.setenv(variable, value)
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
    monkeypatch.setattr("accelerate.utils.dataclasses.is_deepspeed_available", lambda: True, raising=False)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage and not plugin.zero3_init_flag
    settings = plugin.deepspeed_config
    assert settings["gradient_accumulation_steps"] == settings["gradient_clipping"] == "auto"
    assert settings["zero_optimization"]["stage"] == stage
    if stage == 3:
        assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


# FSDP2 on two processes


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Folder with what two processes saw under FSDP2 in each case."""
    folder = tmp_path_factory.mktemp("fsdp2")
    launch("fsdp2", 2, WORKER, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_sharded_weights_have_the_gradient_of_whole_ones(two, tmp_path, name):
    facts, gradients = json.loads((two / f"{name}.json").read_text()), load_file(two / f"{name}.safetensors")
    assert facts["world_size"] == 2 and facts["wrapper"] == "FSDPFVLMModel" and "FSDP" in facts["type"]
    trainer, expected, metrics = run_case(name, tmp_path)
    assert trainer.args.world_size == 1
    assert set(facts["sharded"]) == set(expected) - {"temperature.value"}, "nothing was sharded"
    assert gradients.keys() == expected.keys() and all(gradient.any() for gradient in expected.values())
    # Another order of summation, which under bf16 rounds otherwise; the embeddings of the loss are float32 in any case.
    relative, first, later = (2e-2, 1e-4, 1e-2) if name == "bf16" else (1e-4, 1e-5, 1e-4)
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for parameter, gradient in expected.items():
        distance = float((gradients[parameter] - gradient).norm())
        assert distance <= relative * float(gradient.norm()) + 1e-6 * largest, parameter
    log = [line for line in trainer.state.log_history if "loss" in line]
    assert facts["log"][0]["loss"] == pytest.approx(log[0]["loss"], rel=first)
    assert facts["log"][0]["grad_norm"] == pytest.approx(log[0]["grad_norm"], rel=first)
    for one, both in zip(log, facts["log"], strict=True):
        assert both["loss"] == pytest.approx(one["loss"], rel=later)
    assert facts["eval"]["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=later)


def test_a_sharded_model_is_saved_whole_with_its_own_code(two, tmp_path):
    folder = two / "plain" / "model"
    names = {path.name for path in folder.iterdir()}
    assert {"modeling_fvlm.py", "vision.py", "pipeline_fvlm.py", "processor_config.json"} <= names
    assert not any(name.startswith("_fsdp") for name in names), "torch's code in place of the model's"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["FVLMModel"] and config["auto_map"]["AutoModel"] == "modeling_fvlm.FVLMModel"
    trainer, _, _ = run_case("plain", tmp_path)
    expected = trainer.model.state_dict()
    saved = FVLMModel.from_pretrained(folder).state_dict()
    assert saved.keys() == expected.keys() and saved["temperature.value"].shape == ()
    for name, weight in expected.items():
        assert float((saved[name] - weight).abs().max()) < 2e-3, name
    fresh, _ = tiny_model(tiny_rows(12))
    assert not torch.equal(saved["text_projection.weight"], fresh.state_dict()["text_projection.weight"])


def test_a_sharded_run_goes_on_from_its_checkpoint_to_the_same_digits(two):
    whole, resumed = json.loads((two / "resumed.json").read_text())
    assert len(whole) == 6 and resumed == whole


# DeepSpeed, as far as it can be seen without it


def test_parameters_without_an_axis_get_one_for_deepspeed(tmp_path):
    model, _ = tiny_model(tiny_rows(2))
    scale = model.temperature()
    args = SimpleNamespace(fsdp_plugin_args=None, deepspeed_plugin=SimpleNamespace(zero_stage=1))
    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    trainer = {"accelerator": accelerator, "model": model, "args": args, "is_fsdp_enabled": False}
    prepare_for_sharding(SimpleNamespace(**trainer, is_deepspeed_enabled=True))
    assert all(parameter.ndim for parameter in model.parameters()) and model.temperature.value.shape == (1,)
    assert torch.equal(model.temperature(), scale) and scale.ndim == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs pip install deepspeed")
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_trains_to_the_weights_of_one_process(tmp_path, stage):
    names = ("plain", "gradient cache")
    launch(f"zero{stage}", 2, WORKER, tmp_path / "two", *names, timeout=900, DS_ACCELERATOR="cpu")
    for name in names:
        facts = json.loads((tmp_path / "two" / f"{name}.json").read_text())
        assert facts["world_size"] == 2 and facts["wrapper"] == "DeepSpeedEngine"
        trainer, _, _ = run_case(name, tmp_path / name)
        log = [line for line in trainer.state.log_history if "loss" in line]
        for one, both in zip(log, facts["log"], strict=True):
            assert both["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert both["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        saved = FVLMModel.from_pretrained(tmp_path / "two" / name / "model").state_dict()
        for parameter, weight in trainer.model.state_dict().items():
            torch.testing.assert_close(saved[parameter], weight, rtol=0, atol=1e-4)


# Launches


def arguments(tmp_path, **more) -> FVLMTrainingArguments:
    defaults = {"per_device_train_batch_size": 4, "use_cpu": True, "output_dir": str(tmp_path)}
    return FVLMTrainingArguments(**(defaults | more))


def test_the_first_line_says_how_many_contrast_how_many(tmp_path):
    args = arguments(tmp_path)
    assert describe_launch(args) == "1 process on cpu, fp32: a step contrasts 4 patients."
    cached = {"contrastive_batch_size": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 3, "bf16": True}
    args = arguments(tmp_path, **({"per_device_train_batch_size": 8} | cached))
    assert describe_launch(args) == (
        "1 process on cpu, bf16: a step averages 3 contrasts, each of 8 patients, in chunks of 2."
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "the launcher started 2 processes"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 processes .*train_many_nodes.sh"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "started this one alone"),
    ],
)
def test_a_process_that_would_train_alone_is_refused(tmp_path, variables, message):
    args = arguments(tmp_path)
    with pytest.raises(SettingsError, match=message):
        check_launch(args, variables)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "29500", "ACCELERATE_MIXED_PRECISION": "no"},
        {"MASTER_PORT": "29500"},  # of a job script, without accelerate
        {"ACCELERATE_MIXED_PRECISION": "bf16"},  # accelerate launch --num_processes 1
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},
    ],
)
def test_one_process_that_was_asked_for_is_none_of_them(tmp_path, variables):
    check_launch(arguments(tmp_path), variables)


def test_launchers_that_say_nothing_are_found_out(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE.replace("use_cpu: true,", ""))
    variables = {name: value for name, value in environment().items() if not name.startswith(("ACCELERATE", "MASTER"))}
    told = {
        "started this one alone": ["--cpu", "--num_processes", "2"],
        "the launcher started 2 processes": ["--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "2"],
    }
    runs = {}
    for message, words in told.items():
        command = [sys.executable, "-m", "accelerate.commands.launch", *words, "--main_process_port", str(free_port())]
        command += [str(ROOT / "train_fvlm.py"), "--recipe", str(tmp_path / "tiny.yaml"), "--data", "not-there"]
        command += ["--output_dir", str(tmp_path / "run")]
        runs[message] = subprocess.Popen(
            command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    for message, run in runs.items():
        output, _ = run.communicate(timeout=200)
        assert run.returncode != 0
        # Older versions of accelerate let the two find each other, and leave FSDP out.
        assert message in output or ("--config_file" in told[message] and "FSDP was asked for, but" in output)
        assert "not-there" not in output.split("Traceback")[0], "the data was looked for first"


@pytest.mark.parametrize(
    ("of_data", "of_training", "variables", "message"),
    [
        ({"eval_tasks": ["synthetic"]}, {}, {}, "--eval_tasks and FSDP2 exclude each other"),
        ({}, {"lora": ["text"]}, {}, "--lora and FSDP2 exclude each other"),
        ({}, {}, {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "cpu_ram_efficient_loading must be false"),
        ({}, {}, {"FSDP_VERSION": "1"}, "FSDP version 1 is not for this model"),
    ],
)
def test_what_sharding_rules_out_is_refused_before_data_is_read(
    tmp_path, monkeypatch, of_data, of_training, variables, message
):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    data, args = DataArguments(data="d", **of_data), arguments(tmp_path, eval_strategy="no", **of_training)
    with pytest.raises(SettingsError, match=message):
        check_sharding(data, args)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    check_sharding(data, args)


def test_an_encoder_that_runs_as_often_as_a_rank_has_lengths_is_not_sharded(tmp_path):
    model, _ = tiny_model(tiny_rows(2))
    trainer = {"args": SimpleNamespace(fsdp_plugin_args={}, deepspeed_plugin=None), "model": model}
    trainer |= {"accelerator": SimpleNamespace(unwrap_model=lambda model: model), "is_fsdp_enabled": False}
    trainer |= {"is_deepspeed_enabled": False}
    prepare_for_sharding(SimpleNamespace(**trainer))
    model.config.text_config.model_type = "roberta"
    with pytest.raises(SettingsError, match="type roberta .* would wait for it"):
        prepare_for_sharding(SimpleNamespace(**trainer))


# SLURM

SCRIPT = ROOT / "hub_configs" / "slurm" / "train_many_nodes.sh"


@pytest.mark.parametrize("path", sorted(SCRIPT.parent.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(path):
    run = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == ""


@pytest.fixture
def cluster(tmp_path):
    """Commands of a cluster of two nodes, both of them this machine; `asked` holds what was asked of SLURM."""
    commands = {
        "scontrol": 'echo "scontrol $*" >> "$ASKED"; [ "$1" = requeue ] || echo 127.0.0.1',
        "scancel": 'echo "scancel $*" >> "$ASKED"; kill -USR1 $(cat "$ASKED"-pid-*)',
        "srun": 'for node in 0 1; do SLURM_NODEID=$node "$@" & nodes="${nodes:-} $!"; done; status=0; '
        "for node in $nodes; do wait $node || status=$?; done; exit $status",
        "accelerate": f'exec {sys.executable} -m accelerate.commands.launch "${{@:2}}"',
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, line in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / name).chmod(0o755)
    return folder


def start_job(cluster, tmp_path, *words: str) -> subprocess.Popen:
    variables = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": str(free_port() - 20000), "SLURM_NNODES": "2"}
    variables |= {"SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1", "ASKED": str(tmp_path / "asked")}
    variables |= {"PATH": f"{cluster}:{os.environ['PATH']}", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        ["bash", str(SCRIPT), *words],
        env=environment(**variables),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_two_launchers_meet_and_train_together(cluster, tmp_path):
    write_tiny_split(tmp_path / "split")
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE)
    words = ["--recipe", str(tmp_path / "tiny.yaml"), "--data", str(tmp_path / "split"), "--max_steps", "2"]
    words += ["--output_dir", str(tmp_path / "run"), "--eval_strategy", "no", "--save_strategy", "no"]
    job = start_job(cluster, tmp_path, *words)
    output, _ = job.communicate(timeout=250)
    assert job.returncode == 0, output[-3000:]
    assert "2 processes on cpu, fp32: a step contrasts 8 patients, 4 of each process." in output
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert "requeue" not in (tmp_path / "asked").read_text()


def test_a_job_that_was_told_to_stop_goes_back_into_the_queue(cluster, tmp_path):
    # In place of the launcher: it notes its arguments, and ends with an error when its process has got the signal.
    training = "import os, signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); "
    training += "open(sys.argv[1], 'w').write(f'{os.getpid()} '); time.sleep(150)"
    (cluster / "accelerate").write_text(
        "#!/bin/bash\n"
        f'echo "$@" >> {tmp_path}/launched-$SLURM_NODEID\n'
        'echo $$ > "$ASKED-pid-launcher-$SLURM_NODEID"\n'
        f'{sys.executable} -c "{training}" "$ASKED-pid-$SLURM_NODEID"\n'
        f"touch {tmp_path}/outlived-$SLURM_NODEID\n"
        "exit 1\n"
    )
    job = start_job(cluster, tmp_path, "--recipe", "full_size")
    deadline = time.monotonic() + 120
    told = [tmp_path / f"asked-pid-{node}" for node in (0, 1)]
    while not all(path.exists() and path.read_text() for path in told):  # first the file is there, then the number
        assert time.monotonic() < deadline, "the launchers were not started"
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    asked = (tmp_path / "asked").read_text()
    assert job.returncode == 0 and "scancel --signal=USR1" in asked and "scontrol requeue" in asked, output
    for node in (0, 1):
        assert (tmp_path / f"outlived-{node}").exists(), "the signal ended the launcher"
        words = (tmp_path / f"launched-{node}").read_text()
        assert f"--machine_rank {node}" in words and "--num_machines 2 --num_processes 2" in words
        assert "four_gpus.yaml" in words and words.endswith("--recipe full_size --resume_from_checkpoint auto\n")


def test_a_job_that_fails_by_itself_is_not_started_again(cluster, tmp_path):
    (cluster / "accelerate").write_text("#!/bin/bash\nexit 3\n")
    job = start_job(cluster, tmp_path)
    job.communicate(timeout=30)
    assert job.returncode == 3 and "requeue" not in (tmp_path / "asked").read_text()
