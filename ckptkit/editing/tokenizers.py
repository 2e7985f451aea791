"""The tokenizer of a merged model: that of one of the models, or all tokens of all of them.

Source: `tokenizer/build.py` and `_set_chat_template` of mergekit 0.1.5. mergekit gives the further tokens of a union
ids in no particular order; here they follow the tokens of the base model, model by model, in the order of their ids.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckptkit.checkpoints.checkpoint import Checkpoint
from ckptkit.editing import recipes
from ckptkit.editing.inputs import Input
from ckptkit.errors import InputError, UnsupportedError
from ckptkit.formats.json_files import read_json
from ckptkit.formats.tokenizer_json import FILES, TOKENIZER, model_of, part_of, tokens_of
from ckptkit.io.regular import read_bounded

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_LARGEST_TEMPLATE = 1 << 20
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
"""Of a token that is added without settings of its own."""


@dataclass(frozen=True)
class MergedTokenizer:
    """The tokenizer of a merged model.

    Attributes:
        donor: The model that its files come from.
        tokens: Token -> id, numbered from 0 without gaps.
        owned: Model -> its own tokens, those that it has rows for.
        made: Files of the donor that are written anew: name -> content.
    """

    donor: Input
    tokens: Mapping[str, int]
    owned: Mapping[str, Mapping[str, int]]
    made: Mapping[str, bytes] = field(default_factory=dict)


def merged_tokenizer(
    wanted: recipes.Tokenizer, base: Input, inputs: Mapping[str, Input], where: object
) -> MergedTokenizer:
    """The tokenizer that a recipe asks for.

    Args:
        wanted: What the recipe says.
        base: The base model.
        inputs: All models of the recipe.
        where: The recipe, for messages.

    Raises:
        InputError: A tokenizer is damaged, or the recipe names a model that it does not have.
        UnsupportedError: A model has no tokenizer.json, or the ids leave gaps.
    """
    of_base = wanted.source in (recipes.UNION, recipes.BASE)
    if not of_base and wanted.source not in inputs:
        raise InputError(f"the source of the tokenizer, {wanted.source[:80]}, is none of the models", where=where)
    owned, settings = {}, {}
    for one in inputs.values():  # one after the other: read, a tokenizer.json takes a hundred MB
        own = read_json(_path(one))
        owned[one.name], settings[one.name] = _own_tokens(own, one), own.get("added_tokens") or []
        del own
    donor = base if of_base else inputs[wanted.source]
    path = _path(donor)
    whole = read_json(path)
    content = _without_unused(whole, owned[donor.name], path) if of_base else whole
    tokens = tokens_of(content, path)
    added = dict(_further(donor.name, settings, owned)) if wanted.source == recipes.UNION else {}
    added |= {token: _PLAIN for token in wanted.tokens if token not in added}
    number = max(tokens.values(), default=-1) + 1
    entries = list(content.get("added_tokens") or [])
    listed = {entry["content"] for entry in entries}
    for token, given in added.items():
        if token not in tokens and token:
            tokens[token] = number
            number += 1
        elif token in listed or given is _PLAIN:
            continue
        entries.append({"id": tokens[token], "content": token, **given})
    if set(tokens.values()) != set(range(len(tokens))):
        what = f"its {len(tokens):,} tokens are not numbered from 0 to {len(tokens) - 1:,}"
        raise UnsupportedError(f"{what}: no rows are left for tokens to come", where=path)
    made = {}
    if len(entries) > len(content.get("added_tokens") or []) or content is not whole:
        # Without spaces: with them, Python makes a string of every bracket of it.
        made[TOKENIZER] = json.dumps({**content, "added_tokens": entries}, ensure_ascii=False).encode()
        made |= _config(donor, entries)
    return MergedTokenizer(donor, tokens, owned, made)


def _path(one: Input) -> Path:
    found: Path | None = one.model.sidecar.small.get(TOKENIZER)
    if found is None:
        hint = "put the tokenizer's files beside its weights"
        raise UnsupportedError(f"no {TOKENIZER} to know the tokens by", where=one.name, hint=hint)
    return found


def _own_tokens(content: Mapping[str, Any], one: Input) -> dict[str, int]:
    rows = one.model.config.vocab_size
    return {token: number for token, number in tokens_of(content, _path(one)).items() if number < rows}


def _without_unused(content: dict[str, Any], owned: Mapping[str, int], path: Path) -> dict[str, Any]:
    """A tokenizer without the tokens that the model has no rows for.

    Raises:
        UnsupportedError: Pieces of other kinds than BPE cannot be left out.
    """
    unused = tokens_of(content, path).keys() - owned.keys()
    if not unused:
        return content
    model = model_of(content)
    if unused & model.get("vocab", {}).keys() and model.get("type") != "BPE":
        what = (
            f"{len(unused):,} tokens have no rows in the model, and cannot be left out of a {model.get('type')} model"
        )
        raise UnsupportedError(what[:160], where=path)

    def kept(model: Mapping[str, Any]) -> dict[str, Any]:
        merges = [(one, one.split(" ") if isinstance(one, str) else one) for one in model.get("merges") or []]
        return {
            **model,
            "vocab": {token: number for token, number in model["vocab"].items() if token not in unused},
            "merges": [one for one, pieces in merges if not unused.intersection((*pieces, "".join(pieces)))],
        }

    found = {**content, "model": part_of(kept, model, path)}
    found["added_tokens"] = [one for one in content.get("added_tokens") or [] if one["content"] not in unused]
    return found


def _further(
    base: str, listed: Mapping[str, Sequence[Mapping[str, Any]]], owned: Mapping[str, Mapping[str, int]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tokens of all models with their settings: plain ones first, then those that were added anywhere.

    Args:
        base: The model whose tokens come first.
        listed: Model -> `added_tokens` of its tokenizer.json.
        owned: Model -> its tokens.
    """
    ordered = [base, *(name for name in owned if name != base)]
    settings: dict[str, dict[str, Any]] = {}
    for name in ordered:
        for entry in listed[name]:
            if entry["content"] and entry["content"] in owned[name] and entry["content"] not in settings:
                settings[entry["content"]] = {
                    key: value for key, value in entry.items() if key not in ("id", "content")
                }
    for name in ordered:
        for token, _ in sorted(owned[name].items(), key=lambda item: item[1]):
            if token and token not in settings:
                yield token, _PLAIN
    yield from settings.items()


