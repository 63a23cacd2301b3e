"""LoRA beside full fine-tuning, and beside PEFT with transformers, on one imported checkpoint.

    python benchmarks/finetune.py                  # 98 M parameters, one row of 512 tokens
    python benchmarks/finetune.py --pairs 2 --layers 2
    python benchmarks/finetune.py --no-memory --chat talks.jsonl   # a step over conversations

`transformers` makes a random Llama, `mm import` takes it. Memory: the peak of live tensor bytes of
one step of AdamW whose states are there (mm/plan/tally.py counts both alike). Time: a step of ours
and a step of PEFT's on the same weights, with adapters on the same matrices, in turn, by processor
time; both losses are printed: before the first update they are equal but for 18 ids of ours, in
the softmax alone, that their tokenizer lacks.

With `--chat` a step takes `--samples` conversations of a file (`messages`, a line each), loss on
assistant turns alone. Each stack lays them out as it trains: ours behind one another in a row, and
logits only where there is a loss; theirs a row each, filled up to the longest as `transformers`'
own collator does (rows without padding need FlashAttention there, so a GPU). Each pair of steps
takes other conversations; with `--alike` of like length, as `group_by_length` does. The self-check
of kernels is off: a run has it once a kind of call, here nearly every step would be a new one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import Ratio
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mm.batch import Batch
from mm.interchange.check import compare
from mm.interchange.peft import with_adapters
from mm.interchange.read import import_model
from mm.layout import Doc, Layout
from mm.model.folder import load_tensors, read_config
from mm.model.model import LmConfig, Model
from mm.plan.tally import Measure
from mm.reading import parse_json
from mm.tokenizers.text.hf import HfConfig
from mm.trainer.fit_weights import adapters, for_linears
from mm.trainer.optimizers.adamw import AdamWConfig
from mm.vocabulary import Vocabulary

RANK = 8
THEIRS = ["q_proj", "k_proj", "v_proj"]
AUTOCAST = False  # --autocast: products of both stacks in bfloat16


def checkpoint(folder: Path, layers: int, vocab: int) -> Path:
    """A random Llama with a tokenizer."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=768,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        intermediate_size=2048,
        vocab_size=vocab,
        tie_word_embeddings=True,
        bos_token_id=3,
        eos_token_id=4,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(HfConfig.smallest_tokenizer().source)
    return folder


def own(folder: Path, lora: bool) -> Model:
    """Our model of an imported folder, with adapters upon queries, keys and values or without."""
    lm = LmConfig.model_validate(read_config(folder))
    words = {"rank": RANK, "alpha": 2.0 * RANK, "targets": ["qkv"]}
    config = with_adapters(lm, **words) if lora else lm
    model = config.build(Vocabulary.load(folder / "vocabulary.json"))
    assert isinstance(model, Model)
    given = for_linears(model, load_tensors(folder / "model.safetensors"))
    fresh = dict(model.state_dict())
    model.load_state_dict({**fresh, **given})
    if lora:
        names = set(adapters(model))
        for name, p in model.named_parameters():
            p.requires_grad_(name in names)
            if name.endswith("lora_a"):
                nn.init.kaiming_uniform_(p, a=5**0.5)
            elif name.endswith("lora_b"):
                nn.init.zeros_(p)
    return model.train()


def step_of(model: nn.Module, loss_of: Callable[[], Tensor], optimizer: Any) -> Callable[[], float]:
    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=AUTOCAST):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


class Sample(NamedTuple):
    """Ids of a document and where they are learnt, (n,) each."""

    ids: Tensor
    learnt: Tensor

    @property
    def labels(self) -> Tensor:
        return torch.where(self.learnt, self.ids, -100)


def our_step(model: Model, draw: Callable[[], list[Sample]]) -> Callable[[], float]:
    """A step of AdamW over one row of documents: the mean loss of every next token to learn."""
    first = model.vocabulary.range("text").first

    def loss() -> Tensor:
        samples = draw()
        layout = Layout.from_rows([[Doc(len(s.ids)) for s in samples]])
        ids = (torch.cat([s.ids for s in samples]) + first).int()[None, :, None]
        after = [torch.cat([s.labels[1:], s.labels.new_tensor([-100])]) for s in samples]
        labels = torch.cat(after)[None, :, None]
        targets = torch.where(labels >= 0, labels + first, -1).int()
        weight = (targets[..., 0] >= 0).float()
        places = {"tokens": weight.flatten().nonzero()[:, 0].int()}
        batch = Batch(layout, ids, targets, weight, places=places)
        nll = model(batch, heads=("tokens",)).heads["tokens"].nll
        return nll.sum() / weight.sum()

    return step_of(model, loss, AdamWConfig(lr=1e-4).build(model))


