"""Merging keeps what it takes, says where it is from, and refuses what does not belong together."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from focal.cli import main
from focal.datasets import CollectionHeader, QualityRule, commit_collection, open_collection, relabel_collection
from focal.datasets import verify_collection as verify
from focal.datasets.licences import joined_licence
from focal.datasets.merging import merge_collections
from focal.errors import FocalError, UsageError


def cli(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr.strip().splitlines()[-1]


def make(make_collection, path, licence="CC-BY-4.0", authors=("Ada Lovelace",), notes=(), policies=(), **settings):
    """A collection with the header and the policy files given."""
    make_collection(path, commit=False, **settings)
    header_file = path / "staging" / "header.json"
    header = CollectionHeader.from_json(json.loads(header_file.read_text()), "header")
    header = replace(header, licence=licence, authors=tuple(authors), notes=tuple(notes))
    header_file.write_text(json.dumps(header.to_json()))
    for name, data in dict(policies).items():
        (path / "policies" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "policies" / name).write_bytes(data)
    return commit_collection(path, header, {"made": path.name})


@pytest.fixture(scope="module")
def pair(make_collection, tmp_path_factory):
    """Four goals; three others, by another author under another licence, of another seed."""
    folder = tmp_path_factory.mktemp("pair")
    policies = {f"task_000{index}/step_00000{4000}.json": b"{}" for index in (0, 1)}
    a = make(make_collection, folder / "a", tasks=4, test=1, episodes=6, notes=["a note"], policies=policies)
    b = make(make_collection, folder / "b", "CC-BY-SA-4.0", ("Grace Hopper", "Ada Lovelace"), tasks=3, test=1,
             episodes=6, seed=5, policies=policies, unreached=(1,))  # fmt: skip
    return a, b


def assert_same_task(found, expected):
    assert found.record == replace(expected.record, index=found.index)
    assert found.content == expected.content
    assert found.counts == expected.counts
    assert (found.rule, found.heldout_seeds, found.labels) == (expected.rule, expected.heldout_seeds, expected.labels)


def test_tasks_follow_each_other_unchanged(pair, tmp_path):
    a, b = pair
    merged = merge_collections([a, b], tmp_path / "out", provenance={"made": "here"})
    assert [entry.index for entry in merged.tasks] == list(range(7))
    for found, expected in zip(merged.tasks, [*a.tasks, *b.tasks], strict=True):
        assert_same_task(found, expected)
    assert [entry.split for entry in merged.tasks] == ["train"] * 3 + ["test", "train", "train", "test"]
    assert merged.name == "sparse-point-robot-merged"
    assert merged.licence == "CC-BY-SA-4.0"
    assert merged.authors == ("Ada Lovelace", "Grace Hopper")
    assert merged.header.notes == ("a note",)
    assert merged.provenance == {"made": "here"}
    verify(tmp_path / "out")


def test_lineage_names_every_input(pair, tmp_path):
    a, b = pair
    relabelled = relabel_collection(a.path, tmp_path / "a2", a.tasks[0].rule)
    merged = merge_collections([relabelled, b], tmp_path / "out", tasks=[[0, 2], None])
    first, second, third = merged.derived_from
    assert first == {"name": "a", "version": "1.0.0", "content_hash": a.content_hash}
    assert second["content_hash"] == relabelled.content_hash
    assert (second["version"], second["chosen"]) == ("1.1.0", {"quality": "mixed", "tasks": [0, 2]})
    assert (third["name"], third["seed"], third["licence"], third["authors"]) == (
        "b", 5, "CC-BY-SA-4.0", ["Grace Hopper", "Ada Lovelace"],
    )  # fmt: skip
    assert third["provenance"] == {"made": "b"}
    assert third["settings"] == b.settings


def test_policies_go_with_their_tasks(pair, tmp_path):
    a, b = pair
    merged = merge_collections([a, b], tmp_path / "out", tasks=[[1, 3], None])
    policies = [name for name in merged.files if name.startswith("policies/")]
    assert policies == [f"policies/task_000{index}/step_000004000.json" for index in (0, 2, 3)]


@pytest.mark.parametrize("quality", ["random", "medium", "expert"])
def test_only_one_quality(pair, tmp_path, quality):
    a, b = pair
    merged = merge_collections([a, b], tmp_path / "out", quality=quality)
    expected = [entry for entry in (*a.tasks, *b.tasks) if entry.counts[quality].episodes]
    assert len(merged.tasks) == len(expected) == (6 if quality == "expert" else 7), "a task without it is left out"
    for found, entry in zip(merged.tasks, expected, strict=True):
        assert found.counts["mixed"] == found.counts[quality] == entry.counts[quality]
        assert found.labels == "scores", "a whole checkpoint keeps its score"
        source = a if entry in a.tasks else b
        ours, theirs = merged.load(found.index), source.load(entry.index, quality)
        assert np.array_equal(ours.observations, theirs.observations)
        assert np.array_equal(ours.heldout, theirs.heldout)
    verify(tmp_path / "out")


def test_part_of_one_collection(pair, tmp_path):
    part = merge_collections([pair[0]], tmp_path / "out", tasks=[[3, 1]], name="part")
    assert (part.name, [entry.split for entry in part.tasks]) == ("part", ["test", "train"])
    assert part.load(0).heldout.tolist() == pair[0].load(3).heldout.tolist()
    with pytest.raises(FocalError, match="has no task 9"):
        merge_collections([pair[0]], tmp_path / "b", tasks=[[9]])


def test_the_same_task_is_refused_or_joined(pair, make_collection, tmp_path):
    a = pair[0]
    other = make(make_collection, tmp_path / "c", tasks=4, test=4, episodes=6, seed=9)
    with pytest.raises(UsageError, match=r"task 0 of \S+/c is the same task as task 0 of \S+/a; join .* --join"):
        merge_collections([a, other], tmp_path / "out")
    joined = merge_collections([a, other], tmp_path / "out", join=True)
    verify(tmp_path / "out")
    assert [entry.split for entry in joined.tasks] == ["both", "both", "both", "test"]
    for entry in joined.tasks:
        parts = a.load(entry.index), other.load(entry.index)
        episodes = joined.load(entry.index)
        for name in ("rewards", "qualities", "heldout", "sac_steps", "seeds", "returns"):
            assert np.array_equal(getattr(episodes, name), np.concatenate([getattr(part, name) for part in parts])), (
                name
            )
        assert (entry.labels, entry.heldout_seeds) == ("given", ())
        assert entry.record == replace(a.task(entry.index).record, split=entry.split)
    heldout = joined.load_context("mixed", joined.tasks[:1])[0]
    assert len(heldout.rewards) == 20 * sum(part.load(0).heldout.sum() for part in (a, other))
    assert any(note.startswith("tasks joined from several parts: 4") for note in joined.header.notes)
    with pytest.raises(FocalError, match="levels of task 0 were given by its source"):
        relabel_collection(tmp_path / "out", tmp_path / "again", QualityRule())


def test_a_joined_task_keeps_the_references_of_a_tested_expert(make_collection, tmp_path):
    bad = make(make_collection, tmp_path / "a", tasks=2, unreached=(0, 1), policies={"task_0000/a.json": b"bad"})
    good = make(make_collection, tmp_path / "b", tasks=2, seed=3, policies={"task_0000/a.json": b"good"})
    joined = merge_collections([bad, good], tmp_path / "out", join=True)
    assert joined.tasks[0].record.references == good.tasks[0].record.references
    assert (tmp_path / "out" / "policies" / "task_0000" / "a.json").read_bytes() == b"good"


def test_the_same_episodes_twice_are_refused(pair, tmp_path):
    relabel_collection(pair[0].path, tmp_path / "a2", QualityRule())
    for join in (False, True):
        with pytest.raises(UsageError, match="hold the same episodes"):
            merge_collections([pair[0], open_collection(tmp_path / "a2")], tmp_path / "out", join=join)


def test_an_episode_in_two_parts_is_there_once(pair, make_collection, tmp_path):
    """Runs from one seed are alike until they learn. Held out in one part and not in the other, it is held out."""
    a = pair[0]
    merge_collections([a], tmp_path / "expert", quality="expert")
    with pytest.raises(UsageError, match=r"task 0 of \S+/a hold every episode of task 0 of \S+/expert; leave it out"):
        merge_collections([a, open_collection(tmp_path / "expert")], tmp_path / "out", join=True)
    assert not (tmp_path / "out").exists()
    other = make(make_collection, tmp_path / "c", tasks=4, episodes=6, skills=(0.0, 0.3, 0.8, 1.0))
    more = make(make_collection, tmp_path / "d", tasks=4, episodes=6, seed=9)
    none = QualityRule(heldout_fraction=0)
    parts = [relabel_collection(one.path, tmp_path / name, none) for one, name in ((other, "c0"), (more, "d0"))]
    free = merge_collections(parts, tmp_path / "free", join=True)  # its marks are its own, no rule's
    for number, parts in enumerate(([a, free], [free, a])):
        joined = merge_collections(parts, tmp_path / f"joined{number}", join=True)
        verify(joined.path)
        assert "episodes that two inputs held, kept once: 24" in joined.header.notes  # the untrained policies' 6 a task
        for index in range(4):
            mine, theirs, both = (one.load(index) for one in (a, free, joined))
            assert both.num_episodes == mine.num_episodes + theirs.num_episodes - 6
            first = both.sac_steps == 0
            assert sorted(both.seeds[first]) == sorted(
                {*mine.seeds[mine.sac_steps == 0], *theirs.seeds[theirs.sac_steps == 0]}
            )
            marked = (mine.heldout == 1) & (mine.sac_steps == 0)
            assert set(both.seeds[first & (both.heldout == 1)]) == set(mine.seeds[marked]) != set()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "point-robot-wind"}, "has family point-robot-wind, expected sparse-point-robot"),
        ({"horizon": 30}, "has time limit 30, expected 20"),
        ({"obs_dim": 3}, "has spaces|has observation width 3, expected 2"),
        ({"sparse": False}, "has a sparse reward False, expected True"),
        ({"rule": QualityRule(expert_from=0.95)}, "cut their levels by different rules"),
    ],
)
def test_what_does_not_belong_together(pair, make_collection, tmp_path, settings, message):
    other = make_collection(tmp_path / "c", tasks=3, seed=8, **settings)
    with pytest.raises(UsageError, match=message):
        merge_collections([pair[0], other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_infos_that_not_every_input_has_are_left_out_and_named(pair, tmp_path, make_episodes, make_record):
    from focal.datasets import begin_collection, seal_task, write_segment

    path = tmp_path / "c"
    header = replace(pair[0].header, name="c", train=(0,), test=(1,))
    begin_collection(path, header)
    for index in (0, 1):
        goal = (0.28, 0.96 + index)
        walks = make_episodes(goal, 1.0, 4)
        write_segment(path, index, 0, replace(walks, infos={**walks.infos, "x_velocity": walks.rewards}))
        seal_task(path, make_record(index, header.split_of(index), goal, header.family), QualityRule(), 0)
    merged = merge_collections([pair[0], commit_collection(path, header, {})], tmp_path / "out")
    assert "left out, because not every input has it: x_velocity" in merged.header.notes
    assert sorted(merged.load(5).infos) == ["sparse_reward"]
    verify(tmp_path / "out")


def test_damage_is_not_passed_on(pair, make_collection, tmp_path):
    """A changed chunk with a right checksum would otherwise get a new, valid content hash."""
    shutil.copytree(pair[0].path, tmp_path / "a")
    collection = open_collection(tmp_path / "a")
    chunk = next((tmp_path / "a" / "tasks" / "task_0000.zarr" / "rewards" / "c").iterdir())
    other = next((tmp_path / "a" / "tasks" / "task_0001.zarr" / "rewards" / "c").iterdir())
    chunk.write_bytes(other.read_bytes())
    with pytest.raises(FocalError, match="array rewards does not have its content hash"):
        merge_collections([collection], tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_the_command(pair, tmp_path):
    words = ["data", "merge", pair[0].path, pair[1].path, "-o"]
    chosen = ["--data", "expert", "--tasks", "0-1,3", "--tasks", "0,2", "--name", "experts"]
    printed = cli(*words, tmp_path / "out", *chosen)
    assert "experts 1.0.0" in printed
    assert len(open_collection(tmp_path / "out").tasks) == 5
    words = [*words, tmp_path / "new"]
    assert "task lists for 1 of 2 collections" in cli(*words, "--tasks", "0", code=2)
    for text in ("x", "3-1", "1-", "-1", "", "0-9999999"):
        assert "expected task numbers, for example --tasks 0-9,12" in cli(
            *words, "--tasks", text, "--tasks", "0", code=2
        )
    assert "lies inside" in cli(*words[:5], pair[0].path / "new", code=1)


# ---- licences ----


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["MIT", "MIT"], "MIT"),
        (["CC-BY-4.0", "cc-by-4.0"], "CC-BY-4.0"),
        (["CC0-1.0", "CC-BY-4.0"], "CC-BY-4.0"),
        (["CC-BY-4.0", "PDDL-1.0", "CC-BY-SA-4.0"], "CC-BY-SA-4.0"),
        (["CC-BY-NC-4.0", "CC-BY-NC-SA-4.0"], "CC-BY-NC-SA-4.0"),
        (["LicenseRef-Ours", "LicenseRef-Ours"], "LicenseRef-Ours"),
    ],
)
def test_joined_licences(licences, expected):
    assert joined_licence(licences) == joined_licence(licences[::-1]) or len({name.lower() for name in licences}) == 1
    assert joined_licence(licences) == expected


@pytest.mark.parametrize(
    ("licences", "message"),
    [
        (["CC-BY-4.0", "CC-BY-NC-4.0"], "not known to be compatible"),
        (["CC-BY-SA-4.0", "CC-BY-NC-SA-4.0"], "not known to be compatible"),
        (["CC0-1.0", "CC-BY-NC-4.0"], "not known to be compatible"),
        (
            ["MIT", "CC-BY-4.0"],
            "licences MIT and CC-BY-4.0 are not known to be compatible, expected the same or some of",
        ),
        (["CC-BY-ND-4.0", "CC-BY-ND-4.0"], "licence CC-BY-ND-4.0 allows no derived works"),
        (["CC0-1.0", "CC-BY-NC-ND-4.0"], "licence CC-BY-NC-ND-4.0 allows no derived works"),
    ],
)
def test_licences_that_cannot_be_joined(licences, message):
    for order in (licences, licences[::-1]):
        with pytest.raises(UsageError) as caught:
            joined_licence(order)
        assert message in str(caught.value) or order != licences


def test_incompatible_licences_are_refused(pair, make_collection, tmp_path):
    other = make(make_collection, tmp_path / "c", "CC-BY-NC-4.0", tasks=3, seed=8)
    with pytest.raises(UsageError, match=r"licences CC-BY-4\.0 and CC-BY-NC-4\.0 are not known to be compatible"):
        merge_collections([pair[0], other], tmp_path / "out")
