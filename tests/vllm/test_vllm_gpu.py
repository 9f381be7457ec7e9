"""On GPUs, with the kernels, torch.compile and CUDA graphs: one rank, and two where there are two.

16-bit answers may leave those of another rounding at a near tie, so they are judged token by token: how much less
likely than the likeliest token each one is to the expert's merged model in float32.
"""

import pytest
import torch

from tests.support.vllm_engines import EXPERTS, PROMPT, adapters_of, ask, with_deltas

pytestmark = [pytest.mark.vllm, pytest.mark.gpu]
NAMES = ("base", *EXPERTS)
PROMPTS = [PROMPT, PROMPT[:12], PROMPT[::-1], PROMPT[::3]]
NEAR, FAR = 0.5, 4.0  # in log probability
OPTIONS = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "compilation_config": {"cudagraph_capture_sizes": [4, 16]},
    "attention_backend": "TRITON_ATTN",
    "gpu_memory_utilization": 0.3,
    "max_loras": 2,
    "specialize_active_lora": True,
}


@pytest.fixture(scope="module")
def behind(merged):
    """(expert, prompt, answer) -> how far the answer's worst token is behind the expert's likeliest."""
    from transformers import AutoModelForCausalLM

    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to("cuda")
        for name, path in merged.items()
    }

    def worst(name, prompt, answer):
        tokens = torch.tensor([[*prompt, *answer]], device="cuda")
        with torch.inference_mode():
            scores = models[name](tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = scores.gather(1, torch.tensor(answer, device="cuda")[:, None])[:, 0]
        return float((scores.max(1).values - own).max())

    return worst


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_token_is_its_own_experts(family, deltas, behind, ranks, monkeypatch):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # its end gives the GPU's memory back
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    known = adapters_of(deltas)
    asked = [(name, prompt) for prompt in PROMPTS for name in NAMES]  # more than run at once
    with with_deltas(family / "base", tensor_parallel_size=ranks, **OPTIONS) as engine:
        answers = ask(engine, [prompt for _, prompt in asked], [known[name] for name, _ in asked])
    others = []
    for (name, prompt), answer in zip(asked, answers, strict=True):
        assert behind(name, prompt, answer) < NEAR, (name, prompt)
        others += [behind(other, prompt, answer) for other in NAMES if other != name]
    assert sorted(others)[len(others) // 10] > FAR  # a mix-up would show
