"""The specification of astarpo.py. Read the names; each test is a sentence that must stay true.

Properties (hypothesis) for the mathematics and the answer checker; tiny real models for the rest.
Run with `pytest`; two to three minutes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import dataclasses
import doctest
import functools
import importlib.util
import itertools
import json
import logging
import math
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import astarpo as A
from astarpo import extract_answer, is_equiv, normalize_answer, verify

DATA = Path(A.__file__).parent / "data"
torch.set_num_threads(1)
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


def quick(**changes: object) -> A.Config:
    """A Config small enough for a test."""
    small = {"steps": 2, "batch_size": 8, "train_limit": 8, "eval_limit": 16, "num_samples": 2}
    return A.Config(**{**small, "threads": 1, **changes})


@pytest.fixture(scope="session")
def base() -> A.Policy:
    """The shipped base model. Tests that train it take a copy."""
    return A.load_policy(A.Config(threads=1))


@pytest.fixture(scope="session")
def problems(base: A.Policy) -> list[A.Problem]:
    return A.load_problems(base, A.Config(eval_limit=24), "test")


@pytest.fixture(autouse=True)
def each_test(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs draw nothing, as that takes longer than all the rest, but where pictures are tested; and
    we silence other libraries for a while only."""
    if not {"drawn", "picture"} & set(request.node.name.split("_")):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    yield
    assert not logging.root.manager.disable


def copy_of(policy: A.Policy) -> A.Policy:
    """A policy of its own to be trained."""
    return dataclasses.replace(policy, model=copy.deepcopy(policy.model).requires_grad_(True))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """What is printed by a command that does its work."""
    capsys.readouterr()
    assert A.main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The sentence with which a command is refused."""
    capsys.readouterr()
    assert A.main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("astarpo: ") and len(error.splitlines()) == 1
    return error


def speaking(policy: A.Policy, template: str) -> A.Policy:
    """The policy with another chat template."""
    other = dataclasses.replace(policy, tokenizer=copy.deepcopy(policy.tokenizer), prompts={})
    other.tokenizer.chat_template = template
    return other


def played(policy: A.Policy, problems: Sequence[A.Problem], **options: Any) -> list[A.Dialogue]:
    """A dialogue about each problem, as in step 1; at temperature 1 unless an option says else."""
    config = A.Config(**{"temperature": 1.0, "max_new_tokens": 30, **options})
    return A.rollout(policy, [A.Dialogue(p, [*policy.prompt_ids(p)]) for p in problems], config, 1)


def test_the_examples_in_the_docstrings_hold():
    failures, ran = doctest.testmod(A)
    assert failures == 0 and ran >= 10


# --- Problems -------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 99))
def test_every_epoch_visits_every_problem_once(n, size, seed):
    problems = [A.Problem(i, "", "") for i in range(n)]
    steps = range(math.ceil(3 * n / size))
    visited = [p.index for step in steps for p in A.batch_of_step(problems, step, size, seed)]
    for epoch in range(3):
        assert sorted(visited[epoch * n : (epoch + 1) * n]) == list(range(n))


# --- V* -------------------------------------------------------------------------------------------

REWARDS = st.lists(st.floats(-3, 3), min_size=1, max_size=16)
BETA = st.floats(0.05, 20)


def v_star_of(rewards: list[float], beta1: float) -> float:
    return A.estimate_v_star(torch.tensor(rewards, dtype=torch.float64), beta1).item()


@given(REWARDS, BETA)
def test_v_star_lies_between_the_mean_and_the_maximum_and_tends_to_both(rewards, beta1):
    assert np.mean(rewards) - 1e-6 <= v_star_of(rewards, beta1) <= max(rewards) + 1e-6
    assert v_star_of(rewards, 1e-5) == pytest.approx(max(rewards), abs=1e-3)
    assert v_star_of(rewards, 1e6) == pytest.approx(np.mean(rewards), abs=1e-4)


@given(REWARDS, BETA, st.floats(-5, 5), st.randoms())
def test_v_star_moves_with_the_rewards_and_ignores_their_order(rewards, beta1, shift, random):
    moved = [reward + shift for reward in random.sample(rewards, len(rewards))]
    assert v_star_of(moved, beta1) == pytest.approx(v_star_of(rewards, beta1) + shift, abs=1e-6)


# --- The loss -------------------------------------------------------------------------------------

NUMBERS = st.lists(st.floats(-50, 50), min_size=4, max_size=4).map(torch.DoubleTensor)


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.floats(1e-3, 2))
def test_the_loss_is_the_squared_residual_and_0_where_equation_4_holds(
    logp, ref, reward, value, beta2
):
    residual = beta2 * (logp - ref) - (reward - value)
    loss = A.astarpo_loss(logp, ref, reward, value, beta2)
    assert loss.item() == pytest.approx(residual.square().mean().item())
    best = ref + (reward - value) / beta2
    assert A.astarpo_loss(best, ref, reward, value, beta2).item() == pytest.approx(0, abs=1e-12)


# The theory itself, on a policy so small that all its 12 responses can be listed.
REF = torch.linspace(-1.0, 1.5, 12, dtype=torch.float64).sin().log_softmax(-1)
REWARD = torch.tensor([0.0, 1, 0, 0, 2, 0, 1, 0, 0, -1, 0, 1], dtype=torch.float64)


def fit(weights: str, v_shift: float, beta: float = 0.7, steps: int = 1500) -> float:
    """Minimise the loss over all responses; how far is the result from equation (2)?

    weights "uniform": a fixed set of responses. "on-policy": each weighted by its probability
    under the present policy, without a gradient through that probability.
    """
    v_star = beta * (REF + REWARD / beta).logsumexp(-1)  # equation (3), all responses listed
    best = (REF + (REWARD - v_star) / beta).exp()
    assert best.sum().item() == pytest.approx(1)
    losses_of = torch.vmap(A.astarpo_loss, in_dims=(0, 0, 0, None, None))  # one a response
    theta = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
        logp = theta.log_softmax(-1)
        p = logp.detach().exp() if weights == "on-policy" else torch.full_like(logp, 1 / 12)
        optimizer.zero_grad()
        (losses_of(logp, REF, REWARD, v_star + v_shift, beta) * p).sum().backward()
        optimizer.step()
    return (theta.softmax(-1) - best).abs().max().item()


def test_on_policy_any_baseline_finds_the_optimum_off_policy_only_the_right_v():
    assert fit("on-policy", 0.0) < 1e-4 and fit("on-policy", 0.4) < 1e-4
    assert fit("uniform", 0.0) < 1e-4 and fit("uniform", 0.4) > 0.01


# --- Log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # this one with dropout
def test_the_first_log_ratio_is_zero_to_the_last_bit(kind, dtype):
    policy = dataclasses.replace(random_policy(kind), dtype=dtype)
    ref = A.freeze(policy)
    ids = torch.arange(60).reshape(2, 30) % 40
    assert torch.equal(*(A.token_logps(p, ids, ids > 5).detach() for p in (policy, ref)))
    inner = [m for m in ref.model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    assert all(layer.weight.dtype == dtype for layer in inner)  # half the memory
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in ref.model.parameters())


# --- Sampling -------------------------------------------------------------------------------------


def test_random_numbers_are_uniform_and_uncorrelated():
    u = A.uniform(0, np.arange(400)[:, None], np.arange(500))
    counts, _ = np.histogram(u, bins=100, range=(0, 1))
    assert ((counts - 2000) ** 2 / 2000).sum() < 150  # chi-square, 99 degrees of freedom
    for a, b in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01


LOGITS = st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=6, unique=True)


@given(LOGITS, st.sampled_from([0.5, 1.0, 2.0]), st.just(1.0) | st.floats(0.01, 1))
def test_tokens_are_drawn_with_their_probabilities(logits, temperature, top_p):
    """Within the smallest set of likeliest tokens that holds top_p, and nowhere else."""
    logits = torch.tensor([-math.inf, *logits, -math.inf])
    p = (logits.double() / temperature).softmax(-1)
    p[[bool(p[p > one].sum() >= top_p) for one in p]] = 0
    u = torch.linspace(0, 1 - 2**-32, 2001, dtype=torch.float64)
    tokens = A.pick(logits.expand(len(u), -1), u, temperature, top_p)
    seen = torch.bincount(tokens, minlength=len(p)) / len(u)
    assert torch.allclose(seen.double(), p / p.sum(), atol=2e-3) and not seen[p == 0].any()


GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
KINDS: dict[str, dict[str, Any]] = {
    **{kind: GROUPED for kind in ("llama", "gemma", "qwen3")},
    **{kind: {} for kind in ("gpt2", "phi", "falcon", "bloom")},  # bloom: no positions, but a slope
    "mistral": {**GROUPED, "sliding_window": 8},  # less than the prompts
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8, "num_layers": 2},
}
REFUSED: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "gemma2": {**GROUPED, "final_logit_softcapping": 2.0},
}


def random_policy(kind: str, **sizes: Any) -> A.Policy:
    """A random model of some architecture, whose words are not all equally likely, and no words to
    talk to it."""
    usual = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    usual |= {"num_attention_heads": 4, "initializer_range": 0.3}
    usual |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **usual | (KINDS | REFUSED)[kind] | sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    scaler = torch.amp.GradScaler(enabled=False)
    return A.Policy(model, None, (), torch.device("cpu"), torch.float32, scaler)


def by_definition(policy: A.Policy, ids: list[int], start: int, u: Any, t: float) -> list[int]:
    """What ids[start:] should be: a plain forward pass, without cache or padding, and then the
    first token up to which the probabilities sum to more than u; the likeliest one at t = 0."""
    logits = policy.model(torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1].detach()
    if t == 0:
        return logits.argmax(-1).tolist()
    p = (logits.double() / t).softmax(-1).numpy()
    return [int((np.cumsum(row) <= number).sum()) for row, number in zip(p, u)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sampled_in_a_batch_is_what_a_plain_forward_gives(kind, temperature):
    policy, config = random_policy(kind), A.Config(temperature=temperature)
    A.check_model(kind, policy)
    starts = ((5, 9), (8, 4), (8, 4), (12, 15), (5, 9), (8, 4))  # ragged, and some are equal
    prompts = [[*range(first, first + n)] for first, n in starts]
    u = A.uniform(3, np.arange(len(prompts))[:, None], np.arange(30))
    endless = A.sample(policy, prompts, u, config)
    assert {*map(len, endless)} == {30}
    policy.end_ids = (0, endless[1][3])  # so that some end early and leave
    pasts, lengths = [()] * len(prompts), set()
    for _ in range(3):  # the second and third turn go on with what the cache has
        responses = A.sample(policy, prompts, u, config, pasts)
        lengths |= {*map(len, responses)}
        for prompt, response, numbers in zip(prompts, responses, u):
            ids = prompt + response
            assert response == by_definition(policy, ids, len(prompt), numbers, temperature)
            assert not {*response[:-1]} & {*policy.end_ids}
            assert len(response) == 30 or response[-1] in policy.end_ids
        prompts = [p + r + [7, 3][len(r) % 2 :] for p, r in zip(prompts, responses)]  # ragged
    assert len(lengths) > 1


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_with_another_memory_or_a_soft_cap_is_refused_in_one_sentence(kind):
    with pytest.raises(A.UsageError, match=f"^--model {kind} cannot be sampled here: .*$"):
        A.check_model(kind, random_policy(kind))


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (1.0, 1e-6)])
def test_each_turn_of_a_dialogue_is_what_a_plain_forward_gives(base, problems, temperature, top_p):
    options = {"temperature": temperature, "top_p": top_p, "seed": 4}
    for d in played(base, problems, **options):
        for k, turn in enumerate(d.turns):
            u = A.uniform(4, 1, d.problem.index, 0, k, np.arange(30))
            greedily = temperature * (top_p == 1)  # the likeliest token alone is the greedy choice
            expected = by_definition(base, d.ids[: turn.end], turn.start, u, greedily)
            assert expected == d.ids[turn.start : turn.end]


@pytest.fixture
def shapes(base) -> Iterator[list[tuple[int, int]]]:
    """The (rows, width) that the base reads at a time."""
    seen: list[tuple[int, int]] = []
    hook = base.model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    yield seen
    hook.remove()


def test_a_dialogue_depends_neither_on_the_batches_nor_on_its_company(base, problems, shapes):
    wide = played(base, problems, rollout_tokens=10**6)
    first, *later = [width for _, width in shapes if width > 1]
    assert len(later) == 2 and max(later) < first  # one batch a turn: only requests are read
    shapes.clear()
    narrow = played(base, problems, rollout_tokens=400)
    assert all(rows * (width + 30) <= 400 for rows, width in shapes if width > 1)
    alone = [played(base, [problem])[0] for problem in problems[::5]]
    assert [d.ids for d in wide] == [d.ids for d in narrow]
    assert [d.ids for d in wide[::5]] == [d.ids for d in alone]


def test_a_prompt_is_read_once_for_all_its_samples_and_who_has_ended_leaves(base, problems, shapes):
    wanted = [A.Dialogue(p, [*base.prompt_ids(p)], i) for p in problems for i in range(5)]
    dialogues = A.rollout(base, wanted, A.Config(temperature=1.0, revisions=0), 1)
    assert shapes[0][0] == len({p.problem for p in problems})
    for place, (rows, width) in enumerate(shapes[1:], start=1):
        going = sum(len(d.ids) - d.turns[0].start > place for d in dialogues)
        assert width == 1 and going <= rows < 2 * going
    assert len({tuple(d.ids) for d in dialogues}) > len(problems)  # the samples differ


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_has_been_read_is_kept_in_the_dtype_that_is_computed_in(base, dtype):
    policy, cache = dataclasses.replace(base, dtype=dtype), A.Cache(config=base.model.config)
    with policy.active():
        A.read(policy.model, torch.tensor([[5, 6], [8, 9]]), torch.ones(2, 2).long(), cache)
    assert {kept.dtype for layer in cache.layers for kept in (layer.keys, layer.values)} == {dtype}
    policy, seen = dataclasses.replace(copy_of(base), dtype=dtype), []
    policy.model.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    A.sample(policy, [[5, 6]], np.zeros((1, 3)), A.Config(temperature=1.0))
    assert seen and not any(seen)  # no graph is built: it would fill a GPU


# --- Answers --------------------------------------------------------------------------------------

# ' | ' parts the answers of a group, ' ;; ' parts groups. Here the first answer of a group means the
# same as each of the others, ...
SAME = {
    "labels, equations and inequalities": r"""
(-\infty,\infty) | \mathbb{R} | x \in \mathbb R | (-\infty,+\infty) ;; x \neq -8 | -8 \ne x ;; x^3+6x | p(x) = x^3+6x | p(x) = x(x^2+6) ;; P(A) = \frac12 | 0.5 | P(A) = 1/2 ;; 45^\circ | \angle ABC =
45^\circ | 45 ;; -3<x\leq 4 | (-3,4] | 4 \ge x > -3 ;; x = 5 | 5 | 5 = x | x=5.0 | x =
\frac{10}{2} ;; y = 2x+3 | y=3+2x | 2x + 3 = y | 2x-y+3=0 ;; x+2y=3 | 3 = x + 2y | x = 3 - 2y ;; x_1 = 5 | 5 | x_{1} =
5 ;; (x,y) = (1,2) | (1,2) | \left( 1, 2 \right) | \bigl(1,\;2\bigr) ;; (1,2) | 1 < x < 2 | x \in (1,2) | 2 > x > 1 ;;
x > 3 | (3,\infty) | 3 < x | (3,+\infty) | x \in (3, \infty) ;; x \le 4 | (-\infty, 4] | 4 \ge x | x ≤ 4 ;; 1 \le x < 2
| [1,2) | 2 > x \geq 1 | \left[1,2\right) ;; (2,12) \cup (12,102) | (12,102)\cup(2,12) ;; (\frac12, -3) | (0.5,-3) |
\left(\tfrac{1}{2},-3\right) ;; AB=9, CD=4 | CD=4, AB=9 ;; x != 4 | x \neq 4 ;; -x > -1 | x < 1 ;; 4x+2y=10 | 2x+y=5 ;;
-x+y=1 | y=x+1 | 2y=2x+2 ;; m+n = 113 | 113 ;; p+q+r=5 | 5 ;; |AB| = 5 | 5 ;; AB=4, CD=5 | CD=5, AB=4 | AB=4 and CD=5
;; A(x)=x^2+1 | 1+x^2 ;; a_n = 2^n | 2^n ;; \color{red}{5} | 5 | \textcolor{red}{5} | {\color{blue}5} | \mathsf{5} ;;
\frac{\sqrt3}{3} \approx 0.577 | \frac{1}{\sqrt3} ;; x = \sqrt2 \approx 1.41 | \sqrt2 ;; x=2 or x=3 | 2,3 | 2 or 3 |
\{2,3\} ;; (-\infty,-\sqrt2)\cup(\sqrt2,\infty) | x<-\sqrt2 or x>\sqrt2
""",
    "words and units": r"""
