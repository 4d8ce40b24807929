"""What every part of a stack's specification is: a frozen, validated, plain value that refuses keys it does not know."""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator

# A Kubernetes object name that stays valid with the suffixes which the components add (RFC 1123 label, 63 characters).
NAME_PATTERN = r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
PositiveInt = Annotated[int, Field(ge=1, le=2**40)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**40)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False, le=1e18)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False, le=1e18)]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
MOST_NODES = 100_000
"""Of one pool, or of one gang; Kubernetes itself is tested to 5,000."""
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


class Unplannable(ValueError):
    """A value that the planner finds to be impossible; `where` is its key, with items of a list by their names."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(f"{where}: {message}")
        self.where, self.message = where, message


class Spec(BaseModel):
    """Base of all parts. Field docstrings become descriptions in the JSON schema that editors complete from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        """Left to itself pydantic takes true for 1, and 1 for true."""
        given = cast("dict[Any, Any]", values) if isinstance(values, dict) else {}
        for key, value in given.items():
            if key not in cls.model_fields:
                continue
            wants_bool = cls.model_fields[key].annotation is bool
            if isinstance(value, bool) and not wants_bool:
                raise Misplaced(f"true and false are no value of this key, and it is {str(value).lower()}", key)
            if wants_bool and not isinstance(value, bool):
                raise Misplaced(f"must be true or false, and it is {value!r}", key)
        return cast(Any, values)
