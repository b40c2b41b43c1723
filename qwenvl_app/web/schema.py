"""Request models. Their errors are pydantic's, in the form that FastAPI gives them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, WithJsonSchema

from qwenvl_app.errors import InvalidForm
from qwenvl_app.web import examples
from qwenvl_app.web.forms import Form, Upload

_ECHO = 1000  # characters of a wrong field that come back


def _expect_upload(value: Any) -> Upload:
    if not isinstance(value, Upload):
        raise ValueError(f"Expected UploadFile, received: {type(value)}")
    return value


class RecognizeForm(BaseModel):
    """The two fields of ``POST /v1/image/recognize``."""

    model_config = ConfigDict(frozen=True)

    prompt: str = Field(examples=examples.PROMPTS)
    image: Annotated[
        Upload,
        PlainValidator(_expect_upload),
        WithJsonSchema({"type": "string", "format": "binary"}),
    ]

    @classmethod
    def parse(cls, form: Form) -> RecognizeForm:
        """Validate ``form``, in which an empty string counts as not sent. Raises InvalidForm."""
        try:
            return cls.model_validate({name: value for name, value in form.items() if value != ""})
        except ValidationError as error:
            raise InvalidForm([_fastapi_error(dict(item)) for item in error.errors()]) from None


def _fastapi_error(error: dict[str, Any]) -> dict[str, Any]:
    # FastAPI renders the exception in a context as {}; a missing field has no input. Where the
    # input is a file, FastAPI would render its insides. A long text is cut: escaped, a megabyte of
    # it could be six, sent to a client that does not read them.
    given = error["input"][:_ECHO] if isinstance(error["input"], str) else None
    rendered = {
        "type": error["type"],
        "loc": ["body", *error["loc"]],
        "msg": error["msg"],
        "input": given,
    }
    return rendered | ({"ctx": {"error": {}}} if "ctx" in error else {})
