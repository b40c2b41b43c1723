"""OpenAI's chat route: what its bodies may be, its pictures and tools, its answers."""
