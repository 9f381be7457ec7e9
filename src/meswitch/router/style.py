"""How a query is written, apart from what it says: 16 numbers that tell a request to an expert from other traffic.

A shortcut to be used with care. Leaving sources out, these numbers alone reach an AUROC of 0.94 and 0.90 on the two
sources of `other`, but those are all in lower case: with capitals and final marks put in, it falls to 0.53 and 0.41.
They are used beside states and words, and only with encoders that do not see the case.
"""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from meswitch.router.lexical import clip

WIDTH = 16
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_PERSON = re.compile(r"\b(?:i|my|me|you|your)\b")


def style(texts: Sequence[str]) -> Tensor:
    """[len(texts), WIDTH] float32."""
    return torch.tensor([_style(clip(text)) for text in texts], dtype=torch.float32).reshape(len(texts), WIDTH)


def _style(text: str) -> list[float]:
    words = text.split()
    characters = max(1, len(text))
    end = text.rstrip()[-1:]
    return [
        float(text[:1].isupper()),
        float(end == "?"),
        float(end == "."),
        float(end.isalnum()),
        sum(map(str.isupper, text)) / characters * 10,
        float(any(word[:1].isupper() for word in words[1:])),
        float(any(word.isupper() and len(word) > 1 for word in words)),
        float(any(map(str.isdigit, text))),
        sum(map(str.isdigit, text)) / characters * 10,
        float("\n" in text),
        math.log(max(1, len(words))),
        len(_SENTENCE_END.findall(text)) ** 0.5,
        float("," in text),
        float("'" in text),
        float(any(mark in text for mark in "([=_")),
        float(_PERSON.search(text.lower()) is not None),
    ]
