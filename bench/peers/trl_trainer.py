"""TRL's DPOTrainer on given token ids, in its best setting and as a user gets it.

best: weights and optimizer states in bfloat16, no autocast, no checkpointing, the reference's
log-probs precomputed. default: what `DPOTrainer(model="...")` does: float32 weights under autocast,
checkpointing, the reference in memory. liger: the best setting with Liger's kernels in the model's
layers (CUDA).
"""

import time
import warnings
from typing import Any

import torch
import transformers
from datasets import Dataset
from padded import make_model
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer
from worker import Job, Result, main, settle

SETTINGS: dict[str, dict[str, Any]] = {
    "best": {"bf16": False, "gradient_checkpointing": False, "precompute_ref_log_probs": True},
    "default": {},
    "liger": {
        "bf16": False,
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
        "use_liger_kernel": True,
    },
}
OPTIMIZERS = {"adamw": "adamw_torch_fused", "rmsprop": "rmsprop"}  # AdamW: TRL's default


class OnIds(DPOTrainer):
    """The trainer for pairs that are token ids already."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


class Stopwatch(TrainerCallback):
    """Seconds of each optimizer step, from its first product to the zeroed gradients."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.began = device, [], 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        settle(self.device)
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        settle(self.device)
        self.seconds.append(time.perf_counter() - self.began)


def dpo(job: Job) -> Result:
    """One optimizer step a batch, in order; the first warms up."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    pairs = [pair for batch in job["batches"] for pair in batch]
    names = {"prompt_ids": "prompt", "chosen_ids": "real", "rejected_ids": "generated"}
    size = len(job["batches"][0])
    config = DPOConfig(
        output_dir=job["scratch"],
        per_device_train_batch_size=size,
        num_train_epochs=1,
        beta=job["beta"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=1.0,
        optim=OPTIMIZERS[job["optimizer"]],
        weight_decay=0.0,
        max_length=None,
        report_to="none",
        save_strategy="no",
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        logging_steps=1,
        use_cpu=job["device"] == "cpu",
        **SETTINGS[job["setting"]],
    )
    watch = Stopwatch(torch.device(job["device"]))
    trainer = OnIds(
        model=job["folder"] if job["setting"] == "default" else make_model(job, torch.bfloat16),
        args=config,
        train_dataset=Dataset.from_dict(
            {name: [pair[part] for pair in pairs] for name, part in names.items()}
        ),
        processing_class=tokenizer(),
        callbacks=[watch],
    )
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return {"seconds": watch.seconds[1:], "losses": losses}


def tokenizer() -> PreTrainedTokenizerFast:
    """DPOTrainer asks for one, for its padding id."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<eos>": 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )


if __name__ == "__main__":
    main({"dpo": dpo})
