"""Steps of nobody's requests that an engine runs when it opens, so that nothing is compiled in the middle of a run.

Kernels are compiled for kinds of steps, not for each step: one long request, many short ones, a chunk after a long
context, decodes beside prefill, and sizes by powers of two. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator

Requests = tuple[int, ...]

_LONG, _SHORT, _FEW, _CONTEXT = 384, 40, 5, 4
"""Query tokens of a request: enough to copy its K and V, too few for that, few enough for decode; and keys a query."""


def dummy_steps(
    max_tokens: int, max_model_len: int, max_rows: int, captured: int
) -> Iterator[tuple[Requests, Requests]]:
    """Query tokens and keys of each request, step after step, within what the engine may run.

    :param captured: tokens up to which steps with prefill are captured; those need no large dummies.
    """
    longest = min(max_tokens, max_model_len)
    most = min(max_tokens, max_rows * longest)
    sizes = {1 << power for power in range(9, most.bit_length())}
    for tokens in sorted({*(size for size in sizes if size >= captured), most}):
        lens = _split(tokens, longest)
        yield lens, lens
    chunk = max(min(_LONG, longest, max_model_len // _CONTEXT), 1)
    yield (chunk,), (min(_CONTEXT * chunk, max_model_len),)
    mixed = tuple(min(length, longest) for length in (1, _FEW, _SHORT, _SHORT + 1))
    if len(mixed) <= max_rows and sum(mixed) <= max_tokens:
        yield mixed, mixed
        return
    for length in mixed:
        yield (length,), (length,)


def _split(tokens: int, longest: int) -> Requests:
    whole, rest = divmod(tokens, longest)
    return (*[longest] * whole, *([rest] if rest else []))
