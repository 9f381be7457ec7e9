"""A model that is taken apart into its decoder blocks.

The code is the architecture's own, and weights are loaded a decoder block at a time: modules of a block read each
other's parameters as they like. What a block is called with (positions, masks, what later blocks take from earlier
ones) is found by running the model with blocks that do not compute; what is outside the blocks is loaded when it is
used. One block's weights and the hidden states of a text are in memory then, whatever the size of the model.
"""

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.checkpoint import Checkpoint
from meswitch.cpu import multiplies_bfloat16
from meswitch.errors import IncompatibleError, MeswitchError
from meswitch.loaded import LazyModel, drop

_SMALL = 1 << 28  # parameters, one GB in float32
_FEW = 8  # tokens that show what a block gives
# (number of a block, its arguments by position, by keyword) -> what it gives
_Stub = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]


def working_dtype(device: torch.device, parameters: int) -> torch.dtype:
    """In which a model of so many parameters computes on a device.

    Devices short of memory compute in bfloat16, and so do CPUs that multiply it by themselves, about five times as
    fast as float32; other CPUs are slow in it. A small model is done soon in any case.
    """
    if device.type == "cpu" and (parameters < _SMALL or not multiplies_bfloat16()):
        return torch.float32
    return torch.bfloat16


@dataclass(frozen=True, slots=True)
class BlockCall:
    """How the model calls one of its decoder blocks.

    Args:
        block: its number.
        args: what it is given by position; hidden states only if it is the first block.
        keywords: what it is given by keyword.
        links: which of these are parts of what the block before it gives: position or keyword -> part. Part 0 are
            hidden states.
    """

    block: int
    args: tuple[Any, ...]
    keywords: Mapping[str, Any]
    links: Mapping[int | str, int]

    def after(self, given: Any) -> "BlockCall":
        """The same call, with what the block before it gave."""
        parts = _parts(given)
        args, keywords = list(self.args), dict(self.keywords)
        for place, part in self.links.items():
            if isinstance(place, int):
                args[place] = parts[part]
            else:
                keywords[place] = parts[part]
        return dataclasses.replace(self, args=tuple(args), keywords=keywords)

    def run(self, block: nn.Module) -> Any:
        """What the block gives."""
        return block(*self.args, **self.keywords)


class _HeadReached(Exception):
    """There is nothing more to see."""


