"""python chat_openai.py PICTURE QUESTION [QUESTION ...]: a conversation, with OpenAI's package."""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("QWENVL_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("QWENVL_API_KEY", "none"),
)
picture = base64.b64encode(Path(sys.argv[1]).read_bytes()).decode()
content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}]
messages = []
for question in sys.argv[2:]:
    content.append({"type": "text", "text": question})
    messages.append({"role": "user", "content": content})
    answer = ""
    for chunk in client.chat.completions.create(model="qwenvl", messages=messages, stream=True):
        piece = chunk.choices[0].delta.content or ""
        print(piece, end="", flush=True)
        answer += piece
    print()
    messages.append({"role": "assistant", "content": answer})
    content = []
