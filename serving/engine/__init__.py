"""The engine: sequence · block_manager · scheduler · attention · sampler · model_runner · engine, and its own process.

Importing this package, `messages` or `client` costs nothing heavy: torch is imported in the engine's process alone.
"""
