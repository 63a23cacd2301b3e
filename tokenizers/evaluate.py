"""What a tokenizer keeps and what it costs, with before/after files to look at and listen to."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.data.modalities.base import get_modality, modality_of_value, table
from mm.errors import UserError
from mm.specs import Encoded, ModalityTokenizer
from mm.tokenizers.audio.mel import log_mel, resample
from mm.tokenizers.quantizers.base import perplexity, usage_share

log = logging.getLogger(__name__)

DB_PER_NAT = 20 / math.log(10)
PSNR_CAP_DB = 100.0  # of equal images; infinity is no JSON
MEL_FLOOR = 1e-4  # -80 dB of full scale: below it two kinds of silence would differ
N_MELS, HOP = 64, 160  # of the mel distance and its picture
STOI_SECONDS = 3.0  # STOI needs 0.4 s of speech; shorter clips are joined
STOI_STRETCHES = 10  # that many are heard, evenly spread: 0.1 s of CPU each
N_SHOWN, N_SPECTRA = 16, 10
USAGE_ALERT = 0.5
# Below it a picture of 32 pixels a side shows its colours and hardly what it is of; above it a
# codec is nearer to one that always plays the average spectrum than to the recording.
PSNR_ALERT_DB, MEL_ALERT = 18.0, 0.7


def evaluate(
    tokenizer: ModalityTokenizer, raws: Sequence[Any], out_dir: str | Path | None = None
) -> dict[str, Any]:
    """Encode and decode ``raws`` and measure both ends.

    Args:
        tokenizer: of any modality.
        raws: str or bytes; uint8 (H, W, 3) images; or `Waveform`s. All of one kind, at least one.
        out_dir: folder for before/after files (`reconstructions.png`, or `NN_original.wav`,
            `NN_reconstructed.wav` and `spectrograms.png`, or `reconstructions.txt`); None writes
            nothing.

    Returns:
        JSON-able figures, units in their names. Always: ``modality``, ``items``, ``tokens``,
        ``tokens_per_item``, ``vocab_size``, ``n_codebooks``, ``codebook_usage_share`` and
        ``codebook_perplexity`` (of each book), ``alerts`` (sentences). Besides, by kind of raw
        value:

        - files as bytes: ``bytes_per_token``, ``exact_round_trip_share``;
        - text: ``bytes_per_token``, ``fertility_tokens_per_word``, ``exact_round_trip_share``;
        - image: ``psnr_db``, ``ssim`` (absent under 11 pixels a side), ``bits_per_pixel``;
        - audio: ``si_sdr_db``, ``stoi``, ``mel_distance_db`` beside
          ``mel_distance_db_of_mean_spectrum`` (what a codec that always plays the average spectrum
          would get) and their ``mel_distance_ratio``, ``bits_per_second``.

    Raises:
        UserError: there is nothing to evaluate on, a value of no modality, or a tokenizer that
            makes no codes.
    """
    if tokenizer.spec.continuous:
        raise UserError(
            f"tokenizer of '{tokenizer.spec.modality}' gives the values as they are: there are no "
            "codes to measure; what a model reaches with them says: mm eval RUN"
        )
    raws = list(raws)
    if not raws:
        raise UserError(
            "nothing to evaluate the tokenizer on: the split is empty; choose another with --split"
        )
    measure = _measure_of(raws[0], tokenizer)
    codes = tokenizer.encode(raws)
    decoded = tokenizer.decode(codes)
    spec = tokenizer.spec
    counts = histogram(codes, spec.n_codebooks, spec.vocab_size)
    n_tokens = int(counts.sum())
    figures: dict[str, Any] = {
        "modality": spec.modality,
        "items": len(raws),
        "tokens": n_tokens,
        "tokens_per_item": n_tokens / len(raws),
        "vocab_size": spec.vocab_size,
        "n_codebooks": spec.n_codebooks,
        "codebook_usage_share": usage_share(counts).tolist(),
        "codebook_perplexity": perplexity(counts).tolist(),
        "alerts": [],
    }
    bits = n_tokens * math.log2(max(spec.vocab_size, 2))
    folder = Path(out_dir) if out_dir is not None else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    figures |= measure(raws, decoded, bits, n_tokens, folder)
    if measure not in (
        _text,
        _files,
    ):  # few texts use all merges; an unused code of a codebook is capacity lost
        figures["alerts"] = [*usage_alerts(counts), *loss_alerts(figures)]
    for alert in figures["alerts"]:
        log.warning("%s tokenizer: %s", spec.modality, alert)
    return figures


def loss_alerts(figures: Mapping[str, Any]) -> list[str]:
    """Sentences on what decoded values lost, of figures as `evaluate` returns them."""
    mend = "a model learns no more than the codes show: train a tokenizer on such data"
    psnr, mel = figures.get("psnr_db"), figures.get("mel_distance_ratio")
    found = []
    if psnr is not None and psnr < PSNR_ALERT_DB:
        found.append(f"pictures come back at {psnr:.1f} dB (under {PSNR_ALERT_DB:g}); {mend}")
    if mel is not None and mel > MEL_ALERT:
        found.append(
            f"recordings come back at {mel:.2f} of the distance of an average spectrum (over "
            f"{MEL_ALERT:g}); {mend}"
        )
    return found


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of ``items``, evenly: shards are in the order of keys, so often of classes.

    The middle of each of ``count`` equal parts, so that every class of a sorted split is met.
    """
    n = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * n)] for i in range(n)]


