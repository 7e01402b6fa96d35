"""Foreign data become collections that say what they are: ends restored, nothing made up, hostile input refused."""

import json
import re
import shutil
import warnings
import zipfile
from dataclasses import replace

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from focal.cli import main
from focal.datasets import End, Episodes, Quality, open_collection, relabel_collection, verify_collection
from focal.datasets.foreign import IMPOSSIBLE, TIME_LIMITS, FamilyFacts, Notes, restored_ends
from focal.datasets.importing import ImportRequest, import_collection, list_tasks
from focal.datasets.quality import QualityRule
from focal.envs.tasks import published_goals
from focal.errors import DiskFullError, FocalError, UsageError
from focal.evaluation import OfflineTransitions, meta_test, select_test_tasks
from focal.importing import expert_test, family_facts, plan_tasks

from .foreign_files import split, write_focal_iclr, write_unicorn
from .test_evaluation_metatest import GoalReader, Idle


def cli(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr.strip().splitlines()[-1]


def load(source, form, path, env="point", tasks_file=None, split=None, horizon=None, **changes):
    """Import as the command line does."""
    facts = family_facts(env, horizon)
    tasks = plan_tasks(env, list_tasks(source, form), tasks_file, split)
    fields = {"licence": "CC-BY-4.0", "expert_test": expert_test(env, facts.horizon), **changes}
    return import_collection(ImportRequest(source, form, path, facts, tasks, **fields))


def refused(*arguments, **changes):
    path = arguments[2]
    before = sorted(path.parent.iterdir())
    with pytest.raises((FocalError, UsageError)) as caught:
        load(*arguments, **changes)
    assert "\n" not in str(caught.value)
    assert sorted(path.parent.iterdir()) == before, "nothing half-made is left"
    return str(caught.value)


def made_up(lengths, obs_dim, act_dim, seed=0):
    """Episodes of noise: every state is different, so that nothing but an episode's end looks like one."""
    rng, lengths = np.random.default_rng(seed), np.array(lengths, "i4")
    total, count = lengths.sum(), len(lengths)
    return Episodes(
        observations=rng.normal(size=(total + count, obs_dim)).astype("f4"),
        actions=rng.uniform(-1, 1, (total, act_dim)).astype("f4"),
        rewards=rng.normal(size=total).astype("f4"),
        infos={},
        lengths=lengths,
        ends=np.full(count, End.TRUNCATED, "u1"),
        returns=np.zeros(count),
        qualities=np.zeros(count, "u1"),
        sac_steps=np.zeros(count, "i8"),
        seeds=np.zeros(count, "i8"),
        heldout=np.zeros(count, "u1"),
    )


def assert_same_steps(found, expected):
    """Transitions bit for bit in float32."""
    for name in ("observations", "actions", "rewards", "lengths"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def assert_same_sparse(found, expected):
    """Where the robot is not exactly on the rim of the goal, which float32 cannot tell."""
    inside = np.abs(expected.rewards + 0.2) > 1e-6
    assert np.allclose(found.infos["sparse_reward"][inside], expected.infos["sparse_reward"][inside], atol=1e-5)
    assert inside.mean() > 0.9


# ---- time limits ----

H = FamilyFacts("f", "focal/F-v0", 200, 1, 1, None, terminates=True)
TERMINATED, TRUNCATED, CUT = End.TERMINATED, End.TRUNCATED, End.CUT


@pytest.mark.parametrize(
    ("lengths", "terminated", "limited", "terminates", "expected", "restored"),
    [
        # no flag of time limits: what ends exactly there is one
        ([200, 50, 200], [1, 1, 1], None, True, [TRUNCATED, TERMINATED, TRUNCATED], 2),
        # the source tells them apart: its word counts, even for a fall in the last step
        ([200, 50, 200], [0, 1, 1], [1, 0, 0], True, [TRUNCATED, TERMINATED, TERMINATED], 0),
        # it has the flag but marks every time limit terminal as well
        ([200, 50], [1, 1], [1, 0], True, [TRUNCATED, TERMINATED], 1),
        # a family that cannot terminate there
        ([200, 200], [1, 0], [0, 1], False, [TRUNCATED, TRUNCATED], 1),
        # no flag at all: the time limit came, or the collector stopped
        ([200, 50], [0, 0], [0, 0], True, [TRUNCATED, CUT], 0),
        # a time limit of the source's own, before ours
        ([100], [0], [1], True, [TRUNCATED], 0),
    ],
)
def test_time_limits_are_restored(lengths, terminated, limited, terminates, expected, restored):
    notes = Notes()
    flags = None if limited is None else np.array(limited, bool)
    facts = replace(H, terminates=terminates)
    ends = restored_ends(np.array(lengths), np.array(terminated, bool), flags, facts, notes)
    assert ends.tolist() == expected
    assert notes.sentences() == ((f"{TIME_LIMITS}: {restored}",) if restored else ())


def test_terminations_of_a_family_that_never_terminates():
    facts, notes = replace(H, terminates=False), Notes()
    with pytest.raises(FocalError, match=r"every episode terminates after 100 steps, expected none to.*--horizon 100"):
        restored_ends(np.array([100, 100]), np.array([True, True]), None, facts, notes)
    ends = restored_ends(np.array([100, 60, 200]), np.array([True, True, True]), None, facts, notes)
    assert ends.tolist() == [TERMINATED, TERMINATED, TRUNCATED]
    assert notes.sentences() == (f"{TIME_LIMITS}: 1", f"{IMPOSSIBLE}: 2")


# ---- UNICORN and CORRO ----


@pytest.fixture
def unicorn(tmp_path, make_episodes):
    """Five goals of the point robot; walks[name] is what was written there."""
    walks = {}
    for seed, angle in enumerate(np.linspace(0.1, 3.0, 5)):
        goal = (round(float(np.cos(angle)), 3), round(float(np.sin(angle)), 3))
        name = f"seed_{seed}_goal_{goal[0]}_{goal[1]}"
        walks[name] = make_episodes(goal, 0.5, 4, seed=seed)
        write_unicorn(tmp_path / "data" / name, walks[name])
    (tmp_path / "data" / "log.txt").write_text("other files are passed over")
    return tmp_path / "data", walks


def test_unicorn(unicorn, tmp_path):
    source, walks = unicorn
    collection = load(source, "unicorn", tmp_path / "out", licence="MIT", authors=("A",))
    assert (collection.licence, collection.authors, collection.scale) == ("MIT", ("A",), "laptop")
    assert (collection.name, collection.family) == ("sparse-point-robot-unicorn", "sparse-point-robot")
    assert (len(collection.train_tasks()), len(collection.test_tasks())) == (4, 1)
    for entry, (name, written) in zip(collection.tasks, walks.items(), strict=True):
        assert entry.record.params == {"goal": [float(number) for number in name.split("_")[3:]]}
        assert entry.record.env_settings == {"task": entry.record.params}
        assert entry.record.provenance["source"] == name
        episodes = collection.load(entry.index)
        assert_same_steps(episodes, written)
        assert_same_sparse(episodes, written)
        assert (episodes.ends == End.TRUNCATED).all()
        assert episodes.seeds.tolist() == [-1] * 4
        assert np.allclose(episodes.returns, [part[2].sum(dtype=float) for part in split(written)])
        assert episodes.heldout.sum() == 1
        assert (entry.labels, entry.counts["mixed"].episodes, entry.counts["random"].episodes) == ("given", 4, 0)
        assert not entry.record.references.known
    verify_collection(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- task parameters rounded to 3 decimals, as the source's folder names hold them: 5" in card
    assert "No reference returns are known" in card
    assert "The levels of 5 of 5 tasks came with the data" in card
    with pytest.raises(FocalError, match="levels of task 0 were given by its source"):
        relabel_collection(tmp_path / "out", tmp_path / "again", QualityRule())


def test_unicorn_episodes_that_end_early(tmp_path):
    """The original loader cuts every 200 rows; the ends are where a step arrives elsewhere than the next begins."""
    written = made_up([200, 150, 200, 70], 27, 8)
    for seed, angle in enumerate(("0.0", "3.142")):
        write_unicorn(tmp_path / "data" / f"seed_{seed}_goal_{angle}", written)
    collection = load(tmp_path / "data", "unicorn", tmp_path / "out", "ant-dir")
    assert [entry.record.params for entry in collection.tasks] == [{"direction": 1.0}, {"direction": -1.0}]
    assert [entry.split for entry in collection.tasks] == ["both", "both"]
    episodes = collection.load(0)
    assert_same_steps(episodes, written)
    assert episodes.ends.tolist() == [TRUNCATED, TERMINATED, TRUNCATED, CUT]
    assert any(note.startswith("episodes shorter than the time limit") for note in collection.header.notes)


def test_unicorn_terminal_flags(tmp_path):
    """A flag ends an episode; at the time limit it is the time limit's."""
    written = made_up([200, 150], 27, 8)
    terminals = np.zeros(350)
    terminals[[199, 349]] = 1
    write_unicorn(tmp_path / "data" / "seed_0_goal_0.0", written, terminals)
    collection = load(tmp_path / "data", "unicorn", tmp_path / "out", "ant-dir")
    assert collection.load(0).ends.tolist() == [TRUNCATED, TERMINATED]
    assert f"{TIME_LIMITS}: 1" in collection.header.notes


def test_unicorn_split_and_label(unicorn, tmp_path):
    collection = load(unicorn[0], "unicorn", tmp_path / "out", split="3/2", label="medium", seed=4)
    assert (len(collection.train_tasks()), len(collection.test_tasks())) == (3, 2)
    assert all(entry.counts["medium"].episodes == 4 for entry in collection.tasks)
    assert collection.header.seed == 4
    message = refused(unicorn[0], "unicorn", tmp_path / "b", split="3/3")
    assert "3 training and 3 test tasks, expected at least one of each and 5 together" in message
    assert "expected TRAIN/TEST" in refused(unicorn[0], "unicorn", tmp_path / "b", split="3")
    message = refused(unicorn[0], "unicorn", tmp_path / "b", label="scores")
    assert "--label scores needs data whose source names the checkpoint" in message


def test_a_test_task_that_is_a_training_task_is_named(unicorn, tmp_path):
    """Rounding makes two tasks one; nobody should call the result a test on unseen tasks."""
    source, walks = unicorn
    for folder in source.glob("seed_*"):
        shutil.rmtree(folder)
    for seed in (0, 1):
        write_unicorn(source / f"seed_{seed}_goal_0.995_0.1", next(iter(walks.values())))
    collection = load(source, "unicorn", tmp_path / "out")
    assert "test tasks with the same parameters as a training task, so not unseen: 1" in collection.header.notes


def rename(source, name):
    next(source.glob("seed_0_*")).rename(source / name)


def link(source, target):
    folder = next(source.glob("seed_0_*"))
    (source.parent / "elsewhere").mkdir()
    target = folder if target is None else folder / target
    moved = target.rename(source.parent / "elsewhere" / target.name)
    target.symlink_to(moved)


def rewrite(source, name, change):
    path = next(source.glob("seed_0_*")) / f"{name}.npy"
    np.save(path, change(np.load(path)))


UNICORN_ATTACKS = {
    "a path in the name": (lambda s: rename(s, "seed_0_goal_.."), "found 'seed_0_goal_..'"),
    "a nested name": (lambda s: rename(s, "seed_0_goal_1.0_..%2f..%2fetc"), "expected folders like seed_0_goal_1.234"),
    "no number": (lambda s: rename(s, "seed_0_goal_nan_inf"), "expected folders like seed_0_goal_1.234"),
    "a huge number": (lambda s: rename(s, "seed_0_goal_1e999_0.0"), "expected folders like seed_0_goal_1.234"),
    "a control character": (lambda s: rename(s, "seed_0_goal_1.0_0.0\n"), r"found 'seed_0_goal_1.0_0.0\\n'"),
    "too few numbers": (lambda s: rename(s, "seed_0_goal_1.0"), "has 1 numbers in its goal, expected 2"),
    "another goal": (lambda s: rename(s, "seed_0_goal_-1.0_0.0"), "expected minus the distance"),
    "a linked folder": (lambda s: link(s, None), "expected folders like seed_0_goal_1.234"),
    "a linked file": (lambda s: link(s, "actions.npy"), "cannot read"),
    "objects": (lambda s: rewrite(s, "rewards", lambda a: a.astype(object)), "nothing is unpickled here"),
    "a missing row": (lambda s: rewrite(s, "rewards", lambda a: a[:-1]), r"found shape \(79, 1\), expected \(80, 1\)"),
    "another width": (lambda s: rewrite(s, "obs", lambda a: a[:, :1]), r"found shape \(80, 1\), expected \(rows, 2\)"),
    "nothing": (lambda s: rewrite(s, "obs", lambda a: a[:0]), r"found shape \(0, 2\)"),
    "large actions": (lambda s: rewrite(s, "actions", lambda a: a * 7), "expected -1 to 1 as in every family"),
    "NaN": (lambda s: rewrite(s, "actions", lambda a: a * np.nan), "expected -1 to 1 as in every family"),
    "infinite rewards": (lambda s: rewrite(s, "rewards", lambda a: a - 1e300), "expected minus the distance"),
    "no file": (lambda s: (next(s.glob("seed_0_*")) / "obs.npy").unlink(), "cannot read"),
}


@pytest.mark.parametrize("name", UNICORN_ATTACKS)
def test_hostile_unicorn_folders(unicorn, tmp_path, name):
    attack, message = UNICORN_ATTACKS[name]
    attack(unicorn[0])
    found = refused(unicorn[0], "unicorn", tmp_path / "out")
    assert re.search(message, found)
    assert "focal-cli data generate" not in found, "these data are not ours to make again"


def test_a_header_that_claims_terabytes(unicorn, tmp_path):
    path = next(unicorn[0].glob("seed_0_*")) / "obs.npy"
    path.write_bytes(path.read_bytes().replace(b"(80, 2), }" + b" " * 9, b"(80000000000, 2), }"))
    assert "bytes of content, expected the" in refused(unicorn[0], "unicorn", tmp_path / "out")


def test_another_time_limit_must_be_said(tmp_path, make_episodes):
    walks = make_episodes((1.0, 0.0), 0.5, 3, horizon=30)
    write_unicorn(tmp_path / "data" / "seed_0_goal_1.0_0.0", walks)
    write_unicorn(tmp_path / "data" / "seed_1_goal_1.0_-0.0", walks)
    message = refused(tmp_path / "data", "unicorn", tmp_path / "out")
    assert "an episode of 30 steps, expected at most 20" in message
    assert "--horizon 30" in message
    collection = load(tmp_path / "data", "unicorn", tmp_path / "out", horizon=30)
    assert collection.horizon == 30
    assert (collection.load(0).ends == End.TRUNCATED).all()


def test_a_folder_without_tasks(tmp_path):
    for form in ("unicorn", "focal-iclr", "d4rl", "minari"):
        assert "holds no task of format" in refused(tmp_path, form, tmp_path / "out")
        assert "no data at" in refused(tmp_path / "none", form, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    assert "is no folder" in refused(tmp_path / "file", "unicorn", tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path)
    assert "is no folder" in refused(tmp_path / "link", "unicorn", tmp_path / "out")


# ---- the original FOCAL code ----


@pytest.fixture
def iclr(tmp_path, make_episodes):
    """Three released goals, four checkpoints of skill 0 to 1, six stochastic and two deterministic episodes each."""
    walks = {}
    for index in (0, 3, 11):
        goal = published_goals(100)[index]["goal"]
        parts = [make_episodes(goal, skill, 6, sac_step=step, seed=index)
                 for step, skill in ((2200, 0.0), (2400, 0.4), (9800, 1.0), (10000, 0.95))]  # fmt: skip
        walks[index] = Episodes.concatenate(parts)
        for part in parts:
            write_focal_iclr(tmp_path / "data" / f"goal_idx{index}", part, protocol=2 + index % 2)
            few = part.select(np.arange(6) < 2)
            write_focal_iclr(tmp_path / "data" / f"goal_idx{index}", few, sample=False)
    return tmp_path / "data", walks


def test_focal_iclr(iclr, tmp_path):
    source, walks = iclr
    collection = load(source, "focal-iclr", tmp_path / "out", split="2/1")
    for entry, (index, written) in zip(collection.tasks, walks.items(), strict=True):
        assert entry.record.params == published_goals(100)[index]
        assert entry.record.provenance["source"] == f"goal_idx{index}"
        episodes = collection.load(entry.index)
        assert_same_steps(episodes, written)
        assert_same_sparse(episodes, written)
        assert episodes.sac_steps.tolist() == np.repeat([2200, 2400, 9800, 10000], 6).tolist(), "by number, not by name"
        assert (episodes.ends == End.TRUNCATED).all()
        assert entry.labels == "given"
    verify_collection(tmp_path / "out")
    assert f"{TIME_LIMITS}: 72" in collection.header.notes
    assert any("no normalizer.npz" in note for note in collection.header.notes)


def test_focal_iclr_scores(iclr, tmp_path):
    source, walks = iclr
    collection = load(source, "focal-iclr", tmp_path / "out", split="2/1", label="scores")
    verify_collection(tmp_path / "out")
    for entry, written in zip(collection.tasks, walks.values(), strict=True):
        returns = collection.load(entry.index).returns.reshape(4, 6)
        references = entry.record.references
        assert references.random_returns == tuple(returns[0])
        assert references.expert_returns == tuple(returns[2])
        assert references.expert_sac_step == 9800
        assert len(references.random_deterministic) == len(references.expert_sparse_deterministic) == 2
        assert references.reached_expert
        assert "of the optimum's sparse return" in references.expert_test
        assert "random is the source's earliest checkpoint (step 2200)" in references.expert_test
        scores = (returns.mean(axis=1) - returns[0].mean()) / (returns[2].mean() - returns[0].mean())
        levels = collection.load(entry.index).qualities.reshape(4, 6)
        assert (levels.min(axis=1) == levels.max(axis=1)).all()
        expected = [Quality.RANDOM, Quality.MEDIUM if 0.35 <= scores[1] <= 0.65 else Quality.NONE, Quality.EXPERT,
                    Quality.EXPERT if scores[3] >= 0.9 else Quality.NONE]  # fmt: skip
        assert levels[:, 0].tolist() == expected
        assert written.num_episodes == 24
    relabelled = relabel_collection(tmp_path / "out", tmp_path / "again", QualityRule(expert_from=0.999))
    assert relabelled.tasks[0].counts["expert"].episodes == 6


def test_focal_iclr_without_an_expert(tmp_path, make_episodes):
    """The absolute test decides, not only the place among the source's own checkpoints."""
    for index in (0, 1):
        for step, skill in ((0, 0.0), (100, 0.1)):
            walks = make_episodes(published_goals(100)[index]["goal"], skill, 6, sac_step=step)
            write_focal_iclr(tmp_path / "data" / f"goal_idx{index}", walks)
    collection = load(tmp_path / "data", "focal-iclr", tmp_path / "out", label="scores")
    references = collection.tasks[0].record.references
    assert not references.reached_expert
    assert "on stochastic episodes, there are no others" in references.expert_test
    assert collection.tasks[0].counts["expert"].episodes == 0


def test_focal_iclr_normaliser(iclr, tmp_path):
    """Observations divided in the source come back as the environment gives them."""
    source, walks = iclr
    np.savez(source / "normalizer.npz", abs_max=np.array([0.5, 2.0]))
    message = refused(source, "focal-iclr", tmp_path / "out")
    assert "expected minus the distance" in message, "these were not divided, and the rewards show it"
    for folder in source.glob("goal_idx*"):
        for file in folder.iterdir():
            file.unlink()
        written = walks[int(folder.name.removeprefix("goal_idx"))]
        divided = replace(written, observations=(written.observations / np.array([0.5, 2.0])).astype("f4"))
        write_focal_iclr(folder, divided)
    collection = load(source, "focal-iclr", tmp_path / "out")
    assert np.allclose(collection.load(0).observations, walks[0].observations, atol=1e-6)
    assert any("abs_max + 1e-8" in note for note in collection.header.notes)


@pytest.mark.parametrize(
    ("abs_max", "message"),
    [
        (np.ones(3), "is no 2 numbers"),
        (np.array([1, np.nan]), "is no 2 numbers"),
        (np.array([None, 1]), "nothing is unpickled here"),
    ],
)
def test_hostile_normalisers(iclr, tmp_path, abs_max, message):
    np.savez(iclr[0] / "normalizer.npz", abs_max=abs_max)
    assert message in refused(iclr[0], "focal-iclr", tmp_path / "out")
    (iclr[0] / "normalizer.npz").write_bytes(b"PK\x05\x06")
    assert "holds no readable abs_max" in refused(iclr[0], "focal-iclr", tmp_path / "out")


def test_normalisers_that_decompress_without_end(iclr, tmp_path):
    """bz2 is refused, whatever it claims; deflate is read up to a bound; a flipped byte is an error of the file."""
    archive, content = iclr[0] / "normalizer.npz", bytes(4 * 2**20)
    reasons = {zipfile.ZIP_BZIP2: "a compression that NumPy does not write", zipfile.ZIP_DEFLATED: "more than"}
    for method, reason in reasons.items():
        with zipfile.ZipFile(archive, "w", method) as file:
            file.writestr("abs_max.npy", content)
        message = refused(iclr[0], "focal-iclr", tmp_path / "out")
        assert f"holds no readable abs_max ({reason}" in message
        assert "expected 2 numbers; get the file again" in message
    np.savez_compressed(archive, abs_max=np.ones(2))
    data = bytearray(archive.read_bytes())
    data[30 + len("abs_max.npy") + 20] ^= 0xFF  # within the deflate stream, after the header of the entry
    archive.write_bytes(data)
    assert "holds no readable abs_max" in refused(iclr[0], "focal-iclr", tmp_path / "out")


def test_focal_iclr_folders(iclr, tmp_path):
    source, _ = iclr
    (source / "goal_idx3").rename(source / "goal_idx..")
    assert "expected folders like goal_idx0" in refused(source, "focal-iclr", tmp_path / "out")
    (source / "goal_idx..").rename(source / "goal_idx500")
    assert "expected index below 100" in refused(source, "focal-iclr", tmp_path / "out")
    (source / "goal_idx500").rename(tmp_path / "moved")
    (source / "goal_idx3").symlink_to(tmp_path / "moved")
    assert "found 'goal_idx3', expected folders" in refused(source, "focal-iclr", tmp_path / "out")
    (source / "goal_idx3").unlink()
    (source / "goal_idx4").mkdir()
    assert "goal_idx4 holds no episode" in refused(source, "focal-iclr", tmp_path / "out")


def test_walker_needs_its_parameters(tmp_path):
    for index in (0, 1):
        write_focal_iclr(tmp_path / "data" / f"goal_idx{index}", made_up([200, 90], 17, 6))
    message = refused(tmp_path / "data", "focal-iclr", tmp_path / "out", "walker")
    assert "expected --tasks FILE, as the released tasks of walker-2d-params are not recoverable" in message
    params = {"body_mass": [1.0] * 8, "body_inertia": [[1.0] * 3] * 8, "dof_damping": [1.0] * 9,
              "geom_friction": [[1.0] * 3] * 8}  # fmt: skip
    said = {f"goal_idx{index}": {"params": params, "split": name} for index, name in enumerate(("test", "train"))}
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": said}))
    collection = load(tmp_path / "data", "focal-iclr", tmp_path / "out", "walker", tmp_path / "tasks.json")
    assert [entry.split for entry in collection.tasks] == ["test", "train"]
    assert collection.load(0).ends.tolist() == [TRUNCATED, TERMINATED]


@pytest.mark.parametrize(("env", "expected"), [("cheetah-dir", [-1.0, 1.0]), ("ant-dir", [1.0, -1.0])])
def test_released_order_of_directions(tmp_path, env, expected):
    """Half-Cheetah's task 0 ran backward in the released code, Ant's forward."""
    facts = family_facts(env)
    for index in (0, 1):
        write_focal_iclr(
            tmp_path / "data" / f"goal_idx{index}", made_up([200], facts.observation_dim, facts.action_dim)
        )
    collection = load(tmp_path / "data", "focal-iclr", tmp_path / "out", env)
    assert [entry.record.params["direction"] for entry in collection.tasks] == expected


def test_released_velocities_keep_their_split(tmp_path):
    for index in (0, 40, 79, 80, 99):
        write_focal_iclr(tmp_path / "data" / f"goal_idx{index}", made_up([200], 20, 6))
    collection = load(tmp_path / "data", "focal-iclr", tmp_path / "out", "cheetah-vel", split="3/2")
    assert [entry.split for entry in collection.tasks] == ["train"] * 3 + ["test"] * 2
    assert collection.tasks[0].record.params["target_velocity"] == pytest.approx(0.786074, abs=1e-6)


# ---- D4RL ----


def write_d4rl(path, episodes, terminals=None, timeouts=None, following=True, **more):
    steps = episodes.transitions()
    arrays = {
        "observations": episodes.observations[steps.rows],
        "actions": episodes.actions,
        "rewards": episodes.rewards,
        "terminals": steps.terminated if terminals is None else terminals,
        **({"timeouts": timeouts} if timeouts is not None else {}),
        **({"next_observations": episodes.observations[steps.rows + 1]} if following else {}),
        **more,
    }
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        file["metadata/algorithm"] = "SAC"  # strings that no import reads
        for name, values in arrays.items():
            file.create_dataset(name, data=values, compression="gzip")


def at_ends(episodes, which):
    flags = np.zeros(episodes.num_steps, bool)
    flags[(np.cumsum(episodes.lengths) - 1)[np.array(which, bool)]] = True
    return flags


def tasks_file(tmp_path, **tasks):
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps({"tasks": {name.replace("_hdf5", ".hdf5"): entry for name, entry in tasks.items()}}))
    return path


VELOCITY = {"params": {"target_velocity": 1}}


def test_d4rl(tmp_path):
    written = made_up([200, 200, 60, 200], 27, 8)
    timeouts = at_ends(written, [1, 1, 0, 1])
    for name in ("a", "b"):
        write_d4rl(tmp_path / "data" / f"{name}.hdf5", written, at_ends(written, [0, 0, 1, 0]), timeouts)
    said = tasks_file(tmp_path, a_hdf5={"params": {"direction": -1}}, b_hdf5={"params": {"direction": 1}})
    collection = load(tmp_path / "data", "d4rl", tmp_path / "out", "ant-dir", said)
    assert [entry.record.params for entry in collection.tasks] == [{"direction": -1.0}, {"direction": 1.0}]
    episodes = collection.load(0)
    assert_same_steps(episodes, written)
    assert episodes.ends.tolist() == [TRUNCATED, TRUNCATED, TERMINATED, TRUNCATED]
    assert not collection.header.notes
    verify_collection(tmp_path / "out")


def test_d4rl_without_timeouts(tmp_path):
    """What the source calls terminal at the time limit is a time limit, and the card says so."""
    written = made_up([200, 60, 200, 30], 27, 8)
    write_d4rl(tmp_path / "a.hdf5", written, at_ends(written, [1, 1, 1, 0]))
    said = tasks_file(tmp_path, a_hdf5={"params": {"direction": 1}})
    collection = load(tmp_path / "a.hdf5", "d4rl", tmp_path / "out", "ant-dir", said)
    assert collection.load(0).ends.tolist() == [TRUNCATED, TERMINATED, TRUNCATED, CUT]
    assert f"- {TIME_LIMITS}: 2" in (tmp_path / "out" / "README.md").read_text()


def test_d4rl_without_next_observations(tmp_path):
    """Where an episode's last step arrived is not known, so the step is left out; nothing is made up."""
    written = made_up([200, 200, 1], 20, 6)
    for name in ("a", "b"):
        path = tmp_path / "data" / f"{name}.hdf5"
        write_d4rl(path, written, np.zeros(401, bool), at_ends(written, [1, 1, 1]), following=False)
    said = tasks_file(tmp_path, a_hdf5=VELOCITY, b_hdf5=VELOCITY)
    collection = load(tmp_path / "data", "d4rl", tmp_path / "out", "cheetah-vel", said)
    episodes = collection.load(0)
    assert episodes.lengths.tolist() == [199, 199]
    assert episodes.ends.tolist() == [CUT, CUT]
    kept = np.ones(404, bool)
    kept[[200, 401, 402, 403]] = False
    assert np.array_equal(episodes.observations, written.observations[kept])
    assert any("last steps of episodes left out" in note for note in collection.header.notes)
    write_d4rl(path, written, at_ends(written, [0, 1, 1]), at_ends(written, [1, 0, 0]), following=False)
    message = refused(tmp_path / "data", "d4rl", tmp_path / "b", "cheetah-vel", said)
    assert "has episodes that terminate but no next_observations" in message


def test_d4rl_that_does_not_say_where_episodes_end(tmp_path):
    """Two episodes end to end would else be one with a step from the end of the first to the start of the second."""
    written = made_up([200, 200], 20, 6)
    write_d4rl(tmp_path / "a.hdf5", written, np.zeros(400, bool), following=False)
    said = tasks_file(tmp_path, a_hdf5={**VELOCITY, "split": "both"})
    message = refused(tmp_path / "a.hdf5", "d4rl", tmp_path / "out", "cheetah-vel", said)
    assert "nothing says where its episodes end" in message
    assert "--horizon" not in message


def test_d4rl_names_the_time_limit_before_it_leaves_steps_out(tmp_path):
    written = made_up([400, 400], 20, 6)
    write_d4rl(tmp_path / "a.hdf5", written, np.zeros(800, bool), at_ends(written, [1, 1]), following=False)
    said = tasks_file(tmp_path, a_hdf5={**VELOCITY, "split": "both"})
    message = refused(tmp_path / "a.hdf5", "d4rl", tmp_path / "out", "cheetah-vel", said)
    assert message.endswith("say so: --horizon 400")


def test_d4rl_without_anything_to_learn_from(tmp_path):
    path = tmp_path / "data" / "a.hdf5"
    said = tasks_file(tmp_path, a_hdf5={"params": {"direction": 1}})
    write_d4rl(path, made_up([], 27, 8))
    assert "has no transitions, expected at least one" in refused(path, "d4rl", tmp_path / "o", "ant-dir", said)
    ones = made_up([1, 1, 1], 27, 8)
    write_d4rl(path, ones, np.zeros(3, bool), at_ends(ones, [1, 1, 1]), following=False)
    message = refused(path, "d4rl", tmp_path / "o", "ant-dir", said)
    assert "has episodes of one step only and no next_observations" in message


def test_the_least_whole_number_is_no_action(tmp_path):
    """|-128| is -128 in eight bits."""
    written = made_up([200, 200], 27, 8)
    path = tmp_path / "data" / "a.hdf5"
    integers = replace(written, actions=np.full((400, 8), -128, "i1"))
    write_d4rl(path, integers, at_ends(written, [0, 0]), at_ends(written, [1, 1]))
    said = tasks_file(tmp_path, a_hdf5={"params": {"direction": 1}})
    assert "actions of up to 128" in refused(path, "d4rl", tmp_path / "o", "ant-dir", said)


def test_d4rl_parameters_must_be_said(tmp_path):
    write_d4rl(tmp_path / "data" / "a.hdf5", made_up([200], 20, 6))
    write_d4rl(tmp_path / "data" / "b.hdf5", made_up([200], 20, 6, seed=1))
    source, out = tmp_path / "data", tmp_path / "out"

    def answer(**tasks):
        return refused(source, "d4rl", out, "cheetah-vel", tasks_file(tmp_path, **tasks) if tasks else None)

    message = answer()
    assert 'expected --tasks FILE with {"tasks": {"a.hdf5": {"params": {"target_velocity": ' in message
    assert "parameters of task b.hdf5 are not known" in answer(a_hdf5=VELOCITY)
    assert "describes 'c.hdf5', which is not in the source" in answer(c_hdf5=VELOCITY)
    assert "did you mean 'params'?" in answer(a_hdf5={"param": {}}, b_hdf5=VELOCITY)
    assert "has split 'dev'" in answer(a_hdf5={**VELOCITY, "split": "dev"}, b_hdf5=VELOCITY)
    for params in (
        {"target_velocity": "1"},
        {"target_velocity": [1]},
        {"velocity": 1},
        {},
        3,
        {"target_velocity": True},
    ):
        assert "expected the form" in answer(a_hdf5={"params": params}, b_hdf5=VELOCITY)
    (tmp_path / "list.json").write_text("[]")
    assert "not a JSON object" in refused(source, "d4rl", out, "cheetah-vel", tmp_path / "list.json")
    (tmp_path / "list.json").write_text('{"tasks": []}')
    assert 'no object "tasks" of objects' in refused(source, "d4rl", out, "cheetah-vel", tmp_path / "list.json")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rewards": np.zeros(199, "f4")}, "rows, expected 199 as in rewards"),
        ({"rewards": np.zeros((200, 2), "f4")}, "found shape [200, 2]"),
        ({"actions": np.zeros((200, 5), "f4")}, "found shape [200, 5], expected [rows, 6]"),
        ({"observations": np.full((200, 20), np.inf, "f4")}, "arrives elsewhere"),
        ({"next_observations": np.zeros((200, 20), "f4")}, "arrives elsewhere than step 1 of the same episode begins"),
        ({"rewards": np.full(200, np.nan, "f4")}, "not finite"),
        ({"rewards": np.array([b"x"] * 200)}, "found type |S1"),
    ],
)
def test_d4rl_arrays_that_do_not_fit(tmp_path, more, message):
    write_d4rl(tmp_path / "a.hdf5", made_up([200], 20, 6), **{"timeouts": at_ends(made_up([200], 20, 6), [1]), **more})
    said = tasks_file(tmp_path, a_hdf5={**VELOCITY, "split": "both"})
    found = refused(tmp_path / "a.hdf5", "d4rl", tmp_path / "out", "cheetah-vel", said)
    assert message in found


def test_d4rl_external_link(tmp_path):
    """The whole way from a hostile file to the refusal."""
    write_d4rl(tmp_path / "a.hdf5", made_up([200], 20, 6))
    write_d4rl(tmp_path / "other.hdf5", made_up([200], 20, 6))
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        del file["rewards"]
        file["rewards"] = h5py.ExternalLink("other.hdf5", "/rewards")
    said = tasks_file(tmp_path, a_hdf5={**VELOCITY, "split": "both"})
    assert "found an external link" in refused(tmp_path / "a.hdf5", "d4rl", tmp_path / "out", "cheetah-vel", said)


# ---- Minari ----


@pytest.fixture
def minari_source(tmp_path, monkeypatch):
    """A data set that the minari package itself wrote, of two velocities."""
    minari = pytest.importorskip("minari")
    gymnasium = pytest.importorskip("gymnasium")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    written = {}
    for index, lengths in enumerate(([200, 80, 200], [200, 200])):
        written[f"cheetah/vel{index}-v0"] = episodes = made_up(lengths, 20, 6, seed=index)
        buffers = []
        for number, (observations, actions, rewards) in enumerate(split(episodes)):
            last = np.arange(len(actions)) == len(actions) - 1
            buffers.append(
                EpisodeBuffer(
                    id=number, seed=7 + number, observations=observations.astype("f8"), actions=actions,
                    rewards=rewards.tolist(), terminations=[False] * len(actions), truncations=last.tolist(),
                    infos={"x_velocity": np.arange(len(actions) + 1.0), "text": ["x"] * (len(actions) + 1)},
                )
            )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is no environment, and none is needed
            minari.create_dataset_from_buffers(
                dataset_id=f"cheetah/vel{index}-v0", buffer=buffers, author={"Grace"}, author_email={"g@example.org"},
                observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (20,), np.float64),
                action_space=gymnasium.spaces.Box(-1, 1, (6,), np.float32), algorithm_name="SAC", code_permalink="x",
                description="test",
            )  # fmt: skip
    said = {name: {"params": {"target_velocity": 0.5 + index}} for index, name in enumerate(written)}
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": said}))
    return tmp_path / "minari", written, tmp_path / "tasks.json"


