"""astarpo: teach a language model to reason about mathematics, in one file.

THE STORY.  A language model (the *policy*, pi) is given a problem x and writes a response y. A
program checks the final answer: reward r(x, y) = 1 if it is right and 0 if not. Nobody shows the
model how to solve anything; it tries, is told right or wrong, and changes. Two papers make this
simple enough for one file:

* A*-PO ("Accelerating RL for LLM Reasoning with Optimal Advantage Regression", arXiv 2505.20686)
  turns reinforcement learning into least squares. No critic and no clipped ratio (as in PPO), no
  group of samples at each step (as in GRPO).
* PAG ("PAG: Multi-Turn Reinforced LLM Self-Correction with Policy as Generative Verifier",
  arXiv 2506.10406) lets the same model solve, then check itself, and revise unless its own check
  says that the answer is correct.

A DOZEN WORDS.

  policy       the model that learns; pi(y|x) is the probability that it writes y after x
  reference    the model that we started from, frozen: pi_ref
  response     what the policy writes in one go, up to its end token: y
  rollout      to let the policy write, token by token; also what it has written
  reward       the number that says how good a response was: r
  baseline     what we expected of the reward before we saw the response
  advantage    reward less baseline: better or worse than expected?
  log-ratio    log pi(y|x) - log pi_ref(y|x), in nats: how far the policy moved on this response
  KL           the log-ratio's mean over the policy's own responses: how far it has moved on average
  on-policy    learning from what the present policy wrote itself (off-policy: from other responses)
  turn         one response in a dialogue
  role         what a turn is there for: to solve, to verify, to revise

THE MATHEMATICS.  We want reward, but not at any price: the policy should stay near the reference.
With beta > 0 the price of leaving it:

  (1)  maximise over pi    E_{y ~ pi} [ r(x, y) ]  -  beta * KL( pi(.|x) || pi_ref(.|x) )

For one problem x this has an answer in closed form. Define a policy pi* and a number V*(x) by

  (2)  pi*(y|x) = pi_ref(y|x) * exp( (r(x, y) - V*(x)) / beta )
  (3)  V*(x)    = beta * log E_{y ~ pi_ref} [ exp( r(x, y) / beta ) ]       (makes pi* sum to 1)

The logarithm of (2) is the equation that everything here rests on:

  (4)  beta * log( pi*(y|x) / pi_ref(y|x) )  =  r(x, y) - V*(x)  =  A*(x, y)

Take r from (4) and put it into (1): what is to be maximised becomes V*(x) - beta * KL(pi || pi*). A
KL is never negative, and 0 only where both are the same. So the best policy is pi*, and V*(x) is
what it achieves. We cannot sample from it (that would take the reward of every response), but we
can ask our policy to fulfil (4) in its place. The right side is the *optimal advantage*: the reward
of a response less V*(x). (That is the A* in the name. A* search is something else; section 14 shows
where the two meet.) V*(x) does not depend on our policy: (3) is a mean over responses of the
reference, so it can be estimated before training begins. This is why A*-PO has two stages:

  Stage 1, once, offline: N = 8 responses per problem from pi_ref; their rewards r_i estimate V*:
  (5)  Vhat(x) = beta1 * log( 1/N * sum_i exp( r_i / beta1 ) ),    beta1 = 0.5
  Stage 2, on-policy: ONE response y per problem from the present policy, and a gradient step on
  (6)  loss = ( beta2 * log( pi(y|x) / pi_ref(y|x) )  -  ( r(x, y) - Vhat(x) ) )^2,   beta2 = 0.001

(beta1 is not beta2, and on purpose: sections 7 and 8.)

PAG plays a dialogue with the same model, and A*-PO trains each of its turns as a response:

  turn 1, solve :  reward 1 if the answer is right
  turn 2, verify:  reward 1 if the verdict, "The answer is correct." or "... wrong.", is true
  turn 3, revise:  unless the verdict was "correct";  reward acc2 + alpha * (acc2 - acc1), alpha = 1
                   (acc1: 1 if the first answer is right, else 0; acc2: of the revised one)

THE SYMBOLS in the code (beta1, beta2, alpha and N, there num_samples, are options: section 1):

  x, y             Problem, Turn
  r(x, y)          reward: verify(), dialogue_rewards()
  pi, pi_ref       policy, ref = freeze(policy)
  log pi(y|x)      logp: token_logps(), update()
  Vhat(x), (5)     v_star (always Vhat): estimate_v_star(), baselines()
  (6)              loss: astarpo_loss(), update()
  acc1, acc2       correct[0], correct[1]: dialogue_rewards()

CONTENTS.  Part I is the lesson; read it from here to its end, in one evening. Part II shows what
A*-PO replaces, and A* search. Part III is the appendix: where the lesson uses one of its names,
half a sentence says what it stands for.

  Part I    1 the options   2 problems   3 answers   4 rewards   5 the model   6 sampling
            7 V*   8 the loss   9 PAG's turns   10 training   11 evaluation
  Part II  12 other losses   13 a learned value   14 best-first search
  Part III  A errors and progress   B loading and saving   C the algebra of answers
            D the report   E the numbers   F watching a run   G runs that survive
            H large models, several devices   I the command line

RUN IT.     python astarpo.py train         (about a minute on a laptop; no download, no GPU)
            python astarpo.py eval          (data/make.py made the problems and the base model)
            python astarpo.py solve "What is 47 * 36?"
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import heapq
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import textwrap
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from numbers import Real
from operator import add, mul, neg, pos, sub, truediv
from pathlib import Path
from typing import Any, NamedTuple

import mpmath
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

HERE = Path(__file__).resolve().parent

# ==================================================================================================
# Part I: the lesson
# ==================================================================================================

# --- 1. The options -------------------------------------------------------------------------------
# A run's options are the fields of Config; the command line, its help and config.json are made from
# them. beta1, beta2, N and alpha are the papers'. The rest of the first group fits the small base
# model that comes with this file; the presets in section I have the values for a real one. Skip the
# other two groups at first.

ANY, AT_LEAST_1, POSITIVE = (0, math.inf), (1, math.inf), (1e-9, math.inf)  # what may be given
BOTH, ALL = "train eval", "train eval solve"  # the commands that take an option


def option(
    default: Any, text: str, within: tuple[float, float] = ANY, choices: str = "", on: str = "train"
) -> Any:
    """A Config field with its help text, the values that make sense, and the commands it is for."""
    about = {"help": text, "within": within, "choices": choices.split(), "on": on.split()}
    return field(default=default, metadata=about)


@dataclass
class Config:
    """All options of a run. `train(Config(steps=10))` is `python astarpo.py train --steps 10`."""

    model: str = option("data/base", "a model's folder, a run or a hub id", on=ALL)
    train_data: str = option("data/train.jsonl", "file, folder or hub id to train on", on=ALL)
    eval_data: str = option("data/test.jsonl", "the same, of held-out problems", on=BOTH)
    out: str = option("", "new folder for the results (default: runs/<date-time>)", on=BOTH)
    seed: int = option(0, "seed of every random choice", on=ALL)
    steps: int = option(40, "stage 2: number of rollout batches")
    batch_size: int = option(64, "stage 2: problems a batch, one dialogue each", AT_LEAST_1)
    lr: float = option(3e-4, "AdamW's learning rate after warm-up", (0, 1))
    beta1: float = option(0.5, "temperature of V* in (5), in units of reward", (1e-6, 1e6), on=ALL)
    beta2: float = option(1e-3, "weight of the log-ratio in (6), reward per nat", POSITIVE)
    num_samples: int = option(8, "stage 1: responses a problem (N; 0: no stage 1)", on=ALL)
    baseline: str = option("vstar", "what is subtracted from r", choices="vstar mean zero value")
    alpha: float = option(1.0, "PAG: weight of the change in a revision's reward")
    revisions: int = option(1, "PAG: rounds of verify and revise (0: A*-PO alone)", (0, 10), on=ALL)
    max_new_tokens: int = option(64, "longest response of one turn (tokens)", AT_LEAST_1, on=ALL)
    temperature: float | None = option(None, "default: 1; in eval 0, greedy", (0, 100), on=ALL)

    # For real models, other data and long runs:
    max_prompt_tokens: int = option(128, "longer problems are left out", AT_LEAST_1, on=ALL)
    train_limit: int = option(256, "use the first so many training problems (0: all)")
    eval_limit: int = option(500, "use the first so many held-out problems (0: all)", on=BOTH)
    problem_column: str = option("problem,question,prompt", "columns with the problem", on=BOTH)
    answer_column: str = option("answer,final_answer,solution", "the same, the answer", on=BOTH)
    v_star: str = option("", "begin with this v_star.jsonl of an earlier run")
    drop_unsolved: bool = option(False, "leave out problems that no stage-1 sample solved")
    minibatches: int = option(1, "updates a batch; above 1 is off-policy (paper: 2)", AT_LEAST_1)
    warmup: int = option(3, "steps over which the learning rate rises to --lr")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", POSITIVE)
    eval_every: int = option(0, "evaluate every so many steps and keep the best model (0: never)")
    save_every: int = option(10, "keep a state to resume from every so many steps (0: never)")
    samples: int = option(1, "dialogues a problem (K)", AT_LEAST_1, on="eval")
    top_p: float = option(1.0, "share of the likeliest tokens that count", (1e-6, 1), on="eval")
    compare: str = option("", "a second model, or run, on the same problems", on="eval")
    rollout_tokens: int = option(81920, "sampling: tokens in one batch", AT_LEAST_1, on=BOTH)
    update_tokens: int = option(512, "update: tokens in one pass, with padding", AT_LEAST_1)
    gradient_checkpointing: bool = option(False, "compute activations twice, to save memory")
    lora: int = option(0, "rank of LoRA adapters over frozen weights (0: train all)", (0, 4096))
    parallel: str = option("ddp", "how torchrun's processes share", choices="ddp fsdp")
    device: str = option("auto", "auto, cpu, cuda or cuda:N", on=ALL)
    dtype: str = option("auto", "compute in", choices="auto float32 bfloat16 float16", on=ALL)
    threads: int = option(0, "CPU threads (0: 1 below 10M parameters, else all)", (0, 1024), on=ALL)

    # The neighbours, Part II:
    loss: str = option("astarpo", "what a step minimises", choices="astarpo pg grpo ppo awr")
    group: int = option(1, "dialogues a problem in a batch (GRPO)", AT_LEAST_1)
    search: int = option(0, "answers by best-first search: openings at most", on="eval solve")
    format_reward: float = option(0.0, "bonus for an attempt whose answer can be read", (-10, 10))
    length_penalty: float = option(0.0, "price of a token beyond half of --max-new-tokens")


# --- 2. Problems ----------------------------------------------------------------------------------
# A problem is a text and the answer that we can check. That is all the supervision there is: the
# worked `solution` that many data sets carry is never shown to the policy. The fields are those of
# MATH (Hendrycks et al. 2021); `load_problems`, in the appendix, reads files and hub data sets.


@dataclass(frozen=True)
class Problem:
    """One problem. `index` is its line in the file: its identity in seeds, files and V*."""

    index: int
    problem: str
    answer: str
    level: int | None = None
    subject: str = ""


# --- 3. Answers: what did the model say, and is it what the book says? ----------------------------
# The reward is 1 when the final answer of a sample means the same as the gold answer, else 0. A
# false reject wastes one sample. A false accept pays for something wrong, and a policy that finds
# such a leak soon does nothing else. So a text that we do not understand, or that has two readings
# (is 1/2x the half of x?), gets an honest False. Model output is hostile text, so every loop has a
# limit: a comparison takes milliseconds, without eval.

MAX_ANSWER = 2_000  # characters; the longest gold in MATH has about 160
MAX_TAIL = 20_000  # characters at the end in which the answer is looked for
PHRASE = re.compile(  # what announces an answer; the last one is GSM8K's mark, if no heading
    r"(?im)\banswers?\**\s*(?:(?:is|are)\b\s*:?|[:=])|<answer>|^[#* ]*final answer[:#* ]*$"
    r"|####(?=[ \t]*(?:[-+$.(\\]|[0-9](?![0-9]*[.)][ \t]+\S)|[A-Za-z]\s*$))"
)
LINE = re.compile(r"(?:\\\[.*?\\\]|\$\$.*?\$\$)?[^\n]*", re.DOTALL)  # or a formula of several
REASON = re.compile(r"[.!]\**\s+(?=[A-Z])|,? (?:since|because|as (?:required|desired))\b|</answer>")


def extract_answer(text: str | None) -> str | None:
    r"""Return the final answer in `text`: its last box, else what 'answer is' or #### announce.

    >>> extract_answer(r"so \boxed{1}, no: \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    text = as_text(text).rpartition("</think>")[2]  # `as_text` takes numbers and None, too
    if "<think>" in text:
        return None  # thinking that never ends has no answer
    tail = text[-MAX_TAIL:]
    found = final_box(tail)  # '' where the last box is torn or only a part of its formula
    if found is None:
        start = max((match.end() for match in PHRASE.finditer(tail)), default=len(tail))
        line = REASON.split(LINE.match(tail[start:].lstrip("* \t\r\n"))[0])[0]
        found = line.lstrip("*$` \t").rstrip("*$`.,;: \t\r\n")
    return found if len(found) <= MAX_ANSWER and found.strip("{} ") else None


def is_equiv(predicted: str | float | None, gold: str | float | None) -> bool:
    r"""Say whether two answers mean the same; when in doubt, they do not.

    >>> is_equiv(r"\frac{\sqrt{2}}{2}", r"1/\sqrt2"), is_equiv("0.33", "1/3")
    (True, False)
    """
    return same_meaning(as_text(predicted).strip(), as_text(gold).strip())  # the comparison itself


# --- 4. Rewards -----------------------------------------------------------------------------------
# The reward is all that the policy is ever told. If it pays for something that is easier than what
# we want, the policy learns that instead. So A*-PO's is 1 for a right final answer, else 0: no
# partial credit, no bonus for style or length. (PAG's other two rewards: section 9.)


def verify(text: str | None, gold: str | float | None) -> bool:
    """Say whether the final answer of `text` equals `gold`: r(x, y) in one call."""
    return is_equiv(extract_answer(text), gold)


# --- 5. The model ---------------------------------------------------------------------------------
# The policy is a causal language model: it reads token ids and gives, at each place, a score
# (logit) for every possible next token. The softmax of the scores is pi(next token | so far), and
# the probability of a response is the product over its tokens. A chat model sees a conversation as
# one text with markers in it, written by the tokenizer's chat template:
#
#     <|user|>What is 2 + 3? ...<|end|><|assistant|>\boxed{5}<|end|><|user|>Check the steps ...
#     \---------- prompt --------------------------/\----- y1 -----/\--- bridge ------ ...
#
# One rule matters for RL: what the policy wrote is never decoded and encoded again, because the
# same text can be cut into other tokens, which have other probabilities. We keep the ids, and put
# between two responses the *bridge*: the ids of the markers and of our next request.
#
# The model stays in eval mode for ever, also while it learns: dropout would make log pi differ from
# log pi_ref before the first update, and (6) is about exactly that difference. (`load_policy`, in
# the appendix, makes a Policy of a model's folder.)

# The requests are all that we ever say to the model. In content they are PAG's.
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
    """A language model and what is needed to talk to it: the policy itself, or the reference."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    end_ids: tuple[int, ...]  # the tokens that end a response: a chat model can have several
    device: torch.device
    dtype: torch.dtype  # what the matrix products are computed in
    scaler: torch.amp.GradScaler  # in float16 small gradients would be 0; else it does nothing
    adapters: bool | None = None  # LoRA: are they on (policy) or off (reference)? None: no LoRA
    prompts: dict[Problem, list[int]] = field(default_factory=dict)  # those encoded so far

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Compute as this policy: with its LoRA adapters on or off, and in its dtype. (Weights that
        learn stay float32: bfloat16 would round off an update of 1e-6.)"""
        if self.adapters is not None:
            (self.model.enable_adapters if self.adapters else self.model.disable_adapters)()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield

    def prompt_ids(self, problem: Problem) -> list[int]:
        """The first request, up to where the first response begins. (`without_markers` breaks up
        markers in the problem's own text: it must not end our request.)"""
        if problem not in self.prompts:
            words = without_markers(self.tokenizer, problem.problem)
            request = SOLVE_PROMPT.replace("{problem}", words)
            text = render(self.tokenizer, [{"role": "user", "content": request}])
            self.prompts[problem] = encode(self.tokenizer, text)
        return self.prompts[problem]

    def bridge_ids(self, request: str, ended: bool) -> list[int]:
        """The ids between a response and the next one: `bridge_text` has what the chat template
        writes there. They begin with an end token, which a response that has `ended` brings itself.
        One that was cut off does not; the policy did not choose that token, so no loss counts it.
        """
        ids = encode(self.tokenizer, bridge_text(self.tokenizer, request))
        return ids[1:] if ended and ids[0] in self.end_ids else ids


def render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The conversation as text, up to where the assistant speaks next."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids. The template has already written every marker, so none is added here."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def freeze(policy: Policy) -> Policy:
    """The reference pi_ref: the policy as it is now, copied, never to change. With LoRA it is the
    same weights with the adapters off, and no second copy exists."""
    if policy.adapters:
        return dataclasses.replace(policy, adapters=False)
    model = copy.deepcopy(policy.model).requires_grad_(False)
    for layer in model.modules():  # as autocast would, each time; the head may be the embedding
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
            layer.to(policy.dtype)
    return dataclasses.replace(policy, model=model)


# --- 6. Sampling ----------------------------------------------------------------------------------
# A rollout draws one token after the other from pi(. | so far), at temperature 1 and without top-k
# or top-p: equation (6) speaks of the policy itself, not of a sharper one. (With --temperature T,
# pi and pi_ref both mean the model at T, here and in section 8.) Four things make it fast, and none
# of them is an approximation:
#
# * a *key/value cache* keeps what the model computed about earlier tokens, so that a new token
#   costs one token's work (`Cache` is transformers' own, but keeps to our dtype);
# * many responses are written at once. Shorter prompts get padding on the left; a mask hides it,
#   and positions count only what the mask shows. Responses end at different times, but taking rows
#   out copies the cache: those that have ended leave when they are half of the batch;
# * equal prompts are read once: stage 1 asks each problem N times;
# * what the cache holds of a dialogue, its *past*, is kept for its next turn (section 9), so that
#   only our next request has to be read. This takes memory: it is done where one batch holds all.
#
# No random generator is used. Each token is chosen by a number u in [0, 1), hashed from what it is
# for: seed, training step, problem, sample, turn and position. So batches may come in any order, a
# run that goes on has no state to restore, and on one machine's CPU it repeats to the last digit.


def uniform(*counters: Any) -> np.ndarray:
    """Uniform numbers in [0, 1), a pure function of integer counters (arrays are broadcast).

    Each counter is folded in with splitmix64's mixing steps (Steele et al. 2014). Only 32 bits are
    kept: with 53, `pick`'s u times the total could be rounded up to the total.

    >>> bool(uniform(0, 1, 2) == uniform(0, 1, 2)), uniform(0, np.arange(6)[:, None], [0, 1]).shape
    (True, (6, 2))
    """
    h = np.zeros(1, np.uint64)
    for counter in counters:
        h = h + np.asarray(counter).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = (h ^ (h >> np.uint64(31))) + np.uint64(0x9E3779B97F4A7C15)
    return (h >> np.uint64(32)) * 2.0**-32


def pick(logits: Tensor, u: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """One token a row: inverse-CDF sampling with u (B,) in [0, 1); the best one at temperature 0.

    Token k is chosen if u falls into [P(tokens < k), P(tokens <= k)), so one of probability 0 never
    is. Summed in float64: a vocabulary has up to 200,000 terms.
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


def read(model: Any, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """Run the model over new ids (B, P), which follow those in the cache. mask (B, T) covers both:
    1 for a token, 0 for padding. Returns the logits (B, V) of the next token."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # (B, P)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,  # (B, 1, V): while reading only the last place matters
    ).logits
    return logits[:, -1].float()


Past = Sequence[Tensor]  # each layer's keys and values of a dialogue's tokens, (T, heads, width)
left_pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")


def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    u: np.ndarray,
    config: Config,
    pasts: list[Past] | None = None,
) -> list[list[int]]:
    """One response to each of B prompts, at most L tokens long, with its end token if it ended.

    u: (B, L), the number that chooses each token. Config says temperature and top_p. pasts:
    those of the prompts, each () at first; they are brought up to date.
    """
    distinct = dict(zip(map(tuple, prompts), pasts or [()] * len(prompts)))
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    tensors = [torch.tensor(prompt, device=policy.device) for prompt in distinct]
    ids, mask = left_pad(tensors), left_pad([torch.ones_like(t) for t in tensors])  # (B, T)
    # All read as many new tokens, so that padding is on the left only, in the cache as well.
    new = max(len(prompt) - (len(past[0]) if past else 0) for prompt, past in distinct.items())
    cut = [[t[: max(0, len(prompt) - new)] for t in past] for prompt, past in distinct.items()]
    layers = (left_pad(layer).transpose(1, 2) for layer in zip(*cut))  # keys, values, keys, ...
    cache = Cache(zip(layers, layers), config=policy.model.config)
    ends = torch.tensor(policy.end_ids, device=policy.device)
    numbers = torch.from_numpy(u).to(policy.device)
    written = torch.full(u.shape, -1, device=policy.device)  # (B, L); -1: nothing
    # Autocast casts the weights once for all tokens, but not in inference_mode, the faster no_grad:
    # that is for float32. (It comes first, because inference_mode(False) switches gradients on.)
    fast = torch.inference_mode(policy.dtype == torch.float32)
    with fast, torch.no_grad(), policy.active():
        logits = read(policy.model, ids[:, -new:], mask, cache)  # (distinct prompts, V)
        copies = torch.tensor([row_of[tuple(p)] for p in prompts], device=policy.device)
        cache.batch_select_indices(copies)  # from here on a row is a response
        logits, mask = logits[copies], mask[copies]  # (B, V), (B, T)
        rows = torch.arange(len(copies), device=policy.device)  # those that are in the batch
        running = torch.ones_like(rows, dtype=torch.bool)
        for place in range(u.shape[1]):
            token = pick(logits, numbers[rows, place], config.temperature, config.top_p)  # (B,)
            written[rows, place] = torch.where(running, token, -1)
            running = running & ~torch.isin(token, ends) & (place + 1 < u.shape[1])
            stay = running.nonzero()[:, 0]
            if len(stay) <= len(rows) / 2:  # those that have ended leave
                if pasts and {*map(type, cache.layers)} == {DynamicLayer}:  # other kinds forget
                    gone = (~running).nonzero()[:, 0] if len(stay) else slice(None)  # all: no copy
                    parts = [t[gone] for layer in cache.layers for t in (layer.keys, layer.values)]
                    counts = mask[gone].sum(1).tolist()  # all but the last, never read
                    for i, (row, n) in enumerate(zip(rows[gone].tolist(), counts)):
                        start = ids.shape[1] - len(prompts[row])
                        pasts[row] = [t[i, :, start : start + n].transpose(0, 1) for t in parts]
                if len(stay) == 0:
                    break
                cache.batch_select_indices(stay)
                rows, token, mask, running = rows[stay], token[stay], mask[stay], running[stay]
            mask = torch.cat([mask, running[:, None]], 1)  # hides what follows an end
            logits = read(policy.model, token[:, None], mask, cache)
    return [[token for token in row if token >= 0] for row in written.tolist()]


