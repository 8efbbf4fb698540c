"""The public preprocessing (ecg-preprocessing, options of the course) written a second time, for tests and
benchmark.

Plain on purpose, as the public scripts do it: one record after the other, its filters designed again for
each.
"""
from fractions import Fraction

import numpy as np
from scipy import signal as dsp

LEADS = ("DI", "DII", "V1", "V2", "V3", "V4", "V5", "V6")


def reference(ecg, rate, leads, new_freq=400, new_len=4096, remove_baseline=True, powerline=60):
    """Preprocess one exam: (samples, leads) in mV at `rate` Hz to (new_len, 8) in mV at `new_freq` Hz,
    float64.
    """
    x = np.stack([ecg[:, list(leads).index(lead)] for lead in LEADS]).astype(float)
    if remove_baseline:
        x = remove_wander(x, rate)
    if powerline and powerline < rate / 2:
        b, a = dsp.iirnotch(powerline, 30, rate)
        x = dsp.filtfilt(b, a, x)
    ratio = Fraction(new_freq) / Fraction(str(rate))
    x = dsp.resample_poly(x, up=ratio.numerator, down=ratio.denominator, axis=-1)
    if x.shape[1] > new_len:
        first = (x.shape[1] - new_len) // 2
        x = x[:, first:first + new_len]
    result = np.zeros((new_len, len(LEADS)))
    front = (new_len - x.shape[1]) // 2
    result[front:front + x.shape[1]] = x.T
    return result


def remove_wander(x, rate):
    """Elliptic high-pass (pass edge 0.8 Hz, stop edge 0.2 Hz, 0.5 dB, 40 dB), forwards and backwards."""
    order, edge = dsp.ellipord(0.8 / (rate / 2), 0.2 / (rate / 2), 0.5, 40)
    sos = dsp.iirfilter(order, edge, rp=0.5, rs=40, btype="high", ftype="ellip", output="sos")
    return dsp.sosfiltfilt(sos, x, padtype="constant")
