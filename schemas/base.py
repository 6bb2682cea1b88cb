"""What every part of the job spec is."""

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """Base of every part of the spec: frozen, and strict about unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_by_name=True, allow_inf_nan=False
    )
