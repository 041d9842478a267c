"""Sampling alone: `torchrun train/generate.py policy=FOLDER prompts=FILE output=FILE [key=value ...]`.

Answers every prompt of a JSON Lines file ({"prompt": text or messages} or {"messages": [...]}, `id` optional) with
max_new_tokens and sampling.*, and writes {"id", "messages", "response", "finish_reason", "n_tokens"} lines; the same
seed and id give the same answer. Without `prompts` it samples for the run's own data instead, into
RUN/iteration_0/responses: a stage of align.py, which goes on from here with the same settings.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ldalign import distributed, errors
from ldalign.command import need, read_config, run_stages
from ldalign.config import setting
from ldalign.data import Message
from ldalign.errors import InputError
from ldalign.generate import Sampling, generate_ids
from ldalign.metrics import say
from ldalign.mistral import Mistral
from ldalign.settings import RunConfig
from ldalign.stages import Bar, Context, choose_dtype, open_policy, responses_stage, start_stage, write_rows
from ldalign.tokenizer import load_tokenizer
from ldalign.weights import load_model


@dataclass(frozen=True)
class GenerateConfig(RunConfig):
    """Two keys more than the other scripts."""

    prompts: str | None = setting(None, "JSON Lines file of prompts; null: the run's own data")
    output: str | None = setting(None, "file for the answers; needed with prompts")


def main(argv: list[str]) -> None:
    """Reads the settings, generates."""
    config = read_config(argv, __doc__ or "", GenerateConfig)
    if not isinstance(config, GenerateConfig):
        return
    if config.prompts is None:
        need(
            config.output is None, f"output={config.output}: needs prompts=FILE; the run's own answers go to its folder"
        )
        run_stages(argv, __doc__ or "", responses, planned)
        return
    if config.output is None:
        raise InputError("prompts: needs output=FILE, where the answers go")
    answer(config, read_prompts(Path(config.prompts)), Path(config.output), dry="--dry-run" in argv)


def responses(ctx: Context) -> str:
    """Samples for the run's data."""
    responses_stage(ctx, 0, start_stage(ctx))
    return f"The responses: {ctx.run.path / 'iteration_0/responses/responses.jsonl'}"


def planned(config: RunConfig) -> list[str]:
    """The stages that takes."""
    return [*(["sft/policy"] if config.sft.epochs else []), "iteration_0/responses"]


def answer(config: GenerateConfig, prompts: dict[str, list[Message]], output: Path, dry: bool) -> None:
    """Answers prompts (by id) into `output`; `dry`: stops before weights are read."""
    need(output.parent.is_dir(), f"output={output}: {output.parent} is no folder; make it first")
    device = distributed.start(config.device)
    folder = open_policy(config)
    tokenizer = load_tokenizer(folder)
    names = list(prompts)[distributed.rank() :: distributed.world_size()]
    ids = [tokenizer.prompt_ids(prompts[name]) for name in names]
    say(f"{len(prompts)} prompts, the longest of {max(map(len, ids), default=0)} tokens; {device.type}")
    if not dry:
        model = cast(Mistral, load_model(folder, choose_dtype(config, device), device))
        s = config.sampling
        sampling = Sampling(config.max_new_tokens, s.temperature, s.top_k, s.top_p)
        with Bar("generate", len(names), "prompts") as progress:
            done = generate_ids(model, ids, names, tokenizer.end_ids, sampling, config.seed, s.batch_rows, progress)
        records = [
            {"id": name, "messages": prompts[name], "response": tokenizer.decode(r.ids),
             "finish_reason": r.finish_reason, "n_tokens": len(r.ids)}
            for name, r in zip(names, done, strict=True)
        ]  # fmt: skip
        partial = output.with_name(f"{output.name}.partial")
        first, step = distributed.rank(), distributed.world_size()
        write_rows(partial, [(first + i * step, record) for i, record in enumerate(records)])
        if distributed.rank() == 0:
            partial.replace(output)
        say(f"The answers: {output}")
    distributed.stop()


def read_prompts(path: Path) -> dict[str, list[Message]]:
    """Conversations that end with a user turn, by id (the line number where none is given).

    Raises InputError naming file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a JSON Lines file (prompts=FILE)") from None
    prompts: dict[str, list[Message]] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}"
            name, messages = _prompt(line, number, where)
            need(name not in prompts, f"{where}: id {name!r} is given twice; give every prompt an id of its own")
            prompts[name] = messages
    need(bool(prompts), f"{path}: holds no prompts")
    return prompts


def _prompt(line: str, number: int, where: str) -> tuple[str, list[Message]]:
    try:
        record: Any = json.loads(line)
        prompt = record.get("prompt", record.get("messages"))
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [{"role": m["role"], "content": m["content"]} for m in messages]
        sound = all(isinstance(text, str) for m in messages for text in m.values()) and messages[-1]["role"] == "user"
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        sound = False
    need(sound, f'{where}: expected {{"prompt": text}} or {{"messages": [...]}} that ends with a user turn')
    return str(record.get("id", number)), messages


if __name__ == "__main__":
    errors.run(main)
