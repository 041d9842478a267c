"""Our models under lm-eval: a `TemplateLM` over the training path and our generation.

Importing this module needs the extra `eval`. `ldalign.evaluation.benchmarks.runner` runs our
benchmarks with it; for any other task of the harness, with lm-eval's own options:

    python -m ldalign.evaluation.benchmarks.harness --model ldalign
        --model_args policy=FOLDER --tasks NAME

Log-probs: a context is computed once for all its continuations, and so is a beginning that many
contexts share, such as few-shot examples: a micro-batch is packed as [prefix | branch | branch ...]
(`ldalign.models.layout.Packed`). No logits are made but the few that `is_greedy` needs.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ldalign import ops
from ldalign.data.tokenizer import Tokenizer, load_tokenizer
from ldalign.evaluation.benchmarks.definitions import no_harness
from ldalign.generation.decoders import Decoder, new_decoder
from ldalign.generation.generate import generate_ids
from ldalign.generation.sampling import Sampling
from ldalign.models.fetch import resolve_model
from ldalign.models.layout import Packed
from ldalign.models.mistral import Mistral
from ldalign.models.weights import load_model
from ldalign.system import distributed
from ldalign.system.errors import InputError
from ldalign.system.metrics import Bar, say
from ldalign.training.batches import deal

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise no_harness(error) from error

MAX_GEN_TOKS = 256  # of a response whose task does not say, as in the harness's own backends
SAMPLING_KWARGS = {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
TokenRequest = tuple[tuple[str, str], list[int], list[int]]  # texts, context ids, continuation ids


@register_model("ldalign")
class HarnessModel(TemplateLM):
    """A model of ours as the harness asks for one.

    model: a Mistral that is whole on every rank, or with `policy` a model folder or name, loaded in
    `dtype` on `device`. micro_tokens: token budget of one forward. batch_rows: responses generated
    at a time. max_length: longest context and continuation together, beyond which the context loses
    its beginning; None: the model's. Raises InputError for an unknown argument.
    """

    def __init__(
        self,
        policy: str | None = None,
        model: Mistral | None = None,
        tokenizer: Tokenizer | None = None,
        dtype: str = "bfloat16",
        device: str | None = None,
        micro_tokens: int = 8192,
        batch_rows: int = 64,
        max_length: int | None = None,
        seed: int = 0,
        **unused: Any,
    ) -> None:
        super().__init__()
        for name in sorted(unused.keys() - {"batch_size", "max_batch_size"}):  # the command line's
            raise InputError(
                f"model_args: {name}: unknown; expected policy, dtype, device, micro_tokens, "
                "batch_rows, max_length or seed"
            )
        if model is None or tokenizer is None:
            if policy is None:
                raise InputError("model_args: policy=FOLDER is missing")
            on_gpu = device is not None and device.startswith("cuda")
            where = distributed.start("cuda" if on_gpu else device or "auto")
            folder = resolve_model(policy, Path.home() / ".cache/ldalign")
            model = cast(Mistral, load_model(folder, getattr(torch, dtype), where))
            tokenizer = load_tokenizer(folder)
        self.model, self.ids_of = model.eval(), tokenizer
        self.micro_tokens, self.batch_rows, self.seed = micro_tokens, batch_rows, seed
        self.max_length = max_length or model.config.max_position_embeddings
        self._device = model.output_weight.device
        self._decoder: Decoder | None = None
        self._truncated = False

    # --------------------------------------------------------------------------------- text and ids

    @property
    def eot_token_id(self) -> int:
        """The first end token that the model declares."""
        return self.ids_of.end_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is read as: BOS, or the end token where there is none."""
        return self.eot_token_id if self.ids_of.bos_id is None else self.ids_of.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The folder's path as a name, for the harness's cache of requests."""
        return str(self.ids_of.folder).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template's text, if one is asked for; ours have one each, unnamed."""
        return self.ids_of.template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation's text; without a generation prompt the last message ends it."""
        text = self.ids_of.render(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encodes a text in which the names of special tokens are these tokens, as in a chat.

        add_special_tokens: whether to put the BOS in front; None: where the model wants one and the
        text has none.
        """
        return self.ids_of.encode_rendered(string, add_special_tokens)

    # ------------------------------------------------------------------------------------ log-probs

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns of each text (the continuation's log-prob, whether it is the greedy one).

        Log-probs are natural logs, summed over tokens. A context may be empty.
        """
        # the harness's own bar for tokenising: as ours, no lines in a file
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Does the work of `loglikelihood` on token ids; results are in the requests' order."""
        scored = [self._cut(context, continuation) for _, context, continuation in requests]
        trees = plan_trees(scored, self.micro_tokens)
        mine: list[int] = []
        values: list[tuple[float, bool]] = []
        plan = deal([tree.tokens for tree in trees], distributed.world_size(), self.micro_tokens)
        share = -(-len(requests) // distributed.world_size())
        with Bar("log-probs", share, "requests") as progress:
            for micro in plan[distributed.rank()]:
                chosen = [trees[t] for t in micro]
                members = [i for tree in chosen for i in tree.members]
                mine += members
                values += self._score(chosen) if chosen else []
                progress(len(members), 0)
        columns = [[logp for logp, _ in values], [flag for _, flag in values]]
        logps, is_greedy = (
            distributed.merge_rows(len(requests), mine, torch.tensor(column, dtype=torch.float64))
            for column in columns
        )
        pairs = zip(logps.tolist(), is_greedy.tolist(), strict=True)
        results = [(logp, bool(flag)) for logp, flag in pairs]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:  # windows of a rolling likelihood have none
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def _cut(self, context: list[int], continuation: list[int]) -> "Scored":
        """Returns the request without what does not fit, the beginning of the context.

        The model reads all but the last id. Raises InputError where a
        continuation is empty or too long.
        """
        if not continuation:
            raise InputError(
                "benchmarks: a continuation has no tokens; every choice of a row needs some text"
            )
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise InputError(
                f"benchmarks: a continuation has {len(continuation)} tokens; the model reads "
                f"{self.max_length}"
            )
        self._tell_truncation(len(context) > room)
        return Scored(tuple(context[-room:]), tuple(continuation))

    def _tell_truncation(self, cut: bool) -> None:
        if cut and not self._truncated:
            self._truncated = True
            most = f"{self.max_length} tokens"
            say(f"benchmarks: WARNING: contexts beyond {most} lose their beginning")

    def _score(self, trees: Sequence["Tree"]) -> list[tuple[float, bool]]:
        """Scores the requests in the trees by one forward, as `loglikelihood` does, in order."""
        ids, parts, rows, targets, lengths = flatten(trees)
        layout = Packed(parts, self.device)
        chosen, wanted = (torch.tensor(values, device=self.device) for values in (rows, targets))

        def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, list[bool]]:
            predicting = hidden.index_select(0, chosen)
            logps = ops.linear_logprob(predicting, weight, wanted)
            return logps, greedy(predicting, weight, wanted, logps, lengths)

        logps, is_greedy = self.model(torch.tensor(ids, device=self.device), layout, head)
        sums = ops.segment_sum(logps, lengths).double().tolist()
        return list(zip(sums, is_greedy, strict=True))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-prob of whole texts, each token once, in windows of the model's length.

        The first token of a text follows the prefix token.
        """
        windows: list[TokenRequest] = []
        counts = []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, 1
            )
            made = [make_disjoint_window(window) for window in rolling]
            windows += [(cast(Any, None), context, continuation) for context, continuation in made]
            counts.append(len(made))
        values = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(values)[0] for _ in range(count)) for count in counts]
        for request, value in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return totals

    # ----------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns texts, each up to the first of its stop strings; greedy without do_sample."""
        self._decoder = self._decoder or new_decoder(self.model)
        arguments = [request.args for request in requests]
        mine = range(distributed.rank(), len(requests), distributed.world_size())
        order = sorted(mine, key=lambda i: (json.dumps(arguments[i][1], sort_keys=True), i))
        texts: dict[int, str] = {}
        with Bar("generate", len(mine), "rows") as progress:
            for _, same in itertools.groupby(order, key=lambda i: arguments[i][1]):
                chosen = list(same)
                texts |= zip(chosen, self._generate(chosen, arguments, progress), strict=True)
        if distributed.world_size() > 1:
            parts: list[dict[int, str]] = [{}] * distributed.world_size()
            dist.all_gather_object(parts, texts)
            texts = {i: text for part in parts for i, text in part.items()}
        for i, argument in enumerate(arguments):
            self.cache_hook.add_partial("generate_until", argument, texts[i])
        return [texts[i] for i in range(len(requests))]

    def _generate(
        self,
        chosen: Sequence[int],
        arguments: Sequence[tuple[str, dict[str, Any]]],
        progress: Callable[[int, int], None],
    ) -> Iterator[str]:
        """Yields the texts of requests that share their settings."""
        sampling = sampling_of(arguments[chosen[0]][1])
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise InputError(
                f"benchmarks: {sampling.max_new_tokens} new tokens leave the model, which reads "
                f"{self.max_length}, no room for a prompt"
            )
        prompts = [self.tok_encode(arguments[i][0]) or [self.prefix_token_id] for i in chosen]
        self._tell_truncation(max(map(len, prompts)) > room)
        assert self._decoder is not None
        responses = generate_ids(
            self._decoder,
            [prompt[-room:] for prompt in prompts],
            [f"benchmark/{i}" for i in chosen],
            self.ids_of.end_ids,
            sampling,
            self.seed,
            self.batch_rows,
            progress,
            # a stop string may name a special token
            decode=lambda ids: self.ids_of.decode(ids, skip_special_tokens=False),
        )
        for response in responses:
            text = self.ids_of.decode(response.ids)
            for stop in sampling.stop:
                text = text.split(stop)[0]
            yield text


def sampling_of(kwargs: dict[str, Any]) -> Sampling:
    """Translates a task's generation settings. Raises InputError for one that we do not have."""
    settings = {key: value for key, value in kwargs.items() if value is not None}
    until = settings.pop("until", [])
    # the harness's, in its order
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    given = [settings.pop(name) for name in names if name in settings]
    unknown = sorted(settings.keys() - SAMPLING_KWARGS)
    if unknown:
        named = ", ".join(unknown)
        raise InputError(
            f"benchmarks: generation_kwargs: {named}: not offered by ldalign's generation"
        )
    sampled = settings.pop("do_sample", settings.get("temperature", 0.0) > 0)
    if not sampled:
        kept = {k: v for k, v in settings.items() if k == "repetition_penalty"}
        settings = {"temperature": 0.0} | kept
    stops = [until] if isinstance(until, str) else until
    new_tokens = int(given[0]) if given else MAX_GEN_TOKS
    return Sampling(new_tokens, stop=tuple(stop for stop in stops if stop), **settings)


# ------------------------------------------------------------------------------------------ packing


@dataclass(frozen=True)
class Scored:
    """A continuation to be scored after its context, in token ids; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def read(self) -> tuple[int, ...]:
        """What the model reads: the last id is only predicted."""
        return self.context + self.continuation[:-1]


@dataclass(frozen=True)
class Tree:
    """Requests whose contexts begin alike: the prefix is computed once, and each goes on there."""

    prefix: tuple[int, ...]
    members: list[int]  # indices of requests
    requests: list[Scored]

    @property
    def branches(self) -> list[tuple[int, ...]]:
        """What the model reads for each request after the prefix; may be empty."""
        return [request.read[len(self.prefix) :] for request in self.requests]

    @property
    def tokens(self) -> int:
        """How many tokens the model reads."""
        return len(self.prefix) + sum(map(len, self.branches))


def plan_trees(requests: Sequence[Scored], budget: int) -> list[Tree]:
    """Puts all requests into trees, by equal contexts or a shared beginning, to save tokens.

    A tree of several contexts has at most `budget` tokens.
    """
    order = sorted(range(len(requests)), key=lambda i: requests[i].context)
    groups = [list(same) for _, same in itertools.groupby(order, key=lambda i: requests[i].context)]
    trees: list[Tree] = []
    run: list[list[int]] = []
    for group in groups:
        longer = _tree(requests, [*run, group])
        # In a run, a context costs what follows the shared beginning, for each continuation.
        own = len(requests[group[0]].context)
        if run and (len(group) * (own - len(longer.prefix)) >= own or longer.tokens > budget):
            trees += _cheaper(requests, run)
            run = []
        run.append(group)
    return trees + (_cheaper(requests, run) if run else [])


def _cheaper(requests: Sequence[Scored], run: list[list[int]]) -> list[Tree]:
    """Returns one tree of all groups, or one of each, whichever reads fewer tokens."""
    apart = [_tree(requests, [group]) for group in run]
    together = _tree(requests, run)
    return [together] if together.tokens < sum(tree.tokens for tree in apart) else apart


def _tree(requests: Sequence[Scored], groups: Iterable[Sequence[int]]) -> Tree:
    members = [i for group in groups for i in group]
    # They are sorted: what the first and the last context share, all share.
    first, last = requests[members[0]].context, requests[members[-1]].context
    both = enumerate(zip(first, last, strict=False))
    shared = next((n for n, (a, b) in both if a != b), min(len(first), len(last)))
    return Tree(first[:shared], members, [requests[i] for i in members])


def flatten(
    trees: Sequence[Tree],
) -> tuple[list[int], list[list[int]], list[int], list[int], list[int]]:
    """Lays trees end to end: (ids, part lengths, rows that predict, targets, targets a request).

    The part lengths are as `Packed` wants them.
    """
    ids: list[int] = []
    parts: list[list[int]] = []
    rows: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    for tree in trees:
        start, shared = len(ids), len(tree.prefix)
        ids += tree.prefix
        parts.append([shared])
        for request, branch in zip(tree.requests, tree.branches, strict=True):
            moved = len(ids) - shared  # of a position in the request to its row, behind the prefix
            first = len(request.context) - 1
            predicting = range(first, first + len(request.continuation))
            rows += [p + (start if p < shared else moved) for p in predicting]
            targets += request.continuation
            lengths.append(len(request.continuation))
            ids += branch
            if branch:
                parts[-1].append(len(branch))
    return ids, parts, rows, targets, lengths


def greedy(
    hidden: Tensor, weight: Tensor, targets: Tensor, logps: Tensor, lengths: Sequence[int]
) -> list[bool]:
    """Says of each segment whether every target is the likeliest token, with few logits.

    hidden (M, D), weight (V, D), targets (M,), logps (M,). Logits are made for the least likely
    target of each segment, and for the others only where that passes.
    """
    starts = list(itertools.accumulate(lengths, initial=0))
    spans = [range(a, b) for a, b in itertools.pairwise(starts)]
    values = logps.tolist()
    worst = [min(span, key=lambda row: values[row]) for span in spans]
    passed = _likeliest(hidden, weight, targets, worst)
    hopeful = zip(spans, worst, passed, strict=True)
    rest = [row for span, low, ok in hopeful if ok for row in span if row != low]
    others = dict(zip(rest, _likeliest(hidden, weight, targets, rest), strict=True))
    return [
        ok and all(others.get(row, True) for row in span)
        for span, ok in zip(spans, passed, strict=True)
    ]


def _likeliest(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Sequence[int]) -> list[bool]:
    """Says whether these rows' targets have the highest logit; of several, the first counts."""
    out: list[bool] = []
    for chunk in torch.tensor(rows, dtype=torch.int64, device=hidden.device).split(64):
        out += ((hidden[chunk] @ weight.T).argmax(-1) == targets[chunk]).tolist()
    return out


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
