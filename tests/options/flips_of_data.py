"""Flips of ``data``: what is read, and how it becomes batches."""

from tests.options.flip import Flip, each, items

FILES = ("data.corpus.path=@corpus@",)
JSONL = ("data.corpus.path=@table.jsonl@",)
HUB = ("data=hub", "data.corpus.path=@hub@", "data.corpus.subset=a")
CHAT = (
    "data=chat",
    "data/tokenizer=bpe",
    "data.tokenizer.vocab_size=320",
    "data.corpus.path=@chats.jsonl@",
    "data.corpus.template=@template@",
)
TWO = "{{a: {{corpus: files, path: @corpus@, weight: {a}}}, b: {{corpus: files, path: @other@, weight: {b}}}}}"
MIXTURE = ("data=mixture", f"data.corpus.corpora={TWO.format(a=1, b=3)}")
PRETRAINED = (*FILES, "data/tokenizer=pretrained", "data.tokenizer.vocab_size=321",
              "data.tokenizer.source=@words.json@",
              "data.tokenizer.bos='<|endoftext|>'", "data.tokenizer.eos='<|endoftext|>'")  # fmt: skip
PARTS = (*FILES, "command=prepare", "paths.data=@new@/d", "data.prepare.part=0", "data.prepare.parts=2",
         "data.prepare.wait_minutes=0")  # fmt: skip
DIGITS = ("+recipe=digits_mlp", "data.batch_size=64")
IMAGES = ("+recipe=digits_mlp", "data=images", "data/source=image_hub",
          "data.source.path=@images@", "data.image_size=6", "data.classes=4",
          "data.source.subset=a", "data.source.image_field=image", "data.batch_size=16")  # fmt: skip

FLIPS: dict[str, Flip] = {
    "data=text.corpus=stdlib.validation_every": Flip(
        "data.corpus.validation_every=60", ("data=stdlib",), see="first_documents"
    ),
    **each({"path": "@other@", "patterns": "['0*.txt']", "validation_path": "@other@", "validation_every": "9"},
           *FILES, under="data=text.corpus=files.", see="prepared"),
    **each({"text_field": "other"}, *JSONL, under="data=text.corpus=files.", see="prepared"),
    **each({"path": "@hub2@", "subset": "b", "split": "test", "text_field": "other", "data_files": "[test.parquet]",
            "max_documents": "20", "validation_split": "test", "validation_every": "9"},
           *HUB, under="data=text.corpus=hub.", see="prepared"),
    **each({"streaming": "true"}, *HUB, under="data=text.corpus=hub.", see="hub_rows"),
    **each({"revision": "v2"}, "data=hub", "data.corpus.path=owner/name", under="data=text.corpus=hub.",
           see="hub_call"),
    **each({"path": "@chats2.jsonl@", "messages_field": "talk", "template": "@template2@",
            "validation_path": "@chats2.jsonl@", "validation_every": "9"},
           *CHAT, under="data=text.corpus=chat.", see="prepared"),
    "data=text.corpus=chat.patterns": Flip(
        "data.corpus.patterns=['chats2*']", (*CHAT, "data.corpus.path=@talks@"), see="prepared"
    ),
    "data=text.corpus=mixture.corpora": Flip(f"data.corpus.corpora={TWO.format(a=3, b=1)}", MIXTURE),
    **each({"vocab_size": "330", "end_of_text": "'<|end|>'"}, *FILES, under="data=text.tokenizer=bpe.", see="prepared"),
    **each({"vocab_size": "330"}, *PRETRAINED, under="data=text.tokenizer=pretrained."),
    **each({"source": "@words2.json@", "bos": "'<|other|>'", "eos": "'<|other|>'"}, *PRETRAINED,
           under="data=text.tokenizer=pretrained.", see="prepared"),
    **each({"revision": "v2"}, *PRETRAINED, "data.tokenizer.source=owner/name",
           under="data=text.tokenizer=pretrained.", see="tokenizer_call"),
    **each({"sequence_length": "16", "attend_within_documents": "true", "validation_tokens": "64", "shuffle": "none"},
           under="data=text."),
    **each({"shuffle_window": "5"}, "data.shuffle=window", under="data=text."),
    **each({"workers": "1"}, under="data=text.", see="loaders"),
    **each({"shard_tokens": "4096", "rebuild": "true"}, *FILES, under="data=text.", see="prepared"),
    **each({"processes": "2"}, *FILES, "paths.data=@new@/d", under="data=text.prepare.", see="shared_out"),
    **each({"part": "1", "parts": "3", "unit_mb": "0.001"}, *PARTS, under="data=text.prepare.", see="shared_out"),
    **each({"wait_minutes": "1e-9"}, *PARTS, "data.prepare.part=1", under="data=text.prepare.", see="shared_out"),
    **each({"verify": "quick"}, under="data=text.", see="checked"),
    **items({"from": "[{from: 3, weights: {a: 1}}]", "weights": "[{from: 2, weights: {b: 1}}]"},
            "[{from: 2, weights: {a: 1}}]", *MIXTURE, under="data=text.stages"),
    "data=images.source=digits.test_every": Flip("data.source.test_every=4", DIGITS, see="images"),
    **each({"path": "@images2@", "subset": "b", "image_field": "picture", "label_field": "kind", "train_split": "more",
            "validation_split": "more", "test_split": "more"}, *IMAGES, under="data=images.source=image_hub.",
           see="images"),
    **{f"data=images.{name}": Flip(f"data.{name}={value}", IMAGES, see="images", refused=True)
       for name, value in (("image_size", 8), ("classes", 3), ("channels", 3))},
    **each({"batch_size": "32", "mean": "[0.3]", "std": "[0.5]", "validation_every": "5"}, *DIGITS,
           under="data=images."),
    **each({"workers": "1"}, *DIGITS, under="data=images.", see="loaders"),
    **each({"crop_padding": "2", "flip": "true"}, *DIGITS, under="data=images.augmentation."),
}  # fmt: skip
