"""`focal-cli`: parse, resolve settings, make one call, print. Heavy imports wait until a verb needs them."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from .errors import FocalError, UsageError

SCALES = ("smoke", "laptop", "paper")
QUALITIES = ("random", "medium", "expert", "mixed")


class Cli(click.Group):
    """Turns our errors into one line and an exit code: 2 for misuse, 1 for failure, a traceback only with --debug."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; see click."""
        words = list(args[0] if args and args[0] is not None else kwargs.get("args") or sys.argv[1:])
        debug = "--debug" in words
        kwargs["args"] = [word for word in words if word != "--debug"]  # wherever it stands
        try:
            return super().main(*args[1:], **kwargs)
        except Exception as error:
            if debug:
                raise
            click.echo(f"focal-cli: {explain(error)}", err=True)
            sys.exit(error.exit_code if isinstance(error, FocalError) else 1)


def explain(error: Exception) -> str:
    """Return one line for any error."""
    from .files import disk_full, is_disk_full

    if isinstance(error, FocalError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        place = Path(error.filename)
        return str(disk_full(place)) if is_disk_full(error) else f"{place}: {error.strerror or error}"
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}; that is our mistake: please report it with what --debug prints"


def stores_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --stores."""
    return click.option(
        "--stores", type=click.Path(path_type=Path), default=Path("stores"), show_default=True, envvar="FOCAL_STORES",
        help="Folder of the collections.",
    )(command)  # fmt: skip


def runs_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --runs."""
    return click.option(
        "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, envvar="FOCAL_RUNS",
        help="Folder of the runs.",
    )(command)  # fmt: skip


json_option = click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON instead of a table.")
set_option = click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="Change one setting.")


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="focal-omrl")
def main() -> None:
    """Offline meta-reinforcement learning: make datasets, train FOCAL on them, test it on unseen tasks.

    --debug, anywhere, shows tracebacks.
    """


@main.command()
@json_option
def envs(as_json: bool) -> None:
    """List the task families."""
    from .envs import FAMILIES

    rows = [
        {
            "family": family.name, "alias": family.alias, "varies": family.varies, "obs": family.obs_dim,
            "act": family.act_dim, "horizon": family.horizon,
            "tasks": "both / both" if family.fixed_tasks else f"{family.n_train} / {family.n_test}",
            "id": family.env_id, "what": family.summary,
        }
        for family in FAMILIES.values()
    ]  # fmt: skip
    _print_rows(rows, as_json)


@main.group()
def data() -> None:
    """Make, list, show, check and re-label collections."""


@data.command()
@click.option("--env", "env_name", required=True, help="Task family, see `focal-cli envs`.")
@click.option("--scale", type=click.Choice(SCALES), default="laptop", show_default=True)
@click.option("--tasks", metavar="TRAIN[/TEST]", help="Number of tasks, for example 20/5.")
@click.option("--tasks-from", type=click.Choice(["seed", "published"]), default="seed", show_default=True)
@click.option("--workers", type=click.IntRange(1), help="Processes, one task at a time each. [default: all cores]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--licence", default="CC-BY-4.0", show_default=True, help="SPDX identifier.")
@click.option("--author", "authors", multiple=True, help="May be given several times.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Collection folder. [default: STORES/FAMILY]")
@stores_option
@set_option
def generate(
    env_name: str, scale: str, tasks: str | None, tasks_from: str, workers: int | None, seed: int, licence: str,
    authors: Sequence[str], output: Path | None, stores: Path, assignments: Sequence[str],
) -> None:  # fmt: skip
    """Train a SAC agent per task and roll its checkpoints out into a collection. Run again to continue."""
    from .console import GenerateBars, print_collection
    from .datagen import GenerateRequest, generate, generate_settings
    from .envs import get_family
    from .settings import override, parse_assignments

    family = get_family(env_name)
    settings = generate_settings(family.name, scale, fixed_tasks=family.fixed_tasks is not None)
    settings = override(settings, _task_counts(tasks) | parse_assignments(assignments))
    request = GenerateRequest(
        family.name, output or stores / family.name, settings, scale, seed, tasks_from, licence, tuple(authors),
        workers or 0,
    )  # fmt: skip
    with GenerateBars(family.name) as bars:
        collection = generate(request, bars)
    print_collection(collection)


def _task_counts(tasks: str | None) -> dict[str, Any]:
    if tasks is None:
        return {}
    train, _, test = tasks.partition("/")
    if not train.isdigit() or (test and not test.isdigit()):
        raise UsageError(f"--tasks got '{tasks}', expected TRAIN or TRAIN/TEST, for example --tasks 20/5")
    return {"n_train": int(train)} | ({"n_test": int(test)} if test else {})


