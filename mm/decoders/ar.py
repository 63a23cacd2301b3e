"""Autoregressive decoding of many sequences at once over KV and recurrent states.

N sequences, n of them running, U distinct prompts, V ids, C codebooks of a place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mm.batch import Batch
from mm.config import Config
from mm.decoders.base import Ask, Decoder, Rule, Session, draw, noise
from mm.decoders.books import Books
from mm.errors import UserError
from mm.layout import Fields, Layout
from mm.model.layer import ModelOut
from mm.registry import DECODERS
from mm.state import State


@DECODERS.register("ar")
class ARConfig(Config):
    """Settings of the autoregressive decoder."""

    kind: Literal["ar"] = "ar"
    precision: Literal["fp32", "autocast_bf16"] = "fp32"
    drop_share: Annotated[
        float,
        Field(gt=0, le=1, description="give up the slots of finished sequences at this share"),
    ] = 0.25

    def build(self) -> ARDecoder:
        return ARDecoder(self)


class ARDecoder(Decoder):
    """Prefill each distinct prompt once, copy its state to its sequences, step token by token."""

    def __init__(self, config: ARConfig):
        self.config = config

    @torch.no_grad()
    def run(
        self,
        nets: Mapping[str, Callable[..., ModelOut]],
        prompt: Batch,
        ask: Ask,
        rules: Sequence[Rule],
    ) -> Iterator[Tensor]:
        """See `Decoder.run`.

        Raises:
            UserError: the model's logits hold NaN or +inf; names the step, because sampling would
                draw noise silently.
        """
        model: Any = nets["model"]
        device = prompt.ids.device
        N = len(ask.row)
        null_row = ask.null_row if ask.cfg_scale != 1.0 else None
        guided = null_row is not None
        end = ask.vocabulary.range(ask.to).end
        books = Books(model, ask, rules, device) if ask.delays else None
        C = max(1, len(ask.delays))
        steps = int((ask.limit - ask.have).max()) + (books.longest if books else 0)
        starts = prompt.layout.cu_seqlens.long()
        prompt_length_U = prompt.places["tokens"].long() - starts[:-1] + 1
        max_len = prompt.layout.shape[1] + steps

        state = model.initial_state(prompt.layout.shape[0], max_len)
        logits, state, hidden = self._forward(model, prompt, state, books)
        slots = ask.row if null_row is None else np.concatenate([ask.row, null_row])
        place = np.diff(prompt.layout.on_host().cu_seqlens.numpy()).astype(np.int64)[slots]
        slots = torch.from_numpy(slots).long().to(device)
        state, logits, position = state.select(slots), logits[slots], prompt_length_U[slots]
        hidden = hidden[slots] if books is not None else hidden

        uniform = None
        if not ask.greedy:
            indices = range(N) if ask.indices is None else ask.indices
            uniform = noise(ask.seed, indices, steps * C).view(N, steps, C).to(device)
        to = lambda a: torch.from_numpy(np.asarray(a, np.int64)).to(device)
        session = Session(
            ask.vocabulary, ask.to, to(ask.have), to(ask.limit), one_book=books is not None
        )
        produced = torch.zeros(N, 0, dtype=torch.int64, device=device)
        # What ends a sequence is counted on the host, which reads the device once a token.
        alive, done = np.arange(N), np.zeros(N, bool)  # sequence of each running slot
        length, limit = np.array(ask.have), np.array(ask.limit)
        running = torch.arange(N, device=device)  # `alive` on the device

        for step in range(steps):
            n = len(alive)
            if guided:
                logits = logits[n:] + ask.cfg_scale * (logits[:n] - logits[n:])
            damaged = ~(logits < torch.inf).all()
            session.step, session.ids = step, produced
            for rule in rules:
                logits = rule(logits, session)
            noisy = None if uniform is None else uniform[running, step]
            ids = logits.argmax(-1) if noisy is None else draw(logits, noisy[:, 0])
            if books is not None:
                ids, fine = books.fill(ids, hidden, prompt.layout, length, session, alive, noisy)
                damaged = damaged | ~fine

            *drawn, is_damaged = torch.cat([ids.flatten(), damaged[None].long()]).tolist()
            drawn = np.array(drawn).reshape(tuple(ids.shape))
            if is_damaged:
                raise UserError(
                    f"generation to '{ask.to}', step {step}: the model's logits are not finite; "
                    "its weights are damaged: generate from an earlier checkpoint"
                )
            shown = np.full((N, *ids.shape[1:]), -1, np.int64)
            shown[alive[~done]] = drawn[~done]
            yield torch.from_numpy(shown)

            first = ids if books is None else ids[:, 0]
            produced = torch.cat([produced, first[:, None]], 1)
            session.length = session.length + 1
            length = length + 1
            # At the limit the end is the only choice: no forward is spent on it.
            whole = (drawn == end) | (length >= limit) if books is None else books.finish(
                drawn, length - 1
            )  # fmt: skip
            done = done | whole
            finished = int(done.sum())
            if finished == n:
                return
            if finished >= self.config.drop_share * n:
                kept = np.flatnonzero(~done)
                keep = to(kept)
                both = torch.cat([keep, keep + n]) if guided else keep
                state, position = state.select(both), position[both]
                place = place[np.concatenate([kept, kept + n]) if guided else kept]
                alive, done, length, limit = alive[kept], done[kept], length[kept], limit[kept]
                ids, produced, running = ids[keep], produced[keep], running[keep]
                if books is not None:
                    books.keep(kept)
                session.length, session.limit = session.length[keep], session.limit[keep]
            # Which id of the span each token is: on a grid, its cell.
            index, copies = session.length - 1, 1 + guided
            layout = _step_layout(index.repeat(copies), position, ask, prompt.layout.fields)
            if device.type != "cpu":
                layout.memo["host"] = functools.partial(
                    _step_layout,
                    torch.from_numpy(np.tile(length - 1, copies)),
                    torch.from_numpy(place),
                    ask,
                    prompt.layout.on_host().fields,
                )
            batch = _step_batch(torch.cat([ids] * copies), layout)
            logits, state, hidden = self._forward(model, batch, state, books)
            position, place = position + 1, place + 1

    def _forward(
        self, model: Any, batch: Batch, state: State, books: Books | None
    ) -> tuple[Tensor, State, Tensor]:
        """Logits `(P, V)` float32 at the batch's places, the next state, what ``books`` reads."""
        mixed = self.config.precision == "autocast_bf16"
        wanted = frozenset({books.head.reads} if books else ()) - {"hidden"}
        with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=mixed):
            out = model(
                batch, state=state, heads=("tokens",), loss=False, return_intermediates=wanted
            )
        logits = out.heads["tokens"].dist.logits
        hidden = out.hidden if books is None else books.hidden(out, batch)
        return logits if logits.dtype == torch.float64 else logits.float(), out.state, hidden


