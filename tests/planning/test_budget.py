"""Widths under a budget: the best there are by a brute-force search, and refusals of what does not fit."""

import itertools
import json

import numpy as np
import pytest
from tiny import stock_checkpoint

from mea_compress.errors import RequestError
from mea_compress.planning.budget import _knapsack, allocate, candidates, cost_at, with_side
from mea_compress.planning.plans import make_plan, plan_budget
from mea_compress.planning.profiles import Profile, ProfilePoint, read_profile
from mea_compress.recipe import Recipe


def half(**changes):
    return Recipe(**{"kv_ratio": 0.5, "budget": "uniform", **changes})


def made_up(plan, cost=lambda layer, side, share: (1 + layer) * (1 - share) ** 2, **changes):
    """A profile of a plan whose costs are a formula of layer, side and share of the width."""
    points, first = [], plan.layers[0].spec
    for layer in plan.layers:
        for side, counts in candidates(layer, plan).items():
            whole = 8 if side == "both" else 4
            points += [
                ProfilePoint(layer.layer, side, count, cost(layer.layer, side, count / whole), 0.0) for count in counts
            ]
    values = {
        "source": "made up",
        "key_composition": first.key.composition,
        "value_composition": first.value.composition,
        "fit": "aligned",
        "layers": len(plan.layers),
        "heads": 4,
        "head_dim": plan.source.head_dim,
        "tokens": 100,
        "cross_entropy": 1.0,
        "floor": 0.0,
        "points": tuple(points),
    }
    return Profile(**values | changes)


@pytest.mark.parametrize(
    ("changes", "shares"),
    [({}, [1, 2, 3, 4, 5]), ({"time_limit": 9}, [1, 3, 5]), ({"time_limit": 9, "effort": "fast"}, [1.5, 3, 4.5])],
)
def test_a_time_limit_leaves_out_every_other_width(changes, shares, tmp_path):
    source = stock_checkpoint(tmp_path / "model", "llama", num_key_value_heads=4, head_dim=12)
    plan = make_plan(source, half(key_composition="latent", value_composition="latent", **changes))
    assert candidates(plan.layers[0], plan) == {side: [4 * share / 6 for share in shares] for side in ("key", "value")}


@pytest.mark.parametrize("seed", range(5))
def test_dynamic_programming_finds_what_a_search_finds(seed):
    random = np.random.default_rng(seed)
    choices = [
        [(int(s), float(c)) for s, c in zip(random.integers(1, 6, 4), random.random(4), strict=True)] for _ in range(4)
    ]
    for budget in range(4, 24, 3):
        fitting = [
            (sum(one[i][1] for one, i in zip(choices, pick, strict=True)), pick)
            for pick in itertools.product(range(4), repeat=4)
            if sum(one[i][0] for one, i in zip(choices, pick, strict=True)) <= budget
        ]
        taken, cost = _knapsack(choices, budget)
        if not fitting:
            assert taken is None
            continue
        assert cost == pytest.approx(min(fitting)[0])
        assert cost == pytest.approx(sum(one[i][1] for one, i in zip(choices, taken, strict=True)))
        assert sum(one[i][0] for one, i in zip(choices, taken, strict=True)) <= budget


PAIRS = [
    ("frequency", "latent"),
    ("latent", "latent"),
    ("joint", "joint"),
    ("head", "head"),
    ("pool", "pool"),
    ("prune", "prune"),
    ("share", "latent"),
]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_a_budget_is_kept_and_never_costs_more_than_equal_widths(tmp_path, pair, ratio):
    names = {"key_composition": pair[0], "value_composition": pair[1]}
    equal = make_plan(
        stock_checkpoint(tmp_path / "source"), half(kv_ratio=ratio if pair[0] != "pool" else 0.5, **names)
    )
    profile = made_up(equal)
    chosen = plan_budget(equal, profile)
    assert chosen.bytes_after <= equal.bytes_after
    assert chosen.profile is profile
    cost = 0.0
    for layer in equal.layers:
        sides = {"both": layer.spec.key.components + layer.spec.value.components}
        if not layer.spec.key.form.joint:
            sides = {side: layer.spec.side(side).components for side in ("key", "value")}
        for side, count in sides.items():
            cost += cost_at(profile, layer.layer, side, [count], 8 if side == "both" else 4)[0]
    assert chosen.predicted_kl <= cost + 1e-9
    kept = [layer.bytes_after for layer in chosen.layers]
    assert kept[1] >= kept[0]  # the second layer costs twice as much


