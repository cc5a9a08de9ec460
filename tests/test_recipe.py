import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mea_compress.errors import RequestError
from mea_compress.recipe import (
    EvaluateRecipe,
    Recipe,
    builtin_recipes,
    from_flags,
    given_settings,
    load_recipe,
    make_recipe,
    parse_size,
    read_changes,
    select_layers,
    to_yaml,
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def refusal(tmp_path: Path, text: str, **flags) -> str:
    with pytest.raises(RequestError) as caught:
        load_recipe(write(tmp_path, text), flags)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_recipe_that_an_earlier_version_wrote_means_what_it_meant(tmp_path):
    written = Path(__file__).parent / "data" / "checkpoint-0.1.0" / "recipe.yaml"
    assert "rotary_budget: energy" in written.read_text()
    assert load_recipe(written).rotary_allocation == "energy"
    settings = {"kv_ratio": 0.5, "rotary_budget": "uniform"}
    assert Recipe(**settings).rotary_allocation == make_recipe(None, settings).rotary_allocation == "uniform"
    assert "unknown key rotary_budget" in refusal(tmp_path, "rotary_budget: energy\nrotary_allocation: uniform")
    assert "rotary_allocation" in refusal(tmp_path, "kv_ratio: 0.5\nrotary_budget: all")


class TestSelectLayers:
    def test_the_papers_settings_at_its_own_depth(self):
        assert select_layers("half", 48) == tuple(range(11, 35))
        assert select_layers("deep", 48) == tuple(range(3, 48))
        assert select_layers("all", 48) == tuple(range(48))

    @given(st.integers(1, 200))
    def test_the_papers_settings_fit_any_depth(self, depth):
        half, deep = select_layers("half", depth), select_layers("deep", depth)
        assert len(half) == max(1, depth // 2)
        for chosen in (half, deep):
            assert chosen and chosen == tuple(range(chosen[0], chosen[-1] + 1))
            assert chosen[0] >= 0 and chosen[-1] < depth
        assert deep[-1] == depth - 1
        if depth > 1:
            assert deep[0] >= 1

    @given(st.sets(st.integers(0, 30), min_size=1))
    def test_a_list_means_its_layers(self, layers):
        spec = ",".join(str(layer) for layer in sorted(layers, reverse=True))
        assert select_layers(spec, 31) == tuple(sorted(layers))

    @pytest.mark.parametrize(
        "spec, expected",
        [
            ("0,2,4-7", (0, 2, 4, 5, 6, 7)),
            ("3-", (3, 4, 5, 6, 7)),
            ("5", (5,)),
            (" 1 , 1-2 ", (1, 2)),
            ("7-7", (7,)),
        ],
    )
    def test_ranges(self, spec, expected):
        assert select_layers(spec, 8) == expected

    @pytest.mark.parametrize("spec", ["8", "0-8", "8-", "3,9"])
    def test_past_the_last_layer(self, spec):
        with pytest.raises(RequestError, match="0 to 7"):
            select_layers(spec, 8)

    @pytest.mark.parametrize("spec", ["", "some", "1,,2", "-3", "1-2-3", "1.5", "4-2"])
    def test_unreadable(self, spec):
        with pytest.raises(RequestError, match="`layers`"):
            select_layers(spec, 8)


class TestBuiltins:
    def test_the_papers_recipes(self):
        assert {"paper-deep", "paper-full", "paper-half"} <= set(builtin_recipes())
        for name, layers in [("paper-full", "all"), ("paper-half", "half"), ("paper-deep", "deep")]:
            recipe = load_recipe(name)
            assert (recipe.kv_ratio, recipe.layers, recipe.fit, recipe.refine) == (0.5, layers, "weights", 0)
            assert (recipe.key_composition, recipe.value_composition) == ("head", "head")
            assert "2601.19611" in recipe.description

    def test_every_one_is_whole(self):
        recipes = {name: load_recipe(name) for name in builtin_recipes()}
        assert {"best-25", "best-50", "prune-only", "serve-anywhere"} <= set(recipes)
        assert all(recipe.description for recipe in recipes.values())
        best = recipes["best-50"].model_dump(exclude={"description", "kv_ratio"})
        assert recipes["best-25"].model_dump(exclude={"description", "kv_ratio"}) == best
        assert (recipes["best-25"].kv_ratio, recipes["best-50"].kv_ratio) == (0.25, 0.5)
        assert recipes["prune-only"].key_composition == recipes["prune-only"].value_composition == "prune"

    def test_flags_win(self):
        recipe = load_recipe("paper-half", {"kv_ratio": 0.25, "layers": None, "seed": 7})
        assert (recipe.kv_ratio, recipe.layers, recipe.seed) == (0.25, "half", 7)

    def test_a_ratio_wins_over_counts_of_the_recipe(self, tmp_path):
        path = write(tmp_path, "key_components: 2\nvalue_components: 3\n")
        recipe = load_recipe(path, {"kv_ratio": 0.25, "value_components": 1})
        assert (recipe.kv_ratio, recipe.key_components, recipe.value_components) == (0.25, None, 1)

    def test_a_mistyped_name(self):
        with pytest.raises(RequestError, match="did you mean paper-half"):
            load_recipe("paper-hlaf")
        with pytest.raises(RequestError, match="built-in ones are"):
            load_recipe("nowhere/zzz.yaml")


class TestFiles:
    def test_reads_what_people_write(self, tmp_path):
        path = write(
            tmp_path,
            "source: models/a\nout: b\nkv_ratio: 1\nlayers: [0, 2]\nheal: {learning_rate: 1e-4, steps: 5}\n"
            "evaluate:\n  text: held-out.txt\n",
        )
        recipe = load_recipe(path)
        assert recipe.source == Path("models/a") and recipe.out == Path("b")
        assert recipe.layers == "0,2"
        assert recipe.heal.learning_rate == 1e-4 and recipe.heal.steps == 5
        assert recipe.evaluate.text == ("held-out.txt",)
        path = write(tmp_path, "kv_ratio: 1\nevaluate: {tasks: [arc_easy, piqa], chat_template: true, retrieval: 64}\n")
        measured = given_settings(load_recipe(path).evaluate)
        assert measured == {"tasks": ("arc_easy", "piqa"), "chat_template": True, "retrieval": (64,)}
        assert load_recipe(write(tmp_path, "kv_ratio: 0.5\nlayers: 3\n")).layers == "3"

    @pytest.mark.parametrize(
        ("written", "names"),
        [("a.txt", ("a.txt",)), ("[a.txt, 'dataset:b/c:test']", ("a.txt", "dataset:b/c:test")), ("'-'", ("-",))],
    )
    def test_texts_are_one_or_several(self, tmp_path, written, names):
        lines = f"kv_ratio: 0.5\ntext: {written}\nheal: {{text: {written}}}\n"
        recipe = load_recipe(write(tmp_path, lines))
        assert recipe.text == recipe.heal.text == names
        (tmp_path / "again.yaml").write_text(to_yaml(recipe))
        assert load_recipe(tmp_path / "again.yaml") == recipe
        assert f"text: {names[0]}" in to_yaml(recipe) or len(names) > 1 or names == ("-",)
        assert Recipe(kv_ratio=0.5, text=[Path(name) for name in names]).text == names

    @pytest.mark.parametrize("written", ["3", "[]", "[a.txt, 3]", "{a: b}"])
    def test_what_names_no_text(self, tmp_path, written):
        assert "text" in refusal(tmp_path, f"kv_ratio: 0.5\ntext: {written}\n")

    def test_an_empty_file_leaves_all_to_the_flags(self, tmp_path):
        assert load_recipe(write(tmp_path, "# nothing\n"), {"kv_ratio": 0.5}) == Recipe(kv_ratio=0.5)

    @pytest.mark.parametrize(("written", "steps"), [("40", "40"), ("'40'", "40"), ("auto", "auto"), ("0", "0")])
    def test_healing_is_steps_or_settings(self, tmp_path, written, steps):
        recipe = load_recipe(write(tmp_path, f"kv_ratio: 0.5\nheal: {written}\n"))
        assert recipe.heal == steps and recipe.healing_settings is None
        assert load_recipe(write(tmp_path, to_yaml(recipe))) == recipe
        settings = load_recipe(write(tmp_path, "kv_ratio: 0.5\nheal: {steps: 3}\n")).healing_settings
        assert settings is not None and settings.steps == 3
        assert Recipe(kv_ratio=0.5).heal == "auto" and Recipe(kv_ratio=0.5, heal=settings).healing_settings == settings

    @pytest.mark.parametrize("written", ["-1", "1.5", "some", "true", "[3]"])
    def test_what_is_no_healing(self, tmp_path, written):
        message = refusal(tmp_path, f"kv_ratio: 0.5\nheal: {written}\n")
        assert message.startswith("heal in ") and "auto or a number of steps" in message

    @pytest.mark.parametrize(
        "text, told",
        [
            ("kv_ration: 0.5", "kv_ratio?"),
            ("kv-ratio: 0.5", "kv_ratio?"),
            ("kv_ratio: 0.5\nheal: {stps: 3}", "heal.steps?"),
            ("kv_ratio: 0.5\nzzz: 1", "known keys are"),
        ],
    )
    def test_unknown_keys_name_the_nearest(self, tmp_path, text, told):
        message = refusal(tmp_path, text)
        assert "unknown key" in message and told in message and "mine.yaml" in message

    @pytest.mark.parametrize(
        "key, value",
        [
            ("kv_ratio", "0"),
            ("kv_ratio", "1.01"),
            ("kv_ratio", "-0.5"),
            ("kv_ratio", ".nan"),
            ("kv_ratio", "half"),
            ("kv_ratio", "true"),
            ("key_components", "0"),
            ("value_components", "1.5"),
            ("layers", "most"),
            ("layers", "[0, x]"),
            ("key_composition", "heads"),
            ("value_composition", "frequency"),
            ("fit", "weight"),
            ("refine", "-1"),
            ("refine", "off"),
            ("text", "3"),
            ("sequence_length", "1"),
            ("sequences", "0"),
            ("statistics", "none"),
            ("kv_groups", "0"),
            ("shard_size", "big"),
            ("shard_size", "0GB"),
            ("seed", "-1"),
            ("device", "gpu"),
            ("dtype", "int8"),
            ("heal", "yes"),
            ("evaluate", "{}"),
        ],
    )
    def test_impossible_values_name_the_key(self, tmp_path, key, value):
        message = refusal(tmp_path, f"{key}: {value}")
        assert key in message and "mine.yaml" in message

    def test_an_impossible_parameter_is_named_as_one(self, tmp_path):
        message = refusal(tmp_path, "kv_ratio: 0.5", kv_ratio=1.5)
        assert message.startswith("`kv_ratio`") and "1.5" in message and "mine.yaml" not in message

    def test_not_a_recipe(self, tmp_path):
        assert "not a recipe" in refusal(tmp_path, "- 1\n- 2\n")
        assert "not valid YAML" in refusal(tmp_path, "a: [1\n")
        assert "twice" in refusal(tmp_path, "seed: 1\nkv_ratio: 0.5\nseed: 2\n")
        assert "YAML" in refusal(tmp_path, "a: !!python/object/apply:os.system ['true']\n")
        (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(RequestError, match="cannot be read"):
            load_recipe(tmp_path / "mine.yaml")

    def test_something_must_say_how_much_to_keep(self, tmp_path):
        assert "`kv_ratio`" in refusal(tmp_path, "fit: weights")
        assert load_recipe(None, {"key_components": 2}).kv_ratio is None


class TestExtends:
    def files(self, tmp_path, **texts):
        for name, text in texts.items():
            file = tmp_path / f"{name.replace('__', '/')}.yaml"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        return tmp_path / "mine.yaml"

    def test_a_file_says_only_what_is_different(self, tmp_path):
        mine = self.files(
            tmp_path,
            mine="extends: sub/base.yaml\nseed: 3\nheal: {steps: 7}\n",
            sub__base="extends: paper-half\nkv_ratio: 0.25\nheal: {steps: 5, learning_rate: 1e-4}\n",
        )
        recipe = load_recipe(mine, {"layers": "all"})
        paper = load_recipe("paper-half").model_dump()
        changes = {"kv_ratio": 0.25, "seed": 3, "layers": "all"}
        assert recipe.model_dump(exclude={"heal"}) == {k: v for k, v in (paper | changes).items() if k != "heal"}
        assert (recipe.heal.steps, recipe.heal.learning_rate) == (7, 1e-4)
        assert load_recipe(write(tmp_path, to_yaml(recipe))) == recipe

    def test_a_file_is_relative_to_the_one_that_says_so(self, tmp_path, monkeypatch):
        self.files(tmp_path, sub__mine="extends: base.yaml\n", sub__base="kv_ratio: 0.25\n", base="kv_ratio: 1\n")
        monkeypatch.chdir(tmp_path)
        assert load_recipe("sub/mine.yaml").kv_ratio == 0.25

    def test_a_share_takes_the_place_of_counts_below_it(self, tmp_path):
        mine = self.files(tmp_path, mine="extends: base.yaml\nkv_ratio: 0.25\n", base="key_components: 2\n")
        assert load_recipe(mine).key_components is None

    def test_a_section_can_be_taken_away_and_filled(self, tmp_path):
        base = "kv_ratio: 0.5\nheal: {steps: 5}\nevaluate: {limit: 4}\n"
        mine = self.files(tmp_path, mine="extends: base.yaml\nheal: 0\nevaluate: {text: a.txt}\n", base=base)
        recipe = load_recipe(mine)
        assert recipe.heal == "0" and (recipe.evaluate.limit, recipe.evaluate.text) == (4, ("a.txt",))

    def test_a_circle_is_refused(self, tmp_path):
        mine = self.files(tmp_path, mine="extends: base.yaml\nkv_ratio: 1\n", base="extends: ./mine.yaml\n")
        with pytest.raises(RequestError, match=r"mine\.yaml extends itself \(.*base\.yaml -> "):
            load_recipe(mine)
        with pytest.raises(RequestError, match="extends itself"):
            load_recipe(self.files(tmp_path, mine="extends: mine.yaml\n"))

    def test_a_fault_names_the_file_that_it_is_in(self, tmp_path):
        mine = self.files(tmp_path, mine="extends: base.yaml\nseed: 1\n", base="kv_ratio: 2\nheal: {stps: 1}\n")
        with pytest.raises(RequestError, match=r"kv_ratio in .*base\.yaml should be less than"):
            load_recipe(mine)
        with pytest.raises(RequestError, match=r"base\.yaml has an unknown key heal\.stps: did you mean heal\.steps"):
            load_recipe(mine, {"kv_ratio": 0.5})
        with pytest.raises(
            RequestError, match=r"mine\.yaml extends what cannot be found: there is no.*mean paper-half"
        ):
            load_recipe(self.files(tmp_path, mine="extends: paper-hlaf\n"))
        with pytest.raises(RequestError, match=r"extends in .*mine\.yaml should name"):
            load_recipe(self.files(tmp_path, mine="extends: [a, b]\n"))
        assert "did you mean extends?" in refusal(tmp_path, "extend: paper-half")


class TestChanges:
    def test_values_are_typed_by_their_fields(self):
        changes = read_changes(
            [
                "kv_ratio=1e-1",
                "seed=010",
                "layers=0,2",
                "text=[a.txt, 'b = c.txt']",
                "heal.steps=7",
                "evaluate.text=x=1.txt",
                "evaluate.chat_template=true",
                "evaluate.contexts=1024",
                "key_composition={method: prune, by: contribution}",
                "source=a",
            ]
        )
        recipe = load_recipe(None, changes)
        assert (recipe.kv_ratio, recipe.seed, recipe.layers, recipe.source) == (0.1, 10, "0,2", Path("a"))
        assert recipe.text == ("a.txt", "b = c.txt") and recipe.heal.steps == 7
        assert recipe.evaluate == EvaluateRecipe(text="x=1.txt", chat_template=True, contexts="1024")
        assert recipe.key_composition == {"method": "prune", "by": "contribution"}

    def test_they_win_over_the_recipe_key_by_key(self, tmp_path):
        path = write(tmp_path, "key_components: 2\nheal: {steps: 5, learning_rate: 1e-4}\n")
        recipe = load_recipe(path, read_changes(["kv_ratio=0.5", "heal.steps=7"]))
        assert (recipe.key_components, recipe.heal.steps, recipe.heal.learning_rate) == (None, 7, 1e-4)

    @pytest.mark.parametrize(
        "change, told",
        [
            ("kv_ratio", "write KEY=VALUE"),
            ("kv_ration=1", "did you mean kv_ratio?"),
            ("heal.stps=1", "did you mean heal.steps?"),
            ("seed.a=1", "seed has one value"),
            ("heal.steps.a=1", "heal.steps has one value"),
            ("extends=paper-half", "names the unknown key extends"),
        ],
    )
    def test_what_changes_nothing(self, change, told):
        with pytest.raises(RequestError, match="`set` ") as caught:
            read_changes([change])
        assert told in str(caught.value)

    @pytest.mark.parametrize(
        "change, told",
        [
            ("kv_ratio=half", "`kv_ratio` should be a number, not 'half'"),
            ("heal.steps=0", "`heal.steps` should be greater than or equal to 1, not 0"),
            ("heal.steps=1.5", "`heal.steps` should be a whole number, not '1.5'"),
            ("heal=null", "`heal` should be auto or a number of steps"),
            ("evaluate.limit=3", "says nothing to measure on"),
        ],
    )
    def test_an_impossible_value_names_its_key(self, change, told):
        with pytest.raises(RequestError) as caught:
            load_recipe("paper-half", read_changes([change]))
        assert told in str(caught.value)

    def test_steps_of_healing_and_settings_of_its_own(self):
        assert load_recipe("paper-half", read_changes(["heal=20"])).heal == "20"
        assert load_recipe("paper-half", read_changes(["heal={steps: 20}"])).heal.steps == 20

    def test_two_values_for_one_key(self):
        for changes, others in ((["seed=1", "seed=2"], {}), (["out=a"], {"out": Path("b"), "source": None})):
            with pytest.raises(RequestError, match="one of two values"):
                read_changes(changes, others)
        assert read_changes(["out=a"], {"out": None}) == {"out": "a"}


class TestToYaml:
    def test_round_trip(self, tmp_path):
        recipe = load_recipe(
            "paper-half", {"text": Path("a b.jsonl"), "out": Path("there"), "heal": {"steps": 3, "learning_rate": 3e-5}}
        )
        text = to_yaml(recipe)
        assert "there" not in text and "null" not in text
        assert load_recipe(write(tmp_path, text)) == recipe.model_copy(update={"out": None})

    @given(st.floats(1e-12, 1.0), st.integers(0, 2**63 - 1))
    def test_numbers_survive(self, ratio, seed):
        values = yaml.safe_load(to_yaml(Recipe(kv_ratio=ratio, seed=seed)))
        assert math.isclose(float(values["kv_ratio"]), ratio, rel_tol=0) and values["seed"] == seed


@pytest.mark.parametrize(
    "text, size",
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("1.5k", 1500), ("123", 123), ("1TB", 10**12)],
)
def test_parse_size(text, size):
    assert parse_size(text) == size
    assert Recipe(shard_size=text).shard_bytes == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5XB", "nan"])
def test_parse_size_refuses(text):
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize("value", ["5x", "0", "1024;2048", ""])
def test_contexts_are_whole_numbers(value):
    with pytest.raises(RequestError, match=r"`contexts` should be whole numbers such as 8192 or 1024,8192, not"):
        from_flags(EvaluateRecipe, {"text": Path("a.txt"), "contexts": value})


def test_contexts_may_be_written_as_yaml_does():
    settings = EvaluateRecipe.model_validate({"text": "a.txt", "contexts": [1024, 8192], "batches": 4})
    assert (settings.contexts, settings.batches) == ("1024,8192", "4")
