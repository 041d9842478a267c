"""Rows as token ids by datasets and transformers: what an SFT script does before it trains."""

import resource
from pathlib import Path
from time import perf_counter

from datasets import load_dataset
from transformers import AutoTokenizer
from worker import Job, Result, main

Batch = dict[str, list[list[dict[str, str]]]]


def dataset_map(job: Job) -> Result:
    """Prompt and whole chat of every row: rendered, and encoded in batches."""
    tokenizer = AutoTokenizer.from_pretrained(Path(job["policy"]))

    def encode(batch: Batch) -> dict[str, list[list[int]]]:
        prompts = [
            tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
            for turns in batch["messages"]
        ]
        chats = [
            tokenizer.apply_chat_template(turns, tokenize=False) for turns in batch["messages"]
        ]
        most = job["max_length"]
        return {
            "prompt": tokenizer(prompts, add_special_tokens=False)["input_ids"],
            "chat": tokenizer(chats, add_special_tokens=False, truncation=True, max_length=most)[
                "input_ids"
            ],
        }

    began = perf_counter()
    rows = load_dataset("json", data_files=job["data"], split="train", cache_dir=job["cache"])
    made = rows.map(
        encode, batched=True, num_proc=job["processes"], remove_columns=rows.column_names
    )
    seconds = perf_counter() - began
    own, others = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "seconds": seconds,
        "cpu": own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime,
        "worker_mib": others.ru_maxrss / 1024,
        "tokens": sum(len(ids) for batch in made.iter(1000) for ids in batch["chat"]),
    }


if __name__ == "__main__":
    main({"dataset_map": dataset_map})
