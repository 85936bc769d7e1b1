"""What an engine compiles when it opens stays within what it may run, whatever its limits."""

from hypothesis import given
from hypothesis import strategies as st

from makeready.engines.transformers.packed.warming import dummy_steps


@given(st.integers(1, 20000), st.integers(1, 20000), st.integers(1, 300), st.sampled_from([0, 2048]))
def test_dummy_steps_are_steps_that_the_engine_may_run(max_tokens, max_model_len, max_rows, captured):
    steps = list(dummy_steps(max_tokens, max_model_len, max_rows, captured))
    assert len(steps) == len(set(steps)) or max_tokens < 42 or max_model_len < 42
    for lens, seq_lens in steps:
        assert len(lens) == len(seq_lens) <= max_rows
        assert sum(lens) <= max_tokens
        assert all(0 < length <= keys <= max_model_len for length, keys in zip(lens, seq_lens, strict=True))


def test_large_steps_come_by_powers_of_two():
    sizes = [sum(lens) for lens, _ in dummy_steps(8192, 4224, 64, 2048)]
    assert sizes[:3] == [2048, 4096, 8192]
    sizes = [sum(lens) for lens, _ in dummy_steps(8192, 4224, 64, 0)]
    assert sizes[:5] == [512, 1024, 2048, 4096, 8192]
    assert (1, 5, 40, 41) in [lens for lens, _ in dummy_steps(8192, 4224, 64, 2048)]
