"""Turning a loaded base model into one that can switch experts, layer by layer."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from meswitch.artifact import Artifact
from meswitch.engine.context import Switch
from meswitch.engine.layers import SwitchableEmbedding, SwitchableHead, SwitchableLinear, SwitchableNorm
from meswitch.errors import IncompatibleError


def attach(model: Any, artifacts: Iterable[Artifact], switch: Switch) -> None:
    """Wrap every layer that some expert changes; `model` is changed in place.

    Raises:
        IncompatibleError: an expert changes a tensor that no switchable layer covers, by name.
    """
    artifacts = list(artifacts)
    modules = dict(model.named_modules())
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): name for name, module in modules.items()}
    changed: dict[str, Artifact] = {}
    for artifact in artifacts:
        for tensor, entry in artifact.manifest.tensors.items():
            if entry.kind != "same":
                changed.setdefault(tensor.rpartition(".")[0], artifact)
    base_rows = embedding.weight.shape[0]
    vocabulary = max([base_rows, *(a.manifest.expert.vocab_size for a in artifacts)])
    head_name, embedding_name = names[id(head)], names[id(embedding)]
    if embedding_name in changed or vocabulary != base_rows:
        changed.setdefault(head_name, artifacts[0])
    for name, artifact in changed.items():
        module = modules.get(name)
        if module is head:
            wrapped: nn.Module = SwitchableHead(module, name, switch, vocabulary)
        elif module is embedding:
            wrapped = SwitchableEmbedding(module, name, switch)
        elif isinstance(module, nn.Linear):
            wrapped = SwitchableLinear(module, name, switch)
        elif module is not None and "norm" in type(module).__name__.lower():
            wrapped = SwitchableNorm(module, name, switch)
        else:
            kind = "no such layer" if module is None else f"a {type(module).__name__}"
            raise IncompatibleError(
                f"{artifact.directory}: changes {name!r}, in {type(model).__name__} {kind}, which cannot be switched; "
                "merge this expert (`meswitch merge`) and serve it alone"
            )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, wrapped)
