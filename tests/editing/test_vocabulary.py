"""Another vocabulary: rows of tokens that stay are copies, old logits stay, and new rows are what was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptkit import Parallelism, convert
from ckptkit.cli.choices import NEW_ROWS
from ckptkit.conversion.options import Options
from ckptkit.editing.commands import Output, resize_vocabulary
from ckptkit.editing.vocabulary import KINDS
from ckptkit.errors import InputError, UnsupportedError, UsageError
from tests.editing.models import tensors_of
from tests.models import files_of, save_llama, save_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write_tokenizer(folder: Path, tokens: dict[str, int], added: dict[str, int] | None = None) -> Path:
    """A tokenizer of whole words, with single letters as the smallest pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="?", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if added:
        content = json.loads((folder / "tokenizer.json").read_text())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"] = [
            {"id": number, "content": token, **flags, "special": True} for token, number in added.items()
        ]
        (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"made": folder.name}))
    return folder


OLD = {"?": 0, "a": 1, "b": 2, "ab": 3, "c": 4}
NEW = {"?": 0, "c": 1, "b": 2, "a": 3, "cab": 4, "ab": 5, "d": 6}


GENERATION = {"eos_token_id": [4, 3], "pad_token_id": 9, "top_k": 5, "suppress_tokens": [2], "bad_words_ids": []}


def model_with_tokenizer(folder: Path, kind: str = "gqa", **changes: Any) -> Path:
    base = save_llama(folder, kind, vocab_size=10, bos_token_id=1, eos_token_id=4, **changes)
    write_tokenizer(folder, OLD)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return base


@pytest.mark.parametrize("kind", ["gqa", "tied"])
def test_tokens_keep_their_logits(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    base = model_with_tokenizer(tmp_path / "base", kind)
    new = write_tokenizer(tmp_path / "new", NEW)
    result = resize_vocabulary(base, Output(tmp_path / "out"), tokenizer=new, new_rows="pieces")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for name in {EMBEDDING, HEAD} & before.keys():
        old, found = before[name], after[name]
        assert found.shape == (7, 96)
        for token in OLD.keys() & NEW.keys():
            assert torch.equal(found[NEW[token]], old[OLD[token]])
        assert torch.allclose(found[4], (old[4] + old[3]) / 2)  # cab: c, ab
        assert torch.allclose(found[6], old[0])  # d: ?
    with torch.no_grad():
        one = AutoModelForCausalLM.from_pretrained(base)(torch.tensor([[1, 2, 4, 3]])).logits[..., [0, 1, 2, 3, 4]]
        two = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.tensor([[3, 2, 1, 5]])).logits
    assert torch.allclose(two[..., [0, 3, 2, 5, 1]], one, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (7, 3, 1)
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"eos_token_id": [1, 5], "top_k": 5, "bad_words_ids": []}
    assert any("suppress_tokens names ids of the old tokenizer" in note for note in result.notes)
    assert any("pad_token_id 9 (no token)" in note for note in result.notes)
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"made": "new"}
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (new / "tokenizer.json").read_bytes()


def test_rows_that_no_token_has(tmp_path: Path) -> None:
    """Rows of ids that neither tokenizer knows stay where they are; --size adds some, added tokens count."""
    base = model_with_tokenizer(tmp_path / "base")
    new = write_tokenizer(tmp_path / "new", NEW, {"<end>": 8})
    resize_vocabulary(base, Output(tmp_path / "out"), tokenizer=new, size=12)
    old, found = tensors_of(base)[EMBEDDING], tensors_of(tmp_path / "out")[EMBEDDING]
    assert found.shape == (12, 96)
    assert torch.equal(found[7], old[7])
    assert torch.equal(found[9], old[9])
    mean = old.double().mean(dim=0)
    for row in (8, 10, 11):
        assert torch.allclose(found[row].double(), mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["mean", "zeros", "normal"])