def test_minari(minari_source, tmp_path):
    source, written, said = minari_source
    collection = load(source, "minari", tmp_path / "out", "cheetah-vel", said, split="1/1")
    for entry, episodes in zip(collection.tasks, written.values(), strict=True):
        found = collection.load(entry.index)
        assert_same_steps(found, episodes)
        assert (found.ends == End.TRUNCATED).all()
        assert found.seeds.tolist() == [7 + number for number in range(len(episodes.lengths))]
        steps = np.concatenate([np.arange(1.0, length + 1) for length in episodes.lengths])
        assert np.array_equal(found.infos["x_velocity"], steps.astype("f4")), "the reset's row is left out"
    verify_collection(tmp_path / "out")
    assert [entry.record.params["target_velocity"] for entry in collection.tasks] == [0.5, 1.5]


def test_one_minari_data_set(minari_source, tmp_path):
    source, written, _ = minari_source
    (tmp_path / "one.json").write_text('{"tasks": {".": {"params": {"target_velocity": 2}, "split": "both"}}}')
    path = source / "cheetah" / "vel1-v0"
    collection = load(path, "minari", tmp_path / "out", "cheetah-vel", tmp_path / "one.json")
    assert_same_steps(collection.load(0), written["cheetah/vel1-v0"])


MINARI_ATTACKS = {
    "another format": (None, lambda m: m.update(data_format="arrow"), "data_format is 'arrow'"),
    "an external link": (
        lambda f: f.__setitem__("episode_0/more", h5py.ExternalLink("x", "/")) or f.move("episode_0/more", "episode_9"),
        None,
        "found an external link",
    ),
    "a missing episode": (lambda f: f.move("episode_0", "episode_9"), None, "expected episode_0 to episode_2"),
    "another group": (lambda f: f.create_group("other"), None, "expected episode_0 to episode_3"),
    "no final observation": (
        lambda f: f["episode_1/observations"].resize((80, 20)),
        None,
        "observations has 80 rows, expected 81",
    ),
    "an end in the middle": (
        lambda f: f["episode_1/terminations"].__setitem__(3, True),
        None,
        "ends before its last step",
    ),
    "no steps": (
        lambda f: [
            f[f"episode_1/{n}"].resize(0, axis=0) for n in ("rewards", "actions", "terminations", "truncations")
        ],
        None,
        "rows, expected",
    ),
    "no observations": (lambda f: f["episode_2"].__delitem__("observations"), None, "has no 'observations'"),
    "nested observations": (
        lambda f: [f["episode_2"].__delitem__("observations"), f.create_group("episode_2/observations")],
        None,
        "found no array",
    ),
}


