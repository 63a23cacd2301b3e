"""Embeddings of ids and, hashed into tables of a fixed size, of the n-grams that end in them.

B rows, T tokens, S streams, D model, N ids, K sizes of n-grams, P the longest one, R rows of one
document, L their length, C cached ids.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.embedders.base import sum_of_rows
from mm.model.embedders.sum import SumEmbedder, SumEmbedderConfig
from mm.model.mixers.attention.kv_cache import KeyValueCache
from mm.model.mixers.attention.ngram_head import TOKEN, UNKNOWN
from mm.registry import EMBEDDERS
from mm.state import State
from mm.vocabulary import Vocabulary

BASE = 1_000_000_007  # of the polynomial: a prime of ten digits


class HashedNgrams(SumEmbedder):
    """``scale / (K + 1) * (e(id_t) + sum_n E_n[hash(id_{t-n+1} .. id_t) mod buckets])``.

    ``hash = sum_j id_{t-j} BASE^j``. An n-gram lies in one document and one modality; one that does
    not, or holds a place without an id, adds nothing. Of several streams it reads the first.

    Source: Pagnoni et al. 2024, Byte Latent Transformer (arXiv:2412.09871), section 3.2.1 (a table
    for each n from 3 to 8, the sum divided by the number of sizes plus one) and its appendix on the
    rolling polynomial hash. Its tables have 500,000 rows.
    """

    replays = False  # the cache can be cut
    looked_up = wide_parameters = ("weight", "ngrams")

    def __init__(self, n_ids: int, d_model: int, config: HashedNgramsConfig):
        super().__init__(n_ids, d_model, config)
        self.sizes, self.buckets = tuple(sorted({*config.sizes})), config.buckets
        self.longest = self.sizes[-1]
        self.scale /= len(self.sizes) + 1
        self.ngrams = nn.Parameter(torch.empty(len(self.sizes) * self.buckets, d_model))
        # Ids and modalities of the last tokens: fields of a cache whose keys have no width.
        self.cache = KeyValueCache(1, 0, 0, reach=self.longest - 1, extra=(TOKEN,))

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.ngrams, std=self.ngrams.shape[1] ** -0.5)

    def vectors(
        self, ids_BTS: Tensor, ctx: Ctx, state: State | None
    ) -> tuple[Tensor, State | None]:
        before, state = self._look_back(ids_BTS[..., 0], ctx, state)
        index, there = hash_ngrams(before, self.sizes, self.buckets)
        tables = self.buckets * torch.arange(len(self.sizes), device=index.device)
        found = nn.functional.embedding_bag(
            (index + tables).flatten(0, 1),
            self.ngrams,
            mode="sum",
            per_sample_weights=there.flatten(0, 1).to(self.ngrams.dtype),
        )
        own = sum_of_rows(self.weight, ids_BTS, self.scale)
        return own + self.scale * found.view_as(own), state

    def _look_back(
        self, ids_BT: Tensor, ctx: Ctx, state: State | None
    ) -> tuple[Tensor, State | None]:
        """Ids of 0, 1, .. P - 1 tokens ago `(B, T, P)`, negative where an n-gram cannot hold them.

        And the State after the call.
        """
        f, n = ctx.layout.fields, self.longest - 1
        if state is not None:
            return self._look_back_cached(ids_BT, ctx, state)
        whole = (ids_BT, f.document, f.modality)
        if ctx.shard is not None:  # every process has the ids of whole rows
            assert ctx.shard.ids is not None
            f, take = ctx.shard.whole.fields, ctx.shard
            given = ctx.shard.ids[..., 0], f.document, f.modality
            whole = [torch.cat((take.before(x, n), take.slice(x)), 1) for x in given]
        else:
            whole = [nn.functional.pad(x, (n, 0)) for x in whole]
        # Windows of P tokens, the last one first.
        ids, document, modality = (x.unfold(1, self.longest, 1).flip(-1) for x in whole)
        return _joined(ids, modality, (document == document[..., :1]) & (document > 0)), None

    def _look_back_cached(
        self, ids_BT: Tensor, ctx: Ctx, state: State
    ) -> tuple[Tensor, State | None]:
        f = ctx.layout.fields
        f = f._replace(extra={TOKEN: ids_BT.to(f.document.dtype)})
        none = self.cache.like.new_zeros(*ids_BT.shape, 1, 0)
        seen, after = self.cache(none, none, ctx, state, f, copy=True)
        docs, known, C, device = seen.docs, seen.known, seen.cached, ids_BT.device
        R, L = seen.fields.document.shape
        back = torch.arange(self.longest, device=device)
        at = torch.arange(L, device=device)[:, None] - back  # in the call; negative: before it
        earlier = seen.begin[:, None, None] + at  # in the document; negative: there is none
        place = torch.where(at >= 0, C + at, earlier.clamp_min(0) % max(C, 1))
        take = lambda x: x.gather(1, place.flatten(1)).view(R, L, self.longest)
        joined = _joined(take(known.extra[TOKEN]), take(known.modality), earlier >= 0)
        return docs.pack(joined), after


def _joined(ids: Tensor, modality: Tensor, there: Tensor) -> Tensor:
    """Ids `(..., P)` of the last tokens, the latest first, up to where an n-gram ends."""
    one = there & (ids >= 0) & (modality == modality[..., :1])
    return torch.where(one.long().cumprod(-1) > 0, ids, UNKNOWN)


def hash_ngrams(before_BTP: Tensor, sizes: tuple[int, ...], buckets: int) -> tuple[Tensor, Tensor]:
    """Bucket of the n-gram of each size that ends in a token, and whether there is one.

    Args:
        before_BTP: `(B, T, P)` ids below 2^31 of 0, 1, .. tokens ago; negative: none, nor before.
        sizes: ascending.
        buckets: at most 2^31: sums and products stay below 2^63, so every device agrees.
    Returns:
        `(B, T, K)` int64 and bool.
    """
    ids = before_BTP.long()
    total, found = torch.zeros_like(ids[..., 0]), []
    for j in range(sizes[-1]):
        total = (total + ids[..., j].clamp_min(0) * pow(BASE, j, buckets)) % buckets
        if j + 1 in sizes:
            found.append(total)
    there = [ids[..., n - 1] >= 0 for n in sizes]
    return torch.stack(found, -1), torch.stack(there, -1)


@EMBEDDERS.register("hashed_ngrams")
class HashedNgramsConfig(SumEmbedderConfig):
    """A row of each id, and rows of the n-grams that end there, found by a hash."""

    kind: Literal["hashed_ngrams"] = "hashed_ngrams"  # type: ignore[assignment]
    sizes: Annotated[
        tuple[Annotated[int, Field(ge=2, le=64)], ...],
        Field(min_length=1, description="tokens of an n-gram, a table each"),
    ] = (3, 4, 5, 6, 7, 8)
    buckets: Annotated[int, Field(gt=0, le=2**31, description="rows of each table")] = 16384

    small = {"sizes": (2, 3), "buckets": 7}

    def build(
        self, n_ids: int, d_model: int, vocabulary: Vocabulary = Vocabulary()
    ) -> HashedNgrams:
        return HashedNgrams(n_ids, d_model, self)
