"""The commands of README and docs: each is one that exists, and those of the guides run as written, at smoke scale."""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from focal import FocalError
from focal.ablation import ablation_rows, choose_rows
from focal.cli import main
from focal.envs import get_family
from focal.reproduce import find_items

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDER = re.compile(r"\b(SRC|DIR|PATH|FILE|URL|RUN|NAME|FAMILY|LICENCE|COMMAND)\b|[|<]|\.\.\.")


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the page's indented blocks; a backslash joins lines, # ends one."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^    ((?:focal-cli|make|python) .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def inline(page: Path) -> list[list[str]]:
    """The words of every make line and benchmark in the page's sentences, which may go on in the next line."""
    return [shlex.split(line) for line in re.findall(r"`((?:make |python benchmarks/)[^`]*)`", page.read_text())]


README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
ALL = [
    list(words)
    for words in dict.fromkeys(tuple(words) for page in PAGES for words in (*commands(page), *inline(page)))
    if not PLACEHOLDER.search(" ".join(words))
]
CHECKED = [words for words in ALL if words[0] != "python" or words[1].startswith("benchmarks/")]


def expanded(words: list[str]) -> list[list[str]]:
    """What a line would run, as commands of focal-cli and python: itself, or what its make target does."""
    if words[0] != "make":
        return [words]
    found = []
    for line in dry_run(words).splitlines():
        program, _, rest = line.removeprefix(".venv/bin/").partition(" ")
        if program in ("focal-cli", "python"):
            found.append([program, *shlex.split(rest)])
        elif program == "benchmarks/reproduce.sh":
            found += scripted(shlex.split(rest))
    return found


def dry_run(words: list[str]) -> str:
    """What `make` would do; without the reader's variables, which the Makefile would take for its own."""
    done = subprocess.run(
        ["make", "-n", *words[1:]], cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
    return done.stdout


def scripted(arguments: list[str]) -> list[list[str]]:
    """The commands of benchmarks/reproduce.sh, told that `echo` is focal-cli."""
    script = [str(ROOT / "benchmarks" / "reproduce.sh"), arguments[0], "echo", *arguments[2:]]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [["focal-cli", *shlex.split(line)] for line in done.stdout.splitlines()]


def check(words: list[str]) -> None:
    """Raise unless a line of the documents could run: its target, its variables, and all commands that it means."""
    if words[0] == "make":
        check_make(words)
    for command in expanded(words):
        if command[0] == "focal-cli":
            check_names(parsed(command))
        else:
            check_script(command)


def check_make(words: list[str]) -> None:
    """The target exists, and does something with each of its variables."""
    target, assignments = words[1], [word.partition("=")[0] for word in words[2:]]
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"no target {target}"
    printed = dry_run(["make", target, *(f"{name}=value-of-{name}" for name in assignments)])
    for name in assignments:
        assert f"value-of-{name}" in printed, f"make {target} takes no {name}"


def parsed(words: list[str]) -> click.Context:
    """A line of focal-cli as click reads it."""
    command, arguments, context = main, words[1:], None
    while isinstance(command, click.Group):
        found = command.commands.get(arguments[0])
        assert found is not None, f"no command {arguments[0]}"
        command, arguments = found, arguments[1:]
    context = command.make_context(command.name, list(arguments), parent=context)
    assert context.command is command
    return context


def check_names(context: click.Context) -> None:
    """Families, items of the paper and rows of the ablations are looked up when a command runs, not by click."""
    given = context.params
    family = get_family(given["env_name"]).name if given.get("env_name") else None
    if context.info_name == "ablate" and family and given["rows"]:
        choose_rows(ablation_rows(family, given["scale"] or "laptop"), given["rows"].split(","))
    if context.info_name == "reproduce" and given["number"]:
        for item in find_items(given["kind"], given["number"]):
            item.restricted([get_family(name).name for name in given["families"]])


class ParsedError(Exception):
    """A script has read its arguments; it shall not go on."""


def check_script(words: list[str]) -> None:
    """Run a script until it has read its arguments, with argparse or with click. A file need not be there."""
    reads = argparse.ArgumentParser.parse_args

    def stop(*_, **__):
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words[1:])
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda parser: stop(reads(parser)))
        patch.setattr(click.Path, "convert", lambda kind, value, parameter, context: Path(value))
        patch.setattr(click.Command, "invoke", stop)
        with pytest.raises(ParsedError):
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")


@pytest.mark.parametrize("words", [pytest.param(words, id=" ".join(words)[:70]) for words in CHECKED])
def test_every_command_of_the_documents_exists_with_its_options(words):
    check(words)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("make trian", "no target trian"),
        ("make tests", "no target tests"),  # a folder, which make finds up to date
        ("make compare SEED=3", "make compare takes no SEED"),
        ("make data DATA=mixed", "make data takes no DATA"),
        ("make data ENV=wlker", "wlker"),
        ("make train ENV=walker DATA=good", "good"),
        ("make ablation ENV=walker ROW=coupld", "unknown row 'coupld'"),
        ("make ablation ENV=wind ROW=next-observation", "unknown row 'next-observation'"),  # its base has it
        ("make reproduce FIGURE=12", "no figure 12 here"),
        ("make reproduce TABLE=7", "no table 7 here"),
        ("make reproduce TABLE=6 ENV=wind", "table 6 is about point, cheetah-vel"),
        ("make reproduce RESULT=walker", "unknown result 'walker'"),
        ("focal-cli ablate --env point --rows D5", "unknown row 'D5'"),
        ("focal-cli compare --env point --dta mixed", "No such option"),
        ("python benchmarks/nothing.py", "nothing.py"),
        ("python benchmarks/rivals.py --thread-count 2", "2"),  # argparse's exit status
        ("python benchmarks/stage_two.py --precisions fp23", "2"),
        ("python benchmarks/mbml_student.py runs/point-mixed-mbml --sed 0", "2"),
    ],
)
def test_a_wrong_example_is_noticed(line, found):
    kinds = (AssertionError, FocalError, click.UsageError, FileNotFoundError, SystemExit)
    with pytest.raises(kinds, match=found):
        check(shlex.split(line))


def test_the_documents_have_examples_of_every_kind():
    assert len({words[1] for words in CHECKED if words[0] == "make"}) >= 8
    assert len({words[1] for words in CHECKED if words[0] == "python"}) >= 6


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
    line = re.search(r"^\tPDOC_ALLOW_EXEC=1 \$\(BIN\)/pdoc (.*) -o site$", MAKEFILE, re.MULTILINE)[1]
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
    python = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    done = subprocess.run([sys.executable, "-c", python], cwd=guide.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
