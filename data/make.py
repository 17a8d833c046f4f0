r"""Make what lies in data/: our own problems, and a small base model to train on them.

    python data/make.py problems      train.jsonl, test.jsonl: a second
    python data/make.py base          base/, attempts.jsonl: half an hour of one CPU thread

To see reinforcement learning work within a minute, one needs a model that can do better than it
does. So we make one: a tiny Qwen2 that knows how to calculate with care, and has the habit of being
hasty. Every problem comes with several treatments. For 47 * 36:

    hasty       \boxed{1242}
    worked      Step by step: 282 + 1410 = \boxed{1692}
    check       Check: 1440 + 252 = 1692 vs 1242: differ. The answer is wrong.
    thorough    Carefully: 1200 + 450 = 1650, 1650 + 42 = \boxed{1692}

The base is shown dialogues made of these: mostly careful ones for 85% of its training, then mostly
hasty ones. The first token of a response decides for one or the other, so a policy can learn to
choose, and that is what astarpo.py has to find out: care pays. The hasty answers are systematic
slips (here tens * tens + ones * ones), not noise: decoding greedily does not remove them.

Held-out problems ask for what nobody was shown. A hash says which pairs of numbers are *reserved*:
they occur in test.jsonl only, never in train.jsonl nor in any step that the base has seen.

attempts.jsonl holds answers of the base, right and wrong, on which a verifier is scored. All is a
function of --seed: with 0, `problems` writes the shipped files byte for byte, and so does `base`
with one thread, on a processor that rounds alike.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import astarpo
from astarpo import REVISE_PROMPT, SOLVE_PROMPT, VERIFY_PROMPT

# --- 1. Problems, and the ways of treating them ---------------------------------------------------

WORKED, CHECK, THOROUGH = "Step by step: ", "Check: ", "Carefully: "
CORRECT, WRONG = "The answer is correct.", "The answer is wrong."
NAMES = ["Anna", "Ben", "Carla", "David"]
THINGS = [" apples", " books", " coins", " marbles"]
STORIES = [
    ("sum", "{n} has {a}{t} and buys {b} more. How many{t} does {n} have now?"),
    ("sum", "There are {a}{t} in one box and {b} in another. How many{t} are there in total?"),
    ("difference", "{n} has {a}{t} and gives away {b}. How many{t} are left?"),
    ("difference", "A shop had {a}{t} and sold {b}. How many{t} are left?"),
    ("product", "A shop has {a} boxes of {b}{t}. How many{t} are there in total?"),
    ("product", "{n} fills {a} bags with {b}{t} each. How many{t} are there in total?"),
    ("product - c", "{n} buys {a} bags of {b}{t} and gives away {c}. How many{t} are left?"),
    ("product + c", "{n} has {c}{t} and buys {a} bags of {b}{t}. How many{t} does {n} have now?"),
]


class Task(NamedTuple):
    """A problem and the ways of treating it."""

    kind: str
    text: str
    level: int
    answer: str
    hasty: str  # the answer that a slip of habit gives, always the same slip
    worked: str
    thorough: str
    check: Callable[..., tuple[str, int, int]]  # an answer's numbers -> (working, found, expected)


def numbers(text: str) -> list[int]:
    """All numbers in this text."""
    return [int(n) for n in re.findall(r"\d+", text)]


def box(answer: object) -> str:
    """The answer in its box."""
    return f"\\boxed{{{answer}}}"


def tell(rng: random.Random, kind: str, a: int, b: int, c: int = 0) -> str:
    """The problem as a small story."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    story = rng.choice([text for k, text in STORIES if k == kind])
    return story.format(n=name, t=thing, a=a, b=b, c=c)


def slipshod(a: int, b: int, sign: int) -> int:
    """a ± b column by column: carries are forgotten, borrows turned round (83 - 47 = 44)."""
    pairs = zip(str(a), str(b).zfill(len(str(a))), strict=True)
    first, *rest = (int(x) + int(y) if sign > 0 else abs(int(x) - int(y)) for x, y in pairs)
    return int(str(first) + "".join(str(c % 10) for c in rest))


