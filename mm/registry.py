"""Every plug point of the project, see `Registry`.

A new idea is one new file and one line here. Modules are imported on first use, so a missing
optional package hurts only its user and `mm --help` stays fast. Outside code joins by `imports:
[my_pkg]` in a YAML (its `register` decorators run) or by the entry-point group ``mm.plugins``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mm.plug_point import Registry


def _modules(package: str, names: str) -> dict[str, str]:
    """Entries whose module has their name."""
    return {name: f"{package}.{name}" for name in names.split()}


NETWORKS = Registry(
    "network",
    {
        "lm": "mm.model.model",
        "image_vq": "mm.tokenizers.image.vq",
        "image_vqgan": "mm.tokenizers.image.vqgan",
        "audio_codec": "mm.tokenizers.audio.codec",
        "patch_critic": "mm.tokenizers.image.critic",
        "ms_stft_critic": "mm.tokenizers.audio.critic",
    },
)
BACKBONES = Registry(
    "backbone",
    {
        "stack": "mm.model.backbones.stack",
        "decoder_decoder": "mm.model.backbones.decoder_decoder",
        "encoder_decoder": "mm.model.backbones.encoder_decoder",
        "looped": "mm.model.backbones.looped",
    },
)
BLOCKS = Registry(
    "block",
    {
        "prenorm": "mm.model.blocks.prenorm",
        "parallel": "mm.model.blocks.parallel",
        "layer_drop": "mm.model.blocks.layer_drop",
        "gated": "mm.model.blocks.gated",
        "hyper": "mm.model.blocks.hyper",
    },
)
MIXERS = Registry(
    "mixer",
    {
        "attention": "mm.model.mixers.attention.attention",
        "rg_lru": "mm.model.mixers.ssm.rg_lru",
        "linear_attention": "mm.model.mixers.linear_attention.linear_attention",
        "mamba": "mm.model.mixers.ssm.mamba",
        "delta_rule": "mm.model.mixers.linear_attention.delta_rule",
        "gated_scan": "mm.model.mixers.ssm.gated_scan",
        "lru": "mm.model.mixers.ssm.lru",
        "s4": "mm.model.mixers.ssm.s4",
        "log_linear": "mm.model.mixers.linear_attention.log_linear",
        "bidirectional": "mm.model.mixers.wrappers.bidirectional",
        "scan_order": "mm.model.mixers.wrappers.scan_order",
        "differential": "mm.model.mixers.wrappers.differential",
        "prefix_linear_attention": "mm.model.mixers.linear_attention.prefix_linear_attention",
        "windowed_state": "mm.model.mixers.linear_attention.windowed_state",
        "capped_state": "mm.model.mixers.linear_attention.capped_state",
        "rwkv4": "mm.model.mixers.linear_attention.rwkv4",
        "rwkv6": "mm.model.mixers.linear_attention.rwkv6",
        "aaren": "mm.model.mixers.linear_attention.aaren",
        "hippo": "mm.model.mixers.ssm.hippo",
        "hippo_rnn": "mm.model.mixers.ssm.hippo_rnn",
        "s4d": "mm.model.mixers.ssm.s4d",
        "s5": "mm.model.mixers.ssm.s5",
        "gru": "mm.model.mixers.rnn.gru",
        "lstm": "mm.model.mixers.rnn.lstm",
        "cross_attention": "mm.model.mixers.attention.cross_attention",
        "latent_attention": "mm.model.mixers.attention.latent_attention",
        "kv_shift": "mm.model.mixers.attention.kv_shift",
        "value_residual": "mm.model.mixers.attention.value_residual",
        "irpe_attention": "mm.model.mixers.attention.irpe_attention",
        "differential_attention": "mm.model.mixers.attention.differential_attention",
        "path_attention": "mm.model.mixers.attention.path_attention",
        "selective_attention": "mm.model.mixers.attention.selective_attention",
        "cog_attention": "mm.model.mixers.attention.cog_attention",
        "kv_only": "mm.model.mixers.attention.kv_only",
        "mega": "mm.model.mixers.attention.mega",
        "mlstm": "mm.model.mixers.linear_attention.mlstm",
        "ttt": "mm.model.mixers.test_time.ttt",
        "atlas": "mm.model.mixers.test_time.atlas",
        "lattice": "mm.model.mixers.test_time.lattice",
        "slstm": "mm.model.mixers.rnn.slstm",
        "scrn": "mm.model.mixers.rnn.scrn",
        "lem": "mm.model.mixers.rnn.lem",
        "unitary": "mm.model.mixers.rnn.unitary",
        "echo_state": "mm.model.mixers.rnn.echo_state",
        "gated_cnn": "mm.model.mixers.conv.gated_cnn",
        "short_conv": "mm.model.mixers.conv.short_conv",
        "hyena": "mm.model.mixers.conv.hyena",
        "trellis": "mm.model.mixers.conv.trellis",
        "mixed_heads": "mm.model.mixers.wrappers.mixed_heads",
        "ngram_head": "mm.model.mixers.attention.ngram_head",
        "sparse_attention": "mm.model.mixers.attention.sparse_attention",
        "combiner": "mm.model.mixers.attention.combiner",
        "topk_attention": "mm.model.mixers.attention.topk_attention",
        "aft": "mm.model.mixers.linear_attention.aft",
        "memory_compressed": "mm.model.mixers.attention.memory_compressed",
        "transformer_vq": "mm.model.mixers.attention.transformer_vq",
        "ecoformer": "mm.model.mixers.linear_attention.ecoformer",
        "plstm": "mm.model.mixers.ssm.plstm",
        "peg": "mm.model.mixers.encoder_only.peg",
        "fnet": "mm.model.mixers.encoder_only.fnet",
        "linformer": "mm.model.mixers.encoder_only.linformer",
        "nystromformer": "mm.model.mixers.encoder_only.nystromformer",
    },
)
FFNS = Registry(
    "ffn",
    {
        "mlp": "mm.model.ffn.mlp",
        "sub_norm": "mm.model.ffn.sub_norm",
        "moe": "mm.model.ffn.moe",
        "nested": "mm.model.ffn.nested",
        "swiglu": "mm.model.ffn.swiglu",
        "rwkv_ffn": "mm.model.ffn.rwkv_ffn",
    },
    renamed={"channel_mix": "rwkv_ffn"},
)
POSITIONS = Registry(
    "position",
    _modules(
        "mm.model.positions",
        "alibi irpe grid learned none randomised rope rope_axes sinusoidal t5_bias urpe",
    ),
)
LINEARS = Registry(
    "linear",
    {
        "dense": "mm.model.linears.dense",
        "by_modality": "mm.model.linears.by_modality",
        "lora": "mm.model.linears.lora",
        "nf4": "mm.model.linears.nf4",
        "ternary": "mm.model.linears.ternary",
    },
)
EMBEDDERS = Registry(
    "embedder", _modules("mm.model.embedders", "sum factorized hashed_ngrams by_modality")
)
ADAPTERS = Registry(
    "adapter",
    {
        "linear": "mm.model.adapters.linear",
        "patches": "mm.model.adapters.patches",
        "mel": "mm.model.adapters.mel",
        "encoder": "mm.model.adapters.encoder",
        "resampler": "mm.model.adapters.resampler",
        "project": "mm.model.adapters.project",
    },
)
HEADS = Registry(
    "head",
    {
        "softmax": "mm.model.heads.softmax",
        "mixture": "mm.model.heads.mixture",
        "ctc": "mm.model.heads.ctc",
        "embedding": "mm.model.heads.embedding",
        "classes": "mm.model.heads.classes",
        "multi_token": "mm.model.heads.multi_token",
        "binary": "mm.model.heads.binary",
        "parallel": "mm.model.heads.parallel",
        "depth": "mm.model.heads.depth",
    },
)
TOKENIZERS = Registry(
    "tokenizer",
    {
        "bpe": "mm.tokenizers.text.bpe",
        "bytes": "mm.tokenizers.text.bytes",
        "hf": "mm.tokenizers.text.hf",
        "image_vq": "mm.tokenizers.image.tokenizer",
        "image_vqgan": "mm.tokenizers.image.vqgan_tokenizer",
        "image_patches": "mm.tokenizers.image.patches",
        "image_processed": "mm.tokenizers.image.processed",
        "audio_codec": "mm.tokenizers.audio.tokenizer",
        "mel_frames": "mm.tokenizers.audio.mel_frames",
        "whisper_mel": "mm.tokenizers.audio.whisper_mel",
        "series_patches": "mm.tokenizers.series.patches",
        "video_tubes": "mm.tokenizers.video.tubes",
        "array_patches": "mm.tokenizers.array.patches",
    },
)
QUANTIZERS = Registry(
    "quantizer",
    {
        "vq": "mm.tokenizers.quantizers.vq",
        "fsq": "mm.tokenizers.quantizers.fsq",
        "lfq": "mm.tokenizers.quantizers.lfq",
        "rvq": "mm.tokenizers.quantizers.rvq",
        "factorized_rvq": "mm.tokenizers.quantizers.factorized_rvq",
        "split_rvq": "mm.tokenizers.quantizers.split_rvq",
    },
)
MODALITIES = Registry(
    "modality",
    {
        "text": "mm.data.modalities.text",
        "image": "mm.data.modalities.image",
        "audio": "mm.data.modalities.audio",
        "video": "mm.data.modalities.video",
        "time_series": "mm.data.modalities.time_series",
        "array": "mm.data.modalities.array",
    },
)
LAUNCHERS = Registry(
    "launcher",
    _modules(
        "mm.launch",
        "local ssh slurm mpi k8s",
    ),
)
SOURCES = Registry(
    "source",
    {
        "folder": "mm.data.sources.folder",
        "jsonl": "mm.data.sources.jsonl",
        "json": "mm.data.sources.jsonl",
        "chat": "mm.data.sources.chat",
        "csv": "mm.data.sources.table",
        "parquet": "mm.data.sources.table",
        "hf": "mm.data.sources.hf",
        "shards": "mm.data.sources.shards",
        "text": "mm.data.sources.text",
    },
)
STREAMS = Registry(
    "data",
    {
        "packed": "mm.data.streams.packed",
        "bucketed": "mm.data.streams.bucketed",
        "items": "mm.data.streams.raw_items",
        "stateful": "mm.data.streams.stateful",
    },
    renamed={"lanes": "stateful"},
)
TRANSFORMS = Registry(
    "transform",
    {
        "any_to_any": "mm.data.transforms.any_to_any",
        "chunk": "mm.data.transforms.chunk",
        "augment_image": "mm.data.transforms.augment_image",
        "mask_conditions": "mm.data.transforms.mask_conditions",
        "span_denoising": "mm.data.transforms.span_denoising",
        "fill_in_the_middle": "mm.data.transforms.fill_in_the_middle",
        "mark": "mm.data.transforms.mark",
        "room": "mm.data.transforms.room",
        "to_label": "mm.data.transforms.to_label",
        "preference": "mm.data.transforms.preference",
        "to_part": "mm.data.transforms.to_part",
        "delay": "mm.data.transforms.delay",
    },
)
SURGERIES = Registry(
    "surgery",
    _modules(
        "mm.surgery",
        "deepen extend_vocabulary graft_adapter keep_layers linearize merge_lora pool_heads "
        "prune_heads slice_nested widen",
    ),
)
OBJECTIVES = Registry(
    "objective",
    _modules(
        "mm.objectives",
        "next_token contrastive distil dpo masked replaced_token vq codec",
    ),
)
OPTIMIZERS = Registry(
    "optimizer",
    {
        "adamw": "mm.trainer.optimizers.adamw",
        "lion": "mm.trainer.optimizers.lion",
        "muon": "mm.trainer.optimizers.muon",
        "adafactor": "mm.trainer.optimizers.adafactor",
        "sgd_sai": "mm.trainer.optimizers.sgd_sai",
        "schedule_free_adamw": "mm.trainer.optimizers.schedule_free",
    },
)
DECODERS = Registry("decoder", {"ar": "mm.decoders.ar"})
TASKS = Registry(
    "task",
    _modules(
        "mm.tasks",
        "bits_per_byte recognition judged_generation forecast block_decoding text_error "
        "token_loss transcription retrieval",
    ),
)
CALLBACKS = Registry(
    "callback",
    {
        "samples": "mm.trainer.callbacks.samples",
        "progress": "mm.trainer.callbacks.progress",
        "machine": "mm.trainer.callbacks.machine",
        "modalities": "mm.trainer.callbacks.modalities",
        "layers": "mm.trainer.callbacks.layers",
        "alerts": "mm.trainer.callbacks.alerts",
    },
)
SINKS = Registry(
    "sink",
    {
        "wandb": "mm.trainer.log.sinks.wandb_sink",
        "tensorboard": "mm.trainer.log.sinks.tensorboard_sink",
        "mlflow": "mm.trainer.log.sinks.mlflow_sink",
    },
)
FAMILIES = Registry(
    "family",
    _modules(
        "mm.interchange.families",
        "llama llava mistral qwen2 qwen3 qwen3_moe mixtral phi3 olmo olmo2 olmo3 gemma2 "
        "gemma3_text gpt2 mamba mamba2 recurrent_gemma qwen3_next",
    ),
)
ENCODERS = Registry(
    "encoder",
    {
        "clip": "mm.interchange.encoders.clip",
        "clip_vision_model": "mm.interchange.encoders.clip",
        "siglip": "mm.interchange.encoders.siglip",
        "siglip_vision_model": "mm.interchange.encoders.siglip",
        "vit": "mm.interchange.encoders.vit",
        "whisper": "mm.interchange.encoders.whisper",
    },
)
CODECS = Registry(
    "codec",
    {
        "dac": "mm.interchange.codecs.dac",
        "encodec": "mm.interchange.codecs.encodec",
        "janus": "mm.interchange.codecs.janus",
        "janus_vqgan": "mm.interchange.codecs.janus",
        "mimi": "mm.interchange.codecs.mimi",
    },
)

# A config field of one entry: pydantic parses it (kind, mapping, Config), a type checker takes it.
if TYPE_CHECKING:
    NetworkField = Any
    BackboneField = Any
    BlockField = Any
    MixerField = Any
    FfnField = Any
    PositionField = Any
    LinearField = Any
    EmbedderField = Any
    AdapterField = Any
    HeadField = Any
    TokenizerField = Any
    QuantizerField = Any
    StreamField = Any
    TransformField = Any
    ObjectiveField = Any
    OptimizerField = Any
    TaskField = Any
    SurgeryField = Any
    CallbackField = Any
    SinkField = Any
else:
    NetworkField = NETWORKS.field
    BackboneField = BACKBONES.field
    BlockField = BLOCKS.field
    MixerField = MIXERS.field
    FfnField = FFNS.field
    PositionField = POSITIONS.field
    LinearField = LINEARS.field
    EmbedderField = EMBEDDERS.field
    AdapterField = ADAPTERS.field
    HeadField = HEADS.field
    TokenizerField = TOKENIZERS.field
    QuantizerField = QUANTIZERS.field
    StreamField = STREAMS.field
    TransformField = TRANSFORMS.field
    ObjectiveField = OBJECTIVES.field
    OptimizerField = OPTIMIZERS.field
    TaskField = TASKS.field
    SurgeryField = SURGERIES.field
    CallbackField = CALLBACKS.field
    SinkField = SINKS.field
