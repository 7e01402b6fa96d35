"""What each figure and table of the paper shows, from runs that are made up: which numbers, under which names."""

import csv
import dataclasses
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from focal import FocalError, experiment, paper, reproduce
from focal.errors import DivergedError
from focal.evaluation import figures
from focal.evaluation.embeddings import TaskPoints
from focal.paper import ANT, ITEMS, LEVELS, POINT, VEL, WALKER, Material, compared

CORNERS = np.array([[1.0, 1, 1], [-1, -1, 1], [1, -1, -1]])


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Make the material of an item: every run has two seeds, its log is `logs[label]`; no collection unless given."""
    logs, asked = {}, []

    def material(item, collections=None):
        runs = {training: tmp_path / str(number) for number, training in enumerate(item.trainings)}
        labels = {run_dir: training.label for training, run_dir in runs.items()}
        source = {
            run_dir: SimpleNamespace(seeds=(0, 1), quality=training.quality) for training, run_dir in runs.items()
        }

        def logged(run_dir, seeds, log, key):
            asked.append((log, key))
            return {seed: logs.get(labels[run_dir], {0: 1.0 + seed, 10: 3.0 + seed}) for seed in seeds}

        monkeypatch.setattr(paper, "logged", logged)
        settings = SimpleNamespace(total_steps=10)
        monkeypatch.setattr(
            paper, "read_run", lambda run_dir: SimpleNamespace(source=source[run_dir], settings=settings)
        )
        monkeypatch.setattr(paper, "has_ended", lambda run_dir, seed, total_steps: True)
        monkeypatch.setattr(paper, "load_agent", lambda run_dir, seed: (labels[run_dir], seed))
        monkeypatch.setattr(paper, "last_step", lambda run_dir, seed: 10)
        return Material("laptop", tmp_path, collections or {}, runs, tmp_path / "out")

    return SimpleNamespace(material=material, logs=logs, asked=asked)


@pytest.fixture
def axes(monkeypatch):
    """The axes of the picture drawn last, while they can be read."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path, both=True: drawn.extend(figure.axes) or [path])
    yield drawn
    plt.close("all")


def rows_of(files):
    return list(csv.DictReader(files[0].read_text().splitlines()))


class TestReturns:
    """Figures 2b, 3, 4b, 5b, 6 and 9b."""

    def test_a_panel_per_family_and_a_line_per_method(self, made, axes):
        item = ITEMS["figure 3"].restricted([POINT, VEL])
        item.draw(item, made.material(item))
        assert set(made.asked) == {("evaluation", "test/return")}
        assert [axis.get_title() for axis in axes] == [POINT, VEL]
        assert [axis.get_ylabel() for axis in axes] == ["sparse return", "return"]
        for axis in axes:
            named = [line for line in axis.lines if not line.get_label().startswith("_")]
            assert [line.get_label() for line in named] == [
                f"{name} (2 seeds)" for name in ("FOCAL", "Batch PEARL", "Contextual BCQ", "MBML")
            ]
            assert named[0].get_ydata().tolist() == [1.5, 3.5], "the mean over seeds"
            assert axis.get_xscale() == "linear"

    def test_figure_6_has_a_logarithmic_axis(self, made, axes):
        item = ITEMS["figure 6"].restricted([POINT])
        item.draw(item, made.material(item))
        assert axes[0].get_xscale() == "log"

    def test_a_method_that_was_stopped_before_a_test_is_not_left_out_in_silence(self, made, axes):
        item = ITEMS["figure 3"].restricted([POINT])
        made.logs["Batch PEARL"] = {}
        item.draw(item, made.material(item))
        labels = [line.get_label() for line in axes[0].lines]
        assert "Batch PEARL (no meta-test logged)" in labels
        assert "FOCAL (2 seeds)" in labels

    def test_what_diverged_is_called_so(self, made, axes):
        item = ITEMS["figure 3"].restricted([POINT])
        material = made.material(item)
        _, pearl, _, mbml = item.trainings
        stopped = material.runs[pearl] / "seed_1" / paper.DIVERGED
        stopped.parent.mkdir(parents=True)
        stopped.write_text("{}")
        begun = {training: run_dir for training, run_dir in material.runs.items() if training != mbml}
        item.draw(item, dataclasses.replace(material, runs=begun, not_begun=(mbml,)))
        assert [line.get_label() for line in axes[0].lines if not line.get_label().startswith("_")] == [
            "FOCAL (2 seeds)", "Batch PEARL, diverged (2 seeds)", "Contextual BCQ (2 seeds)",
            "MBML, diverged (no meta-test logged)",
        ]  # fmt: skip

    def test_where_no_run_was_tested_it_is_said(self, made):
        item = ITEMS["figure 2b"]
        made.logs |= {training.label: {} for training in item.trainings}
        material = made.material(item, {VEL: SimpleNamespace(source="stores/x")})
        with pytest.raises(FocalError, match=r"figure 2b: no run logged a meta-test.*focal-cli data show stores/x"):
            item.draw(item, material)


