import pytest

from mea_compress.errors import RequestError
from mea_compress.recipe import Recipe, load_recipe
from mea_compress.sweeping.grid import commands, grid

COMMON = Recipe(kv_ratio=0.5, refine=0, text="a b.txt", seed=3, device="cpu")


def test_every_combination_once_and_with_a_name_of_its_own():
    points = grid(COMMON, ["default", "head", "frequency+latent"], [0.25, 0.5], [None])
    assert [point.name for point in points] == [
        "default-0.25",
        "default-0.5",
        "head-0.25",
        "head-0.5",
        "frequency+latent-0.25",
        "frequency+latent-0.5",
    ]
    chosen = [(point.recipe.key_composition, point.recipe.value_composition) for point in points]
    assert chosen == [(None, None)] * 2 + [("head", "head")] * 2 + [("frequency", "latent")] * 2
    assert [point.recipe.kv_ratio for point in points] == [0.25, 0.5] * 3
    assert {(point.recipe.refine, point.recipe.text, point.recipe.seed) for point in points} == {(0, ("a b.txt",), 3)}


def test_the_default_leaves_methods_to_the_recipe():
    (point,) = grid(load_recipe("paper-full"), ["default"], [0.5], [None])
    assert (point.recipe.key_composition, point.recipe.fit) == ("head", "weights")


@pytest.mark.parametrize(
    "asked, told",
    [
        ((["head", "head"], [0.5], [None]), "`methods` has head twice"),
        ((["head"], [], [None]), "`shares` names nothing"),
        ((["haed"], [0.5], [None]), "key_composition"),
        ((["latent+frequency"], [0.5], [None]), "value_composition"),
        ((["frequency"], [0.5], [None]), "value_composition"),
        ((["head"], [1.5], [None]), "kv_ratio"),
    ],
)
def test_what_cannot_be_swept(asked, told):
    with pytest.raises(RequestError) as caught:
        grid(COMMON, *asked)
    assert told in str(caught.value)


def test_commands_are_those_of_a_shell():
    (point,) = grid(COMMON, ["frequency+latent"], [0.3], [None])
    made, measured = commands(point, "my models/SRC", {"text": ["x.txt", "y z.txt"], "limit": 4, "chat_template": True})
    assert made == (
        "mea-compress compress 'my models/SRC' frequency+latent-0.3 --kv-ratio 0.3 --key-composition frequency "
        "--value-composition latent --refine 0 --text 'a b.txt' --seed 3 --device cpu"
    )
    assert measured == (
        "mea-compress evaluate frequency+latent-0.3 --reference 'my models/SRC' --text x.txt --text 'y z.txt' "
        "--limit 4 --chat-template"
    )
