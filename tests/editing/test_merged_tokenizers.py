"""Merges with another tokenizer: rows of embeddings and heads are those that mergekit puts there, token by token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ckptkit import Parallelism, convert
from ckptkit.conversion.options import Options
from ckptkit.editing.commands import Output, merge
from ckptkit.errors import CkptkitError, InputError, UnsupportedError
from ckptkit.formats.tokenizer_json import tokens_in
from fixtures.make_merges import out_of
from tests.editing.models import tensors_of, tuned
from tests.editing.test_merging import MERGEKIT, mergekit
from tests.models import files_of, save_llama

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 16
LETTERS = list("abcdefgh")
VOCABULARIES = {
    "base": ([*LETTERS, "ab", "cd"], ["<s>", "</s>"]),
    "a": ([*reversed(LETTERS), "ab", "ef"], ["<s>", "</s>", "<tool>"]),
    "b": ([*LETTERS[2:], "a", "b", "gh", "ef"], ["<s>", "<pad>"]),
}
"""Model -> plain tokens in the order of their ids, and those that were added after them."""
TEMPLATES = {"base": "{{ messages[0] }} of base", "a": "{{ messages[0] }} of a", "b": "{{ messages[0] }} of a\n"}


def write_tokenizer(folder: Path, plain: list[str], added: list[str], template: str) -> None:
    """A tokenizer of pairs of bytes, as transformers saves and loads it."""
    from tokenizers import AddedToken, Tokenizer, models

    vocabulary = {token: number for number, token in enumerate(plain)}
    merges = [(token[0], token[1]) for token in plain if len(token) == 2]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models whose tokens differ; the last row of two of them has no token."""
    folder = tmp_path_factory.mktemp("models")
    base = save_llama(folder / "base", dtype="bfloat16", vocab_size=ROWS, bos_token_id=10, eos_token_id=11)
    for seed, name in enumerate(("a", "b"), 1):
        tuned(base, folder / name, seed)
    for name, (plain, added) in VOCABULARIES.items():
        write_tokenizer(folder / name, plain, added, TEMPLATES[name])
    return folder


def linear(**more: Any) -> dict[str, Any]:
    weights = {"base": 0.5, "a": 0.3, "b": 0.2}
    listed = [{"model": name, "parameters": {"weight": weight}} for name, weight in weights.items()]
    return {"merge_method": "linear", "models": listed, "base_model": "base", **more}


def ties(**more: Any) -> dict[str, Any]:
    listed = [{"model": name, "parameters": {"weight": 0.6, "density": 1.0}} for name in ("a", "b")]
    return {"merge_method": "ties", "models": listed, "base_model": "base", **more}


TOKENS = {
    "ab": {"source": "b", "force": False},
    "gh": {"source": {"kind": "zero"}},
    "<tool>": {"source": {"kind": "model_token", "model": "base", "token": "cd"}, "force": True},
    "<new>": {"source": {"kind": "model_token", "model": "a", "token_id": 3}},
}
TOKENS["ab"] = {"source": "a"}
CASES: dict[str, dict[str, Any]] = {
    "union": linear(tokenizer_source="union"),
    "union-ties": ties(tokenizer_source="union", dtype="float32"),
    "base": ties(tokenizer_source="base"),
    "other": linear(tokenizer={"source": "b"}),
    "tokens": linear(tokenizer={"source": "union", "tokens": TOKENS}, dtype="float32"),
    "padded": ties(tokenizer={"source": "a", "pad_to_multiple_of": 8}),
    "auto": linear(tokenizer_source="base", chat_template="auto"),
    "template": linear(tokenizer_source="base", chat_template="{% for one in messages %}{{ one }}{% endfor %}"),
}


