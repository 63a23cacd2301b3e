"""Byte-level BPE and bytes.

Exact on any text, no control tokens, the right `tokenizers` package.
"""

from __future__ import annotations

import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from mm.config import Config
from mm.config import load as load_config
from mm.errors import UserError
from mm.registry import TokenizerField
from mm.specs import Encoded
from mm.tokenizers.load import load_tokenizer
from mm.tokenizers.text.bpe import BpeConfig, BpeTokenizer
from mm.tokenizers.text.bytes import BytesConfig

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "def forward(self, x):\n    return self.norm(x) + x\n",
    "spoken digit seven, handwritten digit seven",
    "Größe und Maß; 漢字と仮名; 🙂🙃",
] * 5


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return BpeConfig(vocab_size=400).fit(CORPUS)


def random_text(seed: int) -> str:
    """Code points of every plane, unassigned and private ones too, but no surrogates."""
    rng = random.Random(seed)
    planes = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(rng.randint(0, 60)))


@pytest.mark.parametrize("seed", range(60))
def test_any_text_comes_back_exactly(bpe: BpeTokenizer, seed: int) -> None:
    text = random_text(seed)
    assert bpe.decode(bpe.encode([text])) == [text]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\x00",
        "\x00\x00a\x00",
        "\r\n\r\n",
        "\ufeffbom",
        "e\u0301 \u00e9",
        "\u202eright to left",
        "a" * 5000,
        "  leading",
        "trailing  ",
        "\t\tif x:\n\t\t\tpass",
        "<|image|>",
        "\U0010ffff\ufffe",
        "👨‍👩‍👧‍👦",
    ],
)
def test_awkward_text_comes_back_exactly(bpe: BpeTokenizer, text: str) -> None:
    (back,) = bpe.decode(bpe.encode([text]))
    assert back == text
    assert unicodedata.normalize("NFC", back) == unicodedata.normalize("NFC", text)


def test_halves_of_surrogate_pairs_are_replaced_and_pairs_joined(bpe: BpeTokenizer) -> None:
    assert bpe.decode(bpe.encode(["a\ud800b", "\udc00", "\ud83d\ude42"])) == [
        "a\ufffdb",
        "\ufffd",
        "🙂",
    ]


def test_bpe_merges_what_it_has_seen(bpe: BpeTokenizer) -> None:
    (code,) = bpe.encode([CORPUS[2]])
    assert len(code.ids) < len(CORPUS[2]) / 2
    assert 256 < bpe.spec.vocab_size <= 400


def test_fitting_is_repeatable_and_takes_an_iterator() -> None:
    one = BpeConfig(vocab_size=300).fit(CORPUS)
    two = BpeConfig(vocab_size=300).fit(text for text in CORPUS)
    assert one.spec == two.spec
    assert one.spec != BpeConfig(vocab_size=299).fit(CORPUS).spec


def test_no_added_tokens_and_every_byte_has_an_id(bpe: BpeTokenizer) -> None:
    assert bpe.inner.get_added_tokens_decoder() == {}
    every = "".join(chr(i) for i in range(256)) + "\u07ff\uffff\U0010ffff"
    assert bpe.decode(bpe.encode([every])) == [every]


def test_a_file_with_added_tokens_is_refused(bpe: BpeTokenizer) -> None:
    from tokenizers import Tokenizer

    inner = Tokenizer.from_str(bpe.inner.to_str())
    inner.add_special_tokens(["<|image|>"])
    with pytest.raises(UserError, match="added tokens"):
        BpeTokenizer(BpeConfig(), inner)


def test_generated_ids_that_cut_a_character_decode_to_the_replacement(bpe: BpeTokenizer) -> None:
    (code,) = bpe.encode(["\U0001f9ff"])
    (back,) = bpe.decode([Encoded(code.ids[:-1])])
    assert "\ufffd" in back
    back.encode()  # can be written to a file


def test_no_text_at_all_is_said() -> None:
    with pytest.raises(UserError, match="no text to fit"):
        BpeConfig().fit([])


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="256"):
        BpeConfig(vocab_size=100)


def test_bpe_refuses_bytes_by_name(bpe: BpeTokenizer) -> None:
    with pytest.raises(UserError, match="expected str, got bytes"):
        bpe.encode([b"abc"])  # type: ignore[list-item]


def test_bytes_are_their_own_ids() -> None:
    tokenizer = BytesConfig().fit()
    codes = tokenizer.encode([b"\x00\xffA", "é", bytearray(b"xy")])
    assert [code.ids.tolist() for code in codes] == [[0, 255, 65], [0xC3, 0xA9], [120, 121]]
    assert tokenizer.decode(codes) == [b"\x00\xffA", "é".encode(), b"xy"]
    assert tokenizer.spec.vocab_size == 256


def test_a_batch_does_not_pad(bpe: BpeTokenizer) -> None:
    codes = bpe.encode(["a", "the quick brown fox", ""])
    assert [len(c.ids) for c in codes][2] == 0 and len(codes[0].ids) == 1
    assert all(isinstance(c.ids, np.ndarray) for c in codes)


@pytest.mark.parametrize("name", ["text", "bytes"])
def test_shipped_yaml_fits_saves_and_loads(name: str, tmp_path: Path) -> None:
    class File(Config):
        tokenizer: TokenizerField

    config = load_config(f"configs/tokenizer/{name}.yaml", File).tokenizer
    tokenizer = config.fit(CORPUS)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.spec == tokenizer.spec and loaded.spec.modality == name
    assert np.array_equal(loaded.encode([CORPUS[0]])[0].ids, tokenizer.encode([CORPUS[0]])[0].ids)


def test_hugging_faces_tokenizers_is_the_one_imported() -> None:
    """Our folder of the same name must not shadow it, even from the repository's root."""
    root = Path(__file__).parents[2]
    code = "import tokenizers; print(tokenizers.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert "site-packages" in run.stdout, run.stderr
