"""OpenAI's HTTP API over the engine: protocol (what may be asked) · generation (asking) · completions · chat · app."""
