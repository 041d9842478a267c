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
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ldalign import ops
from ldalign.data.tokenizer import Tokenizer, load_tokenizer
from ldalign.evaluation.benchmarks.definitions import no_harness
from ldalign.evaluation.benchmarks.packing import Scored, Tree, flatten, greedy, plan_trees
from ldalign.generation.decoders import Decoder, new_decoder
from ldalign.generation.generate import generate_ids
from ldalign.generation.sampling import Sampling
from ldalign.models.fetch import resolve_model
from ldalign.models.layout import Packed
from ldalign.models.mistral import Mistral
from ldalign.models.weights import load_model
from ldalign.system import distributed, exits
from ldalign.system.errors import InputError, NumericsError
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
    `dtype` (auto: bfloat16 where the device has units for it) on `device` (`open_device`).
    micro_tokens: token budget of one forward. batch_rows: responses generated
    at a time. max_length: longest context and continuation together, beyond which the context loses
    its beginning; None: the model's. Raises InputError for an unknown argument, or one of no use.
    """

    def __init__(
        self,
        policy: str | None = None,
        model: Mistral | None = None,
        tokenizer: Tokenizer | None = None,
        dtype: str = "auto",
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
            if dtype not in ("auto", "bfloat16", "float32"):
                raise InputError(f"model_args: dtype={dtype}: expected auto, bfloat16 or float32")
            where = open_device(device)
            folder = resolve_model(policy, Path.home() / ".cache/ldalign")
            chosen = distributed.auto_dtype(where) if dtype == "auto" else getattr(torch, dtype)
            loaded = load_model(folder, chosen, where)
            if not isinstance(loaded, Mistral):
                raise InputError(f"{folder}: is a GPT-2; give a mistral or llama folder")
            model, tokenizer = loaded, load_tokenizer(folder)
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
        """Returns a conversation's text; without a generation prompt the last message ends it.

        Raises InputError as `Tokenizer.render`, or where the template rewrites the last message.
        """
        text = self.ids_of.render(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        begin = text.rfind(last)
        if begin < 0:
            raise InputError(
                f"{self.ids_of.folder}: chat template: rewrites the turn {_short(last)} that the "
                f"answer goes on from, so that its end cannot be found in {_short(text[-80:])}; "
                "leave out --apply_chat_template, or give a template that keeps the text"
            )
        return text[: begin + len(last)]

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

        Log-probs are natural logs, summed over tokens. A context may be empty. Raises NumericsError
        naming a row whose log-prob is not finite.
        """
        # the harness's own bar for tokenising: as ours, no lines in a file
        quiet = disable_tqdm or not sys.stderr.isatty()
        results = super().loglikelihood(requests, disable_tqdm=quiet)
        _refuse_unsound(requests, [logp for logp, _ in results])
        return results

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
            # windows of a rolling likelihood have no texts
            if texts is not None and math.isfinite(result[0]):
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def _cut(self, context: list[int], continuation: list[int]) -> Scored:
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

    def _score(self, trees: Sequence[Tree]) -> list[tuple[float, bool]]:
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

        The first token of a text follows the prefix token. Raises NumericsError naming a row whose
        log-prob is not finite.
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
        _refuse_unsound(requests, totals)
        for request, value in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return totals

    # ----------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns texts, each up to the first of its stop strings; greedy without do_sample.

        Raises NumericsError naming a row whose logits are not finite.
        """
        self._decoder = self._decoder or new_decoder(self.model)
        arguments = [request.args for request in requests]
        names = [_name(request) for request in requests]
        mine = range(distributed.rank(), len(requests), distributed.world_size())
        order = sorted(mine, key=lambda i: (json.dumps(arguments[i][1], sort_keys=True), i))
        texts: dict[int, str] = {}
        most = max((sampling_of(arguments[i][1]).max_new_tokens for i in mine), default=None)
        with Bar("generate", len(mine), "rows", most=most) as progress:
            for _, same in itertools.groupby(order, key=lambda i: arguments[i][1]):
                chosen = list(same)
                made = self._generate(chosen, arguments, names, progress)
                texts |= zip(chosen, made, strict=True)
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
        names: Sequence[str],
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
            names=[names[i] for i in chosen],
        )
        for response in responses:
            text = self.ids_of.decode(response.ids)
            for stop in sampling.stop:
                text = text.split(stop)[0]
            yield text


def open_device(device: str | None) -> torch.device:
    """Joins the process group; returns this rank's device.

    device: cpu, auto, or cuda, which the harness's command says by itself: where no GPU is there,
    it is the CPU, with a warning. None: auto. Raises InputError for any other.
    """
    name = device or "auto"
    local = os.environ.get("LOCAL_RANK", "0")
    if name not in ("auto", "cpu", "cuda", "cuda:0", f"cuda:{local}"):
        raise InputError(
            f"device={name}: expected auto, cpu or cuda; a process takes the GPU of its rank, and "
            "CUDA_VISIBLE_DEVICES chooses among them"
        )
    on_gpu = name.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        say(f"benchmarks: WARNING: device={name}: there is no GPU here; going on on the CPU")
        on_gpu, name = False, "cpu"
    return distributed.start("cuda" if on_gpu else name)


def _name(request: Instance) -> str:
    """What an error calls a request of the harness."""
    return f"{request.task_name}, row {request.doc_id}"


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else f"{text[:most]}...")


def _refuse_unsound(requests: Sequence[Instance], logps: Sequence[float]) -> None:
    """Raises NumericsError naming the first row whose log-prob is not finite."""
    for request, logp in zip(requests, logps, strict=True):
        if not math.isfinite(logp):
            raise NumericsError(
                f"benchmarks: {_name(request)!r}: the log-prob of its text is {logp}; mend the "
                "model's weights, or give dtype=float32 where they overflow in bfloat16"
            )


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


def main(argv: list[str]) -> None:
    """Runs lm-eval's own command, which knows the model `ldalign` by now."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv[1:] = argv
    try:
        cli_evaluate()
    except (ValueError, FileNotFoundError) as error:  # how the harness refuses its arguments
        if isinstance(error, InputError) or not _is_of_harness(error):
            raise
        raise InputError(f"lm-eval: {error}") from error
    distributed.stop()


def _is_of_harness(error: BaseException) -> bool:
    """Whether lm-eval's own code raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "lm_eval" in Path(trace.tb_frame.f_code.co_filename).parts


if __name__ == "__main__":
    exits.run(main)
