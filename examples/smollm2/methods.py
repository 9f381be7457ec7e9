"""What is compared: for each method and budget the options of `meswitch.compress`.

To add a method, add an entry. A budget is bits a weight of the whole artifact; None is a method that has no choice. A
peer's options are those whose size is nearest to the budget, rather above it than below; a budget that it cannot come
near is left out.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meswitch import Options

Keywords = dict[str, Any]
Budget = float | None

BUDGETS = (3.0, 2.2, 1.3, 1.0, 0.5)
OURS = "me-switch"
QUANTISED: Keywords = {"embeddings": "quantised"}  # not whole, as the papers have them: the fairer comparison
NO_TEXT: Keywords = {"calibration": None}  # makes no use of it


def _at(budgets: tuple[float, ...], **same: Any) -> dict[Budget, Keywords]:
    """A method that takes a budget for every matrix."""
    return {budget: {"bpw": budget, **QUANTISED, **same} for budget in budgets}


METHODS: dict[str, dict[Budget, Keywords]] = {
    OURS: {budget: {"target_bpw": budget} for budget in BUDGETS},
    "me-switch-untrained": {budget: {"target_bpw": budget, "distill": 0} for budget in BUDGETS},
    "me-switch-data-free": {budget: {"target_bpw": budget, **NO_TEXT} for budget in BUDGETS},
    "rtn": {
        3.0: {"bits": 3, "group_size": None, **NO_TEXT},
        2.2: {"bits": 2, **NO_TEXT},
        1.3: {"bits": 1, **NO_TEXT},
        1.0: {"bits": 1, "group_size": None, **NO_TEXT},
    },
    "bitdelta": {1.0: {"distill": 200, **QUANTISED}, None: {"distill": 200}},
    "delta-come": _at(BUDGETS),
    "impart": _at(BUDGETS),
    "d-qrelo": _at((3.0, 2.2, 1.3), **NO_TEXT),  # stores a sign a weight: 1 bit and less cannot be had
    "ultradelta": _at(BUDGETS, **NO_TEXT),
    "delta-dct": _at(BUDGETS, **NO_TEXT),
    "svd": _at(BUDGETS, **NO_TEXT),
    "deltazip": {
        3.0: {"bits": 4, **QUANTISED},
        2.2: {"bits": 2, **QUANTISED},
        1.3: {"bits": 1, **QUANTISED},
    },
    "dare": {
        3.0: {"drop": 0.5, "bits": 4, **NO_TEXT},
        2.2: {"drop": 0.7, "bits": 4, **NO_TEXT},
        1.3: {"drop": 0.9, "bits": 3, **NO_TEXT},
    },
}


def options(method: str, budget: Budget, text: str) -> "Options":
    """How `meswitch.compress` is asked.

    Args:
        text: the calibration file, unless the entry says otherwise.
    """
    import meswitch_lab

    codec = OURS if method.startswith(OURS) else method
    return meswitch_lab.options(codec, **{"calibration": text, **METHODS[method][budget]})


def chosen(methods: list[str], budgets: list[float]) -> list[tuple[str, Budget]]:
    """What to compress by: methods without a choice once, whatever the budgets are."""
    return [(method, budget) for method in methods for budget in METHODS[method] if budget is None or budget in budgets]
