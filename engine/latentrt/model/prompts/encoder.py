"""A text encoder: from the rows of a reading to states, with vectors that are given, layers that are skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.spec import TensorSpec
from latentrt.errors import EXPORT, RequestError
from latentrt.model.prompts.embeddings import Embedding
from latentrt.model.prompts.reading import Float32, Ids, Reading, Row
from latentrt.model.prompts.tokenizer import GIVEN, Tokenizer
from latentrt.runtime.base import Network, call

IDS, VECTORS, MASK = "input_ids", "vectors", "attention_mask"  # inputs; the last two not of every bundle
STATES, POOLED, SKIPPED = "text_states", "text_embeds", "skipped"  # outputs; the last two not of every encoder
NO_LORA: Mapping[str, Float32] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Encoder:
    """A text encoder by its name in the manifest, with its tokenizer.

    `table` are the vectors (n, dim) that the ids from GIVEN on stand for.
    """

    name: str
    tokenizer: Tokenizer
    network: Network
    table: Float32 | None = None

    def with_embeddings(self, embeddings: Mapping[str, Embedding], encoders: int) -> Encoder:
        """Return an encoder that knows these tokens too.

        Raises:
            RequestError: one of them does not fit, or the bundle is older.
        """
        (width,) = self._inputs(VECTORS, "no embeddings")[2:]
        tables = {token: one.of(self.name, encoders, int(width), token) for token, one in embeddings.items()}
        tokenizer = self.tokenizer.with_vectors({token: len(table) for token, table in tables.items()})
        return replace(self, tokenizer=tokenizer, table=np.concatenate(list(tables.values())))

    def check(self, reading: Reading, skip: int) -> None:
        """Refuse what the network cannot do: an older bundle, more skipped layers than it gives. Raise RequestError."""
        if reading.masked:
            self._inputs(MASK, "no weights below 1")
        if not skip:
            return
        given = {tensor.name: tensor for tensor in self.network.graph.outputs}
        if SKIPPED not in given:
            raise self._older("no clip_skip")
        most = given[SKIPPED].shape[1]
        if skip > int(most):
            raise RequestError(f"clip_skip is {skip}", needed=f"at most {most}, for {self.name}")

    def __call__(
        self, reading: Reading, skip: int = 0, lora: Mapping[str, Float32] = NO_LORA
    ) -> tuple[Float32, Float32 | None]:
        """Return a prompt's states (tokens, dim) and, where the network gives it, its pooled state (dim,).

        Args:
            reading: of the prompt.
            skip: layers to leave out at the end, as diffusers counts.
            lora: inputs of LoRAs, where the network takes them (`adapters.mixed`).
        """
        rows = {id(row): self._encode(row, lora) for row in reading.rows}
        if skip:
            states = [outputs[SKIPPED][0, skip - 1] for outputs in rows.values()]
        else:
            states = [outputs[STATES][0] for outputs in rows.values()]
        pooled = None
        if any(tensor.name == POOLED for tensor in self.network.graph.outputs):
            outputs = rows.get(id(reading.pooled)) or self._encode(reading.pooled, lora)
            pooled = outputs[POOLED][0]
        return reading.combine(np.stack(states)), pooled

    def _encode(self, row: Row, lora: Mapping[str, Float32]) -> dict[str, Float32]:
        feeds = feeds_of(self.network.graph.inputs, row.ids[None], table=self.table, mask=row.mask)
        return call(self.network, feeds | {name: array[None] for name, array in lora.items()})

    def _inputs(self, name: str, what: str) -> tuple[int | str, ...]:
        """Return the shape of an input. Raise RequestError where the network has none of that name."""
        shapes = {tensor.name: tensor.shape for tensor in self.network.graph.inputs}
        if name not in shapes:
            raise self._older(what)
        return shapes[name]

    def _older(self, what: str) -> RequestError:
        found = f"the {self.name} of this bundle takes {what}"
        return RequestError(found, needed="a bundle of a newer export", fix=EXPORT)


def text_input(encoder: str, name: str) -> str:
    """Return the name that an encoder's input has beside those of other networks; ids have the encoder's own."""
    return encoder if name == IDS else f"{encoder}.{name}"


def feeds_of(
    inputs: Sequence[TensorSpec], ids: Ids, *, table: Float32 | None = None, mask: Ids | None = None
) -> dict[str, NDArray[Any]]:
    """Return a text encoder's inputs for ids (batch, 77): those of `IDS`, `VECTORS` and `MASK` that it has.

    Args:
        inputs: of the text encoder.
        ids: those from GIVEN on stand for rows of `table`.
        table: (n, dim).
        mask: (77,), 1 or 0; None is 1.
    """
    feeds: dict[str, NDArray[Any]] = {}
    for tensor in inputs:
        if tensor.name == IDS:
            feeds[IDS] = ids
        elif tensor.name == MASK:
            feeds[MASK] = np.ones_like(ids) * (1 if mask is None else mask)
        elif tensor.name == VECTORS:
            feeds[VECTORS] = np.zeros((*ids.shape, int(tensor.shape[2])), np.float32)
            if table is not None:
                feeds[VECTORS][ids >= GIVEN] = table[ids[ids >= GIVEN] - GIVEN]
    return feeds