def histogram(codes: Sequence[Encoded], n_codebooks: int, vocab_size: int) -> np.ndarray:
    """How often each code of each book occurs: (Q, K) int64."""
    ids = [np.asarray(code.ids, np.int64).reshape(-1) for code in codes]
    flat = np.concatenate([*ids, np.zeros(0, np.int64)])
    return np.bincount(flat, minlength=n_codebooks * vocab_size).reshape(n_codebooks, vocab_size)


def usage_alerts(counts: np.ndarray) -> list[str]:
    """A sentence for each book of a (Q, K) histogram that uses under half of what it could."""
    alerts = []
    for book, (share, row) in enumerate(zip(usage_share(counts), counts, strict=True)):
        possible = min(1.0, row.sum() / len(row))
        if possible and share < USAGE_ALERT * possible:
            alerts.append(
                f"codebook {book} uses {share:.0%} of its {len(row)} codes; train longer, lower "
                "codebook_size, or lengthen the warm-up without quantizer"
            )
    return alerts


Measure = Callable[[list[Any], list[Any], float, int, Path | None], dict[str, Any]]


def _measure_of(raw: Any, tokenizer: ModalityTokenizer) -> Measure:
    """What is measured of a modality besides its codes; of one without a measure here nothing."""
    own = table().raw.get(tokenizer.spec.modality)
    if isinstance(raw, bytes) and own is not None and not get_modality(own).is_text:
        return _files
    try:
        kind = modality_of_value(raw).kind
    except UserError as error:
        raise UserError(f"cannot evaluate: {error}") from error
    return {"text": _text, "image": _image, "audio": _audio}.get(kind, lambda *_: {})


# ---- text ----------------------------------------------------------------------------------------


def _text(
    raws: list[Any], decoded: list[Any], bits: float, n_tokens: int, folder: Path | None
) -> dict[str, Any]:
    as_bytes, again = ([_utf8(text) for text in texts] for texts in (raws, decoded))
    n_words = sum(len(raw.split()) for raw in raws)
    if folder is not None:
        pairs = list(zip(raws, decoded, strict=True))
        shown = [f"{raw!r}\n{new!r}\n" for raw, new in spread(pairs, N_SHOWN)]
        (folder / "reconstructions.txt").write_text("\n".join(shown), encoding="utf-8")
    return {
        "bytes_per_token": sum(map(len, as_bytes)) / max(n_tokens, 1),
        "fertility_tokens_per_word": n_tokens / max(n_words, 1),
        "exact_round_trip_share": float(
            np.mean([old == new for old, new in zip(as_bytes, again, strict=True)])
        ),
    }


