"""Is a compressed expert still as good? Exact questions, fidelity to the full expert, and honest intervals."""

from meswitch.evaluate.accuracy import Score, accuracy, answer, own_answers
from meswitch.evaluate.fidelity import Divergence, Fidelity, Text, divergences, fidelity, total
from meswitch.evaluate.gain import Comparison, GainRetained, Interval, compare, gain_retained, wilson
from meswitch.evaluate.harness import Harness, HarnessSettings, Measure
from meswitch.evaluate.layer_errors import layer_errors
from meswitch.evaluate.report import Report, Row
from meswitch.evaluate.run import Settings, evaluate_family
from meswitch.evaluate.tasks import CHECKABLE, DOMAINS, Question, draw

__all__ = [
    "CHECKABLE",
    "DOMAINS",
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
    "Row",
    "Score",
    "Settings",
    "Text",
    "accuracy",
    "answer",
    "compare",
    "divergences",
    "draw",
    "evaluate_family",
    "fidelity",
    "gain_retained",
    "layer_errors",
    "own_answers",
    "total",
    "wilson",
]
