"""Openers that misbehave in a rank."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from ckptkit.errors import InputError
from tests.verification.stand_in import StandIn, open_stand_in


def hang(path: str) -> StandIn:
    time.sleep(600)
    raise AssertionError


def die(path: str) -> StandIn:
    print("this is the end", file=sys.stderr, flush=True)
    os._exit(3)


class OneBadRank(StandIn):
    def shard(self, *, tp_rank: int, **place: Any) -> dict[str, Any]:
        if tp_rank == 1:
            raise InputError("this shard is damaged", where="rank 1's file", hint="get another")
        return super().shard(tp_rank=tp_rank, **place)


def one_bad_rank(path: str) -> StandIn:
    found = open_stand_in(path)
    return OneBadRank(found.path, found.config, found.grid, found.padded_vocab_size)


class OneCrash(StandIn):
    def shard(self, *, tp_rank: int, **place: Any) -> dict[str, Any]:
        return super().shard(tp_rank=tp_rank // (1 - tp_rank), **place)


def one_crash(path: str) -> StandIn:
    found = open_stand_in(path)
    return OneCrash(found.path, found.config, found.grid, found.padded_vocab_size)


class OneOther(StandIn):
    """What the last process loads is not what the others do."""

    def shard(self, *, tp_rank: int, **place: Any) -> dict[str, Any]:
        import torch.distributed as dist

        found = super().shard(tp_rank=tp_rank, **place)
        if dist.get_rank() == dist.get_world_size() - 1:
            found["decoder.final_layernorm.weight"] = found["decoder.final_layernorm.weight"] * 1.001
        return found


def one_other(path: str) -> StandIn:
    found = open_stand_in(path)
    return OneOther(found.path, found.config, found.grid, found.padded_vocab_size)


def say_what_is_loaded(path: str) -> StandIn:
    raise InputError(f"the compiler of torch is {'' if 'torch._dynamo' in sys.modules else 'not '}loaded", where=path)
