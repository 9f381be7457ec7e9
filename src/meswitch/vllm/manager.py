"""vLLM's LoRA managers, holding deltas beside LoRA adapters: the same ids, slots and least-recently-used order."""

import dataclasses
import logging
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn
from vllm.lora.layers import LoRAMapping, LoRAMappingType, VocabParallelEmbeddingWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path, replace_submodule
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from meswitch.artifact import Artifact
from meswitch.artifact.manifest import MANIFEST_NAME
from meswitch.errors import ConfigError, MeswitchError
from meswitch.ops.routing import BASE
from meswitch.vllm import compat, delta_op, layers
from meswitch.vllm.arena import Arena, Prepared
from meswitch.vllm.background import READY, Background, Source
from meswitch.vllm.base import Base
from meswitch.vllm.places import places
from meswitch.vllm.prepare import prepare
from meswitch.vllm.settings import KEY, Settings
from meswitch.vllm.step import Step
from meswitch.vllm.warm import warm

log = logging.getLogger("vllm.meswitch")  # a child of vLLM's: its level, its handlers
NO_LORA = 0  # vLLM's id of the base


class DeltaModel(LoRAModel):
    """A delta where vLLM expects a LoRA: one without any LoRA layers. delta: None for vLLM's warm-up."""

    def __init__(
        self, lora_model_id: int, delta: Prepared | None, rank: int = 1, loras: Any = None, **more: Any
    ) -> None:
        super().__init__(lora_model_id, rank, loras or {}, **more)
        self.delta = delta
        self.source: Source | None = None

    def clone(self, lora_model_id: int) -> "DeltaModel":
        return DeltaModel(lora_model_id, self.delta, self.rank, dict(self.loras))