def their_step(folder: Path, draw: Callable[[], list[Sample]]) -> Callable[[], float]:
    """The same with PEFT upon transformers, attention by PyTorch's own kernel."""
    import peft
    import transformers

    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=THEIRS
    )
    model = peft.get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def loss() -> Tensor:
        samples = draw()
        if len(samples) == 1:  # nothing to fill up, so no mask
            return model(input_ids=samples[0].ids[None], labels=samples[0].labels[None]).loss
        fill = lambda rows, value: pad_sequence(rows, batch_first=True, padding_value=value)
        return model(
            input_ids=fill([s.ids for s in samples], 0),
            attention_mask=fill([torch.ones_like(s.ids) for s in samples], 0),
            labels=fill([s.labels for s in samples], -100),
        ).loss

    return step_of(model, loss, optimizer)


def conversations(file: Path, vocab: int, tokens: int) -> list[Sample]:
    """All of a file in its order, in ids of a BPE learnt from it, cut off at ``tokens``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    talks = [parse_json(line)["messages"] for line in file.read_text().splitlines()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((m["content"] for talk in talks for m in talk), trainer)
    samples = []
    for talk in talks:
        ids, learnt = [], []
        for message in talk:
            head = bpe.encode(f"{message['role']}\n").ids
            body = [*bpe.encode(message["content"]).ids, bpe.token_to_id("<|end|>")]
            ids += head + body
            learnt += [False] * len(head) + [message["role"] == "assistant"] * len(body)
        samples.append(Sample(torch.tensor(ids[:tokens]), torch.tensor(learnt[:tokens])))
    return [s for s in samples if s.learnt[1:].any()]


def drawn_from(samples: list[Sample], n: int, alike: bool) -> Callable[[], list[Sample]]:
    """Every call draws ``n`` others, of like length if asked; two of them made alike draw alike."""
    generator = torch.Generator().manual_seed(2)
    samples = sorted(samples, key=lambda s: len(s.ids)) if alike else samples

    def draw() -> list[Sample]:
        if alike:
            first = int(torch.randint(len(samples) - n + 1, (), generator=generator))
            return samples[first : first + n]
        return [samples[i] for i in torch.randperm(len(samples), generator=generator)[:n].tolist()]

    return draw


def peak(step: Callable[[], float]) -> int:
    """Bytes at the peak of the second step."""
    step()
    gc.collect()
    with Measure() as measure:
        step()
    return measure.live.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--chat", type=Path, help="conversations, one a line")
    parser.add_argument("--samples", type=int, default=8, help="conversations of a step")
    parser.add_argument("--alike", action="store_true", help="those of a step are of like length")
    parser.add_argument(
        "--autocast",
        action="store_true",
        help="both in bf16 under autocast, which a run takes where the CPU multiplies bf16",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-time", action="store_true", help="memory alone")
    parser.add_argument("--no-memory", action="store_true", help="time alone")
    parser.add_argument("--check", action="store_true", help="also compare logits of both")
    args = parser.parse_args()
    global AUTOCAST
    AUTOCAST = args.autocast
    torch.set_num_threads(1)
    os.environ["MM_SELF_CHECK"] = "0"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        theirs, ours = Path(temporary) / "theirs", Path(temporary) / "ours"
        checkpoint(theirs, args.layers, args.vocab)
        import_model(theirs, ours, check=False)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(args.vocab, (args.tokens,), generator=generator)
        samples = [Sample(ids, torch.ones_like(ids, dtype=torch.bool))]
        draws = lambda: drawn_from(samples, min(args.samples, len(samples)), args.alike)
        if args.chat:
            samples = conversations(args.chat, args.vocab, args.tokens)
            lengths = [len(s.ids) for s in samples]
            learnt = sum(int(s.learnt.sum()) for s in samples)
            found["conversations"] = len(samples)
            found["tokens_mean_longest"] = [sum(lengths) / len(lengths), max(lengths)]
            found["share_learnt"] = learnt / sum(lengths)
            steps = [[len(s.ids) for s in draw()] for draw in [draws()] for _ in range(args.pairs)]
            places = sum(len(step) * max(step) for step in steps)
            found["share_filled_up"] = 1 - sum(map(sum, steps)) / places
        for name, lora in () if args.no_memory else (("full", False), ("lora", True)):
            model = own(ours, lora)
            found[f"{name}_parameters"] = sum(p.numel() for p in model.parameters())
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            found[f"{name}_trained"] = trained
            found[f"{name}_peak_bytes"] = peak(our_step(model, draws()))
            del model
            gc.collect()
        if not args.no_memory:
            found["peak_share"] = found["lora_peak_bytes"] / found["full_peak_bytes"]
            print(json.dumps(found, indent=1), flush=True)
        if not args.no_time:
            if args.check:
                found["differ"] = compare(ours, theirs).difference
            mine, other = our_step(own(ours, True), draws()), their_step(theirs, draws())
            found["first_losses"] = [mine(), other()]
            times: list[list[float]] = [[], []]
            for _ in range(args.pairs):
                for kept, step in zip(times, (mine, other), strict=True):
                    begun = time.process_time()
                    step()
                    kept.append(time.process_time() - begun)
                print("a pair:", times[0][-1], times[1][-1], flush=True)
            ratio = Ratio.of([b / a for a, b in zip(*times, strict=True)])
            found["seconds"], found["ratio"] = times, ratio._asdict()
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
