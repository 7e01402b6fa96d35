"""`focal-cli`: parse, resolve settings, make one call, print. Heavy imports wait until a verb needs them."""

import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .errors import FocalError, UsageError, printable, unless_default
from .settings import SCALES

QUALITIES = ("random", "medium", "expert", "mixed")
METHODS = ("focal", "batch-pearl", "contextual-bcq", "mbml")
PROTOCOLS = ("offline", "shift", "online", "mbml")
UNITS = ("transitions", "episodes")
SCALE_HELP = "How much: smoke (seconds, shows that it runs), laptop (minutes to hours), paper (days)."
SWEEP_SIZES = "1,2,5,10,20,50,100,200,500,1000"


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
            complain(error)
            sys.exit(error.exit_code if isinstance(error, FocalError) else 1)


def complain(error: Exception) -> None:
    """Print the one line of an error, which may quote a stranger's file."""
    click.echo(f"focal-cli: {printable(explain(error))}", err=True)


def explain(error: Exception) -> str:
    """Return one line for any error."""
    from .files import disk_full, is_disk_full

    if isinstance(error, FocalError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        place = Path(error.filename)
        if is_disk_full(error):
            return str(disk_full(place))
        return f"{place}: {error.strerror or error}; mend that, or choose another place, and run the same command again"
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}; that is our mistake: please report it with what --debug prints"


class Location(click.ParamType):
    """A path on this machine, or the URL of a bundle on an object store, whose two slashes a path would lose."""

    name = "path or URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        """See click."""
        return value if isinstance(value, Path) or "://" in value else Path(value)


class RunName(click.ParamType):
    """Name of a folder directly inside --runs, where commands that are given no run look for one."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See click."""
        if "/" in value or value.startswith(".") or value in ("", "comparisons", "ablations", "teachers"):
            raise UsageError(
                f"--name '{value}', expected the name of a folder inside --runs: without /, not beginning with a dot, "
                "not comparisons, ablations or teachers; for example --name first"
            )
        return str(value)


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


ray_option = click.option(
    "--ray", metavar="ADDRESS", help="Run on this Ray cluster, for example auto, not here; see docs/cluster.md."
)
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="auto is cuda where torch finds one.",
)  # fmt: skip
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
    """Make, list, show, check, re-label, import, export and merge collections."""


@data.command()
@click.option("--env", "env_name", required=True, help="Task family, see `focal-cli envs`.")
@click.option("--scale", type=click.Choice(SCALES), default="laptop", show_default=True, help=SCALE_HELP)
@click.option("--tasks", metavar="TRAIN[/TEST]", help="Number of tasks, for example 20/5.")
@click.option(
    "--tasks-from",
    type=click.Choice(["seed", "published"]),
    default="seed",
    show_default=True,
    help="Draw the tasks from --seed, or take those of the authors' code.",
)
@click.option(
    "--engine",
    type=click.Choice(["sb3", "fleet"]),
    help="One task at a time, or many. [default: fleet for the point robots, else sb3]",
)
@click.option("--workers", type=click.IntRange(1), help="Processes side by side. [default: all cores, or all GPUs]")
@device_option
@ray_option
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of tasks and training.")
@click.option("--licence", default="CC-BY-4.0", show_default=True, help="SPDX identifier.")
@click.option("--author", "authors", multiple=True, help="May be given several times.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Collection folder. [default: STORES/FAMILY]")
@stores_option
@set_option
def generate(
    env_name: str, scale: str, tasks: str | None, tasks_from: str, engine: str | None, workers: int | None, device: str,
    ray: str | None, seed: int, licence: str, authors: Sequence[str], output: Path | None, stores: Path,
    assignments: Sequence[str],
) -> None:  # fmt: skip
    """Train a SAC agent per task and roll its checkpoints out into a collection. Run again to continue."""
    from .console import GenerateBars, print_collection
    from .datagen import GenerateRequest, generate, generate_settings
    from .envs import get_family
    from .settings import override, parse_assignments

    family = get_family(env_name)
    settings = generate_settings(family.name, scale, fixed_tasks=family.fixed_tasks is not None)
    chosen = {"engine": engine} if engine else {}
    settings = override(settings, _task_counts(tasks) | chosen | parse_assignments(assignments))
    request = GenerateRequest(
        family.name, output or stores / family.name, settings, scale, seed, tasks_from, licence, tuple(authors),
        workers or 0, device, ray,
    )  # fmt: skip
    with GenerateBars(family.name) as bars:
        collection = generate(request, bars)
    print_collection(collection)
    if (licence, tuple(authors) or collection.authors) != (collection.licence, collection.authors):
        click.echo("note: it was complete already, so licence and authors stay as they are", err=True)


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
        where = unless_default("--stores", stores, "stores")
        raise FocalError(f"no collection in {stores}; make one with: focal-cli data generate --env point{where}")
    rows = []
    for path in paths:
        try:
            rows.append(collection_row(open_collection(path)))
        except FocalError as error:  # one damaged collection must not hide the others
            complain(error)
    shown = ("path", "version", "tasks", "experts", "episodes", "transitions", "content")
    _print_rows(rows if as_json else [{name: row[name] for name in shown} for row in rows], as_json)


