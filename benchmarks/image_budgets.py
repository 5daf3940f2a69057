"""What budgets per image could gain, and whether anything foretells how much a picture needs.

python benchmarks/image_budgets.py PHOTOS --weights FILE --model RUN [--held-out 200] [--pictures 700]

Every photo is reduced to several shares of the multiply-adds, by thresholds that are calibrated on the held-out photos. Then an oracle,
which knows each photo's KL to the dense answer at each of them, shares the same multiply-adds out among photos (at the first and the last
share nobody has a choice). Of what a reduction could know when it decides (class token and mean patch token in front of it), ridge
regression foretells log KL; R2 is over ten folds, the penalty of each chosen on its other photos.
"""

import argparse

import iared2  # first: see iared2/_compat.py

# isort: split
import torch
from torch.nn import functional as F

from iared2.evaluate.calibrate import Calibrator
from iared2.evaluate.classify import eval_preprocess
from trade_off import pictures

SHARES = (0.42, 0.46, 0.50, 0.54, 0.58, 0.62, 0.68, 0.75)
MIDDLE = SHARES.index(0.54)
PENALTIES = (30.0, 100.0, 300.0, 1000.0, 3000.0)
FOLDS = 10


@torch.inference_mode()
def levels(model, held, photos):
    """KL and share of the multiply-adds of every photo (second axis) at every level; the model is left at the middle one."""
    calibrator = Calibrator(model, held)
    wanted = [model.backbone(images).float().log_softmax(1) for images in photos]
    divergence, cost, found = [], [], {}
    for share in SHARES:
        calibrator.to_share(share)
        found[share] = model.threshold
        rows, macs = [], []
        for images, goal in zip(photos, wanted, strict=True):
            logits, trace = model.trace(images)
            rows.append(F.kl_div(logits.float().log_softmax(1), goal, reduction="none", log_target=True).sum(1))
            macs.append(torch.tensor(trace.macs) / calibrator.dense_macs)
        divergence.append(torch.cat(rows))
        cost.append(torch.cat(macs))
    model.threshold = found[SHARES[MIDDLE]]
    return torch.stack(divergence).double(), torch.stack(cost).double()


def shared_out(foretold_LP, cost_LP, share: float):
    """The level of each photo that costs `share` on average at the least foretold sum: one price for all, found by halving."""
    low, high = 1e-6, 1e4
    for _ in range(80):
        price = (low * high) ** 0.5
        level_P = (foretold_LP + price * cost_LP).argmin(0)
        spent = cost_LP.gather(0, level_P[None]).mean()
        low, high = (price, high) if spent > share else (low, price)
    return level_P[None]


@torch.inference_mode()
def known_in_front(model, photos):
    """For every reduction, what is known of each photo in front of it: class token and mean patch token, normalised."""
    found = [[] for _ in model.reducers]
    for images in photos:
        state = model.start(images)
        for group in range(len(model.reducers)):
            state = model.walk_to(state, group, reduce=())
            x_TD = F.layer_norm(state.tokens.x_TD.float(), (state.tokens.x_TD.shape[1],))
            for one in x_TD.split(state.tokens.layout.length_B.tolist()):
                found[group].append(torch.cat([one[0], one[state.tokens.layout.prefix :].mean(0)]))
            state = model.reduce_with(state, group)
    return [torch.stack(rows).double() for rows in found]


def foretold(x_PF, y_P):
    """Ridge regression's answers for photos it was not fitted on."""
    order = torch.randperm(len(y_P), generator=torch.Generator().manual_seed(0))
    found_P = torch.zeros_like(y_P)
    for fold in range(FOLDS):
        out = order[fold::FOLDS]
        fitted = torch.ones(len(y_P), dtype=torch.bool).index_fill(0, out, False)
        mean, scale = x_PF[fitted].mean(0), x_PF[fitted].std(0).clamp(min=1e-6)
        z, target = (x_PF[fitted] - mean) / scale, y_P[fitted] - y_P[fitted].mean()
        best = min(PENALTIES, key=lambda penalty: left_out(z, target, penalty))
        found_P[out] = (x_PF[out] - mean) / scale @ torch.linalg.solve(gram(z, best), z.T @ target) + y_P[fitted].mean()
    return found_P


def gram(z_PF, penalty: float):
    return z_PF.T @ z_PF + penalty * torch.eye(z_PF.shape[1], dtype=z_PF.dtype)


def left_out(z_PF, y_P, penalty: float) -> float:
    """Mean squared error of ridge regression on each photo when fitted on the others, in closed form by the hat matrix."""
    hat_PP = z_PF @ torch.linalg.solve(gram(z_PF, penalty), z_PF.T)
    return ((y_P - hat_PP @ y_P) / (1 - hat_PP.diagonal())).square().mean().item()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=700, help="photos to look at, the held-out ones among them")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    model = iared2.ReducedTransformer.from_pretrained(options.model, weights=options.weights).eval()
    how = eval_preprocess(model)
    held, _, _ = pictures(options.photos, how, options.held_out)
    photos, _, _ = pictures(options.photos, how, options.pictures)
    with torch.autocast("cpu", torch.bfloat16):
        divergence_LP, cost_LP = levels(model, held, photos)
        known = known_in_front(model, photos)
    count = divergence_LP.shape[1]
    print(f"{count} photos. At the same multiply-adds: the same thresholds for all, or an oracle's budget for each photo")
    for level, share in list(enumerate(cost_LP.mean(1).tolist()))[1:-1]:
        best = divergence_LP.gather(0, shared_out(divergence_LP, cost_LP, share)).mean()
        print(f"  {share:.3f}x: KL {divergence_LP[level].mean():.4f}, oracle {best:.4f}")
    y_P = divergence_LP[MIDDLE].clamp(min=1e-4).log()
    print(f"log KL at {cost_LP[MIDDLE].mean():.3f}x, foretold by what is known in front of each reduction:")
    for group, x_PF in enumerate(known):
        rest = (foretold(x_PF, y_P) - y_P).square().sum()
        print(f"  reduction {group + 1}: R2 {1 - rest / (y_P - y_P.mean()).square().sum():.3f}")


if __name__ == "__main__":
    main()