@pytest.mark.parametrize(("largest", "scale"), [(1e11, "symlog"), (9_999.0, "linear")])
def test_values_are_the_critics_on_a_scale_that_shows_growth(made, axes, largest, scale):
    item = ITEMS["figure 10"]
    made.logs["FOCAL"] = {0: np.nan, 10: 3.0}  # a value that is no number hides no other
    made.logs["Batch PEARL"] = {0: 1.0, 10: largest}
    item.draw(item, made.material(item))
    assert set(made.asked) == {("metrics", "critic/value")}
    assert axes[0].get_yscale() == scale
    assert [line.get_label() for line in axes[0].lines if not line.get_label().startswith("_")] == [
        "FOCAL (2 seeds)",
        "Batch PEARL (2 seeds)",
    ]
    assert np.nanmax([line.get_ydata() for line in axes[0].lines]) == largest


def test_figure_7_shows_the_last_three_dimensions_as_they_are(made, axes, monkeypatch):
    points = np.arange(24.0).reshape(2, 2, 6) / 24
    monkeypatch.setattr(paper, "embed_tasks", lambda *_: TaskPoints(points, (4, 9), (False, True)))
    item = ITEMS["figure 7"]
    item.draw(item, made.material(item, {WALKER: None}))
    assert [axis.get_title() for axis in axes[:4]] == [training.label for training in item.trainings]
    drawn = np.array(axes[0].collections[0]._offsets3d)
    assert drawn == pytest.approx(points.reshape(4, 6)[:, 3:].T)


def test_table_1_tells_trained_tasks_from_unseen_ones(made, monkeypatch):
    """The trained tasks stand on corners that are all apart, the unseen ones on one pile."""
    embeddings = np.concatenate([CORNERS, np.zeros((2, 3))])[:, None]
    monkeypatch.setattr(
        paper, "embed_tasks", lambda *_: TaskPoints(embeddings, tuple(range(5)), (False, False, False, True, True))
    )
    item = ITEMS["table 1"]
    rows = rows_of(item.draw(item, made.material(item, {VEL: None})))
    assert [row["loss"] for row in rows] == ["inverse-square", "inverse", "linear", "square"]
    for row in rows:
        assert row["ESR, training tasks"] == "1.00 [1.00, 1.00]"
        assert row["ESR, unseen tasks"] == "0.00 [0.00, 0.00]"
        rms = CORNERS.std(axis=0).mean() * np.sqrt(2 * 3 / 2)
        assert row["RMS, training tasks"].startswith(f"{rms:.2f} ")


def test_seeds_that_diverged_before_their_first_checkpoint_are_not_drawn(made, monkeypatch):
    item = ITEMS["figure 5a"]
    material = made.material(item)
    training = item.trainings[0]
    monkeypatch.setattr(paper, "last_step", lambda run_dir, seed: 10 * seed)
    (material.runs[training] / "seed_0").mkdir(parents=True)
    (material.runs[training] / "seed_0" / "diverged.json").write_text('{"step": 7}')
    assert material.trained(training) == [1]
    assert material.agent(training) == (training.label, 1)
    assert material.stops(training) == {"0": {"step": 7}}
    assert material.label(training) == f"{training.label}, diverged"
    monkeypatch.setattr(paper, "last_step", lambda run_dir, seed: 0)
    with pytest.raises(FocalError, match="all seeds diverged before the first checkpoint"):
        material.agent(training)


