import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import PLAN

from mea_compress.report import tables as report
from mea_compress.report.measurements import evaluation_report, evaluations_report


class TestTable:
    def test_every_line_is_as_wide(self):
        text = report.table([["one", 1], ["three", 1000], ["four", None]], ["what", "n"])
        assert text.splitlines() == [
            "| what  |    n |",
            "|-------|-----:|",
            "| one   |    1 |",
            "| three | 1000 |",
            "| four  |    – |",
        ]

    def test_no_rows(self):
        assert len(report.table([], ["a", "b"]).splitlines()) == 2

    @given(st.lists(st.tuples(st.text(), st.floats(), st.none() | st.text()), max_size=5))
    def test_cells_stay_in_their_table(self, rows):
        lines = report.table(rows, ["a", "b", "c"]).split("\n")
        assert len(lines) == len(rows) + 2
        assert len({len(line) for line in lines}) == 1
        assert all(line.replace("\\|", "").count("|") == 4 for line in lines)


class TestUnits:
    @pytest.mark.parametrize(
        "size, text",
        [
            (0, "0 B"),
            (512, "512 B"),
            (1536, "1.50 KiB"),
            (1024, "1 KiB"),
            (2.25 * 2**30, "2.25 GiB"),
            (20.5 * 2**20, "20.5 MiB"),
            (5000 * 2**40, "5000 TiB"),
        ],
    )
    def test_bytes(self, size, text):
        assert report.format_bytes(size) == text

    @pytest.mark.parametrize(
        "number, text",
        [(0, "0"), (512, "512"), (999, "999"), (9999, "10 K"), (105e6, "105 M"), (1.236e9, "1.24 B"), (999_999, "1 M")],
    )
    def test_counts(self, number, text):
        assert report.format_count(number) == text

    @given(st.integers(0, 10**15))
    def test_counts_are_near(self, number):
        digits, _, unit = report.format_count(number).partition(" ")
        scale = 1000 ** ("KMBT".index(unit) + 1) if unit else 1
        assert math.isclose(float(digits) * scale, number, rel_tol=0.006)


def test_plan_report_joins_layers_that_are_alike():
    text = report.plan_report(PLAN)
    assert "62.5 %" in text and "105 M" in text
    assert "| 0      | 4 as they are | 4 as they are |" in text
    assert "| 1-3    | 2 head" in text


def test_evaluation_report():
    measured = {
        "tokens": 12345,
        "cross_entropy": 1.23456,
        "perplexity": 3.437,
        "kl": 0.0312,
        "top1_agreement": 0.912,
        "kv_bytes_per_token": 1536.0,
        "reference": {"cross_entropy": 1.2, "perplexity": 3.32, "kv_bytes_per_token": 3072.0},
        "decode_tokens_per_second": 88.123,
    }
    text = evaluation_report(measured)
    for part in ("12,345", "1.2346", "0.0312", "91.20 %", "1.50 KiB", "3 KiB", "88.1", "reference"):
        assert part in text
    alone = evaluation_report({**measured, "reference": None, "kl": None, "top1_agreement": None})
    assert "KL" not in alone and "| reference" not in alone


