"""All that meswitch knows of vLLM's versions and of its private parts. Nothing else here names a private symbol.

`missing_symbols()` says by name what an unknown version lacks; a test runs it against the installed one.
"""

import contextlib
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from meswitch.errors import ConfigError

OLDEST, NEWEST = (0, 25), (0, 33)  # what the contract below was compared with
log = logging.getLogger("vllm.meswitch")  # a child of vLLM's: its level, its handlers


@dataclass(frozen=True, slots=True)
class Symbol:
    """Something of vLLM that is used: `path` in `module`, and parameters that it must take."""

    module: str
    path: str
    parameters: tuple[str, ...] = ()


CONTRACT = (
    Symbol("vllm.v1.worker.gpu_worker", "Worker.init_device"),
    Symbol("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.load_lora_model", ("model", "vllm_config")),
    Symbol(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin._set_active_loras",
        ("prompt_lora_mapping", "token_lora_mapping", "lora_requests"),
    ),
    Symbol("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._manager_cls"),
    Symbol("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._load_adapter", ("lora_request",)),
    Symbol("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.create_lora_manager", ("model", "vllm_config")),
    Symbol(
        "vllm.lora.model_manager",
        "LRUCacheLoRAModelManager.__init__",
        ("model", "max_num_batched_tokens", "lora_config", "device", "vllm_config"),
    ),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager.activate_adapter", ("lora_id",)),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager.capacity"),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager.list_adapters"),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager.lora_slots"),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager._add_adapter", ("lora",)),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager._create_lora_modules"),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager._set_adapter_mapping", ("mapping",)),
    Symbol("vllm.lora.model_manager", "LRUCacheLoRAModelManager.create_dummy_lora", ("lora_id", "rank")),
    Symbol("vllm.lora.lora_model", "LoRAModel.__init__", ("lora_model_id", "rank", "loras")),
    Symbol("vllm.lora.layers", "LoRAMapping.__init__", ("index_mapping", "prompt_mapping", "type")),
    Symbol("vllm.lora.layers", "LoRAMappingType.LANGUAGE"),
    Symbol("vllm.lora.layers", "VocabParallelEmbeddingWithLoRA"),
    Symbol("vllm.lora.resolver", "LoRAResolver.resolve_lora", ("base_model_name", "lora_name")),
    Symbol("vllm.lora.resolver", "LoRAResolverRegistry.register_resolver", ("resolver_name", "resolver")),
    Symbol("vllm.lora.utils", "get_adapter_absolute_path", ("lora_path",)),
    Symbol("vllm.lora.utils", "replace_submodule", ("model", "module_name", "new_module")),
    Symbol("vllm.model_executor.layers.linear", "QKVParallelLinear"),
    Symbol("vllm.model_executor.layers.linear", "MergedColumnParallelLinear"),
    Symbol("vllm.model_executor.layers.linear", "ColumnParallelLinear"),
    Symbol("vllm.model_executor.layers.linear", "RowParallelLinear"),
    Symbol("vllm.model_executor.layers.linear", "ReplicatedLinear"),
    Symbol("vllm.model_executor.layers.linear", "UnquantizedLinearMethod"),
    Symbol("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbedding"),
    Symbol("vllm.model_executor.layers.vocab_parallel_embedding", "ParallelLMHead"),
    Symbol("vllm.model_executor.layers.layernorm", "RMSNorm"),
    Symbol("vllm.model_executor.layers.attention_layer_base", "AttentionLayerBase"),
    Symbol(
        "vllm.forward_context", "set_forward_context", ("attn_metadata", "vllm_config", "num_tokens", "skip_compiled")
    ),
    Symbol(
        "vllm.model_executor.layers.quantization.base_config", "QuantizeMethodBase.apply", ("layer", "args", "kwargs")
    ),
    Symbol("vllm.model_executor.layers.quantization.base_config", "QuantizeMethodBase.embedding", ("layer",)),
    Symbol("vllm.model_executor.models.utils", "WeightsMapper._map_name", ("key",)),
    Symbol("vllm.model_executor.models.interfaces", "supports_multimodal", ("model",)),
    Symbol("vllm.distributed", "get_pp_group"),
    Symbol("vllm.distributed", "get_tensor_model_parallel_rank"),
    Symbol("vllm.distributed", "get_tensor_model_parallel_world_size"),
)


SERVER_CONTRACT = (  # what `prefetch` uses, in the process of the HTTP server
    Symbol("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc", ("method", "args")),
    Symbol("vllm.entrypoints.openai.models.serving", "OpenAIServingModels"),
)


class LayerKinds(NamedTuple):
    """vLLM's classes of layers that multiply with a matrix or look rows of a table up."""

    qkv: type
    merged: type
    column: type
    row: type
    replicated: type
    embedding: type
    head: type


def layer_kinds() -> LayerKinds:
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    return LayerKinds(
        linear.QKVParallelLinear,
        linear.MergedColumnParallelLinear,
        linear.ColumnParallelLinear,
        linear.RowParallelLinear,
        linear.ReplicatedLinear,
        vocab_parallel_embedding.VocabParallelEmbedding,
        vocab_parallel_embedding.ParallelLMHead,
    )


