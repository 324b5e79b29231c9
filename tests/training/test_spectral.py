"""Changes of log-mel features: what each does to the features, and that each clip has its own."""

import pytest
import torch
from torch import Tensor

from training.spectral import DB_PER_UNIT, SpectralAugment, SpectralRecipe
from training.students.frontend import LogMel

NOTHING = {"p_warp": 0.0, "p_colour": 0.0, "frequency_stripes": 0, "time_stripes": 0}


def changed(features: Tensor, seed: int = 0, **recipe: object) -> Tensor:
    """The features [B, mels, T] after a change that does only what `recipe` asks for."""
    settings = SpectralRecipe(**{**NOTHING, **recipe})
    return SpectralAugment(settings, len(features), torch.Generator().manual_seed(seed))(features)


ONES = torch.ones(20, 64, 150)


def tone(hz: float) -> Tensor:
    """Features [1, 64, 80] of one second of a sine."""
    features: Tensor = LogMel()(0.3 * torch.sin(2 * torch.pi * hz * torch.arange(16_000) / 16_000)[None])
    return features


def test_nothing_asked_for_changes_nothing() -> None:
    features = torch.rand(3, 64, 40)
    assert torch.equal(changed(features), features)


def test_stripes_hide_whole_mels() -> None:
    hidden = changed(ONES, frequency_stripes=2, widest_mels=10) == 0
    assert torch.equal(hidden.any(dim=2), hidden.all(dim=2))
    assert 0 < int(hidden.any(dim=2).sum(dim=1).max()) <= 2 * 10


def test_stripes_hide_whole_frames() -> None:
    hidden = changed(ONES, time_stripes=2, longest_frames=12) == 0
    assert torch.equal(hidden.any(dim=1), hidden.all(dim=1))
    assert 0 < int(hidden.any(dim=1).sum(dim=1).max()) <= 2 * 12


def test_stripes_leave_the_rest_and_differ_from_clip_to_clip() -> None:
    striped = changed(ONES, time_stripes=2, frequency_stripes=2)
    assert set(striped.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(striped[0], striped[1])


@pytest.mark.parametrize("factor", [0.88, 1.12])
@pytest.mark.parametrize("hz", [300.0, 1000.0, 3000.0])
def test_a_warp_moves_a_tone_to_factor_times_its_frequency(factor: float, hz: float) -> None:
    warped = changed(tone(hz), p_warp=1.0, warp=(factor, factor))
    found, wanted = warped[0, :, 40].argmax(), tone(hz * factor)[0, :, 40].argmax()
    assert abs(int(found) - int(wanted)) <= 1
    assert found != tone(hz)[0, :, 40].argmax()


def test_warped_says_which_clips_changed() -> None:
    features = torch.rand(40, 64, 30)
    augment = SpectralAugment(
        SpectralRecipe(p_warp=0.5, p_colour=0, frequency_stripes=0, time_stripes=0),
        40,
        torch.Generator().manual_seed(0),
    )
    differs = ((augment(features) - features).abs() > 1e-3).flatten(1).any(dim=1)
    assert torch.equal(differs, augment.warped)
    assert 5 < int(differs.sum()) < 35


def test_colour_adds_one_gain_a_mel_to_all_frames() -> None:
    features = torch.rand(8, 64, 30)
    gains = changed(features, p_colour=1.0, colour_db=6.0) - features
    assert torch.allclose(gains, gains[:, :, :1].expand_as(gains), atol=1e-5)
    assert 0 < float(gains.abs().max()) <= 6.0 / DB_PER_UNIT + 1e-5
    assert not torch.allclose(gains[0], gains[1])


def test_a_decibel_of_level_is_a_decibel_of_colour() -> None:
    louder = LogMel()(10 ** (6 / 20) * torch.full((1, 16_000), 0.1).cumsum(1).sin())
    quieter = LogMel()(torch.full((1, 16_000), 0.1).cumsum(1).sin())
    band = int(quieter[0, :, 40].argmax())
    assert float((louder - quieter)[0, band, 40]) == pytest.approx(6 / DB_PER_UNIT, abs=1e-3)


def test_no_colour_goes_below_the_floor() -> None:
    silence = LogMel()(torch.zeros(10, 16_000))
    assert float(changed(silence, p_colour=1.0).min()) == pytest.approx(float(silence.min()), abs=1e-6)


def test_draws_repeat_with_their_generator() -> None:
    features = torch.rand(4, 64, 30)
    everything = {"p_warp": 0.5, "p_colour": 0.5, "frequency_stripes": 2, "time_stripes": 2}
    assert torch.equal(changed(features, 5, **everything), changed(features, 5, **everything))
    assert not torch.equal(changed(features, 5, **everything), changed(features, 6, **everything))
