"""Real photographs that a camera moves over: short videos whose caption is the way it moves.

    python benchmarks/moving_photographs.py DIR [--train 2400] [--test 400]

DIR holds cifar10-images.tar (or a tar of its shape); writes moving-photographs.tar beside where it
is run. No frame alone tells the way: `configs/members/video.yaml` must read time. Photographs of
the test videos are in none of the others.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from mm.data.modalities.base import get_modality
from mm.specs import Video

OUT = Path("moving-photographs.tar")
FRAMES, RATE, SIDE, SHOWN = 8, 8.0, 24, 48  # side of the window, and of the video
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "in": None, "out": None}


def clip(photograph: np.ndarray, way: str, rng: np.random.Generator) -> Video:
    """A video of a window that moves over a photograph (32, 32, 3), or draws in or out."""
    frames = []
    most = photograph.shape[0] - SIDE
    still = rng.integers(0, most + 1, 2)
    for i in range(FRAMES):
        step = i * most / (FRAMES - 1)
        move = WAYS[way]
        if move is None:
            step = step if way == "in" else most - step
            box = (
                step / 2,
                step / 2,
                photograph.shape[1] - step / 2,
                photograph.shape[0] - step / 2,
            )
        else:
            top, left = (
                still[a] if not move[a] else (step if move[a] > 0 else most - step) for a in (0, 1)
            )
            box = (left, top, left + SIDE, top + SIDE)
        picture = Image.fromarray(photograph).resize((SHOWN, SHOWN), Image.Resampling.BICUBIC, box)
        frames.append(np.asarray(picture))
    return Video(np.stack(frames), RATE)


def main() -> None:
    """Write the tar."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with cifar10-images.tar")
    parser.add_argument("--train", type=int, default=2400)
    parser.add_argument("--test", type=int, default=400)
    args = parser.parse_args()
    modality, rng = get_modality("video"), np.random.default_rng(0)
    left = {"train": args.train, "test": args.test}
    with tarfile.open(args.source / "cifar10-images.tar") as given, tarfile.open(OUT, "w") as out:
        members = [m for m in given.getmembers() if m.name.endswith((".png", ".jpg"))]
        for number in rng.permutation(len(members)):
            member = members[number]
            split = "test" if "/test/" in f"/{member.name}" else "train"
            if not left[split]:
                continue
            left[split] -= 1
            file = given.extractfile(member)
            assert file is not None
            photograph = np.asarray(Image.open(file).convert("RGB"))
            way = str(rng.choice(list(WAYS)))
            made = {"mp4": modality.file_of(clip(photograph, way, rng)), "txt": way.encode()}
            for ending, data in made.items():
                info = tarfile.TarInfo(f"{split}/{number:06d}.{ending}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    print(f"{args.train + args.test - sum(left.values())} videos in {OUT}")


if __name__ == "__main__":
    main()
