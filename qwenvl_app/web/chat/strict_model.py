"""What every model of a JSON body is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Nothing is converted, and an unknown field is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
