"""What decides how stored bytes are cut: read with the field that defines it, and outranked by nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from ckptkit import Parallelism, convert, open_checkpoint
from ckptkit.errors import InputError, UnsupportedError, UsageError
from ckptkit.inspection.differences import diff
from ckptkit.megatron_args.known import read_args
from ckptkit.megatron_args.unread import LAYOUTS, SHARD_LAYOUTS
from ckptkit.sharding.grid import StatedGrid
from ckptkit.tables.model_config import LayerConfig, ModelConfig, is_layout
from tests.checkpoints.args_files import code_of, set_args
from tests.models import save_llama, save_model

Stored = Callable[..., Path]
Models = Callable[[str], Path]


def tensors_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def same(one: Path, other: Path) -> bool:
    left, right = tensors_of(one), tensors_of(other)
    return left.keys() == right.keys() and all(tensor.equal(right[name]) for name, tensor in left.items())


def embedding(folder: Path, name: str = "embedding.word_embeddings.weight") -> Any:
    """The rows of an embedding over all tensor parallel ranks."""
    import torch

    files = sorted(folder.glob("release/mp_rank_*/model_optim_rng.pt"))
    chunks = [torch.load(file, weights_only=False)["model"] for file in files]
    return torch.cat([chunk[name] for chunk in chunks if name in chunk])


def with_padding(folder: Path, rows: int) -> None:
    """Gives the padding below `rows` of embedding and head values, as training does."""
    import torch

    generator, at = torch.Generator().manual_seed(1), 0
    for file in sorted(folder.glob("release/mp_rank_*/model_optim_rng.pt")):
        content = torch.load(file, weights_only=False)
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            tensor = content["model"][name]
            first = max(rows - at, 0)
            tensor[first:] = torch.rand(tensor[first:].shape, generator=generator)
        at += tensor.shape[0]
        torch.save(content, file)


class TestVocabulary:
    """250 tokens in 256 rows; what `vocab_size` counts depends on the tokenizer and its release."""

    @pytest.mark.parametrize("to", ["torch", "torch_dist"])
    @pytest.mark.parametrize(
        ("args", "tokens"),
        [
            ({"tokenizer_type": "NullTokenizer", "vocab_size": 249}, 250),
            ({"tokenizer_type": "NullTokenizer", "vocab_size": 250}, 251),
            ({"tokenizer_type": "NullTokenizer", "vocab_size": 250, "null_tokenizer_eod_id": None}, 250),
            ({"tokenizer_type": "NullTokenizer", "vocab_size": 250, "null_tokenizer_eod_id": 0}, 250),
            ({"tokenizer_type": "NullMultimodalTokenizer", "vocab_size": 249, "null_tokenizer_eod_id": None}, 250),
            ({"tokenizer_type": "TikTokenizer", "vocab_size": 250}, 250),
            ({"tokenizer_type": "HuggingFaceTokenizer", "vocab_size": 200}, 256),
            ({"tokenizer_type": "Llama2Tokenizer", "vocab_size": 250}, 256),
            ({"tokenizer_type": "HuggingFaceTokenizer", "vocab_size": None}, 256),
            ({"tokenizer_type": None, "vocab_size": 250}, 250),
        ],
        ids=str,
    )
    def test_args_alone(self, stored: Stored, models: Models, to: str, args: dict[str, Any], tokens: int) -> None:
        opened = open_checkpoint(stored(to, sidecar=False, **args))
        assert opened.config.vocab_size == tokens
        assert opened.tensors["embedding.word_embeddings.weight"].shape[0] == tokens
        assert any("vocabulary size is unknown" in note for note in opened.notes) == (tokens == 256)
        assert any("adds one" in note for note in opened.notes) == (tokens != args["vocab_size"] and tokens != 256)

    def test_no_trained_row_is_lost(self, stored: Stored, tmp_path: Path) -> None:
        """To other ranks and to Hugging Face; the last token's row is the one that went missing."""
        path = stored("torch", grid=Parallelism(2), sidecar=False, vocab_size=249, tokenizer_type="NullTokenizer")
        convert(path, tmp_path / "four", to="torch", grid=Parallelism(4), make_vocab_size_divisible_by=64)
        convert(path, tmp_path / "hf", to="hf")
        rows = embedding(path)
        assert rows[249].abs().sum() > 0
        assert embedding(tmp_path / "four")[:250].equal(rows[:250])
        assert tensors_of(tmp_path / "hf")["model.embed_tokens.weight"].equal(rows[:250])

    def test_a_reference_with_a_token_less(self, stored: Stored, models: Models) -> None:
        path = stored("torch", sidecar=False, tokenizer_type="NullTokenizer")
        with pytest.raises(InputError, match=r"to which NullTokenizer adds one: 251 tokens, .* weights would be lost"):
            open_checkpoint(path, hf_reference=models("gqa"))
        assert open_checkpoint(path, hf_reference=models("gqa"), vocab_size=250).config.vocab_size == 250
        path = set_args(path, tokenizer_type="HuggingFaceTokenizer", vocab_size=251)
        with pytest.raises(InputError, match="weights would be lost"):
            open_checkpoint(path, hf_reference=models("gqa"))

    @pytest.mark.parametrize("tp", [1, 2])
    def test_padding_that_holds_data_stays_where_there_is_room(self, stored: Stored, tmp_path: Path, tp: int) -> None:
        path = stored("torch", grid=Parallelism(tp), sidecar=False)
        with_padding(path, 250)
        before = embedding(path)
        assert before[250:].abs().sum() > 0
        options: dict[str, Any] = {"to": "torch", "grid": Parallelism(4)}
        same_size = convert(path, tmp_path / "same", make_vocab_size_divisible_by=64, **options)
        larger = convert(path, tmp_path / "larger", **options)
        smaller = convert(path, tmp_path / "smaller", make_vocab_size_divisible_by=63, **options)
        assert not same_size.dropped and embedding(tmp_path / "same").equal(before)
        assert not larger.dropped and embedding(tmp_path / "larger").shape[0] == 512
        assert embedding(tmp_path / "larger")[:256].equal(before)
        assert embedding(tmp_path / "larger")[256:].abs().sum() == 0
        assert embedding(tmp_path / "smaller").equal(before[:252])
        (record,) = smaller.dropped
        assert (record["what"], record["parts"], record["elements"]) == ("rows of vocabulary padding", 2, 2 * 4 * 96)
        assert record["max_abs_difference"] > 0.9
        (record,) = convert(path, tmp_path / "hf", to="hf").dropped
        assert record["elements"] == 2 * 6 * 96 and record["max_abs_difference"] > 0.9

    def test_padding_stays_under_a_cast_and_in_one_file(self, stored: Stored, tmp_path: Path) -> None:
        import torch

        path = stored("torch", sidecar=False)
        with_padding(path, 250)
        convert(path, tmp_path / "cast", to="torch", dtype="bfloat16")
        assert embedding(tmp_path / "cast").equal(embedding(path).to(torch.bfloat16))
        convert(path, tmp_path / "dist", to="torch_dist")
        convert(tmp_path / "dist", tmp_path / "back", to="torch")
        assert embedding(tmp_path / "back").equal(embedding(path))

    def test_padding_of_zeros_is_no_news(self, stored: Stored, tmp_path: Path) -> None:
        assert not convert(stored("torch"), tmp_path / "hf", to="hf").dropped


