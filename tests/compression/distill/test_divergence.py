"""The divergence and its gradient against autograd's."""

import torch
import torch.nn.functional as F

from meswitch.compression.distill.training import divergence


def test_value_and_gradient_are_those_of_the_definition():
    torch.manual_seed(0)
    wanted, weight = torch.randn(3, 5, 40), torch.rand(3, 5)
    found = torch.randn(3, 5, 40, requires_grad=True)
    again = found.detach().clone().requires_grad_()
    loss = (divergence(wanted, found) * weight).sum()
    loss.backward()
    both = again.log_softmax(-1), wanted.log_softmax(-1)
    defined = (F.kl_div(*both, log_target=True, reduction="none").sum(-1) * weight).sum()
    defined.backward()
    assert torch.allclose(loss, defined, rtol=1e-5)
    assert torch.allclose(found.grad, again.grad, atol=1e-6)
    assert torch.autograd.gradcheck(divergence, (wanted.double(), found.detach().double().requires_grad_()))


def test_a_model_does_not_diverge_from_itself():
    logits = torch.randn(4, 30) * 10
    assert divergence(logits, logits.clone()).abs().max() < 1e-5
