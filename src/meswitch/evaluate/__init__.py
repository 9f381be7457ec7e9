"""Is a compressed expert still as good? Questions with a check, fidelity to the full expert, and honest intervals."""

from meswitch.evaluate.fidelity import Divergence, Fidelity, Text, divergences, fidelity, layer_errors, total
from meswitch.evaluate.harness import Harness, HarnessSettings, Measure
from meswitch.evaluate.questions import (
    Comparison,
    GainRetained,
    Interval,
    Question,
    Score,
    Task,
    accuracy,
    answer,
    compare,
    find_checker,
    gain_retained,
    own_answers,
    read_task,
    wilson,
)
from meswitch.evaluate.run import Report, ResultRow, Settings, evaluate_family

__all__ = [
    "Comparison",
    "Divergence",
    "Fidelity",
    "GainRetained",
    "Harness",
    "HarnessSettings",
    "Interval",
    "Measure",
    "Question",
    "Report",
    "ResultRow",
    "Score",
    "Settings",
    "Task",
    "Text",
    "accuracy",
    "answer",
    "compare",
    "divergences",
    "evaluate_family",
    "fidelity",
    "find_checker",
    "gain_retained",
    "layer_errors",
    "own_answers",
    "read_task",
    "total",
    "wilson",
]
