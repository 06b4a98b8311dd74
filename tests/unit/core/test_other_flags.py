"""Every flag that users of other programs write has an answer, and no answer is a wrong name."""

import dataclasses
import re

import pytest
from transformers import TrainingArguments

from bertdist.core import other_flags
from bertdist.core.args import read_config, read_predict_config
from bertdist.core.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PredictConfig,
    RunConfig,
    TaskConfig,
)
from bertdist.core.errors import ConfigError
from bertdist.data_quality.config import read_check_config

SECTIONS = [ModelConfig, DataConfig, TaskConfig, BatchConfig, OptimConfig, RunConfig]
OURS = {field.name for section in SECTIONS for field in dataclasses.fields(section)}
PREDICTION = {field.name for field in dataclasses.fields(PredictConfig)}

SCRIPTS = (  # run_glue, run_classification and run_glue_no_trainer of transformers' examples
    "task_name dataset_name dataset_config_name do_regression text_column_names "
    "text_column_delimiter train_split_name validation_split_name test_split_name remove_splits "
    "remove_columns label_column_name max_seq_length preprocessing_num_workers overwrite_cache "
    "pad_to_max_length shuffle_train_dataset shuffle_seed max_train_samples max_eval_samples "
    "max_predict_samples metric_name train_file validation_file test_file model_name_or_path "
    "config_name tokenizer_name cache_dir use_fast_tokenizer model_revision token use_auth_token "
    "trust_remote_code ignore_mismatched_sizes max_length use_slow_tokenizer "
    "per_device_train_batch_size per_device_eval_batch_size learning_rate weight_decay "
    "num_train_epochs max_train_steps gradient_accumulation_steps lr_scheduler_type "
    "num_warmup_steps output_dir seed push_to_hub hub_model_id hub_token checkpointing_steps "
    "resume_from_checkpoint with_tracking report_to"
)
EARLIER = (  # TrainingArguments of transformers 4
    "evaluation_strategy group_by_length warmup_ratio logging_dir no_cuda overwrite_output_dir "
    "use_mps_device half_precision_backend fp16_opt_level fp16_backend tpu_num_cores past_index "
    "jit_mode_eval use_ipex ray_scope dispatch_batches split_batches include_tokens_per_second "
    "adafactor per_gpu_train_batch_size per_gpu_eval_batch_size save_safetensors torchdynamo "
    "sharded_ddp include_inputs_for_metrics mp_parameters push_to_hub_model_id "
    "push_to_hub_organization push_to_hub_token xpu_backend fsdp_min_num_params "
    "fsdp_transformer_layer_cls_to_wrap tpu_metrics_debug evaluate_during_training"
)
LIGHTNING = (  # Trainer of Lightning 2 and 1, and its CLI
    "accelerator strategy devices num_nodes precision logger callbacks fast_dev_run max_epochs "
    "min_epochs max_steps min_steps max_time limit_train_batches limit_val_batches "
    "limit_test_batches limit_predict_batches overfit_batches val_check_interval "
    "check_val_every_n_epoch num_sanity_val_steps log_every_n_steps enable_checkpointing "
    "enable_progress_bar enable_model_summary accumulate_grad_batches gradient_clip_val "
    "gradient_clip_algorithm deterministic benchmark inference_mode use_distributed_sampler "
    "profiler detect_anomaly barebones plugins sync_batchnorm reload_dataloaders_every_n_epochs "
    "default_root_dir enable_autolog_hparams model_registry gpus tpu_cores auto_lr_find "
    "auto_scale_batch_size weights_summary amp_backend amp_level seed_everything ckpt_path "
    "print_config weights_only model optimizer lr_scheduler"
)
LAUNCHERS = (
    "num_processes num_machines machine_rank main_process_ip main_process_port multi_gpu gpu_ids "
    "cpu config_file nproc_per_node nnodes local_rank deepspeed"
)
EVERYDAY = (
    "lr epochs batch_size num_workers optimizer scheduler patience warmup device fp8 dataset "
    "val_file dev_file model_name shuffle drop_last logging_strategy run_name"
)
ELSEWHERE = {
    *(field.name for field in dataclasses.fields(TrainingArguments)),
    *" ".join([SCRIPTS, EARLIER, LIGHTNING, LAUNCHERS, EVERYDAY]).split(),
}


