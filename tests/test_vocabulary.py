"""The vocabulary: ranges by hand, what a longer one keeps, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mm.errors import UserError
from mm.specs import TokenSpec
from mm.vocabulary import RESERVED, Range, Vocabulary, extend_vocabulary

TEXT = TokenSpec("text", 5, fingerprint="a" * 64)
IMAGE = TokenSpec("image", 3, grid=(2, 2), fingerprint="b" * 64)
BOTH = extend_vocabulary([TEXT, IMAGE])


def test_ranges_follow_each_other_after_the_reserved_ids() -> None:
    r = RESERVED
    assert BOTH.range("text") == Range(1, r, r + 1, r + 2, r + 7)
    assert BOTH.range("image") == Range(2, r + 7, r + 8, r + 9, r + 12)
    assert BOTH.size == r + 12 and BOTH.modalities == ("text", "image")
    assert BOTH.spec("image") == IMAGE
    for ask in (BOTH.range, BOTH.spec):
        with pytest.raises(UserError, match="no modality 'imago'.*image"):
            ask("imago")


def test_the_modality_of_every_id() -> None:
    ids = np.arange(-2, BOTH.size + 2)
    expected = [0, 0, *[0] * RESERVED, *[1] * 7, *[2] * 5, 0, 0]
    assert BOTH.modality_of(ids).tolist() == expected
    assert BOTH.modality_of(ids[None]).shape == (1, len(ids))
    assert BOTH.modality_of(ids).dtype == np.int32


def test_a_modality_is_added_once_and_never_changed() -> None:
    assert BOTH.add(TEXT) == BOTH
    with pytest.raises(UserError, match="modality 'text' is taken by tokenizer aaaaaaaaaaaa, not"):
        BOTH.add(TEXT._replace(fingerprint="c" * 64))
    longer = extend_vocabulary([TokenSpec("audio", 2)], BOTH)
    assert longer.range("text") == BOTH.range("text") and len(longer.ranges) == 3


def test_a_beginning_is_told_from_another_vocabulary() -> None:
    one = extend_vocabulary([TEXT])
    assert one.is_prefix_of(BOTH) and BOTH.is_prefix_of(BOTH) and not BOTH.is_prefix_of(one)
    assert not extend_vocabulary([IMAGE]).is_prefix_of(BOTH)
    named = BOTH._replace(specials=("x", *BOTH.specials[1:]))
    assert not one.is_prefix_of(named) and not named.is_prefix_of(BOTH)


def test_what_shards_use_must_be_there_by_the_same_tokenizer() -> None:
    BOTH.require([IMAGE], "shards")
    with pytest.raises(UserError, match="shards: uses modality 'audio'"):
        BOTH.require([IMAGE, TokenSpec("audio", 2)], "shards")
    with pytest.raises(UserError, match="'image' was tokenised by cccccccccccc, this"):
        BOTH.require([TEXT, IMAGE._replace(fingerprint="c" * 64)], "shards")


def test_files_round_trip_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "new" / "vocabulary.json"
    BOTH.save(path)
    assert Vocabulary.load(path) == BOTH and [p.name for p in path.parent.iterdir()] == [path.name]
    assert Vocabulary.load(path).fingerprint == BOTH.fingerprint
    assert BOTH.fingerprint != extend_vocabulary([IMAGE, TEXT]).fingerprint
    raw = json.loads(path.read_text())
    with pytest.raises(UserError, match="no vocabulary at"):
        Vocabulary.load(tmp_path / "nowhere.json")

    def refused(change: dict) -> str:
        (tmp_path / "edited.json").write_text(json.dumps(raw | change))
        with pytest.raises(UserError) as told:
            Vocabulary.load(tmp_path / "edited.json")
        return str(told.value)

    assert "does not match its own hash" in refused({"sha256": "0" * 64})
    assert "does not match its own hash" in refused({"ranges": raw["ranges"][:1]})
    twice = {"ranges": [*raw["ranges"], raw["ranges"][0]]}
    assert "modality 'text' is there twice" in refused(twice)
    assert "ranges: " in refused({"ranges": 7})
    half = raw["ranges"][0] | {"vocab_size": 2**31 - 2 - RESERVED}
    assert "are more than fit into 32 bits" in refused({"ranges": [half]})
    fits = extend_vocabulary([TokenSpec("text", 2**31 - 1 - RESERVED - 2)])
    assert Vocabulary.from_json(fits.to_json()) == fits and fits.size == 2**31 - 1
    (tmp_path / "edited.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not a vocabulary file, or damaged"):
        Vocabulary.load(tmp_path / "edited.json")
