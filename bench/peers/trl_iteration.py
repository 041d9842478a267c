"""One iteration of SPIN with TRL's DPOTrainer and transformers' generation.

As a user gets them by their documentation: `generate` in bfloat16 on left-padded batches of prompts
of like lengths, then the trainer with its defaults, float32 weights under bfloat16 autocast,
checkpointing and a reference model beside the policy.
"""

import json
import warnings
from typing import Any

import torch
import transformers
from datasets import Dataset
from held_out import Row, assistant, nll, options, read_rows, user
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

GENERATED_AT_A_TIME = 128
PAIRS_AT_A_TIME = 8


def sample(
    policy: str, tokenizer: PreTrainedTokenizerBase, rows: list[Row], new_tokens: int
) -> tuple[list[str], int]:
    """A response to every row, and the number of tokens of all."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16).eval()
    texts = [""] * len(rows)
    tokens = 0
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["prompt"]))
    for start in range(0, len(order), GENERATED_AT_A_TIME):
        chosen = order[start : start + GENERATED_AT_A_TIME]
        inputs = tokenizer.apply_chat_template(
            [[user(rows[i])] for i in chosen],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        out = model.generate(
            **inputs,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
        )
        for i, ids in zip(chosen, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else None
            texts[i] = tokenizer.decode(ids[:end], skip_special_tokens=True)
            tokens += len(ids[:end])
    return texts, tokens


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    args = options().parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.policy, padding_side="left")
    rows, heldout = read_rows(args.data), read_rows(args.heldout)

    print("stage: evaluation", flush=True)
    start = AutoModelForCausalLM.from_pretrained(args.policy, dtype=torch.float32)
    nll_before = nll(start, tokenizer, heldout)
    del start

    print("stage: sampling", flush=True)
    samples, tokens = sample(args.policy, tokenizer, rows, args.new_tokens)

    print("stage: training", flush=True)
    pairs = [
        {
            "prompt": [user(row)],
            "chosen": [assistant(row["response"])],
            "rejected": [assistant(text)],
        }
        for row, text in zip(rows, samples, strict=True)
    ]
    at_a_time = min(PAIRS_AT_A_TIME, args.global_batch)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": at_a_time,
        "gradient_accumulation_steps": args.global_batch // at_a_time,
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
        model=args.policy,
        args=DPOConfig(output_dir=str(args.out / "trainer"), **settings),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.train()

    print("stage: rest", flush=True)
    trainer.save_model(str(args.out / "policy"))
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]

    print("stage: evaluation", flush=True)
    made = {
        "sampled_rows": len(rows),
        "sampled_tokens": tokens,
        "steps": trainer.state.global_step,
        "first_loss": losses[0],
        "nll_before": nll_before,
        "nll_after": nll(trainer.model, tokenizer, heldout),
    }
    (args.out / "summary.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
