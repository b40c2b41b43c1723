"""python structured_langchain.py PICTURE: an object of a class, with LangChain."""

import base64
import os
import sys
from pathlib import Path
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Shape(BaseModel):
    color: Literal["red", "yellow", "teal"]
    shape: Literal["circle", "rectangle", "triangle"]


model = ChatOpenAI(
    base_url=os.environ.get("QWENVL_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("QWENVL_API_KEY", "none"),
    model="qwenvl",
).with_structured_output(Shape, method="json_schema")
picture = base64.b64encode(Path(sys.argv[1]).read_bytes()).decode()
question = [
    {"type": "image", "base64": picture, "mime_type": "image/png"},
    {"type": "text", "text": "what is in the picture?"},
]
print(model.invoke([("user", question)]))
