from dataclasses import replace

import pytest

from makeready.attention_backends.flash import FlashBackend
from makeready.attention_backends.flex import FlexBackend
from makeready.attention_backends.interface import AttentionBackend, Capabilities, LayerRequest, Probe
from makeready.attention_backends.reference import ReferenceBackend
from makeready.attention_backends.selection import group_refusals, layer_names, refusals, select_backend
from makeready.cache.specs import AttentionSpec
from makeready.device import DeviceFacts
from makeready.errors import BackendError

CPU, CUDA, XPU = (DeviceFacts(platform=name, device_type=name) for name in ("cpu", "cuda", "xpu"))
FULL = Capabilities(
    name="full",
    dtypes=frozenset({"bfloat16"}),
    kv_cache_dtypes=frozenset({"bfloat16", "fp8_e4m3"}),
    sliding_window=True, soft_cap=True, sinks=True, encoder_only=True, mla=True,
)  # fmt: skip


class Declared(AttentionBackend):
    def __init__(self, capabilities):
        self.name, self.declared = capabilities.name, capabilities

    def capabilities(self, device):
        return self.declared

    def probe(self, device):
        return Probe(available=True, reason="here")

    def build(self, request):
        raise NotImplementedError


def layer(number=0, dtype="bfloat16", sinks=False, soft_cap=None, encoder_only=False, batch_invariant=False, **spec):
    base = AttentionSpec(num_query_heads=8, num_kv_heads=2, head_size=80, head_size_v=80, dtype="bfloat16")
    return LayerRequest(
        layer=number, spec=replace(base, **spec), dtype=dtype, sinks=sinks, soft_cap=soft_cap,
        encoder_only=encoder_only, batch_invariant=batch_invariant,
    )  # fmt: skip


EVERYTHING = layer(sliding_window=64, soft_cap=30.0, sinks=True, encoder_only=True)


def test_what_is_declared_is_served():
    assert refusals(FULL, EVERYTHING) == ()


@pytest.mark.parametrize(
    ("change", "request_", "sentence"),
    [
        ({}, layer(dtype="float32"), "full computes in bfloat16, and the layer in float32"),
        (
            {"kv_cache_dtypes": frozenset({"float16"})},
            layer(),
            "reads K and V in float16, and the cache holds bfloat16",
        ),
        ({"head_sizes": (64, 128)}, layer(), "full serves head sizes 64, 128, and the layer has 80"),
        ({"head_size_multiple": 32}, layer(), "multiples of 32, and the layer has 80"),
        ({"max_head_size": 64}, layer(), "up to 64, and the layer has 80"),
        ({}, layer(num_kv_heads=3), "8 query heads are no multiple of 3 KV heads"),
        ({"sliding_window": False}, EVERYTHING, "no sliding window, and the layer's is 64"),
        ({"soft_cap": False}, EVERYTHING, "no soft cap, and the layer's is 30.0"),
        ({"sinks": False}, EVERYTHING, "no attention sinks"),
        ({"encoder_only": False}, EVERYTHING, "no attention without a causal mask"),
        ({"mla": False}, layer(mla=True, head_size=512), "no latent attention .MLA., .* a latent of 512"),
        ({"dtypes": frozenset()}, layer(), "full has no kernels for this device"),
        ({"is_ssm": True}, layer(), "full is a state mixer"),
    ],
)
def test_each_thing_that_is_missing_has_its_own_sentence(change, request_, sentence):
    reasons = refusals(replace(FULL, **change), request_)
    assert len(reasons) == 1
    with pytest.raises(BackendError, match=sentence):
        select_backend(request_, [Declared(replace(FULL, **change))], CPU)


def test_kv_in_another_dtype_than_the_queries():
    mixed = LayerRequest(layer=0, spec=replace(layer().spec, dtype="fp8_e4m3"), dtype="bfloat16")
    assert refusals(FULL, mixed) == ()
    (reason,) = refusals(replace(FULL, same_kv_dtype=True), mixed)
    assert reason == "full reads K and V only in the queries' dtype bfloat16, and the cache holds fp8_e4m3"


