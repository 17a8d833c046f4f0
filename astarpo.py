"""astarpo: teach a language model to reason about mathematics, in one file.

THE STORY.  A language model (the *policy*, pi) is given a problem x and writes a response y. A
program checks the final answer: reward r(x, y) = 1 if it is right and 0 if not. Nobody shows the
model how to solve anything; it tries, is told right or wrong, and changes. Two papers make this
simple enough for one file:

* A*-PO ("Accelerating RL for LLM Reasoning with Optimal Advantage Regression", arXiv 2505.20686)
  turns reinforcement learning into least squares. No critic, no group of samples at each step, no
  clipped ratio.
* PAG ("PAG: Multi-Turn Reinforced LLM Self-Correction with Policy as Generative Verifier",
  arXiv 2506.10406) lets the same model solve, then check itself, and revise only if its own check
  says that the answer is wrong.

THE MATHEMATICS.  We want reward, but not at any price: the policy should stay near the model that
we started from, the frozen *reference* pi_ref. With beta > 0 the price of leaving it:

  (1)  maximise over pi    E_{y ~ pi} [ r(x, y) ]  -  beta * KL( pi(.|x) || pi_ref(.|x) )

For one problem x this has an answer in closed form. Write the objective as
-beta * KL(pi || pi*) + V*(x) and read off that it is largest at pi = pi*, where

  (2)  pi*(y|x) = pi_ref(y|x) * exp( (r(x, y) - V*(x)) / beta )
  (3)  V*(x)    = beta * log E_{y ~ pi_ref} [ exp( r(x, y) / beta ) ]       (makes pi* sum to 1)

pi* cannot be computed (the sum runs over all responses), but take the logarithm of (2):

  (4)  beta * log( pi*(y|x) / pi_ref(y|x) )  =  r(x, y) - V*(x)  =  A*(x, y)

The right side is the *optimal advantage*: the reward of this response less V*(x), the value of (1)
for the best policy. (That is the A* in the name. It has nothing to do with A* search.) V*(x) is an
average, less the price, so a response can lie above it or below. The left side is something that
our policy can compute for any response, with itself in the place of pi*. So A*-PO is two
stages (V^* below is our estimate of V*, a V with a hat; why its beta1 is not the beta2 of the loss,
section 8 says):

  Stage 1, once, offline: N = 8 responses per problem from pi_ref, and from their rewards
  (5)  V^*(x) = beta1 * log( 1/N * sum_i exp( r_i / beta1 ) ),    beta1 = 0.5
  Stage 2, on-policy: ONE response y per problem from the present policy, and a step down the square
  (6)  loss = ( beta2 * log( pi(y|x) / pi_ref(y|x) )  -  ( r(x, y) - V^*(x) ) )^2,   beta2 = 0.001

PAG plays a dialogue with the same model, and A*-PO trains each of its turns as a response:

  turn 1, solve :  reward 1 if the answer is right
  turn 2, verify:  reward 1 if the verdict, "The answer is correct." or "... wrong.", is true
  turn 3, revise:  unless the verdict was "correct";  reward acc2 + alpha * (acc2 - acc1), alpha = 1

THE SYMBOLS.  Each equation has one place in the code, with the same letters:

  paper            here                      where
  x, y             problem, response         Problem, Turn
  r(x, y)          reward                    is_equiv(), dialogue_rewards()
  pi, pi_ref       policy, ref               load_policy(), freeze()
  log pi(y|x)      logp, ref_logp            token_logps(), accumulate()
  V^*(x), (5)      v_star                    estimate_v_star()
  (6)              loss                      astarpo_loss()
  beta1, beta2     beta1, beta2              Config
  N                num_samples               Config, stage_one()
  acc1, acc2       correct[0], correct[1]    Dialogue
  alpha            alpha                     Config, dialogue_rewards()

CONTENTS.  Part I is the lesson; read it from here to the end, in one evening. Part II is the
appendix: what the lesson needs around it.

  Part I    1 the options   2 problems    3 answers   4 rewards    5 the model
            6 sampling      7 V*          8 the loss  9 PAG's turns
           10 training     11 evaluation
  Part II   A errors and progress   B loading and saving   C the algebra of answers
            D the report            E the numbers          F watching a run
            I runs that survive     J large models, several devices
            K speed                 L the command line

RUN IT.     python astarpo.py train         (about a minute on a laptop; no download, no GPU)
            python astarpo.py eval
            python astarpo.py solve "What is 47 * 36?"
"""

from __future__ import annotations

import argparse
import atexit
import cmath
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import sys
import tempfile
import textwrap
import time
import types
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

HERE = Path(__file__).resolve().parent

# ==================================================================================================
# Part I: the lesson
# ==================================================================================================

# --- 1. The options -------------------------------------------------------------------------------
# A run's options are the fields of Config: the command line, its help and config.json are all made
# from this one list. beta1, beta2, N and alpha are the papers'. The sizes (steps, batch, lengths,
# learning rate), `minibatches` and how to evaluate fit the small base model that comes with this
# file; the presets in Part II, L have the values for a real one.


def option(
    default: Any, text: str, low: float = 0, high: float = math.inf, choices: Sequence[str] = ()
) -> Any:
    """A Config field that carries its own help text and the values that make sense."""
    limits = {"low": low, "high": high, "choices": choices}
    return field(default=default, metadata={"help": text, **limits})


@dataclass
class Config:
    """All options of a run. `train(Config(steps=10))` is `python astarpo.py train --steps 10`."""

    model: str = option("data/base", "the model to start from: a folder, a run or a hub id")
    train_data: str = option("data/train.jsonl", "JSONL file, folder or hub id to train on")
    eval_data: str = option("data/test.jsonl", "JSONL file, folder or hub id of held-out problems")
    out: str = option("", "new folder for the results (default: runs/<date-time>)")
    seed: int = option(0, "seed of every random choice", high=2**63 - 1)
    steps: int = option(40, "stage 2: number of rollout batches")
    batch_size: int = option(64, "stage 2: problems a batch, one dialogue each", low=1)
    minibatches: int = option(1, "updates a batch; more than 1 is off-policy (paper: 2)", low=1)
    lr: float = option(3e-4, "AdamW's learning rate after warm-up", high=1)
    warmup: int = option(3, "steps over which the learning rate rises to --lr")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", low=1e-9)
    beta1: float = option(0.5, "temperature of V* in (5), in units of reward", 1e-6, 1e6)
    beta2: float = option(1e-3, "weight of the log-ratio in (6), reward per nat", low=1e-9)
    num_samples: int = option(8, "stage 1: responses a problem (N)", low=1)
    baseline: str = option("vstar", "what is subtracted from r", choices=("vstar", "mean", "zero"))
    drop_unsolved: bool = option(False, "leave out problems that no stage-1 sample solved")
    v_star: str = option("", "reuse this v_star.jsonl of an earlier run instead of stage 1")
    alpha: float = option(1.0, "PAG: weight of the change in a revision's reward")
    revisions: int = option(1, "PAG: rounds of verify and revise; 0 is A*-PO alone", high=10)
    max_prompt_tokens: int = option(128, "longer problems are left out (tokens)", low=1)
    max_new_tokens: int = option(64, "longest response of one turn (tokens)", low=1)
    temperature: float = option(1.0, "sampling temperature; 0 is greedy (eval only)", high=100)
    problem_column: str = option("", "column of the problem's text (default: the common names)")
    answer_column: str = option("", "column of the answer or worked solution (default: likewise)")
    train_limit: int = option(256, "use the first so many training problems (0: all)")
    eval_limit: int = option(500, "evaluate on the first so many held-out problems (0: all)")
    eval_every: int = option(0, "evaluate every so many steps and keep the best model (0: never)")
    save_every: int = option(10, "keep a state to resume from every so many steps (0: never)")
    log_to: str = option("none", "send the metrics to", choices=("none", "tensorboard", "wandb"))
    samples: int = option(1, "eval: dialogues a problem (K)", low=1)
    top_p: float = option(1.0, "eval: sample from the likeliest tokens, of this share", 1e-6, 1)
    compare: str = option("", "eval: a second model, or run, on the same problems")
    rollout_tokens: int = option(
        32768, "sampling: tokens in the key/value cache at a time, about", low=1
    )
    update_tokens: int = option(512, "update: tokens of one pass, with padding", low=1)
    gradient_checkpointing: bool = option(False, "compute activations twice, to save memory")
    lora: int = option(0, "rank of LoRA adapters over frozen weights (0: train all)", high=4096)
    parallel: str = option("ddp", "how torchrun's processes share", choices=("ddp", "fsdp"))
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = option("auto", "compute in", choices=("auto", "float32", "bfloat16", "float16"))
    threads: int = option(0, "CPU threads (0: 1 below 10M parameters, else all)", high=1024)


# --- 2. Problems ----------------------------------------------------------------------------------
# A problem is a text and the answer that we can check. That is all the supervision there is: the
# worked `solution` that many data sets carry is never shown to the policy. The schema is that of
# MATH (Hendrycks et al. 2021); Part II, B reads the columns of other sets into it.


@dataclass(frozen=True)
class Problem:
    """One problem. `index` is its line in the file: its identity in seeds, files and V*."""

    index: int
    problem: str
    answer: str
    solution: str = ""
    level: int | None = None
    subject: str = ""


