"""Large deltas: the math expert against its own base, and against another fine-tune in the base's place.

    python benchmarks/quality/large.py [--bits 1 2 3] [--questions 2000]

From another fine-tune to the math expert it is farther than from the base: a delta of more than 0.3 of the norm, of a
trained model whose answers can be checked. Every artifact has the default settings.
"""

import argparse
import json
import platform
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import meswitch
from meswitch.compression.diff import diff
from meswitch.evaluate import divergences, total
from meswitch_lab.toy import accuracy, own_answers

FAMILY = Path(__file__).parents[2] / "examples" / "family"
FILE = Path(__file__).parents[1] / "results" / "quality-large.json"
EXPERT, BASES, PROMPTS, SEED = "math", ("base", "instruct"), 128, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--questions", type=int, default=2000)
    options = parser.parse_args()
    full = AutoModelForCausalLM.from_pretrained(FAMILY / EXPERT, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FAMILY / EXPERT)
    theirs = accuracy(full, tokenizer, EXPERT, options.questions, SEED)
    texts = own_answers(full, tokenizer, EXPERT, PROMPTS, SEED)
    rows = []
    for base in BASES:
        far = diff(FAMILY / base, FAMILY / EXPERT).total.relative_norm
        for bits in options.bits:
            notices: list[str] = []
            with tempfile.TemporaryDirectory() as scratch:
                artifact = meswitch.compress(
                    FAMILY / base,
                    FAMILY / EXPERT,
                    Path(scratch) / "delta",
                    bits=bits,
                    calibration=FAMILY / "calibration" / f"{EXPERT}.jsonl",
                    notice=notices.append,
                )
                model = meswitch.load_merged(FAMILY / base, artifact.directory)
            row = {
                "base": base,
                "relative_norm": far,
                "bits": bits,
                "bits_per_weight": artifact.bits_per_weight,
                "correct": accuracy(model, tokenizer, EXPERT, options.questions, SEED).correct,
                "full": theirs.correct,
                "kl": total(divergences(model, full, texts)).kl,
                "notices": notices,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    meta = {
        "date": datetime.now(UTC).date().isoformat(),
        "questions": options.questions,
        "seed": SEED,
        "prompts": PROMPTS,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": f"{platform.machine()} CPU",
    }
    FILE.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