@data.command("list")
@stores_option
@json_option
def list_(stores: Path, as_json: bool) -> None:
    """List the collections in the stores folder."""
    from .console import collection_row
    from .datasets import find_collections, open_collection

    paths = find_collections(stores)
    if not paths and not as_json:
        raise FocalError(f"no collection in {stores}; make one with: focal-cli data generate --env point --scale smoke")
    rows = []
    for path in paths:
        try:
            rows.append(collection_row(open_collection(path)))
        except FocalError as error:  # one damaged collection must not hide the others
            click.echo(f"focal-cli: {error}", err=True)
    shown = ("path", "version", "tasks", "experts", "episodes", "transitions", "content")
    _print_rows(rows if as_json else [{name: row[name] for name in shown} for row in rows], as_json)


@data.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the returns of all episodes.")
@json_option
def show(path: Path, plot: Path | None, as_json: bool) -> None:
    """Show a collection: its card, its tasks, episodes and returns per quality, and what never learnt."""
    from .console import collection_document, print_collection
    from .datasets import open_collection

    collection = open_collection(path)
    if as_json:
        click.echo(json.dumps(collection_document(collection), indent=2))
    else:
        print_collection(collection, tasks=True)
    if plot is not None:
        from .evaluation.figures import behaviour_data

        behaviour_data(plot, collection)
        click.echo(f"saved {plot}", err=as_json)


@data.command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def verify(path: Path, as_json: bool) -> None:
    """Check every byte of a collection against what it says of itself."""
    from .datasets import verify_collection

    report = verify_collection(path)
    counts = {"files": report.files, "bytes": report.bytes, "episodes": report.episodes,
              "transitions": report.transitions}  # fmt: skip
    if as_json:
        click.echo(json.dumps({"path": str(path), "ok": True, **counts}))
    else:
        click.echo(f"{path}: good, " + ", ".join(f"{value:,} {name}" for name, value in counts.items()))


@data.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the new version.")
@set_option
def relabel(path: Path, output: Path, assignments: Sequence[str]) -> None:
    """Cut the quality levels anew, for example --set expert_from=0.8, into a new version."""
    from .console import print_collection
    from .datasets import open_collection, relabel_collection
    from .settings import override, parse_assignments

    rule = override(open_collection(path).tasks[0].rule, parse_assignments(assignments))
    print_collection(relabel_collection(path, output, rule))


