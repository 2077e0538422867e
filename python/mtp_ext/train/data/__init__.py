"""The data pipeline: sources, held-out split, tokenizers, memory-mapped shards, packed batches in a resumable order."""

from mtp_ext.train.data.config import DataConfig
from mtp_ext.train.data.dataset import Dataset, open_dataset
from mtp_ext.train.data.order import TrainingStream, evaluation_batches
from mtp_ext.train.data.packing import IGNORE_INDEX, Batch
from mtp_ext.train.data.prepare import prepare_data
from mtp_ext.train.data.shards import DamagedDataError, TokenSplit
from mtp_ext.train.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, learn_bpe, load_tokenizer

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "ByteTokenizer",
    "DamagedDataError",
    "DataConfig",
    "Dataset",
    "HuggingFaceTokenizer",
    "TokenSplit",
    "Tokenizer",
    "TrainingStream",
    "evaluation_batches",
    "learn_bpe",
    "load_tokenizer",
    "open_dataset",
    "prepare_data",
]
