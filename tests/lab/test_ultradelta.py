"""UltraDelta: uniform codes, a random share of each kept, less where the variance is low."""

import pytest
import torch

import meswitch
from meswitch.codec import CodecRequest, Spec, encode_coded
from meswitch_lab import options
from meswitch_lab.ultradelta import allocate


def delta_of(rows, width):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) * 1e-3


def coded(delta, bpw, seed=0, share=None, **parameters):
    request = CodecRequest(Spec(), int(bpw * delta.numel() / 8), seed, parameters, share)
    return encode_coded("ultradelta", delta, request, name="a")


def test_the_same_share_of_every_code_is_kept():
    delta = delta_of(400, 500)
    restored = coded(delta, 1.0, gamma=1.0).dequantize()
    kept = restored != 0
    density = kept.float().mean().item()
    codes = ((delta - delta.min()) / (delta.max() - delta.min()) * 15).round()
    for code in range(4, 12):  # those of many weights
        assert kept[codes == code].float().mean().item() == pytest.approx(density, rel=0.02)
    # in units of the step, what is kept is the uniform code, rescaled
    levels = (delta.min() + codes * (delta.max() - delta.min()) / 15) / density
    assert torch.allclose(restored[kept], levels[kept], rtol=1e-3, atol=1e-7)


def test_everything_is_kept_where_the_budget_is_large():
    delta = delta_of(40, 50)
    restored = coded(delta, 10.0).dequantize()
    step = (delta.max() - delta.min()) / 15
    assert (restored - delta).abs().max() <= step / 2 * 1.001


def test_a_flat_spectrum_is_rescaled_less():
    low = torch.outer(*(torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (60, 90))) * 1e-3
    flat = torch.linalg.qr(delta_of(90, 60))[0].T * 1e-3
    gamma = {}
    for name, delta in (("low", low), ("flat", flat)):
        made, plain = coded(delta, 0.5), coded(delta, 0.5, gamma=1.0)
        gamma[name] = (made.tensors()["value_range"] / plain.tensors()["value_range"])[1].item()
    assert 0.5 <= gamma["flat"] < 0.56  # about 1 - s / 2
    assert gamma["low"] > 0.9


def test_the_seed_draws_the_weights():
    delta = delta_of(40, 50)
    first, again, other = (coded(delta, 1.0, seed=seed).dequantize() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first != 0, other != 0)


def test_thirds_by_variance_differ_by_a_step_and_the_mean_stays():
    measured = {name: (float(i), 100) for i, name in enumerate("abcdef")}
    shares = allocate(measured, {"step": 0.25})
    assert shares == {"a": 0.75, "b": 0.75, "c": 1.0, "d": 1.0, "e": 1.25, "f": 1.25}
    assert allocate({"a": (1.0, 5)}, {}) == {"a": 1.0}


def test_a_share_moves_density_and_bytes():
    delta = delta_of(400, 500)
    kept = [coded(delta, 1.0, share=share).meta["kept"] for share in (0.75, 1.0, 1.25)]
    assert kept[0] / kept[1] == pytest.approx(0.75, rel=0.02)
    assert kept[2] / kept[1] == pytest.approx(1.25, rel=0.02)


def test_a_compression_shares_out_by_variance_within_the_budget(pair, tmp_path):
    base, expert = pair(change=0.3)
    made = meswitch.compress(base, expert, tmp_path / "delta", options("ultradelta", bpw=1.0, step=0.5))
    coded_entries = [entry for entry in made.manifest.tensors.values() if entry.kind == "coded"]
    weights = [entry.shape[0] * entry.shape[1] for entry in coded_entries]
    density = [entry.meta["kept"] / count for entry, count in zip(coded_entries, weights, strict=True)]
    assert max(density) > 2 * min(density)
    assert sum(entry.bytes for entry in coded_entries) * 8 <= sum(weights) * 1.01
    assert made.manifest.method.parameters == {"bpw": 1.0, "step": 0.5, "code_bits": 4, "seed": 0}
