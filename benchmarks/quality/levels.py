"""Which levels a code stands for: without a zero, with one, or shifted to fit. Rounding alone, without calibration.

    python benchmarks/quality/levels.py [--experts math] [--questions 2000]

Every block projection, the embedding and the head are rounded to nearest, in groups of 128 input channels, with the
scale of least squared error out of 40. `mid-rise` is what meswitch stores. The other two are not stored anywhere: they
are rounded in memory, to compare. `asymmetric` also needs a zero point for every group: 16 bits more.
"""

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import meswitch
from meswitch.evaluate import divergences, total
from meswitch_lab.toy import CHECKABLE, accuracy, own_answers

FAMILY = Path(__file__).parents[2] / "examples" / "family"
FILE = Path(__file__).parents[1] / "results" / "quality-levels.json"
GROUP, SEARCH, PROMPTS = 128, 40, 128


def mid_rise(groups: Tensor, bits: int, ratio: float) -> Tensor:
    """Odd multiples of the scale: {-3, -1, 1, 3} s."""
    top = 2**bits - 1
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) * ratio / top
    return (((groups / scale + top) / 2).round().clamp(0, top) * 2 - top) * scale


def mid_tread(groups: Tensor, bits: int, ratio: float) -> Tensor:
    """A signed integer times the scale: {-2, -1, 0, 1} s."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) * ratio / -low
    return (groups / scale).round().clamp(low, high) * scale


def asymmetric(groups: Tensor, bits: int, ratio: float) -> Tensor:
    """Evenly spaced between the group's extremes, both drawn in."""
    low, high = groups.amin(-1, keepdim=True) * ratio, groups.amax(-1, keepdim=True) * ratio
    step = (high - low).clamp_min(1e-12) / (2**bits - 1)
    return ((groups - low) / step).round().clamp(0, 2**bits - 1) * step + low


LEVELS = {"mid-rise (default)": mid_rise, "mid-tread": mid_tread, "asymmetric": asymmetric}


def rounded(delta: Tensor, levels: str, bits: int) -> Tensor:
    """[rows, in] with the ratio of least squared error in every group."""
    groups = delta.view(delta.shape[0], -1, GROUP)
    best, least = torch.zeros_like(groups), torch.full((*groups.shape[:2], 1), torch.inf)
    for ratio in torch.linspace(0.2, 1.0, SEARCH).tolist():
        tried = LEVELS[levels](groups, bits, ratio)
        error = (tried - groups).square().sum(-1, keepdim=True)
        best = torch.where(error < least, tried, best)
        least = torch.minimum(error, least)
    return best.view_as(delta)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", nargs="+", default=["math"])
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    base = AutoModelForCausalLM.from_pretrained(FAMILY / "base", dtype=torch.float32).state_dict()
    rows = []
    for expert in options.experts:
        full = AutoModelForCausalLM.from_pretrained(FAMILY / expert, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(FAMILY / expert)
        texts = own_answers(full, tokenizer, expert, PROMPTS, options.seed)
        model = AutoModelForCausalLM.from_pretrained(FAMILY / expert, dtype=torch.float32).eval()
        for bits in (2, 3, 4):
            for levels in LEVELS:
                power = missed = 0.0
                for name, weight in model.state_dict().items():
                    if weight.dim() == 2:
                        delta = full.state_dict()[name] - base[name]
                        found = rounded(delta, levels, bits)
                        power += float(delta.square().sum())
                        missed += float((delta - found).square().sum())
                        weight.copy_(base[name] + found)
                row = {"expert": expert, "bits": bits, "levels": levels, "relative_error": (missed / power) ** 0.5}
                row["kl"] = total(divergences(model, full, texts)).kl
                if expert in CHECKABLE:
                    score = accuracy(model, tokenizer, expert, options.questions, options.seed)
                    row["correct"] = score.correct
                rows.append(row)
                print(json.dumps(row), flush=True)
    meta = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": "cpu",
        "questions": options.questions,
        "seed": options.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "meswitch": meswitch.__version__,
    }
    FILE.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