# --- 7. V*: how good could the best policy be? ----------------------------------------------------
# What kind of mean of the rewards is (5)? A large beta1 makes it the plain mean, a small one the
# maximum. In between, at 0.5, one right answer in eight gives 0.5 * log((7 + e^2) / 8) = 0.29: more
# than its share of 0.125, because the best policy would choose that response far more often than
# the reference does. Why not the beta2 = 0.001 of the loss? There the same eight give 0.998: every
# problem that was solved once looks as good as solved, and Vhat no longer tells easy from hard. So
# Vhat is not the V* that belongs to the loss's beta2; section 8 says why it need not be. (The
# logarithm is concave: on average (5) is a little below (3). That is its bias.)


def estimate_v_star(rewards: Tensor, beta1: float) -> Tensor:
    """Vhat from the rewards of N reference responses: equation (5). (..., N) -> (...).

    logsumexp takes the maximum out of the exponent first, so that r/beta1 = 1e6 does not overflow.

    >>> round(estimate_v_star(torch.tensor([0.0] * 7 + [1.0]), beta1=0.5).item(), 3)
    0.294
    """
    scaled = rewards.double() / beta1
    return (beta1 * (scaled.logsumexp(-1) - math.log(rewards.shape[-1]))).float()


# --- 8. The loss: regression on the optimal advantage ---------------------------------------------
# Everything else in this file serves the three lines of `astarpo_loss`: equation (6).
#
# What does Vhat do there? Take the gradient of (6) for a response that the policy drew itself (the
# drawing is not differentiated),
#     2 * beta2 * ( beta2 * log(pi/pi_ref) - r + Vhat ) * grad log pi(y|x),
# and average over y ~ pi. Vhat does not depend on y, and the average of grad log pi is zero (it is
# sum pi * grad log pi = grad sum pi = grad 1): Vhat drops out. What is left is -2 * beta2 times the
# gradient of (1) with beta = beta2: on-policy the regression is a policy gradient, and Vhat its
# *baseline*. Any V that does not depend on y leaves the same optimum, (2) with beta2. A good one
# takes away noise: a problem that the reference always solves, or never, has r = Vhat and moves
# nothing at first. That is all that stage 1 buys here: so beta1 may differ from beta2, the bias of
# (5) does no harm, and where a Vhat is missing, one pooled over problems will do.
#
# Off-policy, over responses from elsewhere, the average of grad log pi is not zero, and Vhat stays
# in the gradient. A wrong one bends the policy: the log-ratios have to fit it as well as they can.
# Only with the V* of beta2 itself can (4) hold for every response at once. The tests show both on a
# policy so small that all its responses can be listed. (--minibatches 2, as in the paper, is
# off-policy by one small update. Our default is 1.)
#
# Do not wait for the loss to reach 0. With so small a beta2 it is nearly (r - Vhat)^2. The better
# the policy, the more often r = 1 > Vhat, so the loss may rise while the policy improves: watch the
# reward. (Nor does the small factor 2 * beta2 slow learning: Adam divides by the gradient's size.)
#
# The log-probability of a response is the sum, not the mean, over its tokens, with the one that
# ends it: (6) speaks of pi(y|x). Only tokens that the policy chose are *scored*; prompts, bridges
# and padding are not.


def astarpo_loss(
    logp: Tensor, ref_logp: Tensor, reward: Tensor, v_star: Tensor, beta2: float
) -> Tensor:
    """Equation (6), averaged over a batch of responses: four tensors (n,) -> a scalar.

    logp, ref_logp: log-probabilities of the responses (nats, summed over tokens) under the policy
    and the reference; reward, v_star: in units of reward. Only logp carries a gradient.

    >>> zero = torch.zeros(2)
    >>> astarpo_loss(zero, zero, torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]), 1e-3).item()
    0.25
    """
    log_ratio = logp - ref_logp  # (n,) log pi(y|x) / pi_ref(y|x)
    advantage = reward - v_star  # (n,) r - Vhat(x), in the place of A*
    return (beta2 * log_ratio - advantage).square().mean()


LOGITS_AT_A_TIME = 2**26  # in float32: 256 MiB a copy


def token_logps(policy: Policy, ids: Tensor, scored: Tensor, temperature: float = 1.0) -> Tensor:
    """`score_tokens` of this policy: ids, scored (B, T), padded on the right -> (M,), row by row.
    (`deal_out` gives fsdp's models a method for it.)"""
    score = getattr(policy.model, "score_tokens", functools.partial(score_tokens, policy.model))
    with policy.active():
        return score(ids, scored, temperature)


