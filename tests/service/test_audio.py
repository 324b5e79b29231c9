"""Decoding: every container, every rate, and every way in which a file can lie."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest

from service import audio
from service.audio import LOUDEST_SAMPLE, SAMPLE_RATE_HZ, Waveform, check_media_type, decode, is_plain
from service.errors import (
    AudioTooLargeError,
    AudioTooShortError,
    InvalidSamplesError,
    UndecodableAudioError,
    UnsupportedMediaTypeError,
)
from tests.conftest import REPOSITORY, Samples, encoded, voice

SHORTEST_S, LONGEST_S = 0.1, 120.0
CONTAINERS = {
    "wav-16": ("WAV", "PCM_16"),
    "wav-24": ("WAV", "PCM_24"),
    "wav-float": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_16"),
    "vorbis": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
# STREAMINFO begins after the magic and a block header; its eight bytes from here end in 36 bits of sample count.
FLAC_COUNT = slice(18, 26)
FLAC_COUNT_BITS = 36


def decoded(data: bytes, content_type: str = "audio/wav", longest_s: float = LONGEST_S) -> Waveform:
    return decode(data, content_type, shortest_s=SHORTEST_S, longest_s=longest_s)


def tone(rate_hz: int, seconds: float = 1.0, level: float = 0.5) -> Samples:
    return (level * np.sin(2 * np.pi * 440 * np.arange(int(rate_hz * seconds)) / rate_hz)).astype(np.float32)


def level_db(samples: Samples) -> float:
    """Level of the middle half: filters ring at the ends."""
    middle = samples[len(samples) // 4 : -len(samples) // 4]
    return float(20 * np.log10(np.sqrt(np.mean(np.square(middle, dtype=np.float64)))))


def strongest_hz(samples: Samples) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * SAMPLE_RATE_HZ / len(samples))


def with_sample_count(flac: bytes, count: int) -> bytes:
    forged = bytearray(flac)
    fields = int.from_bytes(forged[FLAC_COUNT], "big")
    forged[FLAC_COUNT] = (fields >> FLAC_COUNT_BITS << FLAC_COUNT_BITS | count).to_bytes(8, "big")
    return bytes(forged)


@pytest.mark.parametrize(("container", "subtype"), CONTAINERS.values(), ids=CONTAINERS.keys())
def test_every_container_gives_the_samples_back(container: str, subtype: str) -> None:
    original = voice(2.0)
    samples = decoded(encoded(original, container=container, subtype=subtype)).samples
    assert samples.dtype == np.float32
    assert abs(len(samples) - len(original)) <= 0.05 * SAMPLE_RATE_HZ
    shared = min(len(samples), len(original))
    assert np.corrcoef(samples[:shared], original[:shared])[0, 1] > 0.99


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_any_rate_keeps_pitch_level_and_length(rate_hz: int) -> None:
    waveform = decoded(encoded(tone(rate_hz), rate_hz=rate_hz))
    assert waveform.duration_s == pytest.approx(1.0, abs=0.001)
    assert strongest_hz(waveform.samples) == pytest.approx(440, abs=1)
    assert level_db(waveform.samples) == pytest.approx(level_db(tone(SAMPLE_RATE_HZ)), abs=0.5)


@pytest.mark.parametrize("channels", [2, 8])
def test_channels_are_averaged(channels: int) -> None:
    spread = np.zeros((SAMPLE_RATE_HZ, channels), dtype=np.float32)
    spread[:, 0] = tone(SAMPLE_RATE_HZ)
    expected = tone(SAMPLE_RATE_HZ) / channels
    np.testing.assert_allclose(decoded(encoded(spread)).samples, expected, atol=1e-4)


@pytest.mark.parametrize("channels", [9, 16])
def test_too_many_channels_are_refused(channels: int) -> None:
    data = encoded(np.zeros((1600, channels), dtype=np.float32))
    with pytest.raises(UndecodableAudioError, match=f"{channels} channels"):
        decoded(data)


@pytest.mark.parametrize("rate_hz", [1, 7_999, 192_001, 200_000])
def test_rates_outside_the_range_are_refused(rate_hz: int) -> None:
    with pytest.raises(UndecodableAudioError, match=f"{rate_hz} Hz"):
        decoded(encoded(np.zeros(16_000, dtype=np.float32), rate_hz=rate_hz))


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 44_100, 48_000])
def test_raw_samples_at_the_rate_the_type_names(rate_hz: int) -> None:
    data = (tone(rate_hz) * 32767).astype("<i2").tobytes()
    waveform = decoded(data, f"audio/pcm;rate={rate_hz}")
    assert waveform.duration_s == pytest.approx(1.0, abs=0.001)
    assert strongest_hz(waveform.samples) == pytest.approx(440, abs=1)


@pytest.mark.parametrize(
    "content_type",
    ["audio/pcm", "audio/pcm;rate=", "audio/pcm;rate=x", "audio/pcm;rate=7999", "audio/pcm;rate=48001",
     "audio/pcm;rate=-16000", "audio/pcm;rate=99999999"],
)  # fmt: skip
def test_raw_samples_without_a_good_rate_are_refused(content_type: str) -> None:
    with pytest.raises(UndecodableAudioError, match=r"rate|Hz"):
        decoded(bytes(32_000), content_type)


def test_raw_samples_that_look_like_an_mp3_are_samples() -> None:
    """Quiet noise begins with -1 as often as not, and 0xFF 0xFF begins an MPEG frame."""
    samples = (tone(16_000) * 32767).astype("<i2")
    samples[:2] = (-1, 0x4490)
    data = samples.tobytes()
    assert is_plain(data, "audio/pcm;rate=16000")
    assert decoded(data, "audio/pcm;rate=16000").duration_s == 1.0


@pytest.mark.parametrize("content_type", ["audio/pcm;rate=16000;channels=2", "audio/L16;rate=16000"])
def test_raw_samples_of_other_shapes_are_refused_not_misheard(content_type: str) -> None:
    with pytest.raises(UndecodableAudioError, match="raw samples"):
        decoded(bytes(32_000), content_type)


@pytest.mark.parametrize(
    "content_type", ["audio/pcm; rate=16000", 'audio/PCM;rate="16000"', "audio/pcm;channels=1;rate=16000"]
)
def test_spellings_of_the_raw_type(content_type: str) -> None:
    assert decoded(bytes(32_000), content_type).duration_s == 1.0


def test_a_raw_clip_that_is_too_long_is_refused() -> None:
    with pytest.raises(AudioTooLargeError):
        decoded(bytes(2 * (SAMPLE_RATE_HZ + 1)), "audio/pcm;rate=16000", longest_s=1.0)


@pytest.mark.parametrize("label", ["audio/mpeg", "audio/pcm;rate=16000", "audio/x-unknown", "application/octet-stream"])
def test_the_bytes_decide_not_the_label(label: str) -> None:
    original = voice(1.0)
    samples = decoded(encoded(original, container="FLAC"), label).samples
    np.testing.assert_allclose(samples, original, atol=1e-4)


@pytest.mark.parametrize(
    "content_type", ["", "application/json", "text/plain", "image/png", "audio", "multipart/mixed"]
)
def test_other_media_types_are_unsupported(content_type: str) -> None:
    with pytest.raises(UnsupportedMediaTypeError):
        check_media_type(content_type)


@pytest.mark.parametrize(
    "data",
    [b"", b"R", b"\xff", bytes(5000), b"not audio at all\n" * 300, b"RIFF\x24\0\0\0WAVE", b"fLaC", b"OggS", b"ID3",
     b"\xff\xfb" + bytes(2000), np.random.default_rng(0).bytes(20_000)],
    ids=["empty", "one-byte", "ff", "zeros", "text", "wav-head", "flac-head", "ogg-head", "id3", "mp3-head", "random"],
)  # fmt: skip
def test_what_is_no_audio_is_undecodable(data: bytes) -> None:
    with pytest.raises(UndecodableAudioError):
        decoded(data)


def test_other_containers_that_the_decoder_knows_are_undecodable() -> None:
    with pytest.raises(UndecodableAudioError):
        decoded(encoded(voice(1.0), container="AIFF"))


@pytest.mark.parametrize(("container", "subtype"), CONTAINERS.values(), ids=CONTAINERS.keys())
def test_a_file_cut_anywhere_decodes_in_part_or_fails_by_type(container: str, subtype: str) -> None:
    whole_s = 1.5
    data = encoded(voice(whole_s), container=container, subtype=subtype)
    for cut in (*range(64), *range(64, len(data), max(1, len(data) // 150))):
        with suppress(UndecodableAudioError, AudioTooShortError):
            assert decoded(data[:cut]).duration_s <= whole_s + 0.1


def test_a_flac_that_breaks_off_keeps_what_came_before() -> None:
    original = voice(10.0)
    data = encoded(original, container="FLAC")
    samples = decoded(data[: len(data) * 9 // 10]).samples
    assert 8.0 < len(samples) / SAMPLE_RATE_HZ < 9.5
    np.testing.assert_allclose(samples, original[: len(samples)], atol=1e-4)


def test_reading_in_blocks_leaves_an_mp3_whole(capfd: pytest.CaptureFixture[str]) -> None:
    original = voice(20.0)
    samples = decoded(encoded(original, container="MP3", subtype="MPEG_LAYER_III")).samples
    shared = min(len(samples), len(original))
    error = np.square(samples[:shared] - original[:shared], dtype=np.float64).reshape(-1, 800).mean(axis=1)
    assert error.max() < 0.05 * np.square(original, dtype=np.float64).mean()
    assert "error" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "bad", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf], [1e30], [-1e30, 1e30], [3e38] * 9, [2 * LOUDEST_SAMPLE]]
)
def test_samples_that_are_no_sound_are_invalid(bad: list[float]) -> None:
    samples = voice(1.0)
    samples[5000 : 5000 + len(bad)] = bad
    with pytest.raises(InvalidSamplesError):
        decoded(encoded(samples, subtype="FLOAT"))


def test_samples_beyond_full_scale_are_clipped() -> None:
    samples = decoded(encoded(tone(SAMPLE_RATE_HZ, level=3.0), subtype="FLOAT")).samples
    assert samples.max() == 1.0
    assert samples.min() == -1.0


@pytest.mark.parametrize("count", [0, 1, 1599])
def test_shorter_than_the_model_needs(count: int) -> None:
    with pytest.raises((AudioTooShortError, UndecodableAudioError) if count == 0 else AudioTooShortError):
        decoded(encoded(np.zeros(count, dtype=np.float32)))


def test_the_longest_clip_passes_and_one_sample_more_does_not() -> None:
    assert decoded(encoded(np.zeros(32_000, dtype=np.float32)), longest_s=2.0).duration_s == 2.0
    with pytest.raises(AudioTooLargeError):
        decoded(encoded(np.zeros(32_001, dtype=np.float32)), longest_s=2.0)


def test_a_flac_of_unknown_length_is_legal() -> None:
    original = voice(2.0)
    samples = decoded(with_sample_count(encoded(original, container="FLAC"), 0)).samples
    np.testing.assert_allclose(samples, original, atol=1e-4)


def test_a_wav_of_unknown_length_is_legal() -> None:
    data = bytearray(encoded(voice(1.0)))
    start = data.index(b"data") + 4
    data[start : start + 4] = b"\xff\xff\xff\xff"
    assert decoded(bytes(data)).duration_s == 1.0


@pytest.mark.parametrize("sample_count", [0, 1, 2**31, 2**36 - 1])
def test_a_forged_sample_count_is_not_believed(sample_count: int) -> None:
    data = with_sample_count(encoded(voice(2.0), container="FLAC"), sample_count)
    with suppress(UndecodableAudioError, AudioTooShortError):
        assert decoded(data).duration_s <= 2.0


MEASURE = """
import resource, sys
from service.audio import decode
from service.errors import ServiceError
data = sys.stdin.buffer.read()
def attempt(data):
    try:
        return f"{decode(data, 'audio/flac', shortest_s=0.1, longest_s=120).duration_s:.1f}"
    except ServiceError as error:
        return error.code
