"""`--worker-cls meswitch.vllm.DeltaWorker`."""

from pathlib import Path
from typing import Any

from torch import nn

from meswitch.errors import ConfigError
from meswitch.ops.routing import MAX_TOKENS

try:
    import vllm  # noqa: F401
except ImportError as error:
    raise ConfigError("vLLM is not installed; install meswitch[vllm] (on a CPU: see docs/use/vllm.md)") from error

from meswitch.vllm import compat


class DeltaWorker(compat.worker_class()):  # type: ignore[misc]
    """vLLM's worker, whose model runner keeps deltas beside LoRA adapters."""

    def init_device(self) -> None:
        compat.check()
        super().init_device()
        # vLLM has four model runners (two versions, GPU and CPU), made inside `init_device`; all load LoRA this way
        self.model_runner.load_lora_model = self._load_lora_model

    def _load_lora_model(self, model: nn.Module, vllm_config: Any, device: Any) -> nn.Module:
        from meswitch.vllm.manager import DeltaWorkerManager

        runner = self.model_runner
        embeddings = getattr(model, "embedding_modules", {})  # a model without LoRA has none
        runner.lora_manager = DeltaWorkerManager(vllm_config, device, embeddings)
        loaded: nn.Module = runner.lora_manager.create_lora_manager(model, vllm_config)
        return loaded

    def prefetch_delta(self, directory: str) -> str:
        """Read an artifact in the background, so that its first request finds it; `prefetch` has the answers."""
        found: str = self.model_runner.lora_manager.prefetch(Path(directory))
        return found

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        if self.vllm_config.lora_config is None:
            raise ConfigError("deltas travel as LoRA adapters: add --enable-lora")
        sizes = self.vllm_config.compilation_config.cudagraph_capture_sizes or [0]
        if max(sizes) > MAX_TOKENS:
            raise ConfigError(
                f"cudagraph_capture_sizes: up to {max(sizes)}: the decode kernel takes {MAX_TOKENS} tokens of an "
                f"expert; add --compilation-config '{{\"max_cudagraph_capture_size\": {MAX_TOKENS}}}' (larger steps "
                "then run without a graph)"
            )
        super().load_model(*args, **kwargs)
