"""Bytes -> Waveform: sniff, bound, decode, mix down, resample.

What a file says about itself is never trusted: its container is recognised by content, its length is
whatever decodes, read in blocks until it ends or a cap is passed. 46 kB of FLAC can hold 184 MB of
silence, and a forged header can claim 256 GiB.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from typing import cast

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from service.errors import (
    AudioTooLargeError,
    AudioTooShortError,
    InvalidSamplesError,
    UndecodableAudioError,
    UnsupportedMediaTypeError,
)

SAMPLE_RATE_HZ = 16_000
LOWEST_RATE_HZ, HIGHEST_RATE_HZ = 8_000, 192_000
LOWEST_PCM_RATE_HZ, HIGHEST_PCM_RATE_HZ = 8_000, 48_000
MOST_CHANNELS = 8
# Samples of all channels together that one second of the longest allowed clip may cost to decode:
# stereo at 96 kHz. More channels or higher rates shorten what is accepted, not what is safe.
SAMPLES_PER_SECOND_CAP = 2 * 96_000
# A decoder's error loses the block it happens in, so a clip that breaks off loses at most this much of its end.
BLOCK_SAMPLES = 8_192
# Reverberation and dither never get near this; a file of such samples is not a recording.
LOUDEST_SAMPLE = 1e4
_FULL_SCALE = np.float32(1 / 32768)

Samples = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int16]

_CONTAINERS = {"WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MPEG", "MP3"}
_PLAIN_CODECS = (b"\x01\x00", b"\x03\x00")  # WAVE_FORMAT_PCM and WAVE_FORMAT_IEEE_FLOAT
# From "WAVE" on: a format chunk of 16 bytes, PCM, one channel, 16 kHz, bytes a second, bytes a sample, bits.
_PLAIN_FORMAT = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, SAMPLE_RATE_HZ, 2 * SAMPLE_RATE_HZ, 2, 16)
_PLAIN_HEAD_BYTES = 44
_PCM_TYPE = re.compile(r"audio/pcm\b", re.IGNORECASE)
_CHANNELS = re.compile(r";\s*channels\s*=\s*\"?([^\s;\"]*)", re.IGNORECASE)
_RATE = re.compile(r";\s*rate\s*=\s*\"?([0-9]{1,7})\"?\s*(?:;|$)", re.IGNORECASE)


class Waveform:
    """Mono, 16 kHz, float32 in [-1, 1], finite."""

    __slots__ = ("_kept",)

    def __init__(self, samples: Samples | Integers) -> None:
        """Integers of 16 bits become float when they are first asked for. That is in the thread that computes: numpy
        lets go of the interpreter meanwhile, and the event loop would have to wait until it gets it back."""
        self._kept = samples

    @property
    def samples(self) -> Samples:
        if self._kept.dtype != np.float32:
            self._kept = _in_float(cast(Integers, self._kept))
        return cast(Samples, self._kept)

    @property
    def duration_s(self) -> float:
        return len(self._kept) / SAMPLE_RATE_HZ


class _ForwardFile(soundfile.SoundFile):  # type: ignore[misc]  # soundfile ships no types
    """A file read from start to end, without the seek to its own position that soundfile adds to each read:
    that fails where a FLAC header does not tell the length, and an MP3 decoder forgets its bit reservoir."""

    def seekable(self) -> bool:
        return False


def check_media_type(content_type: str) -> None:
    """Raises UnsupportedMediaTypeError for what is neither audio nor multipart."""
    essence = content_type.partition(";")[0].strip().lower()
    if not essence.startswith("audio/") and essence != "multipart/form-data":
        raise UnsupportedMediaTypeError(
            f"Content-Type is {essence[:80] or 'missing'!r}; send the file's bytes as audio/wav, audio/flac, "
            "audio/ogg, audio/mpeg or audio/pcm;rate=16000, or multipart/form-data with the part `audio`"
        )


def decode(data: bytes, content_type: str, *, shortest_s: float, longest_s: float) -> Waveform:
    """Decode one clip. Blocking; run it in a thread.

    Raises UndecodableAudioError, AudioTooLargeError, AudioTooShortError, InvalidSamplesError.
    """
    if not data:
        raise UndecodableAudioError("the body is empty")
    plain = _plain_samples(data, longest_s)
    samples: Samples | Integers
    if plain is not None:
        samples = plain
    elif _sniff(data, content_type) is not None:
        samples = _decode_container(data, longest_s)
    elif _is_raw(content_type):
        samples = _decode_pcm(data, content_type, longest_s)
    else:
        raise UndecodableAudioError("the bytes are no WAV, FLAC, Ogg or MP3 file (raw samples need audio/pcm;rate=...)")
    waveform = Waveform(samples)
    if waveform.duration_s < shortest_s:
        raise AudioTooShortError(f"{waveform.duration_s:.3f} s of audio; the model needs at least {shortest_s} s")
    return waveform


def is_plain(data: bytes, content_type: str) -> bool:
    """Whether decoding costs about what the size says: uncompressed samples of 16 bits or more.

    A few kilobytes of GSM in a WAV file are minutes of audio.
    """
    container = _sniff(data, content_type)
    if container == "wav":
        head, codec, bits = data[:4] + data[12:16], data[20:22], int.from_bytes(data[34:36], "little")
        return head == b"RIFFfmt " and codec in _PLAIN_CODECS and bits >= 16
    return container is None and _is_raw(content_type)


def _is_raw(content_type: str) -> bool:
    return _PCM_TYPE.match(content_type.strip()) is not None


def _sniff(data: bytes, content_type: str) -> str | None:
    """The container the first bytes belong to, or None. What says that it is raw samples is taken at its word unless
    it begins with letters that files begin with: quiet noise, samples of -1, looks like an MPEG frame."""
    head = data[:12]
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE":
        return "wav"
    if head[:4] == b"fLaC":
        return "flac"
    if head[:4] == b"OggS":
        return "ogg"
    if head[:3] == b"ID3" or (not _is_raw(content_type) and _begins_frame(head)):
        return "mpeg"
    return None


def _begins_frame(head: bytes) -> bool:
    """Whether this can be an MPEG audio frame: its eleven bits, and no reserved version, layer, bitrate or rate."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return False
    version, layer, bitrate, rate = head[1] >> 3 & 3, head[1] >> 1 & 3, head[2] >> 4, head[2] >> 2 & 3
    return version != 1 and layer != 0 and bitrate != 15 and rate != 3


