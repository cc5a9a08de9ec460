import re

import pytest

from mea_compress.training.step_bar import step_bar


def shown(err):
    """Return the last step and the total that a bar showed."""
    return [int(number) for number in re.findall(r"(\d+)/(\d+)", err)[-1]]


def test_steps_that_were_done_before_are_counted_and_take_no_time(capsys):
    with step_bar(10, True) as bar:
        bar.known(20, 15)
        assert bar._bar.format_dict["initial"] == bar._bar.n == 15
        bar._bar.last_print_t -= 2  # a second step would take as long
        bar.tick(0.25)
        bar._bar.refresh()
        assert bar._bar.format_dict["rate"] < 1
        for _ in range(4):
            bar.tick(0.25)
    err = capsys.readouterr().err
    assert shown(err) == [20, 20] and "healing" in err and "kl=0.2500" in err


def test_one_bar_stands_for_several_distillations(capsys):
    """Two of 12 steps were expected, of which two are trials; the first one's trials are three."""
    totals = []
    with step_bar(24, True) as bar:
        for later in (12, 0):
            for _ in range(3):
                bar.tick(0.5)
            bar.known(13, 3, later)
            totals.append(bar._bar.total)
            for _ in range(10):
                bar.tick(0.5)
            bar.through()
    assert totals == [25, 26] and shown(capsys.readouterr().err) == [26, 26]


def test_a_bar_that_ends_early_is_full(capsys):
    with step_bar(10, True) as bar:
        bar.tick(0.5)
    assert shown(capsys.readouterr().err) == [1, 1]


@pytest.mark.parametrize("expected", [None, 10])
def test_no_bar_is_shown_where_none_is_wanted(expected, capsys):
    with step_bar(expected, False) as bar:
        bar.known(5, 2)
        bar.tick(0.5)
    assert capsys.readouterr().err == ""
