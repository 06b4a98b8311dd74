"""Flags of other programs, and what to write here or what bertdist does instead.

Of run_glue, run_classification and run_glue_no_trainer, TrainingArguments, Lightning's Trainer and
CLI, launchers, and earlier versions. A test holds the list complete. `answer` picks what fits the
command: a flag in an answer is one of its own, or the whole answer is left out.
"""

import re
from collections.abc import Collection

INTERVAL = "takes '200 steps', '0.5 epochs', '10%' or 'never'"
_PREDICT = "bertdist predict --model out --input test.tsv reads rows without labels"
_SETTING = "it is a setting of training"

# Our name -> names that mean the same elsewhere.
_NAMES = {
    "model_name_or_path": "model model_name model_path pretrained_model_name_or_path",
    "output_dir": "default_root_dir save_dir output output_path",
    "validation_file": "eval_file dev_file val_file valid_file",
    "dataset_name": "dataset",
    "train_split": "train_split_name",
    "validation_split": "validation_split_name",
    "label_column": "label_column_name",
    "max_length": "max_seq_length max_seq_len",
    "metrics": "metric_name metric",
    "train_batch_size": "batch_size",
    "num_train_epochs": "epochs num_epochs max_epochs",
    "max_train_steps": "max_steps",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "warmup_ratio": "warmup_proportion",
    "warmup_steps": "num_warmup_steps warmup",
    "max_grad_norm": "gradient_clip_val gradient_clipping clip_grad",
    "seed": "seed_everything",
    "early_stopping_patience": "patience",
    "gradient_checkpointing": "activation_checkpointing",
    "dataloader_num_workers": "num_workers preprocessing_num_workers",
    "use_cpu": "no_cuda cpu",
    "rank_timeout": "ddp_timeout",
    "ddp_comm_hook": "gradient_compression comm_hook",
    "report_to": "logger with_tracking",
    "resume_from_checkpoint": "ckpt_path",
}

