"""A LoRA adapter and compressed full fine-tunes of one base, in one batch: `python examples/adapter_beside_deltas.py`.

An adapter's directory, as PEFT writes it, is an expert as it is. Here it is the nearest one to a full fine-tune
(`meswitch extract-lora`); one that was trained with PEFT is used in the same way.
"""

import shutil
from pathlib import Path

import meswitch
from meswitch.compression.extraction import LoraOptions, extract_lora

FAMILY = Path(__file__).parent / "family"
OUT = Path("runs/adapter_beside_deltas")


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    base = FAMILY / "base"
    experts = {"math": OUT / "math", "instruct-lora": OUT / "instruct-lora"}
    meswitch.compress(base, FAMILY / "math", experts["math"])
    extract_lora(base, FAMILY / "instruct", experts["instruct-lora"], LoraOptions(rank=64, modules_to_save=True))
    question = [{"role": "user", "content": "Reverse the order of these words: garden silver market"}]
    with meswitch.Engine(base, experts) as engine:
        names = ["base", *experts]
        answers = engine.generate([question] * len(names), model=names, max_new_tokens=24)
    for name, answer in zip(names, answers, strict=True):
        print(f"{name}: {answer.text!r}")


if __name__ == "__main__":
    main()
