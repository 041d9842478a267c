"""Sampling alone.

    ldalign generate [--ranks N] policy=FOLDER prompts=FILE output=FOLDER [key=value ...]
    torchrun train/generate.py ...

Answers every prompt of a file ({"prompt": text or messages} or {"messages": [...]}, `id` optional),
`samples` times each, with max_new_tokens and sampling.*, and writes {"id", "sample", "messages",
"response", "finish_reason", "n_tokens"} lines to FOLDER/answers.jsonl; the same seed and id give
the same answers. FOLDER/manifest.json says how they were made. Answers are kept as they come (in
FOLDER.partial), so a run that was cut short is gone on with. `--chat` (`ldalign chat
policy=FOLDER`) talks in the terminal instead; Ctrl-C or Ctrl-D leaves. Without both it samples for
the run's own data, into RUN/iteration_0/responses: a stage of align.py, which goes on from here
with the same settings.
"""

import codecs
import io
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, cast

from ldalign.data.columns import Columns, KeyCounts
from ldalign.data.records import BadRow, json_lines
from ldalign.data.rows import Message
from ldalign.data.shapes import given_id, read_prompt
from ldalign.data.tokenizer import TEMPLATE_DATE, Tokenizer
from ldalign.generation.answers import make_answers
from ldalign.generation.decoders import Decoder, check_weights, new_decoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.generate import text_of
from ldalign.generation.sampling import Response
from ldalign.models.mistral import Mistral
from ldalign.models.weights import context_length, load_model
from ldalign.run.context import (
    Context,
    agree_on_settings,
    choose_dtype,
    named_keys,
    open_policy,
    open_tokenizer,
)
from ldalign.run.manifest import hash_model_folder, hash_settings, run_stage, stage_parents
from ldalign.run.positions import reads, warn_of_answers
from ldalign.run.settings import RunConfig
from ldalign.run.stages.policy import planned_start, start_stage
from ldalign.run.stages.responses import (
    RESPONSES,
    RESPONSES_STAGE,
    new_engine,
    responses_stage,
    sampling_of,
    sampling_parents,
)
from ldalign.system import distributed, exits, interrupt
from ldalign.system.config import positive, setting
from ldalign.system.distributed import on_rank0
from ldalign.system.errors import InputError
from ldalign.system.metrics import Bar, say
from ldalign.train.command import need, read_config, run_script

CHAT = "--chat"
CHAT_DOC = """Talk to a policy in the terminal.

    ldalign chat policy=FOLDER [key=value ...]
    echo "A question" | ldalign chat policy=FOLDER sampling.temperature=0

FOLDER is a model folder, a run, of which the result is taken, or a name. A line in, an answer of
at most max_new_tokens out, drawn with sampling.*; /new forgets what was said, Ctrl-C or Ctrl-D
leaves.
"""
ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class GenerateConfig(RunConfig):
    """The keys of `train/generate.py`: a run's, and three of its own."""

    FOREIGN: ClassVar[Mapping[str, str]] = {
        **RunConfig.FOREIGN,
        "prompt": 'prompts=FILE; a line for each, {"prompt": ...}; ldalign chat reads the terminal',
    }

    prompts: str | None = setting(None, "file of prompts; null: the run's own data", path=True)
    output: str | None = setting(None, "folder for the answers; needed with prompts", path=True)
    samples: int = setting(1, "answers a prompt", check=positive)