\begin{pmatrix}1\\2\end{pmatrix} | \mathbf{v} = \begin{pmatrix}1\\2\end{pmatrix} ;; 36 | 36\text{ points} | 36 \text{
hrs} | 36 \text{ mL} | 36 \text{ children} ;; \text{A, C} | A and C ;; 60 | 60\text{ rad} | 60\text{ km/h} ;; 18 |
18^\circ\text{C} | 18°C | 18^{\circ}\text{ F} ;; 42 | 42. | $42$ | \(42\) |
42.0 ;; 10 | 10\% | 10\text{ units} | 10^\circ | 10^{\circ} ;; 34 | 34\text{ sq. units} | 34\text{ cm}^{2} ;; x<1 or
x>2 | (-\infty,1)\cup(2,\infty) | x > 2 \text{ or } x < 1 ;; 1,2 | 2,1 | 1 and 2 | 1 \text{ and } 2 | \{1,2\} ;; 2, 3,
\text{ and } 4 | 2,3,4 | 4, 3 and 2 | \{2,3,4\} ;; -2 \text{ or } -12 | -2, -12 ;; 1 \pm \sqrt{19} | 1+\sqrt{19},
1-\sqrt{19} | 1\mp\sqrt{19} ;; \pm 2 | 2,-2 | -2, 2 | x = \pm 2 ;; (-4, 27);(2, 15) | (2,15), (-4,27) | (2,15) and
(-4,27) ;; \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{bmatrix}1&2\\3&4\end{bmatrix} | \begin{pmatrix} 1 &
4/2 \\ 3 & 4 \end{pmatrix} ;; \begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix} | \begin{pmatrix} -\frac13 \\ \frac{2}{3}
\end{pmatrix} ;; \text{Monday} | Monday | monday | \mbox{Monday} | \textbf{monday} ;; (B) | B | \text{B} | \text{(B)} |
(\text{B}) ;; \text{yes} | Yes | YES ;; \text{A, D, F} | A,D,F | D, A, F ;; \text{two lines} | two lines | Two lines ;;
\text{October 30} | October 30 ;; \frac{270}7\text{ degrees} | \frac{270}{7} | 270/7 ;; 2pqrs | 2 \cdot p q r s ;;
\frac13 ml^2 | \frac{ml^2}{3} ;; 5 cm | 5 | 5\text{ cm} | 5 \text{ centimeters} | 5\,\mathrm{cm} ;; x >= 3 | x \ge 3 |
[3,\infty) ;; 28 pct | 28 | 28\% | 28 percent | 28 percentage ;; \$5 | 5 dollars | 5 ;; 5 \text{ sq. cm} | 5 \text{
square centimeters} ;; 60 \text{ miles per hour} | 60 mi/h | 60 ;; 2\pi\text{ radians} | 2\pi ;; 90^\circ | 90 | 90
degrees | 90 \text{ degrees} ;; 2x \ge 4 | x \ge 2 ;; “42” | 42 ;; "42" | 42 ;; 1‑2 | -1 ;; \{1,2,3\} | 3,2,1 ;; x^{1/2} | \sqrt x ;; e^{i\pi/2} | i ;; 1\frac12 | 1.5 | 3/2
""",
    "numbers": r"""
31,250 | 31{,}250 | 31250 ;; 42 | 42\\ | \ 42\ ;; 12\ 345 | 12,345 | 12\;345 ;; 3 | \log_{2}8 | \log_2 8 | \log_{2}{8}
;; 10000 | 10,000 | 10{,}000 | 10\,000 | 10,\!000 ;; 1008016 | 1,008,016 | 1{,}008{,}016 | 1,\!008,\!016 ;; 0.5 | .5 |
0.50 | 1/2 | \frac12 ;; -\frac{1}{2} | \frac{-1}{2} | \frac{1}{-2} | -0.5 | −1/2 ;; 57\frac{5}{6} | \frac{347}{6} |
347/6 | 57 5/6 | 57\frac56 ;; 57\frac{4}{6} | \frac{346}{6} | \frac{173}{3} | 57\frac{2}{3} ;; -15\frac{3}{5} | -15.6 |
-\frac{78}{5} ;;  3
\times 10^{5} | 300000 | 300,000 | 3\cdot10^5 | 3e5 ;; \sqrt{12} | 2\sqrt{3} | 2\sqrt3 | \sqrt3 \cdot 2 | 2√3 ;;
\sqrt{2}\sqrt{3} | \sqrt{6} ;; \sqrt[3]{8} | 2 | \sqrt4 | \log_2 4 | \sqrt{2}\cdot\sqrt{2} ;;
\frac{1+\sqrt5}{2} | \frac{2}{\sqrt{5}-1} | \frac12+\frac{\sqrt{5}}{2} ;; \frac{\sqrt[3]{4}}{6} |
\frac{1}{3\sqrt[3]{2}} | \frac{4^{1/3}}{6} ;; 2\pi | \pi \cdot 2 | 2π | 2 pi | \frac{4\pi}{2} ;; \frac{9}{4}\pi |
\frac{9\pi}{4} | 2.25\pi ;; 1+\cos\pi | 0 | \sqrt2\sqrt2-2 ;; e^{i\pi} | -1 | i^2 | \cos\pi ;; e^2 | e \cdot e ;; \ln 8
| 3\ln 2 | \ln(8) | 3 \ln{2} ;; \log 100 | 2 ;; \tan 15^\circ | 2-\sqrt3 | \tan\frac{\pi}{12} ;; 6+9i | 9i+6 | 3(2+3i)
;; \frac{1}{1+i} | \frac{1-i}{2} | \frac12-\frac{i}{2} ;; \sqrt{-4} | 2i ;; 2^{4950} | 2^{ 4950} ;; 2^{125} | 4^{62} \cdot 2 ;;
-37_8 | -37_{8} ;; 3:5 | 3 : 5 ;; 2007 + \frac\pi 2 | 2007+\pi/2 ;; 1\frac{4}{5} | 9/5 | 1.8 | 1 4/5
""",
    "formulas, rows, sets and lists": r"""
x^{10} | x^10 ;; \frac{d}{2} | d/2 ;; x_{1}y | x_1 y | yx_1 ;; \frac{\sqrt2}{2} | \frac{1}{\sqrt{2}} | \sqrt{0.5} |
\sqrt{\frac12} | 2^{-1/2} ;; x^2 + 7x + 10 | (x+2)(x+5) | (x+5)(x+2) ;; \frac{x+5}{6} | \frac{x}{6}+\frac56 | (x+5)/6
;; 10x\sqrt{21x} | \sqrt{21x}\cdot 10x ;; \sqrt{a^2+b^2} | \sqrt{b^2+a^2} ;; 30p\sqrt{p} | 30 p^{3/2} ;;
\sin^2 x | 1-\cos^2 x | (\sin x)^2 | \sin(x)\sin(x) ;; 2\sin b\cos a | 2\cos a\sin b | \sin(a+b)-\sin(a-b) ;; 2^{n-1} |
\frac{2^n}{2} | \frac12\cdot 2^n ;; 3^x - 2^x | -2^x+3^x ;; xy | yx | x y | x \cdot y ;; x_1+x_2 | x_2 + x_{1} ;; f(4 -
x) | f(4-x) ;; \sin(\pi/6) | 1/2 ;; \exp(2) | e^2 | \exp 2 ;; \arcsin(1/2) | \pi/6 ;; \arccos 0 | \pi/2 ;; \arctan 1 |
\pi/4 ;; |x| | \sqrt{x^2} | |-x| ;; |x-1| | |1-x| ;; 2|x| | |2x| ;; \sin^2 x+\cos^2x | 1 ;;
-\frac{\pi}{2} < x < \frac\pi2 | (-\pi/2,\pi/2) ;; (-1)^{n+1} | -(-1)^n | (-1)^{n+3} ;; (x+1)^2 | x^2+2x+1 | 1+2x+x^2 |
(1+x)(x+1) | x(x+2)+1 ;; 1, 250 | 250, 1 | \{1,250\} ;; \emptyset | \varnothing | ∅ ;; \infty | +\infty | ∞ ;;
2x=10 | x=5
""",
}


# ... and here it means something else.
DIFFERENT = {
    "words": r"""
\text{A, C} | A or C ;; \text{Alice and Bob} | \text{Alice or Bob} ;; yes | yes or no ;; 42 | 42 or | or 42 | 42 and ;;
\text{A} | a ;; \text{m} | M ;; 3 | 3 point 5 | 3\text{ point }5 ;; 5 | 5\text{ out of }6 | 5\text{ of }6 | 5 million |
5 or more | 5 eighths | 5 \text{ millions} | 5 \text{ million dollars} | 5 \text{ thousand people} | 5 \text{ half
hours} | 5 \text{ elevenths} | 5 \text{ to 6 units} | 5 \text{ guess} | 5 quarters | \text{more than } 5 | not 5 | 5 or
6 | either 5 or 6 | 5 \text{ or maybe } 6 ;; 5\text{ January} | 5 ;; \text{2020-01-02} | 2017 ;; \$1.5\text{M} | 1.5 ;;
5\text{ M} | 5 ;; 10:15 AM | 10:15 PM | 10:15 ;; \left|\begin{array}{cc}1&2\\3&4\end{array}\right| |
\begin{pmatrix}1&2\\3&4\end{pmatrix} ;; (\begin{array}{c}1\\2\end{array}) | (1,2) ;; (1,2) |
\begin{pmatrix}1\\2\end{pmatrix} ;; or | \emptyset ;; \text{} | \mbox{ } ;; and | \{\} ;; \text{two lines} | \text{two
circles} ;; x > 2 and x < 1 | (-\infty,1)\cup(2,\infty) ;; 10\% | 0.1 | 1 ;; 8:34 p.m. | 8:34 a.m. ;; CBAD | ABCD ;;
\text{Monday} | \text{Tuesday} ;; \text{yes} | \text{no} ;; \text{no} | on ;; even | odd ;; \text{east} | \text{seat}
;; listen | silent ;; \text{all real numbers} | \text{all integers} ;; any numbers | any values ;; a square | a foot ;;
5 feet 3 inches | 5 | 5 feet ;; \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 3 \\ 2 & 4
\end{pmatrix} | 1,2,3,4 ;; \begin{pmatrix} 1 & 2 \end{pmatrix} | \begin{pmatrix} 1 \\ 2 \end{pmatrix} ;; \triangle ABC
| ABC ;; 5%5 | 55 ;; \text{A5}_{11} | \text{A6}_{11} ;; October 30 | October 3 ;; salt | last ;; was | saw ;; tea | eat
;; on | no ;; dog | god ;; cat | act ;; abc | cab ;; stop | pots ;; \text{pqr} | \text{rqp} ;; A: 5, B: 6 | A | 5 | 6
;; (A) 5 (B) 6 | A | 5 ;; A plus (B) 6 | A | 6 ;; 5 \text{ MW} | 5 \text{ mW} ;; 2m | 2 \text{ m} ;; proof | proof ;;
notfound | notfound ;; 7:32 | 32:7 | 7,32 ;; 1 000 | 1 | 1, 000 ;; 1 000 1 | 10001 | 1000 ;; 14 {, }916 | 14, 916 ;;
(1,2,3) | 3,2,1 | \{1,2,3\} | [1,2,3] ;; \sqrt{10^{80}+1} | 10^{40} ;; x^{100000} | x^{100001} ;; 5+- | 5 ;; \text{not
} 42 | 42 ;; \text{about } 42 | 42 ;; 42 \text{ or more} | 42 ;; at least 42 | 42 ;; \{1,2\} | [1,2] ;; [3] | 3 ;;
{1,2} | (1,2) ;; 3.14 | \pi ;; 1e3 | 13 ;; i | \sqrt{1} ;; 1{2} | 2 | 1 \cdot 2 ;; {1}2 | 2 | 1 ;; 1{2}3 | 6 ;; x{2} |
2x ;; \frac\pi 23 | \frac{\pi}{23} ;; \frac12 3 | \frac{1}{23} ;; \textbf{(C) }42 | B | 41 | \textbf{(D) }42 ;; (A) or
(B) | A | B ;; (A)+5 | A | 5 ;; (A) \text{ and } (B) | A | B ;; A: B | A | B
""",
    "formulas": r"""
\frac{y}{x} | \frac{dy}{dx} ;; x | \frac{d}{dx}(x^2) | y | X ;; \mathbb{R} | \mathbb{R}^2 | \mathbb{R}^+ | \mathbb{Q}
;; 5 | 5R2 ;; x_{1}0 | x_{10} ;; \sin 30^\circ C | \sin 30^\circ ;; \log_2 1/2 | -1 ;; 1E999999999 | 1E999999998 ;; 2x
| 2y ;; x^2 | 2x | x^3 ;; x+1 | x-1 ;; \sqrt{x^2} | x ;; a\sqrt{b} | \sqrt{a^2b} ;; \ln(x^2) | 2\ln x ;; \sqrt{x^2+y^2}
| x+y ;; \frac{1}{a+b} | \frac1a+\frac1b ;; \sin 2x | 2\sin x ;; \sin^{-1} x | \frac{1}{\sin x} ;; \sin x | \cos x ;;
\tan 15 | \tan 15^\circ ;; \log 2 | \ln 2 ;; f(2x) | 2f(x) ;; f(x) | g(x) ;; 1/2x | \frac{1}{2x} | \frac{x}{2} ;; B | b
| C ;; A,B | A,C ;; \int X dx | \int x dx ;; x2 | x^2 ;; \frac{1}{x} | x ;; -x | x ;; x^{-1} | x ;; x-y | y-x ;; \sin x
\cos y | \sin y \cos x ;; \exp(2) | 2e | \exp(3) ;; \arcsin(1/2) | \arccos(1/2) ;; \arctan 1 | \tan 1 | 45 ;; \tan^{-1}
1 | \frac{1}{\tan 1} ;; |x| | x | -x ;; |x-1| | |1+x| ;; |-5| | -5 ;; \lg 2 | \ln 2 ;; e^{-1000} | 0 | e^{-1001} ;;
10^{-200}\sqrt2 | 0 ;; \sin(10^{-50}) | 10^{-50} ;; x+1 | |x+1| ;; 2^{-x} | -2^x | 2^x ;; \log_2 3 | \log_3 2 | \log 3
;; \ln x^2 | (\ln x)^2 ;; \sin x^2 | \sin^2 x ;; x^2\frac12 | x^{5/2} ;; x^{50}+1 | x^{50}+2 ;; a+bi | a-bi
""",
    "labels, equations and inequalities": r"""
x \ne 5 | x \ne 6 | y \ne 5 | (-\infty,5]\cup(5,\infty) ;; f(x) = 2x | g(x) = 2x | y = 2x | 2t ;; \angle A = 45 |
\angle B = 45 ;; (x,y) = (1,2) | (a,b) = (1,2) | (y,x) = (1,2) | (x,y)=(2,1) ;; x=5\in\{6,7\} | 5 ;; x+y=3\ne4 |
x+y=3\ne5 ;; -3<x\le4 | [-3,4) ;; x = 5 | y = 5 | x = 6 | x > 5 ;; (1,2) | (y,x) = (1,2) ;; x > 3 | y > 3 | x \ge 3 | x
< 3 ;; x < 3 | (3,-\infty) ;; 1 < x < 2 | 1 < x \le 2 ;; (1,2)\cup(3,4) | (1,2),(3,4) | (1,4) ;; (-\infty,3) \cup
(3,\infty) | (-\infty,\infty) ;; y = 2x+3 | y = 2x-3 | x = 2y+3 ;; x+y=0 | x-y=0 ;; x^2=4 | x=2 ;; 5 = 7 | 7 ;; 2=2 |
3=3 ;; x = 1, y = 2 | x = 2, y = 1 | 2, 1 ;; 7 | x = 7y ;; x=5 | x \neq 5 ;; x+y=3 | 3 ;; x^2+y^2=25 | 25 ;; x^2 = 4 |
4 ;; |x| = 5 | 5 ;; 2x = 10 | 5 | 10 ;; x+1=5 | 5 ;; 4x+2y=10 | 2x+y=10 | 2x+2y=5 ;; x^2/16+y^2/12=1/4 | x^2/4+y^2/3=4
;; xy=1 | 2xy=1 ;; x=0 | x^2=0 ;; 0=0 | x=x ;; x^2+1=0 | x^2+2=0 ;; -x > -1 | x > 1 | x \le 1 ;; -x>1 | x > -1 | x<1 ;;
2x<4 | x<4 | x>2 ;; x >= 3 | x > 3 ;; x <= 3 | x >= 3 | x < 3 ;; x != 3 | x = 3 | 3 ;; m+n = 113 | 131 | m-n=113 |
m+n=114 ;; |AB| = 5 | |AC| = 5 | -5 ;; \text{Area} = 42 | \text{Perimeter} = 42 | 24 ;; AB=4, CD=5 | AB=5, CD=4 | 5, 4
;; A(x)=x^2 | A(x)=x^3 | B(x)=x^2 ;; a_n = 2^n | b_n=2^n | 2^{n+1} ;; S_1 : S_2 = 7:32 | 32:7 | 7/32 ;; 2x \text{ for }
x>0 | 2x ;; \sqrt3 \approx 1.7 | 1.7 | \sqrt2 ;; 42 \text{ approximately} | 42 ;; x=2,3 | y=2,3 ;; f^{-1}(x) = x+1 |
f(x)=x+1 ;; f'(x)=2x | f(x)=2x ;; [0,1] \cup [1,2] | [0,2) | [0,1]\cup[2,3] | [0,1) \cup (1,2] ;; [0,1) \cup (1,2] |
[0,2] ;; x<1 or x>2 | y<1 or y>2 | x<1 or x>=2 | x<1, x>2 ;; x<1 or x<2 | x<1 ;; 5 \text{ left} | 5 ;; 1<x<2<3 | 1<x<2 | 2<x<3 ;; +(1,2) | (1,2)
""",
    "rows, sets and lists": r"""