def batch_of_step(problems: Sequence[Problem], step: int, size: int, seed: int) -> list[Problem]:
    """The `size` problems of `step` (from 0), walking through reshuffled epochs.

    >>> [p.index for p in batch_of_step([Problem(i, "", "") for i in range(3)], 1, 2, seed=0)]
    [1, 2]
    """
    n, places = len(problems), range(step * size, (step + 1) * size)
    epochs = {place // n for place in places}
    order = {epoch: np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs}
    return [problems[order[place // n][place % n]] for place in places]


# --- 3. Answers: what did the model say, and is it what the book says? ----------------------------
# The reward is 1 when the final answer of a sample means the same as the gold answer, else 0. The
# two possible mistakes do not weigh the same. A false reject wastes one sample. A false accept pays
# for something wrong, and a policy that finds such a leak soon does nothing else. So wherever we do
# not understand a text, or would have to choose between two readings (is 1/2x the half of x?), the
# answer is an honest False.
#
# Meanings are compared without a computer-algebra system: first structure (tuple against tuple, set
# against set), then values. Rational values are exact. Roots, pi and their friends carry more than
# twice as many digits as the answers have characters, so no 1.41421356... passes for sqrt(2). Each
# variable gets random numbers of both signs, seeded by the two texts: that two different formulas
# agree at all of them is as good as impossible (Schwartz and Zippel).
#
# Model output is hostile text. Limits bound every loop: whatever the text, a comparison takes
# milliseconds, without eval, timer or thread.
#
# Three steps: find the answer (`extract_answer`), clean its spelling (`normalize_answer`), compare
# (`is_equiv`). The spellings, the limits and the small parser behind the comparison are in Part II,
# C; nothing of it is needed later in the lesson.

PHRASE = re.compile(
    r"\banswers?\**\s*(?:(?:is|are)\b\s*:?|[:=])|####(?! *final answer)|^[#* ]*final answer[#* ]*$",
    re.IGNORECASE | re.MULTILINE,
)
REASON = re.compile(r"[.!]\**\s+(?=[A-Z])|,? (?:since|because|as (?:required|desired))\b")


class Unsure(Exception):
    """The text is beyond the rules or beyond the limits: no claim of equality is made."""


def extract_answer(text: str | None) -> str | None:
    r"""Return the final answer in `text`: its last box, else what 'answer is' or #### announce.

    >>> extract_answer(r"so \boxed{1}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    text = text or ""
    last = max(text.rfind(box) for box in (r"\boxed", r"\fbox", r"\framebox"))
    if last >= 0:
        found = last_box(text[max(0, last - MAX_ANSWER) : last + 2 * MAX_ANSWER])
        return found if len(found) <= MAX_ANSWER and found.strip("{} ") else None
    tail = text[-MAX_TAIL:]
    ends = [match.end() for match in PHRASE.finditer(tail)]
    if not ends:
        return None
    rest = tail[ends[-1] :].lstrip("* \t\r\n")
    line = re.match(r"(?:\\\[.*?\\\]|\$\$.*?\$\$)?[^\n]*", rest, re.DOTALL)[0]
    line = REASON.split(line)[0][: MAX_ANSWER + 1]
    line = line.lstrip("*$` \t").rstrip("*$`.,;: \t\r\n")
    line = line.removeprefix(r"\(").removeprefix(r"\[").removesuffix(r"\)").removesuffix(r"\]")
    line = line.strip()
    return line if 0 < len(line) <= MAX_ANSWER else None


def is_equiv(predicted: str | None, gold: str | None) -> bool:
    r"""Say whether two answers mean the same; when in doubt, they do not.

    >>> is_equiv(r"\frac{\sqrt{2}}{2}", r"1/\sqrt2"), is_equiv("0.33", "1/3")
    (True, False)
    """
    if not predicted or not gold or predicted.strip() == gold.strip():
        return bool(predicted and gold and gold.strip())
    a, b = sorted((normalize_answer(predicted), normalize_answer(gold)))
    if max(len(a), len(b)) > MAX_ANSWER or not a.strip('"') or not b.strip('"'):
        return False
    # A normalized answer has its words in "quotes"; the quotes alone are no difference.
    if a.replace('"', "") == b.replace('"', ""):
        return True
    try:
        return same(read_answer(a), read_answer(b), Work(a + b))
    except Unsure:
        return False


# --- 4. Rewards -----------------------------------------------------------------------------------
# The reward is all that the policy is ever told, so it should say exactly what we want and nothing
# that can be had more cheaply. For A*-PO it is 1 for a right final answer and 0 for anything else:
# no partial credit, no bonus for style or length. (PAG's other two rewards: section 9.)


def verify(text: str | None, gold: str | None) -> bool:
    r"""Say whether the final answer of `text` equals `gold`: r(x, y) in one call.

    (Training keeps the extracted answer, so it makes the two calls itself, in `end_turns`. PAG's
    verify turn, in which the model judges itself, is something else.)

    >>> verify(r"Step by step: 282 + 1410 = \boxed{1692}", "1692"), verify("1692", "1692")
    (True, False)
    """
    return is_equiv(extract_answer(text), gold)


# --- 5. The model ---------------------------------------------------------------------------------
# The policy is an ordinary causal language model: it reads token ids and gives, at each place, a
# score (logit) for every possible next token. The softmax of the scores is pi(next token | so far),
# and the probability of a whole response is the product over its tokens. Chat models see a
# conversation as one text with markers in it, written by the tokenizer's chat template:
#
#     <|user|>What is 2 + 3? ...<|end|><|assistant|>\boxed{5}<|end|><|user|>Check the steps ...
#     \---------- prompt --------------------------/\----- y1 -----/\--- bridge ------ ...
#
# One rule matters for RL: what the policy wrote is never decoded and encoded again, because the
# same text can be cut into other tokens, which have other probabilities. We keep the ids, and put
# between two responses the ids of the markers and of our next request: the *bridge*.
#
# `load_policy` (Part II, B) makes a Policy of a model's folder. The model stays in eval mode for
# ever, also while it learns: dropout would make log pi differ from log pi_ref before the first
# update, and (6) is a statement about exactly that difference.

# The requests are all that we ever say to the model. They ask for what PAG's ask for.
SOLVE_PROMPT = "{problem}\nSolve this step by step, and put the final answer in \\boxed{}."
VERIFY_PROMPT = (
    "Check the steps of this solution one by one. If one is wrong, say which and why, and end with "
    "'The answer is wrong.' If all are right, end with 'The answer is correct.'"
)
REVISE_PROMPT = (
    "Your answer may be wrong. Solve the problem again, step by step, and put the final answer in "
    "\\boxed{}."
)


@dataclass
class Policy:
    """A language model with what is needed to talk to it. The reference is one as well."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    end_ids: tuple[int, ...]  # the tokens that end a response: a chat model can have several
    device: torch.device
    dtype: torch.dtype  # what the matrix products are computed in
    top_p: float = 1.0  # evaluation may sample from the likeliest tokens alone; training may not
    adapters: bool | None = None  # LoRA: does this policy use them? None: there are none
    scaler: torch.amp.GradScaler = field(  # of the loss, for float16 only
        default_factory=lambda: torch.amp.GradScaler(enabled=False)
    )
    step: Any = field(default=None, init=False)  # the recorded step (Part II, K), when there is one

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Compute as this policy: in its dtype (while the weights that learn stay float32, so that
        an update of 1e-6 is not rounded off), and with or without the adapters."""
        if self.adapters is not None:
            switch_adapters(self.model, self.adapters)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield

    def prompt_ids(self, problem: Problem) -> list[int]:
        """The first request, up to where the model's first response begins."""
        request = SOLVE_PROMPT.replace("{problem}", problem.problem)
        messages = [{"role": "user", "content": request}]
        return encode(self.tokenizer, render(self.tokenizer, messages))

    def bridge_ids(self, request: str, ended: bool) -> list[int]:
        """The ids between a response and the next one. A response that was cut off (not `ended`)
        lacks its end token; then the bridge begins with it, forced and never scored."""
        ids = encode(self.tokenizer, bridge_text(self.tokenizer, request))
        return ids[1:] if ended and ids[0] in self.end_ids else ids


def render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The conversation as text, up to where the assistant speaks next."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids. The template has already written every marker, so none is added here."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def freeze(policy: Policy) -> Policy:
    """The reference pi_ref: the policy as it is now, copied, never to change. With LoRA it is the
    same weights with the adapters off, and no second copy exists."""
    if policy.adapters:
        return dataclasses.replace(policy, adapters=False)
    return dataclasses.replace(policy, model=copy.deepcopy(policy.model).requires_grad_(False))


# --- 6. Sampling ----------------------------------------------------------------------------------
# A rollout draws one token after the other from pi(. | so far), at temperature 1 and without top-k
# or top-p: equation (6) speaks about the policy itself, not about a sharpened cousin of it. (With
# --temperature T, pi and pi_ref both mean the model at T, here and in section 8.) It is also where
# the time goes. Four things make it fast, each of them exact:
#
# * a *cache* of keys and values, so that each new token costs one token's work. A dialogue of
#   several turns (section 9) keeps its cache: a turn reads the bridge, not everything again;
# * many rows at once, and most of them busy. Responses differ a lot in length, and a batch that
#   waits for its longest one is nearly empty for most of the time. Here a dialogue whose turn has
#   ended goes on with its next one, or makes room for another dialogue (`play` in section 9). So
#   the rows differ in length and in turn. The cache has holes, a mask says which cells are real,
#   and the position of a token counts only the real ones before it;
# * what several rows have in common is read once: stage 1 asks each problem N times;
# * the step from token to token is recorded, and repeated without Python.
#
# Part II, K has the mechanics: `left_pad`, `join_rows`, `join_memories`, `record`. And for the
# rest of this lesson: where one process works alone, `deal`, `collect`, `gathered` and their like
# (Part II, J) hand on what they are given.
#
# No random state is kept. The token at one place of one turn of one sample of one problem is
# chosen by a number u in [0, 1) hashed from exactly those counters. So the order of batches does
# not matter, no generator state needs to be saved, and a run can be repeated to the last digit.


def uniform(*counters: Any) -> np.ndarray:
    """Uniform numbers in [0, 1), a pure function of integer counters (arrays are broadcast).

    Each counter is folded in with splitmix64's mixing steps (Steele et al. 2014). Only 32 bits are
    kept: float64 has 53, so that `pick` can multiply u by a sum without rounding it up to the sum.

    >>> bool(uniform(0, 1, 2) == uniform(0, 1, 2)), uniform(0, np.arange(6)[:, None], [0, 1]).shape
    (True, (6, 2))
    """
    h = np.zeros(1, np.uint64)
    for counter in counters:
        h = h + np.asarray(counter).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = (h ^ (h >> np.uint64(31))) + np.uint64(0x9E3779B97F4A7C15)
    return np.squeeze(h >> np.uint64(32)) * 2.0**-32


def pick(logits: Tensor, u: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """One token a row: inverse-CDF sampling with u (B,) in [0, 1); the best one at temperature 0.

    Token k is chosen if u falls into [P(tokens < k), P(tokens <= k)). Summed in float64: a
    vocabulary has up to 200,000 terms, and a token of probability 0 must never be drawn.
    """
    if temperature == 0:
        return logits.argmax(-1)  # (B,)
    p = (logits.double() / temperature).softmax(-1)  # (B, V)
    if top_p < 1:  # only the likeliest tokens: those before which less than top_p is collected
        ranked, order = p.sort(descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        p = p.scatter(-1, order, ranked)
    cdf = p.cumsum(-1)
    token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]  # (B,)
    return token.clamp(max=p.shape[1] - 1)  # a sick model's nan must not become an index error


class Memory:
    """What the model has read of B dialogues: its key/value cache, and which cells are real."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.cells: list[Tensor] = []  # each layer's keys and values (B, heads, T, head width)
        self.mask = torch.zeros(rows, 0, dtype=torch.bool, device=device)  # (B, T)
        self.used = 0  # of the T columns; those after them are free

    def read(self, policy: Policy, ids: Tensor, real: Tensor) -> Tensor:
        """Let the model read ids (B, P), of which those not `real` are padding: logits (B, V) for
        the token after the last column, in float32. (There must be no free columns.)"""
        before = self.mask.sum(1, keepdim=True)  # (B, 1) tokens read so far
        positions = (before + real.cumsum(1) - 1).clamp(min=0)  # (B, P)
        self.mask = torch.cat([self.mask, real], dim=1)  # (B, T + P)
        cache = DynamicCache(zip(self.cells[::2], self.cells[1::2]))
        with policy.active():
            logits = policy.model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,  # (B, 1, V): while reading only the last place matters
            ).logits
        # Rotating the keys makes them float32 under autocast; attention would round them each time.
        both = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
        self.cells = [tensor.to(policy.dtype) for tensor in both]
        self.used = self.mask.shape[1]
        return logits[:, -1].float()

    def read_one(self, policy: Policy, token: Tensor, real: Tensor) -> Tensor:
        """Let the model read token (B,) in the next free column: logits (B, V), in float32."""
        if self.used == self.mask.shape[1]:
            everyone = torch.arange(len(token), device=token.device)
            vars(self).update(vars(join_memories([(self, everyone)], roomy=True)))
        positions = self.mask.sum(1, keepdim=True)  # (B, 1)
        self.mask[:, self.used] = real
        column = torch.tensor(self.used, device=token.device)
        inputs = (token[:, None], positions, self.mask, column, *self.cells)
        with policy.active(), torch.jit.optimized_execution(False):  # repeated as it is, unfused
            policy.step = policy.step or record(policy, inputs)
            logits = policy.step(*inputs)
        self.used += 1
        return logits.float()


@dataclass
class Rows:
    """Responses under way, one a row, and all that is needed to go on with them."""

    memory: Memory
    logits: Tensor  # (B, V) for the next token
    numbers: Tensor  # (B, L + 1) the uniform number for each place of the response, float64
    tokens: Tensor  # (B, L + 1) the response so far; L is the most that it may have
    length: Tensor  # (B,) how long it is
    ended: Tensor  # (B,) by its end token or at L

    @staticmethod
    def begin(
        policy: Policy, memory: Memory | None, unread: Sequence[tuple[int, ...]], u: np.ndarray
    ) -> Rows:
        """Let the model read what comes before the responses.

        memory: what it has read so far. If that is nothing (None), equal texts are read only once:
        stage 1 asks for N responses to the same problem.
        """
        if memory is None:
            row_of = {text: row for row, text in enumerate(dict.fromkeys(unread))}
            memory = Memory(len(row_of), policy.device)
            logits = memory.read(policy, *left_pad([*row_of], policy.device))
            rows = torch.tensor([row_of[text] for text in unread], device=policy.device)
            if len(row_of) < len(rows):
                memory, logits = join_memories([(memory, rows)], roomy=False), logits[rows]
        else:
            logits = memory.read(policy, *left_pad(unread, policy.device))
        numbers = torch.from_numpy(u).to(policy.device)
        length = torch.zeros(len(u), dtype=torch.long, device=policy.device)
        return Rows(memory, logits, numbers, torch.zeros_like(numbers).long(), length, length < 0)

    def write(self, policy: Policy, temperature: float) -> None:
        """Write all responses on, token by token, until half of the rows have ended (and not the
        first one only: to exchange rows costs a copy of the cache)."""
        ends = torch.tensor(policy.end_ids, device=policy.device)
        longest = self.tokens.shape[1] - 1  # an ended row babbles on, one place behind its end
        running = len(self.ended)
        while running > len(self.ended) / 2:
            place = self.length[:, None]  # (B, 1)
            u = self.numbers.gather(1, place)[:, 0]  # (B,)
            token = pick(self.logits, u, temperature, policy.top_p)  # (B,)
            self.tokens.scatter_(1, place, token[:, None])
            self.length += ~self.ended
            self.ended |= torch.isin(token, ends) | (self.length == longest)
            running = int((~self.ended).sum())
            if running:
                self.logits = self.memory.read_one(policy, token, ~self.ended)

    def responses(self) -> list[list[int]]:
        """The tokens of the responses that have ended."""
        tokens, lengths = self.tokens[self.ended].tolist(), self.length[self.ended].tolist()
        return [row[:length] for row, length in zip(tokens, lengths)]


# --- 7. V*: how good could the best policy be? ----------------------------------------------------
# Equation (3) asks for the mean of exp(r/beta) over responses of the reference; N samples of it
# give (5). Look at what kind of mean that is. For beta1 -> infinity it is the plain mean of the
# rewards, for beta1 -> 0 their maximum, and in between, at 0.5, one right answer in eight gives
# V^* = 0.5 * log((7 + e^2) / 8) = 0.29: more than its share of 0.125, because the best policy
# would choose that response far more often than the reference does. (The logarithm is concave, so
# on average (5) is a little too low: its bias.)


def estimate_v_star(rewards: Tensor, beta1: float) -> Tensor:
    """V^* from the rewards of N reference responses: equation (5). (..., N) -> (...).

    log mean exp, not the mean of logs; the maximum goes out of the exponent first (that is what
    logsumexp does), so that r/beta1 = 1e6 does not overflow.

    >>> round(estimate_v_star(torch.tensor([0.0] * 7 + [1.0]), beta1=0.5).item(), 3)
    0.294
    """
    scaled = rewards.double() / beta1
    value = beta1 * (scaled.logsumexp(-1) - math.log(rewards.shape[-1]))
    return value.to(rewards.dtype) if rewards.is_floating_point() else value.float()


# --- 8. The loss: regression on the optimal advantage ---------------------------------------------
# Equation (6), once more: make beta2 * log(pi/pi_ref) equal to r - V^*. Everything else in this
# file serves the three lines of `astarpo_loss`.
#
# What does V^* do here? Take the gradient of (6) for a response that the policy drew itself,
#     2 * beta2 * ( beta2 * log(pi/pi_ref) - r + V^* ) * grad log pi(y|x),
# and average over y ~ pi. V^* does not depend on y, and the average of grad log pi is zero: V^*
# drops out. What is left is -2 * beta2 times the gradient of (1) with beta = beta2: on-policy the
# regression is a policy gradient, and V^* its *baseline*. Any V that does not depend on y leaves
# the same optimum, pi_ref * exp(r/beta2) / Z; a good one takes variance away: a problem that the
# reference always solves, or never, has r = V^* and teaches nothing at first. That is why beta1 may
# differ from beta2, why the bias of (5) with N = 8 does no harm, and why a value pooled over
# problems can stand in for a missing one. It would NOT be so off-policy: fit (6) to a fixed set of
# responses and a wrong V gives a wrong policy. The tests show both on a policy so small that all
# its responses can be listed.
#
# The log-probability of a response is the sum over its tokens, up to and including the token that
# ends it. The sum, not the mean: (6) speaks of pi(y|x). What we said to the model (prompts,
# bridges, padding) is no choice of the policy and never enters.


def astarpo_loss(
    logp: Tensor, ref_logp: Tensor, reward: Tensor, v_star: Tensor, beta2: float
) -> Tensor:
    """Equation (6), averaged over a batch of responses: four tensors (B,) -> a scalar.

    logp, ref_logp: log-probabilities of the responses (nats, summed over tokens) under the policy
    and the reference; reward, v_star: in units of reward. Only logp carries a gradient.

    >>> zero = torch.zeros(2)
    >>> astarpo_loss(zero, zero, torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]), 1e-3).item()
    0.25
    """
    log_ratio = logp - ref_logp  # (B,) log pi(y|x) / pi_ref(y|x)
    advantage = reward - v_star  # (B,) A*(x, y), estimated at beta1
    return (beta2 * log_ratio - advantage).square().mean()


LOGIT_CELLS = 2**26  # float32 logits at a time: 256 MiB a copy


def token_logps(policy: Policy, ids: Tensor, scored: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi of the scored tokens: ids, scored (B, T), padded on the right -> (M,), row by row."""
    with policy.active(), recomputing(policy.model):
        return method_of(policy.model, score_tokens)(ids, scored, temperature)


def score_tokens(model: Any, ids: Tensor, scored: Tensor, temperature: float) -> Tensor:
    """What `token_logps` asks the model for. The logits at place t - 1 predict token t.

    No mask is needed: attention looks back only, and the padding comes last.

    The large matrix product with the vocabulary is done for the scored places only, and in pieces
    whose float32 logits are thrown away and computed again in the backward pass: with 152,000
    words, they would not all fit at once.
    """
    hidden = model.get_decoder()(input_ids=ids, use_cache=False)
    hidden = hidden.last_hidden_state[:, :-1][scored[:, 1:]]  # (M, width)
    targets = ids[:, 1:][scored[:, 1:]]  # (M,)
    head = model.get_output_embeddings()

    def logps(h: Tensor, target: Tensor) -> Tensor:
        logits = head(h).float() / temperature  # (m, V)
        return -F.cross_entropy(logits, target, reduction="none")  # (m,)

    size = max(1, LOGIT_CELLS // head.weight.shape[0])
    if len(targets) <= size:
        return logps(hidden, targets)
    pieces = zip(hidden.split(size), targets.split(size))
    return torch.cat([checkpoint(logps, h, t, use_reentrant=False) for h, t in pieces])


# --- 9. PAG: solve, verify, revise ----------------------------------------------------------------
# So far a response was all that happened to a problem. PAG makes a dialogue of up to three turns,
# all played by the same policy: it solves; we ask it to check its solution; unless its verdict is
# "correct" we ask it to try again. The "unless" matters: a model that is always asked to revise
# learns to give its best answer at once and then to repeat it (the *collapse* that the paper
# describes); one that revises only what it has judged wrong must learn to judge.
#
# For A*-PO nothing changes. A turn is a response whose problem is the dialogue so far; its reward
# is its own (`dialogue_rewards`). Its V^* is that of the problem and its *role*: to solve and to
# judge earn different rewards on average. (The dialogue so far would have a V* of its own, but
# nobody has N samples of it. Ours, too, is fixed before the turn begins, so section 8 holds.)
ROLES = ("solve", "verify", "revise")

# What a check says is read off its last sentence only, and only in the words that the prompt asks
# for ("So" may come before them). A check that wanders on after its verdict, or hedges it, has
# given none: None earns no reward and counts as a miss.
VERDICT = re.compile(
    r"""(?:^|[.!?\n])[\s*"']*(?:(?:so|thus|hence|therefore),?\s+)?[*"']*"""
    r"""the answer is\s+[*"']*(correct|wrong)[*"']*[.!]?[*"']*$""",
    re.IGNORECASE,
)


def parse_judgment(text: str) -> bool | None:
    """The verdict that ends a check: True for correct, False for wrong, None for neither.

    >>> parse_judgment("Check: 83, 73 differ. The answer is wrong."), parse_judgment("It is fine.")
    (False, None)
    """
    found = VERDICT.search(text.rstrip()[-200:])
    return None if found is None else found[1].lower() == "correct"


def dialogue_rewards(
    correct: Sequence[bool], verdicts: Sequence[bool | None], alpha: float
) -> list[float]:
    """Each turn's reward in the order of the turns: solve, verify, revise, verify, revise, ...

    correct[k]: was attempt k right; verdicts[k]: what check k said of attempt k. As in PAG,
    every turn is paid for what it did itself (no reward flows back from later turns), and a
    revision also for what it changed: breaking a right answer costs alpha, mending earns it.

    >>> dialogue_rewards([False, True], [False], alpha=1.0)    # wrong; "wrong"; mended
    [0.0, 1.0, 2.0]
    """
    rewards = [float(correct[0])]
    for k, verdict in enumerate(verdicts):
        rewards.append(float(verdict == correct[k]))  # None == True and None == False are False
        if k + 1 < len(correct):
            rewards.append(correct[k + 1] + alpha * (correct[k + 1] - correct[k]))
    return rewards


@dataclass
class Turn:
    """One response: its dialogue's ids[start:end], and what was read off its text."""

    role: str
    start: int
    end: int
    text: str
    ended: bool  # False: cut off at max_new_tokens
    answer: str | None = None  # solve, revise: the extracted answer
    correct: bool = False  # solve, revise: is it right
    verdict: bool | None = None  # verify: what it says
    reward: float = 0.0


@dataclass
class Dialogue:
    """A problem and everything that was said: `ids` are the exact tokens, turn after turn."""

    problem: Problem
    ids: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    sample: int = 0  # tells the dialogues about one problem apart
    read: int = 0  # how many of the ids the model's memory has read

    @property
    def attempts(self) -> list[Turn]:
        """The turns with an answer: solve, then the revisions."""
        return [turn for turn in self.turns if turn.role != "verify"]

    @property
    def checks(self) -> list[Turn]:
        """The verify turns; check k is about attempt k."""
        return [turn for turn in self.turns if turn.role == "verify"]

    def pay(self, alpha: float) -> None:
        """Give each turn its reward."""
        correct = [turn.correct for turn in self.attempts]
        rewards = dialogue_rewards(correct, [turn.verdict for turn in self.checks], alpha)
        for turn, reward in zip(self.turns, rewards):
            turn.reward = reward


def next_role(dialogue: Dialogue, turns: float = math.inf) -> str | None:
    """What comes next in a dialogue of at most so many turns; None if it is over. A check without
    a verdict leads to a revision, like "wrong", in training and in evaluation."""
    done = len(dialogue.turns)
    if done >= turns or (done > 0 and dialogue.turns[-1].verdict is True):
        return None
    return "solve" if done == 0 else ("revise", "verify")[done % 2]


def begin_turns(
    policy: Policy, dialogues: Sequence[Dialogue], memory: Memory | None, config: Config, step: int
) -> Rows:
    """Say what comes before each dialogue's next response, and let the model read it."""
    for dialogue in dialogues:
        role = next_role(dialogue)
        if role != "solve":
            request = VERIFY_PROMPT if role == "verify" else REVISE_PROMPT
            dialogue.ids += policy.bridge_ids(request, ended=dialogue.turns[-1].ended)
    counters = [(d.problem.index, d.sample, len(d.turns)) for d in dialogues]
    index, sample, turn = np.array(counters).T[:, :, None]
    places = np.arange(config.max_new_tokens + 1)
    u = uniform(config.seed, step, index, sample, turn, places).reshape(len(dialogues), -1)
    # The last token of the turn before has been written but not read yet: it goes first.
    unread = [tuple(dialogue.ids[dialogue.read :]) for dialogue in dialogues]
    return Rows.begin(policy, memory, unread, u)


def end_turns(policy: Policy, dialogues: Sequence[Dialogue], responses: list[list[int]]) -> None:
    """Add the responses to their dialogues, and read off their texts what they say."""
    texts = policy.tokenizer.batch_decode(responses, skip_special_tokens=True)
    for dialogue, response, text in zip(dialogues, responses, texts):
        start = len(dialogue.ids)
        dialogue.ids += response
        dialogue.read = len(dialogue.ids) - 1
        role = next_role(dialogue)  # of the turn that is yet to be appended
        turn = Turn(role, start, len(dialogue.ids), text, response[-1] in policy.end_ids)
        if role == "verify":
            turn.verdict = parse_judgment(text)
        else:
            turn.answer = extract_answer(text)
            turn.correct = is_equiv(turn.answer, dialogue.problem.answer)
        dialogue.turns.append(turn)


@torch.inference_mode()
def play(
    policy: Policy,
    dialogues: Sequence[Dialogue],
    turns: int,
    config: Config,
    step: int,
    temperature: float,
    progress: Progress | None = None,
) -> None:
    """Play dialogues to their end, as many at a time as the cells allow, and pay them.

    When half of the rows have ended, their dialogues go on with their next turn, or are over and
    leave their places to new ones. So the rows are in different turns, and most of them are busy.
    """

    def limit(dialogue: Dialogue) -> int:  # roughly: without bridges and free cells
        return len(dialogue.ids) + (turns - len(dialogue.turns)) * config.max_new_tokens

    waiting = deque(sorted(dialogues, key=limit, reverse=True))  # so the next is the widest
    playing: list[Dialogue] = []
    rows: Any = None  # their rows, in their order
    while waiting or playing:
        parts: list[tuple[Rows, list[int]]] = []
        if playing:
            ended = rows.ended.tolist()
            end_turns(policy, [*itertools.compress(playing, ended)], rows.responses())
            busy = [i for i, end in enumerate(ended) if not end]
            again = [i for i, end in enumerate(ended) if end and next_role(playing[i], turns)]
            over = len(playing) - len(busy) - len(again)
            if progress and over:
                progress.advance(over * world()[1])
            playing = [playing[i] for i in busy + again]
            if busy:
                parts.append((rows, busy))
            if again:
                chosen = torch.tensor(again, device=policy.device)
                memory = join_memories([(rows.memory, chosen)], roomy=False)
                begun = begin_turns(policy, playing[len(busy) :], memory, config, step)
                parts.append((begun, [*range(len(again))]))
        widest = max(map(limit, [*playing, *itertools.islice(waiting, 1)]), default=1)
        room = max(config.rollout_tokens // widest - len(playing), not playing)  # at least one
        fresh = [waiting.popleft() for _ in range(min(room, len(waiting)))]
        if fresh:
            parts.append((begin_turns(policy, fresh, None, config, step), [*range(len(fresh))]))
            playing += fresh
        if playing:
            rows = join_rows(parts)
            rows.write(policy, temperature)
    for dialogue in dialogues:
        dialogue.pay(config.alpha)


def rollout(
    policy: Policy,
    problems: Sequence[Problem],
    config: Config,
    step: int,
    samples: Sequence[int] | None = None,
    temperature: float | None = None,
    progress: Progress | None = None,
) -> list[Dialogue]:
    """Dialogues about all problems, in their order.

    step: which rollout this is, for the random numbers (0: stage 1; k: step k; -1: evaluation);
    samples[i] numbers repeated dialogues about one problem. With several processes each plays its
    share, and all get all.
    """
    temperature = config.temperature if temperature is None else temperature
    samples = itertools.repeat(0) if samples is None else samples
    prompts = {problem: policy.prompt_ids(problem) for problem in set(problems)}
    mine = deal([*zip(problems, samples)])
    turns, done = 1 + 2 * config.revisions, progress.done if progress else 0

    def work() -> list[Dialogue]:
        dialogues = [Dialogue(p, [*prompts[p]], sample=sample) for p, sample in mine]
        if progress:
            progress.done = done
        play(policy, dialogues, turns, config, step, temperature, progress)
        return dialogues

    with gathered(policy.model):
        least = config.max_prompt_tokens + turns * config.max_new_tokens
        dialogues = within_memory(work, config, "rollout_tokens", least)
    return collect(dialogues, len(problems))


# --- 10. Training ---------------------------------------------------------------------------------
# Stage 1 plays N dialogues about each problem with the reference and keeps V^* for each (problem,
# role). A role that never came up in a problem's N dialogues (no sample said "wrong", so none was
# revised) gets the value of all samples of that role, over all problems: section 8 says why that is
# harmless. Stage 2 plays one dialogue a problem with the present policy and updates it once.

STAGE_ONE_PART = 512  # dialogues that each process plays before they are kept
Baselines = dict[tuple[int, str], float]  # (problem index, role) -> V^*, in units of reward


def baselines(dialogues: Sequence[Dialogue], config: Config) -> Baselines:
    """V^* of every (problem, role) from the reference's dialogues.

    --baseline mean takes the mean reward, --baseline zero takes 0: both are right on-policy
    (section 8), and the authors' code has both. Try how fast they learn.
    """
    rewards: dict[tuple[int, str], list[float]] = defaultdict(list)
    for dialogue in dialogues:
        for turn in dialogue.turns:
            for index in (dialogue.problem.index, -1):  # -1: all problems together
                rewards[index, turn.role].append(turn.reward)

    def value(samples: list[float]) -> float:
        if config.baseline == "zero":
            return 0.0
        if config.baseline == "mean":
            return float(np.mean(samples))
        return estimate_v_star(torch.tensor(samples), config.beta1).item()

    return {
        (index, role): value(rewards.get((index, role)) or rewards.get((-1, role)) or [0.0])
        for index in {dialogue.problem.index for dialogue in dialogues}
        for role in ROLES
    }


def stage_one(
    ref: Policy, problems: Sequence[Problem], config: Config, journal: Path | None = None
) -> list[Dialogue]:
    """The reference's N dialogues about each problem, at the training temperature.

    They take longest of all, so each part of them goes to the journal once it is played;
    those that are in it already are not played again.
    """
    n = config.num_samples
    repeated = [problem for problem in problems for _ in range(n)]
    numbers = [*range(n)] * len(problems)
    part = n * max(1, STAGE_ONE_PART * world()[1] // n)
    dialogues = read_journal(journal, repeated, part) if journal else []
    progress = Progress("stage 1, V*", len(repeated), len(dialogues))
    for start in range(len(dialogues), len(repeated), part):
        now = slice(start, start + part)
        fresh = rollout(ref, repeated[now], config, 0, numbers[now], progress=progress)
        dialogues += fresh
        if journal:
            append_journal(journal, fresh)
    return dialogues


@dataclass
class Batch:
    """Some dialogues as tensors: B rows, M scored tokens, n turns numbered 0..n-1 in order."""

    ids: Tensor  # (B, T), padded on the right
    scored: Tensor  # (B, T) True where the policy chose the token
    turn: Tensor  # (M,) the turn that each scored token belongs to
    reward: Tensor  # (n,)
    v_star: Tensor  # (n,)


def collate(dialogues: Sequence[Dialogue], v_star: Baselines, device: torch.device) -> Batch:
    """One forward pass scores all turns of a dialogue: later turns extend the same ids, so causal
    attention gives each token exactly the context that it was sampled in."""
    ids = pad_sequence([torch.tensor(d.ids) for d in dialogues], batch_first=True)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    turns, owner = [], []
    for row, dialogue in enumerate(dialogues):
        for turn in dialogue.turns:
            scored[row, turn.start : turn.end] = True
            owner += [len(turns)] * (turn.end - turn.start)
            turns.append((turn.reward, v_star[dialogue.problem.index, turn.role]))
    reward, value = torch.tensor(turns).unbind(1)
    return Batch(*(t.to(device) for t in (ids, scored, torch.tensor(owner), reward, value)))


def accumulate(
    policy: Policy, ref: Policy, dialogues: Sequence[Dialogue], v_star: Baselines, config: Config
) -> dict[str, float]:
    """Add up, from zero, the gradient of (6): a mean over all turns of all dialogues.

    The dialogues are taken in micro-batches that fit into memory; their gradients add up, each
    weighted by its share of the turns, so that the sum does not depend on how they were cut.
    Returns what was seen.
    """
    # (This number hangs on the verdicts, so to divide by it is a bias, of the order of 1 / batch.)
    n_turns = sum(len(dialogue.turns) for dialogue in dialogues)
    seen: dict[str, float] = defaultdict(float)
    policy.model.zero_grad(set_to_none=True)
    for chosen, weight in my_share(dialogues, config.update_tokens):
        batch = collate(chosen, v_star, policy.device)
        inputs = (batch.ids, batch.scored, config.temperature)
        with torch.no_grad():
            ref_token_logp = token_logps(ref, *inputs)  # (M,)
        token_logp = token_logps(policy, *inputs)  # (M,)
        zeros = torch.zeros_like(batch.reward)
        logp = zeros.index_add(0, batch.turn, token_logp)  # (n,) sums over each turn's tokens
        ref_logp = zeros.index_add(0, batch.turn, ref_token_logp)  # (n,)
        loss = astarpo_loss(logp, ref_logp, batch.reward, batch.v_star, config.beta2)
        share = weight * len(batch.reward) / n_turns
        policy.scaler.scale(loss * share).backward()
        seen["loss"] += loss.item() * share
        seen["kl"] += weight * (logp - ref_logp).sum().item() / n_turns
        seen["entropy"] -= token_logp.sum().item() * weight
        seen["v_star"] += weight * batch.v_star.sum().item() / n_turns
        seen["tokens"] += len(token_logp) * weight
    return seen


def update(
    policy: Policy,
    ref: Policy,
    optimizer: torch.optim.Optimizer,
    dialogues: Sequence[Dialogue],
    v_star: Baselines,
    config: Config,
) -> dict[str, float]:
    """One step down (6). Returns what was seen."""
    longest = max(len(dialogue.ids) for dialogue in dialogues)
    alone = world()[1] == 1  # several processes must cut alike, and only one knows that it must
    seen = within_memory(
        lambda: accumulate(policy, ref, dialogues, v_star, config),
        config, "update_tokens", longest if alone else config.update_tokens,
    )  # fmt: skip
    seen = sum_over_processes(policy.model, seen)
    seen["entropy"] /= seen.pop("tokens")
    policy.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # fsdp has dealt it out
    seen |= {"grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"]}
    seen["skipped"] = float(not math.isfinite(seen["loss"] + seen["grad_norm"]))
    if not seen["skipped"]:  # one bad batch must not destroy the weights
        policy.scaler.step(optimizer)
    policy.scaler.update()
    policy.model.zero_grad(set_to_none=True)  # while sampling, its memory is better used
    return seen


def train_step(
    policy: Policy,
    ref: Policy,
    optimizer: torch.optim.Optimizer,
    problems: Sequence[Problem],
    v_star: Baselines,
    config: Config,
    step: int,
) -> dict[str, float | None]:
    """Stage 2, one step (from 0): ONE dialogue a problem, one update. Returns the step's metrics.

    --minibatches M spreads the dialogues over M updates; those of update k come from a policy that
    is k - 1 updates old by then. The paper takes M = 2, our default is 1.
    """
    started = time.perf_counter()
    optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / max(1, config.warmup))
    chosen = batch_of_step(problems, step, config.batch_size, config.seed)
    # Numbered by place: a problem that comes twice in a batch gets two different dialogues.
    dialogues = rollout(policy, chosen, config, step + 1, samples=range(len(chosen)))
    size = math.ceil(len(dialogues) / config.minibatches)
    parts = [dialogues[i : i + size] for i in range(0, len(dialogues), size)]
    updates = [update(policy, ref, optimizer, part, v_star, config) for part in parts]
    means = {name: mean(seen[name] for seen in updates) for name in updates[0]}
    means = {name: value if math.isfinite(value) else None for name, value in means.items()}
    sampled = sum(turn.end - turn.start for d in dialogues for turn in d.turns)
    speed = sampled / (time.perf_counter() - started)
    return {"step": step + 1, **means, **statistics(dialogues), "tokens_per_second": speed}


def train(config: Config, resume: bool = False) -> dict[str, Any]:
    """The whole of A*-PO + PAG: evaluate, stage 1, stage 2, evaluate. Returns the summary.

    Everything is written to the run folder as it happens; the README says what each file holds.
    resume: go on with the unfinished run in config.out (Part II, I says how that is exact).
    """
    check_options(config, training=True)
    policy = load_policy(config)
    check_context(policy, config)
    problems = load_problems(config.train_data, config.train_limit, policy, config, "train")
    held_out = load_problems(config.eval_data, config.eval_limit, policy, config)
    about = describe(config, policy)
    mark = fingerprint(about["weights"], policy, problems, config)
    if config.v_star:  # if it does not fit, better now than after the evaluation
        load_stage_one(config.v_star, mark, problems, config)
    folder = reopen_folder(config.out, about) if resume else new_folder(config.out)
    if not resume:
        write_json(folder / "config.json", about)
    _lock = held(folder)  # until we return, or are killed
    send = number_sink(config, folder)
    said: set[str] = set()  # Part II, F: the complaints so far; each comes once
    ref = freeze(policy)
    spread(policy, ref, config)  # over several devices, if there are
    before, base_dialogues = first_evaluation(policy, held_out, config, folder)
    v_star, problems = first_stage(ref, problems, config, folder, mark, said)
    with policy.active():  # adapters that are off count as frozen
        learning = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=config.lr, weight_decay=0.0, fused=True)
    history, evaluations = restore(folder, policy, optimizer, config)
    progress = Progress("stage 2", config.steps, len(history))
    with saved_at_the_end(policy, folder), (folder / "metrics.jsonl").open("a") as file:
        for step in range(len(history), config.steps):
            metrics = train_step(policy, ref, optimizer, problems, v_star, config, step)
            history.append(metrics)
            print(json.dumps(metrics), file=file, flush=True)
            progress.advance(1, metrics)
            send(metrics)
            explain(training_facts(history, config), said)
            stop_if_sick(history)
            if due(config.eval_every, step):
                send(check_in(policy, held_out, config, step + 1, evaluations, folder))
            if due(config.save_every, step) or step + 1 == config.steps:
                os.fsync(file.fileno())
                save_state(folder, step + 1, policy, optimizer, config)
    after, dialogues = evaluate_policy(policy, held_out, config)
    write_results(folder / "eval_results.jsonl", dialogues)
    summary = {"before": before, "after": after, "kl": recent_kl(history)}
    write_json(folder / "summary.json", summary)
    report_training(summary, base_dialogues, dialogues)
    draw(folder)
    print(f"\nwritten to {folder}: checkpoint/, metrics.jsonl, summary.json, ...")
    return summary


# --- 11. Evaluation -------------------------------------------------------------------------------
# Dialogues as in training, but on problems that were never trained on, greedily (temperature 0).
# Accuracy is measured twice: acc_t1 of the first attempt, acc_final of the last one. The difference
# is what checking was worth. A verifier that always says "correct" is right as often as the solver
# is, so we do not look at its accuracy alone but at the *balanced* one: the mean of how often it is
# right about right attempts and about wrong ones. A coin has 0.5, and so has any constant verdict.
# A trained policy makes few mistakes, and its own attempts leave little to be judged; so the verify
# turn is also scored on a fixed pool of the base's attempts, half of them right, half wrong. What
# is counted, with its error bars, is in Part II, E.


def evaluate_policy(
    policy: Policy, problems: Sequence[Problem], config: Config, temperature: float = 0.0
) -> tuple[dict[str, Any], list[Dialogue]]:
    """Dialogues about held-out problems, K of each unless greedy: (summary, dialogues)."""
    pool = evaluate_pool(policy, config)
    k = config.samples if temperature > 0 else 1
    repeated = [problem for problem in problems for _ in range(k)]
    numbers = [*range(k)] * len(problems)
    progress = Progress("evaluate", len(repeated))
    dialogues = rollout(policy, repeated, config, -1, numbers, temperature, progress)
    summary = {**summarize(dialogues), **pool}
    summary |= voting(dialogues) if k > 1 else {}
    for trait in ("level", "subject"):
        groups: dict[str, list[Dialogue]] = defaultdict(list)
        for dialogue in dialogues:
            groups[str(getattr(dialogue.problem, trait))].append(dialogue)
        summary[f"by_{trait}"] = {name: summarize(g) for name, g in sorted(groups.items())}
    return summary, dialogues


def evaluate(config: Config, temperature: float = 0.0) -> dict[str, Any]:
    """Evaluate --model on the held-out problems; writes a line a problem and the summary."""
    check_options(config)
    policy = dataclasses.replace(load_policy(config), top_p=config.top_p)
    check_context(policy, config)
    problems = load_problems(config.eval_data, config.eval_limit, policy, config)
    if config.compare:
        other = load_policy(dataclasses.replace(config, model=config.compare))
        other.top_p = config.top_p
    folder = new_folder(config.out, "-eval")
    summary, dialogues = evaluate_policy(policy, problems, config, temperature)
    if config.compare:
        _, theirs = evaluate_policy(other, problems, config, temperature)
        summary["compare"] = {"with": config.compare, **compare(dialogues, theirs)}
    write_results(folder / "eval_results.jsonl", dialogues)
    write_json(folder / "eval_summary.json", {"model": config.model, **summary})
    report_evaluation(summary)
    print(f"written to {folder}: eval_results.jsonl, eval_summary.json")
    return summary


# ==================================================================================================
# Part II: the appendix
# ==================================================================================================

# --- A. Errors, and a line that says how far we are -----------------------------------------------


class UsageError(Exception):
    """Something that the user gave is wrong: one sentence, exit status 2."""


class RunError(Exception):
    """Something failed under way: one sentence, exit status 1."""


SHOWN = {  # metric: its name on the progress line
    "loss": "loss", "acc_t1": "t1", "acc_final": "final", "verifier_balanced_acc": "verify",
    "kl": "kl",
}  # fmt: skip


class Progress:
    """A bar with the numbers that matter on a terminal; a few plain lines anywhere else."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self.label, self.total, self.done, self.before = label, total, done, done
        self.started = time.perf_counter()

    def advance(self, n: int, metrics: dict[str, Any] | None = None) -> None:
        """n more are done; `metrics` of the last one are shown."""
        tenth = self.done * 10 // self.total
        self.done = min(self.total, self.done + n)
        seconds = time.perf_counter() - self.started
        left = seconds / max(1, self.done - self.before) * (self.total - self.done)
        metrics = metrics or {}
        numbers = "".join(f"{SHOWN[k]} {show(metrics[k], 2)} " for k in SHOWN if k in metrics)
        finished = self.done >= self.total
        clock = f"{seconds:.0f} s" if finished else f"{left:.0f} s left"
        line = f"{f'{self.label} {self.done}/{self.total}':<21} {numbers} {clock}"
        if sys.stdout.isatty():
            line = re.sub("  +", "  ", line)[:79]  # 80 columns
            print(f"\r{line:<79}", end="\n" if finished else "", flush=True)
        elif finished or (metrics and self.done * 10 // self.total > tenth):
            print(line, flush=True)


def check_options(config: Config, training: bool = False) -> None:
    """Refuse nonsense before anything is loaded. Raises UsageError."""
    for item in dataclasses.fields(config):
        flag, value = "--" + item.name.replace("_", "-"), getattr(config, item.name)
        low, high, choices = (item.metadata[name] for name in ("low", "high", "choices"))
        if choices and value not in choices:
            raise UsageError(f"{flag} must be one of {', '.join(choices)}, not {value!r}")
        if not isinstance(value, str) and not (low <= value <= high and value < 2**63):
            limits = f"at least {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
            raise UsageError(f"{flag} must be {limits}, not {value}")
    if config.v_star and not Path(config.v_star).is_file():
        raise UsageError(f"--v-star {config.v_star}: no such file")
    if config.log_to != "none" and not importlib.util.find_spec(config.log_to):
        raise UsageError(f"--log-to {config.log_to}: pip install {config.log_to}")
    if training and config.temperature == 0:
        raise UsageError("--temperature 0 is greedy: training needs samples; use 1")
    if config.parallel == "fsdp" and config.lora:
        raise UsageError("--parallel fsdp does not go with --lora: use ddp")
    if not training and config.samples > 1 and config.temperature == 0:
        raise UsageError("--samples above 1 needs --temperature above 0: greedy ones are all alike")


# --- B. Loading and saving ------------------------------------------------------------------------


def local(path: str) -> Path:
    """`path` as it is or, if there is nothing, beside this file (where data/ lies)."""
    return Path(path) if Path(path).exists() or not (HERE / path).exists() else HERE / path


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """'auto' takes the GPU if there is one, and bfloat16 where the GPU has it, else float16."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, not {device!r}")
    if device != "cpu" and int(device[5:] or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: this machine has no such GPU; use --device cpu")
    if dtype == "auto":
        bf16 = device != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "float32" if device == "cpu" else "bfloat16" if bf16 else "float16"
    return torch.device(device), getattr(torch, dtype)


PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role.capitalize() + ': ' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


def open_model(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder or the hub; a LoRA checkpoint is merged into its base.

    Raises UsageError, in one sentence, for whatever is wrong with it.
    """
    logging.set_verbosity_error()  # no progress bars and warnings of others between our lines
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    hub_logging.set_verbosity_error()
    path = local(name)
    path = path / "checkpoint" if (path / "checkpoint").is_dir() else path  # the folder of a run
    if path.exists():
        path = path.resolve()  # an adapter's checkpoint remembers where its base lies
    elif name.count("/") != 1:  # a hub id is owner/name
        raise UsageError(f"--model {name}: no such folder")
    else:
        print(f"{name} is no folder here: looking on the Hugging Face hub")
    adapted = (path / "adapter_config.json").is_file()
    if path.exists() and not adapted and not (path / "config.json").is_file():
        raise UsageError(f"--model {name}: no config.json there, so this is no model folder")
    if adapted:
        import peft  # outside of the `try`: if it is missing, `main` says so
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        options = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}
        if adapted:
            model = peft.AutoPeftModelForCausalLM.from_pretrained(str(path), **options)
            model, info = model.merge_and_unload(), {"missing_keys": []}
            model.had_adapters = True
        else:
            model, info = AutoModelForCausalLM.from_pretrained(
                str(path), output_loading_info=True, **options
            )
    except Exception as error:  # transformers, safetensors and the hub each have their own kinds
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        where = "cannot be loaded" if path.exists() else "is no folder here, nor on the hub"
        raise UsageError(f"--model {name} {where}: {reason}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UsageError(f"--model {name}: its weights lack {len(missing)} tensors ({missing[0]}…)")
    if not encode(tokenizer, "1 + 1 = 2"):  # transformers makes an empty one up if there is none
        raise UsageError(f"--model {name}: no tokenizer there")
    if tokenizer.chat_template is None:
        print(f"{name} has no chat template: a plain one (User: ... Assistant: ...) is used")
        tokenizer.chat_template = (tokenizer.bos_token or "") + PLAIN_TEMPLATE
    check_head(name, model)
    return model, tokenizer


def load_policy(config: Config) -> Policy:
    """Load any causal language model of the Hugging Face format, ready to be trained."""
    device, dtype = choose_device(config.device, config.dtype)
    half = dtype == torch.float16  # also what 'auto' takes on a GPU without bfloat16
    if half and config.parallel == "fsdp" and world()[1] > 1:
        raise UsageError("--parallel fsdp does not go with float16: use ddp, or --dtype float32")
    model, tokenizer = open_model(config.model, dtype if config.lora else torch.float32)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    # A tiny model is faster on one core: handing out its small products costs more than they do,
    # and next to a busy process the cores wait for each other (seen: 20 times slower).
    torch.set_num_threads(config.threads or (1 if size < 10 else os.cpu_count() or 1))
    print(f"{config.model}: {size:,.1f}M parameters, on {device} in {str(dtype)[6:]}, ", end="")
    print(f"{torch.get_num_threads()} CPU thread(s)")
    ends = model.generation_config.eos_token_id
    ends = [*ends] if isinstance(ends, (list, tuple)) else [ends]
    ends = {i for i in [*ends, tokenizer.eos_token_id] if i is not None}
    policy = Policy(model.to(device).eval(), tokenizer, tuple(sorted(ends)), device, dtype)
    policy.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=half)
    if config.lora:
        add_adapters(policy, config.lora, config.seed)
    if config.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UsageError(f"--model {config.model} knows no --gradient-checkpointing")
        policy.model.activation_checkpointing_enable({"use_reentrant": False})
    return policy


def bridge_text(tokenizer: Any, request: str) -> str:
    """What the template writes after a response and before the next one, found with a stand-in.

    Raises UsageError for a template that changes what was said before (some drop a model's earlier
    thoughts): the policy would then be scored on a text that it did not write.
    """
    question = {"role": "user", "content": "Q"}
    said = "<think>\nhm\n</think>\n\nA"
    asked = [question, {"role": "assistant", "content": said}, {"role": "user", "content": request}]
    before, after = render(tokenizer, [question]) + said, render(tokenizer, asked)
    if not after.startswith(before):
        raise UsageError(
            "this model's chat template rewrites earlier turns, so later turns cannot extend the "
            "same tokens; give the tokenizer another chat_template, or use --revisions 0"
        )
    return after[len(before) :]


@torch.no_grad()
def check_head(name: str, model: Any) -> None:
    """`token_logps` takes decoder and head apart: refuse a model that does more in between."""
    model.eval()
    ids = torch.arange(8)[None]
    apart = model.get_output_embeddings()(model.get_decoder()(input_ids=ids).last_hidden_state)
    if not torch.allclose(apart, model(input_ids=ids).logits, atol=1e-4):
        raise UsageError(f"--model {name}: its logits are not its head's (a soft cap?)")


def weights_hash(model: Any) -> str:
    """Which weights are these? A hash over every tensor, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "lora_" in name:  # adapters start as nothing: which nothing does not matter
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def load_problems(
    source: str, limit: int, policy: Policy, config: Config, split: str = "test"
) -> list[Problem]:
    """The problems of a file, a folder or a hub data set, less those that are too long.

    split: which part of a data set with several to prefer.
    """
    path = local(source)
    lines = path.is_file() and path.suffix not in (".json", ".parquet", ".csv")
    rows = read_jsonl(path) if lines else read_dataset(source, path, split)
    problems = [to_problem(row, i, place, config) for i, (place, row) in enumerate(rows)]
    longest = config.max_prompt_tokens
    kept = [p for p in problems if p.answer.strip()]
    short = [p for p in kept if len(policy.prompt_ids(p)) <= longest]
    for left_out, why in (
        (len(problems) - len(kept), "have an empty answer"),
        (len(kept) - len(short), f"are longer than --max-prompt-tokens {longest}"),
    ):
        if left_out:
            print(f"{source}: {left_out} of {len(problems)} problems {why} and are left out")
    if not short:
        raise UsageError(f"{source} holds no problems" + (" short enough" if kept else ""))
    taken = short[: limit or None]
    print(f"{source}: {len(taken)} of {len(problems)} problems, such as")
    for problem in taken[:2]:
        text = " ".join(problem.problem.split())
        print(f"  {text[:56]}{'...' * (len(text) > 56)} -> {problem.answer[:16]}")
    return taken


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) for each line, where the place ("file, line 3") is for error messages."""
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                    json.dumps(row, ensure_ascii=False).encode()  # no broken UTF-8, no lone \ud800
                except (ValueError, RecursionError) as error:
                    raise UsageError(f"{place}: not JSON in UTF-8 ({error})") from error
                yield place, row


def read_dataset(source: str, path: Path, split: str) -> Iterator[tuple[str, Any]]:
    """The rows of a local file or folder or of a hub data set, through `datasets`.

    Of a set with several configurations (MATH has one a subject) all are read, but if one is called
    main or default, as GSM8K has it, that one alone: the others tell the same problems again.
    """
    if not path.exists() and source.count("/") != 1:  # a hub id is owner/name
        raise UsageError(f"{source}: no such file or folder")
    import datasets
    from datasets import get_dataset_config_names, load_dataset

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # an error is told below, once
    try:
        if path.is_file():
            parts = [load_dataset(path.suffix[1:], data_files=str(path))]
        else:
            names = get_dataset_config_names(str(path))
            names = [name for name in names if name in ("main", "default")][:1] or names
            parts = [load_dataset(str(path), name) for name in names]
    except Exception as error:  # `datasets` has dozens of kinds; the first line says what it is
        cause = error.__cause__ or error
        reason = str(cause).strip().split("\n")[0][:300] or type(cause).__name__
        kind = "cannot be read" if path.exists() else "is no file or folder here, nor on the hub"
        raise UsageError(f"{source} {kind}: {reason}") from error
    for part in parts:
        found = next((name for name in (split, "train", "test") if name in part), next(iter(part)))
        for number, row in enumerate(part[found]):
            yield f"{source}, {found} row {number}", row


def to_problem(row: Any, index: int, place: str, config: Config) -> Problem:
    """Read a row in MATH's schema or its common variants (question; a box or #### in the solution).
    Raises UsageError that names the place."""
    if not isinstance(row, dict):
        raise UsageError(f"{place}: not a JSON object")
    for column in filter(None, (config.problem_column, config.answer_column)):
        if column not in row:
            raise UsageError(f"{place}: no column '{column}' (there are {', '.join(row)})")
    columns = [config.problem_column or "problem", "question", "prompt"]
    text = next((row[column] for column in columns if column in row), None)
    solution = row.get("solution") or ""
    answer = row.get(config.answer_column or "answer")
    if answer is None or re.search(r"####|\\boxed", str(answer)):
        solution = str(answer or solution)
        answer = extract_answer(solution)
    answer = str(answer) if type(answer) in (int, float) else answer
    for name, value in (("problem", text), ("answer", answer)):
        if not isinstance(value, str):
            raise UsageError(f"{place}: '{name}' is missing or not a text")
    digits = re.search(r"\d+", str(row.get("level")))
    subject = row.get("subject", row.get("type")) or ""
    level = int(digits[0]) if digits else None
    return Problem(index, text, answer, str(solution), level, str(subject))


def check_context(policy: Policy, config: Config) -> None:
    """The longest possible dialogue must fit into the model's context."""
    longest = config.max_prompt_tokens + config.max_new_tokens
    if config.revisions:
        bridges = sum(len(policy.bridge_ids(p, False)) for p in (VERIFY_PROMPT, REVISE_PROMPT))
        longest += config.revisions * (2 * config.max_new_tokens + bridges)
    context = getattr(policy.model.config, "max_position_embeddings", None) or math.inf
    if longest > context:
        raise UsageError(
            f"a dialogue may take {longest} tokens, but the model's context has {context}: lower "
            "--max-prompt-tokens, --max-new-tokens or --revisions"
        )


def describe(config: Config, policy: Policy) -> dict[str, Any]:
    """What config.json says of a run: every option, and what it ran on."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "numpy": np.__version__}
    # What "auto" has become here, so that a run that goes on elsewhere computes in the same way.
    found = {"threads": torch.get_num_threads(), "dtype": str(policy.dtype)[6:]}
    weights = weights_hash(policy.model)
    return {**dataclasses.asdict(config), **found, "versions": versions, "weights": weights}


def new_folder(path: str, suffix: str = "") -> Path:
    """Make a folder for results. Raises UsageError rather than touch what is there already."""
    if world()[0]:  # of several processes the first one writes; the others' copies are forgotten
        copy_of_it = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, copy_of_it, ignore_errors=True)
        return copy_of_it
    folder = Path(path or time.strftime("runs/%Y%m%d-%H%M%S") + suffix)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if {file.name for file in folder.iterdir()} - {".probe", "config.json.partial"}:  # a kill's
            go_on = f", or go on with that run: train --resume {folder}" * is_unfinished(folder)
            raise UsageError(f"--out {folder} holds files already: name a new folder{go_on}")
        (folder / ".probe").touch()
        (folder / ".probe").unlink()
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be written: {error.strerror}") from error
    return folder


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is whole or not there at all."""
    with whole_or_not(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def whole_or_not(path: Path, mode: str = "w") -> Iterator[Any]:
    """A file to write that takes its place, on the disk, only when it is complete."""
    partial = path.with_name(path.name + ".partial")
    with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_results(path: Path, dialogues: Iterable[Dialogue]) -> None:
    """A line per dialogue: every turn's text, extracted answer and verdict."""
    with whole_or_not(path) as file:
        for dialogue in dialogues:
            turns = [dataclasses.asdict(turn) for turn in dialogue.turns]
            final = dialogue.attempts[-1].correct
            row = {**dataclasses.asdict(dialogue.problem), "correct": final, "turns": turns}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def save_model(policy: Policy, folder: Path) -> None:
    """An ordinary Hugging Face folder (with LoRA: of the adapters), written beside its place and
    then renamed."""
    dealt_out = isinstance(policy.model, FSDPModule)  # by fsdp; else the model has its own whole
    weights = get_model_state_dict(policy.model, options=WHOLE) if dealt_out else None
    if world()[0]:
        return
    partial = folder.with_name(folder.name + ".partial")
    try:
        policy.model.save_pretrained(partial, state_dict=weights)
        policy.tokenizer.save_pretrained(partial)
        for file in partial.iterdir():
            with file.open("r+b") as there:  # on the disk before the name is
                os.fsync(there.fileno())
        shutil.rmtree(folder, ignore_errors=True)  # an earlier best/
        partial.rename(folder)
    except Exception as error:  # safetensors has a kind of its own for a full disk
        raise RunError(f"the model cannot be saved in {folder}: {error}") from error


@contextlib.contextmanager
def saved_at_the_end(policy: Policy, folder: Path) -> Iterator[None]:
    """Save the policy to folder/checkpoint when the block ends, by Ctrl-C or an error too (one
    process of several cannot do that alone)."""
    try:
        yield
    except KeyboardInterrupt:
        saved = f"; {folder}/checkpoint is the model as it is now" * (world()[1] == 1)
        raise RunError(f"stopped; go on with 'train --resume {folder}'{saved}") from None
    finally:
        if world()[1] == 1 or sys.exc_info()[0] is None:
            save_model(policy, folder / "checkpoint")


def fingerprint(weights: str, policy: Policy, problems: list[Problem], config: Config) -> str:
    """What stage 1's samples depend on (but for the seed: any sample of the reference will do)."""
    sampling = (config.num_samples, config.temperature, config.revisions, config.max_new_tokens)
    texts = [(p.index, p.problem, p.answer) for p in problems]
    prompts = (SOLVE_PROMPT, VERIFY_PROMPT, REVISE_PROMPT)
    first = policy.prompt_ids(problems[0])  # tells the tokenizer and its chat template
    version = 2  # of v_star.jsonl
    everything = json.dumps([version, weights, sampling, texts, prompts, first])
    return hashlib.sha256(everything.encode()).hexdigest()[:16]


def save_stage_one(path: Path, mark: str, dialogues: Sequence[Dialogue], v_star: Baselines) -> None:
    """A head line, then a line per problem: V^* by role, and of each turn of each sample its role,
    whether its answer is right, and its verdict."""
    with whole_or_not(path) as file:
        print(json.dumps({"fingerprint": mark}), file=file)
        for group in by_problem(dialogues):
            problem = group[0].problem
            values = {role: v_star[problem.index, role] for role in ROLES}
            samples = [[(t.role, t.correct, t.verdict) for t in d.turns] for d in group]
            row = {"index": problem.index, "problem": problem.problem, "level": problem.level}
            row |= {"v_star": values, "samples": samples}
            print(json.dumps(row, ensure_ascii=False), file=file)


def load_stage_one(path: str, mark: str, problems: list[Problem], config: Config) -> list[Dialogue]:
    """The dialogues of a v_star.jsonl, without their texts: enough for any beta1 and alpha."""
    head, *rows = [row for _, row in read_jsonl(Path(path))] or [None]
    if head != {"fingerprint": mark} or len(rows) != len(problems):
        raise UsageError(
            f"--v-star {path} is cut off, or was made with other weights, problems, sampling "
            "options or by another version; leave --v-star out to run stage 1 again"
        )
    dialogues = []
    for problem, row in zip(problems, rows):
        for sample in row["samples"]:
            turns = [Turn(r, 0, 0, "", True, correct=c, verdict=v) for r, c, v in sample]
            dialogues.append(Dialogue(problem, turns=turns))
            dialogues[-1].pay(config.alpha)
    return dialogues


def first_evaluation(
    policy: Policy, held_out: Sequence[Problem], config: Config, folder: Path
) -> tuple[dict[str, Any], list[Dialogue]]:
    """The evaluation before training; a run that goes on has it in before.json."""
    path = folder / "before.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8")), []
    before, dialogues = evaluate_policy(policy, held_out, config)
    write_json(path, before)
    return before, dialogues


def first_stage(
    ref: Policy, problems: list[Problem], config: Config, folder: Path, mark: str, said: set[str]
) -> tuple[Baselines, list[Problem]]:
    """Stage 1, sampled or read (--v-star, a run that goes on): V^*, and what to train on."""
    path, journal = folder / "v_star.jsonl", folder / "stage-1.jsonl"
    if config.v_star or path.exists():
        dialogues = load_stage_one(config.v_star or str(path), mark, problems, config)
    else:
        dialogues = stage_one(ref, problems, config, journal)
    v_star = baselines(dialogues, config)
    save_stage_one(path, mark, dialogues, v_star)
    journal.unlink(missing_ok=True)  # its texts have done their service
    report_stage_one(dialogues, v_star)
    explain(stage_one_facts(dialogues, config), said)
    solved = {d.problem.index for d in dialogues if d.attempts[0].correct}
    kept = [p for p in problems if p.index in solved or not config.drop_unsolved]
    if not kept:
        raise RunError("stage 1 solved no problem: --drop-unsolved leaves nothing to train on")
    return v_star, kept


# --- C. The algebra of answers --------------------------------------------------------------------
# What section 3 leaves out: its limits and its table of spellings; cutting a clean text into tokens
# and the tokens into structure (`Node`); computing values by recursive descent (`Reader`, a method
# for each rule of the grammar), with arithmetic that counts its steps (`Work`); and comparing.
#
# Promised: fractions, decimals, roots, powers, i, trigonometric and logarithmic values, algebra,
# equations with terms moved across, inequalities as intervals, tuples, sets, lists, unions,
# plus-minus, matrices, numbers in a base, words. Units, percent, degree and currency signs are
# decoration. Deliberately not: tolerances (0.33 is not 1/3), unit conversion (5 cm and 5 m are
# both 5), prose, calculus, factorials, |x|, merging of intervals, tuples as column vectors.

MAX_ANSWER = 2_000  # characters; the longest gold in MATH has about 160
MAX_TAIL = 20_000  # characters at the end in which "the answer is" is looked for
MAX_DEPTH = 40  # brackets, roots and exponents inside each other
MAX_BITS = 16_000  # of a numerator or denominator: 2^{4950} is a gold answer
MAX_INEXACT = 400  # characters of both answers, if digits of roots are to be computed
MAX_EXPONENT = 40  # with roots around, numbers stay in 10^-40 .. 10^40: a smaller term could drown
MAX_STEPS = 5_000  # work for one comparison; a step is about four microseconds
MAX_POINTS = 8  # both signs of three variables


# Cleaning: all spellings of a sign become one character, and what is only typography a space.
SPELLINGS = r"""␣ \left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \displaystyle \mathbf \mathit
    \boldsymbol \! \, \; \: \> \quad \qquad \( \) \[ \] \$ \% ~ $ % ¢ € £ " \boxed \fbox | · \cdot \times \ast × ⋅ *
    | - − – — | / \div ÷ ⁄ | ≤ \le \leq \leqslant | ≥ \ge \geq \geqslant | < \lt | > \gt | ≠ \ne \neq
    | ± \pm | ∓ \mp | ∪ \cup | ∈ \in | ∞ \infty | ° \circ \degree | π \pi | ( \langle ⟨ | ) \rangle ⟩
    | \{ \lbrace | \} \rbrace | \{\} \emptyset \varnothing ∅ | … \ldots \dots | \overline \bar
    | \frac \dfrac \tfrac \cfrac | \frac12 ½ | \frac13 ⅓ | \frac23 ⅔ | \frac14 ¼ | \frac34 ¾
    | ^2 ² | ^3 ³ | \text \mbox \textbf \textit \textrm \textnormal \mathrm \operatorname"""
PLAIN = {"\\ ": " "} | {
    old: new.replace("␣", " ")
    for new, *olds in map(str.split, SPELLINGS.split("|"))
    for old in olds
}
SIGN = re.compile(r"\\(?:[a-zA-Z]+|.)|[^\sa-zA-Z0-9+\-(){},.=^_]", re.DOTALL)
BARE_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!,?[0-9])")
REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\b([0-9]{4})-([01][0-9])-([0-3][0-9])\b", r"\1?\2?\3"),  # a date is no difference
        (r"\\frac\{d[^{}]*\}\{d ?[a-z]", "?"),  # a derivative, which we do not take
        (r"\\mathbb ?\{?R\b\}?|ℝ", "(-∞;∞)"),  # all real numbers
        (r"\b([apAP])\.([mM])\b\.?", r"\1\2"),
        (r"(:[0-9]{2})\s*([aApP][mM])\b", r'\1"\2"'),
        (r"\\text\s*\{([^{}]*)\}", r'"\1"'),
        (r"\\begin\s*\{[pb]matrix\}|[(\[]\s*\\begin\s*\{(?:matrix\}|array\}\s*\{[lcr ]*\})", "⟦"),
        (r"\\end\s*\{[pb]matrix\}|\\end\s*\{(?:matrix|array)\}\s*[)\]]", "⟧"),
        (r"\\\\\s*\[[0-9.]+\s*[a-z]{2}\]", r"\\\\"),  # the height of a row
        (r"\^\s*(?:\{\s*°\s*\}|°)", "°"),
        (r"_\s*\{([0-9]+|\w)\}", r"_\1 "),  # the space in \log_{2}8 tells the base
        (r'^([0-9.+-]+°)[ "]*[CF]"?$', r"\1"),
        (r"(?<=[0-9])\s*,\s+(?=[0-9])", ";"),  # 1, 250 is two numbers, 1,250 one
        (r"(?<![0-9_])([0-9]+)\s+([1-9][0-9]*)/([0-9]+)", r"\1\\frac{\2}{\3}"),  # 57 5/6
        (r"√\s*([0-9]+)", r"\\sqrt{\1}"),
        ("√", r"\\sqrt "),
        (r"\\(frac|sqrt)\s*([0-9])", r"\\\1{\2}"),  # as LaTeX does: \sqrt23 is \sqrt{2} 3
        (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
        (  # 0.1\overline{6} is 0.10 + 6/90
            r"(?<![0-9])([0-9]*\.([0-9]*))\\overline\s*\{([0-9]+)\}",
            lambda m: rf"({m[1]}0+\frac{{{m[3]}}}{{{'9' * len(m[3])}{'0' * len(m[2])}}})",
        ),
        (r"\s+", " "),
        (r"(?<![A-Za-z0-9.]) | (?![A-Za-z0-9.])", ""),
        (  # 2\frac{1}{3} is two and a third; 2\frac{7}{3} has two readings and gets none
            r"(?<![\w.^ })])([0-9]+)(\\frac\{([0-9]+)\}\{([0-9]+)\})",
            lambda m: f"({m[1]}+{m[2]})" if int(m[3]) < int(m[4]) else f"?{m[0]}",
        ),
    )
]


BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*(?:\[[^]{}]*\]\s*)*|\\.|[{}]", re.DOTALL)


def last_box(text: str) -> str:
    """Return what is inside the last outermost box; '' when it is empty or never closed."""
    content, depth, start, inside = "", 0, 0, 0
    for match in BOX.finditer(text):
        if match[0] in "{}":
            depth += 1 if match[0] == "{" else -1
            if inside and depth < inside:
                content, inside = text[start : match.start()], 0
        elif len(match[0]) > 4 and not inside:
            start = match.end()
            if text[start : start + 1] == "{":
                content, start, inside = "", start + 1, depth + 1
            else:  # \boxed 5 has no braces: take the next word
                content = re.match(r"[^\s$]*", text[start:])[0].rstrip(".,;")
    return content.strip()


def normalize_answer(answer: str | None) -> str:
    r"""Return `answer` in the one spelling that `is_equiv` reads; text stands in "quotes".

    >>> normalize_answer(r"$\left[ \dfrac12,\, 10{,}000 \pi \right)$.")
    '[\\frac{1}{2};10000π)'
    """
    text = (answer or "").strip("* \t\r\n")
    if len(text) > MAX_ANSWER:
        return text  # too long to be read: it will equal itself and nothing else
    separator = r"(?<=[0-9])(?:\{,\}|,\\!|\\,|\\[ ;:](?![0-9]+/))\s*(?=[0-9]{3}(?![0-9]))"
    text = re.sub(separator, "", text)
    text = text.replace("...", "…").replace("**", "^")
    text = SIGN.sub(lambda sign: PLAIN.get(sign[0], sign[0]), text)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = text.rstrip(" .,;:\\")
    if not re.search(r"[(\[]|\\\{", text):  # 31,250 is one number, (31,250) a pair
        text = BARE_THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    return text


