"""What the report's terms mean: a line below the passage where a term first stands."""

import re

# In the order of explanation: the term as a reader looks for it, what it looks like in a text, and
# one plain sentence.
TERMS: tuple[tuple[str, str, str], ...] = (
    ("policy", r"\bpolic(?:y|ies)\b", "the language model that is trained or measured"),
    (
        "start",
        r"(?<!random )\bstart\b(?! policy)|\bstart policy\b|\bsft\b(?=[ ,;]| \|)",
        "the policy that the run, or its first iteration, begins with",
    ),
    (
        "iteration",
        r"\biterations?\b|\biteration_\d",
        "one round of the method, from the policy of the round before",
    ),
    (
        "SFT",
        r"\bSFT\b|\bsft\b",
        "supervised fine-tuning, ordinary training on the data's responses",
    ),
    (
        "continual SFT",
        r"\bcontinual[ _](?:SFT|sft)\b",
        "more SFT from the same start, the baseline",
    ),
    ("held-out", r"\bheld[- ]out\b", "kept apart from all training"),
    (
        "validation",
        r"\bvalidation\b",
        "held-out rows that choose which weights are kept, and are in no other figure",
    ),
    ("greedy", r"\bgreedy\b", "an answer made of the likeliest token each time"),
    (
        "sampled",
        r"\bsampled\b",
        "answers drawn at random, several a prompt, of which the mean counts",
    ),
    ("points", r"\bpoints\b", "the difference of two percentages"),
    (
        "NLL",
        r"\bNLL\b",
        "minus the log-probability of a text, for each token; lower is likelier",
    ),
    ("95 % interval", r"95 % interval", "about two standard errors to either side"),
    ("+-", r"\+-|±", "one standard error"),
    (
        "guide",
        r"\bguides?\b",
        "a second network that turns a response into a short vector, its latent",
    ),
    (
        "latent distance",
        r"\blatent distances?\b|\bdistances\b",
        "how far the latents of the two responses to a prompt lie apart",
    ),
    (
        "weight",
        r"\bpair weights?\b|\bweights? spread\b|\bdistances and weights\b",
        "how strongly a pair pulls on the policy: its distance over the mean distance",
    ),
    (
        "margin",
        r"\bmargins?\b",
        "how much more a policy prefers the better response than its reference does",
    ),
    ("reference", r"\breference\b", "the fixed policy that a training is measured against"),
    (
        "log-prob",
        r"\blog-prob(?:s|abilit(?:y|ies))?\b",
        "the natural logarithm of a text's probability",
    ),
    ("reward accuracy", r"\breward accuracy\b", "the share of pairs with a positive margin"),
)


class Glossary:
    """Which terms are explained so far, of one page."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def first_used(self, text: str) -> list[tuple[str, str]]:
        """Returns (term, what it means) of those that no text before had, in the order of
        explanation; they count as explained.
        """
        new = [
            (term, meaning)
            for term, looks, meaning in TERMS
            if term not in self._said and re.search(looks, text, re.IGNORECASE)
        ]
        self._said |= {term for term, _ in new}
        return new


def explained(found: list[tuple[str, str]]) -> str:
    """Writes terms and meanings as one line of sentences; "" of none."""
    return " ".join(f"{term[0].upper()}{term[1:]}: {meaning}." for term, meaning in found)
