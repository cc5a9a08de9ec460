import yaml
from plans import PLAN

from mea_compress.report.cards import export_card, model_card


class TestModelCard:
    def card(self, **changes):
        arguments = {
            "source": "someone/llama-x",
            "plan": PLAN,
            "fidelity": {"logit_difference": 1.5e-6},
            "recipe_yaml": "kv_ratio: 0.5\n",
            "versions": {"mea-compress": "0.1.0", "torch": "2.13.0"},
        }
        return model_card(**(arguments | changes))

    def front(self, card):
        return yaml.safe_load(card.split("---\n")[1])

    def test_front_matter_and_body(self):
        card = self.card()
        front = self.front(card)
        assert card.startswith("---\n") and card.endswith("\n")
        assert front["base_model"] == "someone/llama-x" and front["library_name"] == "transformers"
        assert "mea" in front["tags"]
        for part in (
            "trust_remote_code=True",
            "import mea_compress",
            "kv_ratio: 0.5",
            "torch 2.13.0",
            "1.5e-06",
            "62.5 %",
        ):
            assert part in card

    def test_a_path_is_not_published(self):
        card = self.card(source="/home/me/secret/llama-x")
        assert self.front(card)["base_model"] == "llama-x" and "secret" not in card

    def test_a_hostile_name_stays_a_name(self):
        card = self.card(source="x\n---\nlicense: mine: [")
        assert self.front(card)["base_model"] == "x --- license: mine: ["

    def test_the_licence_is_carried_over(self):
        original = "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [x]\nbase_model: y\n---\n# Hello\n"
        front = self.front(self.card(source_card=original))
        assert front["license"] == "apache-2.0" and front["language"] == ["en"] and front["base_model"] != "y"
        assert "license" not in self.front(self.card(source_card="---\na: [\n---\n"))
        assert "license" not in self.front(self.card(source_card="no front matter"))


def test_an_exported_checkpoint_has_a_card_of_its_own():
    exported = {
        "model_type": "llama",
        "key_value_heads": 2,
        "head_dim": 16,
        "query_and_output_width": 2,
        "weight_bytes_added": 2048,
        "kv_bytes_saved_per_token": 512,
        "saves_memory_from_tokens": 4,
    }
    card = export_card("/home/me/llama-x", exported, {"torch": "2.13.0"}, "---\nlicense: mit\ntags: [mea]\n---\n")
    front = yaml.safe_load(card.split("---\n")[1])
    assert (
        front["base_model"] == "llama-x" and front["license"] == "mit" and front["tags"] == ["kv-cache", "compression"]
    )
    assert "2 key/value head(s) of 16 channels" in card and "saved from 4 cached tokens on" in card
    assert "/home/me" not in card and card.endswith("With torch 2.13.0.\n")
