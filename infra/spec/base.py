"""What every part of a stack's specification is: a frozen, validated, plain value that refuses keys it does not know."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag

# A Kubernetes object name that stays valid with the suffixes which the components add (RFC 1123 label, 63 characters).
Name = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")]
PositiveInt = Annotated[int, Field(ge=1, le=2**40)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**40)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False, le=1e18)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False, le=1e18)]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=1, le=65535)]


Auto = Annotated[Literal["auto"], Tag("auto")]
"""A value that is left to the planner."""
OR_AUTO = Discriminator(lambda value: "auto" if isinstance(value, str) else "given")
"""Tells `auto` from a value given (tagged `given`), so that a bad one gets one error and not two."""


class Misplaced(ValueError):
    """A value that contradicts another part of the stack; `keys` lead from the part that was checked to the value."""

    def __init__(self, message: str, *keys: str | int) -> None:
        super().__init__(message)
        self.keys = keys


class Spec(BaseModel):
    """Base of all parts. Field docstrings become descriptions in the JSON schema that editors complete from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())