def test_what_costs_nothing_is_cut_down_to_the_least(tmp_path):
    plan = make_plan(stock_checkpoint(tmp_path / "source"), half())
    chosen = plan_budget(plan, made_up(plan, lambda layer, side, share: (side == "value") * (1 - share)))
    assert all(layer.spec.key.components < 1 for layer in chosen.layers)
    assert all(layer.spec.value.components > 3 for layer in chosen.layers)


def test_where_nothing_costs_anything_all_of_the_budget_is_used(tmp_path):
    plan = make_plan(stock_checkpoint(tmp_path / "source"), half())
    assert plan_budget(plan, made_up(plan, lambda layer, side, share: 0.0)).bytes_after == plan.bytes_after


def test_widths_are_multiples_of_what_was_asked_for(tmp_path):
    plan = make_plan(stock_checkpoint(tmp_path / "source"), half(width_multiple=4))
    chosen = plan_budget(plan, made_up(plan))
    head_dim = plan.source.head_dim
    widths = [layer.spec.side(side).components * head_dim for layer in chosen.layers for side in ("key", "value")]
    assert all(width % 4 == 0 for width in widths) and len(set(widths)) > 1
    with pytest.raises(RequestError, match="width_multiple"):
        plan_budget(make_plan(plan.source.reader.directory, half(width_multiple=4096)), made_up(plan))


def test_costs_between_points_have_a_straight_logarithm():
    points = tuple(ProfilePoint(0, "key", count, cost, 0.0) for count, cost in ((1, 0.4), (2, 0.1), (3, 0.025)))
    profile = Profile("x", "a", "b", "aligned", 1, 4, 16, 10, 1.0, 0.0, points)
    found = cost_at(profile, 0, "key", [0.5, 1, 1.5, 2, 4], 4)
    assert found.tolist() == pytest.approx([0.8, 0.4, 0.2, 0.1, 1e-6])


def test_curves_are_made_monotone():
    points = tuple(ProfilePoint(0, "key", count, cost, 0.0) for count, cost in ((1, 0.4), (2, 0.1), (3, 0.3)))
    kept, costs = Profile("x", "a", "b", "aligned", 1, 4, 16, 10, 1.0, 0.0, points).curve(0, "key")
    assert kept == [1, 2, 3] and costs == pytest.approx([0.4, 0.2, 0.2])


def test_a_share_below_the_narrowest_widths_is_refused(tmp_path):
    plan = make_plan(stock_checkpoint(tmp_path / "source"), half(key_composition="head", value_composition="head"))
    profile = made_up(plan)
    small = make_plan(
        plan.source.reader.directory, half(kv_ratio=0.25, key_composition="head", value_composition="head")
    )
    assert all(layer.spec.key.components == 1 for layer in plan_budget(small, profile).layers)
    recipe = small.recipe.model_copy(update={"kv_ratio": 0.2})
    with pytest.raises(RequestError, match="narrowest widths"):
        allocate(type(small)(small.source, recipe, small.layers, small.decisions, small.costs), profile)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": 3}, "layers 3"),
        ({"head_dim": 5}, "head_dim 5"),
        ({"key_composition": "latent"}, "latent keys"),
        ({"points": ()}, "nothing of layer 0"),
    ],
)
def test_a_profile_of_something_else_is_refused(tmp_path, change, said):
    plan = make_plan(stock_checkpoint(tmp_path / "source"), half())
    with pytest.raises(RequestError, match=said):
        plan_budget(plan, made_up(plan, **change))


