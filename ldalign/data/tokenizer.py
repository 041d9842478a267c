"""Tokenizer, chat template, and how a conversation becomes prompt and response ids.

`tokenizers` reads tokenizer.json and `jinja2` renders the chat template
(`ldalign.data.chat_template`), with the settings of transformers, so that the ids are those of its
`apply_chat_template(tokenize=True)`. Two things are stricter:

- Text is never control. A message that contains `</s>` or `<|im_end|>` has these characters encoded
  as text; only the template itself writes control tokens.
- The ids begin with exactly one BOS whenever the model uses one, also if the template leaves it out
  (Zephyr's does).
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tokenizers
from jinja2.sandbox import SecurityError

from ldalign.data.chat_template import ChatTemplate
from ldalign.data.tokenizer_files import (
    NAMED_TOKENS,
    library_error,
    read_backend,
    read_settings,
    read_template,
    read_tokenizer_json,
    token_text,
)
from ldalign.system.errors import InputError
from ldalign.system.untrusted import MAX_TOKENIZER_BYTES, read_bytes, read_json

if TYPE_CHECKING:
    from ldalign.data.rows import Message, Row

COPIED_FILES = tuple(
    "tokenizer.json special_tokens_map.json added_tokens.json tokenizer.model vocab.json "
    "merges.txt".split()
)

# A key of a stage's manifest, there where the chat template asks for the date.
TEMPLATE_DATE = "template's date"

# What stands for control tokens in rendered text: a nonce of this process, which no input can
# know, between private-use characters.
_NONCE = secrets.token_hex(8)
_CONTROL = f"\ue000{_NONCE}:%d\ue001"  # control token number %d, written by the template
_QUOTED = f"\ue002{_NONCE}:%d\ue003"  # the same characters inside a message: plain text
_QUOTED_PATTERN = re.compile(_QUOTED.replace("%d", r"(\d+)"))


class UnsafeTemplate(InputError):
    """The chat template does what no chat template needs to do.

    It reaches out of the template, or takes too much room or time.
    """


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
    template_hash: its sha256, hex.
    today: the date for a template that asks for it.
    vocab_size: the highest token id + 1.
    """

    def __init__(
        self, folder: Path, template: str | None = None, today: date | None = None
    ) -> None:
        self.folder = Path(folder)
        settings = read_settings(self.folder)
        self.template = read_template(self.folder, settings) if template is None else template
        self.template_hash = hashlib.sha256(self.template.encode("utf-8")).hexdigest()
        self.today = today or date.today()
        self._compiled = _compile(self.template, self.folder, self.today)
        texts = {name: token_text(settings.get(name)) for name in NAMED_TOKENS}
        self._names = {name: text for name, text in texts.items() if text is not None}

        description = read_tokenizer_json(self.folder, settings)
        self._plain = read_backend(description, self.folder)  # decodes
        ids = self._plain.get_vocab(with_added_tokens=True).values()
        self.vocab_size = 1 + max(ids, default=-1)
        self.bos_id = self._named_id("bos_token")
        self.end_ids = self._declared_ends()
        self._starts_with_bos = self._adds_bos(settings)
        self._check_size()

        self._control = self._control_tokens(description["added_tokens"])
        self._number = {token: i for i, token in enumerate(self._control)}
        # Without control tokens: (?!), which never matches.
        self._control_pattern = re.compile("|".join(map(re.escape, self._control)) or "(?!)")
        self._literal, self._real_id = self._make_literal(description)  # encodes
        self._forbidden = set(self._real_id.values()) - {self._unknown_id()}
        self._generation_prompt_checked = False

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
        ids = self._ids(self._literal, text, add_special_tokens=False)
        # It can happen with Unigram vocabularies, which hold "</s>" as a piece.
        if not self._forbidden.isdisjoint(ids):
            token = self._plain.id_to_token(next(i for i in ids if i in self._forbidden))
            raise InputError(
                f"{self.folder}: the tokenizer turns ordinary text into the control token {token!r}"
            )
        return [self._real_id.get(i, i) for i in ids]

    def encode_rendered(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Returns the ids of a text in which special tokens are written by name.

        A rendered template is one, or a benchmark's prompt. Only for text that may do so: what a
        person wrote goes through `encode`. add_bos: put the BOS in front; None: where the model
        uses one and the text does not begin with it.
        """
        ids = self._ids(self._plain, text, add_special_tokens=False)
        if add_bos is None:
            add_bos = self._starts_with_bos and ids[:1] != [self.bos_id]
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def _ids(self, backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return backend.encode(text, add_special_tokens=add_special_tokens).ids
        # A broken model fails only here: one without the unknown token that it names, say.
        except BaseException as error:
            raise library_error(self.folder, error) from error

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
        if self._compiled is None:
            raise InputError(
                f"{self.folder}: has no chat template (chat_template.jinja or "
                "tokenizer_config.json)"
            )
        try:
            return self._compiled.render(
                [dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._names,
            )
        except SecurityError as error:
            raise UnsafeTemplate(f"{self.folder}: chat template: SecurityError: {error}") from error
        except Exception as error:  # a template is a program: it can fail in any way
            raise InputError(
                f"{self.folder}: chat template: {type(error).__name__}: {error}"
            ) from error

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of `messages` up to where the assistant's answer begins.

        They have one BOS if the model uses one. Raises InputError as `render`, or for a template
        that leaves the assistant's header to the answer.
        """
        self._check_generation_prompt()
        return self._chat_ids(messages, add_generation_prompt=True)

    def pair_ids(self, row: Row) -> PairIds:
        """Returns the prompt and response ids of `row`.

        The response is what the whole conversation adds to the prompt, cut right after its first
        end token. Raises InputError if the prompt's ids are not a prefix of the whole, or the
        template writes no end token.
        """
        prompt = self.prompt_ids(row.history)
        whole = self._chat_ids(
            [*row.history, {"role": "assistant", "content": row.response}], False
        )
        start = f"{row.where}: " if row.where else ""
        if whole[: len(prompt)] != prompt:
            raise InputError(start + self._difference(prompt, whole))
        response = whole[len(prompt) :]
        for position, token in enumerate(response):
            if token in self.end_ids:
                return PairIds(prompt, response[: position + 1])
        raise InputError(
            f"{start}the chat template of {self.folder} ends an answer without an end token "
            f"({', '.join(map(self._show, self.end_ids))}); add the id it does write to "
            "eos_token_id in generation_config.json"
        )

    def _chat_ids(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        """The ids of the rendered conversation, in one encoding.

        What the template writes may be control, what the messages hold is text.
        """
        # Control tokens in messages are put aside, so that those left in the rendered text are the
        # template's; these get their stand-ins, then the messages get their text back.
        text = self.render([self._quote(message) for message in messages], add_generation_prompt)
        text = self._control_pattern.sub(lambda match: _CONTROL % self._number[match[0]], text)
        text = _QUOTED_PATTERN.sub(lambda match: self._control[int(match[1])], text)
        ids = self.encode(text)
        if self._starts_with_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        if self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]:
            raise InputError(
                f"{self.folder}: chat template: begins with two {self._show(self.bos_id)}"
            )
        return ids

    def _quote(self, message: Message) -> dict[str, str]:
        """The message with stand-ins for the control tokens that its text spells."""
        quoted = {}
        for key, value in message.items():
            if not isinstance(value, str):
                raise InputError(f"message {key!r} is {type(value).__name__}; expected text")
            quoted[key] = self._control_pattern.sub(
                lambda match: _QUOTED % self._number[match[0]], value
            )
        return quoted

    def _difference(self, prompt: list[int], whole: list[int]) -> str:
        """Where the whole's ids leave the prompt's, in words."""
        at = 0
        while at < min(len(prompt), len(whole)) and prompt[at] == whole[at]:
            at += 1
        in_prompt = self._show(prompt[at]) if at < len(prompt) else "nothing"
        in_whole = self._show(whole[at]) if at < len(whole) else "nothing"
        return (
            f"the prompt's tokens are not how prompt + answer begins: token {at} is {in_prompt} in "
            f"the prompt, {in_whole} in the whole; does the answer start with white space, or does "
            "the chat template rewrite earlier turns?"
        )

    def _show(self, token: int) -> str:
        return f"{token} {self._plain.id_to_token(token)!r}"

    def _check_generation_prompt(self) -> None:
        """Once: the template must write the assistant's header as part of the prompt.

        Else the policy would have to say it.
        """
        if self._generation_prompt_checked:
            return
        self._generation_prompt_checked = True
        question = {"role": "user", "content": "Probe?"}
        answer = {"role": "assistant", "content": "Ldalignprobe"}
        try:
            prompt, whole = self.render([question], True), self.render([question, answer])
        except UnsafeTemplate:
            raise
        except InputError:
            return  # a template may demand more than one user turn; the row itself will tell
        if not whole.startswith(prompt) or answer["content"] not in whole[len(prompt) :]:
            return
        lead = whole[len(prompt) :].split(answer["content"])[0]
        if "assistant" in lead.lower() or self._control_pattern.search(lead):
            raise InputError(
                f"{self.folder}: chat template: has no generation prompt: with "
                f"add_generation_prompt the prompt must end where the answer begins, but {lead!r} "
                "comes between"
            )

    # --------------------------------------------------------------------------------------- set-up

    def _named_id(self, name: str) -> int | None:
        text = self._names.get(name)
        if text is None:
            return None
        token = self._plain.token_to_id(text)
        if token is None:
            raise InputError(
                f"{self.folder}/tokenizer_config.json: {name} {text!r} is not in the vocabulary"
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
        return self._ids(self._plain, "a", add_special_tokens=True)[:1] == [self.bos_id]

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
        prompt = self._probe_prompt()
        control = []
        for token in added_tokens:
            # A token of white space (Gemma's "\n") is just text.
            is_header = token["content"].strip() and token["content"] in prompt
            if token["special"] or token["id"] in self.end_ids or is_header:
                control.append(token["content"])
        return sorted(control, key=len, reverse=True)  # the longest match first, as in tokenizers

    def _probe_prompt(self) -> str:
        """A prompt without any content.

        It shows the tokens, special or not, that the template uses for roles.
        """
        if self._compiled is None:
            return ""
        probe = [{"role": "system", "content": ""}, {"role": "user", "content": ""}]
        for messages in (probe, probe[1:]):
            try:
                return self.render(messages, add_generation_prompt=True)
            except UnsafeTemplate:
                raise
            except InputError:
                # Some templates take no system turn; if both fail, rendering a row will say why.
                continue
        return ""

    def _make_literal(
        self, description: dict[str, Any]
    ) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """A tokenizer that reads control tokens as text, and their stand-ins as control.

        Returns it, and the stand-ins' real ids. One encoding of the whole text keeps everything
        that depends on neighbours as it was: which segments get a SentencePiece space, and what a
        token with `lstrip` swallows.
        """
        added = description["added_tokens"]
        flags = {token["content"]: token for token in added if token["content"] in self._control}
        tokens = [
            {**token, "special": token["special"] or token["content"] in flags} for token in added
        ]
        literal = read_backend({**description, "added_tokens": tokens}, self.folder)
        real_id: dict[int, int] = {}
        for number, text in enumerate(self._control):
            keys = ("single_word", "lstrip", "rstrip", "normalized")
            options = {key: flags[text][key] for key in keys}
            stand_in = _CONTROL % number
            literal.add_tokens([tokenizers.AddedToken(stand_in, special=False, **options)])
            stand_in_id = literal.token_to_id(stand_in)
            assert stand_in_id is not None
            real_id[stand_in_id] = flags[text]["id"]
        literal.encode_special_tokens = True  # special tokens' text is read as text
        return literal, real_id

    def _unknown_id(self) -> int | None:
        """The id the model itself gives to what it cannot spell; often marked special."""
        unknown = getattr(self._plain.model, "unk_token", None)
        return self._plain.token_to_id(unknown) if isinstance(unknown, str) else None


def load_tokenizer(
    folder: str | Path, template: str | None = None, today: date | None = None
) -> Tokenizer:
    """Loads the tokenizer of a model folder.

    template: the text of a chat template to use instead of the folder's (chat_template.jinja, else
        the chat_template of tokenizer_config.json).
    today: the date for templates that ask for one, of the run (`RunFolder.began`); None: the
        clock's.

    Raises InputError for missing, broken or contradicting files.
    """
    return Tokenizer(Path(folder), template, today)


def template_date(folder: Path, today: date) -> dict[str, str]:
    """Returns {TEMPLATE_DATE: today} where the folder's chat template asks for the date, else {}.

    It is for a stage's manifest.
    """
    return _date_parent(read_template(folder, read_settings(folder)), today)


def _date_parent(template: str, today: date) -> dict[str, str]:
    # A template can reach a function by its name alone, so the name must be in its text.
    return {TEMPLATE_DATE: today.isoformat()} if "strftime_now" in template else {}


def save_tokenizer_files(
    source: str | Path, folder: str | Path, template: str | None = None
) -> None:
    """Copies what turns text into ids and back from model folder `source` into `folder`.

    The chat template (`template` if given) is written as chat_template.jinja *and* into
    tokenizer_config.json: servers old and new find it. generation_config.json names every declared
    end id, so that all of them stop.
    """
    source, folder = Path(source), Path(folder)
    tokenizer = load_tokenizer(source, template)
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED_FILES:
        if (source / name).is_file():
            (folder / name).write_bytes(read_bytes(source / name, MAX_TOKENIZER_BYTES))
    settings = read_json(source / "tokenizer_config.json", missing={})
    settings.pop("auto_map", None)  # would ask the reader to import code
    if tokenizer.template:
        settings["chat_template"] = tokenizer.template
        (folder / "chat_template.jinja").write_bytes(tokenizer.template.encode("utf-8"))
    _write_json(folder / "tokenizer_config.json", settings)
    generation = read_json(source / "generation_config.json", missing={})
    ends = list(tokenizer.end_ids)
    generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    _write_json(folder / "generation_config.json", generation)


# -------------------------------------------------------------------------------------------- files


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _compile(template: str, folder: Path, today: date) -> ChatTemplate | None:
    if not template:
        return None
    try:
        return ChatTemplate(template, today)
    except SecurityError as error:
        raise UnsafeTemplate(f"{folder}: chat template: SecurityError: {error}") from error
    except Exception as error:  # syntax errors, and whatever the compiler runs into
        raise InputError(f"{folder}: chat template: {type(error).__name__}: {error}") from error
