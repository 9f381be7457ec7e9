"""Two experts and the base in one batch of vLLM, offline: `python examples/vllm_offline.py`, after `make demo`."""

from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

ROOT = Path(__file__).parents[1]
EXPERTS = {"math": ROOT / "runs/demo/math", "sql": ROOT / "runs/demo/sql"}

if __name__ == "__main__":  # vLLM starts processes
    engine = LLM(
        model=str(ROOT / "examples/family/base"),
        worker_cls="meswitch.vllm.DeltaWorker",
        enable_lora=True,
        max_loras=2,
        additional_config={"meswitch": {"experts": [str(path) for path in EXPERTS.values()], "lora": False}},
    )
    question = [{"role": "user", "content": "Tom has 23 apples. Tom buys 4 bags with 5 apples each. How many now?"}]
    requests = [LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(EXPERTS.items(), start=1)]
    answers = engine.chat([question] * 3, SamplingParams(temperature=0, max_tokens=60), lora_request=[None, *requests])
    for name, answer in zip(("base", *EXPERTS), answers, strict=True):
        print(f"{name}: {answer.outputs[0].text!r}")
