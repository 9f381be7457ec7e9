"""A base that vLLM serves quantised: the deltas are added to what its own method computes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from meswitch.artifact import Artifact
from meswitch.checkpoint import Checkpoint
from meswitch.errors import IncompatibleError
from meswitch.vllm.places import Base
from tests.support.models import edit_config
from tests.support.vllm_engines import EXPERTS, PROMPT, adapters_of, ask, behind, running, with_deltas

NAMES = ("base", *EXPERTS)
PROMPTS = [PROMPT, PROMPT[:12], PROMPT[::3]]


# 8-bit activations turn the last bits of a sum, which another batch sums in another order, into steps
NEAR = 0.5  # in log probability


def quantise(base, directory, *, rescaled=False, whole=False):
    """Linear layers in 8 bits, a scale a row, activations in 8 bits a token, as llm-compressor writes them.

    Args:
        rescaled: with scales of channels moved from the first norm into the matrices behind it. whole: embedding, head
            and norms in another dtype too.
    """
    shutil.copytree(base, directory)
    tensors = load_file(directory / "model.safetensors")
    if rescaled:
        norm = "model.layers.0.input_layernorm.weight"
        tensors[norm] = tensors[norm] * 2
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            found[name] = (tensor.float() / scale).round().to(torch.int8)
            found[f"{name}_scale"] = scale
        else:
            found[name] = tensor.to(torch.float8_e4m3fn) if whole else tensor
    save_file(found, directory / "model.safetensors", metadata={"format": "pt"})
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": numbers | {"strategy": "channel", "dynamic": False},
        "input_activations": numbers | {"strategy": "token", "dynamic": True},
    }
    method = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    edit_config(directory, quantization_config=method)
    return directory


@pytest.fixture(scope="module")
def quantised(family, tmp_path_factory):
    return quantise(family / "base", tmp_path_factory.mktemp("quantised") / "base")


@pytest.fixture(scope="module")
def plain(quantised):
    """What vLLM answers without us."""
    with running(quantised) as engine:
        return ask(engine, PROMPTS)


@pytest.fixture(scope="module")
def engine(quantised, deltas, plain):  # after `plain`: a process has one engine at a time
    experts = [str(path) for path in deltas.values()]
    # without LoRA: vLLM's LoRA layers do not know this method's weights on a CPU
    with with_deltas(quantised, additional_config={"meswitch": {"experts": experts, "lora": False}}) as made:
        yield made


def test_a_base_of_which_vllm_would_load_other_files_is_refused(family, math_delta, tmp_path):
    """vLLM loads what an index names, transformers the single file beside it."""
    base = shutil.copytree(family / "base", tmp_path / "base")
    shutil.copyfile(base / "model.safetensors", base / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(base / "model.safetensors"), "model-00001-of-00001.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(
        IncompatibleError, match=r"of other files \(model-00001-of-00001.safetensors\), which vLLM loads"
    ):
        Base(str(base)).check(Artifact.open(math_delta))


@pytest.mark.vllm
def test_a_token_of_a_mixed_batch_is_its_own_experts(engine, plain, deltas):
    known = adapters_of(deltas)
    asked = [(name, prompt) for prompt in PROMPTS for name in NAMES]
    mixed = ask(engine, [prompt for _, prompt in asked], [known[name] for name, _ in asked])
    for (name, prompt), answer in zip(asked, mixed, strict=True):
        assert behind(engine, known[name], prompt, answer) < NEAR, (name, prompt)
    strangers = [behind(engine, known["sql"], prompt, mixed[asked.index(("math", prompt))]) for prompt in PROMPTS]
    assert min(strangers) > 2 * NEAR
    assert len(set(mixed)) == len(mixed)
    assert mixed[:: len(NAMES)] == plain


@pytest.mark.vllm
def test_linear_layers_add_the_delta_to_what_the_bases_method_computes(engine, deltas):
    known = adapters_of(deltas)
    ask(engine, [PROMPT], [known["sql"]], max_tokens=1)
    slots = engine.llm_engine.collective_rpc(
        lambda worker: worker.model_runner.lora_manager._adapter_manager.lora_index_to_id
    )[0]
    sql = slots.index(known["sql"][1])

    def compare(model):
        from meswitch.vllm.delta_op import _current
        from meswitch.vllm.layers import DeltaMethod

        step, found = _current[0], {}
        step.tokens.fill([sql, -1, sql])
        for name, module in model.named_modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, DeltaMethod) and name.endswith("_proj"):
                x = torch.randn(3, module.input_size, generator=torch.Generator().manual_seed(0))
                added = method.apply(module, x) - method.inner.apply(module, x)
                found[name] = (type(method.inner).__name__, x, added)
        step.tokens.fill([-1] * 3)
        return found

    (layers,) = engine.apply_model(compare)
    artifact = Artifact.open(deltas["sql"])
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for name, (method, x, added) in layers.items():
        assert method == "CompressedTensorsLinearMethod"
        parent, _, leaf = name.rpartition(".")
        stored = [artifact.read(f"{parent}.{part}.weight") for part in parts.get(leaf, (leaf,))]
        wanted = x @ torch.cat([delta.dequantize() for delta in stored]).T
        assert not added[1].any()
        torch.testing.assert_close(added[[0, 2]], wanted[[0, 2]], rtol=1e-3, atol=1e-4)
    assert len(layers) == 4 * 6


def test_a_quantised_base_is_known_by_what_is_left_of_it(family, quantised, deltas, tmp_path):
    artifact = Artifact.open(deltas["math"])
    Base(str(family / "base")).check(artifact)
    Base(str(quantised)).check(artifact)
    with pytest.raises(IncompatibleError, match="vLLM serves both together"):  # what the embedded engine asks
        artifact.check_base(Checkpoint.open(quantised))
    rescaled = quantise(family / "base", tmp_path / "rescaled", rescaled=True)
    with pytest.raises(IncompatibleError, match=r"layers\.0\.input_layernorm\.weight is not that of .*\(AWQ"):
        Base(str(rescaled)).check(artifact)
    whole = quantise(family / "base", tmp_path / "whole", whole=True)
    with pytest.raises(IncompatibleError, match=r"quantised in whole.*set check_base to false"):
        Base(str(whole)).check(artifact)
    with pytest.raises(IncompatibleError, match="its fingerprint"):
        Base(str(family / "math")).check(artifact)
