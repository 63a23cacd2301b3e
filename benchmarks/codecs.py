"""A codec at its full size beside `transformers`: parity, seconds and memory, random weights.

    PYTHONPATH=. python benchmarks/codecs.py --seconds 1

DAC as published for 44.1 kHz (arXiv:2306.06546): 76.7 M parameters, hop 512, nine books. One
signal is encoded and decoded by each, in turn; processor time of one thread, theirs over ours, so
that 2 means that we take half as long. Memory: the peak of live tensor bytes (mm/plan/tally.py).
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["USE_HUB_KERNELS"] = "NO"  # before transformers is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from measure import Ratio  # noqa: E402

from mm.interchange.codecs.dac import USUAL  # noqa: E402
from mm.interchange.read import read_settings  # noqa: E402
from mm.interchange.read_codec import import_codec  # noqa: E402
from mm.plan.tally import Measure  # noqa: E402
from mm.specs import Waveform  # noqa: E402
from mm.tokenizers.load import load_tokenizer  # noqa: E402

RATE = 44100
FULL: dict[str, Any] = USUAL | {"sampling_rate": RATE}  # sizes of the paper


def peak(work: Callable[[], object]) -> int:
    """MiB of tensors at the peak of a call, those that it was given with them."""
    gc.collect()
    with Measure() as measure:
        work()
    return measure.live.peak >> 20


def spent(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        given, out = Path(temporary) / "given", Path(temporary) / "ours"
        peer = transformers.DacModel(transformers.DacConfig(**FULL)).eval()
        peer.save_pretrained(given)
        report = import_codec(given, out, read_settings(given))
        assert report is not None
        ours: Any = load_tokenizer(out)
    n = sum(p.numel() for p in peer.parameters())
    print(f"{n / 1e6:.1f} M parameters; {report}", flush=True)
    x = np.random.default_rng(0).normal(0, 0.1, round(args.seconds * RATE)).astype(np.float32)
    sound, wave = [Waveform(x, RATE)], torch.from_numpy(x)[None, None]
    wave = torch.nn.functional.pad(wave, (0, -len(x) % peer.config.hop_length))
    codes = ours.encode(sound)
    theirs = torch.from_numpy(ours.frames(codes[0].ids).T.copy()).long()[None]
    with torch.no_grad():
        peaks = [peak(lambda: ours.decode(ours.encode(sound))), peak(lambda: peer(wave))]
    print("peak of live tensors: {} MiB, theirs {}".format(*peaks), flush=True)
    pairs = {
        "encode": (lambda: ours.encode(sound), lambda: peer.encode(wave)),
        "decode": (lambda: ours.decode(codes), lambda: peer.decode(audio_codes=theirs)),
    }
    for name, (mine, other) in pairs.items():
        with torch.no_grad():
            times = [(spent(mine), spent(other)) for _ in range(args.repeats)]
        ratio = Ratio.of([b / a for a, b in times])
        least = [min(each) for each in zip(*times, strict=True)]
        print(
            f"{name}: {least[0]:.2f} s for {args.seconds:g} s of sound, theirs {least[1]:.2f}; "
            f"theirs {ratio.value:.2f} x ours [{ratio.low:.2f}, {ratio.high:.2f}]",
            flush=True,
        )


if __name__ == "__main__":
    main()
