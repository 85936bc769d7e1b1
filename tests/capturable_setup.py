"""Attention and state mixers for captured steps in plain torch: dense, slow, and blind to the host's numbers."""

from __future__ import annotations

import torch

from makeready.attention_backends.reference.impl import ReferenceAttention
from makeready.engines.transformers.packed.buckets import RaggedBucket, ragged_buckets
from makeready.engines.transformers.packed.decode_inputs import DecodeInputs
from makeready.engines.transformers.packed.graphs import DecodeGraphs
from makeready.engines.transformers.packed.ragged_graphs import RaggedGraphs
from makeready.engines.transformers.packed.ragged_inputs import RaggedInputs
from makeready.hybrid.mixers.reference.kernels import ReferenceMixers


class DenseAttention(ReferenceAttention):
    """Reads every slot that a block table reaches and masks what lies past each request's end."""

    capturable = True
    captures_ragged = True

    def forward(self, query, key_cache, value_cache, metadata, call):
        if metadata.num_ragged:
            return _attend_ragged(query, key_cache, value_cache, metadata, call)
        if not metadata.captured:
            return super().forward(query, key_cache, value_cache, metadata, call)
        table = metadata.block_table.long()
        keys, values = (c[table].flatten(1, 2).float().nan_to_num() for c in (key_cache, value_cache))
        repeat = query.shape[1] // keys.shape[2]
        keys, values = (side.repeat_interleave(repeat, dim=2) for side in (keys, values))
        scores = torch.einsum("bhd,bkhd->bhk", query.float(), keys) * call.scale
        if call.soft_cap is not None:
            scores = call.soft_cap * torch.tanh(scores / call.soft_cap)
        distance = metadata.seq_lens[:, None] - 1 - torch.arange(keys.shape[1], device=query.device)
        seen = distance >= 0
        if call.sliding_window is not None:
            seen = seen & (distance < call.sliding_window)
        weights = _weights(scores.masked_fill(~seen[:, None], -1e30), call.sinks)
        return torch.einsum("bhk,bkhd->bhd", weights, values).to(query.dtype)

    def forward_latent(self, query, latent_cache, rope_cache, metadata, call):
        keys = torch.cat([latent_cache, rope_cache], dim=-1)
        return self.forward(query, keys, latent_cache, metadata, call)


