"""A sentence-embedding model: a text as one vector, and how far two texts lie apart.

The layout of sentence-transformers/all-MiniLM-L6-v2: an encoder and its tokenizer, run by
transformers (extra `reward`), and beside them the files in which sentence-transformers says how the
vectors are made. A vector is the mean over a text's tokens, divided by its length.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldalign.evaluation.transformers_folder import (
    PLAIN_NAME,
    Kind,
    batches,
    check_folder,
    load,
    one_line,
)
from ldalign.objective import cosine_distance
from ldalign.system.errors import InputError
from ldalign.system.memory import OutOfMemory, naming
from ldalign.system.partial_rows import table
from ldalign.system.untrusted import parse_any, read_bytes, read_json

FOLDER_KEY = "judge.folder"
EMBEDDING_MODEL = Kind(
    "an embedding model",
    key=FOLDER_KEY,
    head="AutoModel",
    otherwise=(
        "give a folder with model.safetensors and tokenizer.json, such as all-MiniLM-L6-v2's "
        "(docs/judges.md)"
    ),
    lower="give a smaller embedding model (judge.folder), or device=cpu",
    spare=("pooler.",),  # of BERT's [CLS] token, which no mean needs
)
# What sentence-transformers keeps beside the encoder, and the steps that are known here.
MODULES, SETTINGS, TEXTS = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)
STEPS = ("Transformer", "Pooling", "Normalize")
MEAN = "pooling_mode_mean_tokens"
UNBOUNDED = 10**6  # a tokenizer that knows no longest text says 10**30
TOKENIZED_AT_A_TIME = 1000  # texts: what a tokenizer returns is much larger than they are


class EmbeddingModel:
    """A folder's encoder and tokenizer, float32, in evaluation mode.

    batch_tokens: the most a batch may have, padding counted. `longest` is the most tokens that a
    text may have, of a longer one the end is cut; `width` is D, the length of a vector; `cut` says
    how many different texts of the last call were cut. Raises InputError for a folder that is no
    such model, EnvironmentProblem without transformers, OutOfMemory.
    """

    def __init__(self, folder: Path, device: torch.device, batch_tokens: int = 8192) -> None:
        self.device, self.batch_tokens, self.cut = device, batch_tokens, 0
        with naming_the_key():
            self.tokenizer, self.model = load(folder, device, EMBEDDING_MODEL)
            _check_layout(folder)
            self.tokenizer.padding_side = "right"  # else positions would depend on a text's company
            _check_tokenizer(folder, self.tokenizer, self.model)
            self.longest = _longest(folder, self.tokenizer, self.model)
            self.lower_case = bool(read_json(folder / TEXTS, missing={}).get("do_lower_case"))
            self.width = self._try(folder)

    def embed(
        self,
        texts: Sequence[str],
        ids: Sequence[str] | None = None,
        path: Path | None = None,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> Tensor:
        """Returns each text's vector: (N, D) float32 on the CPU, of length 1.

        That of a text without tokens (an empty one, where the tokenizer adds none of its own) is
        zero. All ranks call it with the same texts and share the work; the batches, and so the
        bits, are the same for any number of ranks. ids: the rows' names in errors; None: their
        numbers. path: as in `partial_rows.table`, for a stage that can be gone on with. Raises
        NumericsError naming a row whose vector is not finite, OutOfMemory.
        """
        vectors = self._table([texts], self.width, lambda vectors: vectors[0], ids, path, progress)
        return vectors.float()

    def distance(
        self,
        a_texts: Sequence[str],
        b_texts: Sequence[str],
        ids: Sequence[str] | None = None,
        path: Path | None = None,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> Tensor:
        """Returns 1 - cos of both texts' vectors, row by row: (N,) float32 on the CPU, in [0, 2].

        It is exactly 0 for equal texts, and the same if a_texts and b_texts change places. The
        other arguments, and what it raises, are those of `embed`.
        """
        return self.distances(a_texts, [b_texts], ids, path, progress)[:, 0]

    def distances(
        self,
        texts: Sequence[str],
        others: Sequence[Sequence[str]],
        ids: Sequence[str] | None = None,
        path: Path | None = None,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> Tensor:
        """Returns `distance` of the texts to each of K others: (N, K) float32 on the CPU.

        others: K lists of N texts. Their order changes nothing but the order of the columns, to
        the bit. Vectors are not kept, distances are: that is what `path` gets.
        """

        def measure(vectors: list[Tensor]) -> Tensor:
            return torch.stack([cosine_distance(vectors[0], v) for v in vectors[1:]], dim=1)

        return self._table([texts, *others], len(others), measure, ids, path, progress).float()

    @torch.no_grad()
    def _table(
        self,
        columns: Sequence[Sequence[str]],
        width: int,
        finish: Callable[[list[Tensor]], Tensor],
        ids: Sequence[str] | None,
        path: Path | None,
        progress: Callable[[int], None],
    ) -> Tensor:
        """(N, width) float64: what `finish` makes of the vectors of K texts a row.

        columns: K lists of N texts. finish: takes K tensors (n, D) float32, returns (n, width).
        """
        rows = list(zip(*columns, strict=True))
        names = range(len(rows)) if ids is None else ids
        sizes = self._sizes({text for row in rows for text in row})

        def work(chunk: Sequence[int]) -> Tensor:
            # By their content, so that no order of rows or columns changes a batch, or a bit.
            texts = sorted({text for i in chunk for text in rows[i] if sizes[text]})
            vectors = torch.zeros(len(texts) + 1, self.width)  # the last one: of no tokens
            for batch in batches([sizes[text] for text in texts], self.batch_tokens):
                vectors[batch] = self._vectors([texts[i] for i in batch])
            at = {text: n for n, text in enumerate(texts)}
            found = [[at.get(column[i], -1) for i in chunk] for column in columns]
            return finish([vectors[places] for places in found])

        def refusal(i: int, value: float) -> str:
            return (
                f"row {names[i]}: the embedding of a text gives {value}; look at its texts and at "
                f"{FOLDER_KEY}"
            )

        largest = [max(sizes[text] for text in row) for row in rows]
        return table(batches(largest, self.batch_tokens), work, width, refusal, path, progress)

    def _vectors(self, texts: Sequence[str]) -> Tensor:
        """(n, D) float32 on the CPU: the vectors of a batch of texts that all have tokens."""
        given = self._tokenize(texts, self.longest, padding=True, return_tensors="pt")
        tokens = tuple(given["input_ids"].shape)
        what = f"embeddings of {tokens[0]} texts of at most {tokens[1]} tokens"
        with naming(lambda: what, EMBEDDING_MODEL.lower):
            given = given.to(self.device)
            states: Tensor = self.model(**given).last_hidden_state
            mask = given["attention_mask"].unsqueeze(-1).to(states.dtype)
            mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
            return F.normalize(mean, dim=1).float().cpu()

    def _sizes(self, texts: set[str]) -> dict[str, int]:
        """{text: tokens, cut ones counted as they are read}; says in `cut` how many those are."""
        ordered, sizes = sorted(texts), dict[str, int]()
        self.cut = 0
        for start in range(0, len(ordered), TOKENIZED_AT_A_TIME):
            some = ordered[start : start + TOKENIZED_AT_A_TIME]
            # One token more than is read shows which texts are longer.
            for text, ids in zip(
                some, self._tokenize(some, self.longest + 1)["input_ids"], strict=True
            ):
                sizes[text] = min(len(ids), self.longest)
                self.cut += len(ids) > self.longest
        return sizes

    def _tokenize(self, texts: Sequence[str], longest: int, **options: Any) -> Any:
        # As sentence-transformers: no space at either end, small letters where it is told so.
        stripped = [text.strip() for text in texts]
        given = [text.lower() for text in stripped] if self.lower_case else stripped
        return self.tokenizer(given, truncation=True, max_length=longest, **options)

    @torch.no_grad()
    def _try(self, folder: Path) -> int:
        """D, of a first text. Raises InputError where the model makes no vector of it."""
        try:
            return self._vectors(["a"]).shape[1]
        except OutOfMemory:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise InputError(
                f"{folder}: gives no vector for each token of a text ({one_line(error)}); is it "
                f"{EMBEDDING_MODEL.name}?"
            ) from None


@contextlib.contextmanager
def naming_the_key() -> Iterator[None]:
    """Puts judge.folder in front of an InputError within it that does not name the key."""
    try:
        yield
    except InputError as error:
        if FOLDER_KEY in str(error):
            raise
        raise InputError(f"{FOLDER_KEY}: {error}") from None


# ------------------------------------------------------------------------------------------- checks


def check_embedding_model(folder: Path) -> None:
    """Raises InputError as `transformers_folder.check_folder` does, and where the files of
    sentence-transformers ask for what is not done here. No weights are read.
    """
    with naming_the_key():
        check_folder(folder, EMBEDDING_MODEL)
        _check_layout(folder)


def _check_layout(folder: Path) -> None:
    """Raises InputError for another pooling than the mean, further layers after it, or a prompt
    before every text.
    """
    for name in _pooling_folders(folder):
        _check_pooling(folder / name / "config.json", folder)
    path = folder / SETTINGS
    prompt = read_json(path, missing={}).get("default_prompt_name")
    if prompt is not None:
        raise InputError(
            f"{path}: default_prompt_name {prompt!r} puts a prompt before every text, which is not "
            "done here; give another model"
        )


def _pooling_folders(folder: Path) -> list[str]:
    """The names of the folders that say how the mean is taken, as modules.json lists them."""
    path, found = folder / MODULES, {"1_Pooling"}
    modules = parse_any(read_bytes(path), path) if path.exists() else []
    try:
        steps = [(str(m["type"]), str(m["path"])) for m in modules]
    except (TypeError, LookupError):
        raise InputError(
            f"{path}: expected a list of steps, each with type and path; download it again"
        ) from None
    for kind, where in steps:
        step = kind.rpartition(".")[2]
        if step not in STEPS:
            raise InputError(
                f"{path}: type {kind!r} is not done here, only {', '.join(STEPS)}; give another "
                "model"
            )
        if step == "Transformer" and where not in ("", "."):
            raise InputError(
                f"{path}: path {where!r} of the Transformer must be '', the folder itself; move "
                "its files there"
            )
        if step == "Pooling" and not PLAIN_NAME.fullmatch(where):
            raise InputError(
                f"{path}: path {where!r} of the Pooling is no plain name of a folder inside it"
            )
        if step == "Pooling":
            found.add(where)
    return sorted(found)


def _check_pooling(path: Path, folder: Path) -> None:
    """Raises InputError where a Pooling's config.json asks for more or else than the mean."""
    for key, value in read_json(path, missing={}, folder=folder).items():
        if key == "pooling_mode":  # newer files give a name, older ones a flag a mode
            mean = value == "mean"
        else:
            mean = not key.startswith("pooling_mode_") or value is (key == MEAN)
        if not mean:
            raise InputError(
                f"{path}: {key} is {value!r}; only the mean over the tokens "
                f"({MEAN}) is taken here; give another model"
            )