def _step_layout(index_n: Tensor, position_n: Tensor, ask: Ask, like: Fields) -> Layout:
    """The layout of one token for each running slot: row i is document i + 1, slot i.

    It is id ``index`` of its span, at ``position`` of its document. Made where these are.
    """
    n, device = len(position_n), position_n.device
    number = torch.arange(n, dtype=torch.int32, device=device)
    # As `mm.layout.places_of` has it.
    position = position_n.to(torch.int32)[:, None, None].repeat(1, 1, like.position.shape[-1])
    spec = ask.spec
    if spec.grid is not None and len(spec.grid) > 1:
        last = math.prod(spec.grid) - 1
        cell = index_n // spec.n_codebooks
        for axis, at in enumerate(torch.unravel_index(cell.clamp_max(last), spec.grid), 1):
            of_cell = (position_n - index_n + at).to(torch.int32)
            position[:, 0, axis] = torch.where(cell <= last, of_cell, position[:, 0, 0])
    modality = torch.full(
        (n, 1), ask.vocabulary.range(ask.to).index, dtype=torch.int32, device=device
    )
    extra = {name: torch.zeros(n, 1, dtype=torch.int32, device=device) for name in like.extra}
    return Layout(
        Fields(position, number[:, None] + 1, modality, extra),
        torch.arange(n + 1, dtype=torch.int32, device=device),
        number,
        torch.zeros(n, dtype=torch.bool, device=device),
        max_seqlen=1,
        aligned=True,
    )


def _step_batch(ids_n: Tensor, layout: Layout) -> Batch:
    """One token for each running slot, made on the device; `(n,)` or `(n, C)`."""
    n, device = len(ids_n), ids_n.device
    ids = ids_n.to(torch.int32).reshape(n, 1, -1)
    places = {"tokens": torch.arange(n, dtype=torch.int32, device=device)}
    weight = torch.zeros(n, 1, device=device)
    return Batch(layout, ids, torch.full_like(ids, -1), weight, places=places)
