"""The audio codec: causality, streaming, padding, losses, objective and critic, tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from codec_toys import FRONT_ENDS, batch_of, codec, speech_like
from thinned import only

from mm.batch import Batch, Values
from mm.config import override, read, validate
from mm.errors import UserError
from mm.model.layer import init_weights
from mm.objectives.codec import CodecConfig
from mm.run import Run
from mm.specs import Encoded, Waveform
from mm.tokenizers.audio.codec import AudioCodec, AudioCodecConfig
from mm.tokenizers.audio.critic import MsStftCriticConfig
from mm.tokenizers.audio.losses import mel_counts, mel_loss, wave_loss
from mm.tokenizers.audio.tokenizer import AudioCodecTokenizer, AudioCodecTokenizerConfig
from mm.tokenizers.load import load_tokenizer

# ---- network and losses --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_padding_and_neighbours_change_nothing(name):
    net = codec(name).double().eval()
    lengths = [3000, 641, 1500]
    b = batch_of(lengths, n=4000)
    values = b.values["audio"]
    dirty = torch.where(
        torch.arange(4000) < values.length[:, None], values.data, torch.randn(3, 4000)
    ).double()
    with torch.no_grad():
        together = net(
            Batch.of_values({"audio": Values.items(dirty, values.length)}),
            return_intermediates=frozenset({"wave"}),
        )
        for g, n in enumerate(lengths):
            alone = net(Batch.of_values({"audio": Values.items(dirty[g : g + 1, :n])}))
            f = alone.intermediates["ids"].shape[1]
            assert torch.equal(together.intermediates["ids"][g, :f], alone.intermediates["ids"][0])
            torch.testing.assert_close(
                together.intermediates["wave"][g, :n],
                alone.intermediates["wave"][0],
                rtol=0,
                atol=1e-9,
            )
            assert (together.intermediates["wave"][g, n:] == 0).all()
    counted = sum(-(-n // net.samples_per_frame) for n in lengths)
    assert together.aux["usage"].count.flatten().tolist() == [counted] * 3


def test_knobs_choose_books_and_bypass():
    net, b = codec("mel").train(), batch_of([3200, 2000])
    full, coarse = net(b), net(b, scheduled={"books": 0.34})
    assert (coarse.intermediates["ids"][..., 2] == -1).all() and (
        coarse.intermediates["ids"][..., :2] >= 0
    ).all()
    assert not torch.equal(full.intermediates["wave"], coarse.intermediates["wave"])
    warm = net(b, scheduled={"bypass": 1.0})
    assert warm.aux["commitment"].total.item() == 0 < full.aux["commitment"].total.item()
    assert warm.aux.keys() == full.aux.keys()
    (grad,) = torch.autograd.grad(
        warm.intermediates["wave"].square().sum(), net.frontend.to_code.weight
    )
    assert float(grad.abs().sum()) > 0


def test_losses_are_zero_at_equality_and_blind_beyond_the_length():
    b = batch_of([3000, 1200], n=3200)
    x, n = b.values["audio"].data, b.values["audio"].length
    windows = (256, 1024)
    assert (
        float(mel_loss(x, x, n, sample_rate=16000, windows=windows))
        == 0
        == float(wave_loss(x, x, n))
    )
    y = x * 0.5
    wide = lambda t: torch.nn.functional.pad(t, (0, 4000))
    for loss in (
        lambda a, c: mel_loss(a, c, n, sample_rate=16000, windows=windows),
        lambda a, c: wave_loss(a, c, n),
    ):
        assert float(loss(y, x)) > 0
        torch.testing.assert_close(loss(wide(y), wide(x)), loss(y, x))
    # halving the amplitude shifts every log-mel value above the floor by log 2
    quiet = mel_loss(y, x, n, sample_rate=16000, windows=windows) / mel_counts(n, windows)
    assert 0.3 < float(quiet) < 0.75
    wave = torch.zeros_like(x, requires_grad=True)  # the gradient at silence is finite
    mel_loss(wave, x, n, sample_rate=16000, windows=windows).backward()
    assert torch.isfinite(wave.grad).all()


def objective_sums(config: CodecConfig, net: AudioCodec, b: Batch) -> tuple[dict, dict]:
    env = SimpleNamespace(step=0)
    objective = config.build()
    (term,) = objective.terms([b], {"model": net}, env)
    return term.losses, objective.counts(b)


def test_micro_batches_give_the_gradient_of_the_whole():
    net = codec("mel").eval()  # no statistics: only the losses are compared
    b = batch_of([3000, 900, 2500, 1600], n=3200)
    config = CodecConfig(bypass_steps=0)
    values = b.values["audio"]
    parts = [
        Batch.of_values({"audio": Values.items(values.data[s], values.length[s])})
        for s in (slice(0, 1), slice(1, 4))
    ]

    def gradient(batches):
        net.zero_grad()
        pairs = [objective_sums(config, net, part) for part in batches]
        n = {k: sum(counts[k] for _, counts in pairs) for k in pairs[0][1]}
        for losses, _ in pairs:
            sum(losses[k] / n[k] for k in losses).backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    torch.testing.assert_close(gradient(parts), gradient([b]), rtol=1e-4, atol=1e-6)


def test_knobs_are_a_function_of_the_step():
    objective = CodecConfig(bypass_steps=3, quantizer_dropout=0.5).build()
    draw = lambda step: objective.scheduled(step, np.random.default_rng((7, step)))
    scheduled = [draw(s) for s in range(200)]
    assert scheduled == [draw(s) for s in range(200)]
    assert [k["bypass"] for k in scheduled[:5]] == [1, 1, 1, 0, 0]
    dropped = [k["books"] for k in scheduled if k["books"] < 1]
    assert 60 < len(dropped) < 140 and min(dropped) > 0


def fit(
    net: AudioCodec, config: CodecConfig, steps: int, critic=None, fixed=()
) -> list[dict[str, float]]:
    """The trainer's loop without an engine.

    What the objective yields, in the order in which it yields it.
    """
    objective = config.build()
    nets = {"model": net} | ({"critic": critic} if critic is not None else {})
    optimizers = {
        k: torch.optim.AdamW(m.parameters(), lr=3e-3, betas=(0.9, 0.95)) for k, m in nets.items()
    }

    @contextlib.contextmanager
    def frozen(name):
        nets[name].requires_grad_(False)
        yield nets[name]
        nets[name].requires_grad_(True)

    rows = []
    for step in range(steps):
        scheduled = objective.scheduled(step, np.random.default_rng((0, step)))
        aux: dict = {}

        def model(b, scheduled=scheduled, aux=aux, **kw):
            out = net(b, scheduled=scheduled, **kw)
            if torch.is_grad_enabled():
                aux.update({k: v.detach() for k, v in out.aux.items()})
            return out

        b = batch_of([2400, 1800, 2400, 1100], seed=4 * (step % 16))
        n, row = objective.counts(b), {}
        env = SimpleNamespace(step=step, frozen=frozen)
        for term in objective.terms([b], nets | {"model": model}, env):
            row |= {k: float(v.detach() / n[k]) for k, v in term.losses.items()}
            sum(objective.scales(n)[k] * v / n[k] for k, v in term.losses.items()).backward()
            if term.step and term.network in fixed:
                nets[term.network].zero_grad()
            elif term.step:
                optimizers[term.network].step()
                optimizers[term.network].zero_grad()
        if "model" not in fixed:
            net.after_step(aux)
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", only(["mel", "seanet"], "mel"))
def test_the_objective_teaches_the_codec(name):
    net = codec(name, n_codebooks=2).train()
    rows = fit(net, CodecConfig(bypass_steps=25), steps=120)
    last = np.mean([row["mel"] for row in rows[-10:]])
    assert last < 0.8 * np.mean([row["mel"] for row in rows[:3]])
    b = batch_of([2400] * 8, seed=200)
    with torch.no_grad():
        usage = net.eval()(b).aux["usage"].total
    assert ((usage > 0).float().mean(1) > 0.3).all()  # no collapse


def test_the_critic_joins_at_its_step_and_both_networks_learn():
    net = codec("mel", n_codebooks=2).train()
    torch.manual_seed(1)
    critic = MsStftCriticConfig(windows=(256, 128), width=8).build()
    init_weights(critic)
    before = [p.clone() for p in critic.parameters()]
    config = CodecConfig(bypass_steps=0, adversarial={"critic": critic.config, "start_step": 5})
    rows = fit(net, config, 5, critic)
    assert all(set(row) == {"mel", "wave", "commitment"} for row in rows)
    assert all(torch.equal(a, p) for a, p in zip(before, critic.parameters(), strict=True))
    config = CodecConfig(bypass_steps=0, adversarial={"critic": critic.config, "start_step": 0})
    start = [p.clone() for p in net.parameters()]
    rows = fit(net, config, 12, critic)
    assert all(
        set(row) == {"mel", "wave", "commitment", "critic", "adversarial", "feature"}
        for row in rows
    )
    for network, old in ((critic, before), (net, start)):
        assert all(not torch.equal(a, p) for a, p in zip(old, network.parameters(), strict=True))
    # against a codec that stands still the critic learns to tell real from reconstructed
    judged = [row["critic"] for row in fit(net, config, 40, critic, fixed=("model",))]
    assert np.mean(judged[-5:]) < 0.8 * judged[0]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert all(
        p.grad is None or float(p.grad.abs().sum()) == 0 for p in critic.parameters()
    )  # the model's pass adds none


def test_critic_is_blind_beyond_the_length():
    torch.manual_seed(0)
    critic = MsStftCriticConfig(windows=(256,), width=4).build()
    init_weights(critic)
    b = batch_of([2000, 1000], n=2400)
    values = b.values["audio"]
    dirty = dataclasses.replace(
        values, data=torch.where(values.data == 0, torch.randn(2, 2400), values.data)
    )
    a, c = (
        critic(b).intermediates,
        critic(dataclasses.replace(b, values={"audio": dirty})).intermediates,
    )
    assert set(a) == {"score.0"} | {f"feature.0.{j}" for j in range(5)}
    for name in a:
        assert torch.equal(a[name], c[name])
    assert (a["score.0"][1, 1000 // 64 + 1 :] == 0).all() and (a["score.0"][0] != 0).any()


# ---- the tokenizer -------------------------------------------------------------------------------


def tokenizer(name: str = "mel") -> AudioCodecTokenizer:
    return AudioCodecTokenizer(AudioCodecTokenizerConfig(batch_size=4), codec(name))


def test_ids_are_flat_frame_by_frame_and_a_batch_equals_a_loop():
    one = tokenizer()
    raws = [Waveform(speech_like(n, n), 16000) for n in (5000, 640, 641, 16000, 1, 0, 7777)]
    raws.append(Waveform(speech_like(9000), 22050))
    codes = one.encode(raws)
    for raw, code in zip(raws, codes, strict=True):
        alone = one.encode([raw])[0]
        assert np.array_equal(code.ids, alone.ids) and code.side == alone.side
        n = round(len(raw.samples) * 16000 / raw.sample_rate)
        assert abs(code.side["n_samples"] - n) <= 1
        n_frames = -(-code.side["n_samples"] // 640)
        assert code.ids.shape == (3 * n_frames,) and code.ids.dtype == np.int32
        book = code.ids.reshape(n_frames, 3) // 16
        assert (book == np.arange(3)).all()
    for code, wave in zip(codes, one.decode(codes), strict=True):
        assert wave.sample_rate == 16000 and wave.samples.shape == (code.side["n_samples"],)
    assert one.spec.tokens_per_second == 75 and one.spec.n_ids == 48
    assert one.code_vectors().shape == (48, 6)


def test_decode_survives_what_a_language_model_may_write():
    one = tokenizer()
    rng = np.random.default_rng(0)
    for length in (0, 1, 2, 5, 97):
        wave = one.decode([Encoded(rng.integers(0, 48, length))])[0].samples
        assert np.isfinite(wave).all() and np.abs(wave).max(initial=0) <= 1
    # book 0 opens a frame; what does not follow the book before it is skipped
    frames = one.frames([20, 3, 17, 40, 5, 40, 6, 16 + 2, 99, -4, 32 + 9, 16])
    assert frames.tolist() == [[3, 1, 8], [5, -1, -1], [6, 2, 9]]
    assert one.decode([Encoded(None)])[0].samples.shape == (0,)
    whole = one.encode([Waveform(speech_like(6400), 16000)])[0]
    assert len(one.decode([Encoded(whole.ids, side={"n_samples": 10**9})])[0].samples) == 6400
    assert len(one.decode([Encoded(whole.ids[:-4])])[0].samples) == 9 * 640


def test_fewer_books_decode_to_a_coarser_wave():
    one = tokenizer()
    ids = one.encode([Waveform(speech_like(6400), 16000)])[0].ids
    first = ids.reshape(-1, 3)[:, :1].reshape(-1)
    coarse = one.decode([Encoded(first)])[0].samples
    z = one.net.quantizer.decode(torch.from_numpy(first)[None, :, None])
    expected = one.net.frontend.decode(z, torch.ones(1, 10, dtype=torch.bool))[0].clamp(-1, 1)
    np.testing.assert_allclose(coarse, expected.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_a_saved_tokenizer_comes_back_and_a_changed_file_is_refused(tmp_path, name):
    one = tokenizer(name)
    one.save(tmp_path)
    again = load_tokenizer(tmp_path)
    raws = [Waveform(speech_like(4000), 16000)]
    assert again.spec == one.spec and np.array_equal(
        again.encode(raws)[0].ids, one.encode(raws)[0].ids
    )
    with torch.no_grad():
        next(one.net.parameters()).flatten()[0] += 1e-3
    changed = AudioCodecTokenizer(one.config, one.net)
    assert changed.spec.fingerprint != again.spec.fingerprint
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x01\x02\x03\x04")
    with pytest.raises(UserError, match="model.safetensors: changed or damaged"):
        load_tokenizer(tmp_path)
    weights.unlink()
    with pytest.raises(UserError):
        AudioCodec.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "raw", ["hello", Waveform(np.zeros((2, 100)), 16000), Waveform(np.array([np.nan]), 16000)]
)
def test_what_is_no_mono_waveform_is_refused_by_name(raw):
    with pytest.raises(UserError, match="audio tokenizer"):
        tokenizer().encode([raw])


@pytest.mark.parametrize("path", ["tokenizer/audio", "tokenizer/audio_seanet"])
def test_shipped_configs_build_and_fill(path):
    run = validate(Run, override(read(path), ["stages.0.data.path=nowhere"]), path)
    with torch.device("meta"):
        run.model.build()
    net = run.model.build()
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))
    init_weights(net)
    assert all(torch.isfinite(t).all() for t in (*net.parameters(), *net.buffers()))
    assert run.model.frames_per_second == 25
    assert run.stages[0].objective.build().weights["mel"] == 1.0


@pytest.mark.slow
def test_the_trainer_trains_codec_and_critic_into_a_tokenizer_folder(tmp_path):
    import soundfile

    from mm.data.pack.job import pack
    from mm.trainer.loop import train

    (tmp_path / "wav").mkdir()
    for i in range(8):
        soundfile.write(tmp_path / "wav" / f"{i}.wav", speech_like(6400, i), 16000)
    pack(tmp_path / "wav", tmp_path / "data", progress=False)
    small = AudioCodecConfig.smallest()
    critic = {"kind": "ms_stft_critic", "windows": [128], "width": 4}
    run = {
        "name": "codec",
        "out": str(tmp_path),
        "model": small.to_dict(),
        "stages": [
            {
                "data": {
                    "kind": "items",
                    "path": str(tmp_path / "data"),
                    "modality": "audio",
                    "batch_size": 4,
                    "micro_batch_size": 2,
                    "crop_seconds": 0.2,
                },
                "objective": {
                    "kind": "codec",
                    "bypass_steps": 1,
                    "quantizer_dropout": 0.5,
                    "adversarial": {"critic": critic, "start_step": 3},
                },
                "budget": {"steps": 5},
            }
        ],
        "engine": {"zero_stage": 1, "precision": "fp32", "threads": 1},
        "tracking": {"mode": "disabled"},
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run))
    train(config)
    lines = (tmp_path / "codec" / "metrics.jsonl").read_text().splitlines()
    rows = {row["step"]: row for row in map(json.loads, lines) if "loss/total" in row}
    assert (
        "loss/critic" not in rows[3] and rows[4]["loss/critic"] > 0 and rows[5]["loss/feature"] > 0
    )
    assert rows[1]["loss/commitment"] == 0 < rows[2]["loss/commitment"]
    assert {"codebook/usage", "codebook/perplexity", "loss/mel", "loss/wave"} <= rows[5].keys()
    made = load_tokenizer(tmp_path / "codec")
    assert (
        made.spec.n_ids == 16
        and len(made.encode([Waveform(speech_like(6400), 16000)])[0].ids) == 20
    )
    updates = [int(book.updates) for book in made.net.quantizer.books]
    assert updates == [5, 5]  # codebooks moved once a step, two micro-batches together