def main(argv: list[str]) -> None:
    """Reads the settings, generates."""
    talks = CHAT in argv
    argv = [argument for argument in argv if argument != CHAT]
    config = read_config(argv, CHAT_DOC if talks else __doc__ or "", GenerateConfig)
    if not isinstance(config, GenerateConfig):
        return
    need(
        config.max_new_tokens > 0 or not (talks or config.prompts),
        "max_new_tokens=0: is taken from the run's data, which are not read here; give a number",
    )
    if talks:
        need(
            config.prompts is None and config.output is None,
            "--chat: reads the terminal; leave out prompts and output",
        )
        try:
            chat(config)
        except interrupt.Stopped as stop:
            if stop.number != signal.SIGINT:
                raise
            say("")  # Ctrl-C is a way to leave a chat: nothing to explain, a line to end
            exits.leave(stop.exit_code)
        return
    if config.prompts is None:
        need(
            config.output is None,
            f"output={config.output}: needs prompts=FILE; the run's own answers go to its folder",
        )
        need(
            config.samples == 1,
            f"samples={config.samples}: needs prompts=FILE; a run takes one answer a row",
        )
        run_script(argv, __doc__ or "", responses, planned)
        return
    if config.output is None:
        raise InputError("prompts: needs output=FOLDER, where the answers go")
    prompts = read_prompts(Path(config.prompts), config.data_columns)
    answer(config, prompts, Path(config.output), dry="--dry-run" in argv)


def responses(ctx: Context) -> str:
    """Samples for the run's own data; returns the closing line."""
    responses_stage(ctx, 0, start_stage(ctx))
    return f"The responses: {ctx.run.path / RESPONSES.format(0)}"


def planned(config: RunConfig) -> list[str]:
    """The names of the stages that `responses` makes."""
    return [*planned_start(config), RESPONSES_STAGE.folder(0)]