def write(folder: Path, name: str, recipe: dict[str, Any]) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.slow
@pytest.mark.skipif(MERGEKIT is None, reason="mergekit-yaml is not on PATH")
def test_against_mergekit(models: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    paths = {name: write(models, name, recipe) for name, recipe in CASES.items()}
    mergekit(*paths.values())
    for name, path in paths.items():
        merge(path, Output(tmp_path / name))
        one, other = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / name, out_of(path)))
        assert one.get_vocab().keys() == other.get_vocab().keys(), name
        assert len(one) == len(other)
        assert one.chat_template == other.chat_template, name
        for token in one.get_vocab():  # its special tokens are special here, too
            special = [tokenizer.added_tokens_decoder.get(tokenizer.get_vocab()[token]) for tokenizer in (one, other)]
            assert special[0] == special[1], (name, token)
        found, expected = tensors_of(tmp_path / name), tensors_of(out_of(path))
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            mine = found[key]
            assert mine.shape == tensor.shape
            if key in (EMBEDDING, HEAD):
                ids = [(one.get_vocab()[token], other.get_vocab()[token]) for token in one.get_vocab()]
                padding = range(len(ids), len(tensor))
                assert torch.equal(mine[[left for left, _ in ids]], tensor[[right for _, right in ids]]), (name, key)
                assert torch.allclose(mine[padding].float(), tensor[padding].float(), rtol=2**-6)
            else:
                assert torch.equal(mine, tensor), (name, key)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["vocab_size"] == len(expected[EMBEDDING])


def rows(folder: Path, name: str = EMBEDDING) -> dict[str, torch.Tensor]:
    """Token -> its row."""
    table = tensors_of(folder)[name].float()
    return {token: table[number] for token, number in tokens_in(folder / "tokenizer.json").items()}


def test_a_union_of_tokens(models: Path, tmp_path: Path) -> None:
    """Each token once, those of the base model first; a model without a token has the row of the one that has it."""
    path = write(models, "union", CASES["union"] | {"dtype": "float32"})
    merge(path, Output(tmp_path / "out"))
    merge(path, Output(tmp_path / "tp2", "torch", Options(grid=Parallelism(2))))
    convert(tmp_path / "tp2", tmp_path / "back", to="hf")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    tokens = tokens_in(tmp_path / "out/tokenizer.json")
    plain, added = VOCABULARIES["base"]
    assert [token for token, _ in sorted(tokens.items(), key=lambda item: item[1])] == [
        *(*plain, *added),
        *("ef", "gh", "<tool>", "<pad>"),
    ]
    for name in (EMBEDDING, HEAD):
        found, base, a, b = (
            rows(folder, name) for folder in (tmp_path / "out", *(models / one for one in ["base", "a", "b"]))
        )
        for token in "ab", "a", "<s>":
            expected = 0.5 * base[token] + 0.3 * a[token] + 0.2 * b.get(token, base[token])
            assert torch.allclose(found[token], expected, rtol=1e-5, atol=1e-7)
        assert torch.allclose(found["<tool>"], a["<tool>"], rtol=1e-5, atol=1e-7)
        assert torch.allclose(found["</s>"], 0.7 * base["</s>"] + 0.3 * a["</s>"], rtol=1e-5, atol=1e-7)
        mean = (a["ef"].bfloat16().float() + b["ef"]) / 2
        assert torch.allclose(found["ef"], 0.5 * mean + 0.3 * a["ef"] + 0.2 * b["ef"], rtol=1e-5, atol=1e-7)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (10, 11, 16)