def test_several_evaluations_stand_side_by_side():
    def score(value, error):
        return {
            "task": "piqa",
            "metric": "acc",
            "value": value,
            "standard_error": error,
            "examples": 1838,
            "few_shot": 5,
        }

    def cells(*shares):
        return [
            {"task": "passkey", "length": 1024, "depth": depth, "prompts": 4, "exact_match": share}
            for depth, share in zip((0.0, 1.0), shares, strict=True)
        ]

    agreement = {"tokens": 64, "prompts": 32, "prompt_tokens": 64, "mean": 12.25, "median": 7.5, "never_differs": 0.125}
    reference = {
        "cross_entropy": 1.0,
        "perplexity": 2.718,
        "kv_bytes_per_token": 1024.0,
        "tasks": [score(0.75, None)],
        "retrieval": cells(1, 1),
    }
    first = {"tokens": 10, "kl": 0.25, "kv_bytes_per_token": 512.0, "reference": reference, "agreement": agreement}
    second = first | {"kl": 0.5, "tasks": [score(0.25, 0.01)], "retrieval": cells(0.5, 1)}
    first |= {"tasks": [score(0.5, 0.02)], "retrieval": cells(0, 0.25)}
    text = evaluations_report({"out/half": first, "out/quarter": second})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line]
    assert rows[0] == ["", "half", "quarter", "reference"]
    assert ["KL from the reference (nats/token)", "0.2500", "0.5000", "–"] in rows
    assert ["piqa, 5 shots", "acc", "1,838", "0.5000 ± 0.0200", "0.2500 ± 0.0100", "0.7500"] in rows
    assert ["passkey", "1,024", "half", "0 %", "25 %", "12 %", "8"] in rows
    assert ["passkey", "1,024", "quarter", "50 %", "100 %", "75 %", "8"] in rows
    assert ["half", "12.2", "7.5", "12 %", "64", "32"] in rows
    alike = evaluations_report({"a/half": first, "b/half": second})
    assert "a/half" in alike and "b/half" in alike


def errors(key, value, **more):
    return {"key_relative_error": key, "value_relative_error": value, **more}


class TestFidelity:
    def test_a_deep_model_shows_its_worst_layers_and_where_the_rest_is(self):
        layers = {str(i): errors(0.01 * i, 0.3 if i == 3 else 0.001) for i in range(30)}
        text = report.fidelity_report({"layers": layers, "verification": {"largest_difference": 6.9e-07}})
        worst, line, verified = text.split("\n\n")
        assert [row.split("|")[1].strip() for row in worst.splitlines()[2:]] == ["3", "29", "28", "27", "26"]
        assert worst.splitlines()[2].split() == ["|", "3", "|", "0.03", "|", "0.3", "|"]
        assert "compression.json has all 30" in line and "\n" not in line
        assert "verification largest difference" in verified and "6.9e-07" in verified

    def test_a_shallow_model_shows_all_and_what_refinement_did(self):
        refined = {"refinement": {"before": 0.48436, "after": 0.37, "rate": 0.03}}
        text = report.fidelity_report({"layers": {"0": errors(0.4, 0.2), "1": errors(0.5, 0.1, **refined)}})
        assert [line.split() for line in text.splitlines()[2:]] == [
            ["|", "1", "|", "0.5", "|", "0.1", "|", "0.4844", "|", "0.37", "|"],
            ["|", "0", "|", "0.4", "|", "0.2", "|", "–", "|", "–", "|"],
        ]
        assert "compression.json" not in text

    def test_nothing_was_fitted(self):
        assert report.fidelity_report({"layers": {}, "verification": {}}) == report.key_value_table({})
        assert report.fidelity_report({}) == ""


def test_nested_names_and_values_in_a_table():
    text = report.key_value_table(
        {"family": "llama", "cache_bytes": {"at_8k": 2048}, "tied": True, "layers": [{"a": 1}], "n": 32000}
    )
    assert "cache bytes at 8k" in text and "2 KiB" in text and "yes" in text and "32,000" in text and "{" not in text


def test_plans_and_inspections_show_whole_caches():
    cache = [{"tokens": 8192, "batch": 2, "before": 1 << 20, "after": 1 << 19}]
    text = report.plan_report(PLAN | {"cache": cache, "output_bytes": 1 << 30, "memory_bytes": 100 << 20})
    assert "2 sequences" in text and "8,192 tokens" in text and "512 KiB" in text
    assert "1 GiB" in text and "100 MiB" in text
    layer = {"key_components": 4, "key_composition": "none", "value_components": 4, "value_composition": "none"}
    layers = [
        {"layer": i, **layer, "kv_bytes_per_token": 512, "sliding_window": 5 if i == 2 else None} for i in range(3)
    ]
    found = {"family": "llama", "attention": layers, "cache": [{"tokens": 8192, "batch": 1, "bytes": 1 << 30}]}
    text = report.inspection_report(found)
    assert "| 0-1 " in text and "| 2 " in text and "1 GiB" in text and "llama" in text
