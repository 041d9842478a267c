"""Conversations that stand in one text: what a template rendered, what was put together by hand."""

import pytest
from made_rows import a, s, u, write

from ldalign.data.reading import read_rows
from ldalign.system.errors import InputError

RENDERED = [
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>Alice\nHi<|im_end|>\n",
    "\n<|endoftext|><|im_start|>system\nS<|im_end|>",
    "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<start_of_turn>user\nHi",
    "<|endoftext|><|user|>\nHi\n<|assistant|>\n",
    "<|user|>\nHi</s>\n",
    "<|system|>\n</s>\n",
    "<|startoftext|><|im_start|>user\nHi<|im_end|>\n",
    "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>",
    "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi",
    "[gMASK]<sop><|user|>\nHi<|assistant|>",
    "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>",
    "<|start|>user<|message|>Hi<|end|><|start|>assistant",
    "[SYSTEM_PROMPT]s[/SYSTEM_PROMPT][INST]Hi[/INST]",
    "<<SYS>>\ns\n<</SYS>>\n\nHi",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi",
    "<|header_start|>user<|header_end|>\n\nHi",
    "<s> [INST] Hi [/INST]",
    "<|prompter|>Hi<|endoftext|><|assistant|>",
    "<bos><|turn>user\nHi<turn|>",
    "<|im_user|>user<|im_middle|>Hi<|im_end|>",
    # Told by their ends alone.
    "S<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "Hi</s>\n<|assistant|>\n",
    "Hi<end_of_turn>\n<start_of_turn>model\n",
    "Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
]
# What people write of such tokens, and of conversations.
MEANT = [
    "What does <|im_start|> stand for?",
    "<|im_start|> is a token of which models?",
    "<|endoftext|> appears in my output. Why?",
    "<s>struck out</s> is which HTML tag?",
    "<start_of_turn> or <|im_start|>: which one is Gemma's?",
    "<|start|> and <|end|>: who uses them?",
    "Explain the difference between [INST] and <|assistant|>",
    "Is it A -> B or <|B|>?",
    "<user> said: hi",
]


@pytest.mark.parametrize("text", RENDERED)
def test_what_a_template_wrote_is_refused(tmp_path, text):
    """In every text that a user or a system says."""
    records = {
        "prompt": {"prompt": text, "response": "r"},
        "instruction": {"instruction": text, "output": "r"},
        "input": {"instruction": "i", "input": text, "output": "r"},
        "system": {"system": text, "prompt": "q", "response": "r"},
        "messages: turn 1": {"messages": [u(text), a("r")]},
        "messages: turn 2": {"messages": [s("s"), u(text), a("r")]},
        "messages: turn 3": {"messages": [u("q"), a("r"), u(text), a("r")]},
        "prompt: turn 1": {"prompt": [s(text), u("q")], "chosen": "r", "rejected": "g"},
        "conversations: turn 1": {
            "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "r"}]
        },
    }
    for key, record in records.items():
        message = rf"x:1: {key}: (begins|ends) with '.*': a chat template has written it already"
        with pytest.raises(InputError, match=message) as caught:
            read_rows(write(tmp_path / "x", record))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", MEANT)
def test_what_is_said_of_such_tokens_is_read(tmp_path, text):
    records = [{"prompt": text, "response": text}, {"messages": [s(text), u(text), a(text)]}]
    for row in read_rows(write(tmp_path / "x", *records)):
        assert {m["content"] for m in row.history} == {text} and row.response == text


@pytest.mark.parametrize(
    "text",
    [
        "### Human: Hi\n### Assistant:",
        "### Human:\nHi\n\n### Assistant:\nHello\n### Human: And?\n### Assistant:",
        "USER: Hi ASSISTANT:",
        "A chat between a curious user and an assistant. USER: Hi ASSISTANT:",
        "Human: Hi\nAssistant:",
        "User: Hi\n\nAssistant: Hello\n\nUser: And?\n\nAssistant:",
        "System: s\nUser: Hi\nAssistant:",
        "Below is an instruction that describes a task.\n\n### Instruction:\nHi\n\n### Response:\n",
        "Answer well.\n\n### Instruction:\nHi\n\n### Response:",
    ],
)
def test_a_prompt_put_together_by_hand_is_refused(tmp_path, text):
    with pytest.raises(
        InputError, match="x:1: prompt: is a whole conversation in one text"
    ) as caught:
        read_rows(write(tmp_path / "x", {"prompt": text, "response": "r"}))
    assert "\n" not in str(caught.value)
    (row,) = read_rows(write(tmp_path / "x", {"messages": [u(text), a("r")]}))  # meant as it stands
    assert row.history[0]["content"] == text


@pytest.mark.parametrize(
    "text",
    [
        "Summarize this chat:\n\nUser: Hi\nAssistant: Hello\nUser: Bye",
        "Human: a being of the species Homo sapiens. Say more.",
        "User: who is that?",
        "### Instruction\nWrite a poem on the following:\n### Topic\nSpring",
        "What does an ASSISTANT: say?",
        "Write as the AI would:",
        "Q: 1 + 1?\nA: 2\nQ: 2 + 2?\nA:",
        "The user asked the assistant:",
    ],
)
def test_a_prompt_that_speaks_of_speakers_is_read(tmp_path, text):
    (row,) = read_rows(write(tmp_path / "x", {"prompt": text, "response": "r"}))
    assert row.history == (u(text),)
