"""Training settings: the tables of families and scales, overrides, and errors that name the remedy."""

import pytest

from focal import UsageError
from focal.datagen import generate_settings
from focal.settings import SCALES, from_dict, override, parse_assignments, to_dict
from focal.trainer.mbml_teachers import EnsembleSettings
from focal.trainer.methods import METHODS, train_settings
from focal.trainer.settings import FocalSettings, differences

FAMILIES = [
    "sparse-point-robot", "point-robot-wind", "half-cheetah-vel", "half-cheetah-fwd-back", "ant-fwd-back",
    "walker-2d-params",
]  # fmt: skip

ADAPTIVE = {"regularisation.kind": "policy", "regularisation.adaptive": "true"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_family_and_scale_resolves_and_survives_json(family: str, scale: str):
    settings = train_settings(family, scale)
    settings.check()
    assert from_dict(FocalSettings, to_dict(settings)) == settings


def test_paper_values_of_the_tables():
    point, wind, velocity, direction, ant, walker = (train_settings(family, "paper") for family in FAMILIES)
    assert (point.discount, point.reward_scale, point.latent_dim, point.context_reward) == (0.9, 100.0, 5, "sparse")
    assert (wind.discount, wind.reward_scale, wind.context_reward) == (0.9, 100.0, "dense")
    assert [s.reward_scale for s in (velocity, direction, ant, walker)] == [5.0] * 4
    assert [s.discount for s in (velocity, direction, ant, walker)] == [0.99] * 4
    assert [s.regularisation.kind for s in (point, wind)] == ["none", "none"]
    assert [s.regularisation.kind for s in (direction, ant)] == ["value-penalty", "value-penalty"]
    assert [s.regularisation.kind for s in (velocity, walker)] == ["policy", "policy"]
    assert (velocity.regularisation.alpha, direction.regularisation.alpha, ant.regularisation.alpha) == (500, 500, 1e6)
    rules = [s.regularisation for s in (velocity, direction, ant, walker)]
    assert [rule.alpha_learning_rate * rule.alpha for rule in rules] == pytest.approx([1] * 4), (
        "the released first step"
    )
    assert train_settings("half-cheetah-vel", "laptop").regularisation.alpha_learning_rate == 1e-2
    made = generate_settings("sparse-point-robot", "paper").episodes_per_checkpoint
    assert 20 * (made - round(0.1 * made)) >= point.context_size, "one checkpoint's training episodes fill a context"
    assert [s.next_observation_in_context for s in (point, wind, velocity, walker)] == [False, True, False, True]
    assert [s.latent_dim for s in (point, wind, velocity, direction, ant, walker)] == [5, 20, 20, 5, 20, 20]
    assert velocity.control_hidden == (300, 300, 300)
    assert velocity.encoder_hidden == (200, 200, 200)
    assert (velocity.distance.power, velocity.distance.beta, velocity.distance.epsilon) == (-2, None, 0.1)
    assert [s.encoder.kl_weight for s in (point, wind, velocity, walker)] == [1.0, 1.0, 0.1, 0.1]


def test_laptop_point_robots_train_the_encoder_first():
    settings = train_settings("sparse-point-robot", "laptop")
    assert (settings.schedule, settings.encoder_only_steps, settings.total_steps) == ("encoder-first", 1500, 9500)
    assert (settings.control_hidden, settings.meta_batch, settings.batch_size) == ((128, 128), 16, 128)
    assert settings.discount == 0.9
    assert settings.regularisation.kind == "none"


def test_both_point_robots_have_5_latent_dimensions_on_a_laptop_and_3_to_smoke():
    for family in FAMILIES[:2]:
        assert [train_settings(family, scale).latent_dim for scale in ("laptop", "smoke")] == [5, 3]


def test_joint_ignores_encoder_steps():
    settings = override(train_settings("sparse-point-robot", "laptop"), {"schedule": "joint"})
    assert settings.encoder_only_steps == 0
    assert settings.total_steps == settings.steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sise": "3"}, "batch_size"),
        ({"regularisation.kind": "brac"}, "regularisation.kind"),
        ({"distance.power": "3"}, r"=3, expected -2, -1, 1 or 2; --set distance\.power=-2$"),
        ({"distance.beta": "-1"}, r"beta=-1\.0, .* 0 or more; its default: --set distance\.beta=none$"),
        ({"steps": "0"}, "steps=0, expected a number above 0; its default: --set steps=100000$"),
        ({"critic_learning_rate": "nan"}, "critic_learning_rate"),
        ({"discount": "1.5"}, r"discount=1\.5, .* from 0 to 1; its default: --set discount=0\.99$"),
        ({"control_hidden": ""}, "--set control_hidden=256,256"),
        ({"regularisation.alpha": "-1"}, r"0 or more; its default: --set regularisation\.alpha=1\.0$"),
        ({"context_draws": "3"}, "context_draws=3, expected 1 or 2; --set context_draws=2$"),
    ],
)
def test_wrong_settings_are_refused_at_once(changes: dict, message: str):
    with pytest.raises(UsageError, match=message):
        override(FocalSettings(), changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distance.form": "released", "distance.power": "1"}, "--set distance.form=paper"),
        ({"schedule": "encoder-first"}, "--set encoder_steps=1500"),
        ({"log_std_min": "1"}, r"log_std_min=1\.0 is above log_std_max=0\.0; --set log_std_min=-20\.0$"),
        (
            {"regularisation.alpha_min": "3000"},
            r"alpha_min=3000\.0 is above regularisation\.alpha_max=2000\.0; --set regularisation\.alpha_max=3000\.0$",
        ),
        ({**ADAPTIVE, "regularisation.alpha": "1e6"}, r"to 2000\.0; --set .*max=1000000\.0"),
        ({**ADAPTIVE, "regularisation.alpha": "0"}, r"--set .*alpha=0\.001"),
        ({"encoder_after": "decaying"}, "--set schedule=encoder-first"),
    ],
)
def test_settings_wrong_together_are_refused_by_check(changes: dict, message: str):
    with pytest.raises(UsageError, match=message):
        override(FocalSettings(), changes).check()


