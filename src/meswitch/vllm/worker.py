"""`--worker-cls meswitch.vllm.DeltaWorker`, and the managers of LoRA adapters that it gives to vLLM's model runner.

They hold deltas beside LoRA adapters: the same ids, slots and least-recently-used order.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import LoRAMapping, LoRAMappingType, VocabParallelEmbeddingWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path, replace_submodule
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from meswitch.artifact import Artifact
from meswitch.artifact.manifest import MANIFEST_NAME
from meswitch.errors import ConfigError, IncompatibleError, MeswitchError
from meswitch.ops.backend import KERNEL_DTYPES
from meswitch.ops.routing import BASE, MAX_TOKENS, Step, most_pieces, step_sizes
from meswitch.ops.triton.ahead import Compilation, compile_ahead, decode_jobs, embedding_job, fused_jobs, prefill_jobs
from meswitch.slots import HostTier, Loader
from meswitch.vllm import compat, delta_op, layers
from meswitch.vllm.arena import Arena, Layer, Prepared
from meswitch.vllm.command import FAILED, KEY, LOADING, READY, DeltaSettings
from meswitch.vllm.dry_step import TOKENS, DryStep, SeenLayer, look
from meswitch.vllm.layers import DeltaMethod
from meswitch.vllm.places import EMBEDDING, HEAD, LINEAR, Base, Place, Unserved, survey
from meswitch.vllm.prepare import Target, check_covered, prepare
from meswitch.vllm.proof import FAULTS, in_short, prove_layers, prove_step


class DeltaWorker(compat.worker_class()):  # type: ignore[misc]
    """vLLM's worker, whose model runner keeps deltas beside LoRA adapters."""

    def init_device(self) -> None:
        compat.check()
        super().init_device()
        # vLLM has four model runners (two versions, GPU and CPU), made inside `init_device`; all load LoRA this way
        self.model_runner.load_lora_model = self._load_lora_model

    def _load_lora_model(self, model: nn.Module, vllm_config: Any, device: Any) -> nn.Module:
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


log = logging.getLogger("vllm.meswitch")  # a child of vLLM's: its level, its handlers
NO_LORA = 0  # vLLM's id of the base
_AHEAD = 2  # experts that were read ahead and not asked for yet: each is a slot's size of host memory
Source = tuple[Path, str]  # where an artifact lies, and a digest of its manifest


