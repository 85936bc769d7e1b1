"""The tiny models tell a broken cache from a sound one: losing any state changes what the next token sees."""

from __future__ import annotations

import pytest

from tiny_models import ATTENTION_FREE, FAMILIES, tiny_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = [[5, 9, 17, 33, 2, 8, 77, 41, 3, 100, 64, 12]]
KINDS = ("keys", "values", "conv_states", "recurrent_states")
ROUNDING = 1e-5


def tensors_of(cache: object, kind: str) -> list[torch.Tensor]:
    found = []
    for layer in cache.layers:  # type: ignore[attr-defined]
        held = getattr(layer, kind, None)
        parts = held.values() if isinstance(held, dict) else [held] if torch.is_tensor(held) else held or ()
        found += [tensor for tensor in parts if tensor is not None]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_state_matters(family: str) -> None:
    model = tiny_model(family)
    ids = torch.tensor(TOKENS)

    def last_logits(lost: str | None) -> tuple[torch.Tensor, bool]:
        cache = transformers.DynamicCache(config=model.config.get_text_config(decoder=True))
        name = "cache_params" if family in ATTENTION_FREE else "past_key_values"
        places = [{}, {}]
        if family not in ATTENTION_FREE:
            places = [{"position_ids": torch.arange(11)[None]}, {"position_ids": torch.tensor([[11]])}]
        with torch.no_grad():
            model(ids[:, :-1], use_cache=True, **{name: cache}, **places[0])
            held = tensors_of(cache, lost) if lost else []
            for tensor in held:
                tensor.zero_()
            return model(ids[:, -1:], use_cache=True, **{name: cache}, **places[1]).logits[0, -1], bool(held)

    sound, _ = last_logits(None)
    assert torch.isfinite(sound).all()
    for kind in KINDS:
        broken, held = last_logits(kind)
        if held:
            assert (broken - sound).abs().max() > 1000 * ROUNDING
