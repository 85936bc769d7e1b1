"""Kernels that address 32 bits: the planner stays in their reach, and a user's number beyond it is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

import makeready
from makeready.attention_backends.flex import FlexBackend
from makeready.attention_backends.reference import ReferenceBackend
from makeready.config import EngineConfig
from makeready.device import DeviceFacts
from makeready.errors import BackendError
from makeready.platforms.address_range import shortest_reach
from makeready.platforms.ready import layout_of, make_ready
from makeready.startup import BUNDLED_MODEL

DEVICE = DeviceFacts(platform="cpu", device_type="cpu", memory_bytes=2**30)


class ShortReach(ReferenceBackend):
    """The reference, as if its kernels counted elements in few bits."""

    def capabilities(self, device):
        return replace(super().capabilities(device), name=self.name, max_view_elements=500_000)


@pytest.mark.parametrize("strategy", ["unified", "subdivided"])
@pytest.mark.parametrize("order", ["cross_layer_NHD", "cross_layer_HND"])
def test_reach_is_the_span_of_the_view_itself(order, strategy):
    plan = makeready.plan(
        "Qwen/Qwen3-Next-80B-A3B-Instruct", platform="cuda", backend="flex", memory_bytes=2**36, page_strategy=strategy
    )
    flex = FlexBackend().capabilities(DeviceFacts(platform="cuda", device_type="cuda"))
    backends = {layer.layer: flex for layer in plan.model.attention_layers}
    reach = shortest_reach(layout_of(plan, order, 100), backends)
    assert reach is not None
    for layer in plan.model.attention_layers:
        inside = layout_of(plan, order, reach.num_blocks).attention_view(layer)[0]
        beyond = layout_of(plan, order, reach.num_blocks + 1).attention_view(layer)[0]
        assert inside.span <= 2**31 - 1
        assert beyond.span + inside.strides[0] > 2**31 - 1


@pytest.mark.parametrize("options", [{}, {"num_blocks": 300}, {"memory_bytes": 2**25}])
def test_automatic_pools_stay_in_reach_and_asked_ones_are_refused(options):
    config = EngineConfig.from_options(model=BUNDLED_MODEL, max_num_seqs=64, page_strategy="unified", **options)
    plan = makeready.plan(
        BUNDLED_MODEL, platform="cpu", backend="reference", engine="transformers", page_strategy="unified",
        **(options or {"device_memory_bytes": 2**30}),
    )  # fmt: skip
    backends = {layer.layer: ShortReach() for layer in plan.model.attention_layers}
    if options:
        with pytest.raises(BackendError, match="asks for .* blocks, and reference addresses 500000 elements"):
            make_ready(config, plan, backends, DEVICE)
        return
    ready = make_ready(config, plan, backends, DEVICE)
    assert ready.cache.key_value(3)[0].stride(0) * ready.cache.layout.num_blocks <= 500_000
    assert any("reference addresses 500000 elements" in reason for reason in ready.plan.reasons)
    assert ready.plan.capacity.num_blocks == ready.cache.layout.num_blocks


def test_no_limit_means_no_reach():
    plan = makeready.plan(BUNDLED_MODEL, platform="cpu", backend="reference", num_blocks=9)
    reference = ReferenceBackend().capabilities(DEVICE)
    assert shortest_reach(layout_of(plan, "cross_layer_NHD", 9), dict.fromkeys((3, 7), reference)) is None
