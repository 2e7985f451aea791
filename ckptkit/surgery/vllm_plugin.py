"""The entry point `vllm.general_plugins`: makes split Llamas known to vLLM, in each of its processes.

Neither vLLM's model classes nor ours are imported here: vLLM imports the class that the string names when it needs it.
"""

from __future__ import annotations

from ckptkit.families.split_llama import ARCHITECTURE, MODEL_TYPE

MODEL = "ckptkit.surgery.vllm_model:CustomSplitLLamaForCausalLM"


def register() -> None:
    """Registers configuration and model; calling it again changes nothing."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from ckptkit.surgery.remote.configuration_custom_split_llama import CustomSplitLLamaConfig

    AutoConfig.register(MODEL_TYPE, CustomSplitLLamaConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL)
