"""Messages to token ids, by the checkpoint's template."""