def rank_and_size() -> tuple[int, int]:
    """This process among those that share each layer."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def graphs_by_experts(config: Any) -> bool:
    """Whether vLLM captures a graph for each number of adapters in a step, and not one for all of them."""
    by_lora = getattr(config.compilation_config, "cudagraph_specialize_lora", False)
    return bool(by_lora and getattr(config.lora_config, "specialize_active_lora", False))


def cache_knows_paths() -> bool:
    """Whether vLLM's prefix cache tells adapters of one name apart by their paths; vLLM 0.25 does not."""
    from vllm.v1.core import kv_cache_utils

    keys = getattr(kv_cache_utils, "_gen_lora_extra_hash_keys", None)
    return keys is not None and "lora_path" in inspect.getsource(keys)


def is_plain(method: object) -> bool:
    """Whether a linear layer's method is one product with its 16-bit weight."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    return type(method) is UnquantizedLinearMethod


def missing_symbols(contract: tuple[Symbol, ...] = CONTRACT) -> list[str]:
    """One line for each symbol of the contract that the installed vLLM does not have."""
    problems = []
    for symbol in contract:
        where = f"{symbol.module}.{symbol.path}"
        try:
            found: Any = importlib.import_module(symbol.module)
            for part in symbol.path.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            problems.append(f"{where}: gone ({error})")
            continue
        if symbol.parameters:
            known = inspect.signature(found).parameters
            lost = [name for name in symbol.parameters if name not in known]
            if lost:
                problems.append(f"{where}: no longer takes {', '.join(lost)}; it takes {', '.join(known)}")
    if not any(hasattr(_mapper_class(), name) for name in _UNSTACKED):
        problems.append(f"vllm.model_executor.models.utils.WeightsMapper: has none of {', '.join(_UNSTACKED)}")
    return problems


def check() -> None:
    """Refuse a vLLM that lacks what is used here, and say so where the version is outside the declared range.

    Raises:
        ConfigError: naming each symbol.
    """
    found = version()
    problems = missing_symbols()
    text = f"vLLM {'.'.join(map(str, found))}"
    span = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
    if problems:
        raise ConfigError(f"{text}: meswitch knows {span}; this one lacks:\n  " + "\n  ".join(problems))
    if not OLDEST <= found[:2] <= NEWEST:
        log.warning("%s has all that meswitch uses, but only %s have been tried", text, span)


def version() -> tuple[int, ...]:
    """The installed vLLM's."""
    import vllm

    return tuple(int(part) for part in vllm.__version__.split("+")[0].split(".")[:3] if part.isdigit())


_UNSTACKED = ("get_rename_mapper", "get_unstacked_mapper")  # since 0.32, before


def _mapper_class() -> type:
    from vllm.model_executor.models import utils

    found: type = utils.WeightsMapper
    return found


def renamer(model: nn.Module) -> Callable[[str], str]:
    """From a checkpoint's tensor name to where vLLM's model has it; q, k and v keep their own names."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return lambda name: name
    for method in _UNSTACKED:
        if hasattr(mapper, method):
            mapper = getattr(mapper, method)()
            break

    def rename(name: str) -> str:
        return mapper._map_name(name) or name

    return rename


def packed_modules(model: nn.Module, declared: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """A layer that vLLM joins -> the checkpoint's layers that it is made of, in order.

    Args:
        model: vLLM's.
        declared: what it says for LoRA; models without LoRA say it to their loader only.
    """
    stacked = getattr(getattr(model, "hf_to_vllm_mapper", None), "orig_to_new_stacked", {})
    found: dict[str, list[str]] = {}
    for part, (whole, _) in stacked.items():
        found.setdefault(whole.strip("."), []).append(part.strip("."))
    return found | dict(declared)


def supports_lora(model: nn.Module) -> bool:
    return bool(getattr(model, "supports_lora", False))


def reads_checkpoint(config: Any) -> bool:
    """Whether a model's weights are those of the checkpoint's safetensors files."""
    return config.load_config.load_format in ("auto", "hf", "safetensors", "fastsafetensors", "runai_streamer")


def worker_class() -> type:
    """The worker of this platform."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        found: type = CPUWorker
    else:
        from vllm.v1.worker.gpu_worker import Worker

        found = Worker
    return found


def is_first_of_pipeline() -> bool:
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_first_rank)


def takes_embeddings(model: nn.Module) -> bool:
    """Whether a model is given embeddings in place of tokens, as those are that also take images."""
    from vllm.model_executor.models.interfaces import supports_multimodal

    return bool(supports_multimodal(model))


@contextlib.contextmanager
def eager_step(config: Any, tokens: int) -> Iterator[None]:
    """What a model must be called in; nothing is compiled, and no cache is read.

    Args:
        config: vLLM's.
        tokens: of the step.
    """
    from vllm.forward_context import set_forward_context

    with (
        torch.compiler.set_stance("force_eager"),
        set_forward_context(None, config, num_tokens=tokens, skip_compiled=True),
    ):
        yield


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """Layers that read the cache."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    return [module for module in model.modules() if isinstance(module, AttentionLayerBase)]


def missing_modules(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of what other pipeline ranks hold."""
    return tuple(f"{name}." for name, module in model.named_modules() if type(module).__name__ == "PPMissingLayer")
