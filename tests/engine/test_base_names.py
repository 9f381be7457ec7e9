"""A base whose stored names carry what a wrapper put before them is served like the same base without."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

import meswitch
from tests.architectures import tiny
from tests.architectures.course import NEW_TOKENS, PROMPTS, differs, load


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "language_model."])
def test_the_base_and_its_experts_answer_as_by_themselves(tmp_path, family, model_type, prefix):
    plain = tiny.write(tiny.config_of(model_type), tmp_path / "plain", family / "base")
    base = shutil.copytree(plain, tmp_path / "base")
    tensors = load_file(plain / "model.safetensors")
    save_file(
        {prefix + name: tensor for name, tensor in tensors.items()},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    full = tiny.tune(plain, tmp_path / "a", 1)
    meswitch.compress(base, full, tmp_path / "delta", bits=4)
    meswitch.merge(base, tmp_path / "delta", tmp_path / "merged")
    models = {"base": load(plain), "a": load(tmp_path / "merged")}
    with meswitch.Engine(base, {"a": tmp_path / "delta"}, device="cpu", kv_cache_tokens=4096) as engine:
        for tokenizer in engine.tokenizers.values():
            tokenizer.ends = []
        asked = [(name, list(prompt)) for prompt in PROMPTS for name in models]
        answers = engine.generate(
            [prompt for _, prompt in asked], model=[name for name, _ in asked], max_new_tokens=NEW_TOKENS
        )
        assert not engine.by_turns
    for (name, prompt), answer in zip(asked, answers, strict=True):
        assert differs(models[name], prompt, list(answer.tokens)) is None