def test_more_and_fewer_rows(tmp_path: Path, kind: str) -> None:
    base = save_llama(tmp_path / "base", dtype="bfloat16")
    options = Options(grid=Parallelism(2))
    resize_vocabulary(base, Output(tmp_path / "more", "torch", options), size=300, new_rows=kind, seed=1)
    convert(tmp_path / "more", tmp_path / "back", to="hf")
    resize_vocabulary(base, Output(tmp_path / "hf"), size=300, new_rows=kind, seed=1, threads=1)
    before, found = tensors_of(base), tensors_of(tmp_path / "hf")
    for name in (EMBEDDING, HEAD):
        assert torch.equal(tensors_of(tmp_path / "back")[name], found[name])
        old, new = before[name], found[name]
        assert torch.equal(new[:250], old)
        rows = new[250:].double()
        if kind == "zeros":
            assert not rows.any()
        elif kind == "mean":
            assert torch.equal(rows, old.double().mean(dim=0).bfloat16().double().expand(50, -1))
        else:
            scale = old.double().std(dim=0)
            assert torch.allclose(rows.std(dim=0), scale, rtol=0.6)
            assert len(rows.unique(dim=0)) == 50
    assert not torch.equal(found[EMBEDDING][250:], found[HEAD][250:]) or kind == "zeros"
    resize_vocabulary(base, Output(tmp_path / "fewer"), size=100)
    assert torch.equal(tensors_of(tmp_path / "fewer")[HEAD], before[HEAD][:100])


def test_per_layer_embeddings_and_value_heads(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "gemma4_text-e2b")
    resize_vocabulary(base, Output(tmp_path / "out"), size=200)
    before, found = tensors_of(base), tensors_of(tmp_path / "out")
    name = "model.embed_tokens_per_layer.weight"
    assert torch.equal(found[name], before[name][:200])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["vocab_size"], config["vocab_size_per_layer_input"]) == (200, 200)
    llama = save_llama(tmp_path / "llama")
    convert(llama, tmp_path / "value", to="hf", head="value")
    resize_vocabulary(tmp_path / "value", Output(tmp_path / "small"), size=200)
    assert tensors_of(tmp_path / "small")["score.weight"].shape == (1, 96)


def test_what_cannot_be_done(tmp_path: Path) -> None:
    assert NEW_ROWS == KINDS
    bare, base = save_llama(tmp_path / "bare"), model_with_tokenizer(tmp_path / "base")
    new, empty = write_tokenizer(tmp_path / "new", NEW), tmp_path / "empty"
    empty.mkdir()
    (empty / "tokenizer.json").write_text("{}")
    small = save_llama(tmp_path / "small", vocab_size=3)
    write_tokenizer(small, OLD)
    before = files_of(base)
    for model, options, error, match in (
        (base, {}, UsageError, "--tokenizer or --size"),
        (base, {"size": 20, "new_rows": "pieces"}, UsageError, "add --tokenizer"),
        (base, {"size": 20, "new_rows": "ones"}, UsageError, "--new-rows ones"),
        (base, {"size": 10**11}, UsageError, "1 to 16,777,216"),
        (base, {"size": 0}, UsageError, "--size 0"),
        (base, {"tokenizer": new, "size": 3}, UsageError, "the tokens need 7 rows"),
        (bare, {"tokenizer": new}, UnsupportedError, r"no tokenizer.json"),
        (base, {"tokenizer": tmp_path / "nowhere"}, InputError, "nowhere"),
        (base, {"tokenizer": empty}, InputError, "no tokens in it"),
        (small, {"tokenizer": new}, InputError, "has the id 4, and the model has 3 rows"),
    ):
        with pytest.raises(error, match=match):
            resize_vocabulary(model, Output(tmp_path / "out"), **options)
        assert not (tmp_path / "out").exists()
    assert files_of(base) == before


def test_ids_inside_of_towers(tmp_path: Path) -> None:
    """A tower may have ids of its own: where they could be ids of tokens that move, nothing is guessed."""
    base, new = model_with_tokenizer(tmp_path / "base"), write_tokenizer(tmp_path / "new", NEW)
    raw = json.loads((base / "config.json").read_text())
    raw |= {"text_config": {"pad_token_id": 4}, "vision_config": {"deep": {"image_token_id": 2}, "start_token_id": 77}}
    (base / "config.json").write_text(json.dumps(raw))
    resize_vocabulary(base, Output(tmp_path / "out"), tokenizer=new)
    found = json.loads((tmp_path / "out/config.json").read_text())
    assert (found["text_config"], found["vision_config"]) == ({"pad_token_id": 1}, raw["vision_config"])
    raw["vision_config"]["deep"]["image_token_id"] = 4
    (base / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedError, match=r"vision_config: deep: image_token_id 4 \(c\) moves"):
        resize_vocabulary(base, Output(tmp_path / "no"), tokenizer=new)