attempt(data[:5000])
before = resource.getrusage(resource.RUSAGE_SELF)
outcome = attempt(data)
after = resource.getrusage(resource.RUSAGE_SELF)
print(outcome, (after.ru_maxrss - before.ru_maxrss) // 1024, round(after.ru_utime - before.ru_utime, 3))
"""


def measured(data: bytes) -> tuple[str, float, float]:
    """(duration or error code, growth of resident memory in MiB, CPU seconds) of one decode in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], input=data, capture_output=True, check=True, timeout=60, cwd=REPOSITORY
    )
    outcome, grown_mib, cpu_s = done.stdout.split()
    return outcome.decode(), float(grown_mib), float(cpu_s)


@pytest.mark.parametrize(("rate_hz", "channels"), [(16_000, 1), (192_000, 8)])
def test_a_bomb_is_refused_before_it_unpacks(rate_hz: int, channels: int) -> None:
    """Half an hour in 90 kB would be 110 MiB at 16 kHz; what may be kept is two minutes, 7.3 MiB."""
    seconds = 1800 if channels == 1 else 30
    data = encoded(np.zeros((rate_hz * seconds, channels), dtype=np.float32), rate_hz=rate_hz, container="FLAC")
    outcome, grown_mib, cpu_s = measured(data)
    assert outcome == "audio_too_large"
    assert grown_mib < 24
    assert cpu_s < 2


