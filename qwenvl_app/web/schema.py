"""Request models. Their errors are pydantic's, in the form that FastAPI gives them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

from qwenvl_app.errors import InvalidForm
from qwenvl_app.generation import SamplingParams
from qwenvl_app.web.forms import Form, Upload
from qwenvl_app.web.openapi import examples
from qwenvl_app.web.sampling_fields import SamplingFields, StopText

_ECHO = 1000  # characters of a wrong field that come back


def _expect_upload(value: Any) -> Upload:
    if not isinstance(value, Upload):
        raise ValueError(f"Expected UploadFile, received: {type(value)}")
    return value


class RecognizeForm(SamplingFields):
    """The two fields of ``POST /v1/image/recognize``, and those that may be sent with them."""

    prompt: str = Field(examples=examples.PROMPTS, json_schema_extra={"minLength": 1})
    image: Annotated[Upload, PlainValidator(_expect_upload, json_schema_input_type=bytes)]
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="The longest answer, in tokens."
    )
    stop: StopText | None = Field(
        default=None, description="Ends the answer where it would come, and is no part of it."
    )

    @field_validator("max_new_tokens")
    @classmethod
    def _within_the_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        limit: int = (info.context or {})["max_new_tokens"]
        if value is not None and value > limit:
            raise PydanticKnownError("less_than_equal", {"le": limit})
        return value

    @classmethod
    def parse(cls, form: Form, max_new_tokens: int) -> RecognizeForm:
        """Validate ``form``, in which an empty string counts as not sent. Raises InvalidForm.

        ``max_new_tokens``: the most that the field of this name may ask for.
        """
        sent = {name: value for name, value in form.items() if value != ""}
        try:
            return cls.model_validate(sent, context={"max_new_tokens": max_new_tokens})
        except ValidationError as error:
            raise InvalidForm([_fastapi_error(dict(item)) for item in error.errors()]) from None

    def sampling(self, repetition_limit: int) -> SamplingParams:
        """How to generate; what was not sent is the checkpoint's."""
        return SamplingParams(
            **self.sent(),
            max_new_tokens=self.max_new_tokens,
            stop=(self.stop,) if self.stop else (),
            repetition_limit=repetition_limit,
        )


def _fastapi_error(error: dict[str, Any]) -> dict[str, Any]:
    # FastAPI renders an exception in a context as {}; a missing field has no input. Where the
    # input is a file, FastAPI would render its insides. A long text is cut: escaped, a megabyte of
    # it could be six, sent to a client that does not read them.
    given = error["input"][:_ECHO] if isinstance(error["input"], str) else None
    rendered = {
        "type": error["type"],
        "loc": ["body", *error["loc"]],
        "msg": error["msg"],
        "input": given,
    }
    if "ctx" in error:
        rendered["ctx"] = {
            name: {} if isinstance(value, Exception) else value
            for name, value in error["ctx"].items()
        }
    return rendered
