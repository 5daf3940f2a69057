"""Eq. 2 and 3. The estimator is proven by enumeration: its exact expectation is the gradient of the exact expected reward."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracle
from iared2.errors import ConfigError
from iared2.interpreter import Interpreter, InterpreterConfig
from iared2.reward import EstimatorConfig, RewardConfig, advantages, entropy, log_probability, policy_gradient_loss, reward
from iared2.settings import explain_validation
from packs import make_pack

PATCHES, HEADS, TAU = 6, 2, 1.5


@given(
    correct=st.booleans(),
    patches=st.integers(1, 196),
    data=st.data(),
    tau=st.sampled_from([0.5, 1.0, 1.5]),
    shape=st.sampled_from(["square", "linear"]),
)
def test_equation_2(correct, patches, data, tau, shape):
    kept = data.draw(st.integers(0, patches))
    got = reward(torch.tensor([correct]), torch.tensor([kept]), torch.tensor([patches]), RewardConfig(error_penalty=tau, shape=shape))
    assert float(got) == pytest.approx(oracle.reward(correct, kept, patches, tau, 2 if shape == "square" else 1), abs=1e-6)


def test_images_without_patches_cost_nothing():
    got = reward(torch.tensor([True, False]), torch.tensor([0, 0]), torch.tensor([0, 0]), RewardConfig())
    assert got.tolist() == [1, -1.5]


def test_defaults_are_the_papers_and_wrong_keys_are_answered():
    config = RewardConfig()
    assert (config.error_penalty, config.shape, config.target, config.patches) == (1.5, "square", "label", "input")
    with pytest.raises(ValueError, match=r"unknown setting 'error_penalti'; did you mean 'error_penalty'\?") as caught:
        RewardConfig.model_validate({"error_penalti": 1.0})
    assert isinstance(explain_validation(caught.value), ConfigError)


class Enumeration:
    """One image of six patches, a random interpreter, and a world in which being correct depends on what is kept."""

    def __init__(self, seed: int, shape: str, config: InterpreterConfig) -> None:
        torch.manual_seed(seed)
        self.interpreter = Interpreter(8, HEADS, config).double()
        for value in self.interpreter.parameters():
            value.data.normal_(0, 0.8)
        self.tokens = make_pack([list(range(PATCHES))], prefix=1, width=8, seed=seed)
        self.names, self.values = zip(*self.interpreter.named_parameters(), strict=True)
        self.keeps = torch.tensor(list(itertools.product([False, True], repeat=PATCHES)))
        correct = torch.rand(len(self.keeps)) < 0.6
        patches = torch.full((len(self.keeps),), PATCHES)
        config_ = RewardConfig(error_penalty=TAU, shape=shape)
        self.reward_U = reward(correct, self.keeps.sum(1), patches, config_).double()

    def scores(self) -> Tensor:
        """Scores of the patches; their gradient leads to the interpreter."""
        return self.interpreter(self.tokens)[self.tokens.layout.is_patch_T]

    def probability(self, score_N: Tensor) -> Tensor:
        """pi(u) = prod_i I_i^u_i (1 - I_i)^(1 - u_i) for every u."""
        return torch.where(self.keeps, score_N, 1 - score_N).prod(1)

    def greedy(self, score_N: Tensor) -> Tensor:
        """R(u_hat): the reward of keeping what scores above 0.5."""
        return self.reward_U[(self.keeps == (score_N > 0.5)).all(1)]

    def exact(self) -> tuple[Tensor, ...]:
        """Autograd's gradient of J = sum_u pi(u) R(u)."""
        return torch.autograd.grad((self.probability(self.scores()) * self.reward_U).sum(), self.values, allow_unused=True)

    def expected(self, baseline: Tensor | float) -> list[Tensor]:
        """sum_u pi(u) times the estimator's gradient for u, each by the library's own loss."""
        probability_U = self.probability(self.scores()).detach()
        total = [torch.zeros_like(v) for v in self.values]
        for u, keep_N in enumerate(self.keeps):
            log_p = log_probability(self.scores(), keep_N).sum()[None]
            loss = policy_gradient_loss(log_p, self.reward_U[u : u + 1] - baseline)
            for number, gradient in enumerate(torch.autograd.grad(loss, self.values, allow_unused=True)):
                if gradient is not None:
                    total[number] -= probability_U[u] * gradient  # the loss descends where J ascends
        return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", ["square", "linear"])
