"""Conversations that stand written out in one text: transcripts, and what a template rendered.

A transcript of HH-RLHF's form is read as turns. What a chat template has written already, and what
was put together by hand in another form, is refused: a template would wrap it once more, as if one
user had said it all.
"""

import re

from ldalign.data.records import BadRow
from ldalign.data.rows import Message

# A whole conversation in one text, as in HH-RLHF: "\n\nHuman: ...\n\nAssistant: ...".
TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant): ?")

# ------------------------------------------------------------------------------------ by a template

_ROLE = r"(?:system|user|assistant|human|model|tool|developer|gpt|bot|function|observation)\b"
_BOS = (
    r"(?:<s>|<bos>|<BOS_TOKEN>|<sop>|\[gMASK\]|<\|(?:endoftext|startoftext|start_of_text|bos)\|>|"
    r"<[|｜]begin▁of▁sentence[|｜]>)"
)
# What opens a turn in the control tokens of a model family. Some are words that a person might
# write of: those need the role that follows them.
_HEADER = (
    rf"<\|im_start\|>\s*(?:{_ROLE}|[^\n<]{{1,40}}\n)|<start_of_turn>\s*{_ROLE}|"
    rf"<\|turn>\s*{_ROLE}|<\|start\|>\s*{_ROLE}|"
    r"<\|(?:begin_of_text|start_header_id|header_start|start_of_role|START_OF_TURN_TOKEN)\|>|"
    r"<\|(?:user|system|assistant|prompter|human)\|>|<\|(?:user|system|assistant)_start\|>|"
    r"<\|im_(?:user|system|assistant)\|>|<[|｜](?:User|Assistant)[|｜]>|"
    r"\[(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS)\]|<<SYS>>"
)
RENDERED = re.compile(rf"\s*(?:{_BOS}\s*)*(?:{_HEADER})")
# The same, told by its end: where the answer is to come.
_ANSWER_HEADER = (
    r"<\|im_start\|>\s*assistant|<start_of_turn>\s*model|<\|turn>\s*model|<\|start\|>\s*assistant|"
    r"<\|(?:start_header_id|header_start)\|>assistant<\|(?:end_header_id|header_end)\|>|"
    r"<\|start_of_role\|>assistant<\|end_of_role\|>|<\|CHATBOT_TOKEN\|>|<\|assistant(?:_start)?\|>|"
    r"<\|im_assistant\|>assistant<\|im_middle\|>|<[|｜]Assistant[|｜]>"
)
OPENED = re.compile(rf"[\n>]\s*({_ANSWER_HEADER})\s*(?:<think>\s*(?:</think>)?)?\s*\Z")
_TAIL = 120  # characters at the end of a text in which OPENED is looked for


def refuse_rendered(text: str, key: str) -> None:
    """Raises BadRow for a text that a chat template has written, as its control tokens show."""
    found = RENDERED.match(text)
    if found is None:
        tail = text[-_TAIL:]
        if "|>" in tail or "<start" in tail or "<|" in tail or "｜>" in tail:
            found = OPENED.search(tail)
    if found is not None:
        how = "begins" if found.re is RENDERED else "ends"
        what = found[0].strip() if found.re is RENDERED else found[1]
        raise BadRow(
            f"{key}: {how} with {what!r}: a chat template has written it already; give the "
            "conversation as messages"
        )


# ------------------------------------------------------------------------------------------ by hand

_ASKS = r"(?:#{1,4} ?(?:Human|HUMAN|User|USER|Instruction)\b:?|(?:Human|HUMAN|User|USER):)"
_SETS = r"(?:#{1,4} ?System\b:?|(?:System|SYSTEM):|Below is an instruction that describes a task)"
_REPLIES = (
    r"(?:#{1,4} ?(?:Assistant|ASSISTANT|Response|Bot|AI)\b:?|(?:Assistant|ASSISTANT|Bot|AI|GPT):)"
)
# Where no key says what is the prompt, a first speaker is enough.
MARKED = re.compile(rf"\s*(?:{_ASKS}|#+ ?System\b|System:)")
# Both speakers at the beginnings of lines, and nothing before the first: a text that only quotes a
# conversation says first what is to be done with it.
_BOTH = re.compile(rf"\s*({_ASKS}|{_SETS}).*\n[ \t]*({_REPLIES})", re.DOTALL)
# Or the answer is to come at its end: "USER: Hi ASSISTANT:".
_WAITS = re.compile(rf"(?:\n[ \t]*({_REPLIES})|\s(ASSISTANT:))\s*\Z")
_ASKED = re.compile(rf"(?:^[ \t]*{_ASKS}|\bUSER:)", re.MULTILINE)


def refuse_written_out(text: str, key: str) -> None:
    """Raises BadRow for a prompt that is a conversation put together by hand, in another form than
    that of a transcript.
    """
    found = _BOTH.match(text)
    if found is None and text.rstrip()[-1:] in (":", "e", "t"):  # of a marker
        found = _WAITS.search(text[-_TAIL:])
        found = found if found and _ASKED.search(text) else None
    if found is not None:
        marks = " and ".join(repr(mark) for mark in found.groups() if mark)
        raise BadRow(
            f"{key}: is a whole conversation in one text ({marks}); give it as messages, as one "
            "user turn where it is meant as it stands"
        )


# -------------------------------------------------------------------------------------- transcripts


def read_transcript(text: str, key: str) -> list[Message]:
    """The turns of a transcript; the blank behind each speaker's colon is the form's.

    Raises BadRow for what no text may hold.
    """
    checked_text(text, key)
    _, *parts = SPEAKER.split(text)
    turns = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        turns.append({"role": role, "content": said})
    return turns


def checked_text(value: str, key: str) -> str:
    """Returns `value`, unless it holds what no UTF-8 file can or no tokenizer should see.

    Raises BadRow.
    """
    if "\0" in value:
        raise BadRow(f"{key}: holds a NUL character")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(
                f"{key}: holds half of a surrogate pair at character {error.start + 1}"
            ) from error
    return value