def test_of_an_ensemble_no_default_is_told_which_is_another_group_by_group():
    with pytest.raises(UsageError, match=r"steps=0, expected a number above 0$"):
        EnsembleSettings(steps=0)


def test_unknown_family_and_scale_name_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'half-cheetah-vel'"):
        train_settings("half-cheeta-vel", "laptop")
    with pytest.raises(UsageError, match="did you mean 'laptop'"):
        train_settings("half-cheetah-vel", "labtop")


def test_differences_are_dotted():
    ours, theirs = to_dict(FocalSettings()), to_dict(override(FocalSettings(), {"distance.beta": 2, "steps": 1}))
    assert differences(ours, theirs) == ["distance.beta", "steps"]


@pytest.mark.parametrize("algo", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_to_let_an_idle_setting_act_does(family, algo):
    settings = train_settings(family, "laptop", algo)
    idle = settings.idle()
    for name, words in idle.items():
        changed = override(settings, parse_assignments(words.split()))
        if (name, settings.encoder_only_steps if algo == "focal" else 0) == ("encoder_steps", 0):
            changed = override(changed, {"encoder_steps": "1500"})  # whoever asked for it named a number
        changed.check()
        assert name not in changed.idle(), (name, words)
    acting = {
        "steps",
        "latent_dim",
        "discount",
        "encoder.kind",
        "regularisation.kind",
        "distance.beta",
        "entropy.enabled",
    }
    assert not acting & set(idle)


@pytest.mark.parametrize(
    ("family", "assignments", "idle"),
    [
        (
            "sparse-point-robot",
            {},
            {"regularisation.alpha", "regularisation.alpha_max", "encoder.kl_weight", "encoder_half_life"},
        ),
        ("sparse-point-robot", {"distance.form": "released"}, {"distance.epsilon"}),
        ("sparse-point-robot", {"distance.power": "2"}, {"distance.epsilon"}),
        ("half-cheetah-vel", {}, {"regularisation.alpha_max", "entropy.target"}),
        ("half-cheetah-vel", {"entropy.enabled": "false"}, {"entropy.weight"}),
        ("half-cheetah-fwd-back", {}, {"encoder_steps", "encoder_half_life"}),
    ],
)
def test_settings_that_change_nothing(family, assignments, idle):
    assert idle <= set(override(train_settings(family, "laptop"), assignments).idle())


def test_what_mbml_relabels_no_next_observations_with_is_idle():
    idle = set(train_settings("half-cheetah-vel", "laptop", "mbml").idle())
    assert {"relabel.next_observation_std", "teachers.transitions.members", "teachers.transitions.steps"} <= idle
    assert not {"relabel.reward_std", "teachers.rewards.steps", "teachers.steps"} & idle
    assert not train_settings("walker-2d-params", "laptop", "mbml").idle()


def test_what_batch_pearl_does_not_regularise_with_is_idle():
    settings = train_settings("half-cheetah-vel", "laptop", "batch-pearl")
    assert {"regularisation.alpha", "regularisation.divergence"} <= set(settings.idle())
    assert not {"encoder.kl_weight", "encoder.bounded"} & set(settings.idle())
