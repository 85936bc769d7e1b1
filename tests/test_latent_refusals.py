"""Attention over latents follows a scale; what a model or a caller asks beyond it is refused, not left out."""

from importlib.util import find_spec

import pytest
import torch

from makeready.attention_backends.interface import AttentionCall
from makeready.engines.transformers.packed.attention import LATENTS, STORED, attend_packed
from makeready.errors import BackendError


@pytest.mark.parametrize(
    "asked", [{"softcap": 30.0}, {"sliding_window": 8}, {"s_aux": torch.zeros(4)}, {"is_causal": False}]
)
def test_a_model_that_asks_more_of_latents_is_refused(asked):
    name = next(iter(asked))
    with pytest.raises(BackendError, match=f"passes {name} to attention") as caught:
        attend_packed(torch.nn.Identity(), *[torch.zeros(1, 4, 3, 24)] * 3, None, **asked, **{LATENTS: STORED})
    assert caught.value.expected == ["scaling"]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "asked",
    [{"soft_cap": 30.0}, {"sliding_window": 8}, {"sinks": torch.zeros(4)}, {"causal": False}, {"key_scale": 2.0}],
)
def test_kernels_over_latents_refuse_what_they_do_not_know(asked):
    from makeready.attention_backends.flash.triton_kernels.impl import TritonImpl

    call = AttentionCall(scale=0.1, **asked)
    with pytest.raises(BackendError, match=f"a scale and nothing else, and the call has {next(iter(asked))}"):
        TritonImpl.forward_latent(None, None, None, None, None, call)
