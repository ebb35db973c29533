#!/usr/bin/env python3
"""Draws the waveform of a WAV file above its spectrogram.

    draw_sound.py in.wav out.png"""
import sys
import wave

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        with wave.open(sys.argv[1]) as file:  # as `mamba generate -o` writes it
            if (file.getnchannels(), file.getsampwidth()) != (1, 2):
                raise wave.Error(f"{file.getnchannels()} channels of {file.getsampwidth()} bytes; expected one of 2")
            rate = file.getframerate()
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    except (OSError, EOFError, wave.Error) as error:
        sys.exit(f"draw_sound.py: {sys.argv[1]}: {error if str(error) else 'not a whole WAV file'}")
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(10, 5), height_ratios=(1, 2))
    above.plot(np.arange(len(samples)) / rate, samples, linewidth=0.4)
    above.set(ylabel="amplitude", ylim=(-1, 1), xlim=(0, len(samples) / rate))
    # Windows of 32 ms every 4 ms; the range is that of mu-law, about 70 dB. What is exactly silent has no logarithm.
    window = rate // 32
    below.specgram(samples + 1e-6 * np.random.default_rng(0).standard_normal(len(samples)), NFFT=window, noverlap=window - rate // 250,
                   Fs=rate, vmin=-120, vmax=-40)
    below.set(xlabel="seconds", ylabel="Hz")
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=100)


if __name__ == "__main__":
    main()
