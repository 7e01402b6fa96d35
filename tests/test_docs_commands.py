"""The commands of README and docs: each is one that exists, and those of the guides run as written, at smoke scale."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from focal.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDER = re.compile(r"\b(SRC|DIR|PATH|FILE|URL|RUN|NAME|FAMILY|LICENCE|COMMAND)\b|[|<]|\.\.\.")


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the page's indented blocks; a backslash joins lines, # ends one."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^    ((?:focal-cli|make|python) .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


ALL = [(page, words) for page in PAGES for words in commands(page) if not PLACEHOLDER.search(" ".join(words))]


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=" ".join(words)[:70]) for _, words in ALL if words[0] == "focal-cli"]
)
def test_every_command_of_the_documents_exists_with_its_options(words):
    command, arguments, context = main, words[1:], None
    while isinstance(command, click.Group):
        found = command.commands.get(arguments[0])
        assert found is not None, f"no command {arguments[0]}"
        command, arguments = found, arguments[1:]
    context = command.make_context(command.name, list(arguments), parent=context)
    assert context.command is command


def test_every_make_target_of_the_documents_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = {words[1] for _, words in ALL if words[0] == "make"} | set(re.findall(r"`make ([a-z-]+)", README))
    assert len(targets) >= 4
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


README = (ROOT / "README.md").read_text()


class Guide:
    """Runs a page's commands one after the other in a folder and a home of their own."""

    def __init__(self, folder: Path):
        self.folder, self.home = folder, folder / "home"
        (self.home / ".ssh").mkdir(parents=True)
        (folder / "docs").symlink_to(ROOT / "docs")
        self.environment = os.environ | {"HOME": str(self.home), "OMP_NUM_THREADS": "1"}

    def run(self, words: list[str]) -> str:
        """Run one command and return what it printed."""
        program = [sys.executable, "-m", "focal.cli"] if words[0] == "focal-cli" else [sys.executable]
        done = subprocess.run(
            [*program, *(os.path.expanduser(word.replace("~", str(self.home))) for word in words[1:])],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout


def smaller(words: list[str]) -> list[str]:
    """The same command at smoke scale: fewer seeds, and mixed data, since smoke's agents never become experts."""
    makes = next((word for word in words[1:] if word in ("generate", "train", "compare", "ablate", "reproduce")), None)
    words = [word.replace("-laptop-", "-smoke-") for word in words]
    if makes is None or (makes == "reproduce" and len(words) < 4):
        return words
    options = {"--scale": "smoke"} | ({"--seeds": "1"} if "--seeds" in words else {})
    if makes in ("train", "compare"):
        options["--data"] = "mixed"
    for name, value in options.items():
        if name in words:
            words[words.index(name) + 1] = value
        else:
            words += [name, value]
    return words


def expanded(words: list[str]) -> list[list[str]]:
    """What a make target would run, as focal-cli commands."""
    if words[0] != "make":
        return [words]
    lines = subprocess.run(
        ["make", "-n", "-C", str(ROOT), *words[1:]], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = [shlex.split(line.partition("focal-cli ")[2]) for line in lines if "bin/focal-cli " in line]
    return [["focal-cli", *rest] for rest in found]


@pytest.fixture
def guide(tmp_path):
    return Guide(tmp_path)


@pytest.mark.slow
def test_the_tutorial_runs_as_written(guide):
    for words in commands(ROOT / "docs" / "tutorial.md"):
        guide.run(words)
    assert (guide.folder / "report.html").stat().st_size > 4 * 2**20
    assert (guide.folder / "behaviour.png").exists()
    assert (guide.folder / "reproduced" / "figure_8.svg").exists()


@pytest.mark.slow
def test_the_api_reference_builds_without_a_warning(tmp_path):
    line = re.search(
        r"^\tPDOC_ALLOW_EXEC=1 \$\(BIN\)/pdoc (.*) -o site$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )[1]
    parts = re.fullmatch(r"focal \$\(foreach p,(.*),focal\.\$\(p\)\) '(!focal\.tests)'", line)
    modules = ["focal", *(f"focal.{part}" for part in parts[1].split()), parts[2]]
    done = subprocess.run(
        [sys.executable, "-m", "pdoc", *modules, "-o", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PDOC_ALLOW_EXEC": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for part in parts[1].split():
        assert (tmp_path / "focal" / f"{part}.html").stat().st_size > 10_000


@pytest.mark.slow
def test_the_examples_of_the_extension_guide_run(guide):
    guide.run(["focal-cli", "data", "generate", "--env", "point", "--scale", "smoke"])
    listed = ""
    for words in commands(ROOT / "docs" / "extending.md"):
        listed += guide.run(smaller(words))
    assert "rotated-point-robot" in listed
    assert (guide.folder / "stores" / "rotated-point-robot" / "dataset.json").exists()


@pytest.mark.slow
def test_the_readme_runs_from_top_to_bottom(guide):
    """All but the quickstart, which is the tutorial's way at laptop scale."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", guide.home / ".ssh" / "id_ed25519"], check=True
    )
    key = (guide.home / ".ssh" / "id_ed25519.pub").read_text().split()
    trusted = guide.home / ".config" / "focal" / "allowed_signers"
    trusted.parent.mkdir(parents=True)
    trusted.write_text(f'ada@example.org namespaces="focal-bundle" {key[0]} {key[1]}\n')
    for words in commands(ROOT / "README.md"):
        if words[:2] != ["make", "quickstart"]:
            for command in expanded(words):
                guide.run(smaller(command))
    python = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1].replace('quality="expert"', 'quality="mixed"')
    done = subprocess.run([sys.executable, "-c", python], cwd=guide.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
