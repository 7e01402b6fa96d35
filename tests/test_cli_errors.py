"""What a user can do wrong: one clear line with the next command, exit code 1 or 2, never a traceback, nothing lost."""

import json
import re
import shlex
import shutil

import pytest
from click.testing import CliRunner

from focal import FocalError
from focal.cli import main
from focal.datasets.opening import document_hash


def fails(code, *arguments):
    """Run a command that must fail and return its error line."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.output)
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 or lines[0].startswith("Usage:"), lines  # click explains its own usage errors in four lines
    return lines[-1]


@pytest.fixture
def stores(make_collection, tmp_path):
    make_collection(tmp_path / "stores" / "sparse-point-robot")
    return tmp_path / "stores"


@pytest.fixture
def path(stores):
    return stores / "sparse-point-robot"


def train(stores, *arguments):
    return ["train", "--stores", stores, "--runs", stores.parent / "runs", *arguments]


def test_unknown_family():
    assert "did you mean 'walker'" in fails(2, "data", "generate", "--env", "waker")
    assert "did you mean 'walker'" in fails(2, "train", "--env", "waker", "--data", "mixed")


def test_unknown_quality_and_scale(stores):
    assert "'expert'" in fails(2, *train(stores, "--data", "expret"))
    assert "'laptop'" in fails(2, "data", "generate", "--env", "point", "--scale", "lap")


def test_unknown_setting_names_the_nearest(stores, tmp_path):
    line = fails(2, *train(stores, "--data", "mixed", "--set", "batchsize=4"))
    assert "unknown setting 'batchsize'; did you mean 'batch_size'?" in line
    line = fails(2, *train(stores, "--data", "mixed", "--set", "regularisation.alfa=4"))
    assert "did you mean 'regularisation.alpha'?" in line
    line = fails(2, "data", "generate", "--env", "point", "-o", tmp_path / "x", "--set", "sac.total_step=4")
    assert "did you mean 'sac.total_steps'?" in line
    assert "batch_size='many', expected int" in fails(2, *train(stores, "--data", "mixed", "--set", "batch_size=many"))
    assert "expected NAME=VALUE" in fails(2, *train(stores, "--data", "mixed", "--set", "batch_size"))
    assert not (tmp_path / "runs").exists(), "a refused command must not leave a run behind"


def test_what_cannot_be_trained_is_refused_before_a_run_is_written(stores, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no CUDA device here; --device cpu" in fails(2, *train(stores, "--data", "mixed", "--device", "cuda"))
    line = fails(1, *train(stores, "--data", "mixed", "--set", "context_size=100000"))
    assert "contexts of 100000 transitions" in line
    assert "--set context_size=" in line
    line = fails(2, *train(stores, "--data", "mixed", "--set", "released.penalise_output=true"))
    assert "has no effect here; --set regularisation.kind=policy" in line
    assert not (tmp_path / "runs").exists()


def test_a_context_larger_than_a_test_tasks_data_is_refused_before_a_run_is_written(tmp_path, make_collection):
    """Else the first meta-test stops the training, and the same one stops it again after --resume."""
    make_collection(tmp_path / "stores" / "both", both=True)  # each task trains on 180 transitions, holds out 20
    command = train(tmp_path / "stores", "--data", "expert", "--scale", "smoke")
    line = fails(1, *command)
    assert "contexts of 32 transitions were asked for, but test task 0, held-out episodes alone, holds only 20;" in line
    assert not (tmp_path / "runs").exists()
    remedy = re.search("--set context_size=[0-9]+", line).group().split()
    assert CliRunner().invoke(main, [str(argument) for argument in (*command, *remedy)]).exit_code == 0


def test_task_counts():
    assert "expected TRAIN or TRAIN/TEST" in fails(2, "data", "generate", "--env", "point", "--tasks", "many")


def test_no_collection_and_several(stores, tmp_path, make_collection):
    line = fails(2, "train", "--stores", tmp_path / "none", "--data", "mixed")
    assert "make one first: focal-cli data generate --env point --stores" in line
    make_collection(stores / "second")
    line = fails(2, *train(stores, "--data", "mixed"))
    assert f"--collection {stores / 'second'}" in line
    assert f"--collection {stores / 'sparse-point-robot'}" in line


def test_no_run_to_test(tmp_path):
    assert "train one first: focal-cli train --data mixed" in fails(1, "test", "--runs", tmp_path)


def test_expert_data_where_no_task_reached_expert(tmp_path, make_collection):
    make_collection(tmp_path / "stores" / "never-learnt", unreached=range(4))
    line = fails(1, *train(tmp_path / "stores", "--data", "expert"))
    assert "no training task has 'expert' episodes" in line
    assert "--data mixed" in line


def find(path, part):
    return sorted(file for file in path.rglob("*") if file.is_file() and part in str(file.relative_to(path)))


def test_a_store_cut_short(path):
    chunk = find(path, "task_0001.zarr/observations/c")[0]
    chunk.write_bytes(chunk.read_bytes()[:-7])
    line = fails(1, "data", "verify", path)
    assert "task_0001" in line
    assert "observations" in line
    assert fails(1, *train(path.parent, "--data", "mixed"))


def test_a_missing_chunk(path):
    find(path, "task_0000.zarr/actions/c")[0].unlink()
    line = fails(1, "data", "show", path)
    assert "actions" in line
    assert "missing" in line


def test_a_flipped_byte_is_named_by_verify_and_refused_by_train(path):
    chunk = find(path, "task_0000.zarr/rewards/c")[0]
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    assert "rewards" in fails(1, "data", "verify", path)
    line = fails(1, *train(path.parent, "--data", "mixed"))
    assert "rewards" in line
    assert "chunk 0" in line


def test_a_wrong_format_version(path):
    document = json.loads((path / "dataset.json").read_text())
    document["format"] = "focal-collection/9"
    (path / "dataset.json").write_text(json.dumps(document))
    line = fails(1, "data", "show", path)
    assert "focal-collection/9" in line
    assert "focal-collection/1" in line


def test_an_interrupted_collection_says_how_to_continue(path):
    (path / "dataset.json").unlink()
    assert "focal-cli data generate" in fails(1, "data", "show", path)


def test_a_run_whose_data_changed(stores, tmp_path, make_collection):
    run = train(stores, "--data", "mixed", "--scale", "smoke", "--name", "a")
    assert CliRunner().invoke(main, [str(argument) for argument in run]).exit_code == 0
    line = fails(2, *run)
    assert "to continue it, add --resume" in line
    shutil.rmtree(stores / "sparse-point-robot")
    make_collection(stores / "sparse-point-robot", seed=9)
    line = fails(1, "test", tmp_path / "runs" / "a", "--stores", stores)
    assert "is the data this run was trained on" in line
    line = fails(1, *run, "--resume")
    assert "is of another run: it has content_hash=" in line
    assert "use its own (its collection)" in line


def test_context_of_a_quality_no_test_task_has(tmp_path, make_collection):
    make_collection(tmp_path / "stores" / "one", unreached=range(4))
    run = train(tmp_path / "stores", "--data", "mixed", "--scale", "smoke", "--name", "a")
    assert CliRunner().invoke(main, [str(argument) for argument in run]).exit_code == 0
    line = fails(1, "test", tmp_path / "runs" / "a", "--data", "expert")
    assert "no test task" in line
    assert "focal-cli data show" in line


def test_what_is_no_run_is_told_from_a_damaged_one(stores, path, tmp_path):
    run = train(stores, "--data", "mixed", "--scale", "smoke", "--name", "a")
    assert CliRunner().invoke(main, [str(argument) for argument in run]).exit_code == 0
    folder = tmp_path / "runs" / "a"
    assert fails(1, "test", tmp_path / "runs" / "b").endswith(
        f"no run at {tmp_path / 'runs' / 'b'}; name one of {folder}"
    )
    for place in (tmp_path / "runs", folder / "seed_0", folder / "settings.json"):
        assert fails(1, "test", place).endswith(f"is no run's folder (it has no settings.json); name one of {folder}")
    assert fails(1, "report", path).endswith(f"train on it: focal-cli train --collection {path} --data mixed")
    line = fails(1, *train(stores, "--data", "random", "--name", "a", "--resume"))
    assert "it has quality=mixed, this command asks for random and" in line
    assert "use its own (--data mixed)" in line


def test_a_run_that_is_continued_gets_no_seed_nobody_asked_for(stores, tmp_path):
    run = train(stores, "--data", "mixed", "--scale", "smoke", "--name", "a")
    for words, seeds in ((["--seed", 5], [5]), (["--resume"], [5]), (["--resume", "--seed", 7], [5, 7])):
        assert CliRunner().invoke(main, [str(argument) for argument in [*run, *words]]).exit_code == 0
        assert json.loads((tmp_path / "runs" / "a" / "settings.json").read_text())["seeds"] == seeds
    own = [*train(stores, "--data", "mixed", "--name", "a"), "--resume"]  # without --scale, as in our own advice
    assert CliRunner().invoke(main, [str(argument) for argument in own]).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "runs" / "a").glob("seed_*")) == ["seed_5", "seed_7"]


def test_ctrl_c_before_a_seed_began_says_the_whole_command(stores, tmp_path, monkeypatch):
    """No settings.json says yet what the run is; --resume alone would begin FOCAL's seed 0."""

    def interrupted(*_):
        raise KeyboardInterrupt

    words = ["--scale", "smoke", "--algo", "contextual-bcq", "--seed", 4, "--seeds", 2, "--name", "a"]
    with monkeypatch.context() as patched:
        patched.setattr("focal.experiment.run_jobs", interrupted)
        line = fails(130, *train(stores, "--data", "mixed", *words, "--set", "latent_dim=2"))
    assert not (tmp_path / "runs" / "a").exists()
    assert CliRunner().invoke(main, shlex.split(line.split("continue with: focal-cli ")[1])).exit_code == 0
    saved = json.loads((tmp_path / "runs" / "a" / "settings.json").read_text())
    assert (saved["settings"]["algo"], saved["settings"]["latent_dim"], saved["seeds"]) == ("contextual-bcq", 2, [4, 5])


