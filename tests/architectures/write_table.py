"""Makes `src/meswitch/architectures.json` from the whole course, and the table of docs/results/architectures.md.

python tests/architectures/write_table.py          # every model type; tests/architectures compare with the result
python tests/architectures/write_table.py gpt2     # these only, the rest stays
python tests/architectures/write_table.py --docs   # the table alone
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
FACTS = ROOT / "src" / "meswitch" / "architectures.json"
PAGE = ROOT / "docs" / "results" / "architectures.md"
BEGIN, END = "<!-- architectures -->\n", "<!-- end -->"


def facts_of(model_type: str) -> dict[str, object]:
    from tests.architectures.course import follow

    with tempfile.TemporaryDirectory() as directory:
        outcome = follow(model_type, Path(directory), ROOT / "examples" / "family" / "base")
    if outcome.wrong:
        raise SystemExit(f"{model_type}: wrong answers: {outcome.wrong}")
    return outcome.facts()


def table(facts: dict[str, dict[str, object]]) -> str:
    lines = [
        "| model type | class | compressed, merged | calibrated | served | why not |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    shown = {"batch": "one batch", "turns": "by turns", None: "no"}
    for model_type, fact in sorted(facts.items()):
        made = "yes" if fact["compressed"] else "no"
        calibrated = "yes" if fact["calibrated"] else "no"
        reasons = [f"calibrated: {fact['uncalibrated']}"] if fact["uncalibrated"] else []
        reasons += [str(fact["reason"])] if fact["reason"] else []
        why = "; ".join(reasons).replace("|", "\\|").replace("\n", " ")
        runner = fact["runner"]
        lines.append(f"| {model_type} | {fact['class']} | {made} | {calibrated} | {shown[runner]} | {why} |")  # type: ignore[index]
    return "\n".join(lines) + "\n"


def main() -> None:
    import torch
    import transformers

    from tests.architectures.left_out import TRIED

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    wanted = [argument for argument in sys.argv[1:] if not argument.startswith("--")] or TRIED
    stored = json.loads(FACTS.read_text()) if FACTS.exists() else {"model_types": {}}
    known = {name: fact for name, fact in stored["model_types"].items() if name in TRIED}
    if "--docs" not in sys.argv:
        for number, model_type in enumerate(wanted, start=1):
            known[model_type] = facts_of(model_type)
            print(f"{number}/{len(wanted)} {model_type}: {known[model_type]['runner']}", flush=True)
            result = {"transformers": transformers.__version__, "model_types": dict(sorted(known.items()))}
            FACTS.write_text(json.dumps(result, indent=1) + "\n")
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{table(known)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
