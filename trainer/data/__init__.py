"""From a corpus to token shards that are mapped into memory, and the cursor that draws every batch from them.

Run as a program it makes a dataset: `python -m trainer.data --config data.yaml out=DIR [base=DIR]`.
"""

from trainer.data.config import DataConfig
from trainer.data.cursor import Cursor
from trainer.data.dataset import Dataset, Examples, TokenStream
from trainer.data.make import make_dataset
from trainer.data.tokenizer import END_OF_TEXT, bytes_of_tokens, train_tokenizer
from trainer.data.windows import Batch

__all__ = [
    "END_OF_TEXT",
    "Batch",
    "Cursor",
    "DataConfig",
    "Dataset",
    "Examples",
    "TokenStream",
    "bytes_of_tokens",
    "make_dataset",
    "train_tokenizer",
]
