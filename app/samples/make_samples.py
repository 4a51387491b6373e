"""Draws the sample picture and sings the sample sound: `python app/samples/make_samples.py` writes both beside itself.

They are made from formulas, so they belong to no data set and no test split.
"""

import wave
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SIDE = 64  # pixels; four tiles of a 32-pixel model
SAMPLE_RATE = 16000  # Hz
# First three formants of a sung vowel, Hz, and how long it lasts, seconds.
VOWELS = [((730, 1090, 2440), 0.34), ((530, 1840, 2480), 0.30), ((270, 2290, 3010), 0.30), ((570, 840, 2410), 0.34)]
NOTES_HZ = (146.8, 164.8, 196.0, 146.8)


def picture(rng: np.random.Generator) -> np.ndarray:
    """An evening lake as uint8 (64, 64, 3): sky, sun, two ranges of hills and their reflection."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    sky = np.stack([0.95 - 0.5 * (0.6 - y), 0.62 + 0.25 * (0.4 - y), 0.42 + 0.75 * (0.55 - y)], axis=-1)
    sun = np.clip(1.3 - np.hypot(x - 0.68, y - 0.30) / 0.11, 0, 1)[..., None]
    scene = sky * (1 - sun) + sun * np.array([1.0, 0.93, 0.70])
    far = y > 0.44 + 0.06 * np.sin(7 * x + 0.5) + 0.02 * np.sin(23 * x)
    near = y > 0.52 + 0.07 * np.sin(4 * x + 2.6) + 0.015 * np.sin(31 * x + 1)
    scene[far] = np.array([0.44, 0.36, 0.50]) + 0.10 * (0.55 - y[far, None])
    scene[near] = np.array([0.16, 0.27, 0.24]) + 0.03 * rng.standard_normal((int(near.sum()), 1))
    shore = int(0.64 * SIDE)
    ripple = np.round(2 * np.sin(np.arange(SIDE - shore) * 1.7)).astype(int)
    for row in range(shore, SIDE):
        mirrored = scene[max(0, 2 * shore - row - 1)]
        scene[row] = 0.72 * np.roll(mirrored, ripple[row - shore], axis=0) + np.array([0.0, 0.02, 0.07])
    scene += 0.006 * rng.standard_normal((SIDE, SIDE, 1))
    return (np.clip(scene, 0, 1) * 255).round().astype(np.uint8)


def sound(rng: np.random.Generator) -> np.ndarray:
    """Four sung vowels as int16 at 16 kHz: a buzz at the note's pitch through three formant resonances each."""
    parts = []
    for (formants, seconds), note in zip(VOWELS, NOTES_HZ, strict=True):
        t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
        wander = 0.01 * rng.standard_normal(t.size).cumsum()  # no singer holds a pitch exactly
        phase = 2 * np.pi * note * t + 0.25 * np.sin(2 * np.pi * 5.2 * t) + wander
        voice = np.zeros_like(t)
        for harmonic in range(1, int(4000 / note)):
            resonances = [1 / (1 + ((harmonic * note - f) / (60 + f / 12)) ** 2) / (i + 1) for i, f in enumerate(formants)]
            voice += sum(resonances) * np.sin(harmonic * phase)
        envelope = np.clip(np.minimum(t / 0.04, (t[-1] - t) / 0.06), 0, 1)
        parts.append(voice * envelope)
    voice = np.concatenate(parts)
    breath = np.convolve(rng.standard_normal(voice.size), np.full(4, 0.25), "same")
    voice = voice / np.abs(voice).max() + 0.01 * breath
    return (voice * 0.1 * 32767).round().astype(np.int16)


def main() -> None:
    rng = np.random.default_rng(7)
    Image.fromarray(picture(rng)).save(HERE / "lake.png", optimize=True)
    with wave.open(str(HERE / "vowels.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(sound(rng).astype("<i2").tobytes())


if __name__ == "__main__":
    main()
