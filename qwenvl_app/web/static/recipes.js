// Programs that ask what was asked on the page.

import { address, hasKey } from "./api.js";

const quoted = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;
const data = (file) => `{"type": "image_url", "image_url": {"url": picture(${JSON.stringify(file.name)})}}`;

// One form post: for one question about one picture.
export function curl({ files, text }) {
  const lines = [`curl ${quoted(address("v1/image/recognize"))}`];
  if (hasKey()) lines.push(`-H "Authorization: Bearer $QWENVL_API_KEY"`);
  lines.push(`-F ${quoted(`image=@"${files[0].name}"`)}`, `--form-string ${quoted(`prompt=${text}`)}`);
  return `${lines.join(" \\\n  ")}\n`;
}

// The whole conversation, for the openai package. A turn is { role, text, files }.
export function python(name, turns) {
  const messages = turns.map(({ role, text, files }) => {
    const parts = [...files.map(data), `{"type": "text", "text": ${JSON.stringify(text)}}`];
    return `        {"role": "${role}", "content": [\n            ${parts.join(",\n            ")},\n        ]},\n`;
  });
  return `import base64
import mimetypes
import os
from pathlib import Path

from openai import OpenAI


def picture(name):
    kind = mimetypes.guess_type(name)[0] or "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(Path(name).read_bytes()).decode()}"


client = OpenAI(base_url=${JSON.stringify(address("v1"))}, api_key=os.environ.get("QWENVL_API_KEY", "none"))
answer = client.chat.completions.create(
    model=${JSON.stringify(name)},
    messages=[
${messages.join("")}    ],
)
print(answer.choices[0].message.content)
`;
}
