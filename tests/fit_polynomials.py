#!/usr/bin/env python3
"""Fit the polynomials of exp2 and log in mamba.c, and measure what they are worth in float32.

    python3 tests/fit_polynomials.py          # needs numpy; prints the coefficients as C hexadecimal floats

exp2: 2^f on f in [-1/2, 1/2], relative error; the constant term is fixed at 1 so that exp2(0) = 1 exactly.
log:  log(1 + s) = s - s^2/2 + s^3 P(s) on s in [-1/3, 1/3], error relative to s.
The fit is Lawson's: weighted least squares in double, weights multiplied by the error until it is level.
Coefficients are rounded to float32 one at a time, the highest first, and the others fitted again.
"""
import numpy as np


def lawson(basis, target, rounds=400):
    """Minimise max |basis @ c - target| over c; the rows are sample points."""
    weight = np.ones(len(target))
    for _ in range(rounds):
        root = np.sqrt(weight)[:, None]
        c, *_ = np.linalg.lstsq(basis * root, target * root[:, 0], rcond=None)
        error = np.abs(basis @ c - target)
        weight *= error / error.max() + 1e-9
        weight /= weight.sum()
    return c


def fit_rounded(columns, target):
    """Fit sum c_i * columns[i] = target, every c_i a float32; the last column is the highest power."""
    fixed = {}
    for i in reversed(range(len(columns))):
        rest = target - sum((fixed[j] * columns[j] for j in fixed), np.zeros_like(target))
        c = lawson(np.stack(columns[:i + 1], axis=1), rest)
        fixed[i] = float(np.float32(c[i]))
    return [fixed[i] for i in range(len(columns))]


def points(lo, hi, n=4001):
    """Chebyshev points: dense at the ends, where a polynomial errs most."""
    return (lo + hi) / 2 + (hi - lo) / 2 * np.cos(np.linspace(0, np.pi, n))


def main():
    f = points(-0.5, 0.5)
    exp2 = fit_rounded([f**i / 2**f for i in range(1, 7)], 1 - 1 / 2**f)
    print("exp2, powers 1..6:", ", ".join(float(np.float32(c)).hex() for c in exp2))
    value = 1 + sum(c * f**(i + 1) for i, c in enumerate(exp2))
    print("  relative error of the polynomial: %.2e" % np.max(np.abs(value / 2**f - 1)))

    s = points(-1 / 3, 1 / 3)
    s = s[np.abs(s) > 1e-3]  # the target below divides by s^3
    log = fit_rounded([s**(i + 2) for i in range(8)], (np.log1p(s) - s + s * s / 2) / s)
    print("log, P's powers 0..7:", ", ".join(float(np.float32(c)).hex() for c in log))
    value = s - s * s / 2 + s**3 * sum(c * s**i for i, c in enumerate(log))
    print("  error relative to s: %.2e" % np.max(np.abs((value - np.log1p(s)) / s)))


if __name__ == "__main__":
    main()