1,250(x+1) | 1(x+1) ;; (-1)^{n} | -1 | 1 ;; 0\infty | 0 ;; \infty-\infty | 0 ;; \frac{\infty}{\infty} | 1 ;;
(1+\sqrt2)^{90} | 2811662492084286464914018279809602 ;; (100000!)! | 1 ;; 1,2 | 12 | 1 ;; 31,250 | 31, 250 | 31.250 ;;
1,23 | 123 ;; 12,345,67 | 1234567 ;; (31,250) | 31250 | (31250) ;; (1,2) | (2,1) | [1,2] | (1,2] ;; [1,2] | 1,2 ;;
[1,2) | (1,2] ;; \{1,2\} | \{1,3\} | \{1\} ;; \{5\} | 5 ;; 1,2,3 | 1,2 ;; 1,1,2 | 1,2,2 ;; (\pm 1, \pm 2) | (1,2),
(-1,-2) ;; \pm 1 \pm 2 | 3, -3 ;; (x+1)^2 | x^2+1 ;; 1 \pm \sqrt{19} | 1+\sqrt{19} | 1 \pm \sqrt{17} ;; \pm 2 | 2 ;;
\infty | -\infty | 1 ;; (B) | (C) ;; \sqrt{8}, 1e-300 | 2\sqrt{2}, 2e-300 ;; [0,\pi] | [0,3.14159265] ;; 1,000 | 1 ;;
0,123 | 123 ;; x=1,y=4; x=3,y=2 | x=1,y=2; x=3,y=4 ;; x=1,y=4 \text{ or } x=3,y=2 | x=1,y=2 \text{ or } x=3,y=4 ;; x=1
and y=4 or x=3 and y=2 | x=1 and y=2 or x=3 and y=4 ;; x=1,y=4,x=3,y=2 | x=1,y=2,x=3,y=4 ;; (1,4);(3,2) | (1,2);(3,4)
;; a=1, b=2 or a=2, b=1 | a=1, b=1 or a=2, b=2 ;; x_1 = 2, x_2 = 3 | x_1 = 3, x_2 = 2 | 2, 3 ;; 1,2;3 | 1,2,3 ;; x=5 or
y=5 | x=5, y=5 ;; 1, 2, \ldots, 10 | 1,2,10 ;; 3 \text{ hours}, 20 | 20 \text{ hours}, 3 ;; \sqrt{(x+5)^2} | x+5 ;;
|x+500| | x+500 ;; |zw| | zw ;; |pqrs| | pqrs ;; \sqrt[3]23 | \sqrt[3]{23} ;; \sqrt{x-100} | \sqrt{x-101} ;; \ln x | \ln|x| ;; (1,5;2) | (1.5,2) ;; 3 \text{ lb } 4
\text{ oz} | 3 | 7 ;; \text{ab} | \text{ba} ;; 2 \cdot \frac13 | 2\frac13 ;; \$5 \text{ million} | \$5
""",
    "numbers": r"""
5 | 5+ | 5- | 3 \times 5 | 5:6 | 5 \& 6 | 5,6 | 5i | ,5 | 5? | 5! ;; \overline{AB} | AB ;; \sqrt{10}+\sqrt{11} |
\sqrt{5}+\sqrt{18} ;; 2020-01-02 | 2017 | 2020-02-01 ;; 2\ 100/700 | 3 ;; 10 000/3 | 10 ;; 10\ 000/3 | 10 ;; 42 | 43 |
-42 | 420 | 4.2 | 42.0000000000000000000000000001 ;; 1/3 | 0.33 | 0.333333333333333333 ;; 2/3 | 0.67 ;; 0.\overline{3}
| 0.3 ;; 0.333... | 0.333 ;; \sqrt{2} | 1.41 | 1.4142135623730951 |
1.41421356237309504880168872420969807856967187537694807317667973799073247846210703885038753432764157 ;; \pi | 3.14159 |
3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798 | 22/7 ;; e |
2.718281828459045 ;; \sqrt{2}+10^{-40} | \sqrt{2} ;; \sqrt{2}+10^{-500} | \sqrt{2} ;; 10^{-500}\sqrt{2} |
10^{-500}\sqrt{3} ;; e^{\pi\sqrt{163}} | 262537412640768744 ;; \sqrt{2}+\sqrt{3} | \sqrt{5} | \pi ;; \sqrt{12} |
3\sqrt{2} ;; 2^{3^4} | 8^4 ;; 9^{9^{9^9}} | 9^{9^{9^8}} ;; 1 2 | 12 | 2 ;; 2^3^2 | 64 ;; 204_5 | 204_6 | 204 | 54 ;;
2_3 | 23 ;; 57\frac{5}{6} | \frac{285}{6} | 57 | \frac{5}{6} ;; 2\frac{7}{3} | \frac{14}{3} | \frac{13}{3} ;;
\frac{1}{2} | \frac{2}{1} ;; \frac12 | 12 ;; 3:5 | 3/5 | 5:3 | 35 ;; 9:24 | 3:8 ;; 5.2 pm | 52 pm ;; 3+4i | 3-4i ;; i |
-i | 1 ;; 0.5 | ,5 ;; \sqrt{23} | \sqrt23 ;; 1 | 1/0 ;; \sqrt{2}-\sqrt{2}+1e-300 | 0 ;; 1/(\sqrt2\sqrt2-2) | 5 ;; 0 |
1/0 | 0/0 ;; 1/0 | 2/0 ;; 0^0 | 1/0 ;; \clubsuit | \spadesuit ;; $5$$5$ | 55 ;; 3.4.5 | 3.45 ;; 1-2 | 12 | 1,2 ;; --5 |
-5 ;; 2(3) | 23 ;; \frac{0}{5} | 5 ;; -0 | 5 ;; 10 | 10^2 ;; 10^{10} | 1010 ;; 12^{1/7} | \frac{12}{7} ;; AE | ae ;;
66.(3) | 198 | 66.3 | 663/10 ;; 0.1(6) | 0.6 | 0.16 ;; 0.5(3) | 1.5 ;; 10^{50}+1 | 10^{50} ;; 10^{-200}+1 | 1 ;;
\sqrt{10^{39}+1} | \sqrt{10^{39}} ;; \frac{1}{3^{80}} | \frac{1}{3^{80}+1} ;; \frac{1}23 | \frac{1}{23} ;; \frac12\frac34
| \frac{12.75}{2} ;; \sqrt2\frac12 | \sqrt{2.5}
""",
    "units, and letters that are none": r"""
8 adults and 12 children | 12 adults and 8 children ;; 30 hours, 5 minutes | 5 hours, 30 minutes | 5, 30 | 30, 5 ;; 5
feet, 3 inches | 3 feet, 5 inches | 3, 5 ;; 2pqrs | 2 ;; \frac13 ml^2 | \frac13 ;; 2km | 2 ;; -2lb | -2 ;; 5cm | 5 ;;
3ft | 3 ;; 4g | 4 ;; 5 \text{ crores} | 5 ;; 3 lakhs | 3 ;; 4 trios | 4 ;; 4 pairs | 4 ;; 5 dozen | 5 ;; 3 score | 3 ;;
7 hundreds | 7 ;; 2 \text{ gross} | 2 ;; 3 couples | 3 ;; 5 cm | 5 m ;; 5 cm^2 | 5 cm ;; 5
\text{ m/s} | 5 \text{ m} ;; 10\% | 10^\circ ;; \$10 | 10\% ;; €5 | \$5 ;; 2 weeks | 2 days ;; 3\text{ inches} | 3
\text{ feet} ;; 5\% | 0.05 | 5 \text{ cm} ;; 5 \text{ million} | 5 \text{ billion} | 5 ;; 12th | 12 ;; 2 m | 2 ;; 5
\text{ apples and } 3 \text{ dogs} | 3 \text{ apples and } 5 \text{ dogs} ;; 50 cents | 50 dollars
""",
    "forms that we leave out, an honest False": r"""
2 | x = 1+1 = 2 | 1+1 = 2 ;; 120 | 5! | \binom{10}{3} ;; (4,\infty) | \{x \mid x > 4\} ;; x=1,y=2; x=3,y=4 | x=3,y=4;
x=1,y=2 ;; \arctan 1 | \tan^{-1} 1 ;; 1000 | 1 000 ;; 12 | 12^{\mathrm{th}} ;; 10:15 AM | 10:15 \text{ a.m.} ;; x \ne 0
| \mathbb R \setminus \{0\} ;; E | E: the fifth option ;; 42 | C. 42 ;; [0,2] | [0,1] \cup [1,2] ;; 2^{4950} | 4^{2475} ;; -2 |
\sqrt[3]{-8} ;; C | \textbf{(C) }42 ;; (1,2,3) | 1,2,3 ;; 1/3 | 0.\overline{3} | 0.(3) ;; 30\sqrt{p^3} | 30p\sqrt{p}
;; \begin{pmatrix}1\\3\end{pmatrix} | \left[\begin{array}{c}1\\3\end{array}\right]
""",
}


def groups(table: str) -> list[list[str]]:
    """Cut a table into its groups."""
    return [group.split(" | ") for group in " ".join(table.split("\n")).strip().split(" ;; ")]


def pairs(table: str) -> list[tuple[str, str]]:
    """Make pairs of the first answer of a group and each of the others, both ways round."""
    found = [(a, b) for a, *others in groups(table) for b in others]
    return found + [(b, a) for a, b in found]


@pytest.mark.parametrize("kind", SAME)
def test_answers_that_mean_the_same(kind: str) -> None:
    assert [pair for pair in pairs(SAME[kind]) if not is_equiv(*pair)] == []


@pytest.mark.parametrize("kind", DIFFERENT)
def test_answers_that_differ(kind: str) -> None:
    assert [pair for pair in pairs(DIFFERENT[kind]) if is_equiv(*pair)] == []


def test_proofs_and_nothing_equal_nothing() -> None:
    for a in ("", " ", "$$", "proof", "Proof.", r"\text{proof}", "notfound", "Not found"):
        assert A.no_answer(a) and not A.readable(a)
        for b in (a, "", "5", None):
            assert not is_equiv(a, b) and not is_equiv(b, a) and not verify(rf"\boxed{{{a}}}", b)
    assert not any(map(A.no_answer, ["0", "no", r"\{\}", "none", "x"]))


def test_readable_golds() -> None:
    assert all(
        map(A.readable, ["5", r"\sqrt2", "(1,2)", "x=5", "Monday", r"12\text{ cm}", r"(0,\pi)"])
    )
    assert not any(map(A.readable, [r"f(4 - x)", r"\int x dx", r"5 \text{ crores}", "1 2"]))


def test_numbers_are_answers_too() -> None:
    for five in (5, 5.0, np.int64(5), np.float32(5), Fraction(10, 2)):
        assert is_equiv(five, "5") and is_equiv("5", five) and verify(r"\boxed{5}", five)
        assert not is_equiv(five, 6) and not is_equiv(five, "5.5")
    assert is_equiv(Fraction(-1, 3), r"-\frac13") and is_equiv(1e-5, r"\frac{1}{100000}")
    for other in (True, [5], {"answer": 5}, 5j, b"5"):
        with pytest.raises(TypeError, match="an answer is text or a number"):
            is_equiv(other, "5")


# What is found in a text; ⏎ is a new line, and nothing behind -> means that there is no answer.
EXTRACTIONS = {
    "boxes": r"""
