"""Small real tokenizers of every kind of decoder, in directories as fine-tunes have them."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

TEXT = [
    "Write the words one two three, and then a few more words: don't, it's, we've.",
    "def f(x):\n    return x[0] + 1  # ok\n",
    "Ben has 3 nuts and 4 apples . How many ? None !",
] * 20
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>", "<|user|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL)
    made.train_from_iterator(TEXT, trainer)
    return made


def sentencepiece_like(decoder: decoders.Decoder | None = None) -> Tokenizer:
    """As Llama 2, Mistral and Gemma have it: a space before the first word, rare characters spelt in bytes."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # to train: words do not run together
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL[:1]))
    state = json.loads(made.to_str())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *BYTES])}
    for token in sorted(state["model"]["vocab"], key=state["model"]["vocab"].get):
        vocabulary.setdefault(token, len(vocabulary))
    state["model"] |= {"vocab": vocabulary, "byte_fallback": True, "fuse_unk": True}
    state["pre_tokenizer"] = None
    state["added_tokens"] = []
    made = Tokenizer.from_str(json.dumps(state))
    made.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def metaspace() -> Tokenizer:
    return sentencepiece_like(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))


def word_piece() -> Tokenizer:
    """As BERT's relatives have it: a space between all words, which decoding takes out before punctuation."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))
    return made


def word_ends() -> Tokenizer:
    """As the first GPT has it: `</w>` at the end of a word."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    made.train_from_iterator(TEXT, trainer)
    return made


KINDS = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece_like,
    "metaspace": metaspace,
    "word-piece": word_piece,
    "word-ends": word_ends,
}


def write(directory: Path, kind: str, *, clean: bool = False) -> Path:
    """A directory with a tokenizer and a configuration, without weights."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<|end|>", "<|user|>"],
        clean_up_tokenization_spaces=clean,
    )
    fast.chat_template = (
        "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    fast.save_pretrained(directory)
    LlamaConfig(vocab_size=len(fast), hidden_size=16, num_attention_heads=2).save_pretrained(directory)
    return directory
