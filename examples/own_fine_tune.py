"""Fine-tune a base on your own conversations, compress what changed, and measure what that cost.

    python examples/own_fine_tune.py [--base DIR|HUB_ID] [--data train.jsonl] [--questions test.jsonl] [--steps 60]

Rows of --data are `{"messages": [{"role": ..., "content": ...}, ...]}`. Any trainer does in place of `train`: what
counts is a checkpoint of the base's shapes. The defaults teach the example family's base arithmetic, badly.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import meswitch
from meswitch.evaluate import Settings, evaluate_family, read_task

FAMILY = Path(__file__).parent / "family"


def train(base: str, data: Path, out: Path, steps: int, batch: int = 8) -> None:
    """A full fine-tune, as short as it gets: next-token loss on whole conversations."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    draw = random.Random(0)
    for step in range(steps):
        texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in draw.sample(rows, batch)]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(FAMILY / "base"))
    parser.add_argument("--data", type=Path, default=FAMILY / "calibration" / "math.jsonl")
    parser.add_argument("--questions", type=Path, default=FAMILY / "questions" / "math.jsonl")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--limit", type=int, default=50, help="questions")
    parser.add_argument("--out", type=Path, default=Path("runs/own_fine_tune"))
    options = parser.parse_args()
    full, delta = options.out / "full", options.out / "delta"
    train(options.base, options.data, full, options.steps)
    artifact = meswitch.compress(options.base, full, delta, calibration=options.data, distill=20, overwrite=True)
    print(f"{artifact.bits_per_weight:.2f} bits a weight")
    task = read_task(options.questions, "number", limit=options.limit)
    how = Settings(fidelity_n=16, max_new_tokens=56)
    print(evaluate_family(options.base, {"mine": full}, {"mine": delta}, tasks=[task], settings=how).to_markdown())


if __name__ == "__main__":
    main()
