"""The reader of the file layer's list: each way in which a loss of power costs a result is seen."""

import pytest
from durable import faults, in_place

Event = tuple[str, str, str]
# A stage of two files, one of them in a folder, made beside its name; then a file of its own.
SOUND: list[Event] = [
    ("made", "/r/s.partial", ""),
    ("open", "/r/s.partial/a", ""),
    ("write", "/r/s.partial/a", ""),
    ("made", "/r/s.partial/in", ""),
    ("open", "/r/s.partial/in/b", ""),
    ("write", "/r/s.partial/in/b", ""),
    ("open", "/r/s.partial/scratch", ""),
    ("gone", "/r/s.partial/scratch", ""),
    ("sync", "/r/s.partial/a", ""),
    ("sync", "/r/s.partial/in/b", ""),
    ("sync", "/r/s.partial/in", ""),
    ("sync", "/r/s.partial", ""),
    ("rename", "/r/s.partial", "/r/s"),
    ("sync", "/r", ""),
    ("open", "/r/t.partial", ""),
    ("write", "/r/t.partial", ""),
    ("sync", "/r/t.partial", ""),
    ("rename", "/r/t.partial", "/r/t"),
    ("sync", "/r", ""),
]


def test_a_sound_list() -> None:
    assert faults(SOUND) == [] and in_place(SOUND) == set()


@pytest.mark.parametrize("dropped", [n for n, event in enumerate(SOUND) if event[0] == "sync"])
def test_no_sync_can_be_left_out(dropped: int) -> None:
    """Of a file, of a folder in it, of itself, or of the folder that it is in."""
    found = faults([*SOUND[:dropped], *SOUND[dropped + 1 :]])
    assert found and all(fault.startswith(SOUND[dropped][1]) for fault in found)


@pytest.mark.parametrize("rename", [n for n, event in enumerate(SOUND) if event[0] == "rename"])
def test_no_rename_may_come_before_its_sync(rename: int) -> None:
    early = [*SOUND[: rename - 1], SOUND[rename], SOUND[rename - 1], *SOUND[rename + 1 :]]
    assert faults(early)


def test_a_write_after_its_sync_is_seen() -> None:
    at = SOUND.index(("sync", "/r/s.partial/a", ""))
    late = [*SOUND[: at + 1], ("write", "/r/s.partial/a", ""), *SOUND[at + 1 :]]
    assert faults(late) == ["/r/s.partial/a: renamed to /r/s, and not synced before"]


def test_what_is_written_in_place_is_seen() -> None:
    assert in_place([*SOUND, ("open", "/r/t", "")]) == {"/r/t"}


def test_a_file_of_safetensors() -> None:
    """It gets its name unseen; then it is synced under that name, before its folder is renamed."""
    own: list[Event] = [
        ("made", "/r/s.partial", ""),
        ("open", "/r/s.partial/.tmpX1", ""),
        ("write", "/r/s.partial/.tmpX1", ""),
        ("sync", "/r/s.partial/w.safetensors", ""),
        ("sync", "/r/s.partial", ""),
        ("rename", "/r/s.partial", "/r/s"),
        ("sync", "/r", ""),
    ]
    assert faults(own) == []
    (fault,) = faults([*own[:3], *own[4:]])
    assert fault == "/r/s.partial/.tmpX1: renamed to /r/s, and not synced before"