def test_the_width_of_a_latent_is_no_head_size():
    assert refusals(replace(FULL, head_sizes=(64,)), layer(mla=True, head_size=512, head_size_v=64)) == ()


def test_auto_takes_the_first_that_can_serve_and_keeps_every_refusal():
    half = Declared(replace(FULL, name="half"))
    reference = ReferenceBackend()
    late = Declared(replace(FULL, name="late", sinks=False))
    selection = select_backend(
        LayerRequest(layer=4, spec=replace(layer().spec, dtype="float32"), dtype="float32", sinks=True),
        [half, reference, late], CPU,
    )  # fmt: skip
    assert selection.backend is reference
    assert selection.layer == 4
    assert selection.reason == "reference, the first on cpu that can serve; before it half cannot"
    assert [refusal.backend for refusal in selection.refusals] == ["half", "late"]
    assert len(selection.refusals[1].reasons) == 3
    assert selection.refusals[0].sentence().startswith("half cannot serve layer 4: half computes in bfloat16")


def test_an_asked_backend_serves_or_raises():
    candidates = [FlashBackend(providers=()), FlexBackend(), ReferenceBackend()]
    assert select_backend(layer(), candidates, CUDA).backend.name == "flash"
    chosen = select_backend(layer(), candidates, CUDA, asked="reference")
    assert (chosen.backend.name, chosen.reason) == ("reference", "reference, as asked")
    with pytest.raises(BackendError, match="'flex' was asked for, and flex cannot serve layer 0: flex has no att"):
        select_backend(layer(sinks=True), candidates, CPU, asked="flex")
    with pytest.raises(BackendError, match="'flahs' is not known on xpu; known are flash, flex, reference") as error:
        select_backend(layer(), candidates, XPU, asked="flahs")
    assert error.value.expected == ["flash", "flex", "reference"]


def test_probes_decide_on_the_device_and_planning_assumes_that_all_is_installed():
    candidates = [FlashBackend(providers=()), ReferenceBackend()]
    gone = Probe(available=False, reason="flash needs a provider: pip install one")
    here = Probe(available=True, reason="here")
    probes = {"flash": gone, "reference": here}
    assert select_backend(layer(), candidates, CUDA).backend.name == "flash"
    selection = select_backend(layer(), candidates, CUDA, probes=probes)
    assert selection.backend.name == "reference"
    assert selection.refusals[0].reasons == ("flash needs a provider: pip install one",)
    with pytest.raises(BackendError, match="pip install one"):
        select_backend(layer(), candidates, CUDA, asked="flash", probes=probes)
    with pytest.raises(BackendError, match="flash was not probed"):
        select_backend(layer(), candidates, CUDA, asked="flash", probes={})


def test_batch_invariance_is_a_promise():
    candidates = [Declared(replace(FULL, name="fast", batch_invariant=False)), ReferenceBackend()]
    selection = select_backend(layer(batch_invariant=True), candidates, CPU)
    assert selection.backend.name == "reference"
    with pytest.raises(BackendError, match="batch_invariant is asked, and the output of fast depends on the batch"):
        select_backend(layer(batch_invariant=True), candidates, CPU, asked="fast")


def test_nothing_fits_names_every_reason():
    candidates = [Declared(replace(FULL, name="a", sinks=False)), Declared(replace(FULL, name="b", soft_cap=False))]
    with pytest.raises(BackendError, match="can serve layer 0: a has no attention sinks.* b has no soft cap"):
        select_backend(EVERYTHING, candidates, CPU)
    with pytest.raises(BackendError, match="no backend is registered on cpu"):
        select_backend(EVERYTHING, [], CPU)


def test_a_models_refusals_are_grouped():
    candidates = [Declared(replace(FULL, sinks=False)), ReferenceBackend()]
    selections = [select_backend(layer(number, sinks=number != 2), candidates, CPU) for number in (0, 1, 2, 3, 7)]
    assert group_refusals(selections) == (
        "full cannot serve layers 0-1, 3, 7: full has no attention sinks, and the layer has them",
    )
    assert layer_names([5]) == "layer 5"
