"""Servers that speak OpenAI's API as the backend."""
