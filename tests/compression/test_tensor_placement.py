"""Where stored matrices lie in parameters, by transformers' own rules of loading."""

import pytest
import torch

from meswitch.architecture import architecture_of, as_matrix
from meswitch.compression.inputs import assembly, places_of
from tests.architectures import tiny


@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen3_moe", "phimoe", "granitemoe", "gpt_oss", "jamba", "nemotron_h", "llama4", "gpt2"]
)
def test_a_parameter_put_together_from_its_places_is_what_transformers_loads(model_type):
    architecture = architecture_of(tiny.config_of(model_type))
    shapes = {name: tuple(tensor.shape) for name, tensor in architecture.stored_layout().items()}
    roles, plan = architecture.roles(shapes), architecture.load_plan(shapes)
    tried = 0
    for rule in plan.conversions:
        if any(len(shapes[name]) < 2 for name in rule.sources):
            continue
        values = {name: torch.randn(shapes[name]) for name in rule.sources}
        loaded = rule.build(values.__getitem__, architecture.model)
        places = places_of(architecture, rule, shapes, roles)
        for target in rule.targets:
            put = assembly(places, target, architecture.parts[target].shape)
            assert put is not None, rule.sources[0]
            matrices = {name: as_matrix(value, roles[name]) for name, value in values.items()}
            assert torch.equal(put(matrices), loaded[target])
            tried += 1
    assert tried


def test_each_expert_has_its_rows_of_the_stack():
    architecture = architecture_of(tiny.config_of("mixtral"))
    shapes = {name: tuple(tensor.shape) for name, tensor in architecture.stored_layout().items()}
    prefix = "model.layers.0.block_sparse_moe.experts"
    rule = architecture.load_plan(shapes).by_source[f"{prefix}.2.w3.weight"]
    places = places_of(architecture, rule, shapes, architecture.roles(shapes))
    (place,) = places[f"{prefix}.2.w3.weight"]
    rows = shapes[f"{prefix}.2.w3.weight"][0]
    # the matrices of the third expert follow two experts' w1 and w3, and its own w1
    assert place.parameter == "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(place.rows, torch.arange(5 * rows, 6 * rows))
