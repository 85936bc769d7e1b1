"""Requests one by one: torch's loops treat the end of a tensor differently, so bits depend on what stands beside."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch

from ..batch import StateBatch

Mixer = Callable[..., torch.Tensor]


def one_by_one(*tokens: str) -> Callable[[Mixer], Mixer]:
    """Makes a mixer of kernels that are ``alone`` a call per request.

    :param tokens: names of the arguments whose first axis is the step's tokens.
    """

    def decorate(mixer: Mixer) -> Mixer:
        names = signature(mixer)

        @wraps(mixer)
        def called(kernels: Any, *args: Any, **options: Any) -> torch.Tensor:
            given = names.bind(kernels, *args, **options).arguments
            batch: StateBatch = given["batch"]
            if not kernels.alone or batch.num_requests < 2:
                return mixer(kernels, *args, **options)
            outputs, start = [], 0
            for request, length in enumerate(batch.lens()):
                if not length:
                    continue
                part = {name: value for name, value in given.items() if name not in tokens and name != "self"}
                for name in tokens:
                    if given.get(name) is not None:
                        part[name] = given[name][start : start + length].contiguous()
                part["batch"] = _alone(batch, request, length)
                outputs.append(mixer(kernels, **part))
                start += length
            return torch.cat(outputs)

        return called

    return decorate


def _alone(batch: StateBatch, request: int, length: int) -> StateBatch:
    return StateBatch(
        query_start=torch.tensor([0, length], dtype=torch.int32, device=batch.query_start.device),
        slots=batch.slots[request : request + 1],
        fresh=batch.fresh[request : request + 1],
        max_query_len=length,
        query_lens_host=(length,),
        decode_only=length == 1,
    )