def answer(
    config: GenerateConfig, prompts: dict[str, list[Message]], output: Path, dry: bool
) -> None:
    """Answers prompts (by id) into the folder `output`; `dry`: stops before weights are read."""
    need(output.parent.is_dir(), f"output={output}: {output.parent} is no folder; make it first")
    need(
        not output.is_file(),
        f"output={output}: is a file; give a folder, for {ANSWERS} and how they were made",
    )
    device = distributed.start(config.device)
    agree_on_settings(config)
    folder = open_policy(config)
    tokenizer = open_tokenizer(config, folder, began(output))
    ids = {name: tokenizer.prompt_ids(messages) for name, messages in prompts.items()}
    named = [(name, n) for name in prompts for n in range(config.samples)]
    # The first answer has the stream of its id alone: asking for more leaves it as it is.
    requests = [
        Request(f"{name}/{n}" if n else name, ids[name], i) for i, (name, n) in enumerate(named)
    ]
    check_prompts(folder, ids, config.max_new_tokens)
    say(
        f"{len(prompts)} prompts, the longest of {max(map(len, ids.values()))} tokens; "
        f"{config.samples} answers each; {device.type}"
    )
    if dry:
        distributed.stop()
        return

    def record(request: Request, r: Response) -> dict[str, Any]:
        name, n = named[request.index]
        text = text_of(tokenizer.decode(r.ids), sampling_of(config))
        return {
            "id": name,
            "sample": n,
            "messages": prompts[name],
            "response": text,
            "finish_reason": r.finish_reason,
            "n_tokens": len(r.ids),
        }

    def make(partial: Path) -> None:
        engine = new_engine(config, requests, tokenizer)
        share = -(-len(requests) // distributed.world_size())
        with Bar("generate", share, "answers", most=config.max_new_tokens) as progress:
            make_answers(
                partial / ANSWERS, requests, open_decoder(config, folder), engine, record, progress
            )

    parents = {
        "policy": hash_model_folder(folder),
        **tokenizer.template_parents,
        "dtype": str(choose_dtype(config, device)),
        "prompts": hash_settings(prompts),
        **named_keys(config, "samples"),
        **sampling_parents(config),
    }
    made = run_stage(output, parents, make, resume=True)
    say(f"{'The answers' if made else 'Answered before'}: {output / ANSWERS}")
    distributed.stop()


def check_prompts(folder: Path, ids: dict[str, list[int]], max_new_tokens: int) -> None:
    """Raises InputError for a prompt (token ids, by name) that fills what the policy in `folder`
    reads; warns where an answer may run past it.
    """
    longest = max(ids, key=lambda name: len(ids[name]))
    positions = context_length(folder)
    need(
        len(ids[longest]) < positions,
        f"prompts: {longest!r} has {len(ids[longest])} tokens, and {reads(folder, positions)}; "
        "shorten it, or leave it out",
    )
    warn_of_answers(folder, len(ids[longest]), max_new_tokens)


def began(output: Path) -> date | None:
    """The day that prompts of answers already there, or begun, give as today's;
    None where they give none.
    """
    day = on_rank0(lambda: stage_parents(output).get(TEMPLATE_DATE))
    try:
        return date.fromisoformat(day) if day else None
    except (TypeError, ValueError):
        return None  # not written by us: run_stage will refuse it by name


def open_decoder(config: RunConfig, folder: Path) -> Decoder:
    """Loads a policy to generate with; `folder` is its model folder."""
    device = distributed.start(config.device)
    dtype, weights = choose_dtype(config, device), config.sampling.weights
    check_weights(weights, device, dtype)
    model = cast(Mistral, load_model(folder, dtype, device))
    return new_decoder(model, release=True, weights=weights)


def chat(config: GenerateConfig) -> None:
    """Holds a conversation: a line in, an answer out as it comes. /new forgets what was said, the
    end of input leaves. A line that makes it longer than the policy reads is left out of it.
    """
    folder = open_policy(config)
    tokenizer = open_tokenizer(config, folder)
    decoder = open_decoder(config, folder)
    positions = context_length(folder)
    need(distributed.world_size() == 1, "--chat: one process is enough; start it without torchrun")
    say("Your turn; /new begins again, Ctrl-D ends.")
    messages: list[Message] = []
    turn = 0
    for line in _lines():
        if line == "/new":
            messages = []
            continue
        prompt = tokenizer.prompt_ids([*messages, {"role": "user", "content": line}])
        if len(prompt) >= positions:
            say(f"The conversation has {len(prompt)} tokens, and {reads(folder, positions)}: /new")
            continue
        messages.append({"role": "user", "content": line})
        request = Request(f"chat/{turn}", prompt)
        turn += 1
        engine = new_engine(config, [request], tokenizer)(decoder)
        messages.append({"role": "assistant", "content": _stream(engine, request, tokenizer)})
    distributed.stop()


def _lines() -> Iterator[str]:
    """What is typed, without empty lines. Bytes that are no character are said to be, and replaced:
    a tokenizer takes no half of one.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Everything that ASCII says, UTF-8 says alike, and a terminal without a locale may send it.
        ascii_only = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if ascii_only else None, errors="replace")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if "\N{REPLACEMENT CHARACTER}" in line:
            say(f"Some bytes of this line are no {sys.stdin.encoding}: each is read as U+FFFD")
        if line.strip():
            yield line.strip()


def _stream(engine: Engine, request: Request, tokenizer: Tokenizer) -> str:
    """Prints one answer as its tokens come; returns it."""
    ids: list[int] = []
    shown = ""

    def show(_: list[Request], tokens: list[int]) -> None:
        nonlocal shown
        ids.extend(tokens)
        text = text_of(tokenizer.decode(ids), engine.sampling)
        # else the rest of a character is still to come
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(shown) :], end="", flush=True)
            shown = text

    for _, response in engine.run([request], show):
        text = text_of(tokenizer.decode(response.ids), engine.sampling)
        print(text[len(shown) :], flush=True)
    return text


def read_prompts(path: Path, columns: Columns | None = None) -> dict[str, list[Message]]:
    """Conversations that end with a user turn, by id (the line number where none is given).

    columns: what is said about the keys. Raises InputError naming file and line.
    """
    columns, counts = columns or Columns(), KeyCounts()
    prompts: dict[str, list[Message]] = {}
    for where, value in json_lines(path, columns):
        try:
            messages = read_prompt(value, columns, counts)
            name = given_id(value, columns) or where.rpartition(":")[2]
        except BadRow as error:
            raise InputError(f"{where}: {error}") from None
        need(
            name not in prompts,
            f"{where}: id {name!r} is given twice; give every prompt an id of its own",
        )
        prompts[name] = messages
    need(bool(prompts), f"{path}: holds no prompts")
    if counts.unknown:
        say(f"prompts: WARNING: keys that are not known, and not read: {', '.join(counts.unknown)}")
    return prompts


if __name__ == "__main__":
    exits.run(main)