@pytest.mark.parametrize("sample_count", [0, 2**36 - 1])
def test_a_forged_sample_count_costs_no_memory(sample_count: int) -> None:
    _, grown_mib, _ = measured(with_sample_count(encoded(voice(2.0), container="FLAC"), sample_count))
    assert grown_mib < 16


@pytest.mark.parametrize(
    ("container", "subtype", "plain"),
    [
        ("WAV", "PCM_16", True),
        ("WAV", "FLOAT", True),
        ("WAV", "GSM610", False),
        ("WAV", "IMA_ADPCM", False),
        ("WAV", "ULAW", False),
        ("WAV", "PCM_U8", False),
        ("FLAC", "PCM_16", False),
        ("OGG", "VORBIS", False),
    ],
)
def test_only_uncompressed_samples_are_plain(container: str, subtype: str, plain: bool) -> None:
    assert is_plain(encoded(tone(SAMPLE_RATE_HZ), container=container, subtype=subtype), "audio/wav") is plain


def test_raw_samples_are_plain_and_other_bytes_are_not() -> None:
    assert is_plain(b"\0\1" * 100, "audio/pcm;rate=16000")
    assert not is_plain(b"\0\1" * 100, "audio/wav")


@pytest.mark.parametrize("declared", [None, 0xFFFFFFFF, 0, 1, 2, 1001, 20_000])
@pytest.mark.parametrize("cut", [0, 1, 7, 15_000])
@pytest.mark.parametrize("after", [b"", b"LIST" + bytes(8)])
def test_a_plain_wav_decodes_as_libsndfile_does(declared: int | None, cut: int, after: bytes) -> None:
    data = encoded(voice(0.5))
    if declared is not None:
        data = data[:40] + declared.to_bytes(4, "little") + data[44:]
    data = data[: len(data) - cut] + after
    plain = audio._plain_samples(data, 10.0)
    if plain is None:
        with pytest.raises(UndecodableAudioError):
            audio._decode_container(data, 10.0)
    else:
        waveform = Waveform(plain)
        assert waveform.duration_s == len(plain) / SAMPLE_RATE_HZ
        assert waveform.samples.dtype == np.float32
        assert np.array_equal(waveform.samples, audio._decode_container(data, 10.0))


@pytest.mark.parametrize("place", range(8, 40))
def test_a_wav_that_is_not_plain_goes_to_libsndfile(place: int) -> None:
    data = bytearray(encoded(voice(0.5)))
    data[place] ^= 0x55
    assert audio._plain_samples(bytes(data), 10.0) is None