def _of_base(tokens: int, rows: int) -> LoRAMapping:
    """A step of the base alone.

    Args:
        tokens: of the step.
        rows: that get logits.
    """
    return LoRAMapping(index_mapping=(NO_LORA,) * tokens, prompt_mapping=(NO_LORA,) * rows, is_prefill=True)


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
        self.settings = DeltaSettings.of(config.additional_config)
        if not compat.supports_lora(model):  # vLLM has no LoRA layers for it; deltas need none
            self.settings = dataclasses.replace(self.settings, lora=False)
        self.arena: Arena | None = None
        self._spare = 0
        super().__init__(model, *args, **kwargs)
        self.rename = compat.renamer(model)
        self._known = [Artifact.open(Path(path)) for path in self.settings.experts]
        self._served = Base(config.model_config.model)
        self._caches_prompts = bool(config.cache_config.enable_prefix_caching)
        self.names: dict[str, tuple[Path, str]] = {}  # of all that was ever loaded, as `check_name` takes them
        self._elsewhere = compat.missing_modules(model)
        dry = DryStep(model, config, self.device)
        seen = self._look(model, dry, config)
        self.arena = Arena(
            seen.places,
            self._known or [self.settings.model(self._served.source)],
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
        delta_op.read_step(self.step)
        layers.install(model, self.arena, self.step, replace_submodule)
        # for experts that nobody took yet; those that somebody did are in vLLM's cache, by vLLM's ids
        self._slot_bytes = self.arena.nbytes // max(1, self.arena.count)
        reader = Loader(1, "meswitch-read", self.device)
        self.ahead: HostTier[Source, Prepared] = HostTier(_AHEAD * self._slot_bytes, reader)
        self._failed: set[Source] = set()
        graphs = config.compilation_config.cudagraph_capture_sizes or []
        warm(self.arena, config.model_config.dtype, graphs, self.max_num_batched_tokens, specialized)
        self.target = self._prove(model, dry, seen)
        log.info("meswitch: %s for deltas", self.arena.describe())

    def _look(self, model: nn.Module, dry: DryStep, config: Any) -> SeenLayer:
        """The layers that can be served, as far as the model itself shows it."""
        started = time.monotonic()
        is_read = self.settings.check_base and compat.reads_checkpoint(config)
        names = [name for artifact in self._known for name in artifact.manifest.tensors]
        names += self._served.names if is_read else []
        stored = {self.rename(name).rpartition(".")[0] for name in names}
        found, unserved = survey(model, compat.packed_modules(model, self.packed_modules_mapping), stored)
        if is_read:
            unserved += self._served.misplaced(found, self.rename)
        places = self._covered(found, unserved).places
        super()._set_adapter_mapping(_of_base(TOKENS, dry.rows))
        try:
            seen = look(dry, places)
        except FAULTS as error:
            raise IncompatibleError(
                f"{type(model).__name__}: vLLM computes no step of it: {in_short(error)}"
            ) from error
        log.info("meswitch: layers looked at in %.1f s", time.monotonic() - started)
        return dataclasses.replace(seen, unserved=[*unserved, *seen.unserved])

    def _prove(self, model: nn.Module, dry: DryStep, seen: SeenLayer) -> Target:
        """Compare layers with merged ones, and give those that disagree back to vLLM."""
        started = time.monotonic()
        assert self.arena is not None
        unserved = [*seen.unserved, *prove_layers(model, self.arena, self.step, seen.calls)]
        layers.uninstall(model, self.arena, {layer.name for layer in unserved}, replace_submodule)
        if (reason := prove_step(dry, self.step, seen.logits)) is not None:
            raise IncompatibleError(f"{type(model).__name__}: {reason}; serve it merged (`meswitch merge`)")
        log.info("meswitch: %d layers proven in %.1f s", len(self.arena.layers), time.monotonic() - started)
        for layer in unserved:
            log.debug("meswitch: %s: %s: %s", layer.name, layer.kind, layer.reason)
        return self._covered(seen.places, unserved)

    def _covered(self, places: Sequence[Place], unserved: Sequence[Unserved]) -> Target:
        """What experts are prepared for, if those that are known at start change nothing else."""
        refused = {layer.name for layer in unserved}
        left = [place for place in places if place.name not in refused]
        target = Target(left, unserved, self.rename, self.settings, self._elsewhere)
        for artifact in self._known:
            check_covered(artifact, target)
        return target

    def read(self, directory: Path) -> Prepared:
        """An artifact, checked and laid out in host memory."""
        started = time.monotonic()
        artifact = Artifact.open(directory)
        if self.settings.check_base:
            self._served.check(artifact)
        assert self.arena is not None
        prepared = prepare(artifact, self.arena, self.target)
        log.info("meswitch: %s read in %.1f s", directory.name, time.monotonic() - started)
        return prepared

    def prefetch(self, source: Source) -> str:
        """Read an artifact in the background unless it is here, or say how far that is.

        One that failed is forgotten once that was said: loading it says why.
        """
        if self.resident(source) is not None:
            return READY
        if source in self._failed:
            self._failed.discard(source)
            return FAILED
        reading = self.ahead.load(source, self._slot_bytes, partial(self._read_ahead, source))
        return READY if reading is not None and reading.done() and reading.exception() is None else LOADING

    def taken(self, source: Source) -> Prepared | None:
        """What was read ahead, to keep; None if it was not. Raises what reading raised."""
        reading = self.ahead.take(source)
        self._failed.discard(source)
        return None if reading is None else reading.result()

    def _read_ahead(self, source: Source) -> Prepared:
        try:
            return self.read(source[0])
        except BaseException:
            self._failed.add(source)
            raise

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

    def create_lora_manager(self, model: nn.Module, vllm_config: Any) -> nn.Module:
        """As vLLM does, for models too that it has no LoRA layers for."""
        if compat.supports_lora(model):
            made: nn.Module = super().create_lora_manager(model, vllm_config)
            return made
        try:
            self._adapter_manager = self._manager_cls(
                model=model,
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                vocab_size=self.vocab_size,
                lora_config=self.lora_config,
                vllm_config=vllm_config,
                device=self.device,
            )
        except AttributeError as error:  # a mixture of experts says there how they are stored
            raise IncompatibleError(
                f"{type(model).__name__}: vLLM takes no adapters for it ({error}); serve it merged (`meswitch merge`)"
            ) from error
        return model

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
                prepared = manager.resident(weights) or manager.taken(weights) or manager.read(directory)
            except (MeswitchError, OSError) as error:
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


def warm(arena: Arena, dtype: torch.dtype, rows: Sequence[int], most_tokens: int, specialized: bool) -> None:
    """Compile what the layers of an arena on a GPU launch.

    Args:
        dtype: of the activations. rows: of the steps that graphs hold, none if there are no graphs. most_tokens: of any
            step. specialized: see `ops.routing.Side`.
    """
    if arena.device.type != "cuda":
        return
    started = time.monotonic()
    small = [count for count in rows if count <= MAX_TOKENS] or list(range(1, MAX_TOKENS + 1))
    with torch.cuda.device(arena.device):
        count = compile_ahead(
            job for layer in arena.layers for job in _jobs(layer, arena.count, dtype, small, most_tokens, specialized)
        )
    log.info("meswitch: %d kernels ready in %.1f s", count, time.monotonic() - started)


def _jobs(
    layer: Layer, slots: int, dtype: torch.dtype, rows: Sequence[int], most_tokens: int, specialized: bool
) -> Iterator[Compilation]:
    place, linear = layer.place, layer.slots
    if linear is None or dtype not in KERNEL_DTYPES:
        return
    method = place.module.quant_method
    about = linear.rows, linear.in_features, linear.variant, dtype
    if isinstance(method, DeltaMethod) and method.fused:
        bias = getattr(place.module, "bias", None) is not None
        yield from fused_jobs(*about, bias, step_sizes(rows, slots, specialized))
        yield from prefill_jobs(*about, bias, most_tokens)
        return
    if place.kind == EMBEDDING:
        yield embedding_job(*about, layer.extra is not None)
    if place.kind in (LINEAR, HEAD, EMBEDDING):  # an embedding may be the head as well
        yield from decode_jobs(*about, most_pieces(MAX_TOKENS, slots))
        yield from decode_jobs(*about, most_pieces(most_tokens, slots, MAX_TOKENS), MAX_TOKENS)