class Node(NamedTuple):
    """A piece of an answer; `tag` is the text of a value, the brackets of a row, a name."""

    kind: str
    tag: str = ""
    parts: tuple[Node, ...] = ()
    tokens: tuple[str, ...] = ()


TOKEN = re.compile(
    r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?"
    r'|"[^"]*"|\\(?:[a-zA-Z]+|.)|[A-Za-z]+|\S'
)
SYMBOL = re.compile(
    r"(?![ei]$)(?:[a-zA-Z]|[A-Z]+|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|sigma|tau))"
)
OPEN, CLOSE = {"(", "[", "{", r"\{", "⟦"}, {")", "]", "}", r"\}", "⟧"}
FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "ln", "log"}
BARE = {name: "\\" + name for name in FUNCTIONS | {"sqrt"}}
BARE |= {"pi": "π", "infinity": "∞", "and": ",", "or": "or"}
UNIT = re.compile(  # anything in the plural is one, too, but for the words of NO_UNIT
    "[cmk]?m|ft|in|inch|foot|feet|yd|mile|mi|mph|k?g|lbs?|oz|m?l|s|secs?|second|min|minute|h|hrs?"
    "|hour|day|week|month|year|unit|usd|euro|dollar|cent|square|cubic|percent|rad|celsius|fahrenheit"
    "|people|(wo)?men|children|[a-z]{2,}[a-rt-z]s"
)
WORD = re.compile(UNIT.pattern + "|no|pm|(?=.*[eiou]).{3,}")
NO_UNIT = re.compile(  # 5 million dollars is not 5
    "or|and|not?|more|less|fewer|than|least|most|times|plus|minus|perhaps|maybes?|is|was|as|if|to|vs"
    "|from|over|under|above|below|point|ten(s|ths)?|(hal[fv]|quarter|zero|one|two|thir|four|fort|fi[fv]"
    "|six|seven|eigh|nin|elev|twel|twen|score|dozen|hundred|thousand|[a-z]+illion|negative)[a-z]*"
)