def test_a_profile_comes_back_from_its_file(tmp_path):
    plan = make_plan(stock_checkpoint(tmp_path / "source"), half())
    profile, file = made_up(plan), tmp_path / "profile.json"
    file.write_text(json.dumps(profile.to_json()))
    assert read_profile(file) == profile
    again = make_plan(plan.source.reader.directory, Recipe(kv_ratio=0.5, budget=str(file)))
    assert [layer.spec for layer in again.layers] == [layer.spec for layer in plan_budget(plan, profile).layers]
    assert again.to_json()["predicted_kl"] == pytest.approx(again.predicted_kl)
    assert not again.decisions.measures_budget and not again.decisions.searches_kv_split
    for text, said in (('{"points": 1}', "profile"), ("{", "budget"), ('{"layers": 3}', "budget")):
        file.write_text(text)
        with pytest.raises(RequestError, match=said):
            make_plan(plan.source.reader.directory, Recipe(kv_ratio=0.5, budget=str(file)))


def test_an_explicit_list_is_followed(tmp_path):
    source, file = stock_checkpoint(tmp_path / "source"), tmp_path / "widths.json"

    def planned(layers="all", **layer):
        file.write_text(json.dumps({"layers": [{"layer": 1, "key_components": 1.5, "value_components": 4} | layer]}))
        return make_plan(source, Recipe(kv_ratio=0.5, budget=str(file), layers=layers))

    with pytest.raises(RequestError, match=r"layer 1 1\.5 key components, and its keys stay as they are"):
        planned(layers="0")
    plan = planned()
    assert (plan.layers[1].spec.key.components, plan.layers[1].spec.value) == (1.5, plan.layers[1].before.value)
    assert plan.layers[0].spec.key.components == 2
    with pytest.raises(RequestError, match="names layer 7"):
        planned(layer=7)
    with pytest.raises(RequestError, match=r"1\.51 key components"):
        planned(key_components=1.51)


def test_paper_budgets_choose_layers(tmp_path):
    source = stock_checkpoint(tmp_path / "source")
    for name in ("half", "deep"):
        by_budget, by_layers = (make_plan(source, Recipe(kv_ratio=0.5, **{key: name})) for key in ("budget", "layers"))
        assert [layer.compressed for layer in by_budget.layers] == [layer.compressed for layer in by_layers.layers]
        assert not by_budget.decisions.measures_budget
    assert not make_plan(source, Recipe(kv_ratio=0.5, budget="full")).decisions.measures_budget
    with pytest.raises(RequestError, match="`layers`"):
        make_plan(source, Recipe(kv_ratio=0.5, budget="half", layers="1"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fit": "weights"}, "reads no text"),
        ({"kv_groups": 2}, "`kv_groups`"),
        ({"split": "even"}, "`split` even"),
        ({"sequences": 1}, "`sequences` 1"),
        ({"key_components": 2}, "`key_components`"),
    ],
)
def test_a_measured_budget_is_the_default_where_nothing_speaks_against_it(tmp_path, settings, said):
    source = stock_checkpoint(tmp_path / "source")
    assert make_plan(source, Recipe(kv_ratio=0.5)).decisions.measures_budget
    assert not make_plan(source, Recipe(kv_ratio=0.5, **settings)).decisions.measures_budget
    with pytest.raises(RequestError, match=said):
        make_plan(source, Recipe(kv_ratio=0.5, budget="measured", **settings))


def test_one_side_alone_is_compressed(tmp_path):
    layer = make_plan(stock_checkpoint(tmp_path / "source"), half()).layers[0]
    only = with_side(layer, "key", 1.5)
    assert only.spec.key.components == 1.5 and only.spec.value == layer.before.value