@data.command()
@click.argument("path", type=Location())
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the returns of all episodes.")
@json_option
def show(path: Path | str, plot: Path | None, as_json: bool) -> None:
    """Show a collection, folder or s3:// URL: its card, tasks, episodes and returns per quality, what never learnt."""
    from .console import collection_document, print_collection
    from .datasets import open_collection

    collection = open_collection(path)
    if as_json:
        click.echo(json.dumps(collection_document(collection), indent=2))
    else:
        print_collection(collection, tasks=True)
    if plot is not None:
        from .evaluation.figures import behaviour_data

        behaviour_data(plot, collection, both=False)
        click.echo(f"saved {plot}", err=as_json)


@data.command()
@click.argument("path", type=Location())
@json_option
def verify(path: Path | str, as_json: bool) -> None:
    """Check every byte of a collection, in a folder or at an s3:// URL, against what it says of itself."""
    from .datasets import verify_collection

    report = verify_collection(path)
    counts = {"files": report.files, "bytes": report.bytes, "episodes": report.episodes,
              "transitions": report.transitions}  # fmt: skip
    if as_json:
        click.echo(json.dumps({"path": str(path), "ok": True, **counts}))
    else:
        click.echo(f"{path}: good, " + ", ".join(f"{value:,} {name}" for name, value in counts.items()))


@data.command()
@click.argument("path", type=Location())
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the new version.")
@set_option
def relabel(path: Path | str, output: Path, assignments: Sequence[str]) -> None:
    """Cut the quality levels anew, for example --set expert_from=0.8, into a new version."""
    from .console import print_collection
    from .datasets import open_collection, relabel_collection
    from .settings import override, parse_assignments

    rule = override(open_collection(path).tasks[0].rule, parse_assignments(assignments))
    print_collection(relabel_collection(path, output, rule))


@data.command("import")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["unicorn", "d4rl", "minari", "focal-iclr"]), required=True)
@click.option("--env", "env_name", required=True, help="Task family of the data, see `focal-cli envs`.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the collection.")
@click.option("--licence", required=True, help="The data's own licence, an SPDX identifier.")
@click.option("--author", "authors", multiple=True, help="May be given several times.")
@click.option("--name", help="[default: FAMILY-FORMAT]")
@click.option("--tasks", "tasks_file", type=click.Path(path_type=Path), help="JSON file of parameters and splits.")
@click.option("--split", metavar="TRAIN/TEST", help="Numbers of tasks. [default: the family's proportion]")
@click.option("--label", type=click.Choice(["scores", "random", "medium", "expert"]),
              help="Quality of all episodes, or computed from returns. [default: none]")  # fmt: skip
@click.option("--horizon", type=click.IntRange(1), help="Time limit of the data. [default: the family's]")
@click.option("--scale", type=click.Choice(SCALES), default="laptop", show_default=True, help="Default to train at.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of split and held-out episodes.")
def import_(
    source: Path, form: str, env_name: str, output: Path, licence: str, authors: Sequence[str], name: str | None,
    tasks_file: Path | None, split: str | None, label: Any, horizon: int | None, scale: str, seed: int,
) -> None:  # fmt: skip
    """Import data that others collected (docs/exchange.md): pickles only with --format focal-iclr, in a sandbox."""
    from .bars import TaskBar
    from .console import print_collection
    from .datasets.importing import ImportRequest, import_collection, list_tasks
    from .importing import expert_test, family_facts, plan_tasks
    from .provenance import provenance

    facts = family_facts(env_name, horizon)
    tasks = plan_tasks(env_name, list_tasks(source, form), tasks_file, split, seed)
    request = ImportRequest(
        source, form, output, facts, tasks, licence, tuple(authors), name, label, seed, scale, provenance(),
        expert_test(env_name, facts.horizon),
    )  # fmt: skip
    with TaskBar("importing") as bar:
        collection = import_collection(request, bar)
    print_collection(collection)