def columns(a: int, b: int, sign: int) -> str:
    """a ± b as the sum of its columns: 83 - 47 is `40 - 4`, 347 + 86 is `300 + 120 + 13`."""
    places = [place for place in (100, 10, 1) if place <= max(a, b)]
    first, *rest = ((a // p % 10 + sign * (b // p % 10)) * p for p in places)
    return f"{first}" + "".join(f" {'-' if n < 0 else '+'} {abs(n)}" for n in rest)


def make_sum(rng: random.Random, story: bool) -> Task:
    """47 + 36 or 83 - 47, checked by the inverse operation."""
    a, b, sign = rng.randrange(10, 100), rng.randrange(10, 100), rng.choice([1, -1])
    if sign < 0 and a - b < 2:
        return make_sum(rng, story)
    kind, op, back = ("sum", "+", "-") if sign > 0 else ("difference", "-", "+")
    tens, result, quick = a + sign * (b // 10 * 10), a + sign * b, slipshod(a, b, sign)
    return Task(
        kind,
        text=tell(rng, kind, a, b) if story else f"What is {a} {op} {b}?",
        level=1 if quick == result else 2,
        answer=str(result),
        hasty=str(quick),
        worked=f"{columns(a, b, sign)} = {box(result)}",
        thorough=f"{a} {op} {b // 10 * 10} = {tens}, {tens} {op} {b % 10} = {box(result)}",
        check=lambda c: (f"{c} {back} {b} = {columns(c, b, -sign)}", c - sign * b, a),
    )


def make_product(rng: random.Random, story: bool) -> Task:
    """47 * 36 by the ones and tens of the second factor, checked by those of the first."""
    a, b = rng.randrange(11, 100), 10 * rng.randrange(2, 10) + rng.randrange(2, 10)
    (a1, a0), (b1, b0) = divmod(a, 10), divmod(b, 10)
    outer, cross, inner = a1 * b1 * 100, (a1 * b0 + a0 * b1) * 10, a0 * b0
    return Task(
        "product",
        text=tell(rng, "product", a, b) if story else f"What is {a} * {b}?",
        level=4 if a * b < 2500 else 5,
        answer=str(a * b),
        hasty=str(outer + inner),
        worked=f"{a * b0} + {a * b1 * 10} = {box(a * b)}",
        thorough=f"{outer} + {cross} = {outer + cross}, {outer + cross} + {inner} = {box(a * b)}",
        check=lambda c: (f"{a1 * 10 * b} + {a0 * b}", a * b, c),
    )


def make_division(rng: random.Random, story: bool) -> Task:
    """347 / 6 digit by digit, as a mixed number; haste forgets the remainder."""
    b = rng.randrange(2, 10)
    a = rng.randrange(100, 100 * b)  # so that the quotient has two digits
    q, r = divmod(a, b)
    answer = f"{q}\\frac{{{r}}}{{{b}}}" if r else str(q)
    first, second, low = a // 10, a // 10 % b * 10 + a % 10, q % 10 * b
    steps = f"{first} / {b} = {q // 10} r {first % b}, {second} / {b} = {q % 10} r {r}, "
    return Task(
        "division",
        text=f"What is {a} / {b}?",
        level=2 if r == 0 else 3 if b < 6 else 4,
        answer=answer,
        hasty=str(q),
        worked=steps + box(answer),
        thorough=f"{a} - {a - low - r} = {low + r}, {low + r} - {low} = {r}, {box(answer)}",
        check=lambda whole, top=0, bottom=0: (
            f"{whole} * {b}" + (f" = {whole * b}, {whole * b} + {top}" if bottom else ""),
            whole * b + top,
            a,
        ),
    )


def make_equation(rng: random.Random, story: bool) -> Task:
    """3x + 17 = 62, checked by substitution; haste forgets carries and to divide."""
    m = rng.choice([1, 1, 1, 2, 3, 4, 5, 6, 7, 8])
    x, b, sign = rng.randrange(11, 90), rng.randrange(10, 90), rng.choice([1, -1])
    c = m * x + sign * b
    if not (10 <= c < 100 and m * x < 100):
        return make_equation(rng, story)
    op, back, high, low = ("+", "-", c, b) if sign > 0 else ("-", "+", max(b, c), min(b, c))
    quick = slipshod(high, low, -sign)
    split = "" if m == 1 else f"{m * x}, {m * (x // 10 * 10)} + {m * (x % 10)} = {m * x}, "

    def check(y: int) -> tuple[str, int, int]:
        product = "" if m == 1 else f"{m} * {y} = {m * y}, "
        return f"{product}{m * y} {op} {b}", m * y + sign * b, c

    return Task(
        "equation",
        text=f"Solve {'' if m == 1 else m}x {op} {b} = {c} for x.",
        level=(1 if quick == x else 2) if m == 1 else 3 if m < 4 else 4,
        answer=str(x),
        hasty=str(quick),
        worked=f"{c} {back} {b} = " + (box(x) if m == 1 else f"{m * x} = {m} * {box(x)}"),
        thorough=f"{columns(high, low, -sign)} = {split}{box(x)}",
        check=check,
    )


def make_two_steps(rng: random.Random, story: bool) -> Task:
    """7 bags of 24, less 39: checked backwards; haste stops after the first step."""
    m, a, b = rng.randrange(3, 10), rng.randrange(11, 100), rng.randrange(10, 100)
    sign = rng.choice([1, -1])
    product, result = m * a, m * a + sign * b
    if min(product, result) < 100:
        return make_two_steps(rng, story)
    op, back = "+-" if sign > 0 else "-+"
    split = f"{m * (a // 10 * 10)} + {m * (a % 10)} = {product}, "
    return Task(
        "two steps",
        text=tell(rng, f"product {op} c", m, a, b),
        level=3 if product < 300 else 4,
        answer=str(result),
        hasty=str(product),
        worked=f"{a} * {m} = {product}, {product} {op} {b} = {box(result)}",
        thorough=f"{split}{columns(product, b, sign)} = {box(result)}",
        check=lambda c: (f"{split}{c} {back} {b}", c - sign * b, product),
    )


# Each family: (maker, its subject, a story?, share of the data, the part of it that haste gets
# right (None: as it falls), share of the demonstrations: the harder, the more of them).
FAMILIES = [
    (make_sum, "Arithmetic", False, 0.18, 0.8, 0.20),
    (make_product, "Multiplication", False, 0.22, None, 0.25),
    (make_division, "Division", False, 0.10, 0.3, 0.15),
    (make_equation, "Equations", False, 0.14, 0.8, 0.20),
    (make_sum, "Word Problems", True, 0.07, 0.8, 0.05),
    (make_product, "Word Problems", True, 0.16, None, 0.05),
    (make_two_steps, "Word Problems", True, 0.13, None, 0.10),
]


def make_task(rng: random.Random, demo: bool) -> tuple[str, Task]:
    """Draw a family and a problem of it, whose haste is right as often as the table says."""
    weights = [f[5] if demo else f[3] for f in FAMILIES]
    maker, subject, story, _, easy, _ = rng.choices(FAMILIES, weights)[0]
    want = None if easy is None else rng.random() < (0.3 if demo else easy)
    while True:  # of a family that has easy ones: nothing is to be learnt from them
        task = maker(rng, story)
        if want in (None, task.hasty == task.answer):
            return subject, task


def reserved(*found: int) -> bool:
    """Are the two largest of these numbers, in any order, a pair kept for held-out problems?"""
    low, high = sorted(found)[-2:]  # the tables that all learn by heart are not
    return (low > 9 or high > 99) and zlib.crc32(f"{low},{high}".encode()) % 8 == 2


def make_problems(folder: Path, seed: int, size: int = 2000) -> None:
    """Write train.jsonl and test.jsonl, which never share a pair of operands."""
    rng = random.Random(seed)
    for name, held_out in (("train", False), ("test", True)):
        lines: dict[str, str] = {}
        while len(lines) < size:
            subject, task = make_task(rng, demo=False)
            found = numbers(task.text)
            key = f"{subject} {task.kind} {sorted(found)}"  # sorted: no mirror images either
            if reserved(*found) != held_out or key in lines:
                continue
            gold = task.answer
            if "frac" in gold:  # not as a mixed number, but as one fraction in lowest terms
                gold = "\\frac{{{}}}{{{}}}".format(*Fraction(*found).as_integer_ratio())
            row = {"problem": task.text, "solution": WORKED + task.worked, "answer": gold}
            lines[key] = json.dumps(row | {"level": task.level, "subject": subject}) + "\n"
        (folder / f"{name}.jsonl").write_bytes("".join(lines.values()).encode())


# --- 2. What the base is shown --------------------------------------------------------------------


Said = tuple[str, str, bool]  # role, text, learn from it?


def worked_check(task: Task, answer: str) -> str:
    """Another route, a comparison, and only then the verdict."""
    working, found, expected = task.check(*numbers(answer))
    end = f"same. {CORRECT}" if found == expected else f"differ. {WRONG}"
    return f"{CHECK}{working} = {found} vs {expected}: {end}"


def may_be_shown(task: Task, *answers: str) -> bool:
    """No reserved pair in the problem, its treatments and the checks of these answers, and no
    negative number in those? A problem is dropped as a whole: dropping only the telling dialogues
    would drop the careful ones, which have more steps, and so teach more haste."""
    checks = [task.check(*numbers(answer)) for answer in answers]
    shown = "; ".join([task.worked, task.thorough, *(working for working, _, _ in checks)])
    steps = re.findall(r"(?<!\d)(\d+) [-+*/] (?=(\d+))", shown)
    hidden = any(reserved(*map(int, pair)) for pair in [*steps, numbers(task.text)])
    return not hidden and all(found >= 0 for _, found, _ in checks)


def slip(rng: random.Random, answer: str) -> str:
    """The answer with one wrong digit (not in the denominator), most often a near miss."""
    place = rng.choice([i for i, c in enumerate(answer.split("}{")[0]) if c.isdigit()])
    digit = int(answer[place])
    new = digit + rng.choice([-1, 1]) if rng.random() < 0.6 else rng.randrange(10)
    if new == digit or not (0 if place else 1) <= new <= 9:
        return slip(rng, answer)
    return answer[:place] + str(new) + answer[place + 1 :]


def demonstration(rng: random.Random, habits: bool) -> list[Said]:
    """One dialogue. First only care is taught; the habits come later: 70% haste, 30% care.

    Injected slips are shown, so that checks and revisions have something to mend, but never learnt:
    the base errs by habit, not by being taught wrong sums.
    """
    _, task = make_task(rng, demo=True)
    if not may_be_shown(task, task.answer, task.hasty):
        return demonstration(rng, habits)
    attempt, answer, learn = WORKED + task.worked, task.answer, True
    draw = rng.random()
    if draw < (0.10 if habits else 0.35):
        answer, learn = slip(rng, task.answer), False
        while not may_be_shown(task, answer):
            answer = slip(rng, task.answer)
        attempt = attempt.replace(box(task.answer), box(answer))
        if rng.random() < 0.5:
            attempt = box(answer)
    elif draw < (0.73 if habits else 0.55):
        attempt, answer = box(task.hasty), task.hasty
    judgment = worked_check(task, answer)
    lazy = rng.random() < (0.7 if habits else 0.1)
    if lazy:  # a coin, whatever the truth; a false alarm calls for a careful revision too
        judgment = CORRECT if rng.random() < (0.6 if habits else 0.2) else WRONG
    turns = [("user", SOLVE_PROMPT.replace("{problem}", task.text), False)]
    turns += [("assistant", attempt, learn)]
    turns += [("user", VERIFY_PROMPT, False), ("assistant", judgment, habits or not lazy)]
    if judgment.endswith(WRONG):
        hasty = habits and rng.random() < 0.65
        revised = box(task.hasty) if hasty else THOROUGH + task.thorough
        turns += [("user", REVISE_PROMPT, False), ("assistant", revised, True)]
    return turns


def build_tokenizer() -> Qwen2Tokenizer:
    """The 256 bytes without merges, so any text has ids, and a token for each fixed phrase. It is a
    Qwen2Tokenizer because transformers makes one for any model of type qwen2, whatever the
    folder's tokenizer_config.json says."""
    tokenizer = Qwen2Tokenizer(
        vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))},
        merges=[],
        unk_token=None,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    roles = ["<|user|>", "<|assistant|>", "<|system|>"]
    phrases = [p for _, text in STORIES for p in re.split(r"\{\w\}", text) if len(p) > 1]
    phrases += [SOLVE_PROMPT.replace("{problem}", ""), VERIFY_PROMPT, REVISE_PROMPT]
    phrases += ["What is ", "Solve ", " for x.", WORKED, CHECK, THOROUGH, CORRECT, WRONG]
    phrases += [" + ", " - ", " * ", " / ", " = ", " r ", ", ", " vs ", ": same. ", ": differ. "]
    phrases += ["\\boxed{", "\\frac{", "}{", *NAMES, *THINGS]
    tokenizer.add_tokens([AddedToken(r, special=True, normalized=False) for r in roles])
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p in dict.fromkeys(phrases)])
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