class DenseMixers(ReferenceMixers):
    """One-step updates over all rows; rows without a page go through the null page and leave it as it was."""

    capturable = True

    def causal_conv(self, x, weight, bias, state, batch, *, activation=None):
        if not batch.decode_only:
            return super().causal_conv(x, weight, bias, state, batch, activation=activation)
        inputs = torch.cat([_read(state, batch).to(x.dtype), x[..., None]], dim=-1)
        _write(state, batch, inputs[..., 1:])
        out = (inputs[..., -weight.shape[-1] :] * weight).sum(-1)
        out = out if bias is None else out + bias
        return _padded(torch.nn.functional.silu(out) if activation else out, batch).to(x.dtype)

    def mamba2(
        self, x, dt, A, B, C, state, batch, *, D=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf")),
        decode_dt_limit=None, z=None, chunk_size=64,
    ):  # fmt: skip
        if not batch.decode_only:
            return super().mamba2(
                x, dt, A, B, C, state, batch, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
                decode_dt_limit=decode_dt_limit, z=z, chunk_size=chunk_size,
            )  # fmt: skip
        steps = dt.float() + (0 if dt_bias is None else dt_bias.float())
        steps = torch.nn.functional.softplus(steps) if dt_softplus else steps
        B, C = (side.float().repeat_interleave(x.shape[1] // B.shape[1], dim=1) for side in (B, C))
        added = (steps[..., None] * x.float())[..., None] * B[:, :, None, :]
        states = _read(state, batch) * torch.exp(steps * A.float())[..., None, None] + added
        _write(state, batch, states)
        out = (states @ C[..., None])[..., 0]
        return _padded(out if D is None else out + x.float() * D.float()[:, None], batch).to(x.dtype)

    def gated_delta(self, q, k, v, g, beta, state, batch, *, l2norm=True, scale=None):
        if not batch.decode_only:
            return super().gated_delta(q, k, v, g, beta, state, batch, l2norm=l2norm, scale=scale)
        q, k = (side.float() for side in (q, k))
        if l2norm:
            q, k = (side * torch.rsqrt((side * side).sum(-1, keepdim=True) + 1e-6) for side in (q, k))
        q, k = (side.repeat_interleave(v.shape[1] // side.shape[1], dim=1) for side in (q, k))
        states = _read(state, batch) * g.float().exp()[..., None, None]
        known = (states * k[..., None]).sum(-2)
        states = states + k[..., None] * ((v.float() - known) * beta.float()[..., None])[..., None, :]
        _write(state, batch, states)
        out = (states * (q * (q.shape[-1] ** -0.5 if scale is None else scale))[..., None]).sum(-2)
        return _padded(out, batch).to(v.dtype)


def _attend_ragged(query, key_cache, value_cache, step, call):
    """Every token over every slot that its request's block table reaches; rows without keys get zeros."""
    token = torch.arange(query.shape[0], dtype=torch.int32, device=query.device)
    request = torch.searchsorted(step.query_start[1:].contiguous(), token, right=True)
    lens, seq_lens = step.query_start.diff()[request], step.seq_lens[request]
    position = seq_lens - lens + token - step.query_start[request]
    table = step.block_table[request].long()
    keys, values = (c[table].flatten(1, 2).float().nan_to_num() for c in (key_cache, value_cache))
    repeat = query.shape[1] // keys.shape[2]
    keys, values = (side.repeat_interleave(repeat, dim=2) for side in (keys, values))
    scores = torch.einsum("thd,tkhd->thk", query.float(), keys) * call.scale
    if call.soft_cap is not None:
        scores = call.soft_cap * torch.tanh(scores / call.soft_cap)
    distance = position[:, None] - torch.arange(keys.shape[1], device=query.device)
    seen = (distance >= 0) & (seq_lens > 0)[:, None]
    if call.sliding_window is not None:
        seen = seen & (distance < call.sliding_window)
    weights = _weights(scores.masked_fill(~seen[:, None], -1e30), call.sinks) * seen[:, None]
    return torch.einsum("thk,tkhd->thd", weights, values).to(query.dtype)


def _weights(scores, sinks):
    """Softmax over the keys of (T, H, K); a sink is one more logit a head."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    sink = sinks.float()[None, :, None].expand(scores.shape[0], -1, 1)
    return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]


def _read(state, batch):
    return state[batch.slots.clamp(min=0).long()].float()


def _write(state, batch, states):
    slots = batch.slots.clamp(min=0).long()
    padding = (batch.slots < 0).view(-1, *[1] * (states.dim() - 1))
    state.index_put_((slots,), torch.where(padding, state[slots], states.to(state.dtype)))


def _padded(out, batch):
    return out.masked_fill((batch.slots < 0).view(-1, *[1] * (out.dim() - 1)), 0.0)


class UncapturedSteps(DecodeGraphs):
    """Does what a graph would replay, without a graph: the same persistent tensors, padding and captured metadata."""

    def __init__(self, builder, inputs, forward, buckets):
        self._builder, self._inputs, self._forward, self._buckets = builder, inputs, forward, tuple(buckets)
        self.replayed: list[tuple[int, int]] = []

    def dummy(self, size):
        """What a capture runs: rows that are nobody's."""
        metadata = self._builder.captured_metadata(size)
        self._inputs.fill((), (), size)
        return self._run(size, self._builder.captured(size, metadata, self._inputs.states(size)))

    def replay(self, rows, seats):
        size = self.bucket(len(rows))
        metadata = self._builder.captured_metadata(size)
        self._builder.fill(rows, size)
        self._inputs.fill(rows, seats, size)
        logits, tokens = self._run(size, self._builder.captured(size, metadata, self._inputs.states(size)))
        self.replayed.append((len(rows), size))
        return logits[: len(rows)], tokens[: len(rows)]


class UncapturedRagged(RaggedGraphs):
    """The same for steps with prefill."""

    def __init__(self, builder, inputs, forward, buckets):
        super().__init__(builder, inputs, forward, buckets)
        self.replayed: list[tuple[tuple[int, ...], RaggedBucket]] = []

    def dummy(self, bucket):
        """What a capture runs: tokens that are nobody's."""
        metadata = self._builder.captured_ragged_metadata(bucket)
        self._inputs.fill((), (), bucket)
        return self._run(bucket, self._builder.captured_ragged(bucket, metadata, self._inputs.states(bucket)))

    def replay(self, bucket, rows, seats):
        metadata = self._builder.captured_ragged_metadata(bucket)
        self._builder.fill_ragged(rows, bucket)
        self._inputs.fill(rows, seats, bucket)
        logits, tokens = self._run(bucket, self._builder.captured_ragged(bucket, metadata, self._inputs.states(bucket)))
        self.replayed.append((tuple(row.length for row in rows), bucket))
        sampled = sum(row.samples for row in rows)
        return logits[:sampled], tokens[:sampled]


def use_uncaptured_ragged(engine) -> UncapturedRagged:
    """Let the engine run its steps with prefill as captured ones are run, on any device."""
    runner = engine._driver._runner
    scheduler = engine._driver._scheduler._config
    buckets = ragged_buckets(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
    inputs = RaggedInputs(runner._seats, runner._builder.state_groups, buckets, runner._device)
    runner._ragged = UncapturedRagged(runner._builder, inputs, runner._prefill, buckets)
    return runner._ragged


def use_uncaptured_steps(engine, buckets) -> UncapturedSteps:
    """Let the engine run its decodes as captured steps are run, on any device."""
    runner = engine._driver._runner
    inputs = DecodeInputs(runner._seats, runner._builder.state_groups, max(buckets), runner._device)
    runner._graphs = UncapturedSteps(runner._builder, inputs, runner._decode, buckets)
    return runner._graphs