@data.command()
@click.argument("path", type=Location())
@click.option("--format", "form", type=click.Choice(["minari", "d4rl"]), required=True)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="New folder.")
def export(path: Path | str, form: str, output: Path) -> None:
    """Write a collection in another project's format, and say what that cannot hold."""
    from .bars import TaskBar
    from .datasets import open_collection
    from .datasets.exporting import export_collection

    with TaskBar("exporting") as bar:
        losses = export_collection(open_collection(path), form, output, bar)
    click.echo(f"{output}: exported as {form}")
    for loss in losses:
        click.echo(f"not carried: {loss}")
    if form == "minari":
        click.echo(f"list it with: MINARI_DATASETS_PATH={shlex.quote(str(output.resolve()))} minari list local")


@data.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=Location())
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the new collection.")
@click.option(
    "--data", "quality", type=click.Choice(QUALITIES), default="mixed", show_default=True, help="Episodes to keep."
)
@click.option("--tasks", "tasks", multiple=True, metavar="0-9,12", help="Tasks to keep, once per PATH.")
@click.option("--join", is_flag=True, help="Join the episodes of tasks with the same parameters.")
@click.option("--name", help="[default: FAMILY-merged]")
def merge(
    paths: Sequence[Path | str], output: Path, quality: str, tasks: Sequence[str], join: bool, name: str | None
) -> None:
    """Put collections of one family together, or take a part of one."""
    from .bars import TaskBar
    from .console import print_collection
    from .datasets import open_collection
    from .datasets.merging import merge_collections
    from .provenance import provenance

    chosen = [parse_ranges(text) for text in tasks] or None
    with TaskBar("merging") as bar:
        collection = merge_collections(
            [open_collection(path) for path in paths], output, quality=quality, tasks=chosen, join=join, name=name,
            provenance=provenance(), progress=bar,
        )  # fmt: skip
    print_collection(collection)


def parse_ranges(text: str) -> list[int]:
    """`0-9,12` as a list of numbers."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 100_000):
            raise UsageError(f"--tasks got '{text}', expected task numbers, for example --tasks 0-9,12")
        numbers += range(int(first), int(last) + 1)
    return list(dict.fromkeys(numbers))


@main.group()
def bundle() -> None:
    """Hand collections to another team, and take theirs: pack, verify, unpack, push, pull.

    A bundle is one file, or with --folder one folder, that anybody can check: unzip it, then in its folder
    sha256sum -c --strict tagmanifest-sha256.txt manifest-sha256.txt
    """


def receiving(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what the receiver of a bundle decides: whom to trust and how much to take."""
    for option in (
        click.option("--max-size", default="50GB", show_default=True, callback=_bytes, help="Refuse larger ones."),
        click.option("--require-signature", is_flag=True, help="Refuse all but a trusted signer's."),
        click.option(
            "--allowed-signers", type=click.Path(path_type=Path), envvar="FOCAL_ALLOWED_SIGNERS",
            help="Whose keys are trusted, see ssh-keygen(1). [default: ~/.config/focal/allowed_signers]",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def _bytes(context: click.Context, parameter: click.Parameter, value: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", value)
    if not match:
        raise UsageError(f"{parameter.opts[0]} got '{value}', expected a size, for example --max-size 50GB")
    return int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " "))


def _allowed_signers(chosen: Path | None) -> Path | None:
    if chosen is None:
        usual = Path.home() / ".config" / "focal" / "allowed_signers"
        return usual if usual.is_file() else None
    if not chosen.is_file():
        raise UsageError(f"no allowed signers at {chosen}, expected a file of public keys, see ssh-keygen(1)")
    return chosen


@bundle.command()
@click.argument("path", required=False, type=Location())
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: NAME-VERSION.focal.zip]")
@click.option("--folder", is_flag=True, help="Make a folder instead of one file.")
@click.option(
    "--sign", "key", type=click.Path(path_type=Path), help="Sign with this SSH key, for example ~/.ssh/id_ed25519."
)
@click.option(
    "--author", "authors", multiple=True, help="For a collection that names none; may be given several times."
)
@stores_option
@json_option
def pack(
    path: Path | str | None, output: Path | None, folder: bool, key: Path | None, authors: Sequence[str], stores: Path,
    as_json: bool,
) -> None:  # fmt: skip
    """Verify the collection PATH and pack it. PATH may be left out where STORES holds one collection."""
    from .bars import ByteBar
    from .datasets.bundle import pack_bundle

    if path is None:
        from .experiment import choose_collection

        path = choose_collection(stores, None, None)
    with ByteBar("packing") as bar:
        packed, report = pack_bundle(path, output, key, folder, authors, bar)
    _print_bundle(report, as_json, f"packed; the other team: focal-cli bundle unpack {shlex.quote(packed.name)}")