@pytest.mark.parametrize(
    "config", [InterpreterConfig(), InterpreterConfig.paper(), InterpreterConfig(policy="class")], ids=["ours", "paper", "class"]
)
def test_the_estimators_expectation_is_the_gradient_of_the_expected_reward(seed, shape, config):
    world = Enumeration(seed, shape, config)
    wanted = world.exact()
    for baseline in (0.0, world.greedy(world.scores().detach()), 123.4):
        for name, got, exact in zip(world.names, world.expected(baseline), wanted, strict=True):
            assert (got - (0 if exact is None else exact)).abs().max() < 1e-10 * (1 if baseline != 123.4 else 100), name
    assert max(float(w.abs().max()) for w in wanted if w is not None) > 1e-3


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("normalised", [False, True])
def test_leave_one_out_is_unbiased_too(seed, normalised):
    """Every pair of draws of four patches, weighed by its probability. Normalising scales a draw's gradient, and so is biased."""
    world = Enumeration(seed, "square", InterpreterConfig())
    world.keeps, world.reward_U = world.keeps[::4][:, :], world.reward_U[::4]  # the last two patches are always dropped
    config = EstimatorConfig(samples=2, baseline="leave_one_out", normalise_advantage=normalised)

    def probability(score_N: Tensor) -> Tensor:
        return torch.where(world.keeps[:, :4], score_N[:4], 1 - score_N[:4]).prod(1)

    exact = torch.autograd.grad((probability(world.scores()) * world.reward_U).sum(), world.values, allow_unused=True)
    total = [torch.zeros_like(v) for v in world.values]
    p_U = probability(world.scores()).detach()
    for a, b in itertools.product(range(len(world.keeps)), repeat=2):
        score_N = world.scores()[:4]
        log_p_K1 = torch.stack([log_probability(score_N, world.keeps[u, :4]).sum()[None] for u in (a, b)])
        advantage_K1 = advantages(world.reward_U[[a, b]][:, None], None, config)
        loss = policy_gradient_loss(log_p_K1.flatten(), advantage_K1.flatten())
        for number, gradient in enumerate(torch.autograd.grad(loss, world.values, allow_unused=True)):
            if gradient is not None:
                total[number] -= p_U[a] * p_U[b] * gradient
    error = max(float((t - (0 if e is None else e)).abs().max()) for t, e in zip(total, exact, strict=True))
    size = max(float(e.abs().max()) for e in exact if e is not None)
    assert (error > 0.1 * size) if normalised else (error < 1e-9)


def test_advantages_by_hand_and_settings_that_do_not_fit():
    reward_KB = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.5, 1.0]])
    found = advantages(reward_KB, None, EstimatorConfig(samples=3, baseline="leave_one_out"))
    torch.testing.assert_close(found, torch.tensor([[0.75, -0.75], [-0.75, 0.0], [0.0, 0.75]]))
    greedy = advantages(reward_KB, torch.tensor([0.5, 1.0]), EstimatorConfig(samples=3))
    torch.testing.assert_close(greedy, reward_KB - torch.tensor([0.5, 1.0]))
    scaled = advantages(reward_KB, torch.tensor([0.5, 1.0]), EstimatorConfig(samples=3, normalise_advantage=True))
    torch.testing.assert_close(scaled, greedy / greedy.std())
    with pytest.raises(ValueError, match="got samples=1, wanted 2 or more"):
        EstimatorConfig(baseline="leave_one_out")


def test_the_self_critical_baseline_lowers_the_variance_here():
    world = Enumeration(0, "square", InterpreterConfig())
    score_N = world.scores().detach()
    probability_U, spread = world.probability(score_N), []
    for baseline in (0.0, float(world.greedy(score_N))):
        draws = [oracle.policy_gradient(score_N, k.tolist(), float(r) - baseline) for k, r in zip(world.keeps, world.reward_U, strict=True)]
        mean = sum(p * g for p, g in zip(probability_U, draws, strict=True))
        spread.append(float(sum(p * (g - mean).square().sum() for p, g in zip(probability_U, draws, strict=True))))
    assert spread[1] != spread[0]  # it does change each draw, and the mean not at all


def test_one_draw_is_equation_3_by_hand():
    score_N = torch.tensor([0.2, 0.7, 0.95], dtype=torch.float64, requires_grad=True)
    loss = policy_gradient_loss(log_probability(score_N, torch.tensor([True, False, True])).sum()[None], torch.tensor([0.4]).double())
    wanted = oracle.policy_gradient(score_N, [1, 0, 1], 0.4)
    assert torch.allclose(-torch.autograd.grad(loss, score_N)[0], wanted, rtol=1e-7)


def test_the_loss_is_a_mean_over_images_and_the_advantage_a_constant():
    log_p, advantage = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([0.5, -1.0], requires_grad=True)
    loss = policy_gradient_loss(log_p, advantage)
    loss.backward()
    assert float(loss) == pytest.approx(-(0.5 * -1 + -1 * -2) / 2)
    assert log_p.grad.tolist() == [-0.25, 0.5] and advantage.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_scores_stay_finite(dtype):
    score_T = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=dtype, requires_grad=True)
    log_p = log_probability(score_T, torch.tensor([True, False, False, True]))
    assert log_p.dtype == dtype and log_p.tolist() == [-100, -100, 0, 0]
    assert torch.isfinite(torch.autograd.grad(log_p.sum(), score_T)[0]).all()
    assert torch.isfinite(entropy(score_T)).all()


def test_entropy_is_in_nats():
    got = entropy(torch.tensor([0.5, 0.1]))
    assert torch.allclose(got, torch.distributions.Bernoulli(torch.tensor([0.5, 0.1])).entropy())
