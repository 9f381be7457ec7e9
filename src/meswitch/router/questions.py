"""Which questions a batch of the LLM router's training asks: its rows, the options they show, the words of both."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from meswitch.router.base import OTHER
from meswitch.router.data import Row
from meswitch.router.llm import LlmSettings
from meswitch.router.prompt import NONE_OF_THESE, Prompt
from meswitch.router.variants import disguises

_EXAMPLE = 120  # characters of a request that stands for a description


class Asked:
    """The rows to train on, each with its copies without habits; and by expert, for examples."""

    def __init__(self, rows: Sequence[Row], prompt: Prompt) -> None:
        self._prompt = prompt
        self.domains = [row.domain for row in rows]
        self.texts = [row.query for row in rows]
        self.disguised = [[row.query for row in copies] for copies in disguises(rows)]
        self.of = {name: [i for i, row in enumerate(rows) if row.domain == name] for name in {*self.domains}}

    def query(self, i: int, disguise: float, generator: torch.Generator) -> list[int]:
        """The tokens of row `i`, or of one of its copies."""
        copies = self.disguised[i]
        disguised = copies and _chance(disguise, generator)
        return self._prompt.query(copies[_draw(len(copies), generator)] if disguised else self.texts[i])


def balanced(rows: Sequence[Row], balance: float) -> Tensor:
    """[n] float64, how likely each row is drawn: between "as they come" (0) and all domains, and all sources of a
    domain, alike (1)."""
    domains = Counter(row.domain for row in rows)
    sources = Counter((row.domain, row.source) for row in rows)
    within: defaultdict[str, float] = defaultdict(float)
    for (domain, _), count in sources.items():
        within[domain] += count ** (1 - balance)
    return torch.tensor(
        [
            domains[row.domain] ** (1 - balance) * sources[row.domain, row.source] ** -balance / within[row.domain]
            for row in rows
        ],
        dtype=torch.float64,
    )


def described(
    name: str, descriptions: Mapping[str, str], rows: Asked, reword: float, generator: torch.Generator
) -> str:
    """What a question says of a label: its description or, for the share `reword`, a part of it or a request."""
    if name == OTHER:
        return NONE_OF_THESE
    text = descriptions[name]
    if not _chance(reword, generator):
        return text
    if rows.of.get(name) and _chance(0.5, generator):
        example = " ".join(rows.texts[rows.of[name][_draw(len(rows.of[name]), generator)]].split())
        return f'Requests such as "{example[:_EXAMPLE]}"'
    parts = [part for part in re.split(r"[:;,.]\s+", text.strip().rstrip(".")) if part]
    some = [part for part in parts if _chance(0.5, generator)]
    return ", ".join(some or [parts[_draw(len(parts), generator)]]) if parts else text


def _chance(share: float, generator: torch.Generator) -> bool:
    return float(torch.rand(1, generator=generator)) < share


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))


def draw_options(experts: list[str], settings: LlmSettings, step: int, generator: torch.Generator) -> list[str]:
    """Which labels a question shows, in which order."""
    settled = step / max(1.0, settings.settle * settings.steps)
    if not _chance(settled, generator) and len(experts) < settings.max_options:
        return [*experts, OTHER]
    shuffled = [experts[i] for i in torch.randperm(len(experts), generator=generator).tolist()]
    shown = shuffled[: settings.max_options - 1]
    if len(shown) > 1 and _chance(settings.drop, generator):
        shown = shown[: 1 + _draw(len(shown) - 1, generator)]
    labels = [*shown, OTHER]
    return [labels[i] for i in torch.randperm(len(labels), generator=generator).tolist()]
