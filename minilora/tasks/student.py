"""Student's t distribution (Student 1908): its tail and its quantiles, from the incomplete beta function."""

import math
from functools import lru_cache

TINY = 1e-300
MOST = 10_000  # terms of the continued fraction


def tail(t, degrees):
    """P(T > t) of `degrees` > 0 of freedom: half of I_x(degrees/2, 1/2) with x = degrees / (degrees + t^2) for t > 0.

    Abramowitz and Stegun 1964, equation 26.7.1.
    """
    if math.isinf(t):
        return float(t < 0)
    half = incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t), t * t / (degrees + t * t)) / 2
    return half if t >= 0 else 1 - half


@lru_cache(maxsize=4096)
def quantile(share, degrees):
    """The t with P(T > t) = 1 - `share`, 0 < share < 1, to 1e-12 of its size: by halving an interval."""
    if share < 0.5:
        return -quantile(1 - share, degrees)
    low, high = 0.0, 1.0
    while tail(high, degrees) > 1 - share:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if tail(middle, degrees) > 1 - share else (low, middle)
    return (low + high) / 2


def incomplete_beta(a, b, x, rest):
    """The regularised I_x(a, b), `rest` = 1 - x (given, so that neither loses digits near 0).

    By the continued fraction of Press et al. 2007 (Numerical Recipes, section 6.4), with Lentz's method.
    """
    if x <= 0 or rest <= 0:
        return float(rest <= 0)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest))
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast below it
        return 1 - front * fraction(b, a, rest) / b
    return front * fraction(a, b, x) / a


def fraction(a, b, x):
    c, d = 1.0, 1 / apart(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, MOST):
        for term in (m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
                     -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))):  # fmt: skip
            d, c = 1 / apart(1 + term * d), apart(1 + term / c)
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value


def apart(value):
    """`value`, kept apart from 0."""
    return value if abs(value) > TINY else TINY