def test_table_6_has_training_data_as_rows_and_contexts_as_columns(made, monkeypatch, make_collection):
    item = ITEMS["table 6"].restricted([POINT])
    collection = make_collection(unreached=(3,))  # the test task has no expert data
    material = made.material(item, {POINT: collection})
    trained = {run_dir: training.quality for training, run_dir in material.runs.items()}

    def tested(run_dir, stores, qualities, size, episodes, seed):
        assert (qualities, size) == (LEVELS, None), "contexts of the training's size"
        return {
            quality: SimpleNamespace(
                over_seeds=lambda measure, condition, quality=quality: (
                    f"{trained[run_dir]} {quality} {measure} {condition}"
                ),
                first=SimpleNamespace(task_indices=(3,)),
            )
            for quality in ("random", "medium")
        }

    monkeypatch.setattr(paper, "matrix_row", tested)
    rows = rows_of(item.draw(item, material))
    assert [row["trained on"] for row in rows] == ["random", "medium", "expert"]
    for row in rows:
        assert row["value"] == "sparse return"
        assert row["random context"] == f"{row['trained on']} random mean right context"
        assert row["expert context"] == "no such data"
        assert (row["zero action"], row["test tasks"]) == (f"{row['trained on']} random mean zero action", "1")
    missing = dataclasses.replace(material, runs={})
    assert {row["medium context"] for row in rows_of(item.draw(item, missing))} == {"no such data"}


def test_tables_2_and_3_count_the_training_data(made, make_collection):
    collection = (
        make_collection()
    )  # 3 training tasks: 5 checkpoints at 0, 1000, ..., 4000, 10 episodes of 20 steps each
    qualities, datasets = (ITEMS[name].restricted([POINT]) for name in ("table 2", "table 3"))
    material = made.material(qualities, {POINT: collection})
    (row,) = rows_of(qualities.draw(qualities, material))
    every = np.concatenate([collection.load(entry.index).returns for entry in collection.train_tasks()])
    assert float(row["mean dense return of mixed"]) == pytest.approx(every.mean(), rel=1e-3)
    assert row["training and test data"] == "expert"
    (row,) = rows_of(datasets.draw(datasets, material))
    assert row["tasks, training / test"] == "3 / 1"
    assert row["checkpoints (start:end:spacing)"] == "4000:4000:0", (
        "the experts' alone, where expert data are trained on"
    )
    assert row["tasks with that quality"] == "3"
    trained_on = [len(data.rows) for _, data in collection.load_training("expert")]  # held-out episodes left out
    assert float(row["transitions per such task"]) == np.mean(trained_on)
    assert 20 * float(row["episodes per such task"]) == np.mean(trained_on)


def test_table_4_holds_the_settings_of_figure_3s_runs(made):
    item = ITEMS["table 4"]
    rows = {row["setting"]: row for row in rows_of(item.draw(item, made.material(item)))}
    for training in ITEMS["figure 3"].trainings:
        if training.algo == "focal":
            settings = training.settings("laptop")
            assert rows["control_hidden"][training.family] == ",".join(map(str, settings.control_hidden))
            assert rows["steps"][training.family] == str(settings.steps)
            assert rows["regularisation.alpha"][training.family] == str(settings.regularisation.alpha)
    assert rows["control_hidden"][POINT] == "256,256,256", "as large as its rivals' at laptop"


def test_behaviour_is_a_picture_per_family(made, make_collection):
    item = ITEMS["figure behaviour"].restricted([POINT])
    files = item.draw(item, made.material(item, {POINT: make_collection()}))
    assert [file.name for file in files] == ["figure_behaviour_point.png", "figure_behaviour_point.svg"]
    assert all(file.stat().st_size > 10_000 for file in files)


def differences(name, family):
    """What the FOCAL runs of an item are set to, as a list over its runs."""
    found = [training.settings("paper") for training in ITEMS[name].trainings if training.family == family]
    return [
        (one.algo, one.encoder.kind, one.gradients, one.regularisation.kind) for one in found if one.algo == "focal"
    ]


