"""Configuration of a split Llama: the configurations of its two halves, and the adapter between them."""

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

ADAPTERS = ("linear", "two-linear", "mlp")


class CustomSplitLLamaConfig(PreTrainedConfig):
    """Configuration of `CustomSplitLLamaForCausalLM`.

    The sizes at the top level follow from the halves; they are there for tools that look for them.

    Attributes:
        first_config: The first layers, with as many `num_hidden_layers` as the model has of them.
        last_config: The last layers, likewise.
        adapter: `linear` (one matrix), `two-linear`, or `mlp` (two with a ReLU between them); none has biases.
    """

    model_type = "split_llama"
    sub_configs = {"first_config": LlamaConfig, "last_config": LlamaConfig}  # noqa: RUF012  as transformers has it
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    first_config: Any = None
    last_config: Any = None
    adapter: str = "linear"
    use_cache: bool = True
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("first_config", "last_config"):
            half = getattr(self, name)
            if not isinstance(half, PreTrainedConfig):
                setattr(self, name, LlamaConfig(**(half or {})))
        first, last = self.first_config, self.last_config
        if self.adapter not in ADAPTERS:
            raise ValueError(f"adapter must be one of {', '.join(ADAPTERS)}, not {self.adapter!r}")
        if first.vocab_size != last.vocab_size:
            raise ValueError(f"the halves have vocabularies of {first.vocab_size} and {last.vocab_size} tokens")
        follows = {
            "num_layers_8": first.num_hidden_layers,
            "num_layers_70": last.num_hidden_layers,
            "mlp": self.adapter == "mlp",
            "num_hidden_layers": first.num_hidden_layers + last.num_hidden_layers,
            "hidden_size": last.hidden_size,
            "intermediate_size": last.intermediate_size,
            "num_attention_heads": last.num_attention_heads,
            "num_key_value_heads": last.num_key_value_heads,
            "head_dim": last.head_dim,
            "vocab_size": last.vocab_size,
            "max_position_embeddings": min(first.max_position_embeddings, last.max_position_embeddings),
            "rms_norm_eps": last.rms_norm_eps,
        }
        for name, value in follows.items():
            if kwargs.setdefault(name, value) != value:
                raise ValueError(f"{name} is {kwargs[name]!r}, the halves say {value!r}")
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keeps the halves at the vocabulary's size, which `resize_token_embeddings` sets at the top level only."""
        super().__setattr__(name, value)
        if name == "vocab_size":
            for half in (self.first_config, self.last_config):
                if isinstance(half, PreTrainedConfig):
                    half.vocab_size = value


__all__ = ["CustomSplitLLamaConfig"]