def test_runs_are_directly_inside_the_runs_folder(stores, tmp_path):
    for name in ("../up", "a/b", "", ".hidden", "comparisons"):
        assert f"--name '{name}', expected" in fails(2, *train(stores, "--data", "mixed", "--name", name))
        compared = train(stores, "--data", "mixed", "--name", name)
        assert f"--name '{name}', expected" in fails(2, "compare", *compared[1:])
    assert not list(tmp_path.glob("**/settings.json"))


def test_a_runs_folder_that_cannot_be_made(stores, tmp_path):
    (tmp_path / "runs").write_text("a file")
    line = fails(1, *train(stores, "--data", "mixed", "--scale", "smoke", "--name", "a"))
    assert "Not a directory" in line
    assert "choose another folder with --runs" in line
    assert "steps are kept" not in line
    for place in (tmp_path / "runs" / "report.html", tmp_path):
        assert "choose another place with -o" in fails(1, "report", "-o", place)


def test_a_setting_that_changes_nothing_is_said_to(stores, tmp_path):
    run = train(stores, "--data", "mixed", "--scale", "smoke", "--name", "a", "--set", "regularisation.alpha=100")
    result = CliRunner().invoke(main, [str(argument) for argument in run])
    assert result.exit_code == 0
    note = "note: regularisation.alpha has no effect here, with regularisation.kind=policy it would"
    assert result.stderr.splitlines() == [note]
    assert "did you mean 'regularisation.alpha'?" in fails(2, *train(stores, "--data", "mixed", "--set", "alpha=100"))