@bundle.command("verify")
@click.argument("path", type=Location())
@receiving
@json_option
def verify_(
    path: Path | str, allowed_signers: Path | None, require_signature: bool, max_size: int, as_json: bool
) -> None:  # fmt: skip
    """Check every byte of a bundle (file, folder or URL), in place: signature, checksums, the collection inside."""
    from .bars import ByteBar
    from .datasets.bundle import verify_bundle

    with ByteBar("verifying") as bar:
        report = verify_bundle(path, _allowed_signers(allowed_signers), require_signature, max_size, bar)
    _print_bundle(report, as_json, "good")


@bundle.command()
@click.argument("path", type=Location())
@click.option("-o", "--output", type=click.Path(path_type=Path), help="New folder. [default: STORES/FAMILY]")
@receiving
@stores_option
@json_option
def unpack(
    path: Path | str, output: Path | None, allowed_signers: Path | None, require_signature: bool, max_size: int,
    stores: Path, as_json: bool,
) -> None:  # fmt: skip
    """Verify a bundle, then unpack its collection."""
    from .bars import ByteBar
    from .datasets.bundle import unpack_bundle

    if isinstance(path, str):
        raise UsageError(f"{path} is on an object store; fetch it: focal-cli bundle pull {shlex.quote(path)}")
    with ByteBar("unpacking") as bar:
        collection, report = unpack_bundle(
            path, output, stores, _allowed_signers(allowed_signers), require_signature, max_size, bar
        )
    place = str(collection.path)
    advice = f"unpacked; train on it: focal-cli train --collection {shlex.quote(place)} --data mixed"
    _print_bundle(report, as_json, advice, collection=place)


@bundle.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.argument("url")
@json_option
def push(path: Path, url: str, as_json: bool) -> None:
    """Verify the bundle FILE and upload it to URL/NAME-VERSION, for example to s3://BUCKET/PATH. Run again to continue.

    Keys come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, another server than Amazon's from AWS_ENDPOINT_URL.
    """
    from .bars import ByteBar
    from .datasets.transfer import push_bundle

    with ByteBar("pushing") as bar:
        report = push_bundle(path, url, bar)
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
        return
    sent = f"{report.sent} of {report.files} files sent ({report.sent_bytes:,} bytes)" if report.sent else "all there"
    click.echo(f"{report.url}: {sent}; the other team: focal-cli bundle pull {shlex.quote(report.url)}")


@bundle.command()
@click.argument("url")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="New folder. [default: STORES/FAMILY]")
@receiving
@stores_option
@json_option
def pull(
    url: str, output: Path | None, allowed_signers: Path | None, require_signature: bool, max_size: int, stores: Path,
    as_json: bool,
) -> None:  # fmt: skip
    """Download the bundle at URL, verify it and unpack its collection. Run again to continue after a cut."""
    from .bars import ByteBar
    from .datasets.transfer import pull_bundle

    def announce(bag: Any, trust: Any) -> None:
        click.echo(f"{bag.name}, {bag.payload_bytes:,} bytes, {trust}", err=True)

    with ByteBar("pulling") as bar:
        collection, report = pull_bundle(
            url, output, stores, _allowed_signers(allowed_signers), require_signature, max_size, bar, announce
        )
    place = str(collection.path)
    advice = f"pulled; train on it: focal-cli train --collection {shlex.quote(place)} --data mixed"
    _print_bundle(report, as_json, advice, collection=place)


