import copy
import math
from typing import Any

import pytest
import torch

from meswitch.errors import ConfigError, IncompatibleError
from meswitch.evaluate import Text, fidelity
from meswitch_lab.toy import draw

Loaded = tuple[Any, Any]


@pytest.fixture(scope="module")
def texts(math_expert: Loaded) -> list[Text]:
    tokenizer = math_expert[1]
    return [Text(tuple(tokenizer(f"{q.prompt} {q.response}")["input_ids"])) for q in draw("math", 12, 7)]


def test_a_model_agrees_with_itself_entirely(math_expert: Loaded, texts: list[Text]) -> None:
    found = fidelity(math_expert[0], math_expert[0], texts)
    assert (found.kl, found.top1) == (0.0, 1.0)
    assert (found.tokens, found.sequences) == (sum(len(text.ids) for text in texts), 12)


@torch.inference_mode()
def test_it_is_the_mean_kl_of_the_next_token_distributions(
    base: Loaded, math_expert: Loaded, texts: list[Text]
) -> None:
    kl, agree, tokens = 0.0, 0, 0
    for text in texts:
        ids = torch.tensor([text.ids])
        p, q = (model(ids).logits[0].double().softmax(-1) for model in (math_expert[0], base[0]))
        for position in range(len(text.ids)):
            kl += (p[position] * (p[position] / q[position]).log()).sum().item()
            agree += int(p[position].argmax() == q[position].argmax())
            tokens += 1
    found = fidelity(base[0], math_expert[0], texts)
    assert found.kl == pytest.approx(kl / tokens, rel=1e-4)
    assert found.top1 == pytest.approx(agree / tokens)
    assert found.kl > 0.5


def test_small_batches_of_a_stream_change_nothing(base: Loaded, math_expert: Loaded, texts: list[Text]) -> None:
    whole = fidelity(base[0], math_expert[0], texts)
    streamed = fidelity(base[0], math_expert[0], iter(texts), batch_tokens=100)
    assert streamed.kl == pytest.approx(whole.kl, rel=1e-4)
    assert (streamed.top1, streamed.tokens, streamed.sequences) == (whole.top1, whole.tokens, whole.sequences)


def test_positions_before_the_start_do_not_count(base: Loaded, math_expert: Loaded, texts: list[Text]) -> None:
    late = [Text(text.ids, len(text.ids) - 3) for text in texts]
    assert fidelity(base[0], math_expert[0], late).tokens == 36
    assert fidelity(base[0], math_expert[0], [*late, Text((5, 6), 2)]).tokens == 36


def test_a_little_noise_costs_a_little_and_more_costs_more(math_expert: Loaded, texts: list[Text]) -> None:
    found = []
    for size in (0.001, 0.01, 0.1):
        torch.manual_seed(0)
        noisy = copy.deepcopy(math_expert[0])
        for parameter in noisy.parameters():
            parameter.data += size * parameter.data.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0
        found.append(fidelity(noisy, math_expert[0], texts).kl)
    assert 0 < found[0] < found[1] < found[2]
    assert all(math.isfinite(kl) for kl in found)


def test_another_vocabulary_is_refused_with_both_sizes(math_expert: Loaded, texts: list[Text]) -> None:
    grown = copy.deepcopy(math_expert[0])
    grown.resize_token_embeddings(2050, mean_resizing=False)
    with pytest.raises(IncompatibleError, match="2050 of the model and 2048 of the expert"):
        fidelity(grown, math_expert[0], texts)


def test_no_text_is_an_error_and_not_a_perfect_score(math_expert: Loaded) -> None:
    with pytest.raises(ConfigError, match="no token to compare"):
        fidelity(math_expert[0], math_expert[0], [Text((1, 2), 2)])
