"""What opening the embedded engine costs at true shapes, and what of it is the proof that it answers rightly.

    python benchmarks/serving/engine_open.py --work FOLDER [--model mistral-7b] [--layers 8] [--out results.json]

A random base and two fine-tunes are written to FOLDER and compressed first. "proof" is all that the engine does before
"ready" besides loading the base: steps of the running batch, and one block of each kind with merged weights. The engine
is opened twice: the first time compiles kernels, which the first request would have to wait for otherwise. Beside it
stands the floor: the bytes that the proof must touch (base weights once a step, two experts' deltas) at the speed at
which this machine copies memory.
"""

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository: `benchmarks` is found there

from benchmarks.common.synthetic import MODELS, write_family


def copy_speed(device: str) -> float:
    """Bytes a second, read and write together."""
    buffer = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    other = torch.empty_like(buffer)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        other.copy_(buffer)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * buffer.numel() / (time.perf_counter() - begin))
    return best


def measure(work: Path, config: dict, tokenizer: Path, device: str) -> dict[str, float | str]:
    import meswitch

    experts = {}
    write_family({work / name: config for name in ("base", "a", "b")}, 5 << 30, 0.01, tokenizer)
    for name in ("a", "b"):
        begin = time.perf_counter()
        meswitch.compress(work / "base", work / name, work / f"delta-{name}", device=device, overwrite=True)
        print(f"compressed {name} in {time.perf_counter() - begin:.0f} s", flush=True)
        experts[name] = work / f"delta-{name}"
    found: dict[str, float | str] = {}
    for number in ("first", "second"):
        begin = time.perf_counter()
        with meswitch.Engine(work / "base", experts, device=device, slots=2) as engine:
            found |= {f"{number}_s": time.perf_counter() - begin, f"{number}_proof_s": engine.proof_seconds}
            memory = engine.memory()
            prompts = [[5 + i] * 24 for i in range(4)]
            answers = engine.generate(prompts, model=["a", "b", "base", "a"], max_new_tokens=8)
            found |= {
                "runner": "turns" if engine.takes_turns else "batch",
                "reasons": "; ".join(engine.by_turns),
                "base_bytes": memory["base"],
                "slots_bytes": memory["slots"],
                "answered": sum(len(answer.tokens) for answer in answers),
            }
    steps = 2 + 3 + 3 + 3  # of the model alone, of the survey, of the mixed step, of one request
    return found | {"floor_s": (steps * memory["base"] + memory["slots"]) / copy_speed(device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, default="mistral-7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the true model")
    parser.add_argument("--tokenizer", type=Path, default=Path("examples/family/base"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config = dict(MODELS[options.model])
    if options.layers:
        config["num_hidden_layers"] = options.layers
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = measure(options.work, config, options.tokenizer, device)
    card = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    layers = config["num_hidden_layers"]
    print(f"{options.model}, {layers} layers, {card}, runner {found['runner']} {found['reasons']}")
    print("| opened | seconds | of them the proof | floor of the proof |\n| --- | ---: | ---: | ---: |")
    for number in ("first", "second"):
        print(f"| {number} | {found[f'{number}_s']:.1f} | {found[f'{number}_proof_s']:.1f} | {found['floor_s']:.2f} |")
    if options.out:
        import transformers

        about = {
            "model": options.model,
            "layers": layers,
            "card": card,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": datetime.now(UTC).date().isoformat(),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(about | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