def test_the_variants_are_the_papers():
    for kind, number in (("value-penalty", 5), ("policy", 9)):
        for part in "ab":
            assert differences(f"figure {number}{part}", WALKER) == [
                ("focal", "deterministic", "decoupled", kind),
                ("focal", "deterministic", "coupled", kind),
            ]
    assert [one[1] for one in differences("figure 4b", VEL)] == ["deterministic", "probabilistic"]
    rivals = [one for one in ITEMS["figure 4b"].trainings if one.algo == "batch-pearl" and one.family == VEL]
    assert [one.settings("paper").regularisation.kind for one in rivals] == ["none", "policy"]
    losses = [training.settings("paper") for training in ITEMS["figure 2a"].trainings]
    assert [(one.distance.power, one.latent_dim, one.regularisation.kind) for one in losses] == [
        (power, 5, "value-penalty") for power in (-2, -1, 1, 2)
    ]
    assert {family for family, quality in paper.QUALITY.items() if quality == "mixed"} == {ANT, WALKER}
    penalised, plain = (training.settings("paper") for training in ITEMS["figure 10"].trainings)
    assert (penalised.regularisation.kind, penalised.regularisation.alpha) == ("value-penalty", 1e6)
    assert plain.algo == "batch-pearl"


class TestRunsThatAreThere:
    """A folder of that name may hold another run: it must never pass for the one asked for."""

    TRAINING = compared(POINT, "batch-pearl", "Batch PEARL")

    @pytest.fixture
    def found(self, monkeypatch, tmp_path, collection):
        """Let a run of two seeds be in the folder, with some logs, and training end as `found.error` says."""
        settings = self.TRAINING.settings("laptop")
        run_dir = tmp_path / self.TRAINING.name("laptop")
        for seed in (0, 1):
            (run_dir / f"seed_{seed}").mkdir(parents=True)
            (run_dir / f"seed_{seed}" / "metrics.jsonl").write_text("{}\n")
        (run_dir / "settings.json").write_text("{}")
        source = SimpleNamespace(quality="expert", seeds=(0, 1))
        run = SimpleNamespace(settings=settings, source=source, content_hash=collection.content_hash)
        monkeypatch.setattr(reproduce, "read_run", lambda folder: run)
        for module in (reproduce, experiment):
            monkeypatch.setattr(module, "last_step", lambda folder, seed: settings.total_steps * (seed == 0))

        def train_run(request, bars):
            raise case.error

        monkeypatch.setattr(reproduce, "train_run", train_run)

        def make():
            item = dataclasses.replace(ITEMS["figure 3"], trainings=(self.TRAINING,), seeds=2)
            bars = lambda: plt.rc_context()  # noqa: E731 (any context manager)
            return reproduce.train_one(item, self.TRAINING, "expert", collection, "laptop", tmp_path, bars, 1)

        case = SimpleNamespace(run=run, run_dir=run_dir, make=make, error=DivergedError("seed 1 diverged"))
        return case

    def diverge(self, case):
        (case.run_dir / "seed_1" / paper.DIVERGED).write_text("{}")

    def test_a_run_of_which_a_seed_diverged_is_used(self, found):
        with pytest.raises(DivergedError):
            found.make()
        self.diverge(found)
        found.error = AssertionError("it is there")
        assert found.make() == found.run_dir

    def test_one_whose_first_stage_diverged_was_never_begun(self, found):
        (found.run_dir / "settings.json").unlink()
        assert found.make() is None

    def test_a_run_with_other_settings_is_not(self, found):
        self.diverge(found)
        found.run.settings = dataclasses.replace(found.run.settings, steps=7)
        found.error = FocalError("the folder holds another run")
        with pytest.raises(FocalError, match="another run"):
            found.make()
        found.error = DivergedError("seed 1 diverged")
        with pytest.raises(DivergedError):
            found.make()

    def test_any_other_failure_is_told(self, found):
        found.error = FocalError("no space left")
        with pytest.raises(FocalError, match="no space left"):
            found.make()
