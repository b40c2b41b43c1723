"""What a client may say about sampling, on every route that generates, and its bounds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class SamplingFields(BaseModel):
    """Named as those of ``SamplingParams``; what is not sent is the checkpoint's.

    All bounds refuse NaN and infinity too.
    """

    model_config = ConfigDict(frozen=True)

    temperature: float | None = Field(
        default=None, ge=0, le=2, description="How much is left to chance; 0: nothing."
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Draw from the likeliest tokens of this total."
    )
    top_k: int | None = Field(
        default=None, ge=-1, le=2**31 - 1, description="Draw from so many tokens; 0, -1: from all."
    )
    min_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="The least probability, as a share of the likeliest's.",
    )
    presence_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="Taken from the logit of a token that was written."
    )
    frequency_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="The same, for each time that it was written."
    )
    # Divided by less, a score may be infinite, and then no token can be drawn.
    repetition_penalty: float | None = Field(
        default=None,
        ge=0.01,
        le=2,
        description="Divides the score of tokens that are there; 1: none.",
    )
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        le=2**63 - 1,
        description="Makes a sampled answer repeatable; -1: none, as for vLLM.",
    )

    def sent(self) -> dict[str, Any]:
        """Those that were sent, as arguments of ``SamplingParams``."""
        sent = self.model_dump(include=set(SamplingFields.model_fields), exclude_none=True)
        return sent | {"seed": None} if self.seed == -1 else sent
