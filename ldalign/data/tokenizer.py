"""Tokenizer, chat template, and how a conversation becomes prompt and response ids.

`tokenizers` reads tokenizer.json and `jinja2` renders the chat template
(`ldalign.data.chat_text`), with the settings of transformers, so that the ids are those of its
`apply_chat_template(tokenize=True)`. Three things are stricter:

- Text is never control. A message that contains `</s>` or `<|im_end|>` has these characters encoded
  as text; only the template itself writes control tokens.
- The ids begin with exactly one BOS whenever the model uses one, also if the template leaves it out
  (Zephyr's does).
- The prompt of a row has the ids that generation starts from, whatever the answer begins with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tokenizers

from ldalign.data.chat_text import ChatText, Marked, PairText, boundary, stand_in
from ldalign.data.records import BadRow
from ldalign.data.tokenizer_files import (
    DEFAULT_TEMPLATE,
    TEXT_TOKEN,
    add,
    library_error,
    like,
    read_backend,
    read_settings,
    read_templates,
    read_tokenizer_json,
    special_names,
)
from ldalign.system.errors import InputError
from ldalign.system.untrusted import read_json

if TYPE_CHECKING:
    from ldalign.data.rows import Message, Row

# A key of a stage's manifest, there where the chat template asks for the date.
TEMPLATE_DATE = "template's date"
# What an encoding may begin with so that the text behind it is encoded as in the middle of one.
ANCHORS = ("", "\n", ".", "a", "0")
TAILS = 1000  # ends of prompts whose ids are remembered; a template has one or two


class PairIds(NamedTuple):
    """The token ids of one row.

    `prompt` ends where generation starts; `response` ends with its one end token.
    """

    prompt: list[int]
    response: list[int]


class Tokenizer:
    """The tokenizer and chat template of one model folder; made by `load_tokenizer`.

    folder: its path.
    bos_id: the BOS that every prompt starts with, None if the model uses none.
    end_ids: every declared end token (generation_config.json, config.json, tokenizer_config.json,
        in this order).
    template: the chat template, "" if there is none.
    template_called: what messages call it where it is not the folder's own; else None.
    template_hash: its sha256, hex.
    today: the date for a template that asks for it.
    vocab_size: the highest token id + 1.
    """

    def __init__(
        self,
        folder: Path,
        template: str | None = None,
        today: date | None = None,
        template_called: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        settings = read_settings(self.folder)
        if template is None:
            template = read_templates(self.folder, settings).get(DEFAULT_TEMPLATE, "")
        self.template = template
        self.template_hash = hashlib.sha256(self.template.encode("utf-8")).hexdigest()
        self.today = today or date.today()
        self._names = special_names(settings, self.folder / "tokenizer_config.json")
        self.template_called = template_called
        self._chat = ChatText(self.folder, self.template, self.today, self._names, template_called)

        description = read_tokenizer_json(self.folder, settings)
        self._plain = read_backend(description, self.folder)  # decodes
        ids = self._plain.get_vocab(with_added_tokens=True).values()
        self.vocab_size = 1 + max(ids, default=-1)
        self.bos_id = self._named_id("bos_token")
        self.end_ids = self._declared_ends()
        self.adds_bos = self._adds_bos(settings)
        self._check_size()

        control = self._control_tokens(description["added_tokens"])
        self._chat.set_control(control)
        self._literal, self._real_id = self._make_literal(  # encodes
            description["added_tokens"], control
        )
        highest = max([self.vocab_size, *self._real_id])
        self._is_stand_in = _flags(self._real_id, highest)
        self._forbidden = _flags(set(self._real_id.values()) - {self._unknown_id(), -1}, highest)
        self._tails: dict[str, list[int]] = {}

    @property
    def template_parents(self) -> dict[str, str]:
        """What a rendering depends on beside the messages, for a stage's manifest."""
        return {"template": self.template_hash, **_date_parent(self.template, self.today)}

    # --------------------------------------------------------------------------------- text and ids

    def encode(self, text: str) -> list[int]:
        """Returns the ids of plain text.

        No BOS or EOS is added, and the text of special tokens stays text. Raises InputError for a
        tokenizer that makes a control token of ordinary text.
        """
        return self._real(self._batch([text])[0])[0]

    def encode_rendered(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Returns the ids of a text in which special tokens are written by name.

        A rendered template is one, or a benchmark's prompt. Only for text that may do so: what a
        person wrote goes through `encode`. add_bos: put the BOS in front; None: where the model
        uses one and the text does not begin with it.
        """
        ids = self._with_special(text, add_special_tokens=False)
        if add_bos is None:
            add_bos = self.adds_bos and ids[:1] != [self.bos_id]
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def _with_special(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self._plain.encode(text, add_special_tokens=add_special_tokens).ids
        # A broken model fails only here: one without the unknown token that it names, say.
        except BaseException as error:
            raise library_error(self.folder, error) from error

    def _batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of marked texts, the library's threads side by side; stand-ins are ids too."""
        try:
            encodings = self._literal.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:
            raise library_error(self.folder, error) from error
        return [encoding.ids for encoding in encodings]

    def _real(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """The ids with the control tokens' own in place of their stand-ins', and where these are.

        Raises InputError where ordinary text has become a control token.
        """
        array = np.asarray(ids, dtype=np.int64)
        # It can happen with Unigram vocabularies, which hold "</s>" as a piece.
        if self._forbidden[array].any():
            token = self._plain.id_to_token(int(array[self._forbidden[array]][0]))
            raise InputError(
                f"{self.folder}: the tokenizer turns ordinary text into the control token {token!r}"
            )
        places: list[int] = np.flatnonzero(self._is_stand_in[array]).tolist()
        for place in places:
            ids[place] = self._real_id[ids[place]]
        return ids, places

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`."""
        return self._plain.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def piece(self, ids: Sequence[int]) -> str:
        """Returns what a token stands for, or several that are parts of one character, for a person
        to read: the text with the space it begins with, or where there is none the token's name.
        """
        name = self._plain.id_to_token(ids[0]) or f"<{ids[0]}>"
        if name.startswith("\u2581"):  # SentencePiece's space, which its decoder drops
            return name.replace("\u2581", " ")
        return self.decode(ids, skip_special_tokens=False) or name

    # -------------------------------------------------------------------------------- conversations

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Returns the conversation as the chat template writes it.

        Raises InputError when there is no template, or it refuses or fails.
        """
        return self._chat.render(messages, add_generation_prompt)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of `messages` up to where the assistant's answer begins.

        They have one BOS if the model uses one. Raises InputError as `render`, or for a template
        that leaves the assistant's header to the answer.
        """
        return self._with_bos(self.encode(self._chat.prompt(messages).text))

    def pair_ids(self, row: Row) -> PairIds:
        """Returns the prompt and response ids of `row`, as `pairs_ids` does for many.

        Raises InputError, naming where the row is from, for a bad one.
        """
        pair = self.pairs_ids([row])[0]
        if isinstance(pair, BadRow):
            raise InputError(f"{row.where}: {pair}" if row.where else f"{self.folder}: {pair}")
        return pair

    def pairs_ids(self, rows: Sequence[Row]) -> list[PairIds | BadRow]:
        """Returns the prompt and response ids of each row, in one batch of the library's threads.

        The prompt's ids are those that `prompt_ids` gives for the history. The response is what
        the template writes after it, encoded with it where that leaves the prompt's ids as they
        are and by itself where it does not, cut right after its first end token. For a row that
        the template refuses, or of which it leaves out a part, there is the BadRow that says so.

        Raises InputError for what is wrong with every row: no template, or a hostile one, no
        generation prompt, two BOS, a tokenizer that fails.
        """
        texts: list[PairText | BadRow] = []
        for row in rows:
            try:
                texts.append(self._chat.pair(row))
            except BadRow as bad:
                texts.append(bad)
        good = [text for text in texts if not isinstance(text, BadRow)]
        encoded = iter(self._batch([pair.prompt.text + pair.answer.text for pair in good]))
        return [
            text if isinstance(text, BadRow) else self._pair(text, next(encoded)) for text in texts
        ]

    def _pair(self, pair: PairText, whole: list[int]) -> PairIds | BadRow:
        """The ids of one row, from those of its whole text."""
        whole, places = self._real(whole)
        prompt = self._prompt_of(pair, whole, places)
        if whole[: len(prompt)] == prompt:
            response = whole[len(prompt) :]
        else:
            after = self._after(pair, prompt, whole)
            if after is None:
                return BadRow(
                    "the answer cannot be encoded after its prompt, whose last token would take in "
                    "its beginning; does it begin with white space or a mark that joins?"
                )
            response = after
        ends = [response.index(end) for end in self.end_ids if end in response]
        if not ends:
            called = self.template_called or f"the chat template of {self.folder}"
            return BadRow(
                f"{called} ends an answer without an end token "
                f"({', '.join(map(self._show, self.end_ids))}); add the id it does write to "
                "eos_token_id in generation_config.json"
            )
        return PairIds(self._with_bos(prompt), response[: min(ends) + 1])

    def _prompt_of(self, pair: PairText, whole: list[int], places: list[int]) -> list[int]:
        """The ids of a row's prompt, as they are without an answer.

        A control token parts what is before it from what is after it: of a prompt that was encoded
        with its answer, only what follows the last control token can differ.
        """
        prompt, answer = pair
        # A stand-in that the library did not find (a token for single words) would break the count.
        if not prompt.tokens or len(places) != prompt.tokens + answer.tokens:
            return self.encode(prompt.text)
        return whole[: places[prompt.tokens - 1]] + self._tail_ids(prompt)

    def _tail_ids(self, prompt: Marked) -> list[int]:
        """The ids of a prompt's end, from its last control token on; most rows share one."""
        tail = prompt.tail
        if tail not in self._tails:
            if len(self._tails) >= TAILS:
                self._tails.clear()
            self._tails[tail] = self.encode(tail)
        return self._tails[tail]

    def _after(self, pair: PairText, prompt: list[int], whole: list[int]) -> list[int] | None:
        """The ids of an answer that stands behind `prompt`, where encoding both would join them.

        Encoded behind an anchor, because a tokenizer may begin a text with a space of its own;
        the first that reads as the whole does is right. None if none does.
        """
        wanted = self.decode(whole, skip_special_tokens=False)
        for anchor in ANCHORS:
            lead = self._batch([boundary() + anchor])[0]
            ids = self._batch([boundary() + anchor + pair.answer.text])[0]
            if ids[: len(lead)] != lead:
                continue
            response = self._real(ids)[0][len(lead) :]
            if self.decode(prompt + response, skip_special_tokens=False) == wanted:
                return response
        return None

    def _with_bos(self, ids: list[int]) -> list[int]:
        """A prompt's ids with their one BOS, if the model uses one."""
        if self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]:
            raise InputError(
                f"{self.template_called or f'{self.folder}: chat template'}: begins with two "
                f"{self._show(self.bos_id)}"
            )
        return ids

    def _show(self, token: int) -> str:
        return f"{token} {self._plain.id_to_token(token)!r}"

    # --------------------------------------------------------------------------------------- set-up

    def _named_id(self, name: str) -> int | None:
        text = self._names.get(name)
        token = None if text is None else self._plain.token_to_id(text)
        if text is not None and token is None:
            raise InputError(
                f"{self.folder}/tokenizer.json: has no token {text!r}, which {name} is said to be; "
                "download the model again"
            )
        return token

    def _declared_ends(self) -> tuple[int, ...]:
        """Every end token that a file of the folder names; InputError if there is none."""
        ends: list[int] = []
        for name in ("generation_config.json", "config.json"):
            value = read_json(self.folder / name, missing={}).get("eos_token_id")
            for token in value if isinstance(value, list) else [value]:
                if token is None:
                    continue
                inside = type(token) is int and 0 <= token < self.vocab_size
                if not inside or self._plain.id_to_token(token) is None:
                    raise InputError(
                        f"{self.folder}/{name}: eos_token_id {token!r} is not a token of "
                        "tokenizer.json"
                    )
                ends.append(token)
        eos = self._named_id("eos_token")
        ends += [] if eos is None else [eos]
        if not ends:
            raise InputError(
                f"{self.folder}: no end token is declared; set eos_token_id in "
                "generation_config.json or eos_token in tokenizer_config.json"
            )
        return tuple(dict.fromkeys(ends))

    def _adds_bos(self, settings: dict[str, Any]) -> bool:
        """Whether the model wants a BOS before every text.

        `add_bos_token` says so, else what tokenizer.json does.
        """
        if self.bos_id is None:
            return False
        if isinstance(settings.get("add_bos_token"), bool):
            return settings["add_bos_token"]
        return self._with_special("a", add_special_tokens=True)[:1] == [self.bos_id]

    def _check_size(self) -> None:
        rows = read_json(self.folder / "config.json", missing={}).get("vocab_size")
        if isinstance(rows, int) and rows < self.vocab_size:
            raise InputError(
                f"{self.folder}/tokenizer.json: token ids go up to {self.vocab_size - 1}, but "
                f"config.json has vocab_size {rows}: the embedding has no row for them"
            )

    def _control_tokens(self, added_tokens: list[dict[str, Any]]) -> list[str]:
        """The added tokens that only the template may write, the longest first.

        They are special ones, end tokens and role headers.
        """
        prompt = self._chat.headers()
        control = []
        for token in added_tokens:
            # A token of white space (Gemma's "\n") is just text.
            is_header = token["content"].strip() and token["content"] in prompt
            if token["special"] or token["id"] in self.end_ids or is_header:
                control.append(token["content"])
        return sorted(control, key=len, reverse=True)  # the longest match first, as in tokenizers

    def _make_literal(
        self, added: list[dict[str, Any]], control: list[str]
    ) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A tokenizer that reads control tokens as text, and their stand-ins as control.

        Returns it, and the stand-ins' real ids; the boundary's is -1. One encoding of the whole
        text keeps everything that depends on neighbours as it was: which segments get a
        SentencePiece space, and what a token with `lstrip` swallows.
        """
        declared = {token["content"]: token for token in added}
        # By the name of each stand-in what it stands for; the boundary stands for nothing.
        meant: dict[str, dict[str, Any] | None] = {
            stand_in(number): declared[text] for number, text in enumerate(control)
        }
        meant[boundary()] = None
        controls = set(control)
        tokens = [
            {**token, "special": token["special"] or token["content"] in controls}
            for token in added
        ]
        literal = like(self._plain, tokens, self.folder)
        add(
            literal,
            [
                {**(TEXT_TOKEN if token is None else token), "content": name, "special": False}
                for name, token in meant.items()
            ],
        )
        real_id: dict[int, int] = {}
        for name, original in meant.items():
            token = literal.token_to_id(name)
            assert token is not None
            if self._plain.id_to_token(token) is not None:
                raise InputError(
                    f"{self.folder}/tokenizer.json: the ids of the vocabulary have gaps, and a "
                    f"token added to it gets id {token}, which another one has"
                )
            real_id[token] = -1 if original is None else original["id"]
        literal.encode_special_tokens = True  # special tokens' text is read as text
        return literal, real_id

    def _unknown_id(self) -> int | None:
        """The id the model itself gives to what it cannot spell; often marked special."""
        unknown = getattr(self._plain.model, "unk_token", None)
        return self._plain.token_to_id(unknown) if isinstance(unknown, str) else None


def _flags(ids: Iterable[int | None], highest: int) -> np.ndarray:
    """(highest + 1,) bool: which ids are among `ids`."""
    flags = np.zeros(highest + 1, dtype=bool)
    flags[[i for i in ids if i is not None]] = True
    return flags


def load_tokenizer(
    folder: str | Path,
    template: str | None = None,
    today: date | None = None,
    template_called: str | None = None,
) -> Tokenizer:
    """Loads the tokenizer of a model folder.

    template: the text of a chat template to use instead of the folder's (chat_template.jinja, else
        the chat_template of tokenizer_config.json; of several, the one named default).
    today: the date for templates that ask for one, of the run (`RunFolder.began`); None: the
        clock's.
    template_called: what messages call `template`, such as the name of its file.

    Raises InputError for missing, broken or contradicting files.
    """
    return Tokenizer(Path(folder), template, today, template_called)


def template_date(folder: Path, today: date) -> dict[str, str]:
    """Returns {TEMPLATE_DATE: today} where the folder's chat template asks for the date, else {}.

    It is for a stage's manifest.
    """
    templates = read_templates(folder, read_settings(folder))
    return _date_parent(templates.get(DEFAULT_TEMPLATE, ""), today)


def _date_parent(template: str, today: date) -> dict[str, str]:
    # A template can reach a function by its name alone, so the name must be in its text.
    return {TEMPLATE_DATE: today.isoformat()} if "strftime_now" in template else {}
