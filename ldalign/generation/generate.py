"""Responses to prompts: the engine (`ldalign.generation.engine`) as two functions."""

from collections.abc import Callable, Sequence

from ldalign.data.rows import Message
from ldalign.data.tokenizer import Tokenizer
from ldalign.generation.answers import longest_first
from ldalign.generation.decoders import Decoder, new_decoder
from ldalign.generation.engine import Engine, Request
from ldalign.generation.sampling import Response, Sampling
from ldalign.models.mistral import Mistral
from ldalign.system.errors import InputError


def generate_ids(
    model: Mistral | Decoder,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    end_ids: Sequence[int],
    sampling: Sampling,
    seed: int,
    batch_rows: int = 64,
    progress: Callable[[int, int], None] = lambda rows, tokens: None,
    decode: Callable[[list[int]], str] | None = None,
    names: Sequence[str] | None = None,
) -> list[Response]:
    """Returns the responses to `prompts` (token ids), in their order, `batch_rows` at a time.

    model: a model gets a decoder for this call, which on a CPU is a second copy of its weights.
    keys: the names of the rows' random streams.
    progress: gets the rows finished, and the tokens made, since it was last called.
    decode: ids to text, needed for stop strings alone.
    names: what an error calls the prompts; None: their keys.

    Raises NumericsError, naming a prompt, for logits that are NaN or infinite.
    """
    if not prompts:
        return []
    requests = longest_first(
        Request(keys[i], prompt, i, names[i] if names else "") for i, prompt in enumerate(prompts)
    )
    longest = len(requests[0].prompt) + sampling.max_new_tokens
    rows = min(batch_rows, len(prompts))
    decoder = new_decoder(model) if isinstance(model, Mistral) else model
    engine = Engine(decoder, sampling, end_ids, seed, longest=longest, rows=rows, decode=decode)
    done: dict[int, Response] = {}
    for request, response in engine.run(requests, lambda _, ids: progress(0, len(ids))):
        done[request.index] = response
        progress(1, 0)
    return [done[i] for i in range(len(prompts))]


def generate(
    model: Mistral,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_rows: int = 64,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
) -> list[str]:
    """Answers conversations: lists of {"role", "content"} that end with the user's turn.

    Returns their texts; a text ends before a stop string. temperature 0 is greedy. The same (seed,
    index in the list) gives the same text whatever `batch_rows`; `ldalign.generation.engine` says
    how far. Raises ValueError for settings out of range, InputError for a prompt longer than the
    model's context, NumericsError for logits that are NaN or infinite.
    """
    sampling = Sampling(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, tuple(stop)
    )
    prompts = [tokenizer.prompt_ids(c) for c in conversations]
    for i, prompt in enumerate(prompts):
        check_context(len(prompt), f"conversation {i}", model.config.max_position_embeddings)
    keys = [str(i) for i in range(len(prompts))]
    responses = generate_ids(
        model, prompts, keys, tokenizer.end_ids, sampling, seed, batch_rows, decode=tokenizer.decode
    )
    return [text_of(tokenizer.decode(r.ids), sampling) for r in responses]


def check_context(tokens: int, where: str, context: int) -> None:
    """Raises InputError naming `where` for a prompt that is longer than the model's context."""
    if tokens > context:
        raise InputError(
            f"{where}: the prompt has {tokens} tokens, and the model was made for {context} "
            "(max_position_embeddings): shorten it, or give a model with a longer context"
        )


def text_of(text: str, sampling: Sampling) -> str:
    """Returns `text` up to the first stop string in it."""
    ends = [text.find(stop) for stop in sampling.stop if stop in text]
    return text[: min(ends)] if ends else text