def _print_bundle(report: Any, as_json: bool, what: str, **more: str) -> None:
    """Licence, authors and signature are always shown: whoever packs or takes data answers for them."""
    if as_json:
        click.echo(json.dumps(report.to_json() | more, indent=2))
        return
    counts = ", ".join(f"{value:,} {name}" for name, value in asdict(report.verified).items())
    click.echo(f"{report.path}: {report.name} of {report.family}, {counts}, content {report.content_hash[:12]}")
    click.echo(f"licence {report.licence}, by {', '.join(report.authors)}, {report.trust}")
    click.echo(what)


@main.command()
@click.option("--env", "env_name", help="Task family; may be left out where STORES holds one collection.")
@click.option("--collection", type=Location(), help="Collection folder or s3:// URL, instead of --env.")
@click.option("--data", "quality", type=click.Choice(QUALITIES), required=True, help="Quality to train on.")
@click.option("--algo", metavar="METHOD", help=f"{', '.join(METHODS)}. [default: focal, or that of the run continued]")
@click.option("--scale", type=click.Choice(SCALES), help=f"{SCALE_HELP} [default: the collection's own]")
@click.option("--seed", type=click.IntRange(0), help="First seed. [default: 0; with --resume those of the run]")
@click.option("--seeds", type=click.IntRange(1), help="Number of seeds. [default: 1; with --resume those of the run]")
@click.option("--workers", type=click.IntRange(1), help="Seeds trained side by side. [default: all cores]")
@device_option
@click.option("--name", type=RunName(), help="Run folder's name. [default: family, quality, algorithm and time]")
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
    env_name: str | None, collection: Path | str | None, quality: str, algo: str | None, scale: str | None,
    seed: int | None, seeds: int | None, workers: int | None, device: str, name: str | None, resume: bool,
    cache: Path | None, stores: Path, runs: Path, assignments: Sequence[str],
) -> None:  # fmt: skip
    """Meta-train on a collection's training tasks."""
    from .console import TrainBars
    from .experiment import TrainRequest, choose_collection, idle_settings, plan_run, train_planned

    first, named = seed or 0, seed is not None or seeds is not None
    request = TrainRequest(
        collection=choose_collection(stores, env_name, collection), quality=quality, scale=scale,
        seeds=tuple(range(first, first + (seeds or 1))) if named else (), assignments=tuple(assignments), runs=runs,
        name=name, resume=resume, workers=workers or 0, cache=cache, device=device, algo=algo,
    )  # fmt: skip
    planned = plan_run(request)
    for line in idle_settings(planned, assignments):
        click.echo(f"note: {line}", err=True)
    with TrainBars() as bars:
        train_planned([planned], request.workers, bars)
    run = planned.run_dir
    click.echo(f"{run}: trained; test it with: focal-cli test {run}")