def pcm_samples(data: bytes | bytearray, *, count: int) -> Samples:
    """The first `count` signed 16-bit little-endian samples as float32 in [-1, 1)."""
    return _in_float(np.frombuffer(data, "<i2", count))


def _in_float(samples: Integers) -> Samples:
    return np.multiply(samples, _FULL_SCALE, dtype=np.float32)


def _plain_samples(data: bytes, longest_s: float) -> Integers | None:
    """Of the WAV file that most clients send, 16-bit mono at our own rate with nothing between head and samples; None
    for any other. Opening a file in libsndfile takes longer than all else that a clip needs on the event loop."""
    if data[:4] != b"RIFF" or data[8:36] != _PLAIN_FORMAT or data[36:40] != b"data":
        return None
    # The declared length only ever shortens what is there.
    size = min(int.from_bytes(data[40:44], "little"), len(data) - _PLAIN_HEAD_BYTES)
    if size < 2:
        return None
    if size // 2 > longest_s * SAMPLE_RATE_HZ:
        raise AudioTooLargeError(f"more than {longest_s:g} s of audio")
    return np.frombuffer(data, "<i2", size // 2, _PLAIN_HEAD_BYTES)


def _decode_container(data: bytes, longest_s: float) -> Samples:
    """Mono 16 kHz samples of a WAV, FLAC, Ogg or MP3 file."""
    try:
        file = _ForwardFile(io.BytesIO(data))
    except (soundfile.LibsndfileError, ValueError, TypeError, OverflowError) as error:
        raise UndecodableAudioError(f"the file does not open: {_reason(error)}") from error
    with file:
        rate_hz, channels = file.samplerate, file.channels
        if file.format not in _CONTAINERS:
            raise UndecodableAudioError(f"{file.format} files are not accepted")
        if not LOWEST_RATE_HZ <= rate_hz <= HIGHEST_RATE_HZ:
            raise UndecodableAudioError(
                f"sample rate {rate_hz} Hz; accepted are {LOWEST_RATE_HZ} to {HIGHEST_RATE_HZ} Hz"
            )
        if not 1 <= channels <= MOST_CHANNELS:
            raise UndecodableAudioError(f"{channels} channels; accepted are 1 to {MOST_CHANNELS}")
        return _resample(_blocks(file, channels, longest_s), rate_hz, longest_s)


def _blocks(file: soundfile.SoundFile, channels: int, longest_s: float) -> Iterator[Samples]:
    """Mono blocks as they decode. A decoder error after some audio ends the clip there."""
    budget = int(longest_s * SAMPLES_PER_SECOND_CAP)
    block = np.empty((max(1, BLOCK_SAMPLES // channels), channels), dtype=np.float32)
    decoded = 0
    while True:
        try:
            count = file.buffer_read_into(block, dtype="float32")
        except (soundfile.LibsndfileError, ValueError, OverflowError) as error:
            if decoded == 0:
                raise UndecodableAudioError(f"no audio decodes: {_reason(error)}") from error
            return
        if count == 0:
            if decoded == 0:
                raise UndecodableAudioError("the file holds no audio")
            return
        decoded += count * channels
        if decoded > budget:
            raise AudioTooLargeError(f"more than {longest_s:g} s of audio, or too many channels at too high a rate")
        part = block[:count]
        _check_finite(part)
        yield part[:, 0].copy() if channels == 1 else part.mean(axis=1)


def _resample(blocks: Iterator[Samples], rate_hz: int, longest_s: float) -> Samples:
    """Concatenate at 16 kHz, stopping as soon as the clip is too long."""
    most = int(longest_s * SAMPLE_RATE_HZ)
    stream = None
    if rate_hz != SAMPLE_RATE_HZ:
        stream = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")
    parts: list[Samples] = []
    total = 0

    def keep(part: Samples) -> None:
        nonlocal total
        total += len(part)
        if total > most:
            raise AudioTooLargeError(f"more than {longest_s:g} s of audio")
        parts.append(part)

    for block in blocks:
        keep(stream.resample_chunk(block) if stream is not None else block)
    if stream is not None:
        keep(stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
    samples = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return np.clip(samples, -1.0, 1.0)


def _decode_pcm(data: bytes, content_type: str, longest_s: float) -> Samples:
    """Signed 16-bit little-endian mono at the rate the media type names."""
    match = _RATE.search(content_type)
    if match is None:
        raise UndecodableAudioError("raw samples need their rate: Content-Type: audio/pcm;rate=16000")
    rate_hz = int(match.group(1))
    if not LOWEST_PCM_RATE_HZ <= rate_hz <= HIGHEST_PCM_RATE_HZ:
        raise UndecodableAudioError(
            f"raw samples at {rate_hz} Hz; accepted are {LOWEST_PCM_RATE_HZ} to {HIGHEST_PCM_RATE_HZ} Hz"
        )
    channels = _CHANNELS.search(content_type)
    if channels is not None and channels.group(1) != "1":
        raise UndecodableAudioError(f"raw samples of {channels.group(1)[:20]!r} channels; accepted is 1")
    if len(data) < 2:
        raise UndecodableAudioError("a single byte is no 16-bit sample")
    if len(data) // 2 > longest_s * rate_hz:
        raise AudioTooLargeError(f"more than {longest_s:g} s of audio")
    return _resample(iter([pcm_samples(data, count=len(data) // 2)]), rate_hz, longest_s)


def _check_finite(block: Samples) -> None:
    # The sum of a block is finite exactly when all its samples are, short of overflow, and costs one pass.
    with np.errstate(invalid="ignore"):
        total = block.sum(dtype=np.float64)
    if not np.isfinite(total):
        raise InvalidSamplesError("the audio holds NaN or infinite samples")
    if np.abs(block).max() > LOUDEST_SAMPLE:
        raise InvalidSamplesError(f"the audio holds samples beyond ±{LOUDEST_SAMPLE:g}; full scale is ±1")


def _reason(error: Exception) -> str:
    """The decoder's own words, without Python object representations in them."""
    text = error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
    return re.sub(r"<[^>]*>", "the file", str(text))[:200]
