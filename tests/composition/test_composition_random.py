"""Composed = alone, training = serving = chunked, packed = separate, for random compositions.

A failure prints the smallest composition that fails, as YAML: `first_fault(yaml.safe_load(...))`
of composition_checks runs it again.
"""

from __future__ import annotations

import pytest
from composition_checks import RefusedLate, first_fault
from composition_configs import Refused
from composition_draw import any_case
from composition_shrink import report

QUICK, ALL = 300, 3000
TRIES = 50


def check(number: int) -> None:
    """Draw until the product takes a composition, so that the counts are real."""
    for attempt in range(TRIES):
        case = any_case(number + attempt * 1_000_003)
        try:
            fault = first_fault(case)
        except RefusedLate as error:
            # A window is no mask of a config, and grids are in the documents: nothing else may
            # be refused after the config was accepted.
            if case["mask"] != "window" and not any("grid" in d for d in case["documents"]):
                pytest.fail(f"seed {case['seed']}: refused only when it runs: {error}")
            continue
        except Refused:
            continue
        if fault is not None:
            pytest.fail(report(case, fault), pytrace=False)
        return
    pytest.fail(f"all of {TRIES} compositions from seed {number} are refused", pytrace=False)


@pytest.mark.parametrize("seed", range(QUICK))
def test_a_random_composition(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(QUICK, QUICK + ALL))
def test_another_random_composition(seed: int) -> None:
    check(seed)
