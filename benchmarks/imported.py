"""Our step and our decode beside those of `transformers`, on the same imported weights.

    PYTHONPATH=. python benchmarks/imported.py --families llama mamba

A random model of each family, written by `transformers` itself, is imported with the comparison of
logits, so both sides compute one function. A step is forward, loss, backward of `--rows` rows of
`--tokens` ids; a decode continues a prompt of `--prompt` ids by `--new`, greedily, with a cache.
Each side's losses and ids are compared before they are timed. Processor time of one process, ratio
of neighbouring runs: theirs over ours, so that 2 means that we take half as long. On a GPU
(`--device cuda`) time by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["USE_HUB_KERNELS"] = "NO"  # before transformers is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import measure  # noqa: E402
import torch  # noqa: E402

from mm.batch import Batch  # noqa: E402
from mm.decoders.generate import generate_tokens  # noqa: E402
from mm.interchange.read import import_model  # noqa: E402
from mm.layout import Layout  # noqa: E402
from mm.model.model import Model  # noqa: E402
from mm.specs import Segment  # noqa: E402
from mm.tokenizers.text.hf import HfConfig  # noqa: E402

IDS, D, LAYERS, HEADS, HIDDEN = 4096, 384, 6, 6, 1024
SHARED = {
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "intermediate_size": HIDDEN,
    "vocab_size": IDS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
BARE = {key: SHARED[key] for key in SHARED if "heads" not in key and key != "intermediate_size"}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
DELTA = {
    "head_dim": 64,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "shared_expert_intermediate_size": 256,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
}
# Family -> (class, settings).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SHARED),
    "gpt2": (
        "GPT2",
        {
            "n_embd": D,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": 4 * D,
            "vocab_size": IDS,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "qwen3": ("Qwen3", {**SHARED, "head_dim": D // HEADS}),
    "gemma2": ("Gemma2", {**SHARED, "head_dim": D // HEADS, "sliding_window": 128}),
    "qwen3_moe": ("Qwen3Moe", {**SHARED, **EXPERTS}),
    "mamba": ("Mamba", BARE),
    "mamba2": ("Mamba2", {**BARE, "num_heads": 12, "head_dim": 64, "n_groups": 1}),
    "recurrent_gemma": (
        "RecurrentGemma",
        {**SHARED, "attention_window_size": 128, "intermediate_size": 2 * HIDDEN},
    ),
    "qwen3_next": ("Qwen3Next", {**SHARED, **EXPERTS, **DELTA}),
}


def pair(family: str, folder: Path, device: str) -> tuple[Any, Model]:
    """Their model and ours, of one file of weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "theirs")
    (folder / "theirs" / "tokenizer.json").write_bytes(HfConfig.smallest_tokenizer().source)
    report = import_model(folder / "theirs", folder / "ours")
    assert report is not None
    print(f"{family}: logits differ by {report.difference:.1e}", flush=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "theirs", dtype=torch.float32
    )
    return theirs.to(device), Model.from_pretrained(folder / "ours").float().to(device)


def steps(theirs: Any, ours: Model, rows: int, tokens: int) -> tuple[Callable, Callable]:
    """A step of each on the same ids; their losses agree."""
    device = next(ours.parameters()).device
    ids = torch.randint(3, IDS, (rows, tokens), device=device)
    first = ours.vocabulary.range("text").first
    own = (ids + first).int()
    ends = torch.full_like(own[:, :1], -1)
    targets = torch.cat([own[:, 1:], ends], 1)
    layout = Layout.plain(rows, tokens).to(device)
    batch = Batch(layout, own[..., None], targets[..., None], (targets >= 0).float())

    def mine() -> torch.Tensor:
        out: Any = ours(batch).heads["tokens"]
        loss = (out.nll * batch.weight.flatten()).sum() / batch.weight.sum()
        loss.backward()
        ours.zero_grad(set_to_none=True)
        return loss.detach()

    def peer() -> torch.Tensor:
        loss = theirs(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        theirs.zero_grad(set_to_none=True)
        return loss.detach()

    ours.train(), theirs.train()
    a, b = float(mine()), float(peer())
    # Rows of control ids, begin and end, which theirs has not, take their share of the softmax.
    assert abs(a - b) < 0.02, f"losses {a} and {b}"
    return mine, peer


def decodes(theirs: Any, ours: Model, prompt: int, new: int) -> tuple[Callable, Callable]:
    """A greedy continuation by each; the same ids."""
    ours.eval(), theirs.eval()
    device = next(ours.parameters()).device
    ids = torch.randint(3, IDS, (prompt,))
    start = torch.cat([torch.tensor([1]), ids])[None].to(device)
    segment = Segment("text", ids.numpy(), role="target")

    def mine() -> Any:
        with torch.no_grad():
            return generate_tokens(
                ours, ours.vocabulary, [[segment]], "text", temperature=0.0, max_tokens=new
            )[0]

    def peer() -> Any:
        with torch.no_grad():
            return theirs.generate(
                start, do_sample=False, max_new_tokens=new, min_new_tokens=new, use_cache=True
            )[0, start.shape[1] :]

    found, wanted = torch.as_tensor(mine()).flatten().tolist()[-new:], peer().tolist()
    same = next((i for i, (x, y) in enumerate(zip(found, wanted, strict=False)) if x != y), new)
    print(f"  decode: the first {same} of {new} ids are the same", flush=True)
    return mine, peer


def main() -> None:
    """Print two ratios a family, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*", default=[*FAMILIES], choices=[*FAMILIES])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device != "cpu":
        measure.timed = by_the_clock
    told: dict[str, Any] = {}
    for family in args.families:
        with tempfile.TemporaryDirectory() as folder:
            theirs, ours = pair(family, Path(folder), args.device)
            mine, peer = steps(theirs, ours, args.rows, args.tokens)
            (step,) = measure.ratios(mine, peer, repeats=args.repeats)
            mine, peer = decodes(theirs, ours, args.prompt, args.new)
            (decode,) = measure.ratios(mine, peer, repeats=args.repeats)
        told[family] = {"step": step.inverse(), "decode": decode.inverse()}
        for what, ratio in told[family].items():
            print(f"  {what}: theirs {ratio.value:.2f} x ours [{ratio.low:.2f}, {ratio.high:.2f}]")
    if args.json:
        args.json.write_text(json.dumps(told, indent=1) + "\n")


def by_the_clock(work: Callable[[], object]) -> float:
    """Seconds until the device is done."""
    import time

    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
