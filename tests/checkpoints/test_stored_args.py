"""Stored `args`: what they say is of the right type, agrees with the model that comes out, and loses no row of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ckptkit import Parallelism, convert, open_checkpoint
from ckptkit.checkpoints.config_fields import in_words
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.families.llama import LLAMA
from ckptkit.inspection.differences import diff
from ckptkit.megatron_args.contradictions import NEUTRAL, NEUTRAL_OF_EXPERTS, WRITTEN, contradictions
from ckptkit.megatron_args.fields import GRID_ARGS, SCORE_FIELDS
from ckptkit.megatron_args.known import read_args
from ckptkit.megatron_args.reading import grid_of
from ckptkit.megatron_args.writing import to_args
from ckptkit.sharding.grid import StatedGrid
from tests.checkpoints.args_files import code_of, set_args
from tests.models import save_model

MEGATRON_0_19: dict[str, Any] = {
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "activation_func_clamp_value": None,
    "add_bias_linear": False,
    "add_position_embedding": True,
    "add_qkv_bias": False,
    "apply_query_key_layer_scaling": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.1,
    "attention_output_gate": False,
    "bf16": False,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "experimental_attention_variant": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "ffn_hidden_size": 144,
    "fp16": False,
    "glu_linear_offset": 0.0,
    "group_query_attention": True,
    "hidden_dropout": 0.1,
    "hidden_size": 96,
    "hybrid_layer_pattern": None,
    "init_method_std": 0.02,
    "kv_channels": None,
    "layernorm_epsilon": 1e-05,
    "layernorm_zero_centered_gamma": False,
    "linear_attention_freq": None,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "make_vocab_size_divisible_by": 128,
    "max_position_embeddings": 512,
    "moe_apply_probs_on_input": False,
    "moe_ffn_hidden_size": None,
    "moe_latent_size": None,
    "moe_layer_freq": 1,
    "moe_mlp_glu_interleave_size": None,
    "mtp_num_layers": None,
    "moe_router_dtype": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_force_load_balancing": False,
    "moe_router_group_topk": None,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_router_num_groups": None,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk": 2,
    "moe_router_topk_scaling_factor": None,
    "moe_shared_expert_gate": False,
    "moe_shared_expert_intermediate_size": None,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "multi_latent_attention": False,
    "no_rope_freq": None,
    "normalization": "RMSNorm",
    "num_attention_heads": 12,
    "num_experts": None,
    "num_layers": 4,
    "num_query_groups": 4,
    "openai_gelu": False,
    "padded_vocab_size": 256,
    "pipeline_model_parallel_layout": None,
    "pipeline_model_parallel_size": 1,
    "position_embedding_type": "rope",
    "qk_l2_norm": False,
    "qk_layernorm": False,
    "quick_geglu": False,
    "rope_scaling_factor": 8.0,
    "rotary_base": 10000,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "rotary_scaling_factor": 1.0,
    "rotary_seq_len_interpolation_factor": None,
    "seq_length": 512,
    "softmax_type": "vanilla",
    "squared_relu": False,
    "swiglu": True,
    "tensor_model_parallel_size": 1,
    "untie_embeddings_and_output_weights": True,
    "use_mup": False,
    "use_rope_scaling": False,
    "use_rotary_position_embeddings": False,
    "vocab_size": 250,
    "window_attn_skip_freq": None,
    "window_size": None,
    "yarn_beta_fast": None,
    "yarn_beta_slow": None,
    "yarn_original_max_position_embeddings": None,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "rope_type": None,
}
"""What the parser of Megatron-LM (core 0.19.2) gives for a tiny Llama, as far as it is about the model and its grid."""

OTHER: dict[str, Any] = {
    "rotary_interleaved": True,
    "rotary_percent": 0.5,
    "position_embedding_type": "yarn",
    "normalization": "LayerNorm",
    "swiglu": False,
    "squared_relu": True,
    "multi_latent_attention": True,
    "experimental_attention_variant": "gated_delta_net",
    "attention_output_gate": True,
    "softmax_type": "off-by-one",
    "qk_l2_norm": True,
    "no_rope_freq": 4,
    "apply_residual_connection_post_layernorm": True,
    "openai_gelu": True,
    "quick_geglu": True,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0,
    "use_mup": True,
}
"""Of every argument that changes the mathematics of a Llama, and that no `ModelConfig` has, another value."""
OTHER_OF_EXPERTS: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
    "moe_router_group_topk": 2,
    "moe_router_topk_limited_devices": 2,
    "moe_router_load_balancing_type": ["aux_loss", "sinkhorn"],
    "moe_router_force_load_balancing": True,
    "moe_apply_probs_on_input": True,
    "moe_latent_size": 32,
    "moe_mlp_glu_interleave_size": 32,
}


OURS = {field.args: field.ours for field in SCORE_FIELDS}
"""Those that a `ModelConfig` has, under its names."""
LAYOUT: dict[str, str] = {
    **{
        name: f"args say {name} "
        for name in (
            "rotary_interleaved",
            "multi_latent_attention",
            "experimental_attention_variant",
            "attention_output_gate",
        )
    },
    "swiglu": "args say gated false, config.json says true",
}
"""Those of `OTHER` by which stored bytes are cut -> what is said of them: no reference outranks them."""


class TestMathematics:
    def test_every_argument_has_a_case(self) -> None:
        known = {*WRITTEN, *NEUTRAL, *NEUTRAL_OF_EXPERTS, *OURS} - {"moe_router_num_groups"}  # alone it does nothing
        assert OTHER.keys() | OTHER_OF_EXPERTS.keys() == known
        assert not OTHER.keys() & OTHER_OF_EXPERTS.keys()

    @pytest.mark.parametrize(
        ("to", "name"),
        [*(("packed", name) for name in OTHER), ("torch", "rotary_interleaved"), ("torch_dist", "no_rope_freq")],
    )
    def test_of_a_llama(self, models: Any, stored: Any, tmp_path: Path, to: str, name: str) -> None:
        path, value = stored(to, **{name: OTHER[name]}), OTHER[name]
        with pytest.raises(InputError, match=f"contradicts itself: .*args say {name} {value!r}, config.json means"):
            convert(path, tmp_path / "out", to="hf")
        if name in LAYOUT:
            with pytest.raises(InputError, match=f"contradicts how the weights are stored: .*{LAYOUT[name]}"):
                convert(path, tmp_path / "out", to="hf", hf_reference=models("gqa"))
        else:
            result = convert(path, tmp_path / "out", to="hf", hf_reference=models("gqa"), dry_run=True)
            (note,) = (note for note in result.notes if "outranks" in note)
            assert f"args say {name} {value!r}" in note
        shutil.rmtree(path / "ckptkit")
        with pytest.raises(UnsupportedError, match=rf"describe no \w+: .*{name} is {value!r}, not .*--hf-reference"):
            convert(path, tmp_path / "out", to="hf")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", OTHER_OF_EXPERTS)
    def test_of_experts(self, stored: Any, tmp_path: Path, name: str) -> None:
        value = OTHER_OF_EXPERTS[name]
        path = stored("packed", "qwen3_moe", **{name: value})
        told = f"{OURS[name]} {in_words(value)}" if name in OURS else f"{name} {value!r}"
        assert f"args say {told}" in "; ".join(open_checkpoint(path).disagreements)
        shutil.rmtree(path / "ckptkit")
        with pytest.raises(UnsupportedError) as raised:
            open_checkpoint(path)
        assert f"{name} is {value!r}, not " in str(raised.value)
        assert not open_checkpoint(stored("packed", **{name: value})).disagreements, "a model without experts"

    @pytest.mark.parametrize(
        ("kind", "changes"),
        [
            ("gqa", {"apply_layernorm_1p": True}),
            ("gqa", {"layernorm_zero_centered_gamma": True, "apply_layernorm_1p": ...}),
            ("gqa", {"qk_layernorm": True}),
            ("gqa", {"softmax_scale": 0.5}),
            ("qwen2", {"add_qkv_bias": False}),
            ("apertus", {"window_size": (7, 0)}),
            ("qwen3", {"qk_layernorm": False}),
            ("mixtral", {"moe_layer_freq": [1, 0, 1, 1]}),
            ("gemma3_text", {"apply_layernorm_1p": False}),
            ("gemma3_text", {"softmax_scale": 0.3}),
        ],
    )
    def test_what_a_family_cannot_say(self, stored: Any, tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
        """Fields of a `ModelConfig` for which config.json of this family has no word, so that it would say less."""
        path = stored("packed", kind, **changes)
        with pytest.raises(InputError):
            convert(path, tmp_path / "out", to="hf")
        shutil.rmtree(path / "ckptkit")
        with pytest.raises(UnsupportedError, match="the checkpoint's args describe no") as raised:
            open_checkpoint(path)
        name = next(iter(changes)).replace("layernorm_zero_centered_gamma", "apply_layernorm_1p")
        assert f"{name} is " in str(raised.value)

    @pytest.mark.parametrize("to", ["packed", "torch", "torch_dist"])
    def test_as_one_line_with_an_exit_code(
        self, stored: Any, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = stored(to, rotary_interleaved=True)
        code, error = code_of("convert", path, tmp_path / "out", "--to", "hf", capsys=capsys)
        assert (code, error.count("\n")) == (3, 1) and "rotary_interleaved True" in error
        shutil.rmtree(path / "ckptkit")
        code, error = code_of("convert", path, tmp_path / "out", "--to", "hf", capsys=capsys)
        assert (code, error.count("\n")) == (4, 1) and "rotary_interleaved is True, not False" in error

    @pytest.mark.parametrize(
        "changes",
        [
            {"no_rope_freq": [0, 0, 0, 0]},
            {"softmax_scale": 0.3535533845424652},
            {"use_rotary_position_embeddings": False, "add_position_embedding": False},
            dict.fromkeys((*WRITTEN, *NEUTRAL, *NEUTRAL_OF_EXPERTS)),
            dict.fromkeys(("rotary_base", "rope_scaling_factor", "norm_epsilon", "init_method_std", "moe_layer_freq")),
            dict.fromkeys(("kv_channels", "vocab_size", "padded_vocab_size", "expert_model_parallel_size")),
            dict.fromkeys(("add_bias_linear", "norm_epsilon", "rotary_percent", "normalization", "swiglu"), ...),
            {"add_bias_linear": ..., "disable_bias_linear": True},
            {"moe_router_score_function": "sigmoid", "moe_expert_capacity_factor": 1.0},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("sidecar", [True, False])
    def test_what_is_sound(self, models: Any, stored: Any, changes: dict[str, Any], sidecar: bool) -> None:
        path = stored("torch", sidecar=sidecar, **changes)
        assert not open_checkpoint(path).disagreements
        assert not [note for note in open_checkpoint(path, hf_reference=models("gqa")).notes if "outranks" in note]
        if "vocab_size" not in changes:
            assert (found := diff(models("gqa"), path)).equal == found.compared == 39

    @pytest.mark.parametrize("to", ["packed", "torch", "torch_dist"])
    @pytest.mark.parametrize("sidecar", [True, False])
    def test_what_megatron_lm_0_19_records(self, models: Any, stored: Any, to: str, sidecar: bool) -> None:
        path = stored(to, sidecar=sidecar)
        opened = open_checkpoint(path)
        gone = list(to_args(opened.family, opened.config, Parallelism(), 256, 128))
        set_args(path, **{**dict.fromkeys(gone, ...), **MEGATRON_0_19})
        assert not open_checkpoint(path).disagreements
        assert diff(models("gqa"), path).same
        set_args(path, layernorm_epsilon=1e-3)
        if sidecar:
            assert open_checkpoint(path).disagreements == ("args say norm_eps 0.001, config.json says 1e-05",)
        else:
            assert open_checkpoint(path).config.norm_eps == 1e-3

    def test_experts_that_are_routed_as_usual(self, stored: Any) -> None:
        usual = {
            "moe_router_topk_scaling_factor": 1.0,
            "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
            "moe_router_group_topk": 0,
        }
        for sidecar in (True, False):
            assert not open_checkpoint(stored("packed", "qwen3_moe", sidecar=sidecar, **usual)).disagreements

    def test_yarn(self, stored: Any, tmp_path: Path) -> None:
        """Megatron-LM has arguments for it since 0.19; we write none, as it does not read them from a checkpoint."""
        rope = {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 128,
        }
        source = save_model(tmp_path / "hf", "qwen3", rope_parameters=rope)
        convert(source, tmp_path / "meg", to="torch")
        yarn = {"position_embedding_type": "yarn", "rotary_scaling_factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.0}
        set_args(tmp_path / "meg", **yarn, yarn_original_max_position_embeddings=128, yarn_beta_fast=None)
        assert not open_checkpoint(tmp_path / "meg").disagreements
        for name, value in {"rotary_scaling_factor": 8.0, "yarn_beta_fast": 16.0, "mscale_all_dim": 1.0}.items():
            set_args(tmp_path / "meg", **{name: value})
            (text,) = open_checkpoint(tmp_path / "meg").disagreements
            assert text.startswith(f"args say {name} {value}, config.json means")
            set_args(tmp_path / "meg", **{name: yarn.get(name)})

    def test_of_megatron_bridge(self, models: Any, stored: Any) -> None:
        """Its run_config.yaml is read in place of `args`, and by the same table."""
        path = stored("torch_dist", sidecar=False)
        (path / "release" / "common.pt").unlink()
        file = path / "release" / "run_config.yaml"
        content = yaml.safe_load(file.read_text())
        gelu = {"_target_": "torch.nn.functional.gelu", "_call_": False}
        model = {**content["model"], "rotary_interleaved": True}
        file.write_text(yaml.safe_dump({**content, "model": model}))
        with pytest.raises(UnsupportedError, match="rotary_interleaved is True, not False"):
            open_checkpoint(path)
        with pytest.raises(InputError, match="contradicts how the weights are stored"):
            open_checkpoint(path, hf_reference=models("gqa"))
        for name, value, shown in (
            ("position_embedding_type", "none", "position_embedding_type is 'none', not 'rope'"),
            ("no_rope_freq", [0, 0, 0, 1], r"no_rope_freq is \[0, 0, 0, 1\], not None"),
            ("activation_func", gelu, "swiglu is False, not True"),
        ):
            file.write_text(yaml.safe_dump({**content, "model": {**content["model"], name: value}}))
            with pytest.raises(UnsupportedError, match=shown):
                open_checkpoint(path)
            assert any("outranks" in note for note in open_checkpoint(path, hf_reference=models("gqa")).notes)

    def test_what_only_a_reference_can_say_of_a_run_config(self, models: Any, tmp_path: Path) -> None:
        types = [*["sliding_attention"] * 5, "full_attention"]
        options = {"num_hidden_layers": 6, "layer_types": types, "query_pre_attn_scalar": 16}
        source = save_model(tmp_path / "hf", "gemma3_text", **options)
        convert(source, tmp_path / "meg", to="torch_dist")
        shutil.rmtree(tmp_path / "meg" / "ckptkit")
        (tmp_path / "meg" / "release" / "common.pt").unlink()
        file = tmp_path / "meg" / "release" / "run_config.yaml"
        content = yaml.safe_load(file.read_text())
        for name, value in (("rotary_base", [5000, 1000000]), ("activation_func", "gelu")):
            file.write_text(yaml.safe_dump({**content, "model": {**content["model"], name: value}}))
            with pytest.raises(UnsupportedError, match=r"in run_config.yaml; give --hf-reference"):
                open_checkpoint(tmp_path / "meg")
            notes = open_checkpoint(tmp_path / "meg", hf_reference=source).notes
            assert any("the reference outranks run_config.yaml" in note for note in notes)


ILL_TYPED = [
    ("hidden_size", None, "a positive integer"),
    ("num_layers", -1, "a positive integer"),
    ("num_attention_heads", None, "a positive integer"),
    ("num_query_groups", "x", "a positive integer"),
    ("num_query_groups", True, "a positive integer"),
    ("kv_channels", "8", "a positive integer"),
    ("ffn_hidden_size", 144.0, "a positive integer"),
    ("num_experts", 1.5, "an integer from 0 to 10,000"),
    ("vocab_size", "250", "an integer of at least 0"),
    ("make_vocab_size_divisible_by", 0, "a positive integer"),
    ("rotary_base", "10000", "a positive number"),
    ("norm_epsilon", -1.0, "a number of at least 0"),
    ("layernorm_epsilon", "1e-5", "a number of at least 0"),
    ("softmax_scale", [0.1], "a positive number"),
    ("swiglu", "True", "true or false"),
    ("window_size", 5, "two integers"),
    ("window_attn_skip_freq", 0, "a positive integer or a list of integers"),
    ("moe_layer_freq", "[1, 0]", "a positive integer or a list of integers"),
    ("tensor_model_parallel_size", "1", "a positive integer"),
    ("pipeline_model_parallel_size", "1", "a positive integer"),
    ("virtual_pipeline_model_parallel_size", "2", "a positive integer"),
    ("expert_model_parallel_size", "1", "a positive integer"),
    ("expert_model_parallel_size", 0, "a positive integer"),
    ("expert_tensor_parallel_size", 1.0, "a positive integer"),
    ("decoder_first_pipeline_num_layers", "2", "a positive integer"),
    ("account_for_loss_in_pipeline_split", "yes", "true or false"),
]


GRID = GRID_ARGS.values()


class TestTypes:
    @pytest.mark.parametrize(
        ("to", "name", "value", "kind"),
        [
            *(("packed", *case) for case in ILL_TYPED),
            *((to, *case) for to in ("torch", "torch_dist") for case in ILL_TYPED if case[0] in (*GRID, "hidden_size")),
        ],
    )
    def test_are_checked(
        self,
        stored: Any,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        to: str,
        name: str,
        value: object,
        kind: str,
    ) -> None:
        changes = {name: value, **({"norm_epsilon": ...} if name == "layernorm_epsilon" else {})}
        path = stored(to, **changes)
        shown = name.replace("layernorm_", "norm_")
        for _ in range(2):
            code, error = code_of("convert", path, tmp_path / "out", "--to", "hf", capsys=capsys)
            assert (code, error.count("\n")) == (3, 1), error
            assert f"the checkpoint's args say {shown} {value!r}, but it must be {kind}" in error
            shutil.rmtree(path / "ckptkit", ignore_errors=True)

    def test_of_a_grid(self) -> None:
        assert grid_of({"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}) == Parallelism(2)
        assert grid_of(dict.fromkeys(("pipeline_model_parallel_size", "expert_tensor_parallel_size"))) == Parallelism()
        for value in ("2", 0, 1.5, [1]):
            with pytest.raises(InputError, match="pipeline_model_parallel_size"):
                grid_of({"pipeline_model_parallel_size": value})

    @pytest.mark.parametrize("sidecar", [True, False])
    def test_lists_that_are_shorter_than_the_model(self, stored: Any, sidecar: bool) -> None:
        for kind, name in (("ministral", "window_attn_skip_freq"), ("qwen3_moe", "moe_layer_freq")):
            with pytest.raises(InputError, match="args make no sense"):
                open_checkpoint(stored("packed", kind, sidecar=sidecar, **{name: [1]}))
        with pytest.raises(InputError, match="args make no sense"):
            open_checkpoint(stored("packed", "gemma4_text-dense", sidecar=False, window_attn_skip_freq=[1]))

    def test_more_experts_for_a_token_than_there_are(self, stored: Any) -> None:
        path = stored("packed", "qwen3_moe", sidecar=False, moe_router_topk=9)
        with pytest.raises(InputError, match="moe_router_topk 9 of num_experts 4"):
            open_checkpoint(path)

    def test_names_of_other_releases(self) -> None:
        args = {"layernorm_epsilon": 1e-3, "layernorm_zero_centered_gamma": True, "num_layers": 2, "hidden_size": 8}
        args["num_attention_heads"] = 2
        read = read_args({**args, "disable_bias_linear": True})
        assert (read["norm_epsilon"], read["apply_layernorm_1p"], read["add_bias_linear"]) == (1e-3, True, False)
        read = read_args({**args, "norm_epsilon": 1e-6, "rotary_base": None, "add_bias_linear": True})
        assert (read["norm_epsilon"], read["add_bias_linear"]) == (1e-6, True) and "rotary_base" not in read

    def test_none_at_all(self) -> None:
        assert read_args({}) == {}
        config = LLAMA.parse({"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1})
        assert contradictions({}, config) == []


class TestVocabulary:
    """250 tokens, stored in 256 rows."""

    @pytest.fixture
    def reference(self, models: Callable[[str], Path], tmp_path: Path) -> Callable[[int], Path]:
        """A reference whose config.json has another vocabulary."""

        def get(vocab_size: int) -> Path:
            folder = tmp_path / f"reference-{vocab_size}"
            folder.mkdir()
            config = json.loads((models("gqa") / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "vocab_size": vocab_size}))
            return folder

        return get

    @pytest.mark.parametrize("to", ["torch", "torch_dist"])
    @pytest.mark.parametrize("told", [250, None, 100])
    def test_a_reference_with_fewer_tokens(
        self, stored: Any, reference: Any, tmp_path: Path, to: str, told: int | None
    ) -> None:
        path, fewer = stored(to, sidecar=False, vocab_size=told), reference(100)
        with pytest.raises(InputError, match=r"weights would be lost; give .*vocab_size, or --vocab-size 100"):
            convert(path, tmp_path / "out", to="hf", hf_reference=fewer)
        assert not (tmp_path / "out").exists()
        result = convert(path, tmp_path / "out", to="hf", hf_reference=fewer, vocab_size=100)
        assert "156 rows beyond --vocab-size 100 are left out" in result.notes

    def test_as_one_line_with_an_exit_code(
        self, stored: Any, reference: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ("convert", stored("torch"), tmp_path / "out", "--to", "hf", "--hf-reference", reference(100))
        code, error = code_of(*words, capsys=capsys)
        assert (code, error.count("\n")) == (3, 1)
        assert "args say vocab_size 250, config.json says 100" in error

    def test_a_token_less_than_args_say(self, stored: Any, reference: Any) -> None:
        """Padding would explain the row; `args` say that it is none."""
        path, fewer = stored("torch", sidecar=False), reference(249)
        with pytest.raises(InputError, match=r"args say vocab_size 250, config.json says 249: weights would be lost"):
            open_checkpoint(path, hf_reference=fewer)
        notes = open_checkpoint(path, hf_reference=fewer, vocab_size=249).notes
        assert "args say vocab_size 250, config.json says 249, which --vocab-size confirms" in notes
        assert open_checkpoint(set_args(path, vocab_size=None), hf_reference=fewer).config.vocab_size == 249

    def test_more_tokens_than_args_say(self, models: Any, stored: Any) -> None:
        """As of Qwen, whose config.json counts rows beyond the tokens of the tokenizer."""
        for sidecar, reference in ((True, None), (False, models("gqa"))):
            opened = open_checkpoint(stored("torch", sidecar=sidecar, vocab_size=243), hf_reference=reference)
            assert opened.config.vocab_size == 250 and not opened.disagreements
            assert "args say vocab_size 243, config.json says 250: all its rows are kept" in opened.notes

    def test_the_sidecar_says_fewer(self, stored: Any) -> None:
        path = stored("torch")
        config = path / "ckptkit" / "hf" / "config.json"
        raw = json.loads(config.read_text())
        config.write_text(json.dumps({**raw, "vocab_size": 249}))
        assert open_checkpoint(path).disagreements == ("args say vocab_size 250, config.json says 249",)
        assert not open_checkpoint(path, vocab_size=249).disagreements
        config.write_text(json.dumps({**raw, "vocab_size": 100}))
        with pytest.raises(InputError, match=r"256 rows, a vocabulary of 100 has at most 128.*would be lost"):
            open_checkpoint(path)

    def test_args_alone(self, stored: Any) -> None:
        """Tokenizers that do not count their special tokens: what padding does not explain, somebody has to say."""
        path = stored("torch", sidecar=False, vocab_size=100)
        with pytest.raises(InputError, match=r"say vocab_size 100, but 256 rows are stored.*--vocab-size N.*256 keeps"):
            open_checkpoint(path)
        for size in (256, 250, 100):
            opened = open_checkpoint(path, vocab_size=size)
            assert opened.config.vocab_size == size
            assert any("outranks the checkpoint's args, which say 100" in n for n in opened.notes) == (size != 100)
        path = stored("torch", sidecar=False)
        assert open_checkpoint(path).config.vocab_size == 250
        with pytest.raises(UsageError, match="--vocab-size 100, but the checkpoint says 250"):
            open_checkpoint(path, vocab_size=100)

    @pytest.mark.parametrize("to", ["torch", "torch_dist"])
    @pytest.mark.parametrize("tp", [1, 2, 4])
    def test_padding(self, models: Any, stored: Any, reference: Any, to: str, tp: int) -> None:
        """As released models have it: to the next multiple of 128 for each rank, known by `args` or by the shards."""
        import torch

        source = models("gqa")
        rows = 256 * max(tp // 2, 1)
        path = stored(to, grid=Parallelism(tp), sidecar=False)
        assert open_checkpoint(path).padded_vocab_size == rows
        assert diff(source, path).same
        for silent in ("vocab_size", "make_vocab_size_divisible_by"):
            assert diff(source, set_args(path, **{silent: None}), hf_reference=source).same
        for file in (*path.glob("release/mp_rank_*/*.pt"), *path.glob("release/common.pt")):
            content = torch.load(file, weights_only=False)
            del content["args"]
            torch.save(content, file)
        (path / "release" / "run_config.yaml").unlink(missing_ok=True)
        stated = StatedGrid(tp=tp) if to == "torch" else StatedGrid()
        assert open_checkpoint(path, hf_reference=source, stored_grid=stated).config.vocab_size == 250
        if tp > 1:
            return  # all rows are less than one step
        fewer = reference(rows - 128 * tp)
        with pytest.raises(InputError, match="weights would be lost"):
            open_checkpoint(path, hf_reference=fewer, stored_grid=stated)

    def test_a_head_with_more_rows_than_the_embedding(self, stored: Any, tmp_path: Path) -> None:
        import torch

        path = stored("torch")
        file = path / "release" / "mp_rank_00" / "model_optim_rng.pt"
        content = torch.load(file, weights_only=False)
        content["model"]["output_layer.weight"] = torch.ones(512, 96)
        torch.save(content, file)
        with pytest.raises(InputError, match=r"output_layer.weight has 512 rows"):
            open_checkpoint(path)


class TestGrids:
    SIZES: dict[str, int] = {  # noqa: RUF012  the world size is 12, which is no multiple of one by the other
        "tensor_model_parallel_size": 4,
        "expert_model_parallel_size": 6,
        "expert_tensor_parallel_size": 1,
    }

    def test_a_distributed_checkpoint_does_not_depend_on_it(self, models: Any, stored: Any, tmp_path: Path) -> None:
        for changes in (self.SIZES, {"virtual_pipeline_model_parallel_size": 2}, {"pipeline_model_parallel_size": 3}):
            path = stored("torch_dist", "qwen3_moe", **changes)
            assert diff(models("qwen3_moe"), path).same
            notes = open_checkpoint(path).notes
            known = "pipeline_model_parallel_size" in changes
            assert any("an unsupported grid" in note for note in notes) != known
        convert(path, tmp_path / "out", to="hf")

    def test_ranks_files_do(self, stored: Any) -> None:
        with pytest.raises(UnsupportedError, match=r"args describe an unsupported grid.*one must be a multiple"):
            open_checkpoint(stored("torch", "qwen3_moe", **self.SIZES))

    def test_layers_that_do_not_divide(self, stored: Any) -> None:
        path = stored("torch", grid=Parallelism(1, 2), sidecar=False, num_layers=5)
        with pytest.raises(InputError, match="the stored grid does not fit the model: 5 layers do not divide"):
            open_checkpoint(path)


def test_yarn_of_other_numbers_is_another_model() -> None:
    config = LLAMA.parse({"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1})
    rope = replace(config.layers[0].rope, kind="yarn", factor=4.0, mscale=0.7, mscale_all_dim=0.7)
    config = replace(config, layers=(replace(config.layers[0], rope=rope),))
    yarn = {"position_embedding_type": "yarn", "rotary_scaling_factor": 4, "mscale": 0.7, "mscale_all_dim": 0.7}
    assert contradictions(yarn, config) == []
    assert [one.name for one in contradictions({**yarn, "mscale": 1.0}, config)] == ["mscale"]
    assert [one.name for one in contradictions({"position_embedding_type": "none"}, config)] == [
        "position_embedding_type"
    ]