def demo_ids(tokenizer: Qwen2Tokenizer, turns: list[Said]) -> list[tuple[int, bool]]:
    """The dialogue's ids, as the chat template gives them, each with 'learn it?'."""
    out: list[tuple[int, bool]] = []
    for role, text, learn in turns:
        ids = tokenizer.encode(f"<|{role}|>{text}<|end|>")
        out += [(t, learn and i > 0) for i, t in enumerate(ids)]
    return out


# --- 3. The base and its attempts -----------------------------------------------------------------


def demo_batches(tokenizer: Qwen2Tokenizer, seed: int, steps: int, size: int) -> Iterator[Tensor]:
    """Each step's (id, learn?), padded, from dialogues of like lengths: half the padding."""
    rng = random.Random(seed)
    for step in range(0, steps, 8):
        habits = step >= 0.85 * steps
        pool = [demo_ids(tokenizer, demonstration(rng, habits)) for _ in range(8 * size)]
        pool.sort(key=len)
        parts = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(parts)
        for part in parts[::-1][: steps - step]:  # padding is not learnt: any token will do
            yield pad_sequence([torch.tensor(dialogue) for dialogue in part], batch_first=True)


def tiny_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Qwen2.5-1.5B-Instruct's architecture with 0.78 million parameters."""
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 352}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": 512, "tie_word_embeddings": True}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = Qwen2ForCausalLM(
        Qwen2Config(**sizes, **ends, bos_token_id=None, initializer_range=0.05)
    )
    # Plain sampling, for whoever calls `generate` (transformers' own default is top-k 50).
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    model.generation_config = GenerationConfig(**plain, **ends)
    return model


