"""The documents: their commands run, their links lead somewhere, and what they say of the code is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import ckptkit
from ckptkit import errors
from ckptkit.cli.exits import EXIT_CODES
from ckptkit.cli.output import KINDS, SIGPIPE_EXIT
from ckptkit.requirements import MOVING, packages_for
from docs_site import layouts, picture
from tests.documents import DOCS, ROOT, Command, commands_of, links, prepare, run

JOBS = sorted(f"jobs/{page.name}" for page in (DOCS / "jobs").glob("*.md"))
PAGES = [*JOBS, "which-format.md"]
DOCTOR = [command for command in commands_of("start.md") if command.line.startswith("doctor")]
EVERY = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"])
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_move_bytes_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, page)
    monkeypatch.chdir(tmp_path)
    commands = [command for command in commands_of(page) if not command.runs_models]
    assert len(commands) >= 2
    for command in commands:
        run(command)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(one.runs_models for one in commands_of(page))])
def test_commands_that_verify_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path, page)
    monkeypatch.chdir(tmp_path)
    for command in commands_of(page):
        run(command)


@pytest.mark.slow
def test_the_doctor_of_the_first_page_answers() -> None:
    assert len(DOCTOR) == 3
    for command in DOCTOR:
        run(command)


def test_a_command_that_fails_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="no such directory"):
        run(Command("inspect gone", 0))
    run(Command("inspect gone", 3))


def test_every_job_has_a_page_that_the_readme_names() -> None:
    assert len(JOBS) >= 7
    assert [page for page in JOBS if f"(docs/{page})" not in README] == []


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", EVERY, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        file = (page.parent / target).resolve() if target else page
        assert file.is_file(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page.name}: {target}#{anchor}"


def test_a_link_to_nowhere_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](gone.md) [b](#two)", encoding="utf-8")
    assert links(page) == [("gone.md", ""), ("", "two")]
    assert anchors("# Tests, and gaps\n## `diff`\n```\n# no heading\n```") == {"tests-and-gaps", "diff"}


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert pages <= listed and listed - pages == {"index.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"}


def test_the_exit_codes_are_those_of_the_code() -> None:
    page = (DOCS / "exit-codes.md").read_text(encoding="utf-8")
    documented = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", page, re.MULTILINE) for code in row.split(", ")}
    raised = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")}
    assert documented == {0, 1, *KINDS, SIGPIPE_EXIT} and raised <= documented
    assert {int(code) for code in re.findall(r"\b(\d+) [a-z]", EXIT_CODES)} == documented - {SIGPIPE_EXIT}


def test_the_messages_of_troubleshooting_are_in_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "ckptkit").rglob("*.py"))
    assert len(messages) > 20
    assert [message for message in messages if message not in sources] == []


def test_the_small_installation_has_every_small_package() -> None:
    wanted = " ".join(f"'{package.wanted}'" for package in packages_for(MOVING))
    line = f"$ pip install {wanted} && pip install --no-deps ."
    assert line in README and line in (DOCS / "start.md").read_text(encoding="utf-8")


def test_the_python_names_are_all_documented() -> None:
    page = (DOCS / "python-api.md").read_text(encoding="utf-8")
    named = {line.rsplit(".", 1)[1]: line for line in re.findall(r"^::: (.+)$", page, re.MULTILINE)}
    assert set(ckptkit.__all__) - {"__version__"} <= set(named)
    for name, path in ckptkit._HOMES.items():
        assert named[name] == f"{path}.{name}"


def test_the_drawings_are_what_the_rows_do() -> None:
    page = layouts.PAGE.read_text(encoding="utf-8")
    assert layouts.drawn(page) == page and page.count("| comes from |") == 2
    assert layouts.drawn(page.replace("| 4 | k row 0 | 0 |", "| 4 | k row 1 | 0 |")) == page


def test_the_chunks_are_those_of_a_distributed_checkpoint(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    from ckptkit import Parallelism, convert
    from fixtures.make_damaged import SOUND

    convert(SOUND / "hf", tmp_path / "dist", to="torch_dist", grid=Parallelism(tp=2))
    (iteration,) = [path.parent for path in (tmp_path / "dist").rglob(".metadata")]
    stored: Any = FileSystemReader(iteration).read_metadata().state_dict_metadata
    text = (DOCS / "concepts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(decoder[\w.]+)` \| ([\dx ]+) \| ([\d(), ]+) \|$", text, re.MULTILINE)
    assert len(rows) == 3
    for name, shape, chunks in rows:
        assert tuple(map(int, shape.split(" x "))) == tuple(stored[name].size)
        assert chunks == " ".join(str(tuple(chunk.offsets)) for chunk in sorted_chunks(stored[name].chunks))


def sorted_chunks(chunks: Any) -> list[Any]:
    """Chunks by their first element."""
    return sorted(chunks, key=lambda chunk: tuple(chunk.offsets))


def test_the_picture_is_of_these_commands() -> None:
    svg = (
        picture.PICTURE.read_text(encoding="utf-8").replace("&#160;", " ").replace("&quot;", '"').replace("&#x27;", "'")
    )
    text = re.sub(r"<[^>]+>", "", svg)
    for command in picture.COMMANDS:
        assert picture.shown([word for word in command if word != "--json"]) in text
    assert "identical" in text and "url(" not in re.sub(r"url\(#[\w-]+\)", "", svg)


def test_long_output_is_shortened_and_failures_raise(tmp_path: Path) -> None:
    lines = [str(number) for number in range(100)]
    short = picture.shortened(lines)
    assert short[: picture.HEAD] == lines[: picture.HEAD] and short[-picture.TAIL :] == lines[-picture.TAIL :]
    assert (
        f"{100 - picture.HEAD - picture.TAIL} lines" in short[picture.HEAD]
        and picture.shortened(lines[:9]) == lines[:9]
    )
    assert picture.run(["echo", "word"], tmp_path) == "word\n"
    with pytest.raises(RuntimeError, match="ended with 1"):
        picture.run(["false"], tmp_path)
    assert "word" in picture.render([("echo word", "word\n")])


def test_generated_sections_are_made_of_the_code() -> None:
    from docs_site.generated import SECTIONS

    markers = {name for page in EVERY for name in re.findall(r"<!-- generated: ([a-z-]+) -->", page.read_text("utf-8"))}
    assert markers == set(SECTIONS)
    cli = SECTIONS["cli"]()
    assert all(f"\n## ckptkit {name}\n" in cli for name in ("convert", "verify", "doctor", "surgery average"))
    assert "`--tp, --tensor-model-parallel-size N`" in cli
    supported = {one.architecture for one in ckptkit.supported_architectures()}
    assert all(f"`{name}`" in SECTIONS["families"]() for name in supported)
    assert "| `fsdp` | yes | no |" in SECTIONS["formats"]() and "| `torch` | yes | yes |" in SECTIONS["formats"]()


def test_what_the_comparison_says_is_refused_is_not_there() -> None:
    """Model in the comparison -> the beginning of its architectures."""
    refused = {
        "Llama 4": "Llama4",
        "GLM-4V": "Glm4v",
        "Kimi-VL": "KimiVL",
        "InternVL": "InternVL",
        "ERNIE 4.5": "Ernie4",
        "OLMoE": "Olmoe",
        "DeepSeek-V4": "DeepseekV4",
        "MiniMax-M2": "MiniMax",
        "Kimi-K2.5": "KimiK25",
    }
    page = (DOCS / "comparison.md").read_text(encoding="utf-8").replace("\n", " ")
    supported = [one.architecture for one in ckptkit.supported_architectures()]
    assert all(name in page for name in refused)
    assert [one for one in supported if one.startswith(tuple(refused.values()))] == []


def test_every_family_is_in_the_lists() -> None:
    """Families by the words of the README and of docs/families.md."""
    words = {
        **{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3-MoE", "qwen3_next": "Qwen3-Next"},
        **{"mistral": "Mistral", "ministral": "Ministral", "mixtral": "Mixtral", "apertus": "Apertus"},
        **{"glm4_moe": "GLM-4.5", "glm4_moe_lite": "GLM-4.5", "deepseek_v3": "DeepSeek-V3", "gpt_oss": "GPT-OSS"},
        **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), "Qwen3.5 and 3.6"),
        **dict.fromkeys(("gemma3", "gemma3_text", "gemma4", "gemma4_text"), "Gemma 3 and 4"),
        "split_llama": "",
    }
    families = {one.family for one in ckptkit.supported_architectures() if not one.family.endswith("_value")}
    assert families <= words.keys(), "add its words here, to the README and to docs/families.md"
    for text in (README, (DOCS / "families.md").read_text(encoding="utf-8")):
        assert [family for family in families if words[family] not in text] == []


def test_sources_of_the_comparison_have_commits() -> None:
    page = (DOCS / "comparison.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w.-]+/[\w.-]+) \| ([\w./]+) \| ([0-9a-f]{12}) \|$", page, re.MULTILINE)
    assert {repository.split("/")[1] for repository, _, _ in rows} == {
        "Megatron-Bridge",
        "mcore-bridge",
        "verl",
        "LoongForge",
        "mergekit",
    }
