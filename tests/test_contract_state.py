"""The laws of a State: `draft and accept`, `slots`, `state bytes`."""

from __future__ import annotations

import pytest
import torch
from laws import (
    MAX_LEN,
    TOL,
    Chunk,
    D,
    alone,
    apply,
    build,
    documents,
    layers,
    packed,
    unpacked,
)
from thinned import every, only

from mm.layout import Doc, Layout


@layers
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "packed"])
@pytest.mark.parametrize("accepted", every(2, [(3, 1, 0), (0, 0, 0), (3, 2, 4), (1, 0, 4)]))
def test_draft_and_accept_equal_having_fed_the_prefix(
    name: str, accepted: tuple[int, ...], aligned: bool
) -> None:
    """Slots draft 3, 2 and 4 tokens, of which some are wrong guesses; slot 1 is fresh.

    Its draft call is its first.
    """
    layer = build(name)
    docs, drafted, before = documents(9, 6, 9), (3, 2, 4), (4, 0, 3)
    with torch.no_grad():
        state = layer.initial_state(3, MAX_LEN)
        x, layout = packed([[(0, docs[0][:4], 0)], [(2, docs[2][:3], 0)]])
        state = apply(layer, x, layout, state).state
        guess = [
            torch.cat((d[b : b + n], 9.0 + torch.randn(m - n, D, dtype=torch.float64)))
            for d, b, n, m in zip(docs, before, accepted, drafted, strict=True)
        ]
        chunks = [(slot, guess[slot], before[slot]) for slot in range(3)]
        rows = [[c] for c in chunks] if aligned else [[chunks[2], chunks[0]], [chunks[1]]]
        x, layout = packed(rows)
        assert layout.aligned is aligned
        out = apply(layer, x, layout, state, draft=True)
        for slot, y in unpacked(out.y, rows):
            n = accepted[slot]
            torch.testing.assert_close(
                y[:n], alone(layer, docs[slot])[before[slot] : before[slot] + n], **TOL
            )
        state = out.state.accept(torch.tensor(accepted)) if out.state is not None else None
        at = [b + n for b, n in zip(before, accepted, strict=True)]
        rows = [
            [(s, docs[s][at[s] : at[s] + 2], at[s]) for s in (1, 0)],
            [(2, docs[2][at[2] : at[2] + 2], at[2])],
        ]
        x, layout = packed(rows)
        for slot, y in unpacked(apply(layer, x, layout, state).y, rows):
            torch.testing.assert_close(
                y, alone(layer, docs[slot][: at[slot] + 2])[at[slot] :], **TOL
            )


@layers
def test_an_unaccepted_draft_counts_as_fed(name: str) -> None:
    layer, (doc,) = build(name), documents(8)
    with torch.no_grad():
        state = layer.initial_state(1, MAX_LEN)
        got = []
        for at in range(0, 8, 2):
            x, layout = packed([[(0, doc[at : at + 2], at)]])
            out = apply(layer, x, layout, state, draft=at % 4 == 0)
            state = out.state
            got.append(out.y[0, :2])
        torch.testing.assert_close(torch.cat(got), alone(layer, doc), **TOL)


@layers
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_slots_that_get_no_token_keep_their_state_bit_for_bit(name: str, grad: bool) -> None:
    layer, docs = build(name), documents(5, 4, 6)
    with torch.set_grad_enabled(grad):
        state = layer.initial_state(3, MAX_LEN)
        if state is None:
            pytest.skip("this layer has no State")
        x, layout = packed([[(0, docs[0][:4], 0), (1, docs[1][:3], 0)], [(2, docs[2][:5], 0)]])
        state = apply(layer, x, layout, state).state
        assert state is not None
        kept = [leaf.clone() for leaf in state.leaves()]
        cases = {
            "a row of padding": packed([[]], pad=4),
            "a document of no tokens in aligned rows": packed(
                [[(s, docs[s][:0], 3)] for s in range(3)], pad=2
            ),
            "a document of no tokens in a packed row": packed(
                [[(1, docs[1][:0], 3), (-1, docs[0], 0)]], pad=1
            ),
            "documents without a slot": packed([[(-1, docs[0], 0), (-1, docs[1], 0)]]),
            "rows without a slot, aligned": packed(
                [[(-1, docs[0], 0)], [(-1, docs[1], 0)], [(-1, docs[2], 0)]]
            ),
        }
        for case, (x, layout) in cases.items():
            for draft in (False, True):
                after = apply(layer, x, layout, state.fork(), draft=draft).state
                assert after is not None
                after = after.accept(torch.full((3,), 9)) if draft else after
                for old, new in zip(kept, after.leaves(), strict=True):
                    assert torch.equal(old, new), f"{case}, draft={draft}"


