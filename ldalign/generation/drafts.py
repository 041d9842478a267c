"""Drafts of a response out of a text that it may resemble, such as the data's own response.

A draft costs the model nothing: its tokens are given to it in one step with the response's newest
token, and as many of them stay as are what it would have drawn one after the other. (Speculative
sampling with a fixed draft, Leviathan et al., arXiv 2211.17192; that the draft is looked up in a
text is prompt lookup decoding. Here a token is a function of its logits and of its own uniform
number, so a token of the draft stays exactly where it is the token drawn: with the probability that
the model gives it, as the rule of that paper has it for a fixed draft, and the response is the same
token for token.)
"""

from collections.abc import Sequence


class Draft:
    """Follows one response as it comes, and says what it may go on with.

    text: the token ids that it may resemble. most: tokens proposed at a time, at most.

    A response begins as the text does, as far as is known. After a token that the text does not
    have there, the place after its last two tokens is looked for, first behind the last place.
    """

    def __init__(self, text: Sequence[int], most: int) -> None:
        self.text, self.most = list(text), most
        self.after: dict[tuple[int, int], list[int]] = {}  # two tokens in turn: the places after
        for i, pair in enumerate(zip(self.text, self.text[1:], strict=False)):
            self.after.setdefault(pair, []).append(i + 2)
        self.place = 0  # of the text: what the response may have next
        self.found = True  # whether there is reason to think so
        self.trusted = 1  # tokens to propose
        self.newest = -1  # of the response

    def proposal(self) -> list[int]:
        """Returns what the response may go on with; nothing, where there is no reason for any."""
        if not self.found:
            return []
        return self.text[self.place : self.place + min(self.trusted, self.most)]

    def append(self, token: int) -> None:
        """Takes the response's next token."""
        pair = (self.newest, token)
        self.newest = token
        if self.found and self.text[self.place : self.place + 1] == [token]:
            self.place, self.trusted = self.place + 1, self.trusted + 1
            return
        places = self.after.get(pair, [])
        self.found, self.trusted = bool(places), 1
        if places:
            self.place = next((p for p in places if p > self.place), places[-1])