class TestCompanions:
    """A field that means something else by another, or by being absent."""

    @pytest.mark.parametrize("sidecar", [True, False])
    @pytest.mark.parametrize(
        ("kind", "changes"),
        [
            ("gqa", {"group_query_attention": ...}),
            ("gqa", {"group_query_attention": None}),
            ("gqa", {"kv_channels": None}),
            ("gqa", {"expert_tensor_parallel_size": None}),
            ("gqa", {"untie_embeddings_and_output_weights": None}),
            ("gqa", {"swiglu": None, "add_bias_linear": None, "add_qkv_bias": None}),
            ("gqa", {"window_attn_skip_freq": 4, "window_size": None}),
            ("gqa", {"rope_scaling_factor": 32.0, "use_rope_scaling": False}),
            ("gqa", {"moe_layer_freq": [0, 1, 0, 1], "moe_ffn_hidden_size": 7, "num_experts": None}),
            ("qwen3_moe", {"group_query_attention": ...}),
            ("mixtral", {"moe_ffn_hidden_size": None}),
        ],
        ids=str,
    )
    def test_is_the_same_model(
        self, models: Models, stored: Stored, kind: str, changes: dict[str, Any], sidecar: bool
    ) -> None:
        path = stored("torch", kind, sidecar=sidecar, **changes)
        opened = open_checkpoint(path)
        assert not opened.disagreements
        assert diff(models(kind), path).same
        assert not [n for n in open_checkpoint(path, hf_reference=models(kind)).notes if "outranks" in n]

    def test_groups_without_the_flag_that_turns_them_on(self, stored: Stored, tmp_path: Path) -> None:
        """Without it, Megatron-LM has as many groups as heads, whatever `num_query_groups` says."""
        source = save_llama(tmp_path / "hf", "gqa", num_key_value_heads=12)
        convert(source, tmp_path / "meg", to="torch")
        shutil.rmtree(tmp_path / "meg" / "ckptkit")
        path = set_args(tmp_path / "meg", group_query_attention=False, num_query_groups=1)
        assert diff(source, path).same
        path = set_args(path, group_query_attention=True)
        with pytest.raises(InputError):
            open_checkpoint(path)

    def test_widths_that_are_not_recorded(self, tmp_path: Path) -> None:
        """Megatron-LM makes a gated MLP smaller by a third, in steps of 64."""
        source = save_llama(tmp_path / "hf", "gqa", intermediate_size=256)
        convert(source, tmp_path / "meg", to="torch")
        shutil.rmtree(tmp_path / "meg" / "ckptkit")
        path = set_args(tmp_path / "meg", ffn_hidden_size=None)
        assert open_checkpoint(path).config.layers[0].ffn_hidden_size == 256
        assert diff(source, path).same
        source = save_llama(tmp_path / "other", "gqa", intermediate_size=144)
        assert "outranks" not in str(open_checkpoint(stored_without_width(source, tmp_path), hf_reference=source).notes)

    def test_flags_that_are_none_are_not_recorded(self) -> None:
        args = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
        flags = {"swiglu": None, "bf16": None, "account_for_loss_in_pipeline_split": None, "qk_layernorm": None}
        assert read_args({**args, **flags, "kv_channels": None}) == {**args, "kv_channels": None}


