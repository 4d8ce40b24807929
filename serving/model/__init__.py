"""The Llama family: shapes from `config.json`, the forward pass, and its weights from safetensors."""
