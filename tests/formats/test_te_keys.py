"""The keys of our outputs are those that Transformer Engine's modules asked for, as `fixtures/te_keys.json` records."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ckptkit.conversion.convert import convert
from ckptkit.formats.dcp.reading import open_dcp
from ckptkit.formats.torch_file.pickles import read_torch_file
from fixtures.make_te_keys import FILE, collapsed, differences
from tests.models import save_model
from tests.te.models import EXPERTS, KINDS, save

RECORDED: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
KEPT_APART = ("common_state",)
LAST_NORM = "decoder.final_layernorm._extra_state/shard_#_#"
"""With experts, Megatron-LM gives the local spec a last norm of its own, and megatron-core's `get_gpt_layer_local_spec`
gives it Transformer Engine's. A key too many loads by default, one too few does not."""
FILLED_IN = {
    "te": re.compile(r"output_layer\._extra_state"),
    "local": re.compile(r"(output_layer|decoder\.final_layernorm|.+\.linear_\w+)\._extra_state"),
}
"""States that a rank's file lacks: megatron-core's own linear layers fill them in themselves. The last norm does not,
where it is Transformer Engine's; Megatron-LM then loads everything else."""


def test_the_recorded_versions() -> None:
    assert RECORDED["versions"].keys() == {"megatron-core", "torch", "transformer-engine"}
    assert RECORDED["models"].keys() == set(KINDS)


@pytest.mark.parametrize("spec", ["te", "local"])
@pytest.mark.parametrize("kind", KINDS)
def test_keys(tmp_path: Path, kind: str, spec: str) -> None:
    recorded = RECORDED["models"][kind][spec]
    source = save(tmp_path / "hf", kind)
    convert(source, tmp_path / "dist", to="torch_dist", spec=spec)
    files = open_dcp(tmp_path / "dist" / "release")
    stored = [key for key in (*files.tensors, *files.objects) if not key.startswith(KEPT_APART)]
    more = {LAST_NORM: 1} if spec == "local" and kind in EXPERTS else {}
    assert collapsed(stored) == {**recorded["torch_dist"], **more}
    convert(source, tmp_path / "torch", to="torch", spec=spec)
    content = read_torch_file(tmp_path / "torch" / "release" / "mp_rank_00" / "model_optim_rng.pt")
    ours = collapsed([*content["model"]])
    assert ours == {key: count for key, count in recorded["torch"].items() if not FILLED_IN[spec].fullmatch(key)}


def test_keys_of_a_learnable_softmax(tmp_path: Path) -> None:
    """No model with sinks is recorded. By the sources of both it has the keys of another with experts, and these.

    `TEDotProductAttention.sharded_state_dict` of megatron-core returns nothing but with a learnable softmax, and then
    all that `DotProductAttention` of Transformer Engine has: its state and `softmax_offset`. Files of ranks have the
    state of every attention. Biases have none; norms of q and k are not there.
    """
    convert(save_model(tmp_path / "hf", "gpt_oss"), tmp_path / "dist", to="torch_dist")
    convert(tmp_path / "hf", tmp_path / "torch", to="torch")
    files = open_dcp(tmp_path / "dist" / "release")
    content = read_torch_file(tmp_path / "torch" / "release" / "mp_rank_00" / "model_optim_rng.pt")
    ours = {
        "torch_dist": collapsed([key for key in (*files.tensors, *files.objects) if not key.startswith(KEPT_APART)]),
        "torch": collapsed([*content["model"]]),
    }
    core = "self_attention.core_attention"
    more = {
        "torch_dist": {f"{core}.softmax_offset": 1, f"{core}._extra_state/shard_#_#": 4},
        "torch": {f"{core}.softmax_offset": 4},
    }
    for to, keys in ours.items():
        layers = "decoder.layers." if to == "torch_dist" else "decoder.layers.#."
        recorded = {
            key: count
            for key, count in RECORDED["models"]["qwen3_moe"]["te"][to].items()
            if not FILLED_IN["te"].fullmatch(key) and ".q_layernorm." not in key and ".k_layernorm." not in key
        }
        expected = {**recorded, **{layers + key: count for key, count in more[to].items()}}
        assert {key: count for key, count in keys.items() if not re.search(r"\.bias\d*$", key)} == expected


def test_a_key_too_many_or_too_few_is_seen() -> None:
    recorded = RECORDED["models"]
    found = copy.deepcopy(recorded)
    keys = found["qwen3"]["te"]["torch_dist"]
    keys["decoder.layers.self_attention.core_attention._extra_state/shard_#_#"] = 4
    del keys["decoder.final_layernorm._extra_state/shard_#_#"]
    lines = differences(recorded, found)
    assert [line.split(": ")[0] for line in lines] == ["qwen3 te torch_dist"] * 2
    assert differences(recorded, recorded) == []
