"""The files that ``transformers.AutoTokenizer`` reads."""

from pathlib import Path

from tokenizers import Tokenizer, processors

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.export.folder import write_json


def write_tokenizer(tokenizer: TextTokenizer, folder: Path, context: int) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json, which AutoTokenizer reads.

    Text becomes the run's own ids. A consumer that asks for special tokens (the default of ``tokenizer(text)``) gets
    the bos id in front, which is how every training document starts.
    """
    exported = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    exported.no_padding()
    exported.no_truncation()
    bos, eos = (exported.id_to_token(index) for index in (tokenizer.bos_id, tokenizer.eos_id))
    exported.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, tokenizer.bos_id)]
            ),
        ]
    )
    exported.save(str(folder / "tokenizer.json"))
    names = {"bos_token": bos, "eos_token": eos, "pad_token": eos}
    write_json(folder / "special_tokens_map.json", names)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **names,
            "added_tokens_decoder": {
                str(index): {
                    "content": token.content,
                    "lstrip": token.lstrip,
                    "normalized": token.normalized,
                    "rstrip": token.rstrip,
                    "single_word": token.single_word,
                    "special": token.special,
                }
                for index, token in sorted(exported.get_added_tokens_decoder().items())
            },
            "clean_up_tokenization_spaces": False,
            **({} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template}),
            "model_max_length": context,
        },
    )
