"""What `run.py` measures: suites of groups of settings, each a dict of `meswitch_lab.options` keywords.

To add a row, add a line. `calibration` is left out where the expert's own calibration file is meant, and can name it as
`{own}`, and that of another expert as `{other}`: `self:{own}`, `{own}+self`. `distill` can be a dict: what differs
from the method's `TrainingRecipe`. A keyword that is not known fails in its own row and stops no other.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from meswitch.codec import codec_names

Keywords = dict[str, Any]
QUANTISED: Keywords = {"embeddings": "quantised"}
# methods that make no use of calibration text
NO_TEXT = frozenset({"rtn", "svd", "dare", "d-qrelo", "ultradelta", "delta-dct"})


def _bits(number: int) -> str:
    return f"{number} bit{'s' * (number > 1)}"


# -- family: the default at the budgets, and the least gain retained there --------------------------------

FAMILY: dict[str, Keywords] = {
    **{f"{bpw} bpw": {"target_bpw": bpw} for bpw in (3.0, 2.3, 1.3)},
    **{f"{bpw} bpw, 1000 steps": {"target_bpw": bpw, "distill": 1000} for bpw in (3.0, 2.3, 1.3)},
}
BARS: dict[str, dict[str, float]] = {
    "3.0 bpw": {"math": 0.995, "code": 0.995, "instruct": 0.995},
    "2.3 bpw": {"math": 0.97, "code": 0.97, "instruct": 0.97},
    "1.3 bpw": {"math": 0.85, "code": 0.95, "instruct": 0.95},
    "3.0 bpw, 1000 steps": {"math": 0.995, "code": 0.995, "instruct": 0.995},
    "2.3 bpw, 1000 steps": {"math": 0.99, "code": 0.99, "instruct": 0.99},
    "1.3 bpw, 1000 steps": {"math": 0.97, "code": 0.97, "instruct": 0.97},
}

# -- frontier: the default and every baseline, at many sizes -------------------------------------------------------

FRONTIER: dict[str, dict[str, Keywords]] = {
    "me-switch": {
        **{_bits(bits): {"bits": bits} for bits in (1, 2, 3, 4)},
        "1 bit, 1000 steps": {"bits": 1, "distill": 1000},
        **{f"{bpw} bpw": {"target_bpw": bpw} for bpw in (1.3, 1.6, 2.0, 2.3, 3.0, 4.0)},
    },
    "rtn": {
        **{_bits(bits): {"bits": bits} for bits in (1, 2, 3, 4)},
        **{f"{_bits(bits)}, a scale a row": {"bits": bits, "group_size": None} for bits in (1, 2, 3)},
        "2 bits, exact embeddings": {"bits": 2, "embeddings": "exact"},
    },
    "bitdelta": {"as published": {}, "quantised": QUANTISED},
    "svd": {f"bytes of {_bits(bits)}": {"bits": bits} for bits in (1, 2, 3, 4)},
    "per-axis": {"as published": {}, "quantised": QUANTISED},
    "delta-come": {
        "1 bit, as published": {"bits": 1},
        **{f"bytes of {_bits(bits)}, quantised": {"bits": bits, **QUANTISED} for bits in (1, 2, 3, 4)},
    },
    "deltazip": {
        "2 bits, as published": {"bits": 2},
        "4 bits, as published": {"bits": 4},
        **{f"{_bits(bits)}, quantised": {"bits": bits, **QUANTISED} for bits in (1, 2, 3, 4)},
    },
    "dare": {
        f"drop {drop}, {_bits(bits)}": {"drop": drop, "bits": bits}
        for drop, bits in ((0.9, 4), (0.75, 2), (0.75, 4), (0.5, 2), (0.5, 4), (0.25, 4))
    },
    "d-qrelo": {f"{bpw} bpw": {"bpw": bpw} for bpw in (2.2, 1.3, 1.0)},
    **{
        method: {f"{bpw} bpw, quantised": {"bpw": bpw, **QUANTISED} for bpw in (2.2, 1.3, 1.0, 0.5)}
        for method in ("impart", "ultradelta", "delta-dct")
    },
}
LAYERS_OF: frozenset[tuple[str, str]] = frozenset(  # whose output error is measured layer by layer
    {("me-switch", f"{bpw} bpw") for bpw in (1.3, 2.3, 3.0)}
    | {("me-switch", "2 bits"), ("rtn", "2 bits"), ("bitdelta", "quantised"), ("deltazip", "2 bits, quantised")}
    | {("delta-come", "bytes of 2 bits, quantised"), ("svd", "bytes of 2 bits")}
)

# -- ablations: one thing changed at a time; `{}` is the default ---------------------------------------------------

ABLATED: Keywords = {"bits": 2}  # what all of them share, unless they say otherwise
ONE_BIT: Keywords = {"bits": 1}
TOKENS = (4096, 16384, 65536, 131072)
ABLATIONS: dict[str, dict[str, Keywords]] = {
    "salient channels: how many": {
        "0": {"salient": 0},
        "1 (default)": {},
        **{str(k): {"salient": k} for k in (2, 4, 8, 16, 32)},
    },
    "salient channels: how many, not distilled": {
        "0": {"salient": 0, "distill": 0},
        "1 (default)": {"distill": 0},
        **{str(k): {"salient": k, "distill": 0} for k in (2, 4, 8, 16, 32)},
    },
    "salient channels: which (8 of them, not distilled)": {
        "reconstruction error (default rule)": {"salient": 8, "distill": 0},
        "random": {"salient": 8, "salient_rule": "random", "distill": 0},
        "largest weights": {"salient": 8, "salient_rule": "magnitude", "distill": 0},
        "largest activations": {"salient": 8, "salient_rule": "activation", "distill": 0},
    },
    "group size": {
        "32": {"group_size": 32},
        "64": {"group_size": 64},
        "128 (default)": {},
        "a row": {"group_size": None},
    },
    "solvers, not distilled": {
        "feedback and refit (default)": {"distill": 0},
        "no feedback": {"distill": 0, "feedback": False},
        "no refit": {"distill": 0, "refit": False},
        "neither": {"distill": 0, "feedback": False, "refit": False},
        "neither, scales from the largest weight": {
            "distill": 0,
            "feedback": False,
            "refit": False,
            "scales": "absmax",
        },
        "neither, scales of a normal distribution": {
            "distill": 0,
            "feedback": False,
            "refit": False,
            "scales": "normal",
        },
        "data-free": {"distill": 0, "calibration": None},
    },
    "solvers, distilled": {
        "feedback and refit (default)": {},
        "neither": {"feedback": False, "refit": False},
    },
    "distillation steps": {
        "0": {"distill": 0},
        "100": {"distill": 100},
        "300 (default)": {},
        **{str(steps): {"distill": steps} for steps in (600, 1000)},
    },
    "distillation steps at 1 bit": {
        "0": ONE_BIT | {"distill": 0},
        "100": ONE_BIT | {"distill": 100},
        "300 (default)": ONE_BIT,
        **{str(steps): ONE_BIT | {"distill": steps} for steps in (600, 1000)},
    },
    "what is trained": {
        "codes, scales, salient channels, norms (default)": {},
        "all but codes": {"distill": {"codes": False}},
        "all but norms": {"distill": {"norms": False}},
        "questions count like answers": {"distill": {"question_weight": 1.0}},
    },
    "weight of the loss on blocks' outputs": {
        "0": {"distill": {"hidden": 0.0}},
        "1": {"distill": {"hidden": 1.0}},
        "5 (default)": {},
        "20": {"distill": {"hidden": 20.0}},
    },
    "weight of the loss on blocks' outputs at 1 bit": {
        "0": ONE_BIT | {"distill": {"hidden": 0.0}},
        "1": ONE_BIT | {"distill": {"hidden": 1.0}},
        "5 (default)": ONE_BIT,
        "20": ONE_BIT | {"distill": {"hidden": 20.0}},
    },
    "what is trained at 1 bit": {
        "codes, scales, salient channels, norms (default)": ONE_BIT,
        "all but codes": ONE_BIT | {"distill": {"codes": False}},
        "questions count like answers": ONE_BIT | {"distill": {"question_weight": 1.0}},
    },
    "distillation, end to end or block by block": {
        "end to end (default)": {},
        "block by block, 100 steps each": {"distill_scope": "block", "distill": 100},
        "block by block, 300 steps each": {"distill_scope": "block", "distill": 300},
        "none": {"distill": 0},
    },
    "distillation at 1 bit, end to end or block by block": {
        "end to end (default)": ONE_BIT,
        "block by block, 100 steps each": ONE_BIT | {"distill_scope": "block", "distill": 100},
        "block by block, 300 steps each": ONE_BIT | {"distill_scope": "block", "distill": 300},
        "none": ONE_BIT | {"distill": 0},
    },
    "calibration source": {
        "own text (default)": {},
        "written by the expert": {"calibration": "self"},
        "its answers to the file's questions": {"calibration": "self:{own}"},
        "another domain's text": {"calibration": "{other}"},
        "none": {"calibration": None},
    },
    "embeddings": {"quantised (default)": {}, "exact": {"embeddings": "exact"}},
    "calibration tokens": {
        **{str(tokens): {"calibration_tokens": tokens} for tokens in TOKENS},
        "524288 (default)": {},
    },
    "calibration tokens at 1 bit": {
        **{str(tokens): ONE_BIT | {"calibration_tokens": tokens} for tokens in TOKENS},
        "524288 (default)": ONE_BIT,
    },
    "calibration tokens, its answers to the file's questions": {
        **{str(tokens): {"calibration": "self:{own}", "calibration_tokens": tokens} for tokens in TOKENS},
        "524288 of the file (default)": {},
    },
    "calibration tokens, not distilled": {
        **{str(tokens): {"distill": 0, "calibration_tokens": tokens} for tokens in (256, 1024, 4096, 16384)},
        "32768 (default)": {"distill": 0},
    },
}

# ------------------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """One row of a table."""

    group: str
    label: str
    keywords: Keywords
    layers: bool = False  # measure the output error of every layer too

    @property
    def key(self) -> str:
        """The same for settings that ask for the same artifact."""
        return key_of(self.keywords)


def key_of(keywords: Mapping[str, Any]) -> str:
    return json.dumps(keywords, sort_keys=True)


def _frontier() -> list[Setting]:
    found = []
    for method, rows in FRONTIER.items():
        assert method in codec_names(), method
        common: Keywords = {} if method == "me-switch" else {"method": method}
        if method in NO_TEXT:
            common |= {"calibration": None}
        found += [Setting(method, label, common | own, (method, label) in LAYERS_OF) for label, own in rows.items()]
    return found


SUITES: dict[str, list[Setting]] = {
    "family": [Setting("family", label, keywords, True) for label, keywords in FAMILY.items()],
    "frontier": _frontier(),
    "ablations": [
        Setting(group, label, ABLATED | own) for group, rows in ABLATIONS.items() for label, own in rows.items()
    ],
}
