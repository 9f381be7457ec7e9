"""Questions replayed as CUDA graphs. Skipped where there is no GPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meswitch.router.choice import NONE_OF_THESE, WIDTHS, ChoiceModel, ChoicePrompt

pytestmark = pytest.mark.gpu
OPTIONS = ["Arithmetic word problems", "Programming", "Questions about a database", NONE_OF_THESE]
TEXTS = ["What is 17 + 25?", "", "word " * 60, "sort " * 25, "What is 18 + 25?", "word " * 300]


@pytest.fixture(scope="module")
def letters(family):
    model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.float32).cuda().eval()
    return ChoiceModel(model, ChoicePrompt(AutoTokenizer.from_pretrained(family / "base"), max_tokens=400))


def test_a_replayed_question_gives_what_a_batch_gives(letters):
    queries = [letters.prompt.query(text) for text in TEXTS]
    for options in (OPTIONS, OPTIONS[::-1], OPTIONS[1:]):
        together = letters.answer(queries, options)  # too many for graphs
        for _ in range(2):  # captured, then replayed
            alone = torch.cat([letters.answer([query], options) for query in queries])
            assert torch.allclose(alone, together, atol=1e-3)
    for prefix in letters._prefixes.values():
        assert prefix.graphs is not None
        assert prefix.graphs._graphs.keys() <= {*WIDTHS}
        assert len(prefix.graphs._graphs) > 1


def test_a_model_that_cannot_be_captured_is_asked_without_graphs(letters, monkeypatch):
    queries = [letters.prompt.query(text) for text in TEXTS[:2]]
    expected = letters.answer(queries, OPTIONS)
    letters.forget()
    monkeypatch.setattr(type(letters.model), "_can_compile_fullgraph", False)
    assert torch.allclose(letters.answer(queries, OPTIONS), expected, atol=1e-3)
    assert all(prefix.graphs is None for prefix in letters._prefixes.values())
    letters.forget()


def test_a_graph_does_not_outlive_the_weights_that_it_was_captured_with(letters):
    queries = [letters.prompt.query(TEXTS[0])]
    before = letters.answer(queries, OPTIONS)
    with torch.no_grad():
        letters.model.get_output_embeddings().weight.mul_(2)
    letters.forget()
    after = letters.answer(queries, OPTIONS)
    with torch.no_grad():
        letters.model.get_output_embeddings().weight.div_(2)
    letters.forget()
    assert not torch.allclose(before, after, atol=1e-2)
    assert torch.allclose(letters.answer(queries, OPTIONS), before, atol=1e-3)