class DeltaModelManager(LRUCacheLoRAModelManager):
    """Slots on the device: each holds a LoRA adapter or a delta."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        config = kwargs["vllm_config"]
        self.settings = Settings.of(config.additional_config)
        self.arena: Arena | None = None
        self._spare = 0
        super().__init__(model, *args, **kwargs)
        self.rename = compat.renamer(model)
        self._served = Base(config.model_config.model)
        self._caches_prompts = bool(config.cache_config.enable_prefix_caching)
        self.names: dict[str, tuple[Path, str]] = {}  # of all that was ever loaded, as `check_name` takes them
        found = list(places(model, self.packed_modules_mapping))
        self.arena = Arena(
            found,
            self.settings.models(self._served.source),
            self.rename,
            slots=self.lora_slots,
            device=self.device,
            dtype=config.model_config.dtype,
            base_vocabulary=config.model_config.get_vocab_size(),
            extra_rows=self.settings.extra_rows,
        )
        if self.arena.extra_rows > 0 and any(isinstance(m, VocabParallelEmbeddingWithLoRA) for m in model.modules()):
            raise ConfigError(
                f"extra_rows: {self.arena.extra_rows}: vLLM's LoRA embedding takes no tokens after the base's; set "
                f"additional_config.{KEY}.lora to false"
            )
        specialized = compat.graphs_by_experts(config)
        self.step = Step(self.max_num_batched_tokens, self.lora_slots, self.device, specialized)
        delta_op.install(self.step)
        layers.install(model, self.arena, self.step, replace_submodule)
        self.background = Background(self.read, self.device)
        self._elsewhere = compat.missing_modules(model)
        graphs = config.compilation_config.cudagraph_capture_sizes or []
        warm(self.arena, config.model_config.dtype, graphs, self.max_num_batched_tokens, specialized)
        log.info("meswitch: %s for deltas", self.arena.describe())

    def read(self, directory: Path) -> Prepared:
        """An artifact, checked and laid out in host memory."""
        started = time.monotonic()
        artifact = Artifact.open(directory)
        if self.settings.check_base:
            self._served.check(artifact)
        assert self.arena is not None
        prepared = prepare(artifact, self.arena, self.rename, self.settings, self._elsewhere)
        log.info("meswitch: %s read in %.1f s", directory.name, time.monotonic() - started)
        return prepared

    def prefetch(self, source: Source) -> str:
        """Read an artifact in the background unless it is here; see `Background.start`."""
        return self.background.start(source) if self.resident(source) is None else READY

    def resident(self, source: Source) -> Prepared | None:
        """An artifact that is in host memory under some name."""
        models = self.list_adapters().values()  # a copy: to look at vLLM's cache itself would count as use
        same = (model for model in models if isinstance(model, DeltaModel) and model.source == source)
        return next((model.delta for model in same), None)

    def check_name(self, name: str, weights: tuple[Path, str]) -> None:
        """Refuse a delta under a name whose cached prompts are of other weights.

        Args:
            weights: where they lie, and a digest of their manifest.

        Raises:
            ConfigError: vLLM would take what it cached for the other weights.
        """
        before = self.names.get(name, weights)
        told_apart = before[0] != weights[0] and compat.cache_knows_paths()
        if before != weights and self._caches_prompts and not told_apart:
            raise ConfigError(
                f"{name}: other weights had this name ({before[0]}), and vLLM would take prompts that it cached for "
                "them; load these under a new name, or start it with --no-enable-prefix-caching"
            )

    @property
    def capacity(self) -> int:
        """Adapters in host memory; every delta takes the same bytes, so a budget of bytes is a count."""
        most: int = super().capacity
        if self.settings.host_bytes is None or self.arena is None:
            return most
        fit = self.settings.host_bytes // max(1, self.arena.slot_bytes)
        return max(self.lora_slots, min(most, fit))  # a step may need as many at once

    def activate_adapter(self, lora_id: int) -> bool:
        activated: bool = super().activate_adapter(lora_id)
        if activated and self.arena is not None:
            model = self._registered_adapters[lora_id]
            slot = self.lora_index_to_id.index(lora_id)
            self.arena.put(slot, model.delta if isinstance(model, DeltaModel) else None)
            self._last_mapping = None  # the slot's kind may have changed though the mapping has not
        return activated

    def _add_adapter(self, lora: LoRAModel) -> None:
        if isinstance(lora, DeltaModel) and not lora.loras:  # nothing to pack and pin
            self._registered_adapters[lora.id] = lora
        else:
            super()._add_adapter(lora)

    def create_dummy_lora(self, lora_id: int, *args: Any, **kwargs: Any) -> DeltaModel:
        """For warm-up and capture, an adapter that is both: graphs must hold the kernels of both."""
        dummy = super().create_dummy_lora(lora_id, *args, **kwargs)
        return DeltaModel(lora_id, None, dummy.rank, dummy.loras)

    @property
    def lora_slots(self) -> int:
        most: int = super().lora_slots
        return most + self._spare

    def _create_lora_modules(self) -> None:
        if self.settings.lora:
            # vLLM's CPU kernels take slot -1, the base's, for the last one: give the layers one more, which stays zeros
            self._spare = int(self.device.type == "cpu")
            super()._create_lora_modules()
            self._spare = 0

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        known = self.list_adapters()
        models = {index: known.get(index) for index in self.lora_index_to_id if index is not None}
        deltas = {index for index, model in models.items() if isinstance(model, DeltaModel)}
        only = {index for index in deltas if not models[index].loras}
        plain = mapping
        if only:  # LoRA's kernels skip the base's tokens
            plain = dataclasses.replace(
                mapping,
                index_mapping=tuple(NO_LORA if index in only else index for index in mapping.index_mapping),
                prompt_mapping=tuple(NO_LORA if index in only else index for index in mapping.prompt_mapping),
            )
        super()._set_adapter_mapping(plain)
        if mapping.type != LoRAMappingType.LANGUAGE:
            return
        slots = {index: slot for slot, index in enumerate(self.lora_index_to_id) if index in deltas}
        self.step.dummy = any(models[index].delta is None for index in deltas)
        self.step.tokens.fill([slots.get(index, BASE) for index in mapping.index_mapping])
        self.step.head.fill([slots.get(index, BASE) for index in mapping.prompt_mapping])


class DeltaWorkerManager(LRUCacheWorkerLoRAManager):
    """Loads a delta where the path holds one, else a LoRA adapter as vLLM does."""

    _manager_cls = DeltaModelManager

    def prefetch(self, directory: Path) -> str:
        """Have an artifact read in the background; anything else is ready as it is."""
        if not (directory / MANIFEST_NAME).is_file():
            return READY
        found: str = self._adapter_manager.prefetch(_source(directory))
        return found

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        manager, name = self._adapter_manager, lora_request.lora_name
        directory = Path(get_adapter_absolute_path(lora_request.lora_path))
        manifest = directory / MANIFEST_NAME
        if manifest.is_file():
            weights = _source(directory)
            try:
                manager.check_name(name, weights)
                prepared = manager.resident(weights) or manager.background.take(weights) or manager.read(directory)
            except MeswitchError as error:
                raise ValueError(str(error)) from error  # what vLLM's server answers a request with
            found: LoRAModel = DeltaModel(lora_request.lora_int_id, prepared)
            found.source = weights
        elif manager.settings.lora:
            weights = directory.resolve(), ""
            found = super()._load_adapter(lora_request)
        else:
            raise ValueError(
                f"{directory}: not a meswitch artifact (no {MANIFEST_NAME}), and additional_config.{KEY}.lora is false"
            )
        manager.names[name] = weights
        return found


def _source(directory: Path) -> Source:
    return directory.resolve(), sha256((directory / MANIFEST_NAME).read_bytes()).hexdigest()
