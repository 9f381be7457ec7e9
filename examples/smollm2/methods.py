"""What is compared: for each method and budget the options of `meswitch.compress`.

To add a method, add an entry. A budget is bits a weight of the whole artifact; None is a method that has no choice. A
peer's options are those whose size is nearest to the budget, rather above it than below; a budget that it cannot come
near is left out.
"""

from typing import Any

Keywords = dict[str, Any]
Budget = float | None

BUDGETS = (3.0, 2.2, 1.3, 1.0, 0.5)
OURS = "me-switch"
QUANTISED: Keywords = {"embeddings": "quantised"}  # not whole, as the papers have them: the fairer comparison
NO_TEXT: Keywords = {"calibration": None}  # makes no use of it

METHODS: dict[str, dict[Budget, Keywords]] = {
    OURS: {budget: {"target_bpw": budget} for budget in BUDGETS},
    "me-switch-distilled": {budget: {"target_bpw": budget, "distill": 300} for budget in BUDGETS},
    "rtn": {
        3.0: {"method": "rtn", "bits": 3, "group_size": None, **NO_TEXT},
        2.2: {"method": "rtn", "bits": 2, **NO_TEXT},
        1.3: {"method": "rtn", "bits": 1, **NO_TEXT},
        1.0: {"method": "rtn", "bits": 1, "group_size": None, **NO_TEXT},
    },
    "bitdelta": {None: {"method": "bitdelta", "distill": 200, **QUANTISED}},
    "delta-come": {
        3.0: {"method": "delta-come", "bits": 3, **QUANTISED},
        2.2: {"method": "delta-come", "bits": 2, **QUANTISED},
        1.3: {"method": "delta-come", "bits": 1, **QUANTISED},
    },
    "deltazip": {
        3.0: {"method": "deltazip", "bits": 4, **QUANTISED},
        2.2: {"method": "deltazip", "bits": 2, **QUANTISED},
        1.3: {"method": "deltazip", "bits": 1, **QUANTISED},
    },
    "svd": {
        3.0: {"method": "svd", "bits": 3, **NO_TEXT},
        2.2: {"method": "svd", "bits": 2, **NO_TEXT},
        1.3: {"method": "svd", "bits": 1, **NO_TEXT},
    },
    "dare": {
        3.0: {"method": "dare", "drop": 0.5, "bits": 4, **NO_TEXT},
        2.2: {"method": "dare", "drop": 0.7, "bits": 4, **NO_TEXT},
        1.3: {"method": "dare", "drop": 0.9, "bits": 3, **NO_TEXT},
    },
}


def options(method: str, budget: Budget, text: str) -> Keywords:
    """Keywords of `meswitch.compress`.

    Args:
        text: the calibration file, unless the entry says otherwise.
    """
    return {"calibration": text} | METHODS[method][budget]


def chosen(methods: list[str], budgets: list[float]) -> list[tuple[str, Budget]]:
    """What to compress by: methods without a choice once, whatever the budgets are."""
    return [(method, budget) for method in methods for budget in METHODS[method] if budget is None or budget in budgets]