def stored_without_width(source: Path, folder: Path) -> Path:
    convert(source, folder / "no-width", to="torch")
    shutil.rmtree(folder / "no-width" / "ckptkit")
    return set_args(folder / "no-width", ffn_hidden_size=None)


WRONG: dict[str, dict[str, Any]] = {
    "heads, groups and head_dim": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16},
    "heads and head_dim": {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 4},
    "width of the MLP": {"intermediate_size": 72},
    "width of the model": {"hidden_size": 48, "head_dim": 8},
    "layers": {"num_hidden_layers": 3},
}
"""Changes of a reference of the Llama with 12 heads in 4 groups of width 8; in the first two, all shapes fit."""


def reference(folder: Path, source: Path, **changes: Any) -> Path:
    folder.mkdir()
    raw = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
    return folder


class TestReferences:
    @pytest.mark.parametrize("to", ["torch", "torch_dist", "packed"])
    @pytest.mark.parametrize("case", WRONG)
    def test_contradicts_the_layout(
        self, stored: Stored, models: Models, tmp_path: Path, to: str, case: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, wrong = stored(to, sidecar=False), reference(tmp_path / "wrong", models("gqa"), **WRONG[case])
        code, error = code_of("convert", path, tmp_path / "out", "--to", "hf", "--hf-reference", wrong, capsys=capsys)
        assert code == 3 and "the reference contradicts how the weights are stored: args say" in error
        assert not (tmp_path / "out").exists()
        if "num_attention_heads" in WRONG[case]:
            for ours, value in (("num_heads", 12), ("num_kv_heads", 4), ("head_dim", 8)):
                assert f"args say {ours} {value}, config.json says" in error

    @pytest.mark.parametrize(
        "changes",
        [
            {"num_experts": 2, "num_local_experts": 2},
            {"mlp_only_layers": [1]},
            {"moe_intermediate_size": 12},
            {"decoder_sparse_step": 2},
        ],
        ids=str,
    )
    def test_contradicts_the_experts(
        self, stored: Stored, models: Models, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        path = stored("torch_dist", "qwen3_moe", sidecar=False)
        with pytest.raises(InputError, match="contradicts how the weights are stored"):
            open_checkpoint(path, hf_reference=reference(tmp_path / "wrong", models("qwen3_moe"), **changes))

    @pytest.mark.parametrize(
        "changes",
        [{"rms_norm_eps": 1e-3}, {"rope_theta": 5000.0}, {"max_position_embeddings": 99}],
        ids=str,
    )
    def test_outranks_what_cuts_nothing(
        self, stored: Stored, models: Models, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        raw = json.loads((models("gqa") / "config.json").read_text())
        if "rope_theta" in changes and "rope_parameters" in raw:
            changes = {"rope_parameters": {**raw["rope_parameters"], **changes}}
        path = stored("torch", sidecar=False)
        other = reference(tmp_path / "other", models("gqa"), **changes)
        assert any(
            "the reference outranks the checkpoint's args" in n for n in open_checkpoint(path, hf_reference=other).notes
        )
        convert(path, tmp_path / "out", to="hf", hf_reference=other)
        assert same(tmp_path / "out", models("gqa"))

    def test_contradicts_a_run_config(self, models: Models, stored: Stored, tmp_path: Path) -> None:
        path = stored("torch_dist", sidecar=False)
        (path / "release" / "common.pt").unlink()
        wrong = reference(tmp_path / "wrong", models("gqa"), **WRONG["heads and head_dim"])
        with pytest.raises(InputError, match="contradicts how the weights are stored: args say num_heads 12"):
            open_checkpoint(path, hf_reference=wrong)

    def test_contradicts_a_run_config_that_it_may_outrank(self, tmp_path: Path) -> None:
        """What `args` cannot express is up to the reference; how bytes are cut is not."""
        types = [*["sliding_attention"] * 5, "full_attention"]
        source = save_model(tmp_path / "hf", "gemma3_text", num_hidden_layers=6, layer_types=types)
        convert(source, tmp_path / "meg", to="torch_dist")
        shutil.rmtree(tmp_path / "meg" / "ckptkit")
        (tmp_path / "meg" / "release" / "common.pt").unlink()
        file = tmp_path / "meg" / "release" / "run_config.yaml"
        content = yaml.safe_load(file.read_text())
        content["model"]["rotary_base"] = [5000, 1000000]
        file.write_text(yaml.safe_dump(content))
        assert any(
            "outranks run_config.yaml" in n for n in open_checkpoint(tmp_path / "meg", hf_reference=source).notes
        )
        raw = json.loads((source / "config.json").read_text())
        heads, groups, width = (raw[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        fits = {"num_attention_heads": heads // 2, "num_key_value_heads": groups // 2, "head_dim": width * 2}
        with pytest.raises(InputError, match="contradicts how the weights are stored"):
            open_checkpoint(tmp_path / "meg", hf_reference=reference(tmp_path / "wrong", source, **fits))

    def test_contradicts_the_sidecar_of_ranks_without_args(
        self, models: Models, stored: Stored, tmp_path: Path
    ) -> None:
        import torch

        path = stored("torch")
        for file in path.glob("release/mp_rank_*/*.pt"):
            content = torch.load(file, weights_only=False)
            del content["args"]
            torch.save(content, file)
        wrong = reference(tmp_path / "wrong", models("gqa"), **WRONG["heads and head_dim"])
        with pytest.raises(
            InputError, match=r"the checkpoint's own config.json says num_heads 12, config.json says 24"
        ):
            open_checkpoint(path, hf_reference=wrong)
        assert open_checkpoint(path, hf_reference=models("gqa")).config.layers[0].num_heads == 12

    def test_a_sidecar_that_contradicts_args(self, stored: Stored, tmp_path: Path) -> None:
        path = stored("torch")
        config = path / "ckptkit" / "hf" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **WRONG["heads and head_dim"]}))
        with pytest.raises(InputError, match=r"contradicts itself: args say num_heads 12, config\.json says 24"):
            convert(path, tmp_path / "out", to="hf")

    def test_layers_are_all_compared(self, models: Models, stored: Stored, tmp_path: Path) -> None:
        """The first layer differs in its window alone, and a later one in what cuts its bytes."""
        from dataclasses import replace

        from ckptkit.checkpoints.config_fields import differing_fields

        left = open_checkpoint(models("gqa")).config
        layers = list(left.layers)
        layers[0], layers[2] = replace(layers[0], window=7), replace(layers[2], num_heads=6, window=7)
        found = differing_fields(left, replace(left, layers=tuple(layers)))
        assert [(field.name, field.layer, field.is_layout) for field in found] == [
            ("window", 0, False),
            ("num_heads", 2, True),
        ]

    def test_facts_are_marked_in_the_classes(self) -> None:
        marked = {field.name for of in (ModelConfig, LayerConfig) for field in fields(of) if is_layout(of, field.name)}
        assert marked >= {
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "gated",
            "num_experts",
            "moe",
            "layers",
            "hidden_size",
        }
        assert not marked & {"norm_eps", "rope", "max_position_embeddings", "window", "activation", "dtype", "init_std"}


class TestUnreadLayouts:
    @pytest.mark.parametrize("name", [*LAYOUTS, *SHARD_LAYOUTS])
    def test_are_refused_by_name(self, models: Models, stored: Stored, name: str) -> None:
        path = stored("torch", **{name: 1})
        for given in (None, models("gqa")):
            with pytest.raises(UnsupportedError, match=f"lay out its weights in a way that is not read: {name} 1"):
                open_checkpoint(path, hf_reference=given)
        for neutral in (None, 0, False):
            assert diff(models("gqa"), set_args(path, **{name: neutral})).same

    @pytest.mark.parametrize("name", SHARD_LAYOUTS)
    def test_whole_tensors_have_no_shards(self, models: Models, stored: Stored, name: str) -> None:
        assert diff(models("gqa"), stored("torch_dist", **{name: 1})).same

    def test_of_a_run_config(self, models: Models, stored: Stored) -> None:
        path = stored("torch_dist", sidecar=False)
        (path / "release" / "common.pt").unlink()
        file = path / "release" / "run_config.yaml"
        content = yaml.safe_load(file.read_text())
        content["model"]["mtp_num_layers"] = 1
        file.write_text(yaml.safe_dump(content))
        for given in (None, models("gqa")):
            with pytest.raises(UnsupportedError, match="mtp_num_layers 1"):
                open_checkpoint(path, hf_reference=given)


LAYOUT_GRIDS = {
    "Et|tttL": Parallelism(1, 2, pipeline_layout="Et|tttL"),
    "E||tt|ttL": Parallelism(2, 4, pipeline_layout="E||tt|ttL"),
    "Et|(t|)*2tL": Parallelism(1, 2, pipeline_layout="Et|(t|)*2tL"),
    "Ett|t||tL": Parallelism(1, 2, pipeline_layout="Ett|t||tL"),
    "Et*4|L": Parallelism(1, 2, pipeline_layout="Et*4|L"),
}


class TestPipelineLayouts:
    """Four layers."""

    @pytest.mark.parametrize("to", ["torch", "torch_dist"])
    @pytest.mark.parametrize("kind", ["gqa", "tied"])
    @pytest.mark.parametrize("layout", LAYOUT_GRIDS)
    def test_there_and_back(self, tmp_path: Path, to: str, kind: str, layout: str) -> None:
        source = save_llama(tmp_path / "hf", kind)
        convert(source, tmp_path / "meg", to=to, grid=LAYOUT_GRIDS[layout])
        shutil.rmtree(tmp_path / "meg" / "ckptkit")
        opened = open_checkpoint(tmp_path / "meg")
        assert opened.grid == LAYOUT_GRIDS[layout]
        assert opened.args["pipeline_model_parallel_layout"] == layout
        convert(tmp_path / "meg", tmp_path / "back", to="hf", hf_reference=source)
        assert same(tmp_path / "back", source)

    def test_says_what_sizes_say(self, models: Models, tmp_path: Path) -> None:
        """A split that both can express has the same files, but for `args`."""
        import torch

        convert(models("gqa"), tmp_path / "sizes", to="torch", grid=Parallelism(1, 2, first_stage_layers=1))
        convert(models("gqa"), tmp_path / "layout", to="torch", grid=LAYOUT_GRIDS["Et|tttL"])
        for file in sorted((tmp_path / "sizes").glob("release/*/*.pt")):
            left, right = (
                torch.load(path, weights_only=False)["model"]
                for path in (file, tmp_path / "layout" / file.relative_to(tmp_path / "sizes"))
            )
            assert left.keys() == right.keys()
            assert all(left[name] is None or left[name].equal(right[name]) for name in left)

    @pytest.mark.parametrize(
        "layout", [[["embedding", "decoder"], ["decoder"] * 3 + ["loss"]], "Et|ttt,L", "E,t|t*3L", "Et|(t)*3L"]
    )
    def test_however_it_is_written(self, models: Models, stored: Stored, layout: object) -> None:
        path = stored(
            "torch",
            grid=Parallelism(1, 2, first_stage_layers=1),
            decoder_first_pipeline_num_layers=None,
            pipeline_model_parallel_layout=layout,
        )
        assert diff(models("gqa"), path).same

    @pytest.mark.parametrize(
        ("layout", "problem"),
        [
            ("Ett|tt", "contradict themselves: .* the loss"),
            ("Et|tx|L", "contradict themselves: .*'x' stands for nothing"),
            ("E|tt|ttL", "contradict themselves: .* 3 stages does not divide over --pp 2"),
            ("Et|t|t|tL", "args say TP1 x PP2 x VPP2 .*, the folders make TP1 x PP2"),
            ("Et|ttL", "does not fit the model: .* has 3 layers, the model has 4"),
            ("Ett|ttL", "missing"),
            (7, "must be a pipeline layout"),
        ],
        ids=str,
    )
    def test_that_makes_no_sense(self, stored: Stored, layout: object, problem: str) -> None:
        path = stored("torch", grid=LAYOUT_GRIDS["Et|tttL"], pipeline_model_parallel_layout=layout)
        with pytest.raises(InputError, match=problem):
            open_checkpoint(path)

    def test_whole_tensors_do_not_depend_on_it(self, models: Models, stored: Stored) -> None:
        path = stored("torch_dist", pipeline_model_parallel_layout="E|tt|ttL", pipeline_model_parallel_size=2)
        assert diff(models("gqa"), path).same
        assert any("the tensors are still whole" in note for note in open_checkpoint(path).notes)

    def test_together_with_sizes(self, stored: Stored) -> None:
        path = stored("torch", grid=LAYOUT_GRIDS["Et|tttL"], decoder_first_pipeline_num_layers=1)
        with pytest.raises(InputError, match="cannot be combined with sizes"):
            open_checkpoint(path)

    def test_stated_for_ranks_without_args(self, models: Models, stored: Stored, tmp_path: Path) -> None:
        import torch

        path = stored("torch", grid=LAYOUT_GRIDS["Ett|t||tL"], sidecar=False)
        for file in path.glob("release/mp_rank_*/*.pt"):
            content = torch.load(file, weights_only=False)
            del content["args"]
            torch.save(content, file)
        stated = StatedGrid(pp=2, pipeline_layout="Ett|t||tL")
        opened = open_checkpoint(path, hf_reference=models("gqa"), stored_grid=stated)
        assert opened.grid == LAYOUT_GRIDS["Ett|t||tL"]
        convert(path, tmp_path / "back", to="hf", hf_reference=models("gqa"), stored_grid=stated)
        assert same(tmp_path / "back", models("gqa"))
        with pytest.raises(UsageError, match="--src say"):
            open_checkpoint(path, hf_reference=models("gqa"), stored_grid=StatedGrid(pp=2, pipeline_layout="Et|tttL"))

    def test_options_that_agree_with_args(self, models: Models, stored: Stored) -> None:
        path = stored("torch", grid=LAYOUT_GRIDS["Et|tttL"], sidecar=False)
        for stated in (
            StatedGrid(first_stage_layers=1, last_stage_layers=3),
            StatedGrid(pp=2, vpp=1),
            StatedGrid(pipeline_layout="Et|tttL"),
        ):
            assert open_checkpoint(path, stored_grid=stated).grid == LAYOUT_GRIDS["Et|tttL"]
        for stated, option in (
            (StatedGrid(first_stage_layers=2), "--src-first-stage-layers 2, but args say 1"),
            (StatedGrid(last_stage_layers=2), "--src-last-stage-layers 2, but args say 3"),
            (StatedGrid(pipeline_layout="Ett|ttL"), r"--src-pipeline-layout Ett\|ttL, but args say Et\|tttL"),
        ):
            with pytest.raises(UsageError, match=option):
                open_checkpoint(path, stored_grid=stated)

    def test_the_command_takes_it(self, models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ("convert", models("gqa"), tmp_path / "meg", "--to", "torch", "--pp", 2)
        code, error = code_of(*words, "--pipeline-model-parallel-layout", "Et|t", capsys=capsys)
        assert code == 2 and "a layout reads like" in error
        code, error = code_of(*words, "--pipeline-model-parallel-layout", "Et|t||ttL", capsys=capsys)
        assert not code and open_checkpoint(tmp_path / "meg").grid == Parallelism(1, 2, 2, pipeline_layout="Et|t||ttL")

    def test_becomes_the_pattern_of_a_hybrid_model(self, models: Models, tmp_path: Path) -> None:
        grid = Parallelism(1, 3, pipeline_layout="Et|tt|tL")
        convert(models("gqa"), tmp_path / "meg", to="torch", grid=grid, megatron_model="hybrid")
        opened = open_checkpoint(tmp_path / "meg")
        assert "pipeline_model_parallel_layout" not in opened.args
        assert diff(models("gqa"), tmp_path / "meg").same

    def test_is_left_out_where_it_says_nothing(self, stored: Stored) -> None:
        """Releases before 0.13 have no such argument."""
        assert "pipeline_model_parallel_layout" not in open_checkpoint(stored("torch", grid=Parallelism(1, 2))).args