def tokenize(text: str) -> list[str]:
    """Cut normal text into numbers, commands, letters, signs and "words"; check the depth."""
    tokens: list[str] = []
    depth = 0
    for token in TOKEN.findall(text):
        depth += (token in OPEN) - (token in CLOSE)
        if depth > MAX_DEPTH:
            raise Unsure("too deep")
        low = token.lower()
        if low.strip('", ') in BARE:
            tokens.append(BARE[low.strip('", ')])
        elif len(token) > 1 and token.isalpha() and WORD.fullmatch(low):
            tokens.append(f'"{token}"')
        else:  # AB is one name, xy is a product
            tokens.extend(token if token.isalpha() and not token.isupper() else [token])
    return tokens


def split(tokens: list[str], marks: set[str]) -> tuple[list[list[str]], str]:
    """Cut `tokens` at the `marks` outside all brackets; return the pieces and the marks met."""
    pieces: list[list[str]] = [[]]
    met, depth = "", 0
    for token in tokens:
        depth += (token in OPEN) - (token in CLOSE)
        if depth == 0 and token in marks:
            met += token
            pieces.append([])
        else:
            pieces[-1].append(token)
    return pieces, met


@lru_cache(maxsize=128)  # a gold answer meets a whole group of samples
def read_answer(text: str) -> Node:
    """Read normal text into a Node; several items make an unordered set."""
    if text[0] == text[-1] == '"' and text.count('"') == 2 and not text[1:-1].isalpha():
        text = text[1:-1]
    items, marks = read_items(tokenize(text))
    if set(marks) == set("or") and all(i.kind == "label" and i.parts[0].parts for i in items):
        return Node("union", "", items)  # x < 1 or x > 2
    return Node("set", "", items) if len(items) > 1 else items[0] if items else Node("value", text)


def read_items(tokens: list[str]) -> tuple[tuple[Node, ...], str]:
    """Read a list; plus-minus makes two items of one."""
    pieces, marks = split(tokens, {",", ";", "or"})
    if marks and not (pieces[0] and pieces[-1]):
        raise Unsure(",5 has two readings, and '5 or' is no answer")
    items = []
    for piece in filter(None, pieces):
        both = {"±", "∓"} & set(piece) and r"\{" not in piece and piece.count("±") < 2
        for signs in ({"±": "+", "∓": "-"}, {"±": "-", "∓": "+"}) if both else ({},):
            items.append(read_item(without_unit([signs.get(token, token) for token in piece])))
    if "or" in marks and any(i.kind == "value" and re.match('"|[A-Z]', i.tag) for i in items):
        raise Unsure("A or B, Alice or Bob: a choice not made")
    return tuple(items), marks


def without_unit(tokens: list[str]) -> list[str]:
    """Drop a trailing unit such as 'square inches' or cm^2, unless its words change the value."""
    start = next((i for i, token in enumerate(tokens) if token[0] == '"'), 0)
    tail = "".join(tokens[start:])
    words = re.findall("[a-z]+", tail.lower()) or [""]
    shape = re.fullmatch(r'("(?! *M")[^"0-9]*")+(\^(\{[23]\}|[23]))?', tail)
    shape = shape and re.search("[^a-zA-Z]", "".join(tokens[:start]))  # all integers: no unit
    known = UNIT.fullmatch(words[-1]) and not any(map(NO_UNIT.fullmatch, words))
    return tokens[:start] if shape and known else tokens


def read_item(tokens: list[str]) -> Node:
    """Read equations, inequalities and memberships; those that fix one symbol label a value."""
    pieces, signs = split(tokens, set("=<>≤≥≠∈"))
    if not signs:
        return read_union(tokens)
    if set(signs) <= set(">≥"):  # b > x > a is a < x < b
        pieces, signs = pieces[::-1], signs[::-1].translate(str.maketrans(">≥", "<≤"))
    sides = [read_union(piece) for piece in pieces]
    if signs in ("=", "∈", "≠"):
        for n in (0, 1):
            name, value = sides[n], sides[1 - n]
            if is_symbol(name) and (is_fixed(value) or " ( " in name.tag):
                if signs == "≠":
                    rows = (Node("row", "()", ends) for ends in ((LOW, value), (value, HIGH)))
                    value = Node("union", "", tuple(rows))
                return Node("label", " ".join(pieces[n]), (value,))
    if signs in ("=", "≠"):  # (left - right)^2 is the same on whatever side the terms stand
        tokens = ["(", *pieces[0], "-", "(", *pieces[1], ")", ")", "^", "2"]
        return Node("relation", signs, (), tuple(tokens))
    ends = sides
    if signs in ("<", "≤"):  # the other end is infinitely far away
        first = is_symbol(sides[0])
        ends = [LOW, *sides] if first else [*sides, HIGH]
        signs = "<" + signs if first else signs + "<"
    if re.fullmatch("[<≤]{2}", signs) and is_symbol(ends[1]) and is_fixed(ends[0], ends[2]):
        brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
        return Node("label", ends[1].tag, (Node("row", brackets, (ends[0], ends[2])),))
    return Node("chain", signs, tuple(sides))


LOW, HIGH = Node("value", "- ∞", (), ("-", "∞")), Node("value", "∞", (), ("∞",))


def is_symbol(node: Node) -> bool:
    r"""Say whether the node is x, x_1, f(x), \angle A, or variables in the usual order: (x, y)."""
    names = [part.tag.strip("\\") for part in node.parts]
    if node.kind == "row":
        return all(map(is_symbol, node.parts)) and names == sorted(names)
    name = SYMBOL.pattern + r"(?: _ (?:\w+|\{ \w+ \}))?|\{ [a-zA-Z] \}"
    name += r"|[fghpqFGHPQ] \( [a-zA-Z] \)|(?:m )?\\angle [A-Z]+"
    return re.fullmatch(name, node.tag) is not None


def is_fixed(*nodes: Node) -> bool:
    """Say whether no variable occurs in the nodes."""
    return all(is_fixed(*n.parts) and not any(map(SYMBOL.fullmatch, n.tokens)) for n in nodes)


def read_union(tokens: list[str]) -> Node:
    """Read unions, matrices and brackets; other tokens are one value."""
    pieces, met = split(tokens, {"∪"})
    if met:
        return Node("union", "", tuple(map(read_union, pieces)))
    inside, ends = tokens[1:-1], "".join(tokens[:1] + tokens[-1:])
    if len(tokens) > 1 and not split(tokens[:-1], CLOSE)[1]:  # nothing closes before the end
        if ends == "⟦⟧":
            rows = [split(row, {"&"})[0] for row in split(inside, {r"\\"})[0] if row]
            cells = tuple(read_item(cell) for row in rows for cell in row)
            return Node("matrix", str([*map(len, rows)]), cells)
        if ends == r"\{\}":
            return Node("set", "", read_items(inside)[0])
        pieces, met = split(inside, {",", ";"})
        if met and (ends in ("()", "[]") or len(pieces) == 2 and ends in ("(]", "[)")):
            return Node("row", ends, tuple(map(read_item, pieces)))
    return Node("value", " ".join(tokens), (), tuple(tokens))


# Computing: a number is a pair of fractions (real, imaginary). Roots and the like are cut after
# some hundred decimals; everything else is exact.
class Number(NamedTuple):
    """A complex number: its real and imaginary part."""

    re: Fraction
    im: Fraction = Fraction(0)


ONE, TEN, MINUS_ONE, HALF, I = map(Number, map(Fraction, (1, 10, -1, "1/2", 0)), (0, 0, 0, 0, 1))


