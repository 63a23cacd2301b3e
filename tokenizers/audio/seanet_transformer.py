"""Mimi's front end: SEANet, layers of the model's own over its frames, and a stride over these.

G items, C channels, N samples, T frames of SEANet, F latent frames, D width.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import Backbone
from mm.registry import BackboneField
from mm.tokenizers.audio.layers import CausalConv1d, CausalConvTranspose1d, Stream
from mm.tokenizers.audio.seanet import SeanetFrontEndConfig

REMEMBERED = 2**14  # frames of a stream that a layer without a window keeps


class SeanetTransformerConfig(Config):
    """Frames of SEANet, ``stride`` of which make a latent frame.

    Mimi: strides (4, 5, 6, 8) at 24 kHz, width 64, last_kernel 3; 8 layers of 512 with a window of
    250; stride 2: 12.5 latent frames a second.
    """

    kind: Literal["seanet_transformer"] = "seanet_transformer"
    seanet: SeanetFrontEndConfig = SeanetFrontEndConfig()
    backbone: BackboneField = Field(
        default={"kind": "stack", "pattern": "2*attention"}, validate_default=True
    )
    stride: Annotated[int, Field(gt=0, description="of the latent frames over SEANet's")] = 2
    up_groups: int | None = Field(
        default=None, gt=0, description="of the way back over the stride; default: one a channel"
    )

    @property
    def samples_per_frame(self) -> int:
        return self.seanet.samples_per_frame * self.stride

    def build(self, d_code: int, sample_rate: int) -> SeanetTransformer:
        return SeanetTransformer(self, d_code)


class Frames(nn.Module):
    """Layers over frames, which see earlier frames alone; no norm at their end."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        backbone.norm = nn.Identity()
        backbone.check_mask(Causal())

    def forward(self, x_GCT: Tensor, stream: Stream | None = None) -> Tensor:
        """(G, D, T) -> (G, D, T); a stream keeps the layers' State and how far it has come."""
        G, _, T = x_GCT.shape
        if stream is None:
            layout, state, before = Layout.plain(G, T), None, 0
        else:
            state, before = stream.get(self, (None, 0))
            state = self.backbone.initial_state(G, REMEMBERED) if state is None else state
            docs = [[Doc(T, slot=g, fresh=before == 0, start=before)] for g in range(G)]
            layout = Layout.from_rows(docs, T)
        out = self.backbone(x_GCT.transpose(1, 2), Ctx(layout.to(x_GCT.device), Causal()), state)
        if stream is not None:
            stream[self] = (out.state, before + T)
        return out.y.transpose(1, 2)


class SeanetTransformer(nn.Module):
    """Encoder: SEANet, layers, stride; decoder: the way back.

    Source: Defossez et al. 2024, "Moshi" (arXiv:2410.00037), section 3.3. The scales of each
    layer's branches are part of their last matrices.
    """

    encode_lookahead = 0
    decode_lookahead = 0

    def __init__(self, config: SeanetTransformerConfig, d_code: int):
        super().__init__()
        c = config
        if not c.seanet.causal:
            raise ValueError("seanet_transformer: its layers see the past alone; set causal: true")
        self.config, self.samples_per_frame = config, config.samples_per_frame
        self.seanet = c.seanet.build(d_code, 0)
        self.whole_items, self.fills_end = self.seanet.whole_items, self.seanet.fills_end
        make = lambda: Frames(c.backbone.build(d_code))
        self.encoder_layers, self.decoder_layers = make(), make()
        self.down = CausalConv1d(
            d_code, d_code, 2 * c.stride, c.stride, padding="replicate", bias=False
        )
        self.up = CausalConvTranspose1d(
            d_code, d_code, c.stride, groups=c.up_groups or d_code, bias=False
        )

    def encode(self, wave_GN: Tensor, stream: Stream | None = None) -> Tensor:
        """(G, N) -> (G, F, d_code), F = ceil(N / samples_per_frame)."""
        h = self.seanet.encode(wave_GN, stream).transpose(1, 2)
        return self.down(self.encoder_layers(h, stream), stream).transpose(1, 2)

    def decode(self, z_GFD: Tensor, valid_GF: Tensor, stream: Stream | None = None) -> Tensor:
        """(G, F, d_code) -> (G, F * samples_per_frame)."""
        h = self.decoder_layers(self.up(z_GFD.transpose(1, 2), stream), stream).transpose(1, 2)
        heard: Any = valid_GF.repeat_interleave(self.config.stride, dim=1)
        return self.seanet.decode(h, heard, stream)
