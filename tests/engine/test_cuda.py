"""The same engine on a GPU. Skipped where there is none."""

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import meswitch
from meswitch import Engine
from meswitch.architecture import tried
from meswitch.checkpoint import Checkpoint
from meswitch.compression.merge import load_merged
from tests.architectures.course import follow
from tests.support.adapters import pairs, write_adapter

pytestmark = pytest.mark.gpu
PROMPT = [{"role": "user", "content": "Tom has 23 apples. Tom buys 4 bags with 5 apples each. How many now?"}]


def test_mixed_experts_equal_their_merged_models(family, deltas, tmp_path):
    targets = ("q_proj", "up_proj", "embed_tokens", "lm_head")
    adapter = write_adapter(
        tmp_path / "poet", pairs(family / "base", *targets, size=0.15), target_modules=list(targets)
    )
    experts = deltas | {"poet": adapter}
    with Engine(family / "base", experts, device="cuda", dtype="float32", slots=3, kv_cache_tokens=8192) as engine:
        answers = engine.generate([PROMPT] * 12, model=engine.names * 2, max_new_tokens=24)
        for answer in answers:
            if answer.model == "base":
                model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.float32)
            else:
                model = load_merged(family / "base", experts[answer.model])
            ids = torch.tensor([engine.tokenizers[answer.model].encode(PROMPT)], device="cuda")
            alone = model.cuda().generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=3,
                pad_token_id=1,
            )
            assert answer.tokens == tuple(alone[0, ids.shape[1] :].tolist()), answer.model


def test_bfloat16_is_the_default_and_answers(family, deltas):
    with Engine(family / "base", {"math": deltas["math"]}, kv_cache_tokens=8192) as engine:
        assert engine.model.dtype == torch.bfloat16
        (answer,) = engine.generate([PROMPT], model="math", max_new_tokens=40)
        assert answer.text.startswith("4*5=20")


@pytest.mark.parametrize("calibrated", [False, True])
def test_compression_on_the_gpu_is_as_good_as_on_the_cpu(family, tmp_path, calibrated):
    options = {"calibration": family / "calibration" / "code.jsonl"} if calibrated else {}
    errors = []
    for device in ("cpu", "cuda"):
        meswitch.compress(family / "base", family / "code", tmp_path / device, device=device, **options)
        model = load_merged(family / "base", tmp_path / device)
        full = Checkpoint.open(family / "code")
        state = model.state_dict()
        errors.append(sum((state[n] - full.read(n).float()).square().sum().item() for n in full.tensors) ** 0.5)
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


# dense, scaled embedding, Conv1D, mixtures of each layout, hybrids, head with bias, by turns, vision-language
@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3",
        "gpt2",
        "gpt_neox",
        "gptj",
        "phi",
        "cohere",
        "olmo2",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
        "gpt_oss",
        "granitemoe",
        "deepseek_v3",
        "falcon",
        "stablelm",
        "mamba",
        "jamba",
        "lfm2",
        "qwen3_next",
        "llava",
        "qwen2_5_vl",
    ],
)
def test_an_architecture_is_served_on_a_gpu_as_on_a_cpu(model_type, tmp_path, family):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    outcome = follow(model_type, tmp_path, family / "base", device="cuda")
    assert outcome.error is None
    assert outcome.wrong == []
    assert outcome.right == 9
    assert outcome.distance < 0.6
    if transformers.__version__ == tried(model_type).transformers:
        assert outcome.runner == tried(model_type).runner, outcome.reasons
