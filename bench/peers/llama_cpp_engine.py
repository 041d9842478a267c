"""llama.cpp's generation, by its C interface: all rows in one batch, a cache of its own for each.

It reads the policy's GGUF file, in the job's dtype or 8 bits. A prompt's rows all go on to the full
number of new tokens. The first batch warms up.
"""

import ctypes
import statistics
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
from worker import Job, Result, main

# Its default, float16, is a little faster than bfloat16.
CACHE_TYPES = {"bfloat16": llama_cpp.GGML_TYPE_F16, "float32": llama_cpp.GGML_TYPE_F32}
AT_ONCE = 2048  # tokens of prompts in one call
CELLS = 256  # a row's cache is a multiple of this


class Token(NamedTuple):
    """A token that is put in."""

    id: int
    position: int
    row: int
    last: bool  # of what is there of its row: the next token is drawn


@llama_cpp.llama_log_callback  # type: ignore[misc]
def say_nothing(level: int, text: bytes, data: object) -> None:
    """Its log goes to stderr, hundreds of lines."""


class Engine:
    """A model, a context of `rows` sequences of at most `longest` tokens, and a sampler."""

    def __init__(self, job: Job, rows: int, longest: int, sampler: Any) -> None:
        llama_cpp.llama_log_set(say_nothing, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            job["gguf"].encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max, params.n_ctx = rows, rows * -(-longest // CELLS) * CELLS
        params.n_batch = params.n_ubatch = AT_ONCE
        params.n_threads = params.n_threads_batch = job["threads"]
        params.type_k = params.type_v = CACHE_TYPES[job["dtype"]]
        params.kv_unified = False  # else a row's attention goes over the cells of all
        self.context = llama_cpp.llama_init_from_model(model, params)
        assert self.context, "no context"
        self.sampler = llama_cpp.llama_sampler_chain_init(
            llama_cpp.llama_sampler_chain_default_params()
        )
        llama_cpp.llama_sampler_chain_add(self.sampler, sampler)
        self.batch = llama_cpp.llama_batch_init(AT_ONCE, 0, 1)
        fields = (self.batch.token, self.batch.pos, self.batch.logits, self.batch.n_seq_id)
        views = [np.ctypeslib.as_array(field, (AT_ONCE,)) for field in fields]
        self.ids, self.positions, self.last, sequences = views
        sequences[:] = 1

    def forget(self) -> None:
        """Makes the context empty."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)

    def step(self, tokens: Iterable[Token]) -> dict[int, int]:
        """Puts tokens in, at most AT_ONCE. Returns what is drawn, by row."""
        given = list(tokens)
        n = self.batch.n_tokens = len(given)
        self.ids[:n], self.positions[:n], rows, self.last[:n] = zip(*given, strict=True)
        for i, row in enumerate(rows):
            self.batch.seq_id[i][0] = row
        failed = llama_cpp.llama_decode(self.context, self.batch)
        assert failed == 0, f"llama_decode: {failed}"
        return {
            token.row: llama_cpp.llama_sampler_sample(self.sampler, self.context, i)
            for i, token in enumerate(given)
            if token.last
        }


def generation(job: Job) -> Result:
    """All rows of a batch at once."""
    longest = max(len(prompt) for prompts in job["batches"] for prompt in prompts)
    rows, new = max(map(len, job["batches"])), job["new_tokens"]
    # alone in its chain: the whole distribution at temperature 1
    engine = Engine(job, rows, longest + new, llama_cpp.llama_sampler_init_dist(0))
    seconds, first = [], []
    for prompts in job["batches"]:
        began = time.perf_counter()
        made, firsts = generate(engine, prompts, new)
        seconds.append(time.perf_counter() - began)
        first.append(statistics.mean(firsts) - began)
        assert {len(ids) for ids in made} == {new} and len(made) == len(prompts)
    settings = (
        f"llama-cpp-python {llama_cpp.__version__}, built here for this CPU; one batch, a cache of "
        "its own for each row, in float16 but where it computes in float32, and "
        f"{AT_ONCE} tokens of prompts at once"
    )
    return {"seconds": seconds[1:], "first": statistics.median(first[1:]), "settings": settings}


def generate(
    engine: Engine, prompts: list[list[int]], new_tokens: int
) -> tuple[list[list[int]], list[float]]:
    """Returns every row's new tokens, and when its first was there."""
    engine.forget()
    waiting = [
        Token(token, at, row, at == len(prompt) - 1)
        for row, prompt in enumerate(prompts)
        for at, token in enumerate(prompt)
    ]
    made: dict[int, list[int]] = {}
    firsts: list[float] = []
    for i in range(0, len(waiting), AT_ONCE):
        drawn = engine.step(waiting[i : i + AT_ONCE])
        made |= {row: [token] for row, token in drawn.items()}
        firsts += [time.perf_counter()] * len(drawn)
    for step in range(new_tokens - 1):
        drawn = engine.step(
            Token(ids[-1], len(prompts[row]) + step, row, True) for row, ids in made.items()
        )
        for row, token in drawn.items():
            made[row].append(token)
    return list(made.values()), firsts


if __name__ == "__main__":
    main({"generation": generation})
