"""Where each case of the hostile trial is tested: all that did not end in one clean line then.

737 damaged or hostile inputs went through the command line once; those below ended in an internal
error, in silence, after more than a minute, by a signal, or with a file elsewhere. A case whose
number stands in the id of a test is found by it; `ELSEWHERE` says where the others are.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
NUMBERED = (
    "cli/test_hostile_runs.py", "data/test_hostile_sources.py", "decoders/test_hostile_models.py",
    "trainer/test_hostile_checkpoint.py",
)  # fmt: skip
CASES = (
    "1 7 57 62-75 82-86 99 101 104-119 148 153 264 270 273 274 304 310 336 354 355 364 369 370 378 "
    "379 388 393 394 397 398 401 402 404 406-408 410 412-414 417 420 422 424 425 428-431 433-444 "
    "452 455 456 461 471-473 481-487 490-492 494-498 500 503 504 538 546 571 573 575-577 581 "
    "584-586 593 597-601 603 604 610 611 622 624 625 631-634 643 644 649-651 656-666 670-674 "
    "676-687 689 690 692 693 695-703 707-710 712-715 720 722 729 733"
)
NOT_FAULTS = "493 499 667 668 669"  # inside a range above, and clean from the start
MANIFEST = "data/test_hostile_structure.py::test_a_manifest_that_lies_is_refused_by_key"
INDEX = "data/test_hostile_structure.py::test_an_index_that_lies_is_seen_by_verify_and_harms_nobody"
DAMAGED = "data/test_hostile_structure.py::test_a_damaged_index_is_made_anew_from_the_shards"
WORDS = "data/test_hostile_structure.py::test_a_vocabulary_that_lies_is_refused"
NONE = "data/test_hostile_structure.py::test_a_vocabulary_that_is_none"
OLDER = "test_a_damaged_checkpoint_is_passed_over_for_the_one_before"
CHECKPOINT = f"trainer/test_hostile_checkpoint.py::{OLDER}"
STATE = "trainer/test_hostile_checkpoint.py::test_an_edited_state_is_refused_by_key"
OTHER = "trainer/test_hostile_checkpoint.py::test_a_state_of_another_program_or_step_is_passed_over"
READING = "test_reading.py::test_every_file_that_a_command_reads_may_be_hostile"
NUMBERS = "report/test_hostile_run.py::test_any_number_may_stand_in_the_metrics"
# numbers -> (test, what stands in its table)
ELSEWHERE: dict[str, tuple[str, str]] = {
    "57": (MANIFEST, "a shard elsewhere"),
    "62 63": (MANIFEST, "a shard null"),
    "64 65": (MANIFEST, "no splits"),
    "66 67": (MANIFEST, "splits a list"),
    "68 69": (MANIFEST, "splits empty"),
    "70 71": (MANIFEST, "no kind"),
    "72 73": (MANIFEST, "no modalities"),
    "74 75": (MANIFEST, "modalities null"),
    "82 83": (MANIFEST, "no index"),
    "84 85 86": (READING, "manifest.json"),
    "99": (MANIFEST, "a shard twice"),
    "101": (MANIFEST, "lengths a string"),
    "104": (DAMAGED, "truncated"),
    "105": (DAMAGED, "empty"),
    "106": (DAMAGED, "a flipped byte"),
    "107": (DAMAGED, "an object"),
    "108": (DAMAGED, "compressed"),
    "109": (INDEX, "an offset beyond the shard"),
    "110": (INDEX, "a negative offset"),
    "111": (INDEX, "sizes of terabytes"),
    "112": (INDEX, "a kind out of range"),
    "113": (INDEX, "shard 7 of 3"),
    "114": (INDEX, "starts that fall"),
    "115": (INDEX, "a column missing"),
    "116": (INDEX, "keys that are no UTF-8"),
    "117 118": (INDEX, "offsets swapped"),
    "119": (INDEX, "lengths lie"),
    "153": ("data/test_hostile_structure.py::test_a_member_with_a_size_below_zero_is_refused", ""),
    "481": (WORDS, "10**12 ids"),
    "482": (WORDS, "ids below 0"),
    "483": (WORDS, "no ids"),
    "484": (WORDS, "half an id"),
    "485": (WORDS, "ids in words"),
    "487": (WORDS, "a modality twice"),
    "490": (WORDS, "a grid of nothing"),
    "491": (WORDS, "a grid below 0"),
    "492": (WORDS, "a grid of 10**18"),
    "494": (WORDS, "no codebooks"),
    "495": (WORDS, "10**9 codebooks"),
    "496": (WORDS, "a rate that is no number"),
    "497": (WORDS, "a modality that climbs"),
    "498": (WORDS, "a modality that is a list"),
    "500": (WORDS, "100 control tokens"),
    "503": (NONE, "\\xff\\xfe"),
    "504": (NONE, '"[" * 100_000'),
    "538": (READING, "tokenizer.yaml"),
    "571": ("test_hashes.py::test_a_flipped_bit_of_a_saved_model_is_named_with_its_mend", ""),
    "649": (CHECKPOINT, "mark a list"),
    "650": (CHECKPOINT, "mark null"),
    "651": (CHECKPOINT, "mark that vouches for nothing"),
    "656": (OTHER, '{"step": -1}'),
    "657": (OTHER, '{"step": "4"}'),
    "658": (OTHER, '{"step": None}'),
    "659": (STATE, '"stage"'),
    "660": (STATE, '"data"'),
    "661": (STATE, '"data "'),
    "662": (STATE, "data.cursor.block"),
    "663": (STATE, "data.cursor.step"),
    "664": (STATE, "optimizer state"),
    "665": (STATE, '"guard"'),
    "666": (STATE, "bytes_per_token"),
    "670": (CHECKPOINT, "state nested"),
    "671": (CHECKPOINT, "state binary"),
    "672": (CHECKPOINT, "state empty"),
    "673": (CHECKPOINT, "state a list"),
    "674": (OTHER, '{"schema": 99}'),
    "676 677": (CHECKPOINT, "of 100 GB"),
    "678 679": (CHECKPOINT, "beyond the file"),
    "680 681": (CHECKPOINT, "a pickle"),
    "682 683": (CHECKPOINT, '"empty"'),
    "684 685": (CHECKPOINT, '"truncated"'),
    "686 687": (CHECKPOINT, "of shapes that overflow"),
    "689": (CHECKPOINT, "weights gone"),
    "692": (
        "trainer/test_hostile_checkpoint.py::test_folders_that_are_no_checkpoints_are_left_alone",
        "step_²",
    ),
    "707": (NUMBERS, "NaN"),
    "708": (NUMBERS, "Infinity"),
    "709 713": (NUMBERS, "1e308"),
    "710 712": (NUMBERS, '"1" * 400'),
    "714": (NUMBERS, "5e-324"),
    "715": (NUMBERS, '"[" * 20000'),
    "720": ("report/test_hostile_run.py::test_any_json_may_stand_in_any_file", "results.json"),
    "722": ("report/test_hostile_run.py::test_a_config_of_aliases_costs_no_memory", ""),
    "729": ("report/test_hostile_run.py::test_folders_that_are_no_steps_are_left_out", "step_²"),
    "733": ("report/test_hostile_run.py::test_the_page_is_written_into_the_folder_alone", ""),
}


def cases() -> set[int]:
    found: set[int] = set()
    for word in CASES.split():
        first, _, last = word.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found - set(map(int, NOT_FAULTS.split()))


def numbered() -> set[int]:
    """Numbers that the ids of tests begin with."""
    found: set[int] = set()
    for name in NUMBERED:
        source = (HERE / name).read_text(encoding="utf-8")
        for ids in re.findall(r'"((?:\d+ )+)[^"]*"[:,\]]', source):
            found |= set(map(int, ids.split()))
        found |= set(map(int, re.findall(r"^def test_(\d+)_", source, re.MULTILINE)))
    return found


def test_every_case_of_the_trial_is_a_test() -> None:
    elsewhere = {int(n) for numbers in ELSEWHERE for n in numbers.split()}
    assert cases() - numbered() - elsewhere == set(), "cases without a test"
    assert elsewhere - cases() == set(), "not of the trial"


def test_what_the_table_names_is_there() -> None:
    for numbers, (test, param) in ELSEWHERE.items():
        name, _, function = test.partition("::")
        source = (HERE / name).read_text(encoding="utf-8")
        assert f"def {function}(" in source, numbers
        assert param in source, (numbers, param)
