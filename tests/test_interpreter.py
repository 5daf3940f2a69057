"""Eq. 1: folded equals unfolded, both policies, and where training starts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from families import FAMILIES
from iared2.errors import ConfigError
from iared2.interpreter import Interpreter, InterpreterConfig
from iared2.model import reduce
from packs import make_pack, rows_of

KEPT = [[0, 3, 4], [1], [2, 5, 6, 7, 8]]


def random_interpreter(config: InterpreterConfig, width: int = 8, heads: int = 2, seed: int = 0) -> Interpreter:
    torch.manual_seed(seed)
    interpreter = Interpreter(width, heads, config)
    with torch.no_grad():
        for value in interpreter.parameters():
            value.normal_(0, 0.7)
    return interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    policy=st.sampled_from(["learned", "class"]),
    norm=st.booleans(),
    scale=st.booleans(),
    heads=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99),
    ragged=st.booleans(),
)
def test_scores_are_equation_1(dtype, policy, norm, scale, heads, seed, ragged):
    interpreter = random_interpreter(InterpreterConfig(policy=policy, norm=norm, scale=scale), heads=heads, seed=seed).to(dtype)
    tokens = make_pack(KEPT if ragged else [[0, 3, 4], [1, 2, 5]], prefix=2, width=8, dtype=dtype, seed=seed)
    if not ragged:
        tokens = replace(tokens, layout=replace(tokens.layout, uniform=5))
    score_T = interpreter(tokens)
    assert score_T.shape == (len(tokens.x_TD),) and score_T.min() >= 0 and score_T.max() <= 1
    exact = random_interpreter(interpreter.config, heads=heads, seed=seed).double()
    x_TD = tokens.x_TD.double()
    for rows in rows_of(tokens.layout):
        if policy == "learned":
            policy_D = exact.policy_token
        else:  # the group's own class token, normalised like the patches
            own_D = x_TD[rows[0]]
            policy_D = (own_D - own_D.mean()) / (own_D.var(unbiased=False) + 1e-5).sqrt() if norm else own_D
        wanted = oracle.score(x_TD[rows], policy_D, exact.query, exact.key, heads, norm=norm, scale=scale)
        assert (score_T[rows].double() - wanted).abs().max() < (1e-6 if dtype == torch.float32 else 1e-12)


def test_folding_needs_one_weight_per_head_and_channel():
    interpreter = random_interpreter(InterpreterConfig())
    weight_HD, bias_H = interpreter.folded()
    assert weight_HD.shape == (2, 8) and bias_H.shape == (2,)
    assert interpreter.macs(10) == 10 * 8 * 2
    assert random_interpreter(InterpreterConfig(policy="class")).macs(10) == 10 * 8 * 2 + 2 * 8 * 8


@pytest.mark.parametrize("policy", ["learned", "class"])
@pytest.mark.parametrize("init_score", [0.1, 0.5, 0.9, 0.99])
def test_training_starts_at_the_initial_score(policy, init_score):
    torch.manual_seed(0)
    interpreter = Interpreter(192, 3, InterpreterConfig(policy=policy, init_score=init_score))
    tokens = make_pack([list(range(12))] * 20, prefix=1, width=192, dtype=torch.float32)
    score_T = interpreter(tokens)[tokens.layout.is_patch_T]
    assert float(score_T.mean()) == pytest.approx(init_score, abs=0.02)
    assert score_T.std() > 1e-4  # not all alike: there is something to learn from


def test_the_paper_starts_at_one_half_without_norm_and_scale():
    config = InterpreterConfig.paper()
    assert (config.norm, config.scale, config.init_score, config.policy) == (False, False, 0.5, "learned")
    interpreter = Interpreter(384, 6, config)
    score_T = interpreter(make_pack([list(range(12))] * 20, width=384, dtype=torch.float32))
    assert float(score_T.mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("policy", ["learned", "class"])
def test_gradient_reaches_every_parameter_and_is_that_of_equation_1(policy):
    interpreter = random_interpreter(InterpreterConfig(policy=policy)).double()
    tokens = make_pack(KEPT, prefix=1, width=8)
    names, values = zip(*interpreter.named_parameters(), strict=True)
    back = torch.randn(len(tokens.x_TD), dtype=torch.float64)
    got = torch.autograd.grad(interpreter(tokens), values, back)
    pieces = []
    for rows in rows_of(tokens.layout):
        own_D = torch.nn.functional.layer_norm(tokens.x_TD[rows[0]], (8,))
        policy_D = own_D if policy == "class" else interpreter.policy_token
        pieces.append(oracle.score(tokens.x_TD[rows], policy_D, interpreter.query, interpreter.key, 2, norm=True, scale=True))
    wanted = torch.autograd.grad(torch.cat(pieces), values, back)
    for name, g, w in zip(names, got, wanted, strict=True):
        assert torch.allclose(g, w, atol=1e-10), name
        assert g.abs().max() > 0, name


def test_half_precision_scores_stay_precise_at_the_threshold():
    interpreter = random_interpreter(InterpreterConfig()).bfloat16()
    score_T = interpreter(make_pack(KEPT, width=8, dtype=torch.bfloat16))
    assert score_T.dtype == torch.float32


def test_heads_must_divide_the_width_and_a_class_policy_needs_a_class_token():
    with pytest.raises(ConfigError, match="width 10 is not divisible by 3 heads"):
        Interpreter(10, 3, InterpreterConfig())
    with pytest.raises(ConfigError, match="needs a class token"):
        reduce(FAMILIES["siglip"].build(), 2, interpreter=InterpreterConfig(policy="class"))
    assert reduce(FAMILIES["deit"].build(), 2, interpreter=InterpreterConfig(heads=8)).reducers[0].interpreter.heads == 8


def test_the_class_policy_reads_the_class_token_of_its_own_image_and_group():
    model = reduce(FAMILIES["dinov2_reg"].build(), 2, interpreter=InterpreterConfig(policy="class"))
    images = FAMILIES["dinov2_reg"].images(4)
    _, together = model.trace(images)
    for index in range(4):
        _, alone = model.trace(images[index : index + 1])
        assert torch.allclose(alone.score_GBN[:, 0], together.score_GBN[:, index], atol=1e-6)


def test_folding_is_remembered_in_inference_and_follows_the_weights():
    interpreter = Interpreter(8, 2, InterpreterConfig()).eval()
    with torch.no_grad():
        first = interpreter._folded_once()
        assert interpreter._folded_once()[0] is first[0]
        interpreter.query.weight.mul_(2)
        torch.testing.assert_close(interpreter._folded_once()[0], 2 * first[0])
    assert interpreter._folded_once()[0].requires_grad
    interpreter.train()
    assert interpreter._kept is None


@pytest.mark.parametrize("name", ["deit", "dinov2_reg"])
def test_an_interpreter_can_start_as_the_class_attention_of_its_block(name):
    """Softmax over an image of its dot products is the attention that the class token pays to the patches there."""
    backbone = FAMILIES[name].build()
    for parameter in backbone.parameters():  # away from norms of one and biases of zero
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    model = reduce(backbone, (1,), interpreter=InterpreterConfig(policy="class", start="attention")).eval()
    images = FAMILIES[name].images(2)
    with torch.no_grad():
        tokens = model.walk(model.start(images), 1).tokens
        got = model.reducers[0].interpreter.logits(tokens).view(2, -1, model.adapter.heads)
        block = backbone.blocks[1]
        x = block.norm1(tokens.x_TD.view(2, tokens.layout.uniform, -1))
        q, k, _ = block.attn.qkv(x).unflatten(2, (3, model.adapter.heads, -1)).unbind(2)
        wanted = torch.einsum("bhk,bshk->bsh", q[:, 0], k) * block.attn.scale
    assert torch.allclose(got, wanted, atol=1e-4)


def test_starting_as_attention_needs_the_class_policy_and_a_plain_block():
    with pytest.raises(ConfigError, match=r"needs policy='class'.*got policy='learned'"):
        reduce(FAMILIES["deit"].build(), 2, interpreter=InterpreterConfig(start="attention"))
    with pytest.raises(ConfigError, match="block 0 has no plain attention to start from"):
        reduce(FAMILIES["parallel_things"].build(), 2, interpreter=InterpreterConfig(policy="class", start="attention"))


@pytest.mark.parametrize("policy", ["learned", "class"])
def test_scores_can_be_moved_to_a_wanted_share(policy):
    interpreter = random_interpreter(InterpreterConfig(policy=policy), width=32)
    tokens = make_pack([list(range(12))] * 30, prefix=1, width=32, dtype=torch.float32)
    for ratio in (0.25, 0.7):
        interpreter.shift_to(ratio, tokens)
        share = (interpreter(tokens)[tokens.layout.is_patch_T] > 0.5).float().mean()
        assert share.item() == pytest.approx(ratio, abs=0.15 if policy == "class" else 0.01)