def _config(donor: Input, entries: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """tokenizer_config.json, if it lists the added tokens: a list that lacks some would be a second source."""
    path = donor.model.sidecar.small.get(CONFIG)
    if path is None:
        return {}
    content = read_json(path)
    if "added_tokens_decoder" not in content:
        return {}
    listed = {str(one["id"]): {key: value for key, value in one.items() if key != "id"} for one in entries}
    return {CONFIG: _as_json({**content, "added_tokens_decoder": listed})}


def _as_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def with_tokenizer(model: Checkpoint, tokenizer: MergedTokenizer) -> Checkpoint:
    """A model with the files of a tokenizer."""
    small = {name: path for name, path in model.sidecar.small.items() if name not in FILES}
    own = {
        name: path
        for name, path in tokenizer.donor.model.sidecar.small.items()
        if name in FILES and (not tokenizer.made or name not in _STALE)
    }
    return replace(model, sidecar=replace(model.sidecar, small={**small, **own}))


_STALE = ("tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt")
"""Files that say what tokenizer.json says: they do not have its new tokens."""


def chat_template(wanted: str, inputs: Sequence[Input], where: object) -> str | None:
    """The chat template that a recipe asks for: `auto` is the one that most models have, the first of those.

    Raises:
        InputError: It is neither `auto` nor a template.
        UnsupportedError: It is a name: mergekit's own templates are not part of this program.
    """
    if wanted == "auto":
        found = [template for one in inputs if (template := _template_of(one)) is not None]
        return Counter(found).most_common(1)[0][0] if found else None
    if "{" not in wanted and "\n" not in wanted:
        hint = "write the template itself, or auto"
        raise UnsupportedError(f"chat_template {wanted[:40]!r}: a name of mergekit's", where=where, hint=hint)
    if len(wanted) < 20 or "{" not in wanted:
        raise InputError("chat_template is no template of Jinja", where=where)
    return wanted


def _template_of(one: Input) -> str | None:
    small = one.model.sidecar.small
    if TEMPLATE in small:
        try:
            text: Any = read_bounded(small[TEMPLATE], _LARGEST_TEMPLATE).decode()
        except UnicodeDecodeError:
            raise InputError("not UTF-8", where=small[TEMPLATE]) from None
    else:
        text = read_json(small[CONFIG]).get("chat_template") if CONFIG in small else None
    if isinstance(text, list):  # several, each with a name
        text = {named.get("name"): named.get("template") for named in text if isinstance(named, dict)}
    if isinstance(text, dict):
        text = text.get("default")
    return text.strip() or None if isinstance(text, str) else None


def template_files(text: str, model: Checkpoint, made: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a chat template; tokenizer_config.json must not have another one."""
    files = {TEMPLATE: text.encode()}
    path = model.sidecar.small.get(CONFIG)
    if CONFIG in made or path is not None:
        content = json.loads(made[CONFIG]) if path is None or CONFIG in made else read_json(path)
        if content.pop("chat_template", None) is not None:
            files[CONFIG] = _as_json(content)
    return files