@main.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--data", "quality", type=click.Choice(QUALITIES), help="Quality of the context. [default: as trained]")
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default="offline",
    show_default=True,
    help="Context from logged data; from other tasks' behaviour policies in the test task; self-collected; or as in "
    "MBML's code (5 self-collected episodes, mean of the last 3).",
)
@click.option(
    "--context-size", type=click.IntRange(1), help="Size of a context. [default: as trained, or 1 episode; mbml: 5]"
)
@click.option(
    "--context-unit",
    "unit",
    type=click.Choice(UNITS),
    help="Independent transitions or whole episodes. [default: transitions; online, mbml: episodes]",
)
@click.option("--sweep", is_flag=True, help="Instead: contexts of many sizes.")
@click.option("--sizes", metavar="A,B,...", help=f"Those of --sweep. [default: {SWEEP_SIZES}]")
@click.option("--matrix", is_flag=True, help="Instead: contexts of every quality, on the tasks that have them all.")
@click.option("--only-seeds", metavar="A,B,...", help="Of the run's seeds, where another diverged. [default: all]")
@click.option("--episodes", type=click.IntRange(1), default=10, show_default=True, help="Episodes per task.")
@click.option("--test-seed", type=click.IntRange(0), default=0, show_default=True, help="Of contexts and rollouts.")
@click.option("--figures/--no-figures", default=True, help="Save pictures in RUN/figures.")
@stores_option
@runs_option
@json_option
def test(
    run: Path | None, quality: str | None, protocol: str, context_size: int | None, unit: str | None,
    sweep: bool, sizes: str | None, matrix: bool, only_seeds: str | None, episodes: int, test_seed: int, figures: bool,
    stores: Path, runs: Path, as_json: bool,
) -> None:  # fmt: skip
    """Meta-test a run on its test tasks, all its seeds, beside the controls. RUN defaults to the newest."""
    import torch

    from .console import print_matrix, print_sweep, print_test
    from .experiment import newest_run, save_figures, test_run
    from .sweeps import matrix_row, parse_seeds, parse_sizes, sweep_run

    if (sweep or matrix) and (protocol != "offline" or unit == "episodes" or (sweep and matrix)):
        raise UsageError("--sweep and --matrix test offline contexts of transitions, one of them at a time")
    if sweep and context_size is not None:
        raise UsageError(f"--sweep takes its sizes from --sizes, found --context-size {context_size}; leave it out")
    if sizes is not None and not sweep:
        raise UsageError(f"--sizes {sizes} is of --sweep; add --sweep, or say --context-size for one size")
    if matrix and quality is not None:
        raise UsageError(f"--matrix takes contexts of every quality, found --data {quality}; leave it out")
    folder, seeds = run or newest_run(runs), None if only_seeds is None else parse_seeds(only_seeds)
    torch.set_num_threads(1)  # at these network sizes more threads only wait for each other
    pictures: list[Path] = []
    if sweep:
        swept = sweep_run(folder, stores, quality, parse_sizes(sizes or SWEEP_SIZES), episodes, test_seed, seeds)
        _print_result(swept.to_json(), as_json, lambda: print_sweep(swept))
        pictures = swept.draw() if figures else []
    elif matrix:
        tested = matrix_row(folder, stores, QUALITIES, context_size, episodes, test_seed, seeds)
        if not tested:
            raise FocalError("no test task has a context of any quality; see what there is: focal-cli data list")
        documents = {name: one.to_json() for name, one in tested.items()}
        _print_result(documents, as_json, lambda: print_matrix({folder.name: tested}))
    else:
        result = test_run(folder, stores, quality, context_size, episodes, test_seed, protocol, unit, seeds=seeds)
        _print_result(result.to_json(), as_json, lambda: print_test(result))
        pictures = save_figures(result) if figures else []
    for picture in pictures:
        click.echo(f"saved {picture}", err=as_json)


