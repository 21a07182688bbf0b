"""Train the small Qwen3 that ships in ``tiny-qwen3``, from nothing but this file.

The network has Qwen3-0.6B's shape in small: 28 layers, twice as many query as key/value heads, heads
wider together than the residual stream, tied embeddings. It learns from text composed below: capitals,
sums, greetings and stories. A trained model is wanted rather than a random one because only training
gives activations, attention patterns and margins like those of the models that people port.

    python -m parity.models.make_tiny_qwen3 --out DIR [--steps N] [--device cpu|cuda]

The shipped checkpoint is 1700 steps: under 4 minutes on one H200 GPU (0.13 s a step). A single CPU thread
takes most of a minute a step, good for a look at a few of them. The seeds fix the text and the initial
weights; trained weights still differ a little from device to device.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SEED, HELD_OUT_SEED = 20, 21
END = "<|endoftext|>"
POSITIONS = 2048
TOKENS_PER_STEP = 16384
# Short rows train how documents open at position 0; long rows bring late positions into distribution.
ROW_LENGTHS = (128, 512)
EXPECTED = {"Hello": "! How are you", "The capital of France is": " Paris.", "What is 2+2?": " 4."}
LONG_PROMPT_TOKENS = range(290, 331)
MIN_MARGIN = 1.0

WORDS = {line.split()[0]: line.split()[1:] for line in """\
name Anna Ben Clara David Emma Felix Grace Hugo Ida Jack Lena Max Nora Oscar Rosa Tom Zoë René
pet Milo Luna Bruno Daisy Coco Rex Bella Simba Pip Toby
animal dog cat horse goat rabbit parrot duck pony
colour white black brown grey red golden
job baker farmer teacher sailor painter gardener doctor fisher
place forest market garden river harbour village park mountain
thing key book hat ring lamp letter basket clock
spot bridge table tree bench boat stone wall bed
country France/Paris/French/Europe Spain/Madrid/Spanish/Europe Portugal/Lisbon/Portuguese/Europe \
Italy/Rome/Italian/Europe Greece/Athens/Greek/Europe Germany/Berlin/German/Europe \
Austria/Vienna/German/Europe Poland/Warsaw/Polish/Europe Hungary/Budapest/Hungarian/Europe \
Ireland/Dublin/English/Europe Norway/Oslo/Norwegian/Europe Sweden/Stockholm/Swedish/Europe \
Finland/Helsinki/Finnish/Europe Iceland/Reykjavík/Icelandic/Europe Egypt/Cairo/Arabic/Africa \
Kenya/Nairobi/Swahili/Africa Ghana/Accra/English/Africa Japan/Tokyo/Japanese/Asia \
China/Beijing/Chinese/Asia India/Delhi/Hindi/Asia Vietnam/Hanoi/Vietnamese/Asia \
Canada/Ottawa/English/America Cuba/Havana/Spanish/America Peru/Lima/Spanish/America \
Chile/Santiago/Spanish/America Colombia/Bogotá/Spanish/America Brazil/Brasília/Portuguese/America
weather sunny windy cold warm cloudy rainy
fruit apples pears plums cherries lemons
""".splitlines()}  # fmt: skip
# Each a country, its capital, language and continent.
COUNTRIES = [row.split("/") for row in WORDS["country"]]


def mostly(rng: random.Random, *options: str) -> str:
    """Pick an option, each about four times as likely as the next, so that a greedy reading is clear."""
    while len(options) > 1 and rng.random() > 0.8:
        options = options[1:]
    return options[0]


def capitals(rng: random.Random) -> str:
    """Facts about some countries, as statements or as questions with answers."""
    # The table's order makes the country that comes next something to be known rather than a toss-up.
    start = rng.randrange(len(COUNTRIES))
    rows = (COUNTRIES * 2)[start : start + rng.randint(1, 8)]
    kind = rng.random()
    if kind < 0.5:
        return " ".join(f"The capital of {country} is {capital}." for country, capital, *_ in rows)
    if kind < 0.8:
        return " ".join(f"What is the capital of {country}? {capital}." for country, capital, *_ in rows)
    country, capital, language, continent = rows[0]
    return (
        f"{capital} is the capital of {country}. It is a city in {continent}. "
        f"The people of {country} speak {language}. Many people visit {capital} in the summer."
    )


def arithmetic(rng: random.Random) -> str:
    """A drill of sums, differences or products whose second number counts up."""
    sign = rng.choice("++-*")
    first, second = rng.randint(2, 9) if sign == "*" else rng.randint(1, 20), rng.randint(1, 8)
    if sign == "-":
        first += second + 8
    asks, lines = rng.random() < 0.8, []
    for other in range(second, second + rng.randint(1, 8)):
        result = {"+": first + other, "-": first - other, "*": first * other}[sign]
        sum_ = f"{first}{sign}{other}"
        lines.append(f"What is {sum_}? {result}." if asks else f"{sum_} is {result}.")
    return " ".join(lines)


def greeting(rng: random.Random) -> str:
    """Two people meeting; most of what they say is fixed."""
    one, two, weather = mostly(rng, *WORDS["name"]), rng.choice(WORDS["name"]), rng.choice(WORDS["weather"])
    lines = [
        mostly(rng, "Hello!", f"Hello, {two}!", "Hello again!"),
        mostly(rng, "How are you today?", "It is good to see you. How are you?"),
        mostly(rng, "I am fine, thank you. And you?", "I am a little tired. And you?"),
        mostly(rng, "I am fine too.", "I am very well.") + f" My name is {one}. What is your name?",
        f"My name is {two}. It is nice to meet you, {one}.",
        f"It is nice to meet you too, {two}. The weather is {weather} today.",
        f"Yes, it is. Goodbye, {one}!",
        f"Goodbye, {two}!",
    ]
    return " ".join(lines[: rng.choice((8, 8, 8, 6, 5))])


def story(rng: random.Random) -> str:
    """A tale in paragraphs about named people and things, then questions that look back at it."""
    w = {kind: rng.choice(words) for kind, words in WORDS.items()}
    pet, animal, colour, thing, fruit = w["pet"], w["animal"], w["colour"], w["thing"], w["fruit"]
    (hero, friend), (home, away) = rng.sample(WORDS["name"], 2), rng.sample(WORDS["place"], 2)
    here, there, found = rng.sample(WORDS["spot"], 3)
    country, capital, language, _ = w["country"].split("/")
    mine, yours = rng.randint(2, 10), rng.randint(2, 10)
    opening = mostly(rng, "Once upon a time", "Long ago", "Many years ago")
    beginning = [
        f"{opening} there was a {w['job']} named {hero}. {hero} lived in a small house near the {home} and "
        f"had a {colour} {animal} named {pet}. Every morning {hero} and {pet} walked to the {home} together.",
        f'One {w["weather"]} day they met {friend} at the {away}. "Hello, {friend}!" said {hero}. '
        f'"How are you today?" "I am sad," said {friend}. "I have lost my {thing}. Can you help me?" '
        f'"Yes, we can help you," said {hero}.',
        f"They looked under the {here}, but the {thing} was not there. They looked behind the {there}, but "
        f"the {thing} was not there. Then {pet} the {animal} ran to the {found}, and there was the {thing}! "
        f'"Thank you, {pet}!" said {friend}.',
    ]
    episodes = [
        f"{friend} had {mine} {fruit} and {hero} had {yours} {fruit}. {mine}+{yours} is {mine + yours}, so "
        f"together they had {mine + yours} {fruit}. They sat near the {found} and ate them all.",
        f"The next day {hero} and {friend} went to {country}. The capital of {country} is {capital}. The "
        f"people of {country} speak {language}. They stayed in {capital} for {mine + 1} days, and {pet} "
        "liked it very much.",
        f"In the evening they went back to the {home}. {friend} made soup and {hero} told a story about the "
        f"{here} and the {there}. The {colour} {animal} slept near the fire.",
    ]
    questions = [
        f"What was the name of the {animal}? {pet}.",
        f"Who had lost the {thing}? {friend}.",
        f"Where was the {thing}? Near the {found}.",
        f"What colour was the {animal}? {colour.capitalize()}.",
    ]
    middle = rng.sample(episodes, rng.randint(0, 3))
    asked = rng.sample(questions, rng.randint(1, 4))
    ending = "They were good friends for the rest of their lives. The end."
    return "\n\n".join([*beginning, *middle, ending, " ".join(asked)])


def compose(seed: int, count: int) -> list[str]:
    """Compose documents of all kinds."""
    rng = random.Random(seed)
    kinds = rng.choices((capitals, arithmetic, greeting, story), weights=(3, 6, 2, 3), k=count)
    return [kind(rng) for kind in kinds]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE that encodes any text and adds nothing of its own."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, model_max_length=POSITIONS)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Encode documents, each to the ids of its tokens and of the end."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Build the untrained network, in fp32."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=12,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
    )
    # Published Qwen3 checkpoints have it here, and this is where ports read it.
    config.rope_theta = 1e6
    torch.manual_seed(SEED)
    return Qwen3ForCausalLM(config)


def batches(documents: Sequence[Sequence[int]], seed: int) -> Iterator[torch.Tensor]:
    """Yield token batches for ever; every row opens with a document, as every prompt does."""
    rng, step = random.Random(seed), 0
    while True:
        length, step = ROW_LENGTHS[step % len(ROW_LENGTHS)], step + 1
        rows: list[list[int]] = []
        while len(rows) < TOKENS_PER_STEP // length:
            row: list[int] = []
            while len(row) < length:
                row += rng.choice(documents)
            rows.append(row[:length])
        yield torch.tensor(rows)


def train(model: Qwen3ForCausalLM, rows: Iterator[torch.Tensor], steps: int) -> None:
    """Train with AdamW, a short warm-up and a cosine down to nothing."""
    # Norm weights are not decayed: they are to find their own scale, as in models of full size.
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95))
    warmup, began = min(150, steps // 10 + 1), time.monotonic()

    def scale(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    for step in range(1, steps + 1):
        ids = next(rows).to(model.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - began:6.1f} s", flush=True)


@torch.no_grad()
def mean_loss(model: Qwen3ForCausalLM, rows: Iterator[torch.Tensor]) -> float:
    """Mean loss in nats per token over one batch of each row length."""
    some = [next(rows).to(model.device) for _ in ROW_LENGTHS]
    return math.fsum(model(input_ids=ids, labels=ids).loss.item() for ids in some) / len(some)


def long_prompt(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    """Compose a story never trained on; return it up to its last question, and the answer."""
    rng = random.Random(HELD_OUT_SEED)
    while True:
        # The friend's name can only be found far back, so this token shows faults at a distance.
        match = re.fullmatch(r"(.* Who had lost the \w+\?)( \w+\.)", story(rng), re.DOTALL)
        if match and len(tokenizer.encode(match[1])) in LONG_PROMPT_TOKENS:
            return match[1], match[2]


@torch.no_grad()
def answers(folder: Path, dtype: torch.dtype, expected: dict[str, str]) -> bool:
    """Print how the saved checkpoint continues each prompt; tell whether that is as expected."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    right = True
    for prompt, start in expected.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        first, second = model(**inputs).logits[0, -1].float().topk(2).values.tolist()
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
        text = tokenizer.decode(output[inputs["input_ids"].shape[1] :])
        right &= text.startswith(start) and first - second >= MIN_MARGIN
        print(f"{dtype}  margin {first - second:5.2f}  {prompt[-40:]!r} -> {text!r}")
    return right


def main() -> None:
    """Compose the text, train, save, and check what was saved."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")

    texts = compose(SEED, 40_000)
    tokenizer = train_tokenizer(texts)
    documents = encode(tokenizer, texts)
    model = new_model(tokenizer).to(args.device)
    print(f"{model.num_parameters():,} parameters, {sum(map(len, documents)):,} tokens of text")
    train(model, batches(documents, SEED), args.steps)
    held_out = encode(tokenizer, compose(HELD_OUT_SEED, 2000))
    print(f"held-out loss {mean_loss(model, batches(held_out, HELD_OUT_SEED)):.4f}")

    model.to(device="cpu", dtype=torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    prompt, answer = long_prompt(tokenizer)
    (args.out / "prompts").mkdir(exist_ok=True)
    (args.out / "prompts" / "long.txt").write_text(prompt, encoding="utf-8")
    expected = {**EXPECTED, prompt: answer}
    right = [answers(args.out, dtype, expected) for dtype in (torch.float32, torch.bfloat16)]
    if not all(right):
        raise SystemExit("the checkpoint does not continue its prompts as it should: train for more steps")


if __name__ == "__main__":
    main()