# (answer, names)
_ANSWERS = [
    (
        "--train_batch_size is rows per step over all devices",
        "per_device_train_batch_size per_gpu_train_batch_size",
    ),
    (
        "metrics do not depend on a batch size; --tokens_per_micro_batch bounds the memory",
        "per_device_eval_batch_size per_gpu_eval_batch_size eval_batch_size",
    ),
    (
        "--train_batch_size is the whole step; --tokens_per_micro_batch splits it to fit into "
        "memory",
        "gradient_accumulation_steps accumulate_grad_batches",
    ),
    (
        "--tokens_per_micro_batch is chosen from free memory, and halved when memory runs out",
        "auto_find_batch_size auto_scale_batch_size torch_empty_cache_steps",
    ),
    ("nothing is padded; --max_length truncates", "pad_to_max_length"),
    (
        "nothing is padded, so there is nothing to group",
        "group_by_length train_sampling_strategy length_column_name",
    ),
    (
        f"--eval_every {INTERVAL}",
        "evaluation_strategy eval_strategy evaluate_during_training val_check_interval "
        "check_val_every_n_epoch eval_delay eval_on_start num_sanity_val_steps",
    ),
    ("--eval_every takes '200 steps'", "eval_steps"),
    (f"--save_every {INTERVAL}", "save_strategy"),
    ("--save_every takes '200 steps'", "save_steps checkpointing_steps"),
    (f"--log_every {INTERVAL}", "logging_strategy logging_first_step"),
    ("--log_every takes '50 steps'", "logging_steps log_every_n_steps"),
    ("the best weights are always in best/", "load_best_model_at_end"),
    ("it follows from --metric_for_best_model", "greater_is_better"),
    (
        "best/ holds the model alone, checkpoints/ what a resume needs (--save_every)",
        "save_only_model save_on_each_node save_safetensors enable_checkpointing",
    ),
    (
        "SIGTERM, and the end of a SLURM job's time, save a checkpoint (--stop_before_time_limit)",
        "enable_jit_checkpoint max_time",
    ),
    (
        "a resumed run continues exactly where its checkpoint was written",
        "ignore_data_skip restore_callback_states_from_checkpoint",
    ),
    ("choose another --output_dir, or remove the folder", "overwrite_output_dir"),
    ("--freeze embeddings", "freeze_embeds freeze_embeddings"),
    (
        "--freeze encoder trains the head alone",
        "freeze_encoder freeze_base_model freeze_backbone freeze_body freeze_bert freeze_model",
    ),
    (
        "--freeze 4 freezes the embeddings and the first 4 layers",
        "freeze_layers num_frozen_layers freeze_first_n_layers freeze_n_layers unfreeze_layers",
    ),
    ("--mixed_precision fp16", "fp16"),
    ("--mixed_precision bf16", "bf16"),
    ("--mixed_precision takes no, bf16, fp16 or auto", "precision fp8"),
    (
        "--mixed_precision uses torch.autocast",
        "fp16_opt_level fp16_backend half_precision_backend amp_backend amp_level",
    ),
    ("evaluation has the precision of training", "bf16_full_eval fp16_full_eval"),
    ("PyTorch reads TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 from the environment", "tf32"),
    ("bertdist train trains; bertdist predict predicts", "do_train"),
    ("--validation_file is always evaluated", "do_eval"),
    (
        _PREDICT,
        "do_predict predict_file test_split_name max_predict_samples "
        "limit_test_batches limit_predict_batches input text text_pair",
    ),
    (
        "--text_column takes several columns, joined with a space; "
        "--text_pair_column is the second text",
        "text_column_names text_column_delimiter",
    ),
    (
        "only the columns of text and label are read: --text_column, --label_column",
        "remove_columns remove_unused_columns",
    ),
    ("only --train_split and --validation_split are read", "remove_splits"),
    ("--problem_type regression", "do_regression"),
    (
        "the name is --stream_sharding, by_row (was rows) or by_file (was files)",
        "stream_split",
    ),
    (
        "rows are shuffled in every epoch, by --seed",
        "shuffle_train_dataset shuffle shuffle_seed data_seed",
    ),
    ("rows are tokenized while training; there is no cache", "overwrite_cache"),
    (
        "every row is trained once per epoch: nothing is dropped, repeated or dispatched",
        "dataloader_drop_last drop_last accelerator_config dispatch_batches split_batches "
        "use_distributed_sampler reload_dataloaders_every_n_epochs",
    ),
    (
        "--dataloader_num_workers is the only setting of the loaders",
        "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order",
    ),
    (
        "the optimizer is AdamW: --adam_beta1, --adam_beta2, --adam_epsilon, --weight_decay",
        "optim optim_args optim_target_modules optimizer adafactor",
    ),
    ("--lr_scheduler_type takes no further settings", "lr_scheduler_kwargs"),
    ("--max_grad_norm clips the global norm", "gradient_clip_algorithm"),
    ("there is no noise on embeddings; --dropout regularizes", "neftune_noise_alpha"),
    ("--dropout sets all dropout of the model", "hidden_dropout_prob attention_dropout"),
    (
        "the loss is the mean over the rows of the step, on any number of devices",
        "average_tokens_across_devices",
    ),
    (
        "--gradient_checkpointing takes no further settings",
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
    ),
    (
        "--torch_compile compiles the layers, with inductor",
        "torch_compile_backend torch_compile_mode torchdynamo use_liger_kernel "
        "liger_kernel_config jit_mode_eval use_ipex",
    ),
    ("it is for generating text, and bertdist classifies", "use_cache past_index"),
    (
        "the model is kept whole on every device (DDP), with NCCL on GPUs and gloo on CPUs",
        "fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap deepspeed "
        "sharded_ddp parallelism_config mp_parameters strategy sync_batchnorm ddp_backend "
        "xpu_backend ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_static_graph ray_scope",
    ),
    (
        "devices and processes are the launcher's: accelerate launch --num_processes 2, or "
        "`bertdist train --processes 2`",
        "num_processes num_machines machine_rank main_process_ip main_process_port multi_gpu "
        "gpu_ids gpus gpu n_gpu device devices num_nodes accelerator nproc_per_node nnodes "
        "config_file",
    ),
    ("start it with torchrun or accelerate launch, which set LOCAL_RANK", "local_rank"),
    (
        "bertdist runs on CPUs and on CUDA or ROCm GPUs",
        "use_mps_device tpu_num_cores tpu_cores tpu_metrics_debug",
    ),
    (
        "every row is evaluated once, and --metrics get all of them",
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object inference_mode "
        "eval_accumulation_steps include_for_metrics include_inputs_for_metrics batch_eval_metrics",
    ),
    (
        "only rank 0 prints, and the progress bar is for terminals",
        "log_level log_level_replica log_on_each_node disable_tqdm enable_progress_bar "
        "enable_model_summary weights_summary",
    ),
    ("--on_nan says what becomes of such a step", "logging_nan_inf_filter"),
    (
        "metrics.jsonl holds it",
        "include_num_input_tokens_seen include_tokens_per_second skip_memory_metrics",
    ),
    (
        "the run's files, metrics.jsonl and those of --report_to, are in --output_dir",
        "logging_dir log_dir",
    ),
    (
        "trackers of --report_to read such settings from the environment, such as TRACKIO_SPACE_ID",
        "trackio_space_id trackio_bucket_id trackio_static_space_id "
        "enable_autolog_hparams model_registry",
    ),
    (
        "--push_to_hub takes the name of the repository, owner/name",
        "hub_model_id push_to_hub_model_id push_to_hub_organization",
    ),
    (
        "--push_to_hub uploads the best weights after the run, to a private repository; "
        "`bertdist push` has more settings",
        "hub_private_repo hub_strategy hub_always_push hub_revision",
    ),
    ("run `hf auth login`, or set HF_TOKEN", "token hub_token use_auth_token push_to_hub_token"),
    ("set HF_HOME, or HF_HUB_CACHE", "cache_dir"),
    ("code of a model's folder is never run", "trust_remote_code"),
    ("the config is that of --model_name_or_path", "config_name"),
    ("--tokenizer_name names a tokenizer", "use_fast_tokenizer use_slow_tokenizer tokenizer"),
    ("a head of another size is drawn anew", "ignore_mismatched_sizes"),
    ("a run is a function of --seed", "full_determinism deterministic benchmark"),
    (
        "--max_train_samples, --max_eval_samples and --max_train_steps make a short run, "
        "--dry_run none",
        "fast_dev_run overfit_batches limit_train_batches limit_val_batches barebones",
    ),
    (
        "a run ends after --num_train_epochs or --max_train_steps, or by --early_stopping_patience",
        "min_epochs min_steps",
    ),
    ("there are no callbacks; the parts of bertdist.train are a Python API", "callbacks plugins"),
    ("--detect_anomaly names the operation that makes a NaN", "debug profiler"),
    ("give --learning_rate", "auto_lr_find"),
    ("checkpoints hold tensors and JSON only", "weights_only"),
    ("--dry_run prints the plan, and config.yaml holds every setting", "print_config"),
]