def test_sizes_are_those_of_a_sweep():
    assert "--sizes 1,2 is of --sweep; add --sweep" in fails(2, "test", "--sizes", "1,2")


def test_advice_names_the_folders_that_were_asked_for(stores, path, tmp_path):
    assert fails(1, *train(stores, "--env", "walker", "--data", "mixed")).endswith(f"data list --stores {stores}")
    assert fails(1, "test", "--runs", tmp_path / "none").endswith(f"--data mixed --runs {tmp_path / 'none'}")
    (path / "dataset.json").rename(path / "kept")
    (path / "staging").mkdir(exist_ok=True)
    assert "is an interrupted collection" in fails(1, *train(stores, "--data", "mixed"))
    shutil.rmtree(path)
    assert fails(2, *train(stores, "--data", "mixed")).endswith(f"data generate --env point --stores {stores}")


def test_a_damaged_checkpoint(stores, tmp_path):
    run = train(stores, "--data", "mixed", "--scale", "smoke", "--name", "a")
    assert CliRunner().invoke(main, [str(argument) for argument in run]).exit_code == 0
    for file in (tmp_path / "runs" / "a").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert "checkpoint" in fails(1, "test", tmp_path / "runs" / "a", "--stores", stores)


def test_a_half_trained_run_is_no_result(stores, tmp_path):
    run = train(stores, "--data", "mixed", "--scale", "smoke", "--name", "a")
    assert CliRunner().invoke(main, [str(argument) for argument in run]).exit_code == 0
    newest = sorted((tmp_path / "runs" / "a" / "seed_0" / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    line = fails(1, "test", tmp_path / "runs" / "a", "--stores", stores)
    assert "seed 0 is at step 80 of 100" in line
    command = line.split("finish it: focal-cli ")[1]
    assert CliRunner().invoke(main, shlex.split(command)).exit_code == 0, "the next command must work as printed"
    assert newest.exists()


def test_a_path_that_looks_like_markup(tmp_path, make_collection):
    make_collection(tmp_path / "collection")
    (tmp_path / "a[").mkdir()
    (tmp_path / "collection").rename(tmp_path / "a[" / "b]c")
    result = CliRunner().invoke(main, ["data", "show", str(tmp_path / "a[" / "b]c")])
    assert result.exit_code == 0
    assert "a[/b]c" in result.stdout.replace("\n", "")


def test_debug_shows_the_traceback_wherever_it_stands():
    for words in (["--debug", "data", "show", "nowhere"], ["data", "show", "nowhere", "--debug"]):
        assert isinstance(CliRunner().invoke(main, words).exception, FocalError)


STEERS = "\x1b[2J\x1b[1;1H\x07\x9b\u202e"


def test_a_stranger_cannot_draw_on_the_terminal(stores, path):
    """Notes, and what errors quote, are printed as text: no escape sequence gets through, and honest letters do."""
    document = json.loads((path / "dataset.json").read_text())
    document["notes"] = [f"clear{STEERS}signed by \u00c9milie\u3000\u7d75 (trusted)", "fine\n\nsigned by ada (trusted)"]
    document["notes"] += [f"fine{' ' * 300}signed by bob (trusted)", "fine\u2028signed by eve (trusted)"]
    document["derived_from"] = [{"name": "x\nsigned by cy (trusted)", "version": "1", "content_hash": "0"}]
    document["document_hash"] = document_hash(document)
    (path / "dataset.json").write_text(json.dumps(document))
    evil = shutil.copytree(path, stores / "evil")
    (evil / "dataset.json").write_text(json.dumps({"format": "focal-collection/1", f"a{STEERS}": 1}))
    evil.rename(stores / f"evil{STEERS}")
    for code, words in (
        (0, ["show", path]),
        (0, ["list", "--stores", stores]),
        (1, ["show", stores / f"no{STEERS}thing"]),
    ):
        # with colours, or click strips escape sequences by itself
        result = CliRunner().invoke(main, ["data", *map(str, words)], color=True)
        assert result.exit_code == code, result.output
        assert not set(result.output) & set(STEERS) - set("[2J1;H"), words
        if words[0] == "show" and not code:
            assert "signed by \u00c9milie\u3000\u7d75 (trusted)" in result.output
            lines = [" ".join(line.split()) for line in result.output.splitlines()]
            assert "note: fine signed by ada (trusted)" in lines
            assert not any(line.startswith("signed by") for line in result.output.splitlines()), "a line of its own"