@main.command()
@click.option("--env", "env_name", help="Task family; may be left out where STORES holds one collection.")
@click.option("--collection", type=Location(), help="Collection folder or s3:// URL, instead of --env.")
@click.option("--data", "quality", type=click.Choice(QUALITIES), required=True, help="Quality of training and context.")
@click.option("--algos", default=",".join(METHODS), show_default=True, metavar="A,B,...", help="Methods.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Seeds of each.")
@click.option("--scale", type=click.Choice(SCALES), help=f"{SCALE_HELP} [default: the collection's own]")
@click.option("--protocol", type=click.Choice(PROTOCOLS), default="offline", show_default=True, help="See test.")
@click.option(
    "--context-size", type=click.IntRange(1), help="Of test contexts. [default: the largest trained with; see test]"
)
@click.option("--context-unit", "unit", type=click.Choice(UNITS), help="[default: transitions; online, mbml: episodes]")
@click.option("--episodes", type=click.IntRange(1), default=10, show_default=True, help="Test episodes per task.")
@click.option("--test-seed", type=click.IntRange(0), default=0, show_default=True, help="Of contexts and rollouts.")
@click.option("--workers", type=click.IntRange(1), help="Seeds trained side by side. [default: all cores]")
@device_option
@ray_option
@click.option("--name", type=RunName(), help="The runs are NAME-ALGO. [default: family and quality, e.g. walker-mixed]")
@stores_option
@runs_option
@set_option
@json_option
def compare(
    env_name: str | None, collection: Path | str | None, quality: str, algos: str, seeds: int, scale: str | None,
    protocol: str, context_size: int | None, unit: str | None, episodes: int, test_seed: int, workers: int | None,
    device: str, ray: str | None, name: str | None, stores: Path, runs: Path, assignments: Sequence[str],
    as_json: bool,
) -> None:  # fmt: skip
    """Compare methods on the same data: train what is missing, go on with what was stopped, test all, print one table.

    --set NAME=VALUE goes to every method that has the setting, --set ALGO:NAME=VALUE to one. At laptop scale all
    methods have networks of 3 x 256, FOCAL too, whose own are smaller (--set focal:control_hidden=128,128 has those),
    and batches and steps meant for runs of at most a quarter of an hour; --set steps=8000 and the like override.
    Test contexts are as large for all as the largest that one of them trained with; in the tests during training as
    large as the largest of the four methods' own settings.
    """
    import torch

    from .comparison import CompareRequest, compare
    from .console import TrainBars, print_comparison
    from .experiment import TrainRequest, choose_collection
    from .trainer.methods import find_method

    methods = tuple(dict.fromkeys(word for word in algos.replace(" ", "").split(",") if word))
    for method in methods:
        find_method(method)
    if not methods:
        raise UsageError(f"--algos is empty, expected some of {','.join(METHODS)}")
    torch.set_num_threads(1)  # at these network sizes more threads only wait for each other
    train = TrainRequest(
        collection=choose_collection(stores, env_name, collection), quality=quality, scale=scale,
        seeds=tuple(range(seeds)), assignments=tuple(assignments), runs=runs, workers=workers or 0, device=device,
        ray=ray,
    )  # fmt: skip
    request = CompareRequest(train, methods, stores, protocol, episodes, test_seed, name, context_size, unit)

    def note(line: str) -> None:
        click.echo(f"note: {line}", err=True)

    if as_json:
        compared = compare(request, note=note)
    else:
        with TrainBars() as bars:
            compared = compare(request, bars, note)
    _print_result(compared.to_json(), as_json, lambda: print_comparison(compared))
    for file in compared.files:
        click.echo(f"saved {file}", err=as_json)


@main.command()
@click.option("--env", "env_name", help="Task family; may be left out where STORES holds one collection.")
@click.option("--collection", type=Location(), help="Collection folder or s3:// URL, instead of --env.")
@click.option(
    "--data", "quality", type=click.Choice(QUALITIES), default="mixed", show_default=True,
    help="Quality of training and context.",
)  # fmt: skip
@click.option("--rows", metavar="A,B,...|all", help="Rows to train and test, with those they are compared with.")
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="Seeds of each.")
@click.option("--scale", type=click.Choice(SCALES), help=f"{SCALE_HELP} [default: the collection's own]")
@click.option("--episodes", type=click.IntRange(1), default=10, show_default=True, help="Test episodes per task.")
@click.option("--test-seed", type=click.IntRange(0), default=0, show_default=True, help="Of contexts and rollouts.")
@click.option("--workers", type=click.IntRange(1), help="Seeds trained side by side. [default: all cores]")
@device_option
@ray_option
@click.option("--table", type=click.Path(path_type=Path), help="Write all that was measured so far, as Markdown.")
@stores_option
@runs_option
@set_option
@json_option
def ablate(
    env_name: str | None, collection: Path | str | None, quality: str, rows: str | None, seeds: int, scale: str | None,
    episodes: int, test_seed: int, workers: int | None, device: str, ray: str | None, table: Path | None,
    stores: Path, runs: Path, assignments: Sequence[str], as_json: bool,
) -> None:  # fmt: skip
    """Take FOCAL apart, a row per design choice: train what is missing, go on with what was stopped, test, compare.

    Without --rows it lists the rows, or with --table only writes what is there.
    """
    import torch

    from .ablation import (
        AblateRequest,
        ablate,
        ablation_name,
        ablation_page,
        ablation_rows,
        own_changes,
        read_all,
        table_rows,
    )
    from .console import TrainBars
    from .datasets import open_collection
    from .experiment import TrainRequest, choose_collection
    from .files import write_text

    torch.set_num_threads(1)  # at these network sizes more threads only wait for each other
    chosen = choose_collection(stores, env_name, collection)
    opened = open_collection(chosen)
    known = ablation_rows(opened.family, scale or opened.scale)
    folder = runs / "ablations" / ablation_name(opened, quality, scale or opened.scale)
    if rows is None and table is None:
        listed = [{"row": r.name, "against": r.against, "what": r.what, "set on top": " ".join(own_changes(r, known))}
                  for r in known.values()]  # fmt: skip
        _print_rows(listed, as_json)
        return
    if rows is not None:
        train = TrainRequest(
            collection=chosen, quality=quality, scale=scale, seeds=tuple(range(seeds)),
            assignments=tuple(assignments), runs=runs, workers=workers or 0, device=device, ray=ray,
        )  # fmt: skip
        names = tuple(word for word in rows.replace(" ", "").split(",") if word)
        request = AblateRequest(train, names, stores, episodes, test_seed)
        if as_json:
            measured = ablate(request)
        else:
            with TrainBars() as bars:
                measured = ablate(request, bars)
        by_name = {found.row.name: found for found in measured}
        document = [found.to_json() for found in measured]
        _print_result(document, as_json, lambda: _print_rows(table_rows(by_name, known), False))
    if table is not None:
        write_text(table, ablation_page(folder.name, read_all(folder), known))
        click.echo(f"saved {table}", err=as_json)


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
    from .files import check_writable
    from .reporting import write_report

    check_writable(output)  # here, not after an hour of tests
    torch.set_num_threads(1)
    written = write_report(runs_shown or [newest_run(runs)], stores, output, rollouts)
    click.echo(f"saved {written} ({written.stat().st_size / 2**20:.1f} MiB); open it in a browser")