def _check_tokenizer(folder: Path, tokenizer: Any, model: Any) -> None:
    """Raises InputError where the model cannot read what the tokenizer makes."""
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"{folder / 'tokenizer_config.json'}: names no pad_token, without which texts cannot "
            "share a batch; give another model"
        )
    last, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if last >= rows:
        raise InputError(
            f"{folder}: tokenizer.json has the token id {last}, the model's embedding {rows} rows; "
            "do they belong together?"
        )


def _longest(folder: Path, tokenizer: Any, model: Any) -> int:
    """The most tokens that a text may have: max_seq_length of sentence_bert_config.json, where it
    is not there the tokenizer's own bound, and never more than the model's positions.

    Raises InputError for a max_seq_length that cannot be, and where nothing bounds a text.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    # RoBERTa and its kin number positions from after the one of padding.
    before = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    if positions is not None and before is not None:
        positions -= before + 1
    path, least = folder / TEXTS, tokenizer.num_special_tokens_to_add() + 1
    most = UNBOUNDED if positions is None else positions
    given = read_json(path, missing={}).get("max_seq_length")
    if given is not None:
        if type(given) is not int or not least <= given <= most:
            raise InputError(
                f"{path}: max_seq_length is {given!r}; it must be an integer from {least} to {most}"
            )
        return given
    bounds = [n for n in (positions, tokenizer.model_max_length) if n is not None and n < UNBOUNDED]
    if not bounds or min(bounds) < least:
        raise InputError(
            f"{folder}: nothing says how long a text may be; give max_seq_length in {TEXTS}"
        )
    return int(min(bounds))
