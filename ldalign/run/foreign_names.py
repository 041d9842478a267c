"""Names that people bring from other trainers' settings, each with what is written here.

A text begins with the key as it is given here, `key=` and a placeholder; or with "none: " and why
there is none. VALUE stands for the value that came with the name. A note may follow a semicolon. A
name in several of the trainers stands with the first that has it. Some are ours too: they are here
for a reader, as the key means the same or something else.
"""

_PEFT = "none: LoRA and other adapters are not part of ldalign; all weights are trained"
_BITS = "none: weights of 4 or 8 bits are not trained here; training.master_dtype=bfloat16 and "
_BITS += "training.state_dtype=bfloat16 save memory"
_ATTENTION = "none: the implementation is chosen by the machine, and flash-attn is used on GPUs "
_ATTENTION += "where it is installed"
_SHARDING = "none: FSDP2 shards over all processes (--ranks N, torchrun); "
_SHARDING += "training.shard_ranks=RANKS and training.whole=nothing, gradients or all change how"
_LOGGED = "none: every optimizer step is a line in RUN/metrics.jsonl"
_HUB = "hub.push=OWNER/NAME; the run's result goes there at its end, and each policy is a Hugging "
_HUB += "Face model folder in the run folder"
_WANDB = "log=[wandb]; its own variables name the rest: WANDB_PROJECT, WANDB_NAME, WANDB_ENTITY"
_RANKS = "none: --ranks N starts N processes on this machine, torchrun those of several"
_SINKS = "log=[tensorboard,wandb,trackio], or some of these; RUN/metrics.jsonl has all without them"
_PADDING = "none: rows are always put together without padding, up to training.micro_tokens=TOKENS"
_RESPONSES = "none: a row's response alone is trained on, never its prompt; turns=first, last or "
_RESPONSES += "all says which one"
_WORKERS = "none: rows are prepared once, by all cores, and mapped into memory"
_FIXED = "none: AdamW's betas are 0.9 and 0.999, its epsilon is 1e-8"
_SCRIPT = "none: which script is started says what is done, train/align.py the whole method"