@main.command("export-policy")
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--seed", type=click.IntRange(0), help="Which trained network. [default: the run's first]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: RUN/export/seed_SEED]")
@runs_option
def export_policy(run: Path | None, seed: int | None, output: Path | None, runs: Path) -> None:
    """Write encoder and policy of RUN (default: the newest) as ONNX, checked in onnxruntime, and as safetensors."""
    from .experiment import newest_run
    from .trainer.exporting import export_policy
    from .trainer.inference import load_policy

    folder = run or newest_run(runs)
    policy = load_policy(folder, seed)
    for file in export_policy(policy, output or folder / "export" / f"seed_{policy.seed}"):
        click.echo(f"saved {file}")


@main.command()
@click.argument("kind", required=False, type=click.Choice(["figure", "table"]))
@click.argument("number", required=False)
@click.option("--env", "families", multiple=True, help="Only this family's part of it; may be repeated.")
@click.option("--scale", type=click.Choice(SCALES), default="laptop", show_default=True, help=SCALE_HELP)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("reproduced"), show_default=True)
@click.option("--workers", type=click.IntRange(1), help="Processes. [default: all cores]")
@stores_option
@runs_option
@json_option
def reproduce(
    kind: str | None,
    number: str | None,
    families: Sequence[str],
    scale: str,
    output: Path,
    workers: int | None,
    stores: Path,
    runs: Path,
    as_json: bool,
) -> None:
    """Make a figure or table of the paper; data and runs that are missing are made first. Alone, lists them.

    For example: focal-cli reproduce figure 8
    """
    from .console import GenerateBars, TrainBars
    from .envs import get_family
    from .paper import ITEMS
    from .reproduce import find_items, reproduce

    if kind is None:
        _print_rows([{"item": item.name, "what": item.what} for item in ITEMS.values()], as_json)
        return
    if number is None:
        raise UsageError(f"which {kind}? for example: focal-cli reproduce {kind} {'8' if kind == 'figure' else '6'}")
    items = find_items(kind, number)
    if families:
        names = [get_family(name).name for name in families]
        shown = {name for item in items for name in item.shown}
        items = [item for item in items if set(names) & set(item.shown)] if set(names) <= shown else items
        items = [item.restricted([name for name in names if name in item.shown] or names) for item in items]
    # with --json the standard output is not the bars'
    generating: Any = (lambda _: nullcontext()) if as_json else GenerateBars
    training: Any = nullcontext if as_json else TrainBars
    made = {}
    for item in items:
        one = reproduce(item, scale, stores, runs, output, generating, training, workers or 0)
        made[item.name] = [str(file) for file in one.files]
        for file in one.files:
            click.echo(f"saved {file}", err=as_json)
        for note in one.notes:
            click.echo(f"note: {note}", err=True)
    if as_json:
        click.echo(json.dumps(made, indent=2))


def _print_rows(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    from .console import print_table

    if as_json:
        click.echo(json.dumps(list(rows), indent=2))
    else:
        print_table(rows)


if __name__ == "__main__":
    main()