def _files(
    raws: list[bytes], decoded: list[bytes], bits: float, n_tokens: int, folder: Path | None
) -> dict[str, Any]:
    """Files of a modality that are read as bytes."""
    same = [old == new for old, new in zip(raws, decoded, strict=True)]
    return {
        "bytes_per_token": sum(map(len, raws)) / max(n_tokens, 1),
        "exact_round_trip_share": float(np.mean(same)),
    }


def _utf8(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")


# ---- image ---------------------------------------------------------------------------------------


def _image(
    raws: list[Any], decoded: list[Any], bits: float, n_tokens: int, folder: Path | None
) -> dict[str, Any]:
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    squared, n_values, n_pixels = 0.0, 0, 0
    similarity: list[float] = []
    pairs = []
    for raw, new in zip(raws, decoded, strict=True):
        new = np.asarray(new)
        old = _as_seen(raw, new.shape[:2])
        pairs.append((old, new))
        a, b = (
            torch.from_numpy(np.ascontiguousarray(x)).double().permute(2, 0, 1)[None] / 255
            for x in (old, new)
        )
        squared += float((a - b).square().sum())
        n_values += a.numel()
        n_pixels += a.shape[2] * a.shape[3]
        if min(a.shape[2:]) >= 11:  # the window of SSIM
            similarity.append(float(ssim(b, a, data_range=1.0)))  # type: ignore[arg-type]
    mse = squared / n_values
    if folder is not None:
        _image_grid(spread(pairs, N_SHOWN), folder / "reconstructions.png")
    figures = {
        "psnr_db": min(PSNR_CAP_DB, -10 * math.log10(max(mse, 1e-300))),
        "bits_per_pixel": bits / n_pixels,
    }
    return figures | ({"ssim": float(np.mean(similarity))} if similarity else {})


def _as_seen(raw: Any, size: tuple[int, ...]) -> np.ndarray:
    """The original as uint8 (H, W, 3), brought to the square that the tokenizer sees."""
    from mm.tokenizers.image.tokenizer import fit

    raw = np.asarray(raw)
    if raw.ndim == 3 and raw.shape == (*size, 3):
        return raw
    if size[0] != size[1]:
        raise UserError(f"cannot compare an image of {raw.shape} with a decoded one of {size}")
    return (fit(raw, size[0]) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _image_grid(pairs: list[tuple[np.ndarray, np.ndarray]], file: Path) -> None:
    """Originals above, reconstructions below, each enlarged to 64 pixels without smoothing."""
    from PIL import Image

    height = max(p[0].shape[0] for p in pairs)
    width = max(p[0].shape[1] for p in pairs)
    grid = np.full((2 * height + 1, len(pairs) * (width + 1), 3), 255, np.uint8)
    for i, pair in enumerate(pairs):
        for row, image in enumerate(pair):
            top, left = row * (height + 1), i * (width + 1)
            grid[top : top + image.shape[0], left : left + image.shape[1]] = image
    zoom = max(1, -(-64 // height))
    Image.fromarray(grid.repeat(zoom, 0).repeat(zoom, 1)).save(file)


# ---- audio ---------------------------------------------------------------------------------------


def _audio(
    raws: list[Any], decoded: list[Any], bits: float, n_tokens: int, folder: Path | None
) -> dict[str, Any]:
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio as si_sdr

    rate = int(decoded[0].sample_rate)
    pairs = []
    for raw, new in zip(raws, decoded, strict=True):
        a = resample(
            torch.as_tensor(np.asarray(raw.samples, np.float32)), int(raw.sample_rate), rate
        )
        b = torch.as_tensor(np.asarray(new.samples, np.float32))
        b = torch.nn.functional.pad(b, (0, max(0, len(a) - len(b))))[: len(a)]
        if len(a):
            pairs.append((a, b))
    if not pairs:
        raise UserError("nothing to evaluate the tokenizer on: every recording is empty")
    seconds = sum(len(a) for a, _ in pairs) / rate
    distance, baseline = mel_distances_db(pairs, rate)
    if folder is not None:
        _audio_files(spread(pairs, N_SHOWN), rate, folder)
    figures = {
        "si_sdr_db": float(np.mean([float(si_sdr(b.double(), a.double())) for a, b in pairs])),
        "mel_distance_db": distance,
        "mel_distance_db_of_mean_spectrum": baseline,
        "mel_distance_ratio": distance / max(baseline, 1e-12),
        "bits_per_second": bits / seconds,
        "tokens_per_second": n_tokens / seconds,
    }
    score = _stoi(pairs, rate)
    return figures if score is None else figures | {"stoi": score}


def mel_distances_db(
    pairs: Sequence[tuple[Tensor, Tensor]], sample_rate: int
) -> tuple[float, float]:
    """Mean |log-mel difference| in dB, of pairs (original, reconstruction) of equal length (N,).

    Returns:
        Of the reconstructions, and of the originals' own mean spectrum put in place of every frame.
    """
    originals = [_log_mel(a, sample_rate) for a, _ in pairs]
    reconstructions = [_log_mel(b, sample_rate) for _, b in pairs]
    differences = [(b - a).abs() for a, b in zip(originals, reconstructions, strict=True)]
    distance = torch.cat(differences).mean()
    everything = torch.cat(originals)
    baseline = (everything - everything.mean(0)).abs().mean()
    return float(distance) * DB_PER_NAT, float(baseline) * DB_PER_NAT


def _log_mel(wave: Tensor, rate: int) -> Tensor:
    """(N,) samples to (F, N_MELS) natural log-mel magnitudes, 100 frames a second at 16 kHz."""
    return log_mel(wave[None], sample_rate=rate, n_mels=N_MELS, hop=HOP, floor=MEL_FLOOR)[0]


def _stoi(pairs: Sequence[tuple[Tensor, Tensor]], rate: int) -> float | None:
    """Short-time objective intelligibility of the pairs, joined to stretches long enough for it.

    None without any.
    """
    from torchmetrics.functional.audio.stoi import short_time_objective_intelligibility as stoi

    stretches: list[tuple[Tensor, Tensor]] = []
    joined: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        joined.append(pair)
        if sum(len(a) for a, _ in joined) >= STOI_SECONDS * rate:
            a, b = (torch.cat(side) for side in zip(*joined, strict=True))
            stretches.append((a, b))
            joined = []
    if (
        not stretches and sum(len(a) for a, _ in joined) >= rate
    ):  # all there is, if it is a second at least
        a, b = (torch.cat(side) for side in zip(*joined, strict=True))
        stretches.append((a, b))
    heard = stretches[:: max(1, len(stretches) // STOI_STRETCHES)]
    return float(np.mean([float(stoi(b, a, rate)) for a, b in heard])) if heard else None


def _audio_files(pairs: list[tuple[Tensor, Tensor]], rate: int, folder: Path) -> None:
    """Pairs of 16-bit WAV files, and one picture of all their spectra."""
    import soundfile
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for i, pair in enumerate(pairs):
        for name, wave in zip(("original", "reconstructed"), pair, strict=True):
            soundfile.write(folder / f"{i:02d}_{name}.wav", wave.numpy(), rate, subtype="PCM_16")
    # all clips on one time axis a row, a gap between them: a figure of many small axes takes
    # seconds to draw
    gap = torch.full((round(0.05 * rate / HOP), N_MELS), float("nan"))
    figure = Figure(figsize=(12, 3.6))
    FigureCanvasAgg(figure)  # a canvas of its own: pyplot would open a display and keep state
    axes = figure.subplots(2, 1, sharex=True)
    for row, name in enumerate(("original", "reconstructed")):
        mels = [_log_mel(pair[row], rate) * DB_PER_NAT for pair in spread(pairs, N_SPECTRA)]
        joined = torch.cat([part for mel in mels for part in (mel, gap)][:-1])
        extent = (0.0, len(joined) * HOP / rate, 0.0, float(N_MELS))
        axes[row].imshow(
            joined.T.numpy(),
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=-80,
            vmax=0,
            extent=extent,
        )
        axes[row].set_ylabel(f"{name}\nmel band")
    axes[1].set_xlabel("seconds")
    figure.savefig(folder / "spectrograms.png", dpi=100)