so \boxed{5} -> 5 ;; \boxed{5} then \boxed{6} -> 6 ;; \framebox{8} -> 8 ;; \boxed {5} -> 5 ;; \boxed{\frac{1}{2}} -> \frac{1}{2} ;; \boxed{\{1,2\}} -> \{1,2\} ;;
\boxed{\text{a \} b}} -> \text{a \} b} ;; \boxed{\boxed{5}} -> \boxed{5} ;; \boxed{\fbox{5}+3} -> \fbox{5}+3 ;;
\boxed{5} and \boxed{} -> 5 ;; \boxed{ } -> ;; \boxed{5} \boxed{6 -> ;; \boxed{5}. The
answer is 6. -> 5 ;; $x=\boxed{2}$ or $x=\boxed{3}$ -> x=\boxed{2}$ or
$x=\boxed{3} ;; \boxed{2}, \boxed{3} -> \boxed{2}, \boxed{3} ;; $x=\boxed{1}, y=\boxed{2}$ -> x=\boxed{1}, y=\boxed{2} ;; I put it in \boxed. The answer is 42. -> 42
;; So \boxed{42}. Put your final answer within \boxed{}. -> 42 ;; <think>maybe \boxed{41}</think> The answer is 42. ->
42 ;; <think>maybe \boxed{41} -> ;; \boxed{41} </think> ->
""",
    "boxes that are all of it, or a part of it": r"""
so $x=-\boxed{5}$ -> ;; $2\boxed{5}$ -> ;; $\boxed{5}^2$ -> ;; $\frac{\boxed{1}}{2}$ -> ;; $\pm\boxed{5}$ -> ;;
$\sqrt{\boxed{2}}$ -> ;; $\boxed{2}\sqrt3$ -> ;; $\boxed{2}^{-1}$ -> ;; $\boxed{5}x$ -> ;; $x \neq \boxed{5}$ -> ;; $x > \boxed{5}$ -> ;; $x = - \boxed{5}$ -> ;; $3
\cdot \boxed{5}$ -> ;; $\boxed{5} \cdot 2$ -> ;; $\boxed{5}/2$ -> ;; $\boxed{5}!$ -> ;; $1 + \boxed{5}$ -> ;; $2 \boxed{5}$ -> ;; $\frac{3}{\boxed{5}}$ -> ;; 88 = 2 * \boxed{44} -> 44 ;; $x \le \boxed{5}$ -> ;;
$\boxed{5} + 1$ -> ;; \boxed{4}2 -> ;; $x^{\boxed{4}}$ -> ;; $x_{\boxed{4}}$ -> ;; $y\boxed{4}$ -> ;; $1/\boxed{4}$ ->
;; not \boxed{5} -> ;; \boxed{5},000 -> ;; \[x = \boxed{5}.\] -> 5 ;; $\boxed{5}\text{ cm}$ -> 5 ;; \$\boxed{5} -> 5 ;;
**\boxed{5}** -> 5 ;; $\implies\boxed{5}$ -> 5 ;; Answer: \boxed{5}! -> 5 ;; is \boxed{5} - done -> 5 ;; (\boxed{5}) ->
5 ;; \text{so }\boxed{5} -> 5 ;; $x=5$ so \boxed{5} -> 5 ;; in step 2 \boxed{5} -> 5
""",
    "sentences and headings": r"""
The answer is `42`. -> 42 ;; The answer is `42` or `43`. -> 42` or `43 ;; The final answer is: 42 -> 42 ;; the answer
is 5. No wait, the answer is 6. -> 6 ;; **Answer:** 42 -> 42 ;; Answer: **42** -> 42 ;; The answer is $x = 5$. -> x = 5
;; The answer is \(\frac12\). -> \(\frac12\) ;; Final Answer: The final answer is $5$. I hope it is correct. -> 5 ;; The
answer is 42. It was easy. -> 42 ;; The answer is 42? No, 43 -> 42? No, 43 ;; The answers are 3 and 4. -> 3 and 4 ;;
The answer is either 42 or 43. -> either 42 or 43 ;; I don't know what the answer is. -> ;; the answer isn't 42 -> ;;
The answer is 42, since 6 times 7 is 42. -> 42 ;; 42 -> ;; so it is 42. -> ;; The answer is $x = 5$, as required. -> x
= 5 ;; <answer>42</answer> -> 42 ;; <answer>⏎\boxed{42}⏎</answer> -> 42 ;; ### Final Answer⏎42 -> 42 ;; **Final
Answer**⏎⏎$$42$$ -> 42 ;; #### Final Answer ####⏎⏎**42** -> 42 ;; What is the final answer⏎42 -> ;; ####42⏎ -> 42 ;;
The answer is 5.⏎#### 42 -> 42 ;; The answer is 42.⏎#### Remarks⏎It is fine -> 42 ;; #### 1. First step ->
""",
}


@pytest.mark.parametrize("kind", EXTRACTIONS)
def test_extraction(kind: str) -> None:
    for (case,) in groups(EXTRACTIONS[kind]):
        text, arrow, answer = case.replace("⏎", "\n").rpartition("->")
        assert arrow and (extract_answer(text.strip()) or "") == answer.strip(), text


WRONG_TEXTS = r"""
The answer is either 42 or 43. ;; The answer is not 42. ;; The answer is $42$ or $43$. ;; The answer is 42 or maybe 43.
;; The answer is 42? No, 43. ;; \boxed{\boxed{4}2} ;; \boxed{\boxed{42} or \boxed{43}} ;; \boxed{\boxed{}} ;; \boxed{42
\text{ or } 43} ;; \boxed{\text{not } 42} ;; \boxed{42} \boxed{43} ;; \boxed{42 ;; \boxed{4}2 ;;
42 ;; #### ;; The answer is unclear: 42 ;; The answer is 42 as long as x > 1. ;; The answer is 42, which is wrong. ;;
\boxed{42} or \boxed{43} ;; <think>\boxed{42} ;; -\boxed{42}
"""


def test_texts_that_do_not_answer_42() -> None:
    assert [text for (text,) in groups(WRONG_TEXTS) if verify(text, "42")] == []
    assert not verify(None, "42") and not verify("", "42") and extract_answer(None) is None


MILLION = 10**6
FLOODS = [unit * (MILLION // len(unit)) for unit in
    ["(", "{", "}", "9", "$", " ", "\n", "\\", '"', "é", "A", "x+", "1,", "answer ", "answer: ", "#### ",
     "\\boxed{", "\\boxed", "\\frac", "\\text{", "\\[answer is", "\\boxed[]", "½", "\u202e", "\0"]]  # fmt: skip
FLOODS += [
    "\\boxed{" + "9" * MILLION + "}", "\\boxed " + "[" * MILLION, "answer is " + "$" * MILLION,
    "#### " + " " * MILLION, "\n# * " * (MILLION // 5) + "final answer", "answer is" + " " * MILLION,
    "answer is 1" + ", since" * (MILLION // 7), "the answer is \\[" + "a" * MILLION,
    "\\boxed{5} or " * (MILLION // 13), "<think>" * (MILLION // 7), "within \\boxed{}" * (MILLION // 15),
]  # fmt: skip
TRAPS = [
    "9^{9^{9^9}}", "(100000!)!", "1E999999999", "1e-999", "9" * 1990, "(" * 900 + ")" * 900, "\\sqrt" * 390 + "2",
    "\\sqrt{" * 38 + "2" + "}" * 38, "-" * 1900 + "1", "1/" * 900 + "1", "1" + "^2" * 900, "(x+y+z)^{500}",
    "+".join(f"\\sqrt{{{n}}}" for n in range(2, 60)), "+".join(f"\\sin {n}" for n in range(2, 60)),
    "+".join(f"\\ln {n}" for n in range(2, 60)), ",".join(map(str, range(500))), "x^{x^{x}}", "a:" * 900,
    ",".join(f"\\sqrt{{{n}}}" for n in range(2, 130)), ",".join(f"x^{n}" for n in range(2, 300)),
    "\\pm1," * 390, "(1," * 39 + "1" + ")" * 39, "a=" * 900, "a<" * 900, "|" * 1900, "x_" * 900, "x_{" * 39,
    "2^{15999}", "(1/3)^{5000}", "i^{99999999999}", "\\sqrt[1000001]{2}", "\\sqrt[0]{2}", "\\log_1 5", "\\ln 0",
    "\\tan 90^\\circ", "e^{1000}", "e^{e^{e^e}}", "0." + "9" * 1900, "0.\\overline{" + "9" * 1900 + "}", "0/0",
    "\\sin(10^{41})", "\ud800", "²³", "٣", "\\frac", "\\left", ",,,", "{}", "()", "[]", "⟦", "\\begin{pmatrix}",
    "!" * 1900, "|x|" * 600, "1000!^2", "x^{1/3}" * 25, "\\arctan x" * 20, "1=1," * 400, "(A) " * 400,
    "\\{x|" * 400, "[0,1]\\cup" * 180 + "[0,1]", "0.(3)" * 300, "m+n+p+q=1," * 150, "5 cm " * 300,
    "\\boxed{", '"', '""', "\\", "^", "_", "°", "=", "<", "∈", "±", "\\{", "or", "1 or", "|x|", "\\text{}",
]  # fmt: skip


@pytest.mark.parametrize("text", FLOODS + TRAPS, ids=lambda text: f"{text[:12]!a}x{len(text)}")
def test_hostile_text_is_an_honest_false(text: str) -> None:
    extract_answer(text)
    assert len(normalize_answer(text[: A.MAX_ANSWER])) <= 12 * A.MAX_ANSWER
    assert not verify(text, "42") and not is_equiv(text, "42") and not is_equiv("42", text)
    if text.strip():
        assert is_equiv(text, text) != A.no_answer(text)
    texts = sorted(normalize_answer(t[: A.MAX_ANSWER]) for t in (text, "1," + text))
    work = A.Comparison(*texts)
    with contextlib.suppress(ValueError, RecursionError):
        work.same(*map(work.read_answer, texts))
    assert work.steps <= 2 * A.MAX_STEPS


def test_any_thread_may_ask() -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = pool.map(is_equiv, [r"\sin 30^\circ", "9^{9^{9^9}}"] * 20, ["1/2", "1"] * 20)
        assert [*answers] == [True, False] * 20


NUMBERS = st.integers(-30, 30).map(str) | st.sampled_from(
    ["0.5", r"\frac12", "10,000", r"3\frac{1}{2}"]
)
ATOMS = NUMBERS | st.sampled_from(
    ["x", "y", "i", "e", r"\pi", r"\sqrt2", "B", r"\text{red}", r"\infty", "12_5"]
)
FORMS = [
    "{}+{}",
    "{}-{}",
    "{} {}",
    r"\frac{{{}}}{{{}}}",
    r"\sqrt{{{}}}",
    "({})^{{{}}}",
    r"\sin {}",
    r"{} \pm {}",
]
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(*(st.builds(form.format, inner, inner) for form in FORMS)),
    max_leaves=5,
)
SHAPES = ("{}", "({}, {})", "[{},{})", r"\{{{},{}\}}", "{} = {}", r"{} \le {}")  # fmt: skip
ANSWERS = st.one_of(
    *(st.builds(form.format, EXPRESSIONS, EXPRESSIONS) for form in SHAPES),
    st.builds(r"({},{}) \cup [{},\infty)".format, NUMBERS, NUMBERS, NUMBERS),
    st.builds(r"\begin{{pmatrix}} {} & {} \\ {} & 1 \end{{pmatrix}}".format, ATOMS, ATOMS, ATOMS),
    st.builds(r"{} \text{{ {}}}".format, NUMBERS, st.sampled_from(["cm", "or", "and 3", "dogs"])),
)
SCRAPS = [*r"\{}()[]$^_&,.;:!%0123456789xyei+-*/=<>| ", r"\frac", r"\boxed{", r"\text{", r"\pm"]
TEXTS = st.text() | st.lists(st.sampled_from(SCRAPS), max_size=30).map("".join) | ANSWERS


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS)
def test_any_text_is_answered_and_rules_are_symmetric(a: str, b: str) -> None:
    extract_answer(a)
    assert is_equiv(a, b) == is_equiv(b, a)
    assert verify(a, b) in (True, False)
    assert is_equiv(a, a) == (not A.no_answer(a))


@settings(max_examples=100, deadline=None)
@given(ANSWERS)
def test_the_last_box_decides(answer: str) -> None:
    text = rf"Well, \boxed{{{answer}}}."
    assert verify(text, answer)
    assert not verify(text + r" No: \boxed{-987654321}", answer)
    assert not verify(text + r" No: \boxed{5", answer)


@settings(max_examples=100, deadline=None)
@given(ANSWERS)
def test_harmless_respellings(answer: str) -> None:
    for other in respellings(answer):
        assert is_equiv(answer, other), other


@settings(max_examples=150, deadline=None)
@given(st.fractions(max_denominator=999), st.fractions(max_denominator=999))
def test_fractions_are_exact(a, b) -> None:
    left = rf"\frac{{{a.numerator}}}{{{a.denominator}}}"
    right = f"{b.numerator}/{b.denominator}"
    assert is_equiv(left, right) == (a == b)
    assert is_equiv(rf"{left}+\sqrt2", rf"\sqrt{{2}}+{right}") == (a == b)
    assert is_equiv(left, f"{a.numerator * 6}/{a.denominator * 6}")


def respellings(answer: str) -> list[str]:
    """Spell the answer in other ways that change nothing."""
    spaced = re.sub(r"(?<=[^\\\d,a-zA-Z])(?=[(+\-=])", " ", answer)
    wide = re.sub(r"(?<!\\left)\(", r"\\left( ", re.sub(r"(?<!\\right)\)", r" \\right)", answer))
    return [
        f"  {answer} ", f"{answer}.", f"${answer}$", f"\\({answer}\\)", spaced, wide,
        answer.replace(r"\frac", r"\dfrac"), answer.replace(r"\dfrac", r"\tfrac"),
    ]  # fmt: skip


def mutants(answer: str, rng: random.Random) -> list[str]:
    """Make answers that provably mean something else."""
    out = []
    if re.fullmatch(r"[-0-9.,{}()\\a-z ]*[1-9]", answer) and not re.search(
        r"text|mbox|sqrt|[a-z]\)", answer
    ):
        out.append(answer[:-1] + rng.choice([d for d in string.digits[1:] if d != answer[-1]]))
    if re.fullmatch(r"-[0-9.]*[1-9][0-9.]*", answer):
        out.append(answer[1:])
    if re.fullmatch(r"[([][^()[\]]*[)\]]", answer):
        out.append(("[" if answer[0] == "(" else "(") + answer[1:])
        inner = answer[1:-1].split(",")
        if len(inner) == 2 and not is_equiv(inner[0], inner[1]):
            out.append(f"{answer[0]}{inner[1]},{inner[0]}{answer[-1]}")
    if re.fullmatch(r"[-+0-9^{}x ]*x[-+0-9^{}x ]*", answer):
        out += [answer.replace("x", "y"), answer.replace("x", "X"), f"{answer}+1", f"-({answer})"]
    return out


MATH = pathlib.Path(__file__).resolve().parent.parent / "shared" / "math"
needs_math = pytest.mark.skipif(not MATH.exists(), reason="shared/math is not here")


def math_rows(name: str) -> list[dict]:
    with open(MATH / f"{name}.jsonl", encoding="utf-8") as file:
        return [row for row in map(json.loads, file) if row["answer"]]


def math_golds() -> list[str]:
    return sorted({row["answer"] for name in ("math500", "train") for row in math_rows(name)})


@needs_math
def test_math500_solutions() -> None:
    rows = math_rows("math500")
    assert [row["answer"] for row in rows if not verify(row["solution"], row["answer"])] == []
    assert len(rows) == 500


@needs_math
def test_math_golds_equal_their_respellings() -> None:
    wrong = []
    for gold in math_golds():
        assert verify(rf"We find $\boxed{{{gold}}}$, as was to be shown.", gold), gold
        assert not verify(rf"\boxed{{{gold}}} \boxed{{-987654321}}", gold), gold
        wrong += [(gold, other) for other in respellings(gold) if not is_equiv(other, gold)]
    assert wrong == []


@needs_math
def test_math_golds_differ_from_their_mutants() -> None:
    rng = random.Random(0)
    pairs = [(gold, other) for gold in math_golds() for other in mutants(gold, rng)]
    assert len(pairs) > 1000
    assert [pair for pair in pairs if is_equiv(*pair)] == []


# --- PAG's turns ----------------------------------------------------------------------------------


JUDGMENTS = {
    True: ["so 12 = 12.\nTherefore, the answer is correct", "**The answer is correct.**"],
    False: [
        "Check: 3 + 4 = 7 vs 8: differ. The answer is wrong.",
        "First I thought the answer is correct. But no: The answer is wrong.",
    ],
    None: [
        "I cannot say that the answer is correct.",
        "Not sure; the answer is correct.",
        "The answer is not correct.",
        "The answer is correct or wrong.",
        "x" * 100_000,
    ],
}


@pytest.mark.parametrize("verdict", JUDGMENTS)
def test_the_verdict_is_the_final_sentence_only(verdict):
    assert {*map(A.parse_judgment, JUDGMENTS[verdict])} == {verdict}


@given(st.text(), st.booleans(), st.text("aeiou ,."))
def test_a_check_may_say_anything_before_its_verdict_and_nothing_after_it(before, verdict, after):
    text = f"{before}. The answer is {'correct' if verdict else 'wrong'}."
    assert A.parse_judgment(text) is A.parse_judgment(text + " \n") is verdict
    assert A.parse_judgment(f"{text} {after}hm") is None


def test_each_turn_is_paid_for_what_it_did_itself():
    paid = A.dialogue_rewards
    assert paid([True], [True], 1.0) == [1, 1] and paid([False], [True], 1.0) == [0, 0]
    assert paid([False, True], [None], 0.5) == [0, 0, 1.5]  # no verdict: no reward, but a revision
    assert paid([True, True], [None], 1.0) == [1, 0, 1]
    assert paid([False, False, True], [False, False], 2.0) == [0, 1, 0, 1, 3]


def test_a_dialogue_goes_on_until_its_check_says_correct(base, problems):
    seen = set()
    for d in played(base, problems, temperature=1.2, max_new_tokens=12, revisions=2):
        ids = [*base.prompt_ids(d.problem)]
        for k, turn in enumerate(d.turns):
            assert turn.role == ("solve" if k == 0 else ("revise", "verify")[k % 2])
            if k > 0:
                request = A.VERIFY_PROMPT if k % 2 else A.REVISE_PROMPT
                ids += base.bridge_ids(request, d.turns[k - 1].ended)
            response = d.ids[turn.start : turn.end]
            assert turn.start == len(ids)
            assert turn.ended == (response[-1] in base.end_ids)
            assert turn.text == base.tokenizer.decode(response, skip_special_tokens=True)
            ids += response
            verdict = A.parse_judgment(turn.text) if turn.role == "verify" else None
            right = turn.role != "verify" and A.verify(turn.text, d.problem.answer)
            assert (turn.verdict, turn.correct) == (verdict, right)
            seen.add((turn.role, turn.ended, turn.verdict))
        assert d.ids == ids and not any(turn.verdict for turn in d.turns[:-1])
        assert d.turns[-1].verdict or len(d.turns) == 5
        ends = sum(token in base.end_ids for token in ids)  # ours and its own, forced where cut off
        assert ends == 2 * len(d.turns) - (not d.turns[-1].ended)
        correct, verdicts = [t.correct for t in d.attempts], [t.verdict for t in d.checks]
        assert [t.reward for t in d.turns] == A.dialogue_rewards(correct, verdicts, 1.0)
    kinds = itertools.product(("solve", "revise"), (True, False), (None,))
    assert {*kinds, *(("verify", True, v) for v in (True, False)), ("verify", False, None)} <= seen


TEMPLATE = (DATA / "base" / "chat_template.jinja").read_text()
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)


@pytest.mark.parametrize(
    "template, end",  # what the template writes after the last turn, if not <|end|> as the base
    [
        ("{{ bos_token }}" + TEMPLATE, ""),
        ("{{ bos_token }}<|system|>Be brief.<|end|>" + TEMPLATE, ""),
        (CHATML, "<|im_end|>\n"),
        (A.PLAIN, "\n\nAssistant: "),
    ],
)
def test_a_dialogue_is_what_its_chat_template_would_write(template, end, base, problems):
    policy = speaking(base, template)
    policy.tokenizer.add_special_tokens({"bos_token": "<|pad|>"})
    policy.tokenizer.add_bos_token = True
    (dialogue,) = played(policy, problems[:1], max_new_tokens=40)
    said = [{"role": "user", "content": A.SOLVE_PROMPT.replace("{problem}", problems[0].problem)}]
    for turn in dialogue.turns:
        request = A.REVISE_PROMPT if turn.role == "verify" else A.VERIFY_PROMPT
        said += [{"role": "assistant", "content": turn.text}, {"role": "user", "content": request}]
    whole = policy.tokenizer.apply_chat_template(said[:-1], tokenize=False)
    spoken = policy.tokenizer.decode(dialogue.ids)
    assert whole == (spoken.replace("<|end|>", "") + end if end else spoken)
    assert len(dialogue.turns) > 1
    assert dialogue.ids.count(policy.tokenizer.bos_token_id) == template.count("bos_token")


# --- Training -------------------------------------------------------------------------------------


def dialogue(index: int, answers: list[str], verdicts: list[bool | None]) -> A.Dialogue:
    """A dialogue about problem `index`, whose answer is 1, with given outcomes and no text."""
    turns = []
    for k, answer in enumerate(answers):
        role = "revise" if k else "solve"
        turns.append(A.Turn(role, 0, 0, "", True, answer=answer, correct=answer == "1"))
        turns += [A.Turn("verify", 0, 0, "", True, verdict=v) for v in verdicts[k : k + 1]]
    made = A.Dialogue(A.Problem(index, "", "1"), [], turns=turns)
    made.pay(A.Config())
    return made


def test_a_role_without_samples_gets_the_value_of_all_samples_of_that_role():
    dialogues = [dialogue(0, ["1"], [True]), dialogue(0, ["0"], [True])]
    dialogues += [dialogue(1, ["0", "1"], [False]), dialogue(1, ["0", "0"], [False])]
    vhat = A.estimate_v_star(torch.tensor([2.0, 0.0]), 0.5).item()
    for kind, expected in {"vstar": vhat, "mean": 1, "zero": 0}.items():
        config = A.Config(baseline=kind)
        values = A.baselines(dialogues, config)
        assert values[0, "revise"] == values[1, "revise"] == pytest.approx(expected)
        assert values[1, "solve"] == 0 and (values[0, "solve"] == 0.5 or kind != "mean")
        assert A.baselines(dialogues[:2], config)[0, "revise"] == 0  # nothing to pool


def learner_of(policy: A.Policy, ref: A.Policy, **options: float) -> A.Learner:
    """A copy of the policy that learns; V^* is 0.4 everywhere."""
    policy = copy_of(policy)
    optimizer = torch.optim.SGD(policy.model.parameters(), **options)
    return A.Learner(policy, A.freeze(ref), defaultdict(lambda: 0.4), optimizer)


def weights_of(learner: A.Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learner.policy.model.parameters()])


def log_p(policy: A.Policy, dialogue: A.Dialogue, turn: A.Turn, temperature: float) -> Tensor:
    """The log-probability of one turn, without batch or padding."""
    ids = torch.tensor([dialogue.ids[: turn.end]])
    logps = (policy.model(ids).logits[0, turn.start - 1 : -1] / temperature).log_softmax(-1)
    return logps.gather(1, ids[0, turn.start :, None]).sum()


# Of all that was said, equation (6) counts the policy's own words: no prompt, bridge, or padding.
def test_an_update_is_a_step_down_equation_6_however_it_is_cut(base, problems, monkeypatch):
    dialogues, moved = played(base, problems[:8], temperature=0.9), copy_of(base)
    with torch.no_grad():
        for parameter in moved.model.parameters():
            parameter.mul_(1.01)  # no longer the reference
    turns = [(d, turn) for d in dialogues for turn in d.turns]
    logps = torch.stack([log_p(moved, *turn, 0.9) for turn in turns])
    ratio = logps - torch.stack([log_p(base, *turn, 0.9) for turn in turns])
    n_tokens = sum(turn.end - turn.start for _, turn in turns)
    reward = torch.tensor([turn.reward for _, turn in turns])
    loss = (0.05 * ratio - (reward - 0.4)).square().mean()
    ours = [p for p in moved.model.parameters() if p.requires_grad]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, ours)])
    for tokens, logits in ((10**6, 2**26), (400, 2**26), (1, 2**11)):
        monkeypatch.setattr(A, "LOGITS_AT_A_TIME", logits)
        learner = learner_of(moved, base, lr=1.0, momentum=0.5)
        config = A.Config(temperature=0.9, beta2=0.05, update_tokens=tokens, max_grad_norm=1e9)
        seen = A.update(learner, dialogues, config)
        state = learner.optimizer.state  # after one step the momentum is the gradient
        gradient = torch.cat([value["momentum_buffer"].flatten() for value in state.values()])
        assert torch.allclose(gradient, expected, atol=1e-5 * expected.norm().item())
        assert seen["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert seen["kl"] == pytest.approx(ratio.mean().item(), rel=1e-3) and abs(seen["kl"]) > 1e-3
        assert seen["entropy"] == pytest.approx(-logps.sum().item() / n_tokens, rel=1e-4)
        assert seen["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)
        assert seen["v_star"] == pytest.approx(0.4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_update_that_is_not_finite_leaves_the_weights_alone(dtype, problems):
    config = A.Config(dtype=dtype, threads=1, temperature=1.0)
    policy = A.load_policy(config)
    dialogues, learner = played(policy, problems[:2]), learner_of(policy, policy, lr=1.0)
    before, scale = weights_of(learner), policy.scaler.get_scale()
    seen = A.update(learner, dialogues, config)
    assert not seen["skipped"] and not torch.equal(before, weights_of(learner))
    assert seen["grad_norm"] < 1  # that of the loss itself, not of the scaled one
    before = weights_of(learner)
    learner.policy.model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    assert A.update(learner, dialogues, config)["skipped"]
    assert torch.equal(before, weights_of(learner))
    assert policy.scaler.get_scale() == (scale / 2 if dtype == "float16" else 1)


SHARED = {"acc_t1", "acc_final", "verifier_balanced_acc", "revision_rate", "answer_change_ratio"}
SHARED |= {"fixed", "broken", "response_tokens", "no_answer_rate", "truncated_rate"}
METRICS = SHARED | {"step", "loss", "reward_solve", "reward_verify", "reward_revise", "v_star"}
METRICS |= {"kl", "entropy", "grad_norm", "lr", "tokens_per_second"}
SUMMARY = SHARED | {"n", "verifier_pool_balanced_acc", "groups"}
SMALL = "--seed 5 --steps 2 --batch-size 8 --train-limit 8 --eval-limit 16 --num-samples 2 "
SMALL += "--max-new-tokens 32 --threads 1 --out"


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a short finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert A.main(["train", *SMALL.split(), str(folder)]) == 0
    return folder


def test_a_run_folder_holds_what_the_readme_says(finished):
    metrics = read_lines(finished / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2] and METRICS <= set(metrics[0])
    assert [m["kl"] == 0 for m in metrics] == [True, False]  # it begins as the reference
    summary = json.loads((finished / "summary.json").read_text())
    for part in ("before", "after"):
        assert SUMMARY <= set(summary[part]) and summary[part]["n"] == 16
        groups = summary[part]["groups"]  # by level and by subject
        assert sum(groups[name]["n"] for name in groups) == 2 * 16
    assert A.read_config(finished / "config.json").seed == 5
    rows = read_lines(finished / "eval_results.jsonl")
    assert len(rows) == 16 and {"text", "answer", "verdict"} <= set(rows[0]["turns"][0])
    head, *stage_one = read_lines(finished / "v_star.jsonl")
    assert "fingerprint" in head and [row["sample"] for row in stage_one] == [0, 1] * 8
    model = AutoModelForCausalLM.from_pretrained(finished / "checkpoint")
    assert len(AutoTokenizer.from_pretrained(finished / "checkpoint")) == model.config.vocab_size
    learned = dict(model.named_parameters())  # without lm_head.weight, which is embed_tokens.weight
    saved = torch.load(finished / "state.pt", weights_only=True)["learned"]["model_state_dict"]
    assert all(torch.equal(saved[name], learned[name]) for name in learned)


def numbers_of(run: Path) -> list[dict]:
    """The metrics, but for what they cost."""
    costs = re.compile("second|memory")
    lines = read_lines(run / "metrics.jsonl")
    return [{name: line[name] for name in line if not costs.search(name)} for line in lines]


def left_by(run: Path) -> dict[str, Any]:
    """All that a run has left, without what it cost and where it lies: two runs can be compared."""
    files = {str(file.relative_to(run)): file for file in run.rglob("*") if file.is_file()}
    files.pop("dashboard.png", None)
    found = {name: file.read_bytes() for name, file in files.items()}
    costs = {"metrics.jsonl": numbers_of(run), "config.json": None, "state.pt": None}
    return found | {name: costs[name] for name in costs.keys() & found.keys()}


def unfinished(run: Path, folder: Path, *lost: str) -> Path:
    """A finished run made unfinished: its summary is gone, and what else is lost."""
    shutil.copytree(run, folder)
    for name in ("summary.json", *lost):
        (folder / name).unlink()
    return folder


def test_the_same_seed_leaves_the_same_folder(finished, tmp_path):
    with concurrent.futures.ThreadPoolExecutor() as pool:  # from a thread as well
        pool.submit(A.main, ["train", *SMALL.split(), str(tmp_path / "same")]).result()
    assert left_by(tmp_path / "same") == left_by(finished)


def test_another_seed_can_take_the_same_stage_one_another_model_cannot(finished, tmp_path, capsys):
    given, run = Path(shutil.copy(finished / "v_star.jsonl", tmp_path)), tmp_path / "run"
    options = {"max_new_tokens": 32, "minibatches": 3, "warmup": 4, "v_star": str(given)}
    A.train(quick(out=str(run), seed=6, **options))
    assert [m["loss"] for m in numbers_of(run)] != [m["loss"] for m in numbers_of(finished)]
    assert [m["lr"] for m in numbers_of(run)] == pytest.approx([3e-4 / 4, 3e-4 / 2])
    learned = torch.load(run / "state.pt")["learned"]
    moments = learned["optim_state_dict"]["state"].values()
    assert {moment["step"].item() for moment in moments} == {2 * 3}  # updates
    again = (*SMALL.split(), tmp_path / "none", "--v-star", given, "--model", run)
    assert "other weights" in refused(capsys, "train", *again)
    given.unlink()  # the run has a copy of its own
    folder = unfinished(run, tmp_path / "again", "state.pt")
    told(capsys, "train", "--resume", folder)
    assert left_by(folder) == left_by(run)
    assert left_by(run)["v_star.jsonl"] == left_by(finished)["v_star.jsonl"]


def test_training_raises_the_reward(tmp_path):
    sizes = {"steps": 14, "batch_size": 48, "train_limit": 48, "num_samples": 4, "eval_limit": 64}
    config = quick(**sizes, revisions=0, seed=1, warmup=1, lr=5e-4, out=str(tmp_path / "run"))
    summary = A.train(config)
    assert summary["after"]["acc_t1"] > summary["before"]["acc_t1"] + 0.2
    rewards = [m["reward_solve"] for m in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1


# --- The neighbours -------------------------------------------------------------------------------


def neighbour_loss(name: str, logp: Tensor, **more: Tensor) -> Tensor:
    """Of two turns of one and of two tokens; what is not given is nothing."""
    given = {name: torch.zeros(3) for name in ("old", "ref", "advantage")} | more
    made = dialogue(0, ["1"], [True])
    notes = zip(given["advantage"].split([1, 2]), given["old"].split([1, 2]))
    learner = A.Learner(None, None, {}, None, notes=dict(zip(map(id, made.turns), notes)))
    tokens = (torch.tensor([0, 1, 1]), logp, given["ref"])
    return A.neighbour_loss(learner, [made], tokens, A.Config(loss=name, minibatches=2))


@given(st.lists(st.floats(-4, 0), min_size=6, max_size=6), st.floats(-1, 1), st.floats(-1, 1))
def test_a_policy_gradient_with_a_squared_log_ratio_has_the_gradient_of_6(numbers, a, b):
    logp = torch.tensor(numbers[:3], dtype=torch.float64, requires_grad=True)
    ref, advantage = torch.tensor(numbers[3:], dtype=torch.float64), torch.tensor([a, b])
    beta2, sums = A.Config().beta2, [torch.stack([x[0], x[1] + x[2]]) for x in (logp, ref)]
    ours = A.astarpo_loss(*sums, advantage, torch.zeros(2), beta2) / (2 * beta2)
    pg = neighbour_loss("pg", logp, ref=ref, advantage=advantage[[0, 1, 1]])
    gradients = [torch.autograd.grad(x, logp)[0] for x in (ours, pg)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_the_other_losses_by_hand():
    logp, old = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.5, -2.0])
    more = {"old": old, "ref": logp - 0.5, "advantage": torch.tensor([1.0, 2.0, -1.0])}
    up, down = math.exp(0.5), math.exp(-1)  # both outside of 0.8 .. 1.2; 0.8 is worse for A = -1
    price = 1e-3 * (math.exp(-0.5) - 1 + 0.5)
    tokens = [price - 1, price - min(up * 2, 1.2 * 2), price - min(-down, -0.8)]
    entropy = [1e-3 / 2 * x * x for x in (1, 2, 3)]
    found = [neighbour_loss(name, logp, **more).item() for name in ("grpo", "ppo", "awr")]
    grpo = (tokens[0] + (tokens[1] + tokens[2]) / 2) / 2
    ppo = (sum(tokens) + sum(entropy)) / 2
    assert found == pytest.approx([grpo, ppo, -(-1.0 + -4.0 + 3.0) / 2], rel=1e-6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(-1, 2), st.floats(0, 0.99))
def test_gae_is_the_mean_of_all_n_step_advantages(values, reward, lam):
    """A^(n) looks n tokens ahead; A = (1 - lam) * sum lam^(n-1) A^(n), the rest on the last."""
    later = [*values[1:], reward]
    for t, found in enumerate(A.gae(torch.tensor(values, dtype=torch.float64), reward, lam)):
        steps = [v - values[t] for v in later[t:]]
        weights = [(1 - lam) * lam**n for n in range(len(steps) - 1)]
        weights.append(1 - sum(weights))
        assert found.item() == pytest.approx(float(np.dot(steps, weights)), abs=1e-9)


@given(st.integers(1, 8), st.integers(0, 8), st.floats(0.05, 5))
def test_the_soft_value_is_the_v_star_of_rewards_0_and_1(right, wrong, beta):
    rewards = torch.tensor([1.0] * right + [0.0] * wrong)
    found = A.soft_value(rewards.mean().double().logit(), beta).item()
    assert found == pytest.approx(A.estimate_v_star(rewards, beta).item(), abs=1e-5)


class Tabular:
    """A policy over the tokens 0, 1, 2 and 3, which ends, at most three of them; all is known."""

    def __init__(self, seed: int, beta: float) -> None:
        self.rng, self.beta, self.looked = np.random.default_rng(seed), beta, 0
        self.logps: dict[tuple[int, ...], np.ndarray] = {}
        self.soft: dict[tuple[int, ...], float] = {}  # V* / beta
        self.score: dict[tuple[int, ...], float] = {}  # log pi* of whole responses, but for V*(x)
        self.fill((), 0.0)

    def fill(self, prefix: tuple[int, ...], logp: float) -> float:
        p = self.rng.dirichlet(np.full(4, 0.5)) + 1e-9
        self.logps[prefix] = np.log(p / p.sum())
        if prefix[-1:] == (3,) or len(prefix) == 3:
            self.soft[prefix] = self.rng.integers(2) / self.beta
            self.score[prefix] = logp + self.soft[prefix]
        else:
            parts = [
                q + self.fill((*prefix, y), logp + q) for y, q in enumerate(self.logps[prefix])
            ]
            self.soft[prefix] = float(np.logaddexp.reduce(parts))
        return self.soft[prefix]

    def look(self, texts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        self.looked += len(texts)
        logps = torch.tensor(np.array([self.logps[tuple(text)] for text in texts]))
        ranked = logps.sort(descending=True)
        return ranked.indices, ranked.values, torch.tensor([self.soft[tuple(t)] for t in texts])


@given(st.integers(0, 10**6), st.floats(0.05, 3))
def test_with_the_exact_value_search_finds_the_likeliest_response_of_the_best_policy(seed, beta):
    world = Tabular(seed, beta)
    config = A.Config(search=100, max_new_tokens=3)
    found = A.best_first(world.look, [[]], [3], config)[0]
    assert world.score[tuple(found)] == pytest.approx(max(world.score.values()), abs=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 3))
def test_search_opens_no_more_than_it_may_and_answers_all_the_same(seed, most, n):
    world = Tabular(seed, 0.5)
    found = A.best_first(world.look, [[]] * n, [3], A.Config(search=most, max_new_tokens=3))
    assert world.looked <= n * (1 + 4 * most) and all(1 <= len(y) <= 3 for y in found)


def test_what_is_looked_up_before_a_batch(base, problems):
    """GRPO's advantages are normalised in group and role, AWR's weights sum to their number, without
    stage 1 the baseline is the role's mean; and a second update knows what pi was."""
    asked = [p for p in problems[:4] for _ in range(4)]
    config = A.Config(temperature=1.0, num_samples=0, loss="grpo", minibatches=2)
    fresh = [A.Dialogue(p, [*base.prompt_ids(p)], i) for i, p in enumerate(asked)]
    dialogues = A.rollout(base, fresh, config, 1)
    learner = A.Learner(base, base, {}, None)
    A.look_ahead(learner, dialogues, config)
    solve = [learner.notes[id(d.turns[0])] for d in dialogues]
    advantage = np.array([note[0][0].item() for note in solve]).reshape(4, 4)
    assert np.allclose(advantage.mean(1), 0, atol=1e-5)
    assert all(std == pytest.approx(1, abs=0.01) or std == 0 for std in advantage.std(1))
    first = A.collate(dialogues[:1], learner.v_star, base.device)
    exact = A.token_logps(base, first.ids, first.scored)
    noted = torch.cat([learner.notes[id(turn)][1] for turn in dialogues[0].turns])
    assert torch.allclose(noted, exact, atol=1e-5)
    rate = np.mean([d.turns[0].correct for d in dialogues])
    assert learner.v_star[asked[0].index, "solve"] == pytest.approx(rate)
    A.look_ahead(learner, dialogues, dataclasses.replace(config, loss="awr"))
    turns = [turn for d in dialogues for turn in d.turns]
    weights = [learner.notes[id(turn)][0][0].item() for turn in turns]
    assert sum(weights) == pytest.approx(len(turns), rel=1e-4) and min(weights) > 0


def test_a_learned_value_knows_more_at_the_end_than_at_the_prompt(base, capsys):
    config = A.Config(temperature=1.0, revisions=0, train_limit=64)
    asked = A.n_dialogues(base, A.load_problems(base, config, "train"), 8)
    A.fit_value(base, A.rollout(base, asked, config, 0), config)
    first, last = (float(x) for x in re.findall(r"([\d.]+) at the", capsys.readouterr().out))
    assert 0.5 < first < last - 0.1


def test_a_bonus_and_a_price_are_paid_besides():
    made = dialogue(0, ["2", "1"], [False])
    config = A.Config(format_reward=0.5, length_penalty=0.1, max_new_tokens=2)  # above 1 token
    made.turns[2].answer, made.turns[1].end = None, 4
    plain = [turn.reward for turn in made.turns]
    made.pay(config)
    over = [max(0, turn.end - turn.start - 1) for turn in made.turns]
    bonus = [0.5 * (turn.answer is not None) for turn in made.turns]
    expected = [r + b - 0.1 * n for r, b, n in zip(plain, bonus, over)]
    assert [turn.reward for turn in made.turns] == pytest.approx(expected)
    assert plain == [0.0, 1.0, 2.0] and over[1] == 3 and bonus[0] == 0.5


NEIGHBOURS = {
    "pg": {"loss": "pg", "num_samples": 0},
    "grpo": {"loss": "grpo", "num_samples": 0, "group": 4, "minibatches": 2},
    "ppo": {"loss": "ppo", "minibatches": 2},
    "awr": {"loss": "awr"},
    "value": {"baseline": "value"},
    "shaped": {"format_reward": 3.0},  # no V* lies between 0 and 1
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_each_neighbour_trains(name, tmp_path):
    config = quick(out=str(tmp_path / "run"), steps=1, eval_limit=4, **NEIGHBOURS[name])
    A.train(config)
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert metrics["skipped"] == 0 and metrics["grad_norm"] > 0


def test_eval_finds_answers_by_search(tmp_path, capsys):
    options = ["--beta1", 0.1, "--eval-limit", 20, "--revisions", 0, "--num-samples", 4]
    options += ["--model", "data/base", "--out", tmp_path / "found"]
    said = told(capsys, "eval", "--search", 30, *options)
    assert 1 <= float(re.search(r"search: ([\d.]+) prefixes", said)[1]) <= 30
    summary = json.loads((tmp_path / "found" / "eval_summary.json").read_text())
    assert summary["acc_t1"] > 0.5  # the base itself has 0.3
    found = told(capsys, "solve", "What is 47 * 36?", "--search", 30, *options[:2], *options[4:-2])
    assert "prefixes" in found and "1692" in found


# --- Evaluation -----------------------------------------------------------------------------------


def test_statistics_by_hand():
    """A missing verdict is a miss; to break and to mend is what a revision can do."""
    outcomes = [(["1"], [True])] * 3 + [(["0"], [True]), (["0"], [False])]
    outcomes += [(["0", "1"], [False]), (["1", "0"], [None]), (["1", "1"], [False])]
    outcomes += [(["0", "2"], [None])]
    dialogues = [dialogue(i, *outcome) for i, outcome in enumerate(outcomes)]
    expected = {"acc_t1": 5 / 9, "acc_final": 5 / 9, "fixed": 1, "broken": 1}
    expected |= {"verifier_recall_right": 3 / 5, "verifier_recall_wrong": 2 / 4}
    expected |= {"verifier_balanced_acc": (3 / 5 + 2 / 4) / 2}
    expected |= {"revision_rate": 4 / 9, "answer_change_ratio": 3 / 4}
    expected |= {"reward_verify": 5 / 9, "reward_revise": (2 - 1 + 1 + 0) / 4}
    seen = A.statistics(dialogues)
    assert {name: seen[name] for name in expected} == pytest.approx(expected)
    assert A.statistics(dialogues[:3])["verifier_balanced_acc"] is None  # nothing was wrong


def test_the_verifier_pool_is_balanced_and_scored(base):
    rows = read_lines(DATA / "attempts.jsonl")
    assert len(rows) >= 1000 and 2 * sum(row["correct"] for row in rows) == len(rows)
    assert all(A.verify(row["attempt"], row["answer"]) is row["correct"] for row in rows[:200])
    asked = {row["problem"] for row in rows}
    assert len(asked) == len(rows)
    assert asked <= {row["problem"] for row in read_lines(DATA / "test.jsonl")}
    config = A.Config(temperature=0.0, eval_limit=100, problem_column="task")  # the pool is ours
    greedily = A.evaluate_pool(base, config)
    assert 0.3 < greedily["verifier_pool_balanced_acc"] < 0.8
    assert A.evaluate_pool(base, dataclasses.replace(config, temperature=0.7)) == greedily


@pytest.mark.parametrize("line", ['{"problem": "1 + 1?", "answer": "2"}', '{"problem": "1 + 1?", '])
def test_a_pool_that_is_torn_is_refused_with_its_line_and_not_used_in_part(base, tmp_path, line):
    whole = (DATA / "attempts.jsonl").read_text().splitlines()[:2]
    (tmp_path / "attempts.jsonl").write_text("\n".join([*whole, line]))
    (tmp_path / "test.jsonl").touch()
    config = A.Config(temperature=0.0, eval_data=str(tmp_path / "test.jsonl"))
    with pytest.raises(A.UsageError, match="attempts.jsonl, line 3"):
        A.evaluate_pool(base, config)


# --- Loading --------------------------------------------------------------------------------------

BOX = r"so \boxed{5}"


@pytest.mark.parametrize(
    "row, level",
    [
        ({"problem": "P", "answer": "5", "level": 3}, 3),
        ({"problem": "P", "solution": BOX, "level": "Level 2", "type": "x"}, 2),
        ({"question": "P", "answer": "2 + 3 = 5\n#### 5"}, None),
        ({"prompt": "P", "answer": 5, "level": "Level ?"}, None),
        ({"Problem": "P", "Answer": "5"}, None),
        ({"task": "P", "worked": BOX, "answer": "no"}, None),
    ],
)
def test_the_columns_of_common_data_sets_are_understood_and_others_can_be_named(row, level):
    names = {"problem_column": "task", "answer_column": "worked"} if "task" in row else {}
    read = A.to_problem(row, 0, "here", A.Config(**names))
    assert (read.problem, read.answer, read.level) == ("P", "5", level)


ROWS = [{"problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(5)]


@pytest.mark.parametrize(
    "name, write",
    [
        ("a.json", lambda path: path.write_text(json.dumps(ROWS))),
        ("a.jsonl", lambda path: Dataset.from_list(ROWS).to_json(path)),
        ("a.parquet", lambda path: Dataset.from_list(ROWS).to_parquet(path)),
        ("a.csv", lambda path: Dataset.from_list(ROWS).to_csv(path)),
        ("folder", lambda path: Dataset.from_list(ROWS).to_json(path / "train.jsonl")),
        ("bom.jsonl", lambda path: path.write_text("\n".join(map(json.dumps, ROWS)), "utf-8-sig")),
        ("saved", lambda path: DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(path)),
    ],
)
def test_files_and_folders_of_all_common_formats_are_read(name, write, tmp_path, base, capsys):
    (tmp_path / "folder").mkdir()
    write(tmp_path / name)
    config = A.Config(train_data=str(tmp_path / name), train_limit=3)
    assert [p.answer for p in A.load_problems(base, config, "train")] == ["1", "2", "3"]
    shown = capsys.readouterr().out
    assert ": 3 problems; 0 lack" in shown and "What is 0 + 1? -> 1" in shown


@pytest.mark.parametrize(
    "names, split, taken",
    [
        (("train", "test"), "train", 1),
        (("test", "train"), "test", 1),
        (("algebra", "geometry"), "train", 2),  # the configurations of one data set: all are read,
        (("main", "socratic"), "train", 1),  # but if one is the main one, that
    ],
)
def test_of_a_data_set_the_right_parts_are_read(names, split, taken, tmp_path, base):
    for name in names:
        row = {"question": name, "answer": "#### 1"}
        Dataset.from_list([row]).to_json(tmp_path / f"{name}.jsonl")
    if split not in names:
        head = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in names)
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n{head}---\n")
    config = A.Config(train_data=str(tmp_path), eval_data=str(tmp_path))
    assert [p.problem for p in A.load_problems(base, config, split)] == [*names][:taken]


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path, base, capsys):
    answers = ["5", None, "", "proof", "notfound", "6", "a sentence, and more"]
    rows = [{"problem": f"P{n}", "answer": answer} for n, answer in enumerate(answers)]
    rows += [{"problem": "Prove it."}, {"problem": "long " * 400, "answer": "5"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = A.Config(train_data=str(tmp_path / "a.jsonl"), train_limit=0)
    golds = [problem.answer for problem in A.load_problems(base, config, "train")]
    assert golds == ["5", "6", "a sentence, and more"]
    shown = capsys.readouterr().out
    assert "6 lack an answer" in shown and "1 answers can only be met word for word" in shown


GOOD_LINE = b'{"problem": "1 + 1?", "answer": "2"}\n'
NO_CONFIGS = [b"no json", b"[1]", b"5", b"null", b'{"steps": "40"}', b'{"steps": 4.5}', b"\0"]
NO_CONFIGS += [b'{"lr": null}', b'{"gradient_checkpointing": "no"}', b'{"learning_rate": 1}']
NO_CONFIGS += [b'{"steps": 3.0}', b'{"steps": true}', b'{"group": true}', b'{"seed": null}']


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("a.jsonl", b"", "holds no problems"),
        ("a.jsonl", GOOD_LINE + b"not json\n", "line 2: not JSON"),
        ("a.jsonl", GOOD_LINE.replace(b"1 + 1", b"\xff"), "line 1: not JSON in UTF-8"),
        ("a.jsonl", GOOD_LINE.replace(b"1 + 1", b"\\ud800"), "line 1: not JSON in UTF-8"),
        ("a.jsonl", b"[" * 99999 + b"\n", "line 1: not JSON"),
        ("a.jsonl", b'{"problem": "1 + 1?"}\n', "holds no problems .* 1 lack an answer"),
        ("a.jsonl", b'{"problem": {}, "answer": "2"}\n', "line 1: .* is not in .'answer'.$"),
        ("a.jsonl", b"[1]\n", "line 1: --problem-column"),
        ("a.json", b"", "cannot be read"),
        ("a.csv", b"x,y\n1,2\n", "row 0: --problem-column .*'x', 'y'"),
        ("a.parquet", b"PAR1" + b"noise" * 99, "cannot be read"),
        *(("config.json", content, "is not the config.json of a run") for content in NO_CONFIGS),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_it(name, content, complaint, tmp_path, capsys):
    file = tmp_path / name
    file.write_bytes(content)
    option = "--preset" if name == "config.json" else "--train-data"
    error = refused(capsys, "train", option, file, "--out", tmp_path / "out")
    assert re.search(complaint, error) and str(file) in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["baseline", "loss", "dtype", "parallel"])
def test_a_choice_that_is_none_is_refused_from_python_and_config_json_too(name):
    with pytest.raises(A.UsageError, match=f"--{name} must be one of .*, not typo"):
        A.check_options(A.Config(**{name: "typo"}), "train")


ONE_TURN = "{{ messages[0].content }}{% if messages[1:] %}{{ raise_exception('1') }}{% endif %}"
FORGETFUL = CHATML.replace("m.content", "m.content.split('</think>')[-1]")


def template(model: Path, text: str) -> None:
    """Give the model in the folder another chat template."""
    (model / "chat_template.jinja").write_text(text)


def test_the_marker_after_an_answer_ends_a_turn_but_in_a_problem_it_is_mere_text(base):
    tokenizer, model = copy.deepcopy(base.tokenizer), copy_of(base).model
    tokenizer.eos_token = tokenizer.pad_token  # as base models come
    model.generation_config.eos_token_id = tokenizer.pad_token_id
    assert {*A.turn_ends(model, tokenizer)} == {*base.end_ids, tokenizer.pad_token_id}
    ids = base.prompt_ids(A.Problem(0, "a<|end|>b", ""))
    assert ids.count(base.end_ids[0]) == 1 and "a< |end|>b" in base.tokenizer.decode(ids)


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda model: os.truncate(model / "model.safetensors", 50_000), "cannot be loaded"),
        (lambda model: save_file({}, model / "model.safetensors"), "its weights lack"),
        (lambda model: [f.unlink() for f in model.glob("*token*")], "no tokenizer"),
        (lambda model: (model / "config.json").unlink(), "model_type"),
        (lambda model: template(model, ONE_TURN), "no later turns are possible"),
        (lambda model: template(model, FORGETFUL), "later turns .* rewrites earlier ones"),
    ],
)
def test_a_broken_model_is_one_sentence_and_leaves_no_folder(damage, complaint, tmp_path, capsys):
    folder = Path(shutil.copytree(DATA / "base", tmp_path / "model"))
    damage(folder)
    error = refused(capsys, "train", "--model", folder, "--out", tmp_path / "out")
    assert re.search(complaint, error) and not (tmp_path / "out").exists()
    if "later turns" in error:  # without them it will do
        config = A.Config(model=str(folder), revisions=0)
        assert A.load_problems(A.load_policy(config), config, "test")
    else:
        assert str(folder) in error


def test_another_kind_of_model_without_chat_template_trains(tmp_path, base, capsys):
    folder = tmp_path / "gpt2"
    sizes = {"vocab_size": len(base.tokenizer), "n_positions": 512}
    random_policy("gpt2", **sizes, eos_token_id=base.end_ids[0]).model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    A.train(quick(model=str(folder), steps=1, max_new_tokens=8, out=str(tmp_path / "run")))
    assert "no chat template" in capsys.readouterr().out
    assert (tmp_path / "run" / "summary.json").exists()


# --- The command line -----------------------------------------------------------------------------


def test_eval_is_greedy_and_takes_the_newest_finished_run(
    finished, base, problems, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert "data/base" in told(capsys, "eval", "--eval-limit", 8, "--out", "first")
    greedily = played(base, problems[:8], temperature=0.0, max_new_tokens=64)
    rows = read_lines(Path("first/eval_results.jsonl"))
    assert [row["ids"] for row in rows] == [d.ids for d in greedily]
    assert SUMMARY <= set(json.loads(Path("first/eval_summary.json").read_text()))
    shutil.copytree(finished, "runs/older")
    assert str(Path("runs/older")) in told(capsys, "eval", "--eval-limit", 8)
    assert len([*Path("runs").glob("*-eval")]) == 1


def test_solve_prints_a_dialogue(capsys):
    asked = ["solve", "What is 47 * 36?", "--model", "data/base"]
    shown = told(capsys, *asked)
    assert all(part in shown for part in ("problem  What is 47 * 36?", "  solve ", "boxed"))
    assert "[cut off]" in told(capsys, *asked, "--temperature", 50, "--max-new-tokens", 8)


BAD_NUMBERS = "--lr 7; --beta1 0; --beta2 nan; --beta2 inf; --steps -1; --num-samples -1"
BAD_NUMBERS += f"; --steps {'9' * 400}; --temperature -1; --max-grad-norm 0"


@pytest.mark.parametrize(
    "command, complaint",
    [
        *((f"train {bad}", bad.split()[0] + " must be between") for bad in BAD_NUMBERS.split("; ")),
        ("train --temperature 0", "greedy"),
        ("train --train-data nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("train --problem-column tsak", "line 1: --problem-column tsak is not in ['problem'"),
        ("train --model nowhere", "nowhere: no such file"),
        ("train --device cuda:77", "cuda:77"),
        ("train --device abacus", "abacus"),
        ("train --v-star nowhere.jsonl", "nowhere.jsonl is missing or was made"),
        (f"train --v-star {DATA / 'dashboard.png'}", "was made with other weights"),
        ("train --loss gpro", "--loss must be one of astarpo, pg, grpo, ppo, awr, not gpro"),
        ("train --loss grpo", "needs --group above 1"),
        ("train --loss ppo --num-samples 0", "--num-samples 0 leaves out stage 1"),
        ("train --drop-unsolved --num-samples 0", "--num-samples 0 leaves out stage 1"),
        ("solve 1+1 --search 9 --num-samples 0", "--num-samples 0 leaves out stage 1"),
        ("train --parallel fsdp --lora 4", "use ddp"),
        ("train --max-new-tokens 5000", "the model's context has"),
        ("eval --model data/base --samples 4", "--samples needs --temperature"),
        ("eval --model data/base --compare nowhere", "nowhere: no such file"),
        ("solve 1+1 --model data/base --max-new-tokens 5000", "the model's context has"),
        ("solve \n", "the problem is empty"),
        (f"solve {'1+1+' * 400} --model data/base", "the model's context has"),
    ],
)
def test_bad_options_are_one_sentence_and_leave_nothing_behind(
    command, complaint, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert complaint in refused(capsys, *command.split(" "))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("command", ["train", "eval"])
def test_nothing_is_overwritten(command, finished, tmp_path, capsys):
    (tmp_path / "file").touch()
    before = left_by(finished)
    for out in (finished, tmp_path / "file", tmp_path / "file" / "below"):  # seen before the model
        error = refused(capsys, command, "--model", "nowhere", "--out", out)
        assert ("holds files already" if out == finished else "cannot be written") in error
    assert before == left_by(finished)


@pytest.mark.parametrize("command", ["train", "eval", "solve"])
def test_help_shows_every_option_with_a_sentence_and_its_default(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit, match="0"):
        A.main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    changed = {} if command == "train" else {"eval_limit": 0, "model": "the newest finished run"}
    for item in dataclasses.fields(A.Config):
        default, flag = changed.get(item.name, item.default), item.name.replace("_", "-")
        text = item.metadata["help"] + f" (default: {default}" * (default not in ("", None))
        found = re.search(rf"--{flag}[ ,][^()]* {re.escape(text)}", shown)
        assert bool(found) == (command in item.metadata["on"]), flag


def chosen(command: str) -> A.Config:
    """The options that a command line stands for."""
    return A.chosen_config(A.parse(command.split()))


def test_given_options_count_before_a_preset_which_may_be_the_options_of_a_run(finished, tmp_path):
    file = f" --preset {finished / 'config.json'}"
    assert chosen("train") == A.Config()
    assert chosen("train --preset a-po").batch_size == 256
    assert chosen("train --preset a-po --batch-size 3").batch_size == 3
    assert chosen("train" + file).seed == 5 and chosen("train" + file).out == ""
    pag = chosen("eval --preset pag")
    assert (pag.model, pag.eval_limit) == (chosen("eval").model, 0) and pag.max_new_tokens == 1024
    assert A.check_options(chosen("eval" + file), "eval").temperature == 0
    (tmp_path / "some.json").write_text('{"steps": 7, "lr": 1}')
    assert chosen(f"train --preset {tmp_path / 'some.json'}") == A.Config(steps=7, lr=1.0)
    for preset in A.PRESETS.values():
        A.check_options(preset, "train")
    with pytest.raises(A.UsageError, match="is for evaluation"):
        A.train(A.Config(out=os.devnull, top_p=0.9))


def test_ctrl_c_keeps_what_was_learned_and_until_then_nobody_else_goes_on(tmp_path, capsys):
    folder = tmp_path / "run"
    small = "--steps 5000 --train-limit 8 --batch-size 8 --num-samples 1 --eval-limit 4"
    command = [sys.executable, A.__file__, "train", "--out", str(folder), *small.split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    assert "is still going on" in refused(capsys, "train", "--resume", folder)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and len(error.strip().splitlines()) == 1
    assert f"stopped; go on with 'train --resume {folder}'" in error
    AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    assert len(read_lines(folder / "v_star.jsonl")) == 9


# --- Runs that survive ----------------------------------------------------------------------------
# Children are forked, so that they can be killed for good (SIGKILL) without taking pytest along.


def forked(*works: Callable[[], object]) -> list[int]:
    """Do each work in a process of its own: their exit statuses, minus the signal if killed."""
    children = [multiprocessing.get_context("fork").Process(target=work) for work in works]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


def when_touched(folder: str, act: Callable[[str], object]) -> None:
    """From now on, act on every change that this process makes to files below a folder."""

    def watch(event: str, arguments: tuple) -> None:
        writes = event == "open" and arguments[1] not in ("r", "rb", None)
        writes |= event in ("os.rename", "os.mkdir", "os.remove", "shutil.rmtree")
        if writes and str(arguments[0]).startswith(folder):
            act(str(arguments[0]))

    sys.addaudithook(watch)


def short_run(folder: Path, moment: int = 0, *options: str) -> None:
    """In a child: a run with everything in it, from its beginning or from where it was killed, to
    its end or until it touches its folder for the `moment`-th time: then it is killed."""
    touched = itertools.count(1)
    kill = lambda _: next(touched) == moment and os.kill(os.getpid(), signal.SIGKILL)
    when_touched(str(folder), kill)
    A.PART, sys.modules["matplotlib"] = 4, None  # stage 1 in parts; no pictures
    if (folder / "config.json").exists():
        sys.exit(A.main(["train", "--resume", str(folder)]))
    small = "--steps 5 --batch-size 3 --minibatches 2 --train-limit 6 --eval-limit 6 "
    small += "--num-samples 2 --max-new-tokens 10 --update-tokens 1 --threads 1 --lr 1e-3 "
    small += "--save-every 2 --eval-every 2 --baseline value --out"
    sys.exit(A.main(["train", *options, *small.split(), str(folder)]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, Any]:
    """What the short run leaves when nobody kills it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert forked(functools.partial(short_run, folder)) == [0]
    return left_by(folder)


SOAK = "ASTARPO_SOAK" in os.environ  # kill it at each of the 59 moments when it touches its folder
MOMENTS = range(1, 60) if SOAK else (3, 8, 38)  # at once, in stage 1, in the second save


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_and_killed_again_ends_as_if_nothing_had_happened(
    moment, undisturbed, tmp_path
):
    folder = tmp_path / "run"
    assert forked(functools.partial(short_run, folder, moment)) == [-signal.SIGKILL]
    for later in (5, 0):  # again, while it goes on; then in peace (if it has not ended yet)
        if not (folder / "summary.json").exists():
            assert forked(functools.partial(short_run, folder, later)) in ([-signal.SIGKILL], [0])
    assert left_by(folder) == undisturbed


def test_a_killed_stage_one_goes_on_after_its_last_whole_part(finished, tmp_path, monkeypatch):
    folder, begun = (
        unfinished(finished, tmp_path / "run", "state.pt"),
        tmp_path / "run/v_star.jsonl",
    )
    head, *rows = begun.read_text().splitlines(keepends=True)
    marked = [row.replace('"subject": "', '"subject": "kept ') for row in rows]
    begun.write_text("".join([head, *marked[:7], marked[7][:-9]]))
    monkeypatch.setattr(A, "PART", 3)
    assert A.main(["train", "--resume", str(folder)]) == 0
    assert begun.read_text() == "".join([head, *marked[:6], *rows[6:]])
    assert numbers_of(folder) == numbers_of(finished)


def cut_off(path: Path) -> None:
    """What a full disk, or a kill, leaves of the last line."""
    os.truncate(path, path.stat().st_size - 9)


def reweighed(run: Path) -> None:
    """The model that a run began with has other weights now."""
    about = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**about, "model": str(run / "checkpoint")}))


OLD_STATE = {"learned": {}, "metrics": [], "scaler": {}}


@pytest.mark.parametrize(
    "damage, status, said",
    [
        (lambda run: cut_off(run / "v_star.jsonl"), 0, "v_star.jsonl, line 17: cut off"),
        (lambda run: (run / "v_star.jsonl").unlink(), 0, "going on after step 2"),
        (lambda run: (run / "state.pt").unlink(), 0, "V* of 8 problems"),
        (lambda run: cut_off(run / "metrics.jsonl"), 0, "going on after step 2"),
        (lambda run: os.truncate(run / "state.pt", 2_000_000), 2, "state.pt is damaged"),
        (lambda run: torch.save(OLD_STATE, run / "state.pt"), 2, "state.pt is damaged"),
        (reweighed, 2, "was made with other weights"),
    ],
)
def test_what_is_half_done_is_done_again_and_what_is_damaged_is_refused_in_one_sentence(
    damage, status, said, finished, tmp_path, capsys
):
    folder = unfinished(finished, tmp_path / "run")
    damage(folder)
    resume = ("train", "--resume", folder)
    assert said in (refused(capsys, *resume) if status else told(capsys, *resume))
    expected = left_by(finished)
    if status:
        del expected["summary.json"]
    assert left_by(folder) == expected


def test_a_run_goes_on_with_its_own_options_but_for_those_that_are_given(
    finished, tmp_path, capsys
):
    run = unfinished(finished, tmp_path / "run", "state.pt")
    assert "--resume" in refused(capsys, "train", "--out", run)
    anew = "--rollout-tokens 999 --update-tokens 99 --gradient-checkpointing --device cpu"
    told(capsys, "train", "--resume", run, *anew.split())
    assert_close(numbers_of(run), numbers_of(finished))
    config = A.read_config(run / "config.json")
    assert (config.seed, config.rollout_tokens, config.update_tokens) == (5, 999, 99)
    begun = numbers_of(run)
    told(capsys, "train", "--resume", run, "--steps", 3)  # a finished one, too: it takes more steps
    assert numbers_of(run)[:2] == begun and numbers_of(run)[2]["step"] == 3
    assert "is not the config.json of a run" in refused(capsys, "train", "--resume", "nowhere")


def assert_close(ours: list[dict], theirs: list[dict]) -> None:
    """The metrics of two runs, up to rounding."""
    for one, other in zip(ours, theirs, strict=True):
        assert {k for k in one if one[k] is None} == {k for k in other if other[k] is None}
        one, other = ({k: v or 0 for k, v in row.items()} for row in (one, other))
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("moment", ["loading", "sampling", "updating"])
def test_out_of_memory_is_one_sentence_with_the_remedies_and_the_run_goes_on(
    moment, finished, tmp_path, capsys
):
    folder = tmp_path / "run"
    begun = (folder / "config.json").exists
    now = {"loading": lambda: True, "sampling": begun, "updating": torch.is_grad_enabled}[moment]

    def card(*_: object) -> None:
        if now():
            raise torch.OutOfMemoryError("more than this card has")

    with torch.nn.modules.module.register_module_forward_pre_hook(card):
        assert A.main(["train", *SMALL.split(), str(folder)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("astarpo: out of memory") and len(error.splitlines()) == 1
    for remedy in ("rollout-tokens", "update-tokens", "gradient-checkpointing", "resume"):
        assert f"--{remedy}" in error
    assert folder.exists() == (moment != "loading")
    if moment == "updating":
        told(capsys, "train", "--resume", folder)
        assert left_by(folder) == left_by(finished)


def test_of_two_runs_that_want_one_folder_the_second_is_refused_after_the_loading(tmp_path, base):
    dated = speaking(base, "{{ strftime_now('%f') }}" + TEMPLATE)  # other prompts each time
    config, problems = A.Config(out=str(tmp_path / "run")), A.load_problems(base, quick(), "train")
    with A.Run(config, False) as first, A.Run(config, False) as second:  # both find it free
        first.begin(dated, problems)
        with pytest.raises(A.UsageError, match="is still going on"):
            second.begin(dated, problems)
    A.Run(config, True).begin(dated, problems)  # the first has let go
    assert first.mark == second.mark  # they know each other's stage 1, though the time has changed


# --- Large models, several devices ----------------------------------------------------------------


def test_lora_learns_beside_frozen_weights_that_remain_the_reference(base, problems, tmp_path):
    pytest.importorskip("peft")  # an optional package
    config = quick(lora=4, lr=1e-2, max_new_tokens=24, baseline="value")
    run = tmp_path / "run"
    A.train(dataclasses.replace(config, out=str(run)))
    assert [m["kl"] == 0 for m in numbers_of(run)] == [True, False]
    policy, plain = A.load_policy(config), copy_of(base)
    names = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert names and all("lora" in name for name in names)
    plain.model.load_adapter(str(run / "checkpoint"))
    merged = A.load_policy(quick(model=str(run)))
    batch = A.collate(played(base, problems[:3]), defaultdict(float), base.device)
    with torch.no_grad():
        untouched, reference, learned, reloaded = (
            A.token_logps(p, batch.ids, batch.scored)
            for p in (base, A.freeze(policy), plain, merged)
        )
    assert torch.equal(reference, untouched) and not torch.allclose(learned, untouched, atol=1e-3)
    assert torch.allclose(reloaded, learned, atol=1e-4)
    with pytest.raises(A.UsageError, match="start from its base"):
        A.load_policy(quick(model=str(run), lora=4))
    again = unfinished(run, tmp_path / "again", "checkpoint/adapter_model.safetensors")
    assert A.main(["train", "--resume", str(again)]) == 0
    assert left_by(again) == left_by(run)


def test_recomputed_activations_give_the_same_gradient(base, problems):
    policy, dialogues = A.load_policy(quick(gradient_checkpointing=True)), played(base, problems)
    assert played(policy, problems) == dialogues
    kept, recomputed = (learner_of(p, base, lr=1.0) for p in (base, policy))
    calls: list[int] = []
    layer = recomputed.policy.model.get_decoder().layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    config = A.Config(temperature=1.0, update_tokens=10_000)
    seen = [A.update(learner, dialogues, config) for learner in (kept, recomputed)]
    assert seen[0] == pytest.approx(seen[1]) and len(calls) == 2  # the pass, and its repetition
    assert torch.allclose(weights_of(kept), weights_of(recomputed), atol=1e-6)


def together(work: Callable[[], object], second: Callable[[], object] = int) -> list[int]:
    """Do `work` in two processes that know of each other, in the second of them after what it does
    alone; their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def process(rank: str) -> None:
        os.environ |= {**address, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        if rank == "1":
            second()
        work()

    return forked(*(functools.partial(process, rank) for rank in "01"))


def dies_in_step_3() -> None:
    """By a kill in the middle of an update."""
    passes = itertools.count(1)

    def count(module: torch.nn.Module, _: object) -> None:
        learns = torch.is_grad_enabled() and isinstance(module, torch.nn.Embedding)
        if learns and next(passes) == 5:  # two a step: one of them only keeps in step
            os.kill(os.getpid(), signal.SIGKILL)

    torch.nn.modules.module.register_module_forward_pre_hook(count)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_make_the_run_of_one_also_when_one_of_them_is_killed(
    parallel, undisturbed, tmp_path, capfd
):
    def work() -> None:
        short_run(tmp_path / "run", 0, "--parallel", parallel)

    def fails_if_it_writes() -> None:
        when_touched("/", lambda path: path == os.devnull or print(path) or os._exit(3))

    assert together(work, second=fails_if_it_writes) == [0, 0]
    assert capfd.readouterr().out.count("written to") == 1
    calm = left_by(tmp_path / "run")
    assert_close(calm["metrics.jsonl"], undisturbed["metrics.jsonl"])
    assert calm.keys() == undisturbed.keys()
    assert calm["eval_results.jsonl"] == undisturbed["eval_results.jsonl"]
    if parallel == "ddp" and not SOAK:
        return  # as of one process, the state is what the first one holds
    shutil.rmtree(tmp_path / "run")
    assert together(work, second=dies_in_step_3) == [1, -signal.SIGKILL]
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 2
    assert together(work) == [0, 0]
    assert left_by(tmp_path / "run") == calm


@pytest.mark.parametrize(
    "command, complaint",
    [
        ("eval --model nowhere", "nowhere: no such file or folder"),
        ("train --resume nowhere", "is not the config.json of a run"),
        ("train --batch-size 3 --group 2", "--batch-size must be a multiple of --group 2"),
    ],
)
def test_of_several_processes_one_says_what_is_wrong(command, complaint, capfd):
    assert together(lambda: sys.exit(A.main(command.split()))) == [2, 2]
    assert capfd.readouterr().err.count(complaint) == 1


# --- How sure can we be ---------------------------------------------------------------------------


def test_intervals_are_those_published_and_samples_of_one_problem_are_no_more_problems():
    published = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]
    for successes, n, low, high in published:  # by Newcombe (1998), table I, method 3
        right = np.arange(n) < successes
        assert A.wilson(right) == pytest.approx([low, high], abs=5e-5)
        assert A.wilson(~right) == pytest.approx([1 - high, 1 - low], abs=5e-5)
    for samples in (1, 8):
        made = [d for d in solved(*[True] * 5, *[False] * 5) for _ in range(samples)]
        seen = A.summarize(made, samples)
        assert seen["n"] == 10 and seen["acc_t1_ci"] == A.wilson(np.arange(10) < 5)


def test_an_interval_of_shares_covers_their_mean_about_95_times_in_100():
    rng = np.random.default_rng(0)
    intervals = [A.wilson(rng.binomial(8, rng.beta(2, 1, 60)) / 8) for _ in range(300)]
    assert 0.90 < np.mean([low < 2 / 3 < high for low, high in intervals]) < 0.98


def solved(*right: bool) -> list[A.Dialogue]:
    """A dialogue about each of some problems, solved or not at the first attempt."""
    return [dialogue(i, [str(int(correct))], [True]) for i, correct in enumerate(right)]


@pytest.mark.parametrize("better, worse", [(0, 0), (3, 3), (1, 9), (4, 1), (0, 5)])
def test_a_comparison_asks_how_often_a_coin_would_be_as_uneven(better, worse):
    both = [True, False] * 5  # these do not say which is better
    ours = solved(*both, *[True] * better, *[False] * worse)
    found = A.paired(ours, solved(*both, *[False] * better, *[True] * worse))["acc_t1"]
    n = better + worse
    flips = itertools.product((0, 1), repeat=n)
    uneven = sum(abs(2 * sum(flip) - n) >= abs(better - worse) for flip in flips)
    assert found["p"] == pytest.approx(uneven / 2**n)
    assert (found["better"], found["worse"]) == (better, worse)
    assert found["difference"] == pytest.approx((better - worse) / (10 + n))
    assert found["ci"][0] <= found["difference"] <= found["ci"][1]


@pytest.mark.parametrize("n, correct", [(5, 0), (5, 2), (6, 3), (6, 6), (1, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n, correct):
    seen = A.voting([dialogue(0, ["1" if i < correct else "2"], [None]) for i in range(n)], n)
    for k in {1, 2, 4, n} & set(range(n + 1)):
        subsets = list(itertools.combinations(range(n), k))  # the first `correct` ones are right
        share = sum(min(chosen) < correct for chosen in subsets) / len(subsets)
        assert seen[f"pass@{k}"] == pytest.approx(share)


def test_votes_go_by_value_and_pag_counts_only_what_it_accepted():
    assert A.majority(["2", "\\frac{3}{1}", "3", "2", "3"]) in ("3", "\\frac{3}{1}")
    assert A.majority(["5", "4", "4", "5"]) == "5"  # a tie: the earlier one
    assert A.majority([None, None, "6"]) == "6" and A.majority([None, None]) is None
    doubted = [dialogue(0, ["7", "8"], [verdict]) for verdict in (False, None)]
    trusted = [dialogue(0, ["1"], [True])]
    unchecked = [dialogue(1, ["1", "7"], [False])] * 3  # accepted nothing: as if nobody had checked
    expected = {"pass@1": 2 / 3, "pass@2": 5 / 6, "pass@3": 1, "maj@3": 0.5, "pag@3": 1}
    assert A.voting([*doubted, *trusted, *unchecked], 3) == pytest.approx(expected)


def test_eval_samples_votes_and_compares(finished, tmp_path, capsys):
    options = ["--samples", "3", "--temperature", "0.6", "--top-p", "0.95", "--eval-limit", "8"]
    models = ["--model", "data/base", "--compare", finished]
    shown = told(capsys, "eval", *options, *models, "--out", tmp_path / "e")
    summary = json.loads((tmp_path / "e" / "eval_summary.json").read_text())
    assert {"pass@1", "pass@2", "pass@3", "maj@3", "pag@3", "compare"} <= set(summary)
    assert summary["n"] == 8 and summary["pass@1"] == pytest.approx(summary["acc_t1"])
    rows = read_lines(tmp_path / "e" / "eval_results.jsonl")
    assert [row["sample"] for row in rows] == [0, 1, 2] * 8
    assert len({tuple(row["ids"]) for row in rows}) > 8
    assert "maj@3" in shown and "problems better" in shown
    assert all(len(line) < 80 or str(tmp_path.parent) in line for line in shown.splitlines())


# --- Looking on while it trains -------------------------------------------------------------------


def test_evaluations_on_the_way_keep_the_best_model(tmp_path):
    wild = {"steps": 6, "lr": 0.01, "warmup": 12}  # learns something, then forgets everything
    A.train(quick(**wild, eval_every=2, seed=2, out=str(tmp_path / "run")))
    lines = read_lines(tmp_path / "run" / "eval.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6] and set(SUMMARY) <= set(lines[0])
    finals = [line["acc_final"] for line in lines]
    assert finals[0] < finals[1] > finals[2]
    best = quick(model=str(tmp_path / "run" / "best"), out=str(tmp_path / "best"))
    assert A.evaluate(best)["acc_final"] == finals[1]


def made_metrics(**changes: object) -> list[dict]:
    """Five healthy training batches, but for the changes."""
    healthy = dict.fromkeys(METRICS, 0.5) | {"response_tokens": 20.0, "skipped": 0.0}
    healthy |= {"verifier_recall_right": 0.9, "verifier_recall_wrong": 0.6}
    return [healthy | {"step": step} | changes for step in range(1, 6)]


SICK = [
    ({"truncated_rate": 0.8}, "truncated_rate is 0.80: responses are cut off"),
    ({"no_answer_rate": 0.7}, "no_answer_rate is 0.70: attempts hold no answer"),
    ({"skipped": 0.5, "loss": None, "kl": None}, "skipped is 0.50: loss or gradient is not finite"),
    ({"kl": 45.0}, "kl_per_token is 2.25: the policy is running away"),
    ({"verifier_recall_right": 1.0, "verifier_recall_wrong": 0.01}, "0.99: it says one thing only"),
    ({"verifier_recall_right": 0.0, "verifier_recall_wrong": 1.0}, "1.00: it says one thing only"),
    ({}, ""),
    ({"verifier_recall_wrong": None}, ""),  # nothing was wrong: nothing is known
]


@pytest.mark.parametrize("changes, sentence", SICK)
def test_each_symptom_is_explained_once(changes, sentence, capsys):
    told: set[str] = set()
    for _ in range(3):
        A.diagnose(made_metrics(**changes), told)
    shown = " ".join(capsys.readouterr().out.split())
    assert sentence in shown and len(told) == shown.count("! ") == bool(sentence)


def test_stage_one_says_what_can_be_learned(capsys):
    dialogues = solved(True, False, False, False)
    A.report_stage_one(dialogues, A.baselines(dialogues, A.Config()), set())
    shown = " ".join(capsys.readouterr().out.split())
    expected = ["0.0 to 0.1 3 ####", "0.9 to 1.0 1 ####", "solve role, mean 0.25"]
    expected += ["never solved 75%, always solved 25%", "pass@1 of the reference 0.25"]
    assert all(part in shown for part in expected)


def test_a_run_whose_gradients_are_never_finite_stops_with_its_last_good_model(
    base, tmp_path, monkeypatch, capsys
):
    loss = A.astarpo_loss
    monkeypatch.setattr(A, "astarpo_loss", lambda *tensors: loss(*tensors) * math.nan)
    with pytest.raises(A.RunError, match="in 5 steps running"):
        A.train(quick(steps=9, max_new_tokens=8, out=str(tmp_path / "run")))
    assert capsys.readouterr().out.count("is not finite") == 1
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [m["skipped"] for m in metrics] == [1.0] * 5 and metrics[0]["loss"] is None
    saved = A.load_policy(A.Config(model=str(tmp_path / "run" / "checkpoint"), threads=1))
    assert all(map(torch.equal, saved.model.parameters(), base.model.parameters()))


# --- Pictures -------------------------------------------------------------------------------------


def test_runs_are_drawn_into_six_panels_and_those_of_several_seeds_into_a_band(
    finished, tmp_path, monkeypatch, capsys
):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn, save = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda f, out: (drawn.append(f), save(f, out)))
    assert (finished / "dashboard.png").stat().st_size > 20_000
    for name, changes in {"a": {}, "b": {"seed": 6}, "c": {"seed": 7, "lr": 0.5}}.items():
        run = shutil.copytree(finished, tmp_path / name)
        config = json.loads((run / "config.json").read_text()) | changes
        (run / "config.json").write_text(json.dumps(config))
        rows = [{"step": step, "loss": config["seed"] + step} for step in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told(capsys, "plot", *(tmp_path / name for name in "abc"), "--out", tmp_path / "all.png")
    axes = drawn[0].axes
    assert len(axes) == 7 and all(axis.get_ylabel() for axis in axes)  # six, and KL's own scale
    bands = [band.get_datalim(axes[0].transData).intervaly.tolist() for band in axes[0].collections]
    assert bands == [[6.5, 7.5], [8.5, 8.5]]  # of the losses: two seeds, then one
    assert [t.get_text() for t in drawn[0].legends[0].get_texts()] == ["lr 0.0003", "lr 0.5"]
    v_star = [bar.get_height() for bar in axes[5].patches]
    assert sum(v_star) == 3 * 8  # every problem of every run has its place


def test_a_picture_needs_a_run_and_matplotlib(finished, tmp_path, monkeypatch, capsys):
    assert "is not the config.json of a run" in refused(capsys, "plot", tmp_path)
    run = shutil.copytree(finished, tmp_path / "new")
    (run / "metrics.jsonl").unlink()  # before its first step there is little to see
    assert "written to" in told(capsys, "plot", run, "--out", tmp_path / "new.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused(capsys, "plot", finished)


# --- Our own problems and the base ----------------------------------------------------------------

spec = importlib.util.spec_from_file_location("make", DATA / "make.py")
make: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
TOKENIZER = make.build_tokenizer()


def solve_again(problem: str) -> str:
    """The answer, found from the problem's words alone: nothing here comes from the generator."""
    n = [Fraction(number) for number in re.findall(r"\d+", problem)]
    if m := re.fullmatch(r"Solve (\d*)x ([-+]) \d+ = \d+ for x\.", problem):
        return str((n[-1] - n[-2] if m[2] == "+" else n[-1] + n[-2]) / int(m[1] or 1))
    if "bags of" in problem:  # two steps
        return str(n[0] * n[1] - n[2] if "gives away" in problem else n[0] + n[1] * n[2])
    words = [(r" / ", n[0] / n[1]), (r" - |gives away|sold", n[0] - n[1])]
    words += [(r" \+ |buys|in another", n[0] + n[1]), (r" \* |boxes of|each", n[0] * n[1])]
    return str(next(result for word, result in words if re.search(word, problem)))


def largest(problem: str) -> tuple[int, ...]:
    return tuple(sorted(map(int, re.findall(r"\d+", problem)))[-2:])


def test_the_shipped_problems_are_what_is_made_right_and_various(tmp_path):
    for nonsense in ("", "problems --seed -1", "base --threads 0", "base --folder nowhere"):
        with pytest.raises(SystemExit, match="2"):
            make.main(nonsense.split())
    make.main(["problems", "--folder", str(tmp_path)])
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()
        rows = read_lines(DATA / name)
        for row in rows:
            right = solve_again(row["problem"])
            assert is_equiv(row["answer"], right) and verify(row["solution"], right), row
        assert len({row["problem"] for row in rows}) == 2000
        assert len({row["subject"] for row in rows}) >= 4
        assert {row["level"] for row in rows} == {1, 2, 3, 4, 5}
        assert any("frac" in row["answer"] for row in rows)


def false_sums(text: str) -> list[Any]:
    """The steps of a solution, like 12 + 30 = 42 or 34 / 6 = 5 r 4, that are not true."""
    division = r"(\d+) / (\d+) = (\d+) r (\d+), "
    parts = [[*map(int, found)] for found in re.findall(division, text)]
    rest = re.sub(r"\\boxed\{(\d+)\}", r"\1", re.sub(division, "", text))
    sides = re.findall(r"(\d[-+*\d ]*) = (?=(\d[-+*\d ]*))", rest)
    wrong = [(a, b, q, r) for a, b, q, r in parts if divmod(a, b) != (q, r)]
    return wrong + [pair for pair in sides if not is_equiv(*pair)]


@pytest.mark.parametrize("habits", [False, True])
def test_demonstrations_teach_true_steps_some_haste_and_nothing_that_is_held_out(habits, base):
    held_out = {largest(row["problem"]) for row in read_lines(DATA / "test.jsonl")}
    assert not held_out & {largest(row["problem"]) for row in read_lines(DATA / "train.jsonl")}
    assert make.reserved(47, 36) and make.reserved(36, 47)  # the README's
    hasty: dict[bool, list[bool]] = {True: [], False: []}  # by whether the problem is easy
    rng = random.Random(3)
    for _ in range(1500):
        turns = make.demonstration(rng, habits)
        (_, request, _), (_, attempt, learn), _, (_, judgment, _), *_ = turns
        assert largest(request) not in held_out
        for _, text, learnt in turns[1::2]:
            pairs = re.findall(r"(?<!\d)(\d+) [-+*/] (?=(\d+))", text)
            assert not held_out & {tuple(sorted(map(int, pair))) for pair in pairs}, text
            assert not learnt or not false_sums(text), text
        right = verify(attempt, solve_again(request.split("\n")[0]))
        assert learn or not right
        assert A.parse_judgment(judgment) is right or not judgment.startswith(make.CHECK)
        if learn:
            hasty[bool(re.match(r"What is \d+ [-+]", request))].append(attempt[0] == "\\")
        messages = [{"role": role, "content": text} for role, text, _ in turns]
        ids, learn_it = zip(*make.demo_ids(TOKENIZER, turns))
        assert [*ids] == base.tokenizer.apply_chat_template(messages, return_dict=False)
        learnt = TOKENIZER.decode([i for i, learnt in zip(ids, learn_it) if learnt])
        assert learnt == "".join(f"{text}<|end|>" for _, text, learnt in turns if learnt)
    assert not habits or all(0.63 < np.mean(group) < 0.77 for group in hasty.values())


def test_a_base_is_made_the_same_again_and_like_the_shipped_one(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        make.make_base(folder, seed=0, steps=2)
    for file in (DATA / "base").iterdir():
        made = (first / "base" / file.name).read_bytes()
        assert made == (second / "base" / file.name).read_bytes()
        assert made == file.read_bytes() or file.suffix == ".safetensors"
        assert len(made) == file.stat().st_size < 4e6


def test_attempts_are_as_many_right_as_wrong_or_it_says_what_lacks(tmp_path):
    shutil.copytree(DATA / "base", tmp_path / "base")
    lines = (DATA / "test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "test.jsonl").write_text("".join(lines[:40]))
    make.make_attempts(tmp_path, seed=0, wanted=4)
    correct = [row["correct"] for row in read_lines(tmp_path / "attempts.jsonl")]
    assert sorted(correct) == [False] * 4 + [True] * 4
    with pytest.raises(SystemExit, match="lack"):
        make.make_attempts(tmp_path, seed=0, wanted=40)


# --- Benchmarks: ASTARPO_BENCH=1 pytest -s -k bench -----------------------------------------------
# What is compared takes turns, so that a busy moment of the machine meets all of it alike, and of
# the repeats the median counts. On one thread. Compare the ratios: the rest is the machine's.

BATCH, GROUP, STEPS, REPEATS, GOAL = 64, 8, 8, 3, 0.9  # GROUP: responses a problem in stage 1
bench = pytest.mark.skipif("ASTARPO_BENCH" not in os.environ, reason="takes minutes")


def alternate(repeats: int, **calls: Callable[[], object]) -> dict[str, Any]:
    """Median seconds of each call, or of what it says it took (a float or several). They take
    turns, and the first round only warms up."""
    found: dict[str, list[Any]] = {name: [] for name in calls}
    for name, call in [*calls.items()] * (repeats + 1):
        start = time.perf_counter()
        told = call()
        found[name].append(told if isinstance(told, float | tuple) else time.perf_counter() - start)
    return {name: np.median(seconds[1:], axis=0) for name, seconds in found.items()}


def table(capsys: Any, what: str, **found: float) -> None:
    """Print a Markdown table, with how many times the first number each is."""
    first = next(iter(found.values()))
    cells = (f"{x:,.3f} ({x / first:.2f})" for x in found.values())
    capsys.readouterr()  # we want nothing of what was printed before
    with capsys.disabled():
        print(f"\n{' | '.join([what, *found])}\n{'---|' * len(found)}---\n | {' | '.join(cells)}")


def ours(out: Path, **options: object) -> tuple[float, ...]:
    """Train into a new folder: seconds of stage 1 and, of a step, of sampling and of updating."""
    sizes = {"batch_size": BATCH, "steps": STEPS, "eval_limit": 1, "rollout_tokens": 2**17}
    A.train(A.Config(out=str(out), threads=1, **sizes | options))
    one = (out / "v_star.jsonl").stat().st_mtime - (out / "config.json").stat().st_mtime
    steps = read_lines(out / "metrics.jsonl")
    parts = [(s["seconds_sampling"], s["seconds_updating"]) for s in steps]
    return one, *np.median(parts, axis=0)


def theirs(name: str, base: A.Policy, n: int, steps: int, lr: float) -> Any:
    """TRL's trainer of that name with our first n problems, checker, sizes and optimizer."""
    library = pytest.importorskip("trl.experimental.a2po" if name == "A2PO" else "trl")
    tokenizer = AutoTokenizer.from_pretrained(DATA / "base", padding_side="left")
    problems = A.load_problems(base, A.Config(train_limit=n), "train")
    rows = [{"prompt": tokenizer.decode(base.prompt_ids(p)), "answer": p.answer} for p in problems]
    own = {"filter_all_incorrect": False} if name == "A2PO" else {}  # GROUP is the default of both
    config = getattr(library, name + "Config")(
        tempfile.mkdtemp(), learning_rate=lr, lr_scheduler_type="constant_with_warmup",
        warmup_steps=3, max_steps=steps, per_device_train_batch_size=BATCH, top_k=0, use_cpu=True,
        max_completion_length=64, gradient_checkpointing=False, bf16=False, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, **own,
    )  # fmt: skip
    return getattr(library, name + "Trainer")(
        copy_of(base).model,
        lambda completions, answer, **_: [float(verify(*x)) for x in zip(completions, answer)],
        config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip


class Stopwatch(TrainerCallback):
    """Ends TRL's training when GOAL of 300 held-out problems are solved; evaluation is free."""

    def __init__(self, base: A.Policy) -> None:
        self.base, self.seconds = base, -time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.seconds += time.perf_counter()
        policy = dataclasses.replace(self.base, model=model)
        config = A.Config(temperature=0.0, revisions=0, eval_limit=300)
        seen, _ = A.evaluate_policy(policy, A.load_problems(policy, config, "test"), config)
        control.should_training_stop |= seen["acc_t1"] >= GOAL
        self.seconds -= 0 if control.should_training_stop else time.perf_counter()


@bench
@torch.inference_mode()
@pytest.mark.parametrize("n", [BATCH, BATCH * GROUP])
@pytest.mark.parametrize("lengths", ["as they end", "all of full length"])
def test_bench_sampling(base, capsys, n, lengths):
    """Tokens a second of transformers' `generate` and of `sample`, on the same prompts."""
    policy = base if lengths == "as they end" else dataclasses.replace(base, end_ids=())
    config = A.Config(temperature=1.0, train_limit=n)
    prompts = [base.prompt_ids(p) for p in A.load_problems(base, config, "train")]
    u = A.uniform(0, np.arange(n)[:, None], np.arange(64))
    ids = A.pad_sequence([torch.tensor(p) for p in prompts], True, -1, padding_side="left")
    plain = {"do_sample": True, "top_k": 0, "max_new_tokens": 64, "pad_token_id": base.end_ids[0]}
    plain |= {"attention_mask": (ids >= 0).long(), "eos_token_id": [*policy.end_ids, -1]}
    work = {
        "generate": lambda: base.model.generate(ids.clamp(min=0), **plain)[:, ids.shape[1] :],
        "here": lambda: A.sample(policy, prompts, u, config),
    }
    ended = torch.isin(work["generate"](), torch.tensor([*policy.end_ids, -1]))
    tokens = int((~ended).sum() + ended.any(1).sum()), sum(map(len, work["here"]()))
    speeds = {name: n / s for n, (name, s) in zip(tokens, alternate(REPEATS, **work).items())}
    table(capsys, f"tokens/s, {n} responses {lengths}", **speeds)


@bench
def test_bench_stages(base, tmp_path, capsys):
    """Seconds of both stages, for solve turns and for whole dialogues, and of TRL's trainers."""
    n, new = BATCH * GROUP, (tmp_path / str(i) for i in itertools.count())
    a2po, grpo = (theirs(name, base, n, STEPS, lr=1e-9) for name in ("A2PO", "GRPO"))
    solve, whole, values, *steps = alternate(
        REPEATS,  # with so small a rate the policy, and the length of its responses, stays
        solve=lambda: ours(next(new), revisions=0, lr=1e-9, train_limit=n),
        whole=lambda: ours(next(new), revisions=1, lr=1e-9, train_limit=n),
        values=a2po._estimate_optimal_values,
        a2po=lambda: a2po.train().metrics["train_runtime"] / STEPS,
        grpo=lambda: grpo.train().metrics["train_runtime"] / STEPS,
    ).values()
    table(capsys, f"s, stage 1, {n * GROUP:,} times", solve=solve[0], A2PO=values, whole=whole[0])
    both = solve[1] + solve[2], whole[1] + whole[2]
    table(capsys, "s, a step", solve=both[0], A2PO=steps[0], GRPO=steps[1], whole=both[1])
    table(capsys, "s, sampling", solve=solve[1], whole=whole[1])
    table(capsys, "s, updating", solve=solve[2], whole=whole[2])


@bench
@pytest.mark.parametrize("run", [1, 2])
def test_bench_time_to_accuracy(base, tmp_path, capsys, run):
    """Seconds until GOAL of 300 held-out problems are solved in one turn, without evaluation."""
    found = {}
    for n in (8, 1, 0):  # stage 1's samples; 0: the baseline is the batch's mean
        out, options = (
            tmp_path / str(n),
            {"lr": 3e-4, "steps": 24, "eval_every": 1, "eval_limit": 300},
        )
        seconds, *_ = ours(out, revisions=0, num_samples=n, **options)
        for step, seen in zip(*(read_lines(out / f"{name}.jsonl") for name in ("metrics", "eval"))):
            seconds += step["seconds_sampling"] + step["seconds_updating"]
            if seen["acc_t1"] >= GOAL:
                break
        found[f"here, N = {n}"] = seconds
    for name in ("A2PO", "GRPO"):
        trainer, watch = theirs(name, base, 256, 400, lr=3e-4), Stopwatch(base)
        trainer.add_callback(watch)
        trainer.train()
        found[name] = watch.seconds
    table(capsys, f"seconds until acc@t1 is {GOAL}", **found)


@bench
def test_bench_growth(base, tmp_path, capsys):
    """Seconds when one size doubles, and of larger models (random ones, whose responses are long)."""
    plain = {"train_limit": 64, "num_samples": 2, "batch_size": 16, "max_new_tokens": 32}
    rows = {"0.8M parameters": {}, "twice the problems": {"train_limit": 128}}
    rows |= {"twice the samples N": {"num_samples": 4}, "twice the batch": {"batch_size": 32}}
    rows |= {"twice the tokens": {"max_new_tokens": 64}, "10M": {}, "90M": {}}
    for i, (name, changes) in enumerate(rows.items()):
        width, layers = {"10M": (384, 6), "90M": (768, 12)}.get(name, (128, 4))
        sizes = {"vocab_size": 314, "hidden_size": width, "intermediate_size": 11 * width // 4}
        model = random_policy(
            "llama", **sizes, num_hidden_layers=layers, initializer_range=0.02
        ).model
        model.save_pretrained(tmp_path / "model")
        base.tokenizer.save_pretrained(tmp_path / "model")
        options = {"model": str(tmp_path / "model"), "revisions": 0, "steps": 4, **plain | changes}
        seconds = ours(tmp_path / str(i), **options)
        table(capsys, name, **dict(zip(("stage 1", "sampling", "updating"), seconds)))


@bench
@needs_math
@pytest.mark.parametrize("ahead", [0, 1])
def test_bench_checker(capsys, ahead):
    """Microseconds a call on MATH-500's solutions with their own and with the next answer."""
    library, rows = pytest.importorskip("math_verify"), math_rows("math500")
    other = lambda text, gold: library.verify(library.parse(f"${gold}$"), library.parse(text))
    pairs = [(a["solution"], b["answer"]) for a, b in zip(rows, rows[ahead:])]
    work = [[functools.partial(f, *pair) for f in (verify, other)] for pair in pairs]
    times = [[*alternate(REPEATS, a=a, b=b).values()] for a, b in work]
    here, there = 1e6 * np.median(times, axis=0)
    table(capsys, f"microseconds, answer of {ahead} further on", here=here, math_verify=there)