class Work:
    """Arithmetic for one comparison: it counts its steps and refuses what grows too large."""

    def __init__(self, seed: str) -> None:
        self.seed, self.steps, self.exact, self.logs = seed, 0, True, {}
        self.parity = False  # (-1)^n is known to be no -1 only where n is even: look longer
        self.scale = 10 ** (200 + 2 * len(seed))
        self.noise = Fraction(10**100, self.scale)  # no value we compute errs as much
        self.go_to(0)

    def go_to(self, point: int) -> None:
        self.point, self.extreme, self.complex, self.variables = point, False, False, {}

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise Unsure("too much work")

    def fit(self, re: Fraction, im: Fraction) -> Number:
        """Make a number: charge for it and check its size."""
        for part in (re, im):
            top, bottom = abs(part.numerator), part.denominator
            bits = max(top.bit_length(), bottom.bit_length())
            self.spend(1 + bits // 100)
            if bits > MAX_BITS:
                raise Unsure("too many digits")
            if top:
                self.extreme |= top > bottom * 10**MAX_EXPONENT or bottom > top * 10**MAX_EXPONENT
        return Number(re, im)

    def add(self, x: Number, y: Number) -> Number:
        parts = (x.re + y.re, x.im + y.im)
        if not self.exact:  # what is left of terms that cancel
            parts = (part if abs(part) > self.noise else part * 0 for part in parts)
        return self.fit(*parts)

    def multiply(self, x: Number, y: Number) -> Number:
        if not x.im and not y.im:
            return self.fit(x.re * y.re, x.im)
        return self.fit(x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re)

    def divide(self, x: Number, y: Number) -> Number:
        if not x.im and not y.im:
            return self.fit(x.re / y.re, x.im)
        size = y.re * y.re + y.im * y.im
        return self.multiply(x, self.fit(y.re / size, -y.im / size))

    def power(self, x: Number, y: Number) -> Number:
        """Square and multiply; a broken exponent is a root, the real one if there is one."""
        top, bottom = y.re.as_integer_ratio()
        if not y.im and bottom % 2 and bottom > 1 and x.re < 0 and not x.im:
            self.parity |= bottom > 9
            size = self.power(Number(-x.re), y)
            return Number(-size.re) if top % 2 else size
        if y.im or bottom > 2 or bottom == 2 and x.im:
            return self.exp(self.multiply(y, self.log(x)))
        x, result = self.square_root(x.re) if bottom == 2 else x, ONE
        for bit in bin(abs(top))[2:]:
            result = self.multiply(result, result)
            result = self.multiply(result, x) if bit == "1" else result
        return self.divide(ONE, result) if top < 0 else result

    def square_root(self, x: Fraction) -> Number:
        root = Fraction(*map(math.isqrt, abs(x).as_integer_ratio()))
        if root * root != abs(x):
            self.cut(Fraction(0))
            root = Fraction(math.isqrt(int(abs(x) * self.scale**2)), self.scale)
        return self.fit(root, x * 0) if x >= 0 else self.fit(x * 0, root)

    def cut(self, *parts: Fraction) -> Number:
        """Make an inexact number, where what is as small as the noise can only be zero."""
        self.exact = False
        if len(self.seed) > MAX_INEXACT:
            raise Unsure("too long to be computed with enough digits")
        cut = (Fraction(int(part * self.scale), self.scale) for part in parts)
        return Number(*(part if abs(part) > self.noise else Fraction(0) for part in cut))

    def exp(self, x: Number) -> Number:
        """Sum the series of e^(x / 2^40), where a term adds ten digits at least; square back."""
        scale, (a, b) = self.scale, self.cut(*x)
        self.spend(scale.bit_length() ** 2 // 10_000)
        if abs(a) > 90:
            raise Unsure("too large or too small")
        b = b % (2 * self.pi) if abs(b) > 7 else b
        a, b = int(a * scale) >> 40, int(b * scale) >> 40
        re, im = term_re, term_im = scale, 0
        for n in range(1, scale.bit_length() // 33):
            term_re, term_im = term_re * a - term_im * b, term_re * b + term_im * a
            term_re, term_im = term_re // (n * scale), term_im // (n * scale)
            re, im = re + term_re, im + term_im
        for _ in range(40):
            re, im = (re * re - im * im) // scale, 2 * re * im // scale
        return self.cut(Fraction(re, scale), Fraction(im, scale))

    def log(self, x: Number) -> Number:
        """Solve e^y = x by Halley's rule: every round triples the 15 digits of the float."""
        if x not in self.logs:
            if self.extreme:
                raise Unsure("too large or too small")
            start, good = cmath.log(complex(*x)), 15
            y = Number(Fraction(start.real), Fraction(start.imag))
            while 10**good < self.scale:
                good *= 3
                e = self.exp(y)
                a, b, c, d = x.re - e.re, x.im - e.im, x.re + e.re, x.im + e.im
                size = (c * c + d * d) / 2  # y += 2 (x - e) / (x + e)
                y = self.cut(y.re + (a * c + b * d) / size, y.im + (b * c - a * d) / size)
            self.logs[x] = y
        return self.logs[x]

    @cached_property
    def pi(self) -> Fraction:
        return self.log(MINUS_ONE).im


class Reader:
    """Recursive descent that computes as it reads: a method for each rule of the grammar."""

    def __init__(self, tokens: tuple[str, ...], work: Work) -> None:
        self.tokens = ["", *tokens[::-1]]  # a stack: the last one is the next to be read
        self.work, self.depth = work, 0
        self.in_call = False  # sin 30° is 1/2; outside of calls the sign is decoration

    def take(self, *wanted: str) -> str:
        return self.tokens.pop() if self.tokens[-1] in wanted else ""

    def need(self, *wanted: str) -> None:
        if not self.take(*wanted):
            raise Unsure(f"{self.tokens[-1]!r} has no place here, or too many of them")

    def whole(self) -> Number:
        if "∞" in self.tokens and "".join(self.tokens).rstrip("+-") != "∞":
            raise Unsure("∞ - ∞ is no number")
        value = self.sum()
        if self.tokens != [""]:
            raise Unsure("something is left over")
        return value

    def sum(self) -> Number:
        total = self.product()
        while self.tokens[-1] in ("+", "-"):
            total = self.work.add(total, self.product())
        return total

    def product(self) -> Number:
        total, mark = self.factor(), ""
        while self.tokens[-1] in ("·", "/") or self.starts_factor():
            if mark == "/" and self.starts_factor():
                raise Unsure("1/2x has two readings")
            mark = self.take("·", "/")
            step = self.work.divide if mark == "/" else self.work.multiply
            total = step(total, self.factor())
        return total

    def starts_factor(self) -> bool:
        """Say whether a factor follows without a sign; a number may not (1 2 is not 2)."""
        return re.match(r"[({∞]|\\?[^\W\d_]", self.tokens[-1]) is not None

    def factor(self, powers: bool = True) -> Number:
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        value = self.atom()
        if powers and self.take("^"):
            value = self.work.power(value, self.factor(powers=False))
            if self.tokens[-1] == "^":
                raise Unsure("2^3^4 has two readings")
        if self.take("°") and self.in_call:
            value = self.work.multiply(value, Number(self.work.pi / 180))
        return self.work.multiply(MINUS_ONE, value) if negative else value

    def atom(self) -> Number:
        self.depth += 1
        self.work.spend(2)
        token = self.tokens.pop().strip('"')
        if self.depth > MAX_DEPTH:
            raise Unsure("too deep")
        if token[1:] in FUNCTIONS:
            value = self.call(token[1:])
        elif token == "∞" or SYMBOL.fullmatch(token) or self.tokens[-1] == "_":
            value = self.variable(token)
        elif token[0] in "0123456789.":
            value = self.work.fit(Fraction(token), Fraction(0))
        elif token in ("(", "{"):
            value = self.sum()
            self.need(")" if token == "(" else "}")
        elif token == r"\frac":
            value = self.work.divide(self.factor(powers=False), self.factor(powers=False))
        elif token == r"\sqrt":
            degree = HALF
            if self.take("["):
                degree = self.work.divide(ONE, self.sum())
                self.need("]")
            value = self.work.power(self.factor(powers=False), degree)
        elif token == "π":
            value = Number(self.work.pi)
        elif token == "e":
            value = self.work.exp(ONE)
        elif token == "i":
            value, self.work.complex = I, True
        else:
            raise Unsure(f"what is {token!r}?")
        self.depth -= 1
        return value

    def variable(self, name: str) -> Number:
        """Give a variable, or a number in a base such as 12_5, its random value at this point."""
        if self.take("_"):
            group = self.take("{")
            name += "_" + self.tokens.pop()
            while group and not self.take("}"):
                name += self.tokens.pop()
        if name in "fgFGP" and self.tokens[-1] == "(":
            raise Unsure("f(2x) is not 2 f(x)")
        known, point = self.work.variables, self.work.point
        if name not in known:
            draw = random.Random(f"{self.work.seed} {name} {point}").randint
            value = Fraction(draw(1000, 3000), draw(1000, 3000))
            negative = point >> len(known) & 1 if len(known) < 3 else draw(0, 1)
            known[name] = Number(-value if negative else value)
        return known[name]

    def call(self, name: str) -> Number:
        r"""Read \sin^2 3x or \log_2(8); a bare argument runs on while factors are juxtaposed."""
        work = self.work
        base = self.atom() if name == "log" and self.take("_") else TEN
        exponent = self.factor(powers=False) if self.take("^") else ONE
        outer, self.in_call = self.in_call, True
        bracket = self.tokens[-1] in ("(", "{")
        x = self.atom() if bracket else self.factor()
        while not bracket and self.starts_factor() and self.tokens[-1][1:] not in FUNCTIONS:
            x = work.multiply(x, self.factor())
        self.in_call = outer
        if exponent.re <= 0 or self.tokens[-1] in ("^", "°", "°" if bracket else "/"):
            raise Unsure("sin^{-1} x, sin(x)^2 and sin x/2 have two readings")
        if name in ("ln", "log"):
            value = work.log(x) if name == "ln" else work.divide(work.log(x), work.log(base))
            return work.power(value, exponent)
        if x.im:
            raise Unsure("an angle is real")
        cos, sin = map(Number, work.exp(work.multiply(I, x)))
        parts = {"sin": (sin, ONE), "cos": (cos, ONE), "tan": (sin, cos)}
        parts |= {"cot": (cos, sin), "sec": (ONE, cos), "csc": (ONE, sin)}
        return work.power(work.divide(*parts[name]), exponent)


def same(a: Node, b: Node, work: Work) -> bool:
    """Compare structures piece by piece, and values by computing them."""
    work.spend(5)
    if a.kind != b.kind and "label" in (a.kind, b.kind):  # x = 5 against 5
        return same(*(node.parts[0] if node.kind == "label" else node for node in (a, b)), work)
    if a.kind != b.kind:
        return False
    if a.kind in ("set", "union"):
        return matched(a.parts, b.parts, work)
    if a.kind == "value":
        return prose(a.tag) == prose(b.tag) or agree(a, b, work)
    if a.tag != b.tag or len(a.parts) != len(b.parts):
        return False
    if a.kind == "relation":
        return agree(a, b, work)
    return all(same(x, y, work) for x, y in zip(a.parts, b.parts))


def matched(a: tuple[Node, ...], b: tuple[Node, ...], work: Work) -> bool:
    """Pair off two unordered collections; x = 1, y = 2 is not simply 1, 2."""
    labels = {node.tag if node.kind == "label" else "" for node in (*a, *b)}
    if len(a) != len(b) or len(labels) > 2 and "" in labels:
        return False
    rest = list(b)
    for x in a:
        hit = next((i for i, y in enumerate(rest) if same(x, y, work)), None)
        if hit is None:
            return False
        rest.pop(hit)
    return True


def prose(text: str) -> str:
    """Fold the case and the spacing of words and times, but of nothing that may be algebra."""
    if not re.fullmatch(r"(?=.*\")[\w\s.:'\"-]+", text):
        return text
    words = text.lower() if re.search("[a-zA-Z]{2}", text) else text  # \text{m} is not M
    return re.sub(r"(?<![0-9])[\s\".]|[\s\".](?![0-9])", "", words)


def agree(a: Node, b: Node, work: Work) -> bool:
    """Compare two values at random points, as real functions: where both are not real, skip."""
    agreed = 0
    for point in range(MAX_POINTS):
        work.go_to(point)
        try:
            x, y = (Reader(node.tokens, work).whole() for node in (a, b))
        except (Unsure, ArithmeticError, ValueError, IndexError):
            return False
        count = len(work.variables)
        if count and x.im and y.im and not work.complex:
            continue
        error = 0 if work.exact else work.noise * max(1, abs(x.re), abs(x.im))
        if work.extreme and not work.exact or max(abs(x.re - y.re), abs(x.im - y.im)) > error:
            return False
        agreed += 1
        if not count or agreed > 2 and point + 2 > 2**count and not work.parity:
            return count > 0 or a.kind == "value"
    return agreed > 1


# --- D. The report --------------------------------------------------------------------------------


def show(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def recent_kl(history: Sequence[dict[str, Any]]) -> float:
    """KL to the reference, in nats a turn: the mean over the last five training batches."""
    return mean(m["kl"] for m in history[-5:] if m["kl"] is not None) or 0.0


def report_stage_one(dialogues: Sequence[Dialogue], v_star: Baselines) -> None:
    """What the reference can do: the distribution of V^*, and how many problems can teach."""
    solved = scores(dialogues, 0)  # of N samples, for each problem
    never, always = mean(s == 0 for s in solved), mean(s == 1 for s in solved)
    values = {role: [v for (_, r), v in v_star.items() if r == role] for role in ROLES}
    counts, _ = np.histogram(values["solve"], bins=10, range=(0, 1))
    print(f"V* of {len(solved)} problems, solve role:")
    for tenth, count in enumerate(counts):
        bar = "#" * math.ceil(50 * count / max(counts))
        print(f"  {tenth / 10:.1f} to {tenth / 10 + 0.1:.1f} {count:>6} {bar}".rstrip())
    print("  mean: " + ", ".join(f"{role} {show(mean(v), 2)}" for role, v in values.items()))
    print(f"  never solved {never:.0%}, always solved {always:.0%}: little to learn there")
    reach = f"pass@{len(dialogues) // len(solved)} of the reference {1 - never:.2f}"
    print(f"  {reach}: about what training can reach")


def report_training(
    summary: dict[str, Any], base: Sequence[Dialogue], new: Sequence[Dialogue]
) -> None:
    """The table of before and after, and the first problem that the base got wrong."""
    rows = {
        "acc_t1": "accuracy, first attempt (acc@t1)",
        "acc_final": "accuracy, final answer (acc@final)",
        "verifier_balanced_acc": "verifier, own attempts (balanced)",
        "verifier_pool_balanced_acc": "verifier, fixed pool (balanced)",
        "mean_response_tokens": "response length (tokens a turn)",
    }
    before, after = summary["before"], summary["after"]
    print(f"\n{before['n']} held-out problems, greedy{'before':>19}{'after':>9}")
    for name, text in rows.items():
        digits = 1 if name == "mean_response_tokens" else 3
        print(f"  {text:<42}{show(before[name], digits):>8} {show(after[name], digits):>8}")
    print(f"  {'KL to the reference (nats a turn)':<42}{show(0.0):>8} {show(summary['kl']):>8}")
    print(f"  revisions after training: {after['fixed']} mended, {after['broken']} broken")
    for old, now in [pair for pair in zip(base, new) if not pair[0].attempts[-1].correct][:1]:
        print("\nThe first held-out problem that the base got wrong, before training:")
        print_dialogue(old)
        print("and after:")
        print_dialogue(now)


def report_evaluation(summary: dict[str, Any]) -> None:
    """The evaluation as a table of accuracies with their intervals, then everything else."""
    groups = {"all problems": summary}
    for trait in ("level", "subject"):
        groups |= {f"{trait} {name}": group for name, group in summary[f"by_{trait}"].items()}
    print(f"\n{'':<24}{'n':>6}   {'acc@t1 [95 % interval]':<24}acc@final [95 %]")
    for name, group in groups.items():
        cells = [(group[k], *group[f"{k}_ci"]) for k in ("acc_t1", "acc_final")]
        first, final = ("{:.3f} [{:.3f}, {:.3f}]".format(*cell) for cell in cells)
        print(f"{name:<24.24}{group['n']:>6}   {first:<24}{final}")
    print()
    for name, value in summary.items():
        if not isinstance(value, dict | list) and not re.match("n$|acc_", name):
            print(f"  {name:<32}{value if isinstance(value, int) else show(value):>10}")
    if "compare" in summary:
        print(f"\ncompared with {summary['compare']['with']}:")
        for name in ("acc_t1", "acc_final"):
            found = summary["compare"][name]
            gain = "{:+.3f} [{:+.3f}, {:+.3f}]".format(found["difference"], *found["ci"])
            split = f"problems better {found['better']}, worse {found['worse']}"
            print(f"  {name:<10}{gain}, {split}, p = {found['p']:.1g}")


def print_dialogue(dialogue: Dialogue) -> None:
    """A dialogue as a person would write it down."""
    said = [("problem", dialogue.problem.problem)]
    for turn in dialogue.turns:
        said.append((turn.role, turn.text.strip() + ("" if turn.ended else " [cut off]")))
    for who, text in said:
        for i, line in enumerate(text.splitlines() or [""]):
            start = f"  {'' if i else who:<8} "
            print(textwrap.fill(line, 79, initial_indent=start, subsequent_indent=" " * 11))
    gold = dialogue.problem.answer
    if gold:
        verdict = "right" if dialogue.attempts[-1].correct else f"wrong, it is {gold}"
        print(f"           ({verdict})")


# --- E. The numbers, and how sure they are --------------------------------------------------------
# 500 problems are a sample: "0.94" may be 0.92 or 0.96, and "better by 0.01" may be luck. So an
# accuracy comes with a 95 % interval, and two models are compared on the same problems: only those
# that one of them solved and the other did not say which is better. With --samples K the K attempts
# at a problem can vote: by plain majority (*self-consistency*), or PAG's way, where only attempts
# that the model's own check accepted have a vote. If checking is worth anything, that vote wins.


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None where there is nothing to average: 'none' is not 'zero'."""
    values = list(values)
    return sum(values) / len(values) if values else None


def confusion(pairs: Iterable[tuple[bool | None, bool]], name: str) -> dict[str, float | None]:
    """What (verdict, truth) pairs say of a verifier; a missing verdict is a miss. Precision: the
    share of right ones among the attempts that it called correct.

    >>> confusion([(True, True), (True, True), (True, True), (True, False)], "v")["v_balanced_acc"]
    0.5
    """
    pairs = list(pairs)
    on_right = mean(verdict is True for verdict, truth in pairs if truth)
    on_wrong = mean(verdict is False for verdict, truth in pairs if not truth)
    recalls = (on_right, on_wrong)
    return {
        f"{name}_acc": mean(verdict == truth for verdict, truth in pairs),
        f"{name}_balanced_acc": None if None in recalls else mean(recalls),
        f"{name}_recall_right": on_right,
        f"{name}_recall_wrong": on_wrong,
        f"{name}_precision": mean(truth for verdict, truth in pairs if verdict is True),
    }


def statistics(dialogues: Sequence[Dialogue]) -> dict[str, float | None]:
    """What there is to say about some dialogues; a training batch and an evaluation share it."""
    turns = [turn for d in dialogues for turn in d.turns]
    attempts = [turn for d in dialogues for turn in d.attempts]
    judged = [(c.verdict, a.correct) for d in dialogues for c, a in zip(d.checks, d.attempts)]
    revised = [pair for d in dialogues for pair in zip(d.attempts, d.attempts[1:])]
    firsts = [d.attempts[0].text for d in dialogues]
    by_role = {role: [turn for turn in turns if turn.role == role] for role in ROLES}
    return {
        "acc_t1": mean(d.attempts[0].correct for d in dialogues),
        "acc_final": mean(d.attempts[-1].correct for d in dialogues),
        **confusion(judged, "verifier"),
        "revision_rate": mean(len(d.attempts) > 1 for d in dialogues),
        "answer_change_ratio": mean(not is_equiv(b.answer, a.answer) for a, b in revised),
        "fixed": sum(not a.correct and b.correct for a, b in revised),
        "broken": sum(a.correct and not b.correct for a, b in revised),
        **{f"reward_{role}": mean(t.reward for t in made) for role, made in by_role.items()},
        "response_tokens": mean(turn.end - turn.start for turn in turns),
        **{f"tokens_{role}": mean(t.end - t.start for t in made) for role, made in by_role.items()},
        "no_answer_rate": mean(turn.answer is None for turn in attempts),
        "truncated_rate": mean(not turn.ended for turn in turns),
        "same_text_rate": max(Counter(firsts).values()) / len(firsts),  # 1: all alike
    }


def summarize(dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """`statistics` as a report has it: with n, the number of problems, and with intervals."""
    numbers = {"n": len(by_problem(dialogues)), **statistics(dialogues)}
    numbers["mean_response_tokens"] = numbers.pop("response_tokens")
    ends = {"acc_t1_ci": 0, "acc_final_ci": -1}
    return numbers | {name: interval(scores(dialogues, place)) for name, place in ends.items()}


def wilson(successes: float, n: int) -> list[float]:
    """95 % interval of a proportion (Wilson 1927): unlike p +- 2 s it is right near 0 and 1, too.

    >>> [round(x, 4) for x in wilson(81, 263)]    # Newcombe (1998), table I
    [0.2553, 0.3662]
    """
    z = 1.959964  # the normal distribution has 95 % within +- z
    centre = successes + z * z / 2
    spread = z * math.sqrt(successes * (1 - successes / n) + z * z / 4)
    return [max(0.0, (centre - spread) / (n + z * z)), min(1.0, (centre + spread) / (n + z * z))]


def bootstrap(values: Sequence[float], seed: int = 0, draws: int = 2000) -> list[float]:
    """95 % interval of a mean: that of the means of `draws` samples (n,) drawn with replacement."""
    data, rng = np.asarray(values, float), np.random.default_rng(seed)
    means = [data[rng.integers(len(data), size=len(data))].mean() for _ in range(draws)]
    return np.quantile(means, [0.025, 0.975]).tolist()


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact p-value: how often a fair coin splits the problems that only one of two models solved
    at least as unevenly.

    >>> mcnemar(1, 9), mcnemar(0, 0)
    (0.021484375, 1.0)
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n attempts, `correct` of them right, hold a right one (Chen et al. 2021).

    >>> pass_at_k(4, 2, 2)    # 5 of the 6 pairs
    0.8333333333333334
    """
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Iterable[str | None]) -> str | None:
    """The commonest answer, where 1/2 and 0.5 are one; the earliest of several; None has no vote.

    >>> majority(["7", None, "12", "12", None, None])
    '12'
    """
    votes: list[str] = []
    for answer in filter(None, answers):
        votes.append(next((vote for vote in votes if is_equiv(answer, vote)), answer))
    return Counter(votes).most_common(1)[0][0] if votes else None


def accepted_majority(dialogues: Sequence[Dialogue]) -> str | None:
    """PAG's vote: the majority of the answers that its own check accepted (if none, of all)."""
    judged = [pair for d in dialogues for pair in zip(d.attempts, d.checks)]
    accepted = [attempt.answer for attempt, check in judged if check.verdict is True]
    return majority(accepted) or majority(d.attempts[0].answer for d in dialogues)


def by_problem(dialogues: Sequence[Dialogue]) -> list[Sequence[Dialogue]]:
    """The dialogues about each problem; they come one problem after the other."""
    groups = itertools.groupby(dialogues, key=lambda dialogue: dialogue.problem.index)
    return [list(group) for _, group in groups]


def scores(dialogues: Sequence[Dialogue], place: int) -> list[float]:
    """Of each problem's dialogues the share whose attempt `place` (0: first, -1: last) is right.
    Samples of one problem are not independent, so this is what gets an interval."""
    return [mean(d.attempts[place].correct for d in group) for group in by_problem(dialogues)]


def interval(values: Sequence[float]) -> list[float]:
    """95 % interval of mean scores: Wilson's if each is 0 or 1, else the bootstrap's."""
    counted = all(value in (0.0, 1.0) for value in values)
    return wilson(sum(values), len(values)) if counted else bootstrap(values)


def voting(dialogues: Sequence[Dialogue]) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, ..., maj@K and pag@K of K dialogues about each problem."""
    groups = by_problem(dialogues)
    n, right = len(groups[0]), [sum(d.attempts[0].correct for d in group) for group in groups]
    ks = sorted({2**i for i in range(n.bit_length())} | {n})
    seen = {f"pass@{k}": mean(pass_at_k(n, c, k) for c in right) for k in ks}
    plain = [majority(d.attempts[0].answer for d in group) for group in groups]
    for name, votes in (("maj", plain), ("pag", map(accepted_majority, groups))):
        pairs = zip(votes, groups)
        seen[f"{name}@{n}"] = mean(is_equiv(vote, g[0].problem.answer) for vote, g in pairs)
    return seen


def compare(first: Sequence[Dialogue], second: Sequence[Dialogue]) -> dict[str, Any]:
    """Is the first model better than the second on the same problems? For acc_t1 and acc_final the
    paired difference with its interval, the problems on which one beats the other, and p."""
    found = {}
    for name, place in (("acc_t1", 0), ("acc_final", -1)):
        gain = np.subtract(scores(first, place), scores(second, place))
        split = {"better": int((gain > 0).sum()), "worse": int((gain < 0).sum())}
        p = mcnemar(*split.values())
        found[name] = {"difference": gain.mean().item(), "ci": bootstrap(gain), **split, "p": p}
    return found


def evaluate_pool(policy: Policy, config: Config) -> dict[str, float | None]:
    """The verify turn's confusion on the fixed pool beside the evaluation data (attempts.jsonl);
    None where there is no pool, or no verify turn."""
    data = local(config.eval_data)
    path = data.parent / "attempts.jsonl"
    pool = read_jsonl(path) if config.revisions and data.is_file() and path.is_file() else ()
    attempts = []
    for place, row in itertools.islice(pool, config.eval_limit or None):
        problem = to_problem(row, -1, place, Config())  # its columns are ours
        text, correct = row.get("attempt"), row.get("correct")
        if not (isinstance(text, str) and isinstance(correct, bool)):
            raise UsageError(f"{place}: 'attempt' (a text) or 'correct' (true or false) is missing")
        prompt = policy.prompt_ids(problem)
        ids = prompt + encode(policy.tokenizer, text)  # somebody's text: re-encoded, not scored
        turn = Turn("solve", len(prompt), len(ids), text, ended=False, correct=correct)
        attempts.append(Dialogue(problem, ids, [turn]))

    def work() -> list[Dialogue]:
        mine = copy.deepcopy(deal(attempts))
        play(policy, mine, 2, config, -1, 0.0, Progress("verifier pool", len(attempts)))
        return mine

    with gathered(policy.model):
        told = within_memory(work, config, "rollout_tokens", 2 * config.max_new_tokens)
    judged = [(d.checks[0].verdict, d.attempts[0].correct) for d in collect(told, len(attempts))]
    return confusion(judged, "verifier_pool")


# --- F. Watching a run: numbers, pictures, diagnosis ----------------------------------------------


def check_in(
    policy: Policy, held_out: list[Problem], config: Config, step: int, earlier: list, folder: Path
) -> dict[str, Any]:
    """--eval-every: a line of eval.jsonl; best/ is the model of the best acc_final so far."""
    summary, _ = evaluate_policy(policy, held_out, config)
    print("after step {}: acc_t1 {acc_t1:.3f}, acc_final {acc_final:.3f}".format(step, **summary))
    if all(summary["acc_final"] > seen["acc_final"] for seen in earlier):
        save_model(policy, folder / "best")
    earlier.append({"step": step, **summary})
    with (folder / "eval.jsonl").open("a", encoding="utf-8") as file:
        print(json.dumps(earlier[-1]), file=file)
    return {"step": step, **{f"eval/{name}": value for name, value in summary.items()}}


def number_sink(config: Config, folder: Path) -> Callable[[dict[str, Any]], None]:
    """--log-to: what sends the numbers of a step on (of several processes the first one does)."""
    if config.log_to == "wandb" and not world()[0]:
        import wandb

        run = wandb.init(project="astarpo", dir=folder, config=dataclasses.asdict(config))
        return lambda numbers: run.log(numbers, step=numbers["step"])
    if config.log_to == "tensorboard" and not world()[0]:
        from torch.utils.tensorboard import SummaryWriter

        add = SummaryWriter(str(folder)).add_scalar
        return lambda numbers: [
            add(k, v, numbers["step"]) for k, v in numbers.items() if isinstance(v, int | float)
        ]
    return lambda numbers: None


# Okabe and Ito's colours: people with any kind of colour vision can tell them apart.

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PANELS = (  # title, y axis, its limits, (metric, name, colour)...
    ("Loss", "squared error (reward²)", None, [("loss", "all turns", BLUE)]),
    ("Reward by role, accuracy", "mean reward", None, [
        ("acc_t1", "solve = acc@t1", BLUE), ("acc_final", "acc@final", GREEN),
        ("reward_verify", "verify", ORANGE), ("reward_revise", "revise", RED)]),
    ("Verifier: what it recognises", "recall", (-0.03, 1.03), [
        ("verifier_recall_right", "right attempts", BLUE),
        ("verifier_recall_wrong", "wrong attempts", RED)]),
    ("Revisions", "share", (-0.03, 1.03), [
        ("answer_change_ratio", "revisions that change", GREEN),
        ("revision_rate", "problems revised", ORANGE)]),
    ("Length and KL", "tokens a turn (blue)", None, [("response_tokens", "length", BLUE)]),
)  # fmt: skip


def smooth(values: Sequence[float], width: int) -> np.ma.MaskedArray:
    """Running mean over about `width` steps of the numbers that there are. (n,) -> (n,)

    >>> smooth([1.0, math.nan, 3.0, 5.0], 3).tolist()
    [1.0, 2.0, 4.0, 4.0]
    """
    known, half = np.ma.masked_invalid(values), width // 2
    means = [known[max(0, i - half) : i + half + 1].mean() for i in range(len(known))]
    return np.ma.masked_invalid([math.nan if m is np.ma.masked else m for m in means])


def load_runs(folders: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """What is drawn of some runs. Those that differ in the seed alone are one group, whose name
    says what makes it unlike the others. Raises UsageError for a folder that is no run's."""
    runs, groups = [], defaultdict(list)
    for folder in folders:
        try:
            runs.append(json.loads((folder / "config.json").read_text(encoding="utf-8")))
            for name in ("metrics", "v_star"):
                runs[-1][name + "_rows"] = [row for _, row in read_jsonl(folder / f"{name}.jsonl")]
        except OSError as error:
            raise UsageError(f"{folder} is not the folder of a run: {error}") from error
    idle = {"seed", "out", "v_star", "eval_limit", "eval_every", "log_to", "threads", "device"}
    names = {item.name for item in dataclasses.fields(Config)} - idle  # idle: not for learning
    unlike = sorted(name for name in names if len({run.get(name) for run in runs}) > 1)
    for run in runs:
        groups[", ".join(f"{name} {run.get(name)}" for name in unlike)].append(run)
    return groups


def draw_curves(axis: Any, groups: Iterable[Any], metric: str, label: str, colour: str) -> None:
    """A metric of each group of runs: raw points, the smoothed mean, the band of its seeds."""
    for style, runs in zip(itertools.cycle(("-", "--", ":", "-.")), groups):
        longest = max(len(run["metrics_rows"]) for run in runs)
        steps, curves = range(1, longest + 1), np.ma.masked_all((len(runs), longest))
        for row, run in enumerate(runs):
            # None becomes nan
            raw = np.array([step.get(metric) for step in run["metrics_rows"]], float)
            axis.plot(steps[: len(raw)], raw, ".", color=colour, alpha=0.3 / len(runs), zorder=1)
            curves[row, : len(raw)] = smooth(raw, max(3, longest // 10))
        axis.plot(steps, curves.mean(0), style, color=colour, lw=2.5, label=label)
        if len(runs) > 1:
            axis.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)
        label = "_"  # the colours are explained once


def draw_v_star(axis: Any, runs: Iterable[dict[str, Any]]) -> None:
    """V^* of the solve role, the problems stacked by level."""
    from matplotlib import colormaps

    values: dict[str, list[float]] = defaultdict(list)
    for row in (row for run in runs for row in run["v_star_rows"][1:]):
        values[str(row["level"])].append(row["v_star"]["solve"])
    levels = sorted(values)
    columns, bins = [values[level] for level in levels], np.linspace(0, 1, 11).tolist()
    colours = colormaps["cividis"](np.linspace(0.95, 0.1, len(levels)))
    axis.hist(columns, bins, stacked=True, color=colours, label=levels)
    axis.set(title="V* (stage 1, solve)", xlabel="V* (reward)", ylabel="problems")
    axis.legend(title="level")


def plot(runs: Sequence[Path], out: Path) -> None:
    """Draw the dashboard of some runs into one picture. Raises ImportError without matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    groups = load_runs(runs)
    with matplotlib.rc_context({"font.size": 15, "legend.fontsize": 12, "lines.markersize": 5}):
        figure = Figure(figsize=(13.5, 8.4), layout="constrained")
        axes = figure.subplots(2, 3).flat
        for axis, (title, unit, limits, metrics) in zip(axes, PANELS):
            for metric in metrics:
                draw_curves(axis, groups.values(), *metric)
            axis.set(xlabel="update", ylabel=unit, ylim=limits)
            axis.set_title(title, pad=42 if len(metrics) > 1 else 6)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
        axes[3].axhspan(-0.03, 0.1, color="0.85", label="collapse zone")
        second = axes[4].twinx()
        draw_curves(second, groups.values(), "kl", "KL", RED)
        second.set_ylabel("KL to the reference\n(nats a turn, red)")
        for axis in axes[1:4]:
            above = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.98), "frameon": False}
            axis.legend(**above, ncols=2, handlelength=1, columnspacing=1)
        if len(groups) > 1:
            styles = itertools.islice(itertools.cycle(("-", "--", ":", "-.")), len(groups))
            lines = [Line2D([], [], color="black", ls=style) for style in styles]
            figure.legend(lines, [name[:140] for name in groups], loc="outside lower center")
        draw_v_star(axes[5], itertools.chain(*groups.values()))
        figure.savefig(out)


def draw(folder: Path) -> None:
    """A finished run's dashboard.png; without matplotlib, how to get it."""
    try:
        plot([folder], folder / "dashboard.png")
    except ImportError:
        print(f"no picture: pip install matplotlib, then python astarpo.py plot {folder}")


# Why is nothing learned? The commonest questions about a run, answered from its own numbers. A
# number that is not known is nan, and nan fulfils no condition.

WINDOW = 5  # training batches that are looked at together
SYMPTOMS: list[tuple[Callable[[dict[str, float]], bool], str]] = [
    (lambda f: f["truncated_rate"] > 0.5, """{truncated_rate:.0%} of the responses were cut off at
        --max-new-tokens {max_new_tokens}, mostly before an answer could come: raise it."""),
    (lambda f: f["no_answer_rate"] > 0.5, """{no_answer_rate:.0%} of the attempts hold no answer
        that can be extracted, so they earn nothing. Read some ('solve'); if the model does not
        write \\boxed{{}}, take one that follows instructions."""),
    (lambda f: f["never"] > 0.9, """{never:.0%} of the problems were not solved once in
        {num_samples} samples (V* = 0): no reward, hardly anything to learn from. Take easier
        problems, a stronger --model, or more --num-samples."""),
    (lambda f: f["always"] > 0.9, """{always:.0%} of the problems were solved by each of
        {num_samples} samples (V* = 1): nothing is left to learn. Take harder problems."""),
    (lambda f: f["any_skipped"] > 0, """The loss or its gradient is not finite (step {step:.0f}).
        Such updates are left out; if they go on, lower --lr or use --dtype float32."""),
    (lambda f: f["kl"] > f["response_tokens"], """KL to the reference is {kl:.0f} nats a turn of
        {response_tokens:.0f} tokens: more than one a token, the policy is running away. Lower
        --lr or raise --beta2."""),
    (lambda f: abs(f["verifier_recall_right"] - f["verifier_recall_wrong"]) > 0.95, """The verifier
        says one thing only: it recognises {verifier_recall_right:.0%} of the right attempts and
        {verifier_recall_wrong:.0%} of the wrong ones. It needs both kinds to judge (problems that
        are solved about half the time); try a lower --lr, too."""),
    (lambda f: (f["same_text_rate"] > 0.5 and f["batch_size"] > 3) or f["response_tokens"] < 2,
        """The responses collapse: {same_text_rate:.0%} of a batch's first attempts are the same
        text, and a response has {response_tokens:.1f} tokens. Lower --lr or raise --beta2."""),
    (lambda f: f["best"] - f["acc_final"] > max(0.1, 4 * math.sqrt(0.1 / f["batch_size"])),
        """acc_final fell from {best:.2f} (until step {best_step:.0f}) to {acc_final:.2f}, by more
        than chance. Stop earlier or lower --lr; --eval-every keeps the best model in best/."""),
]  # fmt: skip


def explain(facts: dict[str, Any], said: set[str]) -> None:
    """Print the sentence of each symptom that the facts show, unless it was `said` before."""
    known = defaultdict(lambda: math.nan, {k: v for k, v in facts.items() if v is not None})
    for shown, sentence in SYMPTOMS:
        if sentence not in said and shown(known):
            said.add(sentence)
            text = "! " + " ".join(sentence.format_map(known).split())
            text = textwrap.fill(text, 79, subsequent_indent="  ", break_on_hyphens=False)
            live = sys.stdout.isatty()  # there the progress bar's line is still open
            print("\n" * live + text)


def stage_one_facts(dialogues: Sequence[Dialogue], config: Config) -> dict[str, Any]:
    """What stage 1 shows; samples that --v-star brought back have no texts to be judged."""
    solved = scores(dialogues, 0)
    shares = {"never": mean(s == 0 for s in solved), "always": mean(s == 1 for s in solved)}
    return dataclasses.asdict(config) | (statistics(dialogues) if dialogues[0].ids else {}) | shares


def training_facts(history: Sequence[dict[str, Any]], config: Config) -> dict[str, Any]:
    """Means over the last batches, and the best acc_final of as many batches."""
    last = history[-WINDOW:]
    facts = {"any_skipped": last[-1]["skipped"], "step": last[-1]["step"]}
    if len(history) >= WINDOW:
        facts |= {k: mean(m[k] for m in last if m[k] is not None) for k in last[0] if k != "step"}
        finals = [m["acc_final"] for m in history]
        means = [mean(finals[i - WINDOW : i]) for i in range(WINDOW, len(finals) + 1)]
        facts |= {"best": max(means), "best_step": WINDOW + int(np.argmax(means))}
    return dataclasses.asdict(config) | facts


def stop_if_sick(history: Sequence[dict[str, Any]]) -> None:
    """Raise RunError if no update was possible for some steps."""
    if len(history) >= WINDOW and all(m["skipped"] == 1 for m in history[-WINDOW:]):
        raise RunError(
            f"no finite loss and gradient in {WINDOW} steps running, so the run stops with its "
            "last good model: lower --lr, or use --dtype float32"
        )


# --- I. Runs that survive -------------------------------------------------------------------------
# A long run is killed some day, and goes on as if nothing had happened. Its random numbers are a
# pure function of what they are for (section 6), so the weights, AdamW's moments and the step are
# all that it needs: they go into state-<step>.pt every --save-every steps, and stage 1's dialogues
# into a journal, in parts of STAGE_ONE_PART. A file takes its name only when it is whole and on the
# disk.


def due(every: int, step: int) -> bool:
    """Is something that happens every so many steps (0: never) to happen after this one?"""
    return every > 0 and (step + 1) % every == 0


def is_unfinished(folder: Path) -> bool:
    """Does a run that can be resumed lie there? Its summary is the last thing it writes."""
    return (folder / "config.json").is_file() and not (folder / "summary.json").is_file()


def unfinished_run(path: str) -> tuple[Path, Config]:
    """The run to go on with, `path` or the newest of runs/, and its options. Raises UsageError."""
    runs = [Path(path)] if path else sorted(Path("runs").glob("*"), key=lambda f: f.stat().st_mtime)
    found = [run for run in runs if is_unfinished(run)]
    if not found:
        why = "is finished" if (runs[-1:] or [Path()])[-1].joinpath("summary.json").exists() else ""
        raise UsageError(f"--resume: {path or 'runs/'} {why or 'holds no unfinished run'}")
    run = found[-1]
    config = dataclasses.replace(read_config(run / "config.json"), out=str(run))
    if config.v_star and (run / "v_star.jsonl").exists():  # the run has its copy
        config.v_star = str(run / "v_star.jsonl")
    return run, config


def read_config(path: Path) -> Config:
    """The options in a run's config.json. Raises UsageError."""
    try:
        values = {**json.loads(path.read_text(encoding="utf-8"))}
        config = Config(**{k: v for k, v in values.items() if k not in ("versions", "weights")})
        for item in dataclasses.fields(config):
            value, kind = getattr(config, item.name), type(item.default)
            if type(value) is not kind and (type(value), kind) != (int, float):
                raise TypeError(f"'{item.name}' is {value!r}")
            setattr(config, item.name, kind(value))
        return config
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is not the config.json of a run: {error}") from error


def reopen_folder(path: str, about: dict[str, Any]) -> Path:
    """The folder of the run that goes on, if it started from these weights. Raises UsageError."""
    folder = Path(path)
    began = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if began.get("weights") != about["weights"]:
        raise UsageError(f"--resume: {about['model']} holds other weights than when {path} began")
    if world()[0]:  # the other processes read what there is, and write into a copy
        copy_of, folder = folder, new_folder("")
        for item in copy_of.iterdir():
            if item.is_dir() or item.name.startswith("state-"):
                (folder / item.name).symlink_to(item.resolve())
            else:
                shutil.copy(item, folder)
    if world()[1] > 1:
        dist.barrier()
    return folder


def held(folder: Path) -> TextIO:
    """Keep others from going on with a run that is not dead. The system drops the lock with us."""
    file = (folder / "config.json").open(encoding="utf-8")
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"--resume: the run in {folder} is still going on") from error
    except (ImportError, OSError):  # a file system without locks
        pass
    return file


def intact_rows(path: Path) -> list[Any]:
    """The rows of a JSONL file up to the first broken line: a kill can leave half of one."""
    rows: list[Any] = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line if line.endswith("\n") else ""))
        except ValueError:
            print(f"{path}, line {number}: cut off; it and what follows is done again")
            break
    return rows


def keep_rows(path: Path, rows: Iterable[Any]) -> None:
    """Leave these rows in the file, if there is one."""
    if path.exists():  # also if only half a line is to go
        with whole_or_not(path) as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def append_journal(path: Path, dialogues: Iterable[Dialogue]) -> None:
    """Add dialogues to stage 1's journal."""
    with path.open("a", encoding="utf-8") as file:
        for d in dialogues:
            print(json.dumps([d.ids, [dataclasses.asdict(turn) for turn in d.turns]]), file=file)


def read_journal(path: Path, problems: Sequence[Problem], part: int) -> list[Dialogue]:
    """The dialogues that a killed stage 1 had played, in whole parts (a part is played together,
    and rounding depends on the company)."""
    rows = intact_rows(path)
    if len(rows) < len(problems):
        rows = rows[: len(rows) // part * part]
    keep_rows(path, rows)
    return [Dialogue(p, ids, [Turn(**t) for t in turns]) for p, (ids, turns) in zip(problems, rows)]


def states(folder: Path) -> list[Path]:
    """The saved states of a run, the newest last."""
    found = (path for path in folder.glob("state-*.pt") if path.stem[6:].isdigit())
    return sorted(found, key=lambda path: int(path.stem[6:]))


def save_state(
    folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, config: Config
) -> None:
    """Write state-<step>.pt and drop all but the last two."""
    learned = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    weights = get_model_state_dict(policy.model, options=WHOLE)
    state = {
        "model": {n: w for n, w in weights.items() if n in learned},  # without a tied head's copy
        "optimizer": get_optimizer_state_dict(policy.model, optimizer, options=WHOLE),
        "scaler": policy.scaler.state_dict(),
        "tokens": (config.rollout_tokens, config.update_tokens),  # see `within_memory`
    }
    if world()[0]:
        return
    place = folder / f"state-{step}.pt"
    try:
        with whole_or_not(place, "wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch has its own kind for a full disk
        raise RunError(f"{place} cannot be saved ({error}); go on with --resume") from error
    for old in states(folder)[:-2]:
        old.unlink()


def restore(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, config: Config
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Bring policy and optimizer back to the newest good state, if there is one: the metrics and
    the evaluations up to there. What was written after it is cut off, to be done again."""
    past = {name: intact_rows(folder / f"{name}.jsonl") for name in ("metrics", "eval")}
    step = 0
    for state in reversed(states(folder)):
        try:
            saved = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(saved, dict) or "tokens" not in saved:
                raise RuntimeError("not a state of this version")
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            print(f"{state} is of no use ({str(error)[:100]})")
            continue
        if int(state.stem[6:]) <= len(past["metrics"]):
            step = int(state.stem[6:])
            break
        print(f"{state} is of no use (metrics.jsonl ends before it)")
    if step or past["metrics"]:
        print(f"going on after step {step}")
    if step:
        set_model_state_dict(policy.model, saved["model"], options=WHOLE)
        set_optimizer_state_dict(policy.model, optimizer, saved["optimizer"], options=WHOLE)
        policy.scaler.load_state_dict(saved["scaler"])
        config.rollout_tokens, config.update_tokens = saved["tokens"]
    for name, rows in past.items():
        past[name] = [row for row in rows if row["step"] <= step]
        keep_rows(folder / f"{name}.jsonl", past[name])
    return past["metrics"], past["eval"]


# --- J. Large models, several devices -------------------------------------------------------------
# A model of 1.5 billion parameters, its gradient, AdamW's two moments and the reference are 31 GB
# in float32. LoRA (Hu et al. 2021) learns small matrices beside frozen weights, which can then be
# half as wide; the reference is the same weights without them. Recomputing activations in the
# backward pass trades time for memory.
#
# `torchrun --nproc_per_node=8 astarpo.py train ...` starts eight of us. Each plays its share of the
# dialogues; all exchange them, so that each knows all and counts alike; each scores its share, and
# the gradients are summed. ddp: every process holds everything. fsdp: weights, gradients and
# moments are dealt out in slices and put together layer by layer where they are needed (PyTorch's
# FSDP2), but as a whole while sampling, where every process goes at its own pace.

WHOLE = StateDictOptions(
    full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False
)


def add_adapters(policy: Policy, rank: int, seed: int) -> None:
    """LoRA beside every linear layer but the head: only these float32 matrices learn."""
    from peft import LoraConfig

    if hasattr(policy.model, "had_adapters"):  # they would be saved as if beside its base
        raise UsageError("--lora goes not with a LoRA checkpoint as --model: start from its base")
    torch.manual_seed(seed)
    policy.model.requires_grad_(False)
    kind = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, **kind)
    policy.model.add_adapter(lora)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    policy.adapters = True


def switch_adapters(model: Any, on: bool) -> None:
    """Compute with the adapters (the policy) or without them (the reference)."""
    if getattr(model, "adapters_on", True) != on:  # it walks over all layers: not for each token
        model.enable_adapters() if on else model.disable_adapters()
        model.adapters_on = on


def blocks(model: Any) -> list[Any]:
    """The layers of a transformer, whatever the architecture calls them."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@contextlib.contextmanager
def recomputing(model: Any) -> Iterator[None]:
    """--gradient-checkpointing, where a gradient will be wanted. transformers does it in training
    mode only, which would wake dropout as well: so only the layers' own flags are set, and only
    here (while sampling it would switch the cache off)."""
    layers = blocks(model)
    try:
        for layer in layers:
            layer.training = torch.is_grad_enabled() and layer.gradient_checkpointing
        yield
    finally:
        for layer in layers:
            layer.training = False


def within_memory(work: Callable[[], Any], config: Config, option: str, least: int) -> Any:
    """Do `work`. Whenever memory runs out: once more, with half as many tokens at a time, but at
    least so many. Raises RunError where that does not help."""
    flag = "--" + option.replace("_", "-")
    while True:
        with contextlib.suppress(torch.OutOfMemoryError):
            return work()
        # Not in an `except`: the exception would keep alive what has filled the memory.
        tokens = getattr(config, option)
        if tokens <= least:
            saving = "--gradient-checkpointing, --lora 32, " if option == "update_tokens" else ""
            raise RunError(
                f"out of memory with {flag} {tokens}: try {saving}shorter responses "
                "(--max-new-tokens) or a smaller model"
            )
        setattr(config, option, max(least, tokens // 2))
        print(f"out of memory: from here on {flag} is {getattr(config, option)}")


def world() -> tuple[int, int]:
    """Which process is this, and how many are there?"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(device: str) -> None:
    """Under torchrun: meet the other processes. Only the first one prints."""
    if not {"RANK", "LOCAL_RANK"} <= os.environ.keys() or dist.is_initialized():
        return
    if ":" in device:
        raise UsageError(
            f"under torchrun each process takes a GPU of its own: not --device {device}"
        )
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=2))
    if world()[0]:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def deal(items: Sequence[Any]) -> list[Any]:
    """This process's share."""
    rank, size = world()
    return [*items[rank::size]]


def collect(mine: list[Any], n: int) -> list[Any]:
    """All n items, in the order before they were dealt."""
    parts: list[Any] = [mine] * world()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, mine)
    whole: list[Any] = [None] * n
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, each at most `budget` cells with its padding (but at
    least one index).

    >>> list(token_batches([5, 1, 4, 2], budget=8))
    [[1, 3], [2], [0]]
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def my_share(dialogues: Sequence[Dialogue], budget: int) -> list[tuple[Sequence[Dialogue], float]]:
    """The micro-batches of this process, with their weights. All processes have as many: a slice of
    FSDP's waits for the others in each pass, so who has fewer adds passes that weigh nothing."""
    rank, size = world()
    cuts = []
    for part in (dialogues[r::size] for r in range(size)):
        batches = token_batches([len(d.ids) for d in part], budget)
        cuts.append([([part[i] for i in batch], 1.0) for batch in batches])
    return cuts[rank] + [(dialogues[:1], 0.0)] * (max(map(len, cuts)) - len(cuts[rank]))


def spread(policy: Policy, ref: Policy, config: Config) -> None:
    """--parallel fsdp: deal out the weights of policy and reference."""
    if world()[1] == 1 or config.parallel != "fsdp":
        return
    mesh = init_device_mesh(policy.device.type, (world()[1],))
    for model in (policy.model, ref.model):
        for layer in blocks(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)  # the rest, with the (often tied) embeddings
        model.score_tokens = types.MethodType(score_tokens, model)
        register_fsdp_forward_method(model, "score_tokens")


def method_of(model: Any, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` of this model, as the method that fsdp has made of it if there is one."""
    return getattr(model, function.__name__, None) or functools.partial(function, model)


@contextlib.contextmanager
def gathered(model: Any) -> Iterator[None]:
    """fsdp: put the weights together for a while."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(True, recurse=False)
        part.reshard()


def sum_over_processes(model: Any, seen: dict[str, float]) -> dict[str, float]:
    """Add up over the processes the gradients and the numbers that were seen."""
    _, size = world()
    if size == 1:
        return dict(seen)
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if isinstance(model, FSDPModule):
            parameter.grad *= size  # fsdp has summed already, and divided
        else:
            dist.all_reduce(parameter.grad)
    device = next(model.parameters()).device
    numbers = torch.tensor([*seen.values()], dtype=torch.float64, device=device)
    dist.all_reduce(numbers)
    return dict(zip(seen, numbers.tolist()))


# --- K. Speed: a token without Python, and how fast is it? ----------------------------------------
# A small model's step from token to token is a few hundred operations on small tensors, and between
# two of them Python takes longer than they do. So the step is recorded once and then repeated.


def left_pad(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ragged ids as one tensor whose rows END together: ids (B, P) and which are real (B, P).

    >>> left_pad([[7], [8, 9]], torch.device("cpu"))[0].tolist()
    [[0, 7], [8, 9]]
    """
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(t)) + list(t) for t in texts], device=device)
    lengths = torch.tensor([len(t) for t in texts], device=device)[:, None]
    return ids, torch.arange(width, device=device) >= width - lengths


def join_memories(parts: Sequence[tuple[Memory, Tensor]], roomy: bool) -> Memory:
    """Some rows of some memories, one below the other. In each row the real cells come last
    and are followed, if `roomy`, by free ones; holes only fill up the shorter rows."""
    masks = [memory.mask[rows] for memory, rows in parts]
    width = max(int(mask.sum(1).max()) for mask in masks)
    free = (16 + width // 4) * roomy
    order = [mask.byte().argsort(dim=1, stable=True)[:, -width:] for mask in masks]  # holes first
    short = [width - cells.shape[1] for cells in order]
    real = [F.pad(m.gather(1, o), (n, free)) for m, o, n in zip(masks, order, short)]
    # Which cell goes where; a memory that is too short lends its first one to fill the holes.
    order = [F.pad(cells, (n, 0)) for cells, n in zip(order, short)]
    whole = Memory(0, masks[0].device)
    whole.mask, whole.used = torch.cat(real), width
    for same in zip(*(memory.cells for memory, _ in parts)):
        shape = (len(whole.mask), same[0].shape[1], width + free, same[0].shape[3])
        together, start = same[0].new_empty(shape), 0
        together[:, :, width:] = 0  # hidden, but 0 * nan would be nan
        heads = torch.arange(shape[1], device=together.device)[:, None]
        for tensor, (_, rows), cells in zip(same, parts, order):
            place = together[start : start + len(rows), :, :width]
            place.copy_(tensor[rows[:, None, None], heads, cells[:, None]])
            start += len(rows)
        whole.cells.append(together)
    return whole


def join_rows(parts: Sequence[tuple[Rows, Sequence[int]]]) -> Rows:
    """Some rows of each part, one below the other."""
    parts = [(part, torch.tensor(rows, device=part.ended.device)) for part, rows in parts]
    memory = join_memories([(part.memory, rows) for part, rows in parts], roomy=True)
    names = [item.name for item in dataclasses.fields(Rows)][1:]
    return Rows(memory, *(torch.cat([getattr(p, n)[rows] for p, rows in parts]) for n in names))


class Cells(DynamicLayer):
    """One layer's cache as transformers wants it, with free cells. The next token's keys and values
    are written into the cell `column`; the usual cache copies itself for every token."""

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.column = keys, values, column  # (B, heads, T, width), ()
        self.is_initialized = True

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one token a row; returns all cells, free ones too (the mask hides them)."""
        self.keys.index_copy_(2, self.column, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.column, values.to(self.values.dtype))
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many cells a mask must cover, and the first of them."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        """The next token's place among the cells (for models that look back only so far)."""
        return self.column


class NextToken(torch.nn.Module):
    """Reading one token a row, as a function of tensors alone: that is what can be recorded."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor, column: Tensor, *cells: Tensor
    ) -> Tensor:
        """ids, positions (B, 1), mask (B, T), each layer's keys and values -> logits (B, V)."""
        cache = DynamicCache()
        cache.layers = [Cells(k, v, column) for k, v in zip(cells[::2], cells[1::2])]
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]


def record(policy: Policy, inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    """NextToken without its Python: the operations of one call on such inputs, to be repeated.

    A recording is blind: it takes every `if` the way it once went. (And it would keep weights that
    autocast had cast before: each `active` begins with none.) So it is tried on other rows,
    more cells and the furthest position that the model knows; if its logits are not the model's to
    the last bit, or if nothing can be recorded, the model itself takes the step.
    """
    ids, positions, mask, column, *cells = inputs
    furthest = getattr(getattr(policy.model, "config", None), "max_position_embeddings", 2) - 1

    def example(rows: list[int], positions: Tensor, extra: int) -> list[Tensor]:
        chosen = torch.tensor(rows, device=ids.device) % len(ids)
        longer = [F.pad(tensor[chosen], (0, 0, 0, extra)) for tensor in cells]
        return [ids[chosen], positions[chosen], F.pad(mask[chosen], (0, extra)), column, *longer]

    step = NextToken(policy.model)
    other = ([0, 1, -1], torch.full_like(positions, furthest), 3)
    same = False
    if isinstance(policy.model, FSDPModule):  # its weights come and go
        return step
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
        recorded = torch.jit.trace(step, example([0, 1], positions, 0), check_trace=False)
        same = torch.equal(recorded(*example(*other)), step(*example(*other)))
    return recorded if same else step


# `bench` measures on the machine, the model and the sizes at hand. Whatever is compared takes turns
# within one run, so that a busy moment of the machine meets all of it alike, and of the repeats the
# median counts. Compare the ratios; the times themselves are this machine's.


def clock(repeats: int, work: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each call. One round before the first warms up and does not count."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for repeat in range(repeats + 1):
        for name, call in work.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a call returns before the GPU has done its work
            seconds[name] += [time.perf_counter() - started] * (repeat > 0)
    return {name: float(np.median(times)) for name, times in seconds.items()}


@torch.inference_mode()
def generated(policy: Policy, problems: Sequence[Problem], config: Config) -> int:
    """What `rollout` does for a single turn, by transformers' `generate`. Returns its tokens."""
    ends = torch.tensor(policy.end_ids, dtype=torch.long, device=policy.device)
    # What is left open here would come from the model's own generation_config.
    sizes = {"max_new_tokens": config.max_new_tokens, "pad_token_id": 0, "repetition_penalty": 1.0}
    sizes |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    plain = GenerationConfig(**sizes, eos_token_id=[*policy.end_ids] or [-1])
    tokens = 0
    for i in range(0, len(problems), config.batch_size):
        prompts = [policy.prompt_ids(problem) for problem in problems[i : i + config.batch_size]]
        ids, real = left_pad(prompts, policy.device)
        with policy.active():
            out = policy.model.generate(ids, attention_mask=real.long(), generation_config=plain)
        ended = torch.isin(out[:, ids.shape[1] :], ends).long()
        tokens += int((ended.cumsum(1) - ended == 0).sum())  # up to the first end token
    return tokens


def bench_sampling(
    policy: Policy, problems: Sequence[Problem], config: Config, repeats: int
) -> dict[str, float]:
    """Solve turns only: `batch_size` rows at a time against `generate`, then stage 1."""
    longest = max(len(policy.prompt_ids(problem)) for problem in problems) + config.max_new_tokens
    config = dataclasses.replace(config, revisions=0)
    rows = dataclasses.replace(config, rollout_tokens=config.batch_size * longest)
    half = dataclasses.replace(rows, max_new_tokens=max(1, config.max_new_tokens // 2))
    found: dict[str, float] = {}
    for kind, ends in (("", policy.end_ids), ("_full_length", ())):
        player = dataclasses.replace(policy, end_ids=ends)  # without end tokens nothing ends early
        dialogues = rollout(player, problems, rows, 0)
        ours = sum(turn.end - turn.start for d in dialogues for turn in d.turns)
        theirs = generated(player, problems, rows)
        work = {
            "ours": lambda p=player: rollout(p, problems, rows, 0),
            "theirs": lambda p=player: generated(p, problems, rows),
            "half": lambda p=player: rollout(p, problems, half, 0),
        }
        seconds = clock(repeats, work)
        speeds = ours / seconds["ours"], theirs / seconds["theirs"]
        found |= dict(zip((f"rollout{kind}_tokens_per_s", f"generate{kind}_tokens_per_s"), speeds))
        found[f"rollout{kind}_speedup"] = speeds[0] / speeds[1]
    found["length_doubled"] = seconds["ours"] / seconds["half"]
    repeated = [problem for problem in problems for _ in range(config.num_samples)]
    numbers = [*range(config.num_samples)] * len(problems)
    few = len(repeated) // 2
    work = {
        "all": lambda: rollout(policy, repeated, config, 0, numbers),
        "few": lambda: rollout(policy, repeated[:few], config, 0, numbers),
    }
    seconds = clock(repeats, work)
    found["stage_1_responses_per_s"] = len(repeated) / seconds["all"]
    found["problems_doubled"] = seconds["all"] / seconds["few"]
    return found


def bench_step(
    policy: Policy, ref: Policy, problems: Sequence[Problem], config: Config, repeats: int
) -> dict[str, float]:
    """Seconds of one step of stage 2 and of its parts. The weights stay: the learning rate is 0."""
    config = dataclasses.replace(config, lr=0.0)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    v_star: Baselines = defaultdict(lambda: 0.5)
    chosen = batch_of_step(problems, 0, config.batch_size, config.seed)
    dialogues = rollout(policy, chosen, config, 1, range(len(chosen)))
    parts = token_batches([len(d.ids) for d in dialogues], config.update_tokens)
    batches = [collate([dialogues[i] for i in part], v_star, policy.device) for part in parts]

    def score(model: Policy, backward: bool = False) -> None:
        for batch in batches:
            with torch.set_grad_enabled(model is policy):
                logps = token_logps(model, batch.ids, batch.scored)
            if backward:
                logps.sum().backward()

    def optimize() -> None:
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
        optimizer.step()

    def check() -> None:
        for dialogue, turn in ((d, turn) for d in dialogues for turn in d.turns):
            parse_judgment(turn.text)
            verify(turn.text, dialogue.problem.answer)

    square = torch.randn(1024, 1024, device=policy.device, dtype=policy.dtype)
    half = dialogues[: len(dialogues) // 2 or 1]
    work = {
        "sampling": lambda: rollout(policy, chosen, config, 1, range(len(chosen))),
        "reward": check,
        "reference": lambda: score(ref),
        "policy": lambda: score(policy),
        "backward": lambda: score(policy, backward=True),
        "optimizer": optimize,
        "step": lambda: train_step(policy, ref, optimizer, problems, v_star, config, 0),
        "update": lambda: update(policy, ref, optimizer, dialogues, v_star, config),
        "half": lambda: update(policy, ref, optimizer, half, v_star, config),
        "matmul": lambda: square @ square,
    }
    found = clock(repeats, work)
    found["sampling"] -= found["reward"]
    found["backward"] -= found["policy"]
    found["batch_doubled"] = found["update"] / found.pop("half")
    head = policy.model.get_output_embeddings().weight
    inner = sum(p.numel() for p in policy.model.get_decoder().parameters() if p.ndim == 2)
    inner -= policy.model.get_input_embeddings().weight.numel()
    read = sum(len(dialogue.ids) for dialogue in dialogues)
    scored = sum(int(batch.scored.sum()) for batch in batches)
    products = 2 * (inner * read + head.numel() * scored)  # of one forward pass
    found["matmul_flops_per_s"] = 2 * 1024**3 / found.pop("matmul")
    # The reference goes forward, the policy forward and, at twice the cost, backward.
    found["update_matmul_share"] = 4 * products / found["update"] / found["matmul_flops_per_s"]
    return found


def bench(config: Config, repeats: int, file: str) -> dict[str, Any]:
    """Measure, print a table and, if `file` is given, write everything to it as JSON."""
    check_options(config, training=True)
    if repeats < 1:
        raise UsageError(f"--repeats must be at least 1, not {repeats}")
    policy = load_policy(config)
    check_context(policy, config)
    problems = load_problems(config.train_data, config.train_limit, policy, config)
    ref = freeze(policy)
    found: dict[str, Any] = bench_sampling(policy, problems, config, repeats)
    for name, revisions in (("single", 0), ("dialogue", config.revisions)):
        setting = dataclasses.replace(config, revisions=revisions)
        found[name] = bench_step(policy, ref, problems, setting, repeats)
    found["dialogue_step_ratio"] = found["dialogue"]["step"] / found["single"]["step"]
    if policy.device.type == "cuda":
        found["peak_memory_mib"] = torch.cuda.max_memory_allocated(policy.device) / 2**20
    else:
        import resource  # not on Windows

        unit = 2**20 if sys.platform == "darwin" else 2**10
        found["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    report_bench(found, len(problems), config, repeats)
    if file and not world()[0]:
        write_json(Path(file), {**describe(config, policy), **found})
    return found


def report_bench(found: dict[str, Any], problems: int, config: Config, repeats: int) -> None:
    """The table of `bench`."""
    print(f"\n{problems} problems, batch {config.batch_size}, ", end="")
    print(f"up to {config.max_new_tokens} tokens a turn, medians of {repeats}")
    print(f"\n{'sampling, tokens/s':<40}{'here':>12}{'generate':>12}{'ratio':>12}")
    for text, kind in (("as responses end", ""), ("all of full length", "_full_length")):
        numbers = [found[f"{who}{kind}_tokens_per_s"] for who in ("rollout", "generate")]
        print(f"  {text:<38}{numbers[0]:>12,.0f}{numbers[1]:>12,.0f}", end="")
        print(f"{found[f'rollout{kind}_speedup']:>12.2f}")
    print(f"stage 1, responses/s{found['stage_1_responses_per_s']:>32,.0f}")
    print(f"\n{'one step of stage 2, ms':<40}{'solve only':>12}{'all turns':>12}{'ratio':>12}")
    parts = ("sampling", "reward", "reference", "policy", "backward", "optimizer", "step")
    for part in parts:
        alone, whole = (1000 * found[name][part] for name in ("single", "dialogue"))
        print(f"  {part:<38}{alone:>12.1f}{whole:>12.1f}{whole / alone:>12.2f}")
    shares = [100 * found[name]["update_matmul_share"] for name in ("single", "dialogue")]
    print(f"  {'update, % of the matmul rate':<38}{shares[0]:>12.0f}{shares[1]:>12.0f}")
    rate = found["dialogue"]["matmul_flops_per_s"] / 1e9
    print(f"\nmatmul rate {rate:,.0f} GFLOP/s, peak memory {found['peak_memory_mib']:,.0f} MiB")
    print(f"\n{'when this doubles':<40}{'time grows':>12}")
    print(f"  {'problems of stage 1':<38}{found['problems_doubled']:>12.2f}")
    print(f"  {'length of all responses':<38}{found['length_doubled']:>12.2f}")
    print(f"  {'batch of an update':<38}{found['dialogue']['batch_doubled']:>12.2f}")


# --- L. The command line --------------------------------------------------------------------------

EVAL_OPTIONS = (
    "model", "eval_data", "out", "seed", "revisions", "max_prompt_tokens", "max_new_tokens",
    "temperature", "problem_column", "answer_column", "eval_limit", "rollout_tokens", "device",
    "dtype", "threads",
)  # fmt: skip
EVAL_ONLY = ("samples", "top_p", "compare")
SOLVE_OPTIONS = (
    "model", "seed", "revisions", "max_prompt_tokens", "max_new_tokens", "temperature", "device",
    "dtype", "threads",
)  # fmt: skip
BENCH_OPTIONS = (
    "model", "train_data", "seed", "train_limit", "batch_size", "num_samples", "revisions",
    "max_prompt_tokens", "max_new_tokens", "rollout_tokens", "update_tokens",
    "gradient_checkpointing", "lora", "device", "dtype", "threads",
)  # fmt: skip
BENCH_DEFAULTS = {"train_limit": 512, "max_new_tokens": 72}
EVAL_DEFAULTS = {"model": "", "temperature": 0.0, "eval_limit": 0}

# Real models. What is marked * is the value of the A*-PO authors' MATH script (7,500 problems, 25
# epochs: 732 batches of 256); what is not is ours, for one GPU of 80 GB.
A_PO = {
    "model": "Qwen/Qwen2.5-1.5B",  # *
    "train_data": "EleutherAI/hendrycks_math",  # * the 7,500 problems of MATH
    "eval_data": "HuggingFaceH4/MATH-500",  # *
    "beta1": 0.5, "beta2": 1e-3, "num_samples": 8,  # *
    "lr": 1e-6, "batch_size": 256, "minibatches": 2, "steps": 732,  # *
    "max_prompt_tokens": 256, "max_new_tokens": 1024,  # *
    "drop_unsolved": False, "revisions": 0,  # * never-solved problems are kept; no PAG turns
    "train_limit": 0, "eval_limit": 0, "warmup": 10, "save_every": 20, "eval_every": 0,
    "rollout_tokens": 500_000, "update_tokens": 16_384, "gradient_checkpointing": True,
}  # fmt: skip
PRESETS = {
    "a-po": A_PO,
    # Our combination: PAG's model and its one revision with alpha 1, trained as above.
    "pag": {**A_PO, "model": "Qwen/Qwen2.5-1.5B-Instruct", "revisions": 1, "alpha": 1.0},
}
# How the PAG authors evaluate.
EVAL_PRESETS: dict[str, dict[str, Any]] = {"pag": {"temperature": 0.6, "top_p": 0.95, "samples": 8}}


def newest_model() -> str:
    """The checkpoint of the run in runs/ that finished last, else the base."""
    finished = sorted(Path("runs").glob("*/summary.json"), key=lambda file: file.stat().st_mtime)
    found = [str(file.parent / "checkpoint") for file in finished]
    print(f"model: {found[-1]} (the newest finished run)" if found else "model: data/base (no run)")
    return found[-1] if found else "data/base"


def solve(config: Config, problem: str, temperature: float = 0.0) -> Dialogue:
    """Let --model solve, check and revise one problem; prints the dialogue."""
    check_options(config)
    policy = dataclasses.replace(load_policy(config), top_p=config.top_p)
    asked = Problem(0, problem, "")
    length = len(policy.prompt_ids(asked))
    check_context(policy, dataclasses.replace(config, max_prompt_tokens=length))
    dialogue = rollout(policy, [asked], config, -1, temperature=temperature)[0]
    print_dialogue(dialogue)
    return dialogue


def add_options(
    parser: argparse.ArgumentParser, names: Iterable[str], defaults: dict[str, Any] | None = None
) -> None:
    """Options from the fields of Config: their names, types, defaults and help. Those that are not
    given are absent from what is parsed: presets and files come in between."""
    for item in dataclasses.fields(Config):
        if item.name in names:
            flag, text = "--" + item.name.replace("_", "-"), item.metadata["help"]
            default = {item.name: item.default, **(defaults or {})}[item.name]
            if item.type == "bool":
                kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
            else:
                kind = {"type": {"int": int, "float": float, "str": str}[item.type]}
                choices = item.metadata["choices"]
                kind |= {"choices": choices} if choices else {"metavar": item.type.upper()}
            text += f" (default: {default})" if default != "" else ""
            parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)
    parser.add_argument("--preset", choices=PRESETS, help="the sizes for a real model and MATH")
    parser.add_argument("--config", metavar="FILE", help="the options of a run's config.json")
    parser.epilog = "An option that is given counts before --config, that before --preset."


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line: a command and its options."""
    parser = argparse.ArgumentParser(
        prog="astarpo.py",
        description="A*-PO + PAG: reinforcement learning of mathematical reasoning.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = [item.name for item in dataclasses.fields(Config) if item.name not in EVAL_ONLY]
    learning = commands.add_parser("train", help="evaluate, stage 1, stage 2, evaluate")
    add_options(learning, training)
    learning.add_argument(
        "--resume", nargs="?", const="", metavar="RUN", help="go on with an unfinished run, alone"
        " with its own options (default RUN: the newest of runs/)",
    )  # fmt: skip
    evaluation = commands.add_parser("eval", help="evaluate a model on held-out problems")
    solving = commands.add_parser("solve", help="solve one problem and print the dialogue")
    solving.add_argument("problem", help="the problem's text, in quotes")
    add_options(evaluation, EVAL_OPTIONS + EVAL_ONLY, EVAL_DEFAULTS)
    add_options(solving, SOLVE_OPTIONS, EVAL_DEFAULTS)
    plotting = commands.add_parser("plot", help="draw the dashboard of one or several runs")
    plotting.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    plotting.add_argument("--out", default="dashboard.png", help="file (default: %(default)s)")
    measuring = commands.add_parser("bench", help="measure how fast everything is")
    add_options(measuring, BENCH_OPTIONS, BENCH_DEFAULTS)
    measuring.add_argument("--repeats", type=int, default=3, help="of each (default: %(default)s)")
    measuring.add_argument("--json", default="", metavar="FILE", help="write the numbers to FILE")
    return parser.parse_args(argv)


def chosen_config(options: argparse.Namespace) -> Config:
    """The options: given ones, else those of --config, else of --preset, else the defaults."""
    names = {item.name for item in dataclasses.fields(Config)}
    values = dict(PRESETS[options.preset]) if options.preset else {}
    if options.config:
        values |= dataclasses.asdict(read_config(Path(options.config))) | {"out": ""}
    if options.command == "bench":
        values = BENCH_DEFAULTS | {k: v for k, v in values.items() if k in BENCH_OPTIONS}
    elif options.command != "train":
        values = {k: v for k, v in values.items() if k in EVAL_OPTIONS} | EVAL_DEFAULTS
        values |= EVAL_PRESETS.get(options.preset, {})
    values |= {name: value for name, value in vars(options).items() if name in names}
    return Config(**values)


def run_command(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    if options.command == "plot":
        plot([Path(run) for run in options.runs], Path(options.out))
        return print(f"written to {options.out}")
    config = chosen_config(options)
    if options.command == "train" and options.resume is not None:
        if config != Config():
            raise UsageError("--resume goes on with the run's own options: leave the others out")
        _, config = unfinished_run(options.resume)
    join_processes(config.device)
    if options.command in ("eval", "solve"):
        config.model = config.model or newest_model()
    if options.command == "train":
        train(config, resume=options.resume is not None)
    elif options.command == "bench":
        bench(config, options.repeats, options.json)
    elif options.command == "solve":
        solve(config, options.problem, config.temperature)
    else:
        evaluate(config, config.temperature)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 2 for bad input, 1 for a failure under way."""
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        run_command(options)
    except UsageError as error:
        status, message = 2, str(error)
    except ImportError as error:  # matplotlib for 'plot', peft for --lora
        status, message = 2, f"{error}; pip install {error.name}"
    except (RunError, OSError, torch.OutOfMemoryError) as error:  # OSError: a full disk, say
        status, message = 1, str(error)
    except RuntimeError as error:
        lost = str(error).strip().split("\n")[0]
        if world()[1] == 1 or not re.search("(?i)peer|connection|timed? ?out|nccl", lost):
            raise
        status, message = 1, f"another process of this run is gone ({lost}); go on with --resume"
    except KeyboardInterrupt:
        status, message = 1, "stopped"
        message += "; go on with 'train --resume'" if options.command == "train" else ""
    else:
        return 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    # Bad input is seen by all processes of a machine: the first of them tells.
    if status == 1 or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"\nastarpo: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
