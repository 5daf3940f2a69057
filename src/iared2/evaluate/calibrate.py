"""Calibration: one threshold per group for any budget, from a few hundred pictures without labels.

Each group's threshold is the chance at which, over all pictures, its share of patches is left. Reductions are walked in
order with all pictures at once, so that every threshold is found on what the ones before it let through: one forward pass
over the pictures per schedule. Pictures keep as many patches as they need; the shares hold on average.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from iared2 import cost
from iared2.budget import LARGEST, Budget, curve, powered, solve_power
from iared2.errors import ConfigError, DataError
from iared2.evaluate.judge import finite
from iared2.evaluate.machine import synchronise
from iared2.keep import Threshold
from iared2.model import ReducedTransformer, margin
from iared2.worth import thins

logger = logging.getLogger("iared2.evaluate")

POWERS = (12.0, 8.0, 6.0, 4.5, 3.5, 3.0, 2.5, 2.0, 1.7, 1.4, 1.2, 1.0, 0.8, 0.6, 0.4, 0.2)  # looked at for a disagreement, cheapest first
ENOUGH = 50  # pictures, below which a calibration is taken with a grain of salt
FAR = 0.02  # share of the dense multiply-adds that is worth a warning
FAR_IN_TIME = 0.05  # the same of a time, as a part of it
CROWDED = 1e-4  # distance from 0 or 1 at which single precision tells few chances apart
TOLERANCE = 0.002  # share of the dense multiply-adds at which a schedule is near enough


@dataclass(frozen=True)
class Expectation:
    """What calibrated thresholds did on the pictures they were chosen on.

    Attributes:
        thresholds: one per group.
        ratios: share of patches left after each group, mean over pictures.
        share: multiply-adds as a share of the dense model's, mean over pictures.
        agreement: pictures on which reduced and dense model name the same class, in percent (cosine x 100 without a classifier).
        kl: Kullback-Leibler divergence from dense to reduced in nats (0 without a classifier).
        slope: change of `share` for a threshold that is 0.01 higher in every group.
        pictures: how many there were.
        milliseconds: time per image, where a time was asked for.
        cosine: whether there is no classifier, so that agreement is a cosine.
        again: pictures that were looked at again, in percent.
    """

    thresholds: tuple[float, ...]
    ratios: tuple[float, ...]
    share: float
    agreement: float
    kl: float
    slope: float
    pictures: int
    milliseconds: float | None = None
    cosine: bool = False
    again: float = 0.0

    def line(self) -> str:
        """One line for people."""
        kept = ", ".join(f"{ratio:.2f}" for ratio in self.ratios)
        spent = "" if self.milliseconds is None else f", {self.milliseconds:.2f} ms per image"
        near = f"agreement with dense {self.agreement:.1f} %, KL {self.kl:.4f}"
        if self.cosine:
            near = f"cosine to dense {self.agreement / 100:.4f}"
        twice = f"; {self.again:.1f} % looked at again" if self.again else ""
        return (
            f"{self.share:.3f} of the dense multiply-adds{spent}; {near} "
            f"(on {self.pictures} pictures); patches left after each group {kept}{twice}; thresholds 0.01 higher: {self.slope:+.4f}x"
        )


class Calibrator:
    """Pictures and the dense model's answers to them, and searches over thresholds.

    Args:
        batches: images (B, 3, height, width), all of one size; a few hundred pictures in all.
        dense: the dense model's answers to them, where they are known (and the backbone may have been trained since).
        second_look: the share of pictures, from 0 to below 1, that is to be looked at again: those of the smallest margins. Its cost
            belongs to every budget. 0 also switches a second look off that the model came with.

    Raises:
        DataError: there are no pictures.
        ConfigError: the model's answers are not finite; or a second look that is none or all of these pictures, or asked of a model
            without classes.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: ReducedTransformer,
        batches: Sequence[Float[Tensor, "B 3 height width"]],
        dense: Sequence[Tensor] | None = None,
        second_look: float = 0.0,
    ) -> None:
        if not batches:
            raise DataError("calibration: there are no pictures to calibrate on")
        if second_look and not model.names_classes:
            raise ConfigError(f"second look: got {second_look:g}, but this model names no class to be unsure of; leave it at 0")
        if model.config.rule != "threshold":
            raise ConfigError(
                f"calibration: this model keeps patches by {model.config.rule!r}, which has no thresholds to choose; "
                "change its ratios, or configure(rule='threshold') first"
            )
        self.model, self.batches = model.eval(), list(batches)
        self.dense = list(dense or [finite(model.backbone(images), "the dense model").float() for images in self.batches])
        self.size = (self.batches[0].shape[-2], self.batches[0].shape[-1])
        self.pictures = sum(len(images) for images in self.batches)
        self.dense_macs = cost.dense_macs(model.adapter, *self.size)
        self.second_look = _count(second_look, self.pictures) / self.pictures
        if model.config.second_look:
            model.configure(second_look=0.0)

    @staticmethod
    def _known(chance_P: Tensor) -> Tensor:
        if not chance_P.isfinite().all():
            raise ConfigError("calibration: an interpreter scores NaN or infinity, which no threshold divides; train it with smaller steps")
        return chance_P

    def warn_of_few(self) -> None:
        """Says so where there are too few pictures to rely on."""
        if self.pictures < ENOUGH:
            few = "chosen on %d pictures: other pictures may cost and answer otherwise; a few hundred are wanted"
            logger.warning(few, self.pictures)

    def family(self) -> tuple[float, ...]:
        """The schedule whose powers are searched: that of the present thresholds, or the plain curve where they say nothing yet."""
        ratios = self.measure().ratios
        falling = all(a > b for a, b in pairwise((1.0, *ratios, 0.0)))
        return ratios if falling else self.plain_curve()

    def plain_curve(self) -> tuple[float, ...]:
        """The plain schedule at this model's reductions."""
        config = self.model.config
        thinned = thins(config.worth, gone=config.on_drop == "discard")
        between, merges = config.place == "between", config.on_drop == "merge"
        return curve(self.model.adapter.depth, config.first_blocks, between, merges, thinned)

    def around(self, share: float, parts: Sequence[float]) -> Iterator[Expectation]:
        """What thresholds for budgets around `share` would do, as far as they can be reached; leaves the model at the last."""
        family = self.family()
        for part in parts:
            if 0 < part * share < 1:
                with suppress(ConfigError):
                    yield self._to_share(family, part * share)

    @property
    def second_share(self) -> float:
        """What second looks cost on average, as a share of the dense model."""
        rows, columns = self.model.adapter.grid(*self.size)
        return self.second_look * self.model.second_look_macs(self.size, rows * columns) / self.dense_macs

    def power_for(self, family: Sequence[float], share: float) -> float:
        """The power at which the schedule would cost `share` where all pictures keep the same.

        Raises:
            ConfigError: the reductions of this model, or its second looks, cannot get there.
        """
        try:
            return solve_power(self.share_of, family, share)
        except ConfigError as error:
            if not self.second_look:
                raise
            twice = f"second looks at {self.second_look:.1%} of the pictures, {self.second_share:.2f}x of the dense model, are among it"
            raise ConfigError(f"{error}; {twice}: ask for fewer") from None

    def share_of(self, ratios: Sequence[float]) -> float:
        """What images that keep exactly these shares of their patches would cost on average, as a share of the dense model."""
        rows, columns = self.model.adapter.grid(*self.size)
        places, least = rows * columns, int(self.model.adapter.needs_patch)
        lengths = [max(least, round(ratio * places)) for ratio in ratios]
        return self.model.macs(self.size, places, lengths) / self.dense_macs + self.second_share

    @torch.inference_mode()
    def thresholds_for(self, ratios: Sequence[float]) -> tuple[float, ...]:
        """Thresholds that leave these shares of patches, and sets the model to them."""
        states = [self.model.start(images) for images in self.batches]
        found: list[float] = []
        for group, ratio in enumerate(ratios):
            reducer = self.model.reducers[group]
            states = [self.model.walk_to(state, group, reduce=()) for state in states]
            chances = []
            for state in states:
                judged = reducer.judge(reducer.interpreter(state.tokens, state.class_TH), state.tokens, state.key_THK)
                chances.append(self._known(judged.chance_T[state.tokens.layout.is_patch_T].double()))
            found.append(_boundary(torch.cat(chances), round(ratio * self.pictures * states[0].tokens.layout.places)))
            reducer.rule = Threshold(found[-1], self.model.adapter.needs_patch)
            states = [self.model.reduce_with(state, group) for state in states]
        self.model.threshold = tuple(found)
        return tuple(found)

    @torch.inference_mode()
    def choose_margin(self) -> None:
        """Sets the margin up to which the wanted share of these pictures lies, with the model's present thresholds."""
        if self.second_look:
            self.model.configure(second_look=margin_for(self.model, self.batches, self.second_look))

    @torch.inference_mode()
    def measure(self) -> Expectation:
        """What the model's present thresholds do."""
        agree = divergence = share = again = 0.0
        kept = torch.zeros(len(self.model.reducers))
        for images, dense in zip(self.batches, self.dense, strict=True):
            logits, trace = self.model.trace(images)
            logits = logits.float()
            if self.model.num_classes:
                agree += (logits.argmax(1) == dense.argmax(1)).sum().item()
                divergence += F.kl_div(logits.log_softmax(1), dense.log_softmax(1), reduction="sum", log_target=True).item()
            else:
                agree += F.cosine_similarity(logits, dense, dim=1).sum().item()
            share += trace.share_of_dense() * len(images)
            again += sum(trace.again)
            kept += trace.keep_ratio.sum(0).cpu()
        count, thresholds = self.pictures, self.model.threshold
        each = thresholds if isinstance(thresholds, tuple) else (thresholds,) * len(self.model.reducers)
        ratios = tuple((kept / count).tolist())
        cosine = not self.model.num_classes
        near = (100 * agree / count, divergence / count)
        return Expectation(each, ratios, share / count, *near, 0.0, count, cosine=cosine, again=100 * again / count)

    def to_share(self, share: float) -> Expectation:
        """Thresholds at which pictures cost `share` of the dense multiply-adds on average.

        Raises:
            ConfigError: the reductions of this model cannot get there.
        """
        return self.with_slope(self._to_share(self.family(), share))

    def _to_share(self, family: Sequence[float], share: float, nearest: bool = False) -> Expectation:
        """Starts where the mean picture would cost `share`; pictures that keep different numbers cost a little more than it."""
        low, high = ((power, self.share_of(powered(family, power))) for power in (0.0, LARGEST))  # powers and what they cost
        power = self.power_for(family, min(low[1], max(high[1], share)) if nearest else share)
        tried = [expected := self.at(family, power)]
        for _ in range(8):
            if abs(expected.share - share) < TOLERANCE:
                break
            if expected.share > share:
                low = (power, expected.share)
            else:
                high = (power, expected.share)
            part = (low[1] - share) / max(low[1] - high[1], 1e-9)
            power = low[0] + min(0.9, max(0.1, part)) * (high[0] - low[0])
            tried.append(expected := self.at(family, power))
        best = min(tried, key=lambda one: abs(one.share - share))
        self._use(best)
        if abs(best.share - share) > FAR:
            logger.warning("asked for %.3f of the dense multiply-adds, found no thresholds nearer than %.3f", share, best.share)
        return best

    def to_disagreement(self, allowed: float) -> Expectation:
        """The cheapest thresholds found at which at most `allowed` percent of the pictures get another class than from the dense model.

        Agreement does not fall steadily, so schedules are tried from the cheapest on; without a classifier, `allowed` is 100 times
        what the cosine may lack of 1.

        Raises:
            ConfigError: not even the mildest schedule agrees so well, or it would cost as much as the dense model.
        """
        family = self.family()
        best = beyond = None
        for power in POWERS:
            if 100 - self.at(family, power).agreement <= allowed:
                best = power
                break
            beyond = power
        for _ in range(3 if best is not None and beyond is not None else 0):
            middle = ((best or 0.0) + (beyond or 0.0)) / 2
            if 100 - self.at(family, middle).agreement <= allowed:
                best = middle
            else:
                beyond = middle
        if best is None:
            raise ConfigError(f"disagreement: got {allowed:g} %, which no schedule of this model reaches on these pictures; allow more")
        found = self.with_slope(self.at(family, best))
        if found.share >= 1:
            raise ConfigError(
                f"disagreement: got {allowed:g} %, which costs {found.share:.2f}x of the dense model with {found.again:.1f} % of the "
                "pictures looked at again; allow more, or ask for fewer second looks"
            )
        return found

    def to_milliseconds(self, wanted: float, nearest: bool = False) -> Expectation:
        """Thresholds at which an image takes `wanted` milliseconds here, at the batch size of the pictures.

        Args:
            nearest: where no schedule takes that time, go on with the one that comes nearest, and say so.

        Raises:
            ConfigError: the dense model is faster already, or the fastest schedule slower.
        """
        family, low, high = self.family(), 0.0, 4.0
        tried = [self._timed(family, low), self._timed(family, high)]
        fast, slow = sorted(one[1] for one in tried)  # times are noisy: the milder schedule need not be the slower one
        if not fast <= wanted <= slow and not nearest:
            raise ConfigError(
                f"budget: got {wanted:g} ms per image, but this model takes between {fast:.2f} and {slow:.2f} ms here at a batch of "
                f"{len(self.batches[0])}; name a time in between, or another batch size"
            )
        for _ in range(7):
            middle = (low + high) / 2
            tried.append(self._timed(family, middle))
            low, high = (middle, high) if tried[-1][1] > wanted else (low, middle)
        best = min(tried, key=lambda one: abs(one[1] - wanted))[0]
        self._use(best)
        milliseconds = self._time()  # once more: the nearest of several noisy times is nearer than it is
        if abs(milliseconds - wanted) > FAR_IN_TIME * wanted:
            logger.warning("asked for %.2f ms per image, found no thresholds nearer than %.2f ms", wanted, milliseconds)
        return replace(self.with_slope(best), milliseconds=milliseconds)

    def meet(self, budget: Budget, nearest: bool = False) -> Expectation:
        """Thresholds for a budget of any kind.

        Args:
            nearest: where the budget is out of reach, go on with what comes nearest, and say so.

        Raises:
            ConfigError: the budget is out of reach.
        """
        if budget.kind == "ms":
            return self.to_milliseconds(budget.value, nearest)
        return self.with_slope(self._to_share(self.family(), budget.share(self.dense_macs), nearest))

    @torch.no_grad()
    def settle(self) -> None:
        """Moves what chances are measured from, so that the present thresholds become one half, where there is a worth to move."""
        present = self.model.threshold
        each = list(present) if isinstance(present, tuple) else [present] * len(self.model.reducers)
        for group, reducer in enumerate(self.model.reducers):
            if reducer.worth is not None and 0 < each[group] < 1:
                logit = math.log(each[group] / (1 - each[group]))
                reducer.worth.offset.add_(logit / reducer.worth.config.steepness)
                each[group] = 0.5
        self.model.threshold = tuple(each)

    def settled(self, aim: Callable[[], Expectation]) -> Expectation:
        """What `aim` meets, with chances moved (where there is a worth) so that thresholds are one half; measured anew, slope included.

        Far from one half, where chances crowd at 0 or 1, a threshold a little higher may cost a fifth of the model: a knife edge. Where
        they crowd so that few can be told apart, `aim` is taken once more from where they can.
        """
        met = aim()
        if any(not CROWDED < value < 1 - CROWDED for value in met.thresholds):
            self.settle()
            met = aim()
        self.settle()
        self.choose_margin()
        return replace(self._with_slope(self.measure()), milliseconds=met.milliseconds)

    def at(self, family: Sequence[float], power: float) -> Expectation:
        """A schedule on these pictures, and the margin that goes with it."""
        self.thresholds_for(powered(family, power))
        self.choose_margin()
        return self.measure()

    def _use(self, tried: Expectation) -> None:
        self.model.threshold = tried.thresholds
        self.choose_margin()

    def _timed(self, family: Sequence[float], power: float) -> tuple[Expectation, float]:
        return self.at(family, power), self._time()

    def _time(self) -> float:
        """Milliseconds per image with the present thresholds: the median over batches, eight at most."""
        device, times = self.batches[0].device, []
        with torch.inference_mode():
            self.model(self.batches[0])
            for images in self.batches[:8]:
                synchronise(device)
                start = time.perf_counter()
                self.model(images)
                synchronise(device)
                times.append(1000 * (time.perf_counter() - start) / len(images))
        return statistics.median(times)

    def with_slope(self, expected: Expectation) -> Expectation:
        """Measures once more with all thresholds 0.01 higher, and puts them back; says so where margins divide pictures otherwise."""
        if abs(expected.again / 100 - self.second_look) > FAR:
            level = "asked for a second look at %.1f %% of the pictures, and it is %.1f %%: the margins of many are the same"
            logger.warning(level, 100 * self.second_look, expected.again)
        return self._with_slope(expected)

    def _with_slope(self, expected: Expectation) -> Expectation:
        self.model.threshold = tuple(value + 0.01 for value in expected.thresholds)
        slope = self.measure().share - expected.share
        self.model.threshold = expected.thresholds
        return replace(expected, slope=slope)