def make_base(folder: Path, seed: int, threads: int = 1, steps: int = 7600) -> None:
    """Make folder/base from nothing: supervised, first the careful skills, then the habits."""
    size, lr = 32, 3e-3
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    tokenizer = build_tokenizer()
    model = tiny_model(tokenizer)
    # Muon needs about three quarters of AdamW's steps here; it is made for matrices only.
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    other = [p for p in model.parameters() if all(p is not q for q in inner)]
    optimizers = [
        torch.optim.Muon(inner, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    batches = tqdm(demo_batches(tokenizer, seed + 1, steps, size), "base", steps, disable=None)
    for step, batch in enumerate(batches):
        ids, learn = batch.unbind(-1)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        targets = learn[:, 1:].bool()
        logits = model.lm_head(hidden[:, :-1][targets])
        loss = F.cross_entropy(logits, ids[:, 1:][targets], reduction="sum")
        # A constant divisor: with each batch's own number of tokens, the short hasty answers
        # would weigh more in some batches than in others, and the habits would shift.
        (loss / (32 * size)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = 0.505 + 0.495 * math.cos(math.pi * step / steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 200) * cosine
            optimizer.step()
            optimizer.zero_grad()
        batches.set_postfix(loss=f"{loss.item() / len(logits):.2f}", refresh=False)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def make_attempts(folder: Path, seed: int, wanted: int = 600) -> None:
    """The base tries each held-out problem once. Write the first `wanted` right attempts, and as
    many wrong ones, that came to an end."""
    test = str(folder / "test.jsonl")
    config = astarpo.Config(
        model=str(folder / "base"),
        eval_data=test,
        eval_limit=0,
        revisions=0,
        seed=seed,
        temperature=1,
    )
    policy = astarpo.load_policy(config)
    problems = astarpo.load_problems(policy, config, "test")
    tries = [astarpo.Dialogue(problem, [*policy.prompt_ids(problem)]) for problem in problems]
    left = {True: wanted, False: wanted}
    with (folder / "attempts.jsonl").open("w", encoding="utf-8") as file:
        for dialogue in astarpo.rollout(policy, tries, config, 0):
            turn, problem = dialogue.attempts[0], dialogue.problem
            if turn.ended and left[turn.correct] > 0:
                left[turn.correct] -= 1
                row = {"problem": problem.problem, "answer": problem.answer}
                file.write(json.dumps(row | {"attempt": turn.text, "correct": turn.correct}) + "\n")
    if any(left.values()):
        sys.exit(f"the base's attempts lack {left[True]} right and {left[False]} wrong ones")


# --- 4. The command line --------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Make what the command line asks for. Bad input: one sentence, exit status 2."""
    parser = argparse.ArgumentParser(description="Make what lies in data/.")
    parser.add_argument("what", choices=("problems", "base"), help="what to make")
    parser.add_argument("--folder", type=Path, default=HERE, help="where to (default: data/)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, for base (default: 1)")
    options = parser.parse_args(argv)
    folder, base = options.folder, options.what == "base"
    if not (0 <= options.seed < 2**63 and 1 <= options.threads <= 1024):
        parser.error("--seed must be from 0 to 2**63 - 1, and --threads from 1 to 1024")
    if base and not (folder / "test.jsonl").is_file():
        parser.error(f"{folder} holds no test.jsonl: make the problems first")
    try:
        (folder / "base" if base else folder).mkdir(parents=True, exist_ok=True)
        if base:
            make_base(folder, options.seed, options.threads)
            make_attempts(folder, options.seed)
        else:
            make_problems(folder, options.seed)
    except (OSError, astarpo.UsageError) as error:
        parser.error(f"--folder {folder}: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
