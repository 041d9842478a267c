"""CTranslate2's generation: one padded batch, the beginning that all prompts share computed once.

It reads the policy as its own converter writes it, in float32 or with weights of 8 bits. A prompt's
rows all go on to the full number of new tokens. The first batch warms up.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import takewhile
from pathlib import Path

import ctranslate2
from worker import Job, Result, main

CONVERTER = [sys.executable, "-m", "ctranslate2.converters.transformers"]


def generation(job: Job, compute_type: str = "float32") -> Result:
    """All rows of a batch at once."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "converted"
        # A process of its own: its memory is not the engine's.
        options = [f"--model={job['folder']}", f"--output_dir={folder}"]
        options += ["--quantization=int8"] if compute_type == "int8" else []
        subprocess.run([*CONVERTER, *options], check=True, stdout=subprocess.DEVNULL)
        vocabulary = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        engine = ctranslate2.Generator(
            str(folder), compute_type=compute_type, inter_threads=1, intra_threads=job["threads"]
        )
    every = [prompt for prompts in job["batches"] for prompt in prompts]
    shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*every, strict=False)))
    beginning = every[0][:shared]
    seconds, first = [], []
    for prompts in job["batches"]:
        seen: list[float] = []

        def note(_: object, seen: list[float] = seen) -> bool:
            if not seen:
                seen.append(time.perf_counter())
            return False

        began = time.perf_counter()
        rest = [[vocabulary[i] for i in prompt[shared:]] for prompt in prompts]
        out = engine.generate_batch(
            rest,
            static_prompt=[vocabulary[i] for i in beginning] or None,
            max_length=job["new_tokens"],
            min_length=job["new_tokens"],
            sampling_topk=0,
            sampling_temperature=1.0,
            include_prompt_in_result=False,
            callback=note,
        )
        seconds.append(time.perf_counter() - began)
        first.append(seen[0] - began)
        made = {len(each.sequences_ids[0]) for each in out}
        assert made == {job["new_tokens"]} and len(out) == len(prompts), made
    settings = (
        f"{ctranslate2.__version__}; computes in {engine.compute_type}, one batch, the beginning "
        "of all prompts given as its static prompt"
    )
    return {"seconds": seconds[1:], "first": statistics.median(first[1:]), "settings": settings}


def eight_bits(job: Job) -> Result:
    """The same with weights of 8 bits, and the rows that they are multiplied with rounded to 8."""
    return generation(job, "int8")


if __name__ == "__main__":
    main({"generation": generation, "eight_bits": eight_bits})