@torch.inference_mode()
def margin_for(model: ReducedTransformer, batches: Sequence[Float[Tensor, "B 3 height width"]], share: float) -> float:
    """The margin up to which this share of the pictures lies after one pass, those of which the model is least sure; 0 for none.

    Where several margins are level at the boundary, fewer pictures lie below it than asked for.

    Raises:
        ConfigError: no share, or one that is none or all of these pictures.
    """
    ranked = torch.cat([margin(model.logits(images)) for images in batches]).double().sort().values
    again = _count(share, len(ranked))
    apart = ranked[: again + 1].unique()[-2:]  # the first that is not wanted, and the last margin below it
    return float(apart.mean()) if again and len(apart) > 1 else 0.0


def _count(share: float, pictures: int) -> int:
    """How many pictures a share of them is."""
    if not 0 <= share < 1:
        raise ConfigError(f"second look: got {share:g}, wanted a share of the pictures, from 0 to below 1, as 0.1")
    count = round(share * pictures)
    if share and not 0 < count < pictures:
        which = "none" if not count else "all"
        raise ConfigError(f"second look: got {share:g}, which is {which} of {pictures} pictures; give more pictures, or another share")
    return count


def _boundary(chance_P: Float[Tensor, " P"], keep: int) -> float:
    """A threshold that `keep` of these chances exceed (more or fewer where several are equal)."""
    if keep >= len(chance_P):
        return -1.0
    ranked = chance_P.sort(descending=True).values
    if keep == 0:
        return float(ranked[0])
    return float((ranked[keep - 1] + ranked[keep]) / 2)
