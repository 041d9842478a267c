"""Texts from elsewhere whose characters are all seen: none acts on the terminal or page that shows
it, turns the direction of the line around, or makes a file of another kind than it should be.
"""

import re

_ACTING = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # control characters but tab and newline
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # of direction: what follows reads otherwise
    "\ud800-\udfff\ufffe\uffff]"  # no characters at all, which neither UTF-8 nor XML holds
    "|\r(?!\n)"  # alone, it has the line written over
)


def visible(text: str) -> str:
    """Returns a text with every character that acts and is not seen written with its number
    (`\\x1b`, `\\u202e`); tabs, ends of lines and the joiners within words and emoji stay.
    """
    return _ACTING.sub(_numbered, text)


def _numbered(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