class PartialModel:
    """A checkpoint's model, its decoder blocks one by one.

    Args:
        checkpoint: the weights.
        device: where it computes.
        dtype: in which it computes.

    Raises:
        IncompatibleError: the checkpoint lacks parameters, or the model cannot be taken apart.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.weights = LazyModel.of(checkpoint, device, dtype)
        self.model: Any = self.weights.model
        self.device, self.dtype = device, dtype
        self.prefix, self._blocks = self._decoder_blocks()
        self._frame = {
            path: module
            for path, module in self.model.named_modules()
            if path != self.prefix and not path.startswith(f"{self.prefix}.")
        }
        for path, module in self._frame.items():
            module.register_forward_pre_hook(self._loading(path))
        # outside the blocks some models read a table's rows without calling it
        self._loads_early = False

    def _decoder_blocks(self) -> tuple[str, nn.ModuleList]:
        """The largest list of modules in what reads text."""
        names = {module: name for name, module in self.model.named_modules()}
        lists = [part for part in self.model.get_decoder().modules() if isinstance(part, nn.ModuleList) and len(part)]
        if not lists:
            raise self.refusal("it has no list of decoder blocks")
        largest = max(lists, key=lambda part: sum(parameter.numel() for parameter in part.parameters()))
        return names[largest], largest

    def _loading(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.weights.load(path, inside=False)

        return hook

    def __len__(self) -> int:
        return len(self._blocks)

    def refusal(self, reason: str) -> IncompatibleError:
        """Why this model cannot be taken apart."""
        return IncompatibleError(
            f"{self.weights.source}: a {type(self.model).__name__} cannot be run block by block: {reason}; compress it "
            "without calibration (--calibration none)"
        )

    def name(self, index: int) -> str:
        """A block's name in the model."""
        return f"{self.prefix}.{index}"

    def block(self, index: int) -> nn.Module:
        """A new copy of a block, with the checkpoint's weights."""
        return self.weights.load(self.name(index), copy.deepcopy(self._blocks[index]))

    def _load_frame(self) -> None:
        """Load what is outside the blocks, of the language model."""
        inside = {id(module) for module in self.model.get_decoder().modules()}
        for path, module in self._frame.items():
            if id(module) in inside:
                self.weights.load(path, inside=False)

    def drop_frame(self) -> None:
        """Forget the weights outside the blocks; they are loaded again when they are used."""
        drop(self._frame.values())

    def calls(self, ids: Tensor, *, embedded: bool = True) -> list[BlockCall]:
        """How the model calls its blocks for token ids [sequences, length].

        Args:
            embedded: the first block is given the embedding's hidden states; if not, it is given zeros, and the
                embedding is not loaded.

        Raises:
            IncompatibleError: something happens between the blocks, or the model's code fails.
        """
        calls: list[BlockCall] = []
        given: tuple[Any, ...] = ()
        parts = len(_parts(self._given))

        def stub(index: int, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            nonlocal given
            places: dict[int | str, Any] = dict(enumerate(args)) | keywords
            if calls:
                links = {
                    place: part
                    for place, value in places.items()
                    for part, wanted in enumerate(given)
                    if isinstance(value, Tensor) and value is wanted
                }
            else:
                links = {_first_argument(self._blocks[index], args): 0}
            place = next((place for place, part in links.items() if part == 0), None)
            if place is None or not isinstance(places[place], Tensor):
                raise self.refusal(f"{self.name(index)} is not given what the block before it gives")
            again = self.passed_on(places[place])
            call = BlockCall(index, args, keywords, links)
            calls.append(call.after((None,) * parts) if calls else call)  # what a stub gave stands for nothing
            given = _parts(again)
            return again

        if (
            embedded
        ):  # Llama 4 sends ids to where the embedding is before it calls it: to nowhere, if that is not loaded
            self._load_frame()
        with self._explained(), self._stubbed(stub), self._without_embedding(not embedded):
            self._run(ids)
        if not calls:
            raise self.refusal(f"text does not pass through {self.prefix}")
        return calls

    def enter(self, ids: Tensor) -> Tensor:
        """What the first block is given for token ids: [sequences, length] -> [sequences, length, hidden_size]."""
        call = self.calls(ids)[0]
        (place,) = call.links
        found = call.args[place] if isinstance(place, int) else call.keywords[place]
        assert isinstance(found, Tensor)
        return found

    def passed_on(self, hidden: Tensor) -> Any:
        """Hidden states in the form in which a block gives them; other parts of it are of another text."""
        hidden = hidden.view_as(hidden)  # a tensor of its own
        if isinstance(self._given, Tensor):
            return hidden
        return hidden, *(part.detach() if isinstance(part, Tensor) else part for part in self._given[1:])

    def head_inputs(self, ids: Tensor, given: Any) -> list[Tensor]:
        """What the output embedding is given, where the last block gave this for these ids."""
        seen: list[Tensor] = []
        with self._explained(), self._stubbed(lambda *_: given):
            self._run(ids, seen)
        return seen

    def leave(self, hidden: Tensor) -> Tensor:
        """Logits of what the last block gave: [tokens, hidden_size] -> [tokens, vocabulary] float32."""
        # each token is a sequence of its own: what follows the blocks does not mix tokens
        ids = torch.zeros(len(hidden), 1, dtype=torch.int64, device=self.device)
        given = self.passed_on(hidden[:, None])
        if self._loads_early:
            self._load_frame()
        with self._stubbed(lambda *_: given), self._without_embedding():
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[:, 0].float()

    @cached_property
    def _given(self) -> Any:
        """What a block gives: hidden states, or these among others; of a text without meaning."""
        first: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []

        def stub(*call: Any) -> Any:
            first.append(call)
            raise _HeadReached

        ids = torch.zeros(1, _FEW, dtype=torch.int64, device=self.device)
        with torch.no_grad(), self._explained():
            with self._stubbed(stub), self._without_embedding():
                try:
                    self._run(ids)
                except (RuntimeError, NotImplementedError):
                    self._loads_early = True
                    self._run(ids)
            if not first:
                raise self.refusal(f"text does not pass through {self.prefix}")
            ((index, args, keywords),) = first
            given = self.block(index)(*args, **keywords)
        if not isinstance(_parts(given)[0], Tensor):
            raise self.refusal(f"its blocks give a {type(given).__name__}")
        return given

    def _run(self, ids: Tensor, seen: list[Tensor] | None = None) -> None:
        """Run the model up to its head. seen: gets what the head is given."""

        def head(inputs: Tensor, *args: Any, **keywords: Any) -> None:
            if seen is not None:
                seen.append(inputs)
            raise _HeadReached

        if self._loads_early:
            self._load_frame()
        with contextlib.suppress(_HeadReached), _instead(self.model.get_output_embeddings(), head):
            self.model(input_ids=ids, use_cache=False)

    @contextlib.contextmanager
    def _stubbed(self, stub: _Stub) -> Iterator[None]:
        """Let the blocks do this instead of computing."""

        def forward(index: int) -> Callable[..., Any]:
            return lambda *args, **keywords: stub(index, args, keywords)

        with contextlib.ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                stack.enter_context(_instead(block, forward(index)))
            yield

    def _without_embedding(self, applies: bool = True) -> contextlib.AbstractContextManager[None]:
        """Let the token embedding give zeros, its weights not being needed."""
        embedding = self.model.get_input_embeddings()
        width = embedding.weight.shape[-1]

        def zeros(ids: Tensor, *args: Any, **keywords: Any) -> Tensor:
            return torch.zeros(*ids.shape, width, device=self.device, dtype=self.dtype)

        return _instead(embedding, zeros) if applies else contextlib.nullcontext()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except MeswitchError:
            raise
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
            raise self.refusal(f"{type(error).__name__}: {reason}") from error


def check_blocks(checkpoint: Checkpoint, device: torch.device) -> None:
    """Refuse a model that cannot be taken apart, before any work is done for it.

    Raises:
        IncompatibleError: naming the reason.
    """
    parts = PartialModel(checkpoint, device, working_dtype(device, checkpoint.parameters))
    parts.calls(torch.zeros(1, _FEW, dtype=torch.int64, device=device), embedded=False)


@contextlib.contextmanager
def _instead(module: nn.Module | None, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module do something else; hooks are not called."""
    if module is None:
        yield
        return
    hooks, module._forward_pre_hooks = module._forward_pre_hooks, type(module._forward_pre_hooks)()
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        module._forward_pre_hooks = hooks


def _parts(given: Any) -> tuple[Any, ...]:
    return given if isinstance(given, tuple) else (given,)


def _first_argument(block: nn.Module, args: tuple[Any, ...]) -> int | str:
    return 0 if args else list(inspect.signature(type(block).forward).parameters)[1]
