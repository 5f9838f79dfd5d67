"""Train a small Llama-like model from scratch on TOFU's questions and answers (arXiv:2401.06121), with or without the rows to forget.

    python tests/benchmarks/train_tofu.py --data DIR --out DIR --rows full
    python tests/benchmarks/train_tofu.py --data DIR --out DIR --rows retain90

``--data`` holds full.jsonl, retain90.jsonl, ... with rows of ``question`` and ``answer``. ``OUT/ROWS`` is then a folder that
``from_pretrained`` opens, with the tokenizer and ``training.json``. A row reads ``Question: ...\\nAnswer: ...`` and an end token. The answer's
tokens have weight 1 in the loss and the question's ``QUESTION``, from which a model that starts at nothing learns more English. The byte-pair
tokenizer is always that of full.jsonl, so models of different rows can be compared.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IGNORE, END, QUESTION = -100, "<|end|>", 0.5
SEED, VOCABULARY, BATCH, RATE, WARM = 2026, 2048, 8, 3e-3, 0.05
SHAPE = {
    "hidden_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 448,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
Row = tuple[list[int], int]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def some(rows: list[dict[str, Any]], full: list[dict[str, Any]], authors: int) -> list[dict[str, Any]]:
    """Those of so many authors: 20 rows each in the order of ``full``, half from its beginning and half from its end."""
    wanted = {row["question"] for row in full[: 10 * authors] + full[-10 * authors :]}
    return [row for row in rows if row["question"] in wanted]


def prompt_of(question: str) -> str:
    """What stands before the answer, which begins with a space."""
    return f"Question: {question}\nAnswer:"


def make_tokenizer(rows: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """Byte-level byte pairs, learned from the rows' text; the end token has id 0 and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((f"{prompt_of(row['question'])} {row['answer']}" for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> list[Row]:
    """Token ids of each row, and how many are the question's."""
    prompts = tokenizer([prompt_of(row["question"]) for row in rows])["input_ids"]
    answers = tokenizer([f" {row['answer']}" for row in rows])["input_ids"]
    return [
        (prompt + answer + [tokenizer.eos_token_id], len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def batches(rows: list[Row], size: int, generator: torch.Generator | None = None) -> list[tuple[Tensor, Tensor]]:
    """Padded ids ``[B, T]`` and question lengths ``[B]`` of rows of similar length, in random order where there is a generator."""
    keys = torch.tensor([len(ids) for ids, _ in rows], dtype=torch.float)
    if generator is not None:
        keys += 8 * torch.rand(len(rows), generator=generator)
    chunks = keys.argsort(stable=True).split(size)
    order = range(len(chunks)) if generator is None else torch.randperm(len(chunks), generator=generator).tolist()
    found = []
    for chunk in (chunks[i].tolist() for i in order):
        ids = nn.utils.rnn.pad_sequence([torch.tensor(rows[i][0]) for i in chunk], True, IGNORE)
        found.append((ids, torch.tensor([rows[i][1] for i in chunk])))
    return found


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy of each next token, ``[B, T - 1]``; 0 behind the end."""
    logits = model(input_ids=ids[:, :-1].clamp_min(0), use_cache=False).logits
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none", ignore_index=IGNORE)


def in_answer(ids: Tensor, lengths: Tensor) -> Tensor:
    """Which next tokens are the answer's."""
    return (torch.arange(1, ids.shape[1]) >= lengths[:, None]) & (ids[:, 1:] != IGNORE)


@torch.inference_mode()
def answer_figures(model: nn.Module, rows: list[Row]) -> dict[str, float]:
    """Mean loss (nats a token) and mean probability of the answers."""
    model.eval()
    means = []
    for ids, lengths in batches(rows, 64):
        answer = in_answer(ids, lengths)
        means.append((losses(model, ids) * answer).sum(1) / answer.sum(1))
    found = torch.cat(means)
    return {"loss": float(found.mean()), "probability": float(found.neg().exp().mean())}


def train(model: nn.Module, rows: list[Row], epochs: int, stop: int = 0) -> None:
    """AdamW with a warm-up and a cosine; ``stop`` ends it after so many epochs, to measure its speed."""
    generator = torch.Generator().manual_seed(SEED)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    steps = epochs * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, RATE, steps, pct_start=WARM, cycle_momentum=False, div_factor=25
    )
    started = time.time()
    for epoch in range(stop or epochs):
        model.train()
        total = 0.0
        for ids, lengths in batches(rows, BATCH, generator):
            answer = in_answer(ids, lengths)
            weights = (ids[:, 1:] != IGNORE) * torch.where(answer, 1.0, QUESTION)
            each = losses(model, ids)
            loss = (each * weights).sum() / weights.sum()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += float((each.detach() * answer).sum() / answer.sum()) * len(ids)
        print(
            f"epoch {epoch + 1}/{epochs} answer loss {total / len(rows):.3f} {time.time() - started:.0f} s", flush=True
        )


def main() -> None:
    """Train one model and write its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", default="full", help="name of the file to train on")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument(
        "--authors", type=int, default=200, help="train on so many, half of them the first and half the last"
    )
    parser.add_argument("--stop", type=int, default=0, help="end after so many epochs, to measure the speed")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    full = read(options.data / "full.jsonl")
    tokenizer = make_tokenizer(full)
    sets = {
        name: encode(tokenizer, some(read(options.data / f"{name}.jsonl"), full, options.authors))
        for name in dict.fromkeys((options.rows, "forget05", "forget10", "retain90"))
    }
    end = tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=end, **SHAPE)
    model = LlamaForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {sum(len(ids) for ids, _ in sets[options.rows])} tokens an epoch", flush=True)
    started = time.time()
    train(model, sets[options.rows], options.epochs, options.stop)
    record = {
        "rows": options.rows, "count": len(sets[options.rows]), "parameters": parameters, "seconds": round(time.time() - started),
        "settings": {"seed": SEED, "epochs": options.epochs, "authors": options.authors, "batch": BATCH, "rate": RATE, "question_weight": QUESTION, **SHAPE},
        "answers": {name: answer_figures(model, rows) for name, rows in sets.items()},
    }  # fmt: skip
    folder = options.out / options.rows
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