FOREIGN: dict[str, str] = {
    # transformers: TrainingArguments (training_args.py)
    "output_dir": "run=VALUE",
    "overwrite_output_dir": "none: a run folder is gone on with; for a new run give run=FOLDER",
    "resume": "none: the same command again goes on where the run stopped",
    "resume_from_checkpoint": "none: the same command again goes on where the run stopped",
    "run_name": "run=VALUE; the run folder",
    "do_train": _SCRIPT,
    "do_eval": _SCRIPT,
    "per_device_train_batch_size": "training.micro_tokens=TOKENS; a micro-batch is counted in "
    "tokens, and the pairs of a step over all ranks are global_batch=PAIRS",
    "per_device_eval_batch_size": "sampling.batch_rows=VALUE; likelihoods are measured in "
    "batches of training.micro_tokens=TOKENS",
    "gradient_accumulation_steps": "none: it follows from global_batch=PAIRS, those of a step over "
    "all ranks, and training.micro_tokens=TOKENS",
    "auto_find_batch_size": "none: give training.micro_tokens=TOKENS; --dry-run says what memory "
    "it takes",
    "learning_rate": "learning_rate=VALUE; a list: one an iteration",
    "num_train_epochs": "training.epochs=VALUE; of each iteration",
    "max_steps": "training.steps=VALUE; of each iteration",
    "optim": "training.optimizer=adamw or rmsprop",
    "weight_decay": "training.weight_decay=VALUE",
    "adam_beta1": _FIXED,
    "adam_beta2": _FIXED,
    "adam_epsilon": _FIXED,
    "max_grad_norm": "training.max_grad_norm=VALUE",
    "lr_scheduler_type": "training.schedule=constant, linear or cosine",
    "lr_scheduler_kwargs": "none: training.schedule=linear and cosine fall to 0",
    "warmup_ratio": "training.warmup_ratio=VALUE",
    "warmup_steps": "training.warmup_ratio=SHARE; of the steps",
    "bf16": "dtype=bfloat16; of computing, and training.master_dtype=float32 of the weights",
    "fp16": "dtype=bfloat16; or float32, as there is no training in float16",
    "tf32": "none: computing is in dtype=bfloat16 or float32",
    "torch_dtype": "dtype=bfloat16 or float32; of computing (policy_dtype=float32: of the policies "
    "written)",
    "use_cpu": "device=cpu",
    "no_cuda": "device=cpu",
    "seed": "seed=VALUE; of everything random",
    "data_seed": "seed=VALUE; of everything random",
    "full_determinism": "none: everything random follows from seed=N",
    "gradient_checkpointing": "training.checkpointing=full, selective or none",
    "gradient_checkpointing_kwargs": "training.checkpointing=full, selective or none",
    "deepspeed": _SHARDING,
    "fsdp": _SHARDING,
    "fsdp_config": _SHARDING,
    "ddp_timeout": "timeout_minutes=MINUTES",
    "torch_compile": "none: the kernels are ldalign's own; models are not compiled",
    "use_liger_kernel": "none: the kernels are ldalign's own, and the output layer is fused with "
    "the loss",
    "group_by_length": _PADDING,
    "dataloader_num_workers": _WORKERS,
    "remove_unused_columns": "none: keys that are not known are named and left out; columns.prompt="
    "KEY and others name those that are read",
    "label_smoothing_factor": "loss.label_smoothing=VALUE; of pairs, not of tokens",
    "neftune_noise_alpha": "none: no noise is added to embeddings",
    "save_strategy": "checkpoint.steps=STEPS or checkpoint.minutes=MINUTES; these are for going on "
    "after a stop",
    "save_steps": "checkpoint.steps=VALUE; these are for going on after a stop",
    "save_total_limit": "checkpoint.keep=VALUE; at least 2, and each iteration's policy is kept",
    "save_only_model": "none: a policy's folder holds the model alone; checkpoints go when a stage "
    "is finished",
    "eval_strategy": "validation.every=STEPS; every iteration's policy is also measured at its end",
    "evaluation_strategy": "validation.every=STEPS; every iteration's policy is also measured at "
    "its end",
    "eval_steps": "validation.every=VALUE",
    "load_best_model_at_end": "select=best or last",
    "metric_for_best_model": "validation.metric=nll or accuracy",
    "logging_dir": "log=[tensorboard]; it writes into RUN/tensorboard",
    "logging_steps": _LOGGED,
    "logging_strategy": _LOGGED,
    "report_to": _SINKS,
    "disable_tqdm": "none: bars are drawn in a terminal alone",
    "push_to_hub": _HUB,
    "hub_model_id": "hub.push=VALUE; the run's result goes there at its end",
    "hub_private_repo": "hub.private=true or false",
    "hub_token": "none: the token is HF_TOKEN's, or that of `hf auth login`",
    # TRL: ScriptArguments, ModelConfig, SFTConfig, DPOConfig
    "model_name_or_path": "policy=VALUE",
    "model": "policy=VALUE",
    "tokenizer_name": "none: the tokenizer is the one in the policy's folder",
    "ref_model": "reference=iteration or initial; the start of the iteration, or of the run",
    "trust_remote_code": "none: no code from a model's folder is ever run",
    "attn_implementation": _ATTENTION,
    "use_peft": _PEFT,
    "peft": _PEFT,
    "peft_config": _PEFT,
    "lora_r": _PEFT,
    "lora_alpha": _PEFT,
    "lora_dropout": _PEFT,
    "lora_target_modules": _PEFT,
    "load_in_4bit": _BITS,
    "load_in_8bit": _BITS,
    "dataset_name": "data=VALUE; a file, folder, glob, or ORG/NAME:CONFIG:SPLIT on the hub",
    "dataset_config": "data=ORG/NAME:CONFIG:SPLIT",
    "dataset_train_split": "data=ORG/NAME:CONFIG:SPLIT",
    "dataset_test_split": "heldout=ORG/NAME:CONFIG:SPLIT",
    "dataset_text_field": "none: rows are prompts with responses, or conversations; columns.prompt="
    "KEY, columns.response=KEY and columns.messages=KEY name theirs",
    "dataset_num_proc": _WORKERS,
    "max_length": "max_length=VALUE; of prompt and longer response together",
    "max_seq_length": "max_length=VALUE; of prompt and longer response together",
    "max_prompt_length": "none: a prompt may fill all but one token of max_length=TOKENS; "
    "long_prompts=drop, error or truncate says what becomes of longer ones",
    "max_completion_length": "max_new_tokens=VALUE; of sampled responses, the data's are cut by "
    "max_length=TOKENS",
    "truncation_mode": "long_prompts=drop, error or truncate; responses lose their end",
    "packing": _PADDING,
    "padding_free": _PADDING,
    "completion_only_loss": _RESPONSES,
    "assistant_only_loss": _RESPONSES,
    "beta": "beta=VALUE; a list: one an iteration",
    "loss_type": "loss.kind=sigmoid or ipo; for RPO also loss.nll=WEIGHT",
    "label_smoothing": "loss.label_smoothing=VALUE",
    "rpo_alpha": "loss.nll=VALUE",
    "ld_alpha": "none: LD-DPO's length term is another method; loss.length_normalised=true takes "
    "log-probs a token",
    "f_divergence_type": "none: the pull to the reference is the reverse KL's",
    "reference_free": "none: every loss of a pair has a reference",
    "precompute_ref_log_probs": "none: they always are, in the stage reference of each iteration",
    "sync_ref_model": "reference=iteration; where the run's start is not wanted (initial)",
    "disable_dropout": "none: the policy has no dropout",
    "generate_during_eval": "evaluation.samples=N; sampled answers a prompt, of rows that a "
    "program can check (evaluation.answers=all: of every row)",
    "num_generations": "none: ld_align and spin sample one response a prompt, self_reward and "
    "rlaif two",
    "use_vllm": "none: sampling is ldalign's own; responses=FILE takes those of another engine",
    # axolotl: the keys of its YAML (docs/config-reference)
    "base_model": "policy=VALUE",
    "model_type": "none: the architecture is read from config.json in the policy's folder",
    "tokenizer_type": "none: the tokenizer is the one in the policy's folder",
    "special_tokens": "none: they are those of the policy's tokenizer",
    "datasets": "data=FILE or a list of them, and data_shares=[...] for their shares",
    "test_datasets": "heldout=FILE",
    "val_set_size": "heldout_fraction=SHARE, of at most evaluation.rows=ROWS",
    "dataset_prepared_path": "none: prepared rows lie in the run folder, RUN/data",
    "chat_template": "template=FILE; a jinja file, and without it the policy's own",
    "sequence_len": "max_length=VALUE; of prompt and longer response together",
    "sample_packing": _PADDING,
    "pad_to_sequence_len": _PADDING,
    "train_on_inputs": _RESPONSES,
    "micro_batch_size": "training.micro_tokens=TOKENS; a micro-batch is counted in tokens, and the "
    "pairs of a step over all ranks are global_batch=PAIRS",
    "num_epochs": "training.epochs=VALUE; of each iteration",
    "lr_scheduler": "training.schedule=constant, linear or cosine",
    "adapter": _PEFT,
    "flash_attention": _ATTENTION,
    "sdp_attention": _ATTENTION,
    "xformers_attention": _ATTENTION,
    "rl": "method=ld_align, spin, dpo, sft, self_reward or rlaif",
    "rl_beta": "beta=VALUE",
    "evals_per_epoch": "validation.every=STEPS; without it four times a stage",
    "saves_per_epoch": "checkpoint.steps=STEPS; these are for going on after a stop",
    "early_stopping_patience": "validation.early_stop=VALUE",
    "wandb_project": _WANDB,
    "wandb_entity": _WANDB,
    "use_wandb": _WANDB,
    # LLaMA-Factory: src/llamafactory/hparams
    "stage": "method=ld_align, spin, dpo, sft, self_reward or rlaif",
    "finetuning_type": _PEFT,
    "lora_rank": _PEFT,
    "lora_target": _PEFT,
    "adapter_name_or_path": _PEFT,
    "quantization_bit": _BITS,
    "dataset": "data=VALUE; a file, folder, glob, or ORG/NAME:CONFIG:SPLIT on the hub",
    "dataset_dir": "data=FOLDER; or a file in it",
    "eval_dataset": "heldout=VALUE",
    "val_size": "heldout_fraction=SHARE, of at most evaluation.rows=ROWS",
    "template": "template=FILE; a jinja file, not a name, and without it the policy's own",
    "cutoff_len": "max_length=VALUE; of prompt and longer response together",
    "max_samples": "max_rows=VALUE",
    "max_new_tokens": "max_new_tokens=VALUE",
    "overwrite_cache": "none: rows are prepared anew where what they depend on has changed",
    "preprocessing_num_workers": _WORKERS,
    "mask_history": _RESPONSES,
    "train_on_prompt": _RESPONSES,
    "pref_beta": "beta=VALUE",
    "pref_loss": "loss.kind=sigmoid or ipo",
    "pref_ftx": "loss.nll=VALUE",
    "dpo_label_smoothing": "loss.label_smoothing=VALUE",
    "simpo_gamma": "none: SimPO is not part of ldalign; loss.length_normalised=true takes "
    "log-probs a token",
    "reward_model": "reward.model=VALUE; it measures answers, nothing is trained by it",
    "flash_attn": _ATTENTION,
    "rope_scaling": "none: models with rope scaling are not read",
    "pure_bf16": "training.master_dtype=bfloat16 and training.state_dtype=bfloat16",
    "plot_loss": "none: the report at the end has the figures (report=page)",
    "cache_dir": "cache=VALUE; where models and data that are fetched are kept",
    # short names in many scripts
    "lr": "learning_rate=VALUE",
    "batch_size": "global_batch=VALUE; pairs of a step, over all ranks",
    "gpus": "none: --ranks auto starts one process a GPU; gpus=NxGIB goes with --dry-run alone",
    "num_processes": _RANKS,
    "num_gpus": _RANKS,
    "nproc_per_node": _RANKS,
    # SPIN and the alignment handbook: their recipes' YAML
    "dataset_mixer": "data=[FILE, ...]; and data_shares=[...] for their shares",
    "dataset_mixture": "data=[FILE, ...]; and data_shares=[...] for their shares",
    "dataset_splits": "data=ORG/NAME:CONFIG:SPLIT; and heldout=ORG/NAME:CONFIG:SPLIT",
}
