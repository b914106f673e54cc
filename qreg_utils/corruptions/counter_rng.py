"""Counter-based random numbers: a value depends on (name, severity, seed, image index, counter) and on nothing else.

A splitmix64 stream for each image, evaluated for all images and counters at once in int64 arithmetic, which wraps
around alike on CPU and CUDA. So no generator state is shared between the images of a batch, and a batch may be cut
anywhere.
"""

import math
import zlib
from functools import cached_property, lru_cache

import torch

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
GUIDE_BINS = 2048


def _signed(word):
    """The int64 with the same bits as the unsigned 64-bit number `word`."""
    word &= 2**64 - 1
    return word - 2**64 if word >= 2**63 else word


def _mix_(words):
    """The splitmix64 finaliser, in place on an int64 tensor."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, None), strict=True):
        # >> on int64 copies the sign bit; the mask makes the shift logical.
        words ^= (words >> shift).bitwise_and_(2 ** (64 - shift) - 1)
        if multiplier is not None:
            words *= _signed(multiplier)
    return words


class CounterGenerator:
    """Random numbers for the images first_image .. first_image + num_images - 1 of one call.

    Every method returns one independent array of shape `shape` for each image, (num_images, *shape), and takes the
    next counters of each image's stream.
    """

    def __init__(self, name, severity, seed, first_image, num_images, device):
        self.device = device
        self.stream = (name, int(severity), int(seed))
        self.images = range(first_image + 1, first_image + num_images + 1)
        self.counter = 0

    @cached_property
    def keys(self):
        """int64 (num_images, 1): where each image's stream starts; nothing is spent on it by who draws nothing."""
        images = torch.arange(self.images.start, self.images.stop, dtype=torch.int64, device=self.device)
        return _mix_(images * _signed(GOLDEN_GAMMA) + _stream_key(*self.stream))[:, None]

    def _bits(self, count):
        """int32 (num_images, 2, ceil(count / 2)): 32 random bits for each number; two numbers share a 64-bit word."""
        num_words = (count + 1) // 2
        counters = torch.arange(self.counter, self.counter + num_words, dtype=torch.int64, device=self.device)
        self.counter += num_words
        words = _mix_(self.keys + counters * _signed(GOLDEN_GAMMA))
        return words.view(torch.int32).view(len(words), num_words, 2).transpose(1, 2)

    def uniform(self, low, high, shape):
        """float32 in [low, high), 24 bits of resolution."""
        count = math.prod(shape)
        unit = (self._bits(count) >> 8).float().mul_(2.0**-24).add_(0.5)
        return unit.mul_(high - low).add_(low).flatten(1)[:, :count].reshape(-1, *shape)

    def coins(self, shape):
        """bool, True half of the time: where ``uniform(0, 1, shape)`` were below 1/2."""
        count = math.prod(shape)
        return (self._bits(count) < 0).flatten(1)[:, :count].reshape(-1, *shape)

    def normal(self, mean, std, shape):
        """float32, by Box-Muller: radius and angle come from the two halves of one word; tails reach 6.6 std."""
        count = math.prod(shape)
        radius_bits, angle_bits = self._bits(count).unbind(1)
        # 31 bits, kept positive so that the floats near 0, which make the tails, are the finest ones.
        radius = (radius_bits & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).log_().mul_(-2 * std**2).sqrt_()
        angle = angle_bits.float().mul_(math.pi * 2.0**-31)
        pair = torch.cat((angle.cos().mul_(radius), angle.sin_().mul_(radius)), 1)
        return pair.add_(mean)[:, :count].reshape(-1, *shape)

    def integers(self, low, high, shape):
        """int64, uniform on low .. high - 1; `high` may be a tensor with one bound for each image if shape is ()."""
        count = math.prod(shape)
        unsigned = (self._bits(count).long() + 2**31).flatten(1)[:, :count].reshape(-1, *shape)
        return ((unsigned * (high - low)) >> 32) + low

    def poisson(self, levels, rate):
        """float64 counts with mean rate * levels / 255 for uint8 levels (num_images, ...), by inversion of the CDF."""
        guide, cumulative = _poisson_tables(rate, self.device)
        count = levels[0].numel()
        level = levels.flatten().long()
        # One array holds the distribution functions of all levels end to end, each raised by its level.
        unit = self._bits(count).flatten(1)[:, :count].flatten().double().add_(2**31 + 0.5).mul_(2.0**-32)
        counts = guide[(unit * GUIDE_BINS).long().add_(level, alpha=GUIDE_BINS)]
        undecided = (counts < 0).nonzero().squeeze(1)
        level = level[undecided]
        found = torch.searchsorted(cumulative.flatten(), unit[undecided] + level) - level * cumulative.shape[1]
        counts[undecided] = found.to(counts.dtype)
        return counts.double().view(levels.shape)


@lru_cache(maxsize=128)
def _stream_key(name, severity, seed):
    key = torch.zeros(1, dtype=torch.int64)
    for part in (zlib.crc32(name.encode()), severity, seed):
        key = _mix_(key + _signed(part + GOLDEN_GAMMA))
    return key.item()


@lru_cache(maxsize=8)
def _poisson_tables(rate, device):
    """Guide table (256 * GUIDE_BINS) and raised distribution functions (256, K) of Poisson(rate * level / 255).

    The guide holds the count that belongs to each of GUIDE_BINS equal parts of the quantiles, or -1 where a part
    belongs to more than one count.
    """
    levels = torch.arange(256, dtype=torch.float64)
    means = rate * levels[:, None] / 255
    counts = torch.arange(math.ceil(rate + 10 * math.sqrt(rate) + 10), dtype=torch.float64)
    pmf = (torch.special.xlogy(counts, means) - means - torch.lgamma(counts + 1)).exp()
    cumulative = pmf.cumsum(1).clamp_(max=1)
    cumulative[:, -1] = 1
    edges = torch.linspace(0, 1, GUIDE_BINS + 1, dtype=torch.float64).expand(256, -1).contiguous()
    at_edges = torch.searchsorted(cumulative, edges)
    below, above = at_edges[:, :-1], at_edges[:, 1:]
    guide = torch.where(below == above, below, -1).to(torch.int16)
    return guide.flatten().to(device), (cumulative + levels[:, None]).to(device)
