"""The rest of an iteration of SPIN by TRL's DPOTrainer at its best setting, the samples at hand.

Best on a CPU: float32 weights under bfloat16 autocast, no checkpointing, the reference's log-probs
computed once before training and no second model, rows sorted by length for that, micro-batches of
like lengths, as many pairs in each as is fastest. `padding_free` does nothing in TRL 1.16, and
Liger's kernels want a GPU.
"""

import json
import warnings
from typing import Any

import torch
import transformers
from datasets import Dataset
from held_out import assistant, nll, options, read_rows, user
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    parser = options()
    parser.add_argument("--samples", required=True)
    parser.add_argument("--pairs-at-a-time", type=int, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    rows, samples, heldout = map(read_rows, (args.data, args.samples, args.heldout))

    print("stage: evaluation", flush=True)
    model = AutoModelForCausalLM.from_pretrained(args.policy, dtype=torch.float32)
    nll_before = nll(model, tokenizer, heldout)

    print("stage: reference", flush=True)
    pairs = [
        {
            "prompt": [user(row)],
            "chosen": [assistant(row["response"])],
            "rejected": [assistant(made["response"])],
            "length": len(row["prompt"]) + max(len(row["response"]), len(made["response"])),
        }
        for row, made in zip(rows, samples, strict=True)
    ]
    pairs.sort(key=lambda pair: -pair["length"])
    at_a_time = min(args.pairs_at_a_time, args.global_batch)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": at_a_time,
        "gradient_accumulation_steps": args.global_batch // at_a_time,
        "precompute_ref_log_probs": True,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "group_by_length",
        "remove_unused_columns": False,
        "num_train_epochs": 1,
        "learning_rate": args.learning_rate,
        "beta": args.beta,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(args.out / "trainer"), **settings),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )

    print("stage: training", flush=True)
    trainer.train()

    print("stage: rest", flush=True)
    trainer.save_model(str(args.out / "policy"))
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]

    print("stage: evaluation", flush=True)
    made = {
        "sampled_rows": len(rows),
        "sampled_tokens": sum(sample["tokens"] for sample in samples),
        "steps": trainer.state.global_step,
        "first_loss": losses[0],
        "nll_before": nll_before,
        "nll_after": nll(trainer.model, tokenizer, heldout),
    }
    (args.out / "summary.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
