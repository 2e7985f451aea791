"""Code that depends on the release of megatron-core (0.16.1 to 0.19.2), or on running it without a GPU.

Nothing else in the package asks for a version. The releases differ in this much:

- 0.19 passes `name`, `pp_layer_offset` and friends to the constructors of layers and attention, so ours forward what
  they do not know; it builds norms and linears by calling what the spec holds, which works for classes in both;
- 0.19 reads `qk_layernorm` from the config beside the spec, so the config always states it;
- the MLP entry of a layer spec is a `ModuleSpec` before 0.19 and a partial of `MLP.as_mlp_submodule` (or of `MoELayer`)
  since, so specs are taken from `get_gpt_layer_local_spec` and only single entries are replaced;
- 0.19 logs on every construction that GPTModel is deprecated.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from ckptkit.megatron.stand_ins import replaced


def import_megatron(*, eager: bool = False) -> None:
    """Import megatron-core without its warnings about optional packages (Apex, Transformer Engine).

    Args:
        eager: Mark nothing for compilation, for a process that runs on the CPU only: the marks alone load torch's
            compiler, which takes as long as everything else.
    """
    with warnings.catch_warnings(), _nothing_compiled() if eager else contextlib.nullcontext():
        warnings.simplefilter("ignore")
        import megatron.core.models.gpt  # noqa: F401
    if eager:
        from megatron.core import jit

        jit.disable_jit_fuser()  # for modules that are imported later
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Make `torch.compile` give back what it gets."""
    original = torch.compile

    def as_it_is(model: Any = None, **options: Any) -> Any:
        return model if model is not None else lambda function: function

    torch.compile = as_it_is
    try:
        yield
    finally:
        torch.compile = original


def local_layer_spec(qk_norm: bool, num_experts: int | None = None, *, latent: bool = False) -> Any:
    """The `ModuleSpec` of a decoder layer made of megatron-core's own modules, a fresh one per call.

    Args:
        qk_norm: Whether q and k are normalised.
        num_experts: Experts in place of the dense MLP, or None.
        latent: Whether attention is latent attention.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_gpt_layer_local_spec(
            num_experts=num_experts,
            moe_grouped_gemm=False,
            normalization="RMSNorm",
            qk_layernorm=qk_norm,
            multi_latent_attention=latent,
        )


@contextlib.contextmanager
def latent_attention_built() -> Iterator[None]:
    """Let megatron-core build its latent attention from the modules of the layer spec alone.

    Without Transformer Engine, 0.16.1 takes stand-ins of its own for that library's modules, and asks whether a linear
    is one. 0.19 builds the projection of queries that have no latent vector as a linear with a norm in it, whatever the
    spec names; no archive has such a norm, and only Transformer Engine such a linear.

    Its rotary embeddings are left out: ours takes their place, and that of yarn needs a GPU where there are several
    context parallel ranks.
    """
    from megatron.core.transformer import multi_latent_attention

    stand_ins: list[tuple[Any, str, Any]] = [
        (multi_latent_attention, name, lambda *args, **options: None)
        for name in ("RotaryEmbedding", "YarnRotaryEmbedding")
    ]
    if not isinstance(getattr(multi_latent_attention, "TELinear", None), type):
        stand_ins.append((multi_latent_attention, "HAVE_TE", False))
    resolver = getattr(multi_latent_attention, "QKNormConfigResolver", None)
    if resolver is not None:
        stand_ins.append((resolver, "_mla_fused_linear_or_default", resolver._non_fused_or_default))
    with replaced(stand_ins):
        yield


@contextlib.contextmanager
def gated_delta_net_built(core: type) -> Iterator[None]:
    """Let megatron-core build its gated DeltaNet without flash-linear-attention, whose kernels it then cannot run.

    Args:
        core: megatron-core's class.
    """
    modules = (sys.modules[one.__module__] for one in core.__mro__)
    home = next(module for module in modules if hasattr(module, "HAVE_FLA"))
    with replaced([(home, "HAVE_FLA", True)]):
        yield


def submodules_of(spec: Any) -> Any:
    """The submodules that a `ModuleSpec`, or a partial in its place, will build with."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def with_module(spec: Any, module: type) -> Any:
    """The MLP entry of a layer spec, to be built with a subclass `module` of its own class."""
    if isinstance(spec, functools.partial):
        return functools.partial(module, *spec.args, **spec.keywords)
    spec.module = module
    return spec


@contextlib.contextmanager
def runs_on(device: torch.device) -> Iterator[None]:
    """Make megatron-core allocate its buffers on `device`.

    Collectives of both releases allocate with `device=torch.cuda.current_device()`, for CPU tensors too, and that call
    fails where there is no driver; so does saving the state of its generator, which activation recomputation does. In
    this context the first answers with the CPU and there is no such state; a CUDA `device` becomes the current one.
    On the CPU what megatron-core marks for compilation runs as it is: where there is a GPU, the compiler of torch does
    not take the answer. Where that is not loaded, nothing is marked.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
        return
    from megatron.core.tensor_parallel import random

    stand_ins: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: device),
        (random, "_get_cuda_rng_state", lambda *args, **options: None),
        (random, "_set_cuda_rng_state", lambda *args, **options: None),
    ]
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    with replaced(stand_ins), eager:
        yield


@contextlib.contextmanager
def trains_on(device: torch.device) -> Iterator[None]:
    """`runs_on` for megatron-core's schedules and reductions too, which count tokens on `cuda` and wait for the device.

    On the CPU they see a torch that allocates on the CPU, and there is nothing to wait for. Over gloo, gradients on a
    GPU are reduced one buffer after the other: it has no such operation for several at once.
    """
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.pipeline_parallel import schedules

    stand_ins: list[tuple[Any, str, Any]] = []
    if device.type == "cpu":
        stand_ins += [
            (schedules, "torch", _TorchOnCpu()),
            (torch.cuda, "synchronize", lambda device=None: None),
            (torch.cuda, "current_stream", lambda device=None: None),
        ]
    elif torch.distributed.get_backend() == "gloo":
        stand_ins += [(param_and_grad_buffer, "_coalescing_manager", lambda *args, **options: contextlib.nullcontext())]
    with runs_on(device), replaced(stand_ins):
        yield


class _TorchOnCpu:
    """torch, as the schedules see it where there is no GPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        """Zeros in host memory, whatever the device."""
        return torch.zeros(*size, **options)