@pytest.mark.parametrize("name", sorted(ELSEWHERE - OURS))
def test_a_flag_of_another_program_has_an_answer(name: str) -> None:
    assert other_flags.answer(name, OURS, OURS) is not None


def test_the_control_a_name_of_no_program_has_none() -> None:
    assert other_flags.answer("no_such_flag", OURS, OURS) is None
    assert len(ELSEWHERE - OURS) > 150


def test_answers_name_real_flags_and_no_flag_of_ours_has_one() -> None:
    assert not OURS & other_flags.TRAIN_ANSWERS.keys()
    assert not PREDICTION & other_flags.PREDICT_ANSWERS.keys()
    for table, known in (
        (other_flags.TRAIN_ANSWERS, OURS | {"model", "input"}),
        (other_flags.PREDICT_ANSWERS, PREDICTION),
    ):
        for found in table.values():
            named = set(re.findall(r"--(\w+)", found.partition("accelerate launch")[0]))
            assert named <= known, found


def test_no_name_has_two_answers() -> None:
    for answers in (other_flags._ANSWERS, other_flags._PREDICT_ANSWERS):
        names = [name for _, listed in answers for name in listed.split()]
        assert len(set(names)) == len(names)
    ours = [name for names in other_flags._NAMES.values() for name in names.split()]
    assert not {*ours} & {name for _, listed in other_flags._ANSWERS for name in listed.split()}


NEEDED = ["--model_name_or_path=m", "--train_file=t.tsv", "--output_dir=o"]


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("deepspeed", "the model is kept whole on every device (DDP), with NCCL on GPUs and gloo"),
        ("trackio_space_id", "trackers of --report_to read such settings from the environment"),
        ("logging_strategy", "--log_every takes '200 steps'"),
        ("max_seq_length", "the name is --max_length."),
        ("predict_file", "bertdist predict --model out --input test.tsv"),
        ("trainer.max_epochs", "the name is --num_train_epochs."),
        ("model.learning_rate", "the name is --learning_rate."),
        ("local-rank", "start it with torchrun or accelerate launch"),
        ("output", "the name is --output_dir."),
        ("input", "bertdist predict --model out"),
    ],
)
def test_a_training_run_answers(flag: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config([*NEEDED, f"--{flag}=1"])
    assert str(caught.value).startswith(f"Unknown setting --{flag}: {line}")


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("batch_size", ": predictions do not depend on a batch size; --tokens_per_micro_batch"),
        ("model_name_or_path", ": the name is --model."),
        ("test_file", ": the name is --input."),
        ("output_dir", ": the name is --output."),
        ("learning_rate", ": it is a setting of training."),
        ("lr", ": it is a setting of training."),
        ("max_seq_length", ": the name is --max_length."),
        ("run_name", ": it is a setting of training."),
        ("seed", ": it is a setting of training."),
        ("modle", ". Did you mean --model?"),
        ("colour", ". --help lists them."),
    ],
)
def test_a_prediction_answers(flag: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_predict_config(["--model=m", "--text", "a", f"--{flag}=1"])
    assert str(caught.value).startswith(f"Unknown setting --{flag}{line}")


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("learning_rate", ": it is a setting of training."),
        ("trian_file", ". Did you mean --train_"),
    ],
)
def test_a_check_answers(flag: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_check_config(["--train_file=t.tsv", f"--{flag}=1"])
    assert str(caught.value).startswith(f"Unknown setting --{flag}{line}")


@pytest.mark.parametrize("name", ["deepspeed", "logging_strategy", "gpu"])
def test_a_weak_resemblance_is_no_suggestion(name: str) -> None:
    """What was suggested for these before they had answers: seed, column_names, learning_rate."""
    with pytest.raises(ConfigError) as caught:
        read_config([*NEEDED, f"--x{name}=1"])
    assert "Did you mean" not in str(caught.value)
