"""What a chat template makes of a conversation, as text in which control tokens are marked.

Text is never control. A message that spells `</s>` or `<|im_end|>` keeps these characters as text;
only what the template itself writes is a control token, and gets a stand-in that no input can know.
`ldalign.data.tokenizer` turns such text into ids.
"""

from __future__ import annotations

import re
import secrets
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from jinja2.sandbox import SecurityError

from ldalign.data.chat_template import ChatTemplate
from ldalign.data.records import BadRow
from ldalign.system.errors import InputError

if TYPE_CHECKING:
    from ldalign.data.rows import Message, Row

# What stands for control tokens in rendered text: a nonce of this process, which no input can
# know, between private-use characters. Of digits alone, which no filter writes otherwise.
_NONCE = str(secrets.randbits(64))
_CONTROL_HEAD = f"\ue000{_NONCE}:"
_QUOTED = f"\ue002{_NONCE}:%d\ue003"  # a control token's characters inside a message: plain text
_QUOTED_PATTERN = re.compile(_QUOTED.replace("%d", r"(\d+)"))
_MARK = f"\ue004{_NONCE}\ue005"  # the end of the last user turn, where it must be found again
SHOWN = 60  # characters of a text that a message quotes
# What ends the reasoning of an answer, as </think>, </seed:think>, </reasoning> or [/THINK] do.
_REASONED = re.compile(r"(?i)(</|\[/)[^][<>/\s]*(think|thought|reason)[^][<>/\s]*[>\]]")


class UnsafeTemplate(InputError):
    """The chat template does what no chat template needs to do.

    It reaches out of the template, or takes too much room or time.
    """


class TemplateRefusal(InputError):
    """The chat template refuses these messages, or fails on them; `reason` says how."""

    def __init__(self, where: str, reason: str) -> None:
        # As they were given: an error that comes out of another process is made again of these.
        super().__init__(where, reason)
        self.reason = reason

    def __str__(self) -> str:
        return "".join(self.args)


class Marked(NamedTuple):
    """A text in which every control token is a stand-in, and how many of these there are."""

    text: str
    tokens: int

    @property
    def tail(self) -> str:
        """The text from its last stand-in on; all of it where there is none."""
        return self.text[max(0, self.text.rfind(_CONTROL_HEAD)) :]


class PairText(NamedTuple):
    """A row as text: `prompt` up to where the answer begins, `answer` what follows."""

    prompt: Marked
    answer: Marked


def stand_in(number: int) -> str:
    """Returns what stands for control token `number` in marked text."""
    return f"{_CONTROL_HEAD}{number}\ue001"


def boundary() -> str:
    """Returns a text that no input can hold, for an encoding that must begin in the middle."""
    return _MARK


