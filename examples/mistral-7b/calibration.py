"""Calibration texts like each expert's own inputs, from public instruction data in the expert's prompt format.

The paper's choice of calibration data is not known to us: these data sets and this number of rows are ours.
"""

import json
from pathlib import Path

ROWS = 256  # about 32,768 tokens and more, which is what compress uses
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response:"
)
CHATML = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
LLAMA_CHAT = "[INST] {question} [/INST]"
# expert -> data set, its columns of question and answer, prompt
SOURCES = {
    "dolphin": ("databricks/databricks-dolly-15k", "instruction", "response", CHATML),
    "chat": ("databricks/databricks-dolly-15k", "instruction", "response", LLAMA_CHAT),
    "code": ("theblackcat102/evol-codealpaca-v1", "instruction", "output", ALPACA),
    "math": ("meta-math/MetaMathQA", "query", "response", ALPACA + " Let's think step by step."),
}


def write_calibration(expert: str, file: Path) -> None:
    """Write the expert's calibration text, if it is not there yet. Needs `datasets` (part of `meswitch[lm-eval]`)."""
    if file.is_file():
        return
    from datasets import load_dataset

    source, question, answer, prompt = SOURCES[expert]
    rows = load_dataset(source, split="train").shuffle(seed=0).select(range(ROWS))
    lines = (
        json.dumps({"prompt": prompt.format(question=row[question]), "completion": " " + row[answer]}) for row in rows
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
