"""The text encoder, first stage: it learns to say what a picture looks like.

Trained from scratch together with a UNet it does not learn: pictures become blobs. So it first predicts the principal
components of each picture's latents, which takes minutes, and finds the right picture for nearly every caption then.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random

import torch
from lessons import Lessons
from torch import Tensor, nn
from training import Run, batch_of, device, half
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerBase

WIDTH = 192
COMPONENTS = 96
BATCH = 64
SHORT = 24  # tokens; most of the time only so many are read, then all 77


def tokenizer_of(work: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that was trained in `work`."""
    return CLIPTokenizer.from_pretrained(work / "tokenizer")


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """Token ids, int64 (N, 77), as pipelines make them."""
    padded = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    ids: Tensor = padded.input_ids
    return ids


def new(tokenizer: PreTrainedTokenizerBase) -> CLIPTextModel:
    """One of 1.7 million parameters."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def components(latents: Tensor, count: int) -> Tensor:
    """Each picture's coordinates along the first principal components, whitened: (N, count), or (N, N) of fewer."""
    flat = latents.flatten(1)
    left, _, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    chosen: Tensor = left[:, :count]
    return chosen * len(flat) ** 0.5


def train(work: Path, minutes: float) -> None:
    """Train, and keep the averaged weights in `work`/text/model."""
    lessons, tokenizer = Lessons(work), tokenizer_of(work)
    targets = components(lessons.latents.to(device()), COMPONENTS)
    encoder, head = new(tokenizer), nn.Linear(WIDTH, targets.shape[1])
    run = Run(work / "text", {"encoder": encoder, "head": head}, minutes=minutes, rate=3e-3, until=0.2)

    def losses(ids: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        with half():
            told = head(encoder(ids).last_hidden_state)
        told, wanted = told.float(), targets[chosen]
        ends = (ids == tokenizer.eos_token_id).float()  # from the end of the text on, padding included
        error = (told - wanted[:, None]).square().mean(-1)
        mean = (told * ends[..., None]).sum(1) / ends.sum(1, keepdim=True)
        found = torch.cdist(mean.detach(), targets).argmin(1) == chosen
        return {"loss": (error * ends).sum() / ends.sum(), "found": found.float().mean()}

    order = lessons.order(run.step)
    for step in run:
        random, short = Random(step), run.share < 0.7
        chosen = list(islice(order, batch_of(BATCH if short else BATCH // 3)))
        ids = ids_of(tokenizer, [lessons.caption(number, random) for number in chosen])
        run.learn(losses, ids[:, :SHORT] if short else ids, torch.tensor(chosen))
    with run.averaged():
        encoder.save_pretrained(work / "text" / "model")