class ChatText:
    """A chat template and the control tokens that it may write.

    folder: the model folder, for messages. template: the template's text, "" if there is none.
    names: the special tokens that the template may name. called: what messages call a template that
    is not the folder's own. Raises InputError for a broken template, UnsafeTemplate for a hostile
    one.
    """

    def __init__(
        self,
        folder: Path,
        template: str,
        today: date,
        names: dict[str, str],
        called: str | None = None,
    ) -> None:
        self.folder = folder
        # In front of what is wrong with every row; a row's own place stands in front of the rest.
        self._where = "" if called else f"{folder}: "
        self.called = called or "chat template"
        self._subject = called or "the chat template"  # of a sentence
        self._compiled = _compile(template, self._where + self.called, today)
        self._names = names
        self._control: list[str] = []
        self._pattern = re.compile("(?!)")  # which never matches
        self._number: dict[str, int] = {}
        self._generation_prompt_checked = False

    def set_control(self, control: Sequence[str]) -> None:
        """Says which texts are control tokens where the template writes them, the longest first."""
        self._control = list(control)
        self._number = {token: i for i, token in enumerate(control)}
        self._pattern = re.compile("|".join(map(re.escape, control)) or "(?!)")

    # ------------------------------------------------------------------------------------ rendering

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Returns the conversation as the chat template writes it.

        Raises TemplateRefusal where the template refuses it or fails, UnsafeTemplate where it does
        what it may not, InputError where there is no template.
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
            raise UnsafeTemplate(
                f"{self._where}{self.called}: SecurityError: {error}{_line_of(error)}"
            ) from error
        except Exception as error:  # a template is a program: it can fail in any way
            # What it says itself, by raise_exception, needs no name of a class, nor a line.
            own = type(error) is jinja2.TemplateError
            what = f"{error}" if own else f"{type(error).__name__}: {error}{_line_of(error)}"
            raise TemplateRefusal(
                self._where, f"{self.called}: {' '.join(what.split())}"
            ) from error

    def prompt(self, messages: Sequence[Message]) -> Marked:
        """Returns the text of `messages` up to where the assistant's answer begins.

        Raises InputError as `render`, or for a template that leaves the assistant's header to the
        answer.
        """
        self._check_generation_prompt()
        return self._marked(self.render(self._quoted(messages), True))

    def pair(self, row: Row) -> PairText:
        """Returns the text of a row: its prompt as for generation, and what is answered to it.

        The template writes the row twice, with and without its answer. Raises BadRow where it
        refuses one of them, does not write the answer after the prompt, or leaves out a part of
        it or of a turn before it; InputError as `prompt` for what is wrong with every row.
        """
        self._check_generation_prompt()
        history = self._quoted(row.history)
        answer = self._quoted([{"role": "assistant", "content": row.response}])
        try:
            prompt = self.render(history, True)
            whole = self.render([*history, *answer])
            if whole.startswith(prompt):
                head, rest = "", whole[len(prompt) :]
            else:
                head, rest = self._after_last_turn(history, answer, prompt, whole)
            if not _holds(rest, answer[0]["content"]):
                head = head or self._generation_prompt(history, prompt)
                self._check_written(head + rest, answer[0]["content"])
            self._check_history(prompt, history)
        except TemplateRefusal as refusal:
            raise BadRow(refusal.reason) from refusal
        return PairText(self._marked(prompt), self._marked(rest))

    def _after_last_turn(
        self, history: list[Message], answer: list[Message], prompt: str, whole: str
    ) -> tuple[str, str]:
        """What the template writes after the last user turn: (generation prompt, the rest).

        For templates that write earlier turns otherwise when an answer follows, such as those that
        put the system text into the last turn: the prompt stays as it is for generation.
        """
        last = {**history[-1], "content": history[-1]["content"] + _MARK}
        marked = [*history[:-1], last]
        asked = self.render(marked, True).split(_MARK)
        answered = self.render([*marked, *answer]).split(_MARK)
        if len(asked) == len(answered) == 2 and answered[1].startswith(asked[1]):
            return asked[1], answered[1][len(asked[1]) :]
        at = next(
            (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
            min(len(prompt), len(whole)),
        )
        raise BadRow(
            f"the prompt is not how prompt + answer begins: character {at} and what follows is "
            f"{self._shown(prompt[at:])} in the prompt, {self._shown(whole[at:])} in the whole; "
            f"does {self._subject} write the assistant's header otherwise when an answer follows?"
        )

    def _generation_prompt(self, history: list[Message], prompt: str) -> str:
        """What the template adds to the history to ask for an answer."""
        turns = self.render(history)
        return prompt[len(turns) :] if prompt.startswith(turns) else ""

    def _check_written(self, written: str, answer: str) -> None:
        """Raises BadRow where `written` is not all of the answer, white space aside."""
        if not _holds(written, answer):
            raise BadRow(
                f"{self._subject} leaves out or changes a part of the answer: the data have "
                f"{self._shown(answer)}, it writes {self._shown(written)}; use a template that "
                "keeps the answer, or leave that part out of the data"
            )

    def _check_history(self, prompt: str, history: Sequence[Message]) -> None:
        """Raises BadRow where the prompt lacks a turn, or a part of one, white space aside.

        The turns must stand in their order, but for the system turn, which may stand anywhere; an
        earlier answer may lose its reasoning.
        """
        if _first_missing(history, prompt, str.strip) is None:
            return
        number = _first_missing(history, _squeezed(prompt), _squeezed)
        if number is not None:
            role = history[number]["role"]
            turn = "the system turn" if role == "system" else f"turn {number + 1} ({role})"
            raise BadRow(
                f"{self._subject} leaves out or changes {turn}, "
                f"{self._shown(history[number]['content'])}; use a template that writes it, or "
                "leave it out of the data"
            )

    # ------------------------------------------------------------------------------- control tokens

    def _quoted(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with stand-ins for the control tokens that their texts spell."""
        return [{key: self._quote(key, value) for key, value in m.items()} for m in messages]

    def _quote(self, key: str, value: Any) -> str:
        if not isinstance(value, str):
            raise InputError(f"message {key!r} is {type(value).__name__}; expected text")
        return self._pattern.sub(lambda match: _QUOTED % self._number[match[0]], value)

    def _marked(self, rendered: str) -> Marked:
        """Rendered text: the template's control tokens as stand-ins, the messages' as text."""
        text, count = self._pattern.subn(lambda m: stand_in(self._number[m[0]]), rendered)
        return Marked(self._unquoted(text), count)

    def _unquoted(self, text: str) -> str:
        if _NONCE not in text:
            return text
        return _QUOTED_PATTERN.sub(lambda match: self._control[int(match[1])], text)

    def _shown(self, text: str) -> str:
        """The beginning of a rendered text, as a message quotes it."""
        text = self._unquoted(text)
        return repr(text[:SHOWN]) + (" ..." if len(text) > SHOWN else "")

    # --------------------------------------------------------------------------------------- probes

    def headers(self) -> str:
        """Returns a prompt without any content: what the template writes for roles; "" if none."""
        if self._compiled is None:
            return ""
        probe = [{"role": "system", "content": ""}, {"role": "user", "content": ""}]
        for messages in (probe, probe[1:]):
            try:
                return self.render(messages, add_generation_prompt=True)
            except TemplateRefusal:
                # Some templates take no system turn; if both fail, rendering a row will say why.
                continue
        return ""

    def leaves_out(self, token: str) -> bool:
        """Says whether the template begins no conversation with `token`, of those it takes."""
        system, user, answer = (
            {"role": role, "content": "x"} for role in ("system", "user", "assistant")
        )
        begins = []
        for messages in ([user], [system, user], [user, answer, user]):
            try:
                begins.append(self.render(messages, True).startswith(token))
            except TemplateRefusal:
                continue
        return bool(begins) and not any(begins)

    def _check_generation_prompt(self) -> None:
        """The template must write the assistant's header as part of the prompt.

        Else the policy would have to say it. Looked at until it is found right, once.
        """
        if self._generation_prompt_checked:
            return
        question = {"role": "user", "content": "Probe?"}
        answer = {"role": "assistant", "content": "Ldalignprobe"}
        try:
            prompt, whole = self.render([question], True), self.render([question, answer])
        except TemplateRefusal:
            prompt = whole = ""  # it may demand more than one user turn; the row itself will tell
        if whole.startswith(prompt) and answer["content"] in whole[len(prompt) :]:
            lead = whole[len(prompt) :].split(answer["content"])[0]
            if "assistant" in lead.lower() or self._pattern.search(lead):
                raise InputError(
                    f"{self._where}{self.called}: has no generation prompt: with "
                    "add_generation_prompt the prompt must end where the answer begins, but "
                    f"{lead!r} comes between"
                )
        self._generation_prompt_checked = True


def _holds(written: str, answer: str) -> bool:
    """Whether all of `answer` stands in `written`, white space aside."""
    return answer in written or _squeezed(answer) in _squeezed(written)


def _first_missing(
    history: Sequence[Message], prompt: str, spaced: Callable[[str], str]
) -> int | None:
    """The number of the first turn that does not stand in the prompt; None where all do.

    spaced: what is done to the white space of a turn before it is looked for.
    """
    at = 0
    for number, turn in enumerate(history):
        text = turn["content"]
        # Most answers have no such mark, and a pattern is slow to look for.
        if turn["role"] == "assistant" and ("</" in text or "[/" in text):
            text = text[max((found.end() for found in _REASONED.finditer(text)), default=0) :]
        text = spaced(text)
        found_at = prompt.find(text, 0 if turn["role"] == "system" else at)
        if found_at < 0:
            return number
        if turn["role"] != "system":
            at = found_at + len(text)
    return None


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _compile(template: str, called: str, today: date) -> ChatTemplate | None:
    if not template:
        return None
    try:
        return ChatTemplate(template, today)
    except SecurityError as error:
        raise UnsafeTemplate(f"{called}: SecurityError: {error}") from error
    except Exception as error:  # syntax errors, and whatever the compiler runs into
        raise InputError(f"{called}: {type(error).__name__}: {error}{_line_of(error)}") from error


def _line_of(error: Exception) -> str:
    """Where in the template an error arose, as a message ends; "" where nothing says so."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f" (line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return f" (line {lines[-1]})" if lines else ""