def test_the_tokenizer_of_another_model(models: Path, tmp_path: Path) -> None:
    """Ids of special tokens follow the base model's tokens; one without a token is left out, with a note."""
    path = write(models, "other", linear(tokenizer={"source": "b", "pad_to_multiple_of": 8}))
    result = merge(path, Output(tmp_path / "out"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    tokens = tokens_in(models / "b/tokenizer.json")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (models / "b/tokenizer.json").read_bytes()
    assert (config["bos_token_id"], config["vocab_size"]) == (tokens["<s>"], 16)
    assert "eos_token_id" not in config
    assert any("eos_token_id 11 (</s>) is not in the new tokenizer" in note for note in result.notes)
    table = tensors_of(tmp_path / "out")[EMBEDDING].float()
    assert torch.equal(table[12], table[15])
    assert torch.allclose(table[15], table[:12].mean(dim=0), rtol=0.02, atol=1e-3)


def test_chat_templates(models: Path, tmp_path: Path) -> None:
    """`auto` is the template that most models have; there is one source for it afterwards."""
    merge(write(models, "auto", linear(chat_template="auto")), Output(tmp_path / "auto"))
    assert (tmp_path / "auto/chat_template.jinja").read_text() == TEMPLATES["a"]
    assert "chat_template" not in json.loads((tmp_path / "auto/tokenizer_config.json").read_text())
    own = CASES["template"]["chat_template"]
    merge(write(models, "own", ties(chat_template=own)), Output(tmp_path / "own"))
    assert (tmp_path / "own/chat_template.jinja").read_text() == own


@pytest.mark.parametrize(
    ("recipe", "error", "match"),
    [
        (linear(tokenizer_source="elsewhere"), InputError, "elsewhere, is none of the models"),
        (linear(tokenizer_source="base", tokenizer={}), InputError, "either tokenizer_source or tokenizer"),
        (linear(tokenizer={"sauce": "base"}), UnsupportedError, r"tokenizer.sauce.*did you mean source"),
        (linear(tokenizer={"pad_to_multiple_of": 0}), InputError, "pad_to_multiple_of must be"),
        (linear(tokenizer={"tokens": {"ab": {}}}), InputError, "tokens.ab.source must be a mapping"),
        (
            linear(tokenizer={"tokens": {"ab": {"source": {"kind": "mean"}}}}),
            InputError,
            "a token of a model, or zeros",
        ),
        (linear(tokenizer={"tokens": {"ab": {"source": "a", "force": 1}}}), InputError, "force must be true"),
        (
            linear(tokenizer={"tokens": {"<x>": {"source": "a"}}}),
            InputError,
            r"tokens.<x>: a has no row for '<x>'",
        ),
        (
            linear(tokenizer={"tokens": {"<x>": {"source": {"kind": "model_token", "model": "a", "token_id": 16}}}}),
            InputError,
            "a has no row for '16'",
        ),
        (linear(tokenizer={"tokens": {"gh": {"source": "c"}}}), InputError, "gh: c is none of the models"),
        (linear(chat_template="chatml"), UnsupportedError, "a name of mergekit's"),
        (linear(chat_template="{{ x }}"), InputError, "no template of Jinja"),
        (linear(chat_template={"a": 1}), InputError, "chat_template must be"),
    ],
)
def test_what_is_refused(
    models: Path, tmp_path: Path, recipe: dict[str, Any], error: type[CkptkitError], match: str
) -> None:
    with pytest.raises(error, match=match):
        merge(write(models, "wrong", recipe), Output(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_tokenizers_without_rows(models: Path, tmp_path: Path) -> None:
    """Tokens beyond the rows of the base model are left out, as mergekit does; ids with gaps are refused."""
    folder = shutil.copytree(models, tmp_path / "models")
    path = write(folder, "base", CASES["base"])
    file = folder / "base/tokenizer.json"
    content = json.loads(file.read_text())
    settings = content["added_tokens"][0]
    file.write_text(
        json.dumps(content | {"added_tokens": [*content["added_tokens"], settings | {"id": 16, "content": "!"}]})
    )
    merge(path, Output(tmp_path / "out"))
    assert "!" not in tokens_in(tmp_path / "out/tokenizer.json")
    before = files_of(folder / "base")
    file.write_text(json.dumps(content | {"added_tokens": [settings | {"id": 14}]}))
    with pytest.raises(UnsupportedError, match="11 tokens are not numbered from 0 to 10"):
        merge(path, Output(tmp_path / "no"))
    file.unlink()
    with pytest.raises(UnsupportedError, match=r"no tokenizer.json to know the tokens by"):
        merge(path, Output(tmp_path / "no"))
    assert before