@layers
def test_slots_can_be_reordered_joined_and_left(name: str) -> None:
    layer, docs = build(name), documents(6, 6, 6)
    with torch.no_grad():
        state = layer.initial_state(2, MAX_LEN)
        if state is None:
            pytest.skip("this layer has no State")
        x, layout = packed([[(0, docs[0][:3], 0)], [(1, docs[1][:2], 0)]])
        state = apply(layer, x, layout, state).state
        x, layout = packed([[(0, docs[2][:4], 0)]])
        other = apply(layer, x, layout, layer.initial_state(1, MAX_LEN)).state
        assert state is not None and other is not None
        state = state.cat(other).select(
            torch.tensor([2, 0, 0])
        )  # document 1 leaves, document 0 is continued twice
        rows: list[list[Chunk]] = [
            [(0, docs[2][4:], 4)],
            [(1, docs[0][3:], 3)],
            [(2, docs[0][3:5], 3)],
        ]
        x, layout = packed(rows)
        y = dict(unpacked(apply(layer, x, layout, state).y, rows))
        torch.testing.assert_close(y[0], alone(layer, docs[2])[4:], **TOL)
        torch.testing.assert_close(y[1], alone(layer, docs[0])[3:], **TOL)
        torch.testing.assert_close(y[2], alone(layer, docs[0])[3:5], **TOL)


@layers
def test_the_last_document_of_a_slot_wins_and_a_fresh_one_starts_again(name: str) -> None:
    layer, docs = build(name), documents(4, 5, 6)
    with torch.no_grad():
        state = layer.initial_state(1, MAX_LEN)
        x, layout = packed([[(0, docs[0], 0)]])
        state = apply(layer, x, layout, state).state
        x, layout = packed([[(0, docs[1][:3], 0), (0, docs[2][:4], 0)]])
        state = apply(layer, x, layout, state).state
        x, layout = packed([[(0, docs[2][4:], 4)]])
        torch.testing.assert_close(
            apply(layer, x, layout, state).y[0], alone(layer, docs[2])[4:], **TOL
        )


@layers
@pytest.mark.parametrize(
    "dtype", only([torch.float64, torch.float32, torch.bfloat16], torch.bfloat16)
)
def test_a_state_takes_the_bytes_that_were_declared(name: str, dtype: torch.dtype) -> None:
    layer = build(name, dtype)
    for n, max_len in ((1, 1), (2, 5), (3, 64)):
        state = layer.initial_state(n, max_len)
        declared = layer.state_bytes(n, max_len)
        assert (state.n_bytes() if state is not None else 0) == declared, (n, max_len)
        # What is declared takes no memory to say: a million slots more are no more work.
        assert layer.state_bytes(10**6 * n, max_len) == 10**6 * declared
        if state is None:
            continue
        assert all(leaf.shape[0] == n for leaf in state.leaves()), "dim 0 of every leaf is the slot"
        with torch.no_grad():
            after = apply(
                layer,
                torch.randn(n, 1, D, dtype=dtype),
                Layout.from_rows([[Doc(1, slot=i)] for i in range(n)]),
                state,
                memories={},  # longer than the documents are
            ).state
        assert after is not None and after.n_bytes() == layer.state_bytes(n, max_len)