_PREDICT_ANSWERS = [
    ("the name is --model", "model_name_or_path model_name model_path checkpoint ckpt_path"),
    (
        "the name is --input",
        "train_file validation_file test_file predict_file input_file file data",
    ),
    ("the name is --output", "output_dir output_file predictions_file"),
    ("the name is --text", "texts"),
    ("the tokenizer is the model's own", "tokenizer_name tokenizer"),
    (
        "predictions do not depend on a batch size; --tokens_per_micro_batch bounds the memory",
        "batch_size per_device_eval_batch_size eval_batch_size train_batch_size",
    ),
    ("a row that cannot be read is an error: predictions are one line per row", "on_bad_row"),
]


def _by_name(answers: list[tuple[str, str]]) -> dict[str, str]:
    return {name: answer for answer, names in answers for name in names.split()}


TRAIN_ANSWERS = _by_name([*((f"the name is --{ours}", x) for ours, x in _NAMES.items()), *_ANSWERS])
PREDICT_ANSWERS = _by_name(_PREDICT_ANSWERS)


def answer(name: str, names: Collection[str], train_names: Collection[str]) -> str | None:
    """What to say of an unknown flag, None if nothing is known of it.

    names: the settings of the command; train_names: those of training. A prefix that ends in a dot,
    as in Lightning's `trainer.max_epochs`, is ignored.
    """
    name = name.rpartition(".")[2]
    if "input" in names and name in PREDICT_ANSWERS:
        return PREDICT_ANSWERS[name]
    if name in names:
        return f"the name is --{name}"
    found = TRAIN_ANSWERS.get(name)
    if found is None:
        return _SETTING if name in train_names else None
    if "bertdist " in found or "accelerate launch" in found:  # the flags are of that command
        return found
    return found if {*re.findall(r"--(\w+)", found)} <= {*names} else _SETTING