def score_tokens(model: Any, ids: Tensor, scored: Tensor, temperature: float) -> Tensor:
    """log pi of the scored tokens. The logits at place t - 1 predict token t. No mask is needed:
    attention looks back only, and the padding comes last. With a vocabulary of 152,000 the logits
    of all places would not fit into memory: so they are computed for the scored places only, in
    pieces, and again in the backward pass."""
    hidden = model.get_decoder()(input_ids=ids, use_cache=False)  # all but the last matrix
    hidden = hidden.last_hidden_state[:, :-1][scored[:, 1:]]  # (M, width)
    targets = ids[:, 1:][scored[:, 1:]]  # (M,)
    head = model.get_output_embeddings()

    def logps(h: Tensor, target: Tensor) -> Tensor:
        logits = head(h).float() / temperature  # (m, V)
        return -F.cross_entropy(logits, target, reduction="none")  # (m,)

    size = max(1, LOGITS_AT_A_TIME // head.weight.shape[0])
    if len(targets) <= size:
        return logps(hidden, targets)
    pieces = zip(hidden.split(size), targets.split(size))
    return torch.cat([checkpoint(logps, h, t, use_reentrant=False) for h, t in pieces])


# --- 9. PAG: solve, verify, revise ----------------------------------------------------------------
# In PAG's dialogue the policy solves a problem; we ask it to check its solution; unless its verdict
# is "correct" we ask it to try again. The "unless" matters: a model that is always asked to revise
# learns to give its best answer at once and then to repeat it (the *collapse* that the paper
# describes); one that revises only what it did not find correct must learn to judge.
#
# For A*-PO nothing changes. A turn is a response whose problem is the dialogue so far, and it has a
# reward of its own. Its Vhat is that of the problem and the turn's *role*, as to solve and to judge
# earn different rewards on average. (The dialogue so far would have a V* of its own, but nobody has
# N samples of it. Section 8 asks only that Vhat does not depend on the response.)
ROLES = ("solve", "verify", "revise")

# What a check says is read off its last sentence only, and only in the words that the request asks
# for ("So" or "But no:" may come before them). A check that wanders on after its verdict has no
# verdict, None: it earns nothing, and a revision follows.
VERDICT = re.compile(
    r"""(?:^|[.!?:\n])[\s*"']*(?:(?:so|thus|hence|therefore),?\s+)?[*"']*"""
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

    correct[k]: was attempt k right (0: the solve turn, k: the k-th revision); verdicts[k]: what the
    check of it said. As in PAG, a turn is paid for what it did itself (no reward flows back from
    later ones), and a revision also for what it changed: breaking a right answer costs alpha.

    >>> dialogue_rewards([False, True], [False], alpha=1.0)    # wrong; "wrong"; mended
    [0.0, 1.0, 2.0]
    >>> dialogue_rewards([True, False], [False], alpha=1.0)    # right; "wrong"; broken
    [1.0, 0.0, -1.0]
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
    ids: list[int]
    sample: int = 0  # tells the dialogues about one problem apart
    turns: list[Turn] = field(default_factory=list)

    @property
    def attempts(self) -> list[Turn]:
        """The turns with an answer: solve, then the revisions."""
        return self.turns[::2]

    @property
    def checks(self) -> list[Turn]:
        """The verify turns; check k is about attempt k."""
        return self.turns[1::2]

    def pay(self, config: Config) -> None:
        """Give each turn its reward. (Section 4's warning, to be tried: --format-reward is a bonus
        for a readable answer, --length-penalty a price of tokens beyond half of the room.)"""
        outcomes = [turn.correct for turn in self.attempts], [turn.verdict for turn in self.checks]
        for turn, reward in zip(self.turns, dialogue_rewards(*outcomes, config.alpha)):
            over = max(0, turn.end - turn.start - config.max_new_tokens // 2)
            bonus = config.format_reward * (turn.answer is not None)
            turn.reward = reward + bonus - config.length_penalty * over


def next_role(dialogue: Dialogue) -> str | None:
    """What comes next in a dialogue; None after "correct"."""
    if not dialogue.turns:
        return "solve"
    last = dialogue.turns[-1]
    return "verify" if last.role != "verify" else None if last.verdict else "revise"


def add_turns(policy: Policy, dialogues: Sequence[Dialogue], responses: list[list[int]]) -> None:
    """Append a response to each dialogue, as its next turn, and read off what it says."""
    texts = policy.tokenizer.batch_decode(responses, skip_special_tokens=True)
    for dialogue, response, text in zip(dialogues, responses, texts):
        start, role = len(dialogue.ids), next_role(dialogue)
        dialogue.ids += response
        turn = Turn(role, start, len(dialogue.ids), text, response[-1] in policy.end_ids)
        if role == "verify":
            turn.verdict = parse_judgment(text)
        else:
            turn.answer = extract_answer(text)
            turn.correct = is_equiv(turn.answer, dialogue.problem.answer)
        dialogue.turns.append(turn)


def rollout(
    policy: Policy, dialogues: Sequence[Dialogue], config: Config, step: int, turns: int = 0
) -> list[Dialogue]:
    """Play dialogues, turn by turn, to their end or to so many turns. Returns all, in order.

    step: which rollout this is, for the random numbers (0: stage 1; s + 1: training step s; -1:
    evaluation). `deal`, `gathered` and `collect` do nothing with one process; with several, they
    deal out the dialogues, put fsdp's slices of the weights together, and give all to all.
    """
    mine = deal(dialogues)
    most, room = turns or 1 + 2 * config.revisions, config.max_new_tokens
    pasts: dict[int, Past] = {}  # of the dialogues, while one batch holds all that go on
    with gathered(policy.model):
        while going := [d for d in mine if len(d.turns) < most and next_role(d)]:
            role = next_role(going[0])  # the others' too: those that go on stand at the same turn
            if role != "solve":  # whose request is in ids already
                request = VERIFY_PROMPT if role == "verify" else REVISE_PROMPT
                bridges = {ended: policy.bridge_ids(request, ended) for ended in (True, False)}
                for dialogue in going:
                    dialogue.ids += bridges[dialogue.turns[-1].ended]
            lengths = [len(dialogue.ids) + room for dialogue in going]
            batches = token_batches(lengths, config.rollout_tokens)  # those of like lengths
            for batch in batches:
                some = [going[i] for i in batch]
                counters = np.array([(d.problem.index, d.sample, len(d.turns)) for d in some])
                u = uniform(config.seed, step, *counters.T[:, :, None], np.arange(room))  # (B, L)
                known = [pasts.pop(id(d), ()) for d in some if most > 1]  # else nothing follows
                add_turns(policy, some, sample(policy, [d.ids for d in some], u, config, known))
            pasts = dict(zip(map(id, some), known)) if len(batches) == 1 else {}
    for dialogue in mine:
        dialogue.pay(config)  # gives each turn its reward
    return collect(mine, len(dialogues))


# --- 10. Training ---------------------------------------------------------------------------------
# In stage 1 the reference plays N dialogues about each problem, which give a Vhat for each
# (problem, role). The solve and verify turns have N samples; a revision comes only after a check
# that did not say "correct", so its Vhat often rests on one sample or two. Where there is none,
# Vhat is that of all problems' revisions, if there are any (section 8 says why that will do), or 0.
# In stage 2 the present policy plays one dialogue a problem, and (6) goes down a gradient step.
# `Run`, in the appendix, is the run's folder: it keeps and prints what happens, also for --resume.

Baselines = dict[tuple[int, str], float]  # (problem index, role) -> Vhat, in units of reward


def n_dialogues(policy: Policy, problems: Sequence[Problem], n: int) -> list[Dialogue]:
    """n dialogues about each problem, still to be played. (The ids are copied: they will grow.)"""
    return [Dialogue(p, [*policy.prompt_ids(p)], i) for p in problems for i in range(n)]


def stage_one(ref: Policy, problems: Sequence[Problem], config: Config, run: Run) -> list[Dialogue]:
    """The reference's N dialogues about each problem. `rollouts` plays them in parts, `write_rows`
    keeps each; what the run has already, after a kill or by --v-star, is not played again."""
    wanted = n_dialogues(ref, problems, config.num_samples)
    dialogues = run.played
    for part in rollouts(ref, wanted[len(dialogues) :], config, 0, "stage 1, V*"):
        write_rows(run.stage_one, part, append=True)
        dialogues += part
    return dialogues


def baselines(dialogues: Sequence[Dialogue], config: Config) -> Baselines:
    """Vhat of every (problem, role) from the reference's dialogues. (The authors' code has
    --baseline mean, the mean reward, and zero, too: right on-policy. Try how fast they learn.)"""
    rewards: dict[tuple[int, str], list[float]] = defaultdict(list)
    for dialogue in dialogues:
        for turn in dialogue.turns:
            for index in (dialogue.problem.index, -1):  # -1: all problems together
                rewards[index, turn.role].append(turn.reward)

    v_star = {}
    for index in {dialogue.problem.index for dialogue in dialogues}:
        for role in ROLES:
            samples = rewards[index, role] or rewards[-1, role] or [0.0]
            vhat = estimate_v_star(torch.tensor(samples), config.beta1).item()
            others = {"mean": float(np.mean(samples)), "zero": 0.0}
            v_star[index, role] = others.get(config.baseline, vhat)
    return v_star


class Batch(NamedTuple):
    """Some dialogues as tensors: B rows, M scored tokens, n turns numbered 0..n-1 in order."""

    ids: Tensor  # (B, T), padded on the right
    scored: Tensor  # (B, T) True where the policy chose the token
    turn: Tensor  # (M,) the turn that each scored token belongs to
    reward: Tensor  # (n,)
    v_star: Tensor  # (n,)


def collate(dialogues: Sequence[Dialogue], v_star: Baselines, device: torch.device) -> Batch:
    """One pass will score all turns of a dialogue: later ones extend the same ids, so attention,
    which looks back only, gives each token the context that it was sampled in."""
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


@dataclass
class Learner:
    """What an update needs: the policy, what it is held to, and how it moves."""

    policy: Policy
    ref: Policy
    v_star: Baselines
    optimizer: torch.optim.Optimizer
    value: torch.nn.Module | None = None  # these two are for the neighbours, Part II
    notes: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)


def update(learner: Learner, dialogues: Sequence[Dialogue], config: Config) -> dict[str, float]:
    """One gradient step on (6), a mean over all turns of all dialogues. Returns the metrics.

    `my_share` cuts the dialogues into micro-batches that fit into memory and, of several processes,
    gives each its own (of weight 1, or 0 if it only fills in). Their gradients add up, each times
    its share of the turns, so that the sum does not depend on the cut.
    """
    policy, ref, optimizer = learner.policy, learner.ref, learner.optimizer
    n_turns = sum(len(dialogue.turns) for dialogue in dialogues)
    seen: dict[str, float] = defaultdict(float)
    for part, weight in my_share(dialogues, config.update_tokens):
        batch = collate(part, learner.v_star, policy.device)
        inputs = (batch.ids, batch.scored, config.temperature)
        with torch.no_grad():
            ref_token_logp = token_logps(ref, *inputs)  # (M,)
        token_logp = token_logps(policy, *inputs)  # (M,)
        zeros = torch.zeros_like(batch.reward)
        logp = zeros.index_add(0, batch.turn, token_logp)  # (n,) sums over each turn's tokens
        ref_logp = zeros.index_add(0, batch.turn, ref_token_logp)  # (n,)
        loss = astarpo_loss(logp, ref_logp, batch.reward, batch.v_star, config.beta2)
        if config.loss != "astarpo":  # one of Part II
            loss = neighbour_loss(learner, part, (batch.turn, token_logp, ref_token_logp), config)
        share = weight * len(batch.reward) / n_turns
        policy.scaler.scale(loss * share).backward()
        seen["loss"] += loss.item() * share
        seen["kl"] += weight * (logp - ref_logp).sum().item() / n_turns
        seen["entropy"] -= token_logp.sum().item() * weight
        seen["v_star"] += weight * batch.v_star.sum().item() / n_turns
        seen["tokens"] += len(token_logp) * weight
    seen = sum_over_processes(policy.model, seen)  # and adds up the gradients
    seen["entropy"] /= seen.pop("tokens")
    policy.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
    seen |= {"grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"]}
    seen["skipped"] = float(not math.isfinite(seen["loss"] + seen["grad_norm"]))
    if not seen["skipped"]:  # one bad batch must not destroy the weights
        policy.scaler.step(optimizer)
    policy.scaler.update()
    policy.model.zero_grad(set_to_none=True)  # while sampling, its memory is better used
    return seen


def batch_of_step(problems: Sequence[Problem], step: int, size: int, seed: int) -> list[Problem]:
    """The `size` problems of `step` (from 0), walking through reshuffled epochs.

    >>> [p.index for p in batch_of_step([Problem(i, "", "") for i in range(3)], 1, 2, seed=0)]
    [1, 2]
    """
    n = len(problems)
    order = functools.cache(lambda epoch: np.random.default_rng([seed, epoch]).permutation(n))
    return [problems[order(i // n)[i % n]] for i in range(step * size, (step + 1) * size)]


def train(config: Config, resume: bool = False) -> dict[str, Any]:
    """The whole of A*-PO + PAG: evaluate, stage 1, stage 2, evaluate. Returns the summary. `resume`
    goes on with the run in config.out."""
    with Run(config, resume) as run:
        config = run.config  # with a temperature, if none was given
        policy = load_policy(config)
        problems = load_problems(policy, config, "train")
        held_out = load_problems(policy, config, "test")
        run.begin(policy, problems)
        ref = freeze(policy)
        deal_out(policy, ref, config)  # fsdp: over the devices
        greedy = dataclasses.replace(config, temperature=0.0, samples=1)
        measure = functools.partial(evaluate_policy, policy, held_out, greedy)
        before = measure()
        dialogues = stage_one(ref, problems, config, run)
        v_star = baselines(dialogues, config)
        problems = run.after_stage_one(dialogues, v_star) or problems  # --drop-unsolved: fewer
        weights = policy.model.parameters()  # what is frozen gets no gradient, and stays as it is
        optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=0.0, fused=True)
        learner = Learner(policy, ref, v_star, optimizer)
        learn_value(learner, dialogues, config)  # section 13; for A*-PO as it is, nothing
        for step in run.steps(learner):  # from 0, or from where the run was interrupted
            optimizer.param_groups[0]["lr"] = config.lr * min(1, (step + 1) / max(1, config.warmup))
            chosen = batch_of_step(problems, step, config.batch_size // config.group, config.seed)
            fresh = n_dialogues(policy, chosen, config.group)  # group = 1 but in section 12
            for place, dialogue in enumerate(fresh):
                dialogue.sample = place  # else a problem that comes twice would be played alike
            with run.timed("sampling"):
                dialogues = rollout(policy, fresh, config, step + 1)
            with run.timed("updating"):
                look_ahead(learner, dialogues, config)  # section 12; for A*-PO nothing, too
                size = math.ceil(len(dialogues) / config.minibatches)
                parts = [dialogues[i : i + size] for i in range(0, len(dialogues), size)]
                seen = [update(learner, part, config) for part in parts]
            run.tell(dialogues, seen)
            run.check_in(measure)  # now and then: evaluate, keep the best, save a state
        return run.finish(before, measure)  # save the model, evaluate again, report


# --- 11. Evaluation -------------------------------------------------------------------------------
# Dialogues as in training, but about problems that were never trained on, and greedily (temperature
# 0) unless `eval --temperature` says otherwise. `summarize` counts: there are two accuracies,
# acc_t1 of the first attempt and acc_final of the last one; the difference is what checking was
# worth. A verifier that always says "correct" is right as often as the solver is. So we look at its
# *balanced* accuracy, the mean of how often it is right about right attempts and about wrong ones:
# a coin and any constant verdict have 0.5. A trained policy makes few mistakes that it could find,
# so `evaluate_pool` lets it check a fixed pool of the shipped base's attempts, half of them wrong.

Evaluation = tuple[dict[str, Any], list[Dialogue]]  # the numbers, and what they were counted on


def evaluate_policy(policy: Policy, problems: Sequence[Problem], config: Config) -> Evaluation:
    """Dialogues about held-out problems, K = --samples of each."""
    wanted = n_dialogues(policy, problems, config.samples)
    find(policy, wanted, config)  # --search: the first turn by best-first search, Part II
    dialogues = [d for part in rollouts(policy, wanted, config, -1, "evaluate") for d in part]
    return {**summarize(dialogues, config.samples), **evaluate_pool(policy, config)}, dialogues


# ==================================================================================================
# Part II: the neighbours
# ==================================================================================================

# --- 12. Other losses -----------------------------------------------------------------------------
# What does (6) replace? `--loss` puts another loss in its place, on the same dialogues. Only ppo
# needs stage 1: with --num-samples 0 the baseline is the batch's mean reward of the role.
#
# pg is REINFORCE (Williams 1992) with a price on the KL. Let L be a response's log-ratio and A its
# advantage, multiply (6) out and divide it by 2 * beta2:
#
#     (6) / (2 * beta2)  =  -A * L  +  beta2/2 * L^2  +  A^2 / (2 * beta2)
#
# The last term does not depend on pi, and L differs from log pi by a constant. So A*-PO *is* a
# policy gradient, with Vhat as its baseline and L^2 as its price. (Why a square? On average the
# gradient of L is zero, by section 8; that of L^2/2 is L * grad log pi, on average the KL's.)
#
# grpo (Shao et al. 2024, arXiv 2402.03300) plays --group G > 1 dialogues about a problem. The
# advantage is r less the group's mean, over its standard deviation: rare outcomes count for more. A
# response is the mean of its tokens: those of a short one count for more. Clipping the ratio of pi
# to the policy that sampled bounds a push. (With one update a batch it is 1: a policy gradient.)
#
# ppo (Schulman et al. 2017) gives each token its own advantage: how much better does the end look
# after it? GAE (Schulman et al. 2016) reads that off a learned value (section 13), fitted once, on
# stage 1; PPO trains its own along. The bonus for entropy is a square, for pg's reason.
#
# awr (Peng et al. 2019) imitates the policy's own responses, weighted by exp(A/beta) as in (2).


def neighbour_loss(
    learner: Learner, dialogues: Sequence[Dialogue], tokens: Sequence[Tensor], config: Config
) -> Tensor:
    """The loss that --loss names: a mean over the n turns of some dialogues. tokens, (M,) each: the
    turn that a token belongs to, 0 .. n - 1, its log pi and its log pi_ref."""
    turn, logp, ref = tokens
    advantage, old = zip(*(learner.notes[id(t)] for d in dialogues for t in d.turns))
    advantage = torch.cat(advantage).to(logp.device)  # (M,) its turn's; for ppo the token's own
    old = torch.cat(old) if config.minibatches > 1 else logp.detach()  # before the batch's updates

    def sums(numbers: Tensor) -> Tensor:  # (M,) -> (n,) over each turn's tokens
        return numbers.new_zeros(int(turn[-1]) + 1).index_add(0, turn, numbers)

    if config.loss == "pg":  # -A * log pi + beta2/2 * L^2: has the gradient of (6) / (2 * beta2)
        price = config.beta2 / 2 * sums(logp - ref).square()
        return (price - sums(advantage * logp)).mean()
    if config.loss == "awr":  # log pi, weighted: exp(A/beta1), normalised, stands where A stood
        return -sums(advantage * logp).mean()
    # Of each token -min(ratio * A, clip(ratio) * A), and beta2 times an estimate of the KL that is
    # never negative (Schulman's k3: 1/q - 1 + log q for q = pi/pi_ref).
    ratio, back = (logp - old).exp(), ref - logp
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    loss = config.beta2 * (back.exp() - 1 - back) - gain  # (M,)
    if config.loss == "grpo":  # its equation (3): the mean over a response's tokens, then of those
        return (sums(loss) / sums(torch.ones_like(loss))).mean()
    return sums(loss + 1e-3 / 2 * logp.square()).mean()  # ppo: its equation (9), and the entropy


def gae(values: Tensor, reward: float, lam: float = 0.95) -> Tensor:
    """Generalised advantage estimation: values (T,), V before each token -> A of each token (T,).
    A_t = sum_l lam^l * delta_{t+l} with delta_t = V_{t+1} - V_t, where the reward is the last V."""
    advantage = torch.cat([values[1:], values.new_tensor([reward])]) - values
    for t in reversed(range(len(values) - 1)):
        advantage[t] += lam * advantage[t + 1]
    return advantage


@torch.no_grad()
def look_ahead(learner: Learner, dialogues: Sequence[Dialogue], config: Config) -> None:
    """Before a batch's first update: its mean reward as baseline where there was no stage 1, and
    for the other losses each token's advantage and, where pi will move on, its old log pi."""
    policy, turns = learner.policy, [(i, t) for i, d in enumerate(dialogues) for t in d.turns]
    keys = [(dialogues[i].problem.index, t.role) for i, t in turns]
    if not config.num_samples:
        paid = {role: mean(t.reward for _, t in turns if t.role == role) for role in ROLES}
        learner.v_star = {key: paid[key[1]] * (config.baseline != "zero") for key in keys}
    if config.loss == "astarpo":
        return
    gains = torch.tensor([t.reward - learner.v_star[key] for (_, t), key in zip(turns, keys)])
    if config.loss == "grpo":
        for key in {*keys}:
            group = torch.tensor([other == key for other in keys])
            spread = gains[group].std(correction=0) + 1e-4
            gains[group] = (gains[group] - gains[group].mean()) / spread
    if config.loss == "awr":
        gains = (gains / config.beta1).softmax(0) * len(gains)
    advantage = [gain.expand(t.end - t.start) for gain, (_, t) in zip(gains, turns)]
    texts, old = [d.ids for d in dialogues], {}
    if config.loss == "ppo":
        chances = think(learner.ref, texts, config, lambda i, s: learner.value(s).sigmoid())
        advantage = [gae(chances[i][t.start - 1 : t.end - 1], t.reward) for i, t in turns]
    if config.minibatches > 1:  # from the second update on, pi is not what it was
        for batch in token_batches([len(text) for text in texts], config.update_tokens):
            b = collate([dialogues[i] for i in batch], learner.v_star, policy.device)
            logp = token_logps(policy, b.ids, b.scored, config.temperature)
            own = [id(turn) for i in batch for turn in dialogues[i].turns]
            old |= zip(own, logp.split(b.turn.bincount().tolist()))
    learner.notes = {id(t): (a, old.get(id(t))) for (_, t), a in zip(turns, advantage)}


# --- 13. A learned value --------------------------------------------------------------------------
# Vhat(x) is one number for a problem. A *value function* V*(x, y_<t) also knows the tokens y_<t
# written so far: it says the best that can still be reached. (PPO's critic learns the mean.) For
# rewards 0 and 1 both follow from p, the chance that the reference ends right from here:
#
#     mean: p        soft: V* = beta * log( 1 - p + p * e^(1/beta) )       ((3), with two outcomes)
#
# A small network guesses p from the reference's last hidden state. It is fitted to 16 tokens of
# each turn of stage 1's dialogues, but for a fifth of the problems, which tell what it is worth. It
# can judge problems that nobody sampled; but N samples of the very problem say more, and it remains
# the *reference*'s while the policy moves on. (A revision may earn 2 or -1: right is above 1/2.)


def soft_value(logit: Tensor, beta: float) -> Tensor:
    """V* = beta * log(1 - p + p * e^(1/beta)) for the logit of p.

    >>> round(soft_value(torch.tensor(1 / 8).logit(), 0.5).item(), 3)  # section 7's Vhat
    0.294
    """
    return beta * torch.logaddexp(F.logsigmoid(-logit), F.logsigmoid(logit) + 1 / beta)


def fit_value(ref: Policy, dialogues: Sequence[Dialogue], config: Config) -> torch.nn.Module:
    """Fit p to the reference's dialogues; returns its logit: hidden states (..., width) -> (...).
    Prints, of solve turns held out, the AUC of p (how often a right one has more than a wrong one)
    and the share R^2 of the variance that V* removes."""
    turns = [(d, turn) for d in dialogues for turn in d.turns]
    held = torch.tensor([d.problem.index % 5 == 0 for d, _ in turns])
    if held.all() or not held.any():
        raise UsageError("a learned value needs stage 1 (--num-samples) on five problems or more")
    at = [[np.linspace(t.start - 1, t.end - 1, 16, dtype=int) for t in d.turns] for d in dialogues]
    x = torch.cat(think(ref, [d.ids for d in dialogues], config, lambda i, s: s[np.array(at[i])]))
    y = torch.tensor([[float(t.reward > 0.5)] * 16 for _, t in turns], device=x.device)
    torch.manual_seed(config.seed)
    layers = (torch.nn.Linear(x.shape[2], 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    value = torch.nn.Sequential(*layers, torch.nn.Flatten(-2)).to(x.device)
    optimizer, train = torch.optim.Adam(value.parameters(), lr=2e-3), (~held).nonzero()[:, 0]
    for _ in range(30):  # with many more it learns the problems by heart
        for rows in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(value(x[rows]), y[rows]).backward()
            optimizer.step()
    judged = held & torch.tensor([t.role == "solve" for _, t in turns])
    logit, truth = value(x[judged]).detach()[:, [0, -1]], y[judged, 0]
    right, wrong = logit[truth > 0], logit[truth == 0]
    first, last = 0.5 + (right[:, None] - wrong).sign().mean((0, 1)) / 2
    r2 = 1 - (truth - soft_value(logit[:, 0], config.beta1)).var() / truth.var()
    print(f"learned value: AUC {first:.2f} at the prompt, {last:.2f} at the end, R^2 {r2:.2f}")
    return value


def learn_value(learner: Learner, dialogues: Sequence[Dialogue], config: Config) -> None:
    """Fit a value to stage 1 where one is wanted. --baseline value: it replaces Vhat of solve."""
    if config.loss == "ppo" or config.baseline == "value":
        learner.value = fit_value(learner.ref, dialogues, config)
    if config.baseline == "value":
        prompts = {d.problem.index: d.ids[: d.turns[0].start] for d in dialogues}
        logits = think(learner.ref, [*prompts.values()], config, lambda i, s: learner.value(s)[-1])
        values = soft_value(torch.stack(logits), config.beta1).tolist()
        learner.v_star |= {(index, "solve"): v for index, v in zip(prompts, values)}


# --- 14. Best-first search: the other A* ----------------------------------------------------------
# A* search (Hart, Nilsson and Raphael 1968) keeps a queue of unfinished paths and always extends
# the one with the best f = g + h: g for what lies behind, h for the best that can still come. Let g
# be log pi_ref(y_<t | x) and h be V*(x, y_<t) / beta (beta1 here), and the two A* meet:
#
# * A token's optimal advantage is V* after it less V* before it; their sum over a response is (4).
#   So f = log pi*(y_<t | x) + V*(x)/beta: what pi* thinks of the prefix.
# * h is a log-sum-exp over all that may follow, and at least its largest term: it never promises
#   less than can still come (it is *admissible*), and f never rises along the way (*consistent*).
# * So the first complete response at the head of the queue is the likeliest one of pi*.
#
# This takes no training, but time for each problem; and with a fitted value nothing is certain. A
# complete response that is only second in its queue must wait, or short ones would win.


class Prefix(NamedTuple):
    """The beginning of a response, in a queue that is sorted by -f."""

    cost: float  # -f = -(g + h)
    response: list[int]
    longer: list[tuple[list[int], float]]  # with one more token, and their g; complete: none


def best_first(
    look: Callable[..., Any], prompts: list[list[int]], ends: Sequence[int], config: Config
) -> list[list[int]]:
    """For each prompt the first complete response at the head of its queue, or the best that there
    is after --search openings. look: texts -> their likeliest next tokens, log pi_ref, and h."""
    queues, opened = [[Prefix(0.0, [], [([], 0.0)])] for _ in prompts], -len(prompts)
    for _ in range(config.search + 1):  # the first one, to the empty response, does not count
        going = [i for i, queue in enumerate(queues) if queue[0].longer]
        if not going:
            break
        opened += len(going)
        ways = [(i, *way) for i in going for way in heapq.heappop(queues[i]).longer]
        found = look([prompts[i] + response for i, response, _ in ways])
        for (i, response, g), tokens, logps, h in zip(ways, *(t.tolist() for t in found)):
            longer = [([*response, token], g + logp) for token, logp in zip(tokens, logps)]
            if len(response) == config.max_new_tokens or (response and response[-1] in ends):
                longer = []
            heapq.heappush(queues[i], Prefix(-(g + h), response, longer))
    print(f"search: {opened / len(prompts):.1f} prefixes opened a problem")
    return [min(queue, key=lambda n: (n.longer != [], n.cost)).response for queue in queues]


def find(policy: Policy, dialogues: Sequence[Dialogue], config: Config) -> None:
    """--search: fit a value to a stage 1 of this policy; with it, search for each solve turn."""
    if not config.search:
        return
    drawn = dataclasses.replace(config, temperature=1.0, top_p=1.0, revisions=0)
    wanted = n_dialogues(policy, load_problems(policy, config, "train"), config.num_samples)
    played = [d for part in rollouts(policy, wanted, drawn, 0, "stage 1") for d in part]
    value, head = fit_value(policy, played, config), policy.model.get_output_embeddings()

    def look(texts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        states = torch.stack(think(policy, texts, config, lambda i, states: states[-1]))
        with torch.no_grad(), policy.active(), gathered(policy.model):
            best = head(states).float().log_softmax(-1).topk(4)
        return best.indices, best.values, soft_value(value(states), config.beta1) / config.beta1

    found = best_first(look, [d.ids for d in dialogues], policy.end_ids, config)
    add_turns(policy, dialogues, found)


# ==================================================================================================
# Part III: the appendix
# ==================================================================================================

# --- A. Errors, and a line that says how far we are -----------------------------------------------


class UsageError(Exception):
    """Something that the user gave is wrong: one sentence, exit status 2."""


class RunError(Exception):
    """Something failed under way: one sentence, exit status 1."""


@contextlib.contextmanager
def trying(what: str, kind: type[Exception] = UsageError) -> Iterator[None]:
    """Hide the progress bars of other libraries; whatever they raise becomes one sentence."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except (UsageError, RunError, ModuleNotFoundError, torch.OutOfMemoryError):
        raise  # for these there are better words
    except Exception as error:  # each library has its own kinds, dozens of them
        reason = str(error.__cause__ or error).strip().split("\n")[0] or type(error).__name__
        raise kind(f"{what}: {reason}") from error


# Metrics and their names on the progress line. (Not the loss: section 8 says why.)
SHOWN = {"acc_t1": "t1", "acc_final": "final", "verifier_balanced_acc": "verify", "kl": "kl"}


def progress(label: str, total: int, done: int = 0) -> tqdm:
    """A line that says how far we are, on a terminal; nothing elsewhere."""
    shape = "{desc} {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}]"
    options = {"file": sys.stdout, "disable": None, "ncols": 79, "bar_format": shape}
    return tqdm(total=total, initial=done, desc=label, **options)


def check_options(config: Config, command: str) -> Config:
    """Refuse nonsense before anything is loaded. Returns the options with a temperature."""
    if config.temperature is None:
        config = dataclasses.replace(config, temperature=1.0 if command == "train" else 0.0)
    for item in dataclasses.fields(config):
        flag, value = "--" + item.name.replace("_", "-"), getattr(config, item.name)
        (low, high), choices = item.metadata["within"], item.metadata["choices"]
        if choices and value not in choices:
            raise UsageError(f"{flag} must be one of {', '.join(choices)}, not {value}")
        if isinstance(value, int | float) and not (low <= value <= high and value < 2**63):
            raise UsageError(f"{flag} must be between {low:g} and {high:g}, not {value}")
    c, learning, greedy = config, command == "train", config.temperature == 0
    needs_v = c.drop_unsolved or c.search or c.loss == "ppo" or c.baseline == "value"
    for wrong, sentence in (
        (c.batch_size % c.group, f"--batch-size must be a multiple of --group {c.group}"),
        (c.loss == "grpo" and c.group == 1, "--loss grpo needs --group above 1"),
        (needs_v and not c.num_samples, "--num-samples 0 leaves out stage 1, which is needed here"),
        (c.parallel == "fsdp" and c.lora, "--parallel fsdp goes not with --lora: use ddp"),
        (learning and greedy, "--temperature 0 is greedy: training needs samples; use 1"),
        (learning and c.top_p < 1, "--top-p is for evaluation: training samples the policy itself"),
        ((greedy or c.search) and c.samples > 1, "--samples needs --temperature and no --search"),
    ):
        if wrong:
            raise UsageError(sentence)
    return config


# --- B. Loading and saving ------------------------------------------------------------------------

PLAIN = "{% for m in messages %}{{ m.role | title }}: {{ m.content }}\n\n{% endfor %}Assistant: "


def local(name: str) -> Path:
    """A file or folder, here or beside this file (where data/ lies); else a hub id: owner/name."""
    path = next(filter(Path.exists, (Path(name), HERE / name)), Path(name))
    if not path.exists() and name.count("/") != 1:
        raise UsageError(f"{name}: no such file or folder")
    return path.resolve() if path.exists() else path  # a LoRA checkpoint notes where its base lies


def open_model(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder or the hub; a LoRA checkpoint is merged into its base."""
    path = local(name)
    path = path / "checkpoint" if (path / "checkpoint").is_dir() else path  # the folder of a run
    options = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}
    with trying(f"--model {name} cannot be loaded"):
        if (path / "adapter_config.json").is_file():
            import peft

            model = peft.AutoPeftModelForCausalLM.from_pretrained(str(path), **options)
            model = model.merge_and_unload()
            model.had_adapters = True
        else:
            options["output_loading_info"] = True
            model, info = AutoModelForCausalLM.from_pretrained(str(path), **options)
            if info["missing_keys"]:  # they would be random numbers
                raise ValueError(f"its weights lack {min(info['missing_keys'])}")
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        if not encode(tokenizer, "2 + 3"):  # without its files a tokenizer comes empty
            raise ValueError("it has no tokenizer")
    if tokenizer.chat_template is None:
        print(f"{name} has no chat template: a plain one (User: ... Assistant: ...) is used")
        tokenizer.chat_template = (tokenizer.bos_token or "") + PLAIN
    return model.eval(), tokenizer


def load_policy(config: Config) -> Policy:
    """Load any causal language model of the Hugging Face format, ready to be trained."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    with trying(f"--device {config.device}"):
        device = torch.empty(0, device=best if config.device == "auto" else config.device).device
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    best = "float32" if device.type == "cpu" else "bfloat16" if bf16 else "float16"
    dtype = getattr(torch, best if config.dtype == "auto" else config.dtype)
    model, tokenizer = open_model(config.model, dtype if config.lora else torch.float32)
    millions = model.num_parameters() / 1e6
    # A tiny model is faster on one core: on several, beside a busy process, it is 20 times slower.
    torch.set_num_threads(config.threads or (1 if millions < 10 else os.cpu_count() or 1))
    # cuDNN plans its attention anew for each length: 87 ms a sampled token on an H100, not 24.
    torch.backends.cuda.enable_cudnn_sdp(False)
    scaler = torch.amp.GradScaler(device.type, 2.0**12, enabled=dtype == torch.float16)
    ends = turn_ends(model, tokenizer)
    policy = Policy(model.to(device), tokenizer, ends, device, dtype, scaler=scaler)
    check_model(config.model, policy)
    print(f"{config.model}: {millions:,.1f}M parameters, {device}, {str(dtype)[6:]}, ", end="")
    print(f"{torch.get_num_threads()} thread(s); a turn ends with {tokenizer.decode(ends)}")
    if config.lora:
        add_adapters(policy, config.lora, config.seed)
    if config.gradient_checkpointing:
        for layer in blocks(model):
            layer.forward = functools.partial(recomputed, layer.forward)
    return policy


def without_markers(tokenizer: Any, text: str) -> str:
    """The text with markers such as <|end|> split: in what people write they are mere words."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(token.content, token.content[0] + " " + token.content[1:])
    return text


def turn_ends(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """What ends a response: what model and tokenizer are configured with, and the marker that the
    chat template writes after an answer (base models are often configured with another one)."""
    found = {tokenizer.eos_token_id, *np.ravel(model.generation_config.eos_token_id).tolist()}
    markers = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    with contextlib.suppress(UsageError):  # without verify turns any template will do
        found |= markers & {encode(tokenizer, bridge_text(tokenizer, "Q"))[0]}
    return tuple(sorted(found - {None}))


def bridge_text(tokenizer: Any, request: str) -> str:
    """What the template writes after a response and before the next one, found with a stand-in.
    Raises UsageError if it changes what was said before (some templates drop a model's earlier
    thoughts): the policy would then be scored on a text that it did not write."""
    question = {"role": "user", "content": "Q"}
    answer = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA"}
    with trying("no later turns are possible (use --revisions 0 or another chat_template)"):
        before = render(tokenizer, [question]) + answer["content"]
        after = render(tokenizer, [question, answer, {"role": "user", "content": request}])
        if not after.startswith(before):
            raise ValueError("the model's chat template rewrites earlier ones")
    return after[len(before) :]


@torch.no_grad()
def check_model(name: str, policy: Policy) -> None:
    """Is what `sample` draws from what `score_tokens` scores? One trusts that prompts of unequal
    length can share a key/value cache whose rows move, the other that logits are the decoder's
    output times the head. Tried on a few tokens. Raises UsageError."""
    model, head = policy.model, policy.model.get_output_embeddings()
    text = torch.arange(8, device=policy.device) * 7 % len(model.get_input_embeddings().weight)
    ids, mask = torch.stack([text, text]), torch.ones_like(text).repeat(2, 1)  # (2, 8)
    mask[0, :2] = 0  # the first row is text[2:]: the rest of it is padding
    with trying(f"--model {name} cannot be sampled here"), policy.active():
        cache = Cache(config=model.config)
        read(model, ids[:, :4], mask[:, :4], cache)
        cache.batch_select_indices(torch.tensor([1, 0], device=policy.device))
        read(model, ids[:, 4:7], mask.flip(0)[:, :7], cache)
        sampled = read(model, ids[:, 7:], mask.flip(0), cache)  # (2, V): of text, of text[2:]
        states = [model.get_decoder()(input_ids=t[None])[0][:, -1] for t in (text, text[2:])]
        scored = head(torch.cat(states)).float()
        scale = (1e-3 if policy.dtype == torch.float32 else 0.1) * scored.std()
        if not (sampled - scored).abs().max() <= scale:  # nan, too
            raise ValueError("it needs more than a key/value cache, or caps its logits")


def check_context(policy: Policy, config: Config) -> None:
    """The longest possible dialogue must fit into the model's context."""
    requests = [VERIFY_PROMPT, REVISE_PROMPT] * config.revisions
    longest = config.max_prompt_tokens + (1 + len(requests)) * config.max_new_tokens
    longest += sum(len(policy.bridge_ids(request, ended=False)) for request in requests)
    context = getattr(policy.model.config, "max_position_embeddings", None) or math.inf
    if longest > context:
        why = f"a dialogue may take {longest} tokens, the model's context has {context}: "
        raise UsageError(why + "lower --max-prompt-tokens, --max-new-tokens or --revisions")


def load_problems(policy: Policy, config: Config, split: str) -> list[Problem]:
    """The first usable problems of --train-data (split "train") or --eval-data ("test")."""
    check_context(policy, config)
    source = config.train_data if split == "train" else config.eval_data
    limit = config.train_limit if split == "train" else config.eval_limit
    problems, index = [], -1
    for index, (place, row) in enumerate(read_rows(source, split)):
        problem = to_problem(row, index, place, config)
        fits = len(policy.prompt_ids(problem)) <= config.max_prompt_tokens
        if fits and not no_answer(problem.answer):
            problems.append(problem)
            if len(problems) == limit:
                break
    others = f"{index + 1 - len(problems)} lack an answer or exceed --max-prompt-tokens"
    if not problems:
        raise UsageError(f"{source} holds no problems that can be used: {others}")
    if strange := [p.answer for p in problems if not readable(p.answer)]:
        print(f"{source}: {len(strange)} answers can only be met word for word, as", strange[:2])
    print(f"{source}: {len(problems)} problems; {others}")
    print(f"  {textwrap.shorten(problems[0].problem, 56)} -> {problems[0].answer[:16]}")
    return problems


def read_jsonl(path: Path, whole: bool = True) -> Iterator[tuple[str, Any]]:
    """(place, row) for each line; the place ("file, line 3") is for error messages. Of a file that
    need not be `whole`, as a kill can leave half a line, the rows up to the first broken one."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            try:
                if line.strip():
                    row = json.loads(line)
                    json.dumps(row, ensure_ascii=False).encode()  # refuses a lone \ud800
                    yield place, row
            except (ValueError, RecursionError) as error:
                if whole:
                    raise UsageError(f"{place}: not JSON in UTF-8 ({error})") from error
                return print(f"{place}: cut off, left out from here on")


def read_rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of a local file or folder or of a hub data set; all but JSONL by `datasets`. Of
    several configurations (MATH has one a subject) all are read, but if one is called main or
    default, as GSM8K has it, that one alone: the others tell the same problems again."""
    path = local(source)
    if path.is_file() and path.suffix not in (".json", ".parquet", ".csv"):
        yield from read_jsonl(path)
        return
    import datasets

    with trying(f"{source} cannot be read"):
        kind, files = (path.suffix[1:], str(path)) if path.is_file() else (str(path), None)
        names = datasets.get_dataset_config_names(kind, data_files=files)
        names = [name for name in names if name in ("main", "default")] or names
        parts = [datasets.load_dataset(kind, name, data_files=files) for name in names]
    for splits in parts:
        name = split if split in splits else next(iter(splits))
        for number, row in enumerate(splits[name]):
            yield f"{source}, {name} row {number}", row


def to_problem(row: Any, index: int, place: str, config: Config) -> Problem:
    """A row in MATH's schema or a variant of it; no answer is ''. A UsageError has the place."""
    cells = row.items() if isinstance(row, dict) else ()
    texts = {name.lower(): str(cell) for name, cell in cells if isinstance(cell, str | int | float)}

    def first_of(columns: str) -> str:
        return next(filter(None, map(texts.get, columns.lower().split(","))), "")

    problem, answer = first_of(config.problem_column), first_of(config.answer_column)
    if not problem:
        raise UsageError(f"{place}: --problem-column {config.problem_column} is not in {[*texts]}")
    if re.search(r"####|\\boxed", answer) or answer == first_of("solution"):
        answer = extract_answer(answer) or ""
    level = next(map(int, re.findall(r"\d+", first_of("level"))), None)  # of "Level 5"
    return Problem(index, problem, answer, level, first_of("subject,type"))


@contextlib.contextmanager
def whole_or_not(path: Path) -> Iterator[Path]:
    """Where to write a file or folder that takes its place only when it is whole."""
    partial = path.with_name(path.name + ".partial")
    with trying(f"{path} cannot be written", RunError):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if path.is_dir():  # an earlier best/
            shutil.rmtree(path)
        partial.replace(path)


def write_rows(path: Path, rows: Iterable[Any], append: bool = False, indent: int = 0) -> None:
    """Write a JSON or JSONL file, whole or not at all, or append to it (in the first process)."""
    if is_first():
        place = contextlib.nullcontext(path) if append else whole_or_not(path)
        with place as target, target.open("a" if append else "w", encoding="utf-8") as file:
            for row in rows:
                text = json.dumps(row, ensure_ascii=False, indent=indent or None, default=vars)
                file.write(text + "\n")


def to_dialogue(row: dict[str, Any]) -> Dialogue:
    """The dialogue of a line of v_star.jsonl or eval_results.jsonl."""
    turns = [Turn(**turn) for turn in row["turns"]]
    return Dialogue(Problem(**row["problem"]), row["ids"], row["sample"], turns)


def save_model(policy: Policy, folder: Path) -> None:
    """An ordinary Hugging Face folder (with LoRA: of the adapters)."""
    dealt_out = isinstance(policy.model, FSDPModule)  # by fsdp; else the model has its own whole
    weights = dcp.get_model_state_dict(policy.model, options=WHOLE) if dealt_out else None
    if is_first():
        with whole_or_not(folder) as partial:
            policy.model.save_pretrained(partial, state_dict=weights)
            policy.tokenizer.save_pretrained(partial)


# --- C. The algebra of answers --------------------------------------------------------------------
# A text becomes tokens, each in one spelling. They are read by this grammar, and what is read is
# computed on the way; what the grammar does not know is words, which equal only themselves.
#
#   answer   = [label "="] item { ("," | ";" | "and" | "or") item };   "±" stands for two answers
#   item     = union [("=" | "<" | "≤" | ">" | "≥" | "≠" | "∈") union]       (also a < x < b)
#   union    = quantity { ("∪" | ":") quantity };       quantity = sum [unit]
#   sum      = product { ("+" | "-") product };         product = factor { ["·" | "/"] factor }
#   factor   = { "-" } atom ["^" atom]
#   atom     = number | name | π | e | i | ∞ | \frac atom atom | √ atom | function atom
#            | "(" sum ")" | "|" sum "|" | words | row | set | matrix
#   row, set = "(" item { "," item } ")", also with "[" or "]";     "\{" [item { "," item }] "\}"
#
# Values are computed at random points, seeded by both texts: that two different formulas agree at
# all of them is as good as impossible (Schwartz and Zippel); equations agree up to a factor. The
# numbers have over twice as many digits as the answers have characters: no 0.333... is 1/3. A label
# ('x = 5', 'm+n = 113', 'x > 1') or a unit may be missing on one side, two must be the same.
#
# Deliberately not, an honest False: tolerances (0.33 is not 1/3), unit conversion, (1, 2) for 1, 2,
# groups (x=1, y=2; x=3, y=4), unions that touch or stand for ≠, {x | x > 1}, ℝ \ {0}, prose, times,
# calculus, n!, binomials, sin^{-1}, bases, chains (x = 1+1 = 2), digits that repeat, a choice's
# letter, p√p for √p^3, \sqrt[3]{-8}, ||x|-1|, arrays, 2 m for 2 \text{ m}, what is beyond 10^40.

MAX_SIZE = 133  # numbers stay in 2^-133 .. 2^133 (10^40), or a small term could drown
MAX_STEPS = 2_000  # work for one comparison; a step is about ten microseconds
FAR = (1, 1, 1, 1, 100, 100, 10_000, 10_000)  # eight points: both signs of three variables
MP = mpmath.MPContext()  # our own, so that nobody else's precision changes,
LOCK = threading.RLock()  # for one thread at a time

INSIDE = r"(?:[^{}\\]|\\.|\{" * 8 + r"(?:[^{}\\]|\\.)*+" + r"\})*+" * 8  # braces within braces
OPEN = r"\\(?:boxed|fbox|framebox)\s*\{(?!\s*\})"  # a bare \boxed is prose, \boxed{} a prompt
BOX = rf"{OPEN}{INSIDE}\}}"
NAMED = r"(?:[a-zA-Z](?:_\w)?\s*=\s*)?"  # x_1 =
GAP = r"(?:[\s${}]|\\[()\[\] ,;]|\\quad|\\text)*+"  # between two boxes, beside 'or'
BOXES = re.compile(  # \boxed{5}, also $x=\boxed{2}$ or $x=\boxed{3}$; or torn
    rf"({BOX}(?:(?:{GAP}(?:,|and|or))+{GAP}{NAMED}{BOX})*)|{OPEN}(?s:.*)"
)
SIGN = r"\\(?:pm|cdot|times|div|neq?|[lg](?:eq?|t|n|og)|[dt]?frac|sqrt|pi|sin|cos|tan)(?![a-z])"
TIED = re.compile(  # what makes a box, □, a part of a formula: -□, 2□, □x, □ + 1
    rf"(?i)(?:(?<!\n)[-+/^_±]|(?<!answer)(?<![-=])[<>]|\}}\{{|{SIGN}|[$=] ?\d+ |not\b)[\s{{]*□"
    rf"|(?:[\d)]\}}?|(?<![\\a-z])[a-z]+)□|□\s*(?:[-+*/:]\s*(?:\d|[b-z]\b)|{SIGN})"
    r"|□\s*\^(?!\s*\{?\s*\\circ)|□(?:!\s*\$|[-+/(!_]?[0-9a-z]|[.,]\d)"
)


def final_box(text: str) -> str | None:
    r"""Return what the last box says, or several joined by 'or', 'and', ','; None without a box."""
    *_, last = None, *BOXES.finditer(text)
    if not last:
        return None
    before, after = text[: last.start()][-60:], text[last.end() :][:60]
    if not last[1] or TIED.search(f"{before}□{after}"):
        return ""
    if re.fullmatch(BOX, last[0]):
        return last[0].partition("{")[2][:-1].strip()
    return re.search(NAMED + "$", before)[0] + last[0]


def table(text: str) -> dict[str, str]:
    """Read 'new old old ¦ new old' as a dictionary from old to new; ␣ is a space."""
    rows = [[word.replace("␣", " ") for word in row.split()] for row in text.split("¦")]
    return {old: row[0] for row in rows for old in row}


# One spelling for each sign; what stands in the first row means nothing.
SPELLING = table(r"""␣ \left \right \big \Big \bigl \bigr \Bigl \Bigr \displaystyle \mathbf \mathsf
    \boldsymbol \bm \underline \! \, \; \: \> \␣ \quad \qquad \( \) \[ \] ~ $ ` " “ ” ‹ › \boxed
    \fbox ¦ · \cdot \times × ⋅ * ¦ - − – — ‑ ¦ / \div ÷ ¦ ^ ** ¦ ≤ \le \leq \leqslant <= ¦ < \lt
    ¦ ≥ \ge \geq \geqslant >= ¦ > \gt ¦ ≠ \ne \neq != ¦ ≈ \approx ¦ ± \pm ∓ \mp ¦ ∪ \cup ¦ ∈ \in
    ¦ ∞ \infty +\infty +∞ infinity ¦ -∞ -\infty −∞ ¦ π \pi pi ¦ \root␣2 \sqrt √ sqrt ¦ \log \lg lg
    ¦ ∅ \emptyset \varnothing ¦ (␣-∞␣,␣∞␣) ℝ \mathbbR ¦ | \vert \lvert \rvert \mid ¦ ^␣2 ² ¦ ^␣3 ³
    ¦ ¶ \\ ¦ , 、 ¦ . 。 ¦ … \ldots \dots ... ¦ \frac \dfrac \tfrac ¦ \frac␣1␣2 ½ ¦ \tan \tg tg
    ¦ ⟦ \beginpmatrix \beginbmatrix ¦ ⟧ \endpmatrix \endbmatrix ¦ "°" ° ^\circ ^° \circ ¦ "$" \$
    ¦ "%" % \% ¦ "¢" ¢ ¦ "€" € ¦ "£" £ ¦ \theta θ ¦ ∧ and ¦ ∨ or ¦ "yes" yes ¦ "no" no""")
NAMES = "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan exp ln"
FUNCTIONS = {"\\" + name: getattr(MP, name.replace("arc", "a")) for name in NAMES.split()}
FUNCTIONS |= {r"\log": MP.log10, r"\abs": abs}
SPELLING |= {name[1:]: name for name in FUNCTIONS}  # sin for \sin
UNITS = table("""% percent percentage pct ¦ ° degree deg ¦ C celsius ¦ F fahrenheit ¦ $ dollar
    ¦ ¢ cent ¦ € euro ¦ £ ¦ lb pound ¦ oz ounce ¦ g gram ¦ kg kilogram ¦ mm ¦ cm centimeter
    ¦ m meter ¦ km kilometer ¦ in inch inche ¦ ft foot feet ¦ yd yard ¦ mi mile ¦ acre ¦ mL ¦ L
    ¦ gallon ¦ s sec second ¦ min minute ¦ h hr hour ¦ day ¦ week ¦ month ¦ yr year ¦ rad radian
    ¦ unit ¦ way ¦ point ¦ people ¦ children ¦ student ¦ piece ¦ value ¦ boxe ¦ dog
    ¦ ^2 square_ sq_ ¦ ^3 cubic_ ¦ / per_""")
UNITS |= {word + "s": name for word, name in UNITS.items() if len(word) > 1}
REWRITES = [  # of the text,
    (r"[！-～]", lambda wide: chr(ord(wide[0]) - 0xFEE0)),  # （1，2）
    (r"(?a)(?<=\d)\s*(?:\{\s*,\s*\}|,\\!|\\[,; ])\s*(?=\d{3}(?![\d/]))", ""),  # 10{,}000
    # 31,250 is one number, (31,250) a pair
    (r"(?<![\d.,])([1-9]\d?\d?),(\d{3})(?:,(\d{3}))?(?!,?\d)(?!.*(?:(?<!\\)[)\]]|\\}))", r"\1\2\3"),
    (r"(frac|sqrt(?:\[\w*\])?)\s*(\d)", r"\1{\2}"),  # \frac12 takes one digit each
    (rf"(frac\s*(?:\{{{INSIDE}\}}|\\\w+))\s*(\d)", r"\1{\2}"),  # and so does \frac{1}2
    (r"(?a)(?<![\w.}])(\d+)\s+([1-9]\d*)/(\d+)", r"\1\\frac{\2}{\3}"),  # 57 5/6
    (r"\\(?:text)?color\s*\{\w+\}", ""),  # \color{red}{5}
    (r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|operatorname)\s*\{([^{}]*)\}", r"‹\1›"),
    (r"(?<![\\a-zA-Z])([a-zA-Z]+)\.?(?!\d)(?=[^‹›]*›)", r'"\1" '),  # \text{sq. cm} is "sq" "cm"
]
AFTERWARDS = [  # and of its tokens
    (r", ([∧∨])", r"\1"),  # 2, 3, and 4
    (r"\| ([^|]*[^-|+·/ ]) \|", r"\\abs ( \1 )"),  # |x|
    (r"^([^≈]*[\d}π]) ≈ [\d.]+$", r"\1"),  # \sqrt2 ≈ 1.41 is its exact side
    (r'(?<=") \^ (?:\{ )?([23])(?: \})?', r' "^\1"'),  # cm^{2}
    (r'(?<=["/]) ([/CFhs])(?= |$)', r' "\1"'),  # km/h
    ('" "', "_"),  # a unit of several words
    (r"\\root 2 \[ ([^]]+) \]", r"\\root { \1 }"),
    (r'^("[$€£]") ([\d.]+)', r"\2 \1"),  # $5
    (r'(\\(?:sin|cos|tan|cot|sec|csc) (?:[({] )?)([\d.]+) "°"', r"\1( \2 · π / 180 )"),
    (r"(?<!\S)(?<![\w.)}^] )(\d+) (\\frac \{ \d+ \} \{ \d+ \})", r"( \1 ⊕ \2 )"),  # 2\frac13
]
TOKEN = re.compile(  # ^{\circ}, \begin{pmatrix}, x_1; dates, 0.(3), dy/dx: unknown; 3e5; words
    r"""(?xa) [-+−]\s*(?:\\infty|∞) | \^\s*\{?\s*(?:\\circ|°)\s*\}?
    | \\(?:begin|end|mathbb)\s*(?:\{\w*\}|\w) | (?:\d+|[a-zA-Z]|\\theta)_(?:\{[^{}]*\}|\w)
    | \d{4}-\d\d-\d\d | \d*\.\d*\(\d | \\frac\{d[^{}]*\}\{d\ ?[a-z]
    | (?: \d+ (?:\.\d+)? | \.\d+ ) (?:[eE][+-]?\d{1,3}(?!\d))?
    | "? (?P<letters>[a-zA-Z]+(?!_)) "? | \\(?:[a-zA-Z]+|.) | [<>!]= | \*\* | \.\.\. | \S"""
)


def no_answer(gold: str) -> bool:
    """Say whether `gold` is a sentinel such as 'proof' or 'notfound', which nothing can equal."""
    bare = re.sub(r'\\text\w*|[\s$."*{}]', "", gold[:50].lower())
    return bare in ("", "proof", "notfound", "nan", "null") and len(gold) < 50


def as_text(answer: Any) -> str:
    """Return an answer as text; None is no text."""
    if isinstance(answer, bool) or not isinstance(answer, (str, Real, type(None))):
        raise TypeError(f"an answer is text or a number, not {type(answer).__name__}")
    return "" if answer is None else str(answer)


def normalize_answer(answer: str) -> str:
    """Return the tokens of `answer`, each in the one spelling that the grammar reads."""
    text, tokens = answer.strip("* \t\r\n"), []
    for pattern, new in REWRITES:
        text = re.sub(pattern, new, text)
    for match in TOKEN.finditer(text):
        token, letters, before = match[0], match["letters"], text[: match.start()][-1:]
        known = letters.lower() if letters else re.sub(r"(?<=..)[\s{}]|(?<=\^)\{", "", token)
        if not letters or known in SPELLING:
            tokens += SPELLING.get(known, known).split()
            continue
        low, quoted = letters.lower() if len(letters) > 2 else letters, token != letters
        near = before.isspace() and tokens and re.match(r'[\d."]', tokens[-1])
        word = len(letters) > 2 and {*low} & {*"aeiou"} and not before.isdigit()
        if letters.isupper() and len(letters) > 1:
            tokens.append(letters)  # AB is one name
        elif quoted or word or near and low in UNITS and len(low) > 1:  # 5 cm, not \frac13 ml
            tokens.append(f'"{low}"')
        else:
            tokens += letters  # xy is a product, and 2cm is 2·c·m
    text = " ".join(tokens).rstrip(" .,;:¶\\")
    for pattern, new in AFTERWARDS:
        text = re.sub(pattern, new, text)
    return text


class Node(NamedTuple):
    """What was read: a value (tag: its name, if any; parts: its numbers at all points, a constant's
    is one), words, a row (tag: its brackets and signs), a set, a list (tag: its signs), a relation
    (parts: its sides), or a label or unit (tag: which one) and what it stands at."""

    kind: str
    tag: str = ""
    parts: tuple[Any, ...] = ()


LEVELS = ["[,;∧∨&¶]", "[=<>≤≥≠∈]", "[∪:]", "[-+]", "[·/⊕]"]  # which signs join what
LIST, RELATION, UNION, SUM, PRODUCT = range(5)
TWO = {r"\frac": truediv, r"\root": lambda n, x: x ** (1 / n)}  # of two arguments
OPERATIONS = {"+": add, "-": sub, "·": mul, " ": mul, "/": truediv}
OPERATIONS["⊕"] = lambda n, q: n + q if q < 1 else None  # 2\frac13; 2\frac73 has two readings
CHEAP = {*OPERATIONS.values(), abs, neg, pos}
CLOSING = {"(": "[])]", "[": "[])]", "{": "}", "⟦": "⟧", r"\{": r"\\}"}
NAME = r"(?a)[a-zA-Z]|[A-Z]+|\w+_.*|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega)|π"
FACTOR = r"\(|\\?[^\W\d_].*"  # what follows without a sign: no number (1 2 and 1{2} are not 2)
LABEL = re.compile(  # f(x) =, (x,y) =, a_n =, |AB| =, "Area" =, m+n =; x = is for the grammar
    r"([fghpqA-Z] \( \w+(?: [|,] \w+)* \)|\( (?:x , y(?: , z)?|a , b|r , \\theta) \)|\w_[a-z]"
    r'|\\abs \( [A-Z]+ \)|\\angle [A-Z]+|"[a-z_]+"|(?:[a-df-hj-w] \+ )+[a-w]) = (?=[^=<>≤≥]+$)'
)


class Comparison:
    """Two answers, read and compared: it counts its steps and refuses what grows too large."""

    def __init__(self, a: str, b: str) -> None:
        self.steps, self.draw = 0, random.Random(ascii(a + b)).randint
        MP.prec = 600 + 7 * min(len(a + b), 2 * MAX_ANSWER)  # bits: sin(10^-40) is not 10^-40
        self.variables = {"π": (+MP.pi,), "e": (+MP.e,), "i": (MP.mpc(0, 1),)}

    def spend(self, steps: int) -> None:
        self.steps += min(steps, MAX_STEPS)  # what costs more is not begun
        if self.steps > MAX_STEPS:
            raise ValueError("too much work")

    def each(self, operation: Callable, *nodes: Node) -> Node:
        """Apply an operation to values, point by point; None is what is undefined or too large."""
        if any(node.kind != "value" for node in nodes):
            raise ValueError("no value")
        results, size = [], max(len(node.parts) for node in nodes)
        for xs in zip(*(node.parts * (size // len(node.parts)) for node in nodes)):
            cheap = operation in CHEAP or operation is pow and MP.isint(xs[1] or 0)
            self.spend(2 + (MP.prec // 1000) ** 2 if cheap else 11 + (MP.prec // 250) ** 2)
            results.append(None)
            try:
                x = operation(*xs) if operation is not pow or any(xs) else None  # 0^0 is no number
                parts = [0 if MP.mag(part) < 200 - MP.prec else part for part in (x.real, x.imag)]
            except (ArithmeticError, ValueError, TypeError, AttributeError):  # 1/0, or a None
                continue
            # What is left of a difference is nothing; a product that small is only out of reach.
            lost = x and not any(parts) and operation in (pos, mul, truediv, pow, MP.exp)
            if not lost and all(not part or abs(MP.mag(part)) <= MAX_SIZE for part in parts):
                results[-1] = MP.mpc(*parts) if parts[1] else MP.mpf(parts[0])
        return Node("value", "", tuple(results))

    def agree(self, a: Node, b: Node) -> bool:
        """Say whether two values are the same at all points where there are any."""
        differences = self.each(sub, a, b).parts
        known = [d for d in differences if d is not None]  # far away, numbers grow too large
        return len(known) >= min(2, len(differences)) and not any(known)

    def same(self, a: Node, b: Node) -> bool:
        """Compare structures piece by piece."""
        self.spend(1)
        for kind in ("label", "unit"):  # what one side has, the other need not have
            a, b = (b, a) if b.kind == kind else (a, b)
            if a.kind == b.kind == kind:
                return a.tag == b.tag and self.same(a.parts[0], b.parts[0])
            if a.kind == kind:  # x < 5 against 5, but also against 2x < 10
                return self.same(a.parts[-1 if b.kind == "relation" else 0], b)
        if a.kind == b.kind == "value":
            return self.agree(a, b)
        if (a.kind, a.tag, len(a.parts)) != (b.kind, b.tag, len(b.parts)):
            return False
        if a.kind == "set":
            return self.matched(a.parts, b.parts)
        if a.kind == "relation":  # equal up to a factor
            left, right = (self.each(sub, *node.parts) for node in (a, b))
            ratio = self.each(truediv, left, right)
            first = ratio.parts[0]
            if not first or len(left.parts) == 1 or a.tag in "<≤" and not first.real > 0:
                return False
            return self.agree(ratio, Node("value", "", (first,)))
        return all(map(self.same, a.parts, b.parts))

    def matched(self, a: tuple[Node, ...], b: tuple[Node, ...]) -> bool:
        """Pair off two collections: any order, if what is whose is clear."""
        tags, others = ({n.tag if n.kind in ("label", "unit") else "" for n in c} for c in (a, b))
        each_once = len(tags) == len(a) and tags == others and "" not in tags
        if not (each_once or len(tags) == len(others) == 1):  # x=1, y=2, x=3, y=4 or 3 hours, 20
            return False
        count = lambda x, nodes: sum(self.same(x, y) for y in nodes)
        return all(count(x, a) == count(x, b) > 0 for x in a)  # 1, 1, 2 is not 1, 2, 2

    def read_answer(self, text: str) -> Node:
        """Read normal text; what the grammar does not know is words."""
        if match := LABEL.match(text):
            return Node("label", match[1], (self.read_answer(text[match.end() :]),))
        if text.count("±") == 1 and "," not in text:
            return Node("set", "", tuple(self.read_answer(text.replace("±", s)) for s in "+-"))
        self.tokens = ["", *reversed(text.split())]
        with contextlib.suppress(ValueError, LookupError, RecursionError):
            node = self.read()
            if not self.tokens[-1]:
                return self.listed(node) if node.kind == "list" else node
        return Node("words", text)

    def sees(self, pattern: str) -> bool:
        return bool(re.fullmatch(pattern, self.tokens[-1]))

    def take(self, pattern: str) -> str:
        return self.tokens.pop() if self.sees(pattern) else ""

    def read(self, level: int = LIST) -> Node:
        """Read one level of the grammar: parts of the next level, between its signs."""
        read = self.factor if level == PRODUCT else lambda: self.read(level + 1)
        node, signs = read(), ""
        parts = [node]
        while sign := self.take(LEVELS[level]) or " " * (level == PRODUCT and self.sees(FACTOR)):
            signs += sign
            parts.append(read())
        if "/ " in signs:
            raise ValueError("1/2x has two readings")
        if signs and level == LIST:
            return Node("list", signs, tuple(parts))
        if signs and level == RELATION:
            return self.relation(tuple(parts), signs)
        if signs and level == UNION:
            return Node("row" if ":" in signs else "set", signs[0], tuple(parts))
        for sign, other in zip(signs, parts[1:]):
            node = self.each(OPERATIONS[sign], node, other)
        if level == SUM and (unit := self.take('".+"')):  # the KeyError makes words of others
            names = [UNITS[name] for name in re.findall(r'(?:square|sq|cubic|per)_|[^_"]+', unit)]
            return Node("unit", " ".join(names if "/" in names else sorted(names)), (node,))
        return node

    def listed(self, node: Node) -> Node:
        """Make a set of what ',' and 'or' separate."""
        first, either = node.parts[0], "∨" in node.tag
        alike = {part[:2] for part in node.parts} == {first[:2]}
        if not re.fullmatch("[,∧∨]+|;+" if alike else "[,∧]+|;+", node.tag):
            raise ValueError("x = 1 or y = 2 is a choice not made")
        if either and all(self.same(first, part) for part in node.parts):
            return first  # 1/2 or 0.5
        spans = either and first.kind == "label" and first.parts[0].kind == "row"
        return Node("set", "∪" if spans else "", node.parts)  # x < 1 or x > 2

    def relation(self, sides: tuple[Node, ...], signs: str) -> Node:
        """Make a label of what says all about one name, else an equation or an inequality."""
        if {*signs} <= {*">≥"} or signs == "=" and sides[1].tag in self.variables:
            sides, signs = sides[::-1], signs[::-1].translate(str.maketrans(">≥", "<≤"))
        relation = Node("relation", signs, sides)  # b > x > a is a < x < b, from here on
        if signs in ("<", "≤"):  # x < b is -∞ < x < b
            below = sides[0].tag in self.variables
            more = Node("words", "-∞" if below else "∞")
            sides, signs = ((more, *sides), "<" + signs) if below else ((*sides, more), signs + "<")
        if re.fullmatch("[<≤]{2}", signs):
            ends = "(["[signs[0] == "≤"] + ")]"[signs[1] == "≤"] + ","
            sides = sides[1], Node("row", ends, sides[::2])
        name, value = sides  # the ValueError of three makes words of it
        said = value.kind != "value" or signs == "=" and len(value.parts) == 1
        known = name.tag in self.variables and said
        return Node("label", name.tag, (value, relation)) if known else relation

    def factor(self, powers: bool = True) -> Node:
        """Read a factor; what stands in a power has none itself."""
        if sign := self.take("[-+]"):
            return self.each(neg if sign == "-" else pos, self.factor(powers))
        node = self.atom()
        if powers and self.take(r"\^"):
            return self.each(pow, node, self.factor(powers=False))
        return node

    def atom(self) -> Node:
        token = self.tokens.pop()
        self.spend(8)
        if token in CLOSING:
            return self.bracket(token)
        if token in FUNCTIONS:
            return self.call(token)
        if token in TWO:
            return self.each(TWO[token], self.factor(powers=False), self.factor(powers=False))
        if re.fullmatch('"..+"|-?∞|∅', token):
            return Node("words", token)
        if re.match(r"(?a)[\d.](?!\w*_)", token):
            return self.each(pos, Node("value", "", (MP.mpf(token),)))
        name = token.strip('"')
        if name in tuple("fgFGP") and self.tokens[-1] == "(" or not re.fullmatch(NAME, name):
            raise ValueError("no value, or f(2x), which is not 2 f(x)")
        if name not in self.variables:  # its random numbers: all signs; far: |x + 9| is not x + 9
            nth, draw = len(self.variables) - 3, self.draw
            self.variables[name] = tuple(
                (-1) ** (i >> nth if nth < 3 else draw(0, 1)) * far * MP.mpf(draw(999, 2999)) / 1717
                for i, far in enumerate(FAR)
            )
        return Node("value", name, self.variables[name])

    def bracket(self, opened: str) -> Node:
        """Read what stands in brackets: one value, a row, a set, a matrix."""
        node = self.read()
        tag = opened + self.take(CLOSING[opened]) + node.tag * (node.kind == "list")
        parts = node.parts if node.kind == "list" else (node,)
        if tag in ("()", "{}"):
            return node
        if re.fullmatch(r"\\{\\},*", tag):
            return Node("set", "", parts)
        if re.fullmatch(r"[([][])],+|⟦⟧[&¶]*", tag):
            return Node("row", tag, parts)
        raise ValueError("[5] and {1,2} may be many things, and (1,2 is torn")

    def call(self, name: str) -> Node:
        r"""Read \sin^2 3x or \log_2(8); a bare argument runs on while factors are juxtaposed."""
        base = [self.factor(powers=False)] if name == r"\log" and self.take("_") else []
        exponent = self.factor(powers=False) if self.take(r"\^") else Node("value", "", (1,))
        bracket = self.tokens[-1] in ("(", "{")
        x = self.atom() if bracket else self.factor()
        while not bracket and self.sees(FACTOR) and self.tokens[-1] not in FUNCTIONS:
            x = self.each(mul, x, self.factor())
        unclear = "(?!)" if name == r"\abs" else r"\^" if bracket else r"\^|/"
        if exponent.parts[0] not in range(1, 10) or self.sees(unclear):
            raise ValueError("sin^{-1} x, sin(x)^2 and sin x/2 have two readings")
        return self.each(pow, self.each(MP.log if base else FUNCTIONS[name], x, *base), exponent)


def same_meaning(predicted: str, gold: str) -> bool:
    """Say whether two texts mean the same; what is beyond the rules or the limits does not."""
    if predicted == gold or max(len(predicted), len(gold)) > MAX_ANSWER:
        return predicted == gold and not no_answer(gold)
    a, b = sorted((normalize_answer(predicted), normalize_answer(gold)))
    if no_answer(a) or no_answer(b):
        return False
    with LOCK, contextlib.suppress(ValueError, RecursionError):
        work = Comparison(a, b)
        return a == b or work.same(work.read_answer(a), work.read_answer(b))
    return False


def readable(gold: str) -> bool:
    """Say whether the checker can compare `gold` with more than its own text."""
    text = normalize_answer(gold[:MAX_ANSWER])
    with LOCK:
        node = Comparison(text, "").read_answer(text)
    return not no_answer(gold) and (node.kind != "words" or re.sub('["_ ]', "", node.tag).isalpha())


# --- D. The report --------------------------------------------------------------------------------


def show(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None else str(value) if type(value) is int else f"{value:.{digits}f}"


def report_stage_one(dialogues: Sequence[Dialogue], v_star: Baselines, told: set[str]) -> None:
    """What the reference can do: the distribution of Vhat, and how many problems can teach."""
    solved = shares_right(dialogues, 0)  # of N samples, for each problem
    values = [value for (_, role), value in v_star.items() if role == "solve"]
    counts, tenths = np.histogram(np.clip(values, 0, 1), bins=10, range=(0, 1))
    print(f"V* of {len(solved)} problems, solve role, mean {show(mean(values), 2)}:")
    for low, count in zip(tenths, counts):
        bar = "#" * math.ceil(50 * count / max(counts))
        print(f"  {low:.1f} to {low + 0.1:.1f} {count:>6} {bar}".rstrip())
    never, always, n = np.mean(solved == 0), np.mean(solved == 1), len(dialogues) // len(solved)
    print(f"  never solved {never:.0%}, always solved {always:.0%}: little to learn there")
    print(f"  pass@{n} of the reference {1 - never:.2f}: about what training can reach")
    diagnose([statistics(dialogues) | {"never_solved": never}], told)


def report_training(summary: dict[str, Any], base: list[Dialogue], new: list[Dialogue]) -> None:
    """The table of before and after, and the first problem that the base got wrong."""
    before, after = summary["before"] | {"kl": 0.0}, summary["after"] | {"kl": summary["kl"]}
    print(f"\n{before['n']} held-out problems, greedy{'before':>19}{'after':>9}")
    for title, name, digits in (
        ("accuracy, first attempt (acc@t1)", "acc_t1", 3),
        ("accuracy, final answer (acc@final)", "acc_final", 3),
        ("verifier, own attempts (balanced)", "verifier_balanced_acc", 3),
        ("verifier, fixed pool (balanced)", "verifier_pool_balanced_acc", 3),
        ("response length (tokens a turn)", "response_tokens", 1),
        ("KL to the reference (nats a turn)", "kl", 3),
    ):
        print(f"  {title:<42}{show(before[name], digits):>8} {show(after[name], digits):>8}")
    print(f"  revisions after training: {after['fixed']} mended, {after['broken']} broken")
    mistakes = (pair for pair in zip(base, new) if not pair[0].attempts[-1].correct)
    first_of_all = "\nThe first held-out problem that the base got wrong, before training:"
    for title, dialogue in zip((first_of_all, "and after:"), next(mistakes, ())):
        print(title)
        print_dialogue(dialogue)


def report_evaluation(summary: dict[str, Any]) -> None:
    """The evaluation as a table of accuracies with their intervals, then everything else."""
    print(f"\n{'':<24}{'n':>6}   {'acc@t1 [95 % interval]':<24}acc@final [95 %]")
    row = "{:<24.24}{n:>6}   {acc_t1:.3f} [{acc_t1_ci[0]:.3f}, {acc_t1_ci[1]:.3f}]    "
    row += "{acc_final:.3f} [{acc_final_ci[0]:.3f}, {acc_final_ci[1]:.3f}]"
    for title, group in {"all problems": summary, **summary["groups"]}.items():
        print(row.format(title, **group))
    print()
    for name, value in summary.items():
        if name not in ("n", *ACCURACIES) and not isinstance(value, dict | list):
            print(f"  {name:<32}{show(value):>10}")
    if found := summary.get("compare"):
        print(f"\ncompared with {found['with']}:")
        row = "  {:<10}{difference:+.3f} [{ci[0]:+.3f}, {ci[1]:+.3f}], "
        row += "problems better {better}, worse {worse}, p = {p:.1g}"
        for name in ACCURACIES:
            print(row.format(name, **found[name]))


def print_dialogue(dialogue: Dialogue) -> None:
    """A dialogue as a person would write it down."""
    said = [("problem", dialogue.problem.problem)]
    said += [(t.role, t.text.strip() + " [cut off]" * (not t.ended)) for t in dialogue.turns]
    for speaker, text in said:
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 68)]
        print(f"  {speaker:<8} " + ("\n" + " " * 11).join(lines))
    if gold := dialogue.problem.answer:
        verdict = "right" if dialogue.attempts[-1].correct else f"wrong, it is {gold}"
        print(f"           ({verdict})")


# --- E. The numbers, and how sure they are --------------------------------------------------------
# 500 problems are a sample: "0.94" may be 0.92 or 0.96, and "better by 0.01" may be luck. So an
# accuracy comes with a 95 % interval, and two models are compared on the same problems: only those
# that one of them solved and the other did not say which is better. With --samples K the K attempts
# at a problem can vote: by plain majority (*self-consistency*), or PAG's way, where only attempts
# that the model's own check accepted have a vote. If checking is worth anything, that vote wins.

ACCURACIES = {"acc_t1": 0, "acc_final": -1}  # at both ends of a dialogue: of which attempt?


def mean(values: Iterable[float]) -> float | None:
    """The mean, or None where there is nothing to average: 'none' is not 'zero'."""
    values = list(values)
    return sum(values) / len(values) if values else None


def statistics(dialogues: Sequence[Dialogue]) -> dict[str, float | None]:
    """What there is to say about some dialogues; a training batch and an evaluation share it."""
    turns = [turn for d in dialogues for turn in d.turns]
    judged = [(a.correct, c.verdict) for d in dialogues for a, c in zip(d.attempts, d.checks)]
    revised = [pair for d in dialogues for pair in itertools.pairwise(d.attempts)]
    right = mean(verdict is True for correct, verdict in judged if correct)  # None is a miss
    wrong = mean(verdict is False for correct, verdict in judged if not correct)
    return {
        **{name: mean(d.attempts[k].correct for d in dialogues) for name, k in ACCURACIES.items()},
        "verifier_balanced_acc": None if None in (right, wrong) else (right + wrong) / 2,
        "verifier_recall_right": right,
        "verifier_recall_wrong": wrong,
        "revision_rate": mean(len(d.attempts) > 1 for d in dialogues),
        "answer_change_ratio": mean(not is_equiv(b.answer, a.answer) for a, b in revised),
        "fixed": sum(not a.correct and b.correct for a, b in revised),
        "broken": sum(a.correct and not b.correct for a, b in revised),
        "response_tokens": mean(turn.end - turn.start for turn in turns),
        "no_answer_rate": mean(turn.answer is None for d in dialogues for turn in d.attempts),
        "truncated_rate": mean(not turn.ended for turn in turns),
        **{f"reward_{r}": mean(turn.reward for turn in turns if turn.role == r) for r in ROLES},
    }


def shares_right(dialogues: Sequence[Dialogue], attempt: int) -> np.ndarray:
    """The share of right ones among each problem's dialogues, which follow one another: (n,)."""
    right = np.array([d.attempts[attempt].correct for d in dialogues])
    return right.reshape(len({d.problem.index for d in dialogues}), -1).mean(axis=1)


def wilson(values: np.ndarray) -> list[float]:
    """95 % interval of the mean of some shares (Wilson 1927): unlike mean +- 2 s it is right near 0
    and 1. Shares in between spread less than zeros and ones do, and count for more of them."""
    p, variance = values.mean().item(), values.var().item()
    n = len(values) * (p * (1 - p) / variance if len(set(values)) > 1 else 1)
    z = 1.959964  # the normal distribution has 95 % within +- z
    centre, spread = n * p + z * z / 2, z * math.sqrt(n * p * (1 - p) + z * z / 4)
    return [(centre - spread) / (n + z * z), (centre + spread) / (n + z * z)]


def summarize(dialogues: Sequence[Dialogue], k: int) -> dict[str, Any]:
    """What an evaluation with k dialogues a problem says: of all, of each level and subject."""
    groups = defaultdict(list)
    for d in dialogues:
        for title in {"all", f"level {d.problem.level}", d.problem.subject}:
            groups[title].append(d)
    found = {}
    for title, group in sorted(groups.items()):
        intervals = {f"{a}_ci": wilson(shares_right(group, i)) for a, i in ACCURACIES.items()}
        found[title] = {"n": len(group) // k, **statistics(group), **intervals}
    return found.pop("all") | (voting(dialogues, k) if k > 1 else {}) | {"groups": found}


def paired(first: Sequence[Dialogue], second: Sequence[Dialogue]) -> dict[str, Any]:
    """How much better the first model is on the same problems, with an interval; on how many it is
    better and worse; McNemar's exact p: how often a coin would split these at least as unevenly."""
    found = {}
    for name, attempt in ACCURACIES.items():
        gain = shares_right(first, attempt) - shares_right(second, attempt)
        better, worse = np.sum(gain > 0).item(), np.sum(gain < 0).item()
        n, fewer = better + worse, min(better, worse)
        p = min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)
        middle, side = gain.mean().item(), 1.96 * gain.std().item() / math.sqrt(len(gain))
        split = {"better": better, "worse": worse, "p": p}
        found[name] = {"difference": middle, "ci": [middle - side, middle + side], **split}
    return found


def majority(answers: Iterable[str | None]) -> str | None:
    """The commonest answer, where 1/2 and 0.5 are one; the earliest of several; None is no vote."""
    votes = [answer for answer in answers if answer is not None]
    return max(votes, key=lambda a: sum(is_equiv(a, vote) for vote in votes), default=None)


def voting(dialogues: Sequence[Dialogue], n: int) -> dict[str, float]:
    """Of n dialogues about each problem: pass@k, the chance that k of their first attempts hold a
    right one (Chen et al. 2021), maj@n, and pag@n (where no check accepted anything, all vote)."""
    seen = defaultdict(list)
    for start in range(0, len(dialogues), n):
        group = dialogues[start : start + n]
        wrong = sum(not dialogue.attempts[0].correct for dialogue in group)
        for k in sorted({2**i for i in range(n.bit_length())} | {n}):
            seen[f"pass@{k}"].append(1 - math.comb(wrong, k) / math.comb(n, k))
        judged = [pair for d in group for pair in zip(d.attempts, d.checks)]
        plain = majority(dialogue.attempts[0].answer for dialogue in group)
        accepted = majority(attempt.answer for attempt, check in judged if check.verdict)
        for name, vote in (("maj", plain), ("pag", accepted or plain)):
            seen[f"{name}@{n}"].append(is_equiv(vote, group[0].problem.answer))
    return {name: mean(values) for name, values in seen.items()}


def evaluate_pool(policy: Policy, config: Config) -> dict[str, float | None]:
    """How the verify turn judges the attempts.jsonl beside the evaluation data; None without."""
    path = local(config.eval_data).parent / "attempts.jsonl"
    pool = read_jsonl(path) if config.revisions and path.is_file() else ()
    attempts = []
    for place, row in itertools.islice(pool, config.eval_limit or None):
        with trying(f"{place}: not an attempt of the pool"):
            problem = Problem(-1, row["problem"], row["answer"])
            ids = policy.prompt_ids(problem) + encode(policy.tokenizer, row["attempt"])
            turn = Turn("solve", 0, 0, row["attempt"], ended=False, correct=row["correct"])
        attempts.append(Dialogue(problem, ids, turns=[turn]))  # somebody's ids: never scored
    half = config.rollout_tokens // 2  # to read whole attempts takes more memory than to write
    greedy = dataclasses.replace(config, temperature=0.0, rollout_tokens=half)
    seen = statistics(rollout(policy, attempts, greedy, -1, turns=2)).items()
    return {n.replace("_", "_pool_", 1): x for n, x in seen if n.startswith("verifier_")}


# --- F. Watching a run: numbers, pictures, diagnosis ----------------------------------------------

Metrics = list[dict[str, Any]]  # the lines of metrics.jsonl
# Okabe and Ito's colours: people with any kind of colour vision can tell them apart.
COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00")
PANELS = (  # title, y axis, metrics
    ("Loss", "squared error (reward²)", ["loss"]),
    ("Rewards", "mean reward", ["acc_final", "reward_solve", "reward_verify", "reward_revise"]),
    ("Verifier: what it recognises", "share", ["verifier_recall_right", "verifier_recall_wrong"]),
    ("Revisions", "share", ["revision_rate", "answer_change_ratio"]),
    ("Length and KL", "tokens a turn (blue)", ["response_tokens"]),
)
IDLE = ("seed", "out", "v_star", "eval_limit", "eval_every", "threads", "device")


def load_runs(folders: Sequence[Path]) -> tuple[dict[str, list[Metrics]], dict[str, list[float]]]:
    """The metrics of each group of runs (which differ only in what is IDLE, as the seed), by what
    makes it unlike the others, and Vhat by level."""
    runs = {folder: read_config(folder / "config.json") for folder in folders}
    shared = set.intersection(*(set(vars(config).items()) for config in runs.values()))
    groups, v_star = defaultdict(list), defaultdict(list)
    for folder, config in runs.items():
        own = [item for item in vars(config).items() if item not in shared and item[0] not in IDLE]
        group = ", ".join(f"{name} {value}" for name, value in own)
        groups[group].append(read_lines(folder / "metrics.jsonl"))
        dialogues = [to_dialogue(row) for row in read_lines(folder / "v_star.jsonl")[1:]]
        values = baselines(dialogues, config)
        for problem in {dialogue.problem for dialogue in dialogues}:
            v_star[str(problem.level)].append(np.clip(values[problem.index, "solve"], 0, 1))
    return groups, dict(sorted(v_star.items()))


def draw_curves(axis: Any, groups: dict[str, list[Metrics]], metric: str, colour: str) -> None:
    """A metric of each group of runs: raw points, the smoothed mean, the band of its seeds."""
    import pandas

    for style, runs in zip(itertools.cycle(("-", "--", ":", "-.")), groups.values()):
        curves = [{m["step"]: m.get(metric) for m in run} for run in runs]
        raw = pandas.concat([pandas.Series(curve, dtype=float) for curve in curves], axis=1)
        smooth = raw.rolling(max(1, len(raw) // 20) * 2 + 1, min_periods=1, center=True).mean()
        axis.plot(raw, ".", color=colour, alpha=0.3 / len(runs), zorder=1)
        label = metric if style == "-" else "_"  # the colours are explained once
        axis.plot(smooth.mean(axis=1), style, color=colour, lw=2.5, label=label)
        band = smooth.min(axis=1), smooth.max(axis=1)
        axis.fill_between(raw.index, *band, color=colour, alpha=0.2, lw=0)


def plot(folders: Sequence[Path], out: Path) -> None:
    """Draw the dashboard of some runs into one picture. Raises ImportError without matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    groups, v_star = load_runs(folders)
    with matplotlib.rc_context({"font.size": 15, "legend.fontsize": 11, "lines.markersize": 5}):
        figure = Figure(figsize=(13.5, 8.4), layout="constrained")
        axes = figure.subplots(2, 3).flat
        axes[3].axhspan(-0.03, 0.1, color="0.85", label="collapse zone")
        for axis, (title, unit, metrics) in zip(axes, PANELS):
            for colour, metric in zip(COLOURS, metrics):
                draw_curves(axis, groups, metric, colour)
            limits = (-0.03, 1.03) if unit == "share" else None
            axis.set(title=title, xlabel="update", ylabel=unit, ylim=limits)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            if len(metrics) > 1:  # below, where it hides nothing
                axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
        second = axes[4].twinx()
        draw_curves(second, groups, "kl", COLOURS[3])
        second.set_ylabel("KL to the reference\n(nats a turn, red)")
        if v_star:  # else there was no stage 1
            shades = matplotlib.colormaps["cividis"](np.linspace(0.95, 0.1, len(v_star)))
            levels = {"color": shades, "label": [*v_star], "stacked": True}
            axes[5].hist([*v_star.values()], range=(0, 1), **levels)
            axes[5].legend(title="level")
        axes[5].set(title="V* (stage 1, solve)", xlabel="V* (reward)", ylabel="problems")
        if len(groups) > 1:
            lines = [line for line in axes[0].lines if line.get_linestyle() != "None"]
            figure.legend(lines, [name[:140] for name in groups], loc="outside lower center")
        figure.savefig(out)


WINDOW = 5  # training batches that are looked at together
SYMPTOMS = {  # why is nothing learned? a number, the limit that it is above, and the remedy
    "truncated_rate": (0.5, "responses are cut off before an answer comes; raise --max-new-tokens"),
    "no_answer_rate": (0.5, "attempts hold no answer; read some with 'solve', try another --model"),
    "never_solved": (0.9, "no sample to learn from; take easier problems or a stronger --model"),
    "skipped": (0, "loss or gradient is not finite; lower --lr or use --dtype float32"),
    "kl_per_token": (1, "the policy is running away; lower --lr or raise --beta2"),
    "verifier_bias": (0.95, "it says one thing only; take problems solved about half the time"),
}


def diagnose(batches: Metrics, told: set[str]) -> None:
    """Name each symptom of some batches, once. RunError if no update is possible any more."""
    means = {name: mean(m[name] for m in batches if m[name] is not None) for name in batches[0]}
    f = defaultdict(lambda: math.nan, {name: m for name, m in means.items() if m is not None})
    f["kl_per_token"] = f["kl"] / max(f["response_tokens"], 1)
    f["verifier_bias"] = abs(f["verifier_recall_right"] - f["verifier_recall_wrong"])
    for name, (limit, remedy) in SYMPTOMS.items():
        if f[name] > limit and name not in told:  # nan is above no limit
            told.add(name)
            tqdm.write(f"! {name} is {f[name]:.2f}: {remedy}")
    if f["skipped"] == 1:
        raise RunError(f"no finite loss and gradient in {WINDOW} steps running: the run stops")


# --- G. Runs that survive -------------------------------------------------------------------------
# A long run is killed some day, and goes on as if nothing had happened. Its random numbers are a
# pure function of what they are for (section 6), so the weights, AdamW's moments and the metrics so
# far are all that stage 2 needs: state.pt has them, every --save-every steps. Stage 1's dialogues
# are kept in parts, in v_star.jsonl. Of several processes all read, but only the first one writes.


class Run(contextlib.AbstractContextManager):
    """The folder of a training run: what happens is written there, and read back by --resume."""

    def __init__(self, config: Config, resume: bool) -> None:
        self.config = check_options(config, "train")
        self.folder = Path(config.out) if resume else new_folder(config.out)
        self.stage_one = self.folder / "v_star.jsonl"
        self.metrics: Metrics = []  # of the steps so far
        self.evaluations: Metrics = []  # of --eval-every
        self.seconds: dict[str, float] = {}
        self.told: set[str] = set()  # the complaints so far: each comes once
        self.learner: Learner | None = None
        self.lock = FileLock(self.folder / "lock")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After Ctrl-C or an error, keep the model as it is (one of several processes cannot)."""
        if kind and self.learner and world()[1] == 1:
            save_model(self.learner.policy, self.folder / "checkpoint")
        self.lock.release()
        if kind is KeyboardInterrupt and (self.folder / "config.json").exists():
            raise RunError(f"stopped; go on with 'train --resume {self.folder}'") from None

    def begin(self, policy: Policy, problems: list[Problem]) -> None:
        """Write config.json, and v_star.jsonl as far as it is known. Raises UsageError if what is
        known of stage 1 is of another model or of other problems."""
        # What stage 1's samples depend on: not the seed (any sample of the reference will do), nor
        # LoRA's adapters (they start as nothing).
        config, named = self.config, sorted(policy.model.state_dict().items())
        weights = [torch.hash_tensor(t).item() for name, t in named if "lora_" not in name]
        sizes = (config.num_samples, config.temperature, config.revisions, config.max_new_tokens)
        words = (SOLVE_PROMPT, VERIFY_PROMPT, REVISE_PROMPT, policy.tokenizer.chat_template)
        made_from = json.dumps([5, weights, sizes, problems, words], default=vars)  # 5: the version
        self.mark = {"fingerprint": hashlib.sha256(made_from.encode()).hexdigest()[:16]}
        path = self.stage_one if self.stage_one.exists() else Path(config.v_star)
        lines = read_lines(path) if config.v_star or path.is_file() else [self.mark]
        if lines[:1] != [self.mark]:
            made = "with other weights, problems, sampling options or by another version"
            raise UsageError(f"{path} is missing or was made {made}: begin a run without it")
        self.played, part = [to_dialogue(line) for line in lines[1:]], PART * world()[1]
        if len(self.played) < len(problems) * config.num_samples:
            # A part is played together, and rounding depends on the company: only whole ones count.
            del self.played[len(self.played) // part * part :]
        for dialogue in self.played:
            dialogue.pay(config)
        if is_first():  # two of us must not go on with one run; a dead one lets go
            with trying(f"the run in {self.folder} is still going on"):
                self.lock.acquire(timeout=0)
        write_rows(self.folder / "config.json", [config], indent=2)
        write_rows(self.stage_one, [self.mark, *self.played])

    def after_stage_one(self, dialogues: Sequence[Dialogue], v_star: Baselines) -> list[Problem]:
        """Say what stage 1 found. Returns the problems to train on."""
        if dialogues:  # not with --num-samples 0
            report_stage_one(dialogues, v_star, self.told)
        everything = not self.config.drop_unsolved
        kept = dict.fromkeys(d.problem for d in dialogues if everything or d.turns[0].correct)
        if dialogues and not kept:
            raise RunError("stage 1 solved no problem: --drop-unsolved leaves nothing to train on")
        return list(kept)

    def steps(self, learner: Learner) -> Iterator[int]:
        """The steps that are still to be done; the learner is brought back to where they begin."""
        path = self.folder / "state.pt"
        if path.exists():
            with trying(f"{path} is damaged (remove it, and --resume begins stage 2 again)"):
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                self.metrics, self.evaluations = state["metrics"], state["evaluations"]
            print(f"going on after step {len(self.metrics)}")
            policy, learned = learner.policy, state["learned"]
            with policy.active():  # LoRA: adapters that are switched off count as frozen
                dcp.set_state_dict(policy.model, learner.optimizer, **learned, options=WHOLE)
            if state["scaler"]:  # else it was no float16 run so far
                policy.scaler.load_state_dict(state["scaler"])
        write_rows(self.folder / "metrics.jsonl", self.metrics)  # what came later is done again
        self.learner = learner  # from here on an error keeps its model
        with progress("stage 2", self.config.steps, len(self.metrics)) as self.bar:
            yield from range(len(self.metrics), self.config.steps)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Note how many seconds the block takes."""
        started = time.perf_counter()
        yield
        self.seconds[f"seconds_{what}"] = time.perf_counter() - started

    def tell(self, dialogues: Sequence[Dialogue], updates: Sequence[dict[str, float]]) -> None:
        """A step's line of metrics.jsonl: means over its finite updates, its dialogues, its costs.
        It moves the bar; where there is no terminal, a line is printed now and then."""
        step, steps = len(self.metrics) + 1, self.config.steps
        means = {n: mean(u[n] for u in updates if math.isfinite(u[n])) for n in updates[0]}
        metrics = {"step": step, **means, **statistics(dialogues), **self.seconds}
        sampled = sum(turn.end - turn.start for d in dialogues for turn in d.turns)
        metrics["tokens_per_second"] = sampled / sum(self.seconds.values())
        gpu = self.learner.policy.device.index  # where there is none, the peak is 0
        metrics["peak_memory_mib"] = torch.cuda.max_memory_allocated(gpu) / 2**20 or None
        self.metrics.append(metrics)
        write_rows(self.folder / "metrics.jsonl", [metrics], append=True)
        numbers = " ".join(f"{name} {show(metrics[key], 2)}" for key, name in SHOWN.items())
        self.bar.set_postfix_str(numbers, refresh=False)
        self.bar.update()
        if self.bar.disable and step * 10 // steps > (step - 1) * 10 // steps:
            print(f"stage 2 {step}/{steps}  {numbers}", flush=True)
        if step >= WINDOW:  # earlier it is too early to say
            diagnose(self.metrics[-WINDOW:], self.told)

    def check_in(self, measure: Callable[[], Evaluation]) -> None:
        """--eval-every: a line of eval.jsonl, and in best/ the model of the best acc_final so far.
        --save-every: state.pt, all that --resume needs in one file."""
        step, config = len(self.metrics), self.config
        if config.eval_every and step % config.eval_every == 0:
            summary = {"step": step, **measure()[0]}
            t1, final = summary["acc_t1"], summary["acc_final"]
            tqdm.write(f"after step {step}: acc_t1 {t1:.3f}, acc_final {final:.3f}")
            if all(final > earlier["acc_final"] for earlier in self.evaluations):
                save_model(self.learner.policy, self.folder / "best")
            self.evaluations.append(summary)
            write_rows(self.folder / "eval.jsonl", self.evaluations)
        if step == config.steps or (config.save_every and step % config.save_every == 0):
            policy, optimizer = self.learner.policy, self.learner.optimizer
            weights, moments = dcp.get_state_dict(policy.model, optimizer, options=WHOLE)
            learned = {"model_state_dict": weights, "optim_state_dict": moments}
            state = {"learned": learned, "scaler": policy.scaler.state_dict()}
            state |= {"metrics": self.metrics, "evaluations": self.evaluations}
            if is_first():
                with whole_or_not(self.folder / "state.pt") as partial, partial.open("wb") as file:
                    torch.save(state, file)

    def finish(self, before: Evaluation, measure: Callable[[], Evaluation]) -> dict[str, Any]:
        """Save the model, evaluate it, report. Returns the summary."""
        save_model(self.learner.policy, self.folder / "checkpoint")
        after, dialogues = measure()
        kl = mean(m["kl"] for m in self.metrics[-WINDOW:] if m["kl"] is not None)
        summary = {"before": before[0], "after": after, "kl": kl or 0.0}
        write_rows(self.folder / "eval_results.jsonl", dialogues)
        write_rows(self.folder / "summary.json", [summary], indent=2)
        report_training(summary, before[1], dialogues)
        with contextlib.suppress(ImportError):  # matplotlib may not be there
            if is_first():
                plot([self.folder], self.folder / "dashboard.png")
        print(f"\nwritten to {self.folder}: checkpoint/, metrics.jsonl, summary.json, ...")
        return summary


def new_folder(path: str, suffix: str = "") -> Path:
    """Where results can go: a folder that is new or empty. Raises UsageError."""
    folder = Path(path or time.strftime("runs/%Y%m%d-%H%M%S") + suffix)
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UsageError(f"--out {folder} cannot be written: {above} is no folder or not yours")
    early = {"config.json.partial", "lock"}  # all that a run leaves which is killed at once
    if above == folder and {file.name for file in folder.iterdir()} - early:
        raise UsageError(f"--out {folder} holds files already: name a new folder, or --resume it")
    return collect([folder], world()[1])[0]  # of several processes the first one names it


def read_config(path: Path) -> Config:
    """The options in a run's config.json. Raises UsageError."""
    with trying(f"{path} is not the config.json of a run"):
        config = Config(**json.loads(path.read_text(encoding="utf-8")))
        for item in dataclasses.fields(config):
            if type(value := getattr(config, item.name)) not in TYPES[item.type]:
                raise TypeError(f"'{item.name}' is {value!r}")
    return config


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file of a run, which a kill may have cut off; none if there is none."""
    return [row for _, row in read_jsonl(path, whole=False)] if path.is_file() else []


# --- H. Large models, several devices -------------------------------------------------------------
# LoRA (Hu et al. 2021) learns small matrices beside frozen weights, which can then be half as wide;
# the reference is the same weights without them. `torchrun --nproc_per_node=8 astarpo.py train`
# starts eight of us: each plays its share of the dialogues, all exchange them, each scores its
# share, and the gradients are summed. fsdp (PyTorch's FSDP2) deals out weights, gradients and
# moments in slices, which come together layer by layer where they are needed, but as a whole while
# sampling, where every process goes at its own pace.

WHOLE = dcp.StateDictOptions(
    full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False
)
PART = 512  # dialogues that each process plays before they are kept and the progress bar moves


def add_adapters(policy: Policy, rank: int, seed: int) -> None:
    """LoRA beside every linear layer but the head: only these float32 matrices learn."""
    from peft import LoraConfig

    if hasattr(policy.model, "had_adapters"):  # they would be saved as if beside its base
        raise UsageError("--lora goes not with a LoRA checkpoint as --model: start from its base")
    torch.manual_seed(seed)
    kind = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    policy.model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, **kind))
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    policy.adapters = True


class Cache(DynamicCache):
    """Under autocast, rotated keys come in float32, though they are multiplied in half precision;
    kept like that, they and the values beside them would take twice the memory."""

    def update(self, keys: Tensor, values: Tensor, *place: Any, **more: Any) -> Any:
        """Add those of the next tokens."""
        return super().update(keys.to(values.dtype), values, *place, **more)


def blocks(model: Any) -> list[Any]:
    """The layers of a transformer, whatever the architecture calls them."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def recomputed(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """--gradient-checkpointing: a layer's activations are computed again in the backward pass.
    (transformers does so in training mode only, which wakes dropout.)"""
    if torch.is_grad_enabled():
        forward = functools.partial(checkpoint, forward, use_reentrant=False)
    return forward(*inputs, **named)


def world() -> tuple[int, int]:
    """Which process is this, and how many are there?"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first() -> bool:
    """Is this the process that prints and writes?"""
    return world()[0] == 0


def join_processes(device: str) -> None:
    """Under torchrun: meet the other processes. Only the first one prints."""
    if not {"RANK", "LOCAL_RANK"} <= os.environ.keys():
        return
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(hours=2))
    if not is_first():
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
    return [parts[i % len(parts)][i // len(parts)] for i in range(n)]


def rollouts(
    policy: Policy, dialogues: Sequence[Dialogue], config: Config, step: int, label: str
) -> Iterator[list[Dialogue]]:
    """`rollout` in parts, behind a progress bar."""
    size = PART * world()[1]
    with progress(label, len(dialogues)) as bar:
        for start in range(0, len(dialogues), size):
            part = rollout(policy, dialogues[start : start + size], config, step)
            bar.update(len(part))
            yield part


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches of similar length, each of at most `budget` tokens with its padding, but
    of at least one index: lengths 5, 1, 4, 2 and a budget of 8 give [1, 3], [2], [0]."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[i] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


@torch.no_grad()
def think(
    policy: Policy, texts: list[list[int]], config: Config, keep: Callable[[int, Tensor], Tensor]
) -> list[Tensor]:
    """What keep(i, states) makes of the hidden states (T, width) after each token of text i. (To
    read whole texts at once takes more memory a token than sampling does: a smaller budget.)"""
    kept: dict[int, Tensor] = {}
    with gathered(policy.model):
        for batch in token_batches([len(text) for text in texts], config.rollout_tokens // 4):
            ids = pad_sequence([torch.tensor(texts[i]) for i in batch], batch_first=True)
            with policy.active():  # but `keep` computes in float32
                states = policy.model.get_decoder()(ids.to(policy.device), use_cache=False)[0]
            kept |= {i: keep(i, s[: len(texts[i])].float()) for i, s in zip(batch, states)}
    return [kept[i] for i in range(len(texts))]


def my_share(dialogues: Sequence[Dialogue], budget: int) -> list[tuple[Sequence[Dialogue], float]]:
    """The micro-batches of this process, with their weights. All processes have as many: a slice of
    fsdp's waits for the others in each pass, so who has fewer adds passes that weigh nothing."""
    batches = token_batches([len(dialogue.ids) for dialogue in dialogues], budget)
    mine = [([dialogues[i] for i in batch], 1.0) for batch in deal(batches)]
    return mine + [(dialogues[:1], 0.0)] * (math.ceil(len(batches) / world()[1]) - len(mine))


def deal_out(policy: Policy, ref: Policy, config: Config) -> None:
    """--parallel fsdp: deal out the weights of policy and reference."""
    if world()[1] == 1 or config.parallel != "fsdp":
        return
    mesh = dist.init_device_mesh(policy.device.type, (world()[1],))
    for model in (policy.model, ref.model):
        for part in (*blocks(model), model):  # the last: the rest, with the (often tied) embeddings
            fully_shard(part, mesh=mesh)
        model.score_tokens = functools.partial(score_tokens, model)
        register_fsdp_forward_method(model, "score_tokens")
        with torch.no_grad():  # fsdp wants the first pass to be that of the whole, not of a layer
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=policy.device))


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
    size = world()[1]
    for gradient in [p.grad for p in model.parameters() if size > 1 and p.grad is not None]:
        if isinstance(model, FSDPModule):
            gradient *= size  # fsdp has summed already, and divided
        else:
            dist.all_reduce(gradient)
    everyone = collect([seen], size)
    return {name: sum(theirs[name] for theirs in everyone) for name in seen}


# --- I. The command line --------------------------------------------------------------------------

# What an option may be in config.json; on the command line the first of these.
TYPES = {"int": [int], "float": [float, int], "str": [str], "bool": [bool]}
TYPES["float | None"] = [*TYPES["float"], type(None)]
# Real models. What is marked * is the value of the A*-PO authors' MATH script (7,500 problems, 25
# epochs: 732 batches of 256), and so are our defaults of beta1, beta2 and N; what is not is ours,
# for one GPU of 80 GB.
A_PO = Config(
    model="Qwen/Qwen2.5-1.5B",  # *
    train_data="EleutherAI/hendrycks_math",  # * the 7,500 problems of MATH
    eval_data="HuggingFaceH4/MATH-500",  # *
    lr=1e-6, batch_size=256, minibatches=2, steps=732,  # *
    max_prompt_tokens=256, max_new_tokens=1024, revisions=0,  # * (no PAG turns)
    train_limit=0, eval_limit=0, warmup=10, save_every=20,
    rollout_tokens=500_000, update_tokens=16_384, gradient_checkpointing=True,
)  # fmt: skip
# Our combination: PAG's model and its one revision, trained as above.
PAG = dataclasses.replace(A_PO, model="Qwen/Qwen2.5-1.5B-Instruct", revisions=1)
PRESETS = {"": Config(), "a-po": A_PO, "pag": PAG}


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluate --model on the held-out problems; writes a line a dialogue and the summary."""
    config = check_options(config, "eval")
    folder = new_folder(config.out, "-eval")
    models = [config.model, *filter(None, [config.compare])]
    policies = [load_policy(dataclasses.replace(config, model=model)) for model in models]
    problems = load_problems(policies[0], config, "test")
    check_context(policies[-1], config)
    (summary, dialogues), *other = [evaluate_policy(p, problems, config) for p in policies]
    for _, theirs in other:
        summary["compare"] = {"with": config.compare, **paired(dialogues, theirs)}
    write_rows(folder / "eval_results.jsonl", dialogues)
    write_rows(folder / "eval_summary.json", [{"model": config.model, **summary}], indent=2)
    report_evaluation(summary)
    print(f"written to {folder}: eval_results.jsonl, eval_summary.json")
    return summary


def solve(config: Config, problem: str) -> None:
    """Let --model solve, check and revise one problem; prints the dialogue."""
    config = check_options(config, "solve")
    if not problem.strip():
        raise UsageError('the problem is empty: give its text, in quotes, like "What is 2 + 3?"')
    policy = load_policy(config)
    asked = n_dialogues(policy, [Problem(0, problem, "")], 1)
    check_context(policy, dataclasses.replace(config, max_prompt_tokens=len(asked[0].ids)))
    find(policy, asked, config)
    print_dialogue(rollout(policy, asked, config, -1)[0])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line: a command and its options."""
    parser = argparse.ArgumentParser("astarpo.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="evaluate, stage 1, stage 2, evaluate")
    resume = "go on with a run, with its own options but for those that are given"
    start = training.add_mutually_exclusive_group()  # with a run's options or a preset's
    start.add_argument("--resume", default="", metavar="RUN", help=resume)
    commands.add_parser("eval", help="evaluate a model on held-out problems")
    solving = commands.add_parser("solve", help="solve one problem and print the dialogue")
    solving.add_argument("problem", help="the problem's text, in quotes")
    preset = "a-po or pag (the sizes for a real model and MATH), or a run's config.json"
    for command, its_parser in commands.choices.items():
        where = start if command == "train" else its_parser
        where.add_argument("--preset", default="", metavar="NAME", help=preset)
        add_options(its_parser, command)
    plotting = commands.add_parser("plot", help="draw the dashboard of one or several runs")
    plotting.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    plotting.add_argument("--out", default="dashboard.png", help="file (default: %(default)s)")
    return parser.parse_args(argv)


def add_options(parser: argparse.ArgumentParser, command: str) -> None:
    """Options from the fields of Config: their names, types, defaults and help. Those that are not
    given are absent from what is parsed: a preset or a run comes in between."""
    changed = {} if command == "train" else {"model": "the newest finished run", "eval_limit": 0}
    heads = {"model": "the lesson's options", "loss": "the neighbours (Part II)"}
    heads["max_prompt_tokens"] = "for real models, other data and long runs"
    for item in dataclasses.fields(Config):
        if item.name in heads:
            group = parser.add_argument_group(heads[item.name])
        if command in item.metadata["on"]:
            kind, choices = TYPES[item.type][0], "|".join(item.metadata["choices"])
            takes = {"type": kind, "metavar": choices or kind.__name__.upper()}
            if kind is bool:
                takes = {"action": argparse.BooleanOptionalAction}
            default = changed.get(item.name, item.default)
            text = item.metadata["help"] + f" (default: {default})" * (default not in ("", None))
            flag = "--" + item.name.replace("_", "-")
            group.add_argument(flag, default=argparse.SUPPRESS, help=text, **takes)


def chosen_config(options: argparse.Namespace) -> Config:
    """The options: given ones, else those of --resume or --preset, else the defaults."""
    names = {f.name for f in dataclasses.fields(Config) if options.command in f.metadata["on"]}
    run = getattr(options, "resume", "")  # which stays where it is
    preset = f"{run}/config.json" if run else options.preset
    values = vars(PRESETS.get(preset) or read_config(Path(preset))) | {"out": ""}
    if options.command != "train":  # what a preset says of these is about training
        newest = max(Path("runs").glob("*/summary.json"), key=os.path.getmtime, default=None)
        model = str(newest.parent) if newest else Config().model
        values |= {"model": model, "temperature": None, "eval_limit": 0}
    values |= vars(options) | ({"out": run} if run else {})
    return Config(**{name: values[name] for name in (vars(Config()) if run else names)})


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 2 for bad input, 1 for a failure under way."""
    options = parse(argv)
    try:
        join_processes(getattr(options, "device", ""))
        if options.command == "train":
            train(chosen_config(options), resume=bool(options.resume))
        elif options.command == "eval":
            evaluate(chosen_config(options))
        elif options.command == "solve":
            solve(chosen_config(options), options.problem)
        else:
            plot(options.runs, Path(options.out))
            print(f"written to {options.out}")
        return 0
    except UsageError as error:
        status, message = 2, str(error)
    except ImportError as error:  # matplotlib for 'plot', peft for --lora
        status, message = 2, f"{error}; pip install {error.name}"
    except torch.OutOfMemoryError:
        remedies = "a lower --rollout-tokens or --update-tokens, or --gradient-checkpointing"
        status, message = 1, f"out of memory: try {remedies} (a run goes on with --resume)"
    except (RunError, OSError, KeyboardInterrupt) as error:  # OSError: a full disk, say
        status, message = 1, str(error) or "stopped"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if status == 1 or os.environ.get("LOCAL_RANK", "0") == "0":  # all see bad input, one tells
        print(f"\nastarpo: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
