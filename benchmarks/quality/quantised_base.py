"""A quantised base: what deltas lose over it, and what deltas that were made against it repair.

    python benchmarks/quality/quantised_base.py [--experts math code sql] [--questions 1000]

For each expert and kind of codes: the expert itself rounded (`fine-tune`), an artifact that was made against the base
in 16 bit, over the rounded base (`plain delta`), and one that was made against the rounded base (`own delta`).
Artifacts are of 2 bits, without calibration.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import meswitch
from meswitch.checkpoint import Checkpoint
from meswitch.compression.merge import restored_tensor
from meswitch.evaluate import divergences, total
from meswitch.quantised import KINDS, quantise
from meswitch_lab.toy import CHECKABLE, accuracy, own_answers

FAMILY = Path(__file__).parents[2] / "examples" / "family"
FILE = Path(__file__).parents[1] / "results" / "quality-quantised-base.json"
PROMPTS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", nargs="+", default=list(CHECKABLE), choices=CHECKABLE)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for expert in options.experts:
            tokenizer = AutoTokenizer.from_pretrained(FAMILY / expert)
            full, model = (
                AutoModelForCausalLM.from_pretrained(FAMILY / expert, dtype=torch.float32).eval() for _ in range(2)
            )
            texts = own_answers(full, tokenizer, expert, PROMPTS, options.seed)
            for base, way, bpw, tensors in ways(expert, Path(scratch)):
                for name, weight in model.state_dict().items():
                    weight.copy_(tensors[name])
                score = accuracy(model, tokenizer, expert, options.questions, options.seed)
                row = {"expert": expert, "base": base, "way": way, "bpw": bpw, "correct": score.correct}
                row["kl"] = total(divergences(model, full, texts)).kl
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


def ways(expert: str, scratch: Path) -> Iterator[tuple[str, str, float | None, dict[str, Tensor]]]:
    """The base, the way, bits a weight of the artifact if there is one, and the model's tensors."""
    plain = meswitch.compress(FAMILY / "base", FAMILY / expert, scratch / f"plain-{expert}")
    kinds = {"16 bit": Checkpoint.open(FAMILY / "base")}
    for kind in KINDS:
        directory = scratch / kind
        kinds[kind] = Checkpoint.open(directory if directory.is_dir() else quantise(FAMILY / "base", directory, kind))
    for kind, base in kinds.items():
        if kind == "16 bit":
            yield kind, "fine-tune", None, _all(Checkpoint.open(FAMILY / expert))
            yield kind, "plain delta", plain.bits_per_weight, _restored(base, plain)
            continue
        rounded = quantise(FAMILY / expert, scratch / f"{kind}-{expert}", kind)
        yield kind, "fine-tune", None, _all(Checkpoint.open(rounded))
        yield kind, "plain delta", plain.bits_per_weight, _restored(base, plain)
        own = meswitch.compress(base.directory, FAMILY / expert, scratch / f"own-{kind}-{expert}")
        yield kind, "own delta", own.bits_per_weight, _restored(base, own)


def _all(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return _tied({name: checkpoint.read(name).float() for name in checkpoint.tensors})


def _restored(base: Checkpoint, artifact: meswitch.Artifact) -> dict[str, Tensor]:
    """Whatever base the artifact was made against."""
    return _tied({name: restored_tensor(base, artifact, name, torch.float32) for name in artifact.manifest.tensors})


def _tied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"lm_head.weight": tensors["model.embed_tokens.weight"]} | tensors


if __name__ == "__main__":
    with torch.no_grad():
        main()