@pytest.mark.parametrize("name", MINARI_ATTACKS)
def test_hostile_minari_data_sets(minari_source, tmp_path, name):
    source, _, said = minari_source
    change_file, change_metadata, message = MINARI_ATTACKS[name]
    folder = source / "cheetah" / "vel0-v0" / "data"
    if change_file is not None:
        with h5py.File(folder / "main_data.hdf5", "a") as file:
            change_file(file)
    else:
        metadata = json.loads((folder / "metadata.json").read_text())
        change_metadata(metadata)
        (folder / "metadata.json").write_text(json.dumps(metadata))
    assert message in refused(source, "minari", tmp_path / "out", "cheetah-vel", said)


# ---- all formats ----


def test_a_failure_in_the_middle_leaves_nothing(unicorn, tmp_path):
    source, walks = unicorn
    (source / list(walks)[-1] / "terminals.npy").unlink()
    assert "terminals.npy" in refused(source, "unicorn", tmp_path / "out")


def test_a_full_disk(unicorn, tmp_path, monkeypatch):
    from focal.datasets import arrays

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(arrays, "write_file", full)
    with pytest.raises(DiskFullError, match="disk full while writing"):
        load(unicorn[0], "unicorn", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_leftovers_of_a_killed_import_go_with_the_next(unicorn, tmp_path):
    (tmp_path / ".tmp-out-1").mkdir()
    load(unicorn[0], "unicorn", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]
    assert "exists, expected a new folder" in refused(unicorn[0], "unicorn", tmp_path / "out")
    assert "lies inside" in refused(unicorn[0], "unicorn", unicorn[0] / "out")


def test_the_command_line(unicorn, iclr, tmp_path):
    source, out = unicorn[0], tmp_path / "stores" / "sparse-point-robot"
    words = ["data", "import", source, "--format", "unicorn", "--env", "point", "-o", out]
    assert "--licence" in cli(*words, code=2)
    words += ["--licence", "CC-BY-4.0", "--author", "Ada", "--name", "mine"]
    printed = cli(*words, "--split", "3/2")
    assert "mine 1.0.0" in printed
    assert "note: task parameters rounded to 3 decimals" in printed
    assert "no reference returns are known" in printed
    shown = json.loads(cli("data", "show", out, "--json"))
    assert shown["tasks_detail"][0]["random"] is None
    assert len(shown["notes"]) >= 2
    assert "1 in" not in cli("data", "verify", out)
    assert "did you mean 'point'" in cli(*["pont" if word == "point" else word for word in words], code=2)
    collection = open_collection(out)
    assert collection.provenance["focal"]


def test_imported_data_are_meta_tested(unicorn, tmp_path):
    """Without references, policies or levels: the scores and the expert are missing, the rest is there."""
    tasks = select_test_tasks(load(unicorn[0], "unicorn", tmp_path / "out", split="3/2"), "mixed")
    result = meta_test(GoalReader(), Idle(), tasks, OfflineTransitions(32), episodes=2, seed=0)
    assert sorted(result.conditions) == ["right context", "untrained", "wrong context", "zero action"]
    assert result.share_of_optimum("right context") > 0.9
    assert result.score("right context") is None
    assert not result.counted.any()
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["expert_reference"] == [None, None]
    assert document["conditions"]["right context"]["task_scores"] == [None, None]


@pytest.mark.slow
def test_imported_data_train_and_test(unicorn, tmp_path):
    """The same by the commands, with a network that is trained on them."""
    folders = ["--stores", tmp_path / "stores", "--runs", tmp_path / "runs"]
    cli("data", "import", unicorn[0], "--format", "unicorn", "--env", "point", "--licence", "MIT", "--split", "3/2",
        "--scale", "smoke", "-o", tmp_path / "stores" / "sparse-point-robot")  # fmt: skip
    cli("train", "--data", "mixed", *folders)
    result = json.loads(cli("test", *folders[2:], "--episodes", 2, "--json"))["seeds"]["0"]
    assert sorted(result["conditions"]) == ["right context", "untrained", "wrong context", "zero action"]
    assert result["conditions"]["right context"]["score"] is None
    assert result["expert_reference"] == [None, None]
    assert "not in the score" in cli("test", *folders[2:], "--episodes", 2)