@main.command()
@click.option("--env", "env_name", help="Task family; may be left out where STORES holds one collection.")
@click.option("--collection", type=click.Path(path_type=Path), help="Collection folder, instead of --env.")
@click.option("--data", "quality", type=click.Choice(QUALITIES), required=True, help="Quality to train on.")
@click.option("--algo", type=click.Choice(["focal"]), default="focal", show_default=True)
@click.option("--scale", type=click.Choice(SCALES), help="[default: the collection's own]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="First seed.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Number of seeds.")
@click.option("--workers", type=click.IntRange(1), help="Seeds trained side by side. [default: all cores]")
@click.option("--name", help="Run folder's name. [default: family, quality, algorithm and time]")
@click.option("--resume", is_flag=True, help="Continue the run NAME (started if it is not there), or the newest run.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    envvar="FOCAL_CACHE",
    help="Folder for memory-mapped copies of the data: less memory, and the next run loads faster.",
)
@stores_option
@runs_option
@set_option
def train(
    env_name: str | None, collection: Path | None, quality: str, algo: str, scale: str | None, seed: int, seeds: int,
    workers: int | None, name: str | None, resume: bool, cache: Path | None, stores: Path, runs: Path,
    assignments: Sequence[str],
) -> None:  # fmt: skip
    """Meta-train on a collection's training tasks."""
    from .console import TrainBars
    from .experiment import TrainRequest, choose_collection, train_run

    request = TrainRequest(
        collection=choose_collection(stores, env_name, collection), quality=quality, scale=scale,
        seeds=tuple(range(seed, seed + seeds)), assignments=tuple(assignments), runs=runs, name=name, resume=resume,
        workers=workers or 0, cache=cache,
    )  # fmt: skip
    with TrainBars() as bars:
        run = train_run(request, bars)
    click.echo(f"{run}: trained; test it with: focal-cli test {run}")


@main.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--data", "quality", type=click.Choice(QUALITIES), help="Quality of the context. [default: as trained]")
@click.option(
    "--protocol",
    type=click.Choice(["offline", "shift", "online"]),
    default="offline",
    show_default=True,
    help="Context from logged data; from other tasks' behaviour policies in the test task; or self-collected.",
)
@click.option("--context-size", type=click.IntRange(1), help="Size of a context. [default: as trained, or 1 episode]")
@click.option(
    "--context-unit",
    "unit",
    type=click.Choice(["transitions", "episodes"]),
    help="Independent transitions or whole episodes. [default: transitions; online: episodes]",
)
@click.option("--sweep", is_flag=True, help="Instead: contexts of many sizes.")
@click.option("--sizes", default="1,2,5,10,20,50,100,200,500,1000", show_default=True, help="Those of --sweep.")
@click.option("--matrix", is_flag=True, help="Instead: contexts of every quality there is.")
@click.option("--episodes", type=click.IntRange(1), default=10, show_default=True, help="Episodes per task.")
@click.option("--test-seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--figures/--no-figures", default=True, help="Save pictures in RUN/figures.")
@stores_option
@runs_option
@json_option
def test(
    run: Path | None, quality: str | None, protocol: str, context_size: int | None, unit: str | None,
    sweep: bool, sizes: str, matrix: bool, episodes: int, test_seed: int, figures: bool, stores: Path, runs: Path,
    as_json: bool,
) -> None:  # fmt: skip
    """Meta-test a run on its test tasks, all its seeds, beside the controls. RUN defaults to the newest."""
    import torch

    from .console import print_matrix, print_sweep, print_test
    from .experiment import newest_run, save_figures, test_run
    from .sweeps import matrix_row, parse_sizes, sweep_run

    if (sweep or matrix) and (protocol != "offline" or unit == "episodes" or (sweep and matrix)):
        raise UsageError("--sweep and --matrix test offline contexts of transitions, one of them at a time")
    folder = run or newest_run(runs)
    torch.set_num_threads(1)  # at these network sizes more threads only wait for each other
    pictures: list[Path] = []
    if sweep:
        swept = sweep_run(folder, stores, quality, parse_sizes(sizes), episodes, test_seed)
        _print_result(swept.to_json(), as_json, lambda: print_sweep(swept))
        pictures = swept.draw() if figures else []
    elif matrix:
        tested = matrix_row(folder, stores, QUALITIES, context_size, episodes, test_seed)
        documents = {name: one.to_json() for name, one in tested.items()}
        _print_result(documents, as_json, lambda: print_matrix({folder.name: tested}))
    else:
        result = test_run(folder, stores, quality, context_size, episodes, test_seed, protocol, unit)
        _print_result(result.to_json(), as_json, lambda: print_test(result))
        pictures = save_figures(result) if figures else []
    for picture in pictures:
        click.echo(f"saved {picture}", err=as_json)


def _print_result(document: Any, as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        show()


@main.command()
@click.argument("runs_shown", nargs=-1, metavar="[RUN]...", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True)
@click.option("--rollouts/--no-rollouts", default=True, help="Play and show some episodes.")
@stores_option
@runs_option
def report(runs_shown: Sequence[Path], output: Path, rollouts: bool, stores: Path, runs: Path) -> None:
    """Write one HTML page about runs: results, embeddings, training, episodes, data, settings, commands.

    It needs no network, can be mailed, and defaults to the newest run. A run that was never tested is tested first.
    """
    import torch

    from .experiment import newest_run
    from .reporting import write_report

    torch.set_num_threads(1)
    written = write_report(runs_shown or [newest_run(runs)], stores, output, rollouts)
    click.echo(f"saved {written} ({written.stat().st_size / 2**20:.1f} MiB); open it in a browser")


@main.command()
@click.argument("kind", required=False, type=click.Choice(["figure", "table"]))
@click.argument("number", required=False)
@click.option("--scale", type=click.Choice(SCALES), default="laptop", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("reproduced"), show_default=True)
@click.option("--workers", type=click.IntRange(1), help="Processes. [default: all cores]")
@stores_option
@runs_option
def reproduce(
    kind: str | None, number: str | None, scale: str, output: Path, workers: int | None, stores: Path, runs: Path
) -> None:
    """Make a figure or table of the paper; data and runs that are missing are made first. Alone, lists them.

    For example: focal-cli reproduce figure 8
    """
    from .console import GenerateBars, TrainBars
    from .paper import ITEMS
    from .reproduce import find_item, reproduce

    if kind is None:
        _print_rows([{"item": item.name, "what": item.what} for item in ITEMS.values()], False)
        return
    if number is None:
        raise UsageError(f"which {kind}? for example: focal-cli reproduce {kind} {'8' if kind == 'figure' else '6'}")
    item = find_item(kind, number)
    for file in reproduce(item, scale, stores, runs, output, GenerateBars, TrainBars, workers or 0):
        click.echo(f"saved {file}")


def _print_rows(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    from .console import print_table

    if as_json:
        click.echo(json.dumps(list(rows), indent=2))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
